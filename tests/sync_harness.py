"""Syncs without a server: real ranks, the real receiver in worker processes, and a record of all that they do together.

A world is one call of `run_ranks`: training ranks, which alone form process groups, and behind them one process for
each TP worker.  The requests, the workers' socket and the receiver are the library's own; what stands in for SGLang is
`StandIn`, which takes up one request after the other and hands each worker its payload.  Shared memory stands for
memory of a GPU that another process can map.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import gc
import io
import itertools
import os
import pickle
import threading
import time
import traceback
import weakref
from dataclasses import dataclass, field, fields
from datetime import timedelta
from multiprocessing.connection import Client, Listener
from pathlib import Path

import counted_handles
import torch
import torch.distributed as dist
from sync_models import Served, differing, policy, served_weights
from torch.distributed.tensor import DTensor

from tpcolocate import ipc_payload
from tpcolocate.agreement import RankGroup
from tpcolocate.errors import SyncError, TpColocateError
from tpcolocate.groups import Host, Member, make_group
from tpcolocate.in_server.tpcolocate_receiver import receive
from tpcolocate.in_server.tpcolocate_receiver import session as receiver
from tpcolocate.processes import start_of
from tpcolocate.server import channel
from tpcolocate.server.api import ServerApi
from tpcolocate.server.generation import GenerationHold
from tpcolocate.server.lifecycle import Lifecycle, State
from tpcolocate.server.weight_updates import WeightUpdates
from tpcolocate.weights.plan.loader_map import LoaderMap
from tpcolocate.weights.sources.model_spec import ModelSpec
from tpcolocate.weights.sync import mesh_calls, mesh_schedule, session, syncer
from tpcolocate.weights.sync.options import SyncOptions

# --- What this net knows of the library's inside: to be adapted here, and nowhere else -----------------------------------

LOADER = "tpcolocate_receiver.receive"


def make_syncer(group, *, owner_rank, tp_ranks, server, spec, folder, reader_is_alive):
    return syncer.WeightSyncer(
        group, device=torch.device("cpu"), owner_rank=owner_rank, tp_ranks=tp_ranks, server=server, spec=spec, loader=LOADER,
        folder=folder, reader_is_alive=reader_is_alive,
    )  # fmt: skip


def left_behind(sync):
    """What a good sync must not leave to later ones."""
    return list(sync.state.abandoned)


def forget_all_in_the_receiver():
    """In a worker's process: the next model is a new engine's."""
    receiver._RECEIVER.states.clear()


def shorten_grace(seconds):
    """How much longer than its own deadline a rank waits for the others."""
    session.GRACE_S = seconds


def described(addressed):
    """A command to a worker in a few words, without what differs from run to run."""
    command = addressed.command
    words = {"do": type(command).__name__}
    for name in (one.name for one in fields(command)):
        value = getattr(command, name)
        if name in ("map", "release", "define", "entries", "shapes"):
            if value or name == "entries":
                words[name] = len(value)
        elif name == "program" and value is not None:
            words[name] = value.rpartition("/")[2]  # what is before it counts the plans
        elif name in ("is_last", "report_trace", "watch") and value:
            words[name] = "yes"
    return words


def count_commands_in_the_receiver():
    """In a worker's process: `reach` at every command that is carried out."""

    def counted(handler):
        def handle(*args):
            reach("worker")
            return handler(*args)

        return handle

    receiver._HANDLERS.update({kind: counted(handler) for kind, handler in receiver._HANDLERS.items()})


def make_server(client):
    api, lifecycle = ServerApi(client), Lifecycle(State())
    return WeightUpdates(api, GenerationHold(api, lifecycle), lifecycle)


def warm_up(sync):
    """What an engine does before its first sync."""
    ignored = sync.context.group.all_gather(sync.warm_up(timeout_s=20.0), what="complete the launch")
    sync.note_ignored(ignored[sync.context.owner])


COMMAND_COUNTER = (session.SyncSession, "next_command")
"""Draws the next command's number; every rank calls it."""
A_BRANCH = (LoaderMap, "is_verified", True)
"""A decision that all ranks must take alike, and what it is to be on one of them alone."""
FINISH_MESH_COLLECTIVES = (mesh_schedule.MeshSchedule, "finish")
"""Makes the mesh collectives that a rank owes after a failure."""
SEAMS = {
    "allocate": (ipc_payload, "allocate"),
    "export": (ipc_payload, "export_storage"),
    "copy into a bucket": (ipc_payload, "view"),
    "wait for release": (ipc_payload.Ledger, "wait_for_release"),
    "post": (channel.Channel, "post"),
    "collect": (channel.Channel, "collect"),
}
"""Where errors are planted, before the call."""
PLAN = (mesh_calls, "plan_transfer")
"""Likewise, but after the call; gathers and exchanges over meshes, which are collectives, as well."""
FOREIGN = ("allocate", "export", "copy into a bucket", "plan", "gather", "all_to_all_single", "all_to_all", "worker")
"""Where the error is one of torch's; elsewhere it is this library's own."""


def is_known_defect(fault, *, is_mapped, is_sharded, is_lazy, num_slices):
    """Whether the library does not get over an error there today.  Each line is a defect, and goes with it.

    Args:
        fault: See `Fault`.
        is_mapped: Whether the trainer's memory can be mapped.
        is_sharded: Whether the weights are on a mesh.
        is_lazy: Whether some of them are computed from what is gathered.
        num_slices: Of all training ranks.
    """
    # A tensor computed from several gathers, or cut from one: the rest is not gathered, or one is gathered again.
    return is_lazy and fault.seam == "gather"


# --- The record ----------------------------------------------------------------------------------------------------------

MESH_COLLECTIVES = (
    "all_reduce", "all_to_all_single", "all_to_all", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor",
)  # fmt: skip
EXCHANGES = ("all_to_all_single", "all_to_all")


@dataclass
class Record:
    """What one rank did, in order.

    Attributes:
        events: ("agree", what), ("mesh", kind, size) and, on the owner, ("command", words).
        requests: On the owner: what was asked of the server.
        calls: (seam, number of events before) for every call at which an error can be planted.
        num_planted: Errors that were raised as planned.
    """

    events: list[tuple[str, ...]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    calls: list[tuple[str, int]] = field(default_factory=list)
    num_planted: int = 0

    def note(self, *event):
        self.events.append(event)

    def take(self):
        taken = Record(self.events, self.requests, self.calls, self.num_planted)
        self.events, self.requests, self.calls, self.num_planted = [], [], [], 0
        return taken

    def of(self, *kinds):
        return [event for event in self.events if event[0] in kinds]


RECORD = Record()
"""Of this process."""
FAULT: list[tuple[str, int]] = []
"""(seam, call) at which this process is to raise; empty or one."""
_ledgers: list[weakref.ref] = []


def reach(seam):
    """Raise if that is planned for this call."""
    number = sum(called == seam for called, _ in RECORD.calls)
    RECORD.calls.append((seam, len(RECORD.events)))
    if (seam, number) in FAULT:
        RECORD.num_planted += 1
        # Of the kind that comes from there: torch's own, or this library's.
        kind = RuntimeError if seam in FOREIGN else SyncError
        raise kind(f"planted at {seam} {number}")


def record_everything(folder):
    """Once per process of a training rank."""
    counted_handles.count_every_export(folder)
    for seam, (place, name) in SEAMS.items():
        wrap(place, name, before=lambda *_, seam=seam, **__: reach(seam))
    wrap(*PLAN, after=lambda *_, **__: reach("plan"))
    for name in MESH_COLLECTIVES:
        # An error is planted after an exchange of weights; where one fails itself it does so on all ranks.
        after = (lambda *_, name=name, **__: reach(name)) if name in EXCHANGES else None
        wrap(dist, name, before=functools.partial(_note_collective, name), after=after)
    wrap(
        DTensor,
        "full_tensor",
        before=functools.partial(_note_collective, "full_tensor"),
        after=lambda *_: reach("gather"),
    )
    wrap(channel.Channel, "post", before=lambda _, commands, number: RECORD.note("command", _words(number, commands)))
    wrap(ipc_payload.Ledger, "__init__", after=lambda ledger, **_: _ledgers.append(weakref.ref(ledger)))


def wrap(place, name, *, before=None, after=None):
    """Have a function call others, with its own arguments."""
    function = getattr(place, name)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if before is not None:
            before(*args, **kwargs)
        value = function(*args, **kwargs)
        if after is not None:
            after(*args, **kwargs)
        return value

    setattr(place, name, wrapped)


@contextlib.contextmanager
def replaced(place, name, make):
    """An attribute made anew from what it was, for the length of a block."""
    original = getattr(place, name)
    setattr(place, name, make(original))
    try:
        yield
    finally:
        setattr(place, name, original)


def _note_collective(kind, tensor, *args, **_):
    # Of the parts that are exchanged every rank has its own sizes.
    if kind == "all_gather":
        tensor = args[0]  # behind the list that it is gathered into
    is_pickled = kind == "all_gather" and tensor.dtype == torch.uint8  # handles have names of any length
    is_sized = not (kind.startswith("all_to_all") or is_pickled)
    size = [f"{tensor.numel() * tensor.element_size()} bytes"] if is_sized else []
    RECORD.note("mesh", kind, *size)


def outstanding():
    """Handles that this process has exported for a sync and that have not come back."""
    _ledgers[:] = [ref for ref in _ledgers if ref() is not None]
    return [str(item) for ref in _ledgers if (ledger := ref()) is not None for item in ledger.outstanding()]


def _words(number, commands):
    of_ranks = [described(commands[k]) for k in sorted(commands)]
    names = dict.fromkeys(name for words in of_ranks for name in words)
    shown = []
    for name in names:
        values = [str(words.get(name, 0)) for words in of_ranks]
        value = values[0] if len(set(values)) == 1 else "|".join(values)
        shown.append(value if name == "do" else f"{name}={value}")
    return f"{number} {' '.join(shown)}"


def _plant_at(planned, number, what, error):
    """See `RecordingGroup`."""
    if number != planned:
        return what, error
    RECORD.num_planted += 1
    # An interrupt keeps its class where it is, and is an error of the library's elsewhere.
    return what, (SyncError if number % 2 else KeyboardInterrupt)(f"planted at {what}")


class RecordingGroup(RankGroup):
    """The ranks of a slice; `meddle` may change what this rank brings to an agreement, or keep it away.

    `meddle` gets the agreement's number in this sync, its name and this rank's error, and returns (name, error), or None
    for a rank that does not come.
    """

    meddle = None
    num_agreed = 0

    def agree(self, error, value=None, *, what, timeout_s=None):
        number, self.num_agreed = self.num_agreed, self.num_agreed + 1
        if self.meddle is not None:
            brought = self.meddle(number, what, error)
            if brought is None:
                return [value] * len(self)
            what, error = brought
        RECORD.note("agree", what)
        return super().agree(error, value, what=what, timeout_s=timeout_s)

    def all_gather(self, value, *, what, timeout_s=None):
        RECORD.note("agree", what)
        return super().all_gather(value, what=what, timeout_s=timeout_s)


# --- What stands in for SGLang -------------------------------------------------------------------------------------------

PATIENCE_S = 560.0
"""For ranks of a world that are still in the one before."""
MESH_S = 10.0
"""Of collectives over meshes, where the library does not set a deadline."""
GROUP_S = 10.0
"""Of what ranks agree on outside of syncs."""
UPDATE = "/update_weights_from_tensor"
AT_ONCE = ("/pause_generation", "/continue_generation", "/update_weight_version")
"""SGLang answers these before its scheduler has seen them."""
SHOWN = ("mode", "new_version", "load_format", "abort_all_requests", "flush_cache", "selector")


class StandIn:
    """A client of a server that is not there; one request after the other, as SGLang's scheduler takes them up.

    Args:
        version: That it reports.
        workers: Connections to the workers' processes, in tp order.
    """

    url = "http://stand-in"
    evidence = None

    def __init__(self, version, workers):
        self.version, self.workers = version, workers
        self.check = None
        self.weight_version = "0"
        self._lock = threading.Lock()
        self._turns = threading.Condition()
        self._next, self._serving = itertools.count(), 0

    def get(self, path, *, timeout_s):
        if path == "/server_info":
            return {"version": self.version}
        assert path == "/model_info", path
        with self._lock:
            RECORD.requests.append(path.strip("/"))
            return {"weight_version": self.weight_version}

    def post(self, path, body=None, *, timeout_s, params=None, sent=None):
        self.check(path, {**(body or {}), **(params or {})})
        with self._lock:
            shown = {name: value for name, value in (body or {}).items() if name in SHOWN and name != "new_version"}
            RECORD.requests.append(" ".join([path.strip("/"), *(f"{n}={v}" for n, v in sorted(shown.items()))]))
            turn = None if path in AT_ONCE else next(self._next)
            if path == "/update_weight_version":
                self.weight_version = body["new_version"]
        if sent is not None:
            sent()
        seam = f"request {path.strip('/')}"
        if turn is None:
            reach(seam)
            return self._answer(path, body)
        with self._turns:
            self._turns.wait_for(lambda: self._serving == turn)
        try:
            reach(seam)
            return self._answer(path, body)
        finally:
            with self._turns:
                self._serving += 1
                self._turns.notify_all()

    def _answer(self, path, body):
        if path == UPDATE:
            payloads = body["serialized_named_tensors"]
            for worker, payload in zip(self.workers, payloads, strict=True):
                worker.send(("update", payload, body["load_format"]))
            for worker in self.workers:
                answer_of(worker)
        return {"success": True}


def serve_worker(folder, rank):
    """Run the process of one TP worker until a connection begins with "stop"."""
    held: dict[str, Served] = {}
    count_commands_in_the_receiver()
    counted_handles.open_counted_handles()

    def serve(connection):
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                what, *content = connection.recv()
                try:
                    connection.send((_act(held, what, content), None))
                except Exception:
                    connection.send((None, traceback.format_exc()))

    with Listener(str(worker_socket(folder, rank)), family="AF_UNIX") as listener:
        while (connection := listener.accept()).recv() != "stop":
            threading.Thread(target=serve, args=(connection,), daemon=True).start()


def stop_worker(folder, rank):
    connect(folder, rank, "stop").close()


def _act(held, what, content):
    if what == "new":
        forget_all_in_the_receiver()
        FAULT.clear()
        [arguments, keywords] = content
        held["model"] = Served(*arguments, **keywords)
        gc.collect()  # what the model before had mapped
    elif what == "fail":
        FAULT[:] = content
        return RECORD.take().num_planted
    elif what == "update":
        payload, load_format = content
        named = pickle.loads(base64.b64decode(payload))
        if load_format == LOADER:
            receive(held["model"], named)
        else:
            with torch.no_grad():
                held["model"].load_weights(_unpacked(named))
    elif what == "refuse":
        counted_handles.REFUSED.clear()
        counted_handles.REFUSED.update(content[0])
    elif what == "regions":
        return sorted(name for state in receiver._RECEIVER.states.values() for name in state.regions)
    elif what == "die":
        # Nothing is released: the process that exported it finds its counters as they are.
        held.setdefault("lost", []).extend(dict(state.regions) for state in receiver._RECEIVER.states.values())
    elif what == "differing":
        [weights] = content
        return differing(held["model"], torch.load(io.BytesIO(weights)))
    return None


def _unpacked(bucket):
    flat = bucket["flattened_tensor"]
    return [(m.name, flat[m.start_idx : m.end_idx].view(m.dtype).view(m.shape)) for m in bucket["metadata"]]


def worker_socket(folder, rank):
    return Path(folder) / f"worker{rank}"


def connect(folder, rank, greeting="hello"):
    """A connection to a worker's process, which may not have come so far yet."""
    deadline = time.monotonic() + 30
    while True:
        try:
            connection = Client(str(worker_socket(folder, rank)), family="AF_UNIX")
            break
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)
    connection.send(greeting)
    return connection


def ask(worker, *message):
    worker.send(message)
    return answer_of(worker)


def answer_of(worker):
    value, error = worker.recv()
    assert error is None, f"in the worker's process: {error}"
    return value


# --- Worlds, engines, syncs ----------------------------------------------------------------------------------------------


class World:
    """The training ranks, on one of them; they are cut into slices by `cut`.

    Args:
        rank: Of the training ranks.
        size: How many there are.
        folder: For sockets and stores.
    """

    def __init__(self, rank, size, folder):
        self.rank, self.size, self.folder = rank, size, Path(folder)
        self._store = store = dist.FileStore(str(self.folder / f"store{size}"), size)
        self._num_gathered = 0
        self.gather(None)  # some are still in the world before
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=MESH_S))
        self.worker = connect(folder, rank)

    def cut(self, tp_size):
        """Make the slices' groups; also anew, after one was broken on purpose."""
        self.tp_size = tp_size
        pid = os.getpid()
        mine = Member(self.rank, self.size, tp_size, Host.here(), pid, start_of(pid))
        members = self.gather(mine)
        starts = range(0, self.size, tp_size)
        groups = [
            make_group(range(start, start + tp_size), timeout_s=GROUP_S, description="slice") if tp_size > 1 else None
            for start in starts
        ]
        self.tp_rank = self.rank % tp_size
        start = self.rank - self.tp_rank
        self.ranks = list(range(start, start + tp_size))
        # The last one where there is one slice of two: rank, position and owner must not be taken for each other.
        self.owner_rank = self.ranks[-1 if self.size == tp_size == 2 else 0]
        self.is_owner = self.rank == self.owner_rank
        self.group = RecordingGroup(
            [members[r] for r in self.ranks], rank=self.rank, group=groups[start // tp_size], timeout_s=GROUP_S
        )
        self.workers = [connect(self.folder, r) for r in self.ranks] if self.is_owner else []

    def gather(self, value):
        """Of every rank.  Not by a collective: process groups may be broken, on purpose or not."""
        number, self._num_gathered = self._num_gathered, self._num_gathered + 1
        self._store.set(f"{number} {self.rank}", pickle.dumps(value))
        keys = [f"{number} {r}" for r in range(self.size)]
        self._store.wait(keys, timedelta(seconds=PATIENCE_S))
        return [pickle.loads(self._store.get(key)) for key in keys]

    def close(self):
        self.gather(None)  # a rank that is done stops its worker, which an owner may still be using
        dist.destroy_process_group()


@functools.cache
def shapes_of(moe):
    return {name: tuple(tensor.shape) for name, tensor in served_weights(policy(moe)).items()}


class Spec(ModelSpec):
    """What the served model expects; two more places where errors can be planted."""

    __slots__ = ()

    def check(self, tensors, **kwargs):
        reach("check names")
        super().check(tensors, **kwargs)

    def check_complete(self, names, **kwargs):
        reach("check that all is sent")
        super().check_complete(names, **kwargs)


class Engine:
    """One engine of a slice, and this rank's syncs with it.

    Args:
        world: Where.
        moe: Whether it serves experts.
        habit: Of its loader; see `Served`.
        version: Of SGLang; releases from 0.5.21 on have a session for a weight update.
        shapes: Of the checkpoint that it serves, if it is not that of `Policy`.
        dtypes: Of the checkpoint, if known.
    """

    def __init__(self, world, *, moe=False, habit=None, version=None, shapes=None, dtypes=None):
        self.world = world
        self.is_running = True
        _ledgers.clear()  # those of other engines
        self.num_syncs = 0
        server = None
        if version is None:
            version = "0.5.21" if world.size > world.tp_size else "0.5.20"
        if world.is_owner:
            self._new_workers({"moe": moe, "habit": habit})
            server = make_server(StandIn(version, world.workers))
        self.sync = make_syncer(
            world.group, owner_rank=world.owner_rank, tp_ranks={r: r % world.tp_size for r in range(world.size)},
            server=server, spec=Spec(shapes_of(moe) if shapes is None else shapes, "the test", dtypes or {}), folder=world.folder,
            reader_is_alive=lambda: self.is_running,
        )  # fmt: skip
        world.gather(None)  # faults are planted in new workers

    def run(self, source, *, fault=None, meddle=None, timeout_s=20.0, **options):
        """One sync.

        Args:
            source: See `Source`.
            fault: (seam, call) at which this rank, or its worker, is to raise.
            meddle: See `RecordingGroup`.
            timeout_s: Of the sync, in seconds.
            options: See `SyncOptions`.
        """
        self.num_syncs += 1
        self.world.group.num_agreed = 0
        seam, number = fault or (None, None)
        if seam == "agreement":
            meddle = functools.partial(_plant_at, number)
        self.world.group.meddle = meddle
        if seam == "worker":
            ask(self.world.worker, "fail", fault)
        RECORD.take()
        FAULT[:] = [] if fault is None else [fault]
        error = report = wrong = None
        modified = []
        try:
            report = self.sync.run(
                source.given(), version=str(self.num_syncs), options=SyncOptions(**options), timeout_s=timeout_s,
                on_engine_modified=lambda: modified.append(True),
            )  # fmt: skip
        except KeyboardInterrupt as caught:
            error = "RankFailedError", f"KeyboardInterrupt: {caught}"  # as the others have it
            caught.__traceback__ = None
        except Exception as caught:
            error = type(caught).__name__, caught.message if isinstance(caught, TpColocateError) else str(caught)
            caught.__traceback__ = None  # nothing of the trainer's is to be kept by it
        record = RECORD.take()
        FAULT.clear()
        if seam == "worker":
            record.num_planted = ask(self.world.worker, "fail")
        self.world.group.meddle = None
        if error is None:
            buffer = io.BytesIO()
            torch.save(source.expected(), buffer)
            wrong = ask(self.world.worker, "differing", buffer.getvalue())
        return Synced(record, error, wrong, None if report is None else _facts(report), bool(modified))

    def _new_workers(self, keywords):
        for k, worker in enumerate(self.world.workers):
            ask(worker, "new", (k, self.world.tp_size), keywords)

    def left(self):
        """What is still out of this rank's after a good sync."""
        return [*outstanding(), *map(str, left_behind(self.sync)), *counted_handles.late_releases()]

    def close(self):
        """The server ends; what it had mapped comes back."""
        self.world.gather(None)  # the other ranks may still be looking at their workers
        if self.world.is_owner:
            self._new_workers({})
        self.world.gather(None)  # no rank takes back what a worker still has
        self.is_running = False
        self.sync.close(timeout_s=1)


@dataclass
class Synced:
    """How one sync went on one rank.

    Attributes:
        record: See `Record`.
        error: Class and message, or None.
        differing: Parameters of the rank's worker that are not what they should be; None after an error.
        facts: Of the report.
        modified: Whether weights may have changed in the engine.
    """

    record: Record
    error: tuple[str, str] | None
    differing: list[str] | None
    facts: dict | None
    modified: bool


def _facts(report):
    return {
        "transport": report.transport,
        "mapped": [rank.num_mapped for rank in report.ranks],
        "buckets": report.num_buckets,
        "direct": [rank.direct_bytes for rank in report.ranks],
        "own": [rank.own_bytes for rank in report.ranks],
        "peer": [rank.peer_bytes for rank in report.ranks],
        "staged": [rank.staged_bytes for rank in report.ranks],
        "warnings": list(report.warnings),
        "tensors": report.num_tensors,
        "ignored": report.ignored,
        "missing": report.missing,
        "nonfinite": report.nonfinite,
    }


# --- Comparing ranks -----------------------------------------------------------------------------------------------------


def divergences(of_ranks, tp_size):
    """In what the ranks of one sync differ that they must have in common, in words; empty if in nothing.

    Agreements and collectives over meshes, in their order, among the ranks of a slice; the collectives among all ranks;
    errors, class and message, among the ranks of a slice.

    Args:
        of_ranks: `Synced` of every training rank.
        tp_size: Ranks of a slice.
    """
    found = []
    for rank, synced in enumerate(of_ranks):
        first = rank - rank % tp_size
        own, others = synced.record.of("agree", "mesh"), of_ranks[first].record.of("agree", "mesh")
        if own != others:
            found.append(f"rank {first} and rank {rank} do different things: {difference(others, own)}")
        if synced.error != of_ranks[first].error:
            found.append(f"rank {first} ends with {of_ranks[first].error}, rank {rank} with {synced.error}")
        if synced.differing:
            found.append(f"the worker of rank {rank} holds other values: {synced.differing}")
        own, others = synced.record.of("mesh"), of_ranks[0].record.of("mesh")
        if own != others:
            found.append(f"rank 0 and rank {rank} make different mesh collectives: {difference(others, own)}")
    return found


def difference(one, other):
    """The first place at which two sequences differ."""
    for i, (here, there) in enumerate(itertools.zip_longest(one, other)):
        if here != there:
            return f"at {i}, {'nothing' if here is None else ' '.join(here)} | {'nothing' if there is None else ' '.join(there)}"
    return "in nothing"


# --- Faults --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """An error that is planted in one sync on one rank.

    Attributes:
        seam: "agreement": brought to an agreement; "worker": of a command in the rank's worker; else what raises.
        number: Which call of it, from 0.
        rank: Where.
        phase: The agreement that is next.
        is_before_mesh: Whether the rank has not yet come to any collective over a mesh.
    """

    seam: str
    number: int
    rank: int
    phase: str
    is_before_mesh: bool

    def __str__(self):
        return f"{self.seam} {self.number} on rank {self.rank}, before {self.phase!r}"


def faults(records, owners, *, on_every_rank):
    """At every agreement, and at the first call of everything else in each phase.

    Args:
        records: Of a good sync on every rank.
        owners: Rank -> the owner of its slice.
        on_every_rank: Each on every rank; otherwise on one rank after the other.
    """
    of_ranks = []
    for rank, record in enumerate(records):

        def fault(seam, number, place, record=record, rank=rank):
            phase = next((event[1] for event in record.events[place:] if event[0] == "agree"), "the end")
            return Fault(seam, number, rank, phase, not any(event[0] == "mesh" for event in record.events[:place]))

        agreed = [i for i, event in enumerate(record.events) if event[0] == "agree"]
        found = [fault("agreement", number, place) for number, place in enumerate(agreed)]
        seams = {}
        for seam, place in record.calls:
            seams.setdefault(seam, []).append(place)
        commands = [i for i, event in enumerate(records[owners[rank]].events) if event[0] == "command"]
        found += [fault("worker", number, place, records[owners[rank]]) for number, place in enumerate(commands)]
        for seam, places in sorted(seams.items()):
            of_phases = {}
            for number, place in enumerate(places):
                one = fault(seam, number, place)
                of_phases.setdefault(one.phase, one)
            found += of_phases.values()
        of_ranks.append([one for i, one in enumerate(found) if on_every_rank or i % len(records) == rank])
    return [one for found in of_ranks for one in found]


def wrong_after(rank, failed, healed, left, tp_size):
    """What is wrong with a sync in which an error was planted, and with the one after it, in words.

    Args:
        rank: Where the error was planted.
        failed, healed: `Synced` of every rank.
        left: Of every rank, what it still had to get back in the end.
        tp_size: Ranks of a slice.
    """
    found = divergences(failed, tp_size)
    error = failed[rank].error
    if failed[rank].record.num_planted != 1:
        found.append(f"rank {rank} did not come to where the error was planted")
    if error is not None and "planted" not in error[1]:
        found.append(f"rank {rank} ends with another error than the planted one: {error}")
    for r, synced in enumerate(failed):
        if r // tp_size != rank // tp_size and synced.error is not None:
            found.append(f"rank {r} of another slice ends with {synced.error}")
    found += [f"the sync after it: {words}" for words in divergences(healed, tp_size)]
    found += [f"the sync after it: rank {r} ends with {s.error}" for r, s in enumerate(healed) if s.error is not None]
    return found + [f"rank {r} has left {items}" for r, items in enumerate(left) if items]
