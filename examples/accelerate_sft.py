"""A training loop by accelerate that generates with the weights of the moment, under DDP or FSDP2.

    torchrun --standalone --nproc-per-node 2 examples/accelerate_sft.py
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 examples/accelerate_sft.py --model PATH

On GPUs the configuration of accelerate decides how the model is sharded.  On CPUs accelerate knows only DDP; with
``--fsdp2`` the script shards the model itself, by the function that accelerate calls.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from addition import END, TINY, build_model, build_tokenizer, prompt_text, sample_problems
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import tpcolocate


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="steps from one evaluation to the next")
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--model", type=Path, default=None, help="default: a tiny random one, made here")
    parser.add_argument("--fsdp2", action="store_true", help="shard the model by fully_shard, on a CPU too")
    parser.add_argument("--out", type=Path, default=Path("out/accelerate"), help="folder for the tiny model")
    args = parser.parse_args()
    for name in ("steps", "every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def make_model(folder: Path) -> Path:
    tokenizer = build_tokenizer()
    build_model(TINY, eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def batch_of(tokenizer: PreTrainedTokenizerBase, texts: list[str], device: torch.device) -> dict[str, torch.Tensor]:
    """Return what the model takes for these texts, which a real tokenizer cuts into different numbers of tokens."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = padded["input_ids"].to(device), padded["attention_mask"].to(device)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def largest_gap(model: torch.nn.Module, prompts: list[list[int]], answers: list[dict], device: torch.device) -> float:
    """Compare the log-probabilities of greedy answers with those of the trainer."""
    gap = 0.0
    for prompt, answer in zip(prompts, answers):
        sampled = answer["output_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + sampled], device=device)).logits[0, len(prompt) - 1 : -1]
        trainers = logits.float().log_softmax(-1).gather(-1, torch.tensor(sampled, device=device)[:, None]).squeeze(-1)
        engines = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]], device=device)
        gap = max(gap, (trainers - engines).abs().max().item())
    return gap


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())  # on CPUs it looks for other ranks only if asked to
    device = accelerator.device
    on_cpu = device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    with accelerator.main_process_first():
        folder = args.model if args.model is not None else args.out / "model"
        if args.model is None and accelerator.is_main_process:
            make_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(accelerator.process_index)
    server_args = {"max_total_tokens": 4096} if on_cpu else {"mem_fraction_static": 0.4, "enable_memory_saver": True}

    with tpcolocate.init(args.tp_size, device=device) as colo, colo.launch(folder, **server_args) as engine:
        if on_cpu and args.fsdp2:
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        else:
            model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        engine.sleep()
        for step in range(1, args.steps + 1):
            problems = sample_problems(32, digits=2, generator=generator)
            texts = [(prompt_text(each, shots=[]) + str(sum(each)) + END).ljust(10, END) for each in problems]
            loss = model(**batch_of(tokenizer, texts, device)).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % args.every:
                continue
            if not on_cpu:
                torch.cuda.empty_cache()  # the server needs what the trainer has freed
            engine.wake(["weights"])
            report = engine.sync_weights(model)
            engine.wake()
            prompts = tokenizer([prompt_text(each, shots=[]) for each in problems[:4]])["input_ids"]
            answers = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 4}, return_logprob=True)
            engine.sleep()
            gap = accelerator.gather(torch.tensor([largest_gap(model, prompts, answers, device)], device=device)).max()
            accelerator.print(f"step {step:3d}  loss {loss.item():.3f}  gap {gap.item():.1e}  {report}", flush=True)
    # Before the process group, which DDP refers to: if Python drops the last reference to one of gloo, torch may never return.
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    main()
