"""The merged weights of peft models: compared with peft's own merge, and without changing the model."""

import contextlib
import copy
import gc
import itertools
import weakref
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from tpcolocate.errors import ConfigError, WeightsMismatchError
from tpcolocate.in_server.tpcolocate_receiver.checksums import word_sum
from tpcolocate.in_server.tpcolocate_receiver.regions import Region, whole
from tpcolocate.weights.plan.sharding import ShardFinder
from tpcolocate.weights.plan.slices import Read, SliceKind, TensorSlice
from tpcolocate.weights.sources import low_rank
from tpcolocate.weights.sources.addition import RANK_MULTIPLE
from tpcolocate.weights.sources.lazy_tensor import LazyTensor, full_tensor, have_same_values
from tpcolocate.weights.sources.named_weights import NamedWeights
from tpcolocate.weights.sources.peft_merge import applied_adapters
from tpcolocate.weights.transport.staging import Placing

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

CPU = torch.device("cpu")


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


def test_an_output_layer_with_the_adapter_of_the_embedding_it_is_tied_to_needs_no_name(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    def weights(**config):
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(tie=True), dtype=torch.float32)
        served = set(base.state_dict()) - {"lm_head.weight"}
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, init_lora_weights=False, **config))
        return model, lambda: NamedWeights.of(model, expected=served)

    model, named = weights(target_modules=["embed_tokens"], ensure_weight_tying=True)
    assert set(named().extra) == {"lm_head.weight"}
    named().check_extra()
    again = {name: item.template()(item.recipe.inputs) for name, item in named() if isinstance(item, LazyTensor)}
    assert have_same_values(again["model.embed_tokens.weight"], named().extra["lm_head.weight"].item)
    model.base_model.model.lm_head.set_scale("default", 3)
    with pytest.raises(WeightsMismatchError, match="differs from model.embed_tokens.weight"):
        named().check_extra()
    _, named = weights(target_modules=["embed_tokens"])
    with pytest.raises(WeightsMismatchError, match="differs from model.embed_tokens.weight") as caught:
        named().check_extra()
    assert "tie_word_embeddings=False" in caught.value.hint


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


def test_the_adapters_that_are_in_the_weights_are_known():
    model = adapted(lora())
    model.add_adapter("other", lora(target_modules=["q"]))
    randomise(model)
    [first, *_] = [layer for layer in model.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    assert applied_adapters(model) == {"default": first}
    model.base_model.set_adapter(["default", "other"])
    assert applied_adapters(model).keys() == {"default", "other"}
    with model.disable_adapter():
        assert applied_adapters(model) == {}
    model.set_adapter("other")
    model.merge_adapter()
    assert applied_adapters(model) == {"other": first}
    assert applied_adapters(Model()) == {}


def test_adapters_that_add_nothing_are_not_in_the_weights():
    """As before the first training step; then they may be served beside them."""
    model = adapted(lora(target_modules=["q", "o", "embed"]))
    layers = [layer for layer in model.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.zero_()
        assert applied_adapters(model) == {}
        factors = [layer.lora_embedding_B if layer.lora_embedding_B else layer.lora_B for layer in layers]
        for layer, factor in zip(layers, factors, strict=True):
            b = factor["default"]
            b = getattr(b, "weight", b)
            b.view(-1)[-1] = 1e-9
            assert applied_adapters(model) == {"default": layer}
            b.zero_()
    model.merge_adapter()
    assert applied_adapters(model) == {"default": layers[0]}, "whatever was merged then"


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


def test_layers_in_whose_place_xlora_computes_are_refused_unless_it_is_disabled():
    """It weighs the adapters by the prompt; they were merged as if all of them counted fully."""
    from peft.tuners.xlora.layer import XLoraLinearLayer

    model, mixer = adapted(lora()), SimpleNamespace(disabled=False)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            layer.forward = XLoraLinearLayer(mixer, layer, layer.forward, layer_number=0, config=None).forward
    with pytest.raises(
        ConfigError, match="inner.q.weight has LoRA adapters with which a peft XLoraLinearLayer"
    ) as caught:
        NamedWeights.of(model)
    assert "model.disable_adapter()" in caught.value.hint and applied_adapters(model)
    mixer.disabled = True
    torch.manual_seed(0)
    same(
        {n: t for n, t in sent(model).items() if "q.weight" in n},
        {"inner.q.weight": Model().state_dict()["inner.q.weight"]},
    )


class Linear4bit(nn.Linear):
    """As bitsandbytes has it: the weight is packed, two values to a byte, in a column."""

    def __init__(self, ins, outs):
        super().__init__(ins, outs, bias=False)
        self.weight = nn.Parameter(torch.zeros(ins * outs // 2, 1, dtype=torch.uint8), requires_grad=False)


class LoraOf4bit(nn.Module, peft.tuners.lora.LoraLayer):
    """As peft.tuners.lora.bnb.Linear4bit: a layer of its own, not a `lora.Linear`."""

    def __init__(self, base):
        super().__init__()
        peft.tuners.lora.LoraLayer.__init__(self, base)
        config = lora()
        self._active_adapter = "default"
        self.update_layer("default", config.r, config.lora_alpha, config=config)


class Packed(torch.Tensor):
    """As torchao has it: a shape and a dtype, and the values are elsewhere."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.detach.default, func
        return cls(args[0])


def pack(layer):
    layer.base_layer.weight = nn.Parameter(Packed(layer.base_layer.weight), requires_grad=False)
    type(layer).__module__ = "peft.tuners.lora.torchao"


@pytest.mark.parametrize("quantise", [
    lambda inner: inner.update({"q": LoraOf4bit(Linear4bit(4, 6))}),
    lambda inner: setattr(inner["q"], "base_layer", Linear4bit(4, 6)),
    lambda inner: inner["q"].base_layer.to(torch.float8_e4m3fn),
    lambda inner: setattr(type(inner["q"]), "__module__", "peft.tuners.lora.gptq"),
    lambda inner: pack(inner["q"]),
], ids=["layer of its own", "packed", "float8", "gptq", "torchao"])  # fmt: skip
@pytest.mark.parametrize("state", ["active", "disabled", "merged"])
def test_quantised_base_weights_are_refused_with_the_adapter_served_apart_as_the_way(quantise, state, monkeypatch):
    monkeypatch.setattr(
        peft.tuners.lora.Linear, "__module__", peft.tuners.lora.Linear.__module__
    )  # put back afterwards
    model = adapted(lora())
    quantise(model.base_model.model.inner)
    if state == "merged":
        model.base_model.model.inner["q"].merged_adapters.append("default")
    with model.disable_adapter() if state == "disabled" else contextlib.nullcontext():
        with pytest.raises(ConfigError, match="inner.q.weight is a quantised weight") as caught:
            NamedWeights.of(model)
    assert "engine.set_lora(name, model)" in caught.value.hint and "merge_and_unload" not in caught.value.hint


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


# --- regions -----------------------------------------------------------------------------------------------------------


class Transposed(Experts):
    is_transposed = True  # [experts, in, out], which peft does not swap


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 4))


class Wide(Model):
    """Every layout that peft's layers have."""

    def __init__(self):
        super().__init__()
        self.conv = Conv1D(5, 4)
        self.transposed = Transposed()
        self.single = Single()


EVERY = {
    "target_modules": ["q", "o", "embed"],
    "target_parameters": ["experts.up", "experts.down", "transposed.up", "single.matrix"],
}
LAZY = {"inner.q.weight", "inner.o.weight", "embed.weight"} | set(EVERY["target_parameters"])
CONV = {"target_modules": ["conv"]}  # by itself: for its sake peft sets `fan_in_fan_out`, which parameters refuse


def wide(targets=EVERY, *, base=torch.float32, factors=torch.float32, saved=None, **config):
    torch.manual_seed(0)
    model = peft.get_peft_model(Wide(), lora(**targets, modules_to_save=saved, **config))
    model.add_adapter("other", lora(**{**targets, "r": 3, **config}))
    model.base_model.set_adapter(["default", "other"])
    randomise(model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(factors if "lora_" in name else base)
    return model


def regions(shape):
    """Every region of a shape that is not empty."""
    edges = [[(start, end) for start in range(n) for end in range(start + 1, n + 1)] for n in shape]
    for region in itertools.product(*edges):
        yield Region(tuple(start for start, _ in region), tuple(end - start for start, end in region))


def narrowed(tensor, region):
    for dim, (start, length) in enumerate(zip(region.starts, region.lengths)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def computed(model):
    return {name: item for name, item in NamedWeights.of(model) if isinstance(item, LazyTensor)}


@pytest.mark.slow
@pytest.mark.parametrize("base, factors", [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.bfloat16),
], ids=str)  # fmt: skip
def test_every_region_of_every_merged_weight_equals_that_region_of_the_whole(base, factors):
    models = [wide(targets, base=base, factors=factors, use_rslora=True) for targets in (EVERY, CONV)]
    items = computed(models[0]) | computed(models[1])
    assert set(items) == LAZY | {"conv.weight"}
    for item in items.values():
        full, shard = full_tensor(item), ShardFinder().find(item)
        assert shard.ingredients is None and shard.local.numel() == 0
        assert torch.equal(shard.compute(whole(item.shape)), full)
        # A product's last bits depend on its shape, and peft rounds the delta of one expert once, of several twice.
        delta = (full.float() - item.recipe.base.float()).abs().max().item()
        close = {"rtol": 2 * torch.finfo(base).eps, "atol": 3 * torch.finfo(factors).eps * delta}
        for region in regions(item.shape):
            found = shard.compute(region)
            assert found.dtype == base and found.is_contiguous()
            torch.testing.assert_close(found, narrowed(full, region), **close)


def test_a_region_is_computed_from_what_the_adapter_is_now_and_leaves_it_as_it_is():
    model = wide()
    item = computed(model)["inner.q.weight"]
    shard, region = ShardFinder().find(item), Region((1, 2), (3, 2))
    before = shard.compute(region)
    with torch.no_grad():
        model.base_model.model.inner["q"].lora_B["other"].weight.mul_(3)
    model.base_model.model.inner["q"].scaling["default"] *= 2
    at_rest = state(model)
    after = shard.compute(region)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, narrowed(full_tensor(item), region))
    same(state(model), at_rest, rtol=0, atol=0)
    assert not after.requires_grad


class Allocations(TorchDispatchMode):
    """Notes how large the results of operators are that take memory of their own."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("name", sorted(LAZY | {"conv.weight"}))
def test_a_region_takes_memory_for_itself_not_for_the_tensor(name):
    model = wide(CONV if name == "conv.weight" else EVERY)
    item = computed(model)[name]
    region = Region((0,) * len(item.shape), (1,) * len(item.shape))
    with Allocations() as seen:
        ShardFinder().find(item).compute(region)
    assert len(seen.sizes) >= 6, "two products, scaled and added"
    assert max(seen.sizes) <= 3, "one element, and one row of factors of rank 3 at most"
    assert item.recipe.extra_itemsize == 8


# --- by one multiplication ----------------------------------------------------------------------------------------------


def add_by_torch(additions):
    """Instead of the kernel.  Whether a CPU rounds once depends on the CPU; errors of a second rounding are allowed for."""
    for one in additions:
        assert one.left.shape[1] % RANK_MULTIPLE == 0
        torch.addmm(one.base, one.left, one.right, out=one.out)


@pytest.fixture
def one_multiplication(monkeypatch):
    """As on a GPU; returns a list of how many products were added by each call."""
    calls = []

    def add(additions):
        calls.append(len(additions))
        add_by_torch(additions)

    monkeypatch.setattr(low_rank, "adder_for", lambda device: add)
    return calls


def exact_sum(layer, names):
    """The merged weight of a layer in float64, and the sum of all magnitudes in its delta."""
    found = layer.base_layer.weight.detach().double()
    magnitude = torch.zeros_like(found)
    for name in names:
        a, b = layer.lora_A[name].weight.detach().double(), layer.lora_B[name].weight.detach().double()
        delta, of_delta = (b @ a) * layer.scaling[name], (b.abs() @ a.abs()) * abs(layer.scaling[name])
        found += delta.T if layer.fan_in_fan_out else delta
        magnitude += of_delta.T if layer.fan_in_fan_out else of_delta
    return found, magnitude


def off_by(found, exact, magnitude):
    """By how many units in the last place a tensor is off, beside what the factors' parts leave out."""
    digits = {torch.float32: 23, torch.bfloat16: 7}[found.dtype]
    left_out = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-15}[found.dtype]
    unit = torch.exp2(torch.frexp(exact.abs()).exponent - 1.0 - digits)
    return (((found.double() - exact).abs() - left_out * magnitude).clamp(min=0) / unit).max().item()


@pytest.mark.parametrize("base, factors", [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float16),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("targets", [EVERY, CONV], ids=["linear", "conv"])
def test_adapters_are_added_to_any_region_by_one_multiplication(one_multiplication, targets, base, factors):
    model = wide(targets, base=base, factors=factors, use_rslora=True)
    inner = model.base_model.model
    layers = {"conv.weight": inner.conv} if targets is CONV else {f"inner.{n}.weight": inner.inner[n] for n in "qo"}
    items = computed(model)
    ingredients = items[next(iter(layers))].recipe.ingredients
    assert not ingredients.is_collective
    ingredients.gather()
    others = {name: item for name, item in items.items() if name not in layers}
    assert len(others) == len(items) - len(layers)
    for item in others.values():  # as before
        torch.testing.assert_close(ShardFinder().find(item).compute(whole(item.shape)), full_tensor(item))
    for name, layer in layers.items():
        shard = ShardFinder().find(items[name])
        exact, magnitude = exact_sum(layer, ["default", "other"])
        for region in regions(items[name].shape):
            memory = torch.full((region.volume + 2,), 7.0, dtype=base)
            out = memory[1:-1].view(region.lengths)
            with Allocations() as seen:
                found = shard.compute(region, out)
            assert seen.sizes == [region.volume], "one operator, whose result is where it is wanted"
            assert one_multiplication.pop() == 1
            assert found.data_ptr() == out.data_ptr() and memory[0] == memory[-1] == 7
            assert torch.equal(shard.compute(region), found)
            assert off_by(found, narrowed(exact, region), narrowed(magnitude, region)) <= 1
    assert sum(one.nbytes for pair in ingredients._pairs.values() for one in pair) <= ingredients.num_bytes


class Alike(nn.Module):
    """Layers of one kind, whose factors are prepared together."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 6, bias=False, dtype=torch.bfloat16) for _ in range(3))


def alike():
    torch.manual_seed(0)
    model = peft.inject_adapter_in_model(lora(target_modules=["0", "1", "2"]), Alike())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    return model


def test_what_is_prepared_is_of_the_time_of_the_gather_each_layer_with_its_own_scaling(one_multiplication):
    model = alike()
    model.layers[1].scaling["default"] = 0.3
    shards = [ShardFinder().find(item) for item in computed(model).values()]
    [ingredients] = {id(one.ingredients): one.ingredients for one in shards}.values()

    def found():
        return [shard.compute(shard.region) for shard in shards]

    def expected():
        return [exact_sum(layer, ["default"]) for layer in model.layers]

    def agree(tensors, wanted):
        return all(off_by(one, *pair) <= 1 for one, pair in zip(tensors, wanted))

    ingredients.gather()
    first = expected()
    assert agree(found(), first)
    with torch.no_grad():
        model.layers[0].lora_B["default"].weight.mul_(3)
    model.layers[2].scaling["default"] *= 2
    assert agree(found(), first) and not agree(found(), expected())
    ingredients.gather()
    assert agree(found(), expected()) and not agree(found(), first)
    ingredients.forget()
    assert agree(found(), expected()), "without it as peft does"
    with torch.no_grad():
        model.layers[0].lora_B["default"].weight.mul_(3)
    assert agree(found(), expected())


def test_regions_that_are_computed_together_are_added_by_one_call(one_multiplication):
    model = alike()
    shards = [ShardFinder().find(item) for item in computed(model).values()]
    ingredients = shards[0].ingredients
    ingredients.gather()
    expected = [shard.compute(shard.region) for shard in shards]
    del one_multiplication[:]
    outs = [torch.zeros_like(one) for one in expected]
    with ingredients.together():
        for shard, out in zip(shards, outs):
            assert shard.compute(shard.region, out).data_ptr() == out.data_ptr()
        assert not one_multiplication and not any(out.any() for out in outs)
        assert torch.equal(shards[0].compute(shards[0].region), expected[0]), "what has no memory yet does not wait"
        assert one_multiplication == [1]
    assert one_multiplication == [1, len(shards)] and all(map(torch.equal, outs, expected))
    with pytest.raises(KeyError), ingredients.together():
        shards[0].compute(shards[0].region, outs[0].zero_())
        raise KeyError
    assert not outs[0].any() and len(one_multiplication) == 2
    shards[0].compute(shards[0].region, outs[0])
    assert torch.equal(outs[0], expected[0])
    with ingredients.together():
        pass
    assert len(one_multiplication) == 3


def test_a_stage_is_filled_by_one_call_which_its_checksums_come_after(one_multiplication):
    model = alike()
    shards = {name: ShardFinder().find(item) for name, item in NamedWeights.of(model)}
    ingredients = next(iter(shards.values())).ingredients
    ingredients.gather()
    placed, end = [], 0
    for name, shard in shards.items():
        read = Read(0, whole(shard.shape), tuple(range(len(shard.shape))), torch.bfloat16)
        half = Region((0, 0), (shard.shape[0] // 2, shard.shape[1]))
        placed.append((TensorSlice(name, SliceKind(read, half, 0)), end))
        end += -(-placed[-1][0].num_bytes // 16) * 16
    memory = torch.full((end,), 7, dtype=torch.uint8)
    sums = Placing.of(placed, shards, CPU).put(memory, shards, [ingredients])
    assert one_multiplication == [len(placed)] == [3]
    for (one, first), found in zip(placed, sums.tolist(), strict=True):
        there = memory[first : first + one.num_bytes].view(torch.bfloat16).view(one.shape)
        assert torch.equal(there, shards[one.name].compute(one.region)) and int(word_sum(there)) == found


def test_what_is_prepared_keeps_nothing_of_the_model_alive(one_multiplication):
    model = alike()
    ingredients = next(iter(computed(model).values())).recipe.ingredients
    ingredients.gather()
    references = [weakref.ref(one) for one in (*model.parameters(), *model.modules())]
    del model
    gc.collect()
    assert not any(reference() is not None for reference in references)
    ingredients.forget()
    assert ingredients._pairs == {}


# --- what a repeated sync needs ------------------------------------------------------------------------------------------


def test_a_recipe_names_the_tensors_that_it_depends_on():
    model = wide()
    layer = model.base_model.model.inner["q"]
    inputs = computed(model)["inner.q.weight"].recipe.inputs
    expected = [layer.base_layer.weight]
    for adapter in ("default", "other"):
        expected += [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
    assert len(inputs) == 5 and all(found is tensor for found, tensor in zip(inputs, expected))


@pytest.mark.parametrize("change", [
    lambda model: model.merge_adapter(),
    lambda model: model.base_model.disable_adapter_layers(),
    lambda model: model.set_adapter("other0"),
    lambda model: model.base_model.set_adapter(["default", "other0"]),
    lambda model: model.base_model.model.embed.set_adapter("other0"),
], ids=["merged", "disabled", "another", "two", "another copy"])  # fmt: skip
def test_settings_differ_once_other_weights_would_be_sent(change):
    model = adapted(lora(modules_to_save=["head"]), also=[lora(modules_to_save=["embed"])])
    found = [item.recipe.settings for item in computed(model).values()]
    assert all(settings is found[0] for settings in found)
    before = found[0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert found[0]() == before
    change(model)
    assert found[0]() != before


def test_a_template_makes_the_item_again_and_keeps_nothing_alive():
    model = wide()
    items = computed(model)
    expected = {name: full_tensor(item) for name, item in items.items()}
    inputs = {name: item.recipe.inputs for name, item in items.items()}
    templates = {name: item.template() for name, item in items.items()}
    again = {name: templates[name](inputs[name]) for name in items}
    same({name: full_tensor(item) for name, item in again.items()}, expected, rtol=0, atol=0)
    for name, item in again.items():
        recipe, before = item.recipe, items[name].recipe
        assert recipe.inputs == inputs[name] and recipe.base is before.base and recipe.settings is before.settings
        assert recipe.extra_itemsize == before.extra_itemsize and recipe.ingredients is before.ingredients
        assert (item.shape, item.dtype, item.device) == (items[name].shape, items[name].dtype, items[name].device)
    references = [weakref.ref(tensor) for tensors in inputs.values() for tensor in tensors]
    references += [weakref.ref(module) for module in model.modules()]
    del model, items, inputs, again, recipe, before, item
    gc.collect()
    assert [reference() for reference in references if reference() is not None] == []
    assert len(templates) == len(LAZY)


def test_items_without_settings_have_no_template():
    item = LazyTensor(torch.Size([1]), torch.float32, torch.device("cpu"), lambda: torch.ones(1), False, 0)
    assert item.template() is None


def test_a_weight_of_a_module_that_is_gone_is_not_computed_from_what_is_left():
    items = computed(wide())
    gc.collect()
    with pytest.raises(RuntimeError, match="its module was dropped or changed"):
        full_tensor(items["inner.q.weight"])
    with pytest.raises(RuntimeError, match="its module was dropped or changed"):
        ShardFinder().find(items["inner.q.weight"]).compute(Region((0, 0), (1, 1)))
