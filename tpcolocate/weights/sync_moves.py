"""Moves: just the parts of tensors that each TP worker reads, out of mapped memory or through a little staging memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tpcolocate import ipc_payload
from tpcolocate.errors import SyncError
from tpcolocate.weights.delivery import Replies, WeightServer, slowest, some
from tpcolocate.weights.items import full_bytes
from tpcolocate.weights.loans import Loan
from tpcolocate.weights.mover import Mover, Moves, Sums
from tpcolocate.weights.source import Weights
from tpcolocate.weights.sync_phases import RETURN_S, SyncPhases


class MovePhases(SyncPhases):
    """From the decision whether parts are moved to the proof that they arrived."""

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
        commands: dict[str, Any] = {"do": "run", "program": f"{moves.key}/direct", "keep": True}

        def get_ready() -> tuple[list[torch.Tensor], torch.Tensor, Sums]:
            halves, sending = self.staging(moves)
            if self.sync.defined != moves.key:
                commands["define"] = self.sync.mover.definitions(moves, self.tensors)
                self.sync.defined = moves.key
            begun = sums if sums is not None and repeated else self.sync.mover.begin_sums(moves, self.tensors)
            return halves, sending, begun

        with self.watch.phase("gather"):
            # What can fail for want of memory fails here, on all ranks.
            halves, sending, sums = self.together("get ready to move parts", get_ready)
        self.unmoved = self.collectives(moves, halves, sending, sums)
        keys = [f"{moves.key}/{i}" for i in range(len(moves.steps))]
        waiting: list[tuple[int, str]] = []
        answers: dict[str, Replies] = {}
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
        except Exception as caught:
            error = caught  # memory that cannot be exported, for whatever reason, is staged
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
        self.together("take back what was lent", lambda: self.sync.returned(old, timeout_s=RETURN_S))
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

    def unstage(self) -> None:
        """Take the moves' staging memory back before buckets need theirs."""
        with self.watch.phase("settle"):
            self.ask("let go of the staging memory", {"do": "run", "release": ["stage0", "stage1"]})
            self.settle_together()

    def left_of_moves(self) -> list[Callable[[], object]]:
        if self.unmoved is None:
            with contextlib.suppress(Exception):  # nothing can be kept up without memory to stage in
                moves, _ = self.planned(set())
                sums = self.sync.mover.begin_sums(moves, self.tensors)
                return self.collectives(moves, *self.staging(moves), sums)
        return [] if self.unmoved is None else self.unmoved


__all__ = ["MovePhases"]
