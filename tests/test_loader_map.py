"""The loader map: what TP ranks read, as their workers traced it."""

import pytest
import torch

from tpcolocate.weights.plan.loader_map import LoaderMap, TensorEntry

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


def entry(name, shape, dtype=torch.float32):
    return TensorEntry(name, tuple(shape), dtype)


ROWS = {0: [[0, [2, 3], [3, 1], "float32"]], 1: [[6, [2, 3], [3, 1], "float32"]]}


def test_a_tensor_is_covered_once_all_ranks_traced_it_and_read_all_of_it():
    loader_map = LoaderMap()
    loader_map.is_current(("a", "b"))
    traced = {
        k: {"w": ROWS[k], "half": ROWS[0], "odd": [[0, [3, 4], [1, 3], "float32"]], **({"one": ROWS[0]} if k == 0 else {})}
        for k in (0, 1)
    }  # fmt: skip
    entries = [entry(name, (4, 3)) for name in ("w", "half", "odd", "one", "none")]
    loader_map.update(traced, entries, 2, loaded=True)
    assert set(loader_map.reads) == {"w"}
    assert loader_map.covers(entry("w", (4, 3), torch.float32))
    assert not loader_map.covers(entry("w", (4, 3), torch.bfloat16)) and not loader_map.covers(
        entry("w", (3, 4), torch.float32)
    )
    before = loader_map.digest(["w"])
    loader_map.is_current(("a", "b"))
    assert loader_map.digest(["w"]) == before
    loader_map.update({0: {}, 1: {}}, [entry("w", (4, 3))], 2, loaded=True)
    assert loader_map.reads == {}, "a later load that could not be traced"


def test_what_other_workers_traced_is_discarded():
    loader_map = LoaderMap()
    loader_map.is_current(("a", "b"))
    loader_map.update({k: {"w": ROWS[k]} for k in (0, 1)}, [entry("w", (4, 3))], 2, loaded=True)
    loader_map.is_current(("a", "c"))
    assert loader_map.reads == {} and not loader_map.covers(entry("w", (4, 3), torch.float32))


def test_layers_with_equal_copies_are_told_apart_where_they_differ():
    loader_map = LoaderMap()
    swapped = {0: ROWS[1], 1: ROWS[0]}
    traced = {k: {"a": ROWS[k], "b": ROWS[k], "taller": ROWS[k], "swapped": swapped[k]} for k in (0, 1)}
    entries = [entry("a", (4, 3)), entry("b", (4, 3)), entry("taller", (8, 3)), entry("swapped", (4, 3))]
    for _ in range(2):
        loader_map.update(traced, entries, 2, loaded=True)
        assert set(loader_map.reads) == {"a", "b", "swapped"}
        assert loader_map.reads["a"] == loader_map.reads["b"] == tuple(reversed(loader_map.reads["swapped"]))
        assert [read.region.starts for (read,) in loader_map.reads["a"]] == [(0, 0), (2, 0)]


def test_different_maps_have_different_digests():
    numbers = set()
    for dtype in ("float32", "bfloat16"):
        loader_map = LoaderMap()
        traced = {k: {"w": [[*ROWS[k][0][:3], dtype]]} for k in (0, 1)}
        loader_map.update(traced, [entry("w", (4, 3))], 2, loaded=True)
        numbers.add(loader_map.digest(["w"]))
    assert len(numbers) == 2 and 0 not in numbers


def test_one_tensor_of_each_kind_is_a_sample_and_verifies_the_others():
    loader_map = LoaderMap()
    names = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.10.up", "layers.1.odd", "layers.2.up"]
    swapped = {0: ROWS[1], 1: ROWS[0]}
    traced = {k: {name: (swapped if name == "layers.2.up" else ROWS)[k] for name in names} for k in (0, 1)}
    loader_map.update(traced, [entry(name, (4, 3)) for name in names], 2, loaded=False)
    samples = loader_map.samples(names)
    assert samples == ["layers.0.up", "layers.0.down", "layers.1.odd", "layers.2.up"], (
        "what is copied otherwise is a kind"
    )
    assert not loader_map.is_verified(names)
    for i, name in enumerate(samples):
        assert not loader_map.is_verified(names)
        loader_map.update(traced, [entry(name, (4, 3))], 2, loaded=True)
        assert loader_map.is_verified(samples[: i + 1])
    assert loader_map.is_verified(names)
    loader_map.update(
        {k: {"layers.3.up": [[*ROWS[k][0][:3], "bfloat16"]]} for k in (0, 1)},
        [entry("layers.3.up", (4, 3))],
        2,
        loaded=False,
    )
    assert not loader_map.is_verified([*names, "layers.3.up"]), "rounded on the way is another kind"


def test_a_tensor_is_traced_once_whatever_came_of_it():
    loader_map = LoaderMap()
    loader_map.is_current(("a", "b"))
    known = {k: {"w": ROWS[k]} for k in (0, 1)}
    loader_map.update(known, [entry("w", (4, 3)), entry("derived", (4, 3))], 2, loaded=False)
    for name in ("w", "derived"):
        assert loader_map.is_traced(entry(name, (4, 3), torch.float32))
        assert not loader_map.is_traced(entry(name, (4, 3), torch.bfloat16)) and not loader_map.is_traced(
            entry(name, (3,))
        )
    loader_map.is_current(("a", "c"))
    assert not loader_map.is_traced(entry("w", (4, 3), torch.float32)), "other workers have not traced it"


def test_what_was_discarded_is_verified_again():
    loader_map = LoaderMap()
    loader_map.is_current(("a", "b"))
    traced = {k: {"w": ROWS[k]} for k in (0, 1)}
    loader_map.update(traced, [entry("w", (4, 3))], 2, loaded=True)
    assert loader_map.is_verified(["w"])
    loader_map.clear()
    assert not loader_map.is_current(("a", "b")), "there are no workers"
    loader_map.update(traced, [entry("w", (4, 3))], 2, loaded=False)
    assert not loader_map.is_verified(["w"])


def test_ignored_is_what_no_tp_rank_reads():
    loader_map = LoaderMap()
    assert not loader_map.is_complete and loader_map.handling_digest() == 0
    loader_map.note_handling(
        [["head", "mtp", "other"], ["head", "mtp", "of one"]], [[], []], of=["w", "head", "mtp", "of one"]
    )
    assert loader_map.is_complete and loader_map.ignored == {"head", "mtp"}
    assert loader_map.handling_digest() > 0
    loader_map.note_handling([["head"], None], [[], []], of=["w", "head"])
    assert loader_map.is_complete and loader_map.ignored == frozenset(), "one could not be traced"
    loader_map.note_handling([["head"], ["head"]], [[], []], of=["w", "head"])
    loader_map.clear()
    assert not loader_map.is_complete and loader_map.ignored == frozenset()


def test_joined_tensors_share_a_group_across_tp_ranks():
    loader_map = LoaderMap()
    loader_map.note_handling([[], []], [[["q", "kv"], ["a", "b"]], [["kv", "r"]]], of=["q", "kv", "r", "a", "b", "w"])
    groups = {name: loader_map.group_of(name) for name in ("q", "kv", "r", "a", "b", "w")}
    assert groups["q"] == groups["kv"] == groups["r"] != groups["a"] == groups["b"] and groups["w"] is None
    assert sorted(loader_map.group_sizes().values()) == [2, 3]
    assert loader_map.split_groups(["a", "b", "q", "w"]) == [["kv", "q", "r"]]
    assert loader_map.split_groups(["w"]) == []


def test_a_digest_is_of_what_is_read_and_not_of_the_objects_that_say_so():
    rows = {k: [[*ROWS[k][0][:3], "float32"]] for k in (0, 1)}
    numbers = []
    for is_shared, last in ((True, rows), (False, rows), (True, {0: rows[1], 1: rows[0]})):
        loader_map = LoaderMap()
        traced = {
            k: {name: rows[k] if is_shared else [list(rows[k][0])] for name in "ab"} | {"c": last[k]} for k in (0, 1)
        }
        loader_map.update(traced, [entry(name, (4, 3)) for name in "abc"], 2, loaded=True)
        numbers.append(loader_map.digest(["a", "b", "c"]))
        assert loader_map.reads["a"] is loader_map.reads["b"]
    assert numbers[0] == numbers[1] != numbers[2]
