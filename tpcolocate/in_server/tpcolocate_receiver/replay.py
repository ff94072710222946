"""The same GPU work again and again, queued as one piece."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)


class Replay:
    """Queues the same kernels at every call: call by call the first time, as a CUDA graph from the second time on.

    Eight hundred kernels of some microseconds each take longer to queue from Python than to run.  The graph keeps
    addresses, not memory: whoever calls makes sure that everything lies where it lay.

    Args:
        device: Of the work; on a CPU it is just done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._num_calls = 0

    def run(self, work: Callable[[], None]) -> None:
        """Queue the work on the current stream.

        Args:
            work: Queues kernels and nothing else: no waiting, no memory but what lasts.
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
            # Not torch.cuda.graph(): that collects garbage first, which takes a second in a large process.
            with torch.cuda.stream(stream):
                # Other threads of the process (NCCL's watchdog) may go on meanwhile.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
            self._graph = graph
        except RuntimeError as error:  # slower, and all the same
            logger.warning("tpcolocate: kernels are queued one by one: %s", error)
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def forget(self) -> None:
        """Something lies elsewhere now."""
        self._graph = None
        self._num_calls = 0


class Beside:
    """A second stream for what may run beside other work: each kernel's end leaves room that another's start can use.

    Args:
        device: Of the work; on a CPU it is done at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def what_was_queued(self) -> contextlib.AbstractContextManager[Any]:
        """Work that waits for everything queued so far, and for nothing after it."""
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def join(self) -> None:
        """Have the current stream wait for it."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
