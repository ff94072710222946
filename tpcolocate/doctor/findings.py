"""Facts -> findings.  Pure: no process, file or device is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from packaging.version import InvalidVersion, Version

from tpcolocate.devices import FASTEST_FIRST, PCI_BUS_ID
from tpcolocate.doctor.facts import (
    SECTIONS,
    Allocator,
    Devices,
    Facts,
    GlooGroup,
    Handles,
    Job,
    Kernel,
    Leftovers,
    Limits,
    Network,
    SharedMemory,
    Software,
)
from tpcolocate.errors import ConfigError, some
from tpcolocate.groups import Member, named_ranks
from tpcolocate.placement import plan_roles
from tpcolocate.roles import Roles
from tpcolocate.server.releases import release

OK, WARNING, PROBLEM = "ok", "warning", "problem"
LEVELS = (OK, WARNING, PROBLEM)

_OLDEST_PYTHON = Version("3.11")
_OLDEST_TORCH = Version("2.9")
# A server at tp 2 has a queue of 24 MiB there, and NCCL takes about as much for each pair of ranks: with the 64 MiB that
# Docker gives, one of the two fails with a bus error.
_TOO_LITTLE_SHM = 128 << 20
_LITTLE_SHM = 1 << 30
# A process of torch and SGLang opens some 200 before the first request, and each request in flight takes one more.
_TOO_FEW_FILES, _FEW_FILES = 512, 1024
_MANY_LOG_BYTES = 1 << 30
_MANY_TORCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check.

    Attributes:
        check: Its name.
        level: ``"ok"``, ``"warning"`` or ``"problem"``.
        message: What was found, with the offending value.
        fix: What to do, in one line; None where nothing is to be done.
        ranks: Global ranks that it was found on; empty if it concerns the job.
    """

    check: str
    level: str
    message: str
    fix: str | None = None
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings.

    Attributes:
        findings: In the order of the checks.
        slices: Roles that `init` would give; empty if it would raise.
        members: The ranks that they are made of.
        assumed: The ranks are not running: one for each visible device is assumed.
    """

    findings: tuple[Finding, ...]
    slices: tuple[Roles, ...]
    members: tuple[Member, ...]
    assumed: bool

    @property
    def level(self) -> str:
        """The worst level."""
        return max((finding.level for finding in self.findings), key=LEVELS.index, default=OK)


def judge(found: Sequence[Facts], *, world_size: int, tp_size: int) -> Diagnosis:
    """Decide what is right and what is not.

    Args:
        found: Facts of the ranks that have reported, in rank order; at least one.
        world_size: Number of ranks of the job.
        tp_size: As for `init`.
    """
    findings: list[Finding] = []
    for name in dict.fromkeys([*SECTIONS, *(name for facts in found for name in facts.failures)]):
        findings += _merged(_of_section(facts, name) for facts in found)
    members = tuple(facts.member for facts in found)
    assumed = world_size == 1 and len(found) == 1
    if assumed:
        members = assumed_members(found[0], tp_size=tp_size)
    missing = sorted(set(range(world_size)) - {facts.member.rank for facts in found})
    findings += judge_ranks(members, missing=missing)
    findings += judge_namespaces(found)
    slices: tuple[Roles, ...] = ()
    if not missing and all(facts.devices is not None for facts in found):
        slices, placed = judge_placement(members, assumed=assumed)
        findings += placed
    return Diagnosis(tuple(findings), slices, members, assumed)


def _of_section(facts: Facts, name: str) -> list[Finding]:
    rank = (facts.member.rank,)
    if name in facts.failures:
        fix = "a check that fails is a finding by itself; run it again with a longer --timeout, or report it"
        return [Finding(name, PROBLEM, f"the check has no result: {facts.failures[name]}", fix, rank)]
    section = getattr(facts, name, None)
    if section is None:
        return []
    if name == "handles":
        made = judge_handles(section, facts.allocator)
    elif name == "network":
        made = judge_network(section)
    else:
        made = _JUDGES[name](section)
    if name == "devices":
        made = [*made, *judge_local_rank(facts.job, section)]
        if section.kind != "cpu" and facts.software is not None:
            made = [*made, *judge_memory_saver(facts.software)]
    return [replace(finding, ranks=rank) for finding in made]


def _merged(of_ranks: Iterable[Sequence[Finding]]) -> list[Finding]:
    """Join equal findings of several ranks."""
    ranks: dict[Finding, list[int]] = {}
    for findings in of_ranks:
        for finding in findings:
            ranks.setdefault(replace(finding, ranks=()), []).extend(finding.ranks)
    return [replace(finding, ranks=tuple(found)) for finding, found in ranks.items()]


# --- the ranks --------------------------------------------------------------------------------------------------------


def judge_job(job: Job) -> list[Finding]:
    """What the launcher has set."""
    findings = []
    if job.invalid:
        message = f"the environment of the job is invalid: {', '.join(job.invalid)}"
        findings.append(Finding("job", PROBLEM, message, "start with torchrun, which sets these variables"))
    if job.missing:
        findings.append(
            Finding(
                "job",
                PROBLEM,
                f"the job has RANK={job.rank} of WORLD_SIZE={job.world_size}, but not {', '.join(job.missing)}: without a "
                "process group every process takes itself for rank 0 and starts a server of its own",
                "start with torchrun and call torch.distributed.init_process_group() before init(), or unset WORLD_SIZE and RANK",
            )
        )
    if job.launcher_tasks is not None:
        findings.append(
            Finding(
                "job",
                WARNING,
                f"{job.launcher_tasks} tasks were started, but WORLD_SIZE is not set: each is a job of its own",
                "start torchrun in one task per host, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT",
            )
        )
    return findings


def judge_local_rank(job: Job, devices: Devices) -> list[Finding]:
    """Whether cuda:LOCAL_RANK exists."""
    number = len(devices.visible)
    if devices.kind == "cpu" or devices.own is None or devices.own < number:
        return []
    return [
        Finding(
            "devices",
            PROBLEM,
            f"LOCAL_RANK={job.local_rank}, but {number} devices are visible: this rank has no device of its own",
            "start as many ranks per host as devices are visible, or make more of them visible",
        )
    ]


def assumed_members(facts: Facts, *, tp_size: int) -> tuple[Member, ...]:
    """Return the ranks that torchrun would start: one per visible device, or one slice on a CPU."""
    devices = facts.devices
    if devices is None or devices.kind == "cpu":
        number, physical = tp_size, [facts.member.facts["physical"]] * tp_size
    else:
        number, physical = len(devices.visible), list(devices.visible)
    return tuple(
        replace(
            facts.member,
            rank=rank,
            world_size=number,
            tp_size=tp_size,
            facts={**facts.member.facts, "physical": physical[rank]},
        )
        for rank in range(number)
    )


def judge_ranks(members: Sequence[Member], *, missing: Sequence[int]) -> list[Finding]:
    """Whether all ranks have come, and whether those of one host see each other's processes."""
    findings = []
    if missing:
        findings.append(
            Finding(
                "ranks",
                PROBLEM,
                f"{named_ranks(missing)} did not report in time",
                "look for their output; MASTER_ADDR must be reachable from every host",
            )
        )
    hosts: dict[str, list[Member]] = {}
    for member in members:
        hosts.setdefault(member.host.boot_id, []).append(member)
    for here in hosts.values():
        apart = [member for member in here if not member.host.sees(here[0].host)]
        if apart:
            findings.append(
                Finding(
                    "ranks",
                    WARNING,
                    f"rank {apart[0].rank} is in another PID namespace than rank {here[0].rank} on host {here[0].host.name}: "
                    "a rank that has died is noticed only by a deadline",
                    "share the namespace of the containers (--pid host)",
                )
            )
    if not findings:
        names = ", ".join(f"{len(here)} on {here[0].host.name}" for here in hosts.values())
        findings.append(Finding("ranks", OK, names or "none"))
    return findings


def judge_namespaces(found: Sequence[Facts]) -> list[Finding]:
    """Whether the ranks of one host are in one IPC namespace; those that `init` needs are compared by `plan_roles`."""
    first: dict[str, Facts] = {}
    for facts in found:
        here = first.setdefault(facts.member.host.boot_id, facts)
        if (
            facts.kernel is not None
            and here.kernel is not None
            and facts.kernel.ipc_namespace != here.kernel.ipc_namespace
        ):
            message = (
                f"rank {facts.member.rank} is in another IPC namespace than rank {here.member.rank} on the same host"
            )
            fix = "share it (--ipc host): memory of one rank's GPU may not open in the other's server"
            return [Finding("ranks", WARNING, message, fix)]
    return []


def judge_placement(members: Sequence[Member], *, assumed: bool) -> tuple[tuple[Roles, ...], list[Finding]]:
    """The slices that `init` would make, or the error that it would raise."""
    if not members:
        return (), [Finding("slices", PROBLEM, "no device is visible", "see the devices above")]
    try:
        slices = tuple(plan_roles(members))
    except ConfigError as error:
        return (), [
            Finding("slices", PROBLEM, f"init() would raise {type(error).__name__}: {error.message}", error.hint)
        ]
    message = f"{_number(len(slices), 'slice')} of {_number(len(slices[0].ranks), 'rank')}"
    return slices, [Finding("slices", OK, message + (f", with {len(members)} ranks on this host" if assumed else ""))]


def _number(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# --- each rank --------------------------------------------------------------------------------------------------------


def judge_software(software: Software) -> list[Finding]:
    """Versions."""
    findings = list(_old_versions(software))
    built = "for the CPU" if software.cuda is None else f"for {software.cuda}"
    if software.sglang_folder is None:
        findings.append(
            Finding("software", PROBLEM, "SGLang is not installed", "pip install sglang, in this environment")
        )
    elif not software.sglang_readable:
        message = f"what is found as sglang in {software.sglang_folder} is not a release of SGLang"
        fix = "remove it from PYTHONPATH and the current folder, or install SGLang anew"
        findings.append(Finding("software", PROBLEM, message, fix))
    elif software.sglang is None:
        message = f"the SGLang in {software.sglang_folder} has no version"
        findings.append(
            Finding("software", WARNING, message, "install it with pip, also a checkout (pip install -e python)")
        )
    else:
        findings.extend(_judge_release(software))
    if not software.torch_fits:
        message = f"SGLang {software.sglang} requires {software.sglang_torch}, torch is {software.torch}"
        fix = "install the torch that it requires; with another one servers may fail to start"
        findings.append(Finding("software", WARNING, message, fix))
    findings.append(Finding("software", OK, f"Python {software.python}, torch {software.torch} {built}"))
    return findings


def _old_versions(software: Software) -> Iterator[Finding]:
    for name, version, oldest in (
        ("Python", software.python, _OLDEST_PYTHON),
        ("torch", software.torch, _OLDEST_TORCH),
    ):
        try:
            is_old = Version(Version(version).base_version) < oldest
        except InvalidVersion:
            continue  # a build of one's own
        if is_old:
            yield Finding("software", PROBLEM, f"{name} {version} is too old", f"use {name} {oldest} or newer")


def _judge_release(software: Software) -> Iterator[Finding]:
    try:
        features = release(str(software.sglang))
    except ConfigError as error:
        yield Finding("software", PROBLEM, error.message, error.hint)
        return
    used = "weight sessions" if features.weight_session else "updates without sessions"
    lora = "one LoRA payload per TP rank" if features.lora_payload_per_rank else "one LoRA payload for all TP ranks"
    stub = "; on the CPU with a stub for its CUDA kernels" if software.cpu_stub else ""
    yield Finding("software", OK, f"SGLang {software.sglang} ({software.sglang_folder}): {used}, {lora}{stub}")


def judge_memory_saver(software: Software) -> list[Finding]:
    """Whether a server on a GPU can sleep."""
    if software.memory_saver:
        return []
    message = "torch_memory_saver is not installed: enable_memory_saver=True ends the server, and sleep() needs it"
    return [Finding("devices", WARNING, message, "pip install torch_memory_saver")]


def judge_devices(devices: Devices) -> list[Finding]:
    """Which devices there are, and whether all that are named are visible."""
    findings = []
    settings = ", ".join(devices.settings)
    if devices.unused is not None:
        fix = "correct the variable: one entry per device, no entry twice, all integers or all UUIDs"
        findings.append(Finding("devices", PROBLEM, devices.unused, fix))
    if devices.error is not None:
        findings.append(Finding("devices", PROBLEM, str(devices.error["message"]), devices.error["hint"]))
    hidden = any(value.partition("=")[2] in ("''", "'-1'") for value in devices.settings)
    if devices.kind == "cpu" and devices.inventory and not hidden and devices.unused is None:
        message = f"this host has {len(devices.inventory)} GPUs, but torch finds none"
        fix = "install a CUDA build of torch that fits the driver (torch.cuda.is_available() must be true)"
        findings.append(Finding("devices", PROBLEM, message, fix))
    if len({name for _, name in devices.inventory}) > 1 and devices.order == FASTEST_FIRST:
        message = "GPUs of several kinds, and CUDA_DEVICE_ORDER is not set: CUDA and nvidia-smi number them differently"
        findings.append(Finding("devices", WARNING, message, f"set CUDA_DEVICE_ORDER={PCI_BUS_ID} on all ranks"))
    if devices.order not in (FASTEST_FIRST, PCI_BUS_ID):
        message = f"CUDA_DEVICE_ORDER={devices.order!r} is no order that CUDA has"
        findings.append(Finding("devices", WARNING, message, f"set CUDA_DEVICE_ORDER={PCI_BUS_ID}"))
    blocked = [f"{a} from {b}" for a, b, can in devices.peers if not can]
    if blocked:
        message = f"no peer access between visible devices: {some(blocked, between=', ')}"
        fix = "weights go through staging memory there, and custom all-reduce must stay off; expected without NVLink"
        findings.append(Finding("devices", WARNING, message, fix))
    listed = [_described(index, device, devices) for index, device in enumerate(devices.visible)]
    peers = ", peer access between all" if devices.peers and not blocked else ""
    nccl = f", NCCL {devices.nccl}" if devices.nccl is not None else ""
    shown = some(listed) if listed else "none visible: the CPU is used"
    findings.append(Finding("devices", OK, f"{shown}{peers}{nccl}" + (f" ({settings})" if settings else "")))
    return findings


def _described(index: int, device: dict[str, Any], devices: Devices) -> str:
    physical = "?" if device["index"] is None else device["index"]
    free = f", {devices.free_bytes[index] / 2**30:.0f} GiB free" if index < len(devices.free_bytes) else ""
    name = next((name for uuid, name in devices.inventory if uuid == device["uuid"]), "")
    return f"cuda:{index} is GPU {physical} {name} {device['uuid'] or ''}".rstrip() + free


def judge_handles(handles: Handles, allocator: Allocator | None) -> list[Finding]:
    """Whether memory of one process opens in another."""
    findings = []
    expandable = allocator is not None and len(allocator.warnings) > 0
    for _, error in handles.trips:
        if error is not None:
            fix = (
                "unset expandable_segments in the allocator's variables of the trainer"
                if expandable
                else "share /dev/shm, IPC and PID namespaces (--ipc host --pid host); until then weights go through files"
            )
            findings.append(Finding("handles", PROBLEM, error, fix))
    good = [device for device, error in handles.trips if error is None]
    if good:
        kind = "shared memory" if good == ["cpu"] else f"CUDA IPC on {some(good, between=', ')}"
        findings.append(Finding("handles", OK, f"{kind}: exported, opened in another process, released"))
    return findings


def judge_shared_memory(shm: SharedMemory) -> list[Finding]:
    """Whether /dev/shm has space."""
    size = f"/dev/shm has {shm.free_bytes / 2**20:.0f} of {shm.total_bytes / 2**20:.0f} MiB free"
    fix = "give the container more (--shm-size 16g, or --ipc host), or remove what fills it"
    if shm.error is not None:
        return [Finding("shared_memory", PROBLEM, f"/dev/shm cannot be used: {shm.error}; {size}", fix)]
    if shm.free_bytes < _TOO_LITTLE_SHM:
        message = f"{size}: SGLang's queues and NCCL need {_TOO_LITTLE_SHM >> 20} MiB at least"
        return [Finding("shared_memory", PROBLEM, message, fix)]
    if shm.free_bytes < _LITTLE_SHM:
        message = f"{size}; on the CPU, and with transport='file', weights travel through it"
        return [Finding("shared_memory", WARNING, message, fix)]
    return [Finding("shared_memory", OK, size)]


def judge_kernel(kernel: Kernel) -> list[Finding]:
    """Whether the system calls of a launch are permitted."""
    if kernel.pidfd_open is not None:
        message = f"pidfd_open fails ({kernel.pidfd_open}): the end of trainer and server cannot be waited for"
        fix = "use Linux 5.3 or newer, a container profile that permits it, and not gVisor"
        return [Finding("kernel", PROBLEM, message, fix)]
    notes = [f"Linux {kernel.release}", "pidfd_open works"]
    notes.append(
        "pidfd_getfd works" if kernel.pidfd_getfd is None else f"pidfd_getfd does not ({kernel.pidfd_getfd}), "
        "which matters only with expandable_segments"
    )  # fmt: skip
    if kernel.seccomp:
        notes.append("system calls are filtered (seccomp)")
    if kernel.ptrace_scope:
        notes.append(f"ptrace_scope {kernel.ptrace_scope}")
    return [Finding("kernel", OK, ", ".join(notes))]


def judge_allocator(allocator: Allocator) -> list[Finding]:
    """Expandable segments."""
    fix = "unset it; it is removed for the server, and the trainer's memory then opens only where pidfd_getfd is permitted"
    return [Finding("allocator", WARNING, warning, fix) for warning in allocator.warnings]


def judge_network(network: Network) -> list[Finding]:
    """Interfaces, names, proxies, ports."""
    findings = []
    for variable, value in network.chosen.items():
        wrong = [
            name for name in _interfaces(variable, value) if not _has_interface(name, variable, network.interfaces)
        ]
        if wrong:
            message = f"{variable}={value!r}: this host has no interface {', '.join(wrong)}"
            fix = f"unset it, or set it to one of {', '.join(network.interfaces)}"
            findings.append(Finding("network", PROBLEM, message, fix))
    if network.unresolved is not None and "GLOO_SOCKET_IFNAME" not in network.chosen:
        message = (
            f"the host name {network.host_name!r} does not resolve ({network.unresolved}): gloo falls back to loopback"
        )
        fix = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME; several hosts cannot meet without"
        findings.append(Finding("network", WARNING, message, fix))
    elif network.addresses and not network.local_addresses and "GLOO_SOCKET_IFNAME" not in network.chosen:
        addresses = ", ".join(network.addresses)
        message = f"the host name {network.host_name!r} resolves to {addresses}, which is no address of this host"
        findings.append(Finding("network", WARNING, message, "correct /etc/hosts, or set GLOO_SOCKET_IFNAME"))
    if network.loopback is not None:
        message = f"a port of 127.0.0.1 cannot be held and connected to: {network.loopback}"
        findings.append(Finding("network", PROBLEM, message, "bring the interface lo up, and free some local ports"))
    if network.proxies:
        message = (
            f"{' and '.join(network.proxies)} set, and NO_PROXY={network.no_proxy!r} does not cover 127.0.0.1: requests of "
            "your own to engine.url would go to the proxy"
        )
        findings.append(Finding("network", WARNING, message, "export NO_PROXY=localhost,127.0.0.1,::1"))
    if not findings:
        addresses = ", ".join(network.addresses)
        findings.append(Finding("network", OK, f"{network.host_name} is {addresses}; ports of 127.0.0.1 can be held"))
    return findings


def _interfaces(variable: str, value: str) -> list[str]:
    """Return the interfaces that a variable asks for; NCCL's may exclude some instead."""
    names = [name.strip() for name in value.lstrip("=").split(",") if name.strip()]
    return [] if variable == "NCCL_SOCKET_IFNAME" and value.startswith("^") else names


def _has_interface(name: str, variable: str, interfaces: Sequence[str]) -> bool:
    """Whether there is such an interface; NCCL takes prefixes."""
    if variable == "NCCL_SOCKET_IFNAME":
        return any(interface.startswith(name.partition(":")[0]) for interface in interfaces)
    return name in interfaces


def judge_gloo(gloo: GlooGroup) -> list[Finding]:
    """Whether the ranks can exchange by gloo."""
    if gloo.error is None:
        return [Finding("gloo", OK, "a group of all ranks works")]
    fix = "set GLOO_SOCKET_IFNAME to an interface that all hosts reach each other by"
    return [Finding("gloo", PROBLEM, f"the ranks cannot exchange by gloo: {gloo.error}", fix)]


def judge_limits(limits: Limits) -> list[Finding]:
    """Open files."""
    soft, hard = limits.open_files, limits.open_files_hard
    message = f"{soft if soft >= 0 else 'no limit on'} open files"
    if 0 <= soft < _FEW_FILES:
        fix = f"ulimit -n {65536 if hard < 0 else min(65536, hard)}"
        if 0 <= hard < _FEW_FILES:
            fix = f"raise the hard limit of {hard} (limits.conf, or --ulimit nofile=65536:65536), then ulimit -n 65536"
        level = PROBLEM if soft < _TOO_FEW_FILES else WARNING
        return [Finding("limits", level, f"only {message}: every request and every handle takes one", fix)]
    return [Finding("limits", OK, message)]


def judge_leftovers(leftovers: Leftovers) -> list[Finding]:
    """What ended jobs have left."""
    findings = []
    if leftovers.kept:
        message = some([f"{name}: {reason}" for name, reason in leftovers.kept])
        findings.append(Finding("leftovers", WARNING, f"could not be removed: {message}", "remove them by hand"))
    if leftovers.removed:
        findings.append(Finding("leftovers", OK, f"removed {len(leftovers.removed)}: {some(leftovers.removed)}"))
    elif leftovers.items and not leftovers.kept:
        items = [
            f"{each['path'] or each['pid']} ({each['what']}, {each['num_bytes'] / 2**20:.0f} MiB)"
            for each in leftovers.items
        ]
        is_running = any(each["pid"] is not None for each in leftovers.items)
        message = f"{len(items)} of jobs that have ended: {some(items)}"
        fix = "python -m tpcolocate doctor --clean removes them"
        findings.append(Finding("leftovers", PROBLEM if is_running else WARNING, message, fix))
    if leftovers.log_bytes > _MANY_LOG_BYTES:
        message = (
            f"{leftovers.num_logs} logs of servers take {leftovers.log_bytes / 2**20:.0f} MiB in {leftovers.log_folder}"
        )
        findings.append(Finding("leftovers", WARNING, message, "remove those that you do not need"))
    number, num_bytes = leftovers.torch_files
    if num_bytes > _MANY_TORCH_BYTES:
        message = f"{number} files of torch processes that have exited take {num_bytes / 2**20:.0f} MiB in /dev/shm"
        fix = "remove /dev/shm/torch_PID_* of those that no other process uses; they may be of any program"
        findings.append(Finding("leftovers", WARNING, message, fix))
    if not findings:
        logs = f"; {leftovers.num_logs} logs of servers in {leftovers.log_folder}" if leftovers.num_logs else ""
        findings.append(Finding("leftovers", OK, f"none{logs}"))
    return findings


_JUDGES: dict[str, Callable[[Any], list[Finding]]] = {
    "job": judge_job,
    "software": judge_software,
    "devices": judge_devices,
    "shared_memory": judge_shared_memory,
    "kernel": judge_kernel,
    "allocator": judge_allocator,
    "gloo": judge_gloo,
    "limits": judge_limits,
    "leftovers": judge_leftovers,
}


__all__ = [
    "LEVELS",
    "OK",
    "PROBLEM",
    "WARNING",
    "Diagnosis",
    "Finding",
    "assumed_members",
    "judge",
    "judge_placement",
    "judge_ranks",
]
