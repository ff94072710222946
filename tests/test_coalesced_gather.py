"""Small sharded tensors gathered together: what arrives, in how many collectives, and what is kept."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tpcolocate.weights.sources.coalesced_gather import CoalescedGather

pytestmark = pytest.mark.timeout(300)

SHAPES = [(16, 8), (8, 3), (2, 5), (5, 2), (1, 7), (7,), (6, 2, 3), (4, 0)]


def numbered(shape, start, dtype=torch.float32):
    return (torch.arange(torch.Size(shape).numel()) + start).reshape(shape).to(dtype)


class Counted:
    """Counts the collectives that a block makes."""

    def __enter__(self):
        self.calls = []
        self._real = dist.all_gather_into_tensor, DTensor.full_tensor
        coalesced, single = self._real

        def all_gather_into_tensor(out, sent, group):
            self.calls.append((group.size(), sent.dtype))
            return coalesced(out, sent, group=group)

        def full_tensor(tensor):
            self.calls.append("full_tensor")
            return single(tensor)

        dist.all_gather_into_tensor, DTensor.full_tensor = all_gather_into_tensor, full_tensor
        return self.calls

    def __exit__(self, *_):
        dist.all_gather_into_tensor, DTensor.full_tensor = self._real


def gathered(num_ranks):
    mesh = init_device_mesh("cpu", (num_ranks,))
    found = {}

    # Even, uneven and empty shards, of two dtypes, in turn.
    full = [numbered(shape, 1000 * i, (torch.float32, torch.bfloat16)[i % 2]) for i, shape in enumerate(SHAPES)]
    sharded = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in full]
    gather = CoalescedGather()
    numbers = [gather.add(tensor) for tensor in sharded]
    found["numbers"] = numbers == [gather.add(tensor) for tensor in sharded] == list(range(len(SHAPES)))
    with Counted() as calls:
        gather.gather()
    found["calls"] = calls
    found["equal"] = [torch.equal(gather.full(number), tensor) for number, tensor in zip(numbers, full)]

    # Later values, and nothing in between.
    before = gather.full(0)
    for tensor in sharded:
        tensor._local_tensor.mul_(2)
    found["as gathered"] = torch.equal(gather.full(0), full[0])
    gather.gather()
    found["anew"] = [torch.equal(gather.full(number), 2 * tensor) for number, tensor in zip(numbers, full)]
    found["kept by its reader"] = torch.equal(before, full[0])
    gather.forget()
    with pytest.raises(AssertionError, match="before gather"):
        gather.full(0)

    # Other layouts.
    columns = distribute_tensor(full[0], mesh, [Shard(1)])
    copies = distribute_tensor(full[2], mesh, [Replicate()])
    summed = DTensor.from_local(full[0] / num_ranks, mesh, [Partial()])
    plain = torch.nn.Parameter(full[6].clone())
    mixed = [columns, sharded[1], copies, plain, summed]
    gather = CoalescedGather()
    for tensor in mixed:
        gather.add(tensor)
    with Counted() as calls:
        gather.gather()
    found["mixed calls"] = calls
    expected = [full[0], 2 * full[1], full[2], full[6], full[0]]
    found["mixed"] = [torch.equal(gather.full(i), tensor) for i, tensor in enumerate(expected)]
    found["bytes"] = gather.num_bytes
    return found


def over_two_axes():
    """HSDP, and two meshes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    other = init_device_mesh("cpu", (4,))
    full = [numbered(shape, 1000 * i) for i, shape in enumerate(SHAPES)]
    gather = CoalescedGather()
    placed = []
    for i, tensor in enumerate(full):
        on = (other, [Shard(0)]) if i % 2 else (mesh, [Replicate(), Shard(0)])
        placed.append(distribute_tensor(tensor, *on))
        gather.add(placed[-1])
    twice = distribute_tensor(full[0], mesh, [Shard(0), Shard(0)])
    gather.add(twice)
    with Counted() as calls:
        gather.gather()
    return calls, all(torch.equal(gather.full(i), tensor) for i, tensor in enumerate([*full, full[0]]))


def in_ranks(rank, num_ranks):
    return gathered(num_ranks), over_two_axes() if num_ranks == 4 else None


@pytest.fixture(scope="module", params=[2, 4])
def found(request):
    return request.param, run_ranks(in_ranks, request.param, request.param, timeout_s=240)


def test_shards_of_all_sizes_are_gathered_by_one_collective_for_each_dtype(found):
    num_ranks, results = found
    for seen, _ in results:
        assert seen["calls"] == [(num_ranks, torch.float32), (num_ranks, torch.bfloat16)]
        assert seen["equal"] == [True] * len(SHAPES) and seen["numbers"]


def test_a_gather_brings_the_values_of_its_time(found):
    for seen, _ in found[1]:
        assert seen["as gathered"] and seen["kept by its reader"]
        assert seen["anew"] == [True] * len(SHAPES)


def test_other_layouts_are_gathered_each_by_itself_and_what_is_whole_not_at_all(found):
    num_ranks, results = found
    for seen, _ in results:
        assert seen["mixed calls"] == [(num_ranks, torch.bfloat16), "full_tensor", "full_tensor"]
        assert seen["mixed"] == [True] * 5
        # Twice the batch and what this rank sends of it; then the two others.
        batch = 2 * 3 * 8
        assert seen["bytes"] == 2 * batch + batch // num_ranks + 2 * 4 * 16 * 8


def test_each_mesh_has_its_own_collective(found):
    if found[0] == 4:
        for _, (calls, equal) in found[1]:
            assert calls == [(2, torch.float32), (4, torch.float32), "full_tensor"] and equal


@pytest.mark.quick
def test_tensors_in_memory_are_read_as_they_are_and_not_kept_alive():
    gather = CoalescedGather()
    tensor = torch.nn.Parameter(torch.ones(3))
    number = gather.add(tensor)
    gather.gather()
    with torch.no_grad():
        tensor.mul_(2)
    assert gather.full(number).tolist() == [2, 2, 2] and not gather.full(number).requires_grad
    assert gather.full(number).data_ptr() == tensor.data_ptr() and gather.num_bytes == 0
    reference = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert reference() is None
    with pytest.raises(RuntimeError, match="its module was dropped or changed"):
        gather.full(number)
    assert gather.add(torch.zeros(1)) == 1, "not the number of a tensor that is gone"
