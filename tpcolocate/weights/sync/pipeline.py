"""A weight sync from its source to its report: the table of contents.

Each phase is a function in a module of its own; what they hand to each other are the records in `records`.
"""

from __future__ import annotations

from tpcolocate.report import SyncReport
from tpcolocate.weights.plan.sharding import layouts_of
from tpcolocate.weights.sources.fingerprint import Fingerprint
from tpcolocate.weights.sources.named_weights import Source
from tpcolocate.weights.sync.buckets import largest_bytes, send_buckets, send_stream
from tpcolocate.weights.sync.completeness import check_after_trace, ties_to_check
from tpcolocate.weights.sync.finish import finish
from tpcolocate.weights.sync.mapping import unmap_all
from tpcolocate.weights.sync.mesh_calls import left_of
from tpcolocate.weights.sync.opening import open_sync
from tpcolocate.weights.sync.preflight import choose_sender
from tpcolocate.weights.sync.records import BucketsSent, CachedPlan, CachedSync, Opened, Prepared, Route
from tpcolocate.weights.sync.replicas import compare_replicas
from tpcolocate.weights.sync.route import choose_route, without_transfer
from tpcolocate.weights.sync.session import SyncSession
from tpcolocate.weights.sync.trace import trace_loader, verify_samples
from tpcolocate.weights.sync.transfer import release_staging, transfer
from tpcolocate.weights.transport.mapped_memory import MAPPABLE


def run_sync(session: SyncSession, source: Source) -> SyncReport:
    """Sync all weights of a source.

    Collective: over the slice, and over the meshes of the weights.

    Raises:
        TpColocateError: The first error of any rank of the slice.
    """
    prepared, opened = open_sync(session, source)
    weights, items = prepared.weights, prepared.weights.items
    sender = choose_sender(session, opened)
    traced = trace_loader(session, prepared, opened, transport=sender.transport)
    if not opened.repeats:
        check_after_trace(session, weights)
    if opened.has_new_replicas and sender.transport == "ipc":
        compare_replicas(session, source, weights)
    route = choose_route(session, prepared, opened, transport=sender.transport)
    if not route.shards and opened.has_mapped and not session.options.partial:
        unmap_all(session)
    if items is not None:  # a generator may have nothing to give, or fail before that
        session.mark_engine_modified()

    samples, sent, plan = BucketsSent(), BucketsSent(), None
    if route.shards and not route.verified:
        holds, samples = verify_samples(session, prepared, opened, route, sender)
        route = route if holds else without_transfer(route)
    if route.shards:
        plan = transfer(session, prepared, opened, route, traced=traced)
    else:
        session.transient.reclaim()  # exported in vain
    if items is None:
        sent = send_stream(session, sender, weights, opened.bucket_bytes)
    elif not route.repeats and (left := left_of(session, items, route)):
        if plan is not None:
            release_staging(session)
        sent = send_buckets(session, sender, left, opened.bucket_bytes, doubles=weights.doubles)

    report = finish(
        session,
        weights,
        sender,
        bucket_bytes=opened.bucket_bytes,
        repeats=route.repeats,
        staged=_is_staged(session, plan, samples, sent),
        traced=samples.traced or sent.traced,
    )
    if not route.repeats:
        _cache(session, source, prepared, opened, route, plan)
    return report


def _is_staged(session: SyncSession, plan: CachedPlan | None, samples: BucketsSent, sent: BucketsSent) -> bool:
    """Whether any rank exported memory for this sync alone; the same on every rank."""
    in_buckets = bool(samples.num_buckets or sent.num_buckets)
    return in_buckets or (plan is not None and bool(plan.plan.stages or session.transient.regions))


def _cache(
    session: SyncSession, source: Source, prepared: Prepared, opened: Opened, route: Route, plan: CachedPlan | None
) -> None:
    """Leave to the next sync what it may find unchanged."""
    state, items = session.state, prepared.weights.items
    if plan is not None:
        state.cached_plan = plan
    state.cached_sync = None
    view = prepared.view
    # A sync that transferred everything, and mapped all that it may.
    if (
        plan is None
        or items is None
        or len(items) != len(route.shards) + len(route.ignored)
        or MAPPABLE in (view.memory_uses or "")
    ):
        return
    fingerprint = Fingerprint.of(source, prepared.weights)
    if fingerprint is not None:
        state.cached_sync = CachedSync(
            options=session.options,
            source=fingerprint,
            layouts=layouts_of(route.shards),
            groups=prepared.groups,
            mappings_version=state.mappings.version,
            view=view,
            bucket_bytes=opened.bucket_bytes,
            num_bytes=session.stats.num_bytes,
            largest_bytes=largest_bytes(items),
            reading_bytes=prepared.weights.reading_bytes,
            plan=plan,
            ties=ties_to_check(session, prepared.weights),
        )


__all__ = ["run_sync"]
