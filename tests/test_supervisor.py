"""The supervisor: however server, owner or supervisor end, no process and no file of the server is left.

The server is replaced by a script that leaves what SGLang leaves: a worker, an orphaned worker in a session of its own,
a message queue named by pid, and a shared-memory file and semaphores that can only be found by their mappings.
"""

import fcntl
import itertools
import json
import mmap
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tpcolocate import supervisor
from tpcolocate.processes import start_of, this_process

pytestmark = [pytest.mark.quick, pytest.mark.timeout(240), pytest.mark.usefixtures("no_leftovers")]

SUPERVISOR = Path(supervisor.__file__)
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
if mode == "idle":  # as SGLang's: it ends after an interrupt, and looks for a SIGTERM now and then
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: os._exit(3))
if mode == "busy":
    signal.signal(signal.SIGINT, lambda *_: None)
if os.fork() == 0:
    note("worker")
    if mode == "forks":  # a subshell has its parent's title, as a compiler that a scheduler starts has for a moment
        for name in "abc":
            os.mkfifo(f"{folder}/{name}")
        forks = "(read x < a) & ((read x < b) &); read x < c"
        os.chdir(folder)
        os.execv("/bin/sh", ["sglang::scheduler_TP1", "-c", forks])
    if mode == "fails":  # a process that ends soon after it has its title
        os.mkfifo(f"{folder}/end")
        while not os.path.exists(f"{folder}/fail"):
            time.sleep(0.005)
        os.execv("/bin/sh", ["sglang::detokenizer", "-c", f"read x < '{folder}/end'"])
    os.execv("/bin/sleep", ["sglang::detokenizer" if mode != "plain" else "sleep", "600"])
if os.fork() == 0:
    os.setsid()
    if os.fork() != 0:
        os._exit(0)
    shared = open("/dev/shm/sglang_loads_test_" + str(os.getpid()) + ".shm", "w+b")
    shared.truncate(4096)
    mapped = mmap.mmap(shared.fileno(), 4096)
    shared.close()
    semaphores = [_multiprocessing.SemLock(0, 1, 1, f"/{kind}-test{os.getpid()}", False) for kind in ("mp", "loky")]
    note("orphan")
    if mode == "brief":  # a process that makes a file once the server is up, and ends before it
        while not os.path.exists(f"{folder}/make"):
            time.sleep(0.005)
        path = f"/dev/shm/sglang_loads_test_brief_{os.getpid()}.shm"
        with open(path, "w+b") as file:
            file.truncate(4096)
            brief = mmap.mmap(file.fileno(), 4096)
        while not os.path.exists(f"{folder}/end"):
            time.sleep(0.005)
        os._exit(0)
    rest()
os.wait()
for name in ("worker", "orphan"):
    while not os.path.exists(f"{folder}/{name}"):
        time.sleep(0.005)
open(f"/dev/shm/sgl_shm_mq_{os.getpid()}_abcd1234", "w").close()
print("a line in the log, with the key 0123456789abcdef", flush=True)
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


# A trainer with torch's counts of its CUDA-IPC handles, which it maps, and another container's for the same pid.
TRAINER = """
import mmap, os, sys
counts = open(f"/dev/shm/torch_{os.getpid()}_1_0", "w+b")
counts.truncate(4096)
mapped = mmap.mmap(counts.fileno(), 4096)
open(f"/dev/shm/torch_{os.getpid()}_2_0", "w").close()
print(flush=True)
sys.stdin.read()
"""


class Server:
    """The script under a supervisor, its processes and its files."""

    def __init__(self, folder, mode="honest", grace_s=60.0, supervisor=(str(SUPERVISOR),)):
        self.folder = folder
        self.unlinked = folder / "nonce1-runtime"
        self.unlinked.mkdir()
        self.logs = folder / "nonce1-logs"
        self.logs.mkdir()
        self.log = self.logs / "server.log"
        self.record = self.unlinked / "processes.json"
        self.command = [sys.executable, "-P", *supervisor]
        self.job = {
            "command": [sys.executable, "-c", SERVER, str(folder), mode],
            "env": dict(os.environ),
            "log_path": str(self.log),
            "secrets": ["0123456789abcdef"],
            "record": str(self.record),
            "nonce": "nonce1",
            "unlink": [str(self.unlinked), str(folder / "nonce1-never-was-there")],
            "unlink_log": [str(self.logs)],
            "grace_s": grace_s,
        }
        self.processes = {}
        self.shm = []
        self.supervisor = None
        self.environ = None

    def start(self, before=None, **job):
        pid, started = this_process()
        self.supervisor = subprocess.Popen(
            self.command,
            preexec_fn=before,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=self.environ,
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
            Path(f"/dev/shm/sem.loky-test{pids['orphan']}"),
        ]
        assert all(path.exists() for path in self.shm)
        assert os.getsid(pids["orphan"]) != os.getsid(pids["server"])
        return self

    def assert_gone(self, within_s=SOON_S):
        until(lambda: not any(map(alive, self.processes.values())), "all processes have ended", within_s)
        until(lambda: not any(path.exists() for path in self.shm), "its files in /dev/shm are gone", within_s)
        until(lambda: not self.unlinked.exists(), "the runtime folder is gone", within_s)

    def last_event(self):
        """Wait for the supervisor to exit and return its last event, when it has ended the server."""
        until(lambda: self.supervisor.poll() is not None, "the supervisor has ended")  # communicate() would stop it
        events = [json.loads(line) for line in self.supervisor.stdout]
        assert events[0] == {"event": "started", "pid": self.processes["server"].pid}
        assert len(events) == 2
        return events[1]

    def next_event(self):
        return json.loads(self.supervisor.stdout.readline())

    def send(self, command):
        self.supervisor.stdin.write(command)
        self.supervisor.stdin.flush()


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


def test_the_record_is_locked_while_the_supervisor_lives(make):
    """What lives in another container cannot be seen by its pid."""
    server = make().start()
    until(server.record.exists, "the record is there")
    for _ in range(2):
        with open(server.record, "rb") as record, pytest.raises(BlockingIOError):
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        server.record.unlink()  # as systemd does
        until(server.record.exists, "the record is there again")
    server.supervisor.kill()
    server.supervisor.wait(SOON_S)
    with open(server.record, "rb") as record:
        fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
    server.record.unlink()


def test_a_server_that_ignores_sigterm_is_killed_after_the_grace_and_reported_as_forced(make):
    server = make("stubborn", grace_s=0.7).start()
    began = time.monotonic()
    server.supervisor.stdin.write(b"stop\n")
    server.supervisor.stdin.flush()
    assert server.last_event() == {"event": "exited", "code": -signal.SIGKILL, "forced": True}
    assert 0.7 <= time.monotonic() - began
    server.assert_gone(0)


@pytest.mark.parametrize(("mode", "code", "least_s", "most_s"), [
    ("idle", 3, 0.0, 50.0), ("busy", -signal.SIGTERM, supervisor._INTERRUPT_S, 50.0),
])  # fmt: skip
def test_a_server_that_catches_interrupts_is_interrupted_first(make, mode, code, least_s, most_s):
    server = make(mode, grace_s=60.0).start()
    began = time.monotonic()
    server.supervisor.stdin.write(b"stop\n")
    server.supervisor.stdin.flush()
    assert server.last_event() == {"event": "exited", "code": code, "forced": False}
    assert least_s <= time.monotonic() - began < most_s
    server.assert_gone(0)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "code"), [
    ("idle", 3), ("busy", -signal.SIGKILL), ("honest", -signal.SIGTERM),
])  # fmt: skip
def test_nothing_waits_for_requests_that_the_server_holds(make, mode, code):
    """The end of a paused server with a request took all of the grace, and looked like a crash."""
    server = make(mode, grace_s=600.0).start()
    server.send(b"stop now\n")
    assert server.last_event() == {"event": "exited", "code": code, "forced": False}
    server.assert_gone(0)
    assert not server.log.exists()


def block():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})


def ignore():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@pytest.mark.parametrize("before", [block, ignore, None])
def test_signals_that_the_trainer_blocks_ignores_or_handles(make, before):
    """The end of the server was forced after the grace, its exit code was 0; what Slurm sends stays without effect on it."""
    server = make("honest" if before is block else "exits").start(before)
    for process in (psutil.Process(server.supervisor.pid), *server.processes.values()):
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGUSR2)
    if before is block:
        server.send(b"stop\n")
        assert server.last_event() == {"event": "exited", "code": -signal.SIGTERM, "forced": False}
        return
    (server.folder / "exit").touch()
    assert server.next_event()["event"] == "started"
    died = server.next_event()
    assert (died["event"], [(each["name"], each["code"]) for each in died["processes"]]) == (
        "died",
        [("main process", 7)],
    )


# A supervisor that scans after new files alone, in place of one whose next scan comes after what a test waits for.
SCANS_SELDOM = """
import re, sys
sys.argv = sys.argv[1:]
with open(sys.argv[0]) as file:
    code, number = re.subn(r"^_SCAN_INTERVAL_S = .*", "_SCAN_INTERVAL_S = 6000.0", file.read(), flags=re.MULTILINE)
assert number == 1
exec(compile(code, sys.argv[0], "exec"))
"""


def recorded(server):
    """What the supervisor knew at its last scan."""
    return json.loads(server.record.read_text()) if server.record.exists() else {"processes": [], "files": []}


def watched_by(supervisor):
    """The pids of the processes whose ends a supervisor is waiting for."""
    found = set()
    for info in Path(f"/proc/{supervisor.pid}/fdinfo").iterdir():
        try:
            lines = info.read_text().splitlines()
        except OSError:  # closed meanwhile
            continue
        found |= {int(line.split()[1]) for line in lines if line.startswith("Pid:")}
    return found


def test_a_process_that_ends_soon_after_it_has_its_title_is_noticed_while_the_server_starts(make, tmp_path):
    server = make("fails", supervisor=("-c", SCANS_SELDOM, str(SUPERVISOR))).start()
    pids = {process.pid for process in server.processes.values()}
    until(lambda: pids <= {entry["pid"] for entry in recorded(server)["processes"]}, "a scan is over")
    worker = server.processes["worker"].pid
    assert worker not in watched_by(server.supervisor)
    (tmp_path / "fail").touch()
    until(lambda: worker in watched_by(server.supervisor), "the supervisor has seen the title, without a scan")
    assert supervisor._LOOK_FOR_TITLES_S < 0.5, "soon enough for a process that lives for a second with it"
    with open(tmp_path / "end", "w"):
        pass
    assert server.next_event()["event"] == "started"
    [died] = server.next_event()["processes"]
    assert died["name"] == "sglang::detokenizer" and died["pid"] == worker
    server.send(b"stop\n")
    assert server.next_event()["event"] == "exited"


def test_a_file_of_a_process_that_does_not_live_long_is_removed(make, tmp_path):
    server = make("brief", supervisor=("-c", SCANS_SELDOM, str(SUPERVISOR))).start()
    orphan = server.processes["orphan"]
    path = Path(f"/dev/shm/sglang_loads_test_brief_{orphan.pid}.shm")
    server.shm.append(path)
    (tmp_path / "make").touch()
    # For who comes after a supervisor that is killed; and it must know of the file while the process maps it.
    until(lambda: path.name in recorded(server)["files"], "the supervisor has scanned for the new file")
    assert supervisor._SCAN_AFTER_FILE_S < 0.5, "soon enough for a process that lives for a second with it"
    (tmp_path / "end").touch()
    until(lambda: not alive(orphan), "the process has ended")  # a zombie until the supervisor ends
    assert path.exists()
    server.supervisor.stdin.write(b"stop\n")
    server.supervisor.stdin.flush()
    server.last_event()
    assert not path.exists()


def test_a_closed_pipe_ends_the_server(make):
    server = make().start()
    server.supervisor.stdin.close()
    server.supervisor.stdin = None
    assert server.last_event()["code"] == -signal.SIGTERM
    server.assert_gone(0)


def test_an_exit_of_the_server_is_reported_at_once_and_the_files_stay_until_the_trainer_has_seen_them(make, tmp_path):
    server = make("exits").start()
    assert server.next_event()["event"] == "started"
    (tmp_path / "exit").touch()
    pid = server.processes["server"].pid
    died = server.next_event()
    assert died["event"] == "died" and died["processes"][0] == {"name": "main process", "pid": pid, "code": 7}
    assert server.next_event() == {"event": "exited", "code": 7, "forced": False}
    assert not any(map(alive, server.processes.values())) and not any(path.exists() for path in server.shm)
    assert server.record.exists()
    assert f"[tpcolocate] main process (pid {pid}) exited with code 7 [launch " in server.log.read_text()
    server.send(b"stop\n")
    server.supervisor.wait(SOON_S)
    server.assert_gone(0)
    assert server.log.exists(), "the log of a crash stays"


OTHER_KERNEL = """
import builtins, io, os, runpy, sys
{how}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
HOW = {
    "refused": "def refuse(*args): raise PermissionError('seccomp')\nos.pidfd_open = refuse",
    "missing": "del os.pidfd_open",
    "kills": """
counts, read = iter(range(9)), open
builtins.open = lambda path, *more, **options: (
    io.BytesIO(b"oom_kill %d" % next(counts)) if path == "/proc/vmstat" else read(path, *more, **options)
)
""",
}


@pytest.mark.parametrize("pidfd", ["there", "refused", "missing", "kills"])
def test_a_killed_process_of_sglangs_is_named_and_ends_the_server(make, pidfd):
    other = ("-c", OTHER_KERNEL.format(how=HOW.get(pidfd)), str(SUPERVISOR))
    server = make(supervisor=(str(SUPERVISOR),) if pidfd == "there" else other).start()
    lacked_memory = pidfd == "kills"  # by the kernel's count
    assert server.next_event()["event"] == "started"
    worker = server.processes["worker"]
    listed = lambda: json.loads(server.record.read_text())["processes"]  # noqa: E731
    until(lambda: any(p["name"] == "sglang::detokenizer" for p in listed()), "the supervisor knows the process")
    worker.kill()
    began = time.monotonic()
    assert server.next_event() == {
        "event": "died", "processes": [{"name": "sglang::detokenizer", "pid": worker.pid, "code": -signal.SIGKILL}],
        "lacked_memory": lacked_memory,
    }  # fmt: skip
    assert time.monotonic() - began < SOON_S
    assert server.next_event()["event"] == "exited"
    why = f"; {supervisor.LACKED_MEMORY}" if lacked_memory else ""
    verdict = f"[tpcolocate] sglang::detokenizer (pid {worker.pid}) was killed by SIGKILL{why} [launch "
    assert verdict in server.log.read_text()
    server.send(b"stop\n")
    server.supervisor.wait(SOON_S)
    server.assert_gone(0)


def test_what_a_process_of_sglangs_forks_may_exit(make):
    server = make("forks").start()
    assert server.next_event()["event"] == "started"

    def schedulers():
        processes = json.loads(server.record.read_text())["processes"]
        return {p["pid"] for p in processes if p["name"] == "sglang::scheduler_TP1"}

    until(lambda: len(schedulers()) == 3, "the supervisor has seen the forks, with the title of their parent")
    worker = server.processes["worker"]
    for fifo in "ab":
        with open(server.folder / fifo, "w"):
            pass
    until(lambda: schedulers() == {worker.pid}, "the supervisor has seen that they have exited")
    worker.kill()
    death = {"name": "sglang::scheduler_TP1", "pid": worker.pid, "code": -signal.SIGKILL}
    assert server.next_event() == {"event": "died", "processes": [death], "lacked_memory": False}
    assert server.next_event()["event"] == "exited"
    server.send(b"stop\n")
    server.supervisor.wait(SOON_S)
    server.assert_gone(0)


@pytest.mark.parametrize("pidfd", ["refused", "missing"])
@pytest.mark.parametrize("end", ["stop", "owner"])
def test_without_pidfds_the_server_ends_with_the_owner_or_when_asked_to(make, pidfd, end):
    server = make(supervisor=("-c", OTHER_KERNEL.format(how=HOW[pidfd]), str(SUPERVISOR)))
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        server.start(owner_pid=owner.pid, owner_started=start_of(owner.pid))
        if end == "stop":
            server.send(b"stop\n")
        else:
            owner.kill()
        assert server.last_event() == {"event": "exited", "code": -signal.SIGTERM, "forced": False}
        server.assert_gone(0)
    finally:
        owner.kill()
        owner.communicate()


@pytest.mark.parametrize("command, log_stays", [(b"stop\n", False), (b"stop keep\n", True), (b"", False)])
def test_the_log_goes_with_an_end_that_the_trainer_wanted(make, command, log_stays):
    server = make().start()
    server.supervisor.stdin.write(command)
    server.supervisor.stdin.close()
    server.supervisor.stdin = None
    server.last_event()
    server.assert_gone(0)
    assert server.log.exists() == log_stays


def test_the_log_of_a_killed_owners_server_goes_too(make):
    server = make()
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    server.start(owner_pid=owner.pid, owner_started=start_of(owner.pid))
    owner.kill()
    owner.communicate()
    server.last_event()
    server.assert_gone(0)
    assert not server.logs.exists()


def test_torchs_counts_of_handles_go_with_a_killed_trainer(make):
    """Of one that lives they stay, as does a file of that name which the trainer does not map."""
    with ExitStack() as stack:
        owner, client, other = (
            stack.enter_context(
                subprocess.Popen([sys.executable, "-c", TRAINER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            for _ in range(3)
        )
        for trainer in (owner, client, other):
            stack.callback(trainer.kill)
            trainer.stdout.readline()
        files = {name: [Path(f"/dev/shm/torch_{t.pid}_{n}_0") for n in (1, 2)] for name, t in
                 {"owner": owner, "client": client, "other": other}.items()}  # fmt: skip
        for path in itertools.chain(*files.values()):
            stack.callback(path.unlink, missing_ok=True)
        trainers = [(trainer.pid, start_of(trainer.pid)) for trainer in (owner, client)]
        server = make()
        server.start(owner_pid=owner.pid, owner_started=start_of(owner.pid), trainers=trainers)
        names = {entry["file"] for entry in json.loads(server.record.read_text())["handle_counts"]}
        assert names == {files["owner"][0].name, files["client"][0].name}
        owner.kill()
        server.assert_gone()
        until(lambda: not files["owner"][0].exists(), "the owner's file is gone")
        left = [path for path in itertools.chain(*files.values()) if path.exists()]
        assert left == [files["owner"][1], *files["client"], *files["other"]]
        client.kill()
        server.last_event()
        left = [path for path in itertools.chain(*files.values()) if path.exists()]
        assert left == [files["owner"][1], files["client"][1], *files["other"]]


def test_another_try_keeps_the_files(make, tmp_path):
    server = make("exits").start()
    (tmp_path / "exit").touch()
    server.send(b"retry\n")
    server.supervisor.wait(SOON_S)
    assert server.unlinked.exists() and server.log.exists()


def test_a_server_that_was_shut_down_has_no_log_once_its_folder_is_gone(make, tmp_path):
    """Requests in flight look for the folder, and name the log in their error if it is there."""
    server = make("exits").start()
    for number in range(3000):  # to remove them takes longer than to look
        (server.logs / str(number)).touch()
    (tmp_path / "exit").touch()
    server.send(b"stop\n")
    until(lambda: not server.unlinked.exists(), "the runtime folder is gone")
    assert not server.logs.exists()
    server.supervisor.wait(SOON_S)


def test_sigterm_to_the_supervisor_does_not_end_the_server_of_a_live_trainer(make):
    """Slurm and timeout send it to all processes of a job, and the trainer may want to finish its step."""
    server = make().start()
    for _ in range(3):
        server.supervisor.terminate()
        time.sleep(0.1)
    assert server.supervisor.poll() is None and alive(server.processes["server"])
    server.send(b"stop\n")
    assert server.last_event() == {"event": "exited", "code": -signal.SIGTERM, "forced": False}
    server.assert_gone(0)


def test_the_supervisor_of_a_trainer_that_sigterm_ended_ends_the_server(make):
    server = make()
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    server.start(owner_pid=owner.pid, owner_started=start_of(owner.pid))
    server.supervisor.terminate()
    owner.terminate()
    owner.communicate()
    server.last_event()
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
    server.supervisor = subprocess.Popen(
        [sys.executable, "-P", str(SUPERVISOR)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    server.send(json.dumps(server.job | {"owner_pid": pid, "owner_started": started - 1}).encode() + b"\n")
    first, last = (json.loads(line) for line in server.supervisor.stdout)
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
    assert event["event"] == "failed" and "/no/such/program" in event["error"]


def test_a_log_that_cannot_be_opened_is_reported(make, tmp_path):
    server = make()
    pid, started = this_process()
    done = subprocess.run(
        [sys.executable, "-P", str(SUPERVISOR)],
        input=json.dumps(server.job | {"log_path": str(tmp_path), "owner_pid": pid, "owner_started": started}) + "\n",
        capture_output=True, text=True, timeout=SOON_S, check=False,
    )  # fmt: skip
    event = json.loads(done.stdout)
    assert event["event"] == "failed" and "Is a directory" in event["error"] and str(tmp_path) in event["error"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_log_of_another_user_is_not_written_to(tmp_path):
    (tmp_path / "log").touch()
    os.chown(tmp_path / "log", 65534, -1)
    with pytest.raises(PermissionError, match="belongs to user id 65534"):
        supervisor.Log(str(tmp_path / "log"), [])


def test_a_full_disk_costs_the_log_and_not_the_server(make):
    server = make().start(log_path="/dev/full")
    server.send(b"stop\n")
    assert server.last_event()["code"] == -signal.SIGTERM
    server.assert_gone(0)


@pytest.mark.parametrize("text", [
    b"api_key='0123456789abcdef', x", b"0123456789abcdef", b"0120123456789abcdef0123456789abcdef\n", b"no key 0123\n",
])  # fmt: skip
def test_the_key_is_never_in_the_log_wherever_the_output_is_cut(tmp_path, text):
    for cut in range(len(text) + 1):
        for second in range(cut, len(text) + 1):
            path = tmp_path / f"{cut}-{second}"
            log = supervisor.Log(str(path), ["0123456789abcdef"])
            read_end, write_end = os.pipe()
            log.write(text[:cut])
            log.write(text[cut:second])
            os.write(write_end, text[second:])
            os.close(write_end)
            log.copy_from(read_end)
            log.close(timeout_s=SOON_S)
            os.close(read_end)
            assert path.read_bytes() == text.replace(b"0123456789abcdef", b"***")


def test_a_key_that_is_cut_off_by_the_end_is_hidden(tmp_path):
    log = supervisor.Log(str(tmp_path / "log"), ["0123456789abcdef"])
    read_end, write_end = os.pipe()
    os.write(write_end, b"api_key=0123456789abcde")
    os.close(write_end)
    log.copy_from(read_end)
    log.close(timeout_s=SOON_S)
    os.close(read_end)
    assert (tmp_path / "log").read_bytes() == b"api_key=***"


def test_only_files_of_this_launch_and_this_user_are_removed(tmp_path):
    for name in ("nonce1-mine", "another", "nonce1-link"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "nonce1-to-another").symlink_to(tmp_path / "another")
    for name in ("nonce1-mine", "another", "nonce1-to-another"):
        supervisor.remove(str(tmp_path / name), "nonce1-")
    assert not (tmp_path / "nonce1-mine").exists() and (tmp_path / "another" / "file").exists()
    if os.getuid() == 0:
        os.chown(tmp_path / "nonce1-link", 65534, -1)
        supervisor.remove(str(tmp_path / "nonce1-link"), "nonce1-")
        assert (tmp_path / "nonce1-link" / "file").exists()


def test_its_reports_do_not_depend_on_the_encoding_of_text(make):
    server = make()
    server.environ = {**os.environ, "PYTHONIOENCODING": "utf-16"}
    server.start()
    server.send(b"stop\n")
    assert server.last_event()["event"] == "exited"
    server.assert_gone(0)


def test_the_log_is_readable_by_its_user_alone(make):
    server = make().start()
    assert stat.S_IMODE(server.log.stat().st_mode) == 0o600
    until(lambda: server.log.read_text() == "a line in the log, with the key ***\n", "the line is in the log")


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


def test_what_another_container_has_named_by_the_same_pid_is_kept(make):
    """Containers that share /dev/shm have pids of their own.  And what cannot be removed must not end the supervisor."""
    server = make().start()
    pid = server.processes["server"].pid
    older, folder = Path(f"/dev/shm/sgl_shm_mq_{pid}_older"), Path(f"/dev/shm/sgl_shm_mq_{pid}_folder")
    older.touch()
    os.utime(older, times=(time.time() - 60,) * 2)
    folder.mkdir()
    try:
        server.send(b"stop\n")
        assert server.last_event()["event"] == "exited"
        server.assert_gone(0)
        assert older.exists()
    finally:
        older.unlink(missing_ok=True)
        folder.rmdir()


def test_only_files_that_a_server_may_leave_are_noticed(monkeypatch, tmp_path):
    """Data loaders of the trainer make files all the time, and each scan looks at every process of the machine."""
    # In place of /dev/shm, where the processes of other tests make such files at any moment.
    monkeypatch.setattr(supervisor, "_SHM", f"{tmp_path}/")
    files = supervisor.NewFiles()
    try:
        for name, is_seen in {"torch_1_2": False, "sglang_loads_1": True, "psm_1": False, "sgl_shm_1": True}.items():
            (tmp_path / name).touch()
            assert files.seen() == is_seen, name
        for kind in ("mp", "loky"):
            os.link(tmp_path / "torch_1_2", tmp_path / f"sem.{kind}-1")  # as sem_open() gives a semaphore its name
            assert files.seen() and not files.seen()
    finally:
        for fd in files.fds:
            os.close(fd)


def test_names_that_are_no_text_or_no_number_do_not_end_the_supervisor(tmp_path):
    """What the server maps, such as a model's folder, may have any name; and any user can make files in /dev/shm."""
    folder = os.fsencode(tmp_path) + b"/mod\xe8le"
    with open(folder, "w+b") as file:
        file.truncate(4096)
        mapped = mmap.mmap(file.fileno(), 4096)
    strange = Path(f"/dev/shm/sgl_shm_test{os.getpid()}_\N{SUPERSCRIPT TWO}_x")
    try:
        strange.touch()
        assert supervisor.shm_files([os.getpid()], 0.0) == set()
    finally:
        strange.unlink(missing_ok=True)
        mapped.close()
