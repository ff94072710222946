"""A transfer: one rank's part in carrying out a transfer plan in one sync.

What workers cannot map goes through staging memory: each rank puts what workers read of it into its own, which all
workers that reach the rank map; for the others it is sent, by one all-to-all for each stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tpcolocate import ipc_payload
from tpcolocate.in_server.tpcolocate_receiver.checksums import word_sum
from tpcolocate.in_server.tpcolocate_receiver.regions import Region, strides_of
from tpcolocate.weights.plan.sharding import Shards
from tpcolocate.weights.plan.slices import Block, SliceKind, TensorSlice, place
from tpcolocate.weights.plan.transfer_plan import Group, Stage, TransferPlan, placed_given
from tpcolocate.weights.sources.lazy_tensor import Ingredients
from tpcolocate.weights.transport.checksums import DirectChecksums, SumsOfRanks
from tpcolocate.weights.transport.mapped_memory import PersistentMappings
from tpcolocate.weights.transport.mesh import Mesh


@dataclass(frozen=True, slots=True)
class SourceBlock:
    """What this rank's worker reads of one rank's memory, as that rank describes it.

    Attributes:
        rows: The slices, for the worker's program; see `protocol.RunProgram`.
        labels: Of the sums.
        num_bytes: In all.
    """

    rows: Sequence[Sequence[Any]]
    labels: Sequence[str]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PlannedTransfer:
    """A plan, and what can be kept with it from sync to sync: no memory of the trainer.

    Attributes:
        plan: Of this rank.
        direct: Checksums of what workers read where it lies here.
        sizes: Of the sums of all ranks' blocks, which they exchange.
        labels: Of the sums that this rank's worker must find, by source.
        own_bytes: What the worker reads of this rank's memory where it lies.
        peer_bytes: And of other ranks'.
    """

    plan: TransferPlan
    direct: DirectChecksums
    sizes: SumsOfRanks
    labels: Sequence[Sequence[str]]
    own_bytes: int
    peer_bytes: int

    @classmethod
    def of(
        cls,
        plan: TransferPlan,
        device: torch.device,
        blocks: Mapping[tuple[Group, int], SourceBlock],
        sizes: SumsOfRanks,
    ) -> PlannedTransfer:
        """Keep what outlives a sync.

        Args:
            plan: Of this rank.
            device: Of the checksums.
            blocks: By source: what this rank's worker reads there.
            sizes: Of the sums of all ranks' blocks.
        """
        mine = [blocks[source] for source in plan.sources]
        is_own = [plan.layout.ranks_of(group)[position] == plan.layout.rank for group, position in plan.sources]
        return cls(
            plan,
            DirectChecksums(plan.blocks, device),
            sizes,
            [one.labels for one in mine],
            own_bytes=sum(one.num_bytes for one, own in zip(mine, is_own) if own),
            peer_bytes=sum(one.num_bytes for one, own in zip(mine, is_own) if not own),
        )


class Transfer:
    """One rank's part in carrying out a plan.

    Its collectives are made in the order of the methods: `expected_direct`, `gather_ingredients`, `fill_stage` for every
    stage, `expected_staged`.

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
        self._direct: torch.Tensor | None = None
        self._staged: list[_StageSums] = []

    @property
    def ingredients(self) -> list[Ingredients]:
        """What has to be gathered before anything is computed, each once, in the order of the sync."""
        found = [self._shards[name].ingredients for name in self.plan.staged_names]
        return list({id(one): one for one in found if one is not None}.values())

    def prepare(self) -> None:
        """Take the memory that staging needs, and begin the checksums of what this rank gives; does nothing a second time."""
        if self._direct is not None:
            return
        if self.plan.stages and not self.halves:
            device = self._mesh.device
            self.halves = [
                ipc_payload.allocate(self.plan.stage_bytes, device) for _ in range(min(len(self.plan.stages), 2))
            ]
            self._send_buffer = torch.empty(self.plan.send_bytes, dtype=torch.uint8, device=device)
        self._direct = self.planned.direct.begin(self._shards)

    def release(self) -> None:
        """Free the memory; a later call takes it anew."""
        self.halves, self._direct = [], None
        self._send_buffer = torch.empty(0, dtype=torch.uint8)

    def expected_direct(self) -> list[list[int]]:
        """Return the sums that this rank's worker must find of what it reads where it lies, by source.

        Collective: over the groups of the plan.
        """
        self.prepare()
        assert self._direct is not None
        layout, planned = self.plan.layout, self.planned
        return planned.direct.expected(self._direct, self.plan.sources, layout.tp_rank, planned.sizes, self._mesh)

    def gather_ingredients(self) -> None:
        """Fetch what computed tensors are made of.  Collective: over the meshes of these tensors."""
        for one in self.ingredients:
            one.gather()

    def fill_stage(self, number: int) -> torch.Tensor:
        """Fill one half of the staging memory with a stage's slices, and return it.

        Collective: over the stage's group, if it spans slices or something is sent.  What goes wrong on this rank is raised
        behind the collectives, which other ranks make as well.
        """
        stage = self.plan.stages[number]
        spans = stage.group is not None and self.plan.layout.spans_slices(stage.group)
        error: BaseException | None = None
        given: torch.Tensor | None = None
        try:
            self.prepare()
        except Exception as caught:
            error = caught
        if spans and number >= 2:
            self._mesh.barrier(stage.group)  # type: ignore[arg-type]  # other slices' workers have left this half
        try:
            if error is None:
                given = self._fill(stage, number)
        except Exception as caught:
            error = caught
        if stage.is_sent:
            self._exchange(stage, number, given)
        if self._mesh.device.type == "cuda":
            # The readers' streams know nothing of ours.
            torch.cuda.current_stream(self._mesh.device).synchronize()
        if spans:
            self._mesh.barrier(stage.group)  # type: ignore[arg-type]  # all halves are full
        if number == len(self.plan.stages) - 1:
            for one in self.ingredients:
                one.forget()
        if error is not None:
            raise error
        return self.halves[number % 2]

    def _fill(self, stage: Stage, number: int) -> torch.Tensor:
        """Put this rank's slices into the staging memory, and what is to be sent into its buffer; return that."""
        half = self.halves[number % 2]
        sums = _StageSums(
            {k: self._put(half, placed) for k, placed in _by_reader(stage)},
            [],
        )
        first = 0
        for slices, size in zip(stage.send, stage.send_bytes):
            sums.sent.append(self._put(self._send_buffer, list(zip(slices, place(slices, first)[0]))))
            first += size
        self._staged[number:] = [sums]
        return self._send_buffer[:first]

    def _put(self, memory: torch.Tensor, placed: Sequence[tuple[TensorSlice, int]]) -> list[torch.Tensor]:
        """Copy slices to where they are placed; return the checksum of each, not waited for."""
        targets, sources, sums = [], [], []
        for one, start in placed:
            shard = self._shards[one.name]
            if shard.compute is not None:
                source = shard.compute(one.region).reshape(one.shape)
            else:
                source = one.view(shard.local, shard.region)
            if source.dtype != one.read.dtype or source.device != memory.device:
                source = source.to(memory.device, one.read.dtype)
            sums.append(word_sum(source))
            target = memory[start : start + one.num_bytes].view(one.read.dtype).view(one.shape)
            if shard.compute is not None:
                target.copy_(source)  # at once, so that what was computed need not be kept
            else:
                targets.append(target)
                sources.append(source)
        if targets:
            torch._foreach_copy_(targets, sources)
        return sums

    def _exchange(self, stage: Stage, number: int, given: torch.Tensor | None) -> None:
        """Send what workers of other ranks cannot map; what this rank could not fill holds anything."""
        assert stage.group is not None
        size = sum(stage.send_bytes)
        device = self._mesh.device
        if given is None:
            given = torch.zeros(size, dtype=torch.uint8, device=device)
        if len(self.halves) > number % 2:
            received = self.halves[number % 2][stage.given_bytes : stage.num_bytes]
        else:
            received = torch.empty(sum(stage.receive_bytes), dtype=torch.uint8, device=device)
        self._mesh.all_to_all(stage.group, received, given, list(stage.receive_bytes), list(stage.send_bytes))

    def expected_staged(self) -> list[list[int]]:
        """Return for each stage the sums that this rank's worker must find.

        Collective: over the groups of the stages.
        """
        stages, me = self.plan.stages, self.plan.layout.tp_rank
        mine = [sums.read() for sums in self._staged]
        mine += [({}, [])] * (len(stages) - len(mine))
        of_ranks: dict[dist.ProcessGroup, list[Any]] = {}
        for group in dict.fromkeys(stage.group for stage in stages):
            if group is not None:
                here = [of_stage if stage.group is group else None for of_stage, stage in zip(mine, stages)]
                of_ranks[group] = self._mesh.all_gather_objects(group, here)
        found: list[list[int]] = []
        for i, stage in enumerate(stages):
            there = [mine[i]] if stage.group is None else [of_rank[i] for of_rank in of_ranks[stage.group]]
            # In the order of `Stage.taken`.
            sums: list[int] = []
            size = len(there)
            for position in ((stage.position + step) % size for step in range(size)):
                given, sent = there[position]
                sums += sent[stage.position] if stage.receive[position] else given.get(me, [])
            found.append(sums)
        return found


@dataclass(frozen=True, slots=True)
class _StageSums:
    """Checksums of what this rank gave in one stage, not waited for.

    Attributes:
        given: TP rank -> of its slices.
        sent: Position -> of what went there.
    """

    given: Mapping[int, list[torch.Tensor]]
    sent: list[list[torch.Tensor]]

    def read(self) -> tuple[dict[int, list[int]], list[list[int]]]:
        flat = [one for sums in (*self.given.values(), *self.sent) for one in sums]
        numbers = iter(torch.stack(flat).tolist() if flat else [])
        given = {k: [next(numbers) for _ in sums] for k, sums in self.given.items()}
        return given, [[next(numbers) for _ in sums] for sums in self.sent]


def _by_reader(stage: Stage) -> Iterator[tuple[int, list[tuple[TensorSlice, int]]]]:
    placed = list(placed_given(stage))
    for k in stage.given:
        yield k, [(one, first) for of, one, first in placed if of == k]


def block_rows(
    block: Block, shards: Shards, mappings: PersistentMappings, transient_regions: Mapping[int, str]
) -> list[list[Any]]:
    """Describe what a worker reads of this rank's memory where it lies: the slices of a program.

    Args:
        block: What it reads.
        shards: What lies here.
        mappings: What workers map from sync to sync.
        transient_regions: Storage -> region, of what they map for this sync alone.
    """
    rows = []
    regions: dict[int, str] = {}
    forms: dict[object, _Form] = {}
    for (name, kind), number, weight in zip(block.slices, block.sums, block.weights):
        shard = shards[name]
        local, strides = shard.local, shard.local.stride()
        storage = local.untyped_storage()._cdata
        region = regions.get(storage)
        if region is None:
            region = regions[storage] = _region_of(local.untyped_storage(), mappings, transient_regions)
        key = id(kind), strides, local.dtype  # a kind is of one shard region
        form = forms.get(key)
        if form is None:
            form = forms[key] = _Form.of(kind, shard.region, strides, local.dtype)
        first = (int(local.storage_offset()) + form.offset) * form.itemsize
        rows.append(
            [name, form.copy, form.starts, form.lengths, region, first, form.dtype, form.strides, number, weight]
        )
    return rows


def _region_of(
    storage: torch.UntypedStorage, mappings: PersistentMappings, transient_regions: Mapping[int, str]
) -> str:
    region = transient_regions.get(storage._cdata)
    if region is None:
        mapping = mappings.find(storage)
        assert mapping is not None
        region = mapping.name
    return region


class _Form(NamedTuple):
    """What the rows of slices have in common; see `copy_program.CopyProgram`.

    Attributes:
        copy: Number of the worker's copy.
        starts, lengths: Within what that writes.
        offset: From the first element of the shard.
        itemsize: Of its elements.
        dtype: Of its elements.
        strides: Of the slice there.
    """

    copy: int
    starts: list[int] | None
    lengths: list[int] | None
    offset: int
    itemsize: int
    dtype: str
    strides: list[int]

    @classmethod
    def of(cls, kind: SliceKind, region: Region, strides: Sequence[int], dtype: torch.dtype) -> _Form:
        """Describe slices of a kind.

        Args:
            kind: Of the slices.
            region: The part of the tensor that the shard is.
            strides: Of the shard.
            dtype: Of the shard.
        """
        offset, of_slice = kind.place_in(region, strides)
        starts, lengths = kind.target
        return cls(kind.read.number, starts, lengths, offset, dtype.itemsize, _name_of(dtype), list(of_slice))


def program_definitions(plan: TransferPlan, blocks: Mapping[tuple[Group, int], SourceBlock]) -> list[list[Any]]:
    """Return the worker's programs: [name, number of sums, slices]; see `protocol.RunProgram`.

    Args:
        plan: Of this rank.
        blocks: By source: what this rank's worker reads there.
    """
    direct: list[Any] = []
    end = 0
    for source in plan.sources:
        block = blocks[source]
        direct += [[*row[:-2], row[-2] + end, row[-1]] for row in block.rows]
        end += len(block.labels)
    programs: list[list[Any]] = [[f"{plan.key}/direct", end, direct]]
    for i, stage in enumerate(plan.stages):
        ranks = plan.layout.ranks_of(stage.group)
        staged = [
            [
                name,
                kind.read.number,
                *kind.target,
                half_region(ranks[at], i),
                first,
                _name_of(kind.read.dtype),
                list(strides_of(kind.shape)),
                number,
                1,
            ]
            for number, (at, (name, kind), first) in enumerate(stage.taken)
        ]
        programs.append([f"{plan.key}/{i}", len(staged), staged])
    return programs


def half_region(rank: int, stage: int) -> str:
    """Return the name of the region of a rank's half of the staging memory."""
    return f"r{rank}/stage{stage % 2}"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = ["PlannedTransfer", "SourceBlock", "Transfer", "block_rows", "half_region", "program_definitions"]
