"""The documentation's Python blocks are run: on two ranks and one real server, which answers for every launch in them.

Those of docs/integrations.md run in test_trl.py.
"""

import asyncio
import copy
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import run_ranks
from test_docs import snippets
from test_engine import ARGS, HEALTH_S
from tiny_models import make_tiny_model

import tpcolocate
from tpcolocate.server.arguments import check_installed, server_arguments
from tpcolocate.server.installed import find_installed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PAGES = (
    "docs/guide.md",
    "docs/start.md",
    "docs/howto/asynchronous.md",
    "docs/howto/off_policy.md",
    "docs/howto/ray.md",
)
# Blocks that do not run here, by a line of theirs.
LEFT_OUT = {
    "torch.cuda.set_device(local_rank)": "needs GPUs",
    "@ray.remote(num_gpus=1)": "needs Ray",
    "group = tpcolocate.join_update_group(": "the sender's half; test_engine_calls runs both",
    "engine.destroy_weights_update_group()": "needs that sender",
    "recorder = Recorder(colo)": "reads recordings of four ranks; test_recorder has the calls",
    "engine.restart(model)": "ends the server; test_engine_restart has it",
    'dist.init_process_group("gloo")': "the set-up that all blocks run in",
}
# What a block that only defines something is tried with.
TRIED = {
    "async def collect(": "asyncio.run(collect(['a', 'b'], params))",
    "def trainer_log_probs(": "trainer_log_probs(torch.randn(3, 8), torch.tensor([1, 2, 3]), 0.5)",
    "def token_log_probs(": "corrected(torch.ones(3), torch.zeros(3), torch.ones(3))",
}
LORA = {
    "enable_lora": True,
    "max_lora_rank": 16,
    "lora_target_modules": ["q_proj", "v_proj"],
    "lora_backend": "torch_native",
}


class Lasting:
    """An object that a block may leave or shut down, and the next one still finds."""

    def __init__(self, target, **replaced):
        self._target, self._replaced = target, replaced

    def __getattr__(self, name):
        return self._replaced[name] if name in self._replaced else getattr(self._target, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def lasting(real, real_engine, launched):
    """A `colo` and an engine for blocks: every launch gives this engine, if its arguments would work on GPUs.

    Args:
        launched: Gets what each launch was called with.
    """

    def launch(path, **arguments):
        checked = server_arguments(arguments, tp_size=2, device_type="cuda", shared_device=False)
        checked.pop("enable_memory_saver", None)  # a package that a CPU cannot use
        check_installed(checked, find_installed(os.environ))
        launched.append(os.fspath(path))
        return engine

    engine = Lasting(real_engine, shutdown=lambda **options: None)
    return Lasting(real, launch=launch, close=lambda: None), engine


def drive(rank, model_dir, folder, blocks):
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    os.chdir(folder)  # a block writes into the current one
    with (
        tpcolocate.init(2, device="cpu", timeout_s=120.0) as real,
        real.launch(model_dir, health_timeout_s=HEALTH_S, **ARGS, **LORA) as real_engine,
    ):
        launched = []
        colo, engine = lasting(real, real_engine, launched)
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        tpcolocate.init = lambda *arguments, **options: colo  # this process runs nothing else
        failed = []
        for page, line, source in blocks:
            names = names_for_blocks(copy.deepcopy(base), model_dir, colo, engine) | {"fully_shard": fully_shard}
            try:
                exec(compile(source, f"{page}:{line}", "exec"), names)
                for beginning, trial in TRIED.items():
                    if beginning in source:
                        exec(trial, names)
            except Exception as error:
                failed.append(f"{page}:{line}: {type(error).__name__}: {error}")
        return failed, launched, real_engine.weight_version


def names_for_blocks(model, path, colo, engine):
    """What the pages say, or show elsewhere, that their blocks find."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    def loss_of(model, prompts, answers):
        assert len(answers) == len(prompts)  # which differ between the ranks, whose models must not
        return sum(model(input_ids=torch.tensor([one]), labels=torch.tensor([one])).loss for one in prompts)

    def train_step(model, answers):
        return loss_of(model, prompts, answers)

    prompts = [[5, 6, 7], [8, 9]]
    return {
        "asyncio": asyncio,
        "torch": torch,
        "tpcolocate": tpcolocate,
        "PATH": path,
        "path": path,
        "device": torch.device("cpu"),
        "model": model,
        "peft_model": peft_model,
        "tensors": get_peft_model_state_dict(peft_model),
        "config": peft_model.peft_config["default"],
        "prompts": prompts,
        "params": {"max_new_tokens": 4, "ignore_eos": True},
        "batches": [prompts, prompts],
        "loss_of": loss_of,
        "train_step": train_step,
        "colo": colo,
        "engine": engine,
        "job": colo.job,
        "trainer_logprobs": torch.zeros(2, 4),
        "wandb": SimpleNamespace(log=lambda figures, step: None),
        "writer": SimpleNamespace(add_scalar=lambda name, value, step: None),
        "step": 1,
        "LoraConfig": LoraConfig,
        "get_peft_model": get_peft_model,
    }


def blocks_to_run():
    found = [(page, line, source) for page in PAGES for line, source in snippets(page)]
    assert all(any(left in source for _, _, source in found) for left in [*LEFT_OUT, *TRIED]), "a block is gone"
    return [block for block in found if not any(left in block[2] for left in LEFT_OUT)]


def test_the_blocks_of_the_pages_run(tmp_path):
    blocks = blocks_to_run()
    assert len(blocks) >= 15
    model_dir = make_tiny_model(tmp_path / "model")
    found = run_ranks(drive, 2, str(model_dir), str(tmp_path), blocks, timeout_s=800)
    for failed, launched, version in found:
        assert not failed, "\n".join(failed)
        assert len(launched) >= 8
        assert int(version) >= 10
    assert Path(tmp_path / "step-700" / "config.json").is_file()
