"""Ranks -> tp slices -> process groups.

Three steps, each with its own failure:

* `exchange`: every rank publishes a description of itself in the store of the default process group and reads the
  others'.  No collective is involved, so the error of a timeout can name the missing ranks.
* `plan_slices`: pure.  Every rank computes the same slices, or the same error, from the same list.
* `make_group`: `torch.distributed.new_group`, called by all ranks for all slices in one order.  Groups created in
  different orders pair up wrongly and return wrong data without an error, so layouts are compared before any is created.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tpcolocate import errors
from tpcolocate.deadline import Deadline
from tpcolocate.errors import ConfigError, LayoutError, RankLostError
from tpcolocate.interfaces import loopback_device
from tpcolocate.parallel import in_background
from tpcolocate.processes import is_stopped, start_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

WARN_AFTER_S = 10.0
"""When a warning names the ranks that are awaited."""
WARN_INTERVAL_S = 60.0
"""How often it is repeated."""

# How often a rank that waits looks whether another one has given the wait up.
_LOOK_S = 1.0
_OUTCOME = "outcome"
_COMPLETE = "complete"

# How long a store that answers takes at most.
_STORE_S = 1.5
_POLL_INTERVAL_S = 0.05
_FILE_S = 5.0
# Between ranks that have just met.
_CONNECT_ANEW_S = 60.0


@dataclass(frozen=True, slots=True)
class Host:
    """Where a rank runs; two ranks can share a server only if `identity` is equal.

    Attributes:
        boot_id: Identity of the running kernel.
        network: Network namespace; the server listens on its loopback.
        shm: Device number of /dev/shm; torch's CUDA-IPC counters and CPU handles live there.
        pids: PID namespace; not part of `identity`, but process ids are valid inside it only.
        name: Host name, for messages.
    """

    boot_id: str
    network: str
    shm: str
    name: str
    pids: str = ""

    @classmethod
    def here(cls) -> Host:
        """Describe the host of the calling process.

        Raises:
            OSError: There is no /dev/shm, or /proc is incomplete.
        """
        return cls(
            boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            network=os.readlink("/proc/self/ns/net"),
            shm=str(os.stat("/dev/shm").st_dev),
            name=os.uname().nodename,
            pids=os.readlink("/proc/self/ns/pid"),
        )

    @classmethod
    def unknown(cls) -> Host:
        """Return what stands for a host that cannot be described."""
        return cls(boot_id="unknown", network="", shm="", name=os.uname().nodename)

    @property
    def identity(self) -> str:
        """A string that is equal exactly on ranks that can share a server."""
        return "/".join((self.boot_id, self.network, self.shm))

    def sees(self, other: Host) -> bool:
        """Return whether both are in one PID namespace, so that process ids are valid in both."""
        return (self.boot_id, self.pids) == (other.boot_id, other.pids)

    @property
    def label(self) -> str:
        """Name of the machine for messages; unique even if two machines have one host name."""
        return f"{self.name}-{self.boot_id[:8]}"


@dataclass(frozen=True, slots=True)
class Member:
    """One rank's description of itself."""

    rank: int
    world_size: int
    tp_size: int
    host: Host
    pid: int
    started: int
    """Start of the process in clock ticks since boot (`start_of`); with `pid` it identifies the process."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Anything else that the caller exchanges; JSON types."""
    error: dict[str, str | None] | None = None
    """Class, message and hint of a `ConfigError` of this rank, reported to all so that they do not wait for it."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Member:
        """Return the member that another rank has described.

        Raises:
            ConfigError: It is something else, as from another version of this library.
        """
        try:
            fields = json.loads(text)
            member = cls(**{**fields, "host": Host(**fields["host"])})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise _not_understood(f"{type(error).__name__}: {error}") from error
        numbers = (member.rank, member.world_size, member.tp_size, member.pid)
        host = member.host
        texts = host.boot_id, host.network, host.shm, host.name, host.pids
        if not all(type(number) is int for number in numbers) or not isinstance(member.started, int | float):
            raise _not_understood(f"rank, world_size, tp_size, pid or started is not a number: {numbers}")
        if not all(isinstance(text, str) for text in texts) or not isinstance(member.facts, dict):
            raise _not_understood("host or facts are of another kind")
        if member.error is not None:
            error_of(member.error, member.rank)
        return member

    def is_running(self) -> bool:
        """Return whether the process still exists.  Valid in its own PID namespace only (`Host.sees`)."""
        return start_of(self.pid) == self.started

    def is_stopped(self) -> bool:
        """Return whether the process exists and is stopped, as by SIGSTOP.  Valid as `is_running`."""
        return self.is_running() and is_stopped(self.pid)


def _not_understood(why: str) -> ConfigError:
    return ConfigError(
        f"the description of a rank is not understood: {why[:200]}",
        hint="install one version of tpcolocate on all hosts",
    )


def exchange(store: dist.Store, member: Member, *, timeout_s: float) -> list[Member]:
    """Publish this rank's description and read those of all ranks.

    Collective: over all ranks that share `store`.

    Args:
        store: One whose prefix no earlier exchange has used.
        member: This rank.
        timeout_s: How long to wait for the slowest rank, in seconds.

    Returns:
        One `Member` per rank, in rank order.

    Raises:
        RankLostError: Some ranks did not publish in time; the message names them.
    """
    texts = _publish_and_wait(
        store, member.to_json(), member.world_size, timeout_s, member.rank, "call tpcolocate.init()"
    )
    return [Member.from_json(text) for text in texts]


def count_call(store: dist.Store, *, rank: int, timeout_s: float) -> int:
    """Return how often this rank has called this with a store: the same on ranks that make the same calls.

    Not a count of this process: of two ranks, one may have been in a job without the other before.

    Raises:
        RankLostError: The store does not answer.
    """
    return _answer_of_store(lambda: store.add(str(rank), 1), timeout_s=timeout_s, rank=rank)


def _publish_and_wait(
    store: dist.Store, text: str, world_size: int, timeout_s: float, rank: int, what: str
) -> list[str]:
    """Publish a text for this rank, and return those of all ranks, in rank order.

    While it waits, a warning a minute names the ranks that are awaited.  The first rank that is out of time gives the wait
    up for all, also for those that come later: they have the same error, and meet again in the next one.

    Raises:
        RankLostError: Some ranks did not publish in time; the message names them and `what` they did not do.  Or the store does
            not answer.
    """

    def publish_and_wait() -> list[str]:
        store.set(str(rank), text)
        return _wait_for_all(store, world_size, timeout_s, rank, what)

    return _answer_of_store(publish_and_wait, timeout_s=timeout_s, rank=rank)


def _answer_of_store(ask: Callable[[], T], *, timeout_s: float, rank: int) -> T:
    """Return what a request of the store of the default process group returns.

    Raises:
        RankLostError: Raised by the request; or the store does not answer.
    """
    # In a thread: a store whose process is stopped keeps a request for as long as that lasts.
    waiting = in_background(ask, name="tpcolocate init")
    if not wait([waiting], timeout_s + _STORE_S).done:
        raise RankLostError(
            f"the store of the default process group does not answer within {timeout_s:g} s (timeout_s of init())",
            hint="the process that has it, most often that of rank 0, is stopped; kill -CONT PID continues it",
            rank=rank,
        )
    try:
        return waiting.result()
    except RuntimeError as error:
        if isinstance(error, errors.TpColocateError):
            raise
        raise RankLostError(
            f"the store of the default process group does not answer: {str(error).strip().splitlines()[0]}",
            hint="the process that has it, most often that of rank 0, has ended; look for an earlier error there",
            rank=rank,
        ) from error


def _wait_for_all(store: dist.Store, world_size: int, timeout_s: float, rank: int, what: str) -> list[str]:
    deadline = Deadline.after(timeout_s)
    started = time.monotonic()
    keys = [str(r) for r in range(world_size)]
    warn_after = WARN_AFTER_S
    while True:
        try:
            step_s = max(min(deadline.left(), started + warn_after - time.monotonic(), _LOOK_S), 0.001)
            store.wait(keys, timedelta(seconds=step_s))
            _end_wait(store, _COMPLETE, what)
            return [store.get(key).decode() for key in keys]
        except RuntimeError as error:
            if isinstance(error, errors.TpColocateError):
                raise
            missing = [int(key) for key in keys if not store.check([key])]
            if store.check([_OUTCOME]):
                _end_wait(store, _COMPLETE, what)
            if missing and deadline.has_passed:
                _end_wait(store, json.dumps({"missing": missing, "timeout_s": timeout_s}), what)
            elif missing and time.monotonic() - started >= warn_after:
                warn_after += WARN_INTERVAL_S
                if min(set(range(world_size)) - set(missing)) == rank:
                    logger.warning(
                        "rank %d has waited %.0f s for %s to %s; it waits until %g s (timeout_s of init())",
                        rank, time.monotonic() - started, named_ranks(missing), what, timeout_s,
                    )  # fmt: skip


def _end_wait(store: dist.Store, outcome: str, what: str) -> None:
    """End a wait with an outcome, unless another rank has ended it.

    Raises:
        RankLostError: It is given up; the same on every rank.
    """
    found = store.compare_set(_OUTCOME, "", outcome).decode()
    if found == _COMPLETE:
        return
    given_up = json.loads(found)
    raise RankLostError(
        f"{named_ranks(given_up['missing'])} did not {what} within {given_up['timeout_s']:g} s (timeout_s of init())",
        hint="every rank of the default process group must call init(), and may now call it again; look for an earlier error on "
        "those ranks, or raise timeout_s",
    )


def plan_slices(members: Sequence[Member]) -> list[tuple[int, ...]]:
    """Divide the ranks into tp slices of consecutive ranks.  Pure: the same result or error on every rank.

    Args:
        members: All ranks of the job, in rank order.

    Returns:
        Global ranks of each slice, ascending.

    Raises:
        LayoutError: The ranks disagree on ``tp_size``, it does not divide their number, or a slice would span hosts or
            containers.
        ConfigError: A rank reported an error; of the class that it reported.
    """
    for member in members:
        if member.error is not None:
            raise error_of(member.error, member.rank)
    for rank, member in enumerate(members):
        if (member.rank, member.world_size) != (rank, len(members)):
            raise LayoutError(
                f"rank {member.rank} of {member.world_size} is listed as rank {rank} of {len(members)}",
                hint="call init() on every rank of one default process group",
            )
        if member.tp_size < 1:
            raise LayoutError(f"tp_size must be a positive integer, got {member.tp_size}", rank=rank)
    if not members:
        raise LayoutError("a job has no ranks")
    sizes: dict[int, list[int]] = {}
    for member in members:
        sizes.setdefault(member.tp_size, []).append(member.rank)
    if len(sizes) > 1:
        views = "; ".join(f"tp_size={size} on ranks {list_ranks(ranks)}" for size, ranks in sorted(sizes.items()))
        raise LayoutError(f"the ranks disagree on tp_size: {views}", hint="pass the same tp_size on every rank")
    tp_size, world_size = members[0].tp_size, len(members)
    if world_size % tp_size:
        usable = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise LayoutError(
            f"tp_size={tp_size} does not divide the {world_size} ranks of this job",
            hint=f"every tp_size ranks share one server: pass one of {list_ranks(usable)} to init(), or start another number of "
            "ranks (torchrun --nproc-per-node)",
        )
    slices = [tuple(range(start, start + tp_size)) for start in range(0, world_size, tp_size)]
    for ranks in slices:
        _check_one_host([members[rank] for rank in ranks])
    return slices


def error_fields(error: ConfigError | None) -> dict[str, str | None] | None:
    """Return an error in JSON types, for `Member.error`."""
    return None if error is None else {"kind": type(error).__name__, "message": error.message, "hint": error.hint}


def error_of(fields: Mapping[str, Any], rank: int) -> ConfigError:
    """Return the error of a rank from its `error_fields`.

    Raises:
        ConfigError: They are something else.
    """
    try:
        kind = getattr(errors, fields["kind"], None)
        message, hint = fields["message"], fields["hint"]
    except (TypeError, KeyError) as error:
        raise _not_understood(f"its error has other fields ({error})") from error
    if not (isinstance(kind, type) and issubclass(kind, ConfigError)) or not isinstance(message, str):
        raise _not_understood("its error is of another kind")
    return kind(message, hint=hint if isinstance(hint, str) else None, rank=rank)


def _check_one_host(members: Sequence[Member]) -> None:
    if len({member.host.identity for member in members}) == 1:
        return
    ranks = tuple(member.rank for member in members)
    if len({member.host.boot_id for member in members}) > 1:
        where = ", ".join(f"rank {m.rank} on {m.host.name}" for m in members)
        raise LayoutError(
            f"one server would span hosts: {where}",
            hint="a server uses the GPUs of one host: pass init() a tp_size that divides the number of ranks per host, and number "
            "the ranks host by host, as torchrun does",
            slice_ranks=ranks,
        )
    what = "network namespaces" if len({m.host.network for m in members}) > 1 else "/dev/shm mounts"
    raise LayoutError(
        f"ranks {list_ranks(ranks)} are to share a server and run on one machine, but in different {what}",
        hint="run them in one container, or start each container with --network host --ipc host --pid host",
        slice_ranks=ranks,
    )


def list_ranks(ranks: Sequence[int]) -> str:
    """List ranks in a message."""
    return ", ".join(map(str, ranks)) if ranks else "(none)"


def named_ranks(ranks: Sequence[int]) -> str:
    """Name ranks in a sentence."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list_ranks(ranks)}"


# A torch backend of this name is gloo on the loopback.
_LOOPBACK_BACKEND = "tpcolocate_gloo"
# When a group is made its ranks have just met, so that only its connections are awaited.
_CONNECT_S = 120.0
# How much longer than the connections their outcome is awaited.
_MARGIN_S = 30.0


def make_group(
    ranks: Sequence[int], *, timeout_s: float, description: str, on_loopback: bool = False
) -> dist.ProcessGroup | None:
    """Create a gloo group, whatever the training backend is.

    Collective: over the default process group, members and others alike, in the same order on all ranks.

    Args:
        ranks: Global ranks of the group.
        timeout_s: Timeout of every operation of the group, in seconds.
        description: Shown in torch's errors.
        on_loopback: Connect the ranks, which are in one network namespace, over its loopback, whatever
            GLOO_SOCKET_IFNAME is and the host's name resolves to.

    Returns:
        The group, or None on ranks that are not members.

    Raises:
        ConfigError: The ranks could not be connected.
    """
    backend = _loopback_backend() if on_loopback else "gloo"
    connect_s = min(timeout_s, _CONNECT_S)
    try:
        with _no_checks_of_torch():
            group = dist.new_group(
                sorted(ranks), timeout=timedelta(seconds=connect_s), backend=backend, group_desc=description
            )
    except RuntimeError as error:
        raise ConfigError(
            f"the ranks of {description!r} could not be connected within {connect_s:g} s: "
            f"{str(error).strip().splitlines()[0]}",
            hint="the hosts must reach each other at the addresses of their ranks, on any port",
            rank=dist.get_rank(),
        ) from error
    if dist.get_rank() not in ranks:
        return None
    group._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=timeout_s))
    return group


@contextmanager
def _no_checks_of_torch() -> Iterator[None]:
    """Make groups as without TORCH_DISTRIBUTED_DEBUG=DETAIL.

    With it torch wraps them in one that first waits, in C++ and with a deadline of its own, for all ranks to come to an
    operation: none could be watched, or given up.  The calls of this library are compared between the ranks anyway.
    """
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.OFF)
    try:
        yield
    finally:
        dist.set_debug_level(level)


def make_group_over_file(
    path: Path,
    ranks: Sequence[int],
    *,
    rank: int,
    timeout_s: float,
    deadline: Deadline,
    check: Callable[[], None] = lambda: None,
) -> dist.ProcessGroup:
    """Create a gloo group of ranks of one host that find each other by a file, without the default process group.

    For when a group of theirs has failed.  torch's own functions (`dist.all_reduce` and so on) do not take this one.

    Collective: over `ranks`, which may come at any time before the deadline.

    Args:
        path: Of the file, in a folder of this user alone; not used before.  The folder may come to be later.
        ranks: Global ranks of the group.
        rank: This one.
        timeout_s: Timeout of every operation of the group, in seconds.
        deadline: For all ranks to come.
        check: Called while this rank waits for the others; what it raises ends the wait.

    Raises:
        RankLostError: Not all ranks came in time, or they could not connect; the message names those that did not come.
    """
    order = sorted(ranks)
    while not path.parent.is_dir():
        _wait_on(deadline, check, "no rank has made the folder of the launch", rank)
    try:
        store = dist.FileStore(str(path), -1)
        store.set_timeout(timedelta(seconds=_FILE_S))  # another rank may give up, and remove the folder
        store.set(f"here/{rank}", "")
        while missing := [other for other in order if not store.check([f"here/{other}"])]:
            _wait_on(deadline, check, f"{named_ranks(missing)} did not come", rank)
        return _gloo(dist.PrefixStore("group", store), order.index(rank), len(order), timeout_s, name=str(path))
    except RuntimeError as error:
        if isinstance(error, errors.TpColocateError):
            raise
        raise RankLostError(f"the ranks of the slice could not be connected anew: {error}", rank=rank) from error


def _wait_on(deadline: Deadline, check: Callable[[], None], problem: str, rank: int) -> None:
    check()
    if deadline.has_passed:
        raise RankLostError(
            f"the slice's process group has failed and could not be made anew: {problem}",
            hint="see the output of the other ranks",
            rank=rank,
        )
    time.sleep(_POLL_INTERVAL_S)


def _gloo(store: dist.Store, rank: int, size: int, timeout_s: float, *, name: str) -> dist.ProcessGroup:
    options = _loopback_options(timedelta(seconds=min(timeout_s, _CONNECT_ANEW_S)))
    gloo = dist.ProcessGroup.BackendType.GLOO
    group = dist.ProcessGroup(store, rank, size)
    group._set_group_name(name)  # type: ignore[arg-type]
    group._set_default_backend(gloo)
    backend = dist.ProcessGroupGloo(store, rank, size, options)
    backend._set_default_timeout(timedelta(seconds=timeout_s))
    group._register_backend(torch.device("cpu"), gloo, backend)
    return group


def _loopback_backend() -> str:
    """Return the name of a backend of torch that is gloo on the loopback.

    ``new_group`` ignores ``pg_options`` for gloo (torch 2.13), whose device it takes from the environment and the host's
    name.  What it does take is a registered backend; registering one changes no default of torch.
    """
    if _LOOPBACK_BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(_LOOPBACK_BACKEND, _gloo_on_loopback, extended_api=True, devices=["cpu"])
    return _LOOPBACK_BACKEND


def _gloo_on_loopback(distributed: Any, _: object) -> dist.ProcessGroupGloo:
    options = _loopback_options(distributed.timeout)
    options.global_ranks_in_group = distributed.global_ranks_in_group
    options.group_name = distributed.group_id
    return dist.ProcessGroupGloo(distributed.store, distributed.group_rank, distributed.group_size, options)


def _loopback_options(timeout: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [loopback_device()]
    options._threads = 2  # as torch has for one device
    options._timeout = timeout
    return options


def share_outcome(
    store: dist.Store, error: errors.ConfigError | None, *, rank: int, world_size: int, timeout_s: float
) -> None:
    """Publish whether a step has failed on this rank, and raise the first error on all ranks.

    Collective: over all ranks that share `store`.

    Args:
        store: One whose prefix nothing else uses.
        error: This rank's, or None.
        rank: Global rank of this process.
        world_size: Number of ranks.
        timeout_s: How long to wait for the slowest rank, in seconds.

    Raises:
        ConfigError: Of the rank that failed first.
        RankLostError: Some ranks did not publish in time; the message names them.
    """
    # A rank that failed leaves the others to their timeouts, so that the first error is the cause.
    outcome = {} if error is None else {"time": time.time(), **(error_fields(error) or {})}
    texts = _publish_and_wait(
        store, json.dumps(outcome), world_size, timeout_s + _MARGIN_S, rank, "connect its tp slice"
    )
    failed = [(fields["time"], other, fields) for other, text in enumerate(texts) if (fields := json.loads(text))]
    if failed:
        _, other, fields = min(failed, key=lambda item: item[:2])
        raise error_of(fields, other)


__all__ = [
    "WARN_AFTER_S",
    "WARN_INTERVAL_S",
    "Host",
    "Member",
    "count_call",
    "error_fields",
    "exchange",
    "list_ranks",
    "make_group",
    "make_group_over_file",
    "named_ranks",
    "plan_slices",
    "share_outcome",
]
