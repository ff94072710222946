"""The mesh collectives of a sync, each of which enters in the schedule what will be due after it.

Every rank of a mesh makes these calls in the same order, whether its own slice has failed or not: what a call does next
depends only on what all of its ranks have exchanged in it.  The order, from the first to the last:

    route, [gather ..., verdict], map, [reach, reached], exchange, mapped, plan,
    sums, halves, ingredients, stage ..., staged, done, gather ...

A sync that uses the plan of the last one goes from `route` or `map` straight to `sums`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch.distributed as dist

from tpcolocate.errors import SyncError
from tpcolocate.weights.buckets import arranged
from tpcolocate.weights.plan.sharding import mesh_groups
from tpcolocate.weights.plan.transfer_plan import (
    Cost,
    DirectBlocks,
    Group,
    Reach,
    TransferRequest,
    costs_here,
    plan_transfer,
)
from tpcolocate.weights.sources.lazy_tensor import Items, is_collective
from tpcolocate.weights.sync.mesh_schedule import MeshCall, gathers
from tpcolocate.weights.sync.records import GroupPayload, MapDecision, MapView, Opened, Payload, Route
from tpcolocate.weights.sync.session import SyncSession
from tpcolocate.weights.transport.mapped_memory import MAPPABLE, STAGED, STEADY
from tpcolocate.weights.transport.staging import PlannedTransfer, SourceBlock, Transfer

HALVES, HALVES_ELSEWHERE = -3, -4
"""Stand for a bucket's number in errors about staging memory: that of workers of this slice, and of other slices."""
SLICE_FAILED = "another slice has failed"
_NOT_READ = -1
"""In `route`, in place of whether a slice transfers anything."""
_NO_ROUTE = Route({}, repeats=False, verified=False)
_NOTHING = MapView(None)
_NO_BLOCK = SourceBlock((), (), 0)


@dataclass(slots=True)
class _Course:
    """What the calls from `map` to `plan` work on, and have exchanged; written by them alone, in their order.

    Attributes:
        session: The sync.
        items: Returns all weights.
        route: What is transferred.
        opened: What the slice agreed on.
        decision: Of `map`.
        reach: Group -> who reaches whom.
        payloads: Group -> what each rank gives.
        is_mapped: Whether all workers have mapped what they should.
    """

    session: SyncSession
    items: Callable[[], Items]
    route: Route
    opened: Opened
    decision: MapDecision
    reach: Mapping[Group, Reach]
    payloads: Mapping[dist.ProcessGroup, Sequence[GroupPayload | None]] = field(default_factory=dict)
    is_mapped: bool = True

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        return mesh_groups(self.route.shards)


def route_call(session: SyncSession, items: Callable[[], Items], groups: Sequence[dist.ProcessGroup]) -> MeshCall:
    """The first mesh collective of a sync; without arguments it reports that this slice transfers nothing.

    Args:
        items: Returns all weights.
        groups: Among whose ranks they are sharded.
    """
    spanning = _spanning(session, groups)

    def run(mine: Route = _NO_ROUTE, digest: int = 0, opened: Opened | None = None) -> Route:
        ready, repeats, verified, alike = bool(mine.shards), mine.repeats, mine.verified, True
        is_read = True
        for group in spanning:  # within a slice the ranks have agreed
            flags = (int(ready) if is_read else _NOT_READ, digest, -digest, int(repeats), int(verified))
            all_ready, low, high, all_repeat, all_verified = session.mesh.min(group, flags)
            is_read = all_ready != _NOT_READ
            alike = alike and low == -high
            ready = ready and all_ready > 0 and low == -high
            repeats = repeats and bool(all_repeat)
            verified = verified and bool(all_verified)
        if not is_read:
            raise SyncError(
                f"{SLICE_FAILED}: a rank of it cannot read its weights, so they cannot be gathered",
                hint="see the error of that rank; the engine goes on with the weights that it has",
            )
        route = Route(mine.shards if ready else {}, repeats and ready, verified)
        if not route.repeats:  # a sync that repeats another transfers everything that the loader does not ignore
            # The order of gathers is the same in all slices: they drop and move only what they all know alike.
            is_shared = alike and (bool(groups) or not any(is_collective(item) for _, item in items()))
            route = replace(route, ignored=_not_sent(session, items(), is_shared), is_shared=is_shared)
        if not route.shards or opened is None:
            session.schedule.enter(gathers(left_of(session, items(), route)))
        elif route.repeats:
            ahead = opened.ahead
            assert ahead is not None
            session.schedule.enter(_transfer_calls(session, lambda: ahead, items, route))
        elif route.verified:
            session.schedule.enter([_map_call(session, items, route, opened)])
        else:
            samples = sample_items(session, items(), route)
            session.schedule.enter(chain(gathers(samples), [_verdict_call(session, items, route, opened)]))
        return route

    return MeshCall("route", run, is_collective=bool(spanning))


def unread_call(session: SyncSession, groups: Sequence[dist.ProcessGroup]) -> MeshCall:
    """What a rank makes in place of `route` if it has failed before it knew its weights: no rank of a mesh goes on then.

    Args:
        groups: Among whose ranks the weights are sharded, as far as that can be seen.
    """
    spanning = _spanning(session, groups)

    def run() -> None:
        for group in spanning:
            session.mesh.min(group, (_NOT_READ, 0, 0, 0, 0))

    return MeshCall("route", run, is_collective=bool(spanning))


def _spanning(session: SyncSession, groups: Sequence[dist.ProcessGroup]) -> list[dist.ProcessGroup]:
    return [group for group in groups if session.context.layout.spans_slices(group)]


def sample_items(session: SyncSession, items: Items, route: Route) -> Items:
    """Return one tensor of each kind that is to be transferred."""
    names = set(session.state.loader_map.samples(list(route.shards)))
    return [item for item in items if item[0] in names]


def _verdict_call(session: SyncSession, items: Callable[[], Items], route: Route, opened: Opened) -> MeshCall:
    """Whether the loaders of all slices treated the samples as traced."""

    def run(holds: bool = False) -> bool:
        for group in mesh_groups(route.shards):
            [all_hold] = session.mesh.min(group, (int(holds),))
            holds = holds and bool(all_hold)
        session.schedule.enter(
            [_map_call(session, items, route, opened)]
            if holds
            else gathers(left_of(session, items(), replace(route, shards={}, repeats=False)))
        )
        return holds

    return MeshCall("verdict", run, is_collective=bool(mesh_groups(route.shards)))


# --- what is mapped ------------------------------------------------------------------------------------------------------


def _map_call(session: SyncSession, items: Callable[[], Items], route: Route, opened: Opened) -> MeshCall:
    """Decide what workers map of all ranks, and whether the plan of the last sync can be used."""
    groups, layout, state = mesh_groups(route.shards), session.context.layout, session.state

    def run(mine: MapView = _NOTHING, transfer: Transfer | None = None) -> MapDecision:
        names = list(route.shards)
        least = dict.fromkeys(names, STAGED) if mine.uses is None else dict(zip(names, mine.uses, strict=True))
        views = {layout.rank: mine}
        for group in groups:
            of_group = session.mesh.all_gather_objects(group, mine)
            views |= dict(zip(layout.ranks_of(group), of_group, strict=True))
            uses = [view.uses for view in of_group]
            for i, name in enumerate(names):
                if route.shards[name].group is group:
                    least[name] = min(STAGED if one is None else one[i] for one in uses)
        untrusted = {
            rank
            for rank, view in views.items()
            if not view.is_trusted or state.mapped.worker_ids.get(rank, view.worker_id) != view.worker_id
        }
        if mine.uses is not None:  # else nothing follows here from what is new to this rank
            state.mapped.worker_ids |= {rank: view.worker_id for rank, view in views.items() if view.uses is not None}
        decision = MapDecision(
            persistent=frozenset(name for name, use in least.items() if use == STEADY),
            transient=frozenset(name for name, use in least.items() if use == MAPPABLE),
            same=all(view.same for view in views.values()),
            needs_reach=not all(view.has_reach for view in views.values()) and bool(groups),
            untrusted=frozenset(untrusted),
            holder_ids={rank: view.holder_id for rank, view in views.items()},
        )
        if decision.same:
            if transfer is not None:
                same = transfer
                session.schedule.enter(_transfer_calls(session, lambda: same, items, route))
            return decision
        if opened.ahead is not None:
            opened.ahead.release()  # its memory is needed
        course = _Course(session, items, route, opened, decision, state.mapped.reach_of(groups))
        session.schedule.enter([_reach_call(course) if decision.needs_reach else _exchange_call(course)])
        return decision

    return MeshCall("map", run, is_collective=bool(groups))


def _reach_call(course: _Course) -> MeshCall:
    """Exchange handles of a little memory; returns those that are for this rank's worker: [rank, handle, checksum]."""
    session = course.session

    def run(probes: Mapping[int, Sequence[Any]] | None = None) -> list[Sequence[Any]]:
        found = []
        for group in course.groups:
            for of_rank in session.mesh.all_gather_objects(group, probes):
                if of_rank is not None and session.context.layout.rank in of_rank:
                    found.append(of_rank[session.context.layout.rank])
        session.schedule.enter([_reached_call(course)])
        return found

    return MeshCall("reach", run)


def _reached_call(course: _Course) -> MeshCall:
    """Exchange which ranks' memory each worker could map."""
    session = course.session

    def run(seen: frozenset[int] | None = None) -> Mapping[Group, Reach]:
        reach: dict[Group, Reach] = {}
        for group in course.groups:
            ranks = session.context.layout.ranks_of(group)
            of_ranks = session.mesh.all_gather_objects(group, seen)
            reach[group] = Reach(
                frozenset(
                    (q, p)
                    for q, of_rank in enumerate(of_ranks)
                    for p, rank in enumerate(ranks)
                    if of_rank is not None and rank in of_rank
                )
            )
            if None not in of_ranks:
                session.state.mapped.reach[group] = reach[group]
        course.reach = reach
        session.schedule.enter([_exchange_call(course)])
        return reach

    return MeshCall("reached", run)


def _exchange_call(course: _Course) -> MeshCall:
    """Exchange handles, and descriptions of what each worker reads where it lies."""
    session, groups = course.session, course.groups

    def run(mine: Payload | None = None) -> Mapping[dist.ProcessGroup, Sequence[GroupPayload | None]]:
        course.payloads = {
            group: session.mesh.all_gather_objects(
                group, None if mine is None else mine.of_group(group, session.context.layout.ranks_of(group))
            )
            for group in groups
        }
        session.schedule.enter([_mapped_call(course)])
        return course.payloads

    return MeshCall("exchange", run, is_collective=bool(groups))


def _mapped_call(course: _Course) -> MeshCall:
    """Exchange whether all workers have mapped what they should; returns why not, where one has not."""
    session, groups = course.session, course.groups

    def run(problem: str | None = SLICE_FAILED) -> str | None:
        for group in groups:
            problem = cause_of([problem, *session.mesh.all_gather_objects(group, problem)])
        course.is_mapped = problem is None
        session.schedule.enter([_plan_call(course)])
        return problem

    return MeshCall("mapped", run, is_collective=bool(groups))


def cause_of(problems: Sequence[str | None]) -> str | None:
    """Return why not everything is mapped.

    What went wrong in a worker or on a rank is for the engine's life, and comes before a slice that has failed, which is for
    this sync alone.
    """
    found = [one for one in problems if one is not None]
    return next((one for one in found if one != SLICE_FAILED), found[0] if found else None)


def request_of(
    session: SyncSession, route: Route, decision: MapDecision, reach: Mapping[Group, Reach]
) -> TransferRequest:
    """Return what is to be planned if everything is mapped that may be."""
    mapped = decision.persistent | decision.transient
    return TransferRequest(route.shards, session.state.loader_map.reads, mapped, session.context.layout, reach)


def _plan_call(course: _Course) -> MeshCall:
    """Plan the transfer; then its collectives are due."""
    session, groups = course.session, course.groups

    def run(mine: Payload | None = None) -> tuple[Transfer, Mapping[tuple[Group, int], SourceBlock]]:
        request = request_of(session, course.route, course.decision, course.reach)
        if not course.is_mapped:
            request = replace(request, mapped=frozenset())
        costs = _agreed_costs(session, request)
        blocks = _blocks(course, mine)
        direct = mine.direct if mine is not None and course.is_mapped else None
        made: list[Transfer] = []

        def transfer() -> Transfer:
            if not made:
                made.append(_transfer(course, request, costs, blocks, direct))
            return made[0]

        # Lazily: if this rank cannot plan now, it tries once more for the sake of the other slices.
        session.schedule.enter(_transfer_calls(session, transfer, course.items, course.route))
        return transfer(), blocks

    return MeshCall("plan", run, is_collective=bool(groups))


def _blocks(course: _Course, mine: Payload | None) -> dict[tuple[Group, int], SourceBlock]:
    """What this rank's worker reads where it lies, by source."""
    k = course.session.context.tp_rank
    own = None if mine is None else mine.blocks[None].get(k)
    found: dict[tuple[Group, int], SourceBlock] = {
        (None, 0): own if own is not None and course.is_mapped else _NO_BLOCK
    }
    for group, of_ranks in course.payloads.items():
        for position, of_rank in enumerate(of_ranks):
            blocks = of_rank.blocks if course.is_mapped and of_rank is not None else {}
            found[group, position] = blocks.get(k, _NO_BLOCK)
    return found


def _agreed_costs(session: SyncSession, request: TransferRequest) -> dict[Group, dict[str, Cost]]:
    """Collective: over the groups among which tensors are sharded, whose ranks must cut them into the same stages."""
    costs: dict[Group, dict[str, Cost]] = {}
    for group in request.groups:
        here = costs_here(request, group)
        if group is not None and here:
            sizes = [number for cost in here.values() for number in (cost.num_bytes, int(cost.is_sent))]
            most = iter(session.mesh.max(group, sizes))
            here = {name: Cost(size, bool(is_sent)) for name, size, is_sent in zip(here, most, most)}
        costs[group] = here
    return costs


def _transfer(
    course: _Course,
    request: TransferRequest,
    costs: Mapping[Group, Mapping[str, Cost]],
    blocks: Mapping[tuple[Group, int], SourceBlock],
    direct: DirectBlocks | None,
) -> Transfer:
    session = course.session
    key = f"transfer{session.state.num_syncs}"  # the same on every rank
    plan = plan_transfer(request, costs, staging_bytes=course.opened.bucket_bytes, key=key, blocks=direct)
    sizes = {
        group: [
            {k: len(block.labels) for k, block in of_rank.blocks.items()} if course.is_mapped and of_rank else {}
            for of_rank in of_ranks
        ]
        for group, of_ranks in course.payloads.items()
    }
    planned = PlannedTransfer.of(plan, request.shards, session.context.device, blocks, sizes)
    return Transfer(planned, request.shards, session.mesh)


# --- the transfer --------------------------------------------------------------------------------------------------------


def _transfer_calls(
    session: SyncSession, planned: Callable[[], Transfer], items: Callable[[], Items], route: Route
) -> Iterator[MeshCall]:
    """The collectives of a transfer, and the gathers of what is not transferred."""
    transfer = planned()
    plan, layout = transfer.plan, session.context.layout
    spanning = [group for group in plan.groups if layout.spans_slices(group)]
    yield MeshCall("sums", transfer.expected_direct, is_collective=bool(spanning))
    if plan.stages:
        # First, so that the workers map the halves while the ingredients are gathered.
        yield _halves_call(session, transfer)
        is_gathered = any(one.is_collective for one in transfer.ingredients)
        yield MeshCall("ingredients", transfer.gather_ingredients, is_collective=is_gathered)
    for i, stage in enumerate(plan.stages):
        yield MeshCall("stage", lambda i=i: transfer.fill_stage(i), is_collective=stage.group is not None)
    if plan.stages:
        yield MeshCall("staged", transfer.expected_staged, is_collective=bool(spanning))

    def done(is_good: bool = False) -> bool:
        for group in spanning:
            [all_good] = session.mesh.min(group, (int(is_good),))
            is_good = is_good and bool(all_good)
        return is_good

    # No rank goes on, and changes its weights, before the workers of all slices have read them.  Returns whether they have:
    # those of a slice that failed may never open what was exported to them.
    yield MeshCall("done", done, is_collective=bool(spanning))
    if not route.repeats:  # a sync that repeats another transfers everything
        yield from gathers(left_of(session, items(), route))


def _halves_call(session: SyncSession, transfer: Transfer) -> MeshCall:
    """Export this rank's staging memory and exchange the handles: rank -> those for this rank's worker, half by half."""
    context, plan = session.context, transfer.plan
    groups = [group for group in dict.fromkeys(stage.group for stage in plan.stages) if group is not None]

    def exported() -> dict[int, list[Any]]:
        transfer.prepare()
        given = {}
        for reader in plan.readers:
            bucket = HALVES if reader in context.layout.slice_ranks else HALVES_ELSEWHERE
            handles = [
                session.ledger.export(half, tp_rank=context.layout.tp_ranks[reader], bucket=bucket)
                for half in transfer.halves
            ]
            given[reader] = [handle.describe() for handle in handles]
        return given

    def run() -> dict[int, list[Any]]:
        given: dict[int, list[Any]] = {}
        error: Exception | None = None
        try:
            given = exported()
        except Exception as caught:
            error = caught
            with contextlib.suppress(Exception):
                given = exported()  # once more, for the sake of the other slices
        found = {context.layout.rank: given.get(context.layout.rank, [])}
        for group in groups:
            of_ranks = session.mesh.all_gather_objects(group, given)
            found |= {
                rank: of_rank[context.layout.rank]
                for rank, of_rank in zip(context.layout.ranks_of(group), of_ranks, strict=True)
                if context.layout.rank in of_rank
            }
        if error is not None:
            raise error
        return found

    return MeshCall("halves", run, is_collective=bool(groups))


def left_of(session: SyncSession, items: Items, route: Route) -> Items:
    """Return the weights that are sent as full tensors, those that the loader joins next to each other."""
    if len(items) == len(route.shards) + len(route.ignored):
        return []
    left = [item for item in items if item[0] not in route.shards and item[0] not in route.ignored]
    return arranged(left, session.state.loader_map.group_of) if route.is_shared else left


def _not_sent(session: SyncSession, items: Items, is_shared: bool) -> frozenset[str]:
    """What the loader ignores, but for what ranks of other slices, which may not know it, gather together."""
    ignored = session.state.loader_map.ignored
    if not ignored:
        return ignored
    return frozenset(name for name, item in items if name in ignored and (is_shared or not is_collective(item)))


__all__ = [
    "HALVES",
    "HALVES_ELSEWHERE",
    "SLICE_FAILED",
    "cause_of",
    "left_of",
    "request_of",
    "route_call",
    "sample_items",
]
