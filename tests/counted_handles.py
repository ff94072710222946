"""Handles of shared memory with a counter of their own each, as handles of CUDA memory have them.

On a CPU torch counts all who map a file in the file itself, so that several exports of one storage, to several readers or
in several syncs, cannot be told apart.  Of the net's processes both ends use these instead.
"""

from __future__ import annotations

import itertools
import os
import weakref
from pathlib import Path

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tpcolocate import ipc_payload
from tpcolocate.in_server.tpcolocate_receiver import session as receiver
from tpcolocate.in_server.tpcolocate_receiver.handles import asked_again

_HEADER_BYTES = 64
"""torch's own, before the contents of the file."""
REFUSED: dict[int, bool] = {}
"""In a worker: pids of ranks whose memory cannot be mapped; with False what was allocated to be mapped still can."""
_made: dict[int, StorageWeakRef] = {}
_exported: weakref.WeakSet[CountedHandle] = weakref.WeakSet()
_numbers = itertools.count()
_real_open = receiver.open_handle


class CountedHandle(ipc_payload.Handle):
    """A handle whose counter is a file of its own; the reader's end is `open_counted`."""

    folder = Path()

    def __init__(self, storage):
        super().__init__(storage)
        _, name, self.num_bytes = asked_again(storage._share_filename_cpu_)
        self._name = name.decode().lstrip("/")
        self._counter = self.folder / f"count-{os.getpid()}-{next(_numbers)}"
        _write(self._counter, 1)
        made = _made.get(storage._cdata)
        self._is_staging = made is not None and not made.expired()
        _exported.add(self)

    def reduced(self):
        # SGLang's own payloads, which torch opens.
        return ipc_payload.CpuHandle(self.storage).reduced()

    def describe(self):
        return {
            "kind": "counted", "name": self._name, "num_bytes": self.num_bytes, "counter": str(self._counter),
            "pid": os.getpid(), "is_staging": self._is_staging,
        }  # fmt: skip

    def count(self):
        return _read(self._counter)

    def reclaim(self):
        _write(self._counter, 0)


def open_counted(handle, device):
    """In a worker: as `open_handle`; the counter goes down when the memory is not used any more."""
    if handle["kind"] != "counted":
        return _real_open(handle, device)
    if handle["pid"] in REFUSED and (REFUSED[handle["pid"]] or not handle["is_staging"]):
        raise RuntimeError("memory of that rank cannot be mapped here")
    path = Path("/dev/shm") / handle["name"]
    mapped = np.memmap(path, dtype=np.uint8, mode="r+", offset=_HEADER_BYTES, shape=(handle["num_bytes"],))
    flat = torch.from_numpy(mapped)
    weakref.finalize(mapped, _release, Path(handle["counter"])).atexit = False  # an engine that dies releases nothing
    return flat


def _release(counter):
    count = _read(counter)
    if count < 1:
        # With CUDA the memory could be another tensor's by now, and the counter another handle's.
        with open(_late(counter.parent, counter.name.split("-")[1]), "a") as file:
            file.write(f"{counter.name} was set right while it was open\n")
    else:
        _write(counter, count - 1)


def late_releases():
    """What was released by its reader after its exporter had taken it back, in words."""
    path = _late(CountedHandle.folder, os.getpid())
    found = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def _late(folder, pid):
    return folder / f"late-releases-{pid}"


def _read(path):
    [count] = path.read_bytes()
    return count


def _write(path, count):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.write(fd, bytes([count]))  # one byte: the other end, which may be reading it, has the old or the new one
    finally:
        os.close(fd)


def num_out():
    """How many handles of this process have not come back."""
    return sum(handle.count() != 0 for handle in list(_exported))


def count_every_export(folder):
    """In a training rank's process."""
    CountedHandle.folder = Path(folder)
    allocate = ipc_payload.allocate

    def noting(*args):
        flat = allocate(*args)
        _made[flat.untyped_storage()._cdata] = StorageWeakRef(flat.untyped_storage())
        return flat

    ipc_payload.allocate = noting
    ipc_payload.CpuHandle = CountedHandle


def open_counted_handles():
    """In a worker's process."""
    receiver.open_handle = open_counted
