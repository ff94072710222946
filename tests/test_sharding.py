"""Local shards: what every rank has of a tensor, or of a part of one, put together again in every layout of a mesh."""

import pytest
import torch
from harness import run_ranks
from test_hf_names import FUSES
from torch import nn
from torch.distributed.tensor import DTensor

from tpcolocate.weights.plan.sharding import CachedShards, ShardFinder, layouts_of
from tpcolocate.weights.sources.fingerprint import Fingerprint
from tpcolocate.weights.sources.lazy_tensor import SharedGather, full_tensor, local_of, storage_id
from tpcolocate.weights.sources.named_weights import NamedWeights

pytestmark = [pytest.mark.quick, pytest.mark.timeout(300)]


# --- what ranks report, and what it must add up to ---------------------------------------------------------------------


def described(shards):
    """Name -> (regions of all ranks, this rank's position, its memory)."""
    return {name: (one.regions, one.position, one.local.clone()) for name, one in shards.items()}


def put_together(of_ranks, name, shape):
    """Return a tensor from the local shards of all ranks, and how many ranks have each element."""
    full, owners = torch.full(shape, float("nan")), torch.zeros(shape, dtype=torch.int64)
    for shards in of_ranks:
        regions, position, local = shards[name]
        region = regions[position]
        assert tuple(local.shape) == region.lengths and regions == of_ranks[0][name][0], name
        at = tuple(slice(start, start + length) for start, length in zip(region.starts, region.lengths))
        full[at] = local
        owners[at] += 1
    return full, owners


def is_whole(of_ranks, expected, *, num_owners=1):
    for name, tensor in expected.items():
        full, owners = put_together(of_ranks, name, tensor.shape)
        assert torch.equal(full, tensor) and (owners == num_owners).all(), name
    assert all(list(shards) == list(expected) for shards in of_ranks)
    return True


# --- experts -----------------------------------------------------------------------------------------------------------


def experts(num_experts):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=12,
        moe_intermediate_size=6,
        num_hidden_layers=5,
        mlp_only_layers=[1],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_experts=num_experts,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config)


def sharded_experts(rank, world, num_experts):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = experts(num_experts)
    expected = {name: tensor.clone() for name, tensor in NamedWeights.of(model)}
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    gathers, full, finder = 0, DTensor.full_tensor, ShardFinder()

    def counted(self):
        nonlocal gathers
        gathers += 1
        return full(self)

    DTensor.full_tensor = counted
    try:
        weights = NamedWeights.of(model, expected=expected)
        shards = finder.find_all(weights.items)
        one_by_one = {name: finder.find(item) for name, item in weights}
        fingerprint = Fingerprint.of(model, weights)
        again = fingerprint.match(model)
        cached = CachedShards(again.items.tensor_of, layouts_of(shards), lambda name: None)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().mul_(2)
        found = described({name: cached[name] for name in cached})
        no_gathers, not_made = gathers == 0, not again.items.are_made
    finally:
        DTensor.full_tensor = full
    fused = model.model.layers[0].mlp.experts.gate_up_proj
    seen = {
        "nothing is gathered": no_gathers,
        "nothing is named again": not_made,
        "in the storage of the fused tensor": all(
            shards[f"model.layers.0.mlp.experts.{e}.up_proj.weight"].local.untyped_storage()._cdata == storage_id(fused)
            for e in range(num_experts)
        ),
        "the same one by one": all(
            (one.regions, one.local.data_ptr(), one.local.stride())
            == (shards[name].regions, shards[name].local.data_ptr(), shards[name].local.stride())
            for name, one in one_by_one.items()
        ),
        "some are empty here": any(not one.local.numel() for name, one in shards.items() if ".experts." in name),
        # Gathered as a fallback, both when they were named and when they were recognised.
        "full": all(
            torch.equal(full_tensor(item), expected[name] * 2)
            for items in (weights.items, again.weights.items)
            for name, item in items
        ),
    }
    assert len(again.items) == len(weights.items) and again.items[0][0] == weights.items[0][0]
    return found, {name: tensor * 2 for name, tensor in expected.items()}, seen


@FUSES
@pytest.mark.parametrize(("world", "num_experts"), [(2, 4), (2, 5), (4, 5)])
def test_every_expert_is_a_part_of_the_shards_of_the_fused_tensor(world, num_experts):
    found = run_ranks(sharded_experts, world, world, num_experts, timeout_s=240)
    [(_, expected, seen), *_] = found
    assert is_whole([shards for shards, *_ in found], expected)
    assert set(seen.values()) == {True} and all(of_rank == seen for *_, of_rank in found), seen


# --- meshes ------------------------------------------------------------------------------------------------------------


def meshes(rank):
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.distributed.tensor.placement_types import _StridedShard

    finder, found = ShardFinder(), {}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    # 10 rows over two ranks of tensor parallelism, then 5 over two of FSDP2: 3 and 2.
    for rows in (8, 10):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, rows), nn.ReLU(), nn.Linear(rows, 6))
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        model = fully_shard(parallelize_module(model, mesh["tp"], plan), mesh=mesh["dp"])
        twice = {name: tensor for name, tensor in model.named_parameters() if "bias" not in name or name == "0.bias"}
        fused = SharedGather(twice["0.weight"])
        twice["upper rows"] = fused.part(torch.Size([3, 6]), (6, 1), 0)
        twice["a column"] = fused.part(torch.Size([rows - 1]), (6,), 6 + 2)
        weight = expected["0.weight"]
        expected |= {"upper rows": weight[:3], "a column": weight[1:, 2]}
        assert isinstance(twice["0.weight"].placements[0], _StridedShard)
        found[f"FSDP2 x TP, {rows} rows"] = (
            described(finder.find_all(list(twice.items()))),
            {name: expected[name] for name in twice},
            1,
        )
    full = torch.arange(60.0).view(6, 10)
    sharded = {
        "both along one": distribute_tensor(full, mesh, [Shard(0), Shard(0)]),
        "along both": distribute_tensor(full, mesh, [Shard(1), Shard(0)]),
    }
    found["two axes"] = described(finder.find_all(list(sharded.items()))), dict.fromkeys(sharded, full), 1
    sharded = {"first": [Replicate(), Shard(1)], "second": [Shard(0), Replicate()]}
    sharded = {name: distribute_tensor(full, mesh, placements) for name, placements in sharded.items()}
    found["replicas"] = described(finder.find_all(list(sharded.items()))), dict.fromkeys(sharded, full), 2
    # Without a group of all its ranks, or with shards that are no rectangles.
    small = DeviceMesh("cpu", [[0], [1]])
    line = init_device_mesh("cpu", (4,))
    unsupported = [distribute_tensor(full, mesh, [_StridedShard(0, split_factor=3), Shard(0)])]
    unsupported += [distribute_tensor(torch.arange(8.0), line, [_StridedShard(0, split_factor=2)])]
    if rank < 2:
        unsupported += [distribute_tensor(full, small, [Shard(0), Shard(1)])]
    return found, [None if finder.find(one) is None else (str(one.placements)) for one in unsupported]


def test_tensors_that_are_sharded_along_several_axes_are_put_together_from_all_ranks():
    of_ranks = run_ranks(meshes, 4, timeout_s=240)
    for case, (_, expected, num_owners) in of_ranks[0][0].items():
        assert is_whole([found[case][0] for found, _ in of_ranks], expected, num_owners=num_owners), case
    assert [unsupported for _, unsupported in of_ranks] == [[None] * 3] * 2 + [[None] * 2] * 2


# --- parts -------------------------------------------------------------------------------------------------------------


def parts(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    full = torch.arange(5 * 6 * 4.0).view(5, 6, 4)
    base = distribute_tensor(full, init_device_mesh("cpu", (2,)), [Shard(0)])
    gather = SharedGather(base)
    half = gather.part(torch.Size([5, 3, 4]), (24, 4, 1), 12)  # the lower rows of all matrices
    inner = SharedGather(half)
    items = {
        "half": half,
        "part of the part": inner.part(torch.Size([3, 4]), (4, 1), 12 * 3),
        "its columns": inner.part(torch.Size([1, 3, 2]), (12, 4, 1), 12 * 4 + 1),
    }
    expected = {"half": full[:, 3:], "part of the part": full[3, 3:], "its columns": full[4:, 3:, 1:3]}
    others = {
        "flat": gather.part(torch.Size([30, 4]), (4, 1), 0),
        "transposed": gather.part(torch.Size([4, 6]), (1, 4), 24),
        "every other": gather.part(torch.Size([3, 6, 4]), (48, 4, 1), 0),
        "scalar": gather.part(torch.Size([]), (), 7),
    }
    views = {"flat": full.view(30, 4), "transposed": full[1].t(), "every other": full[::2], "scalar": full.flatten()[7]}
    finder = ShardFinder()
    collapsed = all(item.part.base is base for item in items.values())
    # What cannot be found in shards is gathered.
    gathered = all(torch.equal(full_tensor(others[name]), view) for name, view in views.items())
    gathered &= all(torch.equal(full_tensor(items[name]), tensor) for name, tensor in expected.items())
    found = described(finder.find_all([*items.items(), *others.items()]))
    return found, expected, collapsed, gathered, local_of(base).numel()


def test_parts_of_parts_are_found_and_views_that_are_no_rectangles_are_gathered():
    of_ranks = run_ranks(parts, 2)
    assert is_whole([found for found, *_ in of_ranks], of_ranks[0][1])
    assert [rest for *_, collapsed, gathered, _ in of_ranks for rest in (collapsed, gathered)] == [True] * 4
