"""Blocking calls side by side."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

T = TypeVar("T")

# The other requests are as good as lost then; their own deadlines end them.
_AFTER_AN_ERROR_S = 1.0
_QUICK_S = 1e-4


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


def begun_in_background(action: Callable[[Callable[[], None]], T], *, name: str) -> Future[T]:
    """`in_background` for a call that what follows must not overtake: returns once it has begun, or is over.

    Args:
        action: Is given a function, to be called when it has begun.
        name: Of the thread.
    """
    begun = threading.Event()
    future = in_background(lambda: action(begun.set), name=name)
    future.add_done_callback(lambda _: begun.set())
    begun.wait()
    return future


def beside(under_way: Sequence[Future[Any]], action: Callable[[], object]) -> None:
    """Carry out one more, and wait for all; raise its error if it fails, else the first of theirs."""
    try:
        action()
    except BaseException:
        wait(under_way, _AFTER_AN_ERROR_S)
        raise
    for future in under_way:
        future.result()


class _Interval:
    """The interpreter's switch interval, one for all threads: the first that wants it short sets it, the last restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users = 0
        self._before = 0.0

    def shorten(self) -> None:
        with self._lock:
            if self._num_users == 0:
                self._before = sys.getswitchinterval()
                if self._before > _QUICK_S:
                    sys.setswitchinterval(_QUICK_S)
            self._num_users += 1

    def restore(self) -> None:
        with self._lock:
            self._num_users -= 1
            if self._num_users == 0 and self._before > _QUICK_S:
                # Kept in whole microseconds, cut off: some values would shrink by one each time they are put back.
                sys.setswitchinterval(self._before + 5e-7)


_interval = _Interval()


@contextlib.contextmanager
def quick_switching() -> Iterator[None]:
    """Lets background calls run beside a thread that computes: a thread that has its answer waits 0.1 ms for its turn.

    The interpreter's default is 5 ms, several times what a request takes.
    """
    _interval.shorten()
    try:
        yield
    finally:
        _interval.restore()


__all__ = ["begun_in_background", "beside", "in_background", "quick_switching"]
