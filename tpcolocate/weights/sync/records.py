"""What the phases of a sync hand to each other; every record has one writer and none is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from tpcolocate.weights.plan.sharding import Layout, Shards
from tpcolocate.weights.plan.transfer_plan import DirectBlocks, Group, TransferPlan
from tpcolocate.weights.sources.fingerprint import Fingerprint
from tpcolocate.weights.sources.named_weights import NamedWeights
from tpcolocate.weights.sync.options import SyncOptions
from tpcolocate.weights.transport.staging import PlannedTransfer, SourceBlock, Transfer


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
        worker_id: Identity of this rank's worker.
        has_new_replicas: Whether any rank holds replicas that have not been compared yet.
        has_mapped: Whether any rank of the slice knows of memory that is mapped from sync to sync.
    """

    session: str
    bucket_bytes: int
    repeats: bool
    memory_uses: Mapping[str, str]
    ahead: Transfer | None
    worker_id: str
    has_new_replicas: bool = False
    has_mapped: bool = False


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
class MapView:
    """What one rank reports to the ranks of its meshes before anything is mapped.

    Attributes:
        uses: What the memory of each tensor permits, as the ranks of its slice agreed; None: its slice has failed.
        same: Whether the plan of the last sync fits, and its programs are still defined in the worker.
        has_reach: Whether it is known who can map whose memory.
        worker_id: Identity of the worker; another one has mapped nothing yet.
        is_trusted: Whether the worker certainly has mapped what it was asked to in earlier syncs.
        holder_id: Identity of this rank's mappings; with another one those before are forgotten.
    """

    uses: str | None
    same: bool = False
    has_reach: bool = False
    worker_id: str = ""
    is_trusted: bool = False
    holder_id: str = ""


@dataclass(frozen=True, slots=True)
class MapDecision:
    """What follows for all ranks of the meshes.

    Attributes:
        persistent: Names whose memory workers map from sync to sync.
        transient: Names whose memory they map for this sync alone.
        same: Whether the plan of the last sync is used.
        needs_reach: Whether it must be found out who can map whose memory.
        untrusted: Global ranks whose workers may not have what they were asked to map.
        holder_ids: Global rank -> identity of its mappings; empty if its slice has failed.
    """

    persistent: frozenset[str]
    transient: frozenset[str]
    same: bool
    needs_reach: bool
    untrusted: frozenset[int]
    holder_ids: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Payload:
    """What one rank gives to the workers of the ranks of its meshes.

    Attributes:
        map: Global rank -> [region, handle] of what its worker is to map.
        release: Global rank -> names of regions that its worker is to unmap.
        blocks: Group -> TP rank -> what workers of that TP rank read where it lies.
        direct: The same slices for this rank's own plan.
    """

    map: Mapping[int, Sequence[Sequence[Any]]]
    release: Mapping[int, Sequence[str]]
    blocks: Mapping[Group, Mapping[int, SourceBlock]]
    direct: DirectBlocks

    def of_group(self, group: Group, ranks: Sequence[int]) -> GroupPayload:
        """Return what the ranks of one group exchange.  A rank of two groups gets its regions twice."""
        return GroupPayload(
            {rank: self.map[rank] for rank in ranks if rank in self.map},
            {rank: self.release[rank] for rank in ranks if rank in self.release},
            self.blocks[group],
        )


@dataclass(frozen=True, slots=True)
class GroupPayload:
    """The same for one group, in a form that can be sent.

    Attributes:
        map, release: See `Payload`.
        blocks: TP rank -> what workers of that TP rank read.
    """

    map: Mapping[int, Sequence[Sequence[Any]]]
    release: Mapping[int, Sequence[str]]
    blocks: Mapping[int, SourceBlock]


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
        largest_bytes: Of the largest of them, as it takes in a bucket.
        reading_bytes: Of the largest that is gathered.
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
    largest_bytes: int
    reading_bytes: int
    plan: CachedPlan
    ties: tuple[str, ...]


__all__ = [
    "BucketsSent",
    "CachedPlan",
    "CachedSync",
    "GroupPayload",
    "MapDecision",
    "MapView",
    "Opened",
    "Payload",
    "Prepared",
    "RankView",
    "Route",
]
