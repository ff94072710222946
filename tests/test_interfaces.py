"""Addresses that gloo uses: what cannot work is an error that names the variable and what the host's name resolves to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from harness import run_ranks

import tpcolocate
from tpcolocate import errors, interfaces
from tpcolocate.interfaces import GlooAddress, check_reachable, find_gloo_address

pytestmark = pytest.mark.quick

NAMED = "GLOO_SOCKET_IFNAME is not set, and host name 'node' "


@pytest.fixture
def names(monkeypatch):
    """Let host names resolve to what a test wants."""
    found = {}
    monkeypatch.setattr(interfaces, "resolve_name", lambda name: found.get(name, []))
    return found


@pytest.mark.parametrize("resolved, expected", [
    (["127.0.0.1"], GlooAddress("127.0.0.1", f"{NAMED}resolves to 127.0.0.1")),
    (["203.0.113.7", "127.0.0.2"], GlooAddress("127.0.0.2", f"{NAMED}resolves to 203.0.113.7, 127.0.0.2")),
    (["203.0.113.7"], GlooAddress("127.0.0.1", f"{NAMED}resolves to 203.0.113.7: not of this host")),
    ([], GlooAddress("127.0.0.1", f"{NAMED}does not resolve, so that gloo uses the loopback")),
])  # fmt: skip
def test_the_address_of_the_host_name_is_found_as_torch_finds_it(names, resolved, expected):
    names["node"] = resolved
    assert find_gloo_address({}, host_name="node") == expected


def test_the_address_of_an_interface_is_found():
    assert find_gloo_address({"GLOO_SOCKET_IFNAME": "lo"}, host_name="node").address in ("127.0.0.1", "::1")


@pytest.mark.parametrize("value", ["nosuch0", "lo,nosuch0", "nosuch0,lo"])
def test_an_interface_that_does_not_exist_is_named_with_those_that_do(value):
    with pytest.raises(errors.ConfigError) as caught:
        find_gloo_address({"GLOO_SOCKET_IFNAME": value}, host_name="node")
    assert f"GLOO_SOCKET_IFNAME={value!r}: 'nosuch0' is not an interface of this host" in str(caught.value)
    assert "lo" in caught.value.hint


def on(*addresses):
    """Ranks on one host each."""
    return {rank: (f"host{rank}", GlooAddress(address, f"why{rank}")) for rank, address in enumerate(addresses)}


@pytest.mark.parametrize("addresses, words", [
    (on("10.0.0.1", "127.0.1.1"), "other hosts cannot reach rank 1, whose address is 127.0.1.1: why1"),
    (on("fd00::1", "::1"), "other hosts cannot reach rank 1, whose address is ::1: why1"),
    (on("172.17.0.1", "172.17.0.1"), "ranks 0 and 1 are on different hosts and have one address, 172.17.0.1: why1"),
    (on("10.0.0.1", "fd00::1"), "rank 0 has an IPv4 address and rank 1 an IPv6 address: on rank 1, why1"),
    (on("fd00::1", "10.0.0.1"), "rank 1 has an IPv4 address and rank 0 an IPv6 address: on rank 1, why1"),
])  # fmt: skip
def test_addresses_that_other_hosts_cannot_reach_are_refused(addresses, words):
    with pytest.raises(errors.ConfigError) as caught:
        check_reachable(addresses)
    assert caught.value.message == words and "GLOO_SOCKET_IFNAME" in caught.value.hint


def test_addresses_that_can_work_are_accepted():
    check_reachable(on("10.0.0.1", "10.0.0.2", ""))
    check_reachable(on("fd00::1", "fe80::2%eth0"))
    check_reachable({rank: ("one host", GlooAddress("127.0.0.1", "")) for rank in range(3)})


def with_variable(rank, value):
    """Set the variable on rank 1 alone, after the default group was made."""
    if rank == 1:
        os.environ["GLOO_SOCKET_IFNAME"] = value
    tpcolocate.init(2, device="cpu", timeout_s=40.0).close()


def test_a_wrong_interface_on_one_rank_is_the_same_error_on_all_at_once():
    outcomes = run_ranks(with_variable, 2, "nosuch0", expect_errors=True)
    assert {type(outcome.error) for outcome in outcomes} == {errors.ConfigError}
    assert len({str(outcome.error) for outcome in outcomes}) == 1
    assert "GLOO_SOCKET_IFNAME='nosuch0'" in str(outcomes[0].error)
    assert max(outcome.seconds for outcome in outcomes) < 20


def addresses_of_groups(rank):
    """Return the addresses between which init() has made connections."""
    import torch
    import torch.distributed as dist

    def connections():
        return {(c.laddr.ip, c.raddr.ip, c.laddr.port) for c in psutil.Process().net_connections("tcp") if c.raddr}

    before = connections()
    with tpcolocate.init(2, device="cpu", timeout_s=40.0) as colo:
        total = torch.ones(1)
        dist.all_reduce(total, group=colo.group)
        return sorted({ip for local, remote, _ in connections() - before for ip in (local, remote)}), total.item()


def outer_interface():
    """Return an interface other than the loopback that has an IPv4 address; the loopback if there is none."""
    found = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if name != "lo" and any(a.family.name == "AF_INET" for a in addresses)
    ]
    return (found or ["lo"])[0]


def test_the_groups_of_one_host_are_on_the_loopback():
    outer = {"GLOO_SOCKET_IFNAME": outer_interface()}
    assert run_ranks(addresses_of_groups, 4, env=outer) == [(["127.0.0.1"], 2.0)] * 4


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("ip") is None, reason="only root can make network namespaces")
@pytest.mark.slow
def test_the_groups_of_a_host_that_has_only_ipv6():
    code = (
        "from harness import run_ranks; import test_interfaces as t; "
        "print(run_ranks(t.addresses_of_groups, 2, env={'GLOO_SOCKET_IFNAME': 'lo'}))"
    )
    setup = 'ip link set lo up; ip addr del 127.0.0.1/8 dev lo 2>/dev/null; exec "$@"'
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", setup, "sh", sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.strip() == "[(['::1'], 2.0), (['::1'], 2.0)]", done.stderr


def failing_connection(rank):
    """Rank 1 cannot make its end of the group."""
    from tpcolocate import groups

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            error = errors.ConfigError("the loopback is down", hint="bring it up")
            patch.setattr(groups, "loopback_device", lambda: (_ for _ in ()).throw(error))
        tpcolocate.init(2, device="cpu", timeout_s=3.0)


@pytest.mark.slow
def test_a_rank_that_cannot_connect_is_the_error_of_all():
    texts = {str(outcome.error) for outcome in run_ranks(failing_connection, 2, expect_errors=True)}
    assert len(texts) == 1 and "the loopback is down" in texts.pop()
