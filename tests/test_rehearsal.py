"""Learning an engine's loader without weights: nothing of the model changes, and what is learned is what loading teaches."""

import copy

import pytest
import torch
from loaders import (
    IDS,
    LOADERS,
    NOTHING,
    Model,
    W,
    bits,
    bucket_of,
    counts,
    fused,
    many_at_once,
    model_of,
    padded_before,
    plain,
    rescaled,
    sent,
    watched,
)
from torch import nn

from tpcolocate.in_server.tpcolocate_receiver.copy_plan import CopyPlan, places_of
from tpcolocate.in_server.tpcolocate_receiver.dry_run import rehearse
from tpcolocate.in_server.tpcolocate_receiver.loader_trace import DryRunError
from tpcolocate.in_server.tpcolocate_receiver.session import _apply

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


def described(shapes, dtype="float32"):
    return [[name, dtype, list(shape)] for name, shape in shapes.items()]


def learned_by_loading(model, tensors):
    flat, entries = bucket_of(tensors)
    plans, places = CopyPlan(), places_of(model)
    plans.learn(watched(model, flat, entries), entries, places)
    return plans


def where(plans, names):
    return {name: [one.where() for one in plans._copies[name]] for name in names if name in plans._copies}


def everything_of(model):
    """What a rehearsal may not change: which tensors there are, where they lie, what they hold, and plain values."""
    return {
        name: (value.data_ptr(), value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value
        for name, value in {**vars(model), **model._parameters, **model._buffers}.items()
        if not name.startswith("_")
    }


@pytest.mark.parametrize("load, shapes, send, derived, reworked, repeatable, read", LOADERS, ids=IDS)
def test_a_rehearsal_teaches_what_a_load_does_or_nothing_and_leaves_the_model_alone(
    load, shapes, send, derived, reworked, repeatable, read
):
    model = model_of(load, shapes)
    before = everything_of(model)
    plans = CopyPlan()
    try:
        rehearse(model, plans, described(send))
        went = True
    except Exception:
        went = False
    assert everything_of(model) == before
    rehearsed = where(plans, send)
    loaded = where(learned_by_loading(model, sent(send)), send)
    assert rehearsed == {name: copies for name, copies in loaded.items() if name in rehearsed}
    if repeatable and not derived | reworked:
        assert went and rehearsed == loaded and set(loaded) == set(send)
    if not repeatable:
        assert not set(rehearsed) - {name for name in send if name not in derived | reworked}


@pytest.mark.parametrize("load, shapes, send, derived, reworked, repeatable, read", LOADERS, ids=IDS)
def test_what_was_rehearsed_gives_the_bits_that_a_load_gives(load, shapes, send, derived, reworked, repeatable, read):
    model, stock = model_of(load, shapes), model_of(load, shapes)
    plans = CopyPlan()
    try:
        rehearse(model, plans, described(send))
    except Exception:
        plans = CopyPlan()  # as a worker does: nothing is known then
    for seed in range(2):
        flat, entries = bucket_of(sent(send, seed))
        with torch.no_grad():
            _apply(model, plans, flat, entries)
        stock.load_weights([(name, tensor.clone()) for name, tensor in sent(send, seed).items()])
        assert bits(model) == bits(stock)


def test_one_derived_tensor_does_not_spoil_the_others():
    def load(model, name, tensor):
        model.get_parameter(name).data.copy_(tensor.t().contiguous() if name == "b" else tensor)

    model, plans = model_of(load, {"a": (2, 3), "b": (3, 2), "c": (4,)}), CopyPlan()
    rehearse(model, plans, described({"a": (2, 3), "b": (2, 3), "c": (4,)}))
    assert [plans.knows(described({name: shape})) for name, shape in (("a", (2, 3)), ("b", (2, 3)), ("c", (4,)))] == [
        True, False, True,
    ]  # fmt: skip


def test_a_weight_on_its_way_to_a_device_is_derived_and_not_an_error():
    def load(model, name, tensor):
        model.w.data.copy_(tensor.to("cpu", torch.bfloat16))

    plans = CopyPlan()
    rehearse(model_of(load, W), plans, described(W))
    assert not plans.knows(described(W))


def test_a_loader_that_needs_values_says_so_and_nothing_is_known():
    def load(model, name, tensor):
        model.w.data.copy_(tensor if tensor.abs().max() > 0 else tensor * 2)

    model, plans = model_of(load, W), CopyPlan()
    with pytest.raises(Exception, match="meta"):
        rehearse(model, plans, described(W))
    assert not plans.knows(described(W)) and plans.fit()


@pytest.mark.parametrize("place", ["parameter", "data", "buffer", "attribute", "new attribute"])
def test_what_a_loader_puts_in_place_of_a_tensor_is_put_back(place):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.arange(4.0), requires_grad=False)
            self.register_buffer("kept", torch.arange(3.0))
            self.beside = torch.arange(2.0)

        def load_weights(self, weights):
            for _, tensor in weights:
                self.w.data.copy_(tensor)
                if place == "parameter":
                    self.w = nn.Parameter(tensor, requires_grad=False)
                elif place == "data":
                    self.w.data = torch.ones(4)
                elif place == "buffer":
                    self.kept = tensor
                elif place == "attribute":
                    self.beside = tensor
                else:
                    self.another = tensor

    model = nn.Sequential(Holder())
    parameter = model[0].w
    before = everything_of(model[0])
    plans = CopyPlan()
    with pytest.raises(DryRunError, match="replaces"):
        rehearse(loadable(model), plans, described({"w": (4,)}))
    assert everything_of(model[0]) == before and model[0].w is parameter
    assert not plans.knows(described({"w": (4,)}))


def loadable(model):
    model.load_weights = model[0].load_weights
    return model


def test_constants_are_noted_and_written_only_with_the_weights():
    model, plans = model_of(padded_before, {"w": (6, 4)}), CopyPlan()
    before = bits(model)
    rehearse(model, plans, described(W))
    assert bits(model) == before
    new = sent(W, 3)
    flat, entries = bucket_of(new)
    with torch.no_grad():
        _, unsure, replayed = _apply(model, plans, flat, entries)
    assert replayed and unsure == NOTHING
    assert torch.equal(model.w[:4], new["w"]) and not model.w[4:].any()


def test_a_quantised_parameter_cannot_be_rehearsed():
    def load(model, name, tensor):
        model.w.data.copy_(tensor)

    model = Model(load, w=torch.zeros(4, 4, dtype=torch.int8))
    with pytest.raises(DryRunError, match="quantises its weights"):
        rehearse(model, CopyPlan(), described(W, "bfloat16"))


def test_samples_that_are_loaded_otherwise_are_found_and_nothing_is_believed_any_more():
    """The loader treats the second half of the tensors otherwise once it sees values; a rehearsal cannot know."""

    def load(model, name, tensor):
        rows = {"q": (0, 4), "k": (4, 2), "v": (6, 2)}[name]
        if name != "q" and not tensor.is_meta:
            rows = {"k": (6, 2), "v": (4, 2)}[name]
        model.qkv.data.narrow(0, *rows).copy_(tensor)

    shapes = {"q": (4, 3), "k": (2, 3), "v": (2, 3)}
    model, plans = model_of(load, {"qkv": (8, 3)}), CopyPlan()
    rehearse(model, plans, described(shapes))
    flat, entries = bucket_of(sent(shapes))
    identity = plans.identity
    otherwise = []
    with torch.no_grad():
        _, _, replayed = _apply(model, plans, flat, entries, otherwise)
    assert not replayed and otherwise == ["k", "v"] and plans.identity != identity
    assert plans.knows(entries), "what was seen just now"
    assert where(plans, shapes) == where(learned_by_loading(copy.copy(model), sent(shapes)), shapes)


@pytest.mark.parametrize(
    "load, shapes, send", [(plain, W, W), (fused, {"qkv": (8, 3)}, {"q": (4, 3), "k": (2, 3), "v": (2, 3)})]
)
def test_samples_that_are_loaded_as_rehearsed_are_no_news(load, shapes, send):
    model, plans = model_of(load, shapes), CopyPlan()
    rehearse(model, plans, described(send))
    identity, known = plans.identity, where(plans, send)
    flat, entries = bucket_of(sent(send))
    otherwise = []
    with torch.no_grad():
        _, _, replayed = _apply(model, plans, flat, entries, otherwise)
    assert not replayed and otherwise == [] and plans.identity == identity and where(plans, send) == known


@pytest.mark.parametrize("then", [
    lambda w, tensor: w.mul_(2), lambda w, tensor: w[0].fill_(1), lambda w, tensor: tensor.max().item(),
], ids=["rescaled", "filled over", "asked for a value"])  # fmt: skip
def test_a_sample_with_which_more_is_done_than_to_copy_it_is_otherwise(then):
    def load(model, name, tensor):
        model.w.data.copy_(tensor)
        if not tensor.is_meta:
            then(model.w.data, tensor)

    model, plans = model_of(load, W), CopyPlan()
    rehearse(model, plans, described(W))
    assert plans.knows(described(W))
    flat, entries = bucket_of(sent(W))
    otherwise = []
    with torch.no_grad():
        _apply(model, plans, flat, entries, otherwise)
    assert otherwise == ["w"] and not plans.knows(entries)


@pytest.mark.parametrize("load, shapes", [(rescaled, W), (counts, {"w": (4, 4), "also": (1,)}), (many_at_once, W)])
def test_a_loader_that_does_more_to_the_model_than_to_copy_ends_the_rehearsal_with_the_reason(load, shapes):
    with pytest.raises(DryRunError, match="changes the model by more than a copy or a constant"):
        rehearse(model_of(load, shapes), CopyPlan(), described(W))


def test_a_sample_whose_loader_computes_is_otherwise():
    def load(model, name, tensor):
        model.w.data.copy_(tensor if tensor.is_meta else tensor * 1)

    model, plans = model_of(load, W), CopyPlan()
    rehearse(model, plans, described(W))
    flat, entries = bucket_of(sent(W))
    otherwise = []
    with torch.no_grad():
        _apply(model, plans, flat, entries, otherwise)
    assert otherwise == ["w"] and not plans.knows(entries)
