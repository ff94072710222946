"""How a bucket of full tensors becomes commands for the TP workers, and what their replies mean."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tpcolocate import ipc_payload
from tpcolocate.errors import some
from tpcolocate.in_server.tpcolocate_receiver.checksums import checksum
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, Command
from tpcolocate.weights.plan.loader_map import TracedOfRanks
from tpcolocate.weights.transport.connection import Replies
from tpcolocate.weights.transport.memory import PeakMemory
from tpcolocate.worker_errors import worker_details

PAYLOADS = ("per_rank", "fan_out")
"""``per_rank``: each rank exports the memory of its own device.  ``fan_out``: the owner exports one copy per TP rank."""
TRANSPORTS = ("auto", "ipc", "file")
"""``ipc``: handles of memory, opened and checked by our receiver.  ``file``: safetensors files, read by it.  ``auto``: ``ipc``
if a first small handle shows that it works, else ``file``."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The TP workers' replies to a bucket, combined.

    Attributes:
        opened: TP rank -> whether it opened its handle.
        problem: What went wrong; None if nothing did.
        details: The worker's traceback, if there is one.
        unverified: Tensors whose arrival cannot be read back.
        replayed: Whether every worker repeated planned copies instead of running the engine's loader.
        traced: TP rank -> tensor -> its copies, where the loader was traced.
        deviating: Tensors that the loader treated differently than traced before.
        step_seconds: Step inside the workers -> seconds, the slowest worker's.
        ignored: Tensors that no worker's loader read anything of, as may be.
        nonfinite: Tensors that left a NaN or an infinite number in the engine.
    """

    opened: dict[int, bool] = field(default_factory=dict)
    problem: str | None = None
    details: str | None = None
    unverified: tuple[str, ...] = ()
    replayed: bool = False
    traced: TracedOfRanks = field(default_factory=dict)
    deviating: tuple[str, ...] = ()
    step_seconds: dict[str, float] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    nonfinite: tuple[str, ...] = ()


def judge(
    replies: Replies, entries: Sequence[ipc_payload.Entry], may_be_ignored: Collection[str] = frozenset()
) -> Verdict:
    """Combine the workers' replies to one bucket.  Pure.

    Args:
        replies: Of all TP ranks.
        entries: Contents of the bucket.
        may_be_ignored: Tensors that the engine may read nothing of: it has them under another name, or does not use them.
    """
    opened = {rank: reply.opened for rank, reply in replies.items()}
    for rank, reply in replies.items():
        if reply.error is not None:
            return Verdict(opened, f"TP rank {rank}: {reply.error}", worker_details(reply))
        if reply.result.differing:
            names = some(reply.result.differing, between=", ")
            return Verdict(opened, f"TP rank {rank} holds other values than were sent: {names}")
    results = {rank: reply.result for rank, reply in replies.items()}
    unverified = {name for result in results.values() for name in result.unverified}
    read = {e.name: sum(result.read.get(e.name, 0) for result in results.values()) for e in entries}
    ignored = [e.name for e in entries if e.name in may_be_ignored and e.name not in unverified and not read[e.name]]
    taken = unverified.union(ignored)
    missed = [e.name for e in entries if e.name not in taken and read[e.name] < e.shape.numel()]
    if missed:
        return Verdict(opened, f"the engine took these tensors in part or not at all: {some(missed, between=', ')}")
    return Verdict(
        opened,
        unverified=tuple(sorted(unverified)),
        replayed=all(result.replayed for result in results.values()),
        traced={rank: result.traced for rank, result in results.items() if result.traced is not None},
        deviating=tuple(sorted({name for result in results.values() for name in result.deviating or ()})),
        step_seconds=slowest(replies),
        ignored=tuple(ignored),
        nonfinite=tuple(sorted({name for result in results.values() for name in result.nonfinite or ()})),
    )


def slowest(replies: Replies) -> dict[str, float]:
    """Return step inside the workers -> seconds, the slowest worker's."""
    seconds = [reply.result.step_seconds for reply in replies.values() if reply.result is not None]
    steps = sorted({step for of_worker in seconds for step in of_worker})
    return {step: max(of_worker.get(step, 0.0) for of_worker in seconds) for step in steps}


class BucketFiles:
    """The files of one sync, for the transport ``file``.

    Args:
        folder: Where they go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: dict[int, Path] = {}

    def write(self, flat: torch.Tensor, session: str, number: int) -> dict[str, Any]:
        """Write a bucket; return it in the form of a handle, for any number of readers."""
        path = self._paths[number] = self._folder / f"tpcolocate-{session}-{number}.safetensors"
        return ipc_payload.write_file(flat, path)

    def remove(self, number: int | None = None) -> None:
        """Remove a bucket's file, if there is one; without a number, all that are left."""
        for one in [number] if number is not None else list(self._paths):
            if (path := self._paths.pop(one, None)) is not None:
                path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class BucketSender:
    """One rank's way of making commands out of buckets, for the length of one sync.

    Attributes:
        tp_rank: This rank's position in the slice.
        tp_size: Ranks of the slice.
        is_owner: Whether this rank talks to the engine.
        payloads: One of `PAYLOADS`.
        transport: ``ipc`` or ``file``.
        session: Name of the sync's session.
        files: Of this sync.
        ledger: Of this sync.
        peak: Of this sync.
    """

    tp_rank: int
    tp_size: int
    is_owner: bool
    payloads: str
    transport: str
    session: str
    files: BucketFiles
    ledger: ipc_payload.Ledger
    peak: PeakMemory

    @property
    def exports(self) -> bool:
        """Whether this rank makes any commands."""
        if self.transport == "file":
            return self.is_owner
        return self.payloads == "per_rank" or self.is_owner

    @property
    def readers(self) -> list[int]:
        """TP ranks that this rank makes commands for."""
        if not self.exports:
            return []
        all_ranks = self.transport == "file" or self.payloads == "fan_out"
        return list(range(self.tp_size)) if all_ranks else [self.tp_rank]

    def commands(
        self, flat: torch.Tensor | None, number: int, make: Callable[[Any, list[int]], Command]
    ) -> list[Addressed]:
        """Return this rank's commands for one bucket, in tp order of their readers, each with a handle of its own.

        Args:
            flat: The bucket; None on ranks that export nothing.
            number: Of the command.
            make: A command from a handle and the checksum of the bucket.
        """
        if flat is None:
            return []
        total = list(checksum(flat))
        if self.transport == "file":
            file = self.files.write(flat, self.session, number)
            return [Addressed(reader, make(file, total)) for reader in self.readers]
        return [
            Addressed(reader, make(self._export(flat, reader, number).describe(), total)) for reader in self.readers
        ]

    def _export(self, flat: torch.Tensor, reader: int, number: int) -> ipc_payload.Handle:
        """A handle for one reader, and for no other."""
        if reader != self.readers[0] and not flat.is_cuda:
            # A CPU file has one counter for all its readers: a copy for each tells them apart.
            flat = ipc_payload.allocate(flat.numel(), flat.device).copy_(flat)
            self.peak.note()
        return self.ledger.export(flat, tp_rank=reader, bucket=number)


__all__ = ["PAYLOADS", "TRANSPORTS", "BucketFiles", "BucketSender", "Verdict", "judge", "slowest"]
