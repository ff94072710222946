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


class Weights(Enum):
    """What the engine's parameters hold."""

    CURRENT = "current"
    LOST = "lost"  # released without a copy: memory came back with anything in it
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
    """

    asleep: frozenset[str] = frozenset()
    weights: Weights = Weights.CURRENT
    closed: bool = False
    frees_memory: bool = True
    keeps_weights: bool = False

    def check_generate(self) -> None:
        """Raises EngineStateError unless tokens generated now would be the trainer's."""
        self.check_open("generate")
        if self.asleep:
            raise EngineStateError(
                f"cannot generate while asleep ({self._names(self.asleep)} released)",
                hint="call wake() on every rank first",
            )
        if self.weights is Weights.LOST:
            raise EngineStateError(
                "cannot generate: the weights were released and hold garbage",
                hint="call sync_weights() after wake(), or launch with enable_weights_cpu_backup=True",
            )
        self._check_known("generate")

    def check_sync(self) -> None:
        """Raises EngineStateError unless weights can be written."""
        self.check_open("sync weights")
        if "weights" in self.asleep:
            raise EngineStateError(
                "cannot sync weights while they are released", hint='call wake(["weights"]) on every rank first'
            )

    def _check_known(self, what: str) -> None:
        if self.weights is Weights.UNKNOWN:
            raise EngineStateError(
                f"cannot {what}: an earlier sync failed half-way and the weights are unknown",
                hint="call sync_weights() with the full model, or launch again",
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

    def synced(self, *, partial: bool = False) -> State:
        """After a sync; a partial one mends nothing that was lost or unknown."""
        return self if partial else replace(self, weights=Weights.CURRENT)

    def sync_failed(self) -> State:
        return replace(self, weights=Weights.UNKNOWN)

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


__all__ = ["TAGS", "State", "Weights"]
