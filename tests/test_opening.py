"""The way to the workers, beside other work: errors come out, and nobody who comes late is left waiting.

The requests are the real ones, and so are the sockets and the receiver; what stands in for SGLang takes up one request
after the other, as its scheduler does, in the order that a test needs.
"""

import base64
import pickle
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from test_requests import BEGIN, END, FLUSH, GO_ON, PAUSE, Captured, refused

from tpcolocate.errors import DeadlineError, EngineDeadError, EngineStateError, RequestError, SyncError
from tpcolocate.in_server.tpcolocate_receiver import receive
from tpcolocate.server.api import ServerApi
from tpcolocate.weights.transport import connection as module
from tpcolocate.weights.transport.connection import WorkerConnection

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

UPDATE, LEFT = "update_weights_from_tensor", "the workers have left"
PATIENCE_S = 40.0


class Workers:
    def __init__(self, greetings):
        self.greetings = greetings
        self.closed = threading.Event()

    def greet(self, *, timeout_s):
        return self.greetings

    def close(self):
        self.closed.set()


class Server:
    """An engine that takes its time.

    Args:
        error: Of `hold_generation`.
        greetings: Of the workers.
    """

    def __init__(self, error=None, greetings=None):
        self.error = error
        self.go_on = threading.Event()
        self.dropped = Future()
        self.asked = []
        self.workers = Workers({0: {"error": None, "plans": "a"}} if greetings is None else greetings)

    def hold_generation(self, *, timeout_s):
        self.asked.append("hold_generation")
        assert self.go_on.wait(30)
        if self.error is not None:
            raise self.error
        return self.dropped

    def await_workers(self, path, *, tp_size):
        self.path = path
        return self.workers

    def call_workers(self, workers, session, *, loader, tp_size, timeout_s):
        assert workers is self.workers
        self.asked.append((self.path.name, session, loader, tp_size))


class OneByOne(Captured):
    """What stands in for SGLang: one request after the other, and our receiver inside an update.

    Args:
        version: That it reports.
        behind: Whether it takes up an update before the flush, and not the other way round.
        flush_s: How long a flush takes, at least.
        flushed: What it answers, or an error to raise.
    """

    def __init__(self, version="0.5.20", *, behind=False, flush_s=0.0, flushed="flushed"):
        super().__init__(version, {"/flush_cache": flushed})
        self.behind, self.flush_s = behind, flush_s
        self.happened = []
        self.sessions = []
        self._turn = threading.Lock()
        self._asked, self._taken_up, self._flushed = threading.Event(), threading.Event(), threading.Event()
        self._model = torch.nn.Linear(2, 2)

    def post(self, path, body=None, *, timeout_s, params=None, sent=None):
        name = path.strip("/")
        if name == FLUSH:
            sent()
            return self._flush(path, body)
        if name == UPDATE:
            return self._update(path, body)
        if name in (PAUSE, GO_ON):  # SGLang answers these before its scheduler has seen them
            self.happened.append(name)
            return super().post(path, body, timeout_s=timeout_s)
        if name == BEGIN:
            self._wait_for_the_flush()
        with self._turn:
            self.happened.append(name)
            return super().post(path, body, timeout_s=timeout_s)

    def _wait_for_the_flush(self):
        self._asked.set()
        assert self.behind or self._flushed.wait(PATIENCE_S)

    def _flush(self, path, body):
        if self.behind:
            assert self._taken_up.wait(PATIENCE_S)
        with self._turn:
            try:
                # Nobody is to wait for this answer before the next request.
                if not self._asked.wait(PATIENCE_S):
                    raise RequestError("nothing was asked for meanwhile", status=500)
                time.sleep(self.flush_s)
                self.happened.append(FLUSH)
                return super().post(path, body, timeout_s=0)
            finally:
                self._flushed.set()

    def _update(self, path, body):
        self._wait_for_the_flush()
        with self._turn:
            self._taken_up.set()
            self.happened.append(UPDATE)
            [payload] = body["serialized_named_tensors"]
            [(name, command)] = pickle.loads(base64.b64decode(payload))
            self.sessions.append(command)
            receive(self._model, [(name, command)])
            self.happened.append(LEFT)
            return super().post(path, body, timeout_s=0)


def opened(server, tp_size=1, *, folder=Path("folder"), timeout_s=30.0):
    return WorkerConnection(server, folder=folder, loader="a.loader", tp_size=tp_size, timeout_s=timeout_s)


@pytest.fixture
def reach(tmp_path, monkeypatch):
    """A function that begins to reach the receiver of a `OneByOne`."""
    openings = []

    def begin(client, **options):
        if not client.behind and client.flush_s == 0:
            monkeypatch.setattr(module, "_ANSWER_S", PATIENCE_S)  # the answer comes at once, if threads get to run
        openings.append(opened(ServerApi(client), folder=tmp_path, **options))
        return openings[-1]

    yield begin
    for opening in openings:
        opening.close(timeout_s=PATIENCE_S)
    assert list(tmp_path.iterdir()) == []


def answers(opening):
    """Whether the workers of an opening carry out a command."""
    opening.workers.post({0: {"do": "run", "for": 0}}, 0)
    return opening.workers.collect(0, timeout_s=PATIENCE_S)[0]["error"] is None


def test_the_workers_are_reached_while_something_else_is_done():
    server = Server()
    opening = opened(server)
    assert server.asked in ([], ["hold_generation"]), "not called yet"
    server.go_on.set()
    server.dropped.set_result(None)
    assert opening.result() == {0: {"error": None, "plans": "a"}} and opening.workers is server.workers
    assert server.asked == ["hold_generation", (f"{opening.session}.sock", opening.session, "a.loader", 1)]
    opening.close(timeout_s=1)
    assert server.workers.closed.is_set()


def test_no_worker_is_reached_where_none_is_needed_and_the_cache_is_dropped_all_the_same():
    server = Server()
    server.go_on.set()
    opening = opened(server, tp_size=0)
    opening.close(timeout_s=0.1)
    assert not opening._task.done(), "the cache is not dropped yet"
    server.dropped.set_result(None)
    assert opening.result() is None and opening.workers is None and server.asked == ["hold_generation"]
    opening.close(timeout_s=1)


def test_what_goes_wrong_on_the_way_is_raised_where_it_is_waited_for():
    server = Server(error=EngineStateError("asleep"))
    server.go_on.set()
    with pytest.raises(EngineStateError, match="asleep"):
        opened(server).result()
    server = Server(greetings={0: {"error": None}, 1: {"error": "another rank's command"}})
    server.go_on.set()
    server.dropped.set_result(None)
    with pytest.raises(SyncError, match="TP rank 1: another rank's command"):
        opened(server, tp_size=2).result()


def test_workers_are_not_called_after_the_end():
    server = Server()
    opening = opened(server)
    started = time.monotonic()
    opening.close(timeout_s=0.1)
    assert time.monotonic() - started < 30 and server.workers.closed.is_set()
    server.go_on.set()
    with pytest.raises(SyncError, match="given up before the workers were called"):
        opening.result()
    assert server.asked == ["hold_generation"]


def test_a_place_for_the_workers_that_cannot_be_had_is_told(monkeypatch):
    server = Server()
    server.go_on.set()
    server.dropped.set_result(None)
    monkeypatch.setattr(
        server, "await_workers", lambda path, tp_size: (_ for _ in ()).throw(SyncError("no such folder"))
    )
    opening = opened(server)
    with pytest.raises(SyncError, match="no such folder"):
        opening.result()
    opening.close(timeout_s=1)


@pytest.mark.parametrize("flush_s", [0.0, 3 * module._ANSWER_S])
def test_the_update_is_asked_for_beside_the_flush_however_long_that_takes(reach, flush_s):
    """Were they made one after the other, the flush would be refused here."""
    client = OneByOne(flush_s=flush_s)
    opening = reach(client)
    opening.result()
    assert answers(opening) and len(client.sessions) == 1
    assert client.happened == [PAUSE, FLUSH, UPDATE]


def test_an_answer_that_comes_shortly_after_the_workers_is_waited_for(monkeypatch):
    monkeypatch.setattr(module, "_ANSWER_S", PATIENCE_S)
    server = Server()
    server.go_on.set()
    threading.Timer(0.05, server.dropped.set_result, [None]).start()
    opening = opened(server)
    opening.result()
    assert len(server.asked) == 2 and not server.workers.closed.is_set()


@pytest.mark.parametrize("version", ["0.5.20", "0.5.21"])
def test_a_flush_behind_the_update_is_let_through_and_the_workers_are_reached_again(reach, version):
    """The receiver holds no session twice: were it the same one, nobody would come."""
    client = OneByOne(version, behind=True)
    opening = reach(client)
    opening.result()
    assert answers(opening) and len(client.sessions) == 2
    begun = [BEGIN] if version == "0.5.21" else []
    assert client.happened == [PAUSE, *begun, UPDATE, LEFT, FLUSH, UPDATE]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("version, answer, error, words", [
    ("0.5.20", refused(), EngineStateError, "keeps the cache of the old ones"),
    ("0.5.21", refused(), EngineStateError, "keeps the cache of the old ones"),
    ("0.5.20", refused("broken", status=500), RequestError, "broken"),
])  # fmt: skip
def test_a_cache_that_is_not_dropped_ends_the_sync_and_generation_goes_on_once_the_workers_have_left(
    reach, behind, version, answer, error, words
):
    client = OneByOne(version, behind=behind, flushed=answer)
    opening = reach(client)
    with pytest.raises(error, match=words):
        opening.result()
    opening.cancel(timeout_s=PATIENCE_S)
    begun, ended = ([BEGIN], [END]) if version == "0.5.21" else ([], [])
    opened = [*begun, UPDATE, LEFT, FLUSH] if behind else [FLUSH, *begun, UPDATE, LEFT]
    assert client.happened == [PAUSE, *opened, *ended, GO_ON]


@pytest.mark.parametrize("behind", [False, True])
def test_a_server_that_is_gone_is_not_asked_to_go_on(reach, behind):
    client = OneByOne(behind=behind, flushed=EngineDeadError("gone"))
    opening = reach(client)
    with pytest.raises(EngineDeadError, match="gone"):
        opening.result()
    opening.cancel(timeout_s=PATIENCE_S)
    assert client.happened[-1] == (FLUSH if behind else LEFT)


def test_a_flush_that_is_never_answered_meets_the_deadline_and_the_workers_have_left(reach):
    class Silent(OneByOne):
        def _flush(self, path, body):
            super()._flush(path, body)
            assert self.limit_s <= PATIENCE_S
            raise DeadlineError("no answer")

        def post(self, path, body=None, *, timeout_s, **options):
            if path == "/flush_cache":
                self.limit_s = timeout_s
            return super().post(path, body, timeout_s=timeout_s, **options)

    client = Silent(behind=True)
    opening = reach(client, timeout_s=PATIENCE_S)
    with pytest.raises(DeadlineError, match="no answer"):
        opening.result()
    assert client.happened == [PAUSE, UPDATE, LEFT, FLUSH]
