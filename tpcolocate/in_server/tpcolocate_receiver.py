"""Takes weights inside a TP worker, and proves that they arrived.

SGLang calls `receive` in every TP worker for an ``/update_weights_from_tensor`` whose ``load_format`` names it (allowed
by ``--custom-weight-loader``).  The named tensors carry one small command by value; the weights themselves lie in
memory or in a file that the command points to.

Why not SGLang's own deserialisation: there, any exception (a handle that does not open, a wrong shape) kills the whole
server.  Here nothing is raised; what went wrong is written into the reply, and the trainer decides.

Needs torch alone, and any SGLang from 0.5.9 on.  The trainer imports this module too, for `checksum`.
"""

from __future__ import annotations

import base64
import bisect
import contextlib
import hashlib
import json
import os
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing import reductions
from torch.utils._python_dispatch import TorchDispatchMode

COMMAND = "tpcolocate"
_ROW_WORDS = 1024


def receive(model: torch.nn.Module, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """SGLang's custom weight loader hook.  Never raises; answers by a file.

    Args:
        model: The worker's model.
        named_tensors: One tensor of uint8, the JSON command; SGLang may have moved it to the GPU.
    """
    answer: dict[str, Any] = {"tp_rank": None, "error": None, "opened": False}
    reply: Any = None
    started = time.perf_counter()
    try:
        job = json.loads(bytes(dict(named_tensors)[COMMAND].cpu().tolist()))
        reply = job["reply"]
        answer["tp_rank"] = job["tp_rank"]
        _check_address(job)
        _ACTIONS[job["do"]](model, job, answer)
    except BaseException as error:  # an exception that leaves here takes the server down
        answer["error"] = f"{type(error).__name__}: {error}"
        answer["traceback"] = traceback.format_exc()
    answer["seconds"] = time.perf_counter() - started
    try:
        _write(reply, answer)
    except Exception:
        pass  # the trainer misses the reply and says so


def _write(path: str, answer: dict[str, Any]) -> None:
    text = json.dumps(answer)
    part = path + ".part"
    # Complete or not there at all.
    try:
        with open(part, "w") as file:
            file.write(text)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def _check_address(job: dict[str, Any]) -> None:
    """The payload must have reached the worker it was made for."""
    if not torch.distributed.is_initialized():
        return
    rank = torch.distributed.get_rank() % job["tp_size"]
    if rank != job["tp_rank"]:
        raise RuntimeError(f"the payload of TP rank {job['tp_rank']} reached TP rank {rank}")


def device_uuid() -> str | None:
    """UUID of this worker's GPU, None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def open_handle(handle: dict[str, Any], device: torch.device) -> torch.Tensor:
    """Map what the trainer exported: a flat uint8 tensor.

    Args:
        handle: As `tpcolocate.ipc_payload.Handle.describe` makes it.
        device: Where file contents are to go.
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
    # SGLang replaces this function by one that also takes UUIDs; the index is right for both.
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


def checksum(data: torch.Tensor) -> tuple[int, int]:
    """Two 64-bit sums of a flat uint8 tensor, weighted by position along rows and along columns.

    Any flipped bit changes both.  Moved words, rows and blocks change at least one, but for words that differ in
    nothing except their highest bits (the weights of a sum that no flipped bit escapes differ by even numbers).  Two
    passes over the data and no copy of it.  Computed alike on CPU and GPU (integers wrap).

    Args:
        data: One-dimensional, contiguous, starting at a multiple of 8 bytes.
    """
    num_words = data.numel() // 8
    num_rows = num_words // _ROW_WORDS
    words = data[: num_words * 8].view(torch.int64)
    rows = words[: num_rows * _ROW_WORDS].view(num_rows, _ROW_WORDS)
    rest = torch.zeros(_ROW_WORDS + 8, dtype=torch.int64, device=data.device)
    left = words[num_rows * _ROW_WORDS :]
    rest[: left.numel()] = left
    tail = data[num_words * 8 :]
    rest[_ROW_WORDS : _ROW_WORDS + tail.numel()] = tail.to(torch.int64)
    by_row = (rows.sum(1) * _odd(num_rows, data.device)).sum()
    by_column = (rows.sum(0) * _odd(_ROW_WORDS, data.device)).sum()
    extra = (rest * _odd(rest.numel(), data.device)).sum()
    found = torch.stack([by_row + extra, by_column - extra]).tolist()
    return found[0], found[1]


def _odd(count: int, device: torch.device) -> torch.Tensor:
    # Odd weights: multiplication by one is invertible modulo 2^64, so no single change can vanish.
    return torch.arange(count, dtype=torch.int64, device=device) * 2 + 1


@dataclass
class Copy:
    """One ``dst.copy_(src)`` that the engine's loader made out of the staging memory.

    Attributes:
        dst: View of a parameter.
        src: View of the staging memory.
        entry: Number of the tensor in the bucket.
    """

    dst: torch.Tensor
    src: torch.Tensor
    entry: int


class Recorder(TorchDispatchMode):
    """Watches a loader: which parts of the staging memory went into which parts of the parameters.

    Args:
        flat: The staging memory.
        starts: First byte of every entry in it, ascending.
        owned: Storages of the model's parameters and buffers.

    Attributes:
        copies: Into the model, in the order in which they were made.
        fills: Parts of the model that were set to a constant, and to which.
        derived: Entries that were read, or changed in the staging memory, by something other than a view or a copy
            into the model (a cast, a transposition that materialises, a copy to somewhere else): what reached the
            parameters cannot be compared with what was sent.
        reworked: Entries whose destination was changed again after the copy.
        repeatable: Whether the copies were all that happened, so that making them again does the same.
    """

    def __init__(self, flat: torch.Tensor, starts: list[int], owned: set[int]) -> None:
        super().__init__()
        self.copies: list[Copy] = []
        self.fills: list[tuple[torch.Tensor, Any]] = []
        self.derived: set[int] = set()
        self.reworked: set[int] = set()
        self.repeatable = True
        self._base = _storage(flat)
        self._start = flat.data_ptr()
        self._starts = starts
        self.owned = owned
        self._written: dict[int, list[Copy]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is torch.ops.aten.copy_.default and self._staged(args[1]) and self._owns(args[0]):
            copy = Copy(args[0].detach(), args[1].detach(), self._entry(args[1]))
            self._note_rework(args[0])
            self.copies.append(copy)
            self._written.setdefault(_storage(args[0]), []).append(copy)
            return func(*args, **kwargs)
        written, inputs = _operands(func, args, kwargs)
        # A constant, such as the padding of a vocabulary, can be part of a plan; nothing else that is written can.
        constant = not inputs and func.overloadpacket in _FILLS
        for tensor in written:
            if self._owns(tensor):
                self._note_rework(tensor)
                if constant:
                    self.fills.append((tensor.detach(), args[1] if len(args) > 1 else 0))
                else:
                    self.repeatable = False
            elif self._staged(tensor):
                self._note_derived(tensor)
        out = func(*args, **kwargs)
        outputs = set() if written else {_storage(tensor) for tensor in _tensors([out])}
        for tensor in inputs:
            if _storage(tensor) in outputs:
                continue  # a view
            if self._staged(tensor):
                self._note_derived(tensor)
            elif self._owns(tensor):
                self.repeatable = False  # something is computed from old weights
        return out

    def _note_derived(self, staged: torch.Tensor) -> None:
        self.derived.add(self._entry(staged))
        self.repeatable = False

    def _note_rework(self, target: torch.Tensor) -> None:
        for copy in self._written.get(_storage(target), ()):
            if _overlap(copy.dst, target):
                self.reworked.add(copy.entry)

    def _staged(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.numel() > 0 and _storage(tensor) == self._base

    def _owns(self, tensor: torch.Tensor) -> bool:
        return tensor.numel() > 0 and _storage(tensor) in self.owned

    def _entry(self, tensor: torch.Tensor) -> int:
        return bisect.bisect_right(self._starts, tensor.data_ptr() - self._start) - 1


_FILLS = (torch.ops.aten.fill_, torch.ops.aten.zero_)


class Plan:
    """The copies that a loader made for buckets of one layout, to be made again without it.

    Args:
        recorder: Of a load that was `Recorder.repeatable`.
        flat: The staging memory of that load.
        model: The model, whose parameters must still be where they were when the plan is used.
    """

    def __init__(self, recorder: Recorder, flat: torch.Tensor, model: torch.nn.Module) -> None:
        start = flat.data_ptr()
        self.copies = [
            (
                c.dst,
                (c.src.data_ptr() - start) // c.src.element_size(),
                c.src.dtype,
                c.src.shape,
                c.src.stride(),
                c.entry,
            )
            for c in recorder.copies
        ]
        self.fills = recorder.fills
        written = {_storage(c.dst) for c in recorder.copies} | {_storage(dst) for dst, _ in self.fills}
        self._places = [
            (table, name, tensor.data_ptr())
            for module in model.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None and _storage(tensor) in written
        ]

    def fits(self) -> bool:
        """Whether the parameters are where they were; a stale pointer is never written through."""
        for table, name, place in self._places:
            tensor = table.get(name)
            if tensor is None or tensor.data_ptr() != place:
                return False
        return True

    def replay(self, flat: torch.Tensor) -> list[Copy]:
        """Make the copies out of a bucket of the same layout."""
        storage, base = flat.untyped_storage(), flat.storage_offset()
        made = []
        for dst, offset, dtype, shape, stride, entry in self.copies:
            src = torch.empty(0, dtype=dtype, device=flat.device)
            src.set_(storage, base // dtype.itemsize + offset, shape, stride)
            made.append(Copy(dst, src, entry))
        for dst, value in self.fills:
            dst.fill_(value)
        if made:
            torch._foreach_copy_([c.dst for c in made], [c.src for c in made])
        return made


_plans: dict[tuple[int, str], Plan] = {}


def _state(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one storage may share elements (by their outer bounds)."""

    def bounds(t: torch.Tensor) -> tuple[int, int]:
        low = t.data_ptr()
        return low, low + (sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1) * t.element_size()

    (a_low, a_high), (b_low, b_high) = bounds(a), bounds(b)
    return a_low < b_high and b_low < a_high


def _operands(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tensors that an operator writes to, and those that it reads and does not write to."""
    written: list[Any] = []
    read: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
        (written if argument.is_write else read).append(value)
    return _tensors(written), _tensors(read)


def _tensors(values: list[Any]) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(list(value))
    return found


def views(flat: torch.Tensor, entries: list[list[Any]]) -> list[tuple[str, torch.Tensor]]:
    """The bucket's tensors by name; entries are [name, dtype, shape, start, num_bytes]."""
    return [
        (name, flat[start : start + num_bytes].view(getattr(torch, dtype)).view(shape))
        for name, dtype, shape, start, num_bytes in entries
    ]


def differing(copies: list[Copy]) -> set[int]:
    """Entries whose parameters, read back, are not what the staging memory holds."""
    if not copies:
        return set()
    flags = torch.stack([(c.dst != c.src.to(c.dst)).any() for c in copies]).tolist()
    suspects = [c for c, flag in zip(copies, flags) if flag]
    # NaN differs from itself; a NaN that arrived as one is the trainer's.
    return {c.entry for c in suspects if not torch.allclose(c.dst, c.src.to(c.dst), rtol=0, atol=0, equal_nan=True)}


def _load(model: torch.nn.Module, job: dict[str, Any], answer: dict[str, Any]) -> None:
    clock = _Clock()
    device = next(model.parameters()).device
    entries = job["entries"]
    flat = open_handle(job["handle"], device)
    answer["opened"] = True
    source = flat.device
    try:
        clock.lap("open")
        if list(checksum(flat)) != job["checksum"]:
            # Checked before the first parameter is touched.
            raise RuntimeError("the bucket does not hold what the trainer packed (checksum)")
        clock.lap("check")
        copies, unsure, replayed = _apply(model, flat, entries)
        clock.lap("load")
        wrong = differing([c for c in copies if c.entry not in unsure])
        clock.lap("compare")
        read: dict[int, int] = {}
        for copy in copies:
            read[copy.entry] = read.get(copy.entry, 0) + copy.src.numel()
        answer["differing"] = sorted(entries[i][0] for i in wrong)
        answer["unproven"] = sorted(entries[i][0] for i in unsure)
        answer["read"] = {entries[i][0]: count for i, count in read.items()}
        answer["replayed"] = replayed
        answer["phases"] = clock.seconds
        del copies
    finally:
        del flat
        if device.type == "cuda":
            # Acknowledged means finished, on the GPU that was read from as well (fan-out).
            for used in {device, source}:
                torch.cuda.synchronize(used)


def _apply(model: torch.nn.Module, flat: torch.Tensor, entries: list[list[Any]]) -> tuple[list[Copy], set[int], bool]:
    """Load a bucket: by the plan of its layout if there is one, else by the engine's own loader, watched.

    Returns:
        The copies that were made, the entries whose arrival they cannot prove, and whether the plan was used.
    """
    key = id(model), hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    plan = _plans.get(key)
    if plan is not None and plan.fits():
        with torch.no_grad():
            return plan.replay(flat), set(), True
    owned = {_storage(tensor) for _, tensor in _state(model)}
    recorder = Recorder(flat, [entry[3] for entry in entries], owned)
    loader: Any = model  # every SGLang model has load_weights
    with torch.no_grad(), recorder:
        loader.load_weights(views(flat, entries))
    unsure = recorder.derived | recorder.reworked
    if recorder.repeatable and not unsure:
        _plans[key] = Plan(recorder, flat, model)
    return recorder.copies, unsure, False


class _Clock:
    """Seconds per step, for whoever wants to know where the time goes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def _probe(model: torch.nn.Module, job: dict[str, Any], answer: dict[str, Any]) -> None:
    answer["uuid"] = device_uuid()
    flat = open_handle(job["handle"], next(model.parameters()).device)
    answer["opened"] = True
    found = list(checksum(flat))
    del flat
    if found != job["checksum"]:
        raise RuntimeError("the handle opened, but on other memory than the trainer's")
    if torch.cuda.is_available():
        torch.cuda.synchronize()


_ACTIONS = {"load": _load, "probe": _probe}
