"""All errors that this library raises.

::

    TpColocateError
    ├── ConfigError (ValueError)          an argument or the environment cannot work
    │   ├── LayoutError                   the ranks cannot be divided into tp slices
    │   ├── DeviceError                   a device token is invalid, out of range or used twice
    │   └── WeightsMismatchError          names or shapes differ from those of the served model
    ├── DeadlineError (TimeoutError)      a deadline of this library passed
    ├── RankLostError (ConnectionError)   another rank of the group is unreachable, or in another call
    ├── RankFailedError (RuntimeError)    another library's exception on some rank, raised on all
    ├── RendezvousError (RuntimeError)    the owner's URL could not be found or trusted
    └── EngineError
        ├── LaunchError (RuntimeError)    the server did not start
        ├── RequestError (RuntimeError)   the server rejected a request
        ├── EngineStateError (RuntimeError)   the call does not fit the engine's state (asleep, ...)
        ├── EngineDeadError (ConnectionError)   the server process has exited or does not answer
        └── SyncError (RuntimeError)      weights were not, or not certainly, updated

An error of one rank in a collective call is raised on every rank that takes part, as the same class with the same text;
``rank`` names the rank.  All errors pickle.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_SHOWN = 5
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def some(items: Sequence[object], *, between: str = "; ") -> str:
    """List the first few items in a message, and how many more there are."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return between.join(map(str, items[:_SHOWN])) + more


def shown(value: object) -> str:
    """Return a value for a message: short however large it is, and without an error of its own."""
    try:
        return _repr.repr(value)
    except Exception:  # such as an int of more digits than Python prints
        return f"a {type(value).__name__}"


@contextmanager
def noted_on(first: BaseException | None) -> Iterator[None]:
    """Clean up after an error, which stays the one that is raised: what goes wrong in here is a note on it.

    Args:
        first: The error; without one, what goes wrong is raised.
    """
    try:
        yield
    except TpColocateError as error:
        if first is None:
            raise
        first.add_note(f"(after that: {error.message})")


class TpColocateError(Exception):
    """Base of the tree above.

    Args:
        message: What happened, with the offending value in it.
        hint: What to do next, one sentence.
        rank: Global rank that found the error.
        slice_ranks: Global ranks of its tp slice, in tp order.
        device: Device token, index or UUID concerned.
        url: Server URL concerned.
        details: Longer text, such as the tail of a log; printed last.
    """

    _context = ("rank", "slice_ranks", "device", "url")

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        rank: int | None = None,
        slice_ranks: tuple[int, ...] | None = None,
        device: str | None = None,
        url: str | None = None,
        details: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.rank = rank
        self.slice_ranks = slice_ranks
        self.device = device
        self.url = url
        self.details = details

    def __str__(self) -> str:
        context = ", ".join(
            f"{name.replace('_', ' ')} {_plain(value)}"
            for name in self._context
            if (value := getattr(self, name)) is not None
        )
        text = self.message
        if context:
            text += f" [{context}]"
        if self.hint is not None:
            text += f"\n  -> {self.hint}"
        if self.details is not None:
            text += f"\n{self.details}"
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException.__reduce__ calls cls(*args), without the keywords.
        return _rebuild, (type(self), self.message, dict(self.__dict__))


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _rebuild(cls: type[TpColocateError], message: str, state: dict[str, Any]) -> TpColocateError:
    error = cls.__new__(cls)  # not cls(message): a subclass may have more arguments
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class ConfigError(TpColocateError, ValueError):
    """An argument or the environment cannot work; nothing was started or sent."""


class LayoutError(ConfigError):
    """The ranks cannot be divided into tp slices as requested."""


class DeviceError(ConfigError):
    """A device token is invalid, out of range, ambiguous, or used by two ranks."""


class WeightsMismatchError(ConfigError):
    """Names or shapes differ from those of the served model; nothing of the offending bucket was sent."""


class DeadlineError(TpColocateError, TimeoutError):
    """A deadline of this library passed; the message has what was awaited and for how long."""


class RankLostError(TpColocateError, ConnectionError):
    """Another rank is unreachable in a collective (it exited, was killed, or is stuck), or is in another call."""


class RankFailedError(TpColocateError, RuntimeError):
    """An exception of another library on one rank, raised on all ranks of the group.

    On that rank, ``__cause__`` is the original; elsewhere its traceback is in ``details``.
    """


class RendezvousError(TpColocateError, RuntimeError):
    """The owner's URL could not be found, or its file could not be trusted."""


class EngineError(TpColocateError):
    """Base of all errors that concern the SGLang server."""


class LaunchError(EngineError, RuntimeError):
    """The server did not start; ``details`` is the tail of its log."""


class RequestError(EngineError, RuntimeError):
    """The server rejected a request; the message is the server's.

    Args:
        status: HTTP status code.
    """

    def __init__(self, message: str, *, status: int | None = None, **context: Any) -> None:
        super().__init__(message, **context)
        self.status = status


class EngineStateError(EngineError, RuntimeError):
    """The call does not fit the engine's state, for example generating while asleep."""


class EngineDeadError(EngineError, ConnectionError):
    """The server process has exited, or its socket does not answer."""


class SyncError(EngineError, RuntimeError):
    """A weight sync failed; unless the message says otherwise, the engine needs a full sync before use."""
