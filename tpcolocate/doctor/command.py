"""``python -m tpcolocate doctor``: gathers facts on every rank, and prints one page on rank 0."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from tpcolocate._version import __version__
from tpcolocate.deadline import Deadline, check_timeout
from tpcolocate.doctor.facts import Devices, Facts, GlooGroup, Handles, Job
from tpcolocate.doctor.findings import PROBLEM, judge
from tpcolocate.doctor.gather import (
    check_allocator,
    check_kernel,
    check_leftovers,
    check_limits,
    check_network,
    check_shared_memory,
    check_software,
    read_job,
)
from tpcolocate.doctor.page import as_json, render
from tpcolocate.doctor.probe import probe
from tpcolocate.errors import ConfigError, RankLostError, TpColocateError
from tpcolocate.groups import Host, Member, error_fields
from tpcolocate.interfaces import GlooAddress, find_gloo_address
from tpcolocate.parallel import in_background
from tpcolocate.processes import this_process

_PREFIX = "tpcolocate/doctor"
# In addition to the deadline of the checks: the last rank may start later than the first.
_LATE_S = 15.0
# For ranks to leave the store; rank 0 may hold it.
_LEAVE_S = 10.0
_SHOWN_AFTER_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument(
        "--tp-size", type=int, default=1, metavar="N", help="GPUs per server, as for init() (default: 1)"
    )
    parser.add_argument("--allow-shared-devices", action="store_true", help="as for init()")
    parser.add_argument("--json", action="store_true", help="print JSON, with all facts")
    parser.add_argument("--clean", action="store_true", help="remove what ended jobs of this user left on the host")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="for all checks, in seconds (default: 60)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the checks on this rank; on rank 0, print the result.

    Collective: over the ranks of the job, if torchrun's variables are set; no process group is needed.

    Returns:
        1 if there is a problem, otherwise 0; the same on all ranks that can reach each other.
    """
    job = read_job(os.environ)
    deadline = Deadline.after(arguments.timeout)
    connecting = in_background(partial(_connect, job, deadline), name="doctor store") if job.is_distributed else None
    facts = _gather(arguments, job, connecting, deadline)
    store = _outcome(connecting)
    found = [facts] if store is None else _exchange(store, facts, deadline.plus(_LATE_S))
    world_size = job.world_size if job.is_distributed else 1
    diagnosis = judge(found, world_size=world_size, tp_size=arguments.tp_size)
    # Ranks that cannot reach rank 0 report for their host.
    if job.rank == 0 or (store is None and job.local_rank in (None, 0)):
        if arguments.json:
            print(as_json(diagnosis, found, world_size=world_size, tp_size=arguments.tp_size))
        else:
            print(render(diagnosis, world_size=world_size, tp_size=arguments.tp_size))
        sys.stdout.flush()
    if store is not None:
        _leave(store, job)
    return 1 if diagnosis.level == PROBLEM else 0


def _connect(job: Job, deadline: Deadline) -> dist.Store:
    """Connect to the store of the job.

    Raises:
        RankLostError: It cannot be reached.
    """
    try:
        timeout = timedelta(seconds=deadline.left(at_least=1.0))
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankLostError(f"the store of the job at {where} cannot be reached: {_reason(error)}") from error
    return dist.PrefixStore(_PREFIX, store)


def _outcome(connecting: Future[dist.Store] | None) -> dist.Store | None:
    """Return the store if it was reached in time."""
    if connecting is None or not connecting.done() or connecting.exception() is not None:
        return None
    return connecting.result()


def _gather(
    arguments: argparse.Namespace, job: Job, connecting: Future[dist.Store] | None, deadline: Deadline
) -> Facts:
    """Run all checks side by side, none longer than the deadline."""
    environ = dict(os.environ)
    one_device = job.local_rank if job.is_distributed else None
    # A little earlier, so that a check that waits reports its own error.
    inner = Deadline(deadline.at - min(2.0, arguments.timeout / 4), deadline.timeout_s)
    checks: dict[str, Callable[[], Any]] = {
        "software": check_software,
        "devices": partial(probe, environ, one_device, deadline=inner),
        "shared_memory": check_shared_memory,
        "kernel": check_kernel,
        "allocator": partial(check_allocator, environ),
        "network": partial(check_network, environ),
        "gloo": partial(_check_gloo, job, connecting, inner),
        "limits": check_limits,
    }
    if job.local_rank in (None, 0):  # once per host
        checks["leftovers"] = partial(check_leftovers, clean=arguments.clean)
    seconds: dict[str, float] = {}
    running = {name: in_background(partial(_timed, name, check, seconds), name=name) for name, check in checks.items()}
    results, failures = _results(running, deadline)
    devices = None
    if "devices" in results:
        devices, handles = results.pop("devices")
        if isinstance(handles, Handles):
            results["handles"] = handles
        else:
            failures["handles"] = handles.message
    host = _host(failures)
    member = _member(arguments, job, devices, host)
    return Facts(member=member, job=job, devices=devices, failures=failures, seconds=dict(seconds), **results)


def _timed(name: str, check: Callable[[], Any], seconds: dict[str, float]) -> Any:
    started = time.monotonic()
    try:
        return check()
    finally:
        seconds[name] = time.monotonic() - started


def _results(running: Mapping[str, Future[Any]], deadline: Deadline) -> tuple[dict[str, Any], dict[str, str]]:
    """Wait for all checks, and show which is awaited if that takes long."""
    results: dict[str, Any] = {}
    failures: dict[str, str] = {}
    with tqdm(
        total=len(running), desc="doctor", delay=_SHOWN_AFTER_S, disable=None, leave=False, file=sys.stderr
    ) as progress:
        for name, future in running.items():
            progress.set_postfix_str(name, refresh=False)
            try:
                results[name] = future.result(deadline.left())
            except TimeoutError as error:
                failures[name] = str(error) or f"no answer within {deadline.timeout_s:g} s"
            except TpColocateError as error:
                failures[name] = error.message
            except Exception as error:
                failures[name] = _reason(error)
            progress.update()
    return results, failures


def _check_gloo(job: Job, connecting: Future[dist.Store] | None, deadline: Deadline) -> GlooGroup:
    """Make a gloo group of all ranks, and exchange their ranks."""
    try:
        store = None if connecting is None else connecting.result(deadline.left())
    except TimeoutError:
        return GlooGroup(
            error=f"the job's store is not complete after {deadline.timeout_s:g} s", seconds=deadline.timeout_s
        )
    started = time.monotonic()
    timeout = timedelta(seconds=deadline.left(at_least=1.0))
    members: list[Any] = [None] * (1 if store is None else job.world_size)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.HashStore() if store is None else dist.PrefixStore("gloo", store),
            rank=0 if store is None else job.rank,
            world_size=len(members),
            timeout=timeout,
        )
        dist.all_gather_object(members, job.rank)
        dist.destroy_process_group()
    except (RuntimeError, ValueError, OSError) as error:
        return GlooGroup(error=_reason(error), seconds=time.monotonic() - started)
    return GlooGroup(error=None, seconds=time.monotonic() - started)


def _host(failures: dict[str, str]) -> Host:
    try:
        return Host.here()
    except OSError as error:
        failures["host"] = f"this host cannot be described: {_reason(error)}"
        return Host.unknown()


def _member(arguments: argparse.Namespace, job: Job, devices: Devices | None, host: Host) -> Member:
    """Describe this rank as `init` would."""
    pid, started = this_process()
    on_device = devices is not None and devices.own is not None and devices.own < len(devices.visible)
    physical = devices.visible[devices.own or 0] if devices is not None and on_device else None
    gloo, error = GlooAddress("", ""), None
    if arguments.tp_size > 1:
        try:
            gloo = find_gloo_address(os.environ, host_name=host.name)
        except ConfigError as caught:
            error = caught
    facts = {
        "job": "",
        "job_name": None,
        "gloo": asdict(gloo),
        "kind": "cpu" if devices is None else devices.kind,
        "physical": physical,
        "order": devices.order if devices is not None and on_device else None,
        "version": __version__,
        "shared": arguments.allow_shared_devices,
    }
    distributed = job.is_distributed
    return Member(
        rank=job.rank if distributed else 0,
        world_size=job.world_size if distributed else 1,
        tp_size=arguments.tp_size,
        host=host,
        pid=pid,
        started=started,
        facts=facts,
        error=error_fields(error),
    )


def _exchange(store: dist.Store, facts: Facts, deadline: Deadline) -> list[Facts]:
    """Return the facts of all ranks that report in time, in rank order."""
    rank, found = facts.member.rank, []
    store.set(f"facts/{rank}", facts.to_json())
    for other in range(facts.member.world_size):
        if other == rank:
            found.append(facts)
            continue
        try:
            store.wait([f"facts/{other}"], timedelta(seconds=deadline.left(at_least=0.1)))
            found.append(Facts.from_json(store.get(f"facts/{other}").decode()))
        except (RuntimeError, dist.DistStoreError):
            continue  # a finding
    return found


def _leave(store: dist.Store, job: Job) -> None:
    """Let rank 0 print before the first rank exits, and the others read before rank 0 takes the store with it.

    Torchrun ends all ranks as soon as one has failed.
    """
    try:
        if job.rank == 0:
            store.set("printed", "1")
            store.wait([f"left/{rank}" for rank in range(1, job.world_size)], timedelta(seconds=_LEAVE_S))
        else:
            store.wait(["printed"], timedelta(seconds=_LEAVE_S + _LATE_S))
            store.set(f"left/{job.rank}", "1")
    except (RuntimeError, dist.DistStoreError):
        pass  # the other side has left


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a usage error if a number is not positive."""
    if options.tp_size < 1:
        parser.error(f"--tp-size must be a positive integer, got {options.tp_size}")
    try:
        check_timeout(options.timeout, name="--timeout")
    except ConfigError as error:
        parser.error(error.message)


__all__ = ["add_arguments", "check", "run"]
