"""What every call of an engine stands on: this rank's view of its slice's server, and the agreement of its ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tpcolocate.agreement import RankGroup
from tpcolocate.engine.client import Client
from tpcolocate.server.api import ServerApi
from tpcolocate.server.lifecycle import State
from tpcolocate.server.lifecycle import Weights as EngineWeights
from tpcolocate.server.process import ServerProcess
from tpcolocate.weights.sync.syncer import WeightSync

logger = logging.getLogger(__name__)


class SliceClient(Client):
    """One rank's end of its slice's server.

    Args:
        group: The slice.
        owner_rank: Global rank that owns the server.
        url: Base URL.
        api_key: Random key of this launch.
        state: What the server was started with.
        sync: This rank's end of the weight syncs.
        verbs: Owner only.
        server: Owner only.
        on_shutdown: Called once, after the server is gone (owner) or let go (client).
        world: All ranks of the job, if there are several slices.
        sglang_version: As the server reports it.
        model_path: What the server serves.
        weight_version: As the server reports it.
    """

    def __init__(
        self,
        *,
        group: RankGroup,
        owner_rank: int,
        url: str,
        api_key: str,
        state: State,
        sync: WeightSync,
        world: RankGroup | None,
        verbs: ServerApi | None,
        server: ServerProcess | None,
        on_shutdown: Callable[[], None],
        sglang_version: str,
        model_path: str,
        weight_version: str,
    ) -> None:
        super().__init__(url, api_key=api_key)
        self.sglang_version = sglang_version
        self.model_path = model_path
        self.weight_version = weight_version
        self._group = group
        self._world = world
        self._owner_rank = owner_rank
        self._state = state
        self._sync = sync
        self._verbs = verbs
        self._server = server
        self._on_shutdown = on_shutdown
        self._num_syncs = count_in(weight_version)
        self._before = state
        self._pid = os.getpid()

    def _check_generate(self) -> None:
        self._state.check_generate()

    def _owned(self) -> ServerApi:
        assert self._verbs is not None
        return self._verbs

    def _on_owner(self, what: str, action: Callable[[], None], *, timeout_s: float) -> None:
        """The owner acts; every rank returns or raises as it does."""
        self._state.check_open(what)
        self._group.run_on(self._owner_rank, action, what=what, timeout_s=timeout_s + self._group.timeout_s)

    def _stale_cache(self) -> str | None:
        """What a sync could not drop; only possible if the user has paused in place."""
        if self._state.paused != "in_place":
            return None
        stale = self._group.run_on(
            self._owner_rank, lambda: self._owned().cache_is_stale, what="ask for the state of the cache"
        )
        if not stale:
            return None
        text = "requests paused in place go on with the cache of the old weights, and others may meet it too, until flush_cache()"
        logger.warning("%s", text)
        return text

    def _next_version(self, version: str | None) -> str:
        self._num_syncs = self._num_syncs + 1 if version is None else count_in(version, self._num_syncs + 1)
        return str(self._num_syncs) if version is None else version

    def _published(self, version: str, *, partial: bool) -> None:
        self._state = self._before.synced(partial=partial)
        self.weight_version = version
        if self._verbs is not None:
            self._verbs.weights_unknown = self._state.weights is not EngineWeights.CURRENT

    @property
    def _everybody(self) -> RankGroup:
        """Whom the gathers of sharded weights may span: all slices, as far as a group of them exists."""
        several = self._world is not None and len(self._world) > len(self._group)
        return self._world if self._world is not None and several else self._group

    @contextmanager
    def _changing_weights(self) -> Iterator[Callable[[], None]]:
        """The length of a sync or update that ends with `_published`, or leaves the weights unknown.

        Yields:
            To be called before the first byte may change in the engine.
        """

        def touched() -> None:
            self._before = self._state
            self._state = self._state.syncing()
            if self._verbs is not None:
                self._verbs.weights_unknown = True

        try:
            yield touched
        finally:
            self._state = self._state.sync_over()


def count_in(version: str, otherwise: int = 0) -> int:
    """The number that a weight version is, so that the count goes on from it."""
    return int(version) if version.isdecimal() and version.isascii() else otherwise


__all__ = ["SliceClient", "count_in"]
