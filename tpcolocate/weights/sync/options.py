"""How weights are moved, as the caller of a sync may choose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tpcolocate.errors import ConfigError
from tpcolocate.weights.sources.named_weights import Rename
from tpcolocate.weights.transport.bucket_sender import PAYLOADS, TRANSPORTS


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
    """

    bucket_bytes: int = 512 * 2**20
    payloads: str = "per_rank"
    transport: str = "auto"
    partial: bool = False
    folder: Path | None = None
    rename: Rename | None = None
    parts: bool = True

    def __post_init__(self) -> None:
        if self.bucket_bytes <= 0:
            raise ConfigError(f"bucket_bytes must be positive, got {self.bucket_bytes}")
        if self.payloads not in PAYLOADS:
            raise ConfigError(f"payloads={self.payloads!r} is unknown", hint=f"one of {', '.join(PAYLOADS)}")
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"transport={self.transport!r} is unknown", hint=f"one of {', '.join(TRANSPORTS)}")


__all__ = ["SyncOptions"]
