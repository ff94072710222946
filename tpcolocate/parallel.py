"""Run blocking calls in background threads."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

T = TypeVar("T")

# After an error the other calls are likely to fail as well; their own deadlines end them.
_AFTER_ERROR_S = 1.0
_SHORT_INTERVAL_S = 1e-4


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


class _Interval:
    """The interpreter's switch interval, shared by all threads: the first user shortens it, the last restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users = 0
        self._before = 0.0

    def shorten(self) -> None:
        with self._lock:
            if self._num_users == 0:
                self._before = sys.getswitchinterval()
                if self._before > _SHORT_INTERVAL_S:
                    sys.setswitchinterval(_SHORT_INTERVAL_S)
            self._num_users += 1

    def restore(self) -> None:
        with self._lock:
            self._num_users -= 1
            if self._num_users == 0 and self._before > _SHORT_INTERVAL_S:
                # Stored in whole microseconds, rounded down: without this, some values would shrink at every restore.
                sys.setswitchinterval(self._before + 5e-7)


_interval = _Interval()


@contextlib.contextmanager
def quick_switching() -> Iterator[None]:
    """Shorten the interpreter's switch interval to 0.1 ms, so that background calls go on beside a busy thread.

    The default is 5 ms, several times as long as a request.
    """
    _interval.shorten()
    try:
        yield
    finally:
        _interval.restore()


__all__ = ["begun_in_background", "beside", "in_background", "quick_switching"]
