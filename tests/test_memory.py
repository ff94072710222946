"""How large a bucket may be, and when rising memory is reported."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpcolocate import ipc_payload
from tpcolocate.doctor.probe import _Exporter
from tpcolocate.errors import ConfigError
from tpcolocate.weights.transport import memory
from tpcolocate.weights.transport.memory import SlopeAlarm, allocated_bytes, free_bytes, plan_bucket

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

CPU = torch.device("cpu")
MIB = 2**20
GIB = 2**30
SHARE = """
import torch
from tpcolocate import errors, ipc_payload
try:
    print(ipc_payload.allocate(64, torch.device("cpu")).numel())
except errors.ConfigError as error:
    assert "torch_shm_manager does not start" in error.message and "TMPDIR" in error.hint
    print("ConfigError", error.hint.partition("which has ")[2].partition(":")[0])
"""


@pytest.mark.parametrize("limit, free, largest, copies, expected", [
    (512 * MIB, [10 * GIB], 100 * MIB, 1, 512 * MIB),  # as asked for
    (512 * MIB, [10 * GIB], 2 * GIB, 1, 512 * MIB),  # a larger tensor travels alone
    (512 * MIB, [100 * MIB], 10 * MIB, 1, 80 * MIB),  # what fits, with a margin
    (512 * MIB, [10 * GIB, 100 * MIB, 5 * GIB], 10 * MIB, 1, 80 * MIB),  # on the fullest rank
    (512 * MIB, [100 * MIB] * 2, 10 * MIB, 2, 40 * MIB),
    (512 * MIB, [100 * MIB], 0, 1, 80 * MIB),  # sizes are not known in advance
    (512 * MIB, [100 * MIB], 80 * MIB, 1, 80 * MIB),  # just so
    (1, [GIB], 0, 1, 1),
    (1000, [1250], 1000, 1, 1000),
])  # fmt: skip
def test_a_bucket_is_what_was_asked_for_or_what_fits(limit, free, largest, copies, expected):
    assert plan_bucket(limit, dict(enumerate(free)), largest=largest, copies=copies) == expected


@pytest.mark.parametrize("free, largest, copies, words", [
    ([100 * MIB], 81 * MIB, 1, "largest tensor (81 MiB, 1 times at once) does not fit into the 100 MiB that are free on the device of rank 0"),
    ([GIB, 100 * MIB, GIB], 41 * MIB, 2, "largest tensor (41 MiB, 2 times at once) does not fit into the 100 MiB that are free on the device of rank 1"),
    ([GIB, 0], 1, 1, "0 KiB that are free on the device of rank 1"),
    ([GIB, 0], 0, 1, "0 KiB that are free on the device of rank 1"),  # sizes are not known, but nothing fits into nothing
])  # fmt: skip
def test_a_tensor_that_fits_nowhere_is_reported_before_anything_is_sent(free, largest, copies, words):
    with pytest.raises(ConfigError) as caught:
        plan_bucket(512 * MIB, dict(enumerate(free)), largest=largest, copies=copies)
    assert words in caught.value.message and "empty_cache" in caught.value.hint
    with pytest.raises(ConfigError, match="free in /dev/shm and RAM for rank") as caught:
        plan_bucket(512 * MIB, dict(enumerate(free)), largest=largest, copies=copies, on_cpu=True)
    assert "--shm-size" in caught.value.hint and "empty_cache" not in caught.value.hint


def test_full_shared_memory_is_an_error_with_what_to_do_and_another_problem_is_torchs(monkeypatch):
    def refusing(words):
        def new(num_bytes):
            raise RuntimeError(f"unable to allocate shared memory(shm) for file </torch_1_2_3>: {words}")

        return new

    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.UntypedStorage, "_new_using_filename_cpu", refusing("No space left on device (28)"))
    with pytest.raises(ConfigError, match="has no space for 64 bytes: .*No space left") as caught:
        ipc_payload.allocate(64, cpu)
    assert "--shm-size" in caught.value.hint
    assert "No space left" in _Exporter().answer({"export": "cpu"})["error"], "the doctor goes on"
    monkeypatch.setattr(torch.UntypedStorage, "_new_using_filename_cpu", refusing("Too many open files (24)"))
    with pytest.raises(RuntimeError, match="Too many open files"):
        ipc_payload.allocate(64, cpu)


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_a_temporary_folder_with_a_path_too_long_for_torch_is_an_error_that_says_so(short_path):
    """In a process that has not shared memory before; the path of a socket has at most 107 characters."""
    for length, expected in ((73, "64"), (74, "ConfigError 74 characters, may have at most 73")):
        folder = short_path / "x".ljust(length - len(str(short_path)) - 1, "x")
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", SHARE],
            env={**os.environ, "TMPDIR": str(folder)},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert done.stdout.strip() == expected, done.stdout + done.stderr


def test_sizes_below_a_mebibyte_are_not_shown_as_none():
    with pytest.raises(ConfigError, match=r"largest tensor \(60 KiB, 2 times at once\) does not fit into the 100 KiB"):
        plan_bucket(512 * MIB, {0: 100 * 1024}, largest=60 * 1024, copies=2)


@given(
    st.integers(1, 2**40),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=8),
    st.integers(0, 2**40),
    st.integers(1, 8),
)
def test_all_copies_of_a_bucket_and_of_the_largest_tensor_fit_on_every_rank(limit, free, largest, copies):
    try:
        planned = plan_bucket(limit, dict(enumerate(free)), largest=largest, copies=copies)
    except ConfigError:
        assert max(largest, 1) * copies > min(free) * memory._USABLE - copies
        return
    assert planned <= limit
    for of_rank in free:
        assert max(planned, largest) * copies <= of_rank


def warnings(*allocated):
    alarm = SlopeAlarm()
    return [alarm.note(value) for value in allocated]


def test_memory_that_rises_every_time_is_reported_with_the_average():
    first = [10 * MIB, 12 * MIB, 14 * MIB, 15 * MIB]
    *quiet, message = warnings(*first, 18 * MIB)
    assert quiet == [None] * 4, "four rises need five values"
    assert "rose at each of the last 4 syncs, by 2.0 MiB on average" in message
    *_, again = warnings(*first, 18 * MIB, 28 * MIB)
    assert "by 4.0 MiB on average" in again, "of the last five only"


@pytest.mark.parametrize("values", [
    [100 * MIB] * 12,
    [i * (MIB - 1) for i in range(12)],  # allocators breathe
    [i * 10 * MIB for i in range(12, 0, -1)],
    [0, 900 * MIB, *[900 * MIB] * 8],  # once, and never again
    [0, *[i * 50 * MIB for i in range(3)]],  # not often enough to report
    [],
])  # fmt: skip
def test_memory_that_is_flat_falls_or_rises_once_gives_no_warning(values):
    assert warnings(*values) == [None] * len(values)


@pytest.mark.parametrize("at", range(1, 5))
@pytest.mark.parametrize("step", [0, -1, -100 * MIB, MIB - 1])
def test_one_sync_that_does_not_rise_starts_anew(at, step):
    values = [GIB]
    for i in range(1, 5):
        values.append(values[-1] + (step if i == at else 10 * MIB))
    assert warnings(*values) == [None] * 5
    for _ in range(at):
        values.append(values[-1] + 10 * MIB)
    *before, last = warnings(*values)
    assert before == [None] * (len(values) - 1) and last is not None, "message again as soon as it is out of sight"


def test_a_rise_of_just_the_threshold_gives_a_warning():
    assert warnings(*[i * MIB for i in range(5)])[-1] is not None


def test_our_own_shared_memory_is_counted_and_taken_from_what_is_free():
    before, free = allocated_bytes(CPU), free_bytes(CPU)
    assert 0 < free <= os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize
    flat = ipc_payload.allocate(8 * MIB, CPU)
    flat.fill_(1)  # a page that was never written takes no memory
    assert 8 * MIB <= allocated_bytes(CPU) - before < 9 * MIB
    del flat
    assert allocated_bytes(CPU) == before
