"""The engine as a training script holds it: `Engine` inside the job, `Client` for anybody who has its URL.

Composes the server's verbs, the weight sync and the slice's agreement.  Calls marked collective must be made by every
rank of the slice, in the same order; the owner acts, the others learn how it went.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tpcolocate.engine.client import ServerClient
from tpcolocate.engine.launch import ServerProcess
from tpcolocate.engine.state import State
from tpcolocate.engine.verbs import Verbs
from tpcolocate.errors import ConfigError, EngineStateError, RankLostError, TpColocateError
from tpcolocate.groups import RankGroup
from tpcolocate.report import SyncReport
from tpcolocate.weights.options import SyncOptions
from tpcolocate.weights.source import Rename, Source
from tpcolocate.weights.sync import WeightSync

logger = logging.getLogger(__name__)

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]

_HEALTH_TIMEOUT_S = 30.0
_AT_ONCE_S = 5.0
# SIGTERM, a bounded wait, SIGKILL: see ServerProcess.stop.
_SERVER_ENDS_S = 40.0
# Fields of /generate in every supported release; any other is looked up in the server's own description, because
# SGLang drops what it does not know without a word.
_KNOWN_FIELDS = frozenset(
    "text input_ids input_embeds image_data sampling_params rid return_logprob logprob_start_len top_logprobs_num "
    "token_ids_logprob return_text_in_logprobs stream lora_path return_hidden_states session_params".split()
)


class Health(StrEnum):
    """What `health` found."""

    STARTING = "starting"
    READY = "ready"
    ASLEEP = "asleep"
    DEAD = "dead"


class Client:
    """Generation on one SGLang server.  Thread-safe; nothing here is collective.

    Args:
        url: Base URL of the server.
        api_key: Its key.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.url = url
        self.api_key = api_key
        self._client = ServerClient(url, api_key=api_key)
        self._lock = threading.Lock()
        self._in_flight = 0
        self._described_fields: frozenset[str] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def close(self) -> None:
        """Close this side's connections; the server runs on."""
        self._client.close()

    def generate(
        self,
        prompts: Prompts | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        stream: bool = False,
        timeout_s: float = 600.0,
        **fields: Any,
    ) -> Any:
        """Generate on the slice's server; any rank, any time, any number at once.

        Args:
            prompts: Text, token ids, or a list of either.
            sampling_params: SGLang's; one for all prompts, or one each.
            stream: Return an iterator over SGLang's events instead of the finished answer.
            timeout_s: Longest wait for the answer (streaming: for the next event), in seconds.
            fields: Any other field of SGLang's ``/generate``, such as ``return_logprob=True`` or ``lora_path="name"``.

        Returns:
            SGLang's response dict; a list for a list of prompts, with ``n > 1`` all samples of the first prompt first.

        Raises:
            ConfigError: A field that this server does not know.
            EngineStateError: Asleep, or the weights are not the trainer's.
            RequestError: The server refused, in its own words.
            EngineDeadError, DeadlineError: The server is gone, or too slow.
        """
        body = self._body(prompts, sampling_params, fields, stream)
        if body is None:
            return iter(()) if stream else []
        if stream:
            return self._streaming(body, timeout_s)
        with self._counted():
            return self._client.post("/generate", body, timeout_s=timeout_s)

    async def generate_async(
        self,
        prompts: Prompts | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        stream: bool = False,
        timeout_s: float = 600.0,
        **fields: Any,
    ) -> Any:
        """`generate` for asyncio; with ``stream=True`` the awaited value is an asynchronous iterator."""
        body = self._body(prompts, sampling_params, fields, stream)
        if body is None:
            return _nothing() if stream else []
        if stream:
            return self._streaming_async(body, timeout_s)
        with self._counted():
            return await self._client.post_async("/generate", body, timeout_s=timeout_s)

    def _streaming(self, body: dict[str, Any], timeout_s: float) -> Iterator[Any]:
        with self._counted():
            yield from self._client.stream("/generate", body, timeout_s=timeout_s)

    async def _streaming_async(self, body: dict[str, Any], timeout_s: float) -> AsyncIterator[Any]:
        with self._counted():
            async for event in self._client.stream_async("/generate", body, timeout_s=timeout_s):
                yield event

    def _body(
        self, prompts: Prompts | None, sampling_params: Any, fields: dict[str, Any], stream: bool
    ) -> dict[str, Any] | None:
        self._check_generate()
        body = dict(fields)
        if prompts is not None:
            if "text" in body or "input_ids" in body:
                raise ConfigError("prompts are given twice", hint="pass prompts, or text=, or input_ids=")
            body["text" if _is_text(prompts) else "input_ids"] = prompts if isinstance(prompts, str) else list(prompts)
        given = body.get("text", body.get("input_ids"))
        if given is None and body.get("input_embeds") is None:
            raise ConfigError(
                "there is nothing to generate from", hint="pass prompts, or text=, input_ids= or input_embeds="
            )
        if given is not None and not isinstance(given, str) and len(given) == 0:
            return None
        unknown = set(body) - _KNOWN_FIELDS
        if unknown and (unknown := unknown - self._server_fields()):
            raise ConfigError(
                f"this server's /generate has no field {', '.join(sorted(unknown))}",
                hint="SGLang would ignore it without a word; sampling parameters go into sampling_params",
                url=self.url,
            )
        if sampling_params is not None:
            body["sampling_params"] = sampling_params
        if stream:
            body["stream"] = True
        return body

    def _server_fields(self) -> frozenset[str]:
        if self._described_fields is None:
            schemas = self._client.get("/openapi.json", timeout_s=_HEALTH_TIMEOUT_S)["components"]["schemas"]
            self._described_fields = frozenset(schemas["GenerateReqInput"]["properties"])
        return self._described_fields

    def _check_generate(self) -> None:
        """Overridden where the state of the engine is known."""

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1

    def health(self) -> Health:
        """``ready`` if the server answers, else ``dead``.

        Only that: whether it is asleep is known inside the job, and a token generated to find out would touch memory
        that a sleeping server has released.
        """
        return Health.READY if self._client.is_listening(timeout_s=_HEALTH_TIMEOUT_S) else Health.DEAD


class Engine(Client):
    """One rank's end of its slice's server; made by `Colocation.launch`.

    Args:
        group: The slice.
        owner_rank: Global rank that owns the server.
        url: Base URL.
        api_key: Random key of this launch.
        state: What the server was started with.
        sync: This rank's end of the weight syncs.
        verbs: Owner only.
        server: Owner only.
        on_shutdown: Called once, after the server is gone (owner) or let go (client).
        world: All ranks of the job, if there are several slices.
        sglang_version: As the server reports it.
    """

    def __init__(
        self,
        *,
        group: RankGroup,
        owner_rank: int,
        url: str,
        api_key: str,
        state: State,
        sync: WeightSync,
        world: RankGroup | None,
        verbs: Verbs | None,
        server: ServerProcess | None,
        on_shutdown: Callable[[], None],
        sglang_version: str,
    ) -> None:
        super().__init__(url, api_key=api_key)
        self.sglang_version = sglang_version
        self.weight_version = "default"
        self._group = group
        self._world = world
        self._owner_rank = owner_rank
        self._state = state
        self._sync = sync
        self._verbs = verbs
        self._server = server
        self._on_shutdown = on_shutdown
        self._num_syncs = 0
        self._before = state
        self._pid = os.getpid()

    # --- weights -----------------------------------------------------------------------------------------------

    def sync_weights(
        self,
        model_or_named_tensors: Source,
        *,
        weight_version: str | None = None,
        bucket_bytes: int = 512 * 2**20,
        payloads: str = "per_rank",
        transport: str = "auto",
        folder: str | os.PathLike[str] | None = None,
        rename: Rename | None = None,
        partial: bool = False,
        parts: bool | None = None,
        timeout_s: float = 600.0,
    ) -> SyncReport:
        """Make the server speak with these weights.

        Collective: over the slice; for sharded weights also over their mesh, and with several slices of tp_size > 1
        over all of them: call it on every training rank.

        Args:
            model_or_named_tensors: An `nn.Module` (plain, DDP, FSDP2, DTensor-parallel, peft), a state dict, or an
                iterable of (checkpoint name, full tensor or DTensor), in the same order on every rank.
            weight_version: Reported by the server with every sequence from then on; default: a count of the syncs.
            bucket_bytes: Most staging memory per rank, less where less is free; a larger tensor travels by itself.
            payloads: ``"per_rank"``: every rank exports from its own device.  ``"fan_out"``: the owner exports one
                copy per TP rank; for when other ranks cannot reach their TP rank's device.
            transport: ``"ipc"``: handles of memory that the engine maps.  ``"file"``: safetensors files.  ``"auto"``: the
                first sync proves with a small handle that the one works, or takes the other.  ``"stock"``: handles that
                SGLang opens by itself; nothing is read back, and a failure kills the server.
            folder: Where files go; default: /dev/shm.
            rename: A function or a mapping from the source's names to those of the served checkpoint; None for a
                weight that is not to be sent, such as a value head's.  The same on every rank.
            partial: Permit that weights are missing; they stay as they are.
            parts: Move only the parts of tensors that each TP worker reads, once the first sync has shown which, instead
                of full tensors.  Default: on a CPU; on GPUs it has to be asked for.
            timeout_s: For the whole sync, in seconds.

        Returns:
            What was done; see `SyncReport`.

        Raises:
            WeightsMismatchError: Names or shapes are not the served model's, or differ between ranks.  Nothing was sent,
                unless the source is a generator, which can only be checked as it comes.
            EngineStateError: The weights are released, or the engine is shut down.
            ConfigError: An option that does not exist, or not enough memory for the largest tensor.
            SyncError, RequestError, EngineDeadError, DeadlineError: The engine failed.  If that was after the first
                bucket had left, its weights are unknown: generation is refused until a full sync succeeds.
            RankFailedError: Another library's exception on some rank, such as an out-of-memory error in a gather.
            RankLostError: Another rank did not follow.
        """
        self._num_syncs += 1
        version = str(self._num_syncs) if weight_version is None else weight_version
        error: TpColocateError | None = None
        several = self._world is not None and len(self._world) > len(self._group)
        everybody = self._world if self._world is not None and several else self._group
        try:
            # All slices together: the gathers of sharded weights span them, and a slice that stays away would hang them.
            with everybody.together("check the state for a weight sync"):
                self._state.check_sync()
                options = SyncOptions(
                    bucket_bytes=bucket_bytes,
                    payloads=payloads,
                    transport=transport,
                    partial=partial,
                    folder=None if folder is None else Path(folder),
                    # Not yet measured on GPUs.
                    parts=self._sync.device.type == "cpu" if parts is None else parts,
                    rename=rename,
                )
            report = self._sync.run(
                model_or_named_tensors,
                version=version,
                options=options,
                timeout_s=timeout_s,
                touched=self._weights_touched,
            )
        except TpColocateError as caught:
            error = caught
        if everybody is not self._group and not isinstance(error, RankLostError):
            # A slice that failed must not leave the others to their next step.
            everybody.agree(error, what="finish the weight sync of all slices", timeout_s=timeout_s)
        if error is not None:
            raise error
        self._state = self._before.synced(partial=partial)
        self.weight_version = version
        return report

    def _weights_touched(self) -> None:
        self._before = self._state
        self._state = self._state.sync_failed()  # until it has succeeded

    # --- memory ------------------------------------------------------------------------------------------------

    def sleep(self, tags: Sequence[str] | None = None, *, timeout_s: float = 120.0) -> None:
        """Release the server's memory, by tag; what is released already stays so.

        Collective: over the slice; when it returns, the memory is free on every rank.

        Args:
            tags: Of ``kv_cache``, ``weights``, ``cuda_graph``; default all.
            timeout_s: How long to wait for the slice's ranks, and for requests from elsewhere, to finish.

        Raises:
            EngineStateError: A rank of the slice is still generating, or the server was launched without
                ``enable_memory_saver=True`` and would free nothing.
            ConfigError: An unknown tag.
            DeadlineError: Requests from elsewhere still run.
            RequestError, EngineDeadError: The server failed.
        """
        with self._group.together("get ready to sleep", timeout_s=timeout_s):
            chosen, after = self._state.sleeping(tags)
            if not self._state.frees_memory:
                raise EngineStateError(
                    "sleep() would free nothing: the server has no memory saver",
                    hint="launch(enable_memory_saver=True)",
                )
            if chosen and self._in_flight:
                raise EngineStateError(
                    f"cannot sleep: {self._in_flight} requests of rank {self._group.rank} are in flight",
                    hint="wait for them first",
                )

        def act() -> None:
            if chosen and self._verbs is not None:
                self._verbs.wait_idle(timeout_s=timeout_s)
                self._verbs.release_memory(chosen, timeout_s=timeout_s)

        self._sync.call_back(timeout_s=timeout_s)
        self._on_owner("sleep", act, timeout_s=timeout_s)
        self._state = after

    def wake(self, tags: Sequence[str] | None = None, *, timeout_s: float = 120.0) -> None:
        """Take the memory back, by tag; what is awake already stays so.

        Collective: over the slice.  After waking ``weights`` they hold garbage, unless the server was launched with
        ``enable_weights_cpu_backup=True``: generation is refused until the next sync.  Raises as `sleep`.
        """
        with self._group.together("get ready to wake", timeout_s=timeout_s):
            chosen, after = self._state.waking(tags)

        def act() -> None:
            if chosen and self._verbs is not None:
                self._verbs.resume_memory(chosen, timeout_s=timeout_s)

        self._sync.call_back(timeout_s=timeout_s)
        self._on_owner("wake", act, timeout_s=timeout_s)
        self._state = after

    # --- adapters and update groups ----------------------------------------------------------------------------

    def set_lora_from_tensors(
        self, name: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], *, timeout_s: float = 120.0
    ) -> None:
        """Load a LoRA adapter under a name, replacing one of that name.

        Collective: over the slice; only the owner's tensors are read.

        Args:
            name: For ``generate(..., lora_path=name)``.
            tensors: PEFT's names -> full tensors, on any device.
            config: PEFT's adapter configuration, as in ``adapter_config.json``.
            timeout_s: For the request, in seconds.

        Raises:
            ConfigError: The server was not launched with ``enable_lora=True``.
            RequestError: The server refused it.
        """
        self._on_owner(
            f"load LoRA adapter {name!r}",
            lambda: self._owned().load_lora(name, tensors, config, tp_size=len(self._group), timeout_s=timeout_s),
            timeout_s=timeout_s,
        )

    def unload_lora(self, name: str, *, timeout_s: float = 120.0) -> None:
        """Remove a LoRA adapter.  Collective: over the slice."""
        self._on_owner(
            f"unload LoRA adapter {name!r}",
            lambda: self._owned().unload_lora(name, timeout_s=timeout_s),
            timeout_s=timeout_s,
        )

    def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str = "weight_update_group",
        backend: str = "nccl",
        timeout_s: float = 300.0,
    ) -> None:
        """Have the server join a process group that weights will be broadcast over (SGLang's endpoint of that name).

        Collective: over the slice; the owner asks, the clients do nothing.  The server answers once the whole group has
        met, so rank 0 of that group must join it at the same time, from another thread or process.
        """
        fields = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        self._on_owner(
            f"join update group {group_name!r}",
            lambda: self._owned().init_weights_update_group(timeout_s=timeout_s, **fields),
            timeout_s=timeout_s,
        )

    def destroy_weights_update_group(self, *, group_name: str = "weight_update_group", timeout_s: float = 60.0) -> None:
        """Have the server leave it again.  Collective: over the slice; the owner asks, the clients do nothing."""
        self._on_owner(
            f"leave update group {group_name!r}",
            lambda: self._owned().destroy_weights_update_group(timeout_s=timeout_s, group_name=group_name),
            timeout_s=timeout_s,
        )

    # --- life --------------------------------------------------------------------------------------------------

    def health(self) -> Health:
        """``starting``, ``ready``, ``asleep`` or ``dead``, on any rank; asleep is told from dead without a forward."""
        if self._state.closed or (self._server is not None and self._server.exited()):
            return Health.DEAD
        if self._state.asleep:
            return Health.ASLEEP if self._client.is_listening(timeout_s=_HEALTH_TIMEOUT_S) else Health.DEAD
        asked = time.monotonic()
        if self._client.is_healthy(timeout_s=_HEALTH_TIMEOUT_S):
            return Health.READY
        # SGLang refuses at once while it warms up, and after 20 s without a token; gone, it does not answer at all.
        at_once = time.monotonic() - asked < _AT_ONCE_S
        return Health.STARTING if at_once and self._client.is_listening(timeout_s=_AT_ONCE_S) else Health.DEAD

    def shutdown(self, *, wait: bool = True, timeout_s: float = 60.0) -> None:
        """End the server, all of it, and take back what it left in /dev/shm.  Idempotent.

        Collective: over the slice with ``wait=True``: the owner ends the server once every rank is here, so that no
        rank's request is cut off.

        Args:
            wait: False ends it at once, for when other ranks may not come.
            timeout_s: How long to wait for the others; the server is ended anyway.

        Raises:
            EngineError: The end of the server could not be confirmed; the message names its pid.
        """
        # A fork of the trainer (a data loader worker) inherits this object, not the engine.
        if self._state.closed or os.getpid() != self._pid:
            return
        self._state = self._state.shut_down()
        wait = wait and self._came("shut the engine down", timeout_s)
        try:
            if self._server is not None:
                self._server.stop()
        finally:
            if wait:
                # Not before the server is gone: a counter that is set right while somebody still reads would drop below
                # zero when that reader lets go.
                self._came("end the server", timeout_s + _SERVER_ENDS_S)
            self.close()
            lost = self._sync.close(timeout_s=0.0 if self._server is not None else _SERVER_ENDS_S)
            if lost:
                logger.warning("reclaimed handles that the engine never gave back: %s", "; ".join(map(str, lost)))
            self._on_shutdown()

    def _came(self, what: str, timeout_s: float) -> bool:
        """Wait for the other ranks; False if one of them does not come."""
        try:
            self._group.all_gather(None, what=what, timeout_s=timeout_s)
            return True
        except RankLostError as error:
            logger.warning("shutting down without the others: %s", error)
            return False

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(wait=error is None)

    # --- inside ------------------------------------------------------------------------------------------------

    def _check_generate(self) -> None:
        self._state.check_generate()

    def _owned(self) -> Verbs:
        assert self._verbs is not None
        return self._verbs

    def _on_owner(self, what: str, action: Callable[[], None], *, timeout_s: float) -> None:
        """The owner acts; every rank returns or raises as it does."""
        self._state.check_open(what)
        self._group.run_on(self._owner_rank, action, what=what, timeout_s=timeout_s + self._group.timeout_s)


def _is_text(prompts: Prompts) -> bool:
    if isinstance(prompts, str):
        return True
    return len(prompts) > 0 and isinstance(prompts[0], str)


async def _nothing() -> AsyncIterator[Any]:
    return
    yield


__all__ = ["Client", "Engine", "Health"]
