"""Parts of sharded weights reach the workers that read them: four ranks, two slices, no engine.

The worker is the receiver's own code (`CopyPlan`, `CopyProgram`) over a small model that loads as a TP rank does; the server
around it, its processes and handles are in test_engine.py and test_faults.py.
"""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import nn

from tpcolocate import ipc_payload
from tpcolocate.deadline import Deadline
from tpcolocate.errors import DeadlineError
from tpcolocate.in_server.tpcolocate_receiver.copy_plan import CopyPlan, locations_of
from tpcolocate.in_server.tpcolocate_receiver.copy_program import CopyProgram
from tpcolocate.in_server.tpcolocate_receiver.loader_trace import BucketTensors, LoaderTrace, storage_of, views
from tpcolocate.weights.plan.loader_map import LoaderMap
from tpcolocate.weights.plan.sharding import CachedShards, ShardFinder, layouts_of
from tpcolocate.weights.plan.slices import reads_of
from tpcolocate.weights.plan.transfer_plan import Cost, Reach, TpLayout, TransferRequest, costs_here, plan_transfer
from tpcolocate.weights.transport.mesh import Mesh
from tpcolocate.weights.transport.staging import (
    PlannedTransfer,
    SourceBlock,
    Transfer,
    half_region,
    program_definitions,
)

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

WORLD, TP = 4, 2
SHAPES = {
    "column": (12, 6), "row": (10, 8), "uneven": (7, 4), "norm": (5,), "scale": (), "tiny": (1, 4), "expert": (3, 4, 6), "big": (64, 16),
}  # fmt: skip


class Worker(nn.Module):
    """One TP rank of an engine: columns, rows and experts cut as SGLang cuts them, in bf16, with padding."""

    def __init__(self, tp_rank):
        super().__init__()
        self.k = tp_rank
        sizes = {
            "column": (6, 6), "row": (10, 4), "uneven": (4, 4), "norm": (5,), "scale": (), "tiny": (1, 4), "expert": (3, 2, 6), "big": (32, 16),
        }  # fmt: skip
        for name, size in sizes.items():
            self.register_parameter(
                name, nn.Parameter(torch.full(size, -1.0, dtype=torch.bfloat16), requires_grad=False)
            )

    def load_weights(self, weights):
        for name, tensor in weights:
            target = getattr(self, name).data
            if name in ("column", "big"):
                half = tensor.shape[0] // 2
                target.copy_(tensor.narrow(0, self.k * half, half))
            elif name == "row":
                target.copy_(tensor.narrow(1, self.k * 4, 4))
            elif name == "uneven":  # a vocabulary: the last rank's rows are padded
                rows = min(4, 7 - 4 * self.k)
                target[:rows].copy_(tensor.narrow(0, self.k * 4, rows))
                target[rows:].fill_(0)
            elif name == "expert":
                for e in range(3):
                    target[e].copy_(tensor[e].narrow(0, self.k * 2, 2))
            else:
                target.copy_(tensor)


def full_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def traced(tp_rank):
    """A worker that has been loaded once, its copy plan, what it was given, and what it would report."""
    model, plan = Worker(tp_rank), CopyPlan()
    weights = full_weights(0)
    entries, size = ipc_payload.layout([(n, t.shape, t.dtype) for n, t in weights.items()])
    flat = torch.zeros(size, dtype=torch.uint8)
    for entry in entries:
        ipc_payload.view(flat, entry).copy_(weights[entry.name])
    contents = ipc_payload.described(entries)
    trace = LoaderTrace(BucketTensors(flat, contents), {storage_of(p) for p in model.parameters()})
    with torch.no_grad(), trace:
        model.load_weights(views(flat, contents))
    plan.add(trace, contents, locations_of(model))
    return model, plan, entries, plan.describe(list(SHAPES))


def sharded(how, weights):
    """The weights as this rank's training holds them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    one, two = init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (2, 2))
    found = {}
    for name, tensor in weights.items():
        if how == "plain" or tensor.dim() == 0 or (how == "mixed" and name == "norm"):
            found[name] = tensor
        elif how == "hsdp":
            found[name] = distribute_tensor(tensor, two, [Replicate(), Shard(0)])
        elif how == "tensor_parallel":
            dim = 1 if name in ("row", "expert") else 0
            found[name] = distribute_tensor(tensor, two, [Replicate(), Shard(dim)])
        elif how == "mixed" and name == "row":
            found[name] = distribute_tensor(tensor, two, [Shard(0), Replicate()])
        elif how == "mixed" and name == "big":
            found[name] = distribute_tensor(tensor, one, [Replicate()])
        elif how == "bf16":
            found[name] = distribute_tensor(tensor.bfloat16(), one, [Shard(0)])
        else:
            found[name] = distribute_tensor(tensor, one, [Shard(0)])
    return found


REACHES = {
    "alone": frozenset(),
    "everybody": frozenset(itertools.product(range(WORLD), repeat=2)),
    "their slice": frozenset((q, p) for q in range(WORLD) for p in range(WORLD) if q // TP == p // TP),
    "the next rank": frozenset((q, (q + 1) % WORLD) for q in range(WORLD)),
}
"""Whose memory a worker can map: (position of the reader, position of the holder)."""


def transfers_on_a_rank(rank, how, staging_bytes, reach="alone"):
    model, copy_plan, entries, _ = traced(rank % TP)
    loader_map = LoaderMap()
    loader_map.update({k: traced(k)[3] for k in range(TP)}, entries, TP, loaded=True)
    finder, device = ShardFinder(), torch.device("cpu")
    mesh = Mesh(device, Deadline.after(60))
    first = rank - rank % TP
    layout = TpLayout(rank, tuple(range(first, first + TP)), {r: r % TP for r in range(WORLD)})
    seen = []
    planned = None
    for seed in (1, 2):
        weights = full_weights(seed)
        shards = {name: finder.find(tensor) for name, tensor in sharded(how.split(",")[0], weights).items()}
        assert all(one is not None for one in shards.values())
        if how.endswith("computed"):
            every = 2 if "every second" in how else 1
            shards = {name: one if i % every else computed(one) for i, (name, one) in enumerate(shards.items())}
        if planned is None:
            groups = {one.group: Reach() for one in shards.values() if one.group is not None}
            for group in groups:
                ranks = dist.get_process_group_ranks(group)
                pairs = {(q, p) for q, p in itertools.product(range(len(ranks)), repeat=2)
                         if (ranks[q], ranks[p]) in REACHES[reach]}  # fmt: skip
                groups[group] = Reach(frozenset(pairs))
            request = TransferRequest(shards, loader_map.reads, frozenset(), layout, groups)
            plan = plan_transfer(request, agreed_costs(mesh, request), staging_bytes=staging_bytes, key="plan")
            blocks = {source: SourceBlock((), (), 0) for source in plan.sources}
            planned = PlannedTransfer.of(plan, shards, device, blocks, {})
            definitions = program_definitions(plan, blocks)
            programs = {key: CopyProgram(num_sums, slices, copy_plan) for key, num_sums, slices in definitions}
        transfer = Transfer(planned, shards, mesh)
        found = []
        for i in range(len(plan.stages)):
            half = transfer.fill_stage(i)
            # As mapped memory: every worker sees the halves of the ranks that it reaches, and of no others.
            halves = mesh.all_gather_objects(dist.group.WORLD, half)
            regions = {
                half_region(r, i): one for r, one in enumerate(halves) if r == rank or (rank, r) in REACHES[reach]
            }
            found.append(programs[f"plan/{i}"].run(copy_plan, regions, keep_views=False)[0])
        expected = transfer.expected_staged()
        reference = Worker(rank % TP)
        reference.load_weights(weights.items())
        seen.append({
            "equal": all(torch.equal(getattr(model, name), getattr(reference, name)) for name in SHAPES),
            "sums": found == expected and len(found) == len(plan.stages),
            "stages": len(plan.stages), "stage": plan.stage_bytes, "send": plan.send_bytes,
            "staged": plan.staged_bytes,
            "sent": sum(sum(stage.send_bytes) for stage in plan.stages),
        })  # fmt: skip
    return seen


def computed(shard):
    """The same, made when it is asked for, region by region."""

    def compute(region, out=None):
        view = shard.local
        for dim, (start, length) in enumerate(zip(region.starts, region.lengths)):
            view = view.narrow(dim, start - shard.region.starts[dim], length)
        return view.clone() if out is None else out.copy_(view)

    return replace(shard, local=torch.empty(0, dtype=shard.local.dtype), compute=compute)


def agreed_costs(mesh, request):
    costs = {}
    for group in request.groups:
        here = costs_here(request, group)
        if group is not None and here:
            most = iter(mesh.max(group, [n for cost in here.values() for n in (cost.num_bytes, int(cost.is_sent))]))
            here = {name: Cost(size, bool(is_sent)) for name, size, is_sent in zip(here, most, most)}
        costs[group] = here
    return costs


WAYS = ["plain", "fsdp", "hsdp", "tensor_parallel", "mixed", "bf16", "fsdp, computed", "plain, computed", "bf16, computed",
        "mixed, every second computed"]  # fmt: skip
LITTLE = 3 * 512


def all_on_a_rank(rank):
    found = {(how, reach): transfers_on_a_rank(rank, how, 2**20, reach) for how in WAYS for reach in REACHES}
    little = {(f"{how}, little room", reach): transfers_on_a_rank(rank, how, LITTLE, reach)
              for how in ("fsdp", "plain") for reach in REACHES}  # fmt: skip
    return found | little


@pytest.fixture(scope="module")
def found():
    """Rank -> case -> what was seen in two syncs; the ranks are started once for all of it."""
    return run_ranks(all_on_a_rank, WORLD, timeout_s=90)


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.slow
def test_every_worker_gets_what_its_loader_would_have_taken(found, how, reach):
    for rank, of_rank in enumerate(found):
        seen = of_rank[how, reach]
        assert all(one["equal"] and one["sums"] for one in seen), (rank, seen)
        is_sent = not how.startswith("plain") and reach != "everybody"
        if reach in ("alone", "everybody"):
            assert (seen[0]["sent"] > 0) == is_sent, (
                "what another rank's worker cannot map is sent to it, and nothing else"
            )


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("how", ["fsdp", "plain"])
@pytest.mark.slow
def test_little_staging_memory_is_kept_to(found, how, reach):
    of_ranks = [of_rank[f"{how}, little room", reach] for of_rank in found]
    assert len({seen[0]["stages"] for seen in of_ranks}) == 1, "all ranks go through the same steps"
    for seen in of_ranks:
        assert all(one["equal"] and one["sums"] for one in seen)
        # slices of the largest tensor are rounded up to a row, and parts to their alignment
        assert 2 * seen[0]["stage"] + seen[0]["send"] <= 1.25 * LITTLE
        assert seen[0]["stages"] > (3 if reach == "alone" else 1)


@pytest.mark.slow
def test_a_rank_of_two_moves_half_of_the_bytes(found):
    """Of what is cut in two; norms are read by both."""
    whole = sum(torch.Size(shape).numel() * 2 for shape in SHAPES.values())
    for of_rank in found:
        assert whole / 2 <= of_rank["fsdp", "alone"][0]["staged"] < 0.62 * whole


class Slow:
    def wait(self, timeout=None):
        raise RuntimeError("timed out")


def test_a_mesh_that_does_not_answer_is_a_missed_deadline():
    mesh = Mesh(torch.device("cpu"), Deadline.after(-1.0))
    with pytest.raises(DeadlineError, match="did not exchange weights in time"):
        mesh._wait(Slow())
    with pytest.raises(RuntimeError, match="timed out"):
        Mesh(torch.device("cpu"), Deadline.after(60.0))._wait(Slow())


def test_shards_that_are_laid_out_as_before_are_looked_up_when_they_are_needed():
    finder = ShardFinder()
    first = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    layouts = layouts_of({name: finder.find(tensor) for name, tensor in first.items()})
    now = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    again = CachedShards(now.__getitem__, layouts, lambda name: None)
    assert list(again) == ["a", "b"] and len(again) == 2 and "c" not in again
    for name, tensor in now.items():
        assert again[name].local.data_ptr() == tensor.data_ptr()
        assert again[name].region == finder.find(tensor).region and again[name].shape == tuple(tensor.shape)


def test_memory_that_was_released_is_taken_anew():
    shards = {"w": ShardFinder().find(torch.ones(4, 4))}
    reads = {"w": (reads_of([[0, [4, 4], [4, 1], "float32"]], (4, 4)),)}
    request = TransferRequest(shards, reads, frozenset(), TpLayout(0, (0,), {0: 0}), {})
    device = torch.device("cpu")
    plan = plan_transfer(request, {None: costs_here(request, None)}, staging_bytes=2**20, key="plan")
    blocks = {source: SourceBlock((), (), 0) for source in plan.sources}
    transfer = Transfer(PlannedTransfer.of(plan, shards, device, blocks, {}), shards, Mesh(device, Deadline.never()))
    transfer.prepare()
    first = transfer.halves[0]
    transfer.prepare()
    assert transfer.halves[0] is first, "once is enough"
    transfer.release()
    assert transfer.halves == []
    half = transfer.fill_stage(0)
    assert half.view(torch.float32)[:16].tolist() == [1.0] * 16 and half is not first
    assert transfer.expected_direct() == [[]]
    assert transfer.expected_staged() == [[int(torch.ones(16).view(torch.int64).sum())]]
