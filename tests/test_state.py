"""What may be asked of the engine in which state; every transition."""

import itertools
from dataclasses import replace

import pytest

from tpcolocate.errors import ConfigError, EngineStateError
from tpcolocate.server.lifecycle import PAUSES, TAGS, State, Weights

pytestmark = pytest.mark.quick

AWAKE = State()


def states():
    for size in range(len(TAGS) + 1):
        for asleep in itertools.combinations(TAGS, size):
            for weights in Weights:
                for closed in (False, True):
                    yield State(asleep=frozenset(asleep), weights=weights, closed=closed)


@pytest.mark.parametrize("state", list(states()), ids=str)
def test_generating_needs_everything_awake_and_the_trainers_weights(state):
    if state in (AWAKE, AWAKE.syncing()):  # during a sync the server has the request wait
        state.check_generate()
    else:
        with pytest.raises(EngineStateError, match="cannot generate"):
            state.check_generate()


@pytest.mark.parametrize("state", list(states()), ids=str)
def test_syncing_needs_the_weights_memory_and_nothing_else(state):
    if not state.closed and "weights" not in state.asleep:
        state.check_sync()  # also from LOST and UNKNOWN: it is what repairs them
    else:
        with pytest.raises(EngineStateError, match="cannot sync"):
            state.check_sync()


@pytest.mark.parametrize("asleep, tags, released, now", [
    ((), None, TAGS, TAGS),
    ((), ["weights"], ("weights",), ("weights",)),
    (("weights",), None, ("kv_cache", "cuda_graph"), TAGS),
    (("weights",), ["weights"], (), ("weights",)),
    (TAGS, None, (), TAGS),
    ((), [], (), ()),
    ((), ["weights", "kv_cache", "weights"], ("kv_cache", "weights"), ("kv_cache", "weights")),
])  # fmt: skip
def test_sleeping_releases_what_is_not_yet_released(asleep, tags, released, now):
    chosen, after = State(asleep=frozenset(asleep)).sleeping(tags)
    assert chosen == released
    assert after == State(asleep=frozenset(now))


@pytest.mark.parametrize("asleep, tags, resumed, now", [
    (TAGS, None, TAGS, ()),
    (("kv_cache",), None, ("kv_cache",), ()),
    (("kv_cache",), ["weights"], (), ("kv_cache",)),  # SGLang would die of it
    ((), None, (), ()),
    (TAGS, ["weights"], ("weights",), ("kv_cache", "cuda_graph")),
])  # fmt: skip
@pytest.mark.parametrize("keeps", [False, True])
def test_waking_resumes_what_is_released_and_loses_weights_without_a_copy(asleep, tags, resumed, now, keeps):
    chosen, after = State(asleep=frozenset(asleep), keeps_weights=keeps).waking(tags)
    lost = "weights" in resumed and not keeps
    assert chosen == resumed
    assert after == State(asleep=frozenset(now), keeps_weights=keeps, weights=Weights.LOST if lost else Weights.CURRENT)


@pytest.mark.parametrize("weights", Weights)
def test_waking_other_memory_says_nothing_new_about_the_weights(weights):
    assert State(asleep=frozenset({"kv_cache"}), weights=weights).waking(None)[1].weights is weights


def test_a_copy_of_half_written_weights_is_no_better_than_they_were():
    state = State(keeps_weights=True).syncing().sync_over().sleeping(None)[1].waking(None)[1]
    assert state.weights is Weights.UNKNOWN


@pytest.mark.parametrize("call", [State.sleeping, State.waking])
@pytest.mark.parametrize(
    "tags, words", [("weights", "not the string"), (["weight"], "unknown tags"), (["weights", "x"], "unknown tags")]
)
def test_unknown_tags_are_refused(call, tags, words):
    with pytest.raises(ConfigError, match=words):
        call(AWAKE, tags)


def test_a_failed_sync_is_repaired_by_one_that_succeeds_and_nothing_opens_a_closed_engine():
    assert AWAKE.syncing().weights is Weights.CHANGING
    failed = AWAKE.syncing().sync_over()
    assert failed.weights is Weights.UNKNOWN and failed.synced() == AWAKE == AWAKE.syncing().synced().sync_over()
    for weights in set(Weights) - {Weights.CHANGING}:
        before = replace(AWAKE, weights=weights)
        assert before.sync_over() == before, "it was refused before anything could change"
    closed = AWAKE.shut_down()
    for call in (
        lambda: closed.sleeping(None),
        lambda: closed.waking(None),
        closed.check_sync,
        closed.synced().check_generate,
    ):
        with pytest.raises(EngineStateError, match="shut down"):
            call()


@pytest.mark.parametrize("mode", PAUSES)
def test_a_pause_is_kept_until_generation_goes_on(mode):
    paused = AWAKE.pausing(mode)
    assert paused == State(paused=mode) == paused.pausing(mode)
    paused.check_generate()  # the request waits in the server
    paused.check_sync()
    assert paused.sleeping(None)[1].waking(None)[1].synced().paused == mode
    assert paused.continuing() == AWAKE == AWAKE.continuing()
    for other in set(PAUSES) - {mode}:
        with pytest.raises(EngineStateError, match=f"generation is paused with '{mode}'"):
            paused.pausing(other)


@pytest.mark.parametrize("state", list(states()), ids=str)
@pytest.mark.parametrize("paused", [None, "retract"])
def test_generation_goes_on_only_where_it_may(state, paused):
    state = replace(state, paused=paused)
    if replace(state, paused=None) == AWAKE:
        state.continuing()
    else:
        with pytest.raises(EngineStateError, match="cannot continue generation"):
            state.continuing()


def test_unknown_pauses_and_closed_engines_are_refused():
    with pytest.raises(ConfigError, match="unknown mode 'stop'"):
        AWAKE.pausing("stop")
    with pytest.raises(EngineStateError, match="shut down"):
        AWAKE.shut_down().pausing("abort")
