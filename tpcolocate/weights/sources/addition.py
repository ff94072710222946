"""What a kernel adds to the weights of a model: products of factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

RANK_MULTIPLE = 16
"""Ranks are filled up to a multiple, which is what the kernel multiplies at once."""


class Addition(NamedTuple):
    """A product that is added to a region of a base; the rows of all of them are dense.

    Attributes:
        base: [rows, columns].
        left: [rows, rank], the rank a multiple of `RANK_MULTIPLE`.
        right: [rank, columns], of the dtype of `left`.
        out: What the sum is written to, of the dtype of `base`.
    """

    base: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    out: torch.Tensor


Adder = Callable[[Sequence[Addition]], None]
"""Queues additions on the current stream."""

__all__ = ["RANK_MULTIPLE", "Adder", "Addition"]
