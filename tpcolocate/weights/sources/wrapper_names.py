"""Modules and names without what DDP, torch.compile, FSDP, DeepSpeed and activation checkpointing add to them."""

from __future__ import annotations

import sys

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

# Each wrapper inserts a segment of its own into every name below it.
WRAPPER_SEGMENTS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def without_wrappers(name: str) -> str:
    """Return the name of a weight, or the path of a module, in the model before it was wrapped."""
    name += "."  # a path may end with a wrapper
    for segment in WRAPPER_SEGMENTS:
        name = name.replace(segment, "")
    return name.removesuffix(".")


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside DDP, FSDP1, DeepSpeed's engine and torch.compile, in any order."""
    while True:
        inner = module.module if _is_wrapper(module) else getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _is_wrapper(module: nn.Module) -> bool:
    engine = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
    return isinstance(module, (DistributedDataParallel, FullyShardedDataParallel)) or (
        engine is not None and isinstance(module, engine)
    )


__all__ = ["WRAPPER_SEGMENTS", "unwrapped", "without_wrappers"]
