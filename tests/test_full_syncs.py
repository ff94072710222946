"""What a full sync must bring, and replicas that differ: syncs without a server, see `sync_harness`.

Each scenario runs on the training ranks of one world and returns what it found on its rank.
"""

import copy
import functools
import gc
import tempfile
import time

import pytest
import torch
from harness import run_ranks
from sync_harness import Engine, World, record_everything, serve_worker, shapes_of, stop_worker, warm_up
from sync_models import policy, served_weights
from torch import nn

from tpcolocate.errors import TpColocateError
from tpcolocate.weights.lora import adapter_of
from tpcolocate.weights.sync.replicas import compare_adapters

pytestmark = pytest.mark.timeout(400)

MOST = 4
"""Training ranks, and as many workers."""
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
STRAYS = {"mtp.layers.0.weight": (4, 8), "rotary_emb.inv_freq": (2,)}
"""In the checkpoint's files, and read by no loader; see `sync_models.UNREAD`."""
LAYER = "layers.0.self_attn."


class Given:
    """A source as `sync_harness.Engine.run` takes it.

    Args:
        model: Plain.
        give: Model -> what goes to the sync.
        expected: Name -> full tensor; default: what `model` has.
    """

    def __init__(self, model, give=lambda model: model, expected=None):
        self.model, self.give, self._expected = model, give, expected

    def train(self):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.ones_like(parameter))

    def given(self):
        return self.give(self.model)

    def expected(self):
        found = served_weights(self.model) if self._expected is None else self._expected
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def tied():
    model = policy()
    model.lm_head.weight = model.embed_tokens.weight
    return model


def without(shapes, *names):
    return {name: shape for name, shape in shapes.items() if name not in names}


def shared(model):
    for parameter in model.parameters():
        parameter.data.share_memory_()
    return model


def with_strays(model):
    """The model also holds what no loader reads."""
    model.mtp = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4, bias=False)])})
    return model.requires_grad_(False)


def synced(engine, source, num=1, **options):
    found = []
    for _ in range(num):
        source.train()
        found.append(engine.run(source, **options))
    return found


# --- What runs on two ranks ----------------------------------------------------------------------------------------------


def a_tied_checkpoint_with_both_names(world):
    """With memory that stays in place: the third sync repeats the second."""
    found = {}
    for words, options, is_warm in [("cold", {}, False), ("warm", {}, True), ("full tensors", {"parts": False}, False),
                                    ("files", {"transport": "file"}, False)]:  # fmt: skip
        engine = Engine(world, habit="ties")
        if is_warm:
            warm_up(engine.sync)
        found[words] = synced(engine, Given(shared(tied())), 4, **options)
        engine.close()
    return found


def a_loader_that_ties_and_cannot_be_traced(world):
    """Then the second name is sent, and that nothing of it is read is no error, since its tensor arrived."""
    engine = Engine(world, habit="ties")
    engine.sync.state.dry_run_problem = "planted"
    found = synced(engine, Given(tied()), 2)
    engine.close()
    return found


def a_trainer_that_is_not_tied(world):
    """With two tensors, which may be equal for a while."""
    found = {}
    for words, shapes in [("both names", shapes_of(False)), ("one name", without(shapes_of(False), HEAD))]:
        engine, source = Engine(world, habit="ties", shapes=shapes), Given(policy())
        found[words] = [engine.run(source)]
        with torch.no_grad():
            source.model.lm_head.weight.copy_(source.model.embed_tokens.weight)
        found[words] += [engine.run(source), engine.run(source)]
        with torch.no_grad():
            source.model.lm_head.weight.add_(1)
        found[words] += [engine.run(source), engine.run(source, rename={HEAD: None})]
        engine.close()
    return found


def strays_in_the_files(world):
    """Held by no trainer; and then something is missing that is read."""
    found = {}
    shapes = shapes_of(False) | STRAYS
    for words, is_warm in [("cold", False), ("warm", True)]:
        engine, source = Engine(world, shapes=shapes), Given(policy())
        if is_warm:
            warm_up(engine.sync)
        part = Given(source.model, lambda model: without(model.state_dict(), "norm.weight"))
        found[words] = [engine.run(part), *synced(engine, source, 2), engine.run(part), engine.run(part, partial=True)]
        engine.close()
    return found


def strays_without_a_trace(world):
    engine = Engine(world, shapes=shapes_of(False) | STRAYS)
    engine.sync.state.dry_run_problem = "planted"
    found = engine.run(Given(policy()))
    engine.close()
    return found


def strays_in_the_trainer(world):
    engine = Engine(world, shapes=shapes_of(False) | STRAYS)
    found = synced(engine, Given(shared(with_strays(policy())), expected=None), 4)
    engine.close()
    return found


def joined_tensors(world):
    """Each in a bucket of its own, but for those that are joined."""
    found = {}
    for habit in ("joins", "waits"):
        for words, options, give in [
            ("parts", {}, lambda model: model),
            ("full tensors", {"parts": False}, lambda model: model),
            ("in another order", {"parts": False}, lambda model: dict(sorted(model.state_dict().items(), reverse=True))),
            ("generator", {}, lambda model: iter(model.state_dict().items())),
            ("files", {"transport": "file"}, lambda model: model),
        ]:  # fmt: skip
            engine = Engine(world, habit=habit)
            found[habit, words] = synced(engine, Given(policy(), give), 2, bucket_bytes=64, **options)
            engine.close()
        engine = Engine(world, habit=habit)
        part = Given(policy(), lambda model: {f"{LAYER}k_proj.weight": model.state_dict()[f"{LAYER}k_proj.weight"]})
        found[habit, "one of them"] = [engine.run(part, partial=True)]
        engine.close()
    return found


def joined_with_a_merged_one(world):
    """One of the two is computed and goes in full, so the other one must as well."""
    found = {}
    for habit in ("joins", "waits"):
        engine = Engine(world, habit=habit)
        plain = adapted_policy()
        found[habit] = synced(engine, Given(plain), 2, bucket_bytes=64)
        engine.close()
    return found


def adapted_policy(seed=1):
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
        return peft.get_peft_model(policy(), config).requires_grad_(False)


def pairs_of_a_tied_model(world):
    """As the guide makes them: name by name, the memory of one perhaps the other's as well."""
    found = {}
    for words, give in {
        "list": lambda model: [(name, tensor.to(torch.bfloat16)) for name, tensor in model.state_dict().items()],
        "generator": lambda model: ((name, tensor.to(torch.bfloat16)) for name, tensor in model.state_dict().items()),
        "generator of views": lambda model: iter(model.state_dict().items()),
    }.items():
        for which, shapes in [("one name", without(shapes_of(False), HEAD)), ("both names", shapes_of(False))]:
            engine = Engine(world, habit="ties", shapes=shapes)
            found[words, which] = synced(engine, Given(tied(), give), 2)
            engine.close()
    return found


def differing_generator_of_a_model_that_is_not_tied(world):
    engine = Engine(world, habit="ties", shapes=without(shapes_of(False), HEAD))
    found = engine.run(Given(policy(), lambda model: iter(model.state_dict().items())))
    engine.close()
    return found


def names_that_change_in_place(world):
    """The caller's mapping is another one from the fourth sync on; the memory stays in place, so that the third is repeated."""
    found = []
    for is_function in (False, True):
        engine, source, names = Engine(world), Given(shared(policy())), {}
        rename = functools.partial(renamed, names) if is_function else names
        found += [engine.run(source, rename=rename) for _ in range(3)]
        k, v = f"{LAYER}k_proj.weight", f"{LAYER}v_proj.weight"
        names |= {k: v, v: k}
        weights = served_weights(source.model)
        swapped = Given(source.model, expected={**weights, k: weights[v], v: weights[k]})
        found += [engine.run(swapped, rename=rename) for _ in range(2)]
        engine.close()
    return found


def renamed(names, name):
    return names.get(name, name)


def differing_replicas(world):
    found = {}

    def engine_and(words, source, **options):
        engine = Engine(world)
        found[words] = [engine.run(source, **options)]
        return engine

    def spoil(model, name="norm.weight"):
        if world.rank == 1:
            with torch.no_grad():
                dict(model.named_parameters())[name].view(-1)[0] += 1
        return model

    for words, give in {
        "module": lambda model: model,
        "state dict": lambda model: model.state_dict(),
        "generator": lambda model: iter(model.state_dict().items()),
    }.items():
        engine_and(words, Given(spoil(policy()), give)).close()
    engine_and("adapters", Given(adapted_policy(seed=world.rank))).close()
    engine_and("full tensors", Given(spoil(policy())), parts=False).close()
    mine = Given(spoil(policy()))
    mine.expected = spoil_as_owner(world, mine)
    engine_and("the owner's alone", mine, payloads="fan_out").close()
    source = Given(shared(policy()))
    words = "later"
    engine = engine_and(words, source)
    found[words] += synced(engine, source, 2)
    spoil(source.model, EMBEDDING)
    while found[words][-1].error is None and len(found[words]) < 30:
        found[words].append(engine.run(source))
    with torch.no_grad():
        source.model.embed_tokens.weight.copy_(policy().embed_tokens.weight)
    found[words].append(engine.run(source))
    engine.close()
    return found


def differing_adapters(world):
    """As `Engine.set_lora` compares them."""
    found = {}
    for words, seed in [("equal", 1), ("differing", world.rank)]:
        try:
            found[words] = compare_adapters(world.group, adapter_of(adapted_policy(seed), None).tensors)
        except TpColocateError as error:
            found[words] = type(error).__name__, error.message
    return found


def spoil_as_owner(world, source):
    """What the engine has when it gets the owner's weights: rank 1 is the owner of two."""
    assert world.owner_rank == 1
    weights = served_weights(copy.deepcopy(source.model))
    if world.rank != 1:
        weights["norm.weight"] = weights["norm.weight"].clone()
        weights["norm.weight"].view(-1)[0] += 1
    return lambda: {name: tensor.detach().clone() for name, tensor in weights.items()}


# --- And on four ---------------------------------------------------------------------------------------------------------


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return model


def sharded_strays(world):
    """Two slices whose ranks gather together: what all of them ignore is not gathered; and one slice fails early."""
    engine = Engine(world, shapes=shapes_of(False) | STRAYS)
    model = with_strays(policy())
    source = Given(sharded(copy.deepcopy(model)), expected=without(served_weights(model), "mtp.layers.0.weight"))
    source.train = lambda: None
    found = [engine.run(source), engine.run(source, parts=False)]
    failed = engine.run(source, fault=("agreement", 0) if world.rank == 2 else None, timeout_s=8.0)
    again = engine.run(source)
    engine.close()
    return {"good": found, "one slice failed": [failed], "after that": [again]}


def a_rank_that_cannot_read_its_weights(world):
    """In a first sync, and in one that would have repeated another."""
    failing = []

    def rename(name):
        if failing and world.rank == 3:
            raise ValueError("not now")
        return name

    engine = Engine(world)
    model = sharded(policy())
    for parameter in model.parameters():
        parameter.to_local().untyped_storage().share_memory_()
    source = Given(model, expected=served_weights(policy()))
    source.train = lambda: None
    failing.append(True)
    found = {"first": [engine.run(source, rename=rename)]}
    failing.clear()
    found["good"] = synced(engine, source, 3, rename=rename)
    failing.append(True)
    found["repeated"] = [engine.run(source, rename=rename)]
    failing.clear()
    found["good"] += synced(engine, source, 2, rename=rename)
    engine.close()
    return found


SCENARIOS = {
    a_tied_checkpoint_with_both_names: 2,
    a_loader_that_ties_and_cannot_be_traced: 2,
    a_trainer_that_is_not_tied: 2,
    strays_in_the_files: 2,
    strays_without_a_trace: 2,
    strays_in_the_trainer: 2,
    joined_tensors: 2,
    joined_with_a_merged_one: 2,
    pairs_of_a_tied_model: 2,
    differing_generator_of_a_model_that_is_not_tied: 2,
    names_that_change_in_place: 2,
    differing_replicas: 2,
    differing_adapters: 2,
    sharded_strays: 4,
    a_rank_that_cannot_read_its_weights: 4,
}


def on_a_rank(rank, folder):
    if rank >= MOST:
        serve_worker(folder, rank - MOST)
        return None
    found = {}
    record_everything(folder)
    try:
        for size in (2, 4):
            if rank < size:
                world = World(rank, size, folder)
                world.cut(2)
                for scenario, its_size in SCENARIOS.items():
                    if its_size == size:
                        started = time.monotonic()
                        found[scenario.__name__] = scenario(world)
                        print(f"{scenario.__name__} {time.monotonic() - started:.1f}", flush=True)
                world.close()
        gc.collect()
        return found
    finally:
        stop_worker(folder, rank)


@pytest.fixture(scope="module")
def of_ranks():
    with tempfile.TemporaryDirectory(prefix="tpcs-") as folder:  # a socket's path must be short
        return run_ranks(on_a_rank, 2 * MOST, folder, init_group=False, timeout_s=360)


def found(of_ranks, scenario):
    return [of_rank[scenario.__name__] for of_rank in of_ranks[: SCENARIOS[scenario]]]


def check_good(syncs):
    assert [(one.error, one.differing) for one in syncs] == [(None, [])] * len(syncs)


def check_refused(sync, *words, modified=False):
    assert sync.error is not None and sync.error[0] == "WeightsMismatchError", sync.error
    assert all(word in sync.error[1] for word in words), sync.error
    assert sync.modified is modified


def num_traced(sync):
    return sum(event[1].split()[1] == "DryRun" for event in sync.record.events if event[0] == "command")


# --- Tests ---------------------------------------------------------------------------------------------------------------


def test_the_second_name_of_a_tied_weight_is_not_sent_and_named(of_ranks):
    for of_rank in found(of_ranks, a_tied_checkpoint_with_both_names):
        for syncs in of_rank.values():
            check_good(syncs)
            assert [one.facts["ignored"] for one in syncs] == [(HEAD,)] * 4
            assert [one.facts["tensors"] for one in syncs] == [10] * 4
            assert [one.facts["warnings"] for one in syncs] == [[]] * 4
        repeated = of_rank["cold"][-1]
        assert repeated.facts["buckets"] == 1 and repeated.facts["mapped"][0] > 0, (
            "it is found as it was, and not named"
        )


def test_the_loader_is_traced_once(of_ranks):
    [syncs] = [of_rank["cold"] for of_rank in found(of_ranks, a_tied_checkpoint_with_both_names)[1:]]  # the owner's
    assert [num_traced(one) for one in syncs] == [1, 0, 0, 0]


def test_without_a_trace_a_tied_name_may_be_read_under_the_other_name_alone(of_ranks):
    for syncs in found(of_ranks, a_loader_that_ties_and_cannot_be_traced):
        check_good(syncs)
        assert [one.facts["ignored"] for one in syncs] == [(HEAD,)] * 2


@pytest.mark.parametrize("which", ["both names", "one name"])
def test_a_trainer_that_does_not_tie_what_the_engine_ties_is_refused_once_its_tensors_differ(of_ranks, which):
    for of_rank in found(of_ranks, a_trainer_that_is_not_tied):
        first, equal, again, apart, left_out = of_rank[which]
        check_refused(first, HEAD, EMBEDDING)
        check_good([equal, again, left_out])
        check_refused(apart, HEAD, EMBEDDING)


@pytest.mark.parametrize("engine", ["cold", "warm"])
def test_what_no_loader_reads_is_not_missing_and_what_one_reads_is(of_ranks, engine):
    for of_rank in found(of_ranks, strays_in_the_files):
        refused, *good, again, partial = of_rank[engine]
        check_refused(refused, "weights are missing: norm.weight (according to the test)")
        check_refused(again, "weights are missing: norm.weight (according to the test)")
        check_good(good)
        assert [one.facts["ignored"] for one in good] == [tuple(STRAYS)] * 2
        assert [one.facts["missing"] for one in good] == [()] * 2
        assert partial.error is None and partial.facts["missing"] == ("norm.weight",)
        asked = len(refused.record.requests)
        assert (asked == 0) if engine == "warm" and refused.record.of("command") else True


def test_without_a_trace_all_that_the_files_hold_must_come(of_ranks):
    for sync in found(of_ranks, strays_without_a_trace):
        check_refused(sync, "weights are missing: mtp.layers.0.weight; rotary_emb.inv_freq")


def test_what_the_trainer_holds_and_no_loader_reads_is_not_sent(of_ranks):
    for syncs in found(of_ranks, strays_in_the_trainer):
        check_good(syncs)
        assert [one.facts["tensors"] for one in syncs] == [11] * 4
        assert [one.facts["ignored"] for one in syncs] == [tuple(STRAYS)] * 4
        assert syncs[-1].facts["buckets"] == 1, "a repeated sync has nothing but one program"


def test_names_that_a_mapping_or_a_function_changes_hold_for_the_next_sync(of_ranks):
    for syncs in found(of_ranks, names_that_change_in_place):
        check_good(syncs)
        assert [one.facts["buckets"] for one in syncs] == [1] * 10


@pytest.mark.parametrize("habit", ["joins", "waits"])
def test_tensors_that_the_loader_joins_travel_together(of_ranks, habit):
    for of_rank in found(of_ranks, joined_tensors):
        for (its_habit, _), syncs in of_rank.items():
            if its_habit == habit and len(syncs) == 2:
                check_good(syncs)
        check_refused(of_rank[habit, "one of them"][0], f"{LAYER}k_proj.weight; {LAYER}v_proj.weight only together")
        assert of_rank[habit, "full tensors"][0].facts["buckets"] == 10, "of eleven tensors two travel in one"
    for of_rank in found(of_ranks, joined_with_a_merged_one):
        check_good(of_rank[habit])


def test_pairs_made_of_a_tied_model_are_taken(of_ranks):
    for of_rank in found(of_ranks, pairs_of_a_tied_model):
        for syncs in of_rank.values():
            check_good(syncs)
    for sync in found(of_ranks, differing_generator_of_a_model_that_is_not_tied):
        check_refused(sync, f"has no {HEAD}")


@pytest.mark.parametrize("which", ["module", "state dict", "full tensors"])
def test_replicas_that_differ_are_named_with_their_ranks_before_anything_is_sent(of_ranks, which):
    for of_rank in found(of_ranks, differing_replicas):
        check_refused(of_rank[which][0], "rank 1 and rank 0 differ in 1 of 11 tensors (norm.weight)")


def test_replicas_of_a_generator_are_compared_as_they_come(of_ranks):
    for of_rank in found(of_ranks, differing_replicas):
        check_refused(
            of_rank["generator"][0], "rank 1 and rank 0 differ in 1 of 11 tensors (norm.weight)", modified=True
        )


def test_adapters_that_were_initialised_differently_are_refused(of_ranks):
    for of_rank in found(of_ranks, differing_replicas):
        check_refused(of_rank["adapters"][0], "rank 1 and rank 0 differ in 2 of", "lora_A", "lora_B")


def test_adapters_that_are_served_apart_are_compared_as_well(of_ranks):
    for of_rank in found(of_ranks, differing_adapters):
        assert of_rank["equal"] is None
        kind, message = of_rank["differing"]
        assert kind == "WeightsMismatchError" and "rank 1 and rank 0 differ in 2 of 2 tensors" in message


def test_replicas_that_are_not_sent_may_differ(of_ranks):
    for of_rank in found(of_ranks, differing_replicas):
        check_good(of_rank["the owner's alone"])


def test_replicas_that_come_to_differ_are_found_later(of_ranks):
    for of_rank in found(of_ranks, differing_replicas):
        *good, refused, healed = of_rank["later"]
        check_good(good[:3])
        assert len(good) <= 3 + 11 and all(one.error is None for one in good)
        check_refused(refused, f"differ in 1 of 1 tensors ({EMBEDDING})")
        agreed = [event for event in good[-1].record.events if event[0] == "agree"]
        assert len(agreed) == 3, "a repeated sync has no agreement for it"
        assert healed.error is None


def test_slices_drop_alike_what_their_ranks_gather_together(of_ranks):
    for of_rank in found(of_ranks, sharded_strays):
        check_good(of_rank["good"])
        assert [one.facts["tensors"] for one in of_rank["good"]] == [11] * 2
        check_good(of_rank["after that"])
    failed = [of_rank["one slice failed"][0] for of_rank in found(of_ranks, sharded_strays)]
    assert [one.error is None for one in failed] == [True, True, False, False]


def test_no_slice_waits_for_a_rank_that_cannot_read_its_weights(of_ranks):
    for rank, found_here in enumerate(found(of_ranks, a_rank_that_cannot_read_its_weights)):
        check_good(found_here["good"])
        assert found_here["good"][2].facts["buckets"] == 1, "it was a repeated one"
        for when in ("first", "repeated"):
            [failed] = found_here[when]
            assert not failed.modified
            if rank < 2:
                assert failed.error[0] == "SyncError" and "another slice has failed" in failed.error[1]
            else:
                assert failed.error == ("RankFailedError", "ValueError: not now")
