"""The weight syncs of one slice with one engine: the public face of this package; `pipeline` has the course of a sync."""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from tpcolocate import ipc_payload
from tpcolocate.agreement import RankGroup
from tpcolocate.deadline import Deadline
from tpcolocate.errors import RankLostError, TpColocateError
from tpcolocate.garbage import collector_paused
from tpcolocate.in_server.tpcolocate_receiver.checksums import load_kernels
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, WarmUp, addressed_to_all
from tpcolocate.modes import usual_modes
from tpcolocate.report import SyncReport
from tpcolocate.weights.plan.transfer_plan import TpLayout
from tpcolocate.weights.sources.model_spec import ModelSpec
from tpcolocate.weights.sources.named_weights import Source
from tpcolocate.weights.sync.mapping import release_commands, wait_unmapped
from tpcolocate.weights.sync.options import SyncOptions
from tpcolocate.weights.sync.pipeline import run_sync
from tpcolocate.weights.sync.progress import shown
from tpcolocate.weights.sync.session import GRACE_S, EngineState, SliceContext, SyncSession
from tpcolocate.weights.transport.connection import OwnerConnection, Replies, WeightServer
from tpcolocate.worker_errors import raise_worker_errors

logger = logging.getLogger(__name__)

_END_POLL_S = 0.2
_PACKAGE = __name__.partition(".")[0] + "."


class WeightSyncer:
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
        layout = TpLayout(group.rank, tuple(group.ranks), tp_ranks)
        self.context = SliceContext(group, device, owner_rank, layout, server, spec, loader, folder, reader_is_alive)
        self.state = EngineState(device, group.rank)

    @property
    def spec(self) -> ModelSpec | None:
        return self.context.spec

    @property
    def ignored(self) -> frozenset[str]:
        """Names in the checkpoint that the engine's loader does not read, as far as is known."""
        loader_map = self.state.loader_map
        return loader_map.ignored if loader_map.is_complete else loader_map.ignored_at_launch or frozenset()

    def run(
        self,
        source: Source,
        *,
        version: str,
        options: SyncOptions,
        timeout_s: float,
        on_engine_modified: Callable[[], None],
        on_sent: Callable[[Sequence[str] | None], None] = lambda missing: None,
    ) -> SyncReport:
        """Sync all weights of `source`.

        Collective: over the slice, and over the meshes of the weights.

        Args:
            source: What to send; see `NamedWeights`.
            version: Published once everything has arrived.
            options: See `SyncOptions`.
            timeout_s: For the whole sync, in seconds.
            on_engine_modified: Called on every rank before the first byte may change in the engine.
            on_sent: Called on every rank once everything has arrived, before the engine goes on, with the names that its
                loader reads and that were not sent (see `SyncReport.missing`).

        Raises:
            TpColocateError: The first error of any rank of the slice.
        """
        self.state.history.num_syncs += 1
        self._take_left_elsewhere()
        deadline = Deadline.after(timeout_s)
        session = SyncSession(self.context, self.state, options, version, deadline, on_engine_modified, on_sent)
        try:
            # A full collection in a process that has loaded a model and its libraries takes as long as many syncs.
            with collector_paused(), usual_modes(), shown(session.stats.watch, rank=self.context.group.rank):
                report = run_sync(session, source)
        except BaseException as error:
            session.give_up()
            # Ranks of other slices wait in the same collectives.  A rank with an interrupt that the others know makes them
            # as those do: one that a rank leaves out would meet with a collective of the training's.
            is_shared = isinstance(error, TpColocateError) or self.context.group.has_shared_error
            if is_shared and not isinstance(error, RankLostError):
                session.schedule.finish()
            _clear_frames(error)
            raise
        finally:
            # What is due refers to the trainer's weights: what it drops must not wait for the garbage collector.
            session.schedule.enter(())
        # The engine handles updates one after the other: those of earlier, failed syncs are over by now.
        self.reclaim()
        self.state.mappings.forget_released()
        return report

    def call_back(self, *, timeout_s: float) -> int:
        """Take back mapped memory that the trainer has dropped; until then torch keeps it for the workers that map it.

        Collective: over the slice.  What is mapped is not asked first: a rank that failed in a sync may know of other memory.

        Returns:
            Bytes that this rank has back.
        """
        mappings, slice_ranks = self.state.mappings, self.context.layout.slice_ranks
        expired = mappings.expired()
        what = "take back memory that the engine still maps"
        group = self.context.group
        mine = {rank: [one.name for one in expired if rank in one.handles] for rank in slice_ranks}
        of_ranks = group.all_gather(mine, what=what, timeout_s=timeout_s)
        if not any(names for of_rank in of_ranks for names in of_rank.values()):
            return 0
        error: BaseException | None = None
        try:
            self._release([[name for of_rank in of_ranks for name in of_rank[rank]] for rank in slice_ranks], timeout_s)
        except BaseException as caught:
            error = caught
        group.agree(error, None, what=what, timeout_s=timeout_s)
        mappings.retire(expired)
        # What workers of other slices map as well comes back with the next sync.
        released = [one for one in expired if set(slice_ranks).issuperset(one.handles)]
        try:
            if not self.state.mapped.is_trusted:
                for one in released:
                    one.reclaim(slice_ranks)  # some may never have been opened
            wait_unmapped(self.context, released, Deadline.after(timeout_s))
        except BaseException as caught:
            error = caught
        group.agree(error, None, what=f"{what}: until it is back", timeout_s=timeout_s + group.timeout_s)
        mappings.forget(released)
        if self.context.device.type == "cuda":
            torch.cuda.ipc_collect()
            # A trainer that moved these weights away wants the engine to have the memory, not this process's allocator.
            torch.cuda.empty_cache()
        return sum(one.num_bytes for one in released)

    def _release(self, of_ranks: list[list[str]], timeout_s: float) -> None:
        if self.context.server is None:
            return
        raise_worker_errors(self._ask(release_commands(of_ranks), timeout_s), "the trainer's memory was not released")

    def warm_up(self, *, timeout_s: float) -> frozenset[str] | None:
        """Do what the first sync would have to wait for: load kernels here and in the workers, and trace the loader there.

        Not collective: the owner asks the engine.  What goes wrong there is left for the first sync to meet.

        Args:
            timeout_s: For the engine's part, in seconds.

        Returns:
            On the owner, what the loader reads nothing of, for `note_ignored` of all ranks; None if it was not traced.
        """
        with contextlib.suppress(RuntimeError):  # no memory for them: the sync that needs them reports it
            load_kernels(self.context.device)
        if self.context.server is None:
            return None
        started = time.monotonic()
        shapes = [] if self.spec is None else [[name, list(shape)] for name, shape in self.spec.shapes.items()]
        try:
            replies = self._ask(list(addressed_to_all(WarmUp(shapes), self.context.tp_size).values()), timeout_s)
        except Exception as error:  # the server would be left running without an owner if this was raised
            logger.debug("the engine was not warmed up: %s", error)
            return None
        problems = "".join(f"; TP rank {k}: {one.error}" for k, one in replies.items() if one.error is not None)
        logger.debug("the engine was warmed up in %.2f s%s", time.monotonic() - started, problems)
        ignored = [None if reply.result is None else reply.result.ignored for reply in replies.values()]
        found = [frozenset(one) for one in ignored if one is not None]
        return frozenset.intersection(*found) if len(found) == len(ignored) else None

    def note_ignored(self, ignored: frozenset[str] | None) -> None:
        """Enter what `warm_up` returned on the owner."""
        self.state.loader_map.ignored_at_launch = ignored

    def _ask(self, commands: list[Addressed], timeout_s: float) -> Replies:
        """On the owner, outside of a sync: send a command to each worker; the engine goes on with the weights it has."""
        with self._connected(timeout_s) as connection:
            connection.post(dict(enumerate(commands)), 0)
            return connection.collect(0, timeout_s=timeout_s)

    @contextlib.contextmanager
    def _connected(self, timeout_s: float) -> Iterator[OwnerConnection]:
        context = self.context
        assert context.server is not None
        connection = OwnerConnection(
            context.server,
            folder=context.folder,
            loader=context.loader,
            tp_size=context.tp_size,
            deadline=Deadline.after(timeout_s),
        )
        try:
            connection.open()
            connection.wait()
            yield connection
            connection.leave()
        except BaseException:
            connection.abandon(timeout_s=GRACE_S)
            raise
        context.server.cancel_sync(timeout_s=timeout_s)

    def _take_left_elsewhere(self) -> None:
        """The next good sync ends what a failed slice may have open: its engine, too, handles updates one after the other."""
        self.state.abandoned += self.state.left_elsewhere
        self.state.left_elsewhere = []

    def reclaim(self) -> list[ipc_payload.Outstanding]:
        """Set the counters of failed syncs right; only once the engine is known to be past them."""
        ledgers, self.state.abandoned = self.state.abandoned, []
        return [item for ledger in ledgers for item in ledger.reclaim()]

    def close(self, *, timeout_s: float) -> list[ipc_payload.Outstanding]:
        """Free what failed syncs left behind and what is mapped; only once the engine is gone.

        Args:
            timeout_s: How long to wait for the engine's end, where there is anything that it might still read.

        Returns:
            Handles that the engine never gave back.
        """
        self._take_left_elsewhere()
        if not self.state.abandoned and not len(self.state.mappings) and not self.state.mappings.retired:
            return []
        deadline = Deadline.after(timeout_s)
        while self.context.reader_is_alive():
            if deadline.has_passed:
                logger.warning("the engine still runs: memory that it maps stays allocated until this process ends")
                return []
            time.sleep(_END_POLL_S)
        lost = self.reclaim()
        self.state.mappings.reclaim(self.context.layout.slice_ranks)
        if self.context.device.type == "cuda":
            torch.cuda.ipc_collect()
        return lost


def _clear_frames(error: BaseException | None) -> None:
    """Drop the local variables of the phases from an error's tracebacks: an error that is kept must not keep weights."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            for frame, _ in traceback.walk_tb(one.__traceback__):
                if frame.f_globals.get("__name__", "").startswith(_PACKAGE):
                    with contextlib.suppress(RuntimeError):  # it still runs
                        frame.clear()
            pending += [one.__cause__, one.__context__]


__all__ = ["WeightSyncer"]
