"""The requests that syncs, pauses and sleeps make, their order, and what follows from the answers; no server."""

import threading
import time

import pytest
import torch

from tpcolocate.errors import DeadlineError, EngineDeadError, EngineStateError, RequestError, SyncError
from tpcolocate.server.api import ServerApi
from tpcolocate.server.generation import GenerationHold
from tpcolocate.server.lifecycle import Lifecycle, State, WeightsState
from tpcolocate.server.weight_updates import WeightUpdates

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


class Captured:
    """A client with given answers that keeps what it was asked.

    Args:
        version: That the server reports.
        answers: Path -> the answer, an error to raise, or a list of them for one call after the other.
        info: More of ``/server_info``.
    """

    url = "http://somewhere"
    evidence = None

    def __init__(self, version="0.5.21", answers=None, **info):
        self.info = {"version": version, **info}
        self.answers = {} if answers is None else dict(answers)
        self.asked = []

    def get(self, path, *, timeout_s):
        return self.info if path == "/server_info" else self._answer(path)

    def post(self, path, body=None, *, timeout_s, params=None, sent=None):
        self.asked.append((path, body))
        if sent is not None:
            sent()
        return self._answer(path)

    def _answer(self, path):
        answer = self.answers.get(path, {"success": True})
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def paths(self):
        return [path.strip("/") for path, _ in self.asked]


def refused(words="no", status=400):
    return RequestError(words, status=status)


PAUSE, FLUSH, BEGIN, END = "pause_generation", "flush_cache", "begin_weight_update", "end_weight_update"
VERSION, GO_ON = "update_weight_version", "continue_generation"


class Owner:
    """The calls of an owner to its server, with the changes of state that the engine makes around them."""

    def __init__(self, client, state=State()):  # noqa: B008  (frozen)
        self.client = client
        self.lifecycle = Lifecycle(state)
        self.api = ServerApi(client)
        self.generation = GenerationHold(self.api, self.lifecycle)
        self.updates = WeightUpdates(self.api, self.generation, self.lifecycle)

    def pause(self, mode):
        self.api.pause_generation(mode, timeout_s=30)
        self.lifecycle.state = self.lifecycle.state.pausing(mode)

    def continue_generation(self):
        self.generation.continue_generation(timeout_s=30)
        self.lifecycle.state = self.lifecycle.state.continuing()

    def sleep(self, tags, *, timeout_s=30):
        chosen, self.lifecycle.state = self.lifecycle.state.sleeping(tags)
        try:
            self.generation.release_memory(chosen, timeout_s=timeout_s)
            self.lifecycle.state = self.lifecycle.state.slept()
        finally:
            self.lifecycle.state = self.lifecycle.state.sleep_over()

    def wake(self, tags):
        chosen, after = self.lifecycle.state.waking(tags)
        self.generation.resume_memory(chosen, after, timeout_s=30)
        self.lifecycle.state = after

    def sync(self, *, partial=False):
        self.updates.begin_sync(timeout_s=30)
        self.client.answers["/model_info"] = {"weight_version": "7"}
        with self.lifecycle.weight_update("7", partial=partial) as modified:
            modified()
            self.updates.end_sync("7", timeout_s=30)


@pytest.mark.parametrize("version, expected", [
    ("0.5.9", [PAUSE, FLUSH, VERSION, GO_ON]),
    ("0.5.20", [PAUSE, FLUSH, VERSION, GO_ON]),
    ("0.5.21", [PAUSE, FLUSH, BEGIN, END, VERSION, GO_ON]),
])  # fmt: skip
def test_a_sync_pauses_and_drops_the_cache_before_anything_is_sent(version, expected):
    client = Captured(version)
    Owner(client).sync()
    # Some are made at once: in no order, but for the ends of the pause and the session.
    assert sorted(client.paths) == sorted(expected) and (client.paths[0], client.paths[-1]) == (PAUSE, GO_ON)
    sessions = [path for path in client.paths if path in (BEGIN, END)]
    assert sessions == [path for path in expected if path in (BEGIN, END)]
    assert client.paths.index(FLUSH) < client.paths.index(VERSION)
    bodies = dict(client.asked)
    assert bodies["/pause_generation"] == {"mode": "retract"}
    assert bodies["/update_weight_version"] == {"new_version": "7", "abort_all_requests": False}


def test_nothing_is_generated_before_a_session_is_closed():
    class Slow(Captured):
        def _answer(self, path):
            if path == "/end_weight_update":
                time.sleep(0.3)
                assert GO_ON not in self.paths
            return super()._answer(path)

    client = Slow("0.5.21")
    Owner(client).sync()
    assert client.paths[-1] == GO_ON


@pytest.mark.parametrize("mode", ["retract", "abort", "in_place"])
def test_a_sync_leaves_the_users_pause_alone(mode):
    client = Captured()
    owner = Owner(client)
    owner.pause(mode)
    client.asked.clear()
    owner.sync()
    assert sorted(client.paths) == sorted([FLUSH, BEGIN, END, VERSION]) and owner.lifecycle.state.paused == mode
    owner.updates.cancel_sync(timeout_s=30)
    assert GO_ON not in client.paths
    owner.continue_generation()
    assert client.paths.count(GO_ON) == 1
    owner.sync()
    assert client.paths.count(PAUSE) == 1 and client.paths[-1] == GO_ON, "as if there had been no pause"


class FlushLater(Captured):
    """Answers a flush once another request has come; refuses it if that does not come."""

    def __init__(self, version, other):
        super().__init__(version)
        self.other, self.other_came = other, threading.Event()
        self.patience_s = 30.0

    def _answer(self, path):
        if path == self.other:
            self.other_came.set()
        if path == "/flush_cache" and not self.other_came.wait(self.patience_s):
            raise refused()
        return super()._answer(path)


def test_a_session_is_opened_beside_the_flush():
    client = FlushLater("0.5.21", "/begin_weight_update")
    Owner(client).sync()
    assert client.paths[-1] == GO_ON


def test_generation_is_held_before_the_cache_is_dropped_and_a_sync_is_begun_after_it():
    client = FlushLater("0.5.20", "/update_weights_from_tensor")
    updates = Owner(client).updates
    dropped = updates.hold_generation(timeout_s=30)
    assert client.paths[0] == PAUSE and not dropped.done()
    updates.push(["payload"], load_format="a.loader", timeout_s=30)
    dropped.result()
    updates.begin_sync(timeout_s=30)
    assert client.paths[-1] == FLUSH
    client.other_came.clear()
    client.patience_s = 0.1
    with pytest.raises(EngineStateError):
        updates.begin_sync(timeout_s=30)  # it has waited for the answer


def test_the_flush_is_sent_before_any_request_that_must_not_overtake_it():
    class Slow(Captured):
        def post(self, path, body=None, **options):
            if path == "/flush_cache":
                time.sleep(0.1)
            return super().post(path, body, **options)

    client = Slow()
    Owner(client).updates.hold_generation(timeout_s=30)
    assert client.paths[:3] == [PAUSE, FLUSH, BEGIN]


@pytest.mark.parametrize("version, ended", [("0.5.17", []), ("0.5.21", [END])])
def test_a_cache_that_cannot_be_dropped_is_an_error_before_the_weights_change(version, ended):
    """0.5.10 to 0.5.20 count retracted requests among those that run."""
    client = Captured(version, {"/flush_cache": refused()})
    with pytest.raises(EngineStateError, match=f"SGLang {version} keeps the cache"):
        Owner(client).updates.begin_sync(timeout_s=30)
    without_begin = [path for path in client.paths if path != BEGIN]
    assert without_begin == [PAUSE, FLUSH, *ended, GO_ON], "and generation goes on"


def test_under_a_pause_in_place_the_old_cache_stays_and_is_remembered_until_a_flush():
    client = Captured(answers={"/flush_cache": [refused(), refused(), "flushed", "flushed"]})
    owner = Owner(client)
    owner.pause("in_place")
    owner.sync()
    assert owner.generation.cache_is_stale
    with pytest.raises(EngineStateError, match="requests are in flight"):
        owner.generation.flush_cache(timeout_s=30)
    assert owner.generation.cache_is_stale
    owner.generation.flush_cache(timeout_s=30)
    assert not owner.generation.cache_is_stale
    owner.sync()
    assert not owner.generation.cache_is_stale


def test_a_flush_that_fails_otherwise_is_an_error_of_its_own():
    client = Captured(answers={"/flush_cache": refused("broken", status=500)})
    with pytest.raises(RequestError, match="broken"):
        Owner(client).updates.begin_sync(timeout_s=30)
    assert client.paths[-2:] == [END, GO_ON]


@pytest.mark.parametrize("error", [EngineDeadError("gone"), DeadlineError("late")])
def test_a_server_that_does_not_answer_is_not_asked_to_go_on(error):
    client = Captured(answers={"/flush_cache": error})
    with pytest.raises(type(error)):
        Owner(client).updates.begin_sync(timeout_s=30)
    assert sorted(client.paths) == sorted([PAUSE, FLUSH, BEGIN])


def test_a_session_that_a_failed_sync_left_open_is_closed_first():
    client = Captured(answers={"/begin_weight_update": [refused("a session is already open"), {"success": True}]})
    Owner(client).updates.begin_sync(timeout_s=30)
    assert [path for path in client.paths if path != FLUSH] == [PAUSE, BEGIN, END, BEGIN]
    other = Captured(answers={"/begin_weight_update": refused("something else")})
    with pytest.raises(RequestError, match="something else"):
        Owner(other).updates.begin_sync(timeout_s=30)
    assert [path for path in other.paths if path != FLUSH] == [PAUSE, BEGIN, GO_ON]


def test_a_cancelled_sync_lets_generation_go_on_whether_or_not_a_session_was_opened():
    client = Captured()
    updates = Owner(client).updates
    updates.cancel_sync(timeout_s=30)
    assert client.paths == [GO_ON]
    updates.begin_sync(timeout_s=30)
    client.asked.clear()
    updates.cancel_sync(timeout_s=30)
    assert client.paths == [END, GO_ON]
    updates.cancel_sync(timeout_s=30)
    assert client.paths == [END, GO_ON, GO_ON], "a session is closed once"


@pytest.mark.parametrize("weights", [WeightsState.UNKNOWN, WeightsState.LOST])
def test_only_a_full_sync_lets_generation_go_on_with_weights_that_were_not_the_trainers(weights):
    client = Captured("0.5.17", {"/flush_cache": ["flushed", refused(), "flushed", "flushed"]})
    owner = Owner(client, State(weights=weights))
    owner.updates.begin_sync(timeout_s=30)
    owner.updates.cancel_sync(timeout_s=30)
    with pytest.raises(EngineStateError):
        owner.updates.begin_sync(timeout_s=30)
    owner.sync(partial=True)
    assert GO_ON not in client.paths
    owner.sync()
    assert client.paths[-1] == GO_ON
    client.asked.clear()
    client.answers.clear()
    owner.sync(partial=True)
    assert client.paths[-1] == GO_ON, "it has changed nothing for the worse"


def test_a_version_that_the_server_does_not_report_is_an_error():
    client = Captured(answers={"/model_info": {"weight_version": "6"}})
    with pytest.raises(SyncError, match="'6' after '7' was set"):
        Owner(client).updates.end_sync("7", timeout_s=30)


def test_a_version_that_is_asked_for_before_it_is_set_is_asked_for_again():
    client = Captured(answers={"/model_info": [{"weight_version": "6"}, {"weight_version": "7"}]})
    Owner(client).updates.end_sync("7", timeout_s=30)


def test_a_version_that_cannot_be_set_is_an_error_with_the_servers_message():
    answers = {"/update_weight_version": refused("no such thing"), "/model_info": {"weight_version": "6"}}
    with pytest.raises(RequestError, match="no such thing"):
        Owner(Captured(answers=answers)).updates.end_sync("7", timeout_s=30)


def test_nothing_waits_for_the_version_to_be_set_but_it_leaves_first():
    class Slow(Captured):
        def post(self, path, body=None, *, timeout_s, params=None, sent=None):
            if path == "/continue_generation":
                assert VERSION in self.paths
                continued.set()
            answer = super().post(path, body, timeout_s=timeout_s, params=params, sent=sent)
            if path == "/update_weight_version":
                assert continued.wait(30), "the end of the pause was not asked for meanwhile"
            return answer

    continued = threading.Event()
    Owner(Slow(answers={"/model_info": {"weight_version": "7"}})).updates.end_sync("7", timeout_s=5)


WEIGHTS = [("a", torch.Size([2, 3]), "bfloat16"), ("b", torch.Size([]), "int8")]


def test_broadcast_weights_are_asked_for_without_a_flush_and_for_the_target_alone():
    client = Captured()
    ServerApi(client).receive(WEIGHTS, group_name="g", timeout_s=30)
    assert client.asked == [(
        "/update_weights_from_distributed",
        {"names": ["a", "b"], "shapes": [[2, 3], []], "dtypes": ["bfloat16", "int8"], "group_name": "g",
         "flush_cache": False, "selector": "target"},
    )]  # fmt: skip


@pytest.mark.parametrize("answer", [refused("not received"), {"success": False, "message": "not received"}])
def test_weights_that_were_not_received_are_a_failed_sync(answer):
    with pytest.raises(SyncError, match="did not take the broadcast weights: not received"):
        ServerApi(Captured(answers={"/update_weights_from_distributed": answer})).receive(
            WEIGHTS, group_name="g", timeout_s=1
        )


RELEASE, RESUME = "release_memory_occupation", "resume_memory_occupation"


def test_before_memory_is_released_the_server_is_waited_for_and_holds_what_comes():
    client = Captured(answers={"/flush_cache": [refused(), refused(), "flushed"]})
    Owner(client).sleep(["weights"], timeout_s=40)
    assert client.paths == [FLUSH] * 3 + [PAUSE, RELEASE]
    assert client.asked[-2:] == [
        ("/pause_generation", {"mode": "abort"}),
        ("/release_memory_occupation", {"tags": ["weights"]}),
    ]
    busy = Captured(answers={"/flush_cache": refused()})
    with pytest.raises(DeadlineError, match="requests still run after 0.1 s"):
        Owner(busy).sleep(["weights"], timeout_s=0.1)
    assert set(busy.paths) == {FLUSH}


def test_a_sync_called_off_before_memory_is_released_lets_requests_from_elsewhere_finish():
    """As `Engine.sleep` does when mappings are released first: no new request may come, but the others must end."""
    client = Captured()
    owner = Owner(client)
    _, owner.lifecycle.state = owner.lifecycle.state.sleeping(["weights"])
    owner.updates.begin_sync(timeout_s=30)
    owner.updates.cancel_sync(timeout_s=30)
    assert client.paths[0] == PAUSE and client.paths[-1] == GO_ON


def asleep(client, tags):
    owner = Owner(client)
    owner.sleep(tags)
    client.asked.clear()
    return owner


def test_a_sleeping_server_goes_on_when_all_of_it_is_awake_and_its_weights_are_the_trainers():
    client = Captured("0.5.20")
    owner = asleep(client, ["weights", "kv_cache"])
    owner.wake(["weights"])
    owner.sync()
    assert sorted(client.paths) == sorted([RESUME, FLUSH, VERSION]), "held already, and still"
    client.asked.clear()
    owner.sleep(["cuda_graph"])
    owner.wake(["kv_cache"])
    owner.wake(["cuda_graph"])
    assert client.paths == [FLUSH, RELEASE, RESUME, RESUME, GO_ON]
    client.asked.clear()
    owner.sync()
    assert client.paths[0] == PAUSE and client.paths[-1] == GO_ON, "as if it had never slept"


def test_a_server_whose_weights_are_lost_goes_on_with_the_sync_that_brings_them():
    client = Captured("0.5.20")
    owner = asleep(client, ["weights"])
    owner.wake(["weights"])
    owner.updates.begin_sync(timeout_s=30)
    owner.updates.cancel_sync(timeout_s=30)
    assert client.paths == [RESUME, FLUSH]
    owner.sync(partial=True)
    assert GO_ON not in client.paths
    owner.sync()
    assert PAUSE not in client.paths and client.paths.count(GO_ON) == 1 and client.paths[-1] == GO_ON


def test_a_sleep_or_wake_that_only_the_server_has_seen_can_be_made_again():
    """As after a rank was interrupted before it could agree on it: the state of the engine is that of before."""
    client = Captured("0.5.20")
    owner = Owner(client)
    owner.generation.release_memory(["weights", "kv_cache"], timeout_s=30)
    client.asked.clear()
    with pytest.raises(EngineStateError, match="has released their memory"):
        owner.updates.begin_sync(timeout_s=30)
    assert RELEASE not in client.paths and PAUSE not in client.paths
    assert GO_ON not in client.paths, "a forward without its weights would end the server"
    client.asked.clear()
    owner.sleep(["weights", "kv_cache"])
    assert client.paths == [], "it is released"
    _, after = owner.lifecycle.state.waking(None)
    owner.generation.resume_memory(["weights", "kv_cache"], after, timeout_s=30)
    owner.wake(None)
    assert client.paths.count(RESUME) == 1
    owner.sync()
    assert client.paths[-1] == GO_ON


def test_sleep_leaves_the_users_pause_alone():
    client = Captured()
    owner = Owner(client)
    owner.pause("retract")
    client.asked.clear()
    owner.sleep(["kv_cache"])
    owner.wake(["kv_cache"])
    assert client.paths == [FLUSH, RELEASE, RESUME]
    owner.continue_generation()
    assert client.paths[-1] == GO_ON


def test_memory_that_cannot_be_released_holds_nothing():
    client = Captured(answers={"/release_memory_occupation": refused("no such tag")})
    owner = Owner(client)
    with pytest.raises(RequestError, match="no such tag"):
        owner.sleep(["kv_cache"])
    assert client.paths == [FLUSH, PAUSE, RELEASE, GO_ON] and not owner.generation.paused_for_sleep
