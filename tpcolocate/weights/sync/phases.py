"""What every phase of a sync stands on: its state on this rank, and the agreement of the slice's ranks.

After each phase the ranks exchange ok-or-error; the first error is raised on all of them, and nobody enters the next
collective alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tpcolocate import ipc_payload
from tpcolocate.deadline import Deadline
from tpcolocate.errors import DeadlineError, WeightsMismatchError
from tpcolocate.in_server.tpcolocate_receiver.protocol import Command, addressed_to_all
from tpcolocate.report import Stopwatch
from tpcolocate.weights.plan.sharding import LocalShard
from tpcolocate.weights.sources.lazy_tensor import Items
from tpcolocate.weights.sync.options import SyncOptions
from tpcolocate.weights.transport.bucket_sender import BucketSender, Replies, WeightServer
from tpcolocate.weights.transport.connection import WorkerConnection
from tpcolocate.weights.transport.memory import allocated_bytes
from tpcolocate.weights.transport.staging import Ready
from tpcolocate.weights.transport.transient_mappings import TransientMappings
from tpcolocate.worker_errors import raise_worker_errors

if TYPE_CHECKING:
    from tpcolocate.weights.sync.syncer import WeightSync

T = TypeVar("T")

# The others are to hear of a missed deadline rather than to miss one of their own.
GRACE_S = 5.0
# From the engine's answer to the return of all handles.  It is milliseconds; what takes longer does not come.
RETURN_S = 10.0


class SyncPhases:
    """The state of one sync.

    Args:
        sync: What lasts from sync to sync.
        version: To be published.
        options: See `SyncOptions`.
        timeout_s: For all of it, in seconds.
    """

    def __init__(self, sync: WeightSync, version: str, options: SyncOptions, timeout_s: float) -> None:
        self.sync = sync
        self.group = sync.group
        self.version = version
        self.options = options
        self.deadline = time.monotonic() + timeout_s
        sync.mover.deadline = self.deadline + GRACE_S
        self.timeout_s = timeout_s
        self.watch = Stopwatch()
        self.ledger = ipc_payload.Ledger(rank=sync.group.rank, reader_is_alive=sync.reader_is_alive)
        self.borrowed = TransientMappings(
            ipc_payload.Ledger(rank=sync.group.rank, reader_is_alive=sync.reader_is_alive),
            sync.mover.loans,
            tp_rank=sync.tp_rank,
        )
        self.delivery = BucketSender(
            tp_rank=sync.tp_rank,
            tp_size=len(sync.group),
            is_owner=sync.is_owner,
            payloads=options.payloads,
            transport=options.transport,
            file_folder=sync.folder if options.folder is None else options.folder,
            ledger=self.ledger,
            copied=self.note_peak,
        )
        self.rest: Iterator[Items] = iter(())
        self.tensors: Mapping[str, LocalShard] = {}
        self.sharded = False
        self.touched = self.mode_told = self.moving = False
        self.rehearsed = False
        """Whether something was learned without weights in this sync."""
        self.is_verified = True
        """Whether what all slices know of their loaders has been seen to be true."""
        self.samples: Iterator[Items] | None = None
        """What the loaders are given to see that; None where it is not needed, or over."""
        self.otherwise: tuple[str, ...] = ()
        """Samples that the loader treated otherwise."""
        self.staged = False
        """Whether any rank exported memory for this sync alone; the same on every rank."""
        self.repeats = False
        """Whether all ranks find everything as it was: what is known of the last sync is true of this one."""
        self.opening: WorkerConnection | None = None
        """On the owner: the way to the workers."""
        self.ready: Ready | None = None
        """Made ahead, in the hope that this sync repeats the last one."""
        self.found: dict[str, dict[int, list[int]]] = {}
        """On the owner: program -> TP rank -> the sums that its worker told."""
        self.unmoved: list[Callable[[], Any]] | None = None
        """Collectives of the moves that are still to come; None before they were planned."""
        self.num_commands = 0
        self.names: set[str] = set()
        self.unproven: set[str] = set()
        self.learned = False
        self.num_bytes = self.num_tensors = self.num_buckets = self.num_replayed = 0
        self.num_direct = self.num_staged = 0
        self.worker_seconds: dict[str, float] = {}
        self.bucket_bytes = options.bucket_bytes
        self.notes: list[str] = []
        self.peak_extra = 0
        self.allocated_before = allocated_bytes(sync.device)

    def let_go(self) -> None:
        """Hold nothing of the trainer's any more: what it drops must not wait for the garbage collector to be freed."""
        self.tensors, self.ready, self.unmoved = {}, None, None
        self.rest, self.samples = iter(()), None

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
        return self.group.agree(error, value, what=what, timeout_s=seconds + GRACE_S)

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

    def ask(self, what: str, command: Command) -> Replies:
        """The same command for every worker; their answers, on every rank."""
        number = self.number()
        commands = list(addressed_to_all(command, len(self.group)).values())
        replies = self.on_owner(what, lambda _: self.delivery.ask(commands, number, self.left(what)))
        raise_worker_errors(replies, f"could not {what}", rank=self.sync.owner_rank)
        return replies

    def check(self, shapes: list[tuple[str, torch.Size]]) -> None:
        if self.sync.spec is not None:
            self.sync.spec.check(shapes)

    def check_alike(self, told: list[tuple[bytes, str]]) -> None:
        """Refuse ranks whose weights differ.  Pure: every rank comes to the same error."""
        if len({digest for digest, _ in told}) > 1:
            said = "; ".join(f"rank {rank}: {headline}" for rank, (_, headline) in zip(self.group.ranks, told))
            raise WeightsMismatchError(
                f"the ranks hold different weights: {said}",
                hint="every rank must pass the same names in the same order",
            )

    def number(self) -> int:
        self.num_commands += 1
        return self.num_commands - 1

    def settle_together(self) -> None:
        def settle() -> None:
            deadline = Deadline.after(min(self.deadline - time.monotonic(), RETURN_S))
            for ledger in (self.ledger, self.borrowed.ledger):
                ledger.wait_for_release(deadline)

        self.together("take the staging memory back", settle)

    def note_peak(self) -> None:
        self.peak_extra = max(self.peak_extra, allocated_bytes(self.sync.device) - self.allocated_before)

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        for step, value in seconds.items():
            self.worker_seconds[step] = self.worker_seconds.get(step, 0.0) + value


__all__ = ["GRACE_S", "RETURN_S", "SyncPhases"]
