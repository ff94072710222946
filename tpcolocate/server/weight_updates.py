"""What surrounds an update of a server's weights: generation held, its workers called, the new version published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from tpcolocate import ipc_payload
from tpcolocate.deadline import Deadline
from tpcolocate.errors import DeadlineError, EngineDeadError, RequestError, SyncError, TpColocateError
from tpcolocate.in_server.tpcolocate_receiver.protocol import OpenSession, to_json
from tpcolocate.parallel import begun_in_background, beside
from tpcolocate.processes import this_process
from tpcolocate.server.api import ServerApi
from tpcolocate.server.channel import Channel
from tpcolocate.server.generation import LEAST_S, GenerationHold
from tpcolocate.server.lifecycle import Lifecycle

# From the moment at which the workers leave a sync by themselves to SGLang's answer.
_ANSWER_S = 10.0


class ConnectedWorkers(Protocol):
    """What ends with a sync: a `Channel`."""

    def dismiss(self) -> None: ...
    def finish(self, *, timeout_s: float) -> None: ...


class WeightUpdates:
    """Updates of one server's weights, on the owner.

    Args:
        api: Of the server.
        generation: Of the server.
        lifecycle: Of the engine.
    """

    def __init__(self, api: ServerApi, generation: GenerationHold, lifecycle: Lifecycle) -> None:
        self._api = api
        self._generation = generation
        self._lifecycle = lifecycle
        self._session_open = False

    def begin_sync(self, *, timeout_s: float) -> None:
        """`hold_generation` until the cache is dropped; undone if it fails and the server still answers.

        Raises:
            EngineStateError: This release keeps the cache while retracted requests wait (through 0.5.20).
        """
        deadline = Deadline.after(timeout_s)
        try:
            self.hold_generation(timeout_s=timeout_s).result()
        except TpColocateError as error:
            if not isinstance(error, (EngineDeadError, DeadlineError)):
                self.cancel_sync(timeout_s=deadline.left(at_least=LEAST_S))
            raise

    def hold_generation(self, *, timeout_s: float) -> Future[None]:
        """Hold generation, begin to drop the cache of the old weights, and open a weight session if the release has them.

        Unless the user has paused already, requests in flight are retracted: they keep the tokens they have and go on
        after the sync, with the new weights.  The cache is dropped here and not at the end, because nothing enters it
        meanwhile, and because a release that cannot do so must refuse while the weights are still the old ones.

        `cancel_sync` undoes it, whatever this or the future raises.

        Returns:
            Done once the cache is dropped; raises as `begin_sync`.  No weight may change before.  An update may be asked
            for: SGLang takes up one request after the other, and has been sent this one.  If it takes up the update
            first all the same, it drops the cache once that is over.
        """
        self._generation.check_weights()
        deadline = Deadline.after(timeout_s)
        # Answered before anything else is asked for: while it does not know of a pause, SGLang keeps an update waiting
        # for the requests in flight.
        self._generation.hold("retract", timeout_s=timeout_s)
        dropped = begun_in_background(
            lambda sent: self._generation.drop_old_cache(timeout_s=deadline.left(at_least=LEAST_S), sent=sent),
            name="tpcolocate flush",
        )
        if self._api.release.weight_session:
            self._open_session(deadline)
        return dropped

    def _open_session(self, deadline: Deadline) -> None:
        # A sync that failed half-way left its session open.
        try:
            self._api.begin_weight_update(timeout_s=deadline.left(at_least=LEAST_S))
        except RequestError as error:
            if "already open" not in error.message:
                raise
            self._api.end_weight_update(timeout_s=deadline.left(at_least=LEAST_S))
            self._api.begin_weight_update(timeout_s=deadline.left(at_least=LEAST_S))
        self._session_open = True

    def _close_session(self, deadline: Deadline) -> None:
        if self._session_open:
            self._session_open = False
            self._api.end_weight_update(timeout_s=deadline.left(at_least=LEAST_S))

    def cancel_sync(self, *, timeout_s: float) -> None:
        """Undo `hold_generation` while nothing was sent yet: the engine goes on with the weights it has."""
        deadline = Deadline.after(timeout_s)
        self._close_session(deadline)
        self._generation.continue_if_allowed(self._lifecycle.state, timeout_s=deadline.left(at_least=LEAST_S))

    def push(self, payloads: Sequence[str], *, load_format: str, timeout_s: float) -> None:
        """As `ServerApi.push`."""
        self._api.push(payloads, load_format=load_format, timeout_s=timeout_s)

    def await_workers(self, path: Path, *, tp_size: int) -> Channel:
        """Open the socket that the workers will connect to; nothing is asked of SGLang yet.

        Args:
            path: Of the socket, in a folder of this user alone.
            tp_size: Number of workers.
        """
        client = self._api.client
        return Channel(
            path, tp_size=tp_size, stopped=lambda: [] if client.evidence is None else client.evidence.stopped()
        )

    def call_workers(self, workers: Channel, session: str, *, loader: str, tp_size: int, timeout_s: float) -> None:
        """Reach our receiver in every TP worker, by one request that lasts as long as the sync.

        Args:
            workers: From `await_workers`.
            session: A name that was never used before.
            loader: Dotted name of the receiver.
            tp_size: Number of workers.
            timeout_s: For the whole sync, in seconds; the workers leave by themselves after it.
        """
        payloads = [
            ipc_payload.command(
                to_json(OpenSession(session, workers.endpoint, this_process(), tp_rank, tp_size, timeout_s))
            )
            for tp_rank in range(tp_size)
        ]
        workers.call(lambda: self._api.push(payloads, load_format=loader, timeout_s=timeout_s + _ANSWER_S))

    def end_sync(self, version: str, *, workers: ConnectedWorkers | None = None, timeout_s: float) -> None:
        """Dismiss the workers, publish the version, and let generation go on unless the user has paused it.

        Requests that do not need each other are made at once: each one costs a millisecond or two.

        Args:
            version: Of the weights, all of which are known to have arrived.
            workers: From `await_workers`, if this sync has them.
            timeout_s: In seconds.
        """
        deadline = Deadline.after(timeout_s)

        def publish(sent: Callable[[], None]) -> None:
            self._api.set_weight_version(version, timeout_s=deadline.left(at_least=LEAST_S), sent=sent)

        def go_on(sent: Callable[[], None]) -> None:
            after = self._lifecycle.state.synced()
            self._generation.continue_if_allowed(after, timeout_s=deadline.left(at_least=LEAST_S), sent=sent)

        def confirm() -> None:
            if self._reported_version(deadline) == version:
                return
            published.result()  # the question may have come before the version was set
            if (reported := self._reported_version(deadline)) != version:
                raise SyncError(
                    f"the engine reports weight version {reported!r} after {version!r} was set",
                    url=self._api.client.url,
                )

        if workers is not None:
            workers.dismiss()
        # SGLang takes up one request after the other: each may be asked for when the one before it has left.
        published = begun_in_background(publish, name="tpcolocate version")
        if self._session_open:  # nothing may be generated before it is closed
            if workers is not None:
                workers.finish(timeout_s=deadline.left(at_least=LEAST_S))
            self._close_session(deadline)
        going_on = begun_in_background(go_on, name="tpcolocate go on")
        beside([going_on, published], confirm)
        if workers is not None:
            workers.finish(timeout_s=deadline.left(at_least=LEAST_S))

    def _reported_version(self, deadline: Deadline) -> object:
        return self._api.weight_version(timeout_s=deadline.left(at_least=LEAST_S))


__all__ = ["ConnectedWorkers", "WeightUpdates"]
