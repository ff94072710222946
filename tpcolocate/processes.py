"""Which process is which: a pid is given to another one in time, a pid with its start is not."""

from __future__ import annotations

import os


def this_process() -> tuple[int, int]:
    """Pid and start time, which together identify this process."""
    pid = os.getpid()
    started = start_of(pid)
    assert started is not None
    return pid, started


def start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it has ended, whether or not its parent has noticed.

    Not in seconds since the epoch: those are computed from the clock, and a clock that is set makes every process
    look like another one.  Field 22 of /proc/PID/stat; see proc(5).
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()  # the name before it may hold spaces and brackets
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


__all__ = ["start_of", "this_process"]
