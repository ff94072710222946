"""Weights that somebody else broadcasts: the process group that the engine joins, and what may be sent through it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tpcolocate.errors import ConfigError, WeightsMismatchError

DEFAULT_NAME = "weight_update_group"
Weight = tuple[str, torch.Size, str]
"""Name, full shape, dtype as torch spells it (``bfloat16``)."""


@dataclass(frozen=True, slots=True)
class UpdateGroup:
    """A process group in which rank 0 sends and the engine's TP ranks receive.

    Attributes:
        master_address: Host of rank 0, where its store listens.
        master_port: Port of that store.
        rank_offset: Rank of the engine's TP rank 0 in the group; the others follow.
        world_size: Number of ranks in the group, the sender included.
        group_name: Its name on both sides.
        backend: ``"nccl"``, or ``"gloo"`` on a CPU.
    """

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = DEFAULT_NAME
    backend: str = "nccl"

    def check(self, tp_size: int) -> None:
        """Refuse a group that cannot meet.

        Raises:
            ConfigError: What is wrong with it.
        """
        if not self.group_name or not self.master_address:
            raise ConfigError("group_name and master_address must not be empty")
        if not 0 < self.master_port < 65536:
            raise ConfigError(f"master_port={self.master_port} is no port")
        if self.rank_offset < 1:
            raise ConfigError(
                f"rank_offset={self.rank_offset} is below 1", hint="rank 0 of the group is the one that sends"
            )
        if self.rank_offset + tp_size > self.world_size:
            raise ConfigError(
                f"world_size={self.world_size} is too small for {tp_size} TP ranks from rank_offset={self.rank_offset} on",
                hint=f"the sender and the TP ranks of all engines in the group, here at least {self.rank_offset + tp_size}",
            )


def join_update_group(
    *,
    master_address: str,
    master_port: int,
    world_size: int,
    group_name: str = DEFAULT_NAME,
    backend: str = "nccl",
    timeout_s: float = 300.0,
) -> dist.ProcessGroup:
    """Join an update group as rank 0, the one that sends; the other end of `Engine.init_weights_update_group`.

    For any process: in this job or outside of it, with or without a default process group.  It returns once all ranks of
    the group have come, so it must run at the same time as the engine's call: in another process, or in a thread.
    With nccl, this process must be on another GPU than the engine, and both must agree on ``NCCL_CUMEM_ENABLE``: SGLang sets
    it to 0 unless the engine was started with it, NCCL takes 1 where it is not set, and the two cannot open each other's
    memory.  Send with ``dist.broadcast(tensor, src=0,
    group=group)``; leave with ``dist.destroy_process_group(group)``.

    The group is made as the engine makes it (``init_custom_process_group`` in SGLang's ``utils``), because torch's own
    ``new_group`` cannot reach processes outside of the default group.

    Args:
        master_address: An address of this host that the engine can reach.
        master_port: A free port on it.
        world_size: 1 and the TP ranks of all engines in the group.
        group_name: As the engine is told.
        backend: As the engine is told.
        timeout_s: For the meeting and for every operation of the group, in seconds.

    Raises:
        ConfigError: This process has a group of that name, the port is taken, or NCCL_CUMEM_ENABLE is not set for nccl.
        RuntimeError: torch's own errors, such as a rank that did not come.
    """
    if group_name in distributed_c10d._world.pg_names.values():
        raise ConfigError(
            f"this process has a group named {group_name!r}", hint="torch.distributed.destroy_process_group() it first"
        )
    if backend == "nccl" and "NCCL_CUMEM_ENABLE" not in os.environ:
        # NCCL reads it when it is first used, which here may be long ago: it cannot be set for the caller.
        raise ConfigError(
            "NCCL_CUMEM_ENABLE is not set: NCCL would share memory in a way here that SGLang has turned off, and the first "
            "broadcast would fail with 'invalid argument', half-way through the engine's weights",
            hint="start this process with NCCL_CUMEM_ENABLE=0, or this one and the engine's with NCCL_CUMEM_ENABLE=1",
        )
    timeout = timedelta(seconds=timeout_s)
    try:
        # Not shared with an earlier group on this port, as torch's own rendezvous would: what that one has left in its
        # store would send the ranks to connections that are gone.
        store = dist.TCPStore(master_address, master_port, world_size, True, timeout=timeout, multi_tenant=False)
    except dist.DistNetworkError as error:
        raise ConfigError(
            f"cannot listen on {master_address}:{master_port}: {error}",
            hint="choose a free port; an earlier group keeps its own until the last reference to it is gone",
        ) from error
    helper: Any = distributed_c10d._new_process_group_helper
    made = helper(
        world_size,
        0,
        [],
        dist.Backend(backend),
        dist.PrefixStore(group_name, store),
        group_name=group_name,
        timeout=timeout,
    )
    group: dist.ProcessGroup = made[0]
    distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def announced(
    names: Sequence[str], dtypes: Sequence[str | torch.dtype], shapes: Sequence[Sequence[int]]
) -> list[Weight]:
    """What rank 0 will send, checked and in one form.

    Raises:
        ConfigError: Lists of different lengths, or what is no dtype or shape.
        WeightsMismatchError: A name that comes twice.
    """
    if isinstance(names, str) or not len(names) == len(dtypes) == len(shapes) or not len(names):
        raise ConfigError(
            f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes", hint="one of each for every weight"
        )
    weights: list[Weight] = []
    seen: set[str] = set()
    for name, dtype, shape in zip(names, dtypes, shapes):
        text = str(dtype).removeprefix("torch.")
        if not isinstance(getattr(torch, text, None), torch.dtype):
            raise ConfigError(f"{name} has dtype {dtype!r}, which torch does not know", hint='for example "bfloat16"')
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in shape):
            raise ConfigError(f"{name} has shape {tuple(shape)!r}", hint="a list of whole numbers")
        if name in seen:
            raise WeightsMismatchError(f"{name} is given twice", hint="names must be unique")
        seen.add(name)
        weights.append((name, torch.Size(shape), text))
    return weights


def requests(weights: Sequence[Weight], bucket_bytes: int) -> Iterator[list[Weight]]:
    """Cut the weights into requests of at most `bucket_bytes`, in order: the engine holds one at a time in full."""
    request: list[Weight] = []
    used = 0
    for name, shape, dtype in weights:
        size = shape.numel() * getattr(torch, dtype).itemsize
        if request and used + size > bucket_bytes:
            yield request
            request, used = [], 0
        request.append((name, shape, dtype))
        used += size
    if request:
        yield request


__all__ = ["DEFAULT_NAME", "UpdateGroup", "announced", "join_update_group", "requests"]
