"""From the names of a transformers model in memory to those of its checkpoints.

Since transformers 5 a model may have its weights in another form than the checkpoint: Qwen3-MoE and Mixtral keep all
experts of a layer in one tensor, ``mlp.experts.gate_up_proj``, where checkpoints and SGLang have three tensors for each
expert.  `save_pretrained` undoes that with transformers.core_model_loading.revert_weight_conversion.  We pass it tensors
without data; the views that it returns show which part of which tensor has which name.

A mixture of experts has ten thousands of names.  Layers that are alike are named alike: the first and the last are
converted, and the names of those between follow.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tpcolocate.errors import ConfigError
from tpcolocate.weights.sources.lazy_tensor import (
    Item,
    Items,
    SharedGather,
    View,
    is_plain_tensor,
    storage_id,
)
from tpcolocate.weights.sources.wrapper_names import without_wrappers

_PAIRS = "pass (name, tensor) pairs with the names and tensors of the served checkpoint"
_LAYER = re.compile(r"(?P<path>(?:[^.]*[^.\d][^.]*\.)*)(?P<number>\d+)\.(?P<rest>.+)")
"""The name of a weight in a layer: the first of its segments that is a number is the layer's."""
_LITERAL_NUMBER = re.compile(r"(?<![\w\\])\d")
"""In a pattern of transformers' a number that stands for itself, not ``w1``, ``\\1`` or ``\\d``."""


_Named = tuple[str, str, View | None]
"""Name in the checkpoint, name in the model of the tensor that has it, and which view of that (None: the tensor itself)."""
_Template = tuple[list[str], str, View | None]
"""The same in a layer: what is around the layer's number in the checkpoint's name, name of the tensor in the layer, view."""


def to_checkpoint(module: nn.Module, weights: Items, *, is_served: Callable[[str], bool]) -> Items:
    """Return a module's weights under the names that `save_pretrained` writes, as views of all plain tensors.

    Args:
        module: What the weights were taken from.  Weights outside of transformers models are returned unchanged.
        weights: With the names of the module's state dict, `without_wrappers`.
        is_served: Whether the served checkpoint has a name; such weights are never converted.

    Raises:
        ConfigError: A conversion does more than split and rename tensors, or cannot be undone.
    """
    unserved = {name: item for name, item in weights if not is_served(name)}
    parts: dict[str, list[tuple[str, Item]]] = {}
    for prefix, model in _models(module) if unserved else ():
        inside = {name.removeprefix(prefix): item for name, item in unserved.items() if name.startswith(prefix)}
        for target, name, item in _parts(model, inside):
            parts.setdefault(prefix + name, []).append((prefix + target, item))
    converted: list[tuple[str, Item]] = []
    for name, item in weights:
        converted += parts.get(name, [(name, item)])
    return converted


def _models(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost transformers models in a module, each with the prefix of its names; imports nothing."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return
    prefixes: list[str] = []
    for path, candidate in module.named_modules():
        if isinstance(candidate, modeling.PreTrainedModel) and not f"{path}.".startswith(tuple(prefixes)):
            prefixes.append(f"{path}." if path else "")
            yield f"{without_wrappers(path)}." if path else "", candidate


def _parts(model: Any, weights: dict[str, Item]) -> Iterator[tuple[str, str, Item]]:
    """Yield (name in the checkpoint, name in the model, weight) for everything in the checkpoint."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 both have the same names
        return
    blanks = {}
    for name, item in weights.items():
        if is_plain_tensor(item):
            blanks[name] = torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="meta")
        else:  # what is gathered or computed is contiguous
            blanks[name] = torch.empty(item.shape, dtype=item.dtype, device="meta")
    gathers = {name: SharedGather(item) for name, item in weights.items()}
    for target, origin, view in _by_layers(model, revert_weight_conversion, blanks):
        yield target, origin, weights[origin] if view is None else gathers[origin].part(*view)


def _by_layers(model: Any, revert: Callable[..., Any], blanks: Mapping[str, torch.Tensor]) -> Iterator[_Named]:
    """Name everything, converting two layers of each kind if the layers between are named as they are."""
    kinds = [] if _mentions_numbers(model) else _layers_alike(blanks)
    between = {f"{path}{number}." for path, numbers in kinds for number in numbers[1:-1]}
    found = _reverted(model, revert, {name: blank for name, blank in blanks.items() if _layer_of(name) not in between})
    of_layer: dict[str, list[_Named]] = defaultdict(list)
    for one in found:
        of_layer[_layer_of(one[1])].append(one)
    templates = []
    for path, numbers in kinds:
        ends = [(f"{path}{number}.", number) for number in (numbers[0], numbers[-1])]
        template = _template(*((of_layer[layer], layer, number) for layer, number in ends))
        if template is None:
            yield from _reverted(model, revert, blanks)
            return
        templates.append(template)
    yield from found
    for (path, numbers), template in zip(kinds, templates):
        for number in numbers[1:-1]:
            layer = f"{path}{number}."
            for around, rest, view in template:
                yield number.join(around), layer + rest, view


def _reverted(model: Any, revert: Callable[..., Any], blanks: Mapping[str, torch.Tensor]) -> list[_Named]:
    """Name tensors by transformers' own conversion."""
    name_of = {storage_id(blank): name for name, blank in blanks.items()}
    try:
        reverted = revert(model, dict(blanks))
    except Exception as error:  # whatever the model's own conversion raises
        raise ConfigError(
            f"transformers cannot name the weights of a {type(model).__name__} as in its checkpoint: {error}",
            hint=_PAIRS,
        ) from error
    found: list[_Named] = []
    for target, part in reverted.items():
        origin = name_of.get(storage_id(part))
        if origin is None:
            raise ConfigError(
                f"{target} of a {type(model).__name__} is not part of a trainer's tensor; transformers computes it when it "
                "saves the model",
                hint=_PAIRS,
            )
        blank = blanks[origin]
        is_itself = (part.shape, part.stride()) == (blank.shape, blank.stride())
        found.append((target, origin, None if is_itself else (part.shape, part.stride(), int(part.storage_offset()))))
    return found


def _layer_of(name: str) -> str:
    """Return the path of the layer that a weight is in, with a dot; empty if it is in none."""
    found = _LAYER.match(name)
    return "" if found is None else f"{found['path']}{found['number']}."


def _layers_alike(blanks: Mapping[str, torch.Tensor]) -> list[tuple[str, list[str]]]:
    """Return (path, numbers) of three layers or more that have the same tensors under the same names."""
    layers: dict[tuple[str, str], list[object]] = defaultdict(list)
    for name, blank in blanks.items():
        found = _LAYER.match(name)
        if found is not None:
            layers[found["path"], found["number"]].append((found["rest"], blank.shape, blank.stride(), blank.dtype))
    kinds: dict[tuple[str, tuple[object, ...]], list[str]] = defaultdict(list)
    for (path, number), contents in layers.items():
        kinds[path, tuple(contents)].append(number)
    return [(path, numbers) for (path, _), numbers in kinds.items() if len(numbers) > 2]


def _mentions_numbers(model: Any) -> bool:
    """Return whether a conversion of the model may be for some of its layers alone."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        conversions = get_model_conversion_mapping(model, add_legacy=False)
    patterns = [pattern for one in conversions for pattern in (*one.source_patterns, *one.target_patterns)]
    return any(_LITERAL_NUMBER.search(pattern) for pattern in patterns)


def _template(a: tuple[list[_Named], str, str], z: tuple[list[_Named], str, str]) -> list[_Template] | None:
    """Return how two layers are named; None if they differ in more than their numbers.

    Args:
        a: The names in one layer, its path with a dot, and its number.
        z: And of the other.
    """
    (of_a, layer_a, number_a), (of_z, layer_z, number_z) = a, z
    if len(of_a) != len(of_z):
        return None
    found = []
    for (target_a, origin_a, view_a), (target_z, origin_z, view_z) in zip(of_a, of_z):
        around, rest = _around(target_a, target_z, number_a, number_z), origin_a.removeprefix(layer_a)
        if around is None or (rest, view_a) != (origin_z.removeprefix(layer_z), view_z):
            return None
        found.append((around, rest, view_a))
    return found


def _around(a: str, z: str, number_a: str, number_z: str) -> list[str] | None:
    """Return what is around the layer's number in two names; None if they differ in anything else."""
    segments = []
    segments_a, segments_z = a.split("."), z.split(".")
    if len(segments_a) != len(segments_z):
        return None
    for of_a, of_z in zip(segments_a, segments_z):
        if of_a != of_z and (of_a, of_z) != (number_a, number_z):
            return None
        segments.append(of_a if of_a == of_z else "\0")
    return ".".join(segments).split("\0")


__all__ = ["to_checkpoint"]
