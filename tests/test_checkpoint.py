"""Checkpoints, written and read here and by transformers."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from safetensors.torch import load_file, save_file

import tpcolocate
from tpcolocate.checks import check_folder, check_path
from tpcolocate.errors import ConfigError, WeightsMismatchError
from tpcolocate.weights.sources import checkpoint
from tpcolocate.weights.sources.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    count_shards,
    outline,
    save,
    saved_version,
)
from tpcolocate.weights.sources.model_spec import read_spec
from tpcolocate.weights.sources.named_weights import NamedWeights

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3)}


def write(folder, tensors=TENSORS, *, shard_bytes=2**30, like=None, version="7"):
    weights = NamedWeights.of(tensors)
    writer = CheckpointWriter(
        folder, weight_version=version, num_shards=count_shards(weights, shard_bytes=shard_bytes), like=like
    )
    return save(weights, writer, shard_bytes=shard_bytes)


@pytest.mark.parametrize("shard_bytes, files", [
    (2**30, ["model.safetensors"]),
    (1, ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
           "model.safetensors.index.json"]),
])  # fmt: skip
def test_a_checkpoint_is_read_as_it_was_written_with_its_version(tmp_path, shard_bytes, files):
    assert write(tmp_path / "x", shard_bytes=shard_bytes) is None
    assert sorted(os.listdir(tmp_path / "x")) == files and os.listdir(tmp_path) == ["x"]
    found = Checkpoint(tmp_path / "x")
    assert dict(found).keys() == TENSORS.keys() and len(found) == 3 and found.weight_version == "7"
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    assert saved_version(str(tmp_path / "x")) == "7" and "weight_version='7'" in repr(found)
    if shard_bytes == 1:
        index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 24 + 8 + 8 and set(index["weight_map"].values()) == set(files[:-1])


@pytest.mark.parametrize("shard_bytes", [2**30, 200_000])
@pytest.mark.parametrize("tie", [False, True])
def test_transformers_reads_a_saved_model_and_its_tokenizer(tmp_path, tiny_model_dir, tie, shard_bytes):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    served = tiny_model_dir(tie=tie)
    model = AutoModelForCausalLM.from_pretrained(served, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    expected = read_spec(str(served)).shapes
    weights = NamedWeights.of(model, expected=expected)
    writer = CheckpointWriter(
        tmp_path / "x", weight_version="7", num_shards=count_shards(weights, shard_bytes=shard_bytes), like=served
    )
    assert save(weights, writer, shard_bytes=shard_bytes) is None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "x").decode([5]) == AutoTokenizer.from_pretrained(served).decode(
        [5]
    )
    assert read_spec(str(tmp_path / "x")).shapes == expected


def test_tied_transposed_and_overlapping_weights_are_written(tmp_path):
    block = torch.arange(6.0).reshape(2, 3)
    assert write(tmp_path / "x", {"a": block, "b": block, "t": block.T, "part": block[1]}) is None
    found = Checkpoint(tmp_path / "x")
    assert torch.equal(found["a"], block) and torch.equal(found["b"], block) and torch.equal(found["t"], block.T)
    assert torch.equal(found["part"], block[1])


def test_a_folder_that_is_not_empty_is_refused_and_unchanged(tmp_path):
    (tmp_path / "x").mkdir()
    assert write(tmp_path / "x") is None  # empty
    before = load_file(tmp_path / "x" / "model.safetensors")
    with pytest.raises(ConfigError, match="is not empty"):
        write(tmp_path / "x", {"a": torch.zeros(1)})
    assert load_file(tmp_path / "x" / "model.safetensors").keys() == before.keys()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is not a folder"):
        write(tmp_path / "file")


def fail_first(problem, then=lambda *args, **kwargs: None):
    """Return a function that raises when it is first called, and a list of its calls."""
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise problem
        return then(*args, **kwargs)

    return call, calls


@pytest.mark.parametrize("step", ["full_tensor", "save_file", "finish"])
def test_after_an_error_the_rest_is_gathered_and_nothing_is_left(tmp_path, monkeypatch, step):
    """The other ranks are in these gathers.  The first error is returned, not the last."""
    gathered = []
    monkeypatch.setattr(checkpoint, "full_tensor", lambda item: gathered.append(item) or item)
    problem = OSError("disk full")
    if step == "full_tensor":
        failing, gathered = fail_first(problem, torch.Tensor.detach)
        monkeypatch.setattr(checkpoint, "full_tensor", failing)
        monkeypatch.setattr(checkpoint, "save_file", lambda *args, **kwargs: pytest.fail("it writes after an error"))
    elif step == "save_file":
        monkeypatch.setattr(checkpoint, "save_file", fail_first(problem)[0])
    else:
        monkeypatch.setattr(CheckpointWriter, "finish", fail_first(problem)[0])
    assert write(tmp_path / "x", shard_bytes=1) is problem
    assert len(gathered) == 3 and os.listdir(tmp_path) == []


def test_an_interrupt_is_not_kept_for_later(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "full_tensor", fail_first(KeyboardInterrupt())[0])
    with pytest.raises(KeyboardInterrupt):
        save(NamedWeights.of(TENSORS), None)


def test_an_interrupt_leaves_no_folder_behind(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "full_tensor", interrupted)
    writer = CheckpointWriter(tmp_path / "step", weight_version="1", num_shards=1, like=None)
    with pytest.raises(KeyboardInterrupt):
        save(NamedWeights.of({"w": torch.ones(2)}), writer)
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_process_of_this_number_has_left_is_in_no_ones_way(tmp_path):
    for _ in range(2):
        writer = CheckpointWriter(tmp_path / "step", weight_version="1", num_shards=1, like=None)
        writer.add({"w": torch.ones(2)})
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step"] and len(Checkpoint(tmp_path / "step")) == 1


def test_what_killed_processes_have_left_of_a_checkpoint_is_removed_by_the_next_one(tmp_path):
    child = subprocess.Popen(["sleep", "60"])
    try:
        for pid in (2**22 + 1, child.pid):  # none has such a number
            folder = tmp_path / f".step.{os.uname().nodename}-{pid}.partial"
            folder.mkdir()
            (folder / "model.safetensors").touch()
        (tmp_path / ".step.another-host-1.partial").mkdir()
        CheckpointWriter(tmp_path / "step", weight_version="1", num_shards=1, like=None).finish()
        left = {f".step.{os.uname().nodename}-{child.pid}.partial", ".step.another-host-1.partial", "step"}
        assert set(os.listdir(tmp_path)) == left
    finally:
        child.kill()
        child.wait()


def test_a_checkpoint_goes_to_where_a_link_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    writer = CheckpointWriter(tmp_path / "link", weight_version="1", num_shards=1, like=None)
    writer.add({"w": torch.ones(2)})
    writer.finish()
    assert (tmp_path / "link").is_symlink() and len(Checkpoint(tmp_path / "link")) == 1


def test_ranks_that_gather_other_weights_or_in_another_order_are_told_apart():
    a, b = torch.zeros(2, 3), torch.zeros(2, 3)
    first = outline([("a", a), ("b", b)])
    assert first == outline([("a", b), ("b", a)]) and first.startswith("2 tensors (")
    others = [[("b", a), ("a", b)], [("a", a)], [("a", a), ("b", b.bfloat16())], [("a", a), ("b", b.T)]]
    assert len({first, *map(outline, others)}) == 5
    with pytest.raises(WeightsMismatchError, match="a is given twice"):
        outline([("a", a), ("b", b), ("a", b)])


@pytest.mark.parametrize("folder", [None, 5, b"a", ""])
def test_a_folder_is_a_path(folder):
    with pytest.raises(ConfigError, match="folder"):
        Checkpoint(folder)


def test_a_rank_without_a_writer_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert save(NamedWeights.of(TENSORS), None) is None and os.listdir(tmp_path) == []


def test_folders_that_are_not_checkpoints_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no safetensors"):
        Checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="has no safetensors"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="cannot be read"):
        Checkpoint(tmp_path)
    assert saved_version(str(tmp_path)) is None and saved_version("no/such-model") is None
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ConfigError, match="gone.safetensors cannot be read"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ['{"weight_map": {"a"', "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": null}']
)
def test_an_index_that_is_broken_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    for read in (Checkpoint, saved_version, read_spec):
        with pytest.raises(ConfigError, match="index.json cannot be read"):
            read(str(tmp_path))


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors", metadata={"weight_version": "1"})
    assert Checkpoint(tmp_path).weight_version == "1"
    save_file({"b": torch.ones(1)}, tmp_path / "2.safetensors", metadata={"weight_version": "2"})
    with pytest.raises(ConfigError, match="different weight versions: 1, 2"):
        Checkpoint(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "2.safetensors", metadata={"weight_version": "1"})
    with pytest.raises(ConfigError, match="a is in more than one file"):
        Checkpoint(tmp_path)


def test_a_checkpoint_from_elsewhere_has_no_version(tiny_model_dir):
    assert Checkpoint(tiny_model_dir()).weight_version is None


def test_a_checkpoint_is_memory_mapped(tmp_path):
    import psutil

    save_file({"a": torch.zeros(64 * 2**20)}, tmp_path / "model.safetensors")  # 256 MiB
    before = psutil.Process().memory_info().rss
    found = Checkpoint(tmp_path)
    assert found["a"].shape == (64 * 2**20,)
    assert psutil.Process().memory_info().rss - before < 64 * 2**20


def save_sharded(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 5))
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = NamedWeights.of(fully_shard(model, mesh=init_device_mesh("cpu", (2,))))
    writer = None
    if rank == 0:
        writer = CheckpointWriter(
            folder, weight_version="1", num_shards=count_shards(weights, shard_bytes=64), like=None
        )
    assert save(weights, writer, shard_bytes=64) is None
    return want


@pytest.mark.slow
def test_sharded_weights_are_written_in_full(tmp_path):
    want, _ = run_ranks(save_sharded, 2, str(tmp_path / "x"))
    found = Checkpoint(tmp_path / "x")
    assert found.keys() == want.keys() and all(torch.equal(found[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("call", [
    Checkpoint,
    lambda path: check_path("folder", path),  # of save_weights
    lambda path: check_folder("folder", path),
    lambda path: tpcolocate.init(1, device="cpu").launch(path),
    lambda path: tpcolocate.init(1, device="cpu").launch("model", log_path=path),
    tpcolocate.write_prometheus_targets,
])  # fmt: skip
def test_a_path_that_only_a_shell_expands_is_refused(call, monkeypatch, tmp_path):
    """A folder of the name ~ was made, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for path in ("~/step-7", Path("~/step-7")):
        with pytest.raises(ConfigError, match="begins with ~") as caught:
            call(path)
        assert "pass '/home/me/step-7', or './~/step-7'" in caught.value.hint
    assert os.listdir() == []
    assert check_path("folder", "./~/a") == Path("~/a") and check_path("folder", "a~") == Path("a~")
