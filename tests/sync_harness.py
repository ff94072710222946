"""Syncs without a server: real ranks, the real receiver in worker processes, and a record of all that they do together.

A world is one call of `run_ranks`: training ranks, which alone form process groups, and behind them one process for
each TP worker.  The requests, the workers' socket and the receiver are the library's own; what stands in for SGLang is
`StandIn`, which takes up one request after the other and hands each worker its payload.  Shared memory stands for
memory of a GPU that another process can map.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import functools
import io
import itertools
import os
import pickle
import threading
import time
import traceback
import weakref
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import timedelta
from multiprocessing.connection import Client, Listener
from pathlib import Path

import harness
import torch
import torch.distributed as dist
from sync_models import Served, differing, policy, served_weights
from torch.distributed.tensor import DTensor

from tpcolocate import ipc_payload
from tpcolocate.agreement import RankGroup
from tpcolocate.errors import TpColocateError
from tpcolocate.groups import Host, Member, make_group
from tpcolocate.in_server.tpcolocate_receiver import receive
from tpcolocate.in_server.tpcolocate_receiver import session as receiver
from tpcolocate.processes import start_of
from tpcolocate.server import channel
from tpcolocate.server.api import ServerApi
from tpcolocate.weights.plan.loader_map import LoaderMap
from tpcolocate.weights.sources.model_spec import ModelSpec
from tpcolocate.weights.sync import phases, run, syncer
from tpcolocate.weights.sync.options import SyncOptions
from tpcolocate.weights.transport import staging

if "peft" not in harness.PRELOADED:
    # Seconds for each rank, or once for all of them; transformers comes with it.
    harness.PRELOADED += ("peft", "transformers.modeling_utils", "transformers.conversion_mapping")


# --- What this net knows of the library's inside: to be adapted here, and nowhere else -----------------------------------

LOADER = "tpcolocate_receiver.receive"


def make_syncer(group, *, owner_rank, tp_ranks, server, spec, folder, reader_is_alive):
    return syncer.WeightSync(
        group, device=torch.device("cpu"), owner_rank=owner_rank, tp_ranks=tp_ranks, server=server, spec=spec, loader=LOADER,
        folder=folder, reader_is_alive=reader_is_alive,
    )  # fmt: skip


def left_behind(sync):
    """What a good sync must not leave to later ones."""
    return list(sync.abandoned)


def forget_all_in_the_receiver():
    """In a worker's process: the next model is a new engine's."""
    receiver._regions.clear()
    receiver._held.clear()


def shorten_grace(seconds):
    """How much longer than its own deadline a rank waits for the others."""
    phases.GRACE_S = seconds


def described(command):
    """A command to a worker in a few words, without what differs from run to run; a dict, or a typed command."""
    given = {f.name: getattr(command, f.name) for f in fields(command)} if is_dataclass(command) else dict(command)
    words = {"do": given.pop("do", type(command).__name__)}
    for name, value in given.items():
        if isinstance(value, (list, tuple, dict)) and name in ("map", "release", "define", "entries", "shapes"):
            if len(value) or name == "entries":
                words[name] = len(value)
        elif name == "program" and value is not None:
            words[name] = value.rpartition("/")[2]  # what is before it counts the plans
        elif name in ("keep", "last", "tell", "watch") and value:
            words[name] = "yes"
    return words


def count_commands_in_the_receiver():
    """In a worker's process: `reach` at every command that is carried out."""
    act = receiver._act

    def acting(model, plans, job, answer):
        reach("worker")
        return act(model, plans, job, answer)

    receiver._act = acting


COMMAND_COUNTER = (phases.SyncPhases, "number")
"""Draws the next command's number; every rank calls it."""
A_BRANCH = (LoaderMap, "is_verified", True)
"""A decision that all ranks must take alike, and what it is to be on one of them alone."""
FINISH_MESH_COLLECTIVES = (run.SyncRun, "keep_company")
"""Makes the mesh collectives that a rank owes after a failure."""
SEAMS = {
    "allocate": (ipc_payload, "allocate"),
    "export": (ipc_payload, "export_storage"),
    "copy into a bucket": (ipc_payload, "view"),
    "wait for release": (ipc_payload.Ledger, "settle"),
    "post": (channel.Channel, "post"),
    "collect": (channel.Channel, "collect"),
}
"""Where errors are planted, before the call; `record_everything` adds collectives over meshes, after the call."""
PLAN = (staging.Transfer, "plan")
"""Likewise, after the call, which is a collective."""


# --- The record ----------------------------------------------------------------------------------------------------------

MESH_COLLECTIVES = (
    "all_reduce", "all_to_all_single", "all_to_all", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor",
)  # fmt: skip


@dataclass
class Record:
    """What one rank did, in order.

    Attributes:
        events: ("agree", what), ("mesh", kind, size) and, on the owner, ("command", words).
        requests: On the owner: what was asked of the server.
    """

    events: list[tuple[str, ...]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def note(self, *event):
        self.events.append(event)

    def take(self):
        taken = Record(self.events, self.requests)
        self.events, self.requests = [], []
        return taken

    def of(self, *kinds):
        return [event for event in self.events if event[0] in kinds]


RECORD = Record()
"""Of this process."""
CALLS: collections.Counter[str] = collections.Counter()
"""Seam -> how often this process has come there in the sync in progress."""
FAULT: list[tuple[str, int]] = []
"""(seam, call) at which this process is to raise; empty or one."""
_ledgers: list[weakref.ref] = []


def reach(seam):
    """Raise if that is planned for this call."""
    number = CALLS[seam]
    CALLS[seam] += 1
    if (seam, number) in FAULT:
        raise RuntimeError(f"planted at {seam} {number}")


def record_everything():
    """Once per process of a training rank."""
    for seam, (place, name) in SEAMS.items():
        wrap(place, name, before=lambda *_, seam=seam, **__: reach(seam))
    wrap(*PLAN, after=lambda *_, **__: reach("plan"))
    for name in MESH_COLLECTIVES:
        wrap(
            dist, name, before=functools.partial(_note_collective, name), after=lambda *_, name=name, **__: reach(name)
        )
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
    return function


@contextlib.contextmanager
def replaced(place, name, make, *, here=True):
    """An attribute made anew from what it was, for the length of a block, on one rank."""
    original = getattr(place, name)
    if here:
        setattr(place, name, make(original))
    try:
        yield
    finally:
        setattr(place, name, original)


def _note_collective(kind, tensor, *args, **_):
    # Of the parts that are exchanged every rank has its own sizes.
    size = [] if kind.startswith("all_to_all") else [f"{tensor.numel() * tensor.element_size()} bytes"]
    RECORD.note("mesh", kind, *size)


def outstanding():
    """Handles that this process has exported for a sync and that have not come back."""
    _ledgers[:] = [ref for ref in _ledgers if ref() is not None]
    return [str(item) for ref in _ledgers if (ledger := ref()) is not None for item in ledger.outstanding()]


def _words(number, commands):
    of_ranks = [described(commands[k]) for k in sorted(commands)]
    names = dict.fromkeys(name for words in of_ranks for name in words)
    told = []
    for name in names:
        values = [str(words.get(name, 0)) for words in of_ranks]
        value = values[0] if len(set(values)) == 1 else "|".join(values)
        told.append(value if name == "do" else f"{name}={value}")
    return f"{number} {' '.join(told)}"


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

PATIENCE_S = 200.0
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
    """The process of one TP worker, until somebody comes with "stop"."""
    held: dict[str, Served] = {}
    count_commands_in_the_receiver()

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
    elif what == "fail":
        FAULT[:] = content
        CALLS.clear()
    elif what == "update":
        payload, load_format = content
        named = pickle.loads(base64.b64decode(payload))
        if load_format == LOADER:
            receive(held["model"], named)
        else:
            with torch.no_grad():
                held["model"].load_weights(_unpacked(named))
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
        store = dist.FileStore(str(self.folder / f"store{size}"), size)
        store.set(f"here{rank}", "")  # some are still in the world before
        store.wait([f"here{r}" for r in range(size)], timedelta(seconds=PATIENCE_S))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=MESH_S))
        self.worker = connect(folder, rank)

    def cut(self, tp_size):
        """Make the slices' groups; also anew, after one was broken on purpose."""
        self.tp_size = tp_size
        pid = os.getpid()
        mine = Member(self.rank, self.size, tp_size, Host.here(), pid, start_of(pid))
        members: list = [None] * self.size
        dist.all_gather_object(members, mine)
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
        """Of every rank."""
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def close(self):
        dist.barrier()  # a rank that is done stops its worker, which an owner may still be using
        dist.destroy_process_group()


@functools.cache
def shapes_of(moe):
    return {name: tuple(tensor.shape) for name, tensor in served_weights(policy(moe)).items()}


class Spec(ModelSpec):
    """What the served model expects, told by one more place where errors can be planted."""

    __slots__ = ()

    def check(self, tensors):
        reach("check names")
        super().check(tensors)

    def check_complete(self, names):
        reach("check that all is sent")
        super().check_complete(names)


class Engine:
    """One engine of a slice, and this rank's syncs with it.

    Args:
        world: Where.
        moe: Whether it serves experts.
        habit: Of its loader; see `Served`.
        version: Of SGLang; releases from 0.5.21 on have a session for a weight update.
    """

    def __init__(self, world, *, moe=False, habit=None, version=None):
        self.world = world
        self.is_running = True
        self.num_syncs = 0
        server = None
        if version is None:
            version = "0.5.21" if world.size > world.tp_size else "0.5.20"
        if world.is_owner:
            self._new_workers({"moe": moe, "habit": habit})
            server = ServerApi(StandIn(version, world.workers))
        self.sync = make_syncer(
            world.group, owner_rank=world.owner_rank, tp_ranks={r: r % world.tp_size for r in range(world.size)},
            server=server, spec=Spec(shapes_of(moe), "the test"), folder=world.folder,
            reader_is_alive=lambda: self.is_running,
        )  # fmt: skip

    def run(self, source, *, fault=None, meddle=None, timeout_s=20.0, **options):
        """One sync.

        Args:
            source: See `Source`.
            fault: (seam, call) at which this rank is to raise.
            meddle: See `RecordingGroup`.
            timeout_s: Of the sync, in seconds.
            options: See `SyncOptions`.
        """
        self.num_syncs += 1
        self.world.group.num_agreed = 0
        self.world.group.meddle = meddle
        RECORD.take()
        CALLS.clear()
        FAULT[:] = [] if fault is None else [fault]
        error = report = wrong = None
        try:
            report = self.sync.run(
                source.given(), version=str(self.num_syncs), options=SyncOptions(**options), timeout_s=timeout_s,
                touched=lambda: reach("touched"),
            )  # fmt: skip
        except TpColocateError as caught:
            error = type(caught).__name__, caught.message
            caught.__traceback__ = None  # nothing of the trainer's is to be kept by it
        calls, record = dict(CALLS), RECORD.take()
        FAULT.clear()
        self.world.group.meddle = None
        if error is None:
            buffer = io.BytesIO()
            torch.save(source.expected(), buffer)
            wrong = ask(self.world.worker, "differing", buffer.getvalue())
        return Synced(record, error, wrong, None if report is None else _facts(report), calls)

    def _new_workers(self, keywords):
        for k, worker in enumerate(self.world.workers):
            ask(worker, "new", (k, self.world.tp_size), keywords)

    def left(self):
        """What is still out of this rank's after a good sync."""
        return [*outstanding(), *map(str, left_behind(self.sync))]

    def close(self):
        """The server ends; what it had mapped comes back."""
        dist.barrier()  # the other ranks may still be looking at their workers
        if self.world.is_owner:
            self._new_workers({})
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
        calls: Seam -> how often the rank came there.
    """

    record: Record
    error: tuple[str, str] | None
    differing: list[str] | None
    facts: dict | None
    calls: dict[str, int]


def _facts(report):
    return {
        "transport": report.transport,
        "mapped": [rank.num_lent for rank in report.ranks],
        "buckets": report.num_buckets,
        "direct": [rank.direct_bytes for rank in report.ranks],
        "warnings": list(report.warnings),
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
