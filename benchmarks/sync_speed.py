"""What a weight sync costs beside the stock push of the same weights, and where the time goes.

    torchrun --standalone --nproc-per-node 2 benchmarks/sync_speed.py --tp-size 2 --shared-device --out result.json
    torchrun --standalone --nproc-per-node 1 benchmarks/sync_speed.py --tp-size 1 --out result.json

In one run, on one server, in turns: ours (verification, pause and version included) and the common way
(``full_tensor()`` per parameter where sharded, flattened buckets of 512 MB, SGLang's own serialiser; flush included, pause
and version not).  For a plain module and for FSDP2.  Before every pair the weights change; after it the engine's own
checksums of every parameter on every rank must be those of the stock push.  Beside them: one device-to-device copy of
the same bytes, and the first sync of an engine, which traces its loader.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
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
    num_verified,
    shard,
    summary,
    used_mib,
    write_config,
)

import tpcolocate
from tpcolocate.agreement import RankGroup
from tpcolocate.server.http import ServerClient

# Far more than a GPU's cache holds.
_COPIED_BYTES = 2 * 2**30


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="pairs of ours and stock, for each kind of module")
    parser.add_argument(
        "--staging-mib", type=int, nargs="+", default=[512], help="for FSDP2; the first is paired with stock"
    )
    parser.add_argument(
        "--modules",
        nargs="+",
        default=["plain", "fsdp2"],
        choices=["plain", "fsdp2"],
        help="fsdp2 alone: no rank ever holds the full model",
    )
    parser.add_argument("--in-a-row", type=int, default=100, help="syncs during which the device's memory is watched")
    parser.add_argument(
        "--first", choices=["stock", "ours"], default="stock", help="whose push the new engine takes first"
    )
    parser.add_argument("--stock-mib", type=int, default=512)
    parser.add_argument("--shared-device", action="store_true", help="all ranks on one GPU (a test rig)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--server-log", type=Path, default=None)
    return parser.parse_args()


def copy_floor(num_bytes: int, device: torch.device) -> dict[str, float]:
    """Seconds of one device-to-device copy of as many bytes, on this rank alone; in chunks, to save memory."""
    chunks = -(-num_bytes // _COPIED_BYTES)
    source = torch.empty(num_bytes // chunks, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = []
    for _ in range(7):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(chunks):
            target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    del source, target
    torch.cuda.empty_cache()
    return summary(seconds)


class Inside:
    """Milliseconds of this rank's requests to the server and of its agreements with other ranks, one sync's."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._watch(ServerClient, "_exchange", lambda args, kwargs: args[2])
        self._watch(RankGroup, "agree", lambda args, kwargs: "agreements")

    def _watch(self, kind: type, name: str, key: Callable[[tuple[Any, ...], dict[str, Any]], str]) -> None:
        original = getattr(kind, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                what = key(args, kwargs)
                self.ms[what] = self.ms.get(what, 0.0) + (time.perf_counter() - started) * 1e3

        setattr(kind, name, timed)

    def take(self) -> dict[str, float]:
        found, self.ms = self.ms, {}
        return found


def described(reports: list[tpcolocate.SyncReport], inside: list[dict[str, float]]) -> dict[str, Any]:
    """Seconds, and where they went, in milliseconds (medians)."""

    def medians(dicts: list[dict[str, float]]) -> dict[str, float]:
        names = dict.fromkeys(name for one in dicts for name in one)
        return {name: round(statistics.median(one.get(name, 0.0) for one in dicts) * 1e3, 2) for name in names}

    last = reports[-1]
    return {
        "seconds": summary([one["call"] / 1e3 for one in inside]),
        "phases_ms": medians([next(x.seconds for x in r.ranks if x.rank == r.rank) for r in reports]),
        "workers_ms": medians([r.worker_seconds for r in reports]),
        "inside_ms": {name: round(value / 1e3, 2) for name, value in medians(inside).items()},
        "direct_mib": [round(x.direct_bytes / 2**20, 1) for x in last.ranks],
        "staged_mib": [round(x.staged_bytes / 2**20, 1) for x in last.ranks],
        "peak_extra_mib": [round(x.peak_extra_bytes / 2**20, 1) for x in last.ranks],
        "by_plan": last.num_replayed, "tensors": last.num_tensors, "verified": num_verified(last), "commands": last.num_buckets,
        "all_handles_back": all(x.num_exported == x.num_returned for r in reports for x in r.ranks),
        "mapped": num_mapped(last), "warnings": list(last.warnings),
    }  # fmt: skip


class Bench:
    """One engine, one kind of module after the other."""

    def __init__(
        self, engine: tpcolocate.Engine, colo: tpcolocate.Colocation, stock: Stock, device: torch.device
    ) -> None:
        self.engine, self.colo, self.stock, self.device = engine, colo, stock, device
        self.seed = 0
        self.inside = Inside()
        self.last: dict[str, float] = {}

    def ours(self, model: torch.nn.Module, **options: Any) -> tpcolocate.SyncReport:
        torch.cuda.synchronize()
        dist.barrier()
        self.inside.take()
        started = time.perf_counter()
        report = self.engine.sync_weights(model, **options)
        self.last = {"call": (time.perf_counter() - started) * 1e3, **self.inside.take()}
        return report

    def verified(self, model: torch.nn.Module) -> bool:
        """Whether the engine holds what a stock push of the same weights leaves."""
        mine = checksums(self.engine, self.colo)
        self.stock.push(model)
        return mine == checksums(self.engine, self.colo)

    def pairs(self, model: torch.nn.Module, rounds: int, staging_bytes: int) -> dict[str, Any]:
        reports, inside, theirs, equal = [], [], [], []
        for _ in range(5):  # the last ones at which anything is mapped, planned or captured
            self.ours(model, parts=True, bucket_bytes=staging_bytes)
        for _ in range(rounds):
            self.seed += 1
            change(model, self.seed, self.device)
            reports.append(self.ours(model, parts=True, bucket_bytes=staging_bytes))
            inside.append(self.last)
            theirs.append(self.stock.push(model))
        for _ in range(2):
            self.seed += 1
            change(model, self.seed, self.device)
            self.ours(model, parts=True, bucket_bytes=staging_bytes)
            equal.append(self.verified(model))
        ours = described(reports, inside)
        return {
            "ours": ours, "stock": summary(theirs), "checksums_equal_stock": all(equal),
            "stock_over_ours": statistics.median(theirs) / ours["seconds"]["median"],
        }  # fmt: skip

    def in_a_row(self, model: torch.nn.Module, times: int, staging_bytes: int) -> dict[str, Any]:
        """Memory in use on this rank's device after each of many syncs, all processes together."""
        used = []
        for _ in range(times):
            report = self.ours(model, parts=True, bucket_bytes=staging_bytes)
            dist.barrier()
            used.append(round(used_mib(), 1))
        mean = (times - 1) / 2
        rise = sum((i - mean) * u for i, u in enumerate(used)) / max(sum((i - mean) ** 2 for i in range(times)), 1)
        return {
            "syncs": times, "device_used_mib_min_max": [min(used), max(used)], "slope_mib_per_sync": round(rise, 4),
            "all_verified": is_verified(report),
        }  # fmt: skip

    def alone(self, model: torch.nn.Module, rounds: int, staging_bytes: int) -> dict[str, Any]:
        for _ in range(2):
            self.ours(model, parts=True, bucket_bytes=staging_bytes)
        reports, inside = [], []
        for _ in range(rounds):
            reports.append(self.ours(model, parts=True, bucket_bytes=staging_bytes))
            inside.append(self.last)
        return described(reports, inside)


def main() -> None:
    args = parse_args()
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", 0 if args.shared_device else local)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    folder = Path(f"/tmp/tpcolocate-speed-{args.shape}")
    if rank == 0:
        write_config(folder, args.shape)
    dist.barrier()
    command = "torchrun --standalone --nproc-per-node {} benchmarks/sync_speed.py --shape {} --tp-size {} --rounds {} --staging-mib {} --modules {}{}".format(
        dist.get_world_size(), args.shape, args.tp_size, args.rounds, " ".join(map(str, args.staging_mib)), " ".join(args.modules),
        " --shared-device" if args.shared_device else "",
    )  # fmt: skip
    result: dict[str, Any] = {
        "command": command, "gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "shape": args.shape,
        "tp_size": args.tp_size, "ranks": dist.get_world_size(), "shared_device": args.shared_device,
    }  # fmt: skip
    server = SERVER | DUMMY | {"max_total_tokens": 8192}

    def note(name: str, value: object) -> None:
        result[name] = value
        if rank == 0:
            print(name, json.dumps(value), flush=True)
            args.out.write_text(json.dumps(result, indent=1))

    with tpcolocate.init(args.tp_size, device=device, allow_shared_devices=args.shared_device) as colo:
        started = time.perf_counter()
        with colo.launch(folder, health_timeout_s=400, log_path=args.server_log, **server) as engine:
            note("launch_seconds", time.perf_counter() - started)
            note("sglang", engine.sglang_version)
            sharded = args.modules == ["fsdp2"]
            model = make_model(folder, device, seed=1, sharded=sharded)
            num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
            note("mib", num_bytes / 2**20)
            if rank == 0:
                note("one_copy", copy_floor(num_bytes, device))
            dist.barrier()
            bench = Bench(engine, colo, Stock(engine, colo, args.stock_mib * 2**20), device)
            note("first", args.first)
            if args.first == "stock":
                note("first_push_stock", bench.stock.push(model))
            first = bench.ours(model, parts=True, bucket_bytes=args.staging_mib[0] * 2**20)
            note("first_sync", {**described([first], [bench.last]), "checksums_equal_stock": bench.verified(model)})
            note("later_pushes_stock", summary([bench.stock.push(model) for _ in range(5)]))
            for kind in args.modules:
                if kind == "fsdp2" and not sharded:
                    shard(model)
                    torch.cuda.empty_cache()
                note(kind, bench.pairs(model, args.rounds, args.staging_mib[0] * 2**20))
                if kind == "fsdp2":
                    for mib in args.staging_mib[1:]:
                        note(f"fsdp2_{mib}_mib", bench.alone(model, args.rounds, mib * 2**20))
                note(f"{kind}_in_a_row", bench.in_a_row(model, args.in_a_row, args.staging_mib[0] * 2**20))
    dist.barrier()
    note("shm_left", sorted(n for n in os.listdir("/dev/shm") if n.startswith(("sgl", "tpcolocate", "torch_"))))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
