"""NamedWeights of a transformers model under the names of its checkpoint."""

import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tpcolocate.errors import ConfigError
from tpcolocate.weights.sources.model_spec import read_spec
from tpcolocate.weights.sources.named_weights import NamedWeights

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

FAMILIES = pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
FUSES = pytest.mark.skipif(
    find_spec("transformers.core_model_loading") is None, reason="transformers 4 keeps experts as its checkpoints do"
)
FUSED = "model.layers.0.mlp.experts.gate_up_proj"


def checkpoint(folder):
    return load_file(folder / "model.safetensors")


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def build(folder):
    """Return a model that was not loaded from a checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)


@FUSES
@FAMILIES
@pytest.mark.parametrize("with_expected", [True, False], ids=["expected names", "no expected names"])
def test_experts_are_views_of_the_fused_parameters(tiny_model_dir, family, with_expected):
    saved = checkpoint(tiny_model_dir(family=family))
    model = load(tiny_model_dir(family=family))
    assert FUSED in model.state_dict(), "there must be something to convert"
    weights = NamedWeights.of(model, expected=saved if with_expected else None)
    sent = dict(weights)
    assert sorted(sent) == sorted(saved) and len(weights.items) == len(sent)
    live = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for name, tensor in sent.items():
        assert torch.equal(tensor, saved[name]), name
        assert tensor.untyped_storage().data_ptr() in live and not (tensor.requires_grad and tensor.ndim == 3)
    assert weights.reading_bytes == 0 and not weights.is_sharded


@FAMILIES
def test_a_model_that_was_not_loaded_from_a_checkpoint_is_converted_too(tiny_model_dir, family):
    folder = tiny_model_dir(family=family)
    assert sorted(name for name, _ in NamedWeights.of(build(folder))) == sorted(checkpoint(folder))


def test_weights_that_are_served_under_the_models_own_names_are_not_converted(tiny_model_dir):
    model = load(tiny_model_dir(family="qwen3_moe"))
    state = model.state_dict(keep_vars=True)
    assert all(item is state[name] for name, item in NamedWeights.of(model, expected=state))


def test_names_are_compared_after_renaming(tiny_model_dir):
    folder = tiny_model_dir(family="qwen3_moe")
    model, served = load(folder), [f"text.{name}" for name in checkpoint(folder)]
    weights = NamedWeights.of(model, expected=served, rename=lambda name: f"text.{name}")
    assert sorted(name for name, _ in weights) == sorted(served)
    fused = [f"text.{name}" for name in model.state_dict()]
    weights = NamedWeights.of(model, expected=fused, rename=lambda name: f"text.{name}")
    assert sorted(name for name, _ in weights) == sorted(fused)


class Actor(nn.Module):
    """A compiled policy beside a value head."""

    def __init__(self, policy):
        super().__init__()
        self.policy = torch.compile(policy)
        self.value_head = nn.Linear(4, 1)


@pytest.mark.slow
def test_a_model_inside_a_module_is_converted_under_its_prefix(tiny_model_dir):
    saved = checkpoint(tiny_model_dir(family="mixtral"))
    actor = Actor(load(tiny_model_dir(family="mixtral")))
    head = ["value_head.bias", "value_head.weight"]
    assert sorted(name for name, _ in NamedWeights.of(actor)) == [*sorted(f"policy.{name}" for name in saved), *head]
    policy_only = lambda name: name.removeprefix("policy.") if name.startswith("policy.") else None  # noqa: E731
    sent = dict(NamedWeights.of(actor, expected=saved, rename=policy_only))
    assert sorted(sent) == sorted(saved) and all(torch.equal(sent[name], tensor) for name, tensor in saved.items())


def test_a_dense_model_is_not_converted(tiny_model_dir):
    folder = tiny_model_dir(family="qwen3")
    for expected in (None, checkpoint(folder)):
        model = load(folder)
        state = model.state_dict(keep_vars=True)
        assert [(name, id(item)) for name, item in NamedWeights.of(model, expected=expected)] == [
            (name, id(tensor)) for name, tensor in state.items()
        ]


def test_modules_without_a_transformers_model_are_not_converted():
    model = nn.Sequential(nn.Linear(2, 2))
    assert [name for name, _ in NamedWeights.of(model, expected=["a"])] == ["0.weight", "0.bias"]


@FUSES
def test_a_conversion_that_computes_new_tensors_is_refused(tiny_model_dir):
    from transformers.core_model_loading import Transpose, WeightConverter

    model = load(tiny_model_dir(family="qwen3"))
    model._weight_conversions = [WeightConverter("q_proj.weight", "q_proj.weight", operations=[Transpose(0, 1)])]
    with pytest.raises(
        ConfigError, match="q_proj.weight of a Qwen3ForCausalLM is not part of a trainer's tensor"
    ) as caught:
        NamedWeights.of(model)
    assert "pass (name, tensor) pairs" in caught.value.hint


@FUSES
def test_a_conversion_that_returns_a_transposed_view_is_followed(tiny_model_dir):
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class View(ConversionOps):
        def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
            [tensors] = input_dict.values()
            return {target_patterns[0]: (tensors[0] if isinstance(tensors, list) else tensors).t()}

        @property
        def reverse_op(self):
            return self

    model = load(tiny_model_dir(family="qwen3"))
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(torch.arange(16.0).view(4, 4))  # square: only the strides show the transpose
    model._weight_conversions = [WeightConverter("q_proj.weight", "q_proj.weight", operations=[View()])]
    sent = dict(NamedWeights.of(model))["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(sent, layer.weight.t()) and sent.data_ptr() == layer.weight.data_ptr()


@FUSES
def test_a_conversion_that_transformers_cannot_undo_is_refused(tiny_model_dir):
    model = load(tiny_model_dir(family="qwen3_moe"))
    model._weight_conversions[0].quantization_operation = object()  # as loading a quantised checkpoint leaves it
    with pytest.raises(
        ConfigError, match="weights of a Qwen3MoeForCausalLM as in its checkpoint: Cannot reverse"
    ) as caught:
        NamedWeights.of(model)
    assert "pass (name, tensor) pairs" in caught.value.hint


@FUSES
@pytest.mark.parametrize("layout", ["transposed", "with gaps"])
def test_parts_of_a_non_contiguous_tensor_are_views_too(tiny_model_dir, layout):
    folder = tiny_model_dir(family="qwen3_moe")
    model, saved = load(folder), checkpoint(folder)
    experts = model.model.layers[0].mlp.experts
    fused = experts.gate_up_proj.detach()
    if layout == "transposed":
        fused = fused.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        fused = torch.cat([fused, fused], dim=2)[:, :, : fused.shape[2]]
    experts.gate_up_proj = nn.Parameter(fused)
    assert not experts.gate_up_proj.is_contiguous()
    sent = dict(NamedWeights.of(model, expected=saved))
    assert all(torch.equal(sent[name], tensor) for name, tensor in saved.items())
    memory = experts.gate_up_proj.untyped_storage().data_ptr()
    assert sent["model.layers.0.mlp.experts.4.up_proj.weight"].untyped_storage().data_ptr() == memory


def layered():
    """Five layers, of which the second has no experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "moe_intermediate_size": 6, "head_dim": 4, "vocab_size": 10}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(num_hidden_layers=5, mlp_only_layers=[1], num_experts=5, num_experts_per_tok=2, **sizes, **heads)
    )


def converted_by_transformers(model):
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(model.state_dict()))


def rename_one_layer(model):
    from transformers.core_model_loading import WeightRenaming

    # Reverted: the name in the checkpoint comes first when it is loaded.
    model._weight_conversions = [WeightRenaming("layers.2.entry_norm", "layers.2.input_layernorm")]


def transpose_the_last_layer(model):
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class View(ConversionOps):
        def convert(self, input_dict, source_patterns, target_patterns, full_layer_name, **kwargs):
            [tensors] = input_dict.values()
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            return {target_patterns[0]: tensor.t() if "layers.4." in full_layer_name else tensor}

        @property
        def reverse_op(self):
            return self

    model._weight_conversions = [WeightConverter("q_proj.weight", "q_proj.weight", operations=[View()])]


@FUSES
@pytest.mark.parametrize(
    ("change", "sizes"),
    [(lambda model: None, [36]), (rename_one_layer, [58]), (transpose_the_last_layer, [36, 58])],
    ids=["layers alike", "a layer named otherwise", "a layer viewed otherwise"],
)
def test_the_names_of_layers_follow_from_the_first_and_the_last_that_are_alike(monkeypatch, change, sizes):
    from transformers import core_model_loading

    model = layered()
    change(model)
    expected = converted_by_transformers(model)
    found, revert = [], core_model_loading.revert_weight_conversion

    def counted(model, state):
        found.append(len(state))
        return revert(model, state)

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", counted)
    sent = dict(NamedWeights.of(model))
    assert sorted(sent) == sorted(expected)
    assert all(torch.equal(sent[name], tensor) for name, tensor in expected.items())
    assert found == sizes, "how many tensors transformers was asked to name"
    assert ("model.layers.2.entry_norm.weight" in sent) == (change is rename_one_layer)


@FAMILIES
def test_the_spec_of_an_architecture_has_the_names_of_a_checkpoint(tiny_model_dir, tmp_path, family):
    folder = tiny_model_dir(family=family)
    shutil.copy(folder / "config.json", tmp_path)
    spec = read_spec(str(tmp_path))
    assert dict(spec.shapes) == {name: tuple(tensor.shape) for name, tensor in checkpoint(folder).items()}
