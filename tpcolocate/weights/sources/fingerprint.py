"""The fingerprint of a module: a repeated sync finds that nothing has changed without naming the weights again.

Naming, checking and comparing ten thousands of weights takes longer than copying them.  A fingerprint keeps no memory
alive: it has weak references, addresses, and which weight is which part of which tensor of the module.  The references are
to storages, which distinguish memory from other memory at the same address.  There are none to tensors: see
`tensor_references`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from tpcolocate.in_server.tpcolocate_receiver.module_walk import modules_of
from tpcolocate.weights.sources.lazy_tensor import (
    Item,
    LazyTensor,
    SharedGather,
    View,
    is_plain_tensor,
    local_of,
    storage_id,
)
from tpcolocate.weights.sources.named_weights import NamedWeights, Rename, Source


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of a module's modules: children, parameters and persistent buffers.

    Attributes:
        names: Of each module's parts.
        parts: What identifies each of all the parts, in the same order, while it is alive.
    """

    names: list[tuple[str, ...]]
    parts: list[int]

    def is_as(self, before: Layout) -> bool:
        """Return whether there are the same names, and the same ones of them for one part: two may have changed places."""
        if self.names != before.names:
            return False
        return self.parts == before.parts or _in_order_of_use(self.parts) == _in_order_of_use(before.parts)


def _in_order_of_use(parts: Sequence[int]) -> list[int]:
    numbers: dict[int, int] = {}
    return [numbers.setdefault(part, len(numbers)) for part in parts]


@dataclass(frozen=True, slots=True)
class Origin:
    """What a weight is of a module's tensors.

    Attributes:
        number: Of the tensor; of a computed weight the number of its `Formula`.
        view: Which view of it, of a sharded one as if it were gathered; None: the tensor itself.
        is_computed: Whether it is computed from several of them.
    """

    number: int
    view: View | None
    is_computed: bool = False


@dataclass(frozen=True, slots=True)
class Formula:
    """How a computed weight is made of a module's tensors; keeps none of them alive.

    Attributes:
        make: From `LazyTensor.template`.
        numbers: Of the tensors that it takes.
    """

    make: Callable[[Sequence[torch.Tensor]], LazyTensor]
    numbers: tuple[int, ...]


class LaterItems(Sequence[tuple[str, Item]]):
    """The weights of a module that was recognised, made when somebody asks for one: a repeated sync need not ask.

    Args:
        origins: Name -> what it is, in the order of the sync.
        tensors: The module's.
        formulas: Of what is computed from them.
        names: The same as in `origins`.
    """

    def __init__(
        self,
        origins: Mapping[str, Origin],
        tensors: Sequence[torch.Tensor],
        formulas: Sequence[Formula],
        names: Sequence[str],
    ) -> None:
        self._origins = origins
        self._tensors = tensors
        self._formulas = formulas
        self._names = names
        self._made: list[tuple[str, Item]] | None = None

    @property
    def are_made(self) -> bool:
        """Whether somebody has asked."""
        return self._made is not None

    def __len__(self) -> int:
        return len(self._origins)

    @overload
    def __getitem__(self, index: int) -> tuple[str, Item]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[str, Item]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, Item] | Sequence[tuple[str, Item]]:
        if self._made is None and isinstance(index, int):
            name = self._names[index]
            return name, self._item(name)
        return self._items()[index]

    def __iter__(self) -> Iterator[tuple[str, Item]]:
        return iter(self._items())

    def tensor_of(self, name: str) -> torch.Tensor:
        """Return the module's tensor that a weight is, or is a part of."""
        return self._tensors[self._origins[name].number]

    def computed(self, name: str) -> Item:
        """Return a computed weight, made anew."""
        return self._item(name)

    def _item(self, name: str) -> Item:
        origin = self._origins[name]
        whole = self._computed(origin.number) if origin.is_computed else self._tensors[origin.number]
        return whole if origin.view is None else SharedGather(whole).part(*origin.view)

    def _computed(self, number: int) -> LazyTensor:
        formula = self._formulas[number]
        return formula.make([self._tensors[i] for i in formula.numbers])

    def _items(self) -> list[tuple[str, Item]]:
        if self._made is None:
            wholes: dict[tuple[int, bool], Item] = {}
            gathers: dict[tuple[int, bool], SharedGather] = {}
            made: list[tuple[str, Item]] = []
            for name, origin in self._origins.items():
                key = origin.number, origin.is_computed
                if key not in wholes:
                    wholes[key] = self._computed(origin.number) if origin.is_computed else self._tensors[origin.number]
                if origin.view is None:
                    made.append((name, wholes[key]))
                else:
                    gather = gathers.setdefault(key, SharedGather(wholes[key]))
                    made.append((name, gather.part(*origin.view)))
            self._made = made
        return self._made


@dataclass(frozen=True, slots=True)
class Match:
    """A module that was recognised.

    Attributes:
        weights: Its weights, as in the last sync.
        items: The same as `weights.items`, which also knows their tensors.
    """

    weights: NamedWeights
    items: LaterItems


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A module and the weights that were found in it.

    Attributes:
        module: The source.
        layout: The parts of the modules in it, in order.
        memory: Where the local data of each of its parameters and persistent buffers is, in order, and in which layout.
        storages: In which it is, so that no other storage is taken for one of them.
        origins: Name of each weight -> what it is.
        aliases, renamed: As of `NamedWeights`.
        names: Of the weights.
        formulas: Of computed weights.
        settings: What decides on computed weights: what to ask, and what the answer was; see `Recipe.settings`.
    """

    module: weakref.ref[nn.Module]
    layout: Layout
    memory: list[tuple[object, ...]]
    storages: list[StorageWeakRef]
    origins: Mapping[str, Origin]
    aliases: Mapping[str, str]
    renamed: Mapping[str, str | None]
    names: Sequence[str]
    formulas: Sequence[Formula]
    settings: Sequence[tuple[Callable[[], object], object]]

    @classmethod
    def of(cls, source: Source, weights: NamedWeights) -> Fingerprint | None:
        """Return the fingerprint of a module; None if it cannot be known again.

        There is none of a source that is not a module, nor of weights that are computed in an unknown way, nor if some of
        the module's tensors are not sent: which ones are may depend on its settings, unless a recipe has them.  Nor where
        others are not sent because they were equal to what is: they may not be the next time.
        """
        if not isinstance(source, nn.Module) or weights.items is None or weights.extra:
            return None
        layout, tensors = _walk(source)
        find = _Origins(tensors)
        origins: dict[str, Origin] = {}
        for name, item in weights.items:
            origin = find(item)
            if origin is None:
                return None
            origins[name] = origin
        sent = {origin.number for origin in origins.values() if not origin.is_computed}
        if len(sent) != len(tensors) and not find.settings:
            return None
        return cls(
            weakref.ref(source),
            layout,
            [_memory(tensor) for tensor in tensors],
            [StorageWeakRef(local_of(tensor).untyped_storage()) for tensor in tensors],
            origins,
            weights.aliases,
            weights.renamed,
            list(origins),
            find.formulas,
            [(ask, ask()) for ask in find.settings],
        )

    def match(self, source: Source, rename: Rename | None = None) -> Match | None:
        """Return the source's weights if it is the same module, with tensors of the same names in the same memory.

        Args:
            source: Any.
            rename: The same mapping as before, or the same function, which may have come to return other names.
        """
        if self.module() is not source:
            return None
        layout, tensors = _walk(source)  # type: ignore[arg-type]
        if not layout.is_as(self.layout) or len(tensors) != len(self.memory):
            return None
        if any(_memory(tensor) != before for tensor, before in zip(tensors, self.memory)):
            return None
        if any(ask() != before for ask, before in self.settings):
            return None
        if callable(rename) and any(rename(name) != before for name, before in self.renamed.items()):
            return None
        items = LaterItems(self.origins, tensors, self.formulas, self.names)
        return Match(NamedWeights(items, self.aliases, renamed=self.renamed), items)


class _Origins:
    """Finds out what items are of a module's tensors.

    Args:
        tensors: The module's.

    Attributes:
        formulas: Of the computed items that were found.
        settings: See `Fingerprint.settings`: what to ask.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.formulas: list[Formula] = []
        self.settings: list[Callable[[], object]] = []
        self._formula_of: dict[int, int | None] = {}
        self._tensors = tensors
        self._number_of = {id(tensor): i for i, tensor in enumerate(tensors)}
        self._number_by_storage = {storage_id(tensor): i for i, tensor in enumerate(tensors)}
        # Parts of alike tensors have the same regions.
        self._views: dict[object, View] = {}

    def __call__(self, item: Item) -> Origin | None:
        """Return what an item is; None for what is no tensor of the module, nor a view of one, but computed from it."""
        if isinstance(item, LazyTensor):
            return self._of_lazy(item)
        number = self._number_of.get(id(item))
        if number is not None:
            return Origin(number, None)
        number = self._number_by_storage.get(storage_id(item)) if is_plain_tensor(item) else None
        if number is None or not is_plain_tensor(base := self._tensors[number]) or item.dtype != base.dtype:
            return None
        return Origin(number, (item.shape, item.stride(), int(item.storage_offset() - base.storage_offset())))

    def _of_lazy(self, item: LazyTensor) -> Origin | None:
        part = item.part
        whole: Item = item if part is None else part.base
        if isinstance(whole, LazyTensor):
            is_computed, number = True, self._formula(whole)
        else:
            is_computed, number = False, self._number_of.get(id(whole))
        if number is None:
            return None
        if part is None:
            return Origin(number, None, is_computed)
        key = part.region, part.along, whole.shape
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = part.view()
        return Origin(number, view, is_computed)

    def _formula(self, item: LazyTensor) -> int | None:
        """Return the number of a computed tensor's formula; None if it is not known how it is made."""
        if id(item) not in self._formula_of:
            make, recipe = item.template(), item.recipe
            numbers = () if recipe is None else tuple(self._number_of.get(id(one), -1) for one in recipe.inputs)
            self._formula_of[id(item)] = None
            if make is not None and recipe is not None and recipe.settings is not None and -1 not in numbers:
                self._formula_of[id(item)] = len(self.formulas)
                self.formulas.append(Formula(make, numbers))
                if recipe.settings not in self.settings:
                    self.settings.append(recipe.settings)
        return self._formula_of[id(item)]


def _walk(module: nn.Module) -> tuple[Layout, list[torch.Tensor]]:
    """Return the parts of every module, and all parameters and persistent buffers, each once.

    Models with adapters have thousands of modules, most of them without tensors, and there is a walk at every sync.
    """
    names: list[tuple[str, ...]] = []
    parts: list[int] = []
    tensors: dict[int, torch.Tensor] = {}
    for one in modules_of(module):
        if isinstance(one, FSDPModule):
            one.reshard()  # as FSDP2 does before a state dict: a forward may leave the parameters unsharded
        modules, parameters, buffers = one._modules, one._parameters, one._buffers
        if modules:
            parts += map(id, modules.values())
        for parameter in parameters.values():
            parts.append(id(parameter))
            if parameter is not None:
                tensors[id(parameter)] = parameter
        if not buffers:
            names.append((*modules, *parameters))
            continue
        persistent = [name for name in buffers if name not in one._non_persistent_buffers_set]
        for buffer in map(buffers.__getitem__, persistent):
            parts.append(id(buffer))
            if buffer is not None:
                tensors[id(buffer)] = buffer
        names.append((*modules, *parameters, *persistent))
    return Layout(names, parts), list(tensors.values())


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    # `local_of` and `storage_id` written out, once for both; and of a shard, of what it is one.
    local, spec = (tensor._local_tensor, tensor._spec) if isinstance(tensor, DTensor) else (tensor, None)
    storage = local.untyped_storage()._cdata
    # Not the shape, which takes several times as long as the rest: numel and stride change with it.
    return storage, local.data_ptr(), local.dtype, local.numel(), local.stride(), local.storage_offset(), spec


__all__ = ["Fingerprint", "LaterItems", "Match", "Origin"]
