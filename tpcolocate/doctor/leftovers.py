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
# As written by `Launch`, `ServerProcess` and `rendezvous`; a job begins with the pid of its rank 0, on whichever host.
_JOB = r"(?P<job>(?P<pid>\d+)-[0-9a-f]{8})"
_ANNOUNCEMENT = re.compile(rf"tpcolocate-(?P<uid>\d+)-{_JOB}-\d+\.json(?P<temporary>\.\w+)?")
_SYNC_FOLDER = re.compile(rf"tpcolocate-(?P<uid>\d+)-{_JOB}-[0-9a-f]{{16}}")
_CONFIG_FOLDER = re.compile(r"tpcolocate-[a-z0-9_]{8}")
_CONFIG_FILE = "server.yaml"
_TORCH_FILE = re.compile(r"torch_(?P<pid>\d+)_\d+_\d+")
_SUPERVISOR = "tpcolocate/server/supervisor.py"
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
    in_use = _in_use(shm, proc)
    with os.scandir(shm) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.stat(follow_symlinks=False).st_uid == os.getuid():
                found.extend(_in_shm(entry, in_use))
    found.extend(_configurations(temporary, proc))
    return found


@dataclass(frozen=True, slots=True)
class _InUse:
    """What protects the files of a job whose rank 0 is not here: it may run on another host.

    Attributes:
        jobs: Those with an announcement of a running process.
        sockets: Paths of open sockets.
        supervisors: Starts of running supervisors; a job that still launches has one and no announcement.
    """

    jobs: frozenset[str]
    sockets: frozenset[str]
    supervisors: tuple[float, ...]

    def covers(self, path: Path, job: str, modified: float) -> bool:
        """Whether a running job may need a file."""
        return (
            job in self.jobs
            or any(socket.startswith(f"{path}/") for socket in self.sockets)
            or any(started >= modified - 1.0 for started in self.supervisors)
        )


def _in_use(shm: Path, proc: Path) -> _InUse:
    jobs = set()
    for path in shm.glob("tpcolocate-*.json"):
        if (match := _ANNOUNCEMENT.fullmatch(path.name)) and (writer := _writer(path)) is not None:
            if start_of(writer[0]) == writer[1]:
                jobs.add(match["job"])
    return _InUse(frozenset(jobs), _open_sockets(proc), tuple(_supervisors(proc)))


def _supervisors(proc: Path) -> Iterator[float]:
    for pid, command in _processes(proc):
        if any(part.endswith(_SUPERVISOR) for part in command):
            try:
                yield psutil.Process(pid).create_time()
            except psutil.Error:
                continue


def _in_shm(entry: os.DirEntry[str], in_use: _InUse) -> Iterator[Leftover]:
    path, status = Path(entry.path), entry.stat(follow_symlinks=False)
    is_file, is_folder = entry.is_file(follow_symlinks=False), entry.is_dir(follow_symlinks=False)
    if (match := _ANNOUNCEMENT.fullmatch(entry.name)) and is_file and int(match["uid"]) == os.getuid():
        writer = None if match["temporary"] else _writer(path)
        if writer is not None and start_of(writer[0]) != writer[1]:
            yield Leftover(f"announcement of a server whose trainer (pid {writer[0]}) has exited", str(path))
        elif writer is None and _has_ended(path, match, status.st_mtime, in_use):
            yield Leftover(f"announcement of a job whose rank 0 (pid {match['pid']}) has exited", str(path))
    elif (match := _SYNC_FOLDER.fullmatch(entry.name)) and is_folder and int(match["uid"]) == os.getuid():
        if _has_ended(path, match, status.st_mtime, in_use):
            what = f"sockets and files of a job whose rank 0 (pid {match['pid']}) has exited"
            yield Leftover(what, str(path), num_bytes=_size(path))
    elif (match := _SGLANG_FILE.fullmatch(entry.name)) and is_file:
        if not _may_run(int(match["pid"]), status.st_mtime):
            what = f"message queue of SGLang's process {match['pid']}, which has exited"
            yield Leftover(what, str(path), num_bytes=status.st_size)


def _has_ended(path: Path, match: re.Match[str], modified: float, in_use: _InUse) -> bool:
    return not _may_run(int(match["pid"]), modified) and not in_use.covers(path, match["job"], modified)


def torch_files(*, shm: Path = SHM) -> tuple[int, int]:
    """Return number and bytes of this user's files of torch's shared memory whose process has exited.

    They may be of any program, and another process may still map them; so they are not leftovers to remove.
    """
    sizes = []
    for path in shm.glob("torch_*"):
        try:
            status = path.lstat()
        except OSError:
            continue
        match = _TORCH_FILE.fullmatch(path.name)
        if match and status.st_uid == os.getuid() and not _may_run(int(match["pid"]), status.st_mtime):
            sizes.append(status.st_size)
    return len(sizes), sum(sizes)


def _writer(path: Path) -> tuple[int, int] | None:
    """Return pid and start of the process that wrote an announcement; None if it cannot be read."""
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


__all__ = ["SHM", "Leftover", "find_leftovers", "remove", "torch_files"]
