"""Learning an engine's loader: rehearsed with descriptions, and believed once samples of real weights bear it out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tpcolocate.errors import some
from tpcolocate.in_server.tpcolocate_receiver.protocol import DryRun, addressed_to_all
from tpcolocate.weights.sources.lazy_tensor import full_tensor, is_collective
from tpcolocate.weights.sources.named_weights import NamedWeights
from tpcolocate.weights.sync.buckets import BucketPhases, buckets
from tpcolocate.weights.sync.mapping import CAN_BE_MAPPED, Lending
from tpcolocate.weights.sync.transfer import MovePhases
from tpcolocate.weights.transport.bucket_sender import Replies, WeightServer
from tpcolocate.weights.transport.staging import Transfer


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor by its description."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class LearningPhases(MovePhases, BucketPhases):
    """Where an engine is new: a plan before the first byte, instead of a whole model in buckets to watch it being loaded."""

    def rehearse(self, lending: Lending) -> None:
        """Have the workers go through their loader with descriptions of what they have not told of yet.

        Collective: over the slice.  The engine's weights stay as they are.  A loader that needs values is no error: it is
        watched while it loads, bucket by bucket.

        Args:
            lending: What may become of the tensors' memory; what can be mapped and is not exported yet is, while the workers are
                busy.
        """
        knowledge = self.sync.knowledge
        if self.repeats or self.delivery.transport != "ipc" or self.sync.rehearsal_refused is not None:
            return
        new = [
            _Tensor(name, one.shape, one.local.dtype)
            for name, one in self.tensors.items()
            if not knowledge.covers(name, one.shape, one.local.dtype)
            and not knowledge.was_rehearsed(name, one.shape, one.local.dtype)
        ]
        if not new:
            return
        entries = [[one.name, str(one.dtype).removeprefix("torch."), list(one.shape)] for one in new]
        number = self.number()
        with self.watch.phase("learn"):
            what = "learn the engine's loader"
            workers = self.delivery.workers
            error: BaseException | None = None
            try:
                if workers is not None:
                    workers.post(addressed_to_all(DryRun(entries), len(self.group)), number)
            except BaseException as caught:
                error = caught
            self.borrowed.export(
                one.local.untyped_storage() for name, one in self.tensors.items() if lending.get(name) == CAN_BE_MAPPED
            )

            def answers(server: WeightServer) -> Replies:
                assert workers is not None
                if error is not None:
                    raise error
                return workers.collect(number, timeout_s=self.left(what))

            replies = self.on_owner(what, answers)
            for tp_rank, reply in replies.items():
                if reply.error is not None:
                    self.refuse_rehearsals(f"TP rank {tp_rank}: {reply.error}")
                    return
            told = {tp_rank: reply.result.traced for tp_rank, reply in replies.items()}
            knowledge.learn(told, new, len(self.group), loaded=False)
            self.rehearsed = True

    def refuse_rehearsals(self, why: str) -> None:
        self.borrowed.reclaim()
        self.sync.rehearsal_refused = why
        self.notes.append(f"the engine's loader is learned from whole buckets, which takes longer: {why}")

    def samples_hold(self, weights: NamedWeights) -> bool:
        """Whether the engine's loader does with real weights, one of each kind, what it did when it rehearsed.

        Each worker compares every copy with what was learned, and what arrived with what was sent, bit for bit.

        Collective: over the slice, and over the meshes of the weights, whose gathers the slices share: if one of them has
        to look, all do, and if one finds its loader otherwise, all of them use buckets in this sync.
        """
        if self.is_verified:
            return True
        names = set(self.sync.knowledge.samples(list(self.tensors)))
        items = [item for item in weights.items or () if item[0] in names]
        self.samples = buckets(items, self.bucket_bytes)
        self.rest = buckets(weights.items or (), self.bucket_bytes)  # of which all is sent if they do not hold
        with self.watch.phase("verify"):
            error: BaseException | None = None
            for bucket in self.samples:
                error = self.send(bucket, error, is_sample=True)
            self.agree(error, None, what="take the samples' memory back")
            holds = not self.otherwise
            for group in Transfer.groups(self.tensors):
                [there] = self.sync.mover.least(group, (int(holds),))
                holds = holds and bool(there)
        self.samples = None
        if self.otherwise:
            self.sync.knowledge.forget()
            self.refuse_rehearsals(f"it treats {some(self.otherwise, between=', ')} otherwise than it rehearsed")
        self.set_mode(moving=holds)
        return holds

    def left_of_samples(self) -> list[Callable[[], Any]]:
        """After a failure here: the gathers and the verdict that the ranks of other slices wait for."""
        assert self.samples is not None

        def gather() -> None:
            for bucket in self.samples or ():
                for _, tensor in bucket:
                    if is_collective(tensor):
                        with contextlib.suppress(Exception):
                            full_tensor(tensor)

        groups = Transfer.groups(self.tensors)
        return [gather, *(lambda group=group: self.sync.mover.least(group, (0,)) for group in groups)]  # type: ignore[misc]


__all__ = ["LearningPhases"]
