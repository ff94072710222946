"""How a sync starts: the weights are read or recognised, the ranks compare what they hold, the workers are reached."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from tpcolocate.errors import ConfigError, WeightsMismatchError
from tpcolocate.weights.plan.sharding import CachedShards, Layouts, LocalShard, layouts_of
from tpcolocate.weights.sources.fingerprint import Fingerprint
from tpcolocate.weights.sources.named_weights import NamedWeights, Source
from tpcolocate.weights.sync.buckets import headline, padded_bytes
from tpcolocate.weights.sync.mapping import CAN_BE_MAPPED, Lending
from tpcolocate.weights.sync.options import SyncOptions
from tpcolocate.weights.sync.transfer import MovePhases
from tpcolocate.weights.transport.connection import Greetings, WorkerConnection
from tpcolocate.weights.transport.memory import free_bytes, plan_bucket
from tpcolocate.weights.transport.staging import Transfer


@dataclass(frozen=True, slots=True)
class Facts:
    """What one rank tells the others before anything is sent.

    Attributes:
        digest: Of names, shapes and dtypes; equal on all ranks.
        headline: The same for people.
        free: Bytes that can be staged.
        lending: What may become of each tensor's memory, as a digit; see `sync_lending`.
        repeats: Whether this rank would do exactly what it did in the last sync.
    """

    digest: bytes
    headline: str
    free: int
    lending: str
    repeats: bool = False


@dataclass(frozen=True, slots=True)
class Last:
    """What the next sync may find to be the same; without any of the trainer's memory.

    Attributes:
        options: Of the last sync.
        source: Its module.
        layouts: How its tensors lie.
        groups: Among which they are sharded.
        loans: State of the loans after it.
        facts: What this rank told.
        bucket_bytes: As planned.
        num_bytes: Of all weights.
    """

    options: SyncOptions
    source: Fingerprint
    layouts: Layouts
    groups: list[dist.ProcessGroup]
    loans: int
    facts: Facts
    bucket_bytes: int
    num_bytes: int


class StartPhases(MovePhases):
    """From the source to the agreement on what there is to send, and on whether this sync repeats the last one."""

    def get_going(self, source: Source) -> tuple[NamedWeights, Facts, Lending]:
        """Read and check the weights on every rank, hold generation, reach the workers, compare what the ranks hold.

        Returns:
            The weights, what this rank told of them, and what may become of their memory.
        """
        prepared: tuple[NamedWeights, Facts] | None = None
        greetings: Greetings | None = None
        error: BaseException | None = None
        with self.watch.phase("prepare"):
            try:
                if self.last_alike() is not None and self.stages_again():
                    # Most likely this is the last sync's module, so the server need not wait for the answer.
                    self.open()
                prepared = self.prepare(source)
            except BaseException as caught:
                error = caught
        with self.watch.phase("open"):
            try:
                if prepared is not None:
                    weights, facts = prepared
                    if facts.repeats and not self.stages_again():
                        # All of this rank's work is one launch, and the GPU is what the sync will wait for: it comes first,
                        # and no thread that talks to the server takes turns with it.
                        self.get_ready_again()
                    self.open()
                    prepared = weights, self.use_the_time(facts)
                    if self.opening is not None:
                        greetings = self.opening.result()
                        self.delivery.workers = self.opening.workers
            except BaseException as caught:
                error = caught
            mine = (
                None if prepared is None else prepared[1],
                "" if self.opening is None else self.opening.session,
                None if greetings is None else [greetings[k].result.plan_id for k in range(len(self.group))],
            )
            told = self.agree(error, mine, what="prepare a weight sync")
        assert prepared is not None
        weights, facts = prepared
        of_ranks: list[Facts] = [one for one, *_ in told if one is not None]
        self.check_alike([(one.digest, one.headline) for one in of_ranks])
        _, self.delivery.session, plans = told[self.group.ranks.index(self.sync.owner_rank)]
        known = plans is not None and self.sync.knowledge.confirm(plans)
        self.repeats = known and all(one.repeats for one in of_ranks)
        self.plan_staging(weights, [one.free for one in of_ranks])
        return (
            weights,
            facts,
            {name: min(each) for name, *each in zip(self.tensors, *(one.lending for one in of_ranks))},
        )

    def open(self) -> None:
        """On the owner: begin to hold generation and to reach the workers, if that has not been begun."""
        if self.sync.server is not None and self.opening is None:
            self.opening = WorkerConnection(
                self.sync.server,
                folder=self.sync.folder,
                loader=self.sync.loader,
                tp_size=0 if self.options.transport == "stock" else len(self.group),
                timeout_s=self.left("open the weight sync"),
            )

    def plan_staging(self, weights: NamedWeights, free: list[int]) -> None:
        """Decide on the bucket's size; a sync that repeats the last one as far as is known may find less memory now.

        Args:
            weights: Of this sync.
            free: Bytes on every rank of the slice.
        """
        last, moves = self.sync.last, self.sync.moves
        if self.repeats and last is not None and moves is not None and not moves[1].steps:
            self.bucket_bytes = last.bucket_bytes  # nothing is staged, however little is free
            return
        self.bucket_bytes = plan_bucket(
            self.options.bucket_bytes,
            free,
            largest=max((padded_bytes(tensor) for _, tensor in weights.items or ()), default=0),
            # Ranks of a CPU slice share one /dev/shm.
            copies=len(self.group) if self.sync.device.type == "cpu" else 1,
            gathered=weights.reading_bytes,
        )
        self.repeats = self.repeats and last is not None and self.bucket_bytes == last.bucket_bytes

    def prepare(self, source: Source) -> tuple[NamedWeights, Facts]:
        again = self.prepare_again(source)
        if again is not None:
            return again
        expected = None if self.sync.spec is None else self.sync.spec.shapes
        weights = NamedWeights.of(source, expected=expected, rename=self.options.rename)
        self.sharded = weights.is_sharded
        lending: list[str] = []
        if weights.items is not None:
            if not weights.items:
                raise ConfigError("there are no weights to sync", hint="pass a module with parameters")
            repeated = _repeated(name for name, _ in weights.items)
            if repeated is not None:
                raise WeightsMismatchError(f"{repeated} is given twice", hint="names must be unique")
            self.check([(name, tensor.shape) for name, tensor in weights.items])
            if self.sync.spec is not None and not self.options.partial:
                self.sync.spec.check_complete([*(name for name, _ in weights.items), *weights.aliases])
            if self.options.parts and self.options.payloads == "per_rank" and self.options.transport in ("auto", "ipc"):
                held = ((name, self.sync.mover.hold(tensor)) for name, tensor in weights.items)
                self.tensors = {name: one for name, one in held if one is not None}
                lending = self.lending()
                self.wait_for_the_trainer()
        contents = None if weights.items is None else [(n, tuple(t.shape), t.dtype) for n, t in weights.items]
        digest = hashlib.sha256(repr((contents, list(self.tensors) == [n for n, *_ in contents or ()])).encode())
        return weights, Facts(
            digest.digest(),
            "a generator" if contents is None else headline(contents),
            free_bytes(self.sync.device),
            "".join(lending),
        )

    def last_alike(self) -> Last | None:
        """What is known of the last sync, unless it was another kind of sync or its loans are others by now."""
        last = self.sync.last
        if last is None or last.options != self.options or last.loans != self.sync.mover.loans.state:
            return None
        return last

    def prepare_again(self, source: Source) -> tuple[NamedWeights, Facts] | None:
        """The same, if this rank finds everything as it was at the last sync."""
        last = self.last_alike()
        if last is None:
            return None
        weights = last.source.match(source)
        if weights is None or weights.items is None:
            return None
        self.tensors = CachedShards(
            {n: item for n, item in weights.items if isinstance(item, torch.Tensor)}, last.layouts
        )
        self.sharded = bool(last.groups)
        self.wait_for_the_trainer()
        return weights, replace(last.facts, repeats=True)

    def stages_again(self) -> bool:
        """Whether the moves of the last sync take staging memory."""
        return self.sync.moves is not None and bool(self.sync.moves[1].steps)

    def use_the_time(self, facts: Facts) -> Facts:
        """Do what can be done while the server is waited for; most likely no other rank sees a change either.

        Args:
            facts: Of this rank; of a sync that may repeat the last one, what is free is found out here.
        """
        if not facts.repeats:
            self.borrow_ahead(facts.lending)
            return facts
        facts = replace(facts, free=free_bytes(self.sync.device))  # before any of it is taken
        if self.ready is None:
            self.get_ready_again()
        return facts

    def get_ready_again(self) -> None:
        """Get ready for the moves of the last sync."""
        assert self.sync.moves is not None
        self.ready = self.get_ready(self.sync.moves[1])

    def remember(
        self, source: Source, weights: NamedWeights, facts: Facts, tensors: Mapping[str, LocalShard]
    ) -> Last | None:
        """For the next sync: of a sync that moved everything, and lent all that it may."""
        assert weights.items is not None
        if list(tensors) != [name for name, _ in weights.items] or CAN_BE_MAPPED in facts.lending:
            return None
        found = Fingerprint.of(source, weights)
        if found is None:
            return None
        return Last(
            self.options,
            found,
            layouts_of(tensors),
            Transfer.groups(tensors),
            self.sync.mover.loans.state,
            facts,
            self.bucket_bytes,
            self.num_bytes,
        )

    def wait_for_the_trainer(self) -> None:
        """The workers' streams know nothing of those that the weights were computed on."""
        if self.sync.device.type == "cuda":
            torch.cuda.synchronize(self.sync.device)


def _repeated(names: Iterator[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


__all__ = ["Facts", "Last", "StartPhases"]
