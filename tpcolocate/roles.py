"""Physical devices -> tp order and owner of a tp slice.

Pure: every rank computes the same roles from devices that were exchanged before.  TP rank k runs on the device of the
training rank ``ranks[k]``, and ``ranks`` ascend whatever the order of the devices: trainers cut rows by rank, so that a
TP worker finds most of its part on its own device.  The rank on the lowest device owns the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from tpcolocate.devices import PhysicalDevice
from tpcolocate.errors import DeviceError, LayoutError


@dataclass(frozen=True, slots=True)
class RankDevice:
    """Device of one training rank.

    Attributes:
        rank: Global rank.
        host: Identity of its host; only compared.
        device: Its device; None for a rank on the CPU.
    """

    rank: int
    host: str
    device: PhysicalDevice | None


@dataclass(frozen=True, slots=True)
class Roles:
    """Tp order, owner and devices of one tp slice.

    Attributes:
        ranks: Global ranks in tp order, ascending: the rank on TP rank k's device is ``ranks[k]``.
        owner_rank: Global rank that launches the server: that on the lowest device, the first one on the CPU.
        visible_devices: Device tokens in tp order, for the server's environment only; empty on the CPU.
        shared: All ranks of the slice share one device (test rigs only).
    """

    ranks: tuple[int, ...]
    owner_rank: int
    visible_devices: tuple[str, ...]
    shared: bool


def assign(members: Sequence[RankDevice], *, allow_shared_devices: bool = False) -> Roles:
    """Order the ranks of one slice and elect its owner.

    The lowest device is that with the lowest physical index; of UUIDs without an index, the first by token.  The order
    of ``members`` does not matter.

    Args:
        members: The ranks of one slice.
        allow_shared_devices: All ranks may share one device, as on a rig with a single GPU.

    Raises:
        LayoutError: No rank, a rank twice, or ranks of several hosts.
        DeviceError: CPU and GPU ranks in one slice; a device used twice; tokens that cannot be ordered or cannot be
            in one list.
    """
    members = sorted(members, key=lambda member: member.rank)
    ranks = tuple(member.rank for member in members)
    if not members:
        raise LayoutError("a tp slice has no ranks")
    if len(set(ranks)) != len(ranks):
        raise LayoutError(f"a rank appears twice in the tp slice {ranks}", slice_ranks=ranks)
    hosts = {member.host for member in members}
    if len(hosts) > 1:
        places = ", ".join(f"rank {member.rank} on {member.host}" for member in members)
        raise LayoutError(
            f"one server would span {len(hosts)} hosts: {places}",
            slice_ranks=ranks,
            hint="a server uses the GPUs of one host: pass init() a tp_size that divides the number of ranks per host",
        )
    used = [(member.rank, member.device) for member in members if member.device is not None]
    if not used:
        return Roles(ranks=ranks, owner_rank=ranks[0], visible_devices=(), shared=False)
    if len(used) != len(members):
        on_cpu = ", ".join(str(member.rank) for member in members if member.device is None)
        raise DeviceError(
            f"one server would mix CPU and GPU ranks: on the CPU {on_cpu}; on GPUs {', '.join(str(r) for r, _ in used)}",
            slice_ranks=ranks,
            hint="pass init() the same kind of device on every rank: torch.device('cuda', local_rank), or 'cpu'",
        )
    same = [(a, b) for a, b in combinations(used, 2) if same_device(a[1], b[1])]
    shared = allow_shared_devices and len(same) > 0
    if shared and len(same) != len(used) * (len(used) - 1) // 2:
        raise DeviceError(
            f"some ranks of one server share a GPU and others do not: {_list(used)}",
            slice_ranks=ranks,
            hint="pass init() a device of its own on every rank, torch.device('cuda', local_rank), or the same one on all "
            "ranks of the server",
        )
    if same and not shared:
        (rank, device), (other, _) = same[0]
        raise _used_twice(rank, other, device, members[0].host, slice_ranks=ranks)
    if shared:
        token = _tokens(used[:1], ranks)[ranks[0]]
        return Roles(ranks=ranks, owner_rank=ranks[0], visible_devices=(token,), shared=True)
    owner_rank = _on_lowest_device(used, ranks)
    tokens = _tokens(used, ranks)
    return Roles(
        ranks=ranks,
        owner_rank=owner_rank,
        visible_devices=tuple(tokens[rank] for rank in ranks),
        shared=False,
    )


def check_exclusive(ranks: Sequence[RankDevice]) -> None:
    """Check that no two ranks of one host use the same device.

    Args:
        ranks: All ranks of the job.

    Raises:
        DeviceError: A device is used twice; names both ranks, the device and the host.
    """
    used: dict[str, list[tuple[int, PhysicalDevice]]] = {}
    for member in sorted(ranks, key=lambda member: member.rank):
        if member.device is None:
            continue
        neighbours = used.setdefault(member.host, [])
        for rank, device in neighbours:
            if same_device(device, member.device):
                raise _used_twice(rank, member.rank, device, member.host, slice_ranks=None)
        neighbours.append((member.rank, member.device))


def same_device(a: PhysicalDevice, b: PhysicalDevice) -> bool:
    """Return whether two devices of one host are the same: by UUID, else by index, else by token.

    An abbreviated UUID matches the UUIDs that it begins.
    """
    if a.uuid is not None and b.uuid is not None:
        return a.uuid.casefold() == b.uuid.casefold()
    if a.index is not None and b.index is not None:
        return a.index == b.index
    one, other = (d.token.casefold() if d.uuid is None else d.uuid.casefold() for d in (a, b))
    return one.startswith(other) or other.startswith(one)


def _is_integer(token: str) -> bool:
    return token.isascii() and token.isdigit()


def _on_lowest_device(used: list[tuple[int, PhysicalDevice]], ranks: tuple[int, ...]) -> int:
    indexed = [device.index is not None for _, device in used]
    if any(indexed) and not all(indexed):
        raise DeviceError(
            f"the devices of a tp slice cannot be ordered, some have an index and some only a UUID: {_list(used)}",
            slice_ranks=ranks,
            hint="Name all devices by integers or all by UUIDs, or install a driver with NVML on this host.",
        )
    # By token after the index: MIG instances of one GPU share its index.
    return min(used, key=lambda item: (-1 if item[1].index is None else item[1].index, item[1].token.casefold()))[0]


def _tokens(used: list[tuple[int, PhysicalDevice]], ranks: tuple[int, ...]) -> dict[int, str]:
    """Return a token per rank, all of one form: runtimes do not read mixed lists correctly."""
    if all(_is_integer(device.token) for _, device in used):
        return {rank: device.token for rank, device in used}
    tokens: dict[int, str] = {rank: device.token if device.uuid is None else device.uuid for rank, device in used}
    forms = {"" if _is_integer(token) else token.partition("-")[0].upper() for token in tokens.values()}
    if len(forms) > 1:
        raise DeviceError(
            f"the GPUs of one server cannot be in one list of visible devices: {_list(used)}",
            slice_ranks=ranks,
            hint="name them all by numbers or all by UUIDs in CUDA_VISIBLE_DEVICES of every rank; with "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID numbers can be translated to UUIDs",
        )
    return tokens


def _list(used: list[tuple[int, PhysicalDevice]]) -> str:
    return ", ".join(f"rank {rank} on {device.token}" for rank, device in used)


def _used_twice(
    rank: int, other: int, device: PhysicalDevice, host: str, *, slice_ranks: tuple[int, ...] | None
) -> DeviceError:
    return DeviceError(
        f"device {device.token!r} of host {host!r} is used by rank {rank} and by rank {other}",
        slice_ranks=slice_ranks,
        device=device.token if device.uuid is None else device.uuid,
        hint="Give each rank its own device: torch.device('cuda', local_rank), or one visible device per rank.",
    )
