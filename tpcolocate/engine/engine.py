"""The engine as a training script uses it: one rank's end of its slice's server.

Composed of a `Client`, the weight sync, and a part each for pauses, adapters, update groups and memory, which share a
`SliceContext`.  Calls marked collective must be made by every rank of the slice, in the same order; the owner talks to
the server, and every rank returns or raises as it does.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from tpcolocate.checks import check_flag, check_path, check_version
from tpcolocate.deadline import check_timeout
from tpcolocate.engine.adapters import LoraAdapters
from tpcolocate.engine.checkpoints import save_checkpoint
from tpcolocate.engine.client import HEALTH_TIMEOUT_S, Health, Prompts, SamplingParams
from tpcolocate.engine.context import ServerLink, SliceContext
from tpcolocate.engine.generation import GenerationControl
from tpcolocate.engine.life import EngineLife
from tpcolocate.engine.memory import ServerMemory
from tpcolocate.engine.update_groups import UpdateGroups
from tpcolocate.errors import ConfigError, noted_on
from tpcolocate.processes import OfOneProcess
from tpcolocate.report import SyncReport
from tpcolocate.server.http import ServerClient
from tpcolocate.server.lifecycle import Life, State, can_answer
from tpcolocate.server.model_folder import check_model_path
from tpcolocate.weights import update_group
from tpcolocate.weights.lora import make_adapter
from tpcolocate.weights.sources.checkpoint import Checkpoint
from tpcolocate.weights.sources.named_weights import Rename, Source
from tpcolocate.weights.sync.options import SyncOptions
from tpcolocate.weights.sync.syncer import WeightSyncer
from tpcolocate.weights.transport.mesh import groups_of_tensors
from tpcolocate.weights.update_group import UpdateGroup

_AT_ONCE_S = 5.0
P = ParamSpec("P")
T = TypeVar("T")
Call = Callable[Concatenate["Engine", P], T]


def _collective(what: str, *, restarts: bool = True) -> Callable[[Call[P, T]], Call[P, T]]:
    """Make a method a collective call that one thread at a time makes.

    Args:
        what: Name of the call.
        restarts: Whether a dead server is replaced before it, as `launch(restart=...)` has it.
    """

    def decorated(method: Call[P, T]) -> Call[P, T]:
        @functools.wraps(method)
        def call(engine: Engine, /, *args: P.args, **kwargs: P.kwargs) -> T:
            with engine._context.calling(what):
                if restarts and engine._life.must_restart(what):
                    engine.restart()
                return method(engine, *args, **kwargs)

        return call

    return decorated


class Engine(OfOneProcess):
    """One rank's end of its slice's server; made by `Colocation.launch`.

    Args:
        context: This rank's view of the server.
        model_path: What the server was started with.
        on_shutdown: Called once, after the server is gone (owner) or its connections are closed (client).
        relaunch: Starts another server like the first, on all ranks; see `restart`.
        restarts: How often the engine restarts by itself.

    Attributes:
        url: Base URL of the server; another one after a restart.
        api_key: Random key of its launch; likewise.
        sglang_version: As the server reports it.
        model_path: What the server was started with.
        weight_version: As the server reports it: of the last sync, or what it was started with.
    """

    def __init__(
        self,
        context: SliceContext,
        *,
        model_path: str,
        on_shutdown: Callable[[], None],
        relaunch: Callable[[], tuple[ServerLink, State]],
        restarts: int = 0,
    ) -> None:
        self.model_path = model_path
        self._context = context
        self._lifecycle = context.lifecycle
        self._generation = GenerationControl(context)
        self._adapters = LoraAdapters(context)
        self._update_groups = UpdateGroups(context)
        self._memory = ServerMemory(context)
        self._life = EngineLife(context, on_shutdown=on_shutdown, relaunch=relaunch, restarts=restarts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @property
    def url(self) -> str:
        return self._context.client.url

    @property
    def api_key(self) -> str | None:
        return self._context.client.api_key

    @property
    def sglang_version(self) -> str:
        return self._context.server.sglang_version

    @property
    def weight_version(self) -> str:
        return self._lifecycle.weight_version

    @property
    def _client(self) -> ServerClient:
        return self._context.client.http

    @property
    def _sync(self) -> WeightSyncer:
        return self._context.sync

    # --- generation ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompts | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        on_error: str = "raise",
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Any:
        """Generate on the slice's server; any rank, any time, any number at once.

        What would end the server, hang, or be ignored by it is refused before anything is sent.

        Args:
            prompts: A text, token ids, or a list of either.  Token ids may be tensors or arrays of integers, of shape
                (tokens,) or (prompts, tokens), on any device; a tokenizer's output is taken without its padding.
            sampling_params: SGLang's; one for all prompts, or one each.
            stream: Return an iterator over SGLang's events instead of the finished answer.
            on_error: ``"raise"``: one bad prompt is the error of the call.  ``"return"``: each prompt is a request of its
                own, and its error takes the place of its answer: compare with ``isinstance(answer, TpColocateError)``.
            timeout_s: Longest wait for the answer (streaming: for the next event), in seconds, a wait for one of this
                process's connections included.  Default: as long as the server is up.
            fields: Any other field of SGLang's ``/generate``, such as ``return_logprob=True`` or ``lora_path="name"``; a
                list has one value per prompt.

        Returns:
            SGLang's response dict; a list for a list of prompts, with ``n > 1`` all samples of the first prompt first.

        Raises:
            ConfigError: A prompt, a sampling parameter or a field that SGLang has not, or that it would not survive.
                Or this process has no file descriptor left.
            EngineStateError: Asleep, or the weights are not the trainer's.
            RequestError: The server refused, and the message is its own; or it closed the connection and is up.
            EngineDeadError, DeadlineError: The server is gone, or too slow.
        """
        return self._context.client.generate(
            prompts, sampling_params, stream=stream, on_error=on_error, timeout_s=timeout_s, **fields
        )

    async def generate_async(
        self,
        prompts: Prompts | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        on_error: str = "raise",
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Any:
        """`generate` for asyncio; with ``stream=True`` the awaited value is an asynchronous iterator."""
        return await self._context.client.generate_async(
            prompts, sampling_params, stream=stream, on_error=on_error, timeout_s=timeout_s, **fields
        )

    @_collective("pause generation")
    def pause_generation(self, mode: str = "retract", *, timeout_s: float = 120.0) -> None:
        """Hold generation until `continue_generation`; a sync in between leaves it held.

        New requests wait in the server.  Pausing again in the same mode does nothing.

        Collective: over the slice.

        Args:
            mode: What becomes of running requests.  ``"retract"``: they keep their tokens, give up their cache, and
                compute it anew when they go on.  ``"in_place"``: they keep both, and go on with a cache of the old
                weights after a sync.  ``"abort"``: they end with the tokens they have; the call returns once all have.
            timeout_s: For the request, in seconds.

        Raises:
            ConfigError: An unknown mode.
            EngineStateError: Paused in another mode, or the engine is shut down.
            RequestError, EngineDeadError, DeadlineError: The server failed.
        """
        self._generation.pause(mode, timeout_s=timeout_s)

    @_collective("continue generation")
    def continue_generation(self, *, timeout_s: float = 60.0) -> None:
        """Let generation go on after `pause_generation`; does nothing if it was not paused.

        Collective: over the slice.

        Raises:
            EngineStateError: Asleep, or the weights are not the trainer's.
            RequestError, EngineDeadError, DeadlineError: The server failed.
        """
        self._generation.go_on(timeout_s=timeout_s)

    def abort_request(self, rid: str | None = None, *, timeout_s: float = 30.0) -> None:
        """End requests early; they answer with the tokens they have and the finish reason ``abort``.

        Not collective.  The call does not wait for them: they end a little later.

        Args:
            rid: As passed to `generate`; SGLang takes it as a prefix.  Default: all requests of the server, those of
                other ranks too.
            timeout_s: For the request, in seconds.

        Raises:
            ConfigError: An empty `rid`.
            RequestError, EngineDeadError, DeadlineError: The server failed.
        """
        self._generation.abort(rid, timeout_s=timeout_s)

    @_collective("flush the cache")
    def flush_cache(self, *, timeout_s: float = 60.0) -> None:
        """Drop the prefix cache.

        Collective: over the slice.

        Raises:
            EngineStateError: Requests are in flight, or the cache's memory is released.
            RequestError, EngineDeadError, DeadlineError: The server failed.
        """
        self._generation.flush_cache(timeout_s=timeout_s)

    # --- weights ---------------------------------------------------------------------------------------------------

    @_collective("sync weights")
    def sync_weights(
        self,
        model_or_named_tensors: Source,
        *,
        weight_version: str | int | None = None,
        bucket_bytes: int = 512 * 2**20,
        payloads: str = "per_rank",
        transport: str = "auto",
        folder: str | os.PathLike[str] | None = None,
        rename: Rename | None = None,
        partial: bool = False,
        parts: bool = True,
        nonfinite: str = "warn",
        timeout_s: float = 600.0,
    ) -> SyncReport:
        """Update the server's weights in place.

        Collective: over the slice; for sharded weights also over their mesh, and with several slices of tp_size > 1
        over all of them: call it on every training rank.

        Args:
            model_or_named_tensors: An `nn.Module` (plain, DDP, FSDP2, DTensor-parallel, peft), a state dict, or an
                iterable of (checkpoint name, full tensor or DTensor), in the same order on every rank.
            weight_version: Reported by the server with every sequence from then on, as a string of at most 1024 characters;
                default: that of a `Checkpoint`, else a count of the syncs, which goes on from a version that is a number.
                A sync that is refused does not count.
            bucket_bytes: Most staging memory per rank, less where less is free; a larger tensor travels by itself.
            payloads: ``"per_rank"``: every rank exports from its own device.  ``"fan_out"``: the owner exports one
                copy per TP rank; for when other ranks cannot reach their TP rank's device.
            transport: ``"ipc"``: handles of memory that the engine maps.  ``"file"``: safetensors files.  ``"auto"``: the
                first sync tries ``"ipc"`` with a small handle, and takes files if it does not work.
            folder: Where files go; default: /dev/shm.
            rename: A function or a mapping from the source's names to those of the served checkpoint; None for a
                weight that is not to be sent, such as a value head's.  The same on every rank.
            partial: Permit that weights are missing; they stay as they are.  Once the engine has lost its weights (asleep, or
                a sync that failed), partial syncs that together bring all of them count as a full one.
            parts: Send only the parts of tensors that each TP worker reads, once the first sync has shown which, instead
                of full tensors.
            nonfinite: What becomes of weights that are NaN or infinite.  ``"warn"``: they are synced and named in
                `SyncReport.nonfinite` and a warning.  ``"refuse"``: every rank looks for them first, which reads all
                weights once more, and nothing is sent if there are any.
            timeout_s: For the whole sync, in seconds, from when all ranks have come.  How long one waits for the others, which
                may still be generating, is the ``timeout_s`` of `init`.

        Returns:
            What was done; see `SyncReport`.

        Raises:
            WeightsMismatchError: Names, shapes or kinds of dtype are not the served model's, or differ between ranks, or
                weights are not finite and ``nonfinite="refuse"``.  Nothing was sent, unless the source is a generator, which
                can only be checked as it comes.
            EngineStateError: The weights are released, the engine is shut down, or its release cannot sync while requests
                are in flight (0.5.10 to 0.5.20).
            ConfigError: An option of a wrong type, out of range or unknown, a folder that cannot be written to, tensors
                without data or in a form that cannot be sent, or not enough memory for the largest tensor.
            SyncError, RequestError, EngineDeadError, DeadlineError: The engine failed.  If that was after the first
                bucket had left, its weights are unknown: generation is refused until a full sync succeeds.
            RankFailedError: Another library's exception on some rank, such as an out-of-memory error in a gather.
            RankLostError: Another rank did not follow.
        """
        # Before the owner holds generation: a rank that is still waiting for tokens would wait until its deadline, and
        # the others for it.  All slices together: the gathers of sharded weights span them, and hang without one.
        with self._context.all_slices.together("sync weights") as must_match:
            self._lifecycle.state.check_sync()
            self._context.server.restore_files()
            timeout_s = check_timeout(timeout_s)
            if weight_version is None and isinstance(model_or_named_tensors, Checkpoint):
                weight_version = model_or_named_tensors.weight_version
            weight_version = check_version(weight_version)
            options = SyncOptions(
                bucket_bytes=bucket_bytes,
                payloads=payloads,
                transport=transport,
                partial=partial,
                folder=None if folder is None else check_path("folder", folder),
                parts=parts,
                rename=rename,
                nonfinite=nonfinite,
            )
            # Functions of one name need not be one function; the names that they make are compared with the weights.
            must_match |= {**asdict(replace(options, rename=None)), "weight_version": weight_version}
        version = self._lifecycle.next_version(weight_version)
        with self._context.going_on():
            with self._lifecycle.weight_update(version, partial=partial) as modified:
                report = self._context.in_all_slices(
                    "finish the weight sync of all slices",
                    lambda: self._sync.run(
                        model_or_named_tensors,
                        version=version,
                        options=options,
                        timeout_s=timeout_s,
                        on_engine_modified=modified,
                        on_sent=self._lifecycle.note_missing,
                    ),
                    timeout_s=timeout_s,
                )
            found = (
                self._lifecycle.state.warn_of_missing(),
                self._generation.warn_of_stale_cache(),
                self._adapters.note_synced(model_or_named_tensors, partial=partial),
            )
        warnings = [warning for warning in found if warning is not None]
        return replace(report, warnings=(*report.warnings, *warnings)) if warnings else report

    def save_weights(
        self,
        model_or_named_tensors: Source,
        *,
        folder: str | os.PathLike[str],
        rename: Rename | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """Write a checkpoint of these weights, as Hugging Face lays it out, with `weight_version` in it.

        Pass what was synced last: the version is the engine's.  Global rank 0 writes safetensors files of at most 5 GiB,
        and copies configuration and tokenizer from the served model's folder if that is on its host, so that `launch`
        can serve the result.  It appears under its name once it is complete.

        Collective: as `sync_weights`.  With tp_size 1 there is no group between the ranks: only rank 0 raises its
        failure, and only there the checkpoint is complete on return.

        Args:
            model_or_named_tensors: As for `sync_weights`, but no generator.
            folder: Must not exist, or be empty.
            rename: As for `sync_weights`.
            timeout_s: How long the other ranks wait for the last file, in seconds.

        Raises:
            ConfigError: Something is in the folder, or a generator.
            WeightsMismatchError: Names, shapes or completeness.
            RankFailedError: It could not be written (``OSError``), or another library's exception.
        """
        save_checkpoint(
            self._context,
            model_or_named_tensors,
            folder=folder,
            rename=rename,
            served_path=self.model_path,
            timeout_s=timeout_s,
        )

    @_collective("join an update group")
    def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str = update_group.DEFAULT_NAME,
        backend: str = "nccl",
        timeout_s: float = 300.0,
    ) -> None:
        """Have the server's TP ranks join a process group that weights will be broadcast over.

        The server answers once the whole group has met: rank 0 of it must join at the same time, from another process
        or thread, for example with `join_update_group`.  With nccl it must be on another GPU than the server.

        Collective: over the slice, with the same arguments; the owner asks, the clients wait.

        Args:
            master_address: Host of rank 0.
            master_port: Port of its store.
            rank_offset: Rank of the server's TP rank 0 in the group; at least 1.
            world_size: Number of ranks in the group: the sender, and the TP ranks of all servers in it.
            group_name: Its name on both sides.
            backend: ``"nccl"``, or ``"gloo"`` on a CPU.
            timeout_s: For the request, in seconds.  A group that does not meet keeps the server busy beyond it.

        Raises:
            ConfigError: A group that cannot meet, or ranks that pass different arguments.
            EngineStateError: A group of that name exists, or the engine is shut down.
            RequestError, EngineDeadError, DeadlineError: The server failed, or rank 0 did not come.
        """
        group = UpdateGroup(master_address, master_port, rank_offset, world_size, group_name, backend)
        self._update_groups.join(group, timeout_s=timeout_s)

    @_collective("update weights from a group")
    def update_weights_from_distributed(
        self,
        names: Sequence[str],
        *,
        dtypes: Sequence[str | torch.dtype],
        shapes: Sequence[Sequence[int]],
        group_name: str = update_group.DEFAULT_NAME,
        weight_version: str | int | None = None,
        bucket_bytes: int = 512 * 2**20,
        partial: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        """Update the server's weights with those that rank 0 of an update group broadcasts, one by one, in this order.

        Everything around it is as in `sync_weights`: requests in flight, the cache, the version, and what is refused
        before and after.  What arrives is not compared with what was sent.

        Collective: over the slice, with the same arguments; the owner asks, the clients wait.  Rank 0 of the group
        broadcasts at the same time, from another process or thread.

        Args:
            names: Checkpoint names, all of them unless `partial`.
            dtypes: Of each, as they are broadcast.
            shapes: Of each, in full.
            group_name: From `init_weights_update_group`.
            weight_version: As for `sync_weights`.
            bucket_bytes: Most memory that a TP rank of the server takes for weights in transit; a larger one travels
                by itself.  The sender need not know it.
            partial: Permit that weights are missing; they stay as they are.
            timeout_s: For the whole update, in seconds.

        Raises:
            WeightsMismatchError: Names or shapes are not the served model's; nothing was asked for.
            ConfigError: Lists of different lengths, no dtype, or ranks that pass different arguments.
            EngineStateError: No such group; the weights are released; or as `sync_weights`.
            SyncError, RequestError, EngineDeadError, DeadlineError: The server failed, or did not get what it waited for.
                Its weights are unknown: generation is refused until a full sync or update succeeds.
        """
        self._update_groups.update(
            lambda: update_group.announced(names, dtypes, shapes),
            group_name=group_name,
            weight_version=weight_version,
            bucket_bytes=bucket_bytes,
            partial=partial,
            timeout_s=timeout_s,
        )
        self._generation.warn_of_stale_cache()
        self._adapters.note_synced((), partial=partial)  # whatever the sender has merged

    @_collective("leave an update group")
    def destroy_weights_update_group(
        self, *, group_name: str = update_group.DEFAULT_NAME, timeout_s: float = 60.0
    ) -> None:
        """Have the server leave an update group; the other ranks leave on their own.

        Collective: over the slice, with the same argument; the owner asks, the clients wait.

        Raises:
            ConfigError: Ranks that pass different names.
            EngineStateError: There is no group of that name.
            RequestError, EngineDeadError, DeadlineError: The server failed.
        """
        self._update_groups.leave(group_name, timeout_s=timeout_s)

    # --- adapters --------------------------------------------------------------------------------------------------

    @_collective("load a LoRA adapter")
    def set_lora(
        self, name: str, model: nn.Module, *, adapter_name: str | None = None, timeout_s: float = 120.0
    ) -> None:
        """Serve the LoRA adapter of a PEFT model under a name, in place of one of that name.

        Weights that are NaN or infinite are served, and named in a warning.

        Collective: over the slice; for sharded weights also over their mesh, and with several slices of tp_size > 1
        over all of them: call it on every training rank.

        Args:
            name: For ``generate(..., lora_path=name)``.
            model: From `peft.get_peft_model`: plain, DDP or FSDP2.
            adapter_name: PEFT's name of the adapter; may be left out if the model has one.
            timeout_s: For each request to the server, in seconds; an adapter is replaced once its requests are done.

        Raises:
            ConfigError: No adapter, one that SGLang would serve as something else (DoRA, rank patterns, ...), one that the
                server was not started for, or one that the last sync has merged into the engine's weights.
            WeightsMismatchError: Its names or shapes do not fit the served model, or they or its values differ between ranks.
            EngineStateError: Shut down, or the server cannot hold one more.
            RequestError, EngineDeadError, DeadlineError: The server failed; an adapter of that name may be gone.
            RankFailedError: Another library's exception on some rank.
        """
        self._adapters.load_from(name, model, adapter_name, timeout_s=timeout_s)

    @_collective("load a LoRA adapter")
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
        values = tensors.values() if isinstance(tensors, Mapping) else ()
        self._adapters.load(name, lambda: make_adapter(tensors, config), groups_of_tensors(values), timeout_s=timeout_s)

    @_collective("unload a LoRA adapter")
    def unload_lora(self, name: str, *, timeout_s: float = 120.0) -> None:
        """Remove a LoRA adapter, once the requests that use it are done.

        Collective: over the slice.

        Raises:
            RequestError: The server has no adapter of that name, or failed.
            EngineDeadError, DeadlineError: The server is gone, or its requests take longer.
        """
        self._adapters.unload(name, timeout_s=timeout_s)

    # --- memory ----------------------------------------------------------------------------------------------------

    @_collective("sleep")
    def sleep(self, tags: Collection[str] | None = None, *, timeout_s: float = 120.0) -> None:
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
        self._memory.sleep(tags, timeout_s=timeout_s)

    @_collective("wake")
    def wake(self, tags: Collection[str] | None = None, *, timeout_s: float = 120.0) -> None:
        """Take the memory back, by tag; what is awake already stays so.

        Collective: over the slice.  After waking ``weights`` they hold garbage, unless the server was launched with
        ``enable_weights_cpu_backup=True``: generation is refused until the next sync.  Raises as `sleep`.
        """
        self._memory.wake(tags, timeout_s=timeout_s)

    # --- life ------------------------------------------------------------------------------------------------------

    def health(self) -> Health:
        """Return ``starting``, ``ready``, ``paused``, ``asleep``, ``stopped`` or ``dead``, on any rank.

        The last four without a forward.
        """
        state, owned = self._lifecycle.state, self._context.owned
        if state.life is not Life.RUNNING or (owned is not None and owned.process.exited()):
            return Health.DEAD
        if self._client.is_stopped:
            return Health.STOPPED
        if not can_answer(state):
            alive = Health.ASLEEP if state.not_awake else Health.PAUSED
            return alive if self._client.is_listening(timeout_s=HEALTH_TIMEOUT_S) else Health.DEAD
        asked = time.monotonic()
        if self._client.is_healthy(timeout_s=HEALTH_TIMEOUT_S):
            return Health.READY
        if self._client.is_stopped:  # meanwhile
            return Health.STOPPED
        # SGLang refuses at once while it warms up, and after 20 s without a token; a server that is gone does not answer.
        at_once = time.monotonic() - asked < _AT_ONCE_S
        return Health.STARTING if at_once and self._client.is_listening(timeout_s=_AT_ONCE_S) else Health.DEAD

    def close(self) -> None:
        """Close this side's connections; the server runs on."""
        self._context.client.close()

    @_collective("restart the server", restarts=False)
    def restart(self, source: Source | None = None, **sync_options: Any) -> SyncReport | None:
        """Start another server in place of this one, dead or alive, with the arguments of the launch.

        Requests in flight end with `EngineDeadError`.  The new server has another URL and key, is awake, has the LoRA
        adapters that were set, and is in no update group.  A pause of the user's stays, and so do weight versions: they go
        on from the last one.  Its weights are the checkpoint's: generation is refused until a full sync.

        If it fails, the engine has no server; it can be restarted again, or shut down.

        Collective: over the slice; with a `source`, as `sync_weights`.

        Args:
            source: Weights for a full sync, as for `sync_weights`.
            sync_options: As for `sync_weights`; not without a `source`.

        Returns:
            The report of the sync, if a source was given.

        Raises:
            ConfigError: Options of a sync that cannot work or come without a source, ranks that pass different arguments, or
                a model's folder that is not there any more.  The old server runs on.
            EngineStateError: Shut down.
            EngineError: The end of the old server could not be confirmed; the message names its pid.
            LaunchError, DeadlineError, RankLostError: As `Colocation.launch`.
            RequestError, EngineDeadError: The new server failed, or refused an adapter.

            The sync raises as `sync_weights`; the new server runs then.
        """

        def check() -> None:
            if self._context.owned is not None:
                check_model_path(self.model_path)  # training removes old checkpoints
            if source is not None:
                _check_sync_options(**sync_options)
            elif sync_options:
                raise ConfigError(
                    f"restart() got {', '.join(sorted(sync_options))} without weights to sync",
                    hint="pass the source as well",
                )

        self._life.restart(with_source=source is not None, check=check)
        self._adapters.set_again()
        return None if source is None else self.sync_weights(source, **sync_options)

    def shutdown(self, *, wait: bool = True, timeout_s: float = 60.0) -> None:
        """End the server, all of it, and remove what it left in /dev/shm.

        Idempotent.  A call that was interrupted, as by Ctrl-C, can be made again, and goes on where that one was.  In a
        forked process it does nothing.

        Collective: over the slice with ``wait=True``: the owner ends the server once every rank is here, so that no
        rank's request is cut off.

        Args:
            wait: False ends it at once, for when other ranks may not come.
            timeout_s: How long to wait for the others; the server is ended anyway.

        Raises:
            ConfigError: An argument of a wrong type; the server runs on.
            EngineError: The end of the server could not be confirmed; the message names its pid.
        """
        wait, timeout_s = check_flag("wait", wait), check_timeout(timeout_s)
        self._life.shut_down(wait=wait, timeout_s=timeout_s)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with noted_on(error):
            self.shutdown(wait=error is None)


def _check_sync_options(*, weight_version: object = None, timeout_s: object = 600.0, **options: Any) -> None:
    """Check options of `Engine.sync_weights`, ahead of the call that gets them.

    Raises:
        ConfigError: One of them cannot work, or is none.
    """
    check_version(weight_version)
    check_timeout(timeout_s)
    unknown = sorted(set(options) - {field.name for field in fields(SyncOptions)})
    if unknown:
        raise ConfigError(f"sync_weights() has no option {', '.join(unknown)}")
    SyncOptions(**options)


__all__ = ["Engine"]
