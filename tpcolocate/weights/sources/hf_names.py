"""From the names of a transformers model in memory to those of its checkpoints.

Since transformers 5 a model may have its weights in another form than the checkpoint: Qwen3-MoE and Mixtral keep all
experts of a layer in one tensor, ``mlp.experts.gate_up_proj``, where checkpoints and SGLang have three tensors for each
expert.  `save_pretrained` undoes that with transformers.core_model_loading.revert_weight_conversion.  We pass it tensors
without data; the views that it returns show which part of which tensor has which name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tpcolocate.errors import ConfigError
from tpcolocate.weights.sources.lazy_tensor import Item, Items, SharedGather, is_plain_tensor, storage_id
from tpcolocate.weights.sources.wrapper_names import without_wrappers

_PAIRS = "pass (name, tensor) pairs with the names and tensors of the served checkpoint"


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
    parts: dict[str, Items] = {}
    for prefix, model in _models(module) if unserved else ():
        inside = {name.removeprefix(prefix): item for name, item in unserved.items() if name.startswith(prefix)}
        for target, name, item in _parts(model, inside):
            parts.setdefault(prefix + name, []).append((prefix + target, item))
    converted: Items = []
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
    name_of = {storage_id(blank): name for name, blank in blanks.items()}
    gathers = {name: SharedGather(item) for name, item in weights.items()}
    try:
        reverted = revert_weight_conversion(model, blanks)
    except Exception as error:  # whatever the model's own conversion raises
        raise ConfigError(
            f"transformers cannot name the weights of a {type(model).__name__} as in its checkpoint: {error}",
            hint=_PAIRS,
        ) from error
    for target, part in reverted.items():
        origin = name_of.get(storage_id(part))
        if origin is None:
            raise ConfigError(
                f"{target} of a {type(model).__name__} is not part of a trainer's tensor; transformers computes it when it "
                "saves the model",
                hint=_PAIRS,
            )
        if (part.shape, part.stride()) == (blanks[origin].shape, blanks[origin].stride()):
            yield target, origin, weights[origin]
        else:
            yield target, origin, gathers[origin].part(part.shape, part.stride(), int(part.storage_offset()))


__all__ = ["to_checkpoint"]
