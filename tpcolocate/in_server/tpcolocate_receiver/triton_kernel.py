"""The kernel of `kernels`, in a module of its own: importing it imports Triton, which may be missing."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .kernel_tables import BLOCKS, PART_FIELDS, TILE, TILE_FIELDS

_NUM_WARPS = 8


@triton.jit
def _copy_and_sum(
    parts,
    tiles,
    checksums,
    part_fields: tl.constexpr,
    tile_fields: tl.constexpr,
    tile_words: tl.constexpr,
    block_rows: tl.constexpr,
    block_words: tl.constexpr,
    copies: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * tile_fields
    part = parts + tl.load(tile) * part_fields
    first_row = tl.load(tile + 1)
    first_word = tl.load(tile + 2)
    src = tl.load(part).to(tl.pointer_type(tl.int64))
    dst = tl.load(part + 1).to(tl.pointer_type(tl.int64))
    num_rows = tl.load(part + 2).to(tl.int32)
    width = tl.load(part + 3).to(tl.int32)
    src_stride = tl.load(part + 4)
    dst_stride = tl.load(part + 5)
    rows_at_once = tl.load(part + 6).to(tl.int32)
    number = tl.load(part + 7)
    # As `parts_of` makes sure: without the hint words would be loaded and stored one by one instead of in pairs.
    src = tl.multiple_of(src + first_row * src_stride + first_word, 16)
    dst = tl.multiple_of(dst + first_row * dst_stride + first_word, 16)
    src_stride = tl.multiple_of(src_stride, 2)
    dst_stride = tl.multiple_of(dst_stride, 2)
    row_count = tl.minimum(rows_at_once, num_rows - first_row)
    word_count = tl.multiple_of(tl.minimum(width - first_word, tile_words), 2)
    rows = tl.arange(0, block_rows)[:, None]
    words = tl.max_contiguous(tl.arange(0, block_words), block_words)[None, :]
    found = tl.zeros((block_rows, block_words), dtype=tl.int64)
    for begin_row in range(0, row_count, block_rows):
        for begin in range(0, word_count, block_words):
            row = begin_row + rows
            word = begin + words
            mask = (row < row_count) & (word < word_count)
            given = tl.load(src + row * src_stride + word, mask=mask, other=0, eviction_policy="evict_first")
            if copies:
                at = dst + row * dst_stride + word
                tl.store(at, given, mask=mask)
                # No thread reads what another has yet to write; volatile, so that memory is read and not a register.
                tl.debug_barrier()
                found += tl.load(at, mask=mask, other=0, volatile=True)
            else:
                found += given
    tl.atomic_add(checksums + number, tl.sum(tl.sum(found, axis=1), axis=0))


def launch(parts: Any, tiles: Any, checksums: Any, block_words: int, *, copies: bool = True) -> None:
    """Queue the kernel on the current stream.

    Args:
        parts, tiles, checksums: See `kernel_tables`.
        block_words: One of `BLOCKS`.
        copies: Whether sources are copied to targets and these are summed up; otherwise the sources are.
    """
    _copy_and_sum[(len(tiles),)](
        parts,
        tiles,
        checksums,
        PART_FIELDS,
        TILE_FIELDS,
        TILE,
        BLOCKS[-1] // block_words,
        block_words,
        copies,
        num_warps=_NUM_WARPS,
    )
