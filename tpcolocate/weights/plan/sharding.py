"""How tensors are spread over the training ranks: whole, or sharded along one axis of a mesh or several."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from tpcolocate.garbage import collector_paused
from tpcolocate.in_server.tpcolocate_receiver.regions import Region, whole
from tpcolocate.weights.sources.lazy_tensor import Ingredients, Item, Items, LazyTensor, PartOf, Recipe, View, local_of


class Compute(Protocol):
    """Computes what a tensor holds in a region of this rank's shard."""

    def __call__(self, region: Region, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return it, contiguous and in memory of its own.

        Args:
            region: Of the tensor, within this rank's shard, not empty.
            out: To write into and return: contiguous, of the region's shape, with dtype and device of the shard's `local`.
        """


@dataclass(frozen=True, slots=True)
class LocalShard:
    """The part of one tensor that lies on this rank.

    Attributes:
        shape: Of the whole tensor.
        local: The memory of this rank's shard, detached; of a computed tensor empty, of its dtype, where it is computed.
        regions: The shard region of each rank of `group`.
        position: This rank's position in `group`.
        group: The ranks among which the tensor is sharded; None if this rank has all of it.
        compute: Computes what the tensor holds; None: `local` holds it.
        ingredients: What has to be gathered before anything is computed.
    """

    shape: tuple[int, ...]
    local: torch.Tensor
    regions: tuple[Region, ...]
    position: int = 0
    group: dist.ProcessGroup | None = None
    compute: Compute | None = None
    ingredients: Ingredients | None = None

    @property
    def region(self) -> Region:
        """The part of the tensor that `local` is."""
        return self.regions[self.position]


Shards = Mapping[str, LocalShard]
"""Tensor -> this rank's shard, in the order of the sync; the same names on every rank."""

Layout = tuple[tuple[int, ...], tuple[Region, ...], int, dist.ProcessGroup | None, View | None]
"""A `LocalShard` without its memory: shape, regions, position, group, and which view of its storage it is."""


class CachedShards(Mapping[str, LocalShard]):
    """Shards of tensors that are laid out as in the last sync; each is looked up only when it is needed.

    Args:
        tensor_of: Name -> the tensor that it is, or is a part of, as it is now; in the storage of the last sync.
        layouts: Name -> layout in the last sync.
        computed: Name -> its shard, of those that are computed.
    """

    def __init__(
        self,
        tensor_of: Callable[[str], torch.Tensor],
        layouts: Mapping[str, Layout],
        computed: Callable[[str], LocalShard],
    ) -> None:
        self._tensor_of = tensor_of
        self._layouts = layouts
        self._computed = functools.cache(computed)  # asked for several times in a sync

    def __getitem__(self, name: str) -> LocalShard:
        shape, regions, position, group, view = self._layouts[name]
        if view is None:
            return self._computed(name)
        local = local_of(self._tensor_of(name)).detach().as_strided(*view)
        return LocalShard(shape, local, regions, position, group)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)


_MeshLayout = tuple[tuple[Region, ...], int, dist.ProcessGroup | None]
"""Regions, position, group."""


@dataclass(frozen=True, slots=True)
class _PartLayout:
    """How a part lies on this rank, wherever its base lies.

    Attributes:
        regions: Of the part, for each rank of the group.
        offset: Of its first element here, from the first of the base's shard.
        dims: For each dimension of the part, that of the base; None: of length 1.
    """

    regions: tuple[Region, ...]
    offset: tuple[int, ...]
    dims: tuple[int | None, ...]


class ShardFinder:
    """Finds the local shards of tensors.  Cheap enough to be asked for every tensor at every sync: layouts are cached."""

    def __init__(self) -> None:
        self._cache: dict[object, _MeshLayout | None] = {}
        self._parts: dict[object, _PartLayout] = {}
        # Tensors that are alike share their regions, by which the plan knows that they are.
        self._wholes: dict[tuple[int, ...], tuple[Region]] = {}

    def find_all(self, items: Items) -> dict[str, LocalShard]:
        """Return this rank's shards of all items that have one; see `find`."""
        with collector_paused():
            return self._find_all(items)

    def _find_all(self, items: Items) -> dict[str, LocalShard]:
        bases: dict[int, LocalShard | None] = {}
        found: dict[str, LocalShard] = {}
        # By identity, which is good for as long as the items are there.
        layouts: dict[object, _PartLayout] = {}
        for name, item in items:
            part = item.part if isinstance(item, LazyTensor) else None
            if part is None:
                shard = self.find(item)
            else:
                # A tensor has hundreds of parts, one after the other.
                if id(part.base) not in bases:
                    bases[id(part.base)] = self.find(part.base)
                base = bases[id(part.base)]
                shard = None
                if base is not None:
                    key = id(base.regions), base.position, id(part.region), part.along
                    if key not in layouts:
                        layouts[key] = self._part_layout(base, part)
                    shard = _part(base, part, layouts[key], tuple(item.shape))
            if shard is not None:
                found[name] = shard
        return found

    def find(self, tensor: Item) -> LocalShard | None:
        """Return this rank's shard; None for what only `full_tensor` can gather or compute.

        Supported are plain tensors; DTensors that are sharded once and otherwise replicated (FSDP2, HSDP, DTensor tensor
        parallelism), or several times over all ranks of the job (FSDP2 with tensor parallelism); rectangular parts of
        these; and what is computed from them region by region.
        """
        if isinstance(tensor, LazyTensor):
            if tensor.part is not None:
                base = self.find(tensor.part.base)
                if base is None:
                    return None
                return _part(base, tensor.part, self._part_layout(base, tensor.part), tuple(tensor.shape))
            if tensor.recipe is not None:
                base = self.find(tensor.recipe.base)
                return None if base is None else _computed(base, tensor, tensor.recipe)
            return None
        shape = tuple(tensor.shape)
        if not isinstance(tensor, DTensor):
            if shape not in self._wholes:
                self._wholes[shape] = (whole(shape),)
            return LocalShard(shape, tensor.detach(), self._wholes[shape])
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

    def _part_layout(self, base: LocalShard, part: PartOf) -> _PartLayout:
        # The layers of a model are cut alike, and the regions of their parts are the same objects.
        key = (base.regions, base.position, part.region, part.along)
        layout = self._parts.get(key)
        if layout is None:
            layout = self._parts[key] = _part_layout(base, part)
        return layout


def _part(base: LocalShard, part: PartOf, layout: _PartLayout, shape: tuple[int, ...]) -> LocalShard:
    """Return the shard of a part: what of it lies in the shard of its base, or an empty view of that."""
    if base.compute is not None:
        return LocalShard(
            shape,
            base.local,
            layout.regions,
            base.position,
            base.group,
            _computed_part(base.compute, part),
            base.ingredients,
        )
    strides = base.local.stride()
    local = base.local.as_strided(
        layout.regions[base.position].lengths,
        [1 if dim is None else strides[dim] for dim in layout.dims],
        base.local.storage_offset() + sum(map(operator.mul, layout.offset, strides)),
    )
    return LocalShard(shape, local, layout.regions, base.position, base.group)


def _part_layout(base: LocalShard, part: PartOf) -> _PartLayout:
    def inside(region: Region) -> Region:
        met = region.meet(part.region)
        if met is None:
            return Region((0,) * len(part.along), (0,) * len(part.along))
        starts = (0 if dim is None else met.starts[dim] - part.region.starts[dim] for dim in part.along)
        return Region(tuple(starts), tuple(1 if dim is None else met.lengths[dim] for dim in part.along))

    regions = tuple(map(inside, base.regions))
    met = base.region.meet(part.region)
    first = base.region.starts if met is None else met.starts
    return _PartLayout(regions, tuple(at - start for at, start in zip(first, base.region.starts)), part.along)


def _computed(base: LocalShard, tensor: LazyTensor, recipe: Recipe) -> LocalShard:
    local, make, starts, strides = base.local, recipe.compute, base.region.starts, base.local.stride()
    first = local.storage_offset()

    def compute(region: Region, out: torch.Tensor | None = None) -> torch.Tensor:
        # One view; `narrow` makes one for each dimension.
        offset = sum((start - origin) * stride for start, origin, stride in zip(region.starts, starts, strides))
        view = local.as_strided(region.lengths, strides, first + offset)
        with torch.no_grad():
            return make(view, region, out)

    empty = torch.empty(0, dtype=tensor.dtype, device=local.device)
    return LocalShard(base.shape, empty, base.regions, base.position, base.group, compute, recipe.ingredients)


def _computed_part(make: Compute, part: PartOf) -> Compute:
    def compute(region: Region, out: torch.Tensor | None = None) -> torch.Tensor:
        outside = part.outside(region)
        return make(outside, None if out is None else out.view(outside.lengths)).view(region.lengths)

    return compute


def _layout_of(
    shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> tuple[tuple[Region, ...], int, dist.ProcessGroup | None] | None:
    if any(type(p) not in (Shard, Replicate, _StridedShard) for p in placements):
        return None
    if not all(_is_cut_last(mesh, placements, i) for i, p in enumerate(placements) if isinstance(p, _StridedShard)):
        return None
    sharded = [i for i, p in enumerate(placements) if not isinstance(p, Replicate)]
    if not sharded:
        return (whole(shape),), 0, None
    if len(sharded) == 1 and isinstance(placements[sharded[0]], Shard):
        axis = sharded[0]
        regions = _cut(shape, mesh, placements, [axis])
        return tuple(regions[(i,)] for i in range(mesh.size(axis))), mesh.get_local_rank(axis), mesh.get_group(axis)
    ranks = mesh.mesh.flatten().tolist()
    if len(sharded) < mesh.ndim or sorted(ranks) != list(range(dist.get_world_size())):
        return None  # there is no group of all ranks that hold a part of it once
    regions = _cut(shape, mesh, placements, sharded)
    by_rank = {int(mesh.mesh[at]): region for at, region in regions.items()}
    return tuple(by_rank[rank] for rank in sorted(by_rank)), dist.get_rank(), dist.group.WORLD


def _is_cut_last(mesh: DeviceMesh, placements: tuple[Placement, ...], axis: int) -> bool:
    """Return whether a strided shard cuts what the axes after it have cut, as FSDP2 does, so that it is a rectangle."""
    strided = placements[axis]
    assert isinstance(strided, _StridedShard)
    others = [i for i, p in enumerate(placements) if i != axis and getattr(p, "dim", None) == strided.dim]
    return all(i > axis for i in others) and math.prod(map(mesh.size, others)) == strided.split_factor


def _cut(
    shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...], axes: list[int]
) -> dict[tuple[int, ...], Region]:
    """Return the shard region of each coordinate along some axes of a mesh.

    Axes cut one after the other; strided shards (FSDP2 of a dimension that tensor parallelism has cut) come last.
    """
    found: dict[tuple[int, ...], Region] = {(): whole(shape)}
    order = sorted(axes, key=lambda axis: isinstance(placements[axis], _StridedShard))
    for axis in order:
        placement = placements[axis]
        assert isinstance(placement, (Shard, _StridedShard))
        dim = placement.dim % len(shape)
        found = {
            (*at, i): Region(
                tuple(start + more for start, more in zip(region.starts, part.starts)),
                part.lengths,
            )
            for at, region in found.items()
            for i, part in enumerate(shard_regions(region.lengths, dim, mesh.size(axis)))
        }
    places = [order.index(axis) for axis in axes]
    return {tuple(at[place] for place in places): region for at, region in found.items()}


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
    found: dict[str, Layout] = {}
    for name, one in shards.items():
        view = None
        if one.compute is None:
            view = one.local.shape, one.local.stride(), int(one.local.storage_offset())
        found[name] = one.shape, one.regions, one.position, one.group, view
    return found


def mesh_groups(shards: Shards) -> list[dist.ProcessGroup]:
    """Return the groups among which tensors are sharded, in order of first use, which is the same on all their ranks."""
    groups: list[dist.ProcessGroup] = []
    for one in shards.values():
        if one.group is not None and one.group not in groups:
            groups.append(one.group)
    return groups


__all__ = [
    "CachedShards",
    "Compute",
    "Layout",
    "LocalShard",
    "ShardFinder",
    "Shards",
    "layouts_of",
    "mesh_groups",
    "shard_regions",
]
