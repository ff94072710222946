"""`init` and what it returns: a rank's place in its tp slice, and the launch of the slice's server.

Everything that can be decided is decided by pure functions from facts that all ranks have exchanged, so that every
rank comes to the same answer or the same error; the rest is carried out by the owner and told to the others.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from tpcolocate import devices, rendezvous, roles
from tpcolocate._version import __version__
from tpcolocate.agreement import RankGroup
from tpcolocate.engine.arguments import RECEIVER, check_installed, server_arguments
from tpcolocate.engine.client import ServerClient
from tpcolocate.engine.environment import child_environment, sglang_stub_needed
from tpcolocate.engine.installed import find_installed
from tpcolocate.engine.launch import ServerProcess, ServerSpec
from tpcolocate.engine.state import State
from tpcolocate.engine.verbs import Verbs
from tpcolocate.errors import ConfigError, DeviceError, LayoutError, RankLostError, RendezvousError
from tpcolocate.groups import Host, Member, exchange, make_group, plan_slices
from tpcolocate.processes import this_process
from tpcolocate.rollout.client import Client
from tpcolocate.rollout.engine import Engine
from tpcolocate.weights.checkpoint import saved_version
from tpcolocate.weights.spec import ModelSpec, check_not_quantised, read_spec
from tpcolocate.weights.sync import WeightSync

logger = logging.getLogger(__name__)

# The owner tells the others twice a second that the server is still loading; a health request in between can take
# half a minute.
_HEARTBEAT_TIMEOUT_S = 90.0
# How much longer than the owner a client waits for the rendezvous file.
_RENDEZVOUS_MARGIN_S = 30.0
_WARM_UP_S = 30.0
_inits = itertools.count()


def init(
    tp_size: int = 1,
    *,
    device: torch.device | str | None = None,
    timeout_s: float = 600.0,
    allow_shared_devices: bool = False,
) -> Colocation:
    """Cut the ranks of the job into tp slices, and say what this rank is in its own.

    Collective: over the default process group; every rank calls it, with the same `tp_size`.  Without
    torch.distributed a single process may call it with ``tp_size=1``.

    Args:
        tp_size: GPUs per SGLang server.  1 gives every rank a server of its own and makes no process group.
        device: What this rank trains on; an index counts within this process's CUDA_VISIBLE_DEVICES.  Default: the
            current CUDA device, or the CPU where there is none.
        timeout_s: How long a rank waits for the others of its slice in one call, in seconds.
        allow_shared_devices: Permit that all ranks of a slice sit on one GPU.  For test rigs.

    Returns:
        This rank's place; close it (or use it as a context manager) when done.

    Raises:
        ConfigError: `tp_size` is no positive integer, or there is no process group for it.
        LayoutError: The ranks cannot be cut into slices: they disagree on `tp_size`, it does not divide their number,
            or a slice would span hosts or containers.
        DeviceError: A device is invalid, not visible, or held by two ranks.
        RankLostError: Not all ranks called `init` within `timeout_s`.

        All of them on every rank, before anything was started.
    """
    distributed = dist.is_available() and dist.is_initialized()
    error = _check_arguments(tp_size, timeout_s)
    if not distributed:
        if error is not None:
            raise error
        if tp_size > 1:
            raise ConfigError(
                f"tp_size={tp_size} needs torch.distributed, which is not initialised",
                hint="start the script with torchrun and call torch.distributed.init_process_group() before init()",
            )
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    place, here, trouble = _look_around(device)
    pid, started = this_process()
    member = Member(
        rank=rank,
        world_size=world_size,
        tp_size=tp_size if isinstance(tp_size, int) else -1,
        host=Host.here(),
        pid=pid,
        started=started,
        facts={**here, "job": f"{pid}-{secrets.token_hex(4)}", "version": __version__, "shared": allow_shared_devices},
        error=_told(error if error is not None else trouble),
    )
    if world_size == 1:
        members = [member]
    else:
        # A fresh prefix per call: what an earlier init() left in the store must not be read as this one's.
        store = dist.PrefixStore(f"tpcolocate/init/{next(_inits)}", dist.distributed_c10d._get_default_store())
        members = exchange(store, member, timeout_s=timeout_s)
    plan = _plan(members)
    index = next(i for i, r in enumerate(plan) if rank in r.ranks)
    group = world = None
    if tp_size > 1:
        for i, slice_roles in enumerate(plan):
            made = make_group(slice_roles.ranks, timeout_s=timeout_s, description=f"tpcolocate slice {i}")
            group = made if i == index else group
        world = make_group(range(world_size), timeout_s=timeout_s, description="tpcolocate all slices")
    mine = plan[index]
    return Colocation(
        roles=mine,
        slice_index=index,
        device=place,
        job=members[0].facts["job"],
        tp_ranks={r: tp_rank for of_slice in plan for tp_rank, r in enumerate(of_slice.ranks)},
        group=RankGroup([members[r] for r in mine.ranks], rank=rank, group=group, timeout_s=timeout_s),
        world=None if world is None else RankGroup(members, rank=rank, group=world, timeout_s=timeout_s),
        world_size=world_size,
    )


def _check_arguments(tp_size: object, timeout_s: object) -> ConfigError | None:
    if not isinstance(tp_size, int) or isinstance(tp_size, bool) or tp_size < 1:
        return ConfigError(f"tp_size={tp_size!r} is no positive integer", hint="GPUs per server: 1, 2, 4, ...")
    if not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        return ConfigError(f"timeout_s={timeout_s!r} is no positive number of seconds")
    return None


def _told(error: ConfigError | None) -> dict[str, str | None] | None:
    """An error as the exchange carries it."""
    return None if error is None else {"kind": type(error).__name__, "message": error.message, "hint": error.hint}


def _look_around(device: torch.device | str | None) -> tuple[torch.device, dict[str, Any], ConfigError | None]:
    """This rank's device, what the others need to know of it (JSON types), and what is wrong with it."""
    place = torch.device("cpu")
    facts: dict[str, Any] = {"kind": "cpu", "physical": None, "order": None}
    try:
        if device is None:
            place = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else place
        else:
            place = torch.device(device)
        if place.type == "cpu":
            return place, facts, None
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", torch.cuda.current_device())
        kind = "npu" if place.type == "npu" else "hip" if torch.version.hip else "cuda"
        physical = devices.resolve(place.index, os.environ, kind=kind, inventory=devices.read_inventory())
        if kind == "cuda" and torch.cuda.is_available():
            physical = _confirmed(physical, place)
        facts.update(kind=kind, physical=asdict(physical), order=devices.device_order(os.environ))
    except ConfigError as error:
        return place, facts, error
    except (RuntimeError, ValueError, AssertionError) as error:  # torch's, for what is no device
        return (
            place,
            facts,
            DeviceError(f"device {device!r}: {error}", hint='for example torch.device("cuda", local_rank)'),
        )
    return place, facts, None


def _confirmed(physical: devices.PhysicalDevice, place: torch.device) -> devices.PhysicalDevice:
    """Compare with the UUID of the GPU that CUDA really gives this process under that index."""
    uuid = f"GPU-{torch.cuda.get_device_properties(place).uuid}"
    if physical.uuid is not None and physical.uuid.startswith("GPU-") and physical.uuid.lower() != uuid.lower():
        raise DeviceError(
            f"{place} is {uuid}, but CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r} says {physical.uuid}",
            hint="the variable was changed after CUDA had started, or CUDA_DEVICE_ORDER differs from PCI order",
        )
    return physical if physical.uuid is not None else replace(physical, uuid=uuid)


def _plan(members: Sequence[Member]) -> list[roles.Roles]:
    """Slices and roles from everybody's facts.  Pure."""
    slices = plan_slices(members)
    known = [_rank_device(member) for member in members]
    shared = all(member.facts["shared"] for member in members)
    if members[0].tp_size > 1:
        _check_alike(members)
    if not shared:
        roles.check_exclusive(known)
    return [roles.assign([known[rank] for rank in ranks], allow_shared_devices=shared) for ranks in slices]


def _rank_device(member: Member) -> roles.RankDevice:
    physical = member.facts["physical"]
    return roles.RankDevice(
        rank=member.rank,
        host=member.host.label,
        device=None if physical is None else devices.PhysicalDevice(**physical),
    )


def _check_alike(members: Sequence[Member]) -> None:
    for fact, what, hint in (
        ("version", "versions of tpcolocate", "install one version on all hosts"),
        ("kind", "kinds of device", "train on one kind of device"),
        (
            "order",
            "CUDA_DEVICE_ORDER",
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID for all ranks: without agreement device numbers mean different GPUs",
        ),
    ):
        values = {str(member.facts[fact]): member.rank for member in reversed(members)}
        if len(values) > 1:
            said = ", ".join(
                f"{value} on rank {rank}" for value, rank in sorted(values.items(), key=lambda item: item[1])
            )
            raise LayoutError(f"the ranks have different {what}: {said}", hint=hint)


class Colocation:
    """A rank's place in its tp slice; made by `init`.

    Attributes:
        rank: Global rank.
        world_size: Number of ranks of the job.
        tp_size: Ranks per slice, and TP ranks of its server.
        tp_rank: Position in the slice; TP rank k of the server runs on the device of the training rank with tp_rank k.
        slice_ranks: Global ranks of the slice, in tp order.
        owner_rank: The one on the lowest physical device; it launches the server.
        is_owner: Whether that is this rank.
        slice_index: Number of the slice, from 0.
        device: What this rank trains on.
        visible_devices: Device tokens of the slice in tp order: what the server, and it alone, will see.
        group: The slice's process group (gloo); None with tp_size 1.
        job: Identity of the job, the same on all ranks: the pid of rank 0 and something random.
    """

    def __init__(
        self,
        *,
        roles: roles.Roles,
        slice_index: int,
        device: torch.device,
        job: str,
        tp_ranks: Mapping[int, int],
        group: RankGroup,
        world: RankGroup | None,
        world_size: int,
    ) -> None:
        self.rank = group.rank
        self.world_size = world_size
        self.tp_size = len(roles.ranks)
        self.tp_rank = roles.ranks.index(group.rank)
        self.slice_ranks = roles.ranks
        self.owner_rank = roles.owner_rank
        self.is_owner = roles.owner_rank == group.rank
        self.slice_index = slice_index
        self.device = device
        self.visible_devices = roles.visible_devices
        self.job = job
        self._shared = roles.shared
        self._tp_ranks = tp_ranks
        self._slice = group
        self._world = world
        self._engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._closed = False

    @property
    def group(self) -> dist.ProcessGroup | None:
        return self._slice.group

    def __repr__(self) -> str:
        role = "owner" if self.is_owner else f"client of rank {self.owner_rank}"
        where = f", devices {','.join(self.visible_devices)}" if self.visible_devices else ""
        return f"Colocation(rank {self.rank}, {role}, tp_rank {self.tp_rank} of slice {','.join(map(str, self.slice_ranks))}{where})"

    def launch(
        self,
        model_path: str | os.PathLike[str],
        *,
        health_timeout_s: float = 600.0,
        log_path: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        **server_args: Any,
    ) -> Engine:
        """Start the slice's SGLang server and connect every rank to it.

        Collective: over the slice.

        Args:
            model_path: Checkpoint folder or hub id, as for SGLang.
            health_timeout_s: From the start of the process until it has generated a token, in seconds.
            log_path: The server's output; default: a file in the temporary folder, removed after a clean shutdown.
            env: Variables for the server alone, on top of this rank's environment.
            server_args: SGLang's own arguments by their own names (``mem_fraction_static=0.4``); they win over what
                this library sets (``disable_custom_all_reduce=True`` for tp_size > 1, and what a CPU needs).

        Returns:
            The engine, on every rank; a context manager that shuts it down.

        Raises:
            ConfigError: Arguments that cannot work, that the installed SGLang lacks, or that differ between the ranks.
            LaunchError, DeadlineError: The server did not come up; the log's tail is in the error.
            RankLostError: A rank of the slice died.

            The same on every rank of the slice, at once; nothing is left running.
        """
        model = os.fspath(model_path)
        order = self._agree_on_launch(model, health_timeout_s, dict(env or {}), server_args)
        path = rendezvous.path_for(self.job, self.slice_index)
        if self.is_owner:
            result, server, verbs = self._launch_owner(order, path, health_timeout_s, log_path)
        else:
            result, server, verbs = self._follow_owner(order, path, health_timeout_s), None, None
        probe = ServerClient(result.url, api_key=result.api_key)
        sync = WeightSync(
            self._slice,
            device=self.device,
            owner_rank=self.owner_rank,
            server=verbs,
            spec=result.spec,
            loader=RECEIVER,
            tp_ranks=self._tp_ranks,
            folder=self._sync_folder(order),
            reader_is_alive=lambda: probe.is_listening(timeout_s=5.0) if server is None else not server.exited(),
        )
        sync.warm_up(timeout_s=_WARM_UP_S)

        def on_shutdown() -> None:
            probe.close()
            if self.is_owner:
                rendezvous.withdraw(path, order.nonce)
                shutil.rmtree(self._sync_folder(order), ignore_errors=True)
                if log_path is None and server is not None:
                    server.remove_log()

        engine = Engine(
            group=self._slice,
            world=self._world,
            owner_rank=self.owner_rank,
            url=result.url,
            api_key=result.api_key,
            state=result.state,
            sync=sync,
            verbs=verbs,
            server=server,
            on_shutdown=on_shutdown,
            sglang_version=result.sglang_version,
            model_path=model,
            weight_version=result.weight_version,
        )
        self._engines.add(engine)
        return engine

    def _agree_on_launch(
        self, model: str, health_timeout_s: float, env: dict[str, str], server_args: dict[str, Any]
    ) -> _Order:
        arguments: dict[str, Any] = {}
        error: BaseException | None = None
        try:
            if self._closed:
                raise ConfigError("launch() after close()", hint="call init() again")
            if not health_timeout_s > 0:
                raise ConfigError(f"health_timeout_s={health_timeout_s!r} is no positive number of seconds")
            arguments = server_arguments(
                server_args, tp_size=self.tp_size, device_type=self.device.type, shared_device=self._shared
            )
            check_not_quantised(model)
            version = saved_version(model)
            if version is not None:
                arguments.setdefault("weight_version", version)
            if self.is_owner:  # the environment that counts is the owner's
                check_installed(arguments, find_installed({**os.environ, **env}))
        except BaseException as caught:
            error = caught
        order = _Order(model, arguments, env, secrets.token_hex(8))
        orders = self._slice.agree(error, order, what="agree on the launch")
        for rank, other in zip(self.slice_ranks, orders):
            if (difference := orders[0].difference(other)) is not None:
                raise ConfigError(
                    f"ranks {self.owner_rank} and {rank} launch different servers: {difference}",
                    hint="every rank of a slice must pass the same arguments to launch()",
                    slice_ranks=self.slice_ranks,
                )
        return orders[0]  # the owner's, for the nonce

    def _launch_owner(
        self, order: _Order, path: Path, health_timeout_s: float, log_path: str | os.PathLike[str] | None
    ) -> tuple[_Launched, ServerProcess, Verbs]:
        beat = _Heartbeat(self._slice)
        server: ServerProcess | None = None
        verbs: Verbs | None = None
        launched: _Launched | None = None
        error: BaseException | None = None
        try:
            spec = self._server_spec(order, path, log_path)
            self._sync_folder(order).mkdir(mode=0o700)
            server = ServerProcess.start(spec, health_timeout_s=health_timeout_s, heartbeat=beat)
            assert server.client is not None
            verbs = Verbs(server.client)
            launched = _Launched(
                url=server.url,
                api_key=server.api_key,
                sglang_version=verbs.release.version,
                state=_initial_state(verbs.info, self.device.type),
                spec=read_spec(order.model),
                weight_version=_version_of(verbs.info),
            )
            check_not_quantised(order.model)  # again: what the server has fetched from the hub could not be seen before
            rendezvous.announce(path, self._announcement(order, launched))
        except BaseException as caught:
            error = caught
        try:
            beat.finish()
            if beat.broken is None:
                self._slice.agree(error, launched, what="launch the server")
        except BaseException:
            if server is not None:
                server.stop()
            rendezvous.withdraw(path, order.nonce)
            shutil.rmtree(self._sync_folder(order), ignore_errors=True)
            raise
        if error is not None:
            raise error
        assert launched is not None and server is not None and verbs is not None
        if beat.broken is not None:
            logger.warning(
                "the slice's group failed while the server loaded; clients find it in %s: %s", path, beat.broken
            )
        return launched, server, verbs

    def _follow_owner(self, order: _Order, path: Path, health_timeout_s: float) -> _Launched:
        try:
            while (
                not self._slice.all_gather("follow", what="wait for the server", timeout_s=_HEARTBEAT_TIMEOUT_S)[0]
                == "done"
            ):
                pass
            outcome: list[_Launched | None] = self._slice.agree(None, None, what="launch the server")
            assert outcome[0] is not None
            return outcome[0]
        except RankLostError as lost:
            if not self._slice.members[0].is_running():
                raise
            try:
                found = rendezvous.wait(
                    path, nonce=order.nonce, is_healthy=_answers, timeout_s=health_timeout_s + _RENDEZVOUS_MARGIN_S
                )
            except RendezvousError as error:
                lost.add_note(f"the rendezvous file did not help: {error}")
                raise lost from error
            logger.warning("found the server by the file %s after the slice's group failed: %s", path, lost)
            with_info = ServerClient(found.url, api_key=found.api_key)
            try:
                info = with_info.get("/server_info", timeout_s=_RENDEZVOUS_MARGIN_S)
            finally:
                with_info.close()
            return _Launched(
                url=found.url,
                api_key=found.api_key,
                sglang_version=str(info["version"]),
                state=_initial_state(info, self.device.type),
                spec=read_spec(order.model),
                weight_version=_version_of(info),
            )

    def _server_spec(self, order: _Order, path: Path, log_path: str | os.PathLike[str] | None) -> ServerSpec:
        kind = "hip" if torch.version.hip else "npu" if self.device.type == "npu" else "cuda"
        visibility = devices.server_environment(self.visible_devices, kind=kind) if self.visible_devices else {}
        cores = sorted(os.sched_getaffinity(0))
        environment, warnings = child_environment(
            os.environ,
            visibility=visibility,
            user=order.env,
            device_type=self.device.type,
            tp_size=self.tp_size,
            cores=cores,
            stub=sglang_stub_needed() if self.device.type == "cpu" else None,
        )
        for warning in warnings:
            logger.warning("%s", warning)
        pid, started = this_process()
        return ServerSpec(
            model_path=order.model,
            arguments=order.arguments,
            environment=environment,
            log_path=Path(log_path) if log_path is not None else self._default_log_path(order),
            owner_pid=pid,
            owner_started=started,
            unlink=(str(path), str(self._sync_folder(order))),
        )

    def _sync_folder(self, order: _Order) -> Path:
        """Where syncs have their sockets and files; private to this user, gone with the engine."""
        return Path("/dev/shm") / f"tpcolocate-{os.getuid()}-{self.job}-{order.nonce}"

    def _default_log_path(self, order: _Order) -> Path:
        return (
            Path(tempfile.gettempdir())
            / f"tpcolocate-{os.getuid()}"
            / f"{self.job}-{self.slice_index}-{order.nonce}.log"
        )

    def _announcement(self, order: _Order, launched: _Launched) -> rendezvous.Announcement:
        pid, started = this_process()
        return rendezvous.Announcement(
            url=launched.url,
            api_key=launched.api_key,
            job=self.job,
            slice_ranks=self.slice_ranks,
            pid=pid,
            started=started,
            nonce=order.nonce,
        )

    def close(self) -> None:
        """Shut down what is still running, at once, and give the process groups back.  Idempotent."""
        if self._closed:
            return
        self._closed = True
        for engine in list(self._engines):
            engine.shutdown(wait=False)
        for group in (self._slice.group, None if self._world is None else self._world.group):
            if group is not None and dist.is_initialized():
                dist.destroy_process_group(group)

    def __enter__(self) -> Colocation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Order:
    """What one rank wants launched."""

    model: str
    arguments: dict[str, Any]
    env: dict[str, str]
    nonce: str

    def difference(self, other: _Order) -> str | None:
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


@dataclass(frozen=True, slots=True)
class _Launched:
    """What the owner tells the others."""

    url: str
    api_key: str
    sglang_version: str
    state: State
    spec: ModelSpec | None
    weight_version: str


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


def _version_of(info: Mapping[str, Any]) -> str:
    return str(info.get("weight_version", "default"))


def _answers(announcement: rendezvous.Announcement) -> bool:
    client = ServerClient(announcement.url, api_key=announcement.api_key)
    try:
        return client.is_listening(timeout_s=5.0)
    finally:
        client.close()


def connect(job: str | None = None, *, slice_index: int | None = None) -> Client:
    """Find a running server of this user from any process of the machine, in or out of the training job.

    Args:
        job: `Colocation.job`; may be left out while only one server is running.
        slice_index: `Colocation.slice_index`; likewise.

    Returns:
        A client that can generate.

    Raises:
        RendezvousError: No such server, several of them, or it does not answer.
    """
    found = rendezvous.discover(job)
    if slice_index is not None:
        found = [(path, a) for path, a in found if path == rendezvous.path_for(a.job, slice_index)]
    if len(found) != 1:
        what = "no running server" if not found else f"{len(found)} running servers"
        listed = "\n".join(f"  job {a.job}, ranks {','.join(map(str, a.slice_ranks))}: {a.url}" for _, a in found)
        raise RendezvousError(
            f"found {what} of this user" + (f" in job {job}" if job is not None else ""),
            hint="pass job= and slice_index=" if found else "servers announce themselves once launch() has returned",
            details=listed if found else None,
        )
    announcement = found[0][1]
    if not _answers(announcement):
        raise RendezvousError(
            f"the server at {announcement.url} does not answer", hint="see its owner's output", url=announcement.url
        )
    return Client(announcement.url, api_key=announcement.api_key)


__all__ = ["Colocation", "connect", "init"]
