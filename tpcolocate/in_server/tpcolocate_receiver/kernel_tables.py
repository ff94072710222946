"""Tables of what the kernels copy and sum up: rows of parts, and tiles of them for their programs.

A slice of a tensor has a layout, and two addresses.  Of thousands of slices (the experts of a model) most have one of a few
layouts, so that what follows from it is found once, and the rest is computed for all slices together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .regions import strides_of

# Slices of more parts than this are left to torch.
_MOST_PARTS = 1024
_MOST_UNITS = 2**31 - 1
_ALIGNMENT = 16

TILE = 8192
"""Words that one program of a kernel copies, in whole rows where they are shorter; twice as many elements that it casts."""
BLOCKS = (256, 1024, 4096)
"""Words of a row that are copied at once, together with as many rows as fill the largest block; for casts see `TILE`."""
PART_FIELDS = 12
TILE_FIELDS = 3
SUM, COPY, COPY_AND_FLAG = 0, 1, 2
"""What a kernel does; see `triton_kernel.launch`."""
ORDER = "interleaved"
"""See `ordered`."""

Cast = tuple[torch.dtype, torch.dtype]
"""Dtypes of source and target."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CASTS: tuple[Cast, ...] = tuple((a, b) for a in _FLOATS for b in _FLOATS if a != b)
"""All that the kernels can do."""
# The elements of a cast that fill 16 bytes of the narrower dtype.
_CAST_MULTIPLE = 8


class Layout(NamedTuple):
    """How a slice lies in memory at both ends; strides in elements.

    Attributes:
        shape: Of the slice.
        source_strides: Where it is read.
        target_strides: Where it is written.
        source: Dtype.
        target: Dtype.
    """

    shape: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]
    source: torch.dtype
    target: torch.dtype

    @property
    def cast(self) -> Cast | None:
        """The cast that it takes; None if both dtypes are the same."""
        return None if self.source == self.target else (self.source, self.target)

    @classmethod
    def to_sum(cls, shape: Sequence[int], strides: Sequence[int], source: torch.dtype, target: torch.dtype) -> Layout:
        """Return the layout of what is summed up as it would be in `target`, and written nowhere."""
        return cls(tuple(shape), tuple(strides), strides_of(shape), source, target)


class Variant(NamedTuple):
    """One form of a kernel, with its sizes in words, or in elements where it casts.

    Attributes:
        block: One of the widths of `BLOCKS`.
        block_rows: Rows that are copied at once.
        tile: What one program copies.
        cast: Dtypes of source and target; None: words are copied.
    """

    block: int
    block_rows: int
    tile: int
    cast: Cast | None


class Slices:
    """Slices in columns, in order; their addresses are in bytes.

    Attributes:
        layouts: All that occur.
        layout_of: Slice -> index in `layouts`.
        sources: Where each is read: an address, or the first byte in its region.
        targets: Address where each is written; 0 for what is only summed up.
        slots: Element of the sums that each is added to.
        weights: What its sum is multiplied with.
        regions: Names of the regions; empty where sources are addresses.
    """

    def __init__(self) -> None:
        self.layouts: list[Layout] = []
        self.layout_of: list[int] = []
        self.sources: list[int] = []
        self.targets: list[int] = []
        self.slots: list[int] = []
        self.weights: list[int] = []
        self.regions: list[str] = []
        self._index: dict[Layout, int] = {}

    def __len__(self) -> int:
        return len(self.sources)

    def add(
        self, layout: Layout, source: int, target: int = 0, *, slot: int, weight: int = 1, region: str | None = None
    ) -> None:
        """Append a slice."""
        index = self._index.get(layout)
        if index is None:
            index = self._index[layout] = len(self.layouts)
            self.layouts.append(layout)
        self.layout_of.append(index)
        self.sources.append(source)
        self.targets.append(target)
        self.slots.append(slot)
        self.weights.append(weight)
        if region is not None:
            self.regions.append(region)

    @property
    def casts(self) -> frozenset[Cast]:
        """The casts that kernels could do."""
        return frozenset(layout.cast for layout in self.layouts if layout.cast in CASTS and layout.cast is not None)


class CopyTable:
    """Copies in the form that the kernels read.

    Args:
        slices: With regions; at least one.
        regions: What is mapped, by name.
        device: To run on.
        casts: That the kernels may do.
        order: See `ordered`; the holder of a region is its name in front of the first ``/``.
        first_flag: Element of the sums that becomes 1 if a target of the first slot holds a NaN or an infinite number; the
            flags of the other slots follow.  None: there are no flags.

    Attributes:
        rest: Numbers of the slices that the kernels cannot copy, in order.
    """

    def __init__(
        self,
        slices: Slices,
        regions: Mapping[str, torch.Tensor],
        device: torch.device,
        *,
        casts: frozenset[Cast] = frozenset(),
        order: str = ORDER,
        first_flag: int | None = None,
    ) -> None:
        import numpy

        self._device = device
        names = list(dict.fromkeys(slices.regions))
        index = {name: i for i, name in enumerate(names)}
        region_of = numpy.array([index[name] for name in slices.regions], dtype=numpy.int64)
        starts = _starts(regions, names)
        parts, self.rest = _parts_of(slices, starts[region_of], casts)
        self._region_of = region_of[parts.slice_of]
        self._rows = parts.rows
        """Rows of the kernels' table; their sources count from the start of their region."""
        if first_flag is not None:
            self._rows[:, 11] = self._rows[:, 7] + first_flag
        self._sizes = {names[i]: regions[names[i]].numel() for i in numpy.unique(self._region_of)}
        self._names = names
        holders = list(dict.fromkeys(_holder(name) for name in names))
        holder_of = numpy.array([holders.index(_holder(name)) for name in names], dtype=numpy.int64)[self._region_of]
        self._tiles = {
            variant: _on(tiles[ordered(holder_of[tiles[:, 0]], order)], device)
            for variant, tiles in _tiles_of(parts).items()
        }
        self._parts: torch.Tensor
        self._point_to(starts)

    def rebase(self, regions: Mapping[str, torch.Tensor]) -> bool:
        """Point to regions that were mapped again; False, and nothing changes, if they have other sizes or alignments."""
        if any(regions[name].numel() != size for name, size in self._sizes.items()):
            return False
        return self._point_to(_starts(regions, self._names))

    def _point_to(self, starts: Any) -> bool:
        rows = self._rows.copy()
        rows[:, 0] += starts[self._region_of]
        if (rows[:, 0] % _ALIGNMENT).any():
            return False
        self._parts = _on(rows, self._device)
        return True

    def run(self, launch: Any, sums: torch.Tensor, *, flags: bool = False) -> None:
        """Queue the copies on the current stream.

        Args:
            launch: From `kernels.ready`.
            sums: int64, contiguous.  `word_sum` of what each slice's target then holds, times its weight, is added to the
                element of its slot.
            flags: Whether to set flags, too, which takes more registers and no more memory.
        """
        more = {"copies": COPY_AND_FLAG} if flags else {}
        for variant, tiles in self._tiles.items():
            launch(self._parts, tiles, sums, variant, **more)


class ChecksumTable:
    """Memory to be summed up, in the form that the kernels read.

    Args:
        slices: Without regions, of layouts from `Layout.to_sum`; at least one.  Their sources may also count from the start
            of memory that `point_to` names later.
        device: To run on.
        casts: That the kernels may do.

    Attributes:
        rest: Numbers of the slices that the kernels cannot sum up, in order.
    """

    def __init__(self, slices: Slices, device: torch.device, *, casts: frozenset[Cast] = frozenset()) -> None:
        parts, self.rest = _parts_of(slices, 0, casts)
        self._parts = _on(parts.rows, device)
        self._tiles = {variant: _on(tiles, device) for variant, tiles in _tiles_of(parts).items()}
        self._start = 0

    def point_to(self, start: int) -> None:
        """Let sources count from an address, a multiple of 16; queued on the current stream.

        The table may be in use by what that stream has queued before.
        """
        assert start % _ALIGNMENT == 0
        if start != self._start:
            self._parts[:, 0] += start - self._start
            self._start = start

    def run(self, launch: Any, sums: torch.Tensor) -> None:
        """Queue the sums on the device's current stream.

        Args:
            launch: From `kernels.ready`.
            sums: int64, contiguous.  `word_sum` of each slice in its target's dtype, times its weight, is added to the
                element of its slot.
        """
        with torch.cuda.device_of(sums):  # Triton launches on the current one
            for variant, tiles in self._tiles.items():
                launch(self._parts, tiles, sums, variant, copies=SUM)


def finite_masks(dtype: torch.dtype) -> tuple[int, int]:
    """Return two words that find numbers which are not finite: the bits of their exponents, and the lowest of these.

    ``(word & first) + second`` carries into the highest bit of every element whose exponent has all bits set: of a NaN and
    of an infinite number, and of no other.  Nothing is carried further.

    Returns:
        Two zeros for integers, all of which are finite.
    """
    exponent = _EXPONENTS.get(dtype)
    if exponent is None:
        return 0, 0
    bits = dtype.itemsize * 8
    copies = sum(1 << shift for shift in range(0, 64, bits))
    return exponent * copies, (exponent & -exponent) * copies


_EXPONENTS = {
    torch.float64: 0x7FF0 << 48,
    torch.float32: 0x7F80 << 16,
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
}


def ordered(holders: Any, order: str) -> Any:
    """Return the order in which tiles are copied.  Pure.

    Programs of a kernel start in the order of its tiles.

    Args:
        holders: int64 array: the number of the holder that each tile is read from.
        order: ``sequential``: as they are.  ``interleaved``: the tiles of every holder are spread evenly over all of the
            copy and keep their order, so that at any time a reader reads from all holders, from each in proportion: its
            own memory beside what comes over the wires, and no two readers from the same holder alone.

    Raises:
        ValueError: There is no such order.
    """
    import numpy

    if order == "sequential":
        return numpy.arange(len(holders))
    if order != "interleaved":
        raise ValueError(f"order must be sequential or interleaved, got {order!r}")
    places = numpy.zeros(len(holders))
    for holder in numpy.unique(holders):
        of_holder = numpy.flatnonzero(holders == holder)
        places[of_holder] = (numpy.arange(len(of_holder)) + 0.5) / len(of_holder)
    return numpy.argsort(places, kind="stable")


def _holder(region: str) -> str:
    holder, found, _ = region.partition("/")
    return holder if found else ""


def _starts(regions: Mapping[str, torch.Tensor], names: Sequence[str]) -> Any:
    import numpy

    return numpy.array([regions[name].data_ptr() for name in names], dtype=numpy.int64)


def _on(array: Any, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


class _Parts(NamedTuple):
    """Rectangles of rows that are dense, in the order of their slices.

    Attributes:
        rows: int64 array of the shape (number of parts, PART_FIELDS): addresses of source and target; number of rows; units
            in each; units from row to row in the source and in the target; rows that one program copies; slot; weight;
            `finite_masks` of the target's dtype; element of the sums that is its flag, -1 for none.
        slice_of: Part -> number of its slice.
        variant_of: Part -> number of its variant.
        variants: All that occur.
    """

    rows: Any
    slice_of: Any
    variant_of: Any
    variants: list[Variant]


class _Shape(NamedTuple):
    """The parts of every slice of one layout; sizes and strides in units.

    Attributes:
        source_offsets: Of each part, in bytes.
        target_offsets: Of each part, in bytes.
        num_rows: Of each part.
        width: Of a row.
        source_stride: From row to row.
        target_stride: From row to row.
        rows_at_once: That one program copies.
        variant: That copies them.
    """

    source_offsets: list[int]
    target_offsets: list[int]
    num_rows: int
    width: int
    source_stride: int
    target_stride: int
    rows_at_once: int
    variant: Variant


def _parts_of(slices: Slices, starts: Any, casts: frozenset[Cast]) -> tuple[_Parts, list[int]]:
    """Divide slices into parts; also returns the numbers of the slices that no kernel can take.

    Args:
        slices: To be divided.
        starts: Address of each one's region; 0 where sources are addresses.
        casts: That the kernels may do.
    """
    # numpy, not torch: that would start as many threads as there are cores, which takes tens of milliseconds the first time
    # in a process.
    import numpy

    sources, targets = (numpy.array(column, dtype=numpy.int64) for column in (slices.sources, slices.targets))
    slots, weights = (numpy.array(column, dtype=numpy.int64) for column in (slices.slots, slices.weights))
    layout_of = numpy.array(slices.layout_of, dtype=numpy.int64)
    is_aligned = ((sources + starts) % _ALIGNMENT == 0) & (targets % _ALIGNMENT == 0)
    rows, slice_of, variant_of = [], [], []
    variants: dict[Variant, int] = {}
    is_taken = numpy.zeros(len(slices), dtype=bool)
    by_layout = numpy.argsort(layout_of, kind="stable")
    bounds = numpy.searchsorted(layout_of[by_layout], numpy.arange(len(slices.layouts) + 1))
    for i, layout in enumerate(slices.layouts):
        shape = shape_of_parts(layout, casts)
        if shape is None:
            continue
        numbers = by_layout[bounds[i] : bounds[i + 1]]
        numbers = numbers[is_aligned[numbers]]
        is_taken[numbers] = True
        of_layout = numpy.empty((len(numbers), len(shape.source_offsets), PART_FIELDS), dtype=numpy.int64)
        of_layout[..., 0] = sources[numbers, None] + numpy.array(shape.source_offsets)
        of_layout[..., 1] = targets[numbers, None] + numpy.array(shape.target_offsets)
        of_layout[..., 2:7] = shape.num_rows, shape.width, shape.source_stride, shape.target_stride, shape.rows_at_once
        of_layout[..., 7] = slots[numbers, None]
        of_layout[..., 8] = weights[numbers, None]
        of_layout[..., 9:11] = finite_masks(layout.target)
        of_layout[..., 11] = -1
        rows.append(of_layout.reshape(-1, PART_FIELDS))
        slice_of.append(numpy.repeat(numbers, len(shape.source_offsets)))
        variant_of.append(numpy.full(len(rows[-1]), variants.setdefault(shape.variant, len(variants))))
    rest = numpy.flatnonzero(~is_taken).tolist()
    if not rows:
        nothing = numpy.empty(0, dtype=numpy.int64)
        return _Parts(numpy.empty((0, PART_FIELDS), dtype=numpy.int64), nothing, nothing, []), rest
    joined = numpy.concatenate(slice_of)
    as_given = numpy.argsort(joined, kind="stable")
    return (
        _Parts(
            numpy.concatenate(rows)[as_given],
            joined[as_given],
            numpy.concatenate(variant_of)[as_given],
            list(variants),
        ),
        rest,
    )


def _tiles_of(parts: _Parts) -> dict[Variant, Any]:
    """Cut the parts into tiles, one for each program of a kernel.

    Returns:
        Variant -> its tiles in the order of the parts, each the number of the part, the first row and the first unit; an
        int32 array of the shape (number of tiles, TILE_FIELDS).
    """
    import numpy

    found = {}
    for number, variant in enumerate(parts.variants):
        of_variant = numpy.flatnonzero(parts.variant_of == number)
        num_rows, width, at_once = parts.rows[of_variant][:, [2, 3, 6]].T
        across = -(-width // variant.tile)
        count = -(-num_rows // at_once) * across
        first = numpy.cumsum(count) - count
        number_in_part = numpy.arange(count.sum()) - numpy.repeat(first, count)
        across_of = numpy.repeat(across, count)
        tiles = numpy.empty((len(number_in_part), TILE_FIELDS), dtype=numpy.int32)
        tiles[:, 0] = numpy.repeat(of_variant, count)
        tiles[:, 1] = number_in_part // across_of * numpy.repeat(at_once, count)
        tiles[:, 2] = number_in_part % across_of * variant.tile
        found[variant] = tiles
    return found


def shape_of_parts(layout: Layout, casts: frozenset[Cast] = frozenset()) -> _Shape | None:
    """Return the parts of all slices of a layout; None if no kernel can copy them.

    They can if rows are whole pairs of words and start at pairs, or are cast in such steps that both sides do, if a slice
    has not too many parts, and if the kernel may do the cast.  A unit is a word, or an element where they are cast.
    """
    cast = layout.cast
    if cast is not None and cast not in casts:
        return None
    dims = _merged(layout.shape, layout.source_strides, layout.target_strides)
    if dims is None:
        return None
    source_size, target_size = layout.source.itemsize, layout.target.itemsize
    (width, *_), *outer = reversed(dims)
    strides = [(a, b) for _, a, b in outer]
    if cast is None:
        numbers = [width * source_size, *(stride * source_size for pair in strides for stride in pair)]
        is_whole = not any(number % _ALIGNMENT for number in numbers)
        unit, scale = 8, 1
    else:
        is_whole = not any(number % _CAST_MULTIPLE for number in (width, *(s for pair in strides for s in pair)))
        unit, scale = 0, 2
    num_rows, source_stride, target_stride = outer.pop(0) if outer else (1, 0, 0)
    num_parts = math.prod(size for size, *_ in outer)
    if not is_whole or num_parts > _MOST_PARTS:
        return None
    corners = [(0, 0)]
    for size, a, b in outer:
        corners = [(x + i * a * source_size, y + i * b * target_size) for x, y in corners for i in range(size)]
    if unit:
        width, source_stride, target_stride = (n * source_size // unit for n in (width, source_stride, target_stride))
    if max(width, num_rows) > _MOST_UNITS:
        return None
    block = next((one for one in BLOCKS if num_rows > 1 and width <= one * scale), BLOCKS[-1])
    variant = Variant(block * scale, BLOCKS[-1] // block, TILE * scale, cast)
    return _Shape(
        [x for x, _ in corners],
        [y for _, y in corners],
        num_rows,
        width,
        source_stride,
        target_stride,
        max(variant.tile // width, 1),
        variant,
    )


def _merged(shape: Sequence[int], of_src: Sequence[int], of_dst: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """Merge dimensions: each one's size and both strides; None if the last one is not dense, or one is empty."""
    dims: list[tuple[int, int, int]] = []
    for size, a, b in zip(shape, of_src, of_dst):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * a and dims[-1][2] == size * b:
            dims[-1] = (dims[-1][0] * size, a, b)
        else:
            dims.append((size, a, b))
    if not dims:
        dims = [(1, 1, 1)]
    return dims if dims[-1][1:] == (1, 1) and all(size > 0 for size, *_ in dims) else None
