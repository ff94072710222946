"""Queueing the same work again: on a CPU it is done each time.  The graph itself: test_gpu."""

import pytest
import torch

from tpcolocate.in_server.tpcolocate_receiver.replay import Lanes, Replay

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


def test_work_is_done_at_every_call_and_reads_what_is_there_then():
    source, target = torch.zeros(3), torch.zeros(3)
    replay = Replay(torch.device("cpu"))
    for value in range(1, 5):
        source.fill_(value)
        replay.run(lambda: target.copy_(source))
        assert torch.equal(target, source)
    replay.forget()
    source.fill_(9)
    replay.run(lambda: target.copy_(source))
    assert torch.equal(target, source)


def test_an_error_in_the_work_comes_out():
    replay = Replay(torch.device("cpu"))
    with pytest.raises(ValueError):
        replay.run(lambda: int("no number"))


def test_lanes_do_their_work_at_once_on_a_cpu():
    done = []
    lanes = Lanes(torch.device("cpu"))
    for i in range(5):
        with lanes.lane(i):
            done.append(i)
    lanes.join()
    assert done == list(range(5))
