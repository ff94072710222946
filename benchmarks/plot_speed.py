"""Draw the records of `sync_speed.py`: seconds beside the stock push and one copy, and where the time goes.

python benchmarks/plot_speed.py --out benchmarks/results/sync_speed.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from record import RESULTS

MODULES = {"plain": "plain module", "fsdp2": "FSDP2, 512 MiB of staging memory"}
PHASES = ("prepare", "open", "preflight", "lend", "plan", "gather", "export", "push", "settle", "prove", "finish")


def label(record: dict[str, Any]) -> str:
    settings = record["settings"]
    return f"{settings['shape'].upper()}\ntp={settings['tp_size']}"


def size(record: dict[str, Any]) -> tuple[float, int]:
    """To sort by."""
    return float(record["settings"]["shape"].rstrip("b")), record["settings"]["tp_size"]


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
                color=f"C{number}" if number < 10 else "black",
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

    figure, grid = pyplot.subplots(2, 2, figsize=(12, 9))
    gpus, releases = set(), set()
    for column, module in enumerate(MODULES):
        records = [json.loads(path.read_text()) for path in RESULTS.glob(f"sync_speed_*_{module}.json")]
        records.sort(key=size)
        draw_seconds(grid[0][column], records, module)
        draw_phases(grid[1][column], records)
        gpus |= {gpu for record in records for gpu in record["hardware"]["gpus"]}
        releases |= {record["versions"]["sglang"] for record in records}
    figure.suptitle(f"Weight syncs into SGLang {', '.join(sorted(releases))} on {', '.join(sorted(gpus))}")
    figure.tight_layout()
    figure.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()
