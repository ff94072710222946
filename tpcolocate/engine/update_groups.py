"""Weights that another process broadcasts to a running engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from tpcolocate.engine.base import SliceClient
from tpcolocate.errors import ConfigError, EngineStateError
from tpcolocate.weights import update_group
from tpcolocate.weights.update_group import UpdateGroup


class UpdateGroupCalls(SliceClient):
    """The calls of `Engine` for update groups."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._update_groups: dict[str, UpdateGroup] = {}

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
        what = "join an update group"
        with self._group.together(what) as meant:
            meant |= asdict(group)
            group.check(len(self._group))
            if group_name in self._update_groups:
                raise EngineStateError(
                    f"the server is in an update group named {group_name!r}",
                    hint="destroy_weights_update_group() first, or choose another name",
                )
        self._on_owner(
            what,
            lambda: self._owned().init_weights_update_group(
                timeout_s=timeout_s,
                master_address=master_address,
                master_port=master_port,
                rank_offset=rank_offset,
                world_size=world_size,
                group_name=group_name,
                backend=backend,
            ),
            timeout_s=timeout_s,
        )
        self._update_groups[group_name] = group

    def update_weights_from_distributed(
        self,
        names: Sequence[str],
        *,
        dtypes: Sequence[str | torch.dtype],
        shapes: Sequence[Sequence[int]],
        group_name: str = update_group.DEFAULT_NAME,
        weight_version: str | None = None,
        bucket_bytes: int = 512 * 2**20,
        partial: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        """Make the server speak with weights that rank 0 of an update group broadcasts, one after the other, in this order.

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
            bucket_bytes: Most memory that a TP rank of the server takes for weights on their way; a larger one travels
                by itself.  The sender need not know of it.
            partial: Permit that weights are missing; they stay as they are.
            timeout_s: For the whole update, in seconds.

        Raises:
            WeightsMismatchError: Names or shapes are not the served model's; nothing was asked for.
            ConfigError: Lists of different lengths, no dtype, or ranks that pass different arguments.
            EngineStateError: No such group; the weights are released; or as `sync_weights`.
            SyncError, RequestError, EngineDeadError, DeadlineError: The server failed, or did not get what it waited for.
                Its weights are unknown: generation is refused until a full sync or update succeeds.
        """
        with self._group.together("update weights from a group") as meant:
            self._state.check_sync()
            self._check_group(group_name)
            weights = update_group.announced(names, dtypes, shapes)
            if bucket_bytes <= 0:
                raise ConfigError(f"bucket_bytes={bucket_bytes} is not positive")
            if self._sync.spec is not None:
                self._sync.spec.check([(name, shape) for name, shape, _ in weights])
                if not partial:
                    self._sync.spec.check_complete(names)
            meant |= {
                "names": [name for name, _, _ in weights],
                "dtypes": [dtype for _, _, dtype in weights],
                "shapes": [tuple(shape) for _, shape, _ in weights],
                "group_name": group_name,
                "weight_version": weight_version,
                "bucket_bytes": bucket_bytes,
                "partial": partial,
            }
        version = self._next_version(weight_version)
        deadline = time.monotonic() + timeout_s
        self._on_owner(
            "open an update of weights", lambda: self._owned().begin_sync(timeout_s=timeout_s), timeout_s=timeout_s
        )

        def act() -> None:
            verbs = self._owned()
            for request in update_group.requests(weights, bucket_bytes):
                verbs.receive(request, group_name=group_name, timeout_s=max(deadline - time.monotonic(), 1.0))
            verbs.end_sync(version, timeout_s=max(deadline - time.monotonic(), 1.0))

        with self._changing_weights() as touched:
            touched()
            self._on_owner("update weights from a group", act, timeout_s=timeout_s)
            self._published(version, partial=partial)
        self._stale_cache()

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
        what = "leave an update group"
        with self._group.together(what) as meant:
            meant["group_name"] = group_name
            self._state.check_open(what)
            self._check_group(group_name)
        self._on_owner(
            what,
            lambda: self._owned().destroy_weights_update_group(timeout_s=timeout_s, group_name=group_name),
            timeout_s=timeout_s,
        )
        del self._update_groups[group_name]

    def _check_group(self, group_name: str) -> None:
        if group_name not in self._update_groups:
            raise EngineStateError(
                f"the server is in no update group named {group_name!r}", hint="init_weights_update_group() first"
            )


__all__ = ["UpdateGroupCalls"]
