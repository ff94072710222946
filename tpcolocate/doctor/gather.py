"""The checks of the doctor: each reads one section of `Facts` about this process and its host."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import resource
import socket
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion

from tpcolocate.doctor.facts import (
    Allocator,
    Job,
    Kernel,
    Leftovers,
    Limits,
    Network,
    SharedMemory,
    Software,
)
from tpcolocate.doctor.leftovers import SHM, Leftover, find_leftovers, remove, status_of, torch_files
from tpcolocate.errors import ConfigError
from tpcolocate.interfaces import can_bind
from tpcolocate.server.environment import LOOPBACK, child_environment, sglang_stub_needed
from tpcolocate.server.installed import Installed, find_installed
from tpcolocate.server.process import hold_port

_JOB_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TASK_VARIABLES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_CONNECT_S = 5.0
# The same on x86-64 and Arm.
_SYS_PIDFD_GETFD = 438


def read_job(environ: Mapping[str, str]) -> Job:
    """Read what a launcher has set.  Pure."""
    numbers: dict[str, int] = {}
    invalid = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if name in environ:
            if re.fullmatch(r"\d+", environ[name].strip()):
                numbers[name] = int(environ[name])
            else:
                invalid.append(f"{name}={environ[name]!r}")
    world_size = numbers.get("WORLD_SIZE", 1)
    rank = numbers.get("RANK", 0)
    if world_size < 1 or (rank >= world_size and "WORLD_SIZE" in numbers):
        invalid.append(f"RANK={environ.get('RANK')!r} with WORLD_SIZE={environ.get('WORLD_SIZE')!r}")
    missing = [name for name in _JOB_VARIABLES if name not in environ]
    tasks = [int(environ[name]) for name in _TASK_VARIABLES if environ.get(name, "").isdecimal()]
    return Job(
        rank=rank,
        world_size=max(world_size, 1),
        local_rank=numbers.get("LOCAL_RANK"),
        missing=tuple(missing) if world_size > 1 or "RANK" in environ else (),
        invalid=tuple(invalid),
        launcher_tasks=tasks[0] if tasks and tasks[0] > 1 and "WORLD_SIZE" not in environ else None,
    )


def check_software() -> Software:
    """Find the versions of what is installed."""
    installed = find_installed(os.environ)
    requirement = None if installed is None else _required_torch(installed)
    return Software(
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda or torch.version.hip,
        sglang=None if installed is None else installed.version,
        sglang_folder=None if installed is None else str(installed.folder),
        sglang_readable=installed is not None and installed.arguments() is not None,
        sglang_torch=None if requirement is None else str(requirement),
        torch_fits=requirement is None or _satisfies(torch.__version__, requirement),
        memory_saver=find_spec("torch_memory_saver") is not None,
        cpu_stub=sglang_stub_needed() is not None,
    )


def _required_torch(installed: Installed) -> Requirement | None:
    for distribution in metadata.distributions(name="sglang", path=[str(installed.folder.parent)]):
        for text in distribution.requires or ():
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            if requirement.name == "torch" and (requirement.marker is None or requirement.marker.evaluate()):
                return requirement
    return None


def _satisfies(version: str, requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return True  # a build of one's own


def check_shared_memory() -> SharedMemory:
    """Look at /dev/shm, and write and map a file there."""
    status = os.statvfs(SHM)
    error = None
    try:
        with tempfile.NamedTemporaryFile(prefix="tpcolocate-doctor-", dir=SHM) as file:
            os.posix_fallocate(file.fileno(), 0, mmap.PAGESIZE)
            with mmap.mmap(file.fileno(), mmap.PAGESIZE) as mapped:
                mapped[:4] = b"test"
    except OSError as caught:
        error = str(caught)
    return SharedMemory(
        total_bytes=status.f_blocks * status.f_frsize,
        free_bytes=status.f_bavail * status.f_frsize,
        error=error,
        mount_namespace=os.readlink("/proc/self/ns/mnt"),
    )


def check_kernel() -> Kernel:
    """Try the system calls that launches and handles need."""
    opened = _error_of_pidfd_open()
    status = Path("/proc/self/status").read_text(errors="replace")
    seccomp = re.search(r"^Seccomp:\s*(\d+)", status, re.MULTILINE)
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return Kernel(
        release=platform.release(),
        pidfd_open=opened,
        pidfd_getfd=opened if opened is not None else _error_of_pidfd_getfd(),
        seccomp=0 if seccomp is None else int(seccomp[1]),
        ptrace_scope=int(scope.read_text()) if scope.exists() else None,
        ipc_namespace=os.readlink("/proc/self/ns/ipc"),
    )


def _error_of_pidfd_open() -> str | None:
    if not hasattr(os, "pidfd_open"):
        return "Python was built without it"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return str(error)
    return None


def _error_of_pidfd_getfd() -> str | None:
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(os.getpid())
    try:
        copy = libc.syscall(_SYS_PIDFD_GETFD, process, process, 0)
        if copy < 0:
            return os.strerror(ctypes.get_errno())
        os.close(copy)
        return None
    finally:
        os.close(process)


def check_allocator(environ: Mapping[str, str]) -> Allocator:
    """Find expandable segments in the allocator's variables.  Pure."""
    return Allocator(warnings=tuple(child_environment(environ, visibility={})[1]))


def check_network(environ: Mapping[str, str]) -> Network:
    """Look up this host's name and interfaces, and connect over loopback."""
    host_name = socket.gethostname()
    addresses: tuple[str, ...] = ()
    unresolved = None
    try:
        found = socket.getaddrinfo(host_name, None, type=socket.SOCK_STREAM)
        addresses = tuple(dict.fromkeys(str(entry[4][0]) for entry in found))
    except OSError as error:
        unresolved = str(error)
    proxies = {name.upper(): value for name, value in environ.items() if name.lower().endswith("_proxy") and value}
    no_proxy = environ.get("no_proxy", environ.get("NO_PROXY", ""))
    bypassed = urllib.request.proxy_bypass_environment(LOOPBACK, {"no": no_proxy})  # type: ignore[attr-defined]
    return Network(
        host_name=host_name,
        addresses=addresses,
        unresolved=unresolved,
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        local_addresses=tuple(filter(can_bind, addresses)),
        chosen={name: environ[name] for name in _INTERFACE_VARIABLES if environ.get(name)},
        loopback=_error_of_loopback(),
        proxies=() if bypassed else tuple(sorted(proxies.keys() & {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"})),
        no_proxy=no_proxy,
    )


def _error_of_loopback() -> str | None:
    """Hold two ports as a launch does, and listen on one of them while it is held."""
    try:
        with hold_port() as held, hold_port(), socket.socket() as server, socket.socket() as client:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(held.getsockname())
            server.listen(1)
            client.settimeout(_CONNECT_S)
            client.connect(held.getsockname())
    except (OSError, ConfigError) as error:
        return str(error)
    return None


def check_limits() -> Limits:
    """Read the limit on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Limits(open_files=soft, open_files_hard=hard)


def check_leftovers(*, clean: bool) -> Leftovers:
    """List what ended jobs have left on this host.

    Args:
        clean: Remove it; it is written to standard error first.
    """
    temporary = Path(tempfile.gettempdir())
    items = find_leftovers()
    removed: list[Leftover] = []
    kept: list[tuple[Leftover, str]] = []
    if clean:
        for each in items:
            print(f"removing {each.name}: {each.what}", file=sys.stderr, flush=True)
        removed, kept = remove(items)
    # A launch that went wrong leaves its log.
    found = [status_of(path) for path in temporary.glob(f"tpcolocate-{os.getuid()}-*/server.log")]
    logs = [status.st_size for status in found if status is not None]
    return Leftovers(
        items=tuple(asdict(each) for each in items),
        num_logs=len(logs),
        log_bytes=sum(logs),
        log_folder=str(temporary),
        torch_files=torch_files(),
        removed=tuple(f"{each.name}: {each.what}" for each in removed),
        kept=tuple((each.name, reason) for each, reason in kept),
    )


__all__ = [
    "check_allocator",
    "check_kernel",
    "check_leftovers",
    "check_limits",
    "check_network",
    "check_shared_memory",
    "check_software",
    "read_job",
]
