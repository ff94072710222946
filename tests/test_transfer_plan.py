"""Who reads what of whose memory, from tables: four ranks in two slices of two, without processes."""

import itertools

import pytest
import torch
import torch.distributed as dist

from tpcolocate.in_server.tpcolocate_receiver.checksums import word_sum
from tpcolocate.weights.plan.sharding import LocalShard, shard_regions
from tpcolocate.weights.plan.slices import block_of, label_of, reads_of, slices_of
from tpcolocate.weights.plan.transfer_plan import (
    Reach,
    TpLayout,
    TransferRequest,
    blocks_here,
    costs_here,
    plan_transfer,
    readers_here,
)
from tpcolocate.weights.sync.mesh_calls import SLICE_FAILED, cause_of
from tpcolocate.weights.transport.checksums import DirectChecksums

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

RANKS, TP = 4, 2
GROUP = object()
"""Stands for the group of all ranks."""
COMPLETE = Reach(frozenset(itertools.product(range(RANKS), repeat=2)))
OWN_SLICE = Reach(frozenset((q, p) for q, p in COMPLETE.pairs if q // TP == p // TP))
ALONE = Reach()


@pytest.fixture(autouse=True)
def _group(monkeypatch):
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(range(RANKS)))


def halves(rows, columns, dim):
    """Each TP rank reads half of a float32 tensor, of its rows or columns."""
    size = (rows // 2, columns) if dim == 0 else (rows, columns // 2)
    step = rows // 2 * columns if dim == 0 else columns // 2
    return tuple(reads_of([[k * step, size, (columns, 1), "float32"]], (rows, columns)) for k in range(TP))


def request_at(rank, reach, *, mapped=("rows", "columns")):
    """`rows` and `columns` (8 x 4) are sharded by rows over four ranks, `whole` lies on each."""
    regions = tuple(shard_regions((8, 4), 0, RANKS))
    shards = {
        "rows": LocalShard((8, 4), torch.full((2, 4), float(rank)), regions, rank, GROUP),
        "columns": LocalShard((8, 4), torch.full((2, 4), float(rank)), regions, rank, GROUP),
        "whole": LocalShard((8, 4), torch.zeros(8, 4), tuple(shard_regions((8, 4), 0, 1))),
    }
    reads = {"rows": halves(8, 4, 0), "columns": halves(8, 4, 1), "whole": halves(8, 4, 0)}
    first = rank - rank % TP
    layout = TpLayout(rank, (first, first + 1), {r: r % TP for r in range(RANKS)})
    return TransferRequest(shards, reads, frozenset(mapped), layout, {GROUP: reach})


def readers_of(request, name):
    """Ranks whose workers read this rank's part of a tensor where it lies."""
    return [rank for _, ranks in readers_here(request, {name}).values() for rank in ranks]


def test_a_worker_reaches_its_own_rank_always():
    assert all(ALONE.can(q, q) for q in range(RANKS)) and not ALONE.can(0, 1)
    assert COMPLETE.is_complete(RANKS) and not OWN_SLICE.is_complete(RANKS) and ALONE.is_complete(1)


@pytest.mark.parametrize("reach, rows, columns", [
    (COMPLETE, [0, 2], [0, 1, 2, 3]), (OWN_SLICE, [0], [0, 1]), (ALONE, [0], [0]),
])  # fmt: skip
def test_readers_of_a_part_are_those_that_read_it_and_reach_it(reach, rows, columns):
    """Rank 0 has the first rows, which only TP rank 0 reads, and a part of every column."""
    request = request_at(0, reach)
    assert readers_of(request, "rows") == rows
    assert readers_of(request, "columns") == columns
    assert readers_of(request, "whole") == [0]


@pytest.mark.parametrize("reach, tp_ranks", [(COMPLETE, [0, 1]), (OWN_SLICE, [0, 1]), (ALONE, [0])])
def test_blocks_are_what_is_mapped_here_by_the_tp_rank_that_reads_it(reach, tp_ranks):
    found = blocks_here(request_at(0, reach))
    assert list(found) == [(None, 0), *((GROUP, k) for k in tp_ranks)]
    assert found[None, 0].slices == [], "not mapped"
    of_first = found[GROUP, 0]
    assert of_first.labels == ["rows", "columns"] and of_first.num_bytes == 4 * (2 * 4 + 2 * 2)
    if 1 in tp_ranks:
        assert found[GROUP, 1].labels == ["columns"], "of the rows it reads none here"


@pytest.mark.parametrize("mapped, reach, staged", [
    (("rows", "columns"), COMPLETE, []), (("rows",), COMPLETE, ["columns"]), ((), COMPLETE, ["rows", "columns"]),
    (("rows", "columns"), OWN_SLICE, ["rows", "columns"]), (("rows", "columns"), ALONE, ["rows", "columns"]),
])  # fmt: skip
def test_what_is_staged_is_the_same_on_all_ranks(mapped, reach, staged):
    for rank in range(RANKS):
        request = request_at(rank, reach, mapped=mapped)
        assert request.staged(GROUP) == staged and list(costs_here(request, GROUP)) == staged
        assert request.staged(None) == ["whole"]


@pytest.mark.parametrize("rank", range(RANKS))
def test_sources_go_round_beginning_with_the_own_rank(rank):
    for reach, size in ((COMPLETE, 4), (OWN_SLICE, 2), (ALONE, 1)):
        request = request_at(rank, reach)
        plan = plan_transfer(
            request, {group: costs_here(request, group) for group in request.groups}, staging_bytes=2**20, key="x"
        )
        own, *of_group = plan.sources
        assert own == (None, 0)
        expected = [(GROUP, (rank + i) % RANKS) for i in range(RANKS) if reach.can(rank, (rank + i) % RANKS)]
        assert of_group == expected and len(of_group) == size


def test_what_is_read_where_it_lies_is_not_staged_as_well():
    """Of mapped tensors only what goes to workers that cannot map memory of this rank is sent, and nothing is given."""
    for rank in range(RANKS):
        request = request_at(rank, OWN_SLICE)
        costs = {group: costs_here(request, group) for group in request.groups}
        plan = plan_transfer(request, costs, staging_bytes=2**20, key="x")
        [of_group] = [stage for stage in plan.stages if stage.group is GROUP]
        assert not any(of_group.given.values()), "own slices read it where it lies"
        assert [bool(slices) for slices in of_group.send] == [
            rank // TP != q // TP and bool(readers_of(request_at(rank, COMPLETE), "columns")) for q in range(RANKS)
        ]
        assert sum(one.num_bytes for _, one, _ in of_group.taken) == sum(
            one.num_bytes for slices in of_group.receive for one in slices
        )


def test_the_cause_is_a_problem_of_a_worker_before_a_slice_that_failed():
    assert cause_of([]) is None and cause_of([None, None]) is None
    assert cause_of([None, SLICE_FAILED]) == SLICE_FAILED
    assert cause_of([SLICE_FAILED, None, "TP rank 1: no"]) == "TP rank 1: no"
    assert cause_of(["first", "second"]) == "first"


@pytest.mark.parametrize("name, label", [
    ("model.layers.3.mlp.experts.17.up_proj.weight", "model.layers.3.mlp.experts.*.up_proj.weight"),
    ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"), ("lm_head.weight", "lm_head.weight"),
])  # fmt: skip
def test_experts_of_a_layer_share_a_label(name, label):
    assert label_of(name) == label


def test_experts_that_trade_places_change_the_sum_that_they_share():
    names = [f"layers.0.experts.{e}.w" for e in range(3)]
    region = shard_regions((4, 4), 0, 1)
    reads = (reads_of([[0, (4, 4), (4, 1), "float32"]], (4, 4)),)
    experts = [torch.arange(16.0).reshape(4, 4) * (e + 1) for e in range(3)]
    block = block_of([one for name in names for one in slices_of(name, reads[0], region)])
    assert block.labels == ["layers.0.experts.*.w"] and block.weights == [1, 3, 5]

    def found(order):
        shards = {name: LocalShard((4, 4), experts[e], tuple(region)) for name, e in zip(names, order)}
        return DirectChecksums({(None, 0): block}, torch.device("cpu")).begin(shards).tolist()

    sums = {tuple(found(order)) for order in itertools.permutations(range(3))}
    assert len(sums) == 6
    assert found((0, 1, 2)) == [sum(w * int(word_sum(x)) for w, x in zip(block.weights, experts))]
