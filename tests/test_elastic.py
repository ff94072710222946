"""torchrun starts a job again after the loss of a rank: the next life finds no remains of the first one, and works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tpcolocate.processes import start_of

TESTS = Path(__file__).parent
DEADLINE_S = 600.0

pytestmark = [pytest.mark.engine, pytest.mark.timeout(DEADLINE_S + 15), pytest.mark.usefixtures("no_leftovers")]


def greedy(model_path, prompt, num_tokens):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(num_tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("doomed", [0, 1], ids=["owner", "client"])
def test_the_life_after_a_lost_rank_is_a_good_one(doomed, tiny_model_dir, tmp_path):
    model_path = str(tiny_model_dir())
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0", "--max-restarts", "1", "--nproc-per-node", "2",
            str(TESTS / "elastic_job.py"), model_path, str(tmp_path), str(doomed),
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
    lives = [[json.loads((tmp_path / f"{life}-{rank}.json").read_text()) for rank in (0, 1)] for life in (0, 1)]
    expected = greedy(model_path, [3, 1, 4, 1, 5], 8)
    for life in lives:
        assert [rank["tokens"] for rank in life] == [expected] * 2
        assert [rank["version"] for rank in life] == ["1", "1"]
    assert lives[0][0]["pid"] != lives[1][0]["pid"], "torchrun has started the ranks again"
    [first], [second] = (life[0]["launches"].items() for life in lives)
    assert first[0] != second[0]
    for folder, launch in (first, second):
        assert len(launch["processes"]) > 4
        left = [one for one in launch["processes"] if start_of(one["pid"]) == one["started"]]
        assert not left, "no process of either life runs"
        assert not Path(folder).exists()
    assert not Path(second[1]["temporary"]).exists()
    if doomed == 0:
        assert not Path(first[1]["temporary"]).exists(), "with the log: it is the next launch that has removed it"
