"""Programs: parts of planned copies, read from memory that is mapped here and summed up at their target."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import kernels
from .checksums import word_sum, word_view
from .copy_plan import CopyPlan
from .kernel_tables import CopyTable, parts_of
from .replay import Lanes, Replay

Views = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Number of a slice -> its target and its source."""


@dataclass(frozen=True, slots=True)
class _Slice:
    """One copy of a program.

    Attributes:
        dst: Part of a parameter.
        words: The same as `word_view` has it; None if it cannot be viewed so.
        checksum: Element that its checksum is written to.
        region: Name of the region that it reads.
        first: First byte in the region.
        dtype: In the region.
        strides: In the region, in elements.
    """

    dst: torch.Tensor
    words: torch.Tensor | None
    checksum: torch.Tensor
    region: str
    first: int
    dtype: torch.dtype
    strides: Sequence[int]

    def source(self, region: torch.Tensor) -> torch.Tensor:
        """View of the mapped region."""
        start = region.storage_offset() + self.first
        if start % self.dtype.itemsize:
            raise ValueError(f"{self.dtype} cannot start at byte {start} of a region")
        out = torch.empty(0, dtype=self.dtype, device=region.device)
        return out.set_(region.untyped_storage(), start // self.dtype.itemsize, self.dst.shape, tuple(self.strides))


class CopyProgram:
    """Copies out of mapped memory, prepared once and run at every sync.

    Args:
        slices: From the trainer, each [tensor name, number of its copy, starts and lengths of the part of what that copy
            writes (None: all of it), region, first byte in it, dtype there, strides there in elements].
        plan: Of the model.
    """

    def __init__(self, num_sums: int, slices: Sequence[Sequence[Any]], plan: CopyPlan) -> None:
        self._num_sums = num_sums
        self.regions = {one[4] for one in slices}
        self._names = list(dict.fromkeys(name for name, *_ in slices))
        targets = [
            _narrowed(plan.target(name, number), starts, lengths) for name, number, starts, lengths, *_ in slices
        ]
        self._device = targets[0].device if targets else torch.device("cpu")
        self._checksums = torch.empty(len(targets), dtype=torch.int64, device=self._device)
        self._slices = [
            _Slice(dst, word_view(dst), out, region, first, getattr(torch, dtype), strides)
            for dst, out, (_, _, _, _, region, first, dtype, strides, _, _) in zip(
                targets, self._checksums.unbind(), slices
            )
        ]
        self._slots = torch.tensor([one[-2] for one in slices], dtype=torch.int64, device=self._device)
        self._weights = torch.tensor([one[-1] for one in slices], dtype=torch.int64, device=self._device)
        self._views: Views | None = None
        self._table: CopyTable | None = None
        self._rest = list(range(len(targets)))
        """Numbers of the slices that torch copies."""
        self._is_divided = False
        self._replay = Replay(self._device)

    def run(
        self, plan: CopyPlan, regions: dict[str, torch.Tensor], *, keep_views: bool
    ) -> tuple[list[int], dict[str, float]]:
        """Copy, and sum up what the parameters hold afterwards; both are done when it returns.

        Args:
            plan: Of the model.
            regions: What is mapped, by name.
            keep_views: Whether the regions stay mapped, so that their views can be used again.

        Returns:
            `word_sum` of every slice's target, in order; and seconds: ``copy`` (and sum), or ``one_pass`` where the fused
            kernel does all of it.
        """
        if not self._slices:
            return [0] * self._num_sums, {}
        launch = kernels.ready(self._device)
        views = self._views
        if views is None or (launch is not None and not self._is_divided):
            views = self._prepare(regions, launch)
            self._views = views if keep_views else None
        started = _mark(self._checksums)
        plan.write_constants(self._names)
        if self._table is not None:
            self._checksums.zero_()
            self._table.run(launch, self._checksums)
        if self._rest and keep_views:
            self._replay.run(lambda: self._queue(views))
        elif self._rest:
            self._queue(views)
        for one in map(self._slices.__getitem__, self._rest):
            if one.words is None:
                one.checksum.copy_(word_sum(one.dst))
        ended = _mark(self._checksums)
        sums = torch.zeros(self._num_sums, dtype=torch.int64, device=self._device)
        found = sums.index_add_(0, self._slots, self._checksums * self._weights).tolist()
        return found, {"copy" if self._rest else "one_pass": _between(started, ended)}

    def forget_views(self) -> None:
        """Drop the views, so that the regions can be unmapped."""
        self._views = None
        self._replay.forget()

    def _prepare(self, regions: dict[str, torch.Tensor], launch: Any | None) -> Views:
        """Divide the slices between kernel and torch, once there is a kernel; return the views of torch's slices."""
        if self._table is not None and self._table.rebase(regions):
            return self._views_of(regions, self._rest)
        views = self._views_of(regions, range(len(self._slices)))
        if launch is None:
            return views
        parts = {i: parts_of(*view) for i, view in views.items()}
        copies = [(i, self._slices[i].region, of_one) for i, of_one in parts.items() if of_one is not None]
        self._table = CopyTable(copies, regions, self._device) if copies else None
        self._rest = [i for i, of_one in parts.items() if of_one is None]
        self._is_divided = True
        self._replay.forget()  # which may have captured other slices
        return {i: views[i] for i in self._rest}

    def _queue(self, views: Views) -> None:
        """Queue torch's copies, and the checksums of the targets that can be viewed in whole words."""
        lanes = Lanes(self._device)
        # One by one: a batched copy of tensors this large is slower on an H100.
        for i in self._rest:
            (dst, src), one = views[i], self._slices[i]
            with lanes.lane(i):
                dst.copy_(src)
                if one.words is not None:
                    torch.sum(one.words, dim=tuple(range(one.words.dim())), out=one.checksum)
        lanes.join()

    def _views_of(self, regions: dict[str, torch.Tensor], numbers: Sequence[int]) -> Views:
        """Return target and source of slices; as words where both sides allow it, which is faster where rows are cut."""
        found: Views = {}
        for i in numbers:
            one = self._slices[i]
            src = one.source(regions[one.region])
            src_words = word_view(src) if one.words is not None and one.dtype == one.dst.dtype else None
            found[i] = (one.dst, src) if one.words is None or src_words is None else (one.words, src_words)
        return found


def _narrowed(dst: torch.Tensor, starts: Sequence[int] | None, lengths: Sequence[int] | None) -> torch.Tensor:
    if starts is None or lengths is None:
        return dst
    for dim, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        dst = dst.narrow(dim, start, length)
    return dst


def _mark(tensor: torch.Tensor) -> Any:
    """Take the time on the tensor's device."""
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(started: Any, ended: Any) -> float:
    return ended - started if isinstance(started, float) else started.elapsed_time(ended) / 1e3
