"""Reports of weight syncs, and the stopwatch that times their phases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from torch.profiler import record_function


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank's part in a weight sync.

    Attributes:
        rank: Global rank.
        seconds: Seconds per phase, phases that did not run left out: ``prepare`` (read and check the weights), ``open``
            (hold generation, reach the TP workers, agree), ``preflight`` (try a handle), ``trace`` (dry run of the engine's
            loader), ``compare`` (sums of replicas), ``map`` (map memory into the workers), ``plan`` (transfer plan),
            ``gather`` (weights into staging memory, checksums of what is not staged), ``export`` (checksums and handles of
            buckets), ``push`` (copy in the workers, which report sums of what has arrived), ``release`` (wait until
            handles are released), ``verify`` (compare sums, and samples on the first sync), ``finish`` (close the session,
            set the weight version).  A phase includes the wait for other ranks at its agreements.  A sync that repeats
            the last one has no ``trace``, ``map`` and ``plan``.
        num_exported: Handles that this rank exported for this sync.
        num_returned: Those that were released; equal to `num_exported` after a good sync.
        num_mapped: Handles of this rank's own parameters that the engine keeps open from sync to sync.
        latest_return_s: Longest time from the engine's answer to the release of a handle, in seconds.
        own_bytes: Bytes that this rank's TP worker copied straight from this rank's parameters.
        peer_bytes: Bytes that it copied straight from the parameters of other ranks, on their GPUs.
        staged_bytes: Bytes that went through this rank's staging memory.
        peak_extra_bytes: Peak memory of the sync on this rank's device beyond what was allocated before (staging and
            gathered tensors), as the allocator counts it; staging memory alone on a CPU.
        allocated_bytes: Memory allocated on this rank after the sync (the allocator's count; shared memory on a CPU).
    """

    rank: int
    seconds: dict[str, float]
    num_exported: int
    num_returned: int
    num_mapped: int
    latest_return_s: float
    own_bytes: int
    peer_bytes: int
    staged_bytes: int
    peak_extra_bytes: int
    allocated_bytes: int

    @property
    def direct_bytes(self) -> int:
        """Bytes that were copied straight from parameters, wherever they lie."""
        return self.own_bytes + self.peer_bytes

    @property
    def num_lent(self) -> int:
        """Former name of `num_mapped`."""
        return self.num_mapped


@dataclass(frozen=True, slots=True)
class SyncReport:
    """Result of `Engine.sync_weights`; the same on every rank of the slice but for `rank` and `seconds`.

    Attributes:
        rank: Global rank that returned this report.
        weight_version: Version that the engine now reports with every generated sequence.
        num_bytes: Bytes of weights, counted once however many TP ranks read them.
        num_tensors: Tensors sent.
        num_buckets: Commands that they were sent in.
        seconds: Of this rank, from when all ranks had called `sync_weights` to the end of the sync in this slice.  How long
            a rank waits for the others to call, and for other slices to end, is not in it.
        transport: ``"ipc"`` or ``"file"``.
        checked_against: Source of the names and shapes that the weights were checked against.
        num_replayed: Tensors copied by the plan of an earlier sync, without the engine's loader.
        worker_seconds: Seconds per step in the slowest TP worker.  For buckets of full tensors: ``open`` (map the handle),
            ``bring`` (fetch a bucket from another GPU), ``check`` (its checksum), ``load``, ``compare`` (read the
            parameters back).  ``map``: to map memory for later syncs.  With a transfer plan: ``open`` (map staging memory),
            ``define`` (prepare copies that a plan is new to), ``load``, and in it ``one_pass`` (one kernel copies and sums
            up) or ``copy`` (torch's copies and sums).
        num_verified: Tensors whose values were read back from every TP rank's parameters and equal what was sent.
        unverified: Names for which that cannot be checked (the engine transforms them while loading).
        bucket_bytes: Size of the buckets, planned from the least free memory of the slice.
        warnings: What the user should look at, such as memory that rises from sync to sync.
        ignored: Names in the checkpoint or the source that no TP rank's loader reads anything of: the second name of a tied
            weight, heads for other purposes, old buffers.  They need not be sent, and are not.
        missing: Names that the loader reads and that were not sent, which only `partial` permits; None if it is not known
            what the served model has.
        ranks: Every rank's part, in tp order.
        nonfinite: Names of weights that hold a NaN or an infinite number in the engine, sorted; the experts of a layer are
            one name, with a ``*``.  A GPU that repeats the last sync looks for them at every eighth sync, unless
            ``nonfinite="refuse"``; all other syncs look at all they bring.
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
    num_verified: int
    unverified: tuple[str, ...]
    bucket_bytes: int
    warnings: tuple[str, ...]
    ignored: tuple[str, ...]
    missing: tuple[str, ...] | None
    ranks: tuple[RankReport, ...]
    nonfinite: tuple[str, ...] = ()

    @property
    def num_proven(self) -> int:
        """Former name of `num_verified`."""
        return self.num_verified

    @property
    def unproven(self) -> tuple[str, ...]:
        """Former name of `unverified`."""
        return self.unverified

    def metrics(self, prefix: str = "tpcolocate/") -> dict[str, float]:
        """Return the figures of this sync as a flat dict, for wandb, TensorBoard and the like.

        Args:
            prefix: Of every key.

        Returns:
            ``seconds``, ``bytes``, ``bytes_per_second``, ``tensors``, ``buckets``, ``bucket_bytes``, ``replayed``, ``verified``,
            ``unverified``, ``missing``, ``warnings``; over the ranks of the slice, the sums ``own_bytes``, ``peer_bytes``,
            ``staged_bytes``, ``handles_exported``, ``handles_returned``, ``handles_mapped``, and the largest of
            ``peak_extra_bytes``, ``allocated_bytes``, ``latest_return_seconds`` and of every phase as ``phase/NAME``, in seconds;
            ``worker/STEP``, in seconds of the slowest TP worker; ``weight_version`` if it is a number.
        """
        values: dict[str, float] = {
            "seconds": self.seconds,
            "bytes": self.num_bytes,
            "bytes_per_second": self.num_bytes / self.seconds if self.seconds > 0 else 0.0,
            "tensors": self.num_tensors,
            "buckets": self.num_buckets,
            "bucket_bytes": self.bucket_bytes,
            "replayed": self.num_replayed,
            "verified": self.num_verified,
            "unverified": len(self.unverified),
            "missing": len(self.missing or ()),
            "warnings": len(self.warnings),
            "own_bytes": sum(part.own_bytes for part in self.ranks),
            "peer_bytes": sum(part.peer_bytes for part in self.ranks),
            "staged_bytes": sum(part.staged_bytes for part in self.ranks),
            "handles_exported": sum(part.num_exported for part in self.ranks),
            "handles_returned": sum(part.num_returned for part in self.ranks),
            "handles_mapped": sum(part.num_mapped for part in self.ranks),
            "peak_extra_bytes": max(part.peak_extra_bytes for part in self.ranks),
            "allocated_bytes": max(part.allocated_bytes for part in self.ranks),
            "latest_return_seconds": max(part.latest_return_s for part in self.ranks),
        }
        for phase in dict.fromkeys(name for part in self.ranks for name in part.seconds):
            values[f"phase/{phase}"] = max(part.seconds.get(phase, 0.0) for part in self.ranks)
        values.update({f"worker/{step}": seconds for step, seconds in self.worker_seconds.items()})
        if self.weight_version.isascii() and self.weight_version.isdecimal():
            values["weight_version"] = int(self.weight_version)
        return {f"{prefix}sync/{name}": float(value) for name, value in values.items()}

    def __str__(self) -> str:
        phases = next(r for r in self.ranks if r.rank == self.rank).seconds
        parts = ", ".join(f"{name} {value * 1e3:.1f}" for name, value in phases.items())
        return (
            f"synced {self.num_tensors} tensors, {self.num_bytes / 2**20:.1f} MiB in {self.num_buckets} buckets, "
            f"{self.seconds * 1e3:.1f} ms ({parts}), {self.transport}, {self.num_verified} verified, "
            f"version {self.weight_version}"
        )


@dataclass(slots=True)
class Stopwatch:
    """Seconds per phase.  Repeated phases add up; a nested phase counts as part of the outer one.

    A profiler of torch shows each as a range ``tpcolocate/sync/PHASE``.

    Attributes:
        seconds: Of the phases that are over.
        started: In `time.perf_counter`.
        current: The outer phase that is running; empty between phases.  Other threads may read it.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=perf_counter)
    current: str = field(default="", init=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.current:
            yield
            return
        begun, self.current = perf_counter(), name
        try:
            with record_function(f"tpcolocate/sync/{name}"):
                yield
        finally:
            self.current = ""
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - begun

    def total(self) -> float:
        return perf_counter() - self.started


__all__ = ["RankReport", "Stopwatch", "SyncReport"]
