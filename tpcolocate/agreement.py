"""Agreement between the ranks of a group: what they exchange, and how it went for all of them.

`RankGroup` is what the rest of the library speaks through.  Its calls carry a deadline, notice a dead member or one that
is in another call, and turn one rank's exception into the same exception on all of them.
"""

from __future__ import annotations

import hashlib
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from tpcolocate.errors import ConfigError, RankFailedError, RankLostError, TpColocateError
from tpcolocate.groups import Member

T = TypeVar("T")

# One gloo round carries this many bytes a rank; an ok-or-error nearly always fits, and so does what is told of a
# bucket, so that agreement costs one round, which takes as long for 2 KiB as for 16, and not a size exchange before it.
_FRAME_BYTES = 8192
# Before the content: its size, and what the rank is doing, so that ranks which meet from different calls see it.
_SIZE_BYTES = 8
_HEAD_BYTES = 128
# How long one wait lasts before the members are looked at.  gloo notices a closed connection by
# itself; this is for the peer that died before its connection was made.
_LOOK_INTERVAL_S = 1.0
_EXIT_S = 0.5
_BACKEND_MARGIN_S = 30.0
# Characters of a value in an error.
_SHOWN = 200


class RankGroup:
    """The ranks that do something together, and agree on how it went.

    Every method is a collective over the members.  Lists and positions are in the order of `ranks`,
    which is not the order of torch's group ranks.

    Args:
        members: The ranks, in the order that results shall have (tp order for a slice).
        rank: Global rank of this process.
        group: A gloo group of exactly these ranks; None for a group of one.
        timeout_s: Longest wait for the others in one call, unless the call says otherwise.
    """

    def __init__(
        self, members: Sequence[Member], *, rank: int, group: dist.ProcessGroup | None, timeout_s: float
    ) -> None:
        if group is None and len(members) > 1:
            raise AssertionError("a group of several ranks needs a process group")
        self.members = tuple(members)
        self.ranks = tuple(member.rank for member in members)
        self.rank = rank
        self.group = group
        self.timeout_s = timeout_s
        self._broken: str | None = None
        self._turn = threading.Lock()
        self._doing = ""
        self._here = self.members[self.ranks.index(rank)].host
        # torch sorts the ranks of a group; results come in that order
        self._positions = [sorted(self.ranks).index(r) for r in self.ranks]

    def __len__(self) -> int:
        return len(self.ranks)

    def all_gather(self, value: T, *, what: str, timeout_s: float | None = None) -> list[T]:
        """Exchange one picklable value per rank.

        Args:
            value: This rank's.
            what: What the ranks are doing, for the error when one does not come.
            timeout_s: Longest wait for the others.

        Raises:
            RankLostError: A member died or did not come in time; the group is unusable afterwards.  Or the members meet
                from different calls.
            ConfigError: Another thread of this rank is in such a call.
        """
        if self.group is None:
            return [value]
        # Only members of this group can have sent these bytes.
        return [pickle.loads(blob) for blob in self._all_gather_bytes(pickle.dumps(value), what, timeout_s)]

    def _all_gather_bytes(self, data: bytes, what: str, timeout_s: float | None) -> list[bytes]:
        if not self._turn.acquire(blocking=False):
            # Two threads would meet the other ranks in an order of their own on each.
            raise ConfigError(
                f"cannot {what} while another thread of this rank has to {self._doing}",
                hint="make collective calls from one thread; generate() may be called from any",
                rank=self.rank,
            )
        try:
            self._doing = what
            return self._rounds(data, what, timeout_s)
        finally:
            self._turn.release()

    def _rounds(self, data: bytes, what: str, timeout_s: float | None) -> list[bytes]:
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        head = len(data).to_bytes(_SIZE_BYTES, "little") + what.encode()[: _HEAD_BYTES - _SIZE_BYTES]
        inline = _padded(head.ljust(_HEAD_BYTES, b"\0") + data[: _FRAME_BYTES - _HEAD_BYTES], _FRAME_BYTES)
        frames = [frame.numpy().tobytes() for frame in self._round(inline, what, deadline)]
        self._check_same_call([frame[_SIZE_BYTES:_HEAD_BYTES].rstrip(b"\0") for frame in frames])
        sizes = [int.from_bytes(frame[:_SIZE_BYTES], "little") for frame in frames]
        blobs = [frame[_HEAD_BYTES:] for frame in frames]
        if (largest := max(sizes)) > _FRAME_BYTES - _HEAD_BYTES:
            blobs = [blob.numpy().tobytes() for blob in self._round(_padded(data, largest), what, deadline)]
        blobs = [blob[:size] for blob, size in zip(blobs, sizes)]
        return [blobs[position] for position in self._positions]

    def _check_same_call(self, names: list[bytes]) -> None:
        """Refuse ranks that met in one round, but from different calls.  Pure: every rank comes to the same error.

        Args:
            names: What each rank is doing, in torch's order.
        """
        if len(set(names)) == 1:
            return
        said = "; ".join(
            f"rank {rank} would {names[i].decode(errors='replace')}" for rank, i in zip(self.ranks, self._positions)
        )
        raise RankLostError(
            f"the ranks make different calls: {said}",
            hint="every rank must make the same collective calls in the same order; a rank may have left one with an error",
            slice_ranks=self.ranks,
        )

    def _round(self, tensor: torch.Tensor, what: str, deadline: float) -> list[torch.Tensor]:
        if self._broken is not None:
            raise RankLostError(
                f"cannot {what}: the group is unusable since {self._broken}",
                hint="restart the job; the first error of every rank tells why",
                rank=self.rank,
                slice_ranks=self.ranks,
            )
        assert self.group is not None
        started = time.monotonic()
        outputs = [torch.empty_like(tensor) for _ in self.ranks]
        try:
            # Through the group itself, because only there an operation takes a timeout of its own; the group's is for
            # calls that have none.  Later than ours, so that ours decides.
            options = AllgatherOptions()
            options.timeout = timedelta(seconds=max(deadline - started, 0.0) + _BACKEND_MARGIN_S)
            work = self.group.allgather([outputs], [tensor], options)
            while not self._wait(work, min(_LOOK_INTERVAL_S, max(deadline - time.monotonic(), 0.001))):
                gone = self._ended()
                if gone:
                    raise RuntimeError(f"ranks {_listed(gone)} have exited")
                if time.monotonic() >= deadline:
                    raise RuntimeError("some rank did not come")
        except RuntimeError as error:
            elapsed = time.monotonic() - started
            gone = self._gone()
            why = f"rank {_listed(gone)} has exited" if gone else str(error).strip().splitlines()[0]
            self._broken = f"{what!r} failed ({why})"
            raise RankLostError(
                f"lost the other ranks while they should {what}: {why} (after {elapsed:.1f} s)",
                hint="the cause is the first error printed by another rank"
                if gone
                else "a rank may be in another call, or slower than timeout_s; every rank of the slice must make the same calls",
                rank=self.rank,
                slice_ranks=self.ranks,
            ) from error
        return outputs

    def _gone(self) -> list[int]:
        """Members whose process has ended; a moment's patience, since a socket closes before its process is gone."""
        deadline = time.monotonic() + _EXIT_S
        while not (gone := self._ended()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return gone

    def _ended(self) -> list[int]:
        """Members that this rank can see and that have ended; those of other hosts are the sockets' business."""
        return [m.rank for m in self.members if m.host.sees(self._here) and not m.is_running()]

    @staticmethod
    def _wait(work: dist.Work, seconds: float) -> bool:
        try:
            work.wait(timedelta(seconds=seconds))
        except RuntimeError:
            if not work.is_completed():
                return False  # not there yet
            # Failed; or it came between the end of the wait and the question.  Waiting again tells.
            work.wait(timedelta(seconds=seconds))
        return True

    def broadcast(self, value: T | None, *, src: int, what: str, timeout_s: float | None = None) -> T:
        """The value of rank `src`, on all members.

        Raises:
            RankLostError: As `all_gather`.
        """
        return self.all_gather(value if self.rank == src else None, what=what, timeout_s=timeout_s)[
            self.ranks.index(src)
        ]  # type: ignore[return-value]

    def agree(
        self, error: BaseException | None, value: T | None = None, *, what: str, timeout_s: float | None = None
    ) -> list[T]:
        """Exchange ok-or-error; raise the first error on every rank.

        Args:
            error: What went wrong on this rank, or None.
            value: What to exchange along with "ok".
            what: What the ranks were doing.
            timeout_s: Longest wait for the others.

        Returns:
            Every rank's value, in the order of `ranks`.

        Raises:
            TpColocateError: The earliest error of any member that is not a mere consequence of another's.
                Exceptions that are not this library's arrive as `RankFailedError`.
            RankLostError: A member died or did not come.
        """
        report = None if error is None else _Report.of(error, self.rank)
        try:
            data = pickle.dumps((report, value))
        except Exception as unpicklable:  # told to the others, who already wait
            error = unpicklable if error is None else error
            report = _Report.of(unpicklable, self.rank)
            data = pickle.dumps((report, None))
        try:
            if self.group is None:
                outcomes = [(report, value)]
            else:
                outcomes = [pickle.loads(blob) for blob in self._all_gather_bytes(data, what, timeout_s)]
        except RankLostError as lost:
            if error is None:
                raise
            # This rank knows a cause; that the others are gone too is the lesser news.
            error.add_note(f"(the other ranks could not be told: {lost.message})")
            raise error from None
        first = min((r for r, _ in outcomes if r is not None), key=lambda r: r.order, default=None)
        if first is None:
            return [outcome for _, outcome in outcomes]  # type: ignore[misc]
        if error is not None and not isinstance(error, Exception):
            raise error  # KeyboardInterrupt and SystemExit stay what they are on the rank that got them
        if error is not None and first.rank == self.rank:
            if first.error is error:
                raise error
            raise first.error from error
        raise first.error

    @contextmanager
    def together(self, what: str, *, timeout_s: float | None = None) -> Iterator[dict[str, object]]:
        """Run the body on every rank, then `agree` on how it went, and on what it was to be.

        Yields:
            For the body to put in by name what must have the same ``repr`` on all ranks.

        Raises:
            TpColocateError: As `agree`.
            ConfigError: The ranks mean different things; the message names the first.
        """
        meant: dict[str, object] = {}
        try:
            yield meant
        except BaseException as error:
            self.agree(error, {}, what=what, timeout_s=timeout_s)
            raise  # not reached unless the group is of one and agree returned
        texts = {name: repr(value) for name, value in meant.items()}
        mine = {name: (hashlib.sha256(text.encode()).digest(), text[:_SHOWN]) for name, text in texts.items()}
        views = self.agree(None, mine, what=what, timeout_s=timeout_s)
        for rank, view in zip(self.ranks, views):
            for name in views[0]:
                if view[name] != views[0][name]:
                    raise ConfigError(
                        f"cannot {what}: ranks {self.ranks[0]} and {rank} pass different {name}: "
                        f"{views[0][name][1]} and {view[name][1]}",
                        hint="every rank must make the same call",
                        slice_ranks=self.ranks,
                    )

    def run_on(self, rank: int, action: Callable[[], T], *, what: str, timeout_s: float | None = None) -> T:
        """Run `action` on one rank; every rank gets its result or its error.

        Args:
            rank: Global rank that acts.
            action: Called there only; its result must be picklable.
            what: What is being done, for errors.
            timeout_s: Longest wait for the acting rank.
        """
        value: T | None = None
        error: BaseException | None = None
        if self.rank == rank:
            try:
                value = action()
            except BaseException as caught:
                error = caught
        return self.agree(error, value, what=what, timeout_s=timeout_s)[self.ranks.index(rank)]


@dataclass(frozen=True, slots=True)
class _Report:
    """An error on its way to the other ranks."""

    rank: int
    time: float
    error: TpColocateError

    @property
    def order(self) -> tuple[bool, float, int]:
        # A rank that lost its peers fails later or earlier than the peer that died, but never is the cause.
        return isinstance(self.error, RankLostError), self.time, self.rank

    @classmethod
    def of(cls, error: BaseException, rank: int) -> _Report:
        if isinstance(error, TpColocateError):
            if error.rank is None:
                error.rank = rank
            portable: TpColocateError = error
        else:
            portable = RankFailedError(
                f"{type(error).__name__}: {error}" if str(error) else type(error).__name__,
                rank=rank,
                details="".join(traceback.format_exception(error)).rstrip(),
            )
        return cls(rank, time.time(), portable)


def _padded(data: bytes, num_bytes: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data.ljust(num_bytes, b"\0")), dtype=torch.uint8)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


__all__ = ["RankGroup"]
