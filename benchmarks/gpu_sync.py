"""Weight syncs into a real SGLang server on GPUs: nothing leaks, everything arrives, and what it costs.

    torchrun --standalone --nproc-per-node 2 benchmarks/gpu_sync.py --out result.json
    torchrun --standalone --nproc-per-node 2 benchmarks/gpu_sync.py --shared-device ...   # both ranks on one GPU (rig)

For plain and FSDP2 modules, per-rank and fan-out payloads, in one run and on one server:

* ``syncs`` syncs in a row: memory used on the device (driver level, all processes) after each, handles out and back;
* the engine's own checksums of every parameter on every rank, against those after a stock push of the same weights;
* seconds, with SGLang's own push of the same buckets (FlattenedTensorBucket, MultiprocessingSerializer) in between;
* the training step's order: generate, sleep, (train), wake weights, sync, wake the rest, generate;
* the negative control: one payload for all TP ranks.  The ledger must report it on the first sync; without the ledger
  (SGLang's own push, the same mistake) it leaks a model per push.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

import tpcolocate
from tpcolocate.weights import delivery

SHAPES = {
    # name: hidden, intermediate, layers, heads, key-value heads
    "8b": (4096, 12288, 36, 32, 8),
    "0.6b": (1024, 3072, 28, 16, 8),
    "1.7b": (2048, 6144, 28, 16, 8),
    "4b": (2560, 9728, 36, 32, 8),
    "14b": (5120, 17408, 40, 40, 8),
    "32b": (5120, 25600, 64, 64, 8),
}
VOCABULARY = 32_000
PROMPTS = [[5, 6, 7, 100, 200], [100, 200, 300, 400]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--syncs", type=int, default=100, help="in a row, of the plain module")
    parser.add_argument("--fsdp-syncs", type=int, default=20)
    parser.add_argument("--timed", type=int, default=7, help="alternating pairs of ours and stock")
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--shared-device", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--server-log", type=Path, default=None)
    return parser.parse_args()


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


def make_model(folder: Path, device: torch.device, seed: int) -> torch.nn.Module:
    """Random bf16 weights, the same on every rank."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
    return model


def used_mib() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


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
        torch.cuda.synchronize()
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
            self.engine._client.post("/flush_cache", timeout_s=60)
        dist.barrier()
        return time.perf_counter() - started

    def _send(self, bucket: list[tuple[str, torch.Tensor]], duplicate: bool) -> None:
        flat = self.bucket_class(named_tensors=bucket)
        torch.cuda.synchronize()
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
            self.engine._verbs.push(gathered, load_format="flattened_bucket", timeout_s=120)
        if group is not None:
            dist.barrier(group=group)
        del flat
        torch.cuda.ipc_collect()


def checksums(engine: tpcolocate.Engine, colo: tpcolocate.Colocation) -> str | None:
    """The engine's own digest over every parameter of every rank."""
    if not colo.is_owner:
        return None
    return engine._client.post("/weights_checker", {"action": "checksum"}, timeout_s=300)["per_engine_checksum"]


def repeat(engine: tpcolocate.Engine, model: torch.nn.Module, times: int, **options: object) -> dict[str, object]:
    """Syncs in a row: memory after each, handles, seconds."""
    used, seconds, phases, workers, balanced, proven = [], [], [], [], True, True
    for _ in range(times):
        report = engine.sync_weights(model, **options)
        dist.barrier()
        used.append(round(used_mib(), 1))
        seconds.append(report.seconds)
        phases.append(next(r.seconds for r in report.ranks if r.rank == report.rank))
        workers.append(report.worker_seconds)
        balanced &= all(r.num_exported == r.num_returned for r in report.ranks)
        proven &= report.num_proven == report.num_tensors
    n = len(used)
    mean = (n - 1) / 2
    slope = sum((i - mean) * (u - statistics.fmean(used)) for i, u in enumerate(used)) / max(
        sum((i - mean) ** 2 for i in range(n)), 1
    )
    return {
        "syncs": times, "mib": report.num_bytes / 2**20, "buckets": report.num_buckets, "tensors": report.num_tensors,
        "all_handles_back_each_time": balanced, "all_tensors_proven_each_time": proven, "transport": report.transport,
        "driver_used_mib": used if n <= 12 else [*used[:3], "...", *used[-3:]], "driver_used_mib_min_max": [min(used), max(used)],
        "slope_mib_per_sync": round(slope, 4), "seconds": summary(seconds),
        "phases_median_ms": {k: round(statistics.median(p.get(k, 0.0) for p in phases) * 1e3, 2) for k in phases[-1]},
        "workers_median_ms": {k: round(statistics.median(w.get(k, 0.0) for w in workers) * 1e3, 2) for k in workers[-1]},
        "replayed": report.num_replayed, "peak_extra_mib": max(r.peak_extra_bytes for r in report.ranks) / 2**20, "warnings": report.warnings,
    }  # fmt: skip


def summary(values: list[float]) -> dict[str, float]:
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values)}


def alternate(
    engine: tpcolocate.Engine, stock: Stock, model: torch.nn.Module, pairs: int, **options: object
) -> dict[str, object]:
    """Ours and stock in turn, and the engine's checksums after each, which must agree."""
    ours, theirs = [], []
    for _ in range(pairs):
        dist.barrier()
        ours.append(engine.sync_weights(model, **options).seconds)
        theirs.append(stock.push(model))
    return {
        "ours": summary(ours),
        "stock": summary(theirs),
        "stock_over_ours": statistics.median(theirs) / statistics.median(ours),
    }


def negative_control(engine: tpcolocate.Engine, model: torch.nn.Module, bucket_bytes: int) -> dict[str, object]:
    """One payload for all TP ranks: must be reported on the first sync, and leave nothing behind."""
    original = delivery.Delivery.load

    def duplicated(self, server, payloads, *rest):  # type: ignore[no-untyped-def]
        return original(self, server, [payloads[0]] * len(payloads), *rest)

    before = torch.cuda.memory_allocated()
    delivery.Delivery.load = duplicated  # type: ignore[method-assign]
    try:
        engine.sync_weights(model, transport="stock", bucket_bytes=bucket_bytes)
        told = None
    except tpcolocate.TpColocateError as error:
        told = f"{type(error).__name__}: {error}"
    finally:
        delivery.Delivery.load = original  # type: ignore[method-assign]
    engine.sync_weights(model, bucket_bytes=bucket_bytes)
    return {
        "reported": told,
        "allocated_mib_more_after_the_next_sync": (torch.cuda.memory_allocated() - before) / 2**20,
    }


def leak(stock: Stock, model: torch.nn.Module, times: int) -> dict[str, object]:
    """The same mistake without a ledger; what it takes stays taken until the process ends."""
    before, more = torch.cuda.memory_allocated(), []
    for _ in range(times):
        stock.push(model, duplicate=True)
        more.append(round((torch.cuda.memory_allocated() - before) / 2**20, 1))
    return {"pushes": times, "owner_allocated_mib_more": more}


def main() -> None:
    args = parse_args()
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", 0 if args.shared_device else local)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    folder = Path("/tmp/tpcolocate-bench-model")
    if rank == 0:
        write_config(folder, args.shape)
    dist.barrier()
    result: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "shape": args.shape, "tp_size": args.tp_size,
        "ranks": dist.get_world_size(), "shared_device": args.shared_device, "bucket_mib": args.bucket_mib,
        "command": "torchrun --standalone --nproc-per-node 2 benchmarks/gpu_sync.py " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in vars(args).items() if k not in ("out", "server_log")),
    }  # fmt: skip
    options = {"bucket_bytes": args.bucket_mib * 2**20}
    server = {
        "load_format": "dummy", "attention_backend": "triton", "sampling_backend": "pytorch", "grammar_backend": "none",
        "disable_cuda_graph": True, "mem_fraction_static": 0.2, "enable_memory_saver": True, "skip_tokenizer_init": True,
        "skip_server_warmup": True, "context_length": 1024,
    }  # fmt: skip

    def note(name: str, value: object) -> None:
        result[name] = value
        if rank == 0:
            print(name, json.dumps(value), flush=True)
            args.out.write_text(json.dumps(result, indent=1))

    with tpcolocate.init(args.tp_size, device=device, allow_shared_devices=args.shared_device) as colo:
        started = time.perf_counter()
        with colo.launch(folder, health_timeout_s=400, log_path=args.server_log, **server) as engine:
            note("launch_seconds", time.perf_counter() - started)
            note("sglang", engine.sglang_version)
            model = make_model(folder, device, seed=1)
            note("plain_first_sync", str(engine.sync_weights(model, **options)))
            note("plain", repeat(engine, model, args.syncs, **options))
            note("plain_fan_out", repeat(engine, model, 10, payloads="fan_out", **options))
            ours = checksums(engine, colo)
            stock = Stock(engine, colo, args.bucket_mib * 2**20)
            stock.push(model)
            note("checksums_equal_stock", {"plain": ours == checksums(engine, colo), "digest": ours})
            note("plain_beside_stock", alternate(engine, stock, model, args.timed, **options))

            before = used_mib()
            engine.generate(PROMPTS, {"max_new_tokens": 8})
            cycle = []
            for _ in range(3):
                engine.sleep()
                asleep = used_mib()
                engine.wake(["weights"])
                engine.sync_weights(model, **options)
                engine.wake()
                engine.generate(PROMPTS, {"max_new_tokens": 8})
                cycle.append({"freed_mib": round(before - asleep), "used_again_mib": round(used_mib() - before)})
            note("training_step_order", {"cycles": cycle, "checksums_equal": checksums(engine, colo) == ours})

            note("negative_control", negative_control(engine, model, args.bucket_mib * 2**20))
            note("after_control", repeat(engine, model, 5, **options))
            large = {"bucket_bytes": 2048 * 2**20}
            note(
                "plain_beside_stock_2048_mib",
                alternate(engine, Stock(engine, colo, 2048 * 2**20), model, args.timed, **large),
            )

            from torch.distributed.fsdp import fully_shard

            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
            torch.cuda.empty_cache()
            note("fsdp2", repeat(engine, model, args.fsdp_syncs, **options))
            note("fsdp2_checksums_equal_plain", checksums(engine, colo) == ours)
            note("fsdp2_beside_stock", alternate(engine, stock, model, max(args.timed // 2, 2), **options))
            note("leak_without_ledger", leak(stock, model, 2))
    dist.barrier()
    note("shm_left", sorted(n for n in os.listdir("/dev/shm") if n.startswith(("sgl", "tpcolocate", "torch_"))))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
