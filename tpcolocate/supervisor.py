"""Supervisor of the server: a small process between the trainer and SGLang that outlives both.

Run as a script, by path, so that it imports nothing of this package and nothing heavy; what both need is here.  It starts the
server, copies its output to the log without the API key, and ends it (the whole process tree, the files that it leaves in
/dev/shm, and the runtime folder of the launch) when

* the trainer sends ``stop`` through the pipe on standard input,
* the trainer has exited: the pipe reads end-of-file, or its process is gone.  The second check is for forks of the
  trainer (data loader workers) that keep the pipe open,
* the server's main process or one of SGLang's own child processes (scheduler, detokenizer, ...) has exited.

SIGTERM does not end it: Slurm and ``timeout`` send it to all processes of a job, and the trainer may want to finish its
step.  If this process is killed, the kernel kills the server (PR_SET_PDEATHSIG), and SGLang's own parent-death signals
end its workers.

Protocol: one JSON object on standard input (see `main`), then a line: ``stop``, with ``keep`` to keep the log and ``now`` if the
server holds all requests; ``retry`` to keep all files for another try.  JSON lines on standard output:

* ``{"event": "started", "pid": ...}``, or ``{"event": "failed", "error": ...}`` as the last one,
* ``{"event": "died", "processes": [{"name": ..., "pid": ..., "code": ...}], "lacked_memory": ...}`` at once, before anything
  is cleaned up, if the server was not asked to end; a code is negative for a signal and None if unknown.  The runtime folder
  then stays until the trainer sends its line or exits,
* ``{"event": "exited", "code": ..., "forced": ...}`` once all processes of the server, and otherwise all files, are gone.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
IN_MOVED_TO, IN_CREATE = 0x80, 0x100  # of inotify(7)
_libc = ctypes.CDLL(None, use_errno=True)

# Files that SGLang leaves in /dev/shm: scheduler message queues (24 MiB each) and load snapshots even after a graceful
# stop, as sgl_shm_<kind>_<pid>_<random> and sglang_loads_<socket>_<digest>; semaphores of joblib, which a scheduler has
# where sklearn is installed and which SGLang kills; after a forced one, also those of multiprocessing.  In old releases,
# 0.5.9 for one, the queues have multiprocessing's own name, psm_<random>; data loaders make files of that name as well,
# often, and so those are only looked for now and then.
_NOTICED_PREFIXES = ("sgl_shm_", "sglang_", "sem.mp-", "sem.loky-")
LEFTOVER_PREFIXES = (*_NOTICED_PREFIXES, "psm_")
_SHM = "/dev/shm/"
_VMSTAT = "/proc/vmstat"
# Where torch counts the CUDA-IPC handles that a process has sent.  Its exit removes the file, but not its end by a signal,
# as by torchrun when another rank has failed.
_HANDLE_COUNTS = re.compile(r"torch_(?P<pid>\d+)_\d+_\d+")
# SGLang's processes set their titles to this and their role, once they have imported what they need.
_TITLE = "sglang::"
# Between scans of the process tree, which read all of /proc; and after a file was made in /dev/shm, of which only a live
# process that maps it shows whose it is.
_SCAN_INTERVAL_S = 2.0
_SCAN_AFTER_FILE_S = 0.2
# Between looks for processes that have got their titles, while the server starts.  Of one that ends soon after, SGLang may
# say so only after a minute in which it waits for dumps of the GPU.
_LOOK_FOR_TITLES_S = 0.25
_STARTS_WITHIN_S = 120.0
# Between looks at the processes that matter.  With pidfds, which old kernels, seccomp profiles and gVisor lack, their
# exits are noticed at once.
_LOOK_INTERVAL_MS = 1000
_LOOK_INTERVAL_WITHOUT_PIDFD_MS = 200
# An interrupted server may wait for requests without a limit; SGLang's own way, after a SIGTERM, has one.
_INTERRUPT_S = 2.0
# A server that has lost a process may still write why, and cannot end gracefully.
_LAST_WORDS_S = 1.0
_GRACE_AFTER_DEATH_S = 1.0
# How long the server has run at most when its first processes are looked for.
_JUST_BEGUN_S = 1.0
# After the owner, other ranks of the slice end by themselves or by torchrun: SIGKILL follows its SIGTERM after 30 s.
_OUTLIVES_TRAINERS_S = 60.0
_PIPE_BYTES = 1 << 20
_MARK_CHARS = 8
_EVENT, _EVENT_BYTES = struct.Struct("iIII"), 1 << 16  # inotify_event without its name
_HIDDEN = b"***"
LACKED_MEMORY = (
    "since the server started the kernel has killed processes for want of memory (dmesg, or the container's limit)"
)
"""About a server that was killed by the kernel, as far as that can be known."""
# A beginning of the key that is cut off at the end of the output is hidden from this length on.
_KEY_BEGINNING = 8


def report(**event: object) -> None:
    """Report an event to the trainer, if it is still there."""
    try:
        # As bytes: PYTHONIOENCODING may give this process's text any encoding.
        sys.stdout.buffer.write(json.dumps(event).encode() + b"\n")
        sys.stdout.buffer.flush()
    except (BrokenPipeError, ValueError):
        pass


def event_in(line: bytes) -> dict[str, Any] | None:
    """Return the event that `report` has written into a line of this process's output; None if there is none.

    What a sitecustomize.py or a preloaded library prints as Python starts is on the same output.
    """
    _, beginning, rest = line.partition(b'{"event": ')
    return json.loads(beginning + rest) if beginning else None


@dataclass(frozen=True)
class Stat:
    """Of /proc/PID/stat: state, parent, start in clock ticks since boot, wait status of a zombie (0 if not permitted)."""

    state: str
    parent: int
    started: int
    status: int

    @property
    def has_exited(self) -> bool:
        return self.state in "ZX"


def stat_of(pid: int) -> Stat | None:
    """Return the state of a process; None if there is none.  See `tpcolocate.processes.start_of`."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return Stat(fields[0].decode(), int(fields[1]), int(fields[19]), int(fields[49]) if len(fields) > 49 else 0)


def is_running(pid: int, started: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    found = stat_of(pid)
    return found is not None and found.started == started and not found.has_exited


def catches(pid: int, signum: int) -> bool:
    """Return whether a process has a handler for a signal; see ``SigCgt`` in proc(5)."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:  # with the process's name, which may be no text
            masks = [line.split()[1] for line in file if line.startswith(b"SigCgt:")]
    except OSError:
        return False
    return any(int(mask, 16) >> (signum - 1) & 1 for mask in masks)


def widen(pipe: int) -> None:
    """Let a pipe, by a descriptor of either end, take 1 MiB that is not read yet, if this user's limit permits it."""
    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:
        pass


def pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process exits; None where there are none."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None


def oom_kills() -> int:
    """Return how many processes the kernel has killed since boot because the machine or a container lacked memory; 0 if unknown."""
    try:
        with open(_VMSTAT, "rb") as file:
            return next((int(line.split()[1]) for line in file if line.startswith(b"oom_kill ")), 0)
    except OSError:
        return 0


def shm_files(pids: Iterable[int], since: float) -> set[str]:
    """Return SGLang's files in /dev/shm that these processes map or that have their pid in the name.

    Args:
        pids: Of the processes.
        since: When the first of them began, in `time.time`.  Older files of a name are of another container's process: those
            share /dev/shm and have their own pids.
    """
    pids = set(pids)
    # By inode: a semaphore is mapped under a temporary name, before it gets its own.
    mapped = set().union(*map(mapped_inodes, pids))
    found = set()
    with os.scandir(_SHM) as entries:
        for entry in entries:
            parts = entry.name.split("_")
            is_named = entry.name.startswith("sgl_shm_") and len(parts) >= 4 and parts[-2].isdecimal()
            if entry.inode() in mapped or (is_named and int(parts[-2]) in pids and _is_made_since(entry, since)):
                found.add(entry.name)
    return {name for name in found if name.startswith(LEFTOVER_PREFIXES)}


def handle_counts(pids: Collection[int]) -> dict[str, int]:
    """Return torch's files in /dev/shm in which these processes count handles, each with its process.

    Only a live process shows that a file is its own, since it maps it: other containers may share /dev/shm, and have the
    same pids.
    """
    of_pid: dict[int, dict[str, int]] = {}
    with os.scandir(_SHM) as entries:
        for entry in entries:
            match = _HANDLE_COUNTS.fullmatch(entry.name)
            if match is not None and int(match["pid"]) in pids:
                of_pid.setdefault(int(match["pid"]), {})[entry.name] = entry.inode()
    found: dict[str, int] = {}
    for pid, inodes in of_pid.items():
        mapped = mapped_inodes(pid)
        found |= {name: pid for name, inode in inodes.items() if inode in mapped}
    return found


def mapped_inodes(pid: int) -> set[int]:
    """Return the inodes of what a process maps of /dev/shm."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as maps:  # paths need not be text
            return {int(line.split(maxsplit=5)[4]) for line in maps if _SHM.encode() in line}
    except OSError:
        return set()  # it has exited, or is another user's


def _is_made_since(entry: os.DirEntry[str], since: float) -> bool:
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and status.st_mtime >= since


class Log:
    """The server's output on its way to a file, without the secrets in it.

    Args:
        path: Appended to; made with mode 0600.
        secrets: Replaced by ``***``: SGLang prints its arguments with the API key.

    Raises:
        OSError: The file cannot be opened, or belongs to another user.
    """

    def __init__(self, path: str, secrets: list[str]) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        status = os.fstat(self._file)
        if stat.S_ISREG(status.st_mode) and status.st_uid != os.getuid():
            os.close(self._file)
            raise PermissionError(f"it belongs to user id {status.st_uid}, not to {os.getuid()}: {path!r}")
        self._secrets = [secret.encode() for secret in secrets]
        self._rest = b""
        self._last = b"\n"
        self._copier: threading.Thread | None = None

    def copy_from(self, output: int) -> None:
        """Copy all that comes out of a pipe, in a thread of its own: the server must never wait for a full pipe."""
        self._copier = threading.Thread(target=self._copy, args=(output,), daemon=True)
        self._copier.start()

    def _copy(self, output: int) -> None:
        while chunk := os.read(output, 65536):
            self.write(chunk)
        self._write(self._redacted(b"", is_last=True))

    def write(self, chunk: bytes) -> None:
        self._write(self._redacted(chunk))

    def _redacted(self, chunk: bytes, *, is_last: bool = False) -> bytes:
        text = self._rest + chunk
        for secret in self._secrets:
            text = text.replace(secret, _HIDDEN)
        # What could be the beginning of a secret waits for the rest of it.
        waiting = max((_beginning(text, secret) for secret in self._secrets), default=0)
        text, self._rest = text[: len(text) - waiting], text[len(text) - waiting :]
        if is_last:
            text, self._rest = text + (_HIDDEN if len(self._rest) >= _KEY_BEGINNING else self._rest), b""
        return text

    def _write(self, text: bytes) -> None:
        self._last = text[-1:] or self._last
        try:
            while text:
                text = text[os.write(self._file, text) :]
        except OSError:
            pass  # a full disk costs the log, not the server

    def add_line(self, line: str) -> None:
        """Append a line of this process, whatever the server's has not ended."""
        self._write(("" if self._last == b"\n" else "\n").encode() + f"[tpcolocate] {line}\n".encode())

    def close(self, *, timeout_s: float) -> None:
        """Wait until all output is copied."""
        if self._copier is not None:
            self._copier.join(timeout_s)


def _beginning(text: bytes, secret: bytes) -> int:
    """Return the length of the longest end of the text that is a beginning of the secret."""
    return next((n for n in range(min(len(text), len(secret) - 1), 0, -1) if text.endswith(secret[:n])), 0)


@dataclass
class Watched:
    """A process whose exit ends the server."""

    name: str
    pid: int
    started: int
    pidfd: int | None


class Tree:
    """The server and all processes that it started, orphans included.

    Args:
        server: Its main process.
        record: File that names the processes, for errors that name a stopped one, and for the next launch if this process is
            killed; None for none.
        trainers: Pid and start of each rank of the slice, whose counts of handles are removed at the end if it is gone.
    """

    def __init__(
        self, server: subprocess.Popen[bytes], record: str | None = None, trainers: Mapping[int, int] | None = None
    ) -> None:
        self.server = server
        self.pids: set[int] = {server.pid}
        self.files: set[str] = set()
        self.watched: dict[int, Watched] = {}
        self._seen: list[psutil.Process] = []
        """By the last scan."""
        self._record = record
        self._recorded: object = None
        # The record that lies there now, open and locked for as long as this process lives: a process of another container, which
        # shares /dev/shm and has pids of its own, sees nothing else of it.
        self._locked: object = None
        self._trainers = dict(trainers or {})
        self._counts: dict[str, int] = {}
        self._began = time.time() - _JUST_BEGUN_S
        self.scan()

    def scan(self) -> list[psutil.Process]:
        """Return the live processes.  As the subreaper, this process inherits orphans, so none is missed."""
        alive = psutil.Process().children(recursive=True)
        self.pids.update(process.pid for process in alive)
        self.files |= shm_files((process.pid for process in alive), self._began)
        self._seen = alive
        self._note_handle_counts()
        self._write_record([entry for process in alive if (entry := self._describe(process.pid)) is not None])
        return alive

    def _note_handle_counts(self) -> None:
        alive = {pid for pid, started in self._trainers.items() if is_running(pid, started)}
        # Tensors that are shared on a CPU have such names for a moment.
        self._counts = {name: pid for name, pid in self._counts.items() if pid not in alive} | handle_counts(alive)

    def remove_handle_counts(self, *, timeout_s: float = 0.0) -> None:
        """Remove those of trainers that are gone, waiting up to a timeout for those that are not yet."""
        deadline = time.monotonic() + timeout_s
        while self._counts:
            for name, pid in list(self._counts.items()):
                if not is_running(pid, self._trainers[pid]):
                    _unlink(_SHM + name)
                    del self._counts[name]
            if time.monotonic() >= deadline:
                return
            time.sleep(_LOOK_INTERVAL_MS / 1000)

    def look_for_titles(self) -> bool:
        """Watch processes that have got their titles since the last scan, if the server may be starting.  Return whether it may.

        A process that has one has imported for seconds, so that a scan has seen it: these are looked at, and not all of /proc.
        """
        if time.time() >= self._began + _STARTS_WITHIN_S:
            return False
        for process in self._seen:
            if process.pid not in self.watched and process.is_running():  # no other process has its pid
                self._describe(process.pid)
        return True

    def _describe(self, pid: int) -> dict[str, Any] | None:
        found = stat_of(pid)
        if found is None or found.has_exited:
            return None
        name = "main process" if pid == self.server.pid else _title(pid)
        if pid != self.server.pid and name.startswith(_TITLE) and not _is_copy(name, found.parent):
            if pid not in self.watched:
                self.watched[pid] = Watched(name, pid, found.started, pidfd(pid))
            self.watched[pid].name = name  # the rank comes into a scheduler's title later
        return {"name": name, "pid": pid, "started": found.started}

    def _write_record(self, processes: list[dict[str, Any]]) -> None:
        own = stat_of(os.getpid())
        content = {
            "is_locked": True,
            "supervisor": {"name": "supervisor", "pid": os.getpid(), "started": own.started if own is not None else 0},
            "processes": processes,
            "files": sorted(self.files),
            "handle_counts": [
                {"file": name, "pid": pid, "started": self._trainers[pid]} for name, pid in sorted(self._counts.items())
            ],
        }
        if self._record is None or (content == self._recorded and os.path.exists(self._record)):
            return
        self._recorded = content
        try:
            file = open(
                os.open(self._record + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w"
            )
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            json.dump(content, file)
            file.flush()
            os.rename(self._record + ".new", self._record)
            self._locked = file
        except OSError:
            pass  # the folder is gone or full; the server runs without

    def deaths(self) -> list[dict[str, Any]]:
        """Return the processes that matter and have exited."""
        found = []
        for child in self.watched.values():
            now = stat_of(child.pid)
            if now is None or now.started != child.started:
                found.append({"name": child.name, "pid": child.pid, "code": None})
            elif now.has_exited:
                found.append({"name": child.name, "pid": child.pid, "code": os.waitstatus_to_exitcode(now.status)})
        if self.server.poll() is not None:
            found.insert(0, {"name": "main process", "pid": self.server.pid, "code": self.server.returncode})
        return found

    def end(self, grace_s: float, *, can_answer: bool = True) -> bool:
        """Let the server end within a grace, SIGKILL the rest, remove files.  Return whether the server had to be killed.

        SIGINT ends its HTTP server once the requests in flight are answered, at once if there are none; SGLang looks for a
        SIGTERM every five seconds.  One that still loads ignores SIGINT, and SIGTERM ends it.

        Args:
            grace_s: For requests in flight, in seconds.
            can_answer: Whether the server answers them.  If it holds them, SIGKILL after the SIGINT is as it should be.
        """
        self.scan()
        interrupt_s = min(_INTERRUPT_S, grace_s / 2) if catches(self.server.pid, signal.SIGINT) else 0.0
        ways = {signal.SIGINT: interrupt_s} if interrupt_s > 0 else {}
        if can_answer or not ways:
            ways[signal.SIGTERM] = grace_s - interrupt_s
        has_ended = any(self._ends_after(signum, wait_s) for signum, wait_s in ways.items())
        if not has_ended:
            self.server.kill()
            self.server.wait()
        deadline = time.monotonic() + 10.0
        while (alive := self._kill_rest()) and time.monotonic() < deadline:
            psutil.wait_procs(alive, timeout=0.2)
        # The whole tree has exited: a pid that exists now belongs to another process.
        gone = {pid for pid in self.pids if not psutil.pid_exists(pid)}
        for name in self.files | shm_files(gone, self._began):
            _unlink(_SHM + name)
        self.remove_handle_counts()
        return not has_ended and signal.SIGTERM in ways

    def _ends_after(self, signum: signal.Signals, wait_s: float) -> bool:
        """Send a signal to the main process, and return whether it has exited in time."""
        self.server.send_signal(signum)  # nothing is sent to one that has been waited for
        try:
            self.server.wait(wait_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _kill_rest(self) -> list[psutil.Process]:
        alive = []
        for process in self.scan():
            try:
                process.kill()
                alive.append(process)
            except psutil.NoSuchProcess:
                pass
        return alive


def _title(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(256).split(b"\0")[0].decode(errors="replace").strip()
    except OSError:
        return ""


def _is_copy(title: str, parent: int) -> bool:
    """Return whether a process has its title from the one that forked it, which may be about to run a compiler.

    Such a process may exit at any time.  SGLang's own have a title of their own, and are no orphans while it runs.
    """
    return parent == os.getpid() or _title(parent) == title


def describe_deaths(deaths: list[dict[str, Any]], *, lacked_memory: bool) -> str:
    """Return ``sglang::detokenizer (pid 7) was killed by SIGKILL``, the first one first.

    Args:
        deaths: As in the event.
        lacked_memory: Likewise.
    """
    described = [f"{death['name']} (pid {death['pid']}) {_how(death['code'])}" for death in deaths]
    return "; ".join([*described, *([LACKED_MEMORY] if lacked_memory else [])])


def _how(code: int | None) -> str:
    if code is None:
        return "has exited, with an unknown code"
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def remove(path: str, nonce: str) -> None:
    """Remove a file or folder of this launch, but nothing of another user or another launch."""
    try:
        status = os.lstat(path)
    except OSError:
        return
    if status.st_uid != os.getuid() or nonce not in path:
        return
    if stat.S_ISDIR(status.st_mode):
        shutil.rmtree(path, ignore_errors=True)
        return
    _unlink(path)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # it is gone, or another user's


def _die_with(parent: int) -> None:
    # After fork, before exec.
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it exited before prctl
        os._exit(1)


def _start(job: dict[str, Any]) -> tuple[subprocess.Popen[bytes], Log]:
    log = Log(job["log_path"], job.get("secrets", []))
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    widen(read_end)
    try:
        server = subprocess.Popen(
            job["command"],
            env=job["env"],
            stdin=subprocess.DEVNULL,
            stdout=write_end,
            stderr=write_end,
            preexec_fn=partial(_die_with, os.getpid()),
            process_group=0,
        )
    finally:
        os.close(write_end)
    log.copy_from(read_end)
    return server, log


class NewFiles:
    """Notices when a file that a server may leave is made in /dev/shm; never, where the kernel has no inotify."""

    def __init__(self) -> None:
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd >= 0 and _libc.inotify_add_watch(self._fd, _SHM.encode(), IN_CREATE | IN_MOVED_TO) < 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def fds(self) -> list[int | None]:
        """What becomes readable then."""
        return [self._fd] if self._fd >= 0 else []

    def seen(self) -> bool:
        """Return whether there was one since the last call that may be the server's, by its name."""
        found = False
        try:
            while self._fd >= 0:
                names = _names_of(os.read(self._fd, _EVENT_BYTES))
                found |= any(not name or name.startswith(_NOTICED_PREFIXES) for name in names)
        except BlockingIOError:
            pass
        return found


def _names_of(events: bytes) -> Iterable[str]:
    """Yield the names of inotify's events, an empty one where events were lost."""
    start = 0
    while start < len(events):
        _, _, _, length = _EVENT.unpack_from(events, start)
        start += _EVENT.size + length
        yield os.fsdecode(events[start - length : start].rstrip(b"\0"))


def _wait(tree: Tree, owner: tuple[int, int]) -> tuple[str, list[dict[str, Any]]]:
    """Wait for a reason to end the server: a command, ``owner`` or ``died``, and which processes died."""
    fixed, new_files = [pidfd(tree.server.pid), pidfd(owner[0])], NewFiles()
    next_scan, has_new = time.monotonic() + _SCAN_INTERVAL_S, False
    interval_ms = int(1000 * _LOOK_FOR_TITLES_S)
    while True:
        if deaths := tree.deaths():
            return "died", deaths
        # A file is scanned for once it is mapped.  Those that are made meanwhile are seen after that, and have a scan too.
        watched = [] if has_new else new_files.fds
        command = _next_command(
            owner,
            [*fixed, *(child.pidfd for child in tree.watched.values()), *watched],
            limit_ms=max(0, min(interval_ms, int(1000 * (next_scan - time.monotonic())) + 1)),
        )
        if command is not None:
            return command, []
        if not has_new and new_files.seen():
            has_new, next_scan = True, min(next_scan, time.monotonic() + _SCAN_AFTER_FILE_S)
        if time.monotonic() >= next_scan:
            next_scan, has_new = time.monotonic() + _SCAN_INTERVAL_S, False
            tree.scan()
        elif not tree.look_for_titles():
            interval_ms = _LOOK_INTERVAL_MS


def _wait_for_owner(owner: tuple[int, int]) -> str:
    fd = pidfd(owner[0])
    while (command := _next_command(owner, [fd])) is None:
        pass
    return command


def _next_command(owner: tuple[int, int], pidfds: list[int | None], *, limit_ms: int = _LOOK_INTERVAL_MS) -> str | None:
    """Wait a while, or until one of the processes exits, and return a command of the owner.

    Returns:
        ``stop`` with its words, ``retry``; ``owner`` if it has died; None if there is nothing yet.
    """
    if not is_running(*owner):
        return "owner"
    commands = sys.stdin.fileno()
    poller = select.poll()
    poller.register(commands, select.POLLIN | select.POLLHUP)
    for fd in pidfds:
        if fd is not None:
            poller.register(fd, select.POLLIN)
    ready = poller.poll(min(limit_ms, _LOOK_INTERVAL_WITHOUT_PIDFD_MS) if None in pidfds else limit_ms)
    if commands not in {fd for fd, _ in ready}:
        return None
    # End-of-file: the trainer closed its end or died.
    return os.read(commands, 256).decode().strip() or "owner"


def main() -> int:
    # The terminal, Slurm and others send these to all processes of the job; only the trainer decides.  A handler and not
    # SIG_IGN for SIGTERM, because the server would inherit that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: None)
    # These announce the end of a job's time.  The server shall inherit that: the trainer's handlers are not inherited.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    # The trainer may ignore or block what ends processes and shows their ends, which is inherited.  What else it ignores or
    # blocks stays so in the server: of a signal that Slurm sends to all processes of a step the trainer decides.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD))
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as commands:  # unbuffered: poll() must see the rest
        job = json.loads(commands.readline())
    nonce, kills_before = job.get("nonce", ""), oom_kills()
    try:
        server, log = _start(job)
    except OSError as error:
        report(event="failed", error=f"{type(error).__name__}: {error}")
        return 1
    tree = Tree(server, job.get("record"), dict(job.get("trainers", [])))
    report(event="started", pid=server.pid)
    owner = (job["owner_pid"], job["owner_started"])
    command, deaths = _wait(tree, owner)
    grace_s = job["grace_s"]
    if deaths:
        # The code is unknown where SGLang's main process has waited for it first.
        was_killed = any(death["code"] in (-signal.SIGKILL, None) for death in deaths)
        lacked_memory = was_killed and oom_kills() > kills_before
        report(event="died", processes=deaths, lacked_memory=lacked_memory)
        # Supervisors of other launches may write to the same file.
        log.add_line(
            f"{describe_deaths(deaths, lacked_memory=lacked_memory)} [launch {nonce.rpartition('-')[2][:_MARK_CHARS]}]"
        )
        grace_s = min(grace_s, _GRACE_AFTER_DEATH_S)
        try:
            server.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            pass
    forced = tree.end(grace_s, can_answer="now" not in command)
    log.close(timeout_s=2.0)
    exited = partial(report, event="exited", code=server.returncode, forced=forced)
    if deaths:
        # The files are the evidence: of what, and where, others of this user can still read.
        exited()
        command = _wait_for_owner(owner)
    if command != "retry":
        is_crash = bool(deaths) or forced or "keep" in command
        # The log first: to processes without a supervision of their own, a folder that is gone says that the server was ended,
        # and the error of a request in flight then names the log if it is there.
        for path in [*([] if is_crash else job.get("unlink_log", [])), *job["unlink"]]:
            remove(path, nonce)
    if not deaths:
        exited()
    if command == "owner":
        tree.remove_handle_counts(timeout_s=_OUTLIVES_TRAINERS_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
