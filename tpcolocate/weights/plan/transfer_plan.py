"""The transfer plan of a rank: what workers read where it lies, and what is staged for them, stage by stage.  Pure.

The loader map says which part of which tensor each TP rank copies.  From that and from the shards of the training ranks
the rest follows.  A part that lies in memory which the reading worker maps, its own rank's or another's, is read there.
What cannot be mapped (memory on the CPU, memory with another address at each sync, computed tensors) its rank
puts into staging memory, which the readers map.  Where a worker cannot map a rank's memory at all (another
host, no peer access) the part is sent to the staging memory of the worker's own rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist

from tpcolocate.in_server.tpcolocate_receiver.regions import Region, whole
from tpcolocate.weights.plan.sharding import Shards, mesh_groups, shard_regions
from tpcolocate.weights.plan.slices import (
    ALIGNMENT,
    Block,
    Read,
    ReadsOfRanks,
    SliceCutter,
    TensorSlice,
    block_of,
    cut,
    place,
    within,
)

Group = dist.ProcessGroup | None
DirectBlocks = Mapping[tuple[Group, int], Block]
"""(group, TP rank) -> what the workers of that TP rank, which reach this rank, read of it where it lies."""


@dataclass(frozen=True, slots=True)
class TpLayout:
    """Where this rank and those of its meshes stand in their tp slices.

    Attributes:
        rank: This global rank.
        slice_ranks: Global ranks of its slice, in tp order.
        tp_ranks: Global rank -> TP rank, for all ranks of the job that share meshes with this one.
    """

    rank: int
    slice_ranks: tuple[int, ...]
    tp_ranks: Mapping[int, int]

    @property
    def tp_rank(self) -> int:
        return self.slice_ranks.index(self.rank)

    @property
    def tp_size(self) -> int:
        return len(self.slice_ranks)

    def ranks_of(self, group: Group) -> list[int]:
        """Return a group's global ranks, in its order; this rank alone without one."""
        return [self.rank] if group is None else dist.get_process_group_ranks(group)

    def of_group(self, group: Group) -> list[int]:
        """Return the TP ranks of a group's ranks, in its order; of this rank alone without one."""
        return [self.tp_rank] if group is None else [self.tp_ranks[r] for r in self.ranks_of(group)]

    def spans_slices(self, group: Group) -> bool:
        """Return whether a group has ranks of other slices; the same on all of its ranks."""
        return not set(self.slice_ranks).issuperset(self.ranks_of(group))


@dataclass(frozen=True, slots=True)
class Reach:
    """Which workers can map which ranks' memory, among the ranks of a group; the same on all of them.

    Attributes:
        pairs: (position of the worker's rank, position of the rank whose memory it is).
    """

    pairs: frozenset[tuple[int, int]] = frozenset()

    def can(self, reader: int, holder: int) -> bool:
        """Return whether it can; a worker reaches its own rank."""
        return reader == holder or (reader, holder) in self.pairs

    def is_complete(self, size: int) -> bool:
        """Return whether all of `size` ranks reach each other."""
        return all(self.can(reader, holder) for reader in range(size) for holder in range(size))


@dataclass(frozen=True, slots=True)
class Stage:
    """What is staged at once.

    Attributes:
        group: Among whose ranks the tensors are sharded; None if all of them lie here.
        names: Of the tensors.
        given: TP rank -> slices of this rank that the workers of that TP rank read in this rank's staging memory.
        send: Position in the group -> slices that go to the staging memory there.
        receive: Position in the group -> slices that come from there.
        taken: What this rank's worker copies: position of the rank in whose staging memory it lies, slice, first byte.
        receive_bytes: Staging memory of what is received, by position.
        send_bytes: Bytes that are sent, by position.
        num_bytes: Staging memory of this rank in all.
        is_sent: Whether any rank of the group sends anything; the all-to-all is left out otherwise.
        position: Of this rank in the group.
    """

    group: Group
    names: Sequence[str]
    given: Mapping[int, Sequence[TensorSlice]]
    send: Sequence[Sequence[TensorSlice]]
    receive: Sequence[Sequence[TensorSlice]]
    taken: Sequence[tuple[int, TensorSlice, int]]
    receive_bytes: Sequence[int]
    send_bytes: Sequence[int]
    num_bytes: int
    is_sent: bool
    position: int

    @property
    def given_bytes(self) -> int:
        """Where what is received begins."""
        return self.num_bytes - sum(self.receive_bytes)


@dataclass(frozen=True)
class TransferPlan:
    """What this rank does in every sync of the same tensors.

    Attributes:
        key: Prefix of the names of the worker's programs.
        blocks: (group, TP rank) -> what the workers of that TP rank, which reach this rank, read where it lies here.
        sources: (group, position) of the ranks whose memory this rank's worker reads, in the order of its program.
        stages: What is staged, one after the other.
        readers: Global ranks whose workers read this rank's staging memory.
        layout: Of the ranks.
    """

    key: str
    blocks: DirectBlocks
    sources: Sequence[tuple[Group, int]]
    stages: Sequence[Stage]
    readers: Sequence[int]
    layout: TpLayout

    @cached_property
    def stage_bytes(self) -> int:
        """Size of one half of the staging memory."""
        return max((stage.num_bytes for stage in self.stages), default=0)

    @cached_property
    def send_bytes(self) -> int:
        """Size of the memory that slices are sent from."""
        return max((sum(stage.send_bytes) for stage in self.stages), default=0)

    @cached_property
    def staged_bytes(self) -> int:
        """What the worker copies out of staging memory."""
        return sum(one.num_bytes for stage in self.stages for _, one, _ in stage.taken)

    @cached_property
    def staged_names(self) -> list[str]:
        """Tensors of which something is staged on some rank, in the order of the sync; the same on all ranks of a group."""
        return list(dict.fromkeys(name for stage in self.stages for name in stage.names))

    @cached_property
    def programs(self) -> list[str]:
        """Names of the worker's programs, in order."""
        return [f"{self.key}/direct", *(f"{self.key}/{i}" for i in range(len(self.stages)))]

    @cached_property
    def groups(self) -> list[dist.ProcessGroup]:
        """Groups whose ranks exchange checksums, in the order of the sources."""
        groups = [*(group for group, _ in self.sources), *(stage.group for stage in self.stages)]
        return [group for group in dict.fromkeys(groups) if group is not None]

    @property
    def source_ranks(self) -> list[int]:
        """Global ranks in whose staging memory this rank's worker reads, this rank first."""
        found = {self.layout.rank: None}
        for stage in self.stages:
            ranks = self.layout.ranks_of(stage.group)
            found |= {ranks[position]: None for position, _, _ in stage.taken}
        return list(found)


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
        mapped: Names whose memory the workers map, on every rank that they reach.
        layout: Of the ranks.
        reach: Group -> which workers can map which ranks' memory.
        cutter: Of what the TP ranks read.
    """

    shards: Shards
    reads: Mapping[str, ReadsOfRanks]
    mapped: frozenset[str]
    layout: TpLayout
    reach: Mapping[Group, Reach]
    cutter: SliceCutter = field(default_factory=SliceCutter, compare=False)

    @property
    def groups(self) -> list[Group]:
        """None for what lies here, then the groups among which tensors are sharded; each is planned by itself."""
        return [None, *mesh_groups(self.shards)]

    def of_group(self, group: Group) -> list[str]:
        return [name for name, one in self.shards.items() if one.group is group]

    def position(self, group: Group) -> int:
        """Return this rank's position in a group."""
        return self.layout.ranks_of(group).index(self.layout.rank)

    def can(self, group: Group, reader: int, holder: int) -> bool:
        return self.reach.get(group, Reach()).can(reader, holder)

    def staged(self, group: Group) -> list[str]:
        """Return the tensors of which something is staged on some rank of the group."""
        names = self.of_group(group)
        if self.reach.get(group, Reach()).is_complete(len(self.layout.ranks_of(group))):
            return [name for name in names if name not in self.mapped]
        return names

    def readers(self, group: Group, *, of: int) -> dict[int, int]:
        """Return position -> TP rank of the workers that reach the rank at a position."""
        return {q: k for q, k in enumerate(self.layout.of_group(group)) if self.can(group, q, of)}


def blocks_here(request: TransferRequest) -> DirectBlocks:
    """Return what workers read of this rank where it lies, by group and TP rank."""
    found: dict[tuple[Group, int], Block] = {}
    for group in request.groups:
        shards = [(name, request.shards[name]) for name in request.of_group(group) if name in request.mapped]
        regions = [(name, request.reads[name], shard.region, shard.position) for name, shard in shards]
        for k in sorted(set(request.readers(group, of=request.position(group)).values())):
            found[group, k] = block_of(
                [
                    TensorSlice(name, kind)
                    for name, reads, region, position in regions
                    for kind in request.cutter.cut(reads[k], region, position)
                ]
            )
    return found


def readers_here(request: TransferRequest, names: Collection[str]) -> dict[int, tuple[torch.UntypedStorage, list[int]]]:
    """Return this rank's storages that workers read where they lie, and the global ranks of these workers.

    Args:
        request: What is to be planned.
        names: Of the tensors that count.

    Returns:
        ``_cdata`` of the storage -> the storage, ranks.
    """
    readers_of: dict[tuple[Group, int, int, int], list[int]] = {}  # of tensors that are read and sharded alike
    found: dict[int, tuple[torch.UntypedStorage, dict[int, None]]] = {}
    for name, shard in request.shards.items() if names else ():
        if name not in names or not shard.local.numel():
            continue
        reads, region = request.reads[name], shard.region
        key = shard.group, shard.position, id(reads), id(region)
        readers = readers_of.get(key)
        if readers is None:
            ranks = request.layout.ranks_of(shard.group)
            readers = readers_of[key] = [
                ranks[q]
                for q, k in request.readers(shard.group, of=shard.position).items()
                if request.cutter.cut(reads[k], region, shard.position)
            ]
        if readers:
            storage = shard.local.untyped_storage()
            of_storage = found.get(storage._cdata)
            if of_storage is None:
                of_storage = found[storage._cdata] = storage, {}
            of_storage[1].update(dict.fromkeys(readers))
    return {key: (storage, list(readers)) for key, (storage, readers) in found.items()}


def costs_here(request: TransferRequest, group: Group) -> dict[str, Cost]:
    """Return what each tensor of a group costs on this rank, if it is staged.

    The ranks of a group must agree on the largest cost of each tensor, so that they cut tensors into the same stages.
    Without a group, every rank of the slice computes the cost of all of them by itself.
    """
    if group is not None:
        stages = {name: _stage(request, group, [name], is_sent=True) for name in request.staged(group)}
        return {
            name: Cost(max(one.num_bytes, sum(one.send_bytes)), sum(one.receive_bytes) > 0)
            for name, one in stages.items()
        }
    return {
        name: Cost(
            max(_placed_bytes(request, name, of_rank) for of_rank in request.reads[name]),
            is_sent=False,
        )
        for name in request.staged(None)
    }


def _placed_bytes(request: TransferRequest, name: str, reads: Sequence[Read]) -> int:
    regions = request.shards[name].regions
    kinds = [kind for holder, region in enumerate(regions) for kind in request.cutter.cut(reads, region, holder)]
    return place([TensorSlice(name, kind) for kind in kinds])[1]


def plan_transfer(
    request: TransferRequest,
    costs: Mapping[Group, Mapping[str, Cost]],
    *,
    staging_bytes: int,
    key: str,
    blocks: DirectBlocks | None = None,
) -> TransferPlan:
    """Plan what this rank transfers.

    Args:
        request: What is to be planned.
        costs: Group -> tensor -> cost; the same on all ranks of the group.
        blocks: From `blocks_here`, if that is known already.
        staging_bytes: For both halves of the staging memory and what is sent from.
        key: Of the plan; new.
    """
    stages: list[Stage] = []
    readers = {request.layout.rank: None}
    for group, of_group in costs.items():
        # Two halves and, where something is sent, memory to send it from.
        # However little that is, a slice at a time fits.
        limit = max(staging_bytes // (3 if any(cost.is_sent for cost in of_group.values()) else 2), ALIGNMENT)
        sizes = {name: cost.num_bytes for name, cost in of_group.items()}
        for names in cut([name for name in of_group if sizes[name]], sizes, limit):
            is_sent = any(of_group[name].is_sent for name in names)
            chunks: list[Region | None] = [None]
            if sizes[names[0]] > limit:
                chunks = [*_chunks(request, group, names[0], limit)]
            stages += [_stage(request, group, names, is_sent=is_sent, chunk=chunk) for chunk in chunks]
        ranks = request.layout.ranks_of(group)
        taken = {k for stage in stages if stage.group is group for k, slices in stage.given.items() if slices}
        here = request.readers(group, of=request.position(group))
        readers |= {ranks[q]: None for q, k in here.items() if k in taken}
    blocks = blocks_here(request) if blocks is None else blocks
    return TransferPlan(key, blocks, _sources(request), stages, list(readers), request.layout)


def _sources(request: TransferRequest) -> list[tuple[Group, int]]:
    found: list[tuple[Group, int]] = []
    for group in request.groups:
        size = len(request.layout.ranks_of(group))
        me = request.position(group)
        # Every worker begins with the memory of its own rank and goes round, so that they do not all read one GPU at once.
        found += [(group, p) for p in ((me + i) % size for i in range(size)) if request.can(group, me, p)]
    return found


def _chunks(request: TransferRequest, group: Group, name: str, limit: int) -> list[Region]:
    """Cut a tensor that does not fit at once, along its longest dimension."""
    shape = request.shards[name].shape
    size = max((read.dtype.itemsize for of_rank in request.reads[name] for read in of_rank), default=1)
    dim = max(range(len(shape)), key=lambda d: shape[d])
    # All of a chunk may lie on one rank, which gives it to the workers of every TP rank and of every slice of ranks.
    num_readers = 1 if group is None else len(request.layout.ranks_of(group))
    num_bytes = whole(shape).volume * size * num_readers
    return [one for one in shard_regions(shape, dim, min(-(-num_bytes // limit), shape[dim])) if one.volume]


def _stage(
    request: TransferRequest, group: Group, names: Sequence[str], *, is_sent: bool, chunk: Region | None = None
) -> Stage:
    tp_ranks, me = request.layout.of_group(group), request.position(group)
    size = len(tp_ranks)
    given = _given(request, group, names, chunk, me)
    send: list[list[TensorSlice]] = [[] for _ in tp_ranks]
    for position, k in enumerate(tp_ranks):
        if not request.can(group, position, me):
            send[position] = [one for name in names for one in _slices(request, name, k, me, chunk)]
    taken: list[tuple[int, TensorSlice, int]] = []
    receive: list[list[TensorSlice]] = [[] for _ in tp_ranks]
    for position in range(size):
        if not request.can(group, me, position):
            receive[position] = [one for name in names for one in _slices(request, name, tp_ranks[me], position, chunk)]
    receive_bytes = [place(slices)[1] for slices in receive]
    given_bytes = _placed(given)[1]
    starts = [given_bytes + sum(receive_bytes[:position]) for position in range(size)]
    for position in ((me + i) % size for i in range(size)):
        if request.can(group, me, position):
            there = given if position == me else _given(request, group, names, chunk, position)
            taken += [(position, one, first) for k, one, first in _placed(there)[0] if k == tp_ranks[me]]
        else:
            placed = zip(receive[position], place(receive[position], starts[position])[0])
            taken += [(me, one, first) for one, first in placed]
    return Stage(
        group,
        names,
        given,
        send,
        receive,
        taken,
        receive_bytes=receive_bytes,
        send_bytes=[place(slices)[1] for slices in send],
        num_bytes=given_bytes + sum(receive_bytes),
        is_sent=is_sent,
        position=me,
    )


def _given(
    request: TransferRequest, group: Group, names: Sequence[str], chunk: Region | None, holder: int
) -> dict[int, list[TensorSlice]]:
    """Return what the rank at a position puts into its staging memory: TP rank -> slices, in order."""
    tp_ranks = sorted(set(request.readers(group, of=holder).values()))
    unmapped = [name for name in names if name not in request.mapped]
    return {k: [one for name in unmapped for one in _slices(request, name, k, holder, chunk)] for k in tp_ranks}


def _slices(request: TransferRequest, name: str, k: int, holder: int, chunk: Region | None) -> list[TensorSlice]:
    region = request.shards[name].regions[holder]
    kinds = request.cutter.cut(request.reads[name][k], region, holder)
    return within([TensorSlice(name, kind) for kind in kinds], chunk)


def _placed(given: Mapping[int, Sequence[TensorSlice]]) -> tuple[list[tuple[int, TensorSlice, int]], int]:
    """Return TP rank, slice and first byte of what a rank gives in its staging memory, and where it ends."""
    found: list[tuple[int, TensorSlice, int]] = []
    end = 0
    for k, slices in given.items():
        starts, end = place(slices, end)
        found += ((k, one, start) for one, start in zip(slices, starts))
    return found, end


def placed_given(stage: Stage) -> Iterator[tuple[int, TensorSlice, int]]:
    """Yield TP rank, slice and first byte of what this rank gives in a stage."""
    yield from _placed(stage.given)[0]


__all__ = [
    "Cost",
    "DirectBlocks",
    "Group",
    "Reach",
    "Stage",
    "TpLayout",
    "TransferPlan",
    "TransferRequest",
    "blocks_here",
    "costs_here",
    "placed_given",
    "plan_transfer",
    "readers_here",
]
