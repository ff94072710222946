"""What may be asked of the engine in which state; every transition."""

import itertools
import signal
from dataclasses import replace

import pytest

from tpcolocate.errors import ConfigError, EngineStateError
from tpcolocate.server.lifecycle import PAUSES, TAGS, Life, Lifecycle, State, WeightsState

pytestmark = pytest.mark.quick

AWAKE = State()


def states():
    for size in range(len(TAGS) + 1):
        for asleep in itertools.combinations(TAGS, size):
            for weights in WeightsState:
                for life in Life:
                    yield State(asleep=frozenset(asleep), weights=weights, life=life)


def words(state):
    """The same in every process, unlike the order in a set: pytest's processes compare what they have collected."""
    return f"{'+'.join(sorted(state.asleep)) or 'awake'}, {state.weights.value}, {state.life.value}"


@pytest.mark.parametrize("state", list(states()), ids=words)
def test_generating_needs_everything_awake_and_the_trainers_weights(state):
    if state in (AWAKE, AWAKE.syncing()):  # during a sync the server has the request wait
        state.check_generate()
    else:
        with pytest.raises(EngineStateError, match="cannot generate"):
            state.check_generate()


@pytest.mark.parametrize("state", list(states()), ids=words)
def test_syncing_needs_the_weights_memory_and_nothing_else(state):
    if state.life is Life.RUNNING and "weights" not in state.asleep:
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
    before = State(asleep=frozenset(asleep))
    chosen, during = before.sleeping(tags)
    assert chosen == released
    assert during.asleep == before.asleep and during.not_awake == frozenset(now)
    assert during.slept() == State(asleep=frozenset(now)) == during.slept().sleep_over()
    assert during.sleep_over() == before, "it failed"


@pytest.mark.parametrize("state", list(states()), ids=words)
@pytest.mark.parametrize("paused", [None, "abort"])
def test_the_server_may_generate_while_awake_and_not_paused_with_the_trainers_weights(state, paused):
    state = replace(state, paused=paused, life=Life.RUNNING)
    assert state.lets_generate is (state == AWAKE)


def test_from_the_start_of_a_sleep_no_request_may_be_made_but_those_of_others_go_on():
    chosen, during = AWAKE.sleeping(["kv_cache"])
    with pytest.raises(EngineStateError, match=r"while asleep \(kv_cache released\)"):
        during.check_generate()
    assert during.lets_generate and not during.slept().lets_generate


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
    assert after == State(
        asleep=frozenset(now), keeps_weights=keeps, weights=WeightsState.LOST if lost else WeightsState.CURRENT
    )


@pytest.mark.parametrize("weights", WeightsState)
def test_waking_other_memory_says_nothing_new_about_the_weights(weights):
    assert State(asleep=frozenset({"kv_cache"}), weights=weights).waking(None)[1].weights is weights


def test_a_copy_of_half_written_weights_is_no_better_than_they_were():
    state = State(keeps_weights=True).syncing().sync_over().sleeping(None)[1].slept().waking(None)[1]
    assert state.weights is WeightsState.UNKNOWN


@pytest.mark.parametrize("call", [State.sleeping, State.waking])
@pytest.mark.parametrize(
    "tags, words", [("weights", "not the string"), (["weight"], "unknown tags"), (["weights", "x"], "unknown tags")]
)
def test_unknown_tags_are_refused(call, tags, words):
    with pytest.raises(ConfigError, match=words):
        call(AWAKE, tags)


def test_a_failed_sync_is_repaired_by_one_that_succeeds_and_nothing_opens_a_closed_engine():
    assert AWAKE.syncing().weights is WeightsState.CHANGING
    failed = AWAKE.syncing().sync_over()
    assert failed.weights is WeightsState.UNKNOWN
    assert failed.syncing().synced() == AWAKE == AWAKE.syncing().synced().sync_over()
    for weights in set(WeightsState) - {WeightsState.CHANGING}:
        before = replace(AWAKE, weights=weights)
        assert before.sync_over() == before == before.synced(), "it ended before anything could change"
        assert before.syncing(partial=True).synced() == before, "what was lost or unknown stays so"
    closed = AWAKE.ending().ended()
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
    assert paused.sleeping(None)[1].slept().waking(None)[1].syncing().synced().paused == mode
    assert paused.continuing() == AWAKE == AWAKE.continuing()
    for other in set(PAUSES) - {mode}:
        with pytest.raises(EngineStateError, match=f"generation is paused with '{mode}'"):
            paused.pausing(other)


@pytest.mark.parametrize("state", list(states()), ids=words)
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
        AWAKE.ending().ended().pausing("abort")


@pytest.mark.parametrize("given, expected", [
    ([None, None], ["6", "7"]),
    (["700", None, None], ["700", "701", "702"]),
    (["epoch 3", None], ["epoch 3", "7"]),  # counted all the same
    (["-3", "1.5", "٣", None], ["-3", "1.5", "٣", "9"]),
])  # fmt: skip
def test_counted_versions_go_on_from_a_version_that_is_a_number(given, expected):
    lifecycle = Lifecycle(State(), weight_version="5")
    assert [lifecycle.next_version(version) for version in given] == expected
    assert Lifecycle(State(), weight_version="default").next_version(None) == "1"


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("before", [WeightsState.CURRENT, WeightsState.LOST])
def test_an_update_that_succeeds_has_a_version_and_one_that_fails_leaves_the_weights_unknown(before, partial):
    lifecycle = Lifecycle(State(weights=before), weight_version="1")
    with lifecycle.weight_update("2", partial=partial) as modified:
        assert lifecycle.state.weights is before
        modified()
        assert lifecycle.state.weights is WeightsState.CHANGING
    assert lifecycle.weight_version == "2"
    assert lifecycle.state == State(weights=before if partial else WeightsState.CURRENT)
    with pytest.raises(ZeroDivisionError), lifecycle.weight_update("3", partial=partial) as modified:
        modified()
        raise ZeroDivisionError
    assert lifecycle.state.weights is WeightsState.UNKNOWN and lifecycle.weight_version == "2"


def test_an_update_that_fails_before_anything_could_change_leaves_the_weights_as_they_are():
    lifecycle = Lifecycle(State(), weight_version="1")
    with pytest.raises(ZeroDivisionError), lifecycle.weight_update("2", partial=False):
        raise ZeroDivisionError
    assert lifecycle.state == State() and lifecycle.weight_version == "1"


def test_a_shutdown_during_an_update_stays():
    lifecycle = Lifecycle(State())
    with lifecycle.weight_update("1", partial=False) as modified:
        modified()
        lifecycle.state = lifecycle.state.ending()  # by another thread
    assert lifecycle.state.closed


def test_a_signal_whose_handler_shuts_down_while_the_state_changes_ends_it():
    def handle(signum, frame):
        lifecycle.state = lifecycle.state.ending()

    class Interrupted(State):
        @property
        def closed(self):
            if signals:
                signal.raise_signal(signals.pop())
            return State.closed.fget(self)

    signals = [signal.SIGUSR1]

    lifecycle = Lifecycle(State())
    lifecycle._state = Interrupted()
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        lifecycle.state = State(paused="abort")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert lifecycle.state == State(paused="abort", life=Life.ENDING)


def test_partial_syncs_that_together_bring_everything_repair_what_was_lost():
    lost = State(asleep=frozenset({"weights"})).waking(None)[1]
    first = lost.syncing(partial=True).lacking(["tower", "norm"]).synced()
    assert first.weights is WeightsState.LOST and first.missing == {"tower", "norm"}
    with pytest.raises(EngineStateError, match="garbage; still missing are norm; tower") as caught:
        first.check_generate()
    assert "enable_weights_cpu_backup" in caught.value.hint
    assert "norm; tower; launch with enable_weights_cpu_backup=True" in first.warn_of_missing()
    again = first.syncing(partial=True).lacking(["tower", "head"]).synced()
    assert again.missing == {"tower"}, "what has come once need not come again"
    assert again.syncing(partial=True).lacking(["norm", "head"]).synced() == AWAKE
    assert AWAKE.warn_of_missing() is None


def test_what_partial_syncs_have_brought_is_lost_with_the_next_sleep_or_failure():
    part = State(weights=WeightsState.LOST).syncing(partial=True).lacking(["tower"]).synced()
    slept = replace(part, asleep=frozenset({"weights"})).waking(None)[1]
    failed = part.syncing(partial=True).lacking(["head"]).sync_over()
    for state in (slept, failed):
        assert state.missing is None
        assert state.syncing(partial=True).lacking(["head"]).synced().missing == {"head"}


def test_a_partial_sync_of_which_it_is_not_known_what_it_lacks_repairs_nothing():
    lost = State(weights=WeightsState.LOST)
    assert lost.syncing(partial=True).lacking(None).synced() == lost
    assert AWAKE.syncing(partial=True).lacking(["tower"]).synced() == AWAKE
    assert lost.syncing().lacking([]).synced() == AWAKE


def test_generation_may_go_on_before_the_end_of_the_sync_that_brings_the_last_ones():
    lifecycle = Lifecycle(State(weights=WeightsState.LOST, missing=frozenset({"tower"})))
    with lifecycle.weight_update("1", partial=True) as modified:
        modified()
        lifecycle.note_missing(["head"])
        assert lifecycle.state.weights_after_sync is WeightsState.CURRENT
    assert lifecycle.state == AWAKE


@pytest.mark.parametrize("mode", PAUSES)
def test_only_a_pause_of_the_user_holds_requests_without_an_end(mode):
    state = State()
    assert state.why_held() is None and state.syncing().why_held() is None
    paused = state.pausing(mode)
    assert mode in paused.why_held() and "continue_generation()" in paused.why_held()
    assert paused.continuing().why_held() is None
