"""TRL's names for what vLLM is given, translated to SGLang's.  Pure functions; nothing of TRL is imported."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from tpcolocate.checks import check_integer
from tpcolocate.errors import ConfigError, TpColocateError

# vLLM's names on the left.  What both call alike (temperature, stop, ...) is not listed.
_SAMPLING_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}
_STRUCTURED_NAMES = {"regex": "regex", "json": "json_schema", "grammar": "ebnf", "structural_tag": "structural_tag"}
_WITH_TRL = "with TRL: "
# What errors speak of, and what it is in a script with TRL.
_IN_TRL = {
    r"\btp_size\b": "vllm_tensor_parallel_size sets tp_size",
    r"\bmem_fraction_static\b": "vllm_gpu_memory_utilization sets mem_fraction_static",
    r"\bcontext_length\b": "vllm_max_model_length sets context_length",
    r"\benable_memory_saver\b": "vllm_enable_sleep_mode sets enable_memory_saver",
    r"\bmax_new_tokens\b": "max_completion_length sets max_new_tokens",
    r"\binit\(\)": "building the trainer calls init(), on every rank",
    r"\btimeout_s(=\S+)? of init\(\)": "use_sglang(timeout_s=...) sets its timeout_s",
    r"\bis a quantised weight\b": "load the model without quantization_config",
    r"\bmerge_and_unload\(\)": "pass a LoraConfig without DoRA, other variants or biases",
}
# Of vLLM's SamplingParams, without a counterpart in SGLang's.
_NO_COUNTERPART = frozenset({
    "allowed_token_ids", "bad_words", "best_of", "detokenize", "extra_args", "flat_logprobs", "guided_decoding",
    "include_stop_str_in_output", "logits_processors", "output_kind", "prompt_logprobs", "truncate_prompt_tokens",
})  # fmt: skip


CPU_TOKENS = 16_384
"""Of the KV cache on a CPU, where SGLang takes the fraction of all memory, once for each TP rank."""


@dataclass(frozen=True, kw_only=True)
class VllmArguments:
    """What TRL's trainers pass to ``VLLMGeneration``, with its names and defaults; see its documentation.

    The ``server_*`` arguments and `group_port` matter in server mode alone, which is refused.
    """

    mode: str = "colocate"
    structured_outputs_regex: str | None = None
    server_base_url: str | None = None
    server_host: str = "0.0.0.0"
    server_port: int = 8000
    server_timeout: float = 240.0
    group_port: int = 51216
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_length: int | None = None
    max_num_seqs: int | None = None
    enable_sleep_mode: bool = False
    model_impl: str = "auto"
    trust_remote_code: bool = False
    repetition_penalty: float | None = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = 0
    min_p: float | None = 0.0
    max_completion_length: int | None = 16
    logprobs: int | None = 0
    generation_kwargs: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Raise ConfigError for what SGLang on the training ranks cannot do."""
        if self.mode != "colocate":
            raise ConfigError(
                f"vllm_mode={self.mode!r} is for a vLLM server that somebody else has started",
                hint="set vllm_mode='colocate': use_sglang() starts the servers on the training ranks",
            )
        if self.model_impl not in ("auto", "vllm", "transformers"):
            raise ConfigError(
                f"vllm_model_impl={self.model_impl!r} has no counterpart in SGLang",
                hint="leave it out for SGLang's own models, or set it to 'transformers'",
            )

    def tp_size(self, given: int | None) -> int:
        """Return the GPUs per server: `given` to use_sglang(), or else the trainer's ``vllm_tensor_parallel_size``.

        Raises:
            ConfigError: Both are given, and differ.
        """
        if given is None:
            return self.tensor_parallel_size
        if self.tensor_parallel_size not in (1, given):  # 1 is the default
            raise ConfigError(
                f"use_sglang(tp_size={given}) and vllm_tensor_parallel_size={self.tensor_parallel_size} differ",
                hint="leave one of them out",
            )
        return given

    def server_args(self, *, device_type: str, seed: int) -> dict[str, Any]:
        """Return the server's arguments; None for what SGLang, or the launch, decides itself.

        Args:
            device_type: Of the training ranks.  A CPU has no memory saver, and a share of a GPU is none of its memory.
            seed: Differs between servers, so that they do not sample alike.
        """
        return {
            "random_seed": seed,
            "mem_fraction_static": self.gpu_memory_utilization if device_type != "cpu" else None,
            "max_total_tokens": CPU_TOKENS if device_type == "cpu" else None,
            "context_length": self.max_model_length,
            "max_running_requests": self.max_num_seqs,
            "trust_remote_code": True if self.trust_remote_code else None,
            "model_impl": self.model_impl if self.model_impl == "transformers" else None,
            "enable_memory_saver": True if self.enable_sleep_mode and device_type != "cpu" else None,
        }

    def sampling(self) -> tuple[dict[str, Any], int | None]:
        """Return SGLang's sampling parameters of one completion, and how many top log-probabilities TRL wants per token.

        The second is 0 for those of the sampled tokens alone, and None for none at all.

        Raises:
            ConfigError: ``generation_kwargs`` has what SGLang lacks, or more than one completion per prompt: TRL repeats
                prompts itself.
        """
        own = {
            "max_new_tokens": self.max_completion_length,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        given = dict(self.generation_kwargs or {})
        logprobs = given.pop("logprobs", self.logprobs)
        if logprobs is not None:
            check_integer("logprobs", logprobs, at_least=0)
        structured = given.pop("structured_outputs", None) or {}
        if unknown := _NO_COUNTERPART & set(given):
            raise ConfigError(
                f"generation_kwargs has {', '.join(sorted(unknown))}, which SGLang does not have",
                hint="use SGLang's sampling parameters",
            )
        if given.pop("n", 1) != 1:
            raise ConfigError(
                f"generation_kwargs has n={(self.generation_kwargs or {})['n']}",
                hint="set num_generations of the trainer: TRL repeats the prompts itself",
            )
        renamed = {_SAMPLING_NAMES.get(name, name): value for name, value in given.items()}
        merged = {**own, **renamed, **self._constraint(structured)}
        if merged.get("top_k") == 0:
            merged["top_k"] = -1  # all tokens
        # Without a limit an answer may be as long as the context; without the name SGLang ends it after 128 tokens.
        return {
            name: value for name, value in merged.items() if value is not None or name == "max_new_tokens"
        }, logprobs

    def _constraint(self, structured: Any) -> dict[str, str]:
        if self.structured_outputs_regex is not None:
            return {"regex": self.structured_outputs_regex}
        if not isinstance(structured, Mapping) or set(structured) - set(_STRUCTURED_NAMES):
            raise ConfigError(
                f"generation_kwargs has structured_outputs={structured!r}, which SGLang does not have in this form",
                hint=f"pass a dict with one of {', '.join(_STRUCTURED_NAMES)}",
            )
        return {
            _STRUCTURED_NAMES[name]: value if isinstance(value, str) else json.dumps(value)
            for name, value in structured.items()
            if value is not None
        }


@contextmanager
def explained_for_trl() -> Iterator[None]:
    """Add to the hint of an error what it says in terms of a script with TRL."""
    try:
        yield
    except TpColocateError as error:
        text = f"{error.message} {error.hint or ''}"
        if _WITH_TRL not in text and (
            meanings := "; ".join(meaning for pattern, meaning in _IN_TRL.items() if re.search(pattern, text))
        ):
            error.hint = f"{_WITH_TRL}{meanings}" if error.hint is None else f"{error.hint}; {_WITH_TRL}{meanings}"
        raise


OBJECTS = ("model", "accelerator", "processing_class")
KEYWORDS = frozenset(OBJECTS) | {field.name for field in fields(VllmArguments)}


def check_constructor(constructor: Callable[..., Any], *, release: str) -> None:
    """Compare the constructor that is replaced with the one that replaces it.

    Args:
        constructor: ``VLLMGeneration.__init__`` of the installed TRL.
        release: Of TRL.

    Raises:
        ConfigError: It takes a keyword that is not known here, so that a trainer may pass it.
    """
    parameters = list(inspect.signature(constructor).parameters.values())[1:]  # without self
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    check_keywords((p.name for p in named), release=release)


def check_keywords(names: Iterable[str], *, release: str) -> None:
    """Raise ConfigError for keywords of ``VLLMGeneration`` that are not known here."""
    if unknown := sorted(set(names) - KEYWORDS):
        raise ConfigError(
            f"VLLMGeneration of TRL {release} has the argument {', '.join(unknown)}, which use_sglang() does not know",
            hint="install a release of TRL that docs/integrations.md names, or a newer tpcolocate",
        )


__all__ = [
    "CPU_TOKENS",
    "KEYWORDS",
    "OBJECTS",
    "VllmArguments",
    "check_constructor",
    "check_keywords",
    "explained_for_trl",
]
