"""Stands in for SGLang's CUDA kernel package in a server that runs on a machine without an accelerator.

This folder goes on the PYTHONPATH of the *server* alone, and only where no real ``sgl_kernel`` is installed.

SGLang imports kernels by name all over its CPU path (sampler, activations, grammar) and, decoding with the
``torch_native`` attention and ``pytorch`` sampling back ends, calls none of them.  So every name exists here, and
calling one is an error that says which.

Every process of the server imports this module, which makes it the place for one more repair: SGLang's LoRA code
asks for page-locked memory without looking for a device to lock it for (``pin_memory=True`` and
``Tensor.pin_memory()`` in ``srt/lora``), and torch refuses that where there is no accelerator.
"""

import functools

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
        raise NotImplementedError(f"sgl_kernel.{name} was called, and this CPU server has no kernels")

    kernel.__name__ = kernel.__qualname__ = name
    return kernel


def __getattr__(name):
    # Dunder names are questions of the import system (__path__: "are you a package?"): the answer is no.
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kernel = globals()[name] = _absent(name)
    return kernel


if not torch.accelerator.is_available():
    for _name in _FACTORIES:
        setattr(torch, _name, _ignoring_pin_memory(getattr(torch, _name)))
    torch.Tensor.pin_memory = _pin_memory_of_pageable
