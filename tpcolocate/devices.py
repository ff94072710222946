"""CUDA_VISIBLE_DEVICES and its relatives -> physical devices.

``torch.device("cuda", i)`` is a position in the list of devices visible to this process, not a physical id.  This
module resolves it, and does the inverse for the server's environment.  All functions are pure (environments are
arguments, ``os.environ`` is not read), except :func:`read_inventory`.

Rules and their sources:

* CUDA: the programming guide's section on environment variables (an invalid entry ends the list, abbreviated UUIDs),
  and ``torch.cuda._parse_visible_devices`` where the guide is silent: a repeated entry voids the list, an integer ends
  at the first non-digit, and the first entry decides whether the list consists of integers or of UUIDs.
* HIP: ROCR-Runtime's ``amd_filter_device.cpp`` (forms may be mixed, a repeated entry ends the list), then HIP's own
  list, whose integers index the devices that ROCR left.  Where HIP and torch differ on HIP's list (empty, repeated
  entries), torch's reading counts: no device is visible.
* NPU: ASCEND_RT_VISIBLE_DEVICES contains integers only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpcolocate.errors import DeviceError

logger = logging.getLogger(__name__)

FASTEST_FIRST = "FASTEST_FIRST"
PCI_BUS_ID = "PCI_BUS_ID"

_LONG_MAX = 2**63 - 1
_INTEGER_PREFIX = re.compile(r"[+-]?[0-9]+")
_WHOLE_INTEGER = re.compile(r"[0-9]+")
_RANGE = re.compile(r"[0-9]+\s*-\s*[0-9]+")
_DASHED = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_FULL_UUID = re.compile(rf"(?:GPU|MIG)-{_DASHED}|GPU-[0-9a-f]{{16}}|MIG-GPU-{_DASHED}/[0-9]+/[0-9]+", re.IGNORECASE)
_OLD_MIG = re.compile(r"MIG-(GPU-[0-9a-f-]+)/[0-9]+/[0-9]+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PhysicalDevice:
    """One device of a host.

    Attributes:
        token: Entry of the visibility variable that selects this device on its host.
        index: Physical index: for an integer token, the integer; for a UUID, its index in the inventory (for a MIG
            instance, its GPU's).  None for a UUID without an inventory.
        uuid: Full UUID, ``"GPU-..."`` or ``"MIG-..."``; None if neither token nor inventory determines it.
    """

    token: str
    index: int | None
    uuid: str | None


@dataclass(frozen=True, slots=True)
class Inventory:
    """The physical devices of this host, in PCI bus order, as NVML lists them.

    Attributes:
        uuids: Full UUID per GPU.
        mig_uuids: Full UUIDs of the MIG instances, per GPU; empty when not queried.
        names: Product name per GPU; empty when unknown.  By default CUDA numbers devices fastest first, which equals
            PCI order only among GPUs of one kind, so without names an integer on a host with several GPUs cannot be
            mapped to a UUID.

    Raises:
        DeviceError: ``mig_uuids`` or ``names`` has another length than ``uuids``.
    """

    uuids: tuple[str, ...]
    mig_uuids: tuple[tuple[str, ...], ...] = ()
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, values in (("mig_uuids", self.mig_uuids), ("names", self.names)):
            if len(values) not in (0, len(self.uuids)):
                raise DeviceError(f"an inventory of {len(self.uuids)} GPUs has {len(values)} {field}")


@dataclass(frozen=True, slots=True)
class VisibilityList:
    """One list of devices that a runtime applies to those that the list before it left.

    Attributes:
        variables: Variables that may contain the list; the first one that is set counts.
        mixes_forms: Integers and UUIDs may be mixed.
        repeat_voids: A repeated entry makes no device visible; otherwise it ends the list.
        trailing_text: Text after an integer is ignored (C's strtol).
    """

    variables: tuple[str, ...]
    mixes_forms: bool = False
    repeat_voids: bool = True
    trailing_text: bool = False


@dataclass(frozen=True, slots=True)
class Visibility:
    """How one vendor's runtime selects devices by environment variables.

    Attributes:
        name: ``"cuda"``, ``"hip"`` or ``"npu"``.
        lists: In the order in which the runtime applies them.
        uuid_prefixes: Prefixes of UUID tokens; empty where only integers are allowed.
        child_integers: Variables to set for a child process with integer tokens.
        child_uuids: The same for UUID tokens.
        order_variable: Variable that selects the numbering of devices, if the runtime has one.
    """

    name: str
    lists: tuple[VisibilityList, ...]
    uuid_prefixes: tuple[str, ...]
    child_integers: tuple[str, ...]
    child_uuids: tuple[str, ...] = ()
    order_variable: str | None = None

    @property
    def variables(self) -> tuple[str, ...]:
        """All variables, in the order in which the runtime reads them."""
        return tuple(variable for visibility_list in self.lists for variable in visibility_list.variables)


VISIBILITY: dict[str, Visibility] = {
    row.name: row
    for row in (
        Visibility(
            name="cuda",
            lists=(VisibilityList(("CUDA_VISIBLE_DEVICES",), trailing_text=True),),
            uuid_prefixes=("GPU-", "MIG-"),
            child_integers=("CUDA_VISIBLE_DEVICES",),
            child_uuids=("CUDA_VISIBLE_DEVICES",),
            order_variable="CUDA_DEVICE_ORDER",
        ),
        Visibility(
            name="hip",
            lists=(
                VisibilityList(("ROCR_VISIBLE_DEVICES",), mixes_forms=True, repeat_voids=False),
                VisibilityList(("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"), mixes_forms=True),
            ),
            uuid_prefixes=("GPU-",),
            # SGLang reads CUDA_VISIBLE_DEVICES on AMD too, with int() per entry, so it must contain integers.  ROCR
            # accepts UUIDs in every release.
            child_integers=("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
            child_uuids=("ROCR_VISIBLE_DEVICES",),
        ),
        Visibility(
            name="npu",
            lists=(VisibilityList(("ASCEND_RT_VISIBLE_DEVICES",)),),
            uuid_prefixes=(),
            child_integers=("ASCEND_RT_VISIBLE_DEVICES",),
        ),
    )
}


@dataclass(frozen=True, slots=True)
class _Reading:
    devices: tuple[PhysicalDevice, ...]
    settings: str  # "NAME='value'" of every variable read
    reasons: tuple[str, ...]  # why lists end before their last entry


def visible_tokens(
    environ: Mapping[str, str], *, kind: str = "cuda", inventory: Inventory | None = None
) -> tuple[str, ...] | None:
    """Return the tokens of the devices visible to a process with this environment, in its numbering.

    Args:
        environ: Environment of the process.
        kind: Row of :data:`VISIBILITY`.
        inventory: Physical devices of the host; other entries are invalid.

    Returns:
        One token per visible device, or None when no variable is set, which makes all visible.

    Raises:
        DeviceError: Unknown ``kind``, or a range where only single integers are supported.
    """
    reading = _read(environ, _row(kind), inventory)
    return None if reading is None else tuple(device.token for device in reading.devices)


def resolve(
    index: int, environ: Mapping[str, str], *, kind: str = "cuda", inventory: Inventory | None = None
) -> PhysicalDevice:
    """Return the physical device behind a device index of a process.

    Args:
        index: ``torch.device.index``.
        environ: Environment of the process.
        kind: Row of :data:`VISIBILITY`.
        inventory: Physical devices of the host.  With it ranges are checked, UUIDs get their index, and integers get
            their UUID where CUDA's numbering is certainly PCI order: by CUDA_DEVICE_ORDER, or with a single GPU, or
            with GPUs of one product name; and MIG is off.

    Raises:
        DeviceError: ``index`` is not visible; the message has the variables, the number of visible devices and the
            entry that ended a list.  Also for an unknown ``kind``, and for a range on an NPU.
    """
    row = _row(kind)
    if not isinstance(index, int) or isinstance(index, bool):
        raise DeviceError(
            f"{index!r} is not a device index",
            hint="Pass a device with an index, for example torch.device('cuda', local_rank).",
        )
    reading = _read(environ, row, inventory)
    if reading is None:
        device, reason = _integer(index, inventory, _numbering_is_pci(environ, row, inventory))
        if device is not None:
            return device
        found = "" if reason is None else f"; {reason}"
        raise DeviceError(
            f"there is no {kind} device {index}: {', '.join(row.variables)} unset{found}",
            device=f"{kind}:{index}",
            hint="start no more ranks than the host has GPUs (torchrun --nproc-per-node), and pass init() "
            "torch.device('cuda', local_rank)",
        )
    if 0 <= index < len(reading.devices):
        return reading.devices[index]
    message = f"device index {index} is not visible: {reading.settings} makes {_count(len(reading.devices))} visible"
    raise DeviceError(
        "; ".join((message, *reading.reasons)),
        device=f"{kind}:{index}",
        hint="pass init() the position in that list, from 0, not the number that nvidia-smi shows: torch.device('cuda', local_rank)",
    )


def server_environment(tokens: Sequence[str], *, kind: str = "cuda") -> dict[str, str | None]:
    """Return the variables that make exactly these devices visible to a child process, in this order.

    Args:
        tokens: Tokens of one form, in order; empty for no device.
        kind: Row of :data:`VISIBILITY`.

    Returns:
        For every variable of the ``kind``, the value to set, or None to remove it.

    Raises:
        DeviceError: A token is not of this kind, is repeated, or the forms are mixed, which would silently hide
            devices from the child.
    """
    row = _row(kind)
    forms = [token_form(token, kind=kind) for token in tokens]
    for position, token in enumerate(tokens):
        if forms[position] != forms[0]:
            raise DeviceError(
                f"one list cannot contain both {tokens[0]!r} and {token!r}",
                device=token,
                hint="Use integers for all devices of the slice, or full UUIDs for all.",
            )
        if token.casefold() in (earlier.casefold() for earlier in tokens[:position]):
            raise DeviceError(f"device token {token!r} is repeated in {','.join(tokens)!r}", device=token)
    chosen = row.child_uuids if forms and forms[0] != "" else row.child_integers
    # "-1" and not "": HIP reads an empty variable as an unset one.
    value = ",".join(tokens) if tokens else "-1"
    return {variable: value if variable in chosen else None for variable in row.variables}


def token_form(token: str, *, kind: str = "cuda") -> str:
    """Return ``""`` for an integer token, otherwise its UUID prefix, ``"GPU-"`` or ``"MIG-"``.

    Raises:
        DeviceError: It is neither, or not of this ``kind``.
    """
    row = _row(kind)
    if _WHOLE_INTEGER.fullmatch(token) is not None:
        return ""
    for prefix in row.uuid_prefixes:
        if token.startswith(prefix) and len(token) > len(prefix) and not re.search(r"[\s,]", token):
            return prefix
    allowed = " or ".join(("an integer", *(f"{prefix}<uuid>" for prefix in row.uuid_prefixes)))
    raise DeviceError(f"{token!r} is not a {kind} device token: {allowed} is expected", device=token)


def device_order(environ: Mapping[str, str]) -> str:
    """Return how CUDA numbers the devices: CUDA_DEVICE_ORDER, ``"FASTEST_FIRST"`` by default.

    Integer tokens refer to the same devices in two processes only if both have the same order.
    """
    order = environ.get("CUDA_DEVICE_ORDER", "")
    return FASTEST_FIRST if order == "" else order


def read_inventory() -> Inventory | None:
    """List the GPUs of this host by NVML, which ignores CUDA_VISIBLE_DEVICES.

    Returns:
        The inventory in PCI bus order, or None without NVML, without a driver, or when a GPU does not answer (a gap
        would shift all later indices).
    """
    try:
        import pynvml  # type: ignore[import-untyped]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        logger.debug("no device inventory: NVML did not start: %s", error)
        return None
    try:
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            pci = pynvml.nvmlDeviceGetPciInfo(handle)
            address = (pci.domain, pci.bus, pci.device)
            uuid, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
            gpus.append((address, _text(uuid), _mig_uuids(pynvml, handle), _text(name)))
    except pynvml.NVMLError as error:
        logger.warning("no device inventory: NVML could not list the GPUs: %s", error)
        return None
    finally:
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError as error:
            logger.debug("NVML did not shut down: %s", error)
    gpus.sort(key=lambda gpu: gpu[0])
    return Inventory(
        uuids=tuple(uuid for _, uuid, _, _ in gpus),
        mig_uuids=tuple(migs for _, _, migs, _ in gpus),
        names=tuple(name for _, _, _, name in gpus),
    )


def _mig_uuids(nvml: Any, handle: Any) -> tuple[str, ...]:
    found = []
    try:
        for slot in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            try:
                mig = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot)
            except nvml.NVMLError:
                continue  # slots may be empty anywhere in the range
            found.append(_text(nvml.nvmlDeviceGetUUID(mig)))
    except nvml.NVMLError:
        return ()  # raised by GPUs and drivers without MIG
    return tuple(found)


def _text(value: str | bytes) -> str:
    # nvidia-ml-py returned bytes before release 12 and str since.
    return value.decode() if isinstance(value, bytes) else value


def _row(kind: str) -> Visibility:
    try:
        return VISIBILITY[kind]
    except KeyError:
        raise DeviceError(f"unknown device kind {kind!r}; supported: {', '.join(VISIBILITY)}") from None


def _count(number: int) -> str:
    return f"{number} device{'' if number == 1 else 's'}"


def _read(environ: Mapping[str, str], row: Visibility, inventory: Inventory | None) -> _Reading | None:
    base: tuple[PhysicalDevice, ...] | None = None
    settings: list[str] = []
    reasons: list[str] = []
    numbering_is_pci = _numbering_is_pci(environ, row, inventory)
    for visibility_list in row.lists:
        variable = next((name for name in visibility_list.variables if name in environ), None)
        if variable is None:
            continue
        text = environ[variable]
        setting = f"{variable}={text!r}"
        entries = [entry.strip() for entry in text.split(",")]
        keys, reason = _parse(entries, visibility_list, row, setting)
        base, not_found = _find_devices(keys, entries, visibility_list, base, inventory, numbering_is_pci)
        if not_found is not None:  # an earlier entry than that of _parse
            reason = not_found
        settings.append(setting)
        if reason is not None:
            reasons.append(reason if len(row.lists) == 1 else f"in {variable} {reason}")
    return None if base is None else _Reading(base, " with ".join(settings), tuple(reasons))


def _parse(
    entries: list[str], visibility_list: VisibilityList, row: Visibility, setting: str
) -> tuple[list[int | str], str | None]:
    """Parse integers and UUID tokens up to the first invalid entry; also return why the list ends there."""
    if not row.uuid_prefixes:
        for entry in entries:
            if _RANGE.fullmatch(entry) is not None:
                raise DeviceError(
                    f"{setting}: the range {entry!r} is not supported", hint="List the devices one by one: 0,1,2,3."
                )
    keys: list[int | str] = []
    first_form: str | None = None
    for position, entry in enumerate(entries):
        form = next((prefix for prefix in row.uuid_prefixes if entry.startswith(prefix)), "")
        if first_form is None:
            first_form = form
        key, reason = _entry_key(entry, form, visibility_list)
        if reason is None and form != first_form and not visibility_list.mixes_forms:
            reason = f"the first entry {entries[0]!r} has another form, and forms do not mix"
        if key is None or reason is not None:
            return keys, _ends(position, entries, reason)
        if any(_same_key(key, earlier) for earlier in keys):
            if visibility_list.repeat_voids:
                return [], _voids(position, entries)
            return keys, _ends(position, entries, "it is repeated")
        keys.append(key)
    return keys, None


def _entry_key(entry: str, form: str, visibility_list: VisibilityList) -> tuple[int | str | None, str | None]:
    if form != "":
        return entry, None
    if entry == "":
        return None, "it is empty"
    match = _INTEGER_PREFIX.match(entry)
    if match is None or (not visibility_list.trailing_text and match.end() != len(entry)):
        return None, "it is neither an integer nor a device UUID"
    number = _long(match[0])
    return (None, "it is negative") if number < 0 else (number, None)


def _long(text: str) -> int:
    """Return an integer as C's strtol does: what does not fit is the largest of its sign."""
    digits = text.lstrip("+-").lstrip("0")
    number = int(digits) if 0 < len(digits) < 19 else 0 if digits == "" else _LONG_MAX
    return -number if text.startswith("-") else number


def _same_key(a: int | str, b: int | str) -> bool:
    return a.casefold() == b.casefold() if isinstance(a, str) and isinstance(b, str) else a == b


def _find_devices(
    keys: list[int | str],
    entries: list[str],
    visibility_list: VisibilityList,
    base: tuple[PhysicalDevice, ...] | None,
    inventory: Inventory | None,
    numbering_is_pci: bool,
) -> tuple[tuple[PhysicalDevice, ...], str | None]:
    """Return the devices that exist: on the host (``base`` is None), or among those that the list before it left."""
    devices: list[PhysicalDevice] = []
    for position, key in enumerate(keys):
        if base is not None:
            device, reason = _find_in(key, base)
        elif isinstance(key, int):
            device, reason = _integer(key, inventory, numbering_is_pci)
        else:
            device, reason = _uuid(key, inventory)
        if device is None:
            return tuple(devices), _ends(position, entries, reason)
        if any(_same_device(device, earlier) for earlier in devices):
            if visibility_list.repeat_voids:
                return (), _voids(position, entries)
            return tuple(devices), _ends(position, entries, "it is repeated")
        devices.append(device)
    return tuple(devices), None


def _same_device(a: PhysicalDevice, b: PhysicalDevice) -> bool:
    if a.uuid is not None and b.uuid is not None:
        return a.uuid.casefold() == b.uuid.casefold()
    return a == b


def _integer(
    index: int, inventory: Inventory | None, numbering_is_pci: bool
) -> tuple[PhysicalDevice | None, str | None]:
    if index < 0 or (inventory is not None and index >= len(inventory.uuids)):
        return None, None if inventory is None else f"this host has {_count(len(inventory.uuids))}"
    uuid = inventory.uuids[index] if inventory is not None and numbering_is_pci else None
    return PhysicalDevice(token=str(index), index=index, uuid=uuid), None


def _uuid(token: str, inventory: Inventory | None) -> tuple[PhysicalDevice | None, str | None]:
    if inventory is None:
        return PhysicalDevice(token=token, index=None, uuid=_full_uuid(token)), None
    if not token.startswith("MIG-"):
        matches = _matches(token, inventory.uuids)
        if len(matches) != 1:
            return None, _mismatch(len(matches), "GPU")
        return PhysicalDevice(token=token, index=matches[0], uuid=inventory.uuids[matches[0]]), None
    migs = [(gpu, uuid) for gpu, uuids in enumerate(inventory.mig_uuids) for uuid in uuids]
    matches = _matches(token, [uuid for _, uuid in migs])
    if len(matches) > 1:
        return None, _mismatch(len(matches), "MIG instance")
    if matches:
        gpu, uuid = migs[matches[0]]
        return PhysicalDevice(token=token, index=gpu, uuid=uuid), None
    # The older form has the GPU's UUID and two instance ids, which NVML's UUIDs do not contain.
    old = _OLD_MIG.fullmatch(token)
    parents = [] if old is None else _matches(old[1], inventory.uuids)
    index = parents[0] if len(parents) == 1 else None
    return PhysicalDevice(token=token, index=index, uuid=_full_uuid(token)), None


def _find_in(key: int | str, base: tuple[PhysicalDevice, ...]) -> tuple[PhysicalDevice | None, str | None]:
    if isinstance(key, int):
        if key >= len(base):
            return None, f"the list before it leaves {_count(len(base))}"
        return base[key], None
    matches = _matches(key, [device.token if device.uuid is None else device.uuid for device in base])
    if len(matches) != 1:
        return None, _mismatch(len(matches), "device that the list before it leaves")
    return base[matches[0]], None


def _matches(token: str, uuids: Sequence[str]) -> list[int]:
    folded = [uuid.casefold() for uuid in uuids]
    equal = [i for i, uuid in enumerate(folded) if uuid == token.casefold()]
    return equal if equal else [i for i, uuid in enumerate(folded) if uuid.startswith(token.casefold())]


def _mismatch(number: int, what: str) -> str:
    return f"it matches no {what}" if number == 0 else f"it is ambiguous, {number} matches"


def _full_uuid(token: str) -> str | None:
    if _FULL_UUID.fullmatch(token) is None:
        return None
    head = 8 if token.casefold().startswith("mig-gpu-") else 4
    return token[:head].upper() + token[head:].lower()


def _ends(position: int, entries: list[str], reason: str | None) -> str:
    return f"entry {position + 1} of {len(entries)} ({entries[position]!r}) ends the list: {reason}"


def _voids(position: int, entries: list[str]) -> str:
    return f"entry {position + 1} of {len(entries)} ({entries[position]!r}) is a repeat, which voids the whole list"


def _numbering_is_pci(environ: Mapping[str, str], row: Visibility, inventory: Inventory | None) -> bool:
    """Return whether integer i is certainly the i-th GPU of the inventory."""
    if inventory is None or any(inventory.mig_uuids):
        return False  # with MIG on, CUDA numbers instances, not GPUs
    if len(inventory.uuids) <= 1:
        return True
    if row.order_variable is None:
        return False
    if environ.get(row.order_variable) == PCI_BUS_ID:
        return True
    return len(inventory.names) > 0 and len(set(inventory.names)) == 1
