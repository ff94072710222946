"""Phases gather, export, push and release: full tensors in buckets, for the engine's own loader or planned copies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tpcolocate import ipc_payload
from tpcolocate.errors import ConfigError, SyncError, TpColocateError, WeightsMismatchError, some
from tpcolocate.in_server.tpcolocate_receiver.checksums import word_sum
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, LoadBucket
from tpcolocate.weights.buckets import split_into_buckets
from tpcolocate.weights.plan.loader_map import TensorEntry
from tpcolocate.weights.sources.lazy_tensor import Item, Items, LazyTensor, full_bytes, is_collective
from tpcolocate.weights.sources.named_weights import NamedWeights
from tpcolocate.weights.sources.nonfinite import refuse_nonfinite
from tpcolocate.weights.sync.mesh_schedule import gathers
from tpcolocate.weights.sync.records import BucketsSent
from tpcolocate.weights.sync.replicas import are_compared, refuse
from tpcolocate.weights.sync.session import RELEASE_S, WEIGHTS_UNKNOWN, SyncSession
from tpcolocate.weights.transport.bucket_sender import BucketSender, Verdict, judge

Description = tuple[str, tuple[int, ...], torch.dtype]


def send_buckets(
    session: SyncSession,
    sender: BucketSender,
    items: Items,
    bucket_bytes: int,
    *,
    doubles: Collection[str] = (),
    are_samples: bool = False,
) -> BucketsSent:
    """Send weights that the ranks have agreed on, one bucket after the other, gathered in lockstep.

    Collective: over the slice, and over the meshes of the weights.

    Args:
        items: The same names on every rank; their gathers are due in the schedule.
        bucket_bytes: Largest bucket.
        doubles: See `NamedWeights`.
        are_samples: Have the engine's loader take them whatever is planned, to see whether it does what was traced; they
            do not count as sent.
    """
    sent = BucketsSent()
    error: BaseException | None = None
    for bucket in buckets(items, bucket_bytes, session.state.loader_map.group_of):
        sent, error = _send(session, sender, bucket, error, sent, doubles=doubles, is_sample=are_samples)
    if sent.num_buckets:
        session.agree(error, None, what="take the staging memory back")
    return sent


def send_stream(session: SyncSession, sender: BucketSender, weights: NamedWeights, bucket_bytes: int) -> BucketsSent:
    """Send weights that are not known in advance; the ranks agree on each bucket.

    Collective: over the slice, and over the meshes of the weights.  The engine is not changed before a first bucket is there.

    Raises:
        ConfigError: There are no weights; on every rank.
    """
    sent = BucketsSent()
    error: BaseException | None = None
    loader_map = session.state.loader_map
    # Of a partial sync it is not known whether the other tensors of a group will come.
    sizes = None if session.options.partial else loader_map.group_sizes()
    stream = buckets(weights, bucket_bytes, loader_map.group_of, sizes=sizes)
    while (bucket := _next_bucket(session, stream, error)) is not None:
        if not sent.num_buckets:
            session.mark_engine_modified()
        session.schedule.enter(gathers(bucket))
        sent, error = _send(session, sender, bucket, None, sent, doubles=weights.doubles)
    if not sent.num_buckets:
        raise ConfigError(
            "there are no weights to sync", hint="a generator can be read once: make a new one for each sync"
        )
    return sent


def _next_bucket(session: SyncSession, stream: Iterator[Items], error: BaseException | None) -> Items | None:
    """The next bucket, or None at the end; all ranks agree on which, and that the last one is behind them.

    Args:
        error: What went wrong on this rank with the last bucket's handles.
    """
    bucket: Items | None = None
    with session.stats.watch.phase("gather"):
        if error is None:
            try:
                bucket = next(stream, None)  # a generator may gather, and may fail
                if bucket is not None and session.context.spec is not None:
                    session.context.spec.check([(name, tensor.shape) for name, tensor in bucket])
                    session.context.spec.check_dtypes([(name, tensor.dtype) for name, tensor in bucket])
                if bucket is not None and session.options.nonfinite == "refuse":
                    refuse_nonfinite(bucket)
            except BaseException as caught:
                error = caught
        mine = None if bucket is None else [(n, tuple(t.shape), t.dtype) for n, t in bucket]
        digest = hashlib.sha256(repr(mine).encode()).digest()
        of_ranks = session.agree(error, (digest, summary(mine)), what="choose the next weights")
        check_same_weights(session, of_ranks, bucket)
    return bucket


def _send(
    session: SyncSession,
    sender: BucketSender,
    bucket: Items,
    error: BaseException | None,
    before: BucketsSent,
    *,
    doubles: Collection[str] = (),
    is_sample: bool = False,
) -> tuple[BucketsSent, BaseException | None]:
    """Send one bucket.

    Args:
        bucket: The same on every rank.
        error: What went wrong on this rank with the last bucket's handles.
        before: What was sent before.
        doubles: See `NamedWeights`.

    Returns:
        What was sent, and what went wrong on this rank with this bucket's handles, for the next agreement.
    """
    stats = session.stats
    number = session.next_command()
    commands: list[Addressed] = []
    flat: torch.Tensor | None = None
    entries, num_bytes = ipc_payload.layout([(n, t.shape, t.dtype) for n, t in bucket])
    try:
        with stats.watch.phase("gather"):
            flat = _gather(session, sender, bucket, entries, num_bytes, error)
        with stats.watch.phase("export"):
            commands = sender.commands(flat, number, _load_command(session, entries, is_sample=is_sample))
    except BaseException as caught:
        error = caught
    with stats.watch.phase("export"):
        of_ranks = session.agree(error, commands, what=f"gather bucket {number}")
        if are_compared(session) and not any(isinstance(item, LazyTensor) for _, item in bucket):
            # Not what each rank has computed, whose last bits need not be the same on all GPUs.
            _compare(session, of_ranks, flat, entries)
    with stats.watch.phase("push"):
        per_tp_rank = dict(enumerate(command for of_rank in of_ranks for command in of_rank))
        what = f"load bucket {number}"
        may_be_ignored = session.state.loader_map.ignored.union(doubles)

        def load() -> Verdict:
            try:
                session.connection.post(per_tp_rank, number)
                return judge(session.connection.collect(number, timeout_s=session.left(what)), entries, may_be_ignored)
            finally:
                session.files.remove(number)

        verdict = session.on_owner(what, load)
    session.ledger.note_opened(number, verdict.opened)
    if verdict.problem is not None:
        raise SyncError(
            f"bucket {number} did not arrive: {verdict.problem}",
            hint=WEIGHTS_UNKNOWN,
            rank=session.context.owner_rank,
            details=verdict.details,
        )
    if verdict.traced:
        session.state.loader_map.update(verdict.traced, entries, session.context.tp_size, loaded=True)
    stats.add_worker_seconds(verdict.step_seconds)
    stats.by_way.staged += num_bytes
    stats.nonfinite.update(verdict.nonfinite)
    if not is_sample:
        stats.unverified.update(verdict.unverified)
        stats.num_replayed += len(bucket) if verdict.replayed else 0
        stats.num_buckets += 1
        stats.num_bytes += sum(entry.num_bytes for entry in entries)
        stats.names.update(name for name, _ in bucket if name not in verdict.ignored)
        stats.ignored.update(verdict.ignored)
    sent = replace(
        before,
        num_buckets=before.num_buckets + 1,
        traced=before.traced or bool(verdict.traced),
        deviating=(*before.deviating, *verdict.deviating),
    )
    with stats.watch.phase("release"):
        try:
            session.ledger.wait_for_release(session.deadline.within(RELEASE_S))
        except TpColocateError as caught:
            return sent, caught
    return sent, None


def _compare(
    session: SyncSession,
    of_ranks: Sequence[Sequence[Addressed]],
    flat: torch.Tensor | None,
    entries: Sequence[ipc_payload.Entry],
) -> None:
    """Refuse a bucket that the ranks have filled with different values.  Every rank comes to the same error.

    Collective: over the slice, if they differ.
    """
    sums = {repr(addressed.command.checksum) for of_rank in of_ranks for addressed in of_rank}  # type: ignore[union-attr]
    if len(sums) > 1:
        mine = {} if flat is None else {(e.name, ""): int(word_sum(ipc_payload.view(flat, e))) for e in entries}
        refuse(session.context.group, session.agree(None, mine, what="find what replicas differ in"))


def _load_command(session: SyncSession, entries: list[ipc_payload.Entry], *, is_sample: bool) -> Any:
    # The workers may have traced what this side does not know: in a sync that failed.
    loader_map = session.state.loader_map
    is_new = not all(loader_map.covers(TensorEntry(e.name, tuple(e.shape), e.dtype)) for e in entries)
    contents = ipc_payload.described(entries)
    return lambda handle, total: LoadBucket(
        handle, total, contents, watch=is_sample, report_trace=is_new and not is_sample
    )


def _gather(
    session: SyncSession,
    sender: BucketSender,
    bucket: Items,
    entries: list[ipc_payload.Entry],
    num_bytes: int,
    failure: BaseException | None,
) -> torch.Tensor | None:
    """Gather full tensors into new staging memory.  Ranks that export nothing, or have failed, gather all the same.

    Raises:
        BaseException: `failure`, or what went wrong here; after the last gather.
    """
    flat: torch.Tensor | None = None
    if sender.exports and failure is None:
        try:
            flat = ipc_payload.allocate(num_bytes, session.context.device)
        except Exception as error:
            failure = error
    largest = max(range(len(entries)), key=lambda i: entries[i].num_bytes)
    for i, ((_, item), entry) in enumerate(zip(bucket, entries)):
        if failure is not None and not is_collective(item):
            continue
        try:
            full = session.schedule.gather(item)
            if flat is not None and entry.num_bytes and failure is None:
                ipc_payload.view(flat, entry).copy_(full)
                filled = entry.start + entry.num_bytes
                end = entries[i + 1].start if i + 1 < len(entries) else num_bytes
                if filled < end:
                    flat[filled:end].zero_()  # the checksum covers the padding
            if i == largest:
                session.stats.peak.note()
        except Exception as error:  # the other ranks are in the gathers of the rest
            failure = error if failure is None else failure
    if failure is not None:
        raise failure
    if flat is not None and flat.is_cuda:
        # The reader's streams know nothing of ours.
        torch.cuda.current_stream(flat.device).synchronize()
    return flat


def buckets(
    weights: Iterable[tuple[str, Item]],
    bucket_bytes: int,
    group_of: Callable[[str], int | None] = lambda name: None,
    *,
    sizes: Mapping[int, int] | None = None,
) -> Iterator[Items]:
    """Cut weights into buckets of at most `bucket_bytes`, in order; the sizes are those of the full tensors.

    Args:
        weights: May be a generator.
        bucket_bytes: Largest bucket, unless a tensor or what must travel together is larger.
        group_of: Name -> a number that tensors have in common which must travel together; None: by itself.
        sizes: Group -> how many tensors it has, of a generator; counted otherwise.
    """
    return split_into_buckets(
        weights,
        bucket_bytes,
        num_bytes=lambda named: padded_bytes(named[1]),
        group_of=lambda named: group_of(named[0]),
        group_sizes=sizes,
    )


def padded_bytes(item: Item) -> int:
    """Return what a full tensor takes in a bucket."""
    return -(-full_bytes(item) // ipc_payload.ALIGNMENT) * ipc_payload.ALIGNMENT


def largest_bytes(items: Items) -> int:
    """Return what the largest of the full tensors takes in a bucket; 0 without any."""
    return max((padded_bytes(item) for _, item in items), default=0)


def check_same_weights(session: SyncSession, of_ranks: Sequence[tuple[bytes, str]], mine: Items | None) -> None:
    """Refuse ranks whose weights differ.  Every rank comes to the same error.

    Collective: over the slice, if they differ.

    Args:
        of_ranks: Digest and summary of each rank's weights.
        mine: Those of this rank; None if it has none, or does not know them yet.

    Raises:
        WeightsMismatchError: They do.
    """
    if len({digest for digest, _ in of_ranks}) == 1:
        return
    described = None if mine is None else [(name, _description(item)) for name, item in mine]
    lists = session.agree(None, described, what="find what weights differ in")
    views = [(rank, text) for rank, (_, text) in zip(session.context.group.ranks, of_ranks)]
    raise WeightsMismatchError(
        f"the ranks have different weights: {differences(views, lists)}",
        hint="every rank must pass the same names in the same order, in the same shapes and dtypes",
    )


def _description(item: Item) -> str:
    layout = f" {item.placements}" if isinstance(item, DTensor) else ""
    return f"{tuple(item.shape)} {item.dtype}{layout}"


def differences(views: Sequence[tuple[int, str]], lists: Sequence[Sequence[tuple[str, str]] | None]) -> str:
    """Return in words how the weights of a rank differ from those of the first rank: which names, or else what of them.

    Args:
        views: Global ranks, and in a few words the weights of each.
        lists: Of each, name and description of every tensor; None where they are not known.
    """
    other = next((i for i, one in enumerate(lists) if one is not None and one != lists[0]), None)
    if other is None and None not in lists:
        return "some of them are sharded in another way"
    if lists[0] is None or other is None:
        return "; ".join(f"rank {rank}: {text}" for rank, text in views)
    a, b = views[0][0], views[other][0]
    of_a, of_b = dict(lists[0]), dict(lists[other] or ())
    found = [
        f"rank {rank} has no {some([name for name in there if name not in here], between=', ')}"
        for rank, here, there in ((a, of_a, of_b), (b, of_b, of_a))
        if not there.keys() <= here.keys()
    ]
    if not found:
        found = [f"{n} is {of_a[n]} on rank {a}, {of_b[n]} on rank {b}" for n in of_a if of_a[n] != of_b[n]]
    if not found:
        found = [f"rank {a} has {m} where rank {b} has {n}" for m, n in zip(of_a, of_b) if m != n][:1]
    return some(found)


def summary(weights: Sequence[Description] | None) -> str:
    """Describe weights in a few words."""
    if not weights:
        return "no more weights"
    name, shape, dtype = weights[0]
    return f"{len(weights)} tensors from {name} {shape} {dtype}"


__all__ = [
    "buckets",
    "check_same_weights",
    "differences",
    "largest_bytes",
    "padded_bytes",
    "send_buckets",
    "send_stream",
    "summary",
]
