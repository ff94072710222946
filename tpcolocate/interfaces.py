"""Which address of this host gloo uses, and whether ranks on other hosts can reach it.

As torch's ``ProcessGroupGloo`` chooses it: the interfaces in GLOO_SOCKET_IFNAME, else the first address of the host's
name to which a socket can be bound, else the loopback.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch.distributed as dist

from tpcolocate.errors import ConfigError, some

VARIABLE = "GLOO_SOCKET_IFNAME"
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class GlooAddress:
    """Where gloo listens on a rank.

    Attributes:
        address: IP address; empty if the interface was found but its address is not known.
        origin: What it comes from, for messages.
    """

    address: str
    origin: str


def find_gloo_address(environ: Mapping[str, str], *, host_name: str) -> GlooAddress:
    """Return the address that gloo uses in a process with this environment.

    Args:
        environ: Environment of the process.
        host_name: As ``gethostname`` returns it.

    Raises:
        ConfigError: GLOO_SOCKET_IFNAME names an interface that this host lacks, or one without an address.
    """
    names = environ.get(VARIABLE, "")
    if len(names) > 1:  # torch ignores a single character
        addresses = [_address_of_interface(name, names) for name in names.split(",")]
        return GlooAddress(addresses[0], f"{VARIABLE}={names!r}, which is {addresses[0] or 'an interface'}")
    found = resolve_name(host_name)
    listed = f"resolves to {some(found, between=', ')}" if found else "does not resolve"
    usable = [address for address in found if can_bind(address)]
    origin = f"{VARIABLE} is not set, and host name {host_name!r} {listed}"
    if usable:
        return GlooAddress(usable[0], origin)
    return GlooAddress(
        _LOOPBACK, f"{origin}, so that gloo uses the loopback" if not found else f"{origin}: not of this host"
    )


def check_reachable(addresses: Mapping[int, tuple[str, GlooAddress]]) -> None:
    """Check that ranks on several hosts can have reached each other's addresses.  Pure.

    Args:
        addresses: Rank -> its network (host and network namespace), and its address there.

    Raises:
        ConfigError: An address is a loopback, is used on two hosts, or is of another IP version than others.
    """
    if len({network for network, _ in addresses.values()}) == 1:
        return
    hint = f"set {VARIABLE} on every host to the interface through which the hosts reach each other"
    users: dict[str, tuple[int, str]] = {}
    versions: dict[int, int] = {}
    for rank, (network, found) in sorted(addresses.items()):
        if found.address == "":
            continue
        address = ipaddress.ip_address(found.address.partition("%")[0])
        if address.is_loopback:
            raise ConfigError(
                f"other hosts cannot reach rank {rank}, whose address is {found.address}: {found.origin}",
                hint=hint,
                rank=rank,
            )
        other, other_network = users.setdefault(found.address, (rank, network))
        if other_network != network:
            raise ConfigError(
                f"ranks {other} and {rank} are on different hosts and have one address, {found.address}: {found.origin}",
                hint=hint,
                rank=rank,
            )
        other = versions.setdefault(address.version, rank)
        if len(versions) > 1:
            four, six = versions[4], versions[6]
            raise ConfigError(
                f"rank {four} has an IPv4 address and rank {six} an IPv6 address: on rank {rank}, {found.origin}",
                hint=hint,
                rank=rank,
            )


def is_address(text: object) -> bool:
    """Return whether it can be `GlooAddress.address`."""
    try:
        return text == "" or (isinstance(text, str) and bool(ipaddress.ip_address(text.partition("%")[0])))
    except ValueError:
        return False


def resolve_name(host_name: str) -> list[str]:
    """Return the addresses of a host name, without repetitions; none if it does not resolve."""
    try:
        infos = socket.getaddrinfo(host_name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


def loopback_device() -> dist.ProcessGroupGloo.Device:
    """Return gloo's device for the loopback, by IPv4 or IPv6.

    Raises:
        ConfigError: The loopback has no address.
    """
    try:
        return dist.ProcessGroupGloo.create_device(interface="lo")
    except RuntimeError as error:
        raise ConfigError(
            f"the loopback interface cannot be used: {_first_line(error)}",
            hint="the ranks of a slice talk over it, as does SGLang: bring it up (ip link set lo up)",
        ) from error


def _address_of_interface(name: str, names: str) -> str:
    try:
        dist.ProcessGroupGloo.create_device(interface=name)
    except RuntimeError as error:
        known = [interface for _, interface in socket.if_nameindex()]
        what = "has no usable address" if name in known else "is not an interface of this host"
        raise ConfigError(
            f"{VARIABLE}={names!r}: {name!r} {what} ({_first_line(error)})",
            hint=f"unset {VARIABLE}, or set it to one of the interfaces of this host: {', '.join(known)}",
        ) from error
    listed = psutil.net_if_addrs().get(name, [])
    found = [one.address for family in (socket.AF_INET, socket.AF_INET6) for one in listed if one.family == family]
    return found[0].partition("%")[0] if found else ""


def can_bind(address: str) -> bool:
    """Return whether an address is one of this host."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rpartition("] ")[2]  # without gloo's file and line


__all__ = [
    "GlooAddress",
    "can_bind",
    "check_reachable",
    "find_gloo_address",
    "is_address",
    "loopback_device",
    "resolve_name",
]
