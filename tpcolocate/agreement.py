"""Collectives between the ranks of a group that exchange values and errors.

Every collective of this library goes through `RankGroup`.  Its calls have a deadline, detect a dead member or one that
is in another call, and raise one rank's exception on all ranks.

A call is one or two rounds (`tpcolocate.rounds`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pickle
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from tpcolocate.deadline import Deadline
from tpcolocate.errors import ConfigError, RankFailedError, RankLostError, TpColocateError
from tpcolocate.groups import Member
from tpcolocate.rounds import Call, Rounds

logger = logging.getLogger(__name__)

T = TypeVar("T")

# One gloo round carries this many bytes per rank.  An ok-or-error or the description of a bucket nearly always fits, so
# that agreement costs one round (as fast for 16 KiB as for 2) without an exchange of sizes before it.
_FRAME_BYTES = 8192
# Before the content: its size, when the rank began to wait, how long it waits at most, whether it is past the first step of
# a call, and the name of the step, so that ranks in different calls notice it.
_HEAD = struct.Struct("<Qdd?103s")
# Characters of a value that an error shows.
_SHOWN = 200


@dataclass(slots=True)
class _Place:
    """Where a rank is among its calls.

    Attributes:
        goes_on: It is past the first step of a call of several steps.
        is_behind: It has left one there, in which the others may still wait for it.
        has_shared_error: Its last call ended with an error that every rank raises.
        key: Of the call of several steps that ranks which leave it make known.
    """

    goes_on: bool = False
    is_behind: bool = False
    has_shared_error: bool = False
    key: str | None = None


class RankGroup:
    """A group of ranks that exchange values and agree on errors.

    Collective: every method, over all members.  `what` names the call in errors: an imperative such as ``"sync weights"``,
    the same on all ranks.  `timeout_s` is the longest wait for the others in seconds.  Without it a rank waits for the
    group's timeout; while it sees that the processes of all members are running (on one host, in one PID namespace), it
    waits on, and a warning a minute names the ranks that are awaited.  Results are in the order of `ranks`, which is not
    the order of torch's group ranks.

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
        self._pid = os.getpid()
        self._call_lock = threading.Lock()
        self._current_call = ""
        self._place = _Place()
        self._is_closed = False
        self._rounds = None if group is None else Rounds(self.members, rank=rank, group=group)
        # torch sorts the ranks of a group and returns results in that order
        self._positions = [sorted(self.ranks).index(r) for r in self.ranks]

    def __len__(self) -> int:
        return len(self.ranks)

    def replace(self, group: dist.ProcessGroup) -> None:
        """Use another process group of the same ranks from now on, on every rank, after this one has failed."""
        self.group = group
        self._rounds = Rounds(self.members, rank=self.rank, group=group)

    def close(self) -> None:
        """Close this rank's connections, so that the others do not wait for it; where an operation of it is pending, they stay.

        Not collective.  Of later calls here those that have an error raise it.
        """
        self._is_closed = len(self) > 1
        self.group = self._rounds = None

    @property
    def has_shared_error(self) -> bool:
        """Whether the last call ended with an error that every rank raises, in its own way."""
        return self._place.has_shared_error

    def expect_no_shared_error(self) -> None:
        """Take it that the ranks do not have one: a call goes on after one that they did have."""
        self._place.has_shared_error = False

    @contextmanager
    def going_on(self, key: str | None = None) -> Iterator[None]:
        """The rest of a call of several steps, of which the ranks have agreed on the first.

        A rank that leaves it with an error that the others cannot know, as with an interrupt between two steps, does not
        come to the round in which they wait for it.  They leave it at their deadline, or when this rank makes its next call.
        That passes over the round, and is the next call of the others too.

        Args:
            key: Of this call, used for no other, the same on all ranks.  With it, a rank that leaves like that makes it known,
                and the others leave the round within about a second, with RankLostError; see `error_of_left`.
        """
        place = self._place
        was, place.goes_on, place.key = (place.goes_on, place.key), True, key
        place.has_shared_error = False
        try:
            yield
        except BaseException as error:
            place.is_behind = not place.has_shared_error
            if place.is_behind and key is not None and self._rounds is not None:
                why = {"rank": self.rank, "error": _text_of(error), "details": _details_of(error)}
                self._rounds.leave(key, json.dumps(why))
            raise
        finally:
            place.goes_on, place.key = was

    def error_of_left(self) -> RankFailedError | None:
        """Inside of `going_on` with a key: the error of the rank that was the first to leave; None if none has.

        Not collective.
        """
        key = self._place.key
        text = None if key is None or self._rounds is None else self._rounds.left(key)
        if text is None:
            return None
        why = json.loads(text)
        return RankFailedError(why["error"], rank=why["rank"], details=why["details"], slice_ranks=self.ranks)

    def all_gather(self, value: T, *, what: str, timeout_s: float | None = None, quiet_s: float = 0.0) -> list[T]:
        """Exchange one picklable value per rank.

        Args:
            value: This rank's.
            what: Name of the call, the same on all ranks.
            timeout_s: After which the call is given up, in seconds.  Default: that of the group, while it cannot be seen
                that all members are running.
            quiet_s: How long other ranks are expected to take, in seconds: there is no warning before.

        Returns:
            Every rank's value.

        Raises:
            RankLostError: A member died, and the group is unusable afterwards.  Or one did not join in time, or the
                members are in different calls; then all of them may make another call.
            ConfigError: Another thread of this rank is in a collective call, or this is a forked process.
        """
        self._check_process(what)
        self._check_not_closed(what)
        if self._rounds is None:
            return [value]
        # Unpickling is safe: only members of this group can have sent these bytes.
        return [pickle.loads(blob) for blob in self._all_gather_bytes(pickle.dumps(value), what, timeout_s, quiet_s)]

    def _all_gather_bytes(self, data: bytes, what: str, timeout_s: float | None, quiet_s: float = 0.0) -> list[bytes]:
        if not self._call_lock.acquire(blocking=False):
            # The order of calls from two threads may differ from rank to rank.
            raise ConfigError(
                f"cannot {what}: another thread of this rank is in the collective call {self._current_call!r}",
                hint="make collective calls from one thread; generate() may be called from any",
                rank=self.rank,
            )
        assert self._rounds is not None
        try:
            self._current_call = what
            self._place.has_shared_error = False
            call = Call(
                what=what,
                began=time.time(),
                deadline=Deadline.after(self.timeout_s if timeout_s is None else timeout_s),
                limit="timeout_s of init()" if timeout_s is None else "timeout_s of this call",
                is_patient=timeout_s is None and self._rounds.see_all(),
                quiet_s=quiet_s,
                watched=self._place.key,
            )
            return self._exchange(data, call, self._rounds)
        except RankLostError:
            self._place.has_shared_error = True
            raise
        finally:
            self._call_lock.release()

    def _check_process(self, what: str) -> None:
        """Refuse calls of a forked process: its copy of the group's connections is the parent's.

        Raises:
            ConfigError: This is not the process that made the group.
        """
        if os.getpid() != self._pid:
            raise ConfigError(
                f"cannot {what}: process {os.getpid()} was forked from process {self._pid} of rank {self.rank}, "
                "which alone can make collective calls",
                hint="make collective calls in the process that called init(); generate() may be called in any",
                rank=self.rank,
            )

    def _check_not_closed(self, what: str) -> None:
        if self._is_closed:
            raise ConfigError(f"cannot {what} after close()", hint="call init() again, on all ranks", rank=self.rank)

    def _exchange(self, data: bytes, call: Call, rounds: Rounds) -> list[bytes]:
        limit_s = math.inf if call.is_patient else call.deadline.timeout_s
        head = _HEAD.pack(len(data), call.began, limit_s, self._place.goes_on, call.what.encode())
        inline = _padded(head + data[: _FRAME_BYTES - _HEAD.size], _FRAME_BYTES)
        while True:
            is_behind, self._place.is_behind = self._place.is_behind, False
            frames = [frame.numpy().tobytes() for frame in rounds.exchange(inline, (call.what, data, 0), call)]
            heads = [_HEAD.unpack_from(frame) for frame in frames]
            waits = [(began, limit) for _, began, limit, *_ in heads]
            others_go_on = any(goes_on for _, _, _, goes_on, _ in heads)
            try:
                rounds.check_not_given_up(waits, is_watched=call.watched is not None)
                self._check_same_call([name.rstrip(b"\0") for *_, name in heads])
                break
            except RankLostError as error:
                if not is_behind or self._place.goes_on or not others_go_on:
                    raise
                logger.info("rank %d passes over a round of a call that it has left: %s", self.rank, error.message)
        sizes = [size for size, *_ in heads]
        blobs = [frame[_HEAD.size :] for frame in frames]
        if (largest := max(sizes)) > _FRAME_BYTES - _HEAD.size:
            blobs = [
                blob.numpy().tobytes() for blob in rounds.exchange(_padded(data, largest), (call.what, data, 1), call)
            ]
            rounds.check_not_given_up(waits, is_watched=call.watched is not None)
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
            hint="make sleep, wake, sync_weights and the like on every rank, in the same order, never under `if rank == 0`; "
            "a rank may also have left one with an error of its own",
            slice_ranks=self.ranks,
        )

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
        self._check_process(what)
        if error is None:
            self._check_not_closed(what)
        self._place.has_shared_error = False
        report = None if error is None else ErrorReport.of(error, self.rank)
        try:
            data = pickle.dumps((report, value))
        except Exception as unpicklable:  # reported to the others, which already wait
            error = unpicklable if error is None else error
            report = ErrorReport.of(unpicklable, self.rank)
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
        reports = [one for one, _ in outcomes if one is not None]
        self._place.has_shared_error = bool(reports)
        raise_first(reports, error, rank=self.rank)
        return [outcome for _, outcome in outcomes]  # type: ignore[misc]

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
            texts = {name: repr(value) for name, value in must_match.items()}
        except BaseException as error:
            self.agree(error, {}, what=what, timeout_s=timeout_s)
            raise  # not reached unless the group is of one and agree returned
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


def raise_first(reports: Sequence[ErrorReport], error: BaseException | None, *, rank: int) -> None:
    """Raise the first error of any rank, on every rank the same; return if there is none.

    Args:
        reports: Of the ranks that have an error, as all ranks have them.
        error: This rank's own.
        rank: This global rank.
    """
    first = min(reports, key=lambda one: one.order, default=None)
    if first is None:
        return
    if error is not None and not isinstance(error, Exception):
        raise error  # KeyboardInterrupt and SystemExit keep their class on the rank that got them
    if error is not None and first.rank == rank:
        if isinstance(error, TpColocateError):
            raise error  # not the copy that came back, which would be shown below it as another error
        raise first.error from error
    raise first.error


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """An error as it is sent to the other ranks."""

    rank: int
    time: float
    error: TpColocateError

    @property
    def order(self) -> tuple[bool, float, int]:
        # A rank that lost its peers is never the cause, whether it failed before or after them.
        return isinstance(self.error, RankLostError), self.time, self.rank

    @classmethod
    def of(cls, error: BaseException, rank: int) -> ErrorReport:
        if isinstance(error, TpColocateError):
            if error.rank is None:
                error.rank = rank
            portable: TpColocateError = error
        else:
            portable = RankFailedError(_text_of(error), rank=rank, details=_details_of(error))
        return cls(rank, time.time(), portable)


def _text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _details_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _padded(data: bytes, num_bytes: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data.ljust(num_bytes, b"\0")), dtype=torch.uint8)


__all__ = ["ErrorReport", "RankGroup", "raise_first"]
