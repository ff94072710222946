"""Common parts of the GPU benchmarks: models, server arguments, the stock push, measures, and how results are kept."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import urllib3
from gpu_kernels import WITHOUT_COMPILER
from served import gather_all
from trainers import full, inner, place_in_mesh, with_adapter

import tpcolocate
from tpcolocate.server.releases import release

SHAPES = {
    # name: hidden, intermediate, layers, heads, key-value heads
    "8b": (4096, 12288, 36, 32, 8),
    "0.6b": (1024, 3072, 28, 16, 8),
    "1.7b": (2048, 6144, 28, 16, 8),
    "4b": (2560, 9728, 36, 32, 8),
    "14b": (5120, 17408, 40, 40, 8),
    "32b": (5120, 25600, 64, 64, 8),
    "30b-a3b": (2048, 6144, 48, 32, 4),
    "tiny": (128, 256, 2, 4, 2),  # for a try on a CPU
    "tiny-moe": (128, 256, 2, 4, 2),
}
EXPERTS = {
    # name: experts, of which a token takes, intermediate size of one
    "30b-a3b": (128, 8, 768),
    "tiny-moe": (4, 2, 64),
}
"""Shapes that are mixtures of experts."""
VOCABULARY = 32_000
SMALL: dict[str, Any] = {
    # Of a checkpoint with weights: at 0.06 the layers influence the tokens, at the usual 0.02 hardly.
    "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 3072, "vocab_size": 4096, "tie_word_embeddings": False, "initializer_range": 0.06,
}  # fmt: skip
DTYPE = torch.bfloat16
PROMPTS = [[5, 6, 7, 100, 200], [100, 200, 300, 400]]
SERVER: dict[str, Any] = WITHOUT_COMPILER | {
    "mem_fraction_static": 0.8, "max_total_tokens": 32768, "skip_tokenizer_init": True, "context_length": 1024,
}  # fmt: skip
"""No tokenizer, and a bound on the tokens that leaves memory for a trainer."""
FOR_EXPERTS: dict[str, Any] = {"enforce_disable_flashinfer_allreduce_fusion": True}
"""SGLang 0.5.17 would compile FlashInfer's fused all-reduce for minutes."""
DUMMY: dict[str, Any] = {"load_format": "dummy"}
"""For a folder with a config.json alone."""


# --- models ----------------------------------------------------------------------------------------------------------


def write_config(folder: Path, shape: str) -> None:
    """A model folder with a config alone: the server starts with random weights of this shape."""
    hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    kind: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    if shape in EXPERTS:
        experts, taken, size = EXPERTS[shape]
        kind = {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": experts, "num_experts_per_tok": taken,
            "moe_intermediate_size": size, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(
            kind | {
                "hidden_size": hidden, "intermediate_size": intermediate,
                "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128,
                "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
                "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu", "eos_token_id": 1, "bos_token_id": 0,
            }
        )
    )  # fmt: skip


def shard(model: torch.nn.Module) -> None:
    """FSDP2 over all ranks, layer by layer."""
    from torch.distributed.fsdp import fully_shard

    for layer in inner(model).model.layers:
        fully_shard(layer)
    fully_shard(model)


def make_model(
    folder: Path,
    device: torch.device,
    seed: int,
    *,
    sharded: bool = False,
    dtype: torch.dtype = DTYPE,
    lora: int | None = None,
) -> torch.nn.Module:
    """Random weights, to be sent and not to be run: its buffers hold anything.

    Args:
        folder: With a config.
        device: Of this rank.
        seed: Of the weights, which are the same on every rank.
        sharded: Make nothing but this rank's shards, for a model that would not fit.
        dtype: Of the weights.
        lora: Rank of an adapter on all projections.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
        if lora is not None:
            model = with_adapter(model, cast=False, rank=lora)
    if sharded:
        shard(model)
        seed += dist.get_rank()
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.normal_(0.0, 0.02, generator=generator)
    if lora is not None:
        change_adapter(model, seed)
    return model


ADAPTER_STEP = 2.0**-6
"""Every entry of an adapter is this or its negative: their products are exact in bfloat16, in whatever order they are summed up."""


def change_adapter(model: torch.nn.Module, seed: int) -> None:
    """A step of a LoRA in place: signs are drawn anew.  Ranks that hold the same draw the same."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if ".lora_" in name:
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                generator = torch.Generator(local.device).manual_seed(
                    1009 * (1009 * seed + number) + place_in_mesh(parameter)
                )
                signs = torch.randint(0, 2, local.shape, generator=generator, device=local.device).mul_(2).sub_(1)
                local.copy_(signs.mul(ADAPTER_STEP))
    synchronize()


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


def bytes_by_way(rank: tpcolocate.RankReport | Any) -> dict[str, int]:
    """Bytes of a rank's report by the way that they went; a release that reads no peers has copied the rest itself."""
    return {
        "own": first_of(rank, "own_bytes", "direct_bytes"),
        "peer": getattr(rank, "peer_bytes", 0),
        "staged": rank.staged_bytes,
    }


def num_mapped(report: tpcolocate.SyncReport) -> list[int]:
    """Handles of each rank's parameters that the engine keeps mapped."""
    return [first_of(rank, "num_mapped", "num_lent") for rank in report.ranks]


def num_verified(report: tpcolocate.SyncReport) -> int:
    return first_of(report, "num_verified", "num_proven")


def is_verified(report: tpcolocate.SyncReport) -> bool:
    """Whether every tensor was read back from the engine."""
    return num_verified(report) == report.num_tensors


@contextmanager
def merged(model: torch.nn.Module) -> Iterator[None]:
    """The adapters of a plain peft model are in its weights while it lasts, as peft's users merge them."""
    plain = hasattr(model, "merge_adapter") and not any(hasattr(p, "full_tensor") for p in model.parameters())
    if plain:
        model.merge_adapter()  # type: ignore[operator]
    yield
    if plain:
        model.unmerge_adapter()  # type: ignore[operator]


def wire_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights as the common way sends them: gathered, with the checkpoint's names.  Collective where they are sharded.

    Fused experts are cut into those of the checkpoint.  Adapters that are not `merged` are added tensor by tensor, which is what
    users of a sharded model do.
    """
    adapted = {name: layer for name, layer in inner(model).named_modules() if hasattr(layer, "lora_A")}
    with torch.no_grad():
        for name, parameter in inner(model).named_parameters():
            if ".lora_" in name:
                continue
            tensor = full(parameter.detach())
            path = name.removesuffix(".base_layer.weight")
            if path in adapted and not adapted[path].merged:
                a, b = (full(part["default"].weight.detach()) for part in (adapted[path].lora_A, adapted[path].lora_B))
                tensor = tensor + ((b @ a) * adapted[path].scaling["default"]).to(tensor.dtype)
            yield from without_fusion(name.replace(".base_layer", ""), tensor)


def without_fusion(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of transformers' fused experts, with the names of the checkpoint; any other tensor as it is."""
    prefix, _, last = name.rpartition(".")
    if last == "gate_up_proj" and prefix.endswith(".experts"):
        for number, expert in enumerate(tensor):
            for part, half in zip(("gate_proj", "up_proj"), expert.chunk(2)):
                yield f"{prefix}.{number}.{part}.weight", half
    elif last == "down_proj" and prefix.endswith(".experts"):
        for number, expert in enumerate(tensor):
            yield f"{prefix}.{number}.down_proj.weight", expert
    else:
        yield name, tensor


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
        self.in_session = colo.is_owner and release(engine.sglang_version).weight_session

    def push(self, model: torch.nn.Module, *, duplicate: bool = False) -> float:
        """Seconds of one push; `duplicate` gives every TP rank the owner's payload, which is the mistake."""
        synchronize()
        dist.barrier()
        started = time.perf_counter()
        bucket: list[tuple[str, torch.Tensor]] = []
        used = 0
        if self.in_session:
            post(self.engine, "/begin_weight_update", {"selector": "target"}, timeout_s=60)
        with merged(model):
            for name, tensor in wire_tensors(model):
                if bucket and used + tensor.nbytes > self.bucket_bytes:
                    self._send(bucket, duplicate)
                    bucket, used = [], 0
                bucket.append((name, tensor))
                used += tensor.nbytes
            self._send(bucket, duplicate)
        if self.in_session:
            post(self.engine, "/end_weight_update", timeout_s=60)
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
