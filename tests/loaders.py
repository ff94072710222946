"""Models whose loaders each do one thing that loaders of engines do, and what a trace of it contains."""

import json
import weakref

import torch
from torch import nn

from tpcolocate import ipc_payload
from tpcolocate.in_server.tpcolocate_receiver.copy_plan import CopyPlan
from tpcolocate.in_server.tpcolocate_receiver.load_bucket import load_bucket
from tpcolocate.in_server.tpcolocate_receiver.loader_trace import BucketTensors, LoaderTrace, differing, views


class Model(nn.Module):
    """A model with the parameters `weights`, whose loader calls `load` for each tensor."""

    def __init__(self, load, **weights):
        super().__init__()
        for name, tensor in weights.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.load = load

    def load_weights(self, weights):
        _WAITING.pop(self, None)
        for name, tensor in weights:
            self.load(self, name, tensor)


def plain(model, name, tensor):
    getattr(model, name).data.copy_(tensor)


def fused(model, name, tensor):
    rows = {"q": (0, 4), "k": (4, 2), "v": (6, 2)}[name]
    model.qkv.data.narrow(0, *rows).copy_(tensor)


def fused_shard(model, name, tensor):
    """Load the rows of one TP rank of two from every tensor."""
    start, size = {"q": (0, 2), "k": (2, 1), "v": (3, 1)}[name]
    model.qkv.data.narrow(0, start, size).copy_(tensor.narrow(0, size, size))


def column_shard(model, name, tensor):
    model.w.data.copy_(tensor[:, 2:4])


def replicated(model, name, tensor):
    """Load the same head twice: grouped-query attention with more TP ranks than heads."""
    model.kv.data[:2].copy_(tensor[:2])
    model.kv.data[2:].copy_(tensor[:2])


def transposed(model, name, tensor):
    model.w.data.copy_(tensor.t())


def transposed_into(model, name, tensor):
    model.w.data.t().copy_(tensor)


def padded(model, name, tensor):
    model.w.data[: len(tensor)].copy_(tensor)
    model.w.data[len(tensor) :].fill_(0)


def padded_before(model, name, tensor):
    model.w.data[len(tensor) :].zero_()
    model.w.data[: len(tensor)].copy_(tensor)


def setitem(model, name, tensor):
    model.w.data[:4] = tensor


def materialised(model, name, tensor):
    model.w.data.copy_(tensor.t().contiguous())


def cast_first(model, name, tensor):
    model.w.data.copy_(tensor.to(torch.bfloat16))


def scaled_first(model, name, tensor):
    model.w.data.copy_(tensor * 2)


def scaled_in_staging(model, name, tensor):
    model.w.data.copy_(tensor.mul_(2))


def scaled_into_staging(model, name, tensor):
    torch.mul(torch.full_like(model.w, 3.0), 2.0, out=tensor)
    model.w.data.copy_(tensor)


def by_way_of_a_copy(model, name, tensor):
    between = torch.empty(tensor.shape)
    between.copy_(tensor)
    model.w.data.copy_(between)


def added(model, name, tensor):
    model.w.data.zero_()
    model.w.data.add_(tensor)


def indexed(model, name, tensor):
    model.w.data.index_copy_(0, torch.arange(len(tensor)), tensor)


def many_at_once(model, name, tensor):
    torch._foreach_copy_([model.w.data[:1], model.w.data[1:]], [tensor[:1], tensor[1:]])


def written_out(model, name, tensor):
    torch.add(tensor, 0.0, out=model.w.data)


def asked_for_a_value(model, name, tensor):
    model.w.data.copy_(tensor)
    model.largest = tensor.max().item()


def rescaled(model, name, tensor):
    model.w.data.copy_(tensor)
    model.w.data.mul_(2)


def partly_rescaled(model, name, tensor):
    model.w.data.copy_(tensor)
    model.w.data[0].mul_(2)


def filled_over(model, name, tensor):
    model.w.data.copy_(tensor)
    model.w.data[0].fill_(1)


def copied_over(model, name, tensor):
    model.w.data.copy_(tensor)
    model.w.data.copy_(torch.ones(tensor.shape))


def derives_a_buffer(model, name, tensor):
    model.w.data.copy_(tensor)
    model.doubled = model.w.data * 2


def derives_in_place(model, name, tensor):
    model.w.data.copy_(tensor)
    model.also.data.copy_(model.w.data)


def derives_beside(model, name, tensor):
    """Write to memory that is no parameter, as is done for absorbed weights."""
    model.w.data.copy_(tensor)
    if not hasattr(model, "beside"):
        model.beside = torch.empty(tensor.shape)
    model.beside.copy_(model.w.data)


def counts(model, name, tensor):
    model.w.data.copy_(tensor)
    model.also.data.add_(1)


def skips(model, name, tensor):
    if hasattr(model, name):
        getattr(model, name).data.copy_(tensor)


_WAITING = weakref.WeakKeyDictionary()
"""Model -> what its loader has put aside in the load in progress."""


def joins(model, name, tensor):
    """Load two tensors as one, once both have come."""
    waiting = _WAITING.setdefault(model, {})
    waiting[name] = tensor
    if {"a", "b"} <= set(waiting):
        model.ab.data.copy_(torch.cat([waiting.pop("a"), waiting.pop("b")]))


def joins_in_place(model, name, tensor):
    waiting = _WAITING.setdefault(model, {})
    waiting[name] = tensor
    if {"a", "b"} <= set(waiting):
        both = torch.empty_like(model.ab)
        for part, which in zip(both.chunk(2), "ab"):
            part.copy_(waiting.pop(which))
        model.ab.data.copy_(both)


def waits(model, name, tensor):
    """Likewise, by a copy of each."""
    waiting = _WAITING.setdefault(model, {})
    waiting[name] = tensor
    if {"a", "b"} <= set(waiting):
        for part, which in zip(model.ab.data.chunk(2), "ab"):
            part.copy_(waiting.pop(which))


def halves(model, name, tensor):
    model.w.data[:2].copy_(tensor[:2])


W = {"w": (4, 4)}
NOTHING = set()
LOADERS = [
    # loader, parameters, tensors sent, transformed, overwritten, repeatable, elements read
    (plain, {"a": (3, 5), "b": (7,), "c": ()}, {"a": (3, 5), "b": (7,), "c": ()}, NOTHING, NOTHING, True, {"a": 15, "b": 7, "c": 1}),
    (plain, {"a": (0, 5), "b": (2,)}, {"a": (0, 5), "b": (2,)}, NOTHING, NOTHING, True, {"b": 2}),
    (fused, {"qkv": (8, 3)}, {"q": (4, 3), "k": (2, 3), "v": (2, 3)}, NOTHING, NOTHING, True, {"q": 12, "k": 6, "v": 6}),
    (fused_shard, {"qkv": (4, 3)}, {"q": (4, 3), "k": (2, 3), "v": (2, 3)}, NOTHING, NOTHING, True, {"q": 6, "k": 3, "v": 3}),
    (column_shard, {"w": (4, 2)}, W, NOTHING, NOTHING, True, {"w": 8}),
    (replicated, {"kv": (4, 3)}, {"kv": (4, 3)}, NOTHING, NOTHING, True, {"kv": 12}),
    (transposed, {"w": (5, 3)}, {"w": (3, 5)}, NOTHING, NOTHING, True, {"w": 15}),
    (transposed_into, {"w": (5, 3)}, {"w": (3, 5)}, NOTHING, NOTHING, True, {"w": 15}),
    (padded, {"w": (6, 4)}, W, NOTHING, NOTHING, True, {"w": 16}),
    (padded_before, {"w": (6, 4)}, W, NOTHING, NOTHING, True, {"w": 16}),
    (setitem, {"w": (6, 4)}, W, NOTHING, NOTHING, True, {"w": 16}),
    (skips, {"a": (2,)}, {"a": (2,), "gone": (3,)}, NOTHING, NOTHING, True, {"a": 2}),
    (joins, {"ab": (4, 3)}, {"a": (2, 3), "b": (2, 3)}, {"a", "b"}, NOTHING, False, {}),
    (joins_in_place, {"ab": (4, 3)}, {"a": (2, 3), "b": (2, 3)}, {"a", "b"}, NOTHING, False, {}),
    (waits, {"ab": (4, 3)}, {"a": (2, 3), "b": (2, 3)}, NOTHING, NOTHING, True, {"a": 6, "b": 6}),
    (halves, W, W, NOTHING, NOTHING, True, {"w": 8}),
    (materialised, {"w": (5, 3)}, {"w": (3, 5)}, {"w"}, NOTHING, False, {}),
    (cast_first, W, W, {"w"}, NOTHING, False, {}),
    (scaled_first, W, W, {"w"}, NOTHING, False, {}),
    (scaled_in_staging, W, W, {"w"}, NOTHING, False, {"w": 16}),
    (scaled_into_staging, W, W, {"w"}, NOTHING, False, {"w": 16}),
    (by_way_of_a_copy, W, W, {"w"}, NOTHING, False, {}),
    (added, W, W, {"w"}, NOTHING, False, {}),
    (indexed, W, W, {"w"}, NOTHING, False, {}),
    (many_at_once, W, W, {"w"}, NOTHING, False, {}),
    (written_out, W, W, {"w"}, NOTHING, False, {}),
    (asked_for_a_value, W, W, {"w"}, NOTHING, False, {"w": 16}),
    (rescaled, W, W, NOTHING, {"w"}, False, {"w": 16}),
    (partly_rescaled, W, W, NOTHING, {"w"}, False, {"w": 16}),
    (filled_over, W, W, NOTHING, {"w"}, True, {"w": 16}),
    (copied_over, W, W, NOTHING, {"w"}, False, {"w": 16}),
    (derives_a_buffer, W, W, NOTHING, NOTHING, False, {"w": 16}),
    (derives_in_place, {"w": (4, 4), "also": (4, 4)}, W, NOTHING, NOTHING, False, {"w": 16}),
    (derives_beside, W, W, NOTHING, NOTHING, False, {"w": 16}),
    (counts, {"w": (4, 4), "also": (1,)}, W, NOTHING, NOTHING, False, {"w": 16}),
]  # fmt: skip
IDS = [case[0].__name__ for case in LOADERS]


def model_of(load, shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(99)
    return Model(load, **{name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()})


def bucket_of(tensors):
    """Return (staging memory, entries as in a command)."""
    entries, num_bytes = ipc_payload.layout([(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()])
    flat = torch.zeros(num_bytes, dtype=torch.uint8)
    for entry in entries:
        ipc_payload.view(flat, entry).copy_(tensors[entry.name])
    return flat, json.loads(json.dumps(ipc_payload.described(entries)))


def sent(shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def traced(model, flat, entries):
    owned = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    trace = LoaderTrace(BucketTensors(flat, entries), owned)
    with torch.no_grad(), trace:
        model.load_weights(views(flat, entries))
    return trace


def is_repeatable(trace):
    """Whether the loader made copies and wrote constants, and nothing else."""
    return not (trace.has_other_writes or trace.transformed)


def elements_read(copies, entries):
    read = {}
    for copy in copies:
        name = entries[copy.entry][0]
        read[name] = read.get(name, 0) + copy.src.numel()
    return read


def bits(model):
    return {
        name: parameter.detach().reshape(-1).view(torch.uint8).tolist() for name, parameter in model.named_parameters()
    }


def update(model, tensors):
    """Return (whether the loader was not needed, what was not verified, what differs, elements read)."""
    flat, entries = bucket_of(tensors)
    if not hasattr(model, "plan") or not model.plan.is_current():
        model.plan = CopyPlan()
    loaded = load_bucket(model, model.plan, flat, entries)
    wrong = differing([c for c in loaded.copies if c.entry not in loaded.unverified])
    unverified = {entries[i][0] for i in loaded.unverified}
    return loaded.replayed, unverified, wrong, elements_read(loaded.copies, entries)
