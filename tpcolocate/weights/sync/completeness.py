"""What a full sync must bring: what the engine's loader reads, not what lies in the checkpoint's files.

A checkpoint may hold tensors that no TP rank reads: the second name of a tied weight, heads for other purposes, old
buffers.  Once the loader has been traced with the whole checkpoint they are known; they are not missed, and not sent.
"""

from __future__ import annotations

from collections.abc import Collection

from tpcolocate.errors import WeightsMismatchError, some
from tpcolocate.weights.sources.lazy_tensor import have_same_values
from tpcolocate.weights.sources.named_weights import NamedWeights, may_equal, tie_hint
from tpcolocate.weights.sync.session import SyncSession


def check_before_trace(session: SyncSession, weights: NamedWeights) -> None:
    """Check, before the server is asked for anything, what is known by now.

    On an engine's first sync that may be little: what is missing and was not seen to be read may still be ignored.

    Raises:
        WeightsMismatchError: A weight is missing that the loader reads, or a weight that the engine ties differs.
    """
    spec, state = session.context.spec, session.state
    weights.check_extra()
    if spec is None:
        return
    names = _names(weights)
    if not session.options.partial:
        ignored = state.loader_map.ignored
        if not state.loader_map.is_surveyed and state.dry_run_problem is None:
            # What the owner saw at launch; without that everything, until the loader has been traced.
            read = frozenset() if state.read_at_launch is None else state.read_at_launch
            ignored = frozenset(spec.shapes) - read
        spec.check_complete(names, ignored=ignored)
    _check_ties(weights, state.loader_map.ignored)


def check_after_trace(session: SyncSession, weights: NamedWeights) -> None:
    """Check what the trace has shown, before any weight is touched.

    Collective: over the slice, where the trainer holds weights that the engine may tie.

    Raises:
        WeightsMismatchError: As `check_before_trace`.
    """
    spec, ignored = session.context.spec, session.state.loader_map.ignored
    if spec is None or weights.items is None:
        return
    names = _names(weights)
    if not session.options.partial and (missing := spec.missing(names, ignored=ignored)):
        # Every rank has the same names, so every rank comes to the same error.
        spec.refuse_incomplete(missing)
    for group in session.state.loader_map.split_groups(names):
        sent = [name for name in group if name in set(names)]
        raise WeightsMismatchError(
            f"the engine loads {some(group)} only together, and of these the trainer sends {some(sent)}",
            hint="send all of them",
        )
    if any(_ties(weights, ignored)):
        session.together("compare tied weights", lambda: _check_ties(weights, ignored))


def check_at_end(session: SyncSession, weights: NamedWeights) -> None:
    """Check the completeness of what was really sent.

    Raises:
        WeightsMismatchError: A weight that the engine's loader reads was not.
    """
    spec, stats = session.context.spec, session.stats
    if spec is not None and not session.options.partial:
        spec.check_complete([*stats.names, *weights.aliases], ignored=session.state.loader_map.ignored | stats.ignored)


def ignored_names(session: SyncSession) -> list[str]:
    """Return, for the report, what the checkpoint or the trainer has and the loader does not read."""
    return sorted(session.state.loader_map.ignored | session.stats.ignored)


def missing_names(session: SyncSession) -> list[str] | None:
    """Return what the loader reads and this sync has not sent; None if it is not known what the served model has."""
    spec, stats = session.context.spec, session.stats
    if spec is None:
        return None
    return spec.missing(stats.names, ignored=session.state.loader_map.ignored | stats.ignored)


def _names(weights: NamedWeights) -> list[str]:
    return [*(name for name, _ in weights.items or ()), *weights.aliases]


def _ties(weights: NamedWeights, ignored: Collection[str]) -> list[str]:
    """Return what the trainer holds, the engine ignores, and another weight may stand for."""
    items = weights.items or []
    sent = [(name, item) for name, item in items if name not in ignored]
    names = {name for name, _ in sent}
    return [name for name, item in items if name in ignored and may_equal(name, item, sent, names)]


def _check_ties(weights: NamedWeights, ignored: Collection[str]) -> None:
    """Check that the engine's tied weights are equal in the trainer; waits for the device."""
    items = weights.items or []
    of_name = dict(items)
    names = {name for name, _ in items if name not in ignored}
    for name in _ties(weights, ignored):
        candidates = may_equal(name, of_name[name], items, names)
        if not any(have_same_values(of_name[name], other) for other in candidates.values()):
            raise WeightsMismatchError(
                f"the engine does not read {name}, and the trainer's differs from {some(sorted(candidates))}",
                hint=f"the engine may tie them: {tie_hint(name)}",
            )


__all__ = ["check_after_trace", "check_at_end", "check_before_trace", "ignored_names", "missing_names"]
