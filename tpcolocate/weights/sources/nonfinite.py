"""Weights that are not finite, found before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tpcolocate.errors import WeightsMismatchError, some
from tpcolocate.in_server.tpcolocate_receiver.checksums import are_finite
from tpcolocate.weights.sources.lazy_tensor import Item, Items, LazyTensor, local_of


def refuse_nonfinite(items: Items) -> None:
    """Look at what this rank holds of the weights, and of what they are computed from: one pass over that memory.

    What is computed from finite tensors may overflow all the same.  Local; waits for the device.

    Raises:
        WeightsMismatchError: A number is NaN or infinite; with the names of the weights.
    """
    names: list[str] = []
    tensors: list[torch.Tensor] = []
    numbers: dict[object, int] = {}
    of_name: list[int] = []
    for name, item in items:
        for one in _sources(item):
            local = local_of(one).detach()
            key = local.data_ptr(), local.shape, local.stride(), local.dtype, local.device
            if key not in numbers:
                numbers[key] = len(tensors)
                tensors.append(local)
            names.append(name)
            of_name.append(numbers[key])
    finite = are_finite(tensors)
    found = list(dict.fromkeys(name for name, number in zip(names, of_name) if not finite[number]))
    if found:
        raise nonfinite_error(found)


def find_nonfinite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of full tensors that hold a NaN or an infinite number.  Waits for their device."""
    return [name for name, is_good in zip(tensors, are_finite(list(tensors.values()))) if not is_good]


def nonfinite_text(names: list[str]) -> str:
    """Describe weights that are not finite."""
    weights = "1 weight is" if len(names) == 1 else f"{len(names)} weights are"
    return f"{weights} NaN or infinite in part: {some(names, between=', ')}"


def nonfinite_error(names: list[str]) -> WeightsMismatchError:
    """Return the error of a sync that is to refuse such weights."""
    return WeightsMismatchError(
        nonfinite_text(names),
        hint='look at the loss and the gradients of the last step, or sync them all the same with nonfinite="warn"',
    )


def _sources(item: Item) -> list[torch.Tensor]:
    """Return the tensors in memory that a weight is, or is computed from as far as that is known."""
    if not isinstance(item, LazyTensor):
        return [item]
    if item.part is not None:
        return _sources(item.part.base)
    if item.recipe is not None:
        return list(item.recipe.inputs or (item.recipe.base,))
    return []


__all__ = ["find_nonfinite", "nonfinite_error", "nonfinite_text", "refuse_nonfinite"]
