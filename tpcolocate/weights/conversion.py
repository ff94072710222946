"""From the names that a transformers model has in memory to those of its checkpoints.

Since transformers 5 a model may hold its weights otherwise than the checkpoint does: Qwen3-MoE and Mixtral keep all
experts of a layer in one tensor, ``mlp.experts.gate_up_proj``, where checkpoints, and SGLang, have three for each expert.
`save_pretrained` undoes that with transformers.core_model_loading.revert_weight_conversion, which is what tells us how,
too: it is shown stand-ins without data, and from the views that it makes of them we know which part of which tensor
goes under which name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tpcolocate.errors import ConfigError
from tpcolocate.weights.items import Items, Whole

_PAIRS = "pass (name, tensor) pairs with the names and tensors of the served checkpoint"


def to_checkpoint(module: nn.Module, weights: Items, *, is_served: Callable[[str], bool]) -> Items:
    """Weights of a module under the names that its `save_pretrained` writes, as views wherever the tensors are full.

    Args:
        module: What the weights were taken from; any but a transformers model is left as it is.
        weights: With the names of the module's state dict.
        is_served: Whether the served checkpoint has a name; those need no conversion, whatever `save_pretrained` does.

    Raises:
        ConfigError: The model converts its weights in a way that is not a mere cutting into parts, or cannot be undone.
    """
    revert = _reverting(module)
    odd = {name: item for name, item in weights if not is_served(name)}
    if revert is None or not odd:
        return weights
    blanks = {}
    for name, item in odd.items():
        if isinstance(item, torch.Tensor) and not isinstance(item, DTensor):
            blanks[name] = torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="meta")
        else:  # what is gathered or computed comes contiguous
            blanks[name] = torch.empty(item.shape, dtype=item.dtype, device="meta")
    name_of = {_storage_id(blank): name for name, blank in blanks.items()}
    parts: dict[str, Items] = {}
    wholes = {name: Whole(item) for name, item in odd.items()}
    try:
        reverted = revert(blanks)
    except Exception as error:  # of whatever kind the model's own conversion raises
        raise ConfigError(
            f"transformers cannot say how a {type(module).__name__} is named in its checkpoint: {error}", hint=_PAIRS
        ) from error
    for target, part in reverted.items():
        origin = name_of.get(_storage_id(part))
        if origin is None:
            raise ConfigError(
                f"{target} of a {type(module).__name__} is not a part of one of the trainer's tensors but computed from them "
                "when transformers saves the model",
                hint=_PAIRS,
            )
        whole = odd[origin]
        item = (
            whole
            if part.shape == whole.shape
            else wholes[origin].part(part.shape, part.stride(), int(part.storage_offset()))
        )
        parts.setdefault(origin, []).append((target, item))
    converted: Items = []
    for name, item in weights:
        converted += parts[name] if name in odd else [(name, item)]
    return converted


def _reverting(module: nn.Module) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None:
    """transformers' reverse conversion for this model, if there is one; imports nothing that is not imported."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(module, modeling.PreTrainedModel):
        return None
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return None  # before transformers 5 the names were the checkpoint's
    return lambda tensors: revert_weight_conversion(module, tensors)


def _storage_id(tensor: torch.Tensor) -> int:
    # Tensors without data have no address to tell them apart by.
    return tensor.untyped_storage()._cdata


__all__ = ["to_checkpoint"]
