"""One SGLang server in a process of its own: ports, start, log and stop.

Runs on the owner only.  SGLang's `launch_server()` and `Engine` are never called in this process: a failing child of
theirs sends SIGQUIT to the caller.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tpcolocate import supervisor
from tpcolocate.deadline import Deadline
from tpcolocate.errors import ConfigError, DeadlineError, EngineError, LaunchError
from tpcolocate.parallel import in_background
from tpcolocate.runtime_folder import RuntimeFolder
from tpcolocate.server.arguments import to_argv
from tpcolocate.server.environment import LOOPBACK
from tpcolocate.server.evidence import Evidence
from tpcolocate.server.http import ServerClient

logger = logging.getLogger(__name__)

_SUPERVISOR = Path(supervisor.__file__)
# Where a server is reached that listens on all addresses, or on a name for this machine.
_LOCAL_HOSTS = {"localhost": LOOPBACK, "0.0.0.0": LOOPBACK, "": LOOPBACK, "::": "::1"}
_LAUNCH_TRIES = 3
# Connecting to a closed port is cheap; a health request takes the server's time while it warms up.
_LISTENING_INTERVAL_S = 0.05
_HEALTH_INTERVAL_S = 0.25
_HEALTH_S = 30.0
_PROGRESS_INTERVAL_S = 10.0
# From the report of a death until all processes are gone.
_CLEANED_UP_S = 20.0


def hold_port(port: int = 0) -> socket.socket:
    """Reserve a loopback TCP port by a socket that is bound and never listens.

    On Linux another socket can bind the same port while both have SO_REUSEADDR and none listens, as uvicorn's and
    torch's do; but the kernel does not assign a bound port to sockets that ask for any.  So the port stays reserved for
    the minutes in which the server loads.

    Args:
        port: 0 for any free port.

    Raises:
        ConfigError: The port is taken.
    """
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reserved.bind((LOOPBACK, port))
    except OSError as error:
        reserved.close()
        raise ConfigError(f"port {port} is taken: {error}", hint="leave out the port to get a free one") from error
    return reserved


def check_host(host: str) -> str:
    """Return the URL part of the address at which a server that listens on `host` is reached.

    Raises:
        ConfigError: The name does not resolve, or the address is not one of this machine.
    """
    try:
        found = socket.getaddrinfo(host or LOOPBACK, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host={host!r} does not resolve: {error}", hint="leave out host= for loopback") from error
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError as error:
                raise ConfigError(
                    f"host={host!r} is {address[0]}, on which this machine cannot listen: {error}",
                    hint="leave out host= for loopback",
                ) from error
    reached = _LOCAL_HOSTS.get(host, host)
    return f"[{reached}]" if ":" in reached else reached


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """Everything that a server is started from; the same for all tries except for the ports.

    Attributes:
        arguments: SGLang's, by name.
        runtime: The folders of the launch; the supervisor removes them.
        owner_pid: Process whose exit ends the server; with `owner_started`, see `start_of`.
        trainers: Pid and start of each rank of the slice that this process sees; what torch leaves of one that is killed, the
            supervisor removes.
        grace_s: Between SIGTERM and SIGKILL, in seconds.
        shows_start: Whether a line on the terminal shows how the start goes: one server of a job does.
        working_directory: Of the server; None: that of this process.
    """

    model_path: str
    arguments: Mapping[str, Any]
    environment: Mapping[str, str]
    runtime: RuntimeFolder
    owner_pid: int
    owner_started: int
    trainers: tuple[tuple[int, int], ...] = ()
    grace_s: float = 15.0
    shows_start: bool = True
    working_directory: str | None = None

    @property
    def log_path(self) -> Path:
        """File that the output is appended to."""
        return self.runtime.log_path


class _Supervision:
    """The supervisor as its owner sees it: what it has reported, and what it is sent.

    Attributes:
        pid: The server's main process; None until it is started.
        deaths: Processes of the server that died before it was asked to end.
        lacked_memory: Whether the kernel may have killed them for want of memory.
        exit: The last report, once all processes are gone.
        failure: Why the server could not be started.
    """

    def __init__(self, spec: ServerSpec, job: Mapping[str, Any]) -> None:
        self.pid: int | None = None
        self.deaths: list[dict[str, Any]] = []
        self.lacked_memory = False
        self.exit: dict[str, Any] | None = None
        self.failure: str | None = None
        self._rest = b""
        # All threads whose requests fail look for what died; a signal's handler may end what its own thread looks at.
        self._lock = threading.RLock()
        errors = os.open(spec.runtime.supervisor_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SUPERVISOR)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(spec.environment),
                cwd=spec.working_directory,
                start_new_session=True,
            )
        finally:
            os.close(errors)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._commands, self._reports = self._process.stdin, self._process.stdout
        os.set_blocking(self._reports.fileno(), False)
        # The environment may exceed the usual 64 KiB, and a supervisor that is stopped does not read it.
        supervisor.widen(self._commands.fileno())
        self._send(json.dumps(job).encode())

    def _send(self, line: bytes) -> None:
        try:
            self._commands.write(line + b"\n")
            self._commands.flush()
        except BrokenPipeError:
            pass  # it has exited; its reports say why

    def exit_code(self) -> int | None:
        """Return the exit code of the supervisor itself; None while it runs."""
        return self._process.poll()

    def server_exited(self) -> bool:
        """Return whether the server has exited, or has lost a process and is being ended; never blocks."""
        exited = self._process.poll() is not None  # before its last reports are read, not after
        self._read()
        return exited or bool(self.deaths) or self.exit is not None or self.failure is not None

    def wait_for_exit(self, timeout_s: float) -> None:
        """Wait until the processes of a server that has died are gone, for a bounded time."""
        deadline = Deadline.after(timeout_s)
        while self.exit is None and self._process.poll() is None and not deadline.has_passed:
            time.sleep(_LISTENING_INTERVAL_S)
            self._read()

    def _read(self) -> None:
        with self._lock:
            if self._reports.closed:
                return
            while (chunk := self._reports.read(65536)) is not None and chunk:
                self._rest += chunk
            *lines, self._rest = self._rest.split(b"\n")
            for line in lines:
                event = supervisor.event_in(line)
                if event is None:
                    continue
                if event["event"] == "started":
                    self.pid = event["pid"]
                elif event["event"] == "died":
                    self.lacked_memory = event["lacked_memory"]  # before what says that it is there
                    self.deaths = event["processes"]
                elif event["event"] == "failed":
                    self.failure = event["error"]
                else:
                    self.exit = event

    def end(self, command: bytes, *, timeout_s: float) -> None:
        """Send the last command, and wait for the supervisor to exit.

        Raises:
            EngineError: It did not in time and was killed.
        """
        if not self._commands.closed:  # an earlier call was interrupted after this
            self._send(command)
            try:
                self._commands.close()
            except BrokenPipeError:
                pass
        self._process.send_signal(signal.SIGCONT)  # one that was stopped would not end anything
        try:
            self._process.wait(timeout_s)
            self._read()
        except subprocess.TimeoutExpired:
            self._process.kill()  # also kills the server: PR_SET_PDEATHSIG
            self._process.wait(5.0)
            raise EngineError(
                f"the supervisor did not confirm the exit of the server (pid {self.pid}) and was killed",
                hint="check with ps that the server has exited",
            ) from None
        with self._lock:
            self._reports.close()


class ServerProcess:
    """A running server and the supervisor that ends it.

    Created by `start`; owns the process until `stop`.
    """

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        # Hexadecimal: SGLang turns its config file into arguments, where a leading dash would make the key an option.
        self.api_key = secrets.token_hex(32)
        self.url = ""
        self.client: ServerClient | None = None
        self._supervision: _Supervision | None = None
        self._is_stopped = False
        self._creator_pid = os.getpid()
        self.evidence = Evidence(spec.log_path, spec.runtime.processes, self._died)

    @classmethod
    def start(
        cls,
        spec: ServerSpec,
        *,
        health_timeout_s: float,
        heartbeat: Callable[[str, float], None] | None = None,
    ) -> ServerProcess:
        """Start the server and wait until it has generated a token.

        Args:
            spec: What to start.
            health_timeout_s: From the start of the process to the first healthy answer, over all tries, in seconds.
            heartbeat: Called twice a second with the log's last line and the elapsed seconds.

        Raises:
            ConfigError: A port that the user chose is taken, or the host is not of this machine.
            LaunchError: The server exited, with the tail of its log; or it could not be started.
            DeadlineError: It was not healthy in time; with the tail of its log.
        """
        deadline = Deadline.after(health_timeout_s)
        for attempt in range(1, _LAUNCH_TRIES + 1):
            server = cls(spec)
            try:
                server._start_once(deadline, heartbeat)
                return server
            except BaseException as error:
                retry = isinstance(error, LaunchError) and server.met_port_clash() and "port" not in spec.arguments
                is_last = not retry or attempt == _LAUNCH_TRIES
                try:
                    server.stop(keep_log=isinstance(error, (LaunchError, DeadlineError)), keep_folder=not is_last)
                except EngineError as unended:
                    error.add_note(f"(the server that was started: {unended.message})")
                    is_last = True  # none is started beside one that may still run
                    spec.runtime.remove()
                if is_last and isinstance(error, OSError) and error.errno is not None:
                    raise _start_failure(error) from error
                if is_last:
                    raise
                logger.warning("a port was taken while the server loaded: try %d of %d", attempt + 1, _LAUNCH_TRIES)
        raise AssertionError("unreachable")

    def _start_once(self, deadline: Deadline, heartbeat: Callable[[str, float], None] | None) -> None:
        spec = self.spec
        with ExitStack() as stack:
            host = str(spec.arguments.get("host", LOOPBACK))
            address = check_host(host)
            http = stack.enter_context(hold_port(spec.arguments.get("port", 0)))
            internal = stack.enter_context(hold_port(spec.arguments.get("nccl_port", 0)))
            # Not on the command line, which every user of the machine can read.  JSON is YAML.
            keys = json.dumps({"api-key": self.api_key, "admin-api-key": self.api_key})
            config = spec.runtime.write("server.yaml", keys)
            stack.callback(config.unlink, missing_ok=True)
            port = http.getsockname()[1]
            arguments = {**spec.arguments, "host": host, "port": port, "nccl_port": internal.getsockname()[1]}
            self.url = f"http://{address}:{port}"
            self.client = ServerClient(self.url, api_key=self.api_key)
            command = [sys.executable, "-m", "sglang.launch_server", "--model-path", spec.model_path]
            self._spawn([*command, "--config", str(config), *to_argv(arguments)])
            self._wait_healthy(deadline, heartbeat)
            self.client.evidence = self.evidence

    def _spawn(self, command: list[str]) -> None:
        spec, runtime = self.spec, self.spec.runtime
        all_of_it = str(runtime.temporary)
        job = {
            "command": command,
            "env": dict(spec.environment),
            "log_path": str(spec.log_path),
            "secrets": [self.api_key],
            "record": str(runtime.processes),
            "owner_pid": spec.owner_pid,
            "owner_started": spec.owner_started,
            "trainers": spec.trainers,
            "nonce": runtime.nonce,
            "unlink": [
                str(runtime.shared),
                str(runtime.server_temporary) if runtime.has_default_log else all_of_it,
            ],
            "unlink_log": [all_of_it] if runtime.has_default_log else [],
            "grace_s": spec.grace_s,
        }
        self._supervision = _Supervision(spec, job)

    def _wait_healthy(self, deadline: Deadline, heartbeat: Callable[[str, float], None] | None) -> None:
        assert self.client is not None
        client = self.client
        started = last_beat = last_logged = time.monotonic()
        listening = False
        health: Future[bool] | None = None
        with tqdm(
            desc="Starting SGLang",
            bar_format="{desc} [{elapsed}{postfix}]",
            disable=None if self.spec.shows_start else True,
            leave=False,
            file=io.StringIO() if sys.stderr is None else sys.stderr,  # None where it was closed from the start
        ) as progress:
            while True:
                if self.exited():
                    raise self._launch_error()
                listening = listening or client.is_listening(timeout_s=1.0)
                if listening and health is None:
                    # A first token that compiles kernels takes long, beside which the deadline and the clients are watched.
                    health = in_background(lambda: client.is_healthy(timeout_s=_HEALTH_S), name="tpcolocate health")
                if health is not None and wait([health], _HEALTH_INTERVAL_S).done:
                    if health.result():
                        logger.info("SGLang is ready at %s after %.1f s", self.url, time.monotonic() - started)
                        return
                    health = None
                if deadline.has_passed:
                    raise DeadlineError(
                        f"the SGLang server did not become healthy within {deadline.timeout_s:g} s (health_timeout_s of launch())",
                        hint=f"if the end of its log, below, shows that it was still loading, raise health_timeout_s; the whole log "
                        f"is {self.spec.log_path}",
                        url=self.url,
                        details=self.log_tail(),
                    )
                now = time.monotonic()
                if now - last_beat >= 0.5:
                    last_beat = now
                    line = self.last_line()
                    progress.set_postfix_str(line[-80:])
                    if heartbeat is not None:
                        heartbeat(line, now - started)
                    if progress.disable and now - last_logged >= _PROGRESS_INTERVAL_S:
                        last_logged = now
                        logger.info("starting SGLang, %.0f s: %s", now - started, line)
                time.sleep(_HEALTH_INTERVAL_S if listening else _LISTENING_INTERVAL_S)

    def _launch_error(self) -> LaunchError:
        """Return why the server has exited while it started."""
        supervision = self._supervision
        assert supervision is not None
        if supervision.failure is not None:
            return LaunchError(
                f"the SGLang server could not be started: {supervision.failure}",
                hint=f"the log was to be {self.spec.log_path}; log_path= puts it elsewhere",
            )
        if not supervision.deaths:
            errors = self._supervisor_errors()
            return LaunchError(
                f"the server's supervisor exited with code {supervision.exit_code()}{_reason(errors)}",
                hint=f"the server's log is {self.spec.log_path}",
                details=errors or self.log_tail(),
            )
        [first, *_] = supervision.deaths
        who = "the SGLang server" if first["name"] == "main process" else f"the SGLang server's {first['name']}"
        supervision.wait_for_exit(_CLEANED_UP_S)  # the server's last words may name the reason
        reason = f": {supervisor.LACKED_MEMORY}" if supervision.lacked_memory else _reason(self.log_tail())
        return LaunchError(
            f"{who} {_ended(first['code'])} while it started{reason}",
            hint=f"{_advice(reason)}the full log is {self.spec.log_path}",
            details=self.log_tail(),
        )

    def exited(self) -> bool:
        """Return whether the server has exited, or has lost a process and is being ended; never blocks."""
        if self._is_fork:
            return self.evidence.verdict_in_log() is not None
        return self._supervision is None or self._supervision.server_exited()

    @property
    def _is_fork(self) -> bool:
        """Whether this is a fork of the trainer: it cannot wait for the supervisor, and what that reports is the trainer's."""
        return os.getpid() != self._creator_pid

    @property
    def pid(self) -> int | None:
        """The server's main process."""
        return None if self._supervision is None else self._supervision.pid

    @property
    def exit_code(self) -> int | None:
        """The server's exit code (negative: a signal); None while it runs or if unknown."""
        supervision = self._supervision
        return None if supervision is None or supervision.exit is None else supervision.exit["code"]

    def _died(self) -> str | None:
        if self._is_fork:
            return self.evidence.verdict_in_log()
        if not self.exited():
            return None
        if self._supervision is not None and self._supervision.deaths:
            return supervisor.describe_deaths(self._supervision.deaths, lacked_memory=self._supervision.lacked_memory)
        is_ended = self._supervision is None or self._supervision.exit is not None
        return "the server was shut down" if is_ended else "the server's supervisor was killed"

    def _supervisor_errors(self) -> str:
        try:
            return self.spec.runtime.supervisor_log.read_text(errors="replace").replace(self.api_key, "***")
        except OSError:
            return ""

    def log_tail(self) -> str:
        """Return the last lines of the server's output, for messages."""
        return self.evidence.tail()

    def met_port_clash(self) -> bool:
        """Return whether this server's output reports an address in use."""
        text = "\n".join(self.evidence.lines()).lower()
        return "address already in use" in text or "eaddrinuse" in text

    def last_line(self) -> str:
        """Return the log's last line, shown while the server loads."""
        lines = self.evidence.lines()
        return lines[-1].strip() if lines else "no output yet"

    def stop(self, *, can_answer: bool = True, keep_log: bool = False, keep_folder: bool = False) -> None:
        """Stop the server: SIGINT and SIGTERM, bounded wait, SIGKILL; removes its process tree and its files.  Idempotent.

        Args:
            can_answer: Whether requests in flight may still be answered; nothing waits for those that the server holds.
            keep_log: Keep the log even if the server did not crash.
            keep_folder: Keep the runtime folder for another try.

        Raises:
            EngineError: The supervisor did not confirm the exit of the server in time; the message has its pid.
        """
        if self._is_fork or self._is_stopped:
            return
        if self.client is not None:
            self.client.close()
        keeps_log = keep_log or self.evidence.was_in_trouble
        command = "retry" if keep_folder else f"stop{' keep' if keeps_log else ''}{'' if can_answer else ' now'}"
        try:
            if self._supervision is not None:
                # The grace after SIGTERM, then the supervisor's own limit for the rest of the tree.
                self._supervision.end(command.encode(), timeout_s=self.spec.grace_s + 15.0)
        except EngineError:
            self._has_ended(keep_folder)
            raise
        self._has_ended(keep_folder)

    def _has_ended(self, keep_folder: bool) -> None:
        # Not before: a call that was interrupted is made again.
        self._is_stopped = True
        if not keep_folder:
            self.spec.runtime.remove()  # what a supervisor that was killed has left


def _ended(code: int | None) -> str:
    return "exited" if code is None else f"exited with code {code}"


def _start_failure(error: OSError) -> LaunchError:
    """Return the error for a server that this machine could not start."""
    hints = {
        errno.EMFILE: "close files, or raise the limit of open files (ulimit -n)",
        errno.ENFILE: "the machine has no file descriptors left",
        errno.ENOSPC: "make space in the temporary folder and in /dev/shm",
        errno.EDQUOT: "make space in the temporary folder and in /dev/shm",
        errno.ENOMEM: "the machine has no memory left",
        errno.EAGAIN: "raise the limit of processes (ulimit -u)",
    }
    return LaunchError(f"the server could not be started: {error}", hint=hints.get(error.errno or 0))


def _reason(tail: str) -> str:
    """Return the line of a Python traceback that names the error, or an empty string."""
    for line in reversed(tail.splitlines()):
        head = line.strip().split(":", 1)[0]
        is_error = head.endswith(("Error", "Exception")) or ": error: " in line
        if is_error and " " not in head.rsplit(".", 1)[-1].strip():
            return f": {line.strip()}"
    return ""


def _advice(reason: str) -> str:
    """Return what to do about an error of SGLang's start, ended by a semicolon, or an empty string."""
    if "out of memory" in reason:
        return (
            "the GPU had too little memory beside the trainer: lower mem_fraction_static, or launch() before the trainer "
            "allocates its optimizer; "
        )
    if "Not enough memory" in reason:  # SGLang's, for a KV cache that would be of no size
        return "raise mem_fraction_static, the share of the GPU for weights and KV cache, or init(tp_size=...); "
    return ""


__all__ = ["ServerProcess", "ServerSpec", "check_host", "hold_port"]
