"""What is known of an engine's loader: which parts of which tensor every TP rank reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from tpcolocate.weights.plan.slices import ReadsOfRanks, is_read_whole, reads_of

Kind = tuple[str, str]
"""A tensor's name without its numbers, and what is read of it: the loader treats tensors of one kind alike."""


class Described(Protocol):
    """A tensor by its description."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...


class LoaderMap:
    """Told by the receivers after they watched a load, or the rehearsal of one; the same on every rank of the slice.

    Attributes:
        reads: Tensor -> what each TP rank reads of it.
    """

    def __init__(self) -> None:
        self.reads: dict[str, ReadsOfRanks] = {}
        self._types: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._kinds: dict[str, Kind] = {}
        self._verified: set[Kind] = set()
        self._rehearsed: set[tuple[str, tuple[int, ...], torch.dtype]] = set()
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
        self.forget()
        self._holders = tuple(holders)
        return False

    def forget(self) -> None:
        """Know nothing, of nobody."""
        self.reads, self._types, self._kinds = {}, {}, {}
        self._verified, self._rehearsed = set(), set()
        self._holders = ()
        self._digest = None

    def learn(
        self, told: Mapping[int, Mapping[str, Any]], entries: Sequence[Described], tp_size: int, *, loaded: bool
    ) -> None:
        """Take in what the workers tell.

        Args:
            told: TP rank -> tensor -> its copies; tensors that a worker cannot tell of are missing.
            entries: What the loader was given.
            tp_size: Number of workers.
            loaded: Whether the loader has moved weights, and what arrived was compared; otherwise it has rehearsed that.
        """
        self._digest = None
        for entry in entries:
            shape = tuple(entry.shape)
            self.reads.pop(entry.name, None)
            described = [told.get(tp_rank, {}).get(entry.name) for tp_rank in range(tp_size)]
            words = repr((described, shape))
            if words not in self._understood:
                self._understood[words] = _understand(described, shape)
            known = self._understood[words]
            if known is not None:
                self.reads[entry.name] = known
                self._types[entry.name] = (shape, entry.dtype)
                self._kinds[entry.name] = kind = (_NUMBER.sub("#", entry.name), words)
                if loaded:
                    self._verified.add(kind)
            if not loaded:
                self._rehearsed.add((entry.name, shape, entry.dtype))

    @property
    def is_empty(self) -> bool:
        """Whether the workers have told nothing yet, not even that there is nothing to tell."""
        return not self.reads and not self._rehearsed

    def was_rehearsed(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> bool:
        """Whether a rehearsal has told all that it can of such a tensor."""
        return (name, tuple(shape), dtype) in self._rehearsed

    def samples(self, names: Sequence[str]) -> list[str]:
        """One of each kind, the first."""
        of_kind: dict[Kind, str] = {}
        for name in names:
            of_kind.setdefault(self._kinds[name], name)
        return list(of_kind.values())

    def is_verified(self, names: Sequence[str]) -> bool:
        """Whether the engine's loader has been seen at work with all kinds of these tensors."""
        return self._verified.issuperset(self._kinds[name] for name in names)

    def covers(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> bool:
        """Whether it is known what is read of such a tensor."""
        return name in self.reads and self._types[name] == (tuple(shape), dtype)

    def digest(self, names: Sequence[str]) -> int:
        """A number that is the same where the same is read of the same tensors."""
        if self._digest is not None and self._digest[0] == tuple(names):
            return self._digest[1]
        content = repr([(name, self.reads[name]) for name in names]).encode()
        self._digest = tuple(names), int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
        return self._digest[1]


_NUMBER = re.compile(r"\d+")


def _understand(described: Sequence[Any], shape: Sequence[int]) -> ReadsOfRanks | None:
    """What the TP ranks read; None unless all of them can tell, and read the whole tensor together."""
    found = [None if of_rank is None else reads_of(of_rank, shape) for of_rank in described]
    known = tuple(of_rank for of_rank in found if of_rank is not None)
    return known if len(known) == len(described) and is_read_whole(known, shape) else None


__all__ = ["LoaderMap"]
