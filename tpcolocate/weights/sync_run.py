"""One weight sync in progress: the phases that every rank of a slice goes through together.

Two ways of moving weights, often both in one sync: buckets of full tensors (`sync_buckets`), and moves of parts
(`sync_moves`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tpcolocate import ipc_payload
from tpcolocate.errors import ConfigError, SyncError, TpColocateError, WeightsMismatchError
from tpcolocate.report import RankReport, SyncReport
from tpcolocate.weights.delivery import WeightServer, some
from tpcolocate.weights.items import full_tensor, is_collective
from tpcolocate.weights.memory import allocated_bytes, free_bytes, plan_bucket
from tpcolocate.weights.mover import Mover, Sums
from tpcolocate.weights.source import Source, Weights
from tpcolocate.weights.sync_buckets import BucketPhases, buckets, headline, padded_bytes
from tpcolocate.weights.sync_moves import MovePhases
from tpcolocate.weights.sync_phases import GRACE_S
from tpcolocate.weights.sync_preflight import Preflight

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What one rank tells the others before anything is sent.

    Attributes:
        digest: Of names, shapes and dtypes; equal on all ranks.
        headline: The same for people.
        free: Bytes that can be staged.
        steady: Names whose memory may be lent, as a digit for each.
    """

    digest: bytes
    headline: str
    free: int
    steady: str


class SyncRun(Preflight, MovePhases, BucketPhases):
    """All of a sync, from its source to its report."""

    def carry_out(self, source: Source, touched: Callable[[], None]) -> SyncReport:
        with self.watch.phase("prepare"):
            weights, lent = self.prepare_together(source)
        sums: Sums | None = None
        with self.watch.phase("open"):
            sums = self.open(lent)
        if self.delivery.transport in ("auto", "ipc"):
            self.preflight()
        touched()
        self.touched = True
        moved: set[str] = set()
        if self.agree_on_mode():
            moved = set(self.tensors)
            self.move(weights, lent, sums)
        del sums
        known = weights.known
        left = weights if known is None else [item for item in known if item[0] not in moved]
        self.rest = buckets(left, self.bucket_bytes)
        if moved and left:
            self.unstage()
        error: BaseException | None = None
        while known is None or len(moved) < len(known):
            bucket = self.next_bucket(error)
            if bucket is None:
                break
            error = self.send(bucket)
        with self.watch.phase("finish"):
            self.together("check that all weights were sent", lambda: self.check_complete(weights))
            if self.learned and not self.options.partial:
                self.survey()
            self.leave()
            self.on_owner(
                "finish the weight sync",
                lambda server: server.end_sync(self.version, timeout_s=self.left("finish the weight sync")),
            )
            if self.sync.device.type == "cuda":
                torch.cuda.ipc_collect()
        return self.report()

    def prepare_together(self, source: Source) -> tuple[Weights, set[str]]:
        """Read and check the weights on every rank, compare what the ranks hold, plan the memory."""
        prepared: tuple[Weights, _Facts] | None = None
        error: BaseException | None = None
        try:
            prepared = self.prepare(source)
        except BaseException as caught:
            error = caught
        facts = self.agree(error, None if prepared is None else prepared[1], what="prepare a weight sync")
        assert prepared is not None
        weights, _ = prepared
        self.check_alike([(of_rank.digest, of_rank.headline) for of_rank in facts])  # type: ignore[union-attr]
        largest = (
            max((padded_bytes(tensor) for _, tensor in weights.known), default=0) if weights.known is not None else 0
        )
        # Ranks of a CPU slice share one /dev/shm.
        copies = len(self.group) if self.sync.device.type == "cpu" else 1
        self.bucket_bytes = plan_bucket(
            self.options.bucket_bytes,
            [of_rank.free for of_rank in facts],  # type: ignore[union-attr]
            largest=largest,
            copies=copies,
            gathered=weights.reading_bytes,
        )
        steady = [of_rank.steady for of_rank in facts]  # type: ignore[union-attr]
        return weights, {name for name, *of_ranks in zip(self.tensors, *steady) if set(of_ranks) == {"1"}}

    def prepare(self, source: Source) -> tuple[Weights, _Facts]:
        expected = None if self.sync.spec is None else self.sync.spec.shapes
        weights = Weights(source, expected=expected, rename=self.options.rename)
        self.sharded = weights.is_sharded
        steady: list[bool] = []
        if weights.known is not None:
            if not weights.known:
                raise ConfigError("there are no weights to sync", hint="pass a module with parameters")
            repeated = _repeated(name for name, _ in weights.known)
            if repeated is not None:
                raise WeightsMismatchError(f"{repeated} is given twice", hint="names must be unique")
            self.check([(name, tensor.shape) for name, tensor in weights.known])
            if self.sync.spec is not None and not self.options.partial:
                self.sync.spec.check_complete([*(name for name, _ in weights.known), *weights.aliases])
            if self.options.parts and self.options.payloads == "per_rank" and self.options.transport in ("auto", "ipc"):
                for name, tensor in weights.known:
                    if (one := self.sync.mover.hold(tensor)) is not None:
                        self.tensors[name] = one
                steady = self.sync.mover.loans.note([one.local.untyped_storage() for one in self.tensors.values()])
                if self.sync.lending_refused is not None:
                    steady = [False] * len(steady)
                if self.sync.device.type == "cuda":
                    # The workers' streams know nothing of those that the weights were computed on.
                    torch.cuda.synchronize(self.sync.device)
        contents = None if weights.known is None else [(n, tuple(t.shape), t.dtype) for n, t in weights.known]
        digest = hashlib.sha256(repr((contents, list(self.tensors) == [n for n, *_ in contents or ()])).encode())
        return weights, _Facts(
            digest.digest(),
            "a generator" if contents is None else headline(contents),
            free_bytes(self.sync.device),
            "".join("1" if one else "0" for one in steady),
        )

    def open(self, lent: set[str]) -> Sums | None:
        """Hold generation, reach the workers, and learn whether what is known of them still holds.

        Returns:
            Sums that were begun while the engine was being reached, if the last sync's moves are likely to be repeated.
        """
        error: BaseException | None = None
        session, present, sums = "", None, None
        try:
            if self.sync.server is not None:
                session = ipc_payload.new_session()
                self.begun = True
                self.sync.server.begin_sync(timeout_s=self.left("open the weight sync"))
                if self.options.transport != "stock":
                    self.delivery.workers = self.sync.server.open_workers(
                        self.sync.folder / f"{session}.sock",
                        session,
                        loader=self.sync.loader,
                        tp_size=len(self.group),
                        timeout_s=self.left("open the weight sync"),
                    )
            if self.sync.moves is not None and self.sync.moves[0] == self.signature(lent):
                sums = self.sync.mover.begin_sums(self.sync.moves[1], self.tensors)
            if self.delivery.workers is not None:
                present = self.delivery.workers.greet(timeout_s=self.left("open the weight sync"))
                for tp_rank, greeting in present.items():
                    if greeting["error"] is not None:
                        raise SyncError(f"TP rank {tp_rank}: {greeting['error']}")
        except BaseException as caught:
            error = caught
        told = self.agree(error, (session, present), what="open the weight sync")
        self.delivery.session, greetings = told[self.group.ranks.index(self.sync.owner_rank)]
        if greetings is not None:
            self.sync.knowledge.confirm([greetings[k]["plans"] for k in range(len(self.group))])
        return sums

    def check_complete(self, weights: Weights) -> None:
        if self.sync.spec is not None and not self.options.partial:
            self.sync.spec.check_complete([*self.names, *weights.aliases])

    def leave(self) -> None:
        """Let the workers go, and take back what was lent for this sync."""

        def finish(server: WeightServer) -> None:
            if self.delivery.workers is not None:
                self.delivery.workers.finish()

        self.on_owner("end the weight sync", finish)
        self.settle_together()

    def survey(self) -> None:
        """After the loader was watched: what no weight was ever copied into is told, or is an error on one rank alone."""
        replies = self.ask("look for parameters that nothing was copied into", {"do": "survey"})
        unwritten = {tp_rank: set(reply["unwritten"]) for tp_rank, reply in replies.items()}
        common = set.intersection(*unwritten.values())
        for tp_rank, names in unwritten.items():
            if names - common and not self.unproven:
                raise SyncError(
                    f"TP rank {tp_rank} took nothing for {some(sorted(names - common))}, other TP ranks did",
                    hint="the engine's weights are unknown now: sync again in full, or launch() again",
                    rank=self.sync.owner_rank,
                )
        if common and not self.unproven:
            self.notes.append(f"no weight was sent for these parameters of the engine: {some(sorted(common))}")

    def report(self) -> SyncReport:
        allocated = allocated_bytes(self.sync.device)
        warning = self.sync.alarm.note(allocated)
        mine = RankReport(
            rank=self.group.rank,
            seconds=dict(self.watch.seconds),
            num_exported=self.ledger.num_exported,
            num_returned=self.ledger.num_returned,
            num_lent=len(self.sync.mover.loans),
            latest_return_s=self.ledger.latest_return_s,
            direct_bytes=self.num_direct,
            staged_bytes=self.num_staged,
            peak_extra_bytes=self.peak_extra,
            allocated_bytes=allocated,
        )
        told = self.agree(None, (mine, warning), what="report the weight sync")
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
            num_proven=self.num_tensors - len(self.unproven),
            unproven=tuple(sorted(self.unproven)),
            bucket_bytes=self.bucket_bytes,
            warnings=tuple(warnings),
            ranks=tuple(report for report, _ in told),
        )

    def clean_up(self) -> None:
        """After a failure: no files left, and an engine that was not touched goes on with the weights it has."""
        self.sync.moves = self.sync.defined = None  # the workers may not have got them
        if self.delivery.workers is not None:
            self.delivery.workers.close()
        for number in range(self.num_commands):
            self.delivery.file(number).unlink(missing_ok=True)
        if self.sync.server is not None and self.begun and not self.touched:
            try:
                self.sync.server.cancel_sync(timeout_s=GRACE_S)
            except TpColocateError as error:
                logger.warning("the engine could not be told to go on: %s", error)

    def keep_company(self) -> None:
        """Take part in the collectives that are left, so that ranks of other slices do not wait in them."""
        if not self.sharded:
            return
        left: list[Callable[[], object]] = []
        if not self.mode_told:
            mover = self.sync.mover
            left = [lambda group=group: mover.least(group, (0, 0, 0)) for group in Mover.groups(self.tensors)]  # type: ignore[misc]
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


def _repeated(names: Iterator[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


__all__ = ["SyncRun"]
