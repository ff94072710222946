"""Repeated GPU work, queued as one CUDA graph and on several streams."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)


class Replay:
    """Queues the same kernels at every call: one by one the first time, as a CUDA graph from the second time on.

    Hundreds of short kernels can take longer to queue from Python than to run.  The graph keeps addresses, not memory:
    the caller makes sure that nothing has moved, or calls `forget`.

    Args:
        device: Of the work; on a CPU every call does it at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._num_calls = 0

    @property
    def is_captured(self) -> bool:
        """Return whether the work is queued as a graph."""
        return self._graph is not None

    def run(self, work: Callable[[], None]) -> None:
        """Queue the work on the current stream.

        Args:
            work: Queues kernels and nothing else: it neither waits nor uses memory that is freed.
        """
        self._num_calls += 1
        if self._device.type == "cuda" and self._num_calls == 2:
            self._capture(work)
        if self._graph is None:
            work()
        else:
            self._graph.replay()

    def _capture(self, work: Callable[[], None]) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            # Not torch.cuda.graph(): that collects garbage first, which takes long in a large process.
            with torch.cuda.stream(stream):
                # Other threads of the process (NCCL's watchdog) may go on meanwhile.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
            self._graph = graph
        except RuntimeError as error:  # slower, with the same result
            logger.warning("tpcolocate: kernels are queued one by one: %s", error)
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def forget(self) -> None:
        """Drop the graph, since memory has moved or the work is different."""
        self._graph = None
        self._num_calls = 0


class Lanes:
    """A few streams side by side: where one kernel ends and leaves a part of the GPU idle, another can start.

    Args:
        device: Of the work; on a CPU it is done at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: list[torch.cuda.Stream] = []
        if device.type == "cuda":
            self._streams = [torch.cuda.Stream(device) for _ in range(_NUM_LANES)]
            for stream in self._streams:
                stream.wait_stream(torch.cuda.current_stream(device))

    def lane(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """Return a context for work behind the work of its own lane and what the current stream held at the start."""
        if not self._streams:
            return contextlib.nullcontext()
        return torch.cuda.stream(self._streams[number % _NUM_LANES])

    def join(self) -> None:
        """Make the current stream wait for all lanes."""
        for stream in self._streams:
            torch.cuda.current_stream(self._device).wait_stream(stream)


_NUM_LANES = 3
