"""LoRA adapters of FSDP1 trainers: served beside the base model, not merged."""

import copy

import peft
import pytest
import torch
from harness import run_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tpcolocate.errors import ConfigError
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


def case(use_orig_params):
    plain = adapted()
    model = copy.deepcopy(plain)
    if not use_orig_params:
        model.requires_grad_(True)  # FSDP1 wants them alike
    model = FSDP(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Layer}),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
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


def both(rank):
    return [case(True), case(False)]


def test_an_adapter_is_served_but_not_merged():
    refusal = "LoRA adapters of a trainer that FSDP1 or DeepSpeed ZeRO-3 shards are not merged"
    assert run_ranks(both, 2) == [[(True, refusal, True)] * 2] * 2
