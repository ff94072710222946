"""Faults at every moment, in every process: which error comes on which rank after how long, what is left, what goes on.

    python benchmarks/fault_matrix.py                            # everything; hours on two cores
    python benchmarks/fault_matrix.py --only idle/ generate/     # cells whose name contains one of these
    python benchmarks/fault_matrix.py --resume                   # goes on where the last run was cut off
    python benchmarks/fault_matrix.py --jobs 6                   # six jobs beside each other: four cores for each
    python benchmarks/fault_matrix.py --device cuda --jobs 4     # on GPUs; on a single one all ranks share it
    python benchmarks/fault_matrix.py --docs                     # docs/faults.md, from the results

Two ranks with a real server.  Cells that leave the server alone follow one another on one server; where the
trainer survives, the relaunch by which the job goes on is the server of the next cell.  Each result is written to `--out`
at once.  Jobs beside each other have folders of their own, and know their processes and files from those of others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fault_cells
import fault_job
import fault_rank
import record
from fault_cells import Cell
from fault_job import ROOT
from fault_runner import Runner, empty_result

sys.path.append(str(ROOT / "tests"))  # the tiny model is the tests'

OUT = ROOT / "benchmarks" / "results" / "fault_matrix.json"
PAGE = ROOT / "docs" / "faults.md"
_FOLDERS = re.compile(r"(?<![\w.:/-])/\w[\w.-]*/(?:[\w.-]+/)*(?=\w)")


# --- results --------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """Results of an earlier run, judged by the limits of now; empty if there are none."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    for result in results["cells"].values():
        if result["status"] == "run":
            cell = Cell(result["moment"], result["fault"], result["victim"])
            result["problems"] = fault_cells.problems_of(cell, result)
    return results


def write(
    path: Path,
    cells: Mapping[str, Any],
    load_before: Sequence[float] | None = None,
    *,
    device_type: str = "cpu",
    left: Sequence[str] = (),
) -> None:
    """Write all results as a record, with the cells in it.

    Args:
        path: Of the record.
        cells: Results by name.
        load_before: ``os.getloadavg()`` before the run.
        device_type: On what it ran.
        left: What was left on GPUs after the last cell.
    """
    samples = [one["after_s"] for result in cells.values() for one in result["calls"] if one["outcome"] == "error"]
    result = record.record(
        path.stem,
        metric="from a fault to the error of a rank that lives",
        unit="s",
        samples=samples if samples else [0.0],
        settings={
            "tp_size": 2, "device": device_type, "model": "tiny random Qwen3", "limits_s": dict(fault_cells.LIMITS_S),
        },
        checks={**summary(cells), **({"left_on_gpus": list(left)} if device_type == "cuda" else {})},
        load_before=load_before,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(_without_folders({**result, "cells": dict(cells)}), indent=1) + "\n")
    beside.replace(path)


def _without_folders(value: Any) -> Any:
    """Leave out of all texts where things lie on this machine."""
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, Mapping):
        return {key: _without_folders(one) for key, one in value.items()}
    return [_without_folders(one) for one in value] if isinstance(value, list) else value


def summary(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """How many of all cells make sense, were run, and were as they should be."""
    sensible = [cell for cell in fault_cells.all_cells() if fault_cells.senseless(cell) is None]
    run = [cells[cell.name] for cell in sensible if cell.name in cells and cells[cell.name]["status"] == "run"]
    return {"sensible": len(sensible), "run": len(run), "wrong": sum(bool(result["problems"]) for result in run)}


def page(results: Mapping[str, Any]) -> str:
    """`docs/faults.md`."""
    cells, counts = results["cells"], summary(results["cells"])
    limits = ", ".join(f"{call} {limit:.0f} s" for call, limit in fault_cells.LIMITS_S.items())
    lines = [
        "# What happens when something fails",
        "",
        "Written by `python benchmarks/fault_matrix.py --docs` from `benchmarks/results/fault_matrix.json`; run the cells with",
        "`make faults`.  Two training ranks, SGLang with tp=2 on the CPU, a tiny model.",
        "",
        f"Of {counts['sensible']} cells that make sense, {counts['run']} were run ({_commits(cells)}), and {counts['wrong']} of "
        "them were not as they should be.  What is not run is marked so.",
        "",
        "A row is the moment of the fault, a column the process that it happens to.  An entry has the error, the rank that",
        "raised it and the seconds from the fault to the error, then how the job went on: *synced again* on the same server,",
        "*relaunched* by `shutdown()` and `launch()` in the same processes, or *job over* where a training rank is gone; in",
        "each case with the trainer's own greedy tokens, or with nothing left of the job.",
        "",
        f"A survivor may wait as long as its call documents, and {fault_cells.MARGIN_S:.0f} s more: {limits}.",
        f"An exception or Ctrl-C on a rank in a launch or a restart ends it on the others within {fault_cells.LEFT_S:.0f} s.",
        "Only before a collective call begins, ranks wait for a stopped one without a limit, with a warning that names it.",
        "",
    ]  # fmt: skip
    for fault in fault_cells.FAULTS:
        lines += [f"## {fault}", "", *fault_cells.table(cells, fault), ""]
    lines += ["## What was wrong", ""]
    wrong = [(name, problem) for name, result in cells.items() for problem in result["problems"]]
    lines += [f"* {name}: {problem}" for name, problem in wrong] if wrong else ["Nothing in the cells that were run."]
    lines += ["", "## Cells that make no sense", ""]
    reasons: dict[str, list[Cell]] = {}
    for cell in fault_cells.all_cells():
        if (why := fault_cells.senseless(cell)) is not None:
            reasons.setdefault(why, []).append(cell)
    for why, of_why in reasons.items():
        lines.append(f"* {len(of_why)} cells ({_scope(of_why)}): {why}.")
    unreached = [(name, result["reason"]) for name, result in cells.items() if result["status"] == "not reached"]
    if unreached:
        lines += ["", "## Cells whose moment was not reached", "", *(f"* {name}: {why}" for name, why in unreached)]
    return "\n".join(lines) + "\n"


def _commits(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """How many cells were run on which commit."""
    numbers = Counter(str(result["commit"])[:12] for result in cells.values() if result["status"] == "run")
    return ", ".join(f"{number} on commit `{commit}`" for commit, number in numbers.most_common())


def _scope(cells: Sequence[Cell]) -> str:
    moments = list(dict.fromkeys(cell.moment for cell in cells))
    faults = list(dict.fromkeys(cell.fault for cell in cells))
    victims = list(dict.fromkeys(cell.victim for cell in cells))
    of_moments = ", ".join(moments) if len(moments) < 4 else "any moment"
    return f"{', '.join(faults)} in {', '.join(victims)}; {of_moments}"


# --- the command ----------------------------------------------------------------------------------------------------


def chosen(only: Sequence[str] | None, priority: int | None) -> list[Cell]:
    """The cells to run, in order."""
    cells = [
        cell
        for cell in fault_cells.all_cells()
        if fault_cells.senseless(cell) is None
        and (not only or any(part in cell.name for part in only))
        and (priority is None or fault_cells.priority(cell) <= priority)
    ]
    return fault_cells.in_order(cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="parts of cells' names: moment/fault/victim")
    parser.add_argument(
        "--priority", type=int, help="only cells of this priority or before it; 0 are the most important"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--resume", action="store_true", help="keep the results in --out and leave their cells out")
    parser.add_argument("--jobs", type=int, default=1, help="run so many beside each other")
    parser.add_argument("--until", type=float, default=None, help="begin no cell after so many minutes")
    parser.add_argument("--device", choices=fault_rank.TARGETS, default="cpu")
    parser.add_argument("--logs", type=Path, default=None, help="keep the logs of cells in which something was wrong")
    parser.add_argument("--list", action="store_true", help="print the names of the cells and run nothing")
    parser.add_argument("--docs", action="store_true", help="write docs/faults.md from --out and run nothing")
    options = parser.parse_args()
    if options.docs:
        PAGE.write_text(page(read(options.out)))
        return 0
    cells = chosen(options.only, options.priority)
    results = read(options.out)["cells"] if options.resume else {}
    cells = [cell for cell in cells if results.get(cell.name, {}).get("status") not in ("run", "not reached")]
    if options.list:
        print("\n".join(cell.name for cell in cells))
        return 0
    from tiny_models import make_tiny_model

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # not past the clean-up
    ends = None if options.until is None else time.monotonic() + 60.0 * options.until
    used_before = fault_job.used_device_mib(options.device)
    with tempfile.TemporaryDirectory(prefix="tpf-model-") as folder:
        queue = Queue(cells, results, options.out, ends=ends, device_type=options.device)
        model, cores = str(make_tiny_model(folder)), sorted(os.sched_getaffinity(0))
        shares = [cores[i :: options.jobs] for i in range(options.jobs)]
        runners = [Runner(model, device_type=options.device, keep_logs=options.logs, cores=share) for share in shares]
        # Not threads by hand: Python 3.11 takes one for ended whose join() a signal has interrupted, and jobs stay behind.
        with ThreadPoolExecutor(len(runners)) as pool:
            try:
                for served in [pool.submit(queue.serve, runner) for runner in runners]:
                    served.result()
            finally:
                queue.stop()
    left = fault_job.left_on_gpus(options.device, used_before)
    write(options.out, results, queue.load_before, device_type=options.device, left=left)
    print(summary(results), *left)
    return 1 if left or any(result["problems"] for result in results.values()) else 0


class Queue:
    """Cells for several jobs, and their results.

    Args:
        cells: To run, in order.
        results: By name of the cell; added to.
        out: The file that they are written to after each cell.
        ends: When no more are begun, on the monotonic clock; None for never.
        device_type: On what they run.

    Attributes:
        load_before: ``os.getloadavg()`` before the first.
    """

    def __init__(
        self, cells: Sequence[Cell], results: dict[str, Any], out: Path, *, ends: float | None, device_type: str
    ) -> None:
        self.results, self._out, self._ends, self._device_type = results, out, ends, device_type
        self._number, self._left = len(cells), deque(cells)
        self.load_before = os.getloadavg()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Begin no more cells."""
        with self._lock:
            self._left.clear()

    def serve(self, runner: Runner) -> None:
        """Run cells until none is left; the job of the runner is ended then."""
        try:
            while (cell := self._next()) is not None:
                self._put(cell, run_guarded(runner, cell))
        finally:
            runner.close()

    def _next(self) -> Cell | None:
        with self._lock:
            is_over = self._ends is not None and time.monotonic() > self._ends
            return None if is_over or not self._left else self._left.popleft()

    def _put(self, cell: Cell, result: dict[str, Any]) -> None:
        with self._lock:
            self.results[cell.name] = result
            write(self._out, self.results, self.load_before, device_type=self._device_type)
            print(
                f"{self._number - len(self._left)}/{self._number} {cell.name}: {fault_cells.short(result)} "
                f"[{result['seconds']} s]",
                flush=True,
            )
            for problem in result["problems"]:
                print(f"    {problem}", flush=True)


def run_guarded(runner: Runner, cell: Cell) -> dict[str, Any]:
    """Run a cell; what goes wrong in this script or in setting it up is reported as its result."""
    try:
        return runner.run(cell)
    except Exception as error:
        import traceback

        traceback.print_exc()
        if runner.job is not None:
            for rank in runner.job.ranks:
                print(f"--- rank {rank.rank} ---\n{runner.job.log_tail(rank.rank)}", file=sys.stderr)
        runner.close()
        return {
            **empty_result(cell),
            "status": "not reached",
            "reason": f"{type(error).__name__}: {error}".splitlines()[0],
        }


if __name__ == "__main__":
    sys.exit(main())
