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
from tpcolocate.weights.sync.mapping import map_memory
from tpcolocate.weights.sync.records import CachedPlan, Opened, Prepared, Route
from tpcolocate.weights.sync.session import WEIGHTS_UNKNOWN, SyncSession
from tpcolocate.weights.transport.bucket_sender import slowest
from tpcolocate.weights.transport.connection import Replies
from tpcolocate.weights.transport.staging import Transfer, program_definitions
from tpcolocate.worker_errors import raise_worker_errors

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
    """Transfer all slices, and compare what every worker has with what its training ranks gave.

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
    found: Found = {}
    if route.repeats:
        posted, error = _post_same(session, _command(current.plan, 0, route))
    else:
        command = replace(_command(current.plan, 0, route), define=define)
        posted, error = _post(session, "copy mapped memory", command, None, None, found)
    for i in range(len(current.plan.stages)):
        command = _command(current.plan, i + 1, route)
        number = session.next_command()
        with session.stats.watch.phase("gather"):
            try:
                half = session.schedule.make("stage")  # before anything else that can fail: other slices are in it
                if i < 2:
                    handle = session.ledger.export(half, tp_rank=session.context.tp_rank, bucket=number)
                    command = replace(command, map=[[f"stage{i}", handle.describe()]])
                session.stats.staged_bytes += current.plan.stages[i].num_bytes
            except BaseException as caught:
                error = caught
        posted, error = _post(session, f"copy stage {i}", command, posted, error, found, number=number)
    _verify(session, current.plan, posted, found, error)
    _count(session, prepared, route, current.plan)
    return cached


def _plan(
    session: SyncSession, opened: Opened, route: Route, *, traced: bool
) -> tuple[CachedPlan, Transfer, list[list[Any]] | None]:
    """Map memory, plan, and prepare on all ranks; also returns the programs that the workers do not have yet."""
    stats, state = session.stats, session.state
    with stats.watch.phase("map"):
        mapped = map_memory(session, route, opened, traced=traced)
    with stats.watch.phase("plan"):
        signature = _signature(session, opened, route, mapped)
        last = state.cached_plan if state.cached_plan is not None and state.cached_plan.signature == signature else None
        planned: tuple[Transfer, bool] | BaseException
        try:
            planned = session.schedule.make("plan", mapped, last)
        except BaseException as caught:
            planned = caught

    def prepare() -> list[list[Any]] | None:
        if isinstance(planned, BaseException):
            raise planned
        current, same = planned
        current.prepare()
        stats.peak.note()
        if same:
            return None
        return program_definitions(current.plan, route.shards, state.mappings, session.transient.regions)

    with stats.watch.phase("gather"):
        # What can fail for want of memory fails here, on all ranks.
        define = session.together("prepare the transfer", prepare)
    assert not isinstance(planned, BaseException)
    return CachedPlan(signature, planned[0].planned), planned[0], define


def _signature(session: SyncSession, opened: Opened, route: Route, mapped: frozenset[str]) -> object:
    """Equal for syncs that can use the same plan."""
    loader_map, mappings = session.state.loader_map, session.state.mappings
    storages = {name: one.local.untyped_storage() for name, one in route.shards.items() if name in mapped}
    names = {name: found.name for name, storage in storages.items() if (found := mappings.find(storage)) is not None}
    return (
        loader_map.digest(list(route.shards)),
        opened.bucket_bytes,
        tuple((one.group, one.position) for one in route.shards.values()),
        tuple(
            (name, names.get(name), one.local.data_ptr(), one.local.stride(), one.local.dtype)
            for name, one in route.shards.items()
            if name in mapped
        ),
    )


def _command(plan: TransferPlan, number: int, route: Route) -> RunProgram:
    programs = list(plan.programs)
    # Of a sync that repeats another it is known what it ends with: the workers then leave by themselves.
    is_last = route.repeats and number == len(programs) - 1
    return RunProgram(program=programs[number], keep_views=number == 0, is_last=is_last)


def _post_same(session: SyncSession, command: RunProgram) -> tuple[_Posted, BaseException | None]:
    """Send a command that all ranks know to be the same for every worker; also returns this rank's error."""
    number = session.next_command()
    posted = _Posted(number, str(command.program))
    with session.stats.watch.phase("push"):
        try:
            session.connection.post(addressed_to_all(command, session.context.tp_size), number)
        except BaseException as caught:
            return posted, caught
    return posted, None


def _post(
    session: SyncSession,
    what: str,
    command: RunProgram,
    before: _Posted | None,
    error: BaseException | None,
    found: Found,
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
            _accept(session, before, of_ranks[session.context.owner][1])
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


def _accept(session: SyncSession, posted: _Posted, replies: Replies) -> None:
    """Enter on every rank what the workers replied to a command."""
    session.ledger.note_opened(posted.number, {rank: reply.opened for rank, reply in replies.items()})
    raise_worker_errors(replies, "weights did not arrive", hint=WEIGHTS_UNKNOWN, rank=session.context.owner_rank)
    session.stats.add_worker_seconds(slowest(replies))


def _verify(
    session: SyncSession, plan: TransferPlan, posted: _Posted, found: Found, error: BaseException | None
) -> None:
    """Wait for the last replies, and compare what every worker has with what the ranks of the mesh gave.

    Args:
        posted: The command that has not been answered.
        error: Of this rank.
    """
    expected: dict[str, list[int]] = {}
    replies: Replies = {}
    arrived: dict[int, bytes] = {}
    with session.stats.watch.phase("verify"):
        try:
            expected = session.schedule.make("checksums")  # before anything else that can fail: other slices are in it
        except BaseException as caught:
            error = caught
    with session.stats.watch.phase("push"):
        try:
            if error is None:
                replies = _collect(session, posted, found)
                arrived = {k: _digest([found[name].get(k) for name in plan.programs]) for k in replies}
        except BaseException as caught:
            error = caught
        given = _digest([expected[name] for name in plan.programs]) if expected else b""
        of_ranks = session.agree(error, (given, replies, arrived), what="copy the weights")
        _, replies, arrived = of_ranks[session.context.owner]
        _accept(session, posted, replies)
    if any(given != arrived[tp_rank] for tp_rank, (given, *_) in enumerate(of_ranks)):
        with session.stats.watch.phase("verify"):
            on_owner = session.on_owner("send the checksums that were found", lambda: found)
            session.together("compare what arrived", lambda: _compare(session, plan, expected, on_owner))


def _compare(session: SyncSession, plan: TransferPlan, expected: Mapping[str, list[int]], found: Found) -> None:
    """Name what this rank's worker has that the ranks of the mesh did not give it."""
    tp_rank = session.context.tp_rank
    wrong = {
        one.name
        for program, slices in plan.programs.items()
        for one, here, there in zip(slices, expected[program], found[program][tp_rank], strict=True)
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


def _count(session: SyncSession, prepared: Prepared, route: Route, plan: TransferPlan) -> None:
    stats, cached = session.stats, session.state.cached_sync
    stats.direct_bytes = plan.direct_bytes
    stats.num_buckets += 1 + len(plan.stages)
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
