"""What is known of an engine's loader: which parts of which tensor every TP rank reads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tpcolocate import ipc_payload
from tpcolocate.weights.moves import ReadsOfRanks, is_read_whole, reads_of


class Knowledge:
    """Told by the receivers after they watched a load; the same on every rank of the slice.

    Attributes:
        reads: Tensor -> what each TP rank reads of it.
    """

    def __init__(self) -> None:
        self.reads: dict[str, ReadsOfRanks] = {}
        self._kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._holders: tuple[str, ...] = ()
        self._digest: tuple[tuple[str, ...], int] | None = None
        # The layers of a model are told of in the same words.
        self._understood: dict[str, ReadsOfRanks | None] = {}

    def confirm(self, holders: Sequence[str]) -> bool:
        """Forget everything if the workers have: their parameters moved, or they are others.

        Args:
            holders: What the workers call their own knowledge, in tp order.

        Returns:
            Whether they still know what they did.
        """
        if tuple(holders) == self._holders:
            return True
        self.reads, self._kinds = {}, {}
        self._holders = tuple(holders)
        self._digest = None
        return False

    def learn(self, told: Mapping[int, Mapping[str, Any]], entries: Sequence[ipc_payload.Entry], tp_size: int) -> None:
        """Take in what the workers tell of a bucket.

        Args:
            told: TP rank -> tensor -> its copies; tensors that a worker cannot tell of are missing.
            entries: What the bucket held.
            tp_size: Number of workers.
        """
        self._digest = None
        for entry in entries:
            self.reads.pop(entry.name, None)
            described = [told.get(tp_rank, {}).get(entry.name) for tp_rank in range(tp_size)]
            words = repr((described, tuple(entry.shape)))
            if words not in self._understood:
                self._understood[words] = _understand(described, entry.shape)
            known = self._understood[words]
            if known is not None:
                self.reads[entry.name] = known
                self._kinds[entry.name] = (tuple(entry.shape), entry.dtype)

    def covers(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> bool:
        """Whether it is known what is read of such a tensor."""
        return name in self.reads and self._kinds[name] == (tuple(shape), dtype)

    def digest(self, names: Sequence[str]) -> int:
        """A number that is the same where the same is read of the same tensors."""
        if self._digest is not None and self._digest[0] == tuple(names):
            return self._digest[1]
        content = repr([(name, self.reads[name]) for name in names]).encode()
        self._digest = tuple(names), int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
        return self._digest[1]


def _understand(described: Sequence[Any], shape: Sequence[int]) -> ReadsOfRanks | None:
    """What the TP ranks read; None unless all of them can tell, and read the whole tensor together."""
    found = [None if of_rank is None else reads_of(of_rank, shape) for of_rank in described]
    known = tuple(of_rank for of_rank in found if of_rank is not None)
    return known if len(known) == len(described) and is_read_whole(known, shape) else None


__all__ = ["Knowledge"]
