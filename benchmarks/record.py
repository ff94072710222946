"""How a result is recorded: one JSON file per result, complete enough to be checked.

A record names its command, commit, versions, hardware and sizes, holds the baseline of the same run and what was
checked in it.  It never names the host, its folders or its users.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIELDS = (
    "name", "metric", "unit", "n", "median", "minimum", "maximum", "samples", "baseline", "comparison", "target",
    "target_met", "checks", "settings", "command", "commit", "versions", "hardware", "load_average", "time_utc",
)  # fmt: skip
"""Every record has all of them, in this order; None where one does not apply."""
_MOST_SAMPLES = 120
_PACKAGES = ("torch", "sglang", "transformers", "httpx", "tpcolocate")


def record(
    name: str,
    *,
    metric: str,
    unit: str,
    samples: Sequence[float],
    settings: Mapping[str, Any],
    checks: Mapping[str, Any],
    baseline: Mapping[str, Any] | None = None,
    comparison: Mapping[str, Any] | None = None,
    target: str | None = None,
    target_met: bool | None = None,
    load_before: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Return the record of one result.

    Args:
        name: Of the result, and of its file.
        metric: What one sample is.
        unit: Of the samples.
        samples: In the order in which they were taken; at least one.
        settings: Sizes and options.
        checks: What was found right in the same run.
        baseline: `summary` of what it is compared with, taken in the same run, and what that is.
        comparison: `ratio_of_medians` of the two.
        target: In words.
        target_met: Whether it is.
        load_before: ``os.getloadavg()`` before the run; others may have used the machine.

    Raises:
        ValueError: There are no samples.
    """
    result = {
        "name": name,
        "metric": metric,
        "unit": unit,
        **summary(samples),
        "baseline": baseline,
        "comparison": comparison,
        "target": target,
        "target_met": target_met,
        "checks": dict(checks),
        "settings": dict(settings),
        "command": command(sys.argv, os.environ),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in _PACKAGES},
        "hardware": hardware(),
        "load_average": {
            "before": None if load_before is None else [round(load, 2) for load in load_before],
            "after": [round(load, 2) for load in os.getloadavg()],
        },
        "time_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    assert tuple(result) == FIELDS
    return result


def publish(result: Mapping[str, Any], *, write: bool, folder: Path | None = None) -> None:
    """Print a record, and `save` it if asked to."""
    print(json.dumps(result, indent=1, allow_nan=False), flush=True)
    if write:
        save(result, folder)


def save(result: Mapping[str, Any], folder: Path | None = None) -> None:
    """Write a record to a folder; default: `RESULTS`."""
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result['name']}.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """``n``, ``median``, ``minimum``, ``maximum``, and the samples themselves where they are few."""
    if not samples:
        raise ValueError("there are no samples")
    return {
        "n": len(samples),
        "median": _short(statistics.median(samples)),
        "minimum": _short(min(samples)),
        "maximum": _short(max(samples)),
        "samples": [_short(sample) for sample in samples] if len(samples) <= _MOST_SAMPLES else None,
    }


def ratio_of_medians(
    ours: Sequence[float], theirs: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Median of `ours` over median of `theirs`, and a bootstrap interval of it.

    Args:
        ours: One sample per round.
        theirs: Taken in the same rounds; a round is drawn with both its samples, since both had the same machine.
        confidence: Of the interval.
        resamples: Rounds are drawn anew, with replacement, so many times.
        seed: Of the draws.
    """
    pairs = list(zip(ours, theirs, strict=True))
    generator = random.Random(seed)
    drawn = []
    for _ in range(resamples):
        mine, other = zip(*generator.choices(pairs, k=len(pairs)))
        drawn.append(statistics.median(mine) / statistics.median(other))
    drawn.sort()
    tail = (1.0 - confidence) / 2.0
    return {
        "ratio_of_medians": _short(statistics.median(ours) / statistics.median(theirs)),
        "low": _short(drawn[int(tail * (resamples - 1))]),
        "high": _short(drawn[int((1.0 - tail) * (resamples - 1))]),
        "confidence": confidence,
        "method": f"percentile bootstrap over rounds, {resamples} resamples",
    }


def command(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command of this process as one would type it in the root of the repository, without the machine's folders."""
    script = Path(argv[0]).resolve()
    words = [str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name]
    words += [Path(word).name if os.path.isabs(word) else word for word in argv[1:]]
    if "TORCHELASTIC_RUN_ID" in environment:
        return " ".join(["torchrun --standalone --nproc-per-node", environment["LOCAL_WORLD_SIZE"], *words])
    return " ".join(["python", *words])


def commit() -> str | None:
    """Commit of the code, ``-dirty`` if it was changed since; new results are no change.

    Outside of git it is the variable ``BENCHMARK_COMMIT``, else None.
    """
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCHMARK_COMMIT")
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    """What the run had: processor, cores that it may use, memory in GiB, GPUs."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def _version(package: str) -> str | None:
    if package == "tpcolocate":  # may be imported from the source tree, without being installed
        from tpcolocate import __version__

        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _short(value: float) -> float:
    return float(f"{value:.6g}")
