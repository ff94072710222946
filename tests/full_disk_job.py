"""A job whose log and /dev/shm run out of space; run by test_full_disk.py, under torchrun in a mount namespace of its own.

    torchrun --nproc-per-node 2 full_disk_job.py MODEL DISK FOLDER

DISK and /dev/shm are small file systems.  Writes FOLDER/rank.json: what was seen, by name.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import tpcolocate

SERVER = {"skip_tokenizer_init": True, "context_length": 128, "max_total_tokens": 1024, "max_running_requests": 4}
PROMPT = [3, 1, 4, 1, 5]


def fill(folder, *, leave=0):
    """On rank 0: take all space of a file system but `leave` bytes."""
    if dist.get_rank() == 0:
        space = os.statvfs(folder)
        with open(folder / "filler", "wb") as file:
            file.write(b"\0" * max(0, space.f_bavail * space.f_frsize - leave))
        assert os.statvfs(folder).f_bavail * space.f_frsize <= leave
    dist.barrier()


def outcome(call, *args, **kwargs):
    """What a call returns, or its error: [class, message, hint]."""
    try:
        return call(*args, **kwargs)
    except tpcolocate.errors.TpColocateError as error:
        return [type(error).__name__, error.message, error.hint]


def tokens(engine, model):
    """Of the engine, and of the trainer."""
    [answer] = engine.generate([PROMPT], {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True})
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return [answer["output_ids"], ids[0, len(PROMPT) :].tolist()]


def step(model, seed):
    """Other weights, the same on every rank."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def main():
    model_path, disk, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    shm = Path("/dev/shm")
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(model_path)
    seen = {}
    shm_before = os.listdir(shm)
    with tpcolocate.init(2, device="cpu", timeout_s=120.0) as colo:
        fill(disk)
        log = disk / "server.log"
        with colo.launch(model_path, log_path=log, health_timeout_s=240.0, **SERVER) as engine:
            seen["launch"] = engine.sglang_version
        if dist.get_rank() == 0:
            (disk / "filler").unlink()
        dist.barrier()
        with colo.launch(model_path, log_path=log, health_timeout_s=240.0, **SERVER) as engine:
            fill(disk)
            step(model, 1)
            seen["sync, full log"] = engine.sync_weights(model).num_verified
            seen["tokens, full log"] = tokens(engine, model)
            fill(shm, leave=16384)
            step(model, 2)
            seen["sync, full /dev/shm"] = outcome(engine.sync_weights, model)
            seen["version"] = engine.weight_version
            dist.barrier()
            if dist.get_rank() == 0:
                (shm / "filler").unlink()
            dist.barrier()
            seen["sync, space"] = engine.sync_weights(model).num_verified
            seen["tokens, space"] = tokens(engine, model)
    dist.barrier()
    if dist.get_rank() == 0:
        seen["left in /dev/shm"] = [name for name in os.listdir(shm) if name not in shm_before]
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
