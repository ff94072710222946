"""What the parts of an engine share: this rank's view of its slice's server, and the agreement of its ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tpcolocate.agreement import RankGroup
from tpcolocate.engine.client import Client
from tpcolocate.errors import RankLostError, TpColocateError
from tpcolocate.server.api import ServerApi
from tpcolocate.server.generation import GenerationHold
from tpcolocate.server.lifecycle import Lifecycle, State
from tpcolocate.server.process import ServerProcess
from tpcolocate.server.weight_updates import WeightUpdates
from tpcolocate.weights.sync.syncer import WeightSyncer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OwnedServer:
    """The owner's hold of its server.

    Attributes:
        process: The server itself.
        api: Its endpoints.
        generation: Pauses, cache and memory.
        updates: Updates of its weights.
    """

    process: ServerProcess
    api: ServerApi
    generation: GenerationHold
    updates: WeightUpdates

    @classmethod
    def of(cls, process: ServerProcess, api: ServerApi, lifecycle: Lifecycle) -> OwnedServer:
        generation = GenerationHold(api, lifecycle)
        return cls(process, api, generation, WeightUpdates(api, generation, lifecycle))


@dataclass(frozen=True, slots=True)
class SliceContext:
    """One rank's view of its slice's server.

    Attributes:
        group: The slice.
        world: All ranks of the job, if there are several slices.
        owner_rank: Global rank that owns the server.
        client: For requests of this rank.
        lifecycle: Of the engine.
        sync: This rank's end of the weight syncs.
        owned: The server; None on clients.
    """

    group: RankGroup
    world: RankGroup | None
    owner_rank: int
    client: Client
    lifecycle: Lifecycle
    sync: WeightSyncer
    owned: OwnedServer | None

    @property
    def state(self) -> State:
        return self.lifecycle.state

    @property
    def all_slices(self) -> RankGroup:
        """The ranks that the gathers of sharded weights may span: all slices, where a group of them exists."""
        return self.world if self.world is not None and len(self.world) > len(self.group) else self.group

    def on_owner(self, what: str, action: Callable[[OwnedServer], T], *, timeout_s: float = 0.0) -> T:
        """Run `action` on the owner; every rank of the slice returns or raises as it does."""
        self.state.check_open(what)
        owned = self.owned

        def act() -> T:
            assert owned is not None
            return action(owned)

        return self.group.run_on(self.owner_rank, act, what=what, timeout_s=timeout_s + self.group.timeout_s)

    def in_all_slices(self, what: str, action: Callable[[], T], *, timeout_s: float) -> T:
        """Run an action that this slice agrees on, and fail if it failed in another slice."""
        error: TpColocateError | None = None
        try:
            result = action()
        except TpColocateError as caught:
            error = caught
        if self.all_slices is not self.group and not isinstance(error, RankLostError):
            # A slice that failed must not leave the others to their next collective.
            self.all_slices.agree(error, what=what, timeout_s=timeout_s)
        if error is not None:
            raise error
        return result


__all__ = ["OwnedServer", "SliceContext"]
