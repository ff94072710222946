"""Deadlines as values."""

import math

import pytest

from tpcolocate.deadline import Deadline

pytestmark = pytest.mark.quick


def test_what_is_left_never_goes_below_what_is_asked_for():
    deadline = Deadline.after(100.0)
    assert 99.0 < deadline.left() <= 100.0 and not deadline.has_passed and deadline.timeout_s == 100.0
    passed = Deadline.after(-1.0)
    assert passed.has_passed and passed.left() == 0.0 and passed.left(at_least=0.5) == 0.5


def test_none_is_infinitely_far_away():
    assert Deadline.never().left() == math.inf and not Deadline.never().has_passed


def test_earlier_and_later_ones():
    deadline = Deadline.after(10.0)
    assert deadline.within(1.0).left() <= 1.0 and deadline.within(1.0).timeout_s == 1.0
    assert deadline.within(100.0).at == deadline.at
    assert deadline.plus(5.0).at == deadline.at + 5.0
