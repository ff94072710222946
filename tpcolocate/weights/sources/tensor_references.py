"""References to a module's tensors that keep none of them alive and that torch can swap.

`Module.to` and others that convert a module swap what is in a parameter that is a DTensor, as FSDP2's are, for what it has
become (`torch.utils.swap_tensors`).  That fails for a tensor which anybody refers to weakly.  So a tensor is referred to by
the module that has it, weakly, and by its name there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tpcolocate.in_server.tpcolocate_receiver.module_walk import modules_of

Reference = Callable[[], torch.Tensor | None]
"""Returns a tensor; None if it is gone."""


@dataclass(frozen=True, slots=True)
class _Place:
    module: weakref.ref[nn.Module]
    name: str

    def __call__(self) -> torch.Tensor | None:
        module = self.module()
        if module is None:
            return None
        found = module._parameters.get(self.name)
        return module._buffers.get(self.name) if found is None else found


class TensorReferences:
    """Refers to the parameters and buffers of a module, as they are in it now.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places: dict[int, _Place] = {}
        for one in modules_of(module):
            for name, tensor in (*one._parameters.items(), *one._buffers.items()):
                if tensor is not None:
                    self._places.setdefault(id(tensor), _Place(weakref.ref(one), name))

    def __call__(self, tensor: torch.Tensor) -> Reference:
        """Return a reference to a tensor; a weak one if the module does not have it, so that no conversion meets it."""
        found = self._places.get(id(tensor))
        return found if found is not None and found() is tensor else weakref.ref(tensor)


__all__ = ["Reference", "TensorReferences"]
