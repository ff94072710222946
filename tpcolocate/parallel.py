"""Blocking calls side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")

# The other request is as good as lost then; its own deadline ends it.
_AFTER_AN_ERROR_S = 1.0


def in_background(action: Callable[[], T], *, name: str) -> Future[T]:
    """A blocking call in a thread of its own, from now on.

    Not an executor's: the interpreter waits for those when it ends, however long a server takes to answer.

    Args:
        action: Has a deadline of its own; nobody can end it from outside.
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


def at_once(beside: Callable[[], object], action: Callable[[], object]) -> None:
    """Carry out both, the first in a thread; raise the error of either, `action`'s if both fail."""
    future = in_background(beside, name="tpcolocate request")
    try:
        action()
    except BaseException as error:
        wait([future], _AFTER_AN_ERROR_S)
        raise error
    future.result()


__all__ = ["at_once", "in_background"]
