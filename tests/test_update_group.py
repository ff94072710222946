"""Checks of update groups and announced weights, and the group itself between two processes."""

import gc

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch.distributed import distributed_c10d

import tpcolocate
from tpcolocate.errors import ConfigError, WeightsMismatchError
from tpcolocate.server.process import hold_port
from tpcolocate.weights.update_group import UpdateGroup, announced, requests

pytestmark = pytest.mark.timeout(300)
quick = pytest.mark.quick

PLACE = {"master_address": "127.0.0.1", "master_port": 29500, "rank_offset": 1, "world_size": 3}


@quick
@pytest.mark.parametrize("changes, words", [
    ({"rank_offset": 0}, "rank_offset must be at least 1, got 0"),
    ({"rank_offset": 2}, "world_size=3 is too small for 2 TP ranks from rank_offset=2 on"),
    ({"world_size": 2}, "world_size=2 is too small"),
    ({"master_port": 0}, "master_port must be between 1 and 65535, got 0"),
    ({"master_port": 65536}, "got 65536"),
    ({"master_address": ""}, "must not be empty"),
    ({"group_name": ""}, "must not be empty"),
])  # fmt: skip
def test_a_group_that_cannot_form_is_refused(changes, words):
    UpdateGroup(**PLACE).check(2)
    UpdateGroup(**{**PLACE, "world_size": 9, "rank_offset": 5}).check(4)  # several servers in one group
    with pytest.raises(ConfigError, match=words):
        UpdateGroup(**{**PLACE, **changes}).check(2)


@quick
def test_announced_weights_are_brought_into_one_form():
    found = announced(["a", "b", "c"], ["bfloat16", torch.float32, "torch.int8"], [(2, 3), [4], torch.Size([])])
    assert found == [
        ("a", torch.Size([2, 3]), "bfloat16"),
        ("b", torch.Size([4]), "float32"),
        ("c", torch.Size([]), "int8"),
    ]


@quick
@pytest.mark.parametrize("names, dtypes, shapes, error, words", [
    ([], [], [], ConfigError, "0 names"),
    (["a"], [], [[1]], ConfigError, "1 names, 0 dtypes and 1 shapes"),
    ("a", ["int8"], [[1]], ConfigError, "1 names"),
    (["a"], ["float33"], [[1]], ConfigError, "dtype 'float33'"),
    (["a"], ["nn"], [[1]], ConfigError, "dtype 'nn'"),
    (["a"], ["int8"], [[-1]], ConfigError, r"shape \(-1,\)"),
    (["a"], ["int8"], [[1.5]], ConfigError, r"shape \(1.5,\)"),
    (["a", "a"], ["int8"] * 2, [[1]] * 2, WeightsMismatchError, "a is given twice"),
])  # fmt: skip
def test_invalid_announcements_are_refused(names, dtypes, shapes, error, words):
    with pytest.raises(error, match=words):
        announced(names, dtypes, shapes)


@quick
@pytest.mark.parametrize("limit, cut", [(1, "a|b|c|d"), (8, "a|b|cd"), (12, "ab|cd"), (15, "ab|cd"), (1000, "abcd")])
def test_requests_are_in_order_and_of_bounded_size(limit, cut):
    weights = announced("a b c d".split(), ["float32", "int8", "float16", "int8"], [[2], [4], [3], [2]])  # 8, 4, 6, 2
    found = list(requests(weights, limit))
    assert "|".join("".join(name for name, _, _ in request) for request in found) == cut
    assert [weight for request in found for weight in request] == weights


def join(port, name="group", *, world_size=2, timeout_s=80):
    return tpcolocate.join_update_group(
        master_address="127.0.0.1",
        master_port=port,
        world_size=world_size,
        group_name=name,
        backend="gloo",
        timeout_s=timeout_s,
    )


def refused(port, name="group"):
    try:
        join(port, name, timeout_s=5)
    except ConfigError as error:
        return error.message
    return "not refused"


def both_ends(rank, port, names):
    """Rank 0 joins as a user does, rank 1 with what SGLang's workers use."""
    from sglang.srt.utils.common import init_custom_process_group

    found = []
    for cycle, name in enumerate(names):
        if rank == 0:
            group = join(port, name)
            dist.broadcast(torch.arange(4.0) + cycle, src=0, group=group)
            found.append(refused(port, name))
            dist.destroy_process_group(group)
            found.append(refused(port, name).partition(":")[0])
            del group
        else:
            group = init_custom_process_group(
                backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=1, group_name=name
            )
            tensor = torch.zeros(4)
            dist.broadcast(tensor, src=0, group=group)
            found.append(tensor.tolist())
            dist.destroy_process_group(group)
        if dist.is_initialized():
            dist.barrier()
    return found


@pytest.mark.parametrize("init_group, names", [
    (True, ["group", "group", "other"]),  # with a barrier after each: the port is free again
    (False, ["group"]),
], ids=["beside a default group", "alone"])  # fmt: skip
def test_the_group_is_joined_by_the_one_that_sglang_makes(init_group, names):
    with hold_port() as held:
        port = held.getsockname()[1]
        sender, receiver = run_ranks(both_ends, 2, port, names, init_group=init_group, timeout_s=200)
    assert receiver == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]][: len(names)]
    in_use = "cannot listen on 127.0.0.1"  # while there is a reference to the destroyed group
    assert sender == [text for name in names for text in (f"this process already has a group named '{name}'", in_use)]


@quick
def test_the_name_of_a_group_whose_joining_was_interrupted_can_be_used_again(monkeypatch):
    helper = distributed_c10d._new_process_group_helper

    def interrupted(*args, **kwargs):
        helper(*args, **kwargs)
        raise KeyboardInterrupt

    with hold_port() as held:
        port = held.getsockname()[1]
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(distributed_c10d, "_new_process_group_helper", interrupted)
            join(port, world_size=1)
        assert distributed_c10d._world.pg_names == {}
        gc.collect()
        dist.destroy_process_group(join(port, world_size=1))


@quick
def test_a_sender_whose_nccl_could_not_open_the_engines_memory_is_refused(monkeypatch):
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    with pytest.raises(ConfigError, match="NCCL_CUMEM_ENABLE is not set") as caught:
        tpcolocate.join_update_group(master_address="127.0.0.1", master_port=1, world_size=2)
    assert "start this process with NCCL_CUMEM_ENABLE=0" in str(caught.value)


@quick
@pytest.mark.parametrize("wrong", [
    {"master_address": 5}, {"master_port": "x"}, {"master_port": 70000}, {"world_size": "2"}, {"world_size": 0}, {"group_name": ["a"]},
    {"backend": "mpi"}, {"timeout_s": "5"}, {"timeout_s": None}, {"timeout_s": -1},
])  # fmt: skip
def test_a_senders_wrong_argument_is_refused_by_its_name(wrong):
    given = {"master_address": "127.0.0.1", "master_port": 1, "world_size": 2, "backend": "gloo", **wrong}
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        tpcolocate.join_update_group(**given)


def one_end(rank, port):
    try:
        join(port, timeout_s=1)
        timed_out = False
    except RuntimeError:  # torch's
        timed_out = True
    group = join(0, "alone", world_size=1)  # any free port
    tensor = torch.ones(2)
    dist.broadcast(tensor, src=0, group=group)
    size = group.size()
    again = refused(0, "alone")
    dist.destroy_process_group(group)
    return timed_out, size, again


@quick
def test_a_group_that_does_not_form_ends_at_its_timeout_and_another_can_be_joined():
    with hold_port() as held:
        [found] = run_ranks(one_end, 1, held.getsockname()[1], init_group=False, timeout_s=60)
    assert found == (True, 1, "this process already has a group named 'alone'")
