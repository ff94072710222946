"""What the phases of a sync hand to each other; every record has one writer and none is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from tpcolocate.weights.plan.sharding import Layout, Shards
from tpcolocate.weights.plan.transfer_plan import TransferPlan
from tpcolocate.weights.sources.fingerprint import Fingerprint
from tpcolocate.weights.sources.named_weights import NamedWeights
from tpcolocate.weights.sync.options import SyncOptions
from tpcolocate.weights.transport.staging import PlannedTransfer, Transfer


@dataclass(frozen=True, slots=True)
class RankView:
    """What one rank reports to the others before anything is sent.

    Attributes:
        digest: Of names, shapes and dtypes; equal on all ranks.
        summary: The same for people.
        free_bytes: What can be staged.
        memory_uses: What the memory of each shard permits, as characters; see `transport.mapped_memory`.  None: as in the
            last sync.
        repeats: Whether this rank would do exactly what it did in the last sync.
        has_new_replicas: Whether this rank holds what others hold as well, and it has not been compared yet.
        excerpt: A replicated tensor, and the sum of an excerpt of it; the same on all ranks.
    """

    digest: bytes
    summary: str
    free_bytes: int
    memory_uses: str | None
    repeats: bool = False
    has_new_replicas: bool = False
    excerpt: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """The weights of this rank.

    Attributes:
        weights: What is to be sent.
        shards: Those of which parts can be transferred.
        groups: Among whose ranks they are sharded.
        view: Of this rank.
    """

    weights: NamedWeights
    shards: Shards
    groups: list[dist.ProcessGroup]
    view: RankView


@dataclass(frozen=True, slots=True)
class Opened:
    """What the ranks agreed on once the workers were reached.

    Attributes:
        session: Name of the workers' session.
        bucket_bytes: Size of the buckets and of all staging memory.
        repeats: Whether all ranks of the slice would do exactly what they did in the last sync.
        memory_uses: Tensor -> the least that its memory permits on any rank; empty if the sync repeats the last one.
        ahead: The last transfer, prepared in the hope that this sync repeats it.
        has_new_replicas: Whether any rank holds replicas that have not been compared yet.
    """

    session: str
    bucket_bytes: int
    repeats: bool
    memory_uses: Mapping[str, str]
    ahead: Transfer | None
    has_new_replicas: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """How the weights go, as the ranks of all meshes agreed.

    Attributes:
        shards: What is transferred in parts; the rest goes in buckets of full tensors.
        repeats: Whether all ranks of the meshes would do exactly what they did in the last sync.
        verified: Whether the loader maps of all slices have been verified; if not, samples are to be sent first.
        ignored: Weights of the source that are not sent, since no TP rank's loader reads them.
        is_shared: Whether all slices know alike what their loaders ignore and join, where that decides on gathers.
    """

    shards: Shards
    repeats: bool
    verified: bool
    ignored: frozenset[str] = frozenset()
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class BucketsSent:
    """What became of buckets.

    Attributes:
        num_buckets: How many were sent.
        traced: Whether the engine's loader was traced.
        deviating: Tensors that it treated differently than traced before.
    """

    num_buckets: int = 0
    traced: bool = False
    deviating: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CachedPlan:
    """The transfer plan of the last sync; its programs are defined in the workers.

    Attributes:
        signature: Equal for syncs that can use the plan.
        planned: The plan.
    """

    signature: object
    planned: PlannedTransfer

    @property
    def plan(self) -> TransferPlan:
        return self.planned.plan


@dataclass(frozen=True, slots=True)
class CachedSync:
    """What the next sync may find unchanged after one that transferred everything; none of the trainer's memory.

    Attributes:
        options: Of the last sync.
        source: Its module.
        layouts: Of its tensors.
        groups: Among which they are sharded.
        mappings_version: Of the persistent mappings after it.
        view: What this rank reported.
        bucket_bytes: As planned.
        num_bytes: Of all weights.
        plan: Of the transfer.
        ties: Weights that are compared with those that stand for them in the engine, as they lie elsewhere.
    """

    options: SyncOptions
    source: Fingerprint
    layouts: Mapping[str, Layout]
    groups: list[dist.ProcessGroup]
    mappings_version: int
    view: RankView
    bucket_bytes: int
    num_bytes: int
    plan: CachedPlan
    ties: tuple[str, ...]


__all__ = ["BucketsSent", "CachedPlan", "CachedSync", "Opened", "Prepared", "RankView", "Route"]
