"""The matrix of trainers and layouts: which GPUs a job gets, what a hang costs, what the table says; and the common way's tensors."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_common
import gpu_matrix
import trainers

pytestmark = pytest.mark.quick

GOOD = {
    "verdict": "ok", "error": None, "stale": [9.0, 3.0], "gap": [0.1, 0.2], "mean_gap": [0.02, 0.03], "seconds": [0.2, 0.1],
    "own_mib": [3.0, 3.0], "peer_mib": [1.0, 1.0], "staged_mib": [0.0, 0.0], "mapped": [0, 25], "unverified": [], "tensors": 25, "took_s": 3.0,
}  # fmt: skip


def arguments(out, **changes):
    given = {
        "device": "cuda", "layouts": list(gpu_matrix.LAYOUTS), "models": ["dense"], "trainers": ["plain"], "syncs": 3, "budget_s": 600.0,
        "row_timeout_s": 60.0, "timeout_s": 30.0, "server_args": "{}", "out": out, "name": None,
    }  # fmt: skip
    return argparse.Namespace(**{**given, **changes})


@pytest.fixture
def stand_in(monkeypatch):
    """Jobs are small processes; returns who had which devices, and when."""
    had, script = [], {"text": None}

    def start(job, devices, budget_s):
        job.devices, job.num_printed = devices, 0
        row = json.dumps(
            [{"model": job.model, "trainer": one, "commit": job.code, **GOOD} for one in job.args.trainers]
        )
        text = script["text"] or f"import time; time.sleep(0.3); open({str(job.rows_path)!r}, 'w').write({row!r})"
        job.process = subprocess.Popen([sys.executable, "-c", text])
        had.append([job.name, tuple(job.layout.devices(devices)), time.monotonic(), None])

    finish = gpu_matrix.Matrix.finish

    def finished(matrix, running, job):
        next(one for one in had if one[0] == job.name)[3] = time.monotonic()
        finish(matrix, running, job)

    monkeypatch.setattr(gpu_matrix, "commit", lambda: "abc")
    monkeypatch.setattr(gpu_matrix.Job, "start", start)
    monkeypatch.setattr(gpu_matrix.Matrix, "finish", finished)
    return had, script


@pytest.mark.parametrize("environment, expected", [
    ({"CUDA_VISIBLE_DEVICES": "3,1"}, ["3", "1"]),
    ({"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}, ["GPU-a", "GPU-b"]),
    ({"CUDA_VISIBLE_DEVICES": ""}, []),
])  # fmt: skip
def test_no_other_gpus_are_used(environment, expected):
    assert gpu_matrix.visible_devices(environment) == expected


@pytest.mark.parametrize("name, expected", [
    ("tp2", "7,5"), ("tp2_out_of_order", "5,7"), ("tp1_out_of_order", "5,7"), ("tp2_two_slices_out_of_order", "6,7,4,5"),
])  # fmt: skip
def test_a_layout_reorders_the_devices_that_it_is_given(name, expected):
    assert ",".join(gpu_matrix.LAYOUTS[name].devices(["7", "5", "6", "4"])) == expected


@pytest.mark.slow
def test_jobs_share_the_gpus_and_larger_layouts_say_what_they_lack(tmp_path, stand_in):
    had, _ = stand_in
    matrix = gpu_matrix.Matrix(arguments(tmp_path), ["7", "GPU-a", "5"])
    matrix.run()
    assert {name for name, *_ in had} == {"tp1", "tp1_two_slices", "tp1_out_of_order", "tp2", "tp2_out_of_order"}
    for i, (_, devices, begun, ended) in enumerate(had):
        for _, others, later, _ in had[i + 1 :]:
            assert later >= ended or not set(devices) & set(others) or begun > later
    assert any(later < ended for (*_, ended), (_, _, later, _) in zip(had, had[1:])), "nothing ran side by side"
    rows = {row["layout"]: row for row in matrix.rows()}
    assert rows["tp2"]["verdict"] == "ok"
    assert (rows["tp4"]["verdict"], rows["tp4"]["error"]) == ("not run", "needs 4 GPUs, has 3")


def test_a_second_run_goes_on_where_the_first_was_and_other_commits_count_for_nothing(tmp_path, stand_in):
    had, _ = stand_in
    path = tmp_path / "cuda_tp1_dense.json"
    kept = {"model": "dense", "trainer": "plain", "commit": "abc", **GOOD}
    path.write_text(json.dumps([kept, {**kept, "trainer": "ddp", "commit": "old"}, {**kept, "trainer": "fsdp2"}]))
    args = arguments(tmp_path, layouts=["tp1"], trainers=["plain", "fsdp2"])
    gpu_matrix.Matrix(args, ["0"]).run()
    assert not had
    args.trainers = ["plain", "ddp"]
    matrix = gpu_matrix.Matrix(args, ["0"])
    assert [(row["trainer"], row["verdict"]) for row in matrix.rows()] == [
        ("plain", "ok"),
        ("ddp", "left out"),
        ("fsdp2", "ok"),
    ]
    matrix.run()
    assert len(had) == 1


def test_a_job_that_hangs_ends_with_the_budget(tmp_path, stand_in, monkeypatch):
    had, script = stand_in
    script["text"] = "import time; time.sleep(600)"
    monkeypatch.setattr(gpu_matrix, "JOB_S", 0.0)
    monkeypatch.setattr(gpu_matrix, "GRACE_S", 0.2)
    matrix = gpu_matrix.Matrix(arguments(tmp_path, layouts=["tp1", "tp2"], budget_s=1.0), ["0", "1"])
    started = time.monotonic()
    matrix.run()
    assert time.monotonic() - started < 15
    assert [name for name, *_ in had] == ["tp2"]
    assert all(row["verdict"] == "left out" for row in matrix.rows())
    assert all(job.process is None or job.process.poll() is not None for job in matrix.jobs)


def test_a_job_that_ends_badly_is_a_row_with_its_last_error(tmp_path, stand_in):
    _, script = stand_in
    script["text"] = "raise SystemExit(3)"
    (tmp_path / "cuda_tp1_dense.log").write_text("[rank0]: RuntimeError: no such kernel\nsome more\n")
    matrix = gpu_matrix.Matrix(arguments(tmp_path, layouts=["tp1"]), ["0"])
    matrix.run()
    (row,) = matrix.rows()
    assert row["verdict"] == "FAILED" and "code 3" in row["error"] and "no such kernel" in row["error"]


def test_the_table_names_reasons_and_no_folder_of_the_machine():
    rows = [
        {"layout": "tp2", "model": "dense", "trainer": "plain", **GOOD},
        {
            "layout": "tp2",
            "model": "dense",
            "trainer": "ddp",
            "verdict": "FAILED",
            "error": "OSError: /root/a/b/c.json is gone",
        },
        {"layout": "tp4", "model": "dense", "trainer": "plain", "verdict": "not run", "error": "needs 4 GPUs, has 2"},
    ]
    text = gpu_matrix.table(rows)
    assert (
        "| tp2 | dense | ok | FAILED |" in text
        and "| tp2 | dense | plain | ok | 0.1 0.2 | 9 | 0.2 0.1 | 3 3 | 1 1 | 0 0 |" in text
    )
    assert (
        "OSError: c.json is gone (tp2 dense ddp)" in text and "not run: needs 4 GPUs, has 2 (tp4 dense plain)" in text
    )
    assert "/root" not in text


@pytest.mark.parametrize("kind, num_ranks, reason", [
    ("plain", 1, None), ("hsdp", 1, "needs 2 ranks"), ("hsdp", 3, "even"), ("fsdp2_tp", 4, None), ("fsdp1", 1, "needs 2 ranks"),
])  # fmt: skip
def test_a_kind_of_trainer_says_why_it_cannot_run(kind, num_ranks, reason):
    found = trainers.KINDS[kind].cannot_run(num_ranks)
    assert found is None if reason is None else reason in found


# --- the tensors of the common way -----------------------------------------------------------------------------------


def tiny(folder, shape, lora=None):
    gpu_common.write_config(folder, shape)
    return gpu_common.make_model(folder, torch.device("cpu"), 1, lora=lora)


def test_fused_experts_are_sent_with_the_names_and_values_of_a_checkpoint(tmp_path):
    from safetensors.torch import load_file

    model = tiny(tmp_path, "tiny-moe")
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    sent = dict(gpu_common.wire_tensors(model))
    assert sent.keys() == saved.keys()
    assert all(torch.equal(sent[name], saved[name]) for name in saved)


def test_a_merged_adapter_is_the_same_to_the_last_bit_however_it_is_merged(tmp_path):
    """So that checksums of the engine can be compared; peft merges in place, others tensor by tensor."""
    model = tiny(tmp_path, "tiny", lora=16)
    before = {
        name: tensor.clone() for name, tensor in gpu_common.inner(model).named_parameters() if ".lora_" not in name
    }
    one_by_one = {name: tensor.clone() for name, tensor in gpu_common.wire_tensors(model)}
    with gpu_common.merged(model):
        by_peft = {name: tensor.clone() for name, tensor in gpu_common.wire_tensors(model)}
    assert one_by_one.keys() == by_peft.keys()
    assert all(torch.equal(one_by_one[name], by_peft[name]) for name in by_peft)
    changed = [
        name for name, tensor in before.items() if not torch.equal(tensor, by_peft[name.replace(".base_layer", "")])
    ]
    assert len(changed) == 14, "all seven projections of two layers are adapted"
    gpu_common.change_adapter(model, 2)
    again = dict(gpu_common.wire_tensors(model))
    assert not torch.equal(
        again[changed[0].replace(".base_layer", "")], one_by_one[changed[0].replace(".base_layer", "")]
    )
