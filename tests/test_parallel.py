"""Background calls: all are made and waited for, and the error of any is raised."""

import sys
import threading
import time

import pytest

from tpcolocate import parallel
from tpcolocate.parallel import begun_in_background, beside, in_background, quick_switching

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
    monkeypatch.setattr(parallel, "_AFTER_AN_ERROR_S", 0.1)
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


@pytest.fixture
def slow_switching():
    """An interval that no scheduling noise comes near, for the length of a test."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.2)
    yield sys.getswitchinterval()
    sys.setswitchinterval(before)


def seconds_late():
    """Return how late a blocked thread goes on while this thread computes."""

    def blocked():
        due = time.perf_counter() + 0.02
        time.sleep(0.02)  # like a socket, it releases the interpreter lock
        return time.perf_counter() - due

    future = in_background(blocked, name="test")
    while not future.done():
        pass
    return future.result()


def test_a_ready_thread_does_not_wait_for_a_busy_one(slow_switching):
    # Other processes can only add to it: the least of several is what the interpreter takes.
    assert min(seconds_late() for _ in range(2)) > 0.1
    with quick_switching():
        assert any(seconds_late() < 0.1 for _ in range(50))


def test_the_interval_is_restored_also_after_an_error(slow_switching):
    with quick_switching():
        with quick_switching():
            assert sys.getswitchinterval() < 0.001
        assert sys.getswitchinterval() < 0.001
    assert sys.getswitchinterval() == slow_switching
    with pytest.raises(KeyError), quick_switching(), quick_switching():
        fail(KeyError())
    assert sys.getswitchinterval() == slow_switching


def test_the_interval_is_restored_by_the_last_of_several_threads(slow_switching):
    begun, over = threading.Event(), threading.Event()

    def other():
        with quick_switching():
            begun.set()
            assert over.wait(40)

    future = in_background(other, name="test")
    assert begun.wait(40)
    with quick_switching():
        over.set()
        future.result()
        assert sys.getswitchinterval() < 0.001
    assert sys.getswitchinterval() == slow_switching


def test_a_shorter_interval_is_kept(slow_switching):
    sys.setswitchinterval(2e-5)
    shorter = sys.getswitchinterval()
    with quick_switching():
        assert sys.getswitchinterval() == shorter
    assert sys.getswitchinterval() == shorter
