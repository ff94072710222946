"""SGLang's endpoints as methods: the fields each release takes, and what an answer means."""

from __future__ import annotations

import base64
import io
import pickle
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tpcolocate import ipc_payload
from tpcolocate.engine.channel import Channel
from tpcolocate.engine.client import ServerClient
from tpcolocate.engine.releases import Release, check_draft_model, release
from tpcolocate.errors import ConfigError, DeadlineError, RequestError, SyncError
from tpcolocate.groups import this_process

_IDLE_POLL_S = 0.05
# From the moment at which the workers leave a sync by themselves to SGLang's answer.
_ANSWER_S = 10.0


class Verbs:
    """The verbs of one running server.  Blocking; every call has a deadline.

    Args:
        client: Connected to it.
    """

    def __init__(self, client: ServerClient) -> None:
        self.client = client
        self.info: dict[str, Any] = client.get("/server_info", timeout_s=30.0)
        self.release: Release = release(str(self.info["version"]))
        check_draft_model(
            f"SGLang {self.release.version}", self.info.get("speculative_algorithm"), self.release.target_only()
        )
        client.check = self.release.check  # nothing that this release would drop is sent

    # --- weights -----------------------------------------------------------------------------------------------

    def begin_sync(self, *, timeout_s: float) -> None:
        """Hold generation and open what the release needs opened.

        Requests in flight are retracted: they keep the tokens they have and go on after the sync, with the new weights.
        """
        self.client.post("/pause_generation", {"mode": "retract"}, timeout_s=timeout_s)
        if self.release.weight_session:
            # A sync that failed half-way left its session open.
            try:
                self._done(self.client.post("/begin_weight_update", {"selector": "target"}, timeout_s=timeout_s))
            except RequestError as error:
                if "already open" not in error.message:
                    raise
                self._done(self.client.post("/end_weight_update", {}, timeout_s=timeout_s))
                self._done(self.client.post("/begin_weight_update", {"selector": "target"}, timeout_s=timeout_s))

    def cancel_sync(self, *, timeout_s: float) -> None:
        """Undo `begin_sync` while nothing was sent yet: the engine goes on with the weights it has."""
        if self.release.weight_session:
            self._done(self.client.post("/end_weight_update", {}, timeout_s=timeout_s))
        self.client.post("/continue_generation", {}, timeout_s=timeout_s)

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
            # A failing flush kills the server through 0.5.21; it is done once, afterwards.
            "flush_cache": False,
            # Otherwise the draft model's runner opens the payload a second time.
            **self.release.target_only(),
        }
        try:
            self._done(self.client.post("/update_weights_from_tensor", body, timeout_s=timeout_s))
        except RequestError as error:
            raise SyncError(f"the engine refused a bucket: {error.message}", url=self.client.url) from error

    def open_workers(self, path: Path, session: str, *, loader: str, tp_size: int, timeout_s: float) -> Channel:
        """Reach our receiver in every TP worker, by one request that lasts as long as the sync.

        Args:
            path: Where the socket is to be, in a folder of this user alone.
            session: A name that was never used before.
            loader: Dotted name of the receiver.
            tp_size: Number of workers.
            timeout_s: For the whole sync, in seconds; the workers leave by themselves after it.
        """
        pid, started = this_process()
        payloads = [
            ipc_payload.command(
                {
                    "session": session,
                    "endpoint": f"ipc://{path}",
                    "peer": [pid, started],
                    "for": tp_rank,
                    "tp_rank": tp_rank,
                    "tp_size": tp_size,
                    "timeout_s": timeout_s,
                }
            )
            for tp_rank in range(tp_size)
        ]
        return Channel(
            path,
            tp_size=tp_size,
            request=lambda: self.push(payloads, load_format=loader, timeout_s=timeout_s + _ANSWER_S),
        )

    def end_sync(self, version: str, *, timeout_s: float) -> None:
        """Close the session, drop the cache of the old weights, publish the version, let generation go on."""
        deadline = time.monotonic() + timeout_s
        if self.release.weight_session:
            self._done(self.client.post("/end_weight_update", {}, timeout_s=timeout_s))
        self.client.post("/flush_cache", timeout_s=max(deadline - time.monotonic(), 1.0))
        # abort_all_requests defaults to True
        body = {"new_version": version, "abort_all_requests": False}
        self._done(self.client.post("/update_weight_version", body, timeout_s=max(deadline - time.monotonic(), 1.0)))
        self.client.post("/continue_generation", {}, timeout_s=max(deadline - time.monotonic(), 1.0))
        reported = self.client.get("/model_info", timeout_s=max(deadline - time.monotonic(), 1.0)).get("weight_version")
        if reported != version:
            raise SyncError(
                f"the engine reports weight version {reported!r} after {version!r} was set", url=self.client.url
            )

    # --- memory ------------------------------------------------------------------------------------------------

    def wait_idle(self, *, timeout_s: float) -> None:
        """Wait until no request runs; releasing memory under a running one kills the server.

        Raises:
            DeadlineError: Requests still run.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.client.post("/flush_cache", timeout_s=max(deadline - time.monotonic(), 1.0))
                return
            except RequestError as error:
                if error.status != 400:
                    raise
                if time.monotonic() >= deadline:
                    raise DeadlineError(
                        f"requests still run after {timeout_s:g} s: {error.message}",
                        hint="finish or abort generation before sleep()",
                        url=self.client.url,
                    ) from error
            time.sleep(_IDLE_POLL_S)

    def release_memory(self, tags: Sequence[str], *, timeout_s: float) -> None:
        self.client.post("/release_memory_occupation", {"tags": list(tags)}, timeout_s=timeout_s)

    def resume_memory(self, tags: Sequence[str], *, timeout_s: float) -> None:
        self.client.post("/resume_memory_occupation", {"tags": list(tags)}, timeout_s=timeout_s)

    # --- adapters and update groups ----------------------------------------------------------------------------

    def load_lora(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        *,
        tp_size: int,
        timeout_s: float,
    ) -> None:
        """Load an adapter from full tensors, replacing one of that name.

        Args:
            name: What requests put into ``lora_path``.
            tensors: PEFT names -> full tensors; they travel by value.
            config: The adapter's ``adapter_config.json``.
            tp_size: Number of payloads, where the release takes one per rank.
        """
        if not self.info.get("enable_lora"):
            raise ConfigError(
                "the server was not started for LoRA",
                hint="launch(enable_lora=True, max_lora_rank=..., lora_target_modules=[...])",
            )
        self.unload_lora(name, missing_ok=True, timeout_s=timeout_s)
        payload = _by_value({key: tensor.detach().cpu() for key, tensor in tensors.items()})
        body: dict[str, Any] = {"lora_name": name, "config_dict": dict(config)}
        if self.release.lora_payload_per_rank:
            body["serialized_named_tensors"] = [payload] * tp_size  # by value: may be read by any number of ranks
        else:
            body["serialized_tensors"] = payload
        self._done(self.client.post("/load_lora_adapter_from_tensors", body, timeout_s=timeout_s))

    def unload_lora(self, name: str, *, missing_ok: bool = False, timeout_s: float) -> None:
        try:
            self._done(self.client.post("/unload_lora_adapter", {"lora_name": name}, timeout_s=timeout_s))
        except RequestError as error:
            if not (missing_ok and error.status == 400 and "does not exist" in error.message):
                raise

    def init_weights_update_group(self, *, timeout_s: float, **fields: Any) -> None:
        self._done(self.client.post("/init_weights_update_group", fields, timeout_s=timeout_s))

    def destroy_weights_update_group(self, *, timeout_s: float, **fields: Any) -> None:
        self._done(self.client.post("/destroy_weights_update_group", fields, timeout_s=timeout_s))

    @staticmethod
    def _done(answer: Any) -> None:
        """Some failures come with status 200 and say so in the body only."""
        if isinstance(answer, dict) and answer.get("success") is False:
            raise RequestError(str(answer.get("message") or answer.get("error_message") or answer), status=200)


def _by_value(tensors: dict[str, torch.Tensor]) -> str:
    """Plain pickle of a dict of CPU tensors, contents included; no handle, nothing to give back."""
    buffer = io.BytesIO()
    pickle.Pickler(buffer, protocol=4).dump(tensors)
    return base64.b64encode(buffer.getvalue()).decode()


__all__ = ["Verbs"]
