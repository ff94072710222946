"""One weight sync in progress: the phases that every rank of a slice goes through together.

Two ways of moving weights, often both in one sync: buckets of full tensors (`sync_buckets`), and moves of parts
(`sync_moves`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch

from tpcolocate.errors import SyncError, some
from tpcolocate.in_server.tpcolocate_receiver.protocol import FindUnwritten
from tpcolocate.report import RankReport, SyncReport
from tpcolocate.weights.sources.lazy_tensor import full_tensor, is_collective
from tpcolocate.weights.sources.named_weights import NamedWeights, Source
from tpcolocate.weights.sync.buckets import buckets
from tpcolocate.weights.sync.phases import GRACE_S
from tpcolocate.weights.sync.preflight import Preflight
from tpcolocate.weights.sync.start import StartPhases
from tpcolocate.weights.sync.tracing import LearningPhases
from tpcolocate.weights.transport.bucket_sender import WeightServer
from tpcolocate.weights.transport.memory import allocated_bytes
from tpcolocate.weights.transport.staging import Transfer

logger = logging.getLogger(__name__)


class SyncRun(StartPhases, Preflight, LearningPhases):
    """All of a sync, from its source to its report."""

    def carry_out(self, source: Source, touched: Callable[[], None]) -> SyncReport:
        weights, facts, lending = self.get_going(source)
        if self.delivery.transport in ("auto", "ipc"):
            self.preflight()
        self.rehearse(lending)
        touched()
        self.touched = True
        tensors, known = self.tensors, weights.items
        moving = self.agree_on_mode() and self.samples_hold(weights)
        if not moving:
            self.borrowed.reclaim()  # exported in vain
        moved = set(self.tensors)
        left = weights if known is None else [item for item in known if item[0] not in moved]
        self.rest = buckets(left, self.bucket_bytes)
        if moving:
            self.move(weights, lending)
        if moved and left:
            self.unstage()
        self.send_all(is_known=known is not None)
        error: BaseException | None = None
        with self.watch.phase("finish"):
            if not self.repeats:
                self.together("check that all weights were sent", lambda: self.check_complete(weights))
                if self.learned and not self.options.partial:
                    self.survey()
            if self.staged:
                self.leave()
            try:
                if self.sync.server is not None:
                    workers, self.delivery.workers = self.delivery.workers, None
                    self.sync.server.end_sync(
                        self.version, workers=workers, timeout_s=self.left("finish the weight sync")
                    )
                if self.sync.device.type == "cuda":
                    torch.cuda.ipc_collect()
            except BaseException as caught:
                error = caught
        report = self.report(error)
        if not self.repeats:
            all_moved = known is not None and len(moved) == len(known)
            self.sync.last = self.remember(source, weights, facts, tensors) if all_moved else None
        return report

    def check_complete(self, weights: NamedWeights) -> None:
        if self.sync.spec is not None and not self.options.partial:
            self.sync.spec.check_complete([*self.names, *weights.aliases])

    def leave(self) -> None:
        """Let the workers go, and take back what was staged for this sync."""

        def finish(server: WeightServer) -> None:
            if self.delivery.workers is not None:
                self.delivery.workers.finish()
                self.delivery.workers = None

        self.on_owner("end the weight sync", finish)
        self.borrowed.forget()
        self.settle_together()

    def survey(self) -> None:
        """After the loader was watched: what no weight was ever copied into is told, or is an error on one rank alone."""
        replies = self.ask("look for parameters that nothing was copied into", FindUnwritten())
        unwritten = {tp_rank: set(reply.result.names) for tp_rank, reply in replies.items()}
        common = set.intersection(*unwritten.values())
        for tp_rank, names in unwritten.items():
            if names - common and not self.unproven:
                raise SyncError(
                    f"TP rank {tp_rank} took nothing for {some(sorted(names - common), between=', ')}, other TP ranks did",
                    hint="the engine's weights are unknown now: sync again in full, or launch() again",
                    rank=self.sync.owner_rank,
                )
        if common and not self.unproven:
            self.notes.append(
                f"no weight was sent for these parameters of the engine: {some(sorted(common), between=', ')}"
            )

    def report(self, error: BaseException | None) -> SyncReport:
        """The report; raises, on every rank, what went wrong at the owner's last steps.

        Args:
            error: Of this rank.
        """
        ledgers = (self.ledger, self.borrowed.ledger)
        allocated = allocated_bytes(self.sync.device)
        warning = self.sync.alarm.note(allocated)
        mine = RankReport(
            rank=self.group.rank,
            seconds=dict(self.watch.seconds),
            num_exported=sum(ledger.num_exported for ledger in ledgers),
            num_returned=sum(ledger.num_returned for ledger in ledgers),
            num_mapped=len(self.sync.mover.loans),
            latest_return_s=max(ledger.latest_return_s for ledger in ledgers),
            direct_bytes=self.num_direct,
            staged_bytes=self.num_staged,
            peak_extra_bytes=self.peak_extra,
            allocated_bytes=allocated,
        )
        told = self.agree(error, (mine, warning), what="finish the weight sync")
        warnings = [f"rank {r.rank}: {text}" for r, text in told if text is not None] + self.notes
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
            num_verified=self.num_tensors - len(self.unproven),
            unverified=tuple(sorted(self.unproven)),
            bucket_bytes=self.bucket_bytes,
            warnings=tuple(warnings),
            ranks=tuple(report for report, _ in told),
        )

    def clean_up(self) -> None:
        """After a failure: no files left, and an engine that was not touched goes on with the weights it has."""
        self.sync.moves = self.sync.defined = self.sync.last = None  # the workers may not have got them
        if self.opening is not None and self.touched:
            self.opening.close(timeout_s=GRACE_S)
        elif self.opening is not None:
            self.opening.cancel(timeout_s=GRACE_S)
        for number in range(self.num_commands):
            self.delivery.file(number).unlink(missing_ok=True)

    def keep_company(self) -> None:
        """Take part in the collectives that are left, so that ranks of other slices do not wait in them."""
        if not self.sharded:
            return
        left: list[Callable[[], Any]] = []
        if not self.mode_told:
            mover = self.sync.mover
            left = [lambda group=group: mover.least(group, (0, 0, 0, 0, 0)) for group in Transfer.groups(self.tensors)]  # type: ignore[misc]
        elif self.samples is not None:
            left = self.left_of_samples()
        elif self.moving:
            left = self.left_of_moves()
        for collective in left:
            # One that fails here does so beside the collective itself, and the next one is still waited for.
            with contextlib.suppress(Exception):
                collective()
        with contextlib.suppress(Exception):
            for bucket in self.rest:
                for _, tensor in bucket:
                    if is_collective(tensor):
                        full_tensor(tensor)


__all__ = ["SyncRun"]
