"""LoRA adapters on a running engine."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tpcolocate.checks import check_text
from tpcolocate.deadline import check_timeout
from tpcolocate.engine.context import OwnedServer, SliceContext
from tpcolocate.errors import ConfigError, EngineStateError
from tpcolocate.server.api import ServerApi
from tpcolocate.weights.lora import Adapter, adapter_of, check_adapter, check_served, layers_with
from tpcolocate.weights.sources.named_weights import Source
from tpcolocate.weights.sources.nonfinite import find_nonfinite, nonfinite_text
from tpcolocate.weights.sources.peft_merge import applied_adapters
from tpcolocate.weights.sync.replicas import compare_adapters
from tpcolocate.weights.transport.mesh import groups_of_module, together

logger = logging.getLogger(__name__)


class LoraAdapters:
    """The calls of `Engine` for LoRA adapters; see there."""

    def __init__(self, context: SliceContext) -> None:
        self._context = context
        # On the owner those that the server was started with too; only the owner reads it.
        self._names: tuple[str, ...] = () if context.owned is None else tuple(sorted(context.owned.api.loras_at_start))
        # Likewise: those that were loaded since, for another server.  Full tensors on the CPU.
        self._loaded: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}
        self._merged: dict[str, weakref.ref[nn.Module]] = {}
        """What is in the engine's weights: PEFT's name of an adapter -> a layer that has it."""
        self._layers: dict[str, tuple[str, weakref.WeakSet[nn.Module]]] = {}
        """What is served beside them: name -> PEFT's name, and the layers that have it."""

    def load_from(self, name: str, model: nn.Module, adapter_name: str | None, *, timeout_s: float) -> None:
        """Load the adapter of a model in place of one of that name; arguments as of `Engine.set_lora`."""

        def make() -> Adapter:
            spec = self._context.sync.spec
            adapter = adapter_of(model, adapter_name, served=None if spec is None else spec.shapes)
            self._check_not_merged(layers_with(model, adapter_name))
            return adapter

        self.load(name, make, groups_of_module(model) if isinstance(model, nn.Module) else {}, timeout_s=timeout_s)
        layers = layers_with(model, adapter_name)
        self._layers[name] = layers[0][0], weakref.WeakSet(layer for _, layer in layers)

    def _check_not_merged(self, layers: Sequence[tuple[str, nn.Module]]) -> None:
        for name, layer in layers:
            merged = self._merged.get(name)
            if merged is not None and merged() is layer:
                raise ConfigError(
                    f"adapter {name!r} of this model is in the engine's weights, into which the last sync has merged it; "
                    "served beside them it would count twice",
                    hint="send the base alone, with model.disable_adapter(): engine.sync_weights(model), or generate without it",
                )

    def note_synced(self, source: Source, *, partial: bool) -> str | None:
        """Note which adapters a sync has merged into the engine's weights; return a warning if one is served as well.

        Collective: over the slice.
        """
        if not self._context.server.serves_adapters:
            return None  # a walk through all modules is saved
        applied = applied_adapters(source) if isinstance(source, nn.Module) else {}
        found = {name: weakref.ref(layer) for name, layer in applied.items()}
        self._merged = {**self._merged, **found} if partial else found
        twice = [name for name, (own, layers) in self._layers.items() if own in applied and applied[own] in layers]
        if self._layers:
            # Of a sharded adapter one rank may have nothing but zeros, with which it adds nothing as far as that rank sees.
            of_ranks = self._context.group.all_gather(twice, what="look for adapters that count twice")
            twice = [name for name in self._layers if any(name in of_rank for of_rank in of_ranks)]
        if not twice:
            return None
        warning = (
            f"these weights contain an adapter that is served as well ({', '.join(twice)}), so that generate(lora_path=...) "
            "counts it twice; with model.disable_adapter(): engine.sync_weights(model) sends the base alone"
        )
        logger.warning("%s", warning)
        return warning

    def load(
        self,
        name: str,
        make: Callable[[], Adapter],
        groups: Mapping[dist.ProcessGroup, torch.device],
        *,
        timeout_s: float,
    ) -> None:
        """Load an adapter in place of one of that name.

        Args:
            name: For ``generate(..., lora_path=name)``.
            make: Makes it, on every rank; what it raises is raised on all of them.
            groups: Among which its source is sharded; see `tpcolocate.weights.transport.mesh.together`.
            timeout_s: For each request to the server, in seconds.
        """
        context = self._context
        with ExitStack() as stack:
            if len(context.all_slices) == 1:  # then the groups of the trainer alone connect the ranks
                stack.enter_context(together(groups, rank=context.group.rank, timeout_s=context.group.timeout_s))
            must_match = stack.enter_context(context.all_slices.together("load a LoRA adapter"))
            context.state.check_open("load a LoRA adapter")
            timeout_s = check_timeout(timeout_s)
            _check_name(name)
            adapter = check_adapter(make(), context.sync.spec)
            if context.owned is not None:
                self._check_limits(name, adapter, context.owned.api)
            tensors = [(n, tuple(t.shape), t.dtype, type(t).__name__) for n, t in adapter.tensors.items()]
            must_match |= {"name": name, "config": adapter.config, "tensors": tensors}
        with context.going_on():
            self._load(name, adapter, timeout_s=timeout_s)

    def _load(self, name: str, adapter: Adapter, *, timeout_s: float) -> None:
        context = self._context
        context.in_all_slices(
            "compare a LoRA adapter in all slices",
            lambda: compare_adapters(context.group, adapter.tensors),
            timeout_s=timeout_s,
        )
        # A rank that fails here leaves the gather of the others; as in any collective of theirs, a deadline ends it.
        with context.all_slices.together("gather a LoRA adapter"):
            full = adapter.gathered(keep=context.owned is not None)
        tp_size = len(context.group)

        def act(owned: OwnedServer) -> list[str]:
            nonfinite = find_nonfinite(full)
            owned.api.unload_lora(name, missing_ok=True, timeout_s=timeout_s)
            owned.api.load_lora(name, full, adapter.config_for_server, tp_size=tp_size, timeout_s=timeout_s)
            return nonfinite

        def replace() -> None:
            self._forget(name)
            nonfinite = context.on_owner(f"load LoRA adapter {name!r}", act, timeout_s=2 * timeout_s)
            if nonfinite:
                logger.warning("adapter %r is served, and %s", name, nonfinite_text(nonfinite))
            self._names = (*self._names, name)
            if context.owned is not None:
                self._loaded[name] = (dict(full), dict(adapter.config_for_server))

        context.in_all_slices(f"load LoRA adapter {name!r} in all slices", replace, timeout_s=2 * timeout_s)

    def set_again(self, *, timeout_s: float = 120.0) -> None:
        """Load the adapters into another server that runs now, and unload those that it starts with and that were unloaded.

        Collective: over the slice.

        Args:
            timeout_s: For each request to the server, in seconds.
        """
        tp_size, names, loaded = len(self._context.group), self._names, self._loaded
        self._merged = {}  # its weights are the checkpoint's

        def act(owned: OwnedServer) -> None:
            for name in sorted(owned.api.loras_at_start - set(names)):
                owned.api.unload_lora(name, timeout_s=timeout_s)
            for name, (tensors, config) in loaded.items():
                owned.api.unload_lora(name, missing_ok=True, timeout_s=timeout_s)
                owned.api.load_lora(name, tensors, config, tp_size=tp_size, timeout_s=timeout_s)

        self._context.on_owner(
            "set the LoRA adapters again", act, timeout_s=(2 * len(loaded) + len(names) + 1) * timeout_s
        )

    def _check_limits(self, name: str, adapter: Adapter, api: ServerApi) -> None:
        """Check that the server was started for this adapter, and can hold it beside the others."""
        limits = api.lora_limits
        if limits is None:
            raise ConfigError(
                "the server was not started for LoRA",
                hint="launch(enable_lora=True, max_lora_rank=..., lora_target_modules=[...])",
            )
        check_served(adapter, max_rank=limits.max_rank, target_modules=limits.target_modules)
        is_full = limits.max_loaded is not None and len(self._names) >= limits.max_loaded
        if is_full and name not in self._names:
            raise EngineStateError(
                f"the server holds {len(self._names)} adapters, as many as max_loaded_loras permits",
                hint="unload_lora() one first; SGLang would evict the least recently used one",
            )

    def unload(self, name: str, *, timeout_s: float) -> None:
        with self._context.group.together("unload a LoRA adapter") as must_match:
            self._context.state.check_open("unload a LoRA adapter")
            timeout_s = check_timeout(timeout_s)
            _check_name(name)
            must_match["name"] = name
        self._context.on_owner(
            f"unload LoRA adapter {name!r}",
            lambda owned: owned.api.unload_lora(name, timeout_s=timeout_s),
            timeout_s=timeout_s,
        )
        self._forget(name)

    def _forget(self, name: str) -> None:
        self._names = tuple(other for other in self._names if other != name)
        self._loaded.pop(name, None)
        self._layers.pop(name, None)


def _check_name(name: object) -> None:
    if isinstance(name, str) and not name:
        raise ConfigError("an adapter needs a name", hint="for generate(..., lora_path=name)")
    check_text("name", name)


__all__ = ["LoraAdapters"]
