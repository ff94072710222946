"""Opening memory that the trainer exported."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch.multiprocessing import reductions


def device_uuid() -> str | None:
    """Return the UUID of this worker's GPU; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def open_handle(handle: Mapping[str, Any], device: torch.device) -> torch.Tensor:
    """Map exported memory, as a flat uint8 tensor.

    Args:
        handle: See `protocol.Handle`.
        device: Where the contents of a file are loaded to.
    """
    kind = handle["kind"]
    if kind == "file":
        from safetensors.torch import load_file

        return load_file(handle["path"])["bucket"].to(device)
    if kind == "cpu":
        storage = reductions.rebuild_storage_filename(
            torch.UntypedStorage, _bytes(handle["manager"]), _bytes(handle["name"]), handle["num_bytes"]
        )
        return torch.empty(0, dtype=torch.uint8).set_(storage)
    index = next(
        (
            i
            for i in range(torch.cuda.device_count())
            if str(torch.cuda.get_device_properties(i).uuid) == handle["uuid"]
        ),
        None,
    )
    if index is None:
        raise RuntimeError(f"GPU {handle['uuid']} is not visible to this TP worker (it runs on {device_uuid()})")
    # SGLang replaces this function by one that also takes UUIDs; an index works with both.
    rebuild = getattr(reductions, "_rebuild_cuda_tensor_original", reductions.rebuild_cuda_tensor)
    return rebuild(
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


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)
