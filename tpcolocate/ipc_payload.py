"""One export handle per TP rank, and the ledger that tracks its release.

One serialised payload must never be given to two readers.  Every export sets a counter to one, and every reader that
closes its mapping subtracts one: with two readers of one export it drops below zero, and torch then never frees the
memory (the whole model, at every sync).  So every TP rank gets an export of its own, every export is entered in a
`Ledger`, and the ledger polls the counters until all readers have released their handles.

Two transports behind one interface:

* CUDA IPC: ``storage._share_cuda_()`` returns a memory handle and a counter slot in a shared-memory file
  (torch/csrc/CudaIPCTypes.cpp); each export has a slot of its own.
* CPU shared memory: torch's file-system sharing strategy, used without switching it on globally; the counter is
  in the first bytes of the mapped file (``RefcountedMapAllocator`` in aten/src/ATen/MapAllocator.cpp) and also counts
  the producer's own mapping.

A payload is one of two things: a *command* for our receiver in the TP worker, which gets its handles later and opens
them itself (`command`); or SGLang's own ``flattened_bucket``, which its unpickler opens (`payload`).
Both are pickled without importing sglang, from classes that the unpicklers of SGLang 0.5.9 to 0.5.23 accept.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import inspect
import json
import os
import pickle
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch.multiprocessing import reductions

from tpcolocate.deadline import Deadline
from tpcolocate.errors import ConfigError, DeadlineError, SyncError, some
from tpcolocate.in_server.tpcolocate_receiver.handles import asked_again

ALIGNMENT = 256
"""In bytes; every tensor of a bucket starts at a multiple, which suits any dtype's view and any copy kernel."""

_SHM = Path("/dev/shm")
SHARED_MEMORY_HINT = (
    "before sync_weights() remove from /dev/shm what is left there (ls -l /dev/shm), or make it larger: --shm-size of docker "
    "run, or mount -o remount,size=8G /dev/shm"
)
_MANAGER = "torch_shm_manager"
# Where it looks for a folder, in this order (c10/util/tempfile.cpp), and how long the path may be for its socket in there.
_TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
_MOST_FOLDER = 107 - len("/torch-shm-dir-XXXXXX/manager.sock")
_CUDA_COUNTER_HEADER_BYTES = 64
_POLL_INTERVAL_S = 0.0005
_EMPTY = torch.empty(0, dtype=torch.uint8, device="cpu")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a bucket.

    Attributes:
        name: Parameter name that the engine's loader takes.
        shape: Full (unsharded) shape.
        dtype: Element type.
        start: First byte in the bucket, a multiple of `ALIGNMENT`.
        num_bytes: Size without padding.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start: int
    num_bytes: int


def layout(tensors: Sequence[tuple[str, torch.Size, torch.dtype]]) -> tuple[list[Entry], int]:
    """Lay tensors out in a bucket.  Pure.

    Args:
        tensors: Name, shape and dtype of each.

    Returns:
        The entries, and the bucket's size in bytes.
    """
    entries, offset = [], 0
    for name, shape, dtype in tensors:
        num_bytes = shape.numel() * dtype.itemsize
        entries.append(Entry(name, shape, dtype, offset, num_bytes))
        offset += -(-num_bytes // ALIGNMENT) * ALIGNMENT
    return entries, offset


def allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Return a flat uint8 tensor of `num_bytes` that can be exported.

    On a GPU it comes from the caching allocator and must not lie inside a torch_memory_saver region.  On the CPU it
    is a shared-memory file of its own.

    Raises:
        ConfigError: /dev/shm is full, or the path of the temporary folder is too long for torch.
        RuntimeError: Another reason, in torch's words.
    """
    if device.type == "cpu":
        with _shared_memory(num_bytes):
            storage = asked_again(lambda: torch.UntypedStorage._new_using_filename_cpu(max(num_bytes, 1)))
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)[:num_bytes]
    if num_bytes == 0:
        # A reader maps the one byte, too, and its checksum has to be that of an empty bucket.
        return torch.zeros(1, dtype=torch.uint8, device=device)[:0]
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


@contextlib.contextmanager
def _shared_memory(num_bytes: int) -> Iterator[None]:
    """Have torch make a file of shared memory; raise ConfigError if there cannot be one, and leave none behind."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        # torch makes the file before it takes the space, and leaves it (2.13, MapAllocator.cpp).
        if (made := re.search(rf"torch_{os.getpid()}_\d+_\d+", text)) is not None:
            (_SHM / made[0]).unlink(missing_ok=True)
        if _MANAGER in text:  # a process of torch's, which it starts with the first file
            folder = next((value for name in _TEMPORARY if (value := os.environ.get(name))), "/tmp")
            reason = text.splitlines()[0].rpartition(": ")[2]
            raise ConfigError(
                f"torch cannot share memory of the CPU: its {_MANAGER} does not start in {folder}: {reason}",
                hint=f"it has a socket there, so the path, which has {len(os.fsencode(folder))} characters, may have at most "
                f'{_MOST_FOLDER}: os.environ["TMPDIR"] = "/tmp" before the sync, or another short path of a folder that can be '
                "written to",
            ) from error
        if os.strerror(errno.ENOSPC) not in text:
            raise
        raise ConfigError(
            f"/dev/shm has no space for {num_bytes} bytes: {text.splitlines()[0]}", hint=SHARED_MEMORY_HINT
        ) from error


def view(flat: torch.Tensor, entry: Entry) -> torch.Tensor:
    """Return one tensor of a bucket as a view, with its dtype and shape."""
    return flat[entry.start : entry.start + entry.num_bytes].view(entry.dtype).view(entry.shape)


class Handle(ABC):
    """One export of one storage for exactly one reader."""

    num_bytes: int

    def __init__(self, storage: torch.UntypedStorage) -> None:
        # The exporter keeps the memory alive until the reader has released it.
        self.storage: torch.UntypedStorage | None = storage

    def drop_storage(self) -> None:
        """Drop the reference to the memory: a persistent mapping must not keep the trainer's memory alive."""
        self.storage = None

    @abstractmethod
    def reduced(self) -> _Reduced:
        """Return what a pickle of the flat uint8 tensor contains."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the handle in JSON types, for `tpcolocate_receiver.open_handle`."""

    @abstractmethod
    def count(self) -> int:
        """Return the uses outstanding: 1 before the reader's release, 0 after, negative if released too often."""

    @abstractmethod
    def reclaim(self) -> None:
        """Reset the counter.  Only once the reader is known to be dead or finished, or memory is freed too early."""


class _Reduced:
    """Pickles as a call of `function`, so that a plain pickler writes what torch's own reducers would."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


class CpuHandle(Handle):
    """File-system shared memory; needs the producer alive until the reader has opened it."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        super().__init__(storage)
        with _shared_memory(storage.nbytes()):
            self.manager, self.name, self.num_bytes = asked_again(storage._share_filename_cpu_)
        self._file = _SHM / self.name.decode().lstrip("/")
        # The reader's rebuild takes over one count; the other is the producer's own mapping.
        storage._shared_incref()

    def drop_storage(self) -> None:
        """Do nothing: the file is removed with its last mapping, and `reclaim` needs this one."""

    def reduced(self) -> _Reduced:
        untyped = _Reduced(
            reductions.rebuild_storage_filename, torch.UntypedStorage, self.manager, self.name, self.num_bytes
        )
        typed = _Reduced(reductions.rebuild_typed_storage, untyped, torch.uint8)
        metadata = (0, torch.Size([self.num_bytes]), (1,), False)
        return _Reduced(reductions.rebuild_tensor, torch.Tensor, typed, metadata)

    def describe(self) -> dict[str, Any]:
        return {"kind": "cpu", "manager": _text(self.manager), "name": _text(self.name), "num_bytes": self.num_bytes}

    def count(self) -> int:
        try:
            with open(self._file, "rb") as file:
                return int.from_bytes(file.read(4), "little", signed=True) - 1
        except FileNotFoundError:
            return -1  # one release too many: the file is unlinked while the producer still maps it

    def reclaim(self) -> None:
        count = self.count()
        for _ in range(max(count, 0)):
            assert self.storage is not None
            self.storage._shared_decref()


class CudaHandle(Handle):
    """CUDA IPC; the receiving side finds the device by UUID, so indices need not agree.

    torch itself keeps exported memory (CudaIPCSentData) until the counter is zero.
    """

    def __init__(self, storage: torch.UntypedStorage) -> None:
        super().__init__(storage)
        (
            device,
            self.handle,
            self.num_bytes,
            self.offset,
            self.counter_file,
            self.counter_offset,
            self.event,
            self.event_sync,
        ) = storage._share_cuda_()
        self.device_uuid = str(torch.cuda.get_device_properties(device).uuid)

    def reduced(self) -> _Reduced:
        by_name = {
            "tensor_cls": torch.Tensor,
            "tensor_size": torch.Size([self.num_bytes]),
            "tensor_stride": (1,),
            "tensor_offset": 0,
            "storage_cls": torch.storage.TypedStorage,
            "dtype": torch.uint8,
            "storage_device": self.device_uuid,  # SGLang's reductions resolve it to the reader's own index
            "storage_handle": self.handle,
            "storage_size_bytes": self.num_bytes,
            "storage_offset_bytes": self.offset,
            "requires_grad": False,
            "ref_counter_handle": self.counter_file,
            "ref_counter_offset": self.counter_offset,
            "event_handle": self.event,
            "event_sync_required": self.event_sync,
        }
        return _Reduced(
            reductions.rebuild_cuda_tensor, *(by_name[name] for name in _cuda_rebuild_order(tuple(by_name)))
        )

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "cuda",
            "uuid": self.device_uuid,
            "handle": _text(self.handle),
            "num_bytes": self.num_bytes,
            "offset": self.offset,
            "counter_file": _text(self.counter_file),
            "counter_offset": self.counter_offset,
            "event": _text(self.event),
            "event_sync": self.event_sync,
        }

    def count(self) -> int:
        try:
            with open(_SHM / self.counter_file.decode().lstrip("/"), "rb") as file:
                file.seek(_CUDA_COUNTER_HEADER_BYTES + 8 * self.counter_offset)
                return int.from_bytes(file.read(8), "little", signed=True)
        except FileNotFoundError:
            return 0  # torch removes a counter file once all of its slots are released

    def reclaim(self) -> None:
        count = self.count()
        if count > 0:
            for _ in range(count):
                torch.UntypedStorage._release_ipc_counter_cuda(self.counter_file, self.counter_offset)
        elif count < 0:
            # torch reads the count as unsigned: a negative one would never free the memory.
            with open(_SHM / self.counter_file.decode().lstrip("/"), "r+b") as file:
                file.seek(_CUDA_COUNTER_HEADER_BYTES + 8 * self.counter_offset)
                file.write((0).to_bytes(8, "little"))


def _cuda_rebuild_order(names: tuple[str, ...]) -> list[str]:
    """Positions of ``rebuild_cuda_tensor``'s arguments, looked up by name.

    Raises:
        ConfigError: This torch release takes other arguments.
    """
    # SGLang's patch, if it was applied in this process, hides the signature behind *args.
    function = getattr(reductions, "_rebuild_cuda_tensor_original", reductions.rebuild_cuda_tensor)
    order = list(inspect.signature(function).parameters)
    if set(order) != set(names):
        raise ConfigError(
            f"torch {torch.__version__} changed rebuild_cuda_tensor: {sorted(set(order) ^ set(names))}",
            hint="use a torch release that this version of tpcolocate supports, or transport='ipc'",
        )
    return order


def write_file(flat: torch.Tensor, path: Path) -> dict[str, Any]:
    """Write a bucket as safetensors, for engines that cannot map our memory.

    Args:
        flat: The bucket, on any device.
        path: Of the file; any number of readers may read it, and the writer removes it.

    Returns:
        Its description as a handle.
    """
    save_file({"bucket": flat.cpu()}, path)
    return {"kind": "file", "path": str(path)}


def export(flat: torch.Tensor) -> Handle:
    """Export a bucket to one reader.  Every call returns an independent handle.

    Args:
        flat: From `allocate`; one-dimensional uint8 starting at the beginning of its storage.
    """
    return export_storage(flat.untyped_storage())


def export_storage(storage: torch.UntypedStorage) -> Handle:
    """Export any storage to one reader; a CPU storage is moved into shared memory if it is not there yet."""
    return CpuHandle(storage) if storage.device.type == "cpu" else CudaHandle(storage)


def payload(handle: Handle, entries: Sequence[Entry]) -> str:
    """Return what one TP rank receives: SGLang's ``flattened_bucket``, pickled and in base64.

    Args:
        handle: From `export`, used for this payload and no other.
        entries: What the bucket holds.
    """
    metadata = [
        SimpleNamespace(
            name=entry.name,
            shape=entry.shape,
            dtype=entry.dtype,
            start_idx=entry.start,
            end_idx=entry.start + entry.num_bytes,
            numel=entry.num_bytes,
        )
        for entry in entries
    ]
    bucket = {"flattened_tensor": handle.reduced(), "metadata": metadata}
    return base64.b64encode(pickle.dumps(bucket, protocol=4)).decode()


def command(job: Mapping[str, Any]) -> str:
    """Return what one TP rank's receiver gets: a JSON command as the name of an empty tensor, without handles.

    As the tensor's contents, the command would be copied to the GPU and back before it could be read, behind all that
    the trainer has queued there.

    Args:
        job: See `tpcolocate_receiver`.
    """
    return base64.b64encode(pickle.dumps([(json.dumps(job), _EMPTY)], protocol=4)).decode()


def new_session() -> str:
    """Return a unique name for a sync."""
    return secrets.token_hex(8)


def described(entries: Sequence[Entry]) -> list[list[Any]]:
    """Return a bucket's contents in JSON types, for a command."""
    return [[e.name, str(e.dtype).removeprefix("torch."), list(e.shape), e.start, e.num_bytes] for e in entries]


class Fate(Enum):
    """What became of a handle that was not released as it should be."""

    OVER_RELEASED = "released more than once: two readers had one payload"
    NEVER_OPENED = "never opened"
    STILL_OPEN = "opened and not released"
    READER_KILLED = "lost with its reader, which is dead"
    UNKNOWN = "not released, or never opened"


@dataclass(frozen=True, slots=True)
class Outstanding:
    """One handle that was not released as it should be.

    Attributes:
        rank: Global rank that exported it.
        tp_rank: TP rank it was made for.
        bucket: Number of the bucket in its sync; -2: the trainer's own memory, mapped for one sync.
        num_bytes: Of the bucket.
        count: The counter: 1 outstanding, below 0 over-released.
        fate: What became of it, as far as is known.
    """

    rank: int
    tp_rank: int
    bucket: int
    num_bytes: int
    count: int
    fate: Fate

    def __str__(self) -> str:
        return (
            f"bucket {self.bucket} ({self.num_bytes} bytes) of rank {self.rank} for TP rank {self.tp_rank}: "
            f"{self.fate.value} (count {self.count})"
        )


def listed(handles: Sequence[Outstanding]) -> str:
    """Describe handles in a message; a sync of a mapped model has hundreds."""
    return f"{some(handles)} ({sum(handle.num_bytes for handle in handles) / 2**20:,.1f} MiB in all)"


@dataclass(slots=True)
class _Line:
    """One export in the ledger."""

    handle: Handle
    tp_rank: int
    bucket: int
    opened: bool | None = None


class Ledger:
    """Every handle that this process exported and has not seen released.

    Args:
        rank: Global rank of this process, for errors.
        reader_is_alive: Called when a handle is not released.
    """

    def __init__(self, *, rank: int, reader_is_alive: Callable[[], bool] = lambda: True) -> None:
        self.rank = rank
        self.num_exported = 0
        self.num_returned = 0
        self.latest_return_s = 0.0
        """Longest time from the engine's answer to the release of a handle, in seconds."""
        self._reader_is_alive = reader_is_alive
        self._lines: list[_Line] = []

    def export(self, flat: torch.Tensor, *, tp_rank: int, bucket: int) -> Handle:
        """Export a bucket to one reader, entered before the reader can open it."""
        return self.export_storage(flat.untyped_storage(), tp_rank=tp_rank, bucket=bucket)

    def export_storage(self, storage: torch.UntypedStorage, *, tp_rank: int, bucket: int) -> Handle:
        """Export any storage to one reader; it is kept until the handle is released."""
        handle = export_storage(storage)
        self._lines.append(_Line(handle, tp_rank, bucket))
        self.num_exported += 1
        return handle

    def take_over(self, handle: Handle, *, tp_rank: int, bucket: int) -> None:
        """Enter a handle that was exported for something else."""
        self._lines.append(_Line(handle, tp_rank, bucket))

    def note_opened(self, bucket: int, opened: Mapping[int, bool]) -> None:
        """Enter the readers' reports: TP rank -> whether it opened its handle of this bucket."""
        for line in self._lines:
            if line.bucket == bucket and line.tp_rank in opened:
                line.opened = opened[line.tp_rank]

    def outstanding(self) -> list[Outstanding]:
        """Return the handles whose counter is not zero right now."""
        counts = [(line, line.handle.count()) for line in self._lines]
        if all(count == 0 for _, count in counts):
            return []
        alive = self._reader_is_alive()
        return [
            Outstanding(self.rank, line.tp_rank, line.bucket, line.handle.num_bytes, count, _fate(line, count, alive))
            for line, count in counts
            if count != 0
        ]

    def wait_for_release(self, deadline: Deadline) -> None:
        """Wait until every handle is released; then forget them, so that their memory may be freed or reused.

        The engine's answer alone does not show it: from SGLang 0.5.21 it precedes the release on all TP ranks but one.

        Args:
            deadline: For all handles together.

        Raises:
            SyncError: A handle was released too often or never opened, or its reader is dead.  Its memory is
                reclaimed; handles that are still open stay in the ledger.
            DeadlineError: A handle is still open.  It stays in the ledger.
        """
        started = time.monotonic()
        while any(line.handle.count() != 0 for line in self._lines):
            lost = self._take_lost()
            if lost:
                raise SyncError(f"handles were lost: {listed(lost)}", hint=_HINTS[lost[0].fate], rank=self.rank)
            if deadline.has_passed:
                raise DeadlineError(
                    f"the engine did not release {listed(self.outstanding())}",
                    hint="restart the engine; shutdown() then reclaims the memory",
                    rank=self.rank,
                )
            time.sleep(_POLL_INTERVAL_S)
        self.latest_return_s = max(self.latest_return_s, time.monotonic() - started)
        self.num_returned += len(self._lines)
        self._lines.clear()

    def _take_lost(self) -> list[Outstanding]:
        """Reclaim and forget the handles that certainly no reader has open any more."""
        lost = [item for item in self.outstanding() if item.fate not in (Fate.STILL_OPEN, Fate.UNKNOWN)]
        where = {(item.tp_rank, item.bucket) for item in lost}
        for line in self._lines:
            if (line.tp_rank, line.bucket) in where:
                line.handle.reclaim()
        self._lines = [line for line in self._lines if (line.tp_rank, line.bucket) not in where]
        return lost

    def set_aside(self, buckets: Collection[int] | None = None) -> Ledger:
        """Move outstanding handles into a new ledger, so that this one can go on without waiting for them.

        Args:
            buckets: Those of these buckets; all if left out.
        """
        aside = Ledger(rank=self.rank, reader_is_alive=self._reader_is_alive)
        aside._lines = [line for line in self._lines if buckets is None or line.bucket in buckets]
        self._lines = [line for line in self._lines if buckets is not None and line.bucket not in buckets]
        return aside

    def reclaim(self) -> list[Outstanding]:
        """Reset all counters and forget the handles.  Only once the readers are dead or have certainly finished.

        Returns:
            The handles that had not been released.
        """
        lost = self.outstanding()
        for line in self._lines:
            line.handle.reclaim()
        self._lines.clear()
        return lost


def _fate(line: _Line, count: int, alive: bool) -> Fate:
    if count < 0:
        return Fate.OVER_RELEASED
    if not alive:
        return Fate.READER_KILLED
    if line.opened is None:
        return Fate.UNKNOWN
    return Fate.STILL_OPEN if line.opened else Fate.NEVER_OPENED


_HINTS = {
    Fate.OVER_RELEASED: "every TP rank needs a payload of its own; the counter was reset, or torch would never free the memory",
    Fate.NEVER_OPENED: "the engine answered without opening the bucket; see its log",
    Fate.READER_KILLED: "the engine died; launch() again",
}


def _text(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()


__all__ = [
    "ALIGNMENT",
    "Entry",
    "Fate",
    "Handle",
    "Ledger",
    "Outstanding",
    "allocate",
    "command",
    "described",
    "export",
    "export_storage",
    "layout",
    "listed",
    "new_session",
    "payload",
    "view",
    "write_file",
]
