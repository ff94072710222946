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
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tpcolocate import rendezvous
from tpcolocate.deadline import Deadline
from tpcolocate.errors import RendezvousError
from tpcolocate.processes import start_of
from tpcolocate.server.arguments import RECEIVER

SHM = Path("/dev/shm")
_PROC = Path("/proc")
# As written by `Launch`, `ServerProcess` and `rendezvous`; a job begins with the pid of its rank 0.
_JOB = r"(?P<pid>\d+)-[0-9a-f]{8}"
_ANNOUNCEMENT = re.compile(rf"tpcolocate-(?P<uid>\d+)-{_JOB}-\d+\.json(?P<temporary>\.\w+)?")
_SYNC_FOLDER = re.compile(rf"tpcolocate-(?P<uid>\d+)-{_JOB}-[0-9a-f]{{16}}")
_CONFIG_FOLDER = re.compile(r"tpcolocate-[a-z0-9_]{8}")
_CONFIG_FILE = "server.yaml"
_SGLANG_FILE = re.compile(r"sgl_shm_\w+?_(?P<pid>\d+)_\w+")
# A folder is made this long before a process has it on its command line, at most.
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


def find_leftovers(*, shm: Path = SHM, temporary: Path, proc: Path = _PROC) -> list[Leftover]:
    """List what jobs of this user that have ended left behind.

    Processes are known inside a PID namespace only: where containers share /dev/shm but not that, a running job of
    another container looks as if it had ended.

    Args:
        shm: Folder of announcements, sockets and SGLang's queues.
        temporary: Folder of the servers' configurations.
        proc: Where processes are listed.
    """
    found = list(_servers(proc))
    in_use = _open_sockets(proc)
    with os.scandir(shm) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.stat(follow_symlinks=False).st_uid == os.getuid():
                found.extend(_in_shm(entry, in_use))
    found.extend(_configurations(temporary, proc))
    return found


def _in_shm(entry: os.DirEntry[str], in_use: frozenset[str]) -> Iterator[Leftover]:
    path = Path(entry.path)
    modified = entry.stat(follow_symlinks=False).st_mtime
    if match := _ANNOUNCEMENT.fullmatch(entry.name):
        if int(match["uid"]) == os.getuid() and entry.is_file(follow_symlinks=False):
            writer = _writer(path, temporary=match["temporary"] is not None)
            ended = not _may_run(int(match["pid"]), modified) if writer is None else start_of(writer[0]) != writer[1]
            if ended:
                pid = int(match["pid"]) if writer is None else writer[0]
                yield Leftover(f"announcement of a server whose trainer (pid {pid}) has exited", str(path))
    elif match := _SYNC_FOLDER.fullmatch(entry.name):
        mine = int(match["uid"]) == os.getuid() and entry.is_dir(follow_symlinks=False)
        if mine and not _may_run(int(match["pid"]), modified) and not any(str(path) in used for used in in_use):
            yield Leftover(
                f"sockets and files of a job whose rank 0 (pid {match['pid']}) has exited",
                str(path),
                num_bytes=_size(path),
            )
    elif (match := _SGLANG_FILE.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
        if not _may_run(int(match["pid"]), modified):
            num_bytes = entry.stat(follow_symlinks=False).st_size
            yield Leftover(f"message queue of SGLang's process {match['pid']}, which has exited", str(path), None, None, num_bytes)  # fmt: skip


def _writer(path: Path, *, temporary: bool) -> tuple[int, int] | None:
    """Return pid and start of the process that wrote an announcement; None if it cannot be read."""
    if temporary:
        return None
    try:
        announcement = rendezvous.read(path)
    except RendezvousError:
        return None
    return None if announcement is None else (announcement.pid, announcement.started)


def _may_run(pid: int, modified: float) -> bool:
    """Whether the process that a file is named after may still run: a process of that pid that is older than the file."""
    try:
        return psutil.Process(pid).create_time() <= modified + 1.0 and start_of(pid) is not None
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _open_sockets(proc: Path) -> frozenset[str]:
    """Return the paths of unix sockets that are open in this network namespace."""
    try:
        lines = (proc / "net" / "unix").read_text().splitlines()[1:]
    except OSError:
        return frozenset()
    return frozenset(fields[7] for line in lines if len(fields := line.split(maxsplit=7)) == 8)


def _configurations(temporary: Path, proc: Path) -> Iterator[Leftover]:
    """Yield folders with a server's key whose server does not run."""
    commands = None
    for path in sorted(temporary.glob("tpcolocate-*")):
        try:
            status = path.lstat()
        except OSError:
            continue
        mine = status.st_uid == os.getuid() and path.is_dir() and not path.is_symlink()
        is_old = time.time() - status.st_mtime > _STARTING_S
        if not (mine and is_old and _CONFIG_FOLDER.fullmatch(path.name) and (path / _CONFIG_FILE).is_file()):
            continue
        if commands is None:
            commands = [" ".join(command) for _, command in _processes(proc)]
        if not any(str(path) in command for command in commands):
            yield Leftover("configuration of a server that has exited", str(path), num_bytes=_size(path))


def _servers(proc: Path) -> Iterator[Leftover]:
    """Yield servers with this library's receiver that no supervisor watches any more."""
    for pid, command in _processes(proc):
        if "sglang.launch_server" not in command or RECEIVER not in command:
            continue
        try:
            process = psutil.Process(pid)
            watched = any("supervisor.py" in part for each in process.parents() for part in each.cmdline())
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
    total = 0
    for each in path.rglob("*"):
        try:
            total += each.lstat().st_size
        except OSError:
            continue
    return total


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


__all__ = ["SHM", "Leftover", "find_leftovers", "remove"]
