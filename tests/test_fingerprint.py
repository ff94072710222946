"""Whether a module matches its fingerprint from one sync to the next, and every change that must not match."""

import copy
import gc
import sys
import weakref

import peft
import pytest
import torch
from harness import run_ranks
from torch import nn

from tpcolocate.weights.sources.fingerprint import Fingerprint
from tpcolocate.weights.sources.lazy_tensor import LazyTensor, full_tensor
from tpcolocate.weights.sources.named_weights import NamedWeights

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]


# Of a fingerprint's comparison, see `Layer`.
CALLS_PER_LAYER = 100


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def fingerprint(module, **options):
    weights = NamedWeights.of(module, **options)
    return weights, Fingerprint.of(module, weights)


def test_an_unchanged_module_matches_and_its_memory_is_not_kept():
    module = Small()
    weights, found = fingerprint(module)
    again = found.match(module).weights
    assert [name for name, _ in again.items] == [name for name, _ in weights.items]
    assert all(a is b for (_, a), (_, b) in zip(again.items, weights.items))
    with torch.no_grad():
        module.first.weight.add_(1)  # an optimizer step in place
    assert found.match(module) is not None
    storage = torch.multiprocessing.reductions.StorageWeakRef(module.first.weight.untyped_storage())
    del module, weights, again
    gc.collect()
    assert storage.expired()


class Layer(nn.Module):
    """Six modules, as of an attention: four with a weight, one without, and the layer."""

    def __init__(self):
        super().__init__()
        for name in "qkvo":
            setattr(self, name, nn.Linear(2, 2, bias=False))
        self.act = nn.SiLU()


def calls_in(action):
    """How many functions are called, Python's and others."""
    num_calls = 0

    def count(frame, event, argument):
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return num_calls


def test_what_an_unchanged_layer_costs_does_not_grow():
    """Each sync of each step pays it; calls, because times depend on the machine."""
    few, many = (nn.ModuleList(Layer() for _ in range(number)) for number in (10, 60))
    calls = []
    for module in (few, many):
        _, found = fingerprint(module)
        calls.append(calls_in(lambda module=module, found=found: found.match(module)))
    per_layer = (calls[1] - calls[0]) / 50
    assert per_layer <= CALLS_PER_LAYER


def replace_a_parameter(module):
    module.first.weight = nn.Parameter(module.first.weight.detach().clone())


def replace_the_data(module):
    module.first.weight.data = module.first.weight.data.clone()


def transpose_the_data_in_place(module):
    module.first.weight.data = module.first.weight.data.t()


def shorten_the_data_in_place(module):
    module.first.weight.data = module.first.weight.data[:2]


def replace_a_buffer(module):
    module.norm.running_mean = module.norm.running_mean.clone()


def add_a_parameter(module):
    module.extra = nn.Parameter(torch.zeros(1))


def remove_a_parameter(module):
    module.first.bias = None


def rename_a_layer(module):
    module.second = module.first
    del module.first


def replace_a_parameter_by_its_transpose(module):
    module.first.weight = nn.Parameter(module.first.weight.detach().t())


def swap_two_layers(module):
    module.first, module.norm = module.norm, module.first


def rename_a_buffer(module):
    """In the place that it had."""
    buffers = module.norm._buffers
    module.norm._buffers = {"mean" if name == "running_mean" else name: buffer for name, buffer in buffers.items()}


def read_the_memory_as_another_dtype(module):
    module.norm.num_batches_tracked.data = module.norm.num_batches_tracked.data.view(torch.float64)


@pytest.mark.parametrize(
    "change",
    [
        replace_a_parameter,
        replace_the_data,
        transpose_the_data_in_place,
        shorten_the_data_in_place,
        replace_a_buffer,
        add_a_parameter,
        remove_a_parameter,
        rename_a_layer,
        replace_a_parameter_by_its_transpose,
        swap_two_layers,
        rename_a_buffer,
        read_the_memory_as_another_dtype,
    ],
)
def test_a_changed_module_does_not_match(change):
    module = Small()
    _, found = fingerprint(module)
    change(module)
    assert found.match(module) is None


@pytest.mark.parametrize("part", ["weight", "layer"])
def test_what_is_tied_to_another_one_does_not_match(part):
    """The same tensors are there, in the same order."""
    module = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))

    def tie(to):
        if part == "weight":
            module[2].weight = module[to].weight
        else:
            module[2] = module[to]

    tie(0)
    _, found = fingerprint(module)
    assert found.match(module) is not None
    tie(1)
    assert found.match(module) is None
    tie(0)
    assert found.match(module) is not None


def test_there_is_none_where_a_weight_is_left_out_because_it_equals_another():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(3, 3)), peft.LoraConfig(target_modules=["0"]))
    model.base_model.model.embed_tokens = nn.Embedding(4, 3)
    model.base_model.model.lm_head = nn.Linear(3, 4, bias=False)
    served = ["0.weight", "0.bias", "embed_tokens.weight", "lm_head.weight"]
    assert fingerprint(model, expected=served)[1] is not None
    weights, found = fingerprint(model, expected=served[:-1])
    assert "lm_head.weight" in weights.extra and found is None


def test_other_memory_at_the_same_address_does_not_match():
    """As where the trainer's memory was freed, and what it has taken since lies in its place: workers may map the old one."""
    memory, module = bytearray(48), Small()
    module.first.weight.data = torch.frombuffer(memory, dtype=torch.float32).view(4, 3)
    _, found = fingerprint(module)
    assert found.match(module) is not None
    address = module.first.weight.data_ptr()
    module.first.weight.data = torch.frombuffer(memory, dtype=torch.float32).view(4, 3)
    assert module.first.weight.data_ptr() == address and found.match(module) is None


def test_buffers_that_are_not_persistent_may_change():
    module = Small()
    _, found = fingerprint(module)
    module.scratch = torch.ones(5)
    assert found.match(module) is not None


def test_another_module_does_not_match():
    module = Small()
    _, found = fingerprint(module)
    assert found.match(Small()) is None
    twin = Small()
    twin.first, twin.norm = module.first, module.norm
    assert found.match(twin) is None, "the same tensors may mean something else in it"


def test_a_new_name_alone_is_a_change():
    module = nn.Sequential()
    module.add_module("old", nn.Linear(2, 2))
    _, found = fingerprint(module)
    assert found.match(module) is not None
    module._modules["new"] = module._modules.pop("old")
    assert found.match(module) is None


def test_a_function_that_returns_other_names_is_a_change():
    module, names = nn.Sequential(nn.Linear(2, 2)), {}

    def rename(name):
        return names.get(name, name)

    _, found = fingerprint(module, rename=rename)
    assert found.match(module, rename) is not None
    names["0.weight"] = None
    assert found.match(module, rename) is None


def test_tied_weights_keep_their_names_and_aliases():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    weights, found = fingerprint(module)
    again = found.match(module).weights
    assert again.aliases == weights.aliases == {"1.weight": "0.weight"}
    _, both = fingerprint(module, expected=["0.weight", "1.weight"])
    assert [name for name, _ in both.match(module).weights.items] == ["0.weight", "1.weight"]


def test_parts_of_a_tensor_are_views_of_its_current_memory():
    module = nn.Sequential(nn.Linear(2, 6, bias=False))
    full = module[0].weight
    weights = NamedWeights([(f"part{i}", full.detach().as_strided((3, 2), (2, 1), 6 * i)) for i in range(2)])
    again = Fingerprint.of(module, weights).match(module).weights
    with torch.no_grad():
        full.copy_(torch.arange(12.0).view(6, 2))
    assert torch.equal(torch.cat([item for _, item in again.items]), full.detach())


LAZY = LazyTensor(torch.Size([4, 3]), torch.float32, torch.device("cpu"), lambda: torch.ones(4, 3), False, 0)


@pytest.mark.parametrize("first", [
    torch.zeros(4, 3),  # a tensor from elsewhere, as a state dict hook may return it
    LAZY,
], ids=["not of the module", "lazy"])  # fmt: skip
def test_weights_that_are_not_the_modules_tensors_have_no_fingerprint(first):
    module = Small()
    [_, *others] = NamedWeights.of(module).items
    assert Fingerprint.of(module, NamedWeights([("first.weight", first), *others])) is None


def test_there_is_none_of_a_state_dict_a_generator_or_weights_that_leave_some_out():
    module = Small()
    state = module.state_dict()
    assert Fingerprint.of(state, NamedWeights.of(state)) is None
    assert Fingerprint.of(module, NamedWeights.of(iter(state.items()))) is None
    assert fingerprint(module, rename={"first.bias": None})[1] is None, "which ones are sent may depend on settings"


def test_items_are_made_when_somebody_asks_and_only_once():
    module = Small()
    weights, found = fingerprint(module)
    again = found.match(module)
    assert again.weights.items is again.items and len(again.items) == len(weights.items)
    assert again.items.tensor_of("first.bias") is module.first.bias and not again.items.are_made
    assert again.items[0][1] is module.first.weight and not again.items.are_made, "one is made by itself"
    assert list(again.items)[0][1] is module.first.weight and again.items.are_made
    assert [name for name, _ in again.items[1:]] == [name for name, _ in weights.items[1:]]
    assert all(a is b for a, b in zip(again.items, again.items))


def test_a_view_of_a_parameter_with_an_offset_of_its_own_is_found_again():
    module = nn.Linear(2, 6, bias=False)
    module.weight = nn.Parameter(torch.arange(16.0)[4:].view(6, 2))
    weights = NamedWeights([(f"part{i}", module.weight.detach()[3 * i : 3 * i + 3]) for i in range(2)])
    again = Fingerprint.of(module, weights).match(module)
    assert [(name, item.data_ptr()) for name, item in again.items] == [(n, t.data_ptr()) for n, t in weights.items]


def sharded(rank):
    """Under FSDP2 a forward may leave unsharded parameters in the module; its fingerprint is of the shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=False)
    weights, found = fingerprint(model)
    with torch.no_grad():
        model(torch.ones(1, 4))
    unsharded = type(model[0].weight).__name__
    again = found.match(model).weights
    is_same = all(a is b for (_, a), (_, b) in zip(again.items, weights.items, strict=True))
    model.to(torch.bfloat16)  # which swaps what is in DTensors, as `to("cpu")` does
    return unsharded, is_same, found.match(model)


def test_a_sharded_module_matches_after_a_forward_and_can_be_converted():
    assert run_ranks(sharded, 2) == [("Parameter", True, None)] * 2


# --- computed weights ----------------------------------------------------------------------------------------------------


def adapted():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    model = peft.get_peft_model(Small(), config)
    model.add_adapter("other", config)
    return model


def merged(model):
    with torch.no_grad():
        return {name: tensor for name, tensor in copy.deepcopy(model).merge_and_unload().state_dict().items()}


def described(items):
    return [(name, type(item), tuple(item.shape), item.dtype) for name, item in items]


def test_a_peft_model_matches_and_its_weights_are_computed_from_current_values():
    model = adapted()
    weights, found = fingerprint(model)
    layer = model.base_model.model.first
    for change in (lambda: None, lambda: layer.lora_B["default"].weight.mul_(3), lambda: layer.scale_layer(2.0)):
        with torch.no_grad():
            change()
            layer.base_layer.weight.add_(1)
        again = found.match(model)
        assert again is not None and described(again.items) == described(weights.items)
        expected = merged(model)
        assert list(expected) == [name for name, _ in again.items]
        for name, item in again.items:
            torch.testing.assert_close(full_tensor(item), expected[name])
        alone = full_tensor(again.items.computed("first.weight"))
        assert torch.equal(alone, full_tensor(dict(again.items)["first.weight"]))
    assert not torch.equal(alone, layer.base_layer.weight)


def test_what_recognises_a_peft_model_keeps_nothing_of_it():
    model = adapted()
    weights, found = fingerprint(model)
    again = found.match(model)
    full_tensor(again.items.computed("first.weight"))
    references = [weakref.ref(one) for one in (*model.parameters(), *model.modules())]
    del model, weights, again
    gc.collect()
    assert not any(reference() is not None for reference in references) and found.module() is None


@pytest.mark.parametrize("make", [Small, adapted])
def test_a_module_whose_parameters_torch_swaps_can_be_converted(monkeypatch, make):
    """Torch refuses to swap what anybody refers to weakly."""
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    model = make()
    _, found = fingerprint(model)
    kept = found.match(model)
    list(kept.items)
    model.to(torch.bfloat16)
    assert found.match(model) is None
    assert all(item.dtype == torch.bfloat16 for name, item in fingerprint(model)[0].items if "num_batches" not in name)


def replace_a_factor(model):
    layer = model.base_model.model.first.lora_A["default"]
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def replace_a_base(model):
    layer = model.base_model.model.first.base_layer
    layer.weight = nn.Parameter(layer.weight.detach().clone())


@pytest.mark.parametrize("change", [
    lambda model: model.set_adapter("other"),
    lambda model: model.base_model.set_adapter(["default", "other"]),
    lambda model: model.merge_adapter(),
    lambda model: model.base_model.disable_adapter_layers(),
    lambda model: model.delete_adapter("other"),
    lambda model: model.add_adapter("third", peft.LoraConfig(r=3, target_modules=["first"])),
    replace_a_factor,
    replace_a_base,
], ids=["another", "both", "merged", "disabled", "deleted", "added", "factor", "base"])  # fmt: skip
def test_a_peft_model_of_which_other_weights_would_be_sent_does_not_match(change):
    model = adapted()
    _, found = fingerprint(model)
    assert found.match(model) is not None
    change(model)
    assert found.match(model) is None
