"""A line on the terminal that says which phase of a slow sync is running."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from tpcolocate.report import Stopwatch

_SHOWN_AFTER_S = 2.0
_INTERVAL_S = 0.5


@contextmanager
def shown(watch: Stopwatch, *, rank: int) -> Iterator[None]:
    """Show the phases of a sync that takes more than two seconds; on rank 0, if standard error is a terminal.

    Args:
        watch: Of the sync.
        rank: Global rank.
    """
    if rank != 0 or sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    is_over = threading.Event()
    showing = threading.Thread(target=_show, args=(watch, is_over), name="sync progress", daemon=True)
    showing.start()
    try:
        yield
    finally:
        is_over.set()
        showing.join()


def _show(watch: Stopwatch, is_over: threading.Event) -> None:
    if is_over.wait(_SHOWN_AFTER_S):
        return
    with tqdm(desc="Syncing weights", bar_format="{desc} [{elapsed}{postfix}]", leave=False, file=sys.stderr) as line:
        line.start_t -= _SHOWN_AFTER_S
        while not is_over.is_set():
            line.set_postfix_str(watch.current)
            is_over.wait(_INTERVAL_S)


__all__ = ["shown"]
