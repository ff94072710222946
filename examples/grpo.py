"""GRPO on a real engine: FSDP2 ranks train on addition with samples of an SGLang server on the same devices.

    torchrun --standalone --nproc-per-node 2 examples/grpo.py
    torchrun --standalone --nproc-per-node 2 examples/grpo.py --no-sync
    torchrun --standalone --nproc-per-node 2 examples/grpo.py --device cuda
    torchrun --standalone --nproc-per-node 2 examples/grpo.py --model PATH --device cuda --digits 6

In every step each rank generates answers to its own prompts, trains on them, and syncs the new weights to the
engine.  Two figures show whether that works: the reward, and the *gap*, the largest difference between the
engine's log-probability of a sampled token and the trainer's.  With a working sync the gap is numerical noise;
with ``--no-sync`` the engine keeps its first weights and the gap grows.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from addition import END, SMALL, TINY, prompt_text, reward, sample_problems, warm_start
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import tpcolocate

PHASES = ("generate", "sleep", "train", "wake", "sync")
CPU_SERVER = {"max_running_requests": 64, "max_total_tokens": 8192, "context_length": 128}
CUDA_SERVER = {"dtype": "bfloat16", "mem_fraction_static": 0.4, "enable_memory_saver": True}


@dataclass(frozen=True)
class Row:
    """Results of one step, over all ranks."""

    step: int
    reward: float
    gap: float
    sync_seconds: float
    sync_bytes: int
    generate_seconds: float
    train_seconds: float
    sleep_seconds: float
    wake_seconds: float
    grad_norm: float

    HEADER = f"{'step':>4}  {'reward':>6}  {'sync s':>7}  {'gap':>8}  {'generate s':>10}  {'train s':>7}"

    def __str__(self) -> str:
        return (
            f"{self.step:4d}  {self.reward:6.3f}  {self.sync_seconds:7.3f}  {self.gap:8.1e}"
            f"  {self.generate_seconds:10.2f}  {self.train_seconds:7.2f}"
        )


@dataclass(frozen=True)
class Samples:
    """One rank's samples of a step, padded on the right; ``n`` sequences of at most ``length`` tokens.

    Attributes:
        ids: (n, length) int64, prompt and answer.
        mask: (n, length - 1) bool, true where ``ids[:, 1:]`` was sampled.
        engine_log_probs: (n, length - 1) float32, the engine's, zero where nothing was sampled.
        rewards: (n,) float32, the answers to one prompt side by side.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    engine_log_probs: torch.Tensor
    rewards: torch.Tensor


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=16, help="prompts a step, over all ranks")
    parser.add_argument("--group-size", type=int, default=8, help="answers a prompt")
    parser.add_argument("--updates", type=int, default=1, help="optimizer steps on each batch of samples")
    parser.add_argument("--lr", type=float, default=None, help="default: 3e-4, 3e-5 on GPUs, or 1e-6 with --model")
    parser.add_argument("--digits", type=int, default=None, help="of both numbers; default: 2, or 5 with --model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model",
        type=Path,
        default=None,
        help="a Hugging Face checkpoint; default: a tiny one, or a small one for GPUs, made here",
    )
    parser.add_argument("--server-args", type=json.loads, default={}, help="more SGLang arguments, as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for the tiny model, the plot and the JSON"
    )
    parser.add_argument("--sync", action=argparse.BooleanOptionalAction, default=True, help="sync the weights")
    parser.add_argument(
        "--sleep",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="engine asleep while training (with --sync)",
    )
    args = parser.parse_args()
    given = args.model is not None
    args.lr = (1e-6 if given else 3e-5 if args.device == "cuda" else 3e-4) if args.lr is None else args.lr
    args.digits = (5 if given else 2) if args.digits is None else args.digits
    if not given and args.digits != 2:
        parser.error("the model made here is trained on numbers of 2 digits only; --digits needs --model")
    for name in ("steps", "prompts", "updates"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.group_size < 2:
        parser.error("--group-size must be at least 2: an answer is compared with the others to its prompt")
    # Weights do not survive a sleep: without a sync the engine would generate from garbage.
    args.sleep = args.sleep and args.sync
    return args


def load_trainer(folder: Path, *, device: torch.device) -> torch.nn.Module:
    """Load the checkpoint in float32 and shard it over all ranks; compute in bfloat16 on a GPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_cache=False).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if device.type == "cuda" else MixedPrecisionPolicy()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def sample(
    engine: Any, tokenizer: Any, *, args: argparse.Namespace, generator: torch.Generator, device: torch.device
) -> Samples:
    """Generate answers to this rank's share of the prompts, and compute their rewards."""
    shots = [] if args.model is None else sample_problems(3, digits=args.digits, generator=generator)
    problems = sample_problems(args.prompts // dist.get_world_size(), digits=args.digits, generator=generator)
    prompts = [tokenizer.encode(prompt_text(problem, shots=shots), add_special_tokens=False) for problem in problems]
    params: dict[str, Any] = {
        "n": args.group_size,
        "temperature": 1.0,
        "max_new_tokens": args.digits + 2,  # one digit more than the numbers have, and the end
        "stop_token_ids": [tokenizer.eos_token_id],
    }
    if args.model is not None:
        params["stop"] = [END]
    responses = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)

    scored = [response["meta_info"]["output_token_logprobs"] for response in responses]
    answers = [[int(token) for _, token, *_ in entries] for entries in scored]
    asked = [index // args.group_size for index in range(len(answers))]
    length = max(len(prompts[i]) + len(answer) for i, answer in zip(asked, answers, strict=True))
    ids = torch.zeros(len(answers), length, dtype=torch.int64)
    mask = torch.zeros(len(answers), length - 1, dtype=torch.bool)
    log_probs = torch.zeros(len(answers), length - 1)
    for row, (i, answer) in enumerate(zip(asked, answers, strict=True)):
        start, stop = len(prompts[i]), len(prompts[i]) + len(answer)
        ids[row, :stop] = torch.tensor(prompts[i] + answer)
        mask[row, start - 1 : stop - 1] = True
        log_probs[row, start - 1 : stop - 1] = torch.tensor([float(entry[0]) for entry in scored[row]])
    rewards = torch.tensor([reward(problems[i], answer, tokenizer) for i, answer in zip(asked, answers, strict=True)])
    return Samples(ids.to(device), mask.to(device), log_probs.to(device), rewards.to(device))


def trainer_log_probs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of every token after the first, (n, length - 1).

    No attention mask: the padding is on the right, where causal attention cannot see it.
    """
    logits = model(input_ids=ids).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, samples: Samples, *, group_size: int, updates: int
) -> tuple[float, float]:
    """Train by GRPO: the clipped loss with advantages relative to the group, averaged over the tokens of all ranks.

    The engine's own log-probabilities are the behaviour policy, since the tokens were sampled from them.

    Returns:
        The gap, before any update and over all ranks, and the last gradient norm.

    Collective:
        Over the default group.
    """
    groups = samples.rewards.view(-1, group_size)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    advantages = advantages.view(-1, 1)
    num_tokens = samples.mask.sum().float()
    dist.all_reduce(num_tokens)
    gap = torch.zeros((), device=samples.ids.device)
    norm = 0.0
    for update in range(updates):
        difference = (trainer_log_probs(model, samples.ids) - samples.engine_log_probs) * samples.mask
        if update == 0:
            gap = difference.detach().abs().max()
        ratio = difference.exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
        # FSDP averages the gradients over the ranks; the mean wanted here is over tokens.
        loss = -(gain * samples.mask).sum() * dist.get_world_size() / num_tokens
        optimizer.zero_grad()
        loss.backward()
        total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm = (total.full_tensor() if hasattr(total, "full_tensor") else total).item()
        optimizer.step()
    dist.all_reduce(gap, op=dist.ReduceOp.MAX)
    return gap.item(), norm


def run(args: argparse.Namespace, *, device: torch.device) -> list[Row]:
    """Run the demo, from the model to the last step."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if args.prompts % world_size:
        raise ValueError(f"--prompts {args.prompts} cannot be shared evenly by {world_size} ranks")
    folder = args.out / "model" if args.model is None else args.model
    if args.model is None and rank == 0:
        size = SMALL if args.device == "cuda" else TINY
        warm_start(folder, seed=args.seed, target=0.25, size=size, device=args.device)
    dist.barrier()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_trainer(folder, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(1000 * args.seed + rank)
    server = {**(CPU_SERVER if device.type == "cpu" else CUDA_SERVER), **args.server_args}
    rows: list[Row] = []
    colo = tpcolocate.init(args.tp_size, device=device)
    try:
        with (
            colo.launch(str(folder), **server) as engine,
            tqdm(total=args.steps, desc="grpo", unit="step", dynamic_ncols=True, disable=rank != 0) as progress,
        ):
            if rank == 0:
                progress.write(Row.HEADER)
            for step in range(args.steps):
                started = time.monotonic()
                samples = sample(engine, tokenizer, args=args, generator=generator, device=device)
                mean_reward = samples.rewards.mean()
                dist.all_reduce(mean_reward)
                sampled = time.monotonic()
                if args.sleep:
                    engine.sleep()
                begun = time.monotonic()
                slept = begun - sampled
                gap, norm = train(model, optimizer, samples, group_size=args.group_size, updates=args.updates)
                trained = time.monotonic()
                seconds, num_bytes = 0.0, 0
                if args.sleep:
                    engine.wake(["weights"])
                if args.sync:
                    report = engine.sync_weights(model)
                    seconds, num_bytes = report.seconds, report.num_bytes
                if args.sleep:
                    engine.wake()
                woken = time.monotonic() - trained - seconds if args.sleep else 0.0
                rows.append(
                    Row(
                        step=step,
                        reward=mean_reward.item() / world_size,
                        gap=gap,
                        sync_seconds=seconds,
                        sync_bytes=num_bytes,
                        generate_seconds=sampled - started,
                        train_seconds=trained - begun,
                        sleep_seconds=slept,
                        wake_seconds=woken,
                        grad_norm=norm,
                    )
                )
                if rank == 0:
                    progress.write(str(rows[-1]))
                progress.update()
                progress.set_postfix(reward=f"{rows[-1].reward:.2f}", gap=f"{gap:.0e}")
    finally:
        colo.close()
    return rows


def plot(rows: list[Row], path: Path, *, title: str) -> None:
    """Plot reward, gap and seconds against the step; the gap on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower, last = figure.subplots(3, 1, sharex=True)
    steps = [row.step for row in rows]
    upper.plot(steps, [row.reward for row in rows], marker=".")
    upper.set(title=title, ylabel="reward", ylim=(0, 1))
    lower.semilogy(steps, [max(row.gap, 1e-9) for row in rows], marker=".", color="tab:red")
    # Fixed, so that noise looks like noise: a stale engine is off by whole units.
    lower.set(ylabel="largest |engine - trainer|\nof a log-probability", ylim=(1e-8, 1e2))
    bottom = [0.0] * len(rows)
    for phase in PHASES:
        seconds = [getattr(row, f"{phase}_seconds") for row in rows]
        last.bar(steps, seconds, bottom=bottom, width=1.0, label=phase)
        bottom = [a + b for a, b in zip(bottom, seconds)]
    # The first steps compile kernels and trace the loader: they may be cut off.
    last.set(xlabel="step", ylabel="seconds of a step", ylim=(0, 1.5 * sorted(bottom)[len(bottom) // 2]))
    figure.legend(*last.get_legend_handles_labels(), loc="outside lower center", ncols=len(PHASES))
    for axes in (upper, lower, last):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def finish(rows: list[Row], args: argparse.Namespace, *, seconds: float) -> None:
    """Write the plot and the JSON, and print a summary."""
    name = "grpo" if args.sync else "grpo-no-sync"
    edge = min(5, len(rows))
    summary = {
        "first_reward": sum(row.reward for row in rows[:edge]) / edge,
        "last_reward": sum(row.reward for row in rows[-edge:]) / edge,
        "max_gap": max(row.gap for row in rows),
        "seconds": seconds,
        "args": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "rows": [asdict(row) for row in rows],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(
        rows,
        args.out / f"{name}.png",
        title=f"GRPO, tp = {args.tp_size}, {'sync every step' if args.sync else 'no sync'}",
    )
    print(f"reward   {summary['first_reward']:.3f} -> {summary['last_reward']:.3f}  (means of {edge} steps)")
    print(f"max gap  {summary['max_gap']:.1e}")
    phases = {name: sorted(getattr(row, f"{name}_seconds") for row in rows)[len(rows) // 2] for name in PHASES}
    print("a step   " + ", ".join(f"{name} {found:.2f} s" for name, found in phases.items()) + "  (medians)")
    print(f"seconds  {seconds:.0f}, in total")
    print(f"written  {args.out / name}.json, {args.out / name}.png")


def main() -> None:
    args = parse_args()
    started = time.monotonic()
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        # The ranks and the engine's workers share the cores: more threads only wait for one another.
        torch.set_num_threads(1)
        backend = "gloo"
    dist.init_process_group(backend)
    try:
        rows = run(args, device=device)
        if dist.get_rank() == 0:
            finish(rows, args, seconds=time.monotonic() - started)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
