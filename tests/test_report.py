"""What a sync tells of its time."""

import time

import pytest

from tpcolocate.report import Stopwatch

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


def test_phases_add_up_and_never_count_a_moment_twice():
    watch = Stopwatch()
    for _ in range(2):
        with watch.phase("outer"):
            time.sleep(0.02)
            with watch.phase("inner"):
                time.sleep(0.02)
    with pytest.raises(KeyError), watch.phase("failing"):
        raise KeyError
    with watch.phase("after"):
        time.sleep(0.01)
    assert set(watch.seconds) == {"outer", "failing", "after"}
    assert watch.seconds["outer"] >= 0.08 and watch.seconds["after"] >= 0.01
    assert sum(watch.seconds.values()) <= watch.total()
