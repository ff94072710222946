"""Runs cells of the fault matrix on a job with a real server: the fault, what the ranks say, and how the job goes on."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fault_cells
import record
from fault_cells import Cell
from fault_job import Answer, Job
from fault_rank import TARGETS, process_of

# After which a rank is taken to hang; beyond its limit, so that the table has by how much it was exceeded.
PATIENCE_S = 45.0
_SECONDS_INTO_GENERATE = 1.0
# Of a server that is launched for a cell, or by which a job goes on; the first on a GPU machine compiles its kernels.
_LAUNCH_S = 300.0
# Of SGLang after a SIGTERM, with no request in flight.
_DRAIN_S = 15.0


class Runner:
    """Runs cells, one after the other, with a job that is kept as long as it can go on.

    Args:
        model_dir: What is served.
        device_type: On what: "cpu" or "cuda".
        keep_logs: A folder for the logs of cells in which something was wrong; None to drop them.
        cores: For the processes of the job; all, if it is empty.
    """

    def __init__(
        self, model_dir: str, *, device_type: str = "cpu", keep_logs: Path | None = None, cores: Sequence[int] = ()
    ) -> None:
        self.model_dir, self.device_type, self.keep_logs, self.cores = model_dir, device_type, keep_logs, cores
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
            return {**empty_result(cell), "status": "senseless", "reason": reason}
        began = time.monotonic()
        job = self.ready_for(cell)
        result = {**empty_result(cell), "status": "run", "setup_s": round(time.monotonic() - began, 1)}
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
            self.job, self.has = Job(self.model_dir, device_type=self.device_type, cores=self.cores), "ranks"
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
    _all_ok(job.call("launch", limit_s=_LAUNCH_S + PATIENCE_S, health_timeout_s=_LAUNCH_S))
    sync_and_check(job, seed)


def sync_and_check(job: Job, seed: int) -> None:
    """Sync, and compare what the engine generates with the trainer's own model.  Raises as `launch`."""
    _all_ok(job.call("sync", limit_s=120.0, timeout_s=60.0, seed=seed))
    answers = _all_ok(job.call("tokens", limit_s=120.0, timeout_s=60.0))
    behind = max(answer.value for answer in answers.values())
    if not behind <= TARGETS[job.device_type].tie:
        raise AssertionError(
            f"wrong tokens after the sync: a logit is {behind:.3g} standard deviations below the largest"
        )


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
        if self.cell.moment in ("launch", "publish") and not self._all_are_well("launch"):
            return
        for call in ("sync", "generate"):  # a sync needs no detokenizer
            if self._all_are_well(None):
                self._call(call)
        self._look_after_the_drain()

    def _look_after_the_drain(self) -> None:
        """SGLang's main process looks for a SIGTERM every five seconds, and works until then: look once more afterwards."""
        cell, job = self.cell, self.job
        drains = cell.fault == "SIGTERM" and cell.victim == "server main process" and cell.moment != "shutdown"
        if drains and self._all_are_well(None):
            deadline = time.monotonic() + _DRAIN_S
            while process_of(cell.victim, job.ranks[0].process.pid) is not None and time.monotonic() < deadline:
                time.sleep(0.2)
            self._call("generate")

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


def empty_result(cell: Cell) -> dict[str, Any]:
    """Of a cell that was not run."""
    return {
        "moment": cell.moment, "fault": cell.fault, "victim": cell.victim, "status": "not run", "reason": None, "calls": [],
        "left": [], "handles": 0, "goes_on": "", "problems": [], "seconds": 0.0,
        "commit": record.commit(),
    }  # fmt: skip
