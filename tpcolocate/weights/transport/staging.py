"""A transfer: one rank's part in carrying out a transfer plan in one sync.

What workers cannot map goes through staging memory: each rank puts what workers read of it into its own, which all
workers that reach the rank map; for the others it is sent, by one all-to-all for each stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
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
from tpcolocate.weights.transport.checksums import DirectChecksums, PlacedChecksums, SumsOfRanks
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
class Placing:
    """Slices and where each is put into memory, prepared for every sync; keeps no memory of the trainer.

    Attributes:
        copied: Number among all slices, slice and first byte of those that lie here.
        computed: The same of those that are computed; number of elements before it, if it is computed where it is put.
        num_slices: Of both.
        checksums: Of what is computed, where it was put.
        order: Where the checksums of `computed`, then of `copied`, are found among all; None: nothing is copied.
    """

    copied: Sequence[tuple[TensorSlice, int]]
    computed: Sequence[tuple[TensorSlice, int, bool]]
    num_slices: int
    checksums: PlacedChecksums
    order: torch.Tensor | None

    @classmethod
    def of(cls, placed: Sequence[tuple[TensorSlice, int]], shards: Shards, device: torch.device) -> Placing:
        """Prepare slices.

        Args:
            placed: Each with the first byte in the memory, a multiple of 16.
            shards: What lies here, laid out as in all later syncs.
            device: Of the memory.
        """
        copied: list[tuple[TensorSlice, int]] = []
        computed: list[tuple[TensorSlice, int, bool]] = []
        numbers_copied, numbers_computed = [], []
        for number, (one, first) in enumerate(placed):
            shard = shards[one.name]
            if shard.compute is None:
                copied.append((one, first))
                numbers_copied.append(number)
            else:
                in_place = shard.local.dtype == one.read.dtype and shard.local.device == device
                computed.append((one, first, in_place))
                numbers_computed.append(number)
        order = None
        if copied:
            places = [0] * len(placed)
            for place_of, number in enumerate([*numbers_computed, *numbers_copied]):
                places[number] = place_of
            order = torch.tensor(places, device=device)
        checksums = PlacedChecksums([(first, one.num_bytes) for one, first, _ in computed], device)
        return cls(copied, computed, len(placed), checksums, order)

    def put(self, memory: torch.Tensor, shards: Shards, ingredients: Iterable[Ingredients]) -> torch.Tensor:
        """Put the slices into memory; return the checksum of each, not waited for.

        Those of copies are taken where they are copied from, so that a copy that goes wrong is found.

        Args:
            memory: Flat uint8, starting at a multiple of 16 bytes.
            shards: What lies here now.
            ingredients: Of what is computed.
        """
        typed: dict[torch.dtype, torch.Tensor] = {}

        def target(one: TensorSlice, first: int, shape: Sequence[int]) -> torch.Tensor:
            dtype = one.read.dtype
            if dtype not in typed:
                typed[dtype] = memory.view(dtype)
            of_dtype = typed[dtype]
            return of_dtype.as_strided(shape, strides_of(shape), of_dtype.storage_offset() + first // dtype.itemsize)

        with ExitStack() as together:
            for made_of in ingredients:
                together.enter_context(made_of.together())
            for one, first, in_place in self.computed:
                compute = shards[one.name].compute
                assert compute is not None
                out = target(one, first, one.region.lengths)
                if in_place:
                    compute(one.region, out)
                else:
                    out.copy_(compute(one.region))  # at once, so that what was computed need not be kept
        sums = self.checksums.begin(memory)
        if self.order is None:
            return sums
        targets, sources = [], []
        for one, first in self.copied:
            shard = shards[one.name]
            source = one.view(shard.local, shard.region)
            if source.dtype != one.read.dtype or source.device != memory.device:
                source = source.to(memory.device, one.read.dtype)
            sources.append(source)
            targets.append(target(one, first, one.shape))
        of_copied = torch.stack([word_sum(source) for source in sources])
        torch._foreach_copy_(targets, sources)
        return torch.cat([sums, of_copied])[self.order]


@dataclass(frozen=True, slots=True)
class StageFilling:
    """What this rank puts where in one stage.

    Attributes:
        given: Into its half of the staging memory.
        given_counts: TP rank -> number of slices, in order.
        sent: Into the memory that is sent.
        sent_counts: Position -> number of slices, in order.
    """

    given: Placing
    given_counts: Mapping[int, int]
    sent: Placing
    sent_counts: Sequence[int]

    @classmethod
    def of(cls, stage: Stage, shards: Shards, device: torch.device) -> StageFilling:
        """Prepare a stage; arguments as of `Placing.of`."""
        sent: list[tuple[TensorSlice, int]] = []
        first = 0
        for slices, size in zip(stage.send, stage.send_bytes):
            sent += zip(slices, place(slices, first)[0])
            first += size
        return cls(
            Placing.of([(one, start) for _, one, start in placed_given(stage)], shards, device),
            {k: len(slices) for k, slices in stage.given.items()},
            Placing.of(sent, shards, device),
            [len(slices) for slices in stage.send],
        )

    def by_reader(self, sums: Sequence[int]) -> tuple[dict[int, list[int]], list[list[int]]]:
        """Divide the checksums of a stage: by TP rank of the slices given, by position of those sent."""
        numbers = iter(sums)
        given = {k: [next(numbers) for _ in range(count)] for k, count in self.given_counts.items()}
        return given, [[next(numbers) for _ in range(count)] for count in self.sent_counts]


@dataclass(frozen=True, slots=True)
class PlannedTransfer:
    """A plan, and what can be kept with it from sync to sync: no memory of the trainer.

    Attributes:
        plan: Of this rank.
        direct: Checksums of what workers read where it lies here.
        fillings: Of the stages.
        sizes: Of the sums of all ranks' blocks, which they exchange.
        labels: Of the sums that this rank's worker must find, by source.
        own_bytes: What the worker reads of this rank's memory where it lies.
        peer_bytes: And of other ranks'.
    """

    plan: TransferPlan
    direct: DirectChecksums
    fillings: Sequence[StageFilling]
    sizes: SumsOfRanks
    labels: Sequence[Sequence[str]]
    own_bytes: int
    peer_bytes: int

    @classmethod
    def of(
        cls,
        plan: TransferPlan,
        shards: Shards,
        device: torch.device,
        blocks: Mapping[tuple[Group, int], SourceBlock],
        sizes: SumsOfRanks,
    ) -> PlannedTransfer:
        """Keep what outlives a sync.

        Args:
            plan: Of this rank.
            shards: What lies here, laid out as in all later syncs.
            device: Of the checksums.
            blocks: By source: what this rank's worker reads there.
            sizes: Of the sums of all ranks' blocks.
        """
        mine = [blocks[source] for source in plan.sources]
        is_own = [plan.layout.ranks_of(group)[position] == plan.layout.rank for group, position in plan.sources]
        return cls(
            plan,
            DirectChecksums(plan.blocks, device),
            [StageFilling.of(stage, shards, device) for stage in plan.stages],
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
        self._send_buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._direct: torch.Tensor | None = None
        self._staged: list[torch.Tensor] = []
        """Checksums of the stages so far, not waited for."""

    @cached_property
    def ingredients(self) -> list[Ingredients]:
        """What has to be gathered before anything is computed, each once, in the order of the sync."""
        found = [self._shards[name].ingredients for name in self.plan.staged_names]
        return list({id(one): one for one in found if one is not None}.values())

    def prepare(self) -> None:
        """Take the memory that staging needs, and begin the checksums of what this rank gives; does nothing a second time."""
        if self._direct is not None:
            return
        _ = self.ingredients  # finds out how everything is computed
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
        self._send_buffer = torch.empty(0, dtype=torch.uint8, device="cpu")

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
        filling = self.planned.fillings[number]
        given = filling.given.put(self.halves[number % 2], self._shards, self.ingredients)
        sent = filling.sent.put(self._send_buffer, self._shards, self.ingredients)
        self._staged[number:] = [torch.cat([given, sent])]
        return self._send_buffer[: sum(stage.send_bytes)]

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
        sums = torch.cat(self._staged).tolist() if self._staged else []
        mine: list[tuple[dict[int, list[int]], list[list[int]]]] = []
        end = 0
        for filling, of_stage in zip(self.planned.fillings, self._staged):
            mine.append(filling.by_reader(sums[end : end + len(of_stage)]))
            end += len(of_stage)
        mine += [({}, [])] * (len(stages) - len(mine))
        of_ranks: dict[dist.ProcessGroup, list[Any]] = {}
        for group in dict.fromkeys(stage.group for stage in stages):
            if group is not None:
                here = [one if stage.group is group else None for one, stage in zip(mine, stages)]
                of_ranks[group] = self._mesh.all_gather_objects(group, here)
        found: list[list[int]] = []
        for i, stage in enumerate(stages):
            there = [mine[i]] if stage.group is None else [of_rank[i] for of_rank in of_ranks[stage.group]]
            # In the order of `Stage.taken`.
            taken: list[int] = []
            size = len(there)
            for position in ((stage.position + step) % size for step in range(size)):
                given, sent = there[position]
                taken += sent[stage.position] if stage.receive[position] else given.get(me, [])
            found.append(taken)
        return found


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
