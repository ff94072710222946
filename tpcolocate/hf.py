"""For the Trainer of transformers: generate with the weights of the moment, every so many steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from tpcolocate.engine.client import SamplingParams
from tpcolocate.engine.engine import Engine
from tpcolocate.engine.values import is_array, is_list
from tpcolocate.errors import ConfigError, shown

Share = tuple[int, Mapping[str, float]]
Score = Callable[[Sequence[Any], Sequence[Mapping[str, Any]]], Mapping[str, float]]


class GenerationCallback(TrainerCallback):
    """Syncs the trainer's weights into an engine every `every_steps` steps, generates, and logs what `score` returns.

    Each rank generates for its share of the prompts.  The figures are averaged over all prompts and logged by
    ``trainer.log``, so that they are in ``trainer.state.log_history`` and go to every tracker.

    Collective: every rank adds one to its trainer, with the same arguments.  Errors of the engine end the training; see
    `Engine.sync_weights` and `Engine.generate`.

    Args:
        trainer: Whose weights are synced, and whose log is written.
        engine: From `Colocation.launch`.
        prompts: Texts, or lists of token ids; not empty.
        sampling_params: SGLang's.
        score: Called on every rank with its share of the prompts and their answers, as SGLang returns them (in number
            ``n`` times the prompts, with ``n`` in `sampling_params`).  Returns means over them by name.  A rank without a
            share does not call it.
        every_steps: Optimizer steps from one time to the next.
        sleep: Let the server sleep in between.  It is put to sleep here, for the first time.
        prefix: Put before the names of the figures.
        timeout_s: For all answers of one time, in seconds; see `Engine.generate`.
        fields: Any other field of SGLang's ``/generate``, such as ``return_logprob=True``.

    Attributes:
        report: Of the last weight sync; None before the first.

    Raises:
        ConfigError: No prompts, or steps that are not positive.
    """

    def __init__(
        self,
        trainer: Any,
        engine: Engine,
        prompts: Sequence[Any],
        sampling_params: SamplingParams | None = None,
        *,
        score: Score,
        every_steps: int,
        sleep: bool = False,
        prefix: str = "eval_",
        timeout_s: float | None = None,
        **fields: Any,
    ) -> None:
        if not (is_list(prompts) or is_array(prompts)) or not len(prompts):
            raise ConfigError(
                f"prompts must be a list that is not empty, got {shown(prompts)}",
                hint="of texts or lists of token ids, such as input_ids of a tokenizer's output",
            )
        if not isinstance(every_steps, int) or every_steps < 1:
            raise ConfigError(f"every_steps must be a positive integer, got {every_steps!r}")
        self.report: Any = None
        self._trainer = trainer
        self._engine = engine
        self._prompts = list(prompts)
        self._request = {"sampling_params": sampling_params, "timeout_s": timeout_s, **fields}
        self._score = score
        self._every_steps = every_steps
        self._sleep = sleep
        self._prefix = prefix
        if sleep:
            engine.sleep()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every_steps == 0:
            self._trainer.log({self._prefix + name: value for name, value in self.evaluate().items()})

    def evaluate(self) -> dict[str, float]:
        """Sync, generate and score now; return the means over all prompts.

        Collective: over all training ranks.
        """
        if self._sleep:
            _empty_cache()
            self._engine.wake(["weights"])
        # DeepSpeed and FSDP1 keep weights in the wrapper.
        self.report = self._engine.sync_weights(self._trainer.model_wrapped)
        if self._sleep:
            self._engine.wake()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        prompts = self._prompts[rank::world_size]
        own: dict[str, float] = {}
        if prompts:
            answers = self._engine.generate(prompts, **self._request)
            own = {name: float(value) for name, value in self._score(prompts, answers).items()}
        if self._sleep:
            self._engine.sleep()
        shares: list[Share] = [(len(prompts), own)] * world_size
        if world_size > 1:
            dist.all_gather_object(shares, (len(prompts), own))
        return weighted_means(shares)


def weighted_means(shares: Sequence[Share]) -> dict[str, float]:
    """Return the mean of each figure over all prompts, from the number of prompts and the means of each rank."""
    names = dict.fromkeys(name for _, figures in shares for name in figures)
    means = {}
    for name in names:
        given = [(count, figures[name]) for count, figures in shares if name in figures]
        means[name] = sum(count * value for count, value in given) / sum(count for count, _ in given)
    return means


def _empty_cache() -> None:
    """Return what torch has cached: the server needs it."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


__all__ = ["GenerationCallback", "weighted_means"]
