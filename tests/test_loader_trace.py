"""The trace of an engine's loader, and what is read back of the parameters; `test_session_receiver` has the session."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loaders import (
    IDS,
    LOADERS,
    W,
    bits,
    bucket_of,
    elements_read,
    fused,
    is_repeatable,
    materialised,
    model_of,
    plain,
    sent,
    traced,
)
from torch.utils._python_dispatch import TorchDispatchMode

from tpcolocate.in_server.tpcolocate_receiver import loader_trace
from tpcolocate.in_server.tpcolocate_receiver.copy_plan import CopyPlan, locations_of
from tpcolocate.in_server.tpcolocate_receiver.loader_trace import Copy, differing

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


@pytest.mark.parametrize("load, shapes, send, transformed, overwritten, repeatable, read", LOADERS, ids=IDS)
def test_what_a_loader_does_is_seen(load, shapes, send, transformed, overwritten, repeatable, read):
    tensors = sent(send)
    flat, entries = bucket_of(tensors)
    model, unwatched = model_of(load, shapes), model_of(load, shapes)
    trace = traced(model, flat, entries)
    assert {entries[i][0] for i in trace.transformed} == transformed
    assert {entries[i][0] for i in trace.overwritten} == overwritten
    assert is_repeatable(trace) == repeatable
    assert elements_read(trace.copies, entries) == read
    unwatched.load_weights([(name, tensor.clone()) for name, tensor in tensors.items()])
    assert bits(model) == bits(unwatched), "and tracing changes nothing"
    assert differing([c for c in trace.copies if c.entry not in trace.transformed | trace.overwritten]) == set()


@pytest.mark.parametrize("load, shapes, send, transformed, overwritten, repeatable, read", LOADERS, ids=IDS)
def test_the_same_is_seen_in_inference_mode(load, shapes, send, transformed, overwritten, repeatable, read):
    """Operators are not decomposed there: what promises a view may make a copy."""
    flat, entries = bucket_of(sent(send))
    model = model_of(load, shapes)
    with torch.inference_mode():
        trace = traced(model, flat, entries)
    assert {entries[i][0] for i in trace.transformed} == transformed
    assert {entries[i][0] for i in trace.overwritten} == overwritten
    assert is_repeatable(trace) == repeatable
    assert elements_read(trace.copies, entries) == read


def flattened(model, name, tensor):
    model.w.data.view(-1).copy_(tensor.t().reshape(-1))


def cast_to(model, name, tensor):
    model.w.data.copy_(tensor.to(torch.bfloat16))


@pytest.mark.parametrize("load", [flattened, materialised, cast_to])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_copy_behind_an_operator_that_promises_a_view_is_seen(load, mode):
    flat, entries = bucket_of(sent({"w": (3, 5)}))
    with mode():
        trace = traced(model_of(load, {"w": (5, 3)} if load is not cast_to else {"w": (3, 5)}), flat, entries)
    assert trace.transformed == {0} and not trace.copies


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
    operator = loader_trace._Operator.of(func)
    assert [name for _, name in operator.writes] == writes
    assert [name for _, name in operator.reads] == reads
    assert operator.is_view == is_view


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30), st.booleans()), min_size=1, max_size=25))
def test_overwritten_copies_are_found_whatever_their_order(parts):
    """Each part is rows or columns of a parameter; where it lies is compared with every part before it."""
    flat, entries = bucket_of({f"t{i}": torch.ones(1) for i in range(len(parts))})

    def load(model, name, tensor):
        start, size, of_rows = parts[int(name[1:])]
        (model.w.data[start : start + size] if of_rows else model.w.data[:, start : start + size]).copy_(tensor)

    model = model_of(load, {"w": (60, 60)})
    trace = traced(model, flat, entries)
    spans, expected = [], set()
    for start, size, of_rows in parts:
        low, high = (start * 60, (start + size) * 60) if of_rows else (start, 59 * 60 + start + size)
        expected |= {j for j, (lower, higher) in enumerate(spans) if lower < high and low < higher}
        spans.append((low, high))
    assert trace.overwritten == expected
    assert len(trace.copies_into(model.w)) == len(parts)


def test_a_trace_does_not_compare_every_copy_with_every_other(monkeypatch):
    """Fused experts: hundreds of copies into one parameter, and a constant beside each of them."""
    num = 300
    flat, entries = bucket_of({f"e{i}": torch.ones(2) for i in range(num)})

    def load(model, name, tensor):
        model.w.data[int(name[1:]), :2].copy_(tensor)
        model.w.data[int(name[1:]), 2:].fill_(0)

    looked, bounds = [], loader_trace.bounds
    monkeypatch.setattr(loader_trace, "bounds", lambda tensor: looked.append(1) or bounds(tensor))
    model = model_of(load, {"w": (num, 4)})
    trace = traced(model, flat, entries)
    plan = CopyPlan()
    plan.add(trace, entries, locations_of(model))
    assert not trace.overwritten and len(trace.copies) == len(trace.fills) == num
    assert len(looked) <= 5 * num
    assert plan.covers(entries)


def test_casting_copies_are_copies():
    """The trainer's float32 into the engine's bfloat16: compared after the same cast."""
    flat, entries = bucket_of(sent(W))
    model = model_of(plain, W, torch.bfloat16)
    trace = traced(model, flat, entries)
    assert is_repeatable(trace) and not trace.transformed | trace.overwritten and len(trace.copies) == 1
    assert torch.equal(model.w, sent(W)["w"].to(torch.bfloat16))
    assert differing(trace.copies) == set()
    model.w.data[1, 1] += 1
    assert differing(trace.copies) == {0}


def test_tensors_are_told_apart_whatever_their_size():
    """Tensors without elements share their place with the next one."""
    shapes = {"e0": (0, 3), "a": (1,), "e1": (2, 0), "e2": (0,), "b": (200,), "c": (64,), "e3": (0,)}
    tensors = sent(shapes)
    flat, entries = bucket_of(tensors)
    copies = traced(model_of(plain, shapes), flat, entries).copies
    assert [(entries[c.entry][0], c.src.numel()) for c in copies] == [("a", 1), ("b", 200), ("c", 64)]


def test_one_overwrite_does_not_spoil_the_tensors_beside_it():
    def load(model, name, tensor):
        fused(model, name, tensor)
        if name == "v":
            model.qkv.data[4:6].mul_(2)

    flat, entries = bucket_of(sent({"q": (4, 3), "k": (2, 3), "v": (2, 3)}))
    trace = traced(model_of(load, {"qkv": (8, 3)}), flat, entries)
    assert {entries[i][0] for i in trace.overwritten} == {"k"}


# --- reading back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool], ids=str)
def test_a_parameter_that_was_changed_after_the_load_is_found(dtype):
    src = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]).to(dtype) for _ in range(3)]
    copies = [Copy(tensor.clone(), tensor, i) for i, tensor in enumerate(src)]
    assert differing(copies) == set()
    copies[1].dst.view(torch.uint8)[0, 0] ^= 1
    assert differing(copies) == {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_nan_that_arrived_as_a_nan_is_the_trainers(dtype):
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
            read = {loader_trace.storage_of(t) for t in args if isinstance(t, torch.Tensor)}
            if isinstance(out, torch.Tensor) and loader_trace.storage_of(out) not in read:
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
