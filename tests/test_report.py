"""Reports of a sync: phase times and former names."""

import time

import pytest

from tpcolocate.report import RankReport, Stopwatch, SyncReport

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


def test_former_names_are_read_only_aliases():
    part = RankReport(0, {}, 3, 3, 2, 0.0, 5, 3, 0, 0, 0)
    report = SyncReport(0, "1", 8, 2, 1, 0.1, "ipc", "config", 0, {}, 1, ("b",), 256, (), (), (), (part,))
    assert (
        (part.num_lent, report.num_proven, report.unproven)
        == (part.num_mapped, report.num_verified, ("b",))
        == (2, 1, ("b",))
    )
    assert part.direct_bytes == part.own_bytes + part.peer_bytes == 8
    for name in ("num_proven", "unproven"):
        with pytest.raises((AttributeError, TypeError)):  # TypeError: CPython 3.11, frozen and with slots
            setattr(report, name, 0)
    assert "1 verified" in str(report)
