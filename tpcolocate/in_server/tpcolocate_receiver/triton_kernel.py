"""The kernel of `one_pass`, in a module of its own: Triton is imported where it is needed, and only there."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .kernels import BLOCKS, PIECE_FIELDS, TILE, TILE_FIELDS

_NUM_WARPS = 8


@triton.jit
def _go_through(
    pieces,
    tiles,
    sums,
    piece_fields: tl.constexpr,
    tile_fields: tl.constexpr,
    tile_words: tl.constexpr,
    block_rows: tl.constexpr,
    block_words: tl.constexpr,
    copies: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * tile_fields
    piece = pieces + tl.load(tile) * piece_fields
    first_row = tl.load(tile + 1)
    first_word = tl.load(tile + 2)
    src = tl.load(piece).to(tl.pointer_type(tl.int64))
    dst = tl.load(piece + 1).to(tl.pointer_type(tl.int64))
    num_rows = tl.load(piece + 2).to(tl.int32)
    width = tl.load(piece + 3).to(tl.int32)
    src_stride = tl.load(piece + 4)
    dst_stride = tl.load(piece + 5)
    rows_at_once = tl.load(piece + 6).to(tl.int32)
    number = tl.load(piece + 7)
    # Promised by `parts_of`: without it every word would travel by itself instead of two at a time.
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
                # No thread reads what another has yet to write; volatile, so that it is read from memory and not remembered.
                tl.debug_barrier()
                found += tl.load(at, mask=mask, other=0, volatile=True)
            else:
                found += given
    tl.atomic_add(sums + number, tl.sum(tl.sum(found, axis=1), axis=0))


def launch(pieces: Any, tiles: Any, sums: Any, block_words: int, *, copies: bool = True) -> None:
    """Queue it on the current stream.

    Args:
        pieces, tiles, sums: As `one_pass.Sheet` and `one_pass.Readings` have them.
        block_words: One of `one_pass.BLOCKS`.
        copies: Whether sources are copied to targets and those are summed up; otherwise sources are, and no more.
    """
    _go_through[(len(tiles),)](
        pieces,
        tiles,
        sums,
        PIECE_FIELDS,
        TILE_FIELDS,
        TILE,
        BLOCKS[-1] // block_words,
        block_words,
        copies,
        num_warps=_NUM_WARPS,
    )
