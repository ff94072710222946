"""The parameters of FSDP1 modules (`FullyShardedDataParallel`), gathered one at a time.

FSDP1 flattens the parameters of a unit into one, pads it and cuts that into equal shards, so what a rank has of a parameter
is no rectangle of it.  Its own ways to the full parameters (`summon_full_params`, state dicts) gather a unit as a whole,
which is the whole model if it was not auto-wrapped.  Here the ranks that hold a part of one parameter broadcast it, which
moves as many bytes and takes the memory of one parameter; nothing of the module's state is touched.

Relies on what torch.distributed.fsdp._flat_param documents of `FlatParameter` (2.9 to 2.13), and refuses a layout that
does not add up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from tpcolocate.errors import ConfigError
from tpcolocate.weights.sources.lazy_tensor import Item, Items, LazyTensor
from tpcolocate.weights.sources.wrapper_names import without_wrappers

WARNING = (
    "the trainer is sharded by FSDP1, so every rank gathers every weight in full; with FSDP2 (fully_shard; accelerate: "
    "fsdp_version: 2, `accelerate to-fsdp2` converts a configuration) only what a TP worker needs is transferred"
)
_FLAT = "_flat_param"

Parameters = Mapping[int, Mapping[str, Item]]
"""id of the module that owned them before FSDP flattened them -> name in it -> parameter."""


def parameters(module: nn.Module) -> Parameters | None:
    """Return the parameters that the FSDP1 units of a module hold; None if there are no units in it.

    What is sharded is a `LazyTensor`, equal for tied parameters, whose `make` is a collective over the ranks that share
    the unit; of ``NO_SHARD``, or a single rank, it is a view of live memory.  Both are the master weights, whatever a
    forward has left in the module.

    Raises:
        ConfigError: Sharded DTensors, or a flat parameter that is not laid out as expected.
    """
    found: dict[int, dict[str, Item]] = {}
    units = [unit for unit in module.modules() if isinstance(unit, FullyShardedDataParallel)]
    for unit in units:
        if unit._handle is not None:
            for owner, name, item in _of_unit(unit._handle):
                found.setdefault(id(owner), {})[name] = item
    return found if units else None


def state(module: nn.Module, flattened: Parameters) -> Items:
    """Return a module's parameters and persistent buffers, by their names without wrappers.

    Not from `state_dict`, whose FSDP1 hooks gather every unit.  What a module's own state dict hooks would add is not in it.

    Args:
        module: FSDP1 units, or modules in them.
        flattened: From `parameters` of a module that contains it.
    """
    found: list[tuple[str, Item]] = []
    for path, one in module.named_modules(remove_duplicate=False):
        own = {name: tensor for name, tensor in one._parameters.items() if tensor is not None and name != _FLAT}
        buffers = {
            name: buffer
            for name, buffer in one._buffers.items()
            if buffer is not None and name not in one._non_persistent_buffers_set
        }
        for name, item in {**own, **flattened.get(id(one), {}), **buffers}.items():
            found.append((without_wrappers(f"{path}.{name}" if path else name), item))
    return found


def is_sharded(flattened: Parameters) -> bool:
    """Return whether any of them has to be gathered."""
    return any(isinstance(item, LazyTensor) for own in flattened.values() for item in own.values())


def groups(module: nn.Module) -> dict[dist.ProcessGroup, torch.device]:
    """Return the groups among which a module's FSDP1 units are sharded, in the order of the units, and where they compute."""
    handles = [unit._handle for unit in module.modules() if isinstance(unit, FullyShardedDataParallel)]
    return {
        handle.process_group: handle.device for handle in handles if handle is not None and handle.uses_sharded_strategy
    }


def are_shards(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether these are what FSDP1 leaves in a module's parameters on each rank, outside of `summon_full_params`.

    A shard has one dimension, and a model has weights of two; FSDP1 marks parameters that it has flattened.
    """
    flattened = [tensor for tensor in tensors.values() if getattr(tensor, "_fsdp_flattened", False)]
    return bool(flattened) and all(tensor.dim() == 1 for tensor in flattened)


def _of_unit(handle: Any) -> Iterator[tuple[nn.Module, str, Item]]:
    """Yield (owner, name, parameter) for everything in the flat parameter of a unit."""
    if handle._use_orig_params and not handle._skip_writeback_check:
        handle._writeback_orig_params()  # as before a forward: a parameter may have been given other memory
    flat = handle.flat_param
    if any(extension is not None for extension in flat._param_extensions):
        raise ConfigError(
            "FSDP1 over DTensors (FSDP1 with tensor parallelism) is not supported",
            hint="shard with torch.distributed.fsdp.fully_shard (FSDP2)",
        )
    padded = list(zip(itertools.accumulate(flat._numels_with_padding, initial=0), flat._is_padding_mask))
    starts = [start for start, is_padding in padded if not is_padding]
    _check_layout(handle, starts)
    items = [_item(handle, i, start) for i, start in enumerate(starts)]
    found: dict[tuple[int, str], Item] = {}
    for info, item in zip(flat._param_infos, items):
        found[id(info.module), info.param_name] = item
        yield info.module, info.param_name, item
    for info in flat._shared_param_infos:
        yield info.module, info.param_name, found[id(info.prim_module), info.prim_param_name]


def _check_layout(handle: Any, starts: list[int]) -> None:
    flat = handle.flat_param
    size = flat._unpadded_unsharded_size.numel()
    num_ranks = handle.world_size if handle.uses_sharded_strategy else 1
    shard = _shard_of(handle).numel()
    adds_up = (
        sum(flat._numels_with_padding) == size
        and len(starts) == len(flat._shapes) == len(flat._param_infos)
        and all(shape.numel() == numel for shape, numel in zip(flat._shapes, flat._numels))
        and shard == -(-size // num_ranks)
    )
    if not adds_up:
        raise ConfigError(
            f"torch {torch.__version__} lays out an FSDP1 module in a way that is not known here",
            hint="shard with torch.distributed.fsdp.fully_shard (FSDP2), or pass a full state dict",
        )


def _shard_of(handle: Any) -> torch.Tensor:
    """This rank's shard of the flat parameter: the master weights, with padding at the end."""
    flat = handle.flat_param
    shard = getattr(flat, "_local_shard", None)  # from the first forward on
    return flat.data if shard is None else shard


def _item(handle: Any, number: int, start: int) -> Item:
    """Return the parameter of a number, which starts there in the flat parameter."""
    flat = handle.flat_param
    shape, shard = flat._shapes[number], _shard_of(handle)
    # It was flattened in the order of its memory.
    stride = _contiguous(shape) if flat._contiguities[number] else tuple(flat._strides[number])
    if not handle.uses_sharded_strategy:
        return shard.detach().as_strided(shape, stride, int(shard.storage_offset()) + start)
    return LazyTensor(
        shape=shape,
        dtype=shard.dtype,
        device=shard.device,
        make=lambda: _gather(handle, start, shape.numel()).as_strided(shape, stride),
        is_collective=True,
        extra_bytes=0,
    )


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _gather(handle: Any, start: int, numel: int) -> torch.Tensor:
    """Return elements of the flat parameter.  Collective: over the ranks that share the unit."""
    shard = _shard_of(handle).detach()
    size = shard.numel()
    full = torch.empty(numel, dtype=shard.dtype, device=handle.device)
    for holder in range(start // size, (start + numel - 1) // size + 1) if numel else ():
        first, last = max(start, holder * size), min(start + numel, (holder + 1) * size)
        part = full[first - start : last - start]
        if holder == handle.rank:
            part.copy_(shard[first - holder * size : last - holder * size])
        dist.broadcast(part, group=handle.process_group, group_src=holder)
    return full


__all__ = ["WARNING", "Parameters", "are_shards", "groups", "is_sharded", "parameters", "state"]
