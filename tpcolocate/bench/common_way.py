"""The push that a script without this library would make, to measure beside ours.

Every rank gathers the weights, tensor by tensor, into buckets of 512 MB; the owner posts SGLang's own serialised
buckets, one per rank.  What SGLang imports for it is imported into the trainer, as such scripts do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tpcolocate.engine.engine import Engine
from tpcolocate.server.http import ServerClient
from tpcolocate.server.releases import release
from tpcolocate.session import Colocation

_BUCKET_BYTES = 512 * 10**6
_TIMEOUT_S = 300.0


def why_not(model: torch.nn.Module, device: torch.device) -> str | None:
    """Return why the common way cannot be measured; None if it can."""
    if device.type != "cuda":
        return "it needs CUDA devices"
    # transformers fuses experts under names that no checkpoint has.
    if any(parameter.ndim > 2 and ".experts." in name for name, parameter in model.named_parameters()):
        return "the model's experts are fused"
    return None


class CommonWay:
    """Pushes weights into an engine without this library.

    Args:
        engine: Of this rank's slice.
        colo: Its slice.

    Raises:
        ImportError: The installed SGLang has other names for what it needs.
    """

    def __init__(self, engine: Engine, colo: Colocation) -> None:
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

        try:
            from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
        except ImportError:  # before 0.5.10
            from sglang.srt.model_executor.model_runner import FlattenedTensorBucket
        monkey_patch_torch_reductions()
        self._bucket, self._serialize = FlattenedTensorBucket, MultiprocessingSerializer.serialize
        self._colo = colo
        self._http = ServerClient(engine.url, api_key=engine.api_key) if colo.is_owner else None
        self._has_session = colo.is_owner and release(engine.sglang_version).weight_session

    def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            self._http.close()

    def push(self, model: torch.nn.Module) -> None:
        """Push all weights.  Collective over all ranks.

        Raises:
            RequestError: The server refused them.
        """
        if self._has_session:
            self._post("/begin_weight_update", {"selector": "target"})
        bucket: list[tuple[str, torch.Tensor]] = []
        num_bytes = 0
        for name, tensor in _gathered(model):
            if bucket and num_bytes + tensor.nbytes > _BUCKET_BYTES:
                self._send(bucket)
                bucket, num_bytes = [], 0
            bucket.append((name, tensor))
            num_bytes += tensor.nbytes
        self._send(bucket)
        if self._has_session:
            self._post("/end_weight_update")
        self._post("/flush_cache")

    def _send(self, bucket: list[tuple[str, torch.Tensor]]) -> None:
        flat = self._bucket(named_tensors=bucket)
        content = {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}
        torch.cuda.synchronize()
        mine = self._serialize(content, output_str=True)
        payloads: list[Any] | None = [None] * self._colo.tp_size if self._colo.is_owner else None
        if self._colo.group is None:
            payloads = [mine]
        else:
            dist.gather_object(mine, payloads, dst=self._colo.owner_rank, group=self._colo.group)
        body = {"serialized_named_tensors": payloads, "load_format": "flattened_bucket", "flush_cache": False}
        self._post("/update_weights_from_tensor", body)
        if self._colo.group is not None:
            dist.barrier(group=self._colo.group)
        del flat, content
        torch.cuda.ipc_collect()

    def _post(self, path: str, body: dict[str, Any] | None = None) -> None:
        if self._http is not None:
            self._http.post(path, body or {}, timeout_s=_TIMEOUT_S)


def _gathered(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
            yield name, whole


__all__ = ["CommonWay", "why_not"]
