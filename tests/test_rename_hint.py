"""The `rename` that an error about names offers: pasted as it is, it mends them."""

import pytest
import torch

from tpcolocate.errors import WeightsMismatchError
from tpcolocate.weights.sources.model_spec import ModelSpec
from tpcolocate.weights.sources.named_weights import NamedWeights
from tpcolocate.weights.sources.rename_hint import rename_hint

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

SERVED = {"model.embed_tokens.weight": (100, 8), "lm_head.weight": (100, 8), "model.norm.weight": (8,)}
for _layer in range(12):
    SERVED |= {
        f"model.layers.{_layer}.self_attn.q_proj.weight": (8, 8),
        f"model.layers.{_layer}.mlp.down_proj.weight": (8, 16),
        f"model.layers.{_layer}.input_layernorm.weight": (8,),
    }
HEAD = {"v_head.summary.weight": (1, 8), "v_head.summary.bias": (1,)}


def pasted(hint):
    """The value of the argument that a hint has."""
    return eval(f"dict({hint})")["rename"]


@pytest.mark.parametrize("given, text", [
    (lambda name: "policy." + name, "name.removeprefix('policy.')"),
    (lambda name: "actor.model." + name, "name.removeprefix('actor.model.')"),
    (lambda name: "module." + name, "name.removeprefix('module.')"),
    (lambda name: "_orig_mod." + name, "name.replace('_orig_mod.', '')"),
    (lambda name: "module._orig_mod." + name, "name.replace('_orig_mod.', '').removeprefix('module.')"),
    (lambda name: name.replace("self_attn", "_checkpoint_wrapped_module.self_attn"), "_checkpoint_wrapped_module."),
    (lambda name: name.removeprefix("model."), "'model.' + name"),
    (lambda name: name.replace("model.", "transformer."), "'model.' + name.removeprefix('transformer.')"),
    (lambda name: name.replace("lm_head", "head"), "'lm_head.' + name.removeprefix('head.')"),
    (lambda name: name.replace("model.", "model.language_model."), "removeprefix('model.language_model.')"),
])  # fmt: skip
@pytest.mark.parametrize("extra", [{}, HEAD], ids=["", "and a value head"])
def test_the_rename_that_is_offered_mends_the_names(given, text, extra):
    tensors = {given(name): torch.zeros(shape) for name, shape in SERVED.items()}
    tensors |= {name: torch.zeros(shape) for name, shape in extra.items()}
    spec = ModelSpec(SERVED, "the test")
    with pytest.raises(WeightsMismatchError, match="has no") as caught:
        spec.check([(name, tensor.shape) for name, tensor in tensors.items()])
    assert caught.value.hint.startswith("pass rename=") and text in caught.value.hint
    renamed = NamedWeights.of(tensors, expected=SERVED, rename=pasted(caught.value.hint.removeprefix("pass ")))
    spec.check([(name, tensor.shape) for name, tensor in renamed.items])
    spec.check_complete([name for name, _ in renamed.items])


def test_a_value_head_alone_is_left_out():
    assert rename_hint([*SERVED.items(), *HEAD.items()], SERVED) == f"rename={dict.fromkeys(HEAD)}"


def test_a_model_without_its_output_layer():
    names = {name.removeprefix("model."): shape for name, shape in SERVED.items() if name != "lm_head.weight"}
    assert rename_hint(list(names.items()), SERVED) == "rename=lambda name: 'model.' + name"


@pytest.mark.parametrize("given", [
    {"a.b": (1,), "c": (8, 8)},
    {},
    {name.replace("q_proj", "query"): shape for name, shape in SERVED.items()},
    {f"policy.{name}": (7, 7) for name in SERVED},
    {**{f"a.{name}": shape for name, shape in SERVED.items()}, **{f"b.{name}": shape for name, shape in SERVED.items()}},
])  # fmt: skip
def test_nothing_is_offered_where_it_cannot_be_seen(given):
    assert rename_hint(list(given.items()), SERVED) is None


def test_names_that_a_rename_has_made_get_no_other():
    spec = ModelSpec(SERVED, "the test")
    with pytest.raises(WeightsMismatchError) as caught:
        spec.check([(f"policy.{name}", torch.Size(shape)) for name, shape in SERVED.items()], hint=False)
    assert "rename=" not in caught.value.hint


@pytest.mark.parametrize("parts", [
    ("weight_g", "weight_v"), ("weight_orig", "weight_mask"), ("parametrizations.weight.original0", "parametrizations.weight.original1"),
])  # fmt: skip
def test_the_parts_of_a_weight_are_not_left_out(parts):
    """Without them the weight would be missing."""
    module = "model.layers.3.mlp.down_proj."
    given = {name: shape for name, shape in SERVED.items() if not name.startswith(module)}
    given |= {module + part: (8, 16) for part in parts}
    with pytest.raises(WeightsMismatchError, match=f"has no {module}{parts[0]}") as caught:
        ModelSpec(SERVED, "the test").check([(name, torch.Size(shape)) for name, shape in given.items()])
    assert "rename=" not in caught.value.hint
    assert ("remove_parametrizations" in caught.value.hint) == parts[0].startswith("parametrizations")


def test_the_bias_of_a_layer_is_not_left_out():
    given = [*((name, torch.Size(shape)) for name, shape in SERVED.items()), ("lm_head.bias", torch.Size((100,)))]
    with pytest.raises(WeightsMismatchError, match="has no lm_head.bias") as caught:
        ModelSpec(SERVED, "the test").check(given)
    assert "rename=" not in caught.value.hint and "or biases" in caught.value.hint


@pytest.mark.parametrize("prefix", ["", "policy."])
def test_the_weights_of_a_further_layer_are_not_left_out(prefix):
    """Without them the engine would compute something else."""
    given = {prefix + name: shape for name, shape in SERVED.items()}
    given |= {name.replace(".11.", ".12."): shape for name, shape in given.items() if ".11." in name}
    with pytest.raises(WeightsMismatchError) as caught:
        ModelSpec(SERVED, "the test").check([(name, torch.Size(shape)) for name, shape in given.items()])
    assert "rename=" not in caught.value.hint
    assert ("more layers" in caught.value.hint) == (not prefix)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_the_weights_of_an_adapter_are_not_left_out(prefix):
    """Of the state dict of a PEFT model; what it has trained would be missing."""
    layer = "model.layers.3.mlp.down_proj."
    given = {
        prefix + name.replace(f"{layer}weight", f"{layer}base_layer.weight"): shape for name, shape in SERVED.items()
    }
    given |= {f"{prefix}{layer}lora_{side}.default.weight": (4, 4) for side in "AB"}
    with pytest.raises(WeightsMismatchError) as caught:
        ModelSpec(SERVED, "the test").check([(name, torch.Size(shape)) for name, shape in given.items()])
    assert "rename" not in caught.value.hint and "pass the PEFT model itself" in caught.value.hint
