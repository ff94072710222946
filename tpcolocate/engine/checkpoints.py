"""Checkpoints of the trainer's weights, as all ranks write them together."""

from __future__ import annotations

import os

from tpcolocate.checks import check_path
from tpcolocate.deadline import check_timeout
from tpcolocate.engine.context import SliceContext
from tpcolocate.errors import ConfigError, TpColocateError
from tpcolocate.weights.sources.checkpoint import CheckpointWriter, count_shards, outline, save
from tpcolocate.weights.sources.model_spec import local_folder
from tpcolocate.weights.sources.named_weights import NamedWeights, Rename, Source, check_rename


def save_checkpoint(
    context: SliceContext,
    source: Source,
    *,
    folder: str | os.PathLike[str],
    rename: Rename | None,
    served_path: str,
    timeout_s: float,
) -> None:
    """Write a checkpoint of these weights; arguments and errors as of `Engine.save_weights`.

    Args:
        context: This rank's view of the server, whose weight version goes into the checkpoint.
        source: The weights.
        folder, rename, timeout_s: See there.
        served_path: Folder or hub id of the served model, from which configuration and tokenizer are copied.
    """
    ranks = context.all_slices
    weights: NamedWeights | None = None
    writer: CheckpointWriter | None = None
    try:
        with ranks.together("get ready to save the weights") as must_match:
            timeout_s = check_timeout(timeout_s)
            check_rename(rename)
            folder = check_path("folder", folder)
            spec = context.sync.spec
            expected = None if spec is None else spec.shapes
            weights = NamedWeights.of(source, expected=expected, rename=rename)
            weights.check_extra()
            if weights.items is None:
                raise ConfigError("cannot save a generator", hint="pass the module, a mapping or a list")
            must_match |= {"folder": str(folder), "weights": outline(weights.items)}
            if spec is not None:
                spec.check([(name, tensor.shape) for name, tensor in weights.items], hint=rename is None)
                spec.check_dtypes([(name, tensor.dtype) for name, tensor in weights.items])
                names = [*(name for name, _ in weights.items), *weights.aliases]
                spec.check_complete(names, ignored=context.sync.ignored, hint="pass the whole model")
            if ranks.rank == 0:
                writer = CheckpointWriter(
                    folder,
                    weight_version=context.lifecycle.weight_version,
                    num_shards=count_shards(weights),
                    like=local_folder(served_path),
                )
    except BaseException as error:
        if writer is not None:
            writer.abandon()
        # Without a group the other ranks do not know of it, and are in the gathers.
        if isinstance(error, TpColocateError) and len(ranks) == 1 and weights is not None and weights.is_sharded:
            save(weights, None)
        raise
    problem = save(weights, writer)
    ranks.agree(problem, what="save the weights", timeout_s=timeout_s)


__all__ = ["save_checkpoint"]
