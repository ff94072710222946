"""Draw what `sync_speed.py` recorded: seconds beside the stock push and one copy, and where the time goes.

python benchmarks/plot_speed.py benchmarks/results/sync_speed_*.json --out benchmarks/results/sync_speed.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MODULES = {"plain": "plain module", "fsdp2": "FSDP2, 512 MiB of staging"}
PHASES = ("prepare", "open", "preflight", "lend", "plan", "gather", "export", "push", "settle", "prove", "finish")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def label(record: dict[str, Any]) -> str:
    shared = " (one GPU)" if record["shared_device"] else ""
    return f"{record['shape'].upper()}, tp={record['tp_size']}{shared}"


def draw_seconds(axes: Any, records: list[dict[str, Any]], module: str) -> None:
    """A group of bars per record, with the ratio above it."""
    for i, record in enumerate(records):
        found = record[module]
        # Every GPU moves its share, all at once.
        share = 1 if record["shared_device"] else record["tp_size"]
        bars = {
            "stock push": (found["stock"]["median"], "tab:gray"),
            "ours, proof included": (found["ours"]["seconds"]["median"], "tab:blue"),
            "one copy of the bytes": (record["one_copy"]["median"] / share, "tab:green"),
        }
        for k, (name, (seconds, color)) in enumerate(bars.items()):
            axes.bar(i + (k - 1) * 0.27, seconds * 1e3, 0.25, color=color, label=name if i == 0 else None)
        axes.text(i, found["stock"]["median"] * 1.1e3, f"{found['stock_over_ours']:.1f}x", ha="center")
    axes.set_xticks(range(len(records)), [label(record) for record in records])
    axes.set_yscale("log")
    axes.set_ylim(top=axes.get_ylim()[1] * 3)
    axes.set_ylabel("milliseconds")
    axes.set_title(MODULES[module])
    axes.legend(ncols=3, loc="upper center")


def draw_phases(axes: Any, records: list[dict[str, Any]], module: str) -> None:
    """One stacked bar per record."""
    bottom = [0.0] * len(records)
    for phase in PHASES:
        heights = [record[module]["ours"]["phases_ms"].get(phase, 0.0) for record in records]
        if any(heights):
            axes.bar(range(len(records)), heights, 0.6, bottom=bottom, label=phase)
            bottom = [low + height for low, height in zip(bottom, heights)]
    axes.set_xticks(range(len(records)), [label(record) for record in records])
    axes.set_ylim(top=max(bottom) * 1.25)
    axes.set_ylabel("milliseconds of ours, by phase")
    axes.legend(ncols=4, loc="upper center")


def main() -> None:
    args = parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(path.read_text()) for path in args.records]
    records.sort(key=lambda record: (record["tp_size"], record["shared_device"], record["mib"]))
    figure, grid = pyplot.subplots(2, 2, figsize=(6 + 2 * len(records), 9))
    for column, module in enumerate(MODULES):
        having = [record for record in records if module in record]
        draw_seconds(grid[0][column], having, module)
        draw_phases(grid[1][column], having, module)
    gpus = sorted({record["gpu"] for record in records})
    figure.suptitle(f"Weight syncs into SGLang {', '.join(sorted({r['sglang'] for r in records}))}, {', '.join(gpus)}")
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
