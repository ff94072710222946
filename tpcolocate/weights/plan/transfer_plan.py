"""What a rank does in every sync of the same tensors: what is read in place, and what is staged, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch.distributed as dist

from tpcolocate.weights.plan.slices import TensorSlice, place

if TYPE_CHECKING:
    from tpcolocate.weights.transport.checksums import SumsInPlace


@dataclass(slots=True)
class Stage:
    """What is staged at once.

    Attributes:
        group: Among whose ranks parts are sent; None if all of them lie here.
        coming: Position in the group -> pieces that come from there.
        going: Position in the group -> pieces that go there.
        local: This rank's own pieces.
        num_coming: Bytes of staging memory of what comes, by position.
        num_going: Bytes of what goes, by position.
        num_bytes: Staging memory in all.
        is_sent: Whether any rank of the group sends anything; the all-to-all is left out otherwise.
    """

    group: dist.ProcessGroup | None
    coming: list[list[TensorSlice]] = field(default_factory=list)
    going: list[list[TensorSlice]] = field(default_factory=list)
    local: list[TensorSlice] = field(default_factory=list)
    num_coming: list[int] = field(default_factory=list)
    num_going: list[int] = field(default_factory=list)
    num_bytes: int = 0
    is_sent: bool = False

    def staged(self) -> list[tuple[TensorSlice, int]]:
        """Everything that this rank's worker copies out of the staging memory, and where it lies."""
        found: list[tuple[TensorSlice, int]] = []
        end = 0
        for pieces, size in zip([*self.coming, self.local], [*self.num_coming, 0]):
            found += zip(pieces, place(pieces, end)[0])
            end += size
        return found


@dataclass
class TransferPlan:
    """What this rank does in every sync of the same tensors.

    Attributes:
        key: Names the worker's programs.
        direct: Pieces that the worker copies out of mapped memory.
        steps: What is staged, one after the other.
        stage_bytes: Size of one half of the staging memory.
        send_bytes: Size of the memory that parts are sent from.
        in_place: Computes the sums of `direct`; made at the first sync.
    """

    key: str
    direct: list[TensorSlice]
    steps: list[Stage]
    stage_bytes: int
    send_bytes: int
    in_place: SumsInPlace | None = None

    @cached_property
    def direct_bytes(self) -> int:
        """What the worker copies out of mapped memory."""
        return sum(piece.num_bytes for piece in self.direct)

    @cached_property
    def programs(self) -> dict[str, list[TensorSlice]]:
        """What the worker runs, in order: its name, and the pieces whose sums it tells."""
        staged = {f"{self.key}/{i}": [piece for piece, _ in step.staged()] for i, step in enumerate(self.steps)}
        return {f"{self.key}/direct": self.direct, **staged}


__all__ = ["TransferPlan", "Stage"]
