"""One weight sync in progress: the phases that every rank of a slice goes through together.

After each phase the ranks exchange ok-or-error; the first error is raised on all of them, and nobody enters the next
collective alone.  Two ways of moving weights, often both in one sync:

* **buckets** of full tensors, loaded by the engine's own loader under a watch, or by what was learned from that;
* **moves** of just the parts that each TP worker reads, once that is known, out of memory that it maps or through a
  little staging memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tpcolocate import ipc_payload
from tpcolocate.errors import ConfigError, DeadlineError, SyncError, TpColocateError, WeightsMismatchError
from tpcolocate.report import RankReport, Stopwatch, SyncReport
from tpcolocate.weights.delivery import Delivery, Replies, WeightServer, slowest, some
from tpcolocate.weights.items import Item, Items, full_bytes, full_tensor, is_collective
from tpcolocate.weights.loans import Loan
from tpcolocate.weights.memory import allocated_bytes, free_bytes, plan_bucket
from tpcolocate.weights.mover import Held, Mover, Moves, Sums
from tpcolocate.weights.options import SyncOptions
from tpcolocate.weights.source import Source, Weights

if TYPE_CHECKING:
    from tpcolocate.weights.sync import WeightSync

logger = logging.getLogger(__name__)
T = TypeVar("T")
Named = tuple[str, tuple[int, ...], torch.dtype]

# The others are to hear of a missed deadline rather than to miss one of their own.
_GRACE_S = 5.0
_PREFLIGHT_S = 15.0
# From the engine's answer to the return of all handles.  It is milliseconds; what takes longer does not come.
_RETURN_S = 10.0
_PREFLIGHT_BYTES = 4096
_PREFLIGHT = -1


@dataclass(frozen=True, slots=True)
class _Facts:
    """What one rank tells the others before anything is sent.

    Attributes:
        digest: Of names, shapes and dtypes; equal on all ranks.
        headline: The same for people.
        free: Bytes that can be staged.
        steady: Names whose memory may be lent, as a digit for each.
    """

    digest: bytes
    headline: str
    free: int
    steady: str


class SyncRun:
    """The state of one sync.

    Args:
        sync: What lasts from sync to sync.
        version: To be published.
        options: See `SyncOptions`.
        timeout_s: For all of it, in seconds.
    """

    def __init__(self, sync: WeightSync, version: str, options: SyncOptions, timeout_s: float) -> None:
        self.sync = sync
        self.group = sync.group
        self.version = version
        self.options = options
        self.deadline = time.monotonic() + timeout_s
        sync.mover.deadline = self.deadline + _GRACE_S
        self.timeout_s = timeout_s
        self.watch = Stopwatch()
        self.ledger = ipc_payload.Ledger(rank=sync.group.rank, reader_is_alive=sync.reader_is_alive)
        self.delivery = Delivery(
            tp_rank=sync.tp_rank,
            tp_size=len(sync.group),
            is_owner=sync.is_owner,
            payloads=options.payloads,
            transport=options.transport,
            file_folder=sync.folder if options.folder is None else options.folder,
            ledger=self.ledger,
            copied=self.note_peak,
        )
        self.rest: Iterator[Items] = iter(())
        self.tensors: dict[str, Held] = {}
        self.sharded = False
        self.begun = self.touched = self.mode_told = self.moving = False
        self.unmoved: list[Callable[[], object]] | None = None
        """Collectives of the moves that are still to come; None before they were planned."""
        self.num_commands = 0
        self.names: set[str] = set()
        self.unproven: set[str] = set()
        self.learned = False
        self.num_bytes = self.num_tensors = self.num_buckets = self.num_replayed = 0
        self.num_direct = self.num_staged = 0
        self.worker_seconds: dict[str, float] = {}
        self.bucket_bytes = options.bucket_bytes
        self.notes: list[str] = []
        self.peak_extra = 0
        self.allocated_before = allocated_bytes(sync.device)

    # --- the phases ----------------------------------------------------------------------------------------------

    def carry_out(self, source: Source, touched: Callable[[], None]) -> SyncReport:
        with self.watch.phase("prepare"):
            weights, lent = self.prepare_together(source)
        sums: Sums | None = None
        with self.watch.phase("open"):
            sums = self.open(lent)
        if self.delivery.transport in ("auto", "ipc"):
            self.preflight()
        touched()
        self.touched = True
        moved: set[str] = set()
        if self.agree_on_mode():
            moved = set(self.tensors)
            self.move(weights, lent, sums)
        del sums
        known = weights.known
        left = weights if known is None else [item for item in known if item[0] not in moved]
        self.rest = buckets(left, self.bucket_bytes)
        error: BaseException | None = None
        while known is None or len(moved) < len(known):
            bucket = self.next_bucket(error)
            if bucket is None:
                break
            error = self.send(bucket)
        with self.watch.phase("finish"):
            self.together("check that all weights were sent", lambda: self.check_complete(weights))
            if self.learned and not self.options.partial:
                self.survey()
            self.leave()
            self.on_owner(
                "finish the weight sync",
                lambda server: server.end_sync(self.version, timeout_s=self.left("finish the weight sync")),
            )
            if self.sync.device.type == "cuda":
                torch.cuda.ipc_collect()
        return self.report()

    def prepare_together(self, source: Source) -> tuple[Weights, set[str]]:
        """Read and check the weights on every rank, compare what the ranks hold, plan the memory."""
        prepared: tuple[Weights, _Facts] | None = None
        error: BaseException | None = None
        try:
            prepared = self.prepare(source)
        except BaseException as caught:
            error = caught
        facts = self.agree(error, None if prepared is None else prepared[1], what="prepare a weight sync")
        assert prepared is not None
        weights, _ = prepared
        self.check_alike([(of_rank.digest, of_rank.headline) for of_rank in facts])  # type: ignore[union-attr]
        largest = max((_padded(tensor) for _, tensor in weights.known), default=0) if weights.known is not None else 0
        # Ranks of a CPU slice share one /dev/shm.
        copies = len(self.group) if self.sync.device.type == "cpu" else 1
        self.bucket_bytes = plan_bucket(
            self.options.bucket_bytes,
            [of_rank.free for of_rank in facts],  # type: ignore[union-attr]
            largest=largest,
            copies=copies,
            gathered=weights.reading_bytes,
        )
        steady = [of_rank.steady for of_rank in facts]  # type: ignore[union-attr]
        return weights, {name for name, *of_ranks in zip(self.tensors, *steady) if set(of_ranks) == {"1"}}

    def prepare(self, source: Source) -> tuple[Weights, _Facts]:
        expected = None if self.sync.spec is None else self.sync.spec.shapes
        weights = Weights(source, expected=expected, rename=self.options.rename)
        self.sharded = weights.is_sharded
        steady: list[bool] = []
        if weights.known is not None:
            if not weights.known:
                raise ConfigError("there are no weights to sync", hint="pass a module with parameters")
            repeated = _repeated(name for name, _ in weights.known)
            if repeated is not None:
                raise WeightsMismatchError(f"{repeated} is given twice", hint="names must be unique")
            self.check([(name, tensor.shape) for name, tensor in weights.known])
            if self.sync.spec is not None and not self.options.partial:
                self.sync.spec.check_complete([*(name for name, _ in weights.known), *weights.aliases])
            if self.options.parts and self.options.payloads == "per_rank" and self.options.transport in ("auto", "ipc"):
                for name, tensor in weights.known:
                    if (one := self.sync.mover.hold(tensor)) is not None:
                        self.tensors[name] = one
                steady = self.sync.mover.loans.note([one.local.untyped_storage() for one in self.tensors.values()])
                if self.sync.lending_refused is not None:
                    steady = [False] * len(steady)
                if self.sync.device.type == "cuda":
                    # The workers' streams know nothing of those that the weights were computed on.
                    torch.cuda.synchronize(self.sync.device)
        contents = None if weights.known is None else [(n, tuple(t.shape), t.dtype) for n, t in weights.known]
        digest = hashlib.sha256(repr((contents, list(self.tensors) == [n for n, *_ in contents or ()])).encode())
        return weights, _Facts(
            digest.digest(),
            "a generator" if contents is None else _headline(contents),
            free_bytes(self.sync.device),
            "".join("1" if one else "0" for one in steady),
        )

    def check_alike(self, told: list[tuple[bytes, str]]) -> None:
        """Refuse ranks whose weights differ.  Pure: every rank comes to the same error."""
        if len({digest for digest, _ in told}) > 1:
            said = "; ".join(f"rank {rank}: {headline}" for rank, (_, headline) in zip(self.group.ranks, told))
            raise WeightsMismatchError(
                f"the ranks hold different weights: {said}",
                hint="every rank must pass the same names in the same order",
            )

    def open(self, lent: set[str]) -> Sums | None:
        """Hold generation, reach the workers, and learn whether what is known of them still holds.

        Returns:
            Sums that were begun while the engine was being reached, if the last sync's moves are likely to be repeated.
        """
        error: BaseException | None = None
        session, present, sums = "", None, None
        try:
            if self.sync.server is not None:
                session = ipc_payload.new_session()
                self.begun = True
                self.sync.server.begin_sync(timeout_s=self.left("open the weight sync"))
                if self.options.transport != "stock":
                    self.delivery.workers = self.sync.server.open_workers(
                        self.sync.folder / f"{session}.sock",
                        session,
                        loader=self.sync.loader,
                        tp_size=len(self.group),
                        timeout_s=self.left("open the weight sync"),
                    )
            if self.sync.moves is not None and self.sync.moves[0] == self.signature(lent):
                sums = self.sync.mover.begin_sums(self.sync.moves[1], self.tensors)
            if self.delivery.workers is not None:
                present = self.delivery.workers.greet(timeout_s=self.left("open the weight sync"))
                for tp_rank, greeting in present.items():
                    if greeting["error"] is not None:
                        raise SyncError(f"TP rank {tp_rank}: {greeting['error']}")
        except BaseException as caught:
            error = caught
        told = self.agree(error, (session, present), what="open the weight sync")
        self.delivery.session, greetings = told[self.group.ranks.index(self.sync.owner_rank)]
        if greetings is not None:
            self.sync.knowledge.confirm([greetings[k]["plans"] for k in range(len(self.group))])
        return sums

    def check(self, shapes: list[tuple[str, torch.Size]]) -> None:
        if self.sync.spec is not None:
            self.sync.spec.check(shapes)

    def check_complete(self, weights: Weights) -> None:
        if self.sync.spec is not None and not self.options.partial:
            self.sync.spec.check_complete([*self.names, *weights.aliases])

    def leave(self) -> None:
        """Let the workers go, and take back what was lent for this sync."""

        def finish(server: WeightServer) -> None:
            if self.delivery.workers is not None:
                self.delivery.workers.finish()

        self.on_owner("end the weight sync", finish)
        self.together(
            "take the staging memory back",
            lambda: self.ledger.settle(deadline=min(self.deadline, time.monotonic() + _RETURN_S)),
        )

    def survey(self) -> None:
        """After the loader was watched: what no weight was ever copied into is told, or is an error on one rank alone."""
        replies = self.ask("look for parameters that nothing was copied into", {"do": "survey"})
        unwritten = {tp_rank: set(reply["unwritten"]) for tp_rank, reply in replies.items()}
        common = set.intersection(*unwritten.values())
        for tp_rank, names in unwritten.items():
            if names - common and not self.unproven:
                raise SyncError(
                    f"TP rank {tp_rank} took nothing for {some(sorted(names - common))}, other TP ranks did",
                    hint="the engine's weights are unknown now: sync again in full, or launch() again",
                    rank=self.sync.owner_rank,
                )
        if common and not self.unproven:
            self.notes.append(f"no weight was sent for these parameters of the engine: {some(sorted(common))}")

    def report(self) -> SyncReport:
        allocated = allocated_bytes(self.sync.device)
        warning = self.sync.alarm.note(allocated)
        mine = RankReport(
            rank=self.group.rank,
            seconds=dict(self.watch.seconds),
            num_exported=self.ledger.num_exported,
            num_returned=self.ledger.num_returned,
            num_lent=len(self.sync.mover.loans),
            latest_return_s=self.ledger.latest_return_s,
            direct_bytes=self.num_direct,
            staged_bytes=self.num_staged,
            peak_extra_bytes=self.peak_extra,
            allocated_bytes=allocated,
        )
        told = self.agree(None, (mine, warning), what="report the weight sync")
        warnings = [f"rank {r.rank}: {text}" for r, text in told if text is not None] + self.notes
        refused = self.sync.refused_ways.get(self.options.payloads)
        if self.delivery.transport == "file" and refused is not None:
            warnings.append(f"weights go through files: {refused}")
        for text in warnings:
            logger.warning("%s", text)
        return SyncReport(
            rank=self.group.rank,
            weight_version=self.version,
            num_bytes=self.num_bytes,
            num_tensors=self.num_tensors,
            num_buckets=self.num_buckets,
            seconds=self.watch.total(),
            transport=self.delivery.transport,
            checked_against="nothing" if self.sync.spec is None else self.sync.spec.origin,
            num_replayed=self.num_replayed,
            worker_seconds=dict(self.worker_seconds),
            num_proven=self.num_tensors - len(self.unproven),
            unproven=tuple(sorted(self.unproven)),
            bucket_bytes=self.bucket_bytes,
            warnings=tuple(warnings),
            ranks=tuple(report for report, _ in told),
        )

    # --- the preflight -------------------------------------------------------------------------------------------

    def preflight(self) -> None:
        """Prove once per engine that a handle opens in every TP rank, on the GPU it should, and comes back."""
        way = self.options.payloads
        if way in self.sync.proven_ways:
            self.delivery.transport = "ipc"
            return
        if way not in self.sync.refused_ways:
            with self.watch.phase("preflight"):
                problem = self.probe()
            if problem is None:
                self.sync.proven_ways.add(way)
                self.delivery.transport = "ipc"
                return
            self.sync.refused_ways[way] = problem
        problem = self.sync.refused_ways[way]
        if self.delivery.transport == "ipc":
            raise SyncError(
                f"handles of this process do not open in the engine: {problem}",
                hint="share IPC and PID namespaces and /dev/shm, switch expandable_segments off in PYTORCH_ALLOC_CONF, or use "
                'transport="auto", which falls back to files',
            )
        self.delivery.transport = "file"

    def probe(self) -> str | None:
        """One small handle there and back; what went wrong anywhere in the slice, or None."""
        error: BaseException | None = None
        commands: list[dict[str, Any]] = []
        try:
            if self.delivery.exports:
                flat = ipc_payload.allocate(_PREFLIGHT_BYTES, self.sync.device)
                flat.random_(0, 256)
                commands = self.delivery.commands(flat, "probe", number=_PREFLIGHT)
        except (TpColocateError, RuntimeError) as caught:
            error = caught  # an export that fails is an answer, not an accident
        told = self.agree(None, (commands, None if error is None else str(error)), what="make the preflight's handles")
        failed = next((text for _, text in told if text is not None), None)
        if failed is not None:
            self.ledger.reclaim()
            return f"export failed: {failed.splitlines()[0]}"
        per_tp_rank = [command for of_rank, _ in told for command in of_rank]
        replies = self.on_owner(
            "open the preflight's handles", lambda _: self.delivery.ask(per_tp_rank, _PREFLIGHT, _PREFLIGHT_S)
        )
        problem: str | None = None
        error = None
        try:
            problem = self.probed(replies)
        except SyncError as caught:
            error = caught
        problems = self.agree(error, problem, what="take the preflight's handles back")
        return next((text for text in problems if text is not None), None)

    def probed(self, replies: Replies) -> str | None:
        """This rank's part of the preflight's verdict."""
        self.ledger.note_opened(_PREFLIGHT, {rank: reply["opened"] for rank, reply in replies.items()})
        problem = None
        for tp_rank, reply in replies.items():
            if reply["error"] is not None:
                problem = f"TP rank {tp_rank}: {reply['error']}"
        mine = replies[self.sync.tp_rank]
        if problem is None and self.sync.device.type == "cuda":
            uuid = str(torch.cuda.get_device_properties(self.sync.device).uuid)
            if mine["uuid"] != uuid:
                # Not a question of transport: no other one would put the server on the right GPUs.
                raise SyncError(
                    f"TP rank {self.sync.tp_rank} of the server runs on GPU {mine['uuid']}, its training rank {self.group.rank} on {uuid}",
                    hint="do not pass base_gpu_id or gpu_id_step, nor CUDA_VISIBLE_DEVICES in env=",
                    rank=self.group.rank,
                )
        try:
            self.ledger.settle(deadline=min(self.deadline, time.monotonic() + _PREFLIGHT_S))
        except SyncError as error:
            problem = problem if problem is not None else error.message
        except DeadlineError as error:
            self.sync.abandoned.append(self.ledger.set_aside())
            problem = problem if problem is not None else error.message
        return problem

    # --- moves of parts ------------------------------------------------------------------------------------------

    def agree_on_mode(self) -> bool:
        """Whether parts are moved in this sync; leaves in `tensors` those that are.

        Collective: over the slice's ranks by what they all know, and over the meshes of the weights by asking: other
        slices share their collectives, and an engine of theirs may have been started anew.
        """
        knowledge = self.sync.knowledge
        groups = Mover.groups(self.tensors)
        if self.delivery.transport == "ipc":
            self.tensors = {
                name: one for name, one in self.tensors.items() if knowledge.covers(name, one.shape, one.local.dtype)
            }
        else:
            self.tensors = {}
        ready = bool(self.tensors)
        number = knowledge.digest(list(self.tensors)) if ready else 0
        self.mode_told = True
        for group in groups:
            ready_there, low, high = self.sync.mover.least(group, (int(ready), number, -number))
            ready = ready and bool(ready_there) and low == -high
        if not ready:
            self.tensors = {}
        self.moving = ready
        return ready

    def signature(self, lent: set[str]) -> object:
        """Equal for syncs that can make the same moves."""
        names = [name for name in self.tensors if name in self.sync.knowledge.reads]
        return (
            self.sync.knowledge.digest(names),
            self.bucket_bytes,
            tuple((one.group, one.position) for one in map(self.tensors.__getitem__, names)),
            tuple(
                (
                    name,
                    self.sync.mover.loans.name_of(one.local),
                    one.local.data_ptr(),
                    one.local.stride(),
                    one.local.dtype,
                )
                for name, one in ((name, self.tensors[name]) for name in names if name in lent)
            ),
        )

    def move(self, weights: Weights, lent: set[str], sums: Sums | None) -> None:
        """Move all parts, compare what every worker holds with what its training ranks gave."""
        with self.watch.phase("lend"):
            lent = self.lend(lent & set(self.tensors))
            self.sync.lent = frozenset(lent)
        with self.watch.phase("plan"):
            moves, repeated = self.planned(lent)
        with self.watch.phase("gather"):
            if sums is None or not repeated:
                sums = self.sync.mover.begin_sums(moves, self.tensors)
        halves, sending = self.together("allocate staging memory", lambda: self.staging(moves))
        self.unmoved = self.collectives(moves, halves, sending, sums)
        keys = [f"{moves.key}/{i}" for i in range(len(moves.steps))]
        waiting: list[tuple[int, str]] = []
        answers: dict[str, Replies] = {}
        commands: dict[str, Any] = {"do": "run", "program": f"{moves.key}/direct", "keep": True}
        if self.sync.defined != moves.key:
            commands["define"] = self.sync.mover.definitions(moves, self.tensors)
            self.sync.defined = moves.key
        self.post("copy what is mapped", commands, waiting, answers, error=None)
        for i, key in enumerate(keys):
            error: BaseException | None = None
            command: dict[str, Any] = {"do": "run", "program": key, "keep": False}
            with self.watch.phase("gather"):
                try:
                    self.unmoved.pop(0)()  # before anything else that can fail: the other slices are in it
                    if i < 2:
                        handle = self.ledger.export(halves[i], tp_rank=self.sync.tp_rank, bucket=self.num_commands)
                        command["map"] = [[f"stage{i}", handle.describe()]]
                    self.num_staged += moves.steps[i].num_bytes
                except BaseException as caught:
                    error = caught
            self.post(f"stage step {i}", command, waiting, answers, error=error)
        with self.watch.phase("push"):
            self.collect(waiting, answers)
        with self.watch.phase("prove"):
            self.together("compare what arrived", lambda: self.compare(moves, sums, answers))
        names = set(self.tensors)
        self.num_direct = sum(piece.num_bytes for piece in moves.direct)
        self.num_buckets += 1 + len(moves.steps)
        self.num_tensors += len(names)
        self.num_replayed += len(names)
        self.num_bytes += sum(full_bytes(item) for name, item in weights.known or () if name in names)
        self.names |= names

    def lend(self, lent: set[str]) -> set[str]:
        """Have the workers map what may be lent and is not yet, and let go of what is no longer used.

        Returns:
            The names that are mapped on all ranks.
        """
        loans = self.sync.mover.loans
        new: list[Loan] = []
        error: BaseException | None = None
        old: list[Loan] = []
        try:
            storages = []
            for name in lent:
                one = self.tensors[name]
                reads = self.sync.knowledge.reads[name][self.sync.tp_rank]
                if any(read.box.meet(one.slab) is not None for read in reads):
                    storages.append(one.local.untyped_storage())
            old = loans.unused(storages)
            for storage in storages:
                if loans.find(storage) is None:
                    new.append(loans.lend(storage))
        except (TpColocateError, RuntimeError) as caught:
            error = caught  # memory that cannot be exported is staged
        mine = (
            [loan.name for loan in old],
            [loans.describe(loan) for loan in new],
            None if error is None else str(error),
        )
        told = self.agree(None, mine, what="lend memory to the engine")
        failed = next((text for *_, text in told if text is not None), None)
        if failed is None and not any(release or map_ for release, map_, _ in told):
            return lent
        replies = self.on_owner(
            "map the trainer's memory",
            lambda _: self.delivery.ask(
                [
                    {"do": "run", "for": k, "release": release, "map": [] if failed is not None else map_}
                    for k, (release, map_, _) in enumerate(told)
                ],
                self.number(),
                self.left("map the trainer's memory"),
            ),
        )
        self.together("take back what was lent", lambda: self.sync.returned(old, timeout_s=_RETURN_S))
        if failed is None:
            failed = next(
                (f"TP rank {k}: {reply['error']}" for k, reply in replies.items() if reply["error"] is not None), None
            )
        if failed is None:
            return lent
        return self.lend_nothing(failed)

    def lend_nothing(self, why: str) -> set[str]:
        """Go on with staging memory alone, for this engine's life."""
        loans = self.sync.mover.loans
        self.sync.lending_refused = why.splitlines()[0]
        self.notes.append(f"the trainer's memory is not mapped by the engine: {self.sync.lending_refused}")
        told = self.agree(None, loans.names(), what="take back what was lent")
        replies = self.on_owner(
            "let go of the trainer's memory",
            lambda _: self.delivery.ask(
                [{"do": "run", "for": k, "release": release} for k, release in enumerate(told)],
                self.number(),
                self.left("let go of the trainer's memory"),
            ),
        )
        for tp_rank, reply in replies.items():
            if reply["error"] is not None:
                raise SyncError(f"TP rank {tp_rank} did not let go of the trainer's memory: {reply['error']}")
        # The workers have confirmed that they map nothing of it: what is left was never opened.
        loans.reclaim()
        return set()

    def planned(self, lent: set[str]) -> tuple[Moves, bool]:
        """The moves, and whether they are those of the sync before.

        Collective: over the meshes of the weights.
        """
        mover, signature = self.sync.mover, self.signature(lent)
        same = self.sync.moves is not None and self.sync.moves[0] == signature
        for group in Mover.groups(self.tensors):
            [same_there] = mover.least(group, (int(same),))
            same = same and bool(same_there)
        if same:
            assert self.sync.moves is not None
            return self.sync.moves[1], True
        moves = mover.plan(self.tensors, self.sync.knowledge.reads, lent, staging_bytes=self.bucket_bytes)
        self.sync.moves = (signature, moves)
        return moves, False

    def staging(self, moves: Moves) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Both halves of the staging memory, and the memory that parts are sent from."""
        if not moves.steps:
            return [], torch.empty(0, dtype=torch.uint8)
        halves = [ipc_payload.allocate(moves.stage_bytes, self.sync.device) for _ in range(min(len(moves.steps), 2))]
        sending = torch.empty(moves.send_bytes, dtype=torch.uint8, device=self.sync.device)
        self.note_peak()
        return halves, sending

    def collectives(
        self, moves: Moves, halves: list[torch.Tensor], sending: torch.Tensor, sums: Sums
    ) -> list[Callable[[], object]]:
        """What the ranks of the meshes do together, in order: each step, then the exchange of the sums."""

        def stage(i: int) -> Callable[[], object]:
            return lambda: self.sync.mover.stage(moves.steps[i], self.tensors, halves[i % 2], sending)

        return [*(stage(i) for i in range(len(moves.steps))), sums.expected]

    def post(
        self,
        what: str,
        command: dict[str, Any],
        waiting: list[tuple[int, str]],
        answers: dict[str, Replies],
        *,
        error: BaseException | None,
    ) -> None:
        """Send one command to every worker once all ranks are ready, without waiting for its answer."""
        number = self.number()
        with self.watch.phase("push"):
            told = self.agree(error, {**command, "for": self.sync.tp_rank}, what=what)
            if waiting:
                # The step before has been copied while this one was staged; its half is the next one's.
                self.collect(waiting, answers)
            if self.delivery.workers is not None:
                self.delivery.workers.post(dict(enumerate(told)), number)
        waiting.append((number, command["program"]))

    def collect(self, waiting: list[tuple[int, str]], answers: dict[str, Replies]) -> None:
        """Wait for the answers to what was posted."""
        number, program = waiting.pop(0)

        def answered(_: WeightServer) -> Replies:
            assert self.delivery.workers is not None
            return self.delivery.workers.collect(number, timeout_s=self.left("copy the weights"))

        replies = self.on_owner("copy the weights", answered)
        self.ledger.note_opened(number, {rank: reply["opened"] for rank, reply in replies.items()})
        for tp_rank, reply in replies.items():
            if reply["error"] is not None:
                raise SyncError(
                    f"weights did not arrive: TP rank {tp_rank}: {reply['error']}",
                    hint="the engine's weights are unknown now: sync again in full, or launch() again",
                    rank=self.sync.owner_rank,
                )
        self.add_seconds(slowest(replies))
        answers[program] = replies

    def compare(self, moves: Moves, sums: Sums, answers: Mapping[str, Replies]) -> None:
        """Whether this rank's worker holds, piece by piece, what the ranks of the mesh gave."""
        self.unmoved = []
        expected = sums.expected()
        wrong: list[str] = []
        for program, pieces in [
            (f"{moves.key}/direct", moves.direct),
            *((f"{moves.key}/{i}", [p for p, _ in step.staged()]) for i, step in enumerate(moves.steps)),
        ]:
            found = answers[program][self.sync.tp_rank]["sums"]
            for piece, here, there in zip(pieces, expected[program], found, strict=True):
                if here != there:
                    wrong.append(piece.name)
        if wrong:
            raise SyncError(
                f"TP rank {self.sync.tp_rank} holds other values than were sent: {some(sorted(set(wrong)))}",
                hint="the engine's weights are unknown now: sync again in full, or launch() again",
                rank=self.group.rank,
            )

    def number(self) -> int:
        self.num_commands += 1
        return self.num_commands - 1

    # --- buckets of full tensors ---------------------------------------------------------------------------------

    def next_bucket(self, error: BaseException | None) -> Items | None:
        """The next bucket, or None at the end; all ranks agree on which, and that the last one is behind them.

        Args:
            error: What went wrong on this rank with the last bucket's handles.
        """
        bucket: Items | None = None
        with self.watch.phase("gather"):
            if error is None:
                try:
                    bucket = next(self.rest, None)  # a generator may gather, and may fail
                    if bucket is not None:
                        self.check([(name, tensor.shape) for name, tensor in bucket])
                except BaseException as caught:
                    error = caught
            mine = None if bucket is None else [(n, tuple(t.shape), t.dtype) for n, t in bucket]
            digest = hashlib.sha256(repr(mine).encode()).digest()
            self.check_alike(self.agree(error, (digest, _headline(mine)), what="choose the next weights"))
        return bucket

    def send(self, bucket: Items) -> BaseException | None:
        """Move one bucket; returns this rank's error in taking the handles back, for the next agreement."""
        error: BaseException | None = None
        number = self.number()
        payloads: list[Any] = []
        entries, num_bytes = ipc_payload.layout([(n, t.shape, t.dtype) for n, t in bucket])
        flat: torch.Tensor | None = None
        try:
            with self.watch.phase("gather"):
                flat = self.gather(bucket, entries, num_bytes)
            with self.watch.phase("export"):
                payloads = self.delivery.make(flat, entries, number)
        except BaseException as caught:
            error = caught
        with self.watch.phase("export"):
            gathered = self.agree(error, payloads, what=f"gather bucket {number}")
        with self.watch.phase("push"):
            per_tp_rank = [payload for of_rank in gathered for payload in of_rank]
            what = f"load bucket {number}"
            verdict = self.on_owner(
                what, lambda server: self.delivery.load(server, per_tp_rank, entries, number, self.left(what))
            )
        self.ledger.note_opened(number, verdict.opened)
        if verdict.problem is not None:
            raise SyncError(
                f"bucket {number} did not arrive: {verdict.problem}",
                hint="the engine's weights are unknown now: sync again in full, or launch() again",
                rank=self.sync.owner_rank,
            )
        if verdict.learned:
            self.learned = True
            self.sync.knowledge.learn(verdict.learned, entries, len(self.group))
        self.unproven.update(verdict.unproven)
        self.num_replayed += len(bucket) if verdict.replayed else 0
        self.add_seconds(verdict.worker_seconds)
        self.num_buckets += 1
        self.num_tensors += len(bucket)
        self.num_bytes += sum(entry.num_bytes for entry in entries)
        self.num_staged += num_bytes
        self.names.update(name for name, _ in bucket)
        with self.watch.phase("settle"):
            try:
                self.ledger.settle(deadline=min(self.deadline, time.monotonic() + _RETURN_S))
            except TpColocateError as caught:
                return caught
        return None

    def gather(self, bucket: Items, entries: list[ipc_payload.Entry], num_bytes: int) -> torch.Tensor | None:
        """Full tensors into fresh staging memory.  Ranks that export nothing gather all the same."""
        flat = ipc_payload.allocate(num_bytes, self.sync.device) if self.delivery.exports else None
        largest = max(range(len(entries)), key=lambda i: entries[i].num_bytes)
        for i, ((_, tensor), entry) in enumerate(zip(bucket, entries)):
            full = full_tensor(tensor)
            if flat is not None and entry.num_bytes:
                ipc_payload.view(flat, entry).copy_(full)
                # The checksum covers the padding.
                flat[
                    entry.start + entry.num_bytes : entries[i + 1].start if i + 1 < len(entries) else num_bytes
                ].zero_()
            if i == largest:
                self.note_peak()
        if flat is not None and flat.is_cuda:
            # The reader's streams know nothing of ours.
            torch.cuda.current_stream(flat.device).synchronize()
        return flat

    # --- the end, and after a failure ----------------------------------------------------------------------------

    def note_peak(self) -> None:
        self.peak_extra = max(self.peak_extra, allocated_bytes(self.sync.device) - self.allocated_before)

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        for step, value in seconds.items():
            self.worker_seconds[step] = self.worker_seconds.get(step, 0.0) + value

    def clean_up(self) -> None:
        """After a failure: no files left, and an engine that was not touched goes on with the weights it has."""
        self.sync.moves = self.sync.defined = None  # the workers may not have got them
        if self.delivery.workers is not None:
            self.delivery.workers.close()
        for number in range(self.num_commands):
            self.delivery.file(number).unlink(missing_ok=True)
        if self.sync.server is not None and self.begun and not self.touched:
            try:
                self.sync.server.cancel_sync(timeout_s=_GRACE_S)
            except TpColocateError as error:
                logger.warning("the engine could not be told to go on: %s", error)

    def keep_company(self) -> None:
        """Take part in the collectives that are left, so that ranks of other slices do not wait in them."""
        if not self.sharded:
            return
        left: list[Callable[[], object]] = []
        if not self.mode_told:
            mover = self.sync.mover
            left = [lambda group=group: mover.least(group, (0, 0, 0)) for group in Mover.groups(self.tensors)]  # type: ignore[misc]
        elif self.moving:
            left = self.left_of_moves()
        for collective in left:
            # One that fails here does so beside the collective itself, and the next one is still waited for.
            with contextlib.suppress(Exception):
                collective()
        with contextlib.suppress(Exception):
            for bucket in self.rest:
                for _, tensor in bucket:
                    if is_collective(tensor):
                        full_tensor(tensor)

    def left_of_moves(self) -> list[Callable[[], object]]:
        if self.unmoved is None:
            with contextlib.suppress(Exception):  # nothing can be kept up without memory to stage in
                moves, _ = self.planned(set())
                sums = self.sync.mover.begin_sums(moves, self.tensors)
                return self.collectives(moves, *self.staging(moves), sums)
        return [] if self.unmoved is None else self.unmoved

    # --- agreement -----------------------------------------------------------------------------------------------

    def left(self, what: str) -> float:
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise self.too_late(what)
        return seconds

    def too_late(self, what: str) -> DeadlineError:
        return DeadlineError(
            f"the sync took longer than {self.timeout_s:g} s, while it should {what}",
            hint="raise timeout_s of sync_weights()",
        )

    def agree(self, error: BaseException | None, value: T, *, what: str) -> list[T]:
        seconds = max(self.deadline - time.monotonic(), 0.0)
        if seconds == 0.0 and error is None:
            error = self.too_late(what)
        return self.group.agree(error, value, what=what, timeout_s=seconds + _GRACE_S)

    def together(self, what: str, action: Callable[[], T]) -> T:
        value: T | None = None
        error: BaseException | None = None
        try:
            value = action()
        except BaseException as caught:
            error = caught
        self.agree(error, None, what=what)
        return value  # type: ignore[return-value]

    def on_owner(self, what: str, action: Callable[[WeightServer], T]) -> T:
        """The owner acts; every rank gets its result or its error."""
        value: T | None = None
        error: BaseException | None = None
        if self.sync.server is not None:
            try:
                value = action(self.sync.server)
            except BaseException as caught:
                error = caught
        return self.agree(error, value, what=what)[self.group.ranks.index(self.sync.owner_rank)]  # type: ignore[return-value]

    def ask(self, what: str, command: dict[str, Any]) -> Replies:
        """The same command for every worker; their answers, on every rank."""
        number = self.number()
        commands = [{**command, "for": tp_rank} for tp_rank in range(len(self.group))]
        replies = self.on_owner(what, lambda _: self.delivery.ask(commands, number, self.left(what)))
        for tp_rank, reply in replies.items():
            if reply["error"] is not None:
                raise SyncError(f"TP rank {tp_rank} could not {what}: {reply['error']}", rank=self.sync.owner_rank)
        return replies


def buckets(weights: Iterable[tuple[str, Item]], bucket_bytes: int) -> Iterator[Items]:
    """Cut the stream into buckets of at most `bucket_bytes`, in order; the sizes are those of the full tensors."""
    bucket: Items = []
    used = 0
    for name, tensor in weights:
        size = _padded(tensor)
        if bucket and used + size > bucket_bytes:
            yield bucket
            bucket, used = [], 0
        bucket.append((name, tensor))
        used += size
    if bucket:
        yield bucket


def _padded(item: Item) -> int:
    return -(-full_bytes(item) // ipc_payload.ALIGNMENT) * ipc_payload.ALIGNMENT


def _headline(mine: list[Named] | None) -> str:
    if not mine:
        return "no more weights"
    name, shape, dtype = mine[0]
    return f"{len(mine)} tensors from {name} {shape} {dtype}"


def _repeated(names: Iterator[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


__all__ = ["SyncRun", "buckets"]
