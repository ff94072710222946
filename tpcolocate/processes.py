"""Identity of a process: its pid, which may be reused, and its start time; what belongs to one process, and its signals."""

from __future__ import annotations

import os
import signal
import traceback
from typing import NoReturn

from tpcolocate.errors import ConfigError


class OfOneProcess:
    """Has connections, locks or child processes, so that a copy of it would not work: it is not pickled or copied."""

    def __reduce__(self) -> NoReturn:
        what = type(self).__name__
        raise ConfigError(
            f"{'an' if what[0] in 'AEIOU' else 'a'} {what} belongs to its process, and cannot be copied or sent to another one",
            hint="call tpcolocate.connect(job) there, where job is Colocation.job, and generate with what it returns",
        )


def this_process() -> tuple[int, int]:
    """Return pid and start time (`start_of`), which together identify this process."""
    pid = os.getpid()
    started = start_of(pid)
    assert started is not None
    return pid, started


def start_of(pid: int) -> int | None:
    """Return the start of a process in clock ticks since boot; None if it has exited, reaped or not.

    Not in seconds since the epoch: those change whenever the clock is set.  Field 22 of /proc/PID/stat; see proc(5).
    """
    fields = _stat_of(pid)
    return None if fields is None or fields[0] in (b"Z", b"X") else int(fields[19])


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped, by a signal such as SIGSTOP or by a debugger."""
    fields = _stat_of(pid)
    return fields is not None and fields[0] in (b"T", b"t")


def _stat_of(pid: int) -> list[bytes] | None:
    """Return the fields of /proc/PID/stat from the third on, the state; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()  # the name before it may contain spaces and brackets
    except OSError:
        return None


def pid_namespace() -> str:
    """Return the identity of this process's pid namespace: containers may share /dev/shm and not their pids."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return "unknown"


def raised_by_handler(error: BaseException | None) -> BaseException | None:
    """Return what a signal's handler of this process has raised, if that is what an error is or comes from; else None.

    A handler runs wherever the main thread is.  Within a wait for a socket, what it raises looks as if the socket had: a watchdog's
    TimeoutError is an OSError.
    """
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {getattr(getattr(handler, "__func__", handler), "__code__", None) for handler in handlers}
    found, passed = None, set[int]()
    while error is not None and id(error) not in passed:  # to the first one: libraries give its traceback to their own
        if any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__)):
            found = error
        passed.add(id(error))
        error = error.__context__ if error.__cause__ is None else error.__cause__
    return found


__all__ = ["OfOneProcess", "is_stopped", "pid_namespace", "raised_by_handler", "start_of", "this_process"]
