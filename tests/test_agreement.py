"""Agreement: one rank's error is everybody's, a dead rank is noticed, and so is one that is in another call."""

import os
import signal
import time

import pytest
from harness import run_ranks

from tpcolocate import errors
from tpcolocate.agreement import RankGroup
from tpcolocate.groups import Host, Member, make_group
from tpcolocate.processes import this_process

pytestmark = pytest.mark.quick


def group_of(rank, order, timeout_s=20.0):
    """A RankGroup over `order`, whose results must come in that order."""
    import torch.distributed as dist

    pid, started = this_process()
    mine = Member(rank, len(order), len(order), Host.here(), pid, started)
    members = [None] * len(order)
    dist.all_gather_object(members, mine)
    handle = make_group(order, timeout_s=timeout_s, description="test")
    return RankGroup([members[r] for r in order], rank=rank, group=handle, timeout_s=timeout_s)


def gather_sizes(rank, order):
    group = group_of(rank, order)
    small = group.all_gather(("small", rank), what="talk")
    # larger than one frame on one rank only
    mixed = group.all_gather("x" * (100_000 if rank == 1 else 3), what="talk")
    return small, [len(text) for text in mixed], group.broadcast(f"from {rank}", src=order[0], what="talk")


def test_values_come_in_the_order_of_the_slice_and_of_any_size():
    order = [2, 0, 1]
    expected = ([("small", r) for r in order], [3, 3, 100_000], "from 2")
    assert run_ranks(gather_sizes, 3, order) == [expected] * 3


def failing(rank, who):
    group = group_of(rank, [0, 1, 2])
    with group.together("bake a cake"):
        if rank in who:
            raise who[rank]


@pytest.mark.parametrize("who, kind, words", [
    ({1: ValueError("no flour")}, errors.RankFailedError, "ValueError: no flour [rank 1]"),
    ({2: errors.SyncError("no eggs")}, errors.SyncError, "no eggs [rank 2]"),
    # a rank that merely lost its peers is a consequence, whenever it says so
    ({0: errors.RankLostError("lost"), 2: errors.DeviceError("cause")}, errors.DeviceError, "cause [rank 2]"),
])  # fmt: skip
def test_one_ranks_error_is_raised_on_all(who, kind, words):
    outcomes = run_ranks(failing, 3, who, expect_errors=True)
    for outcome in outcomes:
        assert type(outcome.error) is kind, outcome
        assert str(outcome.error).startswith(words)
    assert len({str(outcome.error) for outcome in outcomes}) == 1


def unpicklable(rank):
    group = group_of(rank, [0, 1])
    group.agree(None, (lambda: 0) if rank == 1 else 0, what="exchange functions")


def test_a_value_that_cannot_travel_is_an_error_everywhere_and_not_a_hang():
    for outcome in run_ranks(unpicklable, 2, expect_errors=True):
        assert isinstance(outcome.error, errors.RankFailedError) and "ambda" in str(outcome.error)
        assert outcome.seconds < 40, "before any deadline"


def dying(rank):
    group = group_of(rank, [0, 1, 2], timeout_s=120.0)
    group.all_gather(rank, what="warm up")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        group.all_gather(rank, what="bake a cake")
    except errors.RankLostError as error:
        first = time.monotonic() - started, str(error)
    try:
        group.all_gather(rank, what="try again")
    except errors.RankLostError as error:
        return *first, str(error)


def test_a_killed_rank_is_noticed_at_once_and_named():
    outcomes = run_ranks(dying, 3, expect_errors=True, timeout_s=200)
    for rank in (0, 2):
        seconds, first, again = outcomes[rank].value
        assert seconds < 60, "long before the timeout of 120 s"
        assert "bake a cake" in first and "1 has exited" in first
        assert "unusable" in again, "a broken group is not used again"


def late(rank):
    group = group_of(rank, [0, 1], timeout_s=120.0)
    if rank == 1:
        from datetime import timedelta

        import torch.distributed as dist

        dist.distributed_c10d._get_default_store().wait(["gave up"], timedelta(seconds=120))
        return None
    started = time.monotonic()
    try:
        group.all_gather(rank, what="wait for the late one", timeout_s=1.5)
    except errors.RankLostError as error:
        import torch.distributed as dist

        dist.distributed_c10d._get_default_store().set("gave up", "1")
        return time.monotonic() - started, str(error)


def test_a_deadline_of_one_call_holds():
    seconds, text = run_ranks(late, 2, timeout_s=200)[0]
    assert 1.4 < seconds < 60, "not the timeout of the group"
    assert "wait for the late one" in text and "did not come" in text


def crossing(rank):
    """Ranks that meet from different calls, with small values and large ones, one of them with an error of its own."""
    group = group_of(rank, [1, 0])
    said = []
    for what, value, error in [
        (["go to sleep", "sync weights"][rank], "x" * [3, 100_000][rank], None),
        (["copy the weights", "leave"][rank], 0, ValueError("no flour") if rank == 0 else None),
    ]:
        try:
            group.agree(error, value, what=what)
        except Exception as raised:
            said.append((type(raised).__name__, str(raised)))
    return said, group.all_gather(rank, what="go on together, " + "\u00e9" * 100)


def test_ranks_in_different_calls_are_told_so_and_stay_in_step():
    found = run_ranks(crossing, 2)
    for rank, (said, after) in enumerate(found):
        assert said[0][0] == "RankLostError" and said[0][1].startswith(
            "the ranks make different calls: rank 1 would sync weights; rank 0 would go to sleep [slice ranks 1,0]"
        )
        assert after == [1, 0]
        if rank == 0:
            assert said[1][0] == "ValueError" and "no flour" in said[1][1], "a cause is told before its consequence"
        else:
            assert said[1][1].startswith(
                "the ranks make different calls: rank 1 would leave; rank 0 would copy the weights"
            )
    assert found[0][0][0] == found[1][0][0], "the same error on every rank"


def two_threads(rank):
    """Rank 0 makes a second call from another thread while the first one waits for rank 1."""
    import threading

    group = group_of(rank, [0, 1])
    said = []
    if rank == 0:
        waiting = threading.Thread(target=lambda: said.append(group.all_gather(rank, what="bake a cake")))
        waiting.start()
        while not group._turn.locked():
            time.sleep(0.001)
        try:
            group.all_gather(rank, what="lay the table")
        except errors.ConfigError as error:
            said.append(error.message)
        import torch.distributed as dist

        dist.distributed_c10d._get_default_store().set("refused", "1")
        waiting.join(20)
    else:
        import torch.distributed as dist

        dist.distributed_c10d._get_default_store().get("refused")
        said.append(group.all_gather(rank, what="bake a cake"))
    return said, group.all_gather(rank, what="go on")


def test_a_second_thread_is_refused_and_the_first_ones_call_goes_on():
    words = "cannot lay the table while another thread of this rank has to bake a cake"
    assert run_ranks(two_threads, 2) == [([words, [0, 1]], [0, 1]), ([[0, 1]], [0, 1])]


def meaning(rank):
    """Ranks that mean the same, different things, or fail before they could say what."""
    group = group_of(rank, [1, 0])
    said = []
    for meant in ({"tags": ["a"], "how": 1}, {"tags": ["a"] * 500 + [rank], "how": rank}, None):
        try:
            with group.together("bake a cake") as same:
                if meant is None and rank == 0:
                    raise ValueError("no flour")
                same |= meant or {"how": rank}
            said.append(None)
        except Exception as raised:
            said.append((type(raised).__name__, str(raised).partition("\n")[0]))
    return said


def test_ranks_that_mean_different_things_are_told_which():
    same, different, failed = run_ranks(meaning, 2)[0]
    assert same is None and failed == ("RankFailedError", "ValueError: no flour [rank 0]")
    shown = "['a', 'a', " + "'a', " * 37 + "'a', "
    assert different[0] == "ConfigError" and len(shown) == 201
    assert different[1].startswith(f"cannot bake a cake: ranks 1 and 0 pass different tags: {shown[:200]} and ['a'")
    assert run_ranks(meaning, 2)[1] == [same, different, failed]


def interrupted(rank):
    group = group_of(rank, [0, 1])
    try:
        with group.together("be interrupted"):
            if rank == 0:
                raise KeyboardInterrupt
    except BaseException as error:
        return type(error).__name__, str(error)[:60].split("\n")[0]


def test_an_interrupt_stays_one_where_it_happened_and_is_told_elsewhere():
    assert run_ranks(interrupted, 2) == [("KeyboardInterrupt", ""), ("RankFailedError", "KeyboardInterrupt [rank 0]")]
