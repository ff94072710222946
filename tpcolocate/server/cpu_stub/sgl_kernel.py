"""Stub of SGLang's CUDA kernel package, for a server on a machine without an accelerator.

This folder is put on the PYTHONPATH of the *server* alone, and only if no ``sgl_kernel`` for CPUs is installed.

SGLang's CPU path imports kernels by name in many places (sampler, activations, grammar), but calls none of them with the
``torch_native`` attention and ``pytorch`` sampling back ends.  So every name exists here, and calling one is an error.
Of submodules there is only the one that old releases import without an alternative.

Every process of the server imports this module, so it also patches torch: SGLang's LoRA code requests page-locked
memory (``pin_memory=True`` and ``Tensor.pin_memory()`` in ``srt/lora``), which torch refuses without an accelerator.
"""

import functools
import sys
import types

import torch

_FACTORIES = ("arange", "empty", "full", "ones", "tensor", "zeros")


def _ignoring_pin_memory(factory):
    @functools.wraps(factory)
    def pageable(*args, pin_memory=False, **kwargs):
        return factory(*args, **kwargs)

    return pageable


def _pin_memory_of_pageable(self, device=None):
    return self


def _absent(name):
    def kernel(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is not available in a CPU server")

    kernel.__name__ = kernel.__qualname__ = name
    return kernel


def __getattr__(name):
    # The import system looks up dunder names (__path__: is it a package?); none exists.
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kernel = globals()[name] = _absent(name)
    return kernel


# 0.5.9; to later ones this module is the sign that there are no kernels for host memory.
_kvcacheio = types.ModuleType(f"{__name__}.kvcacheio")
_kvcacheio.__getattr__ = __getattr__
sys.modules[_kvcacheio.__name__] = _kvcacheio

if not torch.accelerator.is_available():
    for _name in _FACTORIES:
        setattr(torch, _name, _ignoring_pin_memory(getattr(torch, _name)))
    torch.Tensor.pin_memory = _pin_memory_of_pageable
