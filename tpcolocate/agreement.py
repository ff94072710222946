"""Collectives between the ranks of a group that exchange values and errors.

Every collective of this library goes through `RankGroup`.  Its calls have a deadline, detect a dead member or one that
is in another call, and raise one rank's exception on all ranks.
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

from tpcolocate.deadline import Deadline
from tpcolocate.errors import ConfigError, RankFailedError, RankLostError, TpColocateError
from tpcolocate.groups import Member, list_ranks

T = TypeVar("T")

# One gloo round carries this many bytes per rank.  An ok-or-error or the description of a bucket nearly always fits, so
# that agreement costs one round (as fast for 16 KiB as for 2) without an exchange of sizes before it.
_FRAME_BYTES = 8192
# Before the content: its size and the name of the call, so that ranks in different calls notice it.
_SIZE_BYTES = 8
_HEAD_BYTES = 128
# How long one wait lasts before the members' processes are checked.  gloo itself notices a closed connection; this is
# for the peer that died before its connection was made.
_CHECK_INTERVAL_S = 1.0
_EXIT_S = 0.5
_BACKEND_MARGIN_S = 30.0
# Characters of a value that an error shows.
_SHOWN = 200


class RankGroup:
    """A group of ranks that exchange values and agree on errors.

    Collective: every method, over all members.  `what` names the call in errors: an imperative such as ``"sync weights"``,
    the same on all ranks.  `timeout_s` is the longest wait for the others in seconds, by default the group's.  Results are
    in the order of `ranks`, which is not the order of torch's group ranks.

    Args:
        members: The ranks, in the order of results (tp order for a slice).
        rank: Global rank of this process.
        group: A gloo group of exactly these ranks; None for a group of one.
        timeout_s: Default timeout of a call, in seconds.
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
        self._call_lock = threading.Lock()
        self._current_call = ""
        self._host = self.members[self.ranks.index(rank)].host
        # torch sorts the ranks of a group and returns results in that order
        self._positions = [sorted(self.ranks).index(r) for r in self.ranks]

    def __len__(self) -> int:
        return len(self.ranks)

    def replace(self, group: dist.ProcessGroup) -> None:
        """Use another process group of the same ranks from now on, on every rank, after this one has failed."""
        self.group = group
        self._broken = None

    def all_gather(self, value: T, *, what: str, timeout_s: float | None = None) -> list[T]:
        """Exchange one picklable value per rank.

        Args:
            value: This rank's.

        Returns:
            Every rank's value.

        Raises:
            RankLostError: A member died or did not join in time; the group is unusable afterwards.  Or the members are
                in different calls.
            ConfigError: Another thread of this rank is in a collective call.
        """
        if self.group is None:
            return [value]
        # Unpickling is safe: only members of this group can have sent these bytes.
        return [pickle.loads(blob) for blob in self._all_gather_bytes(pickle.dumps(value), what, timeout_s)]

    def _all_gather_bytes(self, data: bytes, what: str, timeout_s: float | None) -> list[bytes]:
        if not self._call_lock.acquire(blocking=False):
            # The order of calls from two threads may differ from rank to rank.
            raise ConfigError(
                f"cannot {what}: another thread of this rank is in the collective call {self._current_call!r}",
                hint="make collective calls from one thread; generate() may be called from any",
                rank=self.rank,
            )
        try:
            self._current_call = what
            return self._rounds(data, what, Deadline.after(self.timeout_s if timeout_s is None else timeout_s))
        finally:
            self._call_lock.release()

    def _rounds(self, data: bytes, what: str, deadline: Deadline) -> list[bytes]:
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
        """Check that all ranks are in the same call.  Pure: every rank raises the same error.

        Args:
            names: Each rank's call, in torch's order.
        """
        if len(set(names)) == 1:
            return
        calls = "; ".join(
            f"rank {rank}: {names[i].decode(errors='replace')}" for rank, i in zip(self.ranks, self._positions)
        )
        raise RankLostError(
            f"the ranks make different calls: {calls}",
            hint="every rank must make the same collective calls in the same order; a rank may have left one with an error",
            slice_ranks=self.ranks,
        )

    def _round(self, tensor: torch.Tensor, what: str, deadline: Deadline) -> list[torch.Tensor]:
        if self._broken is not None:
            raise RankLostError(
                f"cannot {what}: the group is unusable since {self._broken}",
                hint="restart the job; see the first error of every rank",
                rank=self.rank,
                slice_ranks=self.ranks,
            )
        assert self.group is not None
        started = time.monotonic()
        outputs = [torch.empty_like(tensor) for _ in self.ranks]
        try:
            # Through the group itself: only there an operation takes a timeout of its own.  It is longer than ours, so
            # that ours decides.
            options = AllgatherOptions()
            options.timeout = timedelta(seconds=deadline.left() + _BACKEND_MARGIN_S)
            work = self.group.allgather([outputs], [tensor], options)
            while not self._wait(work, min(_CHECK_INTERVAL_S, deadline.left(at_least=0.001))):
                exited = self._exited()
                if exited:
                    raise RuntimeError(f"ranks {list_ranks(exited)} have exited")
                if deadline.has_passed:
                    raise RuntimeError("some rank did not join")
        except RuntimeError as error:
            elapsed = time.monotonic() - started
            exited = self._exited_soon()
            why = f"rank {list_ranks(exited)} has exited" if exited else str(error).strip().splitlines()[0]
            self._broken = f"{what!r} failed ({why})"
            raise RankLostError(
                f"{what}: lost contact with other ranks after {elapsed:.1f} s: {why}",
                hint="the cause is the first error printed by another rank"
                if exited
                else "a rank may be in another call, or slower than timeout_s; every rank of the slice must make the same calls",
                rank=self.rank,
                slice_ranks=self.ranks,
            ) from error
        return outputs

    def _exited_soon(self) -> list[int]:
        """Return `_exited`, waiting a moment for it: a socket closes before its process has exited."""
        deadline = Deadline.after(_EXIT_S)
        while not (exited := self._exited()) and not deadline.has_passed:
            time.sleep(0.01)
        return exited

    def _exited(self) -> list[int]:
        """Return members of this PID namespace that have exited; elsewhere only the closed socket shows it."""
        return [m.rank for m in self.members if m.host.sees(self._host) and not m.is_running()]

    @staticmethod
    def _wait(work: dist.Work, seconds: float) -> bool:
        try:
            work.wait(timedelta(seconds=seconds))
        except RuntimeError:
            if not work.is_completed():
                return False  # not complete yet
            # It failed, or completed after the wait had timed out: wait again to find out.
            work.wait(timedelta(seconds=seconds))
        return True

    def agree(
        self, error: BaseException | None, value: T | None = None, *, what: str, timeout_s: float | None = None
    ) -> list[T]:
        """Exchange ok-or-error; raise the first error on every rank.

        Args:
            error: This rank's error, or None.
            value: What to exchange along with "ok".

        Returns:
            Every rank's value, in the order of `ranks`.

        Raises:
            TpColocateError: The earliest error of any member, causes before lost ranks.  Exceptions of other libraries
                are raised as `RankFailedError`.
            RankLostError, ConfigError: As `all_gather`.
        """
        report = None if error is None else _Report.of(error, self.rank)
        try:
            data = pickle.dumps((report, value))
        except Exception as unpicklable:  # reported to the others, which already wait
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
            # This rank has the cause: raise that one.
            error.add_note(f"(not reported to the other ranks: {lost.message})")
            raise error from None
        first = min((r for r, _ in outcomes if r is not None), key=lambda r: r.order, default=None)
        if first is None:
            return [outcome for _, outcome in outcomes]  # type: ignore[misc]
        if error is not None and not isinstance(error, Exception):
            raise error  # KeyboardInterrupt and SystemExit keep their class on the rank that got them
        if error is not None and first.rank == self.rank:
            if first.error is error:
                raise error
            raise first.error from error
        raise first.error

    @contextmanager
    def together(self, what: str, *, timeout_s: float | None = None) -> Iterator[dict[str, object]]:
        """Run the body on every rank, then `agree` on its error and compare its arguments.

        Yields:
            A dictionary to which the body adds values, by name, whose ``repr`` must match on all ranks.

        Raises:
            TpColocateError: As `agree`.
            ConfigError: A value differs between ranks; the message names the first.
        """
        must_match: dict[str, object] = {}
        try:
            yield must_match
        except BaseException as error:
            self.agree(error, {}, what=what, timeout_s=timeout_s)
            raise  # not reached unless the group is of one and agree returned
        texts = {name: repr(value) for name, value in must_match.items()}
        digests = {name: (hashlib.sha256(text.encode()).digest(), text[:_SHOWN]) for name, text in texts.items()}
        views = self.agree(None, digests, what=what, timeout_s=timeout_s)
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
        """Run `action` on one rank; return its result or raise its error on every rank.

        Args:
            rank: Global rank that runs it.
            action: Called there only; its result must be picklable.

        Raises:
            TpColocateError: As `agree`.
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
    """An error as it is sent to the other ranks."""

    rank: int
    time: float
    error: TpColocateError

    @property
    def order(self) -> tuple[bool, float, int]:
        # A rank that lost its peers is never the cause, whether it failed before or after them.
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


__all__ = ["RankGroup"]
