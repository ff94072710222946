"""The state of an engine, and what may be asked of it in each state.

SGLang does not guard itself here: releasing memory under a running request, or resuming a tag that was not released,
ends the server, and generating from released or half-written weights answers 200 with garbage.  So every rank of the
slice keeps this state, and sends nothing that it forbids.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum

from tpcolocate.errors import ConfigError, EngineStateError, shown, some

TAGS = ("kv_cache", "weights", "cuda_graph")
"""What can be released, as SGLang names it."""
PAUSES = ("retract", "abort", "in_place")
"""What becomes of running requests when generation is paused, as SGLang names it."""


class Life(Enum):
    """Where an engine is between its launch and its end."""

    RUNNING = "running"
    RESTARTING = "restarting"  # until a new server runs; if it could not be started, until the next attempt
    ENDING = "ending"  # from the first call of `shutdown`; one that was interrupted can be resumed
    ENDED = "ended"


_NOT_RUNNING = {
    Life.RESTARTING: ("its server is being restarted, or could not be", "call restart() on every rank"),
    Life.ENDING: ("it is being shut down", "call shutdown() again if that was interrupted"),
    Life.ENDED: ("the engine was shut down", "launch() again"),
}


class WeightsState(Enum):
    """What the engine's parameters hold."""

    CURRENT = "current"
    UNSYNCED = "unsynced"  # what the server has started with, and that is not the trainer's
    LOST = "lost"  # released without a copy: the memory came back with arbitrary content
    CHANGING = "changing"  # a sync is in progress: the server holds generation until its end
    UNKNOWN = "unknown"  # a sync failed half-way


@dataclass(frozen=True, slots=True)
class State:
    """Immutable; transitions return a new one.

    Attributes:
        asleep: Tags whose memory is released.
        falling_asleep: Tags whose memory is about to be released.  No request may be made any more, but the server
            still finishes those of other processes.
        weights: See `WeightsState`.
        weights_after_sync: What `weights` will be once the sync in progress succeeds.
        missing: Of weights that are lost or unknown, the names that no sync has brought since; None: all of them.
        life: See `Life`.
        frees_memory: Whether the server was started with a memory saver; without one, sleeping changes nothing in it.
        keeps_weights: Whether released weights come back as they were (CPU backup, or nothing is really released).
        paused: How the user has paused generation; None while it runs.  Pauses for a sync or a sleep do not count.
    """

    asleep: frozenset[str] = frozenset()
    falling_asleep: frozenset[str] = frozenset()
    weights: WeightsState = WeightsState.CURRENT
    weights_after_sync: WeightsState = WeightsState.CURRENT
    missing: frozenset[str] | None = None
    life: Life = Life.RUNNING
    frees_memory: bool = True
    keeps_weights: bool = False
    paused: str | None = None

    @property
    def closed(self) -> bool:
        """Whether `shutdown` has begun."""
        return self.life in (Life.ENDING, Life.ENDED)

    @property
    def not_awake(self) -> frozenset[str]:
        """Tags whose memory is released or about to be."""
        return self.asleep | self.falling_asleep

    @property
    def lets_generate(self) -> bool:
        """Whether the server may generate: it is awake, has the trainer's weights, and the user has not paused it."""
        return self.paused is None and not self.asleep and self.weights is WeightsState.CURRENT

    def check_generate(self) -> None:
        """Raise EngineStateError unless the tokens of a request made now would be the trainer's.

        During a sync they would: the server holds the request until it has the new weights.
        """
        self._check_ready("generate")

    def _check_ready(self, what: str) -> None:
        self.check_open(what)
        if self.not_awake:
            raise EngineStateError(
                f"cannot {what} while asleep ({', '.join(sorted(self.not_awake))} released)",
                hint="call engine.wake() on every rank first",
            )
        if self.weights is WeightsState.UNSYNCED:
            raise EngineStateError(
                f"cannot {what}: no full sync has brought the trainer's weights since the server started"
                f"{self._still_missing()}",
                hint="call engine.sync_weights(model) with the full model on every rank first",
            )
        if self.weights is WeightsState.LOST:
            raise EngineStateError(
                f"cannot {what}: sleep() has released the weights, which now hold garbage{self._still_missing()}",
                hint='call engine.sync_weights(model) on every rank after wake(); engine.sleep(["kv_cache"]) keeps the weights, and '
                "launch(enable_weights_cpu_backup=True) brings them back",
            )
        if self.weights is WeightsState.UNKNOWN:
            raise EngineStateError(
                f"cannot {what}: an earlier weight sync failed half-way and the weights are unknown, perhaps a mixture of old and new"
                f"{self._still_missing()}",
                hint="call engine.sync_weights(model) with the full model on every rank, or launch() again",
            )

    def _still_missing(self) -> str:
        return "" if self.missing is None else f"; still missing are {some(sorted(self.missing))}"

    def warn_of_missing(self) -> str | None:
        """Return what is still missing after partial syncs of weights that are not the trainer's; None if nothing is."""
        if self.weights in (WeightsState.CURRENT, WeightsState.CHANGING) or not self.missing:
            return None
        text = f"generate is refused until these weights are synced as well: {some(sorted(self.missing))}"
        if self.weights is WeightsState.UNSYNCED:
            return text
        return f"{text}; launch with enable_weights_cpu_backup=True if they are never trained and the engine sleeps"

    def why_held(self) -> str | None:
        """Return why the server holds requests until the user acts; None if it does not."""
        if self.paused is None:
            return None
        return f"generation is paused ({self.paused}) until continue_generation() is called"

    def check_sync(self) -> None:
        """Raise EngineStateError unless weights can be written."""
        self.check_open("sync weights")
        if "weights" in self.asleep:
            raise EngineStateError(
                "cannot sync weights while they are released", hint='call engine.wake(["weights"]) on every rank first'
            )

    def check_open(self, what: str) -> None:
        """Raise EngineStateError unless the engine runs."""
        if self.life is not Life.RUNNING:
            why, hint = _NOT_RUNNING[self.life]
            raise EngineStateError(f"cannot {what}: {why}", hint=hint)

    def sleeping(self, tags: Collection[str] | None) -> tuple[tuple[str, ...], State]:
        """Return the tags to release now (those that are not yet), and the state until `slept` or `sleep_over`.

        Raises:
            ConfigError: An unknown tag.
            EngineStateError: Shut down.
        """
        self.check_open("sleep")
        chosen = tuple(tag for tag in self._checked(tags) if tag not in self.asleep)
        return chosen, replace(self, falling_asleep=frozenset(chosen))

    def slept(self) -> State:
        """Return the state once the memory is released."""
        return replace(self, asleep=self.not_awake, falling_asleep=frozenset())

    def sleep_over(self) -> State:
        """Return the state after an attempt to sleep, however it ended."""
        return replace(self, falling_asleep=frozenset())

    def waking(self, tags: Collection[str] | None) -> tuple[tuple[str, ...], State]:
        """Return the tags to resume now (those that are released), and the state after it.  Raises as `sleeping`."""
        self.check_open("wake")
        chosen = tuple(tag for tag in self._checked(tags) if tag in self.asleep)
        lost = "weights" in chosen and not self.keeps_weights
        asleep = self.asleep - set(chosen)
        if lost:
            return chosen, replace(self, asleep=asleep, weights=WeightsState.LOST, missing=None)
        return chosen, replace(self, asleep=asleep)

    def pausing(self, mode: str) -> State:
        """Return the state once generation is paused; `self` if it already is.

        Raises:
            ConfigError: An unknown mode.
            EngineStateError: Shut down, or paused in another mode.
        """
        self.check_open("pause generation")
        if not isinstance(mode, str) or mode not in PAUSES:
            raise ConfigError(
                f"unknown mode {shown(mode)}", hint=f"pause_generation() takes one of {', '.join(PAUSES)}"
            )
        if self.paused not in (None, mode):
            raise EngineStateError(
                f"cannot pause with mode {mode!r}: generation is paused with {self.paused!r}",
                hint="call continue_generation() first",
            )
        return replace(self, paused=mode)

    def continuing(self) -> State:
        """Return the state once generation goes on; `self` if it was not paused.

        Raises:
            EngineStateError: Shut down, asleep, or the weights are not the trainer's, or not yet: requests that wait
                would go on with garbage.
        """
        self._check_ready("continue generation")
        if self.weights is WeightsState.CHANGING:
            raise EngineStateError("cannot continue generation during a weight sync", hint="wait for its end")
        return replace(self, paused=None)

    def syncing(self, *, partial: bool = False) -> State:
        """Return the state from the first byte that may change, until `synced` or `sync_over`.

        Args:
            partial: The sync repairs nothing that was lost or unknown.
        """
        after = self.weights if partial else WeightsState.CURRENT
        return replace(self, weights=WeightsState.CHANGING, weights_after_sync=after)

    def lacking(self, missing: Iterable[str] | None) -> State:
        """Return the state of a partial sync in progress once it is known what it has left out.

        Partial syncs that together bring everything repair weights that were lost or unknown.

        Args:
            missing: Names that the engine's loader reads and that were not sent; None if that is not known.
        """
        if missing is None or self.weights_after_sync is WeightsState.CURRENT:
            return self
        left = frozenset(missing) if self.missing is None else self.missing.intersection(missing)
        return replace(self, missing=left, weights_after_sync=self.weights_after_sync if left else WeightsState.CURRENT)

    def synced(self) -> State:
        """Return the state once the sync in progress has succeeded; `self` if it has changed nothing."""
        if self.weights is not WeightsState.CHANGING:
            return self
        weights = self.weights_after_sync
        missing = None if weights is WeightsState.CURRENT else self.missing
        return replace(self, weights=weights, weights_after_sync=WeightsState.CURRENT, missing=missing)

    def sync_over(self) -> State:
        """Return the state after a sync, however it ended: weights that were still changing are unknown."""
        if self.weights is not WeightsState.CHANGING:
            return self
        return replace(self, weights=WeightsState.UNKNOWN, missing=None)

    def restarting(self) -> State:
        """Return the state from the end of one server until `restarted`: of the old one, only the user's pause stays.

        Raises:
            EngineStateError: Shut down.
        """
        if self.closed:
            self.check_open("restart the server")
        return State(life=Life.RESTARTING, weights=WeightsState.UNSYNCED, paused=self.paused)

    def restarted(self, new: State) -> State:
        """Return the state once a new server runs, whose own state at its start is `new`."""
        return replace(new, weights=WeightsState.UNSYNCED, paused=self.paused)

    def ending(self) -> State:
        """Return the state from the beginning of a shutdown until `ended`."""
        return self if self.life is Life.ENDED else replace(self, life=Life.ENDING)

    def ended(self) -> State:
        return replace(self, life=Life.ENDED)

    @staticmethod
    def _checked(tags: Collection[str] | None) -> tuple[str, ...]:
        if tags is None:
            return TAGS
        if isinstance(tags, str):
            raise ConfigError(f"tags must be a list, not the string {tags!r}", hint=f"for example [{tags!r}]")
        if not isinstance(tags, (list, tuple, set, frozenset)):
            raise ConfigError(f"tags must be a list of strings, got {shown(tags)}", hint=f"of {', '.join(TAGS)}")
        unknown = [tag for tag in tags if not isinstance(tag, str) or tag not in TAGS]
        if unknown:
            raise ConfigError(f"unknown tags {shown(unknown)}", hint=f"SGLang knows {', '.join(TAGS)}")
        return tuple(tag for tag in TAGS if tag in tags)


class Lifecycle:
    """The current state of one engine on this rank, and the version of its weights.

    Only the engine changes it; the owner's `GenerationHold` and `WeightUpdates` read it.

    Args:
        state: At the start.
        weight_version: At the start; if it is a number, versions are counted from there.
    """

    def __init__(self, state: State, *, weight_version: str = "default") -> None:
        self._state = state
        self._lock = threading.RLock()
        self.weight_version = weight_version
        self._num_syncs = self._num_before = _number(weight_version, 0)

    @property
    def state(self) -> State:
        return self._state

    @state.setter
    def state(self, new: State) -> None:
        # What another thread has begun to shut down, or a signal's handler in here, does not run again at the end of the call
        # that this thread is in.
        with self._lock:
            old: State | None = None
            while old is not self._state:
                old = self._state
                went_back = (old.closed and not new.closed) or (old.life is Life.ENDED)
                new = replace(new, life=old.life) if went_back else new
            self._state = new

    def next_version(self, version: str | None) -> str:
        """Return the version of the next weights: the given one, or the next number.

        It counts, unless the `weight_update` that follows is refused or fails before weights may have changed.
        """
        self._num_before = self._num_syncs
        self._num_syncs = self._num_syncs + 1 if version is None else _number(version, self._num_syncs + 1)
        return str(self._num_syncs) if version is None else version

    def note_missing(self, missing: Iterable[str] | None) -> None:
        """Within `weight_update`, before generation goes on: note what a partial sync has left out; see `State.lacking`."""
        self.state = self.state.lacking(missing)

    @contextmanager
    def weight_update(self, version: str, *, partial: bool) -> Iterator[Callable[[], None]]:
        """Track a sync or update in the body; if it fails once weights may have changed, they are unknown.

        Args:
            version: Of the new weights.
            partial: Weights that are missing stay as they are.

        Yields:
            A function to call before the first byte may change in the engine.
        """

        may_have_changed = False

        def modified() -> None:
            nonlocal may_have_changed
            may_have_changed = True
            self.state = self.state.syncing(partial=partial)

        try:
            yield modified
            self.state = self.state.synced()
            self.weight_version = version
        except BaseException:
            if not may_have_changed:
                self._num_syncs = self._num_before
            raise
        finally:
            self.state = self.state.sync_over()


def _number(version: str, otherwise: int) -> int:
    """Return the number that a version is, or `otherwise` if it is none."""
    return int(version) if version.isdecimal() and version.isascii() else otherwise


def can_answer(state: State) -> bool:
    """Return whether tokens come out of the server.  A sync pauses it too, until its weights are the trainer's again."""
    return not state.not_awake and state.paused is None and state.weights is WeightsState.CURRENT


__all__ = ["PAUSES", "TAGS", "Life", "Lifecycle", "State", "WeightsState", "can_answer"]
