"""The trainer's own memory, mapped by its TP worker so that nothing needs to be staged.

A storage that is mapped from sync to sync is exported once and read at every sync.  Until the worker releases it, torch
cannot reuse its memory, even if the trainer drops it: the counter says that a reader is there.  So a storage gets a
persistent mapping only once it was seen at two syncs in a row (a trainer that moves its weights away between steps never
has any), and what the trainer has dropped meanwhile is released at the next call that needs memory (`expired`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tpcolocate import ipc_payload

STAGED, MAPPABLE, STEADY = "0", "1", "2"
"""What a tensor's memory permits: to be copied; to be mapped for one sync; to be mapped from sync to sync."""
TRANSIENT = -2
"""Stands for a bucket's number in errors about transient mappings."""


@dataclass(frozen=True, slots=True)
class PersistentMapping:
    """One storage that the worker keeps mapped.

    Attributes:
        name: Of the region in the worker.
        handle: Its export.
        alive: Tells whether the trainer still has it.
        address: Of its first byte.
        num_bytes: Its size.
    """

    name: str
    handle: ipc_payload.Handle
    alive: StorageWeakRef
    address: int
    num_bytes: int


class PersistentMappings:
    """What the TP worker of one rank maps from sync to sync.

    Args:
        device: The worker's and this rank's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.version = 0
        """Changes whenever a mapping is added or removed."""
        self._mappings: dict[int, PersistentMapping] = {}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._mappings)

    def uses(self, storages: Sequence[torch.UntypedStorage]) -> list[str]:
        """Note the storages of a sync; return what the memory of each permits (`STAGED`, `MAPPABLE`, `STEADY`)."""
        found = []
        seen: dict[int, tuple[StorageWeakRef, int]] = {}
        for storage in storages:
            # The object may have been freed and its address be another's now, so the weak reference is kept and asked.
            before = self._seen.get(storage._cdata)
            if before is not None and not before[0].expired() and before[1] == storage.data_ptr():
                seen[storage._cdata] = before
                found.append(STEADY)
            else:
                seen[storage._cdata] = (StorageWeakRef(storage), storage.data_ptr())
                found.append(MAPPABLE)
            if not self._is_mappable(storage):
                found[-1] = STAGED
        self._seen = seen
        return found

    def _is_mappable(self, storage: torch.UntypedStorage) -> bool:
        """Whether another process could map it: on our device; on a CPU, in shared memory already."""
        if storage.nbytes() == 0:
            return False
        if self.device.type == "cpu":
            return storage.device.type == "cpu" and storage.is_shared()
        return storage.device == self.device

    def find(self, storage: torch.UntypedStorage) -> PersistentMapping | None:
        """Return the mapping of a storage, if it is still the same one at the same address."""
        found = self._mappings.get(storage._cdata)
        if found is None or found.alive.expired() or found.address != storage.data_ptr():
            return None
        return found

    def add(self, storage: torch.UntypedStorage) -> PersistentMapping:
        """Export a storage for as long as the worker maps it."""
        handle = ipc_payload.export_storage(storage)
        # torch keeps exported CUDA memory by its counter; a reference here would keep it forever.
        handle.drop_storage()
        found = PersistentMapping(
            f"mapped{next(self._numbers)}", handle, StorageWeakRef(storage), storage.data_ptr(), storage.nbytes()
        )
        self._mappings[storage._cdata] = found
        self.version += 1
        self.note_export(storage)
        return found

    def note_export(self, storage: torch.UntypedStorage) -> None:
        """Note where a storage lies after its export, which on a CPU may have moved it."""
        self._seen[storage._cdata] = (StorageWeakRef(storage), storage.data_ptr())

    def remove(self, names: set[str]) -> None:
        """Forget mappings that the worker has released, or is asked to."""
        kept = {key: one for key, one in self._mappings.items() if one.name not in names}
        self.version += len(kept) != len(self._mappings)
        self._mappings = kept

    def all(self) -> list[PersistentMapping]:
        return list(self._mappings.values())

    def expired(self) -> list[PersistentMapping]:
        """Return mappings whose storage the trainer has dropped or moved: only the worker keeps that memory."""
        return [one for one in self._mappings.values() if one.alive.expired()]

    def unused(self, storages: list[torch.UntypedStorage]) -> list[PersistentMapping]:
        """Return mappings of none of these storages."""
        used = {found.name for storage in storages if (found := self.find(storage)) is not None}
        return [one for one in self._mappings.values() if one.name not in used]

    def reclaim(self) -> None:
        """Set all counters right; only once the engine is gone, or is known to map nothing of it."""
        for one in self._mappings.values():
            one.handle.reclaim()
        self._mappings.clear()
        self.version += 1


class TransientMappings:
    """What the TP worker of one rank maps for one sync alone, so that a first sync need not stage it.

    The worker unmaps it by itself when it leaves the sync: the regions are named as those of staging memory are.

    Args:
        ledger: Of these handles alone.
        persistent: Of this rank; what they contain needs no transient mapping.
        tp_rank: The reader.
    """

    def __init__(self, ledger: ipc_payload.Ledger, persistent: PersistentMappings, *, tp_rank: int) -> None:
        self.ledger = ledger
        self.regions: dict[int, str] = {}
        """Storage -> name of its region in the worker."""
        self.error: Exception | None = None
        """Why not all could be exported."""
        self.is_sent = False
        """Whether the worker may have opened any of it."""
        self._persistent = persistent
        self._tp_rank = tp_rank
        self._handles: list[tuple[str, ipc_payload.Handle]] = []

    def export(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Export storages; what goes wrong is left in `error`, since memory that cannot be mapped can be staged."""
        try:
            for storage in storages:
                if storage._cdata not in self.regions and self._persistent.find(storage) is None:
                    region = f"stage/{len(self.regions)}"
                    handle = self.ledger.export_storage(storage, tp_rank=self._tp_rank, bucket=TRANSIENT)
                    self._handles.append((region, handle))
                    self.regions[storage._cdata] = region
                    self._persistent.note_export(storage)
        except Exception as error:
            self.error = error

    def described(self) -> list[list[Any]]:
        """Return [region, handle] of everything, for a command."""
        self.is_sent = self.is_sent or bool(self._handles)
        return [[region, handle.describe()] for region, handle in self._handles]

    def note_opened(self, opened: Mapping[int, bool]) -> None:
        """Enter which TP ranks have mapped all of it."""
        self.ledger.note_opened(TRANSIENT, opened)

    def forget(self) -> None:
        """Drop the handles: the worker unmaps them, so they are on their way back."""
        self.regions, self._handles = {}, []

    def reclaim(self) -> None:
        """Take back what the worker maps nothing of."""
        self.forget()
        self.error = None
        self.ledger.reclaim()


__all__ = ["MAPPABLE", "STAGED", "STEADY", "PersistentMapping", "PersistentMappings", "TransientMappings"]
