"""GRPO by TRL on a real engine: an ordinary TRL script, and one line that puts SGLang in the place of vLLM.

    torchrun --standalone --nproc-per-node 2 examples/trl_grpo.py
    torchrun --standalone --nproc-per-node 2 examples/trl_grpo.py --lora --sleep
    torchrun --standalone --nproc-per-node 2 examples/trl_grpo.py --device cuda --sleep

After each step rank 0 prints the reward and the *gap*: the largest difference between the log-probability with which
a token was sampled and the trainer's, over all ranks.  TRL logs it as ``sampling/sampling_logp_difference/max``.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from addition import SMALL, TINY, prompt_text, reward, sample_problems, warm_start
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import tpcolocate.trl

CPU_SERVER = {"max_total_tokens": 8192}


class PrintGap(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "reward" in logs:
            gap = logs["sampling/sampling_logp_difference/max"]
            print(f"step {state.global_step:3d}  reward {logs['reward']:.3f}  gap {gap:.1e}", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument(
        "--model", type=Path, default=None, help="default: a tiny one, or a small one for GPUs, made here"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lora", action="store_true", help="train an adapter by peft")
    parser.add_argument("--sleep", action="store_true", help="the server releases its memory while the ranks train")
    parser.add_argument("--server-args", type=json.loads, default={}, help="more SGLang arguments, as JSON")
    parser.add_argument("--out", type=Path, default=Path("out/trl"), help="folder for the model and the log")
    return parser.parse_args()


def main() -> None:
    train(parse_args())
    # The trainer's DDP goes first: if Python drops the last reference to a gloo group with it, torch may never return.
    gc.collect()
    dist.destroy_process_group()


def train(args: argparse.Namespace) -> None:
    if args.device == "cpu":
        # The ranks and the engine's workers share the cores: more threads only wait for one another.
        torch.set_num_threads(1)
    config = GRPOConfig(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=8,
        learning_rate=(3e-3 if args.lora else 3e-4) / (10 if args.device == "cuda" else 1),
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=args.device == "cpu",
        bf16=args.device == "cuda",
        model_init_kwargs={"dtype": "float32"},
        use_vllm=True,
        vllm_mode="colocate",
        vllm_tensor_parallel_size=args.tp_size,
        vllm_enable_sleep_mode=args.sleep,
    )
    folder = args.model
    if folder is None:
        folder = args.out / "model"
        if PartialState().is_main_process:
            size = SMALL if args.device == "cuda" else TINY
            warm_start(folder, seed=0, target=0.25, size=size, device=args.device)
        PartialState().wait_for_everyone()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = sample_problems(1024, digits=2, generator=torch.Generator().manual_seed(0))
    dataset = Dataset.from_list([{"prompt": prompt_text(each, shots=[]), "problem": each} for each in problems])

    def right(completion_ids, problem, **kwargs):
        return [reward(each, ids, tokenizer) for ids, each in zip(completion_ids, problem)]

    with tpcolocate.trl.use_sglang(**(CPU_SERVER if args.device == "cpu" else {}), **args.server_args):
        trainer = GRPOTrainer(
            model=str(folder),
            reward_funcs=right,
            args=config,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules="all-linear") if args.lora else None,
            callbacks=[PrintGap()],
        )
    trainer.train()
    if trainer.is_world_process_zero():
        (args.out / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


if __name__ == "__main__":
    main()
