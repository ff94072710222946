"""What `use_sglang` makes of TRL's settings, and what it changes in TRL; no server."""

import os
import re
import sys
import types
from collections import UserDict
from dataclasses import fields
from importlib import metadata
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from harness import run_ranks

import tpcolocate.trl
from tpcolocate.errors import ConfigError, RankFailedError
from tpcolocate.hf import GenerationCallback, weighted_means
from tpcolocate.trl import engines
from tpcolocate.trl.arguments import CPU_TOKENS, KEYWORDS, VllmArguments, check_constructor
from tpcolocate.trl.generation import SGLangGeneration, prepared_module, ranked_logprobs
from tpcolocate.trl.replacement import replaced

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, expected", [
    ({}, {"max_new_tokens": 16, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}),
    ({"top_k": 5, "min_p": None, "max_completion_length": 64, "temperature": 0.7},
     {"max_new_tokens": 64, "temperature": 0.7, "top_p": 1.0, "top_k": 5, "repetition_penalty": 1.0}),
    ({"max_completion_length": None, "min_p": None, "repetition_penalty": None},
     {"max_new_tokens": None, "temperature": 1.0, "top_p": 1.0, "top_k": -1}),
])  # fmt: skip
def test_sampling_parameters(given, expected):
    assert VllmArguments(**given).sampling() == (expected, 0)


@pytest.mark.parametrize("given, expected", [
    ({"seed": 3, "min_tokens": 2}, {"sampling_seed": 3, "min_new_tokens": 2}),
    ({"max_tokens": 9, "temperature": 0.5}, {"max_new_tokens": 9, "temperature": 0.5}),
    ({"stop": ["\n"], "n": 1}, {"stop": ["\n"]}),
    ({"top_k": 0}, {"top_k": -1}),
    ({"structured_outputs": {"json": {"type": "object"}}}, {"json_schema": '{"type": "object"}'}),
    ({"structured_outputs": {"grammar": "root ::= x"}}, {"ebnf": "root ::= x"}),
    ({"structured_outputs": {"regex": "a", "json": None}}, {"regex": "a"}),
])  # fmt: skip
def test_generation_kwargs_have_the_last_word_under_sglangs_names(given, expected):
    params, _ = VllmArguments(generation_kwargs=given).sampling()
    assert expected.items() <= params.items()
    assert not {"seed", "max_tokens", "min_tokens", "n", "structured_outputs"} & set(params)
    assert ("json_schema" in params) == ("json_schema" in expected)


def test_the_regex_of_the_config_comes_before_that_of_generation_kwargs():
    given = {"structured_outputs": {"regex": "b"}}
    params, _ = VllmArguments(structured_outputs_regex="a", generation_kwargs=given).sampling()
    assert params["regex"] == "a"


@pytest.mark.parametrize(
    "logprobs, given, expected", [(0, {}, 0), (None, {}, None), (5, {}, 5), (0, {"logprobs": 3}, 3)]
)
def test_the_number_of_logprobs(logprobs, given, expected):
    assert VllmArguments(logprobs=logprobs, generation_kwargs=given).sampling()[1] == expected


@pytest.mark.parametrize("given, named", [
    ({"n": 4}, "n=4"),
    ({"logprobs": "all"}, "logprobs"), ({"logprobs": -1}, "logprobs"),
    ({"bad_words": ["x"]}, "bad_words"),
    ({"structured_outputs": {"choice": ["a", "b"]}}, "choice"),
    ({"structured_outputs": object()}, "object"),
])  # fmt: skip
def test_generation_kwargs_without_a_counterpart_are_named(given, named):
    with pytest.raises(ConfigError, match=named):
        VllmArguments(generation_kwargs=given).sampling()


def test_server_arguments():
    arguments = VllmArguments(
        gpu_memory_utilization=0.4, max_model_length=512, max_num_seqs=32, enable_sleep_mode=True, trust_remote_code=True,
        model_impl="transformers",
    )  # fmt: skip
    assert arguments.server_args(device_type="cuda", seed=3) == {
        "random_seed": 3, "mem_fraction_static": 0.4, "context_length": 512, "max_running_requests": 32,
        "trust_remote_code": True, "model_impl": "transformers", "enable_memory_saver": True, "max_total_tokens": None,
    }  # fmt: skip
    left_out = VllmArguments(model_impl="vllm").server_args(device_type="cuda", seed=0)
    assert {name for name, value in left_out.items() if value is not None} == {"random_seed", "mem_fraction_static"}


def test_a_cpu_has_no_memory_saver_and_gets_a_small_cache_whatever_the_share_of_a_gpu():
    args = VllmArguments(enable_sleep_mode=True, gpu_memory_utilization=0.3).server_args(device_type="cpu", seed=0)
    given = {name: value for name, value in args.items() if value is not None}
    assert given == {"random_seed": 0, "max_total_tokens": CPU_TOKENS}


@pytest.mark.parametrize("given, named", [({"mode": "server"}, "server"), ({"model_impl": "terratorch"}, "terratorch")])
def test_settings_that_cannot_work_are_refused(given, named):
    with pytest.raises(ConfigError, match=named):
        VllmArguments(**given).check()


def test_the_size_of_a_slice():
    assert VllmArguments(tensor_parallel_size=4).tp_size(None) == 4
    assert VllmArguments().tp_size(2) == 2
    with pytest.raises(ConfigError, match="2.*4"):
        VllmArguments(tensor_parallel_size=4).tp_size(2)


# --- answers ----------------------------------------------------------------------------------------------------------


def meta(sampled, top=None):
    return {"output_token_logprobs": sampled, "output_top_logprobs": top}


def test_only_the_sampled_tokens_logprobs():
    assert ranked_logprobs(meta([(-0.5, 7, None), (-1.5, 8, None)]), 0) == [[(-0.5, 7)], [(-1.5, 8)]]


@pytest.mark.parametrize("sampled, expected", [
    ((-3.0, 9, None), [(-0.5, 1), (-1.0, 2), (-3.0, 9)]),
    ((-1.0, 2, None), [(-0.5, 1), (-1.0, 2)]),
])  # fmt: skip
def test_the_sampled_token_is_among_the_top_ones_in_any_case(sampled, expected):
    assert ranked_logprobs(meta([sampled], [[(-0.5, 1, None), (-1.0, 2, None)]]), 2) == [expected]


def test_numbers_that_are_none_become_none():
    assert ranked_logprobs(meta([(float("nan"), 1, None), (None, 2, None)]), 0) == [[(None, 1)], [(None, 2)]]


class Wrapper(torch.nn.Module):
    def __init__(self, inner, name):
        super().__init__()
        self.add_module(name, inner)


@pytest.mark.parametrize("name", ["module", "_orig_mod", "_fsdp_wrapped_module"])
def test_the_weights_are_those_that_accelerate_has_prepared(name):
    model, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    wrapped = Wrapper(Wrapper(model, name), "module")
    assert prepared_module(SimpleNamespace(_models=[Wrapper(other, name), wrapped, other]), model) is wrapped
    assert prepared_module(SimpleNamespace(_models=[other]), model) is model
    assert prepared_module(SimpleNamespace(_models=[]), model) is model


class RecordingEngine:
    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, *args))
            return (
                [{"output_ids": [4, 5], "meta_info": meta([(-1.0, 4, None), (-2.0, 5, None)])} for _ in args[0]]
                if name == "generate"
                else None
            )

        return call


def generation(engine, *, sleeps, logprobs=0, **sampling_params):
    return SGLangGeneration(
        engine, model=torch.nn.Linear(1, 1), accelerator=SimpleNamespace(_models=[]), sampling_params=sampling_params,
        logprobs=logprobs, sleeps=sleeps, timeout_s=9.0,
    )  # fmt: skip


def test_completions_as_the_trainers_unpack_them():
    made = generation(RecordingEngine(), sleeps=False)
    assert made.generate(prompts=[[1], [2, 3]], images=None, num_generations=2) == (
        [[1], [2, 3]], [[4, 5]] * 2, [[[-1.0], [-2.0]]] * 2, [[[4], [5]]] * 2,
    )  # fmt: skip
    assert generation(RecordingEngine(), sleeps=False, logprobs=None).generate([[1]], [None], 1) == (
        [[1]],
        [[4, 5]],
        None,
        None,
    )


@pytest.mark.parametrize("lengths, most, asked", [
    ((1, 4), 6, 6),
    ((1, 7), 6, [6, 3]),  # as in a tool loop, whose prompts grow
    ((9, 12), 6, [1, 1]),  # the engine refuses the second
    ((9, 12), None, None),
])  # fmt: skip
def test_a_completion_ends_where_the_context_does(lengths, most, asked, monkeypatch):
    engine = RecordingEngine()
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=10))
    monkeypatch.setattr(SGLangGeneration, "llm", SimpleNamespace(llm_engine=config))
    made = generation(engine, sleeps=False, max_new_tokens=most, temperature=1.0)
    made.generate([[3] * length for length in lengths], None, 1)
    (_, _, params) = engine.calls[-1]
    each = params if isinstance(params, list) else [params]
    assert all(one["temperature"] == 1.0 for one in each)
    given = [one["max_new_tokens"] for one in each]
    assert (given if isinstance(params, list) else given[0]) == asked


def test_images_are_refused():
    with pytest.raises(ConfigError, match="images"):
        generation(RecordingEngine(), sleeps=False).generate([[1]], [["image"]], 1)


def test_sleep_mode_wakes_for_what_is_needed_and_syncs_once_more_if_the_trainer_does_not():
    engine = RecordingEngine()
    made = generation(engine, sleeps=True)
    made.sync_weights()
    made.generate([[1]], None, 1)
    made.generate([[1]], None, 1)  # in the same step: the trainer does not sync again, and the weights are lost
    names = [call[0] if len(call) == 1 or call[0] in ("generate", "sync_weights") else call for call in engine.calls]
    asleep_to_answer = [("wake", ["weights"]), "sync_weights", "wake", "generate", "sleep"]
    assert names == ["sleep", *asleep_to_answer, *asleep_to_answer]


def test_a_rank_whose_generation_fails_sleeps_as_the_others_do():
    engine = RecordingEngine()
    engine.generate = mock.Mock(side_effect=ConfigError("prompt 0 is too long"))
    made = generation(engine, sleeps=True)
    made.sync_weights()
    with pytest.raises(ConfigError, match="too long"):
        made.generate([[1]], None, 1)
    assert engine.calls[-1] == ("sleep",) and made._weights_asleep
    engine.sleep = mock.Mock(side_effect=tpcolocate.EngineDeadError("it is gone"))
    with pytest.raises(ConfigError, match="too long"):
        made.generate([[1]], None, 1)


def test_without_sleep_mode_the_server_stays_awake():
    engine = RecordingEngine()
    made = generation(engine, sleeps=False)
    made.sync_weights()
    made.generate([[1]], None, 1)
    assert [call[0] for call in engine.calls] == ["sync_weights", "generate"]


# --- what is changed in TRL -------------------------------------------------------------------------------------------


def trl_globals():
    """Every global of a loaded module of TRL that `replaced` may change."""
    return {
        (name, each): vars(module)[each]
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "trl"
        for each in ("VLLMGeneration", "is_vllm_available")
        if each in vars(module)
    }


@pytest.fixture
def trainers():
    from trl.trainer import distillation_trainer, grpo_trainer, rloo_trainer

    return grpo_trainer, rloo_trainer, distillation_trainer


def test_trainers_build_what_replaces_the_class_and_only_inside_of_the_block(trainers):
    before, environment = trl_globals(), dict(os.environ)
    grpo, rloo, distillation = trainers

    def build(**kwargs):
        raise AssertionError

    with replaced(build):
        assert {module.VLLMGeneration for module in trainers} == {build}
        # As those that import it when they are built do.
        from trl.generation.vllm_generation import VLLMGeneration

        assert VLLMGeneration is build
    assert trl_globals() == before
    assert grpo.VLLMGeneration.__module__ == "trl.generation.vllm_generation"
    assert dict(os.environ) == environment


def test_an_exception_in_the_block_restores_trl_too(trainers):
    before = trl_globals()
    with pytest.raises(KeyError), replaced(lambda **kwargs: None):
        raise KeyError
    assert trl_globals() == before


def test_a_module_that_is_imported_inside_of_the_block_is_restored_as_well(trainers):
    from trl.generation import vllm_generation

    late = types.ModuleType("trl.imported_late")
    with mock.patch.dict(sys.modules, {late.__name__: late}):
        with replaced(lambda **kwargs: None):
            late.VLLMGeneration = vllm_generation.VLLMGeneration
            late.is_vllm_available = trainers[2].is_vllm_available
        assert late.VLLMGeneration is vllm_generation.VLLMGeneration
        assert late.is_vllm_available is sys.modules["trl.import_utils"].is_vllm_available


def call_is_available(module):
    """Ask as a function of the module does."""
    return eval("is_vllm_available()", vars(module))


def test_trainers_do_not_miss_vllm_and_nothing_else_is_made_to_import_it(trainers):
    from trl import import_utils

    asks = types.ModuleType("trl.asks")
    with mock.patch.dict(sys.modules, {asks.__name__: asks}):
        asks.is_vllm_available = import_utils.is_vllm_available
        assert not call_is_available(trainers[2])
        with replaced(lambda **kwargs: None):
            assert call_is_available(trainers[2])
            assert not call_is_available(asks), "it would import vllm next"


def test_an_unknown_keyword_is_refused_with_the_release(trainers):
    from trl.generation import vllm_generation

    def constructor(self, model, accelerator, processing_class, mode="colocate", speculation=None): ...

    before = trl_globals()
    with mock.patch.object(vllm_generation.VLLMGeneration, "__init__", constructor):
        with pytest.raises(ConfigError) as caught, tpcolocate.trl.use_sglang():
            raise AssertionError
    assert metadata.version("trl") in str(caught.value) and "speculation" in str(caught.value)
    assert trl_globals() == before
    with pytest.raises(ConfigError, match="speculation"):
        engines.Engines(
            tp_size=None, model_path=None, generate_timeout_s=1.0, timeout_s=1.0, launch={}
        ).build(None, None, None, speculation=1)  # fmt: skip


def test_a_constructor_may_take_fewer_keywords():
    check_constructor(lambda self, model, accelerator, processing_class, mode: None, release="1.0")
    assert {field.name for field in fields(VllmArguments)} < KEYWORDS


@pytest.mark.parametrize("hidden, named", [("trl", "not installed"), ("trl.generation.vllm_generation", "has no")])
def test_no_trl_or_another_one_is_an_error_with_what_to_install(hidden, named):
    missing = metadata.PackageNotFoundError("trl")
    version = {"side_effect": missing} if hidden == "trl" else {"return_value": "0.20.0"}
    with mock.patch.object(metadata, "version", **version), mock.patch.dict(sys.modules, {hidden: None}):
        with pytest.raises(ConfigError, match=named) as caught, replaced(lambda **kwargs: None):
            raise AssertionError
    assert "'trl>=" in str(caught.value)


# --- launch -----------------------------------------------------------------------------------------------------------


class Colo:
    """In place of a `Colocation`."""

    device, slice_index = CPU, 1

    def __init__(self, engine=None):
        self.engine, self.launched, self.closed = engine, None, False

    def launch(self, path, **arguments):
        self.launched = {"path": path, **arguments}
        if self.engine is None:
            raise tpcolocate.LaunchError("it did not start")
        return self.engine

    def close(self):
        self.closed = True


def loaded_from(path):
    model = torch.nn.Linear(1, 1)
    model.name_or_path = path
    return model


def build(colo, *, model=None, given=None, **options):
    made = engines.Engines(
        **{"tp_size": None, "model_path": None, "generate_timeout_s": 1.0, "timeout_s": 1.0, "launch": {}} | options
    )
    model = loaded_from("/models/tiny") if model is None else model
    with mock.patch.object(engines, "init", return_value=colo):
        return made, made.build(model, SimpleNamespace(device=CPU), None, **(given or {}))


def test_what_is_passed_to_use_sglang_overrides_the_trainers_settings():
    colo = Colo(RecordingEngine())
    build(
        colo,
        launch={"mem_fraction_static": 0.2, "log_path": "x"},
        given={"gpu_memory_utilization": 0.9, "max_num_seqs": 4},
    )
    assert colo.launched["path"] == "/models/tiny"
    assert (colo.launched["mem_fraction_static"], colo.launched["max_running_requests"]) == (0.2, 4)
    assert (colo.launched["log_path"], colo.launched["random_seed"]) == ("x", 1)


def test_a_seed_is_refused_before_a_server_is_started_that_would_ignore_it():
    seeded = {"generation_kwargs": {"seed": 3}}
    with pytest.raises(ConfigError, match="enable_deterministic_inference=True"):
        build(Colo(RecordingEngine()), given=seeded)
    build(Colo(RecordingEngine()), given=seeded, launch={"enable_deterministic_inference": True})


def test_a_time_for_answers_is_checked_before_a_trainer_is_built(trainers):
    with pytest.raises(ConfigError, match="generate_timeout_s"), tpcolocate.trl.use_sglang(generate_timeout_s="1"):
        raise AssertionError


def test_a_launch_that_fails_leaves_nothing_open():
    colo = Colo()
    with pytest.raises(tpcolocate.LaunchError):
        build(colo)
    assert colo.closed


@pytest.mark.parametrize("message, hint, expected", [
    ("tp_size=3 does not divide 2", "pass 1 or 2", "pass 1 or 2; with TRL: vllm_tensor_parallel_size sets tp_size"),
    ("no memory", "raise mem_fraction_static", "raise mem_fraction_static; with TRL: vllm_gpu_memory_utilization sets "
     "mem_fraction_static"),
    ("max_new_tokens=9 is too much", None, "with TRL: max_completion_length sets max_new_tokens"),
    ("rank 1 did not call tpcolocate.init() within 9 s (timeout_s of init())", None,
     "with TRL: building the trainer calls init(), on every rank; use_sglang(timeout_s=...) sets its timeout_s"),
    ("ranks were late: timeout_s=600 of init()", None, "with TRL: building the trainer calls init(), on every rank; "
     "use_sglang(timeout_s=...) sets its timeout_s"),
    ("tp_size=3", "x; with TRL: explained", "x; with TRL: explained"),
    ("q is a quantised weight", "serve it apart: engine.set_lora(name, model)", "serve it apart: engine.set_lora(name, model); "
     "with TRL: load the model without quantization_config"),
    ("adapters of FSDP1 cannot be merged", "use set_lora()", "use set_lora()"),
    ("it did not start", None, None),
    ("it did not start", "read its log", "read its log"),
])  # fmt: skip
def test_errors_say_what_they_mean_in_a_script_with_trl(message, hint, expected):
    colo, engine = Colo(), RecordingEngine()
    engine.generate = colo.launch = mock.Mock(side_effect=lambda *_, **__: raise_(ConfigError(message, hint=hint)))
    for call in (lambda: build(colo), lambda: generation(engine, sleeps=False).generate([[1]], None, 1)):
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            call()
        assert caught.value.hint == expected


def raise_(error):
    raise error


@pytest.mark.parametrize("model, named", [
    (SimpleNamespace(name_or_path=""), "model_path"),
    (SimpleNamespace(name_or_path="x", is_quantized=True), "quantised"),
])  # fmt: skip
def test_models_that_cannot_be_served_are_refused_before_anything_starts(model, named):
    colo = Colo(RecordingEngine())
    with pytest.raises(ConfigError, match=named):
        build(colo, model=model)
    assert colo.launched is None


def test_an_unknown_generation_setting_is_refused_before_anything_starts():
    colo = Colo(RecordingEngine())
    with pytest.raises(ConfigError, match="max_tokenz") as caught:
        build(colo, given={"generation_kwargs": {"max_tokenz": 3}})
    assert "max_new_tokens" in caught.value.hint and "generation_kwargs" in caught.value.hint
    assert colo.launched is None


def test_an_adapter_that_no_sync_can_merge_is_refused_before_anything_starts():
    peft = pytest.importorskip("peft")
    inner = torch.nn.Sequential()
    inner.add_module("q", torch.nn.Linear(4, 4))
    colo = Colo(RecordingEngine())
    for use_dora in (False, True):
        model = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["q"], use_dora=use_dora))
        model.name_or_path = "/models/tiny"
        if not use_dora:
            build(colo, model=model)
            assert colo.launched is not None
            colo, inner = Colo(RecordingEngine()), model.unload()
            continue
        with pytest.raises(ConfigError, match="DoRA") as caught:
            build(colo, model=model)
        assert "LoraConfig without DoRA" in caught.value.hint
        assert colo.launched is None


@pytest.mark.parametrize("is_built", [True, False])
def test_a_block_in_which_no_trainer_uses_the_engine_says_so(trainers, caplog, is_built):
    with mock.patch.object(engines, "init", return_value=Colo(RecordingEngine())), tpcolocate.trl.use_sglang():
        if is_built:
            trainers[0].VLLMGeneration(
                model=loaded_from("x"), accelerator=SimpleNamespace(device=CPU), processing_class=None
            )
    assert ("use_vllm=True" in caplog.text) is not is_built


def test_engines_end_by_shutdown_once():
    engine, colo = RecordingEngine(), None
    colo = Colo(engine)
    made, _ = build(colo)
    assert (len(made), list(made), made[0]) == (1, [engine], engine)
    made.shutdown()
    made.shutdown()
    assert [call[0] for call in engine.calls] == ["shutdown"] and colo.closed and len(made) == 0


def test_the_servers_outlive_the_block_unless_it_fails(trainers):
    for error in (None, KeyError):
        engine = RecordingEngine()
        with (
            pytest.raises(KeyError) if error else mock.MagicMock(),
            mock.patch.object(engines, "init", return_value=Colo(engine)),
        ):
            with tpcolocate.trl.use_sglang():
                trainers[0].VLLMGeneration(
                    model=loaded_from("x"),
                    accelerator=SimpleNamespace(device=CPU),
                    processing_class=None,
                )
                if error:
                    raise error
        assert ("shutdown" in [call[0] for call in engine.calls]) is (error is not None)


# --- the callback -----------------------------------------------------------------------------------------------------


def test_means_are_over_prompts_and_ranks_without_any_do_not_count():
    assert weighted_means([(3, {"a": 1.0}), (1, {"a": 5.0, "b": 2.0}), (0, {})]) == {"a": 2.0, "b": 2.0}


@pytest.mark.parametrize(
    "prompts, every, named",
    [
        ([], 1, "prompts"),
        ("text", 1, "prompts"),
        (UserDict(input_ids=[[1, 2]], attention_mask=[[1, 1]]), 1, "input_ids"),  # as a tokenizer returns it
        (["a"], 0, "every_steps"),
        (["a"], 1.5, "every_steps"),
        (["a"], True, "every_steps"),
        ([1, 2, 3], 1, "one prompt of token ids"),
        (torch.tensor([1, 2, 3]), 1, "one prompt of token ids"),
        (["a", ""], 1, "prompt 1 is empty"),
        ([[{"role": "user", "content": "a"}]], 1, "apply_chat_template"),
    ],
)
def test_a_callback_without_prompts_or_steps_is_refused(prompts, every, named):
    with pytest.raises(ConfigError, match=named):
        GenerationCallback(None, None, prompts, score=lambda *_: {}, every_steps=every)


def test_a_callback_acts_at_its_steps():
    engine, logged = RecordingEngine(), []
    trainer = SimpleNamespace(model_wrapped=object(), log=logged.append)
    callback = GenerationCallback(
        trainer,
        engine,
        ["a"],
        {"n": 1},
        score=lambda prompts, answers: {"length": len(answers[0]["output_ids"])},
        every_steps=2,
    )
    for step in range(1, 5):
        callback.on_step_end(None, SimpleNamespace(global_step=step), None)
    assert logged == [{"eval_length": 2.0}] * 2
    assert [call[:2] for call in engine.calls] == [("sync_weights", trainer.model_wrapped), ("generate", ["a"])] * 2


@pytest.mark.parametrize("given, words", [
    ({"sampling_params": [{}]}, "sampling_params has 1 entries for 3 prompts"),
    ({"lora_path": ["x"] * 4}, "lora_path has 4 entries for 3 prompts"),
    ({"token_ids_logprob": [[1]]}, "token_ids_logprob has 1 entries for 3 prompts"),
])  # fmt: skip
def test_a_callback_refuses_lists_of_another_length_than_its_prompts(given, words):
    with pytest.raises(ConfigError, match=words):
        GenerationCallback(None, None, ["a", "b", "c"], score=lambda *_: {}, every_steps=1, **given)


@pytest.mark.parametrize("given, words", [
    ({"sampling_params": {"max_tokens": 3}}, "no sampling parameter 'max_tokens'"),
    ({"sampling_params": {"temperature": -1}}, "temperature"),
    ({"max_new_tokens": 3}, "no field max_new_tokens"),
    ({"top_logprobs_num": 3}, "needs return_logprob=True"),
    ({"stream": True}, "stream=True"),
    ({"timeout_s": 0}, "timeout_s"),
    ({"score": None}, "score must be a function"),
])  # fmt: skip
def test_a_callback_is_checked_before_the_training_begins(given, words):
    """And not when the first evaluation is due."""
    with pytest.raises(ConfigError, match=words):
        GenerationCallback(None, None, ["a", "b"], **{"score": lambda *_: {}, "every_steps": 1, **given})


@pytest.mark.parametrize("returned, words", [
    (None, "what score returns must be a dict of means by name, got None"),
    ({"length": None}, "score returns None as 'length', not a number"),
    ({"lengths": torch.ones(2)}, r"score returns tensor\(\[1., 1.\]\) as 'lengths'"),
    ({7: 1.0}, "score returns 1.0 as 7"),
])  # fmt: skip
def test_a_score_that_returns_no_figures_is_named(returned, words):
    trainer = SimpleNamespace(model_wrapped=None)
    callback = GenerationCallback(
        trainer, RecordingEngine(), ["a"], score=lambda *_: returned, every_steps=1, on_error="return"
    )
    with pytest.raises(ConfigError, match=words):
        callback.evaluate()


def evaluated(rank):
    """Two prompts here and one there; then the score of rank 1 alone fails."""

    def score(prompts, answers):
        if rank == 1 and engine.calls.count(("sleep",)) > 1:
            raise ValueError("no score")
        return {"prompts": len(prompts)}

    class Engine(RecordingEngine):
        def generate(self, prompts, sampling_params, *, timeout_s, **fields):
            self.calls.append(("generate", prompts, sampling_params, fields))
            return [{}] * len(prompts)

    engine = Engine()
    callback = GenerationCallback(
        SimpleNamespace(model_wrapped=None), engine, ["a", "b", "c"], [{"n": 1}, {"top_k": 2}, {"top_k": 3}],
        score=score, every_steps=1, sleep=True, lora_path=["x", None, "z"], token_ids_logprob=[4, 5], return_logprob=True,
    )  # fmt: skip
    figures = callback.evaluate()
    try:
        callback.evaluate()
    except RankFailedError as error:
        return figures, engine.calls, (error.message, error.rank, type(error.__cause__))
    return figures, engine.calls, None


@pytest.mark.timeout(200)
def test_a_callback_on_two_ranks():
    (figures, ours, error), (figures_there, theirs, error_there) = run_ranks(evaluated, 2)
    assert figures == figures_there == {"prompts": (2 * 2 + 1) / 3}
    common = {"token_ids_logprob": [4, 5], "return_logprob": True}
    assert [call for call in ours if call[0] == "generate"] == [
        ("generate", ["a", "c"], [{"n": 1}, {"top_k": 3}], {"lora_path": ["x", "z"], **common})
    ] * 2
    assert [call for call in theirs if call[0] == "generate"] == [
        ("generate", ["b"], [{"top_k": 2}], {"lora_path": [None], **common})
    ] * 2
    assert error == ("ValueError: no score", 1, type(None)) and error_there == ("ValueError: no score", 1, ValueError)
    assert [call[0] for call in ours] == [call[0] for call in theirs], "no rank waits for another one"
