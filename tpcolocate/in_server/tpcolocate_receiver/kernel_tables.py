"""Tables of what the kernel copies and sums up: rows of parts, and tiles of them for its programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

# Copies of more parts than this are left to torch.
_MOST_PARTS = 1024
_MOST_WORDS = 2**31 - 1

TILE = 8192
"""Words that one program of the kernel copies, in whole rows where they are shorter."""
BLOCKS = (256, 1024, 4096)
"""Words of a row that are copied at once, together with as many rows as fill the largest block."""
PART_FIELDS = 8
TILE_FIELDS = 3

Part = tuple[int, int, int, int, int, int]
"""Addresses of source and target; number of rows; words in each; words from row to row in the source and in the target."""


class CopyTable:
    """Copies in the form that the kernel reads.

    Args:
        copies: Number of each copy, the name of the region that it reads, and its parts; at least one.
        regions: What is mapped, by name.
        device: To run on.
    """

    def __init__(
        self,
        copies: Sequence[tuple[int, str, Sequence[Part]]],
        regions: Mapping[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        self._device = device
        self._sizes = {region: regions[region].numel() for _, region, _ in copies}
        index = {region: i for i, region in enumerate(self._sizes)}
        rows: list[list[int]] = []
        of_row: list[int] = []
        for number, region, parts in copies:
            start = regions[region].data_ptr()
            for part in parts:
                row = _row(part, number)
                row[0] -= start
                rows.append(row)
                of_row.append(index[region])
        self._rows = torch.tensor(rows, dtype=torch.int64)
        """Rows of the kernel's table; their sources count from the start of their region."""
        self._region_of = torch.tensor(of_row, dtype=torch.int64)
        self._tiles = {block: tiles.to(device) for block, tiles in _tiles_of(rows).items()}
        self._parts: torch.Tensor
        if not self.rebase(regions):
            raise ValueError("a source does not start at a pair of words")

    def rebase(self, regions: Mapping[str, torch.Tensor]) -> bool:
        """Point to regions that were mapped again; False, and nothing changes, if they have other sizes or alignments."""
        if any(regions[name].numel() != size for name, size in self._sizes.items()):
            return False
        starts = torch.tensor([regions[name].data_ptr() for name in self._sizes], dtype=torch.int64)
        rows = self._rows.clone()
        rows[:, 0] += starts[self._region_of]
        if (rows[:, 0] % 16).any():
            return False
        self._parts = rows.to(self._device)
        return True

    def run(self, launch: Any, checksums: torch.Tensor) -> None:
        """Queue the copies on the current stream.

        Args:
            launch: From `kernels.ready`.
            checksums: int64, contiguous.  `word_sum` of what each copy's target then holds is added to the element of
                its number.
        """
        for block, tiles in self._tiles.items():
            launch(self._parts, tiles, checksums, block)


class ChecksumTable:
    """Memory to be summed up, in the form that the kernel reads.

    Args:
        parts: Number of each checksum, and `parts_of` a tensor and itself; at least one.
        device: To run on.
    """

    def __init__(self, parts: Sequence[tuple[int, Sequence[Part]]], device: torch.device) -> None:
        rows = [_row(part, number) for number, of_one in parts for part in of_one]
        self._parts = torch.tensor(rows, dtype=torch.int64).to(device)
        self._tiles = {block: tiles.to(device) for block, tiles in _tiles_of(rows).items()}

    def run(self, launch: Any, checksums: torch.Tensor) -> None:
        """Queue the sums on the device's current stream.

        Args:
            launch: From `kernels.ready`.
            checksums: int64, contiguous.  The sum of its words is added to the element of each number.
        """
        with torch.cuda.device_of(checksums):  # Triton launches on the current one
            for block, tiles in self._tiles.items():
                launch(self._parts, tiles, checksums, block, copies=False)


def _row(part: Part, number: int) -> list[int]:
    """Return a part's row in the kernel's table: PART_FIELDS numbers."""
    width = part[3]
    return [*part, max(TILE // width, 1), number]


def _tiles_of(rows: Sequence[Sequence[int]]) -> dict[int, torch.Tensor]:
    """Cut the parts into tiles, one for each program of the kernel.

    Args:
        rows: From `_row`.

    Returns:
        One of `BLOCKS` -> its tiles, each the number of the part, the first row and the first word; int32, of the shape
        (number of tiles, TILE_FIELDS).
    """
    # There may be hundreds of thousands of tiles: torch would start as many threads as there are cores, which takes tens
    # of milliseconds the first time in a process.
    import numpy

    of_block: dict[int, list[tuple[int, int, int, int]]] = {}
    for i, (_, _, num_rows, width, _, _, at_once, _) in enumerate(rows):
        block = BLOCKS[-1] if num_rows == 1 else next((one for one in BLOCKS if width <= one), BLOCKS[-1])
        of_block.setdefault(block, []).append((i, -(-num_rows // at_once), -(-width // TILE), at_once))
    found = {}
    for block, parts in of_block.items():
        tiles = numpy.zeros((sum(down * across for _, down, across, _ in parts), TILE_FIELDS), dtype=numpy.int32)
        end = 0
        for i, down, across, at_once in parts:
            of_part = tiles[end : (end := end + down * across)]
            of_part[:, 0] = i
            grid = of_part.reshape(down, across, TILE_FIELDS)
            if down > 1:
                grid[:, :, 1] = numpy.arange(0, down * at_once, at_once, dtype=numpy.int32)[:, None]
            if across > 1:
                grid[:, :, 2] = numpy.arange(0, across * TILE, TILE, dtype=numpy.int32)
        found[block] = torch.from_numpy(tiles)
    return found


def parts_of(dst: torch.Tensor, src: torch.Tensor) -> list[Part] | None:
    """Return the parts of a copy; None if they are not whole, aligned pairs of words, or too many.

    Args:
        dst: int64.
        src: int64, of the same shape.
    """
    if dst.dtype != torch.int64 or src.dtype != torch.int64 or dst.shape != src.shape or dst.device != src.device:
        return None
    dims = _merged(tuple(dst.shape), src.stride(), dst.stride())
    if dims is None:
        return None
    (width, *_), *outer = reversed(dims)
    rows, src_stride, dst_stride = outer.pop(0) if outer else (1, 0, 0)
    corners = [(src.data_ptr(), dst.data_ptr())]
    for size, of_src, of_dst in outer:
        if len(corners) * size > _MOST_PARTS:
            return None
        corners = [(a + 8 * i * of_src, b + 8 * i * of_dst) for a, b in corners for i in range(size)]
    aligned = not any(number % 2 for number in (width, src_stride, dst_stride))
    aligned = aligned and not any(address % 16 for corner in corners for address in corner)
    if not aligned or max(width, rows) > _MOST_WORDS:
        return None
    return [(a, b, rows, width, src_stride, dst_stride) for a, b in corners]


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
