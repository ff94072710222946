"""Phase prepare: read the weights of this rank and check them, or find them as they were in the last sync."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tpcolocate.errors import ConfigError
from tpcolocate.garbage import collector_paused
from tpcolocate.weights.plan.sharding import CachedShards, LocalShard, Shards, mesh_groups
from tpcolocate.weights.sources.named_weights import NamedWeights, Source, check_unique
from tpcolocate.weights.sources.nonfinite import refuse_nonfinite
from tpcolocate.weights.sync.buckets import summary
from tpcolocate.weights.sync.completeness import check_again, check_before_trace
from tpcolocate.weights.sync.mesh_calls import route_call, unread_call
from tpcolocate.weights.sync.records import CachedSync, Prepared, RankView
from tpcolocate.weights.sync.replicas import excerpt_sum, has_new_replicas
from tpcolocate.weights.sync.session import SyncSession
from tpcolocate.weights.transport.mapped_memory import STAGED, STEADY
from tpcolocate.weights.transport.memory import free_bytes


def reusable_sync(session: SyncSession) -> CachedSync | None:
    """Return what the last sync left, unless it was another kind of sync or other memory is mapped by now."""
    cached = session.state.cached_sync
    if cached is None or cached.options != session.options:
        return None
    return cached if cached.mappings_version == session.state.mappings.version else None


@collector_paused()
def prepare(session: SyncSession, source: Source) -> Prepared:
    """Read and check the weights; their mesh collectives are due before the first check can fail.

    Raises:
        ConfigError: There are none.
        WeightsMismatchError: Names or shapes are not the served model's, are missing, or are given twice.
    """
    spec, options = session.context.spec, session.options
    with _reading(session, source):
        weights = NamedWeights.of(source, expected=None if spec is None else spec.shapes, rename=options.rename)
        shards: Shards = session.state.shard_finder.find_all(weights.items or ()) if _has_shards(session) else {}
    if session.state.loader_map.is_empty:  # said once: with the first report
        session.stats.warnings += weights.warnings
    groups = mesh_groups(shards)
    session.schedule.enter([route_call(session, lambda: weights.items or [], groups)])
    if weights.items is not None:
        _check(session, weights)
    uses = _memory_uses(session, shards)
    if shards:
        _wait_for_trainer(session)
    contents = None if weights.items is None else [(n, tuple(t.shape), t.dtype) for n, t in weights.items]
    is_new = has_new_replicas(session, source, weights)
    names = [name for name, *_ in contents or ()]
    kinds = {kind: str(kind) for kind in {(shape, dtype) for _, shape, dtype in contents or ()}}
    words = contents and (names, [kinds[shape, dtype] for _, shape, dtype in contents])
    digest = hashlib.sha256(repr((words, list(shards) == names)).encode())
    view = RankView(
        digest.digest(),
        "a generator" if contents is None else summary(contents),
        free_bytes(session.context.device),
        "".join(uses),
        has_new_replicas=is_new,
        excerpt=None if is_new else excerpt_sum(session, weights),
    )
    return Prepared(weights, shards, groups, view)


def _has_shards(session: SyncSession) -> bool:
    options = session.options
    return options.parts and options.payloads == "per_rank" and options.transport in ("auto", "ipc")


@contextlib.contextmanager
def _reading(session: SyncSession, source: object) -> Iterator[None]:
    """Find out what the weights are; if that fails, ranks of other slices are not to wait for this one."""
    try:
        yield
    except BaseException:
        if _has_shards(session):
            session.schedule.enter([unread_call(session, _groups_of(session, source))])
        raise


def _groups_of(session: SyncSession, source: object) -> list[dist.ProcessGroup]:
    """Return the groups among which the tensors of a source are sharded; those of the last sync if it has none."""
    tensors: Iterable[object] = ()
    if isinstance(source, nn.Module):
        tensors = chain(source.parameters(), source.buffers())
    elif isinstance(source, (Mapping, Sequence)):
        pairs = source.items() if isinstance(source, Mapping) else source
        tensors = [pair[1] for pair in pairs if isinstance(pair, (tuple, list)) and len(pair) == 2]
    shards: dict[str, LocalShard] = {}
    for tensor in tensors:
        with contextlib.suppress(Exception):  # it may be what the rank has failed at
            if isinstance(tensor, DTensor) and (shard := session.state.shard_finder.find(tensor)) is not None:
                shards[str(len(shards))] = shard
    cached = session.state.cached_sync
    return mesh_groups(shards) or ([] if cached is None else cached.groups)


def _check(session: SyncSession, weights: NamedWeights) -> None:
    spec, items = session.context.spec, weights.items or []
    if not items:
        raise ConfigError(
            "there are no weights to sync",
            hint="pass the module itself, whose shards are read where they lie; a full state dict that is gathered for one rank "
            "(cpu_offload, rank0_only) is empty on the others",
        )
    names = [name for name, _ in items]
    check_unique(names)
    if spec is not None:
        spec.check([(name, tensor.shape) for name, tensor in items], hint=session.options.rename is None)
        spec.check_dtypes([(name, tensor.dtype) for name, tensor in items])
    check_before_trace(session, weights)
    if session.options.nonfinite == "refuse":
        refuse_nonfinite(items)


def _memory_uses(session: SyncSession, shards: Shards) -> list[str]:
    """What the memory of each shard permits, as far as this rank is concerned."""
    state = session.state
    uses = state.mappings.uses([one.local.untyped_storage() for one in shards.values()])
    if state.mapped.problem is not None:
        return [STAGED] * len(uses)
    # Where nothing of a tensor lies here nothing has to be mapped; what is computed has no memory that could be.
    is_nothing = (one.compute is None and not one.local.numel() for one in shards.values())
    return [STEADY if nothing else use for use, nothing in zip(uses, is_nothing)]


def prepare_again(session: SyncSession, source: Source, cached: CachedSync) -> Prepared | None:
    """Return the same, if this rank finds everything as it was in the last sync."""
    with _reading(session, source):
        match = cached.source.match(source, session.options.rename)
    if match is None:
        return None
    # Thousands of items may never be needed, so they are not made here.
    session.schedule.enter([route_call(session, lambda: match.items, cached.groups)])
    finder, items = session.state.shard_finder, match.items

    def computed(name: str) -> LocalShard:
        shard = finder.find(items.computed(name))
        assert shard is not None  # it had one in the last sync
        return shard

    shards = CachedShards(items.tensor_of, cached.layouts, computed)
    _wait_for_trainer(session)
    weights = match.weights
    check_again(session, weights, cached.ties)
    if session.options.nonfinite == "refuse":
        refuse_nonfinite(weights.items or ())
    view = replace(
        cached.view, memory_uses=None, repeats=True, has_new_replicas=False, excerpt=excerpt_sum(session, weights)
    )
    return Prepared(weights, shards, cached.groups, view)


def _wait_for_trainer(session: SyncSession) -> None:
    """The workers' streams know nothing of those that the weights were computed on."""
    if session.context.device.type == "cuda":
        torch.cuda.synchronize(session.context.device)


def least_memory_uses(session: SyncSession, prepared: Prepared, of_ranks: Sequence[RankView]) -> dict[str, str]:
    """Return for every shard the least that its memory permits on any rank."""
    state = session.state
    last = state.mapped.memory_uses or [""] * len(of_ranks)
    state.mapped.memory_uses = [
        before if view.memory_uses is None else view.memory_uses for view, before in zip(of_ranks, last, strict=True)
    ]
    return state.mapped.least_memory_uses(prepared.shards)


__all__ = ["least_memory_uses", "prepare", "prepare_again", "reusable_sync"]
