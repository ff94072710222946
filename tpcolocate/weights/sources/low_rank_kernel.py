"""The kernel of `low_rank`, in a module of its own: importing it imports Triton, which may be missing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tpcolocate.in_server.tpcolocate_receiver.triton_kernel import BITS, bits_of, float32_of
from tpcolocate.weights.sources.addition import RANK_MULTIPLE, Addition

# Of those tried on an H100 the fastest: a third less time than with the double, see benchmarks/README.md.
BLOCK = 64
"""Rows and columns that one program computes."""
NUM_WARPS = 4
_FIELDS = 11
_ALIGNMENT = 16


@triton.jit
def _add_products(
    additions,
    num_fields: tl.constexpr,
    block: tl.constexpr,
    block_rank: tl.constexpr,
    dtype: tl.constexpr,
    bits: tl.constexpr,
    factor: tl.constexpr,
    is_aligned: tl.constexpr,
):
    one = additions + tl.program_id(1) * num_fields
    base = tl.load(one).to(tl.pointer_type(bits))
    base_stride = tl.load(one + 1)
    out = tl.load(one + 2).to(tl.pointer_type(bits))
    out_stride = tl.load(one + 3)
    left = tl.load(one + 4).to(tl.pointer_type(factor))
    left_stride = tl.load(one + 5)
    right = tl.load(one + 6).to(tl.pointer_type(factor))
    right_stride = tl.load(one + 7)
    num_rows = tl.load(one + 8).to(tl.int32)
    num_columns = tl.load(one + 9).to(tl.int32)
    rank = tl.load(one + 10).to(tl.int32)
    if is_aligned:
        # Without these hints elements would be loaded and stored one by one.
        base, out = tl.multiple_of(base, 16), tl.multiple_of(out, 16)
        left, right = tl.multiple_of(left, 16), tl.multiple_of(right, 16)
        base_stride, out_stride = tl.multiple_of(base_stride, 8), tl.multiple_of(out_stride, 8)
        right_stride = tl.multiple_of(right_stride, 8)
        num_columns = tl.multiple_of(num_columns, 8)
    left_stride = tl.multiple_of(left_stride, 16)
    across = tl.cdiv(num_columns, block)
    first_row = tl.program_id(0) // across * block
    if first_row < num_rows:
        rows = first_row + tl.arange(0, block)
        columns = tl.program_id(0) % across * block + tl.max_contiguous(tl.arange(0, block), block)
        is_row, is_column = rows[:, None] < num_rows, columns[None, :] < num_columns
        of_rows = rows.to(tl.int64)[:, None]
        ranks = tl.max_contiguous(tl.arange(0, block_rank), block_rank)
        mask = is_row & is_column
        # Begun before the products, which take as long as it takes to arrive.
        given = tl.load(base + of_rows * base_stride + columns[None, :], mask=mask, other=0)
        found = tl.zeros((block, block), dtype=tl.float32)
        for first in range(0, rank, block_rank):
            a = tl.load(left + of_rows * left_stride + (first + ranks)[None, :], mask=is_row, other=0.0)
            of_ranks = (first + ranks).to(tl.int64)[:, None]
            b = tl.load(right + of_ranks * right_stride + columns[None, :], mask=is_column, other=0.0)
            found = tl.dot(a, b, found, input_precision="ieee")
        tl.store(
            out + of_rows * out_stride + columns[None, :], bits_of(float32_of(given, dtype) + found, dtype), mask=mask
        )


_FACTORS = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def launch(additions: Sequence[Addition]) -> None:
    """Queue additions on the current stream; those of one dtype and alignment in one launch.

    Args:
        additions: On one device.
    """
    kinds: dict[tuple[torch.dtype, torch.dtype, bool], list[tuple[int, ...]]] = {}
    for one in additions:
        row = _row(one)
        kinds.setdefault((one.out.dtype, one.left.dtype, _is_aligned(row)), []).append(row)
    device = additions[0].out.device
    with torch.cuda.device_of(additions[0].out):  # the thread's own may be another
        for (dtype, factor, is_aligned), rows in kinds.items():
            name = str(dtype).removeprefix("torch.")
            table = torch.tensor(rows, dtype=torch.int64, device="cpu")
            if device.type == "cuda":  # from memory that the GPU reads by itself: this process does not wait for it
                table = table.pin_memory().to(device, non_blocking=True)
            num_tiles = max(-(-num_rows // BLOCK) * -(-num_columns // BLOCK) for *_, num_rows, num_columns, _ in rows)
            shape = (_FIELDS, BLOCK, RANK_MULTIPLE)
            _add_products[(num_tiles, len(rows))](
                table, *shape, name, BITS[name], _FACTORS[factor], is_aligned, num_warps=NUM_WARPS
            )


def _row(one: Addition) -> tuple[int, ...]:
    base, left, right, out = one
    return (
        *(base.data_ptr(), base.stride(0), out.data_ptr(), out.stride(0)),
        *(left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0)),
        *out.shape,
        left.shape[1],
    )


def _is_aligned(row: tuple[int, ...]) -> bool:
    """Return whether all rows begin at multiples of 16 bytes and of eight elements, and columns can be read in eights."""
    base, base_stride, out, out_stride, left, _, right, right_stride, _, num_columns, _ = row
    return (base_stride | out_stride | right_stride | num_columns) % 8 == 0 and (
        base | out | left | right
    ) % _ALIGNMENT == 0


__all__ = ["launch"]
