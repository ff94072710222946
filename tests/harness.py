"""Run a function on several ranks, each a process of its own; no failure hangs or goes unreported.

Deadlines are nested: process group < rank deadline here < pytest-timeout < CI.  Every rank has a pipe and a
sentinel of its own, so that a killed rank is noticed at once and not through its peers' timeouts.

This module must not import torch: a rank's environment is set before torch is first imported there.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import gc
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
from footprint import SURVIVORS_TIMEOUT_S, described, kill, tagged

# What only needs to be imported: five seconds of CPU time for each rank, or once for all of them.
PRELOADED = ("torch", "torch.distributed", "pytest", "psutil", "tpcolocate")
# With CUDA some of these use it, and then no process can that is forked.
if metadata.version("torch").endswith("+cpu"):
    PRELOADED += (
        "torch.distributed.fsdp", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
        "transformers.models.qwen3.modeling_qwen3", "transformers.conversion_mapping", "peft",
    )  # fmt: skip
START_TIMEOUT_S = 120.0  # to start an interpreter and import torch, on a busy machine
GRACE_S = 20.0  # for the other ranks to finish by themselves after a first failure
DUMP_TIMEOUT_S = 20.0  # from SIGABRT to a written dump
# This process notices a death, but a rank records the time of its exception: the peers' "connection closed" can be a
# little older than the notice of the death that caused it.
DEATH_NOTICE_S = 5.0

RANKS_TAG = "TPC_TEST_RANKS"

_SCRUBBED_NAMES = frozenset({
    "RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
})  # fmt: skip
_SCRUBBED_PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL_", "SGLANG_", "TPCOLOCATE_")
_GPU_NAMES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES",
    "TPCOLOCATE_TEST_ARGS",
)  # fmt: skip
_gpu_environment: dict[str, str] = {}


def is_scrubbed(name: str) -> bool:
    """Return whether a variable would make a test depend on the machine or on a surrounding torchrun."""
    return name.upper() in _SCRUBBED_NAMES or name.startswith(_SCRUBBED_PREFIXES)


def keep_gpu_environment(environment: Mapping[str, str]) -> None:
    """Remember which GPUs the session may use, and how, before the environment is scrubbed."""
    _gpu_environment.clear()
    _gpu_environment.update({name: environment[name] for name in _GPU_NAMES if name in environment})


def gpu_environment() -> dict[str, str]:
    """Return the variables that GPU tests must pass on: without them they would use other people's GPUs."""
    return dict(_gpu_environment)


class RankDied(RuntimeError):
    """The rank's process ended without a result: it was killed by a signal, or exited."""


class RankOverran(TimeoutError):
    """The rank was still running at a deadline and was killed; the dump of its threads is attached."""


class RankRaised(RuntimeError):
    """An exception that could not be pickled; the message is the rank's traceback."""


@dataclass(frozen=True)
class Outcome:
    """The result of one rank.

    Args:
        rank: The rank.
        value: What the function returned; None if it did not return.
        error: What it raised, or RankDied, RankOverran, RankRaised; None if it returned.
        exitcode: Exit code of the process; negative for a signal.
        seconds: From the common start to the return, the exception or the end of the process.
        details: The rank's traceback, or the dump of its threads.
    """

    rank: int
    value: Any
    error: BaseException | None
    exitcode: int | None
    seconds: float
    details: str = ""


class RanksFailed(Exception):
    """At least one rank failed or left processes behind; the first cause is listed first.

    Args:
        outcomes: One for each rank.
        survivors: Descriptions of processes that outlived the ranks and were killed.
    """

    def __init__(self, outcomes: list[Outcome], survivors: tuple[str, ...] = ()) -> None:
        self.outcomes = outcomes
        self.survivors = survivors
        self.errors = {outcome.rank: outcome.error for outcome in outcomes if outcome.error is not None}
        self.exitcodes = {outcome.rank: outcome.exitcode for outcome in outcomes}
        super().__init__(_report(outcomes, survivors))


def _report(outcomes: list[Outcome], survivors: tuple[str, ...]) -> str:
    failed = sorted((outcome for outcome in outcomes if outcome.error is not None), key=_first_cause_first)
    fine = [str(outcome.rank) for outcome in outcomes if outcome.error is None]
    lines = []
    for outcome in failed:
        text = str(outcome.error).splitlines() or [""]
        lines.append(f"rank {outcome.rank} after {outcome.seconds:.2f} s: {type(outcome.error).__name__}: {text[0]}")
        lines += [f"    {line}" for line in (outcome.details.rstrip() or "\n".join(text[1:])).splitlines()]
    if failed:  # the first cause in the first line, which is all that pytest's summary shows
        lines.insert(0, f"{len(failed)} of {len(outcomes)} ranks failed, first {lines[0]}")
    if fine and failed:
        lines.append(f"returned: rank {', '.join(fine)}")
    lines += [f"still running after the ranks had ended (now killed): {survivor}" for survivor in survivors]
    return "\n".join(lines)


def _first_cause_first(outcome: Outcome) -> float:
    return outcome.seconds - (DEATH_NOTICE_S if isinstance(outcome.error, RankDied) else 0.0)


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    env: Mapping[str, str | None] | Callable[[int], Mapping[str, str | None]] | None = None,
    timeout_s: float = 60.0,
    backend: str = "gloo",
    init_group: bool = True,
    expect_errors: bool = False,
    start_method: str = "forkserver",
) -> list[Any]:
    """Call ``fn(rank, *args)`` on every rank, each in a process of its own.

    The ranks have a scrubbed environment with RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE set, one torch
    thread, and a default process group whose timeout is three quarters of ``timeout_s``.  They start together,
    once all of them have imported torch; ``timeout_s`` is measured from there.

    Args:
        fn: A function at the top level of its module.
        world_size: Number of ranks.
        *args: More arguments; pickled.
        env: Variables, or a function from the rank to them; None as a value removes a variable.
        timeout_s: Deadline of the ranks in seconds.
        backend: Backend of the default process group.
        init_group: Whether to make the default process group before ``fn`` is called.
        expect_errors: Return an ``Outcome`` per rank instead of raising for failed ranks.
        start_method: "forkserver" forks ranks from a process that has only imported torch and pytest, which saves
            seconds per rank; "spawn" starts an interpreter per rank, with its own hash seed and torch imported
            under the rank's environment.

    Returns:
        The ranks' return values by rank, or their outcomes.

    Raises:
        RanksFailed: A rank failed and no errors were expected, or a process that a rank started outlived it.
    """
    folder = Path(tempfile.mkdtemp(prefix="tpc-ranks-"))
    tag = uuid.uuid4().hex
    job = pickle.dumps((fn, args))
    ranks: list[_Rank] = []
    try:
        for rank in range(world_size):
            ranks.append(
                _Rank(rank, start_method, {
                    "job": job, "env": _rank_env(rank, world_size, env, tag), "folder": str(folder), "rank": rank,
                    "world_size": world_size, "backend": backend if init_group else None,
                    "group_timeout_s": 0.75 * timeout_s,
                })
            )  # fmt: skip
        _watch(ranks, timeout_s, grace_s=None if expect_errors else GRACE_S)
        # Ranks that had to be killed could not clean up: what they leave is no failure of its own.
        overran = any(isinstance(rank.error, RankOverran) for rank in ranks)
        survivors = _end_survivors(tag, timeout_s=0.0 if overran else SURVIVORS_TIMEOUT_S)
        outcomes = [rank.outcome() for rank in ranks]
    finally:
        for rank in ranks:
            rank.discard()
        _end_survivors(tag, timeout_s=0.0)
        shutil.rmtree(folder, ignore_errors=True)
    failed = any(outcome.error is not None for outcome in outcomes)
    if (survivors and not overran) or (failed and not expect_errors):
        raise RanksFailed(outcomes, tuple(survivors))
    return outcomes if expect_errors else [outcome.value for outcome in outcomes]


def _rank_env(rank: int, world_size: int, env: Any, tag: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not is_scrubbed(name)}
    own |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1", RANKS_TAG: tag,
        # Gloo binds to the address of the host's name, which need not resolve.
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    for name, value in dict(env(rank) if callable(env) else env if env is not None else {}).items():
        if value is None:
            own.pop(name, None)
        else:
            own[name] = value
    return own


class _Rank:
    """One rank as its parent sees it."""

    def __init__(self, rank: int, start_method: str, task: dict[str, Any]) -> None:
        context: Any = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            context.set_forkserver_preload(list(PRELOADED))
        self.rank = rank
        self.error: BaseException | None = None
        self._dump = _dump_path(task["folder"], rank)
        self._details = ""
        self._value: Any = None
        self._returned = False
        self._ended_at: float | None = None
        self.started = self.over = self._silent = False
        self._zero = time.monotonic()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_rank_main, args=(theirs, task), name=f"rank {rank}")
        self.process.start()
        theirs.close()
        # Under spawn, process.sentinel is a pipe which any process that the rank forks would keep open.  Under
        # forkserver it reports the result of waitpid, and a pidfd could come too late.
        self._pidfd = os.pidfd_open(self.process.pid) if start_method == "spawn" else None
        self.sentinel = self.process.sentinel if self._pidfd is None else self._pidfd

    def waitables(self) -> list[Connection | int]:
        return [self.sentinel] if self._silent else [self.pipe, self.sentinel]

    def go(self) -> None:
        self._zero = time.monotonic()
        with contextlib.suppress(OSError):  # it has died: the sentinel reports that
            self.pipe.send_bytes(b"go")

    def read(self) -> None:
        """Receive what the rank has sent, if anything; never blocks for long."""
        while not self._silent and self.pipe.poll():
            try:
                message = pickle.loads(self.pipe.recv_bytes())
            except (EOFError, OSError):
                self._silent = True
                return
            kind = message["kind"]
            if kind == "started":
                self.started = True
                continue
            self._ended_at = message["at"]
            if kind == "returned":
                self._returned, self._value = True, pickle.loads(message["value"])
            else:
                self._details = message["traceback"]
                self.error = self._unpickled(message)

    @staticmethod
    def _unpickled(message: dict[str, Any]) -> BaseException:
        if message["error"] is not None:
            with contextlib.suppress(Exception):
                return pickle.loads(message["error"])
        return RankRaised(message["traceback"])

    def notice_end(self) -> None:
        """Record the end of the process; call this when the sentinel is ready."""
        self.read()
        self.process.join()
        self.over = True
        if self.error is None and not (self._returned and self.process.exitcode == 0):
            if not self._returned:
                self._ended_at = time.monotonic()
            what = "after it had returned" if self._returned else "before it returned"
            self.error = RankDied(f"{_exit_text(self.process.exitcode)} {what}")
            self._details = self._read_dump()

    def overrun(self, why: str) -> None:
        """Make the process dump its threads and end; with SIGABRT, because it ends only when the dump is written."""
        # Found by descent: a process that was forked and never exec'ed has its parent's environment in /proc, maybe
        # without the tag that _end_survivors looks for.
        offspring: list[psutil.Process] = []
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            offspring = psutil.Process(self.process.pid).children(recursive=True)
            os.kill(self.process.pid, signal.SIGABRT)
        if not wait([self.sentinel], DUMP_TIMEOUT_S):
            self.process.kill()
        self.process.join()
        kill(offspring)
        self.read()
        self.over = True
        if self.error is None:
            state = "had returned, but did not exit" if self._returned else "was still running"
            self.error = RankOverran(f"{state} {why}")
            self._ended_at = time.monotonic()
            self._details = self._read_dump()
            self._value = None

    def _read_dump(self) -> str:
        with contextlib.suppress(OSError):
            return self._dump.read_text(errors="replace")
        return "(no dump: it ended before torch was imported)"

    def outcome(self) -> Outcome:
        seconds = 0.0 if self._ended_at is None else max(0.0, self._ended_at - self._zero)
        value = None if self.error is not None else self._value
        return Outcome(self.rank, value, self.error, self.process.exitcode, seconds, self._details)

    def discard(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()
        if self._pidfd is not None:
            os.close(self._pidfd)


def _watch(ranks: list[_Rank], timeout_s: float, grace_s: float | None) -> None:
    """Wait until every rank has ended; after a first failure for ``grace_s`` at most, unless that is None."""
    going = False
    deadline, why = time.monotonic() + START_TIMEOUT_S, f"importing torch after {START_TIMEOUT_S:g} s"
    while running := [rank for rank in ranks if not rank.over]:
        ready = wait([item for rank in running for item in rank.waitables()], max(0.0, deadline - time.monotonic()))
        for rank in running:
            rank.read()
            if rank.sentinel in ready:
                rank.notice_end()
        if not ready and time.monotonic() >= deadline:
            for rank in running:
                if not rank.over:
                    rank.overrun(why)
        failed = [rank for rank in ranks if rank.error is not None]
        if failed and not going:
            deadline, why = time.monotonic(), f"waiting for rank {failed[0].rank}, which never started"
        elif failed and grace_s is not None and time.monotonic() + grace_s < deadline:
            deadline, why = time.monotonic() + grace_s, f"{grace_s:g} s after the failure of rank {failed[0].rank}"
            grace_s = None
        elif not going and all(rank.started for rank in ranks):
            going = True
            deadline, why = time.monotonic() + timeout_s, f"at the deadline of {timeout_s:g} s"
            for rank in ranks:
                rank.go()


def _exit_text(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exited with {exitcode}"


def _dump_path(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank-{rank}.dump"


def _rank_main(pipe: Connection, task: dict[str, Any]) -> None:
    """Run in a rank's process."""
    _die_with_parent()
    os.environ.clear()
    os.environ.update(task["env"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file for a SIGABRT at the deadline
    rank = task["rank"]
    with open(_dump_path(task["folder"], rank), "w") as dump:
        faulthandler.enable(file=dump, all_threads=True)
        try:
            import torch

            torch.set_num_threads(1)
            fn, args = pickle.loads(task["job"])
            # What has been imported stays: a collection that looks through it takes most of a second.
            gc.freeze()
            pipe.send_bytes(pickle.dumps({"kind": "started"}))
            pipe.recv_bytes()
            if task["backend"] is not None:
                _init_group(task)
            value = fn(rank, *args)
            at = time.monotonic()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            message = {"kind": "returned", "at": at, "value": pickle.dumps(value)}
        except SystemExit:
            raise
        except BaseException as error:
            # Sent before anything is torn down: with a failed rank the teardown itself may hang.
            message = {
                "kind": "raised",
                "at": time.monotonic(),
                "error": _pickled(error),
                "traceback": traceback.format_exc(),
            }
        pipe.send_bytes(pickle.dumps(message))
        if message["kind"] == "raised":
            dump.flush()
            os._exit(1)


def _init_group(task: dict[str, Any]) -> None:
    import torch.distributed as dist

    store = dist.FileStore(str(Path(task["folder"]) / "store"), task["world_size"])
    timeout = datetime.timedelta(seconds=task["group_timeout_s"])
    store.set_timeout(timeout)
    dist.init_process_group(
        task["backend"], store=store, rank=task["rank"], world_size=task["world_size"], timeout=timeout
    )


def _pickled(error: BaseException) -> bytes | None:
    """Return the pickled exception if it can be loaded again; many pickle and then fail to load."""
    try:
        data = pickle.dumps(error)
        return data if type(pickle.loads(data)) is type(error) else None
    except Exception:
        return None


def _die_with_parent() -> None:
    # pytest-timeout ends pytest with os._exit, past every finally.
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _end_survivors(tag: str, *, timeout_s: float) -> list[str]:
    """Wait for the processes that ranks started, kill those that stay, and return their descriptions."""
    _, alive = psutil.wait_procs(list(tagged(RANKS_TAG, tag)), timeout=timeout_s)
    descriptions = [described(process) for process in alive]
    kill(alive)
    return descriptions


def as_another_user(action: Callable[[], Any]) -> Any:
    """What an action returns in a process of user 65534, as JSON has it; its exception's name if it raises."""
    read_end, write_end = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            try:
                answer = action()
            except Exception as error:
                answer = type(error).__name__
            os.write(write_end, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end) as file:
        answer = json.loads(file.read())
    os.waitpid(pid, 0)
    return answer
