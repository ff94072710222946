"""Train one step with trainers of the TRL on the path, on `use_sglang` with an engine that makes tokens up.

Arguments: a model's folder, and the file that gets the results as JSON: for each trainer what it logged, or its error.
"""

import json
import sys
import tempfile
import traceback
from types import SimpleNamespace
from unittest import mock

import torch
from datasets import Dataset

import tpcolocate.trl
from tpcolocate.trl import engines, generation

PROMPTS = ["what is 1 plus 2?", "what is 3 plus 4?"]


class Engine:
    """Answers as a server does, with random tokens."""

    def __init__(self):
        self.calls = []

    def sync_weights(self, model):
        self.calls.append("sync")

    def sleep(self):
        self.calls.append("sleep")

    def wake(self, tags=None):
        self.calls.append("wake")

    def generate(self, prompts, sampling_params, *, timeout_s, **fields):
        self.calls.append("generate")
        answers = []
        for _ in prompts:
            ids = torch.randint(10, 400, (4,)).tolist()
            scored = [(-1.0, each, None) for each in ids]
            answers.append({"output_ids": ids, "meta_info": {"output_token_logprobs": scored}})
        return answers

    def shutdown(self, wait=True):
        self.calls.append("shutdown")


def num_unique_chars(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


def settings(folder):
    return {
        "output_dir": folder, "max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "use_vllm": True, "vllm_mode": "colocate",
        "vllm_enable_sleep_mode": True, "per_device_train_batch_size": 2,
    }  # fmt: skip


def grpo(trl, model, folder):
    config = trl.GRPOConfig(**settings(folder), num_generations=2, max_completion_length=8)
    data = Dataset.from_dict({"prompt": PROMPTS})
    return lambda: trl.GRPOTrainer(model=model, reward_funcs=num_unique_chars, args=config, train_dataset=data)


def rloo(trl, model, folder):
    config = trl.RLOOConfig(**settings(folder), num_generations=2, max_completion_length=8)
    data = Dataset.from_dict({"prompt": PROMPTS})
    return lambda: trl.RLOOTrainer(model=model, reward_funcs=num_unique_chars, args=config, train_dataset=data)


def distillation(trl, model, folder):
    """It looks for vLLM before it builds its generation."""
    config = trl.DistillationConfig(**settings(folder), max_completion_length=8)
    data = Dataset.from_dict({"prompt": PROMPTS})
    return lambda: trl.DistillationTrainer(model=model, teacher_model=model, args=config, train_dataset=data)


def train(make, trl, model):
    engine = Engine()
    colo = SimpleNamespace(
        device=torch.device("cpu"), slice_index=0, launch=lambda path, **args: engine, close=lambda: None
    )
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(model_config=SimpleNamespace(max_model_len=512))
    )  # asked of a server
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(engines, "init", return_value=colo),
        mock.patch.object(generation.SGLangGeneration, "llm", llm),
    ):
        built = make(trl, model, folder)
        with tpcolocate.trl.use_sglang() as made:
            trainer = built()
        is_ours = isinstance(trainer.vllm_generation, generation.SGLangGeneration)
        trains = True
        try:
            trainer.train()
        except RuntimeError as error:
            # A kernel that needs a GPU; generating comes before it.
            trains = "active drivers" not in str(error)
            if trains:
                raise
        made.shutdown()
    logged = sorted({name for row in trainer.state.log_history for name in row})
    return {"calls": engine.calls, "is_ours": is_ours, "trains": trains, "logged": logged}


def main():
    model, out = sys.argv[1:]
    import trl

    found = {"version": trl.__version__, "file": trl.__file__}
    for make in (grpo, rloo, *([distillation] if hasattr(trl, "DistillationTrainer") else [])):
        try:
            found[make.__name__] = train(make, trl, model)
        except Exception:
            found[make.__name__] = {"error": traceback.format_exc()}
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
