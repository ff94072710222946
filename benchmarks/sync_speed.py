"""What a weight sync costs beside the common way with the same weights, and where the time goes.

    torchrun --standalone --nproc-per-node 2 benchmarks/sync_speed.py --shape 8b --tp-size 2 --record
    torchrun --standalone --nproc-per-node 2 benchmarks/sync_speed.py --shape 30b-a3b --modules fsdp2 --record --timeline
    torchrun --standalone --nproc-per-node 2 benchmarks/sync_speed.py --device cpu --shape tiny-moe --rounds 2 --in-a-row 3

In one run, on one server, in turns: ours (verification, pause and version included) and the common way: gather, flattened buckets
of 512 MB, SGLang's own serialiser, flush included, pause and version not.  Fused experts are cut into those of the checkpoint; a
LoRA on a plain model is merged, pushed and unmerged.  For each kind of module of ``--modules``:

* the first syncs: ours on a new engine, the common way's after it (``--first stock``: the other way round).  A new engine is the
  first module's; with ``--fresh-each`` every module has one, which costs the start of a server;
* pairs of both ways, the weights changed before each;
* the engine's own checksums of every parameter on every rank, which must be those of the common way;
* device memory over ``--in-a-row`` syncs.

Beside them: one device-to-device copy of the same bytes.  What would begin after ``--budget-s`` is left out.  On a CPU there is
ours alone, to try the script.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_common import (
    DUMMY,
    EXPERTS,
    FOR_EXPERTS,
    SERVER,
    SHAPES,
    Stock,
    bytes_by_way,
    change,
    change_adapter,
    checksums,
    is_verified,
    left_in_shm,
    make_model,
    num_mapped,
    num_verified,
    slope,
    summary,
    synchronize,
    used_mib,
    write_config,
)
from record import RESULTS, ROOT, ratio_of_medians, record, save
from record import summary as recorded_summary
from served import gather_all

import tpcolocate
from tpcolocate.agreement import RankGroup
from tpcolocate.server.http import ServerClient

# Far more than a GPU's cache holds.
_COPIED_BYTES = 2 * 2**30
MODULES = ("plain", "fsdp2", "lora", "fsdp2_lora")
TARGETS_MS = {
    # shape, module, ranks, tp: milliseconds
    ("8b", "fsdp2", 2, 2): 30, ("8b", "fsdp2", 4, 2): 40, ("8b", "fsdp2", 4, 4): 30,
    ("30b-a3b", "fsdp2", 2, 2): 120, ("30b-a3b", "fsdp2", 4, 2): 140, ("30b-a3b", "fsdp2", 4, 4): 80,
    ("32b", "fsdp2", 2, 2): 90, ("8b", "lora", 2, 2): 80, ("8b", "fsdp2_lora", 2, 2): 80, ("0.6b", "plain", 1, 1): 6,
}  # fmt: skip
FIRST_TARGET = 1.3
"""Times the common way's first."""
CPU_SERVER = {"skip_tokenizer_init": True, "context_length": 256, "max_total_tokens": 2048, "max_running_requests": 8}
MODULE_S = 280.0
"""A module that takes longer hangs: the processes end, and what was found is in the file."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--modules", nargs="+", default=["plain", "fsdp2"], choices=MODULES)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9, help="pairs of ours and the common way, for each module")
    parser.add_argument(
        "--staging-mib", type=int, nargs="+", default=[512], help="the first is paired, the others are alone"
    )
    parser.add_argument("--in-a-row", type=int, default=100, help="syncs during which the device's memory is watched")
    parser.add_argument("--in-a-row-s", type=float, default=60.0, help="at most")
    parser.add_argument(
        "--first", choices=["stock", "ours"], default="ours", help="whose push a new engine takes first"
    )
    parser.add_argument("--fresh-each", action="store_true", help="a new server for every module")
    parser.add_argument("--only-first", action="store_true", help="the first syncs, and nothing else")
    parser.add_argument("--stock-mib", type=int, default=512)
    parser.add_argument("--timeline", action="store_true", help="print where the time of a sync goes")
    parser.add_argument("--shared-device", action="store_true", help="all ranks on one GPU (a test rig)")
    parser.add_argument("--server-args", type=json.loads, default={}, help="more SGLang arguments, as JSON")
    parser.add_argument("--budget-s", type=float, default=3600.0)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "sync_speed.json", help="written anew after every result"
    )
    parser.add_argument("--server-log", type=Path, default=None)
    parser.add_argument("--record", action="store_true", help="write a record for each module")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to")
    return parser.parse_args()


def copy_floor(num_bytes: int, device: torch.device) -> dict[str, float] | None:
    """Seconds of one device-to-device copy of as many bytes, on this rank alone; in chunks, to save memory."""
    if device.type == "cpu":
        return None
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
        original = getattr(kind, name, None)
        if original is None:  # of another commit
            return

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


def medians(dicts: list[dict[str, float]], scale: float = 1.0) -> dict[str, float]:
    """The median of every entry; one that is missing counts as 0."""
    names = dict.fromkeys(name for one in dicts for name in one)
    return {name: round(statistics.median(one.get(name, 0.0) for one in dicts) * scale, 2) for name in names}


def described(
    reports: list[tpcolocate.SyncReport], inside: list[dict[str, float]], seconds: list[float]
) -> dict[str, Any]:
    """Seconds of the slowest rank, and where they went on the ranks of this slice, in milliseconds (medians)."""
    last = reports[-1]
    by_way = [bytes_by_way(rank) for rank in last.ranks]
    return {
        "seconds": summary(seconds),
        "samples": [round(one, 6) for one in seconds],
        "phases_ms": medians([next(x.seconds for x in r.ranks if x.rank == r.rank) for r in reports], 1e3),
        "ranks_ms": {
            str(rank.rank): medians([r.ranks[i].seconds for r in reports], 1e3) for i, rank in enumerate(last.ranks)
        },
        "workers_ms": medians([r.worker_seconds for r in reports], 1e3),
        "inside_ms": medians(inside),
        **{f"{way}_mib": [round(one[way] / 2**20, 1) for one in by_way] for way in by_way[0]},
        "peak_extra_mib": [round(x.peak_extra_bytes / 2**20, 1) for x in last.ranks],
        "by_plan": last.num_replayed, "tensors": last.num_tensors, "verified": num_verified(last), "commands": last.num_buckets,
        "all_handles_back": all(x.num_exported == x.num_returned for r in reports for x in r.ranks),
        "mapped": num_mapped(last), "warnings": list(last.warnings),
    }  # fmt: skip


def timeline(found: dict[str, Any]) -> str:
    """Where the time of a sync goes, as bars: the phases of every rank one after the other, then what the slowest worker did."""
    total = found["seconds"]["median"] * 1e3
    lines = [f"  a sync takes {total:.1f} ms"]
    for rank, phases in found["ranks_ms"].items():
        begun = 0.0
        for name, ms in phases.items():
            start, width = round(begun / total * 60), max(round(ms / total * 60), 1)
            lines.append(f"  rank {rank} {name:10} {ms:8.2f} ms |{' ' * start}{'#' * width}")
            begun += ms
        lines.append(f"  rank {rank} {'(other)':10} {total - begun:8.2f} ms")
    lines += [f"  worker {name:10} {ms:8.2f} ms" for name, ms in found["workers_ms"].items()]
    lines += [f"  request {name:30} {ms:8.2f} ms" for name, ms in found["inside_ms"].items()]
    return "\n".join(lines)


class Bench:
    """One engine, one kind of module after the other.

    Args:
        engine: Of this slice.
        colo: Of this rank.
        inside: What it patches, it patches once.
        args: Of the command line.
    """

    def __init__(
        self, engine: tpcolocate.Engine, colo: tpcolocate.Colocation, inside: Inside, args: argparse.Namespace
    ) -> None:
        self.engine, self.colo, self.device, self.inside = engine, colo, colo.device, inside
        self.stock = Stock(engine, colo, args.stock_mib * 2**20) if colo.device.type == "cuda" else None
        self.options = {"parts": True, "bucket_bytes": args.staging_mib[0] * 2**20}
        self.seed = 0
        self.last: dict[str, float] = {}
        self.seconds = 0.0

    def ours(self, model: torch.nn.Module, **options: Any) -> tpcolocate.SyncReport:
        synchronize()
        dist.barrier()
        self.inside.take()
        started = time.perf_counter()
        report = self.engine.sync_weights(model, **{**self.options, **options})
        self.seconds = time.perf_counter() - started
        self.last = self.inside.take()
        return report

    def theirs(self, model: torch.nn.Module) -> float:
        """Seconds of the slowest rank; 0 on a CPU, where the common way has no engine."""
        return 0.0 if self.stock is None else max(gather_all(self.stock.push(model)))

    def step(self, model: torch.nn.Module) -> None:
        self.seed += 1
        if hasattr(model, "merge_adapter"):
            change_adapter(model, self.seed)
        else:
            change(model, self.seed, self.device)

    def digest(self) -> str | None:
        """Of every parameter of this slice's engine; None on a CPU, whose engine has none."""
        return None if self.stock is None else checksums(self.engine, self.colo)

    def same(self, mine: str | None) -> bool | None:
        """Whether every engine still has its digest."""
        return None if mine is None else all(gather_all(mine == self.digest()))

    def equal(self, model: torch.nn.Module) -> bool | None:
        """Whether every engine holds what the common way leaves; the weights were synced last."""
        mine = self.digest()
        self.theirs(model)
        return self.same(mine)

    def first(self, model: torch.nn.Module, whose: str) -> dict[str, Any]:
        """The first push of both ways, `whose` before the other's."""
        found: dict[str, Any] = {"first": whose}
        if whose == "stock":
            found["stock_seconds"] = self.theirs(model)
        report = self.ours(model)
        found["ours"] = described([report], [self.last], [max(gather_all(self.seconds))])
        mine = self.digest()
        again = self.theirs(model)
        found.setdefault("stock_seconds", again)
        found["checksums_equal_stock"] = self.same(mine)
        return found

    def pairs(self, model: torch.nn.Module, rounds: int) -> dict[str, Any]:
        reports, inside, own, theirs, equal = [], [], [], [], []
        for _ in range(5):  # the last ones at which anything is mapped, planned or captured
            self.ours(model)
        for _ in range(rounds):
            self.step(model)
            reports.append(self.ours(model))
            own.append(self.seconds)
            inside.append(self.last)
            theirs.append(self.theirs(model))
        for _ in range(2):
            self.step(model)
            self.ours(model)
            equal.append(self.equal(model))
        slowest = [max(of_ranks) for of_ranks in zip(*gather_all(own))]
        ours = described(reports, inside, slowest)
        return {
            "ours": ours, "stock": summary(theirs), "stock_samples": [round(one, 6) for one in theirs],
            "checksums_equal_stock": None if self.stock is None else all(equal),
            "stock_over_ours": round(statistics.median(theirs) / ours["seconds"]["median"], 3),
        }  # fmt: skip

    def in_a_row(self, model: torch.nn.Module, times: int, most_s: float) -> dict[str, Any]:
        """Memory in use on this rank's device after each of many syncs, all processes together."""
        used: list[float] = []
        verified = True
        ends = time.monotonic() + most_s
        while len(used) < times and gather_all(time.monotonic() < ends)[0]:
            verified = is_verified(self.ours(model)) and verified
            dist.barrier()
            used.append(round(used_mib(), 1) if self.device.type == "cuda" else 0.0)
        slopes = gather_all(slope(used))
        return {
            "syncs": len(used), "device_used_mib_min_max": [min(used), max(used)], "slope_mib_per_sync": round(max(slopes, key=abs), 4),
            "all_verified": all(gather_all(verified)),
        }  # fmt: skip

    def alone(self, model: torch.nn.Module, rounds: int, mib: int) -> dict[str, Any]:
        for _ in range(2):
            self.ours(model, bucket_bytes=mib * 2**20)
        reports, inside, own = [], [], []
        for _ in range(rounds):
            reports.append(self.ours(model, bucket_bytes=mib * 2**20))
            own.append(self.seconds)
            inside.append(self.last)
        return described(reports, inside, [max(of_ranks) for of_ranks in zip(*gather_all(own))])


class Run:
    """A run: its servers, its modules, and what it found.

    Args:
        args: Of the command line.
        device: Of this rank.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device, self.rank = args, device, dist.get_rank()
        self.ends = time.monotonic() + args.budget_s
        self.load_before = os.getloadavg()
        self.inside = Inside()
        self.folder = Path(f"/tmp/tpcolocate-speed-{os.getuid()}-{args.shape}")
        if self.rank == 0:
            write_config(self.folder, args.shape)
        dist.barrier()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.found: dict[str, Any] = {
            "gpu": name, "torch": torch.__version__, "shape": args.shape, "tp_size": args.tp_size,
            "ranks": dist.get_world_size(), "shared_device": args.shared_device,
        }  # fmt: skip

    def note(self, name: str, value: Any) -> None:
        self.found[name] = value
        if self.rank == 0:
            print(name, json.dumps(value), flush=True)
            self.args.out.parent.mkdir(parents=True, exist_ok=True)
            self.args.out.write_text(json.dumps(self.found, indent=1))

    def left(self) -> bool:
        return gather_all(time.monotonic() < self.ends)[0]

    def launch(self, stack: ExitStack) -> Bench:
        """A new server for each slice, until the end of `stack`."""
        args = self.args
        server: dict[str, Any] = DUMMY | CPU_SERVER
        if self.device.type == "cuda":
            server = SERVER | DUMMY | {"max_total_tokens": 8192} | (FOR_EXPERTS if args.shape in EXPERTS else {})
        faulthandler.dump_traceback_later(500, exit=True)
        colo = stack.enter_context(
            tpcolocate.init(args.tp_size, device=self.device, allow_shared_devices=args.shared_device)
        )
        started = time.perf_counter()
        engine = stack.enter_context(
            colo.launch(self.folder, health_timeout_s=400, log_path=args.server_log, **{**server, **args.server_args})
        )
        faulthandler.cancel_dump_traceback_later()
        self.note("launch_seconds", round(time.perf_counter() - started, 1))
        self.note("sglang", engine.sglang_version)
        return Bench(engine, colo, self.inside, args)

    def make(self, module: str) -> torch.nn.Module:
        lora = self.args.lora_rank if "lora" in module else None
        model = make_model(self.folder, self.device, seed=1, sharded=module.startswith("fsdp2"), lora=lora)
        if self.device.type == "cpu" and not module.startswith("fsdp2"):
            model.share_memory()
        return model

    def all_modules(self) -> None:
        args = self.args
        stack, bench, failed = ExitStack(), None, False
        try:
            for number, module in enumerate(args.modules):
                if not self.left():
                    self.note(f"{module}_left_out", "no time")
                    continue
                fresh = bench is None or args.fresh_each
                if fresh:
                    stack.close()
                    bench = self.launch(stack)
                assert bench is not None
                model = self.make(module)
                if number == 0:
                    self.sizes(model)
                faulthandler.dump_traceback_later(MODULE_S, exit=True)
                failed = self.one(bench, module, model, fresh=fresh)
                faulthandler.cancel_dump_traceback_later()
                del model
                gc.collect()
                if failed:
                    break
                bench.engine.wake()  # takes back what the module has dropped
                if self.device.type == "cuda":
                    torch.cuda.ipc_collect()
                    torch.cuda.empty_cache()
        finally:
            stack.close()

    def sizes(self, model: torch.nn.Module) -> None:
        num_bytes = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if ".lora_" not in name)
        self.note("mib", num_bytes / 2**20)
        floor = copy_floor(num_bytes, self.device) if self.rank == 0 else None
        self.note("one_copy", gather_all(floor)[0])

    def one(self, bench: Bench, module: str, model: torch.nn.Module, *, fresh: bool) -> bool:
        """Measure one module; whether it failed on this rank, whose engine is of no more use then."""
        args = self.args
        try:
            first = {**bench.first(model, args.first), "engine": "new" if fresh else "used before"}
            self.note(f"{module}_first", first)
            if args.only_first:
                return False
            found = bench.pairs(model, args.rounds)
            self.note(module, found)
            for mib in args.staging_mib[1:]:
                self.note(f"{module}_{mib}_mib", bench.alone(model, args.rounds, mib))
            if self.left():
                self.note(f"{module}_in_a_row", bench.in_a_row(model, args.in_a_row, args.in_a_row_s))
        except Exception as error:
            traceback.print_exc()
            self.note(f"{module}_failed", f"{type(error).__name__}: {error}"[:600])
            return True
        if self.rank == 0:
            print(self.line(module), flush=True)
            if args.timeline:
                print(timeline(found["ours"]), flush=True)
            if args.record and self.device.type == "cuda":
                for one in self.records(module):
                    save(one, args.results)
        return False

    def line(self, module: str) -> str:
        """A module's results as one line."""
        found, first = self.found[module], self.found[f"{module}_first"]
        ours, row = found["ours"], self.found.get(f"{module}_in_a_row", {})
        target = self.target(module)
        ms = {name: f"{one['median'] * 1e3:.1f} ({one['min'] * 1e3:.1f} to {one['max'] * 1e3:.1f})" for name, one in (("ours", ours["seconds"]), ("stock", found["stock"]))}  # fmt: skip
        return (
            f"== {self.args.shape} {module}, {self.found['ranks']} ranks, tp={self.args.tp_size}: ours {ms['ours']} ms"
            f"{'' if target is None else f' (target {target})'}, common way {ms['stock']} ms, {found['stock_over_ours']:.1f} times, "
            f"n={ours['seconds']['n']}; first {first['ours']['seconds']['median'] * 1e3:.0f} ms, the common way's {first['stock_seconds'] * 1e3:.0f}; "
            f"MiB own {ours['own_mib']}, peer {ours['peer_mib']}, staged {ours['staged_mib']}, extra {ours['peak_extra_mib']}; "
            f"checksums equal {found['checksums_equal_stock']}, {first['checksums_equal_stock']}; "
            f"slope {row.get('slope_mib_per_sync')} MiB in {row.get('syncs')} syncs"
        )

    def target(self, module: str) -> int | None:
        return TARGETS_MS.get((self.args.shape, module, self.found["ranks"], self.args.tp_size))

    def records(self, module: str) -> list[dict[str, Any]]:
        """The record of a module's syncs, and that of its first one on a new engine."""
        args, found, first = self.args, self.found[module], self.found[f"{module}_first"]
        ours, target, num_ranks = found["ours"], self.target(module), self.found["ranks"]
        name = f"sync_speed_{args.shape}_tp{args.tp_size}{'' if num_ranks == args.tp_size else f'_{num_ranks}_ranks'}"
        settings = {
            "model": f"{args.shape} shape, vocabulary 32000, bf16, random; {self.found['mib']:.1f} MiB in {ours['tensors']} tensors",
            "shape": args.shape, "module": module, "tp_size": args.tp_size, "training_ranks": num_ranks, "stock_bucket_mib": args.stock_mib,
            "staging_mib": args.staging_mib[0], **({"lora_rank": args.lora_rank} if "lora" in module else {}),
        }  # fmt: skip
        what = "gathered (a LoRA: merged, pushed, unmerged), flattened buckets, SGLang's own serialiser, flush included, in turns"
        inside = ("seconds", "samples", "warnings")
        made = [
            record(
                f"{name}_{module}",
                metric="one sync_weights, verification, pause and version included, on the slowest rank",
                unit="s",
                samples=ours["samples"],
                baseline={"what": what, **recorded_summary(found["stock_samples"])},
                comparison={
                    **ratio_of_medians(ours["samples"], found["stock_samples"]),
                    "stock_over_ours": found["stock_over_ours"],
                    "ours_over_one_copy": round(ours["seconds"]["median"] / self.found["one_copy"]["median"], 3),
                },
                target=None if target is None else f"{target} ms",
                target_met=None if target is None else ours["seconds"]["median"] * 1e3 <= target,
                settings=settings,
                checks={
                    "checksums_equal_stock": found["checksums_equal_stock"], "one_copy_seconds": self.found["one_copy"],
                    "in_a_row": self.found.get(f"{module}_in_a_row"), **{k: v for k, v in ours.items() if k not in inside},
                },
                load_before=self.load_before,
            )
        ]  # fmt: skip
        if first["engine"] == "new":
            seconds = first["ours"]["samples"]
            made.append(
                record(
                    f"{name}_{module}_first",
                    metric="the first sync_weights of an engine, which traces its loader, on the slowest rank",
                    unit="s",
                    samples=seconds,
                    baseline={
                        "what": f"the common way's first push, {'before' if first['first'] == 'stock' else 'after'} ours",
                        **recorded_summary([first["stock_seconds"]]),
                    },
                    comparison={"ratio_to_the_first_stock_push": round(seconds[0] / first["stock_seconds"], 3)},
                    target=f"at most {FIRST_TARGET} times the common way's first",
                    target_met=seconds[0] <= FIRST_TARGET * first["stock_seconds"],
                    settings=settings,
                    checks={
                        "checksums_equal_stock": first["checksums_equal_stock"],
                        **{k: v for k, v in first["ours"].items() if k not in inside},
                    },
                    load_before=self.load_before,
                )
            )
        return made


def main() -> None:
    args = parse_args()
    if args.device == "cuda":
        device = torch.device("cuda", 0 if args.shared_device else int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    run = Run(args, device)
    run.all_modules()
    dist.barrier()
    run.note("shm_left", left_in_shm())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
