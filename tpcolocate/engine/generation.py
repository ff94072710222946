"""Pausing generation, ending it, and dropping its cache."""

from __future__ import annotations

import logging
from collections.abc import Callable

from tpcolocate.checks import check_text
from tpcolocate.deadline import check_timeout
from tpcolocate.engine.context import OwnedServer, SliceContext
from tpcolocate.errors import ConfigError, EngineStateError, RankLostError
from tpcolocate.server.lifecycle import State

logger = logging.getLogger(__name__)

_MAX_RID = 2**16


class GenerationControl:
    """The calls of `Engine` that control generation; see there."""

    def __init__(self, context: SliceContext) -> None:
        self._context = context

    def pause(self, mode: str, *, timeout_s: float) -> None:
        context, what = self._context, "pause generation"
        with context.group.together(what) as must_match:
            timeout_s = check_timeout(timeout_s)
            after = context.state.pausing(mode)
            must_match["mode"] = mode

        def act(owned: OwnedServer) -> None:
            owned.api.pause_generation(mode, timeout_s=timeout_s)
            if mode == "in_place":
                _warn_of_watchdog(owned.api.info.get("watchdog_timeout"))

        self._change(what, after, act, timeout_s=timeout_s)

    def go_on(self, *, timeout_s: float) -> None:
        context, what = self._context, "continue generation"
        with context.group.together(what):
            timeout_s = check_timeout(timeout_s)
            after = context.state.continuing()
        self._change(
            what, after, lambda owned: owned.generation.continue_generation(timeout_s=timeout_s), timeout_s=timeout_s
        )

    def _change(self, what: str, after: State, act: Callable[[OwnedServer], None], *, timeout_s: float) -> None:
        """Have the owner act, unless the state is what it is to be.

        Whether it is may differ between the ranks, as one may have been interrupted here.  So all come to the owner's action,
        and only an error of that leaves the state as it was: an interrupt of another rank does not keep the owner from it.
        """
        context, before = self._context, self._context.state
        context.lifecycle.state = after

        def act_once(owned: OwnedServer) -> None:
            if after != before:
                act(owned)

        try:
            context.on_owner(what, act_once, timeout_s=timeout_s)
        except BaseException as error:
            if context.group.has_shared_error and not isinstance(error, RankLostError):
                context.lifecycle.state = before
            raise

    def abort(self, rid: str | None, *, timeout_s: float) -> None:
        self._context.state.check_open("abort requests")
        timeout_s = check_timeout(timeout_s)
        if isinstance(rid, str) and not rid:
            raise ConfigError("rid is empty", hint="leave it out to abort all requests")
        if rid is not None:
            check_text("rid", rid, max_length=_MAX_RID)
        body = {"abort_all": True} if rid is None else {"rid": rid}
        self._context.client.http.post("/abort_request", body, timeout_s=timeout_s)

    def flush_cache(self, *, timeout_s: float) -> None:
        context, what = self._context, "flush the cache"
        with context.group.together(what):
            timeout_s = check_timeout(timeout_s)
            if "kv_cache" in context.state.asleep:
                raise EngineStateError(
                    "cannot flush the cache while its memory is released", hint='call wake(["kv_cache"]) first'
                )
        context.on_owner(what, lambda owned: owned.generation.flush_cache(timeout_s=timeout_s), timeout_s=timeout_s)

    def warn_of_stale_cache(self) -> str | None:
        """Return, and log, a warning if the last sync could not drop the cache; only a pause in place can keep it.

        Collective: over the slice.
        """
        if self._context.state.paused != "in_place":
            return None
        if not self._context.on_owner("look at the state of the cache", lambda owned: owned.generation.cache_is_stale):
            return None
        text = "requests paused in place go on with the cache of the old weights, and others may meet it too, until flush_cache()"
        logger.warning("%s", text)
        return text


def _warn_of_watchdog(seconds: object) -> None:
    """SGLang counts forwards while it has a batch, which requests paused in place remain."""
    if isinstance(seconds, (int, float)):
        logger.warning(
            "requests paused in place end the server after %g s without a forward, by SGLang's watchdog: "
            "continue_generation() before, or pause with another mode, or launch(watchdog_timeout=...)",
            seconds,
        )


__all__ = ["GenerationControl"]
