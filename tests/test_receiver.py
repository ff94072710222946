"""What runs inside the engine's workers: the checksum, the watched loader, the copies made again, and the reply."""

import json
import multiprocessing
import os
import threading
import time

import pytest
import torch
import zmq
from harness import PRELOADED
from hypothesis import example, given
from hypothesis import strategies as st
from loaders import (
    IDS,
    LOADERS,
    Model,
    W,
    asked_for_a_value,
    bits,
    bucket_of,
    cast_first,
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

from tpcolocate import ipc_payload
from tpcolocate.engine.channel import Channel
from tpcolocate.groups import start_of, this_process
from tpcolocate.in_server.tpcolocate_receiver import COMMAND, hook, receive, sums, watch
from tpcolocate.in_server.tpcolocate_receiver.handles import device_uuid, open_handle
from tpcolocate.in_server.tpcolocate_receiver.hook import _apply
from tpcolocate.in_server.tpcolocate_receiver.plans import Plans, Program, places_of
from tpcolocate.in_server.tpcolocate_receiver.sums import checksum, word_sum
from tpcolocate.in_server.tpcolocate_receiver.watch import Copy, differing

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
    plans = Plans()
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


def applied(model, tensors):
    """(whether the loader was not needed, what could not be proven, what differs, elements read)."""
    flat, entries = bucket_of(tensors)
    if not hasattr(model, "plans") or not model.plans.fit():
        model.plans = Plans()
    with torch.no_grad():
        copies, unsure, replayed = _apply(model, model.plans, flat, entries)
    wrong = differing([c for c in copies if c.entry not in unsure])
    return replayed, {entries[i][0] for i in unsure}, wrong, elements_read(copies, entries)


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
    program = Program(pieces, model.plans)
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
    program = Program([["w", 0, None, None, "r", 0, "float32", [4, 1]]], model.plans)
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


# --- the hook -------------------------------------------------------------------------------------------------------


def opening(path, **changes):
    """What SGLang hands to the hook for a session of one TP worker."""
    job = {
        "session": ipc_payload.new_session(), "endpoint": f"ipc://{path}", "peer": list(this_process()),
        "for": 0, "tp_rank": 0, "tp_size": 1, "timeout_s": 30.0, **changes,
    }  # fmt: skip
    return [(COMMAND, torch.frombuffer(bytearray(json.dumps(job).encode()), dtype=torch.uint8))]


class Session:
    """The trainer's end of a session with a model in this process."""

    def __init__(self, model, tmp_path, **changes):
        path = tmp_path / "s.sock"
        self.channel = Channel(path, tp_size=1)
        self.channel.call(lambda: receive(model, opening(path, **changes)))
        self.numbers = iter(range(1000))
        self.rank = changes.get("tp_rank", 0)

    def __enter__(self):
        self.greeting = self.channel.greet(timeout_s=20)[self.rank]
        return self

    def __exit__(self, *exc):
        self.channel.finish()

    def ask(self, command):
        number = next(self.numbers)
        self.channel.post({self.rank: {"for": self.rank, **command}}, number)
        return self.channel.collect(number, timeout_s=20)[self.rank]


def load_command(tmp_path, tensors, **changes):
    """A bucket in a file, which any number of loads may read."""
    flat, entries = bucket_of(tensors)
    handle = ipc_payload.write_file(flat, tmp_path / "bucket.safetensors")
    return {"do": "load", "handle": handle, "entries": entries, "checksum": list(checksum(flat)), **changes}


def test_a_session_says_who_is_there_and_remembers_from_one_to_the_next(tmp_path):
    model = model_of(plain, W)
    seen = []
    for seed in range(3):
        with Session(model, tmp_path) as session:
            assert session.greeting["error"] is None and session.greeting["uuid"] == device_uuid()
            seen.append((session.greeting["plans"], session.ask(load_command(tmp_path, sent(W, seed)))["replayed"]))
        if seed == 1:
            model.w.data = model.w.data.clone()
    assert [replayed for _, replayed in seen] == [False, True, False], "the parameter has moved"
    assert seen[0][0] == seen[1][0] != seen[2][0]
    assert os.listdir(tmp_path) == ["bucket.safetensors"], "the socket is gone"


def test_a_load_is_answered_in_full(tmp_path):
    model = model_of(plain, {"a": (3, 5), "b": (7,)})
    for seed in range(2):
        tensors = sent({"a": (3, 5), "b": (7,)}, seed)
        with Session(model, tmp_path) as session:
            answer = session.ask(load_command(tmp_path, tensors))
            again = session.ask(load_command(tmp_path, tensors, tell=True))
        assert again["replayed"] and again["learned"].keys() == {"a", "b"}, "also what was known, to whoever asks"
        assert answer.pop("seconds") > 0 and set(answer.pop("phases")) == {"open", "check", "load", "compare"}
        learned = {"a": [[0, [3, 5], [5, 1], "float32"]], "b": [[0, [7], [1], "float32"]]}
        assert answer == {
            "tp_rank": 0, "number": 0, "error": None, "opened": True, "differing": [], "unproven": [],
            "read": {"a": 15, "b": 7}, "replayed": seed == 1, **({"learned": learned} if seed == 0 else {}),
        }  # fmt: skip
        assert all(torch.equal(getattr(model, name), tensor) for name, tensor in tensors.items())


def test_only_what_can_be_made_again_counts_as_learned(tmp_path):
    def load(model, name, tensor):
        (cast_first if name == "w" else plain)(model, name, tensor)

    with Session(model_of(load, {**W, "a": (2,)}), tmp_path) as session:
        answer = session.ask(load_command(tmp_path, sent({**W, "a": (2,)})))
        assert set(answer["learned"]) == {"a"} and answer["unproven"] == ["w"]
        assert session.ask({"do": "survey"})["unwritten"] == ["w"]


def test_what_cannot_be_proven_and_what_is_skipped_are_in_the_reply(tmp_path):
    def load(model, name, tensor):
        if name == "w":
            cast_first(model, name, tensor)

    with Session(model_of(load, W), tmp_path) as session:
        answer = session.ask(load_command(tmp_path, sent({"w": (4, 4), "gone": (3,)})))
    assert (answer["error"], answer["unproven"], answer["read"]) == (None, ["w"], {})


def test_a_parameter_that_is_changed_by_the_loaders_end_is_in_the_reply(tmp_path):
    """By something the watch cannot see: another thread, a kernel of its own."""
    model = model_of(plain, W)
    load_weights = model.load_weights

    def load_and_spoil(weights):
        load_weights(weights)
        model.w.data.numpy()[0, 0] += 1

    model.load_weights = load_and_spoil
    with Session(model, tmp_path) as session:
        answer = session.ask(load_command(tmp_path, sent(W)))
    assert (answer["error"], answer["differing"]) == (None, ["w"])


@pytest.mark.parametrize("action", ["load", "probe"])
def test_memory_that_is_not_the_trainers_is_refused_before_a_parameter_is_touched(tmp_path, action):
    model = model_of(plain, W)
    before = bits(model)
    with Session(model, tmp_path) as session:
        answer = session.ask(load_command(tmp_path, sent(W), do=action, checksum=[1, 2]))
    assert answer["opened"] and answer["error"].startswith("RuntimeError: ")
    assert bits(model) == before


def test_a_session_rehearses_tells_and_lets_samples_bear_it_out(tmp_path):
    shapes, send = {"qkv": (8, 3)}, {"q": (4, 3), "k": (2, 3), "v": (2, 3)}
    model = model_of(fused, shapes)
    before = bits(model)
    entries = [[name, "float32", list(shape)] for name, shape in send.items()]
    with Session(model, tmp_path) as session:
        told = session.ask({"do": "rehearse", "entries": entries})
        again = session.ask({"do": "rehearse", "entries": entries})
        assert told["error"] is None and told["learned"] == again["learned"]
        assert {name: copies[0][1] for name, copies in told["learned"].items()} == {n: list(s) for n, s in send.items()}
        assert bits(model) == before
        sample = session.ask(load_command(tmp_path, {"k": sent(send)["k"]}, watch=True))
        assert sample["error"] is None and sample["otherwise"] == [] and not sample["replayed"]
        assert sample["learned"] == {"k": told["learned"]["k"]}
        rest = session.ask(load_command(tmp_path, sent(send)))
        assert rest["replayed"] and "otherwise" not in rest


def test_an_engine_that_was_warmed_up_knows_its_loader_when_the_trainer_comes(tmp_path):
    loads = []

    def load(model, name, tensor):
        loads.append(name)
        plain(model, name, tensor)

    model = model_of(load, {**W, "a": (2,)})
    before = bits(model)
    with Session(model, tmp_path) as session:
        told = session.ask({"do": "warm_up", "shapes": [["w", [4, 4]], ["a", [2]]]})
        assert told["error"] is None and set(told["learned"]) == {"w", "a"}
    assert bits(model) == before and sorted(loads) == ["a", "w"], "rehearsed, with nothing loaded"
    with Session(model, tmp_path) as session:
        again = session.ask({"do": "rehearse", "entries": [["w", "float32", [4, 4]], ["a", "float32", [2]]]})
        assert again["learned"] == told["learned"] and len(loads) == 2, "it need not be asked again"
        other = session.ask({"do": "rehearse", "entries": [["w", "bfloat16", [4, 4]]]})
        assert set(other["learned"]) == {"w"} and len(loads) == 3, "but for weights of another dtype"


def test_a_loader_that_cannot_be_rehearsed_is_warmed_up_in_vain(tmp_path):
    with Session(model_of(asked_for_a_value, W), tmp_path) as session:
        assert session.ask({"do": "warm_up", "shapes": [["w", [4, 4]]]})["error"] is not None
        assert session.ask(load_command(tmp_path, sent(W)))["error"] is None, "the first sync watches it"


def test_a_session_says_why_a_loader_cannot_be_rehearsed(tmp_path):
    model = model_of(asked_for_a_value, W)
    before = bits(model)
    with Session(model, tmp_path) as session:
        told = session.ask({"do": "rehearse", "entries": [["w", "float32", [4, 4]]]})
        assert "learned" not in told and "meta" in told["error"]
        assert bits(model) == before
        assert session.ask(load_command(tmp_path, sent(W)))["error"] is None


def test_what_was_staged_is_let_go_before_the_session_ends(tmp_path):
    tensor = sent(W)["w"]
    handle = ipc_payload.write_file(tensor.view(-1).view(torch.uint8), tmp_path / "staged.safetensors")
    with Session(model_of(plain, W), tmp_path) as session:
        assert session.ask({"do": "run", "map": [["stage/0", handle], ["loan0", handle]]})["mapped"] == [
            "stage/0",
            "loan0",
        ]
        assert session.ask({"do": "unstage"})["error"] is None
        assert list(hook._regions) == ["loan0"]
        session.ask({"do": "run", "release": ["loan0"]})


def test_a_probe_opens_and_loads_nothing(tmp_path):
    model = model_of(plain, W)
    before = bits(model)
    with Session(model, tmp_path) as session:
        answer = session.ask(load_command(tmp_path, sent(W), do="probe"))
    assert (answer["error"], answer["opened"], answer["uuid"]) == (None, True, device_uuid())
    assert bits(model) == before


def test_regions_are_mapped_run_and_let_go(tmp_path):
    model = model_of(plain, W)
    ledger = ipc_payload.Ledger(rank=0)
    lent, staged_one = staged(torch.zeros(64, dtype=torch.uint8)), staged(torch.zeros(64, dtype=torch.uint8))
    handles = {
        "loan0": ledger.export(lent, tp_rank=0, bucket=0),
        "stage0": ledger.export(staged_one, tp_rank=0, bucket=1),
    }
    with Session(model, tmp_path) as session:
        session.ask(load_command(tmp_path, sent(W)))
        programs = [
            [key, [["w", 0, None, None, region, 0, "float32", [4, 1]]]]
            for key, region in (("k/direct", "loan0"), ("k/0", "stage0"))
        ]
        answer = session.ask({"do": "run", "map": [[n, h.describe()] for n, h in handles.items()], "define": programs})
        assert answer["error"] is None and answer["mapped"] == ["loan0", "stage0"]
        for key, memory in (("k/direct", lent), ("k/0", staged_one)):
            new = sent(W, 3)["w"] if key == "k/0" else sent(W, 4)["w"]
            memory.copy_(new.view(-1).view(torch.uint8))
            answer = session.ask({"do": "run", "program": key, "keep": key == "k/direct"})
            assert answer["error"] is None and torch.equal(model.w, new)
            assert answer["sums"] == [int(word_sum(new))]
    assert (handles["loan0"].count(), handles["stage0"].count()) == (1, 0), "what is lent stays, what is staged goes"
    with Session(model, tmp_path) as session:
        lent.copy_(sent(W, 5)["w"].view(-1).view(torch.uint8))
        assert session.ask({"do": "run", "program": "k/direct", "keep": True})["error"] is None
        assert torch.equal(model.w, sent(W, 5)["w"])
        assert session.ask({"do": "run", "release": ["loan0", "never"]})["error"] is None
        assert handles["loan0"].count() == 0
        assert "KeyError" in session.ask({"do": "run", "program": "k/direct", "keep": True})["error"]
    assert ledger.reclaim() == []


def test_parameters_that_move_inside_a_session_are_not_written_through(tmp_path):
    model = model_of(plain, W)
    with Session(model, tmp_path) as session:
        session.ask(load_command(tmp_path, sent(W)))
        session.ask({"do": "run", "define": [["k", [["w", 0, None, None, "r", 0, "float32", [4, 1]]]]]})
        model.w.data = torch.zeros(4, 4)
        assert "moved" in session.ask({"do": "run", "program": "k", "keep": True})["error"]
    assert not model.w.any()


def raising(error):
    def load(model, name, tensor):
        raise error

    return load


@pytest.mark.parametrize("error", [ValueError("bad"), RuntimeError("shape"), AssertionError("x"), KeyError("name"), SystemExit(3), KeyboardInterrupt()],
                         ids=lambda error: type(error).__name__)  # fmt: skip
def test_a_loader_that_fails_does_not_take_the_worker_down(tmp_path, error):
    with Session(model_of(raising(error), W), tmp_path) as session:
        for _ in range(2):  # nothing of a failed load is learned
            answer = session.ask(load_command(tmp_path, sent(W)))
            assert answer["error"] == f"{type(error).__name__}: {error}" and "in load" in answer["traceback"]
            assert answer["opened"]


JUNK = [
    None,
    0,
    -1,
    1.5,
    "x",
    "",
    [],
    {},
    [None],
    {"kind": "cpu"},
    {"kind": "file", "path": "/nowhere"},
    {"kind": "unheard-of"},
]


@pytest.mark.parametrize("field", ["do", "for", "handle", "entries", "checksum"])
def test_junk_in_any_field_is_told_and_never_raised(tmp_path, field):
    model = model_of(plain, W)
    before = bits(model)
    with Session(model, tmp_path) as session:
        for junk in JUNK:
            answer = session.ask(load_command(tmp_path, sent(W), **{field: junk}))
            if field == "entries" and junk in ("", [], {}):
                assert answer["error"] is None and answer["read"] == {}, "an empty bucket is one"
            elif field == "for" and junk == 0:
                assert answer["error"] is None
                before = bits(model)
            else:
                assert answer["error"] and answer["traceback"], junk
            assert bits(model) == before


@pytest.mark.parametrize("field", ["handle", "entries", "checksum"])
def test_a_missing_field_is_told(tmp_path, field):
    command = load_command(tmp_path, sent(W))
    del command[field]
    with Session(model_of(plain, W), tmp_path) as session:
        assert session.ask(command)["error"] == f"KeyError: '{field}'"


@pytest.mark.parametrize("job", [b"", b"{", b"\xff\xfe", b"null", b"[]", b"3", b'"x"', b"{}", b'{"session": 3}'])
def test_a_command_that_is_none_is_not_raised(job):
    data = torch.frombuffer(bytearray(job), dtype=torch.uint8) if job else torch.empty(0, dtype=torch.uint8)
    receive(model_of(plain, W), [(COMMAND, data)])


@pytest.mark.parametrize("named_tensors", [[], [("other", torch.zeros(3))], None, [(COMMAND, None)]])
def test_no_command_at_all_is_not_raised(named_tensors):
    receive(model_of(plain, W), named_tensors)


def test_a_second_model_in_the_worker_does_not_take_part(tmp_path):
    """A draft model's runner gets the same request: it must not open what the target's has opened."""
    draft = model_of(plain, W)
    before = bits(draft)
    with Session(model_of(plain, W), tmp_path, session="once") as session:
        receive(draft, opening(tmp_path / "s.sock", session="once"))
        session.ask(load_command(tmp_path, sent(W)))
    assert bits(draft) == before


@pytest.mark.parametrize("gone", ["the socket", "the process", "the time"])
def test_a_trainer_that_is_gone_does_not_keep_the_worker(tmp_path, gone):
    path = tmp_path / "s.sock"
    changes = {"the process": {"peer": list(this_process())}, "the time": {"timeout_s": 0.3}}.get(gone, {})
    if gone == "the process":
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        changes = {"peer": [child.pid, start_of(child.pid)]}
    worker = threading.Thread(target=receive, args=(model_of(plain, W), opening(path, **changes)))
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(f"ipc://{path}")
        worker.start()
        assert socket.poll(20_000), "it has come"
        if gone == "the socket":
            path.unlink()
        if gone == "the process":
            child.kill()
            child.join()
        worker.join(20)
        assert not worker.is_alive()


@pytest.mark.parametrize(
    "rank, tp_size, tp_rank, right",
    [(0, 2, 0, True), (1, 2, 1, True), (3, 2, 1, True), (0, 2, 1, False), (2, 2, 1, False)],
)
def test_a_payload_that_reached_another_worker_is_told(tmp_path, monkeypatch, rank, tp_size, tp_rank, right):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    model = model_of(plain, W)
    before = bits(model)
    with Session(model, tmp_path, tp_rank=tp_rank, tp_size=tp_size, **{"for": tp_rank}) as session:
        answer = session.ask(load_command(tmp_path, sent(W)))
    if right:
        assert session.greeting["error"] is answer["error"] is None
    else:
        told = f"RuntimeError: the payload of TP rank {tp_rank} reached TP rank {rank % tp_size}"
        assert session.greeting["error"] == answer["error"] == told
        assert not answer["opened"] and bits(model) == before, "the handle is not even opened"


def test_a_command_for_another_worker_is_told(tmp_path):
    model = model_of(plain, W)
    with Session(model, tmp_path) as session:
        answer = session.ask(load_command(tmp_path, sent(W), **{"for": 1}))
    assert answer["error"] == "RuntimeError: the payload of TP rank 1 reached TP rank 0" and not answer["opened"]


# --- handles, opened in another process -----------------------------------------------------------------------------


def worker_main(pipe):
    """A TP worker: opens what it is told to, by the receiver alone."""
    model = model_of(plain, W)
    while (job := pipe.recv()) is not None:
        if "endpoint" in job:
            receive(model, opening(**job))
            pipe.send(model.w.tolist())
            continue
        try:
            flat = open_handle(job, CPU)
            answer = bytes(flat.tolist()), str(flat.dtype), list(flat.shape)
            del flat  # before the answer, or whoever reads it finds the handle still out
        except Exception as error:
            answer = error
        pipe.send(answer)


@pytest.fixture(scope="module")
def worker():
    """A function that hands one job to a process of its own and returns its answer."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))  # as for ranks: there is one such server for all
    pipe, theirs = context.Pipe()
    process = context.Process(target=worker_main, args=(theirs,), daemon=True)
    process.start()
    theirs.close()

    def ask(job):
        pipe.send(job)
        assert pipe.poll(50), "the worker hangs"
        return pipe.recv()

    yield ask
    pipe.send(None)
    process.join(5)
    process.kill()
    process.join()


def staged(content):
    flat = ipc_payload.allocate(content.numel(), CPU)
    return flat.copy_(content)


@pytest.mark.parametrize("size", [1, 7, 256, 5000])
def test_shared_memory_is_opened_and_let_go(worker, size):
    content = random_bytes(size)
    ledger = ipc_payload.Ledger(rank=0)
    handle = ledger.export(staged(content), tp_rank=0, bucket=0)
    job = json.loads(json.dumps(handle.describe()))
    assert job["kind"] == "cpu" and handle.count() == 1
    assert worker(job) == (bytes(content.tolist()), "torch.uint8", [size])
    assert handle.count() == 0, "let go as soon as it was dropped"
    assert len(ledger.reclaim()) == 0


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_a_file_is_opened(worker, tmp_path, size):
    content = random_bytes(size)
    job = json.loads(json.dumps(ipc_payload.write_file(content, tmp_path / "bucket.safetensors")))
    assert worker(job) == (bytes(content.tolist()), "torch.uint8", [size])
    assert os.listdir(tmp_path) == ["bucket.safetensors"], "its writer removes it"


@pytest.mark.parametrize(
    "changes",
    [{"kind": "file", "path": "/nowhere"}, {"name": "AAAA"}, {"manager": None}, {"kind": "cuda", "uuid": "GPU-1"}],
)
def test_what_does_not_open_is_an_error_in_the_worker_and_leaves_the_handle_alone(worker, changes):
    ledger = ipc_payload.Ledger(rank=0)
    handle = ledger.export(staged(random_bytes(100)), tp_rank=0, bucket=0)
    assert isinstance(worker({**handle.describe(), **changes}), Exception)
    assert handle.count() == 1
    ledger.reclaim()


def session_with(worker, tmp_path, command):
    """One command in a session with a worker in another process: its answer, and what its parameter holds after it."""
    path = tmp_path / "s.sock"
    held = []
    channel = Channel(path, tp_size=1)
    channel.call(lambda: held.append(worker({"path": str(path), "endpoint": channel.endpoint})))
    channel.greet(timeout_s=30)
    channel.post({0: {"for": 0, **command}}, 0)
    answer = channel.collect(0, timeout_s=30)[0]
    channel.finish()
    return answer, held[0]


def test_a_load_over_shared_memory_gives_the_handle_back_before_it_is_acknowledged(worker, tmp_path):
    for seed in range(3):
        tensors = sent(W, seed)
        flat, entries = bucket_of(tensors)
        ledger = ipc_payload.Ledger(rank=0)
        handle = ledger.export(staged(flat), tp_rank=0, bucket=0)
        command = load_command(tmp_path, tensors, handle=handle.describe(), entries=entries)
        answer, weights = session_with(worker, tmp_path, command)
        assert weights == tensors["w"].tolist()
        assert (answer["error"], answer["replayed"], answer["read"]) == (None, seed > 0, {"w": 16})
        assert handle.count() == 0
        assert ledger.reclaim() == []


def test_a_load_that_fails_gives_the_handle_back_too(worker, tmp_path):
    tensors = {"nowhere": torch.ones(3)}
    flat, entries = bucket_of(tensors)
    ledger = ipc_payload.Ledger(rank=0)
    handle = ledger.export(staged(flat), tp_rank=0, bucket=0)
    answer, _ = session_with(
        worker, tmp_path, load_command(tmp_path, tensors, handle=handle.describe(), entries=entries)
    )
    assert "nowhere" in answer["error"]
    assert handle.count() == 0 and ledger.reclaim() == []
