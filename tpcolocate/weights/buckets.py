"""Cut a stream of tensors into buckets of bounded size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
G = TypeVar("G", bound=Hashable)


def split_into_buckets(
    items: Iterable[T],
    max_bytes: int,
    *,
    num_bytes: Callable[[T], int],
    group_of: Callable[[T], G | None] = lambda item: None,
    group_sizes: Mapping[G, int] | None = None,
) -> Iterator[list[T]]:
    """Yield the items in order, in lists of at most `max_bytes`; a larger item gets a list of its own.

    Items of one group are in one list, with all that lies between them, which may then be larger.

    Args:
        items: May be a generator; at most one item is taken ahead of a bucket.
        max_bytes: Per bucket.
        num_bytes: The size of an item.
        group_of: What items must have in common to stay together; None: an item of its own.
        group_sizes: Group -> how many items it has.  If left out they are counted, unless the items are a generator.
    """
    if group_sizes is None:
        groups = map(group_of, items) if isinstance(items, Sequence) else ()
        group_sizes = Counter(group for group in groups if group is not None)
    bucket: list[T] = []
    used = 0
    begun: Counter[G] = Counter()
    last_cut: tuple[int, int] | None = None  # where the bucket may be cut: items and bytes before that
    for item in items:
        size = num_bytes(item)
        if used + size > max_bytes and last_cut is not None:
            length, bytes_before = last_cut
            yield bucket[:length]
            bucket, used, last_cut = bucket[length:], used - bytes_before, None
        bucket.append(item)
        used += size
        group = group_of(item)
        if group is not None and group_sizes.get(group, 1) > 1:
            begun[group] += 1
            if begun[group] == group_sizes[group]:
                del begun[group]
        if not begun:
            last_cut = len(bucket), used
    if bucket:
        yield bucket


def arranged(items: Sequence[tuple[str, T]], group_of: Callable[[str], Hashable | None]) -> list[tuple[str, T]]:
    """Return named items with those of a group next to each other, where the first of them was."""
    groups: dict[Hashable, list[tuple[str, T]]] = {}
    for named in items:
        group = group_of(named[0])
        groups.setdefault(("alone", named[0]) if group is None else ("group", group), []).append(named)
    return [named for group in groups.values() for named in group]


__all__ = ["arranged", "split_into_buckets"]
