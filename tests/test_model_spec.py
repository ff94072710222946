"""The names and shapes of a served model, read from its folder, and the checks against them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tpcolocate.engine.limits import _model_config
from tpcolocate.errors import ConfigError, WeightsMismatchError
from tpcolocate.weights.sources.model_spec import ModelSpec, check_not_quantised, read_spec, safetensors_files

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

SPEC = ModelSpec({"a": (2, 3), "b": (4,), "c": ()}, "somewhere")


def shapes_of(folder):
    return {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("tie", [False, True])
def test_the_spec_is_read_from_the_headers_of_a_checkpoint(tiny_model_dir, tie):
    folder = tiny_model_dir(tie=tie)
    spec = read_spec(str(folder))
    assert dict(spec.shapes) == shapes_of(folder)
    assert ("lm_head.weight" in spec.shapes) is not tie
    assert "1 safetensors files" in spec.origin and str(folder) in spec.origin


@pytest.mark.parametrize("index", [False, True])
def test_a_checkpoint_may_have_several_files(tiny_model_dir, tmp_path, index):
    folder = tiny_model_dir()
    tensors = load_file(folder / "model.safetensors")
    parts = {}
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        parts.setdefault(f"model-{i % 2}.safetensors", {})[name] = tensor
    for file, part in parts.items():
        save_file(part, tmp_path / file)
    if index:
        places = {name: file for file, part in parts.items() for name in part}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        save_file({"adapter": torch.zeros(1)}, tmp_path / "adapter.safetensors")  # not in the index
    spec = read_spec(str(tmp_path))
    assert dict(spec.shapes) == shapes_of(folder)
    assert "2 safetensors files" in spec.origin


@pytest.mark.parametrize("tie", [False, True])
def test_without_weights_the_spec_comes_from_the_architecture(tiny_model_dir, tmp_path, tie):
    folder = tiny_model_dir(tie=tie)
    shutil.copy(folder / "config.json", tmp_path)
    spec = read_spec(str(tmp_path))
    assert dict(spec.shapes) == shapes_of(folder)
    assert "Qwen3ForCausalLM" in spec.origin


@pytest.mark.parametrize("content", [None, {}, {"model_type": "no-such-model"}, "no json"])
def test_an_unknown_architecture_has_no_spec(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert read_spec(str(tmp_path)) is None


@pytest.mark.parametrize("name", ["/no/such/folder", "no/such-model-in-the-cache", "not a repository id !"])
def test_a_model_that_is_not_local_has_no_spec_and_needs_no_network(monkeypatch, tmp_path, name):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("it connects"))
    assert read_spec(name) is None


@pytest.mark.parametrize("tensors, words", [
    ([("a", (2, 2))], r"a has shape \(2, 2\), the model expects \(2, 3\)"),
    ([("a", (3, 2))], r"a has shape \(3, 2\)"),
    ([("a", (2, 3, 1))], r"a has shape \(2, 3, 1\)"),
    ([("c", (1,))], r"c has shape \(1,\), the model expects \(\)"),
    ([("x", (2, 3)), ("b", (4,))], "the served model has no x"),
    ([(f"x{i}", (1,)) for i in range(8)], "x0; x1; x2; x3; x4 and 3 more"),
    ([("x", (1,)), ("b", (5,))], r"b has shape \(5,\)"),  # shapes before names
])  # fmt: skip
def test_wrong_names_and_shapes_are_refused_with_the_origin_of_the_spec(tensors, words):
    with pytest.raises(WeightsMismatchError, match=words) as caught:
        SPEC.check([(name, torch.Size(shape)) for name, shape in tensors])
    assert "according to somewhere" in str(caught.value)


def test_some_of_the_weights_pass_and_completeness_is_a_check_of_its_own():
    SPEC.check([("c", torch.Size([])), ("a", torch.Size([2, 3]))])
    SPEC.check_complete(["c", "b", "a", "more"])
    with pytest.raises(WeightsMismatchError, match="weights are missing: a; c "):
        SPEC.check_complete(["b"])
    assert SPEC.missing(["b"], ignored={"a", "x"}) == ["c"]
    SPEC.check_complete(["b"], ignored={"a", "c"})


@pytest.mark.parametrize("config, words", [
    ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\)"),
    ({"compression_config": {"format": "int"}}, r"compression_config \(no method\)"),
    ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, r"quantization_config \(awq\)"),
])  # fmt: skip
def test_a_quantised_checkpoint_is_refused(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"quantised checkpoint: it has {words}"):
        check_not_quantised(str(tmp_path))


def test_a_checkpoint_of_modelopt_is_refused(tmp_path):
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="it has hf_quant_config.json"):
        check_not_quantised(str(tmp_path))


@pytest.mark.parametrize("config", ["no json", "[]", "{}", '{"quantization_config": null}', '{"text_config": 3}'])
def test_other_checkpoints_and_unknown_ones_pass(tmp_path, config, tiny_model_dir):
    (tmp_path / "config.json").write_text(config)
    for path in (tmp_path, tmp_path / "nowhere", tiny_model_dir()):
        check_not_quantised(str(path))


@pytest.mark.parametrize("missing, found", [("huggingface_hub", "no/such-model"), ("transformers", None)])
def test_without_the_optional_libraries_there_is_no_spec(monkeypatch, tmp_path, tiny_model_dir, missing, found):
    shutil.copy(tiny_model_dir() / "config.json", tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    assert read_spec(found or str(tmp_path)) is None


def test_a_configuration_is_read_whatever_the_locale_is(tmp_path, monkeypatch):
    """JSON is UTF-8; text is read in the encoding of the locale, such as LC_ALL=ja_JP.eucJP."""

    def in_another_encoding(self, encoding="ascii", errors=None):
        return self.read_bytes().decode(encoding)

    monkeypatch.setattr(Path, "read_text", in_another_encoding)
    config = {"author": "Jürgen", "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(ConfigError, match="quant_method|fp8"):
        check_not_quantised(str(tmp_path))
    assert _model_config(tmp_path, {}) == config
    index = {"metadata": {"author": "Jürgen"}, "weight_map": {"a": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
    assert safetensors_files(tmp_path) == [tmp_path / "one.safetensors"]
