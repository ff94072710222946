"""What every part must sum up to: computed by whoever holds it, compared with what the worker finds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from tpcolocate.in_server.tpcolocate_receiver import kernel_tables, kernels
from tpcolocate.in_server.tpcolocate_receiver.checksums import word_sum, word_view
from tpcolocate.in_server.tpcolocate_receiver.replay import Lanes, Replay
from tpcolocate.weights.plan.sharding import LocalShard
from tpcolocate.weights.plan.slices import TensorSlice
from tpcolocate.weights.plan.transfer_plan import TransferPlan


class Collectives(Protocol):
    """What the exchange needs of a `Transfer`."""

    device: torch.device

    def device_of(self, group: dist.ProcessGroup) -> torch.device: ...
    def finish(self, work: dist.Work | None) -> None: ...


class SumsInPlace:
    """Of pieces that the worker reads where they lie, the same at every sync; the views are made from what is known of them.

    Args:
        pieces: In the order of the sums.
        tensors: What lies here.  The sums hold as long as all of it lies there, and none of it is kept.
        device: Of the sums.
    """

    def __init__(self, pieces: Sequence[TensorSlice], tensors: Mapping[str, LocalShard], device: torch.device) -> None:
        self._pieces = pieces
        self._device = device
        self._words = [self._words_of(piece, tensors) for piece in pieces]
        self._sums = torch.empty(len(pieces), dtype=torch.int64, device=device)
        self._of_piece = self._sums.unbind()
        self._readings: kernel_tables.ChecksumTable | None = None
        self._is_arranged = False
        self._viewed = [i for i, words in enumerate(self._words) if words is not None]
        """Numbers of the pieces that torch sums up where they lie."""
        self._others = [i for i, words in enumerate(self._words) if words is None]
        """And of those that are cast, brought or filled up first."""
        self._replay = Replay(device)

    @property
    def is_one_piece(self) -> bool:
        """Whether they are queued as one piece of GPU work, by the kernel or as a graph."""
        return self._replay.is_captured or (self._readings is not None and not self._viewed)

    def _words_of(
        self, piece: TensorSlice, tensors: Mapping[str, LocalShard]
    ) -> tuple[torch.Size, tuple[int, ...], int] | None:
        """Shape, strides and offset of a piece in its storage, in whole words; None if it lies otherwise, or is cast."""
        view = piece.view(tensors[piece.name].local, tensors[piece.name].slab)
        if view.dtype != piece.read.dtype or view.device != self._device:
            return None
        words = word_view(view)
        return None if words is None else (words.shape, words.stride(), int(words.storage_offset()))

    def _view(self, number: int, tensors: Mapping[str, LocalShard]) -> torch.Tensor:
        """The words of a piece, where they lie."""
        words = self._words[number]
        assert words is not None
        shape, strides, offset = words
        view = torch.empty(0, dtype=torch.int64, device=self._device)
        storage = tensors[self._pieces[number].name].local.untyped_storage()
        return view.set_(storage, offset, shape, strides)  # type: ignore[call-overload]

    def _arrange(self, tensors: Mapping[str, LocalShard]) -> None:
        """Leave to the kernel what it can read."""
        views = {i: self._view(i, tensors) for i in self._viewed}
        parts = {i: kernel_tables.parts_of(view, view) for i, view in views.items()}
        readings = [(i, of_one) for i, of_one in parts.items() if of_one is not None]
        self._readings = kernel_tables.ChecksumTable(readings, self._device) if readings else None
        self._viewed = [i for i, of_one in parts.items() if of_one is None]
        self._is_arranged = True
        self._replay.forget()  # others than these may have been queued before

    def begin(self, tensors: Mapping[str, LocalShard]) -> torch.Tensor:
        """The sums, not waited for; overwritten at the next call."""

        def queue() -> None:
            lanes = Lanes(self._device)
            for i in self._viewed:
                view = self._view(i, tensors)
                with lanes.lane(i):
                    torch.sum(view, dim=tuple(range(view.dim())), out=self._of_piece[i])
            lanes.join()

        launch = kernels.ready(self._device)
        if launch is not None and not self._is_arranged:
            self._arrange(tensors)
        if self._readings is not None:
            self._sums.zero_()
            self._readings.run(launch, self._sums)
        if self._viewed:
            self._replay.run(queue)
        for i in self._others:
            piece = self._pieces[i]
            one = tensors[piece.name]
            self._of_piece[i].copy_(word_sum(piece.view(one.local, one.slab).to(self._device, piece.read.dtype)))
        return self._sums


class Sums:
    """What every piece's target must sum up to, computed by whoever holds the piece.

    Collective: `expected`, over the groups of the moves.
    """

    def __init__(self, mover: Collectives, moves: TransferPlan, tensors: Mapping[str, LocalShard]) -> None:
        self._mover, self._moves = mover, moves

        def summed(pieces: Sequence[TensorSlice]) -> list[torch.Tensor]:
            found = []
            for piece in pieces:
                one = tensors[piece.name]
                found.append(word_sum(piece.view(one.local, one.slab).to(mover.device, piece.read.dtype)))
            return found

        if moves.in_place is None:
            moves.in_place = SumsInPlace(moves.direct, tensors, mover.device)
        self._direct = moves.in_place.begin(tensors)
        self._local = [summed(step.local) for step in moves.steps]
        self._going = [[summed(pieces) for pieces in step.going] for step in moves.steps]

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
            device = self._mover.device_of(group)
            going = [[s for i, _ in steps for s in self._going[i][position]] for position in range(size)]
            sent = [s for of_position in going for s in of_position]
            out = (
                torch.stack([s.to(device) for s in sent]) if sent else torch.empty(0, dtype=torch.int64, device=device)
            )
            counts = [sum(len(step.coming[position]) for _, step in steps) for position in range(size)]
            came = torch.empty(sum(counts), dtype=torch.int64, device=device)
            lengths = [len(of_position) for of_position in going]
            self._mover.finish(dist.all_to_all_single(came, out, counts, lengths, group=group, async_op=True))
            numbers = iter(came.tolist())
            for position, count in enumerate(counts):
                found[group, position] = iter(list(itertools.islice(numbers, count)))
        return found


def _numbers(sums: list[torch.Tensor]) -> list[int]:
    if not sums:
        return []
    return torch.stack(sums).tolist()


__all__ = ["Sums", "SumsInPlace"]
