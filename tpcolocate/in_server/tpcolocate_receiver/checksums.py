"""Checksums of memory, computed alike by the trainer and the worker, on CPU and GPU (integers wrap)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_ROW_WORDS = 1024


def checksum(data: torch.Tensor) -> tuple[int, int]:
    """Return two 64-bit sums of a flat uint8 tensor, weighted by position along rows and along columns.

    Any flipped bit changes both.  Moved words, rows and blocks change at least one, unless the words differ in their
    highest bits alone (all weights are odd, so that they differ by even numbers).  Takes two passes over the data and
    no copy of it.

    Args:
        data: One-dimensional, contiguous, starting at a multiple of 8 bytes.
    """
    num_rows = data.numel() // (8 * _ROW_WORDS)
    end = num_rows * 8 * _ROW_WORDS
    # The rest, less than a row, is summed up on the host: for so little, a GPU would spend its time starting kernels.
    extra = _sum_of_rest(data[end:].cpu())
    if num_rows == 0:
        return _wrapped(extra), _wrapped(-extra)
    rows = data[:end].view(torch.int64).view(num_rows, _ROW_WORDS)
    by_row = (rows.sum(1) * _odd(num_rows, data.device)).sum()
    by_column = (rows.sum(0) * _odd(_ROW_WORDS, data.device)).sum()
    found = torch.stack([by_row, by_column]).tolist()
    return _wrapped(found[0] + extra), _wrapped(found[1] - extra)


def load_kernels(device: torch.device) -> None:
    """Load the GPU kernels of checksums and comparisons, which would otherwise happen at their first use."""
    if device.type != "cuda":
        return
    data = torch.zeros(16 * 8 * _ROW_WORDS, dtype=torch.uint8, device=device)
    checksum(data)
    rows = data.view(torch.int64).view(-1, _ROW_WORDS)
    found = torch.empty(2, dtype=torch.int64, device=device)
    for part, out in zip((rows, rows[:, :8]), found.unbind()):
        torch.sum(part, dim=(0, 1), out=out)
        part.copy_(part.clone())
    flags = torch.stack([torch.ne(rows, rows).any(), torch.ne(rows[0], rows[1]).any()])
    flags.tolist()


def _sum_of_rest(data: torch.Tensor) -> int:
    whole = data.numel() // 8 * 8
    rest = torch.zeros(_ROW_WORDS + 8, dtype=torch.int64, device="cpu")
    rest[: whole // 8] = data[:whole].view(torch.int64)
    rest[_ROW_WORDS : _ROW_WORDS + data.numel() - whole] = data[whole:]
    return int((rest * _odd(rest.numel(), rest.device)).sum())


def _odd(count: int, device: torch.device) -> torch.Tensor:
    # Odd weights: multiplication by one is invertible modulo 2^64, so no single change can vanish.
    return torch.arange(1, 2 * count + 1, 2, dtype=torch.int64, device=device)


def _wrapped(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def word_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of the 64-bit words of a tensor's elements: one pass, no copy where rows are whole words.

    The same for two tensors of equal shape, dtype and contents, however each lies in memory.  Any flipped bit changes
    it, swapped words do not: it compares both ends of a copy.

    Args:
        tensor: Any shape and dtype, on any device.

    Returns:
        A scalar int64 tensor on the same device; reading it waits for the device.
    """
    return words(tensor).sum()


def words(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements as int64, a view where possible; the last word is filled up with zeros."""
    view = word_view(tensor)
    if view is not None:
        return view
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    filled = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8, device=tensor.device)
    filled[: flat.numel()] = flat
    return filled.view(torch.int64)


def word_view(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a view of a tensor as int64; None unless its rows are whole, aligned words."""
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    size, strides = tensor.element_size(), tensor.stride()
    if strides[-1] != 1 or tensor.shape[-1] * size % 8 or tensor.storage_offset() * size % 8:
        return None
    for stride in strides[:-1]:
        if stride * size % 8:
            return None
    return tensor.view(torch.int64)


def are_finite(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Return for each tensor whether all its numbers are finite; integers are.

    One pass over each of them.  Waits for the device.

    Args:
        tensors: Any shapes, on any devices.
    """
    # A sum is infinite or NaN if one of its numbers is.  What it says otherwise is checked: large numbers overflow.
    sums: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
    for number, one in enumerate(tensors):
        if one.dtype in _SUMMED_AS and one.numel():
            total = one.sum(dtype=_SUMMED_AS[one.dtype]).double()
            sums.setdefault(one.device, []).append((number, total))
    found = [True] * len(tensors)
    for pairs in sums.values():
        totals = torch.stack([total for _, total in pairs]).tolist()
        for (number, _), total in zip(pairs, totals):
            if not math.isfinite(total):
                found[number] = bool(torch.isfinite(tensors[number]).all())
    return found


_SUMMED_AS = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
