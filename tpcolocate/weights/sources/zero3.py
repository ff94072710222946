"""The parameters of DeepSpeed ZeRO-3, gathered one at a time.

ZeRO-3 leaves empty tensors in a module: a parameter has no elements between uses, and its shape is in `ds_shape`.
`deepspeed.zero.GatheredParameters` fills it for the length of a block.  Relies on these and on `ds_id`, `ds_status` and
`ds_process_group` (deepspeed.runtime.zero.partition_parameters, run with DeepSpeed 0.19.8).  DeepSpeed is never imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from tpcolocate.weights.sources.lazy_tensor import Item, LazyTensor

WARNING = (
    "the trainer is sharded by DeepSpeed ZeRO-3, so every rank gathers every weight in full; with ZeRO-1 or 2, which keep "
    "whole weights, or FSDP2 (fully_shard) they are read where they lie"
)


def gathering(pairs: Iterable[tuple[str, Item]]) -> Iterator[tuple[str, Item]]:
    """Yield the same with a lazy tensor for each parameter that ZeRO-3 has partitioned, the same one where it is tied.

    Its `make` is a collective over the ranks that share the parameter.
    """
    made: dict[int, LazyTensor] = {}
    for name, item in pairs:
        if is_partitioned(item):
            item = made.setdefault(id(item), _lazy(item))
        yield name, item


def is_partitioned(item: object) -> bool:
    """Return whether a parameter belongs to ZeRO-3."""
    return isinstance(item, torch.Tensor) and hasattr(item, "ds_id") and hasattr(item, "ds_shape")


def group_of(parameter: Any) -> dist.ProcessGroup:
    """Return the ranks among which ZeRO-3 has partitioned a parameter."""
    group: dist.ProcessGroup = parameter.ds_process_group
    return group


def _lazy(parameter: Any) -> LazyTensor:
    def make() -> torch.Tensor:
        # Small ones are left gathered on all ranks from step to step, and are not to be partitioned by a sync.
        if parameter.ds_status.name == "AVAILABLE" and parameter.shape == parameter.ds_shape:
            return parameter.data
        with sys.modules["deepspeed"].zero.GatheredParameters([parameter]):
            return parameter.data.clone()

    shape = torch.Size(parameter.ds_shape)
    return LazyTensor(
        shape=shape,
        dtype=parameter.dtype,
        device=parameter.device,
        make=make,
        is_collective=True,
        extra_bytes=shape.numel() * parameter.dtype.itemsize,  # DeepSpeed's own, until the block ends
    )


__all__ = ["WARNING", "gathering", "group_of", "is_partitioned"]
