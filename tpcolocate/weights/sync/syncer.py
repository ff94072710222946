"""Weight syncs of one slice with one engine: what lasts from one to the next.

See `sync_run` for the phases of a single sync.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from tpcolocate import ipc_payload
from tpcolocate.agreement import RankGroup
from tpcolocate.errors import DeadlineError, RankLostError, TpColocateError
from tpcolocate.in_server.tpcolocate_receiver.checksums import load_kernels
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, RunProgram, WarmUp, addressed_to_all
from tpcolocate.report import SyncReport
from tpcolocate.weights.plan.loader_map import LoaderMap
from tpcolocate.weights.plan.transfer_plan import TransferPlan
from tpcolocate.weights.sources.model_spec import ModelSpec
from tpcolocate.weights.sources.named_weights import Source
from tpcolocate.weights.sync.options import SyncOptions
from tpcolocate.weights.sync.phases import GRACE_S
from tpcolocate.weights.sync.run import SyncRun
from tpcolocate.weights.sync.start import Last
from tpcolocate.weights.transport.bucket_sender import WeightServer, Workers
from tpcolocate.weights.transport.connection import WorkerConnection
from tpcolocate.weights.transport.mapped_memory import PersistentMapping
from tpcolocate.weights.transport.memory import SlopeAlarm
from tpcolocate.weights.transport.staging import Transfer
from tpcolocate.worker_errors import raise_worker_errors

logger = logging.getLogger(__name__)

_POLL_S = 0.001
_END_POLL_S = 0.2


class WeightSync:
    """Carries out the syncs of one slice with one engine.

    Args:
        group: The ranks of the slice, in tp order.
        device: Where this rank's staging memory lies.
        owner_rank: Global rank that talks to the engine.
        tp_ranks: Global rank -> TP rank in its own slice, for all ranks of the job.
        server: The engine; None on clients.
        spec: What the served model expects, if known.
        loader: Dotted name of the receiver in the engine.
        folder: For sockets and files; one for the slice, private to this user, removed with the engine.
        reader_is_alive: Whether the engine still runs, asked when handles do not come back.
    """

    def __init__(
        self,
        group: RankGroup,
        *,
        device: torch.device,
        owner_rank: int,
        tp_ranks: Mapping[int, int],
        server: WeightServer | None,
        spec: ModelSpec | None,
        loader: str,
        folder: Path,
        reader_is_alive: Callable[[], bool],
    ) -> None:
        self.group = group
        self.device = device
        self.owner_rank = owner_rank
        self.server = server
        self.spec = spec
        self.loader = loader
        self.folder = folder
        self.reader_is_alive = reader_is_alive
        self.alarm = SlopeAlarm()
        self.proven_ways: set[str] = set()
        """Ways of making payloads whose handles are known to open in the engine."""
        self.refused_ways: dict[str, str] = {}
        """Ways whose handles are known not to open there, and why."""
        self.abandoned: list[ipc_payload.Ledger] = []
        """Of failed syncs: handles whose readers may still hold them."""
        self.knowledge = LoaderMap()
        self.mover = Transfer(device, tp_rank=group.ranks.index(group.rank), tp_ranks=tp_ranks, tp_size=len(group))
        self.moves: tuple[object, TransferPlan] | None = None
        """The moves of the last sync, and what they hold for."""
        self.defined: str | None = None
        """Key of the moves whose programs the workers have."""
        self.last: Last | None = None
        """What the last sync found, if it moved everything."""
        self.lent: frozenset[str] = frozenset()
        """Names whose memory the workers map from sync to sync; the same on every rank."""
        self.rehearsal_refused: str | None = None
        """Why the engine's loader cannot be learned without weights, if it cannot."""
        self.lending_refused: str | None = None
        """Why the engine cannot map the trainer's own memory, if it cannot."""

    @property
    def tp_rank(self) -> int:
        return self.group.ranks.index(self.group.rank)

    @property
    def is_owner(self) -> bool:
        return self.group.rank == self.owner_rank

    def close(self, *, timeout_s: float) -> list[ipc_payload.Outstanding]:
        """Free what failed syncs left behind, and what was lent; only once the engine is gone.

        Args:
            timeout_s: How long to wait for the engine's end, where there is anything that it might still read.

        Returns:
            Handles that the engine never gave back.
        """
        if not self.abandoned and not len(self.mover.loans):
            return []
        deadline = time.monotonic() + timeout_s
        while self.reader_is_alive():
            if time.monotonic() >= deadline:
                logger.warning("the engine still runs: memory that it maps stays allocated until this process ends")
                return []
            time.sleep(_END_POLL_S)
        lost = self.reclaim()
        self.mover.loans.reclaim()
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()
        return lost

    def reclaim(self) -> list[ipc_payload.Outstanding]:
        """Set the counters of failed syncs right; only once the engine is known to be past them."""
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
            source: What to send; see `NamedWeights`.
            version: Published once everything has arrived.
            options: See `SyncOptions`.
            timeout_s: For the whole sync, in seconds.
            touched: Called on every rank before the first byte may change in the engine.

        Raises:
            TpColocateError: The first error of any rank of the slice.
        """
        run = SyncRun(self, version, options, timeout_s)
        try:
            report = run.carry_out(source, touched)
        except BaseException as error:
            run.clean_up()
            self.abandoned += [run.ledger, run.borrowed.ledger]
            # Ranks of other slices are in the same gathers: keep them company to the end, then tell.
            if isinstance(error, TpColocateError) and not isinstance(error, RankLostError):
                run.keep_company()
            raise
        finally:
            run.let_go()
        # The engine handles updates one after the other: those of earlier, failed syncs are over by now.
        self.reclaim()
        return report

    def call_back(self, *, timeout_s: float) -> int:
        """Take back what was lent and has been dropped by the trainer since.

        Until then torch keeps that memory for the workers that map it.

        Collective: over the slice; does nothing where nothing was lent.

        Returns:
            Bytes that this rank has back.
        """
        if not self.lent:
            return 0
        expired = self.mover.loans.expired()
        names = [loan.name for loan in expired]
        what = "take back memory that the engine still maps"
        of_ranks = self.group.all_gather(names, what=what, timeout_s=timeout_s)
        if not any(of_ranks):
            return 0
        error: BaseException | None = None
        if self.server is not None:
            try:
                self._release(self.server, of_ranks, timeout_s)
            except BaseException as caught:
                error = caught
        self.group.agree(error, None, what=what, timeout_s=timeout_s)
        self.returned(expired, timeout_s=timeout_s)
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()
            # Whoever moved these weights away wants the engine to have the memory, not this process's allocator.
            torch.cuda.empty_cache()
        return sum(loan.num_bytes for loan in expired)

    def warm_up(self, *, timeout_s: float) -> None:
        """Do what the first sync would have to wait for: load kernels here, and in the workers kernels and the loader's ways.

        Not collective: the owner asks the engine.  What goes wrong there is left for the first sync to meet.

        Args:
            timeout_s: For the engine's part, in seconds.
        """
        with contextlib.suppress(RuntimeError):  # no memory for them: whoever needs them says so
            load_kernels(self.device)
        if self.server is None:
            return
        started = time.monotonic()
        shapes = [] if self.spec is None else [[name, list(shape)] for name, shape in self.spec.shapes.items()]
        try:
            with self._called(self.server, timeout_s) as workers:
                workers.post(addressed_to_all(WarmUp(shapes), len(self.group)), 0)
                replies = workers.collect(0, timeout_s=timeout_s)
        except Exception as error:  # nobody would end the server if this left here
            logger.debug("the engine was not warmed up: %s", error)
            return
        problems = [f"TP rank {k}: {reply.error}" for k, reply in replies.items() if reply.error is not None]
        logger.debug(
            "the engine was warmed up in %.2f s%s", time.monotonic() - started, "".join(f"; {p}" for p in problems)
        )

    def _release(self, server: WeightServer, of_ranks: list[list[str]], timeout_s: float) -> None:
        with self._called(server, timeout_s) as workers:
            workers.post({k: Addressed(k, RunProgram(names)) for k, names in enumerate(of_ranks)}, 0)
            raise_worker_errors(workers.collect(0, timeout_s=timeout_s), "the trainer's memory was not released")

    @contextlib.contextmanager
    def _called(self, server: WeightServer, timeout_s: float) -> Iterator[Workers]:
        """The workers, outside of a sync; the engine goes on with the weights it has."""
        opening = WorkerConnection(
            server, folder=self.folder, loader=self.loader, tp_size=len(self.group), timeout_s=timeout_s
        )
        try:
            opening.result()
            assert opening.workers is not None
            yield opening.workers
        except BaseException:
            opening.cancel(timeout_s=GRACE_S)
            raise
        opening.close(timeout_s=timeout_s)
        server.cancel_sync(timeout_s=timeout_s)

    def returned(self, loans: list[PersistentMapping], *, timeout_s: float) -> None:
        """Wait until the workers have let go of loans that they were told to release, and forget them.

        Raises:
            DeadlineError: One of them is still held.
        """
        deadline = time.monotonic() + timeout_s
        while loans and any(loan.handle.count() > 0 for loan in loans):
            if time.monotonic() >= deadline:
                raise DeadlineError(
                    f"TP rank {self.tp_rank} did not let go of memory that was lent to it",
                    hint="shut the engine down; the memory is then reclaimed",
                    rank=self.group.rank,
                )
            time.sleep(_POLL_S)
        self.mover.loans.take({loan.name for loan in loans})


__all__ = ["WeightSync"]
