"""What workers must find: sums of all that they read where it lies, by the rank that has it, and of what is staged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from tpcolocate.in_server.tpcolocate_receiver import kernels
from tpcolocate.in_server.tpcolocate_receiver.checksums import word_sum, word_view
from tpcolocate.in_server.tpcolocate_receiver.kernel_tables import Cast, ChecksumTable, Layout, Slices
from tpcolocate.weights.plan.sharding import Shards
from tpcolocate.weights.plan.slices import Block, TensorSlice
from tpcolocate.weights.plan.transfer_plan import Group
from tpcolocate.weights.transport.mesh import Mesh

_Words = tuple[torch.Size, tuple[int, ...], int]
"""Shape, strides and offset of a slice in its storage, in whole words."""

SumsOfRanks = Mapping[dist.ProcessGroup, Sequence[Mapping[int, int]]]
"""Group -> for each of its positions, TP rank -> number of sums of the block that workers of that TP rank read there."""


class DirectChecksums:
    """Checksums of what workers read where it lies on this rank, the same at every sync; keeps none of that memory.

    Args:
        blocks: (group, TP rank) -> what workers read.
        shards: What lies here; the object can be used as long as all of it lies there.
        device: Of the checksums.
    """

    def __init__(self, blocks: Mapping[tuple[Group, int], Block], shards: Shards, device: torch.device) -> None:
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
        self._words = [self._words_of(one, shards) for one in self._slices]
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
        shard = shards[one.name]
        view = one.view(shard.local, shard.region)
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
        """Queue the checksums; return all blocks' sums, not waited for."""
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
            one = self._slices[i]
            shard = shards[one.name]
            made = one.view(shard.local, shard.region).to(self._device, one.read.dtype)
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
