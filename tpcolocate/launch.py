"""The launch of a slice's server: agreed on by its ranks, carried out by the owner, followed by the others."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpcolocate import devices, rendezvous
from tpcolocate.agreement import RankGroup
from tpcolocate.errors import ConfigError, RankLostError, RendezvousError
from tpcolocate.processes import this_process
from tpcolocate.server.api import ServerApi
from tpcolocate.server.arguments import check_installed, server_arguments
from tpcolocate.server.environment import child_environment, sglang_stub_needed
from tpcolocate.server.http import ServerClient
from tpcolocate.server.installed import find_installed
from tpcolocate.server.lifecycle import State
from tpcolocate.server.process import ServerProcess, ServerSpec
from tpcolocate.weights.sources.checkpoint import saved_version
from tpcolocate.weights.sources.model_spec import ModelSpec, check_not_quantised, read_spec

logger = logging.getLogger(__name__)

# The owner tells the others twice a second that the server is still loading; a health request in between can take
# half a minute.
_HEARTBEAT_TIMEOUT_S = 90.0
# How much longer than the owner a client waits for the rendezvous file.
_RENDEZVOUS_MARGIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Site:
    """Where a server is launched: a slice, seen by one of its ranks.

    Attributes:
        group: The ranks of the slice, in tp order.
        owner_rank: Global rank that launches.
        device: What this rank trains on.
        visible_devices: Device tokens of the slice, in tp order.
        shared: All TP ranks sit on one device.
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
class Order:
    """What one rank wants launched.

    Attributes:
        model: Folder or hub id.
        arguments: SGLang's, complete.
        env: Variables for the server alone.
        nonce: Of this launch; only the owner's counts.
    """

    model: str
    arguments: dict[str, Any]
    env: dict[str, str]
    nonce: str

    def difference(self, other: Order) -> str | None:
        if self.model != other.model:
            return f"model_path {self.model!r} and {other.model!r}"
        for name in sorted(set(self.arguments) | set(other.arguments)):
            mine, theirs = self.arguments.get(name), other.arguments.get(name)
            if mine != theirs:
                return f"{name}={mine!r} and {name}={theirs!r}"
        if self.env != other.env:
            return f"env {_digest(self.env)} and {_digest(other.env)}"
        return None


def _digest(env: Mapping[str, str]) -> str:
    """Names only: values may be secrets."""
    return f"({', '.join(sorted(env))}; {hashlib.sha256(json.dumps(env, sort_keys=True).encode()).hexdigest()[:8]})"


def agree_on_launch(
    site: Site,
    model: str,
    *,
    env: dict[str, str],
    server_args: Mapping[str, Any],
    health_timeout_s: float,
    closed: bool,
) -> Launch:
    """Check what is to be launched, and that every rank of the slice means the same.

    Collective: over the slice.

    Args:
        site: The slice.
        model: Folder or hub id.
        env: Variables for the server alone.
        server_args: The user's.
        health_timeout_s: As the user gave it.
        closed: Whether this rank has given its groups back already.

    Raises:
        ConfigError: The same on every rank.
    """
    arguments: dict[str, Any] = {}
    error: BaseException | None = None
    try:
        if closed:
            raise ConfigError("launch() after close()", hint="call init() again")
        if not health_timeout_s > 0:
            raise ConfigError(f"health_timeout_s={health_timeout_s!r} is no positive number of seconds")
        arguments = server_arguments(
            server_args, tp_size=site.tp_size, device_type=site.device.type, shared_device=site.shared
        )
        check_not_quantised(model)
        version = saved_version(model)
        if version is not None:
            arguments.setdefault("weight_version", version)
        if site.is_owner:  # the environment that counts is the owner's
            check_installed(arguments, find_installed({**os.environ, **env}))
    except BaseException as caught:
        error = caught
    order = Order(model, arguments, env, secrets.token_hex(8))
    orders = site.group.agree(error, order, what="agree on the launch")
    for rank, other in zip(site.group.ranks, orders):
        if (difference := orders[0].difference(other)) is not None:
            raise ConfigError(
                f"ranks {site.owner_rank} and {rank} launch different servers: {difference}",
                hint="every rank of a slice must pass the same arguments to launch()",
                slice_ranks=site.group.ranks,
            )
    return Launch(site, orders[0])  # the owner's, for the nonce


@dataclass(frozen=True, slots=True)
class Launched:
    """A server as the owner tells the others of it."""

    url: str
    api_key: str
    sglang_version: str
    state: State
    spec: ModelSpec | None
    weight_version: str


class Launch:
    """One launch on one rank, and what it leaves on this machine until `clean_up`.

    Args:
        site: The slice.
        order: On which all ranks agree.
    """

    def __init__(self, site: Site, order: Order) -> None:
        self.site = site
        self.order = order
        self._announced = rendezvous.path_for(site.job, site.slice_index)
        self.sync_folder = Path("/dev/shm") / f"tpcolocate-{os.getuid()}-{site.job}-{order.nonce}"
        """Where syncs have their sockets and files; private to this user."""

    def clean_up(self) -> None:
        """On the owner, once the server is gone."""
        rendezvous.withdraw(self._announced, self.order.nonce)
        shutil.rmtree(self.sync_folder, ignore_errors=True)

    # --- the owner -----------------------------------------------------------------------------------------------

    def carry_out(
        self, *, health_timeout_s: float, log_path: str | os.PathLike[str] | None
    ) -> tuple[Launched, ServerProcess, ServerApi]:
        """On the owner: start the server, announce it, tell the others; if anything fails, nothing is left running.

        Collective: over the slice, whose other ranks `follow`.
        """
        group = self.site.group
        beat = _Heartbeat(group)
        server: ServerProcess | None = None
        verbs: ServerApi | None = None
        launched: Launched | None = None
        error: BaseException | None = None
        try:
            spec = self._server_spec(log_path)
            self.sync_folder.mkdir(mode=0o700)
            server = ServerProcess.start(spec, health_timeout_s=health_timeout_s, heartbeat=beat)
            assert server.client is not None
            verbs = ServerApi(server.client)
            launched = self._launched(server.url, server.api_key, verbs.info)
            check_not_quantised(
                self.order.model
            )  # again: what the server fetched from the hub could not be seen before
            rendezvous.announce(self._announced, self._announcement(launched))
        except BaseException as caught:
            error = caught
        try:
            beat.finish()
            if beat.broken is None:
                group.agree(error, launched, what="launch the server")
        except BaseException:
            if server is not None:
                server.stop()
            self.clean_up()
            raise
        if error is not None:
            raise error
        assert launched is not None and server is not None and verbs is not None
        if beat.broken is not None:
            logger.warning(
                "the slice's group failed while the server loaded; clients find it in %s: %s",
                self._announced,
                beat.broken,
            )
        return launched, server, verbs

    def _server_spec(self, log_path: str | os.PathLike[str] | None) -> ServerSpec:
        site, order = self.site, self.order
        kind = "hip" if torch.version.hip else "npu" if site.device.type == "npu" else "cuda"
        visibility = devices.server_environment(site.visible_devices, kind=kind) if site.visible_devices else {}
        environment, warnings = child_environment(
            os.environ,
            visibility=visibility,
            user=order.env,
            device_type=site.device.type,
            tp_size=site.tp_size,
            cores=sorted(os.sched_getaffinity(0)),
            stub=sglang_stub_needed() if site.device.type == "cpu" else None,
        )
        for warning in warnings:
            logger.warning("%s", warning)
        pid, started = this_process()
        return ServerSpec(
            model_path=order.model,
            arguments=order.arguments,
            environment=environment,
            log_path=Path(log_path) if log_path is not None else self._default_log_path(),
            owner_pid=pid,
            owner_started=started,
            unlink=(str(self._announced), str(self.sync_folder)),
        )

    def _default_log_path(self) -> Path:
        name = f"{self.site.job}-{self.site.slice_index}-{self.order.nonce}.log"
        return Path(tempfile.gettempdir()) / f"tpcolocate-{os.getuid()}" / name

    def _announcement(self, launched: Launched) -> rendezvous.Announcement:
        pid, started = this_process()
        return rendezvous.Announcement(
            url=launched.url,
            api_key=launched.api_key,
            job=self.site.job,
            slice_ranks=self.site.group.ranks,
            pid=pid,
            started=started,
            nonce=self.order.nonce,
        )

    # --- the others ----------------------------------------------------------------------------------------------

    def follow(self, *, health_timeout_s: float) -> Launched:
        """On a client: hear from the owner, or read of the server in its file where the slice's group has failed.

        Collective: over the slice, whose owner has to `carry_out`.
        """
        group = self.site.group
        try:
            while group.all_gather("follow", what="wait for the server", timeout_s=_HEARTBEAT_TIMEOUT_S)[0] != "done":
                pass
            outcome: list[Launched | None] = group.agree(None, None, what="launch the server")
            assert outcome[0] is not None
            return outcome[0]
        except RankLostError as lost:
            if not group.members[0].is_running():
                raise
            try:
                found = rendezvous.wait(
                    self._announced,
                    nonce=self.order.nonce,
                    is_healthy=answers,
                    timeout_s=health_timeout_s + _RENDEZVOUS_MARGIN_S,
                )
            except RendezvousError as error:
                lost.add_note(f"the rendezvous file did not help: {error}")
                raise lost from error
            logger.warning("found the server by the file %s after the slice's group failed: %s", self._announced, lost)
            client = ServerClient(found.url, api_key=found.api_key)
            try:
                info = client.get("/server_info", timeout_s=_RENDEZVOUS_MARGIN_S)
            finally:
                client.close()
            return self._launched(found.url, found.api_key, info)

    def _launched(self, url: str, api_key: str, info: Mapping[str, Any]) -> Launched:
        return Launched(
            url=url,
            api_key=api_key,
            sglang_version=str(info["version"]),
            state=_initial_state(info, self.site.device.type),
            spec=read_spec(self.order.model),
            weight_version=str(info.get("weight_version", "default")),
        )


class _Heartbeat:
    """Tells the clients that the server still loads, and notices when one of them is gone."""

    def __init__(self, group: RankGroup) -> None:
        self.group = group
        self.broken: RankLostError | None = None

    def __call__(self, line: str, elapsed_s: float) -> None:
        self._send("loading")

    def finish(self) -> None:
        self._send("done")

    def _send(self, word: str) -> None:
        if self.broken is not None:
            return
        try:
            self.group.all_gather(word, what="wait for the server", timeout_s=_HEARTBEAT_TIMEOUT_S)
        except RankLostError as error:
            # A dead client ends the launch.  If all live, only the group failed, and the file takes its place.
            if not all(member.is_running() for member in self.group.members):
                raise
            self.broken = error


def _initial_state(info: Mapping[str, Any], device_type: str) -> State:
    saver = bool(info.get("enable_memory_saver"))
    # SGLang has no memory saver on the CPU: release and resume answer 200 there and change nothing.
    on_cpu = device_type == "cpu"
    return State(
        frees_memory=saver or on_cpu,
        keeps_weights=bool(info.get("enable_weights_cpu_backup")) or (on_cpu and not saver),
    )


def answers(announcement: rendezvous.Announcement) -> bool:
    """Whether somebody listens where an announcement says."""
    client = ServerClient(announcement.url, api_key=announcement.api_key)
    try:
        return client.is_listening(timeout_s=5.0)
    finally:
        client.close()


__all__ = ["Launch", "Site", "agree_on_launch", "answers"]
