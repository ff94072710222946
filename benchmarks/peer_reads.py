"""How fast the receiver's copy program reads its own GPU and others, and in which order it should.

    torchrun --standalone --nproc-per-node 2 benchmarks/peer_reads.py --record
    torchrun --standalone --nproc-per-node 4 benchmarks/peer_reads.py --own-gpu-alone --record
    torchrun --standalone --nproc-per-node 2 benchmarks/peer_reads.py --num-warps 4 8 16 --tiles 4096 8192 16384

Every rank exports memory of its GPU to every other, as a sync does, and all ranks read at once with `CopyProgram`: one launch
that copies, reads back and sums up.  There is no server.  With ``--own-gpu-alone`` every process sees no GPU but its own.

``own``
    All of it from the own GPU.
``half``
    One half from the own GPU, the other from the next rank's.
``sixth``
    One sixth from the next rank's GPU: what a TP worker of an 8B model under FSDP2 has on two ranks.
``peer``
    All of it from the next rank's GPU.
``even``
    An equal part from each GPU, the own first and then going round.

A sample is the time on the GPU of one run; GB/s are of what is read, and of the slowest reader.  Contents and sums are compared
with what torch computes, without the mapping.  ``--device cpu`` tries the script with shared memory, without kernels.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from record import publish, ratio_of_medians, record, summary
from served import gather_all

from tpcolocate import ipc_payload
from tpcolocate.in_server.tpcolocate_receiver import kernel_tables, kernels
from tpcolocate.in_server.tpcolocate_receiver.checksums import word_sum
from tpcolocate.in_server.tpcolocate_receiver.copy_program import CopyProgram
from tpcolocate.in_server.tpcolocate_receiver.handles import open_handle

PATTERNS = ("own", "half", "sixth", "peer", "even")
ORDERS = ("sequential", "interleaved")
SOURCES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TARGET = torch.bfloat16
SLICE = 4 * 2**20
"""Elements of a slice, 8 MiB as they are written."""
NUM_SUMS = 16
COMPILE_S = 60.0
DEADLINE_S = 300.0


class Case(NamedTuple):
    """What is measured at once."""

    source: str
    pattern: str
    order: str
    num_warps: int
    tile: int


class Share(NamedTuple):
    """Elements that a reader reads from one rank; they lie at the same place in its memory and in the target."""

    holder: int
    first: int
    count: int


class Targets:
    """Stands in for a `CopyPlan`: a flat target, cut into slices."""

    def __init__(self, flat: torch.Tensor) -> None:
        self._flat = flat

    def target(self, name: str, number: int) -> torch.Tensor:
        first, count = map(int, name.split("+"))
        return self._flat[first : first + count]

    def write_constants(self, names: Sequence[str]) -> None:
        pass


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--mib", type=int, default=2048, help="that each rank writes, in a run")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--num-warps", nargs="+", type=int, default=[8])
    parser.add_argument("--tiles", nargs="+", type=int, default=[kernel_tables.TILE], help="in words")
    parser.add_argument("--own-gpu-alone", action="store_true", help="hide the other GPUs from each rank")
    parser.add_argument("--record", action="store_true", help="write the result as JSON")
    return parser.parse_args()


def shares_of(pattern: str, rank: int, world: int, count: int) -> list[Share]:
    """What a rank reads, in the order in which a trainer would list it."""
    following = (rank + 1) % world
    parts = {
        "own": [(rank, 1)],
        "half": [(rank, 1), (following, 1)],
        "sixth": [(rank, 5), (following, 1)],
        "peer": [(following, 1)],
        "even": [((rank + i) % world, 1) for i in range(world)],
    }[pattern]
    total = sum(part for _, part in parts)
    found, first, done = [], 0, 0
    for holder, part in parts:
        done += part
        # Whole pairs of words in every dtype, at every start.
        end = count * done // total // 64 * 64
        found.append(Share(holder, first, end - first))
        first = end
    return found


def values(holder: int, first: int, count: int, source: torch.dtype, device: torch.device) -> torch.Tensor:
    """What a rank's memory holds there."""
    index = torch.arange(first, first + count, device=device)
    return ((index * 7919 + holder * 104729) % 65521).to(torch.float32).div(64).sub(500).to(source)


def chunks(share: Share) -> Iterator[tuple[int, int]]:
    for first in range(share.first, share.first + share.count, SLICE):
        yield first, min(SLICE, share.first + share.count - first)


def slices_of(shares: Sequence[Share], source: str) -> list[list[Any]]:
    slices: list[list[Any]] = []
    for share in shares:
        for first, count in chunks(share):
            number = len(slices)
            start = first * SOURCES[source].itemsize
            where = [f"{first}+{count}", 0, None, None, f"r{share.holder}/flat", start, source, [1]]
            slices.append([*where, number % NUM_SUMS, 2 * number + 1])
    return slices


def is_right(shares: Sequence[Share], source: str, target: torch.Tensor, sums: Sequence[int]) -> bool:
    """Whether target and sums are those of the values of the ranks."""
    expected = torch.zeros(NUM_SUMS, dtype=torch.int64, device=target.device)
    number, equal = 0, True
    for share in shares:
        for first, count in chunks(share):
            one = values(share.holder, first, count, SOURCES[source], target.device).to(TARGET)
            equal = equal and torch.equal(one, target[first : first + count])
            expected[number % NUM_SUMS] += word_sum(one) * (2 * number + 1)
            number += 1
    return equal and expected.tolist() == list(sums)


def mapped(flat: torch.Tensor, device: torch.device) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Memory of all ranks, as regions; and this rank's exports."""
    rank, world = dist.get_rank(), dist.get_world_size()
    exports = [None if k == rank else ipc_payload.export_storage(flat.untyped_storage()) for k in range(world)]
    of_ranks = gather_all([None if one is None else one.describe() for one in exports])
    regions = {f"r{rank}/flat": flat}
    for holder, handles in enumerate(of_ranks):
        if holder != rank:
            regions[f"r{holder}/flat"] = open_handle(handles[rank], device)
    return regions, exports


def measure(
    case: Case, regions: Mapping[str, torch.Tensor], target: torch.Tensor, runs: int
) -> tuple[list[float], bool, bool]:
    """Seconds of each run on this rank, whether all was right, and whether the kernels did all of it."""
    from tpcolocate.in_server.tpcolocate_receiver import triton_kernel

    shares = shares_of(case.pattern, dist.get_rank(), dist.get_world_size(), target.numel())
    kernel_tables.TILE, triton_kernel.NUM_WARPS = case.tile, case.num_warps
    plan: Any = Targets(target)
    program = CopyProgram(NUM_SUMS, slices_of(shares, case.source), plan, order=case.order)
    mine = {name: regions[name] for name in program.regions}
    target.zero_()
    program.run(plan, mine, keep_views=True)  # compiles, where warps and tiles are other ones
    times, sums, how = [], [0], set()
    for _ in range(runs):
        dist.barrier()
        sums, seconds = program.run(plan, mine, keep_views=True)
        times.append(sum(seconds.values()))
        how.update(seconds)
    return times, is_right(shares, case.source, target, sums), how == {"one_pass"}


def main() -> None:
    args = parse_args()
    faulthandler.dump_traceback_later(DEADLINE_S, exit=True)
    load = os.getloadavg()
    local_rank = int(os.environ["LOCAL_RANK"])
    if args.own_gpu_alone and args.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        # Of this process alone, and before CUDA looks.
        os.environ["CUDA_VISIBLE_DEVICES"] = str(local_rank) if visible is None else visible.split(",")[local_rank]
        local_rank = 0
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", local_rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        kernels.prepare(device)
        kernels.wait_until_prepared(device, timeout_s=COMPILE_S)
    started = time.monotonic()
    count = args.mib * 2**20 // TARGET.itemsize
    widest = max(SOURCES[source].itemsize for source in args.sources)
    flat = ipc_payload.allocate(count * widest, device)
    target = torch.zeros(count, dtype=TARGET, device=device)
    regions, exports = mapped(flat, device)
    if rank == 0:
        gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        print(
            f"{world} ranks, each sees {gpus} GPUs; {args.mib} MiB are written per rank; GB/s read, per reader",
            flush=True,
        )
        print(
            "| source | pattern | order | warps | tile | slowest | fastest | own time | right | kernels |\n"
            + "|---" * 10
            + "|"
        )
    table: list[dict[str, Any]] = []
    samples: dict[Case, list[float]] = {}
    for source in args.sources:
        typed = flat.view(SOURCES[source])
        for first in range(0, count, SLICE):
            typed[first : first + SLICE] = values(rank, first, min(SLICE, count - first), SOURCES[source], device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dist.barrier()
        for pattern, *rest in itertools.product(args.patterns, args.orders, args.num_warps, args.tiles):
            case = Case(source, pattern, *rest)
            of_ranks = gather_all(measure(case, regions, target, args.runs))
            # All ranks read at once: a run takes as long as its slowest reader.
            samples[case] = [max(times) for times in zip(*(times for times, *_ in of_ranks))]
            num_bytes = count * SOURCES[source].itemsize
            speeds = [num_bytes / statistics.median(times) / 1e9 for times, *_ in of_ranks]
            table.append(
                {
                    **case._asdict(),
                    "gb_per_s_of_each_reader": [round(speed, 1) for speed in speeds],
                    "median_s": statistics.median(samples[case]),
                    "right": all(right for _, right, _ in of_ranks),
                    "by_kernels_alone": all(alone for *_, alone in of_ranks),
                }
            )
            if rank == 0:
                cells = [*case, f"{min(speeds):.0f}", f"{max(speeds):.0f}", f"{table[-1]['median_s'] * 1e3:.2f} ms"]
                print(
                    "| " + " | ".join(map(str, [*cells, table[-1]["right"], table[-1]["by_kernels_alone"]])) + " |",
                    flush=True,
                )
    regions.clear()
    dist.barrier()  # no rank frees what another has mapped
    released = all(gather_all(all(one is None or one.count() == 0 for one in exports)))
    if rank == 0:
        report(args, world, samples, table, released, time.monotonic() - started, load)
    dist.destroy_process_group()


def report(
    args: argparse.Namespace,
    world: int,
    samples: Mapping[Case, list[float]],
    table: list[dict[str, Any]],
    released: bool,
    seconds: float,
    load: Sequence[float],
) -> None:
    """Publish the record: the last pattern of the first source in the last order, compared with the first order."""
    cases = [case for case in samples if (case.source, case.pattern) == (args.sources[0], args.patterns[-1])]
    ours = next(case for case in cases if case.order == args.orders[-1])
    other = next(case for case in cases if case.order == args.orders[0])
    right = [row["right"] for row in table]
    publish(
        record(
            f"peer_reads_{world}_{args.device}" + ("_own_gpu_alone" if args.own_gpu_alone else ""),
            metric=f"slowest reader of one copy program, {ours.pattern} from {ours.source}, {ours.order}",
            unit="s",
            samples=samples[ours],
            baseline={"what": f"the same, {other.order}", **summary(samples[other])},
            comparison={"orders": ratio_of_medians(samples[ours], samples[other]), "cases": table},
            checks={"contents_and_sums": right.count(True), "of": len(right), "all_exports_released": released},
            settings={
                "ranks": world,
                "device": args.device,
                "mib": args.mib,
                "own_gpu_alone": args.own_gpu_alone,
                "seconds_in_all": round(seconds, 1),
            },
            load_before=load,
        ),
        write=args.record,
    )
    if not (all(right) and released):
        raise SystemExit("what was read is not what is there")


if __name__ == "__main__":
    main()
