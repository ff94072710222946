"""How much memory a sync may take, how much it took, and whether it comes back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from tpcolocate.errors import ConfigError
from tpcolocate.ipc_payload import SHARED_MEMORY_HINT

_SHM = Path("/dev/shm")
# Fragmentation, the buffers of the collectives and other users of the device take memory too.
_USABLE = 0.8
_ALARM_SYNCS = 5
_ALARM_BYTES = 2**20


def free_bytes(device: torch.device) -> int:
    """Return what can still be allocated for staging on this rank: device memory, or shared memory on a CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reusable
    shm = os.statvfs(_SHM)
    return min(shm.f_bavail * shm.f_frsize, psutil.virtual_memory().available)


def allocated_bytes(device: torch.device) -> int:
    """Return what this process has allocated: the allocator's count, limbo included; on a CPU its shared-memory files."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    total = 0
    for name in os.listdir(_SHM):
        if name.startswith(f"torch_{os.getpid()}_"):
            try:
                total += (_SHM / name).stat().st_size
            except FileNotFoundError:
                pass  # given back meanwhile, by the garbage collector or the engine
    return total


def plan_bucket(
    limit: int, free: Mapping[int, int], *, largest: int, copies: int, gathered: int = 0, on_cpu: bool = False
) -> int:
    """Return the bucket size in bytes that fits on every rank.  Pure.

    Args:
        limit: The user's `bucket_bytes`.
        free: Free bytes of every rank of the slice, by global rank.
        largest: Size of the largest single tensor, which travels alone if need be; 0 if not known in advance.
        copies: How many times a bucket is allocated at once on one rank.
        gathered: Size of the largest tensor that is gathered beside the bucket before it is copied in.
        on_cpu: Whether it is shared memory that is free, and not a GPU's.

    Raises:
        ConfigError: Not even the largest tensor fits, or nothing at all.
    """
    fullest = min(free, key=free.__getitem__)
    least = free[fullest]
    limit_here = (int(least * _USABLE) - gathered) // copies
    if max(largest, 1) > limit_here:
        what = f"the largest tensor ({_size(largest)}, {copies} times at once)" if largest else "a bucket"
        if on_cpu:
            raise ConfigError(
                f"{what} does not fit into the {_size(least)} that are free in /dev/shm and RAM for rank {fullest}",
                hint=SHARED_MEMORY_HINT,
            )
        raise ConfigError(
            f"{what} does not fit into the {_size(least)} that are free on the device of rank {fullest}",
            hint="before sync_weights() free memory there: del what a training step leaves, torch.cuda.empty_cache(), and "
            'engine.wake(["weights"]) alone, without the KV cache; or lower mem_fraction_static of launch()',
        )
    return min(limit, limit_here)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"


class PeakMemory:
    """Most memory that a sync held at once, on top of what was there before.

    Args:
        device: Of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.extra_bytes = 0
        self._device = device
        self._before = allocated_bytes(device)

    def note(self) -> None:
        """Look at what is allocated now."""
        self.extra_bytes = max(self.extra_bytes, allocated_bytes(self._device) - self._before)


class SlopeAlarm:
    """Warns when memory rises from sync to sync, as it does when handles leak."""

    def __init__(self) -> None:
        self._seen: list[int] = []

    def note(self, allocated: int) -> str | None:
        """Enter what is allocated after a sync; return a warning if it has only risen lately.

        Args:
            allocated: In bytes.
        """
        self._seen = [*self._seen, allocated][-_ALARM_SYNCS:]
        steps = [later - earlier for earlier, later in zip(self._seen, self._seen[1:])]
        if len(self._seen) < _ALARM_SYNCS or any(step < _ALARM_BYTES for step in steps):
            return None
        return (
            f"memory rose at each of the last {len(steps)} syncs, by {sum(steps) / len(steps) / 2**20:.1f} MiB on average: "
            "something keeps what a sync should give back"
        )


__all__ = ["PeakMemory", "SlopeAlarm", "allocated_bytes", "free_bytes", "plan_bucket"]
