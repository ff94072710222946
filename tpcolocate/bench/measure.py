"""Measures syncs and generation at several sizes of the server, with the user's model and devices."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from tpcolocate.bench.common_way import CommonWay, why_not
from tpcolocate.bench.results import Measured
from tpcolocate.engine.engine import Engine
from tpcolocate.errors import TpColocateError
from tpcolocate.session import Colocation, init

Answers = tuple[tuple[int, ...], ...]
"""Token ids of one rank's answers."""

_GREEDY = {"temperature": 0, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured.

    Attributes:
        model_path: Of the checkpoint, as for SGLang.
        prompts: Token ids of this rank's prompts.
        max_new_tokens: Tokens of each answer.
        rounds: Samples of each figure.
        server: Arguments for `Colocation.launch`.
        launch_timeout_s: For a server to start, in seconds.
    """

    model_path: str
    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    rounds: int
    server: Mapping[str, Any]
    launch_timeout_s: float


def gather_all(value: Any) -> list[Any]:
    """Return the value of every rank.  Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def measure(
    work: Workload, model: torch.nn.Module, tp_size: int, *, device: torch.device, progress: tqdm[Any]
) -> tuple[Measured, Answers]:
    """Measure one size of the server, from its launch to its end.  Collective over all ranks.

    Args:
        work: What to measure; prompts may differ between ranks.
        model: The trainer's.
        tp_size: GPUs per server.
        device: Training device of this rank.
        progress: Advanced after each step.

    Returns:
        The figures, or the error of the first rank whose server did not start, the same on all ranks; and this rank's
        answers.
    """
    started = time.perf_counter()
    try:
        colo = init(tp_size, device=device)
    except TpColocateError as error:  # the same on all ranks
        return Measured(tp_size, error=_text(error)), ()
    with colo:
        engine, failure = _launch(work, colo)
        launch_s = time.perf_counter() - started
        failures = gather_all(failure)
        first = next((one for one in failures if one is not None), None)
        if engine is None or first is not None:
            if engine is not None:
                engine.shutdown()
            return Measured(tp_size, error=first), ()
        progress.update()
        with engine:
            return _measure_engine(
                work, model, colo, engine, max(gather_all(launch_s)), device=device, progress=progress
            )


def num_steps(work: Workload) -> int:
    """Return how often `measure` advances its progress."""
    return 4 + 2 * work.rounds


def _launch(work: Workload, colo: Colocation) -> tuple[Engine | None, str | None]:
    try:
        # The weights come by the first sync, which starts faster and shows that they arrive.
        settings = {"load_format": "dummy", **work.server}
        return colo.launch(work.model_path, health_timeout_s=work.launch_timeout_s, **settings), None
    except TpColocateError as error:
        return None, _text(error)


def _text(error: TpColocateError) -> str:
    return error.message if error.hint is None else f"{error.message} -> {error.hint}"


def _measure_engine(
    work: Workload, model: torch.nn.Module, colo: Colocation, engine: Engine, launch_s: float,
    *, device: torch.device, progress: tqdm[Any],
) -> tuple[Measured, Answers]:  # fmt: skip
    first_sync_s = _timed(lambda: engine.sync_weights(model), device)
    report = engine.sync_weights(model)  # the first one that repeats another
    progress.update(2)
    no_common_way = why_not(model, device)
    sync_s: list[float] = []
    common_way_s: list[float] = []
    if no_common_way is not None:
        for _ in range(work.rounds):
            sync_s.append(_timed(lambda: engine.sync_weights(model), device))
            progress.update()
    else:
        with closing(CommonWay(engine, colo)) as common_way:
            common_way.push(model)
            for _ in range(work.rounds):  # in turns, so that both meet the same noise
                common_way_s.append(_timed(lambda: common_way.push(model), device))
                sync_s.append(_timed(lambda: engine.sync_weights(model), device))
                progress.update()
    params = {**_GREEDY, "max_new_tokens": work.max_new_tokens}
    prompts = [list(prompt) for prompt in work.prompts]
    answers = engine.generate(prompts, params)
    progress.update()
    generate_s = []
    for _ in range(work.rounds):
        generate_s.append(_timed(lambda: engine.generate(prompts, params), device))
        progress.update()
    tokens = tuple(tuple(answer["output_ids"]) for answer in answers)
    measured = Measured(
        tp_size=colo.tp_size,
        launch_s=launch_s,
        first_sync_s=first_sync_s,
        sync_s=tuple(sync_s),
        common_way_s=tuple(common_way_s),
        no_common_way=no_common_way,
        generate_s=tuple(generate_s),
        num_tokens=sum(gather_all(sum(map(len, tokens)))),
        num_bytes=report.num_bytes,
        peak_extra_bytes=max(gather_all(max(part.peak_extra_bytes for part in report.ranks))),
        free_bytes=None if device.type == "cpu" else min(gather_all(torch.cuda.mem_get_info(device)[0])),
    )
    return measured, tokens


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of the slowest rank.  Collective."""
    _synchronize(device)
    gather_all(None)
    started = time.perf_counter()
    call()
    _synchronize(device)
    return max(gather_all(time.perf_counter() - started))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


__all__ = ["Answers", "Workload", "gather_all", "measure", "num_steps"]
