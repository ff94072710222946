"""Background calls: all are made and waited for, and the error of any is raised."""

import threading
import time

import pytest

from tpcolocate import parallel
from tpcolocate.parallel import begun_in_background, beside, in_background

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


def fail(error):
    raise error


def over(action):
    return in_background(action, name="test")


def test_parallel_calls_start_at_once_and_are_waited_for():
    meeting, done = threading.Barrier(2, timeout=40), threading.Event()
    beside([in_background(lambda: (meeting.wait(), time.sleep(0.1), done.set()), name="test")], meeting.wait)
    assert done.is_set()


def test_the_error_of_either_is_raised():
    with pytest.raises(KeyError):
        beside([over(lambda: None), over(lambda: fail(KeyError()))], lambda: None)
    with pytest.raises(ValueError):
        beside([over(lambda: None)], lambda: fail(ValueError()))
    with pytest.raises(ValueError):
        beside([over(lambda: fail(KeyError()))], lambda: fail(ValueError()))


def test_an_error_does_not_wait_for_a_call_that_hangs(monkeypatch):
    monkeypatch.setattr(parallel, "_AFTER_ERROR_S", 0.1)
    release = threading.Event()
    started = time.monotonic()
    with pytest.raises(ValueError):
        beside([in_background(lambda: release.wait(30), name="test")], lambda: fail(ValueError()))
    assert time.monotonic() - started < 25
    release.set()


def test_a_background_call_reports_its_end_result_and_error():
    release = threading.Event()
    future = in_background(lambda: release.wait(40) and "done", name="test")
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)
    assert not future.done()
    release.set()
    assert future.result() == "done" and future.done()
    with pytest.raises(KeyError):
        in_background(lambda: fail(KeyError()), name="test").result()


def test_begun_in_background_returns_once_the_call_has_begun_or_failed():
    events, release = [], threading.Event()

    def action(begun):
        time.sleep(0.1)
        events.append("begun")
        begun()
        return release.wait(40)

    future = begun_in_background(action, name="test")
    assert events == ["begun"] and not future.done()
    release.set()
    assert future.result()
    with pytest.raises(KeyError):
        begun_in_background(lambda begun: fail(KeyError()), name="test").result()
