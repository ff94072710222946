"""What a training script may hand to `sync_weights`, as one stream of named tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from tpcolocate.errors import ConfigError
from tpcolocate.weights.sources import peft_merge as merging
from tpcolocate.weights.sources.hf_names import to_checkpoint
from tpcolocate.weights.sources.lazy_tensor import (
    Item,
    Items,
    LazyTensor,
    full_tensor,
    is_collective,
    local_of,
    reading_bytes,
)
from tpcolocate.weights.sources.wrapper_names import without_wrappers

Source = nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
Rename = Callable[[str], str | None] | Mapping[str, str | None]


class Weights:
    """Named weights, each at most once, and the other names that share their memory.

    Of a module the weights are those that it computes with, under the names of its checkpoint: wrappers' segments are
    taken out, peft's LoRA adapters are merged on the fly, and experts that transformers 5 fuses are sent one by one.

    Args:
        source: A module (plain, DDP, FSDP2, DTensor-parallel, peft), a mapping, or an iterable of (name, tensor).
            Sequences and modules are known in advance and can be checked before anything is sent; a generator is taken as
            it comes.
        expected: Names that the served model has, if known.  Of tied weights those are sent, each of them: a served
            model need not tie what the trainer ties.  If unknown, a module's are sent once, under the first name.
        rename: Name as it would be sent -> name in the served checkpoint, or None for a weight that is not to be sent.
            Names that a mapping lacks stay as they are.

    Raises:
        ConfigError: FSDP1, something that is no named tensor, an adapter that cannot be merged on the fly.
    """

    def __init__(
        self, source: Source, *, expected: Collection[str] | None = None, rename: Rename | None = None
    ) -> None:
        self.aliases: dict[str, str] = {}
        """Name -> name under which the same tensor is sent (tied weights)."""
        self.known: Items | None = None
        """What is sent, if that is known in advance.  An item is a live parameter or buffer, a DTensor, a view of live
        memory, or a `LazyTensor` that is computed when it is read; `full_tensor` reads any of them."""
        self._rename = rename
        if isinstance(source, nn.Module):
            self.known = self._untied(self._renamed(self._of_module(source, expected)), expected)
        elif isinstance(source, (Mapping, Sequence)):
            pairs = source.items() if isinstance(source, Mapping) else source
            given = self._renamed(_checked(item) for item in pairs)
            self.known = list(given) if expected is None else self._untied(given, expected)
        elif not isinstance(source, Iterable):
            raise ConfigError(
                f"cannot take weights from {type(source).__name__}",
                hint="pass an nn.Module, a state dict, or (name, tensor) pairs",
            )
        self._source = source

    @classmethod
    def again(cls, known: Items, aliases: Mapping[str, str]) -> Weights:
        """Weights that are known to be the ones of an earlier sync; see `recognition`."""
        weights = cls(())
        weights.known, weights.aliases = known, dict(aliases)
        return weights

    def _of_module(self, module: nn.Module, expected: Collection[str] | None) -> Items:
        module = _unwrapped(module)
        weights = merging.merged(module, _state(module))
        served = frozenset(() if expected is None else expected)
        return to_checkpoint(
            module, weights, is_served=lambda name: name in served or self._served_name(name) in served
        )

    def _served_name(self, name: str) -> str | None:
        if self._rename is None:
            return name
        served = self._rename.get(name, name) if isinstance(self._rename, Mapping) else self._rename(name)
        if not (served is None or isinstance(served, str)):
            raise ConfigError(
                f"rename gave {type(served).__name__} for {name}",
                hint="give a name of the served checkpoint, or None to leave the weight out",
            )
        return served

    def _renamed(self, weights: Iterable[tuple[str, Item]]) -> Iterator[tuple[str, Item]]:
        for name, item in weights:
            served_name = self._served_name(name)
            if served_name is not None:
                yield served_name, item

    def _untied(self, weights: Iterable[tuple[str, Item]], expected: Collection[str] | None) -> Items:
        weights = list(weights)
        names: dict[object, list[str]] = {}
        for name, item in weights:
            names.setdefault(_memory(item), []).append(name)
        sent: Items = []
        for name, item in weights:
            same = names[_memory(item)]
            chosen = [other for other in same if expected is not None and other in expected]
            chosen = chosen if chosen else same[:1]
            if name in chosen:
                sent.append((name, item))
            else:
                self.aliases[name] = chosen[0]
        return sent

    def __iter__(self) -> Iterator[tuple[str, Item]]:
        if self.known is not None:
            return iter(self.known)
        return self._renamed(_checked(item) for item in self._source)  # type: ignore[union-attr]

    @property
    def is_sharded(self) -> bool:
        """Whether reading them is a collective (known sources only)."""
        return self.known is not None and any(is_collective(item) for _, item in self.known)

    @property
    def reading_bytes(self) -> int:
        """Most memory that reading one of them takes, beside the staging memory (known sources only)."""
        return max((reading_bytes(item) for _, item in self.known), default=0) if self.known is not None else 0


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:  # DDP, torch.compile and peft, in any order
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        elif (inside := merging.inner_model(module)) is not None:
            module = inside
        else:
            return module


def _state(module: nn.Module) -> Items:
    if any(isinstance(m, FullyShardedDataParallel) for m in module.modules()):
        raise ConfigError(
            "FSDP1 (FullyShardedDataParallel) is not supported",
            hint="shard with torch.distributed.fsdp.fully_shard (FSDP2)",
        )
    weights: Items = []
    # state_dict rather than named_parameters: some checkpoints hold persistent buffers (routing biases), and FSDP2 puts
    # its shards back in place first.
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):  # not the extra state of a module
            weights.append(_checked((without_wrappers(name), tensor)))
    return weights


def _memory(item: Item) -> object:
    """Equal exactly for tensors that are one: a state dict holds tied weights as two views of one memory."""
    if isinstance(item, LazyTensor):
        return id(item)
    local = local_of(item)
    # An empty shard has no address, and its rank must tell the same tensors apart as those that hold data.
    place = local.data_ptr() if local.numel() else local.untyped_storage()._cdata
    return place, item.dtype, item.shape, local.stride()


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


__all__ = ["Rename", "Source", "Weights", "full_tensor"]
