"""What every phase of a sync works with: the fixed facts, the state that outlives a sync, and the ranks' agreement.

After each phase the ranks exchange ok-or-error; the first error is raised on all of them, and no rank enters the next
collective alone.  What must be the same on every rank, such as the number of a command, is computed here and never in
something that only one rank runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from tpcolocate import ipc_payload
from tpcolocate.agreement import RankGroup
from tpcolocate.deadline import Deadline
from tpcolocate.errors import DeadlineError
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, Command, addressed_to_all
from tpcolocate.report import Stopwatch
from tpcolocate.weights.plan.loader_map import LoaderMap
from tpcolocate.weights.plan.sharding import ShardFinder
from tpcolocate.weights.plan.transfer_plan import Group, Reach, TpLayout
from tpcolocate.weights.sources.model_spec import ModelSpec
from tpcolocate.weights.sync.mesh_schedule import MeshSchedule
from tpcolocate.weights.sync.options import SyncOptions
from tpcolocate.weights.sync.records import CachedPlan, CachedSync
from tpcolocate.weights.transport.bucket_sender import BucketFiles
from tpcolocate.weights.transport.connection import Replies, WeightServer, WorkerConnection, connect
from tpcolocate.weights.transport.mapped_memory import STAGED, PersistentMappings, TransientMappings
from tpcolocate.weights.transport.memory import PeakMemory, SlopeAlarm
from tpcolocate.weights.transport.mesh import Mesh
from tpcolocate.worker_errors import raise_worker_errors

T = TypeVar("T")

# The others are to hear of a missed deadline rather than to miss one of their own.  With it, a call takes at most two
# seconds longer than its timeout.
GRACE_S = 1.5
# From the engine's answer to the return of all handles.  It is milliseconds; what takes longer does not come.
RELEASE_S = 10.0
WEIGHTS_UNKNOWN = (
    "the engine refuses to generate until it has whole weights again: call engine.sync_weights(model) on every rank, or "
    "engine.shutdown() and launch() again"
)


@dataclass(frozen=True, slots=True)
class SliceContext:
    """Facts of one slice and its engine that never change.

    Attributes:
        group: The ranks of the slice, in tp order.
        device: Where this rank's staging memory lies.
        owner_rank: Global rank that talks to the engine.
        layout: TP ranks of all ranks that share meshes with this one.
        server: The engine; None on clients.
        spec: What the served model expects, if known.
        loader: Dotted name of the receiver in the engine.
        folder: For sockets and files; one for the slice, private to this user, removed with the engine.
        reader_is_alive: Whether the engine still runs, asked when handles do not come back.
    """

    group: RankGroup
    device: torch.device
    owner_rank: int
    layout: TpLayout
    server: WeightServer | None
    spec: ModelSpec | None
    loader: str
    folder: Path
    reader_is_alive: Callable[[], bool]

    @property
    def tp_rank(self) -> int:
        return self.layout.tp_rank

    @property
    def tp_size(self) -> int:
        return self.layout.tp_size

    @property
    def owner(self) -> int:
        """Position of the owner in the slice."""
        return self.group.ranks.index(self.owner_rank)

    def new_ledger(self) -> ipc_payload.Ledger:
        return ipc_payload.Ledger(rank=self.group.rank, reader_is_alive=self.reader_is_alive)


@dataclass(slots=True)
class History:
    """What is remembered of the syncs with one engine.

    Attributes:
        num_syncs: How many have begun; the same on every rank.
        compared: What distinguishes the source whose replicas were compared last; see `replicas`.
    """

    num_syncs: int = 0
    compared: object | None = None


@dataclass(slots=True)
class MappedState:
    """What is known of the memory that workers map from sync to sync.

    Attributes:
        is_trusted: Whether this slice's workers certainly map what they were asked to; not after a sync that failed.
        worker_ids: Global rank -> identity of its worker, for the ranks of the meshes; another one has mapped nothing yet.
        peer_regions: Global rank -> identity of its mappings, and which of them this rank's worker may have mapped.
        reach: Group -> which workers can map which ranks' memory.
        names: Of the tensors whose memory is mapped; the same on every rank, unless one was interrupted.
        memory_uses: What the ranks of the slice reported last of the memory of their shards.
        problem: Why the engine cannot map the trainer's own memory, if it cannot.
    """

    is_trusted: bool = True
    worker_ids: dict[int, str] = field(default_factory=dict)
    peer_regions: dict[int, tuple[str, frozenset[str]]] = field(default_factory=dict)
    reach: dict[Group, Reach] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    memory_uses: list[str] = field(default_factory=list)
    problem: str | None = None

    def reach_of(self, groups: Iterable[Group]) -> dict[Group, Reach]:
        """Return what is known of some groups."""
        return {group: self.reach[group] for group in groups if group in self.reach}

    def least_memory_uses(self, names: Iterable[str]) -> dict[str, str]:
        """Return the least that the memory of these shards permits on any rank of the slice, as far as is known.

        That is not what was mapped in the last sync, which may have staged for the sake of another rank or slice.
        """
        if self.problem is not None:
            return dict.fromkeys(names, STAGED)
        return {name: min(each) for name, *each in zip(names, *self.memory_uses)}


class EngineState:
    """All that outlives a sync with one engine.

    Args:
        device: Of this rank.
        rank: This global rank.
    """

    def __init__(self, device: torch.device, rank: int) -> None:
        self.alarm = SlopeAlarm()
        self.handle_problems: dict[str, str | None] = {}
        """Way of making payloads -> why its handles do not open in the engine; None if they do."""
        self.abandoned: list[ipc_payload.Ledger] = []
        """Of failed syncs: handles whose readers may still have them open."""
        self.left_elsewhere: list[ipc_payload.Ledger] = []
        """Of the last sync, in which another slice failed: handles that its workers may have open or never have opened."""
        self.loader_map = LoaderMap()
        self.mappings = PersistentMappings(device, rank)
        self.mapped = MappedState()
        self.shard_finder = ShardFinder()
        self.history = History()
        self.cached_plan: CachedPlan | None = None
        self.cached_sync: CachedSync | None = None
        self.dry_run_problem: str | None = None
        """Why the engine's loader cannot be traced without weights, if it cannot."""

    @property
    def num_syncs(self) -> int:
        """How many have begun; the same on every rank."""
        return self.history.num_syncs

    @property
    def has_mapped(self) -> bool:
        """Whether this rank knows of memory that workers may have mapped, its own or another's; ranks may differ."""
        return bool(self.mapped.names or self.mapped.peer_regions or self.mappings.retired or len(self.mappings))

    def clear_cache(self) -> None:
        """Discard what the last sync left for the next one."""
        self.cached_plan = self.cached_sync = None
        self.mapped.is_trusted = False


@dataclass(slots=True)
class BytesByWay:
    """Bytes that this rank's worker copied out of this rank's memory and other ranks', and that this rank staged."""

    own: int = 0
    peer: int = 0
    staged: int = 0


class SyncStats:
    """What a sync counts; only added to.

    Args:
        device: Of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.watch = Stopwatch()
        self.peak = PeakMemory(device)
        self.names: set[str] = set()
        """Weights that were sent."""
        self.ignored: set[str] = set()
        """And those that the loader was seen to read nothing of."""
        self.unverified: set[str] = set()
        self.nonfinite: set[str] = set()
        """Weights that are NaN or infinite in part, as far as this rank knows."""
        self.warnings: list[str] = []
        self.worker_seconds: dict[str, float] = {}
        self.num_bytes = self.num_buckets = self.num_replayed = 0
        self.by_way = BytesByWay()

    def add_worker_seconds(self, seconds: Mapping[str, float]) -> None:
        for step, value in seconds.items():
            self.worker_seconds[step] = self.worker_seconds.get(step, 0.0) + value


@dataclass(frozen=True)
class SyncSession:
    """One sync on one rank.

    Attributes:
        context: Of the slice.
        state: What outlives this sync.
        options: Of this sync.
        version: To be published.
        deadline: For all of it.
        on_engine_modified: Called on every rank before the first byte may change in the engine.
        on_sent: Called on every rank before the engine goes on, with what its loader reads and was not sent.
        schedule: The mesh collectives that this rank still owes the ranks of other slices.
        stats: Seconds, bytes and memory of this rank.
        mesh: Runs the collectives of a device mesh, with a grace after the deadline.
        ledger: Handles that this sync exports.
        transient: Mappings that end with this sync.
        files: Bucket files that this sync writes.
        connection: To the workers; on ranks that do not own the server, it sends nothing.
    """

    context: SliceContext
    state: EngineState
    options: SyncOptions
    version: str
    deadline: Deadline
    on_engine_modified: Callable[[], None]
    on_sent: Callable[[Sequence[str] | None], None]
    schedule: MeshSchedule = field(default_factory=MeshSchedule)
    stats: SyncStats = field(init=False)
    mesh: Mesh = field(init=False)
    ledger: ipc_payload.Ledger = field(init=False)
    transient: TransientMappings = field(init=False)
    files: BucketFiles = field(init=False)
    connection: WorkerConnection = field(init=False)
    _command_numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        context = self.context
        made = {
            "stats": SyncStats(context.device),
            "mesh": Mesh(context.device, self.deadline.plus(GRACE_S)),
            "ledger": context.new_ledger(),
            "transient": TransientMappings(context.new_ledger(), self.state.mappings, rank=context.layout.rank),
            "files": BucketFiles(context.folder if self.options.folder is None else self.options.folder),
            "connection": connect(
                context.server,
                folder=context.folder,
                loader=context.loader,
                tp_size=context.tp_size,
                deadline=self.deadline,
            ),
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @property
    def ledgers(self) -> tuple[ipc_payload.Ledger, ipc_payload.Ledger]:
        return self.ledger, self.transient.ledger

    # --- time ----------------------------------------------------------------------------------------------------

    def left(self, what: str) -> float:
        """Return the seconds that are left for the sync.

        Raises:
            DeadlineError: None are.
        """
        if self.deadline.has_passed:
            raise self._too_late(what)
        return self.deadline.left()

    def _too_late(self, what: str) -> DeadlineError:
        return DeadlineError(
            f"the weight sync took longer than {self.deadline.timeout_s:g} s, its timeout_s ({what})",
            hint="another rank's first error may be the cause; if there is none, pass sync_weights() a larger timeout_s",
        )

    # --- the ranks of the slice ------------------------------------------------------------------------------------

    def agree(self, error: BaseException | None, value: T, *, what: str) -> list[T]:
        """Exchange ok-or-error and a value; raise the first error on every rank.  Collective: over the slice."""
        seconds = self.deadline.left()
        if seconds == 0.0 and error is None:
            error = self._too_late(what)
        try:
            return self.context.group.agree(error, value, what=what, timeout_s=seconds + GRACE_S)
        except BaseException as raised:
            if error is not None and error not in (raised, raised.__cause__):
                # Another rank's error came first.  This one is dropped, and its frames, which refer to it and to weights and
                # staging memory, must not wait for the garbage collector.
                error.__traceback__ = None
            raise

    def together(self, what: str, action: Callable[[], T]) -> T:
        """Run an action on every rank; raise the first error on all.  Collective: over the slice."""
        value: T | None = None
        error: BaseException | None = None
        try:
            value = action()
        except BaseException as caught:
            error = caught
        self.agree(error, None, what=what)
        return value  # type: ignore[return-value]

    def on_owner(self, what: str, action: Callable[[], T]) -> T:
        """Run an action on the owner; every rank gets its result or its error.  Collective: over the slice.

        Args:
            what: Is being done.
            action: Changes nothing that the ranks must agree on: the others do not run it.
        """
        value: T | None = None
        error: BaseException | None = None
        if self.context.server is not None:
            try:
                value = action()
            except BaseException as caught:
                error = caught
        return self.agree(error, value, what=what)[self.context.owner]  # type: ignore[return-value]

    # --- the workers -----------------------------------------------------------------------------------------------

    def next_command(self) -> int:
        """Return the number of the next command; every rank counts all commands."""
        return next(self._command_numbers)

    def ask(
        self, what: str, commands: Sequence[Addressed], *, number: int | None = None, timeout_s: float | None = None
    ) -> Replies:
        """Send one command to each TP rank and return the replies, on every rank.  Collective: over the slice.

        Args:
            what: Is being asked for.
            commands: In tp order.
            number: From `next_command`; the next one if it is left out.
            timeout_s: How long to wait for the replies; default: what is left for the sync.
        """
        number = self.next_command() if number is None else number

        def exchange() -> Replies:
            self.connection.post(dict(enumerate(commands)), number)
            return self.connection.collect(number, timeout_s=self.left(what) if timeout_s is None else timeout_s)

        return self.on_owner(what, exchange)

    def ask_all(self, what: str, command: Command) -> Replies:
        """Send the same command to every TP rank.  Collective: over the slice.

        Raises:
            SyncError: A worker could not carry it out.
        """
        replies = self.ask(what, list(addressed_to_all(command, self.context.tp_size).values()))
        raise_worker_errors(replies, f"could not {what}", rank=self.context.owner_rank)
        return replies

    def wait_for_release(self) -> None:
        """Wait until the workers have released all handles of this sync.  Collective: over the slice."""

        def wait() -> None:
            for ledger in self.ledgers:
                ledger.wait_for_release(self.deadline.within(RELEASE_S))

        self.together("take the staging memory back", wait)

    def set_aside(self, buckets: Collection[int]) -> None:
        """Do not wait for the handles of these buckets: their readers belong to a slice that has failed."""
        self.state.left_elsewhere += [ledger.set_aside(buckets) for ledger in self.ledgers]

    def mark_engine_modified(self) -> None:
        """From here on weights may change in the engine."""
        self.on_engine_modified()
        self.connection.mark_engine_modified()

    # --- the end -----------------------------------------------------------------------------------------------------

    def give_up(self) -> None:
        """After a failure: leave no files, and let an engine that was not modified go on with the weights it has."""
        self.state.clear_cache()
        self.connection.abandon(timeout_s=GRACE_S)
        self.files.remove()
        if not self.transient.is_sent:
            self.transient.reclaim()
        self.state.abandoned += self.ledgers


__all__ = ["GRACE_S", "RELEASE_S", "WEIGHTS_UNKNOWN", "EngineState", "SliceContext", "SyncSession", "SyncStats"]
