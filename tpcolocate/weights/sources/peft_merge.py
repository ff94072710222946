"""The merged weights of a peft model, under the names of the model inside it.

The merged weight of a LoRA layer is computed when it is read, whole or region by region; neither the model nor its
adapters are changed.  Relies on peft.tuners.lora.layer (`get_delta_weight`, `merge` and the order of the cases in
`forward`) and peft.utils.other.ModulesToSaveWrapper, in peft 0.21.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tpcolocate.errors import ConfigError
from tpcolocate.in_server.tpcolocate_receiver.module_walk import modules_of
from tpcolocate.in_server.tpcolocate_receiver.regions import Region, whole
from tpcolocate.weights.sources.coalesced_gather import CoalescedGather
from tpcolocate.weights.sources.lazy_tensor import (
    Items,
    LazyTensor,
    Recipe,
    full_bytes,
    full_tensor,
    is_collective,
    local_of,
    reading_bytes,
    storage_id,
)
from tpcolocate.weights.sources.low_rank import LowRankSums, Term
from tpcolocate.weights.sources.tensor_references import Reference, TensorReferences
from tpcolocate.weights.sources.wrapper_names import without_wrappers

_MERGE_FIRST = "send a copy that peft has merged: copy.deepcopy(model).merge_and_unload()"
_SERVE_APART = (
    "serve the adapter beside the base model: engine.set_lora(name, model), with an engine that was launched with "
    "enable_lora=True from the base model's checkpoint"
)
_QUANTISED = frozenset({"aqlm", "awq", "bnb", "eetq", "gptq", "hqq", "inc", "torchao"})
"""Modules of peft.tuners.lora whose layers have a quantised base."""


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


def check_adapters(module: nn.Module) -> None:
    """Check that a sync can merge the active adapters of a module; reads no weight.

    Raises:
        ConfigError: As `merged` and `inner_model`.
    """
    if "peft" in sys.modules:
        inner_model(module)
        _PeftLayers(module).check()


def merged(module: nn.Module, weights: Items) -> Items:
    """Return the weights of a module with its active adapters merged; those of a module without peft layers unchanged.

    Args:
        module: What the weights were taken from.
        weights: With the names of the module's state dict, `without_wrappers`.

    Raises:
        ConfigError: An active adapter that is not a plain LoRA, or one on quantised weights.
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
        self._settings = _Settings(self._layers.values())
        self._factors = CoalescedGather(TensorReferences(module))
        self._sums = LowRankSums(self._factors)

    def check(self) -> None:
        for path, layer in self._layers.items():
            if isinstance(layer, self._tuner):
                _active_adapters(layer, [path, "weight"])
            elif not isinstance(layer, self._copies):
                raise _cannot_merge(path, layer)

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
                raise _cannot_merge(".".join(path[:-1]), layer)
        adapters = [adapter for layer in reversed(around) for adapter in _active_adapters(layer, kept)]
        return ".".join(kept), self._merge(tensor, adapters) if adapters else tensor

    def _merge(self, base: torch.Tensor, adapters: list[tuple[Any, str]]) -> LazyTensor:
        """Return the base weight plus the deltas of (layer, adapter) pairs."""
        found = [_Adapter.of(layer, adapter, self._factors) for layer, adapter in adapters]
        factors = [self._factors.tensor(number) for adapter in found for number in (adapter.a, adapter.b)]
        inputs = (base, *factors)
        number: int | None = None
        if all(adapter.is_product for adapter in found) and self._sums.is_possible(base, factors):
            number = self._sums.add(base, [adapter.term() for adapter in found])
        else:
            self._sums.keep_factors()
        merge = _Merge(self._factors.refer(base), tuple(found), self._factors, self._sums, number)
        widest = max(tensor.dtype.itemsize for tensor in inputs)
        recipe = Recipe(
            base,
            merge.compute,
            self._sums if number is not None or any(map(is_collective, factors)) else None,
            # peft computes a product and scales it, on a CPU at least in float32.
            extra_itemsize=2 * max(widest, 4),
            inputs=inputs,
            settings=self._settings,
            origin=merge.origin,
        )
        return LazyTensor(
            shape=base.shape,
            dtype=base.dtype,
            device=base.device,
            make=merge.make,
            is_collective=any(map(is_collective, inputs)),
            extra_bytes=sum(map(reading_bytes, inputs)) + 2 * base.shape.numel() * widest - full_bytes(base),
            recipe=recipe,
        )


def _cannot_merge(path: str, layer: nn.Module) -> ConfigError:
    return ConfigError(
        f"{path} is a peft {type(layer).__name__}, which cannot be merged during a sync", hint=_MERGE_FIRST
    )


class _Settings:
    """Which adapters of which layers are active, merged or disabled.  Scalings are read anew in every sync."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]

    def __call__(self) -> object:
        return [_settings_of(layer()) for layer in self._layers]


def _settings_of(layer: Any) -> object:
    if layer is None:
        return None
    return _is_disabled(layer), tuple(layer.active_adapters), tuple(getattr(layer, "merged_adapters", ()))


def _active_adapters(layer: Any, name: list[str]) -> list[tuple[Any, str]]:
    """Return (layer, adapter) for every adapter that changes the parameter `name` of the layer's base layer."""
    from peft.tuners import lora

    if _is_quantised(layer):
        raise ConfigError(
            f"{'.'.join(name)} is a quantised weight (of a {type(layer.get_base_layer()).__name__}, in a peft "
            f"{type(layer).__name__}), which a sync can neither send nor merge with an adapter",
            hint=_SERVE_APART,
        )
    if layer.merged:
        if layer.disable_adapters:
            raise ConfigError(
                f"the adapters of {'.'.join(name)} are both merged and disabled; peft unmerges them in the next forward",
                hint="call unmerge_adapter() on the model first",
            )
        return []  # the base layer's weight is the merged one
    if _is_disabled(layer):
        return []
    if not isinstance(layer, lora.LoraLayer):
        kind = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
        raise ConfigError(
            f"{'.'.join(name)} has an adapter of kind {kind}; only LoRA can be merged during a sync",
            hint=_MERGE_FIRST,
        )
    if (other := _forward_of_another(layer)) is not None:
        raise ConfigError(
            f"{'.'.join(name)} has LoRA adapters with which a peft {type(other).__name__} computes by what is in the prompt, which "
            "no weight can represent",
            hint="train a LoRA adapter, or send the base alone: with model.disable_adapter(): engine.sync_weights(model)",
        )
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.r]
    plain = isinstance(layer, (lora.Linear, lora.Embedding, lora.ParamWrapper))
    for adapter in adapters:
        # Variants such as DoRA have merge code of their own.
        if not plain or adapter in layer.lora_variant or layer.lora_bias[adapter]:
            raise ConfigError(
                f"{'.'.join(name)} has a LoRA adapter {adapter!r} that cannot be merged during a sync "
                f"({type(layer).__name__}; DoRA and other variants, and LoRA biases are not supported)",
                hint=_MERGE_FIRST,
            )
    target = layer.parameter_name if isinstance(layer, lora.ParamWrapper) else "weight"
    return [(layer, adapter) for adapter in adapters] if name[-1] == target else []


def _forward_of_another(layer: Any) -> object | None:
    """Return the object of peft's that computes in place of a layer, as X-LoRA's do, which weigh its adapters; None if none."""
    forward = layer.__dict__.get("forward")
    owner = None if forward is None else getattr(inspect.unwrap(forward), "__self__", None)
    return owner if owner is not layer and type(owner).__module__.partition(".")[0] == "peft" else None


def _is_disabled(layer: Any) -> bool:
    return bool(layer.disable_adapters or getattr(_forward_of_another(layer), "adapters_disabled", False))


def _is_quantised(layer: Any) -> bool:
    modules = {cls.__module__.removeprefix("peft.tuners.lora.") for cls in type(layer).__mro__}
    if modules & _QUANTISED:
        return True
    # Whatever quantised it: float8 has one byte.
    dtypes = {parameter.dtype for parameter in layer.get_base_layer().parameters(recurse=False)}
    return any(not dtype.is_floating_point or dtype.itemsize < 2 for dtype in dtypes)


@dataclass(frozen=True, slots=True)
class _Merge:
    """A base weight plus the deltas of adapters.  Keeps none of them alive."""

    base: Reference
    adapters: tuple[_Adapter, ...]
    factors: CoalescedGather
    sums: LowRankSums
    number: int | None
    """Of the weight in `sums`, if it is one of them."""

    def origin(self) -> object:
        """Return where the factors of the adapters are, and their scales.

        With ``ensure_weight_tying`` peft gives an output layer the transposed factors of the embedding that it is tied to.
        """
        return [
            ({_place_of(self.factors.tensor(number)) for number in (adapter.a, adapter.b)}, adapter.scaling())
            for adapter in self.adapters
        ]

    def make(self) -> torch.Tensor:
        """Return the full sum.  Collective if base or factors are DTensors: base first, then the factors in order."""
        base = self.base()
        if base is None:
            raise RuntimeError("a weight with adapters is gone: its module was dropped or changed")
        # Not what was gathered for `compute`: whether that is there could differ between ranks that have failed.
        return self._sum(full_tensor(base), whole(base.shape), lambda number: full_tensor(self.factors.tensor(number)))

    def compute(self, base: torch.Tensor, region: Region, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return a region of the sum, from what was gathered; see `ComputeFrom`."""
        found = None if self.number is None else self.sums.add_to(self.number, base, region, out)
        return self._sum(base, region, self.factors.full, out) if found is None else found

    def _sum(
        self,
        weight: torch.Tensor,
        region: Region,
        read: Callable[[int], torch.Tensor],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        for adapter in self.adapters:
            # peft computes some deltas on an offloaded base's device.
            delta = adapter.delta(region, read).to(weight.device)
            # In the wider of the two dtypes, rounded once.
            merged = torch.empty(region.lengths, dtype=weight.dtype, device=weight.device) if out is None else out
            weight = torch.add(weight, delta, out=merged)
        return weight


def _place_of(tensor: torch.Tensor) -> object:
    """Return what a tensor and its transpose share."""
    local = local_of(tensor)
    return storage_id(tensor), local.data_ptr(), local.dtype, frozenset(zip(local.shape, local.stride()))


@dataclass(frozen=True, slots=True)
class _Adapter:
    """One adapter of one layer.  Keeps neither alive.

    Attributes:
        layer: peft's.
        name: Of the adapter.
        a: Number of its factor A.
        b: Number of its factor B.
        narrow: Which of the functions below narrows them to a region.
        is_product: Whether the delta is their scaled product and nothing else.
    """

    layer: weakref.ref[Any]
    name: str
    a: int
    b: int
    narrow: Callable[[Any, Region, torch.Tensor, torch.Tensor], _Factors]
    is_product: bool

    @classmethod
    def of(cls, layer: Any, name: str, factors: CoalescedGather) -> _Adapter:
        from peft.tuners import lora

        if isinstance(layer, lora.Embedding):
            a, b, narrow = layer.lora_embedding_A[name], layer.lora_embedding_B[name], _narrow_embedding
        else:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            is_stack = isinstance(layer, lora.ParamWrapper) and layer.num_experts > 1
            narrow = _narrow_experts if is_stack else _narrow_linear
        is_product = type(layer).get_delta_weight is lora.Linear.get_delta_weight
        return cls(weakref.ref(layer), name, factors.add(a), factors.add(b), narrow, is_product)

    def term(self) -> Term:
        """Return the delta as a product."""
        return Term(self.a, self.b, self.scaling, self._layer().fan_in_fan_out)

    def scaling(self) -> float:
        return float(self._layer().scaling[self.name])

    def _layer(self) -> Any:
        layer = self.layer()
        if layer is None:
            raise RuntimeError("a layer with adapters is gone: its module was dropped or changed")
        return layer

    def delta(self, region: Region, read: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Return a region of the delta, as peft computes it from the parts of the factors that it depends on."""
        layer = self._layer()
        narrowed = self.narrow(layer, region, read(self.a), read(self.b))
        # Not `torch.func.functional_call`: it puts the factors into the trainer's layer for the time of the call, and
        # takes several times as long as the product itself.
        delta: torch.Tensor = type(layer).get_delta_weight(_Narrowed(layer, self.name, narrowed), self.name)
        return delta.reshape(region.lengths)


@dataclass(frozen=True, slots=True)
class _Factors:
    """The factors of a region of a delta.

    Attributes:
        a: Factor A.
        b: Factor B.
        attributes: What is different in a layer that has only this region.
    """

    a: torch.Tensor
    b: torch.Tensor
    attributes: dict[str, object]


class _Narrowed:
    """A LoRA layer with other factors, for its own `get_delta_weight`; everything else is the layer's."""

    def __init__(self, layer: Any, adapter: str, factors: _Factors) -> None:
        self.__dict__.update(factors.attributes)
        self._layer = layer
        self.lora_A = {adapter: SimpleNamespace(weight=factors.a)}
        self.lora_B = {adapter: SimpleNamespace(weight=factors.b)}
        self.lora_embedding_A = {adapter: factors.a}
        self.lora_embedding_B = {adapter: factors.b}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _narrow_linear(layer: Any, region: Region, a: torch.Tensor, b: torch.Tensor) -> _Factors:
    """Narrow A of shape [rank, in] and B [out, rank]; the delta is [out, in], or [in, out] if `fan_in_fan_out`."""
    rows, columns = zip(region.starts[-2:], region.lengths[-2:])
    if layer.fan_in_fan_out:
        rows, columns = columns, rows
    return _Factors(a.narrow(1, *columns), b.narrow(0, *rows), {})


def _narrow_embedding(layer: Any, region: Region, a: torch.Tensor, b: torch.Tensor) -> _Factors:
    """Narrow A of shape [rank, embeddings] and B [features, rank]; the delta is [embeddings, features]."""
    rows, columns = zip(region.starts, region.lengths)
    return _Factors(a.narrow(1, *rows), b.narrow(0, *columns), {})


def _narrow_experts(layer: Any, region: Region, a: torch.Tensor, b: torch.Tensor) -> _Factors:
    """Narrow A of shape [experts x rank, in] and B [out, rank x experts].

    The delta is [experts, in, out], or [experts, out, in] if peft has swapped them.
    """
    experts, rows, columns = zip(region.starts, region.lengths)
    is_swapped = getattr(layer, "_did_swap_in_out_features", False)
    outs, ins = (rows, columns) if is_swapped else (columns, rows)
    rank = a.shape[0] // layer.num_experts
    a = a.reshape(layer.num_experts, rank, -1).narrow(0, *experts).narrow(2, *ins)
    b = b.reshape(-1, rank, layer.num_experts).narrow(0, *outs).narrow(2, *experts)
    number = experts[1]
    return _Factors(
        a.reshape(number * rank, ins[1]),
        b.reshape(outs[1], rank * number),
        # peft multiplies the factors of a single expert as those of a linear layer.
        {"num_experts": number, "fan_in_fan_out": not is_swapped},
    )


def is_merging(module: nn.Module) -> bool:
    """Return whether `merged` would compute a weight of this module."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (layer for layer in module.modules() if isinstance(layer, BaseTunerLayer))
    return any(layer.active_adapters and not layer.merged and not _is_disabled(layer) for layer in layers)


def applied_adapters(module: nn.Module) -> dict[str, nn.Module]:
    """Return the LoRA adapters that are in the weights of a module as a sync sends them: name -> a layer that has it.

    Not those of which all that this rank holds adds nothing, as before the first training step.  Waits for the device.
    """
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.lora import LoraLayer

    found: dict[str, nn.Module] = {}
    for layer in modules_of(module):
        if isinstance(layer, LoraLayer):
            active = [] if _is_disabled(layer) else layer.active_adapters
            for name in layer.merged_adapters if layer.merged else active:
                # What peft has merged may have been another adapter then; of the others one layer is looked at as a rule.
                if name in layer.r and name not in found and (layer.merged or _adds(layer, name)):
                    found[name] = layer
    return found


def _adds(layer: Any, name: str) -> bool:
    """Return whether a layer's factor B has a number other than zero in what this rank holds of it."""
    b = layer.lora_embedding_B[name] if name in layer.lora_embedding_B else layer.lora_B[name].weight
    return bool(local_of(b).detach().any())


__all__ = ["applied_adapters", "check_adapters", "inner_model", "is_merging", "merged"]
