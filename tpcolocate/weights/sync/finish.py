"""Phase finish: completeness, the workers' end, the weight version, and the report."""

from __future__ import annotations

import logging

import torch

from tpcolocate.errors import SyncError, some
from tpcolocate.in_server.tpcolocate_receiver.protocol import FindUnwritten
from tpcolocate.report import RankReport, SyncReport
from tpcolocate.weights.sources.named_weights import NamedWeights
from tpcolocate.weights.sources.nonfinite import nonfinite_text
from tpcolocate.weights.sync.completeness import check_at_end, ignored_names, missing_names
from tpcolocate.weights.sync.session import WEIGHTS_UNKNOWN, SyncSession
from tpcolocate.weights.transport.bucket_sender import BucketSender
from tpcolocate.weights.transport.memory import allocated_bytes

logger = logging.getLogger(__name__)


def finish(
    session: SyncSession,
    weights: NamedWeights,
    sender: BucketSender,
    *,
    bucket_bytes: int,
    repeats: bool,
    staged: bool,
    traced: bool,
) -> SyncReport:
    """Check that all weights were sent, let the workers go, publish the version, and report.

    Collective: over the slice.

    Args:
        bucket_bytes: As planned.
        repeats: Whether the sync repeated the last one, so that all weights are known to have been sent.
        staged: Whether any rank exported memory for this sync alone; the same on every rank.
        traced: Whether the engine's loader was traced while it loaded.
    """
    error: BaseException | None = None
    with session.stats.watch.phase("finish"):
        if session.options.nonfinite == "refuse":
            _refuse_nonfinite(session)
        if not repeats:
            session.together("check that all weights were sent", lambda: check_at_end(session, weights))
            if traced and not session.options.partial:
                _find_unwritten(session)
        if staged:
            session.on_owner("end the weight sync", session.connection.leave)
            session.transient.forget()
            session.wait_for_release()
        try:
            session.on_sent(missing_names(session))
            session.connection.end(session.version, timeout_s=session.left("finish the weight sync"))
            if session.context.device.type == "cuda":
                torch.cuda.ipc_collect()
        except BaseException as caught:
            error = caught
    return _report(session, sender, error, bucket_bytes)


def _refuse_nonfinite(session: SyncSession) -> None:
    """Refuse what only its arrival has shown: weights that are computed on the way, or that the engine's dtype cannot hold."""
    of_ranks = session.agree(None, sorted(session.stats.nonfinite), what="look for weights that are not finite")
    if names := sorted({name for of_rank in of_ranks for name in of_rank}):
        raise SyncError(nonfinite_text(names), hint=WEIGHTS_UNKNOWN, rank=session.context.owner_rank)


def _find_unwritten(session: SyncSession) -> None:
    """Warn of parameters that no weight was ever copied into; on one TP rank alone that is an error."""
    replies = session.ask_all("look for parameters that nothing was copied into", FindUnwritten())
    unwritten = {tp_rank: set(reply.result.names) for tp_rank, reply in replies.items()}
    common = set.intersection(*unwritten.values())
    if session.stats.unverified:
        return
    for tp_rank, names in unwritten.items():
        if names - common:
            raise SyncError(
                f"TP rank {tp_rank} took nothing for {some(sorted(names - common), between=', ')}, other TP ranks did",
                hint=WEIGHTS_UNKNOWN,
                rank=session.context.owner_rank,
            )
    if common:
        session.stats.warnings.append(
            f"no weight was sent for these parameters of the engine: {some(sorted(common), between=', ')}"
        )


def _report(session: SyncSession, sender: BucketSender, error: BaseException | None, bucket_bytes: int) -> SyncReport:
    """Collective: over the slice.  Raises, on every rank, what went wrong in the owner's last steps.

    Args:
        error: Of this rank.
    """
    context, stats, spec = session.context, session.stats, session.context.spec
    allocated = allocated_bytes(context.device)
    warning = session.state.alarm.note(allocated)
    mine = RankReport(
        rank=context.group.rank,
        seconds=dict(stats.watch.seconds),
        num_exported=sum(ledger.num_exported for ledger in session.ledgers),
        num_returned=sum(ledger.num_returned for ledger in session.ledgers),
        num_mapped=len(session.state.mappings),
        latest_return_s=max(ledger.latest_return_s for ledger in session.ledgers),
        own_bytes=stats.by_way.own,
        peer_bytes=stats.by_way.peer,
        staged_bytes=stats.by_way.staged,
        peak_extra_bytes=stats.peak.extra_bytes,
        allocated_bytes=allocated,
    )
    of_ranks = session.agree(error, (mine, warning, sorted(stats.nonfinite)), what="finish the weight sync")
    warnings = [f"rank {one.rank}: {text}" for one, text, _ in of_ranks if text is not None] + stats.warnings
    nonfinite = sorted({name for *_, names in of_ranks for name in names})
    if nonfinite:
        warnings.append(nonfinite_text(nonfinite))
    problem = session.state.handle_problems.get(session.options.payloads)
    if sender.transport == "file" and problem is not None:
        warnings.append(f"weights go through files: {problem}")
    missing = missing_names(session)
    for text in warnings:
        logger.warning("%s", text)
    return SyncReport(
        rank=context.group.rank,
        weight_version=session.version,
        num_bytes=stats.num_bytes,
        num_tensors=len(stats.names),
        num_buckets=stats.num_buckets,
        seconds=stats.watch.total(),
        transport=sender.transport,
        checked_against="nothing" if spec is None else spec.origin,
        num_replayed=stats.num_replayed,
        worker_seconds=dict(stats.worker_seconds),
        num_verified=len(stats.names) - len(stats.unverified),
        unverified=tuple(sorted(stats.unverified)),
        bucket_bytes=bucket_bytes,
        warnings=tuple(warnings),
        ignored=tuple(ignored_names(session)),
        missing=None if missing is None else tuple(missing),
        ranks=tuple(one for one, *_ in of_ranks),
        nonfinite=tuple(nonfinite),
    )


__all__ = ["finish"]
