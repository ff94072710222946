"""The kernels of `kernels`, in a module of its own: importing it imports Triton, which may be missing."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .kernel_tables import COPY, PART_FIELDS, TILE_FIELDS, Variant

NUM_WARPS = 8


@triton.jit
def _copy_and_sum(
    parts,
    tiles,
    sums,
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
    # As `shape_of_parts` makes sure: without the hint words would be loaded and stored one by one instead of in pairs.
    src = tl.multiple_of(src + first_row * src_stride + first_word, 16)
    dst = tl.multiple_of(dst + first_row * dst_stride + first_word, 16)
    src_stride = tl.multiple_of(src_stride, 2)
    dst_stride = tl.multiple_of(dst_stride, 2)
    row_count = tl.minimum(rows_at_once, num_rows - first_row)
    word_count = tl.multiple_of(tl.minimum(width - first_word, tile_words), 2)
    rows = tl.arange(0, block_rows)[:, None]
    words = tl.max_contiguous(tl.arange(0, block_words), block_words)[None, :]
    found = tl.zeros((block_rows, block_words), dtype=tl.int64)
    if copies == 2:
        exponent = tl.load(part + 9)
        one = tl.load(part + 10)
        carried = tl.zeros((block_rows, block_words), dtype=tl.int64)
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
                there = tl.load(at, mask=mask, other=0, volatile=True)
                found += there
                if copies == 2:
                    # See `finite_masks`.
                    carried |= (there & exponent) + one
            else:
                found += given
    tl.atomic_add(sums + tl.load(part + 7), tl.sum(tl.sum(found, axis=1), axis=0) * tl.load(part + 8))
    if copies == 2:
        flag = tl.load(part + 11)
        is_flagged = ((carried & (exponent + one)) != 0).to(tl.int32)
        if (tl.max(tl.max(is_flagged, axis=1), axis=0) != 0) & (flag >= 0):
            tl.store(sums + flag, 1)


@triton.jit
def float32_of(bits, source: tl.constexpr):
    """The value of a float16, bfloat16 or float32, given as an unsigned integer; exact."""
    if source == "float32":
        return bits.to(tl.float32, bitcast=True)
    elif source == "bfloat16":
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def bits_of(value, target: tl.constexpr):
    """A float32 as torch casts it, rounded to the nearest, to even between two; an unsigned integer."""
    if target == "float32":
        return value.to(tl.uint32, bitcast=True)
    elif target == "bfloat16":
        # In integers, which Triton's interpreter computes as a GPU does; it does not round to bfloat16.  A number that is
        # none becomes 0x7fff, as a GPU's own conversion has it.
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFF, rounded).to(tl.uint16)
    else:
        return value.to(tl.float16).to(tl.uint16, bitcast=True)


@triton.jit
def _cast_and_sum(
    parts,
    tiles,
    sums,
    part_fields: tl.constexpr,
    tile_fields: tl.constexpr,
    tile_elements: tl.constexpr,
    block_rows: tl.constexpr,
    block_elements: tl.constexpr,
    source: tl.constexpr,
    target: tl.constexpr,
    src_bits: tl.constexpr,
    dst_bits: tl.constexpr,
    per_word: tl.constexpr,
    copies: tl.constexpr,
):
    # As `_copy_and_sum`, in elements instead of words.
    tile = tiles + tl.program_id(0) * tile_fields
    part = parts + tl.load(tile) * part_fields
    first_row = tl.load(tile + 1)
    first = tl.load(tile + 2)
    src = tl.load(part).to(tl.pointer_type(src_bits))
    dst = tl.load(part + 1).to(tl.pointer_type(dst_bits))
    num_rows = tl.load(part + 2).to(tl.int32)
    width = tl.load(part + 3).to(tl.int32)
    src_stride = tl.load(part + 4)
    dst_stride = tl.load(part + 5)
    rows_at_once = tl.load(part + 6).to(tl.int32)
    src = tl.multiple_of(src + first_row * src_stride + first, 16)
    dst = tl.multiple_of(dst + first_row * dst_stride + first, 16)
    src_stride = tl.multiple_of(src_stride, 8)
    dst_stride = tl.multiple_of(dst_stride, 8)
    row_count = tl.minimum(rows_at_once, num_rows - first_row)
    element_count = tl.multiple_of(tl.minimum(width - first, tile_elements), 8)
    rows = tl.arange(0, block_rows)[:, None]
    elements = tl.max_contiguous(tl.arange(0, block_elements), block_elements)[None, :]
    words = tl.max_contiguous(tl.arange(0, block_elements // per_word), block_elements // per_word)[None, :]
    dst_words = tl.multiple_of(dst.to(tl.pointer_type(tl.int64), bitcast=True), 16)
    word_stride = tl.multiple_of(dst_stride // per_word, 2)
    word_count = tl.multiple_of(element_count // per_word, 2)
    if copies:
        found = tl.zeros((block_rows, block_elements // per_word), dtype=tl.int64)
    else:
        found = tl.zeros((block_rows, block_elements), dtype=tl.int64)
    if copies == 2:
        exponent = tl.load(part + 9)
        one = tl.load(part + 10)
        carried = tl.zeros((block_rows, block_elements // per_word), dtype=tl.int64)
    for begin_row in range(0, row_count, block_rows):
        for begin in range(0, element_count, block_elements):
            row = begin_row + rows
            element = begin + elements
            mask = (row < row_count) & (element < element_count)
            given = tl.load(src + row * src_stride + element, mask=mask, other=0, eviction_policy="evict_first")
            cast = bits_of(float32_of(given, source), target)
            if copies:
                tl.store(dst + row * dst_stride + element, cast, mask=mask)
                tl.debug_barrier()
                # As words, which other threads have written in part: behind the barrier they are complete.
                word = begin // per_word + words
                at = dst_words + row * word_stride + word
                there = tl.load(at, mask=(row < row_count) & (word < word_count), other=0, volatile=True)
                found += there
                if copies == 2:
                    carried |= (there & exponent) + one
            else:
                # Element i of a word, the lowest first.  What the mask leaves out is zero in every dtype.
                found += cast.to(tl.int64) << ((element % per_word) * (64 // per_word)).to(tl.int64)
    tl.atomic_add(sums + tl.load(part + 7), tl.sum(tl.sum(found, axis=1), axis=0) * tl.load(part + 8))
    if copies == 2:
        flag = tl.load(part + 11)
        is_flagged = ((carried & (exponent + one)) != 0).to(tl.int32)
        if (tl.max(tl.max(is_flagged, axis=1), axis=0) != 0) & (flag >= 0):
            tl.store(sums + flag, 1)


BITS = {"float32": tl.uint32, "bfloat16": tl.uint16, "float16": tl.uint16}
"""Names of dtypes that are cast -> the unsigned integer of the same size."""


def launch(parts: Any, tiles: Any, sums: Any, variant: Variant, *, copies: int = COPY) -> None:
    """Queue a kernel on the current stream.

    Args:
        parts, tiles: See `kernel_tables`; the tiles are of the variant.
        sums: int64, contiguous.  The weighted sum of every part is added to the element of its slot.
        variant: Of the tiles.
        copies: `COPY`: sources are copied to targets, and these are summed up.  `COPY_AND_FLAG`: and the flag of a part
            becomes 1 if its target then holds a number that is not finite.  `SUM`: what would be copied is summed up.
    """
    grid = (len(tiles),)
    shape = (PART_FIELDS, TILE_FIELDS, variant.tile, variant.block_rows, variant.block)
    if variant.cast is None:
        _copy_and_sum[grid](parts, tiles, sums, *shape, int(copies), num_warps=NUM_WARPS)
        return
    source, target = (str(dtype).removeprefix("torch.") for dtype in variant.cast)
    per_word = 8 // variant.cast[1].itemsize
    _cast_and_sum[grid](
        parts,
        tiles,
        sums,
        *shape,
        source,
        target,
        BITS[source],
        BITS[target],
        per_word,
        int(copies),
        num_warps=NUM_WARPS,
    )
