"""Supervisor of the server: a small process between the trainer and SGLang that outlives both.

Run as a script, by path, so that it imports nothing of this package and nothing heavy.  It starts the server, and ends
it (the whole process tree, and the files that it leaves in /dev/shm) when

* the trainer sends ``stop`` through the pipe on standard input,
* the trainer has exited: the pipe reads end-of-file, or its process is gone.  The second check is for forks of the
  trainer (data loader workers) that keep the pipe open,
* the server's main process has exited.

If this process is killed, the kernel kills the server (PR_SET_PDEATHSIG), and SGLang's own parent-death signals end its
workers.

Protocol: one JSON object on standard input (see `main`), then a line ``stop``; JSON lines on standard output:
``{"event": "started", "pid": ...}``, then ``{"event": "exited", "code": ..., "forced": ...}`` once all processes and
files of the server are gone.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)

# Files that SGLang leaves in /dev/shm: scheduler message queues (24 MiB each) and load snapshots even after a graceful
# stop, as sgl_shm_<kind>_<pid>_<random> and sglang_loads_<socket>_<digest>; after a forced one, also semaphores of
# multiprocessing.
_LEFTOVER_PREFIXES = ("sgl_shm_", "sglang_", "sem.mp-")
_SHM = "/dev/shm/"
# Between scans of the process tree; exits of the server and of the trainer are noticed at once.
_SCAN_INTERVAL_MS = 2000


def report(**event: object) -> None:
    """Report an event to the trainer, if it is still there."""
    try:
        print(json.dumps(event), flush=True)
    except (BrokenPipeError, ValueError):
        pass


def shm_files(pids: Iterable[int]) -> set[str]:
    """Return SGLang's files in /dev/shm that these processes map or that have their pid in the name."""
    pids = set(pids)
    mapped = set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/maps") as maps:
                # By inode: a semaphore is mapped under a temporary name, before it gets its own.
                mapped |= {int(line.split(maxsplit=5)[4]) for line in maps if _SHM in line}
        except OSError:
            continue  # exited meanwhile
    found = set()
    with os.scandir(_SHM) as entries:
        for entry in entries:
            parts = entry.name.split("_")
            is_named = entry.name.startswith("sgl_shm_") and len(parts) >= 4 and parts[-2].isdigit()
            if entry.inode() in mapped or (is_named and int(parts[-2]) in pids):
                found.add(entry.name)
    return {name for name in found if name.startswith(_LEFTOVER_PREFIXES)}


def owner_is_running(pid: int, started: int) -> bool:
    """Return whether the process exists and is not a zombie; see `tpcolocate.processes.start_of`."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return False
    return fields[0] not in (b"Z", b"X") and int(fields[19]) == started


class Tree:
    """The server and all processes that it started, orphans included."""

    def __init__(self, server: subprocess.Popen[bytes]) -> None:
        self.server = server
        self.pids: set[int] = {server.pid}
        self.files: set[str] = set()

    def scan(self) -> list[psutil.Process]:
        """Return the live processes.  As the subreaper, this process inherits orphans, so none is missed."""
        alive = psutil.Process().children(recursive=True)
        self.pids.update(process.pid for process in alive)
        self.files |= shm_files(process.pid for process in alive)
        return alive

    def end(self, grace_s: float) -> bool:
        """Send SIGTERM, wait, SIGKILL the rest, remove files.  Return whether the server had to be killed."""
        forced = False
        self.scan()
        if self.server.poll() is None:
            self.server.terminate()
            try:
                self.server.wait(grace_s)
            except subprocess.TimeoutExpired:
                forced = True
                self.server.kill()
                self.server.wait()
        deadline = time.monotonic() + 10.0
        while (alive := self._kill_rest()) and time.monotonic() < deadline:
            psutil.wait_procs(alive, timeout=0.2)
        # The whole tree has exited: a pid that exists now belongs to another process.
        gone = {pid for pid in self.pids if not psutil.pid_exists(pid)}
        for name in self.files | shm_files(gone):
            try:
                os.unlink(_SHM + name)
            except FileNotFoundError:
                pass
        return forced

    def _kill_rest(self) -> list[psutil.Process]:
        alive = []
        for process in self.scan():
            try:
                process.kill()
                alive.append(process)
            except psutil.NoSuchProcess:
                pass
        return alive


def _woken_by_sigterm() -> int:
    """Return a descriptor that becomes readable on SIGTERM, so that a clean-up by name or job ends the server too.

    Not an exception, which could interrupt the code that ends the server.
    """
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda signum, frame: None)
    return read_end


def _die_with(parent: int) -> None:
    # After fork, before exec.
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it exited before prctl
        os._exit(1)


def main() -> int:
    # The terminal sends these to all processes of the job; only the trainer decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    terminated = _woken_by_sigterm()
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    job = json.loads(sys.stdin.buffer.readline())
    owner_pid, owner_started = job["owner_pid"], job["owner_started"]
    log = os.open(job["log_path"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        server = subprocess.Popen(
            job["command"],
            env=job["env"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=partial(_die_with, os.getpid()),
            process_group=0,
        )
    except OSError as error:
        report(event="exited", code=None, forced=False, error=str(error))
        return 1
    tree = Tree(server)
    report(event="started", pid=server.pid)

    commands = sys.stdin.fileno()
    poller = select.poll()
    poller.register(commands, select.POLLIN | select.POLLHUP)
    poller.register(terminated, select.POLLIN)
    poller.register(os.pidfd_open(server.pid), select.POLLIN)
    try:
        poller.register(os.pidfd_open(owner_pid), select.POLLIN)
    except OSError:
        pass  # exited already; the check below sees it
    while server.poll() is None and owner_is_running(owner_pid, owner_started):
        ready = {fd for fd, _ in poller.poll(_SCAN_INTERVAL_MS)}
        if commands in ready or terminated in ready:
            break  # "stop", or end-of-file: the trainer closed its end or died
        tree.scan()
    forced = tree.end(job["grace_s"])
    for path in job["unlink"]:  # in case the trainer could not
        shutil.rmtree(path, ignore_errors=True)
        try:
            os.unlink(path)
        except OSError:
            pass
    report(event="exited", code=server.returncode, forced=forced)
    return 0


if __name__ == "__main__":
    sys.exit(main())
