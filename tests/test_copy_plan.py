"""Copies that are planned, and made again without the engine's loader; programs of parts of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loaders import (
    IDS,
    LOADERS,
    Model,
    W,
    bits,
    fused,
    model_of,
    padded,
    plain,
    sent,
    update,
)
from torch import nn

from tpcolocate.in_server.tpcolocate_receiver import loader_trace
from tpcolocate.in_server.tpcolocate_receiver.checksums import word_sum
from tpcolocate.in_server.tpcolocate_receiver.copy_plan import locations_of
from tpcolocate.in_server.tpcolocate_receiver.copy_program import CopyProgram

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


@pytest.mark.parametrize("load, shapes, send, transformed, overwritten, repeatable, read", LOADERS, ids=IDS)
def test_later_loads_give_the_same_bits_and_follow_the_plan_only_where_there_is_one(
    load, shapes, send, transformed, overwritten, repeatable, read
):
    model, stock = model_of(load, shapes), model_of(load, shapes)
    for seed in range(3):
        tensors = sent(send, seed)
        replayed, unverified, wrong, found = update(model, {name: tensor.clone() for name, tensor in tensors.items()})
        stock.load_weights([(name, tensor.clone()) for name, tensor in tensors.items()])
        assert replayed == (seed > 0 and repeatable and not overwritten)
        assert bits(model) == bits(stock), "as the engine's own loader leaves them"
        assert (unverified, wrong, found) == (transformed | overwritten, set(), read)
        for name in ("doubled", "beside", "largest"):
            if hasattr(stock, name):
                assert torch.equal(torch.as_tensor(getattr(model, name)), torch.as_tensor(getattr(stock, name)))


def test_a_plan_casts_as_the_loader_did():
    model = model_of(plain, W, torch.bfloat16)
    update(model, sent(W, 1))
    assert update(model, sent(W, 2))[0]
    assert torch.equal(model.w, sent(W, 2)["w"].to(torch.bfloat16))


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from(["float32", "bfloat16", "int8", "float64"])),
        min_size=1,
        max_size=8,
    )
)
def test_any_layout_is_replayed_bit_by_bit(shapes):
    def tensors(seed):
        return {
            f"w{i}": (torch.randn(a, b, generator=torch.Generator().manual_seed(seed)) * 9).to(getattr(torch, dtype))
            for i, (a, b, dtype) in enumerate(shapes)
        }

    model = Model(plain, **{name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()})
    for seed in range(2):
        assert update(model, tensors(seed))[:3] == (seed > 0, set(), set())
        assert all(torch.equal(parameter, tensors(seed)[name]) for name, parameter in model.named_parameters())


def test_a_plan_never_writes_through_a_stale_pointer():
    model = model_of(plain, {"a": (4,), "b": (4,)})
    update(model, sent({"a": (4,), "b": (4,)}, 1))
    old = model.a
    model.a = nn.Parameter(torch.zeros(4), requires_grad=False)
    before = old.clone()
    tensors = sent({"a": (4,), "b": (4,)}, 2)
    assert update(model, tensors)[0] is False
    assert torch.equal(model.a, tensors["a"]) and torch.equal(model.b, tensors["b"]) and torch.equal(old, before)
    tensors = sent({"a": (4,), "b": (4,)}, 3)
    assert update(model, tensors)[0] is True, "and the new location is planned"
    assert torch.equal(model.a, tensors["a"])


def test_memory_that_moves_under_a_parameter_is_seen():
    model = model_of(plain, W)
    update(model, sent(W, 1))
    model.w.data = torch.zeros(4, 4)
    assert update(model, sent(W, 2))[0] is False
    assert torch.equal(model.w, sent(W, 2)["w"])


def test_memory_that_its_own_load_moves_is_not_written_through():
    def load(model, name, tensor):
        model.w.data.copy_(tensor)
        model.w.data = torch.zeros(4, 4)

    model = model_of(load, W)
    for seed in range(3):
        assert update(model, sent(W, seed))[0] is False


def test_every_location_of_a_model_is_found_once():
    inner = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": inner, "b": inner, "c": nn.ModuleList([nn.Linear(2, 3, bias=False), nn.Identity()])})
    model["c"][0].register_buffer("scale", torch.ones(2), persistent=False)
    model["c"][1].register_module("none", None)
    tensors = [*model.parameters(), *model.buffers()]
    found = locations_of(model)
    assert sorted((address, storage) for _, _, address, storage in found) == sorted(
        (tensor.data_ptr(), loader_trace.storage_of(tensor)) for tensor in tensors
    )
    assert all(table[name].data_ptr() == address for table, name, address, _ in found)


def test_a_parameter_that_is_gone_is_no_place_to_write_to():
    def load(model, name, tensor):
        if hasattr(model, "w"):
            model.w.data.copy_(tensor)

    model = model_of(load, W)
    update(model, sent(W, 1))
    del model.w
    assert update(model, sent(W, 2)) == (False, set(), set(), {})


def test_a_planned_tensor_may_come_in_any_bucket():
    shapes = {"a": (4,), "b": (4,), "c": (8,)}
    model = model_of(plain, shapes)

    def load(seed, names):
        tensors = {name: tensor for name, tensor in sent(shapes, seed).items() if name in names}
        tensors = {name: tensors[name] for name in names}
        replayed, *_ = update(model, tensors)
        assert all(torch.equal(getattr(model, name), tensor) for name, tensor in tensors.items())
        return replayed

    layouts = ["ab", "ba", "bc", "abc", "a"]
    assert [load(1, names) for names in layouts] == [False, True, False, True, True]
    assert [load(2, names) for names in layouts] == [True] * 5


def test_a_tensor_of_another_shape_or_dtype_is_traced_again():
    model = model_of(lambda model, name, tensor: model.w.data.view(-1)[: tensor.numel()].copy_(tensor.view(-1)), W)
    first, other = sent(W, 1)["w"], sent({"w": (2, 8)}, 2)["w"]
    assert [update(model, {"w": tensor})[0] for tensor in (first, first, other, other, first.double())] == [
        False, True, False, True, False,
    ]  # fmt: skip


def test_a_constant_under_a_copy_is_written_before_it_and_only_with_its_tensor():
    """A loader that clears the whole parameter first: repeated for another tensor, that would overwrite this one."""

    def load(model, name, tensor):
        parameter = getattr(model, name)
        parameter.data.zero_()
        parameter.data[: len(tensor)].copy_(tensor)

    shapes = {"a": (4, 2), "b": (4, 2)}
    model = model_of(load, {"a": (6, 2), "b": (6, 2)})
    update(model, sent(shapes, 1))
    model.a.data.fill_(7)
    replayed, *_ = update(model, {"b": sent(shapes, 2)["b"]})
    assert replayed and torch.equal(model.b[:4], sent(shapes, 2)["b"]) and not model.b[4:].any()
    assert (model.a == 7).all()


def test_two_tensors_over_one_constant_are_left_to_the_loader():
    def load(model, name, tensor):
        if name == "q":
            model.qkv.data.zero_()
        fused(model, name, tensor)

    send = {"q": (4, 3), "k": (2, 3), "v": (2, 3)}
    model, stock = model_of(load, {"qkv": (8, 3)}), model_of(load, {"qkv": (8, 3)})
    for seed in range(2):
        assert update(model, sent(send, seed))[0] is False
        stock.load_weights(sent(send, seed).items())
        assert bits(model) == bits(stock)


def test_a_quantised_parameter_is_refused_with_the_reason():
    model = Model(lambda m, n, t: m.w.data.copy_(t), w=torch.zeros(4, 4, dtype=torch.float8_e4m3fn))
    with pytest.raises(RuntimeError, match="w is torch.float32 and its parameter torch.float8_e4m3fn"):
        update(model, sent(W))


def test_parameters_that_nothing_was_copied_into_are_found():
    shapes = {"a": (4, 3), "b": (6, 4), "c": (4, 4), "d": (3,)}

    def load(model, name, tensor):
        if name == "b":
            padded_into(model.b, tensor)
        elif name == "c":
            model.c.data[:, :2].copy_(tensor)
        else:
            plain(model, name, tensor)

    def padded_into(parameter, tensor):
        parameter.data[: len(tensor)].copy_(tensor)
        parameter.data[len(tensor) :].fill_(0)

    model = model_of(load, shapes)
    update(model, sent({"a": (4, 3), "b": (4, 4), "c": (4, 2)}))
    assert model.plan.unwritten(model) == ["c", "d"], "half of c, and nothing of d"


def test_copies_into_another_shape_are_repeated_and_not_described():
    model = model_of(lambda model, name, tensor: model.w.data.copy_(tensor), W)
    update(model, sent({"w": (4,)}, 1))
    assert model.plan.describe(["w"]) == {}
    assert update(model, sent({"w": (4,)}, 2))[0] and torch.equal(model.w, sent({"w": (4,)}, 2)["w"].expand(4, 4))


@pytest.mark.parametrize("num_rows, unwritten", [(4, []), (3, ["w"])])
def test_a_parameter_that_is_not_contiguous_is_written_if_enough_was_copied(num_rows, unwritten):
    model = Model(lambda m, n, t: m.w.data[:num_rows].copy_(t[:num_rows]), w=torch.zeros(4, 4).t())
    update(model, sent(W))
    assert model.plan.unwritten(model) == unwritten


def test_parts_of_another_parameter_in_the_same_storage_do_not_count():
    both = torch.zeros(8)
    model = Model(plain, a=both[:4], b=both[4:])
    update(model, sent({"a": (4,)}))
    assert model.plan.unwritten(model) == ["b"]
    update(model, sent({"b": (4,)}))
    assert model.plan.unwritten(model) == []


# --- programs ----------------------------------------------------------------------------------------------------------


def test_a_program_copies_slices_out_of_regions_and_sums_up_what_arrived():
    model = model_of(plain, {"a": (4, 6), "b": (3,)})
    tensors = sent({"a": (4, 6), "b": (3,)}, 1)
    update(model, tensors)
    new = sent({"a": (4, 6), "b": (3,)}, 2)
    # the upper half of a lies in columns of one region, the lower half and b in another
    left = torch.zeros(4, 8)
    left[:2, 1:7] = new["a"][:2]
    right = torch.cat([new["a"][2:].reshape(-1), new["b"]])
    slices = [
        ["a", 0, [0, 0], [2, 6], "left", 4, "float32", [8, 1], 0, 1],
        ["a", 0, [2, 0], [2, 6], "right", 0, "float32", [6, 1], 1, 1],
        ["b", 0, None, None, "right", 48, "float32", [1], 2, 1],
    ]
    regions = {"left": left.view(-1).view(torch.uint8), "right": right.view(torch.uint8)}
    program = CopyProgram(3, slices, model.plan)
    for keep in (True, True, False):
        model.a.data.zero_(), model.b.data.zero_()
        found, _ = program.run(model.plan, regions, keep_views=keep)
        assert torch.equal(model.a, new["a"]) and torch.equal(model.b, new["b"])
        assert found == [int(word_sum(part)) for part in (new["a"][:2], new["a"][2:], new["b"])]


def test_a_program_writes_the_loaders_constants_again():
    model = model_of(padded, {"w": (6, 4)})
    update(model, sent(W, 1))
    model.w.data.fill_(9)
    new = sent(W, 2)["w"]
    program = CopyProgram(1, [["w", 0, None, None, "r", 0, "float32", [4, 1], 0, 1]], model.plan)
    program.run(model.plan, {"r": new.view(-1).view(torch.uint8)}, keep_views=False)
    assert torch.equal(model.w[:4], new) and not model.w[4:].any()


def test_a_source_that_its_dtype_cannot_start_at_is_refused():
    model = model_of(plain, W)
    update(model, sent(W))
    program = CopyProgram(1, [["w", 0, None, None, "r", 2, "float32", [4, 1], 0, 1]], model.plan)
    with pytest.raises(ValueError, match="torch.float32 cannot start at byte 2 of region 'r'"):
        program.run(model.plan, {"r": torch.zeros(128, dtype=torch.uint8)}, keep_views=True)


@pytest.mark.parametrize("rows, unwritten", [([0, 1, 2, 3], []), ([3, 1, 0, 2, 1], []), ([0, 1, 3], ["w"]), ([1, 2, 3], ["w"]), ([0, 1, 2], ["w"])])  # fmt: skip
def test_a_parameter_is_written_if_its_parts_leave_no_gap(rows, unwritten):
    model = Model(lambda m, n, t: [m.w.data[row].copy_(t[row]) for row in rows], w=torch.zeros(4, 4))
    update(model, sent(W))
    found = model.plan.unwritten(model)
    assert found == (unwritten if len(set(rows)) == len(rows) else ["w"]), "what was overwritten is not planned"
