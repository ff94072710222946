"""Payloads, opened by SGLang's own code in another process, and the ledger that tracks their release."""

import base64
import gc
import inspect
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness import PRELOADED
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing import reductions

from tpcolocate import ipc_payload
from tpcolocate.deadline import Deadline
from tpcolocate.errors import ConfigError, DeadlineError, SyncError
from tpcolocate.in_server.tpcolocate_receiver.handles import open_handle
from tpcolocate.ipc_payload import Fate

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

DTYPES = [torch.bfloat16, torch.float32, torch.int8, torch.bool, torch.float64, torch.int64, torch.float8_e4m3fn]


# --- layout ---------------------------------------------------------------------------------------------------------

tensors_to_lay_out = st.lists(
    st.tuples(st.lists(st.integers(0, 9), max_size=4).map(torch.Size), st.sampled_from(DTYPES)), max_size=20
)


@given(tensors_to_lay_out)
def test_entries_are_aligned_in_order_and_do_not_overlap(shapes):
    entries, num_bytes = ipc_payload.layout([(str(i), shape, dtype) for i, (shape, dtype) in enumerate(shapes)])
    end = 0
    for i, (entry, (shape, dtype)) in enumerate(zip(entries, shapes, strict=True)):
        assert (entry.name, entry.shape, entry.dtype) == (str(i), shape, dtype)
        assert entry.start % ipc_payload.ALIGNMENT == 0
        assert end <= entry.start < end + ipc_payload.ALIGNMENT
        assert entry.num_bytes == torch.empty(shape, dtype=dtype).nbytes
        end = entry.start + entry.num_bytes
    assert end <= num_bytes < end + ipc_payload.ALIGNMENT


# --- CUDA, without a device ------------------ -----------------------------------------------------------------------

CUDA_NAMES = (
    "tensor_cls", "tensor_size", "tensor_stride", "tensor_offset", "storage_cls", "dtype", "storage_device", "storage_handle",
    "storage_size_bytes", "storage_offset_bytes", "requires_grad", "ref_counter_handle", "ref_counter_offset", "event_handle",
    "event_sync_required",
)  # fmt: skip


def cuda_handle(num_bytes=256):
    """A handle as exported from a GPU."""
    handle = object.__new__(ipc_payload.CudaHandle)
    vars(handle).update(
        handle=b"H", num_bytes=num_bytes, offset=512, counter_file=b"/counter", counter_offset=3, event=b"E", event_sync=True,
        device_uuid="GPU-1",
    )  # fmt: skip
    return handle


def test_the_installed_torch_has_the_expected_arguments():
    parameters = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert ipc_payload._cuda_rebuild_order(tuple(reversed(CUDA_NAMES))) == parameters


def test_arguments_are_passed_by_name(monkeypatch):
    names = list(reversed(CUDA_NAMES))
    reordered = lambda: None
    reordered.__signature__ = inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    )
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", reordered)
    function, arguments = cuda_handle().reduced().__reduce__()
    by_name = dict(zip(names, arguments, strict=True))
    assert function is reordered
    assert (by_name["storage_device"], by_name["ref_counter_handle"], by_name["ref_counter_offset"]) == (
        "GPU-1",
        b"/counter",
        3,
    )
    assert (by_name["storage_handle"], by_name["storage_offset_bytes"], by_name["storage_size_bytes"]) == (
        b"H",
        512,
        256,
    )
    assert (by_name["tensor_size"], by_name["dtype"]) == (torch.Size([256]), torch.uint8)


@pytest.mark.parametrize("names", [CUDA_NAMES[:-1], (*CUDA_NAMES, "one_more")])
def test_a_torch_with_other_arguments_is_rejected(monkeypatch, names):
    other = lambda: None
    other.__signature__ = inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    )
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", other)
    with pytest.raises(ConfigError, match="rebuild_cuda_tensor"):
        ipc_payload._cuda_rebuild_order(CUDA_NAMES)


@pytest.mark.parametrize("stored, count", [(1, 1), (0, 0), (2**64 - 1, -1)])
def test_the_counter_is_read_from_torchs_file(monkeypatch, tmp_path, stored, count):
    monkeypatch.setattr(ipc_payload, "_SHM", tmp_path)
    slots = [9] * 8 + [7, 7, 7, stored, 7]  # a header of 64 bytes, then one counter per slot
    (tmp_path / "counter").write_bytes(b"".join(slot.to_bytes(8, "little") for slot in slots))
    assert cuda_handle().count() == count
    if count < 0:
        cuda_handle().reclaim()
        assert cuda_handle().count() == 0
        assert (tmp_path / "counter").read_bytes()[64 : 64 + 24] == (7).to_bytes(8, "little") * 3


def test_a_removed_counter_file_means_that_all_are_released(monkeypatch, tmp_path):
    monkeypatch.setattr(ipc_payload, "_SHM", tmp_path)
    assert cuda_handle().count() == 0


FRESH = (
    "import sys, torch, torch.multiprocessing as mp\n"
    "from torch.multiprocessing import reductions\n"
    "from multiprocessing.reduction import ForkingPickler\n"
    "before = mp.get_sharing_strategy(), reductions.rebuild_cuda_tensor, dict(ForkingPickler._extra_reducers)\n"
    "from tpcolocate import ipc_payload\n"
    "ledger = ipc_payload.Ledger(rank=0)\n"
    "entries, n = ipc_payload.layout([('w', torch.Size([3]), torch.float32)])\n"
    "flat = ipc_payload.allocate(n, torch.device('cpu'))\n"
    "assert len(ipc_payload.payload(ledger.export(flat, tp_rank=0, bucket=0), entries)) > 100\n"
    "ledger.reclaim()\n"
    "assert before == (mp.get_sharing_strategy(), reductions.rebuild_cuda_tensor, dict(ForkingPickler._extra_reducers))\n"
    "assert 'sglang' not in sys.modules\n"
)


@pytest.fixture(scope="session")
def starting_interpreter():
    """Started early: importing torch takes seconds, in which other tests run."""
    process = subprocess.Popen([sys.executable, "-c", FRESH], stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


# --- readers --------------------------------------------------------------------------------------------------------


def reader_main(pipe):
    """Open payloads as a TP worker of SGLang does.  Receives (action, payload) and sends the result."""
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    pipe.send("ready")
    opened = []
    while True:
        action, payload = pipe.recv()
        try:
            if action == "open":
                bucket = MultiprocessingSerializer.deserialize(payload)
                bucket = FlattenedTensorBucket(**bucket)
                opened.append(bucket)
                # As bytes: not every dtype can be pickled or compared.
                answer = [
                    (
                        name,
                        tuple(tensor.shape),
                        str(tensor.dtype),
                        tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
                    )
                    for name, tensor in bucket.reconstruct_tensors()
                ]
                del bucket
            elif action == "release":
                opened.clear()
                answer = "released"
            pipe.send(answer)
        except Exception as error:
            pipe.send(error)


class Reader:
    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, remote = context.Pipe()
        self.process = context.Process(target=reader_main, args=(remote,), daemon=True)
        self.process.start()
        remote.close()

    def wait_ready(self):
        assert self.pipe.poll(110) and self.pipe.recv() == "ready"
        return self

    def call(self, action, payload=None):
        self.pipe.send((action, payload))
        assert self.pipe.poll(60), "the reader hangs"
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def open_and_release(self, payload):
        found = self.call("open", payload)
        self.call("release")
        return found


@pytest.fixture(scope="session")
def starting_reader():
    """One for all tests, started early: importing sglang takes seconds, in which other tests run."""
    reader = Reader()
    yield reader
    reader.process.kill()
    reader.process.join()


@pytest.fixture(autouse=True)
def _started_early(starting_reader, starting_interpreter):
    pass


@pytest.fixture(scope="session")
def fresh_interpreter(starting_interpreter):
    return starting_interpreter


@pytest.fixture(scope="session")
def reader(starting_reader):
    return starting_reader.wait_ready()


@pytest.fixture
def ledger():
    ledger = ipc_payload.Ledger(rank=5)
    yield ledger
    ledger.reclaim()


def filled(tensors):
    entries, num_bytes = ipc_payload.layout([(name, tensor.shape, tensor.dtype) for name, tensor in tensors])
    flat = ipc_payload.allocate(num_bytes, torch.device("cpu"))
    for entry, (_, tensor) in zip(entries, tensors, strict=True):
        ipc_payload.view(flat, entry).copy_(tensor)
    return flat, entries


def as_bytes(tensors):
    return [
        (name, tuple(t.shape), str(t.dtype), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors
    ]


def some(numel=100):
    return [("w", torch.arange(numel, dtype=torch.float32))]


def shm_file(handle):
    return Path("/dev/shm") / handle.name.decode().lstrip("/")


BATCHES = {
    "every dtype": [(str(dtype), (torch.randn(5, 3) * 3).to(dtype)) for dtype in DTYPES],
    "zero-size": [
        ("empty", torch.empty(0)),
        ("also", torch.empty(3, 0, dtype=torch.bfloat16)),
        ("w", torch.ones(2)),
        ("last", torch.empty(0, 7)),
    ],
    "only zero-size": [("empty", torch.empty(0, 4))],
    "scalars": [("a", torch.tensor(3.5)), ("b", torch.tensor(7, dtype=torch.int8)), ("c", torch.tensor(True))],
    "not contiguous": [
        ("t", torch.randn(7, 5).t()),
        ("s", torch.randn(10, 10)[::2, 1::3]),
        ("e", torch.randn(4, 1).expand(4, 6)),
    ],
    "one big among small": [("a", torch.randn(3)), ("big", torch.randn(1000, 1000)), ("b", torch.randn(3))],
    "parameter": [("p", torch.nn.Parameter(torch.randn(4)).detach())],
    "names": [("model.layers.0.ä weight", torch.randn(2))],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BATCHES)
def test_sglang_reads_the_same_bytes(reader, ledger, case):
    torch.manual_seed(0)
    tensors = BATCHES[case]
    flat, entries = filled(tensors)
    handle = ledger.export(flat, tp_rank=0, bucket=0)
    assert handle.count() == 1
    assert reader.call("open", ipc_payload.payload(handle, entries)) == as_bytes(tensors)
    assert handle.count() == 1, "still open"
    reader.call("release")
    assert handle.count() == 0
    ledger.wait_for_release(Deadline.after(60))
    assert ledger.num_returned == ledger.num_exported == 1


def test_a_command_has_no_tensor_data():
    job = {"session": "s", "text": 'ä "\n'}
    [(name, tensor)] = pickle.loads(base64.b64decode(ipc_payload.command(job)))
    assert json.loads(name) == job and tensor.numel() == 0


def test_only_allowed_globals_are_pickled():
    """The unpickler of 0.5.21 allows exact names only; older ones allow these too."""
    found = set()

    class Anything:
        def __init__(self, *args):
            pass

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            found.add((module, name))
            return Anything

    flat, entries = filled(some())
    handle = ipc_payload.export(flat)
    Unpickler(io.BytesIO(base64.b64decode(ipc_payload.payload(handle, entries)))).load()
    handle.reclaim()
    assert found == {
        ("types", "SimpleNamespace"), ("torch", "Size"), ("torch", "Tensor"), ("torch", "float32"), ("torch", "uint8"),
        ("torch.storage", "UntypedStorage"), ("torch.multiprocessing.reductions", "rebuild_tensor"),
        ("torch.multiprocessing.reductions", "rebuild_typed_storage"),
        ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
    }  # fmt: skip


def test_independent_exports_for_independent_readers(reader, ledger):
    flat, entries = filled(some())
    copy = ipc_payload.allocate(flat.numel(), flat.device).copy_(flat)
    handles = [ledger.export(f, tp_rank=k, bucket=0) for k, f in enumerate((flat, copy))]
    reader.open_and_release(ipc_payload.payload(handles[1], entries))
    assert [(o.tp_rank, o.count) for o in ledger.outstanding()] == [(0, 1)]
    reader.open_and_release(ipc_payload.payload(handles[0], entries))
    assert ledger.outstanding() == []


def test_a_payload_that_is_opened_twice_is_an_error_that_names_it(reader, ledger):
    flat, entries = filled(some())
    handle = ledger.export(flat, tp_rank=1, bucket=4)
    payload = ipc_payload.payload(handle, entries)
    reader.open_and_release(payload)
    reader.open_and_release(payload)
    assert handle.count() < 0
    with pytest.raises(
        SyncError, match=r"bucket 4 \(512 bytes\) of rank 5 for TP rank 1: released more than once: .* \(count -1\)"
    ) as caught:
        ledger.wait_for_release(Deadline.after(60))
    assert caught.value.rank == 5 and "payload of its own" in caught.value.hint
    assert ledger.outstanding() == [] and ledger.num_returned == 0, "raised once, and not counted as returned"


# Reports of the readers, and whether they are alive -> fate of an outstanding handle.
FATES = [
    (None, True, Fate.UNKNOWN),
    ({1: True}, True, Fate.STILL_OPEN),
    ({1: False}, True, Fate.NEVER_OPENED),
    ({0: False}, True, Fate.UNKNOWN),  # reported by another TP rank
    (None, False, Fate.READER_KILLED),
    ({1: True}, False, Fate.READER_KILLED),
]


@pytest.mark.parametrize("reported, alive, fate", FATES)
def test_an_outstanding_handle_is_reported_with_its_fate(reported, alive, fate):
    ledger = ipc_payload.Ledger(rank=5, reader_is_alive=lambda: alive)
    handle = ledger.export(filled(some())[0], tp_rank=1, bucket=3)
    if reported is not None:
        ledger.note_opened(2, {1: reported is not FATES[1][0]})  # of another bucket
        ledger.note_opened(3, reported)
    [item] = ledger.outstanding()
    assert item == ipc_payload.Outstanding(5, 1, 3, 512, 1, fate)
    assert str(item) == f"bucket 3 (512 bytes) of rank 5 for TP rank 1: {fate.value} (count 1)"
    began = time.monotonic()
    waits = fate in (Fate.STILL_OPEN, Fate.UNKNOWN)
    with pytest.raises(DeadlineError if waits else SyncError, match=re.escape(str(item))) as caught:
        ledger.wait_for_release(Deadline.after(0.1 if waits else 60))
    assert caught.value.rank == 5 and caught.value.hint
    assert waits == (0.1 <= time.monotonic() - began) and time.monotonic() - began < 30
    if waits:
        assert ledger.outstanding() == [item], "it stays in the ledger"
        assert ledger.reclaim() == [item]
    assert handle.count() == 0 and ledger.outstanding() == [], "reclaimed"


def test_a_message_lists_some_handles_and_counts_all():
    many = [ipc_payload.Outstanding(0, 0, bucket, 2**20, 1, Fate.STILL_OPEN) for bucket in range(400)]
    few = "; ".join(map(str, many[:5]))
    assert ipc_payload.listed(many[:5]) == f"{few} (5.0 MiB in all)"
    assert ipc_payload.listed(many) == f"{few} and 395 more (400.0 MiB in all)"


def test_a_released_handle_is_no_error(ledger):
    """Whatever its reader reported, and even if it died afterwards."""
    ledger._reader_is_alive = lambda: pytest.fail("must not be called")
    handle = ledger.export(filled(some())[0], tp_rank=0, bucket=0)
    ledger.note_opened(0, {0: False})
    handle.reclaim()
    ledger.wait_for_release(Deadline.after(0))
    assert (ledger.num_exported, ledger.num_returned) == (1, 1)


def test_the_longest_time_to_release_is_recorded(ledger, monkeypatch):
    assert ledger.latest_return_s == 0.0
    handle = ledger.export(filled(some())[0], tp_rank=0, bucket=0)
    monkeypatch.setattr(
        ipc_payload.time, "sleep", lambda _: handle.reclaim() if time.monotonic() >= began + 0.03 else None
    )
    began = time.monotonic()
    ledger.wait_for_release(Deadline.after(60))
    longest = ledger.latest_return_s
    assert 0.02 < longest < 60
    ledger.wait_for_release(Deadline.after(60))
    assert ledger.latest_return_s == longest


def test_wait_for_release_waits_for_the_reader(reader, ledger):
    flat, entries = filled(some())
    reader.call("open", ipc_payload.payload(ledger.export(flat, tp_rank=0, bucket=0), entries))
    reader.pipe.send(("release", None))
    ledger.wait_for_release(Deadline.after(60))
    assert reader.pipe.poll(60) and reader.pipe.recv() == "released"


def test_memory_that_was_never_opened_is_freed_by_reclaim(ledger):
    flat, _ = filled(some())
    handle = ledger.export(flat, tp_rank=0, bucket=0)
    file = shm_file(handle)
    assert [(o.tp_rank, o.count, o.fate) for o in ledger.reclaim()] == [(0, 1, Fate.UNKNOWN)]
    assert handle.count() == 0 and ledger.reclaim() == []
    del flat, handle
    assert not file.exists()


def test_memory_is_kept_until_the_reader_has_released_it(reader, ledger):
    flat, entries = filled(some())
    handle = ledger.export(flat, tp_rank=0, bucket=0)
    payload, file = ipc_payload.payload(handle, entries), shm_file(handle)
    del flat, handle
    gc.collect()
    assert file.exists()
    assert reader.open_and_release(payload) == as_bytes(some())
    ledger.wait_for_release(Deadline.after(60))
    assert not file.exists()


def holder_main(pipe):
    """Open a payload with a plain unpickler, and keep it open."""
    bucket = pickle.loads(base64.b64decode(pipe.recv()))
    pipe.send(bucket["flattened_tensor"].numel())
    pipe.recv()


def test_a_killed_readers_handle_is_outstanding_until_reclaimed(ledger):
    flat, entries = filled(some())
    handle = ledger.export(flat, tp_rank=0, bucket=0)
    file = shm_file(handle)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    pipe, remote = context.Pipe()
    holder = context.Process(target=holder_main, args=(remote,), daemon=True)
    holder.start()
    remote.close()
    pipe.send(ipc_payload.payload(handle, entries))
    assert pipe.poll(60) and pipe.recv() == 512
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with pytest.raises(DeadlineError, match=Fate.UNKNOWN.value):
        ledger.wait_for_release(Deadline.after(0.1))
    ledger._reader_is_alive = lambda: False
    with pytest.raises(SyncError, match=Fate.READER_KILLED.value):
        ledger.wait_for_release(Deadline.after(60))
    assert handle.count() == 0 and ledger.reclaim() == []
    del flat, handle
    assert not file.exists()


def test_global_state_of_the_trainers_process_is_unchanged(fresh_interpreter):
    _, errors = fresh_interpreter.communicate(timeout=60)
    assert fresh_interpreter.returncode == 0, errors


def test_many_cycles_leak_nothing(reader):
    def resources():
        return {name for name in os.listdir("/dev/shm") if name.startswith(f"torch_{os.getpid()}_")}, len(
            os.listdir("/proc/self/fd")
        )

    def cycle(i):
        ledger = ipc_payload.Ledger(rank=0)
        flat, entries = filled([("w", torch.full((10_000,), float(i)))])
        handle = ledger.export(flat, tp_rank=0, bucket=0)
        if i % 10 == 9:
            ledger.reclaim()
        else:
            reader.open_and_release(ipc_payload.payload(handle, entries))
            ledger.wait_for_release(Deadline.after(60))

    gc.collect()  # objects of failed tests
    cycle(0)  # starts torch's manager of shared files, whose connection stays open
    before = resources()
    for i in range(200):
        cycle(i)
    gc.collect()
    assert resources() == before


# --- torch's manager of shared memory -----------------------------------------------------------------------------------

LATE = "Shared memory manager connection has timed out", "No such file or directory"


def late(call, times, text):
    """As torch on a machine that does not run its manager, or this process, for a while."""
    left = [RuntimeError(text)] * times

    def made(*args):
        if left:
            raise left.pop()
        return call(*args)

    return made


@pytest.mark.parametrize("text", LATE)
def test_a_manager_of_shared_memory_that_is_late_is_asked_again(monkeypatch, text):
    storages = torch.UntypedStorage
    monkeypatch.setattr(storages, "_new_using_filename_cpu", late(storages._new_using_filename_cpu, 3, text))
    monkeypatch.setattr(storages, "_share_filename_cpu_", late(storages._share_filename_cpu_, 3, text))
    monkeypatch.setattr(storages, "_new_shared_filename_cpu", late(storages._new_shared_filename_cpu, 3, text))
    flat = ipc_payload.allocate(4, torch.device("cpu"))
    handle = ipc_payload.export(flat)
    opened = open_handle(handle.describe(), torch.device("cpu"))
    assert opened.copy_(torch.arange(4)).tolist() == flat.tolist() and handle.count() == 1
    del opened
    assert handle.count() == 0
    monkeypatch.setattr(storages, "_new_using_filename_cpu", late(storages._new_using_filename_cpu, 100, text))
    with pytest.raises(RuntimeError, match=text):
        ipc_payload.allocate(4, torch.device("cpu"))
