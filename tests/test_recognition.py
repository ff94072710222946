"""Whether a module is recognised from one sync to the next, and what must not be taken for the same."""

import gc

import pytest
import torch
from torch import nn

from tpcolocate.weights.sources.fingerprint import Fingerprint
from tpcolocate.weights.sources.named_weights import Weights

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def remembered(module, **options):
    weights = Weights(module, **options)
    return weights, Fingerprint.of(module, weights)


def test_the_same_module_gives_the_same_weights_without_its_memory_being_kept():
    module = Small()
    weights, found = remembered(module)
    again = found.recognise(module)
    assert [name for name, _ in again.known] == [name for name, _ in weights.known]
    assert all(a is b for (_, a), (_, b) in zip(again.known, weights.known))
    with torch.no_grad():
        module.first.weight.add_(1)  # a step in place
    assert found.recognise(module) is not None
    storage = torch.multiprocessing.reductions.StorageWeakRef(module.first.weight.untyped_storage())
    del module, weights, again
    gc.collect()
    assert storage.expired(), "what is remembered keeps no weights alive"


def replace_a_parameter(module):
    module.first.weight = nn.Parameter(module.first.weight.detach().clone())


def move_the_data(module):
    module.first.weight.data = module.first.weight.data.clone()


def replace_a_buffer(module):
    module.norm.running_mean = module.norm.running_mean.clone()


def add_a_parameter(module):
    module.extra = nn.Parameter(torch.zeros(1))


def take_one_away(module):
    module.first.bias = None


def rename_a_layer(module):
    module.second = module.first
    del module.first


def see_the_same_memory_otherwise(module):
    module.first.weight = nn.Parameter(module.first.weight.detach().t())


def swap_two_names(module):
    module.first, module.norm = module.norm, module.first


@pytest.mark.parametrize(
    "change",
    [
        replace_a_parameter,
        move_the_data,
        replace_a_buffer,
        add_a_parameter,
        take_one_away,
        rename_a_layer,
        see_the_same_memory_otherwise,
        swap_two_names,
    ],
)
def test_a_module_that_has_changed_is_read_anew(change):
    module = Small()
    _, found = remembered(module)
    change(module)
    assert found.recognise(module) is None


def test_scratch_buffers_may_change():
    module = Small()
    _, found = remembered(module)
    module.scratch = torch.ones(5)
    assert found.recognise(module) is not None


def test_another_module_is_not_taken_for_the_same():
    module = Small()
    _, found = remembered(module)
    assert found.recognise(Small()) is None
    twin = Small()
    twin.first, twin.norm = module.first, module.norm
    assert found.recognise(twin) is None, "the same tensors may mean something else in it"


def test_a_new_name_alone_is_a_change():
    module = nn.Sequential()
    module.add_module("old", nn.Linear(2, 2))
    _, found = remembered(module)
    assert found.recognise(module) is not None
    module._modules["new"] = module._modules.pop("old")
    assert found.recognise(module) is None


def test_tied_weights_keep_their_names_and_aliases():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    weights, found = remembered(module)
    again = found.recognise(module)
    assert again.aliases == weights.aliases == {"1.weight": "0.weight"}
    _, both = remembered(module, expected=["0.weight", "1.weight"])
    assert [name for name, _ in both.recognise(module).known] == ["0.weight", "1.weight"]


def test_parts_of_a_tensor_are_views_of_where_it_lies_now():
    module = nn.Sequential(nn.Linear(2, 6, bias=False))
    weights = Weights(module)
    whole = module[0].weight
    weights.known = [(f"part{i}", whole.detach().as_strided((3, 2), (2, 1), 6 * i)) for i in range(2)]
    again = Fingerprint.of(module, weights).recognise(module)
    with torch.no_grad():
        whole.copy_(torch.arange(12.0).view(6, 2))
    assert torch.equal(torch.cat([item for _, item in again.known]), whole.detach())


def test_what_is_no_module_or_not_sent_in_full_is_not_remembered():
    module = Small()
    state = module.state_dict()
    assert Fingerprint.of(state, Weights(state)) is None
    assert Fingerprint.of(module, Weights(module, rename={"first.bias": None})) is None, (
        "which ones are sent may hang on more than tensors"
    )
    weights = Weights(module)
    weights.known[0] = ("first.weight", torch.zeros(4, 3))
    assert Fingerprint.of(module, weights) is None, "a tensor from elsewhere, as a hook may give it"
