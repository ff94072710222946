"""Sums over memory, computed alike by the trainer and the worker, on CPU and GPU (integers wrap)."""

from __future__ import annotations

import torch

_ROW_WORDS = 1024


def checksum(data: torch.Tensor) -> tuple[int, int]:
    """Two 64-bit sums of a flat uint8 tensor, weighted by position along rows and along columns.

    Any flipped bit changes both.  Moved words, rows and blocks change at least one, but for words that differ in
    nothing except their highest bits (the weights of a sum that no flipped bit escapes differ by even numbers).  Two
    passes over the data and no copy of it.  Computed alike on CPU and GPU (integers wrap).

    Args:
        data: One-dimensional, contiguous, starting at a multiple of 8 bytes.
    """
    num_words = data.numel() // 8
    num_rows = num_words // _ROW_WORDS
    words = data[: num_words * 8].view(torch.int64)
    rows = words[: num_rows * _ROW_WORDS].view(num_rows, _ROW_WORDS)
    rest = torch.zeros(_ROW_WORDS + 8, dtype=torch.int64, device=data.device)
    left = words[num_rows * _ROW_WORDS :]
    rest[: left.numel()] = left
    tail = data[num_words * 8 :]
    rest[_ROW_WORDS : _ROW_WORDS + tail.numel()] = tail.to(torch.int64)
    by_row = (rows.sum(1) * _odd(num_rows, data.device)).sum()
    by_column = (rows.sum(0) * _odd(_ROW_WORDS, data.device)).sum()
    extra = (rest * _odd(rest.numel(), data.device)).sum()
    found = torch.stack([by_row + extra, by_column - extra]).tolist()
    return found[0], found[1]


def _odd(count: int, device: torch.device) -> torch.Tensor:
    # Odd weights: multiplication by one is invertible modulo 2^64, so no single change can vanish.
    return torch.arange(count, dtype=torch.int64, device=device) * 2 + 1


def word_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of the 64-bit words of a tensor's elements in order: one pass, no copy where rows are whole words.

    The same for two tensors of equal shape, dtype and contents, however each lies in memory.  Any flipped bit changes
    it.  Not sensitive to words that trade places: it compares two ends of a copy whose course is known.

    Args:
        tensor: Any shape and dtype, on any device.

    Returns:
        A scalar int64 tensor on the same device; reading it waits for the device.
    """
    return words(tensor).sum()


def words(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory as int64, in its order; a view where that is possible.  The last word is filled with zeros."""
    seen = word_view(tensor)
    if seen is not None:
        return seen
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    filled = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8, device=tensor.device)
    filled[: flat.numel()] = flat
    return filled.view(torch.int64)


def word_view(tensor: torch.Tensor) -> torch.Tensor | None:
    """A tensor's memory as int64, in its order; None unless its rows are whole words, each where one can start."""
    size = tensor.element_size()
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    whole_rows = tensor.shape[-1] * size % 8 == 0 and tensor.stride(-1) == 1
    if whole_rows and all(n * size % 8 == 0 for n in (tensor.storage_offset(), *tensor.stride()[:-1])):
        return tensor.view(torch.int64)
    return None
