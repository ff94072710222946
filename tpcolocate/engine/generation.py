"""Holding generation, ending it, and dropping its cache."""

from __future__ import annotations

from tpcolocate.engine.base import SliceClient
from tpcolocate.errors import ConfigError, EngineStateError


class GenerationCalls(SliceClient):
    """The calls of `Engine` that steer generation."""

    def pause_generation(self, mode: str = "retract", *, timeout_s: float = 120.0) -> None:
        """Hold generation until `continue_generation`; a sync in between leaves it held.

        New requests wait in the server.  Pausing again in the same mode does nothing.

        Collective: over the slice.

        Args:
            mode: What becomes of running requests.  ``"retract"``: they keep their tokens, give up their cache, and
                compute it anew when they go on.  ``"in_place"``: they keep both, and go on with a cache of the old
                weights after a sync.  ``"abort"``: they end with the tokens they have; the call returns once all have.
            timeout_s: For the request, in seconds.

        Raises:
            ConfigError: An unknown mode.
            EngineStateError: Paused in another mode, or the engine is shut down.
            RequestError, EngineDeadError, DeadlineError: The server failed.
        """
        with self._group.together("pause generation") as meant:
            meant["mode"] = mode
            after = self._state.pausing(mode)
        if after != self._state:
            self._on_owner(
                "pause generation",
                lambda: self._owned().pause_generation(mode, timeout_s=timeout_s),
                timeout_s=timeout_s,
            )
        self._state = after

    def continue_generation(self, *, timeout_s: float = 60.0) -> None:
        """Let generation go on after `pause_generation`; does nothing if it was not paused.

        Collective: over the slice.

        Raises:
            EngineStateError: Asleep, or the weights are not the trainer's.
            RequestError, EngineDeadError, DeadlineError: The server failed.
        """
        with self._group.together("continue generation"):
            after = self._state.continuing()
        if after != self._state:
            self._on_owner(
                "continue generation",
                lambda: self._owned().continue_generation(timeout_s=timeout_s),
                timeout_s=timeout_s,
            )
        self._state = after

    def abort_request(self, rid: str | None = None, *, timeout_s: float = 30.0) -> None:
        """End requests early; they answer with the tokens they have and the finish reason ``abort``.

        Not collective.  The server is only told: the requests end a little later.

        Args:
            rid: As passed to `generate`; SGLang takes it as a prefix.  Default: all requests of the server, those of
                other ranks too.
            timeout_s: For the request, in seconds.

        Raises:
            ConfigError: An empty `rid`.
            RequestError, EngineDeadError, DeadlineError: The server failed.
        """
        self._state.check_open("abort requests")
        if rid == "":
            raise ConfigError("rid is empty", hint="leave it out to abort all requests")
        body = {"abort_all": True} if rid is None else {"rid": rid}
        self._client.post("/abort_request", body, timeout_s=timeout_s)

    def flush_cache(self, *, timeout_s: float = 60.0) -> None:
        """Drop the prefix cache.

        Collective: over the slice.

        Raises:
            EngineStateError: Requests are in flight, or the cache's memory is released.
            RequestError, EngineDeadError, DeadlineError: The server failed.
        """
        with self._group.together("flush the cache"):
            if "kv_cache" in self._state.asleep:
                raise EngineStateError(
                    "cannot flush the cache while its memory is released", hint='call wake(["kv_cache"]) first'
                )
        self._on_owner("flush the cache", lambda: self._owned().flush_cache(timeout_s=timeout_s), timeout_s=timeout_s)


__all__ = ["GenerationCalls"]
