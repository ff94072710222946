"""Cutting a stream into buckets of bounded size."""

import pytest

from tpcolocate.weights.buckets import split_into_buckets

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


@pytest.mark.parametrize("words, buckets", [
    ("", []),
    ("abc", ["abc"]),
    ("a b c d", ["a b c", "d"]),
    ("ab c d", ["ab c", "d"]),
    ("abcd a", ["abcd", "a"]),  # larger than a bucket
    ("a abcd a", ["a", "abcd", "a"]),
])  # fmt: skip
def test_buckets_are_in_order_and_as_full_as_they_can_be(words, buckets):
    assert [" ".join(bucket) for bucket in split_into_buckets(words.split(), 3, num_bytes=len)] == buckets


def test_a_generator_is_read_one_item_ahead():
    taken = []
    stream = split_into_buckets((taken.append(word) or word for word in ["ab", "a", "b", "c"]), 3, num_bytes=len)
    assert taken == [] and next(stream) == ["ab", "a"] and taken == ["ab", "a", "b"]
