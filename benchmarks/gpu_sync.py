"""Weight syncs into a real SGLang server on GPUs: nothing leaks, everything arrives, and what it costs.

    torchrun --standalone --nproc-per-node 2 benchmarks/gpu_sync.py --out result.json
    torchrun --standalone --nproc-per-node 2 benchmarks/gpu_sync.py --shared-device ...   # both ranks on one GPU (rig)

For plain and FSDP2 modules, in one run and on one server, with full tensors (per-rank and fan-out payloads) and with parts:

* ``syncs`` syncs in a row: memory used on the device (driver level, all processes) after each, handles out and back;
* the engine's own checksums of every parameter on every rank, against those after a stock push of the same weights;
* seconds, with SGLang's own push of the same buckets (FlattenedTensorBucket, MultiprocessingSerializer) in between;
* the training step's order: generate, sleep, (train), wake weights, sync, wake the rest, generate;
* the negative control: one payload for all TP ranks.  The ledger must report it on the first sync; without the ledger
  (SGLang's own push, the same mistake) it leaks a model per push.

What is not begun within the budget is left out, and reported as such.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_common
import torch
import torch.distributed as dist
from gpu_common import (
    DUMMY,
    PROMPTS,
    SERVER,
    SHAPES,
    Stock,
    checksums,
    is_verified,
    make_model,
    num_mapped,
    shard,
    slope,
    summary,
    used_mib,
)
from record import command

import tpcolocate
from tpcolocate.weights.transport import bucket_sender as delivery

PART_S = 150.0


def parse_args() -> argparse.Namespace:
    parser = gpu_common.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument(
        "--syncs", type=int, default=100, help="in a row, of the plain module: full tensors, then parts"
    )
    parser.add_argument("--fsdp-syncs", type=int, default=10, help="the same of the FSDP2 module")
    parser.add_argument("--timed", type=int, default=7, help="alternating pairs of ours and stock")
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--budget-s", type=float, default=220.0, help="from the start on; nothing begins later")
    return parser.parse_args()


def repeat(engine: tpcolocate.Engine, model: torch.nn.Module, times: int, **options: object) -> dict[str, object]:
    """Syncs in a row: memory after each, handles, seconds."""
    used, seconds, phases, workers, balanced, verified = [], [], [], [], True, True
    for _ in range(times):
        report = engine.sync_weights(model, **options)
        dist.barrier()
        used.append(round(used_mib(), 1))
        seconds.append(report.seconds)
        phases.append(next(r.seconds for r in report.ranks if r.rank == report.rank))
        workers.append(report.worker_seconds)
        balanced &= all(r.num_exported == r.num_returned for r in report.ranks)
        verified &= is_verified(report)
    return {
        "syncs": times, "mib": report.num_bytes / 2**20, "buckets": report.num_buckets, "tensors": report.num_tensors,
        "all_handles_back_each_time": balanced, "all_tensors_verified_each_time": verified, "transport": report.transport,
        "driver_used_mib": used if times <= 12 else [*used[:3], "...", *used[-3:]], "driver_used_mib_min_max": [min(used), max(used)],
        "slope_mib_per_sync": round(slope(used), 4), "seconds": summary(seconds),
        "phases_median_ms": {k: round(statistics.median(p.get(k, 0.0) for p in phases) * 1e3, 2) for k in phases[-1]},
        "workers_median_ms": {k: round(statistics.median(w.get(k, 0.0) for w in workers) * 1e3, 2) for k in workers[-1]},
        "replayed": report.num_replayed, "mapped": num_mapped(report),
        "direct_mib": [round(r.direct_bytes / 2**20, 1) for r in report.ranks], "staged_mib": [round(r.staged_bytes / 2**20, 1) for r in report.ranks],
        "peak_extra_mib": max(r.peak_extra_bytes for r in report.ranks) / 2**20, "warnings": report.warnings,
    }  # fmt: skip


def alternate(
    engine: tpcolocate.Engine, stock: Stock, model: torch.nn.Module, pairs: int, **options: object
) -> dict[str, object]:
    """Ours and stock in turn, and the engine's checksums after each, which must agree."""
    ours, theirs = [], []
    for _ in range(pairs):
        dist.barrier()
        ours.append(engine.sync_weights(model, **options).seconds)
        theirs.append(stock.push(model))
    return {
        "ours": summary(ours),
        "stock": summary(theirs),
        "stock_over_ours": statistics.median(theirs) / statistics.median(ours),
    }


def negative_control(engine: tpcolocate.Engine, model: torch.nn.Module, bucket_bytes: int) -> dict[str, object]:
    """One payload for all TP ranks: must be reported on the first sync, and leave nothing behind."""
    original = delivery.BucketSender.load

    def duplicated(self, server, payloads, *rest):  # type: ignore[no-untyped-def]
        return original(self, server, [payloads[0]] * len(payloads), *rest)

    before = torch.cuda.memory_allocated()
    delivery.BucketSender.load = duplicated  # type: ignore[method-assign]
    try:
        engine.sync_weights(model, transport="stock", bucket_bytes=bucket_bytes)
        reported = None
    except tpcolocate.TpColocateError as error:
        reported = f"{type(error).__name__}: {error}"
    finally:
        delivery.BucketSender.load = original  # type: ignore[method-assign]
    engine.sync_weights(model, bucket_bytes=bucket_bytes)
    return {
        "reported": reported,
        "allocated_mib_more_after_the_next_sync": (torch.cuda.memory_allocated() - before) / 2**20,
    }


def leak(stock: Stock, model: torch.nn.Module, times: int) -> dict[str, object]:
    """The same mistake without a ledger; what it takes stays taken until the process ends."""
    before, more = torch.cuda.memory_allocated(), []
    for _ in range(times):
        stock.push(model, duplicate=True)
        more.append(round((torch.cuda.memory_allocated() - before) / 2**20, 1))
    return {"pushes": times, "owner_allocated_mib_more": more}


class Checks:
    """What is measured on one engine, in the order in which it should come.

    Args:
        engine: Launched with a memory saver.
        colo: Its slice.
        model: Of every rank, plain.
        args: Of the command line.
    """

    def __init__(
        self, engine: tpcolocate.Engine, colo: tpcolocate.Colocation, model: torch.nn.Module, args: argparse.Namespace
    ) -> None:
        self.engine, self.colo, self.model, self.args = engine, colo, model, args
        self.full = {"bucket_bytes": args.bucket_mib * 2**20, "parts": False}
        self.parts = {"bucket_bytes": args.bucket_mib * 2**20, "parts": True}
        self.stock = Stock(engine, colo, args.bucket_mib * 2**20)
        self.expected: str | None = None

    def all(self) -> dict[str, Callable[[], Any]]:
        """Name of the result -> what measures it."""
        return {
            "plain_first_sync": lambda: str(self.engine.sync_weights(self.model, **self.full)),
            "plain": lambda: repeat(self.engine, self.model, self.args.syncs, **self.full),
            "plain_parts": self.plain_parts,
            "plain_fan_out": lambda: repeat(self.engine, self.model, 10, **self.full, payloads="fan_out"),
            "checksums_equal_stock": self.checksums_equal_stock,
            "plain_beside_stock": lambda: alternate(self.engine, self.stock, self.model, self.args.timed, **self.full),
            "plain_parts_beside_stock": lambda: alternate(
                self.engine, self.stock, self.model, self.args.timed, **self.parts
            ),
            "training_step_order": self.training_step_order,
            "negative_control": lambda: negative_control(self.engine, self.model, self.args.bucket_mib * 2**20),
            "after_control": lambda: repeat(self.engine, self.model, 5, **self.full),
            "plain_beside_stock_2048_mib": self.large_buckets,
            "fsdp2": self.fsdp2,
            "fsdp2_checksums_equal_plain": self.same,
            "fsdp2_parts": lambda: self.repeated(self.args.fsdp_syncs),
            "fsdp2_parts_checksums_equal_plain": self.same,
            "fsdp2_beside_stock": lambda: alternate(
                self.engine, self.stock, self.model, max(self.args.timed // 2, 2), **self.full
            ),
            "leak_without_ledger": lambda: leak(self.stock, self.model, 2),
        }

    def repeated(self, times: int) -> dict[str, Any]:
        """Parts in a row, once nothing new is mapped or planned any more."""
        for _ in range(3):
            self.engine.sync_weights(self.model, **self.parts)
        return repeat(self.engine, self.model, times, **self.parts)

    def plain_parts(self) -> dict[str, Any]:
        """With weights that the engine does not have yet, so that the checksums show whether they have come."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.01)
        torch.cuda.synchronize()
        return self.repeated(self.args.syncs)

    def same(self) -> bool:
        """Whether the engine holds what the stock push had left; on the owner, which is the one that is asked."""
        return checksums(self.engine, self.colo) == self.expected

    def checksums_equal_stock(self) -> dict[str, Any]:
        self.engine.sync_weights(self.model, **self.parts)
        parts = checksums(self.engine, self.colo)
        self.engine.sync_weights(self.model, **self.full)
        full = checksums(self.engine, self.colo)
        self.stock.push(self.model)
        self.expected = checksums(self.engine, self.colo)
        return {"plain": full == self.expected, "plain_parts": parts == self.expected, "digest": self.expected}

    def training_step_order(self) -> dict[str, Any]:
        before = used_mib()
        self.engine.generate(PROMPTS, {"max_new_tokens": 8})
        cycle = []
        for options in (self.full, self.parts, self.parts):
            self.engine.sleep()
            asleep = used_mib()
            self.engine.wake(["weights"])
            self.engine.sync_weights(self.model, **options)
            self.engine.wake()
            self.engine.generate(PROMPTS, {"max_new_tokens": 8})
            cycle.append({"freed_mib": round(before - asleep), "used_again_mib": round(used_mib() - before)})
        return {"cycles": cycle, "checksums_equal": self.same()}

    def large_buckets(self) -> dict[str, Any]:
        stock = Stock(self.engine, self.colo, 2048 * 2**20)
        return alternate(self.engine, stock, self.model, self.args.timed, **{**self.full, "bucket_bytes": 2048 * 2**20})

    def fsdp2(self) -> dict[str, Any]:
        shard(self.model)
        torch.cuda.empty_cache()
        return repeat(self.engine, self.model, self.args.fsdp_syncs, **self.full)


def main() -> None:
    args = parse_args()
    began = time.perf_counter()
    rank, device = gpu_common.join_ranks(shared_device=args.shared_device, backend="nccl")
    budget = gpu_common.Budget(args.budget_s)
    folder = Path("/tmp/tpcolocate-bench-model")
    if rank == 0:
        gpu_common.write_config(folder, args.shape)
    dist.barrier()
    note = gpu_common.Notes(args.out, rank, {
        "gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "shape": args.shape, "tp_size": args.tp_size,
        "ranks": dist.get_world_size(), "shared_device": args.shared_device, "bucket_mib": args.bucket_mib,
        "command": command(sys.argv, os.environ),
    })  # fmt: skip
    server = SERVER | DUMMY | {"enable_memory_saver": True}
    with tpcolocate.init(args.tp_size, device=device, allow_shared_devices=args.shared_device) as colo:
        started = time.perf_counter()
        with colo.launch(folder, health_timeout_s=400, log_path=args.server_log, **server) as engine:
            note("launch_seconds", time.perf_counter() - started)
            note("sglang", engine.sglang_version)
            model = make_model(folder, device, seed=1)
            run = gpu_common.InStep(note)
            for name, measure in Checks(engine, colo, model, args).all().items():
                if budget.left():
                    run.part(name, lambda found, measure=measure: measure(), deadline_s=PART_S)
                else:
                    note(name, "left out: the budget was used up")
    dist.barrier()
    note("shm_left", gpu_common.left_in_shm())
    note("seconds_in_all", time.perf_counter() - began)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
