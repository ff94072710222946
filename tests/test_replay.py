"""Queueing the same work again: on a CPU it is done each time.  The graph itself: test_gpu."""

import pytest
import torch

from tpcolocate.in_server.tpcolocate_receiver.replay import Beside, Replay

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


def test_work_beside_is_done_at_once_on_a_cpu():
    done = []
    beside = Beside(torch.device("cpu"))
    with beside.what_was_queued():
        done.append(1)
    beside.join()
    assert done == [1]
