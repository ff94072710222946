"""The connection to the TP workers for the length of one sync.

On the owner it is opened in a thread of its own, because it waits for the server and the weights can be prepared
meanwhile.  On the other ranks it is a null object, so that the phases of a sync are the same on every rank.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Protocol

from tpcolocate import ipc_payload
from tpcolocate.deadline import Deadline
from tpcolocate.errors import EngineDeadError, SyncError, TpColocateError
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, Reply
from tpcolocate.parallel import in_background
from tpcolocate.worker_errors import raise_worker_errors

logger = logging.getLogger(__name__)

# However little time is left, a server that still runs is asked to go on.
_LEAST_S = 0.5

# From the workers' greeting to the answer of a flush that they took up before it: the way back through SGLang's loop, and
# the turn of our thread.  Where it takes longer for once, the workers are reached a second time, and nothing else.
_ANSWER_S = 0.25

Replies = Mapping[int, Reply]
"""TP rank -> what its receiver replied."""


class Workers(Protocol):
    """The receivers in the TP workers, for the length of a sync: a `server.channel.Channel`."""

    def greet(self, *, timeout_s: float) -> dict[int, Reply]: ...
    def post(self, commands: Mapping[int, Addressed], number: int) -> None: ...
    def collect(self, number: int, *, timeout_s: float) -> dict[int, Reply]: ...
    def dismiss(self) -> None: ...
    def finish(self, *, timeout_s: float) -> None: ...
    def close(self, *, timeout_s: float) -> None: ...


class WeightServer(Protocol):
    """What a sync needs of the engine; used on the owner only."""

    def hold_generation(self, *, timeout_s: float) -> Future[None]: ...
    def cancel_sync(self, *, timeout_s: float) -> None: ...
    def push(self, payloads: Sequence[str], *, load_format: str, timeout_s: float) -> None: ...
    def await_workers(self, path: Path, *, tp_size: int) -> Workers: ...
    def call_workers(self, workers: Any, session: str, *, loader: str, tp_size: int, timeout_s: float) -> None: ...
    def end_sync(self, version: str, *, workers: Workers | None = None, timeout_s: float) -> None: ...


class WorkerConnection:
    """The null object of ranks that do not own the server."""

    session = ""
    """Name of the sync's session, which keeps the files of different syncs apart."""

    def open(self) -> None:
        """Begin to hold generation and to reach the receivers, if that has not begun."""

    def wait(self) -> Replies | None:
        """Wait for the workers' greetings.

        Raises:
            TpColocateError: Generation could not be held, the cache not dropped, or not all workers came.
        """
        return None

    def post(self, commands: Mapping[int, Addressed], number: int) -> None:
        """Send a command to each TP rank."""

    def collect(self, number: int, *, timeout_s: float) -> Replies:
        """Wait for the replies to a command."""
        return {}

    def leave(self) -> None:
        """Let the workers go, and wait until SGLang has answered."""

    def end(self, version: str, *, timeout_s: float) -> None:
        """Let the workers go if they are still here, publish the version, and let generation go on."""

    def mark_engine_modified(self) -> None:
        """From here on weights may have changed, and an abandoned sync leaves generation held."""

    def abandon(self, *, timeout_s: float) -> None:
        """Let the workers go after a failure; an engine that was not modified goes on with the weights it has.

        Workers that are still on their way after `timeout_s` find no socket.
        """


class OwnerConnection(WorkerConnection):
    """The connection on the rank that owns the server.

    Args:
        server: The engine.
        folder: For the socket; private to this user.
        loader: Dotted name of the receiver.
        tp_size: Number of workers.
        deadline: Of the sync.
    """

    def __init__(self, server: WeightServer, *, folder: Path, loader: str, tp_size: int, deadline: Deadline) -> None:
        self._server = server
        self._folder = folder
        self._loader = loader
        self._tp_size = tp_size
        self._deadline = deadline
        self._workers: Workers | None = None
        self._lock = threading.Lock()
        self._has_left = False
        self._is_closed = False
        self._is_engine_modified = False
        self._opening: Future[Replies] | None = None

    def open(self) -> None:
        if self._opening is None:
            self.session = ipc_payload.new_session()
            self._opening = in_background(self._open, name="tpcolocate open")

    def _open(self) -> Replies:
        # Beside the pause, whose error counts: a server that is gone takes the folder with it.
        awaited = in_background(self._await_workers, name="tpcolocate socket")
        dropped = self._server.hold_generation(timeout_s=self._left())
        greetings = self._reach(awaited.result())
        if not wait([dropped], min(_ANSWER_S, self._left())).done:
            # The workers are inside the update; what came behind it is not taken up before they have left.
            logger.debug("SGLang took up the weight update before the flush: the workers are reached once more")
            self._let_go()
            dropped.result()
            greetings = self._reach(self._await_workers())
        dropped.result()
        return greetings

    def _await_workers(self) -> Workers:
        """Bind the socket that the workers will connect to."""
        workers = self._server.await_workers(self._folder / f"{self.session}.sock", tp_size=self._tp_size)
        with self._lock:
            self._workers = workers
            if self._is_closed:  # abandoned meanwhile
                workers.close(timeout_s=0.0)
        return workers

    def _reach(self, workers: Workers) -> Replies:
        """Call the workers, and wait for all of them."""
        with self._lock:
            if self._is_closed:
                raise SyncError("the weight sync was given up before the workers were called")
        self._server.call_workers(
            workers, self.session, loader=self._loader, tp_size=self._tp_size, timeout_s=self._left()
        )
        greetings = workers.greet(timeout_s=self._left())
        raise_worker_errors(greetings, "a TP worker refused the weight sync")
        return greetings

    def _let_go(self) -> None:
        with self._lock:  # `abandon` may act on the same workers
            assert self._workers is not None
            self._workers.finish(timeout_s=self._left())
            self._workers = None
        self.session = ipc_payload.new_session()  # the receiver takes none twice

    def _left(self) -> float:
        return self._deadline.left(at_least=0.001)

    def wait(self) -> Replies:
        assert self._opening is not None
        return self._opening.result()

    def post(self, commands: Mapping[int, Addressed], number: int) -> None:
        assert self._workers is not None
        self._workers.post(commands, number)

    def collect(self, number: int, *, timeout_s: float) -> Replies:
        assert self._workers is not None
        return self._workers.collect(number, timeout_s=timeout_s)

    def leave(self) -> None:
        if not self._has_left and self._workers is not None:
            self._has_left = True
            self._workers.finish(timeout_s=self._deadline.left(at_least=_LEAST_S))

    def end(self, version: str, *, timeout_s: float) -> None:
        workers = None if self._has_left else self._workers
        self._has_left = True
        self._server.end_sync(version, workers=workers, timeout_s=timeout_s)

    def mark_engine_modified(self) -> None:
        self._is_engine_modified = True

    def abandon(self, *, timeout_s: float) -> None:
        if self._opening is None:
            return
        deadline = Deadline.after(timeout_s)
        wait([self._opening], deadline.left())
        with self._lock:
            self._is_closed = True
            if self._workers is not None:
                self._workers.close(timeout_s=deadline.left())
        if self._is_engine_modified:
            return
        if self._opening.done() and isinstance(self._opening.exception(), EngineDeadError):
            return  # there is no server to go on; after a mere deadline there is, and it would stay paused
        try:
            self._server.cancel_sync(timeout_s=deadline.left(at_least=_LEAST_S))
        except TpColocateError as error:
            logger.warning("the engine could not be asked to go on: %s", error)


def connect(
    server: WeightServer | None, *, folder: Path, loader: str, tp_size: int, deadline: Deadline
) -> WorkerConnection:
    """Return this rank's connection, not opened yet; see `OwnerConnection`.

    Args:
        server: The engine; None on ranks that do not own it.
    """
    if server is None:
        return WorkerConnection()
    return OwnerConnection(server, folder=folder, loader=loader, tp_size=tp_size, deadline=deadline)


__all__ = ["OwnerConnection", "Replies", "WeightServer", "WorkerConnection", "Workers", "connect"]
