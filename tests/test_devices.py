"""Visibility variables -> physical devices: CUDA's rules from tables, checked against torch's parser."""

import json
import sys
import types
from dataclasses import FrozenInstanceError, asdict

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tpcolocate import devices
from tpcolocate.devices import Inventory, PhysicalDevice, resolve, server_environment, visible_tokens
from tpcolocate.errors import DeviceError

pytestmark = pytest.mark.quick

A = "GPU-8f2a1c00-0000-0000-0000-00000000000a"
B = "GPU-8f2b1c00-0000-0000-0000-00000000000b"
C = "GPU-00c1aaaa-0000-0000-0000-00000000000c"
D = "GPU-fd000000-0000-0000-0000-00000000000d"
MIG_1 = "MIG-11111111-2222-3333-4444-555555555501"
MIG_2 = "MIG-12111111-2222-3333-4444-555555555502"
OLD_MIG = f"MIG-{C}/1/0"
AMD_0, AMD_1 = "GPU-00112233445566aa", "GPU-00112233445566bb"

ALIKE = Inventory(uuids=(A, B, C, D), names=("H100",) * 4)
UNLIKE = Inventory(uuids=(A, B, C, D), names=("H100", "H100", "T4", "T4"))
NAMELESS = Inventory(uuids=(A, B, C, D))
WITH_MIG = Inventory(uuids=(A, C), mig_uuids=((), (MIG_1, MIG_2)), names=("H100", "H100"))

CVD = "CUDA_VISIBLE_DEVICES"
HIP = "HIP_VISIBLE_DEVICES"
ROCR = "ROCR_VISIBLE_DEVICES"
NPU = "ASCEND_RT_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    "text, inventory, tokens",
    [
        pytest.param(None, None, None, id="unset-means-all"),
        pytest.param(None, ALIKE, None, id="unset-with-inventory"),
        pytest.param("0", None, ("0",), id="one"),
        pytest.param("3,1", None, ("3", "1"), id="any-order"),
        pytest.param("6,4,5,7", None, ("6", "4", "5", "7"), id="four-in-any-order"),
        pytest.param(" 3 , 1 ", None, ("3", "1"), id="spaces"),
        pytest.param("", None, (), id="empty-means-none"),
        pytest.param("-1", None, (), id="minus-one-means-none"),
        pytest.param("-1,0", None, (), id="minus-one-first"),
        pytest.param("NoDevFiles", None, (), id="no-dev-files"),
        pytest.param("0,1,-1,2", None, ("0", "1"), id="negative-cuts"),
        pytest.param("0,,1", None, ("0",), id="empty-entry-cuts"),
        pytest.param("0,1,", None, ("0", "1"), id="trailing-comma"),
        pytest.param("0,x,1", None, ("0",), id="text-cuts"),
        pytest.param("0,+,1", None, ("0",), id="bare-sign-cuts"),
        pytest.param("1gpu2,2ampere", None, ("1", "2"), id="strtol-ignores-trailing-text"),
        pytest.param("+1,02", None, ("1", "2"), id="sign-and-leading-zero"),
        pytest.param("0-3", None, ("0",), id="a-range-is-its-first-number"),
        pytest.param("0,0", None, (), id="repeat-voids"),
        pytest.param("0,1,2,1", None, (), id="late-repeat-voids"),
        pytest.param("1,01", None, (), id="repeat-in-another-spelling"),
        pytest.param("0,-1,0", None, ("0",), id="repeat-behind-the-cut"),
        pytest.param("0,3,4,1", ALIKE, ("0", "3"), id="out-of-range-cuts"),
        pytest.param("9,0", ALIKE, (), id="out-of-range-first"),
        pytest.param("1,9,1", ALIKE, (), id="repeat-behind-out-of-range"),
        pytest.param("0,3,4,1", None, ("0", "3", "4", "1"), id="range-unknown"),
        pytest.param(f"{B},{A}", None, (B, A), id="uuids"),
        pytest.param(f"{B}, {A}", None, (B, A), id="uuids-and-spaces"),
        pytest.param(f"{B},{A}", ALIKE, (B, A), id="uuids-with-inventory"),
        pytest.param("GPU-8f2b,GPU-00", None, ("GPU-8f2b", "GPU-00"), id="abbreviations"),
        pytest.param("GPU-8f2b,GPU-00", ALIKE, ("GPU-8f2b", "GPU-00"), id="abbreviations-with-inventory"),
        pytest.param("GPU-8F2B", ALIKE, ("GPU-8F2B",), id="upper-case"),
        pytest.param("GPU-fd,GPU-8f2,GPU-00", ALIKE, ("GPU-fd",), id="ambiguous-cuts"),
        pytest.param("GPU-fd,GPU-ee,GPU-00", ALIKE, ("GPU-fd",), id="unmatched-cuts"),
        pytest.param(f"{A},{A}", None, (), id="uuid-repeat-voids"),
        pytest.param(f"{A},GPU-8f2a", ALIKE, (), id="abbreviated-repeat-voids"),
        pytest.param(f"{A},1", None, (A,), id="integer-after-uuid-cuts"),
        pytest.param(f"1,{A}", None, ("1",), id="uuid-after-integer-cuts"),
        pytest.param(MIG_1, None, (MIG_1,), id="mig"),
        pytest.param(OLD_MIG, None, (OLD_MIG,), id="old-mig"),
        pytest.param("MIG-77777777", WITH_MIG, ("MIG-77777777",), id="unknown-mig-is-opaque"),
        pytest.param("MIG-1", WITH_MIG, (), id="ambiguous-mig"),
        pytest.param(f"{MIG_1},{A}", None, (MIG_1,), id="gpu-after-mig-cuts"),
        pytest.param(f"{A},{MIG_1}", None, (A,), id="mig-after-gpu-cuts"),
    ],
)
def test_visible_tokens_of_cuda(text, inventory, tokens):
    environ = {} if text is None else {CVD: text}
    assert visible_tokens(environ, inventory=inventory) == tokens


@pytest.mark.parametrize(
    "environ, inventory, index, device",
    [
        pytest.param({CVD: "3,1"}, None, 0, PhysicalDevice("3", 3, None), id="3,1-first"),
        pytest.param({CVD: "3,1"}, None, 1, PhysicalDevice("1", 1, None), id="3,1-second"),
        pytest.param({CVD: "6,4,5,7"}, None, 2, PhysicalDevice("5", 5, None), id="6,4,5,7"),
        pytest.param({CVD: "5"}, None, 0, PhysicalDevice("5", 5, None), id="one-entry-per-rank"),
        pytest.param({}, None, 2, PhysicalDevice("2", 2, None), id="unset"),
        pytest.param({}, ALIKE, 2, PhysicalDevice("2", 2, C), id="unset-with-inventory"),
        pytest.param({CVD: "3,1"}, ALIKE, 0, PhysicalDevice("3", 3, D), id="alike-gpus"),
        pytest.param({CVD: "3,1"}, UNLIKE, 0, PhysicalDevice("3", 3, None), id="unlike-gpus-fastest-first"),
        pytest.param({CVD: "3,1"}, NAMELESS, 0, PhysicalDevice("3", 3, None), id="nameless-gpus"),
        pytest.param(
            {CVD: "3,1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, UNLIKE, 0, PhysicalDevice("3", 3, D), id="pci-order"
        ),
        pytest.param(
            {CVD: "3", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, UNLIKE, 0, PhysicalDevice("3", 3, None), id="fff"
        ),
        pytest.param({CVD: "0"}, Inventory(uuids=(A,)), 0, PhysicalDevice("0", 0, A), id="single-gpu"),
        pytest.param({CVD: "0"}, WITH_MIG, 0, PhysicalDevice("0", 0, None), id="integer-on-a-mig-host"),
        pytest.param({CVD: B}, None, 0, PhysicalDevice(B, None, B), id="full-uuid"),
        pytest.param(
            {CVD: B.replace("8f2b", "8F2B")},
            None,
            0,
            PhysicalDevice(B.replace("8f2b", "8F2B"), None, B),
            id="full-uuid-upper-case",
        ),
        pytest.param({CVD: B}, UNLIKE, 0, PhysicalDevice(B, 1, B), id="full-uuid-placed"),
        pytest.param({CVD: "GPU-8f2b"}, None, 0, PhysicalDevice("GPU-8f2b", None, None), id="abbreviated"),
        pytest.param({CVD: "GPU-fd,GPU-8F2B"}, ALIKE, 1, PhysicalDevice("GPU-8F2B", 1, B), id="abbreviated-placed"),
        pytest.param({CVD: MIG_2}, None, 0, PhysicalDevice(MIG_2, None, MIG_2), id="mig"),
        pytest.param({CVD: MIG_2}, WITH_MIG, 0, PhysicalDevice(MIG_2, 1, MIG_2), id="mig-placed"),
        pytest.param({CVD: "MIG-12"}, WITH_MIG, 0, PhysicalDevice("MIG-12", 1, MIG_2), id="mig-abbreviated"),
        pytest.param({CVD: "MIG-12"}, None, 0, PhysicalDevice("MIG-12", None, None), id="mig-abbreviated-unplaced"),
        pytest.param({CVD: OLD_MIG}, None, 0, PhysicalDevice(OLD_MIG, None, OLD_MIG), id="old-mig"),
        pytest.param({CVD: OLD_MIG}, WITH_MIG, 0, PhysicalDevice(OLD_MIG, 1, OLD_MIG), id="old-mig-placed"),
        pytest.param({CVD: "0,1,-1,2"}, None, 1, PhysicalDevice("1", 1, None), id="before-the-cut"),
    ],
)
def test_resolve_on_cuda(environ, inventory, index, device):
    assert resolve(index, environ, inventory=inventory) == device


@pytest.mark.parametrize(
    "environ, tokens",
    [
        pytest.param({}, None, id="unset"),
        pytest.param({HIP: "3,1"}, ("3", "1"), id="hip"),
        pytest.param({CVD: "3,1"}, ("3", "1"), id="cuda-on-amd"),
        pytest.param({HIP: "2", CVD: "3,1"}, ("2",), id="hip-before-cuda"),
        pytest.param({ROCR: "6,4"}, ("6", "4"), id="rocr"),
        pytest.param({ROCR: "6,4,7", HIP: "2,0"}, ("7", "6"), id="rocr-then-hip"),
        pytest.param({ROCR: "6,4,7", CVD: "1"}, ("4",), id="rocr-then-cuda"),
        pytest.param({ROCR: "6,4,7", HIP: "0", CVD: "1"}, ("6",), id="rocr-then-hip-not-cuda"),
        pytest.param({ROCR: "6,4", HIP: "1,2,0"}, ("4",), id="hip-beyond-rocr-cuts"),
        pytest.param({ROCR: "6,4", HIP: ""}, (), id="empty-hip"),
        pytest.param({ROCR: "", HIP: "0"}, (), id="empty-rocr"),
        pytest.param({ROCR: f"0,{AMD_1}"}, ("0", AMD_1), id="rocr-mixes-forms"),
        pytest.param({ROCR: f"{AMD_1},{AMD_0}", HIP: "1,0"}, (AMD_0, AMD_1), id="rocr-uuids-then-hip"),
        pytest.param({ROCR: f"{AMD_1},{AMD_0}", HIP: AMD_0}, (AMD_0,), id="rocr-uuids-then-hip-uuid"),
        pytest.param({ROCR: f"{AMD_1}", HIP: AMD_0}, (), id="hip-uuid-that-rocr-hid"),
        pytest.param({ROCR: "0,1,0,2"}, ("0", "1"), id="rocr-repeat-cuts"),
        pytest.param({HIP: "0,1,0,2"}, (), id="hip-repeat-voids"),
        pytest.param({HIP: "1gpu"}, (), id="hip-needs-plain-integers"),
    ],
)
def test_visible_tokens_of_hip(environ, tokens):
    assert visible_tokens(environ, kind="hip") == tokens


def test_resolve_on_hip_composes_lists_and_uuids():
    assert resolve(0, {ROCR: f"0,{AMD_1}", HIP: "1"}, kind="hip") == PhysicalDevice(AMD_1, None, AMD_1)
    # HIP numbers devices by driver topology: with several GPUs the UUID of an integer is unknown.
    two = Inventory(uuids=(AMD_0, AMD_1), names=("MI300X", "MI300X"))
    assert resolve(1, {}, kind="hip", inventory=two) == PhysicalDevice("1", 1, None)


@pytest.mark.parametrize(
    "environ, tokens",
    [
        pytest.param({}, None, id="unset"),
        pytest.param({NPU: "6,4,5,7"}, ("6", "4", "5", "7"), id="list"),
        pytest.param({NPU: "0,1,-1,2"}, ("0", "1"), id="negative-cuts"),
        pytest.param({NPU: "1,1"}, (), id="repeat-voids"),
        pytest.param({NPU: f"0,{A}"}, ("0",), id="uuid-cuts"),
        pytest.param({CVD: "3", NPU: "2"}, ("2",), id="cuda-does-not-matter"),
    ],
)
def test_visible_tokens_of_npu(environ, tokens):
    assert visible_tokens(environ, kind="npu") == tokens


@pytest.mark.parametrize(
    "index, environ, kind, inventory, words",
    [
        pytest.param(
            2, {CVD: "3,1"}, "cuda", None, ("device index 2", "CUDA_VISIBLE_DEVICES='3,1'", "2 devices"), id="past"
        ),
        pytest.param(-1, {CVD: "3,1"}, "cuda", None, ("device index -1", "'3,1'"), id="negative-index"),
        pytest.param(0, {CVD: ""}, "cuda", None, ("CUDA_VISIBLE_DEVICES=''", "0 devices"), id="none-visible"),
        pytest.param(2, {CVD: "0,1,-1,2"}, "cuda", None, ("2 devices", "entry 3 of 4 ('-1')", "negative"), id="tail"),
        pytest.param(1, {CVD: "0,x,2"}, "cuda", None, ("1 device visible", "entry 2 of 3 ('x')", "neither"), id="text"),
        pytest.param(1, {CVD: "0,,2"}, "cuda", None, ("entry 2 of 3 ('')", "empty"), id="empty-entry"),
        pytest.param(
            1, {CVD: "0,4"}, "cuda", ALIKE, ("entry 2 of 2 ('4')", "this host has 4 devices"), id="no-such-gpu"
        ),
        pytest.param(0, {CVD: "1,2,1"}, "cuda", None, ("0 devices", "entry 3 of 3 ('1')", "voids"), id="repeat"),
        pytest.param(1, {CVD: f"{A},1"}, "cuda", None, ("entry 2 of 2 ('1')", "forms do not mix"), id="mixed"),
        pytest.param(1, {CVD: "GPU-fd,GPU-8f"}, "cuda", ALIKE, ("'GPU-8f'", "ambiguous", "2 matches"), id="ambiguous"),
        pytest.param(0, {CVD: "GPU-ee"}, "cuda", ALIKE, ("'GPU-ee'", "matches no GPU"), id="unmatched"),
        pytest.param(4, {}, "cuda", ALIKE, ("CUDA_VISIBLE_DEVICES unset", "4 devices"), id="unset-past-inventory"),
        pytest.param(-1, {}, "cuda", None, ("no cuda device -1", "unset"), id="unset-negative"),
        pytest.param(
            1,
            {ROCR: "6,4", HIP: "1,2"},
            "hip",
            None,
            ("ROCR_VISIBLE_DEVICES='6,4'", "HIP_VISIBLE_DEVICES='1,2'", "entry 2 of 2 ('2')", "leaves 2 devices"),
            id="hip-past-rocr",
        ),
        pytest.param(0, {NPU: "0-3"}, "npu", None, ("ASCEND_RT_VISIBLE_DEVICES='0-3'", "range '0-3'"), id="npu-range"),
        pytest.param(0, {}, "tpu", None, ("'tpu'", "cuda, hip, npu"), id="unknown-kind"),
        pytest.param(None, {}, "cuda", None, ("None", "torch.device"), id="torch-device-without-index"),
    ],
)
def test_errors_of_resolve_give_the_reason(index, environ, kind, inventory, words):
    with pytest.raises(DeviceError) as caught:
        resolve(index, environ, kind=kind, inventory=inventory)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "tokens, kind, environ",
    [
        pytest.param(("1", "3"), "cuda", {CVD: "1,3"}, id="integers"),
        pytest.param((B, A), "cuda", {CVD: f"{B},{A}"}, id="uuids"),
        pytest.param((MIG_1,), "cuda", {CVD: MIG_1}, id="mig"),
        pytest.param((), "cuda", {CVD: "-1"}, id="none"),
        pytest.param(("1", "3"), "hip", {ROCR: None, HIP: "1,3", CVD: "1,3"}, id="hip-integers"),
        pytest.param((AMD_1, AMD_0), "hip", {ROCR: f"{AMD_1},{AMD_0}", HIP: None, CVD: None}, id="hip-uuids"),
        pytest.param(("0",), "npu", {NPU: "0"}, id="npu"),
    ],
)
def test_server_environment(tokens, kind, environ):
    assert server_environment(tokens, kind=kind) == environ
    child = {name: value for name, value in environ.items() if value is not None}
    assert visible_tokens(child, kind=kind) == tokens


@pytest.mark.parametrize(
    "tokens, kind, word",
    [
        pytest.param(("1", A), "cuda", "both", id="mixed"),
        pytest.param((A, MIG_1), "cuda", "both", id="mig-and-gpu"),
        pytest.param(("1", "2", "1"), "cuda", "repeated", id="repeat"),
        pytest.param((A, A.upper()), "cuda", "repeated", id="repeat-in-another-case"),
        pytest.param(("",), "cuda", "expected", id="empty"),
        pytest.param(("-1",), "cuda", "expected", id="negative"),
        pytest.param(("1,2",), "cuda", "expected", id="two-in-one"),
        pytest.param(("GPU-a b",), "cuda", "expected", id="space"),
        pytest.param(("GPU-",), "cuda", "expected", id="bare-prefix"),
        pytest.param((MIG_1,), "hip", "expected", id="mig-on-amd"),
        pytest.param((A,), "npu", "expected", id="uuid-on-npu"),
        pytest.param(("0",), "tpu", "unknown", id="unknown-kind"),
    ],
)
def test_server_environment_rejects_lists_that_would_hide_devices(tokens, kind, word):
    with pytest.raises(DeviceError, match=word):
        server_environment(tokens, kind=kind)


@pytest.mark.parametrize(
    "environ, order",
    [
        ({}, "FASTEST_FIRST"),
        ({"CUDA_DEVICE_ORDER": ""}, "FASTEST_FIRST"),
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, "PCI_BUS_ID"),
    ],
)
def test_device_order(environ, order):
    assert devices.device_order(environ) == order


def test_values_are_frozen_and_hashable_and_devices_survive_json():
    device = resolve(1, {CVD: f"{B},{A}"}, inventory=ALIKE)
    assert PhysicalDevice(**json.loads(json.dumps(asdict(device)))) == device
    assert len({device, PhysicalDevice(A, 0, A)}) == 1
    assert hash(ALIKE) == hash(Inventory(uuids=(A, B, C, D), names=("H100",) * 4))
    hash(devices.VISIBILITY["hip"])
    for value, field in ((device, "token"), (ALIKE, "uuids"), (devices.VISIBILITY["cuda"], "name")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field, "x")


@pytest.mark.parametrize("fields", [{"names": ("H100",)}, {"mig_uuids": ((MIG_1,),)}], ids=["names", "migs"])
def test_an_inventory_of_unequal_lengths_is_rejected(fields):
    with pytest.raises(DeviceError, match="2 GPUs"):
        Inventory(uuids=(A, B), **fields)


# --- NVML: a fake, to test on machines without a driver ---


class FakeNvml(types.ModuleType):
    class NVMLError(Exception):
        pass

    def __init__(self, gpus, *, init_fails=False, lost=None):
        super().__init__("pynvml")
        self.gpus, self.init_fails, self.lost, self.open = gpus, init_fails, lost, 0

    def nvmlInit(self):
        if self.init_fails:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        if index == self.lost:
            raise self.NVMLError("GPU is lost")
        return self.gpus[index]

    def nvmlDeviceGetPciInfo(self, gpu):
        return types.SimpleNamespace(domain=0, bus=gpu["bus"], device=0)

    def nvmlDeviceGetUUID(self, gpu):
        return gpu["uuid"]

    def nvmlDeviceGetName(self, gpu):
        return gpu["name"]

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu):
        if "migs" not in gpu:
            raise self.NVMLError("Not Supported")
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu, slot):
        if slot not in gpu["migs"]:
            raise self.NVMLError("Not Found")
        return {"uuid": gpu["migs"][slot]}


GPUS = [
    {"bus": 0x9A, "uuid": B, "name": "H100", "migs": {1: MIG_1, 4: MIG_2}},
    {"bus": 0x1B, "uuid": A.encode(), "name": b"A100"},
]


def test_read_inventory_sorts_by_pci_bus_and_shuts_down(monkeypatch):
    nvml = FakeNvml(GPUS)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert devices.read_inventory() == Inventory((A, B), mig_uuids=((), (MIG_1, MIG_2)), names=("A100", "H100"))
    assert nvml.open == 0


@pytest.mark.parametrize(
    "nvml",
    [
        pytest.param(None, id="no-module"),  # None in sys.modules makes the import fail
        pytest.param(FakeNvml(GPUS, init_fails=True), id="no-driver"),
        pytest.param(FakeNvml(GPUS, lost=1), id="a-gpu-is-lost"),
    ],
)
def test_read_inventory_is_none_if_nvml_fails(monkeypatch, nvml):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert devices.read_inventory() is None
    assert nvml is None or nvml.open == 0


# --- properties ---

INDICES = st.lists(st.integers(0, 127), min_size=1, max_size=16, unique=True)


@given(INDICES, st.data())
def test_resolve_gives_the_entry_at_the_index(indices, data):
    environ = {CVD: ",".join(map(str, indices))}
    at = data.draw(st.integers(0, len(indices) - 1))
    assert resolve(at, environ) == PhysicalDevice(str(indices[at]), indices[at], None)
    with pytest.raises(DeviceError):
        resolve(len(indices), environ)


@given(st.permutations((A, B, C, D)), st.integers(9, 40), st.integers(0, 3))
def test_uuid_prefixes_resolve_like_full_uuids(uuids, length, at):
    full = resolve(at, {CVD: ",".join(uuids)}, inventory=UNLIKE)
    short = resolve(at, {CVD: ",".join(uuid[:length] for uuid in uuids)}, inventory=UNLIKE)
    assert (short.index, short.uuid) == (full.index, full.uuid) == (UNLIKE.uuids.index(uuids[at]), uuids[at])


@given(INDICES, st.sampled_from(["-1", "", "x", "-", "gpu", "GPU-8f2a", "MIG-1"]), INDICES)
def test_an_invalid_entry_hides_exactly_what_follows(before, invalid, after):
    environ = {CVD: ",".join((*map(str, before), invalid, *map(str, after)))}
    assert visible_tokens(environ) == tuple(map(str, before))
    with pytest.raises(DeviceError, match=rf"entry {len(before) + 1} of {len(before) + 1 + len(after)} \("):
        resolve(len(before), environ)


@given(INDICES, st.data())
def test_a_repeat_voids_the_list(indices, data):
    repeated = [*indices]
    repeated.insert(data.draw(st.integers(0, len(indices))), data.draw(st.sampled_from(indices)))
    assert visible_tokens({CVD: ",".join(map(str, repeated))}) == ()


@given(INDICES, st.data())
def test_hip_positions_compose(indices, data):
    second = data.draw(st.permutations(range(len(indices))))
    environ = {ROCR: ",".join(map(str, indices)), HIP: ",".join(map(str, second))}
    assert visible_tokens(environ, kind="hip") == tuple(str(indices[at]) for at in second)


@given(INDICES, st.sampled_from(["cuda", "hip", "npu"]))
def test_a_child_sees_exactly_the_devices_in_its_environment(indices, kind):
    tokens = tuple(map(str, indices))
    parent = {name: "9" for name in devices.VISIBILITY[kind].variables}
    child = {**parent, **server_environment(tokens, kind=kind)}
    child = {name: value for name, value in child.items() if value is not None}
    assert visible_tokens(child, kind=kind) == tokens


def _torch_reading(monkeypatch_context, text):
    import torch

    monkeypatch_context.setenv(CVD, text)
    return torch.cuda._parse_visible_devices()


@settings(deadline=None, max_examples=400)
@given(st.lists(st.text("0123456789+- gx", max_size=4), max_size=6).map(",".join))
def test_integer_lists_are_parsed_as_by_torch(text):
    with pytest.MonkeyPatch.context() as patch:
        try:
            read = _torch_reading(patch, text)
        except ValueError:
            assume(False)  # a bare sign: torch fails on it
    assert visible_tokens({CVD: text}) == tuple(map(str, read))


@settings(deadline=None)
@given(st.lists(st.sampled_from([A, B, "GPU-8f2a", "GPU-8f", "1", "", MIG_1, OLD_MIG, "x"]), min_size=1, max_size=5))
def test_uuid_lists_are_parsed_as_by_torch(entries):
    with pytest.MonkeyPatch.context() as patch:
        read = _torch_reading(patch, ",".join(entries))
    assert visible_tokens({CVD: ",".join(entries)}) == tuple(map(str, read))
