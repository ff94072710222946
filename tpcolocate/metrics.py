"""Figures of rollouts as flat dicts of floats, for wandb, TensorBoard and the like; targets for Prometheus."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from tpcolocate import rendezvous
from tpcolocate.checks import check_path, check_type
from tpcolocate.engine.values import is_array, is_list
from tpcolocate.errors import ConfigError, TpColocateError, shown

_LENGTH, _ABORT = "length", "abort"


def summarize(
    answers: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, prefix: str = "tpcolocate/"
) -> dict[str, float]:
    """Summarise what `Engine.generate` has returned.

    Args:
        answers: One answer, or a list of them.
        prefix: Of every key; ``rollout/`` follows it.

    Returns:
        ``answers``; ``tokens/mean``, ``min``, ``max`` and ``sum`` of the generated tokens; ``prompt_tokens/mean``;
        ``cached_tokens/sum`` and ``cached_rate``, the part of the prompts' tokens that came from the cache;
        ``finish/REASON``, the part of the answers that ended so; ``truncated_rate``, the part that ended by
        ``max_new_tokens``; ``weight_versions``, how many different versions generated tokens; ``mixed_rate``, the part of
        the answers that more than one version has generated; ``weight_version/min`` and ``max`` where versions are numbers.
        Of no answers, ``answers`` alone.

    Raises:
        ConfigError: An answer has no ``meta_info``.
    """
    infos = [_meta_info(answer, index) for index, answer in enumerate(_listed(answers))]
    values: dict[str, float] = {"answers": len(infos)}
    if infos:
        tokens = [_number_of_tokens(answer) for answer in _listed(answers)]
        prompt_tokens = [int(info.get("prompt_tokens", 0)) for info in infos]
        cached = sum(int(info.get("cached_tokens", 0) or 0) for info in infos)
        values.update({
            "tokens/mean": sum(tokens) / len(tokens),
            "tokens/min": min(tokens),
            "tokens/max": max(tokens),
            "tokens/sum": sum(tokens),
            "prompt_tokens/mean": sum(prompt_tokens) / len(prompt_tokens),
            "cached_tokens/sum": cached,
            "cached_rate": cached / sum(prompt_tokens) if sum(prompt_tokens) else 0.0,
        })  # fmt: skip
        reasons = Counter(_finish_reason(info) for info in infos)
        values.update({f"finish/{reason}": number / len(infos) for reason, number in reasons.items()})
        values["truncated_rate"] = reasons[_LENGTH] / len(infos)
        versions = [_versions(info) for info in infos]
        distinct = set().union(*versions)
        values["weight_versions"] = len(distinct)
        values["mixed_rate"] = sum(len(each) > 1 for each in versions) / len(infos)
        numbers = [int(version) for version in distinct if version.isascii() and version.isdecimal()]
        if numbers and len(numbers) == len(distinct):
            values.update({"weight_version/min": min(numbers), "weight_version/max": max(numbers)})
    return {f"{prefix}rollout/{name}": float(value) for name, value in values.items()}


def engine_logprobs(answers: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """Return the engine's log-probability of every generated token.

    Args:
        answers: Of ``generate(..., return_logprob=True)``: one, or a list.

    Returns:
        One float32 tensor on the CPU per answer, of the shape (generated tokens,); NaN where the server's is not finite.

    Raises:
        ConfigError: An answer has no log-probabilities.
    """
    found = []
    for index, answer in enumerate(_listed(answers)):
        entries = _meta_info(answer, index).get("output_token_logprobs")
        if entries is None:
            raise ConfigError(f"answer {index} has no log-probabilities", hint="pass return_logprob=True to generate()")
        # JSON has None for what is not finite.
        values = [math.nan if entry[0] is None else float(entry[0]) for entry in entries]
        found.append(torch.tensor(values, dtype=torch.float32, device="cpu"))
    return found


def logprob_gap(
    answers: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    trainer_logprobs: torch.Tensor | Sequence[torch.Tensor],
    *,
    prefix: str = "tpcolocate/",
) -> dict[str, float]:
    """Compare the engine's log-probabilities of generated tokens with the trainer's.

    With the same weights on both sides the gap is numerical noise.

    Args:
        answers: Of ``generate(..., return_logprob=True)``: one, or a list.
        trainer_logprobs: Of the same tokens, at the same temperature: one tensor of the shape (generated tokens,) per
            answer, or one of the shape (answers, length), padded on the right.
        prefix: Of every key; ``gap/`` follows it.

    Returns:
        ``max`` and ``mean`` of the absolute difference, and what `importance_ratios` returns, under ``gap/``.

    Raises:
        ConfigError: An answer has no log-probabilities, or another number of tokens than its tensor.
    """
    engine = engine_logprobs(answers)
    trainer = _rows(trainer_logprobs)
    if len(engine) != len(trainer):
        raise ConfigError(f"{len(engine)} answers and the trainer's log-probabilities of {len(trainer)}")
    length = max((row.numel() for row in engine), default=0)
    padded = torch.zeros(2, len(engine), length, dtype=torch.float64, device="cpu")
    mask = torch.zeros(len(engine), length, dtype=torch.bool, device="cpu")
    for index, (ours, theirs) in enumerate(zip(engine, trainer)):
        if theirs.numel() < ours.numel() or (theirs.numel() > ours.numel() and not _is_padded(trainer_logprobs)):
            raise ConfigError(
                f"answer {index} has {ours.numel()} generated tokens, and the trainer's log-probabilities are "
                f"{theirs.numel()}",
                hint="pass those of the generated tokens alone, without the prompt's",
            )
        padded[0, index, : ours.numel()] = ours
        padded[1, index, : ours.numel()] = theirs.detach()[: ours.numel()].to("cpu", torch.float64)
        mask[index, : ours.numel()] = True
    difference = (padded[1] - padded[0])[mask]
    difference = difference[difference.isfinite()].abs()
    values = {
        "max": float(difference.max()) if difference.numel() else 0.0,
        "mean": float(difference.mean()) if difference.numel() else 0.0,
    }
    return {
        **{f"{prefix}gap/{name}": value for name, value in values.items()},
        **importance_ratios(padded[0], padded[1], mask, prefix=f"{prefix}gap/"),
    }


def importance_ratios(
    engine_logprobs: torch.Tensor,
    trainer_logprobs: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    prefix: str = "tpcolocate/",
) -> dict[str, float]:
    """Summarise the importance ratios exp(trainer - engine) of generated tokens.

    Args:
        engine_logprobs: Shape (answers, length) or (tokens,); any device and dtype.
        trainer_logprobs: The same shape.
        mask: The same shape, true for generated tokens; default: all.
        prefix: Of every key; ``ratio/`` follows it.

    Returns:
        ``mean`` and ``max`` of the ratios of tokens; ``ess``, their effective sample size as a part of their number, from 0
        to 1; ``kl``, the mean of engine - trainer, which estimates the divergence; with two dimensions ``sequence_max``
        and ``sequence_ess``, of the products over each answer; ``tokens`` and ``nonfinite``, how many were used and left
        out.

    Raises:
        ConfigError: The shapes differ.
    """
    engine_logprobs = _tensor(engine_logprobs, "engine_logprobs")
    trainer_logprobs = _tensor(trainer_logprobs, "trainer_logprobs")
    mask = None if mask is None else _tensor(mask, "mask")
    if engine_logprobs.shape != trainer_logprobs.shape or (mask is not None and mask.shape != engine_logprobs.shape):
        shapes = ", ".join(str(tuple(t.shape)) for t in (engine_logprobs, trainer_logprobs, mask) if t is not None)
        raise ConfigError(f"log-probabilities and mask have different shapes: {shapes}")
    engine, trainer = engine_logprobs.detach().double(), trainer_logprobs.detach().double().to(engine_logprobs.device)
    chosen = torch.ones_like(engine, dtype=torch.bool) if mask is None else mask.to(engine.device).bool()
    difference = trainer - engine
    finite = chosen & difference.isfinite()
    tokens = difference[finite]
    values = {
        "mean": _mean_ratio(tokens),
        "max": _exp(tokens.max()) if tokens.numel() else 0.0,
        "ess": _effective(tokens),
        "kl": float(-tokens.mean()) if tokens.numel() else 0.0,
        "tokens": float(tokens.numel()),
        "nonfinite": float((chosen & ~finite).sum()),
    }
    if difference.dim() == 2:
        rows = finite.any(1)
        sequences = torch.where(finite, difference, 0.0).sum(1)[rows]
        values["sequence_max"] = _exp(sequences.max()) if sequences.numel() else 0.0
        values["sequence_ess"] = _effective(sequences)
    return {f"{prefix}ratio/{name}": value for name, value in values.items()}


def _mean_ratio(logs: torch.Tensor) -> float:
    return _exp(torch.logsumexp(logs, 0) - math.log(logs.numel())) if logs.numel() else 0.0


def _effective(logs: torch.Tensor) -> float:
    """Return (sum of weights)^2 / (number * sum of squares), of weights exp(logs)."""
    if not logs.numel():
        return 0.0
    return float(torch.exp(2 * torch.logsumexp(logs, 0) - torch.logsumexp(2 * logs, 0) - math.log(logs.numel())))


def _exp(value: torch.Tensor) -> float:
    return float(torch.exp(value))


def write_prometheus_targets(path: str | os.PathLike[str], *, job: str | None = None) -> list[dict[str, Any]]:
    """Write the running servers of this user on this host as a file for Prometheus' ``file_sd_configs``.

    Servers have ``/metrics`` if they were launched with ``enable_metrics=True``; it needs no key.

    Args:
        path: File to write, atomically; ends in ``.json`` for Prometheus.
        job: `Colocation.job`; default: all jobs.

    Returns:
        What was written: per server a target ``host:port`` with labels ``tpcolocate_job``, ``tpcolocate_slice`` and
        ``tpcolocate_ranks``.

    Raises:
        ConfigError: `path` is no path, or `job` is not the name of a job.
        OSError: The file cannot be written.
    """
    path = check_path("path", path)
    job = rendezvous.job_of(job, {})
    targets = []
    for _, announcement in sorted(rendezvous.discover(job), key=lambda found: (found[1].job, found[1].slice_index)):
        labels = {
            "tpcolocate_job": announcement.job,
            "tpcolocate_slice": str(announcement.slice_index),
            "tpcolocate_ranks": ",".join(map(str, announcement.slice_ranks)),
        }
        targets.append({"targets": [urlsplit(announcement.url).netloc], "labels": labels})
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(targets, file, indent=1)
        os.chmod(temporary, 0o644)  # Prometheus runs as another user; there is no secret in it
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return targets


# --- answers ----------------------------------------------------------------------------------------------------------


def _listed(answers: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    if isinstance(answers, Mapping):
        return [answers]
    return check_type("answers", answers, Sequence, expected="an answer of generate() or a list of them")


def _meta_info(answer: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    if isinstance(answer, TpColocateError):
        raise ConfigError(
            f'answer {index} is an error, which on_error="return" has put in its place: {answer.message}',
            hint="leave the errors out: [a for a in answers if isinstance(a, dict)], and their rows of the trainer's",
        )
    if not isinstance(answer, Mapping) or not isinstance(answer.get("meta_info"), Mapping):
        raise ConfigError(
            f"answer {index} is a {type(answer).__name__} without meta_info", hint="pass what generate() returned"
        )
    info: Mapping[str, Any] = answer["meta_info"]
    return info


def _number_of_tokens(answer: Mapping[str, Any]) -> int:
    number = answer["meta_info"].get("completion_tokens")
    return int(number) if number is not None else len(answer.get("output_ids") or ())


def _finish_reason(info: Mapping[str, Any]) -> str:
    reason = info.get("finish_reason")
    return str(reason.get("type")) if isinstance(reason, Mapping) else str(reason or "unfinished")


def _versions(info: Mapping[str, Any]) -> set[str]:
    """Return the versions of the weights that generated an answer, which newer releases report per token."""
    spans: Iterator[Mapping[str, Any]] = iter(info.get("weight_versions") or ())
    found = {str(span["version"]) for span in spans if isinstance(span, Mapping) and "version" in span}
    return found or {str(info.get("weight_version", "default"))}


def _rows(logprobs: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    name = "trainer_logprobs"
    if not is_array(logprobs) and not is_list(logprobs):
        raise ConfigError(f"{name} must be tensors, one for each answer, got {shown(logprobs)}")
    rows = [logprobs] if _has_dimensions(logprobs, 1) else logprobs
    return [_tensor(row, name).reshape(-1) for row in rows]


def _is_padded(logprobs: torch.Tensor | Sequence[torch.Tensor]) -> bool:
    return _has_dimensions(logprobs, 2)


def _has_dimensions(values: Any, number: int) -> bool:
    return is_array(values) and values.ndim == number


def _tensor(values: Any, name: str) -> torch.Tensor:
    """Return numbers that may be a list or an array as a tensor."""
    try:
        found = values if isinstance(values, torch.Tensor) else torch.as_tensor(values, device="cpu")
        return found.detach()
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{name} must be a tensor of numbers, got {shown(values)}") from None


__all__ = ["engine_logprobs", "importance_ratios", "logprob_gap", "summarize", "write_prometheus_targets"]
