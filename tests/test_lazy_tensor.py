"""Reading the items of a source: plain tensors, DTensors of every kind, lazy tensors, and parts of a shared gather."""

import pytest
import torch
from harness import run_ranks
from torch import nn

from tpcolocate.weights.sources.lazy_tensor import (
    LazyTensor,
    SharedGather,
    full_bytes,
    full_tensor,
    is_collective,
    reading_bytes,
)
from tpcolocate.weights.sources.named_weights import NamedWeights

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]


def lazy(make, **changes):
    fields = {"shape": torch.Size([2]), "dtype": torch.float32, "device": torch.device("cpu")}
    return LazyTensor(**{**fields, "make": make, "is_collective": False, "extra_bytes": 12, **changes})


def test_a_plain_tensor_is_returned_detached():
    parameter = nn.Parameter(torch.ones(2))
    full = full_tensor(parameter)
    assert full.data_ptr() == parameter.data_ptr() and not full.requires_grad
    assert reading_bytes(parameter) == 0 and not is_collective(parameter) and full_bytes(parameter) == 8


def test_a_lazy_tensor_is_computed_at_each_read_without_a_graph():
    parameter = nn.Parameter(torch.ones(2))
    item = lazy(lambda: parameter * 2)
    with torch.no_grad():
        parameter.fill_(3)
    assert full_tensor(item).tolist() == [6, 6] and not full_tensor(item).requires_grad
    assert reading_bytes(item) == 12 + 8 and full_bytes(item) == 8 and not is_collective(item)


@pytest.mark.parametrize("declared", [{"shape": torch.Size([3])}, {"dtype": torch.bfloat16}], ids=["shape", "dtype"])
def test_a_lazy_tensor_must_have_its_declared_shape_and_dtype(declared):
    with pytest.raises(AssertionError, match="expected LazyTensor"):
        lazy(lambda: torch.ones(2), **declared).materialize()


@pytest.mark.parametrize("full", [
    torch.arange(24.0).view(2, 4, 3),
    torch.arange(30.0)[6:].view(2, 4, 3),  # not at the start of its memory
    torch.arange(24.0).view(2, 3, 4).transpose(1, 2),  # not contiguous
], ids=["plain", "offset", "transposed"])  # fmt: skip
def test_a_part_of_a_plain_tensor_is_a_view_of_it(full):
    part = SharedGather(full).part(torch.Size([2, 3]), full.stride()[1:], full.stride(0) + 2 * full.stride(1))
    assert torch.equal(part, full[1, 2:])
    assert part.untyped_storage().data_ptr() == full.untyped_storage().data_ptr()


def test_a_shared_gather_reads_once_for_all_parts_and_drops_the_tensor_after_the_last():
    reads = []

    def make():
        reads.append(torch.arange(6.0).view(3, 2))
        return reads[-1]

    gather = SharedGather(lazy(make, shape=torch.Size([3, 2])))
    parts = [gather.part(torch.Size([2]), (1,), 2 * i) for i in range(3)]
    assert [part.shape for part in parts] == [(2,)] * 3 and reads == []
    for number_of_reads in (1, 2):  # reading all of them again gathers again
        assert [full_tensor(part).tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
        assert len(reads) == number_of_reads and gather._full is None
    full_tensor(parts[1])
    full_tensor(parts[1])  # never the value of an earlier read
    assert len(reads) == 4
    # 24 bytes of the full tensor, which include the part, and 12 to make it
    assert reading_bytes(parts[0]) == 24 + 12


def read(model):
    with torch.no_grad():
        return {name: full_tensor(item) for name, item in NamedWeights.of(model)}


def equal(found, expected):
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


class Odd(nn.Module):
    """Tied, and with hardly a dimension that three ranks divide evenly."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.gate = nn.Linear(4, 2)  # the third rank's shard is empty
        self.norm = nn.LayerNorm(4)
        self.experts = nn.Parameter(torch.randn(5, 4, 4))
        self.scale = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.norm(self.embed(ids)) * self.scale.sum()
        return self.head(x @ self.experts.sum(0) + self.gate(x).sum(-1, keepdim=True))


def uneven(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    def build(**how):
        torch.manual_seed(0)
        model = Odd()
        for parameter in model.gate.parameters():
            parameter.requires_grad_(False)
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        del expected["head.weight"]
        return fully_shard(model, mesh=init_device_mesh("cpu", (3,)), **how), expected

    found = {}
    model, expected = build()
    found["plain"] = equal(read(model), expected)
    found["empty"] = model.gate.weight.to_local().numel() == 0
    weights = NamedWeights.of(model.state_dict(), expected=expected)
    found["tied"] = sorted(weights.aliases), [name for name, _ in weights] == list(expected)
    model, expected = build(offload_policy=CPUOffloadPolicy(pin_memory=False))
    found["offload"] = equal(read(model), expected)
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, expected = build(mp_policy=mixed, reshard_after_forward=False)
    with torch.no_grad():
        model(torch.tensor([1, 2]))
    found["unsharded"] = type(model.scale).__name__, model.scale.dtype == torch.bfloat16
    weights = read(model)
    found["mixed"] = equal(weights, expected), {tensor.dtype for tensor in weights.values()} == {torch.float32}
    found["bytes"] = NamedWeights.of(model).reading_bytes
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False))
    model[1].weight = model[0].weight
    # A state dict has tied weights as two tensors, and those of the third rank have no address.
    weights = NamedWeights.of(
        fully_shard(model, mesh=init_device_mesh("cpu", (3,))).state_dict(), expected=["0.weight"]
    )
    found["tied and empty"] = [name for name, _ in weights], weights.aliases
    return found


def test_uneven_frozen_tied_offloaded_and_mixed_precision_shards_are_gathered():
    found = run_ranks(uneven, 3)
    for rank, of_rank in enumerate(found):
        assert of_rank == {
            "plain": True,
            "empty": rank == 2,
            "tied": (["head.weight"], True),
            "offload": True,
            # right after a forward the module has parameters in the compute dtype
            "unsharded": ("Parameter", True),
            "mixed": (True, True),
            "bytes": 5 * 4 * 4 * 4,
            "tied and empty": (["0.weight"], {"1.weight": "0.weight"}),
        }


def meshes(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 7), nn.LayerNorm(7))
        return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}

    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    found = {}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, expected = build()
    found["tp"] = equal(read(parallelize_module(model, mesh["tp"], plan)), expected)
    model, expected = build()
    found["hsdp"] = equal(read(fully_shard(model, mesh=mesh)), expected)
    model, expected = build()
    model = fully_shard(parallelize_module(model, mesh["tp"], plan), mesh=mesh["dp"])
    found["fsdp and tp"] = equal(read(model), expected)
    found["placements"] = str(model[0].weight.placements), str(model[2].weight.placements)
    return found


def test_weights_in_meshes_of_one_and_two_dimensions_are_gathered():
    found = run_ranks(meshes, 4)
    assert found == [found[0]] * 4
    placements = found[0].pop("placements")
    assert found[0] == {"tp": True, "hsdp": True, "fsdp and tp": True}
    assert "_StridedShard" in placements[0] and "Shard(dim=1)" in placements[1], "sharded twice, and mixed"
