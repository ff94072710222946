"""One weight sync: gather in lockstep, one payload per TP rank, agreement after every phase.

Every rank of the slice runs the same phases for the same buckets.  After each phase the ranks exchange ok-or-error;
the first error is raised on all of them, and nobody enters the next gather alone.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch.distributed.tensor import DTensor

from tpcolocate import ipc_payload
from tpcolocate.errors import ConfigError, DeadlineError, RankLostError, TpColocateError, WeightsMismatchError
from tpcolocate.groups import RankGroup
from tpcolocate.report import RankReport, Stopwatch, SyncReport
from tpcolocate.weights.source import Source, Weights, full_tensor
from tpcolocate.weights.spec import ModelSpec

T = TypeVar("T")

PAYLOADS = ("per_rank", "fan_out")
"""``per_rank``: each rank exports the memory of its own device.  ``fan_out``: the owner exports one copy per TP rank."""


class WeightServer(Protocol):
    """What a sync needs of the engine; used on the owner only."""

    def begin_sync(self, *, timeout_s: float) -> None: ...
    def push_bucket(self, payloads: Sequence[str], *, timeout_s: float) -> None: ...
    def end_sync(self, version: str, *, timeout_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """How weights travel.

    Attributes:
        bucket_bytes: Staging memory of a sync, in bytes; a larger tensor gets a bucket of its own.
        payloads: One of `PAYLOADS`.
        partial: Weights that are not sent stay as they are, instead of being an error.
    """

    bucket_bytes: int = 512 * 2**20
    payloads: str = "per_rank"
    partial: bool = False

    def __post_init__(self) -> None:
        if self.bucket_bytes <= 0:
            raise ConfigError(f"bucket_bytes={self.bucket_bytes} is not positive")
        if self.payloads not in PAYLOADS:
            raise ConfigError(f"payloads={self.payloads!r} is unknown", hint=f"one of {', '.join(PAYLOADS)}")


def buckets(weights: Weights, bucket_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Cut the stream into buckets of at most `bucket_bytes`, in order; the sizes are those of the full tensors."""
    bucket: list[tuple[str, torch.Tensor]] = []
    used = 0
    for name, tensor in weights:
        size = tensor.shape.numel() * tensor.dtype.itemsize
        if bucket and used + size > bucket_bytes:
            yield bucket
            bucket, used = [], 0
        bucket.append((name, tensor))
        used += -(-size // ipc_payload.ALIGNMENT) * ipc_payload.ALIGNMENT
    if bucket:
        yield bucket


class WeightSync:
    """Carries out syncs of one slice.

    Args:
        group: The ranks of the slice, in tp order.
        device: Where this rank's staging memory lies.
        owner_rank: Global rank that talks to the engine.
        server: The engine; None on clients.
        spec: What the served model expects, if known.
    """

    def __init__(
        self,
        group: RankGroup,
        *,
        device: torch.device,
        owner_rank: int,
        server: WeightServer | None,
        spec: ModelSpec | None,
    ) -> None:
        self.group = group
        self.device = device
        self.owner_rank = owner_rank
        self.server = server
        self.spec = spec
        self.abandoned: list[ipc_payload.Ledger] = []
        """Of failed syncs: handles whose readers may still hold them.  See `close`."""

    def close(self) -> list[ipc_payload.Outstanding]:
        """Free what failed syncs left behind, and torch's counter file; only once the engine is gone.

        Returns:
            Handles that the engine never gave back.
        """
        ledgers, self.abandoned = self.abandoned, []
        lost = [item for ledger in ledgers for item in ledger.reclaim()]
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()  # removes the counter file from /dev/shm, which the end of the process does not
        return lost

    def run(
        self,
        source: Source,
        *,
        version: str,
        options: SyncOptions,
        timeout_s: float,
        touched: Callable[[], None],
    ) -> SyncReport:
        """Sync all weights of `source`.

        Collective: over the slice, and over the meshes of the weights.

        Args:
            source: What to send; see `Weights`.
            version: Published once everything has arrived.
            options: See `SyncOptions`.
            timeout_s: For the whole sync, in seconds.
            touched: Called on every rank before the first byte may change in the engine.

        Raises:
            TpColocateError: The first error of any rank of the slice.
        """
        run = _Run(self, version, options, time.monotonic() + timeout_s, timeout_s)
        try:
            return run.carry_out(source, touched)
        except BaseException as error:
            self.abandoned.append(run.ledger)
            # Ranks of other slices are in the same gathers: keep them company to the end, then tell.
            if isinstance(error, TpColocateError) and not isinstance(error, RankLostError):
                run.drain()
            raise


class _Run:
    """The state of one sync in progress."""

    def __init__(self, sync: WeightSync, version: str, options: SyncOptions, deadline: float, timeout_s: float) -> None:
        self.sync = sync
        self.group = sync.group
        self.version = version
        self.options = options
        self.deadline = deadline
        self.timeout_s = timeout_s
        self.watch = Stopwatch()
        self.ledger = ipc_payload.Ledger(rank=sync.group.rank)
        self.rest: Iterator[list[tuple[str, torch.Tensor]]] = iter(())
        self.sharded = False
        self.names: set[str] = set()
        self.num_bytes = self.num_tensors = self.num_buckets = 0

    def left(self, what: str) -> float:
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise DeadlineError(f"the sync took longer than {self.timeout_s:g} s, while it should {what}", hint="raise timeout_s of sync_weights()")
        return seconds

    def carry_out(self, source: Source, touched: Callable[[], None]) -> SyncReport:
        with self.watch.phase("prepare"):
            weights = self.together("prepare a weight sync", lambda: self.prepare(source))
            self.on_owner("open the weight sync", lambda server: server.begin_sync(timeout_s=self.left("open the weight sync")))
        touched()
        error: BaseException | None = None
        while (bucket := self.next_bucket()) is not None:
            error = self.send(bucket, error)
        with self.watch.phase("finish"):
            self.agree(error, None, what="take back the last handles")
            self.together("check that all weights were sent", lambda: self.check_complete(weights))
            self.on_owner("finish the weight sync", lambda server: server.end_sync(self.version, timeout_s=self.left("finish the weight sync")))
        mine = RankReport(self.group.rank, dict(self.watch.seconds), self.ledger.num_exported, self.ledger.num_returned)
        ranks = self.agree(None, mine, what="report the weight sync")
        return SyncReport(
            rank=self.group.rank,
            weight_version=self.version,
            num_bytes=self.num_bytes,
            num_tensors=self.num_tensors,
            num_buckets=self.num_buckets,
            seconds=self.watch.total(),
            checked_against="nothing" if self.sync.spec is None else self.sync.spec.origin,
            ranks=tuple(ranks),
        )

    def prepare(self, source: Source) -> Weights:
        weights = Weights(source, expected=None if self.sync.spec is None else self.sync.spec.shapes)
        self.sharded = weights.is_sharded
        self.rest = buckets(weights, self.options.bucket_bytes)
        if weights.known is not None:
            if not weights.known:
                raise ConfigError("there are no weights to sync", hint="pass a module with parameters")
            repeated = _repeated(name for name, _ in weights.known)
            if repeated is not None:
                raise WeightsMismatchError(f"{repeated} is given twice", hint="names must be unique")
            self.check([(name, tensor.shape) for name, tensor in weights.known])
            if self.sync.spec is not None and not self.options.partial:
                self.sync.spec.check_complete([*(name for name, _ in weights.known), *weights.aliases])
        return weights

    def check(self, shapes: list[tuple[str, torch.Size]]) -> None:
        if self.sync.spec is not None:
            self.sync.spec.check(shapes)

    def check_complete(self, weights: Weights) -> None:
        if self.sync.spec is not None and not self.options.partial:
            self.sync.spec.check_complete([*self.names, *weights.aliases])

    def next_bucket(self) -> list[tuple[str, torch.Tensor]] | None:
        """The next bucket, or None at the end; all ranks agree on which."""
        error: BaseException | None = None
        bucket: list[tuple[str, torch.Tensor]] | None = None
        with self.watch.phase("gather"):
            try:
                bucket = next(self.rest, None)  # a generator may gather, and may fail
                if bucket is not None:
                    shapes = [(name, tensor.shape) for name, tensor in bucket]
                    self.check(shapes)
            except BaseException as caught:
                error = caught
            mine = None if bucket is None else [(n, tuple(t.shape), t.dtype) for n, t in bucket]
            digest = hashlib.sha256(repr(mine).encode()).digest()
            views = self.agree(error, (digest, _headline(mine)), what="choose the next weights")
            if len({view[0] for view in views}) > 1:
                said = "; ".join(f"rank {rank}: {view[1]}" for rank, view in zip(self.group.ranks, views))
                raise WeightsMismatchError(f"the ranks hold different weights: {said}", hint="every rank must pass the same names in the same order")
        return bucket

    def send(self, bucket: list[tuple[str, torch.Tensor]], error: BaseException | None) -> BaseException | None:
        """Move one bucket; returns this rank's error in taking the handles back, for the next agreement."""
        payloads: list[str] = []
        number = self.num_buckets
        flat: torch.Tensor | None = None
        entries, num_bytes = ipc_payload.layout([(n, t.shape, t.dtype) for n, t in bucket])
        if error is None:
            try:
                with self.watch.phase("gather"):
                    flat = self.gather(bucket, entries, num_bytes)
                with self.watch.phase("export"):
                    payloads = self.export(flat, entries, number)
            except BaseException as caught:
                error = caught
        with self.watch.phase("export"):
            gathered = self.agree(error, payloads, what=f"gather bucket {number}")
        with self.watch.phase("push"):
            per_tp_rank = [payload for of_rank in gathered for payload in of_rank]
            self.on_owner(
                f"load bucket {number}",
                lambda server: server.push_bucket(per_tp_rank, timeout_s=self.left(f"load bucket {number}")),
            )
        self.num_buckets += 1
        self.num_tensors += len(bucket)
        self.num_bytes += sum(entry.num_bytes for entry in entries)
        self.names.update(name for name, _ in bucket)
        with self.watch.phase("settle"):
            try:
                self.ledger.settle(deadline=self.deadline)
            except TpColocateError as caught:
                return caught
        return None

    def gather(self, bucket: list[tuple[str, torch.Tensor]], entries: list[ipc_payload.Entry], num_bytes: int) -> torch.Tensor | None:
        """Full tensors into fresh staging memory.  Ranks that export nothing gather all the same."""
        exports = self.options.payloads == "per_rank" or self.group.rank == self.sync.owner_rank
        flat = ipc_payload.allocate(num_bytes, self.sync.device) if exports else None
        for (_, tensor), entry in zip(bucket, entries):
            full = full_tensor(tensor)
            if flat is not None and entry.num_bytes:
                ipc_payload.view(flat, entry).copy_(full)
        if flat is not None and flat.is_cuda:
            # The reader's streams know nothing of ours.
            torch.cuda.current_stream(flat.device).synchronize()
        return flat

    def export(self, flat: torch.Tensor | None, entries: list[ipc_payload.Entry], number: int) -> list[str]:
        """This rank's payloads: its own TP rank's, or (fan-out, owner) everybody's."""
        if flat is None:
            return []
        ledger = self.ledger
        if self.options.payloads == "per_rank":
            tp_rank = self.group.ranks.index(self.group.rank)
            return [ipc_payload.payload(ledger.export(flat, tp_rank=tp_rank, bucket=number), entries)]
        payloads = []
        for tp_rank in range(len(self.group)):
            copy = flat
            if tp_rank and not flat.is_cuda:
                # A CPU file has one counter for all its readers: a copy each tells them apart.
                copy = ipc_payload.allocate(flat.numel(), flat.device).copy_(flat)
            payloads.append(ipc_payload.payload(ledger.export(copy, tp_rank=tp_rank, bucket=number), entries))
        return payloads

    def drain(self) -> None:
        """Read the remaining weights and drop them, so that gathers which span slices stay complete."""
        if not self.sharded:
            return
        try:
            for bucket in self.rest:
                for _, tensor in bucket:
                    if isinstance(tensor, DTensor):
                        tensor.full_tensor()
        except Exception:  # the error that brought us here is the one to raise
            return

    # --- agreement ---------------------------------------------------------------------------------------------

    def agree(self, error: BaseException | None, value: T, *, what: str) -> list[T]:
        seconds = max(self.deadline - time.monotonic(), 0.0)
        if seconds == 0.0 and error is None:
            error = DeadlineError(f"the sync took longer than {self.timeout_s:g} s, when it should {what}", hint="raise timeout_s of sync_weights()")
        # A grace over the deadline: the others are to hear of it rather than to time out on us.
        return self.group.agree(error, value, what=what, timeout_s=seconds + _GRACE_S)

    def together(self, what: str, action: Callable[[], T]) -> T:
        value: T | None = None
        error: BaseException | None = None
        try:
            value = action()
        except BaseException as caught:
            error = caught
        self.agree(error, None, what=what)
        return value  # type: ignore[return-value]

    def on_owner(self, what: str, action: Callable[[WeightServer], None]) -> None:
        server = self.sync.server
        self.together(what, lambda: None if server is None else action(server))


_GRACE_S = 5.0


def _headline(mine: list[tuple[str, tuple[int, ...], torch.dtype]] | None) -> str:
    if mine is None:
        return "no more weights"
    name, shape, dtype = mine[0]
    return f"{len(mine)} tensors from {name} {shape} {dtype}"


def _repeated(names: Iterator[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


__all__ = ["PAYLOADS", "SyncOptions", "WeightServer", "WeightSync", "buckets"]
