"""The trainer's memory that workers map: what may be mapped, and that every handle comes back."""

import pytest
import torch

from tpcolocate import ipc_payload
from tpcolocate.in_server.tpcolocate_receiver.handles import open_handle
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
    mappings = PersistentMappings(CPU)
    stays, private, small = shared(), torch.zeros(16).untyped_storage(), torch.zeros(0).untyped_storage()
    assert mappings.uses([stays, private, small]) == [MAPPABLE, STAGED, STAGED], "seen for the first time"
    assert mappings.uses([stays, private, small]) == [STEADY, STAGED, STAGED], "private memory cannot be mapped"
    assert mappings.uses([shared(), stays]) == [MAPPABLE, STEADY]
    assert mappings.uses([private]) == [STAGED]
    assert mappings.uses([stays]) == [MAPPABLE], "it was not there at the sync before"


def test_a_storage_at_the_address_of_a_freed_one_is_another():
    mappings = PersistentMappings(CPU)
    for _ in range(20):
        storage = shared()
        assert mappings.uses([storage]) == [MAPPABLE]
        del storage


def test_a_mapping_is_found_while_the_storage_is_the_same_at_the_same_address():
    mappings = PersistentMappings(CPU)
    one, other = shared(), shared()
    mapping = mappings.add(one)
    try:
        assert mappings.find(one) is mapping and mappings.find(other) is None
        assert mappings.uses([one]) == [STEADY], "the export itself may have moved it, which is no reason to stop"
        assert (len(mappings), mappings.all(), mapping.num_bytes) == (1, [mapping], one.nbytes())
        assert mappings.unused([one]) == [] and mappings.unused([other]) == [mapping]
        view = torch.empty(0).set_(one, 4, (2,))
        reader = open_handle(mapping.handle.describe(), CPU)
        view.fill_(3.0)
        assert reader.view(torch.float32)[4:6].tolist() == [3.0, 3.0], "what the trainer writes is what is read"
        assert mapping.handle.count() == 1
        del reader
        assert mapping.handle.count() == 0
    finally:
        mappings.remove({mapping.name})
    assert len(mappings) == 0 and mappings.find(one) is None


def test_a_dropped_storage_is_expired():
    mappings = PersistentMappings(CPU)
    storage = shared()
    mapping = mappings.add(storage)
    assert mappings.expired() == []
    mapping.handle.reclaim()  # on a CPU the handle's own mapping keeps the storage
    mapping.handle.storage = None
    del storage
    assert mappings.expired() == [mapping]


def test_the_version_changes_with_every_mapping_that_is_added_or_removed():
    mappings = PersistentMappings(CPU)
    storage = shared()
    versions = [mappings.version]
    mapping = mappings.add(storage)
    versions.append(mappings.version)
    mappings.uses([storage])
    mappings.remove(set())
    assert mappings.version == versions[-1], "nothing has changed"
    mappings.remove({mapping.name})
    versions.append(mappings.version)
    mappings.reclaim()
    versions.append(mappings.version)
    assert len(set(versions)) == 4
    mapping.handle.reclaim()


def test_what_the_engine_never_released_is_reclaimed_after_its_end():
    mappings = PersistentMappings(CPU)
    storage = shared()
    mapping = mappings.add(storage)
    assert mapping.handle.count() == 1
    mappings.reclaim()
    assert mapping.handle.count() == 0 and len(mappings) == 0


# --- for one sync alone ------------------------------------------------------------------------------------------------


@pytest.fixture
def persistent():
    mappings = PersistentMappings(CPU)
    yield mappings
    mappings.reclaim()


@pytest.fixture
def transient(persistent):
    mappings = TransientMappings(ipc_payload.Ledger(rank=0), persistent, tp_rank=1)
    yield mappings
    mappings.reclaim()


def counts(transient):
    return [handle.count() for _, handle in transient._handles]


def test_every_storage_is_exported_once_and_persistent_mappings_are_not(persistent, transient):
    one, two, mapped = shared(), shared(), shared()
    persistent.add(mapped)
    transient.export([one, two, one, mapped])
    assert transient.regions == {one._cdata: "stage/0", two._cdata: "stage/1"}
    assert [region for region, _ in transient.described()] == ["stage/0", "stage/1"] and counts(transient) == [1, 1]
    assert transient.ledger.num_exported == 2 and transient.error is None
    assert persistent.uses([one, two]) == [STEADY, STEADY], "where they are now is where they were at this sync"


def test_an_export_that_is_not_needed_is_taken_back(transient):
    transient.export([shared(), shared()])
    handles = [handle for _, handle in transient._handles]
    transient.reclaim()
    assert [handle.count() <= 0 for handle in handles] == [True, True]
    assert transient.regions == {} and transient.described() == [] and transient.ledger.outstanding() == []


def test_an_export_that_fails_is_kept_for_the_agreement(monkeypatch, transient):
    first, second = shared(), shared()
    original = ipc_payload.export_storage

    def export(storage):
        if storage._cdata == second._cdata:
            raise RuntimeError("no memory for a handle")
        return original(storage)

    monkeypatch.setattr(ipc_payload, "export_storage", export)
    transient.export([first, second])
    assert "no memory" in str(transient.error) and list(transient.regions) == [first._cdata]
    transient.reclaim()
    assert transient.error is None and transient.ledger.outstanding() == []


def test_a_handle_that_was_not_opened_is_named(transient):
    transient.export([shared()])
    transient.note_opened({1: False})
    [item] = transient.ledger.outstanding()
    assert item.fate is ipc_payload.Fate.NEVER_OPENED and item.tp_rank == 1
