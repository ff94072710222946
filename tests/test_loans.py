"""Which memory is lent, and which comes back."""

import pytest
import torch

from tpcolocate.in_server.tpcolocate_receiver.handles import open_handle
from tpcolocate.weights.plan.loader_map import LoaderMap
from tpcolocate.weights.transport.mapped_memory import PersistentMappings

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

CPU = torch.device("cpu")


def shared(size=16):
    return torch.zeros(size).share_memory_().untyped_storage()


def test_only_what_stayed_in_place_from_one_sync_to_the_next_is_lent():
    loans = PersistentMappings(CPU)
    stays, private, small = shared(), torch.zeros(16).untyped_storage(), torch.zeros(0).untyped_storage()
    assert loans.note([stays, private, small]) == [False, False, False], "seen for the first time"
    assert loans.note([stays, private, small]) == [True, False, False], "private memory cannot be mapped"
    assert loans.note([shared(), stays]) == [False, True]
    assert loans.note([private]) == [False]
    assert loans.note([stays]) == [False], "it was not there at the sync before"


def test_a_storage_at_the_address_of_one_that_is_gone_is_another():
    loans = PersistentMappings(CPU)
    for _ in range(20):
        storage = shared()
        assert loans.note([storage]) == [False]
        del storage


def test_a_loan_is_found_while_the_storage_is_the_same_at_the_same_place():
    loans = PersistentMappings(CPU)
    one, other = shared(), shared()
    loan = loans.lend(one)
    try:
        assert loans.find(one) is loan and loans.find(other) is None
        view = torch.empty(0).set_(one, 4, (2,))
        assert loans.name_of(view) == loan.name and loans.name_of(torch.zeros(2)) is None
        assert loans.note([one]) == [True], "the export itself may have moved it, which is no reason to stop"
        assert (len(loans), loans.names(), loans.num_bytes) == (1, [loan.name], one.nbytes())
        assert loans.unused([one]) == [] and loans.unused([other]) == [loan]
        reader = open_handle(loan.handle.describe(), CPU)
        view.fill_(3.0)
        assert reader.view(torch.float32)[4:6].tolist() == [3.0, 3.0], "what the trainer writes is what is read"
        assert loan.handle.count() == 1
        del reader
        assert loan.handle.count() == 0
    finally:
        taken = loans.take({loan.name})
    assert taken == [loan] and len(loans) == 0 and loans.find(one) is None


def test_the_state_tells_whether_anything_was_lent_or_taken_back_meanwhile():
    loans = PersistentMappings(CPU)
    storage = shared()
    states = [loans.state]
    loan = loans.lend(storage)
    states.append(loans.state)
    loans.note([storage])
    loans.take(set())
    assert loans.state == states[-1], "nothing has changed"
    loans.take({loan.name})
    states.append(loans.state)
    loans.reclaim()
    states.append(loans.state)
    assert len(set(states)) == 4
    loan.handle.reclaim()


def test_what_the_engine_never_gave_back_is_reclaimed_after_its_end():
    loans = PersistentMappings(CPU)
    storage = shared()
    loan = loans.lend(storage)
    assert loan.handle.count() == 1
    loans.reclaim()
    assert loan.handle.count() == 0 and len(loans) == 0


# --- what is known of a loader ----------------------------------------------------------------------------------------


class Entry:
    def __init__(self, name, shape, dtype=torch.float32):
        self.name, self.shape, self.dtype = name, torch.Size(shape), dtype


ROWS = {0: [[0, [2, 3], [3, 1], "float32"]], 1: [[6, [2, 3], [3, 1], "float32"]]}


def test_a_tensor_is_known_once_all_ranks_told_and_read_all_of_it():
    knowledge = LoaderMap()
    knowledge.confirm(("a", "b"))
    told = {
        k: {"w": ROWS[k], "half": ROWS[0], "odd": [[0, [3, 4], [1, 3], "float32"]], **({"one": ROWS[0]} if k == 0 else {})}
        for k in (0, 1)
    }  # fmt: skip
    entries = [Entry(name, (4, 3)) for name in ("w", "half", "odd", "one", "none")]
    knowledge.learn(told, entries, 2, loaded=True)
    assert set(knowledge.reads) == {"w"}
    assert knowledge.covers("w", (4, 3), torch.float32)
    assert not knowledge.covers("w", (4, 3), torch.bfloat16) and not knowledge.covers("w", (3, 4), torch.float32)
    before = knowledge.digest(["w"])
    knowledge.confirm(("a", "b"))
    assert knowledge.digest(["w"]) == before
    knowledge.learn({0: {}, 1: {}}, [Entry("w", (4, 3))], 2, loaded=True)
    assert knowledge.reads == {}, "a later load that could not be told"


def test_workers_that_forgot_are_forgotten():
    knowledge = LoaderMap()
    knowledge.confirm(("a", "b"))
    knowledge.learn({k: {"w": ROWS[k]} for k in (0, 1)}, [Entry("w", (4, 3))], 2, loaded=True)
    knowledge.confirm(("a", "c"))
    assert knowledge.reads == {} and not knowledge.covers("w", (4, 3), torch.float32)


def test_layers_that_are_told_of_in_the_same_words_are_told_apart_where_they_differ():
    knowledge = LoaderMap()
    swapped = {0: ROWS[1], 1: ROWS[0]}
    told = {k: {"a": ROWS[k], "b": ROWS[k], "taller": ROWS[k], "swapped": swapped[k]} for k in (0, 1)}
    entries = [Entry("a", (4, 3)), Entry("b", (4, 3)), Entry("taller", (8, 3)), Entry("swapped", (4, 3))]
    for _ in range(2):
        knowledge.learn(told, entries, 2, loaded=True)
        assert set(knowledge.reads) == {"a", "b", "swapped"}
        assert knowledge.reads["a"] == knowledge.reads["b"] == tuple(reversed(knowledge.reads["swapped"]))
        assert [read.box.starts for (read,) in knowledge.reads["a"]] == [(0, 0), (2, 0)]


def test_different_knowledge_has_different_numbers():
    numbers = set()
    for dtype in ("float32", "bfloat16"):
        knowledge = LoaderMap()
        told = {k: {"w": [[*ROWS[k][0][:3], dtype]]} for k in (0, 1)}
        knowledge.learn(told, [Entry("w", (4, 3))], 2, loaded=True)
        numbers.add(knowledge.digest(["w"]))
    assert len(numbers) == 2 and 0 not in numbers


def test_one_of_each_kind_is_a_sample_and_vouches_for_the_others():
    knowledge = LoaderMap()
    names = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.10.up", "layers.1.odd", "layers.2.up"]
    swapped = {0: ROWS[1], 1: ROWS[0]}
    told = {k: {name: (swapped if name == "layers.2.up" else ROWS)[k] for name in names} for k in (0, 1)}
    knowledge.learn(told, [Entry(name, (4, 3)) for name in names], 2, loaded=False)
    samples = knowledge.samples(names)
    assert samples == ["layers.0.up", "layers.0.down", "layers.1.odd", "layers.2.up"], (
        "what is copied otherwise is a kind"
    )
    assert not knowledge.is_verified(names)
    for i, name in enumerate(samples):
        assert not knowledge.is_verified(names)
        knowledge.learn(told, [Entry(name, (4, 3))], 2, loaded=True)
        assert knowledge.is_verified(samples[: i + 1])
    assert knowledge.is_verified(names)
    knowledge.learn(
        {k: {"layers.3.up": [[*ROWS[k][0][:3], "bfloat16"]]} for k in (0, 1)},
        [Entry("layers.3.up", (4, 3))],
        2,
        loaded=False,
    )
    assert not knowledge.is_verified([*names, "layers.3.up"]), "rounded on the way is another kind"


def test_a_tensor_is_rehearsed_once_whatever_came_of_it():
    knowledge = LoaderMap()
    knowledge.confirm(("a", "b"))
    known = {k: {"w": ROWS[k]} for k in (0, 1)}
    knowledge.learn(known, [Entry("w", (4, 3)), Entry("derived", (4, 3))], 2, loaded=False)
    for name in ("w", "derived"):
        assert knowledge.was_rehearsed(name, (4, 3), torch.float32)
        assert not knowledge.was_rehearsed(name, (4, 3), torch.bfloat16) and not knowledge.was_rehearsed(
            name, (3,), torch.float32
        )
    knowledge.confirm(("a", "c"))
    assert not knowledge.was_rehearsed("w", (4, 3), torch.float32), "by others it was not"


def test_what_is_forgotten_is_verified_anew():
    knowledge = LoaderMap()
    knowledge.confirm(("a", "b"))
    told = {k: {"w": ROWS[k]} for k in (0, 1)}
    knowledge.learn(told, [Entry("w", (4, 3))], 2, loaded=True)
    assert knowledge.is_verified(["w"])
    knowledge.forget()
    assert not knowledge.confirm(("a", "b")), "of nobody"
    knowledge.learn(told, [Entry("w", (4, 3))], 2, loaded=False)
    assert not knowledge.is_verified(["w"])
