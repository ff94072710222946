"""What generation costs at a larger tp_size: the same ranks, devices and prompts, one server each or one for all.

    torchrun --standalone --nproc-per-node 2 benchmarks/generation_tp.py [--model PATH --device cuda] [--record]
    torchrun --standalone --nproc-per-node 2 benchmarks/generation_tp.py --device cuda --shape 8b --prompts 8 32 \\
        --max-new-tokens 128 --rounds 15 --out result.json

Both kinds of server are up at once and take turns, round by round; every rank generates its own share of the prompts.
One sample is the time until the slowest rank has its answers.  Greedy tokens of both must be equal on the CPU; on GPUs
reductions in another order may change some, so there the equal ones are counted, and beside them those that a server
repeats itself.  With a shape instead of a model the weights are random, and come from the ranks by a sync.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_common
import served
import torch
import torch.distributed as dist
from record import publish, ratio_of_medians, record, summary
from tqdm import tqdm

import tpcolocate

_WARM_UP = 2
_PROMPT_LENGTH = 12


def arguments(args: argparse.Namespace, world: int) -> dict[str, Any]:
    """For every server.  On a GPU with CUDA graphs, of the decode steps alone: capturing prefills takes minutes."""
    if args.device == "cpu":
        return served.SERVER["cpu"]
    most = max(args.prompts) * world
    chosen = gpu_common.SERVER | {"max_total_tokens": max(2 * most * (_PROMPT_LENGTH + args.max_new_tokens), 16384)}  # fmt: skip
    if not args.no_cuda_graph:
        del chosen["disable_cuda_graph"]
        chosen |= {"cuda_graph_max_bs": most, "disable_piecewise_cuda_graph": True}
    return chosen | (gpu_common.DUMMY if args.shape is not None else {})


@contextmanager
def folder_of(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the model to serve and its description for a record."""
    if args.shape is None:
        with served.checkpoint(args.model) as (path, model):
            yield path, model
        return
    with tempfile.TemporaryDirectory(prefix="tpcolocate-benchmark-") as folder:  # rank 0's is the one
        path = served.gather_all(folder)[0]
        if dist.get_rank() == 0:
            gpu_common.write_config(Path(path), args.shape)
        dist.barrier()
        yield path, {"model": f"random Qwen3 of the shape {args.shape}, vocabulary {gpu_common.VOCABULARY}"}
        dist.barrier()  # rank 0 removes the folder


def equal_weights(path: str, device: torch.device, engines: list[tpcolocate.Engine]) -> None:
    """Random weights of a server depend on its tp_size: the ranks' take their place."""
    model = gpu_common.make_model(Path(path), device, seed=1)
    for engine in engines:
        engine.sync_weights(model)
    del model
    torch.cuda.empty_cache()


def shares(num_ranks: int, per_rank: int) -> list[list[list[int]]]:
    """Rank -> its prompts."""
    prompts = [[(17 * i + 3 * j + 2) % 500 for j in range(_PROMPT_LENGTH)] for i in range(num_ranks * per_rank)]
    return [prompts[rank::num_ranks] for rank in range(num_ranks)]


def same_tokens(first: list[list[int]], second: list[list[int]]) -> dict[str, int]:
    """Answers that are equal, and tokens before the first that is not."""
    before = 0
    for mine, other in zip(first, second):
        before += next((i for i, (a, b) in enumerate(zip(mine, other)) if a != b), min(len(mine), len(other)))
    return {"answers": sum(a == b for a, b in zip(first, second)), "tokens": before}


def added(counts: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(one[name] for one in counts) for name in counts[0]}


def measured(
    args: argparse.Namespace, engines: dict[str, tpcolocate.Engine], prompts: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """The record of one number of prompts."""
    rank, world, load = dist.get_rank(), dist.get_world_size(), os.getloadavg()
    params = {"temperature": 0, "max_new_tokens": args.max_new_tokens, "ignore_eos": True}
    mine = shares(world, prompts)[rank]
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    first: dict[str, list[list[int]]] = {}
    last: dict[str, list[list[int]]] = {}
    for number in tqdm(range(_WARM_UP + args.rounds), disable=None if rank == 0 else True):
        for name in engines if number % 2 else reversed(engines):
            dist.barrier()
            started = time.perf_counter()
            answers = engines[name].generate(mine, params)
            elapsed = max(served.gather_all(time.perf_counter() - started))
            last[name] = [answer["output_ids"] for answer in answers]
            first.setdefault(name, last[name])
            if number >= _WARM_UP:
                seconds[name].append(elapsed)
    alone, over_all = engines
    equal = added(served.gather_all(same_tokens(last[alone], last[over_all])))
    if args.device == "cpu" and args.shape is None and equal["answers"] != world * prompts:
        raise SystemExit(f"{equal['answers']} of {world * prompts} answers are equal; the figures mean nothing")
    checks = {"equal_answers": equal["answers"], "of": world * prompts}
    if args.device == "cuda":
        checks |= {"equal_tokens": equal["tokens"], "of_tokens": world * prompts * args.max_new_tokens}
        for name in engines:
            checks[f"equal_tokens_of_{name.replace(' ', '_')}_in_first_and_last_round"] = added(
                served.gather_all(same_tokens(first[name], last[name]))
            )["tokens"]
    name = f"generation_tp{world}_against_tp1_{args.device}"
    name += "" if args.shape is None else f"_{args.shape.replace('.', '_')}"
    name += "" if len(args.prompts) == 1 else f"_{world * prompts}_prompts"
    return record(
        name,
        metric=f"all ranks' prompts generated by one server over {world} devices",
        unit="s",
        samples=seconds[over_all],
        baseline={"what": f"{world} servers on a device each, the same prompts", **summary(seconds[alone])},
        comparison=ratio_of_medians(seconds[over_all], seconds[alone]),
        checks=checks,
        settings=settings | {
            "device": args.device, "ranks": world, "prompts_per_rank": prompts, "max_new_tokens": args.max_new_tokens,
            "rounds": args.rounds,
        },
        load_before=load,
    )  # fmt: skip


def main() -> None:
    parser = served.parser(__doc__)
    parser.add_argument("--shape", choices=gpu_common.SHAPES, default=None, help="random weights instead of a model")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--prompts", type=int, nargs="+", default=[8], help="of every rank; a record for each")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--no-cuda-graph", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="all records in one file, written anew after each")
    parser.add_argument("--server-log", type=Path, default=None)
    args = parser.parse_args()
    rank = served.join_ranks()
    world = dist.get_world_size()
    device = served.train_device(args.device)
    server = arguments(args, world)
    records = []

    def log(name: str) -> Path | None:
        return None if args.server_log is None else args.server_log.with_name(f"{args.server_log.stem}-{name}.log")

    with (
        folder_of(args) as (path, model),
        tpcolocate.init(1, device=device) as alone,
        tpcolocate.init(world, device=device) as together,
        alone.launch(path, log_path=log(f"tp1-{rank}"), **server) as one_each,
        together.launch(path, log_path=log(f"tp{world}"), **server) as one_for_all,
    ):
        if args.shape is not None:
            equal_weights(path, device, [one_each, one_for_all])
        for prompts in args.prompts:
            engines = {"tp_size 1": one_each, f"tp_size {world}": one_for_all}
            found = measured(args, engines, prompts, model | {"server_arguments": server})
            if rank == 0:
                publish(found, write=args.record)
                records.append(found)
                if args.out is not None:
                    args.out.write_text(json.dumps(records, indent=1))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
