"""The doctor as users run it: alone, under torchrun, and in environments with hazards."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tpcolocate.processes import pid_namespace
from tpcolocate.runtime_folder import OwnerRecord, folder_of

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 240.0
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

pytestmark = [pytest.mark.timeout(DEADLINE_S + 30), pytest.mark.usefixtures("no_leftovers")]


def doctor(*options, before=(), launcher=(), environ=None):
    """Run it, and return its exit code and what it wrote."""
    command = [*before, sys.executable, *launcher, "-m", "tpcolocate", "doctor", "--timeout", "120", *options]
    path = os.pathsep.join(filter(None, [str(ROOT), (environ or {}).get("PYTHONPATH"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command,
        env={**os.environ, **(environ or {}), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    return done.returncode, done.stdout, done.stderr


def levels(document):
    """Return level -> check -> its messages."""
    found = {}
    for each in document["findings"]:
        found.setdefault(each["level"], {}).setdefault(each["check"], []).append(each["message"])
    return found


def test_two_ranks_report_once():
    code, out, err = doctor("--tp-size", "2", "--json", launcher=TORCHRUN)
    document = json.loads(out)
    assert "problem" not in levels(document), levels(document)
    assert code == 0, err
    assert (document["world_size"], document["tp_size"], document["slices_assumed"]) == (2, 2, False)
    assert [each["ranks"] for each in document["slices"]] == [[0, 1]]
    assert [each["member"]["rank"] for each in document["ranks"]] == [0, 1]
    pids = {each["member"]["pid"] for each in document["ranks"]}
    assert len(pids) == 2
    merged = {each["check"]: each["ranks"] for each in document["findings"]}
    assert merged["gloo"] == merged["handles"] == [0, 1] and merged["leftovers"] == [0]


def test_hazards_of_one_environment_are_all_named(tmp_path):
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    (tmp_path / "sitecustomize.py").write_text("import sys\nif 'export' in sys.orig_argv: print('welcome to Python')")
    deep = tmp_path / ("d" * 60)  # longer than the path of a socket can be
    deep.mkdir()
    environ = {
        "WORLD_SIZE": "2",
        "CUDA_VISIBLE_DEVICES": "0,0",
        "GLOO_SOCKET_IFNAME": "none0",
        "HTTP_PROXY": "http://user:secret@proxy:3128",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONPATH": str(tmp_path),
        "TMPDIR": str(deep),
    }
    ended = subprocess.Popen(["true"])
    ended.wait()
    folder = folder_of(f"{ended.pid}-0123456789abcdef")
    record = OwnerRecord(ended.pid, 1, pid_namespace(), folder.name, str(tmp_path / "none"), "log")
    limited = ["bash", "-c", 'ulimit -n 200; exec "$0" "$@"']
    try:
        for _ in range(3):  # a launch of another test removes such a folder, too
            folder.mkdir(mode=0o700)
            (folder / "owner.json").write_text(json.dumps(asdict(record)))
            code, out, err = doctor("--tp-size", "2", "--json", before=limited, environ=environ)
            if folder.exists():
                break
        assert folder.exists(), "the doctor has removed it"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert code == 1, err
    assert "secret" not in out + err
    found = levels(json.loads(out))
    problems, warnings = found["problem"], found["warning"]
    assert "WORLD_SIZE=2" in problems["job"][0]
    assert "'0,0'" in problems["devices"][0] and "repeat" in problems["devices"][0]
    assert "none0" in problems["network"][0] and "none0" in problems["gloo"][0]
    assert str(tmp_path / "sglang") in problems["software"][0]
    assert "200 open files" in problems["limits"][0]
    assert str(deep) in problems["handles"][0]
    assert "HTTP_PROXY" in warnings["network"][0]
    assert "PYTORCH_CUDA_ALLOC_CONF" in warnings["allocator"][0]
    assert str(folder) in warnings["leftovers"][0]
    assert "none0" in problems["slices"][0]  # what init() would raise
    assert set(problems) == {"job", "devices", "network", "gloo", "software", "limits", "handles", "slices"}


def test_the_page_and_a_rank_that_does_not_come():
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    code, out, err = doctor("--timeout", "30", environ=environ)
    assert code == 1, err
    assert "rank 1 did not report" in out and out.startswith("tpcolocate ")
    assert re.fullmatch(r"\d+ problems?, \d+ warnings?", out.rstrip().splitlines()[-1])
