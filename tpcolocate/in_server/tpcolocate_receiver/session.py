"""SGLang's custom weight loader hook, and the commands that a sync sends to it.

One request of SGLang's carries a whole sync: inside it the worker takes commands over a local socket until it is told
that this was all, or its trainer is gone, or its time is up.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import kernels as one_pass
from .checksums import checksum, load_kernels
from .copy_plan import CopyPlan, CopyProgram, places_of
from .dry_run import rehearse
from .handles import device_uuid, open_handle
from .loader_trace import BucketTensors, Copy, LoaderTrace, differing, quantised, views

logger = logging.getLogger(__name__)

_POLL_MS = 200
# For the last answer to leave after the socket was closed.
_LINGER_MS = 2000
_STAGE = "stage"
"""How the names of regions begin that are mapped for the length of one session."""

_plans: weakref.WeakKeyDictionary[torch.nn.Module, CopyPlan] = weakref.WeakKeyDictionary()
_regions: dict[str, torch.Tensor] = {}
"""The trainer's memory that is mapped here, by the name that the trainer gave it."""
_held: deque[str] = deque(maxlen=64)
"""Sessions that were held here: a second model in one worker (a draft) must not open the same handles again."""


def receive(model: torch.nn.Module, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """SGLang's custom weight loader hook.  Never raises.

    Args:
        model: The worker's model.
        named_tensors: One tensor without elements, whose name is the command that opens a session, in JSON.
    """
    try:
        [(command, _)] = named_tensors
        job = json.loads(command)
        if job["session"] in _held:
            return
        _held.append(job["session"])
        _hold(model, job)
    except BaseException:  # an exception that leaves here takes the server down; the trainer misses the answer
        logger.exception("tpcolocate: a session was not held")


def _hold(model: torch.nn.Module, job: dict[str, Any]) -> None:
    import zmq  # SGLang's own dependency; a failing import at the top would take the server down

    deadline = time.monotonic() + job["timeout_s"]
    if not _is_running(job["peer"]):
        job["peer"] = None
    plans = _plans.get(model)
    if plans is None or not plans.fit():
        plans = _plans[model] = CopyPlan()
    # A context of its own: none of the server's sockets and settings are touched, and it ends with the session.
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.IDENTITY, str(job["tp_rank"]).encode())
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        socket.connect(job["endpoint"])
        socket.send(json.dumps(_answer(_greet, model, plans, job)).encode())
        while True:
            if not socket.poll(_POLL_MS):
                if time.monotonic() >= deadline or _is_over(job):
                    logger.error("tpcolocate: the trainer left a weight sync; the weights may be half old, half new")
                    break
                continue
            command = json.loads(socket.recv())
            if command["do"] != "leave":
                socket.send(json.dumps(_answer(_act, model, plans, {**job, **command})).encode())
            if command["do"] == "leave" or command.get("last"):
                one_pass.prepare(next(model.parameters()).device)  # beside what the server does next
                break
    _drop(plans, _staged())


def _answer(action: Any, model: torch.nn.Module, plans: CopyPlan, job: dict[str, Any]) -> dict[str, Any]:
    """Carry one command out; whatever goes wrong is in the answer."""
    answer: dict[str, Any] = {"tp_rank": job["tp_rank"], "number": job.get("number"), "error": None, "opened": False}
    started = time.perf_counter()
    try:
        _check_address(job)
        action(model, plans, job, answer)
    except BaseException as error:
        answer["error"] = f"{type(error).__name__}: {error}"
        answer["traceback"] = traceback.format_exc()
    answer["seconds"] = time.perf_counter() - started
    return answer


def _is_over(job: dict[str, Any]) -> bool:
    """Whether the trainer's end is gone: its process, or the socket that it removes when it is done."""
    return not _is_running(job["peer"]) or not Path(job["endpoint"].removeprefix("ipc://")).exists()


def _is_running(peer: list[int] | None) -> bool:
    """Whether the trainer's process lives; one that was never seen from here (another PID namespace) counts as alive."""
    if peer is None:
        return True
    try:
        # Field 22, counted behind the name in brackets, which may hold spaces.
        return int(Path(f"/proc/{peer[0]}/stat").read_text().rpartition(")")[2].split()[19]) == peer[1]
    except (OSError, IndexError, ValueError):
        return False


def _check_address(job: dict[str, Any]) -> None:
    """The command must have reached the worker it was made for."""
    if job["for"] != job["tp_rank"]:
        raise RuntimeError(f"the payload of TP rank {job['for']} reached TP rank {job['tp_rank']}")
    if not torch.distributed.is_initialized():
        return
    rank = torch.distributed.get_rank() % job["tp_size"]
    if rank != job["tp_rank"]:
        raise RuntimeError(f"the payload of TP rank {job['tp_rank']} reached TP rank {rank}")


def _greet(model: torch.nn.Module, plans: CopyPlan, job: dict[str, Any], answer: dict[str, Any]) -> None:
    """Say who this is, and which knowledge of the loader there is."""
    answer["uuid"] = device_uuid()
    answer["plans"] = plans.identity


def _act(model: torch.nn.Module, plans: CopyPlan, job: dict[str, Any], answer: dict[str, Any]) -> None:
    _ACTIONS[job["do"]](model, plans, job, answer)


def _probe(model: torch.nn.Module, plans: CopyPlan, job: dict[str, Any], answer: dict[str, Any]) -> None:
    answer["uuid"] = device_uuid()
    flat = open_handle(job["handle"], next(model.parameters()).device)
    answer["opened"] = True
    found = list(checksum(flat))
    del flat
    if found != job["checksum"]:
        raise RuntimeError("the handle opened, but on other memory than the trainer's")
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _load(model: torch.nn.Module, plans: CopyPlan, job: dict[str, Any], answer: dict[str, Any]) -> None:
    """Take one bucket of full tensors, by the engine's loader or by what was learned from it."""
    clock = _Clock()
    device = next(model.parameters()).device
    entries = job["entries"]
    mapped = flat = open_handle(job["handle"], device)
    answer["opened"] = True
    source = mapped.device
    try:
        clock.lap("open")
        if source != device:
            # Parameters that the memory saver holds can be reached by their own GPU alone.
            flat = mapped.to(device)
            clock.lap("bring")
        if list(checksum(flat)) != job["checksum"]:
            # Checked before the first parameter is touched.
            raise RuntimeError("the bucket does not hold what the trainer packed (checksum)")
        clock.lap("check")
        otherwise: list[str] | None = None
        if job.get("watch"):
            otherwise = answer["otherwise"] = []
        copies, unsure, replayed = _apply(model, plans, flat, entries, otherwise)
        clock.lap("load")
        wrong = differing([c for c in copies if c.entry not in unsure])
        clock.lap("compare")
        read: dict[int, int] = {}
        for copy in copies:
            read[copy.entry] = read.get(copy.entry, 0) + copy.src.numel()
        answer["differing"] = sorted(entries[i][0] for i in wrong)
        answer["unproven"] = sorted(entries[i][0] for i in unsure)
        answer["read"] = {entries[i][0]: count for i, count in read.items()}
        answer["replayed"] = replayed
        if not replayed or job.get("tell"):
            answer["learned"] = plans.described([entry[0] for entry in entries if plans.knows([entry])])
        answer["phases"] = clock.seconds
        del copies
    finally:
        if device.type == "cuda":
            # Acknowledged means finished, on the GPU that was read from as well (fan-out).
            for used in {device, source}:
                torch.cuda.synchronize(used)
        del flat, mapped


def _apply(
    model: torch.nn.Module,
    plans: CopyPlan,
    flat: torch.Tensor,
    entries: list[list[Any]],
    otherwise: list[str] | None = None,
) -> tuple[list[Copy], set[int], bool]:
    """Load a bucket: by what was learned if all of it is known, else by the engine's own loader, watched.

    Args:
        model: The worker's.
        plans: What is known of it.
        flat: The bucket.
        entries: What lies in it.
        otherwise: Have the loader do it also where all is known, and put in here what it does otherwise than is known;
            then nothing is known any more.

    Returns:
        The copies that were made, the entries whose arrival they cannot prove, and whether the loader was not needed.
    """
    known = plans.knows(entries) and plans.fit()
    if known and otherwise is None:
        with torch.no_grad():
            return plans.replay(flat, entries), set(), True
    places = places_of(model)
    recorder = LoaderTrace(BucketTensors(flat, entries), {storage for *_, storage in places})
    loader: Any = model  # every SGLang model has load_weights
    sent = views(flat, entries)  # made out of its sight
    with torch.no_grad(), recorder:
        loader.load_weights(sent)
    if (words := quantised(recorder.copies, entries)) is not None:
        raise RuntimeError(words)
    if known and otherwise is not None:
        seen = CopyPlan()
        seen.learn(recorder, entries, places)
        otherwise += plans.otherwise(seen, [entry[0] for entry in entries])
        if otherwise:
            plans.forget()
    plans.learn(recorder, entries, places)
    return recorder.copies, recorder.derived | recorder.reworked, False


def _warm_up(model: torch.nn.Module, plans: CopyPlan, job: dict[str, Any], answer: dict[str, Any]) -> None:
    """`_rehearse` before there is a trainer's model: with the names of the checkpoint, in the engine's own dtype."""
    parameter = next(model.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    # Neither needs what the other does: the loader is Python at work, the driver's loading of kernels is not.
    kernels = threading.Thread(target=_load_kernels, args=(parameter.device,))
    kernels.start()
    try:
        _rehearse(model, plans, {**job, "entries": [[name, dtype, shape] for name, shape in job["shapes"]]}, answer)
    finally:
        kernels.join()


def _rehearse(model: torch.nn.Module, plans: CopyPlan, job: dict[str, Any], answer: dict[str, Any]) -> None:
    """Learn what the engine's loader would do with these tensors; the model stays as it is."""
    entries = [entry for entry in job["entries"] if not plans.knows([entry])]
    if entries:
        rehearse(model, plans, entries)
    answer["learned"] = plans.described([entry[0] for entry in job["entries"] if plans.knows([entry])])


def _load_kernels(device: torch.device) -> None:
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        load_kernels(device)
    except RuntimeError:  # out of memory, say: whoever needs them says so
        logger.warning("tpcolocate: kernels were not loaded ahead", exc_info=True)


def _run(model: torch.nn.Module, plans: CopyPlan, job: dict[str, Any], answer: dict[str, Any]) -> None:
    """Map and let go regions, take in a program, run one: whichever of these the command names, in this order."""
    clock = _Clock()
    device = next(model.parameters()).device
    _drop(plans, job.get("release", ()))
    for name, handle in job.get("map", ()):
        _regions[name] = open_handle(handle, device)
        answer.setdefault("mapped", []).append(name)
    answer["opened"] = True
    clock.lap("open")
    if "define" in job:  # in place of what there was
        plans.programs = {key: CopyProgram(pieces, plans) for key, pieces in job["define"]}
    clock.lap("define")
    if "program" in job:
        if not plans.fit():
            raise RuntimeError("the parameters moved during a sync")
        with torch.no_grad():
            answer["sums"], seconds = plans.programs[job["program"]].run(plans, _regions, keep=job["keep"])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        clock.lap("load")
        clock.seconds.update(seconds)
    answer["phases"] = clock.seconds


def _unstage(model: torch.nn.Module, plans: CopyPlan, job: dict[str, Any], answer: dict[str, Any]) -> None:
    _drop(plans, _staged())


def _staged() -> list[str]:
    return [name for name in _regions if name.startswith(_STAGE)]


def _drop(plans: CopyPlan, names: Iterable[str]) -> None:
    gone = set(names)
    if not gone:
        return
    for program in plans.programs.values():
        if program.regions & gone:
            program.forget()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    for name in gone:
        _regions.pop(name, None)


def _survey(model: torch.nn.Module, plans: CopyPlan, job: dict[str, Any], answer: dict[str, Any]) -> None:
    answer["unwritten"] = plans.unwritten(model)


class _Clock:
    """Seconds per step, for whoever wants to know where the time goes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


_ACTIONS = {
    "warm_up": _warm_up,
    "probe": _probe,
    "rehearse": _rehearse,
    "load": _load,
    "run": _run,
    "unstage": _unstage,
    "survey": _survey,
}
