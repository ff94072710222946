"""The sources that `sync_weights` accepts, as one sequence of named tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, ItemsView, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from tpcolocate.checks import check_text
from tpcolocate.errors import ConfigError, WeightsMismatchError, shown, some
from tpcolocate.garbage import collector_paused
from tpcolocate.in_server.tpcolocate_receiver.checksums import word_sum
from tpcolocate.weights.sources import fsdp1, peft_merge, zero3
from tpcolocate.weights.sources.hf_names import to_checkpoint
from tpcolocate.weights.sources.lazy_tensor import (
    Item,
    Items,
    LazyTensor,
    ShapesOfShards,
    have_same_values,
    is_collective,
    local_of,
    reading_bytes,
    shape_of_shard,
    storage_id,
)
from tpcolocate.weights.sources.wrapper_names import unwrapped, without_wrappers

Source = nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
Rename = Callable[[str], str | None] | Mapping[str, str | None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Extra:
    """A tensor that the served model has no name for.

    Attributes:
        item: The tensor.
        candidates: Tensors of the source, by name, that it may be equal to.
    """

    item: Item
    candidates: Mapping[str, Item]


@dataclass(frozen=True, slots=True, eq=False)
class NamedWeights:
    """Named weights, each once, and the other names of tied ones.

    Attributes:
        items: What is sent: live parameters and buffers, DTensors, views of live memory, and lazy tensors; read any of
            them with `full_tensor`.  None for a generator, which is read and checked as it is sent.
        aliases: Name -> name under which the same tensor is sent (tied weights).
        stream: The generator's pairs, for `__iter__`; they can be read once.
        doubles: Names under which a tensor is sent once more; of a generator, as far as it was read.
        extra: Names that the served model lacks whose tensors may be equal to others of the source, as those of a tied
            model that was copied name by name; they are not sent.
        warnings: What the user should know of the source.
        renamed: Of a module, what a function that was passed as `rename` has returned: name -> name.
    """

    items: Items | None
    aliases: Mapping[str, str] = field(default_factory=dict)
    stream: Iterable[tuple[str, Item]] = ()
    doubles: set[str] = field(default_factory=set)
    extra: Mapping[str, Extra] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    renamed: Mapping[str, str | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls, source: Source, *, expected: Collection[str] | None = None, rename: Rename | None = None
    ) -> NamedWeights:
        """Name the weights of a source.

        A module's weights are those that it computes with, under the names of its checkpoint: wrappers' segments are
        removed, peft's LoRA adapters are merged when they are read, and experts that transformers 5 fuses are separate.

        Args:
            source: A module (plain, DDP, FSDP1 or 2, DeepSpeed, DTensor-parallel, peft), a mapping, or an iterable of
                (name, tensor).
            expected: Names that the served model has, if known.  Tied weights are sent under each of these names, since
                a served model need not tie what the trainer ties.  If unknown, a module's are sent under the first name.
            rename: Name in the source -> name in the served checkpoint, or None for a weight that is not sent.  Names
                that a mapping lacks are kept.

        Raises:
            ConfigError: Something that is not a named tensor, the flat shards or empty tensors that FSDP1 and ZeRO-3 leave in
                a module, an adapter that cannot be merged.
        """
        if isinstance(source, nn.Module):
            with collector_paused():
                asked = _Asked(rename) if callable(rename) else None
                weights, warnings = _of_module(source, expected, asked or rename)
                named = _untied(_renamed(weights, asked or rename), expected)
                return replace(named, warnings=warnings, renamed={} if asked is None else asked.answers)
        if isinstance(source, (str, os.PathLike)):
            raise ConfigError(
                f"cannot take weights from a path: {shown(source)}",
                hint=f"read its safetensors files: tpcolocate.Checkpoint({os.fspath(source)!r})",
            )
        if isinstance(source, (Mapping, Sequence, ItemsView)):
            given = list(_given(source.items() if isinstance(source, Mapping) else source))
            _check_not_shards(given)
            pairs = _renamed(given, rename)
            named = cls(list(pairs)) if expected is None else _untied(pairs, expected)
            return replace(named, warnings=_warnings(given))
        if not isinstance(source, Iterable):
            raise ConfigError(
                f"cannot take weights from {type(source).__name__}",
                hint="pass an nn.Module, a state dict, or (name, tensor) pairs",
            )
        doubles: set[str] = set()
        pairs = _each_once(_renamed(_given(source), rename))
        return cls(None, stream=pairs if expected is None else _streamed(pairs, expected, doubles), doubles=doubles)

    def __iter__(self) -> Iterator[tuple[str, Item]]:
        return iter(self.stream if self.items is None else self.items)

    def check_extra(self) -> None:
        """Check that what the served model has no name for is equal to what it has one for; waits for the device.

        Raises:
            WeightsMismatchError: It is not.
        """
        for name, one in self.extra.items():
            if not any(have_same_values(one.item, other) for other in one.candidates.values()):
                raise WeightsMismatchError(
                    f"the served model has no {name}, and the trainer's differs from {some(list(one.candidates))}",
                    hint=f"the served model may tie them: {tie_hint(name)}",
                )

    @property
    def is_streamed(self) -> bool:
        """Whether the source is a generator, whose weights are not known in advance."""
        return self.items is None

    @property
    def is_sharded(self) -> bool:
        """Whether reading them is a collective; False for a generator."""
        return any(is_collective(item) for _, item in self.items or ())

    @property
    def reading_bytes(self) -> int:
        """The most memory that reading one of them takes beside the staging memory; 0 for a generator."""
        return max((reading_bytes(item) for _, item in self.items or ()), default=0)


class _Asked:
    """A function that was passed as `rename`, asked once for each name, and what it has returned."""

    def __init__(self, rename: Callable[[str], str | None]) -> None:
        self._rename = rename
        self.answers: dict[str, str | None] = {}

    def __call__(self, name: str) -> str | None:
        if name not in self.answers:
            self.answers[name] = self._rename(name)
        return self.answers[name]


def _renamed(weights: Iterable[tuple[str, Item]], rename: Rename | None) -> Iterator[tuple[str, Item]]:
    if rename is None:
        yield from weights
        return
    for name, item in weights:
        served_name = _served_name(name, rename)
        if served_name is not None:
            yield served_name, item


def check_unique(names: Iterable[str]) -> None:
    """Check that no name is given twice.

    Raises:
        WeightsMismatchError: One is.
    """
    for _ in _each_once((name, None) for name in names):
        pass


def _each_once(named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Yield the same; raises, as `check_unique`, where a name comes for the second time."""
    seen: set[str] = set()
    for name, item in named:
        if name in seen:
            raise WeightsMismatchError(f"{name} is given twice", hint="names must be unique")
        seen.add(name)
        yield name, item


def check_rename(rename: object) -> None:
    """Check a `rename` as far as that is possible before it is used.

    Raises:
        ConfigError: It is neither None nor callable nor a mapping, or it maps from or to something that is no name.
    """
    if rename is None:
        return
    if isinstance(rename, Mapping):
        for name, served in rename.items():
            if not isinstance(name, str):
                raise ConfigError(f"rename maps from {shown(name)}", hint="its keys are names of the source")
            _check_served(name, served)
    elif not callable(rename):
        raise ConfigError(
            f"rename must be a function or a mapping, got {shown(rename)}",
            hint='for example rename={"policy.lm_head.weight": "lm_head.weight", "value_head.weight": None}',
        )


def _check_served(name: str, served: object) -> None:
    if served is None:
        return
    if not isinstance(served, str):
        raise ConfigError(
            f"rename returned {type(served).__name__} for {name}",
            hint="return a name of the served checkpoint, or None to leave the weight out",
        )
    check_text(f"what rename returns for {name}", served)


def _served_name(name: str, rename: Rename | None) -> str | None:
    if rename is None:
        return name
    served = rename.get(name, name) if isinstance(rename, Mapping) else rename(name)
    if not isinstance(rename, Mapping):
        _check_served(name, served)  # a mapping's values have been checked
    return served


def _of_module(
    module: nn.Module, expected: Collection[str] | None, rename: Rename | None
) -> tuple[Items, tuple[str, ...]]:
    """Return what a module computes with, under the names of its checkpoint unless the model's own are served."""
    outermost = module
    while (inner := peft_merge.inner_model(module := unwrapped(module))) is not None:
        module = inner
    served = frozenset(() if expected is None else expected)
    # Before the tensors are: of a quantised base it names the way, which their own checks do not know.
    peft_merge.check_adapters(module)
    state, warnings = _checked_state(module, outermost)
    if warnings and peft_merge.is_merging(module):
        raise ConfigError(
            "LoRA adapters of a trainer that FSDP1 or DeepSpeed ZeRO-3 shards are not merged",
            hint="shard with fully_shard (FSDP2), use ZeRO-2, or serve the adapter beside its base model with set_lora()",
        )
    weights = peft_merge.merged(module, state)
    weights = to_checkpoint(
        module, weights, is_served=lambda name: name in served or _served_name(name, rename) in served
    )
    return weights, warnings


def _checked_state(module: nn.Module, outermost: nn.Module) -> tuple[Items, tuple[str, ...]]:
    """Return a module's parameters and persistent buffers, and what the user should know of them.

    Args:
        module: Within `outermost`.
        outermost: With all wrappers: one of them may be an FSDP1 unit that has parameters of `module`.
    """
    state, is_fsdp1 = _held(module, outermost)
    shapes: ShapesOfShards = {}
    checked = ((name, item) if isinstance(item, LazyTensor) else _checked((name, item), shapes) for name, item in state)
    items = list(zero3.gathering(checked))
    return items, (fsdp1.WARNING,) if is_fsdp1 else _warnings(items)


def gathered_state(module: nn.Module) -> dict[str, Item] | None:
    """Return the state of a module that FSDP1 or ZeRO-3 shards, by its names without wrappers; None for any other.

    Its own `state_dict` gathers whole units, or has empty tensors.  Nothing is checked: most of it may not be wanted.
    """
    state, is_fsdp1 = _held(unwrapped(module), module)
    is_sharded = is_fsdp1 or any(zero3.is_partitioned(item) for _, item in state)
    return dict(zero3.gathering(state)) if is_sharded else None


def _held(module: nn.Module, outermost: nn.Module) -> tuple[Items, bool]:
    """Return what a module holds, and whether FSDP1 shards it; arguments as of `_checked_state`."""
    flattened = fsdp1.parameters(outermost)
    if flattened is None:
        return _state(module), False
    return fsdp1.state(module, flattened), fsdp1.is_sharded(flattened)


def _state(module: nn.Module) -> Items:
    # state_dict rather than named_parameters: some checkpoints have persistent buffers (routing biases), and FSDP2 puts
    # its shards back in place first.
    return [
        (without_wrappers(name), tensor)
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)  # not the extra state of a module
    ]


def _given(pairs: Iterable[object]) -> Iterator[tuple[str, Item]]:
    """Yield what a user gave, checked; what belongs to ZeRO-3 can be gathered as long as it is the parameter itself."""
    shapes: ShapesOfShards = {}
    for name, item in zero3.gathering(_checked(pair, shapes) for pair in pairs):
        if isinstance(item, torch.Tensor) and item.shape == (0,):
            raise ConfigError(
                f"{name} is empty; DeepSpeed ZeRO-3 and FSDP1 leave such tensors in a module and its state dict",
                hint="pass the module itself (the DeepSpeed engine, or what FSDP1 has wrapped), or a full state dict",
            )
        yield name, item


def _check_not_shards(given: Items) -> None:
    if fsdp1.are_shards({name: item for name, item in given if isinstance(item, torch.Tensor)}):
        raise ConfigError(
            f"{given[0][0]} and the others are what FSDP1 has left on this rank, not weights",
            hint="pass the module itself, or a full state dict",
        )


def _warnings(weights: Items) -> tuple[str, ...]:
    """What the user should know of weights that `_given` or `zero3.gathering` returned."""
    return (zero3.WARNING,) if any(isinstance(item, LazyTensor) for _, item in weights) else ()


def _untied(weights: Iterable[tuple[str, Item]], expected: Collection[str] | None) -> NamedWeights:
    """Take each weight once, or under each of its expected names."""
    found = [(name, item, _identity(item)) for name, item in weights]
    names: dict[object, list[str]] = {}
    for name, _, identity in found:
        names.setdefault(identity, []).append(name)
    sent: list[tuple[str, Item]] = []
    aliases: dict[str, str] = {}
    doubles: set[str] = set()
    extra: dict[str, Extra] = {}
    pairs = [(name, item) for name, item, _ in found]
    for name, item, identity in found:
        same = names[identity]
        chosen = [other for other in same if expected is not None and other in expected] or same[:1]
        if name not in chosen:
            aliases[name] = chosen[0]
            continue
        if expected is not None and name not in expected and (others := may_equal(name, item, pairs, expected)):
            extra[name] = Extra(item, others)
            continue
        sent.append((name, item))
        if name != chosen[0]:
            doubles.add(name)
    return NamedWeights(sent, aliases, doubles=doubles, extra=extra)


def tie_hint(name: str) -> str:
    """Return what to do about a tensor that the served model ties and the trainer does not."""
    return (
        f"tie the trainer's model as well, serve a checkpoint with tie_word_embeddings=False, or pass rename={{{name!r}: None}} to "
        "leave that weight out"
    )


def may_equal(name: str, item: Item, weights: Iterable[tuple[str, Item]], others: Collection[str]) -> dict[str, Item]:
    """Return the tensors that a model may tie with this one; by names and shapes, hence the same on every rank.

    Those are matrices that a model has once: their names have no numbers (the embedding and the output layer).

    Args:
        name, item: The tensor.
        weights: Of the source.
        others: Names among which to look.
    """
    if not _may_be_tied(name, item):
        return {}
    return {
        other: tensor
        for other, tensor in weights
        if other != name and other in others and tensor.shape == item.shape and _may_be_tied(other, tensor)
    }


def _may_be_tied(name: str, item: Item) -> bool:
    return len(item.shape) >= 2 and _DIGIT.search(name) is None


_DIGIT = re.compile(r"\d")


def _streamed(
    weights: Iterable[tuple[str, Item]], expected: Collection[str], doubles: set[str]
) -> Iterator[tuple[str, Item]]:
    """Yield a generator's pairs without second names of tied weights that the served model has no name for.

    They are recognised by what they hold: memory may be reused, and to keep a tensor would keep its memory.

    Args:
        weights: The pairs.
        expected: Names that the served model has.
        doubles: See `NamedWeights`; added to.
    """
    seen: set[object] = set()
    for name, item in weights:
        if _may_be_tied(name, item):
            content = _content(item)
            if content in seen:
                if name not in expected:
                    continue
                doubles.add(name)
            elif name in expected:
                seen.add(content)
        yield name, item


def _content(item: Item) -> object:
    """Return a key of what this rank has of a tensor; waits for the device.

    What ZeRO-3 has partitioned is one object under both names; see `zero3.gathering`.
    """
    if isinstance(item, LazyTensor):
        return id(item)
    local = local_of(item).detach()
    sums = torch.stack([word_sum(local), word_sum(local[: len(local) // 2])]).tolist()
    return item.shape, item.dtype, local.shape, tuple(sums)


def _identity(item: Item) -> object:
    """Return a key that tied weights share: a state dict has them as two views of one memory."""
    if isinstance(item, LazyTensor):
        return id(item)
    local = local_of(item)
    # An empty shard has no address, and its rank must distinguish the same tensors as the others.
    address = local.data_ptr() if local.numel() else storage_id(local)
    return address, item.dtype, item.shape, local.stride()


def _checked(item: object, shapes: ShapesOfShards) -> tuple[str, torch.Tensor]:
    if not (isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str)):
        parts = f"({', '.join(type(part).__name__ for part in item)})" if isinstance(item, (tuple, list)) else None
        raise ConfigError(
            f"expected (name, tensor), got {parts or type(item).__name__}",
            hint="pass the module itself, not in a list"
            if isinstance(item, nn.Module)
            else "for example model.state_dict().items()",
        )
    if not isinstance(item[1], torch.Tensor):
        raise ConfigError(f"{item[0]} is a {type(item[1]).__name__}, not a tensor", hint=_instead_of(*item))
    check_readable(*item, shapes=shapes)
    return item[0], item[1]


def check_readable(name: str, given: torch.Tensor, *, shapes: ShapesOfShards | None = None) -> None:
    """Check that a tensor can be read and sent; local for a DTensor.

    Args:
        name: For the error.
        given: A tensor, or one that is sharded.
        shapes: See `shape_of_shard`; for a source with many tensors.

    Raises:
        ConfigError: It cannot.
    """
    if isinstance(given, ShardedTensor):
        raise ConfigError(
            f"{name} is a ShardedTensor, as in a sharded state dict of FSDP1",
            hint="pass the module itself, or a full state dict",
        )
    tensor = local_of(given)
    if tensor.is_meta:
        raise ConfigError(f"{name} is on the meta device and has no data", hint="materialise the model first")
    if isinstance(tensor, (UninitializedBuffer, UninitializedParameter)):
        raise ConfigError(f"{name} is not initialised", hint="run the lazy module once before it is synced")
    if tensor.is_quantized:
        raise ConfigError(f"{name} is a quantised tensor ({tensor.dtype})", hint="convert it with dequantize()")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise ConfigError(
            f"{name} is a {type(tensor).__name__}, which has no memory of its own that could be sent",
            hint="convert it to a plain tensor first",
        )
    if tensor.layout is torch.strided and (tensor.is_neg() or tensor.is_conj() or tensor.is_nested):
        raise ConfigError(f"{name} is a view whose memory holds other values", hint="send a copy of it: tensor.clone()")
    if tensor.layout is not torch.strided:
        raise ConfigError(
            f"{name} has layout {tensor.layout}; only dense tensors can be sent", hint="convert it with to_dense()"
        )
    if isinstance(given, DTensor) and (shape := shape_of_shard(given, shapes)) not in (None, tuple(tensor.shape)):
        raise ConfigError(
            f"{name} has a shard of shape {tuple(tensor.shape)} on this rank, where {given.placements} gives one of shape {shape}",
            hint="such a DTensor cannot be gathered by torch: gather it by the means of what has cut it, or shard with fully_shard (FSDP2)",
        )
    _check_memory(name, tensor)


def _check_memory(name: str, tensor: torch.Tensor) -> None:
    """Check that all elements of a dense tensor are in its memory: to read beyond it ends the process, or its use of the GPU."""
    num_bytes = tensor.untyped_storage().nbytes()
    if not tensor.numel() or (tensor.is_contiguous() and not tensor.storage_offset() and num_bytes >= tensor.nbytes):
        return
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride()))
    if num_bytes < (int(tensor.storage_offset()) + last + 1) * tensor.element_size():
        raise ConfigError(
            f"{name} has no memory any more"
            if not num_bytes
            else f"{name} is larger than the {num_bytes} bytes of its memory",
            hint="something has freed it, as where weights are moved away between steps by storage.resize_(0): bring them back "
            "before",
        )


def _instead_of(name: str, value: object) -> str:
    """Return what to pass in place of what is no tensor in a source."""
    if isinstance(value, (Mapping, nn.Module)):
        return f"pass what is under {name!r} by itself, if that is the model"
    if hasattr(value, "__array__"):
        return "make tensors of arrays: torch.from_numpy()"
    return "leave it out: only tensors are sent"


__all__ = [
    "Extra",
    "NamedWeights",
    "Rename",
    "Source",
    "check_readable",
    "check_rename",
    "check_unique",
    "gathered_state",
    "may_equal",
    "tie_hint",
]
