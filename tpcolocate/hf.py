"""For the Trainer of transformers: generate with the weights of the moment, every so many steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from tpcolocate.agreement import ErrorReport, raise_first
from tpcolocate.checks import check_positive_integer, check_type
from tpcolocate.deadline import check_timeout
from tpcolocate.engine.client import SamplingParams
from tpcolocate.engine.engine import Engine
from tpcolocate.engine.limits import ServerLimits
from tpcolocate.engine.prompts import read_prompts
from tpcolocate.engine.requests import check_call, share_of
from tpcolocate.engine.sampling import is_sampling_name
from tpcolocate.engine.values import is_array, is_list, unpacked
from tpcolocate.errors import ConfigError, RankLostError, TpColocateError, shown

Share = tuple[int, Mapping[str, float]]
"""Number of prompts, and the means over them."""
_SCORES = "a dict of means by name"
_SCORE_HINT = f"it gets prompts and their answers, and returns {_SCORES}"
Score = Callable[[Sequence[Any], Sequence[Mapping[str, Any]]], Mapping[str, float]]


class GenerationCallback(TrainerCallback):
    """Syncs the trainer's weights into an engine every `every_steps` steps, generates, and logs what `score` returns.

    Each rank generates for its share of the prompts.  The figures are averaged over all prompts and logged by
    ``trainer.log``, so that they are in ``trainer.state.log_history`` and go to every tracker.

    Collective: every rank adds one to its trainer, with the same arguments.  An error ends the training, that of one rank on
    all of them; see `Engine.sync_weights` and `Engine.generate`.

    Args:
        trainer: Whose weights are synced, and whose log is written.
        engine: From `Colocation.launch`.
        prompts: Texts, or lists of token ids; not empty.
        sampling_params: SGLang's: one for all prompts, or one for each.
        score: Called on every rank with its share of the prompts and their answers, as SGLang returns them (in number
            ``n`` times the prompts, with ``n`` in `sampling_params`).  Returns means over them by name.  A rank without a
            share does not call it.
        every_steps: Optimizer steps from one time to the next.
        sleep: Let the server sleep in between.  It is put to sleep here, for the first time.
        prefix: Put before the names of the figures.
        timeout_s: For all answers of one time, in seconds; see `Engine.generate`.
        fields: Any other field of SGLang's ``/generate``, such as ``return_logprob=True``; a list has one value for each prompt.

    Attributes:
        report: Of the last weight sync; None before the first.

    Raises:
        ConfigError: No prompts, prompts, sampling parameters or fields that no server takes, lists of another length, steps that
            are not positive, or a `score` that cannot be called.
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
        read = read_prompts(prompts, ServerLimits())
        if read.is_single:
            raise ConfigError(
                f"prompts is one prompt of token ids, not a list of prompts: {shown(prompts)}",
                hint="pass [prompt]: the ranks share the items of the list out",
            )
        for error in read.bad.values():
            raise error
        check_positive_integer("every_steps", every_steps)
        if not callable(score):
            raise ConfigError(f"score must be a function, got {shown(score)}", hint=_SCORE_HINT)
        if fields.get("stream"):
            raise ConfigError("stream=True is given", hint="leave it out: score gets whole answers")
        self.report: Any = None
        self._trainer = trainer
        self._engine = engine
        self._prompts = list(unpacked(prompts))
        self._sampling_params = sampling_params
        self._fields = fields
        self._timeout_s = None if timeout_s is None else check_timeout(timeout_s)
        # Those of all ranks on each of them, so that all raise the same error.
        for rank in range(min(len(self._prompts), _rank_and_size()[1])):
            self._check_request(rank)
        self._score = score
        self._every_steps = every_steps
        self._sleep = sleep
        self._prefix = prefix
        if sleep:
            engine.sleep()

    def _check_request(self, rank: int) -> None:
        """Check what a rank asks for, as far as that is possible without its server: at the first time hours may have passed."""
        prompts, sampling_params, fields = self._request(self._indices(rank))
        call = check_call(
            prompts,
            sampling_params,
            {name: value for name, value in fields.items() if name != "on_error"},  # of `Engine.generate` itself
            stream=False,
            limits=ServerLimits(),
            known=lambda: frozenset(name for name in fields if not is_sampling_name(name)),
        )
        call.body()

    def _indices(self, rank: int) -> range:
        return range(rank, len(self._prompts), _rank_and_size()[1])

    def _request(self, indices: Sequence[int]) -> tuple[list[Any], Any, dict[str, Any]]:
        """Return some of the prompts, with their sampling parameters and fields."""
        prompts = [self._prompts[i] for i in indices]
        return prompts, *share_of(indices, len(self._prompts), self._sampling_params, self._fields)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every_steps == 0:
            self._trainer.log({self._prefix + name: value for name, value in self.evaluate().items()})

    def evaluate(self) -> dict[str, float]:
        """Sync, generate and score now; return the means over all prompts.

        Collective: over all training ranks.
        """
        rank, world_size = _rank_and_size()
        share: Share = 0, {}
        error: Exception | None = None
        try:
            share = self._evaluated(self._indices(rank))
        except RankLostError:
            raise  # there is somebody whom the others would wait for
        except Exception as caught:
            if world_size == 1:
                raise
            error = caught
        return weighted_means(_of_all_ranks(share, error, rank, world_size))

    def _evaluated(self, indices: Sequence[int]) -> Share:
        """Return what this rank finds for its prompts."""
        if self._sleep:
            _empty_cache()
            self._engine.wake(["weights"])
        # DeepSpeed and FSDP1 keep weights in the wrapper.
        self.report = self._engine.sync_weights(self._trainer.model_wrapped)
        if self._sleep:
            self._engine.wake()
        try:
            share = self._generated(indices)
        except Exception:
            if self._sleep:  # the error may be of this rank alone: the others wait for it in their sleep()
                with suppress(TpColocateError):
                    self._engine.sleep()
            raise
        if self._sleep:
            self._engine.sleep()
        return share

    def _generated(self, indices: Sequence[int]) -> Share:
        if not indices:
            return 0, {}
        prompts, sampling_params, fields = self._request(indices)
        answers = self._engine.generate(prompts, sampling_params, timeout_s=self._timeout_s, **fields)
        figures = check_type("what score returns", self._score(prompts, answers), Mapping, expected=_SCORES)
        return len(prompts), {name: _figure(name, value) for name, value in figures.items()}


def _figure(name: object, value: Any) -> float:
    try:
        if isinstance(name, str):
            return float(value)
    except (TypeError, ValueError, RuntimeError):  # of several numbers, for example
        pass
    raise ConfigError(f"score returns {shown(value)} as {shown(name)}, not a number by its name", hint=_SCORE_HINT)


def _rank_and_size() -> tuple[int, int]:
    """Return this rank and the number of training ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _of_all_ranks(share: Share, error: Exception | None, rank: int, world_size: int) -> list[Share]:
    """Return the shares of all ranks.

    Collective: over all training ranks.

    Raises:
        TpColocateError: The first error of any rank, on all of them.
    """
    outcomes: list[tuple[Share, ErrorReport | None]] = [(share, None)] * world_size
    if world_size > 1:
        dist.all_gather_object(outcomes, (share, None if error is None else ErrorReport.of(error, rank)))
    raise_first([report for _, report in outcomes if report is not None], error, rank=rank)
    return [one for one, _ in outcomes]


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
