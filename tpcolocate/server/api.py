"""SGLang's endpoints as methods: the fields that each release takes, and what an answer means."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tpcolocate.errors import RequestError, SyncError
from tpcolocate.server.http import ServerClient
from tpcolocate.server.releases import Release, check_draft_model, release


@dataclass(frozen=True, slots=True)
class LoraLimits:
    """The adapters that a server was started for.

    Attributes:
        max_rank: Largest rank; None if the server does not report it.
        target_modules: As passed to SGLang (``q_proj``, or ``all``); None if the server does not report them.
        max_loaded: Most adapters at a time; for one more, SGLang evicts the least recently used one.
    """

    max_rank: int | None = None
    target_modules: frozenset[str] | None = None
    max_loaded: int | None = None


class ServerApi:
    """The endpoints of one running server.  Keeps no state; every call blocks, with a deadline.

    Args:
        client: Connected to the server.
        timeout_s: For what the server reports of itself, in seconds.

    Attributes:
        info: What the server reported of itself at the start.
        release: Its row in the table of releases.
    """

    def __init__(self, client: ServerClient, *, timeout_s: float = 30.0) -> None:
        self.client = client
        self.info: dict[str, Any] = client.get("/server_info", timeout_s=timeout_s)
        self.release: Release = release(str(self.info["version"]))
        check_draft_model(
            f"SGLang {self.release.version}", self.info.get("speculative_algorithm"), self.release.target_only()
        )
        client.check = self.release.check  # refuse to send what this release would drop

    def post(
        self, path: str, body: Mapping[str, Any], *, timeout_s: float, sent: Callable[[], None] | None = None
    ) -> None:
        """POST, and raise RequestError if the answer reports a failure; arguments as `ServerClient.post`."""
        answer = self.client.post(path, body, timeout_s=timeout_s, sent=sent)
        # Some failures come with status 200, and only the body reports them.
        if isinstance(answer, dict) and answer.get("success") is False:
            raise RequestError(str(answer.get("message") or answer.get("error_message") or answer), status=200)

    # --- generation and memory -----------------------------------------------------------------------------------

    def pause_generation(self, mode: str, *, timeout_s: float) -> None:
        """Hold generation; with ``abort`` the server answers once no request is left."""
        self.client.post("/pause_generation", {"mode": mode}, timeout_s=timeout_s)

    def continue_generation(self, *, timeout_s: float, sent: Callable[[], None] | None = None) -> None:
        """Let generation go on.

        Args:
            timeout_s: In seconds.
            sent: Called once the request has left.
        """
        self.client.post("/continue_generation", {}, timeout_s=timeout_s, sent=sent)

    def drop_cache(self, *, timeout_s: float, sent: Callable[[], None] | None = None) -> bool:
        """Drop the prefix cache; return False if the server refuses, because requests need it."""
        try:
            self.client.post("/flush_cache", timeout_s=timeout_s, sent=sent)
        except RequestError as error:
            if error.status != 400:
                raise
            return False
        return True

    def release_memory(self, tags: Sequence[str], *, timeout_s: float) -> None:
        self.client.post("/release_memory_occupation", {"tags": list(tags)}, timeout_s=timeout_s)

    def resume_memory(self, tags: Sequence[str], *, timeout_s: float) -> None:
        self.client.post("/resume_memory_occupation", {"tags": list(tags)}, timeout_s=timeout_s)

    # --- weights -------------------------------------------------------------------------------------------------

    def begin_weight_update(self, *, timeout_s: float) -> None:
        self.post("/begin_weight_update", {"selector": "target"}, timeout_s=timeout_s)

    def end_weight_update(self, *, timeout_s: float) -> None:
        self.post("/end_weight_update", {}, timeout_s=timeout_s)

    def push(self, payloads: Sequence[str], *, load_format: str, timeout_s: float) -> None:
        """Send one bucket or command: one payload per TP rank, in tp order.  Never repeated, whatever happens.

        Args:
            payloads: From `tpcolocate.ipc_payload`.
            load_format: ``"flattened_bucket"``, or the dotted name of a custom weight loader.
            timeout_s: In seconds.

        Raises:
            SyncError: The engine refused it.
            EngineDeadError, DeadlineError: The outcome is unknown.
        """
        body = {
            "serialized_named_tensors": list(payloads),
            "load_format": load_format,
            # A failing flush ends the server through 0.5.21; the cache was dropped before.
            "flush_cache": False,
            # Otherwise the draft model's runner opens the payload a second time.
            **self.release.target_only(),
        }
        try:
            self.post("/update_weights_from_tensor", body, timeout_s=timeout_s)
        except RequestError as error:
            raise SyncError(f"the engine refused a bucket: {error.message}", url=self.client.url) from error

    def receive(self, weights: Sequence[tuple[str, torch.Size, str]], *, group_name: str, timeout_s: float) -> None:
        """Have the engine receive these weights from rank 0 of an update group, in this order.

        Args:
            weights: Names, full shapes, and dtypes as torch spells them.
            group_name: From `init_weights_update_group`.
            timeout_s: In seconds.

        Raises:
            SyncError: The engine could not receive or load them.
            EngineDeadError, DeadlineError: The outcome is unknown.
        """
        body = {
            "names": [name for name, _, _ in weights],
            "shapes": [list(shape) for _, shape, _ in weights],
            "dtypes": [dtype for _, _, dtype in weights],
            "group_name": group_name,
            "flush_cache": False,
            **self.release.target_only("/update_weights_from_distributed"),
        }
        try:
            self.post("/update_weights_from_distributed", body, timeout_s=timeout_s)
        except RequestError as error:
            raise SyncError(
                f"the engine did not take the broadcast weights: {error.message}", url=self.client.url
            ) from error

    def set_weight_version(self, version: str, *, timeout_s: float, sent: Callable[[], None] | None = None) -> None:
        """Publish a weight version; arguments as `continue_generation`."""
        body = {"new_version": version, "abort_all_requests": False}  # it defaults to True
        self.post("/update_weight_version", body, timeout_s=timeout_s, sent=sent)

    def weight_version(self, *, timeout_s: float) -> Any:
        return self.client.get("/model_info", timeout_s=timeout_s).get("weight_version")

    def init_weights_update_group(self, *, timeout_s: float, **fields: Any) -> None:
        self.post("/init_weights_update_group", fields, timeout_s=timeout_s)

    def destroy_weights_update_group(self, *, timeout_s: float, **fields: Any) -> None:
        self.post("/destroy_weights_update_group", fields, timeout_s=timeout_s)

    # --- adapters ------------------------------------------------------------------------------------------------

    @property
    def lora_limits(self) -> LoraLimits | None:
        """The adapters that the server was started for; None if it was started without LoRA."""
        if not serves_adapters(self.info):
            return None
        modules = self.info.get("lora_target_modules")
        return LoraLimits(
            max_rank=self.info.get("max_lora_rank"),
            target_modules=None if modules is None else frozenset(modules),
            max_loaded=self.info.get("max_loaded_loras"),
        )

    @property
    def loras_at_start(self) -> frozenset[str]:
        """Names of the adapters that the server was started with (``lora_paths``)."""
        given = self.info.get("lora_paths")
        if isinstance(given, Mapping):
            return frozenset(map(str, given))
        names = [
            item.get("lora_name") if isinstance(item, Mapping) else str(item).partition("=")[0] for item in given or ()
        ]
        return frozenset(name for name in names if name)

    def load_lora(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        *,
        tp_size: int,
        timeout_s: float,
    ) -> None:
        """Load an adapter under a name that is free.

        Args:
            name: What requests put into ``lora_path``.
            tensors: PEFT's names -> full tensors on the CPU; they travel by value.
            config: The adapter's ``adapter_config.json``.
            tp_size: Number of payloads, where the release takes one per rank.
            timeout_s: In seconds.
        """
        payload = _by_value(dict(tensors))
        body: dict[str, Any] = {"lora_name": name, "config_dict": dict(config)}
        if self.release.lora_payload_per_rank:
            body["serialized_named_tensors"] = [payload] * tp_size  # by value: may be read by any number of ranks
        else:
            body["serialized_tensors"] = payload
        self.post("/load_lora_adapter_from_tensors", body, timeout_s=timeout_s)

    def unload_lora(self, name: str, *, missing_ok: bool = False, timeout_s: float) -> None:
        """Remove an adapter, once the requests that use it are done."""
        try:
            self.post("/unload_lora_adapter", {"lora_name": name}, timeout_s=timeout_s)
        except RequestError as error:
            if not (missing_ok and error.status == 400 and "does not exist" in error.message):
                raise


def serves_adapters(info: Mapping[str, Any]) -> bool:
    """Return whether a server was started for LoRA, by what it reports of itself; True if it does not report it.

    SGLang sets ``enable_lora`` where ``lora_paths`` are given, and ignores these where it is False.
    """
    return bool(info.get("enable_lora", True))


def _by_value(tensors: dict[str, torch.Tensor]) -> str:
    """Pickle a dict of CPU tensors with their contents: no handle, nothing to release."""
    buffer = io.BytesIO()
    pickle.Pickler(buffer, protocol=4).dump(tensors)
    return base64.b64encode(buffer.getvalue()).decode()


__all__ = ["LoraLimits", "ServerApi", "serves_adapters"]
