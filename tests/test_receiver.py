"""What runs inside the engine's workers: the checksum, the watched loader, the copies made again; `test_hook` has the session."""

import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from loaders import (
    IDS,
    LOADERS,
    Model,
    W,
    applied,
    bits,
    bucket_of,
    elements_read,
    fused,
    materialised,
    model_of,
    padded,
    plain,
    sent,
    watched,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tpcolocate.in_server.tpcolocate_receiver import checksums as sums
from tpcolocate.in_server.tpcolocate_receiver import loader_trace as watch
from tpcolocate.in_server.tpcolocate_receiver.checksums import checksum, word_sum
from tpcolocate.in_server.tpcolocate_receiver.copy_plan import CopyPlan, CopyProgram, places_of
from tpcolocate.in_server.tpcolocate_receiver.loader_trace import Copy, differing

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

CPU = torch.device("cpu")
WORD = 8
ROW = WORD * sums._ROW_WORDS


# --- checksum -------------------------------------------------------------------------------------------------------


def random_bytes(size, seed=0):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_every_flipped_bit_of_small_data_changes_both_sums():
    for size in [*range(1, 18), 63, 64, 65]:
        data = random_bytes(size, seed=size)
        original = checksum(data)
        for bit in range(8 * size):
            data[bit // 8] ^= 1 << bit % 8
            assert all(was != now for was, now in zip(original, checksum(data))), (size, bit)
            data[bit // 8] ^= 1 << bit % 8


@given(st.integers(1, 5000), st.integers(0, 2**32), st.floats(0, 1, exclude_max=True))
def test_a_flipped_bit_of_any_data_changes_both_sums(size, seed, where):
    data = random_bytes(size, seed)
    before = checksum(data)
    bit = int(where * size * 8)
    data[bit // 8] ^= 1 << bit % 8
    assert all(was != now for was, now in zip(before, checksum(data)))


@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x80])
@pytest.mark.parametrize("size", [ROW - 1, ROW, ROW + 1, 3 * ROW, 3 * ROW + 13])
def test_a_flipped_bit_at_every_seam_of_uniform_data_changes_both_sums(fill, size):
    data = torch.full((size,), fill, dtype=torch.uint8)
    before = checksum(data)
    seams = {0, 7, 8, size - 1, size - 8, size // 2, *(row * ROW + i for row in range(4) for i in (-8, -1, 0, 7, 8))}
    for byte in sorted(seam for seam in seams if 0 <= seam < size):
        for bit in (0, 7):
            data[byte] ^= 1 << bit
            assert all(was != now for was, now in zip(before, checksum(data))), (byte, bit)
            data[byte] ^= 1 << bit


def swap(data, one, other, length):
    moved = data.clone()
    moved[one : one + length], moved[other : other + length] = data[other : other + length], data[one : one + length]
    return moved


@given(st.integers(2, 6 * 1024), st.data())
def test_swapped_words_change_it(num_words, data):
    content = random_bytes(num_words * WORD + data.draw(st.integers(0, 7)), seed=num_words)
    one = data.draw(st.integers(0, num_words - 1))
    other = data.draw(st.integers(0, num_words - 1).filter(lambda word: word != one))
    assert checksum(swap(content, one * WORD, other * WORD, WORD)) != checksum(content)


@pytest.mark.parametrize("one, other, length", [
    (0, ROW, ROW), (0, 4 * ROW, ROW), (ROW, 3 * ROW, 2 * ROW),  # rows, which leaves the sums along them as they are
    (8, 8 + ROW, 8), (0, 512, 256), (0, 5 * ROW - 256, 256),  # columns, and what a bucket is aligned to
    (3, 1000, 100), (1, 2, 1), (0, 6 * ROW, 8), (5 * ROW + 8, 6 * ROW + 16, 24),  # not aligned; across the last full row
    (6 * ROW + 80, 6 * ROW + 81, 1),  # in the last, incomplete word
])  # fmt: skip
def test_swapped_blocks_change_it(one, other, length):
    content = random_bytes(6 * ROW + 83)
    content[one], content[one + length - 1] = 1, 1
    content[other] = 2  # what is swapped does differ
    assert checksum(swap(content, one, other, length)) != checksum(content)


@given(st.integers(1, 3 * ROW), st.integers(1, 3000))
def test_shifted_data_changes_it(size, by):
    content = random_bytes(size + by, seed=size)
    content[-1] = content[0] ^ 1
    assert checksum(torch.roll(content, by)) != checksum(content) or torch.equal(torch.roll(content, by), content)


@given(st.integers(0, 5000))
@example(0)
@example(7)
def test_it_is_a_function_of_the_bytes_alone(size):
    data = random_bytes(size, seed=size)
    found = checksum(data)
    assert found == checksum(data.clone()) and all(-(2**63) <= part < 2**63 for part in found)
    elsewhere = torch.zeros(size + 3 * 256, dtype=torch.uint8)
    elsewhere[256 : 256 + size] = data
    assert checksum(elsewhere[256 : 256 + size]) == found, "wherever they lie"
    assert json.loads(json.dumps(found)) == list(found)


def test_it_is_what_it_was():
    """Trainer and worker may run on different machines of one job: the sums are part of the protocol."""
    data = torch.arange(2 * ROW + 21, dtype=torch.int64).to(torch.uint8)
    by_row = by_column = 0
    content = bytes(data.tolist())
    word = lambda at: int.from_bytes(content[at : at + WORD], "little", signed=True)
    for row in range(2):
        for column in range(ROW // WORD):
            by_row += word(row * ROW + column * WORD) * (2 * row + 1)
            by_column += word(row * ROW + column * WORD) * (2 * column + 1)
    extra = sum(word(2 * ROW + i * WORD) * (2 * i + 1) for i in range(2))
    extra += sum(byte * (2 * (ROW // WORD + i) + 1) for i, byte in enumerate(content[2 * ROW + 16 :]))
    wrapped = [(total + 2**63) % 2**64 - 2**63 for total in (by_row + extra, by_column - extra)]
    assert list(checksum(data)) == wrapped


# --- the watch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load, shapes, send, derived, reworked, repeatable, read", LOADERS, ids=IDS)
def test_what_a_loader_does_is_seen(load, shapes, send, derived, reworked, repeatable, read):
    tensors = sent(send)
    flat, entries = bucket_of(tensors)
    model, unwatched = model_of(load, shapes), model_of(load, shapes)
    recorder = watched(model, flat, entries)
    assert {entries[i][0] for i in recorder.derived} == derived
    assert {entries[i][0] for i in recorder.reworked} == reworked
    assert recorder.repeatable == repeatable
    assert elements_read(recorder.copies, entries) == read
    unwatched.load_weights([(name, tensor.clone()) for name, tensor in tensors.items()])
    assert bits(model) == bits(unwatched), "and nothing is changed by looking"
    assert differing([c for c in recorder.copies if c.entry not in recorder.derived | recorder.reworked]) == set()


@pytest.mark.parametrize("load, shapes, send, derived, reworked, repeatable, read", LOADERS, ids=IDS)
def test_the_same_is_seen_in_inference_mode(load, shapes, send, derived, reworked, repeatable, read):
    """Operators are not decomposed there: what promises a view may make a copy."""
    flat, entries = bucket_of(sent(send))
    model = model_of(load, shapes)
    with torch.inference_mode():
        recorder = watched(model, flat, entries)
    assert {entries[i][0] for i in recorder.derived} == derived
    assert {entries[i][0] for i in recorder.reworked} == reworked
    assert recorder.repeatable == repeatable
    assert elements_read(recorder.copies, entries) == read


def flattened(model, name, tensor):
    model.w.data.view(-1).copy_(tensor.t().reshape(-1))


def cast_to(model, name, tensor):
    model.w.data.copy_(tensor.to(torch.bfloat16))


@pytest.mark.parametrize("load", [flattened, materialised, cast_to])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_copy_behind_an_operator_that_promises_a_view_is_seen(load, mode):
    flat, entries = bucket_of(sent({"w": (3, 5)}))
    with mode():
        recorder = watched(model_of(load, {"w": (5, 3)} if load is not cast_to else {"w": (3, 5)}), flat, entries)
    assert recorder.derived == {0} and not recorder.copies


aten = torch.ops.aten


@pytest.mark.parametrize(
    "func, writes, reads, is_view",
    [
        (aten.detach.default, [], ["self"], True),
        (aten.slice.Tensor, [], ["self"], True),
        (aten.view.dtype, [], ["self"], True),
        (aten.reshape.default, [], ["self"], True),  # or a copy, which is seen when it was called
        (aten.split.Tensor, [], ["self"], True),
        (aten.view_as.default, [], ["self", "other"], False),
        (aten._unsafe_view.default, [], ["self"], False),
        (aten.clone.default, [], ["self"], False),
        (aten.cat.default, [], ["tensors"], False),
        (aten.fill_.Tensor, ["self"], ["value"], False),
        (aten.copy_.default, ["self"], ["src"], False),
        (aten.add.out, ["out"], ["self", "other"], False),
        (aten._foreach_copy_.default, ["self"], ["src"], False),
        (aten.index_put_.default, ["self"], ["indices", "values"], False),
        (aten.resize_.default, ["self"], [], False),
        (aten.empty.memory_format, [], [], False),
    ],
    ids=str,
)
def test_what_an_operator_reads_and_writes_is_in_its_schema(func, writes, reads, is_view):
    operator = watch._Operator.of(func)
    assert [name for _, name in operator.writes] == writes
    assert [name for _, name in operator.reads] == reads
    assert operator.is_view == is_view


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30), st.booleans()), min_size=1, max_size=25))
def test_copies_that_are_written_over_are_found_whatever_their_order(parts):
    """Each part is rows or columns of a parameter; where it lies is compared with every part before it."""
    flat, entries = bucket_of({f"t{i}": torch.ones(1) for i in range(len(parts))})

    def load(model, name, tensor):
        start, size, of_rows = parts[int(name[1:])]
        (model.w.data[start : start + size] if of_rows else model.w.data[:, start : start + size]).copy_(tensor)

    model = model_of(load, {"w": (60, 60)})
    recorder = watched(model, flat, entries)
    spans, expected = [], set()
    for start, size, of_rows in parts:
        low, high = (start * 60, (start + size) * 60) if of_rows else (start, 59 * 60 + start + size)
        expected |= {j for j, (lower, higher) in enumerate(spans) if lower < high and low < higher}
        spans.append((low, high))
    assert recorder.reworked == expected
    assert len(recorder.below(model.w)) == len(parts)


def test_a_watch_does_not_compare_every_copy_with_every_other(monkeypatch):
    """Fused experts: hundreds of copies into one parameter, and a constant beside each of them."""
    num = 300
    flat, entries = bucket_of({f"e{i}": torch.ones(2) for i in range(num)})

    def load(model, name, tensor):
        model.w.data[int(name[1:]), :2].copy_(tensor)
        model.w.data[int(name[1:]), 2:].fill_(0)

    looked, bounds = [], watch.bounds
    monkeypatch.setattr(watch, "bounds", lambda tensor: looked.append(1) or bounds(tensor))
    model = model_of(load, {"w": (num, 4)})
    recorder = watched(model, flat, entries)
    plans = CopyPlan()
    plans.learn(recorder, entries, places_of(model))
    assert not recorder.reworked and len(recorder.copies) == len(recorder.fills) == num
    assert len(looked) <= 5 * num
    assert plans.knows(entries)


def test_casting_copies_are_copies():
    """The trainer's float32 into the engine's bfloat16: compared after the same cast."""
    flat, entries = bucket_of(sent(W))
    model = model_of(plain, W, torch.bfloat16)
    recorder = watched(model, flat, entries)
    assert recorder.repeatable and not recorder.derived | recorder.reworked and len(recorder.copies) == 1
    assert torch.equal(model.w, sent(W)["w"].to(torch.bfloat16))
    assert differing(recorder.copies) == set()
    model.w.data[1, 1] += 1
    assert differing(recorder.copies) == {0}


def test_tensors_are_told_apart_whatever_their_size():
    """Tensors without elements share their place with the next one."""
    shapes = {"e0": (0, 3), "a": (1,), "e1": (2, 0), "e2": (0,), "b": (200,), "c": (64,), "e3": (0,)}
    tensors = sent(shapes)
    flat, entries = bucket_of(tensors)
    copies = watched(model_of(plain, shapes), flat, entries).copies
    assert [(entries[c.entry][0], c.src.numel()) for c in copies] == [("a", 1), ("b", 200), ("c", 64)]


def test_one_rework_does_not_spoil_the_tensors_beside_it():
    def load(model, name, tensor):
        fused(model, name, tensor)
        if name == "v":
            model.qkv.data[4:6].mul_(2)

    flat, entries = bucket_of(sent({"q": (4, 3), "k": (2, 3), "v": (2, 3)}))
    recorder = watched(model_of(load, {"qkv": (8, 3)}), flat, entries)
    assert {entries[i][0] for i in recorder.reworked} == {"k"}


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load, shapes, send, derived, reworked, repeatable, read", LOADERS, ids=IDS)
def test_later_loads_give_the_same_bits_by_a_plan_only_where_that_is_known(
    load, shapes, send, derived, reworked, repeatable, read
):
    model, stock = model_of(load, shapes), model_of(load, shapes)
    for seed in range(3):
        tensors = sent(send, seed)
        replayed, unsure, wrong, found = applied(model, {name: tensor.clone() for name, tensor in tensors.items()})
        stock.load_weights([(name, tensor.clone()) for name, tensor in tensors.items()])
        assert replayed == (seed > 0 and repeatable and not reworked)
        assert bits(model) == bits(stock), "as the engine's own loader leaves them"
        assert (unsure, wrong, found) == (derived | reworked, set(), read)
        for name in ("doubled", "beside", "largest"):
            if hasattr(stock, name):
                assert torch.equal(torch.as_tensor(getattr(model, name)), torch.as_tensor(getattr(stock, name)))


def test_a_plan_casts_as_the_loader_did():
    model = model_of(plain, W, torch.bfloat16)
    applied(model, sent(W, 1))
    assert applied(model, sent(W, 2))[0]
    assert torch.equal(model.w, sent(W, 2)["w"].to(torch.bfloat16))


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from(["float32", "bfloat16", "int8", "float64"])),
        min_size=1,
        max_size=8,
    )
)
def test_any_layout_is_replayed_bit_by_bit(shapes):
    def tensors(seed):
        return {
            f"w{i}": (torch.randn(a, b, generator=torch.Generator().manual_seed(seed)) * 9).to(getattr(torch, dtype))
            for i, (a, b, dtype) in enumerate(shapes)
        }

    model = Model(plain, **{name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()})
    for seed in range(2):
        assert applied(model, tensors(seed))[:3] == (seed > 0, set(), set())
        assert all(torch.equal(parameter, tensors(seed)[name]) for name, parameter in model.named_parameters())


def test_a_plan_never_writes_through_a_stale_pointer():
    model = model_of(plain, {"a": (4,), "b": (4,)})
    applied(model, sent({"a": (4,), "b": (4,)}, 1))
    old = model.a
    model.a = nn.Parameter(torch.zeros(4), requires_grad=False)
    before = old.clone()
    tensors = sent({"a": (4,), "b": (4,)}, 2)
    assert applied(model, tensors)[0] is False
    assert torch.equal(model.a, tensors["a"]) and torch.equal(model.b, tensors["b"]) and torch.equal(old, before)
    tensors = sent({"a": (4,), "b": (4,)}, 3)
    assert applied(model, tensors)[0] is True, "and the new place is learned"
    assert torch.equal(model.a, tensors["a"])


def test_memory_that_moves_below_a_parameter_is_seen():
    model = model_of(plain, W)
    applied(model, sent(W, 1))
    model.w.data = torch.zeros(4, 4)
    assert applied(model, sent(W, 2))[0] is False
    assert torch.equal(model.w, sent(W, 2)["w"])


def test_memory_that_its_own_load_moves_is_not_written_through():
    def load(model, name, tensor):
        model.w.data.copy_(tensor)
        model.w.data = torch.zeros(4, 4)

    model = model_of(load, W)
    for seed in range(3):
        assert applied(model, sent(W, seed))[0] is False


def test_every_place_of_a_model_is_known_once():
    inner = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": inner, "b": inner, "c": nn.ModuleList([nn.Linear(2, 3, bias=False), nn.Identity()])})
    model["c"][0].register_buffer("scale", torch.ones(2), persistent=False)
    model["c"][1].register_module("none", None)
    tensors = [*model.parameters(), *model.buffers()]
    found = places_of(model)
    assert sorted((address, storage) for _, _, address, storage in found) == sorted(
        (tensor.data_ptr(), watch.storage_of(tensor)) for tensor in tensors
    )
    assert all(table[name].data_ptr() == address for table, name, address, _ in found)


def test_a_parameter_that_is_gone_is_no_place_to_write_to():
    def load(model, name, tensor):
        if hasattr(model, "w"):
            model.w.data.copy_(tensor)

    model = model_of(load, W)
    applied(model, sent(W, 1))
    del model.w
    assert applied(model, sent(W, 2)) == (False, set(), set(), {})


def test_what_is_known_of_a_tensor_serves_any_bucket_it_comes_in():
    shapes = {"a": (4,), "b": (4,), "c": (8,)}
    model = model_of(plain, shapes)

    def load(seed, names):
        tensors = {name: tensor for name, tensor in sent(shapes, seed).items() if name in names}
        tensors = {name: tensors[name] for name in names}
        replayed, *_ = applied(model, tensors)
        assert all(torch.equal(getattr(model, name), tensor) for name, tensor in tensors.items())
        return replayed

    layouts = ["ab", "ba", "bc", "abc", "a"]
    assert [load(1, names) for names in layouts] == [False, True, False, True, True]
    assert [load(2, names) for names in layouts] == [True] * 5


def test_a_tensor_of_another_shape_or_dtype_is_learned_anew():
    model = model_of(lambda model, name, tensor: model.w.data.view(-1)[: tensor.numel()].copy_(tensor.view(-1)), W)
    first, other = sent(W, 1)["w"], sent({"w": (2, 8)}, 2)["w"]
    assert [applied(model, {"w": tensor})[0] for tensor in (first, first, other, other, first.double())] == [
        False, True, False, True, False,
    ]  # fmt: skip


def test_a_constant_below_a_copy_is_written_before_it_and_only_with_its_tensor():
    """A loader that clears the whole parameter first: made again for another tensor, it would wipe this one out."""

    def load(model, name, tensor):
        parameter = getattr(model, name)
        parameter.data.zero_()
        parameter.data[: len(tensor)].copy_(tensor)

    shapes = {"a": (4, 2), "b": (4, 2)}
    model = model_of(load, {"a": (6, 2), "b": (6, 2)})
    applied(model, sent(shapes, 1))
    model.a.data.fill_(7)
    replayed, *_ = applied(model, {"b": sent(shapes, 2)["b"]})
    assert replayed and torch.equal(model.b[:4], sent(shapes, 2)["b"]) and not model.b[4:].any()
    assert (model.a == 7).all()


def test_a_constant_below_the_copies_of_two_tensors_makes_both_the_loaders():
    def load(model, name, tensor):
        if name == "q":
            model.qkv.data.zero_()
        fused(model, name, tensor)

    send = {"q": (4, 3), "k": (2, 3), "v": (2, 3)}
    model, stock = model_of(load, {"qkv": (8, 3)}), model_of(load, {"qkv": (8, 3)})
    for seed in range(2):
        assert applied(model, sent(send, seed))[0] is False
        stock.load_weights(sent(send, seed).items())
        assert bits(model) == bits(stock)


def test_a_quantised_parameter_is_refused_in_words():
    model = Model(lambda m, n, t: m.w.data.copy_(t), w=torch.zeros(4, 4, dtype=torch.float8_e4m3fn))
    with pytest.raises(RuntimeError, match="w is torch.float32 and went into a parameter of torch.float8_e4m3fn"):
        applied(model, sent(W))


def test_parameters_that_nothing_was_copied_into_are_told():
    shapes = {"a": (4, 3), "b": (6, 4), "c": (4, 4), "d": (3,)}

    def load(model, name, tensor):
        if name == "b":
            padded_into(model.b, tensor)
        elif name == "c":
            model.c.data[:, :2].copy_(tensor)
        else:
            plain(model, name, tensor)

    def padded_into(parameter, tensor):
        parameter.data[: len(tensor)].copy_(tensor)
        parameter.data[len(tensor) :].fill_(0)

    model = model_of(load, shapes)
    applied(model, sent({"a": (4, 3), "b": (4, 4), "c": (4, 2)}))
    assert model.plans.unwritten(model) == ["c", "d"], "half of c, and nothing of d"


# --- programs -------------------------------------------------------------------------------------------------------


def test_a_program_copies_parts_out_of_regions_and_sums_up_what_arrived():
    model = model_of(plain, {"a": (4, 6), "b": (3,)})
    tensors = sent({"a": (4, 6), "b": (3,)}, 1)
    applied(model, tensors)
    new = sent({"a": (4, 6), "b": (3,)}, 2)
    # the upper half of a lies in columns of one region, the lower half and b in another
    left = torch.zeros(4, 8)
    left[:2, 1:7] = new["a"][:2]
    right = torch.cat([new["a"][2:].reshape(-1), new["b"]])
    pieces = [
        ["a", 0, [0, 0], [2, 6], "left", 4, "float32", [8, 1]],
        ["a", 0, [2, 0], [2, 6], "right", 0, "float32", [6, 1]],
        ["b", 0, None, None, "right", 48, "float32", [1]],
    ]
    regions = {"left": left.view(-1).view(torch.uint8), "right": right.view(torch.uint8)}
    program = CopyProgram(pieces, model.plans)
    for keep in (True, True, False):
        model.a.data.zero_(), model.b.data.zero_()
        found, _ = program.run(model.plans, regions, keep=keep)
        assert torch.equal(model.a, new["a"]) and torch.equal(model.b, new["b"])
        assert found == [int(word_sum(part)) for part in (new["a"][:2], new["a"][2:], new["b"])]


def test_a_program_writes_the_loaders_constants_again():
    model = model_of(padded, {"w": (6, 4)})
    applied(model, sent(W, 1))
    model.w.data.fill_(9)
    new = sent(W, 2)["w"]
    program = CopyProgram([["w", 0, None, None, "r", 0, "float32", [4, 1]]], model.plans)
    program.run(model.plans, {"r": new.view(-1).view(torch.uint8)}, keep=False)
    assert torch.equal(model.w[:4], new) and not model.w[4:].any()


# --- sums of words --------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 9), min_size=0, max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.bool]),
    st.integers(0, 2**31),
)
def test_a_sum_of_words_is_the_same_however_the_memory_lies(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator) * 99).to(dtype)
    wide = torch.zeros([*shape[:-1], 64] if shape else [64], dtype=dtype)
    inside = wide[..., 8 : 8 + shape[-1]] if shape else wide[8]
    inside.copy_(values)
    odd = torch.zeros(values.numel() + 1, dtype=dtype)[1:].view(shape)
    odd.copy_(values)
    expected = int(word_sum(values.clone()))
    assert int(word_sum(inside)) == int(word_sum(odd)) == expected
    if values.numel() > 1 and len(shape) > 1:
        turned = values.transpose(0, 1).contiguous().transpose(0, 1)
        assert int(word_sum(turned)) == expected


@given(st.integers(1, 300), st.integers(0, 2**31), st.floats(0, 1, exclude_max=True))
def test_a_flipped_bit_changes_a_sum_of_words(size, seed, where):
    data = random_bytes(size, seed)
    before = int(word_sum(data))
    bit = int(where * size * 8)
    data[bit // 8] ^= 1 << bit % 8
    assert int(word_sum(data)) != before


# --- reading back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool], ids=str)
def test_a_parameter_that_was_changed_behind_the_loader_is_found(dtype):
    src = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]).to(dtype) for _ in range(3)]
    copies = [Copy(tensor.clone(), tensor, i) for i, tensor in enumerate(src)]
    assert differing(copies) == set()
    copies[1].dst.view(torch.uint8)[0, 0] ^= 1
    assert differing(copies) == {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_nan_that_arrived_as_one_is_the_trainers(dtype):
    sick, well = torch.tensor([1.0, float("nan")]).to(dtype), torch.tensor([1.0, 2.0]).to(dtype)
    assert differing([Copy(sick.clone(), sick, 0)]) == set()
    assert differing([Copy(sick.clone(), well, 0), Copy(well.clone(), sick, 1)]) == {0, 1}
    assert differing([]) == set()


def test_zeros_of_two_signs_are_equal():
    assert differing([Copy(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), 0)]) == set()


def test_lazy_conjugates_are_compared_by_value():
    values = torch.tensor([[1 + 2j, 3 - 4j]])
    for src in (values.conj(), values.conj().imag):
        assert differing([Copy(src.resolve_conj().resolve_neg().clone(), src, 0)]) == set()
        assert differing([Copy(src.resolve_conj().resolve_neg() + 1, src, 0)]) == {0}


LAYOUTS = {
    "contiguous": lambda t: t,
    "columns": lambda t: torch.nn.functional.pad(t, (3, 5))[:, 3:-5],
    "whole words of columns": lambda t: torch.nn.functional.pad(t, (8, 8))[:, 8:-8],
    "transposed": lambda t: t.t().contiguous().t(),
    "at an odd place": lambda t: torch.cat([torch.zeros(1, dtype=t.dtype), t.view(-1)])[1:].view(t.shape),
    "every other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.complex64]),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(sorted(LAYOUTS)),
    st.tuples(st.integers(1, 5), st.integers(1, 17)),
    st.floats(0, 1, exclude_max=True),
)
def test_one_changed_bit_is_found_however_both_sides_lie(dtype, of_dst, of_src, shape, where):
    values = (torch.arange(1, shape[0] * shape[1] + 1).view(shape) % 100).to(dtype)
    dst, src = LAYOUTS[of_dst](values.clone()), LAYOUTS[of_src](values.clone())
    assert differing([Copy(dst, src, 0)]) == set()
    row, column = divmod(int(where * values.numel()), shape[1])
    changed = values.clone()
    changed.view(torch.uint8)[row, column * values.element_size()] ^= 1
    dst.copy_(changed)
    assert differing([Copy(dst, src, 0)]) == differing([Copy(src, dst, 0)]) == {0}


def test_what_was_cast_is_compared_after_the_same_cast():
    src = torch.tensor([[1.0, 1e-9, float("nan"), -0.0], [3.0, 4.0, 5.0, 1e30]])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        dst = src.to(dtype)
        assert differing([Copy(dst, src, 0)]) == set()
        dst[1, 0] = 3.5
        assert differing([Copy(dst, src, 0)]) == {0}


def test_reading_back_writes_an_eighth_of_what_it_reads_and_nothing_else():
    """Whole elements compared, or copies in between, would cost several times that on a GPU."""

    class Made(TorchDispatchMode):
        num_bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            read = {watch.storage_of(t) for t in args if isinstance(t, torch.Tensor)}
            if isinstance(out, torch.Tensor) and watch.storage_of(out) not in read:
                self.num_bytes += out.nbytes
            return out

    tensor = torch.ones(64, 128, dtype=torch.bfloat16)
    copies = [Copy(tensor.clone(), tensor, 0), Copy(tensor[:, 64:].clone(), tensor[:, 64:], 1)]
    with Made() as made:
        assert differing(copies) == set()
    assert made.num_bytes <= sum(c.src.nbytes for c in copies) / 8 + 64


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 3.4e38, 1e-45])
def test_extremes_are_compared_exactly(value):
    src = torch.tensor([value])
    assert differing([Copy(src.clone(), src, 0)]) == set()
    assert differing([Copy(torch.tensor([1.0]), src, 0)]) == {0}
