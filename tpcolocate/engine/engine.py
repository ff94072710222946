"""The engine as a training script holds it: one rank's end of its slice's server.

Composes the server's verbs, the weight sync and the slice's agreement.  Calls marked collective must be made by every
rank of the slice, in the same order; the owner acts, the others learn how it went.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType

from tpcolocate.engine.adapters import AdapterCalls
from tpcolocate.engine.client import HEALTH_TIMEOUT_S, Health
from tpcolocate.engine.generation import GenerationCalls
from tpcolocate.engine.update_groups import UpdateGroupCalls
from tpcolocate.errors import ConfigError, EngineStateError, RankLostError, TpColocateError
from tpcolocate.ipc_payload import listed
from tpcolocate.report import SyncReport
from tpcolocate.server.lifecycle import Weights as EngineWeights
from tpcolocate.weights.sources.checkpoint import Checkpoint, CheckpointWriter, count_shards, save
from tpcolocate.weights.sources.model_spec import local_folder
from tpcolocate.weights.sources.named_weights import NamedWeights, Rename, Source
from tpcolocate.weights.sync.options import SyncOptions

logger = logging.getLogger(__name__)

_AT_ONCE_S = 5.0
# SIGTERM, a bounded wait, SIGKILL: see ServerProcess.stop.
_SERVER_ENDS_S = 40.0


class Engine(AdapterCalls, UpdateGroupCalls, GenerationCalls):
    """One rank's end of its slice's server; made by `Colocation.launch`.

    Attributes:
        url: Base URL of the server.
        api_key: Random key of this launch.
        sglang_version: As the server reports it.
        model_path: What the server was started with.
        weight_version: As the server reports it: of the last sync, or what it was started with.
    """

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
        parts: bool = True,
        timeout_s: float = 600.0,
    ) -> SyncReport:
        """Make the server speak with these weights.

        Collective: over the slice; for sharded weights also over their mesh, and with several slices of tp_size > 1
        over all of them: call it on every training rank.

        Args:
            model_or_named_tensors: An `nn.Module` (plain, DDP, FSDP2, DTensor-parallel, peft), a state dict, or an
                iterable of (checkpoint name, full tensor or DTensor), in the same order on every rank.
            weight_version: Reported by the server with every sequence from then on; default: that of a `Checkpoint`, else
                a count of the syncs, which goes on from a version that is a number.
            bucket_bytes: Most staging memory per rank, less where less is free; a larger tensor travels by itself.
            payloads: ``"per_rank"``: every rank exports from its own device.  ``"fan_out"``: the owner exports one
                copy per TP rank; for when other ranks cannot reach their TP rank's device.  Not with ``"stock"``.
            transport: ``"ipc"``: handles of memory that the engine maps.  ``"file"``: safetensors files.  ``"auto"``: the
                first sync proves with a small handle that the one works, or takes the other.  ``"stock"``: handles that
                SGLang opens by itself; nothing is read back, and a failure kills the server.
            folder: Where files go; default: /dev/shm.
            rename: A function or a mapping from the source's names to those of the served checkpoint; None for a
                weight that is not to be sent, such as a value head's.  The same on every rank.
            partial: Permit that weights are missing; they stay as they are.
            parts: Move only the parts of tensors that each TP worker reads, once the first sync has shown which, instead
                of full tensors.
            timeout_s: For the whole sync, in seconds, from when all ranks have come.  How long one waits for the others, which
                may still be generating, is the ``timeout_s`` of `init`.

        Returns:
            What was done; see `SyncReport`.

        Raises:
            WeightsMismatchError: Names or shapes are not the served model's, or differ between ranks.  Nothing was sent,
                unless the source is a generator, which can only be checked as it comes.
            EngineStateError: The weights are released, the engine is shut down, or its release cannot sync while requests
                are in flight (0.5.10 to 0.5.20).
            ConfigError: An option that does not exist, or not enough memory for the largest tensor.
            SyncError, RequestError, EngineDeadError, DeadlineError: The engine failed.  If that was after the first
                bucket had left, its weights are unknown: generation is refused until a full sync succeeds.
            RankFailedError: Another library's exception on some rank, such as an out-of-memory error in a gather.
            RankLostError: Another rank did not follow.
        """
        if weight_version is None and isinstance(model_or_named_tensors, Checkpoint):
            weight_version = model_or_named_tensors.weight_version
        error: TpColocateError | None = None
        everybody = self._everybody
        # Before the owner holds generation: a rank that is still waiting for tokens would wait for ever, and the others for
        # it.  All slices together: the gathers of sharded weights span them, and a slice that stays away would hang them.
        with everybody.together("sync weights") as meant:
            self._state.check_sync()
            options = SyncOptions(
                bucket_bytes=bucket_bytes,
                payloads=payloads,
                transport=transport,
                partial=partial,
                folder=None if folder is None else Path(folder),
                parts=parts,
                rename=rename,
            )
            # Functions of one name need not be one function; what they make of the names is compared with the weights.
            meant |= {**asdict(replace(options, rename=None)), "weight_version": weight_version}
        version = self._next_version(weight_version)
        with self._changing_weights() as touched:
            try:
                report = self._sync.run(
                    model_or_named_tensors, version=version, options=options, timeout_s=timeout_s, touched=touched
                )
            except TpColocateError as caught:
                error = caught
            if everybody is not self._group and not isinstance(error, RankLostError):
                # A slice that failed must not leave the others to their next step.
                everybody.agree(error, what="finish the weight sync of all slices", timeout_s=timeout_s)
            if error is not None:
                raise error
            self._published(version, partial=partial)
        stale = self._stale_cache()
        return report if stale is None else replace(report, warnings=(*report.warnings, stale))

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

        Collective: as `sync_weights`.  With tp_size 1 no group exists to tell the others of a failure: only rank 0
        raises it, and only there the checkpoint is complete on return.

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
        everybody = self._everybody
        weights: NamedWeights | None = None
        writer: CheckpointWriter | None = None
        try:
            with everybody.together("get ready to save the weights"):
                spec = self._sync.spec
                expected = None if spec is None else spec.shapes
                weights = NamedWeights.of(model_or_named_tensors, expected=expected, rename=rename)
                if weights.items is None:
                    raise ConfigError("cannot save a generator", hint="pass the module, a mapping or a list")
                if spec is not None:
                    spec.check([(name, tensor.shape) for name, tensor in weights.items])
                    spec.check_complete([*(name for name, _ in weights.items), *weights.aliases])
                if everybody.rank == 0:
                    writer = CheckpointWriter(
                        folder,
                        weight_version=self.weight_version,
                        num_shards=count_shards(weights),
                        like=local_folder(self.model_path),
                    )
        except TpColocateError:
            # Without a group the other ranks have not heard of it, and are in the gathers.
            if len(everybody) == 1 and weights is not None and weights.is_sharded:
                save(weights, None)
            raise
        problem = save(weights, writer)
        everybody.agree(problem, what="save the weights", timeout_s=timeout_s)

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
        before = self._state
        try:
            with self._group.together("sleep", timeout_s=timeout_s) as meant:
                chosen, after = self._state.sleeping(tags)
                meant["tags"] = None if tags is None else sorted(tags)
                if not self._state.frees_memory:
                    raise EngineStateError(
                        "sleep() would free nothing: the server has no memory saver",
                        hint="launch(enable_memory_saver=True)",
                    )
                self._state = after  # before requests are looked for: see `_counted`
                if chosen and self._in_flight:
                    raise EngineStateError(
                        f"cannot sleep: {self._in_flight} requests of rank {self._group.rank} are in flight",
                        hint="wait for them first",
                    )

            def act() -> None:
                if chosen and self._verbs is not None:
                    self._verbs.fall_asleep(chosen, timeout_s=timeout_s)

            self._sync.call_back(timeout_s=timeout_s)
            self._on_owner("sleep", act, timeout_s=timeout_s)
        except BaseException:
            self._state = before
            raise

    def wake(self, tags: Sequence[str] | None = None, *, timeout_s: float = 120.0) -> None:
        """Take the memory back, by tag; what is awake already stays so.

        Collective: over the slice.  After waking ``weights`` they hold garbage, unless the server was launched with
        ``enable_weights_cpu_backup=True``: generation is refused until the next sync.  Raises as `sleep`.
        """
        with self._group.together("wake", timeout_s=timeout_s) as meant:
            chosen, after = self._state.waking(tags)
            meant["tags"] = None if tags is None else sorted(tags)

        def act() -> None:
            if chosen and self._verbs is not None:
                lost = after.weights is not EngineWeights.CURRENT
                self._verbs.wake_up(chosen, weights_lost=lost, timeout_s=timeout_s)

        self._sync.call_back(timeout_s=timeout_s)
        self._on_owner("wake", act, timeout_s=timeout_s)
        self._state = after

    # --- life --------------------------------------------------------------------------------------------------

    def health(self) -> Health:
        """``starting``, ``ready``, ``paused``, ``asleep`` or ``dead``, on any rank; the last three without a forward."""
        if self._state.closed or (self._server is not None and self._server.exited()):
            return Health.DEAD
        if self._state.asleep:
            return Health.ASLEEP if self._client.is_listening(timeout_s=HEALTH_TIMEOUT_S) else Health.DEAD
        if self._state.paused is not None or self._state.weights is not EngineWeights.CURRENT:
            # No token comes out of a paused server.  Sleep and sync pause it, until its weights are the trainer's again.
            return Health.PAUSED if self._client.is_listening(timeout_s=HEALTH_TIMEOUT_S) else Health.DEAD
        asked = time.monotonic()
        if self._client.is_healthy(timeout_s=HEALTH_TIMEOUT_S):
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
                logger.warning("reclaimed handles that the engine never gave back: %s", listed(lost))
            self._on_shutdown()

    def _came(self, what: str, timeout_s: float) -> bool:
        """Wait for the other ranks; False if one of them does not come."""
        try:
            self._group.all_gather(None, what=what, timeout_s=timeout_s)
            return True
        except TpColocateError as error:  # or another thread is in a call that they will not come to
            logger.warning("shutting down without the others: %s", error)
            return False

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(wait=error is None)


__all__ = ["Engine"]
