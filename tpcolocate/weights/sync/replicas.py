"""Replicas: what several ranks of a slice hold alike must be alike, or the engine gets a part of each.

TP rank k takes its part of a replicated tensor from training rank k.  If an adapter was initialised with another seed on
each rank, or a broadcast was forgotten, every part arrives as it was sent and the whole is no model that was trained.  So the ranks
compare sums: all of a source that they have not seen, and at each later sync an excerpt of one tensor.

Slices are not compared with each other.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tpcolocate.agreement import RankGroup
from tpcolocate.errors import WeightsMismatchError, some
from tpcolocate.in_server.tpcolocate_receiver.checksums import word_sum
from tpcolocate.weights.sources.lazy_tensor import Item, Items, LazyTensor, local_of, storage_id
from tpcolocate.weights.sources.named_weights import NamedWeights, Source
from tpcolocate.weights.sources.wrapper_names import without_wrappers
from tpcolocate.weights.sync.session import SyncSession

_EXCERPT_BYTES = 32 * 2**20
"""Most that a later sync sums up: some ten microseconds of a GPU."""
_MOST_SKIPPED = 64
"""Sharded tensors that are passed over in search of a replicated one, at a later sync."""
_HINT = (
    "each TP rank of the server takes its part from its own training rank, so all must be equal: broadcast them from one rank "
    '(or wrap the model in DDP or FSDP2, or initialise with one seed), or pass payloads="fan_out" to send the owner\'s alone'
)
_ADAPTER_HINT = (
    "the server has one adapter for all of its ranks: broadcast it from one rank (or wrap the model in DDP or FSDP2, or initialise "
    "with one seed)"
)

Key = tuple[str, str]
"""A tensor's name, and which part of it a rank holds; empty for all of it."""


def are_compared(session: SyncSession) -> bool:
    """Return whether several training ranks give to the engine; otherwise it has one rank's weights, whole."""
    options = session.options
    is_per_rank = options.payloads == "per_rank" and options.transport != "file"
    return is_per_rank and session.context.tp_size > 1 and session.state.handle_problems.get("per_rank") is None


def has_new_replicas(session: SyncSession, source: Source, weights: NamedWeights) -> bool:
    """Return whether this rank holds replicas that have not been compared yet, as far as it knows."""
    if not are_compared(session) or _is_compared(session.state.history.compared, source, weights):
        return False
    return any(isinstance(item, LazyTensor) or _part(item) is not None for _, item in weights.items or ())


def compare_replicas(session: SyncSession, source: Source, weights: NamedWeights) -> None:
    """Compare all that this rank holds with what other ranks of the slice hold as well.

    Collective: over the slice.  Waits for the device once.

    Raises:
        WeightsMismatchError: Ranks hold different values; on every rank.
    """
    with session.stats.watch.phase("compare"):
        _compare(
            session.context.group,
            lambda error, value, what: session.agree(error, value, what=what),
            lambda: _replicated(source, weights.items or []),
            hint=_HINT,
        )
    session.state.history.compared = _identity(source, weights)


def compare_adapters(group: RankGroup, tensors: Mapping[str, Item]) -> None:
    """Compare what the ranks of a slice hold of one adapter alike; otherwise the owner's would be served to all.

    Collective: over the slice.  Waits for the device once.

    Raises:
        WeightsMismatchError: Ranks hold different values; on every rank.
    """
    if len(group) > 1:
        _compare(
            group,
            lambda error, value, what: group.agree(error, value, what=what),
            lambda: _held_alike((name, item) for name, item in tensors.items() if not isinstance(item, LazyTensor)),
            hint=_ADAPTER_HINT,
        )


def _compare(
    group: RankGroup,
    agree: Callable[[BaseException | None, Any, str], list[Any]],
    local_tensors: Callable[[], Sequence[tuple[Key, torch.Tensor]]],
    *,
    hint: str,
) -> None:
    sums: dict[Key, int] = {}
    error: BaseException | None = None
    try:
        sums = _sums(local_tensors())
    except BaseException as caught:
        error = caught
    if _are_different(agree(error, _digests(sums), "compare replicas")):
        refuse(group, agree(None, sums, "find what replicas differ in"), hint=hint)


def excerpt_sum(session: SyncSession, weights: NamedWeights) -> tuple[str, int] | None:
    """Return the sum of an excerpt of one replicated tensor, another one at every sync; the same one on every rank.

    Waits for the device.
    """
    items = weights.items
    if not items or not are_compared(session):
        return None
    turn, start = divmod(session.state.num_syncs, len(items))
    for i in range(min(len(items), _MOST_SKIPPED)):
        name, item = items[(start + i) % len(items)]
        if not isinstance(item, LazyTensor) and _part(item) == "" and item.numel():
            return name, int(word_sum(_excerpt(local_of(item).detach(), turn)))
    return None


def check_excerpts(session: SyncSession, of_ranks: Sequence[tuple[str, int] | None]) -> None:
    """Refuse ranks whose excerpts differ.  Every rank comes to the same error.

    Raises:
        WeightsMismatchError: They do.
    """
    if len(set(of_ranks)) > 1 and len({one[0] for one in of_ranks if one is not None}) == 1:
        session.state.history.compared = None  # everything is compared at the next sync
        refuse(session.context.group, [{} if one is None else {(one[0], ""): one[1]} for one in of_ranks])


def refuse(group: RankGroup, of_ranks: Sequence[Mapping[Key, int]], *, hint: str = _HINT) -> None:
    """Raise an error that names ranks and tensors; return if there is nothing to name.

    Args:
        group: The ranks.
        of_ranks: The sums of each rank.
        hint: Of the error.
    """
    ranks = group.ranks
    first: dict[Key, tuple[int, int]] = {}
    found: dict[tuple[int, int], list[str]] = {}
    for rank, sums in zip(ranks, of_ranks, strict=True):
        for key, total in sums.items():
            other, expected = first.setdefault(key, (rank, total))
            if total != expected:
                found.setdefault((other, rank), []).append(key[0])
    if found:
        num = len(first)
        pairs = "; ".join(
            f"rank {rank} and rank {other} differ in {len(names)} of {num} tensors ({some(names, between=', ')})"
            for (other, rank), names in sorted(found.items())
        )
        raise WeightsMismatchError(
            f"ranks that share a server hold different values of the same weights: {pairs}", hint=hint
        )


def _replicated(source: Source, items: Items) -> list[tuple[Key, torch.Tensor]]:
    """What this rank holds that others may hold as well, each tensor once, as local memory."""
    return _held_alike(_named(source, items))


def _held_alike(named: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[Key, torch.Tensor]]:
    found = []
    for name, tensor in named:
        part = _part(tensor)
        if part is not None:
            found.append(((name, part), local_of(tensor).detach()))
    return found


def _named(source: Source, items: Items) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors that weights lie in or are computed from; of a module its own, since one may hold many weights."""
    if not isinstance(source, nn.Module):
        return [(name, item) for name, item in items if not isinstance(item, LazyTensor)]
    used = {storage_id(tensor) for _, item in items for tensor in _bases(item)}
    # Not its state dict, which some wrappers gather.
    return [
        (without_wrappers(name), tensor)
        for name, tensor in chain(source.named_parameters(), source.named_buffers())
        if storage_id(tensor) in used or "lora_" in name or ".base_layer." in name
    ]


def _bases(item: Item) -> list[torch.Tensor]:
    while isinstance(item, LazyTensor):
        if item.part is not None:
            item = item.part.base
        elif item.recipe is not None:
            item = item.recipe.base
        else:
            return []
    return [item]


def _part(tensor: Item) -> str | None:
    """Return which part of a tensor this rank holds as others do; empty for all of it, None if it alone holds it."""
    if isinstance(tensor, LazyTensor):
        return None
    if not isinstance(tensor, DTensor):
        return ""
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(one.is_partial() for one in placements):
        return None
    cut = [axis for axis, one in enumerate(placements) if not one.is_replicate()]
    if not cut:
        return ""
    coordinate = mesh.get_coordinate()
    if len(cut) == len(placements) or coordinate is None:
        return None
    return " ".join(f"{placements[axis]}@{coordinate[axis]}" for axis in cut)


def _sums(tensors: Sequence[tuple[Key, torch.Tensor]]) -> dict[Key, int]:
    of_device: dict[torch.device, list[tuple[Key, torch.Tensor]]] = {}
    for key, local in tensors:
        of_device.setdefault(local.device, []).append((key, word_sum(local)))
    found: dict[Key, int] = {}
    for pairs in of_device.values():
        found |= zip((key for key, _ in pairs), torch.stack([total for _, total in pairs]).tolist())
    return found


def _digests(sums: Mapping[Key, int]) -> dict[str, str]:
    """Return which tensors a rank holds, by part -> a digest of their sums."""
    groups: dict[str, list[tuple[str, int]]] = {}
    for (name, part), total in sums.items():
        groups.setdefault(part, []).append((name, total))
    return {part: hashlib.sha256(repr(group).encode()).hexdigest() for part, group in groups.items()}


def _are_different(of_ranks: Sequence[Mapping[str, str]]) -> bool:
    digests: dict[str, str] = {}
    return any(digests.setdefault(part, one) != one for of_rank in of_ranks for part, one in of_rank.items())


def _excerpt(local: torch.Tensor, turn: int) -> torch.Tensor:
    """An excerpt of a tensor, along its first dimension."""
    num_bytes = local.numel() * local.element_size()
    if local.dim() == 0 or num_bytes <= _EXCERPT_BYTES:
        return local
    rows = max(1, len(local) * _EXCERPT_BYTES // num_bytes)
    start = turn % -(-len(local) // rows) * rows
    return local[start : start + rows]


def _identity(source: Source, weights: NamedWeights) -> object:
    """What distinguishes a source from others: a module itself, of anything else where its tensors lie; keeps no memory."""
    if isinstance(source, nn.Module):
        return weakref.ref(source)
    return hash(
        tuple(
            (name, local_of(item).data_ptr()) for name, item in weights.items or () if not isinstance(item, LazyTensor)
        )
    )


def _is_compared(compared: object, source: Source, weights: NamedWeights) -> bool:
    if isinstance(compared, weakref.ref):
        return compared() is source
    return compared is not None and compared == _identity(source, weights)


__all__ = [
    "are_compared",
    "check_excerpts",
    "compare_adapters",
    "compare_replicas",
    "excerpt_sum",
    "has_new_replicas",
    "refuse",
]
