"""``python -m tpcolocate bench``: what a sync and generation cost with a model of the user's, at each size of the server."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from tpcolocate import plot
from tpcolocate._version import __version__
from tpcolocate.bench.measure import Answers, Workload, gather_all, measure, num_steps
from tpcolocate.bench.page import render
from tpcolocate.bench.results import Measured, Results
from tpcolocate.deadline import check_timeout
from tpcolocate.errors import ConfigError, TpColocateError

# Of the memory that the trainer leaves: the rest is for CUDA graphs, NCCL and activations of SGLang.
_SERVERS_SHARE = 0.8
# A rank whose server is ready waits for one whose server takes all of its time, and is ended then.
_LATE_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument("--model", required=True, metavar="PATH", help="checkpoint, as for SGLang and transformers")
    parser.add_argument(
        "--tp-sizes",
        type=int,
        nargs="+",
        default=None,
        metavar="N",
        help="sizes to compare (default: 1 and the largest)",
    )
    parser.add_argument("--trainer", choices=("plain", "fsdp2"), default=None, help="default: fsdp2 with several ranks")
    parser.add_argument("--prompts", type=int, default=16, metavar="N", help="of each rank in a round (default: 16)")
    parser.add_argument("--prompt-length", type=int, default=64, metavar="N", help="in tokens (default: 64)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of each answer (default: 128)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="samples of each figure (default: 7)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=None, help="default: cuda where there is one")
    parser.add_argument(
        "--server-args", type=_json_object, default={}, metavar="JSON", help="more arguments of SGLang, as for launch()"
    )
    parser.add_argument("--launch-timeout", type=float, default=600.0, metavar="S", help="in seconds (default: 600)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="draw them (needs matplotlib)")


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError('not a JSON object such as {"mem_fraction_static": 0.5}')
    return content


def run(options: argparse.Namespace) -> int:
    """Measure, and print the result on rank 0.

    Collective: over the ranks that torchrun started, or this process alone.

    Returns:
        1 if no size could be measured, otherwise 0, the same on all ranks; 1 on rank 0 if it cannot write a file.
    """
    device = _device(options.device)
    with _group(device, options.launch_timeout):
        rank = dist.get_rank() if dist.is_initialized() else 0
        try:
            results = _results(options, device, rank)
        except (TpColocateError, OSError) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        if rank == 0:
            print(render(results))
            try:
                _write(results, options)
            except (TpColocateError, OSError) as error:
                print(f"bench: {error}", file=sys.stderr)
                return 1
    return 0 if any(one.error is None for one in results.measured) else 1


def _write(results: Results, options: argparse.Namespace) -> None:
    """Write the files; where one cannot be written, such as on a full disk, the other one still is."""
    errors: list[TpColocateError | OSError] = []
    for path, write in (
        (options.json, lambda path: path.write_text(json.dumps(results.to_dict(), indent=1) + "\n")),
        (options.plot, lambda path: plot.bench(results.to_dict()).savefig(path)),
    ):
        try:
            if path is not None:
                write(path)
        except (TpColocateError, OSError) as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _device(kind: str | None) -> torch.device:
    if (kind or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def _group(device: torch.device, timeout_s: float) -> Iterator[None]:
    """Make the process group of torchrun's ranks; none for a process alone."""
    if "RANK" not in os.environ:
        yield
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s + _LATE_S))
    try:
        yield
    finally:
        dist.destroy_process_group()


def _results(options: argparse.Namespace, device: torch.device, rank: int) -> Results:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    tp_sizes = list(dict.fromkeys(options.tp_sizes or [1, world_size]))
    if misfits := [tp_size for tp_size in tp_sizes if tp_size < 1 or world_size % tp_size]:
        raise ConfigError(f"tp sizes {misfits} do not divide {world_size} ranks", hint="--tp-sizes, or more ranks")
    trainer = options.trainer or ("fsdp2" if world_size > 1 else "plain")
    model = _load(options.model, trainer, device)
    server = _server_arguments(options, device, world_size) | options.server_args
    work = Workload(
        model_path=options.model,
        prompts=_prompts(options, rank, model.get_input_embeddings().num_embeddings),
        max_new_tokens=options.max_new_tokens,
        rounds=options.rounds,
        server=server,
        launch_timeout_s=options.launch_timeout,
    )
    measured: list[Measured] = []
    answers: dict[int, Answers] = {}
    shown = {"desc": "bench", "disable": None if rank == 0 else True, "leave": False, "file": sys.stderr}
    with tqdm(total=len(tp_sizes) * num_steps(work), **shown) as progress:
        for tp_size in tp_sizes:
            progress.set_postfix_str(f"tp_size {tp_size}")
            one, answers[tp_size] = measure(work, model, tp_size, device=device, progress=progress)
            measured.append(one)
    return Results(
        model=options.model,
        trainer=trainer,
        device="CPU" if device.type == "cpu" else torch.cuda.get_device_name(device),
        num_ranks=world_size,
        software=_software(),
        options={
            "prompts": options.prompts, "prompt_length": options.prompt_length, "rounds": options.rounds,
            "max_new_tokens": options.max_new_tokens, "server_args": server,
        },
        measured=tuple(measured),
        equal_answers=_equal_answers({one.tp_size: answers[one.tp_size] for one in measured if one.error is None}),
    )  # fmt: skip


def _load(path: str, trainer: str, device: torch.device) -> Any:
    """Load the checkpoint in its own dtype; sharded layer by layer, so that no device holds it whole.

    Raises:
        ConfigError: transformers is missing.
        OSError: There is no such checkpoint.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(
            "the trainer's model is loaded by transformers", hint="pip install transformers accelerate"
        ) from error
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    if trainer == "plain":
        return model.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size() if dist.is_initialized() else 1,))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _layers(model: Any) -> list[torch.nn.Module]:
    """Return the modules that transformers does not split, which are the decoder layers."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _server_arguments(options: argparse.Namespace, device: torch.device, world_size: int) -> dict[str, Any]:
    """Choose what SGLang cannot know: what else is on the device."""
    if device.type == "cuda":
        free, total = min(gather_all(torch.cuda.mem_get_info(device)))
        return {"mem_fraction_static": int(100 * _SERVERS_SHARE * free / total) / 100}
    longest = options.prompt_length + options.max_new_tokens
    requests = options.prompts * world_size
    return {
        "context_length": longest + 8,
        "max_running_requests": requests,
        "max_total_tokens": (requests + 1) * (longest + 8),
    }


def _prompts(options: argparse.Namespace, rank: int, vocabulary: int) -> tuple[tuple[int, ...], ...]:
    generator = random.Random(rank)
    return tuple(
        tuple(generator.randrange(vocabulary) for _ in range(options.prompt_length)) for _ in range(options.prompts)
    )


def _equal_answers(answers: dict[int, Answers]) -> dict[int, tuple[int, int]]:
    """Compare each size with the first.  Collective."""
    if not answers:
        return {}
    first, *later = answers
    equal = {tp_size: sum(map(tuple.__eq__, answers[first], answers[tp_size])) for tp_size in later}
    of_ranks = gather_all((equal, len(answers[first])))
    return {tp_size: (sum(found[tp_size] for found, _ in of_ranks), sum(n for _, n in of_ranks)) for tp_size in later}


def _software() -> dict[str, str]:
    found = {"tpcolocate": __version__, "torch": torch.__version__}
    try:
        found["sglang"] = version("sglang")
    except PackageNotFoundError:
        pass
    return found


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a usage error if a number is not positive, or a file cannot be written or has the name of no figure."""
    try:
        check_timeout(options.launch_timeout, name="--launch-timeout")
    except ConfigError as error:
        parser.error(error.message)
    for name in ("prompts", "prompt_length", "max_new_tokens", "rounds"):
        value = getattr(options, name)
        if not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value:g}")
    for name in ("json", "plot") if os.environ.get("RANK", "0") == "0" else ():  # which writes them, at the very end
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
            parser.error(f"--{name}: {path} cannot be written")
    if options.plot is not None:
        if find_spec("matplotlib") is None:
            parser.error("--plot needs matplotlib: pip install matplotlib")
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        kinds = [f".{kind}" for kind in sorted(FigureCanvasAgg.get_supported_filetypes())]
        if options.plot.suffix.lower() not in ("", *kinds):  # without one it becomes a PNG
            parser.error(f"--plot: {options.plot} has none of the endings {', '.join(kinds)}")


__all__ = ["add_arguments", "check", "run"]
