"""Python's garbage collector, kept out of steps that make many objects."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Make many objects that stay, without the collector looking through the whole process again and again.

    Its full collections come after every so many new objects.  One takes 100 to 200 ms in a process that has imported
    transformers, and naming the 18,867 weights of a mixture of experts brought about three, longer than all the rest.

    Nothing changes if the collector is off already.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


__all__ = ["collector_paused"]
