"""Full tensors of many small DTensors, gathered by one collective for each mesh and dtype.

An adapter has hundreds of factors of some kilobytes.  A gather of its own for each takes longer than all their bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from tpcolocate.weights.sources.lazy_tensor import full_bytes, full_tensor, local_of
from tpcolocate.weights.sources.tensor_references import Reference


class CoalescedGather:
    """Gathers tensors together, and has them until they are forgotten.  Keeps none of the sharded ones alive.

    Args:
        refer: How tensors are referred to.
    """

    def __init__(self, refer: Callable[[torch.Tensor], Reference] = weakref.ref) -> None:
        self.refer = refer
        self._tensors: list[Reference] = []
        self._number_of: dict[int, int] = {}
        self._plan: _Plan | None = None
        self._full: dict[int, torch.Tensor] = {}

    def add(self, tensor: torch.Tensor) -> int:
        """Return a tensor's number; ranks add the same tensors in the same order.  One that is known keeps its number."""
        number = self._number_of.get(id(tensor))
        if number is None or self._tensors[number]() is not tensor:
            number = self._number_of[id(tensor)] = len(self._tensors)
            self._tensors.append(self.refer(tensor))
            self._plan = None
        return number

    def tensor(self, number: int) -> torch.Tensor:
        """Return a tensor as it was added.

        Raises:
            RuntimeError: Its module is gone, or has other parameters now.
        """
        tensor = self._tensors[number]()
        if tensor is None:
            raise RuntimeError("a tensor that a weight is computed from is gone: its module was dropped or changed")
        return tensor

    def full(self, number: int) -> torch.Tensor:
        """Return a full tensor, detached: as it was gathered; one that is not sharded as it is now."""
        full = self._full.get(number)
        if full is None:
            tensor = self.tensor(number)
            assert _is_whole(tensor), "a sharded tensor is read before gather()"
            full = local_of(tensor).detach()
        return full

    @property
    def is_collective(self) -> bool:
        """Whether anything has to be gathered; the same on every rank."""
        plan = self._planned()
        return bool(plan.batches or plan.others)

    @property
    def num_bytes(self) -> int:
        """The most memory that `gather` takes on this rank, in bytes."""
        return self._planned().num_bytes

    def gather(self) -> None:
        """Gather the tensors' present values.

        Collective: over their meshes, one all-gather for each mesh and dtype; one more for each tensor that is not cut
        into rows (``Shard(0)``) along one axis of its mesh.
        """
        self.forget()
        plan = self._planned()
        with torch.no_grad():
            for batch in plan.batches:
                tensors = [self.tensor(number) for number in batch.numbers]
                self._full.update(zip(batch.numbers, batch.gather(tensors)))
            for number in plan.others:
                self._full[number] = full_tensor(self.tensor(number))

    def forget(self) -> None:
        """Drop what was gathered."""
        self._full.clear()

    def _planned(self) -> _Plan:
        if self._plan is None:
            self._plan = _plan([self.tensor(number) for number in range(len(self._tensors))])
        return self._plan


@dataclass(frozen=True, slots=True)
class _Batch:
    """Tensors that one all-gather brings.

    Attributes:
        group: The ranks among which all of them are sharded.
        device: Of the group's collectives; what FSDP2 has offloaded is not there.
        numbers: Which tensors.
        shapes: Their full shapes.
        sizes: Elements of the largest shard of each, which is what every rank sends.
        itemsize: Of all, in bytes.
    """

    group: dist.ProcessGroup
    device: torch.device
    numbers: list[int]
    shapes: list[torch.Size]
    sizes: list[int]
    itemsize: int

    @property
    def num_bytes(self) -> int:
        """The size of the full tensors with padding, in bytes."""
        return sum(self.sizes) * self.itemsize * self.group.size()

    def gather(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the full tensors, as views of one buffer.  Collective: over `group`, one all-gather."""
        num_ranks = self.group.size()
        parts = []
        for tensor, size in zip(tensors, self.sizes):
            local = local_of(tensor).reshape(-1)
            parts.append(local)
            if local.numel() < size:  # the last ranks have less, or nothing
                parts.append(local.new_empty(size - local.numel()))
        sent = torch.cat(parts).to(self.device)
        gathered = sent.new_empty(num_ranks * sent.numel())
        dist.all_gather_into_tensor(gathered, sent, group=self.group)
        del sent, parts
        # By rank, then by tensor; a full tensor has the shards of all ranks next to each other.  One call copies them all.
        full = torch.empty_like(gathered)
        flat = full.split([num_ranks * size for size in self.sizes])
        torch.split_with_sizes_copy(
            gathered.view(num_ranks, -1),
            self.sizes,
            dim=1,
            out=[part.view(num_ranks, size) for part, size in zip(flat, self.sizes)],
        )
        return [part[: shape.numel()].view(shape) for part, shape in zip(flat, self.shapes)]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is gathered how; the same on every rank, as the tensors are.

    Attributes:
        batches: In order of their first tensors.
        others: Tensors that are gathered each by itself.
        num_bytes: The most memory that it takes, in bytes.
    """

    batches: list[_Batch]
    others: list[int]
    num_bytes: int


def _plan(tensors: list[torch.Tensor]) -> _Plan:
    batches: dict[tuple[dist.ProcessGroup, torch.dtype, torch.device], _Batch] = {}
    others: list[int] = []
    for number, tensor in enumerate(tensors):
        if not isinstance(tensor, DTensor) or _is_whole(tensor):
            continue
        axis = _row_axis(tensor)
        if axis is None:
            others.append(number)
            continue
        group = tensor.device_mesh.get_group(axis)
        key = group, tensor.dtype, local_of(tensor).device
        if key not in batches:
            batches[key] = _Batch(group, _collective_device(tensor), [], [], [], tensor.dtype.itemsize)
        batch = batches[key]
        batch.numbers.append(number)
        batch.shapes.append(tensor.shape)
        rows = -(-tensor.shape[0] // group.size())
        batch.sizes.append(rows * tensor.shape[1:].numel())
    found = list(batches.values())
    # While a batch is unpacked its bytes are there twice, and once more what this rank sends.
    most = max((batch.num_bytes + batch.num_bytes // batch.group.size() for batch in found), default=0)
    kept = sum(batch.num_bytes for batch in found) + sum(full_bytes(tensors[number]) for number in others)
    return _Plan(found, others, kept + most)


def _is_whole(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, DTensor) or all(isinstance(p, Replicate) for p in tensor.placements)


def _row_axis(tensor: DTensor) -> int | None:
    """Return the axis of the mesh along which the tensor is cut into rows; None if it is laid out in another way."""
    sharded = [axis for axis, p in enumerate(tensor.placements) if not isinstance(p, Replicate)]
    if len(sharded) != 1:
        return None
    placement = tensor.placements[sharded[0]]
    return sharded[0] if type(placement) is Shard and placement.dim in (0, -tensor.ndim) else None


def _collective_device(tensor: DTensor) -> torch.device:
    local, kind = local_of(tensor).device, tensor.device_mesh.device_type
    return local if local.type == kind else torch.device(kind)


__all__ = ["CoalescedGather"]
