"""`use_sglang`, and the engines that it launches."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from tpcolocate.deadline import check_timeout
from tpcolocate.engine.engine import Engine
from tpcolocate.engine.limits import ServerLimits
from tpcolocate.engine.sampling import check_sampling
from tpcolocate.errors import ConfigError
from tpcolocate.session import Colocation, init
from tpcolocate.trl.arguments import VllmArguments, check_keywords, explained_for_trl
from tpcolocate.trl.generation import SGLangGeneration
from tpcolocate.trl.replacement import replaced, trl_release
from tpcolocate.weights.sources.peft_merge import check_adapters

logger = logging.getLogger(__name__)

# Arguments of SGLang with which it uses the seed of a request.
_WITH_SEEDS = ("enable_deterministic_inference", "rl_on_policy_target")


class Engines:
    """The engines of the trainers that were built under one `use_sglang`, the latest last.

    They run until `shutdown`, or until the process ends: a trainer generates after the block, too.

    Attributes:
        num_built: Trainers that have got an engine.
    """

    def __init__(
        self,
        *,
        tp_size: int | None,
        model_path: str | os.PathLike[str] | None,
        generate_timeout_s: float | None,
        timeout_s: float,
        launch: Mapping[str, Any],
    ) -> None:
        self._tp_size = tp_size
        self._model_path = model_path
        self._generate_timeout_s = (
            None if generate_timeout_s is None else check_timeout(generate_timeout_s, name="generate_timeout_s")
        )
        self._timeout_s = timeout_s
        self._launch = dict(launch)
        self._running: list[tuple[Colocation, Engine]] = []
        self.num_built = 0

    def __iter__(self) -> Iterator[Engine]:
        return iter([engine for _, engine in self._running])

    def __len__(self) -> int:
        return len(self._running)

    def __getitem__(self, index: int) -> Engine:
        return self._running[index][1]

    @explained_for_trl()
    def build(self, model: nn.Module, accelerator: Any, processing_class: Any, **given: Any) -> SGLangGeneration:
        """Launch a server for a trainer; takes the arguments of TRL's ``VLLMGeneration``.

        Collective: over all ranks.  Raises as `init` and `Colocation.launch`, and ConfigError for arguments of TRL that
        have no counterpart.
        """
        check_keywords(given, release=trl_release())
        arguments = VllmArguments(**given)
        arguments.check()
        sampling_params, logprobs = arguments.sampling()
        path = self._path_of(model)
        # Before a server is started; its other limits come with it.
        check_adapters(model)
        ignored = () if any(map(self._launch.get, _WITH_SEEDS)) else ("sampling_seed",)
        try:
            check_sampling(sampling_params, ServerLimits(ignored=frozenset(ignored)))
        except ConfigError as error:
            error.hint = (
                f"{error.hint or 'correct it'}; with TRL: generation_kwargs and the trainer's own settings become these"
            )
            raise
        colo = init(arguments.tp_size(self._tp_size), device=accelerator.device, timeout_s=self._timeout_s)
        try:
            from_trl = arguments.server_args(device_type=colo.device.type, seed=colo.slice_index)
            chosen = {name: value for name, value in from_trl.items() if value is not None}
            engine = colo.launch(path, **{**chosen, **self._launch})
            self._running.append((colo, engine))
            self.num_built += 1
            # Behind the launch, so that it runs before what the launch registers, which warns of a forgotten engine.
            atexit.register(self.shutdown, wait=False)
            return SGLangGeneration(
                engine,
                model=model,
                accelerator=accelerator,
                sampling_params=sampling_params,
                logprobs=logprobs,
                sleeps=arguments.enable_sleep_mode,
                timeout_s=self._generate_timeout_s,
            )
        except BaseException:
            self._running = [each for each in self._running if each[0] is not colo]
            colo.close()
            raise

    def _path_of(self, model: nn.Module) -> str | os.PathLike[str]:
        if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
            raise ConfigError(
                "the trainer's model is quantised: its packed weights cannot be synced",
                hint="load it without quantization_config",
            )
        path = self._model_path if self._model_path is not None else getattr(model, "name_or_path", "")
        if not path:
            raise ConfigError(
                "the trainer's model does not know where it was loaded from",
                hint="use_sglang(model_path=...): a folder or a name on the hub with its configuration and weights",
            )
        return path

    def shutdown(self, *, wait: bool = True) -> None:
        """End the servers.  Idempotent; collective over the slice with ``wait=True``, see `Engine.shutdown`."""
        while self._running:
            colo, engine = self._running.pop()
            try:
                engine.shutdown(wait=wait)
            finally:
                colo.close()


@contextmanager
def use_sglang(
    *,
    tp_size: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    generate_timeout_s: float | None = None,
    timeout_s: float = 1800.0,
    **launch: Any,
) -> Iterator[Engines]:
    """Have the TRL trainers that are built in this block generate with SGLang instead of vLLM.

    For GRPOTrainer, RLOOTrainer and every other trainer that builds TRL's ``VLLMGeneration``, with ``use_vllm=True`` and
    ``vllm_mode="colocate"``.  Their ``vllm_*`` settings are translated; importance sampling correction and ``sampling/*``
    metrics work as with vLLM.  A server is started for each trainer that is built.  It serves the trainer until
    ``shutdown()`` of the value of this block, or until the process ends; an exception inside of the block ends it at
    once.  After the block TRL is as it was.

    Collective: every rank builds the same trainers.

    Args:
        tp_size: GPUs per server.  Default: ``vllm_tensor_parallel_size`` of the trainer.
        model_path: What is served.  Default: where the trainer's model was loaded from.
        generate_timeout_s: For all completions of one call, in seconds; see `Engine.generate`.
        timeout_s: How long a rank waits for the others, in seconds; see `tpcolocate.init`.  The default is that of
            ``ddp_timeout``.
        launch: Arguments of `Colocation.launch`, such as ``log_path`` or SGLang's own; they override what follows from
            the trainer's.

    Raises:
        ConfigError: No TRL; or a release whose ``VLLMGeneration`` takes a keyword that is not known here.  Inside of
            the block, from a trainer's constructor: settings without a counterpart, and all errors of
            `Colocation.launch`.
    """
    engines = Engines(
        tp_size=tp_size,
        model_path=model_path,
        generate_timeout_s=generate_timeout_s,
        timeout_s=timeout_s,
        launch=launch,
    )
    with replaced(engines.build):
        # Not ended with the block: a trainer is mostly built inside of it and trained after it.
        try:
            yield engines
        except BaseException:
            engines.shutdown(wait=False)
            raise
    if not engines.num_built and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "no trainer that was built under use_sglang() generates with SGLang: its arguments need use_vllm=True, and the "
            "trainer has to be built inside of the block"
        )


__all__ = ["Engines", "use_sglang"]
