"""On which device CUDA handles are opened.  That they open: `test_gpu`."""

import base64

import pytest
import torch

from tpcolocate.in_server.tpcolocate_receiver import handles
from tpcolocate.in_server.tpcolocate_receiver.handles import is_elsewhere, open_handle

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

UUIDS = ["GPU-a", "GPU-b"]
"""Of the devices that the reader sees."""


def handle_of(uuid, number=0):
    return {"kind": "cuda", "uuid": uuid, "handle": base64.b64encode(bytes([number])).decode()}


@pytest.fixture
def opened(monkeypatch):
    """What was opened, each (handle, index of the device); `refused`: pairs of UUID and index that CUDA refuses."""

    class Opened(list):
        refused = set()

    found = Opened()

    def mapped(handle, index):
        if (handle["uuid"], index) in found.refused:
            raise RuntimeError(f"peer access is not supported ({index})")
        found.append((handle["uuid"], index))
        return torch.empty(0, dtype=torch.uint8)

    class Properties:
        def __init__(self, index):
            self.uuid = UUIDS[index if isinstance(index, int) else index.index]

    monkeypatch.setattr(handles, "_mapped", mapped)
    monkeypatch.setattr(handles, "_opened_on", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(UUIDS))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    return found


@pytest.mark.parametrize("uuid", ["GPU-a", "GPU-b", "GPU-invisible"])
def test_memory_of_every_gpu_is_mapped_on_the_readers_own_device(opened, uuid):
    open_handle(handle_of(uuid), torch.device("cuda", 0))
    open_handle(handle_of(uuid), torch.device("cuda"))
    assert opened == [(uuid, 0), (uuid, 1)], "the current one, where no other is named"


def test_what_cannot_be_mapped_here_is_mapped_on_its_own_gpu_and_from_then_on_at_once(opened, monkeypatch):
    opened.refused = {("GPU-b", 0)}
    for number in range(2):
        open_handle(handle_of("GPU-b", number), torch.device("cuda", 0))
    opened.refused = set()  # a handle of the same memory must not be opened for a second device
    open_handle(handle_of("GPU-b", 2), torch.device("cuda", 0))
    assert opened == [("GPU-b", 1)] * 3


def test_memory_that_was_mapped_here_is_not_mapped_elsewhere_after_an_error(opened):
    open_handle(handle_of("GPU-b"), torch.device("cuda", 0))
    opened.refused = {("GPU-b", 0)}
    with pytest.raises(RuntimeError, match="peer access"):
        open_handle(handle_of("GPU-b"), torch.device("cuda", 0))
    assert opened == [("GPU-b", 0)]


@pytest.mark.parametrize("uuid", ["GPU-a", "GPU-invisible"])
def test_memory_that_opens_nowhere_is_an_error_with_both_gpus(opened, uuid):
    opened.refused = {(uuid, 0)}
    with pytest.raises(RuntimeError, match=f"memory of GPU {uuid} .* runs on GPU-b.*peer access is not supported"):
        open_handle(handle_of(uuid), torch.device("cuda", 0))
    opened.refused = set()
    open_handle(handle_of(uuid), torch.device("cuda", 0))
    assert opened == [(uuid, 0)], "an error decides nothing"


def test_an_error_on_both_devices_is_that_of_the_second(opened):
    opened.refused = {("GPU-b", 0), ("GPU-b", 1)}
    with pytest.raises(RuntimeError, match=r"\(1\)"):
        open_handle(handle_of("GPU-b"), torch.device("cuda", 0))
    assert handles._opened_on == {}


def test_what_is_elsewhere_is_known_by_device_and_uuid(opened):
    here = torch.empty(1, device="meta")
    device = torch.device("meta")
    assert not is_elsewhere({"kind": "cpu"}, here, device)
    assert is_elsewhere({"kind": "cpu"}, here, torch.device("cpu"))

    class Mapped:
        device = torch.device("cuda", 0)

    assert not is_elsewhere(handle_of("GPU-a"), Mapped, torch.device("cuda", 0))
    assert is_elsewhere(handle_of("GPU-b"), Mapped, torch.device("cuda", 0)), "mapped here, and another GPU's"
