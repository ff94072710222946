"""The script that loads the machine during a test run ends its load."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120), pytest.mark.usefixtures("no_leftovers")]

SCRIPT = Path(__file__).parents[1] / "scripts" / "under_load.py"
COUNT = "import psutil; print(len(psutil.Process().parent().children()) - 1, flush=True)"


def start(code):
    command = [sys.executable, str(SCRIPT), "--processes", "2", sys.executable, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_command_runs_beside_the_load_and_its_exit_code_is_returned():
    process = start(f"{COUNT}; raise SystemExit(3)")
    assert process.communicate(timeout=100)[0] == "2\n" and process.returncode == 3


@pytest.mark.slow
def test_a_killed_script_leaves_no_load():
    process = start(f"{COUNT}; input()")
    assert process.stdout.readline() == "2\n"
    processes = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()  # the command sees the end of its input
    assert len(processes) == 3
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []
