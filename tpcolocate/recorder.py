"""What a rank does in a step, and how much memory is used meanwhile, recorded for `tpcolocate.plot`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch.profiler import record_function

from tpcolocate.errors import ConfigError

_CLOCK = time.time() - time.monotonic()


class Placed(Protocol):
    """What a recorder needs of `Colocation`."""

    rank: int
    slice_ranks: tuple[int, ...]
    device: torch.device


@dataclass(frozen=True, slots=True)
class Span:
    """Something that a rank did.

    Attributes:
        name: For example ``"generate"``.
        begin: In seconds since the epoch.
        end: Likewise.
        collective: All ranks of the slice do it, and none is done before the last one has begun.
    """

    name: str
    begin: float
    end: float
    collective: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory at one time.

    Attributes:
        at: In seconds since the epoch.
        trainer_bytes: Of this process: on a GPU what torch's allocator has reserved, on a CPU resident memory.
        used_bytes: Used on the GPU by all processes; None on a CPU.
        total_bytes: Of the GPU; None on a CPU.
    """

    at: float
    trainer_bytes: int
    used_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Recording:
    """What one rank has recorded.

    Attributes:
        rank: Global rank.
        slice_ranks: Ranks of its slice.
        spans: In the order of their ends.
        memory: In the order of time.
    """

    rank: int
    slice_ranks: tuple[int, ...]
    spans: tuple[Span, ...] = ()
    memory: tuple[Memory, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON.

        Raises:
            OSError: The file cannot be written.
        """
        Path(path).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recording:
        """Read what `save` has written.

        Raises:
            OSError: The file cannot be read.
            ConfigError: It is no recording, or not the whole of one.
        """
        try:
            values = json.loads(Path(path).read_bytes())
            return cls(
                rank=values["rank"],
                slice_ranks=tuple(values["slice_ranks"]),
                spans=tuple(Span(**each) for each in values["spans"]),
                memory=tuple(Memory(**each) for each in values["memory"]),
            )
        except (ValueError, LookupError, TypeError) as error:  # ValueError: neither text nor JSON
            raise ConfigError(
                f"{path} is not a whole recording: {type(error).__name__}: {error}",
                hint="pass a file that Recording.save() has written to its end",
            ) from error


@dataclass(frozen=True, slots=True)
class Wait:
    """A rank that has begun a collective span before the last rank of its slice.

    Attributes:
        rank: The rank that waits.
        name: Of the span.
        begin: In seconds since the epoch.
        end: When the last rank has begun.
        for_rank: The last rank.
    """

    rank: int
    name: str
    begin: float
    end: float
    for_rank: int


class Recorder:
    """Records spans and memory of this rank.

    Not collective, and cheap: a span costs some microseconds, and one query of the GPU's free memory at either end.  In a
    profile of torch each span is a range ``tpcolocate/NAME``.

    Args:
        colo: From `init`.
    """

    def __init__(self, colo: Placed) -> None:
        self._device = torch.device(colo.device)
        self._rank, self._slice_ranks = colo.rank, tuple(colo.slice_ranks)
        self._spans: list[Span] = []
        self._memory: list[Memory] = []

    @contextmanager
    def span(self, name: str, *, collective: bool = False) -> Iterator[None]:
        """Record what the block does, whether or not it raises.

        Args:
            name: For example ``"generate"``.
            collective: All ranks of the slice enter it together, as in `Engine.sync_weights`, `sleep` and `wake`: what passes
                before the last rank enters is shown as waiting.
        """
        self.sample()
        begin = _now()
        try:
            with record_function(f"tpcolocate/{name}"):
                yield
        finally:
            self._spans.append(Span(name, begin, _now(), collective))
            self.sample()

    def sample(self) -> None:
        """Record the memory in use now; also done at either end of a span."""
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            reserved = torch.cuda.memory_reserved(self._device)
            self._memory.append(Memory(_now(), reserved, total - free, total))
        else:
            self._memory.append(Memory(_now(), psutil.Process().memory_info().rss))

    def clear(self) -> None:
        """Forget what was recorded."""
        self._spans.clear()
        self._memory.clear()

    @property
    def recording(self) -> Recording:
        """What was recorded until now."""
        return Recording(self._rank, self._slice_ranks, tuple(self._spans), tuple(self._memory))


def find_waits(recordings: Sequence[Recording]) -> list[Wait]:
    """Find where ranks waited for others.  Pure.

    Args:
        recordings: Of several ranks; the n-th collective span of a name is the same call on all ranks of a slice.
    """
    calls: dict[tuple[Any, ...], list[tuple[int, Span]]] = {}
    for recording in recordings:
        seen: dict[str, int] = {}
        for span in sorted(recording.spans, key=lambda span: span.begin):
            if span.collective:
                number = seen[span.name] = seen.get(span.name, 0) + 1
                key = (tuple(sorted(recording.slice_ranks)), span.name, number)
                calls.setdefault(key, []).append((recording.rank, span))
    found = []
    for spans in calls.values():
        last, latest = max(spans, key=lambda each: each[1].begin)
        for rank, span in spans:
            end = min(latest.begin, span.end)
            if rank != last and end > span.begin:
                found.append(Wait(rank, span.name, span.begin, end, last))
    return sorted(found, key=lambda wait: (wait.rank, wait.begin))


def _now() -> float:
    """Return the time since the epoch by a clock that is never set while the process runs."""
    return _CLOCK + time.monotonic()


__all__ = ["Memory", "Recorder", "Recording", "Span", "Wait", "find_waits"]
