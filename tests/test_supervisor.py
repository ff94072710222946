"""The supervisor: however server, owner or supervisor end, no process and no file of the server is left.

The server is replaced by a script that leaves what SGLang leaves: a worker, an orphaned worker in a session of its own,
a message queue named by pid, and a shared-memory file and a semaphore that can only be found by their mappings.
"""

import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tpcolocate.processes import this_process
from tpcolocate.server import process as launch

pytestmark = [pytest.mark.quick, pytest.mark.timeout(240), pytest.mark.usefixtures("no_leftovers")]

SUPERVISOR = Path(launch.__file__).with_name("supervisor.py")
SOON_S = 60.0  # for what should take a moment

SERVER = """
import _multiprocessing, mmap, os, signal, sys, time
folder, mode = sys.argv[1], sys.argv[2]
def note(name):
    with open(f"{folder}/{name}.new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"{folder}/{name}.new", f"{folder}/{name}")
def rest():
    while True:
        time.sleep(60)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    note("worker")
    rest()
if os.fork() == 0:
    os.setsid()
    if os.fork() != 0:
        os._exit(0)
    shared = open("/dev/shm/sglang_loads_test_" + str(os.getpid()) + ".shm", "w+b")
    shared.truncate(4096)
    mapped = mmap.mmap(shared.fileno(), 4096)
    shared.close()
    semaphore = _multiprocessing.SemLock(0, 1, 1, "/mp-test" + str(os.getpid()), False)
    note("orphan")
    rest()
os.wait()
for name in ("worker", "orphan"):
    while not os.path.exists(f"{folder}/{name}"):
        time.sleep(0.005)
open(f"/dev/shm/sgl_shm_mq_{os.getpid()}_abcd1234", "w").close()
print("a line in the log", flush=True)
note("server")
if mode == "exits":
    while not os.path.exists(f"{folder}/exit"):
        time.sleep(0.005)
    os._exit(7)
rest()
"""

# An owner that can be killed, between the test and the supervisor; argv[1] is the job without the owner.
OWNER = """
import json, os, subprocess, sys, time
job = json.loads(sys.argv[1])
fields = open("/proc/self/stat").read().rpartition(")")[2].split()
job |= {"owner_pid": os.getpid(), "owner_started": int(fields[19])}
supervisor = subprocess.Popen([sys.executable, "-P", sys.argv[2]], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
supervisor.stdin.write(json.dumps(job).encode() + b"\\n")
supervisor.stdin.flush()
print(supervisor.pid, flush=True)
if sys.argv[3] == "forks" and os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(600)
"""


class Server:
    """The script under a supervisor, its processes and its files."""

    def __init__(self, folder, mode="honest", grace_s=60.0):
        self.folder = folder
        self.unlinked = folder / "rendezvous.json"
        self.unlinked.touch()
        self.log = folder / "server.log"
        self.job = {
            "command": [sys.executable, "-c", SERVER, str(folder), mode],
            "env": dict(os.environ),
            "log_path": str(self.log),
            "unlink": [str(self.unlinked), str(folder / "never-was-there")],
            "grace_s": grace_s,
        }
        self.processes = {}
        self.shm = []
        self.supervisor = None

    def start(self, **job):
        pid, started = this_process()
        self.supervisor = subprocess.Popen(
            [sys.executable, "-P", str(SUPERVISOR)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.supervisor.stdin.write(
            json.dumps(self.job | {"owner_pid": pid, "owner_started": started} | job).encode() + b"\n"
        )
        self.supervisor.stdin.flush()
        return self.wait_up()

    def wait_up(self):
        until(lambda: (self.folder / "server").exists(), "the server is up")
        self.processes = {
            name: psutil.Process(int((self.folder / name).read_text())) for name in ("server", "worker", "orphan")
        }
        pids = {name: process.pid for name, process in self.processes.items()}
        self.shm = [
            Path(f"/dev/shm/sgl_shm_mq_{pids['server']}_abcd1234"),
            Path(f"/dev/shm/sglang_loads_test_{pids['orphan']}.shm"),
            Path(f"/dev/shm/sem.mp-test{pids['orphan']}"),
        ]
        assert all(path.exists() for path in self.shm)
        assert os.getsid(pids["orphan"]) != os.getsid(pids["server"])
        return self

    def assert_gone(self, within_s=SOON_S):
        until(lambda: not any(map(alive, self.processes.values())), "all processes have ended", within_s)
        until(lambda: not any(path.exists() for path in self.shm), "its files in /dev/shm are gone", within_s)
        until(lambda: not self.unlinked.exists(), "the rendezvous file is gone", within_s)

    def last_event(self):
        """Wait for the supervisor to exit and return its last event."""
        until(lambda: self.supervisor.poll() is not None, "the supervisor has ended")  # communicate() would stop it
        events = [json.loads(line) for line in self.supervisor.stdout]
        assert events[0] == {"event": "started", "pid": self.processes["server"].pid}
        assert len(events) == 2
        return events[1]


def alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(condition, what, within_s=SOON_S):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.01)


@pytest.fixture
def make(tmp_path):
    made = []

    def make(*args, **kwargs):
        made.append(Server(tmp_path, *args, **kwargs))
        return made[-1]

    yield make
    for server in made:
        if server.supervisor is not None:
            server.supervisor.kill()
            server.supervisor.communicate()
        for process in server.processes.values():
            if alive(process):
                process.kill()
        for path in server.shm:
            path.unlink(missing_ok=True)


def test_stop_ends_all_processes_and_removes_all_files(make):
    server = make().start()
    began = time.monotonic()
    server.supervisor.stdin.write(b"stop\n")
    server.supervisor.stdin.flush()
    assert server.last_event() == {"event": "exited", "code": -signal.SIGTERM, "forced": False}
    assert time.monotonic() - began < 50, "nothing ignored SIGTERM, so the grace period is not used"
    server.assert_gone(0)  # before the event, not after


def test_a_server_that_ignores_sigterm_is_killed_after_the_grace_and_reported_as_forced(make):
    server = make("stubborn", grace_s=0.7).start()
    began = time.monotonic()
    server.supervisor.stdin.write(b"stop\n")
    server.supervisor.stdin.flush()
    assert server.last_event() == {"event": "exited", "code": -signal.SIGKILL, "forced": True}
    assert 0.7 <= time.monotonic() - began
    server.assert_gone(0)


def test_a_closed_pipe_ends_the_server(make):
    server = make().start()
    server.supervisor.stdin.close()
    server.supervisor.stdin = None
    assert server.last_event()["code"] == -signal.SIGTERM
    server.assert_gone(0)


def test_after_the_server_exits_all_is_removed_and_its_code_is_reported(make, tmp_path):
    server = make("exits").start()
    (tmp_path / "exit").touch()
    assert server.last_event() == {"event": "exited", "code": 7, "forced": False}
    server.assert_gone(0)


def test_sigterm_to_the_supervisor_stops_the_server(make):
    server = make().start()
    server.supervisor.terminate()
    assert server.last_event()["code"] == -signal.SIGTERM
    assert server.supervisor.returncode == 0
    server.assert_gone(0)


def test_a_second_sigterm_does_not_shorten_the_grace(make):
    server = make("stubborn", grace_s=1.0).start()
    server.supervisor.terminate()
    server.supervisor.stdin.write(b"stop\n")
    server.supervisor.stdin.flush()
    while server.supervisor.poll() is None:  # until it exits
        server.supervisor.terminate()
        time.sleep(0.02)
    assert server.last_event()["forced"] is True
    server.assert_gone(0)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP])
def test_signals_of_a_terminal_are_ignored(make, sent):
    server = make().start()
    os.kill(server.supervisor.pid, sent)
    # The signal is handled before the next read: if it had ended the supervisor, there would be no last event.
    server.supervisor.stdin.write(b"stop\n")
    server.supervisor.stdin.flush()
    assert server.last_event()["code"] == -signal.SIGTERM
    server.assert_gone(0)


def test_the_kernel_kills_the_server_of_a_killed_supervisor(make):
    server = make().start()
    server.supervisor.kill()
    until(lambda: not alive(server.processes["server"]), "the kernel has killed the server")


@pytest.mark.parametrize("kind", ["plain", "forks"])
def test_a_killed_owner_ends_the_server_even_if_unreaped_or_if_a_fork_keeps_the_pipe_open(make, kind):
    server = make()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, json.dumps(server.job), str(SUPERVISOR), kind], stdout=subprocess.PIPE, text=True
    )
    others = [psutil.Process(int(owner.stdout.readline())) for _ in range(2 if kind == "forks" else 1)]
    try:
        server.wait_up()
        owner.kill()  # and not waited for: it stays a zombie
        server.assert_gone()
        until(lambda: not alive(others[0]), "the supervisor has ended")
        assert psutil.Process(owner.pid).status() == psutil.STATUS_ZOMBIE
        assert kind == "plain" or alive(others[1]), "the fork still has the pipe open"
    finally:
        for process in others:
            if alive(process):
                process.kill()
        owner.kill()
        owner.communicate()


def test_a_process_with_the_owners_pid_and_another_start_is_not_the_owner(make):
    """The owner's pid was reused before the supervisor checked it."""
    pid, started = this_process()
    server = make()
    supervisor = subprocess.Popen(
        [sys.executable, "-P", str(SUPERVISOR)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    server.supervisor = supervisor
    supervisor.stdin.write(json.dumps(server.job | {"owner_pid": pid, "owner_started": started - 1}).encode() + b"\n")
    supervisor.stdin.flush()
    first, last = (json.loads(line) for line in supervisor.stdout)
    assert last["event"] == "exited" and not psutil.pid_exists(first["pid"])


def test_a_command_that_does_not_exist_is_reported(make):
    server = make()
    pid, started = this_process()
    done = subprocess.run(
        [sys.executable, "-P", str(SUPERVISOR)],
        input=json.dumps(server.job | {"command": ["/no/such/program"], "owner_pid": pid, "owner_started": started}) + "\n",
        capture_output=True, text=True, timeout=SOON_S, check=False,
    )  # fmt: skip
    event = json.loads(done.stdout)
    assert event["event"] == "exited" and event["code"] is None and "/no/such/program" in event["error"]


def test_the_log_is_readable_by_its_user_alone(make):
    server = make().start()
    assert stat.S_IMODE(server.log.stat().st_mode) == 0o600
    assert server.log.read_text() == "a line in the log\n"


def test_files_of_other_processes_are_kept(make):
    server = make().start()
    own = Path(f"/dev/shm/sgl_shm_mq_{os.getpid()}_abcd1234")
    own.touch()
    semaphore = multiprocessing.get_context("spawn").Semaphore()
    name = Path(f"/dev/shm/sem.{semaphore._semlock.name.lstrip('/')}")
    assert name.exists()
    try:
        server.supervisor.stdin.close()
        server.supervisor.stdin = None
        server.supervisor.wait(SOON_S)
        server.assert_gone(0)
        assert own.exists() and name.exists()
    finally:
        own.unlink()
