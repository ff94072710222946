"""How tensors lie among the training ranks: whole, or cut once along a mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard

from tpcolocate.weights.plan.slices import Region, shards, whole
from tpcolocate.weights.sources.lazy_tensor import local_of


@dataclass(frozen=True, slots=True)
class LocalShard:
    """One tensor as this rank holds it.

    Attributes:
        shape: Of the whole tensor.
        local: What lies here, detached.
        slabs: What each rank of `group` holds.
        position: This rank's in `group`.
        group: The ranks among which the tensor is sharded; None: all of it lies here.
    """

    shape: tuple[int, ...]
    local: torch.Tensor
    slabs: tuple[Region, ...]
    position: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def slab(self) -> Region:
        return self.slabs[self.position]


class CachedShards(Mapping[str, LocalShard]):
    """Tensors that lie as they did at the last sync, each looked at only when it is needed.

    Args:
        items: What lies here now.
        layouts: As they were.
    """

    def __init__(self, items: Mapping[str, torch.Tensor], layouts: Layouts) -> None:
        self._items = items
        self._layouts = layouts

    def __getitem__(self, name: str) -> LocalShard:
        shape, slabs, position, group = self._layouts[name]
        return LocalShard(shape, local_of(self._items[name]).detach(), slabs, position, group)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)


Layouts = dict[str, tuple[tuple[int, ...], tuple[Region, ...], int, dist.ProcessGroup | None]]
"""Tensor -> its shape, and slabs, position and group as in `LocalShard`."""


def layouts_of(tensors: Mapping[str, LocalShard]) -> Layouts:
    """How tensors lie, without their memory."""
    return {name: (one.shape, one.slabs, one.position, one.group) for name, one in tensors.items()}


Layout = tuple[tuple[Region, ...], int, dist.ProcessGroup | None]


def layout_of(shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Layout | None:
    """Slabs, this rank's position among them, and the group; see `LocalShard`."""
    if any(type(p) not in (Shard, Replicate) for p in placements):
        return None
    sharded = [i for i, p in enumerate(placements) if isinstance(p, Shard)]
    if not sharded:
        return (whole(shape),), 0, None
    if len(sharded) > 1:
        return None
    axis = sharded[0]
    placement = placements[axis]
    assert isinstance(placement, Shard)
    slabs = tuple(shards(shape, placement.dim % len(shape), mesh.size(axis)))
    return slabs, mesh.get_local_rank(axis), mesh.get_group(axis)


__all__ = ["LocalShard", "CachedShards", "Layout", "Layouts", "layout_of", "layouts_of"]
