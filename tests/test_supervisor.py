"""The server's guardian: whatever happens to whom, nothing of the server is left.

The server here is a small script that leaves behind what SGLang leaves: a worker, a worker in a session of its own
whose parent is gone, a message queue named by pid, a shared-memory file and a semaphore that are only mapped.
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
SOON_S = 60.0  # bounds a wait for what should take a moment

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

# Stands between the test and the supervisor, so that it can be killed: argv is the supervisor's job without the owner.
OWNER = """
import json, os, subprocess, sys, time
job = json.loads(sys.argv[1])
fields = open("/proc/self/stat").read().rpartition(")")[2].split()
job |= {"owner_pid": os.getpid(), "owner_started": int(fields[19])}
guardian = subprocess.Popen([sys.executable, "-P", sys.argv[2]], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
guardian.stdin.write(json.dumps(job).encode() + b"\\n")
guardian.stdin.flush()
print(guardian.pid, flush=True)
if sys.argv[3] == "forks" and os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(600)
"""


class Server:
    """A stand-in server under a supervisor, and what is known of it."""

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
        self.guardian = None

    def start(self, **job):
        pid, started = this_process()
        self.guardian = subprocess.Popen(
            [sys.executable, "-P", str(SUPERVISOR)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.guardian.stdin.write(
            json.dumps(self.job | {"owner_pid": pid, "owner_started": started} | job).encode() + b"\n"
        )
        self.guardian.stdin.flush()
        return self.wait_up()

    def wait_up(self):
        until(lambda: (self.folder / "server").exists(), "the stand-in server is up")
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
        """What the supervisor said at the end; waits for the end."""
        until(lambda: self.guardian.poll() is not None, "the supervisor has ended")  # communicate() would end it
        events = [json.loads(line) for line in self.guardian.stdout]
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
        if server.guardian is not None:
            server.guardian.kill()
            server.guardian.communicate()
        for process in server.processes.values():
            if alive(process):
                process.kill()
        for path in server.shm:
            path.unlink(missing_ok=True)


def test_stop_ends_the_whole_tree_and_what_it_left(make):
    server = make().start()
    began = time.monotonic()
    server.guardian.stdin.write(b"stop\n")
    server.guardian.stdin.flush()
    assert server.last_event() == {"event": "exited", "code": -signal.SIGTERM, "forced": False}
    assert time.monotonic() - began < 50, "nothing ignored SIGTERM: no grace was to be waited for"
    server.assert_gone(0)  # before the event, not after


def test_a_server_that_ignores_sigterm_is_killed_after_the_grace_and_the_event_says_so(make):
    server = make("stubborn", grace_s=0.7).start()
    began = time.monotonic()
    server.guardian.stdin.write(b"stop\n")
    server.guardian.stdin.flush()
    assert server.last_event() == {"event": "exited", "code": -signal.SIGKILL, "forced": True}
    assert 0.7 <= time.monotonic() - began
    server.assert_gone(0)


def test_a_closed_pipe_ends_it(make):
    server = make().start()
    server.guardian.stdin.close()
    server.guardian.stdin = None
    assert server.last_event()["code"] == -signal.SIGTERM
    server.assert_gone(0)


def test_a_server_that_exits_by_itself_takes_everything_along_and_its_code_is_told(make, tmp_path):
    server = make("exits").start()
    (tmp_path / "exit").touch()
    assert server.last_event() == {"event": "exited", "code": 7, "forced": False}
    server.assert_gone(0)


def test_sigterm_to_the_supervisor_is_an_orderly_end(make):
    server = make().start()
    server.guardian.terminate()
    assert server.last_event()["code"] == -signal.SIGTERM
    assert server.guardian.returncode == 0
    server.assert_gone(0)


def test_a_second_sigterm_does_not_cut_the_end_short(make):
    server = make("stubborn", grace_s=1.0).start()
    server.guardian.terminate()
    server.guardian.stdin.write(b"stop\n")
    server.guardian.stdin.flush()
    while server.guardian.poll() is None:  # through all of it
        server.guardian.terminate()
        time.sleep(0.02)
    assert server.last_event()["forced"] is True
    server.assert_gone(0)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP])
def test_what_a_terminal_sends_to_everyone_is_ignored(make, sent):
    server = make().start()
    os.kill(server.guardian.pid, sent)
    # A signal comes before whatever is read next: had it ended the supervisor, there would be no last event.
    server.guardian.stdin.write(b"stop\n")
    server.guardian.stdin.flush()
    assert server.last_event()["code"] == -signal.SIGTERM
    server.assert_gone(0)


def test_a_killed_supervisor_takes_the_server_along(make):
    server = make().start()
    server.guardian.kill()
    until(lambda: not alive(server.processes["server"]), "the kernel has killed the server")


@pytest.mark.parametrize("kind", ["plain", "forks"])
def test_a_killed_owner_ends_the_server_even_if_a_fork_of_it_holds_the_pipe_or_nobody_reaps_it(make, kind):
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
        assert kind == "plain" or alive(others[1]), "the fork still holds the pipe"
    finally:
        for process in others:
            if alive(process):
                process.kill()
        owner.kill()
        owner.communicate()


def test_an_owner_of_another_start_time_is_not_the_owner(make):
    """Its pid was given to somebody else before the supervisor looked."""
    pid, started = this_process()
    server = make()
    guardian = subprocess.Popen([sys.executable, "-P", str(SUPERVISOR)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    server.guardian = guardian
    guardian.stdin.write(json.dumps(server.job | {"owner_pid": pid, "owner_started": started - 1}).encode() + b"\n")
    guardian.stdin.flush()
    first, last = (json.loads(line) for line in guardian.stdout)
    assert last["event"] == "exited" and not psutil.pid_exists(first["pid"])


def test_a_command_that_does_not_exist_is_told(make):
    server = make()
    pid, started = this_process()
    done = subprocess.run(
        [sys.executable, "-P", str(SUPERVISOR)],
        input=json.dumps(server.job | {"command": ["/no/such/program"], "owner_pid": pid, "owner_started": started}) + "\n",
        capture_output=True, text=True, timeout=SOON_S, check=False,
    )  # fmt: skip
    event = json.loads(done.stdout)
    assert event["event"] == "exited" and event["code"] is None and "/no/such/program" in event["error"]


def test_the_log_is_for_its_user_alone(make):
    server = make().start()
    assert stat.S_IMODE(server.log.stat().st_mode) == 0o600
    assert server.log.read_text() == "a line in the log\n"


def test_it_leaves_the_files_of_others_alone(make):
    server = make().start()
    mine = Path(f"/dev/shm/sgl_shm_mq_{os.getpid()}_abcd1234")
    mine.touch()
    semaphore = multiprocessing.get_context("spawn").Semaphore()
    name = Path(f"/dev/shm/sem.{semaphore._semlock.name.lstrip('/')}")
    assert name.exists()
    try:
        server.guardian.stdin.close()
        server.guardian.stdin = None
        server.guardian.wait(SOON_S)
        server.assert_gone(0)
        assert mine.exists() and name.exists()
    finally:
        mine.unlink()
