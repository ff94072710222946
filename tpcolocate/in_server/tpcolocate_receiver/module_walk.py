"""Walking a model's modules."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def modules_of(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Every module once, a module before those in it; these are looked up after it was given.

    By hand, because `Module.modules`, which makes names, takes several times as long: there is a walk at every sync.
    """
    modules, seen = [model], {model}
    for module in modules:  # which grows
        yield module
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
