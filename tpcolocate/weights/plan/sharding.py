"""How tensors are spread over the training ranks: whole, or sharded once along one axis of a mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tpcolocate.in_server.tpcolocate_receiver.regions import Region, whole
from tpcolocate.weights.sources.lazy_tensor import Item, LazyTensor, local_of


@dataclass(frozen=True, slots=True)
class LocalShard:
    """The part of one tensor that lies on this rank.

    Attributes:
        shape: Of the whole tensor.
        local: The memory of this rank's shard, detached.
        regions: The shard region of each rank of `group`.
        position: This rank's position in `group`.
        group: The ranks among which the tensor is sharded; None if this rank has all of it.
    """

    shape: tuple[int, ...]
    local: torch.Tensor
    regions: tuple[Region, ...]
    position: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def region(self) -> Region:
        """The part of the tensor that `local` is."""
        return self.regions[self.position]


Shards = Mapping[str, LocalShard]
"""Tensor -> this rank's shard, in the order of the sync; the same names on every rank."""

Layout = tuple[tuple[int, ...], tuple[Region, ...], int, dist.ProcessGroup | None]
"""A `LocalShard` without its memory: shape, regions, position, group."""


class CachedShards(Mapping[str, LocalShard]):
    """Shards of tensors that are laid out as in the last sync; each is looked up only when it is needed.

    Args:
        tensors: Name -> parameter or view, as they are now.
        layouts: Name -> layout in the last sync.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], layouts: Mapping[str, Layout]) -> None:
        self._tensors = tensors
        self._layouts = layouts

    def __getitem__(self, name: str) -> LocalShard:
        shape, regions, position, group = self._layouts[name]
        return LocalShard(shape, local_of(self._tensors[name]).detach(), regions, position, group)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)


class ShardFinder:
    """Finds the local shards of tensors.  Cheap enough to be asked for every tensor at every sync: layouts are cached."""

    def __init__(self) -> None:
        self._cache: dict[object, tuple[tuple[Region, ...], int, dist.ProcessGroup | None] | None] = {}

    def find(self, tensor: Item) -> LocalShard | None:
        """Return this rank's shard; None for what only `full_tensor` can gather or compute.

        Supported are plain tensors, and DTensors that are sharded once and otherwise replicated (FSDP2, HSDP, DTensor
        tensor parallelism).
        """
        shape = tuple(tensor.shape)
        if isinstance(tensor, LazyTensor):
            return None
        if not isinstance(tensor, DTensor):
            return LocalShard(shape, tensor.detach(), (whole(shape),))
        key = (shape, tensor.device_mesh, tensor.placements)
        if key not in self._cache:
            self._cache[key] = _layout_of(*key)
        layout = self._cache[key]
        if layout is None:
            return None
        regions, position, group = layout
        local = local_of(tensor).detach()
        if tuple(local.shape) != regions[position].lengths:
            return None
        return LocalShard(shape, local, regions, position, group)


def _layout_of(
    shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> tuple[tuple[Region, ...], int, dist.ProcessGroup | None] | None:
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
    regions = tuple(shard_regions(shape, placement.dim % len(shape), mesh.size(axis)))
    return regions, mesh.get_local_rank(axis), mesh.get_group(axis)


def shard_regions(shape: tuple[int, ...], dim: int, num_ranks: int) -> list[Region]:
    """Return how ``Shard(dim)`` cuts a tensor: as `torch.chunk` does, so the last ranks may have less or nothing."""
    size = -(-shape[dim] // num_ranks)
    regions = []
    for rank in range(num_ranks):
        start = min(rank * size, shape[dim])
        starts, lengths = [0] * len(shape), list(shape)
        starts[dim], lengths[dim] = start, min(size, shape[dim] - start)
        regions.append(Region(tuple(starts), tuple(lengths)))
    return regions


def layouts_of(shards: Shards) -> dict[str, Layout]:
    """Return the layouts of shards, without their memory."""
    return {name: (one.shape, one.regions, one.position, one.group) for name, one in shards.items()}


def mesh_groups(shards: Shards) -> list[dist.ProcessGroup]:
    """Return the groups among which tensors are sharded, in order of first use, which is the same on all their ranks."""
    groups: list[dist.ProcessGroup] = []
    for one in shards.values():
        if one.group is not None and one.group not in groups:
            groups.append(one.group)
    return groups


__all__ = [
    "CachedShards",
    "Layout",
    "LocalShard",
    "ShardFinder",
    "Shards",
    "layouts_of",
    "mesh_groups",
    "shard_regions",
]
