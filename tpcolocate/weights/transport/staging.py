"""A transfer: one rank's part in carrying out a transfer plan in one sync.

Slices that the worker does not map go through staging memory: views of this rank's shards, and one all-to-all per stage
over the ranks that have shards of the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tpcolocate import ipc_payload
from tpcolocate.weights.plan.sharding import Shards
from tpcolocate.weights.plan.slices import TensorSlice, place
from tpcolocate.weights.plan.transfer_plan import TransferPlan
from tpcolocate.weights.transport.checksums import DirectChecksums, TransferChecksums
from tpcolocate.weights.transport.mapped_memory import PersistentMappings
from tpcolocate.weights.transport.mesh import Mesh


@dataclass(frozen=True, slots=True)
class PlannedTransfer:
    """A plan, and what can be kept with it from sync to sync: no memory of the trainer.

    Attributes:
        plan: Of this rank.
        direct: Checksums of the plan's direct slices.
    """

    plan: TransferPlan
    direct: DirectChecksums

    @classmethod
    def of(cls, plan: TransferPlan, shards: Shards, device: torch.device) -> PlannedTransfer:
        return cls(plan, DirectChecksums(plan.direct, shards, device))


class Transfer:
    """One rank's part in carrying out a plan.

    Its collectives are made in the order of the plan: `fill_stage` for every stage, then `expected_checksums`.

    Args:
        planned: The plan.
        shards: What lies here.
        mesh: For the collectives.
    """

    def __init__(self, planned: PlannedTransfer, shards: Shards, mesh: Mesh) -> None:
        self.plan = planned.plan
        self.halves: list[torch.Tensor] = []
        """Both halves of the staging memory, flat uint8, for exporting."""
        self.planned = planned
        self._shards = shards
        self._mesh = mesh
        self._send_buffer = torch.empty(0, dtype=torch.uint8)
        self._checksums: TransferChecksums | None = None

    def prepare(self) -> None:
        """Take the memory that staging needs, and begin the checksums of what this rank gives; does nothing a second time."""
        if self._checksums is not None:
            return
        if self.plan.stages and not self.halves:
            device = self._mesh.device
            self.halves = [
                ipc_payload.allocate(self.plan.stage_bytes, device) for _ in range(min(len(self.plan.stages), 2))
            ]
            self._send_buffer = torch.empty(self.plan.send_bytes, dtype=torch.uint8, device=device)
        self._begin_checksums()

    def _begin_checksums(self) -> None:
        self._checksums = TransferChecksums(self.plan, self.planned.direct, self._shards, self._mesh)

    def release(self) -> None:
        """Free the memory; a later call takes it anew."""
        self.halves, self._checksums = [], None
        self._send_buffer = torch.empty(0, dtype=torch.uint8)

    def fill_stage(self, number: int) -> torch.Tensor:
        """Fill one half of the staging memory with a stage's slices, and return it.

        Collective: over the stage's group.
        """
        self.prepare()
        stage, half, send_buffer = self.plan.stages[number], self.halves[number % 2], self._send_buffer
        end = sum(stage.receive_bytes)
        if stage.is_sent:
            assert stage.group is not None
            first, targets, sources = 0, [], []
            for slices, size in zip(stage.send, stage.send_bytes):
                for one, start in zip(slices, place(slices, first)[0]):
                    targets.append(_at(send_buffer, one, start))
                    sources.append(self._view(one))
                first += size
            _copy(targets, sources)
            self._mesh.all_to_all(stage.group, half[:end], send_buffer[:first], stage.receive_bytes, stage.send_bytes)
        _copy(
            [_at(half, one, start) for one, start in zip(stage.local, place(stage.local, end)[0])],
            [self._view(one) for one in stage.local],
        )
        if half.is_cuda:
            # The reader's streams know nothing of ours.
            torch.cuda.current_stream(half.device).synchronize()
        return half

    def expected_checksums(self) -> dict[str, list[int]]:
        """Return for each program the checksums that its worker must find.

        Collective: over the groups of the plan.
        """
        self.prepare()
        assert self._checksums is not None
        return self._checksums.exchange()

    def _view(self, one: TensorSlice) -> torch.Tensor:
        shard = self._shards[one.name]
        return one.view(shard.local, shard.region)


def program_definitions(
    plan: TransferPlan, shards: Shards, mappings: PersistentMappings, transient_regions: Mapping[int, str]
) -> list[list[Any]]:
    """Return the worker's programs: [name, number of sums, slices]; see `tpcolocate_receiver.copy_program.CopyProgram`.

    Args:
        plan: Of this rank.
        shards: What lies here.
        mappings: What the worker maps from sync to sync.
        transient_regions: Storage -> region, of what it maps for this sync alone.
    """
    direct = []
    for one in plan.direct:
        view = one.view(shards[one.name].local, shards[one.name].region)
        storage = view.untyped_storage()
        region = transient_regions.get(storage._cdata)
        if region is None:
            mapping = mappings.find(storage)
            assert mapping is not None
            region = mapping.name
        direct.append(_described(one, region, view.data_ptr() - storage.data_ptr(), view.dtype, view.stride()))
    programs: list[list[Any]] = [[f"{plan.key}/direct", len(direct), _slotted(direct)]]
    for i, stage in enumerate(plan.stages):
        staged = [
            _described(one, f"stage{i % 2}", first, one.read.dtype, _contiguous_strides(one.shape))
            for one, first in stage.staged()
        ]
        programs.append([f"{plan.key}/{i}", len(staged), _slotted(staged)])
    return programs


def _slotted(slices: list[list[Any]]) -> list[list[Any]]:
    """Give each slice a sum of its own."""
    return [[*one, slot, 1] for slot, one in enumerate(slices)]


def _described(one: TensorSlice, region: str, first: int, dtype: torch.dtype, strides: Sequence[int]) -> list[Any]:
    starts, lengths = one.target()
    dtype_name = str(dtype).removeprefix("torch.")
    return [one.name, one.read.number, starts, lengths, region, first, dtype_name, list(strides)]


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return strides[::-1]


def _at(memory: torch.Tensor, one: TensorSlice, start: int) -> torch.Tensor:
    return memory[start : start + one.num_bytes].view(one.read.dtype).view(one.shape)


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


__all__ = ["PlannedTransfer", "Transfer", "program_definitions"]
