"""Every kind of trainer against a real server: five syncs each, and after every one the engine must compute what the trainer would.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 benchmarks/gpu_trainers.py --tp-size 2 --record
    torchrun --standalone --nproc-per-node 2 benchmarks/gpu_trainers.py --device cpu --models dense --trainers plain peft

One server per model, a dense Qwen3 and a Qwen3-MoE with 16 experts (small, random weights, made here), and on it one trainer
after the other: a plain module, DDP, FSDP2, FSDP2 with float32 masters, a peft LoRA, a peft LoRA under FSDP2, a state dict.
Before every sync the trained parameters take a random step, the same on all ranks.  After it the log-probabilities of tokens
that the engine samples are compared with those of a plain model that holds the trainer's full weights (adapters merged) in the
served dtype.  The first step of each trainer is also compared before its sync: an engine that was not synced is far off.

A trainer that fails is a row with its error; the next one goes on, on a new server where the old one is gone.  A trainer that
hangs ends the processes after ``--row-timeout-s``; under ``--max-restarts`` the rest goes on from there.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import logging
import math
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_common import SERVER, SMALL, OutOfStep, first_of, left_in_shm, num_mapped
from record import RESULTS, publish, record

import tpcolocate
from tpcolocate import errors

TRAINERS = ("plain", "ddp", "fsdp2", "fsdp2_fp32", "peft", "peft_fsdp2", "state_dict")
MODELS = ("dense", "experts")
REFUSED = {("experts", "state_dict"): errors.WeightsMismatchError}
"""What is documented not to work: a state dict of fused experts has other names than the checkpoint."""
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 512, "norm_topk_prob": True}
CPU_SIZES = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 256, "vocab_size": 512, "initializer_range": 0.2,
}  # fmt: skip
CPU_EXPERTS = {"moe_intermediate_size": 64}
LAUNCH: dict[str, dict[str, Any]] = {
    "cuda": SERVER | {"mem_fraction_static": 0.2, "enable_memory_saver": True, "context_length": 512},
    "cpu": {"skip_tokenizer_init": True, "context_length": 256, "max_total_tokens": 2048, "max_running_requests": 8},
}
# SGLang 0.5.17 would compile FlashInfer's fused all-reduce for minutes.
LAUNCH_EXPERTS = {"cuda": {"enforce_disable_flashinfer_allreduce_fusion": True}, "cpu": {}}
STEP = {"cuda": 0.02, "cpu": 0.05}
# Of a log-probability.  In bfloat16 a router that chooses another expert makes the difference larger.
NOISE = {("cuda", "dense"): 0.5, ("cuda", "experts"): 1.5, ("cpu", "dense"): 0.01, ("cpu", "experts"): 0.01}
PROMPTS = [[5, 6, 7, 100, 200], [100, 200, 300, 400], [17, 3], [9, 8, 7, 6, 5, 4, 3, 2]]
SAMPLING = {"temperature": 1.0, "max_new_tokens": 16, "ignore_eos": True}
LEFT_MIB = 4.0
"""Memory that a trainer may leave: tables of the sync, not weights."""
TIMEOUT_S = 60.0
"""How long a sync, or a wait for another rank, may take."""
HEALTH_S = 400.0
"""How long a server may take to start."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp-size", "--tp", type=int, default=2)
    parser.add_argument("--device", choices=sorted(LAUNCH), default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--syncs", type=int, default=5)
    parser.add_argument("--shared-device", action="store_true", help="all ranks on one GPU (a test rig)")
    parser.add_argument("--server-args", type=json.loads, default={}, help="more SGLang arguments, as JSON")
    parser.add_argument("--row-timeout-s", type=float, default=150.0, help="a trainer that takes longer hangs")
    parser.add_argument("--budget-s", type=float, default=3000.0, help="no trainer is begun after that")
    parser.add_argument("--record", action="store_true", help="write the result as JSON")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to")
    return parser.parse_args()


# --- models and trainers ---------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, model: str, device: str) -> None:
    """A small model with random weights, its norms included, in the dtype that is served."""
    import transformers

    sizes = {**SMALL, **(CPU_SIZES if device == "cpu" else {})}
    name = "Qwen3"
    if model == "experts":
        name, sizes = "Qwen3Moe", {**sizes, **EXPERTS, **(CPU_EXPERTS if device == "cpu" else {})}
    config = getattr(transformers, f"{name}Config")(**sizes, dtype=str(dtype_of(device)).removeprefix("torch."))
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype_of(device))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
    made.save_pretrained(folder)


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)


def make_trainer(kind: str, folder: Path, device: torch.device) -> torch.nn.Module:
    """A trainer's module; the same weights on every rank, whatever its kind."""
    model = load(folder, torch.float32 if kind == "fsdp2_fp32" else dtype_of(device.type), device)
    if kind.startswith("peft"):
        model = with_adapter(model, cast=kind == "peft")
    if "fsdp2" in kind:
        shard(model, device, masters=kind == "fsdp2_fp32")
    elif device.type == "cpu":
        model.share_memory()  # which the server maps, like a GPU's
    if kind == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model)
    return model


def with_adapter(model: torch.nn.Module, *, cast: bool) -> torch.nn.Module:
    """A LoRA for every linear layer, with the same initial values on every rank.

    Args:
        model: To be adapted.
        cast: Keep the adapter in float32 beside a bfloat16 model, as peft does by default.
    """
    import peft

    torch.manual_seed(1)
    linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if type(m) is torch.nn.Linear})
    targets = [name for name in linear if name.endswith("_proj")]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=cast)


def shard(model: torch.nn.Module, device: torch.device, *, masters: bool) -> None:
    """FSDP2 over all ranks, layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype_of(device.type)) if masters else MixedPrecisionPolicy()
    for layer in inner(model).model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def inner(model: torch.nn.Module) -> Any:
    """The transformers model inside of DDP or peft."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def take_step(model: torch.nn.Module, seed: int, scale: float) -> None:
    """Add noise to the trained parameters in place, as an optimiser would, the same on every rank."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            generator = torch.Generator(parameter.device).manual_seed(1000 * seed + number)
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
            if isinstance(parameter, DTensor):
                noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.add_(noise, alpha=scale)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def copy_weights(model: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Give a plain model the trainer's full weights, adapters merged.  Collective where they are sharded."""
    weights: dict[str, torch.Tensor] = {}
    adapted = {name: layer for name, layer in inner(model).named_modules() if hasattr(layer, "lora_A")}
    with torch.no_grad():
        for name, parameter in inner(model).named_parameters():
            if ".lora_" in name:
                continue
            weight = full(parameter.detach())
            path = name.removesuffix(".base_layer.weight")
            if path in adapted:
                layer = adapted[path]
                a, b = (full(part["default"].weight.detach()).float() for part in (layer.lora_A, layer.lora_B))
                weight = weight.float() + b @ a * layer.scaling["default"]
            weights[name.replace(".base_layer", "")] = weight
        reference.load_state_dict(weights, strict=True)


# --- one trainer -----------------------------------------------------------------------------------------------------


def forget_frames(error: BaseException | None) -> None:
    """Drop what the frames of an error hold: the trainer, whose memory is looked at."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def judge(row: dict[str, Any], device: str) -> str:
    """One word on a trainer: ok, or what is wrong with it.

    Args:
        row: See `Bench.row`.
        device: Type of device, for what is noise.
    """
    if row["error"] is not None:
        refusal = REFUSED.get((row["model"], row["trainer"]))
        return "refused" if refusal is not None and row["error"].startswith(refusal.__name__) else "FAILED"
    at_noise = all(gap <= NOISE[device, row["model"]] for gap in row["gap"])
    if not (at_noise and all(gap < row["stale"][1] / 4 for gap in row["mean_gap"])):
        return "WRONG"
    if any(row["outstanding"]) or row["left_mib"] > LEFT_MIB:
        return "LEAKS"
    return "unverified" if row["unverified"] else "ok"


class Bench:
    """The ranks, and the server of one model at a time.

    Args:
        args: Of the command line.
        device: Of this rank.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        # Apart from the default group, whose GPU collectives a failed trainer may leave unfinished.
        self.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=1800))
        self.warnings: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda one: self.warnings.append(one.getMessage())  # type: ignore[method-assign]
        logging.getLogger("tpcolocate").addHandler(handler)
        self.colo: tpcolocate.Colocation | None = None
        self.engine: tpcolocate.Engine | None = None
        self.jobs: list[str] = []
        self.launches: list[float] = []

    def gather(self, what: str, value: Any = None) -> list[Any]:
        """The value of every rank.

        Args:
            what: What the value is; ranks that left a trainer at different places notice by it.
            value: Of this rank.

        Raises:
            OutOfStep: Some rank is somewhere else.
        """
        views: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(views, (what, value), group=self.control)
        if any(view[0] != what for view in views):
            raise OutOfStep(f"at {what!r}, others are at {[view[0] for view in views]}")
        return [view[1] for view in views]

    def gather_at_end(self, value: Any) -> list[Any]:
        """The value of every rank, once all of them have left the trainer."""
        while True:
            try:
                return self.gather("end of the trainer", value)
            except OutOfStep:
                continue

    def launch(self, folder: Path, model: str) -> None:
        args, kind = self.args, self.device.type
        server = {**LAUNCH[kind], **(LAUNCH_EXPERTS[kind] if model == "experts" else {}), **args.server_args}
        started = time.monotonic()
        faulthandler.dump_traceback_later(HEALTH_S + 2 * TIMEOUT_S, exit=True)
        self.colo = tpcolocate.init(
            args.tp_size, device=self.device, timeout_s=TIMEOUT_S, allow_shared_devices=args.shared_device
        )
        self.jobs.append(self.colo.job)
        self.engine = self.colo.launch(folder, health_timeout_s=HEALTH_S, **server)
        self.launches.append(round(time.monotonic() - started, 1))

    def close(self) -> None:
        """End the server, whatever state it is in."""
        colo, self.colo, self.engine = self.colo, None, None
        if colo is not None:
            colo.close()
        self.gather("server is gone")

    def gap(self, reference: torch.nn.Module) -> tuple[float, float]:
        """Largest and mean difference of a sampled token's log-probability, over all ranks."""
        assert self.engine is not None
        found = []
        answers = self.engine.generate(PROMPTS, SAMPLING, return_logprob=True, timeout_s=TIMEOUT_S)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            pairs = answer["meta_info"]["output_token_logprobs"]
            ids = torch.tensor([prompt + [pair[1] for pair in pairs]], device=self.device)
            with torch.no_grad():
                expected = reference(ids).logits[0].float().log_softmax(-1)
            found += [abs(pair[0] - expected[len(prompt) - 1 + i, pair[1]].item()) for i, pair in enumerate(pairs)]
        of_ranks = [one for values in self.gather("log-probabilities", found) for one in values]
        return max(of_ranks), sum(of_ranks) / len(of_ranks)

    def run(self, row: dict[str, Any], folder: Path, reference: torch.nn.Module) -> None:
        """Sync one trainer several times; what is found until it fails is left in `row`."""
        assert self.engine is not None
        kind = row["trainer"]
        model = make_trainer(kind, folder, self.device)
        for number in range(self.args.syncs):
            take_step(model, number, STEP[self.device.type])
            copy_weights(model, reference)
            if number == 0:
                row["stale"] = list(self.gap(reference))
            source = inner(model).state_dict() if kind == "state_dict" else model
            started = time.perf_counter()
            report = self.engine.sync_weights(source, timeout_s=TIMEOUT_S)
            seconds = time.perf_counter() - started
            largest, mean = self.gap(reference)
            ranks = report.ranks
            for name, value in {
                "seconds": round(max(self.gather("seconds", seconds)), 4),
                "gap": float(f"{largest:.3g}"),
                "mean_gap": float(f"{mean:.3g}"),
                "mapped": max(num_mapped(report)),
                "direct_mib": round(max(r.direct_bytes for r in ranks) / 2**20, 1),
                "staged_mib": round(max(r.staged_bytes for r in ranks) / 2**20, 1),
                "outstanding": sum(r.num_exported - r.num_returned for r in ranks),
                "commands": report.num_buckets,
            }.items():
                row.setdefault(name, []).append(value)
            row["tensors"] = report.num_tensors
            row["unverified"] = sorted({*row.get("unverified", ()), *first_of(report, "unverified", "unproven")})
            row["transport"] = report.transport

    def row(self, model: str, trainer: str, folder: Path, reference: torch.nn.Module) -> dict[str, Any]:
        """One trainer from its module to its judgement, the same on every rank."""
        row: dict[str, Any] = {"model": model, "trainer": trainer}
        before, num_warnings = self.allocated_mib(), len(self.warnings)
        started = time.monotonic()
        error: BaseException | None = None
        try:
            if self.engine is None:
                self.launch(folder, model)
            with torch.no_grad():
                reference(torch.tensor(PROMPTS[:1], device=self.device))  # which takes cuBLAS its workspace
            before = self.allocated_mib()
            faulthandler.dump_traceback_later(self.args.row_timeout_s, exit=True)
            self.run(row, folder, reference)
        except Exception as caught:
            error = caught
            traceback.print_exc()
            forget_frames(caught)
        gc.collect()  # the trainer, whose memory the engine may still map
        usable = not isinstance(error, errors.EngineDeadError | errors.RankLostError | errors.LaunchError)
        outcomes = self.gather_at_end((None if error is None else f"{type(error).__name__}: {error}", usable))
        texts = [text[:400] for text, _ in outcomes if text is not None]
        texts.sort(key=lambda text: text.startswith(OutOfStep.__name__))  # the cause first
        row["error"] = texts[0] if texts else None
        usable = all(is_usable for _, is_usable in outcomes)
        try:
            if usable and self.engine is not None:
                self.engine.wake()  # which takes back what the trainer has dropped
        except errors.TpColocateError as caught:
            usable = False
            row["error"] = row["error"] or f"taking back its memory: {type(caught).__name__}: {caught}"[:400]
        health = "none" if self.engine is None else self.engine.health().value
        states = self.gather("health", (usable, health, row["error"]))
        row["error"] = row["error"] or next((text for *_, text in states if text is not None), None)
        if not all(is_usable and state in ("ready", "paused") for is_usable, state, _ in states):
            row["relaunch"] = True
            self.close()
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()
        row["left_mib"] = max(self.gather("memory", round(self.allocated_mib() - before, 1)))
        new = self.gather("warnings", self.warnings[num_warnings:])
        row["warnings"] = sorted({text[:200] for texts in new for text in texts})
        faulthandler.cancel_dump_traceback_later()
        row["took_s"] = round(time.monotonic() - started, 1)
        row["verdict"] = judge(row, self.device.type)
        return row

    def allocated_mib(self) -> float:
        return torch.cuda.memory_allocated() / 2**20 if self.device.type == "cuda" else 0.0


# --- the run ---------------------------------------------------------------------------------------------------------


class Progress:
    """The rows so far, which outlive a restart of the ranks by torchrun.

    Args:
        rank: Of this process; rank 0 writes.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        run = os.environ.get("TORCHELASTIC_RUN_ID", "alone")
        self.path = Path(tempfile.gettempdir()) / f"tpcolocate-trainers-{run}-{os.getppid()}.json"
        self.rows: list[dict[str, Any]] = []
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and self.path.exists():
            self.rows = json.loads(self.path.read_text())
            for row in self.rows:
                if "verdict" not in row:
                    row |= {"error": "the ranks hung or died, and were started anew", "verdict": "FAILED"}

    def has(self, model: str, trainer: str) -> bool:
        return any(row["model"] == model and row["trainer"] == trainer for row in self.rows)

    def begin(self, model: str, trainer: str) -> None:
        self._write([*self.rows, {"model": model, "trainer": trainer}])

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._write(self.rows)
        if self.rank == 0:
            print(line_of(row), flush=True)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if self.rank == 0:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(rows))
            part.replace(self.path)

    def remove(self) -> None:
        if self.rank == 0:
            self.path.unlink(missing_ok=True)


def series(row: dict[str, Any], name: str) -> str:
    return " ".join(f"{value:g}" for value in row.get(name, ()))


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    if row["error"] is not None:
        result = f"after {len(row.get('gap', ()))} syncs: {row['error'].splitlines()[0]}"
    else:
        result = " | ".join(
            f"{name} {series(row, name)}" for name in ("seconds", "gap", "mapped", "staged_mib", "direct_mib")
        )
        result += f" | unverified {len(row['unverified'])} of {row['tensors']}"
    stale = f" (unsynced {row['stale'][0]:.2g})" if "stale" in row else ""
    return f"{row['model']:8} {row['trainer']:11} {row['verdict']:10} {row.get('took_s', 0):5.0f} s  {result}{stale}"


@contextmanager
def checkpoint(model: str, device: str, bench: Bench) -> Iterator[Path]:
    """The folder to serve, the same on all ranks of this host."""
    with tempfile.TemporaryDirectory(prefix="tpcolocate-trainers-") as own:
        if dist.get_rank() == 0:
            write_checkpoint(Path(own), model, device)
        yield Path(bench.gather("folder", own)[0])
        bench.gather("end of the model")  # rank 0 removes the folder


def join_ranks(backend: str) -> int:
    """This process's rank in the default group, also where torchrun has started the ranks anew."""
    store, rank, world_size = next(dist.rendezvous("env://"))
    # The store is the one of the attempt before, with its addresses.
    store = dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=1800))
    return rank


def run_all(args: argparse.Namespace, bench: Bench, progress: Progress) -> None:
    ends = time.monotonic() + args.budget_s
    for model in args.models:
        todo = [trainer for trainer in args.trainers if not progress.has(model, trainer)]
        if not todo:
            continue
        with checkpoint(model, args.device, bench) as folder:
            reference = load(folder, dtype_of(args.device), bench.device)
            for trainer in todo:
                if not bench.gather("time", time.monotonic() < ends)[0]:
                    progress.add(
                        {"model": model, "trainer": trainer, "error": "left out: no time", "verdict": "FAILED"}
                    )
                    continue
                progress.begin(model, trainer)
                progress.add(bench.row(model, trainer, folder, reference))
            if bench.engine is not None:
                bench.engine.shutdown()
            bench.close()


def recorded(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what a record need not repeat."""
    lists = ("seconds", "gap", "mean_gap", "mapped", "direct_mib", "staged_mib", "commands")
    kept = {"verdict": row["verdict"], **{name: series(row, name) for name in lists if row.get(name)}}
    kept |= {name: row[name] for name in ("tensors", "transport") if name in row}
    kept |= {"unverified": row["unverified"][:5]} if row.get("unverified") else {}
    kept |= {"unsynced_gap": f"{row['stale'][0]:.3g}"} if "stale" in row else {}
    return kept | ({} if row["error"] is None else {"error": row["error"].splitlines()[0]})


def main() -> None:
    args = parse_args()
    load_before = os.getloadavg()
    if args.device == "cuda":
        device = torch.device("cuda", 0 if args.shared_device else int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    rank = join_ranks("nccl" if args.device == "cuda" else "gloo")
    shm_before = set(left_in_shm())
    bench, progress = Bench(args, device), Progress(rank)
    run_all(args, bench, progress)
    rows = progress.rows
    left = [name for name in left_in_shm() if name not in shm_before and any(job in name for job in bench.jobs)]
    never_back = [
        text for texts in bench.gather("all warnings", bench.warnings) for text in texts if "never gave back" in text
    ]
    outstanding = {
        "handles": sum(sum(row.get("outstanding", ())) for row in rows),
        "handles_reclaimed_at_the_end": len(never_back),
        "files_in_shared_memory": len(left),
        "most_mib_left_by_a_trainer": max((row.get("left_mib", 0.0) for row in rows), default=0.0),
    }
    if rank == 0:
        print("\n".join(["", *map(line_of, rows), ""]))
        for text in sorted({text for row in rows for text in row.get("warnings", ())}):
            print("warning:", text)
        print("outstanding:", json.dumps(outstanding), flush=True)
        samples = [value for row in rows for value in row.get("gap", ()) if math.isfinite(value)]
        if samples:
            result = record(
                f"gpu_trainers_tp{args.tp_size}" if args.device == "cuda" else f"cpu_trainers_tp{args.tp_size}",
                metric="largest difference of a sampled token's log-probability between engine and trainer after a sync",
                unit="nats",
                samples=samples,
                settings={
                    "tp_size": args.tp_size, "ranks": dist.get_world_size(), "syncs": args.syncs, "served_dtype": str(dtype_of(args.device)),
                    "step": STEP[args.device], "noise": {model: NOISE[args.device, model] for model in args.models},
                    "launches_s": bench.launches,
                },
                checks={
                    "as_expected": sum(row["verdict"] in ("ok", "refused") for row in rows), "of": len(rows), "outstanding": outstanding,
                    **{f"{row['model']} {row['trainer']}": recorded(row) for row in rows},
                },
                load_before=load_before,
            )  # fmt: skip
            publish(result, write=args.record, folder=args.results)
    progress.remove()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
