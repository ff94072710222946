"""Deadlines: one absolute point in time, handed down to every call that may block."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in `time.monotonic` time.

    Attributes:
        at: In seconds; infinity for none.
        timeout_s: What it was made from, for messages.
    """

    at: float
    timeout_s: float

    @classmethod
    def after(cls, timeout_s: float) -> Deadline:
        """From now."""
        return cls(time.monotonic() + timeout_s, timeout_s)

    @classmethod
    def never(cls) -> Deadline:
        return cls(math.inf, math.inf)

    @property
    def has_passed(self) -> bool:
        return time.monotonic() >= self.at

    def left(self, *, at_least: float = 0.0) -> float:
        """Seconds until then.

        Args:
            at_least: What to return where less is left.
        """
        return max(self.at - time.monotonic(), at_least)

    def within(self, seconds: float) -> Deadline:
        """The earlier of this one and one so many seconds from now."""
        return Deadline(min(self.at, time.monotonic() + seconds), min(self.timeout_s, seconds))

    def plus(self, seconds: float) -> Deadline:
        """A later one: a grace period for others to hear of this one first."""
        return Deadline(self.at + seconds, self.timeout_s)


__all__ = ["Deadline"]
