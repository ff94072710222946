"""What a slow sync shows on a terminal."""

import io
import sys
import threading
import time

import pytest

from tpcolocate.report import Stopwatch
from tpcolocate.weights.sync import progress

pytestmark = pytest.mark.quick


class Terminal(io.StringIO):
    def isatty(self):
        return True


def make_terminal(monkeypatch):
    """In the test itself: pytest sets standard error again after fixtures."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setattr(progress, "_SHOWN_AFTER_S", 0.2)
    monkeypatch.setattr(progress, "_INTERVAL_S", 0.05)
    return made


def a_sync(seconds, *, rank=0):
    watch = Stopwatch()
    with progress.shown(watch, rank=rank), watch.phase("trace"):
        with watch.phase("nested"):
            time.sleep(seconds)
    assert watch.current == "" and set(watch.seconds) == {"trace"}


def test_a_slow_sync_names_its_phase_and_leaves_the_terminal_clean(monkeypatch):
    terminal = make_terminal(monkeypatch)
    a_sync(0.6)
    shown = terminal.getvalue()
    assert "Syncing weights [00:00, trace]" in shown and "nested" not in shown
    assert shown.endswith("\r"), "the line is removed"
    assert not any(thread.name == "sync progress" for thread in threading.enumerate())


@pytest.mark.parametrize(("seconds", "rank"), [(0.0, 0), (0.6, 1)])
def test_quick_syncs_and_other_ranks_show_nothing(monkeypatch, seconds, rank):
    terminal = make_terminal(monkeypatch)
    a_sync(seconds, rank=rank)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("stderr", [io.StringIO(), None])
def test_without_a_terminal_there_is_no_thread(monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress.shown(Stopwatch(), rank=0):
        assert not any(thread.name == "sync progress" for thread in threading.enumerate())


def test_a_failed_sync_ends_the_line(monkeypatch):
    terminal = make_terminal(monkeypatch)
    with pytest.raises(ValueError, match="planted"), progress.shown(Stopwatch(), rank=0):
        time.sleep(0.4)
        raise ValueError("planted")
    assert terminal.getvalue().endswith("\r")
