"""Each rank's device as facts that all ranks exchange, and the roles that every rank derives from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from tpcolocate import devices, roles
from tpcolocate.errors import ConfigError, DeviceError, LayoutError, shown
from tpcolocate.groups import Member, plan_slices
from tpcolocate.interfaces import GlooAddress, check_reachable, is_address

# What a rank reports of itself.
_FACTS = {"kind", "physical", "order", "job", "job_name", "gloo", "version", "shared"}

# As torch has them; those of AMD are "cuda", too.
_KINDS = ("cuda", "npu")


def inspect_device(device: torch.device | str | None) -> tuple[torch.device, dict[str, Any], ConfigError | None]:
    """Find this rank's device.

    Returns:
        The device, the facts about it that all ranks need (JSON types), and the error if it is invalid.
    """
    found = torch.device("cpu")
    facts: dict[str, Any] = {"kind": "cpu", "physical": None, "order": None}
    try:
        if device is None:
            found = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else found
        else:
            found = torch.device(device)
        if found.type == "cpu":
            return found, facts, None
        if found.type not in _KINDS:  # an index of another kind would be taken for that of a GPU
            raise DeviceError(
                f"device {str(found)!r} is of no kind that a server can share with its trainer",
                hint="train on GPUs, torch.device('cuda', local_rank), on NPUs, or on the CPU",
            )
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", torch.cuda.current_device())
        kind = "npu" if found.type == "npu" else "hip" if torch.version.hip else "cuda"
        physical = devices.resolve(found.index, os.environ, kind=kind, inventory=devices.read_inventory())
        if kind == "cuda" and torch.cuda.is_available():
            physical = _check_uuid(physical, found)
        facts.update(kind=kind, physical=asdict(physical), order=devices.device_order(os.environ))
    except ConfigError as error:
        return found, facts, error
    except (
        TypeError,
        OverflowError,
        RuntimeError,
        ValueError,
        AssertionError,
    ) as error:  # raised by torch for an invalid device
        hint = 'pass for example torch.device("cuda", local_rank)'
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return found, facts, DeviceError(f"device {shown(device)}: {shown(why)}", hint=hint)
    except Exception:  # of an object that is no device
        return found, facts, DeviceError(f"device {shown(device)} is none", hint="pass a torch.device or its name")
    return found, facts, None


def _check_uuid(physical: devices.PhysicalDevice, device: torch.device) -> devices.PhysicalDevice:
    """Compare with the UUID of the GPU that CUDA assigns to this index in this process; fill in a missing one."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    if physical.uuid is not None and physical.uuid.startswith("GPU-") and physical.uuid.lower() != uuid.lower():
        raise DeviceError(
            f"{device} is {uuid} in this process, but {physical.uuid} by CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}",
            hint="set CUDA_VISIBLE_DEVICES where the job is started, before the first use of CUDA in the process; if it was, set "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID there, too",
        )
    return physical if physical.uuid is not None else replace(physical, uuid=uuid)


def plan_roles(members: Sequence[Member]) -> list[roles.Roles]:
    """Return the roles of every slice.  Pure: the same result or error on every rank.

    Args:
        members: All ranks of the job, in rank order.

    Raises:
        ConfigError, LayoutError, DeviceError: See `init`.
    """
    slices = plan_slices(members)
    _check_facts(members)
    rank_devices = [_rank_device(member) for member in members]
    shared = all(member.facts["shared"] for member in members)
    _check_equal_jobs(members)
    if members[0].tp_size > 1:
        _check_equal_facts(members)
        check_reachable({m.rank: (_network(m), GlooAddress(**m.facts["gloo"])) for m in members})
    if not shared:
        roles.check_exclusive(rank_devices)
    return [roles.assign([rank_devices[rank] for rank in ranks], allow_shared_devices=shared) for ranks in slices]


def _check_facts(members: Sequence[Member]) -> None:
    """Check that this version of the library understands what the ranks have exchanged.

    Raises:
        LayoutError: Another version has sent something else.
    """
    _check_equal(members, "version", "versions of tpcolocate", "install one version on all hosts")
    for member in members:
        facts = member.facts
        physical, gloo = facts.get("physical"), facts.get("gloo")
        if (
            not _FACTS <= facts.keys()
            or not (physical is None or _is_device(physical))
            or not (isinstance(gloo, dict) and gloo.keys() == {"address", "origin"} and is_address(gloo["address"]))
        ):
            raise LayoutError(
                f"the description of rank {member.rank} is not understood",
                hint="install one version of tpcolocate on all hosts",
                rank=member.rank,
            )


def _is_device(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"token", "index", "uuid"}
        and isinstance(value["token"], str)
        and isinstance(value["index"], int | None)
        and isinstance(value["uuid"], str | None)
    )


def is_on_one_network(members: Sequence[Member]) -> bool:
    """Return whether all ranks are in one network namespace of one host, where the loopback connects them."""
    return len({_network(member) for member in members}) == 1


def _network(member: Member) -> str:
    return f"{member.host.boot_id}/{member.host.network}"


def _check_equal_jobs(members: Sequence[Member]) -> None:
    for member in members:
        if (name := member.facts["job_name"]) != members[0].facts["job_name"]:
            raise ConfigError(
                f"ranks 0 and {member.rank} are of different jobs: {members[0].facts['job_name']!r} and {name!r}",
                hint="pass the same job to init() on every rank, or set the same TPCOLOCATE_JOB for all",
            )


def _rank_device(member: Member) -> roles.RankDevice:
    physical = member.facts["physical"]
    return roles.RankDevice(
        rank=member.rank,
        host=member.host.label,
        device=None if physical is None else devices.PhysicalDevice(**physical),
    )


def _check_equal_facts(members: Sequence[Member]) -> None:
    for fact, what, hint in (
        ("kind", "kinds of device", "train on one kind of device"),
        (
            "order",
            "CUDA_DEVICE_ORDER",
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID for all ranks: otherwise one number means different GPUs",
        ),
    ):
        _check_equal(members, fact, what, hint)


def _check_equal(members: Sequence[Member], fact: str, what: str, hint: str) -> None:
    values = {str(member.facts.get(fact)): member.rank for member in reversed(members)}
    if len(values) > 1:
        views = ", ".join(f"{value} on rank {rank}" for value, rank in sorted(values.items(), key=lambda item: item[1]))
        raise LayoutError(f"the ranks have different {what}: {views}", hint=hint)


__all__ = ["inspect_device", "is_on_one_network", "plan_roles"]
