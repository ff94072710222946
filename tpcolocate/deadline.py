"""Deadlines: one absolute point in time, passed to every call that may block, and the check of timeouts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from numbers import Real

from tpcolocate.errors import ConfigError, shown

# poll() takes milliseconds in a C int, which is 24.8 days; calls add timeouts of several steps to each other.
MAX_TIMEOUT_S = 1_000_000.0
_LEAST_S = 0.001


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

    @classmethod
    def of(cls, timeout_s: float | Deadline | None) -> Deadline:
        """Return the deadline in `timeout_s` seconds: one that never comes for None, and a deadline as it is."""
        if isinstance(timeout_s, Deadline):
            return timeout_s
        return cls.never() if timeout_s is None else cls.after(timeout_s)

    @property
    def is_never(self) -> bool:
        return self.at == math.inf

    @property
    def has_passed(self) -> bool:
        return time.monotonic() >= self.at

    def left(self, *, at_least: float = 0.0) -> float:
        """Return the seconds left, but not less than `at_least`."""
        return max(self.at - time.monotonic(), at_least)

    def socket_timeout(self) -> float | None:
        """Return the seconds left as sockets take them: None for no limit, and never 0, with which they would not wait."""
        return None if self.is_never else self.left(at_least=_LEAST_S)

    def within(self, seconds: float) -> Deadline:
        """Return the earlier of this deadline and one in `seconds` seconds."""
        return Deadline(min(self.at, time.monotonic() + seconds), min(self.timeout_s, seconds))

    def plus(self, seconds: float) -> Deadline:
        """Return a later deadline: a grace period in which others receive the error of this one."""
        return Deadline(self.at + seconds, self.timeout_s)


def check_timeout(timeout_s: object, *, name: str = "timeout_s") -> float:
    """Return a timeout that a caller passed as a float, in seconds.

    Args:
        timeout_s: What was passed.
        name: Of the argument, for the message.

    Raises:
        ConfigError: Not a positive number of seconds, or longer than an operating system waits.
    """
    if isinstance(timeout_s, Real) and not isinstance(timeout_s, bool) and 0 < timeout_s <= MAX_TIMEOUT_S:  # type: ignore[operator]
        return float(timeout_s)
    raise ConfigError(
        f"{name} must be a positive number of seconds, got {shown(timeout_s)}",
        hint=f"for no limit in practice, pass the longest: {name}={MAX_TIMEOUT_S:.0f}, which is eleven days",
    )


__all__ = ["MAX_TIMEOUT_S", "Deadline", "check_timeout"]
