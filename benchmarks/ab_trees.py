"""Two source trees of this library on one machine, in turns: repeated syncs of the 8B shape, plain, FSDP2 and with a LoRA.

    python benchmarks/ab_trees.py --a /path/to/old --b . --label-a v0.1 --label-b HEAD --record
    python benchmarks/ab_trees.py --a /path/to/old --b . --modules fsdp2_lora lora --staging-mib 1024 --record
    python benchmarks/ab_trees.py --a /path/to/old --b . --device cpu --shape tiny --syncs 3

Each tree gets training ranks and a server of its own.  By default both are up at the same time and sync in turns, a pair at a
time and the order within a pair alternating; while one tree is at work, the other waits.  With ``--rounds N`` they are up one
after the other instead, A B A B for N=2, which needs half the memory and twice the time.  The ranks use nothing but this
library's public interface, and this folder's code for everything else.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
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
    change_adapter,
    checksums,
    is_verified,
    make_model,
    num_mapped,
    shard,
    synchronize,
    write_config,
)
from record import RESULTS, publish, ratio_of_medians, record, summary

import tpcolocate

CPU_SERVER = {"skip_tokenizer_init": True, "context_length": 256, "max_total_tokens": 2048, "max_running_requests": 8}
LORA_RANK = 16
WARM_UP = 8
IDLE_S = 5.0
POLL_S = 0.0005
MOST_FAILURES = 5
"""Failed syncs of one tree."""
Step = tuple[str, str, str]
"""Whose turn it is (``a`` or ``b``), what to do, and for which kind of module."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--a", type=Path, required=True, help="root of a source tree, the baseline")
    parser.add_argument("--b", type=Path, required=True, help="root of the other")
    parser.add_argument("--label-a", default="a", help="what it is in the record, such as its commit")
    parser.add_argument("--label-b", default="b")
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=None, help="training ranks of each tree; default: tp_size")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument(
        "--modules", nargs="+", choices=("plain", "fsdp2", "lora", "fsdp2_lora"), default=["plain", "fsdp2"]
    )
    parser.add_argument("--syncs", type=int, default=15, help="of each tree and module that are timed")
    parser.add_argument(
        "--rounds", type=int, default=0, help="one tree after the other, so many times; 0: both at once"
    )
    parser.add_argument("--staging-mib", type=int, default=512)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--timeout-s", type=float, default=540.0, help="for everything")
    parser.add_argument("--record", action="store_true", help="write the results as JSON")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to")
    parser.add_argument("--worker", choices=("a", "b"), default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def steps(letters: str, modules: list[str], syncs: int) -> list[Step]:
    """What the trees do, one at a time."""
    made: list[Step] = []
    for module in modules:
        made += [(letter, "prepare", module) for letter in letters]
        for number in range(syncs):
            made += [(letter, "sync", module) for letter in (letters if number % 2 == 0 else letters[::-1])]
        made += [(letter, "check", module) for letter in letters]
    return made


# --- the ranks of one tree ---------------------------------------------------------------------------------------------


class Ranks:
    """The training ranks of one tree, and its server.

    Args:
        args: Of the command line.
        device: Of this rank.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device, self.rank = args, device, dist.get_rank()
        # A wait on the GPU would disturb the other tree.
        self.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.timeout_s))
        self.model: torch.nn.Module | None = None
        self.has_lora = False
        self.seed = 0
        self.found: dict[str, Any] = {"tree": str(Path(tpcolocate.__file__).resolve().parents[1]), "failed_syncs": []}

    @property
    def bucket_bytes(self) -> int:
        return int(self.args.staging_mib) * 2**20

    def wait_for(self, number: int) -> None:
        """Until it is the turn of a step; the other ranks wait for rank 0."""
        turn = self.args.folder / "turn"
        while self.rank == 0 and int(turn.read_text() or -1) != number:
            time.sleep(POLL_S)
        dist.barrier(group=self.control)

    def done(self, number: int) -> None:
        dist.barrier(group=self.control)
        if self.rank == 0:
            part = self.args.folder / f"turn.{self.args.worker}"
            part.write_text(str(number + 1))
            part.replace(self.args.folder / "turn")

    def launch(self) -> None:
        kind = self.device.type
        server = SERVER | {"max_total_tokens": 8192} if kind == "cuda" else CPU_SERVER
        started = time.monotonic()
        self.colo = tpcolocate.init(self.args.tp_size, device=self.device, timeout_s=120.0)
        self.engine = self.colo.launch(self.args.folder / "model", health_timeout_s=400.0, **{**DUMMY, **server})
        self.found["launch_seconds"] = round(time.monotonic() - started, 1)
        self.stock = Stock(self.engine, self.colo, self.bucket_bytes) if kind == "cuda" else None

    def prepare(self, module: str) -> None:
        """Make the module and sync it until nothing new is planned or mapped."""
        has_lora = "lora" in module
        if self.model is None or has_lora or self.has_lora:
            self.model, self.has_lora = None, has_lora
            lora = LORA_RANK if has_lora else None
            self.model = make_model(
                self.args.folder / "model", self.device, 1, sharded=module == "fsdp2_lora", lora=lora
            )
            if self.device.type == "cpu" and module == "plain":
                self.model.share_memory()
        if module == "fsdp2":
            shard(self.model)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        first, _ = self.sync()
        for _ in range(WARM_UP):
            self.sync()
        time.sleep(IDLE_S)  # compilers
        for _ in range(3):
            _, report = self.sync()
        self.found[module] = {
            "seconds": [],
            "first": first,
            "commands": report.num_buckets,
            "mapped": num_mapped(report),
            "direct_mib": [round(r.direct_bytes / 2**20, 1) for r in report.ranks],
            "staged_mib": [round(r.staged_bytes / 2**20, 1) for r in report.ranks],
            "peak_extra_mib": [round(r.peak_extra_bytes / 2**20, 1) for r in report.ranks],
            "phases_ms": {},
            "workers_ms": {},
            "all_verified": True,
        }

    def sync(self) -> tuple[float, tpcolocate.SyncReport]:
        """`sync_once`; a sync that fails, on all ranks alike, is noted and made again once syncs repeat each other as before."""
        needed = 1
        while True:
            try:
                found = self.sync_once()
                needed -= 1
            except tpcolocate.TpColocateError as error:
                self.found["failed_syncs"].append(f"{type(error).__name__}: {error.message}"[:200])
                if len(self.found["failed_syncs"]) > MOST_FAILURES:
                    raise
                needed = 6
            if not needed:
                return found

    def sync_once(self) -> tuple[float, tpcolocate.SyncReport]:
        """Change the weights and sync them; seconds on this rank."""
        assert self.model is not None
        self.seed += 1
        if self.has_lora:
            change_adapter(self.model, self.seed)
        else:
            change(self.model, self.seed, self.device)
        synchronize()
        dist.barrier(group=self.control)
        started = time.perf_counter()
        report = self.engine.sync_weights(self.model, bucket_bytes=self.bucket_bytes)
        return time.perf_counter() - started, report

    def timed(self, module: str) -> None:
        seconds, report = self.sync()
        row = self.found[module]
        row["seconds"].append(seconds)
        row["all_verified"] &= is_verified(report)
        row["all_verified"] &= all(r.num_exported == r.num_returned for r in report.ranks)
        mine = next(r.seconds for r in report.ranks if r.rank == report.rank)
        for key, of_sync in (("phases_ms", mine), ("workers_ms", report.worker_seconds)):
            for name, value in of_sync.items():
                row[key].setdefault(name, []).append(value * 1e3)

    def check(self, module: str) -> None:
        """Whether the engine holds what a stock push of the same weights leaves; None on a CPU, whose engine has no checksums."""
        row = self.found[module]
        for key in ("phases_ms", "workers_ms"):
            row[key] = {name: round(statistics.median(values), 2) for name, values in row[key].items()}
        row |= {"equals_stock": None, "failed_syncs": list(self.found["failed_syncs"])}
        if self.stock is not None:
            assert self.model is not None
            self.sync()
            mine = checksums(self.engine, self.colo)
            self.stock.push(self.model)
            row["equals_stock"] = mine == checksums(self.engine, self.colo)
        if self.rank == 0:
            print(f"{self.args.worker} {module}: {json.dumps(row)}", flush=True)

    def run(self) -> None:
        self.launch()  # beside the other tree; nothing is timed before both are up
        for number, (letter, what, module) in enumerate(json.loads((self.args.folder / "steps").read_text())):
            if letter != self.args.worker:
                continue
            self.wait_for(number)
            {"prepare": self.prepare, "sync": self.timed, "check": self.check}[what](module)
            self.done(number)
        if self.rank == 0:
            (self.args.folder / f"found.{self.args.worker}").write_text(json.dumps(self.found))
        self.engine.shutdown()
        self.colo.close()


def work(args: argparse.Namespace) -> None:
    """A training rank."""
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=timedelta(seconds=args.timeout_s))
    tree = {"a": args.a, "b": args.b}[args.worker].resolve()
    if not Path(tpcolocate.__file__).resolve().is_relative_to(tree):
        raise RuntimeError(f"tpcolocate comes from {tpcolocate.__file__}, not from {tree}")
    Ranks(args, device).run()
    dist.destroy_process_group()


# --- both trees --------------------------------------------------------------------------------------------------------


def start(args: argparse.Namespace, letter: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start the ranks of a tree."""
    tree = {"a": args.a, "b": args.b}[letter].resolve()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = {
        "a": args.a.resolve(), "b": args.b.resolve(), "tp-size": args.tp_size, "shape": args.shape, "device": args.device, "staging-mib": args.staging_mib,
        "timeout-s": args.timeout_s, "worker": letter, "folder": folder,
    }  # fmt: skip
    ranks = args.tp_size if args.ranks is None else args.ranks
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", letter, "--nproc-per-node", str(ranks), __file__,
            *(word for name, value in options.items() for word in (f"--{name}", str(value))),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)},
    )  # fmt: skip


def run(args: argparse.Namespace, letters: str, ends: float) -> dict[str, Any]:
    """Have trees do their `steps`; what each found.

    Raises:
        RuntimeError: The ranks of one failed, or time is up; all are ended.
    """
    with tempfile.TemporaryDirectory(prefix="tpcolocate-ab-") as own:
        folder = Path(own)
        write_config(folder / "model", args.shape)
        (folder / "steps").write_text(json.dumps(steps(letters, args.modules, args.syncs)))
        (folder / "turn").write_text("0")
        running = {letter: start(args, letter, folder) for letter in letters}
        try:
            while any(one.poll() is None for one in running.values()):
                if any(one.poll() not in (None, 0) for one in running.values()) or time.monotonic() > ends:
                    raise RuntimeError(f"a tree failed, or time is up: {[one.poll() for one in running.values()]}")
                time.sleep(0.2)
            return {letter: json.loads((folder / f"found.{letter}").read_text()) for letter in letters}
        finally:
            for one in running.values():
                if one.poll() is None:
                    one.terminate()
                    one.wait(60)


def main() -> None:
    args = parse_args()
    if args.worker is not None:
        work(args)
        return
    load_before = os.getloadavg()
    ends = time.monotonic() + args.timeout_s
    runs: list[dict[str, Any]] = []
    try:
        for turn in range(max(args.rounds, 1)):
            for letters in ("a", "b") if args.rounds else ("ab",):
                runs.append(run(args, letters, ends))
                print(f"round {turn}, {letters}:", json.dumps(runs[-1]), flush=True)
    except RuntimeError as error:
        print("cut off:", error, flush=True)
    for module in args.modules:
        rows = {letter: [one[letter][module] for one in runs if module in one.get(letter, {})] for letter in "ab"}
        if all(rows.values()):
            publish(made(args, module, rows, load_before), write=args.record, folder=args.results)
    if len(runs) < max(2 * args.rounds, 1):
        raise SystemExit(1)


def made(
    args: argparse.Namespace, module: str, rows: dict[str, list[dict[str, Any]]], load_before: tuple[float, ...]
) -> dict[str, Any]:
    """The record of one kind of module: B's seconds, A's as the baseline."""
    seconds = {letter: [value for row in of_tree for value in row["seconds"]] for letter, of_tree in rows.items()}
    pairs = list(zip(seconds["a"], seconds["b"]))
    ratios = sorted(b / a for a, b in pairs)
    kept = ("first", "commands", "mapped", "direct_mib", "staged_mib", "peak_extra_mib", "phases_ms", "workers_ms")
    labels = {"a": args.label_a, "b": args.label_b}
    return record(
        f"ab_trees_{args.shape}_tp{args.tp_size}_{module}" if args.device == "cuda" else f"ab_trees_cpu_{module}",
        metric=f"one repeated sync_weights of a {module} module by tree B",
        unit="s",
        samples=seconds["b"],
        baseline={"what": f"tree A ({args.label_a}), in turns", **summary(seconds["a"])},
        comparison={
            **ratio_of_medians([b for _, b in pairs], [a for a, _ in pairs]),
            "ratio_of_pairs": {
                "median": round(statistics.median(ratios), 4), "min": round(ratios[0], 4), "max": round(ratios[-1], 4),
            },
            **{labels[letter]: {name: rows[letter][-1][name] for name in kept} for letter in "ab"},
        },
        settings={
            "shape": args.shape, "tp_size": args.tp_size, "ranks": args.tp_size if args.ranks is None else args.ranks,
            "bucket_mib": args.staging_mib, "trees": labels, "at_the_same_time": args.rounds == 0,
        },
        checks={
            f"{labels[letter]}: {name}": [row[name] for row in rows[letter]]
            for letter in "ab" for name in ("all_verified", "equals_stock", "failed_syncs")
        },
        load_before=load_before,
    )  # fmt: skip


if __name__ == "__main__":
    main()
