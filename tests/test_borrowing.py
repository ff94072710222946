"""Memory that is mapped for one sync: every handle has an owner, and one that was exported in vain comes back."""

import pytest
import torch

from tpcolocate import ipc_payload
from tpcolocate.weights.transport.mapped_memory import PersistentMappings
from tpcolocate.weights.transport.transient_mappings import TransientMappings

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]


def borrowing():
    return TransientMappings(ipc_payload.Ledger(rank=0), PersistentMappings(torch.device("cpu")), tp_rank=1)


def shared(size=64):
    return torch.zeros(size, dtype=torch.uint8).share_memory_().untyped_storage()


def counts(borrowed):
    return [handle.count() for _, handle in borrowed._handles]


def test_every_storage_is_exported_once_and_what_is_lent_is_not():
    borrowed = borrowing()
    one, two, lent = shared(), shared(), shared()
    loan = borrowed._loans.lend(lent)
    borrowed.export([one, two, one, lent])
    assert borrowed.regions == {one._cdata: "stage/0", two._cdata: "stage/1"}
    assert [region for region, _ in borrowed.described()] == ["stage/0", "stage/1"] and counts(borrowed) == [1, 1]
    assert borrowed.ledger.num_exported == 2 and borrowed.error is None
    assert borrowed._loans.note([one, two]) == [True, True], "where they lie now is where they lay at this sync"
    borrowed.reclaim()
    loan.handle.reclaim()


def test_what_was_exported_in_vain_is_taken_back():
    borrowed = borrowing()
    borrowed.export([shared(), shared()])
    handles = [handle for _, handle in borrowed._handles]
    borrowed.reclaim()
    assert [handle.count() <= 0 for handle in handles] == [True, True]
    assert borrowed.regions == {} and borrowed.described() == [] and borrowed.ledger.outstanding() == []


def test_an_export_that_fails_is_kept_for_the_agreement(monkeypatch):
    borrowed = borrowing()
    first, second = shared(), shared()
    original = ipc_payload.export_storage

    def export(storage):
        if storage._cdata == second._cdata:
            raise RuntimeError("no memory for a handle")
        return original(storage)

    monkeypatch.setattr(ipc_payload, "export_storage", export)
    borrowed.export([first, second])
    assert "no memory" in str(borrowed.error) and list(borrowed.regions) == [first._cdata]
    borrowed.reclaim()
    assert borrowed.error is None and borrowed.ledger.outstanding() == []


def test_a_handle_that_was_not_opened_is_named():
    borrowed = borrowing()
    borrowed.export([shared()])
    borrowed.note_opened({1: False})
    [item] = borrowed.ledger.outstanding()
    assert item.fate is ipc_payload.Fate.NEVER_OPENED and item.tp_rank == 1
    borrowed.reclaim()
