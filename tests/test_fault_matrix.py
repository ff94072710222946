"""The fault matrix: which cells there are, how a result is judged, and a spread of the cells on a real server."""

import importlib
import os
import signal
import subprocess
import sys
import time
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # behind everything: its scripts are no modules of the tests

import fault_cells
import fault_matrix
import fault_rank
import fault_runner
import gpu_kernels
import shm_files
import soak
from fault_cells import Cell

CELLS = list(fault_cells.all_cells())
SENSIBLE = [cell for cell in CELLS if fault_cells.senseless(cell) is None]
WELL = {"calls": [], "left": [], "handles": 0, "goes_on": "relaunched"}


def call(rank=0, outcome="error", kind="EngineDeadError", after_s=1.0, **changes):
    return {
        "rank": rank, "call": "sync", "outcome": outcome, "kind": kind, "message": "gone", "hint": None, "ours": True,
        "shared": True, "after_s": after_s, **changes,
    }  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(("name", "numbers"), [
    ("torch_916_2124948804_0", {916, 2124948804, 0}),
    ("sgl_shm_mq_6943_ff784a85", {6943}),
    ("sglang_loads_4ce10c662eae_9095cbbe.shm", set()),
    ("tpcolocate-0-6129-6265b159d8bb8740", {0, 6129}),
])  # fmt: skip
def test_a_file_is_known_by_pids_in_its_name_and_not_by_digits_of_a_random_part(name, numbers):
    assert shm_files.numbers(name) == numbers


MAKES_A_SEMAPHORE = """
import multiprocessing, time
semaphore = multiprocessing.get_context("spawn").Semaphore()
print("sem." + semaphore._semlock.name.lstrip("/"), flush=True)
time.sleep(60)
"""


@pytest.mark.quick
@pytest.mark.parametrize("is_ours", [True, False], ids=["the job's", "another's"])
def test_the_semaphore_of_a_killed_process_belongs_to_the_job_if_the_process_did(is_ours):
    ours = {1 << 30}
    files = shm_files.ShmFiles(lambda: ours)
    process = subprocess.Popen(
        [sys.executable, "-c", MAKES_A_SEMAPHORE], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        ours |= {process.pid} if is_ours else set()
        name = process.stdout.readline().decode().strip()
        path = Path("/dev/shm") / name
        assert path.exists()
        deadline = time.monotonic() + 30.0
        while not files.has_looked_at(name) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)  # with the tracker that would remove it
        process.wait()
        assert path.exists() and (name in files.now("")) == is_ours
    finally:
        files.close()
        process.kill()
        process.communicate()
        path.unlink(missing_ok=True)


# --- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_every_cell_is_there_once_and_every_moment_and_victim_has_some_that_make_sense():
    assert len({cell.name for cell in CELLS}) == len(CELLS) == 5 * 6 * len(fault_cells.MOMENTS)
    for name, values in (
        ("moment", fault_cells.MOMENTS),
        ("victim", fault_cells.VICTIMS),
        ("fault", fault_cells.FAULTS),
    ):
        assert {getattr(cell, name) for cell in SENSIBLE} == set(values)


@pytest.mark.quick
def test_the_most_important_cells_come_first_and_those_that_leave_the_server_before_those_that_end_it():
    ordered = fault_cells.in_order(SENSIBLE)
    priorities = [fault_cells.priority(cell) for cell in ordered]
    assert priorities == sorted(priorities)
    for priority in set(priorities):
        of_one = [cell for cell in ordered if fault_cells.priority(cell) == priority]
        kinds = [("server stays", "server ends", "rank ends").index(soak.kind_of(cell)) for cell in of_one]
        assert kinds == sorted(kinds)


@pytest.mark.quick
@pytest.mark.parametrize("place", sorted({place[:2] for place in fault_rank.PLACES.values()}))
def test_the_places_of_faults_exist(place):
    module, attribute = place
    assert callable(reduce(getattr, attribute.split("."), importlib.import_module(module)))


@pytest.mark.quick
def test_the_phases_of_a_sync_are_those_of_the_pipeline():
    pipeline = importlib.import_module("tpcolocate.weights.sync.pipeline")
    assert set(fault_rank.PHASES) == set(fault_cells.SYNC_PHASES)
    assert all(callable(getattr(pipeline, name)) for names in fault_rank.PHASES.values() for name in names)


@pytest.mark.quick
def test_a_fault_happens_once_in_its_phase_and_leaves_no_trace_when_it_is_removed(monkeypatch):
    pipeline = importlib.import_module("tpcolocate.weights.sync.pipeline")
    session = importlib.import_module("tpcolocate.weights.sync.session")
    seen = []
    monkeypatch.setattr(session.SyncSession, "agree", lambda self, error, *rest, **named: seen.append(error))
    monkeypatch.setattr(pipeline, "finish", lambda: [session.SyncSession.agree(None, None) for _ in range(2)])
    before = (pipeline.finish, pipeline.transfer, session.SyncSession.agree)
    fault = fault_rank.Fault({"moment": "sync: finish", "fault": "exception", "rank": 1}, 1, lambda at: None)
    fault.place()
    session.SyncSession.agree(None, None)
    pipeline.finish()
    fault.remove()
    assert [type(error).__name__ for error in seen] == ["NoneType", "PlantedError", "NoneType"]
    assert (pipeline.finish, pipeline.transfer, session.SyncSession.agree) == before


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("changes, words", [
    ({"calls": []}, "no rank had an error"),
    ({"calls": [call(outcome="hangs", after_s=65.0)]}, "still waiting after 65 s"),
    ({"calls": [call(after_s=23.0)]}, "took 23.0 s, its limit is 20 s"),
    ({"calls": [call(ours=False, kind="KeyError")]}, "KeyError is no error of this library"),
    ({"calls": [call(), call(rank=1, message="other")]}, "the ranks had different errors"),
    ({"left": ["process 7 sglang"]}, "left behind: process 7 sglang"),
    ({"handles": 2}, "2 handles were not given back"),
    ({"goes_on": "no: wrong tokens"}, "could not go on: no: wrong tokens"),
])  # fmt: skip
def test_what_is_wrong_with_a_result_is_named(changes, words):
    cell = Cell("sync: transfer", "SIGKILL", "TP worker")
    well = {**WELL, "calls": [call(), call(rank=1, after_s=21.9)]}
    assert fault_cells.problems_of(cell, well) == []
    [problem] = fault_cells.problems_of(cell, {**well, **changes})
    assert words in problem


@pytest.mark.quick
def test_the_rank_that_has_the_exception_may_raise_what_it_raised_and_a_shutdown_nothing():
    cell = Cell("wake", "Ctrl-C", "client rank")
    interrupted = call(rank=1, kind="KeyboardInterrupt", ours=False)
    assert fault_cells.problems_of(cell, {**WELL, "calls": [interrupted]}) == []
    assert fault_cells.problems_of(Cell("shutdown", "SIGKILL", "TP worker"), WELL) == []


@pytest.mark.quick
def test_a_call_that_fails_by_itself_is_no_result_of_an_exception():
    cell = Cell("sleep", "exception", "client rank")
    of_itself = call(kind="EngineStateError", message="sleep() would free nothing")
    planted = call(kind="RankFailedError", message="PlantedError: planted")
    assert fault_cells.problems_of(cell, {**WELL, "calls": [planted]}) == []
    [problem] = fault_cells.problems_of(cell, {**WELL, "calls": [of_itself]})
    assert "the exception did not come" in problem


@pytest.mark.quick
def test_only_before_a_call_begins_a_stopped_rank_is_waited_for():
    waiting = {**WELL, "calls": [call(outcome="hangs", after_s=65.0)], "goes_on": "job over"}
    assert fault_cells.problems_of(Cell("idle", "SIGSTOP", "client rank"), waiting) == []
    for cell in (Cell("sync: open", "SIGSTOP", "client rank"), Cell("idle", "SIGSTOP", "TP worker")):
        assert any("still waiting" in problem for problem in fault_cells.problems_of(cell, waiting))


@pytest.mark.quick
def test_the_page_has_every_cell_and_names_what_was_not_run():
    run = {
        **WELL,
        "status": "run",
        "calls": [call(), call(rank=1)],
        "problems": ["handles"],
        "reason": None,
        "commit": "abc",
    }
    page = fault_matrix.page({"cells": {"idle/SIGKILL/TP worker": run}})
    assert "| **wrong** EngineDeadError (0: 1.0 s; 1: 1.0 s); relaunched |" in page
    assert "* idle/SIGKILL/TP worker: handles" in page
    assert "1 were run (1 on commit `abc`), and 1 of them" in page
    assert page.count("| not run") == len(SENSIBLE) - 1
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| moment")]
    assert len(rows) == len(fault_cells.FAULTS) * len(fault_cells.MOMENTS)


@pytest.mark.quick
def test_the_page_in_the_documentation_is_that_of_the_recorded_results():
    assert fault_matrix.PAGE.read_text() == fault_matrix.page(fault_matrix.read(fault_matrix.OUT))


# --- the soak's schedule -----------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_a_schedule_is_that_of_its_seed():
    assert soak.schedule(20, 1) == soak.schedule(20, 1) != soak.schedule(20, 2)
    assert soak.schedule(20, 1)[:5] == soak.schedule(5, 1)
    many = soak.schedule(300, 3)
    assert {soak.kind_of(cell) for cell in many} == {"server stays", "server ends", "rank ends"}
    assert all(fault_cells.senseless(cell) is None for cell in many)
    assert {soak.kind_of(cell) for cell in soak.schedule(50, 3, weights={"server stays": 1})} == {"server stays"}


@pytest.mark.quick
def test_growth_is_judged():
    assert soak.too_much({"rss": 2**20, "fds": 1}) == []
    assert soak.too_much({"rss": 2**30, "fds": 1, "children": 1}) == [f"rss grew by {2**30}", "children grew by 1"]


class Quiet(soak.Soak):
    """Runs faults that do nothing but say so; the first ends the soak, as SIGTERM does."""

    def _fault(self, cell):
        self.found.faults.append(cell.name)
        self.found.growth = {"rss": len(cell.name)}
        if self.ends is None:
            os.kill(os.getpid(), signal.SIGTERM)
        while self.ends is None:
            time.sleep(0.01)


@pytest.mark.quick
def test_jobs_share_the_faults_and_sigterm_ends_them_with_what_they_found(monkeypatch, tmp_path):
    monkeypatch.setattr(soak, "Soak", Quiet)
    before = signal.getsignal(signal.SIGTERM)
    cells = soak.schedule(6, 1)
    found = soak.run_jobs(str(tmp_path), cells, jobs=2, syncs_between=1, ends=None)
    # One of the two may have been stopped before it began.
    assert found.faults and set(found.faults) <= {cells[0].name, cells[1].name}
    assert found.growth["rss"] == max(map(len, found.faults))
    assert signal.getsignal(signal.SIGTERM) is before


# --- on a real server --------------------------------------------------------------------------------------------------

SPREAD = [
    Cell("sync: transfer", "exception", "client rank"),
    Cell("sync: finish", "exception", "owner rank"),
    # From here on each cell ends the server.
    Cell("generate", "SIGKILL", "TP worker"),
    Cell("sync: transfer", "SIGKILL", "owner rank"),
]


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_a_spread_of_the_matrix(tiny_model_dir, no_leftovers):
    runner = fault_runner.Runner(str(tiny_model_dir()))
    try:
        results = {cell.name: runner.run(cell) for cell in SPREAD}
    finally:
        runner.close()
    assert {name: (result["status"], result["problems"]) for name, result in results.items()} == {
        name: ("run", []) for name in results
    }
    assert [result["goes_on"] for result in results.values()] == [
        "synced again",
        "synced again",
        "relaunched",
        "job over",
    ]


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_a_short_soak(tiny_model_dir, no_leftovers):
    drawn = [(0, "server stays"), (6, "server ends"), (7, "server stays")]
    cells = [cell for seed, kind in drawn for cell in soak.schedule(1, seed, weights={kind: 1})]
    found = soak.Soak(str(tiny_model_dir()), syncs_between=2).run(cells)
    assert found.problems == [] and soak.too_much(found.growth) == []
    assert found.faults == [cell.name for cell in cells]
    assert found.num_syncs == 2 * (len(cells) + 1) and found.num_answers > 0


@pytest.mark.quick
def test_the_kernels_of_the_gpu_jobs_are_those_of_the_benchmarks_and_cost_no_import():
    texts = [path.read_text() for path in Path(fault_rank.__file__).parent.glob("*.py")]
    assert sum('"attention_backend": "triton"' in text for text in texts) == 1
    assert fault_rank.TARGETS["cuda"].server.items() >= gpu_kernels.WITHOUT_COMPILER.items()
    code = "import sys, fault_rank; print({'torch', 'transformers', 'tpcolocate'} & set(sys.modules))"
    folder = str(Path(fault_rank.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "set()\n"
