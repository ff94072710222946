"""Tracing an engine's loader: which parts of the tensors that it is given are copied into which parts of the parameters."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .checksums import word_view


@dataclass
class Copy:
    """One ``dst.copy_(src)`` of the engine's loader.

    Attributes:
        dst: View of a parameter.
        src: View of one of the loader's inputs.
        entry: Number of that input.
    """

    dst: torch.Tensor
    src: torch.Tensor
    entry: int


class Inputs(Protocol):
    """The tensors that a loader is given, which are known again by their memory."""

    def contains(self, tensor: torch.Tensor) -> bool: ...
    def entry(self, tensor: torch.Tensor) -> int: ...
    def offset(self, tensor: torch.Tensor, entry: int) -> int: ...


class BucketTensors:
    """Inputs that lie one behind the other in staging memory.

    Args:
        flat: The staging memory.
        entries: Each tensor's [name, dtype, shape, start, num_bytes], ascending.
    """

    def __init__(self, flat: torch.Tensor, entries: Sequence[Sequence[Any]]) -> None:
        self._base = storage_of(flat)
        self._start = flat.data_ptr()
        self._starts = [entry[3] for entry in entries]

    def contains(self, tensor: torch.Tensor) -> bool:
        return storage_of(tensor) == self._base and tensor.numel() > 0

    def entry(self, tensor: torch.Tensor) -> int:
        """Return the number of the input that a view belongs to."""
        return bisect.bisect_right(self._starts, tensor.data_ptr() - self._start) - 1

    def offset(self, tensor: torch.Tensor, entry: int) -> int:
        """Return the first element of a view, counted from the first of its input."""
        return (tensor.data_ptr() - self._start - self._starts[entry]) // tensor.element_size()


class MetaTensors:
    """Inputs without memory, on torch's ``meta`` device.

    Args:
        entries: Each tensor's [name, dtype, shape].
    """

    def __init__(self, entries: Sequence[Sequence[Any]]) -> None:
        self.tensors = [
            (name, torch.empty(shape, dtype=getattr(torch, dtype), device="meta")) for name, dtype, shape in entries
        ]
        self._entries = {storage_of(tensor): i for i, (_, tensor) in enumerate(self.tensors)}

    def contains(self, tensor: torch.Tensor) -> bool:
        return tensor.is_meta and storage_of(tensor) in self._entries and tensor.numel() > 0

    def entry(self, tensor: torch.Tensor) -> int:
        return self._entries[storage_of(tensor)]

    def offset(self, tensor: torch.Tensor, entry: int) -> int:
        return int(tensor.storage_offset())


class DryRunError(RuntimeError):
    """A loader does something that cannot be traced without weights."""


@dataclass
class Joins:
    """What shows that a loader loads entries only together.

    Attributes:
        computed: Sets of entries that one part of the model was computed from.
        held_back: Pairs of entries: one that was only copied when the other was drawn, and the other.
        drawn: The entry that the loader has drawn last; None if that shows nothing.
    """

    computed: list[set[int]] = field(default_factory=list)
    held_back: list[set[int]] = field(default_factory=list)
    drawn: int | None = None


class LoaderTrace(TorchDispatchMode):
    """Traces a loader while it runs.

    Args:
        inputs: What the loader is given; its entries are numbered.
        owned: Storages of the model's parameters and buffers.
        is_dry_run: Whether copies and constants are recorded and not made; anything else that would read or write the
            model raises then.

    Attributes:
        copies: Into the model, in their order.
        fills: Parts of the model that were set to a constant, each with the constant.
        transformed: Entries that were read or changed by something other than a view or a copy into the model (a cast, a
            materialised transposition, a copy to somewhere else): what reached the parameters cannot be compared with
            what was sent.
        overwritten: Entries whose destination was changed again after the copy.
        has_other_writes: Whether something changed the model that belongs to no entry: a parameter was computed from
            others, or counted up.
        joins: Which entries it loads only together.
    """

    def __init__(self, inputs: Inputs, owned: set[int], *, is_dry_run: bool = False) -> None:
        super().__init__()
        self.inputs = inputs
        self.copies: list[Copy] = []
        self.fills: list[tuple[torch.Tensor, Any]] = []
        self.transformed: set[int] = set()
        self.overwritten: set[int] = set()
        self.has_other_writes = False
        self.joins = Joins()
        self._is_dry_run = is_dry_run
        self._owned = owned
        self._written: dict[int, _Spans] = {}
        # Storage -> entries that its contents were computed from.
        self._made_of: dict[int, set[int]] = {}

    def draw(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the loader's inputs, and note which one it has drawn last."""
        for i, named in enumerate(tensors):
            self.joins.drawn = i
            yield named
        self.joins.drawn = None  # a loader that draws them all first, and copies then, shows nothing by that

    def unused(self, num_entries: int) -> list[int]:
        """Return the entries that were neither read nor copied."""
        used = {copy.entry for copy in self.copies} | self.transformed
        return [i for i in range(num_entries) if i not in used]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is _COPY and self.inputs.contains(args[1]) and self._owns(args[0]):
            copy = Copy(args[0].detach(), args[1].detach(), self.inputs.entry(args[1]))
            self._note_overwrite(args[0])
            self.copies.append(copy)
            if self.joins.drawn is not None and copy.entry != self.joins.drawn:
                self.joins.held_back.append({copy.entry, self.joins.drawn})
            self._written.setdefault(storage_of(args[0]), _Spans()).add(copy)
            return args[0] if self._is_dry_run else func(*args, **kwargs)
        if self._is_dry_run:
            if func is _TO and args[0].is_meta:
                kwargs = {**kwargs, "device": "meta"}  # wherever it was to go
            elif func is _COPY and args[1].is_meta and not args[1].numel():
                return args[0]
        operator = _OPERATORS.get(func)
        if operator is None:
            operator = _OPERATORS[func] = _Operator.of(func)
        if operator.is_view:
            # Most of what a loader does.  Schemas promise a view also where a copy may be made, as reshape does when it
            # is not decomposed (inference mode); the memory shows which it was.
            out = func(*args, **kwargs)
            if not (isinstance(out, torch.Tensor) and storage_of(out) == storage_of(args[0])):
                self._note_reads(operator.read(args, kwargs), out)
            return out
        written, read = operator.written(args, kwargs), operator.read(args, kwargs)
        if not written:
            out = func(*args, **kwargs)
            self._note_reads(read, out)
            return out
        sources = self._sources(read)
        reads_model = any(self._owns(tensor) for tensor in read)
        # A constant, such as the padding of a vocabulary, can be part of a plan; nothing else that is written can.
        constant = not read and func.overloadpacket in _FILLS
        for tensor in written:
            if self._owns(tensor):
                self._note_overwrite(tensor)
                if constant:
                    self.fills.append((tensor.detach(), args[1] if len(args) > 1 else 0))
                elif sources and not reads_model:
                    self.transformed |= sources
                    if len(sources) > 1:
                        self.joins.computed.append(set(sources))
                else:
                    self.has_other_writes = True
            elif self.inputs.contains(tensor):
                self._note_transformed(tensor)
            elif sources:
                self._made_of.setdefault(storage_of(tensor), set()).update(sources)
        if self._is_dry_run and any(self._owns(tensor) for tensor in written):
            if self.has_other_writes or len(written) > 1:
                raise DryRunError(f"{func} changes the model by more than a copy or a constant")
            return written[0]
        out = func(*args, **kwargs)
        self._note_reads(read, None)
        return out

    def copies_into(self, target: torch.Tensor) -> list[Copy]:
        """Return the copies whose destination overlaps a tensor, by their outer bounds."""
        spans = self._written.get(storage_of(target))
        return [] if spans is None else spans.overlapping(target)

    def _note_reads(self, read: list[torch.Tensor], out: Any) -> None:
        """Record what an operator read, and what it computed from that.

        Args:
            read: Tensors that it did not write to.
            out: Its result; None if it wrote to its arguments.
        """
        outputs = {storage_of(tensor) for tensor in _tensors([out])}
        aliased = {storage_of(tensor) for tensor in read}
        computed = False
        for tensor in read:
            if storage_of(tensor) in outputs:
                continue  # a view
            computed = True
            if self.inputs.contains(tensor):
                self._note_transformed(tensor)
            elif self._owns(tensor):
                self.has_other_writes = True  # something is computed from old weights
        sources = self._sources(read) if computed else set()
        for output in outputs:
            if output in aliased:
                self._made_of.setdefault(output, set()).update(sources)
            elif sources:
                self._made_of[output] = sources
            else:  # just allocated: what was at this address before is gone
                self._made_of.pop(output, None)

    def _note_transformed(self, tensor: torch.Tensor) -> None:
        self.transformed.add(self.inputs.entry(tensor))

    def _note_overwrite(self, target: torch.Tensor) -> None:
        self.overwritten.update(copy.entry for copy in self.copies_into(target))

    def _sources(self, tensors: list[torch.Tensor]) -> set[int]:
        """Return the entries that tensors are views of, or were computed from."""
        found: set[int] = set()
        for tensor in tensors:
            if self.inputs.contains(tensor):
                found.add(self.inputs.entry(tensor))
            else:
                found |= self._made_of.get(storage_of(tensor), set())
        return found

    def _owns(self, tensor: torch.Tensor) -> bool:
        return storage_of(tensor) in self._owned and tensor.numel() > 0


_COPY = torch.ops.aten.copy_.default
_TO = torch.ops.aten._to_copy.default
_FILLS = (torch.ops.aten.fill_, torch.ops.aten.zero_)


def storage_of(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's storage; without memory (``meta``) a negative number of its own."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or -storage._cdata


def bounds(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor's elements, and the one behind the last."""
    low = tensor.data_ptr()
    if tensor.is_contiguous():
        return low, low + tensor.numel() * tensor.element_size()
    span = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride())) + 1
    return low, low + span * tensor.element_size()


class _Spans:
    """The copies into one storage, sorted by address: there are hundreds into one of fused experts."""

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

    def overlapping(self, target: torch.Tensor) -> list[Copy]:
        low, high = bounds(target)
        # A copy that begins further before the target than the longest copy is long ends before it.
        first = bisect.bisect_right(self._lows, low - self._longest)
        last = bisect.bisect_left(self._lows, high)
        return [copy for end, copy in self._rest[first:last] if end > low]


@dataclass(frozen=True, slots=True)
class _Operator:
    """An operator's schema, read once: that takes longer than most operators do.

    Attributes:
        writes: Position and name of every argument that may hold tensors which are written to.
        reads: The same, of those that are only read.
        is_view: Whether its result (a tensor or a list) aliases its first argument, the only tensor, and nothing is
            written.
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
    """Return a bucket's tensors by name; entries are [name, dtype, shape, start, num_bytes]."""
    return [
        (name, flat[start : start + num_bytes].view(getattr(torch, dtype)).view(shape))
        for name, dtype, shape, start, num_bytes in entries
    ]


def quantization_problem(copies: list[Copy], entries: Sequence[Sequence[Any]]) -> str | None:
    """Return why these copies do not update weights correctly; None if they do."""
    for copy in copies:
        if copy.dst.element_size() == 1 and copy.dst.dtype not in (copy.src.dtype, torch.bool):
            return (
                f"{entries[copy.entry][0]} is {copy.src.dtype} and its parameter {copy.dst.dtype}: the engine quantises its "
                "weights, and its loader does not do so in an update"
            )
    return None


def differing(copies: list[Copy]) -> set[int]:
    """Return the entries whose parameters, read back, differ from the staging memory."""
    if not copies:
        return set()
    flags = torch.stack([_differ_in_bits(c.dst, c.src.to(c.dst)) for c in copies]).tolist()
    suspects = [c for c, flag in zip(copies, flags) if flag]
    # Different bits may be equal values (zeros of two signs); a NaN that arrived as a NaN was sent as one.
    return {c.entry for c in suspects if not torch.allclose(c.dst, c.src.to(c.dst), rtol=0, atol=0, equal_nan=True)}


_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _differ_in_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return whether two tensors of one shape and dtype differ in any bit: a scalar, not waited for.

    Compares words where both can be viewed so: each is read once, and an eighth of that is written in between.
    """
    if a.dtype.is_complex or a.is_neg() or b.is_neg():  # whose bits are not their values
        return (a != b).any()
    one, other = word_view(a), word_view(b)
    if one is None or other is None:
        one, other = (tensor.view(_SAME_SIZE[tensor.element_size()]) for tensor in (a, b))
    return torch.ne(one, other).any()
