"""Common parts of the GPU benchmarks: models, server arguments, the stock push, measures, and how results are kept."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import urllib3
from served import gather_all

import tpcolocate

SHAPES = {
    # name: hidden, intermediate, layers, heads, key-value heads
    "8b": (4096, 12288, 36, 32, 8),
    "0.6b": (1024, 3072, 28, 16, 8),
    "1.7b": (2048, 6144, 28, 16, 8),
    "4b": (2560, 9728, 36, 32, 8),
    "14b": (5120, 17408, 40, 40, 8),
    "32b": (5120, 25600, 64, 64, 8),
    "tiny": (128, 256, 2, 4, 2),  # for a try on a CPU
}
VOCABULARY = 32_000
SMALL: dict[str, Any] = {
    # Of a checkpoint with weights: at 0.06 the layers influence the tokens, at the usual 0.02 hardly.
    "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 3072, "vocab_size": 4096, "tie_word_embeddings": False, "initializer_range": 0.06,
}  # fmt: skip
DTYPE = torch.bfloat16
PROMPTS = [[5, 6, 7, 100, 200], [100, 200, 300, 400]]
SERVER: dict[str, Any] = {
    "attention_backend": "triton", "sampling_backend": "pytorch", "grammar_backend": "none", "disable_cuda_graph": True,
    "mem_fraction_static": 0.8, "max_total_tokens": 32768, "skip_tokenizer_init": True, "skip_server_warmup": True, "context_length": 1024,
}  # fmt: skip
"""Kernels that need no compiler on the machine, no tokenizer, and a bound on the tokens that leaves memory for a trainer."""
DUMMY: dict[str, Any] = {"load_format": "dummy"}
"""For a folder with a config.json alone."""


# --- models ----------------------------------------------------------------------------------------------------------


def write_config(folder: Path, shape: str) -> None:
    """A model folder with a config alone: the server starts with random weights of this shape."""
    hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": intermediate,
                "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128,
                "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
                "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu", "eos_token_id": 1, "bos_token_id": 0,
            }
        )
    )  # fmt: skip


def shard(model: torch.nn.Module) -> None:
    """FSDP2 over all ranks, layer by layer."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(model)


def make_model(
    folder: Path, device: torch.device, seed: int, *, sharded: bool = False, dtype: torch.dtype = DTYPE
) -> torch.nn.Module:
    """Random weights, to be sent and not to be run: its buffers hold anything.

    Args:
        folder: With a config.
        device: Of this rank.
        seed: Of the weights, which are the same on every rank.
        sharded: Make nothing but this rank's shards, for a model that would not fit.
        dtype: Of the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    if sharded:
        shard(model)
        seed += dist.get_rank()
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.normal_(0.0, 0.02, generator=generator)
    return model


def change(model: torch.nn.Module, seed: int, device: torch.device) -> None:
    """A step in place, the same on every rank that holds the same."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.mul_(1.0 + 0.01 * torch.rand((), generator=generator, device=device))
    synchronize()


def write_checkpoint(folder: str | Path) -> None:
    """A small random Qwen3 with weights, `SMALL`; torch's global generator is left as it was."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3Config(**SMALL, dtype=str(DTYPE).removeprefix("torch."))
        Qwen3ForCausalLM(config).to(DTYPE).save_pretrained(folder)


# --- measures --------------------------------------------------------------------------------------------------------


def synchronize() -> None:
    """Wait for the current device; on a CPU there is nothing to wait for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def used_mib() -> float:
    """Memory in use on this rank's device, as the driver counts it, all processes together."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def summary(values: list[float]) -> dict[str, float]:
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values)}


def slope(values: list[float]) -> float:
    """Of the line through equally spaced values, by least squares."""
    middle, mean = (len(values) - 1) / 2, statistics.fmean(values)
    squares = sum((i - middle) ** 2 for i in range(len(values)))
    return sum((i - middle) * (value - mean) for i, value in enumerate(values)) / max(squares, 1.0)


def gap(engine: tpcolocate.Engine, model: torch.nn.Module, device: torch.device) -> float:
    """Largest difference of a sampled token's log-probability between the engine and the trainer."""
    worst = 0.0
    answers = engine.generate(PROMPTS, {"temperature": 1.0, "max_new_tokens": 16}, return_logprob=True, timeout_s=180.0)
    for prompt, answer in zip(PROMPTS, answers):
        pairs = answer["meta_info"]["output_token_logprobs"]
        ids = torch.tensor([prompt + [pair[1] for pair in pairs]], device=device)
        with torch.no_grad():
            logits = model(ids).logits[0].float().log_softmax(-1)
        for i, (logprob, token, *_) in enumerate(pairs):
            worst = max(worst, abs(logprob - logits[len(prompt) - 1 + i, token].item()))
    return worst


def post(engine: tpcolocate.Engine, path: str, body: dict[str, Any] | None = None, *, timeout_s: float) -> Any:
    """Make a request to the server, beside this library; connections are kept.

    Raises:
        RuntimeError: The server refused it.
    """
    answer = _HTTP.request(
        "POST",
        engine.url + path,
        body=json.dumps({} if body is None else body),
        headers={"Authorization": f"Bearer {engine.api_key}", "Content-Type": "application/json"},
        timeout=timeout_s,
        retries=False,
    )
    try:
        content = json.loads(answer.data)
    except ValueError:
        content = answer.data.decode(errors="replace")
    if answer.status != 200 or (isinstance(content, dict) and content.get("success") is False):
        raise RuntimeError(f"{path}: {answer.status} {content}")
    return content


_HTTP = urllib3.PoolManager()


def checksums(engine: tpcolocate.Engine, colo: tpcolocate.Colocation) -> str:
    """The engine's own digest over every parameter of every TP rank, on all ranks.  Collective: over the default group."""
    found = None
    if colo.is_owner:
        found = post(engine, "/weights_checker", {"action": "checksum"}, timeout_s=300)["per_engine_checksum"]
    return gather_all(found)[colo.owner_rank]


def first_of(thing: Any, *names: str) -> Any:
    """The attribute under the first of these names that there is: some were renamed, and several releases are measured."""
    return getattr(thing, next(name for name in names if hasattr(thing, name)))


def num_mapped(report: tpcolocate.SyncReport) -> list[int]:
    """Handles of each rank's parameters that the engine keeps mapped."""
    return [first_of(rank, "num_mapped", "num_lent") for rank in report.ranks]


def num_verified(report: tpcolocate.SyncReport) -> int:
    return first_of(report, "num_verified", "num_proven")


def is_verified(report: tpcolocate.SyncReport) -> bool:
    """Whether every tensor was read back from the engine."""
    return num_verified(report) == report.num_tensors


class Stock:
    """The push as SGLang's own users do it: its bucket class, its serialiser, one payload per rank gathered to the owner."""

    def __init__(self, engine: tpcolocate.Engine, colo: tpcolocate.Colocation, bucket_bytes: int) -> None:
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

        try:
            from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
        except ImportError:
            from sglang.srt.model_executor.model_runner import FlattenedTensorBucket
        monkey_patch_torch_reductions()
        self.bucket_class, self.serialize = FlattenedTensorBucket, MultiprocessingSerializer.serialize
        self.engine, self.colo, self.bucket_bytes = engine, colo, bucket_bytes

    def push(self, model: torch.nn.Module, *, duplicate: bool = False) -> float:
        """Seconds of one push; `duplicate` gives every TP rank the owner's payload, which is the mistake."""
        synchronize()
        dist.barrier()
        started = time.perf_counter()
        bucket, used = [], 0
        for name, parameter in model.named_parameters():
            tensor = parameter.detach()
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if bucket and used + tensor.nbytes > self.bucket_bytes:
                self._send(bucket, duplicate)
                bucket, used = [], 0
            bucket.append((name, tensor))
            used += tensor.nbytes
        self._send(bucket, duplicate)
        if self.colo.is_owner:
            post(self.engine, "/flush_cache", timeout_s=60)
        dist.barrier()
        return time.perf_counter() - started

    def _send(self, bucket: list[tuple[str, torch.Tensor]], duplicate: bool) -> None:
        flat = self.bucket_class(named_tensors=bucket)
        synchronize()
        mine = ""
        if self.colo.is_owner or not duplicate:
            content = {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}
            mine = self.serialize(content, output_str=True)
        gathered = [None] * self.colo.tp_size if self.colo.is_owner else None
        group = self.colo.group
        if group is None:
            gathered = [mine]
        else:
            dist.gather_object(mine, gathered, dst=self.colo.owner_rank, group=group)
        if self.colo.is_owner:
            gathered = [mine] * self.colo.tp_size if duplicate else gathered
            body = {"serialized_named_tensors": gathered, "load_format": "flattened_bucket", "flush_cache": False}
            post(self.engine, "/update_weights_from_tensor", body, timeout_s=120)
        if group is not None:
            dist.barrier(group=group)
        del flat
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()


# --- a run -----------------------------------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tp-size", type=int, default=2)
    made.add_argument("--shared-device", action="store_true", help="all ranks on one GPU (a test rig)")
    made.add_argument("--out", type=Path, required=True, help="JSON, written anew after every result")
    made.add_argument("--server-log", type=Path, default=None)
    return made


def join_ranks(*, shared_device: bool, backend: str) -> tuple[int, torch.device]:
    """This process's rank, and the device that it trains on."""
    device = torch.device("cuda", 0 if shared_device else int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group(backend)
    return dist.get_rank(), device


class Notes:
    """The results of a run: printed one by one by rank 0, and all of them in a file after each, for a run may be cut off.

    Args:
        out: The file.
        rank: Of this process.
        head: What is known before anything is measured.
    """

    def __init__(self, out: Path, rank: int, head: dict[str, Any]) -> None:
        self.out, self.rank, self.found = out, rank, head

    def __call__(self, name: str, value: Any) -> None:
        self.found[name] = value
        if self.rank == 0:
            print(name, json.dumps(value), flush=True)
            # A file that is cut off in the middle would be worth nothing.
            half = self.out.with_suffix(".half")
            half.write_text(json.dumps(self.found, indent=1))
            half.replace(self.out)


class Budget:
    """Seconds that a run may take, by the clock of rank 0.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float) -> None:
        self.ends = time.monotonic() + seconds

    def left(self) -> bool:
        return gather_all(time.monotonic() < self.ends)[0]


class OutOfStep(RuntimeError):
    """Another rank is at another place of the run."""


class InStep:
    """The parts of a run, each made by all ranks: one that fails on some rank is noted, and all go on with the next one.

    All that the ranks exchange within a part goes through `gather`, with the name of the value.  So a rank that failed, and
    asks for the end of the part, is not mistaken for one that answers.

    Args:
        note: Keeps what each part found.
    """

    def __init__(self, note: Notes) -> None:
        self.note = note

    def gather(self, what: str, value: Any = None) -> list[Any]:
        """The value of every rank; a barrier too.

        Raises:
            OutOfStep: Some rank is somewhere else.
        """
        views = gather_all((what, value))
        if any(view[0] != what for view in views):
            raise OutOfStep(f"at {what!r}, others are at {[view[0] for view in views]}")
        return [view[1] for view in views]

    def part(self, name: str, act: Callable[[dict[str, Any]], object], *, deadline_s: float) -> bool:
        """Make a part; whether it went well on every rank.

        Args:
            name: Of the part, and of its result.
            act: Fills the result in, so that what it has found until it fails is kept; or returns it.
            deadline_s: After that the process ends, with the place where it hangs on stderr: a rank that waits for a dead
                server or a stuck device cannot be brought back.
        """
        started = time.monotonic()
        faulthandler.dump_traceback_later(deadline_s, exit=True)
        found: dict[str, Any] = {}
        problem = None
        try:
            value = act(found)
            if value is not None:
                found.update(value if isinstance(value, dict) else {"value": value})
        except Exception as error:  # reported to the other ranks
            problem = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        while True:
            views = gather_all((f"the end of {name}", problem))
            if all(view[0] == f"the end of {name}" for view in views):
                break
        faulthandler.cancel_dump_traceback_later()
        problems = {str(rank): view[1] for rank, view in enumerate(views) if view[1] is not None}
        took = round(time.monotonic() - started, 1)
        self.note(name, {**found, "took_s": took, **({"errors": problems} if problems else {})})
        return not problems


def left_in_shm() -> list[str]:
    """What is in /dev/shm that a server, a trainer or this library may have left."""
    return sorted(name for name in os.listdir("/dev/shm") if name.startswith(("sgl", "tpcolocate", "torch_")))
