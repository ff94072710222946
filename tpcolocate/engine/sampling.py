"""Sampling parameters: SGLang's names, types and ranges, checked before a request is sent.

SGLang checks some of them where a request is taken in.  The rest reaches its schedulers: there, one value of a wrong type
or range is an exception in every TP rank, and ends the server for all.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from tpcolocate.engine.limits import ServerLimits
from tpcolocate.engine.values import (
    MAX_INT,
    contents,
    flag,
    integer,
    is_array,
    is_list,
    number,
    plain,
    refuse,
    scalar,
    text,
    unpacked,
)
from tpcolocate.errors import ConfigError, shown
from tpcolocate.server.releases import Span

Check = Callable[[Any, str, ServerLimits], Any]

# Of SGLang's, so that nothing is sent that it refuses.
_MOST_STOPS = 32
_MOST_STOP_REGEX_BYTES = 256
# A top_k is a 32-bit integer in the schedulers.
_MOST_TOP_K = 2**31 - 1
# Of one prompt: each is a request of its own in the server.
MAX_SAMPLES = 65_536
# Added to logits that may be float16, where more would be infinite.
_MOST_BIAS = 1e4
_LEAST_BIAS = -1e30
# SGLang divides logits by it; less overflows.
_LEAST_REPETITION_PENALTY = 0.01
_LONGEST_TEXT = 2**20


def _count(low: int, high: int = MAX_INT, hint: str | None = None) -> Check:
    return lambda value, where, limits: integer(value, where, low=low, high=high, hint=hint)


def _number(low: float, high: float, *, without_low: bool = False, hint: str | None = None) -> Check:
    return lambda value, where, limits: number(value, where, low=low, high=high, without_low=without_low, hint=hint)


def _flag(value: Any, where: str, limits: ServerLimits) -> bool:
    return flag(value, where)


def _top_k(value: Any, where: str, limits: ServerLimits) -> int:
    found = integer(value, where, low=-1, high=_MOST_TOP_K, hint="-1 switches it off")
    if found == 0:
        raise refuse(where, "-1 or at least 1", value, "-1 switches it off")
    return found


def _texts(value: Any, where: str, *, hint: str) -> list[str]:
    value = sorted(value, key=str) if isinstance(value, (set, frozenset)) else unpacked(value)
    values = list(value) if is_list(value) else [value]
    if len(values) > _MOST_STOPS:
        raise ConfigError(f"{where} has {len(values)} entries, SGLang takes {_MOST_STOPS}")
    return [text(each, f"{where}[{i}]" if is_list(value) else where, hint=hint) for i, each in enumerate(values)]


def _stop(value: Any, where: str, limits: ServerLimits) -> list[str]:
    return _texts(value, where, hint="texts that end an answer; for token ids use stop_token_ids")


def _stop_regex(value: Any, where: str, limits: ServerLimits) -> list[str]:
    patterns = _texts(value, where, hint="regular expressions that end an answer")
    for pattern in patterns:
        if len(pattern.encode()) > _MOST_STOP_REGEX_BYTES:
            raise ConfigError(f"{where} is longer than {_MOST_STOP_REGEX_BYTES} bytes: {shown(pattern)}")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{where}={shown(pattern)} is not a regular expression: {error}") from None
    return patterns


def token_ids(value: Any, where: str, limits: ServerLimits) -> list[int]:
    """Return a list of ids of the vocabulary."""
    values = contents(value) if is_array(value) else value
    if isinstance(values, (set, frozenset)):
        values = sorted(values, key=str)
    if not is_list(values):
        raise refuse(where, "a list of token ids", value)
    high = MAX_INT if limits.vocab_size is None else limits.vocab_size - 1
    return [integer(each, f"{where}[{i}]", low=0, high=high) for i, each in enumerate(values)]


def _stop_token_ids(value: Any, where: str, limits: ServerLimits) -> list[int]:
    values = [value] if isinstance(scalar(value), int) else value
    if is_list(values) or isinstance(values, (set, frozenset)):
        values = [each for each in values if each is not None]  # of a tokenizer that lacks the token
    return token_ids(values, where, limits)


def _logit_bias(value: Any, where: str, limits: ServerLimits) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise refuse(where, "a dict from token ids to numbers", value)
    high = MAX_INT if limits.vocab_size is None else limits.vocab_size - 1
    found = {}
    for token, bias in value.items():
        plain_id = int(token) if isinstance(token, str) and token.isascii() and token.isdecimal() else token
        checked = integer(plain_id, f"a token of {where}", low=0, high=high)
        least = _LEAST_BIAS if scalar(bias) == -math.inf else bias  # never, as other libraries write it
        found[str(checked)] = float(number(least, f"{where}[{checked}]", low=_LEAST_BIAS, high=_MOST_BIAS))
    return found


def _grammar(value: Any, where: str, limits: ServerLimits) -> str:
    found = text(value, where, hint="a str in SGLang's notation")
    if len(found) > _LONGEST_TEXT:
        raise ConfigError(f"{where} has {len(found)} characters, more than {_LONGEST_TEXT}")
    return found


def _json_text(value: Any, where: str, limits: ServerLimits) -> str:
    """Return a JSON schema as SGLang takes it, which is as text."""
    if hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    if isinstance(value, Mapping):
        return json.dumps(plain(value, where))
    found = _grammar(value, where, limits)
    try:
        json.loads(found)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}", hint="pass the schema as a dict") from None
    return found


def _json_schema(value: Any, where: str, limits: ServerLimits) -> str:
    # SGLang's name for any JSON.
    return value if isinstance(value, str) and value == "$$ANY$$" else _json_text(value, where, limits)


def _custom_params(value: Any, where: str, limits: ServerLimits) -> dict[str, Any]:
    found = plain(value, where, levels=3)
    if not isinstance(found, dict):
        raise refuse(where, "a dict", value)
    for name, entry in found.items():
        if name.startswith("__"):
            raise ConfigError(f"{where} has {name!r}, which is SGLang's own")
        inner = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ()
        if any(isinstance(each, (dict, list)) for each in inner):
            raise refuse(f"{where}[{name!r}]", "a number, a text, or a list or dict of them", entry)
    return found


_PENALTY = _number(-2.0, 2.0)
PARAMETERS: Mapping[str, Check] = {
    "max_new_tokens": _count(0),
    "min_new_tokens": _count(0, 2**31 - 1),
    "n": _count(1, MAX_SAMPLES),
    "temperature": _number(0.0, 1e30, hint="0 is greedy"),
    "top_p": _number(0.0, 1.0, without_low=True, hint="1.0 switches it off"),
    "top_k": _top_k,
    "min_p": _number(0.0, 1.0),
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "repetition_penalty": _number(_LEAST_REPETITION_PENALTY, 2.0, hint="1.0 switches it off"),
    "stop": _stop,
    "stop_token_ids": _stop_token_ids,
    "stop_regex": _stop_regex,
    "ignore_eos": _flag,
    "skip_special_tokens": _flag,
    "spaces_between_special_tokens": _flag,
    "no_stop_trim": _flag,
    "json_schema": _json_schema,
    "regex": _grammar,
    "ebnf": _grammar,
    "structural_tag": _json_text,
    "logit_bias": _logit_bias,
    "sampling_seed": _count(-(2**63)),
    "custom_params": _custom_params,
    "stream_interval": _count(1, 2**31 - 1),
    "beam_width": _count(1, 1024),
}
_SINCE = {"beam_width": Span("0.5.20")}
# Those that a server without a tokenizer cannot follow, and what it can.
_OF_TOKENIZER = {
    "stop": "pass stop_token_ids",
    "stop_regex": "pass stop_token_ids",
    "min_new_tokens": "leave it out",
}
_GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")

_LOGPROBS = "generate(..., return_logprob=True, top_logprobs_num=...) returns log-probabilities"
# Names of other libraries, and what does the same here.
_ELSEWHERE = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
    "max_completion_length": "max_new_tokens",
    "max_length": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "min_length": "min_new_tokens",
    "seed": "sampling_seed",
    "random_seed": "sampling_seed",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "stop_words": "stop",
    "eos_token_id": "stop_token_ids",
    "repeat_penalty": "repetition_penalty",
    "num_return_sequences": "n",
    "num_generations": "n",
    "best_of": "n",
    "num_samples": "n",
    "num_beams": "beam_width",
    "guided_json": "json_schema",
    "response_format": "json_schema",
    "guided_regex": "regex",
    "structured_outputs_regex": "regex",
    "guided_grammar": "ebnf",
    "grammar": "ebnf",
    "bad_words": "logit_bias",
    "suppress_tokens": "logit_bias",
    "allowed_token_ids": "logit_bias",
    "include_stop_str_in_output": "no_stop_trim",
    "logits_processors_args": "custom_params",
    "extra_args": "custom_params",
}
_ADVICE = {
    "logprobs": _LOGPROBS,
    "prompt_logprobs": "generate(..., return_logprob=True, logprob_start_len=0) returns the prompt's, too",
    "top_logprobs": _LOGPROBS,
    "output_scores": _LOGPROBS,
    "do_sample": "leave it out: temperature=0 is greedy, any other samples",
    "echo": "leave it out: the answer has the new tokens only",
    "detokenize": "leave it out: the answer has text and ids",
    "pad_token_id": "leave it out: prompts are not padded",
    "bos_token_id": "leave it out: put the token into the prompt",
    "use_cache": "leave it out",
    "length_penalty": "leave it out: SGLang has none",
    "stream": "pass it to generate itself: generate(..., stream=True)",
    "structured_outputs": "the parameter is json_schema, regex or ebnf",
}


def check_sampling(
    given: Any, limits: ServerLimits, *, where: str = "", fields: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Return the sampling parameters of a prompt as SGLang takes them.

    Args:
        given: As users pass them; None for SGLang's defaults.
        limits: Of the server.
        where: Which prompt's they are, for messages: "" or " of prompt 3".
        fields: Names that belong to `generate` itself.

    Raises:
        ConfigError: An unknown name, or a value that SGLang would refuse, ignore or not survive.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"sampling_params{where} must be a dict, got {shown(given)}", hint=_of_other_libraries(given))
    found = {}
    for name, value in given.items():
        check = PARAMETERS.get(name) if isinstance(name, str) else None
        if check is None or (limits.version is not None and limits.version not in _SINCE.get(name, Span())):
            raise _unknown(name, where, limits, fields)
        if value is not None:
            what = f"sampling parameter {name}{where}"
            found[name] = check(value, what, limits)
            limits.check_used(name, what)
            if name in _OF_TOKENIZER and found[name]:
                limits.check_tokenizer(what, instead=_OF_TOKENIZER[name])
        elif name == "max_new_tokens":
            found[name] = None  # as many as fit; without it, 128
    _check_together(found, where)
    return found


def _check_together(found: Mapping[str, Any], where: str) -> None:
    longest, least = found.get("max_new_tokens", 128), found.get("min_new_tokens", 0)
    if longest is not None and least > longest:
        raise ConfigError(
            f"sampling parameter min_new_tokens{where} is {least}, more than max_new_tokens, which is {longest}"
        )
    grammars = [name for name in _GRAMMARS if name in found]
    if len(grammars) > 1:
        raise ConfigError(f"sampling parameters {' and '.join(grammars)}{where} exclude each other", hint="pass one")
    if found.get("beam_width", 1) > 1 and found.get("n", 1) > found["beam_width"]:
        raise ConfigError(
            f"sampling parameter n{where} is {found['n']}, more than beam_width, which is {found['beam_width']}"
        )


def _unknown(name: Any, where: str, limits: ServerLimits, fields: frozenset[str]) -> ConfigError:
    what = f"SGLang has no sampling parameter {shown(name)}{where}"
    if name in PARAMETERS:
        return ConfigError(f"SGLang {limits.version} has no sampling parameter {name}{where}", hint=f"{_SINCE[name]}")
    if name in fields:
        return ConfigError(what, hint=f"pass it to generate itself: generate(..., {name}=...)")
    return ConfigError(what, hint=advice(name))


def advice(name: Any) -> str:
    """Return what to write instead of a sampling parameter that does not exist."""
    if name in _ADVICE:
        return _ADVICE[name]
    if name in _ELSEWHERE:
        return f"the parameter is {_ELSEWHERE[name]}"
    close = difflib.get_close_matches(str(name), PARAMETERS, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(PARAMETERS))}"


def is_sampling_name(name: str) -> bool:
    """Return whether this is a sampling parameter, here or in another library."""
    return name in PARAMETERS or name in _ELSEWHERE or name in _ADVICE


def _of_other_libraries(given: Any) -> str:
    kind = type(given).__name__
    if kind in ("GenerationConfig", "SamplingParams"):
        return (
            f'write what the {kind} has as a dict, with SGLang\'s names: {{"max_new_tokens": 64, "temperature": 1.0}}'
        )
    if isinstance(given, (int, float)):
        return f'name it: {{"max_new_tokens": {shown(given)}}}'
    return 'for example {"max_new_tokens": 64, "temperature": 1.0}'


__all__ = ["MAX_SAMPLES", "PARAMETERS", "advice", "check_sampling", "is_sampling_name", "token_ids"]
