"""Probes of devices and handles that run in processes of their own: a driver that hangs can then be killed.

``python -m tpcolocate.doctor.probe export|open``; JSON on standard input and output.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tpcolocate import devices
from tpcolocate.deadline import Deadline
from tpcolocate.doctor.facts import Devices, Handles, frozen
from tpcolocate.errors import DeadlineError, DeviceError, RankFailedError, TpColocateError
from tpcolocate.groups import error_fields
from tpcolocate.in_server.tpcolocate_receiver.handles import open_handle
from tpcolocate.ipc_payload import Handle, allocate, export
from tpcolocate.placement import inspect_device
from tpcolocate.server.environment import child_environment

_NUM_BYTES = 1 << 20
_SHOWN = 400
# For a process to end by itself, and to remove its shared memory.
_EXIT_S = 5.0
# For the counter of a handle to fall after its reader has dropped it.
_RELEASE_S = 5.0


# --- asking from outside ----------------------------------------------------------------------------------------------


def probe(
    environ: Mapping[str, str], local_rank: int | None, *, deadline: Deadline
) -> tuple[Devices, Handles | TpColocateError]:
    """Ask torch and NVML for a trainer's devices, and open memory of each in a process with the server's environment.

    Args:
        environ: Of the trainer.
        local_rank: Tries the memory of this rank's device alone; None: of all.
        deadline: Of the whole.

    Returns:
        The devices, and how the handles went or why that is not known.

    Raises:
        DeadlineError: The devices are not known in time.
        RankFailedError: The process that looked for them failed.
    """
    with _Probe("export", environ) as exporter, _Probe("open", child_environment(environ, visibility={})[0]) as opener:
        found = exporter.ask({"local_rank": local_rank}, deadline)
        made: dict[str, Any] = {key: frozen(value) for key, value in found.items()}
        devices = Devices(**made)
        try:
            return devices, _try_handles(devices, local_rank, exporter, opener, deadline)
        except TpColocateError as error:
            return devices, error


def _try_handles(
    devices: Devices, local_rank: int | None, exporter: _Probe, opener: _Probe, deadline: Deadline
) -> Handles:
    number = len(devices.visible)
    indices = range(number) if local_rank is None else [i for i in [devices.own] if i is not None and i < number]
    trips: list[tuple[str, str | None]] = []
    slowest = 0.0
    for device in ["cpu"] if devices.kind == "cpu" else [f"cuda:{index}" for index in indices]:
        started = time.monotonic()
        answer = exporter.ask({"export": device}, deadline)
        if answer["error"] is None:
            opened = opener.ask(answer["handle"], deadline)
            released = exporter.ask({"release": True}, deadline)
            answer = opened if opened["error"] is not None else released
        slowest = max(slowest, time.monotonic() - started)
        trips.append((device, answer["error"]))
    return Handles(trips=tuple(trips), seconds=slowest)


class _Probe:
    """A process that answers one line of JSON with another; killed at the end.

    Args:
        name: What to run.
        environ: Its environment.
    """

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()
        package = str(Path(__file__).parents[2])  # last: only if it is not found as in this process
        path = os.pathsep.join(filter(None, [environ.get("PYTHONPATH", ""), package]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tpcolocate.doctor.probe", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**environ, "PYTHONPATH": path},
            start_new_session=True,
        )

    def ask(self, question: Mapping[str, Any], deadline: Deadline) -> dict[str, Any]:
        """Send a line and return the answer.

        Raises:
            DeadlineError: No answer in time.
            RankFailedError: The process has exited.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer is end-of-file then
        received = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while (answer := _answer_in(received)) is None:
                if not selector.select(deadline.left(at_least=0.001)):
                    raise DeadlineError(f"the probe {self.name!r} did not answer within {deadline.timeout_s:g} s")
                chunk = os.read(self._process.stdout.fileno(), 65536)
                if not chunk:
                    self._process.wait(deadline.left(at_least=1.0))
                    raise RankFailedError(
                        f"the probe {self.name!r} exited with code {self._process.returncode}: {self._last_line()}"
                    )
                received += chunk
        return answer

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:_SHOWN] if lines else "(it wrote nothing)"

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            for path in Path("/dev/shm").glob(f"torch_{self._process.pid}_*"):
                path.unlink(missing_ok=True)
        self._process.stdout.close()
        self._errors.close()


def _answer_in(received: bytes) -> dict[str, Any] | None:
    """Return the first line that is an answer: a sitecustomize.py may print as Python starts."""
    for line in received.split(b"\n")[:-1]:
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        if isinstance(answer, dict):
            return answer
    return None


# --- answering in the process -----------------------------------------------------------------------------------------


def _find_devices(local_rank: int | None) -> Devices:
    kind = "hip" if torch.version.hip else "cuda" if torch.cuda.is_available() else "cpu"
    row = devices.VISIBILITY["cuda" if kind == "cpu" else kind]
    inventory = devices.read_inventory()
    number = torch.cuda.device_count() if kind != "cpu" else 0
    visible, error = [], None
    for index in range(number):
        _, facts, device_error = inspect_device(torch.device("cuda", index))
        error = device_error if error is None else error
        visible.append(facts["physical"] or {"token": str(index), "index": None, "uuid": None})
    return Devices(
        kind=kind,
        settings=tuple(f"{name}={os.environ[name]!r}" for name in row.variables if name in os.environ),
        order=devices.device_order(os.environ),
        visible=tuple(visible),
        unused=_unused_entries(row, inventory),
        inventory=() if inventory is None else tuple(zip(inventory.uuids, inventory.names)),
        own=_own_index(number, local_rank),
        peers=tuple(
            (a, b, torch.cuda.can_device_access_peer(a, b)) for a in range(number) for b in range(number) if a != b
        ),
        free_bytes=tuple(torch.cuda.mem_get_info(index)[0] for index in range(number)),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if kind == "cuda" else None,
        error=error_fields(error),
    )


def _own_index(number: int, local_rank: int | None) -> int | None:
    """Return what most scripts choose: the only device, otherwise that of LOCAL_RANK."""
    if number == 0:
        return None
    return 0 if local_rank is None or number == 1 else local_rank


def _unused_entries(row: devices.Visibility, inventory: devices.Inventory | None) -> str | None:
    tokens = devices.visible_tokens(os.environ, kind=row.name, inventory=inventory)
    wanted = max((len(os.environ[name].split(",")) for name in row.variables if os.environ.get(name)), default=0)
    if tokens is None or len(tokens) >= wanted or any(os.environ.get(name) == "-1" for name in row.variables):
        return None
    try:
        devices.resolve(len(tokens), os.environ, kind=row.name, inventory=inventory)
    except DeviceError as error:
        return error.message
    return None


class _Exporter:
    """The trainer's side: its devices, and memory with known contents, one handle at a time."""

    def __init__(self) -> None:
        self._handle: Handle | None = None

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        if "local_rank" in question:
            return asdict(_find_devices(question["local_rank"]))
        if "export" in question:
            return self._export(torch.device(question["export"]))
        return {"error": self._release()}

    def _export(self, device: torch.device) -> dict[str, Any]:
        try:
            flat = allocate(_NUM_BYTES, device)
            flat.copy_(_pattern())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self._handle = export(flat)
            return {"error": None, "handle": self._handle.describe()}
        except (TpColocateError, RuntimeError, OSError) as error:
            return {"error": f"memory of {device} cannot be exported: {_short(error)}"}

    def _release(self) -> str | None:
        assert self._handle is not None
        deadline = Deadline.after(_RELEASE_S)
        while (count := self._handle.count()) != 0 and not deadline.has_passed:
            time.sleep(0.01)
        if count != 0:
            self._handle.reclaim()
            return f"the handle was not released by its reader: its counter is {count}"
        return None


def _open(handle: Mapping[str, Any]) -> dict[str, Any]:
    try:
        device = torch.device("cpu")
        if handle["kind"] == "cuda":
            uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
            wanted = handle["uuid"].removeprefix("GPU-")
            device = torch.device("cuda", uuids.index(wanted) if wanted in uuids else 0)
            torch.cuda.set_device(device)
        flat = open_handle(handle, device)
        same = torch.equal(flat.cpu(), _pattern())
        del flat
        if handle["kind"] == "cuda":
            torch.cuda.synchronize(device)
        return {"error": None if same else "the memory has other contents in the process that opened it"}
    except (RuntimeError, OSError) as error:
        return {"error": f"the handle does not open in another process: {_short(error)}"}


def _pattern() -> torch.Tensor:
    return torch.arange(_NUM_BYTES, dtype=torch.int32, device="cpu").to(torch.uint8)


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_SHOWN]


def main(arguments: Sequence[str]) -> int:
    """Answer questions until standard input ends."""
    exporter = _Exporter()
    # Libraries may print; only answers belong on standard output.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        answer = exporter.answer(question) if arguments[0] == "export" else _open(question)
        print(json.dumps(answer), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
