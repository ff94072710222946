"""Releasing the server's memory, and taking it back."""

from __future__ import annotations

from collections.abc import Collection

from tpcolocate.deadline import check_timeout
from tpcolocate.engine.context import OwnedServer, SliceContext
from tpcolocate.errors import ConfigError, EngineStateError


class ServerMemory:
    """The calls of `Engine` that release memory and take it back, `sleep` and `wake`; see there."""

    def __init__(self, context: SliceContext) -> None:
        self._context = context

    def sleep(self, tags: Collection[str] | None, *, timeout_s: float) -> None:
        context, lifecycle = self._context, self._context.lifecycle
        try:
            with context.group.together("sleep", timeout_s=_waiting(timeout_s)) as must_match:
                timeout_s = check_timeout(timeout_s)
                chosen, after = lifecycle.state.sleeping(tags)
                must_match["tags"] = None if tags is None else sorted(tags)
                if not after.frees_memory:
                    raise EngineStateError(
                        "sleep() would free nothing: the server was launched without enable_memory_saver",
                        hint="pass enable_memory_saver=True to launch(), or do without sleep() and wake()",
                    )
                lifecycle.state = after  # before requests are looked for: see `Client`
                if chosen and context.client.num_in_flight:
                    raise EngineStateError(
                        f"cannot sleep: {context.client.num_in_flight} requests of rank {context.group.rank} are in flight",
                        hint="wait for the answers of generate() on this rank first, or end them with engine.abort_request(); a "
                        "stream that is not read to its end is in flight until its close()",
                    )

            def act(owned: OwnedServer) -> None:
                if chosen:
                    owned.generation.release_memory(chosen, timeout_s=timeout_s)

            with context.going_on():
                context.sync.call_back(timeout_s=timeout_s)
                context.on_owner("sleep", act, timeout_s=timeout_s)
            lifecycle.state = lifecycle.state.slept()
        finally:
            lifecycle.state = lifecycle.state.sleep_over()

    def wake(self, tags: Collection[str] | None, *, timeout_s: float) -> None:
        context = self._context
        with context.group.together("wake", timeout_s=_waiting(timeout_s)) as must_match:
            timeout_s = check_timeout(timeout_s)
            chosen, after = context.lifecycle.state.waking(tags)
            must_match["tags"] = None if tags is None else sorted(tags)

        def act(owned: OwnedServer) -> None:
            if chosen:
                owned.generation.resume_memory(chosen, after, timeout_s=timeout_s)

        with context.going_on():
            context.sync.call_back(timeout_s=timeout_s)
            context.on_owner("wake", act, timeout_s=timeout_s)
        context.lifecycle.state = after


def _waiting(timeout_s: object) -> float | None:
    """Return how long to wait for the other ranks: as long as usual with a timeout that all of them are to refuse."""
    try:
        return check_timeout(timeout_s)
    except ConfigError:
        return None


__all__ = ["ServerMemory"]
