"""What a name of a source stands for: a tensor that is there, or one that is made when it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, eq=False, slots=True)
class LazyTensor:
    """A tensor that no parameter holds: it is computed from the trainer's, each time that it is read.

    Shape and dtype are known before, so that it can be checked, compared and planned for like any other.

    Attributes:
        shape: Full shape.
        dtype: Of what `make` returns.
        device: Of the tensor that it is computed from; what FSDP2 has offloaded is gathered elsewhere.
        make: Computes it.  If `is_collective`, every rank calls it for the same tensors in the same order.
        is_collective: Whether `make` gathers.
        extra_bytes: Memory that `make` takes beside its result, in bytes.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    make: Callable[[], torch.Tensor] = field(repr=False)
    is_collective: bool
    extra_bytes: int

    def materialize(self) -> torch.Tensor:
        """The tensor; not to be written to, since others may share its memory.

        Collective: over the meshes of what it is computed from, if `is_collective`.
        """
        with torch.no_grad():
            made = self.make()
        assert made.shape == self.shape and made.dtype == self.dtype, f"{made.shape} {made.dtype}, promised {self}"
        return made


Item = torch.Tensor | LazyTensor
Items = list[tuple[str, Item]]


def full_tensor(item: Item) -> torch.Tensor:
    """The whole tensor, detached: the one way to read an item.

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


def is_collective(item: Item) -> bool:
    """Whether all ranks must read it together."""
    return item.is_collective if isinstance(item, LazyTensor) else isinstance(item, DTensor)


def local_of(item: torch.Tensor) -> torch.Tensor:
    """What lies here of a tensor."""
    # to_local() builds an autograd node, for every tensor at every sync.
    return item._local_tensor if isinstance(item, DTensor) else item


def full_bytes(item: Item) -> int:
    """Size of the whole tensor."""
    return item.shape.numel() * item.dtype.itemsize


def reading_bytes(item: Item) -> int:
    """Memory that `full_tensor` takes on this rank until its result is dropped."""
    if isinstance(item, LazyTensor):
        return item.extra_bytes + full_bytes(item)
    return full_bytes(item) if isinstance(item, DTensor) else 0


class SharedGather:
    """A tensor that several items are parts of; it is gathered once for all of them, not once for each.

    It is kept from the first part that is read until the last one: parts of one whole belong next to each other.

    Args:
        item: The tensor.
    """

    def __init__(self, item: Item) -> None:
        self._item = item
        lies = isinstance(item, torch.Tensor) and not isinstance(item, DTensor)
        self._live = item.detach() if lies else None  # type: ignore[union-attr]
        self._num_parts = 0
        self._unread: set[int] = set()
        self._full: torch.Tensor | None = None

    def part(self, size: torch.Size, stride: tuple[int, ...], offset: int) -> Item:
        """A view of the whole; of live memory if that is where the whole is.

        Args:
            size: Of the part.
            stride: In elements, within the whole tensor: contiguous, unless it is a plain tensor that is not.
            offset: In elements, from the whole tensor's first.
        """
        if self._live is not None:
            return self._live.as_strided(size, stride, self._live.storage_offset() + offset)
        item = self._item
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
    "LazyTensor",
    "Item",
    "Items",
    "SharedGather",
    "full_bytes",
    "full_tensor",
    "is_collective",
    "local_of",
    "reading_bytes",
]
