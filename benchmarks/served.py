"""Common parts of the benchmarks of a running server: arguments, a model to serve, the ranks."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
for _folder in (ROOT, ROOT / "tests"):  # run from a checkout, installed or not; the tiny model is the tests'
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))

SERVER = {
    "cpu": {"context_length": 256, "max_total_tokens": 4096, "max_running_requests": 16},
    "cuda": {"mem_fraction_static": 0.4, "context_length": 512},
}


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default=None, help="a checkpoint; default: a tiny random one, made here")
    made.add_argument("--device", choices=sorted(SERVER), default="cpu")
    made.add_argument("--record", action="store_true", help="write the results under benchmarks/results")
    return made


def join_ranks() -> int:
    """This process's rank; 0 without torchrun."""
    if "RANK" not in os.environ:
        return 0
    dist.init_process_group("gloo")
    return dist.get_rank()


def gather_all(value: Any) -> list[Any]:
    """The value of every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def checkpoint(given: str | None, *, kv_heads: int = 2) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the model to serve, the same on all ranks of this host, and its description for a record."""
    if given is not None:
        yield given, {"model": Path(given).name}
        return
    first = not dist.is_initialized() or dist.get_rank() == 0
    with tempfile.TemporaryDirectory(prefix="tpcolocate-benchmark-") as folder:
        if first:
            from tiny_models import make_tiny_model

            make_tiny_model(folder, kv_heads=kv_heads)
        path = gather_all(folder)[0]
        try:
            yield (
                path,
                {"model": "tiny random Qwen3, hidden 128, 2 layers, vocabulary 512, float32", "kv_heads": kv_heads},
            )
        finally:
            if dist.is_initialized() and sys.exc_info()[0] is None:
                dist.barrier()  # rank 0 removes the folder


def train_device(kind: str) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
