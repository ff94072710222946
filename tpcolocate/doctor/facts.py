"""What the checks of the doctor read, as records that ranks exchange and that decisions are made from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tpcolocate.groups import Member


@dataclass(frozen=True, slots=True)
class Job:
    """What a launcher such as torchrun has put into this process's environment.

    Attributes:
        rank: RANK; 0 outside of a job.
        world_size: WORLD_SIZE; 1 outside of a job.
        local_rank: LOCAL_RANK; None if it is not set.
        missing: Variables of a distributed job that are not set although others are.
        invalid: ``"NAME='value'"`` of variables that are not numbers in range.
        launcher_tasks: Number of tasks by Slurm or MPI, where torch's variables are not set; None otherwise.
    """

    rank: int
    world_size: int
    local_rank: int | None
    missing: tuple[str, ...] = ()
    invalid: tuple[str, ...] = ()
    launcher_tasks: int | None = None

    @property
    def is_distributed(self) -> bool:
        """Whether the other ranks can be reached by these variables."""
        return self.world_size > 1 and not self.missing and not self.invalid


@dataclass(frozen=True, slots=True)
class Software:
    """Versions, read without importing SGLang.

    Attributes:
        python: Version.
        torch: Version.
        cuda: Version of CUDA or HIP that torch was built for; None for a CPU build.
        sglang: Version of the SGLang that a server would be started from; None if unknown.
        sglang_folder: Its package; None if there is none.
        sglang_readable: Its arguments could be read from its source.
        sglang_torch: Its requirement on torch, such as ``"torch==2.13.0"``; None if unknown.
        torch_fits: Whether the installed torch satisfies it.
        memory_saver: ``torch_memory_saver`` is installed.
        cpu_stub: SGLang's kernels for CPUs are not installed, so a CPU server gets this library's stub for them.
    """

    python: str
    torch: str
    cuda: str | None
    sglang: str | None
    sglang_folder: str | None
    sglang_readable: bool
    sglang_torch: str | None
    torch_fits: bool
    memory_saver: bool
    cpu_stub: bool


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices of this process, asked of torch and NVML by another one.

    Attributes:
        kind: ``"cuda"``, ``"hip"`` or ``"cpu"``.
        settings: ``"NAME='value'"`` of the variables that select devices.
        order: CUDA_DEVICE_ORDER, or its default.
        visible: Per visible device, `PhysicalDevice` as a dict.
        unused: Why entries of the variables select nothing; None if all do.
        inventory: (UUID, product name) of the GPUs of this host, by NVML.
        own: Index of the device that this rank would train on; None on the CPU.
        peers: (index, index, can access) for pairs of visible devices.
        free_bytes: Free memory per visible device.
        nccl: Version of NCCL in torch; None without it.
        error: Class, message and hint of the library's error about a device; None without one.
    """

    kind: str
    settings: tuple[str, ...]
    order: str
    visible: tuple[dict[str, Any], ...] = ()
    unused: str | None = None
    inventory: tuple[tuple[str, str], ...] = ()
    own: int | None = None
    peers: tuple[tuple[int, int, bool], ...] = ()
    free_bytes: tuple[int, ...] = ()
    nccl: str | None = None
    error: dict[str, str | None] | None = None


@dataclass(frozen=True, slots=True)
class Handles:
    """Memory exported by one process and opened by another, as in a weight sync.

    Attributes:
        trips: (device, error or None) per device that was tried.
        seconds: Of the slowest one, without the start of the processes.
    """

    trips: tuple[tuple[str, str | None], ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """/dev/shm.

    Attributes:
        total_bytes: Size.
        free_bytes: Free for this user.
        error: Why no file could be written and mapped there; None if it could.
        mount_namespace: Of this process.
    """

    total_bytes: int
    free_bytes: int
    error: str | None
    mount_namespace: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """What the kernel and a container's profile permit.

    Attributes:
        release: Of the kernel.
        pidfd_open: Why it fails; None if it works.
        pidfd_getfd: Why it fails; None if it works.
        seccomp: Mode of the filter: 0 is none.
        ptrace_scope: Of the Yama module; None without it.
        ipc_namespace: Of this process.
    """

    release: str
    pidfd_open: str | None
    pidfd_getfd: str | None
    seccomp: int
    ptrace_scope: int | None
    ipc_namespace: str


@dataclass(frozen=True, slots=True)
class Allocator:
    """Allocator variables with expandable segments.

    Attributes:
        warnings: As `child_environment` gives them.
    """

    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Network:
    """Names and interfaces.

    Attributes:
        host_name: Of this machine.
        addresses: What it resolves to.
        unresolved: Why it does not resolve; None if it does.
        interfaces: Of this network namespace.
        local_addresses: Those of `addresses` that a socket can be bound to here.
        chosen: Variables such as GLOO_SOCKET_IFNAME that are set -> value.
        loopback: Why a port of 127.0.0.1 could not be held, listened on and connected to; None if it could.
        proxies: Variables with a proxy that requests to 127.0.0.1 would use.  Names only: values may hold passwords.
        no_proxy: NO_PROXY.
    """

    host_name: str
    addresses: tuple[str, ...]
    unresolved: str | None
    interfaces: tuple[str, ...]
    local_addresses: tuple[str, ...]
    chosen: dict[str, str]
    loopback: str | None
    proxies: tuple[str, ...]
    no_proxy: str


@dataclass(frozen=True, slots=True)
class GlooGroup:
    """A gloo group over all ranks, with one exchange.

    Attributes:
        error: Why there is none; None if it worked.
        seconds: To make it and exchange.
    """

    error: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits; -1 for none.

    Attributes:
        open_files: Soft limit.
        open_files_hard: Hard limit.
    """

    open_files: int
    open_files_hard: int


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What jobs that have ended left on this host.

    Attributes:
        items: `Leftover` as dicts.
        num_logs: Logs of servers of this user.
        log_bytes: Their size.
        log_folder: Where they are.
        torch_files: Number and bytes of files of torch's shared memory whose process has exited.
        removed: What ``--clean`` has removed.
        kept: (what, reason) that it could not remove.
    """

    items: tuple[dict[str, Any], ...] = ()
    num_logs: int = 0
    log_bytes: int = 0
    log_folder: str = ""
    torch_files: tuple[int, int] = (0, 0)
    removed: tuple[str, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """All that one rank has found; a section is None if its check did not run or failed.

    Attributes:
        member: This rank as `init` would describe it to the others.
        failures: Check -> why it has no result.
        seconds: Check -> seconds that it took.
    """

    member: Member
    job: Job
    software: Software | None = None
    devices: Devices | None = None
    handles: Handles | None = None
    shared_memory: SharedMemory | None = None
    kernel: Kernel | None = None
    allocator: Allocator | None = None
    network: Network | None = None
    gloo: GlooGroup | None = None
    limits: Limits | None = None
    leftovers: Leftovers | None = None
    failures: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Facts:
        values = json.loads(text)
        made: dict[str, Any] = {"member": Member.from_json(json.dumps(values["member"]))}
        for name, section in SECTIONS.items():
            if values[name] is not None:
                made[name] = section(**{key: frozen(value) for key, value in values[name].items()})
        return cls(**made, failures=values["failures"], seconds=values["seconds"])


SECTIONS: dict[str, Any] = {
    "job": Job,
    "software": Software,
    "devices": Devices,
    "handles": Handles,
    "shared_memory": SharedMemory,
    "kernel": Kernel,
    "allocator": Allocator,
    "network": Network,
    "gloo": GlooGroup,
    "limits": Limits,
    "leftovers": Leftovers,
}
assert set(SECTIONS) == {each.name for each in fields(Facts)} - {"member", "failures", "seconds"}


def frozen(value: Any) -> Any:
    """Return JSON's lists as tuples."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


__all__ = [
    "SECTIONS",
    "Allocator",
    "Devices",
    "Facts",
    "GlooGroup",
    "Handles",
    "Job",
    "Kernel",
    "Leftovers",
    "Limits",
    "Network",
    "SharedMemory",
    "Software",
    "frozen",
]
