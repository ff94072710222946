"""Phase route: whether parts are transferred or full tensors are sent, agreed with all slices that share the meshes.

Also the mesh collectives that follow from it, entered in the schedule in the order in which every slice makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch.distributed as dist

from tpcolocate.weights.buckets import arranged
from tpcolocate.weights.plan.loader_map import TensorEntry
from tpcolocate.weights.plan.sharding import Shards, mesh_groups
from tpcolocate.weights.plan.transfer_plan import Cost, Group, TransferRequest, costs_here, plan_transfer
from tpcolocate.weights.sources.lazy_tensor import Items, is_collective
from tpcolocate.weights.sync.mesh_schedule import MeshCall, gathers
from tpcolocate.weights.sync.records import CachedPlan, Opened, Prepared, Route
from tpcolocate.weights.sync.session import SyncSession
from tpcolocate.weights.transport.staging import PlannedTransfer, Transfer

_NO_ROUTE = Route({}, repeats=False, verified=False)


def choose_route(session: SyncSession, prepared: Prepared, opened: Opened, *, transport: str) -> Route:
    """Decide which tensors are transferred in parts.

    Collective: over the slice's ranks by what they all have, and over the meshes of the weights by asking: other slices
    share their collectives, and an engine of theirs may have been started anew.
    """
    loader_map = session.state.loader_map
    shards = prepared.shards
    if not opened.repeats:
        entries = ((name, one, TensorEntry(name, one.shape, one.local.dtype)) for name, one in shards.items())
        shards = {name: one for name, one, entry in entries if transport == "ipc" and loader_map.covers(entry)}
        shards = _without_split_groups(session, prepared, shards)
    names = list(shards)
    mine = Route(shards, opened.repeats, verified=opened.repeats or loader_map.is_verified(names))
    digest = (loader_map.digest(names) if names else 0) ^ loader_map.handling_digest()
    return session.schedule.make("route", mine, digest, opened)


def _without_split_groups(session: SyncSession, prepared: Prepared, shards: Shards) -> Shards:
    """Leave out what the loader joins with a tensor that has to be sent in full."""
    group_of = session.state.loader_map.group_of
    in_full = {group_of(name) for name, _ in prepared.weights.items or () if name not in shards} - {None}
    return {name: one for name, one in shards.items() if group_of(name) not in in_full} if in_full else shards


def route_call(session: SyncSession, items: Items, groups: Sequence[dist.ProcessGroup]) -> MeshCall:
    """The first mesh collective of a sync; without arguments it reports that this slice transfers nothing.

    Args:
        items: All weights.
        groups: Among whose ranks they are sharded.
    """

    def run(mine: Route = _NO_ROUTE, digest: int = 0, opened: Opened | None = None) -> Route:
        ready, repeats, verified = bool(mine.shards), mine.repeats, mine.verified
        # The order of gathers is the same in all slices: they drop and move only what they all know alike.
        is_shared = bool(groups) or not any(is_collective(item) for _, item in items)
        for group in groups:
            flags = (int(ready), digest, -digest, int(repeats), int(verified))
            all_ready, low, high, all_repeat, all_verified = session.mesh.min(group, flags)
            is_shared = is_shared and low == -high
            ready = ready and bool(all_ready) and low == -high
            repeats = repeats and bool(all_repeat)
            verified = verified and bool(all_verified)
        route = Route(
            mine.shards if ready else {}, repeats and ready, verified, _not_sent(session, items, is_shared), is_shared
        )
        if not route.shards or opened is None:
            session.schedule.enter(gathers(left_of(session, items, route)))
        elif route.repeats:
            ahead = opened.ahead
            assert ahead is not None
            session.schedule.enter(_transfer_calls(session, lambda: ahead, items, route))
        elif route.verified:
            session.schedule.enter([_plan_call(session, items, route, opened)])
        else:
            samples = sample_items(session, items, route)
            session.schedule.enter(chain(gathers(samples), [_verdict_call(session, items, route, opened)]))
        return route

    return MeshCall("route", run)


def sample_items(session: SyncSession, items: Items, route: Route) -> Items:
    """Return one tensor of each kind that is to be transferred."""
    names = set(session.state.loader_map.samples(list(route.shards)))
    return [item for item in items if item[0] in names]


def _verdict_call(session: SyncSession, items: Items, route: Route, opened: Opened) -> MeshCall:
    """Whether the loaders of all slices treated the samples as traced."""

    def run(holds: bool = False) -> bool:
        for group in mesh_groups(route.shards):
            [all_hold] = session.mesh.min(group, (int(holds),))
            holds = holds and bool(all_hold)
        session.schedule.enter(
            [_plan_call(session, items, route, opened)]
            if holds
            else gathers(left_of(session, items, without_transfer(route)))
        )
        return holds

    return MeshCall("verdict", run, is_collective=bool(mesh_groups(route.shards)))


def _plan_call(session: SyncSession, items: Items, route: Route, opened: Opened) -> MeshCall:
    """Plan the transfer, or use the plan of the last sync where all slices can; then its collectives are due."""

    def run(mapped: frozenset[str] = frozenset(), cached: CachedPlan | None = None) -> tuple[Transfer, bool]:
        same = cached is not None
        for group in mesh_groups(route.shards):
            [all_same] = session.mesh.min(group, (int(same),))
            same = same and bool(all_same)
        if opened.ahead is not None and not same:
            opened.ahead.release()  # its memory is needed
        request = TransferRequest(route.shards, session.state.loader_map.reads, mapped, session.context.layout)
        costs = {} if same else _agreed_costs(session, request)
        made: list[Transfer] = []

        def transfer() -> Transfer:
            if not made:
                made.append(_transfer(session, request, costs, opened, cached if same else None))
            return made[0]

        # Lazily: if this rank cannot plan now, it tries once more for the sake of the other slices.
        session.schedule.enter(_transfer_calls(session, transfer, items, route))
        return transfer(), same

    return MeshCall("plan", run, is_collective=bool(mesh_groups(route.shards)))


def _agreed_costs(session: SyncSession, request: TransferRequest) -> dict[Group, dict[str, Cost]]:
    """Collective: over the groups among which tensors are sharded, whose ranks must cut them into the same stages."""
    costs: dict[Group, dict[str, Cost]] = {}
    for group in request.groups:
        here = costs_here(request, group)
        if group is not None:
            sizes = [number for cost in here.values() for number in (cost.num_bytes, int(cost.is_sent))]
            most = iter(session.mesh.max(group, sizes))
            here = {name: Cost(size, bool(is_sent)) for name, size, is_sent in zip(here, most, most)}
        costs[group] = here
    return costs


def _transfer(
    session: SyncSession,
    request: TransferRequest,
    costs: Mapping[Group, Mapping[str, Cost]],
    opened: Opened,
    cached: CachedPlan | None,
) -> Transfer:
    if cached is not None:
        return opened.ahead if opened.ahead is not None else Transfer(cached.planned, request.shards, session.mesh)
    key = f"transfer{session.state.num_syncs}"  # the same on every rank
    plan = plan_transfer(request, costs, staging_bytes=opened.bucket_bytes, key=key)
    planned = PlannedTransfer.of(plan, request.shards, session.context.device)
    return Transfer(planned, request.shards, session.mesh)


def _transfer_calls(
    session: SyncSession, planned: Callable[[], Transfer], items: Items, route: Route
) -> Iterator[MeshCall]:
    """The collectives of a transfer, and the gathers of what is not transferred."""
    transfer = planned()
    stages = transfer.plan.stages
    for i, stage in enumerate(stages):
        yield MeshCall("stage", lambda i=i: transfer.fill_stage(i), is_collective=stage.is_sent)
    yield MeshCall("checksums", transfer.expected_checksums, is_collective=any(stage.is_sent for stage in stages))
    yield from gathers(left_of(session, items, route))


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


def without_transfer(route: Route) -> Route:
    """Return the route on which everything is sent as full tensors."""
    return replace(route, shards={}, repeats=False)


__all__ = ["choose_route", "left_of", "route_call", "sample_items", "without_transfer"]
