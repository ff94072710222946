"""How fast a LoRA is added to a model, region by region of staging memory, on one GPU and without a server.

    python benchmarks/adapter_sums.py --record
    python benchmarks/adapter_sums.py --tiles 128x8 128x4 64x8 64x2 32x4 --record    # rows and columns x warps
    python benchmarks/adapter_sums.py --device cpu --shape tiny --kinds steps addmm

What a TP worker reads of every adapted projection is put into stages of ``--stage-mib`` one after the other, as a sync does,
with the device waited for after each:

* ``together``: the kernel of `low_rank`, one launch for a stage;
* ``kernel``: the same, one launch for each region;
* ``addmm``: `torch.addmm`, one for each region (of bfloat16 it rounds twice on some GPUs);
* ``steps``: peft's product, scaling, sum and cast.

A sample of the regions is compared with float64: how much of them is not the exact sum, rounded once.  How long the GPU alone
takes for the first stage is measured with all of its work queued behind a kernel that sleeps.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_common import DTYPE, SHAPES, make_model, write_config
from record import ratio_of_medians, record, save, summary

from tpcolocate.in_server.tpcolocate_receiver.regions import Region
from tpcolocate.weights.plan.sharding import LocalShard, ShardFinder
from tpcolocate.weights.sources import low_rank
from tpcolocate.weights.sources.addition import Addition
from tpcolocate.weights.sources.lazy_tensor import LazyTensor
from tpcolocate.weights.sources.named_weights import NamedWeights

KINDS = ("together", "kernel", "addmm", "steps")
_SLEEP_CYCLES = 20_000_000
"""Some ten milliseconds, in which Python queues a stage."""
Placed = list[tuple[str, Region, int]]
"""Weight, region and first element of what one stage holds."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--stage-mib", type=int, default=256)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--tiles", nargs="+", default=[], help="other tiles of the kernel, for comparison")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--record", action="store_true", help="write the result as JSON")
    parser.add_argument("--results", type=Path, default=None)
    return parser.parse_args()


def by_addmm(additions: Sequence[Addition]) -> None:
    for one in additions:
        torch.addmm(one.base, one.left, one.right, out=one.out)


def adder(kind: str) -> low_rank.Adder | None:
    if kind == "steps":
        return None
    if kind == "addmm":
        return by_addmm
    from tpcolocate.weights.sources.low_rank_kernel import launch

    return launch


def stages_of(weights: dict[str, LazyTensor], num_bytes: int) -> list[Placed]:
    """What the first of two TP workers reads: half of the rows, or of the columns where the engine cuts these."""
    stages: list[Placed] = [[]]
    end = 0
    for name, item in weights.items():
        rows, columns = item.shape
        of_columns = "o_proj" in name or "down_proj" in name
        region = Region((0, 0), (rows, columns // 2) if of_columns else (rows // 2, columns))
        if (end + region.volume) * DTYPE.itemsize > num_bytes and stages[-1]:
            stages.append([])
            end = 0
        stages[-1].append((name, region, end))
        end += region.volume
    return stages


@contextlib.contextmanager
def tile_of(kind: str) -> Iterator[None]:
    """Let the kernel have another tile, where a kind is one."""
    if kind in KINDS:
        yield
        return
    from tpcolocate.weights.sources import low_rank_kernel as kernel

    before = kernel.BLOCK, kernel.NUM_WARPS
    kernel.BLOCK, kernel.NUM_WARPS = map(int, kind.split("x"))
    try:
        yield
    finally:
        kernel.BLOCK, kernel.NUM_WARPS = before


class Way:
    """One way to fill all stages.

    Args:
        kind: See the module; or a tile, for ``together`` with another one.
        model: A peft model.
        stage_bytes: Of staging memory.
        device: Of all.
    """

    def __init__(self, kind: str, model: torch.nn.Module, stage_bytes: int, device: torch.device) -> None:
        self.kind, self.device = kind, device
        self.is_together = kind == "together" or kind not in KINDS
        low_rank.adder_for = lambda _: adder(kind)
        self.weights = {name: item for name, item in NamedWeights.of(model) if isinstance(item, LazyTensor)}
        self.stages = stages_of(self.weights, stage_bytes)
        self.memory = torch.empty(stage_bytes // DTYPE.itemsize, dtype=DTYPE, device=device)
        finder = ShardFinder()
        self.shards: dict[str, LocalShard] = {}
        for name, item in self.weights.items():
            shard = finder.find(item)
            assert shard is not None
            self.shards[name] = shard
        found = [shard.ingredients for shard in self.shards.values() if shard.ingredients is not None]
        self.ingredients = list({id(one): one for one in found}.values())
        self.num_bytes = sum(region.volume for stage in self.stages for _, region, _ in stage) * DTYPE.itemsize

    def run(self) -> tuple[float, float]:
        """Return the seconds in which factors are prepared, and those in which the stages are filled."""
        self.wait()
        started = time.perf_counter()
        for one in self.ingredients:
            one.gather()
        self.wait()
        prepared = time.perf_counter()
        for stage in self.stages:
            self.fill(stage)
            self.wait()
        ended = time.perf_counter()
        for one in self.ingredients:
            one.forget()
        return prepared - started, ended - prepared

    def fill(self, stage: Placed) -> None:
        low_rank.adder_for = lambda _: adder(self.kind)
        with contextlib.ExitStack() as together:
            together.enter_context(tile_of(self.kind))
            for one in self.ingredients if self.is_together else ():
                together.enter_context(one.together())
            for name, region, first in stage:
                compute = self.shards[name].compute
                assert compute is not None
                compute(region, self.memory[first : first + region.volume].view(region.lengths))

    def alone(self) -> float:
        """Return the milliseconds that the GPU takes for the first stage, the least of a few runs."""
        for one in self.ingredients:
            one.gather()
        found = []
        for _ in range(7):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_SLEEP_CYCLES)
            began.record()  # type: ignore[no-untyped-call]
            self.fill(self.stages[0])
            ended.record()  # type: ignore[no-untyped-call]
            self.wait()
            found.append(began.elapsed_time(ended))  # type: ignore[no-untyped-call]
        for one in self.ingredients:
            one.forget()
        return float(min(found))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def wrongly_rounded(self, model: torch.nn.Module) -> float:
        """How much of the last stage is not the exact sum, rounded once."""
        for one in self.ingredients:
            one.gather()
        stage = self.stages[-1]
        self.fill(stage)
        self.wait()
        wrong = total = 0
        for name, region, first in stage[-4:]:
            layer: Any = functools.reduce(getattr, name.removesuffix(".weight").split("."), model.get_base_model())  # type: ignore[operator]
            a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            exact = layer.base_layer.weight.double() + b @ a * layer.scaling["default"]
            rows, columns = region.lengths
            found = self.memory[first : first + region.volume].view(region.lengths)
            wrong += int((found != exact[:rows, :columns].to(DTYPE)).sum())
            total += region.volume
        for one in self.ingredients:
            one.forget()
        return wrong / total


def main() -> None:
    args = parse_args()
    load_before = os.getloadavg()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), args.shape)
        model = make_model(Path(folder), device, 1, lora=args.lora_rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:  # numbers whose products have to be rounded
                parameter.data = torch.randn(parameter.shape, device=device) * 0.05
    ways = {kind: Way(kind, model, args.stage_mib * 2**20, device) for kind in (*args.kinds, *args.tiles)}
    samples: dict[str, list[tuple[float, float]]] = {kind: [] for kind in ways}
    for number in range(args.runs + 2):
        for kind, way in ways.items():
            found = way.run()
            if number >= 2:
                samples[kind].append(found)
    first = next(iter(ways.values()))
    alone = {kind: round(way.alone(), 4) for kind, way in ways.items()} if device.type == "cuda" else {}
    wrong = {kind: round(way.wrongly_rounded(model), 6) for kind, way in ways.items()}
    print(f"{first.num_bytes / 2**20:.0f} MiB in {len(first.stages)} stages, {sum(map(len, first.stages))} regions")
    for kind, of_kind in samples.items():
        prepare, fill = (summary(one) for one in zip(*of_kind))
        rate = first.num_bytes / fill["median"] / 1e9
        print(
            f"{kind:10} prepare {prepare['median'] * 1e3:7.2f} ms, fill {fill['median'] * 1e3:7.2f} ms "
            f"({fill['minimum'] * 1e3:.2f} to {fill['maximum'] * 1e3:.2f}), {rate:6.0f} GB/s written, the GPU alone for a stage "
            f"{alone.get(kind)} ms, rounded wrongly {wrong[kind]:.4f}"
        )
    ours, baseline = args.kinds[0], args.kinds[-1]
    own, theirs = ([a + b for a, b in samples[kind]] for kind in (ours, baseline))
    if args.record:
        save(
            record(
                f"adapter_sums_{args.shape}",
                metric="a LoRA added to all that a TP worker reads, factors prepared and stages filled",
                unit="s",
                samples=own,
                baseline={"what": "peft's product, scaling, sum and cast", **summary(theirs)},
                comparison=ratio_of_medians(own, theirs),
                settings={
                    "shape": args.shape, "lora_rank": args.lora_rank, "stage_mib": args.stage_mib, "mib": first.num_bytes / 2**20,
                    "num_stages": len(first.stages), "num_regions": sum(map(len, first.stages)), "way": ours, "tiles": args.tiles,
                },
                checks={
                    "rounded_wrongly": wrong,
                    "gpu_alone_ms_for_a_stage": alone,
                    "fill_seconds": {kind: summary([b for _, b in of_kind]) for kind, of_kind in samples.items()},
                    "prepare_seconds": {kind: summary([a for a, _ in of_kind]) for kind, of_kind in samples.items()},
                },
                load_before=load_before,
            ),
            args.results,
        )  # fmt: skip


if __name__ == "__main__":
    main()
