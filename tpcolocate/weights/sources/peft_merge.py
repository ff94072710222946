"""The merged weights of a peft model, under the names of the model inside it.

The merged weight of a LoRA layer is computed when it is read; neither the model nor its adapters are changed.  Relies on
peft.tuners.lora.layer (`get_delta_weight`, `merge` and the order of the cases in `forward`) and
peft.utils.other.ModulesToSaveWrapper, in peft 0.21.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import nn

from tpcolocate.errors import ConfigError
from tpcolocate.weights.sources.lazy_tensor import (
    Items,
    LazyTensor,
    full_bytes,
    full_tensor,
    is_collective,
    reading_bytes,
)
from tpcolocate.weights.sources.wrapper_names import without_wrappers

_MERGE_FIRST = "send a copy that peft has merged: copy.deepcopy(model).merge_and_unload()"


def inner_model(module: nn.Module) -> nn.Module | None:
    """Return the model inside a `peft.PeftModel`; None for any other module.

    Raises:
        ConfigError: The adapter changes the prompt, which no weight can represent.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(module, peft.PeftModel):
        return None
    if module.active_peft_config.is_prompt_learning:
        raise ConfigError(
            f"a {module.active_peft_config.peft_type.value} adapter changes the prompt, not the weights",
            hint="train a LoRA adapter, or send the model inside: model.get_base_model()",
        )
    return module.get_base_model()


def merged(module: nn.Module, weights: Items) -> Items:
    """Return the weights of a module with its active adapters merged; those of a module without peft layers unchanged.

    Args:
        module: What the weights were taken from.
        weights: With the names of the module's state dict, `without_wrappers`.

    Raises:
        ConfigError: An active adapter that is not a plain LoRA.
    """
    if "peft" not in sys.modules:
        return weights
    layers = _PeftLayers(module)
    return [entry for name, item in weights if (entry := layers.resolve(name, item)) is not None]


class _PeftLayers:
    """The peft layers of a module, by path."""

    def __init__(self, module: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        self._tuner, self._copies = BaseTunerLayer, ModulesToSaveWrapper
        self._layers: dict[str, Any] = {}
        for path, layer in module.named_modules(remove_duplicate=False):
            if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                self._layers[without_wrappers(path)] = layer

    def resolve(self, name: str, tensor: Any) -> tuple[str, Any] | None:
        """Return a weight's name without peft, and its merged value; None if the model does not compute with it."""
        kept: list[str] = []
        around: list[Any] = []
        path: list[str] = []
        segments = iter(name.split("."))
        for segment in segments:
            layer = self._layers.get(".".join(path))
            path.append(segment)
            if layer is None:
                kept.append(segment)
            elif isinstance(layer, self._tuner):
                if segment != "base_layer":
                    return None  # the adapter itself
                around.append(layer)
            elif isinstance(layer, self._copies):
                copy = None if layer.disable_adapters else next(iter(layer.active_adapters), None)
                if segment == "original_module":
                    if copy in layer.modules_to_save:
                        return None  # replaced by the copy
                else:
                    path.append(next(segments))
                    if path[-1] != copy:
                        return None
            else:
                raise ConfigError(
                    f"{'.'.join(path[:-1])} is a peft {type(layer).__name__}, which cannot be merged during a sync",
                    hint=_MERGE_FIRST,
                )
        adapters = [adapter for layer in reversed(around) for adapter in _active_adapters(layer, kept)]
        return ".".join(kept), _sum(tensor, adapters) if adapters else tensor


def _active_adapters(layer: Any, name: list[str]) -> list[tuple[nn.Module, str]]:
    """Return (layer, adapter) for every adapter that changes the parameter `name` of the layer's base layer."""
    from peft.tuners import lora

    if layer.merged:
        if layer.disable_adapters:
            raise ConfigError(
                f"the adapters of {'.'.join(name)} are both merged and disabled; peft unmerges them in the next forward",
                hint="call unmerge_adapter() on the model first",
            )
        return []  # the base layer's weight is the merged one
    if layer.disable_adapters:
        return []
    if not isinstance(layer, lora.LoraLayer):
        kind = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
        raise ConfigError(
            f"{'.'.join(name)} has an adapter of kind {kind}; only LoRA can be merged during a sync",
            hint=_MERGE_FIRST,
        )
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.r]
    plain = isinstance(layer, (lora.Linear, lora.Embedding, lora.ParamWrapper))
    for adapter in adapters:
        # Variants such as DoRA have merge code of their own, and quantised bases their own layers.
        if not plain or adapter in layer.lora_variant or layer.lora_bias[adapter] or not _is_floating(layer):
            raise ConfigError(
                f"{'.'.join(name)} has a LoRA adapter {adapter!r} that cannot be merged during a sync "
                f"({type(layer).__name__}; DoRA, LoRA biases and quantised base weights are not supported)",
                hint=_MERGE_FIRST,
            )
    target = layer.parameter_name if isinstance(layer, lora.ParamWrapper) else "weight"
    # peft's layers are modules, which is not in its annotations.
    return [(cast(nn.Module, layer), adapter) for adapter in adapters] if name[-1] == target else []


def _is_floating(layer: Any) -> bool:
    return all(parameter.is_floating_point() for parameter in layer.get_base_layer().parameters(recurse=False))


def _sum(base: torch.Tensor, adapters: list[tuple[nn.Module, str]]) -> LazyTensor:
    """Return the base weight plus the deltas of the adapters."""
    factors = [_factors(layer, adapter) for layer, adapter in adapters]
    inputs = [base, *(factor for of_adapter in factors for factor in of_adapter.values())]
    widest = max(tensor.dtype.itemsize for tensor in inputs)

    def make() -> torch.Tensor:
        weight = full_tensor(base)
        for (layer, adapter), of_adapter in zip(adapters, factors):
            full = {name: full_tensor(factor) for name, factor in of_adapter.items()}
            delta = torch.func.functional_call(_Delta(layer), full, (adapter,))
            # In the wider of the two dtypes, rounded once.  peft computes some deltas on an offloaded base's device.
            weight = (weight + delta.to(weight.device)).to(base.dtype)
        return weight

    return LazyTensor(
        shape=base.shape,
        dtype=base.dtype,
        device=base.device,
        make=make,
        is_collective=any(is_collective(tensor) for tensor in inputs),
        extra_bytes=sum(map(reading_bytes, inputs)) + 2 * base.shape.numel() * widest - full_bytes(base),
    )


def _factors(layer: Any, adapter: str) -> dict[str, torch.Tensor]:
    """Return the adapter's own parameters, under the names that they have in a `_Delta`."""
    return {
        f"layer.{name}": parameter
        for name, parameter in layer.named_parameters()
        if name.split(".")[0] in layer.adapter_layer_names and name.split(".")[1] == adapter
    }


class _Delta(nn.Module):
    """The delta of an adapter as a module, so that peft's own code can compute it from gathered factors."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, adapter: str) -> torch.Tensor:
        return self.layer.get_delta_weight(adapter)  # type: ignore[operator]


def is_merging(module: nn.Module) -> bool:
    """Return whether `merged` would compute a weight of this module."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (layer for layer in module.modules() if isinstance(layer, BaseTunerLayer))
    return any(layer.active_adapters and not layer.merged and not layer.disable_adapters for layer in layers)


__all__ = ["inner_model", "is_merging", "merged"]
