"""What every rank has to move so that each TP worker gets the parts that it reads, and nothing else.  Pure.

Once a worker's loader has been watched (`tpcolocate_receiver.plans`), it is known which part of which tensor each TP
rank copies.  From that and from where the parts lie among the training ranks follows the rest: a part that lies in
memory which the worker maps is read there; a part of this rank's that it does not map is staged; a part of another
rank's is sent to this one's staging memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tpcolocate.in_server.tpcolocate_receiver.regions import Region, is_covered, region_of, whole

ALIGNMENT = 16
"""Bytes; every part in staging memory starts at a multiple."""


@dataclass(frozen=True, slots=True)
class Read:
    """One copy that a TP worker makes of a part of a tensor.

    Attributes:
        number: Which of the worker's copies of this tensor.
        box: The part.
        along: For each dimension of what is written, the tensor's dimension that it runs along; None: of length 1.
        dtype: Of the parameter.
    """

    number: int
    box: Region
    along: tuple[int | None, ...]
    dtype: torch.dtype


ReadsOfRanks = tuple[tuple[Read, ...], ...]
"""TP rank -> its reads of one tensor."""


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """What one training rank holds of a `Read`.

    Attributes:
        name: Of the tensor.
        read: The copy it is a part of.
        part: Of the tensor.
        holder: Position, among the ranks that hold shards of the tensor, of the one that holds this.
    """

    name: str
    read: Read
    part: Region
    holder: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As the worker writes it."""
        return tuple(1 if dim is None else self.part.lengths[dim] for dim in self.read.along)

    @property
    def num_bytes(self) -> int:
        return self.part.volume * self.read.dtype.itemsize

    def target(self) -> tuple[list[int] | None, list[int] | None]:
        """Starts and lengths of the part of what the copy writes; None: all of it."""
        if self.part == self.read.box:
            return None, None
        starts = [0 if dim is None else self.part.starts[dim] - self.read.box.starts[dim] for dim in self.read.along]
        return starts, list(self.shape)

    def view(self, local: torch.Tensor, slab: Region) -> torch.Tensor:
        """This piece in its holder's memory.

        Args:
            local: The holder's shard.
            slab: Which part of the tensor that is.
        """
        offset = local.storage_offset() + sum(
            (start - origin) * stride for start, origin, stride in zip(self.part.starts, slab.starts, local.stride())
        )
        strides = tuple(1 if dim is None else local.stride(dim) for dim in self.read.along)
        return torch.as_strided(local, self.shape, strides, offset)


def reads_of(described: Sequence[Sequence[Any]], full: Sequence[int]) -> tuple[Read, ...] | None:
    """What one TP worker reads of a tensor; None if one of its copies does not read a rectangular part.

    Args:
        described: From the worker, each copy's [offset, shape, strides, dtype].
        full: The tensor's shape.
    """
    found = []
    for number, (offset, shape, strides, dtype) in enumerate(described):
        if 0 in shape:
            continue
        at = region_of(offset, shape, strides, full)
        if at is None:
            return None
        found.append(Read(number, at[0], at[1], getattr(torch, dtype)))
    return tuple(found)


def is_read_whole(reads: ReadsOfRanks, full: Sequence[int]) -> bool:
    """Whether the TP ranks together read every element."""
    return is_covered([read.box for of_rank in reads for read in of_rank], full)


def shards(full: Sequence[int], dim: int, num_ranks: int) -> list[Region]:
    """How ``Shard(dim)`` cuts a tensor: as `torch.chunk`, the last ranks may hold less or nothing."""
    size = -(-full[dim] // num_ranks)
    found = []
    for rank in range(num_ranks):
        start = min(rank * size, full[dim])
        starts, lengths = [0] * len(full), list(full)
        starts[dim], lengths[dim] = start, min(size, full[dim] - start)
        found.append(Region(tuple(starts), tuple(lengths)))
    return found


def slices_of(name: str, reads: Sequence[Read], slabs: Sequence[Region]) -> list[TensorSlice]:
    """Cut a TP rank's reads of one tensor along the shards of the ranks that hold it."""
    return [
        TensorSlice(name, read, part, holder)
        for read in reads
        for holder, slab in enumerate(slabs)
        if (part := read.box.meet(slab)) is not None
    ]


def place(pieces: Sequence[TensorSlice], first: int = 0) -> tuple[list[int], int]:
    """Where pieces lie behind one another in staging memory: first byte of each, and where they end."""
    starts = []
    for piece in pieces:
        starts.append(first)
        first += -(-piece.num_bytes // ALIGNMENT) * ALIGNMENT
    return starts, first


def cut(names: Sequence[str], costs: Mapping[str, int], room: int) -> list[list[str]]:
    """Names into steps, in order, each of at most `room` bytes; what costs more travels by itself."""
    steps: list[list[str]] = []
    used = 0
    for name in names:
        if not steps or used + costs[name] > room:
            steps.append([])
            used = 0
        steps[-1].append(name)
        used += costs[name]
    return steps


__all__ = [
    "ALIGNMENT", "Region", "TensorSlice", "Read", "ReadsOfRanks", "cut", "is_read_whole", "slices_of", "place", "reads_of", "shards", "whole",
]  # fmt: skip
