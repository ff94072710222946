"""The trainer's memory that workers map: what may be mapped, and that every handle comes back."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tpcolocate import ipc_payload
from tpcolocate.errors import DeadlineError
from tpcolocate.in_server.tpcolocate_receiver.handles import open_handle
from tpcolocate.weights.sync.syncer import WeightSyncer
from tpcolocate.weights.transport.mapped_memory import (
    MAPPABLE,
    STAGED,
    STEADY,
    PersistentMappings,
    TransientMappings,
)

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

CPU = torch.device("cpu")


def shared(size=16):
    return torch.zeros(size).share_memory_().untyped_storage()


def test_only_what_stayed_in_place_from_one_sync_to_the_next_is_steady():
    mappings = PersistentMappings(CPU, 3)
    stays, private, small = shared(), torch.zeros(16).untyped_storage(), torch.zeros(0).untyped_storage()
    assert mappings.uses([stays, private, small]) == [MAPPABLE, STAGED, STAGED], "seen for the first time"
    assert mappings.uses([stays, private, small]) == [STEADY, STAGED, STAGED], "private memory cannot be mapped"
    assert mappings.uses([shared(), stays]) == [MAPPABLE, STEADY]
    assert mappings.uses([private]) == [STAGED]
    assert mappings.uses([stays]) == [MAPPABLE], "it was not there at the sync before"


def test_a_storage_at_the_address_of_a_freed_one_is_another():
    mappings = PersistentMappings(CPU, 3)
    for _ in range(20):
        storage = shared()
        assert mappings.uses([storage]) == [MAPPABLE]
        del storage


def test_a_mapping_is_found_while_the_storage_is_the_same_at_the_same_address():
    mappings = PersistentMappings(CPU, 3)
    one, other = shared(), shared()
    mapping = mappings.add(one, [3])
    try:
        assert mappings.find(one) is mapping and mappings.find(other) is None
        assert mappings.uses([one]) == [STEADY], "the export itself may have moved it, which is no reason to stop"
        assert (len(mappings), mappings.all(), mapping.num_bytes) == (1, [mapping], one.nbytes())
        wanted = {one._cdata: [3]}
        assert mappings.unused(wanted) == [] and mappings.unused({other._cdata: [3]}) == [mapping]
        assert mappings.unused({one._cdata: [3, 4]}) == [mapping], "with another reader it is exported anew"
        view = torch.empty(0).set_(one, 4, (2,))
        reader = open_handle(mapping.handles[3].describe(), CPU)
        view.fill_(3.0)
        assert reader.view(torch.float32)[4:6].tolist() == [3.0, 3.0], "what the trainer writes is what is read"
        assert mapping.handles[3].count() == 1
        del reader
        assert mapping.handles[3].count() == 0
    finally:
        mappings.retire([mapping])
    assert len(mappings) == 0 and mappings.find(one) is None and mappings.retired == [mapping]
    mappings.forget([mapping])
    assert mappings.retired == []


def test_a_dropped_storage_is_expired():
    mappings = PersistentMappings(CPU, 3)
    storage = shared()
    mapping = mappings.add(storage, [3])
    assert mappings.expired() == []
    mapping.handles[3].reclaim()  # on a CPU the handle's own mapping keeps the storage
    mapping.handles[3].storage = None
    del storage
    assert mappings.expired() == [mapping]


def test_the_version_changes_with_every_mapping_that_is_added_or_removed():
    mappings = PersistentMappings(CPU, 3)
    storage = shared()
    versions = [mappings.version]
    mapping = mappings.add(storage, [3])
    versions.append(mappings.version)
    mappings.uses([storage])
    mappings.retire([])
    assert mappings.version == versions[-1], "nothing has changed"
    mappings.retire([mapping])
    versions.append(mappings.version)
    mappings.reclaim()
    versions.append(mappings.version)
    assert len(set(versions)) == 4
    mapping.handles[3].reclaim()


def test_what_the_engine_never_released_is_reclaimed_after_its_end():
    mappings = PersistentMappings(CPU, 3)
    storage = shared()
    mapping = mappings.add(storage, [3])
    assert mapping.handles[3].count() == 1
    mappings.reclaim()
    assert mapping.handles[3].count() == 0 and len(mappings) == 0


def test_every_reader_has_an_export_of_its_own():
    mappings = PersistentMappings(CPU, 3)
    storage = shared()
    mapping = mappings.add(storage, [3, 5])
    assert mapping.name.startswith("r3/") and list(mapping.handles) == [3, 5]
    readers = [open_handle(mapping.handles[rank].describe(), CPU) for rank in (3, 5)]
    assert not mapping.is_released
    readers.pop()
    assert not mapping.is_released, "one still has it open"
    readers.pop()
    assert mapping.is_released
    mappings.reclaim()


def test_what_workers_of_other_slices_map_is_not_reclaimed_with_this_engine():
    taken: list[int] = []

    class Handle:
        def __init__(self, rank):
            self.rank = rank

        def reclaim(self):
            taken.append(self.rank)

    mappings = PersistentMappings(CPU, 3)
    mapping = mappings.add(shared(), [3])
    mapping.handles[3].reclaim()
    mapping.handles.clear()
    mapping.handles.update({rank: Handle(rank) for rank in (2, 3, 5)})
    mappings.reclaim([2, 3])
    assert taken == [2, 3] and len(mappings) == 0


# --- for one sync alone ------------------------------------------------------------------------------------------------


@pytest.fixture
def persistent():
    mappings = PersistentMappings(CPU, 3)
    yield mappings
    mappings.reclaim()


@pytest.fixture
def transient(persistent):
    mappings = TransientMappings(ipc_payload.Ledger(rank=0), persistent, rank=3)
    yield mappings
    mappings.reclaim()


def counts(transient):
    return [handle.count() for handle in transient._handles.values()]


def test_every_storage_is_exported_once_and_persistent_mappings_are_not(persistent, transient):
    one, two, mapped = shared(), shared(), shared()
    persistent.add(mapped, [3])
    transient.export([one, two, one, mapped], 3, 1)
    names = ["r3/stage/0", "r3/stage/1"]
    assert transient.regions == dict(zip([one._cdata, two._cdata], names))
    assert [region for region, _ in transient.described(3)] == names and counts(transient) == [1, 1]
    transient.export([two], 7, 0)
    assert [region for region, _ in transient.described(7)] == names[1:], "another reader, another export"
    assert len(transient.described(3)) == 2 and transient.ledger.num_exported == 3
    assert transient.error is None
    assert persistent.uses([one, two]) == [STEADY, STEADY], "where they are now is where they were at this sync"


def test_an_export_that_is_not_needed_is_taken_back(transient):
    transient.export([shared(), shared()], 3, 1)
    handles = [handle for handle in transient._handles.values()]
    transient.reclaim()
    assert [handle.count() <= 0 for handle in handles] == [True, True]
    assert transient.regions == {} and transient.described(3) == [] and transient.ledger.outstanding() == []


def test_an_export_that_fails_is_kept_for_the_agreement(monkeypatch, transient):
    first, second = shared(), shared()
    original = ipc_payload.export_storage

    def export(storage):
        if storage._cdata == second._cdata:
            raise RuntimeError("no memory for a handle")
        return original(storage)

    monkeypatch.setattr(ipc_payload, "export_storage", export)
    transient.export([first, second], 3, 1)
    assert "no memory" in str(transient.error) and list(transient.regions) == [first._cdata]
    transient.reclaim()
    assert transient.error is None and transient.ledger.outstanding() == []


def test_a_handle_that_was_not_opened_is_named(transient):
    transient.export([shared()], 3, 1)
    transient.note_opened({1: False})
    [item] = transient.ledger.outstanding()
    assert item.fate is ipc_payload.Fate.NEVER_OPENED and item.tp_rank == 1


@pytest.mark.parametrize("is_trusted", [True, False])
def test_memory_that_no_worker_has_opened_is_called_back_only_where_that_may_be(is_trusted):
    """A sync that failed on the way may have left exports that the workers never got to open."""
    counts = {3: 1}

    class Dropped:
        name, num_bytes, handles = "a", 64, {3: None}
        is_released = property(lambda self: not any(counts.values()))

        def reclaim(self, readers):
            counts.update(dict.fromkeys(readers, 0))

    dropped = Dropped()
    errors = []

    def agree(error, value, **_):
        errors.append(type(error))
        if error is not None:
            raise error

    group = SimpleNamespace(rank=3, timeout_s=1.0, agree=agree, all_gather=lambda mine, **_: [mine])
    mappings = mock.Mock(expired=lambda: [dropped])
    syncer = SimpleNamespace(
        state=SimpleNamespace(mappings=mappings, mapped=SimpleNamespace(is_trusted=is_trusted)),
        context=SimpleNamespace(group=group, layout=SimpleNamespace(slice_ranks=(3,)), server=None, device=CPU),
        _release=lambda *_: None,
    )
    if is_trusted:
        with pytest.raises(DeadlineError, match="still mapped"):
            WeightSyncer.call_back(syncer, timeout_s=0.05)
        assert errors == [type(None), DeadlineError], "the other ranks raise it as well"
    else:
        assert WeightSyncer.call_back(syncer, timeout_s=0.05) == 64
        assert errors == [type(None)] * 2
    mappings.retire.assert_called_once_with([dropped])
