"""Sharded experts and merged adapters: all ranks make the same gathers in the same order, as few as there can be."""

import copy

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from test_coalesced_gather import Counted
from test_hf_names import checkpoint, load
from test_peft_merge import CONV, EVERY, LAZY, adapted, add_by_torch, computed, lora, narrowed, same, wide
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tpcolocate.in_server.tpcolocate_receiver.regions import Region
from tpcolocate.weights.plan.sharding import ShardFinder
from tpcolocate.weights.sources import low_rank
from tpcolocate.weights.sources.lazy_tensor import LazyTensor, full_bytes, full_tensor
from tpcolocate.weights.sources.named_weights import NamedWeights

pytestmark = pytest.mark.timeout(300)


def experts(folder):
    model = load(folder)
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    weights = NamedWeights.of(model, expected=checkpoint(folder))
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
        "lazy": all(isinstance(item, LazyTensor) and item.is_collective for item in experts),
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
    weights = NamedWeights.of(model)
    collective = sorted(name for name, item in weights if isinstance(item, LazyTensor) and item.is_collective)
    same({name: full_tensor(item) for name, item in weights}, expected)
    return collective, weights.reading_bytes > 3 * 4 * 5 * 4


def both(rank, folder):
    return experts(folder), adapters()


@pytest.fixture(scope="module")
def found(tiny_model_dir):
    return run_ranks(both, 2, tiny_model_dir(family="qwen3_moe"), timeout_s=240)


def test_fused_experts_are_gathered_once_per_tensor_not_once_per_expert(found):
    seen = dict.fromkeys(["equal", "gathers", "bytes", "lazy", "sharded"], True)
    assert [of_rank[0] for of_rank in found] == [seen] * 2


def test_sharded_adapters_are_merged_from_gathered_factors(found):
    lazy = ["embed.weight", "experts.up", "inner.o.weight", "inner.q.weight"]
    assert [of_rank[1] for of_rank in found] == [(lazy, True)] * 2


def halves(region):
    """Cut a region in two along every dimension."""
    found = [region]
    for dim in range(len(region.starts)):
        cut = []
        for part in found:
            middle = part.lengths[dim] // 2
            for start, length in ((0, middle), (middle, part.lengths[dim] - middle)):
                starts, lengths = list(part.starts), list(part.lengths)
                starts[dim] += start
                lengths[dim] = length
                cut.append(Region(tuple(starts), tuple(lengths)))
        found = cut
    return [part for part in found if part.volume]


def assembled(items):
    """Return every tensor put together from what each rank computes of its own shard, once whole and once in parts."""
    found = {}
    for name, item in items.items():
        shard = ShardFinder().find(item)
        assert shard.local.numel() == 0 and shard.region.lengths != tuple(item.shape)
        mine = [(region, shard.compute(region)) for region in (shard.region, *halves(shard.region)) if region.volume]
        of_ranks = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, mine)
        found[name] = [torch.full(item.shape, torch.nan, dtype=item.dtype) for _ in range(2)]
        for parts in of_ranks:
            for number, (region, part) in enumerate(parts):
                narrowed(found[name][number > 0], region).copy_(part)
    return found


def by_region(num_ranks, targets, **config):
    """Two adapters of different dtypes on every kind of layer, each layer and the rest sharded by itself."""
    mesh = init_device_mesh("cpu", (num_ranks,))
    model = wide(targets, base=torch.bfloat16, use_rslora=True, **config)
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    fully_shard(model.base_model.model.inner["q"], mesh=mesh)
    fully_shard(model, mesh=mesh)
    items = computed(model)
    used = {id(item.recipe.ingredients): item.recipe.ingredients for item in items.values()}
    [ingredients] = used.values()
    seen = {"names": sorted(items)}
    for sync in ("first", "second"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(1.5)
        expected = {name: full_tensor(item) for name, item in items.items()}
        with Counted() as calls:
            ingredients.gather()
        seen[sync] = list(calls)
        with Counted() as calls:
            found = assembled(items)
        seen[f"{sync}, then"] = list(calls)
        ingredients.forget()
        for name, of_name in found.items():
            base = full_tensor(items[name].recipe.base).float()
            # As in test_peft_merge: products may round differently by their shape.
            delta = (expected[name].float() - base).abs().max().item()
            close = {"rtol": 2 * torch.finfo(torch.bfloat16).eps, "atol": 3 * torch.finfo(torch.bfloat16).eps * delta}
            for tensor in of_name:
                torch.testing.assert_close(tensor, expected[name], **close)
            seen.setdefault("changed", {})[name] = delta > 1
    return seen


def offloaded():
    """A base on another device than its factors: the sum is where the base is."""
    model = wide()
    [item] = [item for name, item in computed(model).items() if name == "inner.q.weight"]
    region = Region((1, 0), (2, 4))
    found = item.recipe.compute(narrowed(item.recipe.base.detach(), region).to("meta"), region)
    return found.device.type, tuple(found.shape)


def every_region(rank, num_ranks):
    found = by_region(num_ranks, EVERY, saved=["head"]), by_region(num_ranks, CONV), offloaded()
    low_rank.adder_for = lambda device: add_by_torch  # as on a GPU; in this process alone
    return *found, by_region(num_ranks, EVERY), by_region(num_ranks, CONV)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_each_rank_computes_its_part_of_merged_weights_after_one_gather_for_each_dtype(num_ranks):
    results = run_ranks(every_region, num_ranks, num_ranks, timeout_s=240)
    for every, conv, offloaded, every_fast, conv_fast in results:
        both = ((every, LAZY), (every_fast, LAZY), (conv, ["conv.weight"]), (conv_fast, ["conv.weight"]))
        for seen, names in both:
            assert seen["names"] == sorted(names)
            calls = [(num_ranks, torch.float32), (num_ranks, torch.bfloat16)]
            assert seen["first"] == seen["second"] == calls
            assert seen["first, then"] == seen["second, then"] == [], "computing is local"
            assert all(seen["changed"].values())
        assert offloaded == ("meta", (2, 4))
