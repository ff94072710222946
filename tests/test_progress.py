"""What a slow sync shows on a terminal."""

import io
import re
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


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def a_sync(is_over, *, rank=0):
    watch = Stopwatch()
    with progress.shown(watch, rank=rank), watch.phase("trace"):
        with watch.phase("nested"):
            wait_until(is_over)
    assert watch.current == "" and set(watch.seconds) == {"trace"}


def test_a_slow_sync_names_its_phase_and_leaves_the_terminal_clean(monkeypatch):
    terminal = make_terminal(monkeypatch)
    a_sync(lambda: "trace" in terminal.getvalue())
    shown = terminal.getvalue()
    assert re.search(r"Syncing weights \[00:\d\d, trace\]", shown) and "nested" not in shown
    assert shown.endswith("\r"), "the line is removed"
    assert not any(thread.name == "sync progress" for thread in threading.enumerate())


def test_quick_syncs_show_nothing(monkeypatch):
    terminal = make_terminal(monkeypatch)
    monkeypatch.setattr(progress, "_SHOWN_AFTER_S", 30.0)
    a_sync(lambda: True)
    assert terminal.getvalue() == ""


def test_other_ranks_show_nothing(monkeypatch):
    terminal = make_terminal(monkeypatch)
    monkeypatch.setattr(progress, "_SHOWN_AFTER_S", 0.0)
    ends = time.monotonic() + 0.3
    a_sync(lambda: time.monotonic() > ends, rank=1)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("stderr", [io.StringIO(), None])
def test_without_a_terminal_there_is_no_thread(monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress.shown(Stopwatch(), rank=0):
        assert not any(thread.name == "sync progress" for thread in threading.enumerate())


def test_a_failed_sync_ends_the_line(monkeypatch):
    terminal = make_terminal(monkeypatch)
    with pytest.raises(ValueError, match="planted"), progress.shown(Stopwatch(), rank=0):
        wait_until(terminal.getvalue)
        raise ValueError("planted")
    assert terminal.getvalue().endswith("\r")
