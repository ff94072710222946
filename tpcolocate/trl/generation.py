"""What a TRL trainer uses to generate: the methods of ``VLLMGeneration``, carried out by an engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tpcolocate.engine.engine import Engine
from tpcolocate.errors import ConfigError, TpColocateError
from tpcolocate.server.http import ServerClient
from tpcolocate.trl.arguments import explained_for_trl

_DESCRIBE_S = 30.0
Completions = tuple[list[list[int]], list[list[int]], list[Any] | None, list[Any] | None]


class SGLangGeneration:
    """Stands in for TRL's ``VLLMGeneration`` in a trainer that has been built under `use_sglang`.

    Args:
        engine: Launched for this trainer.
        model: As the trainer has passed it, before accelerate prepares it.
        accelerator: The trainer's.
        sampling_params: SGLang's, of every completion.
        logprobs: Top log-probabilities per token; 0 for the sampled tokens' alone, None for none.
        sleeps: Release the server's memory whenever it does not generate.
        timeout_s: For all completions of one call, in seconds.

    Attributes:
        engine: For calls of your own, such as ``engine.health()``.
        report: Of the last weight sync; None before the first.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        model: nn.Module,
        accelerator: Any,
        sampling_params: Mapping[str, Any],
        logprobs: int | None,
        sleeps: bool,
        timeout_s: float | None,
    ) -> None:
        self.engine = engine
        self.report: Any = None
        self._model = model
        self._accelerator = accelerator
        self._sampling_params = dict(sampling_params)
        self._logprobs = logprobs
        self._sleeps = sleeps
        self._timeout_s = timeout_s
        self._max_model_len: int | None = None
        # The weights of a sleeping server are lost, and a trainer that generates twice in one step syncs once.
        self._weights_asleep = sleeps
        if sleeps:
            engine.sleep()

    @property
    def llm(self) -> SimpleNamespace:
        """``llm.llm_engine.model_config.max_model_len``, which the trainers' tool loop reads; in tokens."""
        if self._max_model_len is None:
            client = ServerClient(self.engine.url, api_key=self.engine.api_key)
            try:
                (served,) = client.get("/v1/models", timeout_s=_DESCRIBE_S)["data"][:1]
            finally:
                client.close()
            self._max_model_len = int(served["max_model_len"])
        config = SimpleNamespace(max_model_len=self._max_model_len)
        return SimpleNamespace(llm_engine=SimpleNamespace(model_config=config))

    @explained_for_trl()
    def sync_weights(self) -> None:
        """Update the server's weights.

        Collective: over all training ranks.  Raises as `Engine.wake` and `Engine.sync_weights`.
        """
        if self._sleeps:
            _empty_cache()  # the server needs what the trainer has freed
            self.engine.wake(["weights"])
        self.report = self.engine.sync_weights(prepared_module(self._accelerator, self._model))
        self._weights_asleep = False

    @explained_for_trl()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[Any] | None,
        num_generations: int,
        profiler: AbstractContextManager[Any] | None = None,
    ) -> Completions:
        """Return prompts, completions, log-probabilities and their tokens, one of each per prompt.

        Collective: over the slice with sleep mode, else not.

        Args:
            prompts: Token ids of this rank's prompts, repeated as often as completions are wanted.
            images: None; or None for every prompt.
            num_generations: Not used: see `prompts`.
            profiler: Entered around the requests.

        Returns:
            ``prompt_ids`` and ``completion_ids``: lists of token ids.  ``logprobs`` and ``logprob_token_ids``: for each
            completion and token a list, the most probable first, None where a number is not finite; None if the trainer
            wants none.

        Raises:
            ConfigError: Images.  Others as `Engine.generate`, `Engine.wake` and `Engine.sleep`.
        """
        if images is not None and any(image is not None for image in images):
            raise ConfigError("prompts with images are not supported", hint="train on text, or with TRL's own vLLM")
        if self._sleeps:
            if self._weights_asleep:
                self.sync_weights()
            self.engine.wake()
        fields: dict[str, Any] = {}
        if self._logprobs is not None:
            fields = {"return_logprob": True, "top_logprobs_num": self._logprobs}
        try:
            with profiler if profiler is not None else nullcontext():
                answers = self.engine.generate(
                    [list(prompt) for prompt in prompts],
                    self._fitting(prompts),
                    timeout_s=self._timeout_s,
                    **fields,
                )
        except Exception:
            # The error may be of this rank alone: the others wait for it in their sleep().
            with suppress(TpColocateError):
                self._sleep()
            raise
        self._sleep()
        completions = [list(answer["output_ids"]) for answer in answers]
        if self._logprobs is None:
            return [list(prompt) for prompt in prompts], completions, None, None
        ranked = [ranked_logprobs(answer["meta_info"], self._logprobs) for answer in answers]
        values = [[[value for value, _ in token] for token in tokens] for tokens in ranked]
        token_ids = [[[token_id for _, token_id in token] for token in tokens] for tokens in ranked]
        return [list(prompt) for prompt in prompts], completions, values, token_ids

    def _fitting(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any] | list[dict[str, Any]]:
        """Return the sampling parameters, with fewer new tokens for a prompt beside which not all of them fit into the context.

        vLLM ends such a completion at the end of the context, and SGLang refuses it.  In a trainer's tool loop prompts grow
        with every turn, up to the context.
        """
        most = self._sampling_params.get("max_new_tokens")
        if most is None:
            return self._sampling_params
        context = self.llm.llm_engine.model_config.max_model_len
        if all(len(prompt) + most <= context for prompt in prompts):
            return self._sampling_params
        # At least one: a prompt that fills the context by itself is the engine's to refuse.
        fitting = [max(context - len(prompt), 1) for prompt in prompts]
        return [{**self._sampling_params, "max_new_tokens": min(most, each)} for each in fitting]

    def _sleep(self) -> None:
        if self._sleeps:
            self.engine.sleep()
            self._weights_asleep = True


def ranked_logprobs(meta_info: Mapping[str, Any], num_top: int) -> list[list[tuple[float | None, int]]]:
    """Return (log-probability, token id) per output token, as vLLM orders them: the most probable first.

    Args:
        meta_info: Of an answer with log-probabilities.
        num_top: The most probable tokens that were asked for; the sampled one comes on top if it is none of them.
    """
    sampled = [(value, token_id) for value, token_id, *_ in meta_info["output_token_logprobs"]]
    top = meta_info["output_top_logprobs"] if num_top else [()] * len(sampled)
    ranked = []
    for (value, token_id), others in zip(sampled, top, strict=True):
        found = {token_id: value} | {other: other_value for other_value, other, *_ in others or ()}
        ordered = sorted(found.items(), key=lambda item: -math.inf if item[1] is None else item[1], reverse=True)
        ranked.append([(_finite(each), other) for other, each in ordered])
    return ranked


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def prepared_module(accelerator: Any, model: nn.Module) -> nn.Module:
    """Return the module that holds the weights: `model`, or what accelerate has wrapped it into.

    FSDP1 and DeepSpeed keep weights in the wrapper, which a trainer has only after it was built.
    """
    for prepared in reversed(getattr(accelerator, "_models", ())):
        inner: Any = prepared
        while isinstance(inner, nn.Module):
            if inner is model:
                return prepared
            inner = inner._modules.get(
                "module", inner._modules.get("_fsdp_wrapped_module", inner._modules.get("_orig_mod"))
            )
    return model


def _empty_cache() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


__all__ = ["SGLangGeneration", "prepared_module", "ranked_logprobs"]
