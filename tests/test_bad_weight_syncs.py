"""Syncs of weights that are wrong in themselves, lie unusually or come in an unusual way, without a server, see `sync_harness`."""

import contextlib
import functools
import gc
import math
import tempfile
import time

import pytest
import torch
from harness import run_ranks
from sync_harness import Engine, World, record_everything, serve_worker, shapes_of, stop_worker
from sync_models import policy, served_weights
from test_full_syncs import Given, adapted_policy, shared

from tpcolocate.weights.sync.buckets import differences

pytestmark = pytest.mark.timeout(300)

NUM_RANKS = 2
WEIGHT, OTHER = "layers.0.mlp.down_proj.weight", "layers.0.self_attn.q_proj.weight"
OTHER_KINDS = [torch.int8, torch.float8_e4m3fn]
"""The quick tests of `ModelSpec` have all of them."""
GIVE = {
    "module": lambda model: model,
    "state dict": lambda model: model.state_dict(),
    "generator": lambda model: iter(model.state_dict().items()),
}


def fill(source, value, name=WEIGHT):
    """Make one number of a weight another one; returns what mends it."""
    tensor = dict(source.model.named_parameters())[name].data
    before = tensor.clone()
    tensor.view(-1)[-1] = value

    def mend():
        tensor.copy_(before)

    return mend


def weights_that_are_not_finite(world):
    """Three good syncs before, so that those of modules whose memory stays in place are repeated."""
    found = {}
    for words, options in [
        ("module", {}), ("module", {"transport": "file"}), ("state dict", {"parts": False}), ("generator", {}),
    ]:  # fmt: skip
        engine, source = Engine(world), Given(shared(policy()), GIVE[words])
        first = [engine.run(source, **options) for _ in range(3)]
        mend = fill(source, math.inf)
        spoiled = [engine.run(source, **options)]
        fill(source, math.nan, OTHER)
        spoiled += [engine.run(source, **options), engine.run(source, **options, nonfinite="refuse")]
        source = Given(policy(), GIVE[words])
        last = [engine.run(source, **options), engine.run(source, **options, nonfinite="refuse")]
        mend()
        found[f"{words} {options}"] = {"good": first, "spoiled": spoiled, "after": last}
        engine.close()
    return found


def a_first_sync_that_is_not_finite(world):
    found = []
    for memory in (lambda model: model, shared):
        engine, source = Engine(world), Given(memory(policy()))
        fill(source, -math.inf)
        found.append(engine.run(source))
        engine.close()
    return found


def a_merged_weight_that_is_not_finite(world):
    """It is computed: what is wrong is seen in what it is computed from."""
    found = {}
    for words, spoil in [("base", "base_layer"), ("adapter", "lora_B")]:
        engine, source = Engine(world), Given(adapted_policy())
        good = [engine.run(source), engine.run(source)]
        name, parameter = next(one for one in source.model.named_parameters() if spoil in one[0])
        parameter.data.view(-1)[0] = math.inf
        found[words] = good, [engine.run(source), engine.run(source, nonfinite="refuse")]
        engine.close()
    return found


def other_kinds_of_dtype(world):
    found = {}
    dtypes = dict.fromkeys(shapes_of(False), torch.float32)
    for words in ("state dict", "generator"):
        for dtype in OTHER_KINDS:
            engine = Engine(world, dtypes=dtypes)
            model = policy()
            state = {**model.state_dict(), WEIGHT: model.state_dict()[WEIGHT].to(dtype)}
            source = Given(
                model, lambda model, state=state, words=words: state if words == "state dict" else iter(state.items())
            )
            found[words, dtype] = [engine.run(source, bucket_bytes=64), engine.run(Given(policy()))]
            engine.close()
    return found


def generators_that_fail(world):
    """One that was read before, and one that raises on a single rank: at once, and half-way."""
    found = {}
    for words, options in [("whole", {}), ("partial", {"partial": True})]:
        engine, model = Engine(world), policy()
        pairs = (pair for pair in list(model.state_dict().items()))
        source = Given(model, lambda _, pairs=pairs: pairs)
        found[words] = [engine.run(source, **options), engine.run(source, **options), engine.run(Given(model))]
        engine.close()

    def failing(model, number):
        for i, pair in enumerate(model.state_dict().items()):
            if i == number and world.rank == 1:
                raise ValueError("no more")
            yield pair

    for number in (0, 4):
        engine = Engine(world)
        source = Given(policy(), lambda model, number=number: failing(model, number))
        found[number] = [engine.run(source, bucket_bytes=64), engine.run(Given(policy()))]
        engine.close()
    return found


def renamed_on_one_rank(world, name):
    k, v = (f"layers.0.self_attn.{which}_proj.weight" for which in "kv")
    return {k: v, v: k}.get(name, name) if world.rank else name


def weights_that_differ_between_ranks(world):
    """In what cannot be seen from the first of them."""
    found = {}
    for words in ("state dict", "generator"):
        engine, source = Engine(world), Given(policy(), GIVE[words])
        found[words] = [engine.run(source, rename=functools.partial(renamed_on_one_rank, world)), engine.run(source)]
        engine.close()
    return found


FORMS = {
    "one row many times": lambda tensor: tensor[:1].expand(tensor.shape),
    "one column many times": lambda tensor: tensor[:, :1].expand(tensor.shape),
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "every second": lambda tensor: tensor.repeat(1, 2)[:, ::2],
    "part of something larger": lambda tensor: torch.cat([tensor, tensor])[: len(tensor)],
    "with a gradient": lambda tensor: tensor.clone().requires_grad_(),
    "not a leaf": lambda tensor: tensor.clone().requires_grad_() * 1,
    "in double precision": lambda tensor: tensor.double(),
}


def unusual_memory(world):
    """All forms at once, each of a matrix of its own."""
    found = {}
    for memory in (lambda model: model, shared):
        base = memory(policy()).state_dict()
        matrices = [name for name, tensor in base.items() if tensor.dim() == 2][-len(FORMS) :]
        state = {**base, **{name: make(base[name]) for name, make in zip(matrices, FORMS.values(), strict=True)}}
        source = Given(policy(), lambda model, state=state: state, {n: t.detach().float() for n, t in state.items()})
        engine = Engine(world)
        found[memory.__name__] = [engine.run(source) for _ in range(3)]
        engine.close()
    return found


@contextlib.contextmanager
def default_device():
    """As scripts set it to a GPU; nothing can be computed on this one."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES = {
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": default_device,
}


def modes_of_torch(world):
    """Two syncs within a mode, two outside, and one within it; repeated ones among them."""
    found = {words: {} for words in MODES}
    for words, mode in MODES.items():
        for model in (shared(policy()), adapted_policy()):
            engine, weights = Engine(world), served_weights(model)
            source = Given(model, expected=weights)
            within = []
            for is_within in (True, True, False, False, True):
                with mode() if is_within else contextlib.nullcontext():
                    within.append(engine.run(source))
            found[words][type(model).__name__] = within
            engine.close()
    return found


SCENARIOS = [
    weights_that_are_not_finite,
    a_first_sync_that_is_not_finite,
    a_merged_weight_that_is_not_finite,
    other_kinds_of_dtype,
    generators_that_fail,
    weights_that_differ_between_ranks,
    unusual_memory,
    modes_of_torch,
]


def on_a_rank(rank, folder):
    if rank >= NUM_RANKS:
        serve_worker(folder, rank - NUM_RANKS)
        return None
    found = {}
    record_everything(folder)
    try:
        world = World(rank, NUM_RANKS, folder)
        world.cut(NUM_RANKS)
        for scenario in SCENARIOS:
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
        return run_ranks(on_a_rank, 2 * NUM_RANKS, folder, init_group=False, timeout_s=240)[:NUM_RANKS]


def on_all(of_ranks, scenario):
    return [found[scenario.__name__] for found in of_ranks]


def text(names):
    return f"{len(names)} weights are" if len(names) > 1 else "1 weight is"


def test_weights_that_are_not_finite_are_named_or_refused(of_ranks):
    for found in on_all(of_ranks, weights_that_are_not_finite):
        for words, syncs in found.items():
            for one in [*syncs["good"], *syncs["after"]]:
                assert one.error is None and not one.differing and one.facts["nonfinite"] == (), words
                assert not any("NaN" in warning for warning in one.facts["warnings"]), words
            infinite, nan, refused = syncs["spoiled"]
            for one, names in ((infinite, (WEIGHT,)), (nan, (WEIGHT, OTHER))):
                assert one.error is None and one.facts["nonfinite"] == names, words
                [warning] = [warning for warning in one.facts["warnings"] if "NaN" in warning]
                assert warning == f"{text(names)} NaN or infinite in part: {', '.join(names)}"
            assert infinite.differing == [], "an infinite number arrives like any other"
            assert refused.error[0] == "WeightsMismatchError" and WEIGHT in refused.error[1], words
            assert not refused.modified, words
    ours, theirs = on_all(of_ranks, weights_that_are_not_finite)
    for words in ours:
        assert ours[words]["spoiled"][2].error == theirs[words]["spoiled"][2].error


def test_a_first_sync_names_them_as_well(of_ranks):
    for found in on_all(of_ranks, a_first_sync_that_is_not_finite):
        assert [one.facts["nonfinite"] for one in found] == [(WEIGHT,)] * 2


def test_what_is_computed_is_found_by_what_it_is_computed_from(of_ranks):
    for found in on_all(of_ranks, a_merged_weight_that_is_not_finite):
        for good, (named, refused) in found.values():
            assert [one.facts["nonfinite"] for one in good] == [(), ()]
            assert len(named.facts["nonfinite"]) == 1 and "k_proj" in named.facts["nonfinite"][0]
            assert refused.error[0] == "WeightsMismatchError" and "k_proj" in refused.error[1] and not refused.modified


def test_other_kinds_of_dtype_are_refused_before_they_are_sent(of_ranks):
    for found in on_all(of_ranks, other_kinds_of_dtype):
        for (words, dtype), (refused, good) in found.items():
            assert refused.error is not None and refused.error[0] == "WeightsMismatchError", (words, dtype)
            assert f"{WEIGHT} is {dtype}, the model expects torch.float32" in refused.error[1]
            assert refused.modified is (words == "generator")
            assert good.error is None and not good.differing


def test_a_generator_that_was_read_before_has_no_weights(of_ranks):
    for found in on_all(of_ranks, generators_that_fail):
        for words in ("whole", "partial"):
            first, again, healed = found[words]
            assert first.error is None and healed.error is None and not healed.differing
            assert again.error == ("ConfigError", "there are no weights to sync") and not again.modified


def test_a_generator_changes_the_engine_once_it_has_given_something(of_ranks):
    for found in on_all(of_ranks, generators_that_fail):
        for number in (0, 4):
            failed, healed = found[number]
            assert failed.error == ("RankFailedError", "ValueError: no more")
            assert failed.modified is (number > 0)
            assert healed.error is None and not healed.differing


def test_the_error_of_ranks_with_other_weights_names_which(of_ranks):
    for found in on_all(of_ranks, weights_that_differ_between_ranks):
        for refused, good in found.values():
            words = "rank 0 has layers.0.self_attn.k_proj.weight where rank 1 has layers.0.self_attn.v_proj.weight"
            assert refused.error == ("WeightsMismatchError", f"the ranks have different weights: {words}")
            assert good.error is None and not good.differing


A, B, C = ("a", "(2,) torch.float32"), ("b", "(3,) torch.float32"), ("c", "(2,) torch.float32")


@pytest.mark.parametrize("lists, words", [
    ([[A, B], [A, B], [A]], "rank 4 has no b"),
    ([[A], [A, B, C], [A]], "rank 2 has no b, c"),
    ([[A, C], [A, B]], "rank 2 has no b; rank 3 has no c"),
    ([[A, B], [B, A]], "rank 2 has a where rank 3 has b"),
    ([[A, B], [A, ("b", "(3,) torch.bfloat16")]], "b is (3,) torch.float32 on rank 2, (3,) torch.bfloat16 on rank 3"),
    ([[A, B], [A, B]], "some of them are sharded in another way"),
    ([None, [A]], "rank 2: no more weights; rank 3: 1 tensors"),
    ([[A], None], "rank 2: 1 tensors; rank 3: no more weights"),
])  # fmt: skip
def test_differences_are_put_into_words(lists, words):
    views = [(2 + i, "no more weights" if one is None else f"{len(one)} tensors") for i, one in enumerate(lists)]
    assert differences(views, lists) == words


def test_unusual_memory_arrives_as_its_values(of_ranks):
    for found in on_all(of_ranks, unusual_memory):
        for words, syncs in found.items():
            assert [(one.error, one.differing) for one in syncs] == [(None, [])] * 3, words


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_torch_in_the_caller_change_nothing(of_ranks, mode):
    for found in on_all(of_ranks, modes_of_torch):
        for model, syncs in found[mode].items():
            assert [(one.error, one.differing) for one in syncs] == [(None, [])] * 5, model
            assert [one.facts["transport"] for one in syncs] == ["ipc"] * 5, model
