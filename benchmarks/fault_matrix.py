"""Faults at every moment, in every process: which error comes on which rank after how long, what is left, what goes on.

    python benchmarks/fault_matrix.py                            # everything; hours on two cores
    python benchmarks/fault_matrix.py --only idle/ generate/     # cells whose name contains one of these
    python benchmarks/fault_matrix.py --resume                   # goes on where the last run was cut off
    python benchmarks/fault_matrix.py --jobs 6                   # six jobs beside each other: four cores for each
    python benchmarks/fault_matrix.py --docs                     # docs/faults.md, from the results

Two ranks with a real server on the CPU.  Cells that leave the server alone follow one another on one server; where the
trainer survives, the relaunch by which the job goes on is the server of the next cell.  Each result is written to `--out`
at once.  Jobs beside each other have folders of their own, and know their processes and files from those of others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fault_cells
import record
from fault_cells import Cell
from fault_job import ROOT, Answer, Job
from fault_rank import process_of

sys.path.append(str(ROOT / "tests"))  # the tiny model is the tests'

OUT = ROOT / "benchmarks" / "results" / "fault_matrix.json"
PAGE = ROOT / "docs" / "faults.md"
# After which a rank is taken to hang; beyond its limit, so that the table has by how much it was exceeded.
PATIENCE_S = 45.0
_SECONDS_INTO_GENERATE = 1.0
_FOLDERS = re.compile(r"(?<![\w.:/-])/\w[\w.-]*/(?:[\w.-]+/)*(?=\w)")


class Runner:
    """Runs cells, one after the other, with a job that is kept as long as it can go on.

    Args:
        model_dir: What is served.
        keep_logs: A folder for the logs of cells in which something was wrong; None to drop them.
        cores: For the processes of the job; all, if it is empty.
    """

    def __init__(self, model_dir: str, *, keep_logs: Path | None = None, cores: Sequence[int] = ()) -> None:
        self.model_dir, self.keep_logs, self.cores = model_dir, keep_logs, cores
        self.job: Job | None = None
        self.has = "nothing"
        self._seed = 0

    def close(self) -> None:
        if self.job is not None:
            self.job.discard()
        self.job, self.has = None, "nothing"

    def run(self, cell: Cell) -> dict[str, Any]:
        """Run one cell and return its result."""
        reason = fault_cells.senseless(cell)
        if reason is not None:
            return {**_empty(cell), "status": "senseless", "reason": reason}
        began = time.monotonic()
        job = self.ready_for(cell)
        result = {**_empty(cell), "status": "run", "setup_s": round(time.monotonic() - began, 1)}
        began = time.monotonic()
        attempt = Attempt(cell, job, seed=self._next_seed())
        try:
            reached = attempt.strike()
            if not reached:
                self.close()
                return {**result, "status": "not reached", "reason": attempt.why_not}
            result["goes_on"], self.has = attempt.go_on(self._next_seed())
        finally:
            result |= {"calls": attempt.shown, "left": attempt.left, "handles": attempt.handles}
            result["seconds"] = round(time.monotonic() - began, 1)
        result["problems"] = fault_cells.problems_of(cell, result)
        if result["problems"] and self.keep_logs is not None:
            self._keep(cell, job)
        if self.has == "nothing":
            self.close()
        return result

    def _keep(self, cell: Cell, job: Job) -> None:
        assert self.keep_logs is not None
        self.keep_logs.mkdir(parents=True, exist_ok=True)
        for rank in job.ranks:
            shutil.copy(
                rank.log, self.keep_logs / f"{cell.name.replace('/', '--').replace(' ', '_')}.rank{rank.rank}.log"
            )

    def _next_seed(self) -> int:
        self._seed += 1
        return self._seed

    def ready_for(self, cell: Cell) -> Job:
        """A job that has what the cell needs, and no more."""
        if self.job is None or (cell.needs == "ranks" and self.has != "ranks"):
            self.close()
            self.job, self.has = Job(self.model_dir, cores=self.cores), "ranks"
        job = self.job
        if self.has == "ranks" and cell.needs != "ranks":
            answers = _all_ok(job.call("init", limit_s=60.0, timeout_s=fault_cells.LIMITS_S["init"]))
            job.job_id, self.has = str(answers[0].value), "group"
        if self.has == "group" and cell.needs == "server":
            launch(job, self._next_seed())
            self.has = "server"
        if self.has == "server" and cell.needs == "group":
            _all_ok(job.call("shutdown", limit_s=90.0, timeout_s=20.0))
            self.has = "group"
        return job


def launch(job: Job, seed: int) -> None:
    """Launch, sync, and check what is generated.

    Raises:
        AssertionError: Something of it fails.
    """
    _all_ok(
        job.call("launch", limit_s=fault_cells.LIMITS_S["launch"] + PATIENCE_S, health_timeout_s=fault_cells.HEALTH_S)
    )
    sync_and_check(job, seed)


def sync_and_check(job: Job, seed: int) -> None:
    """Sync, and compare what the engine generates with the trainer's own model.  Raises as `launch`."""
    _all_ok(job.call("sync", limit_s=120.0, timeout_s=60.0, seed=seed))
    answers = _all_ok(job.call("tokens", limit_s=120.0, timeout_s=60.0))
    if not all(answer.value for answer in answers.values()):
        raise AssertionError("wrong tokens after the sync")


def _all_ok(answers: Mapping[int, Answer]) -> Mapping[int, Answer]:
    for answer in answers.values():
        if answer.outcome != "ok":
            raise AssertionError(
                f"rank {answer.rank}, {answer.call}(): {answer.outcome} {answer.error}: {answer.message}"
            )
    return answers


class Attempt:
    """One cell on one job.

    Attributes:
        shown: What the calls of survivors have shown from the fault on.
        left: What was left behind.
        handles: Handles that were not given back.
        why_not: Why the moment was not reached, if it was not.
    """

    def __init__(self, cell: Cell, job: Job, *, seed: int) -> None:
        self.cell, self.job, self.seed = cell, job, seed
        self.shown: list[dict[str, Any]] = []
        self.left: list[str] = []
        self.handles = 0
        self.why_not = ""

    # --- the fault ---------------------------------------------------------------------------------------------------

    def strike(self) -> bool:
        """Make the fault happen, and the calls that it concerns.  Return whether the moment was reached."""
        cell, job = self.cell, self.job
        job.fired_at = None
        if cell.moment == "wake":
            _all_ok(job.call("sleep", limit_s=90.0, timeout_s=20.0))
        if cell.moment in ("idle", "generate"):
            return self._strike_from_outside()
        assert cell.call is not None
        # The rank that gets there in the course of its own work; what is started is started by the owner.
        planter = (
            0
            if cell.rank is None or (cell.moment in ("launch", "publish", "restart") and cell.fault != "exception")
            else cell.rank
        )
        plan = {
            "moment": cell.moment, "fault": cell.fault, "victim": cell.victim, "rank": cell.rank,
            "pids": [rank.process.pid for rank in job.ranks],
        }  # fmt: skip
        [planted] = job.call("plant", [planter], limit_s=30.0, **plan).values()
        if planted.outcome != "ok":
            self.why_not = f"there is no such place in this version: {planted.message}"
            return False
        self._call(cell.call)
        if job.fired_at is None:
            self.why_not = "the call ended before it"
            return False
        if planter in job.alive:
            job.call("unplant", [planter], limit_s=30.0)
        self._look_further()
        return True

    def _strike_from_outside(self) -> bool:
        cell, job = self.cell, self.job
        number = {"Ctrl-C": signal.SIGINT}.get(cell.fault) or signal.Signals[cell.fault]
        if cell.rank is not None:
            import psutil

            process = psutil.Process(job.ranks[cell.rank].process.pid)
        else:
            found = process_of(cell.victim, job.ranks[0].process.pid)
            if found is None:
                self.why_not = "there is no such process"
                return False
            process = found

        def strike() -> Iterator[None]:
            time.sleep(_SECONDS_INTO_GENERATE)
            job.signal(process, number)
            if cell.rank is not None and cell.fault == "SIGSTOP":
                job.mark_stopped(cell.rank)
            yield

        if cell.moment == "generate":
            self._call("generate", meanwhile=strike(), long=True)
        else:
            next(strike())
            if cell.rank is not None and cell.fault != "SIGSTOP":
                job.ranks[cell.rank].process.wait(10.0)
            self._call("generate")
        self._look_further()
        return True

    def _look_further(self) -> None:
        """Make the calls that come next, until one has shown the fault on every rank that lives."""
        if self.cell.moment in ("init", "shutdown"):
            return
        if self.cell.moment in ("launch", "publish"):
            if self._all_are_well("launch"):
                self._call("sync")
            return
        for call in ("sync", "generate"):  # a sync needs no detokenizer
            if self._all_are_well(None):
                self._call(call)

    def _all_are_well(self, call: str | None) -> bool:
        of_call = [one for one in self.shown if call is None or one["call"] == call]
        return all(one["outcome"] == "ok" for one in of_call)

    def _call(self, call: str, meanwhile: Iterator[None] | None = None, **arguments: Any) -> None:
        cell, job = self.cell, self.job
        limit = fault_cells.LIMITS_S[call]
        arguments |= self._arguments(call)
        began = time.monotonic()
        if cell.fault == "SIGSTOP" and cell.rank is not None and job.fired_at is None:
            job.stops = cell.rank
        answers = job.call(call, limit_s=limit + PATIENCE_S, meanwhile=meanwhile, **arguments)
        zero = began if job.fired_at is None else max(began, job.fired_at)
        for rank, answer in sorted(answers.items()):
            if answer.outcome == "died" and rank == cell.rank:
                continue
            self.shown.append({
                "rank": rank, "call": call, "outcome": answer.outcome, "kind": answer.error, "message": answer.message,
                "hint": answer.hint, "ours": answer.ours, "shared": call != "generate",
                "after_s": round(max(0.0, answer.at - zero), 2),
            })  # fmt: skip

    def _arguments(self, call: str) -> dict[str, Any]:
        if call == "launch":
            return {"health_timeout_s": fault_cells.HEALTH_S}
        if call == "sync":
            in_phase = self.cell.phase is not None
            return {
                "timeout_s": fault_cells.SYNC_S, "seed": self.seed, "first": in_phase, "buckets": self.cell.phase == "buckets",
            }  # fmt: skip
        if call == "end":
            return {}
        if call == "restart":
            return {"timeout_s": fault_cells.SYNC_S, "seed": self.seed}
        if call in ("init", "generate"):
            return {"timeout_s": fault_cells.LIMITS_S[call]}
        return {
            "timeout_s": {"sleep": fault_cells.SLEEP_S, "wake": fault_cells.SLEEP_S}.get(call, fault_cells.SHUTDOWN_S)
        }

    # --- afterwards --------------------------------------------------------------------------------------------------

    def go_on(self, seed: int, *, by_restart: bool = False) -> tuple[str, str]:
        """Let the job go on as far as it can; return how, and what there is now (see `Runner.has`).

        Args:
            seed: Of the weights of the next sync.
            by_restart: With `Engine.restart`, where a relaunch would do as well.
        """
        cell, job = self.cell, self.job
        waiting = [one["call"] for one in self.shown if one["outcome"] == "hangs"]
        if waiting and all(fault_cells.waits_as_documented(cell, call) for call in waiting):
            for rank in list(job.alive):  # as a launcher would
                job.kill_rank(rank)
            return self._end_job("job over (ended from outside)"), "nothing"
        hang = bool(waiting)
        if cell.ends_a_rank or hang or len(job.alive) < len(job.ranks):
            return self._end_job("no: a rank hangs" if hang else "job over"), "nothing"
        if cell.moment == "init":
            return self._end_job("job over"), "nothing"
        if cell.leaves_the_server and cell.moment not in ("launch", "publish", "shutdown"):
            how = self._try(lambda: self._sync_again(seed))
            if how is None:
                return "synced again", "server"
        if by_restart and cell.moment not in ("launch", "publish", "shutdown"):
            how = self._try(lambda: self._restart(seed))
            return ("restarted", "server") if how is None else (self._end_job(f"no: {how}"), "nothing")
        how = self._try(lambda: self._relaunch(seed))
        if how is None:
            return "relaunched", "server"
        if "unusable since" in how or "lost contact" in how or "different calls" in how:
            return self._end_job("job over (the group of the ranks is unusable)"), "nothing"
        return self._end_job(f"no: {how}"), "nothing"

    def _try(self, action: Callable[[], None]) -> str | None:
        try:
            action()
        except AssertionError as error:
            return str(error)
        return None

    def _sync_again(self, seed: int) -> None:
        if self.cell.moment in ("sleep", "wake"):
            _all_ok(self.job.call("wake", limit_s=90.0, timeout_s=20.0))
        sync_and_check(self.job, seed)
        self.handles = sum(int(answer.value) for answer in _all_ok(self.job.call("handles", limit_s=30.0)).values())

    def _relaunch(self, seed: int) -> None:
        answers = self.job.call("shutdown", limit_s=fault_cells.LIMITS_S["shutdown"] + PATIENCE_S, timeout_s=20.0)
        _all_ok(answers)
        self.left = self.job.left()
        self.handles = sum(int(answer.value) for answer in _all_ok(self.job.call("handles", limit_s=30.0)).values())
        launch(self.job, seed)

    def _restart(self, seed: int) -> None:
        job = self.job
        _all_ok(job.call("restart", limit_s=fault_cells.LIMITS_S["restart"] + PATIENCE_S, timeout_s=60.0, seed=seed))
        sync_and_check(job, seed)
        self.handles = sum(int(answer.value) for answer in _all_ok(job.call("handles", limit_s=30.0)).values())

    def _end_job(self, how: str) -> str:
        """Let the survivors leave, end the stopped as a launcher does, and look at what is left."""
        job = self.job
        if job.alive:
            job.fired_at = None
            self._call("end")
            for rank in job.alive:
                job.ranks[rank].pipe.send({"do": "exit"})
                try:
                    job.ranks[rank].process.wait(20.0)
                except Exception:
                    how = f"no: rank {rank} does not exit"
        for rank in job.ranks:
            job.kill_rank(rank.rank)
        self.left = list(dict.fromkeys(self.left + job.left()))
        return how


def _empty(cell: Cell) -> dict[str, Any]:
    return {
        "moment": cell.moment, "fault": cell.fault, "victim": cell.victim, "status": "not run", "reason": None, "calls": [],
        "left": [], "handles": 0, "goes_on": "", "problems": [], "seconds": 0.0,
        "commit": record.commit(),
    }  # fmt: skip


# --- the command ----------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """Results of an earlier run; empty if there are none."""
    return json.loads(path.read_text()) if path.exists() else {"cells": {}}


def write(path: Path, cells: Mapping[str, Any], load_before: Sequence[float] | None = None) -> None:
    """Write all results as a record, with the cells in it."""
    samples = [one["after_s"] for result in cells.values() for one in result["calls"] if one["outcome"] == "error"]
    result = record.record(
        path.stem,
        metric="from a fault to the error of a rank that lives",
        unit="s",
        samples=samples if samples else [0.0],
        settings={"tp_size": 2, "model": "tiny random Qwen3", "limits_s": dict(fault_cells.LIMITS_S)},
        checks=summary(cells),
        load_before=load_before,
    )
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
    with tempfile.TemporaryDirectory(prefix="tpf-model-") as folder:
        queue = Queue(cells, results, options.out, ends=ends)
        model, cores = str(make_tiny_model(folder)), sorted(os.sched_getaffinity(0))
        shares = [cores[i :: options.jobs] for i in range(options.jobs)]
        runners = [Runner(model, keep_logs=options.logs, cores=share) for share in shares]
        # Not threads by hand: Python 3.11 takes one for ended whose join() a signal has interrupted, and jobs stay behind.
        with ThreadPoolExecutor(len(runners)) as pool:
            try:
                for served in [pool.submit(queue.serve, runner) for runner in runners]:
                    served.result()
            finally:
                queue.stop()
    print(summary(results))
    return 1 if any(result["problems"] for result in results.values()) else 0


class Queue:
    """Cells for several jobs, and their results.

    Args:
        cells: To run, in order.
        results: By name of the cell; added to.
        out: The file that they are written to after each cell.
        ends: When no more are begun, on the monotonic clock; None for never.
    """

    def __init__(self, cells: Sequence[Cell], results: dict[str, Any], out: Path, *, ends: float | None) -> None:
        self.results, self._out, self._ends = results, out, ends
        self._number, self._left = len(cells), deque(cells)
        self._load_before = os.getloadavg()
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
            write(self._out, self.results, self._load_before)
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
        return {**_empty(cell), "status": "not reached", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}


if __name__ == "__main__":
    sys.exit(main())
