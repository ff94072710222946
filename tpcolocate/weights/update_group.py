"""Weights that another process broadcasts: the process group that the engine joins, and what may be sent through it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tpcolocate.checks import check_choice, check_integer, check_text, check_type
from tpcolocate.deadline import check_timeout
from tpcolocate.errors import ConfigError, WeightsMismatchError, shown
from tpcolocate.weights.buckets import split_into_buckets

DEFAULT_NAME = "weight_update_group"
BACKENDS = ("nccl", "gloo")
_MAX_SIZE = 2**48
Weight = tuple[str, torch.Size, str]
"""Name, full shape, name of the dtype (``bfloat16``)."""


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
        """Check that the group can form.

        Raises:
            ConfigError: It cannot.
        """
        for name in ("group_name", "master_address"):
            check_text(name, getattr(self, name))
        check_choice("backend", self.backend, BACKENDS)
        check_integer("master_port", self.master_port, at_least=1, at_most=65535)
        for name in ("rank_offset", "world_size"):
            check_integer(name, getattr(self, name), at_least=0, at_most=2**31 - 1)
        if self.rank_offset < 1:
            raise ConfigError(
                f"rank_offset must be at least 1, got {self.rank_offset}", hint="rank 0 of the group is the sender"
            )
        if self.rank_offset + tp_size > self.world_size:
            raise ConfigError(
                f"world_size={self.world_size} is too small for {tp_size} TP ranks from rank_offset={self.rank_offset} on",
                hint=f"count the sender and the TP ranks of all engines in the group: at least {self.rank_offset + tp_size}",
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
    """Join an update group as rank 0, the sender; the counterpart of `Engine.init_weights_update_group`.

    Any process can call it: inside or outside of this job, with or without a default process group.  It returns once all
    ranks have joined, so it must run at the same time as the engine's call: in another process or thread.  Send with
    ``dist.broadcast(tensor, src=0, group=group)``; leave with ``dist.destroy_process_group(group)``.

    With nccl, this process must be on another GPU than the engine, and both must have the same ``NCCL_CUMEM_ENABLE``:
    SGLang sets it to 0 unless it is set already, NCCL's own default is 1, and the two cannot open each other's memory.

    The group is created like the engine's (``init_custom_process_group`` in SGLang's ``utils``), because torch's
    ``new_group`` cannot include processes outside of the default group.

    Args:
        master_address: An address of this host that the engine can reach.
        master_port: A free port on it.
        world_size: 1 plus the TP ranks of all engines in the group.
        group_name: As passed to the engine.
        backend: As passed to the engine.
        timeout_s: For joining, and for every operation of the group, in seconds.

    Raises:
        ConfigError: This process has a group of that name, the port is in use, or NCCL_CUMEM_ENABLE is not set for nccl.
        RuntimeError: torch's own errors, for example when a rank does not join.
    """
    check_text("master_address", master_address)
    check_integer("master_port", master_port, at_least=0, at_most=2**16 - 1)
    check_integer("world_size", world_size, at_least=1)
    check_text("group_name", group_name)
    check_choice("backend", backend, ("nccl", "gloo"))
    timeout_s = check_timeout(timeout_s)
    if group_name in distributed_c10d._world.pg_names.values():
        raise ConfigError(
            f"this process already has a group named {group_name!r}",
            hint="torch.distributed.destroy_process_group() it first",
        )
    if backend == "nccl" and "NCCL_CUMEM_ENABLE" not in os.environ:
        # NCCL reads it at its first use, which may be long ago: it cannot be set for the caller.
        raise ConfigError(
            "NCCL_CUMEM_ENABLE is not set: NCCL would share memory by a mechanism that SGLang turns off, and the first "
            "broadcast would fail with 'invalid argument', in the middle of the engine's update",
            hint="start this process with NCCL_CUMEM_ENABLE=0, or this one and the engine's with NCCL_CUMEM_ENABLE=1",
        )
    timeout = timedelta(seconds=timeout_s)
    try:
        # Not shared with an earlier group on this port, as torch's own rendezvous would: the addresses that are left in
        # its store are of closed connections.
        store = dist.TCPStore(master_address, master_port, world_size, True, timeout=timeout, multi_tenant=False)
    except dist.DistNetworkError as error:
        raise ConfigError(
            f"cannot listen on {master_address}:{master_port}: {error}",
            hint="choose a free port; an earlier group keeps its port until the last reference to it is dropped",
        ) from error
    helper: Any = distributed_c10d._new_process_group_helper
    try:
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
    except BaseException:  # such as an interrupt that came while torch connected the ranks
        _forget(group_name)
        raise
    return group


def _forget(group_name: str) -> None:
    """Destroy a group that torch has registered and no one has, so that its name can be used again."""
    world = distributed_c10d._world
    for group in [group for group, name in world.pg_names.items() if name == group_name]:
        world.pg_group_ranks.setdefault(group, {})
        dist.destroy_process_group(group)


def announced(
    names: Sequence[str], dtypes: Sequence[str | torch.dtype], shapes: Sequence[Sequence[int]]
) -> list[Weight]:
    """Return the weights that rank 0 will send, checked.

    Raises:
        ConfigError: Lists of different lengths, an unknown dtype, an invalid shape.
        WeightsMismatchError: A repeated name.
    """
    for what, given in (("names", names), ("dtypes", dtypes), ("shapes", shapes)):
        check_type(what, given, Sequence, expected="a list")
    if isinstance(names, (str, bytes)) or not len(names) == len(dtypes) == len(shapes) or not len(names):
        raise ConfigError(
            f"got {len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes", hint="pass one of each per weight"
        )
    weights: list[Weight] = []
    seen: set[str] = set()
    for name, dtype, shape in zip(names, dtypes, shapes):
        check_text("a name", name)
        text = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else ""
        if not isinstance(getattr(torch, text, None), torch.dtype):
            raise ConfigError(f"{name} has dtype {shown(dtype)}, which is not torch's", hint='for example "bfloat16"')
        check_type(f"the shape of {name}", shape, Sequence, expected="a list of integers")
        if any(not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < _MAX_SIZE for n in shape):
            raise ConfigError(f"{name} has shape {shown(tuple(shape))}", hint="pass integers of at least 0")
        if name in seen:
            raise WeightsMismatchError(f"{name} is given twice", hint="names must be unique")
        seen.add(name)
        weights.append((name, torch.Size(shape), text))
    return weights


def requests(weights: Sequence[Weight], bucket_bytes: int) -> Iterator[list[Weight]]:
    """Split the weights into requests of at most `bucket_bytes`, in order: the engine keeps one request's in memory."""
    return split_into_buckets(
        weights, bucket_bytes, num_bytes=lambda weight: weight[1].numel() * getattr(torch, weight[2]).itemsize
    )


__all__ = ["DEFAULT_NAME", "UpdateGroup", "announced", "join_update_group", "requests"]
