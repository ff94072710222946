"""Blocking calls side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Task(Generic[T]):
    """A blocking call in a thread of its own, from now on.

    Args:
        action: Has a deadline of its own; nobody can end it from outside.
        name: Of the thread.
    """

    def __init__(self, action: Callable[[], T], *, name: str) -> None:
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(action,), name=name, daemon=True)
        self._thread.start()

    def _run(self, action: Callable[[], T]) -> None:
        try:
            self._value.append(action())
        except BaseException as error:
            self._error = error

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over, after at most so many seconds."""
        self._thread.join(timeout_s)
        return self.is_over

    def result(self) -> T:
        """What the action returned or raised; waits for it."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value[0]


def at_once(beside: Callable[[], object], action: Callable[[], object]) -> None:
    """Carry out both, the first in a thread; raise the error of either, `action`'s if both fail."""
    task = Task(beside, name="tpcolocate request")
    try:
        action()
    except BaseException as error:
        task.wait(_AFTER_AN_ERROR_S)
        raise error
    task.result()


# The other request is as good as lost then; its own deadline ends it.
_AFTER_AN_ERROR_S = 1.0

__all__ = ["Task", "at_once"]
