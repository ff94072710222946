"""The weights that a peft model computes with, under the names of the model inside it.

A LoRA layer's merged weight is computed tensor by tensor when it is read; neither model nor adapters are changed.  Relied
on: peft.tuners.lora.layer (`get_delta_weight`, `merge` and the order of the cases in `forward`) and
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
    """The model inside a `peft.PeftModel`; None for any other module.

    Raises:
        ConfigError: The adapter lies in the prompt, where no weight could carry it.
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
    """Weights of a module with peft layers, as the module computes with them; those of any other unchanged.

    Args:
        module: What the weights were taken from.
        weights: With the names of the module's state dict, `without_wrappers`.

    Raises:
        ConfigError: An active adapter that is not a plain LoRA.
    """
    if "peft" not in sys.modules:
        return weights
    places = _Places(module)
    return [entry for name, item in weights if (entry := places.resolve(name, item)) is not None]


class _Places:
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
        """The name without peft and what it stands for; None if the model does not compute with that tensor."""
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
                        return None  # the copy takes its place
                else:
                    path.append(next(segments))
                    if path[-1] != copy:
                        return None
            else:
                raise ConfigError(
                    f"{'.'.join(path[:-1])} is a peft {type(layer).__name__}, whose merged weight is not computed on the fly",
                    hint=_MERGE_FIRST,
                )
        steps = [step for layer in reversed(around) for step in _steps(layer, kept)]
        return ".".join(kept), _sum(tensor, steps) if steps else tensor


def _steps(layer: Any, name: list[str]) -> list[tuple[nn.Module, str]]:
    """(layer, adapter) for every adapter that changes the parameter `name` of the layer's base layer."""
    from peft.tuners import lora

    if layer.merged:
        if layer.disable_adapters:
            raise ConfigError(
                f"the adapters of {'.'.join(name)} are merged and disabled, of which peft makes up its mind in the next forward",
                hint="call unmerge_adapter() on the model first",
            )
        return []  # the base layer's weight is the merged one
    if layer.disable_adapters:
        return []
    if not isinstance(layer, lora.LoraLayer):
        kind = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
        raise ConfigError(
            f"{'.'.join(name)} has an adapter of kind {kind}; only those of LoRA are merged on the fly",
            hint=_MERGE_FIRST,
        )
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.r]
    plain = isinstance(layer, (lora.Linear, lora.Embedding, lora.ParamWrapper))
    for adapter in adapters:
        # Variants (DoRA and others) are merged by code of their own, quantised bases by their own layers.
        if not plain or adapter in layer.lora_variant or layer.lora_bias[adapter] or not _is_floating(layer):
            raise ConfigError(
                f"{'.'.join(name)} has a LoRA adapter {adapter!r} that is more than a product of two matrices added to a weight "
                f"({type(layer).__name__}; DoRA, a bias and quantised base weights are such cases)",
                hint=_MERGE_FIRST,
            )
    target = layer.parameter_name if isinstance(layer, lora.ParamWrapper) else "weight"
    # peft's layers are modules, which its own annotations do not say.
    return [(cast(nn.Module, layer), adapter) for adapter in adapters] if name[-1] == target else []


def _is_floating(layer: Any) -> bool:
    return all(parameter.is_floating_point() for parameter in layer.get_base_layer().parameters(recurse=False))


def _sum(base: torch.Tensor, steps: list[tuple[nn.Module, str]]) -> LazyTensor:
    """The base weight and what the adapters add to it."""
    factors = [_factors(layer, adapter) for layer, adapter in steps]
    given = [base, *(factor for of_step in factors for factor in of_step.values())]
    widest = max(tensor.dtype.itemsize for tensor in given)

    def make() -> torch.Tensor:
        whole = full_tensor(base)
        for (layer, adapter), of_step in zip(steps, factors):
            full = {name: full_tensor(factor) for name, factor in of_step.items()}
            delta = torch.func.functional_call(_Delta(layer), full, (adapter,))
            # In the wider of the two dtypes, rounded once.  peft puts some deltas where an offloaded base weight lies.
            whole = (whole + delta.to(whole.device)).to(base.dtype)
        return whole

    return LazyTensor(
        shape=base.shape,
        dtype=base.dtype,
        device=base.device,
        make=make,
        is_collective=any(is_collective(tensor) for tensor in given),
        extra_bytes=sum(reading_bytes(tensor) for tensor in given) + 2 * base.shape.numel() * widest - full_bytes(base),
    )


def _factors(layer: Any, adapter: str) -> dict[str, torch.Tensor]:
    """The adapter's own parameters, under the names that they have in a `_Delta`."""
    return {
        f"layer.{name}": parameter
        for name, parameter in layer.named_parameters()
        if name.split(".")[0] in layer.adapter_layer_names and name.split(".")[1] == adapter
    }


class _Delta(nn.Module):
    """What an adapter adds to a weight, as a module: so that it can be computed by peft itself from full tensors."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, adapter: str) -> torch.Tensor:
        return self.layer.get_delta_weight(adapter)  # type: ignore[operator]


__all__ = ["inner_model", "merged"]
