"""Watching an engine's loader: which parts of the sent memory it copied into which parts of the parameters."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .checksums import word_view


@dataclass
class Copy:
    """One ``dst.copy_(src)`` that the engine's loader made out of what it was given.

    Attributes:
        dst: View of a parameter.
        src: View of a tensor that was given.
        entry: Its number.
    """

    dst: torch.Tensor
    src: torch.Tensor
    entry: int


class Given(Protocol):
    """The tensors that a loader is given, and how their views are told apart."""

    def holds(self, tensor: torch.Tensor) -> bool: ...
    def entry(self, tensor: torch.Tensor) -> int: ...
    def offset(self, tensor: torch.Tensor, entry: int) -> int: ...


class BucketTensors:
    """Tensors that lie one behind the other in staging memory.

    Args:
        flat: The staging memory.
        entries: Each tensor's [name, dtype, shape, start, num_bytes], ascending.
    """

    def __init__(self, flat: torch.Tensor, entries: Sequence[Sequence[Any]]) -> None:
        self._base = storage_of(flat)
        self._start = flat.data_ptr()
        self._starts = [entry[3] for entry in entries]

    def holds(self, tensor: torch.Tensor) -> bool:
        return storage_of(tensor) == self._base and tensor.numel() > 0

    def entry(self, tensor: torch.Tensor) -> int:
        """Number of the tensor that a view is of."""
        return bisect.bisect_right(self._starts, tensor.data_ptr() - self._start) - 1

    def offset(self, tensor: torch.Tensor, entry: int) -> int:
        """First element of a view, counted from its tensor's first."""
        return (tensor.data_ptr() - self._start - self._starts[entry]) // tensor.element_size()


class MetaTensors:
    """Tensors of which there is nothing but their description (on torch's ``meta`` device).

    Args:
        entries: Each tensor's [name, dtype, shape].
    """

    def __init__(self, entries: Sequence[Sequence[Any]]) -> None:
        self.tensors = [
            (name, torch.empty(shape, dtype=getattr(torch, dtype), device="meta")) for name, dtype, shape in entries
        ]
        self._entries = {storage_of(tensor): i for i, (_, tensor) in enumerate(self.tensors)}

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.is_meta and storage_of(tensor) in self._entries and tensor.numel() > 0

    def entry(self, tensor: torch.Tensor) -> int:
        return self._entries[storage_of(tensor)]

    def offset(self, tensor: torch.Tensor, entry: int) -> int:
        return int(tensor.storage_offset())


class DryRunError(RuntimeError):
    """A loader does something that cannot be watched without weights."""


class LoaderTrace(TorchDispatchMode):
    """Watches a loader: which parts of what it is given went into which parts of the parameters.

    Args:
        given: What it is given.
        owned: Storages of the model's parameters and buffers.
        carries_out: Whether the model is written to.  Otherwise this is a rehearsal: copies and constants are noted and
            not made, and anything else that would read or write the model ends it.

    Attributes:
        copies: Into the model, in the order in which they were made.
        fills: Parts of the model that were set to a constant, and to which.
        derived: Entries that were read, or changed where they lay, by something other than a view or a copy
            into the model (a cast, a transposition that materialises, a copy to somewhere else): what reached the
            parameters cannot be compared with what was sent.
        reworked: Entries whose destination was changed again after the copy.
        foreign: Whether something else happened that belongs to no entry: a parameter was computed from others, or
            counted up.
    """

    def __init__(self, given: Given, owned: set[int], *, carries_out: bool = True) -> None:
        super().__init__()
        self.given = given
        self.copies: list[Copy] = []
        self.fills: list[tuple[torch.Tensor, Any]] = []
        self.derived: set[int] = set()
        self.reworked: set[int] = set()
        self.foreign = False
        self._carries_out = carries_out
        self.owned = owned
        self._written: dict[int, _Spans] = {}
        # Storage -> entries that its contents were made of.  An address that is used again keeps what it had: an entry
        # too many goes by the loader then, which is slower and never wrong.
        self._made_of: dict[int, set[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is _COPY and self.given.holds(args[1]) and self._owns(args[0]):
            copy = Copy(args[0].detach(), args[1].detach(), self.given.entry(args[1]))
            self._note_rework(args[0])
            self.copies.append(copy)
            self._written.setdefault(storage_of(args[0]), _Spans()).add(copy)
            return func(*args, **kwargs) if self._carries_out else args[0]
        if not self._carries_out:
            if func is _TO and args[0].is_meta:
                kwargs = {**kwargs, "device": "meta"}  # wherever it was to go
            elif func is _COPY and args[1].is_meta and not args[1].numel():
                return args[0]
        operator = _OPERATORS.get(func)
        if operator is None:
            operator = _OPERATORS[func] = _Operator.of(func)
        if operator.is_view:
            # Most of what a loader does.  Schemas promise a view also where a copy is made if there must be one, as
            # reshape does when it is not decomposed (inference mode): the memory tells.
            out = func(*args, **kwargs)
            if not (isinstance(out, torch.Tensor) and storage_of(out) == storage_of(args[0])):
                self._note_reads(operator.read(args, kwargs), out)
            return out
        written, inputs = operator.written(args, kwargs), operator.read(args, kwargs)
        if not written:
            out = func(*args, **kwargs)
            self._note_reads(inputs, out)
            return out
        sources = self._sources(inputs)
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
            elif self.given.holds(tensor):
                self._note_derived(tensor)
            elif sources:
                self._made_of.setdefault(storage_of(tensor), set()).update(sources)
        if not self._carries_out and any(self._owns(tensor) for tensor in written):
            if self.foreign or len(written) > 1:
                raise DryRunError(f"{func} changes the model by more than a copy or a constant")
            return written[0]
        out = func(*args, **kwargs)
        self._note_reads(inputs, None)
        return out

    @property
    def repeatable(self) -> bool:
        """Whether copies and constants were all that happened."""
        return not (self.foreign or self.derived)

    def below(self, target: torch.Tensor) -> list[Copy]:
        """Copies that went where a tensor lies (by their outer bounds)."""
        spans = self._written.get(storage_of(target))
        return [] if spans is None else spans.meeting(target)

    def _note_reads(self, inputs: list[torch.Tensor], out: Any) -> None:
        """Enter what an operator read, and what it made of that.

        Args:
            inputs: Tensors that it did not write to.
            out: What it returned; None if that is what it wrote to.
        """
        outputs = {storage_of(tensor) for tensor in _tensors([out])}
        computed = False
        for tensor in inputs:
            if storage_of(tensor) in outputs:
                continue  # a view
            computed = True
            if self.given.holds(tensor):
                self._note_derived(tensor)
            elif self._owns(tensor):
                self.foreign = True  # something is computed from old weights
        if computed and (sources := self._sources(inputs)):
            for output in outputs:
                self._made_of.setdefault(output, set()).update(sources)

    def _note_derived(self, staged: torch.Tensor) -> None:
        self.derived.add(self.given.entry(staged))

    def _note_rework(self, target: torch.Tensor) -> None:
        self.reworked.update(copy.entry for copy in self.below(target))

    def _sources(self, tensors: list[torch.Tensor]) -> set[int]:
        """Entries that tensors are, or were made of."""
        found: set[int] = set()
        for tensor in tensors:
            if self.given.holds(tensor):
                found.add(self.given.entry(tensor))
            else:
                found |= self._made_of.get(storage_of(tensor), set())
        return found

    def _owns(self, tensor: torch.Tensor) -> bool:
        return storage_of(tensor) in self.owned and tensor.numel() > 0


_COPY = torch.ops.aten.copy_.default
_TO = torch.ops.aten._to_copy.default
_FILLS = (torch.ops.aten.fill_, torch.ops.aten.zero_)


def storage_of(tensor: torch.Tensor) -> int:
    """Of a tensor's memory: its address; without memory (``meta``) another number, which no address is."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or -storage._cdata


def bounds(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor's elements, and the one behind the last."""
    low = tensor.data_ptr()
    if tensor.is_contiguous():
        return low, low + tensor.numel() * tensor.element_size()
    span = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride())) + 1
    return low, low + span * tensor.element_size()


class _Spans:
    """The copies into one storage, in the order of their addresses: one of fused experts takes hundreds."""

    def __init__(self) -> None:
        self._lows: list[int] = []
        self._rest: list[tuple[int, Copy]] = []
        self._longest = 0

    def add(self, copy: Copy) -> None:
        low, high = bounds(copy.dst)
        i = bisect.bisect_left(self._lows, low)
        self._lows.insert(i, low)
        self._rest.insert(i, (high, copy))
        self._longest = max(self._longest, high - low)

    def meeting(self, target: torch.Tensor) -> list[Copy]:
        low, high = bounds(target)
        # What begins further before the target than the longest of them is over where it starts.
        first = bisect.bisect_right(self._lows, low - self._longest)
        last = bisect.bisect_left(self._lows, high)
        return [copy for end, copy in self._rest[first:last] if end > low]


@dataclass(frozen=True, slots=True)
class _Operator:
    """What an operator's schema says, read once: that takes longer than most operators do.

    Attributes:
        writes: Position and name of every argument that may hold tensors which are written to.
        reads: The same, of those that are only read.
        is_view: Whether its result (a tensor or a list) is said to alias its first argument, the only tensor, and nothing
            is written.
    """

    writes: tuple[tuple[int | None, str], ...]
    reads: tuple[tuple[int | None, str], ...]
    is_view: bool

    @classmethod
    def of(cls, func: Any) -> _Operator:
        writes: list[tuple[int | None, str]] = []
        reads: list[tuple[int | None, str]] = []
        kinds: list[tuple[int, str]] = []
        for i, argument in enumerate(func._schema.arguments):
            # An unknown type may hold tensors; numbers, and lists of them, do not.
            if _PLAIN.fullmatch(str(argument.type)):
                continue
            (writes if argument.is_write else reads).append((None if argument.kwarg_only else i, argument.name))
            kinds.append((i, str(argument.type)))
        aliases = [result.alias_info is not None for result in func._schema.returns]
        return cls(tuple(writes), tuple(reads), not writes and kinds == [(0, "Tensor")] and aliases == [True])

    def written(self, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        return _tensors([_value(where, args, kwargs) for where in self.writes])

    def read(self, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        return _tensors([_value(where, args, kwargs) for where in self.reads])


_OPERATORS: dict[Any, _Operator] = {}
_PLAIN = re.compile(r"(List\[|Optional\[)*(int|float|bool|number|str|SymInt|Device|Generator|Storage)\]*")


def _value(where: tuple[int | None, str], args: Any, kwargs: dict[str, Any]) -> Any:
    position, name = where
    return kwargs.get(name) if position is None or position >= len(args) else args[position]


def _tensors(values: list[Any]) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(list(value))
    return found


def views(flat: torch.Tensor, entries: Sequence[Sequence[Any]]) -> list[tuple[str, torch.Tensor]]:
    """The bucket's tensors by name; entries are [name, dtype, shape, start, num_bytes]."""
    return [
        (name, flat[start : start + num_bytes].view(getattr(torch, dtype)).view(shape))
        for name, dtype, shape, start, num_bytes in entries
    ]


def quantised(copies: list[Copy], entries: Sequence[Sequence[Any]]) -> str | None:
    """Why these copies are not those of weights that can be updated; None if they are."""
    for copy in copies:
        if copy.dst.element_size() == 1 and copy.dst.dtype not in (copy.src.dtype, torch.bool):
            return (
                f"{entries[copy.entry][0]} is {copy.src.dtype} and went into a parameter of {copy.dst.dtype}: the engine "
                "quantises its weights, and its loader does not do that for an update"
            )
    return None


def differing(copies: list[Copy]) -> set[int]:
    """Entries whose parameters, read back, are not what the staging memory holds."""
    if not copies:
        return set()
    flags = torch.stack([_other_bits(c.dst, c.src.to(c.dst)) for c in copies]).tolist()
    suspects = [c for c, flag in zip(copies, flags) if flag]
    # Other bits may mean the same (zeros of two signs); a NaN that arrived as one is the trainer's.
    return {c.entry for c in suspects if not torch.allclose(c.dst, c.src.to(c.dst), rtol=0, atol=0, equal_nan=True)}


_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _other_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Whether two tensors of one shape and dtype differ in any bit; a scalar, not waited for.

    By words where both lie so: each is read once, and what is written in between is an eighth of that.
    """
    if a.dtype.is_complex or a.is_neg() or b.is_neg():  # whose memory may hold other values than they have
        return (a != b).any()
    one, other = word_view(a), word_view(b)
    if one is None or other is None:
        one, other = (tensor.view(_SAME_SIZE[tensor.element_size()]) for tensor in (a, b))
    return torch.ne(one, other).any()
