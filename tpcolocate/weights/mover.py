"""Moving to every TP worker just the parts that it reads: by mapped memory, or through a little staging memory.

The plan of what lies where is pure (`moves`); this is its execution on one rank: views of this rank's shards, one
all-to-all per step over the ranks that hold shards of the same tensors, and the sums that prove what arrived.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tpcolocate.errors import DeadlineError
from tpcolocate.in_server.tpcolocate_receiver.replay import Lanes, Replay
from tpcolocate.in_server.tpcolocate_receiver.sums import word_sum, word_view
from tpcolocate.weights.held import Held, Layout, layout_of
from tpcolocate.weights.items import Derived, Item, local_of
from tpcolocate.weights.loans import Loans
from tpcolocate.weights.moves import Box, Piece, ReadsOfRanks, cut, pieces_of, place, shards, whole


@dataclass(slots=True)
class Step:
    """What is staged at once.

    Attributes:
        group: Among whose ranks parts are sent; None if all of them lie here.
        coming: Position in the group -> pieces that come from there.
        going: Position in the group -> pieces that go there.
        local: This rank's own pieces.
        num_coming: Bytes of staging memory of what comes, by position.
        num_going: Bytes of what goes, by position.
        num_bytes: Staging memory in all.
        is_sent: Whether any rank of the group sends anything; the all-to-all is left out otherwise.
    """

    group: dist.ProcessGroup | None
    coming: list[list[Piece]] = field(default_factory=list)
    going: list[list[Piece]] = field(default_factory=list)
    local: list[Piece] = field(default_factory=list)
    num_coming: list[int] = field(default_factory=list)
    num_going: list[int] = field(default_factory=list)
    num_bytes: int = 0
    is_sent: bool = False

    def staged(self) -> list[tuple[Piece, int]]:
        """Everything that this rank's worker copies out of the staging memory, and where it lies."""
        found: list[tuple[Piece, int]] = []
        end = 0
        for pieces, size in zip([*self.coming, self.local], [*self.num_coming, 0]):
            found += zip(pieces, place(pieces, end)[0])
            end += size
        return found


@dataclass
class Moves:
    """What this rank does in every sync of the same tensors.

    Attributes:
        key: Names the worker's programs.
        direct: Pieces that the worker copies out of mapped memory.
        steps: What is staged, one after the other.
        stage_bytes: Size of one half of the staging memory.
        send_bytes: Size of the memory that parts are sent from.
        words: Where each of `direct` lies in its storage, in whole words, as shape, strides and offset; None where it does
            not, or is cast.  Filled at the first sync; the moves are others when a tensor lies elsewhere.
        sums: Of `direct`, of the sync in progress.
        replay: How they are computed.
    """

    key: str
    direct: list[Piece]
    steps: list[Step]
    stage_bytes: int
    send_bytes: int
    words: list[tuple[torch.Size, tuple[int, ...], int] | None] = field(default_factory=list)
    sums: torch.Tensor | None = None
    replay: Replay | None = None

    @cached_property
    def direct_bytes(self) -> int:
        """What the worker copies out of mapped memory."""
        return sum(piece.num_bytes for piece in self.direct)

    @cached_property
    def programs(self) -> dict[str, list[Piece]]:
        """What the worker runs, in order: its name, and the pieces whose sums it tells."""
        staged = {f"{self.key}/{i}": [piece for piece, _ in step.staged()] for i, step in enumerate(self.steps)}
        return {f"{self.key}/direct": self.direct, **staged}


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


class Mover:
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
        self.loans = Loans(device)
        self.deadline = math.inf
        """Of the sync in progress, in `time.monotonic` time: for the collectives over the meshes of the weights."""
        self._numbers = itertools.count()
        self._layouts: dict[object, Layout | None] = {}

    def hold(self, tensor: Item) -> Held | None:
        """How a tensor lies among the ranks; None for what only `full_tensor` can put together, or compute.

        Known are plain tensors, and DTensors that are sharded once and otherwise replicated (FSDP2, HSDP, DTensor
        tensor parallelism).  Cheap: called for every tensor at every sync.
        """
        shape = tuple(tensor.shape)
        if isinstance(tensor, Derived):
            return None
        if not isinstance(tensor, DTensor):
            return Held(shape, tensor.detach(), (whole(shape),))
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
        return Held(shape, local, slabs, position, group)

    @staticmethod
    def groups(tensors: Mapping[str, Held]) -> list[dist.ProcessGroup]:
        """The groups among which tensors are sharded, in the order in which they are met."""
        found: list[dist.ProcessGroup] = []
        for one in tensors.values():
            if one.group is not None and one.group not in found:
                found.append(one.group)
        return found

    def least(self, group: dist.ProcessGroup, flags: Sequence[int]) -> list[int]:
        """The smallest of every number among the ranks of a group.  Collective: over the group."""
        told = torch.tensor(flags, dtype=torch.int64, device=self._device_of(group))
        self._finish(dist.all_reduce(told, op=dist.ReduceOp.MIN, group=group, async_op=True))
        return told.tolist()

    def _finish(self, work: dist.Work | None) -> None:
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

    def _device_of(self, group: dist.ProcessGroup) -> torch.device:
        # Shards that were moved to the CPU still belong to a mesh of GPUs, whose groups take CUDA tensors alone.
        return torch.device("cpu") if "nccl" not in dist.get_backend(group) else self.device

    def plan(
        self, tensors: Mapping[str, Held], reads: Mapping[str, ReadsOfRanks], lent: set[str], *, staging_bytes: int
    ) -> Moves:
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
            for piece in pieces_of(name, reads[name][self.tp_rank], one.slabs)
            if piece.holder == one.position
        ]
        steps: list[Step] = []
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
        return Moves(
            key=f"moves{next(self._numbers)}",
            direct=direct,
            steps=steps,
            stage_bytes=max((step.num_bytes for step in steps), default=0),
            send_bytes=max((sum(step.num_going) for step in steps), default=0),
        )

    def _chunks(self, one: Held, room: int, reads: ReadsOfRanks, group: dist.ProcessGroup | None) -> list[Box]:
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
        tensors: Mapping[str, Held],
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
                else max(place(pieces_of(name, of_rank, one.slabs))[1] for of_rank in reads[name])
                for name, one in tensors.items()
            }
            return found, dict.fromkeys(tensors, False)
        mine = []
        for name, one in tensors.items():
            step = self._step(group, {name: one}, reads, lent, True)
            mine.append((max(step.num_bytes, sum(step.num_going)), sum(step.num_coming)))
        most = torch.tensor(mine, dtype=torch.int64, device=self._device_of(group))
        self._finish(dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group, async_op=True))
        return (
            {name: cost for name, (cost, _) in zip(tensors, most.tolist())},
            {name: coming > 0 for name, (_, coming) in zip(tensors, most.tolist())},
        )

    def _step(
        self,
        group: dist.ProcessGroup | None,
        tensors: Mapping[str, Held],
        reads: Mapping[str, ReadsOfRanks],
        lent: set[str],
        is_sent: bool,
        chunk: Box | None = None,
    ) -> Step:
        ranks = [self.tp_rank] if group is None else [self.tp_ranks[r] for r in dist.get_process_group_ranks(group)]
        step = Step(group, coming=[[] for _ in ranks], going=[[] for _ in ranks], is_sent=is_sent)
        for name, one in tensors.items():
            for piece in _within(pieces_of(name, reads[name][self.tp_rank], one.slabs), chunk):
                if piece.holder != one.position:
                    step.coming[piece.holder].append(piece)
                elif name not in lent:
                    step.local.append(piece)
            given = {k: _within(pieces_of(name, reads[name][k], [one.slab]), chunk) for k in set(ranks)}
            for position, tp_rank in enumerate(ranks):
                if position != one.position:
                    step.going[position] += given[tp_rank]
        step.num_coming = [place(pieces)[1] for pieces in step.coming]
        step.num_going = [place(pieces)[1] for pieces in step.going]
        step.num_bytes = place(step.local, sum(step.num_coming))[1]
        return step

    # --- what the worker is told -------------------------------------------------------------------------------

    def definitions(self, moves: Moves, tensors: Mapping[str, Held]) -> list[list[Any]]:
        """The worker's programs: [key, pieces]; see `tpcolocate_receiver.plans.Program`."""
        direct = []
        for piece in moves.direct:
            one = tensors[piece.name]
            view = piece.view(one.local, one.slab)
            storage = view.untyped_storage()
            loan = self.loans.find(storage)
            assert loan is not None
            first = view.data_ptr() - storage.data_ptr()
            direct.append(_told(piece, loan.name, first, view.dtype, view.stride()))
        told: list[list[Any]] = [[f"{moves.key}/direct", direct]]
        for i, step in enumerate(moves.steps):
            staged = [
                _told(piece, f"stage{i % 2}", first, piece.read.dtype, _contiguous(piece.shape))
                for piece, first in step.staged()
            ]
            told.append([f"{moves.key}/{i}", staged])
        return told

    # --- moving --------------------------------------------------------------------------------------------------

    def stage(self, step: Step, tensors: Mapping[str, Held], half: torch.Tensor, sending: torch.Tensor) -> None:
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
            self._finish(
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

    def begin_sums(self, moves: Moves, tensors: Mapping[str, Held]) -> Sums:
        """Start to sum up everything that this rank's memory gives to any worker; on a GPU nothing is waited for."""
        return Sums(self, moves, tensors)


class Sums:
    """What every piece's target must sum up to, computed by whoever holds the piece.

    Collective: `expected`, over the groups of the moves.
    """

    def __init__(self, mover: Mover, moves: Moves, tensors: Mapping[str, Held]) -> None:
        self._mover, self._moves = mover, moves

        def summed(pieces: Sequence[Piece]) -> list[torch.Tensor]:
            found = []
            for piece in pieces:
                one = tensors[piece.name]
                found.append(word_sum(piece.view(one.local, one.slab).to(mover.device, piece.read.dtype)))
            return found

        self._direct = self._summed_in_place(tensors)
        self._local = [summed(step.local) for step in moves.steps]
        self._going = [[summed(pieces) for pieces in step.going] for step in moves.steps]

    def _summed_in_place(self, tensors: Mapping[str, Held]) -> torch.Tensor:
        """Of what is read where it lies.  Most of a sync's tensors: views are made from what is known of them."""
        moves, device = self._moves, self._mover.device
        if len(moves.words) < len(moves.direct):
            moves.words = [
                _words(piece.view(tensors[piece.name].local, tensors[piece.name].slab), piece, device)
                for piece in moves.direct
            ]
            moves.sums = torch.empty(len(moves.direct), dtype=torch.int64, device=device)
            moves.replay = Replay(device)
        if moves.sums is None or moves.replay is None:
            return torch.empty(0, dtype=torch.int64)
        of_piece = moves.sums.unbind()

        def queue() -> None:
            lanes = Lanes(device)
            for i, (piece, words, out) in enumerate(zip(moves.direct, moves.words, of_piece)):
                if words is not None:
                    shape, strides, offset = words
                    view = torch.empty(0, dtype=torch.int64, device=device)
                    storage = tensors[piece.name].local.untyped_storage()
                    view.set_(storage, offset, shape, strides)  # type: ignore[call-overload]
                    with lanes.lane(i):
                        torch.sum(view, dim=tuple(range(len(shape))), out=out)
            lanes.join()

        moves.replay.run(queue)
        for piece, words, out in zip(moves.direct, moves.words, of_piece):
            if words is None:
                one = tensors[piece.name]
                out.copy_(word_sum(piece.view(one.local, one.slab).to(device, piece.read.dtype)))
        return moves.sums

    def expected(self) -> dict[str, list[int]]:
        """Program -> the sums that its worker must find, in the order of its pieces."""
        moves = self._moves
        found = {f"{moves.key}/direct": self._direct.tolist()}
        coming = self._exchanged()
        for i, step in enumerate(moves.steps):
            sums: list[int] = []
            for position, pieces in enumerate(step.coming):
                sums += [next(coming[step.group, position]) for _ in pieces] if pieces else []
            found[f"{moves.key}/{i}"] = sums + _numbers(self._local[i])
        return found

    def _exchanged(self) -> dict[tuple[dist.ProcessGroup | None, int], Any]:
        """(group, position) -> the sums of what came from there, in the order in which it came."""
        found: dict[tuple[dist.ProcessGroup | None, int], Any] = {}
        groups: list[dist.ProcessGroup] = []
        for step in self._moves.steps:
            if step.group is not None and step.is_sent and step.group not in groups:
                groups.append(step.group)
        for group in groups:
            steps = [(i, step) for i, step in enumerate(self._moves.steps) if step.group is group]
            size = dist.get_world_size(group)
            device = self._mover._device_of(group)
            going = [[s for i, _ in steps for s in self._going[i][position]] for position in range(size)]
            sent = [s for of_position in going for s in of_position]
            out = (
                torch.stack([s.to(device) for s in sent]) if sent else torch.empty(0, dtype=torch.int64, device=device)
            )
            counts = [sum(len(step.coming[position]) for _, step in steps) for position in range(size)]
            came = torch.empty(sum(counts), dtype=torch.int64, device=device)
            lengths = [len(of_position) for of_position in going]
            self._mover._finish(dist.all_to_all_single(came, out, counts, lengths, group=group, async_op=True))
            numbers = iter(came.tolist())
            for position, count in enumerate(counts):
                found[group, position] = iter(list(itertools.islice(numbers, count)))
        return found


def _words(view: torch.Tensor, piece: Piece, device: torch.device) -> tuple[torch.Size, tuple[int, ...], int] | None:
    if view.dtype != piece.read.dtype or view.device != device:
        return None
    words = word_view(view)
    return None if words is None else (words.shape, words.stride(), int(words.storage_offset()))


def _within(pieces: Sequence[Piece], chunk: Box | None) -> list[Piece]:
    if chunk is None:
        return list(pieces)
    return [
        Piece(piece.name, piece.read, part, piece.holder)
        for piece in pieces
        if (part := piece.part.meet(chunk)) is not None
    ]


def _told(piece: Piece, region: str, first: int, dtype: torch.dtype, strides: Sequence[int]) -> list[Any]:
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


def _at(memory: torch.Tensor, piece: Piece, start: int) -> torch.Tensor:
    return memory[start : start + piece.num_bytes].view(piece.read.dtype).view(piece.shape)


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _numbers(sums: list[torch.Tensor]) -> list[int]:
    if not sums:
        return []
    return torch.stack(sums).tolist()


__all__ = ["Mover", "Moves", "Ready", "Step", "Sums"]
