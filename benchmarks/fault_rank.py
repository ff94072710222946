"""One training rank of `fault_job`: carries out calls on command, and plants a fault where it is asked to.

Run by `fault_job` as ``python fault_rank.py FD FOLDER RANK WORLD_SIZE MODEL DEVICE``; commands and answers go through the socket FD.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import functools
import gc
import importlib
import math
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from gpu_kernels import WITHOUT_COMPILER

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not


@dataclass(frozen=True, slots=True)
class Target:
    """What the ranks train and serve on.

    Attributes:
        dtype: Of the trainer and the engine.
        tie: How far a greedy token's logit may be below the largest, in standard deviations of the logits: engine and trainer
            add numbers up in another order.  After an update that did not arrive it is 2 and more.
        server: More SGLang arguments.
    """

    dtype: str
    tie: float
    server: dict[str, Any] = field(default_factory=dict)


TARGETS = {
    "cpu": Target("float32", 1e-3),
    # Memory for several jobs on one GPU.  SGLang's norms have no float32 there.
    "cuda": Target("bfloat16", 0.3, {**WITHOUT_COMPILER, "mem_fraction_static": 0.5, "enable_memory_saver": True}),
}
ARGS = {"context_length": 256, "max_total_tokens": 2048, "max_running_requests": 8}
PROMPTS = [[5, 6, 7], [100, 200, 300, 400], [17], [9, 8, 7, 6, 5, 4, 3, 2]]
GREEDY = {"temperature": 0, "max_new_tokens": 8}
LONG = {"temperature": 0, "max_new_tokens": 240, "ignore_eos": True}
BUCKET_BYTES = 400_000

_PIPELINE = "tpcolocate.weights.sync.pipeline"
# Phase of a sync -> its functions.
PHASES = {
    "open": ("open_sync",), "preflight": ("choose_sender",), "trace": ("trace_loader",), "replicas": ("compare_replicas",),
    "samples": ("verify_samples",), "transfer": ("transfer",), "buckets": ("send_buckets", "send_stream"),
    "finish": ("finish",),
}  # fmt: skip
# (moment, what runs the fault) -> where it happens: module, attribute, and the call's name where there are many.
PLACES: dict[tuple[str, str], tuple[str, str, str | None]] = {
    ("init", "exception"): ("tpcolocate.session", "exchange", None),
    ("init", "signal"): ("tpcolocate.session", "exchange", None),
    ("launch", "exception"): ("tpcolocate.session", "kernels.prepare", None),
    ("launch", "signal"): ("tpcolocate.server.process", "ServerProcess.last_line", None),  # while the server loads
    ("restart", "exception"): ("tpcolocate.session", "kernels.prepare", None),
    ("restart", "signal"): ("tpcolocate.server.process", "ServerProcess.last_line", None),
    ("publish", "exception on the client"): ("tpcolocate.weights.sync.syncer", "WeightSyncer.warm_up", None),
    ("publish", "exception"): ("tpcolocate.rendezvous", "announce", None),
    ("publish", "signal"): ("tpcolocate.rendezvous", "announce", None),
    ("sleep", "exception on the client"): ("tpcolocate.server.lifecycle", "State.sleeping", None),
    ("sleep", "exception"): ("tpcolocate.server.generation", "GenerationHold.release_memory", None),
    ("sleep", "signal"): ("tpcolocate.agreement", "RankGroup.run_on", "sleep"),
    ("wake", "exception on the client"): ("tpcolocate.server.lifecycle", "State.waking", None),
    ("wake", "exception"): ("tpcolocate.server.generation", "GenerationHold.resume_memory", None),
    ("wake", "signal"): ("tpcolocate.agreement", "RankGroup.run_on", "wake"),
    ("shutdown", "exception on the client"): ("tpcolocate.weights.sync.syncer", "WeightSyncer.close", None),
    ("shutdown", "exception"): ("tpcolocate.server.process", "ServerProcess.stop", None),
    ("shutdown", "signal on the client"): ("tpcolocate.agreement", "RankGroup.all_gather", "end the server"),
    ("shutdown", "signal"): ("tpcolocate.server.process", "ServerProcess.stop", None),
}  # fmt: skip


class PlantedError(RuntimeError):
    """The exception of another library, as it were."""


def process_of(victim: str, owner_pid: int) -> psutil.Process | None:
    """Return a process of the owner's server, or None if there is none (yet)."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(owner_pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and _is(victim, process):
                    return process
    return None


def _is(victim: str, process: psutil.Process) -> bool:
    words = " ".join(process.cmdline())
    if victim == "supervisor":
        return "supervisor.py" in words
    if victim == "server main process":
        parent = process.parent()
        return "sglang" in words and parent is not None and "supervisor.py" in " ".join(parent.cmdline())
    if victim == "detokenizer":
        return "sglang::detokenizer" in words
    return "sglang::scheduler" in words and "TP1" in words


class Fault:
    """A fault that waits for its moment on this rank; happens once.

    Args:
        plan: ``moment``, ``fault``, ``victim`` and its ``rank`` as in `fault_cells.Cell`, ``pids`` of the ranks.
        rank: This rank.
        notify: Called with the time, before it happens.
    """

    def __init__(self, plan: dict[str, Any], rank: int, notify: Callable[[float], None]) -> None:
        self.plan, self.rank, self.notify = plan, rank, notify
        self.happened = False
        self.phase: str | None = None
        self._undo: list[Callable[[], None]] = []

    def place(self) -> None:
        """Put it where it belongs.

        Raises:
            AttributeError: This version has no such place.
        """
        moment: str = self.plan["moment"]
        if moment.startswith("sync: "):
            self._place_in_sync(moment.removeprefix("sync: "))
            return
        way = "exception" if self.plan["fault"] == "exception" else "signal"
        on_client = (moment, f"{way} on the client")
        module, attribute, what = PLACES[on_client if self.rank == 1 and on_client in PLACES else (moment, way)]

        def before(*args: Any, **kwargs: Any) -> None:
            if what is None or kwargs.get("what", "") == what:
                self.happen()

        self._wrap(module, attribute, before)

    def _place_in_sync(self, phase: str) -> None:
        for function in PHASES[phase]:
            self._track(function, phase)
        agree = self._original("tpcolocate.weights.sync.session", "SyncSession.agree")

        @functools.wraps(agree)
        def agree_or_fail(session: Any, error: BaseException | None, *args: Any, **kwargs: Any) -> Any:
            if self.phase == phase and not self.happened:
                try:
                    self.happen()
                except PlantedError as planted:
                    error = planted
            return agree(session, error, *args, **kwargs)

        self._replace("tpcolocate.weights.sync.session", "SyncSession.agree", agree_or_fail)
        if self.plan["rank"] is None:
            # A process of the server's: with a command of this phase that it has not answered.
            post = self._original("tpcolocate.weights.transport.connection", "OwnerConnection.post")

            @functools.wraps(post)
            def post_and_fail(*args: Any, **kwargs: Any) -> Any:
                result = post(*args, **kwargs)
                if self.phase == phase:
                    self.happen()
                return result

            self._replace("tpcolocate.weights.transport.connection", "OwnerConnection.post", post_and_fail)

    def _track(self, function: str, phase: str) -> None:
        original = self._original(_PIPELINE, function)

        @functools.wraps(original)
        def tracked(*args: Any, **kwargs: Any) -> Any:
            self.phase = phase
            try:
                return original(*args, **kwargs)
            finally:
                self.phase = None

        self._replace(_PIPELINE, function, tracked)

    def remove(self) -> None:
        """Put everything back as it was."""
        while self._undo:
            self._undo.pop()()

    def happen(self) -> None:
        """Do it, if it can be done now and has not been."""
        if self.happened:
            return
        if self.plan["fault"] == "exception":
            self.happened = True
            self.notify(time.monotonic())
            raise PlantedError("planted")
        pid = self._pid()
        if pid is None:
            return  # not started yet
        self.happened = True
        self.notify(time.monotonic())
        os.kill(pid, {"Ctrl-C": signal.SIGINT}.get(self.plan["fault"]) or signal.Signals[self.plan["fault"]])

    def _pid(self) -> int | None:
        if self.plan["rank"] is not None:
            # A server is being started: its supervisor is there.
            if (
                self.plan["moment"] in ("launch", "restart")
                and process_of("server main process", self.plan["pids"][0]) is None
            ):
                return None
            pid: int = self.plan["pids"][self.plan["rank"]]
            return pid
        process = process_of(self.plan["victim"], os.getpid())
        return None if process is None else process.pid

    def _wrap(self, module: str, attribute: str, before: Callable[..., None]) -> None:
        original = self._original(module, attribute)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before(*args, **kwargs)
            return original(*args, **kwargs)

        self._replace(module, attribute, wrapped)

    @staticmethod
    def _holder(module: str, attribute: str) -> tuple[Any, str]:
        *path, name = attribute.split(".")
        return functools.reduce(getattr, path, importlib.import_module(module)), name

    def _original(self, module: str, attribute: str) -> Any:
        holder, name = self._holder(module, attribute)
        return getattr(holder, name)

    def _replace(self, module: str, attribute: str, new: Any) -> None:
        holder, name = self._holder(module, attribute)
        self._undo.append(functools.partial(setattr, holder, name, getattr(holder, name)))
        setattr(holder, name, new)


class Rank:
    """The calls that can be asked for, by name."""

    def __init__(
        self, pipe: Connection, folder: Path, rank: int, world_size: int, model_dir: str, device_type: str
    ) -> None:
        self.pipe, self.folder, self.rank, self.world_size, self.model_dir = pipe, folder, rank, world_size, model_dir
        self.target = TARGETS[device_type]
        self.device_type, self.device, self.shares_device = device_type, device_type, False
        self.colo: Any = None
        self.engine: Any = None
        self.model: Any = None
        self.fault: Fault | None = None
        self.rollouts: Rollouts | None = None
        self._send_lock = threading.Lock()
        self._ledgers: weakref.WeakSet[Any] = weakref.WeakSet()

    def send(self, **message: Any) -> None:
        with self._send_lock:
            self.pipe.send(message)

    def serve(self) -> None:
        """Carry out commands until there are no more."""
        self._start()
        self.send(kind="started", pid=os.getpid())
        while True:
            try:
                command = self.pipe.recv()
            except EOFError:
                return
            except KeyboardInterrupt:
                continue
            if command["do"] == "exit":
                return
            self._carry_out(**command)

    def _start(self) -> None:
        import torch
        import torch.distributed as dist
        from transformers import AutoModelForCausalLM

        from tpcolocate import ipc_payload

        torch.set_num_threads(1)
        if self.device_type == "cuda":
            num_devices = torch.cuda.device_count()
            self.device, self.shares_device = f"cuda:{self.rank % num_devices}", num_devices < self.world_size
            torch.cuda.set_device(self.device)
        store = dist.FileStore(str(self.folder / "store"), self.world_size)
        dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=self.world_size, timeout=datetime.timedelta(seconds=60)
        )
        dtype = getattr(torch, self.target.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=dtype).to(self.device)
        made, ledgers = ipc_payload.Ledger.__init__, self._ledgers

        def note(ledger: Any, *args: Any, **kwargs: Any) -> None:
            made(ledger, *args, **kwargs)
            ledgers.add(ledger)

        ipc_payload.Ledger.__init__ = note  # type: ignore[method-assign]

    def _carry_out(self, do: str, **arguments: Any) -> None:
        from tpcolocate.errors import TpColocateError

        answer: dict[str, Any] = {
            "kind": "outcome",
            "call": do,
            "began": time.monotonic(),
            "outcome": "ok",
            "value": None,
        }
        try:
            answer["value"] = getattr(self, do)(**arguments)
        except BaseException as error:
            ours = isinstance(error, TpColocateError)
            text = error.message if isinstance(error, TpColocateError) else str(error)
            answer |= {
                "outcome": "error", "error": type(error).__name__, "message": text.splitlines()[0] if text else "", "ours": ours,
                "error_rank": getattr(error, "rank", None), "hint": getattr(error, "hint", None),
            }  # fmt: skip
            import traceback

            traceback.print_exc()
        answer["at"] = time.monotonic()
        self.send(**answer)

    # --- calls of the library ---------------------------------------------------------------------------------------

    def init(self, timeout_s: float) -> str:
        import tpcolocate

        self.colo = tpcolocate.init(
            self.world_size, device=self.device, timeout_s=timeout_s, allow_shared_devices=self.shares_device
        )
        return str(self.colo.job)

    def launch(self, health_timeout_s: float, **arguments: Any) -> None:
        server = {"dtype": self.target.dtype, **ARGS, **self.target.server, **arguments}
        self.engine = self.colo.launch(self.model_dir, health_timeout_s=health_timeout_s, **server)

    def generate(self, timeout_s: float, long: bool = False) -> int:
        prompts = [PROMPTS[self.rank]] if long else PROMPTS
        answers = self.engine.generate(prompts, LONG if long else GREEDY, timeout_s=timeout_s)
        return sum(len(answer["output_ids"]) for answer in answers)

    def sync(self, timeout_s: float, seed: int, first: bool = False, buckets: bool = False) -> None:
        self.perturb(seed)
        if first:
            self.forget()
        self.engine.sync_weights(self.model, bucket_bytes=BUCKET_BYTES, parts=not buckets, timeout_s=timeout_s)

    def sleep(self, timeout_s: float) -> None:
        self.engine.sleep(timeout_s=timeout_s)

    def wake(self, timeout_s: float) -> None:
        self.engine.wake(timeout_s=timeout_s)

    def restart(self, timeout_s: float, seed: int) -> None:
        """Another server in place of this one, with other weights."""
        self.perturb(seed)
        self.engine.restart(self.model, bucket_bytes=BUCKET_BYTES, timeout_s=timeout_s)

    def can_restart(self) -> bool:
        """Whether this version of the library can."""
        return hasattr(self.engine, "restart")

    def shutdown(self, timeout_s: float, wait: bool = True) -> None:
        if self.engine is not None:
            self.engine.shutdown(wait=wait, timeout_s=timeout_s)
            self.engine = None
            gc.collect()  # what an error has left in cycles is no leak

    def end(self) -> None:
        """What a script does after an error: it leaves its ``with`` statements."""
        if self.engine is not None:
            self.engine.shutdown(wait=False)
            self.engine = None
        if self.colo is not None:
            self.colo.close()
            self.colo = None

    # --- and around them --------------------------------------------------------------------------------------------

    def perturb(self, seed: int) -> None:
        """The same random step on every rank, as an optimiser would take; always from the same weights."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                step = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.add_(step.to(parameter.device, parameter.dtype))

    def forget(self) -> None:
        """Let the next sync do all that a first one does."""
        state = self.engine._sync.state
        state.handle_problems.clear()
        state.loader_map.clear()
        state.clear_cache()
        state.history.compared = None

    def plant(self, **plan: Any) -> None:
        self.fault = Fault(plan, self.rank, lambda at: self.send(kind="fired", at=at))
        try:
            self.fault.place()
        except BaseException:
            self.fault.remove()
            raise

    def unplant(self) -> bool:
        """Whether it had happened."""
        fault, self.fault = self.fault, None
        if fault is None:
            return False
        fault.remove()
        return fault.happened

    def handles(self) -> int:
        """How many handles that this process exported have not come back."""
        return sum(len(ledger.outstanding()) for ledger in list(self._ledgers))

    def tokens(self, timeout_s: float) -> float:
        """How far the engine's greedy tokens are from this rank's own model: see `behind`; the largest of all prompts."""
        answers = self.engine.generate(PROMPTS, GREEDY, timeout_s=timeout_s)
        return max(self.behind(prompt, answer["output_ids"]) for prompt, answer in zip(PROMPTS, answers, strict=True))

    def behind(self, prompt: list[int], tokens: list[int]) -> float:
        """How far the logit of a token is below the largest one, at most, in standard deviations; infinite if there are none."""
        import torch

        if not tokens:
            return math.inf
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *tokens[:-1]]], device=self.device)
            logits = self.model(ids).logits[0, len(prompt) - 1 :].float()
        return float(((logits.amax(-1) - logits[range(len(tokens)), tokens]) / logits.std(-1)).max())

    def start_rollouts(self) -> None:
        if self.rollouts is None:
            self.rollouts = Rollouts(self.engine, self.rank)

    def end_rollouts(self) -> dict[str, Any]:
        rollouts, self.rollouts = self.rollouts, None
        return {"answers": 0, "errors": [], "ended": True} if rollouts is None else rollouts.end()

    def footprint(self) -> dict[str, int]:
        """Memory, of the GPU too, and descriptors of this process alone."""
        import torch

        gc.collect()
        process = psutil.Process()
        on_device = torch.cuda.memory_allocated() if self.device_type == "cuda" else 0
        return {
            "device_bytes": on_device, "rss": process.memory_info().rss, "fds": process.num_fds(), "threads": process.num_threads(),
            "children": len(process.children(recursive=True)),
        }  # fmt: skip


class Rollouts:
    """Requests of this rank, one after another in a thread, beside everything else."""

    def __init__(self, engine: Any, rank: int) -> None:
        self.engine, self.answers, self.errors = engine, 0, []
        self.over = threading.Event()
        self._random = random.Random(rank)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        from tpcolocate.errors import TpColocateError

        while not self.over.is_set():
            prompts = [[self._random.randrange(1, 400) for _ in range(self._random.randrange(1, 12))] for _ in range(2)]
            try:
                self.engine.generate(prompts, {"max_new_tokens": self._random.randrange(1, 20)}, timeout_s=20.0)
                self.answers += 1
                self.over.wait(self._random.random() * 0.2)
            except TpColocateError as error:
                self.errors.append(type(error).__name__)
                self.over.wait(0.05)
            except Exception as error:
                self.errors.append(f"not ours: {type(error).__name__}: {error}")
                return

    def end(self) -> dict[str, Any]:
        self.over.set()
        self._thread.join(30.0)
        return {"answers": self.answers, "errors": self.errors, "ended": not self._thread.is_alive()}


def main() -> None:
    fd, folder, rank, world_size, model_dir, device_type = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    import logging

    logging.basicConfig(level=logging.INFO)
    with Connection(int(fd)) as pipe:
        served = Rank(pipe, Path(folder), int(rank), int(world_size), model_dir, device_type)
        served.serve()


if __name__ == "__main__":
    main()
