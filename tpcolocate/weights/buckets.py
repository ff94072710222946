"""Cut a stream of tensors into buckets of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def split_into_buckets(items: Iterable[T], max_bytes: int, *, num_bytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield the items in order, in lists of at most `max_bytes`; a larger item gets a list of its own.

    Args:
        items: May be a generator; at most one item is taken ahead of a bucket.
        max_bytes: Per bucket.
        num_bytes: The size of an item.
    """
    bucket: list[T] = []
    used = 0
    for item in items:
        size = num_bytes(item)
        if bucket and used + size > max_bytes:
            yield bucket
            bucket, used = [], 0
        bucket.append(item)
        used += size
    if bucket:
        yield bucket


__all__ = ["split_into_buckets"]
