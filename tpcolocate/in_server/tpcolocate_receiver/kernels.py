"""Copies that read back what they wrote: the proof costs next to no time beside the copy.  And sums of what lies there.

A copy and a sum, one after the other, go through a GPU's memory three times: to read, to write, to read back.  A kernel
that reads back each tile while it is still in the cache goes through it twice, and one launch does all copies of a sync.
It is Triton's, which SGLang depends on; where that cannot be had, `plans.Program` copies and sums up as torch does.

The trainer has the same kernel sum up what is to be copied, hundreds of tensors in one launch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Copies of more blocks of rows than this are torch's.
_MOST_PARTS = 1024
_MOST_WORDS = 2**31 - 1

TILE = 8192
"""Words that one program of the kernel copies, in whole rows where they are shorter."""
BLOCKS = (256, 1024, 4096)
"""Words of a row that are copied at once; as many rows of them as fill the largest."""
PIECE_FIELDS = 8
TILE_FIELDS = 3

Part = tuple[int, int, int, int, int, int]
"""Addresses of source and target; rows; words in each; words from row to row in the source and in the target."""


class Sheet:
    """Copies, as the kernel reads them.

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
        """Of each part what the kernel reads, but for the source, which is counted from its region's start."""
        self._region_of = torch.tensor(of_row, dtype=torch.int64)
        self._tiles = {block: tiles.to(device) for block, tiles in _tiles_of(rows).items()}
        self._pieces: torch.Tensor
        if not self.place(regions):
            raise ValueError("a source lies between two pairs of words")

    def place(self, regions: Mapping[str, torch.Tensor]) -> bool:
        """Read regions that were mapped anew; False, and nothing changes, if they are others than they were."""
        if any(regions[name].numel() != size for name, size in self._sizes.items()):
            return False
        starts = torch.tensor([regions[name].data_ptr() for name in self._sizes], dtype=torch.int64)
        rows = self._rows.clone()
        rows[:, 0] += starts[self._region_of]
        if (rows[:, 0] % 16).any():
            return False
        self._pieces = rows.to(self._device)
        return True

    def run(self, launch: Any, sums: torch.Tensor) -> None:
        """Queue the copies on the current stream.

        Args:
            launch: From `ready`.
            sums: int64, contiguous.  To the element of each copy's number is added `word_sum` of what its target then
                holds.
        """
        for block, tiles in self._tiles.items():
            launch(self._pieces, tiles, sums, block)


class Readings:
    """Memory that is summed up where it lies, as the kernel reads it.

    Args:
        parts: Number of each sum, and what it is of: `parts_of` one tensor and itself; at least one.
        device: To run on.
    """

    def __init__(self, parts: Sequence[tuple[int, Sequence[Part]]], device: torch.device) -> None:
        rows = [_row(part, number) for number, of_one in parts for part in of_one]
        self._pieces = torch.tensor(rows, dtype=torch.int64).to(device)
        self._tiles = {block: tiles.to(device) for block, tiles in _tiles_of(rows).items()}

    def run(self, launch: Any, sums: torch.Tensor) -> None:
        """Queue the sums on the device's current stream.

        Args:
            launch: From `ready`.
            sums: int64, contiguous.  To the element of each number is added the sum of its words.
        """
        with torch.cuda.device_of(sums):  # Triton launches on the current one
            for block, tiles in self._tiles.items():
                launch(self._pieces, tiles, sums, block, copies=False)


def _row(part: Part, number: int) -> list[int]:
    """A part as the kernel reads it: PIECE_FIELDS numbers."""
    width = part[3]
    return [*part, max(TILE // width, 1), number]


def _tiles_of(rows: Sequence[Sequence[int]]) -> dict[int, torch.Tensor]:
    """Words of a row that are copied at once -> what each program of the kernel copies: part, first row, first word.

    Args:
        rows: Of each part, as `Sheet` has them.

    Returns:
        (tiles, TILE_FIELDS) int32 each.
    """
    # Hundreds of thousands of numbers: torch would begin to compute in as many threads as there are cores, for the first
    # time in this process, which alone takes tens of milliseconds.
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
    """A copy as blocks of rows; None if it is not made of whole pairs of words, each where one can start.

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
    """(size, stride there, stride here) of as few dimensions as can be; None if the last one is not dense, or empty."""
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


_lock = threading.Lock()
_begun: dict[torch.device, threading.Thread] = {}
_ready: dict[torch.device, Any] = {}


def ready(device: torch.device) -> Any | None:
    """The kernel's launcher; None while it is being made, and where it cannot be."""
    return _ready.get(device)


def prepare(device: torch.device) -> None:
    """Begin to make the kernel, in a thread: the compiler takes up to two seconds the first time on a machine."""
    with _lock:
        if device.type != "cuda" or device in _begun:
            return
        # A daemon: a compiler that hangs must not keep the process.
        _begun[device] = threading.Thread(target=_make, args=(device,), name="tpcolocate kernel", daemon=True)
        _begun[device].start()


def settle(device: torch.device, *, timeout_s: float) -> None:
    """Wait until nothing of `prepare` is going on any more: on a GPU it would disturb whoever captures a graph there.

    Args:
        device: As given to `prepare`.
        timeout_s: In seconds; a compiler that takes longer is left to itself.
    """
    with _lock:
        making = _begun.get(device)
    if making is not None:
        making.join(timeout_s)


def _make(device: torch.device) -> None:
    try:
        from .triton_kernel import launch

        torch.cuda.set_device(device)  # of this thread
        with torch.cuda.stream(torch.cuda.Stream(device)):
            try_out(launch, device)
        _ready[device] = launch
    except Exception as error:  # slower, and all the same
        logger.warning("tpcolocate: weights are copied and summed up tensor by tensor: %s", error)


def try_out(launch: Any, device: torch.device) -> None:
    """Copy a little of each kind, and sum it up; compare.

    Raises:
        RuntimeError: The kernel does something else.
    """
    generator = torch.Generator().manual_seed(1)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**63), 2**63 - 1, shape, dtype=torch.int64, generator=generator).to(device)

    flat, rows, wide, cube = words(3 * TILE + 2), words(40, 1024), words(3, 2 * TILE + 8), words(3, 6, 20)
    sources = [flat, rows[:, 16:528], wide[:, : 2 * TILE + 4], cube[:, 1:5, 2:10], flat[:2], rows[:2, :64]]
    targets = [torch.zeros_like(source, memory_format=torch.contiguous_format) for source in sources]
    # Two rows into one place: what is read back is not what was given.
    targets[-1] = targets[-1][:1].expand(2, 64)
    copies: list[tuple[int, str, list[Part]]] = []
    for number, (dst, src) in enumerate(zip(targets, sources)):
        parts = parts_of(dst, src)
        if parts is None:
            raise RuntimeError("a copy has no parts")
        copies.append((number, str(number), parts))
    sums = torch.zeros(len(sources), dtype=torch.int64, device=device)
    regions = {str(number): source for number, source in enumerate(sources)}
    Sheet(copies, regions, device).run(launch, sums)
    for number, (dst, src) in enumerate(zip(targets, sources)):
        if int(sums[number]) != int(dst.sum()) or not (number == len(sources) - 1 or torch.equal(dst, src)):
            raise RuntimeError(f"the kernel failed its test ({number})")
    sums.zero_()
    Readings([(number, parts_of(source, source) or ()) for number, source in enumerate(sources)], device).run(
        launch, sums
    )
    if sums.tolist() != [int(source.sum()) for source in sources]:
        raise RuntimeError("the kernel failed its test (sums)")
