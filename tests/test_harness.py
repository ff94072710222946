"""The harness reports every way for a rank to fail, without delay, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import footprint
import harness
import psutil
import pytest
from footprint import Footprint, leftovers
from harness import Outcome, RankDied, RankOverran, RankRaised, RanksFailed, run_ranks

pytestmark = pytest.mark.usefixtures("no_leftovers")


class Unloadable(Exception):
    """An exception that can be pickled and not loaded again."""

    def __init__(self, one, two):
        super().__init__(one)


def returns(rank, offset):
    return rank * 10 + offset


def sums(rank):
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item(), torch.get_num_threads()


def sees(rank, names):
    return {name: os.environ.get(name) for name in names}


def fails(rank, how):
    """Rank 1 fails as `how` says; the others wait for it in a collective."""
    import torch.distributed as dist

    dist.barrier()
    if rank == 1:
        if how == "raise":
            raise ValueError("bucket 7 is odd")
        if how == "unloadable":
            raise Unloadable("one", "two")
        if how == "exit":
            sys.exit(3)
        if how == "_exit":
            os._exit(4)
        if how == "exit 0":
            sys.exit(0)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError(how)
    dist.barrier()


def sleeps(rank):
    if rank == 1:
        sleeps_in_here()
    return rank


def sleeps_in_here():
    threading.Event().wait(600)


def returns_and_lingers(rank):
    threading.Thread(target=sleeps_in_here).start()
    return rank


def leaves_a_process(rank, pid_file):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(pid_file).write_text(str(child.pid))


def leaves_a_process_and_sleeps(rank, pid_file, how):
    if how == "exec":
        leaves_a_process(rank, pid_file)
    else:
        pid = os.fork()
        if pid:
            Path(pid_file).write_text(str(pid))
    sleeps_in_here()


def fails_to_load():
    raise ImportError("this job cannot be loaded")


class FailsToLoad:
    def __reduce__(self):
        return fails_to_load, ()


def test_results_are_in_the_order_of_ranks():
    assert run_ranks(returns, 3, 5, init_group=False) == [5, 15, 25]


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_a_killed_rank_is_noticed_though_its_child_holds_its_pipes(start_method, tmp_path):
    outcomes = run_ranks(
        forks_and_is_killed, 1, str(tmp_path / "pid"), init_group=False, expect_errors=True, timeout_s=60,
        start_method=start_method,
    )  # fmt: skip
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert outcomes[0].exitcode == -signal.SIGKILL and outcomes[0].seconds < 45


def forks_and_is_killed(rank, pid_file):
    pid = os.fork()
    if pid == 0:
        signal.pause()
    Path(pid_file).write_text(str(pid))
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_group_works_and_one_thread_is_used():
    assert run_ranks(sums, 2) == [(0, 2, 3.0, 1), (1, 2, 3.0, 1)]


def test_the_environment_is_scrubbed_and_per_rank(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "RANK", "https_proxy"):
        monkeypatch.setenv(name, "stray")
    monkeypatch.setenv("KEPT", "yes")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "TORCHELASTIC_RUN_ID",
             "OMP_NUM_THREADS", "https_proxy", "KEPT")  # fmt: skip
    before = dict(os.environ)

    def env(rank):
        return {"CUDA_VISIBLE_DEVICES": "3,1" if rank == 0 else "6", "LOCAL_RANK": None if rank == 1 else "0"}

    first, second = run_ranks(sees, 2, names, env=env, init_group=False)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": None, "TORCHELASTIC_RUN_ID": None, "OMP_NUM_THREADS": "1",
              "https_proxy": None, "KEPT": "yes"}  # fmt: skip
    assert first == common | {"RANK": "0", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "3,1"}
    assert second == common | {"RANK": "1", "LOCAL_RANK": None, "CUDA_VISIBLE_DEVICES": "6"}
    assert dict(os.environ) == before


def test_all_ranks_may_have_the_same_environment():
    assert run_ranks(sees, 1, ("A",), env={"A": "b"}, init_group=False) == [{"A": "b"}]


@pytest.mark.parametrize("how, error_type, text, exitcode", [
    ("raise", ValueError, "ValueError: bucket 7 is odd", 1),
    ("unloadable", RankRaised, "Unloadable: one", 1),
    ("exit", RankDied, "exited with 3 before it returned", 3),
    ("_exit", RankDied, "exited with 4 before it returned", 4),
    ("exit 0", RankDied, "exited with 0 before it returned", 0),
    ("kill", RankDied, "killed by SIGKILL before it returned", -signal.SIGKILL),
    ("segfault", RankDied, "killed by SIGSEGV before it returned", -signal.SIGSEGV),
])  # fmt: skip
def test_a_failing_rank_is_named_first(how, error_type, text, exitcode):
    with pytest.raises(RanksFailed) as caught:
        run_ranks(fails, 2, how, timeout_s=120)
    report = str(caught.value)
    assert type(caught.value.errors[1]) is error_type
    assert caught.value.exitcodes[1] == exitcode
    assert report.splitlines()[1].startswith("rank 1 after ") and text in report
    # The consequence is reported too, after its cause, and long before the deadline: a death is noticed at once.
    assert report.index("rank 1 after ") < report.index("rank 0 after ")
    assert max(outcome.seconds for outcome in caught.value.outcomes) < 60
    if how in ("raise", "unloadable", "segfault"):
        assert "test_harness.py" in report and "fails" in report, "no traceback of the rank"


def test_expected_errors_come_back_as_outcomes():
    outcomes = run_ranks(fails, 2, "raise", timeout_s=30, expect_errors=True)
    assert [type(outcome) for outcome in outcomes] == [Outcome, Outcome]
    assert [outcome.rank for outcome in outcomes] == [0, 1]
    assert isinstance(outcomes[1].error, ValueError) and outcomes[1].error.args == ("bucket 7 is odd",)
    assert outcomes[0].error is not None and outcomes[0].value is None


def test_an_overrunning_rank_is_dumped_and_killed():
    with pytest.raises(RanksFailed) as caught:
        run_ranks(sleeps, 2, init_group=False, timeout_s=4)
    assert isinstance(caught.value.errors[1], RankOverran) and list(caught.value.errors) == [1]
    assert "was still running at the deadline of 4 s" in str(caught.value)
    assert "sleeps_in_here" in str(caught.value)
    assert caught.value.exitcodes[1] == -signal.SIGABRT
    assert "returned: rank 0" in str(caught.value)
    assert 4 <= caught.value.outcomes[1].seconds < 60


def test_after_a_failure_the_others_get_a_grace_period_only(monkeypatch):
    monkeypatch.setattr(harness, "GRACE_S", 0.5)
    with pytest.raises(RanksFailed) as caught:
        run_ranks(fails_beside_a_sleeper, 2, init_group=False, timeout_s=100)
    assert "was still running 0.5 s after the failure of rank 1" in str(caught.value)
    assert str(caught.value).splitlines()[1].startswith("rank 1 ")


def fails_beside_a_sleeper(rank):
    if rank == 1:
        raise ValueError("the cause")
    sleeps_in_here()


def test_a_rank_that_returns_and_does_not_exit_has_failed():
    with pytest.raises(RanksFailed, match="had returned, but did not exit"):
        run_ranks(returns_and_lingers, 1, init_group=False, timeout_s=4)


def test_a_job_that_cannot_be_loaded_is_an_error_of_the_rank():
    with pytest.raises(RanksFailed, match="this job cannot be loaded") as caught:
        run_ranks(returns, 2, FailsToLoad(), init_group=False)
    assert any(isinstance(error, ImportError) for error in caught.value.errors.values())


def test_a_process_that_outlives_its_rank_is_an_error_and_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "SURVIVORS_TIMEOUT_S", 0.2)
    with pytest.raises(RanksFailed, match="still running after the ranks had ended") as caught:
        run_ranks(leaves_a_process, 1, str(tmp_path / "pid"), init_group=False)
    assert caught.value.errors == {}
    assert _is_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("how", ["exec", "fork"])
def test_at_the_deadline_a_ranks_own_processes_are_killed_too(tmp_path, how):
    with pytest.raises(RanksFailed):
        run_ranks(leaves_a_process_and_sleeps, 1, str(tmp_path / "pid"), how, init_group=False, timeout_s=4)
    assert _is_gone(int((tmp_path / "pid").read_text()))


def _is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_leftovers_are_listed_and_those_of_others_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(footprint, "SHM_FOLDER", tmp_path)
    before = Footprint.now()
    (tmp_path / "sgl_shm_mq_4194999_0").touch()  # above the highest pid: its owner is gone
    (tmp_path / "torch_1_2_3").touch()  # init lives, and is not ours
    (tmp_path / "unrelated").touch()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        found = leftovers(before, timeout_s=0.2)
        child.communicate(b"\n")
    assert len(found) == 2
    assert found[0].startswith(f"process {child.pid}: ") and found[1].endswith("/sgl_shm_mq_4194999_0")
    (tmp_path / "sgl_shm_mq_4194999_0").unlink()
    assert leftovers(before, timeout_s=60) == []


def test_what_a_killed_process_of_others_has_left_is_not_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(footprint, "SHM_FOLDER", tmp_path)
    script = (
        "import subprocess, sys\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "nowhere = dict.fromkeys(['stdin', 'stdout', 'stderr'], subprocess.DEVNULL)\n"
        "print(subprocess.Popen(command, start_new_session=True, env={'A': 'b'}, **nowhere).pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, timeout=60, capture_output=True, text=True)
    foreign = psutil.Process(int(done.stdout))
    before = Footprint.now()
    foreign.kill()
    psutil.wait_procs([foreign], timeout=60)
    (tmp_path / f"torch_{foreign.pid}_1_2").touch()
    (tmp_path / "torch_4194999_1_2").touch()  # above the highest pid
    assert leftovers(before, timeout_s=0) == ["/dev/shm/torch_4194999_1_2"]


def test_leftovers_waits_for_what_is_about_to_end():
    before = Footprint.now()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"]):
        assert leftovers(before, timeout_s=60) == []


def test_an_orphan_in_a_session_of_its_own_is_found(tmp_path):
    before = Footprint.now()
    pid_file = tmp_path / "pid"
    script = (
        "import subprocess, sys, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(pid_file)], check=True, timeout=60)
    assert [line.split(":")[0] for line in leftovers(before, timeout_s=0.1)] == [f"process {pid_file.read_text()}"]
    footprint.end_leftovers(before)
    assert leftovers(before, timeout_s=0) == []
