"""Where a rank is, and what it becomes in its slice: facts that all ranks exchange, and the plan that each makes of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from tpcolocate import devices, roles
from tpcolocate.errors import ConfigError, DeviceError, LayoutError
from tpcolocate.groups import Member, plan_slices


def told(error: ConfigError | None) -> dict[str, str | None] | None:
    """An error as the exchange carries it."""
    return None if error is None else {"kind": type(error).__name__, "message": error.message, "hint": error.hint}


def look_around(device: torch.device | str | None) -> tuple[torch.device, dict[str, Any], ConfigError | None]:
    """This rank's device, what the others need to know of it (JSON types), and what is wrong with it."""
    place = torch.device("cpu")
    facts: dict[str, Any] = {"kind": "cpu", "physical": None, "order": None}
    try:
        if device is None:
            place = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else place
        else:
            place = torch.device(device)
        if place.type == "cpu":
            return place, facts, None
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", torch.cuda.current_device())
        kind = "npu" if place.type == "npu" else "hip" if torch.version.hip else "cuda"
        physical = devices.resolve(place.index, os.environ, kind=kind, inventory=devices.read_inventory())
        if kind == "cuda" and torch.cuda.is_available():
            physical = _confirmed(physical, place)
        facts.update(kind=kind, physical=asdict(physical), order=devices.device_order(os.environ))
    except ConfigError as error:
        return place, facts, error
    except (RuntimeError, ValueError, AssertionError) as error:  # torch's, for what is no device
        return (
            place,
            facts,
            DeviceError(f"device {device!r}: {error}", hint='for example torch.device("cuda", local_rank)'),
        )
    return place, facts, None


def _confirmed(physical: devices.PhysicalDevice, place: torch.device) -> devices.PhysicalDevice:
    """Compare with the UUID of the GPU that CUDA really gives this process under that index."""
    uuid = f"GPU-{torch.cuda.get_device_properties(place).uuid}"
    if physical.uuid is not None and physical.uuid.startswith("GPU-") and physical.uuid.lower() != uuid.lower():
        raise DeviceError(
            f"{place} is {uuid}, but CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r} says {physical.uuid}",
            hint="the variable was changed after CUDA had started, or CUDA_DEVICE_ORDER differs from PCI order",
        )
    return physical if physical.uuid is not None else replace(physical, uuid=uuid)


def plan(members: Sequence[Member]) -> list[roles.Roles]:
    """Slices and roles from everybody's facts.  Pure."""
    slices = plan_slices(members)
    known = [_rank_device(member) for member in members]
    shared = all(member.facts["shared"] for member in members)
    if members[0].tp_size > 1:
        _check_alike(members)
    if not shared:
        roles.check_exclusive(known)
    return [roles.assign([known[rank] for rank in ranks], allow_shared_devices=shared) for ranks in slices]


def _rank_device(member: Member) -> roles.RankDevice:
    physical = member.facts["physical"]
    return roles.RankDevice(
        rank=member.rank,
        host=member.host.label,
        device=None if physical is None else devices.PhysicalDevice(**physical),
    )


def _check_alike(members: Sequence[Member]) -> None:
    for fact, what, hint in (
        ("version", "versions of tpcolocate", "install one version on all hosts"),
        ("kind", "kinds of device", "train on one kind of device"),
        (
            "order",
            "CUDA_DEVICE_ORDER",
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID for all ranks: without agreement device numbers mean different GPUs",
        ),
    ):
        values = {str(member.facts[fact]): member.rank for member in reversed(members)}
        if len(values) > 1:
            said = ", ".join(
                f"{value} on rank {rank}" for value, rank in sorted(values.items(), key=lambda item: item[1])
            )
            raise LayoutError(f"the ranks have different {what}: {said}", hint=hint)


__all__ = ["look_around", "plan", "told"]
