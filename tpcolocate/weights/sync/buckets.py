"""Buckets: full tensors, loaded by the engine's own loader under a watch, or by what was learned from that."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tpcolocate import ipc_payload
from tpcolocate.deadline import Deadline
from tpcolocate.errors import SyncError, TpColocateError
from tpcolocate.weights.sources.lazy_tensor import Item, Items, full_bytes, full_tensor, is_collective
from tpcolocate.weights.sync.phases import RETURN_S, SyncPhases

Named = tuple[str, tuple[int, ...], torch.dtype]


class BucketPhases(SyncPhases):
    """One bucket after the other, gathered in lockstep."""

    def send_all(self, *, is_known: bool) -> None:
        """Send the rest of the weights.

        Args:
            is_known: Whether the ranks have agreed on all of them already; if not, they agree on each bucket.
        """
        error: BaseException | None = None
        if is_known:
            for bucket in self.rest:
                error = self.send(bucket, error)
            if self.staged:
                self.agree(error, None, what="take the staging memory back")
            return
        while (bucket_or_end := self.next_bucket(error)) is not None:
            error = self.send(bucket_or_end, None)

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
            self.check_alike(self.agree(error, (digest, headline(mine)), what="choose the next weights"))
        return bucket

    def send(self, bucket: Items, error: BaseException | None, *, is_sample: bool = False) -> BaseException | None:
        """Move one bucket.

        Args:
            bucket: The same on every rank.
            error: What went wrong on this rank with the last bucket's handles.
            is_sample: Have the engine's loader take it whatever is known, to see whether that is true; it does not count as
                sent.

        Returns:
            The same of this bucket, for the next agreement.
        """
        self.staged = True
        number = self.number()
        payloads: list[Any] = []
        entries, num_bytes = ipc_payload.layout([(n, t.shape, t.dtype) for n, t in bucket])
        flat: torch.Tensor | None = None
        try:
            with self.watch.phase("gather"):
                flat = self.gather(bucket, entries, num_bytes, error)
            with self.watch.phase("export"):
                # The workers may know what this side does not: they learned it in a sync that failed.
                tell = not all(self.sync.knowledge.covers(e.name, e.shape, e.dtype) for e in entries)
                asked = {"watch": True} if is_sample else {"report_trace": tell}
                payloads = self.delivery.make(flat, entries, number, **asked)
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
                details=verdict.details,
            )
        self.otherwise += verdict.otherwise
        if verdict.learned:
            self.learned = True
            self.sync.knowledge.learn(verdict.learned, entries, len(self.group), loaded=True)
        self.add_seconds(verdict.worker_seconds)
        self.num_staged += num_bytes
        if not is_sample:
            self.unproven.update(verdict.unproven)
            self.num_replayed += len(bucket) if verdict.replayed else 0
            self.num_buckets += 1
            self.num_tensors += len(bucket)
            self.num_bytes += sum(entry.num_bytes for entry in entries)
            self.names.update(name for name, _ in bucket)
        with self.watch.phase("settle"):
            try:
                self.ledger.wait_for_release(Deadline.after(min(self.deadline - time.monotonic(), RETURN_S)))
            except TpColocateError as caught:
                return caught
        return None

    def gather(
        self, bucket: Items, entries: list[ipc_payload.Entry], num_bytes: int, failure: BaseException | None
    ) -> torch.Tensor | None:
        """Full tensors into fresh staging memory.  Ranks that export nothing, or have failed, gather all the same.

        Raises:
            BaseException: `failure`, or what went wrong here; after the last gather.
        """
        flat: torch.Tensor | None = None
        if self.delivery.exports and failure is None:
            try:
                flat = ipc_payload.allocate(num_bytes, self.sync.device)
            except Exception as error:
                failure = error
        largest = max(range(len(entries)), key=lambda i: entries[i].num_bytes)
        for i, ((_, item), entry) in enumerate(zip(bucket, entries)):
            if failure is not None and not is_collective(item):
                continue
            try:
                full = full_tensor(item)
                if flat is not None and entry.num_bytes and failure is None:
                    ipc_payload.view(flat, entry).copy_(full)
                    filled = entry.start + entry.num_bytes
                    end = entries[i + 1].start if i + 1 < len(entries) else num_bytes
                    if filled < end:
                        flat[filled:end].zero_()  # the checksum covers the padding
                if i == largest:
                    self.note_peak()
            except Exception as error:  # the other ranks are in the gathers of the rest
                failure = error if failure is None else failure
        if failure is not None:
            raise failure
        if flat is not None and flat.is_cuda:
            # The reader's streams know nothing of ours.
            torch.cuda.current_stream(flat.device).synchronize()
        return flat


def buckets(weights: Iterable[tuple[str, Item]], bucket_bytes: int) -> Iterator[Items]:
    """Cut the stream into buckets of at most `bucket_bytes`, in order; the sizes are those of the full tensors."""
    bucket: Items = []
    used = 0
    for name, tensor in weights:
        size = padded_bytes(tensor)
        if bucket and used + size > bucket_bytes:
            yield bucket
            bucket, used = [], 0
        bucket.append((name, tensor))
        used += size
    if bucket:
        yield bucket


def padded_bytes(item: Item) -> int:
    return -(-full_bytes(item) // ipc_payload.ALIGNMENT) * ipc_payload.ALIGNMENT


def headline(mine: list[Named] | None) -> str:
    if not mine:
        return "no more weights"
    name, shape, dtype = mine[0]
    return f"{len(mine)} tensors from {name} {shape} {dtype}"


__all__ = ["BucketPhases", "buckets", "headline", "padded_bytes"]
