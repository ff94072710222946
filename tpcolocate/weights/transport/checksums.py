"""What workers must find: sums of all that they read where it lies, by the rank that has it, and of what is staged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from tpcolocate.in_server.tpcolocate_receiver import kernels
from tpcolocate.in_server.tpcolocate_receiver.checksums import word_sum, word_view
from tpcolocate.in_server.tpcolocate_receiver.kernel_tables import Cast, ChecksumTable, Layout, Slices
from tpcolocate.weights.plan.sharding import Shards
from tpcolocate.weights.plan.slices import Block
from tpcolocate.weights.plan.transfer_plan import Group
from tpcolocate.weights.transport.mesh import Mesh

_Words = tuple[torch.Size, tuple[int, ...], int]
"""Shape, strides and offset of a slice in its storage, in whole words."""

SumsOfRanks = Mapping[dist.ProcessGroup, Sequence[Mapping[int, int]]]
"""Group -> for each of its positions, TP rank -> number of sums of the block that workers of that TP rank read there."""


class DirectChecksums:
    """Checksums of what workers read where it lies on this rank, the same at every sync; keeps none of that memory.

    Args:
        blocks: (group, TP rank) -> what workers read; the object can be used as long as all of it lies where it does.
        device: Of the checksums.
    """

    def __init__(self, blocks: Mapping[tuple[Group, int], Block], device: torch.device) -> None:
        self._device = device
        self._slices = [one for block in blocks.values() for one in block.slices]
        self._spans: dict[tuple[Group, int], tuple[int, int]] = {}
        numbers: list[int] = []
        end = 0
        for key, block in blocks.items():
            numbers += [end + number for number in block.sums]
            self._spans[key] = (end, end := end + len(block.labels))
        self._size = end
        self._numbers = torch.tensor(numbers, dtype=torch.int64, device=device)
        weights = [weight for block in blocks.values() for weight in block.weights]
        self._weights = torch.tensor(weights, dtype=torch.int64, device=device)
        self._sums = torch.empty(len(self._slices), dtype=torch.int64, device=device)
        self._of_slice = self._sums.unbind()
        self._table: ChecksumTable | None = None
        self._casts: frozenset[Cast] | None = None
        """What the table was made for; None: there is none."""
        self._viewed: list[tuple[str, _Words, torch.Tensor]] | None = None
        """Of slices that the kernels leave to torch and that can be summed up where they lie: tensor, words, the sum.
        None: not divided up yet."""
        self._others: list[int] = []
        """Numbers of the rest, which is cast, moved or padded first."""

    @property
    def is_one_launch(self) -> bool:
        """Whether the kernel computes all that can be summed up where it lies."""
        return self._table is not None and not self._viewed

    def _make_table(self, shards: Shards, casts: frozenset[Cast]) -> list[int]:
        """Leave to the kernels what they can read; return the numbers of the other slices."""
        slices, numbers, rest = Slices(), [], []
        found: dict[object, tuple[int, Layout]] = {}
        for i, (name, kind) in enumerate(self._slices):
            shard = shards[name]
            local, strides = shard.local, shard.local.stride()
            if local.device != self._device:
                rest.append(i)
                continue
            key = id(kind), strides, local.dtype
            if key not in found:
                offset, of_slice = kind.place_in(shard.region, strides)
                layout = Layout.to_sum(kind.shape, of_slice, local.dtype, kind.read.dtype)
                found[key] = offset * local.dtype.itemsize, layout
            offset, layout = found[key]
            slices.add(layout, local.data_ptr() + offset, slot=i)
            numbers.append(i)
        table = ChecksumTable(slices, self._device, casts=casts)
        self._table = table if len(table.rest) < len(numbers) else None
        self._casts = casts
        return sorted([*rest, *(numbers[i] for i in table.rest)])

    def _leave_to_torch(self, numbers: Sequence[int], shards: Shards) -> None:
        """Divide up what torch sums up."""
        self._viewed, self._others = [], []
        found: dict[object, tuple[int, _Words | None]] = {}
        for i in numbers:
            name, kind = self._slices[i]
            shard = shards[name]
            local, strides = shard.local, shard.local.stride()
            if local.device != self._device or local.dtype != kind.read.dtype:
                self._others.append(i)
                continue
            first, size = int(local.storage_offset()), local.dtype.itemsize
            key = id(kind), strides, first * size % 8
            if key not in found:
                words = word_view(self._slices[i].view(local, shard.region))
                found[key] = (
                    first * size,
                    None if words is None else (words.shape, words.stride(), int(words.storage_offset())),
                )
            of_first, words_there = found[key]
            if words_there is None:
                self._others.append(i)
            else:
                shape, of_words, offset = words_there
                moved = offset + (first * size - of_first) // 8
                self._viewed.append((name, (shape, of_words, moved), self._of_slice[i]))

    def begin(self, shards: Shards) -> torch.Tensor:
        """Queue the checksums; return all blocks' sums, not waited for."""
        launch = kernels.ready(self._device)
        casts = kernels.casts(self._device)
        if launch is not None and casts != self._casts:
            self._leave_to_torch(self._make_table(shards, casts), shards)
        elif self._viewed is None:
            self._leave_to_torch(range(len(self._slices)), shards)
        if self._table is not None:
            self._sums.zero_()
            self._table.run(launch, self._sums)
        for name, (shape, strides, offset), out in self._viewed or ():
            view = torch.empty(0, dtype=torch.int64, device=self._device)
            storage = shards[name].local.untyped_storage()
            view.set_(storage, offset, shape, strides)  # type: ignore[call-overload]
            torch.sum(view, dim=tuple(range(view.dim())), out=out)
        for i in self._others:
            one = self._slices[i]
            shard = shards[one.name]
            made = one.view(shard.local, shard.region).to(self._device, one.kind.read.dtype)
            self._of_slice[i].copy_(word_sum(made))
        found = torch.zeros(self._size, dtype=torch.int64, device=self._device)
        return found.index_add_(0, self._numbers, self._sums * self._weights)

    def expected(
        self, sums: torch.Tensor, sources: Sequence[tuple[Group, int]], tp_rank: int, sizes: SumsOfRanks, mesh: Mesh
    ) -> list[list[int]]:
        """Return the sums that this rank's worker must find, by source.

        Collective: over the groups of `sizes`, in their order.

        Args:
            sums: From `begin`.
            sources: What the worker reads, see `TransferPlan.sources`.
            tp_rank: Of the worker.
            sizes: Of all ranks' blocks.
            mesh: For the exchange.
        """
        received = {}
        for group, of_ranks in sizes.items():
            spans = [self._spans[key] for key in self._spans if key[0] is group]
            mine = sums[spans[0][0] : spans[-1][1]] if spans else sums[:0]
            received[group] = mesh.all_gather_numbers(group, mine, [sum(one.values()) for one in of_ranks])
        found: list[list[int]] = []
        for source, position in sources:
            if source is None:
                first, end = self._spans[None, tp_rank]
                found.append(sums[first:end].tolist())
                continue
            of_rank = sizes[source][position]
            first = sum(size for k, size in of_rank.items() if k < tp_rank)
            # Nothing at all, if what is mapped turned out not to be used.
            found.append(received[source][position][first : first + of_rank.get(tp_rank, 0)])
        return found


class PlacedChecksums:
    """Checksums of spans of memory that is another one at every sync, all by one launch where the kernels are ready.

    Args:
        spans: First byte of each, a multiple of 16, and number of bytes.
        device: Of the memory.
    """

    def __init__(self, spans: Sequence[tuple[int, int]], device: torch.device) -> None:
        self._spans = spans
        self._device = device
        self._table: ChecksumTable | None = None

    def begin(self, memory: torch.Tensor) -> torch.Tensor:
        """Queue the checksums; return one for each span, not waited for.

        Args:
            memory: Flat uint8, starting at a multiple of 16 bytes.
        """
        launch = kernels.ready(self._device) if self._spans else None
        if launch is None:
            sums = [self._sum(memory, i) for i in range(len(self._spans))]
            return torch.stack(sums) if sums else torch.empty(0, dtype=torch.int64, device=self._device)
        if self._table is None:
            slices = Slices()
            for i, (first, num_bytes) in enumerate(self._spans):
                slices.add(Layout.to_sum((num_bytes,), (1,), torch.uint8, torch.uint8), first, slot=i)
            self._table = ChecksumTable(slices, self._device)
        sums_of_all = torch.zeros(len(self._spans), dtype=torch.int64, device=self._device)
        self._table.point_to(memory.data_ptr())
        self._table.run(launch, sums_of_all)
        for i in self._table.rest:
            sums_of_all[i] = self._sum(memory, i)
        return sums_of_all

    def _sum(self, memory: torch.Tensor, number: int) -> torch.Tensor:
        first, num_bytes = self._spans[number]
        return word_sum(memory[first : first + num_bytes])


__all__ = ["DirectChecksums", "PlacedChecksums", "SumsOfRanks"]
