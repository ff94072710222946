"""Whether a module is what it was at the last sync, found out without naming its weights again.

Naming, checking and comparing hundreds of weights can take as long as copying them.  What is remembered of a module
holds no memory: weak references, addresses, and how each weight is made of one of the module's tensors.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tpcolocate.in_server.tpcolocate_receiver.module_walk import modules_of
from tpcolocate.weights.sources.lazy_tensor import Items, LazyTensor, local_of
from tpcolocate.weights.sources.named_weights import Source, Weights

_Part = tuple[torch.Size, tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A module and the weights that were found in it.

    Attributes:
        module: The source.
        layout: Names of the module's parts, in order.
        tensors: Its parameters and persistent buffers, in order.
        places: Their addresses.
        weights: Name -> number of the tensor that it is, and which part of that (None: all of it).
        aliases: As `Weights.aliases`.
    """

    module: weakref.ref[nn.Module]
    layout: list[tuple[str, ...]]
    tensors: list[weakref.ref[torch.Tensor]]
    places: list[int]
    weights: list[tuple[str, int, _Part | None]]
    aliases: dict[str, str]

    @classmethod
    def of(cls, source: Source, weights: Weights) -> Fingerprint | None:
        """What is to be remembered; None if the weights are more than tensors of a module under other names.

        A source that is no module, and weights that are computed (merged adapters, gathered experts), are read anew each
        time; so is a module of whose tensors not all are sent, because which ones are may hang on its settings.
        """
        if not isinstance(source, nn.Module) or weights.known is None:
            return None
        layout, tensors = _walk(source)
        number_of = {id(tensor): i for i, tensor in enumerate(tensors)}
        within = {_storage_of(tensor): i for i, tensor in enumerate(tensors)}
        found: list[tuple[str, int, _Part | None]] = []
        for name, item in weights.known:
            if isinstance(item, LazyTensor):
                return None
            whole, part = number_of.get(id(item)), None
            if whole is None and not isinstance(item, DTensor):
                whole = within.get(_storage_of(item))
                part = item.shape, item.stride(), int(item.storage_offset())
            if whole is None or (part is not None and item.dtype != tensors[whole].dtype):
                return None
            found.append((name, whole, part))
        sent = {whole for _, whole, _ in found}
        if len(sent) != len(number_of):
            return None
        return cls(
            weakref.ref(source),
            layout,
            [weakref.ref(tensor) for tensor in tensors],
            [local_of(tensor).data_ptr() for tensor in tensors],
            found,
            dict(weights.aliases),
        )

    def recognise(self, source: Source) -> Weights | None:
        """The weights of the source, if it is the same module with the same tensors in the same places."""
        if self.module() is not source:
            return None
        layout, tensors = _walk(source)  # type: ignore[arg-type]
        if layout != self.layout or len(tensors) != len(self.tensors):
            return None
        for tensor, before, place in zip(tensors, self.tensors, self.places):
            if before() is not tensor or local_of(tensor).data_ptr() != place:
                return None
        known: Items = [
            (name, tensors[number] if part is None else tensors[number].detach().as_strided(*part))
            for name, number, part in self.weights
        ]
        return Weights.again(known, self.aliases)


def _walk(module: nn.Module) -> tuple[list[tuple[str, ...]], list[torch.Tensor]]:
    """Names of every module's parts, and all parameters and persistent buffers, each once."""
    layout: list[tuple[str, ...]] = []
    tensors: dict[int, torch.Tensor] = {}
    for one in modules_of(module):
        if isinstance(one, FSDPModule):
            one.reshard()  # as FSDP2 does before a state dict: gathered parameters stand in the shards' place
        layout.append((*one._modules, *one._parameters))
        for parameter in one._parameters.values():
            if parameter is not None:
                tensors[id(parameter)] = parameter
        if one._buffers:
            for name, buffer in one._buffers.items():
                if buffer is not None and name not in one._non_persistent_buffers_set:
                    tensors[id(buffer)] = buffer
    return layout, list(tensors.values())


def _storage_of(tensor: torch.Tensor) -> Any:
    return local_of(tensor).untyped_storage()._cdata


__all__ = ["Fingerprint"]
