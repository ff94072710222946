"""What each mechanism of the sync gains by itself: with it and without it in turns, on one server and one trainer.

    torchrun --standalone --nproc-per-node 2 benchmarks/mechanisms.py --tp-size 2 --record
    torchrun --standalone --nproc-per-node 2 benchmarks/mechanisms.py --device cpu --shape tiny --pairs 3

Measures the code of commit 223db49, whose internals it replaces; it need not run on any other.  Without a mechanism:

``end_overlap``
    `WeightUpdates.end_sync` waits for the workers, sets the version, reads it back and lets generation go on, one request after
    the other.
``flush_overlap``
    `WeightUpdates.hold_generation` waits until the cache is dropped, and only then `WorkerConnection` calls the workers; they are
    never called a second time.
``graphs``
    `Replay` queues its work call by call, and `Lanes` uses the current stream alone, in the trainer and in the workers.
    Both serve what the Triton kernel cannot take, so there are two modes more: the kernel switched off, and a trainer in
    float32 whose weights torch casts.
``switching``
    `quick_switching` leaves the interpreter's switch interval as it is.
``all``
    All of them together.

Repeated syncs of the 8B shape, dummy weights in the server, a plain module and FSDP2.  The weights change before every sync.
A pair is one sync with and one without, the order of the two alternates.  On a GPU the engine's checksums after a sync, with
and without, must be those that a stock push of the same weights leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import statistics
import tempfile
import time
import traceback
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_common import (
    DUMMY,
    SERVER,
    SHAPES,
    Stock,
    change,
    checksums,
    is_verified,
    make_model,
    num_mapped,
    shard,
    synchronize,
    write_config,
)
from record import RESULTS, publish, record, save
from served import gather_all

import tpcolocate
from tpcolocate.deadline import Deadline
from tpcolocate.errors import SyncError
from tpcolocate.in_server.tpcolocate_receiver import kernels, replay
from tpcolocate.parallel import in_background
from tpcolocate.server.weight_updates import WeightUpdates
from tpcolocate.weights.transport import connection

MECHANISMS = ("end_overlap", "flush_overlap", "graphs", "switching", "all")
MODES = {"plain": MECHANISMS, "plain_no_kernel": ("graphs",), "fsdp2": MECHANISMS, "plain_fp32": ("graphs",)}
WORKER = "mechanisms_worker.receive"
BUCKET_BYTES = 512 * 2**20
CPU_SERVER = {"skip_tokenizer_init": True, "context_length": 256, "max_total_tokens": 2048, "max_running_requests": 8}
KERNEL_S = 60.0
MOST_FAILURES = 10
"""Failed syncs of one mode."""
DEADLINE_S = 300.0
"""Of one mode."""
OFF: set[str] = set()
"""Mechanisms of this process that are switched off now."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--mechanisms", nargs="+", choices=MECHANISMS, default=MECHANISMS)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--server-log", type=Path, default=None)
    parser.add_argument("--record", action="store_true", help="write the result as JSON")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to")
    return parser.parse_args()


# --- the library without a mechanism -----------------------------------------------------------------------------------


def end_one_by_one(self: WeightUpdates, version: str, *, workers: Any = None, timeout_s: float) -> None:
    deadline = Deadline.after(timeout_s)
    if workers is not None:
        workers.finish(timeout_s=deadline.left(at_least=1.0))
    self._close_session(deadline)
    self._api.set_weight_version(version, timeout_s=deadline.left(at_least=1.0))
    if (reported := self._reported_version(deadline)) != version:
        raise SyncError(f"the engine reports weight version {reported!r} after {version!r} was set")
    self._generation.continue_if_allowed(self._lifecycle.state.synced(), timeout_s=deadline.left(at_least=1.0))


def hold_in_order(self: WeightUpdates, *, timeout_s: float) -> Future[None]:
    deadline = Deadline.after(timeout_s)
    self._generation.hold("retract", timeout_s=timeout_s)
    self._generation.drop_old_cache(timeout_s=deadline.left(at_least=1.0))
    if self._api.release.weight_session:
        self._open_session(deadline)
    done: Future[None] = Future()
    done.set_result(None)
    return done


def open_in_order(self: connection.WorkerConnection) -> connection.Greetings | None:
    with connection.quick_switching():
        awaited = in_background(self._await, name="tpcolocate socket") if self._tp_size else None
        self._server.hold_generation(timeout_s=self._left()).result()
        return None if awaited is None else self._reach(awaited.result())


class Mechanisms:
    """Switches mechanisms off and on again, here and in the workers.

    Args:
        flags: The file that the workers read.
        is_owner: Whether this rank writes it.
    """

    def __init__(self, flags: Path, *, is_owner: bool) -> None:
        self.flags, self.is_owner = flags, is_owner
        self.num_second_calls = 0
        self.worker = {"off": [], "kernel": True, "report": None}
        self._write()
        self._patch()

    def set(self, off: str | None, *, kernel: bool = True, report: Path | None = None) -> None:
        """Switch one of `MECHANISMS` off, and the others on."""
        OFF.clear()
        OFF.update(() if off is None else MECHANISMS if off == "all" else (off,))
        self.worker = {"off": sorted(OFF), "kernel": kernel, "report": None if report is None else str(report)}
        self._write()

    def _write(self) -> None:
        if self.is_owner:
            part = self.flags.with_suffix(".part")
            part.write_text(json.dumps(self.worker))
            part.replace(self.flags)

    def _patch(self) -> None:
        end, hold, reach = WeightUpdates.end_sync, WeightUpdates.hold_generation, connection.WorkerConnection._open
        quick, let_go = connection.quick_switching, connection.WorkerConnection._let_go
        run, init_lanes, ready = replay.Replay.run, replay.Lanes.__init__, kernels.ready

        def counted(opening: Any) -> None:
            self.num_second_calls += 1
            let_go(opening)

        def lanes(one: Any, device: torch.device) -> None:
            if "graphs" in OFF:
                one._device, one._streams = device, []
            else:
                init_lanes(one, device)

        def pick(name: str, without: Any, with_it: Any) -> Any:
            return lambda *args, **kwargs: (without if name in OFF else with_it)(*args, **kwargs)

        WeightUpdates.end_sync = pick("end_overlap", end_one_by_one, end)
        WeightUpdates.hold_generation = pick("flush_overlap", hold_in_order, hold)
        connection.WorkerConnection._open = pick("flush_overlap", open_in_order, reach)
        connection.WorkerConnection._let_go = counted  # type: ignore[method-assign]
        connection.quick_switching = pick("switching", contextlib.nullcontext, quick)
        replay.Replay.run = pick("graphs", lambda _, work: work(), run)
        replay.Lanes.__init__ = lanes  # type: ignore[method-assign]
        kernels.ready = lambda device: ready(device) if self.worker["kernel"] else None


# --- measuring ---------------------------------------------------------------------------------------------------------


class Bench:
    """One engine, one trainer after the other."""

    def __init__(
        self, args: argparse.Namespace, engine: tpcolocate.Engine, colo: tpcolocate.Colocation, mechanisms: Mechanisms
    ) -> None:
        self.args, self.engine, self.colo, self.mechanisms = args, engine, colo, mechanisms
        self.device = colo.device
        self.stock = Stock(engine, colo, BUCKET_BYTES) if self.device.type == "cuda" else None
        self.model: torch.nn.Module | None = None
        self.seed = 0
        self.failures: list[str] = []
        self.all_verified = True

    def trainer(self, mode: str, folder: Path) -> torch.nn.Module:
        """The module of a mode."""
        self.model = None
        gc.collect()
        self.engine.wake()  # takes back what the module before has dropped
        dtype = torch.float32 if mode == "plain_fp32" else torch.bfloat16
        self.model = make_model(folder, self.device, 1, dtype=dtype)
        if mode == "fsdp2":
            shard(self.model)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        elif self.device.type == "cpu":
            self.model.share_memory()
        return self.model

    def sync(self, model: torch.nn.Module, off: str | None, mode: str, report: Path | None = None) -> tuple[float, Any]:
        """Change the weights, and sync them without a mechanism; seconds on this rank, and the report."""
        self.seed += 1
        change(model, self.seed, self.device)
        kernel = mode != "plain_no_kernel"
        self.mechanisms.set(off, kernel=kernel, report=report)
        # Another size makes another plan, and the workers prepare its copies anew.
        options = {"bucket_bytes": BUCKET_BYTES if kernel else BUCKET_BYTES - 2**20}
        synchronize()
        dist.barrier()
        started = time.perf_counter()
        found = self.engine.sync_weights(model, **options)
        seconds = time.perf_counter() - started
        self.all_verified = self.all_verified and is_verified(found)
        return seconds, found

    def repeated(self, model: torch.nn.Module, off: str | None, mode: str) -> tuple[float, Any]:
        """`sync`; one that fails, on all ranks alike, is noted, and made again once syncs repeat each other as before."""
        needed = 1
        while True:
            try:
                found = self.sync(model, off if needed == 1 else None, mode)
                needed -= 1
            except tpcolocate.TpColocateError as error:
                self.failures.append(f"without {off}: {type(error).__name__}: {error.message}"[:200])
                if len(self.failures) > MOST_FAILURES:
                    raise
                needed = 6
            if not needed:
                return found

    def warm_up(self, model: torch.nn.Module, mode: str) -> dict[str, Any]:
        """Sync until nothing new is mapped, planned or captured, and the workers have their kernel."""
        for _ in range(6):
            _, report = self.repeated(model, None, mode)
        ends = time.monotonic() + KERNEL_S
        while mode == "plain" and self.device.type == "cuda" and "one_pass" not in report.worker_seconds:
            if not gather_all(time.monotonic() < ends)[0]:
                break
            _, report = self.repeated(model, None, mode)
        for _ in range(3):
            _, report = self.repeated(model, None, mode)
        return {
            "commands": report.num_buckets,
            "mapped": num_mapped(report),
            "direct_mib": [round(r.direct_bytes / 2**20, 1) for r in report.ranks],
            "staged_mib": [round(r.staged_bytes / 2**20, 1) for r in report.ranks],
            "worker_ms": {name: round(value * 1e3, 2) for name, value in report.worker_seconds.items()},
        }

    def compare(self, model: torch.nn.Module, mechanism: str, mode: str) -> dict[str, Any]:
        with_it, without, inside = [], [], {True: [], False: []}
        for off in (mechanism, None, mechanism, None):
            self.repeated(model, off, mode)
        calls = self.mechanisms.num_second_calls
        for number in range(self.args.pairs):
            for off in (None, mechanism) if number % 2 == 0 else (mechanism, None):
                seconds, report = self.repeated(model, off, mode)
                (with_it if off is None else without).append(seconds)
                inside[off is None].append(sum(report.worker_seconds.get(k, 0.0) for k in ("copy", "one_pass")))
        ratios = [b / a for a, b in zip(with_it, without, strict=True)]
        return {
            "with_ms": round(statistics.median(with_it) * 1e3, 3),
            "without_ms": round(statistics.median(without) * 1e3, 3),
            "without_over_with": {
                "median": round(statistics.median(ratios), 4), "min": round(min(ratios), 4), "max": round(max(ratios), 4),
            },
            "pairs_with_gain": sum(ratio > 1.0 for ratio in ratios), "n": len(ratios),
            "copies_ms": [round(statistics.median(inside[key]) * 1e3, 3) for key in (True, False)],
            "workers_called_again": gather_all(self.mechanisms.num_second_calls - calls)[self.colo.owner_rank],
            "checksums_equal_stock": [self.equals_stock(model, off, mode) for off in (None, mechanism)],
        }  # fmt: skip

    def equals_stock(self, model: torch.nn.Module, off: str | None, mode: str) -> bool | None:
        """Whether the engine holds what a stock push of the same weights leaves; None on a CPU, whose engine has no checksums."""
        self.repeated(model, off, mode)
        if self.stock is None:
            return None
        mine = checksums(self.engine, self.colo)
        self.stock.push(model)
        return mine == checksums(self.engine, self.colo)

    def queued(self, model: torch.nn.Module, mode: str, folder: Path) -> dict[str, Any]:
        """How the workers queued the work that is torch's, with and without: what shows that the switch reaches them."""
        found: dict[str, Any] = {}
        for name, off in (("with", None), ("without", "graphs")):
            self.sync(model, off, mode, report=folder / "unused")
            self.sync(model, off, mode, report=folder / "queued")
            self.sync(model, off, mode)  # the report is written after the answer, and before the next sync
            found[name] = [json.loads((folder / f"queued.{k}").read_text()) for k in range(self.colo.tp_size)]
        return found


def main() -> None:
    args = parse_args()
    load_before = os.getloadavg()
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rank = dist.get_rank()
    with tempfile.TemporaryDirectory(prefix="tpcolocate-mechanisms-") as own:
        folder = Path(gather_all(own)[0])
        if rank == 0:
            write_config(folder / "model", args.shape)
        dist.barrier()
        rows, modes = run(args, device, folder, load_before)
        dist.barrier()
    if rank == 0:
        for name, row in rows.items():
            print(line_of(name, row))
    if rank == 0 and any("error" not in row for row in rows.values()):
        publish(made(args, rows, modes, load_before), write=args.record, folder=args.results)
    dist.destroy_process_group()


def line_of(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{name:30} {row['error']}"
    ratio = row["without_over_with"]
    return (
        f"{name:30} with {row['with_ms']:8.3f} ms, without {row['without_ms']:8.3f} ms, ratio {ratio['median']:.4f} "
        f"({ratio['min']:.3f} to {ratio['max']:.3f}), gain in {row['pairs_with_gain']} of {row['n']} pairs, "
        f"as stock {row['checksums_equal_stock']}"
    )


def run(
    args: argparse.Namespace, device: torch.device, folder: Path, load_before: tuple[float, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All modes; a mode that fails is a row with its error, and the last one."""
    rows: dict[str, Any] = {}
    modes: dict[str, Any] = {}
    python_path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": python_path.rstrip(os.pathsep), "MECHANISMS_FLAGS": str(folder / "flags.json")}
    server = SERVER | DUMMY | {"max_total_tokens": 8192} if device.type == "cuda" else DUMMY | CPU_SERVER
    with tpcolocate.init(args.tp_size, device=device, timeout_s=120.0) as colo:
        mechanisms = Mechanisms(folder / "flags.json", is_owner=colo.is_owner)
        with colo.launch(
            folder / "model",
            health_timeout_s=400,
            log_path=args.server_log,
            env=env,
            custom_weight_loader=WORKER,
            **server,
        ) as engine:
            engine._sync.loader = WORKER
            bench = Bench(args, engine, colo, mechanisms)
            for mode in args.modes:
                faulthandler.dump_traceback_later(DEADLINE_S, exit=True)
                model = None
                try:
                    model = bench.trainer(mode, folder / "model")
                    modes[mode] = bench.warm_up(model, mode)
                    for mechanism in (one for one in MODES[mode] if one in args.mechanisms):
                        name = f"{mode} {mechanism}"
                        rows[name] = bench.compare(model, mechanism, mode)
                        if dist.get_rank() == 0:
                            print(line_of(name, rows[name]), flush=True)
                    modes[mode]["torch_work_in_workers"] = bench.queued(model, mode, folder)
                except Exception as error:
                    traceback.print_exc()
                    rows[f"{mode} failed"] = {"error": f"{type(error).__name__}: {error}"[:300]}
                    break
                modes[mode] |= {"all_verified": bench.all_verified, "failed_syncs": bench.failures}
                bench.all_verified, bench.failures = True, []
                if dist.get_rank() == 0 and args.record:
                    save(made(args, rows, modes, load_before), args.results)
            faulthandler.cancel_dump_traceback_later()
    return rows, modes


def made(
    args: argparse.Namespace, rows: dict[str, Any], modes: dict[str, Any], load_before: tuple[float, ...]
) -> dict[str, Any]:
    """The record."""
    good = {name: row for name, row in rows.items() if "error" not in row}
    return record(
        f"mechanisms_{args.shape}_tp{args.tp_size}" if args.device == "cuda" else "mechanisms_cpu",
        metric="median over pairs of syncs: seconds without a mechanism over seconds with it, one sample per mode and mechanism",
        unit="ratio",
        samples=[row["without_over_with"]["median"] for row in good.values()],
        comparison=rows,
        settings={
            "shape": args.shape, "tp_size": args.tp_size, "ranks": dist.get_world_size(), "pairs": args.pairs,
            "bucket_mib": BUCKET_BYTES / 2**20, "modes": modes,
        },
        checks={
            "checksums_equal_stock": {name: row["checksums_equal_stock"] for name, row in good.items()},
            "all_verified": all(mode.get("all_verified", False) for mode in modes.values()),
        },
        load_before=load_before,
    )  # fmt: skip


if __name__ == "__main__":
    main()
