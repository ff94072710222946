"""Phase map: have the workers map the trainer's own memory, and release what is no longer used."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from tpcolocate.deadline import Deadline
from tpcolocate.errors import DeadlineError
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, RunProgram
from tpcolocate.weights.plan.sharding import Shards
from tpcolocate.weights.sync.records import Opened, Route
from tpcolocate.weights.sync.session import RELEASE_S, SliceContext, SyncSession
from tpcolocate.weights.transport.bucket_sender import slowest
from tpcolocate.weights.transport.connection import Replies
from tpcolocate.weights.transport.mapped_memory import MAPPABLE, STEADY, PersistentMapping, PersistentMappings
from tpcolocate.worker_errors import raise_worker_errors

_POLL_S = 0.001


def map_memory(session: SyncSession, route: Route, opened: Opened, *, traced: bool) -> frozenset[str]:
    """Have the workers map what may be mapped and is not yet, and release what is no longer used.

    Collective: over the slice.

    Args:
        traced: Whether this sync has traced the loader.  Then what can be mapped was exported meanwhile, and is mapped for
            this sync alone: once for an engine, since to map all of it anew at every sync would be no faster than to stage.

    Returns:
        Names that are mapped on all ranks.
    """
    state = session.state
    uses = opened.memory_uses
    persistent = {name for name in route.shards if uses.get(name) == STEADY}
    transient = {name for name in route.shards if traced and uses.get(name) == MAPPABLE}
    new: list[list[Any]] = []
    old: list[PersistentMapping] = []
    error: Exception | None = None
    try:
        old, new = _changes(session, route.shards, persistent)
        if session.transient.error is not None:
            raise session.transient.error
        new += session.transient.described()
    except Exception as caught:
        error = caught  # memory that cannot be exported, for whatever reason, is staged
    mine = ([one.name for one in old], new, None if error is None else str(error))
    of_ranks = session.agree(None, mine, what="export memory for the engine")
    problem = next((text for *_, text in of_ranks if text is not None), None)
    mapped = frozenset(persistent | transient)
    if problem is None and not any(release or map_ for release, map_, _ in of_ranks):
        state.mapped_names = frozenset(persistent)
        return mapped
    commands = [
        Addressed(k, RunProgram(release=release, map=[] if problem is not None else map_))
        for k, (release, map_, _) in enumerate(of_ranks)
    ]
    replies = session.ask("map the trainer's memory", commands)
    session.transient.note_opened({rank: reply.opened for rank, reply in replies.items()})
    session.together(
        "take back memory that is no longer mapped",
        lambda: wait_unmapped(session.context, state.mappings, old, session.deadline.within(RELEASE_S)),
    )
    problem = problem if problem is not None else _first_error(replies)
    if problem is not None:
        _stop_mapping(session, problem)
        return frozenset()
    session.stats.add_worker_seconds({"map": slowest(replies)["open"]})
    state.mapped_names = frozenset(persistent)
    return mapped


def _changes(
    session: SyncSession, shards: Shards, persistent: Iterable[str]
) -> tuple[list[PersistentMapping], list[list[Any]]]:
    """Persistent mappings that are no longer used, and [region, handle] of the new ones."""
    state, tp_rank = session.state, session.context.tp_rank
    storages = [
        shards[name].local.untyped_storage()
        for name in persistent
        if any(read.region.meet(shards[name].region) for read in state.loader_map.reads[name][tp_rank])
    ]
    old = state.mappings.unused(storages)
    new = []
    for storage in storages:
        if state.mappings.find(storage) is None:
            added = state.mappings.add(storage)
            new.append([added.name, added.handle.describe()])
    return old, new


def _first_error(replies: Replies) -> str | None:
    return next((f"TP rank {k}: {reply.error}" for k, reply in replies.items() if reply.error is not None), None)


def _stop_mapping(session: SyncSession, why: str) -> None:
    """Go on with staging memory alone, for this engine's life.  Collective: over the slice."""
    state = session.state
    state.mapping_problem = why.splitlines()[0]
    state.mapped_names = frozenset()
    session.stats.warnings.append(f"the trainer's memory is not mapped by the engine: {state.mapping_problem}")
    mine = [*(one.name for one in state.mappings.all()), *session.transient.regions.values()]
    of_ranks = session.agree(None, mine, what="name all mapped memory")
    replies = session.ask("release the trainer's memory", release_commands(of_ranks))
    raise_worker_errors(replies, "the trainer's memory was not released", rank=session.context.owner_rank)
    # The workers have confirmed that they map nothing of it: what is left was never opened.
    state.mappings.reclaim()
    session.transient.reclaim()


def release_commands(of_ranks: Sequence[Sequence[str]]) -> list[Addressed]:
    """Return commands that release regions, by TP rank."""
    return [Addressed(k, RunProgram(release=names)) for k, names in enumerate(of_ranks)]


def wait_unmapped(
    context: SliceContext, mappings: PersistentMappings, old: list[PersistentMapping], deadline: Deadline
) -> None:
    """Wait until the workers have unmapped what they are to release, and forget it.

    Raises:
        DeadlineError: Something is still mapped.
    """
    while old and any(one.handle.count() > 0 for one in old):
        if deadline.has_passed:
            raise DeadlineError(
                f"TP rank {context.tp_rank} did not release memory that it maps",
                hint="shut the engine down; the memory is then reclaimed",
                rank=context.group.rank,
            )
        time.sleep(_POLL_S)
    mappings.remove({one.name for one in old})


__all__ = ["map_memory", "release_commands", "wait_unmapped"]
