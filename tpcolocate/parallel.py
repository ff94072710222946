"""Run blocking calls in background threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

T = TypeVar("T")

# After an error the other calls are likely to fail as well; their own deadlines end them.
_AFTER_ERROR_S = 1.0


def in_background(action: Callable[[], T], *, name: str) -> Future[T]:
    """Start a blocking call in a daemon thread.

    Not in an executor: at exit the interpreter waits for its threads, however long a server takes to answer.

    Args:
        action: Must have a deadline of its own: it cannot be cancelled.
        name: Of the thread.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def begun_in_background(action: Callable[[Callable[[], None]], T], *, name: str) -> Future[T]:
    """Start a call as `in_background`, and return once it has begun or ended, so that later calls stay behind it.

    Args:
        action: Gets a function that it calls when it has begun.
        name: Of the thread.
    """
    begun = threading.Event()
    future = in_background(lambda: action(begun.set), name=name)
    future.add_done_callback(lambda _: begun.set())
    begun.wait()
    return future


def beside(running: Sequence[Future[Any]], action: Callable[[], object]) -> None:
    """Run one more call and wait for all; raise its error if it fails, otherwise the first of the others."""
    try:
        action()
    except BaseException:
        wait(running, _AFTER_ERROR_S)
        raise
    for future in running:
        future.result()


__all__ = ["begun_in_background", "beside", "in_background"]
