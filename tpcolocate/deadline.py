"""Deadlines: one absolute point in time, passed to every call that may block."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in `time.monotonic` time.

    Attributes:
        at: In seconds; infinity for none.
        timeout_s: Timeout that it was made from, for messages.
    """

    at: float
    timeout_s: float

    @classmethod
    def after(cls, timeout_s: float) -> Deadline:
        """Return the deadline in `timeout_s` seconds."""
        return cls(time.monotonic() + timeout_s, timeout_s)

    @classmethod
    def never(cls) -> Deadline:
        return cls(math.inf, math.inf)

    @property
    def has_passed(self) -> bool:
        return time.monotonic() >= self.at

    def left(self, *, at_least: float = 0.0) -> float:
        """Return the seconds left, but not less than `at_least`."""
        return max(self.at - time.monotonic(), at_least)

    def within(self, seconds: float) -> Deadline:
        """Return the earlier of this deadline and one in `seconds` seconds."""
        return Deadline(min(self.at, time.monotonic() + seconds), min(self.timeout_s, seconds))

    def plus(self, seconds: float) -> Deadline:
        """Return a later deadline: a grace period in which others receive the error of this one."""
        return Deadline(self.at + seconds, self.timeout_s)


__all__ = ["Deadline"]
