"""What state the engine is in, and what may be asked of it then.  Pure.

SGLang does not defend itself here: releasing while a request runs, or resuming a tag that was not released, kills the
whole server, and generating from released or half-written weights answers 200 with garbage.  So every rank of the
slice keeps this state, and nothing is sent that it forbids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from tpcolocate.errors import ConfigError, EngineStateError

TAGS = ("kv_cache", "weights", "cuda_graph")
"""What can be released, as SGLang names it."""
PAUSES = ("retract", "abort", "in_place")
"""What becomes of running requests when generation is paused, as SGLang names it."""


class Weights(Enum):
    """What the engine's parameters hold."""

    CURRENT = "current"
    LOST = "lost"  # released without a copy: memory came back with anything in it
    CHANGING = "changing"  # a sync is on the way: the server holds generation until it is over
    UNKNOWN = "unknown"  # a sync failed on the way


@dataclass(frozen=True, slots=True)
class State:
    """Immutable; transitions return a new one.

    Attributes:
        asleep: Tags whose memory is released.
        weights: See `Weights`.
        closed: After `shutdown`.
        frees_memory: Whether the server was started with a memory saver; without one, sleeping changes nothing in it.
        keeps_weights: Whether released weights come back as they were (CPU backup, or nothing is really released).
        paused: How the user has paused generation; None while it runs.  The pause of a sync is its own affair.
    """

    asleep: frozenset[str] = frozenset()
    weights: Weights = Weights.CURRENT
    closed: bool = False
    frees_memory: bool = True
    keeps_weights: bool = False
    paused: str | None = None

    def check_generate(self) -> None:
        """Raises EngineStateError unless the tokens of a request made now would be the trainer's.

        During a sync they would: the server has the request wait for the new weights.
        """
        self._check_ready("generate")

    def _check_ready(self, what: str) -> None:
        self.check_open(what)
        if self.asleep:
            raise EngineStateError(
                f"cannot {what} while asleep ({self._names(self.asleep)} released)",
                hint="call wake() on every rank first",
            )
        if self.weights is Weights.LOST:
            raise EngineStateError(
                f"cannot {what}: the weights were released and hold garbage",
                hint="call sync_weights() after wake(), or launch with enable_weights_cpu_backup=True",
            )
        if self.weights is Weights.UNKNOWN:
            raise EngineStateError(
                f"cannot {what}: an earlier sync failed half-way and the weights are unknown",
                hint="call sync_weights() with the full model, or launch again",
            )

    def check_sync(self) -> None:
        """Raises EngineStateError unless weights can be written."""
        self.check_open("sync weights")
        if "weights" in self.asleep:
            raise EngineStateError(
                "cannot sync weights while they are released", hint='call wake(["weights"]) on every rank first'
            )

    def check_open(self, what: str) -> None:
        """Raises EngineStateError after `shut_down`."""
        if self.closed:
            raise EngineStateError(f"cannot {what}: the engine was shut down", hint="launch() again")

    def sleeping(self, tags: Sequence[str] | None) -> tuple[tuple[str, ...], State]:
        """Tags to release now (those that are not yet), and the state after it.

        Raises:
            ConfigError: An unknown tag.
            EngineStateError: Shut down.
        """
        self.check_open("sleep")
        chosen = tuple(tag for tag in self._known(tags) if tag not in self.asleep)
        return chosen, replace(self, asleep=self.asleep | set(chosen))

    def waking(self, tags: Sequence[str] | None) -> tuple[tuple[str, ...], State]:
        """Tags to resume now (those that are released), and the state after it.  Raises as `sleeping`."""
        self.check_open("wake")
        chosen = tuple(tag for tag in self._known(tags) if tag in self.asleep)
        lost = "weights" in chosen and not self.keeps_weights
        return chosen, replace(self, asleep=self.asleep - set(chosen), weights=Weights.LOST if lost else self.weights)

    def pausing(self, mode: str) -> State:
        """The state once generation is paused; `self` if it already is.

        Raises:
            ConfigError: An unknown mode.
            EngineStateError: Shut down, or paused in another mode.
        """
        self.check_open("pause generation")
        if mode not in PAUSES:
            raise ConfigError(f"unknown mode {mode!r}", hint=f"one of {', '.join(PAUSES)}")
        if self.paused not in (None, mode):
            raise EngineStateError(
                f"cannot pause with mode {mode!r}: generation is paused with {self.paused!r}",
                hint="call continue_generation() first",
            )
        return replace(self, paused=mode)

    def continuing(self) -> State:
        """The state once generation goes on; `self` if it was not paused.

        Raises:
            EngineStateError: Shut down, asleep, or the weights are not the trainer's, or not yet: requests that wait would go on
                with garbage.
        """
        self._check_ready("continue generation")
        if self.weights is Weights.CHANGING:
            raise EngineStateError("cannot continue generation during a weight sync", hint="wait for its end")
        return replace(self, paused=None)

    def synced(self, *, partial: bool = False) -> State:
        """After a sync; a partial one mends nothing that was lost or unknown."""
        return self if partial else replace(self, weights=Weights.CURRENT)

    def syncing(self) -> State:
        """From the first byte that may change until `synced` or `sync_over`."""
        return replace(self, weights=Weights.CHANGING)

    def sync_over(self) -> State:
        """After a sync, however it ended: what it was still changing is unknown."""
        return replace(self, weights=Weights.UNKNOWN) if self.weights is Weights.CHANGING else self

    def shut_down(self) -> State:
        return replace(self, closed=True)

    @staticmethod
    def _known(tags: Sequence[str] | None) -> tuple[str, ...]:
        if tags is None:
            return TAGS
        if isinstance(tags, str):
            raise ConfigError(f"tags must be a list, not the string {tags!r}", hint=f"for example [{tags!r}]")
        unknown = sorted(set(tags) - set(TAGS))
        if unknown:
            raise ConfigError(f"unknown tags {unknown}", hint=f"SGLang knows {', '.join(TAGS)}")
        return tuple(tag for tag in TAGS if tag in tags)

    @staticmethod
    def _names(tags: frozenset[str]) -> str:
        return ", ".join(sorted(tags))


__all__ = ["PAUSES", "TAGS", "State", "Weights"]
