"""The fused copy and checksum, run by Triton's own interpreter on a CPU.

Its speed, and that it reads a GPU's memory back, are tested on GPUs: `test_gpu.py` and the benchmarks.
"""

import ctypes
import functools
import importlib
import itertools
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import model_of, plain, sent, update

from tpcolocate.in_server.tpcolocate_receiver import copy_program, kernel_tables, kernels
from tpcolocate.in_server.tpcolocate_receiver.checksums import word_sum
from tpcolocate.in_server.tpcolocate_receiver.copy_program import CopyProgram
from tpcolocate.in_server.tpcolocate_receiver.regions import whole
from tpcolocate.weights.plan.sharding import LocalShard
from tpcolocate.weights.plan.slices import Read, TensorSlice
from tpcolocate.weights.transport.checksums import DirectChecksums

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

CPU = torch.device("cpu")
KERNEL = "tpcolocate.in_server.tpcolocate_receiver.triton_kernel"


@pytest.fixture(scope="module")
def kernel():
    """The kernel's module, imported so that Triton interprets it.

    Triton decides when it is imported, and may have been imported for other tests: here it is once more, for this file.
    """

    def taken_out():
        names = [n for n in sys.modules if n == KERNEL or (n.partition(".")[0] == "triton" and "._C" not in n)]
        return {name: sys.modules.pop(name) for name in names}

    before = taken_out()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRITON_INTERPRET", "1")
        module = importlib.import_module(KERNEL)
        yield module
    taken_out()
    sys.modules.update(before)


def words(shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, tuple(shape), dtype=torch.int64, generator=generator)


def view_of(base, cut):
    return base[tuple(slice(start, start + length) for start, length in cut)]


def run(kernel, pairs):
    """The copies by the kernel; what it summed up."""
    copies = [(i, str(i), kernel_tables.parts_of(dst, src)) for i, (dst, src) in enumerate(pairs)]
    assert all(parts is not None for *_, parts in copies)
    sums = torch.zeros(len(pairs), dtype=torch.int64)
    kernel_tables.CopyTable(copies, {str(i): src for i, (_, src) in enumerate(pairs)}, CPU).run(kernel.launch, sums)
    return sums.tolist()


def test_it_passes_the_test_that_it_must_pass_on_a_gpu(kernel):
    kernels.verify(kernel.launch, CPU)


@pytest.mark.parametrize("spoiled, words_of_error", [
    (lambda launch, *what, copies=True: what[2].add_(1), r"failed its test \(0\)"),
    (lambda launch, *what, copies=True: None, r"failed its test \(0\)"),
    (lambda launch, *what, copies=True: launch(*what) if copies else None, r"failed its test \(checksums\)"),
])  # fmt: skip
def test_a_kernel_that_does_something_else_does_not_pass(kernel, spoiled, words_of_error):
    with pytest.raises(RuntimeError, match=words_of_error):
        kernels.verify(functools.partial(spoiled, kernel.launch), CPU)


def test_what_is_summed_up_is_what_is_there_and_not_what_was_given(kernel):
    src, place = words((2, 64)), torch.zeros(1, 64, dtype=torch.int64)
    [found] = run(kernel, [(place.expand(2, 64), src)])
    assert torch.equal(place[0], src[1]) or torch.equal(place[0], src[0])
    assert found == int(2 * place.sum()) != int(src.sum())


def test_a_sum_of_what_was_given_instead_of_what_arrived_does_not_pass(kernel):
    def trusting(parts, tiles, sums, block):
        before = sums.clone()
        kernel.launch(parts, tiles, sums, block)
        if before[-1] != sums[-1]:  # as if both rows had arrived
            first, second = parts[-1, 0], parts[-1, 4]
            rows = [(ctypes.c_int64 * 64).from_address(int(first + 8 * second * row)) for row in (0, 1)]
            sums[-1] = before[-1] + torch.tensor(rows, dtype=torch.int64).sum()

    with pytest.raises(RuntimeError, match=r"failed its test \(5\)"):
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
    before = [source.clone() for source in sources]
    elsewhere = [torch.zeros(source.shape, dtype=torch.int64) for source in sources]
    parts = [(number + 1, kernel_tables.parts_of(*pair)) for number, pair in enumerate(zip(elsewhere, sources))]
    sums = torch.zeros(len(sources) + 2, dtype=torch.int64)
    kernel_tables.ChecksumTable(parts, CPU).run(kernel.launch, sums)
    assert sums.tolist() == [0, *(int(source.sum()) for source in sources), 0]
    assert all(map(torch.equal, sources, before)) and not any(target.any() for target in elsewhere)


ODD = [
    ("an odd number of words", lambda: (torch.zeros(3, dtype=torch.int64), words((3,)))),
    ("a start between two pairs", lambda: (torch.zeros(4, dtype=torch.int64), words((7,))[1:5])),
    ("rows that start between two pairs", lambda: (torch.zeros(3, 4, dtype=torch.int64), words((3, 5))[:, :4])),
    ("columns that are not dense", lambda: (torch.zeros(4, 4, dtype=torch.int64), words((4, 4)).t())),
    ("another dtype", lambda: (torch.zeros(4), torch.ones(4))),
    ("nothing", lambda: (torch.zeros(0, dtype=torch.int64), words((0,)))),
    ("other shapes", lambda: (torch.zeros(4, dtype=torch.int64), words((2, 2)))),
    ("thousands of blocks", lambda: (torch.zeros(40, 40, 2, 2, dtype=torch.int64), words((42, 42, 4, 4))[:40, :40, :2, :2])),
]  # fmt: skip


@pytest.mark.parametrize("make", [make for _, make in ODD], ids=[name for name, _ in ODD])
def test_what_the_kernel_cannot_copy_is_left_to_torch(make):
    assert kernel_tables.parts_of(*make()) is None


def test_a_table_reads_regions_that_were_mapped_again_and_refuses_others(kernel):
    first, second = words((64,), 1), words((64,), 2)
    targets = [torch.zeros(4, 4, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)]

    def views(region):
        return region[2:34].view(4, 8)[:, 2:6], region[40:46]

    table = kernel_tables.CopyTable(
        [(i, "r", kernel_tables.parts_of(dst, src)) for i, (dst, src) in enumerate(zip(targets, views(first)))],
        {"r": first},
        CPU,
    )
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
    """A function that lets the kernel be there, or not yet."""

    def there(is_there):
        monkeypatch.setattr(kernels, "_launchers", {CPU: kernel.launch} if is_there else {})

    return there


SLICES = [
    ["a", 0, [0, 0], [2, 16], "left", 64, "float32", [64, 1]],
    ["a", 0, [2, 0], [2, 16], "right", 0, "float32", [16, 1]],
    ["b", 0, None, None, "right", 128, "float32", [1]],  # three elements: torch's
]


def program_and_regions():
    model = model_of(plain, {"a": (4, 16), "b": (3,)})
    update(model, sent({"a": (4, 16), "b": (3,)}, 1))
    regions = {"left": torch.zeros(2 * 64 * 4, dtype=torch.uint8), "right": torch.zeros(140, dtype=torch.uint8)}
    return model, CopyProgram(SLICES, model.plan), regions


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
        assert found == [int(word_sum(part)) for part in (new["a"][:2], new["a"][2:], new["b"])]
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
    parts_of, forget, rebase = kernel_tables.parts_of, program._replay.forget, kernel_tables.CopyTable.rebase
    monkeypatch.setattr(copy_program, "parts_of", lambda *views: divided.append(1) or parts_of(*views))
    monkeypatch.setattr(program._replay, "forget", lambda: forgotten.append(1) or forget())
    monkeypatch.setattr(kernel_tables.CopyTable, "rebase", lambda *args: rebased.append(1) or rebase(*args))
    for _ in range(2):
        program.run(model.plan, regions, keep_views=True)
    assert not divided
    made(True)
    for _ in range(3):
        program.run(model.plan, regions, keep_views=True)
    assert len(rebased) == 1
    assert len(divided) == len(SLICES) and len(forgotten) == 1, "what was queued for all of them is queued no more"


def test_what_the_kernel_does_all_of_is_called_so(made):
    made(True)
    model = model_of(plain, {"a": (4, 16)})
    new = sent({"a": (4, 16)}, 1)
    update(model, new)
    program = CopyProgram([["a", 0, None, None, "r", 0, "float32", [16, 1]]], model.plan)
    found, seconds = program.run(model.plan, {"r": new["a"].view(-1).view(torch.uint8)}, keep_views=True)
    assert list(seconds) == ["one_pass"] and found == [int(word_sum(new["a"]))]


@pytest.mark.parametrize("left", [[], ["narrow"]], ids=["all by the kernel", "some by torch"])
def test_the_trainers_sums_are_the_same_with_and_without_the_kernel(made, left):
    base = {name: torch.randn(5, 24) for name in ["whole", "cut", "odd", "cast", *left]}
    views = {
        name: one[:, 4:16] if name == "cut" else one[:, :2] if name == "narrow" else one for name, one in base.items()
    }
    views["odd"] = views["odd"][0, :3]
    tensors = {name: LocalShard(tuple(one.shape), one, (whole(tuple(one.shape)),)) for name, one in views.items()}
    slices = [
        TensorSlice(name, Read(0, one.region, tuple(range(len(one.shape))), torch.float64 if name == "cast" else torch.float32), one.region, 0)
        for name, one in tensors.items()
    ]  # fmt: skip
    sums = DirectChecksums(slices, tensors, CPU)
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
    kernels._compile(CPU)
    assert kernels.ready(CPU) is None and "copied and summed up tensor by tensor" in caplog.text
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
    monkeypatch.setattr(kernels, "_compile", lambda device: (made.append(device), release.wait(30)))
    for _ in range(2):
        kernels.prepare(device)
    started = time.monotonic()
    kernels.wait_until_prepared(device, timeout_s=0.1)
    assert 0.1 <= time.monotonic() - started < 25 and kernels._threads[device].is_alive()
    release.set()
    kernels.wait_until_prepared(device, timeout_s=30)
    assert not kernels._threads[device].is_alive() and made == [device]
