"""Moving to every TP worker just the parts that it reads: by mapped memory, or through a little staging memory.

The plan of what lies where is pure (`moves`); this is its execution on one rank: views of this rank's shards, one
all-to-all per step over the ranks that hold shards of the same tensors, and the sums that prove what arrived.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tpcolocate.errors import DeadlineError
from tpcolocate.weights.plan.sharding import Layout, LocalShard, layout_of
from tpcolocate.weights.plan.slices import ReadsOfRanks, Region, TensorSlice, cut, place, shards, slices_of, whole
from tpcolocate.weights.plan.transfer_plan import Stage, TransferPlan
from tpcolocate.weights.sources.lazy_tensor import Item, LazyTensor, local_of
from tpcolocate.weights.transport.checksums import Sums
from tpcolocate.weights.transport.mapped_memory import PersistentMappings


@dataclass(frozen=True, slots=True)
class Ready:
    """What moving takes, beside the moves.

    Attributes:
        halves: Both halves of the staging memory.
        sending: Memory that parts are sent from.
        sums: What must arrive, begun.
    """

    halves: list[torch.Tensor]
    sending: torch.Tensor
    sums: Sums


class Transfer:
    """One rank's moves, for one engine.

    Args:
        device: Where staging memory lies.
        tp_rank: This rank's worker.
        tp_ranks: Global rank -> TP rank, for all ranks of the job that share meshes with this one.
        tp_size: Ranks of the slice.
    """

    def __init__(self, device: torch.device, *, tp_rank: int, tp_ranks: Mapping[int, int], tp_size: int) -> None:
        self.device = device
        self.tp_rank = tp_rank
        self.tp_ranks = tp_ranks
        self.tp_size = tp_size
        self.loans = PersistentMappings(device)
        self.deadline = math.inf
        """Of the sync in progress, in `time.monotonic` time: for the collectives over the meshes of the weights."""
        self._numbers = itertools.count()
        self._layouts: dict[object, Layout | None] = {}

    def hold(self, tensor: Item) -> LocalShard | None:
        """How a tensor lies among the ranks; None for what only `full_tensor` can put together, or compute.

        Known are plain tensors, and DTensors that are sharded once and otherwise replicated (FSDP2, HSDP, DTensor
        tensor parallelism).  Cheap: called for every tensor at every sync.
        """
        shape = tuple(tensor.shape)
        if isinstance(tensor, LazyTensor):
            return None
        if not isinstance(tensor, DTensor):
            return LocalShard(shape, tensor.detach(), (whole(shape),))
        kind = (shape, tensor.device_mesh, tensor.placements)
        if kind not in self._layouts:
            self._layouts[kind] = layout_of(*kind)
        found = self._layouts[kind]
        if found is None:
            return None
        slabs, position, group = found
        local = local_of(tensor).detach()
        if tuple(local.shape) != slabs[position].lengths:
            return None
        return LocalShard(shape, local, slabs, position, group)

    @staticmethod
    def groups(tensors: Mapping[str, LocalShard]) -> list[dist.ProcessGroup]:
        """The groups among which tensors are sharded, in the order in which they are met."""
        found: list[dist.ProcessGroup] = []
        for one in tensors.values():
            if one.group is not None and one.group not in found:
                found.append(one.group)
        return found

    def least(self, group: dist.ProcessGroup, flags: Sequence[int]) -> list[int]:
        """The smallest of every number among the ranks of a group.  Collective: over the group."""
        told = torch.tensor(flags, dtype=torch.int64, device=self.device_of(group))
        self.finish(dist.all_reduce(told, op=dist.ReduceOp.MIN, group=group, async_op=True))
        return told.tolist()

    def finish(self, work: dist.Work | None) -> None:
        """Wait for a collective over a mesh, on a CPU no longer than the sync may take.

        On a GPU this waits for nothing but orders the streams; a rank that stays away is then NCCL's watchdog's to end.

        Raises:
            DeadlineError: The other ranks did not come.
        """
        assert work is not None
        if self.deadline == math.inf or self.device.type != "cpu":
            work.wait()
            return
        try:
            work.wait(timedelta(seconds=max(self.deadline - time.monotonic(), 0.001)))
        except RuntimeError as error:
            if time.monotonic() < self.deadline:
                raise
            raise DeadlineError(
                f"other ranks did not move their parts in time: {error}",
                hint="the cause is the first error printed by another rank",
            ) from error

    def device_of(self, group: dist.ProcessGroup) -> torch.device:
        # Shards that were moved to the CPU still belong to a mesh of GPUs, whose groups take CUDA tensors alone.
        return torch.device("cpu") if "nccl" not in dist.get_backend(group) else self.device

    def plan(
        self,
        tensors: Mapping[str, LocalShard],
        reads: Mapping[str, ReadsOfRanks],
        lent: set[str],
        *,
        staging_bytes: int,
    ) -> TransferPlan:
        """Plan the moves of these tensors.

        Collective: over the groups among which they are sharded.

        Args:
            tensors: What lies here, by name, in the order of the sync.
            reads: What the TP ranks read.
            lent: Names whose memory here is mapped by the worker.
            staging_bytes: For both halves of the staging memory and what is sent from.
        """
        direct = [
            piece
            for name, one in tensors.items()
            if name in lent
            for piece in slices_of(name, reads[name][self.tp_rank], one.slabs)
            if piece.holder == one.position
        ]
        steps: list[Stage] = []
        for group in [None, *self.groups(tensors)]:
            names = [name for name, one in tensors.items() if one.group is group]
            # Two halves and, where something is sent, a place to send it from.
            room = staging_bytes // (2 if group is None else 3)
            costs, sent = self._costs(group, {name: tensors[name] for name in names}, reads, lent)
            large = {name for name in names if costs[name] > room}
            for unit in cut([name for name in names if costs[name]], costs, room):
                if unit[0] not in large:
                    steps.append(
                        self._step(group, {n: tensors[n] for n in unit}, reads, lent, any(sent[n] for n in unit))
                    )
                    continue
                [name] = unit
                for chunk in self._chunks(tensors[name], room, reads[name], group):
                    steps.append(self._step(group, {name: tensors[name]}, reads, lent, sent[name], chunk))
        return TransferPlan(
            key=f"moves{next(self._numbers)}",
            direct=direct,
            steps=steps,
            stage_bytes=max((step.num_bytes for step in steps), default=0),
            send_bytes=max((sum(step.num_going) for step in steps), default=0),
        )

    def _chunks(self, one: LocalShard, room: int, reads: ReadsOfRanks, group: dist.ProcessGroup | None) -> list[Region]:
        """A tensor that does not fit at once, in slices along its longest dimension."""
        size = max((read.dtype.itemsize for of_rank in reads for read in of_rank), default=1)
        dim = max(range(len(one.shape)), key=lambda d: one.shape[d])
        # All of a slice may lie on one rank, which sends it to the workers of every slice of ranks.
        num_readers = 1 if group is None else max(dist.get_world_size(group) // self.tp_size, 1)
        num_bytes = whole(one.shape).volume * size * num_readers
        return [box for box in shards(one.shape, dim, min(-(-num_bytes // room), one.shape[dim])) if box.volume]

    def _costs(
        self,
        group: dist.ProcessGroup | None,
        tensors: Mapping[str, LocalShard],
        reads: Mapping[str, ReadsOfRanks],
        lent: set[str],
    ) -> tuple[dict[str, int], dict[str, bool]]:
        """Most staging memory that any rank needs per tensor, and whether any rank sends some of it.

        All ranks that move tensors together come to the same numbers, so that they cut them into the same steps.
        """
        if group is None:
            found = {
                name: 0
                if name in lent
                else max(place(slices_of(name, of_rank, one.slabs))[1] for of_rank in reads[name])
                for name, one in tensors.items()
            }
            return found, dict.fromkeys(tensors, False)
        mine = []
        for name, one in tensors.items():
            step = self._step(group, {name: one}, reads, lent, True)
            mine.append((max(step.num_bytes, sum(step.num_going)), sum(step.num_coming)))
        most = torch.tensor(mine, dtype=torch.int64, device=self.device_of(group))
        self.finish(dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group, async_op=True))
        return (
            {name: cost for name, (cost, _) in zip(tensors, most.tolist())},
            {name: coming > 0 for name, (_, coming) in zip(tensors, most.tolist())},
        )

    def _step(
        self,
        group: dist.ProcessGroup | None,
        tensors: Mapping[str, LocalShard],
        reads: Mapping[str, ReadsOfRanks],
        lent: set[str],
        is_sent: bool,
        chunk: Region | None = None,
    ) -> Stage:
        ranks = [self.tp_rank] if group is None else [self.tp_ranks[r] for r in dist.get_process_group_ranks(group)]
        step = Stage(group, coming=[[] for _ in ranks], going=[[] for _ in ranks], is_sent=is_sent)
        for name, one in tensors.items():
            for piece in _within(slices_of(name, reads[name][self.tp_rank], one.slabs), chunk):
                if piece.holder != one.position:
                    step.coming[piece.holder].append(piece)
                elif name not in lent:
                    step.local.append(piece)
            given = {k: _within(slices_of(name, reads[name][k], [one.slab]), chunk) for k in set(ranks)}
            for position, tp_rank in enumerate(ranks):
                if position != one.position:
                    step.going[position] += given[tp_rank]
        step.num_coming = [place(pieces)[1] for pieces in step.coming]
        step.num_going = [place(pieces)[1] for pieces in step.going]
        step.num_bytes = place(step.local, sum(step.num_coming))[1]
        return step

    # --- what the worker is told -------------------------------------------------------------------------------

    def definitions(
        self, moves: TransferPlan, tensors: Mapping[str, LocalShard], borrowed: Mapping[int, str] | None = None
    ) -> list[list[Any]]:
        """The worker's programs: [key, pieces]; see `tpcolocate_receiver.plans.Program`.

        Args:
            moves: That are to be made.
            tensors: What lies here.
            borrowed: Storage -> region, of what is mapped and no loan.
        """
        borrowed = {} if borrowed is None else borrowed
        direct = []
        for piece in moves.direct:
            one = tensors[piece.name]
            view = piece.view(one.local, one.slab)
            storage = view.untyped_storage()
            region = borrowed.get(storage._cdata)
            if region is None:
                loan = self.loans.find(storage)
                assert loan is not None
                region = loan.name
            first = view.data_ptr() - storage.data_ptr()
            direct.append(_told(piece, region, first, view.dtype, view.stride()))
        told: list[list[Any]] = [[f"{moves.key}/direct", direct]]
        for i, step in enumerate(moves.steps):
            staged = [
                _told(piece, f"stage{i % 2}", first, piece.read.dtype, _contiguous(piece.shape))
                for piece, first in step.staged()
            ]
            told.append([f"{moves.key}/{i}", staged])
        return told

    # --- moving --------------------------------------------------------------------------------------------------

    def stage(self, step: Stage, tensors: Mapping[str, LocalShard], half: torch.Tensor, sending: torch.Tensor) -> None:
        """Fill one half of the staging memory.

        Collective: over the step's group.

        Args:
            step: Of this rank's moves.
            tensors: What lies here.
            half: Staging memory, a flat uint8 tensor.
            sending: Memory to send from, likewise.
        """
        end = sum(step.num_coming)
        if step.is_sent:
            first, targets, sources = 0, [], []
            for pieces, size in zip(step.going, step.num_going):
                for piece, start in zip(pieces, place(pieces, first)[0]):
                    targets.append(_at(sending, piece, start))
                    sources.append(piece.view(tensors[piece.name].local, tensors[piece.name].slab))
                first += size
            _copy(targets, sources)
            self.finish(
                dist.all_to_all_single(
                    half[:end], sending[:first], step.num_coming, step.num_going, group=step.group, async_op=True
                )
            )
        _copy(
            [_at(half, piece, start) for piece, start in zip(step.local, place(step.local, end)[0])],
            [piece.view(tensors[piece.name].local, tensors[piece.name].slab) for piece in step.local],
        )
        if half.is_cuda:
            # The reader's streams know nothing of ours.
            torch.cuda.current_stream(half.device).synchronize()

    def begin_sums(self, moves: TransferPlan, tensors: Mapping[str, LocalShard]) -> Sums:
        """Start to sum up everything that this rank's memory gives to any worker; on a GPU nothing is waited for."""
        return Sums(self, moves, tensors)


def _within(pieces: Sequence[TensorSlice], chunk: Region | None) -> list[TensorSlice]:
    if chunk is None:
        return list(pieces)
    return [
        TensorSlice(piece.name, piece.read, part, piece.holder)
        for piece in pieces
        if (part := piece.part.meet(chunk)) is not None
    ]


def _told(piece: TensorSlice, region: str, first: int, dtype: torch.dtype, strides: Sequence[int]) -> list[Any]:
    starts, lengths = piece.target()
    return [
        piece.name, piece.read.number, starts, lengths, region, first, str(dtype).removeprefix("torch."), list(strides),
    ]  # fmt: skip


def _contiguous(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return strides[::-1]


def _at(memory: torch.Tensor, piece: TensorSlice, start: int) -> torch.Tensor:
    return memory[start : start + piece.num_bytes].view(piece.read.dtype).view(piece.shape)


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


__all__ = ["Transfer", "Ready"]
