"""Parameters that the TP worker keeps mapped from one sync to the next, so that nothing is staged.

A mapped storage is exported once and read at every sync.  While it is lent, torch cannot reuse its memory, even if the
trainer drops it: the counter says that a reader is there.  So a storage is lent only once it was seen at two syncs in a
row (a trainer that moves its weights away between steps is never lent from), and what the trainer has dropped meanwhile
is called back at the next call that needs memory (`PersistentMappings.take_expired`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tpcolocate import ipc_payload


@dataclass(slots=True)
class PersistentMapping:
    """One storage that the worker may keep mapped.

    Attributes:
        name: What the worker calls it.
        handle: Its export.
        alive: Tells whether the trainer still has it.
        place: Its address.
        num_bytes: Its size.
    """

    name: str
    handle: ipc_payload.Handle
    alive: StorageWeakRef
    place: int
    num_bytes: int


class PersistentMappings:
    """What one rank has lent to its TP worker.

    Args:
        device: The worker's and this rank's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._loans: dict[int, PersistentMapping] = {}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._numbers = itertools.count()
        self.state = 0
        """Another number whenever something was lent or taken back."""

    def __len__(self) -> int:
        return len(self._loans)

    @property
    def num_bytes(self) -> int:
        return sum(loan.num_bytes for loan in self._loans.values())

    def note(self, storages: list[torch.UntypedStorage]) -> list[bool]:
        """Remember the storages of a sync; for each, whether it may be lent: it was there at the sync before."""
        steady = []
        seen: dict[int, tuple[StorageWeakRef, int]] = {}
        for storage in storages:
            # The object may have been freed and its address be another's now, so the weak reference is kept and asked.
            before = self._seen.get(storage._cdata)
            same = before is not None and not before[0].expired() and before[1] == storage.data_ptr()
            seen[storage._cdata] = (
                before if before is not None and same else (StorageWeakRef(storage), storage.data_ptr())
            )
            steady.append(same and self.can_be_mapped(storage))
        self._seen = seen
        return steady

    def can_be_mapped(self, storage: torch.UntypedStorage) -> bool:
        """Whether another process could map it: on our device; on a CPU, in shared memory already."""
        if storage.nbytes() == 0:
            return False
        if self.device.type == "cpu":
            return storage.device.type == "cpu" and storage.is_shared()
        return storage.device == self.device

    def find(self, storage: torch.UntypedStorage) -> PersistentMapping | None:
        """The loan of a storage, if it is still the same one at the same place."""
        loan = self._loans.get(storage._cdata)
        if loan is None or loan.alive.expired() or loan.place != storage.data_ptr():
            return None
        return loan

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """Of the loan that a tensor lies in."""
        loan = self.find(tensor.untyped_storage())
        return None if loan is None else loan.name

    def lend(self, storage: torch.UntypedStorage) -> PersistentMapping:
        """Export a storage for as long as the worker maps it."""
        handle = ipc_payload.export_storage(storage)
        # torch keeps exported CUDA memory by its counter, and a reference of ours would keep it for ever.
        handle.drop_storage()
        loan = PersistentMapping(
            f"loan{next(self._numbers)}", handle, StorageWeakRef(storage), storage.data_ptr(), storage.nbytes()
        )
        self._loans[storage._cdata] = loan
        self.state += 1
        self.seen(storage)
        return loan

    def seen(self, storage: torch.UntypedStorage) -> None:
        """Remember where a storage of this sync lies after it was exported, which on a CPU may have moved it."""
        self._seen[storage._cdata] = (StorageWeakRef(storage), storage.data_ptr())

    def take(self, names: set[str]) -> list[PersistentMapping]:
        """Take loans out of the books; the worker has been or will be told to let go of them."""
        taken = [loan for loan in self._loans.values() if loan.name in names]
        self.state += bool(taken)
        self._loans = {key: loan for key, loan in self._loans.items() if loan.name not in names}
        return taken

    def names(self) -> list[str]:
        """What the worker calls everything that is lent."""
        return [loan.name for loan in self._loans.values()]

    def expired(self) -> list[PersistentMapping]:
        """PersistentMappings whose storage the trainer has dropped or moved: only the worker keeps that memory."""
        return [loan for loan in self._loans.values() if loan.alive.expired()]

    def unused(self, storages: list[torch.UntypedStorage]) -> list[PersistentMapping]:
        """PersistentMappings that are of none of these storages."""
        used = {loan.name for storage in storages if (loan := self.find(storage)) is not None}
        return [loan for loan in self._loans.values() if loan.name not in used]

    def describe(self, loan: PersistentMapping) -> list[Any]:
        return [loan.name, loan.handle.describe()]

    def reclaim(self) -> None:
        """Set all counters right; only once the engine is gone."""
        for loan in self._loans.values():
            loan.handle.reclaim()
        self._loans.clear()
        self.state += 1


__all__ = ["PersistentMapping", "PersistentMappings"]
