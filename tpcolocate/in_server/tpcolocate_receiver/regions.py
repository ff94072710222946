"""Rectangular parts of tensors, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangular part of a tensor.

    Attributes:
        starts: First index in every dimension.
        lengths: Number of indices in every dimension.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def volume(self) -> int:
        volume = 1
        for length in self.lengths:
            volume *= length
        return volume

    def meet(self, other: Region) -> Region | None:
        """Return the intersection; None if it is empty."""
        starts = tuple(max(a, b) for a, b in zip(self.starts, other.starts))
        ends = (
            min(a + n, b + m) for a, n, b, m in zip(self.starts, self.lengths, other.starts, other.lengths, strict=True)
        )
        lengths = tuple(end - start for start, end in zip(starts, ends))
        return None if any(length <= 0 for length in lengths) else Region(starts, lengths)


def whole(shape: Sequence[int]) -> Region:
    """Return the region that is all of a tensor."""
    return Region((0,) * len(shape), tuple(shape))


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


def region_of(
    offset: int, shape: Sequence[int], strides: Sequence[int], full: Sequence[int]
) -> tuple[Region, tuple[int | None, ...]] | None:
    """Return the region of a contiguous tensor that a view shows, if it is one and the order of dimensions is kept.

    Args:
        offset: First element of the view, from the tensor's first.
        shape: Of the view; no dimension may be empty.
        strides: Of the view, in elements.
        full: Shape of the tensor.

    Returns:
        The region, and for each dimension of the view the dimension of the tensor that it runs along (None for those of
        length 1); None for other views (flattened, transposed, strided).
    """
    steps = strides_of(full)
    starts, lengths = [], [1] * len(full)
    for length, step in zip(full, steps):
        index, offset = (offset // step, offset % step) if length > 1 else (0, offset)
        starts.append(index)
    if offset:
        return None
    along: list[int | None] = []
    dim = 0
    for length, stride in zip(shape, strides, strict=True):
        if length == 1:
            along.append(None)
            continue
        while dim < len(full) and not (full[dim] > 1 and steps[dim] == stride):
            dim += 1
        if dim == len(full):
            return None
        lengths[dim] = length
        along.append(dim)
        dim += 1
    if any(start + length > size for start, length, size in zip(starts, lengths, full)):
        return None
    return Region(tuple(starts), tuple(lengths)), tuple(along)


def is_covered(regions: Sequence[Region], full: Sequence[int]) -> bool:
    """Return whether regions together cover a tensor.

    Counts cells of the grid that their edges span, so the result is exact however they overlap.
    """
    target = whole(full)
    if target.volume == 0:
        return True
    parts = set(regions)
    if target in parts:
        return True
    edges = [
        sorted({0, size, *(e for p in parts for e in (p.starts[d], p.starts[d] + p.lengths[d]))})
        for d, size in enumerate(full)
    ]
    number = [{edge: i for i, edge in enumerate(of_dim)} for of_dim in edges]
    cells: set[tuple[int, ...]] = set()
    for part in parts:
        ranges = [
            range(number[d][part.starts[d]], number[d][part.starts[d] + part.lengths[d]]) for d in range(len(full))
        ]
        covered: list[tuple[int, ...]] = [()]
        for indices in ranges:
            covered = [(*cell, i) for cell in covered for i in indices]
        cells.update(covered)
    total = 1
    for of_dim in edges:
        total *= len(of_dim) - 1
    return len(cells) == total
