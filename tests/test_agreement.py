"""`RankGroup`: one rank's error is raised on all, dead ranks and ranks in another call are detected."""

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
    member = Member(rank, len(order), len(order), Host.here(), pid, started)
    members = [None] * len(order)
    dist.all_gather_object(members, member)
    handle = make_group(order, timeout_s=timeout_s, description="test")
    return RankGroup([members[r] for r in order], rank=rank, group=handle, timeout_s=timeout_s)


def gather_sizes(rank, order):
    group = group_of(rank, order)
    small = group.all_gather(("small", rank), what="exchange sizes")
    # larger than one frame on one rank only
    mixed = group.all_gather("x" * (100_000 if rank == 1 else 3), what="exchange sizes")
    return small, [len(text) for text in mixed]


def test_values_of_any_size_are_returned_in_the_order_of_the_slice():
    order = [2, 0, 1]
    expected = ([("small", r) for r in order], [3, 3, 100_000])
    assert run_ranks(gather_sizes, 3, order) == [expected] * 3


def failing(rank, errors_by_rank):
    group = group_of(rank, [0, 1, 2])
    with group.together("load a checkpoint"):
        if rank in errors_by_rank:
            raise errors_by_rank[rank]


@pytest.mark.parametrize("errors_by_rank, kind, words", [
    ({1: ValueError("no memory")}, errors.RankFailedError, "ValueError: no memory [rank 1]"),
    ({2: errors.SyncError("no answer")}, errors.SyncError, "no answer [rank 2]"),
    # a rank that lost its peers is never the cause, however early its error
    ({0: errors.RankLostError("lost"), 2: errors.DeviceError("cause")}, errors.DeviceError, "cause [rank 2]"),
])  # fmt: skip
def test_one_ranks_error_is_raised_on_all(errors_by_rank, kind, words):
    outcomes = run_ranks(failing, 3, errors_by_rank, expect_errors=True)
    for outcome in outcomes:
        assert type(outcome.error) is kind, outcome
        assert str(outcome.error).startswith(words)
    assert len({str(outcome.error) for outcome in outcomes}) == 1


def unpicklable(rank):
    group = group_of(rank, [0, 1])
    group.agree(None, (lambda: 0) if rank == 1 else 0, what="exchange functions")


def test_a_value_that_cannot_be_pickled_is_an_error_on_all_ranks_and_not_a_hang():
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
        group.all_gather(rank, what="load a checkpoint")
    except errors.RankLostError as error:
        first = time.monotonic() - started, str(error)
    try:
        group.all_gather(rank, what="try again")
    except errors.RankLostError as error:
        return *first, str(error)


def test_a_killed_rank_is_detected_at_once_and_named():
    outcomes = run_ranks(dying, 3, expect_errors=True, timeout_s=200)
    for rank in (0, 2):
        seconds, first, again = outcomes[rank].value
        assert seconds < 60, "long before the timeout of 120 s"
        assert first.startswith("load a checkpoint: lost contact with other ranks after") and "1 has exited" in first
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
        group.all_gather(rank, what="wait for a late rank", timeout_s=1.5)
    except errors.RankLostError as error:
        import torch.distributed as dist

        dist.distributed_c10d._get_default_store().set("gave up", "1")
        return time.monotonic() - started, str(error)


def test_the_timeout_of_one_call_is_kept():
    seconds, text = run_ranks(late, 2, timeout_s=200)[0]
    assert 1.4 < seconds < 60, "not the timeout of the group"
    assert text.startswith("wait for a late rank: lost contact with other ranks") and "some rank did not join" in text


def crossing(rank):
    """Ranks in different calls, with small values and large ones, one of them with an error of its own."""
    group = group_of(rank, [1, 0])
    raised = []
    for what, value, error in [
        (["go to sleep", "sync weights"][rank], "x" * [3, 100_000][rank], None),
        (["copy the weights", "leave"][rank], 0, ValueError("no memory") if rank == 0 else None),
    ]:
        try:
            group.agree(error, value, what=what)
        except Exception as caught:
            raised.append((type(caught).__name__, str(caught)))
    return raised, group.all_gather(rank, what="go on together, " + "\u00e9" * 100)


def test_ranks_in_different_calls_raise_an_error_and_stay_in_step():
    found = run_ranks(crossing, 2)
    for rank, (raised, after) in enumerate(found):
        assert raised[0][0] == "RankLostError" and raised[0][1].startswith(
            "the ranks make different calls: rank 1: sync weights; rank 0: go to sleep [slice ranks 1,0]"
        )
        assert after == [1, 0]
        if rank == 0:
            assert raised[1][0] == "ValueError" and "no memory" in raised[1][1], (
                "the cause is raised before its consequence"
            )
        else:
            assert raised[1][1].startswith("the ranks make different calls: rank 1: leave; rank 0: copy the weights")
    assert found[0][0][0] == found[1][0][0], "the same error on every rank"


def two_threads(rank):
    """Rank 0 makes a second call from another thread while the first one waits for rank 1."""
    import threading

    group = group_of(rank, [0, 1])
    results = []
    if rank == 0:
        waiting = threading.Thread(target=lambda: results.append(group.all_gather(rank, what="load a checkpoint")))
        waiting.start()
        while not group._call_lock.locked():
            time.sleep(0.001)
        try:
            group.all_gather(rank, what="sync weights")
        except errors.ConfigError as error:
            results.append(error.message)
        import torch.distributed as dist

        dist.distributed_c10d._get_default_store().set("refused", "1")
        waiting.join(40)
    else:
        import torch.distributed as dist

        dist.distributed_c10d._get_default_store().get("refused")
        results.append(group.all_gather(rank, what="load a checkpoint"))
    return results, group.all_gather(rank, what="go on")


def test_a_second_thread_is_refused_and_the_first_ones_call_goes_on():
    words = "cannot sync weights: another thread of this rank is in the collective call 'load a checkpoint'"
    assert run_ranks(two_threads, 2) == [([words, [0, 1]], [0, 1]), ([[0, 1]], [0, 1])]


def comparing(rank):
    """Ranks whose arguments match, differ, or that fail before they have set them."""
    group = group_of(rank, [1, 0])
    raised = []
    for arguments in ({"tags": ["a"], "how": 1}, {"tags": ["a"] * 500 + [rank], "how": rank}, None):
        try:
            with group.together("load a checkpoint") as must_match:
                if arguments is None and rank == 0:
                    raise ValueError("no memory")
                must_match |= arguments or {"how": rank}
            raised.append(None)
        except Exception as caught:
            raised.append((type(caught).__name__, str(caught).partition("\n")[0]))
    return raised


def test_the_first_argument_that_differs_between_ranks_is_named():
    same, different, failed = run_ranks(comparing, 2)[0]
    assert same is None and failed == ("RankFailedError", "ValueError: no memory [rank 0]")
    shown = "['a', 'a', " + "'a', " * 37 + "'a', "
    assert different[0] == "ConfigError" and len(shown) == 201
    assert different[1].startswith(
        f"cannot load a checkpoint: ranks 1 and 0 pass different tags: {shown[:200]} and ['a'"
    )
    assert run_ranks(comparing, 2)[1] == [same, different, failed]


def interrupted(rank):
    group = group_of(rank, [0, 1])
    try:
        with group.together("be interrupted"):
            if rank == 0:
                raise KeyboardInterrupt
    except BaseException as error:
        return type(error).__name__, str(error)[:60].split("\n")[0]


def test_an_interrupt_keeps_its_class_where_it_happened_and_is_reported_elsewhere():
    assert run_ranks(interrupted, 2) == [("KeyboardInterrupt", ""), ("RankFailedError", "KeyboardInterrupt [rank 0]")]
