"""The end of an engine, and another server in place of one that has died."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from tpcolocate.deadline import Deadline
from tpcolocate.engine.context import SERVER_ENDS_S, ServerLink, SliceContext
from tpcolocate.errors import ConfigError, EngineError, TpColocateError, noted_on
from tpcolocate.groups import list_ranks
from tpcolocate.server.lifecycle import Life, State, can_answer

logger = logging.getLogger(__name__)

# What ranks have for their last meeting, however long the server took to end.
_LEAST_S = 1.0


class EngineLife:
    """The calls of `Engine` that end or replace its server; see there.

    Args:
        context: This rank's view of the server.
        on_shutdown: Called once, at the end of the engine.
        relaunch: Starts another server like the first, on all ranks, and returns this rank's end of it and its state.
        restarts: How often the engine restarts by itself.
    """

    def __init__(
        self,
        context: SliceContext,
        *,
        on_shutdown: Callable[[], None],
        relaunch: Callable[[], tuple[ServerLink, State]],
        restarts: int,
    ) -> None:
        self._context = context
        self._on_shutdown = on_shutdown
        self._relaunch = relaunch
        self._restarts_left = self._restarts = restarts
        self._pid = os.getpid()
        # Of one thread at a time, but a signal's handler may end what its own thread is about to end.
        self._lock = threading.RLock()
        self._met: set[str] = set()
        self._is_alone = False

    # --- the end -----------------------------------------------------------------------------------------------------

    def shut_down(self, *, wait: bool, timeout_s: float) -> None:
        """End the server and the engine; every step that an earlier call has not come to, or that was interrupted.

        Args:
            wait: For the other ranks.
            timeout_s: How long, in seconds.
        """
        lifecycle = self._context.lifecycle
        # A fork of the trainer (a data loader worker) inherits this object, not the engine.
        if lifecycle.state.life is Life.ENDED or os.getpid() != self._pid:
            return
        answers = can_answer(lifecycle.state)
        lifecycle.state = lifecycle.state.ending()
        if wait:
            self._meet("shut the engine down", timeout_s)
        problem: EngineError | None = None
        deadline = Deadline.after(timeout_s + SERVER_ENDS_S)
        with self._context.going_on():
            with self._lock:
                owned = self._context.owned
                if owned is not None:
                    try:
                        owned.process.stop(can_answer=answers)
                    except EngineError as error:
                        problem = error
            if wait:
                # Not before the server is gone: a counter that is set right while a process still reads would drop below
                # zero when that reader releases it.
                self._meet("end the server", deadline.left(at_least=_LEAST_S))
        with self._lock:
            if lifecycle.state.life is not Life.ENDED:
                self._context.server.disconnect(timeout_s=min(deadline.left(), SERVER_ENDS_S))
                lifecycle.state = lifecycle.state.ended()
                self._on_shutdown()
        if problem is not None:
            raise problem

    def _meet(self, what: str, timeout_s: float) -> None:
        """Wait for the other ranks, once; a wait that was interrupted is taken up again (see `Rounds.exchange`)."""
        if what in self._met or self._is_alone:
            return
        self._met.add(what)
        try:
            self._context.group.all_gather(None, what=what, timeout_s=timeout_s)
        except TpColocateError as error:  # or another thread is in a call that they will not come to
            self._is_alone = True
            logger.warning("shutting down without the others: %s", error)
        except BaseException:
            self._met.discard(what)
            raise

    # --- another server ----------------------------------------------------------------------------------------------

    def restart(self, *, with_source: bool, check: Callable[[], None]) -> None:
        """End the server if it still runs, and start another one like it in its place.

        Collective: over the slice.

        Args:
            with_source: Whether a sync follows; the same on all ranks.
            check: Raises if this rank's arguments cannot work, on all ranks, before anything has ended.

        Raises:
            TpColocateError: As `Engine.restart`.
        """
        context, lifecycle, what = self._context, self._context.lifecycle, "restart the server"
        with context.group.together(what) as must_match:
            must_match["source"] = "a source" if with_source else "no source"
            if os.getpid() != self._pid:
                raise ConfigError(f"cannot {what} in a forked process", hint="call it in the process that launched it")
            check()
            answers, after = can_answer(lifecycle.state), lifecycle.state.restarting()
        lifecycle.state = after  # no request from here on
        with context.going_on():
            with context.group.together("end the old server"), self._lock:
                if context.owned is not None:
                    context.owned.process.stop(can_answer=answers)
            # Once it is gone on all ranks, as in a shutdown.
            context.server.disconnect()
            link, state = self._relaunch()
            try:
                with context.group.together(what):
                    self._take(link)
            except BaseException as error:
                with noted_on(error):
                    self._end(link)
                raise
        lifecycle.state = lifecycle.state.restarted(state)  # not before all ranks have it

    def _take(self, link: ServerLink) -> None:
        with self._lock:
            if self._context.state.closed:  # by another thread meanwhile, which has not seen this server
                self._context.state.check_open("restart the server")
            self._context.server = link

    def _end(self, link: ServerLink) -> None:
        with self._lock:
            try:
                if link.owned is not None:
                    link.owned.process.stop()
            finally:
                link.disconnect()

    def must_restart(self, what: str) -> bool:
        """Return whether the engine is to restart by itself before a call, because its server is dead.

        Collective: over the slice, if the engine was launched to restart by itself.  The owner alone counts, and is asked
        also when none is left: a rank that was interrupted here would have another count, and make other calls from then on.

        Args:
            what: The call.
        """
        context, state = self._context, self._context.state
        if self._restarts == 0 or state.closed:
            return False
        owned = context.owned

        def is_due() -> bool:
            return owned is not None and self._restarts_left > 0 and owned.is_dead

        if not context.group.run_on(context.owner_rank, is_due, what=f"{what}: look at the server"):
            return False
        if owned is not None:
            self._restarts_left -= 1
            logger.warning(
                "the server of ranks %s was found dead before %r: restart %d of %d; generate is refused until a full sync",
                list_ranks(context.group.ranks),
                what,
                self._restarts - self._restarts_left,
                self._restarts,
            )
        return True


__all__ = ["EngineLife"]
