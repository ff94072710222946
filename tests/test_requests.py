"""The gate of `generate`: what is sent, and what is refused before that, without a server."""

import base64
import enum
import io
import json
import math
import pickle
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpcolocate.engine.client import Prompts
from tpcolocate.engine.limits import NEEDED, ServerLimits
from tpcolocate.engine.requests import FIELDS, check_call
from tpcolocate.engine.sampling import PARAMETERS
from tpcolocate.engine.values import Array
from tpcolocate.errors import ConfigError, TpColocateError
from tpcolocate.server.http import encode

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

VOCAB = 512
LIMITS = ServerLimits(vocab_size=VOCAB, hidden_size=2, prompt_tokens=250, context_tokens=256, media=frozenset())
IDS = [5, 6, 7]


def checked(prompts=IDS, sampling_params=None, *, limits=LIMITS, known=(), stream=False, **fields):
    return check_call(prompts, sampling_params, fields, stream=stream, limits=limits, known=lambda: frozenset(known))


def body(*args, **kwargs):
    found = checked(*args, **kwargs).body()
    encode(found)
    return found


def refusal(*args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        body(*args, **kwargs)
    return str(caught.value)


class Column:
    """As pandas has it, whose dtypes are no NumPy's."""

    dtype, ndim = "str", 1

    def __init__(self, values):
        self._values = values

    def __len__(self):
        return len(self._values)

    def __getitem__(self, index):
        return self._values[index]

    def tolist(self):
        return list(self._values)


class Frame:
    """As pandas has it: it is no Mapping, and iterates over the names of its columns."""

    def __init__(self, columns):
        self._columns = columns

    def __len__(self):
        return len(self._columns)

    def __iter__(self):
        return iter(self._columns)

    def __getitem__(self, name):
        return self._columns[name]

    def keys(self):
        return self._columns.keys()


# --- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts, sent", [
    ("a", {"text": "a"}),
    (["a", "b"], {"text": ["a", "b"]}),
    (("a", "b"), {"text": ["a", "b"]}),
    (IDS, {"input_ids": IDS}),
    (tuple(IDS), {"input_ids": IDS}),
    (range(5, 8), {"input_ids": IDS}),
    ([IDS, [1]], {"input_ids": [IDS, [1]]}),
    ((tuple(IDS), (1,)), {"input_ids": [IDS, [1]]}),
    (torch.tensor(IDS), {"input_ids": IDS}),
    (torch.tensor(IDS, dtype=torch.int32), {"input_ids": IDS}),
    (torch.tensor([IDS, IDS]), {"input_ids": [IDS, IDS]}),
    (np.array(IDS), {"input_ids": IDS}),
    (np.array([IDS], dtype=np.uint16), {"input_ids": [IDS]}),
    ([torch.tensor(IDS), torch.tensor([1])], {"input_ids": [IDS, [1]]}),
    ([torch.tensor([IDS]), np.array([1])], {"input_ids": [IDS, [1]]}),
    ([np.int64(5), torch.tensor(6), 7], {"input_ids": IDS}),
    ({"input_ids": IDS, "attention_mask": [1, 1, 1]}, {"input_ids": IDS}),
    ({"input_ids": torch.tensor([[0, 5], [6, 7]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])}, {"input_ids": [[5], [6, 7]]}),
    ({"input_ids": [torch.tensor([0, 5]), torch.tensor([6, 7])], "attention_mask": [torch.tensor([0, 1]), torch.tensor([1, 1])]},
     {"input_ids": [[5], [6, 7]]}),
    ({"input_ids": [np.array([0, 5])], "attention_mask": [np.array([0, 1])]}, {"input_ids": [[5]]}),
    ([{"input_ids": torch.tensor([[0, 5]]), "attention_mask": torch.tensor([[0, 1]])}], {"input_ids": [[5]]}),
    ([{"input_ids": IDS}, {"input_ids": [1]}], {"input_ids": [IDS, [1]]}),
    ([5, VOCAB - 1], {"input_ids": [5, VOCAB - 1]}),
    (np.array(["a", "b"]), {"text": ["a", "b"]}),
    (np.array(["a", "b"], dtype=object), {"text": ["a", "b"]}),
    (np.array([IDS, [1]], dtype=object), {"input_ids": [IDS, [1]]}),
    ([np.array(IDS, dtype=object), [1]], {"input_ids": [IDS, [1]]}),
    (Column(["a", "b"]), {"text": ["a", "b"]}),
    (Column([IDS, [1]]), {"input_ids": [IDS, [1]]}),
])  # fmt: skip
def test_prompts_in_every_form_that_users_have(prompts, sent):
    assert body(prompts) == sent


def test_the_type_of_prompts_has_what_is_taken():
    """Type checkers refused arrays of NumPy and a list of a tokenizer's outputs."""
    forms = typing.get_args(Prompts)
    assert {str, Sequence[str], Array, Sequence[Array], Mapping[str, Any], Sequence[Mapping[str, Any]]} <= set(forms)
    needed = {name for name in vars(Array) if not name.startswith("_")}
    assert needed == {"dtype", "ndim", "tolist"}
    for array in (torch.tensor(IDS), np.array(IDS), Column(IDS)):
        assert all(hasattr(array, name) for name in needed)


def test_prompts_by_the_names_of_sglang():
    assert body(None, text="a") == {"text": "a"}
    assert body(None, input_ids=torch.tensor([IDS])) == {"input_ids": [IDS]}
    assert body(None, input_embeds=torch.ones(1, 2)) == {"input_embeds": [[1.0, 1.0]]}
    assert body(None, input_embeds=[[[1, 2]]]) == {"input_embeds": [[[1.0, 2.0]]]}


@pytest.mark.parametrize("rows, token", [
    ([[0, 0, 5], [1, 2, 3]], 0), ([[5, 0, 0], [1, 2, 3]], 0), ([[7, 7, 9], [7, 7, 7], [7, 8, 9], [1, 2, 3]], 7),
    ([[0, 0, 5], [0, 0, 3]], None), ([[1, 5, 3], [1, 2, 3]], None), ([[0, 0, 5]], None), ([[5], [1]], None),
    ([[4, 4, 5], [6, 6, 3]], None),
])  # fmt: skip
def test_padding_without_a_mask_is_warned_of(rows, token, caplog):
    """It is a part of the prompts, and the answers are those to other prompts."""
    for array in (torch.tensor(rows), np.array(rows)):
        caplog.clear()
        assert body(array)["input_ids"] == rows
        assert [record.args for record in caplog.records] == ([] if token is None else [(token,)])
    caplog.clear()
    body(rows)  # lists are of any length and need no padding
    body({"input_ids": torch.tensor(rows), "attention_mask": torch.ones(len(rows), len(rows[0]))})
    assert not caplog.records


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_a_tokenizers_output_may_be_fields(make):
    """As ``generate(**tokenizer(texts, padding=True))``; without the mask the padding would be a part of the prompts."""
    padded = {"input_ids": make([[0, 0, 5], [1, 2, 3]]), "attention_mask": make([[0, 0, 1], [1, 1, 1]])}
    assert checked(None, **padded).body() == {"input_ids": [[5], [1, 2, 3]]}
    assert body(padded["input_ids"], attention_mask=padded["attention_mask"]) == {"input_ids": [[5], [1, 2, 3]]}
    assert body([0, 5], attention_mask=[0, 1]) == {"input_ids": [5]}
    assert "different shapes" in refusal(None, input_ids=padded["input_ids"], attention_mask=[[1]])
    for texts in ("a", ["a", "b"]):
        assert "attention_mask is given without token ids" in refusal(texts, attention_mask=[[1], [1]])
        assert "attention_mask is given without token ids" in refusal(None, text=texts, attention_mask=[[1], [1]])
    assert "nothing to generate from" in refusal(None, attention_mask=[[1]])
    assert "pass the tokenizer's output itself" in refusal(None, **padded, token_type_ids=[[0]])


@pytest.mark.parametrize("prompts", [[], (), torch.zeros(0, 4, dtype=torch.long), np.zeros((0, 3), dtype=int)])
def test_no_prompts_are_no_request(prompts):
    assert len(checked(prompts).prompts) == 0


@pytest.mark.parametrize("prompts, words", [
    ("", "the prompt is empty"),
    (["a", ""], "prompt 1 is empty"),
    ([[]], "prompt 0 is empty"),
    ([IDS, []], "prompt 1 is empty"),
    (torch.zeros(2, 0, dtype=torch.long), "prompt 0 is empty"),
    ([IDS, [1, -1]], "token 1 of prompt 1 is -1, outside of the vocabulary of 512 tokens"),
    ([VOCAB], "token 0 of the prompt is 512, outside of the vocabulary"),
    ([1, 2**70], "token 1 of the prompt is"),
    (torch.tensor([5, -100]), "labels that are ignored"),
    (["a", IDS], "prompt 1 is of type list ([5, 6, 7]), prompt 0 is a text"),
    ([IDS, "a"], "prompt 1 is of type str ('a'), not a list of token ids"),
    ([[1], 2], "prompt 1 is of type int (2), not"),
    ([1, "a"], "token 1 of the prompt is 'a', not an integer"),
    ([True, 2], "token 0 of the prompt is True"),
    ([1.0, 2.0], "token 0 of the prompt is 1.0"),
    ([[1], None], "prompt 1 is of type NoneType"),
    ([[[1]]], "token 0 of prompt 0 is [1]"),
    (torch.tensor([1.0]), "torch.float32"),
    (torch.tensor([True]), "torch.bool"),
    ([IDS, torch.tensor([1.5])], "prompt 1 is an array of torch.float32"),
    (np.array([["a"]]), "token 0 of prompt 0 is 'a', not an integer"),
    (Frame({"prompt": ["a"]}), "pass one of its columns"),
    (["a", None], "leave it out, or make it a text"),
    ([{"prompt": "a"}], "pass texts or token ids"),
    (torch.zeros(1, 1, 1, dtype=torch.long), "shape (1, 1, 1)"),
    (torch.tensor(5), "prompts must be texts or token ids"),
    (5, "prompts must be texts or token ids, got 5"),
    (b"a", "prompts must be texts or token ids, got b'a'"),
    ({1, 2}, "make a list of it"),
    (iter([1]), "make a list of it"),
    ("a\ud800", "the prompt cannot be encoded: character 1 is '\\ud800'"),
    (["a", "\udfff"], "prompt 1 cannot be encoded"),
    ([{"role": "user", "content": "a"}], "apply_chat_template"),
    ([[{"role": "user", "content": "a"}]], "apply_chat_template"),
    ({"role": "user", "content": "a"}, "apply_chat_template"),
    ([5] * 250, "the prompt has 250 tokens, and this server takes fewer than 250"),
    ([IDS, [5] * 300], "prompt 1 has 300 tokens"),
    ({"input_ids": IDS, "attention_mask": [1]}, "different shapes"),
])  # fmt: skip
def test_bad_prompts_are_refused_by_their_index(prompts, words):
    assert words in refusal(prompts)


def test_prompts_given_twice_or_not_at_all():
    assert "given twice" in refusal(IDS, text="a")
    assert "given twice" in refusal(None, text="a", input_ids=IDS)
    assert "nothing to generate from" in refusal(None)


def test_several_bad_prompts_are_all_in_the_error():
    text = refusal([IDS, [], [-1], [1]])
    assert (
        text.startswith("prompt 1 is empty") and "2 of 4 prompts are refused" in text and "token 0 of prompt 2" in text
    )


@pytest.mark.parametrize("embeds, words", [
    ([], None), ([[]], "is empty"), ([[1.0, 2.0, 3.0]], "the model's embeddings have 2"), ([[1.0, math.nan]], "finite"),
    ([[[1.0, 2.0]], []], "input_embeds of prompt 1 is empty"), ([1.0], "must be (tokens, hidden)"), ("a", "must be (tokens, hidden)"),
])  # fmt: skip
def test_embeddings(embeds, words):
    if words is None:
        assert len(checked(None, input_embeds=embeds).prompts) == 0
    else:
        assert words in refusal(None, input_embeds=embeds)


# --- sampling parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, sent", [
    ({"max_new_tokens": 64.0}, {"max_new_tokens": 64}),
    ({"max_new_tokens": np.int64(8)}, {"max_new_tokens": 8}),
    ({"max_new_tokens": torch.tensor(8)}, {"max_new_tokens": 8}),
    ({"max_new_tokens": None}, {"max_new_tokens": None}),
    ({"temperature": None, "top_p": 1}, {"top_p": 1.0}),
    ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
    ({"temperature": 10**20}, {"temperature": 1e20}),
    ({"stop": "a"}, {"stop": ["a"]}),
    ({"stop": ("a", "b")}, {"stop": ["a", "b"]}),
    ({"stop": {"b", "a"}}, {"stop": ["a", "b"]}),
    ({"stop": np.array(["a", "b"])}, {"stop": ["a", "b"]}),
    ({"stop_token_ids": [1, None]}, {"stop_token_ids": [1]}),
    ({"stop_token_ids": 3}, {"stop_token_ids": [3]}),
    ({"stop_token_ids": {4}}, {"stop_token_ids": [4]}),
    ({"json_schema": {"type": "object"}}, {"json_schema": '{"type": "object"}'}),
    ({"json_schema": "$$ANY$$"}, {"json_schema": "$$ANY$$"}),
    ({"logit_bias": {5: -1e9, "6": 1}}, {"logit_bias": {"5": -1e9, "6": 1.0}}),
    ({"logit_bias": {5: -math.inf}}, {"logit_bias": {"5": -1e30}}),
    ({"ignore_eos": np.bool_(True)}, {"ignore_eos": True}),
    ({"top_k": -1, "n": 4}, {"top_k": -1, "n": 4}),
    ({"custom_params": {"a": [1, 2]}}, {"custom_params": {"a": [1, 2]}}),
])  # fmt: skip
def test_sampling_parameters_are_sent_as_sglang_takes_them(given, sent):
    assert body(sampling_params=given)["sampling_params"] == sent


@pytest.mark.parametrize("given, words", [
    ({"max_tokens": 4}, "SGLang has no sampling parameter 'max_tokens'\n  -> the parameter is max_new_tokens"),
    ({"seed": 4}, "the parameter is sampling_seed"),
    ({"temprature": 4}, "did you mean temperature?"),
    ({"logprobs": 4}, "return_logprob=True"),
    ({"do_sample": True}, "temperature=0 is greedy"),
    ({"lora_path": "a"}, "pass it to generate itself: generate(..., lora_path=...)"),
    ({"is_normalized": True}, "no sampling parameter 'is_normalized'"),
    ({5: 1}, "no sampling parameter 5"),
    ({"max_new_tokens": 1.5}, "sampling parameter max_new_tokens must be an integer, got 1.5"),
    ({"max_new_tokens": True}, "must be an integer, got True"),
    ({"max_new_tokens": "5"}, "must be an integer, got '5'"),
    ({"max_new_tokens": -1}, "must be at least 0, got -1"),
    ({"max_new_tokens": 2**63}, "must be at least 0"),
    ({"max_new_tokens": math.inf}, "must be an integer, got inf"),
    ({"max_new_tokens": 10**5000}, "max_new_tokens must be at least 0"),
    ({"n": 0}, "n must be from 1 to"), ({"n": -1}, "n must be from 1 to"), ({"n": 10**9}, "n must be from 1 to"),
    ({"temperature": math.nan}, "temperature must be a finite number, got nan"),
    ({"temperature": -0.1}, "must be in [0, 1e+30], got -0.1"),
    ({"temperature": True}, "must be a finite number, got True"),
    ({"top_p": 0}, "must be in (0, 1], got 0"), ({"top_p": 1.1}, "must be in (0, 1]"),
    ({"top_k": 0}, "-1 switches it off"), ({"top_k": 2**31}, "must be from -1 to 2147483647"), ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"), ({"frequency_penalty": 3}, "frequency_penalty"), ({"presence_penalty": -3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "must be in [0.01, 2]"), ({"repetition_penalty": 1e-300}, "repetition_penalty"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9, more than max_new_tokens, which is 8"),
    ({"min_new_tokens": 129}, "more than max_new_tokens, which is 128"),
    ({"stop": ""}, "stop is empty"), ({"stop": ["a", 5]}, "stop[1] must be a str"), ({"stop": 5}, "stop must be a str"),
    ({"stop": ["a"] * 33}, "stop has 33 entries"), ({"stop": "\ud800"}, "cannot be encoded"),
    ({"stop_token_ids": [VOCAB]}, "stop_token_ids[0] must be from 0 to 511"), ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": "a"}, "a list of token ids"),
    ({"stop_regex": "("}, "is not a regular expression"), ({"stop_regex": "a" * 257}, "longer than 256 bytes"),
    ({"regex": {"a": 1}}, "regex must be a str"), ({"json_schema": "{"}, "json_schema is not JSON"), ({"json_schema": 5}, "must be a str"),
    ({"regex": "a", "json_schema": "{}"}, "json_schema and regex exclude each other"),
    ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"), ({"skip_special_tokens": "yes"}, "True or False"),
    ({"logit_bias": {"a": 1}}, "a token of sampling parameter logit_bias"), ({"logit_bias": {VOCAB: 1}}, "from 0 to 511"),
    ({"logit_bias": {5: math.inf}}, "finite"), ({"logit_bias": {5: 1e39}}, "logit_bias[5]"), ({"logit_bias": [1]}, "a dict"),
    ({"sampling_seed": 1.5}, "an integer"), ({"sampling_seed": 2**63}, "within 64 bits"),
    ({"stream_interval": 0}, "stream_interval"), ({"custom_params": {"a": {"b": {"c": 1}}}}, "custom_params"),
    ({"custom_params": {"__req__": 1}}, "SGLang's own"), ({"beam_width": 0}, "beam_width"),
    (5, "name it: {\"max_new_tokens\": 5}"), ("greedy", "sampling_params must be a dict"),
])  # fmt: skip
def test_bad_sampling_parameters_are_refused_by_their_name(given, words):
    assert words in refusal(sampling_params=given)


def test_objects_of_other_libraries_are_named():
    from transformers import GenerationConfig

    text = refusal(sampling_params=GenerationConfig(max_new_tokens=5))
    assert "sampling_params must be a dict" in text and "GenerationConfig" in text and '"max_new_tokens": 64' in text


def test_one_dict_for_each_prompt():
    params = [{"max_new_tokens": 4}, {"max_new_tokens": 5.0}]
    assert body([IDS, IDS], params)["sampling_params"] == [{"max_new_tokens": 4}, {"max_new_tokens": 5}]
    assert "sampling_params has 1 entries for 2 prompts" in refusal([IDS, IDS], params[:1])
    assert "sampling_params is a list, for a single prompt" in refusal(IDS, params)
    assert "sampling parameter top_p of prompt 1 must be" in refusal([IDS, IDS], [{}, {"top_p": 2}])
    assert "have one n, got 1, 2" in refusal([IDS, IDS], [{}, {"n": 2}])


def test_a_parameter_of_newer_releases():
    from packaging.version import Version

    old = ServerLimits(version=Version("0.5.9"))
    assert "SGLang 0.5.9 has no sampling parameter beam_width\n  -> 0.5.20 or newer" in refusal(
        sampling_params={"beam_width": 2}, limits=old
    )
    assert body(sampling_params={"beam_width": 2}, limits=ServerLimits(version=Version("0.5.21")))


def test_a_seed_needs_a_server_that_uses_it():
    assert body(sampling_params={"sampling_seed": 4})["sampling_params"] == {"sampling_seed": 4}
    text = refusal(sampling_params={"sampling_seed": 4}, limits=ServerLimits(ignored=frozenset(["sampling_seed"])))
    assert (
        "sampling_seed is given, and this server would ignore it\n  -> launch(enable_deterministic_inference=True)"
        in text
    )


# --- fields ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, words", [
    ({"top_logprobs_num": 10**6}, "top_logprobs_num must be from 0 to 512, got 1000000"),
    ({"top_logprobs_num": -1}, "top_logprobs_num"), ({"top_logprobs_num": 1.5}, "top_logprobs_num must be an integer"),
    ({"logprob_start_len": -5}, "logprob_start_len"), ({"return_logprob": True, "logprob_start_len": 4}, "logprob_start_len of the prompt is 4, and it has 3 tokens"),
    ({"token_ids_logprob": [VOCAB]}, "token_ids_logprob[0]"), ({"token_ids_logprob": 5}, "a list of token ids"),
    ({"token_ids_logprob": [[1]]}, "for a single prompt"),
    ({"return_logprob": 1}, "return_logprob must be True or False"), ({"return_logprob": [True]}, "for a single prompt"),
    ({"rid": "HEALTH_CHECK_1"}, "rid is 'HEALTH_CHECK_1', and SGLang takes what begins with HEALTH_CHECK for requests of its own"),
    ({"rid": ""}, "rid is empty"), ({"rid": 5}, "rid must be a str"), ({"rid": "\ud800"}, "cannot be encoded"),
    ({"lora_path": ""}, "lora_path is empty"), ({"lora_path": 5}, "lora_path must be a str"),
    ({"return_hidden_states": "first"}, "True or False"), ({"session_params": {"a": 1}}, "session_params has a"),
    ({"image_data": "x.png"}, "takes no image"), ({"lora_id": "x"}, "set by SGLang itself"),
    ({"temperature": 0.5}, "sampling parameters go into a dict"), ({"max_tokens": 5}, "the parameter is max_new_tokens"),
    ({"return_logprobs": True}, "did you mean return_logprob?"), ({"nonsense": True}, "has no field nonsense"),
    ({"temperature": 1}, 'generate(prompts, {"temperature": ...})'), ({"max_tokens": 1}, "the parameter is max_new_tokens"),
    ({"prompt": "a"}, "pass them first"), ({"messages": []}, "apply_chat_template"), ({"lora_request": "a"}, "is lora_path="),
    ({"request_id": "a"}, "is rid="), ({"timeout": 5}, "is timeout_s="),
])  # fmt: skip
def test_bad_fields_are_refused_by_their_name(fields, words):
    assert words in refusal(**fields)


def test_what_needs_the_tokenizer_is_refused_by_a_server_without_one():
    """SGLang 0.5.9 looks for it in its scheduler, which ends; newer releases refuse it, or leave the text out."""
    without = ServerLimits(vocab_size=VOCAB, has_tokenizer=False)
    for params in ({"stop": "a"}, {"stop_regex": "a"}, {"min_new_tokens": 2}):
        text = refusal(IDS, params, limits=without)
        assert "needs the tokenizer, which this server has not loaded (skip_tokenizer_init=True)" in text
        assert next(iter(params)) in text
    assert "a text as prompt needs the tokenizer" in refusal("a", limits=without)
    assert "pass token ids, or launch() without" in refusal(["a"], limits=without)
    assert "return_text_in_logprobs needs" in refusal(
        IDS, limits=without, return_logprob=True, return_text_in_logprobs=True
    )
    unaffected = {"stop": [], "min_new_tokens": 0, "stop_token_ids": [5], "max_new_tokens": 4}
    assert body([IDS], unaffected, limits=without, return_logprob=True)["input_ids"] == [IDS]
    assert body([], limits=without)["input_ids"] == []


@pytest.mark.parametrize("info, has_tokenizer", [({}, True), ({"skip_tokenizer_init": True}, False)])
def test_whether_a_server_has_a_tokenizer(info, has_tokenizer):
    assert ServerLimits.of(info, {}).has_tokenizer is has_tokenizer


@pytest.mark.parametrize(
    "model_info, generates", [({}, True), ({"is_generation": True}, True), ({"is_generation": False}, False)]
)
def test_a_model_that_does_not_generate_gets_no_request(model_info, generates):
    """Such as a reward model, launched beside the policy: SGLang's scheduler would end."""
    limits = ServerLimits.of({}, model_info)
    if generates:
        assert body(limits=limits)["input_ids"] == IDS
    else:
        assert "the served model does not generate" in refusal(limits=limits)


PROCESSOR = json.dumps({"callable": pickle.dumps(len).hex()})


@pytest.mark.parametrize("fields, words", [
    ({"session_params": {"id": ["a"]}}, "session_params['id'] must be a str"),
    ({"session_params": {"id": 5}}, "session_params['id'] must be a str"),
    ({"session_params": {"id": "a", "rid": 5}}, "session_params['rid']"),
    ({"session_params": {"id": "a", "offset": "x"}}, "session_params['offset']"),
    ({"session_params": {"id": "a", "replace": 1}}, "session_params['replace']"),
    ({"session_params": {"id": "a", "drop_previous_output": "no"}}, "session_params['drop_previous_output']"),
    *(({"custom_logit_processor": value}, "CustomLogitProcessor.to_str()")
      for value in ("abc", "{}", "[]", "5", '{"callable": 5}', '{"callable": "xyz"}', '{"callable": "00"}', PROCESSOR[:-5] + '"}')),
])  # fmt: skip
def test_what_would_end_the_scheduler_is_refused(fields, words):
    """SGLang looks at these in its scheduler alone, where an exception ends the server."""
    assert words in refusal(known=FIELDS, **fields)


class Kind(enum.StrEnum):
    SUPPORT = "support"


@pytest.mark.parametrize("value, words", [
    (Kind.SUPPORT, "Kind.SUPPORT"),
    (enum.Enum("Plain", "A")(1), "Plain.A"),
    (torch.ones(2, dtype=torch.long, device="meta"), "cannot be read"),
    (torch.tensor(1, device="meta"), "cannot be read"),
    (torch.ones(2, 2, dtype=torch.long).to_sparse(), "cannot be read"),
])  # fmt: skip
def test_what_only_looks_like_a_list_or_has_no_content_is_refused(value, words):
    """The class of an enum's member has a length and can be gone through, the member cannot."""
    wrong = [{"stop_token_ids": value}, {"max_new_tokens": value}, {"custom_params": value}, [value, value]]
    refused = [refusal([IDS, IDS], params) for params in wrong]
    refused += [
        refusal([IDS, IDS], known=FIELDS, return_logprob=True, **{name: value})
        for name in ("top_logprobs_num", "token_ids_logprob")
    ]
    refused += [refusal(input_ids=value, prompts=None), refusal(input_embeds=value, prompts=None)]
    assert all(words in text or "must be" in text for text in refused), refused
    assert words in refused[0] + refused[-1]


def test_a_name_given_twice_among_very_many_is_found_at_once():
    many = [str(i) for i in range(100_000)]
    assert "rid '99999' is given to several prompts" in refusal([[1]] * 100_001, rid=[*many, many[-1]])


def test_fields_that_this_server_ignores_are_refused():
    limits = ServerLimits(ignored=frozenset(NEEDED))
    text = refusal(known=FIELDS, limits=limits, return_routed_experts=True)
    assert "would ignore it\n  -> launch(enable_return_routed_experts=True), or leave it out" in text
    assert "priority is given" in refusal(known=FIELDS, limits=limits, priority=1)
    assert body(known=FIELDS, limits=limits, return_routed_experts=False, priority=None)


def test_fields_that_nothing_in_a_release_reads_are_refused(tmp_path):
    limits = limits_of(tmp_path, {}, version="0.5.21")
    text = refusal(known=FIELDS, limits=limits, return_entropy=True)
    assert "return_entropy is given, and this server would ignore it\n  -> leave it out" in text and "0.5.21" in text
    assert body(known=FIELDS, limits=limits, return_entropy=False)
    assert body(known=FIELDS, limits=limits_of(tmp_path, {}, version="0.5.99"), return_entropy=True)


def test_sessions_and_logit_processors_are_taken():
    session = {"id": "a", "rid": None, "offset": -1, "replace": False}
    assert body(session_params=session)["session_params"] == session
    assert body(known=FIELDS, custom_logit_processor=PROCESSOR)["custom_logit_processor"] == PROCESSOR


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_images_in_memory_are_sent_as_what_they_contain(mode):
    image = pytest.importorskip("PIL.Image")
    given, sees = image.new(mode, (3, 2)), ServerLimits(media=frozenset({"image"}))

    def decoded(sent):
        kind, _, content = sent.partition(",")
        assert kind == "data:image/png;base64"
        return image.open(io.BytesIO(base64.b64decode(content, validate=True)))

    expected = given if mode in ("RGB", "RGBA", "L") else given.convert("RGB")
    sent = body(image_data=given, limits=sees)["image_data"]
    assert (decoded(sent).mode, decoded(sent).tobytes()) == (expected.mode, expected.tobytes())
    assert body(image_data=[given, "x.png"], limits=sees)["image_data"] == [sent, "x.png"]
    assert body([IDS, [1]], image_data=[[given], None], limits=sees)["image_data"] == [[sent], None]


def test_other_forms_of_images():
    sees = ServerLimits(media=frozenset({"image"}))
    assert body(image_data=b"ab", limits=sees)["image_data"] == "data:application/octet-stream;base64,YWI="
    assert body(image_data=Path("/a/x.png"), limits=sees)["image_data"] == "/a/x.png"
    assert "PIL.Image.fromarray()" in refusal(image_data=np.zeros((2, 2, 3), dtype=np.uint8), limits=sees)
    assert "image_data of prompt 0 must be" in refusal([IDS], image_data=[5], limits=sees)


def test_an_adapter_needs_a_server_for_it():
    assert "launch(enable_lora=True)" in refusal(lora_path="a", limits=ServerLimits(has_lora=False))


def test_fields_of_the_server_are_taken_and_must_be_json():
    assert body(known={"new_field"}, new_field=(1, np.float32(0.5)))["new_field"] == [1, 0.5]
    for value in (math.nan, object(), "\ud800", b"a", [10**30], {1: 2}):
        assert "new_field" in refusal(known={"new_field"}, new_field=value)
    assert "sampling_logprobs_mode needs return_sampling_mask=True" in refusal(
        known=FIELDS, sampling_logprobs_mode="selected"
    )


def test_a_list_of_a_field_has_one_value_per_prompt():
    prompts = [IDS, [1]]
    sent = body(prompts, return_logprob=[True, False], lora_path=["a", None], top_logprobs_num=np.array([1, 2]))
    assert sent == {
        "input_ids": prompts,
        "return_logprob": [True, False],
        "lora_path": ["a", None],
        "top_logprobs_num": [1, 2],
    }
    with_logprobs = {"return_logprob": True}
    assert body(prompts, token_ids_logprob=[1, 2], **with_logprobs)["token_ids_logprob"] == [1, 2]
    assert body(prompts, token_ids_logprob=[[1], []], **with_logprobs)["token_ids_logprob"] == [[1], []]
    assert "return_logprob has 1 entries for 2 prompts" in refusal(prompts, return_logprob=[True])
    assert "top_logprobs_num of prompt 1 must be" in refusal(prompts, top_logprobs_num=[1, -1], **with_logprobs)
    assert "rid 'a' is given to several prompts" in refusal(prompts, rid=["a", "a"])
    assert "logprob_start_len of prompt 1 is 2" in refusal(prompts, logprob_start_len=2, **with_logprobs)


@pytest.mark.parametrize("fields", [
    {"top_logprobs_num": 2}, {"logprob_start_len": 0}, {"token_ids_logprob": [1]}, {"return_text_in_logprobs": True},
    {"top_logprobs_num": [0, 2], "return_logprob": [False, False]}, {"token_ids_logprob": [[], [1]]},
])  # fmt: skip
def test_what_is_ignored_without_log_probabilities_is_refused(fields):
    assert "needs return_logprob=True" in refusal([IDS, IDS], **fields)


def test_log_probabilities_that_are_switched_off_take_what_asks_for_nothing():
    off = {"top_logprobs_num": 0, "logprob_start_len": -1, "return_text_in_logprobs": False}
    assert off.items() <= body(return_logprob=False, **off).items()


def test_several_samples_take_one_value_for_all_prompts():
    prompts, two = [IDS, [1]], {"n": 2}
    assert body(prompts, two, return_logprob=[True, True])["return_logprob"] is True
    assert "must be the same for all prompts with n > 1" in refusal(prompts, two, return_logprob=[True, False])
    assert "rid is given with n=2, and SGLang would ignore it" in refusal(prompts, two, rid="a")
    assert "rid is given with n=2, and SGLang would ignore it" in refusal(prompts, two, rid=["a", "b"])
    assert body(prompts, {"n": 1}, rid="a")["rid"] == "a"
    assert body([], two, return_logprob=[], top_logprobs_num=[])["input_ids"] == []
    assert "130000 samples, more than 131072" not in body([IDS] * 2, {"n": 65000})
    assert "195000 samples, more than 131072" in refusal([IDS] * 3, {"n": 65000})


def test_more_tokens_than_the_context_are_refused_by_the_prompt():
    assert body([IDS], {"max_new_tokens": 253})
    assert "prompt 1 has 4 tokens, and with max_new_tokens=253 more than the 256" in refusal(
        [IDS, [*IDS, 8]], {"max_new_tokens": 253}
    )
    unknown = ServerLimits()
    assert body([10**9] * 10**4, {"max_new_tokens": 10**6}, limits=unknown)
    assert "-1" in refusal([-1], limits=unknown)


def test_a_bad_prompt_leaves_the_others():
    call = checked(
        [IDS, [-1], [1]],
        [{"top_p": 0.5}, {}, {"top_p": 0.25}],
        rid="r",
        return_logprob=[True, True, False],
        lora_path=[None, "a", "a"],
    )
    assert list(call.prompts.bad) == [1] and isinstance(call.prompts.items[1], ConfigError)
    assert call.body_of(0) == {
        "input_ids": IDS,
        "sampling_params": {"top_p": 0.5},
        "rid": "r_0",
        "return_logprob": True,
    }
    assert call.body_of(2) == {
        "input_ids": [1],
        "sampling_params": {"top_p": 0.25},
        "rid": "r_2",
        "return_logprob": False,
        "lora_path": "a",
    }


# --- limits ---------------------------------------------------------------------------------------------------------


def limits_of(folder, config, **info):
    (folder / "config.json").write_text(json.dumps(config))
    return ServerLimits.of({"model_path": str(folder), "version": "0.5.21", **info}, {})


ADDED = [
    {"id": 3, "content": "<eos>"},
    {"id": 512, "content": "[PAD]"},
    {"id": 513, "content": "word", "single_word": True},
    {"id": 514, "content": ""},
    {"id": "515", "content": "x"},
    5,
]


def test_texts_with_tokens_that_the_model_has_no_embedding_for_are_refused(tmp_path):
    """As of a padding token that was added to the tokenizer alone: at tp_size 1 its id ends the server."""
    tokenizer = tmp_path / "tokenizer.json"
    vocabulary = {"model": {"vocab": {'"added_tokens": [': 1}}}
    tokenizer.write_text(json.dumps({"version": "1.0", "added_tokens": ADDED, **vocabulary}))
    limits = limits_of(tmp_path, {"vocab_size": 512})
    for field in (None, "text"):
        given = {"prompts": ["a<eos>", "b[PAD]"]} if field is None else {"prompts": None, field: ["a", "b[PAD]"]}
        assert "prompt 1 has the token '[PAD]', which is outside of the vocabulary of 512 tokens" in refusal(
            limits=limits, **given
        )
    assert "'word'" in refusal("a word.", limits=limits) and body("words [pad]", limits=limits)
    call = checked(["[PAD]", "a"], limits=limits)
    assert list(call.prompts.bad) == [0]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert body("[PAD]", limits=limits_of(tmp_path, {"vocab_size": 512}, tokenizer_path=str(elsewhere)))
    assert body("[PAD]", limits=limits_of(tmp_path, {"vocab_size": 514}))
    assert body("[PAD]", limits=limits_of(tmp_path, {"text_config": {"vocab_size": 512}})), "of images, for example"
    for content in (
        "{",
        "",
        "[1]",
        '{"added_tokens": 5}',
        '{"added_tokens": [',
        json.dumps(vocabulary),
        b"\xff".decode("latin1"),
    ):
        tokenizer.write_text(content, encoding="latin1")
        assert body("[PAD]", limits=limits_of(tmp_path, {"vocab_size": 512}))


def test_limits_come_from_the_server_and_its_models_configuration(tmp_path):
    text = {"vocab_size": 100, "hidden_size": 8}
    assert limits_of(tmp_path, text).vocab_size == 100
    assert limits_of(tmp_path, {"vocab_size": 7, "text_config": text}).vocab_size == 100
    assert limits_of(tmp_path, {"thinker_config": {"text_config": text}}).hidden_size == 8
    assert limits_of(tmp_path, text, json_model_override_args='{"vocab_size": 50}').vocab_size == 50
    found = limits_of(tmp_path, text, context_length=256, max_req_input_len=250)
    assert (found.prompt_tokens, found.context_tokens) == (250, 256)
    shortens = limits_of(tmp_path, text, context_length=256, allow_auto_truncate=True)
    assert (shortens.prompt_tokens, shortens.context_tokens) == (None, None)
    assert limits_of(tmp_path, text, enable_lora=True).has_lora
    assert not limits_of(tmp_path, text, enable_lora=None).has_lora
    assert not limits_of(tmp_path, text, enable_lora=False, lora_paths=["a=b"]).has_lora, "SGLang ignores the paths"
    assert not NEEDED.keys() & limits_of(tmp_path, text, enable_priority_scheduling=True).ignored
    found = limits_of(tmp_path, text, enable_deterministic_inference=False, enable_priority_scheduling=False)
    assert NEEDED.keys() & found.ignored == {"sampling_seed", "priority"}
    (tmp_path / "config.json").write_text("{")
    assert ServerLimits.of({"model_path": str(tmp_path)}, {}).vocab_size is None


# --- anything at all ------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=3), st.complex_numbers(),
    st.sampled_from(["\ud800", 2**63, -(2**63) - 1, 10**400, object(), np.float32("nan"), torch.tensor(1), torch.tensor([1.5]), np.array([[1]])]),
)  # fmt: skip
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=3),
    ),
    max_leaves=6,
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    prompts=st.one_of(st.just(IDS), st.just([IDS, [1]]), anything),
    params=st.one_of(st.dictionaries(st.sampled_from(sorted(PARAMETERS)), anything, max_size=2), anything),
    fields=st.dictionaries(st.sampled_from(sorted(set(FIELDS) - {"stream"})), anything, max_size=2),
    stream=st.one_of(st.booleans(), anything),
)
def test_every_call_is_a_body_or_an_error_of_this_library(prompts, params, fields, stream):
    try:
        call = checked(prompts, params, known=FIELDS, stream=stream, **fields)
        if len(call.prompts):
            json.loads(encode(call.body()))
    except TpColocateError as error:
        str(error).encode()
