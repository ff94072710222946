"""torch's modes, which a caller's code may be in and which would hold for the library's own computations as well."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_AUTOCAST = ("cpu", "cuda")


@contextlib.contextmanager
def usual_modes() -> Iterator[None]:
    """Compute without gradients, and otherwise as torch does outside of all modes.

    A tensor that was made in inference mode cannot be written outside of it, and what a sync makes may be used by the next one.
    Under autocast adapters would be multiplied in the lower precision.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


__all__ = ["usual_modes"]
