"""Evidence of why a server does not answer, for errors: which process died or is stopped, and the end of the log.

The owner's supervisor reports a death to the owner (`tpcolocate.server.process`) and writes it into the log, where the
other ranks and processes of this user read it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tpcolocate.deadline import Deadline
from tpcolocate.processes import is_stopped, start_of
from tpcolocate.runtime_folder import read_processes

# How the supervisor writes what died, and of which launch.
_VERDICT, _MARK_CHARS = "[tpcolocate] ", 8
_TAIL_BYTES = 16_384
_TAIL_LINES = 40
_NO_LOG = "(no log)"
# The connection to a server that dies is reset before its supervisor has seen the death.
_NOTICED_WITHIN_S = 2.0
_POLL_INTERVAL_S = 0.05


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known of a server that does not answer.

    Attributes:
        cause: ``sglang::detokenizer (pid 7) was killed by SIGKILL``; None if all its processes run.
        is_dead: Whether the server has ended or is being ended.
        log_path: The server's log.
        tail: The end of the log.
    """

    cause: str | None
    is_dead: bool
    log_path: Path
    tail: str

    @property
    def hint(self) -> str:
        """What to do, with the path of the log."""
        if self.is_dead and self.tail == _NO_LOG:  # it goes with a server that was shut down
            return "there is no log; launch(log_path=...) keeps one"
        if self.is_dead or self.cause is None:
            return f"see the server's log {self.log_path}"
        return f"kill -CONT continues a stopped process; the server's log is {self.log_path}"


class Evidence:
    """Looks for the cause whenever an error needs one.

    Args:
        log_path: The server's log.
        processes: File in which the supervisor lists the server's processes.
        died: Returns what died if that is known, an empty string if something did; None if nothing did.  Default:
            read from the log.
    """

    def __init__(self, log_path: Path, processes: Path, died: Callable[[], str | None] | None = None) -> None:
        self.log_path = log_path
        self._processes = processes
        self._died = self.verdict_in_log if died is None else died
        # Servers of several slices may write to one file.
        self._mark = f" [launch {processes.parent.name.rpartition('-')[2][:_MARK_CHARS]}]"
        self.was_in_trouble = False
        """Whether a look has found a cause."""
        # What an earlier server has written to the same file is not of this one.
        self._verdicts_start = _size(log_path)
        self.log_start = self._verdicts_start if died is not None else 0

    def __call__(self) -> Finding:
        """Return what is known, after at most two seconds."""
        stopped = self.stopped()
        deadline = Deadline.after(_NOTICED_WITHIN_S)
        died = self._died()
        while died is None and not stopped and not deadline.has_passed:
            time.sleep(_POLL_INTERVAL_S)
            died = self._died()
        causes = [*([died] if died else []), *stopped]
        self.was_in_trouble = self.was_in_trouble or bool(causes)
        return Finding("; ".join(causes) or None, died is not None, self.log_path, self.tail())

    def stopped(self) -> list[str]:
        """Return the server's processes that are stopped, by SIGSTOP or a debugger; at once."""
        return [
            f"{process['name']} (pid {process['pid']}) is stopped"
            for process in read_processes(self._processes)
            if start_of(process["pid"]) == process["started"] and is_stopped(process["pid"])
        ]

    def verdict_in_log(self) -> str | None:
        """Return what the supervisor has written that died, for processes that it does not report to; None if nothing did."""
        for line in self.lines(self._verdicts_start):
            if line.startswith(_VERDICT) and line.endswith(self._mark):
                return line.removeprefix(_VERDICT).removesuffix(self._mark)
        return None if self._processes.parent.exists() else "the server was ended"

    def lines(self, since: int | None = None) -> list[str]:
        """Return the last lines of the log, at most 16 KiB, from an offset in bytes on."""
        since = self.log_start if since is None else since
        try:
            with open(self.log_path, "rb") as log:
                end = log.seek(0, os.SEEK_END)
                start = log.seek(max(end - _TAIL_BYTES, since))
                text = log.read().decode(errors="replace")
        except OSError:
            return []
        if start > since:
            text = text.partition("\n")[2]  # an incomplete line
        return text.splitlines()

    def tail(self) -> str:
        """Return the end of the log, for messages."""
        if not self.log_path.exists():
            return _NO_LOG
        return "\n".join(["--- last lines of the server's log ---", *self.lines()[-_TAIL_LINES:]])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


__all__ = ["Evidence", "Finding"]
