"""Public entry point of all other processes: `connect` finds a running server of this user."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from tpcolocate import rendezvous
from tpcolocate.checks import MOST_RANKS, check_integer
from tpcolocate.engine.client import Client
from tpcolocate.engine.limits import ModelFolders
from tpcolocate.errors import RendezvousError
from tpcolocate.launch import is_listening
from tpcolocate.rendezvous import Announcement
from tpcolocate.server.evidence import Evidence

logger = logging.getLogger(__name__)


def connect(job: str | None = None, *, slice_index: int | None = None) -> Client:
    """Connect to a running server of this user, from any process of the machine.

    Args:
        job: Name that was passed to `init`, or else `Colocation.job`.  Default: the environment variable TPCOLOCATE_JOB,
            else, with a warning, the job of the only server that is running.
        slice_index: `Colocation.slice_index`; optional while the job has one server.

    Returns:
        A client of the server.

    Raises:
        ConfigError: An argument of a wrong type, or `job` is not the name of a job.
        RendezvousError: No such server, several of them, or it does not answer.
    """
    job = rendezvous.job_of(job, os.environ)
    if slice_index is not None:
        check_integer("slice_index", slice_index, at_least=0, at_most=MOST_RANKS)
    path, announcement = _only_one(rendezvous.discover(), job, slice_index)
    if job is None:
        logger.warning(
            "connect() without a job takes the only server of this user, that of job %s (ranks %s); name the job with "
            "init(job=...) and connect(job), or with %s",
            announcement.job,
            ",".join(map(str, announcement.slice_ranks)),
            rendezvous.JOB_VARIABLE,
        )
    if not is_listening(announcement):
        raise RendezvousError(
            f"the server at {announcement.url} (job {announcement.job}) does not answer",
            hint=f"see the output of process {announcement.pid} of that job, and start the job again if it has ended",
            url=announcement.url,
        )
    client = Client(
        announcement.url,
        api_key=announcement.api_key,
        folders=ModelFolders(announcement.model_folder, announcement.tokenizer_folder),
    )
    client.http.evidence = Evidence(Path(announcement.log_path), path.with_name("processes.json"))
    return client


def _only_one(
    running: Sequence[tuple[Path, Announcement]], job: str | None, slice_index: int | None
) -> tuple[Path, Announcement]:
    """Return the server that `connect` was asked for.

    Args:
        running: All of this user.
        job, slice_index: As for `connect`.

    Raises:
        RendezvousError: There is none, or several; those that there are are listed.
    """
    found = [(path, one) for path, one in running if job in (None, one.job) and slice_index in (None, one.slice_index)]
    if len(found) == 1:
        return found[0]
    asked = ("" if job is None else f" in job {job}") + ("" if slice_index is None else f" of slice {slice_index}")
    number = f"{len(found)} running servers" if found else "no running server"
    listed = [
        f"  job {one.job}, slice {one.slice_index} (ranks {','.join(map(str, one.slice_ranks))}): {one.url}, "
        f"launched by process {one.pid}"
        for _, one in found or running
    ]
    raise RendezvousError(
        f"found {number} of this user{asked}",
        hint=_how_to_choose([one for _, one in found], is_any_running=bool(running)),
        details="\n".join(["those that run:", *listed]) if listed else None,
    )


def _how_to_choose(found: Sequence[Announcement], *, is_any_running: bool) -> str:
    if not is_any_running:
        return (
            "connect() finds a server of the same user on the same host, or in containers with one network and /dev/shm, once "
            "launch() has returned there; start that job first, and look at its output"
        )
    if not found:
        return "name one of those that run, connect(job, slice_index=0), or wait until launch() of the other job has returned"
    if len({one.job for one in found}) > 1:
        return "name the job: connect(job)"
    if len({(one.slice_index, one.pid) for one in found}) > len({one.slice_index for one in found}):
        return (
            "several running jobs have one name: start each with its own, init(job=...) or TPCOLOCATE_JOB, or connect with "
            "tpcolocate.Client(engine.url, api_key=engine.api_key), which the job passes on"
        )
    if len({one.slice_index for one in found}) > 1:
        return "name the slice: connect(job, slice_index=0)"
    return (
        "this slice has launched several: tpcolocate.Client(engine.url, api_key=engine.api_key) connects to the one of an "
        "engine, which passes both on"
    )


__all__ = ["connect"]
