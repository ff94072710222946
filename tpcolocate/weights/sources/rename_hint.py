"""The `rename` that mends names which the served model lacks, in a form to be pasted.  Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from tpcolocate.weights.sources.wrapper_names import WRAPPER_SEGMENTS

_DDP = "module."
# Names that are looked at for a prefix; a model's layers are all alike.
_LOOKED_AT = 400
# Segments of a name that a prefix may have.
_MOST_SEGMENTS = 4
# Weights that may be left out, such as a value head's.
_MOST_DROPPED = 8
# The part of the served names that must be found before the rest of a source is taken for no weights of that model.
_MOST_OF_THEM = 0.8

_NUMBER = re.compile(r"\d+")
Shape = tuple[int, ...]


def rename_hint(given: Sequence[tuple[str, Shape]], served: Mapping[str, Shape]) -> str | None:
    """Return the argument that gives the served names, such as ``rename=lambda name: name.removeprefix('policy.')``.

    None if it cannot be seen which one does.

    Args:
        given: Names and shapes of the source.
        served: Names and shapes of the served model.
    """
    text, names = "name", {name: name for name, _ in given}
    for segment in WRAPPER_SEGMENTS:
        if any(segment in name for name in names.values()):
            text += f".replace({segment!r}, '')"
            names = {name: new.replace(segment, "") for name, new in names.items()}
    if any(name.startswith(_DDP) for name in names.values()):
        text += f".removeprefix({_DDP!r})"
        names = {name: new.removeprefix(_DDP) for name, new in names.items()}
    shapes = dict(given)
    unknown = [name for name, new in names.items() if new not in served]
    if unknown and (found := _prefixes([(names[name], shapes[name]) for name in unknown], served)) is not None:
        text, names = _with_prefix(text, names, served, *found)
        unknown = [name for name, new in names.items() if new not in served]
    fitting = {new for name, new in names.items() if served.get(new) == shapes[name]}
    num_fitting = sum(new in fitting for new in names.values())
    if unknown and len(unknown) <= _MOST_DROPPED and len(fitting) >= _MOST_OF_THEM * len(served):
        missing = [name for name in served if name not in fitting]
        if is_of_larger_model([names[name] for name in unknown], served) or any(
            _may_be(names[name], other) for name in unknown for other in missing
        ):
            return None
        dropped = dict.fromkeys(unknown)
        unknown = []
        if text == "name":
            return f"rename={dropped!r}"
        text = f"{dropped!r}.get(name, {text})"
    if text == "name" or unknown or not fitting or num_fitting > len(fitting):
        return None
    return f"rename=lambda name: {text}"


def is_of_larger_model(unknown: Iterable[str], served: Iterable[str]) -> bool:
    """Return whether a name that the served model lacks is of a further layer or expert, or a bias of a layer that it has.

    Without that weight the engine would compute something else than the trainer.
    """
    kinds, modules = set(), set()
    for name in served:
        kinds.add(_NUMBER.sub("0", name))
        modules.add(name.rpartition(".")[0])
    return any(
        _NUMBER.sub("0", name) in kinds or (name.endswith(".bias") and name.rpartition(".")[0] in modules)
        for name in unknown
    )


def _may_be(unknown: str, missing: str) -> bool:
    """Return whether what the served model lacks is more likely a weight that it misses, under another name or in parts.

    Parts are beside it or below: ``weight_g`` and ``parametrizations.weight.original0`` of the module whose ``weight`` is missing.
    """
    module = missing.rpartition(".")[0]
    is_part = bool(module) and unknown.startswith(f"{module}.")
    return is_part or unknown.endswith(missing) or missing.endswith(_tail(unknown))


def _tail(name: str) -> str:
    """Return the last two segments of a name."""
    return ".".join(name.split(".")[-2:])


def _prefixes(unknown: Sequence[tuple[str, Shape]], served: Mapping[str, Shape]) -> tuple[str, str] | None:
    """Return the prefix of most unknown names, and what the served model has in its place; either may be empty."""
    theirs = sorted({prefix for name in served for prefix in _starts(name)})
    votes: Counter[tuple[str, str]] = Counter()
    step = max(1, len(unknown) // _LOOKED_AT)
    for name, shape in unknown[::step]:
        for ours in _starts(name):
            rest = name[len(ours) :]
            votes.update((ours, other) for other in theirs if served.get(other + rest) == shape)
    votes.pop(("", ""), None)
    if not votes:
        return None
    # Of those that do the same for all names, the one that changes least.
    return max(votes, key=lambda pair: (votes[pair], -len(pair[0]) - len(pair[1]), pair))


def _starts(name: str) -> Iterator[str]:
    """Yield the prefixes of a name up to its first number, the empty one first."""
    end = 0
    yield ""
    for _ in range(_MOST_SEGMENTS):
        dot = name.find(".", end)
        if dot < 0 or name[end:dot].isdecimal():
            return
        end = dot + 1
        yield name[:end]


def _with_prefix(
    text: str, names: Mapping[str, str], served: Collection[str], ours: str, theirs: str
) -> tuple[str, dict[str, str]]:
    """Return the expression and its results with one prefix in place of the other, where a name has the first."""

    def apply(name: str) -> str:
        return theirs + name.removeprefix(ours)

    kept = {new for new in names.values() if not new.startswith(ours) or (new in served and apply(new) not in served)}
    renamed = {name: new if new in kept else apply(new) for name, new in names.items()}
    if not theirs and all(new.removeprefix(ours) == new for new in kept):
        return f"{text}.removeprefix({ours!r})", renamed
    changed = f"{theirs!r} + {text}" if not ours else f"{theirs!r} + {text}.removeprefix({ours!r})"
    if not kept:
        return changed, renamed
    if all(not new.startswith(ours) for new in kept):
        return f"{changed} if {text}.startswith({ours!r}) else {text}", renamed
    starts = tuple(sorted({new.partition(".")[0] for new in kept}))
    others = [new for new in names.values() if new not in kept]
    if any(other.startswith(starts) for other in others):
        starts = tuple(sorted(kept))
    if len(starts) > _MOST_DROPPED:
        return text, dict(names)
    return f"{text} if {text}.startswith({starts!r}) else {changed}", renamed


__all__ = ["is_of_larger_model", "rename_hint"]
