"""Send generated calls of `generate` through its gate, and what passes through SGLang's own classes; no server runs.

Every call must end as an error of this library, or as a body that SGLang's own code takes: the validation of FastAPI,
`GenerateReqInput.normalize_batch_and_arguments`, `SamplingParams.normalize` and `verify`, the message from the process
that takes requests in to its schedulers, and what ended schedulers of a real server (`ends_schedulers`).  Half of the
calls are good ones and must pass; the others have values that were broken on purpose.

    python benchmarks/fuzz_gates.py --cases 2000000 --seed 0 --write
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import struct
import time
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from record import publish, record

from tpcolocate.engine.limits import ServerLimits
from tpcolocate.engine.requests import FIELDS, PROMPT_FIELDS, check_call
from tpcolocate.engine.sampling import PARAMETERS
from tpcolocate.errors import TpColocateError
from tpcolocate.server.http import encode

VOCAB, CONTEXT, LONGEST, HIDDEN = 512, 256, 250, 4
LIMITS = ServerLimits(vocab_size=VOCAB, hidden_size=HIDDEN, prompt_tokens=LONGEST, context_tokens=CONTEXT)
_SHOWN_FAILURES = 20


class _Unprintable:
    def __repr__(self) -> str:
        raise ZeroDivisionError


class _Endless(list):  # type: ignore[type-arg]
    """A list that holds itself."""

    def __init__(self) -> None:
        super().__init__([self])


HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, -100, 1.5, 64.0, -0.0, 1e-300, 1e39, 1e300, float("nan"), float("inf"), -float("inf"),
    2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**400, 10**6, VOCAB - 1, VOCAB, VOCAB + 1,
    "", " ", "a", "5", "\ud800", "a\udfffb", "x" * 300, "\x00", "(", "[a", "a{2,1}", "{", "null", "$$ANY$$", "()" * 200,
    b"", b"abc", bytearray(b"a"), memoryview(b"a"), 1j, object(), _Unprintable(), int, len, range(3), range(0),
    [], [[]], [[[]]], [None], [0], [1, 2], [1.0, 2.0], [1.5], [True], ["a"], ["a", ""], ["a", 1], [1, "a"], [[1], "a"],
    ["a", [1]], [[1], [2]], [[1], []], [[1], None], [["a"]], [{}], [float("nan")], [-1], [VOCAB], [2**70], (), (1,), ((1,),),
    {}, {"a": 1}, {"input_ids": [1, 2]}, {"input_ids": [[1, 2], [3, 0]], "attention_mask": [[1, 1], [1, 0]]},
    {"input_ids": [1], "attention_mask": [1, 1]}, {"role": "user", "content": "a"}, [{"role": "user", "content": "a"}],
    {1: 2}, {"5": 1}, {5: 1.0}, {"05": 1, "5": 2}, {"\ud800": 1}, {"a": {"b": {"c": {"d": [1]}}}}, {"a": float("inf")},
    set(), {1, 2}, frozenset({"a"}), iter([1]), (x for x in ()), _Endless(), MappingProxyType({"a": 1}),
    torch.tensor([1, 2]), torch.tensor([[1, 2], [3, 4]]), torch.tensor([1.0]), torch.tensor([True]), torch.tensor(5),
    torch.tensor(1.5), torch.tensor([]), torch.zeros(0, 3, dtype=torch.long), torch.zeros(2, 2, 2, dtype=torch.long),
    torch.tensor([-1]), torch.tensor([VOCAB]), torch.zeros(2, 0, dtype=torch.int32), [torch.tensor([1]), torch.tensor([2])],
    [torch.tensor([[1, 2]])], [torch.tensor([[1], [2]])], [torch.tensor(3), torch.tensor(4)], [torch.tensor([1.5])],
    np.array([1, 2]), np.array([[1, 2]]), np.array([1.5]), np.array([True]), np.array(["a"]), np.array([1], dtype=object),
    np.int64(5), np.float32(0.5), np.float64("nan"), np.bool_(True), np.str_("a"), np.array(5), np.uint64(2**64 - 1),
)  # fmt: skip


# --- good calls -----------------------------------------------------------------------------------------------------


def _ids(rng: random.Random) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]


def _text(rng: random.Random) -> str:
    return "".join(rng.choice("ab \n\u00e9\U0001f600{}") for _ in range(rng.randint(1, 12)))


GOOD_PARAMETERS: Mapping[str, Callable[[random.Random], Any]] = {
    "max_new_tokens": lambda r: r.choice([0, 1, 64, 64.0, np.int64(8), None]),
    "min_new_tokens": lambda r: 0,
    "temperature": lambda r: r.choice([0, 0.0, 1e-9, 0.7, 1, 2.5, np.float32(0.5)]),
    "top_p": lambda r: r.choice([1.0, 0.9, 1, 1e-3]),
    "top_k": lambda r: r.choice([-1, 1, 50, 2**30, np.int32(7)]),
    "min_p": lambda r: r.choice([0.0, 0.05, 1]),
    "frequency_penalty": lambda r: r.uniform(-2, 2),
    "presence_penalty": lambda r: r.choice([0, -2, 2.0]),
    "repetition_penalty": lambda r: r.choice([1.0, 1.2, 0.5, 2]),
    "stop": lambda r: r.choice(["\n", ["a", "b"], ("x",), []]),
    "stop_token_ids": lambda r: r.choice([[1, 2], [None, 3], {4}, 5, torch.tensor([6]), []]),
    "stop_regex": lambda r: r.choice(["a+", [r"\d{3}", "(x|y)z?"]]),
    "ignore_eos": lambda r: r.random() < 0.5,
    "skip_special_tokens": lambda r: np.bool_(r.random() < 0.5),
    "spaces_between_special_tokens": lambda r: True,
    "no_stop_trim": lambda r: False,
    "logit_bias": lambda r: r.choice([{"5": 1.0}, {7: -100}, {1: 0.5, 2: -1e9}, {}]),
    "sampling_seed": lambda r: r.choice([0, 42, -1, 2**63 - 1]),
    "custom_params": lambda r: r.choice([{}, {"a": 1, "b": [1, 2], "c": {"d": "e"}}]),
    "stream_interval": lambda r: r.choice([1, 10]),
    "json_schema": lambda r: r.choice(['{"type": "object"}', {"type": "string"}]),
}
# Kinds of which a request may have one.
GRAMMARS = ({"regex": "a+b"}, {"ebnf": 'root ::= "a"'}, {"structural_tag": {"structures": [], "triggers": []}}, {})


def good_parameters(rng: random.Random) -> dict[str, Any] | None:
    if rng.random() < 0.1:
        return None
    names = rng.sample(sorted(GOOD_PARAMETERS), rng.randint(0, 5))
    found = {name: GOOD_PARAMETERS[name](rng) for name in names}
    if "json_schema" not in found:
        found |= rng.choice(GRAMMARS)
    return found


@dataclass
class Call:
    """Arguments of one call of `generate`."""

    prompts: Any
    sampling_params: Any
    fields: dict[str, Any] = field(default_factory=dict)
    stream: Any = False

    def __repr__(self) -> str:
        try:
            return f"({self.prompts!r}, {self.sampling_params!r}, {self.fields!r}, stream={self.stream!r})"
        except Exception:
            return "a call that cannot be printed"


def _square(rows: list[list[int]]) -> list[list[int]]:
    return [row[:1] * 3 for row in rows]


_FORMS_OF_ONE: tuple[Callable[[list[int]], Any], ...] = (
    list, tuple, torch.tensor, np.array, lambda ids: {"input_ids": ids}, lambda ids: [np.int64(each) for each in ids]
)  # fmt: skip
_FORMS_OF_SEVERAL: tuple[Callable[[list[list[int]]], Any], ...] = (
    list,
    lambda rows: tuple(map(tuple, rows)),
    lambda rows: [torch.tensor(row) for row in rows],
    lambda rows: [np.array(row) for row in rows],
    lambda rows: torch.tensor(_square(rows)),
    lambda rows: np.array(_square(rows)),
    lambda rows: [torch.tensor([row]) for row in rows],
    lambda rows: {"input_ids": _square(rows), "attention_mask": [[1, 1, 0]] * len(rows)},
)


def _good_prompts(rng: random.Random, count: int | None) -> tuple[Any, str]:
    """Return prompts in one of the forms that users have; `count` is None for one prompt."""
    if count is None:
        ids = _ids(rng)
        if rng.random() < 0.3:
            return _text(rng), "text"
        return rng.choice(_FORMS_OF_ONE)(ids), "input_ids"
    if rng.random() < 0.3:
        return [_text(rng) for _ in range(count)], "text"
    rows = [_ids(rng) for _ in range(count)]
    return rng.choice(_FORMS_OF_SEVERAL)(rows), "input_ids"


def _good_fields(rng: random.Random, count: int | None, *, has_samples: bool) -> dict[str, Any]:
    def each(make: Callable[[], Any]) -> Any:
        if count is None or has_samples or rng.random() < 0.5:
            return make()
        return [make() for _ in range(count)]

    makers: dict[str, Callable[[], Any]] = {
        "return_logprob": lambda: each(lambda: rng.random() < 0.8),
        "logprob_start_len": lambda: each(lambda: rng.choice([-1, 0, 1])),
        "top_logprobs_num": lambda: each(lambda: rng.choice([0, 5, VOCAB])),
        "token_ids_logprob": lambda: each(lambda: [1, 2]),
        "return_text_in_logprobs": lambda: True,
        "return_hidden_states": lambda: rng.choice([False, "last"]),
        "lora_path": lambda: each(lambda: "policy"),
        "rid": lambda: f"r{rng.randrange(10**9)}" if count is None else [f"r{i}" for i in range(count)],
        "cache_salt": lambda: each(lambda: "salt"),
        "priority": lambda: rng.choice([-1, 0, 3]),
        "session_params": lambda: {"id": "s", "rid": None},
        "no_logs": lambda: True,
    }
    found = {name: makers[name]() for name in rng.sample(sorted(makers), rng.randint(0, 3))}
    if any("logprob" in name for name in found):  # those are refused without it
        found["return_logprob"] = True
    return found


def good_call(rng: random.Random) -> Call:
    count = None if rng.random() < 0.4 else rng.randint(1, 4)
    prompts, kind = _good_prompts(rng, count)
    samples = rng.choice([1, 1, 1, 2, 3])
    parameters: Any
    if count is not None and rng.random() < 0.3:
        parameters = [good_parameters(rng) for _ in range(count)]
        if samples > 1:
            parameters = [{**(each or {}), "n": samples} for each in parameters]
    else:
        parameters = good_parameters(rng)
        if samples > 1:
            parameters = {**(parameters or {}), "n": samples}
    call = Call(prompts, parameters, _good_fields(rng, count, has_samples=samples > 1), rng.random() < 0.2)
    if rng.random() < 0.2:
        call.prompts, call.fields[kind] = None, call.prompts
    elif rng.random() < 0.05:
        vectors = [[rng.random() for _ in range(HIDDEN)] for _ in range(3)]
        call.prompts = None
        call.fields["input_embeds"] = vectors if count is None else [vectors] * count
    return call


# --- broken calls ---------------------------------------------------------------------------------------------------

UNKNOWN_NAMES = (
    "max_tokens",
    "seed",
    "logprobs",
    "do_sample",
    "temprature",
    "",
    "stop_strs",
    "is_normalized",
    "n ",
    "\ud800",
    5,
)


def break_call(rng: random.Random, call: Call) -> Call:
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        rng.choice((_break_prompt, _break_parameter, _break_parameter, _break_field, _break_names))(rng, call)
    return call


def _broken(rng: random.Random) -> Any:
    value = rng.choice(HOSTILE)
    if rng.random() < 0.1:
        return struct.unpack("d", rng.randbytes(8))[0]
    if rng.random() < 0.1:
        return rng.randint(-(2**70), 2**70) >> rng.randrange(70)
    return value


def _break_prompt(rng: random.Random, call: Call) -> None:
    name = next((each for each in PROMPT_FIELDS if each in call.fields), None)
    prompts = call.fields[name] if name is not None else call.prompts
    if isinstance(prompts, list) and prompts and rng.random() < 0.7:
        prompts = list(prompts)
        index = rng.randrange(len(prompts))
        if isinstance(prompts[index], list) and prompts[index] and rng.random() < 0.5:
            row = list(prompts[index])
            row[rng.randrange(len(row))] = _broken(rng)
            prompts[index] = row if rng.random() < 0.9 else row * 100
        else:
            prompts[index] = _broken(rng)
    else:
        prompts = _broken(rng)
    if name is not None:
        call.fields[name] = prompts
    else:
        call.prompts = prompts


def _break_parameter(rng: random.Random, call: Call) -> None:
    name = rng.choice([*PARAMETERS, *PARAMETERS, *UNKNOWN_NAMES])
    given = call.sampling_params
    if isinstance(given, list) and given:
        index = rng.randrange(len(given))
        call.sampling_params = list(given)
        own = given[index] if isinstance(given[index], dict) else {}
        call.sampling_params[index] = {**own, name: _broken(rng)} if rng.random() < 0.8 else _broken(rng)
        if rng.random() < 0.1:
            call.sampling_params *= 2
    elif isinstance(given, dict) and rng.random() < 0.95:
        call.sampling_params = {**given, name: _broken(rng)}
    else:
        call.sampling_params = _broken(rng)


def _break_field(rng: random.Random, call: Call) -> None:
    name = rng.choice(sorted(set(FIELDS) - {"stream"}))
    call.fields[name] = _broken(rng) if rng.random() < 0.8 else [_broken(rng) for _ in range(rng.randint(0, 4))]


def _break_names(rng: random.Random, call: Call) -> None:
    if rng.random() < 0.3:
        call.stream = _broken(rng)
    elif rng.random() < 0.5:
        call.fields[str(rng.choice([*UNKNOWN_NAMES[:-2], "lora_id", "bootstrap_room", "temperature"]))] = _broken(rng)
    else:
        call.fields[rng.choice(PROMPT_FIELDS)] = _broken(rng)


# --- SGLang ---------------------------------------------------------------------------------------------------------


class _Tokenizer:
    """What `SamplingParams.normalize` uses of one: as many tokens as bytes."""

    eos_token_id = 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


class SGLang:
    """SGLang's own code, in this process."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pydantic import TypeAdapter
            from sglang.srt.managers import io_struct
            from sglang.srt.sampling.sampling_params import SamplingParams
        self._io = io_struct
        self._parameters = SamplingParams
        self._adapter = TypeAdapter(io_struct.GenerateReqInput)
        self.fields = frozenset(io_struct.GenerateReqInput.__dataclass_fields__)

    def take(self, body: bytes) -> None:
        """Raise what SGLang would raise for a request, or what ended its schedulers."""
        request = self._adapter.validate_python(json.loads(body))
        request.normalize_batch_and_arguments()
        if request.is_single:
            self._take_one(request)
            return
        for i in range(max(len(request.rid), request.batch_size)):
            one = request[i]
            if i < request.batch_size:
                self._take_one(one)

    def _take_one(self, request: Any) -> None:
        ids = array("q", request.input_ids) if request.input_ids is not None else array("q", [1, 2, 3] * 4)
        parameters = self._parameters(**request.sampling_params)
        parameters.normalize(_Tokenizer())
        parameters.verify(VOCAB)
        for token in request.token_ids_logprob or ():
            if not isinstance(token, int) or not 0 <= token < VOCAB:
                raise ValueError("token_ids_logprob contains an out-of-vocabulary token id")
        if request.session_params:
            self._io.SessionParams(**request.session_params)
        message = self._io.TokenizedGenerateReqInput(
            rid=request.rid,
            input_text=request.text,
            input_ids=ids,
            input_embeds=request.input_embeds,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=parameters,
            return_logprob=request.return_logprob,
            logprob_start_len=request.logprob_start_len,
            top_logprobs_num=request.top_logprobs_num,
            token_ids_logprob=request.token_ids_logprob,
            stream=request.stream,
            custom_logit_processor=request.custom_logit_processor,
            return_hidden_states=request.return_hidden_states,
            priority=request.priority,
            extra_key=request.extra_key,
        )
        received = self._io.msgpack_decode(self._io.msgpack_encode(message))
        ends_schedulers(received, ids if request.input_ids is not None else None)


def ends_schedulers(message: Any, ids: array[int] | None) -> None:
    """Raise for what ended the schedulers of a real server, or kept them from answering."""
    parameters = message.sampling_params
    if max(parameters.top_k, parameters.min_new_tokens) >= 2**31:
        raise ValueError("more than the schedulers' 32-bit tensors hold")
    if ids is not None and (not ids or min(ids) < 0 or max(ids) >= VOCAB or len(ids) >= LONGEST):
        raise ValueError("token ids that the embedding does not have")
    if any(not 0 <= token < VOCAB for token in parameters.stop_token_ids or ()):
        raise ValueError("stop tokens outside of the vocabulary, which min_new_tokens scatters")
    if not 0 <= message.top_logprobs_num <= VOCAB:
        raise ValueError("more top log-probabilities than tokens")
    if message.logprob_start_len < -1 or (ids is not None and message.logprob_start_len > len(ids)):
        raise ValueError("log-probabilities from outside of the prompt")
    if not 1e-3 < parameters.repetition_penalty:
        raise ValueError("logits that are divided by zero")
    if any(abs(bias) > 1e30 for bias in (parameters.logit_bias or {}).values()):
        raise ValueError("logits that are infinite")
    if "" in parameters.stop_strs:
        raise ValueError("an answer that is over before it begins")
    if ids is not None and parameters.max_new_tokens is not None and len(ids) + parameters.max_new_tokens > CONTEXT:
        raise ValueError("more tokens than the context")


# --- the run --------------------------------------------------------------------------------------------------------


class Run:
    """Counts outcomes, and keeps the first failures."""

    def __init__(self, sglang: SGLang) -> None:
        self.sglang = sglang
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []
        self.stricter: Counter[str] = Counter()

    def one(self, call: Call, *, is_good: bool) -> None:
        try:
            self.outcomes[self._outcome(call, is_good=is_good)] += 1
        except Exception as error:
            self.outcomes["failed"] += 1
            if len(self.failures) < _SHOWN_FAILURES:
                self.failures.append(f"{type(error).__name__}: {str(error)[:300]}\n    {repr(call)[:600]}")

    def _outcome(self, call: Call, *, is_good: bool) -> str:
        try:
            checked = check_call(
                call.prompts,
                call.sampling_params,
                call.fields,
                stream=call.stream,
                limits=LIMITS,
                known=lambda: self.sglang.fields,
            )
            if not len(checked.prompts):
                return "no prompts"
            if checked.prompts.bad or sum(self.outcomes.values()) % 8 == 0:
                for index in set(range(len(checked.prompts))) - set(checked.prompts.bad):
                    self.sglang.take(encode(checked.body_of(index)))
            body = encode(checked.body())
        except TpColocateError as error:
            if is_good:
                raise
            str(error)
            self._is_stricter(call, error)
            return "refused"
        self.sglang.take(body)
        return "passed"

    def _is_stricter(self, call: Call, error: TpColocateError) -> None:
        """Count refusals of what SGLang's code takes, by the message without its values; for a reader to judge."""
        if self.outcomes["refused"] % 16:
            return
        prompts = (
            {} if call.prompts is None else {"text" if isinstance(call.prompts, str) else "input_ids": call.prompts}
        )
        try:
            body = json.dumps({**call.fields, **prompts, "sampling_params": call.sampling_params}).encode()
            self.sglang.take(body)
        except Exception:
            return
        self.stricter[re.sub(r"\d+", "#", error.message)[:100]] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="calls to generate")
    parser.add_argument("--seed", type=int, default=0, help="of the generator")
    parser.add_argument("--write", action="store_true", help="record the result under benchmarks/results")
    args = parser.parse_args()
    load = os.getloadavg()
    rng, run = random.Random(args.seed), Run(SGLang())
    samples = []
    for begin in range(0, args.cases, 10_000):
        began = time.perf_counter()
        count = min(10_000, args.cases - begin)
        for number in range(count):
            call = good_call(rng)
            is_good = number % 2 == 0
            run.one(call if is_good else break_call(rng, call), is_good=is_good)
        samples.append((time.perf_counter() - began) / count * 1e6)
    for failure in run.failures:
        print(failure, flush=True)
    for message, count in run.stricter.most_common(60):
        print(f"{count:8} refused, and SGLang's code takes it: {message!r}", flush=True)
    result = record(
        "fuzz_gates_generate",
        metric="time of a generated call through the gate and SGLang's classes, mean of 10,000",
        unit="us",
        samples=samples,
        settings={"cases": args.cases, "seed": args.seed, "vocabulary": VOCAB, "context": CONTEXT},
        checks={
            "calls": sum(run.outcomes.values()),
            "passed the gate and SGLang's own checks": run.outcomes["passed"],
            "refused by the gate": run.outcomes["refused"],
            "without prompts": run.outcomes["no prompts"],
            "failed": run.outcomes["failed"],
        },
        target="no call fails: good ones pass, others are refused or taken by SGLang",
        target_met=run.outcomes["failed"] == 0,
        load_before=load,
    )
    publish(result, write=args.write)
    if run.outcomes["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
