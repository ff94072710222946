"""Sharded weights that are cut or merged when they are read: all ranks gather the same, in the same order, once."""

import copy

import pytest
import torch
from harness import run_ranks
from test_conversion import checkpoint, load
from test_merging import adapted, lora, same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tpcolocate.weights.sources.lazy_tensor import LazyTensor, full_bytes, full_tensor
from tpcolocate.weights.sources.named_weights import Weights

pytestmark = pytest.mark.timeout(300)


def experts(folder):
    model = load(folder)
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    weights = Weights(model, expected=checkpoint(folder))
    gathers, full = 0, DTensor.full_tensor

    def counted(self):
        nonlocal gathers
        gathers += 1
        return full(self)

    DTensor.full_tensor = counted
    try:
        found = {name: full_tensor(item).clone() for name, item in weights}
    finally:
        DTensor.full_tensor = full
    saved = checkpoint(folder)
    experts = [item for name, item in weights if ".experts." in name]
    return {
        "equal": sorted(found) == sorted(saved) and all(torch.equal(found[name], saved[name]) for name in saved),
        "gathers": gathers == len(model.state_dict()),
        "bytes": weights.reading_bytes == max(full_bytes(tensor) for tensor in model.state_dict().values()),
        "derived": all(isinstance(item, LazyTensor) and item.is_collective for item in experts),
        "sharded": weights.is_sharded,
    }


def adapters():
    model = adapted(
        lora(target_modules=["q", "o", "embed"], target_parameters=["experts.up"], modules_to_save=["head"])
    )
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.base_model.model.inner["q"].lora_A["default"], model.base_model.model.inner["q"]):
        fully_shard(layer, mesh=mesh)  # layers of their own, as auto-wrapping makes them
    fully_shard(model, mesh=mesh)
    weights = Weights(model)
    collective = sorted(name for name, item in weights if isinstance(item, LazyTensor) and item.is_collective)
    same({name: full_tensor(item) for name, item in weights}, expected)
    return collective, weights.reading_bytes > 3 * 4 * 5 * 4


def both(rank, folder):
    return experts(folder), adapters()


@pytest.fixture(scope="module")
def found(tiny_model_dir):
    return run_ranks(both, 2, tiny_model_dir(family="qwen3_moe"), timeout_s=240)


def test_fused_experts_are_gathered_once_a_tensor_and_not_once_an_expert(found):
    seen = dict.fromkeys(["equal", "gathers", "bytes", "derived", "sharded"], True)
    assert [of_rank[0] for of_rank in found] == [seen] * 2


def test_adapters_are_merged_from_full_factors(found):
    derived = ["embed.weight", "experts.up", "inner.o.weight", "inner.q.weight"]
    assert [of_rank[1] for of_rank in found] == [(derived, True)] * 2
