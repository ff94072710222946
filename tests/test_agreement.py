"""`RankGroup`: one rank's error is raised on all, dead ranks and ranks in another call are detected."""

import contextlib
import itertools
import logging
import os
import re
import signal
import threading
import time
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
from harness import run_ranks

from tpcolocate import errors, presence, rounds
from tpcolocate.agreement import RankGroup
from tpcolocate.engine.context import SliceContext
from tpcolocate.engine.generation import GenerationControl
from tpcolocate.groups import Host, Member, make_group
from tpcolocate.processes import is_stopped, this_process
from tpcolocate.server.lifecycle import Lifecycle, State

pytestmark = pytest.mark.quick


def group_of(rank, order, timeout_s=20.0):
    """A RankGroup over `order`, whose results must come in that order; in a rank's process."""
    import torch.distributed as dist

    presence._STORE_S = 40.0  # the store lives, however busy the machine is
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


@pytest.mark.slow
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


def own_error(rank, error):
    """Whether this rank raises its own error, and what is shown above it."""
    group = group_of(rank, [0, 1])
    try:
        group.agree(error if rank == 1 else None, what="load a checkpoint")
    except errors.TpColocateError as raised:
        return raised is error, type(raised.__cause__)


def test_the_rank_that_fails_shows_its_error_once():
    assert run_ranks(own_error, 2, errors.SyncError("no answer")) == [(False, type(None)), (True, type(None))]
    assert run_ranks(own_error, 2, ValueError("no memory")) == [(False, type(None)), (False, ValueError)]


def unpicklable(rank):
    group = group_of(rank, [0, 1])
    group.agree(None, (lambda: 0) if rank == 1 else 0, what="exchange functions")


def test_a_value_that_cannot_be_pickled_is_an_error_on_all_ranks_and_not_a_hang():
    for outcome in run_ranks(unpicklable, 2, expect_errors=True):
        assert isinstance(outcome.error, errors.RankFailedError) and "ambda" in str(outcome.error)
        assert outcome.seconds < 40, "before any deadline"


def dying(rank):
    rounds._EXIT_S = 40.0  # its connections are closed before it has exited
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


def store():
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


class Warnings(logging.Handler):
    """Collects the warnings about waiting, and reports the first one to the other ranks."""

    def __init__(self, patch, *, after_s=1.2):
        super().__init__()
        self.texts = []
        patch.setattr(rounds, "WARN_AFTER_S", after_s)
        patch.setattr(rounds, "WARN_INTERVAL_S", 1.0)
        rounds.logger.addHandler(self)

    def emit(self, record):
        self.texts.append(record.getMessage())
        if len(self.texts) == 2:
            store().set("warned twice", "1")


def see_first(patch, ranks):
    """Have a rank that would name the missing ones wait until it knows that these have come; in a call to which others do not."""
    awaited = rounds.Rounds._awaited

    def once_they_are_there(self, number):
        while self._presence.absent(ranks, number) != []:
            time.sleep(0.01)
        return awaited(self, number)

    patch.setattr(rounds.Rounds, "_awaited", once_they_are_there)


def patiently(rank):
    """Rank 1 comes long after the group's timeout."""
    with pytest.MonkeyPatch.context() as patch:
        warnings = Warnings(patch)
        see_first(patch, [0, 2])
        group = group_of(rank, [0, 1, 2], timeout_s=0.5)
        if rank == 1:
            store().wait(["warned twice"], timedelta(seconds=40))
        found = group.all_gather(rank, what="sync weights")
    return found, group.all_gather(-rank, what="go on"), warnings.texts


@pytest.mark.slow
def test_a_late_rank_is_waited_for_while_all_members_are_running_and_one_rank_names_it():
    outcomes = run_ranks(patiently, 3, timeout_s=100)
    assert [outcome[:2] for outcome in outcomes] == [([0, 1, 2], [0, -1, -2])] * 3
    first = outcomes[0][2][0]
    assert re.match(r"sync weights: rank 0 has waited \d+ s: rank 1 is missing; it waits for as long as", first)
    assert "longer than 0.5 s (timeout_s of init())" in first
    assert outcomes[1][2] == outcomes[2][2] == [], "one rank warns for all that wait"


def expected_to_be_late(rank):
    """Rank 1 comes after the time from which others are warned of, and within what it is expected to take."""
    with pytest.MonkeyPatch.context() as patch:
        warnings = Warnings(patch, after_s=0.3)
        group = group_of(rank, [0, 1], timeout_s=60.0)
        if rank == 1:
            time.sleep(2.5)
        return group.all_gather(rank, what="launch the server", quiet_s=60.0), warnings.texts


@pytest.mark.slow
def test_a_rank_that_is_expected_to_be_late_is_no_warning():
    assert run_ranks(expected_to_be_late, 2, timeout_s=100) == [([0, 1], [])] * 2


def stopped(rank):
    with pytest.MonkeyPatch.context() as patch:
        warnings = Warnings(patch)
        group = group_of(rank, [0, 1], timeout_s=0.5)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
            return group.all_gather(rank, what="sync weights")

        def go_on():
            store().wait(["warned twice"], timedelta(seconds=40))
            os.kill(group.members[1].pid, signal.SIGCONT)

        waiting = threading.Thread(target=go_on)
        waiting.start()
        while not is_stopped(group.members[1].pid):
            time.sleep(0.01)
        found = group.all_gather(rank, what="sync weights")
        waiting.join()
        return found, warnings.texts[0]


@pytest.mark.slow
def test_a_stopped_rank_is_named_as_such_and_waited_for():
    (found, warning), other = run_ranks(stopped, 2, timeout_s=100)
    assert found == other == [0, 1]
    assert "rank 1 (its process is stopped) is missing" in warning


def giving_up(rank, elsewhere):
    """Rank 1 comes after the others have given up; all make another call afterwards."""
    import gc

    import torch.distributed as dist

    group = group_of(rank, [0, 1, 2], timeout_s=0.8 if elsewhere else 60.0)
    if elsewhere:
        hosts = [replace(m, host=replace(m.host, pids=f"pid:[{m.rank}]")) for m in group.members]
        group = RankGroup(hosts, rank=rank, group=group.group, timeout_s=0.8)
    timeout_s = None if elsewhere else 0.8
    if rank == 1:
        store().wait(["0 gave up", "2 gave up"], timedelta(seconds=40))
    with pytest.MonkeyPatch.context() as patch:
        see_first(patch, [0, 2])
        try:
            group.all_gather(rank, what="sync weights", timeout_s=timeout_s)
        except errors.RankLostError as error:
            text = str(error)
    store().set(f"{rank} gave up", "1")
    found = group.all_gather(rank, what="sync weights", timeout_s=40.0)
    if rank != 1:
        with contextlib.suppress(errors.RankLostError):
            group.all_gather(rank, what="wait in vain", timeout_s=0.5)
        dist.destroy_process_group(group.group)
        del group
        gc.collect()
        store().set(f"{rank} is done", "1")
    else:  # for which deleting the group does not wait
        store().wait(["0 is done", "2 is done"], timedelta(seconds=40))
    return text, found


@pytest.mark.parametrize("elsewhere, limit", [(False, "timeout_s of this call"), (True, "timeout_s of init()")])
def test_a_call_that_was_given_up_fails_on_the_late_rank_too_and_the_next_one_works(elsewhere, limit):
    (text, found), *others = run_ranks(giving_up, 3, elsewhere, timeout_s=100)
    assert all(other == (text, found) for other in others), "the same on every rank"
    assert found == [0, 1, 2]
    assert f"some rank did not join within 0.8 s ({limit}): rank 1 is missing" in text


def interrupted_wait(rank):
    """Rank 0 is interrupted while it waits, and makes the same call again."""
    group = group_of(rank, [0, 1], timeout_s=40.0)

    def worker_was_killed(*_):  # as torch's handler for SIGCHLD says of one of a data loader's
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    found = []
    for kind, handler in ((KeyboardInterrupt, signal.default_int_handler), (RuntimeError, worker_was_killed)):
        if rank == 0:
            signal.signal(signal.SIGALRM, handler)
            with pytest.raises(kind) as caught:
                signal.setitimer(signal.ITIMER_REAL, 0.3)
                group.all_gather("first", what="shut down")
            assert not isinstance(caught.value, errors.TpColocateError)
            store().set(kind.__name__, "1")
        else:
            store().wait([kind.__name__], timedelta(seconds=40))
        found += [group.all_gather("first", what="shut down"), group.all_gather(rank, what="go on")]
    return found


def test_a_call_that_was_interrupted_is_resumed_by_the_same_call():
    assert run_ranks(interrupted_wait, 2, timeout_s=100) == [[["first"] * 2, [0, 1]] * 2] * 2


# --- ranks that leave a call in the middle ---

STEPS = 4


class Interruption:
    """Raises KeyboardInterrupt once: before a step, while this rank waits in it, or after it.

    Args:
        limited: The first step that the others give up after a short time; to those before it all ranks come.
    """

    def __init__(self, monkeypatch, group, step, where, limited=STEPS):
        self.group, self.step, self.where, self.wait = group, step, where, group._rounds._wait
        self.limited = limited
        monkeypatch.setattr(group._rounds, "_wait", self._wait)
        self.now = 0

    def at(self, step, where):
        if (step, where) == (self.step, self.where):
            self.step = None
            raise KeyboardInterrupt

    def _wait(self, work, seconds):
        self.at(self.now, "in")
        return self.wait(work, seconds)

    def make(self, number):
        """A call of several steps; the ranks wait for each other in the first, and have a deadline in the others."""
        values = [self.group.agree(None, (number, 0), what="step 0")]
        with self.group.going_on():
            for self.now in range(1, STEPS):
                self.at(self.now, "before")
                limit_s = 0.6 if self.now >= self.limited else 40.0
                values.append(self.group.agree(None, (number, self.now), what=f"step {self.now}", timeout_s=limit_s))
                self.at(self.now, "after")
        return values


def interrupted_in_a_call(rank, plan, is_next_later):
    """The outcome of each call on this rank; after an interrupt the next one follows at once, or once the others have left it."""
    group = group_of(rank, [0, 1, 2], timeout_s=40.0)
    outcomes = []
    for number, (victim, step, where) in enumerate(plan):
        with pytest.MonkeyPatch.context() as patch:
            limited = STEPS if victim is None else step + (where != "before")
            interruption = Interruption(patch, group, step if rank == victim else None, where, limited)
            try:
                found = {number for number, _ in itertools.chain(*interruption.make(number))}
                outcomes.append("ok" if found == {number} else f"values of calls {found}")
            except KeyboardInterrupt:
                outcomes.append("interrupted")
            except errors.RankLostError as error:
                outcomes.append("given up" if "did not join" in error.message else error.message)
        store().set(f"{rank} has left {number}", "1")
        if is_next_later and rank == victim:
            store().wait([f"{other} has left {number}" for other in range(3)], timedelta(seconds=40))
    return outcomes, group.all_gather(rank, what="go on")


MOMENTS = [(step, where) for step in range(1, STEPS) for where in ("before", "in", "after")]


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.slow
def test_a_rank_that_has_left_a_call_in_the_middle_is_in_step_with_the_next_call(victim):
    none = (None, None, None)
    plan = [call for step, where in MOMENTS for call in ((victim, step, where), none)]
    of_ranks = run_ranks(interrupted_in_a_call, 3, plan, True, timeout_s=100)
    assert [last for _, last in of_ranks] == [[0, 1, 2]] * 3
    for (interrupted, step, where), *outcomes in zip(plan, *(found for found, _ in of_ranks), strict=True):
        is_last = step == STEPS - 1 and where != "before"  # the others have the whole call
        for rank, outcome in enumerate(outcomes):
            others = "ok" if interrupted is None or is_last else "given up"
            assert outcome == ("interrupted" if rank == interrupted else others), (step, where, rank)


def interrupted_in_a_pause(rank, victim):
    """One rank is interrupted while the owner pauses; what the ranks know then, and what the owner asked for."""
    group = group_of(rank, [0, 1], timeout_s=5.0)
    asked = []
    owned = SimpleNamespace(
        api=SimpleNamespace(pause_generation=lambda mode, timeout_s: asked.append(mode), info={}),
        generation=SimpleNamespace(continue_generation=lambda timeout_s: asked.append("go on")),
    )
    server = SimpleNamespace(owned=owned if rank == 0 else None)
    context = SliceContext(group, None, 0, Lifecycle(State()), server)
    control, seen = GenerationControl(context), []
    with pytest.MonkeyPatch.context() as patch:
        interruption = Interruption(patch, group, 2 if rank == victim else None, "in")
        agree = group.agree

        def count(*args, **kwargs):
            interruption.now += 1
            return agree(*args, **kwargs)

        patch.setattr(group, "agree", count)
        try:
            control.pause("in_place", timeout_s=40.0)
        except KeyboardInterrupt:
            seen.append("interrupted")
    seen.append(context.state.paused)
    control.pause("in_place", timeout_s=40.0)
    control.go_on(timeout_s=40.0)
    control.go_on(timeout_s=40.0)
    return seen, context.state.paused, asked, group.all_gather(rank, what="go on")


@pytest.mark.parametrize("victim", [0, 1])
def test_an_interrupt_in_a_pause_leaves_the_ranks_in_step(victim):
    of_ranks = run_ranks(interrupted_in_a_pause, 2, victim, timeout_s=60)
    for rank, found in enumerate(of_ranks):
        seen = ["interrupted"] * (rank == victim) + ["in_place"]
        assert found == (seen, None, ["in_place", "go on"] if rank == 0 else [], [0, 1])


def left_alone(rank, plan, pause_s):
    """As `interrupted_in_a_call`, with a call that ranks make known to have left, and a late rank; also the longest call."""
    group = group_of(rank, [0, 1, 2], timeout_s=60.0)
    outcomes, longest = [], 0.0
    for number, (victim, step, where, late) in enumerate(plan):
        group.all_gather(None, what="begin")
        started = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            interruption = Interruption(patch, group, step if rank == victim else None, where)
            try:
                with group.going_on(f"call {number}"):
                    for interruption.now in range(1, STEPS):
                        if rank == late and interruption.now == step:
                            time.sleep(2.5)
                        interruption.at(interruption.now, "before")
                        try:
                            group.agree(None, what=f"step {interruption.now}", timeout_s=90.0)
                        except errors.RankLostError as lost:
                            raise (group.error_of_left() or lost) from None
                        interruption.at(interruption.now, "after")
                outcomes.append("ok")
            except KeyboardInterrupt:
                outcomes.append("interrupted")
                time.sleep(pause_s)
            except errors.TpColocateError as error:
                outcomes.append(f"{type(error).__name__}: {error.message} of {error.rank}")
        assert group.error_of_left() is None, "outside of the call"
        longest = max(longest, time.monotonic() - started)
    return outcomes, longest, group.all_gather(rank, what="go on")


@pytest.mark.parametrize("pause_s", [0.0, 3.0], ids=["next call at once", "later"])
@pytest.mark.parametrize("late", [None, 2], ids=["", "beside a late rank"])
@pytest.mark.slow
def test_a_rank_that_leaves_a_call_that_is_watched_takes_the_others_with_it(pause_s, late):
    plan = []
    for step, where in ((1, "before"), (1, "in"), (2, "after"), (STEPS - 1, "before")):
        plan += [(1, step, where, late), (None, None, None, None)]
    of_ranks = run_ranks(left_alone, 3, plan, pause_s, timeout_s=150)
    assert [last for *_, last in of_ranks] == [[0, 1, 2]] * 3
    for (victim, step, where, _), *outcomes in zip(plan, *(found for found, *_ in of_ranks), strict=True):
        for rank, outcome in enumerate(outcomes):
            others = "ok" if victim is None else "RankFailedError: KeyboardInterrupt of 1"
            assert outcome == ("interrupted" if rank == victim else others), (step, where, rank)
    assert all(longest < 40.0 for _, longest, _ in of_ranks), "long before the deadline of 90 s"


def test_a_next_call_that_meets_the_one_that_was_left_fails_alike_on_all_ranks_and_the_one_after_it_works():
    plan = [call for step, where in MOMENTS for call in ((1, step, where), (None, None, None), (None, None, None))]
    of_ranks = run_ranks(interrupted_in_a_call, 3, plan, False, timeout_s=100)
    assert [last for _, last in of_ranks] == [[0, 1, 2]] * 3
    for (interrupted, step, where), *outcomes in zip(plan, *(found for found, _ in of_ranks), strict=True):
        if interrupted is None:
            assert len(set(outcomes)) == 1, (step, where)
    assert all(found[2::3] == ["ok"] * len(MOMENTS) for found, _ in of_ranks)


def forked(rank):
    groups = [group_of(rank, [0, 1]), RankGroup([this_member()], rank=0, group=None, timeout_s=1.0)]
    calls = [
        lambda group: group.all_gather(1, what="sync weights"),
        lambda group: group.agree(None, what="sync weights"),
        lambda group: group.run_on(0, lambda: 1, what="sync weights"),
    ]
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        for group in groups:
            for call in calls:
                try:
                    call(group)
                    os.write(write, b"called\n")
                except errors.ConfigError as error:
                    os.write(write, error.message.encode() + b"\n")
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        return pid, os.getpid(), pipe.read().splitlines(), groups[0].all_gather(rank, what="go on")


def this_member():
    return Member(0, 1, 1, Host.here(), *this_process())


def test_a_forked_process_is_refused_and_its_parent_goes_on():
    for rank, (child, parent, texts, found) in enumerate(run_ranks(forked, 2)):
        words = f"cannot sync weights: process {child} was forked from process {parent} of rank "
        assert len(texts) == 6 and all(text.startswith(words) for text in texts), texts
        assert found == [0, 1], rank


class DeadStore:
    """A store whose requests fail, or block without end."""

    def __init__(self, blocks):
        self.blocks = blocks

    def _request(self, *_):
        if self.blocks:
            threading.Event().wait()
        raise RuntimeError("the store is gone")

    set = check = get = compare_set = _request


@pytest.mark.parametrize("blocks", [False, True])
def test_a_store_that_does_not_answer_costs_seconds_at_most(blocks, monkeypatch):
    monkeypatch.setattr(presence, "_STORE_S", 0.1)
    found = presence.Presence(DeadStore(blocks), rank=0)
    started = time.monotonic()
    found.publish(1)
    assert found.absent([0, 1], 1) is None and found.decide(1, "complete") is None
    assert time.monotonic() - started < 30, "a store that blocks does so without end"


def test_a_process_that_can_start_no_thread_waits_without_its_store(monkeypatch):
    """As from Python 3.12 on in functions of atexit, one of which may shut an engine down."""

    def refused(_):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refused)
    found = presence.Presence(DeadStore(False), rank=0)
    for _ in range(2):
        found.publish(1)
        assert found.absent([0, 1], 1) is None and found.decide(1, "complete") is None
