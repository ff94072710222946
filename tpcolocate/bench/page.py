"""Results of a bench as one page of text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from tpcolocate.bench.results import Measured, Results, conclusions

_LABEL = 44
_CELL = 26


def render(results: Results) -> str:
    """Return the page."""
    software = ", ".join(f"{name} {version}" for name, version in results.software.items())
    ranks = f"{results.num_ranks} rank{'' if results.num_ranks == 1 else 's'}"
    lines = [f"{results.model}, {results.trainer} on {ranks}, {results.device}", software, ""]
    good = [one for one in results.measured if one.error is None]
    if good:
        lines.append(_row("", [f"tp_size {one.tp_size}" for one in good]))
        lines += [_row(label, [cell(one) for one in good]) for label, cell in _ROWS]
    for tp_size, (equal, of) in results.equal_answers.items():
        lines.append(f"{equal} of {of} greedy answers of tp_size {tp_size} equal those of tp_size {good[0].tp_size}")
    lines.append("")
    lines += [f"* {sentence}" for sentence in conclusions(results)]
    return "\n".join(line.rstrip() for line in lines)


def _row(label: str, cells: Sequence[str]) -> str:
    return f"{label:<{_LABEL}}" + "".join(f"{cell:>{_CELL}}" for cell in cells)


def _milliseconds(samples: Sequence[float]) -> str:
    if not samples:
        return "-"
    median, low, high = (1e3 * value for value in (statistics.median(samples), min(samples), max(samples)))
    return f"{median:.1f} ({low:.1f}-{high:.1f})"


def _common_way(one: Measured) -> str:
    return "not measured" if one.no_common_way is not None else _milliseconds(one.common_way_s)


_ROWS: list[tuple[str, Callable[[Measured], str]]] = [
    ("launch [s]", lambda one: f"{one.launch_s:.1f}"),
    ("first sync [ms]", lambda one: f"{1e3 * one.first_sync_s:.1f}"),
    ("sync, median (range) [ms]", lambda one: _milliseconds(one.sync_s)),
    ("the common way, median (range) [ms]", _common_way),
    ("weights [GiB]", lambda one: f"{one.num_bytes / 2**30:.2f}"),
    ("memory on top of a sync, at most [MiB]", lambda one: f"{one.peak_extra_bytes / 2**20:.0f}"),
    ("memory left beside trainer and server [GiB]",
     lambda one: "-" if one.free_bytes is None else f"{one.free_bytes / 2**30:.1f}"),
    ("a round of generation, median (range) [ms]", lambda one: _milliseconds(one.generate_s)),
    ("tokens per second, all ranks", lambda one: f"{one.tokens_per_second:.0f}"),
]  # fmt: skip

__all__ = ["render"]
