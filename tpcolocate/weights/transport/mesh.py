"""Collectives over the meshes of the weights, which may span several tp slices.

None of these may be called past the schedule of the sync (`sync.mesh_schedule`): every rank of a mesh makes them in the
same order, whether its own slice has failed or not.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tpcolocate.agreement import ErrorReport, raise_first
from tpcolocate.deadline import Deadline
from tpcolocate.errors import DeadlineError
from tpcolocate.weights.sources import fsdp1, zero3

T = TypeVar("T")


@contextmanager
def together(groups: Mapping[dist.ProcessGroup, torch.device], *, rank: int, timeout_s: float) -> Iterator[None]:
    """Run a block on every rank of these groups, and raise its first error on all of them.

    For calls that gather sharded tensors where no group of this library's spans the ranks that do, as with slices of one rank:
    a rank that fails before the gather would leave the others in it.

    Collective: over the groups.

    Args:
        groups: Among which a source is sharded, from `groups_of_module` or `groups_of_tensors`: in the same order on every rank.
        rank: This global rank.
        timeout_s: How long to wait for the others, in seconds.

    Raises:
        TpColocateError: The first error of any rank, on all of them.
        DeadlineError: A rank did not come.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
    reports = [] if error is None else [ErrorReport.of(error, rank)]
    deadline = Deadline.after(timeout_s)
    try:
        for group, device in groups.items():
            of_ranks = Mesh(device, deadline).all_gather_objects(group, reports)
            reports = list({report.rank: report for of_rank in of_ranks for report in of_rank}.values())
    except DeadlineError as late:
        if error is None:
            raise
        error.add_note(f"(not reported to the other ranks: {late.message})")
        raise error from None
    raise_first(reports, error, rank=rank)


def groups_of_module(module: nn.Module) -> dict[dist.ProcessGroup, torch.device]:
    """Return the groups among which a module is sharded, as `groups_of_tensors`: by FSDP1, FSDP2, ZeRO-3 or tensor parallelism."""
    return {**groups_of_tensors(module.parameters()), **fsdp1.groups(module)}


def groups_of_tensors(tensors: Iterable[object]) -> dict[dist.ProcessGroup, torch.device]:
    """Return the groups among which tensors are sharded, in order of first use, and where their collectives run.

    Args:
        tensors: DTensors and parameters of ZeRO-3; what else is among them does not count.
    """
    found: dict[dist.ProcessGroup, torch.device] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            for axis, placement in enumerate(tensor.placements):
                if not placement.is_replicate():
                    found.setdefault(mesh.get_group(axis), _current_device(mesh.device_type))
        elif zero3.is_partitioned(tensor):
            group = zero3.group_of(tensor)
            found.setdefault(group, _current_device("cuda" if "nccl" in dist.get_backend(group) else "cpu"))
    return found


def _current_device(kind: str) -> torch.device:
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


class Mesh:
    """One rank's collectives over the groups of the weights' meshes.

    Args:
        device: Of this rank's staging memory.
        deadline: Of the sync.
    """

    def __init__(self, device: torch.device, deadline: Deadline) -> None:
        self.device = device
        self._deadline = deadline

    def min(self, group: dist.ProcessGroup, values: Sequence[int]) -> list[int]:
        """Return the smallest of every value among the ranks of a group.  Collective: over the group."""
        return self._reduced(group, values, dist.ReduceOp.MIN)

    def max(self, group: dist.ProcessGroup, values: Sequence[int]) -> list[int]:
        """Return the largest of every value among the ranks of a group.  Collective: over the group."""
        return self._reduced(group, values, dist.ReduceOp.MAX)

    def _reduced(self, group: dist.ProcessGroup, values: Sequence[int], op: dist.ReduceOp.RedOpType) -> list[int]:
        reduced = torch.tensor(values, dtype=torch.int64, device=self.device_of(group))
        self._wait(dist.all_reduce(reduced, op=op, group=group, async_op=True))
        return reduced.tolist()

    def barrier(self, group: dist.ProcessGroup) -> None:
        """Wait for the other ranks of a group.  Collective: over the group."""
        self.min(group, (0,))

    def all_gather_numbers(self, group: dist.ProcessGroup, numbers: torch.Tensor, sizes: Sequence[int]) -> list[Any]:
        """Return the numbers of every rank of a group, as lists in the order of its positions.

        Collective: over the group.

        Args:
            group: Whose ranks exchange them.
            numbers: int64, of this rank, on its device.
            sizes: How many each rank has.
        """
        device, width = self.device_of(group), max(sizes)
        if width == 0:
            return [[] for _ in sizes]
        given = torch.zeros(width, dtype=torch.int64, device=device)
        given[: numbers.numel()] = numbers
        found = self._all_gathered(group, given).tolist()
        return [of_rank[:size] for of_rank, size in zip(found, sizes)]

    def all_gather_objects(self, group: dist.ProcessGroup, value: T) -> list[T]:
        """Exchange one picklable value per rank, in the order of the group's positions.  Collective: over the group."""
        data = pickle.dumps(value)
        device = self.device_of(group)
        sizes = self._all_gathered(group, torch.tensor([len(data)], dtype=torch.int64, device=device)).view(-1).tolist()
        width = max(sizes)
        padded = torch.frombuffer(bytearray(data.ljust(width, b"\0")), dtype=torch.uint8).to(device)
        found = self._all_gathered(group, padded).cpu().numpy()
        # Unpickling is safe: only ranks of this job can have sent these bytes.
        return [pickle.loads(of_rank[:size].tobytes()) for of_rank, size in zip(found, sizes)]

    def _all_gathered(self, group: dist.ProcessGroup, given: torch.Tensor) -> torch.Tensor:
        found = given.new_empty(dist.get_world_size(group), given.numel())
        self._wait(dist.all_gather(list(found), given, group=group, async_op=True))
        return found

    def all_to_all(
        self,
        group: dist.ProcessGroup,
        output: torch.Tensor,
        given: torch.Tensor,
        output_sizes: list[int],
        given_sizes: list[int],
    ) -> None:
        """Exchange slices of flat tensors.  Collective: over the group."""
        self._wait(dist.all_to_all_single(output, given, output_sizes, given_sizes, group=group, async_op=True))

    def device_of(self, group: dist.ProcessGroup) -> torch.device:
        """Return where a group's tensors must lie: shards that were moved to the CPU still belong to a mesh of GPUs."""
        return torch.device("cpu") if "nccl" not in dist.get_backend(group) else self.device

    def _wait(self, work: dist.Work | None) -> None:
        """Wait for a collective; on a CPU no longer than the sync may take.

        On a GPU this waits for nothing but orders the streams; a rank that stays away is then for NCCL's watchdog to end.

        Raises:
            DeadlineError: The other ranks did not come.
        """
        assert work is not None
        if self.device.type != "cpu":
            work.wait()
            return
        try:
            work.wait(timedelta(seconds=self._deadline.left(at_least=0.001)))
        except RuntimeError as error:
            if not self._deadline.has_passed:
                raise
            raise DeadlineError(
                f"other ranks did not exchange weights in time: {error}",
                hint="the cause is the first error printed by another rank",
            ) from error


__all__ = ["Mesh", "groups_of_module", "groups_of_tensors", "together"]
