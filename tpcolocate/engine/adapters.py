"""LoRA adapters on a running engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tpcolocate.engine.base import SliceClient
from tpcolocate.errors import ConfigError, EngineStateError, RankLostError, TpColocateError
from tpcolocate.server.api import ServerApi
from tpcolocate.weights.lora import Adapter, adapter_of, check_adapter, check_served, make_adapter


class AdapterCalls(SliceClient):
    """The calls of `Engine` for LoRA adapters."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        # On the owner those that the server was started with too; only it asks.
        self._loras: tuple[str, ...] = () if self._verbs is None else tuple(sorted(self._verbs.loras_at_start))

    def set_lora(
        self, name: str, model: nn.Module, *, adapter_name: str | None = None, timeout_s: float = 120.0
    ) -> None:
        """Serve the LoRA adapter of a PEFT model under a name, in place of one of that name.

        Collective: over the slice; for sharded weights also over their mesh, and with several slices of tp_size > 1
        over all of them: call it on every training rank.

        Args:
            name: For ``generate(..., lora_path=name)``.
            model: From `peft.get_peft_model`: plain, DDP or FSDP2.
            adapter_name: PEFT's name of the adapter; may be left out if the model has one.
            timeout_s: For each request to the server, in seconds; an adapter is replaced once its requests are done.

        Raises:
            ConfigError: No adapter, one that SGLang would serve as something else (DoRA, rank patterns, ...), or one that
                the server was not started for.
            WeightsMismatchError: Its names or shapes do not fit the served model, or differ between ranks.
            EngineStateError: Shut down, or the server has no room for one more.
            RequestError, EngineDeadError, DeadlineError: The server failed; an adapter of that name may be gone.
            RankFailedError: Another library's exception on some rank.
        """
        self._set_lora(name, lambda: adapter_of(model, adapter_name), timeout_s)

    def set_lora_from_tensors(
        self, name: str, tensors: Mapping[str, torch.Tensor], config: Any, *, timeout_s: float = 120.0
    ) -> None:
        """Serve a LoRA adapter under a name, in place of one of that name.

        Collective and `Raises`: as `set_lora`; every rank passes the same.

        Args:
            name: For ``generate(..., lora_path=name)``.
            tensors: PEFT's names -> full tensors or DTensors, on any device.
            config: PEFT's adapter configuration: ``adapter_config.json`` as a dict, or a `peft.LoraConfig`.
            timeout_s: As `set_lora`.
        """
        self._set_lora(name, lambda: make_adapter(tensors, config), timeout_s)

    def _set_lora(self, name: str, make: Callable[[], Adapter], timeout_s: float) -> None:
        everybody = self._everybody
        with everybody.together("load a LoRA adapter") as meant:
            self._state.check_open("load a LoRA adapter")
            if not name:
                raise ConfigError("an adapter needs a name", hint="for generate(..., lora_path=name)")
            adapter = check_adapter(make(), self._sync.spec)
            if self._verbs is not None:
                self._check_room(name, adapter, self._verbs)
            tensors = [(n, tuple(t.shape), t.dtype, type(t).__name__) for n, t in adapter.tensors.items()]
            meant |= {"name": name, "config": adapter.config, "tensors": tensors}
        # A rank that fails here leaves the gather of the others; as in any collective of theirs, a deadline ends it.
        with everybody.together("gather a LoRA adapter"):
            full = adapter.gathered(keep=self._verbs is not None)

        def act() -> None:
            verbs = self._owned()
            verbs.unload_lora(name, missing_ok=True, timeout_s=timeout_s)
            verbs.load_lora(name, full.tensors, full.config_for_server, tp_size=len(self._group), timeout_s=timeout_s)

        error: TpColocateError | None = None
        self._loras = tuple(other for other in self._loras if other != name)
        try:
            self._on_owner(f"load LoRA adapter {name!r}", act, timeout_s=2 * timeout_s)
            self._loras = (*self._loras, name)
        except TpColocateError as caught:
            error = caught
        if everybody is not self._group and not isinstance(error, RankLostError):
            everybody.agree(error, what=f"load LoRA adapter {name!r} in all slices", timeout_s=2 * timeout_s)
        if error is not None:
            raise error

    def _check_room(self, name: str, adapter: Adapter, verbs: ServerApi) -> None:
        """Whether the server was started for this adapter, and can hold it beside the others."""
        limits = verbs.lora_limits
        if limits is None:
            raise ConfigError(
                "the server was not started for LoRA",
                hint="launch(enable_lora=True, max_lora_rank=..., lora_target_modules=[...])",
            )
        check_served(adapter, max_rank=limits.max_rank, target_modules=limits.target_modules)
        full = limits.max_loaded is not None and len(self._loras) >= limits.max_loaded
        if full and name not in self._loras:
            raise EngineStateError(
                f"the server holds {len(self._loras)} adapters, as many as max_loaded_loras permits",
                hint="unload_lora() one first; SGLang would throw out the one that was used least recently",
            )

    def unload_lora(self, name: str, *, timeout_s: float = 120.0) -> None:
        """Remove a LoRA adapter, once the requests that use it are done.

        Collective: over the slice.

        Raises:
            RequestError: The server has no adapter of that name, or failed.
            EngineDeadError, DeadlineError: The server is gone, or its requests take longer.
        """
        self._on_owner(
            f"unload LoRA adapter {name!r}",
            lambda: self._owned().unload_lora(name, timeout_s=timeout_s),
            timeout_s=timeout_s,
        )
        self._loras = tuple(other for other in self._loras if other != name)


__all__ = ["AdapterCalls"]
