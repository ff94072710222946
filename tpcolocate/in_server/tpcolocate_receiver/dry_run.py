"""A dry run of an engine's loader: traced with tensors that have no memory, while the model stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .copy_plan import CopyPlan, locations_of
from .loader_trace import DryRunError, LoaderTrace, MetaTensors, quantization_problem
from .module_walk import modules_of

_MOST_HELD_BACK = 8
"""Tensors that a loader holds back for one another.  One that always draws a tensor ahead would seem to join all."""


@dataclass(frozen=True, slots=True)
class Handling:
    """How a loader handled the tensors of a dry run, beside the copies.

    Attributes:
        names: All of them.
        ignored: Those of which it reads nothing.
        joined: Lists of those that it loads only together.
    """

    names: frozenset[str]
    ignored: list[str]
    joined: list[list[str]]


def dry_run(
    model: torch.nn.Module, plan: CopyPlan, entries: Sequence[Sequence[Any]], *, others: Sequence[Sequence[Any]] = ()
) -> Handling:
    """Trace the loader with tensors that have no memory.

    The model is unchanged afterwards, whatever happens: copies and constants are only recorded, and parameters that the
    loader replaces are restored.

    Args:
        model: The worker's.
        plan: The traced copies are added to it, but for tensors that the loader does not only copy.
        entries: Each tensor's [name, dtype, shape].
        others: More tensors, likewise, that are not planned: the loader is to see its whole checkpoint, since it may join
            tensors.

    Returns:
        How the loader handled all of them.

    Raises:
        DryRunError: The loader needs values, or changes the model in another way.
        Exception: Whatever the loader raises for tensors without memory.
    """
    locations = locations_of(model)
    everything = [*entries, *others]
    inputs = MetaTensors(everything)
    trace = LoaderTrace(inputs, {location.storage for location in locations}, is_dry_run=True)
    saved = _tensors_of(model)
    loader: Any = model  # every SGLang model has load_weights
    try:
        with torch.no_grad(), trace:
            loader.load_weights(trace.draw(inputs.tensors))
    finally:
        replaced = _restore(model, saved)
    if replaced:
        raise DryRunError(f"the loader replaces {replaced[0]} instead of filling it")
    if (problem := quantization_problem(trace.copies, everything)) is not None:
        raise DryRunError(problem)
    plan.add(trace, entries, locations)
    names = [name for name, *_ in everything]
    return Handling(
        frozenset(names),
        [names[i] for i in trace.unused(len(names)) if 0 not in everything[i][2]],
        [[names[i] for i in sorted(group)] for group in _joined(trace)],
    )


def _joined(trace: LoaderTrace) -> list[set[int]]:
    held_back = [group for group in _merged(trace.joins.held_back) if len(group) <= _MOST_HELD_BACK]
    return _merged([*held_back, *trace.joins.computed])


def _merged(sets: Iterable[set[int]]) -> list[set[int]]:
    """Merge sets that have something in common."""
    found: list[set[int]] = []
    for one in sets:
        apart = [other for other in found if not other & one]
        found = [*apart, one.union(*(other for other in found if other & one))]
    return found


Saved = dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
"""(id of a module's table, name in it) -> the tensor, and another one of its memory."""


def _tables(model: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Yield the tables that hold a model's tensors: parameters, buffers, and plain attributes."""
    for module in modules_of(model):
        yield from (module._parameters, module._buffers, vars(module))


def _tensors_of(model: torch.nn.Module) -> Saved:
    return {
        (id(table), name): (tensor, tensor.detach())
        for table in _tables(model)
        for name, tensor in table.items()
        if isinstance(tensor, torch.Tensor)
    }


def _restore(model: torch.nn.Module, saved: Saved) -> list[str]:
    """Restore the tensors that were replaced, and return their names."""
    replaced = []
    for table in _tables(model):
        for name in [name for name, value in table.items() if isinstance(value, torch.Tensor)]:
            if (id(table), name) not in saved:
                replaced.append(name)
                del table[name]
                continue
            tensor, before = saved[id(table), name]
            if table[name] is not tensor or tensor.data_ptr() != before.data_ptr():
                replaced.append(name)
                tensor.data = before
                table[name] = tensor
    return replaced


__all__ = ["dry_run"]
