"""Fused copy and checksum: each tile is read back and summed while it is still in the cache.

A copy and a sum, one after the other, go through a GPU's memory three times: to read, to write, to read back.  This
kernel goes through it twice, and one launch does all copies of a sync.  The trainer has it sum up what is to be copied,
hundreds of tensors in one launch.  It is written in Triton, which SGLang depends on; where that is missing,
`copy_plan.CopyProgram` copies and sums up tensor by tensor in torch.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch

from .kernel_tables import TILE, ChecksumTable, CopyTable, Part, parts_of

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_threads: dict[torch.device, threading.Thread] = {}
"""Started by `prepare`."""
_launchers: dict[torch.device, Any] = {}
"""Of kernels that were compiled and verified."""


def ready(device: torch.device) -> Any | None:
    """Return the kernel's launcher; None while it is being compiled, and where it cannot be."""
    return _launchers.get(device)


def prepare(device: torch.device) -> None:
    """Start to compile the kernel in a thread: it takes up to two seconds the first time on a machine."""
    with _lock:
        if device.type != "cuda" or device in _threads:
            return
        # A daemon: a compiler that hangs must not keep the process.
        _threads[device] = threading.Thread(target=_compile, args=(device,), name="tpcolocate kernel", daemon=True)
        _threads[device].start()


def wait_until_prepared(device: torch.device, *, timeout_s: float) -> None:
    """Wait until `prepare` is done, which on a GPU would disturb the capture of a graph.

    Args:
        device: As given to `prepare`.
        timeout_s: In seconds; a compiler that takes longer is left running.
    """
    with _lock:
        thread = _threads.get(device)
    if thread is not None:
        thread.join(timeout_s)


def _compile(device: torch.device) -> None:
    try:
        from .triton_kernel import launch

        torch.cuda.set_device(device)  # of this thread
        with torch.cuda.stream(torch.cuda.Stream(device)):
            verify(launch, device)
        _launchers[device] = launch
    except Exception as error:  # slower, with the same result
        logger.warning("tpcolocate: weights are copied and summed up tensor by tensor: %s", error)


def verify(launch: Any, device: torch.device) -> None:
    """Copy and sum up a little of each kind, and compare.

    Raises:
        RuntimeError: The result is wrong.
    """
    generator = torch.Generator().manual_seed(1)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**63), 2**63 - 1, shape, dtype=torch.int64, generator=generator).to(device)

    flat, rows, wide, cube = words(3 * TILE + 2), words(40, 1024), words(3, 2 * TILE + 8), words(3, 6, 20)
    sources = [flat, rows[:, 16:528], wide[:, : 2 * TILE + 4], cube[:, 1:5, 2:10], flat[:2], rows[:2, :64]]
    targets = [torch.zeros_like(source, memory_format=torch.contiguous_format) for source in sources]
    # Two rows into one place: what is read back is not what was read.
    targets[-1] = targets[-1][:1].expand(2, 64)
    copies: list[tuple[int, str, list[Part]]] = []
    for number, (dst, src) in enumerate(zip(targets, sources)):
        parts = parts_of(dst, src)
        if parts is None:
            raise RuntimeError("a copy has no parts")
        copies.append((number, str(number), parts))
    checksums = torch.zeros(len(sources), dtype=torch.int64, device=device)
    regions = {str(number): source for number, source in enumerate(sources)}
    CopyTable(copies, regions, device).run(launch, checksums)
    for number, (dst, src) in enumerate(zip(targets, sources)):
        if int(checksums[number]) != int(dst.sum()) or not (number == len(sources) - 1 or torch.equal(dst, src)):
            raise RuntimeError(f"the kernel failed its test ({number})")
    checksums.zero_()
    to_sum = [(number, parts_of(source, source) or ()) for number, source in enumerate(sources)]
    ChecksumTable(to_sum, device).run(launch, checksums)
    if checksums.tolist() != [int(source.sum()) for source in sources]:
        raise RuntimeError("the kernel failed its test (checksums)")
