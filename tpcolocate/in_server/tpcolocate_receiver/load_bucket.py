"""Load a bucket of full tensors: by planned copies, or by the engine's own loader while it is traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .copy_plan import CopyPlan, locations_of
from .loader_trace import BucketTensors, Copy, LoaderTrace, quantization_problem, views


@dataclass(frozen=True, slots=True)
class LoadedBucket:
    """What was done with a bucket.

    Attributes:
        copies: That were made.
        unverified: Entries whose arrival the copies cannot verify.
        replayed: Whether planned copies were made, without the loader.
        deviating: Planned tensors that the loader treated in another way; None unless it was watched for that.
    """

    copies: list[Copy]
    unverified: set[int]
    replayed: bool
    deviating: list[str] | None = None


def load_bucket(
    model: torch.nn.Module, plan: CopyPlan, flat: torch.Tensor, entries: Sequence[Sequence[Any]], *, watch: bool = False
) -> LoadedBucket:
    """Load a bucket into a model, and add to its plan what the loader was seen to do.

    Args:
        model: The worker's.
        plan: Of the model; discarded if the loader deviates from it.
        flat: The bucket.
        entries: Its contents, each [name, dtype, shape, start, num_bytes].
        watch: Run the loader also where everything is planned, and compare.

    Raises:
        RuntimeError: The engine quantises its weights.
        Exception: Whatever the loader raises.
    """
    is_planned = plan.covers(entries) and plan.is_current()
    if is_planned and not watch:
        with torch.no_grad():
            return LoadedBucket(plan.replay(flat, entries), set(), True)
    locations = locations_of(model)
    trace = LoaderTrace(BucketTensors(flat, entries), {location.storage for location in locations})
    loader: Any = model  # every SGLang model has load_weights
    sent = views(flat, entries)  # made before the trace begins
    with torch.no_grad(), trace:
        loader.load_weights(sent)
    if (problem := quantization_problem(trace.copies, entries)) is not None:
        raise RuntimeError(problem)
    deviating: list[str] = []
    if is_planned:
        seen = CopyPlan()
        seen.add(trace, entries, locations)
        deviating = plan.deviating(seen, [entry[0] for entry in entries])
        if deviating:
            plan.discard()
    plan.add(trace, entries, locations)
    return LoadedBucket(trace.copies, trace.transformed | trace.overwritten, False, deviating if watch else None)
