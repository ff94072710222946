"""The way to the workers, beside other work: errors come out, and nobody who comes late is left waiting."""

import threading
import time
from pathlib import Path

import pytest

from tpcolocate.errors import EngineStateError, SyncError
from tpcolocate.weights.opening import Opening

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


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
        error: Of `begin_sync`.
        greetings: Of the workers.
    """

    def __init__(self, error=None, greetings=None):
        self.error = error
        self.go_on = threading.Event()
        self.asked = []
        self.workers = Workers({0: {"error": None, "plans": "a"}} if greetings is None else greetings)

    def begin_sync(self, *, timeout_s):
        self.asked.append("begin_sync")
        assert self.go_on.wait(30)
        if self.error is not None:
            raise self.error

    def open_workers(self, path, session, *, loader, tp_size, timeout_s):
        self.asked.append((path.name, session, loader, tp_size))
        return self.workers


def opened(server, tp_size=1):
    return Opening(server, folder=Path("folder"), loader="a.loader", tp_size=tp_size, timeout_s=30.0)


def test_the_workers_are_reached_while_something_else_is_done():
    server = Server()
    opening = opened(server)
    assert opening.workers is None
    server.go_on.set()
    assert opening.result() == {0: {"error": None, "plans": "a"}} and opening.workers is server.workers
    assert server.asked == ["begin_sync", (f"{opening.session}.sock", opening.session, "a.loader", 1)]
    opening.close(timeout_s=1)
    assert server.workers.closed.is_set()


def test_no_worker_is_reached_where_none_is_needed():
    server = Server()
    server.go_on.set()
    opening = opened(server, tp_size=0)
    assert opening.result() is None and opening.workers is None and server.asked == ["begin_sync"]
    opening.close(timeout_s=1)


def test_what_goes_wrong_on_the_way_is_raised_where_it_is_waited_for():
    server = Server(error=EngineStateError("asleep"))
    server.go_on.set()
    with pytest.raises(EngineStateError, match="asleep"):
        opened(server).result()
    server = Server(greetings={0: {"error": None}, 1: {"error": "another rank's command"}})
    server.go_on.set()
    with pytest.raises(SyncError, match="TP rank 1: another rank's command"):
        opened(server, tp_size=2).result()


def test_workers_that_come_after_the_end_are_sent_back():
    server = Server()
    opening = opened(server)
    started = time.monotonic()
    opening.close(timeout_s=0.1)
    assert time.monotonic() - started < 10 and not server.workers.closed.is_set()
    server.go_on.set()
    assert server.workers.closed.wait(30)
