"""Every kind of trainer, on every layout of ranks that the GPUs allow, with and without experts: which of them work, as a table.

    python benchmarks/gpu_matrix.py --record                        # all GPUs of CUDA_VISIBLE_DEVICES, or all there are
    python benchmarks/gpu_matrix.py --layouts tp2 tp2_out_of_order --budget-s 540 --record
    python benchmarks/gpu_matrix.py --device cpu --layouts tp2 --models dense --trainers plain fsdp2

Runs `gpu_trainers.py` under torchrun, a process group and a server per slice for each layout and model, with three syncs and a
step before each for every trainer.  Jobs that fit on the GPUs at the same time run at the same time.  A row is printed as soon as
it is there, and kept in ``--out``: a run that is cut off, or out of ``--budget-s``, goes on where it was when it is started again
on the same commit.  What cannot run is a row that says why.  A hang costs its row (``--row-timeout-s``), and a job never outlives
the budget by more than `GRACE_S`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_trainers import AS_EXPECTED, MODELS, line_of, recorded, series
from record import RESULTS, ROOT, commit, publish, record
from trainers import KINDS

GRACE_S = 45.0
"""After the budget, for the row in flight and the end of a server."""
JOB_S = 90.0
"""A job is not begun with less: its server takes 55 s to start on a GPU."""


@dataclass(frozen=True)
class Layout:
    """How ranks, servers and GPUs are arranged.

    Attributes:
        tp_size: Ranks of a slice, and TP workers of its server.
        num_slices: Slices, each with a server; sharded trainers span all of them.
        order: Of the GPUs in CUDA_VISIBLE_DEVICES; None: as they are.
    """

    tp_size: int
    num_slices: int = 1
    order: tuple[int, ...] | None = None

    @property
    def num_ranks(self) -> int:
        return self.tp_size * self.num_slices

    def devices(self, free: list[str]) -> list[str]:
        """The device list of this layout, of the first of `free`."""
        return [free[i] for i in self.order or range(self.num_ranks)]


LAYOUTS: dict[str, Layout] = {
    "tp1": Layout(1),
    "tp1_two_slices": Layout(1, 2),
    "tp1_out_of_order": Layout(1, 2, (1, 0)),
    "tp2": Layout(2),
    "tp2_out_of_order": Layout(2, 1, (1, 0)),
    "tp2_two_slices": Layout(2, 2),
    "tp2_two_slices_out_of_order": Layout(2, 2, (2, 0, 3, 1)),
    "tp4": Layout(4),
    "tp4_out_of_order": Layout(4, 1, (2, 0, 3, 1)),
    "tp4_two_slices": Layout(4, 2),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--trainers", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--syncs", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=7200.0, help="no trainer is begun after that")
    parser.add_argument("--row-timeout-s", type=float, default=90.0, help="a trainer that takes longer hangs")
    parser.add_argument("--timeout-s", type=float, default=40.0, help="of a sync, and of a wait for another rank")
    parser.add_argument("--cpu-ranks", type=int, default=2, help="with --device cpu: larger layouts are left out")
    parser.add_argument("--server-args", default="{}", help="more SGLang arguments, as JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu_matrix", help="rows and logs")
    parser.add_argument("--retry", action="store_true", help="run rows that were not as expected again")
    parser.add_argument("--fresh", action="store_true", help="run all rows again")
    parser.add_argument("--record", action="store_true", help="write the table as JSON and as Markdown")
    parser.add_argument("--name", default=None, help="of the record")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to")
    return parser.parse_args()


def visible_devices(environment: dict[str, str]) -> list[str]:
    """Tokens of the GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, all if it is not set."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [token.strip() for token in given.split(",") if token.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


# --- jobs ------------------------------------------------------------------------------------------------------------


class Job:
    """One layout and one model: a torchrun with a server per slice.

    Args:
        args: Of the command line.
        name: Of the layout.
        model: See `MODELS`.
        code: The commit, of whose rows alone it knows.
    """

    def __init__(self, args: argparse.Namespace, name: str, model: str, code: str | None) -> None:
        self.args, self.name, self.model, self.layout, self.code = args, name, model, LAYOUTS[name], code
        self.rows_path = args.out / f"{args.device}_{name}_{model}.json"
        self.log_path = self.rows_path.with_suffix(".log")
        self.devices: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.num_printed = 0

    def rows(self) -> list[dict[str, Any]]:
        """Those that are done, of this commit."""
        with contextlib.suppress(FileNotFoundError):
            rows = json.loads(self.rows_path.read_text())
            return [row for row in rows if "verdict" in row and row["commit"] == self.code]
        return []

    def forget(self, *, all_rows: bool) -> None:
        """Drop rows, so that they run again: those that were not as expected, or all."""
        kept = [] if all_rows else [row for row in self.rows() if row["verdict"] in AS_EXPECTED]
        self.rows_path.write_text(json.dumps(kept))

    def todo(self) -> list[str]:
        """Trainers without a row."""
        done = {row["trainer"] for row in self.rows()}
        return [trainer for trainer in self.args.trainers if trainer not in done]

    def start(self, devices: list[str], budget_s: float) -> None:
        args = self.args
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"localhost:{free_port()}", "--nproc-per-node", str(self.layout.num_ranks),
            "--max-restarts", str(len(args.trainers)), str(Path(__file__).with_name("gpu_trainers.py")),
            "--device", args.device, "--tp-size", str(self.layout.tp_size), "--models", self.model, "--trainers", *args.trainers,
            "--syncs", str(args.syncs), "--timeout-s", str(args.timeout_s), "--row-timeout-s", str(args.row_timeout_s),
            "--budget-s", str(budget_s), "--rows", str(self.rows_path), "--server-args", args.server_args,
        ]  # fmt: skip
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        if args.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.layout.devices(devices))
        self.devices, self.num_printed = devices, len(self.rows())
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def print_new(self) -> None:
        """Print the rows that have come since the last call."""
        rows = self.rows()
        for row in rows[self.num_printed :]:
            print(f"{self.name:27} {line_of(row)}", flush=True)
        self.num_printed = max(self.num_printed, len(rows))

    def stop(self) -> None:
        """End the job with all of its processes; its servers end by themselves when their owners are gone."""
        import psutil

        if self.process is None or self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        for child in [*children, psutil.Process(self.process.pid)] if self.process.poll() is None else children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait(timeout=20)

    def tail(self) -> str:
        """The end of the log, in a line."""
        with contextlib.suppress(OSError):
            lines = [line for line in self.log_path.read_text(errors="replace").splitlines() if line.strip()]
            errors = [
                line.strip() for line in lines if re.match(r"\s*(\[rank\d+\]: *)?[\w.]*(Error|Exception)\b", line)
            ]
            return (errors or lines or [""])[-1][:300]
        return ""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


class Matrix:
    """The jobs, and the GPUs that they share.

    Args:
        args: Of the command line.
        slots: Device tokens; with ``--device cpu`` as many placeholders as ranks may run.
    """

    def __init__(self, args: argparse.Namespace, slots: list[str]) -> None:
        self.args, self.slots, self.free = args, slots, list(slots)
        code = commit()
        self.every = [Job(args, name, model, code) for name in LAYOUTS for model in MODELS]
        self.jobs = [job for job in self.every if job.name in args.layouts and job.model in args.models]
        self.ends = time.monotonic() + args.budget_s
        self.ended: dict[str, str] = {}

    def why_not(self, name: str) -> str | None:
        """Why a layout cannot run here; None where it can."""
        layout = LAYOUTS[name]
        if self.args.device == "cpu" and layout.order is not None:
            return "the order of device lists is of GPUs"
        if layout.num_ranks > len(self.slots):
            return (
                f"needs {layout.num_ranks} {'GPUs' if self.args.device == 'cuda' else 'ranks'}, has {len(self.slots)}"
            )
        return None

    def run(self) -> None:
        """All jobs, the largest first, as many at once as there are GPUs for."""
        waiting = [job for job in self.jobs if self.why_not(job.name) is None and job.todo()]
        waiting.sort(key=lambda job: -job.layout.num_ranks)
        running: list[Job] = []
        try:
            while waiting or running:
                left = self.ends - time.monotonic()
                for job in [one for one in waiting if one.layout.num_ranks <= len(self.free)]:
                    if left > JOB_S and job.layout.num_ranks <= len(self.free):
                        waiting.remove(job)
                        running.append(job)
                        devices, self.free = self.free[: job.layout.num_ranks], self.free[job.layout.num_ranks :]
                        job.start(devices, left)
                if not running or left < -GRACE_S:
                    break
                time.sleep(0.5)
                for job in list(running):
                    job.print_new()
                    assert job.process is not None
                    if job.process.poll() is not None:
                        job.print_new()
                        self.finish(running, job)
        finally:
            for job in running:
                job.stop()
                job.print_new()

    def finish(self, running: list[Job], job: Job) -> None:
        assert job.process is not None
        running.remove(job)
        self.free = [slot for slot in self.slots if slot in self.free or slot in job.devices]
        if job.process.returncode and job.todo():
            self.ended[f"{job.name} {job.model}"] = f"the job ended with code {job.process.returncode}: {job.tail()}"

    def rows(self) -> list[dict[str, Any]]:
        """A row for every cell that was asked for, and every other one that an earlier run on this commit has left."""
        found = []
        for job in self.every:
            asked = self.args.trainers if job in self.jobs else []
            done = {row["trainer"]: row for row in job.rows()}
            for trainer in [one for one in KINDS if one in done or one in asked]:
                cell = {"layout": job.name, "model": job.model, "trainer": trainer}
                found.append(cell | (done.get(trainer) or self.missing(job.name, job.model, trainer)))
        return found

    def missing(self, name: str, model: str, trainer: str) -> dict[str, Any]:
        """The row of a cell that has none."""
        layout = self.why_not(name)
        reason = layout or KINDS[trainer].cannot_run(LAYOUTS[name].num_ranks)
        if reason is not None:
            return {"error": reason, "verdict": "not run"}
        failed = self.ended.get(f"{name} {model}")
        if failed is not None:
            return {"error": failed, "verdict": "FAILED"}
        return {"error": "no time; the same command goes on with it", "verdict": "left out"}


# --- the table -------------------------------------------------------------------------------------------------------


def without_folders(text: str) -> str:
    """An error message without the folders of the machine."""
    return re.sub(r"(?<![\w.:/-])(?:/[\w.@+-]+)+/([\w.@+-]+)", r"\1", text)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: first which trainer works where, then what each row found."""
    columns = list(dict.fromkeys((row["layout"], row["model"]) for row in rows))
    cells = {(row["layout"], row["model"], row["trainer"]): row["verdict"] for row in rows}
    trainers = [kind for kind in KINDS if any(row["trainer"] == kind for row in rows)]
    lines = ["| layout | model | " + " | ".join(trainers) + " |", "|---" * (len(trainers) + 2) + "|"]
    for layout, model in columns:
        verdicts = [cells.get((layout, model, trainer), "") for trainer in trainers]
        lines.append(f"| {layout} | {model} | " + " | ".join(verdicts) + " |")
    lines += ["", "| layout | model | trainer | verdict | gap after each sync | unsynced | seconds | own MiB | peer MiB | staged MiB |"]  # fmt: skip
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        if row["verdict"] in ("not run", "left out"):
            continue
        stale = f"{row['stale'][0]:.2g}" if "stale" in row else ""
        names = ("gap", "seconds", "own_mib", "peer_mib", "staged_mib")
        gap, *others = (series(row, name) for name in names)
        cells_of = [row["layout"], row["model"], row["trainer"], row["verdict"], gap, stale, *others]
        lines.append("| " + " | ".join(cells_of) + " |")
    failed = [row for row in rows if row["error"] is not None]
    reasons: dict[str, list[str]] = {}
    for row in failed:
        text = without_folders(row["error"].splitlines()[0])
        reasons.setdefault(f"{row['verdict']}: {text}", []).append(f"{row['layout']} {row['model']} {row['trainer']}")
    lines += ["", *(f"* {reason} ({'; '.join(summarised(cells))})" for reason, cells in reasons.items())]
    return "\n".join(lines) + "\n"


def summarised(cells: list[str]) -> list[str]:
    """At most three, and how many more."""
    return cells if len(cells) <= 3 else [*cells[:3], f"{len(cells) - 3} more"]


def made(
    args: argparse.Namespace, slots: list[str], rows: list[dict[str, Any]], load_before: tuple[float, ...]
) -> dict[str, Any] | None:
    """The record; None where no trainer was synced."""
    samples = [value for row in rows for value in row.get("gap", ()) if math.isfinite(value)]
    if not samples:
        return None
    checks: dict[str, Any] = {
        "as_expected": sum(row["verdict"] in AS_EXPECTED for row in rows),
        "of": len(rows),
        "verdicts": {one: sum(row["verdict"] == one for row in rows) for one in sorted({r["verdict"] for r in rows})},
    }
    for row in rows:
        content = recorded(row)
        if "error" in content:
            content["error"] = without_folders(content["error"])
        checks[f"{row['layout']} {row['model']} {row['trainer']}"] = content
    return record(
        args.name or (f"gpu_matrix_{len(slots)}_gpus" if args.device == "cuda" else "cpu_matrix"),
        metric="largest difference of a sampled token's log-probability between engine and trainer after a sync",
        unit="nats",
        samples=samples,
        settings={"layouts": {name: vars(LAYOUTS[name]) for name in {r["layout"]: None for r in rows}}, "syncs": args.syncs, "num_devices": len(slots)},
        checks=checks,
        load_before=load_before,
    )  # fmt: skip


def main() -> None:
    args = parse_args()
    load_before = os.getloadavg()
    args.out.mkdir(parents=True, exist_ok=True)
    slots = visible_devices(dict(os.environ)) if args.device == "cuda" else [""] * args.cpu_ranks
    matrix = Matrix(args, slots if args.device == "cuda" else [f"cpu {i}" for i in range(args.cpu_ranks)])
    if args.fresh or args.retry:
        for job in matrix.jobs:
            job.forget(all_rows=args.fresh)
    print(f"devices: {slots}; layouts: {[name for name in args.layouts if matrix.why_not(name) is None]}", flush=True)
    try:
        matrix.run()
    finally:
        rows = matrix.rows()
        text = table(rows)
        (args.out / "table.md").write_text(text)
        print("\n" + text, flush=True)
        result = made(args, slots, rows, load_before)
        if result is not None and args.record:
            publish(result, write=True, folder=args.results)
            (args.results / f"{result['name']}.md").write_text(heading(result) + text)
    bad = [row for row in rows if row["verdict"] not in AS_EXPECTED]
    print(f"{len(rows) - len(bad)} of {len(rows)} rows as expected", flush=True)
    sys.exit(1 if bad else 0)


def heading(result: dict[str, Any]) -> str:
    gpus = result["hardware"]["gpus"]
    where = f"{len(gpus)} x {gpus[0]}" if gpus else result["hardware"]["cpu"]
    versions = result["versions"]
    return (
        f"# Trainers, models and layouts: {result['name']}\n\n{where}, SGLang {versions['sglang']}, torch {versions['torch']}, "
        f"commit {result['commit']}, `{result['command']}`.\nThe gap is in nats, MiB and seconds are those of the three syncs.\n\n"
    )


if __name__ == "__main__":
    main()
