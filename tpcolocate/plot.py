"""Figures of what `Recorder` has recorded, of sync reports, and of a bench.  Needs matplotlib, as in the extra ``plot``."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tpcolocate.checks import check_type
from tpcolocate.errors import ConfigError, shown
from tpcolocate.recorder import Recording, find_waits
from tpcolocate.report import SyncReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinguishable with the common kinds of colour blindness (Okabe and Ito), then paler ones.
_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C", "#F0E442",
    "#7FB8D8", "#F2CF80", "#80CEB9", "#E5BCD3", "#ABD9F4", "#EAAE80", "#C5C5C5",
)  # fmt: skip
_WAIT_COLOUR, _WAIT_EDGE = "#F0F0F0", "#9A9A9A"
_TRAINER, _OTHERS = "#5B7C99", "#D9B98A"
_CENTRED: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
_ROW_IN, _MARGIN_IN, _WIDTH_IN = 0.42, 1.5, 10.0
_ONE = "a Recording, as Recorder.recording is and Recording.load() returns"
_LIST = f"a list of which each is {_ONE}"
# Text is drawn into bars of at least this part of the width.
_TEXT_FROM = 0.07


def timeline(recordings: Recording | Sequence[Recording]) -> Figure:
    """Draw who did what when, one row per rank; time in which a rank waited for another one is hatched.

    Args:
        recordings: Of any ranks, of one host or of hosts with synchronised clocks; or of one rank.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.

    Raises:
        ConfigError: No spans, no recordings, or matplotlib is missing.
    """
    given = (
        [recordings]
        if isinstance(recordings, Recording)
        else check_type("recordings", recordings, Sequence, expected=_LIST)
    )
    recordings = sorted(
        (check_type("a recording", each, Recording, expected=_ONE) for each in given),
        key=lambda recording: (min(recording.slice_ranks), recording.rank),
    )
    spans = [span for recording in recordings for span in recording.spans]
    if not spans:
        raise ConfigError("the recordings have no spans", hint="record some with Recorder.span()")
    origin, last = min(span.begin for span in spans), max(span.end for span in spans)
    colours = _colours(span.name for span in sorted(spans, key=lambda span: span.begin))
    figure, axes = _figure(len(recordings))
    rows = {recording.rank: row for row, recording in enumerate(recordings)}
    width = last - origin
    for recording in recordings:
        for span in recording.spans:
            bar = (span.begin - origin, span.end - span.begin)
            axes.broken_barh(
                [bar], (rows[recording.rank] - 0.36, 0.72), facecolors=colours[span.name], edgecolor="white"
            )
    for wait in find_waits(recordings):
        row, begin, length = rows[wait.rank], wait.begin - origin, wait.end - wait.begin
        axes.broken_barh(
            [(begin, length)],
            (row - 0.36, 0.72),
            facecolors=_WAIT_COLOUR,
            edgecolor=_WAIT_EDGE,
            hatch="////",
            linewidth=0.5,
        )
        if length > _TEXT_FROM * width:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
            axes.text(begin + length / 2, row, f"waits for {wait.for_rank}", bbox=box, **_CENTRED)
    for row, (above, below) in enumerate(zip(recordings, recordings[1:])):
        if set(above.slice_ranks) != set(below.slice_ranks):
            axes.axhline(row + 0.5, color="black", linewidth=0.8)
    axes.set_yticks(list(rows.values()), [f"rank {rank}" for rank in rows])
    axes.set(xlabel="seconds", xlim=(0, width * 1.005), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _legend(figure, [*colours.items()], hatched="waits for another rank" if find_waits(recordings) else None)
    return figure


def memory(recording: Recording) -> Figure:
    """Draw the memory of one rank's device, with what the rank did in the background.

    Args:
        recording: Of one rank.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.

    Raises:
        ConfigError: No samples, no recording, or matplotlib is missing.
    """
    check_type("recording", recording, Recording, expected=_ONE)
    if not recording.memory:
        raise ConfigError("the recording has no samples of memory", hint="record spans with Recorder.span()")
    figure, axes = _figure(6)
    origin = recording.memory[0].at
    times = [sample.at - origin for sample in recording.memory]
    trainer = [sample.trainer_bytes / 2**30 for sample in recording.memory]
    used = [max((sample.used_bytes or 0) / 2**30, own) for sample, own in zip(recording.memory, trainer)]
    total = (recording.memory[0].total_bytes or 0) / 2**30
    height = max(total, *used) * 1.25
    width = max(times[-1], *(span.end - origin for span in recording.spans), 1e-9)
    on_gpu = recording.memory[0].used_bytes is not None
    what = "trainer (reserved by torch)" if on_gpu else "trainer (resident memory)"
    axes.fill_between(times, trainer, color=_TRAINER, linewidth=0, label=what)
    if on_gpu:
        axes.fill_between(times, trainer, used, color=_OTHERS, linewidth=0, label="server and other processes")
        axes.axhline(total, color="black", linestyle="--", linewidth=1, label=f"device, {total:.0f} GiB")
    axes.plot(times, used, color="#333333", linewidth=1, marker="o", markersize=3, label="sampled")
    colours = _colours(span.name for span in sorted(recording.spans, key=lambda span: span.begin))
    for span in recording.spans:
        # A strip at the top: behind the areas its colours would mix with theirs.
        bar = (span.begin - origin, span.end - span.begin)
        strip = (height * 0.91, height * 0.09)
        axes.broken_barh([bar], strip, facecolors=colours[span.name], edgecolor="white")
        axes.axvline(bar[0], color="#BBBBBB", linewidth=0.6, zorder=0)
        if bar[1] > _TEXT_FROM * width:
            axes.text(bar[0] + bar[1] / 2, height * 0.955, span.name, color=_ink(colours[span.name]), **_CENTRED)
    axes.set(xlabel="seconds", ylabel="GiB", xlim=(0, width * 1.005), ylim=(0, height))
    axes.set_title(f"Memory of rank {recording.rank}", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False, fontsize=9)
    _legend(figure, [*colours.items()])
    return figure


def sync(report: SyncReport) -> Figure:
    """Draw the phases of one sync, one row per rank, in milliseconds.

    Args:
        report: From `Engine.sync_weights`.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.

    Raises:
        ConfigError: No report, or matplotlib is missing.
    """
    check_type("report", report, SyncReport, expected="what sync_weights() has returned")
    figure, axes = _figure(len(report.ranks))
    colours = _colours(phase for part in report.ranks for phase in part.seconds)
    longest = max(sum(part.seconds.values()) for part in report.ranks) * 1e3
    for row, part in enumerate(report.ranks):
        begin = 0.0
        for phase, seconds in part.seconds.items():
            length = seconds * 1e3
            axes.barh(row, length, left=begin, height=0.72, color=colours[phase], edgecolor="white")
            if length > _TEXT_FROM * longest:
                axes.text(begin + length / 2, row, f"{length:.1f}", color=_ink(colours[phase]), **_CENTRED)
            begin += length
    axes.set_yticks(range(len(report.ranks)), [f"rank {part.rank}" for part in report.ranks])
    title = f"version {report.weight_version}: {report.num_bytes / 2**30:.2f} GiB in {report.seconds * 1e3:.1f} ms"
    axes.set(xlabel="milliseconds, phases one after another", xlim=(0, max(longest, 1e-9) * 1.02))
    axes.set_ylim(len(report.ranks) - 0.5, -0.5)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _legend(figure, [*colours.items()])
    return figure


def bench(results: Mapping[str, Any]) -> Figure:
    """Draw what ``python -m tpcolocate bench --json FILE`` has written: each sample, and the median as a bar.

    Args:
        results: The content of the file.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.

    Raises:
        ConfigError: Nothing was measured, or matplotlib is missing.
    """
    if not isinstance(results, Mapping) or "measured" not in results:
        raise ConfigError(
            f"results must be the content of a file of bench, got {shown(results)}",
            hint="json.loads(Path(FILE).read_text())",
        )
    measured = [one for one in results["measured"] if one["error"] is None]
    if not measured:
        raise ConfigError("no size of the server was measured", hint="see the errors in the file")
    figure = _empty_figure(_MARGIN_IN + 6 * _ROW_IN)
    syncs, tokens = figure.subplots(1, 2)
    names = [f"tp_size {one['tp_size']}" for one in measured]
    kinds = [("this library", "sync_s", _COLOURS[0])]
    if any(one["common_way_s"] for one in measured):
        kinds.append(("gathered tensors, SGLang's buckets", "common_way_s", _COLOURS[1]))
    width = 0.8 / len(kinds)
    for number, (_, key, colour) in enumerate(kinds):
        for row, one in enumerate(measured):
            _bar(syncs, row + (number - (len(kinds) - 1) / 2) * width, width, [1e3 * s for s in one[key]], colour)
    for row, one in enumerate(measured):
        _bar(tokens, row, 0.5, [one["num_tokens"] / seconds for seconds in one["generate_s"]], _COLOURS[2])
    for axes, label in ((syncs, "milliseconds"), (tokens, "tokens per second, all ranks")):
        axes.set_xticks(range(len(names)), names)
        axes.set(ylabel=label, xlim=(-0.6, len(names) - 0.4))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    syncs.set_title("Weight sync", fontsize=10)
    tokens.set_title("Generation", fontsize=10)
    ranks = f"{results['num_ranks']} rank{'' if results['num_ranks'] == 1 else 's'}"
    model = os.path.basename(results["model"].rstrip("/"))
    figure.suptitle(f"{model}, {results['trainer']} on {ranks}, {results['device']}", fontsize=10)
    _legend(figure, [(name, colour) for name, _, colour in kinds], where="outside lower left")
    return figure


def _bar(axes: Any, x: float, width: float, samples: Sequence[float], colour: str) -> None:
    if not samples:
        return
    median = statistics.median(samples)
    axes.bar(x, median, width=0.9 * width, color=colour)
    axes.plot([x] * len(samples), samples, color="black", marker="_", linestyle="none", markersize=8)
    axes.annotate(
        f"{median:,.0f}" if median >= 1000 else f"{median:.3g}",
        (x, max(samples)),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )


def _figure(num_rows: int) -> tuple[Figure, Any]:
    figure = _empty_figure(_MARGIN_IN + _ROW_IN * num_rows)
    return figure, figure.subplots()


def _empty_figure(height_in: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("figures need matplotlib", hint="pip install matplotlib") from error
    # Not by pyplot, which keeps figures and chooses a backend for the whole process.
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def _colours(names: Iterable[str]) -> dict[str, str]:
    """Give each name a colour, in the order of their first appearance."""
    return {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(dict.fromkeys(names))}


def _ink(colour: str) -> str:
    """Return the colour of text that is legible on another one."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _legend(
    figure: Figure, colours: list[tuple[str, str]], *, hatched: str | None = None, where: Any = "outside upper left"
) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, label=name) for name, colour in colours]
    if hatched is not None:
        patches.append(Patch(facecolor=_WAIT_COLOUR, edgecolor=_WAIT_EDGE, hatch="////", label=hatched))
    figure.legend(handles=patches, loc=where, ncols=min(len(patches), 8), frameon=False, fontsize=9)


__all__ = ["bench", "memory", "sync", "timeline"]
