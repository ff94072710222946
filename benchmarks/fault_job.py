"""A training job of two ranks whose processes can be stopped and killed, and what such a job leaves behind.

The ranks run `fault_rank`.  Each job has a temporary folder of its own, so that jobs can run beside each other, and
beside anything else on the machine.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
from shm_files import SHM, ShmFiles, numbers

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("fault_rank.py")
TAG = "TPC_FAULT_JOB"
START_S = 120.0
# For what is ended to be gone: the supervisor's grace, and its limit for the rest of the tree.
GONE_S = 30.0
FILES_GONE_S = 20.0  # torch's manager of shared memory may be late
# On GPUs, after all jobs.  A context takes hundreds.
MOST_LEFT_MIB = 16.0
# Folders of other libraries that a process may make in the temporary folder and keep.
_OTHERS = re.compile(r"(torchinductor_|triton|\.cache|pymp-|matplotlib)")


@dataclass(frozen=True, slots=True)
class Answer:
    """What one rank answered to one call.

    Attributes:
        rank: The rank.
        call: Name of the call.
        outcome: "ok", "error", "died" (the process did) or "hangs".
        at: When, on the monotonic clock, which all processes of a machine share.
        value: What the call returned.
        error: Class of the exception, its message, whether it is one of this library's, and its hint.
    """

    rank: int
    call: str
    outcome: str
    at: float
    began: float
    value: Any = None
    error: str = ""
    message: str = ""
    ours: bool = False
    hint: str | None = None


def used_device_mib(device_type: str) -> float:
    """Memory of all GPUs that is in use, by whomever; 0 for "cpu"."""
    if device_type == "cpu":
        return 0.0
    import torch

    free_and_total = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
    return sum(total - free for free, total in free_and_total) / 2**20


def left_on_gpus(device_type: str, used_before_mib: float, *, timeout_s: float = FILES_GONE_S) -> list[str]:
    """What the jobs have left on the GPUs; empty if nothing.

    Args:
        device_type: "cpu" or "cuda".
        used_before_mib: `used_device_mib` before the first job.
        timeout_s: For the driver to free what ended processes held.
    """
    deadline = time.monotonic() + timeout_s
    while (left := used_device_mib(device_type) - used_before_mib) > MOST_LEFT_MIB:
        if time.monotonic() >= deadline:
            return [f"{left:.0f} MiB of the GPUs are not free again"]
        time.sleep(0.2)
    return []


class _Process:
    """One rank as the driver sees it."""

    def __init__(self, rank: int, folder: Path, model_dir: str, device_type: str, world_size: int, tag: str) -> None:
        ours, theirs = socket.socketpair()
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TORCHELASTIC_", "MASTER_", "TPCOLOCATE_", "LOCAL_", "GROUP_", "ROLE_"))
        }
        temporary = folder / "tmp"
        environment |= {
            "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TMPDIR": str(temporary), TAG: tag,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "XDG_RUNTIME_DIR": str(temporary),
            # Not in the folder of the job: each would compile everything anew.
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get(
                "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}")
            ),
        }  # fmt: skip
        self.rank = rank
        self.log = folder / f"rank-{rank}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, str(SCRIPT), str(theirs.fileno()), str(folder), str(rank), str(world_size), model_dir, device_type,
                ],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )  # fmt: skip
        theirs.close()
        self.pipe = Connection(ours.detach())
        self.pidfd = os.pidfd_open(self.process.pid)
        self.is_stopped = False

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def dump(self) -> None:
        """Have it write where its threads are to its log."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self.pipe.close()
        os.close(self.pidfd)


class Job:
    """Two ranks and their server; a context manager that leaves nothing, whatever happened.

    Args:
        model_dir: What is trained and served.
        device_type: "cpu" or "cuda"; with fewer GPUs than ranks all of them share one.
        world_size: Number of ranks.
        cores: Which its processes may use; all, if it is empty.

    Attributes:
        fired_at: When the last fault happened, on the monotonic clock.
        stops: A rank that the next fault stops, and that gives no answer from then on.
        seen: All processes that were seen below the ranks.
        job_id: `Colocation.job`, once the ranks have it.
    """

    def __init__(
        self, model_dir: str, *, device_type: str = "cpu", world_size: int = 2, cores: Sequence[int] = ()
    ) -> None:
        self.model_dir, self.device_type = model_dir, device_type
        self.tag = uuid.uuid4().hex
        # Short: sockets are made below it, and the path of a socket is limited to 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="tpf-"))
        (self.folder / "tmp").mkdir()
        self.fired_at: float | None = None
        self.stops: int | None = None
        self.seen: set[psutil.Process] = set()
        self.ranks: list[_Process] = []
        self._shm = ShmFiles(self._pids)
        for rank in range(world_size):
            self.ranks.append(_Process(rank, self.folder, model_dir, device_type, world_size, self.tag))
        if cores:
            for process in self.ranks:
                psutil.Process(process.process.pid).cpu_affinity(list(cores))  # its server inherits it
        self.job_id = ""
        self._wait_started()

    def _wait_started(self) -> None:
        for rank in self.ranks:
            if not rank.pipe.poll(START_S):
                raise TimeoutError(f"rank {rank.rank} did not start: {self.log_tail(rank.rank)}")
            try:
                rank.pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank.rank} did not start: {self.log_tail(rank.rank)}") from None

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exc: object) -> None:
        self.discard()

    def log_tail(self, rank: int, num_bytes: int = 3000) -> str:
        """The end of what a rank has printed."""
        return self.ranks[rank].log.read_text(errors="replace")[-num_bytes:]

    @property
    def alive(self) -> list[int]:
        """Ranks that can make calls."""
        return [rank.rank for rank in self.ranks if rank.is_alive and not rank.is_stopped]

    # --- calls -------------------------------------------------------------------------------------------------------

    def call(
        self,
        do: str,
        ranks: Collection[int] | None = None,
        *,
        limit_s: float,
        meanwhile: Iterator[None] | None = None,
        **arguments: Any,
    ) -> dict[int, Answer]:
        """Make a call on several ranks at once.

        Args:
            do: Name of the call; see `fault_rank.Rank`.
            ranks: All that are alive, by default.
            limit_s: After which a rank is taken to hang.  That counts from the fault, if one happens meanwhile.
            meanwhile: Advanced once, when all ranks have been asked.

        Returns:
            The answers of the ranks that gave one; of a stopped rank there is none.
        """
        ranks = self.alive if ranks is None else [rank for rank in ranks if rank in self.alive]
        self.note_tree()
        began, fired_before = time.monotonic(), self.fired_at
        pending = set(ranks)
        for rank in ranks:
            with contextlib.suppress(OSError):
                self.ranks[rank].pipe.send({"do": do, **arguments})
        if meanwhile is not None:
            next(meanwhile, None)
        answers: dict[int, Answer] = {}
        while pending := {rank for rank in pending if rank not in answers and not self.ranks[rank].is_stopped}:
            zero = began if self.fired_at is None or self.fired_at == fired_before else max(began, self.fired_at)
            left = zero + limit_s - time.monotonic()
            ready = wait(
                [one for rank in pending for one in (self.ranks[rank].pipe, self.ranks[rank].pidfd)], max(left, 0)
            )
            for rank in pending:
                answer = self._read(rank, do, began, ready)
                if answer is not None:
                    answers[rank] = answer
            if not ready and left <= 0:
                for rank in pending:
                    self.ranks[rank].dump()
                    answers[rank] = Answer(rank, do, "hangs", time.monotonic(), began)
        return answers

    def _read(self, rank: int, do: str, began: float, ready: list[Any]) -> Answer | None:
        process = self.ranks[rank]
        try:
            while process.pipe in ready and process.pipe.poll():
                message = process.pipe.recv()
                if message["kind"] == "fired":
                    self.fired_at = message["at"]
                    if self.stops is not None:
                        self.mark_stopped(self.stops)
                    self.note_tree()
                elif message["call"] == do:
                    return Answer(
                        rank, do, message["outcome"], message["at"], message["began"], message["value"],
                        message.get("error", ""), message.get("message", ""), message.get("ours", False), message.get("hint"),
                    )  # fmt: skip
        except (EOFError, OSError):
            process.process.wait(10.0)
        if process.pidfd in ready or not process.is_alive:
            return Answer(rank, do, "died", time.monotonic(), began, process.process.poll())
        return None

    def signal(self, process: psutil.Process, number: signal.Signals) -> None:
        """Send a signal from outside, as the fault of a cell."""
        self.note_tree()
        self.fired_at = time.monotonic()
        process.send_signal(number)

    def mark_stopped(self, rank: int) -> None:
        """Do not wait for this rank any more."""
        self.ranks[rank].is_stopped = True

    def kill_rank(self, rank: int) -> None:
        """End a rank as a launcher does once another one has failed."""
        self.ranks[rank].kill()

    # --- what there is -----------------------------------------------------------------------------------------------

    def note_tree(self) -> None:
        """Remember the processes that exist now: one that is re-parented is found again."""
        for rank in self.ranks:
            with contextlib.suppress(psutil.Error):
                self.seen.update(psutil.Process(rank.process.pid).children(recursive=True))
        for process in list(self.seen):
            with contextlib.suppress(psutil.Error):
                self.seen.update(process.children(recursive=True))

    def server_processes(self) -> list[psutil.Process]:
        """Processes of the server that run, the supervisor among them."""
        self.note_tree()
        return [process for process in self.seen if _runs(process) and _name(process) != "torch_shm_manager"]

    def left(self, *, timeout_s: float = GONE_S) -> list[str]:
        """What the server has left and does not go away by itself: processes, files in /dev/shm and the temporary folder.

        Call it when no server is to be running.
        """
        deadline = time.monotonic() + timeout_s
        while found := self._left_now():
            if not any(name.startswith("process ") for name in found):
                deadline = min(deadline, time.monotonic() + FILES_GONE_S)  # those that would remove them have ended
            if time.monotonic() >= deadline:
                break
            time.sleep(0.2)
        return found

    def _left_now(self) -> list[str]:
        ranks = {rank.process.pid for rank in self.ranks if rank.is_alive}
        processes = self.server_processes() + [
            one for one in self._tagged() if one.pid not in ranks and one not in self.seen
        ]
        found = [f"process {one.pid} {_name(one)}" for one in processes if _name(one) != "torch_shm_manager"]
        found += [f"/dev/shm/{name}" for name in self.shm_files() if not self._counts_handles(name, ranks)]
        temporary = self.folder / "tmp"
        found += [
            f"$TMPDIR/{path.relative_to(temporary)}" for path in sorted(temporary.iterdir()) if self._is_left(path)
        ]
        return found

    def _counts_handles(self, name: str, ranks: Collection[int]) -> bool:
        """Whether torch counts the CUDA-IPC handles of a rank in it, which it keeps for as long as the rank lives."""
        return self.device_type == "cuda" and name.startswith("torch_") and not numbers(name).isdisjoint(ranks)

    def logs(self) -> list[str]:
        """Logs of servers that have been kept, which they are after an end that this library did not cause."""
        return sorted(path.name for path in (self.folder / "tmp").rglob("*.log"))

    def _is_left(self, path: Path) -> bool:
        if _OTHERS.match(path.name):
            return False
        files = [one for one in path.rglob("*") if not one.is_dir()]
        if path.is_dir() and files and all(one.suffix == ".log" for one in files):
            return False  # see `logs`
        if any(rank.is_alive for rank in self.ranks) and path.name.startswith("torch-shm-dir-"):
            return False  # of torch_shm_manager, for the life of the rank
        return True

    def _tagged(self) -> Iterator[psutil.Process]:
        wanted = f"{TAG}={self.tag}".encode()
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    process = psutil.Process(pid)
                    if _runs(process):
                        yield process

    def shm_files(self) -> list[str]:
        """Files of this job in /dev/shm."""
        return self._shm.now(self.job_id)

    def _pids(self) -> set[int]:
        return {rank.process.pid for rank in self.ranks} | {process.pid for process in list(self.seen)}

    def discard(self) -> None:
        """End everything, and remove the folder."""
        self.note_tree()
        for rank in self.ranks:
            rank.close()
        # The supervisor, if it lives, sees that its owner is gone and ends the server with its files.
        psutil.wait_procs([process for process in self.seen if _runs(process)], timeout=GONE_S)
        doomed = [process for process in {*self.seen, *self._tagged()} if _runs(process)]
        for process in doomed:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(doomed, timeout=10.0)
        for name in self.shm_files():
            path = SHM / name
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._shm.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return (
            (" ".join(process.cmdline()) or process.name())[:120]
            if process.name() != "torch_shm_manager"
            else process.name()
        )
    return "?"


__all__ = ["Answer", "Job"]
