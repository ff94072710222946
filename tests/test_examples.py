"""The demo, run by torchrun for a few steps on the real engine."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4
DEADLINE_S = 600.0


def run_example(script: str | Path, out: Path, *options: str) -> str:
    """Run an example as a user does and return what it printed; in a session of its own, so that nothing outlives it.

    A script elsewhere is given by its whole path.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / script), "--out", str(out), *options]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    log = out / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, stdout=sink, stderr=sink, start_new_session=True
        )
        try:
            code = process.wait(DEADLINE_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
    printed = log.read_text(errors="replace")
    assert code == 0, printed[-4000:]
    return printed


def run_demo(out: Path, *options: str, script: Path) -> dict[str, Any]:
    run_example(script, out, "--steps", str(STEPS), *options)
    (written,) = out.glob("grpo*.json")
    assert written.with_suffix(".png").stat().st_size > 0
    return json.loads(written.read_text())


@pytest.mark.quick
@pytest.mark.timeout(120)
@pytest.mark.parametrize("script, options, words", [
    ("grpo", ["--group-size", "1"], "--group-size must be at least 2"), ("grpo", ["--steps", "0"], "--steps must be at least 1"),
    ("grpo", ["--prompts", "0"], "--prompts must be at least 1"), ("grpo", ["--digits", "3"], "--digits needs --model"),
    ("accelerate_sft", ["--every", "0"], "--every must be at least 1"),
])  # fmt: skip
def test_numbers_with_which_an_example_cannot_train_are_refused_at_once(
    script, options, words, monkeypatch, capsys
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *options])
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args()
    assert words in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.timeout(120)
def test_the_accelerate_example_takes_a_tokenizer_that_joins_characters(tiny_model_dir, monkeypatch) -> None:
    import torch
    from transformers import AutoTokenizer

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir())
    texts = ["1+1=2\n", "98+76=174\n98+76=174\n"]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert lengths[0] != lengths[1]
    batch = importlib.import_module("accelerate_sft").batch_of(tokenizer, texts, torch.device("cpu"))
    assert batch["attention_mask"].sum(1).tolist() == (batch["labels"] != -100).sum(1).tolist() == lengths


@pytest.mark.engine
@pytest.mark.timeout(2 * DEADLINE_S + 30)
def test_the_gap_stays_at_noise_with_the_sync_and_grows_without(tmp_path: Path) -> None:
    synced, unsynced = tmp_path / "sync", tmp_path / "no-sync"
    synced.mkdir()
    script = Path(__file__).with_name("demo_of_a_beginner.py")
    results = {"sync": run_demo(synced, script=script)}
    # From the same model: much of a run is the training that makes it.
    shutil.copytree(synced / "model", unsynced / "model")
    results["no-sync"] = run_demo(unsynced, "--no-sync", script=script)
    for result in results.values():
        assert [row["step"] for row in result["rows"]] == list(range(STEPS))
        assert all(0.0 <= row["reward"] <= 1.0 for row in result["rows"])
        assert result["rows"][0]["gap"] < 1e-3, "the engine and the trainer start from the same checkpoint"
    assert all(row["sync_bytes"] > 0 for row in results["sync"]["rows"])
    assert all(row["sync_bytes"] == 0 for row in results["no-sync"]["rows"])
    assert results["sync"]["max_gap"] < 1e-3
    assert results["no-sync"]["rows"][-1]["gap"] > 20 * max(results["sync"]["max_gap"], 1e-4)
