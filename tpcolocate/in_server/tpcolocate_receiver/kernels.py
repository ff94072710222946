"""Fused copy and checksum: each tile is read back and summed while it is still in the cache.

A copy and a sum, one after the other, go through a GPU's memory three times: to read, to write, to read back.  This
kernel goes through it twice, and one launch does all copies of a sync, from the memory of this GPU and of others.  A second
kernel casts between floating-point dtypes on the way.  The trainer has both sum up what is to be copied, hundreds of tensors
in one launch.  They are written in Triton, which SGLang depends on; where that is missing, `copy_program.CopyProgram` copies
and sums up tensor by tensor in torch.

Casts round as torch's do.  A number that is none may become another such number than torch makes of it on a CPU (on GPUs both
do what the hardware does), so that sums of it, taken in different ways, may differ.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .checksums import word_sum
from .kernel_tables import TILE, Cast, ChecksumTable, CopyTable, Layout, Slices

logger = logging.getLogger(__name__)

USUAL_CASTS: tuple[Cast, ...] = ((torch.float32, torch.bfloat16),)
"""Compiled at once, for trainers that keep weights in float32; others when they are asked for."""

_lock = threading.Lock()
_threads: dict[torch.device, threading.Thread] = {}
"""Started by `prepare`; the last one of each device."""
_asked: dict[torch.device, set[Cast]] = {}
"""Casts that were compiled, or are to be."""
_launchers: dict[torch.device, Any] = {}
"""Of kernels that were compiled and verified."""
_casts: dict[torch.device, frozenset[Cast]] = {}
"""Casts that were compiled and verified."""


def ready(device: torch.device) -> Any | None:
    """Return the kernels' launcher; None while the first is being compiled, and where it cannot be."""
    return _launchers.get(device)


def casts(device: torch.device) -> frozenset[Cast]:
    """Return the casts that the launcher can do by now."""
    return _casts.get(device, frozenset())


def prepare(device: torch.device, wanted: Iterable[Cast] = USUAL_CASTS) -> None:
    """Start to compile what is not compiled yet in a thread: it takes up to a few seconds the first time on a machine.

    Args:
        device: To run on; nothing is done for a CPU.
        wanted: Casts, beside the kernel that copies.
    """
    with _lock:
        if device.type != "cuda":
            return
        asked = _asked.setdefault(device, set())
        new = [cast for cast in wanted if cast not in asked]
        before = _threads.get(device)
        if before is not None and not new:
            return
        asked.update(new)
        # A daemon: a compiler that hangs must not keep the process.
        thread = threading.Thread(target=_compile, args=(device, new, before), name="tpcolocate kernel", daemon=True)
        _threads[device] = thread
        thread.start()


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


def _compile(device: torch.device, wanted: Iterable[Cast] = (), before: threading.Thread | None = None) -> None:
    if before is not None:
        before.join()
        if ready(device) is None:
            return  # it has failed, and was reported
    try:
        from .triton_kernel import launch

        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        with torch.cuda.stream(torch.cuda.Stream(device) if device.type == "cuda" else None):
            if ready(device) is None:
                verify(launch, device)
                _launchers[device] = launch
            for cast in wanted:
                verify_cast(launch, device, cast)
                _casts[device] = casts(device) | {cast}
    except Exception as error:  # slower, with the same result
        what = "cast" if device in _launchers else "copied and summed up"
        logger.warning("tpcolocate: weights are %s tensor by tensor: %s", what, error)


def verify(launch: Any, device: torch.device) -> None:
    """Copy and sum up a little of each kind, and compare.

    Raises:
        RuntimeError: The result is wrong.
    """
    generator = torch.Generator().manual_seed(1)

    def words(*shape: int) -> torch.Tensor:
        made = torch.randint(-(2**63), 2**63 - 1, shape, dtype=torch.int64, generator=generator, device="cpu")
        return made.to(device)

    flat, rows, wide, cube = words(3 * TILE + 2), words(40, 1024), words(3, 2 * TILE + 8), words(3, 6, 20)
    sources = [flat, rows[:, 16:528], wide[:, : 2 * TILE + 4], cube[:, 1:5, 2:10], flat[:2], rows[:2, :64]]
    targets = [torch.zeros_like(source, memory_format=torch.contiguous_format) for source in sources]
    # Two rows into one place: what is read back is not what was read.
    targets[-1] = targets[-1][:1].expand(2, 64)
    _try_copies(launch, targets, sources, None)
    if not all(map(torch.equal, targets[:-1], sources)):
        raise RuntimeError("the kernel failed its test (copies)")
    _try_sums(launch, sources, torch.int64, None)
    _try_copies(launch, targets, sources, None, flags=True)  # another form of the kernel: compiled here, not in a sync
    _try_flags(launch, device)


def verify_cast(launch: Any, device: torch.device, cast: Cast) -> None:
    """Cast and sum up numbers of every size, infinite ones included, and compare with torch.

    Raises:
        RuntimeError: The result is wrong.
    """
    source, target = cast
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> torch.Tensor:
        values, scales = (torch.randn(shape, generator=generator, device="cpu") for _ in range(2))
        values = values * scales.mul(20).exp()
        return values.to(source).to(device)

    flat, rows, wide = numbers(5 * TILE + 8), numbers(20, 1024), numbers(3, 4 * TILE + 16)
    sources = [flat, rows[:, 16:272], wide[:, : 4 * TILE + 8], numbers(3, 6, 64)[:, 1:5, 8:24], rows[:2, :512]]
    targets = [torch.zeros(one.shape, dtype=target, device=device) for one in sources]
    targets[-1] = targets[-1][:1].expand(2, 512)
    _try_copies(launch, targets, sources, cast)
    if not all(torch.equal(dst, src.to(target)) for dst, src in zip(targets[:-1], sources)):
        raise RuntimeError(f"the kernel failed its test ({source} to {target})")
    _try_sums(launch, sources, target, cast)
    _try_copies(launch, targets, sources, cast, flags=True)


def _try_copies(
    launch: Any, targets: list[torch.Tensor], sources: list[torch.Tensor], cast: Cast | None, *, flags: bool = False
) -> None:
    slices, device = Slices(), sources[0].device
    for number, (dst, src) in enumerate(zip(targets, sources)):
        layout = Layout(tuple(dst.shape), src.stride(), dst.stride(), src.dtype, dst.dtype)
        slices.add(layout, 0, dst.data_ptr(), slot=number, weight=2 * number + 1, region=str(number))
    table = CopyTable(
        slices,
        {str(number): source for number, source in enumerate(sources)},
        device,
        casts=frozenset() if cast is None else frozenset([cast]),
        first_flag=len(sources),
    )
    found = torch.zeros(2 * len(sources), dtype=torch.int64, device=device)
    table.run(launch, found if flags else found[: len(sources)], flags=flags)
    _compare(table.rest, found[: len(sources)], targets, cast)
    if flags:
        _check_flags(found[len(sources) :], targets)


def _try_flags(launch: Any, device: torch.device) -> None:
    """Copy numbers of every dtype that are finite, and some of which one is not."""
    slices, sources, targets = Slices(), [], []
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        largest = torch.finfo(dtype).max
        for last in (largest, -largest, math.inf, -math.inf, math.nan):
            source = torch.zeros(2 * TILE + 64, dtype=dtype, device="cpu")
            source[-2] = last
            sources.append(source.to(device))
            targets.append(torch.empty_like(sources[-1]))
    for number, (dst, src) in enumerate(zip(targets, sources)):
        layout = Layout(tuple(dst.shape), src.stride(), dst.stride(), src.dtype, dst.dtype)
        slices.add(layout, 0, dst.data_ptr(), slot=number, region=str(number))
    regions = {str(number): source for number, source in enumerate(sources)}
    table = CopyTable(slices, regions, device, first_flag=len(sources))
    sums = torch.zeros(2 * len(sources), dtype=torch.int64, device=device)
    table.run(launch, sums, flags=True)
    _check_flags(sums[len(sources) :], sources)


def _check_flags(flags: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    if flags.tolist() != [int(not bool(torch.isfinite(one).all())) for one in tensors]:
        raise RuntimeError(f"the kernel failed its test (numbers that are not finite: {flags.tolist()})")


def _try_sums(launch: Any, sources: list[torch.Tensor], target: torch.dtype, cast: Cast | None) -> None:
    slices, device = Slices(), sources[0].device
    for number, source in enumerate(sources):
        layout = Layout.to_sum(source.shape, source.stride(), source.dtype, target)
        slices.add(layout, source.data_ptr(), slot=number, weight=2 * number + 1)
    table = ChecksumTable(slices, device, casts=frozenset() if cast is None else frozenset([cast]))
    sums = torch.zeros(len(sources), dtype=torch.int64, device=device)
    table.run(launch, sums)
    _compare(table.rest, sums, [source.to(target) for source in sources], cast, what="checksums")


def _compare(
    rest: list[int], sums: torch.Tensor, there: list[torch.Tensor], cast: Cast | None, *, what: str = "copies"
) -> None:
    expected = torch.stack([word_sum(one) * (2 * number + 1) for number, one in enumerate(there)])
    if rest or not torch.equal(sums, expected):
        wrong = rest or torch.nonzero(sums != expected).flatten().tolist()
        kind = "" if cast is None else f"{cast[0]} to {cast[1]}, "
        raise RuntimeError(f"the kernel failed its test ({kind}sums of {what} {wrong})")
