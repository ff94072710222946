"""The trainer's own memory, mapped by the TP workers that read it so that nothing needs to be staged.

A storage that is mapped from sync to sync is exported once and read at every sync.  Until its readers release it, torch
cannot reuse its memory, even if the trainer drops it: the counter says that a reader is there.  So a storage gets a
persistent mapping only once it was seen at two syncs in a row (a trainer that moves its weights away between steps never
has any), and what the trainer has dropped meanwhile is released at the next call that needs memory (`expired`).
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tpcolocate import ipc_payload

STAGED, MAPPABLE, STEADY = "0", "1", "2"
"""What a tensor's memory permits: to be copied; to be mapped for one sync; to be mapped from sync to sync."""
TRANSIENT, TRANSIENT_ELSEWHERE = -2, -6
"""Stand for a bucket's number in errors about transient mappings: in workers of this slice, and of other slices."""


@dataclass(frozen=True, slots=True)
class PersistentMapping:
    """One storage that workers keep mapped.

    Attributes:
        name: Of the region in the workers.
        handles: Global rank of each worker's training rank -> its export.
        alive: Tells whether the trainer still has it.
        address: Of its first byte.
        num_bytes: Its size.
    """

    name: str
    handles: Mapping[int, ipc_payload.Handle]
    alive: StorageWeakRef
    address: int
    num_bytes: int

    @property
    def is_released(self) -> bool:
        """Whether no worker has it open."""
        return all(handle.count() <= 0 for handle in self.handles.values())

    def reclaim(self, readers: Collection[int] | None = None) -> None:
        """Set the counters of some readers right: of those that are gone or map nothing of it; of all if left out."""
        for reader, handle in self.handles.items():
            if readers is None or reader in readers:
                handle.reclaim()


class PersistentMappings:
    """What workers map of one rank's memory from sync to sync.

    Args:
        device: Of this rank and its worker.
        rank: This global rank.
    """

    def __init__(self, device: torch.device, rank: int) -> None:
        self.device = device
        self.identity = secrets.token_hex(8)
        """Another one when all mappings were forgotten at once: workers of other slices may still have them."""
        self.version = 0
        """Changes whenever a mapping is added or removed."""
        self.retired: list[PersistentMapping] = []
        """Of no use any more, and not yet confirmed to be released."""
        self._rank = rank
        self._mappings: dict[int, PersistentMapping] = {}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._mappings)

    def uses(self, storages: Sequence[torch.UntypedStorage]) -> list[str]:
        """Note the storages of a sync; return what the memory of each permits (`STAGED`, `MAPPABLE`, `STEADY`)."""
        found: dict[int, str] = {}  # tens of thousands of tensors lie in hundreds of storages
        seen: dict[int, tuple[StorageWeakRef, int]] = {}
        for storage in storages:
            if storage._cdata in found:
                continue
            # The object may have been freed and its address be another's now, so the weak reference is kept and asked.
            before = self._seen.get(storage._cdata)
            use = STEADY
            if before is None or before[0].expired() or before[1] != storage.data_ptr():
                use, before = MAPPABLE, (StorageWeakRef(storage), storage.data_ptr())
            seen[storage._cdata] = before
            found[storage._cdata] = use if self._is_mappable(storage) else STAGED
        self._seen = seen
        return [found[storage._cdata] for storage in storages]

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

    def add(self, storage: torch.UntypedStorage, readers: Iterable[int]) -> PersistentMapping:
        """Export a storage to workers, for as long as they map it.

        Args:
            storage: Not mapped yet.
            readers: Global ranks of the workers' training ranks.
        """
        handles: dict[int, ipc_payload.Handle] = {}
        for reader in readers:
            handles[reader] = ipc_payload.export_storage(storage)
            # torch keeps exported CUDA memory by its counter; a reference here would keep it forever.
            handles[reader].drop_storage()
        name = f"r{self._rank}/mapped{next(self._numbers)}"
        found = PersistentMapping(name, handles, StorageWeakRef(storage), storage.data_ptr(), storage.nbytes())
        self._mappings[storage._cdata] = found
        self.version += 1
        self.note_export(storage)
        return found

    def note_export(self, storage: torch.UntypedStorage) -> None:
        """Note where a storage lies after its export, which on a CPU may have moved it."""
        self._seen[storage._cdata] = (StorageWeakRef(storage), storage.data_ptr())

    def retire(self, mappings: Iterable[PersistentMapping]) -> None:
        """Use these no longer; they stay until workers have confirmed that they have released them."""
        names = {one.name for one in mappings}
        self.retired += [one for one in self._mappings.values() if one.name in names]
        kept = {key: one for key, one in self._mappings.items() if one.name not in names}
        self.version += len(kept) != len(self._mappings)
        self._mappings = kept

    def forget(self, mappings: Iterable[PersistentMapping]) -> None:
        """Forget retired mappings that are released."""
        names = {one.name for one in mappings}
        self.retired = [one for one in self.retired if one.name not in names]

    def forget_released(self) -> None:
        """Forget retired mappings that have come back by themselves: their readers shared no mesh of the last weights."""
        if self.retired:
            self.forget([one for one in self.retired if one.is_released])

    def all(self) -> list[PersistentMapping]:
        return list(self._mappings.values())

    def expired(self) -> list[PersistentMapping]:
        """Return mappings whose storage the trainer has dropped or moved: only the workers keep that memory."""
        return [one for one in self._mappings.values() if one.alive.expired()]

    def unused(self, wanted: Mapping[int, Collection[int]]) -> list[PersistentMapping]:
        """Return the mappings that are of no use.

        Args:
            wanted: Storage (``_cdata``) -> the ranks whose workers are to map it.
        """
        return [
            one
            for key, one in self._mappings.items()
            if key not in wanted or one.alive.expired() or set(one.handles) != set(wanted[key])
        ]

    def reclaim(self, readers: Collection[int] | None = None) -> None:
        """Forget all mappings, and set the counters of some readers right.

        Only once these workers are gone, or are known to map nothing of it.  What others still map comes back when they
        release it.

        Args:
            readers: Their ranks; all if left out.
        """
        for one in (*self._mappings.values(), *self.retired):
            one.reclaim(readers)
        self._mappings.clear()
        self.retired.clear()
        self.version += 1
        self.identity = secrets.token_hex(8)


class TransientMappings:
    """What workers map of one rank's memory for one sync alone, so that a first sync need not stage it.

    Workers unmap it by themselves when they leave the sync: the regions are named as those of staging memory are.

    Args:
        ledger: Of these handles alone.
        persistent: Of this rank; what they contain needs no transient mapping.
        rank: This global rank.
    """

    def __init__(self, ledger: ipc_payload.Ledger, persistent: PersistentMappings, *, rank: int) -> None:
        self.ledger = ledger
        self.regions: dict[int, str] = {}
        """Storage -> name of its region in the workers."""
        self.error: Exception | None = None
        """Why not all could be exported."""
        self.is_sent = False
        """Whether a worker may have opened any of it."""
        self._persistent = persistent
        self._rank = rank
        self._handles: dict[tuple[int, int], ipc_payload.Handle] = {}

    def export(
        self, storages: Iterable[torch.UntypedStorage], reader: int, tp_rank: int, *, is_elsewhere: bool = False
    ) -> None:
        """Export storages to one worker; what goes wrong is left in `error`, since memory that cannot be mapped can be staged.

        Args:
            storages: Any; what this worker has already is left out.
            reader: Global rank of the worker's training rank.
            tp_rank: Of the worker.
            is_elsewhere: Whether it is a worker of another slice.
        """
        bucket = TRANSIENT_ELSEWHERE if is_elsewhere else TRANSIENT
        try:
            for storage in storages:
                key = storage._cdata
                if (key, reader) not in self._handles and self._persistent.find(storage) is None:
                    handle = self.ledger.export_storage(storage, tp_rank=tp_rank, bucket=bucket)
                    self.regions.setdefault(key, f"r{self._rank}/stage/{len(self.regions)}")
                    self._handles[key, reader] = handle
                    self._persistent.note_export(storage)
        except Exception as error:
            self.error = error

    def described(self, reader: int) -> list[list[Any]]:
        """Return [region, handle] of everything for one worker, for a command."""
        self.is_sent = self.is_sent or bool(self._handles)
        return [[self.regions[key], handle.describe()] for (key, of), handle in self._handles.items() if of == reader]

    def note_opened(self, opened: Mapping[int, bool]) -> None:
        """Enter which TP ranks of this slice have mapped all of it."""
        self.ledger.note_opened(TRANSIENT, opened)

    def forget(self) -> None:
        """Drop the handles: the workers unmap them, so they are on their way back."""
        self.regions, self._handles = {}, {}

    def reclaim(self) -> None:
        """Take back what the workers map nothing of."""
        self.forget()
        self.error = None
        self.ledger.reclaim()


__all__ = [
    "MAPPABLE",
    "STAGED",
    "STEADY",
    "TRANSIENT_ELSEWHERE",
    "PersistentMapping",
    "PersistentMappings",
    "TransientMappings",
]
