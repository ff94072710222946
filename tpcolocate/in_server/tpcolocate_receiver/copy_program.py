"""Programs: parts of planned copies, read from memory that is mapped here and summed up at their target."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import kernels
from .checksums import are_finite, word_sum
from .copy_plan import CopyPlan
from .kernel_tables import ORDER, Cast, CopyTable, Layout, Slices
from .replay import Lanes, Replay


class _View(NamedTuple):
    """One slice as torch copies it.

    Attributes:
        dst: Part of a parameter, as words where both sides allow it, which is faster where rows are cut.
        src: Of the same shape.
        target: Part of the parameter; may be None where `words` is not.
        words: The same as words; None if its rows are not whole, aligned words.
        sum: What its sum is written to.
    """

    dst: torch.Tensor
    src: torch.Tensor
    target: torch.Tensor | None
    words: torch.Tensor | None
    sum: torch.Tensor


class _ByTorch(NamedTuple):
    """The slices that torch copies.

    Attributes:
        views: Of each.
        sums: Of each, not weighted.
        slots: Of each.
        weights: Of each.
    """

    views: list[_View]
    sums: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor


class _Found(NamedTuple):
    """What a run finds, read in one go.

    Attributes:
        memory: Of both.
        sums: Of the slots.
        flags: Of the slots: 1 if one of their targets is not finite.
    """

    memory: torch.Tensor
    sums: torch.Tensor
    flags: torch.Tensor

    @classmethod
    def new(cls, num_sums: int, device: torch.device) -> _Found:
        memory = torch.zeros(2 * num_sums, dtype=torch.int64, device=device)
        return cls(memory, memory[:num_sums], memory[num_sums:])


class CopyProgram:
    """Copies out of mapped memory, prepared once and run at every sync.

    Args:
        num_sums: Number of the sums that it reports.
        slices: From the trainer, each [tensor name, number of its copy, starts and lengths of the part of what that copy
            writes (None: all of it), region, first byte in it, dtype there, strides there in elements, slot: the sum that
            it is added to, weight: what its sum is multiplied with, odd and positive].
        plan: Of the model.
        order: In which the kernels read; see `kernel_tables.ordered`.

    Attributes:
        nonfinite: Slots of the last run whose targets hold a NaN or an infinite number, if it has looked for them.

    Raises:
        ValueError: A slice lies outside of what its copy writes, or has no such slot or weight.
    """

    def __init__(self, num_sums: int, slices: Sequence[Sequence[Any]], plan: CopyPlan, *, order: str = ORDER) -> None:
        self._order = order
        self._names = list(dict.fromkeys(one[0] for one in slices))
        self._slices, self._targets, self._ends = _defined(num_sums, slices, plan)
        device = self._targets[0].device if self._targets else torch.device("cpu")
        self._found = _Found.new(num_sums, device)
        self.nonfinite: list[int] = []
        self._table: CopyTable | None = None
        self._rest = list(range(len(self._targets)))
        """Numbers of the slices that torch copies."""
        self._by_torch: _ByTorch | None = None
        self._casts: frozenset[Cast] | None = None
        """What the slices were divided for between kernels and torch; None: there is no kernel yet."""
        self._replay = Replay(device)

    @property
    def _device(self) -> torch.device:
        return self._found.sums.device

    @property
    def regions(self) -> set[str]:
        """Names of the regions that it reads."""
        return set(self._ends)

    @property
    def wanted_casts(self) -> frozenset[Cast]:
        """Casts that kernels could do for it; see `kernels.prepare`."""
        return self._slices.casts

    def run(
        self, plan: CopyPlan, regions: Mapping[str, torch.Tensor], *, keep_views: bool, flags: bool = True
    ) -> tuple[list[int], dict[str, float]]:
        """Copy, and sum up what the parameters hold afterwards; both are done when it returns.

        Args:
            plan: Of the model.
            regions: What is mapped, by name.
            keep_views: Whether the regions stay mapped, so that their views can be used again.
            flags: Whether to look for numbers that are not finite.

        Returns:
            The sums: `word_sum` of every slice's target times its weight, added up slot by slot modulo 2^64 and signed; and
            seconds: ``copy`` (and sum), or ``one_pass`` where kernels do all of it.

        Raises:
            KeyError: A region is not mapped.
            ValueError: A region is too short, lies on another device, or holds a slice where its dtype cannot start.
        """
        self.nonfinite = []
        if not self._targets:
            return self._found.sums.tolist(), {}
        launch = kernels.ready(self._device)
        casts = None if launch is None else self.wanted_casts & kernels.casts(self._device)
        by_torch = self._by_torch
        if by_torch is None or casts != self._casts:
            self._check(regions)
            by_torch = self._prepare(regions, casts)
            self._by_torch = by_torch if keep_views else None
        views = by_torch.views
        started = _mark(self._found.sums)
        plan.write_constants(self._names)
        self._found.memory.zero_()
        if self._table is not None:
            self._table.run(launch, self._found.memory, flags=flags)
        if views:
            if keep_views:
                self._replay.run(lambda: self._queue(views))
            else:
                self._queue(views)
            for view in views:
                if view.words is None and view.target is not None:
                    view.sum.copy_(word_sum(view.target))
            self._found.sums.index_add_(0, by_torch.slots, by_torch.sums * by_torch.weights)
            if flags:
                self._flag(views, by_torch.slots)
        ended = _mark(self._found.sums)
        numbers = self._found.memory.tolist()
        found, flagged = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
        self.nonfinite = [slot for slot, flag in enumerate(flagged) if flag]
        return found, {"copy" if views else "one_pass": _between(started, ended)}

    def _flag(self, views: Sequence[_View], slots: torch.Tensor) -> None:
        """Flag the slots of what torch has copied and is not finite."""
        layouts = [self._slices.layouts[self._slices.layout_of[i]] for i in self._rest]
        there = [view.dst.view(layout.target) for view, layout in zip(views, layouts, strict=True)]
        flagged = [number for number, is_finite in enumerate(are_finite(there)) if not is_finite]
        if flagged:
            self._found.flags[slots[flagged]] = 1

    def forget_views(self) -> None:
        """Drop the views, so that the regions can be unmapped."""
        self._by_torch = None
        self._replay.forget()

    def _check(self, regions: Mapping[str, torch.Tensor]) -> None:
        for name, end in self._ends.items():
            region = regions[name]
            if region.device != self._device:
                raise ValueError(
                    f"region {name!r} lies on {region.device}, and the parameters on {self._device}: the memory of another "
                    "GPU is copied only where this GPU can map it"
                )
            if end > region.numel():
                raise ValueError(f"a slice ends at byte {end} of region {name!r}, which has {region.numel()}")

    def _prepare(self, regions: Mapping[str, torch.Tensor], casts: frozenset[Cast] | None) -> _ByTorch:
        """Divide the slices between kernels and torch, if the kernels are others; return torch's slices."""
        if casts != self._casts or not (self._table is None or self._table.rebase(regions)):
            self._table, self._rest = None, list(range(len(self._targets)))
            if casts is not None:
                self._table = CopyTable(
                    self._slices,
                    regions,
                    self._device,
                    casts=casts,
                    order=self._order,
                    first_flag=len(self._found.sums),
                )
                self._rest = self._table.rest
            self._casts = casts
            self._replay.forget()  # which may have captured other slices
        return self._views_of(regions)

    def _views_of(self, regions: Mapping[str, torch.Tensor]) -> _ByTorch:
        rest, slices, device = self._rest, self._slices, self._device
        sums = torch.zeros(len(rest), dtype=torch.int64, device=device)
        slots = torch.tensor([slices.slots[i] for i in rest], dtype=torch.int64, device=device)
        weights = torch.tensor([slices.weights[i] for i in rest], dtype=torch.int64, device=device)
        memory = _Memory()
        in_words = [_in_words(layout) for layout in slices.layouts]
        found = []
        for i, out in zip(rest, sums.unbind()):
            layout, target, name = slices.layouts[slices.layout_of[i]], self._targets[i], slices.regions[i]
            region = regions[name]
            to = int(target.storage_offset()) * layout.target.itemsize + slices.targets[i] - target.data_ptr()
            at = int(region.storage_offset()) + slices.sources[i]
            if at % layout.source.itemsize:
                raise ValueError(f"{layout.source} cannot start at byte {at} of region {name!r}")
            source_words, target_words = in_words[slices.layout_of[i]]
            words = memory.view(target, target_words, to) if target_words is not None and to % 8 == 0 else None
            if words is not None and source_words is not None and at % 8 == 0:
                found.append(_View(words, memory.view(region, source_words, at), None, words, out))
                continue
            dst = memory.view(target, _Form(layout.target, layout.shape, layout.target_strides), to)
            src = memory.view(region, _Form(layout.source, layout.shape, layout.source_strides), at)
            found.append(_View(dst, src, dst, words, out))
        return _ByTorch(found, sums, slots, weights)

    def _queue(self, views: Sequence[_View]) -> None:
        """Queue torch's copies, and the sums of the targets that can be viewed in whole words."""
        lanes = Lanes(self._device)
        # One by one: a batched copy of tensors this large is slower on an H100.
        for i, view in enumerate(views):
            with lanes.lane(i):
                view.dst.copy_(view.src)
                if view.words is not None:
                    torch.sum(view.words, dim=tuple(range(view.words.dim())), out=view.sum)
        lanes.join()


class _Kind(NamedTuple):
    """What slices of one form have in common.

    Attributes:
        layout: Of the slices.
        offset: Of the first byte in what the copy writes.
        num_bytes: From the first byte that is read to the last.
    """

    layout: Layout
    offset: int
    num_bytes: int


def _defined(
    num_sums: int, slices: Sequence[Sequence[Any]], plan: CopyPlan
) -> tuple[Slices, list[torch.Tensor], dict[str, int]]:
    """Return the slices in columns, what the copy of each writes, and the byte where each region's last slice ends."""
    found = Slices()
    targets: list[torch.Tensor] = []
    ends: dict[str, int] = {}
    kinds: dict[Any, _Kind] = {}
    for name, number, starts, lengths, region, first, dtype, strides, slot, weight in slices:
        target = plan.target(name, number)
        key = (
            target.shape,
            target.stride(),
            target.dtype,
            target.device,
            None if starts is None else tuple(starts),
            None if lengths is None else tuple(lengths),
            dtype,
            tuple(strides),
        )
        kind = kinds.get(key)
        if kind is None:
            kind = kinds[key] = _kind(name, target, starts, lengths, dtype, strides)
        if not (0 <= slot < num_sums and 0 < weight < 2**31 and weight % 2):
            raise ValueError(f"a slice of {name} has slot {slot} of {num_sums} and weight {weight}")
        if first < 0:
            raise ValueError(f"a slice of {name} starts at byte {first} of region {region!r}")
        found.add(kind.layout, first, target.data_ptr() + kind.offset, slot=slot, weight=weight, region=region)
        targets.append(target)
        end = first + kind.num_bytes
        if end > ends.get(region, -1):
            ends[region] = end
    if len({key[3] for key in kinds}) > 1:
        raise ValueError("the parameters of a program must be on one device")
    return found, targets, ends


def _kind(
    name: str,
    target: torch.Tensor,
    starts: Sequence[int] | None,
    lengths: Sequence[int] | None,
    dtype: str,
    strides: Sequence[int],
) -> _Kind:
    shape, of_target = tuple(target.shape), target.stride()
    offset = 0
    if starts is not None and lengths is not None:
        for start, length, size in zip(starts, lengths, shape, strict=True):
            if start < 0 or length < 0 or start + length > size:
                raise ValueError(f"a slice of {name} from {starts} of {lengths} is no part of {shape}")
        offset = sum(start * stride for start, stride in zip(starts, of_target)) * target.element_size()
        shape = tuple(lengths)
    if len(strides) != len(shape) or any(stride < 0 for stride in strides):
        raise ValueError(f"a slice of {name} of the shape {shape} is read with strides {list(strides)}")
    source = getattr(torch, dtype)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides))
    num_bytes = 0 if 0 in shape else (last + 1) * source.itemsize
    return _Kind(Layout(shape, tuple(strides), of_target, source, target.dtype), offset, num_bytes)


class _Form(NamedTuple):
    """Of a view: dtype, shape and strides."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _in_words(layout: Layout) -> tuple[_Form | None, _Form | None]:
    """Return the forms of source and target as 64-bit words, as `checksums.word_view` makes them.

    None where rows are not whole words; None for the source of a cast.
    """
    if not layout.shape:
        layout = layout._replace(shape=(1,), source_strides=(1,), target_strides=(1,))

    def form(dtype: torch.dtype, strides: Sequence[int]) -> _Form | None:
        sizes = [layout.shape[-1] * dtype.itemsize, *(stride * dtype.itemsize for stride in strides[:-1])]
        if strides[-1] != 1 or any(size % 8 for size in sizes):
            return None
        shape = (*layout.shape[:-1], sizes[0] // 8)
        return _Form(torch.int64, shape, (*(size // 8 for size in sizes[1:]), 1))

    target = form(layout.target, layout.target_strides)
    return (None if target is None or layout.cast is not None else form(layout.source, layout.source_strides)), target


class _Memory:
    """Makes views of storages; a model has thousands of slices in a few of them."""

    def __init__(self) -> None:
        self._typed: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def view(self, tensor: torch.Tensor, form: _Form, first: int) -> torch.Tensor:
        """Return a view of the tensor's storage, whose first element is at this byte."""
        storage = tensor.untyped_storage()
        key = (storage._cdata, form.dtype)
        whole = self._typed.get(key)
        if whole is None:
            whole = torch.empty(0, dtype=form.dtype, device=tensor.device)
            length = storage.nbytes() // form.dtype.itemsize
            self._typed[key] = whole = whole.set_(storage, 0, (length,), (1,))  # type: ignore[call-overload]
        return torch.as_strided(whole, form.shape, form.strides, first // form.dtype.itemsize)


def _mark(tensor: torch.Tensor) -> Any:
    """Take the time on the tensor's device."""
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(started: Any, ended: Any) -> float:
    return ended - started if isinstance(started, float) else started.elapsed_time(ended) / 1e3
