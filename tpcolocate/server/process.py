"""One SGLang server in a process of its own: ports, start, log and stop.

Runs on the owner only.  SGLang's `launch_server()` and `Engine` are never called in this process: a failing child of
theirs sends SIGQUIT to the caller.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tpcolocate.deadline import Deadline
from tpcolocate.errors import ConfigError, DeadlineError, EngineError, LaunchError
from tpcolocate.server.arguments import to_argv
from tpcolocate.server.environment import LOOPBACK
from tpcolocate.server.http import ServerClient

logger = logging.getLogger(__name__)

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_LOCAL_HOSTS = (LOOPBACK, "localhost", "0.0.0.0", "::")
_LAUNCH_TRIES = 3
_LOG_TAIL_BYTES = 16_384
_LOG_TAIL_LINES = 40
# Connecting to a closed port is cheap; a health request takes the server's time while it warms up.
_LISTENING_INTERVAL_S = 0.05
_HEALTH_INTERVAL_S = 0.25
_PROGRESS_INTERVAL_S = 10.0


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


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """Everything that a server is started from; the same for all tries except for the ports.

    Attributes:
        arguments: SGLang's, by name.
        log_path: File that the output is appended to.
        owner_pid: Process whose exit ends the server; with `owner_started`, see `start_of`.
        unlink: Files and folders that the supervisor removes at the end.
        grace_s: Between SIGTERM and SIGKILL, in seconds.
    """

    model_path: str
    arguments: Mapping[str, Any]
    environment: Mapping[str, str]
    log_path: Path
    owner_pid: int
    owner_started: int
    unlink: tuple[str, ...] = ()
    grace_s: float = 15.0


class ServerProcess:
    """A running server and the supervisor that ends it.

    Created by `start`; owns the process until `stop`.
    """

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        # Hexadecimal: SGLang turns its config file into arguments, where a leading dash would make the key an option.
        self.api_key = secrets.token_hex(32)
        self.url = ""
        self.pid: int | None = None
        self.client: ServerClient | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._events = b""
        self._exit: dict[str, Any] | None = None
        self._stopped = False
        self._creator_pid = os.getpid()
        self._log_start = 0  # earlier tries or servers may have written to the same file

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
            ConfigError: A port that the user chose is taken.
            LaunchError: The server exited; with the tail of its log.
            DeadlineError: It was not healthy in time; with the tail of its log.
        """
        deadline = Deadline.after(health_timeout_s)
        for attempt in range(1, _LAUNCH_TRIES + 1):
            server = cls(spec)
            try:
                server._start_once(deadline, heartbeat)
                return server
            except BaseException as error:
                server.stop()
                retry = isinstance(error, LaunchError) and server.met_port_clash() and "port" not in spec.arguments
                if not retry or attempt == _LAUNCH_TRIES:
                    raise
                logger.warning("a port was taken while the server loaded: try %d of %d", attempt + 1, _LAUNCH_TRIES)
        raise AssertionError("unreachable")

    def _start_once(self, deadline: Deadline, heartbeat: Callable[[str, float], None] | None) -> None:
        spec = self.spec
        with ExitStack() as stack:
            http = stack.enter_context(hold_port(int(spec.arguments.get("port", 0))))
            internal = stack.enter_context(hold_port(int(spec.arguments.get("nccl_port", 0))))
            # Not on the command line, which every user of the machine can read.
            config = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tpcolocate-"))) / "server.yaml"
            config.touch(mode=0o600)
            config.write_text(json.dumps({"api-key": self.api_key, "admin-api-key": self.api_key}))  # JSON is YAML
            host, port = spec.arguments.get("host", LOOPBACK), http.getsockname()[1]
            arguments = {**spec.arguments, "host": host, "port": port, "nccl_port": internal.getsockname()[1]}
            self.url = f"http://{LOOPBACK if host in _LOCAL_HOSTS else host}:{port}"
            self.client = ServerClient(self.url, api_key=self.api_key)
            command = [sys.executable, "-m", "sglang.launch_server", "--model-path", spec.model_path]
            self._spawn([*command, "--config", str(config), *to_argv(arguments)])
            self._wait_healthy(deadline, heartbeat)

    def _spawn(self, command: list[str]) -> None:
        spec = self.spec
        spec.log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if spec.log_path.exists():
            self._log_start = spec.log_path.stat().st_size
        self._supervisor = subprocess.Popen(
            [sys.executable, "-P", str(_SUPERVISOR)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(spec.environment),
            start_new_session=True,
        )
        job = {
            "command": command,
            "env": dict(spec.environment),
            "log_path": str(spec.log_path),
            "owner_pid": spec.owner_pid,
            "owner_started": spec.owner_started,
            "unlink": list(spec.unlink),
            "grace_s": spec.grace_s,
        }
        assert self._supervisor.stdin is not None and self._supervisor.stdout is not None
        os.set_blocking(self._supervisor.stdout.fileno(), False)
        self._supervisor.stdin.write(json.dumps(job).encode() + b"\n")
        self._supervisor.stdin.flush()

    def _wait_healthy(self, deadline: Deadline, heartbeat: Callable[[str, float], None] | None) -> None:
        assert self.client is not None
        started = last_beat = last_logged = time.monotonic()
        listening = False
        with tqdm(
            desc="Starting SGLang",
            bar_format="{desc} [{elapsed}] {postfix}",
            disable=None,
            leave=False,
            file=sys.stderr,
        ) as progress:
            while True:
                if self.exited():
                    raise LaunchError(
                        f"the SGLang server exited with code {self.exit_code} while it started"
                        f"{_reason(self.log_tail())}",
                        hint=f"the full log is {self.spec.log_path}",
                        details=self.log_tail(),
                    )
                listening = listening or self.client.is_listening(timeout_s=1.0)
                if listening and self.client.is_healthy(timeout_s=30.0):
                    logger.info("SGLang is ready at %s after %.1f s", self.url, time.monotonic() - started)
                    return
                if deadline.has_passed:
                    raise DeadlineError(
                        f"the SGLang server was not healthy within {deadline.timeout_s:g} s",
                        hint=f"raise health_timeout_s, or see the log {self.spec.log_path}",
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

    def exited(self) -> bool:
        """Return whether the server has exited; never blocks."""
        if self._supervisor is None:
            return True
        exited = self._supervisor.poll() is not None  # before its last events are read, not after
        self._read_events()
        return exited or self._exit is not None

    @property
    def exit_code(self) -> int | None:
        """The server's exit code (negative: a signal); None while it runs or if unknown."""
        return None if self._exit is None else self._exit["code"]

    def _read_events(self) -> None:
        assert self._supervisor is not None and self._supervisor.stdout is not None
        if self._supervisor.stdout.closed:
            return
        while (chunk := self._supervisor.stdout.read(65536)) is not None and chunk:
            self._events += chunk
        *lines, self._events = self._events.split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["event"] == "started":
                self.pid = event["pid"]
            else:
                self._exit = event

    def log_tail(self) -> str:
        """Return the last lines of the server's output, for messages."""
        if not self.spec.log_path.exists():
            return "(no log was written)"
        return "\n".join(["--- last lines of the server's log ---", *self._log_lines()[-_LOG_TAIL_LINES:]])

    def _log_lines(self) -> list[str]:
        with open(self.spec.log_path, "rb") as log:
            end = log.seek(0, os.SEEK_END)
            start = log.seek(max(end - _LOG_TAIL_BYTES, self._log_start))
            text = log.read().decode(errors="replace")
        if start > self._log_start:
            text = text.partition("\n")[2]  # an incomplete line, which may begin with half of the key
        return text.replace(self.api_key, "***").splitlines()

    def met_port_clash(self) -> bool:
        """Return whether this server's output reports an address in use."""
        if not self.spec.log_path.exists():
            return False
        text = "\n".join(self._log_lines()).lower()
        return "address already in use" in text or "eaddrinuse" in text

    def last_line(self) -> str:
        """Return the log's last line, shown while the server loads."""
        return self.log_tail().splitlines()[-1].strip()

    def remove_log(self) -> None:
        """Remove the log after a clean stop; that of a crash or a forced end is kept."""
        if self._stopped and self._exit is not None and not self._exit["forced"]:
            self.spec.log_path.unlink(missing_ok=True)
            try:
                self.spec.log_path.parent.rmdir()
            except OSError:
                pass  # it contains logs of other servers

    def stop(self) -> None:
        """Stop the server: SIGTERM, bounded wait, SIGKILL; removes its process tree and files in /dev/shm.  Idempotent.

        Raises:
            EngineError: The supervisor did not confirm the exit of the server in time; the message has its pid.
        """
        # A fork of the trainer inherits this object; the server is not its own.
        if self._supervisor is None or os.getpid() != self._creator_pid:
            return
        self._stopped = self._stopped or not self.exited()
        supervisor = self._supervisor
        if self.client is not None:
            self.client.close()
        assert supervisor.stdin is not None and supervisor.stdout is not None
        try:
            supervisor.stdin.write(b"stop\n")
            supervisor.stdin.close()
        except (BrokenPipeError, ValueError):
            pass  # it has exited, or an earlier call was interrupted after this
        problem: EngineError | None = None
        # The grace after SIGTERM, then the supervisor's own limit for the rest of the tree.
        try:
            supervisor.wait(self.spec.grace_s + 15.0)
            self._read_events()
        except subprocess.TimeoutExpired:
            supervisor.kill()  # also kills the server: PR_SET_PDEATHSIG
            supervisor.wait(5.0)
            problem = EngineError(
                f"the supervisor did not confirm the exit of the server (pid {self.pid}) and was killed",
                hint="check with ps that the server has exited",
            )
        # Not before: a call that was interrupted is made again.
        self._supervisor = None
        supervisor.stdout.close()
        if problem is not None:
            raise problem


def _reason(tail: str) -> str:
    """Return the line of a Python traceback that names the error, or an empty string."""
    for line in reversed(tail.splitlines()):
        head = line.strip().split(":", 1)[0]
        is_error = head.endswith(("Error", "Exception")) or ": error: " in line
        if is_error and " " not in head.rsplit(".", 1)[-1].strip():
            return f": {line.strip()}"
    return ""


__all__ = ["ServerProcess", "ServerSpec", "hold_port"]
