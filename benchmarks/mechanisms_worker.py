"""The receiver of `mechanisms.py` inside the TP workers: that of the library, with mechanisms switched off as a file says.

The file that the variable MECHANISMS_FLAGS names is read at the start of every sync: JSON, with ``off`` (names of mechanisms,
here only ``graphs``), ``kernel`` (whether the Triton kernel may be used) and ``report`` (a path, or null: where to write how
work was queued since the last report, one file per TP rank).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import tpcolocate_receiver
from tpcolocate_receiver import kernels, replay

FLAGS: dict[str, Any] = {"off": [], "kernel": True, "report": None}
QUEUED = {"as a graph": 0, "call by call": 0}
_run, _ready = replay.Replay.run, kernels.ready
_init_lanes = replay.Lanes.__init__


def run(self: replay.Replay, work: Callable[[], None]) -> None:
    if "graphs" in FLAGS["off"]:
        QUEUED["call by call"] += 1
        work()
    else:
        _run(self, work)
        QUEUED["as a graph" if self.is_captured else "call by call"] += 1


def init_lanes(self: replay.Lanes, device: torch.device) -> None:
    if "graphs" in FLAGS["off"]:
        self._device, self._streams = device, []  # all on the current stream
    else:
        _init_lanes(self, device)


def ready(device: torch.device) -> Any | None:
    return _ready(device) if FLAGS["kernel"] else None


def patch() -> None:
    """Have the library's classes of this process ask the flags."""
    replay.Replay.run, replay.Lanes.__init__, kernels.ready = run, init_lanes, ready  # type: ignore[method-assign]


def receive(model: torch.nn.Module, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """SGLang's custom weight loader hook."""
    given = list(named_tensors)
    try:
        with open(os.environ["MECHANISMS_FLAGS"]) as file:
            FLAGS.update(json.load(file))
    except (OSError, KeyError, ValueError):
        pass
    patch()
    tpcolocate_receiver.receive(model, given)
    if FLAGS["report"]:
        tp_rank = json.loads(given[0][0])["tp_rank"]
        with open(f"{FLAGS['report']}.{tp_rank}", "w") as file:
            json.dump(QUEUED, file)
        QUEUED.update(dict.fromkeys(QUEUED, 0))
