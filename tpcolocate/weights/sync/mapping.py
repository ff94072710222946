"""Phases map and plan: which memory the workers map, of their own ranks and of others, and what follows for the transfer."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tpcolocate import ipc_payload
from tpcolocate.deadline import Deadline
from tpcolocate.errors import DeadlineError, TpColocateError, some
from tpcolocate.in_server.tpcolocate_receiver.checksums import checksum
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, ProbeRanks, ReleaseStaging, RunProgram
from tpcolocate.weights.plan.sharding import mesh_groups
from tpcolocate.weights.plan.transfer_plan import Group, Reach, TransferRequest, blocks_here, readers_here
from tpcolocate.weights.sync.mesh_calls import SLICE_FAILED, cause_of, request_of
from tpcolocate.weights.sync.records import (
    CachedPlan,
    GroupPayload,
    MapDecision,
    MapView,
    Opened,
    Payload,
    Route,
)
from tpcolocate.weights.sync.session import RELEASE_S, SliceContext, SyncSession
from tpcolocate.weights.transport.bucket_sender import slowest
from tpcolocate.weights.transport.connection import Replies
from tpcolocate.weights.transport.mapped_memory import MAPPABLE, STAGED, TRANSIENT_ELSEWHERE, PersistentMapping
from tpcolocate.weights.transport.staging import SourceBlock, Transfer, block_rows
from tpcolocate.worker_errors import raise_worker_errors

_POLL_S = 0.001
_PROBE_BYTES = 4096
_PROBE_S = 15.0
_PROBE = -5
"""Stands for a bucket's number in errors."""

_Readers = Mapping[int, tuple[torch.UntypedStorage, Sequence[int]]]
"""``_cdata`` of a storage -> the storage, and the ranks whose workers read it."""
PlannedHere = tuple[Transfer, CachedPlan, Mapping[tuple[Group, int], SourceBlock] | None]
"""The transfer, what the next sync may use of it, and, unless the programs are defined already, what they read."""


def map_and_plan(session: SyncSession, opened: Opened, route: Route, *, traced: bool) -> PlannedHere | BaseException:
    """Have the workers map what they may of all ranks' memory, and plan the transfer.

    Collective: over the slice, and over the meshes of the weights.

    Args:
        traced: Whether this sync has traced the loader.  Then memory that has not stayed in place yet is mapped for this
            sync alone: once for an engine, since to map all of it anew at every sync would be no faster than to stage.

    Returns:
        The plan; or what went wrong on this rank after the last agreement, for the next one.
    """
    state = session.state
    groups = mesh_groups(route.shards)
    with session.stats.watch.phase("map"):
        # Where another slice keeps this one from repeating its last sync, nothing new was reported.
        permitted = state.mapped.least_memory_uses(route.shards) if opened.repeats else opened.memory_uses
        uses = [permitted.get(name, STAGED) for name in route.shards]
        uses = [STAGED if use == MAPPABLE and not traced else use for use in uses]
        places = _places(route, uses)
        signature = _signature(session, opened, route, uses, places)
        last = state.cached_plan
        same = last is not None and last.signature == signature and state.mapped.is_trusted
        view = MapView(
            "".join(uses),
            same=same,
            has_reach=all(group in state.mapped.reach for group in groups),
            worker_id=opened.worker_id,
            is_trusted=state.mapped.is_trusted,
            holder_id=state.mappings.identity,
        )
        reusable: Transfer | None = None
        if same and last is not None:
            reusable = opened.ahead or Transfer(last.planned, route.shards, session.mesh)
        decision: MapDecision = session.schedule.make("map", view, reusable)
        if decision.same:
            assert reusable is not None and last is not None
            return reusable, last, None
        reach = _find_reach(session, groups) if decision.needs_reach else state.mapped.reach_of(groups)
        payload, problem = _payload(session, request_of(session, route, decision, reach), decision)
        received = session.schedule.make("exchange", payload)
        problem = _map_in_workers(session, decision, payload, received, problem)
        problem = session.schedule.make("mapped", problem)
        error = None
        if problem is None:
            state.mapped.names = decision.persistent
            error = _take_back(session, decision, groups)
        else:
            _stop_mapping(session, problem)
    with session.stats.watch.phase("plan"):
        try:
            transfer, blocks = session.schedule.make("plan", payload)
        except BaseException as caught:
            return caught
    if error is not None:
        return error
    if problem is None:
        signature = _signature(session, opened, route, uses, places)  # with the regions that were mapped now
    else:
        signature = object()  # equal to no other
    return transfer, CachedPlan(signature, transfer.planned), blocks


def _places(route: Route, uses: Sequence[str]) -> tuple[object, ...]:
    """Return where this rank's shards lie, as far as that makes a difference to the plan."""
    found: list[object] = []
    for one, use in zip(route.shards.values(), uses, strict=True):
        local = one.local
        found += one.group, one.position, local.dtype, one.compute is None
        if use != STAGED and local.numel():
            found += local.data_ptr(), local.stride()
    return tuple(found)


def _signature(
    session: SyncSession, opened: Opened, route: Route, uses: Sequence[str], places: tuple[object, ...]
) -> object:
    """Equal for syncs that can use the same plan."""
    storages = {}
    for one, use in zip(route.shards.values(), uses, strict=True):
        if use != STAGED:
            storage = one.local.untyped_storage()
            storages[storage._cdata] = storage
    mapped = [session.state.mappings.find(storage) for storage in storages.values()]
    names = tuple(None if one is None else one.name for one in mapped)
    return session.state.loader_map.digest(list(route.shards)), opened.bucket_bytes, tuple(uses), places, names


# --- who reaches whom ----------------------------------------------------------------------------------------------------


def _find_reach(session: SyncSession, groups: Sequence[Any]) -> Mapping[Group, Reach]:
    """Find out which workers can map the memory of which ranks.  Collective: over the slice and the groups."""
    context, ledger = session.context, session.context.new_ledger()
    layout = context.layout
    # Of a sync that fails now, the next one takes them back.
    session.state.left_elsewhere.append(ledger)
    probes: dict[int, list[Any]] | None = {}
    kept = []
    try:
        for rank in dict.fromkeys(rank for group in groups for rank in layout.ranks_of(group)):
            if rank != layout.rank:
                flat = ipc_payload.allocate(_PROBE_BYTES, context.device)
                flat.copy_(torch.frombuffer(bytearray(os.urandom(_PROBE_BYTES)), dtype=torch.uint8))
                kept.append(flat)
                handle = ledger.export(flat, tp_rank=layout.tp_ranks[rank], bucket=_PROBE)
                probes[rank] = [layout.rank, handle.describe(), list(checksum(flat))]  # type: ignore[index]
    except Exception:
        probes = None  # memory that cannot be exported, for whatever reason, is staged
    given = session.schedule.make("reach", probes)
    of_ranks = session.agree(
        None, list({probe[0]: probe for probe in given}.values()), what="find out what is in reach"
    )
    commands = [Addressed(k, ProbeRanks(of_rank)) for k, of_rank in enumerate(of_ranks)]
    replies = session.ask(
        "map a little memory of other ranks", commands, timeout_s=session.deadline.within(_PROBE_S).left()
    )
    raise_worker_errors(replies, "could not look for memory of other ranks", rank=context.owner_rank)
    result = replies[context.tp_rank].result
    reach: Mapping[Group, Reach] = session.schedule.make("reached", frozenset(result.ranks))
    deadline = session.deadline.within(_PROBE_S)
    position = {group: layout.ranks_of(group).index(layout.rank) for group in groups}
    reached = {layout.ranks_of(group)[q] for group in groups for q, p in reach[group].pairs if p == position[group]}
    while len(reached) == len(kept) and ledger.outstanding() and not deadline.has_passed:
        time.sleep(_POLL_S)
    ledger.reclaim()  # what no worker could open
    missing = [rank for rank in result.problems if rank not in result.ranks]
    if missing:
        why = result.problems[missing[0]]
        session.stats.warnings.append(
            f"the worker of rank {layout.rank} cannot map the memory of {some([f'rank {rank}' for rank in missing], between=', ')}, "
            f"which is staged: {why.splitlines()[0]}"
        )
    return reach


# --- what is mapped ------------------------------------------------------------------------------------------------------


def _payload(
    session: SyncSession, request: TransferRequest, decision: MapDecision
) -> tuple[Payload | None, str | None]:
    """Export what workers are to map of this rank; also returns why that was not possible."""
    try:
        persistent = readers_here(request, decision.persistent)
        release = _retire_unused(session, persistent, decision)
        return _exported(session, request, decision, persistent, release), None
    except Exception as error:  # memory that cannot be exported, for whatever reason, is staged
        return None, str(error).splitlines()[0]


def _retire_unused(session: SyncSession, wanted: _Readers, decision: MapDecision) -> dict[int, list[str]]:
    """Retire mappings that are of no use; return rank -> names of all retired regions that its worker is to unmap.

    Args:
        wanted: What is to be mapped from sync to sync.
    """
    mappings = session.state.mappings
    old = mappings.unused({key: readers for key, (_, readers) in wanted.items()})
    if any(decision.untrusted.intersection(one.handles) for one in mappings.all()):
        old = mappings.all()
    mappings.retire(old)
    release: dict[int, list[str]] = {}
    for one in mappings.retired:
        for reader in one.handles:
            release.setdefault(reader, []).append(one.name)
    return release


def _exported(
    session: SyncSession,
    request: TransferRequest,
    decision: MapDecision,
    persistent: _Readers,
    release: Mapping[int, Sequence[str]],
) -> Payload:
    mappings, transient, layout = session.state.mappings, session.transient, request.layout
    exported: dict[int, list[Any]] = {}
    for storage, readers in persistent.values():
        if mappings.find(storage) is None:
            added = mappings.add(storage, readers)
            for reader, handle in added.handles.items():
                exported.setdefault(reader, []).append([added.name, handle.describe()])
    for storage, readers in readers_here(request, decision.transient).values():
        for reader in readers:
            is_elsewhere = reader not in layout.slice_ranks
            transient.export([storage], reader, layout.tp_ranks[reader], is_elsewhere=is_elsewhere)
    if transient.error is not None:
        raise transient.error
    for reader in layout.tp_ranks:
        if described := transient.described(reader):
            exported.setdefault(reader, []).extend(described)
    blocks: dict[Group, dict[int, SourceBlock]] = {group: {} for group in request.groups}
    direct = blocks_here(request)
    for (group, k), block in direct.items():
        rows = block_rows(block, request.shards, mappings, transient.regions)
        blocks[group][k] = SourceBlock(rows, block.labels, block.num_bytes)
    return Payload(exported, release, blocks, direct)


def _map_in_workers(
    session: SyncSession,
    decision: MapDecision,
    mine: Payload | None,
    received: Mapping[Any, Sequence[GroupPayload | None]],
    problem: str | None,
) -> str | None:
    """Have this slice's workers map and unmap what all ranks gave them; return what went wrong.

    Collective: over the slice.

    Args:
        decision: Of the meshes' ranks.
        mine: This rank's payload.
        received: Group -> that of each of its ranks.
        problem: Why this rank has none.
    """
    state, rank = session.state, session.context.layout.rank
    given = [of_rank for of_group in received.values() for of_rank in of_group]
    if problem is None and any(of_rank is None for of_rank in given):
        problem = SLICE_FAILED
    payloads = [one for one in (mine, *given) if one is not None]
    regions = {name: handle for one in payloads for name, handle in one.map.get(rank, ())}
    release: dict[int, list[str]] = {}
    for one in payloads:
        for reader in session.context.layout.slice_ranks if one is mine else [rank]:
            release.setdefault(reader, []).extend(one.release.get(reader, ()))
    release.setdefault(rank, []).extend(_take_forgotten(session, decision))
    _note_regions(session, decision, received)
    view = (release, [[name, handle] for name, handle in regions.items()], problem)
    of_ranks = session.agree(None, view, what="export memory for the engine")
    problem = cause_of([text for *_, text in of_ranks])
    names = [
        list(dict.fromkeys(name for of_rank, *_ in of_ranks for name in of_rank.get(reader, ())))
        for reader in session.context.layout.slice_ranks
    ]
    if any(names) or any(handles for _, handles, _ in of_ranks):
        commands = [
            Addressed(k, RunProgram(release=names[k], map=[] if problem is not None else handles))
            for k, (_, handles, _) in enumerate(of_ranks)
        ]
        state.mapped.is_trusted = False
        replies = session.ask("map the trainer's memory", commands)
        if problem is None:
            session.transient.note_opened({k: reply.opened for k, reply in replies.items()})
        problem = problem if problem is not None else _first_error(replies)
        if problem is None:
            session.stats.add_worker_seconds({"map": slowest(replies)["open"]})
    state.mapped.is_trusted = problem is None
    return problem


def _take_forgotten(session: SyncSession, decision: MapDecision) -> list[str]:
    """Return regions of this rank's worker that the ranks whose memory it is know nothing of, or cannot say in this sync.

    They have another syncer now, as the engine of their slice was started anew, or share no mesh of these weights.
    """
    regions = session.state.mapped.peer_regions
    gone = [
        holder for holder, (identity, _) in regions.items() if decision.holder_ids.get(holder) not in (identity, "")
    ]
    return [name for holder in gone for name in regions.pop(holder)[1]]


def _note_regions(
    session: SyncSession, decision: MapDecision, received: Mapping[Any, Sequence[GroupPayload | None]]
) -> None:
    """Note what this rank's worker will have mapped of other ranks, whether or not it comes to that."""
    layout, regions = session.context.layout, session.state.mapped.peer_regions
    for group, of_group in received.items():
        for holder, one in zip(layout.ranks_of(group), of_group, strict=True):
            if one is not None and holder != layout.rank:
                before = regions.get(holder, ("", frozenset()))[1].difference(one.release.get(layout.rank, ()))
                names = before.union(name for name, _ in one.map.get(layout.rank, ()))
                regions[holder] = decision.holder_ids[holder], names


def _first_error(replies: Replies) -> str | None:
    return next((f"TP rank {k}: {reply.error}" for k, reply in replies.items() if reply.error is not None), None)


def _take_back(session: SyncSession, decision: MapDecision, groups: Sequence[Any]) -> TpColocateError | None:
    """Forget the mappings that all their workers have confirmed to have unmapped; return what went wrong on this rank."""
    mappings, layout = session.state.mappings, session.context.layout
    asked = {*layout.slice_ranks, *(rank for group in groups for rank in layout.ranks_of(group))}
    released = [one for one in mappings.retired if asked.issuperset(one.handles)]
    for one in released:
        if decision.untrusted.intersection(one.handles):
            one.reclaim()  # some may never have been opened, or their reader is gone
    try:
        wait_unmapped(session.context, released, session.deadline.within(RELEASE_S))
    except DeadlineError as error:
        return error
    mappings.forget(released)
    return None


def _stop_mapping(session: SyncSession, problem: str) -> None:
    """Go on with staging memory alone: for this engine's life, unless it was another slice that has failed.

    Collective: over the slice.

    Args:
        problem: Why, the same on all ranks of the meshes.
    """
    state, layout = session.state, session.context.layout
    is_for_good = problem != SLICE_FAILED
    if is_for_good:
        state.mapped.problem = problem.splitlines()[0]
        state.mapped.names = frozenset()
        session.stats.warnings.append(f"the trainer's memory is not mapped by the engine: {state.mapped.problem}")
    session.ask_all("release the trainer's memory", ReleaseStaging(mapped=is_for_good))
    # The workers of this slice have confirmed that they map nothing of it: what is left was never opened.  Those of other
    # slices may not have come so far; a counter that is set right too early would be lowered once more.
    session.set_aside({TRANSIENT_ELSEWHERE})
    session.transient.reclaim()
    if not is_for_good:
        return
    state.mapped.peer_regions.clear()
    elsewhere = session.context.new_ledger()
    for one in (*state.mappings.all(), *state.mappings.retired):
        for reader in set(one.handles).difference(layout.slice_ranks):
            elsewhere.take_over(one.handles[reader], tp_rank=layout.tp_ranks[reader], bucket=TRANSIENT_ELSEWHERE)
    state.left_elsewhere.append(elsewhere)
    state.mappings.reclaim(layout.slice_ranks)


def unmap_all(session: SyncSession) -> None:
    """Have the workers of this slice unmap what they map from sync to sync, which this sync has no use for.

    Collective: over the slice.  What workers of other slices map of this rank's memory comes back with a sync of theirs.
    """
    state, slice_ranks = session.state, set(session.context.layout.slice_ranks)
    # Ranks of other slices that do not come so far must not take it for mapped: the next mapping is made anew everywhere.
    was_trusted, state.mapped.is_trusted = state.mapped.is_trusted, False
    with session.stats.watch.phase("release"):
        session.ask_all("release the trainer's memory", ReleaseStaging(mapped=True))
        state.mapped.names = frozenset()
        state.mapped.peer_regions.clear()
        mappings = state.mappings
        mappings.retire(mappings.all())
        if not was_trusted:
            for one in mappings.retired:
                one.reclaim(slice_ranks)  # some may never have been opened
        coming_back = [one for one in mappings.retired if slice_ranks.issuperset(one.handles)]
        try:
            wait_unmapped(session.context, coming_back, session.deadline.within(RELEASE_S))
        except DeadlineError as late:  # this sync can do without
            session.stats.warnings.append(late.message)
        mappings.forget_released()


def release_commands(of_ranks: Sequence[Sequence[str]]) -> list[Addressed]:
    """Return commands that release regions, by TP rank."""
    return [Addressed(k, RunProgram(release=names)) for k, names in enumerate(of_ranks)]


def wait_unmapped(context: SliceContext, old: Sequence[PersistentMapping], deadline: Deadline) -> None:
    """Wait until the workers have unmapped what they are to release.

    Raises:
        DeadlineError: Something is still mapped.
    """
    while not all(one.is_released for one in old):
        if deadline.has_passed:
            raise DeadlineError(
                f"memory of rank {context.group.rank} is still mapped by a worker that was asked to release it",
                hint="shut the engine down; the memory is then reclaimed",
                rank=context.group.rank,
            )
        time.sleep(_POLL_S)


__all__ = ["map_and_plan", "release_commands", "unmap_all", "wait_unmapped"]
