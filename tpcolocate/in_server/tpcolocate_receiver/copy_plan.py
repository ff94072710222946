"""The copies of an engine's loader, as traced, and the same copies made again without it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .loader_trace import Copy, LoaderTrace, storage_of
from .module_walk import modules_of
from .regions import is_covered, region_of, whole


class Location(NamedTuple):
    """Where a parameter or buffer lies.

    Attributes:
        table: Of the module that has it.
        name: In that table.
        address: Of its first byte.
        storage: See `storage_of`.
    """

    table: dict[str, Any]
    name: str
    address: int
    storage: int


@dataclass(frozen=True, slots=True)
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

    def key(self) -> tuple[Any, ...]:
        """Return what is read and what is written; equal for equal copies."""
        dst = self.dst
        return dst.data_ptr(), tuple(dst.shape), dst.stride(), dst.dtype, self.offset, self.shape, self.strides

    def describe(self) -> list[Any] | None:
        """Return what is read, in JSON types; None if what is written has another shape."""
        if tuple(self.dst.shape) != self.shape:
            return None
        return [self.offset, list(self.shape), list(self.strides), str(self.dst.dtype).removeprefix("torch.")]


Fill = tuple[torch.Tensor, Any]
"""A part of the model, and the constant that the loader writes there."""


class CopyPlan:
    """The traced copies of one model's loader, tensor by tensor.

    A tensor is planned once it was seen that the loader does nothing but copy it.  Constants that the loader writes beside
    the copies (the padding of a vocabulary) are written again each time; one that a copy overwrites belongs to its tensor.

    Attributes:
        identity: Another one once the plan was discarded.
    """

    def __init__(self) -> None:
        self.discard()

    def discard(self) -> None:
        """Discard everything traced from the loader."""
        self.identity = secrets.token_hex(8)
        self._copies: dict[str, list[PlannedCopy]] = {}
        self._kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._fills: dict[tuple[int, int, tuple[int, ...]], Fill] = {}
        self._own_fills: dict[str, list[Fill]] = {}
        self._locations: dict[tuple[int, str], Location] = {}

    def add(self, trace: LoaderTrace, entries: Sequence[Sequence[Any]], locations: Sequence[Location]) -> None:
        """Add the copies of a traced load or dry run.

        Args:
            trace: Of the load.
            entries: What was given to the loader, each [name, dtype, shape, ...].
            locations: Of the model, from before the load: a parameter that its own load moves cannot be planned.
        """
        refused = trace.transformed | trace.overwritten
        if trace.has_other_writes:
            refused = set(range(len(entries)))
        of_entry: dict[int, list[Copy]] = {i: [] for i in range(len(entries)) if i not in refused}
        for copy in trace.copies:
            if copy.entry in of_entry:
                of_entry[copy.entry].append(copy)
        fills: list[Fill] = []  # that belong to no tensor
        own: dict[int, list[Fill]] = {}
        for dst, value in trace.fills if not trace.has_other_writes else ():
            below = {copy.entry for copy in trace.copies_into(dst)}
            if not below:
                fills.append((dst, value))
            elif len(below) == 1:
                own.setdefault(below.pop(), []).append((dst, value))
            else:
                for entry in below:  # written again for one of them, it would overwrite the others
                    of_entry.pop(entry, None)
        for i, copies in of_entry.items():
            name, dtype, shape, *_ = entries[i]
            self._kinds[name] = (dtype, tuple(shape))
            self._copies[name] = [
                PlannedCopy(c.dst, trace.inputs.offset(c.src, i), tuple(c.src.shape), tuple(c.src.stride()))
                for c in copies
            ]
            self._own_fills[name] = own.get(i, [])
        for fill in fills:
            self._fills.setdefault((storage_of(fill[0]), fill[0].data_ptr(), tuple(fill[0].shape)), fill)
        written = {storage_of(c.dst) for copies in of_entry.values() for c in copies}
        written |= {storage_of(dst) for dst, _ in (*fills, *(f for of in own.values() for f in of))}
        for location in locations:
            if location.storage in written:
                self._locations[id(location.table), location.name] = location

    def covers(self, entries: Sequence[Sequence[Any]]) -> bool:
        """Return whether all these tensors, of these shapes and dtypes, can be copied without the loader."""
        return all(self._kinds.get(name) == (dtype, tuple(shape)) for name, dtype, shape, *_ in entries)

    def is_current(self) -> bool:
        """Return whether the parameters are where they were; a stale pointer is never written through."""
        for location in self._locations.values():
            tensor = location.table.get(location.name)
            if tensor is None or tensor.data_ptr() != location.address:
                return False
        return True

    def deviating(self, seen: CopyPlan, names: Sequence[str]) -> list[str]:
        """Return which planned tensors were loaded in another way than planned.

        Args:
            seen: Traced from a load of these tensors.
            names: Of the tensors.
        """
        return [
            name
            for name in names
            if name not in seen._copies
            or [one.key() for one in self._copies[name]] != [one.key() for one in seen._copies[name]]
        ]

    def describe(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Return name -> what is read of it, copy by copy, without names whose copies cannot be described.

        Names of which the same is read share the object that says so.
        """
        found: dict[str, list[Any]] = {}
        described: dict[tuple[Any, ...], list[Any]] = {}
        for name in names:
            copies = self._copies.get(name)
            if copies is None:
                continue
            key = tuple((copy.offset, copy.shape, copy.strides, copy.dst.dtype, copy.dst.shape) for copy in copies)
            if key not in described:
                described[key] = [copy.describe() for copy in copies]
            if None not in described[key]:
                found[name] = described[key]
        return found

    def write_constants(self, names: Sequence[str]) -> None:
        """Write the loader's constants, before the copies of these tensors."""
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
            for planned in self._copies[name]:
                src = torch.empty(0, dtype=kind, device=flat.device)
                src.set_(storage, (base + start) // kind.itemsize + planned.offset, planned.shape, planned.strides)
                made.append(Copy(planned.dst, src, i))
        self.write_constants([entry[0] for entry in entries])
        if made:
            torch._foreach_copy_([c.dst for c in made], [c.src for c in made])
        return made

    def target(self, name: str, number: int) -> torch.Tensor:
        """Return what the copy of that number writes to."""
        return self._copies[name][number].dst

    def unwritten(self, model: Any) -> list[str]:
        """Return the parameters that no planned copy or constant, or only a part of them, writes."""
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
    if not parameter.is_contiguous():  # its parts cannot be located
        return sum(part.numel() for part in parts) >= parameter.numel()
    if _are_whole(parameter, parts):
        return True
    regions = []
    for part in parts:
        offset = (part.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        if offset < 0 or offset >= parameter.numel() or part.numel() == 0:
            continue
        if part.numel() == parameter.numel():
            regions.append(whole(parameter.shape))
            continue
        found = region_of(offset, tuple(part.shape), tuple(part.stride()), tuple(parameter.shape))
        if found is not None:
            regions.append(found[0])
    return is_covered(regions, tuple(parameter.shape))


def _are_whole(parameter: torch.Tensor, parts: Sequence[torch.Tensor]) -> bool:
    """Return whether the contiguous ones of these parts cover a parameter, as the experts of a fused one do."""
    size, first = parameter.element_size(), parameter.data_ptr()
    spans = sorted(
        (part.data_ptr() - first, part.numel() * part.element_size()) for part in parts if part.is_contiguous()
    )
    end = 0
    for start, length in spans:
        if start > end:
            return False
        end = max(end, start + length)
    return end >= parameter.numel() * size


def locations_of(model: Any) -> list[Location]:
    """Return where every parameter and buffer of a model lies now."""
    found: list[Location] = []
    for module in modules_of(model):
        for table in (module._parameters, module._buffers):
            if table:
                for name, tensor in table.items():
                    if tensor is not None:
                        found.append(Location(table, name, tensor.data_ptr(), storage_of(tensor)))
    return found
