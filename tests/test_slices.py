"""Slices: which parts of tensors go where.  Pure."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpcolocate.in_server.tpcolocate_receiver.regions import Region, is_covered, region_of, strides_of, whole
from tpcolocate.weights.plan.sharding import shard_regions
from tpcolocate.weights.plan.slices import (
    SliceCutter,
    TensorSlice,
    cut,
    is_read_whole,
    label_of,
    place,
    reads_of,
    slices_of,
    within,
)

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=4)


@st.composite
def tensor_and_region(draw):
    shape = tuple(draw(SHAPES))
    starts = tuple(draw(st.integers(0, n - 1)) for n in shape)
    lengths = tuple(draw(st.integers(1, n - start)) for n, start in zip(shape, starts))
    return torch.arange(torch.Size(shape).numel()).view(shape), Region(starts, lengths)


def narrowed(tensor, region):
    for dim, (start, length) in enumerate(zip(region.starts, region.lengths)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


@given(tensor_and_region(), st.data())
def test_every_rectangular_view_is_recognised(case, data):
    tensor, region = case
    view = narrowed(tensor, region)
    for dim in reversed(range(view.dim())):  # as when a loader picks one expert
        if view.shape[dim] == 1 and data.draw(st.booleans()):
            view = view.select(dim, 0)
    found = region_of(view.storage_offset(), tuple(view.shape), view.stride(), tuple(tensor.shape))
    assert found is not None
    assert torch.equal(narrowed(tensor, found[0]).reshape(view.shape), view)
    for size, dim in zip(view.shape, found[1], strict=True):
        assert size == (1 if dim is None else found[0].lengths[dim])


@given(tensor_and_region(), st.data())
def test_no_other_view_is_taken_for_a_rectangular_one(case, data):
    """Whatever a loader makes of a tensor: if it is taken for a region, the region holds the same elements in the same order."""
    tensor, region = case
    view = narrowed(tensor, region)
    for _ in range(data.draw(st.integers(0, 3))):
        kind = data.draw(st.sampled_from(["transpose", "flatten", "step", "unsqueeze", "split"]))
        if kind == "transpose" and view.dim() > 1:
            view = view.transpose(0, data.draw(st.integers(1, view.dim() - 1)))
        elif kind == "flatten" and view.is_contiguous():
            view = view.view(-1)
        elif kind == "step" and view.dim():
            view = view[:: data.draw(st.integers(1, 3))]
        elif kind == "unsqueeze":
            view = view.unsqueeze(data.draw(st.integers(0, view.dim())))
        elif kind == "split" and view.dim() and view.shape[0] % 2 == 0:
            view = view.unflatten(0, (2, -1))
    found = region_of(view.storage_offset(), tuple(view.shape), view.stride(), tuple(tensor.shape))
    if found is not None:
        assert torch.equal(narrowed(tensor, found[0]).reshape(view.shape), view)


NOT_RECTANGULAR = [
    ("transposed", 0, (4, 3), (1, 4), (3, 4)),
    ("flattened", 0, (12,), (1,), (3, 4)),
    ("every other row", 0, (2, 4), (8, 1), (4, 4)),
    ("over the end of a row", 3, (2,), (1,), (3, 4)),
    ("beyond the tensor", 12, (1,), (1,), (3, 4)),
]


@pytest.mark.parametrize(
    "offset, shape, strides, full", [c[1:] for c in NOT_RECTANGULAR], ids=[c[0] for c in NOT_RECTANGULAR]
)
def test_what_is_not_rectangular(offset, shape, strides, full):
    assert region_of(offset, shape, strides, full) is None


@given(SHAPES, st.data())
def test_covering_is_counted_exactly(shape, data):
    full = tuple(shape)
    regions, seen = [], torch.zeros(full, dtype=torch.bool)
    for _ in range(data.draw(st.integers(0, 4))):
        starts = tuple(data.draw(st.integers(0, n - 1)) for n in full)
        regions.append(Region(starts, tuple(data.draw(st.integers(1, n - s)) for n, s in zip(full, starts))))
        narrowed(seen, regions[-1]).fill_(True)
    assert is_covered(regions, full) == bool(seen.all())


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 1))
def test_shards_are_those_of_torch(size, num_ranks, dim):
    full = (size, 3) if dim == 0 else (3, size)
    chunks = torch.arange(size).chunk(num_ranks)
    regions = shard_regions(full, dim, num_ranks)
    assert len(regions) == num_ranks and is_covered([s for s in regions if s.volume], full)
    for i, region in enumerate(regions):
        length = len(chunks[i]) if i < len(chunks) else 0
        assert region.lengths[dim] == length and (not length or region.starts[dim] == chunks[i][0])


@given(tensor_and_region(), st.integers(1, 4), st.data())
def test_ones_put_together_are_what_is_read(case, num_ranks, data):
    tensor, part_read = case
    full = tuple(tensor.shape)
    dim = data.draw(st.integers(0, len(full) - 1)) if full else 0
    regions = shard_regions(full, dim, num_ranks) if full else [whole(full)]
    view = narrowed(tensor, part_read)
    described = [[view.storage_offset(), list(view.shape), list(view.stride()), "int64"]]
    reads = reads_of(described, full)
    [read] = reads
    target = torch.full(view.shape, -1)
    for one in slices_of("w", reads, regions):
        local = narrowed(tensor, regions[one.holder])
        starts, lengths = one.kind.target
        part = target
        if starts is not None:
            for d, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                part = part.narrow(d, start, length)
        source = one.view(local, regions[one.holder])
        assert source.shape == one.shape == part.shape and one.num_bytes == 8 * part.numel()
        assert (part == -1).all(), "no element comes twice"
        part.copy_(source)
    assert torch.equal(target, view) and read.number == 0


def test_a_copy_that_is_not_rectangular_makes_the_tensor_unplanned_and_empty_ones_do_not_count():
    assert reads_of([[0, [2], [1], "float32"], [0, [3, 4], [1, 3], "float32"]], (4, 3)) is None
    [read] = reads_of([[0, [0, 3], [3, 1], "float32"], [3, [1, 3], [3, 1], "bfloat16"]], (4, 3))
    assert (read.number, read.region, read.dtype) == (1, Region((1, 0), (1, 3)), torch.bfloat16)


def test_whether_the_ranks_read_everything():
    halves = [reads_of([[start, [2, 3], [3, 1], "float32"]], (4, 3)) for start in (0, 6)]
    assert is_read_whole(tuple(halves), (4, 3))
    assert not is_read_whole((halves[0], halves[0]), (4, 3)), "twice the same half is no whole"


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 60))
def test_stages_keep_order_and_the_limit(costs, limit):
    names = [f"w{i}" for i in range(len(costs))]
    by_name = dict(zip(names, costs))
    stages = cut(names, by_name, limit)
    assert list(itertools.chain(*stages)) == names
    assert all(sum(by_name[n] for n in stage) <= limit or len(stage) == 1 for stage in stages)


def test_ones_lie_behind_one_another_aligned():
    reads = reads_of([[0, [3], [1], "bfloat16"], [0, [3], [1], "float32"]], (3,))
    ones = slices_of("w", reads, [whole((3,))])
    assert place(ones) == ([0, 16], 32)
    assert place(ones, 64) == ([64, 80], 96)
    assert place([]) == ([], 0)


def test_strides_are_those_of_torch():
    for shape in [(), (3,), (2, 3), (1, 4, 5), (4, 1, 2)]:
        assert strides_of(shape) == torch.empty(shape).stride()


def test_slices_within_a_region_are_cut_and_others_left_out():
    reads = reads_of([[0, [4, 3], [3, 1], "float32"]], (4, 3))
    slices = slices_of("w", reads, shard_regions((4, 3), 0, 2))
    assert within(slices, None) == slices
    [one] = within(slices, Region((1, 0), (1, 3)))
    assert (one.region, one.holder) == (Region((1, 0), (1, 3)), 0)


@pytest.mark.parametrize("name, label", [
    ("layers.3.mlp.experts.17.up_proj.weight", "layers.3.mlp.experts.*.up_proj.weight"),
    ("0.1", "0.*"), ("a.0.b.1.c.2", "a.0.b.*.c.2"), ("layers.3.w1.weight", "layers.3.w1.weight"), ("7", "7"),
    ("layers.3.4", "layers.3.*"), ("a..0..1.", "a..0..*."), ("", ""), ("w2.5x.6", "w2.5x.6"),
])  # fmt: skip
def test_the_experts_of_a_layer_have_one_label(name, label):
    assert label_of(name) == label


def test_what_is_read_and_sharded_alike_is_cut_once():
    reads = reads_of([[3, [2, 3], [3, 1], "float32"]], (4, 3))
    regions = shard_regions((4, 3), 0, 2)
    cutter = SliceCutter()
    [[first], [second]] = [cutter.cut(reads, region, holder) for holder, region in enumerate(regions)]
    assert [TensorSlice("w", first), TensorSlice("w", second)] == slices_of("w", reads, regions)
    assert cutter.cut(reads, regions[1], 1)[0] is second
    others = reads_of([[0, [1, 3], [3, 1], "float32"]], (4, 3))
    assert cutter.cut(others, regions[1], 1) == ()
    # Other objects never get the place of those that are gone.
    for start in range(50):
        region = Region((start % 2, 0), (1, 3))
        assert [kind.region for kind in cutter.cut(tuple(others), region, 0)] == ([region] if start % 2 == 0 else [])
