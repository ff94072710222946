"""The fused copy and checksum, run by Triton's own interpreter on a CPU.

Its speed, and that it reads a GPU's memory back, are tested on GPUs: `test_gpu.py` and the benchmarks.
"""

import ctypes
import functools
import itertools
import sys
import threading
import time
import types

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpreted
from loaders import model_of, plain, sent, update

from tpcolocate.in_server.tpcolocate_receiver import copy_program, kernels
from tpcolocate.in_server.tpcolocate_receiver.checksums import word_sum
from tpcolocate.in_server.tpcolocate_receiver.copy_plan import CopyPlan
from tpcolocate.in_server.tpcolocate_receiver.copy_program import CopyProgram
from tpcolocate.in_server.tpcolocate_receiver.kernel_tables import (
    CASTS,
    ChecksumTable,
    CopyTable,
    Layout,
    Slices,
    ordered,
)
from tpcolocate.in_server.tpcolocate_receiver.regions import whole
from tpcolocate.weights.plan.sharding import LocalShard
from tpcolocate.weights.plan.slices import Read, SliceKind, TensorSlice, block_of
from tpcolocate.weights.transport.checksums import DirectChecksums, PlacedChecksums

# The interpreter of the kernels takes its time.
pytestmark = [pytest.mark.quick, pytest.mark.slow, pytest.mark.timeout(120)]

CPU = torch.device("cpu")
KERNEL = "tpcolocate.in_server.tpcolocate_receiver.triton_kernel"


@pytest.fixture(scope="module")
def kernel():
    with interpreted(KERNEL) as module:
        yield module


def words(shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, tuple(shape), dtype=torch.int64, generator=generator)


def view_of(base, cut):
    return base[tuple(slice(start, start + length) for start, length in cut)]


def layout_of(dst, src):
    return Layout(tuple(dst.shape), src.stride(), dst.stride(), src.dtype, dst.dtype)


def slices_of(pairs, slots=None, weights=None):
    """Each copy reads a region of its own."""
    slices = Slices()
    for i, (dst, src) in enumerate(pairs):
        slot, weight = slots[i] if slots else i, weights[i] if weights else 1
        slices.add(layout_of(dst, src), 0, dst.data_ptr(), slot=slot, weight=weight, region=str(i))
    return slices


def table_of(pairs, slots=None, weights=None, **options):
    regions = {str(i): src for i, (_, src) in enumerate(pairs)}
    return CopyTable(slices_of(pairs, slots, weights), regions, CPU, casts=frozenset(CASTS), **options)


def run(kernel, pairs, slots=None, weights=None, **options):
    """The copies by the kernel; what it summed up."""
    sums = torch.zeros(len(pairs), dtype=torch.int64)
    table = table_of(pairs, slots, weights, **options)
    assert table.rest == []
    table.run(kernel.launch, sums)
    return sums.tolist()


def summed(kernel, sources, dtypes, slots=None, weights=None):
    """What the kernel sums up without a copy."""
    slices = Slices()
    for i, (src, dtype) in enumerate(zip(sources, dtypes)):
        slot, weight = slots[i] if slots else i, weights[i] if weights else 1
        slices.add(Layout.to_sum(src.shape, src.stride(), src.dtype, dtype), src.data_ptr(), slot=slot, weight=weight)
    table = ChecksumTable(slices, CPU, casts=frozenset(CASTS))
    assert table.rest == []
    sums = torch.zeros(len(sources), dtype=torch.int64)
    table.run(kernel.launch, sums)
    return sums.tolist()


def wrapped(number):
    return (number + 2**63) % 2**64 - 2**63


def test_it_passes_the_test_that_it_must_pass_on_a_gpu(kernel):
    kernels.verify(kernel.launch, CPU)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("cast", CASTS, ids=str)
def test_every_cast_passes_the_test_that_it_must_pass_on_a_gpu(kernel, cast):
    kernels.verify_cast(kernel.launch, CPU, cast)


@pytest.mark.parametrize(
    "check", [kernels.verify, functools.partial(kernels.verify_cast, cast=CASTS[0])], ids=["copy", "cast"]
)
@pytest.mark.parametrize("spoiled, words_of_error", [
    (lambda launch, *what, copies=True: what[2].add_(1), "sums of copies"),
    (lambda launch, *what, copies=True: None, r"\((copies|torch.float32 to torch.bfloat16)\)"),
    (lambda launch, *what, copies=True: launch(*what) if copies else None, "sums of checksums"),
    (lambda launch, parts, *what, copies=True: launch(parts.clone().index_fill_(1, torch.tensor(8), 1), *what, copies=copies),
     "sums of copies"),
])  # fmt: skip
def test_a_kernel_that_does_something_else_does_not_pass(kernel, check, spoiled, words_of_error):
    with pytest.raises(RuntimeError, match=f"failed its test.*{words_of_error}"):
        check(functools.partial(spoiled, kernel.launch), CPU)


def test_what_is_summed_up_is_what_is_there_and_not_what_was_given(kernel):
    src, place = words((2, 64)), torch.zeros(1, 64, dtype=torch.int64)
    [found] = run(kernel, [(place.expand(2, 64), src)])
    assert torch.equal(place[0], src[1]) or torch.equal(place[0], src[0])
    assert found == int(2 * place.sum()) != int(src.sum())


def test_a_sum_of_what_was_given_instead_of_what_arrived_does_not_pass(kernel):
    def trusting(parts, tiles, sums, variant):
        before = sums.clone()
        kernel.launch(parts, tiles, sums, variant)
        if before[-1] != sums[-1]:  # as if both rows had arrived
            first, second, weight = parts[-1, 0], parts[-1, 4], parts[-1, 8]
            rows = [(ctypes.c_int64 * 64).from_address(int(first + 8 * second * row)) for row in (0, 1)]
            sums[-1] = before[-1] + torch.tensor(rows, dtype=torch.int64).sum() * weight

    with pytest.raises(RuntimeError, match=r"failed its test \(sums of copies \[5\]\)"):
        kernels.verify(trusting, CPU)


@given(
    st.lists(st.integers(1, 7), min_size=0, max_size=3),
    st.integers(1, 40).map(lambda n: 2 * n),
    st.integers(0, 3).map(lambda n: 2 * n),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_cut_out_arrives_and_nothing_beside_it_changes(kernel, outer, width, margin, into_whole, seed):
    shape = [*outer, width]
    given_, taken = [size + 2 for size in outer] + [width + 2 * margin], [*outer, width + 4]
    src = view_of(words(given_, seed), [*((1, size) for size in outer), (margin, width)])
    base = words(shape if into_whole else taken, seed + 1)
    dst = base if into_whole else base[..., 2 : 2 + width]
    before = base.clone()
    assert run(kernel, [(dst, src)]) == [int(src.sum())]
    assert torch.equal(dst, src)
    if not into_whole:
        assert torch.equal(base[..., :2], before[..., :2]) and torch.equal(base[..., -2:], before[..., -2:])


@pytest.mark.parametrize("shape", [(3, 8192), (1, 20000), (70, 300), (33, 2), (5, 1024), (1, 2), (2, 8194)], ids=str)
def test_rows_of_every_length_are_cut_into_tiles_without_gaps(kernel, shape):
    src = words((shape[0], shape[1] + 6))[:, 2 : 2 + shape[1]]
    dst = torch.zeros(shape, dtype=torch.int64)
    assert run(kernel, [(dst, src)]) == [int(src.sum())] and torch.equal(dst, src)


def test_many_copies_have_each_their_own_sum(kernel):
    sources = [words((n, 2 * n), n) for n in range(1, 12)]
    targets = [torch.zeros_like(source) for source in sources]
    assert run(kernel, list(zip(targets, sources))) == [int(source.sum()) for source in sources]
    assert all(map(torch.equal, targets, sources))


def test_what_is_only_summed_up_is_written_nowhere(kernel):
    sources = [words((3, 8192), 1), words((70, 306), 2)[:, 2:302], words((2,), 3), words((3, 6, 20), 4)[:, 1:5, 2:10]]
    sources += [torch.randn(5, 64), torch.randn(9, 40)[:, 8:32]]
    dtypes = [*[torch.int64] * 4, torch.bfloat16, torch.float16]
    before = [source.clone() for source in sources]
    expected = [int(word_sum(source.to(dtype))) for source, dtype in zip(sources, dtypes)]
    assert summed(kernel, sources, dtypes) == expected
    assert all(map(torch.equal, sources, before))


ODD = [
    ("an odd number of words", lambda: (torch.zeros(3, dtype=torch.int64), words((3,)))),
    ("a start between two pairs", lambda: (torch.zeros(4, dtype=torch.int64), words((7,))[1:5])),
    ("rows that start between two pairs", lambda: (torch.zeros(3, 4, dtype=torch.int64), words((3, 5))[:, :4])),
    ("columns that are not dense", lambda: (torch.zeros(4, 4, dtype=torch.int64), words((4, 4)).t())),
    ("another dtype", lambda: (torch.zeros(4), torch.ones(4, dtype=torch.int64))),
    ("nothing", lambda: (torch.zeros(0, dtype=torch.int64), words((0,)))),
    ("other shapes", lambda: (torch.zeros(4, dtype=torch.int64), words((2, 2)))),
    ("thousands of blocks", lambda: (torch.zeros(40, 40, 2, 2, dtype=torch.int64), words((42, 42, 4, 4))[:40, :40, :2, :2])),
]  # fmt: skip


@pytest.mark.parametrize("make", [make for _, make in ODD], ids=[name for name, _ in ODD])
def test_what_the_kernel_cannot_copy_is_left_to_torch(make):
    good = (torch.zeros(4), torch.ones(4))
    assert table_of([good, make(), good]).rest == [1]


# --- slots, weights and casts ---------------------------------------------------------------------------------------


def test_many_slices_are_added_up_in_few_slots_each_with_its_weight(kernel):
    sources = [words((n, 2 * n), n) for n in range(1, 12)]
    targets = [torch.zeros_like(source) for source in sources]
    slots, weights = [n % 3 for n in range(11)], [2**31 - 1 - 2 * n for n in range(11)]
    expected = [
        wrapped(sum(weight * int(src.sum()) for src, at, weight in zip(sources, slots, weights) if at == slot))
        for slot in range(3)
    ]
    assert run(kernel, list(zip(targets, sources)), slots, weights)[:3] == expected
    assert summed(kernel, sources, [torch.int64] * 11, slots, weights)[:3] == expected
    assert all(map(torch.equal, targets, sources))


def every_float32():
    """All signs, exponents and leading bits, with what decides how they are rounded behind them."""
    leading = torch.arange(2**16, dtype=torch.int64) << 16
    behind = torch.tensor([0, 1, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (leading[:, None] | behind).flatten()
    values = (bits - (bits >= 2**31) * 2**32).to(torch.int32).view(torch.float32)
    return values[~values.isnan()]


def every_one(dtype):
    if dtype is torch.float32:
        found = every_float32()
    else:
        found = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        found = found[~found.isnan()]
    return found[: len(found) // 8 * 8]


def bits_of(tensor):
    return tensor.view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("cast", CASTS, ids=str)
def test_every_number_is_rounded_as_torch_does(kernel, cast):
    source = every_one(cast[0])
    expected = source.to(cast[1])
    target = torch.full_like(expected, 7)
    found = run(kernel, [(target, source)])
    assert torch.equal(bits_of(target), bits_of(expected)), "infinite ones, subnormal ones and the sign of zero too"
    assert found == [int(word_sum(expected))] == summed(kernel, [source], [cast[1]])


def test_what_is_no_number_stays_none(kernel):
    source = torch.tensor([float("nan"), 1, -float("nan"), 2] * 4)
    for dtype in (torch.bfloat16, torch.float16):
        target = torch.zeros(16, dtype=dtype)
        run(kernel, [(target, source)])
        assert torch.equal(target.isnan(), source.isnan()) and torch.equal(target[1::2], source[1::2].to(dtype))


@given(
    st.sampled_from(CASTS),
    st.lists(st.integers(1, 5), min_size=0, max_size=3),
    st.integers(1, 20).map(lambda n: 8 * n),
    st.integers(0, 3).map(lambda n: 8 * n),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_cut_out_is_cast_and_nothing_beside_it_changes(
    kernel, cast, outer, width, margin, into_whole, seed
):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn([*(size + 1 for size in outer), width + 2 * margin], generator=generator).to(cast[0])
    src = view_of(base, [*((1, size) for size in outer), (margin, width)])
    into = torch.full([*outer, width + (0 if into_whole else 16)], 3.0, dtype=cast[1])
    dst = into if into_whole else into[..., 8 : 8 + width]
    [found] = run(kernel, [(dst, src)], weights=[5])
    expected = src.to(cast[1])
    assert torch.equal(dst, expected) and found == wrapped(5 * int(word_sum(expected)))
    assert summed(kernel, [src], [cast[1]], weights=[5]) == [found]
    assert into_whole or ((into[..., :8] == 3).all() and (into[..., -8:] == 3).all())


@pytest.mark.parametrize("shape", [(3, 16384), (1, 40000), (70, 304), (33, 8), (5, 2048), (1, 8), (2, 16392)], ids=str)
def test_rows_of_every_length_are_cast_without_gaps(kernel, shape):
    src = torch.randn(shape[0], shape[1] + 8)[:, : shape[1]]
    dst = torch.zeros(shape, dtype=torch.bfloat16)
    assert run(kernel, [(dst, src)]) == [int(word_sum(dst))] and torch.equal(dst, src.bfloat16())


ODD_CASTS = [
    ("rows of no whole words", lambda: (torch.zeros(3, 6, dtype=torch.bfloat16), torch.ones(3, 6))),
    ("a target between two pairs of words", lambda: (torch.zeros(12, dtype=torch.bfloat16)[4:], torch.ones(8))),
    ("a source between two pairs of words", lambda: (torch.zeros(8, dtype=torch.bfloat16), torch.ones(10)[2:])),
    ("another dtype", lambda: (torch.zeros(8, dtype=torch.float64), torch.ones(8))),
    ("integers", lambda: (torch.zeros(8), torch.ones(8, dtype=torch.int32))),
    ("columns that are not dense", lambda: (torch.zeros(8, 8, dtype=torch.bfloat16), torch.ones(8, 8).t())),
]  # fmt: skip


@pytest.mark.parametrize("make", [make for _, make in ODD_CASTS], ids=[name for name, _ in ODD_CASTS])
def test_a_cast_that_the_kernel_cannot_do_is_left_to_torch(make):
    dst, src = make()
    good = (torch.zeros(8, dtype=torch.bfloat16), torch.ones(8))
    assert table_of([good, (dst, src), good]).rest == [1]


def test_a_cast_that_was_not_compiled_is_left_to_torch():
    pair = (torch.zeros(8, dtype=torch.bfloat16), torch.ones(8))
    assert CopyTable(slices_of([pair]), {"0": pair[1]}, CPU).rest == [0]
    others = frozenset(CASTS) - {(torch.float32, torch.bfloat16)}
    assert CopyTable(slices_of([pair]), {"0": pair[1]}, CPU, casts=others).rest == [0]


# --- order ----------------------------------------------------------------------------------------------------------


def test_tiles_of_one_holder_keep_their_order_and_those_of_all_are_spread_evenly():
    holders = numpy.array([0] * 50 + [1] * 10 + [2] * 25)
    found = ordered(holders, "interleaved")
    assert sorted(found) == list(range(85))
    for holder in range(3):
        of_holder = [i for i in found if holders[i] == holder]
        assert of_holder == sorted(of_holder)
    for begin in range(0, 68, 17):  # of the 85, each 17 hold 10, 2 and 5
        counts = numpy.bincount(holders[found[begin : begin + 17]], minlength=3)
        assert numpy.abs(counts - [10, 2, 5]).max() <= 1
    assert ordered(holders, "sequential").tolist() == list(range(85))
    assert ordered(numpy.array([], dtype=int), "interleaved").tolist() == []
    with pytest.raises(ValueError, match="'rotated'"):
        ordered(holders, "rotated")


def test_the_holder_of_a_region_is_its_name_in_front_of_the_slash(kernel):
    src, dst = words((6, 8 * 8192)), torch.zeros(6, 8 * 8192, dtype=torch.int64)
    names = ["r0/a", "r0/b", "r1/a", "r1/b", "stage0", "stage1"]
    slices = Slices()
    for i, name in enumerate(names):
        slices.add(layout_of(dst[i], src[i]), 0, dst[i].data_ptr(), slot=0, region=name)
    launched = []
    for order in ("sequential", "interleaved"):
        table = CopyTable(slices, dict(zip(names, src)), CPU, order=order)
        table.run(lambda parts, tiles, *what: launched.append(tiles[:, 0].tolist()), None)
    assert launched[0] == [i for i in range(6) for _ in range(8)]
    assert launched[1][::3] == launched[0][:16], "r0"
    assert launched[1][1::3] == launched[0][16:32] and launched[1][2::3] == launched[0][32:]
    sums = torch.zeros(1, dtype=torch.int64)
    table.run(kernel.launch, sums)
    assert torch.equal(dst, src) and int(sums) == int(src.sum())


def test_a_table_reads_regions_that_were_mapped_again_and_refuses_others(kernel):
    first, second = words((64,), 1), words((64,), 2)
    targets = [torch.zeros(4, 4, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)]

    def views(region):
        return region[2:34].view(4, 8)[:, 2:6], region[40:46]

    slices = Slices()
    for i, (dst, src) in enumerate(zip(targets, views(first))):
        slices.add(layout_of(dst, src), 8 * src.storage_offset(), dst.data_ptr(), slot=i, region="r")
    table = CopyTable(slices, {"r": first}, CPU)
    assert table.rest == []
    for region in (first, second, first):
        sums = torch.zeros(2, dtype=torch.int64)
        assert table.rebase({"r": region})
        table.run(kernel.launch, sums)
        assert all(map(torch.equal, targets, views(region)))
        assert sums.tolist() == [int(view.sum()) for view in views(region)]
    assert not table.rebase({"r": words((62,))}), "shorter: it would be read beyond its end"
    assert not table.rebase({"r": words((65,))[1:]}), "between two pairs of words"
    table.run(kernel.launch, torch.zeros(2, dtype=torch.int64))
    assert all(map(torch.equal, targets, views(first))), "still the last that it could"


# --- in a program ---------------------------------------------------------------------------------------------------


@pytest.fixture
def made(kernel, monkeypatch):
    """A function that lets the kernels be there, or not yet."""

    def there(is_there, casts=CASTS):
        monkeypatch.setattr(kernels, "_launchers", {CPU: kernel.launch} if is_there else {})
        monkeypatch.setattr(kernels, "_casts", {CPU: frozenset(casts)} if is_there else {})

    return there


SLICES = [
    ["a", 0, [0, 0], [2, 16], "left", 64, "float32", [64, 1], 2, 1],
    ["a", 0, [2, 0], [2, 16], "right", 0, "float32", [16, 1], 0, 2**31 - 1],
    ["b", 0, None, None, "right", 128, "float32", [1], 0, 3],  # three elements: torch's
]


def sums_of(new):
    upper, lower, rest = (int(word_sum(part)) for part in (new["a"][:2], new["a"][2:], new["b"]))
    return [wrapped((2**31 - 1) * lower + 3 * rest), 0, upper]


def program_and_regions():
    model = model_of(plain, {"a": (4, 16), "b": (3,)})
    update(model, sent({"a": (4, 16), "b": (3,)}, 1))
    regions = {"left": torch.zeros(2 * 64 * 4, dtype=torch.uint8), "right": torch.zeros(140, dtype=torch.uint8)}
    return model, CopyProgram(3, SLICES, model.plan), regions


def filled(regions, seed):
    new = sent({"a": (4, 16), "b": (3,)}, seed)
    regions["left"].view(torch.float32).view(2, 64)[:, 16:32] = new["a"][:2]
    regions["right"].view(torch.float32)[:] = torch.cat([new["a"][2:].reshape(-1), new["b"]])
    return new


@pytest.mark.parametrize("keep", [True, False], ids=["mapped", "staged"])
@pytest.mark.parametrize("order", list(itertools.product([False, True], repeat=3)), ids=str)
def test_a_program_does_the_same_with_and_without_the_kernel(made, order, keep):
    model, program, regions = program_and_regions()
    for seed, is_there in enumerate(sorted(order), 2):  # it comes, and stays
        made(is_there)
        new = filled(regions, seed)
        found, seconds = program.run(model.plan, regions, keep_views=keep)
        assert torch.equal(model.a, new["a"]) and torch.equal(model.b, new["b"])
        assert found == sums_of(new)
        assert list(seconds) == ["copy"], "one of them is torch's"


def test_a_program_reads_new_memory_after_its_regions_were_let_go(made):
    made(True)
    model, program, regions = program_and_regions()
    for seed in (2, 3):
        regions = {name: torch.zeros_like(region) for name, region in regions.items()}
        new = filled(regions, seed)
        program.run(model.plan, regions, keep_views=True)
        assert torch.equal(model.a, new["a"]) and torch.equal(model.b, new["b"])
        program.forget_views()


def test_which_copies_are_whose_is_divided_once(made, monkeypatch):
    made(False)
    model, program, regions = program_and_regions()
    divided, forgotten, rebased = [], [], []
    forget, rebase = program._replay.forget, CopyTable.rebase
    table = lambda *args, **kwargs: divided.append(1) or CopyTable(*args, **kwargs)
    monkeypatch.setattr(copy_program, "CopyTable", table)
    monkeypatch.setattr(program._replay, "forget", lambda: forgotten.append(1) or forget())
    monkeypatch.setattr(CopyTable, "rebase", lambda *args: rebased.append(1) or rebase(*args))
    for _ in range(2):
        program.run(model.plan, regions, keep_views=True)
    assert not divided
    made(True)
    for _ in range(3):
        program.run(model.plan, regions, keep_views=True)
    assert (len(divided), len(forgotten), len(rebased)) == (1, 1, 0), (
        "what was queued for all of them is queued no more"
    )
    program.run(model.plan, regions, keep_views=False)
    program.forget_views()
    program.run(model.plan, regions, keep_views=True)
    assert (len(divided), len(rebased)) == (1, 1)


def test_what_the_kernel_does_all_of_is_called_so(made):
    made(True)
    model = model_of(plain, {"a": (4, 16)})
    new = sent({"a": (4, 16)}, 1)
    update(model, new)
    program = CopyProgram(1, [["a", 0, None, None, "r", 0, "float32", [16, 1], 0, 1]], model.plan)
    found, seconds = program.run(model.plan, {"r": new["a"].view(-1).view(torch.uint8)}, keep_views=True)
    assert list(seconds) == ["one_pass"] and found == [int(word_sum(new["a"]))]


def test_a_program_casts_with_kernels_once_they_are_compiled(made):
    shapes = {"a": (4, 16), "b": (5,), "c": (2, 8)}
    model = model_of(plain, shapes)
    update(model, sent(shapes, 1))
    for name in "ab":
        getattr(model, name).data = torch.zeros(shapes[name], dtype=torch.bfloat16)
    new = sent(shapes, 2)
    update(model, new)  # which traces the loader again, into parameters of other dtypes
    slices = [
        [name, 0, None, None, name, 0, "float32", list(new[name].stride()), 0, 2 * i + 1]
        for i, name in enumerate(shapes)
    ]
    program = CopyProgram(1, slices, model.plan)
    assert program.wanted_casts == {(torch.float32, torch.bfloat16)}
    regions = {name: tensor.view(-1).view(torch.uint8) for name, tensor in new.items()}
    for there, divided in (((False,), [0, 1, 2]), ((True, ()), [0, 1]), ((True, program.wanted_casts), [1])):
        made(*there)
        for name, tensor in new.items():
            tensor.mul_(1.1)
            getattr(model, name).data.zero_()
        found, seconds = program.run(model.plan, regions, keep_views=True)
        expected = {name: tensor.to(getattr(model, name).dtype) for name, tensor in new.items()}
        assert all(torch.equal(getattr(model, name), tensor) for name, tensor in expected.items())
        assert found == [wrapped(sum((2 * i + 1) * int(word_sum(one)) for i, one in enumerate(expected.values())))]
        assert program._rest == divided and list(seconds) == ["copy"]


BAD = [
    ({0: "a", 5: 4 * 4 * 12 + 1}, "a slice ends at byte 449 of region 'r', which has 448"),
    ({5: -4}, "a slice of a starts at byte -4 of region 'r'"),
    ({2: [3, 0], 3: [2, 16]}, r"from \[3, 0\] of \[2, 16\] is no part of \(4, 16\)"),
    ({2: [-1, 0], 3: [2, 16]}, "is no part of"),
    ({7: [16]}, r"of the shape \(4, 16\) is read with strides \[16\]"),
    ({7: [-16, 1]}, "is read with strides"),
    ({8: 2}, "slot 2 of 2 and weight 1"),
    ({8: -1}, "slot -1 of 2"),
    ({9: 2}, "slot 0 of 2 and weight 2"),
    ({9: 0}, "weight 0"),
    ({9: 2**31 + 1}, "weight 2147483649"),
]


@pytest.mark.parametrize("changes, words_of_error", BAD, ids=[words for _, words in BAD])
@pytest.mark.parametrize("is_there", [False, True], ids=["torch", "kernel"])
def test_a_slice_outside_of_its_memory_is_refused_before_anything_is_written(made, is_there, changes, words_of_error):
    made(is_there)
    model = model_of(plain, {"a": (4, 16)})
    update(model, sent({"a": (4, 16)}, 1))
    before = model.a.clone()
    one = ["a", 0, None, None, "r", 0, "float32", [16, 1], 0, 1]
    for field, value in changes.items():
        one[field] = value
    with pytest.raises(ValueError, match=words_of_error):
        CopyProgram(2, [one], model.plan).run(model.plan, {"r": torch.zeros(448, dtype=torch.uint8)}, keep_views=True)
    assert torch.equal(model.a, before)


def test_a_region_on_another_device_is_refused():
    model = model_of(plain, {"a": (4, 16)})
    update(model, sent({"a": (4, 16)}, 1))
    program = CopyProgram(1, [["a", 0, None, None, "r", 0, "float32", [16, 1], 0, 1]], model.plan)
    with pytest.raises(ValueError, match="region 'r' lies on meta, and the parameters on cpu"):
        program.run(model.plan, {"r": torch.empty(256, dtype=torch.uint8, device="meta")}, keep_views=True)


def test_a_program_without_slices_reports_zeros():
    plan = CopyPlan()
    assert CopyProgram(3, [], plan).run(plan, {}, keep_views=True) == ([0, 0, 0], {})


def test_thousands_of_slices_are_defined_and_divided_at_once(made):
    """The experts of 48 layers, as one TP worker reads them; their targets are not touched."""
    layers, experts, hidden, inner = 48, 128, 256, 48
    targets, slices = {}, []
    for layer in range(layers):
        fused = torch.empty(experts, 2 * inner, hidden, dtype=torch.bfloat16)
        down = torch.empty(experts, hidden, inner, dtype=torch.bfloat16)
        for expert in range(experts):
            parts = {"gate": fused[expert, :inner], "up": fused[expert, inner:], "down": down[expert]}
            for kind, (name, part) in enumerate(parts.items()):
                targets[f"{layer}.{expert}.{name}"] = part
                strides = [2 * inner, 1] if name == "down" else [hidden, 1]
                first = expert * inner * hidden * 4
                row = [
                    f"{layer}.{expert}.{name}",
                    0,
                    None,
                    None,
                    f"r{expert % 2}/{layer}.{name}",
                    first,
                    "bfloat16",
                    strides,
                ]
                slices.append([*row, layer * 3 + kind, 2 * expert + 1])
    regions = {one[4]: torch.empty(experts * inner * hidden * 4, dtype=torch.uint8) for one in slices}
    plan = types.SimpleNamespace(target=lambda name, number: targets[name], write_constants=lambda names: None)
    started = time.process_time()
    program = CopyProgram(layers * 3, slices, plan)
    program._prepare(regions, frozenset())
    seconds = time.process_time() - started
    assert program._rest == [] and sum(len(tiles) for tiles in program._table._tiles.values()) == 3 * layers * experts
    assert len(program._slices.layouts) == 2
    assert seconds < 2, "0.1 s on an idle machine"


@pytest.mark.parametrize("left", [[], ["narrow"]], ids=["all by the kernel", "some by torch"])
def test_the_trainers_sums_are_the_same_with_and_without_the_kernel(made, left):
    base = {name: torch.randn(5, 24) for name in ["whole", "cut", "odd", "cast", *left]}
    views = {
        name: one[:, 4:16] if name == "cut" else one[:, :2] if name == "narrow" else one for name, one in base.items()
    }
    views["odd"] = views["odd"][0, :3]
    tensors = {name: LocalShard(tuple(one.shape), one, (whole(tuple(one.shape)),)) for name, one in views.items()}
    slices = [
        TensorSlice(name, SliceKind(Read(0, one.region, tuple(range(len(one.shape))), torch.float64 if name == "cast" else torch.float32), one.region, 0))
        for name, one in tensors.items()
    ]  # fmt: skip
    sums = DirectChecksums({(None, 0): block_of(slices)}, CPU)
    for is_there in (False, True, True):
        made(is_there)
        for one in base.values():
            one.mul_(1.5)  # in place
        expected = [int(word_sum(views[one.name].to(one.read.dtype))) for one in slices]
        assert sums.begin(tensors).tolist() == expected
        assert sums.is_one_launch == (is_there and not left)


@pytest.mark.parametrize("missing", [KERNEL, "triton"])
def test_without_triton_there_is_a_warning_and_copies_are_torchs(monkeypatch, caplog, missing):
    monkeypatch.delitem(sys.modules, KERNEL, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(kernels, "_launchers", {})
    monkeypatch.setattr(kernels, "_casts", {})
    kernels._compile(CPU, kernels.USUAL_CASTS)
    assert (
        kernels.ready(CPU) is None and not kernels.casts(CPU) and "copied and summed up tensor by tensor" in caplog.text
    )
    model, program, regions = program_and_regions()
    new = filled(regions, 3)
    program.run(model.plan, regions, keep_views=True)
    assert torch.equal(model.a, new["a"]) and torch.equal(model.b, new["b"])


def test_no_kernel_is_compiled_for_a_cpu():
    kernels.prepare(CPU)
    assert kernels.ready(CPU) is None and CPU not in kernels._threads
    kernels.wait_until_prepared(CPU, timeout_s=10)


def test_the_kernel_is_compiled_once_and_waited_for_until_the_timeout(monkeypatch):
    device, made, release = torch.device("cuda", 7), [], threading.Event()
    monkeypatch.setattr(kernels, "_threads", {})
    monkeypatch.setattr(kernels, "_asked", {})
    monkeypatch.setattr(
        kernels, "_compile", lambda device, wanted, before: (made.append((wanted, before)), release.wait(30))
    )
    for _ in range(2):
        kernels.prepare(device)
    started = time.monotonic()
    kernels.wait_until_prepared(device, timeout_s=0.1)
    assert 0.1 <= time.monotonic() - started < 25 and kernels._threads[device].is_alive()
    release.set()
    kernels.wait_until_prepared(device, timeout_s=30)
    first = kernels._threads[device]
    assert not first.is_alive() and made == [([*kernels.USUAL_CASTS], None)]
    kernels.prepare(device, [*kernels.USUAL_CASTS, CASTS[1]])
    kernels.wait_until_prepared(device, timeout_s=30)
    assert made[1:] == [([CASTS[1]], first)], "what is new alone, behind the other"


@pytest.fixture
def compiled(kernel, monkeypatch):
    """A CPU for which nothing is compiled, and the kernels in place of those that would be imported."""
    monkeypatch.setattr(kernels, "_launchers", {})
    monkeypatch.setattr(kernels, "_casts", {})
    monkeypatch.setitem(sys.modules, KERNEL, kernel)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_casts_are_ready_once_they_were_tried(compiled):
    kernels._compile(CPU, CASTS[:1])
    assert kernels.ready(CPU) is not None and kernels.casts(CPU) == {CASTS[0]}
    kernels._compile(CPU, CASTS[1:3])
    assert kernels.casts(CPU) == set(CASTS[:3])


def test_a_cast_that_fails_its_test_is_torchs(compiled, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "verify_cast", lambda launch, device, cast: 1 / 0)
    kernels._compile(CPU, CASTS[:1])
    assert kernels.ready(CPU) is not None and not kernels.casts(CPU)
    assert "weights are cast tensor by tensor" in caplog.text


@pytest.mark.parametrize("odd", [(), ((6400, 7), (6416, 20))], ids=["whole pairs", "odd spans"])
def test_spans_of_memory_have_the_same_sums_with_and_without_the_kernel(made, odd):
    spans = [(64, 4096), (4160, 16), (4176, 2000), *odd]
    sums = PlacedChecksums(spans, CPU)
    for number, is_there in enumerate((False, True, True, True)):
        made(is_there)
        memory = words((1000,), number).view(torch.uint8)
        expected = [int(word_sum(memory[first : first + size])) for first, size in spans]
        assert sums.begin(memory).tolist() == expected
        last = sums.begin(memory)
        memory[70] ^= 1
        assert [a != b for a, b in zip(sums.begin(memory).tolist(), last.tolist())] == [True] + [False] * (
            len(spans) - 1
        )
    assert PlacedChecksums([], CPU).begin(memory).tolist() == []
