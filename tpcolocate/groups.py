"""Ranks -> tp slices -> process groups, and agreement between the ranks of a group.

Three steps, each with its own failure:

* `exchange`: every rank publishes what it knows of itself through the store of the default process
  group and reads what the others published.  No collective is involved, so a rank that never
  arrives is named instead of timed out on.
* `plan_slices`: pure.  Every rank computes the same slices, or the same error, from the same list.
* `make_group`: `torch.distributed.new_group`, called by all ranks for all slices in one order.
  Groups made in different orders pair up wrongly and return wrong data without an error, which is
  why nothing here makes a group before the layouts were compared.

`RankGroup` then is what the rest of the library speaks through.  Its calls carry a deadline, notice
a dead member or one that is in another call, and turn one rank's exception into the same exception on
all of them.
"""

from __future__ import annotations

import json
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from tpcolocate import errors
from tpcolocate.errors import LayoutError, RankFailedError, RankLostError, TpColocateError

T = TypeVar("T")

# One gloo round carries this many bytes a rank; an ok-or-error nearly always fits, and so does what is told of a
# bucket, so that agreement costs one round, which takes as long for 2 KiB as for 16, and not a size exchange before it.
_FRAME_BYTES = 8192
# Of what a rank says it is doing, so that ranks which meet from different calls see it.
_NAME_BYTES = 119
# How long one wait lasts before the members are looked at.  gloo notices a closed connection by
# itself; this is for the peer that died before its connection was made.
_LOOK_INTERVAL_S = 1.0
_EXIT_S = 0.5
_BACKEND_MARGIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Host:
    """Where a rank runs, measured: two ranks can share a server only if all of this agrees.

    Attributes:
        boot_id: Identity of the running kernel.
        network: Network namespace; the server listens on its loopback.
        shm: Device number of /dev/shm; torch's CUDA-IPC counters and CPU handles live there.
        pids: PID namespace; not compared for a server, but process ids mean nothing across it.
        name: Host name, for people; not compared.
    """

    boot_id: str
    network: str
    shm: str
    name: str
    pids: str = ""

    @classmethod
    def here(cls) -> Host:
        """Measure the calling process."""
        return cls(
            boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            network=os.readlink("/proc/self/ns/net"),
            shm=str(os.stat("/dev/shm").st_dev),
            name=os.uname().nodename,
            pids=os.readlink("/proc/self/ns/pid"),
        )

    @property
    def identity(self) -> str:
        """One string that is equal exactly on ranks that can share a server."""
        return "/".join((self.boot_id, self.network, self.shm))

    def sees(self, other: Host) -> bool:
        """Whether process ids of the one mean the same to the other."""
        return (self.boot_id, self.pids) == (other.boot_id, other.pids)

    @property
    def label(self) -> str:
        """The machine, for people; two machines of one name differ in it all the same."""
        return f"{self.name}-{self.boot_id[:8]}"


@dataclass(frozen=True, slots=True)
class Member:
    """One rank, as the others know it."""

    rank: int
    world_size: int
    tp_size: int
    host: Host
    pid: int
    started: int
    """Start of the process in clock ticks since boot (`start_of`); with `pid` it identifies the process."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Whatever else the caller exchanges; JSON types."""
    error: dict[str, str | None] | None = None
    """Set when the rank found its own situation impossible (class, message and hint of a `ConfigError`): told to all
    instead of leaving them waiting."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Member:
        fields = json.loads(text)
        return cls(**{**fields, "host": Host(**fields["host"])})

    def is_running(self) -> bool:
        """Whether the process still exists; meaningful on its own host and pid namespace only."""
        return start_of(self.pid) == self.started


def exchange(store: dist.Store, member: Member, *, timeout_s: float) -> list[Member]:
    """Publish this rank's description and read everybody's.

    Collective: over all ranks that share `store`.

    Args:
        store: A store that no earlier exchange used with the same prefix.
        member: This rank.
        timeout_s: How long to wait for the slowest rank, in seconds.

    Returns:
        One `Member` per rank, in rank order.

    Raises:
        RankLostError: Some ranks never published; the message names them.
    """
    store.set(str(member.rank), member.to_json())
    keys = [str(rank) for rank in range(member.world_size)]
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except (RuntimeError, dist.DistStoreError) as error:
        missing = [int(key) for key in keys if not store.check([key])]
        raise RankLostError(
            f"ranks {_list(missing)} did not call tpcolocate.init() within {timeout_s:g} s",
            hint="every rank of the default process group must call init(); look for an earlier error on those ranks",
            rank=member.rank,
        ) from error
    return [Member.from_json(store.get(key).decode()) for key in keys]


def plan_slices(members: Sequence[Member]) -> list[tuple[int, ...]]:
    """Cut the ranks into tp slices of consecutive ranks.  Pure: the same answer or error everywhere.

    Args:
        members: All ranks of the job, in rank order.

    Returns:
        Global ranks of each slice, ascending.

    Raises:
        LayoutError: The ranks disagree on ``tp_size``, their number is no multiple of it, or a slice would span hosts
            or containers.
        ConfigError: A rank reported an error of its own, of the class that it names.
    """
    for member in members:
        if member.error is not None:
            kind = getattr(errors, str(member.error["kind"]))
            raise kind(str(member.error["message"]), hint=member.error["hint"], rank=member.rank)
    sizes: dict[int, list[int]] = {}
    for member in members:
        sizes.setdefault(member.tp_size, []).append(member.rank)
    if len(sizes) > 1:
        views = "; ".join(f"tp_size={size} on ranks {_list(ranks)}" for size, ranks in sorted(sizes.items()))
        raise LayoutError(f"the ranks disagree on tp_size: {views}", hint="pass the same tp_size on every rank")
    tp_size, world_size = members[0].tp_size, len(members)
    if world_size % tp_size:
        usable = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise LayoutError(
            f"{world_size} ranks cannot be cut into tp slices of {tp_size}",
            hint=f"tp_size must divide the number of ranks: {_list(usable)}",
        )
    slices = [tuple(range(start, start + tp_size)) for start in range(0, world_size, tp_size)]
    for ranks in slices:
        _check_one_host([members[rank] for rank in ranks])
    return slices


def _check_one_host(members: Sequence[Member]) -> None:
    if len({member.host.identity for member in members}) == 1:
        return
    ranks = tuple(member.rank for member in members)
    if len({member.host.boot_id for member in members}) > 1:
        where = ", ".join(f"rank {m.rank} on {m.host.name}" for m in members)
        raise LayoutError(
            f"a tp slice would span hosts: {where}",
            hint="choose a tp_size that divides the number of ranks per host, and start ranks host by host as torchrun does",
            slice_ranks=ranks,
        )
    what = "network namespaces" if len({m.host.network for m in members}) > 1 else "/dev/shm mounts"
    raise LayoutError(
        f"the ranks of a tp slice run on one machine but in different {what}",
        hint="run the ranks of a slice in one container, or share its network and IPC namespaces (for example --network host --ipc host)",
        slice_ranks=ranks,
    )


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) if ranks else "(none)"


def make_group(ranks: Sequence[int], *, timeout_s: float, description: str) -> dist.ProcessGroup | None:
    """`new_group` on the CPU backend, whatever the training backend is.

    Collective: over the default process group, members and others alike, in the same order everywhere.

    Args:
        ranks: Global ranks of the group.
        timeout_s: Timeout of every operation of the group, in seconds.  `new_group` does not inherit
            the default group's.
        description: Shown by torch in its own errors.

    Returns:
        The group, or None on ranks that are no members.
    """
    group = dist.new_group(sorted(ranks), timeout=timedelta(seconds=timeout_s), backend="gloo", group_desc=description)
    return group if dist.get_rank() in ranks else None


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
        """
        if self.group is None:
            return [value]
        # Only members of this group can have sent these bytes.
        return [pickle.loads(blob) for blob in self._all_gather_bytes(pickle.dumps(value), what, timeout_s)]

    def _all_gather_bytes(self, data: bytes, what: str, timeout_s: float | None) -> list[bytes]:
        name = what.encode()[:_NAME_BYTES]
        head = len(data).to_bytes(8, "little") + len(name).to_bytes(1, "little") + name.ljust(_NAME_BYTES)
        inline = data[: _FRAME_BYTES - len(head)]
        frame = torch.zeros(_FRAME_BYTES, dtype=torch.uint8)
        frame[: len(head) + len(inline)] = _bytes_tensor(head + inline)
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        frames = self._round(frame, what, deadline)
        heads = [f[: len(head)].numpy().tobytes() for f in frames]
        self._check_same_call([h[9 : 9 + h[8]].decode(errors="replace") for h in heads])
        sizes = [int.from_bytes(h[:8], "little") for h in heads]
        largest = max(sizes)
        if largest > _FRAME_BYTES - len(head):
            padded = torch.zeros(largest, dtype=torch.uint8)
            padded[: len(data)] = _bytes_tensor(data)
            blobs = [blob[:size].numpy().tobytes() for blob, size in zip(self._round(padded, what, deadline), sizes)]
        else:
            blobs = [f[len(head) : len(head) + size].numpy().tobytes() for f, size in zip(frames, sizes)]
        return [blobs[position] for position in self._positions]

    def _check_same_call(self, names: list[str]) -> None:
        """Refuse ranks that met in one round, but from different calls.  Pure: every rank comes to the same error.

        Args:
            names: What each rank is doing, in torch's order.
        """
        if len(set(names)) == 1:
            return
        said = "; ".join(f"rank {rank} would {names[i]}" for rank, i in zip(self.ranks, self._positions))
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
                    raise RuntimeError(f"ranks {_list(gone)} have exited")
                if time.monotonic() >= deadline:
                    raise RuntimeError("some rank did not come")
        except RuntimeError as error:
            elapsed = time.monotonic() - started
            gone = self._gone()
            why = f"rank {_list(gone)} has exited" if gone else str(error).strip().splitlines()[0]
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
    def together(self, what: str, *, timeout_s: float | None = None) -> Iterator[None]:
        """Run the body on every rank, then `agree` on how it went.

        Raises:
            TpColocateError: As `agree`.
        """
        try:
            yield
        except BaseException as error:
            self.agree(error, what=what, timeout_s=timeout_s)
            raise  # not reached unless the group is of one and agree returned
        self.agree(None, what=what, timeout_s=timeout_s)

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


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def this_process() -> tuple[int, int]:
    """Pid and start time, which together identify this process."""
    pid = os.getpid()
    started = start_of(pid)
    assert started is not None
    return pid, started


def start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it has ended, whether or not its parent has noticed.

    Not in seconds since the epoch: those are computed from the clock, and a clock that is set makes every process
    look like another one.  Field 22 of /proc/PID/stat; see proc(5).
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()  # the name before it may hold spaces and brackets
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


__all__ = [
    "Host",
    "Member",
    "RankGroup",
    "exchange",
    "make_group",
    "plan_slices",
    "start_of",
    "this_process",
]
