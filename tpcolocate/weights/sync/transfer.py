"""Phases map, plan, gather, push and verify of a transfer: only the slices that each TP worker reads are moved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tpcolocate.errors import SyncError, some
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, ReleaseStaging, RunProgram, addressed_to_all
from tpcolocate.weights.plan.transfer_plan import TransferPlan
from tpcolocate.weights.sources.lazy_tensor import full_bytes
from tpcolocate.weights.sync.mapping import map_and_plan
from tpcolocate.weights.sync.mesh_calls import HALVES, HALVES_ELSEWHERE
from tpcolocate.weights.sync.records import CachedPlan, Opened, Prepared, Route
from tpcolocate.weights.sync.session import WEIGHTS_UNKNOWN, SyncSession
from tpcolocate.weights.transport.bucket_sender import slowest
from tpcolocate.weights.transport.connection import Replies
from tpcolocate.weights.transport.mapped_memory import TRANSIENT_ELSEWHERE
from tpcolocate.weights.transport.staging import PlannedTransfer, Transfer, half_region, program_definitions
from tpcolocate.worker_errors import raise_worker_errors

# A GPU that looks for numbers that are not finite while it copies needs more registers.  What that costs has not been
# measured, so repeated syncs do it now and then: NaNs stay in the weights of a training.
_LOOK_EVERY = 8

Found = dict[str, dict[int, Any]]
"""On the owner: program -> TP rank -> the checksums that its worker found."""


@dataclass(frozen=True, slots=True)
class _Posted:
    """A command that has not been answered yet.

    Attributes:
        number: Of the command.
        program: That it runs.
    """

    number: int
    program: str


def transfer(session: SyncSession, prepared: Prepared, opened: Opened, route: Route, *, traced: bool) -> CachedPlan:
    """Transfer all slices, and compare what every worker has with what the training ranks gave.

    Collective: over the slice, and over the meshes of the weights.

    Args:
        traced: Whether this sync has traced the loader.

    Returns:
        The plan, for the next sync.
    """
    if route.repeats:
        assert opened.ahead is not None and session.state.cached_plan is not None
        cached, current, define = session.state.cached_plan, opened.ahead, None
    else:
        cached, current, define = _plan(session, opened, route, traced=traced)
    plan = current.plan
    looks = _looks_for_nonfinite(session, route)
    found: Found = {}
    expected: list[list[int]] = []
    error: BaseException | None = None
    with session.stats.watch.phase("verify"):
        try:
            # Before the workers are busy on the GPUs that this exchange may need.
            expected = session.schedule.make("sums")
        except BaseException as caught:
            error = caught
    command = replace(_command(plan, 0, route, looks=looks), define=define)
    if plan.stages:
        with session.stats.watch.phase("gather"):
            try:
                command = replace(command, map=_halves_to_map(session, plan, session.schedule.make("halves")))
            except BaseException as caught:
                error = caught if error is None else error
    if route.repeats and not plan.stages:
        posted, error = _post_same(session, command, error)
    else:
        posted, error = _post(session, "copy mapped memory", command, None, error, found, current)
    if plan.stages:
        with session.stats.watch.phase("gather"):
            try:
                # The workers map the halves meanwhile: those of another GPU take 9 ms each.
                session.schedule.make("ingredients")
            except BaseException as caught:
                error = caught if error is None else error
    for i, stage in enumerate(plan.stages):
        command = _command(plan, i + 1, route, looks=looks)
        number = session.next_command()
        with session.stats.watch.phase("gather"):
            try:
                session.schedule.make("stage")  # before anything else that can fail: other slices are in it
                session.stats.by_way.staged += stage.num_bytes
            except BaseException as caught:
                error = caught
        posted, error = _post(session, f"copy stage {i}", command, posted, error, found, current, number=number)
    _verify(session, current, posted, found, error, expected)
    if not session.schedule.make("done", True):
        session.set_aside({HALVES_ELSEWHERE, TRANSIENT_ELSEWHERE})
    _count(session, prepared, route, current.planned)
    return cached


def _halves_to_map(session: SyncSession, plan: TransferPlan, halves: Mapping[int, list[Any]]) -> list[list[Any]]:
    """Return [region, handle] of all staging memory that this rank's worker copies out of."""
    missing = [rank for rank in plan.source_ranks if rank not in halves]
    if missing:
        raise SyncError(f"rank {missing[0]} has no staging memory for the worker of rank {plan.layout.rank}")
    return [
        [half_region(rank, number), handle] for rank in plan.source_ranks for number, handle in enumerate(halves[rank])
    ]


def _plan(
    session: SyncSession, opened: Opened, route: Route, *, traced: bool
) -> tuple[CachedPlan, Transfer, list[list[Any]] | None]:
    """Map memory, plan, and prepare on all ranks; also returns the programs that the workers do not have yet."""
    planned = map_and_plan(session, opened, route, traced=traced)

    def prepare() -> list[list[Any]] | None:
        if isinstance(planned, BaseException):
            raise planned
        current, _, blocks = planned
        current.prepare()
        session.stats.peak.note()
        return None if blocks is None else program_definitions(current.plan, blocks)

    with session.stats.watch.phase("gather"):
        # What can fail for want of memory fails here, on all ranks.
        define = session.together("prepare the transfer", prepare)
    assert not isinstance(planned, BaseException)
    return planned[1], planned[0], define


def _looks_for_nonfinite(session: SyncSession, route: Route) -> bool:
    """Whether the workers look for numbers that are not finite in this sync; the same on every rank."""
    if not route.repeats or session.options.nonfinite == "refuse" or session.context.device.type != "cuda":
        return True
    return session.state.num_syncs % _LOOK_EVERY == 0


def _command(plan: TransferPlan, number: int, route: Route, *, looks: bool) -> RunProgram:
    programs = plan.programs
    # Of a sync that repeats another it is known what it ends with: the workers then leave by themselves.
    is_last = route.repeats and number == len(programs) - 1
    return RunProgram(program=programs[number], keep_views=number == 0, is_last=is_last, flags=looks)


def _post_same(
    session: SyncSession, command: RunProgram, error: BaseException | None
) -> tuple[_Posted, BaseException | None]:
    """Send a command that all ranks know to be the same for every worker, without an agreement.

    Args:
        error: Of this rank, for the next agreement; the other ranks do not know of it and go there as well.

    Returns:
        The command, and what went wrong on this rank.
    """
    number = session.next_command()
    if error is None:
        with session.stats.watch.phase("push"):
            try:
                session.connection.post(addressed_to_all(command, session.context.tp_size), number)
            except BaseException as caught:
                error = caught
    return _Posted(number, str(command.program)), error


def _post(
    session: SyncSession,
    what: str,
    command: RunProgram,
    before: _Posted | None,
    error: BaseException | None,
    found: Found,
    current: Transfer,
    *,
    number: int | None = None,
) -> tuple[_Posted, BaseException | None]:
    """Send one command to every worker once all ranks are ready, without waiting for its replies.

    Returns:
        The command, and what went wrong on this rank when it was sent, for the next agreement.
    """
    number = session.next_command() if number is None else number
    replies: Replies = {}
    with session.stats.watch.phase("push"):
        try:
            if error is None and before is not None:
                # The stage before has been copied while this one was filled; its half is the next one's.
                replies = _collect(session, before, found)
        except BaseException as caught:
            error = caught
        mine = Addressed(session.context.tp_rank, command)
        of_ranks = session.agree(error, (mine, replies), what=what)
        if before is not None:
            _accept(session, before, of_ranks[session.context.owner][1], current)
        try:
            session.connection.post({k: of_rank for k, (of_rank, _) in enumerate(of_ranks)}, number)
            error = None
        except BaseException as caught:
            error = caught
    return _Posted(number, str(command.program)), error


def _collect(session: SyncSession, posted: _Posted, found: Found) -> Replies:
    """Wait for the replies to a command; keeps the checksums on the owner, since the others need not have them."""
    replies = session.connection.collect(posted.number, timeout_s=session.left("copy the weights"))
    found[posted.program] = {}
    kept = {}
    for tp_rank, reply in replies.items():
        if reply.result is not None:
            found[posted.program][tp_rank] = reply.result.checksums
            reply = replace(reply, result=replace(reply.result, checksums=None))
        kept[tp_rank] = reply
    return kept


def _accept(session: SyncSession, posted: _Posted, replies: Replies, current: Transfer) -> None:
    """Enter on every rank what the workers replied to a command."""
    # Staging memory is mapped by the first command.
    session.ledger.note_opened(HALVES, {rank: reply.opened for rank, reply in replies.items()})
    raise_worker_errors(replies, "weights did not arrive", hint=WEIGHTS_UNKNOWN, rank=session.context.owner_rank)
    session.stats.add_worker_seconds(slowest(replies))
    result = replies[session.context.tp_rank].result
    if result is not None and result.nonfinite:
        # Other ranks' workers read other slices, whose names their own ranks know.
        labels = _labels(current)[current.plan.programs.index(posted.program)]
        session.stats.nonfinite.update(labels[number] for number in result.nonfinite)


def _labels(current: Transfer) -> list[list[str]]:
    """Return for each program what the sums are of that it reports to this rank."""
    return [
        [label for of_source in current.planned.labels for label in of_source],
        *([one.name for _, one, _ in stage.taken] for stage in current.plan.stages),
    ]


def _verify(
    session: SyncSession,
    current: Transfer,
    posted: _Posted,
    found: Found,
    error: BaseException | None,
    direct: list[list[int]],
) -> None:
    """Wait for the last replies, and compare what every worker has with what the ranks of the mesh gave.

    Args:
        current: The transfer.
        posted: The command that has not been answered.
        error: Of this rank.
        direct: What this rank's worker must find of what it read where it lies, by source.
    """
    plan = current.plan
    expected = [[one for of_source in direct for one in of_source]]
    replies: Replies = {}
    arrived: dict[int, bytes] = {}
    if plan.stages:
        with session.stats.watch.phase("verify"):
            try:
                # Before anything else that can fail: other slices are in it.
                expected += session.schedule.make("staged")
            except BaseException as caught:
                error = caught
    with session.stats.watch.phase("push"):
        try:
            if error is None:
                replies = _collect(session, posted, found)
                arrived = {k: _digest([found[name].get(k) for name in plan.programs]) for k in replies}
        except BaseException as caught:
            error = caught
        of_ranks = session.agree(error, (_digest(expected), replies, arrived), what="copy the weights")
        _, replies, arrived = of_ranks[session.context.owner]
        _accept(session, posted, replies, current)
    if any(given != arrived[tp_rank] for tp_rank, (given, *_) in enumerate(of_ranks)):
        with session.stats.watch.phase("verify"):
            on_owner = session.on_owner("send the checksums that were found", lambda: found)
            session.together("compare what arrived", lambda: _compare(session, current, expected, on_owner))


def _compare(session: SyncSession, current: Transfer, expected: list[list[int]], found: Found) -> None:
    """Name what this rank's worker has that the ranks of the mesh did not give it."""
    tp_rank, plan = session.context.tp_rank, current.plan
    wrong = {
        label
        for program, of_program, sums in zip(plan.programs, _labels(current), expected, strict=True)
        for label, here, there in zip(of_program, sums, found[program][tp_rank], strict=True)
        if here != there
    }
    if wrong:
        raise SyncError(
            f"TP rank {tp_rank} holds other values than were sent: {some(sorted(wrong), between=', ')}",
            hint=WEIGHTS_UNKNOWN,
            rank=session.context.group.rank,
        )


def _digest(checksums: list[Any]) -> bytes:
    return hashlib.sha256(json.dumps(checksums).encode()).digest()


def _count(session: SyncSession, prepared: Prepared, route: Route, planned: PlannedTransfer) -> None:
    stats, cached = session.stats, session.state.cached_sync
    stats.by_way.own, stats.by_way.peer = planned.own_bytes, planned.peer_bytes
    stats.num_buckets += 1 + len(planned.plan.stages)
    stats.num_replayed += len(route.shards)
    stats.names.update(route.shards)
    if route.repeats and cached is not None:
        stats.num_bytes += cached.num_bytes
    else:
        stats.num_bytes += sum(full_bytes(item) for name, item in prepared.weights.items or () if name in route.shards)


def release_staging(session: SyncSession) -> None:
    """Take back what a transfer staged or mapped for this sync, before buckets need the memory.

    Collective: over the slice.
    """
    with session.stats.watch.phase("release"):
        session.ask_all("release the staging memory", ReleaseStaging())
        session.transient.forget()
        session.wait_for_release()


__all__ = ["release_staging", "transfer"]
