"""The way to the TP workers, taken in a thread of its own: it is waiting for the server, and the weights can be prepared meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import wait
from pathlib import Path

from tpcolocate import ipc_payload
from tpcolocate.errors import EngineDeadError, SyncError, TpColocateError
from tpcolocate.in_server.tpcolocate_receiver.protocol import Reply
from tpcolocate.parallel import in_background, quick_switching
from tpcolocate.weights.transport.bucket_sender import WeightServer, Workers
from tpcolocate.worker_errors import raise_worker_errors

logger = logging.getLogger(__name__)

# From the workers' greeting to the answer of a flush that they took up before it: the way back through SGLang's loop, and
# the turn of our thread.  Where it takes longer for once, the workers are reached a second time, and nothing else.
_ANSWER_S = 0.25

Greetings = dict[int, Reply]
"""TP rank -> what its receiver said when it came."""


class WorkerConnection:
    """Holds generation and reaches the receivers, from now on.

    Args:
        server: The engine.
        folder: Where the socket is to be; private to this user.
        loader: Dotted name of the receiver.
        tp_size: Number of workers; 0 if none is to be reached (``transport="stock"``).
        timeout_s: For the whole sync, in seconds.
    """

    def __init__(self, server: WeightServer, *, folder: Path, loader: str, tp_size: int, timeout_s: float) -> None:
        self.session = ipc_payload.new_session()
        self.workers: Workers | None = None
        self._server = server
        self._folder = folder
        self._loader = loader
        self._tp_size = tp_size
        self._deadline = time.monotonic() + timeout_s
        self._lock = threading.Lock()
        self._is_closed = False
        self._task = in_background(self._open, name="tpcolocate open")

    def _open(self) -> Greetings | None:
        with quick_switching():  # the trainer's thread computes beside these requests
            # Beside the pause, whose error counts: a server that is gone takes the folder with it.
            awaited = in_background(self._await, name="tpcolocate socket") if self._tp_size else None
            dropped = self._server.hold_generation(timeout_s=self._left())
            greetings = None if awaited is None else self._reach(awaited.result())
            if greetings is not None and not wait([dropped], min(_ANSWER_S, self._left())).done:
                # The workers hold the update; what came behind it is not taken up before they have left.
                logger.debug("SGLang took up the weight update before the flush: the workers are reached once more")
                self._let_go()
                dropped.result()
                greetings = self._reach(self._await())
            dropped.result()
        return greetings

    def _await(self) -> Workers:
        """Be there for the workers."""
        workers = self._server.await_workers(self._folder / f"{self.session}.sock", tp_size=self._tp_size)
        with self._lock:
            self.workers = workers
            if self._is_closed:  # nobody waits for them any more
                workers.close()
        return workers

    def _reach(self, workers: Workers) -> Greetings:
        """Call the workers, and wait for all of them."""
        with self._lock:
            if self._is_closed:
                raise SyncError("the weight sync was given up before the workers were called")
        self._server.call_workers(
            workers, self.session, loader=self._loader, tp_size=self._tp_size, timeout_s=self._left()
        )
        greetings = workers.greet(timeout_s=self._left())
        raise_worker_errors(greetings, "could not open the weight sync")
        return greetings

    def _let_go(self) -> None:
        with self._lock:  # `close` may act on the same workers
            assert self.workers is not None
            self.workers.finish()
            self.workers = None
        self.session = ipc_payload.new_session()  # the receiver holds none twice

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)

    def result(self) -> Greetings | None:
        """Wait for the workers; None if none was to be reached.

        Raises:
            TpColocateError: Generation could not be held, the cache not dropped, or not all workers came.
        """
        return self._task.result()

    def close(self, *, timeout_s: float) -> None:
        """Let the workers go; those that are still on their way after `timeout_s` find nobody, and those not called are not."""
        wait([self._task], timeout_s)
        with self._lock:
            self._is_closed = True
            if self.workers is not None:
                self.workers.close()

    def cancel(self, *, timeout_s: float) -> None:
        """`close`, and have the engine go on with the weights it has; what cannot be told to it any more is logged."""
        self.close(timeout_s=timeout_s)
        if self._task.done() and isinstance(self._task.exception(), EngineDeadError):
            return  # nobody is there to be told; after a mere deadline there is, and it would stay paused
        try:
            self._server.cancel_sync(timeout_s=timeout_s)
        except TpColocateError as error:
            logger.warning("the engine could not be told to go on: %s", error)


__all__ = ["Greetings", "WorkerConnection"]
