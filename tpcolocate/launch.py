"""Launch of a slice's server, on which its ranks have agreed: the owner starts it, the clients wait for it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from tpcolocate import devices, rendezvous
from tpcolocate.deadline import Deadline
from tpcolocate.errors import DeadlineError, EngineError, RankFailedError, RankLostError
from tpcolocate.groups import Member, list_ranks, make_group_over_file
from tpcolocate.launch_request import LaunchRequest, TpSlice
from tpcolocate.processes import this_process
from tpcolocate.runtime_folder import RuntimeFolder, folder_of, read_owner, remove_remains
from tpcolocate.server.api import ServerApi, serves_adapters
from tpcolocate.server.environment import child_environment, compile_cache, hides_standard_modules, sglang_stub_needed
from tpcolocate.server.evidence import Evidence
from tpcolocate.server.http import ServerClient
from tpcolocate.server.lifecycle import Lifecycle, State, WeightsState
from tpcolocate.server.process import ServerProcess, ServerSpec
from tpcolocate.weights.sources.model_spec import ModelSpec, check_not_quantised, local_folder, read_spec

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Of SGLang's load formats, those that read no checkpoint.
_WITHOUT_WEIGHTS = ("dummy",)
# For a look at the announcement, once its writer has reported that it is there.
_ANNOUNCEMENT_S = 30.0
# However little is left of the time for a launch, an error is reported to the other ranks; and the owner, which may end
# the server, is the first to give up.
_LEAST_S = 5.0
_GRACE_S = 5.0
_REQUEST_S = 30.0


@dataclass(frozen=True, slots=True)
class RunningServer:
    """What all ranks need to know about a running server."""

    url: str
    api_key: str
    sglang_version: str
    state: State
    spec: ModelSpec | None
    weight_version: str
    serves_adapters: bool


class Launch:
    """One launch on one rank, and the files of it that remain until `clean_up`.

    All ranks have the same time for it, from their agreement on: the request's `health_timeout_s` for the server, and the group's
    timeout for the ranks.

    Args:
        tp_slice: The slice.
        request: Agreed on by all ranks.
    """

    def __init__(self, tp_slice: TpSlice, request: LaunchRequest) -> None:
        self.tp_slice = tp_slice
        self.request = request
        self._deadline = Deadline.after(request.health_timeout_s + tp_slice.group.timeout_s)
        self._announcement_path = rendezvous.path_for(request.nonce)
        self._runtime: RuntimeFolder | None = None
        self.sync_folder = folder_of(request.nonce)
        """Sockets and files of weight syncs; readable by this user alone."""

    def clean_up(self) -> None:
        """Remove the files of the launch but the log.  On the owner, once the server has exited."""
        if self._runtime is not None:
            self._runtime.remove()

    def restore_files(self, running: RunningServer) -> None:
        """Make anew what something else has removed of the folder in /dev/shm, on the owner."""
        if self._runtime is None or not self._runtime.restore():
            return
        logger.warning(
            "%s was removed while its server runs, and is made anew; systemd does so when its user logs out, unless RemoveIPC=no "
            "is set in logind.conf",
            self._runtime.shared,
        )
        rendezvous.announce(self._announcement_path, self._announcement(running))

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

    # --- the ranks -------------------------------------------------------------------------------------------------

    def share(self, error: BaseException | None, running: RunningServer | None) -> RunningServer:
        """Report the owner's server, or its error, to all ranks.

        If the slice's process group fails while all ranks live, they make a new one, which is the slice's from then on,
        and the clients read the announcement.

        Collective: over the slice.

        Args:
            error: Of this rank.
            running: On the owner, unless it has an error.

        Raises:
            TpColocateError: The first error of any rank, on all of them.
            DeadlineError: A rank did not come in time.
            RankLostError: A rank has exited, or the ranks could not be connected anew.
        """
        group = self.tp_slice.group
        what = "launch the server"
        try:
            if self._meeting_place.exists():
                raise RankLostError(f"{what}: another rank has found the slice's process group broken", rank=group.rank)
            # By itself: a rank that has an error raises that one, also if it could not be reported.
            # While the owner starts the server.
            quiet_s = 0.0 if self.tp_slice.is_owner else self.request.health_timeout_s
            group.all_gather(None, what=f"{what}: meet", timeout_s=self._left(), quiet_s=quiet_s)
            return self._server_of(group.agree(error, running, what=what, timeout_s=self._left()))
        except RankLostError as lost:
            self._check_left(lost if error is None else error)
            self._check_members(lost)
            self._check_deadline(lost)
            group.expect_no_shared_error()  # that of the old group ends here: from now on a rank may leave by itself again
            self._make_group_anew(lost if error is None else error, lost)
        group.agree(error, what=f"{what} with a new process group", timeout_s=self._left())
        return running if running is not None else self._announced()

    def acknowledge(self, error: BaseException | None, value: T) -> T:
        """Have all ranks confirm that they have what they need of the server; raises as `share`.

        Args:
            error: Of this rank.
            value: What else the owner has to let the others know.

        Returns:
            The owner's value.
        """
        group = self.tp_slice.group
        try:
            of_ranks = group.agree(error, value, what="complete the launch", timeout_s=self._left())
            return of_ranks[group.ranks.index(self.tp_slice.owner_rank)]
        except RankLostError as lost:
            self._check_left(lost)
            self._check_members(lost)
            self._check_deadline(lost)
            raise

    @property
    def _meeting_place(self) -> Path:
        """The file by which ranks find each other once their group has failed."""
        return self.sync_folder / "group"

    def _left(self) -> float:
        grace_s = 0.0 if self.tp_slice.is_owner else _GRACE_S
        return self._deadline.left(at_least=_LEAST_S) + grace_s

    def _members_here(self) -> list[Member]:
        """The ranks of the slice whose process ids are valid in this process."""
        members = self.tp_slice.group.members
        here = next((member.host for member in members if member.rank == self.tp_slice.group.rank), None)
        return [member for member in members if here is not None and member.host.sees(here)]

    def _exited(self) -> list[int]:
        return [member.rank for member in self._members_here() if not member.is_running()]

    def _check_left(self, cause: BaseException) -> None:
        """Raise why a rank has left the launch, if one has: the same on all others; or what was the cause on this one."""
        left = self.tp_slice.group.error_of_left()
        if left is not None:
            raise left if isinstance(cause, (RankLostError, RankFailedError)) else cause

    def _check_members(self, lost: RankLostError) -> None:
        if self._exited():
            raise lost

    def _check_others(self, error: BaseException, lost: RankLostError) -> None:
        self._check_left(error)
        self._check_members(lost)

    def _check_deadline(self, lost: RankLostError) -> None:
        if not self._deadline.has_passed:
            return
        group = self.tp_slice.group
        awaited = (
            "another rank" if self.tp_slice.is_owner else f"rank {self.tp_slice.owner_rank}, which starts the server,"
        )
        raise DeadlineError(
            f"{awaited} did not finish launch() within {self._deadline.timeout_s:g} s: health_timeout_s={self.request.health_timeout_s:g} of "
            f"launch() and timeout_s={group.timeout_s:g} of init()",
            hint="see the output of that rank for what holds it up (py-spy dump --pid PID shows it), or raise one of the two",
            rank=group.rank,
            slice_ranks=group.ranks,
        ) from lost

    def _make_group_anew(self, error: BaseException, lost: RankLostError) -> None:
        group = self.tp_slice.group
        try:
            new = make_group_over_file(
                self._meeting_place,
                group.ranks,
                rank=group.rank,
                timeout_s=group.timeout_s,
                deadline=self._deadline,
                check=lambda: self._check_others(error, lost),
            )
        except RankLostError as again:
            error.add_note(f"(the slice's process group could not be made anew: {again.message})")
            raise error from again
        group.replace(new)
        logger.warning("the slice's process group failed during the launch and was made anew: %s", lost)

    def _server_of(self, reported: Sequence[RunningServer | None]) -> RunningServer:
        server = reported[self.tp_slice.group.ranks.index(self.tp_slice.owner_rank)]
        assert server is not None
        return server

    def _announced(self) -> RunningServer:
        found = rendezvous.wait(
            self._announcement_path, nonce=self.request.nonce, is_healthy=is_listening, timeout_s=_ANNOUNCEMENT_S
        )
        client = ServerClient(found.url, api_key=found.api_key)
        try:
            info = client.get("/server_info", timeout_s=_ANNOUNCEMENT_S)
        finally:
            client.close()
        return self._running_server(found.url, found.api_key, info)

    # --- the owner -----------------------------------------------------------------------------------------------

    def start_server(self, lifecycle: Lifecycle | None) -> tuple[RunningServer, ServerProcess, ServerApi]:
        """Start the server on the owner and report it to the clients; after an error nothing is left running.

        Collective: over the slice, whose other ranks call `wait_for_server`.

        Args:
            lifecycle: Of an engine that gets another server; None for a new engine.

        Raises:
            ConfigError, LaunchError, DeadlineError, RankLostError: As `Colocation.launch`.
        """
        server: ServerProcess | None = None
        api: ServerApi | None = None
        running: RunningServer | None = None
        error: BaseException | None = None
        try:
            spec = self._server_spec()
            server = ServerProcess.start(
                spec,
                health_timeout_s=self.request.health_timeout_s,
                heartbeat=lambda line, elapsed_s: self._look_at_clients(),
            )
            api = self._api_of(server)
            running = self._running_server(server.url, server.api_key, api.info)
            check_not_quantised(self.request.model_path)  # again: now the server has fetched it from the hub
            _hold(api, running, lifecycle)
            rendezvous.announce(self._announcement_path, self._announcement(running))
        except BaseException as caught:
            error = caught
        try:
            self.share(error, running)
        except BaseException as failed:
            self.undo(server, failed)
            raise
        assert running is not None and server is not None and api is not None
        return running, server, api

    def _api_of(self, server: ServerProcess) -> ServerApi:
        """Ask the server what it is.

        SGLang answers that behind its first forwards, which compile kernels where a machine has none yet: for a minute
        and more.
        """
        assert server.client is not None
        try:
            return ServerApi(server.client, timeout_s=self._left())
        except DeadlineError as error:
            raise DeadlineError(
                f"the SGLang server is up, but did not report what it is within health_timeout_s={self.request.health_timeout_s:g} of launch()",
                hint=f"at its first start on a machine it compiles kernels: raise health_timeout_s; its log is {server.spec.log_path}",
                url=server.url,
            ) from error

    def undo(self, server: ServerProcess | None, failed: BaseException) -> None:
        """End the server, on the owner, and remove the files of the launch.

        Args:
            server: If it was started.
            failed: Why, the same on all ranks; gets a note if the server does not end.
        """
        try:
            if server is not None:
                server.stop()
        except EngineError as error:
            failed.add_note(f"(the server that was started: {error.message})")
        finally:
            if self.tp_slice.is_owner:
                self.clean_up()

    def _look_at_clients(self) -> None:
        """Raise if one of them has exited, or has left the launch: the server need not be loaded to its end."""
        if (left := self.tp_slice.group.error_of_left()) is not None:
            raise left
        if exited := self._exited():
            raise RankLostError(
                f"rank {list_ranks(exited)} has exited while the server loaded",
                hint="the cause is the first error printed by that rank",
                slice_ranks=self.tp_slice.group.ranks,
            )

    def _server_spec(self) -> ServerSpec:
        tp_slice, request = self.tp_slice, self.request
        remove_remains()
        self._runtime = runtime = RuntimeFolder.make(
            request.nonce, log_path=None if request.log_path is None else Path(request.log_path)
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
        # In one that was removed meanwhile neither transformers nor, with a relative PYTHONPATH, Python itself starts.
        folder = request.working_directory
        working_directory = folder if folder is not None and os.path.isdir(folder) else str(runtime.temporary)
        if hides_standard_modules(working_directory):
            # The trainer's own search path has its script's folder instead.
            environment.setdefault("PYTHONSAFEPATH", "1")
        pid, started = this_process()
        return ServerSpec(
            model_path=request.model_path,
            arguments=request.arguments,
            environment=environment,
            runtime=runtime,
            owner_pid=pid,
            owner_started=started,
            trainers=tuple((member.pid, member.started) for member in self._members_here()),
            shows_start=self.tp_slice.slice_index == 0,
            working_directory=working_directory,
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
            model_folder=_folder_of(self.request.model_path),
            tokenizer_folder=_folder_of(self.request.arguments.get("tokenizer_path")),
        )

    # --- clients -------------------------------------------------------------------------------------------------

    def wait_for_server(self) -> RunningServer:
        """Wait on a client for the owner's report.

        Collective: over the slice, whose owner calls `start_server`.

        Raises:
            ConfigError, LaunchError, DeadlineError, RankLostError: As `Colocation.launch`.
        """
        return self.share(None, None)

    def _running_server(self, url: str, api_key: str, info: Mapping[str, Any]) -> RunningServer:
        return RunningServer(
            url=url,
            api_key=api_key,
            sglang_version=str(info["version"]),
            state=_initial_state(info, self.tp_slice.device.type),
            spec=read_spec(self.request.model_path),
            weight_version=str(info.get("weight_version", "default")),
            serves_adapters=serves_adapters(info),
        )


def _folder_of(path: object) -> str:
    """Return the absolute path of what is on this machine of a folder or hub id; an empty text if there is nothing."""
    folder = local_folder(path) if isinstance(path, str) else None
    return "" if folder is None else str(folder.absolute())


def _hold(api: ServerApi, running: RunningServer, lifecycle: Lifecycle | None) -> None:
    """Have a server whose weights are not the trainer's hold requests until a sync, before other processes can find it.

    Args:
        api: Its endpoints.
        running: The server.
        lifecycle: Of an engine that gets another server; None for a new engine.
    """
    state = running.state if lifecycle is None else lifecycle.state
    if lifecycle is not None and running.weight_version != lifecycle.weight_version:
        # Of what it has started with; but no version is reported that is lower than one that was.
        api.set_weight_version(lifecycle.weight_version, timeout_s=_REQUEST_S)
    if state.weights is WeightsState.UNSYNCED:
        api.pause_generation("retract" if state.paused is None else state.paused, timeout_s=_REQUEST_S)


def _initial_state(info: Mapping[str, Any], device_type: str) -> State:
    saver = bool(info.get("enable_memory_saver"))
    # SGLang has no memory saver on the CPU: release and resume return 200 there and do nothing.
    on_cpu = device_type == "cpu"
    return State(
        weights=WeightsState.UNSYNCED if str(info.get("load_format")) in _WITHOUT_WEIGHTS else WeightsState.CURRENT,
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


__all__ = ["Launch", "RunningServer", "is_listening"]
