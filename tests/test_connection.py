"""The way to the workers, beside other work: errors come out, and no one who comes late is left waiting.

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
from test_api import BEGIN, END, FLUSH, GO_ON, PAUSE, Captured, Owner, refused

from tpcolocate.deadline import Deadline
from tpcolocate.errors import DeadlineError, EngineDeadError, EngineStateError, RequestError, SyncError
from tpcolocate.in_server.tpcolocate_receiver import receive
from tpcolocate.in_server.tpcolocate_receiver.protocol import Addressed, Greeting, Reply, RunProgram, WorkerError
from tpcolocate.weights.transport import connection as module
from tpcolocate.weights.transport.connection import OwnerConnection, WorkerConnection, connect

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

UPDATE, LEFT = "update_weights_from_tensor", "the workers have left"
PATIENCE_S = 40.0
GREETING = Reply(0, None, None, False, 0.1, Greeting(None, "a", "worker"))
FAILED = Reply(1, None, WorkerError("RuntimeError", "another rank's command", "Traceback ..."), False, 0.1)


class Workers:
    def __init__(self, greetings):
        self.greetings = greetings
        self.closed = threading.Event()
        self.num_finished = 0
        self.limits = []

    def greet(self, *, timeout_s):
        return self.greetings

    def finish(self, *, timeout_s):
        self.num_finished += 1
        self.limits.append(timeout_s)

    def close(self, *, timeout_s):
        self.limits.append(timeout_s)
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
        self.workers = Workers({0: GREETING} if greetings is None else greetings)

    def hold_generation(self, *, timeout_s):
        self.asked.append("hold_generation")
        assert self.go_on.wait(30)
        if self.error is not None:
            raise self.error
        return self.dropped

    def await_workers(self, path, *, tp_size):
        self.path = path
        return self.workers

    def cancel_sync(self, *, timeout_s):
        self.workers.limits.append(timeout_s)
        self.asked.append("cancel_sync")

    def end_sync(self, version, *, workers, timeout_s):
        self.asked.append(("end_sync", version, workers is self.workers))

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
                # No caller may wait for this answer before the next request.
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
    connection = OwnerConnection(
        server, folder=folder, loader="a.loader", tp_size=tp_size, deadline=Deadline.after(timeout_s)
    )
    connection.open()
    return connection


@pytest.fixture
def reach(tmp_path, monkeypatch):
    """A function that begins to reach the receiver of a `OneByOne`."""
    connections = []

    def begin(client, **options):
        if not client.behind and client.flush_s == 0:
            monkeypatch.setattr(module, "_ANSWER_S", PATIENCE_S)  # the answer comes at once, if threads get to run
        connections.append(opened(Owner(client).updates, folder=tmp_path, **options))
        return connections[-1]

    yield begin
    for connection in connections:
        connection.mark_engine_modified()  # nothing more is asked of the server
        connection.abandon(timeout_s=PATIENCE_S)
    assert list(tmp_path.iterdir()) == []


def answers(connection):
    """Whether the workers of an connection carry out a command."""
    connection.post({0: Addressed(0, RunProgram())}, 0)
    return connection.collect(0, timeout_s=PATIENCE_S)[0].error is None


def test_the_workers_are_reached_while_something_else_is_done():
    server = Server()
    connection = opened(server)
    assert server.asked in ([], ["hold_generation"]), "not called yet"
    server.go_on.set()
    server.dropped.set_result(None)
    assert connection.wait() == {0: GREETING}
    assert server.asked == ["hold_generation", (f"{connection.session}.sock", connection.session, "a.loader", 1)]
    connection.abandon(timeout_s=1)
    assert server.workers.closed.is_set() and server.asked[-1] == "cancel_sync"


def test_ranks_that_do_not_own_the_server_have_a_null_object():
    connection = connect(None, folder=Path("folder"), loader="a.loader", tp_size=2, deadline=Deadline.after(30))
    assert type(connection) is WorkerConnection
    connection.open()
    assert connection.wait() is None and connection.session == ""
    connection.post({}, 0)
    assert connection.collect(0, timeout_s=1) == {}
    connection.mark_engine_modified()
    connection.leave()
    connection.end("1", timeout_s=1)
    connection.abandon(timeout_s=1)


def test_a_connection_that_was_never_opened_asks_for_nothing():
    server = Server()
    connection = connect(server, folder=Path("folder"), loader="a.loader", tp_size=1, deadline=Deadline.after(30))
    connection.abandon(timeout_s=1)
    assert server.asked == []


def test_an_engine_that_was_modified_is_not_asked_to_go_on():
    server = Server()
    server.go_on.set()
    server.dropped.set_result(None)
    connection = opened(server)
    connection.wait()
    connection.mark_engine_modified()
    connection.abandon(timeout_s=1)
    assert server.workers.closed.is_set() and "cancel_sync" not in server.asked


def test_the_end_lets_the_workers_go_unless_they_have_left():
    for leaves in (False, True):
        server = Server()
        server.go_on.set()
        server.dropped.set_result(None)
        connection = opened(server)
        connection.wait()
        if leaves:
            connection.leave()
            assert 5 < server.workers.limits[0] <= 30, "what is left of the sync's time: a busy server is late"
        connection.end("7", timeout_s=1)
        assert server.asked[-1] == ("end_sync", "7", not leaves) and server.workers.num_finished == leaves
        connection.leave()
        assert server.workers.num_finished == leaves, "the server has let them go"


def test_what_goes_wrong_on_the_way_is_raised_where_it_is_waited_for():
    server = Server(error=EngineStateError("asleep"))
    server.go_on.set()
    with pytest.raises(EngineStateError, match="asleep"):
        opened(server).wait()
    server = Server(greetings={0: GREETING, 1: FAILED})
    server.go_on.set()
    server.dropped.set_result(None)
    with pytest.raises(SyncError, match="TP rank 1: RuntimeError: another rank's command") as caught:
        opened(server, tp_size=2).wait()
    assert caught.value.details == "TP rank 1:\nTraceback ..."


def test_workers_are_not_called_after_the_end():
    server = Server()
    connection = opened(server)
    started = time.monotonic()
    connection.abandon(timeout_s=0.1)
    assert time.monotonic() - started < 30 and server.workers.closed.is_set()
    server.go_on.set()
    with pytest.raises(SyncError, match="given up before the workers were called"):
        connection.wait()
    assert server.asked == ["hold_generation", "cancel_sync"]


def test_all_that_is_waited_for_when_a_sync_is_given_up_has_one_limit():
    server = Server()  # which does not answer
    connection = opened(server)
    connection.abandon(timeout_s=0.2)
    [of_workers, of_server] = server.workers.limits
    assert of_workers == 0 and of_server == module._LEAST_S, "nothing is left of the time"
    server.go_on.set()


def test_a_socket_that_cannot_be_bound_is_an_error(monkeypatch):
    server = Server()
    server.go_on.set()
    server.dropped.set_result(None)
    monkeypatch.setattr(
        server, "await_workers", lambda path, tp_size: (_ for _ in ()).throw(SyncError("no such folder"))
    )
    connection = opened(server)
    with pytest.raises(SyncError, match="no such folder"):
        connection.wait()
    connection.abandon(timeout_s=1)


@pytest.mark.parametrize("flush_s", [0.0, 3 * module._ANSWER_S])
def test_the_update_is_asked_for_beside_the_flush_however_long_that_takes(reach, flush_s):
    """Were they made one after the other, the flush would be refused here."""
    client = OneByOne(flush_s=flush_s)
    connection = reach(client)
    connection.wait()
    assert answers(connection) and len(client.sessions) == 1
    assert client.happened == [PAUSE, FLUSH, UPDATE]


def test_an_answer_that_comes_shortly_after_the_workers_is_waited_for(monkeypatch):
    monkeypatch.setattr(module, "_ANSWER_S", PATIENCE_S)
    server = Server()
    server.go_on.set()
    threading.Timer(0.05, server.dropped.set_result, [None]).start()
    connection = opened(server)
    connection.wait()
    assert len(server.asked) == 2 and not server.workers.closed.is_set()


@pytest.mark.parametrize("version", ["0.5.20", "0.5.21"])
def test_a_flush_behind_the_update_is_let_through_and_the_workers_are_reached_again(reach, version):
    """The receiver holds no session twice: were it the same one, no one would come."""
    client = OneByOne(version, behind=True)
    connection = reach(client)
    connection.wait()
    assert answers(connection) and len(client.sessions) == 2
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
    connection = reach(client)
    with pytest.raises(error, match=words):
        connection.wait()
    connection.abandon(timeout_s=PATIENCE_S)
    begun, ended = ([BEGIN], [END]) if version == "0.5.21" else ([], [])
    opened = [*begun, UPDATE, LEFT, FLUSH] if behind else [FLUSH, *begun, UPDATE, LEFT]
    assert client.happened == [PAUSE, *opened, *ended, GO_ON]


@pytest.mark.parametrize("behind", [False, True])
def test_a_server_that_is_gone_is_not_asked_to_go_on(reach, behind):
    client = OneByOne(behind=behind, flushed=EngineDeadError("gone"))
    connection = reach(client)
    with pytest.raises(EngineDeadError, match="gone"):
        connection.wait()
    connection.abandon(timeout_s=PATIENCE_S)
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
    connection = reach(client, timeout_s=PATIENCE_S)
    with pytest.raises(DeadlineError, match="no answer"):
        connection.wait()
    assert client.happened == [PAUSE, UPDATE, LEFT, FLUSH]
