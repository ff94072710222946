"""Parameters that the TP worker maps for one sync alone, so that a first sync need not stage them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tpcolocate import ipc_payload
from tpcolocate.weights.transport.mapped_memory import PersistentMappings

_NUMBER = -2
"""In the place of a bucket's number, in errors."""


class TransientMappings:
    """What one rank has exported for the length of one sync; see `PersistentMappings` for what stays mapped.

    The worker lets go of it by itself when it leaves the sync: its regions are called as those of staging memory are.

    Args:
        ledger: Of these handles alone.
        loans: Of this rank; what is lent need not be borrowed.
        tp_rank: The reader.
    """

    def __init__(self, ledger: ipc_payload.Ledger, loans: PersistentMappings, *, tp_rank: int) -> None:
        self.ledger = ledger
        self.regions: dict[int, str] = {}
        """Storage -> what the worker calls it."""
        self.error: Exception | None = None
        """Why not all could be exported."""
        self._loans = loans
        self._tp_rank = tp_rank
        self._handles: list[tuple[str, ipc_payload.Handle]] = []

    def export(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Export storages; what goes wrong is left in `error`, since memory that cannot be mapped can be staged."""
        try:
            for storage in storages:
                if storage._cdata not in self.regions and self._loans.find(storage) is None:
                    region = f"stage/{len(self.regions)}"
                    handle = self.ledger.export_storage(storage, tp_rank=self._tp_rank, bucket=_NUMBER)
                    self._handles.append((region, handle))
                    self.regions[storage._cdata] = region
                    self._loans.seen(storage)
        except Exception as error:
            self.error = error

    def described(self) -> list[list[Any]]:
        """[region, handle] of everything, for a command."""
        return [[region, handle.describe()] for region, handle in self._handles]

    def note_opened(self, opened: Mapping[int, bool]) -> None:
        """TP rank -> whether it has mapped all of it."""
        self.ledger.note_opened(_NUMBER, opened)

    def forget(self) -> None:
        """The worker was told to let go: the handles are on their way back."""
        self.regions, self._handles = {}, []

    def reclaim(self) -> None:
        """Take back what the worker maps nothing of."""
        self.forget()
        self.error = None
        self.ledger.reclaim()


__all__ = ["TransientMappings"]
