"""Blocking calls side by side: both are made, either's error is told."""

import threading
import time

import pytest

from tpcolocate.parallel import at_once, in_background

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


def fail(error):
    raise error


def test_both_are_under_way_at_once():
    meeting = threading.Barrier(2, timeout=10)
    at_once(meeting.wait, meeting.wait)


def test_the_error_of_either_is_raised():
    with pytest.raises(KeyError):
        at_once(lambda: fail(KeyError()), lambda: None)
    with pytest.raises(ValueError):
        at_once(lambda: None, lambda: fail(ValueError()))
    with pytest.raises(ValueError):
        at_once(lambda: fail(KeyError()), lambda: fail(ValueError()))


def test_an_error_does_not_wait_for_a_call_that_hangs():
    release = threading.Event()
    started = time.monotonic()
    with pytest.raises(ValueError):
        at_once(release.wait, lambda: fail(ValueError()))
    assert time.monotonic() - started < 10
    release.set()


def test_a_call_in_the_background_tells_whether_it_is_over_and_what_came_of_it():
    release = threading.Event()
    future = in_background(lambda: release.wait(10) and "done", name="test")
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)
    assert not future.done()
    release.set()
    assert future.result() == "done" and future.done()
    with pytest.raises(KeyError):
        in_background(lambda: fail(KeyError()), name="test").result()
