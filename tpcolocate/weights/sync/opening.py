"""Phase open: hold generation, reach the workers, and compare what the ranks have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tpcolocate.weights.sources.named_weights import Source
from tpcolocate.weights.sync.buckets import check_same_weights, largest_bytes
from tpcolocate.weights.sync.prepare import least_memory_uses, prepare, prepare_again, reusable_sync
from tpcolocate.weights.sync.records import CachedSync, Opened, Prepared, RankView
from tpcolocate.weights.sync.replicas import check_excerpts
from tpcolocate.weights.sync.session import SyncSession
from tpcolocate.weights.transport.connection import Replies
from tpcolocate.weights.transport.mapped_memory import MAPPABLE
from tpcolocate.weights.transport.memory import free_bytes, plan_bucket
from tpcolocate.weights.transport.staging import Transfer


def open_sync(session: SyncSession, source: Source) -> tuple[Prepared, Opened]:
    """Prepare the weights on every rank, hold generation, reach the workers, and compare what the ranks have.

    Collective: over the slice.

    Raises:
        TpColocateError: The first error of any rank.
        WeightsMismatchError: The ranks have different weights.
    """
    cached = reusable_sync(session)
    prepared: Prepared | None = None
    ahead: Transfer | None = None
    greetings: Replies | None = None
    error: BaseException | None = None
    with session.stats.watch.phase("prepare"):
        try:
            if cached is not None and cached.plan.plan.stages:
                # Most likely this is the last sync's module, so the server need not wait for the answer.
                session.connection.open()
            prepared = None if cached is None else prepare_again(session, source, cached)
            if prepared is None:
                prepared = prepare(session, source)
        except BaseException as caught:
            error = caught
    with session.stats.watch.phase("open"):
        try:
            if prepared is not None:
                repeats = cached is not None and prepared.view.repeats
                if repeats and not cached.plan.plan.stages:  # type: ignore[union-attr]
                    # All of this rank's work is one launch, and the GPU is what the sync will wait for: it comes first,
                    # and no thread that talks to the server takes turns with it.
                    ahead = _prepared_again(session, prepared, cached)  # type: ignore[arg-type]
                session.connection.open()
                # What follows is done while the server is waited for.
                if not repeats:
                    _export_ahead(session, prepared)
                elif ahead is None:
                    free = free_bytes(session.context.device)  # before any of it is taken
                    prepared = replace(prepared, view=replace(prepared.view, free_bytes=free))
                    ahead = _prepared_again(session, prepared, cached)  # type: ignore[arg-type]
                greetings = session.connection.wait()
        except BaseException as caught:
            error = caught
        of_ranks = session.agree(error, _report(session, prepared, greetings), what="prepare a weight sync")
    assert prepared is not None
    views = [view for view, *_ in of_ranks if view is not None]
    has_mapped = any(has_mapped for *_, has_mapped in of_ranks)
    check_same_weights(session, [(view.digest, view.summary) for view in views], prepared.weights.items)
    check_excerpts(session, [view.excerpt for view in views])
    _, name, plan_ids, worker_ids, _ = of_ranks[session.context.owner]
    is_current = plan_ids is not None and session.state.loader_map.is_current(plan_ids)
    if not is_current:
        session.state.cached_plan = None  # its programs are gone with what the workers had traced
    repeats = is_current and all(view.repeats for view in views)
    bucket_bytes = _plan_buckets(session, prepared, views, cached if repeats else None)
    repeats = repeats and cached is not None and bucket_bytes == cached.bucket_bytes
    uses = {} if repeats else least_memory_uses(session, prepared, views)
    return prepared, Opened(
        name,
        bucket_bytes,
        repeats,
        uses,
        ahead,
        "" if worker_ids is None else worker_ids[session.context.tp_rank],
        has_new_replicas=any(view.has_new_replicas for view in views),
        has_mapped=has_mapped,
    )


def _report(
    session: SyncSession, prepared: Prepared | None, greetings: Replies | None
) -> tuple[RankView | None, str, list[str] | None, list[str] | None, bool]:
    """What this rank reports to the others: its view, from the owner the session and the workers' plans and identities.

    And whether it knows of memory that is mapped: a rank that failed or was interrupted may know of other memory than they.
    """
    of_workers = None if greetings is None else [greetings[k].result for k in range(session.context.tp_size)]
    return (
        None if prepared is None else prepared.view,
        session.connection.session,
        None if of_workers is None else [one.plan_id for one in of_workers],
        None if of_workers is None else [one.worker_id for one in of_workers],
        session.state.has_mapped,
    )


def _prepared_again(session: SyncSession, prepared: Prepared, cached: CachedSync) -> Transfer:
    """The transfer of the last sync, prepared; most likely no other rank sees a change either."""
    transfer = Transfer(cached.plan.planned, prepared.shards, session.mesh)
    transfer.prepare()
    session.stats.peak.note()
    return transfer


def _export_ahead(session: SyncSession, prepared: Prepared) -> None:
    """Export what an engine's first sync will have mapped, as far as this rank can know.

    If it turns out otherwise, what was exported is taken back unopened.
    """
    state = session.state
    is_first = state.loader_map.is_empty and state.dry_run_problem is None
    if is_first and state.handle_problems.get(session.options.payloads) is None:
        session.transient.export(
            (
                one.local.untyped_storage()
                for one, use in zip(prepared.shards.values(), prepared.view.memory_uses or (), strict=True)
                if use == MAPPABLE
            ),
            session.context.layout.rank,
            session.context.tp_rank,
        )


def _plan_buckets(
    session: SyncSession, prepared: Prepared, views: Sequence[RankView], cached: CachedSync | None
) -> int:
    """Decide on the size of buckets and staging memory; less may be free than in the last sync.

    Args:
        cached: The last sync, if this one repeats it as far as is known.
    """
    if cached is not None and not cached.plan.plan.stages:
        return cached.bucket_bytes  # nothing is staged, however little is free
    weights = prepared.weights
    if cached is not None:
        largest, gathered = cached.largest_bytes, cached.reading_bytes
    else:
        largest, gathered = largest_bytes(weights.items or ()), weights.reading_bytes
    on_cpu = session.context.device.type == "cpu"
    return plan_bucket(
        session.options.bucket_bytes,
        {rank: view.free_bytes for rank, view in zip(session.context.group.ranks, views, strict=True)},
        largest=largest,
        # Ranks of a CPU slice share one /dev/shm.
        copies=session.context.tp_size if on_cpu else 1,
        gathered=gathered,
        on_cpu=on_cpu,
    )


__all__ = ["open_sync"]
