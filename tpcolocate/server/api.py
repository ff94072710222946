"""SGLang's endpoints as methods: the fields each release takes, and what an answer means."""

from __future__ import annotations

import base64
import io
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from tpcolocate import ipc_payload
from tpcolocate.errors import (
    DeadlineError,
    EngineDeadError,
    EngineStateError,
    RequestError,
    SyncError,
    TpColocateError,
)
from tpcolocate.in_server.tpcolocate_receiver.protocol import OpenSession, to_json
from tpcolocate.parallel import begun_in_background, beside
from tpcolocate.processes import this_process
from tpcolocate.server.channel import Channel
from tpcolocate.server.http import ServerClient
from tpcolocate.server.releases import Release, check_draft_model, release

_IDLE_POLL_S = 0.05
# From the moment at which the workers leave a sync by themselves to SGLang's answer.
_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class LoraLimits:
    """What adapters a server was started for.

    Attributes:
        max_rank: Largest rank; None if the server does not say.
        target_modules: As passed to SGLang (``q_proj``, or ``all``); None if the server does not say.
        max_loaded: Most adapters at a time; SGLang throws the least recently used one out for one more.
    """

    max_rank: int | None = None
    target_modules: frozenset[str] | None = None
    max_loaded: int | None = None


class Leaving(Protocol):
    """What ends when a sync does: a `Channel`."""

    def dismiss(self) -> None: ...
    def finish(self) -> None: ...


class ServerApi:
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
        self.paused: str | None = None
        """How the user has paused generation; a sync then leaves it so."""
        self.cache_is_stale = False
        """Whether a sync had to leave cache entries of older weights in place."""
        self.weights_unknown = False
        """Whether the weights are not the trainer's, or not all of them; requests that wait must not go on then."""
        self.asleep: set[str] = set()
        """Tags whose memory is released."""
        self.resting = False
        """Whether generation is held because of it."""
        self._session_open = False

    # --- weights -----------------------------------------------------------------------------------------------

    def begin_sync(self, *, timeout_s: float) -> None:
        """`hold_generation`, until the cache is dropped; undone if it fails, as far as the server answers.

        Raises:
            EngineStateError: This release keeps the cache while retracted requests wait (through 0.5.20).
        """
        deadline = time.monotonic() + timeout_s
        try:
            self.hold_generation(timeout_s=timeout_s).result()
        except TpColocateError as error:
            if not isinstance(error, (EngineDeadError, DeadlineError)):
                self.cancel_sync(timeout_s=_left(deadline))
            raise

    def hold_generation(self, *, timeout_s: float) -> Future[None]:
        """Hold generation, begin to drop the cache of the old weights, and open what the release needs opened.

        Unless the user has paused already, requests in flight are retracted: they keep the tokens they have and go on
        after the sync, with the new weights.  The cache is dropped here and not at the end, because nothing enters it
        meanwhile, and because a release that cannot do so must say it while the weights are still what they were.

        `cancel_sync` undoes it, whatever this or the future raises.

        Returns:
            Done once the cache is dropped; raises as `begin_sync`.  No weight may change before.  An update may be asked
            for: SGLang takes up the one request after the other, and has been sent this one.  If it takes up the update
            first all the same, it drops the cache once that is over.
        """
        deadline = time.monotonic() + timeout_s
        if self.paused is None and not self.resting:
            # Answered before anything else is asked for: while it does not know of a pause, SGLang keeps an update
            # waiting for the requests in flight.
            self.client.post("/pause_generation", {"mode": "retract"}, timeout_s=timeout_s)
        dropped = begun_in_background(
            lambda begun: self._drop_old_cache(begun, timeout_s=_left(deadline)), name="tpcolocate flush"
        )
        if self.release.weight_session:
            self._open_session(timeout_s=_left(deadline))
        return dropped

    def _drop_old_cache(self, sent: Callable[[], None], *, timeout_s: float) -> None:
        self.cache_is_stale = not self._drop_cache(timeout_s=timeout_s, sent=sent)
        if self.cache_is_stale and self.paused != "in_place":
            raise EngineStateError(
                f"cannot sync weights: SGLang {self.release.version} keeps the cache of the old ones while requests wait",
                hint='wait for the requests in flight, or pause_generation(mode="abort") first',
                url=self.client.url,
            )

    def _go_on(self, *, timeout_s: float, proven: bool = False, sent: Callable[[], None] | None = None) -> None:
        """End a pause, unless it is the user's, memory is released, or the weights are half of one kind.

        Args:
            timeout_s: In seconds.
            proven: The weights are known to be the trainer's by now.
            sent: Called once that was asked for.
        """
        if self.paused is None and not self.asleep and (proven or not self.weights_unknown):
            self.client.post("/continue_generation", {}, timeout_s=timeout_s, sent=sent)
            self.resting = False

    def _open_session(self, *, timeout_s: float) -> None:
        # A sync that failed half-way left its session open.
        try:
            self._done(self.client.post("/begin_weight_update", {"selector": "target"}, timeout_s=timeout_s))
        except RequestError as error:
            if "already open" not in error.message:
                raise
            self._done(self.client.post("/end_weight_update", {}, timeout_s=timeout_s))
            self._done(self.client.post("/begin_weight_update", {"selector": "target"}, timeout_s=timeout_s))
        self._session_open = True

    def _close_session(self, *, timeout_s: float) -> None:
        if self._session_open:
            self._session_open = False
            self._done(self.client.post("/end_weight_update", {}, timeout_s=timeout_s))

    def cancel_sync(self, *, timeout_s: float) -> None:
        """Undo `hold_generation` while nothing was sent yet: the engine goes on with the weights it has."""
        self._close_session(timeout_s=timeout_s)
        self._go_on(timeout_s=timeout_s)

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

    def receive(self, weights: Sequence[tuple[str, torch.Size, str]], *, group_name: str, timeout_s: float) -> None:
        """Have the engine take these weights from rank 0 of an update group, in this order.

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
            self._done(self.client.post("/update_weights_from_distributed", body, timeout_s=timeout_s))
        except RequestError as error:
            raise SyncError(
                f"the engine did not take the broadcast weights: {error.message}", url=self.client.url
            ) from error

    def await_workers(self, path: Path, *, tp_size: int) -> Channel:
        """Be where the workers will connect to; nothing is asked of SGLang yet.

        Args:
            path: Where the socket is to be, in a folder of this user alone.
            tp_size: Number of workers.
        """
        return Channel(path, tp_size=tp_size)

    def call_workers(self, workers: Channel, session: str, *, loader: str, tp_size: int, timeout_s: float) -> None:
        """Reach our receiver in every TP worker, by one request that lasts as long as the sync.

        Args:
            workers: From `await_workers`.
            session: A name that was never used before.
            loader: Dotted name of the receiver.
            tp_size: Number of workers.
            timeout_s: For the whole sync, in seconds; the workers leave by themselves after it.
        """
        payloads = [
            ipc_payload.command(
                to_json(OpenSession(session, workers.endpoint, this_process(), tp_rank, tp_size, timeout_s))
            )
            for tp_rank in range(tp_size)
        ]
        workers.call(lambda: self.push(payloads, load_format=loader, timeout_s=timeout_s + _ANSWER_S))

    def end_sync(self, version: str, *, workers: Leaving | None = None, timeout_s: float) -> None:
        """Let the workers go, publish the version, and let generation go on unless the user has paused it.

        Requests that do not need each other are made at once: every one costs a millisecond or two.

        Args:
            version: Of the weights, all of which are proven to be there.
            workers: Of `await_workers`, if this sync has them.
            timeout_s: In seconds.
        """
        deadline = time.monotonic() + timeout_s

        def publish(sent: Callable[[], None]) -> None:
            # abort_all_requests defaults to True
            body = {"new_version": version, "abort_all_requests": False}
            self._done(self.client.post("/update_weight_version", body, timeout_s=_left(deadline), sent=sent))

        def confirm() -> None:
            if (reported := self._version(deadline)) != version:
                published.result()  # it may have been asked before that was carried out
                reported = self._version(deadline)
            if reported != version:
                raise SyncError(
                    f"the engine reports weight version {reported!r} after {version!r} was set", url=self.client.url
                )

        def go_on(sent: Callable[[], None]) -> None:
            self._go_on(timeout_s=_left(deadline), proven=True, sent=sent)

        if workers is not None:
            workers.dismiss()
        # SGLang takes up one request after the other: each may be asked for when the one before it has left.
        published = begun_in_background(publish, name="tpcolocate version")
        if self._session_open:  # nothing may be generated before it is closed
            if workers is not None:
                workers.finish()
            self._close_session(timeout_s=_left(deadline))
        going = begun_in_background(go_on, name="tpcolocate go on")
        beside([going, published], confirm)
        if workers is not None:
            workers.finish()

    def _version(self, deadline: float) -> Any:
        return self.client.get("/model_info", timeout_s=_left(deadline)).get("weight_version")

    # --- generation --------------------------------------------------------------------------------------------

    def pause_generation(self, mode: str, *, timeout_s: float) -> None:
        """Hold generation; with ``abort`` the server answers once no request is left."""
        self.client.post("/pause_generation", {"mode": mode}, timeout_s=timeout_s)
        self.paused = mode

    def continue_generation(self, *, timeout_s: float) -> None:
        if self.paused is not None:
            self.client.post("/continue_generation", {}, timeout_s=timeout_s)
            self.paused, self.resting = None, False

    def flush_cache(self, *, timeout_s: float) -> None:
        """Drop the prefix cache.

        Raises:
            EngineStateError: Requests are in flight.
        """
        if not self._drop_cache(timeout_s=timeout_s):
            raise EngineStateError(
                "cannot flush the cache: requests are in flight",
                hint="wait for them, or abort_request() and try again",
                url=self.client.url,
            )
        self.cache_is_stale = False

    def _drop_cache(self, *, timeout_s: float, sent: Callable[[], None] | None = None) -> bool:
        """False if the server refuses, because requests need what is in it."""
        try:
            self.client.post("/flush_cache", timeout_s=timeout_s, sent=sent)
        except RequestError as error:
            if error.status != 400:
                raise
            return False
        return True

    # --- memory ------------------------------------------------------------------------------------------------

    def fall_asleep(self, tags: Sequence[str], *, timeout_s: float) -> None:
        """Release memory once no request runs; those that come from now on wait in the server until it is awake.

        Raises:
            DeadlineError: Requests still run.
        """
        deadline = time.monotonic() + timeout_s
        self._wait_idle(deadline, timeout_s)
        if self.paused is None and not self.resting:
            # With ``abort`` new requests wait where they are taken in, and the scheduler is idle as before.  One that has come
            # since it was idle ends early: to release memory under it would end the server.
            self.client.post("/pause_generation", {"mode": "abort"}, timeout_s=_left(deadline))
            self.resting = True
        try:
            self.client.post("/release_memory_occupation", {"tags": list(tags)}, timeout_s=_left(deadline))
        except RequestError:
            if self.resting:
                self._go_on(timeout_s=_left(deadline))
            raise
        self.asleep |= set(tags)

    def wake_up(self, tags: Sequence[str], *, weights_lost: bool, timeout_s: float) -> None:
        """Resume memory; once all is awake, and unless the weights are lost, requests that waited are taken up.

        Args:
            tags: What to resume.
            weights_lost: Whether the weights hold anything but the trainer's then; a sync lets generation go on.
            timeout_s: In seconds.
        """
        deadline = time.monotonic() + timeout_s
        self.client.post("/resume_memory_occupation", {"tags": list(tags)}, timeout_s=timeout_s)
        self.asleep -= set(tags)
        self.weights_unknown = weights_lost
        if self.resting:
            self._go_on(timeout_s=_left(deadline))

    def _wait_idle(self, deadline: float, timeout_s: float) -> None:
        while not self._drop_cache(timeout_s=_left(deadline)):
            if time.monotonic() >= deadline:
                raise DeadlineError(
                    f"requests still run after {timeout_s:g} s",
                    hint="finish or abort generation before sleep()",
                    url=self.client.url,
                )
            time.sleep(_IDLE_POLL_S)
        self.cache_is_stale = False

    # --- adapters and update groups ----------------------------------------------------------------------------

    @property
    def lora_limits(self) -> LoraLimits | None:
        """What adapters the server was started for; None if it was not started for any."""
        if not self.info.get("enable_lora"):
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
        self._done(self.client.post("/load_lora_adapter_from_tensors", body, timeout_s=timeout_s))

    def unload_lora(self, name: str, *, missing_ok: bool = False, timeout_s: float) -> None:
        """Remove an adapter, once the requests that use it are done."""
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


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 1.0)


def _by_value(tensors: dict[str, torch.Tensor]) -> str:
    """Plain pickle of a dict of CPU tensors, contents included; no handle, nothing to give back."""
    buffer = io.BytesIO()
    pickle.Pickler(buffer, protocol=4).dump(tensors)
    return base64.b64encode(buffer.getvalue()).decode()


__all__ = ["ServerApi"]
