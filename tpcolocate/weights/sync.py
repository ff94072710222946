"""One weight sync: gather in lockstep, one payload per TP rank, agreement after every phase, proof of arrival.

Every rank of the slice runs the same phases for the same buckets.  After each phase the ranks exchange ok-or-error;
the first error is raised on all of them, and nobody enters the next gather alone.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from tpcolocate import ipc_payload
from tpcolocate.errors import (
    ConfigError,
    DeadlineError,
    RankLostError,
    SyncError,
    TpColocateError,
    WeightsMismatchError,
)
from tpcolocate.groups import RankGroup
from tpcolocate.report import RankReport, Stopwatch, SyncReport
from tpcolocate.weights.delivery import PAYLOADS, TRANSPORTS, Delivery, Replies, WeightServer
from tpcolocate.weights.items import Item, Items, full_bytes, full_tensor, is_collective
from tpcolocate.weights.memory import SlopeAlarm, allocated_bytes, free_bytes, plan_bucket
from tpcolocate.weights.source import Rename, Source, Weights
from tpcolocate.weights.spec import ModelSpec

logger = logging.getLogger(__name__)
T = TypeVar("T")
Named = tuple[str, tuple[int, ...], torch.dtype]

# The others are to hear of a missed deadline rather than to miss one of their own.
_GRACE_S = 5.0
_PREFLIGHT_S = 15.0
# From the engine's answer to the return of all handles.  It is milliseconds; what takes longer does not come.
_RETURN_S = 10.0
_PREFLIGHT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """How weights travel.

    Attributes:
        bucket_bytes: Most staging memory of a sync, in bytes; a larger tensor gets a bucket of its own.
        payloads: One of `PAYLOADS`.
        transport: One of `TRANSPORTS`.
        partial: Weights that are not sent stay as they are, instead of being an error.
        folder: Where files go, for the transport ``file``; default: /dev/shm.
        rename: From the source's names to the served checkpoint's; see `Weights`.
    """

    bucket_bytes: int = 512 * 2**20
    payloads: str = "per_rank"
    transport: str = "auto"
    partial: bool = False
    folder: Path | None = None
    rename: Rename | None = None

    def __post_init__(self) -> None:
        if self.bucket_bytes <= 0:
            raise ConfigError(f"bucket_bytes={self.bucket_bytes} is not positive")
        if self.payloads not in PAYLOADS:
            raise ConfigError(f"payloads={self.payloads!r} is unknown", hint=f"one of {', '.join(PAYLOADS)}")
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"transport={self.transport!r} is unknown", hint=f"one of {', '.join(TRANSPORTS)}")


def buckets(weights: Weights, bucket_bytes: int) -> Iterator[Items]:
    """Cut the stream into buckets of at most `bucket_bytes`, in order; the sizes are those of the full tensors."""
    bucket: Items = []
    used = 0
    for name, tensor in weights:
        size = _padded(tensor)
        if bucket and used + size > bucket_bytes:
            yield bucket
            bucket, used = [], 0
        bucket.append((name, tensor))
        used += size
    if bucket:
        yield bucket


def _padded(item: Item) -> int:
    return -(-full_bytes(item) // ipc_payload.ALIGNMENT) * ipc_payload.ALIGNMENT


class WeightSync:
    """Carries out the syncs of one slice with one engine.

    Args:
        group: The ranks of the slice, in tp order.
        device: Where this rank's staging memory lies.
        owner_rank: Global rank that talks to the engine.
        server: The engine; None on clients.
        spec: What the served model expects, if known.
        loader: Dotted name of the receiver in the engine.
        reply_folder: Where the receiver's replies appear; one folder for the slice, removed with the engine.
        reader_is_alive: Whether the engine still runs, asked when handles do not come back.
    """

    def __init__(
        self,
        group: RankGroup,
        *,
        device: torch.device,
        owner_rank: int,
        server: WeightServer | None,
        spec: ModelSpec | None,
        loader: str,
        reply_folder: Path,
        reader_is_alive: Callable[[], bool],
    ) -> None:
        self.group = group
        self.device = device
        self.owner_rank = owner_rank
        self.server = server
        self.spec = spec
        self.loader = loader
        self.reply_folder = reply_folder
        self.reader_is_alive = reader_is_alive
        self.alarm = SlopeAlarm()
        self.proven_ways: set[str] = set()
        """Ways of making payloads whose handles are known to open in the engine."""
        self.refused_ways: dict[str, str] = {}
        """Ways whose handles are known not to open there, and why."""
        self.abandoned: list[ipc_payload.Ledger] = []
        """Of failed syncs: handles whose readers may still hold them."""

    def close(self) -> list[ipc_payload.Outstanding]:
        """Free what failed syncs left behind; only once the engine is gone.

        Returns:
            Handles that the engine never gave back.
        """
        lost = self._reclaim()
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()
        return lost

    def _reclaim(self) -> list[ipc_payload.Outstanding]:
        ledgers, self.abandoned = self.abandoned, []
        return [item for ledger in ledgers for item in ledger.reclaim()]

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
        run = _Run(self, version, options, timeout_s)
        try:
            report = run.carry_out(source, touched)
        except BaseException as error:
            self.abandoned.append(run.ledger)
            run.clean_up()
            # Ranks of other slices are in the same gathers: keep them company to the end, then tell.
            if isinstance(error, TpColocateError) and not isinstance(error, RankLostError):
                run.drain()
            raise
        # The engine handles updates one after the other: those of earlier, failed syncs are over by now.
        self._reclaim()
        return report


class _Run:
    """The state of one sync in progress."""

    def __init__(self, sync: WeightSync, version: str, options: SyncOptions, timeout_s: float) -> None:
        self.sync = sync
        self.group = sync.group
        self.tp_rank = sync.group.ranks.index(sync.group.rank)
        self.version = version
        self.options = options
        self.deadline = time.monotonic() + timeout_s
        self.timeout_s = timeout_s
        self.watch = Stopwatch()
        self.ledger = ipc_payload.Ledger(rank=sync.group.rank, reader_is_alive=sync.reader_is_alive)
        self.delivery = Delivery(
            tp_rank=self.tp_rank,
            tp_size=len(sync.group),
            is_owner=sync.group.rank == sync.owner_rank,
            payloads=options.payloads,
            transport=options.transport,
            loader=sync.loader,
            reply_folder=sync.reply_folder,
            file_folder=sync.reply_folder if options.folder is None else options.folder,
            ledger=self.ledger,
            copied=self.note_peak,
        )
        self.rest: Iterator[Items] = iter(())
        self.sharded = False
        self.begun = self.touched = False
        self.names: set[str] = set()
        self.unproven: set[str] = set()
        self.num_bytes = self.num_tensors = self.num_buckets = self.num_replayed = 0
        self.worker_seconds: dict[str, float] = {}
        self.bucket_bytes = options.bucket_bytes
        self.peak_extra = 0
        self.allocated_before = allocated_bytes(sync.device)

    # --- the phases ----------------------------------------------------------------------------------------------

    def carry_out(self, source: Source, touched: Callable[[], None]) -> SyncReport:
        with self.watch.phase("prepare"):
            weights = self.together("prepare a weight sync", lambda: self.prepare(source))
            self.compare(weights)
            self.plan_memory(weights)
            self.delivery.nonce = self.on_owner("open the weight sync", self.begin)
        if self.delivery.transport in ("auto", "ipc"):
            self.preflight()
        touched()
        self.touched = True
        error: BaseException | None = None
        while (bucket := self.next_bucket(error)) is not None:
            error = self.send(bucket)
        with self.watch.phase("finish"):
            self.together("check that all weights were sent", lambda: self.check_complete(weights))
            self.on_owner(
                "finish the weight sync",
                lambda server: server.end_sync(self.version, timeout_s=self.left("finish the weight sync")),
            )
            if self.sync.device.type == "cuda":
                torch.cuda.ipc_collect()
        return self.report()

    def report(self) -> SyncReport:
        allocated = allocated_bytes(self.sync.device)
        warning = self.sync.alarm.note(allocated)
        mine = RankReport(
            rank=self.group.rank,
            seconds=dict(self.watch.seconds),
            num_exported=self.ledger.num_exported,
            num_returned=self.ledger.num_returned,
            latest_return_s=self.ledger.latest_return_s,
            peak_extra_bytes=self.peak_extra,
            allocated_bytes=allocated,
        )
        told = self.agree(None, (mine, warning), what="report the weight sync")
        warnings = [f"rank {r.rank}: {text}" for r, text in told if text is not None]
        refused = self.sync.refused_ways.get(self.options.payloads)
        if self.delivery.transport == "file" and refused is not None:
            warnings.append(f"weights go through files: {refused}")
        for text in warnings:
            logger.warning("%s", text)
        return SyncReport(
            rank=self.group.rank,
            weight_version=self.version,
            num_bytes=self.num_bytes,
            num_tensors=self.num_tensors,
            num_buckets=self.num_buckets,
            seconds=self.watch.total(),
            transport=self.delivery.transport,
            checked_against="nothing" if self.sync.spec is None else self.sync.spec.origin,
            num_replayed=self.num_replayed,
            worker_seconds=dict(self.worker_seconds),
            num_proven=self.num_tensors - len(self.unproven),
            unproven=tuple(sorted(self.unproven)),
            bucket_bytes=self.bucket_bytes,
            warnings=tuple(warnings),
            ranks=tuple(report for report, _ in told),
        )

    def prepare(self, source: Source) -> Weights:
        expected = None if self.sync.spec is None else self.sync.spec.shapes
        weights = Weights(source, expected=expected, rename=self.options.rename)
        self.sharded = weights.is_sharded
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

    def compare(self, weights: Weights) -> None:
        """Refuse ranks whose weights differ, before anything is sent; a generator is compared bucket by bucket."""
        if weights.known is not None:
            self.agree_on([(n, tuple(t.shape), t.dtype) for n, t in weights.known], None, what="compare the weights")

    def agree_on(self, contents: list[Named] | None, error: BaseException | None, *, what: str) -> None:
        digest = hashlib.sha256(repr(contents).encode()).digest()
        views = self.agree(error, (digest, _headline(contents)), what=what)
        if len({view[0] for view in views}) > 1:
            said = "; ".join(f"rank {rank}: {view[1]}" for rank, view in zip(self.group.ranks, views))
            raise WeightsMismatchError(
                f"the ranks hold different weights: {said}",
                hint="every rank must pass the same names in the same order",
            )

    def plan_memory(self, weights: Weights) -> None:
        """Agree on a bucket size that fits on every rank."""
        largest = max((_padded(tensor) for _, tensor in weights.known), default=0) if weights.known is not None else 0
        free = self.agree(None, free_bytes(self.sync.device), what="plan the memory of a weight sync")
        on_cpu = self.sync.device.type == "cpu"
        copies = len(self.group) if on_cpu else 1  # ranks of a CPU slice share one /dev/shm
        self.bucket_bytes = plan_bucket(
            self.options.bucket_bytes, free, largest=largest, copies=copies, gathered=weights.reading_bytes
        )
        self.rest = buckets(weights, self.bucket_bytes)

    def begin(self, server: WeightServer) -> str:
        self.begun = True
        server.begin_sync(timeout_s=self.left("open the weight sync"))
        return secrets.token_hex(4)

    def check(self, shapes: list[tuple[str, torch.Size]]) -> None:
        if self.sync.spec is not None:
            self.sync.spec.check(shapes)

    def check_complete(self, weights: Weights) -> None:
        if self.sync.spec is not None and not self.options.partial:
            self.sync.spec.check_complete([*self.names, *weights.aliases])

    def preflight(self) -> None:
        """Prove once per engine that a handle opens in every TP rank, on the GPU it should, and comes back."""
        way = self.options.payloads
        if way in self.sync.proven_ways:
            self.delivery.transport = "ipc"
            return
        if way not in self.sync.refused_ways:
            with self.watch.phase("preflight"):
                problem = self.probe()
            if problem is None:
                self.sync.proven_ways.add(way)
                self.delivery.transport = "ipc"
                return
            self.sync.refused_ways[way] = problem
        problem = self.sync.refused_ways[way]
        if self.delivery.transport == "ipc":
            raise SyncError(
                f"handles of this process do not open in the engine: {problem}",
                hint="share IPC and PID namespaces and /dev/shm, switch expandable_segments off in PYTORCH_ALLOC_CONF, or use "
                'transport="auto", which falls back to files',
            )
        self.delivery.transport = "file"

    def probe(self) -> str | None:
        """One small handle there and back; what went wrong anywhere in the slice, or None."""
        error: BaseException | None = None
        payloads: list[str] = []
        try:
            if self.delivery.exports:
                flat = ipc_payload.allocate(_PREFLIGHT_BYTES, self.sync.device)
                flat.random_(0, 256)
                payloads = self.delivery.commands(flat, "probe", number=-1)
        except (TpColocateError, RuntimeError) as caught:
            error = caught  # an export that fails is an answer, not an accident
        told = self.agree(None, (payloads, None if error is None else str(error)), what="make the preflight's handles")
        failed = next((text for _, text in told if text is not None), None)
        if failed is not None:
            self.ledger.reclaim()
            return f"export failed: {failed.splitlines()[0]}"
        per_tp_rank = [payload for of_rank, _ in told for payload in of_rank]
        replies = self.on_owner(
            "open the preflight's handles", lambda server: self.delivery.push(server, per_tp_rank, -1, _PREFLIGHT_S)
        )
        problem: str | None = None
        error = None
        try:
            problem = self.probed(replies)
        except SyncError as caught:
            error = caught
        problems = self.agree(error, problem, what="take the preflight's handles back")
        return next((text for text in problems if text is not None), None)

    def probed(self, replies: Replies) -> str | None:
        """This rank's part of the preflight's verdict."""
        self.ledger.note_opened(-1, {rank: reply["opened"] for rank, reply in replies.items() if reply is not None})
        problem = None
        for tp_rank, reply in replies.items():
            if reply is None:
                problem = f"TP rank {tp_rank} did not answer"
            elif reply["error"] is not None:
                problem = f"TP rank {tp_rank}: {reply['error']}"
        mine = replies.get(self.tp_rank)
        if problem is None and mine is not None and self.sync.device.type == "cuda":
            uuid = str(torch.cuda.get_device_properties(self.sync.device).uuid)
            if mine["uuid"] != uuid:
                # Not a question of transport: no other one would put the server on the right GPUs.
                raise SyncError(
                    f"TP rank {self.tp_rank} of the server runs on GPU {mine['uuid']}, its training rank {self.group.rank} on {uuid}",
                    hint="do not pass base_gpu_id or gpu_id_step, nor CUDA_VISIBLE_DEVICES in env=",
                    rank=self.group.rank,
                )
        try:
            self.ledger.settle(deadline=min(self.deadline, time.monotonic() + _PREFLIGHT_S))
        except SyncError as error:
            problem = problem if problem is not None else error.message
        except DeadlineError as error:
            self.sync.abandoned.append(self.ledger.set_aside())
            problem = problem if problem is not None else error.message
        return problem

    def next_bucket(self, error: BaseException | None) -> Items | None:
        """The next bucket, or None at the end; all ranks agree on which, and that the last one is behind them.

        Args:
            error: What went wrong on this rank with the last bucket's handles.
        """
        bucket: Items | None = None
        with self.watch.phase("gather"):
            if error is None:
                try:
                    bucket = next(self.rest, None)  # a generator may gather, and may fail
                    if bucket is not None:
                        self.check([(name, tensor.shape) for name, tensor in bucket])
                except BaseException as caught:
                    error = caught
            mine = None if bucket is None else [(n, tuple(t.shape), t.dtype) for n, t in bucket]
            self.agree_on(mine, error, what="choose the next weights")
        return bucket

    def send(self, bucket: Items) -> BaseException | None:
        """Move one bucket; returns this rank's error in taking the handles back, for the next agreement."""
        error: BaseException | None = None
        number = self.num_buckets
        payloads: list[str] = []
        entries, num_bytes = ipc_payload.layout([(n, t.shape, t.dtype) for n, t in bucket])
        flat: torch.Tensor | None = None
        try:
            with self.watch.phase("gather"):
                flat = self.gather(bucket, entries, num_bytes)
            with self.watch.phase("export"):
                payloads = self.delivery.make(flat, entries, number)
        except BaseException as caught:
            error = caught
        with self.watch.phase("export"):
            gathered = self.agree(error, payloads, what=f"gather bucket {number}")
        with self.watch.phase("push"):
            per_tp_rank = [payload for of_rank in gathered for payload in of_rank]
            what = f"load bucket {number}"
            verdict = self.on_owner(
                what, lambda server: self.delivery.load(server, per_tp_rank, entries, number, self.left(what))
            )
        self.ledger.note_opened(number, verdict.opened)
        if verdict.problem is not None:
            raise SyncError(
                f"bucket {number} did not arrive: {verdict.problem}",
                hint="the engine's weights are unknown now: sync again in full, or launch() again",
                rank=self.sync.owner_rank,
            )
        self.unproven.update(verdict.unproven)
        self.num_replayed += len(bucket) if verdict.replayed else 0
        for step, seconds in verdict.worker_seconds.items():
            self.worker_seconds[step] = self.worker_seconds.get(step, 0.0) + seconds
        self.num_buckets += 1
        self.num_tensors += len(bucket)
        self.num_bytes += sum(entry.num_bytes for entry in entries)
        self.names.update(name for name, _ in bucket)
        with self.watch.phase("settle"):
            try:
                self.ledger.settle(deadline=min(self.deadline, time.monotonic() + _RETURN_S))
            except TpColocateError as caught:
                return caught
        return None

    def gather(self, bucket: Items, entries: list[ipc_payload.Entry], num_bytes: int) -> torch.Tensor | None:
        """Full tensors into fresh staging memory.  Ranks that export nothing gather all the same."""
        flat = ipc_payload.allocate(num_bytes, self.sync.device) if self.delivery.exports else None
        largest = max(range(len(entries)), key=lambda i: entries[i].num_bytes)
        for i, ((_, tensor), entry) in enumerate(zip(bucket, entries)):
            full = full_tensor(tensor)
            if flat is not None and entry.num_bytes:
                ipc_payload.view(flat, entry).copy_(full)
                # The checksum covers the padding.
                flat[
                    entry.start + entry.num_bytes : entries[i + 1].start if i + 1 < len(entries) else num_bytes
                ].zero_()
            if i == largest:
                self.note_peak()
        if flat is not None and flat.is_cuda:
            # The reader's streams know nothing of ours.
            torch.cuda.current_stream(flat.device).synchronize()
        return flat

    def note_peak(self) -> None:
        self.peak_extra = max(self.peak_extra, allocated_bytes(self.sync.device) - self.allocated_before)

    def clean_up(self) -> None:
        """After a failure: no files left, and an engine that was not touched goes on with the weights it has."""
        self.delivery.file(self.num_buckets).unlink(missing_ok=True)
        if self.sync.server is not None and self.begun and not self.touched:
            try:
                self.sync.server.cancel_sync(timeout_s=_GRACE_S)
            except TpColocateError as error:
                logger.warning("the engine could not be told to go on: %s", error)

    def drain(self) -> None:
        """Read the remaining weights and drop them, so that gathers which span slices stay complete."""
        if not self.sharded:
            return
        try:
            for bucket in self.rest:
                for _, tensor in bucket:
                    if is_collective(tensor):
                        full_tensor(tensor)
        except Exception:  # the error that brought us here is the one to raise
            return

    # --- agreement -----------------------------------------------------------------------------------------------

    def left(self, what: str) -> float:
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise self.too_late(what)
        return seconds

    def too_late(self, what: str) -> DeadlineError:
        return DeadlineError(
            f"the sync took longer than {self.timeout_s:g} s, while it should {what}",
            hint="raise timeout_s of sync_weights()",
        )

    def agree(self, error: BaseException | None, value: T, *, what: str) -> list[T]:
        seconds = max(self.deadline - time.monotonic(), 0.0)
        if seconds == 0.0 and error is None:
            error = self.too_late(what)
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

    def on_owner(self, what: str, action: Callable[[WeightServer], T]) -> T:
        """The owner acts; every rank gets its result or its error."""
        value: T | None = None
        error: BaseException | None = None
        if self.sync.server is not None:
            try:
                value = action(self.sync.server)
            except BaseException as caught:
                error = caught
        return self.agree(error, value, what=what)[self.group.ranks.index(self.sync.owner_rank)]  # type: ignore[return-value]


def _headline(mine: list[Named] | None) -> str:
    if not mine:
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


__all__ = ["SyncOptions", "WeightSync", "buckets"]
