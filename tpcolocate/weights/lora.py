"""LoRA adapters for the engine: PEFT's names in one form, and checks against the served model.

SGLang loads an adapter of the wrong shape, drops projections that it cannot pair, and always scales by
``lora_alpha / r``, each with status 200 (``lora/lora.py`` of releases 0.5.9 to 0.5.21).  So names, shapes and
configuration are checked before an adapter that is being served is replaced, and one that PEFT scales in another way gets
the ``lora_alpha`` that comes to the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from tpcolocate.checks import check_type
from tpcolocate.errors import ConfigError, WeightsMismatchError, shown, some
from tpcolocate.weights.sources.hf_names import to_checkpoint
from tpcolocate.weights.sources.lazy_tensor import Item, LazyTensor, full_tensor
from tpcolocate.weights.sources.model_spec import FLOATS, ModelSpec
from tpcolocate.weights.sources.named_weights import check_readable, gathered_state
from tpcolocate.weights.sources.peft_merge import inner_model
from tpcolocate.weights.sources.wrapper_names import unwrapped, without_wrappers

_MOST = 2**31
_PREFIX = "base_model.model."
_NAME = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
# SGLang finds the layer of an adapter's tensor by the first of these in its name (``get_layer_id``), and nothing else there.
_LAYER = re.compile(r"\blayers\.\d+\.")
_TOWER = re.compile(r"(^|\.)(vision|visual|audio)[^.]*\.")
# SGLang serves these as one projection.  It fails on an adapter with only some of them, or drops those.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Configuration that changes what an adapter computes, and that SGLang ignores.
_MUST_BE_OFF = {
    "use_dora": "SGLang does not serve DoRA",
    "rank_pattern": "SGLang scales every module by the one r of the configuration",
    "alpha_pattern": "SGLang scales every module by the one lora_alpha of the configuration",
    "lora_bias": "SGLang has no biases in adapters",
    "modules_to_save": "SGLang serves the adapter's low-rank weights only",
    "trainable_token_indices": "SGLang serves the adapter's low-rank weights only",
    "layer_replication": "the served model has other layers",
    "target_parameters": "SGLang adapts modules, not parameters",
    "fan_in_fan_out": "the served model's weights are not transposed",
    "use_qalora": "SGLang does not serve QALoRA",
    "alora_invocation_tokens": "SGLang would apply it to all tokens",
}
# Ways to initialise an adapter (with a suffix such as ``_niter_4``) that take what is in it out of the base's weights.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA adapter, as PEFT saves it.

    Attributes:
        tensors: ``base_model.model.<module>.lora_A.weight`` -> (r, in), ``lora_B`` -> (out, r); full tensors, DTensors, or
            lazy tensors.
        config: ``adapter_config.json``, in JSON types.
    """

    tensors: Mapping[str, Item]
    config: Mapping[str, Any]

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    @property
    def config_for_server(self) -> dict[str, Any]:
        """The configuration for SGLang: names of modules where PEFT may have a regular expression."""
        leaves = sorted({_leaf(module) for module in self.modules()})
        return {**self.config, "peft_type": "LORA", "r": self.rank, "target_modules": leaves}

    def modules(self) -> dict[str, dict[str, Item]]:
        """Return the ``A`` and ``B`` of each module, by its path in the served model."""
        found: dict[str, dict[str, Item]] = {}
        for name, tensor in self.tensors.items():
            module, side = _parts(name)
            found.setdefault(module, {})[side] = tensor
        return found

    def gathered(self, *, keep: bool) -> dict[str, torch.Tensor]:
        """Return the adapter's full tensors on the CPU; none unless `keep`.

        Collective: over the meshes of DTensors, and what lazy tensors are gathered from.
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self.tensors.items():
            full = full_tensor(tensor)
            if keep:
                # A copy in any case: a view would be pickled with all of its memory.
                tensors[name] = full.to("cpu", copy=True).contiguous()
        return tensors


def make_adapter(tensors: Mapping[str, Item], config: Any) -> Adapter:
    """Return an adapter with PEFT's names and configuration in one form.

    Args:
        tensors: From ``get_peft_model_state_dict``, an ``adapter_model.safetensors``, or the ``lora_`` entries of a state
            dict (``...lora_A.default.weight``).
        config: ``adapter_config.json`` as a mapping, or a `peft.LoraConfig`.

    Raises:
        ConfigError: Not a LoRA adapter, one that SGLang would not compute as PEFT does, or tensors that cannot be read.
        WeightsMismatchError: Names that no LoRA adapter has.
    """
    plain = _plain(config.to_dict() if hasattr(config, "to_dict") else config)
    if not isinstance(plain, dict):
        raise ConfigError(
            f"config must be a mapping or a peft.LoraConfig, got {type(config).__name__}",
            hint="pass PEFT's adapter_config.json as a dict, or a peft.LoraConfig",
        )
    _check_config(plain)
    if plain.get("use_rslora"):  # PEFT then scales by lora_alpha / sqrt(r)
        plain |= {"use_rslora": False, "lora_alpha": plain["lora_alpha"] * math.sqrt(plain["r"])}
    check_type("tensors", tensors, Mapping, expected="a mapping of names to tensors")
    if not tensors:
        raise ConfigError("the adapter has no tensors", hint="pass peft.get_peft_model_state_dict(model)")
    named: dict[str, Item] = {}
    unknown, adapters = [], set()
    for name, tensor in tensors.items():
        matched = _NAME.match(without_wrappers(name)) if isinstance(name, str) else None
        if matched is None or not isinstance(tensor, (torch.Tensor, LazyTensor)):
            unknown.append(str(name))
            continue
        if isinstance(tensor, torch.Tensor):
            check_readable(name, tensor)
        adapters.add(matched["adapter"])
        named[f"{_PREFIX}{matched['module']}.lora_{matched['side']}.weight"] = tensor
    if unknown:
        raise WeightsMismatchError(
            f"not weights of a LoRA adapter on linear layers: {some(unknown)}",
            hint="use PEFT's names, such as base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight; SGLang would "
            "ignore others without an error",
        )
    if len(adapters) > 1:
        raise ConfigError(
            f"the tensors belong to several adapters: {', '.join(sorted(map(str, adapters)))}",
            hint="pass one at a time, for example peft.get_peft_model_state_dict(model, adapter_name=...)",
        )
    return Adapter(named, plain)


def adapter_of(model: nn.Module, adapter_name: str | None, *, served: Collection[str] | None = None) -> Adapter:
    """Return the adapter of a model with PEFT layers (also from transformers' ``add_adapter``), without copying it.

    Args:
        model: Plain, DDP, compiled, or sharded by FSDP1, FSDP2 or ZeRO-3.
        adapter_name: Which one; may be None if there is only one.
        served: Names of the served model's weights, if they are known.

    Raises:
        ConfigError: Not a PEFT model, no such adapter, layers that are scaled differently, or as `make_adapter`.
    """
    outermost, model = model, unwrapped(model)
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        raise ConfigError(
            f"{type(model).__name__} has no PEFT adapters",
            hint="wrap it with peft.get_peft_model(), or use set_lora_from_tensors()",
        )
    if adapter_name is None and len(configs) == 1:
        [adapter_name] = configs
    if not isinstance(adapter_name, str) or adapter_name not in configs:
        raise ConfigError(
            f"the model has no adapter named {adapter_name!r}", hint=f"pass adapter_name: one of {', '.join(configs)}"
        )
    from peft import get_peft_model_state_dict

    state = gathered_state(outermost)
    if state is None:
        # By default peft looks up the base model, if need be on the hub, and adds embeddings that have another size there.
        own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    else:
        # peft looks for names with the wrappers' segments.
        pattern = re.compile(rf"\.lora_\w+\.{re.escape(adapter_name)}(\.|$)")
        own = {name: item for name, item in state.items() if pattern.search(name)}
    adapter = make_adapter(own, configs[adapter_name])
    tensors = adapter.tensors if served is None else _under_served_names(adapter, model, served)
    return Adapter(tensors, {**adapter.config, "lora_alpha": _alpha(model, adapter_name, adapter.config)})


def _under_served_names(adapter: Adapter, model: nn.Module, served: Collection[str]) -> Mapping[str, Item]:
    """Return the tensors by the names of modules that the checkpoint has; transformers has others for models with images.

    A sync names their weights in the same way.
    """
    blanks: dict[str, torch.Tensor] = {}
    for module, sides in adapter.modules().items():
        if f"{module}.weight" not in served and len(sides) == 2:
            shape = sides["B"].shape[0], sides["A"].shape[-1]
            blanks[f"{module}.weight"] = torch.empty(shape, device="meta")
    if not blanks:
        return adapter.tensors
    inner = inner_model(model)
    named = to_checkpoint(model if inner is None else inner, list(blanks.items()), is_served=served.__contains__)
    if len(named) != len(blanks):  # some are several weights in the checkpoint
        return adapter.tensors
    found = {name.removesuffix(".weight"): new.removesuffix(".weight") for name, (new, _) in zip(blanks, named)}
    return {
        f"{_PREFIX}{found.get(module, module)}.lora_{side}.weight": tensor
        for module, sides in adapter.modules().items()
        for side, tensor in sides.items()
    }


def layers_with(model: nn.Module, adapter_name: str | None) -> list[tuple[str, nn.Module]]:
    """Return (PEFT's name of the adapter, layer) for the layers of a model that have it; arguments as of `adapter_of`."""
    from peft.tuners.lora import LoraLayer

    name = next(iter(unwrapped(model).peft_config)) if adapter_name is None else adapter_name  # type: ignore[union-attr, arg-type]
    return [(name, layer) for layer in model.modules() if isinstance(layer, LoraLayer) and name in layer.r]


def _alpha(model: nn.Module, adapter_name: str, config: Mapping[str, Any]) -> float:
    """Return the ``lora_alpha`` with which SGLang scales as the model's layers do now: a script may have set their scale.

    Raises:
        ConfigError: Layers are scaled differently.
    """
    from peft.tuners.lora import LoraLayer

    scalings: dict[float, str] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling:
            scalings.setdefault(float(layer.scaling[adapter_name]), without_wrappers(path))
    if len(scalings) > 1:
        raise ConfigError(
            f"the layers of adapter {adapter_name!r} are scaled differently: "
            + some([f"{path} by {scaling:g}" for scaling, path in scalings.items()]),
            hint="SGLang scales every module by lora_alpha / r: set one scale for all layers, as unscale_layer() and set_scale() "
            "of PEFT's layers do, or send the merged weights with sync_weights(model)",
        )
    alpha, r = config["lora_alpha"], config["r"]
    return alpha if alpha / r in scalings else next(iter(scalings), alpha / r) * r


def check_adapter(adapter: Adapter, spec: ModelSpec | None) -> Adapter:
    """Check an adapter against the served model.

    Returns:
        The adapter, with zeros for the missing parts of fused projections (q, k, v; gate, up), which SGLang requires.

    Raises:
        WeightsMismatchError: A module that the served model lacks, a wrong shape, or a missing ``A`` or ``B``.
        ConfigError: Parts are missing, and the served model's shapes are unknown.
    """
    modules = adapter.modules()
    wrong: list[str] = []
    for module, sides in modules.items():
        if ".experts." in module:
            raise ConfigError(f"{module}: adapters on experts are not supported", hint="adapt the attention instead")
        if _TOWER.search(module) or not (_LAYER.search(module) or _leaf(module) == "lm_head"):
            raise ConfigError(
                f"{module}: SGLang serves adapters on the layers of a language model, and would take this one for one of those, "
                "or ignore it",
                hint="leave it out by exclude_modules or a regular expression as target_modules, or send the merged weights with "
                "sync_weights(model)",
            )
        missing = sorted({"A", "B"} - set(sides))
        if missing:
            wrong.append(f"{module} has no lora_{missing[0]}")
            continue
        for side, tensor in sorted(sides.items()):
            expected = _shape(module, side, adapter.rank, spec)
            if tensor.dtype not in FLOATS:
                wrong.append(f"{module}.lora_{side} is {tensor.dtype}, expected floating-point data")
            elif len(tensor.shape) != 2 or any(w not in (None, n) for w, n in zip(expected, tensor.shape)):
                want = ", ".join("any" if n is None else str(n) for n in expected)
                wrong.append(f"{module}.lora_{side} has shape {tuple(tensor.shape)}, expected ({want})")
    if wrong:
        raise WeightsMismatchError(
            f"{some(wrong)} (r={adapter.rank}, according to {'its configuration' if spec is None else spec.origin})",
            hint="the adapter is for another model or configuration; SGLang would load it without an error",
        )
    absent = [] if spec is None else _absent(adapter, spec)
    if absent:
        raise WeightsMismatchError(
            f"target_modules names layers that have no tensors: {some(absent)}",
            hint="pass the whole adapter, or the configuration that it was made with",
        )
    return Adapter({**adapter.tensors, **_zeros(adapter, spec)}, adapter.config)


def check_served(adapter: Adapter, *, max_rank: int | None, target_modules: Iterable[str] | None) -> None:
    """Check an adapter against the server's limits.

    Raises:
        ConfigError: Its rank is too large, or the server does not serve adapters on one of its modules.
    """
    if max_rank is not None and adapter.rank > max_rank:
        raise ConfigError(
            f"the adapter's r={adapter.rank} exceeds the server's max_lora_rank={max_rank}",
            hint=f"launch(max_lora_rank={adapter.rank})",
        )
    served = None if target_modules is None else set(target_modules)
    if served is None or served & {"all", "all-linear"}:
        return
    allowed = {_fused(_leaf(module)) for module in served}
    refused = sorted(leaf for leaf in {_leaf(m) for m in adapter.modules()} if _fused(leaf) not in allowed)
    if refused:
        raise ConfigError(
            f"the server was not started for adapters on {', '.join(refused)}",
            hint=f"launch(lora_target_modules={sorted({*served, *refused})})",
        )


def _check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type", "LORA")
    if str(kind).upper() != "LORA":
        raise ConfigError(f"peft_type must be 'LORA', got {kind!r}", hint="SGLang serves LoRA adapters only")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _MOST:
            raise ConfigError(
                f"the adapter's configuration has {name}={shown(value)}",
                hint="pass a positive number, as in adapter_config.json",
            )
    if config["r"] != int(config["r"]):
        raise ConfigError(f"the adapter's configuration has r={config['r']!r}", hint="pass an integer rank")
    on = {name: reason for name, reason in _MUST_BE_OFF.items() if config.get(name)}
    if config.get("bias", "none") != "none":
        on["bias"] = "SGLang has no biases in adapters"
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        on["init_lora_weights"] = (
            "PEFT has changed the base's weights, and SGLang serves the checkpoint's: send the merged ones with "
            "sync_weights(model), or an adapter that save_pretrained(path_initial_model_for_weight_conversion=...) has converted"
        )
    for name, reason in on.items():
        raise ConfigError(f"the adapter's configuration has {name}={config[name]!r}", hint=reason)


def _shape(module: str, side: str, rank: int, spec: ModelSpec | None) -> tuple[int | None, int | None]:
    """Return the expected shape of ``A`` or ``B``; None for an unknown size."""
    num_out: int | None = None
    num_in: int | None = None
    if spec is not None:
        base = spec.shapes.get(f"{module}.weight")
        if base is None or len(base) != 2:
            raise WeightsMismatchError(
                f"the served model has no linear layer {module} (according to {spec.origin})",
                hint="the adapter is for another model, or for an output layer that is tied to the embedding; SGLang would "
                "ignore it without an error",
            )
        num_out, num_in = base
    return (rank, num_in) if side == "A" else (num_out, rank)


def _absent(adapter: Adapter, spec: ModelSpec) -> list[str]:
    """Return the layers that PEFT adapts with this configuration, and that have no tensors."""
    targets = adapter.config.get("target_modules")
    if not isinstance(targets, list) or any(
        adapter.config.get(name) for name in ("layers_to_transform", "layers_pattern", "exclude_modules")
    ):
        return []  # PEFT's other rules are not implemented here
    linear = [
        n.removesuffix(".weight") for n, shape in spec.shapes.items() if n.endswith(".weight") and len(shape) == 2
    ]
    named = [m for m in linear if any(m == target or m.endswith(f".{target}") for target in targets)]
    return sorted(set(named) - set(adapter.modules()))


def _zeros(adapter: Adapter, spec: ModelSpec | None) -> dict[str, torch.Tensor]:
    """Return zeros for the missing parts of fused projections."""
    zeros: dict[str, torch.Tensor] = {}
    modules = adapter.modules()
    for module, sides in modules.items():
        leaf = _leaf(module)
        group = next((group for group in _FUSED if leaf in group), ())
        for other in group:
            sibling = module.removesuffix(leaf) + other
            if sibling in modules:
                continue
            if spec is None:
                raise ConfigError(
                    f"the adapter has {module} but not {sibling}, and the served model's shapes are unknown",
                    hint=f"adapt all of {', '.join(group)}",
                )
            if f"{sibling}.weight" not in spec.shapes:
                continue
            for side in "AB":
                shape = [n for n in _shape(sibling, side, adapter.rank, spec) if n is not None]
                zeros[f"{_PREFIX}{sibling}.lora_{side}.weight"] = torch.zeros(
                    shape, dtype=sides[side].dtype, device="cpu"
                )
    return zeros


def _parts(name: str) -> tuple[str, str]:
    matched = _NAME.match(name)
    assert matched is not None, name
    return matched["module"], matched["side"]


def _leaf(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def _fused(leaf: str) -> str:
    return next((group[0] for group in _FUSED if leaf in group), leaf)


def _plain(value: Any) -> Any:
    """Return a value in JSON types: PEFT's configuration has sets and enumerations."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else type(value).__name__


__all__ = ["Adapter", "adapter_of", "check_adapter", "check_served", "layers_with", "make_adapter"]
