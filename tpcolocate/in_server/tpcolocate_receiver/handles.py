"""Opening memory that the trainer exported."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch.multiprocessing import reductions

T = TypeVar("T")
# The first words of torch's errors: its manager did not answer in a second; or one that was just started has ended again, since this
# process took more than two to connect to it.
_MANAGER_IS_LATE = ("Shared memory manager connection has timed out", "No such file or directory")
_MANAGER_TRIES = 10


def asked_again(make: Callable[[], T]) -> T:
    """Have torch share or map memory of a CPU, again if the manager of it was late, or this process was.

    Upstream: libshm/socket.h, manager.cpp and `THManagedMapAllocatorInit`, torch 2.13.
    """
    for _ in range(_MANAGER_TRIES - 1):
        try:
            return make()
        except RuntimeError as error:  # of a process that a busy machine has not run in that time
            if not str(error).startswith(_MANAGER_IS_LATE):
                raise
    return make()


def device_uuid() -> str | None:
    """Return the UUID of this worker's GPU; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def open_handle(handle: Mapping[str, Any], device: torch.device) -> torch.Tensor:
    """Map exported memory, as a flat uint8 tensor.

    The memory of another GPU is mapped on `device` too, whether or not this process can see that GPU.  Where that is not
    possible, and the GPU is visible, it is mapped on that GPU.

    Args:
        handle: See `protocol.Handle`.
        device: Of the reader; the contents of a file are loaded to it.

    Raises:
        RuntimeError: CUDA cannot open the handle.
    """
    kind = handle["kind"]
    if kind == "file":
        from safetensors.torch import load_file

        return load_file(handle["path"])["bucket"].to(device)
    if kind == "cpu":
        name = _bytes(handle["manager"]), _bytes(handle["name"]), handle["num_bytes"]
        storage = asked_again(lambda: reductions.rebuild_storage_filename(torch.UntypedStorage, *name))
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
    return _open_cuda(handle, torch.cuda.current_device() if device.index is None else device.index)


def is_elsewhere(handle: Mapping[str, Any], mapped: torch.Tensor, device: torch.device) -> bool:
    """Return whether memory that a handle was opened to is another GPU's than `device`."""
    if mapped.device != device:
        return True
    return handle["kind"] == "cuda" and handle["uuid"] != str(torch.cuda.get_device_properties(device).uuid)


_opened_on: dict[tuple[str, int], int] = {}
"""UUID of a GPU and index of a reader's device -> index of the device that its memory is mapped on.

torch keeps what it has mapped by the handle alone: memory that was mapped on one device would be returned for another.  So all
memory of one GPU is mapped on the same device.
"""


def _open_cuda(handle: Mapping[str, Any], reader: int) -> torch.Tensor:
    uuid = handle["uuid"]
    decided = _opened_on.get((uuid, reader))
    if decided is not None:
        return _mapped(handle, decided)
    try:
        flat, index = _mapped(handle, reader), reader
    except RuntimeError as error:
        own = _visible(uuid)
        if own is None or own == reader:
            raise RuntimeError(
                f"memory of GPU {uuid} cannot be mapped by this TP worker (it runs on {device_uuid()}): {error}"
            ) from error
        flat, index = _mapped(handle, own), own
    _opened_on[uuid, reader] = index
    return flat


def _visible(uuid: str) -> int | None:
    """Index of a GPU in this process; None if it is not visible here."""
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            return index
    return None


def _mapped(handle: Mapping[str, Any], index: int) -> torch.Tensor:
    # SGLang replaces this function by one that also takes UUIDs; an index works with both.
    rebuild = getattr(reductions, "_rebuild_cuda_tensor_original", reductions.rebuild_cuda_tensor)
    flat: torch.Tensor = rebuild(
        tensor_cls=torch.Tensor,
        tensor_size=torch.Size([handle["num_bytes"]]),
        tensor_stride=(1,),
        tensor_offset=0,
        storage_cls=torch.storage.TypedStorage,
        dtype=torch.uint8,
        storage_device=index,
        storage_handle=_bytes(handle["handle"]),
        storage_size_bytes=handle["num_bytes"],
        storage_offset_bytes=handle["offset"],
        requires_grad=False,
        ref_counter_handle=_bytes(handle["counter_file"]),
        ref_counter_offset=handle["counter_offset"],
        event_handle=_bytes(handle["event"]),
        event_sync_required=handle["event_sync"],
    )
    return flat


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)
