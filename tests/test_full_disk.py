"""A disk and a /dev/shm that are really full: small file systems in a mount namespace of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import footprint
import pytest

TESTS = Path(__file__).parent
DEADLINE_S = 400.0

pytestmark = [pytest.mark.engine, pytest.mark.timeout(DEADLINE_S + 60)]


def may_mount():
    """Whether this user may have a mount namespace, and mount in it."""
    tried = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True)
    return tried.returncode == 0


@pytest.fixture(scope="module")
def seen(tiny_model_dir, tmp_path_factory):
    """What both ranks of the job saw; nothing of the job is left, in its /dev/shm as on the machine."""
    if not may_mount():
        pytest.skip("this user may not mount file systems: nothing was filled (run the tests as root for that)")
    disk, out = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("seen")
    mount = f'mount -t tmpfs -o size=64k tmpfs {disk} && mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", "--nproc-per-node", "2",
        str(TESTS / "full_disk_job.py"), str(tiny_model_dir()), str(disk), str(out),
    ]  # fmt: skip
    before = footprint.Footprint.now()
    try:
        done = subprocess.run(
            ["unshare", "--mount", "--kill-child", "--fork", "sh", "-c", mount, "sh", *command],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, done.stderr
        assert footprint.leftovers(before) == []
    finally:
        footprint.end_leftovers(before)
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0]["left in /dev/shm"] == []
    return found


def test_a_server_starts_and_is_synced_where_its_log_cannot_be_written(seen):
    for of_rank in seen:
        assert isinstance(of_rank["launch"], str), "the version of SGLang"
        assert of_rank["sync, full log"] > 0
        engines, trainers = of_rank["tokens, full log"]
        assert engines == trainers


def test_a_sync_without_shared_memory_says_so_on_every_rank_and_nothing_is_lost(seen):
    for of_rank in seen:
        kind, message, hint = of_rank["sync, full /dev/shm"]
        assert kind == "ConfigError" and "/dev/shm" in message
        assert "--shm-size" in hint
        assert of_rank["version"] == "1", "the engine goes on with the weights it has"
        assert of_rank["sync, space"] > 0
        engines, trainers = of_rank["tokens, space"]
        assert engines == trainers
        assert engines != of_rank["tokens, full log"][0]
    assert seen[0]["sync, full /dev/shm"] == seen[1]["sync, full /dev/shm"]
