"""The items of a source: tensors in memory, DTensors, and lazy tensors that are computed when they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeGuard

import torch
from torch.distributed.tensor import DTensor

from tpcolocate.in_server.tpcolocate_receiver.regions import Region


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


class Ingredients(Protocol):
    """What computed tensors need of other ranks: one object for all tensors of a source."""

    def gather(self) -> None:
        """Fetch it.  Collective: over the meshes of the source, once in a sync, before anything is computed."""

    def forget(self) -> None:
        """Drop it."""


@dataclass(frozen=True, eq=False, slots=True)
class Recipe:
    """How to compute any region of a lazy tensor from the same region of a tensor in memory.

    Attributes:
        base: The tensor in memory; the lazy tensor is sharded as it is.
        compute: (A region of `base`, as a view of this rank's shard; which region) -> that region of the lazy tensor.  Local.
        ingredients: What has to be gathered before; None: nothing.
    """

    base: torch.Tensor
    compute: Callable[[torch.Tensor, Region], torch.Tensor]
    ingredients: Ingredients | None = None


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


Item = torch.Tensor | LazyTensor
Items = list[tuple[str, Item]]


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
            return item.to(item.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
        return item.full_tensor()


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
    if isinstance(a, LazyTensor) or isinstance(b, LazyTensor) or isinstance(a, DTensor) != isinstance(b, DTensor):
        return False
    if isinstance(a, DTensor) and isinstance(b, DTensor):
        if a.device_mesh != b.device_mesh or a.placements != b.placements:
            return False
    one, other = local_of(a).detach(), local_of(b).detach()
    if have_same_memory(a, b):
        return True
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def full_bytes(item: Item) -> int:
    """Return the size of the full tensor, in bytes."""
    return item.shape.numel() * item.dtype.itemsize


def reading_bytes(item: Item) -> int:
    """Return the memory that `full_tensor` takes on this rank until its result is dropped, in bytes."""
    if isinstance(item, LazyTensor):
        return item.extra_bytes + full_bytes(item)
    return full_bytes(item) if isinstance(item, DTensor) else 0


class SharedGather:
    """Parts of one tensor that is gathered once for all of them.

    The full tensor is kept from the first part that is read until the last: read its parts next to each other.

    Args:
        item: The tensor.
    """

    def __init__(self, item: Item) -> None:
        self._item = item
        self._num_parts = 0
        self._unread: set[int] = set()
        self._full: torch.Tensor | None = None

    def part(self, size: torch.Size, stride: tuple[int, ...], offset: int) -> Item:
        """Return a view of a plain tensor, a lazy tensor of any other.

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
            shape=size,
            dtype=item.dtype,
            device=item.device,
            make=lambda: self._read(number).as_strided(size, stride, offset),
            is_collective=is_collective(item),
            # The part itself is a view.
            extra_bytes=max(0, reading_bytes(item) - size.numel() * item.dtype.itemsize),
        )

    def _read(self, number: int) -> torch.Tensor:
        if self._full is None or number not in self._unread:
            self._full = full_tensor(self._item).contiguous()
            self._unread = set(range(self._num_parts))
        full = self._full
        self._unread.discard(number)
        if not self._unread:
            self._full = None
        return full


__all__ = [
    "Ingredients",
    "Item",
    "Items",
    "LazyTensor",
    "PartOf",
    "Recipe",
    "SharedGather",
    "full_bytes",
    "full_tensor",
    "have_same_memory",
    "have_same_values",
    "is_collective",
    "is_plain_tensor",
    "local_of",
    "reading_bytes",
    "storage_id",
]
