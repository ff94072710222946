"""What was learned from watching an engine's loader, and the same copies made again without it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import kernels as one_pass
from .checksums import word_sum, word_view
from .loader_trace import Copy, LoaderTrace, storage_of
from .module_walk import modules_of
from .regions import is_covered, region_of, whole
from .replay import Lanes, Replay

Place = tuple[dict[str, Any], str, int, int]
"""The table of the module that holds a parameter or buffer, its name there, its first byte, its storage."""


@dataclass(frozen=True)
class PlannedCopy:
    """One copy of a tensor, or a part of it, into a parameter.

    Attributes:
        dst: View of the parameter.
        offset: First element that is read, from the tensor's first.
        shape: Of what is read.
        strides: Of what is read, in elements of a contiguous tensor.
    """

    dst: torch.Tensor
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def where(self) -> tuple[Any, ...]:
        """What is read and what is written, to be compared."""
        dst = self.dst
        return dst.data_ptr(), tuple(dst.shape), dst.stride(), dst.dtype, self.offset, self.shape, self.strides

    def described(self) -> list[Any] | None:
        """In JSON types; None if what is written has another shape than what is read."""
        if tuple(self.dst.shape) != self.shape:
            return None
        return [self.offset, list(self.shape), list(self.strides), str(self.dst.dtype).removeprefix("torch.")]


class CopyPlan:
    """What is known of one model's loader, tensor by tensor.

    A tensor is known once its copies are all that the loader does with it.  Constants that the loader writes beside
    them (the padding of a vocabulary) are written again each time; a constant below a copy belongs to its tensor.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Know nothing, and be known as others."""
        self.identity = secrets.token_hex(8)
        self._copies: dict[str, list[PlannedCopy]] = {}
        self._kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._fills: dict[tuple[int, int, tuple[int, ...]], tuple[torch.Tensor, Any]] = {}
        self._own_fills: dict[str, list[tuple[torch.Tensor, Any]]] = {}
        self._places: dict[tuple[int, str], tuple[dict[str, Any], int]] = {}
        self.programs: dict[str, CopyProgram] = {}

    def learn(self, recorder: LoaderTrace, entries: Sequence[Sequence[Any]], places: Sequence[Place]) -> None:
        """Remember a watched load, or a rehearsal of one.

        Args:
            recorder: Of what has just ended.
            entries: What was given to the loader, each tensor's [name, dtype, shape, ...].
            places: Of the model, from before the load: a parameter that its own load moves is not known.
        """
        refused = recorder.derived | recorder.reworked
        if recorder.foreign:
            refused = set(range(len(entries)))
        of_entry: dict[int, list[Copy]] = {i: [] for i in range(len(entries)) if i not in refused}
        for copy in recorder.copies:
            if copy.entry in of_entry:
                of_entry[copy.entry].append(copy)
        fills: list[tuple[torch.Tensor, Any]] = []  # that belong to no tensor
        own: dict[int, list[tuple[torch.Tensor, Any]]] = {}
        for dst, value in recorder.fills if not recorder.foreign else ():
            below = {copy.entry for copy in recorder.below(dst)}
            if not below:
                fills.append((dst, value))
            elif len(below) == 1:
                own.setdefault(below.pop(), []).append((dst, value))
            else:
                for entry in below:  # made again for one of them, it would wipe out the others
                    of_entry.pop(entry, None)
        for i, copies in of_entry.items():
            name, dtype, shape, *_ = entries[i]
            self._kinds[name] = (dtype, tuple(shape))
            self._copies[name] = [
                PlannedCopy(c.dst, recorder.given.offset(c.src, i), tuple(c.src.shape), tuple(c.src.stride()))
                for c in copies
            ]
            self._own_fills[name] = own.get(i, [])
        for fill in fills:
            self._fills.setdefault((storage_of(fill[0]), fill[0].data_ptr(), tuple(fill[0].shape)), fill)
        written = {storage_of(c.dst) for copies in of_entry.values() for c in copies}
        written |= {storage_of(dst) for dst, _ in (*fills, *(f for of in own.values() for f in of))}
        for table, name, address, storage in places:
            if storage in written:
                self._places[id(table), name] = (table, address)

    def knows(self, entries: Sequence[Sequence[Any]]) -> bool:
        """Whether all these tensors, of these shapes and dtypes, can be copied without the loader."""
        return all(self._kinds.get(name) == (dtype, tuple(shape)) for name, dtype, shape, *_ in entries)

    def fit(self) -> bool:
        """Whether the parameters are where they were; a stale pointer is never written through."""
        for (_, name), (table, place) in self._places.items():
            tensor = table.get(name)
            if tensor is None or tensor.data_ptr() != place:
                return False
        return True

    def otherwise(self, seen: CopyPlan, names: Sequence[str]) -> list[str]:
        """Which of these tensors, all of them known, were loaded otherwise than is known.

        Args:
            seen: What loading just these has taught.
            names: Of the tensors.
        """
        return [
            name
            for name in names
            if name not in seen._copies
            or [one.where() for one in self._copies[name]] != [one.where() for one in seen._copies[name]]
        ]

    def described(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Name -> what is read of it, copy by copy; names whose copies cannot be told in this way are left out."""
        found = {}
        for name in names:
            copies = [copy.described() for copy in self._copies.get(name, ())]
            if name in self._copies and None not in copies:
                found[name] = copies
        return found

    def fill(self, names: Sequence[str]) -> None:
        """Write the constants that belong to these tensors; before their copies."""
        for name in names:
            for dst, value in self._own_fills[name]:
                dst.fill_(value)
        for dst, value in self._fills.values():
            dst.fill_(value)

    def replay(self, flat: torch.Tensor, entries: Sequence[Sequence[Any]]) -> list[Copy]:
        """Make the copies of a bucket's tensors again."""
        storage, base = flat.untyped_storage(), flat.storage_offset()
        made = []
        for i, (name, dtype, _, start, _) in enumerate(entries):
            kind = getattr(torch, dtype)
            for learnt in self._copies[name]:
                src = torch.empty(0, dtype=kind, device=flat.device)
                src.set_(storage, (base + start) // kind.itemsize + learnt.offset, learnt.shape, learnt.strides)
                made.append(Copy(learnt.dst, src, i))
        self.fill([entry[0] for entry in entries])
        if made:
            torch._foreach_copy_([c.dst for c in made], [c.src for c in made])
        return made

    def target(self, name: str, number: int) -> torch.Tensor:
        """What the copy of that number writes to."""
        return self._copies[name][number].dst

    def unwritten(self, model: Any) -> list[str]:
        """Parameters that no known tensor, or only a part of them, is copied or filled into."""
        parts: dict[int, list[torch.Tensor]] = {}
        targets = [c.dst for copies in self._copies.values() for c in copies]
        for dst in (
            *targets,
            *(d for d, _ in self._fills.values()),
            *(d for of in self._own_fills.values() for d, _ in of),
        ):
            parts.setdefault(storage_of(dst), []).append(dst)
        found = []
        for name, parameter in model.named_parameters():
            if parameter.numel() and not _is_written(parameter, parts.get(storage_of(parameter), [])):
                found.append(name)
        return found


def _is_written(parameter: torch.Tensor, parts: Sequence[torch.Tensor]) -> bool:
    if not parameter.is_contiguous():  # only its bounds can be told
        return sum(part.numel() for part in parts) >= parameter.numel()
    boxes = []
    for part in parts:
        offset = (part.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        if offset < 0 or offset >= parameter.numel() or part.numel() == 0:
            continue
        if part.numel() == parameter.numel():
            boxes.append(whole(parameter.shape))
            continue
        found = region_of(offset, tuple(part.shape), tuple(part.stride()), tuple(parameter.shape))
        if found is not None:
            boxes.append(found[0])
    return is_covered(boxes, tuple(parameter.shape))


def places_of(model: Any) -> list[Place]:
    """Where every parameter and buffer of a model lies now."""
    found: list[Place] = []
    for module in modules_of(model):
        for table in (module._parameters, module._buffers):
            if table:
                for name, tensor in table.items():
                    if tensor is not None:
                        found.append((table, name, tensor.data_ptr(), storage_of(tensor)))
    return found


Views = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Number of a copy -> its target and its source."""


class CopyProgram:
    """Copies out of memory that stays mapped, prepared once and run at every sync.

    Args:
        pieces: From the trainer, each [tensor name, number of its copy, starts and lengths of the part of what that copy
            writes (None: all of it), region, first byte in it, dtype there, strides there in elements].
        plans: Of the model.
    """

    def __init__(self, pieces: Sequence[Sequence[Any]], plans: CopyPlan) -> None:
        self.regions = {piece[4] for piece in pieces}
        self._names = list(dict.fromkeys(piece[0] for piece in pieces))
        self._dst: list[torch.Tensor] = []
        self._src: list[tuple[str, int, torch.dtype, list[int]]] = []
        for name, number, starts, lengths, region, first, dtype, strides in pieces:
            dst = plans.target(name, number)
            if starts is not None:
                for dim, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                    dst = dst.narrow(dim, start, length)
            self._dst.append(dst)
            self._src.append((region, first, getattr(torch, dtype), strides))
        self._words = [word_view(dst) for dst in self._dst]
        self._device = self._dst[0].device if self._dst else torch.device("cpu")
        self._sums = torch.empty(len(self._dst), dtype=torch.int64, device=self._device)
        self._sum_of = self._sums.unbind()
        self._views: Views | None = None
        self._sheet: one_pass.Sheet | None = None
        self._others = list(range(len(self._dst)))
        """Numbers of the copies that are torch's."""
        self._is_arranged = False
        self._replay = Replay(self._device)

    def run(
        self, plans: CopyPlan, regions: dict[str, torch.Tensor], *, keep: bool
    ) -> tuple[list[int], dict[str, float]]:
        """Copy, and sum up what the parameters hold afterwards; both are over when it returns.

        Args:
            plans: Of the model.
            regions: What is mapped, by name.
            keep: Whether the regions stay mapped, so that their views can be used again.

        Returns:
            `word_sum` of every piece's target, in order; and seconds: ``copy`` (and sum), or ``one_pass`` where the one
            kernel does all of it.
        """
        if not self._dst:
            return [], {}
        launch = one_pass.ready(self._device)
        views = self._views
        if views is None or (launch is not None and not self._is_arranged):
            views = self._arranged(regions, launch)
            self._views = views if keep else None
        begun = _mark(self._sums)
        plans.fill(self._names)
        if self._sheet is not None:
            self._sums.zero_()
            self._sheet.run(launch, self._sums)
        if self._others and keep:
            self._replay.run(lambda: self._queue(views))
        elif self._others:
            self._queue(views)
        for i in self._others:
            if self._words[i] is None:
                self._sum_of[i].copy_(word_sum(self._dst[i]))
        ended = _mark(self._sums)
        found = self._sums.tolist()
        return found, {"copy" if self._others else "one_pass": _between(begun, ended)}

    def forget(self) -> None:
        """Drop the views, so that the regions can be let go."""
        self._views = None
        self._replay.forget()

    def _arranged(self, regions: dict[str, torch.Tensor], launch: Any | None) -> Views:
        """Views of the copies that are torch's: of those that the kernel cannot make, and of all as long as it is not there."""
        if self._sheet is not None and self._sheet.place(regions):
            return self._viewed(regions, self._others)
        views = self._viewed(regions, range(len(self._dst)))
        if launch is None:
            return views
        parts = {i: one_pass.parts_of(*view) for i, view in views.items()}
        copies = [(i, self._src[i][0], of_one) for i, of_one in parts.items() if of_one is not None]
        self._sheet = one_pass.Sheet(copies, regions, self._device) if copies else None
        self._others = [i for i, of_one in parts.items() if of_one is None]
        self._is_arranged = True
        self._replay.forget()  # others than these may have been queued before
        return {i: views[i] for i in self._others}

    def _queue(self, views: Views) -> None:
        """Those copies that are torch's, and the sums of the targets that can be viewed in whole words."""
        lanes = Lanes(self._device)
        # One by one: a batched copy of tensors this large is slower on an H100.
        for i in self._others:
            (dst, src), words, out = views[i], self._words[i], self._sum_of[i]
            with lanes.lane(i):
                dst.copy_(src)
                if words is not None:
                    torch.sum(words, dim=tuple(range(words.dim())), out=out)
        lanes.join()

    def _viewed(self, regions: dict[str, torch.Tensor], numbers: Sequence[int]) -> Views:
        """Target and source of copies; in whole words where both sides allow it, which is faster where rows are cut."""
        found: Views = {}
        for i in numbers:
            dst, words, (region, first, dtype, strides) = self._dst[i], self._words[i], self._src[i]
            src = _view(regions[region], first, dtype, dst.shape, strides)
            src_words = word_view(src) if words is not None and dtype == dst.dtype else None
            found[i] = (dst, src) if words is None or src_words is None else (words, src_words)
        return found


def _mark(tensor: torch.Tensor) -> Any:
    """Now, as the tensor's device has it."""
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begun: Any, ended: Any) -> float:
    return ended - begun if isinstance(begun, float) else begun.elapsed_time(ended) / 1e3


def _view(
    region: torch.Tensor, first: int, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]
) -> torch.Tensor:
    start = region.storage_offset() + first
    if start % dtype.itemsize:
        raise ValueError(f"byte {start} of a region is no place for {dtype}")
    out = torch.empty(0, dtype=dtype, device=region.device)
    return out.set_(region.untyped_storage(), start // dtype.itemsize, tuple(shape), tuple(strides))
