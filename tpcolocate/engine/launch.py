"""One SGLang server as a process of its own: arguments, environment, ports, life and death.

Runs on the owner only.  The decisions (`server_arguments`, `to_argv`, `child_environment`) are pure; `ServerProcess`
carries them out.  `launch_server()` and `Engine` of SGLang are never called in this process: a failing child of
theirs sends SIGQUIT to whoever called them.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tpcolocate.engine.client import ServerClient
from tpcolocate.engine.installed import Installed
from tpcolocate.engine.releases import check_draft_model, other_spelling, release
from tpcolocate.errors import ConfigError, DeadlineError, EngineError, LaunchError

logger = logging.getLogger(__name__)

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_CPU_STUB = Path(__file__).with_name("cpu_stub")
_IN_SERVER = Path(__file__).parent.parent / "in_server"
RECEIVER = "tpcolocate_receiver.receive"
"""Dotted name of our weight loader, as the server's workers import it."""
_LOOPBACK = "127.0.0.1"
_LOCAL_HOSTS = (_LOOPBACK, "localhost", "0.0.0.0", "::")
_LAUNCH_TRIES = 3
_LOG_TAIL_BYTES = 16_384
_LOG_TAIL_LINES = 40
# Connecting to a closed port costs nothing; a health request takes the server's time while it warms up.
_LISTENING_INTERVAL_S = 0.05
_HEALTH_INTERVAL_S = 0.25
_PROGRESS_INTERVAL_S = 10.0

# torchrun's own variables make a child believe that it is a training rank.  TORCHELASTIC_USE_AGENT_STORE alone
# makes the server's internal rendezvous wait for ever.
_SCRUBBED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
             "NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ASYNC_ERROR_HANDLING")  # fmt: skip
_SCRUBBED_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "PET_")
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

# What a CPU without SGLang's own kernels needs; every entry gives way to what the user passes.
_CPU_ARGUMENTS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.3,
    "sleep_on_idle": True,
}
# Ours to decide, or impossible on this path; the reason is the error's text.
_REFUSED = {
    "tp": "pass tp_size to tpcolocate.init()",
    "tensor_parallel_size": "pass tp_size to tpcolocate.init()",
    "nnodes": "a slice lies on one host",
    "node_rank": "a slice lies on one host",
    "dist_init_addr": "a slice lies on one host",
    "api_key": "a random key is made for every launch; read it from engine.api_key",
    "admin_api_key": "a random key is made for every launch; read it from engine.api_key",
    "config": "pass SGLang's arguments as keywords",
    "model": "it is the first argument of launch()",
    "model_path": "it is the first argument of launch()",
}
_MUST_BE_ONE = (
    "pp_size",
    "pipeline_parallel_size",
    "dp_size",
    "data_parallel_size",
    "moe_dp_size",
    "moe_data_parallel_size",
    "attn_cp_size",
    "attention_context_parallel_size",
    "dcp_size",
    "decode_context_parallel_size",
    "dwdp_size",
    "attn_dp_size",
    "attention_data_parallel_size",
)
_QUANTISED = "a sync would write the trainer's values into quantised parameters"
_NO_DRAFT = "the draft's weights are not synced, and no speculative algorithm has been tried under a sync"
# Not tried, or known not to work, with weights that change; None and False leave them off.
_UNSUPPORTED = {
    "enable_dp_attention": "weights are addressed by tensor-parallel rank",
    "quantization": _QUANTISED,
    "torchao_config": _QUANTISED,
    "modelopt_quant": _QUANTISED,
    "quantize_and_serve": _QUANTISED,
    "rl_quant_profile": _QUANTISED,
    "speculative_algorithm": _NO_DRAFT,
    "speculative_draft_model_path": _NO_DRAFT,
}
_QUANTISED_FORMATS = ("bitsandbytes", "gguf", "flash_rl")


def server_arguments(
    user: Mapping[str, Any], *, tp_size: int, device_type: str, shared_device: bool = False
) -> dict[str, Any]:
    """SGLang's arguments for one slice: ours, then the user's on top.  Pure.

    At tp=1 on a GPU nothing is added but what follows from the slice itself and the permission for our weight loader.

    Args:
        user: SGLang's own names (``mem_fraction_static=0.4``).
        tp_size: Size of the slice.
        device_type: ``"cuda"``, ``"cpu"``, ...
        shared_device: All TP ranks sit on one device (a test rig).

    Raises:
        ConfigError: An argument is ours to decide, or cannot work on this path.
    """
    for name, value in user.items():
        if name in _REFUSED:
            raise ConfigError(f"launch() does not take {name}={value!r}: {_REFUSED[name]}")
        if name in _MUST_BE_ONE and value != 1:
            raise ConfigError(
                f"{name}={value!r} is not supported: weights are addressed by tensor-parallel rank",
                hint="use tp_size alone",
            )
        if name in _UNSUPPORTED and value is not None and value is not False:
            raise ConfigError(f"{name}={value!r} is not supported: {_UNSUPPORTED[name]}", hint=f"leave out {name}")
        if name == "load_format" and value in _QUANTISED_FORMATS:
            raise ConfigError(
                f"load_format={value!r} is not supported: {_QUANTISED}", hint="serve a checkpoint that is not quantised"
            )
    if user.get("tp_size", tp_size) != tp_size:
        raise ConfigError(
            f"launch(tp_size={user['tp_size']!r}) contradicts init(tp_size={tp_size})",
            hint="pass tp_size to init() only",
        )
    arguments: dict[str, Any] = {}
    if device_type == "cpu":
        arguments.update(_CPU_ARGUMENTS)
    if tp_size > 1:
        # Custom all-reduce fails rank by rank without peer access or in separate IPC namespaces, and clashes
        # with the memory saver; whoever knows that it works can switch it on.
        arguments["disable_custom_all_reduce"] = True
    if shared_device:
        arguments["gpu_id_step"] = 0
    arguments.update(user)
    arguments["tp_size"] = tp_size
    # Permits our loader; SGLang's own ways of loading stay as they are.
    theirs = user.get("custom_weight_loader")
    theirs = [] if theirs is None else [theirs] if isinstance(theirs, str) else theirs
    arguments["custom_weight_loader"] = list(dict.fromkeys([*theirs, RECEIVER]))
    return arguments


def check_installed(arguments: Mapping[str, Any], installed: Installed | None) -> None:
    """Refuses what the SGLang that would be started does not take, before anything is started.

    Args:
        arguments: From `server_arguments`.
        installed: From `find_installed`.  What it cannot tell is left to the server.

    Raises:
        ConfigError: The release is too old, lacks an argument, or takes it and does nothing with it.
    """
    if installed is None:
        return
    row = None if installed.version is None else release(installed.version)
    if (algorithm := arguments.get("speculative_algorithm")) is not None:
        fields = installed.request_fields("UpdateWeightsFromTensorReqInput")
        if fields is None and row is not None:
            fields = frozenset(row.target_only())
        if fields is not None:
            check_draft_model(installed.name, algorithm, fields)
    known = installed.arguments()
    if known is None:
        return
    for name, value in arguments.items():
        plain = name.replace("_", "-")
        if plain not in known:
            spelling = other_spelling(name, known)
            if spelling is None:
                close = difflib.get_close_matches(plain, known, n=3)
                spelling = " or ".join(word.replace("-", "_") for word in close) if close else None
            raise ConfigError(
                f"{installed.name} has no argument {name} (launch got {name}={value!r})",
                hint="see python -m sglang.launch_server --help"
                if spelling is None
                else f"this release has {spelling}",
            )
        if (unused := known[plain]) is not None:
            spelling = other_spelling(name, known)
            raise ConfigError(
                f"{installed.name} takes {name} and does nothing with it; it says: {unused}",
                hint="leave it out" if spelling is None else f"use {spelling}",
            )
        if value is False and f"no-{plain}" in known:
            raise ConfigError(
                f"{name}=False would leave {installed.name} at its default",
                hint=f"pass no_{name}=True to switch it off",
            )


def to_argv(arguments: Mapping[str, Any]) -> list[str]:
    """``{"mem_fraction_static": 0.4, "enable_lora": True}`` -> ``["--mem-fraction-static", "0.4", "--enable-lora"]``.

    True becomes a bare flag, False and None leave the argument out, lists become several values, dicts JSON.
    """
    argv: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            argv.append(flag)
        elif isinstance(value, dict):
            argv += [flag, json.dumps(value)]
        elif isinstance(value, (list, tuple)):
            argv += [flag, *map(str, value)]
        else:
            argv += [flag, str(value)]
    return argv


def child_environment(
    parent: Mapping[str, str],
    *,
    visibility: Mapping[str, str | None],
    user: Mapping[str, str] | None = None,
    device_type: str = "cuda",
    tp_size: int = 1,
    cores: Sequence[int] = (),
    stub: str | None = None,
) -> tuple[dict[str, str], list[str]]:
    """The server's environment, from a copy of the trainer's.  Pure; the parent's is never written.

    Args:
        parent: The trainer's environment.
        visibility: Variables that select the slice's devices; None removes one.
        user: Added last, and wins; but for the stub, which comes before its PYTHONPATH.
        device_type: ``"cpu"`` adds what SGLang's CPU engine reads.
        tp_size: Number of CPU core groups to bind.
        cores: Usable CPU cores, for the CPU engine.
        stub: Folder that stands in for the CUDA kernel package on a CPU, put on PYTHONPATH behind our receiver's.

    Returns:
        The environment, and warnings for the user about what was left out of it.
    """
    warnings = []
    environment = {
        name: value
        for name, value in parent.items()
        if name not in _SCRUBBED and not name.startswith(_SCRUBBED_PREFIXES)
    }
    for name in _ALLOCATOR_VARIABLES:
        if "expandable_segments:true" in environment.get(name, "").lower().replace(" ", ""):
            kept = [
                part
                for part in environment[name].split(",")
                if not part.strip().lower().startswith("expandable_segments")
            ]
            warnings.append(
                f"{name}={environment[name]!r}: expandable_segments breaks SGLang's memory saver; left out for the server"
            )
            environment.pop(name)
            if kept:
                environment[name] = ",".join(kept)
    for name, value in visibility.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    for name in ("NO_PROXY", "no_proxy"):
        # The server calls itself over loopback while it warms up; a proxy would answer in its place.
        entries = [entry for entry in environment.get(name, "").split(",") if entry]
        environment[name] = ",".join(dict.fromkeys([*entries, "localhost", _LOOPBACK, "::1"]))
    if device_type == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        if cores:
            environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", _bind(cores, tp_size))
    environment.update({} if user is None else user)
    # After the user's: without the receiver there is no weight sync, and their PYTHONPATH does not bring the kernels
    # that are missing on a CPU.
    folders = [
        str(_IN_SERVER),
        *([stub] if device_type == "cpu" and stub is not None else []),
        environment.get("PYTHONPATH", ""),
    ]
    environment["PYTHONPATH"] = os.pathsep.join(folder for folder in folders if folder)
    return environment, warnings


def _bind(cores: Sequence[int], tp_size: int) -> str:
    """Core groups, one per TP rank: ``0,1|2,3``.  With fewer cores than ranks, ranks share."""
    if len(cores) < tp_size:
        return "|".join(str(cores[i % len(cores)]) for i in range(tp_size))
    size = len(cores) // tp_size
    return "|".join(",".join(map(str, cores[i * size : (i + 1) * size])) for i in range(tp_size))


def hold_port(port: int = 0) -> socket.socket:
    """Reserve a loopback TCP port: bound, never listening.

    Linux lets another socket bind the same port while both carry SO_REUSEADDR and none listens, as uvicorn's and
    torch's do; the kernel gives a held port to nobody that asks for any.  So the port stays ours through the
    minutes in which the server loads.

    Raises:
        ConfigError: The port is taken.
    """
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((_LOOPBACK, port))
    except OSError as error:
        held.close()
        raise ConfigError(
            f"port {port} is taken: {error}", hint="leave out the port, and a free one is held for you"
        ) from error
    return held


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """Everything a server is started from; equal on all tries but for the ports."""

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

    Use `start`; the instance owns the process, the log file's folder and the held ports until `stop`.
    """

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        # Hexadecimal: SGLang turns its config file into arguments, and a key that began with a dash would be an option.
        self.api_key = secrets.token_hex(32)
        self.url = ""
        self.pid: int | None = None
        self.client: ServerClient | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._events = b""
        self._exit: dict[str, Any] | None = None
        self._ended_by_us = False
        self._pid_of_creator = os.getpid()
        self._log_start = 0  # an earlier try, or an earlier server, may have written to the same file

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
            health_timeout_s: Budget from the start of the process to the first healthy answer, in seconds, over all tries.
            heartbeat: Called every few seconds with the log's last line and the elapsed seconds.

        Raises:
            LaunchError: The server exited; with the tail of its log.
            DeadlineError: It was not healthy in time; with the tail of its log.
        """
        deadline = time.monotonic() + health_timeout_s
        for attempt in range(1, _LAUNCH_TRIES + 1):
            server = cls(spec)
            try:
                server._start_once(deadline, health_timeout_s, heartbeat)
                return server
            except BaseException as error:
                server.stop()
                retry = isinstance(error, LaunchError) and server.met_port_clash() and "port" not in spec.arguments
                if not retry or attempt == _LAUNCH_TRIES:
                    raise
                logger.warning(
                    "a port was taken while the server loaded; starting again (try %d of %d)",
                    attempt + 1,
                    _LAUNCH_TRIES,
                )
        raise AssertionError("unreachable")

    def _start_once(self, deadline: float, budget_s: float, heartbeat: Callable[[str, float], None] | None) -> None:
        spec = self.spec
        with ExitStack() as held:
            http = held.enter_context(hold_port(int(spec.arguments.get("port", 0))))
            internal = held.enter_context(hold_port(int(spec.arguments.get("nccl_port", 0))))
            # The key is kept out of the command line, which every user of the machine can read.
            private = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="tpcolocate-")))
            config = private / "server.yaml"
            config.touch(mode=0o600)
            config.write_text(json.dumps({"api-key": self.api_key, "admin-api-key": self.api_key}))  # JSON is YAML
            port = http.getsockname()[1]
            arguments = {
                **spec.arguments,
                "host": spec.arguments.get("host", _LOOPBACK),
                "port": port,
                "nccl_port": internal.getsockname()[1],
            }
            host = arguments["host"]
            self.url = f"http://{_LOOPBACK if host in _LOCAL_HOSTS else host}:{port}"
            self.client = ServerClient(self.url, api_key=self.api_key)
            self._spawn(
                [
                    sys.executable,
                    "-m",
                    "sglang.launch_server",
                    "--model-path",
                    spec.model_path,
                    "--config",
                    str(config),
                    *to_argv(arguments),
                ]  # fmt: skip
            )
            self._wait_healthy(deadline, budget_s, heartbeat)

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

    def _wait_healthy(self, deadline: float, budget_s: float, heartbeat: Callable[[str, float], None] | None) -> None:
        assert self.client is not None
        started = beat = logged = time.monotonic()
        listening = False
        with tqdm(
            desc="SGLang starts", bar_format="{desc} [{elapsed}] {postfix}", disable=None, leave=False, file=sys.stderr
        ) as progress:
            while True:
                if self.exited():
                    raise LaunchError(
                        f"the SGLang server exited with code {self.exit_code} while it started"
                        f"{_reason(self.log_tail())}",
                        hint=f"the whole log is {self.spec.log_path}",
                        details=self.log_tail(),
                    )
                listening = listening or self.client.is_listening(timeout_s=1.0)
                if listening and self.client.is_healthy(timeout_s=30.0):
                    logger.info("SGLang is ready at %s after %.1f s", self.url, time.monotonic() - started)
                    return
                now = time.monotonic()
                if now >= deadline:
                    raise DeadlineError(
                        f"the SGLang server was not healthy within {budget_s:g} s",
                        hint=f"raise health_timeout_s, or see the log {self.spec.log_path}",
                        url=self.url,
                        details=self.log_tail(),
                    )
                if now - beat >= 0.5:
                    beat = now
                    line = self.last_line()
                    progress.set_postfix_str(line[-80:])
                    if heartbeat is not None:
                        heartbeat(line, now - started)
                    if progress.disable and now - logged >= _PROGRESS_INTERVAL_S:
                        logged = now
                        logger.info("SGLang starts, %.0f s: %s", now - started, line)
                time.sleep(_HEALTH_INTERVAL_S if listening else _LISTENING_INTERVAL_S)

    def exited(self) -> bool:
        """Whether the server is gone; never blocks."""
        if self._supervisor is None:
            return True
        gone = self._supervisor.poll() is not None  # before its last words are read, not after
        self._read_events()
        return gone or self._exit is not None

    @property
    def exit_code(self) -> int | None:
        """The server's exit code (negative: a signal), None while it runs or when unknown."""
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
        """The last lines of the server's output, for people."""
        try:
            lines = self._log_lines()
        except FileNotFoundError:
            return "(no log was written)"
        return "\n".join(["--- last lines of the server's log ---", *lines[-_LOG_TAIL_LINES:]])

    def _log_lines(self) -> list[str]:
        with open(self.spec.log_path, "rb") as log:
            end = log.seek(0, os.SEEK_END)
            start = log.seek(max(end - _LOG_TAIL_BYTES, self._log_start))
            text = log.read().decode(errors="replace")
        if start > self._log_start:
            text = text.partition("\n")[2]  # a line without its beginning, which may be half of the key
        return text.replace(self.api_key, "***").splitlines()

    def met_port_clash(self) -> bool:
        """Whether this server's own output says that an address was taken."""
        try:
            text = "\n".join(self._log_lines()).lower()
        except FileNotFoundError:
            return False
        return "address already in use" in text or "eaddrinuse" in text

    def last_line(self) -> str:
        """The log's last line, shown while the server loads."""
        return self.log_tail().splitlines()[-1].strip()

    def remove_log(self) -> None:
        """Remove the log of a server that ended as it should; the one of a crash or a forced end is kept to be read."""
        if self._ended_by_us and self._exit is not None and not self._exit["forced"]:
            self.spec.log_path.unlink(missing_ok=True)
            try:
                self.spec.log_path.parent.rmdir()
            except OSError:
                pass  # logs of other servers are in it

    def stop(self) -> None:
        """SIGTERM, bounded wait, SIGKILL; the whole tree and its files in /dev/shm are gone afterwards.  Idempotent.

        Raises:
            EngineError: The supervisor did not confirm the end of the server in time; the message names the pid.
        """
        # A fork of the trainer inherits this object, not the server.
        if self._supervisor is None or os.getpid() != self._pid_of_creator:
            return
        self._ended_by_us = not self.exited()
        supervisor, self._supervisor = self._supervisor, None
        if self.client is not None:
            self.client.close()
        assert supervisor.stdin is not None and supervisor.stdout is not None
        try:
            try:
                supervisor.stdin.write(b"stop\n")
                supervisor.stdin.close()
            except BrokenPipeError:
                pass
            # grace for SIGTERM, then the supervisor's own bounded end of the tree
            try:
                supervisor.wait(self.spec.grace_s + 15.0)
            except subprocess.TimeoutExpired:
                supervisor.kill()  # takes the server along: PR_SET_PDEATHSIG
                supervisor.wait(5.0)
                raise EngineError(
                    f"the server (pid {self.pid}) had to be abandoned to the kernel",
                    hint="check with ps that it is gone",
                ) from None
            self._supervisor = supervisor
            self._read_events()
            self._supervisor = None
        finally:
            supervisor.stdout.close()


def _reason(tail: str) -> str:
    """The line of a Python traceback that names the error, if there is one."""
    for line in reversed(tail.splitlines()):
        head = line.strip().split(":", 1)[0]
        if (head.endswith(("Error", "Exception")) or ": error: " in line) and " " not in head.rsplit(".", 1)[
            -1
        ].strip():
            return f": {line.strip()}"
    return ""


def sglang_stub_needed() -> str | None:
    """The stand-in for SGLang's CUDA kernels, if this machine has none installed."""
    return str(_CPU_STUB) if find_spec("sgl_kernel") is None else None


__all__ = [
    "ServerProcess",
    "ServerSpec",
    "check_installed",
    "child_environment",
    "hold_port",
    "server_arguments",
    "sglang_stub_needed",
    "to_argv",
]
