"""Layouts of tp slices, and the errors of those that cannot work."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
import torch.distributed as dist

from tpcolocate import errors
from tpcolocate.groups import Host, Member, exchange, plan_slices

pytestmark = pytest.mark.quick

HERE = Host("boot", "net:[1]", "23", "a", "pid:[1]")


def member(rank, *, world=4, tp=2, host=HERE, error=None):
    return Member(rank, world, tp, host, 1, 0.0, {}, error)


def test_slices_are_consecutive_ranks():
    assert plan_slices([member(r) for r in range(4)]) == [(0, 1), (2, 3)]


@pytest.mark.parametrize("other, words", [
    (replace(HERE, boot_id="other", name="b"), "would span hosts: rank 0 on a, rank 1 on b"),
    (replace(HERE, network="net:[2]"), "different network namespaces"),
    (replace(HERE, shm="99"), "different /dev/shm mounts"),
])  # fmt: skip
def test_a_slice_that_cannot_share_a_server_is_refused(other, words):
    with pytest.raises(errors.LayoutError, match=words.replace("/", ".")) as caught:
        plan_slices([member(0), member(1, host=other), member(2), member(3)])
    assert caught.value.slice_ranks == (0, 1)


def test_slices_may_be_on_different_hosts():
    other = replace(HERE, boot_id="other")
    assert plan_slices([member(0), member(1), member(2, host=other), member(3, host=other)]) == [(0, 1), (2, 3)]


def test_hosts_are_not_identified_by_name():
    with pytest.raises(errors.LayoutError):
        plan_slices([member(0), member(1, host=replace(HERE, boot_id="other")), member(2), member(3)])


def test_members_survive_serialisation():
    one = Member(3, 4, 2, HERE, 123, 4.5, {"physical": {"token": "0"}}, None)
    assert Member.from_json(one.to_json()) == one


def test_a_store_that_is_gone_is_an_error_of_this_library():
    server = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    store = dist.TCPStore("127.0.0.1", server.port, 1, False, wait_for_workers=False)
    del server
    with pytest.raises(errors.RankLostError, match="the store of the default process group does not answer"):
        exchange(store, member(0, world=2), timeout_s=20.0)


def _serve_and_stop(port):
    server = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    port.send(server.port)
    port.recv()
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_store_whose_process_is_stopped_is_waited_for_no_longer_than_asked():
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve_and_stop, args=(there,))
    server.start()
    try:
        store = dist.TCPStore("127.0.0.1", here.recv(), 1, False, wait_for_workers=False)
        here.send("stop")
        began = time.monotonic()
        with pytest.raises(errors.RankLostError, match="does not answer within 2 s .timeout_s of init") as caught:
            exchange(store, member(1, world=2), timeout_s=2.0)
        assert time.monotonic() - began < 60 and "kill -CONT" in caught.value.hint
    finally:
        server.kill()
        server.join()
