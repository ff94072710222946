"""TransferPlan: just the parts of tensors that each TP worker reads, out of mapped memory or through a little staging memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from tpcolocate import ipc_payload
from tpcolocate.errors import SyncError, some
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, ReleaseStaging, RunProgram, addressed_to_all
from tpcolocate.weights.plan.transfer_plan import TransferPlan
from tpcolocate.weights.sources.lazy_tensor import full_bytes
from tpcolocate.weights.sources.named_weights import NamedWeights
from tpcolocate.weights.sync.mapping import CAN_BE_MAPPED, STAYS, Lending, LendingPhases
from tpcolocate.weights.transport.bucket_sender import Replies, slowest
from tpcolocate.weights.transport.staging import Ready, Transfer
from tpcolocate.worker_errors import raise_worker_errors


class MovePhases(LendingPhases):
    """From the decision whether parts are moved to the proof that they arrived."""

    def agree_on_mode(self) -> bool:
        """Whether parts are moved in this sync; leaves in `tensors` those that are.

        Collective: over the slice's ranks by what they all know, and over the meshes of the weights by asking: other
        slices share their collectives, and an engine of theirs may have been started anew.
        """
        knowledge = self.sync.knowledge
        if self.repeats and self.sync.last is not None:
            groups = self.sync.last.groups
        else:
            groups = Transfer.groups(self.tensors)
            self.tensors = {
                name: one
                for name, one in self.tensors.items()
                if self.delivery.transport == "ipc" and knowledge.covers(name, one.shape, one.local.dtype)
            }
        ready = bool(self.tensors)
        names = list(self.tensors)
        number = knowledge.digest(names) if ready else 0
        verified = self.repeats or knowledge.is_verified(names)
        self.mode_told = True
        for group in groups:
            flags = (int(ready), number, -number, int(self.repeats), int(verified))
            ready_there, low, high, repeats_there, verified_there = self.sync.mover.least(group, flags)
            ready = ready and bool(ready_there) and low == -high
            self.repeats = self.repeats and bool(repeats_there)
            verified = verified and bool(verified_there)
        self.set_mode(moving=ready)
        self.is_verified = verified
        return ready

    def set_mode(self, *, moving: bool) -> None:
        if not moving:
            self.tensors = {}
        self.repeats = self.repeats and moving
        self.moving = moving

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

    def move(self, weights: NamedWeights, lending: Lending) -> None:
        """Move all parts, compare what every worker holds with what its training ranks gave."""
        define: dict[str, Any] = {}
        if self.repeats:
            assert self.sync.moves is not None and self.ready is not None
            moves, ready = self.sync.moves[1], self.ready
        else:
            moves, ready = self.choose(lending, define)
        self.ready = None
        self.unmoved = self.collectives(moves, ready)
        self.staged = self.staged or bool(moves.steps or self.borrowed.regions)
        waiting: list[tuple[int, str]] = []
        direct, *staged = moves.programs
        *_, last = moves.programs

        def run(program: str, *, keep: bool) -> RunProgram:
            # Of a sync that repeats another it is known what it ends with: nobody has to tell the workers to leave.
            is_last = self.repeats and program == last
            return RunProgram(program=program, keep_views=keep, is_last=is_last)

        command = run(direct, keep=True)
        error: BaseException | None = None
        if self.repeats:
            error = self.post_alike(command, waiting)
        else:
            self.post("copy what is mapped", replace(command, **define), waiting, error=None)
        for i, program in enumerate(staged):
            command = run(program, keep=False)
            with self.watch.phase("gather"):
                try:
                    self.unmoved.pop(0)()  # before anything else that can fail: the other slices are in it
                    if i < 2:
                        handle = self.ledger.export(
                            ready.halves[i], tp_rank=self.sync.tp_rank, bucket=self.num_commands
                        )
                        command = replace(command, map=[[f"stage{i}", handle.describe()]])
                    self.num_staged += moves.steps[i].num_bytes
                except BaseException as caught:
                    error = caught
            self.post(f"stage step {i}", command, waiting, error=error)
            error = None
        self.prove(moves, waiting, error)
        names = set(self.tensors)
        self.num_direct = moves.direct_bytes
        self.num_buckets += 1 + len(moves.steps)
        self.num_tensors += len(names)
        self.num_replayed += len(names)
        if self.repeats and self.sync.last is not None:
            self.num_bytes += self.sync.last.num_bytes
        else:
            self.num_bytes += sum(full_bytes(item) for name, item in weights.items or () if name in names)
        self.names |= names

    def choose(self, lending: Lending, define: dict[str, Any]) -> tuple[TransferPlan, Ready]:
        """Lend, plan, and have all ranks get ready together; puts into `define` what the workers must be told."""
        keep = {name for name in self.tensors if lending.get(name) == STAYS}
        # All of it was exported while the workers rehearsed: once for an engine, since to map everything anew at every sync
        # would be no faster than to stage it.
        borrow = {name for name in self.tensors if self.rehearsed and lending.get(name) == CAN_BE_MAPPED}
        with self.watch.phase("lend"):
            lent = self.lend(keep, borrow)
            self.sync.lent = frozenset(lent & keep)
        with self.watch.phase("plan"):
            moves, repeated = self.planned(lent)
        if not repeated:
            self.ready = None  # the memory is needed for other moves

        def get_ready() -> Ready:
            if self.sync.defined != moves.key:
                define["define"] = self.sync.mover.definitions(moves, self.tensors, self.borrowed.regions)
            return self.get_ready(moves) if self.ready is None else self.ready

        with self.watch.phase("gather"):
            # What can fail for want of memory fails here, on all ranks.
            made = self.together("get ready to move parts", get_ready)
        self.sync.defined = moves.key
        return moves, made

    def planned(self, lent: set[str]) -> tuple[TransferPlan, bool]:
        """The moves, and whether they are those of the sync before.

        Collective: over the meshes of the weights.
        """
        mover, signature = self.sync.mover, self.signature(lent)
        same = self.sync.moves is not None and self.sync.moves[0] == signature
        for group in Transfer.groups(self.tensors):
            [same_there] = mover.least(group, (int(same),))
            same = same and bool(same_there)
        if same:
            assert self.sync.moves is not None
            return self.sync.moves[1], True
        moves = mover.plan(self.tensors, self.sync.knowledge.reads, lent, staging_bytes=self.bucket_bytes)
        self.sync.moves = (signature, moves)
        return moves, False

    def get_ready(self, moves: TransferPlan) -> Ready:
        """Take the memory that moving needs, and begin to sum up what is given."""
        halves: list[torch.Tensor] = []
        sending = torch.empty(0, dtype=torch.uint8)
        if moves.steps:
            halves = [
                ipc_payload.allocate(moves.stage_bytes, self.sync.device) for _ in range(min(len(moves.steps), 2))
            ]
            sending = torch.empty(moves.send_bytes, dtype=torch.uint8, device=self.sync.device)
            self.note_peak()
        return Ready(halves, sending, self.sync.mover.begin_sums(moves, self.tensors))

    def collectives(self, moves: TransferPlan, ready: Ready) -> list[Callable[[], Any]]:
        """What the ranks of the meshes do together, in order: each step, then the exchange of the sums."""

        def stage(i: int) -> Callable[[], Any]:
            return lambda: self.sync.mover.stage(moves.steps[i], self.tensors, ready.halves[i % 2], ready.sending)

        return [*(stage(i) for i in range(len(moves.steps))), ready.sums.expected]

    def post_alike(self, command: RunProgram, waiting: list[tuple[int, str]]) -> BaseException | None:
        """Send a command that all ranks know to be the same for every worker; this rank's error, for the next agreement."""
        number = self.number()
        waiting.append((number, str(command.program)))
        if self.delivery.workers is None:
            return None
        with self.watch.phase("push"):
            try:
                self.delivery.workers.post(addressed_to_all(command, len(self.group)), number)
            except BaseException as caught:
                return caught
        return None

    def post(
        self, what: str, command: RunProgram, waiting: list[tuple[int, str]], *, error: BaseException | None
    ) -> None:
        """Send one command to every worker once all ranks are ready, without waiting for its answer."""
        number = self.number()
        before = waiting.pop(0) if waiting else None
        replies: Replies = {}
        with self.watch.phase("push"):
            try:
                if error is None and before is not None and self.delivery.workers is not None:
                    # The step before has been copied while this one was staged; its half is the next one's.
                    replies = self.collect(*before)
            except BaseException as caught:
                error = caught
            told = self.agree(error, (Addressed(self.sync.tp_rank, command), replies), what=what)
            if before is not None:
                self.accept(before[0], told[self.group.ranks.index(self.sync.owner_rank)][1])
            if self.delivery.workers is not None:
                self.delivery.workers.post({k: of_rank for k, (of_rank, _) in enumerate(told)}, number)
        waiting.append((number, str(command.program)))

    def collect(self, number: int, program: str) -> Replies:
        """On the owner: wait for the answers to a command; keeps the sums, which the others need not know."""
        assert self.delivery.workers is not None
        replies = self.delivery.workers.collect(number, timeout_s=self.left("copy the weights"))
        results = {tp_rank: reply.result for tp_rank, reply in replies.items()}
        self.found[program] = {k: result and result.checksums for k, result in results.items()}
        return {
            k: reply if reply.result is None else replace(reply, result=replace(reply.result, checksums=None))
            for k, reply in replies.items()
        }

    def accept(self, number: int, replies: Replies) -> None:
        """On every rank: what the workers said to a command."""
        self.ledger.note_opened(number, {rank: reply.opened for rank, reply in replies.items()})
        raise_worker_errors(
            replies,
            "weights did not arrive",
            hint="the engine's weights are unknown now: sync again in full, or launch() again",
            rank=self.sync.owner_rank,
        )
        self.add_seconds(slowest(replies))

    def prove(self, moves: TransferPlan, waiting: list[tuple[int, str]], error: BaseException | None) -> None:
        """Wait for the last answers, and compare what every worker holds with what the ranks of the mesh gave.

        Args:
            moves: That were made.
            waiting: The command that has not been answered.
            error: Of this rank.
        """
        assert self.unmoved is not None
        expected: dict[str, list[int]] = {}
        replies: Replies = {}
        arrived: dict[int, bytes] = {}
        [(number, program)] = waiting
        with self.watch.phase("prove"):
            try:
                expected = self.unmoved.pop(0)()  # before anything else that can fail: the other slices are in it
            except BaseException as caught:
                error = caught
        with self.watch.phase("push"):
            try:
                if error is None and self.delivery.workers is not None:
                    replies = self.collect(number, program)
                    for tp_rank in replies:
                        arrived[tp_rank] = _digest([self.found[name][tp_rank] for name in moves.programs])
            except BaseException as caught:
                error = caught
            sent = _digest([expected[name] for name in moves.programs]) if expected else b""
            told = self.agree(error, (sent, replies, arrived), what="copy the weights")
            _, replies, arrived = told[self.group.ranks.index(self.sync.owner_rank)]
            self.accept(number, replies)
        if any(sent != arrived[tp_rank] for tp_rank, (sent, *_) in enumerate(told)):
            with self.watch.phase("prove"):
                found = self.on_owner("compare what arrived", lambda _: self.found)
                self.together("compare what arrived", lambda: self.compare(moves, expected, found))

    def compare(
        self, moves: TransferPlan, expected: Mapping[str, list[int]], found: Mapping[str, Mapping[int, list[int]]]
    ) -> None:
        """Name what this rank's worker holds otherwise than the ranks of the mesh gave it."""
        wrong = {
            piece.name
            for program, pieces in moves.programs.items()
            for piece, here, there in zip(pieces, expected[program], found[program][self.sync.tp_rank], strict=True)
            if here != there
        }
        if wrong:
            raise SyncError(
                f"TP rank {self.sync.tp_rank} holds other values than were sent: {some(sorted(wrong), between=', ')}",
                hint="the engine's weights are unknown now: sync again in full, or launch() again",
                rank=self.group.rank,
            )

    def unstage(self) -> None:
        """Take back what the moves staged or borrowed, before buckets need their memory."""
        with self.watch.phase("settle"):
            self.ask("let go of the staging memory", ReleaseStaging())
            self.borrowed.forget()
            self.settle_together()

    def left_of_moves(self) -> list[Callable[[], Any]]:
        if self.unmoved is None:
            with contextlib.suppress(Exception):  # nothing can be kept up without memory to stage in
                moves, _ = self.planned(set())
                return self.collectives(moves, self.get_ready(moves))
        return [] if self.unmoved is None else self.unmoved


def _digest(sums: list[list[int]]) -> bytes:
    return hashlib.sha256(json.dumps(sums).encode()).digest()


__all__ = ["MovePhases"]
