"""How weights are moved, as the caller of a sync may choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tpcolocate.checks import check_choice, check_flag, check_folder, check_path, check_positive_integer
from tpcolocate.weights.sources.named_weights import Rename, check_rename
from tpcolocate.weights.transport.bucket_sender import PAYLOADS, TRANSPORTS

NONFINITE = ("warn", "refuse")
"""``warn``: name weights that are NaN or infinite in the report.  ``refuse``: look for them first, and send nothing."""


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """How weights are moved.

    Attributes:
        bucket_bytes: Most staging memory of a sync, in bytes; a larger tensor gets a bucket of its own.
        payloads: One of `PAYLOADS`.
        transport: One of `TRANSPORTS`.
        partial: Weights that are not sent stay as they are, instead of being an error.
        folder: Where files go, for the transport ``file``; default: /dev/shm.
        rename: From the source's names to the served checkpoint's; see `NamedWeights`.
        parts: Move only the parts that each TP worker reads, where that is known, instead of full tensors.
        nonfinite: One of `NONFINITE`.

    Raises:
        ConfigError: One of them is of another type, out of range or unknown, or files cannot be written to the folder.
    """

    bucket_bytes: int = 512 * 2**20
    payloads: str = "per_rank"
    transport: str = "auto"
    partial: bool = False
    folder: Path | None = None
    rename: Rename | None = None
    parts: bool = True
    nonfinite: str = "warn"

    def __post_init__(self) -> None:
        check_positive_integer("bucket_bytes", self.bucket_bytes)
        check_choice("payloads", self.payloads, PAYLOADS)
        check_choice("transport", self.transport, TRANSPORTS)
        check_choice("nonfinite", self.nonfinite, NONFINITE)
        check_flag("partial", self.partial)
        check_flag("parts", self.parts)
        check_rename(self.rename)
        if isinstance(self.rename, Mapping):
            # As it is now: the next sync compares its options with these, and the caller may change the mapping meanwhile.
            object.__setattr__(self, "rename", dict(self.rename))
        if self.folder is not None:
            # Where no file will be written it need not exist.
            check = check_path if self.transport == "ipc" else check_folder
            object.__setattr__(self, "folder", check("folder", self.folder))


__all__ = ["NONFINITE", "SyncOptions"]
