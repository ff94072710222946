"""The gate of `generate`: what would end the server, hang, or be ignored by it is refused before it is sent.

SGLang shares one scheduler among all requests, and an exception in it ends the server for every rank.  So the fields of
a request are checked here, by name, type and range; `sampling` and `prompts` do the same for theirs.
"""

from __future__ import annotations

import base64
import copy
import difflib
import io
import json
import os
import pickletools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpcolocate.engine.limits import ServerLimits
from tpcolocate.engine.prompts import CHAT_HINT, Prompts, read_prompts
from tpcolocate.engine.sampling import PARAMETERS, advice, check_sampling, is_sampling_name, token_ids
from tpcolocate.engine.values import contents, flag, integer, is_array, is_list, plain, refuse, text
from tpcolocate.errors import ConfigError, TpColocateError, shown, some

PROMPT_FIELDS = ("text", "input_ids", "input_embeds")
# Its scheduler drops them while it is busy.
_HEALTH_CHECK = "HEALTH_CHECK"
# Of PIL's images; PNG has them, and SGLang's processors know them.
_PNG_MODES = ("RGB", "RGBA", "L")
# Samples of one call: each is a request of its own in the server.
_MOST_SAMPLES = 2**17


@dataclass(frozen=True, slots=True)
class Field:
    """One field of ``/generate``.

    Attributes:
        check: Returns what is sent for one prompt; takes the value, its name for messages, and the limits.
        per_prompt: Whether a list has one value per prompt.
        may_be_list: Whether the value of one prompt may be a list itself.
        may_be_none: Whether a prompt may go without while others have one.
    """

    check: Callable[[Any, str, ServerLimits], Any]
    per_prompt: bool = False
    may_be_list: bool = False
    may_be_none: bool = False


def _flag(value: Any, where: str, limits: ServerLimits) -> bool:
    return flag(value, where)


def _text(value: Any, where: str, limits: ServerLimits) -> str:
    return text(value, where)


def _any(value: Any, where: str, limits: ServerLimits) -> Any:
    return plain(value, where)


def _media(value: Any, where: str, limits: ServerLimits) -> Any:
    kind = where.split("_")[0]
    if limits.media is not None and kind not in limits.media:
        raise ConfigError(f"{where} is given, and the served model takes no {kind}", hint="SGLang would ignore it")
    found = plain(_as_urls(value), where)
    for each in found if isinstance(found, list) and found else [found]:
        if not isinstance(each, (str, dict)) or not each:
            raise refuse(
                where,
                "a path, URL, image of PIL, bytes, base64 text or dict, or a list of them",
                value,
                "PIL.Image.fromarray() makes an image of an array" if is_array(value) else None,
            )
    return found


def _as_urls(value: Any) -> Any:
    """Return images and other content in memory as URLs that contain it, and paths as texts; anything else as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (bytes, bytearray)):
        return f"data:application/octet-stream;base64,{base64.b64encode(value).decode()}"
    if hasattr(value, "convert") and hasattr(value, "save"):  # of PIL, which need not be installed
        written = io.BytesIO()
        (value if value.mode in _PNG_MODES else value.convert("RGB")).save(written, format="PNG")
        return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
    return [_as_urls(each) for each in value] if is_list(value) else value


def _dict(value: Any, where: str, limits: ServerLimits) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise refuse(where, "a dict", value)
    return dict(plain(value, where))


def _integer(low: int, high: int = 2**31 - 1) -> Callable[[Any, str, ServerLimits], int]:
    return lambda value, where, limits: integer(value, where, low=low, high=high)


def _top_logprobs(value: Any, where: str, limits: ServerLimits) -> int:
    high = 2**31 - 1 if limits.vocab_size is None else limits.vocab_size
    return integer(value, where, low=0, high=high, hint="the vocabulary has no more")


def _lora_path(value: Any, where: str, limits: ServerLimits) -> str:
    name = text(value, where, hint="the name given to set_lora; None for the model without an adapter")
    if not limits.has_lora:
        raise ConfigError(
            f"{where} is {shown(name)}, and the server serves no adapters", hint="launch(enable_lora=True)"
        )
    return name


def _rid(value: Any, where: str, limits: ServerLimits) -> str:
    name = text(value, where)
    if name.startswith(_HEALTH_CHECK):
        raise ConfigError(
            f"{where} is {shown(name)}, and SGLang takes what begins with {_HEALTH_CHECK} for requests of its own",
            hint="choose another name: such a request has no answer while others run",
        )
    return name


def _labels(value: Any, where: str, limits: ServerLimits) -> dict[str, str]:
    return {name: text(each, f"{where}[{name!r}]") for name, each in _dict(value, where, limits).items()}


def _hidden_states(value: Any, where: str, limits: ServerLimits) -> bool | str:
    return "last" if isinstance(value, str) and value == "last" else flag(value, where, hint='or "last"')


def _sampling_logprobs(value: Any, where: str, limits: ServerLimits) -> str:
    if not isinstance(value, str) or value not in ("selected", "support"):
        raise refuse(where, '"selected" or "support"', value)
    return value


def _session(value: Any, where: str, limits: ServerLimits) -> dict[str, Any]:
    # SGLang looks them up in its scheduler, which an exception ends.
    checks = {"id": _text, "rid": _text, "offset": _integer(-(2**31)), "replace": _flag, "drop_previous_output": _flag}
    found = _dict(value, where, limits)
    if unknown := set(found) - set(checks):
        raise ConfigError(f"{where} has {', '.join(sorted(map(str, unknown)))}", hint=f"there are {', '.join(checks)}")
    return {
        name: None if each is None else checks[name](each, f"{where}[{name!r}]", limits) for name, each in found.items()
    }


def _logit_processor(value: Any, where: str, limits: ServerLimits) -> str:
    """As ``CustomLogitProcessor.to_str`` of SGLang writes it; its scheduler reads it, which an exception ends."""
    written = text(value, where)
    try:
        parts = json.loads(written)
        for _ in pickletools.genops(bytes.fromhex(parts["callable"])):  # read, and not carried out
            pass
    except (ValueError, TypeError, KeyError, LookupError, RecursionError):
        raise refuse(where, "what CustomLogitProcessor.to_str() returns", value) from None
    return written


_FLAG, _EACH_TEXT = Field(_flag), Field(_text, per_prompt=True)
_EACH_MEDIA = Field(_media, per_prompt=True, may_be_list=True, may_be_none=True)
FIELDS: Mapping[str, Field] = {
    "rid": Field(_rid, per_prompt=True),
    "return_logprob": Field(_flag, per_prompt=True),
    "logprob_start_len": Field(_integer(-1), per_prompt=True),
    "top_logprobs_num": Field(_top_logprobs, per_prompt=True),
    "token_ids_logprob": Field(token_ids),
    "return_text_in_logprobs": _FLAG,
    "lora_path": Field(_lora_path, per_prompt=True, may_be_none=True),
    "return_hidden_states": Field(_hidden_states, per_prompt=True),
    "image_data": _EACH_MEDIA,
    "video_data": _EACH_MEDIA,
    "audio_data": _EACH_MEDIA,
    "session_params": Field(_session),
    "stream": _FLAG,
    # Of some releases; whether the server has one is looked up in its own description.
    "return_sampling_mask": Field(_flag, per_prompt=True),
    "sampling_logprobs_mode": Field(_sampling_logprobs, per_prompt=True, may_be_none=True),
    "return_flat_raw_top_logprobs": _FLAG,
    "return_flat_raw_top_logprobs_b64": _FLAG,
    "return_routed_experts": _FLAG,
    "routed_experts_start_len": Field(_integer(0)),
    "return_indexer_topk": _FLAG,
    "return_entropy": _FLAG,
    "return_prompt_token_ids": _FLAG,
    "use_audio_in_video": _FLAG,
    "log_metrics": _FLAG,
    "no_logs": _FLAG,
    "require_reasoning": _FLAG,
    "max_thinking_tokens": Field(_integer(0)),
    "priority": Field(_integer(-(2**31))),
    "custom_logit_processor": Field(_logit_processor, per_prompt=True, may_be_none=True),
    "extra_key": _EACH_TEXT,
    "cache_salt": _EACH_TEXT,
    "session_id": Field(_text),
    "routing_key": Field(_text),
    "conversation_id": Field(_text),
    "custom_labels": Field(_labels),
    "video_config": Field(_dict),
    "images_config": Field(_dict),
}
KNOWN_FIELDS = frozenset(
    "text input_ids input_embeds image_data sampling_params rid return_logprob logprob_start_len top_logprobs_num "
    "token_ids_logprob return_text_in_logprobs stream lora_path return_hidden_states session_params".split()
)
# SGLang fills them itself, or takes them from a router in front of several servers.
_INTERNAL = frozenset(
    "lora_id http_worker_ipc positional_embed_overrides bootstrap_host bootstrap_port bootstrap_room bootstrap_pair_key "
    "decode_tp_size disagg_prefill_dp_rank routed_dp_rank data_parallel_rank need_wait_for_mm_inputs num_items_assigned "
    "encoder_urls external_trace_header received_time return_bytes background kv_hints multi_item_delimiter_indices "
    "token_indices_to_pool".split()
)
_AS_PROMPTS = "pass them first: generate(prompts, ...), texts or token ids"
# Names of other libraries, and what to write here.
_ELSEWHERE = {
    **dict.fromkeys(("prompt", "inputs", "prompt_token_ids", "prompt_ids", "token_ids", "texts"), _AS_PROMPTS),
    **dict.fromkeys(("messages", "conversation", "chat"), CHAT_HINT),
    **dict.fromkeys(
        ("lora_request", "lora_name", "lora", "adapter", "adapter_name"), "the name given to set_lora is lora_path="
    ),
    **dict.fromkeys(("image", "images"), "the field is image_data="),
    **dict.fromkeys(
        ("token_type_ids", "position_ids", "pixel_values"),
        "pass the tokenizer's output itself: generate(tokenizer(texts))",
    ),
    "request_id": "the field is rid=",
    "timeout": "the argument is timeout_s=, in seconds",
    "generation_config": 'write what it has as a dict, with SGLang\'s names: generate(prompts, {"max_new_tokens": 64})',
}
# A field, and the one that it needs to be true.
_NEEDS = {
    "sampling_logprobs_mode": "return_sampling_mask",
    "return_flat_raw_top_logprobs_b64": "return_flat_raw_top_logprobs",
}
# What SGLang ignores without ``return_logprob``, and the value of each that asks for nothing.
_OF_LOGPROBS: Mapping[str, Any] = {
    "logprob_start_len": -1,
    "top_logprobs_num": 0,
    "token_ids_logprob": [],
    "return_text_in_logprobs": False,
}
_NOT_WITH_SAMPLES = (
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_sampling_mask",
    "sampling_logprobs_mode",
    "custom_logit_processor",
)


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One call of `generate`, checked.

    Attributes:
        prompts: Its prompts; a bad one is an error in its place.
        common: Fields of all prompts.
        own: Fields of single prompts: name -> one value per prompt.
        samples: Answers per prompt.
    """

    prompts: Prompts
    common: Mapping[str, Any]
    own: Mapping[str, list[Any]]
    samples: int

    def body(self) -> dict[str, Any]:
        """Return the request for all prompts.

        Raises:
            TpColocateError: Of the first bad prompt; the others' are in ``details``.
        """
        if bad := list(self.prompts.bad.values()):
            first = copy.copy(bad[0])
            if len(bad) > 1:
                first.details = f"{len(bad)} of {len(self.prompts)} prompts are refused, also:\n  " + some(
                    [each.message for each in bad[1:]], between="\n  "
                )
            raise first
        items = self.prompts.items
        body: dict[str, Any] = {self.prompts.field: items[0] if self.prompts.is_single else items, **self.common}
        return body | {name: values[0] if self.prompts.is_single else values for name, values in self.own.items()}

    def body_of(self, index: int) -> dict[str, Any]:
        """Return a request for one prompt."""
        body: dict[str, Any] = {self.prompts.field: self.prompts.items[index], **self.common}
        body |= {name: values[index] for name, values in self.own.items() if values[index] is not None}
        if isinstance(body.get("rid"), str) and "rid" in self.common and not self.prompts.is_single:
            body["rid"] = f"{body['rid']}_{index}"  # as SGLang names the requests of a list
        return body


def check_call(
    prompts: Any,
    sampling_params: Any,
    fields: Mapping[str, Any],
    *,
    stream: bool,
    limits: ServerLimits,
    known: Callable[[], frozenset[str]] = lambda: frozenset(),
) -> GenerateCall:
    """Return a call of `generate` as it is sent.

    A prompt that cannot be sent, or whose own fields cannot, is an error in its place.

    Args:
        prompts: As for `Engine.generate`.
        sampling_params: Likewise.
        fields: Likewise.
        stream: Likewise.
        limits: Of the server.
        known: Returns the fields that the server has; asked for only if one is not in `KNOWN_FIELDS`.

    Raises:
        ConfigError: What concerns the call as a whole.
    """
    if not limits.generates:
        raise ConfigError(
            "the served model does not generate: it is one for embeddings, rewards or classification",
            hint="a request of generate() would end its server; ask engine.url with engine.api_key, as SGLang's documentation has it",
        )
    given = {name: value for name, value in fields.items() if value is not None}
    mask = given.pop("attention_mask", None)
    _check_names(given, known)
    named = [name for name in PROMPT_FIELDS if name in given]
    if len(named) + (prompts is not None) > 1:
        raise ConfigError("prompts are given twice", hint="pass prompts, or text=, or input_ids=, or input_embeds=")
    if not named and prompts is None:
        raise ConfigError(
            "there is nothing to generate from", hint="pass prompts, or text=, input_ids= or input_embeds="
        )
    field = named[0] if named else None
    if field is not None:
        prompts = given.pop(field)
    read = read_prompts(prompts if mask is None else _with_mask(prompts, mask, field), limits, field=field)
    common: dict[str, Any] = {}
    own: dict[str, list[Any]] = {}
    if flag(stream, "stream"):
        common["stream"] = True
    samples = _add_sampling(sampling_params, read, limits, common, own)
    for name, value in given.items():
        if value is not False:
            limits.check_used(name, name)
        if name == "token_ids_logprob":
            _add_token_ids(value, read, limits, common, own)
        else:
            _add(name, value, read, limits, common, own)
    _check_unique(own)
    for name, needed in _NEEDS.items():
        if (common.get(name) or name in own) and not (common.get(needed) or all(own.get(needed, [False]))):
            raise ConfigError(f"{name} needs {needed}=True")
    _check_logprobs(common, own)
    if common.get("return_text_in_logprobs"):
        limits.check_tokenizer("return_text_in_logprobs", instead="leave it out")
    if samples > 1 and ("rid" in common or "rid" in own):
        raise ConfigError(
            f"rid is given with n={samples}, and SGLang would ignore it: it names each sample itself",
            hint="leave it out, or repeat the prompt instead of n",
        )
    if samples > 1:
        _merge_equal(own, common)
    if samples * len(read) > _MOST_SAMPLES:
        raise ConfigError(
            f"{len(read)} prompts with n={samples} are {samples * len(read)} samples, more than {_MOST_SAMPLES}",
            hint="make several calls of it",
        )
    call = GenerateCall(read, common, own, samples)
    _check_lengths(call, limits)
    return call


def _with_mask(prompts: Any, mask: Any, field: str | None) -> dict[str, Any]:
    """Return token ids and their mask as a tokenizer does, of ``generate(**tokenizer(texts, padding=True))``."""
    first = next(iter(prompts), None) if is_list(prompts) else prompts
    if field not in (None, "input_ids") or isinstance(first, (str, Mapping)):
        raise ConfigError("attention_mask is given without token ids", hint="leave it out: it is for padded ones")
    return {"input_ids": prompts, "attention_mask": mask}


def _check_names(given: Mapping[str, Any], known: Callable[[], frozenset[str]]) -> None:
    for name in given:
        if name in _INTERNAL:
            raise ConfigError(f"the field {name} is set by SGLang itself, or by a router", hint="leave it out")
    unknown = set(given) - KNOWN_FIELDS
    if unknown and (unknown := unknown - known()):
        name = min(unknown)
        if name in PARAMETERS:
            hint = f'sampling parameters go into a dict: generate(prompts, {{"{name}": ...}})'
        elif is_sampling_name(name):
            hint = f"sampling parameters go into a dict: generate(prompts, {{...}}); {advice(name)}"
        elif name in _ELSEWHERE:
            hint = _ELSEWHERE[name]
        else:
            close = difflib.get_close_matches(name, KNOWN_FIELDS | set(FIELDS), n=1)
            hint = f"did you mean {close[0]}?" if close else "leave it out: SGLang would ignore it"
        raise ConfigError(f"this server's /generate has no field {', '.join(sorted(unknown))}", hint=hint)


def _add_sampling(
    given: Any, prompts: Prompts, limits: ServerLimits, common: dict[str, Any], own: dict[str, list[Any]]
) -> int:
    """Add the sampling parameters; return the number of samples per prompt."""
    if given is None:
        return 1
    names = KNOWN_FIELDS | frozenset(FIELDS)
    if not is_list(given):
        common["sampling_params"] = check_sampling(given, limits, fields=names)
        return _samples(common["sampling_params"])
    values = _one_each("sampling_params", given, prompts)
    found: list[dict[str, Any]] = []
    checked: dict[int, dict[str, Any] | TpColocateError] = {}  # the same dict is often repeated
    for i, value in enumerate(values):
        if id(value) not in checked:
            try:
                checked[id(value)] = check_sampling(value, limits, where=f" of {prompts.name(i)}", fields=names)
            except TpColocateError as error:
                checked[id(value)] = error
        result = checked[id(value)]
        if isinstance(result, TpColocateError):
            _mark(prompts, i, result)
        found.append({} if isinstance(result, TpColocateError) else result)
    counts = {_samples(each) for i, each in enumerate(found) if i not in prompts.bad}
    if len(counts) > 1:
        raise ConfigError(
            f"the prompts of one call have one n, got {', '.join(map(str, sorted(counts)))}",
            hint="make a call for each n",
        )
    own["sampling_params"] = found
    return counts.pop() if counts else 1


def _samples(parameters: Mapping[str, Any]) -> int:
    count: int = parameters.get("n", 1)
    return count


def _add(
    name: str,
    value: Any,
    prompts: Prompts,
    limits: ServerLimits,
    common: dict[str, Any],
    own: dict[str, list[Any]],
) -> None:
    field = FIELDS.get(name, Field(_any))
    is_common = not (is_list(value) or is_array(value)) or (field.may_be_list and prompts.is_single)
    if not field.per_prompt or is_common:
        common[name] = field.check(value, name, limits)
        return
    own[name] = []
    for i, each in enumerate(_one_each(name, value, prompts)):
        checked = None
        try:
            if each is not None:
                checked = field.check(each, f"{name} of {prompts.name(i)}", limits)
            elif not field.may_be_none:
                raise refuse(f"{name} of {prompts.name(i)}", "given for every prompt", each, "or leave it out for all")
        except TpColocateError as error:
            _mark(prompts, i, error)
        own[name].append(checked)


def _add_token_ids(
    value: Any, prompts: Prompts, limits: ServerLimits, common: dict[str, Any], own: dict[str, list[Any]]
) -> None:
    """Add ``token_ids_logprob``: ids for all prompts, or a list of ids for each."""
    name = "token_ids_logprob"
    values = contents(value) if is_array(value) else value
    if not is_list(values) or not any(is_list(each) or is_array(each) for each in values):
        common[name] = token_ids(values, name, limits)
        return
    own[name] = []
    for i, each in enumerate(_one_each(name, values, prompts)):
        try:
            own[name].append(token_ids(each, f"{name} of {prompts.name(i)}", limits))
        except TpColocateError as error:
            own[name].append([])
            _mark(prompts, i, error)


def share_of(
    indices: Sequence[int], of: int, sampling_params: Any, fields: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the sampling parameters and fields of a call for some of its prompts: of what has one value for each, theirs.

    Args:
        indices: Of these prompts.
        of: How many prompts there are.
        sampling_params, fields: As for `Engine.generate`, for all of them.

    Raises:
        ConfigError: A list has another length.
    """

    def share(name: str, value: Any) -> list[Any]:
        values = _listed(name, value, of)
        return [values[i] for i in indices]

    found = {name: share(name, value) if _is_for_each(name, value) else value for name, value in fields.items()}
    return share("sampling_params", sampling_params) if is_list(sampling_params) else sampling_params, found


def _is_for_each(name: str, value: Any) -> bool:
    """Return whether a field of a list of prompts has one value for each of them."""
    if not is_list(value) and not is_array(value):
        return False
    if name == "token_ids_logprob":
        return any(is_list(each) or is_array(each) for each in value)
    return FIELDS.get(name, Field(_any)).per_prompt


def _one_each(name: str, value: Any, prompts: Prompts) -> list[Any]:
    if prompts.is_single:
        values = contents(value) if is_array(value) else list(value)
        raise ConfigError(
            f"{name} is a list, for a single prompt: {shown(values)}", hint=f"pass one {name}, or a list of prompts"
        )
    return _listed(name, value, len(prompts))


def _listed(name: str, value: Any, number: int) -> list[Any]:
    values = contents(value) if is_array(value) else list(value)
    if len(values) != number:
        raise ConfigError(
            f"{name} has {len(values)} entries for {number} prompts", hint="pass one for all, or one for each"
        )
    return values


def _mark(prompts: Prompts, index: int, error: TpColocateError) -> None:
    """Put an error in the place of a prompt, unless it has one."""
    if not isinstance(prompts.items[index], TpColocateError):
        prompts.items[index] = error


def _check_unique(own: Mapping[str, list[Any]]) -> None:
    rids = [rid for rid in own.get("rid", []) if rid is not None]
    if len(set(rids)) != len(rids):
        twice = next(rid for rid, number in Counter(rids).items() if number > 1)
        raise ConfigError(f"rid {shown(twice)} is given to several prompts", hint="a request is aborted by it")


def _check_logprobs(common: Mapping[str, Any], own: Mapping[str, list[Any]]) -> None:
    if common.get("return_logprob") or any(own.get("return_logprob", ())):
        return
    for name, nothing in _OF_LOGPROBS.items():
        if any(value != nothing for value in own.get(name, [common.get(name, nothing)])):
            raise ConfigError(f"{name} needs return_logprob=True", hint="SGLang would ignore it")


def _merge_equal(own: dict[str, list[Any]], common: dict[str, Any]) -> None:
    """SGLang takes no lists of these with n > 1; lists that repeat one value need not be."""
    for name in (*_NOT_WITH_SAMPLES, "token_ids_logprob"):
        values = own.pop(name, [])
        if not values:  # as without prompts
            continue
        if any(value != values[0] for value in values):
            raise ConfigError(f"{name} must be the same for all prompts with n > 1", hint="make a call for each")
        if values[0] is not None:
            common[name] = values[0]


def _check_lengths(call: GenerateCall, limits: ServerLimits) -> None:
    """Compare positions and numbers of tokens with the length of each prompt of token ids."""
    if call.prompts.field != "input_ids":
        return
    for i, ids in enumerate(call.prompts.items):
        if isinstance(ids, TpColocateError):
            continue
        start = (
            call.own["logprob_start_len"][i]
            if "logprob_start_len" in call.own
            else call.common.get("logprob_start_len")
        )
        params = call.own["sampling_params"][i] if "sampling_params" in call.own else call.common.get("sampling_params")
        more = None if not params else params.get("max_new_tokens")
        name = call.prompts.name(i)
        if start is not None and start > len(ids):
            _mark(call.prompts, i, ConfigError(f"logprob_start_len of {name} is {start}, and it has {len(ids)} tokens"))
        elif more is not None and limits.context_tokens is not None and len(ids) + more > limits.context_tokens:
            _mark(
                call.prompts,
                i,
                ConfigError(
                    f"{name} has {len(ids)} tokens, and with max_new_tokens={more} more than the {limits.context_tokens} "
                    "of the server's context",
                    hint="lower max_new_tokens (None: as many as fit), shorten it, or launch with a larger context_length",
                ),
            )


__all__ = ["FIELDS", "KNOWN_FIELDS", "GenerateCall", "check_call", "share_of"]
