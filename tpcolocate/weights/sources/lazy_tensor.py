"""The items of a source: tensors in memory, DTensors, and lazy tensors that are computed when they are read."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeGuard, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from tpcolocate.in_server.tpcolocate_receiver.regions import Region, region_of, strides_of

View = tuple[torch.Size, tuple[int, ...], int]
"""A view of a tensor: size, stride and offset in elements."""


@dataclass(frozen=True, eq=False, slots=True)
class PartOf:
    """Which part of another item a lazy tensor is; then it need not be gathered to be moved.

    Attributes:
        base: The other item: sharded or computed, since a part of a plain tensor is a view.
        region: Of `base`.
        along: For each dimension of the part, the dimension of `base` that it runs along; None: of length 1.
    """

    base: Item
    region: Region
    along: tuple[int | None, ...]

    def outside(self, region: Region) -> Region:
        """Return the region of `base` that a region of the part is."""
        starts, lengths = list(self.region.starts), [1] * len(self.region.starts)
        for dim, start, length in zip(self.along, region.starts, region.lengths):
            if dim is not None:
                starts[dim] += start
                lengths[dim] = length
        return Region(tuple(starts), tuple(lengths))

    def view(self) -> View:
        """Return the part as a view of `base`, as if that were contiguous."""
        steps = strides_of(self.base.shape)
        size = torch.Size(1 if dim is None else self.region.lengths[dim] for dim in self.along)
        stride = tuple(1 if dim is None else steps[dim] for dim in self.along)
        return size, stride, sum(start * step for start, step in zip(self.region.starts, steps))


class Ingredients(Protocol):
    """What computed tensors are made of, fetched from other ranks and prepared: one object for all tensors of a source."""

    @property
    def is_collective(self) -> bool:
        """Whether `gather` is; the same on every rank."""

    @property
    def num_bytes(self) -> int:
        """The most memory that `gather` takes on this rank, in bytes; less of it is kept until `forget`."""

    def gather(self) -> None:
        """Fetch it anew.  Collective: over the meshes of the source, once in a sync, before anything is computed.

        Computed tensors are then made of the values of this time.
        """

    def together(self) -> AbstractContextManager[None]:
        """Return what lets regions that are computed into given memory wait for one another, to be computed at once.

        That memory is written when the context ends, on the current stream; if it ends by an exception, perhaps not.
        """

    def forget(self) -> None:
        """Drop it."""


class ComputeFrom(Protocol):
    """Computes a region of a lazy tensor."""

    def __call__(self, base: torch.Tensor, region: Region, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return that region of the lazy tensor, on the device of `base`, in memory of its own.  Local.

        Args:
            base: The same region of the tensor in memory, as a detached view of this rank's shard.
            region: Which one, not empty.
            out: To write into and return: contiguous, of the region's shape, the lazy tensor's dtype and the device of `base`.
                None: new memory.
        """


@dataclass(frozen=True, eq=False, slots=True)
class Recipe:
    """How to compute any region of a lazy tensor from the same region of a tensor in memory.

    A region may differ in its last bits from the same region of what `make` returns: a product of matrices may be
    summed up in another order.

    Attributes:
        base: The tensor in memory; the lazy tensor is sharded as it is.
        compute: Computes a region.
        ingredients: What has to be gathered before; None: nothing.  Where that is not collective, regions are computed
            without it too, but slower.
        extra_itemsize: Memory that `compute` takes beside its result, in bytes for each element of the region.
        inputs: All tensors that it is computed from, `base` first.
        settings: Returns what decides, beside the names and the values of a source's tensors, which weights the source
            has and how they are computed; compared by equality.  One object for all tensors of a source.  None: unknown.
            If there is one, it, `compute`, `ingredients` and the lazy tensor's `make` keep nothing of the source alive, and
            have no weak references to its tensors; see `tensor_references`.
        origin: Returns what it is computed from beside `base`, compared by equality: what is computed from the same is equal,
            as an embedding and an output layer with tied adapters.  None: unknown.  Keeps nothing alive either.
    """

    base: torch.Tensor
    compute: ComputeFrom
    ingredients: Ingredients | None = None
    extra_itemsize: int = 0
    inputs: tuple[torch.Tensor, ...] = ()
    settings: Callable[[], object] | None = None
    origin: Callable[[], object] | None = None


@dataclass(frozen=True, eq=False, slots=True)
class LazyTensor:
    """A tensor that is computed from the trainer's parameters each time it is read.

    Shape and dtype are known in advance, so it can be checked, compared and planned for like any other tensor.

    Attributes:
        shape: Full shape.
        dtype: Of what `make` returns.
        device: Of the tensor it is computed from; what FSDP2 has offloaded is gathered on another device.
        make: Computes it.  If `is_collective`, every rank calls it for the same tensors in the same order.
        is_collective: Whether `make` gathers.
        extra_bytes: Memory that `make` takes beside its result, in bytes.
        part: What it is a part of, if it is one.
        recipe: How to compute it shard by shard, if that is possible.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    make: Callable[[], torch.Tensor] = field(repr=False)
    is_collective: bool
    extra_bytes: int
    part: PartOf | None = None
    recipe: Recipe | None = None

    def materialize(self) -> torch.Tensor:
        """Compute the tensor.  It is read-only: others may share its memory.

        Collective: over the meshes of what it is computed from, if `is_collective`.
        """
        with torch.no_grad():
            made = self.make()
        assert made.shape == self.shape and made.dtype == self.dtype, f"{made.shape} {made.dtype}, expected {self}"
        return made

    def template(self) -> Callable[[Sequence[torch.Tensor]], LazyTensor] | None:
        """Return what makes this tensor again from its recipe's `inputs`, without keeping any of them alive.

        None if it has no recipe, or one without `settings`.
        """
        recipe = self.recipe
        if recipe is None or recipe.settings is None or self.part is not None:
            return None
        shape, dtype, device, make, is_collective, extra_bytes = (
            self.shape,
            self.dtype,
            self.device,
            self.make,
            self.is_collective,
            self.extra_bytes,
        )
        compute, ingredients, extra, settings, origin = (
            recipe.compute,
            recipe.ingredients,
            recipe.extra_itemsize,
            recipe.settings,
            recipe.origin,
        )

        # Not `dataclasses.replace`, which takes several times as long; there are hundreds in every sync.
        def again(inputs: Sequence[torch.Tensor]) -> LazyTensor:
            made = Recipe(inputs[0], compute, ingredients, extra, tuple(inputs), settings, origin)
            return LazyTensor(shape, dtype, device, make, is_collective, extra_bytes, recipe=made)

        return again


Item = torch.Tensor | LazyTensor
Items = Sequence[tuple[str, Item]]
"""Named items; those of a repeated sync are made when somebody asks for one."""


def full_tensor(item: Item) -> torch.Tensor:
    """Return the full tensor, detached.

    Collective: over the meshes of a DTensor, or of what a `LazyTensor` is computed from; local for any other tensor.
    """
    if isinstance(item, LazyTensor):
        return item.materialize()
    if not isinstance(item, DTensor):
        return item.detach()
    with torch.no_grad():
        if item.to_local().device.type != item.device_mesh.device_type:
            # Offloaded by FSDP2's CPUOffloadPolicy.  NCCL gathers from its own devices only.
            item = cast(DTensor, item.to(item.device_mesh.device_type))
        return _full_of_uneven(item) if _is_cut_unevenly_twice(item) else item.full_tensor()


def _is_cut_unevenly_twice(item: DTensor) -> bool:
    """Return whether FSDP2 has cut rows that tensor parallelism had cut, into shards of different lengths."""
    mesh, placements = item.device_mesh, item.placements
    for axis, placement in enumerate(placements):
        if not isinstance(placement, _StridedShard) or mesh.mesh_dim_names is None:
            continue
        same = [i for i, other in enumerate(placements) if getattr(other, "dim", None) == placement.dim]
        is_last_cut = same[0] == axis and math.prod(mesh.size(i) for i in same[1:]) == placement.split_factor
        if is_last_cut and item.shape[placement.dim] % math.prod(mesh.size(i) for i in same):
            return all(isinstance(other, (Shard, Replicate, _StridedShard)) for other in placements)
    return False


def _full_of_uneven(item: DTensor) -> torch.Tensor:
    """Undo one cut after the other, the last one first: torch 2.9's own `full_tensor` gives rows in a wrong order.

    Collective: over each axis of the mesh.
    """
    mesh, names = item.device_mesh, item.device_mesh.mesh_dim_names
    assert names is not None
    cuts = [(axis, p.dim) for axis, p in enumerate(item.placements) if isinstance(p, (Shard, _StridedShard))]
    cuts.sort(key=lambda cut: isinstance(item.placements[cut[0]], _StridedShard))  # which come last
    lengths = [list(item.shape)]
    for axis, dim in cuts:
        size, total = mesh.size(axis), lengths[-1][dim]
        longest = -(-total // size)  # as torch.chunk cuts
        start = min(mesh.get_local_rank(axis) * longest, total)
        lengths.append([*lengths[-1]])
        lengths[-1][dim] = min(longest, total - start)
    tensor = item.to_local()
    for (axis, dim), whole in zip(reversed(cuts), reversed(lengths[:-1])):
        shape = torch.Size(whole)
        one_axis = mesh[names[axis]]
        tensor = DTensor.from_local(tensor, one_axis, [Shard(dim)], shape=shape, stride=strides_of(shape)).full_tensor()
    return tensor


ShapesOfShards = dict[object, tuple[int, ...] | None]
"""What `shape_of_shard` has returned, by mesh, placements and shape; it asks torch for this rank's place, which is slow."""


def shape_of_shard(item: DTensor, known: ShapesOfShards | None = None) -> tuple[int, ...] | None:
    """Return the shape that this rank's shard has if it is cut as torch cuts; None if that is not known here.

    What torch gathers is of no use if it has another one, and the ranks may wait for each other.

    Args:
        item: The tensor.
        known: Of other tensors; added to.
    """
    key = item.device_mesh, item.placements, item.shape
    known = {} if known is None else known
    if key not in known:
        known[key] = _shape_of_shard(*key)
    return known[key]


def _shape_of_shard(mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> tuple[int, ...] | None:
    lengths = list(shape)
    if mesh.get_coordinate() is None:
        return None
    for axis, placement in enumerate(placements):
        if type(placement) is Shard:
            longest = -(-lengths[placement.dim] // mesh.size(axis))
            # Not the coordinate, which is another one where a mesh of all ranks has them in another order.
            start = mesh.get_local_rank(axis) * longest
            lengths[placement.dim] = max(0, min(longest, lengths[placement.dim] - start))
        elif type(placement) is not Replicate:
            return None
    return tuple(lengths)


def is_plain_tensor(item: Item) -> TypeGuard[torch.Tensor]:
    """Return whether the item is a full tensor in this process's memory, neither sharded nor lazy."""
    return isinstance(item, torch.Tensor) and not isinstance(item, DTensor)


def is_collective(item: Item) -> bool:
    """Return whether all ranks must read the item together."""
    return item.is_collective if isinstance(item, LazyTensor) else isinstance(item, DTensor)


def local_of(item: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a DTensor, or the tensor itself."""
    # to_local() builds an autograd node, for every tensor at every sync.
    return item._local_tensor if isinstance(item, DTensor) else item


def storage_id(item: torch.Tensor) -> int:
    """Return what identifies the storage of a tensor, or of its local shard, while that is alive.

    Unlike an address it also tells apart tensors without data: empty shards, and tensors on the meta device.
    """
    return local_of(item).untyped_storage()._cdata


def have_same_memory(a: Item, b: Item) -> bool:
    """Return whether two items are views of the same elements of one memory."""
    if isinstance(a, LazyTensor) or isinstance(b, LazyTensor):
        return a is b
    one, other = local_of(a), local_of(b)
    address = (one.data_ptr(), one.dtype, one.shape, one.stride())
    return storage_id(a) == storage_id(b) and address == (
        other.data_ptr(),
        other.dtype,
        other.shape,
        other.stride(),
    )


def have_same_values(a: Item, b: Item) -> bool:
    """Return whether two items are equal as far as this rank has them; False where that cannot be seen without a gather.

    Waits for the device.
    """
    if isinstance(a, LazyTensor) and isinstance(b, LazyTensor):
        return a is b or _are_computed_alike(a, b)
    if isinstance(a, LazyTensor) or isinstance(b, LazyTensor) or isinstance(a, DTensor) != isinstance(b, DTensor):
        return False
    if isinstance(a, DTensor) and isinstance(b, DTensor):
        if a.device_mesh != b.device_mesh or a.placements != b.placements:
            return False
    one, other = local_of(a).detach(), local_of(b).detach()
    if have_same_memory(a, b):
        return True
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def _are_computed_alike(a: LazyTensor, b: LazyTensor) -> bool:
    if a.recipe is None or b.recipe is None or a.recipe.origin is None or b.recipe.origin is None:
        return False
    return have_same_memory(a.recipe.base, b.recipe.base) and a.recipe.origin() == b.recipe.origin()


def full_bytes(item: Item) -> int:
    """Return the size of the full tensor, in bytes."""
    return item.shape.numel() * item.dtype.itemsize


def reading_bytes(item: Item) -> int:
    """Return the memory that `full_tensor` takes on this rank until its result is dropped, in bytes."""
    if isinstance(item, LazyTensor):
        return item.extra_bytes + full_bytes(item)
    return full_bytes(item) if isinstance(item, DTensor) else 0


class SharedGather:
    """Parts of one tensor.  Where they have to be gathered, that is done once for all of them.

    The full tensor is kept from the first part that is read until the last: read its parts next to each other.

    Args:
        item: The tensor.
    """

    def __init__(self, item: Item) -> None:
        self._item = item
        self._is_collective = is_collective(item)
        self._reading_bytes = reading_bytes(item)
        self._num_parts = 0
        self._unread: set[int] = set()
        self._full: torch.Tensor | None = None

    def part(self, size: torch.Size, stride: tuple[int, ...], offset: int) -> Item:
        """Return a view of a plain tensor, a lazy tensor of any other; that knows its region if it is rectangular.

        Args:
            size: Of the part.
            stride: In elements, within the full tensor; of a plain tensor as it is, of any other as if contiguous.
            offset: In elements, from the full tensor's first.
        """
        item = self._item
        if is_plain_tensor(item):
            return item.detach().as_strided(size, stride, int(item.storage_offset()) + offset)
        number = self._num_parts
        self._num_parts += 1
        return LazyTensor(
            size,
            item.dtype,
            item.device,
            functools.partial(self._read, number, size, stride, offset),
            self._is_collective,
            # The part itself is a view.
            max(0, self._reading_bytes - size.numel() * item.dtype.itemsize),
            _part_of(item, size, stride, offset),
        )

    def _read(self, number: int, size: torch.Size, stride: tuple[int, ...], offset: int) -> torch.Tensor:
        if self._full is None or number not in self._unread:
            self._full = full_tensor(self._item).contiguous()
            self._unread = set(range(self._num_parts))
        full = self._full
        self._unread.discard(number)
        if not self._unread:
            self._full = None
        return full.as_strided(size, stride, offset)


def _part_of(item: Item, size: torch.Size, stride: tuple[int, ...], offset: int) -> PartOf | None:
    """Return which part a view is; of a part, which part of that one's base."""
    # A scalar has no dimension in which the shard of a rank could be empty.
    found = _region_of(offset, size, stride, item.shape) if size.numel() and size else None
    if found is None:
        return None
    region, along = found
    if not (isinstance(item, LazyTensor) and item.part is not None):
        return PartOf(item, region, along)
    inner = item.part
    return PartOf(inner.base, inner.outside(region), tuple(None if dim is None else inner.along[dim] for dim in along))


# The layers of a model have the same parts; that they also share the regions makes them cheap to look up.
_region_of = functools.lru_cache(maxsize=1 << 12)(region_of)


__all__ = [
    "ComputeFrom",
    "Ingredients",
    "Item",
    "Items",
    "LazyTensor",
    "PartOf",
    "Recipe",
    "ShapesOfShards",
    "SharedGather",
    "View",
    "full_bytes",
    "full_tensor",
    "have_same_memory",
    "have_same_values",
    "is_collective",
    "is_plain_tensor",
    "local_of",
    "reading_bytes",
    "shape_of_shard",
    "storage_id",
]
