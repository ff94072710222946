"""Watching an engine's loader: which parts of the sent memory it copied into which parts of the parameters."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Copy:
    """One ``dst.copy_(src)`` that the engine's loader made out of the staging memory.

    Attributes:
        dst: View of a parameter.
        src: View of the staging memory.
        entry: Number of the tensor in the bucket.
    """

    dst: torch.Tensor
    src: torch.Tensor
    entry: int


class Recorder(TorchDispatchMode):
    """Watches a loader: which parts of the staging memory went into which parts of the parameters.

    Args:
        flat: The staging memory.
        starts: First byte of every entry in it, ascending.
        owned: Storages of the model's parameters and buffers.

    Attributes:
        copies: Into the model, in the order in which they were made.
        fills: Parts of the model that were set to a constant, and to which.
        derived: Entries that were read, or changed in the staging memory, by something other than a view or a copy
            into the model (a cast, a transposition that materialises, a copy to somewhere else): what reached the
            parameters cannot be compared with what was sent.
        reworked: Entries whose destination was changed again after the copy.
        foreign: Whether something else happened that belongs to no entry: a parameter was computed from others, or
            counted up.
    """

    def __init__(self, flat: torch.Tensor, starts: list[int], owned: set[int]) -> None:
        super().__init__()
        self.copies: list[Copy] = []
        self.fills: list[tuple[torch.Tensor, Any]] = []
        self.derived: set[int] = set()
        self.reworked: set[int] = set()
        self.foreign = False
        self._base = storage_of(flat)
        self._start = flat.data_ptr()
        self._starts = starts
        self.owned = owned
        self._written: dict[int, list[Copy]] = {}
        # Storage -> entries that its contents were made of.  An address that is used again keeps what it had: an entry
        # too many goes by the loader then, which is slower and never wrong.
        self._made_of: dict[int, set[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is torch.ops.aten.copy_.default and self._staged(args[1]) and self._owns(args[0]):
            copy = Copy(args[0].detach(), args[1].detach(), self._entry(args[1]))
            self._note_rework(args[0])
            self.copies.append(copy)
            self._written.setdefault(storage_of(args[0]), []).append(copy)
            return func(*args, **kwargs)
        written, inputs = _operands(func, args, kwargs)
        sources = {entry for tensor in inputs for entry in self._entries(tensor)}
        reads_model = any(self._owns(tensor) for tensor in inputs)
        # A constant, such as the padding of a vocabulary, can be part of a plan; nothing else that is written can.
        constant = not inputs and func.overloadpacket in _FILLS
        for tensor in written:
            if self._owns(tensor):
                self._note_rework(tensor)
                if constant:
                    self.fills.append((tensor.detach(), args[1] if len(args) > 1 else 0))
                elif sources and not reads_model:
                    self.derived |= sources
                else:
                    self.foreign = True
            elif self._staged(tensor):
                self._note_derived(tensor)
            elif sources:
                self._made_of.setdefault(storage_of(tensor), set()).update(sources)
        out = func(*args, **kwargs)
        outputs = set() if written else {storage_of(tensor) for tensor in _tensors([out])}
        for tensor in inputs:
            if storage_of(tensor) in outputs:
                continue  # a view
            if self._staged(tensor):
                self._note_derived(tensor)
            elif self._owns(tensor):
                self.foreign = True  # something is computed from old weights
            if sources:
                for output in outputs:
                    self._made_of.setdefault(output, set()).update(sources)
        return out

    @property
    def repeatable(self) -> bool:
        """Whether copies and constants were all that happened."""
        return not (self.foreign or self.derived)

    def _note_derived(self, staged: torch.Tensor) -> None:
        self.derived.add(self._entry(staged))

    def _note_rework(self, target: torch.Tensor) -> None:
        for copy in self._written.get(storage_of(target), ()):
            if overlap(copy.dst, target):
                self.reworked.add(copy.entry)

    def _staged(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.numel() > 0 and storage_of(tensor) == self._base

    def _entries(self, tensor: torch.Tensor) -> set[int]:
        """Entries that a tensor is, or was made of."""
        return {self._entry(tensor)} if self._staged(tensor) else self._made_of.get(storage_of(tensor), set())

    def _owns(self, tensor: torch.Tensor) -> bool:
        return tensor.numel() > 0 and storage_of(tensor) in self.owned

    def _entry(self, tensor: torch.Tensor) -> int:
        return bisect.bisect_right(self._starts, tensor.data_ptr() - self._start) - 1


_FILLS = (torch.ops.aten.fill_, torch.ops.aten.zero_)


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one storage may share elements (by their outer bounds)."""

    def bounds(t: torch.Tensor) -> tuple[int, int]:
        low = t.data_ptr()
        return low, low + (sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1) * t.element_size()

    (a_low, a_high), (b_low, b_high) = bounds(a), bounds(b)
    return a_low < b_high and b_low < a_high


def _operands(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tensors that an operator writes to, and those that it reads and does not write to."""
    written: list[Any] = []
    read: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
        (written if argument.is_write else read).append(value)
    return _tensors(written), _tensors(read)


def _tensors(values: list[Any]) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(list(value))
    return found


def views(flat: torch.Tensor, entries: list[list[Any]]) -> list[tuple[str, torch.Tensor]]:
    """The bucket's tensors by name; entries are [name, dtype, shape, start, num_bytes]."""
    return [
        (name, flat[start : start + num_bytes].view(getattr(torch, dtype)).view(shape))
        for name, dtype, shape, start, num_bytes in entries
    ]


def differing(copies: list[Copy]) -> set[int]:
    """Entries whose parameters, read back, are not what the staging memory holds."""
    if not copies:
        return set()
    flags = torch.stack([(c.dst != c.src.to(c.dst)).any() for c in copies]).tolist()
    suspects = [c for c, flag in zip(copies, flags) if flag]
    # NaN differs from itself; a NaN that arrived as one is the trainer's.
    return {c.entry for c in suspects if not torch.allclose(c.dst, c.src.to(c.dst), rtol=0, atol=0, equal_nan=True)}
