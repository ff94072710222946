"""Ports and the server process; the server itself is replaced by a script."""

import errno
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from tpcolocate import launch, launch_request
from tpcolocate.errors import (
    ConfigError,
    DeadlineError,
    EngineDeadError,
    EngineError,
    LaunchError,
    RankFailedError,
    RankLostError,
)
from tpcolocate.parallel import in_background
from tpcolocate.processes import is_stopped, start_of, this_process
from tpcolocate.runtime_folder import RuntimeFolder, read_processes
from tpcolocate.server import evidence, process
from tpcolocate.server.lifecycle import Lifecycle, State, WeightsState
from tpcolocate.server.process import ServerProcess, ServerSpec, check_host, hold_port

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

# --- ports ----------------------------------------------------------------------------------------------------------


def test_a_reserved_port_is_available_to_the_server_alone():
    with hold_port() as reserved:
        port = reserved.getsockname()[1]
        given = []
        for host in ("127.0.0.1", "0.0.0.0"):
            for _ in range(100):
                for reuse in (0, 1):
                    other = socket.socket()
                    given.append(other)
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
                    other.bind((host, 0))
        assert port not in {other.getsockname()[1] for other in given}
        for other in given:
            other.close()
        with socket.socket() as plain, pytest.raises(OSError) as caught:
            plain.bind(("127.0.0.1", port))
        assert caught.value.errno == errno.EADDRINUSE
        # uvicorn and torch's stores bind like this.
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            server.listen()
            with socket.create_connection(("127.0.0.1", port), timeout=30):
                pass
            with pytest.raises(ConfigError, match=f"port {port} is taken"):
                hold_port(port)


def test_two_ports_differ():
    with hold_port() as one, hold_port() as two:
        assert one.getsockname()[1] != two.getsockname()[1]


# --- life -----------------------------------------------------------------------------------------------------------

SERVE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"{}")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
CLASH = "print('ERROR: [Errno 98] error while attempting to bind: address already in use'); raise SystemExit(3)"


@pytest.fixture
def stand_in(monkeypatch, tmp_path, no_leftovers):
    """Replace SGLang's command by one script per try; return a function that starts them, and SGLang's commands."""
    commands, runtimes = [], []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def start(*scripts, health_timeout_s=60.0, log_path=None, shows_start=True, **arguments):
        tries = iter(scripts)
        spawn = ServerProcess._spawn

        def spawn_instead(self, command):
            commands.append(command)
            ports = [command[command.index(flag) + 1] for flag in ("--port", "--nccl-port")]
            spawn(self, [sys.executable, "-c", next(tries), *ports, self.api_key])

        monkeypatch.setattr(ServerProcess, "_spawn", spawn_instead)
        pid, started = this_process()
        runtime = RuntimeFolder.make(f"{pid}-{secrets.token_hex(8)}", log_path=log_path)
        runtimes.append(runtime)
        spec = ServerSpec(
            "model",
            arguments,
            dict(os.environ),
            runtime,
            pid,
            started,
            grace_s=3.0,
            shows_start=shows_start,
            working_directory=str(tmp_path),
        )
        return ServerProcess.start(spec, health_timeout_s=health_timeout_s)

    yield start, commands
    for runtime in runtimes:
        assert not runtime.shared.exists()
        shutil.rmtree(runtime.temporary, ignore_errors=True)


def ports_of(command):
    return [command[command.index(flag) + 1] for flag in ("--port", "--nccl-port")]


def test_the_server_starts_answers_and_stops(stand_in):
    start, commands = stand_in
    server = start(SERVE)
    assert server.url == f"http://127.0.0.1:{ports_of(commands[0])[0]}"
    assert server.client.get("/model_info", timeout_s=5.0) == {}
    ends = time.monotonic() + 20.0
    while server.pid is None and time.monotonic() < ends:  # the supervisor reports it while the server starts
        time.sleep(0.01)
    assert not server.exited() and server.pid is not None
    assert os.readlink(f"/proc/{server.pid}/cwd") == server.spec.working_directory != os.getcwd()
    server.stop()
    assert server.exited() and server.exit_code is not None
    server.stop()
    assert not server.spec.runtime.temporary.exists(), "with the log, because this library ended the server"


@pytest.mark.parametrize("shows_start", [True, False])
def test_one_server_of_a_job_shows_its_start_on_a_terminal(stand_in, monkeypatch, tmp_path, shows_start):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

        def write(self, text):
            if "Loading weights" in text:
                seen.touch()
            return super().write(text)

    start, _ = stand_in
    terminal, seen = Terminal(), tmp_path / "seen"
    monkeypatch.setattr(sys, "stderr", terminal)
    loading = (
        "import os, time; print('Loading weights', flush=True); ends = time.monotonic() + "
        f"{30.0 if shows_start else 1.5}\n"
        f"while not os.path.exists({str(seen)!r}) and time.monotonic() < ends: time.sleep(0.01)\n"
    )
    start(loading + SERVE, shows_start=shows_start).stop()
    shown = re.search(r"Starting SGLang \[\d\d:\d\d, Loading weights", terminal.getvalue())
    assert (shown is not None) is shows_start, terminal.getvalue()


def test_the_key_is_in_a_private_file_and_not_on_the_command_line(stand_in, monkeypatch):
    start, commands = stand_in
    seen = []
    wait_healthy = ServerProcess._wait_healthy

    def inspect(self, *args):
        config = Path(commands[0][commands[0].index("--config") + 1])
        seen.append((config, config.stat().st_mode & 0o777, json.loads(config.read_text()), self.api_key))
        return wait_healthy(self, *args)

    monkeypatch.setattr(ServerProcess, "_wait_healthy", inspect)
    start(SERVE).stop()
    [(config, mode, content, key)] = seen
    assert mode == 0o600 and content == {"api-key": key, "admin-api-key": key} and len(key) > 30
    assert not any(key in word for word in commands[0])
    assert not config.exists(), "removed once it was read"


def test_no_key_looks_like_an_option():
    """SGLang turns its config file into command-line arguments; one base64 key in 64 begins with a dash."""
    unused = Path("unused")
    spec = ServerSpec("model", {}, {}, RuntimeFolder("0", unused, unused, unused), *this_process())
    keys = {ServerProcess(spec).api_key for _ in range(500)}
    assert len(keys) == 500
    assert all(key.isalnum() and len(key) == 64 for key in keys)


def test_after_a_port_clash_the_server_is_restarted_on_other_ports(stand_in, caplog):
    start, commands = stand_in
    server = start(CLASH, SERVE)
    server.stop()
    first, second = map(ports_of, commands)
    assert len(commands) == 2 and not set(first) & set(second)
    assert "try 2 of 3" in caplog.text


def test_the_number_of_tries_is_limited(stand_in):
    start, commands = stand_in
    with pytest.raises(LaunchError, match="exited with code 3"):
        start(CLASH, CLASH, CLASH, SERVE)
    assert len(commands) == 3


def test_a_port_that_the_user_chose_is_tried_once(stand_in):
    start, commands = stand_in
    with hold_port() as free:
        port = free.getsockname()[1]
    with pytest.raises(LaunchError, match="exited with code 3"):
        start(CLASH, SERVE, port=port)
    assert [ports_of(command)[0] for command in commands] == [str(port)]


def test_another_failure_after_a_clash_is_not_a_clash(stand_in):
    """All tries append to one log."""
    start, commands = stand_in
    with pytest.raises(LaunchError, match="exited with code 1 .*: ValueError: no such model") as caught:
        start(CLASH, "raise ValueError('no such model')", SERVE)
    assert len(commands) == 2
    assert "address already in use" not in caught.value.details


def test_a_clash_far_above_the_end_of_the_log_is_found(stand_in):
    start, commands = stand_in
    start("print('EADDRINUSE'); print('shutting down\\n' * 100); raise SystemExit(1)", SERVE).stop()
    assert len(commands) == 2


def test_an_early_exit_is_an_error_with_the_reason_and_without_the_key(stand_in):
    start, _ = stand_in
    with pytest.raises(LaunchError) as caught:
        start("import sys; print('args: api_key=' + sys.argv[3]); raise RuntimeError('no GPU')")
    error = caught.value
    assert "exited with code 1 while it started: RuntimeError: no GPU" in error.message
    assert "args: api_key=***\n" in error.details


def test_a_server_that_never_answers_is_stopped_at_the_deadline(stand_in, monkeypatch):
    start, _ = stand_in
    wait_healthy = ServerProcess._wait_healthy

    def once_it_runs(self, *args):
        while not self.log_tail().endswith("loading"):
            time.sleep(0.01)
        wait_healthy(self, *args)

    monkeypatch.setattr(ServerProcess, "_wait_healthy", once_it_runs)
    with pytest.raises(DeadlineError, match="not become healthy within 0.8 s") as caught:
        start("print('loading', flush=True); import time; time.sleep(600)", health_timeout_s=0.8)
    assert caught.value.details.endswith("\nloading")


SLOW = "import os, time\n" + SERVE.replace(
    "self.send_response(200)",
    "self.path == '/health' and (open('asked', 'w').close(), time.sleep(600)); self.send_response(200)",
)


@pytest.mark.slow
@pytest.mark.parametrize("leaves", [False, True])
def test_a_first_token_that_takes_long_is_not_waited_for_beyond_the_deadline_or_a_client_that_has_left(
    stand_in, monkeypatch, tmp_path, leaves
):
    start, _ = stand_in
    looks = []

    def look(line, elapsed_s):
        looks.append((tmp_path / "asked").exists())
        if leaves and looks[-1]:
            raise RankLostError("rank 1 has exited")

    started, begin = time.monotonic(), ServerProcess.start
    monkeypatch.setattr(ServerProcess, "start", lambda *args, **kwargs: begin(*args, heartbeat=look, **kwargs))
    with pytest.raises(RankLostError if leaves else DeadlineError):
        start(SLOW, health_timeout_s=100.0 if leaves else 6.0)
    assert time.monotonic() - started < 60 and looks[-1], "it looks on while the first token is awaited"


def test_a_server_that_does_not_end_does_not_hide_why_it_did_not_start(stand_in, monkeypatch):
    start, commands = stand_in
    end = process._Supervision.end

    def unconfirmed(self, command, *, timeout_s):
        end(self, command, timeout_s=timeout_s)
        raise EngineError("the supervisor was killed")

    monkeypatch.setattr(process._Supervision, "end", unconfirmed)
    with pytest.raises(LaunchError, match="exited with code 3") as caught:
        start(CLASH, SERVE)
    assert caught.value.__notes__ == ["(the server that was started: the supervisor was killed)"]
    assert len(commands) == 1, "nothing is started beside what may still run"


def test_threads_that_look_at_once_lose_no_report_of_a_death():
    class Slow(bytes):
        """What is left of the last report; another thread comes while it is looked at."""

        def split(self, *args):
            looked_at.set()
            read.wait(0.5)
            return super().split(*args)

    class Reports:
        closed, chunks = (
            False,
            [None, b'{"event": "died", "lacked_memory": false, "processes": [{"name": "scheduler"}]}\n', None],
        )

        def read(self, size):
            chunk = self.chunks.pop(0) if self.chunks else None
            if not self.chunks and not read.is_set():
                read.set()
                time.sleep(0.1)  # in which the first thread goes on
            return chunk

    looked_at, read = threading.Event(), threading.Event()
    supervision = process._Supervision.__new__(process._Supervision)
    supervision._lock, supervision._reports, supervision._rest = threading.RLock(), Reports(), Slow()
    supervision.deaths, supervision.exit = [], None
    first = in_background(supervision._read, name="test")
    assert looked_at.wait(30)
    supervision._read()
    first.result(30)
    assert supervision.deaths == [{"name": "scheduler"}]


def test_the_tail_of_a_log_is_its_last_lines(tmp_path):
    pid, started = this_process()
    server = ServerProcess(ServerSpec("model", {}, {}, RuntimeFolder("0", *[tmp_path / "log"] * 3), pid, started))
    assert server.log_tail() == "(no log)" and server.last_line() == "no output yet"
    server.spec.log_path.touch()
    assert server.last_line() == "no output yet"
    server.spec.log_path.write_text("".join(f"{i}\n" for i in range(100)))
    assert server.log_tail().splitlines()[1:] == [str(i) for i in range(60, 100)]
    assert server.last_line() == "99"


# --- ends ------------------------------------------------------------------------------------------------------------

# Like SGLang: a process whose title names its role, and the arguments with the key on the output.
SERVE_WITH_CHILD = (
    """
import os, sys
print("server_args={'api_key': '" + sys.argv[3] + "'}", flush=True)
if os.fork() == 0:
    os.execv("/bin/sleep", ["sglang::detokenizer", "600"])
"""
    + SERVE
)


def processes_of(server, name):
    listed = []
    while not listed:
        listed = [p for p in read_processes(server.spec.runtime.processes) if p["name"] == name]
        time.sleep(0.02)
    return listed


@pytest.mark.slow
def test_the_error_after_a_killed_process_names_it_and_the_log_outlives_the_shutdown(stand_in):
    """Leaving the `with` after the error must not remove the evidence."""
    start, _ = stand_in
    server = start(SERVE_WITH_CHILD)
    [child] = processes_of(server, "sglang::detokenizer")
    assert server.client.get("/model_info", timeout_s=5.0) == {}
    os.kill(child["pid"], signal.SIGKILL)
    began = time.monotonic()
    while not server.exited():
        time.sleep(0.01)
    assert time.monotonic() - began < 40
    with pytest.raises(EngineDeadError) as caught:
        while True:  # until its end has begun
            server.client.get("/x", timeout_s=5.0)
    assert f"sglang::detokenizer (pid {child['pid']}) was killed by SIGKILL" in caught.value.message
    assert str(server.spec.log_path) in caught.value.hint
    server.stop()
    assert server.exited()
    log = server.spec.log_path.read_text()
    assert f"[tpcolocate] sglang::detokenizer (pid {child['pid']}) was killed by SIGKILL" in log
    assert os.listdir(server.spec.runtime.temporary) == ["server.log"]


def found_in_a_fork(server):
    """Whether a forked process finds the server dead, and what it finds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = server.evidence()
            os.write(writing, json.dumps([server.exited(), found.is_dead, found.cause]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        found = json.loads(answer.read())
    os.waitpid(child, 0)
    return found


@pytest.mark.slow
def test_a_fork_of_the_trainer_takes_no_server_for_dead_and_no_report_from_the_trainer(stand_in, monkeypatch):
    """As a data loader's worker that generates: the supervisor is no child of it, and the pipe is the trainer's."""
    monkeypatch.setattr(evidence, "_NOTICED_WITHIN_S", 0.2)
    start, _ = stand_in
    server = start(SERVE_WITH_CHILD)
    assert found_in_a_fork(server) == [False, False, None]
    [child] = processes_of(server, "sglang::detokenizer")
    os.kill(child["pid"], signal.SIGKILL)
    ends = time.monotonic() + 20.0
    while not (found := found_in_a_fork(server))[0] and time.monotonic() < ends:
        pass
    killed = f"sglang::detokenizer (pid {child['pid']}) was killed by SIGKILL"
    assert found == [True, True, killed]
    assert server.evidence().cause == killed, "the trainer has the report"
    server.stop()


def test_a_stopped_process_is_named_by_a_request_that_is_too_slow(stand_in):
    start, _ = stand_in
    server = start(SERVE_WITH_CHILD)
    [main] = processes_of(server, "main process")
    os.kill(main["pid"], signal.SIGSTOP)
    while not is_stopped(main["pid"]):
        time.sleep(0.01)
    try:
        with pytest.raises(DeadlineError, match=rf"main process \(pid {main['pid']}\) is stopped"):
            server.client.get("/x", timeout_s=0.5)
        assert not server.exited()
    finally:
        os.kill(main["pid"], signal.SIGCONT)
    server.stop()
    assert server.spec.log_path.exists(), "the log of a server in trouble stays"


def test_a_stopped_supervisor_goes_on_for_the_stop(stand_in):
    start, _ = stand_in
    server = start(SERVE)
    os.kill(server._supervision._process.pid, signal.SIGSTOP)
    server.stop()
    assert server.exited() and server.exit_code is not None
    assert not server.spec.runtime.temporary.exists()


@pytest.mark.parametrize("mode", [None, 0o644])
def test_no_log_has_the_key(stand_in, tmp_path, mode):
    start, _ = stand_in
    path = tmp_path / "theirs.log" if mode else None
    if path is not None:
        path.touch(mode)
        path.write_text("an earlier line\n")
    server = start(SERVE_WITH_CHILD, log_path=path)
    ends = time.monotonic() + 20.0
    while "'}\n" not in (log := server.spec.log_path.read_text()):
        assert time.monotonic() < ends, log  # the supervisor copies what the server has printed
        time.sleep(0.01)
    assert "server_args={'api_key': '***'}" in log and server.api_key not in log
    assert not log.startswith("an earlier line") or path is not None
    server.stop()
    assert path is None or path.exists(), "a log that the user named is the user's"


@pytest.mark.slow
def test_a_trainer_that_is_killed_while_the_server_starts_leaves_nothing(tmp_path, no_leftovers):
    code = (
        "import os, sys, secrets\n"
        "from tpcolocate.processes import this_process\n"
        "from tpcolocate.runtime_folder import RuntimeFolder\n"
        "from tpcolocate.server.process import ServerProcess, ServerSpec\n"
        "spawn = ServerProcess._spawn\n"
        "def instead(self, command):\n"
        "    spawn(self, [sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(600)'])\n"
        "    while '1' not in self.last_line(): pass\n"
        "    print('ready', flush=True)\n"
        "ServerProcess._spawn = instead\n"
        "pid, started = this_process()\n"
        "runtime = RuntimeFolder.make(f'{pid}-{secrets.token_hex(8)}')\n"
        "print(runtime.shared, flush=True)\n"
        "ServerProcess.start(ServerSpec('m', {}, dict(os.environ), runtime, pid, started), health_timeout_s=100)\n"
    )
    for sent in (signal.SIGTERM, signal.SIGKILL):
        trainer = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
        )
        shared = Path(trainer.stdout.readline().strip())
        assert trainer.stdout.readline() == "ready\n" and (shared / "server.yaml").exists()
        trainer.send_signal(sent)
        trainer.communicate()
        deadline = time.monotonic() + 60
        while (shared.exists() or os.listdir(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not shared.exists() and os.listdir(tmp_path) == []


def test_a_log_that_cannot_be_opened_is_an_error_that_names_it(stand_in, tmp_path):
    start, _ = stand_in
    path = tmp_path / "server.log"
    path.symlink_to("/nowhere/server.log")
    with pytest.raises(LaunchError, match="could not be started: FileNotFoundError") as caught:
        start(SERVE, log_path=path)
    assert str(path) in caught.value.message and "log_path=" in caught.value.hint


def test_a_supervisor_that_cannot_run_is_an_error_with_its_own_words(stand_in, monkeypatch, tmp_path):
    start, _ = stand_in
    (tmp_path / "broken.py").write_text("raise RuntimeError('no psutil here')")
    monkeypatch.setattr(process, "_SUPERVISOR", tmp_path / "broken.py")
    with pytest.raises(LaunchError, match="supervisor exited with code 1: RuntimeError: no psutil here"):
        start(SERVE)


def cmdline_of(child):
    try:
        return child.cmdline()
    except psutil.ZombieProcess:  # of another test, which its process has not waited for
        return []


def test_a_supervisor_that_does_not_read_is_not_waited_for(stand_in, monkeypatch, tmp_path):
    """As one that is stopped; what it is sent has the environment in it."""
    start, _ = stand_in
    server = start(SERVE)
    (tmp_path / "stopped.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(process, "_SUPERVISOR", tmp_path / "stopped.py")
    started = in_background(lambda: process._Supervision(server.spec, {"env": "x" * 500_000}), name="start")
    try:
        supervision = started.result(20.0)
    finally:
        [child] = [one for one in psutil.Process().children() if "stopped.py" in " ".join(cmdline_of(one))]
        child.kill()
        server.stop()
    supervision.end(b"stop", timeout_s=5.0)


@pytest.mark.parametrize("code, words", [(errno.EMFILE, "ulimit -n"), (errno.ENOSPC, "make space")])
def test_a_machine_that_lacks_something_is_an_error_with_what_to_do(stand_in, monkeypatch, code, words):
    start, _ = stand_in

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(process.subprocess, "Popen", fail)
    with pytest.raises(LaunchError, match=os.strerror(code)) as caught:
        start(SERVE)
    assert words in caught.value.hint


def test_a_trainer_without_standard_streams_starts_a_server(stand_in, monkeypatch):
    start, _ = stand_in
    monkeypatch.setattr(sys, "stderr", None)
    start(SERVE).stop()


def test_a_python_that_prints_as_it_starts_starts_a_server(stand_in, monkeypatch, tmp_path):
    start, _ = stand_in
    printed = "welcome to Python", "the rest of this line is"
    (tmp_path / "sitecustomize.py").write_text(f"print({printed[0]!r})\nprint({printed[1]!r}, end=' ', flush=True)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = start(SERVE)
    server.stop()
    assert server.pid is not None and server.exit_code is not None  # both were reported


def test_a_stop_that_was_interrupted_is_made_again(stand_in, monkeypatch):
    start, _ = stand_in
    server = start(SERVE)
    [main] = processes_of(server, "main process")
    end = process._Supervision.end

    def interrupted(self, command, *, timeout_s):
        monkeypatch.undo()
        self._send(command)
        self._commands.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(process._Supervision, "end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.stop()
    assert process._Supervision.end is end
    server.stop()
    assert start_of(main["pid"]) is None and not server.spec.runtime.temporary.exists()


CLOSED = """
import os, secrets, sys
for fd in (0, 1, 2):
    os.close(fd)
sys.stdin = sys.stdout = sys.stderr = None
from tpcolocate.parallel import in_background
from tpcolocate.processes import start_of, this_process
from tpcolocate.runtime_folder import RuntimeFolder
from tpcolocate.server.process import ServerProcess, ServerSpec
spawn = ServerProcess._spawn
def instead(self, command):
    ports = [command[command.index(flag) + 1] for flag in ("--port", "--nccl-port")]
    spawn(self, [sys.executable, "-c", sys.argv[2], *ports])
ServerProcess._spawn = instead
pid, started = this_process()
runtime = RuntimeFolder.make(f"{pid}-{secrets.token_hex(8)}")
server = ServerProcess.start(ServerSpec("m", {}, dict(os.environ), runtime, pid, started), health_timeout_s=100)
answer = server.client.get("/model_info", timeout_s=30)
server.stop()
with open(sys.argv[1], "w") as file:
    file.write(repr((answer, server.exited(), runtime.temporary.exists())))
"""


@pytest.mark.slow
def test_a_trainer_whose_standard_descriptors_are_closed_starts_a_server(tmp_path, no_leftovers):
    """The next files that it opens, such as the pipes to the supervisor, get the numbers 0 to 2."""
    subprocess.run([sys.executable, "-c", CLOSED, str(tmp_path / "answer"), SERVE], timeout=100, check=True)
    assert (tmp_path / "answer").read_text() == "({}, True, False)"


# --- hosts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host, reached", [
    ("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.2", "127.0.0.2"),
])  # fmt: skip
def test_the_address_at_which_a_server_is_reached(host, reached):
    assert check_host(host) == reached


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_the_address_of_an_ipv6_server_is_in_brackets():
    assert check_host("::1") == check_host("::") == "[::1]"


@pytest.mark.parametrize("host, words", [
    ("no.such.host.invalid", "does not resolve"),
    ("203.0.113.7", "on which this machine cannot listen"),
    ("1.2.3.4.5", "does not resolve"),
])  # fmt: skip
def test_a_host_that_is_not_this_machine_is_refused_before_anything_starts(host, words):
    with pytest.raises(ConfigError, match=words) as caught:
        check_host(host)
    assert repr(host) in caught.value.message


# --- reasons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail, reason", [
    ("Traceback\n  File x\nValueError: bad model", ": ValueError: bad model"),
    ("torch.OutOfMemoryError: CUDA out of memory.\nbye", ": torch.OutOfMemoryError: CUDA out of memory."),
    ("KeyError: 'a'\nRuntimeError: later", ": RuntimeError: later"),
    ("usage: x\nlaunch_server.py: error: unrecognized arguments: --x", ": launch_server.py: error: unrecognized arguments: --x"),
    ("[2026-01-01 00:00:00 TP0] Scheduler hit an exception: Traceback", ""),
    ("    raise ValueError", ""),
    ("all is well", ""),
    ("", ""),
])  # fmt: skip
def test_the_reason_is_the_last_line_that_names_an_error(tail, reason):
    assert process._reason(tail) == reason


@pytest.mark.parametrize("reason, words", [
    (": torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "lower mem_fraction_static"),
    (": RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", "raise mem_fraction_static"),
    (": ValueError: bad model", None),
    ("", None),
])  # fmt: skip
def test_a_server_that_lacks_memory_comes_with_the_argument_to_change(reason, words):
    advice = process._advice(reason)
    assert advice == "" if words is None else words in advice and advice.endswith("; ")


# --- the owner ------------------------------------------------------------------------------------------------------


class FailedGroup:
    """A group of live ranks whose collectives fail."""

    ranks, rank, timeout_s = (0, 1), 0, 0.1
    members = ()

    def __len__(self):
        return len(self.ranks)

    def error_of_left(self):
        return None

    expects_no_shared_error = False

    def expect_no_shared_error(self):
        self.expects_no_shared_error = True

    def all_gather(self, value, *, what, timeout_s=None, quiet_s=0.0):
        raise RankLostError("the connection was reset")


def test_a_rank_that_leaves_while_a_broken_group_is_made_anew_ends_the_launch_on_the_others(monkeypatch, tmp_path):
    group, left = FailedGroup(), RankFailedError("KeyboardInterrupt: ", rank=1)

    def make(*args, check, **kwargs):
        assert group.expects_no_shared_error, "so that an interrupt in here is made known to the others"
        check()
        group.error_of_left = lambda: left
        check()

    monkeypatch.setattr(launch, "make_group_over_file", make)
    tp_slice = launch.TpSlice(group, 0, torch.device("cpu"), (), False, f"test{os.getpid()}", 0)
    launched = launch.Launch(tp_slice, launch.LaunchRequest("model", {}, {}, "nonce", health_timeout_s=60.0))
    with pytest.raises(RankFailedError, match="KeyboardInterrupt"):
        launched.share(None, None)


def agree_with(other, monkeypatch, tmp_path, **ours):
    """Agree on a launch as rank 1, the owner, with a rank 0 that passes what `other` makes of this rank's request."""
    group = types.SimpleNamespace(
        ranks=(0, 1), rank=1, timeout_s=60.0, agree=lambda error, request, what: [other(request), request]
    )
    monkeypatch.setattr(launch.TpSlice, "tp_size", 2)
    monkeypatch.setattr(launch_request, "check_installed", lambda arguments, installed: None)
    monkeypatch.setattr(launch_request, "check_model_path", lambda path: None)
    monkeypatch.setattr(launch_request, "check_model_files", lambda path, arguments: None)
    tp_slice = launch.TpSlice(group, 1, torch.device("cpu"), (), False, "job", 0)
    given = {"env": {}, "server_args": {}, "health_timeout_s": 60.0, "closed": False, **ours}
    return launch_request.agree_on_launch(tp_slice, tmp_path, **given)


@pytest.mark.parametrize("of_other, words", [
    ({"restart": 2}, "restart=0 and restart=2"),
    ({"env": {"A": "1", "SECRET": "x"}}, "env with other values, or none, of SECRET$"),
    ({"env": {}}, "env with other values, or none, of A$"),
])  # fmt: skip
def test_different_launches_name_their_ranks_and_the_difference(monkeypatch, tmp_path, of_other, words):
    with pytest.raises(ConfigError) as caught:
        agree_with(lambda request: replace(request, **of_other), monkeypatch, tmp_path, env={"A": "1"})
    assert re.fullmatch(f"ranks 1 and 0 launch different servers: {words}", caught.value.message)


def test_a_folder_is_the_same_after_a_change_of_the_working_directory_and_a_hub_id_stays(monkeypatch, tmp_path):
    """A process that connects elsewhere looks for the model's limits in it."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, expected in (("model", str(tmp_path / "model")), ("organisation/name", "organisation/name")):
        assert agree_with(lambda request: request, monkeypatch, given).model_path == expected


def spec_in(folder, monkeypatch, tmp_path):
    """What a server is started from that was launched in a working directory; nothing is left of it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(launch.TpSlice, "tp_size", 1)
    working_directory = None if folder is None else str(folder)
    request = launch.LaunchRequest(
        "model", {}, {}, f"1-{secrets.token_hex(8)}", health_timeout_s=5.0, working_directory=working_directory
    )
    group = types.SimpleNamespace(ranks=(0,), members=(), rank=0, timeout_s=60.0)
    tp_slice = launch.TpSlice(group, 0, torch.device("cpu"), (), False, "job", 0)
    spec = launch.Launch(tp_slice, request)._server_spec()
    assert os.path.isdir(spec.working_directory)
    spec.runtime.remove()
    return spec


@pytest.mark.parametrize("asked", [None, "gone", "there"])
def test_a_server_starts_in_a_folder_that_exists(monkeypatch, tmp_path, no_leftovers, asked):
    """Whatever has become of the working directory."""
    (tmp_path / "there").mkdir()
    folder = None if asked is None else tmp_path / asked
    assert (spec_in(folder, monkeypatch, tmp_path).working_directory == str(folder)) is (asked == "there")


@pytest.mark.parametrize("made, expected", [
    ("queue.py", "1"), ("http/__init__.py", "1"), ("http/readme.txt", None), ("model.py", None), ("test/__init__.py", None),
])  # fmt: skip
def test_modules_of_the_working_directory_do_not_take_the_place_of_pythons_own(
    monkeypatch, tmp_path, no_leftovers, made, expected
):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    (tmp_path / "work" / made).parent.mkdir(parents=True)
    (tmp_path / "work" / made).touch()
    spec = spec_in(tmp_path / "work", monkeypatch, tmp_path)
    assert spec.environment.get("PYTHONSAFEPATH") == expected


def test_copies_of_the_ranks_own_environments_are_no_difference(monkeypatch, tmp_path):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")

    def of_rank_0(request):
        assert request.repeated == {"RANK", "LOCAL_RANK"}
        return replace(request, env={"A": "1", "RANK": "0"}, repeated=frozenset({"RANK"}), nonce="of rank 0")

    env = {"A": "1", "RANK": "1", "LOCAL_RANK": "1"}
    assert agree_with(of_rank_0, monkeypatch, tmp_path, env=env).nonce != "of rank 0", "the owner's"


@pytest.mark.parametrize("failing", ["start", "announce"])
def test_after_an_error_no_server_is_left_even_if_the_group_has_failed_too(monkeypatch, failing):
    class Server:
        url, api_key, client, stopped = "http://127.0.0.1:1", "key", object(), False

        def stop(self):
            self.stopped = True

    def fail(*args, **kwargs):
        raise OSError("disk full")

    server = Server()
    info = {"version": "0.5.20"}
    monkeypatch.setattr(ServerProcess, "start", fail if failing == "start" else lambda *args, **kwargs: server)
    monkeypatch.setattr(launch, "ServerApi", lambda client, timeout_s: types.SimpleNamespace(info=info))
    monkeypatch.setattr(launch, "read_spec", lambda path: None)
    monkeypatch.setattr(launch.rendezvous, "announce", fail)
    tp_slice = launch.TpSlice(FailedGroup(), 0, torch.device("cpu"), (), False, f"test{os.getpid()}", 0)
    launched = launch.Launch(tp_slice, launch.LaunchRequest("model", {}, {}, "nonce", health_timeout_s=1.0))
    with pytest.raises(OSError, match="disk full"):
        launched.start_server(None)
    assert server.stopped == (failing == "announce")
    assert not launched.sync_folder.exists()


@pytest.mark.parametrize("load_format, paused, of_engine, expected", [
    ("auto", None, False, ["announce"]),
    ("dummy", None, False, ["pause retract", "announce"]),
    ("auto", None, True, ["version 7", "pause retract", "announce"]),
    ("auto", "abort", True, ["version 7", "pause abort", "announce"]),
])  # fmt: skip
def test_no_other_process_finds_a_server_that_would_answer_with_other_weights_than_the_trainers(
    monkeypatch, load_format, paused, of_engine, expected
):
    """Between its announcement and its pause the ranks meet, and may compile kernels."""
    done = []
    api = types.SimpleNamespace(
        info={"version": "0.5.21", "load_format": load_format},
        set_weight_version=lambda version, timeout_s: done.append(f"version {version}"),
        pause_generation=lambda mode, timeout_s: done.append(f"pause {mode}"),
    )
    server = types.SimpleNamespace(client=object(), url="http://127.0.0.1:1", api_key="key")
    monkeypatch.setattr(ServerProcess, "start", lambda *args, **kwargs: server)
    monkeypatch.setattr(launch, "ServerApi", lambda client, timeout_s: api)
    monkeypatch.setattr(launch, "read_spec", lambda path: None)
    monkeypatch.setattr(launch.rendezvous, "announce", lambda path, announcement: done.append("announce"))
    monkeypatch.setattr(launch.Launch, "share", lambda self, error, running: None)
    monkeypatch.setattr(launch.Launch, "_server_spec", lambda self: None)
    lifecycle = Lifecycle(State(paused=paused).restarting(), weight_version="7") if of_engine else None
    tp_slice = launch.TpSlice(FailedGroup(), 0, torch.device("cpu"), (), False, "job", 0)
    launched = launch.Launch(tp_slice, launch.LaunchRequest("model", {}, {}, "nonce", health_timeout_s=1.0))
    launched.start_server(lifecycle)
    assert done == expected


def test_a_server_has_the_whole_launch_to_report_what_it_is(monkeypatch):
    """A first forward that compiled for more than 30 seconds, behind which SGLang answers, ended a launch."""
    limits, stopped = [], []

    def report(client, timeout_s):
        limits.append(timeout_s)
        raise DeadlineError("/server_info: no answer")

    def share(self, error, running):
        raise error

    server = types.SimpleNamespace(
        client=object(),
        url="http://127.0.0.1:1",
        spec=types.SimpleNamespace(log_path="a.log"),
        stop=lambda: stopped.append(1),
    )
    monkeypatch.setattr(ServerProcess, "start", lambda *args, **kwargs: server)
    monkeypatch.setattr(launch, "ServerApi", report)
    monkeypatch.setattr(launch.Launch, "share", share)
    tp_slice = launch.TpSlice(FailedGroup(), 0, torch.device("cpu"), (), False, f"test{os.getpid()}", 0)
    launched = launch.Launch(tp_slice, launch.LaunchRequest("model", {}, {}, "nonce", health_timeout_s=300.0))
    with pytest.raises(DeadlineError, match=r"health_timeout_s=300 of launch\(\)") as caught:
        launched.start_server(None)
    assert 290 < limits[0] < 310 and stopped == [1]
    assert "raise health_timeout_s" in caught.value.hint and "a.log" in caught.value.hint


def test_a_server_that_does_not_end_does_not_hide_why_the_launch_failed():
    def stop():
        raise EngineError("process 7 does not end")

    tp_slice = launch.TpSlice(FailedGroup(), 0, torch.device("cpu"), (), False, f"test{os.getpid()}", 0)
    launched = launch.Launch(tp_slice, launch.LaunchRequest("model", {}, {}, "nonce", health_timeout_s=1.0))
    failed = RankFailedError("disk full", rank=1)
    launched.undo(types.SimpleNamespace(stop=stop), failed)
    assert failed.__notes__ == ["(the server that was started: process 7 does not end)"]


@pytest.mark.parametrize("load_format, expected", [
    ("auto", WeightsState.CURRENT),
    ("safetensors", WeightsState.CURRENT),
    (None, WeightsState.CURRENT),
    ("dummy", WeightsState.UNSYNCED),
])  # fmt: skip
def test_weights_that_were_not_loaded_are_not_the_trainers(load_format, expected):
    assert launch._initial_state({"load_format": load_format}, "cpu").weights is expected
