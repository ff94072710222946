"""The fingerprint of a module: a repeated sync finds that nothing has changed without naming the weights again.

Naming, checking and comparing hundreds of weights can take as long as copying them.  A fingerprint keeps no memory
alive: it has weak references, addresses, and which weight is which part of which tensor of the module.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tpcolocate.in_server.tpcolocate_receiver.module_walk import modules_of
from tpcolocate.weights.sources.lazy_tensor import Items, LazyTensor, local_of, storage_id
from tpcolocate.weights.sources.named_weights import NamedWeights, Source

_View = tuple[torch.Size, tuple[int, ...], int]
"""Size, stride and storage offset."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A module and the weights that were found in it.

    Attributes:
        module: The source.
        layout: Names of the parts of each module in it, in order.
        tensors: Its parameters and persistent buffers, in order.
        memory: Where the local data of each tensor is, and in which layout.
        weights: Name, number of the tensor, and which view of that (None: the tensor itself).
        aliases: As `NamedWeights.aliases`.
    """

    module: weakref.ref[nn.Module]
    layout: list[tuple[str, ...]]
    tensors: list[weakref.ref[torch.Tensor]]
    memory: list[tuple[object, ...]]
    weights: list[tuple[str, int, _View | None]]
    aliases: Mapping[str, str]

    @classmethod
    def of(cls, source: Source, weights: NamedWeights) -> Fingerprint | None:
        """Return the fingerprint of a module; None if its weights are more than its tensors under other names.

        There is none of a source that is not a module, nor of computed weights (merged adapters, gathered experts), nor
        if some of the module's tensors are not sent, since which ones are may depend on its settings.
        """
        if not isinstance(source, nn.Module) or weights.items is None:
            return None
        layout, tensors = _walk(source)
        number_of = {id(tensor): i for i, tensor in enumerate(tensors)}
        number_by_storage = {storage_id(tensor): i for i, tensor in enumerate(tensors)}
        found: list[tuple[str, int, _View | None]] = []
        for name, item in weights.items:
            if isinstance(item, LazyTensor):
                return None
            number, view = number_of.get(id(item)), None
            if number is None and not isinstance(item, DTensor):
                number = number_by_storage.get(storage_id(item))
                view = item.shape, item.stride(), int(item.storage_offset())
            if number is None or (view is not None and item.dtype != tensors[number].dtype):
                return None
            found.append((name, number, view))
        if len({number for _, number, _ in found}) != len(tensors):
            return None
        return cls(
            weakref.ref(source),
            layout,
            [weakref.ref(tensor) for tensor in tensors],
            [_memory(tensor) for tensor in tensors],
            found,
            weights.aliases,
        )

    def match(self, source: Source) -> NamedWeights | None:
        """Return the source's weights if it is the same module, with the same tensors in the same memory."""
        if self.module() is not source:
            return None
        layout, tensors = _walk(source)  # type: ignore[arg-type]
        if layout != self.layout or len(tensors) != len(self.tensors):
            return None
        for tensor, before, memory in zip(tensors, self.tensors, self.memory):
            if before() is not tensor or _memory(tensor) != memory:
                return None
        items: Items = [
            (name, tensors[number] if view is None else tensors[number].detach().as_strided(*view))
            for name, number, view in self.weights
        ]
        return NamedWeights(items, self.aliases)


def _walk(module: nn.Module) -> tuple[list[tuple[str, ...]], list[torch.Tensor]]:
    """Return the names of every module's parts, and all parameters and persistent buffers, each once."""
    layout: list[tuple[str, ...]] = []
    tensors: dict[int, torch.Tensor] = {}
    for one in modules_of(module):
        if isinstance(one, FSDPModule):
            one.reshard()  # as FSDP2 does before a state dict: a forward may leave the parameters unsharded
        layout.append((*one._modules, *one._parameters))
        for parameter in one._parameters.values():
            if parameter is not None:
                tensors[id(parameter)] = parameter
        if one._buffers:
            for name, buffer in one._buffers.items():
                if buffer is not None and name not in one._non_persistent_buffers_set:
                    tensors[id(buffer)] = buffer
    return layout, list(tensors.values())


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    local = local_of(tensor)
    # Not the shape, which takes several times as long as the rest: numel and stride change with it.
    return local.data_ptr(), local.numel(), local.stride()


__all__ = ["Fingerprint"]
