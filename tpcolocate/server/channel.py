"""One weight sync's connection to the TP workers: a request of SGLang's, and a local socket beside it.

SGLang's ``/update_weights_from_tensor`` reaches all TP workers at once and costs several milliseconds, so a sync makes it
once.  Inside it the receiver in every worker connects to a socket in a folder that only this user can enter, and takes
commands until it is dismissed; see `tpcolocate_receiver.protocol`.  SGLang answers the request when all have left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path

import zmq

from tpcolocate.deadline import Deadline
from tpcolocate.errors import DeadlineError, EngineDeadError, EngineError, SyncError
from tpcolocate.in_server.tpcolocate_receiver.protocol import (
    Addressed,
    Leave,
    Reply,
    RunProgram,
    decode_reply,
    encode_command,
)
from tpcolocate.parallel import in_background

_POLL_MS = 20
# A reply may still be on its way through ZeroMQ's threads when SGLang's answer, sent after it, is there: on a busy machine
# for more than a second.
_LATE_MS = 10_000
# For SGLang's answer after the end: at least so long, and with more time until so long before the end of the sync's own, when the
# others give up this rank.
_LEAVE_S, _CLOSING_S = 5.0, 3.0
# sun_path holds 108 bytes with its end.
_LONGEST_PATH = 107
_UNANSWERED = -1
"""Number of a command that is not answered."""


class Channel:
    """The commands and replies of one sync.

    Args:
        path: Of the socket, which exists from now on; its folder is private to this user.
        tp_size: Number of workers.
        stopped: Returns which processes of the server are stopped, for errors.
    """

    def __init__(self, path: Path, *, tp_size: int, stopped: Callable[[], list[str]] = list) -> None:
        if len(str(path)) > _LONGEST_PATH:
            raise SyncError(f"the socket's path is longer than {_LONGEST_PATH} bytes: {path}")
        self._path = path
        self._tp_size = tp_size
        self._stopped = stopped
        self._due: dict[int, set[int]] = {}
        self._received: dict[tuple[int | None, int], Reply] = {}
        self._request: Future[None] | None = None
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._present: dict[int, Reply] = {}
        self._is_dismissed = False
        try:
            self._socket.bind(self.endpoint)
        except BaseException:
            self.close(timeout_s=0.0)
            raise

    @property
    def endpoint(self) -> str:
        """Return the address that the workers connect to."""
        return f"ipc://{self._path}"

    def call(self, request: Callable[[], None]) -> None:
        """Start the request that makes the workers connect.

        Args:
            request: Returns when SGLang has answered; runs in a thread of its own.
        """
        self._request = in_background(request, name="tpcolocate sync")

    def greet(self, *, timeout_s: float) -> dict[int, Reply]:
        """Wait until all workers have connected, and return their greetings by TP rank.

        Raises:
            EngineError: The request failed before that.
            DeadlineError: Not all workers connected in time.
        """
        deadline = Deadline.after(timeout_s)
        while len(self._present) < self._tp_size:
            tp_rank, reply = self._receive(deadline, "open the weight sync")
            self._present[tp_rank] = reply
        return self._present

    @property
    def _is_asking(self) -> bool:
        """Return whether SGLang has not answered the request yet."""
        return self._request is not None and not self._request.done()

    @property
    def _failure(self) -> BaseException | None:
        return None if self._request is None or self._is_asking else self._request.exception()

    def post(self, commands: Mapping[int, Addressed], number: int) -> None:
        """Send a command to each TP rank; `collect` returns the replies.

        Args:
            commands: TP rank -> command.  After a `RunProgram` that is the last, the workers leave by themselves.
            number: Identifies the replies.
        """
        self._due[number] = set(commands)
        for tp_rank, command in commands.items():
            try:
                self._send(tp_rank, command, number)
            except zmq.ZMQError as error:
                raise EngineDeadError(f"TP rank {tp_rank} has left the weight sync: {error}") from error
        self._is_dismissed = all(isinstance(c.command, RunProgram) and c.command.is_last for c in commands.values())

    def _send(self, tp_rank: int, command: Addressed, number: int) -> None:
        self._socket.send_multipart([str(tp_rank).encode(), encode_command(command, number)], zmq.NOBLOCK)

    def collect(self, number: int, *, timeout_s: float) -> dict[int, Reply]:
        """Wait for the replies to a `post`, and return them by TP rank.

        Raises:
            EngineError: The request has failed or ended before all answers came.
            DeadlineError: Not all answers came in time.
        """
        deadline = Deadline.after(timeout_s)
        found: dict[int, Reply] = {}
        for tp_rank in sorted(self._due.pop(number)):
            while (number, tp_rank) not in self._received:
                came, reply = self._receive(deadline, f"answer command {number}")
                self._received[reply.number, came] = reply
            found[tp_rank] = self._received.pop((number, tp_rank))
        return found

    def _receive(self, deadline: Deadline, what: str) -> tuple[int, Reply]:
        while not self._socket.poll(_POLL_MS):
            if not self._is_asking:
                if self._failure is not None:
                    raise self._failure
                left_ms = int(deadline.left() * 1000)
                if not self._socket.poll(min(_LATE_MS, left_ms)):
                    raise EngineError(
                        f"the engine ended the weight sync by itself: its TP workers did not {what}",
                        hint="see the server's log",
                    )
            elif deadline.has_passed:
                raise self._late(f"the TP workers did not {what} in time")
        name, content = self._socket.recv_multipart()
        return int(name), decode_reply(content)

    def _late(self, what: str) -> DeadlineError:
        if stopped := self._stopped():
            return DeadlineError(f"{what}: {'; '.join(stopped)}", hint="kill -CONT continues a stopped process")
        return DeadlineError(what, hint="see the server's log")

    def dismiss(self) -> None:
        """Have the workers leave, unless they do so by themselves."""
        if self._is_dismissed or not self._is_asking:
            return
        self._is_dismissed = True
        for tp_rank in self._present:
            try:
                self._send(tp_rank, Addressed(tp_rank, Leave()), _UNANSWERED)
            except zmq.ZMQError:
                pass  # it has left

    def close(self, *, timeout_s: float) -> None:
        """Dismiss the workers, and wait so long until SGLang has answered."""
        if self._socket.closed:
            return
        try:
            self.dismiss()
            if self._request is not None:
                wait([self._request], timeout_s)
        finally:
            self._socket.close()
            self._context.term()
            self._path.unlink(missing_ok=True)

    def finish(self, *, timeout_s: float) -> None:
        """Close the channel once SGLang has answered, and raise what its request raised.

        Args:
            timeout_s: What is left for the sync: on a busy machine the answer takes seconds.

        Raises:
            EngineError: The request failed, or was not answered.
        """
        self.close(timeout_s=max(_LEAVE_S, timeout_s - _CLOSING_S))
        if self._failure is not None:
            raise self._failure
        if self._is_asking:
            raise self._late("the engine did not answer in time after the end of the weight sync")


__all__ = ["Channel"]
