"""The transfer plan of a rank: what the TP worker reads in place, and what is staged for it, stage by stage.  Pure.

The loader map says which part of which tensor each TP rank copies.  From that and from the shards of the training ranks
the rest follows: a part that lies in memory which the worker maps is read there; a part of this rank that the worker
does not map is staged; a part of another rank is sent to this rank's staging memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist

from tpcolocate.in_server.tpcolocate_receiver.regions import Region, whole
from tpcolocate.weights.plan.sharding import LocalShard, Shards, mesh_groups, shard_regions
from tpcolocate.weights.plan.slices import ReadsOfRanks, TensorSlice, cut, place, slices_of, within

Group = dist.ProcessGroup | None


@dataclass(frozen=True, slots=True)
class Stage:
    """What is staged at once.

    Attributes:
        group: Among whose ranks slices are sent; None if all of them lie here.
        receive: Position in the group -> slices that come from there.
        send: Position in the group -> slices that go there.
        local: This rank's own slices.
        receive_bytes: Staging memory of what is received, by position.
        send_bytes: Bytes that are sent, by position.
        num_bytes: Staging memory in all.
        is_sent: Whether any rank of the group sends anything; the all-to-all is left out otherwise.
    """

    group: Group
    receive: list[list[TensorSlice]]
    send: list[list[TensorSlice]]
    local: list[TensorSlice]
    receive_bytes: list[int]
    send_bytes: list[int]
    num_bytes: int
    is_sent: bool

    def staged(self) -> list[tuple[TensorSlice, int]]:
        """Return everything that the worker copies out of the staging memory, and the first byte of each."""
        found: list[tuple[TensorSlice, int]] = []
        end = 0
        for slices, size in zip([*self.receive, self.local], [*self.receive_bytes, 0]):
            found += zip(slices, place(slices, end)[0])
            end += size
        return found


@dataclass(frozen=True)
class TransferPlan:
    """What this rank does in every sync of the same tensors.

    Attributes:
        key: Prefix of the names of the worker's programs.
        direct: Slices that the worker copies out of mapped memory.
        stages: What is staged, one after the other.
    """

    key: str
    direct: list[TensorSlice]
    stages: list[Stage]

    @cached_property
    def stage_bytes(self) -> int:
        """Size of one half of the staging memory."""
        return max((stage.num_bytes for stage in self.stages), default=0)

    @cached_property
    def send_bytes(self) -> int:
        """Size of the memory that slices are sent from."""
        return max((sum(stage.send_bytes) for stage in self.stages), default=0)

    @cached_property
    def direct_bytes(self) -> int:
        """What the worker copies out of mapped memory."""
        return sum(one.num_bytes for one in self.direct)

    @cached_property
    def programs(self) -> dict[str, list[TensorSlice]]:
        """The worker's programs in order: name -> the slices whose checksums it reports."""
        staged = {f"{self.key}/{i}": [one for one, _ in stage.staged()] for i, stage in enumerate(self.stages)}
        return {f"{self.key}/direct": self.direct, **staged}


@dataclass(frozen=True, slots=True)
class TpLayout:
    """Where this rank and those of its meshes stand in their tp slices.

    Attributes:
        tp_rank: Of this rank.
        tp_size: Ranks of the slice.
        tp_ranks: Global rank -> TP rank, for all ranks of the job that share meshes with this one.
    """

    tp_rank: int
    tp_size: int
    tp_ranks: Mapping[int, int]

    def of_group(self, group: Group) -> list[int]:
        """Return the TP ranks of a group's ranks, in its order; of this rank alone without one."""
        return [self.tp_rank] if group is None else [self.tp_ranks[r] for r in dist.get_process_group_ranks(group)]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a tensor takes when it is staged.

    Attributes:
        num_bytes: Most staging memory on any rank.
        is_sent: Whether any rank sends some of it.
    """

    num_bytes: int
    is_sent: bool


@dataclass(frozen=True, slots=True)
class TransferRequest:
    """What is to be planned.

    Attributes:
        shards: What lies here, in the order of the sync.
        reads: Tensor -> what the TP ranks read of it.
        mapped: Names whose memory here is mapped by the worker.
        layout: Of the ranks.
    """

    shards: Shards
    reads: Mapping[str, ReadsOfRanks]
    mapped: frozenset[str]
    layout: TpLayout

    @property
    def groups(self) -> list[Group]:
        """None for what lies here, then the groups among which tensors are sharded; each is planned by itself."""
        return [None, *mesh_groups(self.shards)]

    def of_group(self, group: Group) -> list[str]:
        return [name for name, one in self.shards.items() if one.group is group]


def costs_here(request: TransferRequest, group: Group) -> dict[str, Cost]:
    """Return what each tensor of a group costs on this rank.

    The ranks of a group must agree on the largest cost of each tensor, so that they cut tensors into the same stages.
    Without a group, every rank of the slice computes the cost of all of them by itself.
    """
    if group is not None:
        stages = {name: _stage(request, group, [name], is_sent=True) for name in request.of_group(group)}
        return {
            name: Cost(max(one.num_bytes, sum(one.send_bytes)), sum(one.receive_bytes) > 0)
            for name, one in stages.items()
        }
    return {
        name: Cost(
            0
            if name in request.mapped
            else max(
                place(slices_of(name, of_rank, request.shards[name].regions))[1] for of_rank in request.reads[name]
            ),
            is_sent=False,
        )
        for name in request.of_group(None)
    }


def plan_transfer(
    request: TransferRequest, costs: Mapping[Group, Mapping[str, Cost]], *, staging_bytes: int, key: str
) -> TransferPlan:
    """Plan what this rank transfers.

    Args:
        request: What is to be planned.
        costs: Group -> tensor -> cost; the same on all ranks of the group.
        staging_bytes: For both halves of the staging memory and what is sent from.
        key: Of the plan; new.
    """
    tp_rank = request.layout.tp_rank
    direct = [
        one
        for name, shard in request.shards.items()
        if name in request.mapped
        for one in slices_of(name, request.reads[name][tp_rank], shard.regions)
        if one.holder == shard.position
    ]
    stages: list[Stage] = []
    for group, of_group in costs.items():
        # Two halves and, where something is sent, memory to send it from.
        limit = staging_bytes // (2 if group is None else 3)
        sizes = {name: cost.num_bytes for name, cost in of_group.items()}
        for names in cut([name for name in of_group if sizes[name]], sizes, limit):
            is_sent = any(of_group[name].is_sent for name in names)
            chunks: list[Region | None] = [None]
            if sizes[names[0]] > limit:
                chunks = [*_chunks(request, group, names[0], limit)]
            stages += [_stage(request, group, names, is_sent=is_sent, chunk=chunk) for chunk in chunks]
    return TransferPlan(key, direct, stages)


def _chunks(request: TransferRequest, group: Group, name: str, limit: int) -> list[Region]:
    """Cut a tensor that does not fit at once, along its longest dimension."""
    shape = request.shards[name].shape
    size = max((read.dtype.itemsize for of_rank in request.reads[name] for read in of_rank), default=1)
    dim = max(range(len(shape)), key=lambda d: shape[d])
    # All of a chunk may lie on one rank, which sends it to the workers of every slice of ranks.
    num_readers = 1 if group is None else max(dist.get_world_size(group) // request.layout.tp_size, 1)
    num_bytes = whole(shape).volume * size * num_readers
    return [one for one in shard_regions(shape, dim, min(-(-num_bytes // limit), shape[dim])) if one.volume]


def _stage(
    request: TransferRequest, group: Group, names: list[str], *, is_sent: bool, chunk: Region | None = None
) -> Stage:
    tp_ranks = request.layout.of_group(group)
    receive: list[list[TensorSlice]] = [[] for _ in tp_ranks]
    send: list[list[TensorSlice]] = [[] for _ in tp_ranks]
    local: list[TensorSlice] = []
    for name in names:
        shard: LocalShard = request.shards[name]
        reads = request.reads[name]
        for one in within(slices_of(name, reads[request.layout.tp_rank], shard.regions), chunk):
            if one.holder != shard.position:
                receive[one.holder].append(one)
            elif name not in request.mapped:
                local.append(one)
        given = {k: within(slices_of(name, reads[k], [shard.region]), chunk) for k in set(tp_ranks)}
        for position, tp_rank in enumerate(tp_ranks):
            if position != shard.position:
                send[position] += given[tp_rank]
    receive_bytes = [place(slices)[1] for slices in receive]
    return Stage(
        group,
        receive,
        send,
        local,
        receive_bytes=receive_bytes,
        send_bytes=[place(slices)[1] for slices in send],
        num_bytes=place(local, sum(receive_bytes))[1],
        is_sent=is_sent,
    )


__all__ = ["Cost", "Group", "Stage", "TpLayout", "TransferPlan", "TransferRequest", "costs_here", "plan_transfer"]
