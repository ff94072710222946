"""Every error this library raises on purpose.

::

    TpColocateError
    ├── ConfigError (ValueError)          an argument or the environment cannot work
    │   ├── LayoutError                   the ranks cannot be cut into tp slices
    │   ├── DeviceError                   a device token is invalid, out of range or held twice
    │   └── WeightsMismatchError          names or shapes are not those of the served model
    ├── DeadlineError (TimeoutError)      a deadline of ours passed
    ├── RankLostError (ConnectionError)   another rank of the group stopped answering, or does something else
    ├── RankFailedError (RuntimeError)    another library's exception on some rank, told to all
    ├── RendezvousError (RuntimeError)    the owner's URL could not be found or trusted
    └── EngineError
        ├── LaunchError (RuntimeError)    the server did not come up
        ├── RequestError (RuntimeError)   the server refused a request, in its own words
        ├── EngineStateError (RuntimeError)   the call does not fit the engine's state (asleep, ...)
        ├── EngineDeadError (ConnectionError)   the server process is gone or does not answer
        └── SyncError (RuntimeError)      weights were not, or not certainly, updated

An error found by one rank of a collective call is raised on every rank that takes part, as the
same class with the same text; ``rank`` says where it was found.  All of them pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SHOWN = 5


def some(items: Sequence[object], *, between: str = "; ") -> str:
    """For a message: the first few, and how many more there are."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return between.join(map(str, items[:_SHOWN])) + more


class TpColocateError(Exception):
    """Base of the tree above.

    Args:
        message: What happened, with the offending value in it.
        hint: What to do next, one sentence.
        rank: Global rank that found the error.
        slice_ranks: Global ranks of its tp slice, in tp order.
        device: Device token, index or UUID concerned.
        url: Server URL concerned.
        details: Anything longer, such as the tail of a log; printed last.
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
        # BaseException's own reduction calls cls(*args) and would lose every keyword.
        return _rebuild, (type(self), self.message, dict(self.__dict__))


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _rebuild(cls: type[TpColocateError], message: str, state: dict[str, Any]) -> TpColocateError:
    error = cls.__new__(cls)  # not cls(message): a subclass may ask for more
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class ConfigError(TpColocateError, ValueError):
    """An argument or the environment cannot work; nothing was started or sent."""


class LayoutError(ConfigError):
    """The ranks cannot be cut into tp slices as asked."""


class DeviceError(ConfigError):
    """A device token is invalid, out of range, ambiguous, or held by two ranks."""


class WeightsMismatchError(ConfigError):
    """Names or shapes are not those of the served model; nothing of the offending bucket was sent."""


class DeadlineError(TpColocateError, TimeoutError):
    """A deadline of this library passed; the message names what was awaited and for how long."""


class RankLostError(TpColocateError, ConnectionError):
    """Another rank stopped answering in a collective (it exited, was killed, or is stuck), or came to it from another call."""


class RankFailedError(TpColocateError, RuntimeError):
    """An exception of another library, raised on one rank and told to all ranks of the group.

    On the rank that found it, ``__cause__`` is the original; elsewhere its traceback is in ``details``.
    """


class RendezvousError(TpColocateError, RuntimeError):
    """The owner's URL could not be found, or what was found could not be trusted."""


class EngineError(TpColocateError):
    """Anything that concerns the SGLang server."""


class LaunchError(EngineError, RuntimeError):
    """The server did not come up; ``details`` is the tail of its log."""


class RequestError(EngineError, RuntimeError):
    """The server refused a request; the message is the server's own.

    Args:
        status: HTTP status code of the answer.
    """

    def __init__(self, message: str, *, status: int | None = None, **context: Any) -> None:
        super().__init__(message, **context)
        self.status = status


class EngineStateError(EngineError, RuntimeError):
    """The call does not fit the state the engine is in, for example generating while asleep."""


class EngineDeadError(EngineError, ConnectionError):
    """The server process is gone, or its socket no longer answers."""


class SyncError(EngineError, RuntimeError):
    """A weight sync failed; unless the message says otherwise, the engine needs a full sync before use."""
