"""Launch of a slice's server: its ranks agree, the owner starts it, the clients wait for it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpcolocate import devices, rendezvous
from tpcolocate.agreement import RankGroup
from tpcolocate.checks import check_path, check_text, check_type
from tpcolocate.deadline import check_timeout
from tpcolocate.errors import ConfigError, RankLostError, RendezvousError, shown
from tpcolocate.processes import this_process
from tpcolocate.runtime_folder import RuntimeFolder, folder_of, read_owner, remove_remains
from tpcolocate.server.api import ServerApi
from tpcolocate.server.arguments import check_installed, check_model_path, server_arguments
from tpcolocate.server.environment import child_environment, compile_cache, sglang_stub_needed
from tpcolocate.server.evidence import Evidence
from tpcolocate.server.http import ServerClient
from tpcolocate.server.installed import find_installed
from tpcolocate.server.lifecycle import State
from tpcolocate.server.process import ServerProcess, ServerSpec
from tpcolocate.weights.sources.checkpoint import saved_version
from tpcolocate.weights.sources.model_spec import ModelSpec, check_not_quantised, read_spec

logger = logging.getLogger(__name__)

# While the server loads, the owner sends the clients a heartbeat twice a second; a health request in between can take half
# a minute.
_HEARTBEAT_TIMEOUT_S = 90.0
# How much longer than the owner a client waits for the rendezvous file.
_RENDEZVOUS_MARGIN_S = 30.0


@dataclass(frozen=True, slots=True)
class TpSlice:
    """A tp slice, as one of its ranks sees it.

    Attributes:
        group: The ranks of the slice, in tp order.
        owner_rank: Global rank that launches the server.
        device: Training device of this rank.
        visible_devices: Device tokens of the slice, in tp order.
        shared: All TP ranks share one device.
        job: Identity of the job.
        slice_index: Number of the slice.
    """

    group: RankGroup
    owner_rank: int
    device: torch.device
    visible_devices: tuple[str, ...]
    shared: bool
    job: str
    slice_index: int

    @property
    def tp_size(self) -> int:
        return len(self.group)

    @property
    def is_owner(self) -> bool:
        return self.group.rank == self.owner_rank


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """What one rank passes to `Colocation.launch`.

    Attributes:
        model_path: Folder or hub id.
        arguments: All of SGLang's arguments.
        env: Environment variables for the server alone.
        nonce: Identity of this launch; only the owner's counts.
    """

    model_path: str
    arguments: dict[str, Any]
    env: dict[str, str]
    nonce: str

    def difference(self, other: LaunchRequest) -> str | None:
        """Describe the first difference that matters; None if there is none."""
        if self.model_path != other.model_path:
            return f"model_path {self.model_path!r} and {other.model_path!r}"
        for name in sorted(set(self.arguments) | set(other.arguments)):
            value, other_value = self.arguments.get(name), other.arguments.get(name)
            if value != other_value:
                return f"{name}={value!r} and {name}={other_value!r}"
        if self.env != other.env:
            return f"env {_digest(self.env)} and {_digest(other.env)}"
        return None


def _digest(env: Mapping[str, str]) -> str:
    """Return the names and a digest: values may be secrets."""
    return f"({', '.join(sorted(env))}; {hashlib.sha256(json.dumps(env, sort_keys=True).encode()).hexdigest()[:8]})"


def agree_on_launch(
    tp_slice: TpSlice,
    model_path: str | os.PathLike[str],
    *,
    env: Mapping[str, str],
    server_args: Mapping[str, Any],
    health_timeout_s: float,
    log_path: str | os.PathLike[str] | None = None,
    closed: bool,
) -> Launch:
    """Check the arguments of a launch, and that all ranks of the slice pass the same.

    Collective: over the slice.

    Args:
        tp_slice: The slice.
        model_path: Folder or hub id.
        env: Environment variables for the server alone.
        server_args: The user's arguments for SGLang.
        health_timeout_s: As passed by the user, in seconds.
        log_path: As passed by the user.
        closed: Whether this rank's `Colocation` is closed.

    Raises:
        ConfigError: An argument is invalid or differs between ranks; the same on every rank.
        RankLostError: A rank of the slice died or is in another call.
    """
    arguments: dict[str, Any] = {}
    error: BaseException | None = None
    try:
        if closed:
            raise ConfigError("launch() after close()", hint="call init() again")
        check_timeout(health_timeout_s, name="health_timeout_s")
        check_path("model_path", model_path)
        model_path = os.fspath(model_path)
        if log_path is not None:
            check_path("log_path", log_path)
        env = _checked_environment(env)
        arguments = server_arguments(
            server_args, tp_size=tp_slice.tp_size, device_type=tp_slice.device.type, shared_device=tp_slice.shared
        )
        check_not_quantised(model_path)
        version = saved_version(model_path)
        if version is not None:
            arguments.setdefault("weight_version", version)
        if tp_slice.is_owner:  # its environment is the server's
            check_model_path(model_path)
            check_installed(arguments, find_installed({**os.environ, **env}))
    except BaseException as caught:
        error = caught
    request = (
        LaunchRequest(str(model_path), arguments, dict(env), f"{os.getpid()}-{secrets.token_hex(8)}")
        if error is None
        else None
    )
    requests = [one for one in tp_slice.group.agree(error, request, what="agree on the launch") if one is not None]
    for rank, other in zip(tp_slice.group.ranks, requests):
        if (difference := requests[0].difference(other)) is not None:
            raise ConfigError(
                f"ranks {tp_slice.owner_rank} and {rank} launch different servers: {difference}",
                hint="every rank of a slice must pass the same arguments to launch()",
                slice_ranks=tp_slice.group.ranks,
            )
    return Launch(tp_slice, requests[0])  # the owner's, because of the nonce


def _checked_environment(env: object) -> dict[str, str]:
    """Return environment variables for the server.

    Raises:
        ConfigError: Something that no environment can have.
    """
    found: Mapping[object, object] = check_type("env", env, Mapping, expected="a mapping of names to values")
    checked: dict[str, str] = {}
    for key, value in found.items():
        name = check_text("a name in env", key)
        if "=" in name:
            raise ConfigError(f"env has a name with an equals sign: {shown(name)}")
        # Not shown: it may be a secret.
        if not isinstance(value, str):
            raise ConfigError(f"env[{name!r}] must be a string, got a {type(value).__name__}")
        try:
            is_valid = b"\0" not in os.fsencode(value)
        except UnicodeEncodeError:
            is_valid = False
        if not is_valid:
            raise ConfigError(f"env[{name!r}] cannot be the value of an environment variable")
        checked[name] = value
    return checked


@dataclass(frozen=True, slots=True)
class RunningServer:
    """What all ranks need to know about a running server."""

    url: str
    api_key: str
    sglang_version: str
    state: State
    spec: ModelSpec | None
    weight_version: str


class Launch:
    """One launch on one rank, and the files of it that remain until `clean_up`.

    Args:
        tp_slice: The slice.
        request: Agreed on by all ranks.
    """

    def __init__(self, tp_slice: TpSlice, request: LaunchRequest) -> None:
        self.tp_slice = tp_slice
        self.request = request
        self._announcement_path = rendezvous.path_for(request.nonce)
        self._runtime: RuntimeFolder | None = None
        self.sync_folder = folder_of(request.nonce)
        """Sockets and files of weight syncs; readable by this user alone."""

    def clean_up(self) -> None:
        """Remove the files of the launch but the log.  On the owner, once the server has exited."""
        if self._runtime is not None:
            self._runtime.remove()

    def evidence(self, server: ServerProcess | None) -> Evidence:
        """Return the evidence of why the server does not answer, for the time when it does not.

        Args:
            server: The server on the owner; None on clients, which read the log and the supervisor's record.
        """
        if server is not None:
            return server.evidence
        owner = read_owner(self.sync_folder)
        log_path = Path("unknown" if owner is None else owner.log_path)
        return Evidence(log_path, self.sync_folder / "processes.json")

    # --- the owner -----------------------------------------------------------------------------------------------

    def start_server(
        self, *, health_timeout_s: float, log_path: str | os.PathLike[str] | None
    ) -> tuple[RunningServer, ServerProcess, ServerApi]:
        """Start the server on the owner and report it to the clients; after an error nothing is left running.

        Collective: over the slice, whose other ranks call `wait_for_server`.

        Args:
            health_timeout_s: From the start of the process to its first generated token, in seconds.
            log_path: As for `Colocation.launch`.

        Raises:
            ConfigError, LaunchError, DeadlineError, RankLostError: As `Colocation.launch`.
        """
        group = self.tp_slice.group
        beat = _Heartbeat(group)
        server: ServerProcess | None = None
        api: ServerApi | None = None
        running: RunningServer | None = None
        error: BaseException | None = None
        try:
            spec = self._server_spec(log_path)
            server = ServerProcess.start(spec, health_timeout_s=health_timeout_s, heartbeat=beat)
            assert server.client is not None
            api = ServerApi(server.client)
            running = self._running_server(server.url, server.api_key, api.info)
            check_not_quantised(self.request.model_path)  # again: now the server has fetched it from the hub
            rendezvous.announce(self._announcement_path, self._announcement(running))
        except BaseException as caught:
            error = caught
        try:
            beat.finish()
            if beat.broken is None:
                group.agree(error, running, what="launch the server")
            elif error is not None:
                raise error
        except BaseException:
            if server is not None:
                server.stop()
            self.clean_up()
            raise
        assert running is not None and server is not None and api is not None
        if beat.broken is not None:
            logger.warning(
                "the slice's process group failed while the server loaded; clients read its URL from %s: %s",
                self._announcement_path,
                beat.broken,
            )
        return running, server, api

    def _server_spec(self, log_path: str | os.PathLike[str] | None) -> ServerSpec:
        tp_slice, request = self.tp_slice, self.request
        remove_remains()
        self._runtime = runtime = RuntimeFolder.make(
            request.nonce, log_path=None if log_path is None else Path(log_path)
        )
        kind = "hip" if torch.version.hip else "npu" if tp_slice.device.type == "npu" else "cuda"
        visibility = devices.server_environment(tp_slice.visible_devices, kind=kind) if tp_slice.visible_devices else {}
        environment, warnings = child_environment(
            os.environ,
            visibility=visibility,
            user=request.env,
            device_type=tp_slice.device.type,
            tp_size=tp_slice.tp_size,
            cores=sorted(os.sched_getaffinity(0)),
            stub=sglang_stub_needed() if tp_slice.device.type == "cpu" else None,
            host=str(request.arguments.get("host", "")),
            temporary=str(runtime.server_temporary),
            compile_cache=compile_cache(tempfile.gettempdir()),
        )
        for warning in warnings:
            logger.warning("%s", warning)
        pid, started = this_process()
        return ServerSpec(
            model_path=request.model_path,
            arguments=request.arguments,
            environment=environment,
            runtime=runtime,
            owner_pid=pid,
            owner_started=started,
        )

    def _announcement(self, running: RunningServer) -> rendezvous.Announcement:
        pid, started = this_process()
        return rendezvous.Announcement(
            url=running.url,
            api_key=running.api_key,
            job=self.tp_slice.job,
            slice_index=self.tp_slice.slice_index,
            slice_ranks=self.tp_slice.group.ranks,
            pid=pid,
            started=started,
            nonce=self.request.nonce,
            log_path="" if self._runtime is None else str(self._runtime.log_path),
        )

    # --- clients -------------------------------------------------------------------------------------------------

    def wait_for_server(self, *, health_timeout_s: float) -> RunningServer:
        """Wait on a client for the owner's report, or for the rendezvous file if the slice's group has failed.

        Collective: over the slice, whose owner calls `start_server`.

        Args:
            health_timeout_s: As on the owner, in seconds.

        Raises:
            ConfigError, LaunchError, DeadlineError, RankLostError: As `Colocation.launch`.
        """
        group = self.tp_slice.group
        try:
            while group.all_gather("follow", what="wait for the server", timeout_s=_HEARTBEAT_TIMEOUT_S)[0] != "done":
                pass
            outcome: list[RunningServer | None] = group.agree(None, None, what="launch the server")
            assert outcome[0] is not None
            return outcome[0]
        except RankLostError as lost:
            if not group.members[0].is_running():
                raise
            try:
                found = rendezvous.wait(
                    self._announcement_path,
                    nonce=self.request.nonce,
                    is_healthy=is_listening,
                    timeout_s=health_timeout_s + _RENDEZVOUS_MARGIN_S,
                )
            except RendezvousError as error:
                lost.add_note(f"the rendezvous file cannot be used: {error}")
                raise lost from error
            logger.warning(
                "found the server in %s after the slice's process group failed: %s", self._announcement_path, lost
            )
            client = ServerClient(found.url, api_key=found.api_key)
            try:
                info = client.get("/server_info", timeout_s=_RENDEZVOUS_MARGIN_S)
            finally:
                client.close()
            return self._running_server(found.url, found.api_key, info)

    def _running_server(self, url: str, api_key: str, info: Mapping[str, Any]) -> RunningServer:
        return RunningServer(
            url=url,
            api_key=api_key,
            sglang_version=str(info["version"]),
            state=_initial_state(info, self.tp_slice.device.type),
            spec=read_spec(self.request.model_path),
            weight_version=str(info.get("weight_version", "default")),
        )


class _Heartbeat:
    """Reports to the clients that the server still loads, and detects when one of them has exited."""

    def __init__(self, group: RankGroup) -> None:
        self.group = group
        self.broken: RankLostError | None = None

    def __call__(self, line: str, elapsed_s: float) -> None:
        self._send("loading")

    def finish(self) -> None:
        self._send("done")

    def _send(self, status: str) -> None:
        if self.broken is not None:
            return
        try:
            self.group.all_gather(status, what="wait for the server", timeout_s=_HEARTBEAT_TIMEOUT_S)
        except RankLostError as error:
            # A dead client ends the launch.  If all are alive, only the group failed, and clients use the file.
            if not all(member.is_running() for member in self.group.members):
                raise
            self.broken = error


def _initial_state(info: Mapping[str, Any], device_type: str) -> State:
    saver = bool(info.get("enable_memory_saver"))
    # SGLang has no memory saver on the CPU: release and resume return 200 there and do nothing.
    on_cpu = device_type == "cpu"
    return State(
        frees_memory=saver or on_cpu,
        keeps_weights=bool(info.get("enable_weights_cpu_backup")) or (on_cpu and not saver),
    )


def is_listening(announcement: rendezvous.Announcement) -> bool:
    """Return whether the announced server accepts connections."""
    client = ServerClient(announcement.url, api_key=announcement.api_key)
    try:
        return client.is_listening(timeout_s=5.0)
    finally:
        client.close()


__all__ = ["Launch", "TpSlice", "agree_on_launch", "is_listening"]
