"""torchrun starts a job again after the loss of a rank: the next life finds no remains of the first one, and works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import footprint
import pytest
import torch
from transformers import AutoModelForCausalLM

from tpcolocate.processes import start_of

TESTS = Path(__file__).parent
DEADLINE_S = 600.0

pytestmark = [pytest.mark.engine, pytest.mark.timeout(DEADLINE_S + 15)]


def greedy(model_path, prompt, num_tokens):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(num_tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def lives(tiny_model_dir, tmp_path_factory):
    """What both ranks saw in each of three lives, and what they should have generated: the owner is lost, then the client."""
    model_path, folder = str(tiny_model_dir()), tmp_path_factory.mktemp("lives")
    before = footprint.Footprint.now()
    try:
        done = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "localhost:0", "--max-restarts", "2", "--nproc-per-node", "2",
                str(TESTS / "elastic_job.py"), model_path, str(folder), "0", "1",
            ],
            env=os.environ | {
                "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
                # Without it torch 2.13 keeps one store for all lives: the second one reads gloo addresses of the first.
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            },
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert footprint.leftovers(before) == []
    finally:
        footprint.end_leftovers(before)
    found = [[json.loads((folder / f"{life}-{rank}.json").read_text()) for rank in (0, 1)] for life in (0, 1, 2)]
    return found, greedy(model_path, [3, 1, 4, 1, 5], 8)


def test_torchrun_starts_the_ranks_again_for_each_life(lives):
    of_ranks, _ = lives
    assert len({rank["pid"] for life in of_ranks for rank in life}) == 6
    assert len({folder for life in of_ranks for folder in life[0]["launches"]}) == 3


@pytest.mark.parametrize(
    "life", [0, 1, 2], ids=["the first", "after the loss of the owner", "after the loss of the client"]
)
def test_each_life_is_a_good_one_and_leaves_nothing(life, lives):
    of_ranks, expected = lives
    assert [rank["tokens"] for rank in of_ranks[life]] == [expected] * 2
    assert [rank["version"] for rank in of_ranks[life]] == ["1", "1"]
    [(folder, launch)] = of_ranks[life][0]["launches"].items()
    assert len(launch["processes"]) > 4
    left = [one for one in launch["processes"] if start_of(one["pid"]) == one["started"]]
    assert not left, "no process of any life runs"
    assert not Path(folder).exists()
    # With the log: after the loss of an owner it is the next launch that has removed it.
    assert not Path(launch["temporary"]).exists()
