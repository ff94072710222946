"""TRL's trainers, the Trainer of transformers, their examples and the blocks of their page on a real server.

One server serves all trainers of `drive`, in order: starting one takes half a minute on two cores.  That `use_sglang`
starts a server itself is tested by the example.
"""

import contextlib
import functools
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from harness import run_ranks
from test_docs import snippets
from test_engine import HEALTH_S, checked
from test_examples import run_example
from test_snippets import lasting

import tpcolocate
import tpcolocate.trl
from tpcolocate.trl import engines, use_sglang
from tpcolocate.trl.arguments import CPU_TOKENS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1300)]

DEADLINE_S = 900.0
STEPS = 3
CONTEXT = 256
PROMPTS = [f"what is {n} plus {n + 3}?" for n in range(16)]
# Float32 on both sides; old weights are off by more than 1e-2.
NOISE = 1e-3


# --- one rank ---------------------------------------------------------------------------------------------------------


class World:
    """What the checks share on one rank.

    Attributes:
        launches: Server arguments that `use_sglang` would have launched with.
    """

    def __init__(self, rank, model_dir, out, colo, engine):
        self.rank, self.model_dir, self.out, self.colo, self.engine = rank, model_dir, out, colo, engine
        self.launches = []

    @contextlib.contextmanager
    def use_sglang(self, **arguments):
        """`use_sglang` with the engine that is there."""

        def launch(path, **server_args):
            self.launches.append({"path": path, **server_args})
            return self.engine

        def init(tp_size, *, device, timeout_s):
            assert (tp_size, torch.device(device).type) == (self.colo.tp_size, "cpu")
            return SimpleNamespace(device=self.colo.device, slice_index=0, launch=launch, close=lambda: None)

        with mock.patch.object(engines, "init", init), use_sglang(**arguments) as made:
            # The server outlives the trainers.
            with mock.patch.object(made, "shutdown", lambda wait=True: None):
                yield made


@contextlib.contextmanager
def accelerate_anew():
    """A trainer's own state of accelerate."""
    from accelerate.state import AcceleratorState, GradientState

    try:
        yield
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def settings(world, *, shards=False, **more):
    sharding = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}}
    return {
        "output_dir": str(world.out / "trainer"), "max_steps": STEPS, "per_device_train_batch_size": 4,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        **(sharding if shards else {}), **more,
    }  # fmt: skip


def mean_char(completions, **kwargs):
    """Hardly ever the same for all completions of a prompt, of which there would be no gradient."""
    return [sum(map(ord, completion)) / (100.0 * max(1, len(completion))) for completion in completions]


def rl_trainer(world, kind, *, shards=False, lora=False, **more):
    """A trainer as a user makes it, in the block of `use_sglang`."""
    import trl
    from accelerate.utils import DistributedType
    from datasets import Dataset
    from peft import LoraConfig

    config, trainer = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[kind]
    args = config(**settings(
        world, shards=shards, num_generations=4, max_completion_length=6, use_vllm=True, vllm_mode="colocate",
        vllm_tensor_parallel_size=2, model_init_kwargs={"dtype": "float32"}, **more,
    ))  # fmt: skip
    if shards:
        # On CPUs accelerate knows only DDP: it shards, on CPUs too, if it takes the ranks' devices for GPUs.
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return trainer(
        model=str(world.model_dir),
        reward_funcs=mean_char,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )


def trained(world, kind, *, shards=False, **more):
    """Train, and return what was logged and what became of the server's weights."""
    from torch.distributed.tensor import DTensor

    before = world.engine.weight_version
    with accelerate_anew():
        with world.use_sglang():
            trainer = rl_trainer(world, kind, shards=shards, **more)
        trainer.train()
        return {
            "logs": [row for row in trainer.state.log_history if "reward" in row],
            "versions": (before, world.engine.weight_version),
            "sharded": any(isinstance(p, DTensor) for p in trainer.model.parameters()),
            "report": trainer.vllm_generation.report,
            "max_model_len": trainer.vllm_generation.llm.llm_engine.model_config.max_model_len,
            "health": world.engine.health().value,
        }


# --- checks: run on every rank, return what the test asserts on -------------------------------------------------------


def grpo_under_ddp(world):
    return {**trained(world, "grpo"), "launch": world.launches[-1]}


def grpo_under_fsdp2(world):
    return trained(world, "grpo", shards=True)


def rloo_under_fsdp2_without_logprobs(world):
    return trained(world, "rloo", shards=True)


def grpo_with_lora(world):
    return trained(world, "grpo", lora=True)


def grpo_with_lora_under_fsdp2(world):
    return trained(world, "grpo", shards=True, lora=True)


def top_logprobs_beside_the_sampled_tokens(world):
    """What the trainers that compare with a teacher ask for."""
    from tpcolocate.trl.generation import SGLangGeneration

    generation = SGLangGeneration(
        world.engine, model=torch.nn.Linear(1, 1), accelerator=None, timeout_s=60.0, sleeps=False, logprobs=2,
        sampling_params={"max_new_tokens": 4, "temperature": 0.0},
    )  # fmt: skip
    return generation.generate(prompts=[[5, 6], [7, 8, 9]], images=None, num_generations=1)


def a_callback_of_the_trainer(world):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    from tpcolocate.hf import GenerationCallback

    tokenizer = AutoTokenizer.from_pretrained(world.model_dir)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(["what is 1 plus 2?"] * 32)["input_ids"]]
    seen = []

    def score(prompts, answers):
        """The gap to the trainer's model, and how many prompts this rank has."""
        gaps = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([prompt + answer["output_ids"]])
            with torch.no_grad():
                logits = trainer.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            trainers = logits.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
            engines = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
            gaps.append((trainers - engines).abs().max().item())
        seen.append(len(prompts))
        return {"gap": sum(gaps) / len(gaps), "share": float(len(prompts))}

    with accelerate_anew():
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(world.model_dir, dtype=torch.float32),
            args=TrainingArguments(**settings(world, remove_unused_columns=False) | {"max_steps": 4}),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        before = world.engine.weight_version
        trainer.add_callback(GenerationCallback(
            trainer, world.engine, [[5, 6], [7, 8, 9], [10]], {"max_new_tokens": 4, "temperature": 0},
            score=score, every_steps=2, sleep=True, return_logprob=True,
        ))  # fmt: skip
        trainer.train()
        return {
            "figures": [row for row in trainer.state.log_history if "eval_gap" in row],
            "versions": (before, world.engine.weight_version),
            "shares": seen,
            "health": world.engine.health().value,
        }


def grpo_with_sleep(world):
    """Leaves the server asleep."""
    world.engine.wake()
    return {**trained(world, "grpo", vllm_enable_sleep_mode=True), "launch": world.launches[-1]}


def blocks_of_the_pages(world):
    """Runs what docs/integrations.md and the README show, in order; returns what each has done to the server.

    The configurations that the pages leave to the reader are those of the other checks.
    """
    import accelerate
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

    rl = settings(world, num_generations=4, max_completion_length=6, vllm_tensor_parallel_size=2)
    rl["model_init_kwargs"] = {"dtype": "float32"}
    grpo_config = trl.GRPOConfig

    def config(**given):
        return grpo_config(**{**rl, **given})

    ids = AutoTokenizer.from_pretrained(world.model_dir)("what is 1 plus 2?")["input_ids"]
    rows = [{"input_ids": ids, "labels": ids}] * 32
    found = []
    for page, line, source in blocks_to_run():
        world.engine.wake()  # the block before may have left the server asleep
        launched, before = [], world.engine.weight_version
        colo, engine = lasting(world.colo, world.engine, launched)
        model = AutoModelForCausalLM.from_pretrained(world.model_dir, dtype=torch.float32)
        names = {
            "tpcolocate": tpcolocate,
            "path": str(world.model_dir),
            "model": model,
            "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
            "prompts": [[5, 6], [7, 8, 9]],
            "loader": [{"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}] * 2,
            "dataset": Dataset.from_dict({"prompt": PROMPTS}) if "use_sglang" in source else Dataset.from_list(rows),
            "reward": mean_char,
            "GRPOConfig": config,
            "GRPOTrainer": trl.GRPOTrainer,
        }
        with (
            accelerate_anew(),
            mock.patch.object(trl, "GRPOConfig", config),
            # On CPUs it looks for other ranks only if asked to.
            mock.patch.object(accelerate, "Accelerator", functools.partial(accelerate.Accelerator, cpu=True)),
            mock.patch.object(tpcolocate, "init", mock.Mock(return_value=colo)),
            mock.patch.object(tpcolocate.trl, "use_sglang", world.use_sglang),
        ):
            # As many steps as the callback of the page waits for.
            names["args"] = TrainingArguments(**settings(world) | {"max_steps": 100, "logging_steps": 50})
            exec(compile(source, f"{page}:{line}", "exec"), names)
        answers = names.get("answers")
        found.append({
            "block": source, "launched": launched, "versions": (before, world.engine.weight_version),
            "logs": names["trainer"].state.log_history if "trainer" in names else None,
            "steps": names["trainer"].args.max_steps if "trainer" in names else None,
            "num_answers": None if answers is None else len(answers),
        })  # fmt: skip
    return found


def blocks_to_run():
    on_page = [("docs/integrations.md", line, source) for line, source in snippets("docs/integrations.md")]
    in_readme = [("README.md", line, source) for line, source in snippets("README.md") if "use_sglang" in source]
    assert len(on_page) == 3 and len(in_readme) == 1, "a block is gone, or is not run"
    return on_page + in_readme


CHECKS = (
    grpo_under_ddp,
    grpo_under_fsdp2,
    rloo_under_fsdp2_without_logprobs,
    grpo_with_lora,
    grpo_with_lora_under_fsdp2,
    top_logprobs_beside_the_sampled_tokens,
    a_callback_of_the_trainer,
    grpo_with_sleep,
    blocks_of_the_pages,
)


def drive(rank, model_dir, out):
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    with tpcolocate.init(2, device="cpu", timeout_s=120.0) as colo:
        args = {"context_length": CONTEXT, "max_total_tokens": 4096, "max_running_requests": 16}
        with colo.launch(model_dir, health_timeout_s=HEALTH_S, **args) as engine:
            return checked(World(rank, model_dir, Path(out), colo, engine), CHECKS)


@pytest.fixture(scope="module")
def ranks(tiny_model_dir, tmp_path_factory):
    return run_ranks(drive, 2, str(tiny_model_dir()), str(tmp_path_factory.mktemp("trl")), timeout_s=DEADLINE_S)


@pytest.fixture
def found(ranks):
    """What a check found on both ranks; raises what it raised."""

    def of(check):
        results = [rank[check.__name__] for rank in ranks]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    return of


# --- tests ------------------------------------------------------------------------------------------------------------


def versions_between(result):
    first, last = (0 if version == "default" else int(version) for version in result["versions"])
    return last - first


def assert_the_server_followed(result, *, steps=STEPS):
    logs = result["logs"]
    assert [row["step"] for row in logs] == list(range(1, steps + 1))
    assert all(float(row["grad_norm"]) > 0 for row in logs), "the weights did not change"
    assert versions_between(result) == steps
    assert result["report"].num_verified > 0


def assert_sampled_as_trained(result):
    assert_the_server_followed(result)
    for row in result["logs"]:
        assert 0 < row["sampling/sampling_logp_difference/max"] < NOISE
        assert abs(row["sampling/importance_sampling_ratio/mean"] - 1) < NOISE


def test_grpo_samples_from_what_it_trains(found):
    for result in found(grpo_under_ddp):
        assert_sampled_as_trained(result)
        assert result["max_model_len"] == CONTEXT
        launch = result["launch"]
        assert (launch["max_running_requests"], launch["max_total_tokens"]) == (8, CPU_TOKENS)
        assert "enable_memory_saver" not in launch and "mem_fraction_static" not in launch


def test_grpo_under_fsdp2_of_accelerate(found):
    for result in found(grpo_under_fsdp2):
        assert result["sharded"]
        assert_sampled_as_trained(result)


def test_rloo_wants_no_logprobs(found):
    for result in found(rloo_under_fsdp2_without_logprobs):
        assert result["sharded"]
        assert_the_server_followed(result)


def test_grpo_with_a_lora(found):
    for result in found(grpo_with_lora):
        assert_sampled_as_trained(result)


def test_grpo_with_a_lora_under_fsdp2_of_accelerate(found):
    for result in found(grpo_with_lora_under_fsdp2):
        assert_sampled_as_trained(result)
        assert result["sharded"]


def test_grpo_with_sleep_mode(found):
    for result in found(grpo_with_sleep):
        assert_sampled_as_trained(result)
        assert result["health"] == "asleep", "it sleeps whenever it does not generate"
        assert "enable_memory_saver" not in result["launch"], "a CPU has no memory saver"


def test_top_logprobs_come_in_order_with_their_tokens(found):
    for prompts, completions, logprobs, token_ids in found(top_logprobs_beside_the_sampled_tokens):
        assert prompts == [[5, 6], [7, 8, 9]]
        for completion, values, ids in zip(completions, logprobs, token_ids, strict=True):
            assert len(completion) == len(values) == len(ids)
            for token, row, row_ids in zip(completion, values, ids, strict=True):
                assert row == sorted(row, reverse=True) and len(row) == len(row_ids) == 2
                assert row_ids[0] == token, "greedy"


def test_a_callback_logs_what_the_current_weights_generate(found):
    first, second = found(a_callback_of_the_trainer)
    assert [row["step"] for row in first["figures"]] == [2, 4]
    assert first["figures"] == second["figures"], "means over all ranks"
    assert (first["shares"], second["shares"]) == ([2, 2], [1, 1])
    for row in first["figures"]:
        assert 0 < row["eval_gap"] < NOISE
        assert row["eval_share"] == pytest.approx((2 * 2 + 1 * 1) / 3)
    assert versions_between(first) == 2
    assert first["health"] == "asleep"


def test_the_blocks_of_the_pages_run(found):
    for trl_on_page, callback, loop, trl_in_readme in found(blocks_of_the_pages):
        for block in (trl_on_page, trl_in_readme):
            rewards = [row for row in block["logs"] if "reward" in row]
            assert len(rewards) == versions_between(block) == block["steps"]
        assert (trl_on_page["steps"], trl_in_readme["steps"]) == (STEPS, 3)
        assert [row["step"] for row in callback["logs"] if "eval_length" in row] == [100]
        assert len(callback["launched"]) == 1 and versions_between(callback) == 1
        assert loop["num_answers"] == 2 and len(loop["launched"]) == 1 and versions_between(loop) == 2


# --- examples ---------------------------------------------------------------------------------------------------------


def test_the_trl_example_starts_its_own_server(tiny_model_dir, tmp_path, no_leftovers):
    printed = run_example("trl_grpo.py", tmp_path, "--model", str(tiny_model_dir()), "--steps", "2", "--sleep")
    rows = [row for row in json.loads((tmp_path / "log.json").read_text()) if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["sampling/sampling_logp_difference/max"] < NOISE for row in rows)
    assert printed.count("gap ") == 2
    assert "was not shut down" not in printed, "a TRL script has nothing to shut down"


def test_the_accelerate_example_under_fsdp2(tmp_path, no_leftovers):
    printed = run_example("accelerate_sft.py", tmp_path, "--steps", "4", "--every", "2", "--fsdp2")
    gaps = [float(line.split("gap ")[1].split()[0]) for line in printed.splitlines() if line.startswith("step ")]
    assert len(gaps) == 2 and all(0 < gap < NOISE for gap in gaps)
