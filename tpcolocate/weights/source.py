"""What a training script may hand to `sync_weights`, as one stream of named tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tpcolocate.errors import ConfigError

Source = nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]

# Wrappers that put a segment of their own into every name below them.
_WRAPPER_SEGMENTS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class Weights:
    """Named weights, each at most once, and the other names that share their memory.

    Args:
        source: A module (plain, DDP, FSDP2), a mapping, or an iterable of (name, tensor).  Sequences and modules are
            known in advance and can be checked before anything is sent; a generator is taken as it comes.
        expected: Names that the served model has, if known.  Of tied weights those are sent, each of them: a served
            model need not tie what the trainer ties.  If unknown, a module's are sent once, under the first name.

    Raises:
        ConfigError: FSDP1, or something that is no named tensor.
    """

    def __init__(self, source: Source, *, expected: Collection[str] | None = None) -> None:
        self.aliases: dict[str, str] = {}
        """Name -> name under which the same tensor is sent (tied weights)."""
        if isinstance(source, nn.Module):
            self.known: list[tuple[str, torch.Tensor]] | None = self._untied(_of_module(source), expected)
        elif isinstance(source, (Mapping, Sequence)):
            given = [_checked(item) for item in (source.items() if isinstance(source, Mapping) else source)]
            self.known = given if expected is None else self._untied(given, expected)
        elif isinstance(source, Iterable):
            self.known = None
        else:
            raise ConfigError(
                f"cannot take weights from {type(source).__name__}",
                hint="pass an nn.Module, a state dict, or (name, tensor) pairs",
            )
        self._source = source

    def _untied(
        self, weights: list[tuple[str, torch.Tensor]], expected: Collection[str] | None
    ) -> list[tuple[str, torch.Tensor]]:
        names: dict[object, list[str]] = {}
        for name, tensor in weights:
            names.setdefault(_memory(tensor), []).append(name)
        sent = []
        for name, tensor in weights:
            same = names[_memory(tensor)]
            chosen = [other for other in same if expected is not None and other in expected]
            chosen = chosen if chosen else same[:1]
            if name in chosen:
                sent.append((name, tensor))
            else:
                self.aliases[name] = chosen[0]
        return sent

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.known is not None:
            return iter(self.known)
        return (_checked(item) for item in self._source)  # type: ignore[union-attr]

    @property
    def is_sharded(self) -> bool:
        """Whether reading them is a collective (known sources only)."""
        return self.known is not None and any(isinstance(tensor, DTensor) for _, tensor in self.known)


def _of_module(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    while True:  # DDP and torch.compile, in either order
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            break
    if any(isinstance(m, FullyShardedDataParallel) for m in module.modules()):
        raise ConfigError(
            "FSDP1 (FullyShardedDataParallel) is not supported",
            hint="shard with torch.distributed.fsdp.fully_shard (FSDP2)",
        )
    weights = []
    # state_dict rather than named_parameters: some checkpoints hold persistent buffers (routing biases).
    for name, tensor in module.state_dict(keep_vars=True).items():
        for segment in _WRAPPER_SEGMENTS:
            name = name.replace(segment, "")
        if isinstance(tensor, torch.Tensor):  # not the extra state of a module
            weights.append(_checked((name, tensor)))
    return weights


def _memory(tensor: torch.Tensor) -> object:
    """Equal exactly for tensors that are one: a state dict holds tied weights as two views of one memory."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local.numel() == 0:
        return id(tensor)
    return local.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _checked(item: object) -> tuple[str, torch.Tensor]:
    if not (
        isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], torch.Tensor)
    ):
        raise ConfigError(
            f"expected (name, tensor), got {_describe(item)}", hint="for example model.state_dict().items()"
        )
    name, tensor = item
    if tensor.is_meta:
        raise ConfigError(f"{name} is on the meta device and holds no data", hint="materialise the model first")
    if tensor.layout is not torch.strided:
        raise ConfigError(
            f"{name} has layout {tensor.layout}; only dense tensors can be sent", hint="convert it with to_dense()"
        )
    return name, tensor


def _describe(item: object) -> str:
    return f"({', '.join(type(part).__name__ for part in item)})" if isinstance(item, tuple) else type(item).__name__


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, detached.

    Collective: over the mesh of a DTensor; local for any other tensor.
    """
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


__all__ = ["Source", "Weights", "full_tensor"]
