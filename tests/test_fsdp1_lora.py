"""LoRA adapters of sharded trainers: of FSDP1 served beside the base model, not merged; of all kinds with servers of one rank."""

import copy
import sys
import time
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from test_engine_parts import Http, Sync
from test_zero3 import Zero3Double, zero3_double
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tpcolocate.agreement import RankGroup
from tpcolocate.engine.adapters import LoraAdapters
from tpcolocate.engine.client import Client
from tpcolocate.engine.context import OwnedServer, ServerLink, SliceContext
from tpcolocate.errors import ConfigError
from tpcolocate.groups import Host, Member
from tpcolocate.processes import this_process
from tpcolocate.server.api import ServerApi
from tpcolocate.server.lifecycle import Lifecycle, State
from tpcolocate.weights.lora import adapter_of, check_adapter
from tpcolocate.weights.sources.lazy_tensor import full_tensor
from tpcolocate.weights.sources.named_weights import NamedWeights

pytestmark = pytest.mark.timeout(180)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.o_proj, self.norm = nn.Linear(5, 7, bias=False), nn.LayerNorm(5)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(5, 3)


def adapted():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["o_proj"], init_lora_weights=False)
    return peft.get_peft_model(Model(), config)


def by_fsdp1(model, use_orig_params):
    if not use_orig_params:
        model.requires_grad_(True)  # FSDP1 wants them alike
    return FSDP(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Layer}),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


def by_fsdp2(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def case(use_orig_params):
    plain = adapted()
    model = by_fsdp1(copy.deepcopy(plain), use_orig_params)
    adapter = check_adapter(adapter_of(model, None), None).gathered(keep=True)
    expected = peft.get_peft_model_state_dict(plain)
    served = sorted(adapter) == sorted(expected) and all(torch.equal(adapter[n], t) for n, t in expected.items())
    try:
        NamedWeights.of(model)
        refusal = None
    except ConfigError as error:
        refusal = error.message
    plain.base_model.disable_adapter_layers()
    model.module.base_model.disable_adapter_layers()
    base = {name: full_tensor(item) for name, item in NamedWeights.of(model)}
    expected = Model.state_dict(plain.get_base_model())
    expected = {n.replace(".base_layer", ""): t for n, t in expected.items() if "lora_" not in n}
    return served, refusal, sorted(base) == sorted(expected) and all(torch.equal(base[n], expected[n]) for n in base)


def served_by_one_rank(rank, model):
    """Each rank has a server, here a stand-in; what they have in common is the group that the trainer is sharded among."""
    lifecycle, http = Lifecycle(State()), Http(enable_lora=True)
    owned = OwnedServer.of(SimpleNamespace(), ServerApi(http), lifecycle)
    group = RankGroup([Member(rank, 1, 1, Host.here(), 1, 0)], rank=rank, group=None, timeout_s=20)
    link = ServerLink(Client("http://somewhere"), Sync(owned), owned, "0.5.21", lambda: None)
    adapters = LoraAdapters(SliceContext(group, None, rank, lifecycle, link))
    good = {"name": "policy", "model": model, "adapter_name": None, "timeout_s": 10}
    cases = [(1, {"name": ""}), (0, {"adapter_name": "other"}), (1, {"timeout_s": -1})]
    found = []
    for bad_rank, changes in cases:
        began = time.monotonic()
        try:
            adapters.load_from(**{**good, **(changes if rank == bad_rank else {})})
        except ConfigError as error:
            found.append((error.rank, error.message, time.monotonic() - began < 10))
    adapters.load_from(**good)
    return found, http.paths


def counts_twice(rank):
    """Whether a slice's rank warns of an adapter that is served and merged; of its factors B, rank 1 has nothing but zeros."""
    lifecycle, http = Lifecycle(State()), Http(enable_lora=True)
    owned = OwnedServer.of(SimpleNamespace(), ServerApi(http), lifecycle) if rank == 0 else None
    own = Member(rank, 2, 2, Host.here(), *this_process())
    dist.all_gather_object(members := [own, own], own)
    group = RankGroup(members, rank=rank, group=dist.group.WORLD, timeout_s=20)
    link = ServerLink(Client("http://somewhere"), Sync(owned), owned, "0.5.21", lambda: None)
    adapters = LoraAdapters(SliceContext(group, None, 0, lifecycle, link))
    model = by_fsdp2(adapted())
    for name, parameter in model.named_parameters():
        if "lora_B" in name and rank == 1:
            parameter.to_local().detach().zero_()
    adapters.load_from("policy", model, None, timeout_s=10)
    return [adapters.note_synced(source, partial=False) is not None for source in (model, {})]


def all_cases(rank):
    sys.modules["deepspeed"] = zero3_double()
    models = [by_fsdp2(adapted()), by_fsdp1(adapted(), True), by_fsdp1(adapted(), False), Zero3Double(adapted())]
    return [case(True), case(False), [served_by_one_rank(rank, model) for model in models], counts_twice(rank)]


@pytest.fixture(scope="module")
def found():
    return run_ranks(all_cases, 2)


def test_an_adapter_is_served_but_not_merged(found):
    refusal = "LoRA adapters of a trainer that FSDP1 or DeepSpeed ZeRO-3 shards are not merged"
    assert [of_rank[:2] for of_rank in found] == [[(True, refusal, True)] * 2] * 2


def test_a_rank_that_has_only_zeros_of_an_adapter_warns_as_the_others_do(found):
    assert [of_rank[3] for of_rank in found] == [[True, False]] * 2


@pytest.mark.parametrize("number", range(4), ids=["FSDP2", "FSDP1", "FSDP1 flat", "ZeRO-3"])
def test_a_rank_with_a_server_of_its_own_that_cannot_set_a_sharded_adapter_is_an_error_on_all(found, number):
    """They waited in the gather, to its deadline."""
    (first, asked), other = found[0][2][number], found[1][2][number]
    assert (first, asked) == other and asked == ["unload_lora_adapter", "load_lora_adapter_from_tensors"]
    assert [(rank, is_soon) for rank, _, is_soon in first] == [(1, True), (0, True), (1, True)]
    words = ["needs a name", "no adapter named 'other'", "timeout_s must be"]
    assert all(word in message for word, (_, message, _) in zip(words, first, strict=True)), first
