"""Holding generation on a server, for syncs and for sleep, beside the user's own pause."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tpcolocate.deadline import Deadline
from tpcolocate.errors import DeadlineError, EngineStateError, RequestError
from tpcolocate.server.api import ServerApi
from tpcolocate.server.lifecycle import Lifecycle, State

_IDLE_POLL_S = 0.05
# An action that follows on another gets this long, however little the other has left.
LEAST_S = 1.0


class GenerationHold:
    """What the owner has asked of its server's generation, cache and memory.

    The user's pause is not kept here but in `State.paused`; a sync or sleep leaves it as it is.

    Args:
        api: Of the server.
        lifecycle: Of the engine.

    Attributes:
        paused_for_sleep: Whether generation is paused because memory is released, or was and the weights are not back.
        cache_is_stale: Whether a sync had to leave cache entries of older weights in place.
        released: Tags of the memory that the server has released.  `State` has what all ranks have seen of that: after a
            `sleep` or `wake` that another rank left in the middle, as by Ctrl-C, it may be behind.
    """

    def __init__(self, api: ServerApi, lifecycle: Lifecycle) -> None:
        self._api = api
        self._lifecycle = lifecycle
        self.paused_for_sleep = False
        self.cache_is_stale = False
        self.released: frozenset[str] = frozenset()

    def hold(self, mode: str, *, timeout_s: float) -> bool:
        """Pause generation unless the user has, or it is paused for sleep; return whether it was done now."""
        if self._lifecycle.state.paused is not None or self.paused_for_sleep:
            return False
        self._api.pause_generation(mode, timeout_s=timeout_s)
        return True

    def continue_if_allowed(self, state: State, *, timeout_s: float, sent: Callable[[], None] | None = None) -> None:
        """Let generation go on unless the user has paused it, memory is released, or the weights are not the trainer's.

        Args:
            state: Of the engine once the action in progress has succeeded.
            timeout_s: In seconds.
            sent: Called once the request has left.
        """
        if state.lets_generate and not self.released:
            self.continue_generation(timeout_s=timeout_s, sent=sent)

    def continue_generation(self, *, timeout_s: float, sent: Callable[[], None] | None = None) -> None:
        """End a pause, the user's too.  Arguments as `continue_if_allowed`."""
        self._api.continue_generation(timeout_s=timeout_s, sent=sent)
        self.paused_for_sleep = False

    def drop_old_cache(self, *, timeout_s: float, sent: Callable[[], None] | None = None) -> None:
        """Drop the cache before a sync, while generation is held.

        Args:
            timeout_s: In seconds.
            sent: Called once the request has left.

        Raises:
            EngineStateError: The server keeps it for requests that wait, and the user has not paused ``in_place``.
        """
        self.cache_is_stale = not self._api.drop_cache(timeout_s=timeout_s, sent=sent)
        if self.cache_is_stale and self._lifecycle.state.paused != "in_place":
            raise EngineStateError(
                f"cannot sync weights: SGLang {self._api.release.version} keeps the cache of the old ones while requests wait in it",
                hint='wait for the answers of generate() first, or end them with engine.pause_generation(mode="abort")',
                url=self._api.client.url,
            )

    def flush_cache(self, *, timeout_s: float) -> None:
        """Drop the prefix cache.

        Raises:
            EngineStateError: Requests are in flight.
        """
        if not self._api.drop_cache(timeout_s=timeout_s):
            raise EngineStateError(
                "cannot flush the cache: requests are in flight",
                hint="wait for them, or abort_request() and try again",
                url=self._api.client.url,
            )
        self.cache_is_stale = False

    def release_memory(self, tags: Sequence[str], *, timeout_s: float) -> None:
        """Release memory once no request runs; later ones wait in the server until all memory is back.

        What is released already stays so: SGLang would end with an assertion.

        Raises:
            DeadlineError: Requests still run.
        """
        tags = [tag for tag in tags if tag not in self.released]
        if not tags:
            return
        deadline = Deadline.after(timeout_s)
        self._wait_until_idle(deadline)
        # With ``abort`` new requests wait where they are taken in, and the scheduler stays idle.  One that came since
        # ends early: to release memory under it would end the server.
        if self.hold("abort", timeout_s=deadline.left(at_least=LEAST_S)):
            self.paused_for_sleep = True
        try:
            self._api.release_memory(tags, timeout_s=deadline.left(at_least=LEAST_S))
        except RequestError:
            if self.paused_for_sleep:
                self.continue_if_allowed(self._lifecycle.state, timeout_s=deadline.left(at_least=LEAST_S))
            raise
        self.released |= set(tags)

    def resume_memory(self, tags: Sequence[str], after: State, *, timeout_s: float) -> None:
        """Resume memory, and let generation go on if the state permits it then.

        Args:
            tags: What to resume; what has not been released is left as it is.
            after: The state of the engine once that is done.  If it has lost its weights, a sync lets generation go on.
            timeout_s: In seconds.
        """
        deadline = Deadline.after(timeout_s)
        released = [tag for tag in tags if tag in self.released]
        if released:
            self._api.resume_memory(released, timeout_s=timeout_s)
            self.released -= set(released)
        if self.paused_for_sleep:
            self.continue_if_allowed(after, timeout_s=deadline.left(at_least=LEAST_S))

    def check_weights(self) -> None:
        """Check that there is memory that a sync can write to.

        Raises:
            EngineStateError: It is released, by a `sleep` that a rank left in the middle.
        """
        if "weights" in self.released and "weights" not in self._lifecycle.state.not_awake:
            raise EngineStateError(
                "cannot sync weights: the server has released their memory, in a sleep() that one rank left before its end",
                hint="call sleep() again on every rank, then wake()",
                url=self._api.client.url,
            )

    def _wait_until_idle(self, deadline: Deadline) -> None:
        while not self._api.drop_cache(timeout_s=deadline.left(at_least=LEAST_S)):
            if deadline.has_passed:
                raise DeadlineError(
                    f"cannot sleep: requests still run after {deadline.timeout_s:g} s (timeout_s of sleep())",
                    hint="wait for the answers of generate() on all ranks and in connected processes first, or end them with "
                    "engine.abort_request()",
                    url=self._api.client.url,
                )
            time.sleep(_IDLE_POLL_S)
        self.cache_is_stale = False


__all__ = ["LEAST_S", "GenerationHold"]
