"""Cutting a stream into buckets of bounded size."""

import pytest

from tpcolocate.weights.buckets import arranged, split_into_buckets

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


@pytest.mark.parametrize("words, buckets", [
    ("a1 b c1 d", ["a1 b c1", "d"]),  # larger than a bucket, with what lies between
    ("a b1 c1", ["a", "b1 c1"]),
    ("a b1 c1 d2 e2", ["a", "b1 c1", "d2 e2"]),
    ("a1 b2 c1 d2 e", ["a1 b2 c1 d2", "e"]),
    ("a b1 c d", ["a", "b1", "c d"]),  # the only one of its group
])  # fmt: skip
def test_items_of_a_group_are_in_one_bucket(words, buckets):
    def group_of(word):
        return word[1:] or None

    found = split_into_buckets(words.split(), 4, num_bytes=lambda word: 1 + len(word), group_of=group_of)
    assert [" ".join(bucket) for bucket in found] == buckets


def test_a_generator_waits_for_the_rest_of_a_group():
    stream = iter(["a", "b1", "c", "d1", "e"])
    found = split_into_buckets(
        stream, 2, num_bytes=lambda word: 1, group_of=lambda word: word[1:] or None, group_sizes={"1": 2}
    )
    assert list(found) == [["a"], ["b1", "c", "d1"], ["e"]]


def test_a_group_is_put_where_its_first_item_was():
    items = [(name, None) for name in ("a", "b1", "c", "d1", "e2", "f", "g2")]
    found = arranged(items, lambda name: name[1:] or None)
    assert [name for name, _ in found] == ["a", "b1", "d1", "c", "e2", "g2", "f"]
