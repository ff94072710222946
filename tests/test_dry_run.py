"""The dry run of an engine's loader: the model stays as it is, and the plan is the one that a load gives."""

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
    joins,
    many_at_once,
    materialised,
    model_of,
    padded_before,
    plain,
    rescaled,
    sent,
    skips,
    traced,
    waits,
)
from torch import nn

from tpcolocate.in_server.tpcolocate_receiver.copy_plan import CopyPlan, locations_of
from tpcolocate.in_server.tpcolocate_receiver.dry_run import dry_run
from tpcolocate.in_server.tpcolocate_receiver.load_bucket import load_bucket
from tpcolocate.in_server.tpcolocate_receiver.loader_trace import DryRunError

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


def entries_of(shapes, dtype="float32"):
    return [[name, dtype, list(shape)] for name, shape in shapes.items()]


def plan_of_a_load(model, tensors):
    flat, entries = bucket_of(tensors)
    plan, locations = CopyPlan(), locations_of(model)
    plan.add(traced(model, flat, entries), entries, locations)
    return plan


def keys_of(plan, names):
    return {name: [one.key() for one in plan._copies[name]] for name in names if name in plan._copies}


def everything_of(model):
    """What a dry run may not change: which tensors there are, where they lie, what they hold, and plain values."""
    return {
        name: (value.data_ptr(), value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value
        for name, value in {**vars(model), **model._parameters, **model._buffers}.items()
        if not name.startswith("_")
    }


@pytest.mark.parametrize("load, shapes, send, transformed, overwritten, repeatable, read", LOADERS, ids=IDS)
def test_a_dry_run_plans_what_a_load_does_or_nothing_and_leaves_the_model_alone(
    load, shapes, send, transformed, overwritten, repeatable, read
):
    model = model_of(load, shapes)
    before = everything_of(model)
    plan = CopyPlan()
    try:
        dry_run(model, plan, entries_of(send))
        succeeded = True
    except Exception:
        succeeded = False
    assert everything_of(model) == before
    planned = keys_of(plan, send)
    loaded = keys_of(plan_of_a_load(model, sent(send)), send)
    assert planned == {name: copies for name, copies in loaded.items() if name in planned}
    if repeatable and not transformed | overwritten:
        assert succeeded and planned == loaded and set(loaded) == set(send)
    if not repeatable:
        assert not set(planned) - {name for name in send if name not in transformed | overwritten}


@pytest.mark.parametrize("load, shapes, send, transformed, overwritten, repeatable, read", LOADERS, ids=IDS)
def test_what_was_planned_gives_the_bits_that_a_load_gives(
    load, shapes, send, transformed, overwritten, repeatable, read
):
    model, stock = model_of(load, shapes), model_of(load, shapes)
    plan = CopyPlan()
    try:
        dry_run(model, plan, entries_of(send))
    except Exception:
        plan = CopyPlan()  # as in a worker: nothing is planned then
    for seed in range(2):
        flat, entries = bucket_of(sent(send, seed))
        load_bucket(model, plan, flat, entries)
        stock.load_weights([(name, tensor.clone()) for name, tensor in sent(send, seed).items()])
        assert bits(model) == bits(stock)


def test_one_transformed_tensor_does_not_spoil_the_others():
    def load(model, name, tensor):
        model.get_parameter(name).data.copy_(tensor.t().contiguous() if name == "b" else tensor)

    model, plan = model_of(load, {"a": (2, 3), "b": (3, 2), "c": (4,)}), CopyPlan()
    dry_run(model, plan, entries_of({"a": (2, 3), "b": (2, 3), "c": (4,)}))
    assert [plan.covers(entries_of({name: shape})) for name, shape in (("a", (2, 3)), ("b", (2, 3)), ("c", (4,)))] == [
        True, False, True,
    ]  # fmt: skip


def test_a_weight_on_its_way_to_a_device_is_transformed_and_not_an_error():
    def load(model, name, tensor):
        model.w.data.copy_(tensor.to("cpu", torch.bfloat16))

    plan = CopyPlan()
    dry_run(model_of(load, W), plan, entries_of(W))
    assert not plan.covers(entries_of(W))


def test_a_loader_that_needs_values_raises_and_nothing_is_planned():
    def load(model, name, tensor):
        model.w.data.copy_(tensor if tensor.abs().max() > 0 else tensor * 2)

    model, plan = model_of(load, W), CopyPlan()
    with pytest.raises(Exception, match="meta"):
        dry_run(model, plan, entries_of(W))
    assert not plan.covers(entries_of(W)) and plan.is_current()


@pytest.mark.parametrize("place", ["parameter", "data", "buffer", "attribute", "new attribute"])
def test_what_a_loader_replaces_is_restored(place):
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
    plan = CopyPlan()
    with pytest.raises(DryRunError, match="replaces"):
        dry_run(loadable(model), plan, entries_of({"w": (4,)}))
    assert everything_of(model[0]) == before and model[0].w is parameter
    assert not plan.covers(entries_of({"w": (4,)}))


def loadable(model):
    model.load_weights = model[0].load_weights
    return model


def test_constants_are_recorded_and_written_only_with_the_weights():
    model, plan = model_of(padded_before, {"w": (6, 4)}), CopyPlan()
    before = bits(model)
    dry_run(model, plan, entries_of(W))
    assert bits(model) == before
    new = sent(W, 3)
    flat, entries = bucket_of(new)
    loaded = load_bucket(model, plan, flat, entries)
    assert loaded.replayed and loaded.unverified == NOTHING
    assert torch.equal(model.w[:4], new["w"]) and not model.w[4:].any()


def test_a_quantised_parameter_cannot_be_planned():
    def load(model, name, tensor):
        model.w.data.copy_(tensor)

    model = Model(load, w=torch.zeros(4, 4, dtype=torch.int8))
    with pytest.raises(DryRunError, match="quantises its weights"):
        dry_run(model, CopyPlan(), entries_of(W, "bfloat16"))


def test_samples_that_deviate_are_found_and_the_plan_is_discarded():
    """The loader treats the second half of the tensors differently once it sees values; a dry run cannot show that."""

    def load(model, name, tensor):
        rows = {"q": (0, 4), "k": (4, 2), "v": (6, 2)}[name]
        if name != "q" and not tensor.is_meta:
            rows = {"k": (6, 2), "v": (4, 2)}[name]
        model.qkv.data.narrow(0, *rows).copy_(tensor)

    shapes = {"q": (4, 3), "k": (2, 3), "v": (2, 3)}
    model, plan = model_of(load, {"qkv": (8, 3)}), CopyPlan()
    dry_run(model, plan, entries_of(shapes))
    flat, entries = bucket_of(sent(shapes))
    identity = plan.identity
    loaded = load_bucket(model, plan, flat, entries, watch=True)
    assert not loaded.replayed and loaded.deviating == ["k", "v"] and plan.identity != identity
    assert plan.covers(entries), "what was seen just now"
    assert keys_of(plan, shapes) == keys_of(plan_of_a_load(copy.copy(model), sent(shapes)), shapes)


@pytest.mark.parametrize(
    "load, shapes, send", [(plain, W, W), (fused, {"qkv": (8, 3)}, {"q": (4, 3), "k": (2, 3), "v": (2, 3)})]
)
def test_samples_that_are_loaded_as_planned_change_nothing(load, shapes, send):
    model, plan = model_of(load, shapes), CopyPlan()
    dry_run(model, plan, entries_of(send))
    identity, before = plan.identity, keys_of(plan, send)
    flat, entries = bucket_of(sent(send))
    loaded = load_bucket(model, plan, flat, entries, watch=True)
    assert (
        not loaded.replayed and loaded.deviating == [] and plan.identity == identity and keys_of(plan, send) == before
    )


@pytest.mark.parametrize("then", [
    lambda w, tensor: w.mul_(2), lambda w, tensor: w[0].fill_(1), lambda w, tensor: tensor.max().item(),
], ids=["rescaled", "filled over", "asked for a value"])  # fmt: skip
def test_a_sample_that_is_not_only_copied_deviates(then):
    def load(model, name, tensor):
        model.w.data.copy_(tensor)
        if not tensor.is_meta:
            then(model.w.data, tensor)

    model, plan = model_of(load, W), CopyPlan()
    dry_run(model, plan, entries_of(W))
    assert plan.covers(entries_of(W))
    flat, entries = bucket_of(sent(W))
    assert load_bucket(model, plan, flat, entries, watch=True).deviating == ["w"] and not plan.covers(entries)


@pytest.mark.parametrize("load, shapes", [(rescaled, W), (counts, {"w": (4, 4), "also": (1,)}), (many_at_once, W)])
def test_a_loader_that_does_more_to_the_model_than_to_copy_ends_the_dry_run_with_the_reason(load, shapes):
    with pytest.raises(DryRunError, match="changes the model by more than a copy or a constant"):
        dry_run(model_of(load, shapes), CopyPlan(), entries_of(W))


def test_a_sample_whose_loader_computes_deviates():
    def load(model, name, tensor):
        model.w.data.copy_(tensor if tensor.is_meta else tensor * 1)

    model, plan = model_of(load, W), CopyPlan()
    dry_run(model, plan, entries_of(W))
    flat, entries = bucket_of(sent(W))
    assert load_bucket(model, plan, flat, entries, watch=True).deviating == ["w"] and not plan.covers(entries)


def handling_of(load, parameters, shapes, others=()):
    plan = CopyPlan()
    found = dry_run(model_of(load, parameters), plan, entries_of(shapes), others=entries_of(dict(others)))
    return found, plan


def test_what_the_loader_reads_nothing_of_is_ignored():
    found, plan = handling_of(skips, {"a": (2,)}, {"a": (2,), "gone": (3,), "empty": (0, 2)}, {"also": (4,)})
    assert found.ignored == ["gone", "also"] and found.joined == []
    assert found.names == {"a", "gone", "empty", "also"}
    assert plan.covers(entries_of({"gone": (3,)})) and not plan.covers(entries_of({"also": (4,)}))
    found, _ = handling_of(materialised, {"w": (5, 3)}, {"w": (3, 5)})
    assert found.ignored == [], "it is read, if not copied"


@pytest.mark.parametrize("load", [joins, waits], ids=lambda load: load.__name__)
def test_tensors_that_are_loaded_only_together_are_found_whatever_lies_between(load):
    def either(model, name, tensor):
        (load if name in "ab" else plain)(model, name, tensor)

    parameters = {"ab": (4, 3), "c": (2,), "d": (2,)}
    found, _ = handling_of(either, parameters, {"a": (2, 3), "c": (2,), "b": (2, 3), "d": (2,)})
    assert found.joined == [["a", "b"]] and found.ignored == []
    found, _ = handling_of(either, parameters, {"a": (2, 3), "c": (2,)}, {"b": (2, 3), "d": (2,)})
    assert found.joined == [["a", "b"]], "also with one that is not planned"


def test_temporary_tensors_at_one_address_join_nothing():
    def each(model, name, tensor):
        getattr(model, name).data.copy_((tensor * 2).contiguous())

    shapes = {name: (4, 4) for name in "abcdef"}
    found, _ = handling_of(each, shapes, shapes)
    assert found.joined == []


def test_a_loader_that_draws_ahead_or_draws_everything_first_joins_nothing():
    class Ahead(Model):
        def load_weights(self, weights):
            last = None
            for named in weights:
                if last is not None:
                    plain(self, *last)
                last = named
            plain(self, *last)

    class First(Model):
        def load_weights(self, weights):
            for name, tensor in list(weights):
                plain(self, name, tensor)

    shapes = {f"w{i}": (2,) for i in range(12)}
    for kind in (Ahead, First):
        model = kind(plain, **{name: torch.zeros(shape) for name, shape in shapes.items()})
        assert dry_run(model, CopyPlan(), entries_of(shapes)).joined == []
