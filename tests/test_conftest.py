"""What conftest does for a whole run, tried on small runs."""

import os
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

GPU_TESTS = """
import pytest
@pytest.mark.gpu
@pytest.mark.parametrize("n", range(3))
def test_needs_a_gpu(n): pass
def test_needs_none(): pass
"""
LEAVING_TESTS = """
import subprocess, sys
def test_leaves_a_process():
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    sys.stderr.write(f"PID {subprocess.Popen(command, start_new_session=True).pid}\\n")
"""
ENVIRONMENT_TESTS = """
import os
def test_scrubbed_and_writes():
    assert "RANK" not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ and os.environ["KEPT"] == "yes"
    os.environ["STRAY"] = "1"
def test_is_restored():
    assert "STRAY" not in os.environ
"""

GPU_ENVIRONMENT_TESTS = """
import os
from harness import gpu_environment, run_ranks
NAMES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "TPCOLOCATE_TEST_ARGS", "RANK")
def sees(rank):
    return [os.environ.get(name) for name in NAMES]
def test_ranks_of_gpu_tests_get_the_devices_of_the_session():
    given = ["3,1", "PCI_BUS_ID", '{"a": 1}']
    assert run_ranks(sees, 2, init_group=False, env=gpu_environment()) == [[*given, "0"], [*given, "1"]]
def test_others_get_none():
    assert run_ranks(sees, 1, init_group=False) == [[None, None, None, "0"]]
    assert not any(name in os.environ for name in NAMES)
"""
HANGING_TESTS = """
import time, pytest
@pytest.mark.timeout(2, method="thread")
def test_hangs(): time.sleep(60)
def test_next(): pass
"""

TEMPORARY_TESTS = """
import os, subprocess, sys, tempfile
def test_writes():
    open(os.path.join(tempfile.mkdtemp(), "log"), "w").close()
    subprocess.run([sys.executable, "-c", "import tempfile; tempfile.mkdtemp()"], check=True)
    assert len(os.listdir(tempfile.gettempdir())) == 2
def test_fails_if_told_to():
    assert "FAIL" not in os.environ
"""
STARTS_PROCESSES = """
import gc, multiprocessing, os
first = gc.isenabled()
multiprocessing.set_start_method("spawn", force=True)
print(os.environ.get("PYTHONPATH"), multiprocessing.get_start_method(), first, gc.isenabled())
"""


def run_pytest(folder, source, *options, env=None):
    (folder / "test_some.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-o", "markers=gpu"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "CUDA_VISIBLE_DEVICES": ""} | (env or {})
    return subprocess.run(
        [*command, *options], cwd=folder, env=env, capture_output=True, text=True, timeout=270, check=False
    )


@pytest.mark.parametrize("options, num_lines", [((), 1), (("-n", "2"), 1), (("-k", "not needs_a_gpu"), 0)])
def test_the_summary_counts_gpu_tests_that_did_not_run(tmp_path, options, num_lines):
    done = run_pytest(tmp_path, GPU_TESTS, *options)
    found = [line for line in done.stdout.splitlines() if line.startswith("GPU tests: ")]
    assert len(found) == num_lines
    assert all(line.startswith("GPU tests: 3 not run (no CUDA device here); run them with ") for line in found)
    assert done.returncode == 0 and "1 passed" in done.stdout


def test_a_test_that_hangs_ends_its_process_once_with_a_dump_and_the_others_run(tmp_path):
    done = run_pytest(tmp_path, HANGING_TESTS, "-n", "2", "--dist", "loadfile")
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout
    assert "crashed while running 'test_some.py::test_hangs'" in done.stdout
    assert "Timeout" in done.stdout + done.stderr and "time.sleep(60)" in done.stdout + done.stderr


def test_every_file_that_goes_first_is_there():
    assert all((Path(__file__).parent / name).is_file() for name in conftest.FIRST)


def test_a_run_that_leaves_a_process_fails_and_the_process_is_killed(tmp_path):
    done = run_pytest(tmp_path, LEAVING_TESTS, "-s")
    pid = int(done.stderr.split("PID ")[1].split()[0])
    assert done.returncode == 1
    assert "the tests have left behind:" in done.stdout and f"process {pid}: " in done.stdout
    assert not Path(f"/proc/{pid}").exists()


def test_every_test_gets_the_scrubbed_environment(tmp_path):
    done = run_pytest(tmp_path, ENVIRONMENT_TESTS, env={"RANK": "1", "TORCHELASTIC_RUN_ID": "x", "KEPT": "yes"})
    assert done.returncode == 0, done.stdout


def test_gpu_tests_keep_to_the_devices_that_the_session_was_given(tmp_path):
    given = {
        "CUDA_VISIBLE_DEVICES": "3,1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "TPCOLOCATE_TEST_ARGS": '{"a": 1}',
        "RANK": "7",
    }
    done = run_pytest(tmp_path, GPU_ENVIRONMENT_TESTS, env=given)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


@pytest.mark.parametrize("env, kept", [({}, 0), ({"FAIL": "1"}, 1)], ids=["passed", "failed"])
def test_temporary_files_are_removed_unless_a_test_has_failed(tmp_path, env, kept):
    temporary = tmp_path / "t"
    temporary.mkdir()
    done = run_pytest(tmp_path, TEMPORARY_TESTS, env={"TMPDIR": str(temporary), **env})
    assert done.returncode == kept, done.stdout
    assert len(list(temporary.glob("tpct-*"))) == kept


@pytest.mark.parametrize("env, module, expected", [
    ({"SGLANG_USE_CPU_ENGINE": "1"}, "sglang.launch_server", "fork False True"),
    ({"SGLANG_USE_CPU_ENGINE": "1", "TPC_TEST_START_METHOD": "spawn"}, "sglang.launch_server", "spawn True True"),
    ({}, "sglang.launch_server", "spawn True True"),
    ({"SGLANG_USE_CPU_ENGINE": "1"}, "sglang.other", "spawn True True"),
])  # fmt: skip
def test_only_a_cpu_server_of_the_tests_forks_its_processes(tmp_path, env, module, expected):
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    (tmp_path / "sglang" / f"{module.rpartition('.')[2]}.py").write_text(STARTS_PROCESSES)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", module], env=os.environ | env | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=270, check=True,
    )  # fmt: skip
    assert str(conftest.FORKED_SERVER) in done.stdout and expected in done.stdout
