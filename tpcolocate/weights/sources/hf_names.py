"""From the names that a transformers model has in memory to those of its checkpoints.

Since transformers 5 a model may hold its weights otherwise than the checkpoint does: Qwen3-MoE and Mixtral keep all
experts of a layer in one tensor, ``mlp.experts.gate_up_proj``, where checkpoints, and SGLang, have three for each expert.
`save_pretrained` undoes that with transformers.core_model_loading.revert_weight_conversion, which is what tells us how,
too: it is shown stand-ins without data, and from the views that it makes of them we know which part of which tensor
goes under which name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tpcolocate.errors import ConfigError
from tpcolocate.weights.sources.lazy_tensor import Item, Items, SharedGather
from tpcolocate.weights.sources.wrapper_names import without_wrappers

_PAIRS = "pass (name, tensor) pairs with the names and tensors of the served checkpoint"


def to_checkpoint(module: nn.Module, weights: Items, *, is_served: Callable[[str], bool]) -> Items:
    """Weights of a module under the names that `save_pretrained` writes, as views wherever the tensors are full.

    Args:
        module: What the weights were taken from.  What belongs to no transformers model in it is left as it is.
        weights: With the names of the module's state dict, `without_wrappers`.
        is_served: Whether the served checkpoint has a name; those need no conversion, whatever `save_pretrained` does.

    Raises:
        ConfigError: A model converts its weights in a way that is not a mere cutting into parts, or cannot be undone.
    """
    odd = {name: item for name, item in weights if not is_served(name)}
    parts: dict[str, Items] = {}
    for prefix, model in _models(module) if odd else ():
        inside = {name.removeprefix(prefix): item for name, item in odd.items() if name.startswith(prefix)}
        for target, name, item in _parts(model, inside):
            parts.setdefault(prefix + name, []).append((prefix + target, item))
    converted: Items = []
    for name, item in weights:
        converted += parts.get(name, [(name, item)])
    return converted


def _models(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost transformers models in a module, each with the prefix of its names; imports nothing for it."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return
    prefixes: list[str] = []
    for path, candidate in module.named_modules():
        if isinstance(candidate, modeling.PreTrainedModel) and not f"{path}.".startswith(tuple(prefixes)):
            prefixes.append(f"{path}." if path else "")
            yield f"{without_wrappers(path)}." if path else "", candidate


def _parts(model: Any, weights: dict[str, Item]) -> Iterator[tuple[str, str, Item]]:
    """(name in the checkpoint, name in the model, weight) of all that is in the checkpoint."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 the names were the checkpoint's
        return
    blanks = {}
    for name, item in weights.items():
        if isinstance(item, torch.Tensor) and not isinstance(item, DTensor):
            blanks[name] = torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="meta")
        else:  # what is gathered or computed comes contiguous
            blanks[name] = torch.empty(item.shape, dtype=item.dtype, device="meta")
    name_of = {_storage_id(blank): name for name, blank in blanks.items()}
    wholes = {name: SharedGather(item) for name, item in weights.items()}
    try:
        reverted = revert_weight_conversion(model, blanks)
    except Exception as error:  # of whatever kind the model's own conversion raises
        raise ConfigError(
            f"transformers cannot say how a {type(model).__name__} is named in its checkpoint: {error}", hint=_PAIRS
        ) from error
    for target, part in reverted.items():
        origin = name_of.get(_storage_id(part))
        if origin is None:
            raise ConfigError(
                f"{target} of a {type(model).__name__} is not a part of one of the trainer's tensors but computed from them "
                "when transformers saves the model",
                hint=_PAIRS,
            )
        whole = weights[origin]
        if part.shape == whole.shape:
            yield target, origin, whole
        else:
            yield target, origin, wholes[origin].part(part.shape, part.stride(), int(part.storage_offset()))


def _storage_id(tensor: torch.Tensor) -> int:
    # Tensors without data have no address to tell them apart by.
    return tensor.untyped_storage()._cdata


__all__ = ["to_checkpoint"]
