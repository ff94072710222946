"""What every slice must sum up to: computed by the rank that has it, compared with what the worker reads back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from tpcolocate.in_server.tpcolocate_receiver import kernels
from tpcolocate.in_server.tpcolocate_receiver.checksums import word_sum, word_view
from tpcolocate.in_server.tpcolocate_receiver.kernel_tables import Cast, ChecksumTable, Layout, Slices
from tpcolocate.weights.plan.sharding import Shards
from tpcolocate.weights.plan.slices import TensorSlice
from tpcolocate.weights.plan.transfer_plan import TransferPlan
from tpcolocate.weights.transport.mesh import Mesh

_Words = tuple[torch.Size, tuple[int, ...], int]
"""Shape, strides and offset of a slice in its storage, in whole words."""


class DirectChecksums:
    """Checksums of slices that the worker reads where they lie, the same at every sync; keeps none of their memory.

    Args:
        slices: In the order of the checksums.
        shards: What lies here; the object can be used as long as all of it lies there.
        device: Of the checksums.
    """

    def __init__(self, slices: Sequence[TensorSlice], shards: Shards, device: torch.device) -> None:
        self._slices = slices
        self._device = device
        self._words = [self._words_of(one, shards) for one in slices]
        self._sums = torch.empty(len(slices), dtype=torch.int64, device=device)
        self._of_slice = self._sums.unbind()
        self._table: ChecksumTable | None = None
        self._casts: frozenset[Cast] | None = None
        """What the table was made for; None: there is none yet."""
        self._viewed = [i for i, words in enumerate(self._words) if words is not None]
        """Numbers of the slices that can be summed up where they lie, and that the kernels leave to torch."""
        self._others = [i for i, words in enumerate(self._words) if words is None]
        """And of those that are cast, moved or padded first."""

    @property
    def is_one_launch(self) -> bool:
        """Whether the kernel computes all that can be summed up where it lies."""
        return self._table is not None and not self._viewed

    def _words_of(self, one: TensorSlice, shards: Shards) -> _Words | None:
        view = one.view(shards[one.name].local, shards[one.name].region)
        if view.dtype != one.read.dtype or view.device != self._device:
            return None
        words = word_view(view)
        return None if words is None else (words.shape, words.stride(), int(words.storage_offset()))

    def _view(self, number: int, shards: Shards) -> torch.Tensor:
        """The words of a slice, where they lie."""
        words = self._words[number]
        assert words is not None
        shape, strides, offset = words
        view = torch.empty(0, dtype=torch.int64, device=self._device)
        storage = shards[self._slices[number].name].local.untyped_storage()
        return view.set_(storage, offset, shape, strides)  # type: ignore[call-overload]

    def _make_table(self, shards: Shards, casts: frozenset[Cast]) -> None:
        """Leave to the kernels what they can read."""
        slices, numbers = Slices(), []
        for i, one in enumerate(self._slices):
            view = one.view(shards[one.name].local, shards[one.name].region)
            if view.device == self._device:
                layout = Layout.to_sum(view.shape, view.stride(), view.dtype, one.read.dtype)
                slices.add(layout, view.data_ptr(), slot=i)
                numbers.append(i)
        table = ChecksumTable(slices, self._device, casts=casts)
        taken = set(numbers) - {numbers[i] for i in table.rest}
        self._table = table if taken else None
        self._viewed = [i for i, words in enumerate(self._words) if words is not None and i not in taken]
        self._others = [i for i, words in enumerate(self._words) if words is None and i not in taken]
        self._casts = casts

    def begin(self, shards: Shards) -> torch.Tensor:
        """Queue the checksums; return them, not waited for.  They are overwritten by the next call."""
        launch = kernels.ready(self._device)
        casts = kernels.casts(self._device)
        if launch is not None and casts != self._casts:
            self._make_table(shards, casts)
        if self._table is not None:
            self._sums.zero_()
            self._table.run(launch, self._sums)
        for i in self._viewed:
            view = self._view(i, shards)
            torch.sum(view, dim=tuple(range(view.dim())), out=self._of_slice[i])
        for i in self._others:
            self._of_slice[i].copy_(_checksum(self._slices[i], shards, self._device))
        return self._sums


class TransferChecksums:
    """Checksums of everything that this rank gives to any worker in one sync; begun when made, on a GPU not waited for.

    Args:
        plan: Of the transfer.
        direct: Of the plan's direct slices.
        shards: What lies here.
        mesh: For the exchange.
    """

    def __init__(self, plan: TransferPlan, direct: DirectChecksums, shards: Shards, mesh: Mesh) -> None:
        self._plan, self._mesh = plan, mesh

        def of(slices: Sequence[TensorSlice]) -> list[torch.Tensor]:
            return [_checksum(one, shards, mesh.device) for one in slices]

        self._direct = direct.begin(shards)
        self._local = [of(stage.local) for stage in plan.stages]
        self._sent = [[of(slices) for slices in stage.send] for stage in plan.stages]

    def exchange(self) -> dict[str, list[int]]:
        """Return for each program the checksums that its worker must find, in the order of its slices.

        Collective: over the groups of the plan.
        """
        plan = self._plan
        expected = {f"{plan.key}/direct": self._direct.tolist()}
        received = self._exchanged()
        for i, stage in enumerate(plan.stages):
            sums: list[int] = []
            for position, slices in enumerate(stage.receive):
                sums += [next(received[stage.group, position]) for _ in slices] if slices else []
            local = torch.stack(self._local[i]).tolist() if self._local[i] else []
            expected[f"{plan.key}/{i}"] = sums + local
        return expected

    def _exchanged(self) -> dict[tuple[dist.ProcessGroup | None, int], Any]:
        """(group, position) -> the checksums of what came from there, in the order in which it came."""
        found: dict[tuple[dist.ProcessGroup | None, int], Any] = {}
        groups: list[dist.ProcessGroup] = []
        for stage in self._plan.stages:
            if stage.group is not None and stage.is_sent and stage.group not in groups:
                groups.append(stage.group)
        for group in groups:
            stages = [(i, stage) for i, stage in enumerate(self._plan.stages) if stage.group is group]
            device = self._mesh.device_of(group)
            positions = range(dist.get_world_size(group))
            sent = [[s for i, _ in stages for s in self._sent[i][position]] for position in positions]
            flat = [s.to(device) for of_position in sent for s in of_position]
            given = torch.stack(flat) if flat else torch.empty(0, dtype=torch.int64, device=device)
            counts = [sum(len(stage.receive[position]) for _, stage in stages) for position in positions]
            received = torch.empty(sum(counts), dtype=torch.int64, device=device)
            self._mesh.all_to_all(group, received, given, counts, [len(of_position) for of_position in sent])
            numbers = iter(received.tolist())
            for position, count in enumerate(counts):
                found[group, position] = iter(list(itertools.islice(numbers, count)))
        return found


def _checksum(one: TensorSlice, shards: Shards, device: torch.device) -> torch.Tensor:
    """Of a slice as the worker will hold it: cast, and on the worker's device."""
    shard = shards[one.name]
    return word_sum(one.view(shard.local, shard.region).to(device, one.read.dtype))


__all__ = ["DirectChecksums", "TransferChecksums"]
