"""Faults one after another under a job that goes on: rollouts beside every sync, and recovery after each fault.

    python benchmarks/soak.py --faults 20 --seed 1 --record
    python benchmarks/soak.py --faults 200 --seed 3 --until 100 --record    # begins no fault after 100 minutes
    python benchmarks/soak.py --faults 200 --seed 3 --jobs 8 --record       # eight jobs share the faults: two cores for each
    python benchmarks/soak.py --faults 40 --jobs 4 --device cuda --record   # on GPUs; on a single one all ranks share it

Each fault is drawn from the seed.  After it the ranks must have an error within their limits, the job must go on (a sync
again, a relaunch in the same processes, or a new job where a rank is gone), and the engine must generate the trainer's own
greedy tokens.  Nothing of a server may be left, and the ranks' memory, descriptors and files must not grow.  SIGTERM ends
it after the faults in progress, with the record of what it has found.  SGLang 0.5.10 to 0.5.20 cannot sync beside rollouts.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import fault_cells
import fault_job
import fault_rank
import record
from fault_cells import Cell
from fault_job import ROOT, SHM, Job
from fault_runner import Attempt, Runner, sync_and_check
from packaging.version import Version

sys.path.append(str(ROOT / "tests"))  # the tiny model is the tests'

# Of the ranks, from the second time that a server runs to the last: the first launch loads libraries.
MOST_RSS_BYTES, MOST_FDS, MOST_DEVICE_BYTES = 64 * 2**20, 8, 2**20
_SYNCS_BETWEEN = 3
# How often: what leaves the server alone, what ends it, what ends a rank.
_WEIGHTS = {"server stays": 4, "server ends": 3, "rank ends": 1}


def kind_of(cell: Cell) -> str:
    """Which of `_WEIGHTS` a cell counts for."""
    return "server stays" if cell.leaves_the_server else "rank ends" if cell.ends_a_rank else "server ends"


def schedule(num_faults: int, seed: int, *, weights: Mapping[str, int] | None = None) -> list[Cell]:
    """Draw the faults of a run; the same ones for the same arguments.

    Args:
        num_faults: How many.
        seed: Of the draws.
        weights: How often each of `kind_of` comes, in relation to the others.
    """
    weights = _WEIGHTS if weights is None else weights
    chance = random.Random(seed)
    pools: dict[str, list[Cell]] = {kind: [] for kind in _WEIGHTS}
    for cell in fault_cells.all_cells():
        # While the rollouts run, and no Ctrl-C: after it the ranks need not agree any more.
        running = cell.moment in ("idle", "generate") or cell.phase is not None
        # SGLang's main process ends after a SIGTERM when no request is left, and there is always one.
        drains = cell.fault == "SIGTERM" and cell.victim == "server main process"
        if running and cell.fault != "Ctrl-C" and not drains and fault_cells.senseless(cell) is None:
            pools[kind_of(cell)].append(cell)
    drawn = []
    for _ in range(num_faults):
        [kind] = chance.choices(list(weights), weights=list(weights.values()))
        drawn.append(chance.choice(pools[kind]))
    return drawn


@dataclass(slots=True)
class Found:
    """What a run has shown.

    Attributes:
        recovered_s: From each fault to right tokens, or to the end of the job where a rank had gone.
        problems: What was wrong, with the fault's name.
        num_syncs: Syncs beside rollouts whose tokens were compared.
        num_answers: Of the rollouts.
        growth: Name -> most growth of any job from its first good sample to its last.
        faults: Names of the faults that happened.
    """

    recovered_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_syncs: int = 0
    num_answers: int = 0
    growth: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, other: Found) -> None:
        """Add what a job beside this one has found."""
        self.recovered_s += other.recovered_s
        self.problems += other.problems
        self.faults += other.faults
        self.num_syncs += other.num_syncs
        self.num_answers += other.num_answers
        for name, value in other.growth.items():
            self.growth[name] = max(self.growth.get(name, 0), value)


class Soak:
    """Runs a schedule.

    Args:
        model_dir: What is served.
        device_type: On what: "cpu" or "cuda".
        syncs_between: Syncs beside rollouts before each fault.
        ends: When no more faults are begun, on the monotonic clock; None for never.
        label: In front of each line that is printed.
    """

    def __init__(
        self,
        model_dir: str,
        *,
        device_type: str = "cpu",
        syncs_between: int = _SYNCS_BETWEEN,
        ends: float | None = None,
        label: str = "",
    ) -> None:
        self.runner = Runner(model_dir, device_type=device_type)
        self.label = label
        self.ends = ends
        self.syncs_between = syncs_between
        self.found = Found()
        self._seed = 0
        self._first: dict[str, int] | None = None
        self._job: Job | None = None
        self._num_samples = 0

    def run(self, cells: Sequence[Cell]) -> Found:
        """Run all faults of a schedule, whatever goes wrong with one of them."""
        try:
            for number, cell in enumerate(cells, 1):
                if self.ends is not None and time.monotonic() > self.ends:
                    break
                known = len(self.found.problems)
                self._fault(cell)
                # One line at a time: a run takes hours.
                print(
                    f"{self.label}{number}/{len(cells)} {cell.name}",
                    *self.found.problems[known:],
                    sep="\n    ",
                    flush=True,
                )
            if self.runner.job is not None and self.runner.has == "server":
                self._roll_out_and_sync(self.runner.job)
                self._end()
        finally:
            self.runner.close()
        return self.found

    def stop(self) -> None:
        """Begin no more faults."""
        self.ends = time.monotonic()

    def _fault(self, cell: Cell) -> None:
        found = self.found
        try:
            job = self.runner.ready_for(cell)
            self._measure(job)
            self._roll_out_and_sync(job)
            job.call("start_rollouts", limit_s=30.0)
            attempt = Attempt(cell, job, seed=self._next_seed())
            reached = attempt.strike()
            struck = job.fired_at
            if not fault_cells.waits_as_documented(cell, "sync"):
                self._end_rollouts(job)
            # Else the rank that lives waits in its sync, without a limit, and answers nothing.
            if not reached:
                found.problems.append(f"{cell.name}: {attempt.why_not}")
                self.runner.close()
                return
            # In turns: by another launch, and by a restart of the engine.
            can_restart = all(answer.value for answer in job.call("can_restart", limit_s=30.0).values())
            by_restart = can_restart and len(found.faults) % 2 == 0
            how, self.runner.has = attempt.go_on(self._next_seed(), by_restart=by_restart)
            found.faults.append(cell.name)
            assert struck is not None
            found.recovered_s.append(time.monotonic() - struck)
            result = {"calls": attempt.shown, "left": attempt.left, "handles": attempt.handles, "goes_on": how}
            found.problems += [f"{cell.name}: {problem}" for problem in fault_cells.problems_of(cell, result)]
            if self.runner.has == "nothing":
                self.runner.close()
        except Exception as error:
            found.problems.append(f"{cell.name}: {type(error).__name__}: {error}")
            self.runner.close()

    def _roll_out_and_sync(self, job: Job) -> None:
        job.call("start_rollouts", limit_s=30.0)
        for _ in range(self.syncs_between):
            sync_and_check(job, self._next_seed())
            self.found.num_syncs += 1
        errors = self._end_rollouts(job)
        if errors:
            raise AssertionError(f"rollouts failed beside syncs without a fault: {errors[:3]}")

    def _end_rollouts(self, job: Job) -> list[str]:
        errors: list[str] = []
        for answer in job.call("end_rollouts", limit_s=60.0).values():
            if answer.outcome != "ok" or not answer.value["ended"]:
                self.found.problems.append(
                    f"rollouts of rank {answer.rank} do not end: {answer.outcome} {answer.message}"
                )
                continue
            self.found.num_answers += answer.value["answers"]
            errors += answer.value["errors"]
        self.found.problems += [error for error in errors if error.startswith("not ours")]
        return errors

    def _measure(self, job: Job) -> None:
        """Compare the ranks' footprint with what it was when this job's second server ran."""
        sample: dict[str, int] = {}
        for answer in job.call("footprint", limit_s=30.0).values():
            for name, value in answer.value.items():
                sample[name] = sample.get(name, 0) + value
        sample["shm_bytes"] = sum(_size(SHM / name) for name in job.shm_files())
        sample["shm_files"] = len(job.shm_files())
        if job is not self._job:
            self._job, self._first, self._num_samples = job, None, 0
        self._num_samples += 1
        if self._num_samples < 3:
            return
        if self._first is None:
            self._first = sample
        for name, value in sample.items():
            self.found.growth[name] = max(self.found.growth.get(name, 0), value - self._first[name])

    def _end(self) -> None:
        job = self.runner.job
        assert job is not None
        self._measure(job)
        job.call("shutdown", limit_s=90.0, timeout_s=20.0)
        self.found.problems += [f"left behind at the end: {name}" for name in job.left()]

    def _next_seed(self) -> int:
        self._seed += 1
        return 1000 + self._seed


def run_jobs(
    model_dir: str,
    cells: Sequence[Cell],
    *,
    jobs: int,
    syncs_between: int,
    ends: float | None,
    device_type: str = "cpu",
) -> Found:
    """Run a schedule in several jobs beside each other; each takes the faults that are its turn."""
    soaks = [
        Soak(
            model_dir,
            device_type=device_type,
            syncs_between=syncs_between,
            ends=ends,
            label=f"job {i}: " if jobs > 1 else "",
        )
        for i in range(jobs)
    ]
    with ThreadPoolExecutor(jobs) as pool:
        before = signal.signal(signal.SIGTERM, lambda *_: [soak.stop() for soak in soaks])
        try:
            founds = list(pool.map(lambda i: soaks[i].run(cells[i::jobs]), range(jobs)))
        finally:
            signal.signal(signal.SIGTERM, before)
    for other in founds[1:]:
        founds[0].add(other)
    return founds[0]


def too_much(growth: Mapping[str, int]) -> list[str]:
    """What has grown more than it may."""
    limits = {
        "device_bytes": MOST_DEVICE_BYTES, "rss": MOST_RSS_BYTES, "fds": MOST_FDS, "threads": 2, "children": 0, "shm_files": 4,
    }  # fmt: skip
    return [f"{name} grew by {growth[name]}" for name, limit in limits.items() if growth.get(name, 0) > limit]


def _size(path: Any) -> int:
    try:
        return int(path.stat().st_size)
    except OSError:
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--syncs", type=int, default=_SYNCS_BETWEEN, help="syncs beside rollouts before each fault")
    parser.add_argument("--until", type=float, default=None, help="begin no fault after so many minutes")
    parser.add_argument(
        "--jobs", type=int, default=1, help="run so many jobs beside each other, which share the faults"
    )
    parser.add_argument("--device", choices=fault_rank.TARGETS, default="cpu")
    parser.add_argument("--record", action="store_true", help="write the result under benchmarks/results")
    options = parser.parse_args()
    installed = Version(version("sglang"))
    if Version("0.5.10") <= installed < Version("0.5.21"):
        parser.error(f"SGLang {installed} keeps its cache while requests wait: it cannot sync beside rollouts")
    from tiny_models import make_tiny_model

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # not past the clean-up
    load_before, used_before = os.getloadavg(), fault_job.used_device_mib(options.device)
    cells = schedule(options.faults, options.seed)
    ends = None if options.until is None else time.monotonic() + 60.0 * options.until
    with tempfile.TemporaryDirectory(prefix="tpf-model-") as folder:
        model_dir = str(make_tiny_model(folder))
        found = run_jobs(
            model_dir, cells, jobs=options.jobs, syncs_between=options.syncs, ends=ends, device_type=options.device
        )
    problems = found.problems + too_much(found.growth)
    problems += fault_job.left_on_gpus(options.device, used_before)
    for problem in problems:
        print(problem, file=sys.stderr)
    if found.recovered_s:
        result = record.record(
            f"soak_tp2_{options.device}",
            metric="from a fault to the trainer's own tokens, or to the end of the job where a rank had gone",
            unit="s",
            samples=found.recovered_s,
            settings={
                "tp_size": 2, "seed": options.seed, "syncs_between": options.syncs, "jobs": options.jobs,
                "model": "tiny random Qwen3",
            },
            checks={
                "faults asked for": options.faults, "faults": found.faults, "syncs with compared tokens": found.num_syncs,
                "answers to rollouts": found.num_answers, "growth": found.growth, "problems": problems,
            },
            load_before=load_before,
        )  # fmt: skip
        record.publish(result, write=options.record)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
