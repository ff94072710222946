"""Deadlines as values."""

import math
import pickle
import select
import socket
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from tpcolocate.deadline import MAX_TIMEOUT_S, Deadline, check_timeout
from tpcolocate.errors import ConfigError

pytestmark = pytest.mark.quick


def test_what_is_left_never_goes_below_what_is_asked_for():
    deadline = Deadline.after(100.0)
    assert 99.0 < deadline.left() <= 100.0 and not deadline.has_passed and deadline.timeout_s == 100.0
    passed = Deadline.after(-1.0)
    assert passed.has_passed and passed.left() == 0.0 and passed.left(at_least=0.5) == 0.5


def test_none_is_infinitely_far_away():
    never = Deadline.never()
    assert never.left() == math.inf and not never.has_passed and never.is_never and not Deadline.after(1.0).is_never
    assert Deadline.after(never.timeout_s) == never


def test_earlier_and_later_ones():
    deadline = Deadline.after(10.0)
    assert deadline.within(1.0).left() <= 1.0 and deadline.within(1.0).timeout_s == 1.0
    assert deadline.within(100.0).at == deadline.at
    assert deadline.plus(5.0).at == deadline.at + 5.0


def test_a_timeout_may_be_none_and_a_deadline_is_one_already():
    deadline = Deadline.after(10.0)
    assert Deadline.of(deadline) is deadline and Deadline.of(None) == Deadline.never()
    assert Deadline.of(5.0).timeout_s == 5.0 and 4.0 < Deadline.of(5.0).left() <= 5.0


def test_sockets_take_what_is_left():
    with socket.socket() as taker:
        for deadline in (Deadline.after(5.0), Deadline.after(-1.0), Deadline.never()):
            taker.settimeout(deadline.socket_timeout())
            assert taker.getblocking(), "0 would be no time, not a short one"
    assert Deadline.never().socket_timeout() is None


@pytest.mark.parametrize("timeout_s", [5, 0.25, Fraction(1, 4), np.float32(0.5), np.int64(7), MAX_TIMEOUT_S])
def test_every_positive_number_is_a_timeout(timeout_s):
    seconds = check_timeout(timeout_s)
    assert type(seconds) is float and seconds == timeout_s


@pytest.mark.parametrize("timeout_s", [
    0, -1, -0.5, math.inf, -math.inf, math.nan, None, "5", b"5", True, False, np.bool_(True), [5], {}, object(), 1j,
    Decimal(5), np.float64("nan"), np.array(5.0), MAX_TIMEOUT_S * 2, 1e300, pytest.param(10**5000, id="digits"),
])  # fmt: skip
def test_anything_else_is_refused_by_the_name_of_the_argument(timeout_s):
    with pytest.raises(ConfigError) as caught:
        check_timeout(timeout_s, name="health_timeout_s")
    assert caught.value.message.startswith("health_timeout_s must be a positive number of seconds, got ")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_longest_timeout_can_be_waited_for():
    ready, other = socket.socketpair()
    with ready, other:
        other.send(b"x")
        poll = select.poll()
        poll.register(ready, select.POLLIN)
        assert poll.poll(2 * MAX_TIMEOUT_S * 1000)  # calls add timeouts of several steps to each other
        with pytest.raises(OverflowError):
            poll.poll(3 * MAX_TIMEOUT_S * 1000)
