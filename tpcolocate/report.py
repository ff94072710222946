"""What a weight sync tells about itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank's part in a sync.

    Attributes:
        rank: Global rank.
        seconds: Seconds per phase: ``prepare`` (checks and agreement), ``open`` (until the TP workers listen),
            ``preflight`` (where one was made), ``lend`` and ``plan`` (where parts are moved), ``gather`` (weights into
            staging memory), ``export`` (checksums and handles), ``push`` (the workers, waited for by every rank),
            ``settle`` (until they let go of the handles), ``prove`` (comparison of what they hold), ``finish`` (the
            workers' end, version).  A sync that repeats the last one has neither ``lend`` nor ``plan``.
        num_exported: Handles this rank exported for this sync.
        num_returned: Handles of those that it saw come back; equal to `num_exported` after a good sync.
        num_lent: Handles of this rank's own parameters that the engine keeps open from sync to sync.
        latest_return_s: Longest that a handle stayed out after the engine had answered, in seconds.
        direct_bytes: What this rank's TP worker copied straight out of this rank's parameters.
        staged_bytes: What went through this rank's staging memory.
        peak_extra_bytes: Most memory that the sync held at once on this rank's device on top of what was there
            before (staging and gathered tensors), as the allocator counts it; staging alone on a CPU.
        allocated_bytes: What this rank holds after the sync (the allocator's count; shared memory on a CPU).
    """

    rank: int
    seconds: dict[str, float]
    num_exported: int
    num_returned: int
    num_lent: int
    latest_return_s: float
    direct_bytes: int
    staged_bytes: int
    peak_extra_bytes: int
    allocated_bytes: int


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What `Engine.sync_weights` did; the same on every rank of the slice but for `rank` and `seconds`.

    Attributes:
        rank: Global rank that holds this report.
        weight_version: What the engine now reports with every generated sequence.
        num_bytes: Bytes of weights, counted once however many TP ranks read them.
        num_tensors: Tensors sent.
        num_buckets: Commands they were sent in.
        seconds: From the call to its return on this rank.
        transport: ``"ipc"``, ``"file"`` or ``"stock"``.
        checked_against: Where the names and shapes came from that the weights were checked against.
        num_replayed: Tensors that the workers copied by a plan learned at an earlier sync, without the engine's loader.
        worker_seconds: Seconds inside the TP workers, the slowest one's: ``open`` (map the handles), ``check``
            (checksum), ``bring`` (a bucket from another GPU), ``load``, ``compare`` (read the parameters back); of parts,
            ``load`` and in it ``one_pass`` (one kernel copies and reads back) or ``copy`` (torch's copies and sums); empty
            with ``transport="stock"``.
        num_proven: Tensors whose values were read back from the parameters of every TP rank and equal what was sent.
        unproven: Names for which that cannot be told (the engine transforms them while loading), or all that were
            sent where nothing was read back (``transport="stock"``).
        bucket_bytes: Size of the buckets, as planned from the least free memory of the slice.
        warnings: What the user should look at, such as memory that rises from sync to sync.
        ranks: Every rank's part, in tp order.
    """

    rank: int
    weight_version: str
    num_bytes: int
    num_tensors: int
    num_buckets: int
    seconds: float
    transport: str
    checked_against: str
    num_replayed: int
    worker_seconds: dict[str, float]
    num_proven: int
    unproven: tuple[str, ...]
    bucket_bytes: int
    warnings: tuple[str, ...]
    ranks: tuple[RankReport, ...]

    def __str__(self) -> str:
        phases = next(r for r in self.ranks if r.rank == self.rank).seconds
        parts = ", ".join(f"{name} {value * 1e3:.1f}" for name, value in phases.items())
        return (
            f"synced {self.num_tensors} tensors, {self.num_bytes / 2**20:.1f} MiB in {self.num_buckets} buckets, "
            f"{self.seconds * 1e3:.1f} ms ({parts}), {self.transport}, {self.num_proven} proven, "
            f"version {self.weight_version}"
        )


@dataclass(slots=True)
class Stopwatch:
    """Seconds per phase; a phase that is entered again adds up, one inside another is part of that."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=perf_counter)
    _running: bool = field(default=False, init=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._running:
            yield
            return
        begun, self._running = perf_counter(), True
        try:
            yield
        finally:
            self._running = False
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - begun

    def total(self) -> float:
        return perf_counter() - self.started


__all__ = ["RankReport", "Stopwatch", "SyncReport"]
