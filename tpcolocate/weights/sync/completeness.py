"""What a full sync must bring: what the engine's loader reads, not what lies in the checkpoint's files.

A checkpoint may hold tensors that no TP rank reads: the second name of a tied weight, heads for other purposes, old
buffers.  Once the loader has been traced with the whole checkpoint they are known; they are not missed, and not sent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tpcolocate.errors import WeightsMismatchError, some
from tpcolocate.weights.sources.lazy_tensor import Item, have_same_memory, have_same_values
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
        if not state.loader_map.is_complete and state.dry_run_problem is None:
            # What was seen at launch; without that everything, until the loader has been traced.
            at_launch = state.loader_map.ignored_at_launch
            ignored = frozenset(spec.shapes) if at_launch is None else at_launch
        spec.check_complete(names, ignored=ignored)
    _check_ties(weights, state.loader_map.ignored)


def check_again(session: SyncSession, weights: NamedWeights, ties: Collection[str]) -> None:
    """Check in a repeated sync what may have changed since the last one.

    Args:
        ties: From `ties_to_check`.

    Raises:
        WeightsMismatchError: A weight that the engine ties differs.
    """
    if ties:
        _check_ties(weights, session.state.loader_map.ignored)


def ties_to_check(session: SyncSession, weights: NamedWeights) -> tuple[str, ...]:
    """Return what the trainer holds apart from a tensor that may stand for it in the engine: their values may part."""
    ignored = session.state.loader_map.ignored
    if not ignored:
        return ()
    of_name = dict(weights.items or ())
    return tuple(
        name
        for name, candidates in _ties(weights, ignored).items()
        if not any(have_same_memory(of_name[name], other) for other in candidates.values())
    )


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
    if _ties(weights, ignored):
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
    if not session.options.partial:
        return []  # that has been checked
    return spec.missing(stats.names, ignored=session.state.loader_map.ignored | stats.ignored)


def _names(weights: NamedWeights) -> list[str]:
    return [*(name for name, _ in weights.items or ()), *weights.aliases]


def _ties(weights: NamedWeights, ignored: Collection[str]) -> dict[str, Mapping[str, Item]]:
    """Return what the trainer holds and the engine ignores, and the weights that may stand for it."""
    unread = [(name, item) for name, item in weights.items or () if name in ignored]
    if not unread:
        return {}
    sent = dict((name, item) for name, item in weights.items or () if name not in ignored)
    found = {name: may_equal(name, item, sent.items(), sent) for name, item in unread}
    return {name: candidates for name, candidates in found.items() if candidates}


def _check_ties(weights: NamedWeights, ignored: Collection[str]) -> None:
    """Check that the engine's tied weights are equal in the trainer; waits for the device."""
    if not ignored:
        return
    of_name = dict(weights.items or ())
    for name, candidates in _ties(weights, ignored).items():
        if not any(have_same_values(of_name[name], other) for other in candidates.values()):
            raise WeightsMismatchError(
                f"the engine does not read {name}, and the trainer's differs from {some(sorted(candidates))}",
                hint=f"the engine may tie them: {tie_hint(name)}",
            )


__all__ = [
    "check_again",
    "ties_to_check",
    "check_after_trace",
    "check_at_end",
    "check_before_trace",
    "ignored_names",
    "missing_names",
]
