"""What the verbs ask of a server, in which order, and what they make of its answers; no server."""

import threading
import time

import pytest
import torch

from tpcolocate.errors import DeadlineError, EngineDeadError, EngineStateError, RequestError, SyncError
from tpcolocate.server.api import ServerApi

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


class Captured:
    """A client that answers as told and keeps what it was asked.

    Args:
        version: That the server reports.
        answers: Path -> what it answers, an error to raise, or a list of them for one call after the other.
        info: More of ``/server_info``.
    """

    url = "http://somewhere"

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


def synced(client, verbs=None):
    verbs = ServerApi(client) if verbs is None else verbs
    verbs.begin_sync(timeout_s=1)
    client.answers["/model_info"] = {"weight_version": "7"}
    verbs.end_sync("7", timeout_s=1)
    return verbs


@pytest.mark.parametrize("version, expected", [
    ("0.5.9", [PAUSE, FLUSH, VERSION, GO_ON]),
    ("0.5.20", [PAUSE, FLUSH, VERSION, GO_ON]),
    ("0.5.21", [PAUSE, FLUSH, BEGIN, END, VERSION, GO_ON]),
])  # fmt: skip
def test_a_sync_pauses_and_drops_the_cache_before_anything_is_sent(version, expected):
    client = Captured(version)
    synced(client)
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
    synced(client)
    assert client.paths[-1] == GO_ON


@pytest.mark.parametrize("mode", ["retract", "abort", "in_place"])
def test_a_sync_leaves_the_users_pause_alone(mode):
    client = Captured()
    verbs = ServerApi(client)
    verbs.pause_generation(mode, timeout_s=1)
    client.asked.clear()
    synced(client, verbs)
    assert sorted(client.paths) == sorted([FLUSH, BEGIN, END, VERSION]) and verbs.paused == mode
    verbs.cancel_sync(timeout_s=1)
    assert GO_ON not in client.paths
    verbs.continue_generation(timeout_s=1)
    verbs.continue_generation(timeout_s=1)  # nothing more
    assert client.paths.count(GO_ON) == 1 and verbs.paused is None


class FlushLater(Captured):
    """Answers a flush once something else was asked for; refuses it if that does not come."""

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
    synced(client)
    assert client.paths[-1] == GO_ON


def test_generation_is_held_before_the_cache_is_dropped_and_a_sync_is_begun_after_it():
    client = FlushLater("0.5.20", "/update_weights_from_tensor")
    verbs = ServerApi(client)
    dropped = verbs.hold_generation(timeout_s=1)
    assert client.paths[0] == PAUSE and not dropped.done()
    verbs.push(["payload"], load_format="a.loader", timeout_s=1)
    dropped.result()
    verbs.begin_sync(timeout_s=1)
    assert client.paths[-1] == FLUSH
    client.other_came.clear()
    client.patience_s = 0.1
    with pytest.raises(EngineStateError):
        verbs.begin_sync(timeout_s=1)  # it has waited for the answer


def test_the_flush_has_been_sent_before_anything_is_asked_for_that_must_not_overtake_it():
    class Slow(Captured):
        def post(self, path, body=None, **options):
            if path == "/flush_cache":
                time.sleep(0.1)
            return super().post(path, body, **options)

    client = Slow()
    ServerApi(client).hold_generation(timeout_s=1)
    assert client.paths[:3] == [PAUSE, FLUSH, BEGIN]


@pytest.mark.parametrize("version, ended", [("0.5.17", []), ("0.5.21", [END])])
def test_a_cache_that_cannot_be_dropped_is_told_before_the_weights_change(version, ended):
    """0.5.10 to 0.5.20 count retracted requests among those that run."""
    client = Captured(version, {"/flush_cache": refused()})
    with pytest.raises(EngineStateError, match=f"SGLang {version} keeps the cache"):
        ServerApi(client).begin_sync(timeout_s=1)
    without_begin = [path for path in client.paths if path != BEGIN]
    assert without_begin == [PAUSE, FLUSH, *ended, GO_ON], "and generation goes on"


def test_under_a_pause_in_place_the_old_cache_stays_and_is_remembered_until_a_flush():
    client = Captured(answers={"/flush_cache": [refused(), refused(), "flushed", "flushed"]})
    verbs = ServerApi(client)
    verbs.pause_generation("in_place", timeout_s=1)
    synced(client, verbs)
    assert verbs.cache_is_stale
    with pytest.raises(EngineStateError, match="requests are in flight"):
        verbs.flush_cache(timeout_s=1)
    assert verbs.cache_is_stale
    verbs.flush_cache(timeout_s=1)
    assert not verbs.cache_is_stale
    synced(client, verbs)
    assert not verbs.cache_is_stale


def test_what_is_no_answer_about_the_cache_is_an_error_of_its_own():
    client = Captured(answers={"/flush_cache": refused("broken", status=500)})
    with pytest.raises(RequestError, match="broken"):
        ServerApi(client).begin_sync(timeout_s=1)
    assert client.paths[-2:] == [END, GO_ON]


@pytest.mark.parametrize("error", [EngineDeadError("gone"), DeadlineError("late")])
def test_a_server_that_does_not_answer_is_not_asked_to_go_on(error):
    client = Captured(answers={"/flush_cache": error})
    with pytest.raises(type(error)):
        ServerApi(client).begin_sync(timeout_s=1)
    assert sorted(client.paths) == sorted([PAUSE, FLUSH, BEGIN])


def test_a_session_that_a_failed_sync_left_open_is_closed_first():
    client = Captured(answers={"/begin_weight_update": [refused("a session is already open"), {"success": True}]})
    ServerApi(client).begin_sync(timeout_s=1)
    assert [path for path in client.paths if path != FLUSH] == [PAUSE, BEGIN, END, BEGIN]
    other = Captured(answers={"/begin_weight_update": refused("something else")})
    with pytest.raises(RequestError, match="something else"):
        ServerApi(other).begin_sync(timeout_s=1)
    assert [path for path in other.paths if path != FLUSH] == [PAUSE, BEGIN, GO_ON]


def test_a_cancelled_sync_lets_generation_go_on_whether_or_not_a_session_was_opened():
    client = Captured()
    verbs = ServerApi(client)
    verbs.cancel_sync(timeout_s=1)
    assert client.paths == [GO_ON]
    verbs.begin_sync(timeout_s=1)
    client.asked.clear()
    verbs.cancel_sync(timeout_s=1)
    assert client.paths == [END, GO_ON]
    verbs.cancel_sync(timeout_s=1)
    assert client.paths == [END, GO_ON, GO_ON], "a session is closed once"


def test_nothing_goes_on_with_weights_of_a_sync_that_failed_half_way():
    client = Captured("0.5.17", {"/flush_cache": ["flushed", refused(), "flushed"]})
    verbs = ServerApi(client)
    verbs.weights_unknown = True
    verbs.begin_sync(timeout_s=1)
    verbs.cancel_sync(timeout_s=1)
    with pytest.raises(EngineStateError):
        verbs.begin_sync(timeout_s=1)
    assert GO_ON not in client.paths
    synced(client, verbs)  # one that succeeded
    assert client.paths[-1] == GO_ON


def test_a_version_that_the_server_does_not_report_is_an_error():
    client = Captured(answers={"/model_info": {"weight_version": "6"}})
    with pytest.raises(SyncError, match="'6' after '7' was set"):
        ServerApi(client).end_sync("7", timeout_s=1)


def test_a_version_that_is_asked_for_before_it_is_set_is_asked_for_again():
    client = Captured(answers={"/model_info": [{"weight_version": "6"}, {"weight_version": "7"}]})
    ServerApi(client).end_sync("7", timeout_s=1)


def test_a_version_that_cannot_be_set_is_told_as_the_server_tells_it():
    answers = {"/update_weight_version": refused("no such thing"), "/model_info": {"weight_version": "6"}}
    with pytest.raises(RequestError, match="no such thing"):
        ServerApi(Captured(answers=answers)).end_sync("7", timeout_s=1)


def test_nothing_waits_for_the_version_to_be_set_but_it_leaves_first():
    class Slow(Captured):
        def post(self, path, body=None, *, timeout_s, params=None, sent=None):
            if path == "/continue_generation":
                assert VERSION in self.paths
                going_on.set()
            found = super().post(path, body, timeout_s=timeout_s, params=params, sent=sent)
            if path == "/update_weight_version":
                assert going_on.wait(30), "the end of the pause was not asked for meanwhile"
            return found

    going_on = threading.Event()
    ServerApi(Slow(answers={"/model_info": {"weight_version": "7"}})).end_sync("7", timeout_s=5)


WEIGHTS = [("a", torch.Size([2, 3]), "bfloat16"), ("b", torch.Size([]), "int8")]


def test_broadcast_weights_are_asked_for_without_a_flush_and_for_the_target_alone():
    client = Captured()
    ServerApi(client).receive(WEIGHTS, group_name="g", timeout_s=1)
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
    ServerApi(client).fall_asleep(["weights"], timeout_s=40)
    assert client.paths == [FLUSH] * 3 + [PAUSE, RELEASE]
    assert client.asked[-2:] == [
        ("/pause_generation", {"mode": "abort"}),
        ("/release_memory_occupation", {"tags": ["weights"]}),
    ]
    busy = Captured(answers={"/flush_cache": refused()})
    with pytest.raises(DeadlineError, match="requests still run after 0.1 s"):
        ServerApi(busy).fall_asleep(["weights"], timeout_s=0.1)
    assert set(busy.paths) == {FLUSH}


def asleep(client, tags):
    verbs = ServerApi(client)
    verbs.fall_asleep(tags, timeout_s=1)
    client.asked.clear()
    return verbs


def test_a_sleeping_server_goes_on_when_all_of_it_is_awake_and_its_weights_are_the_trainers():
    client = Captured("0.5.20")
    verbs = asleep(client, ["weights", "kv_cache"])
    verbs.wake_up(["weights"], weights_lost=True, timeout_s=1)
    synced(client, verbs)
    assert sorted(client.paths) == sorted([RESUME, FLUSH, VERSION]), "held already, and still"
    verbs.weights_unknown = False  # as the engine says after a sync
    client.asked.clear()
    verbs.fall_asleep(["cuda_graph"], timeout_s=1)
    verbs.wake_up(["kv_cache"], weights_lost=False, timeout_s=1)
    verbs.wake_up(["cuda_graph"], weights_lost=False, timeout_s=1)
    assert client.paths == [FLUSH, RELEASE, RESUME, RESUME, GO_ON]
    client.asked.clear()
    synced(client, verbs)
    assert client.paths[0] == PAUSE and client.paths[-1] == GO_ON, "as if it had never slept"


def test_a_server_whose_weights_are_lost_goes_on_with_the_sync_that_brings_them():
    client = Captured("0.5.20")
    verbs = asleep(client, ["weights"])
    verbs.wake_up(["weights"], weights_lost=True, timeout_s=1)
    verbs.begin_sync(timeout_s=1)
    verbs.cancel_sync(timeout_s=1)
    assert client.paths == [RESUME, FLUSH]
    synced(client, verbs)
    assert PAUSE not in client.paths and client.paths.count(GO_ON) == 1 and client.paths[-1] == GO_ON


def test_sleep_leaves_the_users_pause_alone():
    client = Captured()
    verbs = ServerApi(client)
    verbs.pause_generation("retract", timeout_s=1)
    client.asked.clear()
    verbs.fall_asleep(["kv_cache"], timeout_s=1)
    verbs.wake_up(["kv_cache"], weights_lost=False, timeout_s=1)
    assert client.paths == [FLUSH, RELEASE, RESUME]
    verbs.continue_generation(timeout_s=1)
    assert client.paths[-1] == GO_ON and verbs.paused is None


def test_memory_that_cannot_be_released_holds_nothing():
    client = Captured(answers={"/release_memory_occupation": refused("no such tag")})
    verbs = ServerApi(client)
    with pytest.raises(RequestError, match="no such tag"):
        verbs.fall_asleep(["kv_cache"], timeout_s=1)
    assert client.paths == [FLUSH, PAUSE, RELEASE, GO_ON] and not verbs.asleep
