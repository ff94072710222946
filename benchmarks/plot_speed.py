"""Draw the records of `sync_speed.py`: seconds beside the stock push and one copy, and where the time goes.

python benchmarks/plot_speed.py --out benchmarks/results/sync_speed.png
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from record import RESULTS

MODULES = {
    "plain": "plain module",
    "fsdp2": "FSDP2",
    "lora": "LoRA on a plain module",
    "fsdp2_lora": "LoRA under FSDP2",
}
PHASES = (
    "prepare", "open", "preflight", "trace", "map", "lend", "plan", "gather", "export", "push", "release", "settle", "verify", "prove",
    "finish",
)  # fmt: skip
"""In the order of a sync; former names too, which older records have."""


def label(record: dict[str, Any]) -> str:
    settings = record["settings"]
    ranks = settings.get("training_ranks", settings["tp_size"])
    apart = f"\n{ranks} ranks" if ranks != settings["tp_size"] else ""
    return f"{settings['shape'].upper()}\ntp={settings['tp_size']}{apart}"


def size(record: dict[str, Any]) -> tuple[float, int, int]:
    """To sort by."""
    settings = record["settings"]
    billions = float(settings["shape"].partition("b")[0])
    return billions, settings.get("training_ranks", settings["tp_size"]), settings["tp_size"]


def records_of(module: str) -> list[dict[str, Any]]:
    """The records of repeated syncs of one kind of module, of each shape and layout of ranks the current one."""
    name = re.compile(rf"sync_speed_[^_]+_tp\d+(_\d+_ranks)?_{module}")
    found = [json.loads(path.read_text()) for path in RESULTS.glob("sync_speed_*.json") if name.fullmatch(path.stem)]
    return sorted(found, key=size)


def draw_seconds(axes: Any, records: list[dict[str, Any]], module: str) -> None:
    """A group of bars per record, with the ratio above it."""
    for i, record in enumerate(records):
        bars = {
            "stock push": (record["baseline"]["median"], "tab:gray"),
            "ours, verification included": (record["median"], "tab:blue"),
            "one copy of the model on one GPU": (record["checks"]["one_copy_seconds"]["median"], "tab:green"),
        }
        for k, (name, (seconds, color)) in enumerate(bars.items()):
            axes.bar(i + (k - 1) * 0.27, seconds * 1e3, 0.25, color=color, label=name if i == 0 else None)
        ratio = record["comparison"]["stock_over_ours"]
        axes.text(i, record["baseline"]["median"] * 1.1e3, f"{ratio:.1f}x", ha="center")
    axes.set_xticks(range(len(records)), [label(record) for record in records])
    axes.set_yscale("log")
    axes.set_ylim(top=axes.get_ylim()[1] * 8)
    axes.set_ylabel("milliseconds")
    axes.set_title(MODULES[module])
    axes.legend(fontsize="small", loc="upper left")


def draw_phases(axes: Any, records: list[dict[str, Any]]) -> None:
    """One stacked bar per record."""
    from matplotlib import colormaps

    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    bottom = [0.0] * len(records)
    for number, phase in enumerate(PHASES):
        heights = [record["checks"]["phases_ms"].get(phase, 0.0) for record in records]
        if any(heights):
            axes.bar(
                range(len(records)),
                heights,
                0.6,
                bottom=bottom,
                label=phase,
                color=colors[number],
            )
            bottom = [low + height for low, height in zip(bottom, heights)]
    axes.set_xticks(range(len(records)), [label(record) for record in records])
    axes.set_ylim(top=max(bottom) * 1.3)
    axes.set_ylabel("milliseconds of ours, by phase")
    axes.legend(fontsize="small", ncols=3, loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {module: records for module in MODULES if (records := records_of(module))}
    figure, grid = pyplot.subplots(2, len(shown), figsize=(6 * len(shown), 9), squeeze=False)
    gpus, releases = set(), set()
    for column, (module, records) in enumerate(shown.items()):
        draw_seconds(grid[0][column], records, module)
        draw_phases(grid[1][column], records)
        gpus |= {gpu for record in records for gpu in record["hardware"]["gpus"]}
        releases |= {record["versions"]["sglang"] for record in records}
    figure.suptitle(f"Weight syncs into SGLang {', '.join(sorted(releases))} on {', '.join(sorted(gpus))}")
    figure.tight_layout()
    figure.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()
