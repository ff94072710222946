"""Learning an engine's loader before there is anything to load: it is given descriptions, and kept from the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .copy_plan import CopyPlan, places_of
from .loader_trace import DryRunError, LoaderTrace, MetaTensors, quantised
from .module_walk import modules_of


def rehearse(model: torch.nn.Module, plans: CopyPlan, entries: Sequence[Sequence[Any]]) -> None:
    """Watch the loader with tensors that have no memory.

    The model is what it was afterwards, whatever happens: copies and constants are only noted, and a parameter that
    the loader puts something else in place of is put back.

    Args:
        model: The worker's.
        plans: Takes in what was learned; tensors with which the loader does more than to copy parts of them stay unknown.
        entries: Each tensor's [name, dtype, shape].

    Raises:
        DryRunError: The loader needs values, or changes the model in another way.
        Exception: Whatever the loader raises when it meets tensors without memory.
    """
    places = places_of(model)
    given = MetaTensors(entries)
    recorder = LoaderTrace(given, {storage for *_, storage in places}, carries_out=False)
    kept = _tensors_of(model)
    loader: Any = model  # every SGLang model has load_weights
    try:
        with torch.no_grad(), recorder:
            loader.load_weights(list(given.tensors))
    finally:
        replaced = _put_back(model, kept)
    if replaced:
        raise DryRunError(f"the loader replaces {replaced[0]} instead of filling it")
    if (words := quantised(recorder.copies, entries)) is not None:
        raise DryRunError(words)
    plans.learn(recorder, entries, places)


Kept = dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
"""(id of a module's table, name in it) -> the tensor, and what it held."""


def _tables(model: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Where the tensors of a model stand: parameters, buffers, and plain attributes."""
    for module in modules_of(model):
        yield from (module._parameters, module._buffers, vars(module))


def _tensors_of(model: torch.nn.Module) -> Kept:
    return {
        (id(table), name): (tensor, tensor.detach())
        for table in _tables(model)
        for name, tensor in table.items()
        if isinstance(tensor, torch.Tensor)
    }


def _put_back(model: torch.nn.Module, kept: Kept) -> list[str]:
    """Undo what was put in place of tensors; their names."""
    replaced = []
    for table in _tables(model):
        for name in [name for name, value in table.items() if isinstance(value, torch.Tensor)]:
            if (id(table), name) not in kept:
                replaced.append(name)
                del table[name]
                continue
            tensor, held = kept[id(table), name]
            if table[name] is not tensor or tensor.data_ptr() != held.data_ptr():
                replaced.append(name)
                tensor.data = held
                table[name] = tensor
    return replaced


__all__ = ["rehearse"]
