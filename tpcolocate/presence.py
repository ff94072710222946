"""Which ranks have come to a call of their group, and which have left one, through the store of the process group.

Only calls that wait long use it.  A store may be in a process that is stopped or gone, where a request would block for
as long as the store's own timeout, so every request here has a deadline.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

_STORE_S = 2.0


class Presence:
    """Presence of the ranks of one group in its rounds, which every rank counts from 1.

    Args:
        store: Shared by the members of this group alone.
        rank: Global rank of this process.
    """

    def __init__(self, store: dist.Store, *, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._request: threading.Thread | None = None

    def publish(self, number: int) -> None:
        """Make known that this rank waits in a round."""
        self._in_time(lambda: self._store.set(str(self._rank), str(number)))

    def absent(self, ranks: Sequence[int], number: int) -> list[int] | None:
        """Return the ranks that are not known to have come to a round; None if the store does not answer."""
        return self._in_time(lambda: [r for r in ranks if r != self._rank and self._last_round_of(r) < number])

    def decide(self, number: int, outcome: str) -> str | None:
        """Return how a round ended: the outcome of the rank that asked first, the same for all.

        Returns:
            The outcome; None if the store does not answer.
        """
        return self._in_time(lambda: self._store.compare_set(f"round {number}", "", outcome).decode())

    def leave(self, key: str, why: str) -> None:
        """Make known, once, that a rank has left what a key stands for; the first to say so counts."""
        self._in_time(lambda: self._store.compare_set(f"left {key}", "", why))

    def left(self, key: str) -> str | None:
        """Return what `leave` was called with on any rank; None if nowhere, or if the store does not answer."""
        name = f"left {key}"
        return self._in_time(lambda: self._store.get(name).decode() if self._store.check([name]) else None)

    def _last_round_of(self, rank: int) -> int:
        # get() of a missing key would wait for it
        return int(self._store.get(str(rank))) if self._store.check([str(rank)]) else 0

    def _in_time(self, action: Callable[[], T]) -> T | None:
        if self._request is not None and self._request.is_alive():
            return None  # an earlier request is still blocked
        results: list[T] = []

        def run() -> None:
            try:
                results.append(action())
            except RuntimeError:
                pass  # the store is gone

        request = threading.Thread(target=run, name="tpcolocate presence", daemon=True)
        try:
            request.start()
        except RuntimeError:  # as from Python 3.12 on in functions of atexit, or where the limit of threads is reached
            return None
        self._request = request
        request.join(_STORE_S)
        return results[0] if results else None


__all__ = ["Presence"]
