"""The files in /dev/shm that a job has made, beside other processes of the machine that make some.

Semaphores of `multiprocessing` and its blocks of memory have random names.  The process that has made a file maps it; but
one that is killed maps it no more, and may leave it there.  So each new file is looked at once it is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import psutil

from tpcolocate.supervisor import mapped_inodes, stat_of

SHM = Path("/dev/shm")
_PREFIXES = ("sgl_", "sglang_", "torch_", "tpcolocate", "sem.mp-", "sem.loky-", "psm_")
# Until a new file is looked at.  That of another process that is killed sooner is taken for one of the job.
_LOOK_INTERVAL_S = 0.1


class ShmFiles:
    """The files that a job makes in /dev/shm, from now on.

    Args:
        ours: Returns the pids of the job: its ranks, and what was seen below them.

    Note:
        `close` ends its thread.
    """

    def __init__(self, ours: Callable[[], Collection[int]]) -> None:
        self._before = frozenset(os.listdir(SHM))
        self._ours = ours
        self._others: set[str] = set()
        """Files that a process which is not of the job has mapped."""
        self._looked_at: frozenset[str] = frozenset()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="files in /dev/shm", daemon=True)
        self._thread.start()

    def now(self, job_id: str) -> list[str]:
        """Return those of the job: all that cannot be of another process.

        Args:
            job_id: Of the ranks' `Colocation`; empty before there is one.
        """
        names, ours = self._names(), self._ours()
        unclear = [name for name in names if not numbers(name) & set(ours) and not (job_id and job_id in name)]
        return sorted(set(names) - (self._others & set(unclear)) - _of_others(unclear, ours))

    def has_looked_at(self, name: str) -> bool:
        """Whether a file has been looked at."""
        return name in self._looked_at

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _names(self) -> list[str]:
        with contextlib.suppress(OSError):
            return [name for name in os.listdir(SHM) if name.startswith(_PREFIXES) and name not in self._before]
        return []

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_INTERVAL_S):
            names = frozenset(self._names())
            if new := names - self._looked_at:
                self._others |= _mapped_by_others(new, self._ours())
            self._looked_at = names


def numbers(name: str) -> set[int]:
    """Return the numbers in a name that may be pids."""
    # Whole words: digits inside of a random name are some process's pid sooner or later.
    return {int(word) for word in re.split(r"[-_.]", name) if word.isdecimal()}


def _of_others(names: Collection[str], ours: Collection[int]) -> set[str]:
    """Return those of some names that belong to processes which are not ours, or cannot be assigned to any."""
    if not names:
        return set()
    found = _mapped_by_others(names, ours)
    others = set(psutil.pids()) - set(ours)
    found |= {name for name in names if not numbers(name).isdisjoint(others)}
    # What another job's supervisor is about to remove: nothing maps it any more.
    for record in SHM.glob("tpcolocate-*/processes.json"):
        if numbers(record.parent.name).isdisjoint(ours):
            with contextlib.suppress(OSError, ValueError):
                found |= set(names) & set(json.loads(record.read_text()).get("files", ()))
    # Another job's, which has just ended.
    found |= {name for name in names if name.startswith(("torch_", "sgl_shm_", "tpcolocate"))}
    return found


def _mapped_by_others(names: Iterable[str], ours: Collection[int]) -> set[str]:
    # By inode: a semaphore is mapped under a temporary name, before it gets its own.
    inodes = {}
    for name in names:
        with contextlib.suppress(OSError):
            inodes[(SHM / name).stat().st_ino] = name
    found: set[str] = set()
    for pid in psutil.pids():
        mapped = mapped_inodes(pid) & inodes.keys()
        if mapped and not _is_below(pid, ours):
            found |= {inodes[inode] for inode in mapped}
    return found


def _is_below(pid: int, ancestors: Collection[int]) -> bool:
    """Whether a process is one of some, or has been started by one, if only just now."""
    while pid > 1:
        if pid in ancestors:
            return True
        found = stat_of(pid)
        if found is None:
            return False
        pid = found.parent
    return False
