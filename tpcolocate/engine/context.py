"""What the parts of an engine share: this rank's view of its slice's server, and the agreement of its ranks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from tpcolocate.agreement import RankGroup
from tpcolocate.engine.client import Client
from tpcolocate.errors import ConfigError, RankLostError, TpColocateError
from tpcolocate.ipc_payload import listed
from tpcolocate.server.api import ServerApi
from tpcolocate.server.generation import GenerationHold
from tpcolocate.server.lifecycle import Lifecycle, State
from tpcolocate.server.process import ServerProcess
from tpcolocate.server.weight_updates import WeightUpdates
from tpcolocate.weights.sync.syncer import WeightSyncer

T = TypeVar("T")

logger = logging.getLogger(__name__)

# SIGTERM, a bounded wait, SIGKILL: see ServerProcess.stop.
SERVER_ENDS_S = 40.0
_LISTENS_S = 5.0


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

    @property
    def is_dead(self) -> bool:
        """Whether the process has exited, or does not answer, twice: a busy one may be late once."""
        client = self.api.client
        return self.process.exited() or not any(client.is_listening(timeout_s=_LISTENS_S) for _ in range(2))


@dataclass(frozen=True, slots=True)
class ServerLink:
    """One rank's end of one server process; a restart replaces it as a whole.

    Attributes:
        client: For requests of this rank.
        sync: This rank's end of the weight syncs.
        owned: The server; None on clients.
        sglang_version: As the server reports it.
        release: Removes what else is left of the server, once it is gone.
        serves_adapters: Whether it was started for LoRA.
        restore_files: Makes anew what something else has removed of the launch's folder in /dev/shm.
    """

    client: Client
    sync: WeightSyncer
    owned: OwnedServer | None
    sglang_version: str
    release: Callable[[], None]
    serves_adapters: bool = True
    restore_files: Callable[[], None] = lambda: None

    def disconnect(self, *, timeout_s: float = SERVER_ENDS_S) -> None:
        """Close the connections to a server that has ended, or is about to, and take back what it did not release.

        Args:
            timeout_s: How long a client waits for its end, where there is memory that it might still read.
        """
        self.client.close()
        lost = self.sync.close(timeout_s=0.0 if self.owned is not None else timeout_s)
        if lost:
            logger.warning("reclaimed handles that the engine never released: %s", listed(lost))
        self.release()


@dataclass(slots=True)
class SliceContext:
    """One rank's view of its slice's server.

    Attributes:
        group: The slice.
        world: All ranks of the job, if there are several slices.
        owner_rank: Global rank that owns the server.
        lifecycle: Of the engine.
        server: The server that runs now.  Only a restart replaces it.
        call_lock: Of the thread of this rank that is in a collective call.  Such a call may make another one, as a restart does,
            and so may the handler of a signal.
        current_call: Which one it is.
    """

    group: RankGroup
    world: RankGroup | None
    owner_rank: int
    lifecycle: Lifecycle
    server: ServerLink
    call_lock: threading.RLock = field(default_factory=threading.RLock)
    current_call: str = ""

    @property
    def client(self) -> Client:
        return self.server.client

    @property
    def sync(self) -> WeightSyncer:
        return self.server.sync

    @property
    def owned(self) -> OwnedServer | None:
        return self.server.owned

    @property
    def state(self) -> State:
        return self.lifecycle.state

    @property
    def all_slices(self) -> RankGroup:
        """The ranks that the gathers of sharded weights may span: all slices, where a group of them exists."""
        return self.world if self.world is not None and len(self.world) > len(self.group) else self.group

    @contextmanager
    def calling(self, what: str) -> Iterator[None]:
        """The body is a collective call of the engine.

        Also in a slice of one rank, which has none to agree with: calls of two threads would meet in the server, such as two syncs
        in one session, or a sleep in the middle of a sync.

        Raises:
            ConfigError: Another thread of this rank is in one.
        """
        if not self.call_lock.acquire(blocking=False):
            raise ConfigError(
                f"cannot {what}: another thread of this rank is in the collective call {self.current_call!r}",
                hint="make collective calls from one thread; generate() may be called from any",
                rank=self.group.rank,
            )
        outer = self.current_call
        try:
            self.current_call = what
            yield
        finally:
            self.current_call = outer
            self.call_lock.release()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """The rest of a call, after its first step; see `RankGroup.going_on`."""
        with ExitStack() as stack:
            for group in dict.fromkeys((self.all_slices, self.group)):
                stack.enter_context(group.going_on())
            yield

    def on_owner(self, what: str, action: Callable[[OwnedServer], T], *, timeout_s: float = 0.0) -> T:
        """Run `action` on the owner, past the first step of a call; every rank of the slice returns or raises as it does."""
        self.state.check_open(what)
        owned = self.owned

        def act() -> T:
            assert owned is not None
            return action(owned)

        with self.group.going_on():
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


__all__ = ["SERVER_ENDS_S", "OwnedServer", "ServerLink", "SliceContext"]
