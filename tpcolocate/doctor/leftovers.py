"""What jobs of this user that have ended left on this host, and its removal.

A job's own supervisor removes all of this.  Something is left only where the supervisor was killed as well, or never ran.
Everything is judged by the processes that it belongs to, and what belongs to another user, or to a running process, is
never listed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tpcolocate.deadline import Deadline
from tpcolocate.processes import start_of
from tpcolocate.runtime_folder import is_private, read_owner, read_processes
from tpcolocate.server.arguments import RECEIVER

SHM = Path("/dev/shm")
_PROC = Path("/proc")
_TORCH_FILE = re.compile(r"torch_(?P<pid>\d+)_\d+_\d+")
_SGLANG_FILE = re.compile(r"sgl_shm_\w+?_(?P<pid>\d+)_\w+")
# A folder has its owner's record this long after it was made, at most.
_STARTING_S = 60.0
# A supervisor ends a server within this time after the trainer's exit.
_ENDING_S = 60.0
_KILL_AFTER_S = 10.0


@dataclass(frozen=True, slots=True)
class Leftover:
    """One thing that remained.

    Attributes:
        what: Description, with the job's or the server's process.
        path: File or folder; None for a process.
        pid: Process; None for a file.
        started: Its start, see `start_of`.
        num_bytes: Size on disk or in memory.
    """

    what: str
    path: str | None = None
    pid: int | None = None
    started: int | None = None
    num_bytes: int = 0

    @property
    def name(self) -> str:
        """Path or process, for messages."""
        return self.path if self.path is not None else f"process {self.pid}"


def find_leftovers(*, shm: Path = SHM, proc: Path = _PROC) -> list[Leftover]:
    """List what launches of this user whose trainers have ended left behind.

    A launch is judged by the record of its owner, with pid, start and PID namespace: one of another container by the lock of
    its supervisor.

    Args:
        shm: Folder of the launches and of SGLang's queues.
        proc: Where processes are listed.
    """
    found = list(_servers(proc))
    for folder in sorted(shm.glob(f"tpcolocate-{os.getuid()}-*")):
        if is_private(folder):
            found.extend(_of_launch(folder))
    with os.scandir(shm) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            match = _SGLANG_FILE.fullmatch(entry.name)
            status = None if match is None else status_of(entry)
            if match is None or status is None or status.st_uid != os.getuid() or not stat.S_ISREG(status.st_mode):
                continue
            if not _may_run(int(match["pid"]), status.st_mtime):
                what = f"message queue of SGLang's process {match['pid']}, which has exited"
                found.append(Leftover(what, entry.path, num_bytes=status.st_size))
    return found


def _of_launch(folder: Path) -> Iterator[Leftover]:
    """Yield the folders of a launch, unless its owner runs or its supervisor still ends the server."""
    owner = read_owner(folder)
    if owner is None:
        status = status_of(folder)
        if status is not None and time.time() - status.st_mtime > _STARTING_S:
            yield Leftover("folder of a launch that has no record of its owner", str(folder), num_bytes=_size(folder))
        return
    supervisor = read_processes(folder / "processes.json")[:1]
    if owner.is_running() or any(start_of(each["pid"]) == each["started"] for each in supervisor):
        return
    what = f"a launch whose trainer (pid {owner.pid}) has exited"
    yield Leftover(f"key, sockets and files of {what}", str(folder), num_bytes=_size(folder))
    temporary = Path(owner.temporary)
    if temporary.name == folder.name and is_private(temporary):
        yield Leftover(f"log and temporary files of {what}", str(temporary), num_bytes=_size(temporary))


def torch_files(*, shm: Path = SHM) -> tuple[int, int]:
    """Return number and bytes of this user's files of torch's shared memory whose process has exited.

    They may be of any program, and another process may still map them; so they are not leftovers to remove.
    """
    sizes = []
    for path in shm.glob("torch_*"):
        match, status = _TORCH_FILE.fullmatch(path.name), status_of(path)
        if (
            match
            and status is not None
            and status.st_uid == os.getuid()
            and not _may_run(int(match["pid"]), status.st_mtime)
        ):
            sizes.append(status.st_size)
    return len(sizes), sum(sizes)


def status_of(path: str | os.PathLike[str]) -> os.stat_result | None:
    """Return the status of a file or link; None if it is gone: jobs make and remove files all the time."""
    try:
        return os.lstat(path)
    except OSError:
        return None


def _may_run(pid: int, modified: float) -> bool:
    """Whether the process that a file is named after may still run: a process of that pid that is older than the file."""
    try:
        return psutil.Process(pid).create_time() <= modified + 1.0 and start_of(pid) is not None
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _servers(proc: Path) -> Iterator[Leftover]:
    """Yield servers with this library's receiver that no supervisor watches any more."""
    for pid, command in _processes(proc):
        if "sglang.launch_server" not in command or RECEIVER not in command:
            continue
        try:
            process = psutil.Process(pid)
            watched = any(Path(part).name == "supervisor.py" for each in process.parents() for part in each.cmdline())
            is_old = time.time() - process.create_time() > _ENDING_S
            num_bytes = process.memory_info().rss
        except psutil.Error:
            continue
        started = start_of(pid)
        if not watched and is_old and started is not None:
            yield Leftover("server whose trainer and supervisor have exited", None, pid, started, num_bytes)


def _processes(proc: Path) -> list[tuple[int, list[str]]]:
    """Return pid and command line of this user's processes."""
    found = []
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if folder.stat().st_uid == os.getuid():
                command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                found.append((int(folder.name), command))
        except OSError:
            continue  # it has exited
    return found


def _size(path: Path) -> int:
    # `os.walk` passes over folders that are gone.
    found = [
        status_of(os.path.join(folder, name)) for folder, *names in os.walk(path) for some in names for name in some
    ]
    return sum(status.st_size for status in found if status is not None)


def remove(leftovers: Iterable[Leftover]) -> tuple[list[Leftover], list[tuple[Leftover, str]]]:
    """Remove leftovers: end processes, delete files and folders.

    Returns:
        What is gone, and what is not with the reason.
    """
    gone: list[Leftover] = []
    kept: list[tuple[Leftover, str]] = []
    for each in leftovers:
        try:
            if each.pid is not None and each.started is not None:
                _end(each.pid, each.started)
            elif each.path is not None and Path(each.path).is_dir() and not Path(each.path).is_symlink():
                shutil.rmtree(each.path)
            elif each.path is not None:
                Path(each.path).unlink(missing_ok=True)
        except (OSError, psutil.Error) as error:
            kept.append((each, str(error)))
        else:
            gone.append(each)
    return gone, kept


def _end(pid: int, started: int) -> None:
    """End a process and what it started: SIGTERM, then SIGKILL.  Nothing happens to another process of its pid."""
    process = psutil.Process(pid)
    tree = [process, *process.children(recursive=True)]
    if start_of(pid) != started:
        return  # psutil's own methods compare the start of the processes in `tree`
    process.send_signal(signal.SIGTERM)
    deadline = Deadline.after(_KILL_AFTER_S)
    _, alive = psutil.wait_procs(tree, timeout=deadline.left())
    for each in alive:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            pass
    _, alive = psutil.wait_procs(alive, timeout=5.0)
    if alive:
        raise OSError(f"processes {', '.join(str(each.pid) for each in alive)} do not end")


__all__ = ["SHM", "Leftover", "find_leftovers", "remove", "status_of", "torch_files"]
