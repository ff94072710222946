"""Slices of tensors: what each TP worker reads, cut along the shards of the training ranks.  Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from tpcolocate.in_server.tpcolocate_receiver.regions import Region, is_covered, region_of

ALIGNMENT = 16
"""Bytes; every slice in staging memory starts at a multiple."""


@dataclass(frozen=True, slots=True)
class Read:
    """One copy that a TP worker makes of a part of a tensor.

    Attributes:
        number: Of the worker's copies of this tensor.
        region: The part.
        along: For each dimension of what is written, the tensor's dimension that it runs along; None: of length 1.
        dtype: Of the parameter.
    """

    number: int
    region: Region
    along: tuple[int | None, ...]
    dtype: torch.dtype


ReadsOfRanks = tuple[tuple[Read, ...], ...]
"""TP rank -> its reads of one tensor."""


@dataclass(frozen=True)
class SliceKind:
    """What slices of tensors have in common that are read and sharded alike, such as those of all layers.

    Attributes:
        read: The copy that they are parts of.
        region: Of the tensor.
        holder: Position of the rank that has it, among the ranks that the tensor is sharded over.
    """

    read: Read
    region: Region
    holder: int

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """As the worker writes it."""
        return tuple(1 if dim is None else self.region.lengths[dim] for dim in self.read.along)

    @cached_property
    def num_bytes(self) -> int:
        return self.region.volume * self.read.dtype.itemsize

    @cached_property
    def target(self) -> tuple[list[int] | None, list[int] | None]:
        """Starts and lengths within what the worker's copy writes; None: all of it."""
        if self.region == self.read.region:
            return None, None
        starts = [
            0 if dim is None else self.region.starts[dim] - self.read.region.starts[dim] for dim in self.read.along
        ]
        return starts, list(self.shape)

    def place_in(self, region: Region, strides: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return offset and strides of such a slice in its holder's shard, in elements.

        Args:
            region: The part of the tensor that the shard is.
            strides: Of the shard.
        """
        offset = sum(
            (start - origin) * stride for start, origin, stride in zip(self.region.starts, region.starts, strides)
        )
        return offset, tuple(1 if dim is None else strides[dim] for dim in self.read.along)


class TensorSlice(NamedTuple):
    """The part of a `Read` that one training rank has.

    Attributes:
        name: Of the tensor.
        kind: Which part.
    """

    name: str
    kind: SliceKind

    @property
    def read(self) -> Read:
        return self.kind.read

    @property
    def region(self) -> Region:
        return self.kind.region

    @property
    def holder(self) -> int:
        return self.kind.holder

    @property
    def shape(self) -> tuple[int, ...]:
        """As the worker writes it."""
        return self.kind.shape

    @property
    def num_bytes(self) -> int:
        return self.kind.num_bytes

    def view(self, local: torch.Tensor, region: Region) -> torch.Tensor:
        """Return this slice as a view of its holder's memory.

        Args:
            local: The holder's shard.
            region: The part of the tensor that `local` is.
        """
        offset, strides = self.kind.place_in(region, local.stride())
        return torch.as_strided(local, self.shape, strides, int(local.storage_offset()) + offset)


def reads_of(traced: Sequence[Sequence[Any]], shape: Sequence[int]) -> tuple[Read, ...] | None:
    """Return what one TP worker reads of a tensor; None if one of its copies does not read a rectangular part.

    Args:
        traced: From the worker, each copy's [offset, shape, strides, dtype].
        shape: Of the whole tensor.
    """
    reads = []
    for number, (offset, read_shape, strides, dtype) in enumerate(traced):
        if 0 in read_shape:
            continue
        found = region_of(offset, read_shape, strides, shape)
        if found is None:
            return None
        reads.append(Read(number, found[0], found[1], getattr(torch, dtype)))
    return tuple(reads)


def is_read_whole(reads: ReadsOfRanks, shape: Sequence[int]) -> bool:
    """Return whether the TP ranks together read every element."""
    return is_covered([read.region for of_rank in reads for read in of_rank], shape)


class SliceCutter:
    """Cuts what TP ranks read along the shard regions of the ranks that have it.

    The layers of a model share the objects that say what is read of a tensor and how it is sharded, so tens of thousands
    of slices are of a few hundred kinds, which are found by these objects' identity.
    """

    def __init__(self) -> None:
        # With what the ids stand for, so that no other objects get them.
        self._kinds: dict[tuple[int, int, int], tuple[object, object, tuple[SliceKind, ...]]] = {}

    def cut(self, reads: Sequence[Read], region: Region, holder: int) -> tuple[SliceKind, ...]:
        """Return what one rank has of a TP rank's reads of a tensor.

        Args:
            reads: Of the TP rank.
            region: The shard region of the rank.
            holder: Its position among the ranks that the tensor is sharded over.
        """
        key = id(reads), id(region), holder
        found = self._kinds.get(key)
        if found is None:
            kinds = tuple(
                SliceKind(read, part, holder) for read in reads if (part := read.region.meet(region)) is not None
            )
            found = self._kinds[key] = reads, region, kinds
        return found[2]


def slices_of(name: str, reads: Sequence[Read], regions: Sequence[Region]) -> list[TensorSlice]:
    """Cut a TP rank's reads of one tensor along the shard regions of the ranks that have it.

    Args:
        name: Of the tensor.
        reads: Of the TP rank.
        regions: Of the ranks, in the order of their positions.
    """
    return [
        TensorSlice(name, SliceKind(read, part, holder))
        for read in reads
        for holder, region in enumerate(regions)
        if (part := read.region.meet(region)) is not None
    ]


def within(slices: Sequence[TensorSlice], region: Region | None) -> list[TensorSlice]:
    """Return the parts of slices that lie in a region; all of them if it is None."""
    if region is None:
        return list(slices)
    return [
        TensorSlice(name, SliceKind(kind.read, part, kind.holder))
        for name, kind in slices
        if (part := kind.region.meet(region)) is not None
    ]


@dataclass(frozen=True, slots=True)
class Block:
    """Slices that one worker reads of one rank's memory, and how their checksums are added up.

    Every slice has a weight of its own in its sum, so that the sum also notices slices that trade places.

    Attributes:
        slices: In order.
        sums: Number of the sum that each slice's checksum is added to.
        weights: What each slice's checksum is multiplied by; odd.
        labels: Of the sums, for errors.
        num_bytes: As the worker writes them.
    """

    slices: Sequence[TensorSlice]
    sums: Sequence[int]
    weights: Sequence[int]
    labels: Sequence[str]
    num_bytes: int


def block_of(slices: Sequence[TensorSlice]) -> Block:
    """Give the slices of each tensor, and of all experts of a layer, one sum."""
    numbers: dict[str, int] = {}
    counts: list[int] = []
    sums, weights = [], []
    num_bytes = 0
    for name, kind in slices:
        number = numbers.setdefault(label_of(name), len(counts))
        if number == len(counts):
            counts.append(0)
        sums.append(number)
        weights.append(2 * counts[number] + 1)
        counts[number] += 1
        num_bytes += kind.num_bytes
    return Block(slices, sums, weights, list(numbers), num_bytes)


_EXPERT = re.compile(r"((?:(?!\d+\.)[^.]*\.)*\d+\.(?:(?!\d+\.)[^.]*\.)*)\d+(?=\.|$)")
"""A name up to its second segment that is a number."""


@lru_cache(maxsize=1 << 16)  # the same names at every sync
def label_of(name: str) -> str:
    """Return a tensor's name without the number of its expert: the second number, behind that of the layer."""
    found = _EXPERT.match(name)
    return name if found is None else f"{found[1]}*{name[found.end() :]}"


def place(slices: Sequence[TensorSlice], first: int = 0) -> tuple[list[int], int]:
    """Lay slices out one behind the other: return the first byte of each, and where the last one ends."""
    starts = []
    for one in slices:
        starts.append(first)
        first += -(-one.num_bytes // ALIGNMENT) * ALIGNMENT
    return starts, first


def cut(names: Sequence[str], costs: Mapping[str, int], limit: int) -> list[list[str]]:
    """Cut names into stages, in order, each of at most `limit` bytes; what costs more gets a stage of its own."""
    stages: list[list[str]] = []
    used = 0
    for name in names:
        if not stages or used + costs[name] > limit:
            stages.append([])
            used = 0
        stages[-1].append(name)
        used += costs[name]
    return stages


__all__ = [
    "ALIGNMENT",
    "Block",
    "Read",
    "ReadsOfRanks",
    "SliceCutter",
    "SliceKind",
    "TensorSlice",
    "block_of",
    "cut",
    "is_read_whole",
    "label_of",
    "place",
    "reads_of",
    "slices_of",
    "within",
]
