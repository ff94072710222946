"""What a test leaves behind: its processes, and what they have made in /dev/shm.

Every process of a test session has a tag in its environment, by which orphans are found wherever they were re-parented to.

This module must not import torch: see `harness`.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import psutil

SESSION_TAG = "TPC_TEST_SESSION"
SHM_FOLDER = Path("/dev/shm")
SHM_PREFIXES = ("sgl_", "sglang_", "torch_", "tpcolocate", "psm_")
SURVIVORS_TIMEOUT_S = 30.0  # for processes that a rank started to end after it
KILLED_S = 20.0  # from SIGKILL to the end of a process


@dataclass(frozen=True)
class Footprint:
    """Processes and shared memory that exist at one moment.

    Args:
        shm: Names in /dev/shm with one of ``SHM_PREFIXES``.
        processes: The processes of this test session.
    """

    shm: frozenset[str]
    processes: frozenset[psutil.Process]

    @classmethod
    def now(cls) -> Footprint:
        """Return the current footprint."""
        _note_foreign_pids()
        return cls(frozenset(_shm_names()), frozenset(_session_processes()))


def tag_session() -> None:
    """Tag every process that this one will start, directly or not; see ``leftovers``."""
    os.environ[SESSION_TAG] = uuid.uuid4().hex


def leftovers(since: Footprint, *, timeout_s: float = SURVIVORS_TIMEOUT_S) -> list[str]:
    """Return what has appeared since and does not go away by itself within the time given.

    Args:
        since: The footprint before.
        timeout_s: How long to wait for it to go away, in seconds.

    Returns:
        A line per process and per entry of /dev/shm; empty if nothing is left.
    """
    _note_foreign_pids()
    deadline = time.monotonic() + timeout_s
    while True:
        processes = [process for process in _session_processes() if process not in since.processes]
        shm = [name for name in _shm_names() if name not in since.shm]
        if not processes and not _ours(shm):
            return []
        if time.monotonic() >= deadline:
            return [described(process) for process in processes] + [f"/dev/shm/{name}" for name in _ours(shm)]
        # Sleeps if there is only shared memory to wait for: nothing announces its end.
        psutil.wait_procs(processes, timeout=0.05) if processes else time.sleep(0.05)


def end_leftovers(since: Footprint) -> None:
    """Kill the processes that ``leftovers`` would name."""
    kill(process for process in _session_processes() if process not in since.processes)


def _session_processes() -> Iterator[psutil.Process]:
    own = psutil.Process()
    # multiprocessing keeps these two until the process ends, as torch does with its manager of shared files.
    helpers = (
        getattr(resource_tracker._resource_tracker, "_pid", None),
        getattr(forkserver._forkserver, "_forkserver_pid", None),
    )
    found = set(own.children(recursive=True))
    if SESSION_TAG in os.environ:
        found |= set(tagged(SESSION_TAG, os.environ[SESSION_TAG]))
    for process in found:
        with contextlib.suppress(psutil.Error):
            if process.pid in (own.pid, *helpers) or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.name() != "torch_shm_manager":
                yield process


def tagged(name: str, value: str) -> Iterator[psutil.Process]:
    """Yield the processes that have a variable of this value in their environment."""
    wanted = f"{name}={value}".encode()
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if wanted in _environment_of(pid).split(b"\0"):
                yield psutil.Process(pid)


def _environment_of(pid: int) -> bytes:
    """Return a process's environment; in the middle of an exec it is empty, and has to be read again."""
    found = Path(f"/proc/{pid}/environ").read_bytes()
    for _ in range(20):
        if found:
            break
        os.readlink(f"/proc/{pid}/exe")  # fails for what has no program: threads of the kernel, zombies
        time.sleep(0.01)
        found = Path(f"/proc/{pid}/environ").read_bytes()
    return found


def _shm_names() -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(name for name in os.listdir(SHM_FOLDER) if name.startswith(SHM_PREFIXES))
    return []


# Processes of others that were seen at some moment: what they leave when they are killed is not ours.
_foreign_pids: set[int] = set()


def _note_foreign_pids() -> None:
    own = psutil.Process()
    family = {process.pid for process in [own, *own.children(recursive=True)]}
    tag = f"{SESSION_TAG}={os.environ.get(SESSION_TAG)}".encode()
    for pid in set(psutil.pids()) - family:
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            if environment and tag not in environment.split(b"\0"):  # a zombie has none, and may be ours
                _foreign_pids.add(pid)


def _ours(names: Iterable[str]) -> list[str]:
    """Leave out what belongs to other processes, such as a server beside the tests or another test session."""
    names = list(names)
    if not names:
        return []
    family = {process.pid for process in _session_processes()} | {os.getpid()}
    foreign: set[str] = set()
    for pid in (set(psutil.pids()) | _foreign_pids) - family:
        foreign |= {name for name in names if str(pid) in _numbers(name)}
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
            foreign |= {name for name in names if f"/dev/shm/{name}" in maps}
    return [name for name in names if name not in foreign]


def _numbers(name: str) -> list[str]:
    """Return the parts of a name in /dev/shm that may be the pid of its creator."""
    parts = name.replace("-", "_").split("_")
    return parts[1:2] if parts[0] == "torch" else parts  # torch adds a random number and a counter


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill processes, and wait until they have ended."""
    doomed = list(processes)
    for process in doomed:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(doomed, timeout=KILLED_S)


def described(process: psutil.Process) -> str:
    """Return a process's number and the beginning of its command line."""
    with contextlib.suppress(psutil.Error):
        return f"process {process.pid}: {' '.join(process.cmdline())[:200]}"
    return f"process {process.pid}"
