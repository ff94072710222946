"""Public entry points of the training ranks: `init` and `Colocation`.

Decisions are made by pure functions of facts that all ranks have exchanged, so that every rank gets the same result or
the same error; the owner carries them out and reports to the others.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import secrets
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from tpcolocate import rendezvous, roles
from tpcolocate._version import __version__
from tpcolocate.agreement import RankGroup
from tpcolocate.checks import MOST_RANKS, check_flag
from tpcolocate.deadline import check_timeout
from tpcolocate.engine.client import Client
from tpcolocate.engine.context import OwnedServer, ServerLink, SliceContext
from tpcolocate.engine.engine import Engine
from tpcolocate.errors import ConfigError, TpColocateError, noted_on, shown
from tpcolocate.groups import Host, Member, count_call, error_fields, exchange, list_ranks, make_group, share_outcome
from tpcolocate.in_server.tpcolocate_receiver import kernels
from tpcolocate.interfaces import GlooAddress, find_gloo_address
from tpcolocate.launch import Launch, RunningServer
from tpcolocate.launch_request import TpSlice, agree_on_launch
from tpcolocate.placement import inspect_device, is_on_one_network, plan_roles
from tpcolocate.processes import OfOneProcess, this_process
from tpcolocate.server.api import ServerApi
from tpcolocate.server.arguments import RECEIVER
from tpcolocate.server.http import ServerClient
from tpcolocate.server.lifecycle import Lifecycle, State
from tpcolocate.server.process import ServerProcess
from tpcolocate.weights.sources import low_rank
from tpcolocate.weights.sync.syncer import WeightSyncer

logger = logging.getLogger(__name__)

_WARM_UP_S = 30.0
# How long a rank with a wrong argument waits for the others, which are to get its error.
_ERROR_S = 600.0
# Compiling takes two seconds the first time on a machine, while the server takes a minute to start.
_KERNEL_S = 10.0


def init(
    tp_size: int = 1,
    *,
    device: torch.device | str | None = None,
    timeout_s: float = 600.0,
    allow_shared_devices: bool = False,
    job: str | None = None,
) -> Colocation:
    """Divide the ranks of the job into tp slices and return this rank's role.

    Collective: over the default process group; every rank calls it, with the same `tp_size`.  Without
    torch.distributed a single process may call it with ``tp_size=1``.

    Args:
        tp_size: GPUs per SGLang server.  1 gives every rank a server of its own and creates no process group.
        device: Training device of this rank; an index counts within this process's CUDA_VISIBLE_DEVICES.  Default:
            the current CUDA device, or the CPU where there is none.
        timeout_s: How long a rank waits for the others in one call, in seconds.  After `init`, ranks that see each other's
            processes wait longer, with a warning a minute, while all of them are running.
        allow_shared_devices: Allow all ranks of a slice to share one GPU.  For test rigs.
        job: Name by which other processes find the servers with `connect`, the same on all ranks; of one running job of
            this user at a time.  Default: the environment variable TPCOLOCATE_JOB, else a name of its own.

    Returns:
        This rank's role; close it (or use it as a context manager) when done.

    Raises:
        ConfigError: `tp_size` or `timeout_s` is not positive; this is a child process of multiprocessing that imports the
            script; `job` is not a name, or differs between the ranks; there is
            no torch.distributed, but `tp_size` > 1 or WORLD_SIZE > 1; the ranks cannot be connected, as with a wrong
            GLOO_SOCKET_IFNAME.
        LayoutError: The ranks cannot be divided into slices: they disagree on `tp_size`, it does not divide their
            number, or a slice would span hosts or containers.
        DeviceError: A device is invalid, not visible, or used by two ranks.
        RankLostError: Not all ranks called `init` within `timeout_s`.

        All are raised on every rank, before anything is started.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself finds it out
        raise ConfigError(
            "init() in a child process of multiprocessing that imports the script: it would start a server of its own",
            hint='put what the script does under `if __name__ == "__main__":`, so that children can import it',
        )
    distributed = dist.is_available() and dist.is_initialized()
    error: ConfigError | None = None
    try:
        _check_arguments(tp_size, timeout_s, allow_shared_devices)
        job = rendezvous.job_of(job, os.environ)
    except ConfigError as caught:  # which the other ranks are to get, whatever was passed
        error = caught
        tp_size, timeout_s, allow_shared_devices, job = 1, _ERROR_S, False, None
    if not distributed:
        if error is not None:
            raise error
        _check_alone(tp_size, os.environ)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    torch_device, facts, device_error = inspect_device(device)
    gloo = GlooAddress("", "")
    try:
        if tp_size > 1:
            gloo = find_gloo_address(os.environ, host_name=os.uname().nodename)
    except ConfigError as caught:
        error = caught if error is None else error
    try:
        host = Host.here()
    except OSError as caught:
        host = Host.unknown()
        if error is None:
            error = ConfigError(
                f"this host lacks what tpcolocate needs: {caught}",
                hint="it needs /dev/shm and a complete /proc, which containers and sandboxes may leave out",
            )
    pid, started = this_process()
    own_job = f"{pid}-{secrets.token_hex(4)}"
    member = Member(
        rank=rank,
        world_size=world_size,
        tp_size=tp_size,
        host=host,
        pid=pid,
        started=started,
        facts={
            **facts,
            "job": own_job,
            "job_name": job,
            "gloo": asdict(gloo),
            "version": __version__,
            "shared": allow_shared_devices,
        },
        error=error_fields(error if error is not None else device_error),
    )
    if world_size == 1:
        prefix, members = "", [member]
    else:
        # A fresh prefix per call: the entries of an earlier init() must not be read as this one's.
        number = count_call(_store("tpcolocate/inits"), rank=rank, timeout_s=timeout_s)
        prefix = f"tpcolocate/init/{number}"
        members = exchange(_store(prefix), member, timeout_s=timeout_s)
    slices = plan_roles(members)
    index = next(i for i, r in enumerate(slices) if rank in r.ranks)
    group = world = None
    if tp_size > 1:
        failure: ConfigError | None = None
        try:
            for i, slice_roles in enumerate(slices):
                made = make_group(
                    slice_roles.ranks, timeout_s=timeout_s, description=f"tpcolocate slice {i}", on_loopback=True
                )
                group = made if i == index else group
            world = make_group(
                range(world_size),
                timeout_s=timeout_s,
                description="tpcolocate all slices",
                on_loopback=is_on_one_network(members),
            )
        except ConfigError as caught:
            failure = caught
            failure.message += f" ({gloo.origin})"
        share_outcome(_store(f"{prefix}/groups"), failure, rank=rank, world_size=world_size, timeout_s=timeout_s)
    own = slices[index]
    return Colocation(
        roles=own,
        slice_index=index,
        device=torch_device,
        job=members[0].facts["job"] if job is None else job,
        tp_ranks={r: tp_rank for slice_roles in slices for tp_rank, r in enumerate(slice_roles.ranks)},
        group=RankGroup([members[r] for r in own.ranks], rank=rank, group=group, timeout_s=timeout_s),
        world=None if world is None else RankGroup(members, rank=rank, group=world, timeout_s=timeout_s),
        world_size=world_size,
    )


def _store(prefix: str) -> dist.Store:
    return dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())


def _check_alone(tp_size: int, environ: Mapping[str, str]) -> None:
    """Check that a process without a process group is the only one of its job.

    Raises:
        ConfigError: It is not.
    """
    hint = (
        f"start {tp_size} ranks, or a multiple, with torchrun --nproc-per-node or accelerate launch --num_processes; where no "
        "trainer does so, call torch.distributed.init_process_group() before init()"
    )
    if tp_size > 1:
        raise ConfigError(
            f"init(tp_size={tp_size}) needs {tp_size} ranks, but torch.distributed is not initialised in this process",
            hint=hint,
        )
    world_size = environ.get("WORLD_SIZE", "")
    if world_size.isdecimal() and int(world_size) > 1:
        raise ConfigError(
            f"WORLD_SIZE={world_size}, but torch.distributed is not initialised: every process would be rank 0 of a job "
            "of its own",
            hint="call torch.distributed.init_process_group() before init(), or unset WORLD_SIZE for separate jobs of one "
            "process each",
        )


def _check_arguments(tp_size: object, timeout_s: object, allow_shared_devices: object) -> None:
    if not isinstance(tp_size, int) or isinstance(tp_size, bool) or not 1 <= tp_size <= MOST_RANKS:
        raise ConfigError(
            f"tp_size must be a positive integer, got {shown(tp_size)}",
            hint="it is the number of GPUs, and of ranks, per server: 1, 2, 4, ...",
        )
    check_timeout(timeout_s)
    check_flag("allow_shared_devices", allow_shared_devices)


@dataclass(frozen=True, slots=True)
class _Started:
    """A server that was started: this rank's end of it, the engine's lifecycle, and the server's own state at its start."""

    link: ServerLink
    lifecycle: Lifecycle
    state: State


class Colocation(OfOneProcess):
    """A rank's role in its tp slice; returned by `init`.

    Attributes:
        rank: Global rank.
        world_size: Number of ranks of the job.
        tp_size: Ranks per slice, and TP ranks of its server.
        tp_rank: Position in the slice; TP rank k of the server runs on the device of the training rank with tp_rank k.
        slice_ranks: Global ranks of the slice, in tp order.
        owner_rank: The rank on the lowest physical device; it launches the server.
        is_owner: Whether this rank is the owner.
        slice_index: Number of the slice, from 0.
        device: Training device of this rank.
        visible_devices: Device tokens of the slice in tp order, set in the environment of the server alone.
        group: The slice's process group (gloo); None with tp_size 1.
        job: Name of the job, the same on all ranks: that passed to `init`, or the pid of rank 0 and a random suffix.
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
        self._tp_ranks = tp_ranks
        self._slice = group
        self._tp_slice = TpSlice(
            group=group,
            owner_rank=roles.owner_rank,
            device=device,
            visible_devices=roles.visible_devices,
            shared=roles.shared,
            job=job,
            slice_index=slice_index,
        )
        self._world = world
        # Not weakly: an engine that the trainer has dropped still has a server.
        self._engines: list[Engine] = []
        self._groups = [made.group for made in (group, world) if made is not None and made.group is not None]
        self._closed = False
        self._pid = os.getpid()
        _made.add(self)

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
        restart: int = 0,
        **server_args: Any,
    ) -> Engine:
        """Start the slice's SGLang server and connect every rank to it.

        Collective: over the slice.

        Args:
            model_path: Checkpoint folder or hub id, as for SGLang; a folder is passed on by its absolute path.
            health_timeout_s: From the start of the process to its first generated token, in seconds.  A rank waits for
                the others this long and the ``timeout_s`` of `init`.
            log_path: File for the server's output; default: one in a private folder in the temporary folder, removed
                unless the server crashed.
            env: Environment variables for the server alone, added to this rank's environment.  What it repeats of that changes
                nothing.
            restart: How often the engine restarts its server by itself, as `Engine.restart` does: in a collective call
                that finds it dead.
            server_args: SGLang's server arguments (``mem_fraction_static=0.4``); they override the defaults of this
                library (``disable_custom_all_reduce=True`` for tp_size > 1, and what a CPU needs).

        Returns:
            The engine, on every rank; a context manager that shuts it down.

        Raises:
            ConfigError: Arguments that cannot work, that the installed SGLang lacks, or that differ between the ranks.
            LaunchError, DeadlineError: The server did not start, and the tail of its log is in the error; or a rank did
                not come in time.
            RankLostError: A rank of the slice died.
            RankFailedError: Another library's exception on a rank, or Ctrl-C on another one, which itself raises that.

            The same error is raised on every rank of the slice; nothing is left running.
        """

        def start(path: str | os.PathLike[str], lifecycle: Lifecycle | None, **given: Any) -> tuple[Launch, _Started]:
            launch = Launch(self._tp_slice, agree_on_launch(self._tp_slice, path, closed=self._closed, **given))
            with self._slice.going_on(launch.request.nonce):
                return launch, self._start(launch, lifecycle)

        if running := _running_engines():
            logger.warning(
                "ranks %s launch another server while that of %s runs, which keeps its memory until shutdown(), or close() of what "
                "init() returned",
                list_ranks(self.slice_ranks),
                running[-1],
            )
        launch, started = start(
            model_path,
            None,
            env={} if env is None else env,
            server_args=server_args,
            health_timeout_s=health_timeout_s,
            log_path=log_path,
            restart=restart,
        )
        request = launch.request

        def relaunch() -> tuple[ServerLink, State]:
            _, again = start(request.model_path, started.lifecycle, **request.again())
            return again.link, again.state

        context = SliceContext(
            group=self._slice,
            world=self._world,
            owner_rank=self.owner_rank,
            lifecycle=started.lifecycle,
            server=started.link,
        )
        engine = Engine(
            context,
            model_path=request.model_path,
            on_shutdown=lambda: self._forget(engine),
            relaunch=relaunch,
            restarts=restart,
        )
        self._engines.append(engine)
        if len(self._engines) == 1:
            atexit.register(self._end_at_exit)
        return engine

    def _start(self, launch: Launch, lifecycle: Lifecycle | None) -> _Started:
        """Start a server and connect to it, for a new engine or the one with this lifecycle.

        Collective: over the slice; after an error nothing is left running.
        """
        server: ServerProcess | None = None
        api: ServerApi | None = None
        kernels.prepare(self.device)  # while the server starts
        for_adapters = low_rank.prepare(self.device)

        def wait_for_kernels() -> None:
            kernels.wait_until_prepared(self.device, timeout_s=_KERNEL_S)
            if for_adapters is not None:
                for_adapters.join(_KERNEL_S)

        try:
            if self.is_owner:
                running, server, api = launch.start_server(lifecycle)
            else:
                running = launch.wait_for_server()
        except BaseException:
            wait_for_kernels()
            raise
        started: _Started | None = None
        ignored: frozenset[str] | None = None
        error: BaseException | None = None
        try:
            wait_for_kernels()  # an interrupt here ends the server as well
            started = self._connect(launch, running, server, api, lifecycle)
            ignored = started.link.sync.warm_up(timeout_s=_WARM_UP_S)
        except BaseException as caught:
            error = caught
        try:
            ignored = launch.acknowledge(error, ignored)
        except BaseException as failed:
            launch.undo(server, failed)
            raise
        assert started is not None
        started.link.sync.note_ignored(ignored)
        return started

    def _connect(
        self,
        launch: Launch,
        running: RunningServer,
        server: ServerProcess | None,
        api: ServerApi | None,
        lifecycle: Lifecycle | None,
    ) -> _Started:
        if lifecycle is None:
            lifecycle = Lifecycle(running.state, weight_version=running.weight_version)
        owned = None if server is None or api is None else OwnedServer.of(server, api, lifecycle)
        probe = ServerClient(running.url, api_key=running.api_key)
        probe.evidence = launch.evidence(server)
        sync = WeightSyncer(
            self._slice,
            device=self.device,
            owner_rank=self.owner_rank,
            server=None if owned is None else owned.updates,
            spec=running.spec,
            loader=RECEIVER,
            tp_ranks=self._tp_ranks,
            folder=launch.sync_folder,
            reader_is_alive=(
                # One that is stopped does not answer, and has what it had mapped.
                (lambda: probe.is_stopped or probe.is_listening(timeout_s=5.0))
                if server is None
                else lambda: not server.exited()
            ),
        )

        def release() -> None:
            probe.close()
            if server is not None:
                launch.clean_up()

        client = Client(running.url, api_key=running.api_key, check=lambda: lifecycle.state.check_generate())
        client.http.evidence = probe.evidence
        client.http.held = lambda: lifecycle.state.why_held()
        link = ServerLink(
            client,
            sync,
            owned,
            running.sglang_version,
            release,
            running.serves_adapters,
            restore_files=lambda: launch.restore_files(running),
        )
        return _Started(link, lifecycle, running.state)

    def _forget(self, engine: Engine) -> None:
        if engine in self._engines:
            self._engines.remove(engine)
        if not self._engines:
            atexit.unregister(self._end_at_exit)

    def _end_at_exit(self) -> None:
        if self.is_owner and os.getpid() == self._pid:
            for engine in list(self._engines):
                logger.warning("%s was not shut down before the end of its process", engine)
                engine.shutdown(wait=False)

    def close(self) -> None:
        """Shut down engines that still run, at once, and destroy the process groups.

        Idempotent; one that was interrupted can be called again.  In a forked process it does nothing.

        Raises:
            EngineError: The end of a server could not be confirmed; all else is done.
        """
        if os.getpid() != self._pid:
            return
        self._closed = True
        problem: TpColocateError | None = None
        for engine in list(self._engines):
            try:
                engine.shutdown(wait=False)
            except TpColocateError as error:
                problem = error if problem is None else problem
        while self._groups:
            # One that was made before the default group was destroyed and made anew went with it: torch does not know it.
            if dist.is_initialized():
                with contextlib.suppress(ValueError):
                    dist.destroy_process_group(self._groups[-1])
            self._groups.pop()
        for ranks in (self._slice, self._world):
            if ranks is not None:
                ranks.close()  # with the last reference to a group its connections close
        if problem is not None:
            raise problem

    def __enter__(self) -> Colocation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with noted_on(error):
            self.close()


# Where a notebook's cell is run again, or a function that failed is called again in the same process, what `init` returned
# before is out of the script's hands, and its servers run on.
_made: weakref.WeakSet[Colocation] = weakref.WeakSet()


def _running_engines() -> list[Engine]:
    """Return the engines of this process that were not shut down, of whichever call of `init`."""
    return [engine for colo in _made if colo._pid == os.getpid() for engine in colo._engines]


__all__ = ["Colocation", "init"]
