"""The loader map: which parts of which tensor every TP rank reads, as traced from the engine's own loader."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tpcolocate.weights.plan.slices import ReadsOfRanks, is_read_whole, reads_of

Kind = tuple[str, str]
"""A tensor's name without its numbers, and what is read of it: the loader treats tensors of one kind alike."""


class Entry(Protocol):
    """A tensor by its description."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """An `Entry`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


Description = tuple[str, tuple[int, ...], torch.dtype]
TracedOfRanks = Mapping[int, Mapping[str, Any]]
"""TP rank -> tensor -> its copies, as `reads_of` takes them; tensors that a worker could not trace are missing."""


class LoaderMap:
    """What the receivers reported after they traced a load, or a dry run of one; the same on every rank of the slice.

    Attributes:
        reads: Tensor -> what each TP rank reads of it.
        ignored: Tensors of the checkpoint of which no TP rank reads anything; empty as long as that is not known.
        ignored_at_launch: The same as seen before the first sync; None if it was not.
        is_complete: Whether the workers were asked how the loader handles the whole checkpoint.
    """

    def __init__(self) -> None:
        self.reads: dict[str, ReadsOfRanks] = {}
        self.ignored: frozenset[str] = frozenset()
        self.is_complete = False
        self.ignored_at_launch: frozenset[str] | None = None
        self._joined: dict[str, int] = {}
        self._types: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._kinds: dict[str, Kind] = {}
        self._verified: set[Kind] = set()
        self._traced: set[Description] = set()
        self._plan_ids: tuple[str, ...] = ()
        self._digest: tuple[tuple[str, ...], int] | None = None
        # The layers of a model are reported in the same words.
        self._parsed: dict[str, ReadsOfRanks | None] = {}

    def is_current(self, plan_ids: Sequence[str]) -> bool:
        """Return whether the workers still have what they traced; discard everything if not.

        Their parameters may have moved, or they are other workers.

        Args:
            plan_ids: Identities of the workers' copy plans, in tp order.
        """
        if tuple(plan_ids) == self._plan_ids:
            return True
        self.clear()
        self._plan_ids = tuple(plan_ids)
        return False

    def clear(self) -> None:
        """Discard everything traced from the loader."""
        self.reads, self._types, self._kinds = {}, {}, {}
        self._verified, self._traced = set(), set()
        self._plan_ids = ()
        self._digest = None
        self.ignored, self.is_complete, self._joined = frozenset(), False, {}

    def note_handling(
        self, ignored: Sequence[Iterable[str] | None], joined: Sequence[Iterable[Sequence[str]]], of: Iterable[str]
    ) -> None:
        """Enter how the loader handled the tensors of the whole checkpoint in a dry run.

        Args:
            ignored: Of each TP rank, what its loader reads nothing of; None if it could not be traced.
            joined: Of each TP rank, lists of tensors that its loader loads only together.
            of: All tensors of the checkpoint.
        """
        self.is_complete = True
        names = frozenset(of)
        traced = [frozenset(one) for one in ignored if one is not None]
        self.ignored = names.intersection(*traced) if traced and len(traced) == len(ignored) else frozenset()
        self._joined = {}
        for number, group in enumerate(sorted(merged(group for of_rank in joined for group in of_rank), key=min)):
            self._joined |= dict.fromkeys(group & names, number)

    def group_of(self, name: str) -> int | None:
        """Return a number that tensors share which the loader loads only together; None for all others."""
        return self._joined.get(name)

    def split_groups(self, names: Iterable[str]) -> list[list[str]]:
        """Return the groups, sorted, of which some tensors are among these names and some are not."""
        if not self._joined:
            return []
        given = frozenset(names)
        groups: dict[int, list[str]] = {}
        for name, number in sorted(self._joined.items()):
            groups.setdefault(number, []).append(name)
        return [group for group in groups.values() if 0 < len(given.intersection(group)) < len(group)]

    def group_sizes(self) -> dict[int, int]:
        """Return how many tensors each of the groups has."""
        return dict(Counter(self._joined.values()))

    def handling_digest(self) -> int:
        """Return a number that is the same where the same tensors are ignored and joined; 0 if none are."""
        if not self.ignored and not self._joined:
            return 0
        content = repr((sorted(self.ignored), sorted(self._joined.items()))).encode()
        return int.from_bytes(hashlib.sha256(content).digest()[:7], "big") or 1

    def update(self, traced: TracedOfRanks, entries: Sequence[Entry], tp_size: int, *, loaded: bool) -> None:
        """Enter what the workers traced.

        Args:
            traced: By every TP rank; tensors of which the same is read best share the object that says so.
            entries: What the loader was given.
            tp_size: Number of workers.
            loaded: Whether the loader moved weights and what arrived was compared; otherwise it was a dry run.
        """
        self._digest = None
        of_ranks = [traced.get(tp_rank, {}) for tp_rank in range(tp_size)]
        # By identity, which is good for as long as `traced` is there.
        words_of: dict[tuple[object, ...], str] = {}
        for entry in entries:
            shape = tuple(entry.shape)
            self.reads.pop(entry.name, None)
            copies = [of_rank.get(entry.name) for of_rank in of_ranks]
            key = (shape, *map(id, copies))
            words = words_of.get(key)
            if words is None:
                words = words_of[key] = repr((copies, shape))
                if words not in self._parsed:
                    self._parsed[words] = _parse(copies, shape)
            reads = self._parsed[words]
            if reads is not None:
                self.reads[entry.name] = reads
                self._types[entry.name] = (shape, entry.dtype)
                self._kinds[entry.name] = kind = (_NUMBER.sub("#", entry.name), words)
                if loaded:
                    self._verified.add(kind)
            if not loaded:
                self._traced.add((entry.name, shape, entry.dtype))

    @property
    def is_empty(self) -> bool:
        """Whether the workers have traced nothing yet, not even that there is nothing to trace."""
        return not self.reads and not self._traced

    def is_traced(self, entry: Entry) -> bool:
        """Return whether a trace has shown all that it can of such a tensor."""
        return self.covers(entry) or (entry.name, tuple(entry.shape), entry.dtype) in self._traced

    def covers(self, entry: Entry) -> bool:
        """Return whether it is known what is read of such a tensor."""
        return entry.name in self.reads and self._types[entry.name] == (tuple(entry.shape), entry.dtype)

    def samples(self, names: Sequence[str]) -> list[str]:
        """Return one tensor of each kind, the first."""
        of_kind: dict[Kind, str] = {}
        for name in names:
            of_kind.setdefault(self._kinds[name], name)
        return list(of_kind.values())

    def is_verified(self, names: Sequence[str]) -> bool:
        """Return whether the engine's loader has been seen at work with all kinds of these tensors."""
        return self._verified.issuperset(self._kinds[name] for name in names)

    def digest(self, names: Sequence[str]) -> int:
        """Return a number that is the same where the same is read of the same tensors."""
        if self._digest is not None and self._digest[0] == tuple(names):
            return self._digest[1]
        # What is read of most tensors is the same object as of others, so it is described once.
        distinct = {id(reads): reads for reads in (self.reads[name] for name in names)}
        numbers: dict[str, int] = {}
        number_of = {key: numbers.setdefault(repr(reads), len(numbers)) for key, reads in distinct.items()}
        content = repr((list(names), [number_of[id(self.reads[name])] for name in names], list(numbers)))
        self._digest = tuple(names), int.from_bytes(hashlib.sha256(content.encode()).digest()[:7], "big")
        return self._digest[1]


def merged(groups: Iterable[Iterable[str]]) -> list[set[str]]:
    """Merge groups of names that have some in common."""
    group_of: dict[str, set[str]] = {}
    for group in groups:
        one = set(group)
        for other in {id(found): found for name in group if (found := group_of.get(name)) is not None}.values():
            one |= other
        group_of |= dict.fromkeys(one, one)
    return list({id(one): one for one in group_of.values()}.values())


_NUMBER = re.compile(r"\d+")


def _parse(copies: Sequence[Any], shape: Sequence[int]) -> ReadsOfRanks | None:
    """What the TP ranks read; None unless all of them traced it, and read the whole tensor together."""
    reads = [None if of_rank is None else reads_of(of_rank, shape) for of_rank in copies]
    complete = tuple(of_rank for of_rank in reads if of_rank is not None)
    return complete if len(complete) == len(copies) and is_read_whole(complete, shape) else None


__all__ = ["Entry", "LoaderMap", "TensorEntry", "TracedOfRanks"]
