"""The trainer's own memory, mapped by the workers: what may be, what is, and how it comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, RunProgram
from tpcolocate.weights.sync.phases import RETURN_S, SyncPhases
from tpcolocate.weights.transport.bucket_sender import slowest
from tpcolocate.weights.transport.mapped_memory import PersistentMapping
from tpcolocate.worker_errors import raise_worker_errors

STAGED, CAN_BE_MAPPED, STAYS = "0", "1", "2"
"""What may become of a tensor's memory: it is copied; mapped for one sync; mapped from sync to sync."""
Lending = Mapping[str, str]
"""Tensor -> one of these, the least of all ranks."""


class LendingPhases(SyncPhases):
    """What is read where it lies, so that it need not be staged."""

    def lending(self) -> list[str]:
        """What may become of the memory of each of `tensors`, as far as this rank is concerned."""
        loans = self.sync.mover.loans
        storages = [one.local.untyped_storage() for one in self.tensors.values()]
        steady = loans.note(storages)
        if self.sync.lending_refused is not None:
            return [STAGED] * len(storages)
        return [
            STAYS if stays else CAN_BE_MAPPED if loans.can_be_mapped(storage) else STAGED
            for storage, stays in zip(storages, steady)
        ]

    def borrow_ahead(self, lending: Sequence[str]) -> None:
        """Export what an engine's first sync will have mapped, while the server is waited for.

        As far as this rank knows: if it comes otherwise, what was exported is taken back unopened.

        Args:
            lending: From `lending`.
        """
        is_first = self.sync.knowledge.is_empty and self.sync.rehearsal_refused is None
        if is_first and self.options.payloads not in self.sync.refused_ways:
            self.borrowed.export(
                one.local.untyped_storage()
                for one, may in zip(self.tensors.values(), lending, strict=True)
                if may == CAN_BE_MAPPED
            )

    def lend(self, keep: set[str], borrow: set[str]) -> set[str]:
        """Have the workers map what may be lent and is not yet, and let go of what is no longer used.

        Args:
            keep: Names whose memory may stay mapped.
            borrow: Names whose memory may be mapped until the end of this sync; see `TransientMappings`.

        Returns:
            The names that are mapped on all ranks.
        """
        loans = self.sync.mover.loans
        lent = keep | borrow
        new: list[list[Any]] = []
        error: BaseException | None = None
        old: list[PersistentMapping] = []
        try:
            storages = []
            for name in keep:
                one = self.tensors[name]
                reads = self.sync.knowledge.reads[name][self.sync.tp_rank]
                if any(read.box.meet(one.slab) is not None for read in reads):
                    storages.append(one.local.untyped_storage())
            old = loans.unused(storages)
            for storage in storages:
                if loans.find(storage) is None:
                    new.append(loans.describe(loans.lend(storage)))
            if self.borrowed.error is not None:
                raise self.borrowed.error
            new += self.borrowed.described()
        except Exception as caught:
            error = caught  # memory that cannot be exported, for whatever reason, is staged
        mine = ([loan.name for loan in old], new, None if error is None else str(error))
        told = self.agree(None, mine, what="lend memory to the engine")
        failed = next((text for *_, text in told if text is not None), None)
        if failed is None and not any(release or map_ for release, map_, _ in told):
            return lent
        number = self.number()  # here, since every rank counts the commands, and the owner alone runs what follows
        replies = self.on_owner(
            "map the trainer's memory",
            lambda _: self.delivery.ask(
                [
                    Addressed(k, RunProgram(release, () if failed is not None else map_))
                    for k, (release, map_, _) in enumerate(told)
                ],
                number,
                self.left("map the trainer's memory"),
            ),
        )
        self.borrowed.note_opened({rank: reply.opened for rank, reply in replies.items()})
        self.together("take back what was lent", lambda: self.sync.returned(old, timeout_s=RETURN_S))
        if failed is None:
            failed = next(
                (f"TP rank {k}: {reply.error}" for k, reply in replies.items() if reply.error is not None), None
            )
        if failed is None:
            self.add_seconds({"map": slowest(replies)["open"]})
            return lent
        return self.lend_nothing(failed)

    def lend_nothing(self, why: str) -> set[str]:
        """Go on with staging memory alone, for this engine's life."""
        loans = self.sync.mover.loans
        self.sync.lending_refused = why.splitlines()[0]
        self.notes.append(f"the trainer's memory is not mapped by the engine: {self.sync.lending_refused}")
        mine = [*loans.names(), *self.borrowed.regions.values()]
        told = self.agree(None, mine, what="take back what was lent")
        number = self.number()
        replies = self.on_owner(
            "let go of the trainer's memory",
            lambda _: self.delivery.ask(
                [Addressed(k, RunProgram(release)) for k, release in enumerate(told)],
                number,
                self.left("let go of the trainer's memory"),
            ),
        )
        raise_worker_errors(replies, "the trainer's memory was not released")
        # The workers have confirmed that they map nothing of it: what is left was never opened.
        loans.reclaim()
        self.borrowed.reclaim()
        return set()


__all__ = ["CAN_BE_MAPPED", "STAGED", "STAYS", "Lending", "LendingPhases"]
