"""How a bucket becomes payloads, reaches the engine, and what its workers answer.

`BucketSender` belongs to one sync on one rank.  Making payloads is local to every rank; handing them over is the owner's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from tpcolocate import ipc_payload
from tpcolocate.errors import some
from tpcolocate.in_server.tpcolocate_receiver.checksums import checksum
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, LoadBucket, Probe, Reply
from tpcolocate.worker_errors import worker_details

PAYLOADS = ("per_rank", "fan_out")
"""``per_rank``: each rank exports the memory of its own device.  ``fan_out``: the owner exports one copy per TP rank."""
TRANSPORTS = ("auto", "ipc", "file", "stock")
"""``ipc``: handles, opened and checked by our receiver.  ``file``: safetensors files, read by it.  ``stock``: handles,
opened by SGLang itself, unchecked.  ``auto``: ``ipc`` if a first small handle proves that it works, else ``file``."""

Replies = Mapping[int, Reply]
"""TP rank -> what its receiver answered."""


class Workers(Protocol):
    """The receivers in the TP workers, for the length of a sync; used on the owner only."""

    def greet(self, *, timeout_s: float) -> dict[int, Reply]: ...
    def post(self, commands: Mapping[int, Addressed], number: int) -> None: ...
    def collect(self, number: int, *, timeout_s: float) -> dict[int, Reply]: ...
    def dismiss(self) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class WeightServer(Protocol):
    """What a sync needs of the engine; used on the owner only."""

    def hold_generation(self, *, timeout_s: float) -> Future[None]: ...
    def cancel_sync(self, *, timeout_s: float) -> None: ...
    def push(self, payloads: Sequence[str], *, load_format: str, timeout_s: float) -> None: ...
    def await_workers(self, path: Path, *, tp_size: int) -> Workers: ...
    def call_workers(self, workers: Any, session: str, *, loader: str, tp_size: int, timeout_s: float) -> None: ...
    def end_sync(self, version: str, *, workers: Workers | None = None, timeout_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the TP workers said of a bucket, drawn together on the owner.

    Attributes:
        opened: TP rank -> whether it mapped its handle; empty if the engine cannot say.
        problem: What is wrong, in words; None if nothing is.
        details: The worker's traceback, if there is one.
        unproven: Tensors whose arrival cannot be read back.
        replayed: Whether every worker repeated known copies instead of running the engine's loader.
        learned: TP rank -> tensor -> its copies, where the loader was watched; see `moves.reads_of`.
        otherwise: Tensors that the loader treated otherwise than was learned.
        worker_seconds: Step inside the workers -> seconds, the slowest worker's.
    """

    opened: dict[int, bool] = field(default_factory=dict)
    problem: str | None = None
    unproven: tuple[str, ...] = ()
    replayed: bool = False
    learned: dict[int, dict[str, Any]] = field(default_factory=dict)
    otherwise: tuple[str, ...] = ()
    worker_seconds: dict[str, float] = field(default_factory=dict)
    details: str | None = None


def judge(replies: Replies, entries: Sequence[ipc_payload.Entry]) -> Verdict:
    """Draw the workers' replies to one bucket together.  Pure.

    Args:
        replies: TP rank -> answer of `tpcolocate_receiver`.
        entries: What the bucket held.
    """
    opened = {rank: reply.opened for rank, reply in replies.items()}
    for rank, reply in replies.items():
        if reply.error is not None:
            return Verdict(opened, f"TP rank {rank}: {reply.error}", details=worker_details(reply))
        if reply.result.differing:
            return Verdict(
                opened,
                f"TP rank {rank} holds other values than were sent: {some(reply.result.differing, between=', ')}",
            )
    results = {rank: reply.result for rank, reply in replies.items()}
    unproven = {name for result in results.values() for name in result.unverified}
    read = {e.name: sum(result.read.get(e.name, 0) for result in results.values()) for e in entries}
    missed = [e.name for e in entries if e.name not in unproven and read[e.name] < e.shape.numel()]
    if missed:
        return Verdict(opened, f"the engine took these tensors in part or not at all: {some(missed, between=', ')}")
    return Verdict(
        opened,
        None,
        tuple(sorted(unproven)),
        all(result.replayed for result in results.values()),
        {rank: result.traced for rank, result in results.items() if result.traced is not None},
        tuple(sorted({name for result in results.values() for name in result.deviating or ()})),
        slowest(replies),
    )


def slowest(replies: Replies) -> dict[str, float]:
    """Step inside the workers -> seconds, the slowest worker's."""
    of_workers = [reply.result.step_seconds for reply in replies.values()]
    return {step: max(seconds.get(step, 0.0) for seconds in of_workers) for step in sorted(set().union(*of_workers))}


@dataclass(slots=True)
class BucketSender:
    """One rank's way of handing buckets to the engine.

    Attributes:
        tp_rank: This rank's position in the slice.
        tp_size: Ranks of the slice.
        is_owner: Whether this rank talks to the engine.
        payloads: One of `PAYLOADS`.
        transport: One of `TRANSPORTS`; ``auto`` is resolved by the preflight.
        file_folder: Where files go.
        ledger: Of this sync.
        copied: Called after a bucket was copied, for the memory report.
        session: Told by the owner; keeps the files of different syncs apart.
        workers: On the owner: the TP workers, while a sync is open.
    """

    tp_rank: int
    tp_size: int
    is_owner: bool
    payloads: str
    transport: str
    file_folder: Path
    ledger: ipc_payload.Ledger
    copied: Callable[[], None]
    session: str = ""
    workers: Workers | None = None

    @property
    def exports(self) -> bool:
        """Whether this rank makes payloads."""
        if self.transport == "file":
            return self.is_owner
        return self.payloads == "per_rank" or self.is_owner

    @property
    def readers(self) -> list[int]:
        """TP ranks that this rank makes payloads for."""
        if not self.exports:
            return []
        everybody = self.transport == "file" or self.payloads == "fan_out"
        return list(range(self.tp_size)) if everybody else [self.tp_rank]

    def make(
        self, flat: torch.Tensor | None, entries: list[ipc_payload.Entry], number: int, **asked: bool
    ) -> list[Any]:
        """This rank's payloads (``stock``) or commands for one bucket, in tp order of their readers.

        Args:
            flat: The bucket; None on ranks that export nothing.
            entries: What it holds.
            number: Of the command.
            asked: ``report_trace`` and ``watch`` of `LoadBucket`.
        """
        if flat is None:
            return []
        if self.transport == "stock":
            return [ipc_payload.payload(self.exported(flat, reader, number), entries) for reader in self.readers]
        return self.commands(flat, LoadBucket, number=number, entries=ipc_payload.described(entries), **asked)

    def commands(
        self, flat: torch.Tensor, kind: type[LoadBucket] | type[Probe], *, number: int, **fields: Any
    ) -> list[Addressed]:
        """Commands for the receiver, one per reader, each with a handle of its own."""
        sums = checksum(flat)
        file: dict[str, Any] | None = None
        if self.transport == "file":
            file = ipc_payload.write_file(flat, self.file(number))
        return [
            Addressed(
                reader,
                kind(file if file is not None else self.exported(flat, reader, number).describe(), sums, **fields),
            )
            for reader in self.readers
        ]

    def exported(self, flat: torch.Tensor, reader: int, number: int) -> ipc_payload.Handle:
        """A handle for one reader, and for no other."""
        if reader != self.readers[0] and not flat.is_cuda:
            # A CPU file has one counter for all its readers: a copy each tells them apart.
            flat = ipc_payload.allocate(flat.numel(), flat.device).copy_(flat)
            self.copied()
        return self.ledger.export(flat, tp_rank=reader, bucket=number)

    def load(
        self, server: WeightServer, payloads: list[Any], entries: list[ipc_payload.Entry], number: int, timeout_s: float
    ) -> Verdict:
        """On the owner: hand a bucket to the engine, and judge what its workers say."""
        try:
            if self.transport == "stock":
                server.push(payloads, load_format="flattened_bucket", timeout_s=timeout_s)
                return Verdict(unproven=tuple(entry.name for entry in entries))
            return judge(self.ask(payloads, number, timeout_s), entries)
        finally:
            if self.transport == "file":
                self.file(number).unlink(missing_ok=True)

    def ask(self, commands: list[Addressed], number: int, timeout_s: float) -> Replies:
        """On the owner: send one command to each TP rank; their answers."""
        assert self.workers is not None
        self.workers.post(dict(enumerate(commands)), number)
        return self.workers.collect(number, timeout_s=timeout_s)

    def file(self, number: int) -> Path:
        return self.file_folder / f"tpcolocate-{self.session}-{number}.safetensors"


__all__ = [
    "PAYLOADS", "TRANSPORTS", "BucketSender", "Replies", "Verdict", "WeightServer", "Workers", "judge", "slowest", "some",
]  # fmt: skip
