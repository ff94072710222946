"""Phase route: whether parts are transferred or full tensors are sent, agreed with all slices that share the meshes."""

from __future__ import annotations

from dataclasses import replace

from tpcolocate.weights.plan.loader_map import TensorEntry
from tpcolocate.weights.plan.sharding import Shards
from tpcolocate.weights.sync.records import Opened, Prepared, Route
from tpcolocate.weights.sync.session import SyncSession


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


def without_transfer(route: Route) -> Route:
    """Return the route on which everything is sent as full tensors."""
    return replace(route, shards={}, repeats=False)


__all__ = ["choose_route", "without_transfer"]
