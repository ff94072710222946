"""Weights with products of small factors added, many regions of them by one launch of a kernel.

A sum is rounded once, from float32.  Where a base is bfloat16, factors that are not are cut into a high and a low part of
bfloat16, side by side along the rank:

    B @ A  =  [B_high  B_low  B_high] @ [A_high; A_high; A_low]

What is left out, the product of both low parts and what these round away, is below 2^-15 of the factors' magnitudes.

A kernel of our own, in Triton, which SGLang depends on: cuBLAS, on a Hopper GPU with torch 2.11, rounds the product before it
adds the base, and takes a launch for each region.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from tpcolocate.in_server.tpcolocate_receiver.regions import Region
from tpcolocate.weights.sources.addition import RANK_MULTIPLE, Adder, Addition
from tpcolocate.weights.sources.coalesced_gather import CoalescedGather
from tpcolocate.weights.sources.lazy_tensor import local_of
from tpcolocate.weights.sources.tensor_references import Reference

logger = logging.getLogger(__name__)

_MOST_WRONGLY_ROUNDED = 0.02
"""What the order of a float32 sum makes is far below, a second rounding far above."""
_FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PARTS_BYTES = 24
"""The most memory that is taken for each element of a factor while it is cut, in bytes."""
_BATCH_BYTES = 2**27
"""Of which not more is taken at once, unless for one weight."""

_COMPILE_S = 10.0
"""How long a sync waits for a compiler, in seconds."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""What is multiplied and added to a base: [rows, rank] and [rank, columns]."""

_lock = threading.Lock()
_threads: dict[torch.device, threading.Thread] = {}
"""Started by `prepare`."""
_adders: dict[torch.device, Adder | None] = {}
"""Those that were tried, or waited for in vain."""


def adder_for(device: torch.device) -> Adder | None:
    """Return what adds products there, rounded once; None where that takes several steps.  Tried once for a device.

    On a CPU there is none.
    """
    thread = prepare(device)
    if thread is None:
        return None
    if device not in _adders:
        thread.join(_COMPILE_S)
        if _adders.setdefault(device, None) is None and thread.is_alive():
            logger.warning("adapters are merged in several steps: the kernel was not compiled in %g s", _COMPILE_S)
    return _adders[device]


def prepare(device: torch.device) -> threading.Thread | None:
    """Start to compile the kernel in a thread, which takes a second or two the first time on a machine; return it."""
    if device.type != "cuda":
        return None
    with _lock:
        if device not in _threads:
            # A daemon: a compiler that hangs must not keep the process.
            _threads[device] = threading.Thread(
                target=lambda: _adders.setdefault(device, _tried(device)), name="tpcolocate adapter kernel", daemon=True
            )
            _threads[device].start()
        return _threads[device]


def _tried(device: torch.device) -> Adder | None:
    try:
        from tpcolocate.weights.sources.low_rank_kernel import launch

        found = max(wrongly_rounded(launch, device, columns) for columns in (192, 101))
    except Exception as error:  # slower, with the same result
        logger.warning("adapters are merged in several steps: %s", error)
        return None
    if found > _MOST_WRONGLY_ROUNDED:
        logger.warning("adapters are merged in several steps: %.1f %% of a product are rounded twice", 100 * found)
        return None
    return launch


def wrongly_rounded(adder: Adder, device: torch.device, num_columns: int) -> float:
    """Return how much of a sum with a product is not the exact value, rounded once; laid out as in staging memory."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, torch.bfloat16)

    rank = 3 * RANK_MULTIPLE
    base, left, right = randn(320, num_columns), randn(2, 320, rank), randn(2, rank, num_columns)
    region, pair = Region((64, 32), (192, num_columns - 64)), (left[1], right[1])
    part = base[64:256, 32:-32]
    memory = torch.zeros(64 + part.numel(), dtype=torch.bfloat16, device=device)
    out = memory[64:].view(part.shape)
    adder([addition(part, region, pair, out)])
    exact = part.double() + pair[0][64:256].double() @ pair[1][:, 32:-32].double()
    return float((out != exact.to(torch.bfloat16)).double().mean())


def addition(base: torch.Tensor, region: Region, pair: Pair, out: torch.Tensor | None) -> Addition:
    """Return what adds the product of a pair to a region of a base.

    Args:
        base: That region.
        region: Of the full weight.
        pair: Of the full weight.
        out: Contiguous; to write into.  None: new memory.
    """
    (first_row, first_column), (num_rows, num_columns) = region.starts, region.lengths
    left, right = pair
    if num_rows != left.shape[0]:
        left = left.narrow(0, first_row, num_rows)
    if num_columns != right.shape[1]:
        right = right.narrow(1, first_column, num_columns)
    if out is None:
        out = torch.empty(region.lengths, dtype=base.dtype, device=base.device)
    if num_columns > 1 and base.stride(1) != 1:
        base = base.contiguous()
    return Addition(base, left, right, out)


@dataclass(frozen=True, slots=True)
class Term:
    """A product B @ A that is added to a weight.

    Attributes:
        a: Number of the factor [rank, columns] in the gather; with `is_transposed`, [rank, rows].
        b: Number of the factor [rows, rank]; with `is_transposed`, [columns, rank].
        scaling: Returns what the product is multiplied with.
        is_transposed: Whether the transposed product is added.
    """

    a: int
    b: int
    scaling: Callable[[], float]
    is_transposed: bool


@dataclass(frozen=True, slots=True)
class _Kind:
    """What weights have in common whose factors are prepared together.

    Attributes:
        dtype: Of the base.
        device: Of the base.
        terms: (Shape and dtype of A, of B, whether transposed) of each term.
    """

    dtype: torch.dtype
    device: torch.device
    terms: tuple[tuple[torch.Size, torch.dtype, torch.Size, torch.dtype, bool], ...]

    @property
    def num_bytes(self) -> int:
        """Of a weight's pair."""
        rank = sum(a[0] * (1 if self.dtype == torch.float32 else 3) for a, *_ in self.terms)
        a, _, b, _, _ = self.terms[0]
        return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE * (a[1] + b[0]) * self.dtype.itemsize

    @property
    def working_bytes(self) -> int:
        """What preparing a weight's pair takes beside it, at most."""
        return sum(a.numel() + b.numel() for a, _, b, _, _ in self.terms) * _PARTS_BYTES

    @property
    def batch_size(self) -> int:
        """How many weights are prepared together."""
        return max(1, _BATCH_BYTES // max(1, self.working_bytes))


class LowRankSums:
    """The factors of all weights of a source, prepared once in a sync.  Keeps nothing of the source alive.

    Args:
        factors: Of all weights; gathers those that are sharded.
    """

    def __init__(self, factors: CoalescedGather) -> None:
        self._factors = factors
        self._weights: list[tuple[Reference, tuple[Term, ...]]] = []
        self._kinds: dict[_Kind, list[int]] | None = None
        self._pairs: dict[int, Pair] = {}
        self._keeps_factors = False
        self._waiting: list[Addition] | None = None

    @staticmethod
    def is_possible(base: torch.Tensor, factors: Sequence[torch.Tensor]) -> bool:
        """Return whether a weight's sum can be computed like this, and is rounded once."""
        return (
            adder_for(local_of(base).device) is not None
            and base.dim() == 2
            and base.dtype in (torch.float32, torch.bfloat16)
            and all(one.dim() == 2 and one.dtype in _FACTOR_DTYPES for one in factors)
        )

    def add(self, base: torch.Tensor, terms: Sequence[Term]) -> int:
        """Return the number of a weight.

        Args:
            base: What terms are added to; see `is_possible`.
            terms: Added to it; at least one.
        """
        self._weights.append((self._factors.refer(base), tuple(terms)))
        self._kinds = None
        return len(self._weights) - 1

    def keep_factors(self) -> None:
        """Keep what is gathered until `forget`, for weights that are computed in another way."""
        self._keeps_factors = True

    @property
    def is_collective(self) -> bool:
        """Whether `gather` is."""
        return self._factors.is_collective

    @property
    def num_bytes(self) -> int:
        """The most memory that `gather` takes on this rank, in bytes."""
        kinds = self._planned()
        kept = sum(kind.num_bytes * len(numbers) for kind, numbers in kinds.items())
        batches = [kind.working_bytes * min(len(numbers), kind.batch_size) for kind, numbers in kinds.items()]
        return self._factors.num_bytes + kept + max(batches, default=0)

    def gather(self) -> None:
        """Gather the factors' present values, and prepare them.  Collective: as `CoalescedGather.gather`."""
        self.forget()
        self._factors.gather()
        with torch.no_grad():
            for kind, numbers in self._planned().items():
                for first in range(0, len(numbers), kind.batch_size):
                    batch = numbers[first : first + kind.batch_size]
                    self._pairs.update(zip(batch, self._prepared(kind, batch)))
        if not self._keeps_factors:
            self._factors.forget()

    def forget(self) -> None:
        """Drop what was gathered and prepared."""
        self._pairs.clear()
        self._factors.forget()

    def add_to(
        self, number: int, base: torch.Tensor, region: Region, out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Return a region of a weight's sum; None if the weight was not prepared.

        Args:
            number: Of the weight.
            base: That region of the base.
            region: Of the full weight.
            out: See `ComputeFrom`; inside of `together` it is written when that ends.
        """
        pair = self._pairs.get(number)
        if pair is None:
            return None
        made = addition(base, region, pair, out)
        if self._waiting is None or out is None:
            _add([made])
        else:
            self._waiting.append(made)
        return made.out

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Add what has an ``out`` in as few launches as possible, when this ends; not if it ends by an exception."""
        self._waiting = []
        try:
            yield
            if self._waiting:
                _add(self._waiting)
        finally:
            self._waiting = None

    def _planned(self) -> dict[_Kind, list[int]]:
        if self._kinds is None:
            kinds: dict[_Kind, list[int]] = {}
            for number, (reference, terms) in enumerate(self._weights):
                base = reference()
                if base is None:
                    raise RuntimeError("a weight with adapters is gone: its module was dropped or changed")
                factors = [(self._factors.tensor(term.a), self._factors.tensor(term.b)) for term in terms]
                described = tuple(
                    (a.shape, a.dtype, b.shape, b.dtype, term.is_transposed) for (a, b), term in zip(factors, terms)
                )
                kinds.setdefault(_Kind(base.dtype, local_of(base).device, described), []).append(number)
            self._kinds = kinds
        return self._kinds

    def _prepared(self, kind: _Kind, numbers: list[int]) -> list[Pair]:
        """Return the pairs of weights of one kind, all made together: there may be hundreds."""
        lefts: list[torch.Tensor] = []
        rights: list[torch.Tensor] = []
        for i, (*_, is_transposed) in enumerate(kind.terms):
            terms = [self._weights[number][1][i] for number in numbers]
            a = torch.stack([self._factors.full(term.a) for term in terms]).to(kind.device)
            b = torch.stack([self._factors.full(term.b) for term in terms]).to(kind.device)
            scalings = [term.scaling() for term in terms]
            if len(set(scalings)) == 1:
                b = b.float() * scalings[0]
            else:
                b = b.float() * torch.tensor(scalings, dtype=torch.float32, device=kind.device)[:, None, None]
            a_parts, b_parts = _split(a, kind.dtype), _split(b, kind.dtype)
            del a, b
            # By rank; the product of both low parts is left out.
            pairs = [(x, y) for i, x in enumerate(a_parts) for j, y in enumerate(b_parts) if i + j < 2]
            if is_transposed:
                lefts += (x.mT for x, _ in pairs)
                rights += (y.mT for _, y in pairs)
            else:
                lefts += (y for _, y in pairs)
                rights += (x for x, _ in pairs)
        rank = sum(one.shape[2] for one in lefts)
        if missing := -rank % RANK_MULTIPLE:
            lefts.append(lefts[0].new_zeros(len(numbers), lefts[0].shape[1], missing))
            rights.append(rights[0].new_zeros(len(numbers), missing, rights[0].shape[2]))
        left, right = torch.cat(lefts, dim=2), torch.cat(rights, dim=1)
        return list(zip(left.unbind(), right.unbind()))


def _add(additions: Sequence[Addition]) -> None:
    adder = adder_for(additions[0].out.device)
    assert adder is not None  # see `LowRankSums.is_possible`
    with torch.no_grad():
        adder(additions)


def _split(factor: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return tensors of a dtype whose sum a factor is: itself, or its high and its low part."""
    if factor.dtype == dtype or dtype == torch.float32:
        return [factor.to(dtype)]
    high = factor.to(dtype)
    return [high, (factor.float() - high).to(dtype)]


__all__ = ["LowRankSums", "Pair", "Term", "adder_for", "addition", "prepare"]
