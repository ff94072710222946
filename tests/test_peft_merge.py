"""The merged weights of peft models: compared with peft's own merge, and without changing the model."""

import copy

import peft
import pytest
import torch
from torch import nn

from tpcolocate.errors import ConfigError
from tpcolocate.weights.sources.lazy_tensor import LazyTensor, full_tensor
from tpcolocate.weights.sources.named_weights import NamedWeights

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.inner = nn.ModuleDict({"q": nn.Linear(4, 6), "o": nn.Linear(6, 4, bias=False)})
        self.experts = Experts()
        self.head = nn.Linear(4, 8, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.experts(self.inner["o"](self.inner["q"](x))))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 5))
        self.down = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        return torch.einsum("bi,eio,eoj->bj", x, self.up, self.down)


def lora(**kwargs):
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": ["q", "o"], **kwargs})


def adapted(config, *, also=()):
    torch.manual_seed(0)
    model = peft.get_peft_model(Model(), config)
    for number, other in enumerate(also):
        model.add_adapter(f"other{number}", other)
    randomise(model)
    return model


def randomise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:  # B starts at zero: the adapter would have no effect
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(found, expected, **close):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **close)


def sent(model, **kwargs):
    return {name: full_tensor(item) for name, item in NamedWeights.of(model, **kwargs)}


CONFIGS = {
    "linear": lora(),
    "rank-stabilised": lora(use_rslora=True),
    "embedding": lora(target_modules=["embed", "q"]),
    "modules to save": lora(modules_to_save=["head"]),
    "parameters": lora(target_modules=[], target_parameters=["experts.up", "experts.down"]),
    "base's bias": lora(bias="lora_only"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_weights_equal_those_of_peft_and_the_model_is_unchanged(kind):
    model = adapted(copy.deepcopy(CONFIGS[kind]))
    before = state(model)
    weights = NamedWeights.of(model)
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    same(sent(model), expected)
    same(state(model), before, rtol=0, atol=0)
    # Weights without an adapter are live memory, not copies.
    live = {tensor.data_ptr() for tensor in model.state_dict(keep_vars=True).values()}
    untouched = [item for _, item in weights if not isinstance(item, LazyTensor)]
    assert untouched and all(item.data_ptr() in live for item in untouched)
    base = Model().state_dict()
    with model.disable_adapter():
        base = sent(model)
    lazy = {name for name, item in weights if isinstance(item, LazyTensor)}
    assert lazy and all(not torch.equal(expected[name], base[name]) for name in lazy)


def test_a_merged_weight_is_computed_when_it_is_read():
    model = adapted(lora())
    weights = NamedWeights.of(model)
    with torch.no_grad():
        model.base_model.model.inner["q"].lora_B["default"].weight.mul_(3)
    same({name: full_tensor(item) for name, item in weights}, copy.deepcopy(model).merge_and_unload().state_dict())


@pytest.mark.parametrize("prepare", [
    lambda model: model.merge_adapter(),
    lambda model: model.base_model.set_adapter(["default", "other0"]),
    lambda model: model.set_adapter("other0"),
], ids=["merged", "two at once", "another one"])  # fmt: skip
def test_active_adapters_are_merged_and_merged_ones_not_merged_again(prepare):
    model = adapted(lora(), also=[lora(target_modules=["q"], r=3)])
    prepare(model)
    ids = torch.arange(8)
    torch.manual_seed(0)
    plain = Model()
    base = plain(ids)
    plain.load_state_dict(sent(model))
    torch.testing.assert_close(plain(ids), model(ids), rtol=1e-4, atol=1e-3)
    assert (plain(ids) - base).abs().max() > 0.1


def test_disabled_adapters_are_not_merged():
    model = adapted(lora(modules_to_save=["head"]))
    torch.manual_seed(0)
    base = Model().state_dict()
    with model.disable_adapter():
        same(sent(model), base, rtol=0, atol=0)
    assert not torch.equal(sent(model)["head.weight"], base["head.weight"])


def test_adapters_both_merged_and_disabled_are_refused():
    model = adapted(lora())
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(ConfigError, match="inner.q.weight are both merged and disabled") as caught:
        NamedWeights.of(model)
    assert "unmerge_adapter()" in caught.value.hint


@pytest.mark.parametrize("config, words", [
    (lora(use_dora=True), r"inner.q.weight has a LoRA adapter 'default' that cannot be merged .*\(Linear; DoRA"),
    (lora(target_modules=["q"], lora_bias=True), "inner.q.weight has a LoRA adapter 'default' that cannot be merged"),
    (peft.IA3Config(target_modules=["q"], feedforward_modules=[]), "inner.q.weight has an adapter of kind ia3"),
    (lora(trainable_token_indices={"embed": [1]}), "embed is a peft TrainableTokensWrapper"),
], ids=["dora", "bias", "ia3", "tokens"])  # fmt: skip
def test_adapters_that_cannot_be_merged_are_refused_with_an_alternative(config, words):
    model = adapted(config)
    with pytest.raises(ConfigError, match=words) as caught:
        NamedWeights.of(model)
    assert "merge_and_unload()" in caught.value.hint
    assert sorted(sent(copy.deepcopy(model).merge_and_unload())) == sorted(Model().state_dict()), "the hint must work"


def test_a_quantised_base_weight_is_refused():
    model = adapted(lora())
    base = model.base_model.model.inner["q"].base_layer
    base.weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="quantised base weights are not supported"):
        NamedWeights.of(model)


def test_a_prompt_adapter_is_refused(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir())
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(model, config)
    with pytest.raises(ConfigError, match="a PROMPT_TUNING adapter changes the prompt") as caught:
        NamedWeights.of(model)
    assert "get_base_model()" in caught.value.hint
    assert list(dict(NamedWeights.of(model.get_base_model()))) == list(model.get_base_model().state_dict())


def test_compiled_peft_models_are_merged_too():
    model = adapted(lora())
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    same(sent(torch.compile(model)), expected)
    model.base_model.model.inner["q"] = torch.compile(model.base_model.model.inner["q"])
    same(sent(model), expected)


def test_an_injected_adapter_without_a_peft_model_is_merged():
    torch.manual_seed(0)
    model = peft.inject_adapter_in_model(lora(), Model())
    randomise(model)
    reference = adapted(lora())
    assert not isinstance(model, peft.PeftModel)
    found = sent(model)
    assert list(found) == list(Model().state_dict())
    assert not torch.equal(found["inner.q.weight"], model.inner["q"].base_layer.weight)
    assert torch.equal(
        found["inner.o.weight"] != model.inner["o"].base_layer.weight, torch.ones(4, 6, dtype=torch.bool)
    )
    assert list(sent(reference)) == list(found)


def test_a_bfloat16_sum_is_rounded_once():
    model = adapted(lora()).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    layer = model.base_model.model.inner["q"]
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    found = sent(model)["inner.q.weight"]
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.to(torch.bfloat16))
