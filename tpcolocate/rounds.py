"""Rounds of a group: one allgather of gloo each, watched while it waits.

gloo closes a group's connections when an operation times out, so its operations have no timeout of use here: the ranks
watch the clock and each other's processes themselves.  A rank that gives a round up leaves its operation pending; the
ranks that come later complete it, and find in the store that it was given up.  All have then left the same round with
the same error, and the next one works.
"""

from __future__ import annotations

import ctypes
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from tpcolocate.deadline import Deadline
from tpcolocate.errors import RankLostError
from tpcolocate.groups import WARN_AFTER_S, WARN_INTERVAL_S, Member, list_ranks, named_ranks
from tpcolocate.presence import Presence
from tpcolocate.processes import raised_by_handler

logger = logging.getLogger(__name__)

# How long one wait lasts before the members' processes are checked.  gloo itself notices a closed connection; this is
# for the peer that died before its connection was made.
_CHECK_INTERVAL_S = 1.0
_EXIT_S = 0.5
# gloo would close the connections after it.
_GLOO_TIMEOUT = timedelta(days=300)
_COMPLETE = "complete"


@dataclass(frozen=True, slots=True)
class Call:
    """One collective call of this rank.

    Attributes:
        what: Name of the call.
        began: In `time.time`, which ranks of several hosts can compare.
        deadline: After which the round is given up, unless `is_patient`.
        limit: The argument that the deadline comes from, for messages.
        is_patient: Wait for as long as the processes of all members are running.
        quiet_s: How long members may be missing without a warning, in seconds.
        watched: What members may leave with `Rounds.leave`, which ends the round for the others; None for nothing.
    """

    what: str
    began: float
    deadline: Deadline
    limit: str
    is_patient: bool
    quiet_s: float
    watched: str | None = None


@dataclass(frozen=True, slots=True)
class _Pending:
    """An operation that this rank has begun.

    Attributes:
        number: Of the round.
        sent: What identifies it: name and content of the call, and the number of its part.
        work: Of gloo.
        outputs: Filled by it.
        started: In `time.monotonic`.
    """

    number: int
    sent: tuple[str, bytes, int]
    work: dist.Work
    outputs: list[torch.Tensor]
    started: float


class Rounds:
    """The rounds of one group, which all ranks make in the same order.  Collective: `exchange`, over all members.

    Args:
        members: The ranks.
        rank: Global rank of this process.
        group: A gloo group of exactly these ranks.
    """

    def __init__(self, members: Sequence[Member], *, rank: int, group: dist.ProcessGroup) -> None:
        self._members = members
        self._ranks = tuple(member.rank for member in members)
        self._rank = rank
        self._group = group
        self._host = members[self._ranks.index(rank)].host
        self._number = 0
        self._interrupted: _Pending | None = None
        self._broken: str | None = None
        default = dist.distributed_c10d._get_default_store()
        self._presence = Presence(dist.PrefixStore(f"tpcolocate/presence/{group.group_name}", default), rank=rank)

    def leave(self, key: str, why: str) -> None:
        """Let the others know that this rank comes to no more rounds of what a key stands for.  Not collective."""
        self._presence.leave(key, why)

    def left(self, key: str) -> str | None:
        """Return why a rank has left, or None.  Not collective."""
        return self._presence.left(key)

    def see_all(self) -> bool:
        """Return whether this rank sees the processes of all members."""
        return all(member.host.sees(self._host) for member in self._members)

    def exchange(self, tensor: torch.Tensor, sent: tuple[str, bytes, int], call: Call) -> list[torch.Tensor]:
        """Return every rank's tensor, in the order of torch's group ranks.

        Args:
            tensor: 1-D uint8, of one size on all ranks.
            sent: What identifies it: name and content of the call, and the number of its part.  A round that was
                interrupted on this rank, as by Ctrl-C, is resumed by the same call.
            call: That this round is of.

        Raises:
            RankLostError: A member has exited or its connection is closed, and the group is unusable afterwards.  Or the
                round was given up.
        """
        if self._broken is not None:
            raise RankLostError(
                f"cannot {call.what}: the group is unusable since {self._broken}",
                hint="restart the job; see the first error of every rank",
                rank=self._rank,
                slice_ranks=self._ranks,
            )
        started = time.monotonic()
        pending, self._interrupted = self._interrupted, None
        try:
            if pending is None or pending.sent != sent:
                self._number += 1
                outputs = [torch.empty_like(tensor) for _ in self._ranks]
                options = AllgatherOptions()  # through the group itself: only there an operation takes a timeout
                options.timeout = _GLOO_TIMEOUT
                work = self._group.allgather([outputs], [tensor], options)
                pending = _Pending(self._number, sent, work, outputs, started)
            self._wait_for_members(pending, call)
        except RuntimeError as error:
            if pending is not None and raised_by_handler(error) is not None:
                self._leave_pending(pending, is_resumed=True)
                raise
            elapsed = time.monotonic() - started
            if pending is not None and not pending.work.is_completed():
                _keep_alive(self._group, pending)
            exited = self._exited_soon()
            why = f"rank {list_ranks(exited)} has exited" if exited else str(error).strip().splitlines()[0]
            self._broken = f"{call.what!r} failed ({why})"
            raise RankLostError(
                f"{call.what}: lost contact with other ranks after {elapsed:.1f} s: {why}",
                hint="the cause is the first error printed by another rank"
                if exited
                else "a rank has called close(), or left `with init():` by an error that it has caught, or its connection was "
                "lost, or the store of the process group does not answer; see the output of the other ranks",
                rank=self._rank,
                slice_ranks=self._ranks,
            ) from error
        except BaseException as error:  # such as KeyboardInterrupt
            self._leave_pending(pending, is_resumed=not isinstance(error, RankLostError))
            raise
        return pending.outputs

    def _leave_pending(self, pending: _Pending | None, *, is_resumed: bool) -> None:
        """Leave an operation in which the others may still be.

        Args:
            is_resumed: By the same call: the others do not know that this rank has left it.
        """
        if pending is not None:
            _keep_alive(self._group, pending)
            if is_resumed:
                self._interrupted = pending

    def _wait_for_members(self, pending: _Pending, call: Call) -> None:
        """Wait until a round is complete.

        Raises:
            RuntimeError: A member has exited, or gloo has lost a connection.
            RankLostError: The round was given up.
        """
        warn_after = max(WARN_AFTER_S, call.quiet_s)
        is_published = False
        while not self._wait(pending.work, self._interval(call)):
            if exited := self._exited():
                raise RuntimeError(f"{named_ranks(exited)} exited")
            waited = time.monotonic() - pending.started
            if not is_published and waited >= min(_CHECK_INTERVAL_S, call.deadline.timeout_s / 2):
                self._presence.publish(pending.number)
                is_published = True
            if waited >= warn_after:
                self._warn(pending, call, waited)
                warn_after += WARN_INTERVAL_S
            if call.watched is not None and self.left(call.watched) is not None:
                self._give_up(pending, call, waited, "a rank has left the call")
            if call.deadline.has_passed and not call.is_patient:
                missing = self._awaited(pending.number)[1]
                why = f"some rank did not join within {call.deadline.timeout_s:g} s ({call.limit}): {missing}"
                self._give_up(pending, call, waited, why)

    @staticmethod
    def _interval(call: Call) -> float:
        if call.is_patient:
            return _CHECK_INTERVAL_S
        # torch rounds down to milliseconds, and 0 is no timeout
        return max(0.002, min(_CHECK_INTERVAL_S, call.deadline.timeout_s / 2, call.deadline.left()))

    def _awaited(self, number: int) -> tuple[list[int], str]:
        """Return the ranks that a round waits for, as far as known, and their description."""
        stopped = [m.rank for m in self._members if m.host.sees(self._host) and m.is_stopped()]
        absent = self._presence.absent(self._ranks, number)
        awaited = sorted({*stopped, *(absent if absent is not None else ())})
        if not awaited:
            return [], "which ranks are missing is not known"
        named = ", ".join(f"{rank} (its process is stopped)" if rank in stopped else str(rank) for rank in awaited)
        return awaited, f"rank {named} is missing" if len(awaited) == 1 else f"ranks {named} are missing"

    def _warn(self, pending: _Pending, call: Call, waited: float) -> None:
        awaited, named = self._awaited(pending.number)
        if min((rank for rank in self._ranks if rank not in awaited), default=self._rank) != self._rank:
            return  # one rank warns for all that wait
        until = f"until {call.deadline.timeout_s:g} s ({call.limit})"
        if call.is_patient:
            past = f", longer than {call.deadline.timeout_s:g} s ({call.limit})" if call.deadline.has_passed else ""
            until = f"for as long as their processes are running{past}"
        logger.warning("%s: rank %d has waited %.0f s: %s; it waits %s", call.what, self._rank, waited, named, until)

    def _give_up(self, pending: _Pending, call: Call, waited: float, why: str) -> None:
        """Give a round up for all ranks, unless it is complete on one.

        Raises:
            RankLostError: The round is given up; the same on every rank.
            RuntimeError: The other ranks cannot be informed.
        """
        ours = json.dumps({"rank": self._rank, "what": call.what, "seconds": waited, "why": why})
        outcome = self._presence.decide(pending.number, ours)
        if outcome is None:
            raise RuntimeError(why)
        if outcome != _COMPLETE:
            raise self._given_up(outcome)

    def _given_up(self, outcome: str) -> RankLostError:
        fields = json.loads(outcome)
        return RankLostError(
            f"{fields['what']}: lost contact with other ranks after {fields['seconds']:.1f} s: {fields['why']}",
            hint="a rank is in another call (py-spy dump --pid PID shows in which), or slower than timeout_s of this one; every "
            "rank must make the same calls, and may now make this one again",
            rank=fields["rank"],
            slice_ranks=self._ranks,
        )

    def _exited_soon(self) -> list[int]:
        """Return `_exited`, waiting a moment for it: a socket closes before its process has exited."""
        deadline = Deadline.after(_EXIT_S)
        while not (exited := self._exited()) and not deadline.has_passed:
            time.sleep(0.01)
        return exited

    def _exited(self) -> list[int]:
        """Return members of this PID namespace that have exited; elsewhere only the closed socket shows it."""
        return [m.rank for m in self._members if m.host.sees(self._host) and not m.is_running()]

    @staticmethod
    def _wait(work: dist.Work, seconds: float) -> bool:
        try:
            work.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            if raised_by_handler(error) is not None:  # torch's for SIGCHLD does, when a data loader's worker was killed
                raise
            if not work.is_completed():
                return False  # not complete yet
            # It failed, or completed after the wait had timed out: wait again to find out.
            work.wait(timedelta(seconds=seconds))
        return True

    def check_not_given_up(self, waits: Sequence[tuple[float, float]], *, is_watched: bool) -> None:
        """Check that no rank has given up the round that is complete here.

        Only when one can have: when it has waited for half of its limit, which leaves the other half for differences
        between the hosts' clocks; or at any time in a call that ranks may leave.

        Args:
            is_watched: Whether they may.
            waits: Of each rank, since when it waits and for how long at most.

        Raises:
            RankLostError: As on the rank that has given up.
        """
        now = time.time()
        if not is_watched and not any(abs(now - began) > limit / 2 for began, limit in waits):
            return
        outcome = self._presence.decide(self._number, _COMPLETE)
        if outcome not in (None, _COMPLETE):
            raise self._given_up(str(outcome))


def _keep_alive(*objects: object) -> None:
    """Keep objects until the process ends, and through that.

    A gloo group that is deleted waits for its operations, without a deadline: for ranks that may never come.  So would
    the interpreter at its end.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(objects))


__all__ = ["Call", "Rounds"]
