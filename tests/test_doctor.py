"""The doctor's checks: facts read in place, decisions from tables, leftovers in folders of their own."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tpcolocate import devices
from tpcolocate.__main__ import main
from tpcolocate.deadline import Deadline
from tpcolocate.doctor import command, findings, leftovers, probe
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
from tpcolocate.doctor.gather import (
    check_allocator,
    check_kernel,
    check_limits,
    check_network,
    check_shared_memory,
    check_software,
    read_job,
)
from tpcolocate.doctor.page import as_json, render
from tpcolocate.errors import DeadlineError, RankFailedError
from tpcolocate.groups import Host, Member
from tpcolocate.processes import pid_namespace, this_process
from tpcolocate.runtime_folder import OwnerRecord
from tpcolocate.server.arguments import RECEIVER

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

HOST = Host(boot_id="boot", network="net:[1]", shm="20", name="node-1", pids="pid:[1]")
MANY = 1 << 40
SOFTWARE = Software(
    "3.11.7", "2.13.0+cu130", "13.0", "0.5.21", "/site/sglang", True, "torch==2.13.0", True, True, False
)
NETWORK = Network("node-1", ("10.0.0.1",), None, ("lo", "eth0"), ("10.0.0.1",), {}, None, (), "")
GPUS = tuple((f"GPU-{i}", "H100") for i in range(2))
VISIBLE = tuple({"token": str(i), "index": i, "uuid": f"GPU-{i}"} for i in range(2))
PEERS = ((0, 1, True), (1, 0, True))
DEVICES = Devices("cuda", (), "PCI_BUS_ID", VISIBLE, None, GPUS, 0, PEERS, (MANY, MANY), "2.27.7")
KERNEL = Kernel("6.1", None, None, 0, None, "ipc:[1]")


def member(rank=0, *, device=None, world_size=1, tp_size=1, host=HOST, **facts):
    physical = None if device is None else {"token": str(device), "index": device, "uuid": f"GPU-{device}"}
    kind = "cpu" if device is None else "cuda"
    shared = {
        "kind": kind,
        "physical": physical,
        "order": None,
        "version": "1",
        "shared": False,
        "job": "",
        "job_name": None,
        "gloo": {"address": "", "origin": ""},
        **facts,
    }
    return Member(rank, world_size, tp_size, host, 100 + rank, 5, shared)


def good_facts(rank=0, **sections):
    made = {
        "member": member(rank, device=rank), "job": Job(rank, 1, None), "software": SOFTWARE, "devices": DEVICES,
        "handles": Handles((("cuda:0", None),), 0.1), "shared_memory": SharedMemory(MANY, MANY, None, "mnt:[1]"),
        "kernel": KERNEL, "allocator": Allocator(()), "network": NETWORK, "gloo": GlooGroup(None, 0.1),
        "limits": Limits(65536, 65536), "leftovers": Leftovers(),
    }  # fmt: skip
    return Facts(**{**made, **sections})


def judged(*found, world_size=1, tp_size=1):
    return findings.judge(found, world_size=world_size, tp_size=tp_size)


def found_by(diagnosis, level):
    return {finding.check: finding for finding in diagnosis.findings if finding.level == level}


# --- decisions --------------------------------------------------------------------------------------------------------


def test_a_good_machine_has_neither_problems_nor_warnings():
    diagnosis = judged(good_facts(), tp_size=2)
    assert [finding for finding in diagnosis.findings if finding.level != "ok"] == []
    assert {finding.check for finding in diagnosis.findings} == set(SECTIONS) - {"job", "allocator"} | {
        "ranks",
        "slices",
    }
    assert [roles.ranks for roles in diagnosis.slices] == [(0, 1)] and diagnosis.assumed and diagnosis.level == "ok"


LEFT = {"what": "sockets", "path": "/dev/shm/tpcolocate-0-1-a", "pid": None, "started": None, "num_bytes": 0}
RAN = {"what": "server", "path": None, "pid": 4711, "started": 1, "num_bytes": 0}


@pytest.mark.parametrize("section, value, level, words", [
    ("job", Job(0, 2, None, missing=("RANK", "MASTER_ADDR")), "problem", ["WORLD_SIZE=2", "RANK, MASTER_ADDR", "rank 0"]),
    ("job", Job(0, 1, None, invalid=("RANK='x'",)), "problem", ["RANK='x'"]),
    ("job", Job(0, 1, None, launcher_tasks=8), "warning", ["8 tasks", "WORLD_SIZE"]),
    ("software", replace(SOFTWARE, python="3.10.2"), "problem", ["Python 3.10.2", "3.11"]),
    ("software", replace(SOFTWARE, torch="2.8.0+cu128"), "problem", ["torch 2.8.0+cu128", "2.9"]),
    ("software", replace(SOFTWARE, sglang=None, sglang_folder=None), "problem", ["SGLang is not installed", "pip install"]),
    ("software", replace(SOFTWARE, sglang_readable=False), "problem", ["/site/sglang", "not a release"]),
    ("software", replace(SOFTWARE, sglang="0.5.8"), "problem", ["0.5.8", "0.5.9 or newer"]),
    ("software", replace(SOFTWARE, sglang=None), "warning", ["no version"]),
    ("software", replace(SOFTWARE, torch_fits=False), "warning", ["torch==2.13.0", "2.13.0+cu130"]),
    ("devices", replace(DEVICES, unused="CUDA_VISIBLE_DEVICES='0,0' makes 0 devices visible"), "problem", ["'0,0'", "twice"]),
    ("devices", replace(DEVICES, error={"kind": "DeviceError", "message": "cuda:0 is GPU-x", "hint": "do"}), "problem", ["GPU-x"]),
    ("devices", replace(DEVICES, kind="cpu", visible=()), "problem", ["2 GPUs", "torch finds none"]),
    ("devices", replace(DEVICES, peers=((0, 1, False),)), "warning", ["0 from 1", "peer access"]),
    ("devices", replace(DEVICES, order="FASTEST_FIRST", inventory=(("GPU-0", "A"), ("GPU-1", "B"))), "warning", ["PCI_BUS_ID"]),
    ("devices", replace(DEVICES, order="PCI"), "warning", ["CUDA_DEVICE_ORDER='PCI'"]),
    ("handles", Handles((("cuda:0", "does not open: EPERM"),), 0.0), "problem", ["EPERM", "--ipc host"]),
    ("shared_memory", SharedMemory(64 << 20, 60 << 20, None, ""), "problem", ["60 of 64 MiB", "--shm-size"]),
    ("shared_memory", SharedMemory(MANY, 900 << 20, None, ""), "warning", ["900 of", "--shm-size"]),
    ("shared_memory", SharedMemory(MANY, MANY, "read-only", ""), "problem", ["read-only"]),
    ("kernel", replace(KERNEL, pidfd_open="Function not implemented"), "problem", ["pidfd_open", "Linux 5.3"]),
    ("allocator", Allocator(("PYTORCH_ALLOC_CONF='x'",)), "warning", ["PYTORCH_ALLOC_CONF", "unset"]),
    ("network", replace(NETWORK, chosen={"GLOO_SOCKET_IFNAME": "ib0"}), "problem", ["GLOO_SOCKET_IFNAME='ib0'", "lo, eth0"]),
    ("network", replace(NETWORK, chosen={"GLOO_SOCKET_IFNAME": "eth"}), "problem", ["no interface eth"]),
    ("network", replace(NETWORK, chosen={"NCCL_SOCKET_IFNAME": "ib"}), "problem", ["NCCL_SOCKET_IFNAME='ib'"]),
    ("network", replace(NETWORK, unresolved="unknown"), "warning", ["'node-1' does not resolve", "/etc/hosts"]),
    ("network", replace(NETWORK, local_addresses=()), "warning", ["10.0.0.1", "no address of this host"]),
    ("network", replace(NETWORK, loopback="refused"), "problem", ["refused"]),
    ("network", replace(NETWORK, proxies=("HTTP_PROXY",), no_proxy="a.b"), "warning", ["HTTP_PROXY", "'a.b'", "127.0.0.1"]),
    ("gloo", GlooGroup("Unable to find address for: ib0", 1.0), "problem", ["ib0", "GLOO_SOCKET_IFNAME"]),
    ("limits", Limits(100, 100), "problem", ["100 open files", "hard limit"]),
    ("limits", Limits(256, 65536), "problem", ["256 open files", "ulimit -n 65536"]),
    ("limits", Limits(1000, -1), "warning", ["1000 open files"]),
    ("leftovers", Leftovers((LEFT,)), "warning", ["/dev/shm/tpcolocate-0-1-a", "--clean"]),
    ("leftovers", Leftovers((LEFT, RAN)), "problem", ["4711", "--clean"]),
    ("leftovers", Leftovers((LEFT,), kept=(("/dev/shm/x", "busy"),)), "warning", ["busy"]),
    ("leftovers", Leftovers(torch_files=(3, 1 << 30)), "warning", ["3 files", "1024 MiB"]),
    ("leftovers", Leftovers(num_logs=9, log_bytes=2 << 30, log_folder="/tmp/l"), "warning", ["2048 MiB", "/tmp/l"]),
])  # fmt: skip
def test_hazards_are_named_with_their_fix(section, value, level, words):
    diagnosis = judged(good_facts(**{section: value}))
    assert set(found_by(diagnosis, level)) == {section} and diagnosis.level in (level, "problem")
    finding = found_by(diagnosis, level)[section]
    assert finding.fix is not None and "\n" not in finding.fix
    for word in words:
        assert word in f"{finding.message} {finding.fix}"


@pytest.mark.parametrize("section, value", [
    ("network", replace(NETWORK, chosen={"NCCL_SOCKET_IFNAME": "eth"})),
    ("network", replace(NETWORK, chosen={"NCCL_SOCKET_IFNAME": "^docker0"})),
    ("network", replace(NETWORK, chosen={"NCCL_SOCKET_IFNAME": "=eth0:1"})),
    ("network", replace(NETWORK, chosen={"GLOO_SOCKET_IFNAME": "eth0"}, unresolved="unknown")),
    ("devices", replace(DEVICES, kind="cpu", visible=(), settings=("CUDA_VISIBLE_DEVICES=''",), own=None)),
    ("devices", replace(DEVICES, kind="cpu", visible=(), inventory=(), own=None, peers=())),
    ("kernel", replace(KERNEL, pidfd_getfd="Operation not permitted", seccomp=2, ptrace_scope=1)),
    ("limits", Limits(-1, -1)),
    ("leftovers", Leftovers((LEFT,), removed=("/dev/shm/tpcolocate-0-1-a: sockets",))),
    ("software", replace(SOFTWARE, torch="2.13.0a0+git123", cpu_stub=True)),
])  # fmt: skip
def test_what_is_permitted_is_no_finding(section, value):
    assert judged(good_facts(**{section: value})).level == "ok"


def test_a_gpu_needs_the_memory_saver_and_a_cpu_does_not():
    without = replace(SOFTWARE, memory_saver=False)
    assert "torch_memory_saver" in found_by(judged(good_facts(software=without)), "warning")["devices"].message
    on_cpu = replace(DEVICES, kind="cpu", visible=(), inventory=(), own=None)
    assert judged(good_facts(software=without, devices=on_cpu)).level == "ok"


def test_expandable_segments_are_the_fix_where_handles_do_not_open():
    broken = Handles((("cuda:0", "does not open"),), 0.0)
    finding = found_by(judged(good_facts(handles=broken, allocator=Allocator(("x",)))), "problem")["handles"]
    assert "expandable_segments" in finding.fix


def test_a_rank_without_a_device_of_its_own():
    facts = good_facts(job=Job(3, 4, 3), devices=replace(DEVICES, own=3))
    assert "LOCAL_RANK=3, but 2 devices" in found_by(judged(facts), "problem")["devices"].message


def ranks_of(*members):
    return [good_facts(each.rank, member=each, job=Job(each.rank, len(members), each.rank)) for each in members]


def test_two_ranks_on_one_device_are_what_init_would_refuse():
    found = ranks_of(*(member(rank, device=1, world_size=2, tp_size=2) for rank in range(2)))
    diagnosis = judged(*found, world_size=2, tp_size=2)
    problem = found_by(diagnosis, "problem")["slices"]
    assert "DeviceError" in problem.message and "rank 0 and by rank 1" in problem.message and problem.fix
    assert diagnosis.slices == ()


def test_slices_and_owners_are_those_of_init():
    found = ranks_of(*(member(rank, device=1 - rank, world_size=2, tp_size=2) for rank in range(2)))
    diagnosis = judged(*found, world_size=2, tp_size=2)
    assert diagnosis.level == "ok" and not diagnosis.assumed
    assert [(roles.ranks, roles.owner_rank, roles.visible_devices) for roles in diagnosis.slices] == [
        ((0, 1), 1, ("1", "0"))
    ]


def test_a_tp_size_that_does_not_divide_the_devices():
    assert "does not divide" in found_by(judged(good_facts(), tp_size=4), "problem")["slices"].message


def test_ranks_that_did_not_report_are_named():
    found = ranks_of(*(member(rank, device=rank, world_size=4) for rank in range(2)))
    assert "ranks 2, 3 did not report" in found_by(judged(*found, world_size=4), "problem")["ranks"].message


@pytest.mark.parametrize("changed, level, words", [
    ({"pids": "pid:[2]"}, "warning", "PID namespace"),
    ({"network": "net:[2]"}, "problem", "network namespaces"),
    ({"shm": "21"}, "problem", "/dev/shm mounts"),
    ({"boot_id": "other", "name": "node-2"}, "problem", "span hosts"),
])  # fmt: skip
def test_ranks_of_a_slice_in_different_containers(changed, level, words):
    hosts = [HOST, replace(HOST, **changed)]
    found = ranks_of(*(member(rank, device=rank, world_size=2, tp_size=2, host=hosts[rank]) for rank in range(2)))
    assert any(words in each.message for each in found_by(judged(*found, world_size=2, tp_size=2), level).values())


def test_ranks_in_different_ipc_namespaces():
    found = ranks_of(*(member(rank, device=rank, world_size=2) for rank in range(2)))
    found[1] = replace(found[1], kernel=replace(KERNEL, ipc_namespace="ipc:[2]"))
    messages = [each.message for each in judged(*found, world_size=2).findings if each.level == "warning"]
    assert messages == ["rank 1 is in another IPC namespace than rank 0 on the same host"]


def test_without_devices_no_slices_are_promised():
    diagnosis = judged(good_facts(devices=None, failures={"devices": "killed"}), tp_size=2)
    assert diagnosis.slices == () and set(found_by(diagnosis, "problem")) == {"devices"}


def test_equal_findings_of_ranks_are_one_line_with_the_ranks():
    found = ranks_of(*(member(rank, device=rank, world_size=3) for rank in range(3)))
    found[1] = replace(found[1], limits=Limits(100, 100))
    found[2] = replace(found[2], limits=Limits(100, 100))
    diagnosis = judged(*found, world_size=3)
    assert found_by(diagnosis, "problem")["limits"].ranks == (1, 2)
    page = render(diagnosis, world_size=3, tp_size=1)
    assert page.count("100 open files") == 1 and "ranks 1, 2: only 100" in page
    assert page.splitlines()[-1] == "1 problem, 0 warnings"


def test_a_check_without_a_result_is_a_problem():
    diagnosis = judged(good_facts(kernel=None, failures={"kernel": "no answer within 3 s"}))
    assert "no answer within 3 s" in found_by(diagnosis, "problem")["kernel"].message


def test_facts_travel_as_json():
    facts = good_facts(
        kernel=None, failures={"kernel": "b"}, seconds={"kernel": 0.5}, leftovers=Leftovers((LEFT,), kept=(("a", "b"),))
    )
    assert Facts.from_json(facts.to_json()) == facts
    document = json.loads(as_json(judged(facts), [facts], world_size=1, tp_size=1))
    assert document["level"] == "problem" and document["ranks"][0]["limits"]["open_files"] == 65536


# --- facts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environ, expected", [
    ({}, Job(0, 1, None)),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, Job(1, 2, 1)),
    ({"WORLD_SIZE": "2"}, Job(0, 2, None, ("RANK", "MASTER_ADDR", "MASTER_PORT"))),
    ({"RANK": "0"}, Job(0, 1, None, ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))),
    ({"WORLD_SIZE": "1"}, Job(0, 1, None)),
    ({"WORLD_SIZE": "two"}, Job(0, 1, None, (), ("WORLD_SIZE='two'",))),
    ({"SLURM_NTASKS": "8"}, Job(0, 1, None, launcher_tasks=8)),
    ({"SLURM_NTASKS": "1"}, Job(0, 1, None)),
])  # fmt: skip
def test_the_job_is_read_from_the_environment(environ, expected):
    assert read_job(environ) == expected
    assert expected.is_distributed == (expected.rank == 1)


def test_a_rank_out_of_range_is_invalid():
    environ = {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert read_job(environ).invalid == ("RANK='2' with WORLD_SIZE='2'",)


@pytest.mark.parametrize("environ, proxies", [
    ({"HTTP_PROXY": "http://user:secret@proxy:1"}, ("HTTP_PROXY",)),
    ({"https_proxy": "http://p", "all_proxy": "http://p"}, ("ALL_PROXY", "HTTPS_PROXY")),
    ({"HTTP_PROXY": "http://p", "NO_PROXY": "localhost"}, ("HTTP_PROXY",)),
    ({"HTTP_PROXY": "http://p", "NO_PROXY": "localhost,127.0.0.1"}, ()),
    ({"HTTP_PROXY": "http://p", "no_proxy": "*"}, ()),
    ({"HTTP_PROXY": ""}, ()),
])  # fmt: skip
def test_proxies_that_loopback_would_use(environ, proxies):
    network = check_network(environ)
    assert network.proxies == proxies and network.loopback is None
    assert "secret" not in repr(network)


def test_interfaces_that_are_not_there():
    network = check_network({"GLOO_SOCKET_IFNAME": "none0"})
    assert "lo" in network.interfaces
    assert "none0" in found_by(judged(good_facts(network=network)), "problem")["network"].message


def test_a_host_name_that_does_not_resolve(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert check_network({}).unresolved is not None


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_expandable_segments_are_found(name):
    assert name in check_allocator({name: "max_split_size_mb:64,expandable_segments:True"}).warnings[0]
    assert check_allocator({name: "expandable_segments:False"}).warnings == ()


def test_this_machine_is_read():
    assert check_kernel().pidfd_open is None
    assert check_limits().open_files != 0
    memory = check_shared_memory()
    assert 0 < memory.free_bytes <= memory.total_bytes and memory.error is None
    assert not list(Path("/dev/shm").glob("tpcolocate-doctor-*"))


def test_pidfd_open_that_is_not_permitted(monkeypatch):
    def refused(pid):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refused)
    kernel = check_kernel()
    assert "Function not implemented" in kernel.pidfd_open and kernel.pidfd_getfd is not None


def test_sglang_that_is_not_installed(monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "sglang").exists()])
    software = check_software()
    assert software.sglang_folder is None and not software.sglang_readable
    assert "not installed" in found_by(judged(good_facts(software=software)), "problem")["software"].message


def test_something_else_of_the_name_sglang(monkeypatch, tmp_path):
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    software = check_software()
    assert software.sglang_folder == str(tmp_path / "sglang") and not software.sglang_readable


def test_the_torch_that_sglang_requires(monkeypatch, tmp_path):
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    (tmp_path / "sglang-0.5.17.dist-info").mkdir()
    (tmp_path / "sglang-0.5.17.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.17\nRequires-Dist: torch==1.0\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    software = check_software()
    assert (software.sglang, software.sglang_torch, software.torch_fits) == ("0.5.17", "torch==1.0", False)


# --- leftovers --------------------------------------------------------------------------------------------------------


def ended_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


class Folders:
    """Stand-ins of /dev/shm and of the temporary folder."""

    def __init__(self, path):
        self.shm, self.temporary = path / "shm", path / "tmp"
        self.shm.mkdir()
        self.temporary.mkdir()

    def plant(self, pid, started, *, nonce="1-0123456789abcdef", supervisor=None, namespace=None):
        """Plant what a launch has, as `RuntimeFolder` makes it, and return the names."""
        name = f"tpcolocate-{os.getuid()}-{nonce}"
        for folder in (self.shm / name, self.temporary / name):
            folder.mkdir(mode=0o700)
        record = OwnerRecord(
            pid, started, namespace or pid_namespace(), nonce, str(self.temporary / name), str(self.temporary / name / "server.log")
        )  # fmt: skip
        (self.shm / name / "owner.json").write_text(json.dumps(asdict(record)))
        if supervisor is not None:
            process = {"name": "supervisor", "pid": supervisor[0], "started": supervisor[1]}
            (self.shm / name / "processes.json").write_text(json.dumps({"supervisor": process, "processes": []}))
        (self.temporary / name / "server.log").write_bytes(b"x" * 100)
        return {str(self.shm / name), str(self.temporary / name)}

    def found(self):
        return leftovers.find_leftovers(shm=self.shm)

    def names(self):
        return {each.path for each in self.found() if each.path is not None}


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path)


def test_leftovers_of_a_dead_job_are_found_and_removed(folders):
    planted = folders.plant(ended_pid(), 1)
    queue = folders.shm / f"sgl_shm_mq_{ended_pid()}_ab12"
    queue.write_bytes(b"x" * 100)
    others = [folders.shm / name for name in ("torch_1_2_3", "sem.mp-abc", "tpcolocate-mine", "data.json")]
    for path in others:
        path.touch()
    assert folders.names() == planted | {str(queue)}
    gone, kept = leftovers.remove(each for each in folders.found() if each.path is not None)
    assert len(gone) == 3 and kept == []
    assert sorted(folders.shm.iterdir()) == sorted(others) and list(folders.temporary.iterdir()) == []


def test_files_that_are_removed_meanwhile_do_not_end_the_search(folders, monkeypatch):
    """As by data loaders, and by a server that ends."""
    pid = ended_pid()
    first, *others = (folders.shm / name for name in (f"sgl_shm_a_{pid}_x", f"sgl_shm_b_{pid}_x", "torch_1_2_3"))
    for path in (first, *others):
        path.touch()
    may_run = leftovers._may_run

    def then_remove(*args):
        for path in others:
            path.unlink()
        return may_run(*args)

    monkeypatch.setattr(leftovers, "_may_run", then_remove)
    assert folders.names() == {str(first)}


def test_what_a_running_job_has_is_no_leftover(folders):
    folders.plant(*this_process())
    (folders.shm / f"sgl_shm_mq_{os.getpid()}_ab12").touch()
    assert folders.names() == set()


def test_an_owner_is_judged_by_the_start_of_its_process(folders):
    pid, started = this_process()
    planted = folders.plant(pid, started - 1)
    assert folders.names() == planted


def test_a_launch_whose_supervisor_still_ends_the_server_is_left_to_it(folders):
    pid, started = this_process()
    folders.plant(ended_pid(), 1, supervisor=(pid, started))
    assert folders.names() == set()
    other = folders.plant(ended_pid(), 1, supervisor=(pid, started - 1), nonce="2-0123456789abcdef")
    assert folders.names() == other


def test_a_launch_of_another_container_is_left_alone(folders):
    folders.plant(ended_pid(), 1, namespace="pid:[1]")
    assert folders.names() == set()


def test_a_folder_without_a_record_is_one_of_a_launch_that_begins(folders):
    folder = folders.shm / f"tpcolocate-{os.getuid()}-1-0123456789abcdef"
    folder.mkdir(mode=0o700)
    assert folders.names() == set()
    os.utime(folder, (1.0, 1.0))
    assert folders.names() == {str(folder)}


def test_folders_of_other_users_are_never_listed(folders, monkeypatch):
    folders.plant(ended_pid(), 1)
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert folders.names() == set()


def test_a_folder_that_others_can_enter_is_not_listed(folders):
    [shared, _] = sorted(folders.plant(ended_pid(), 1))
    os.chmod(shared, 0o755)
    assert folders.names() == set()


def test_shared_memory_of_ended_torch_processes_is_counted(folders):
    (folders.shm / f"torch_{ended_pid()}_123_4").write_bytes(b"x" * 10)
    (folders.shm / f"torch_{os.getpid()}_123_4").write_bytes(b"x" * 10)
    assert leftovers.torch_files(shm=folders.shm) == (1, 10) and folders.names() == set()


def test_links_are_not_followed(folders, tmp_path):
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    (target / "kept").touch()
    (folders.shm / f"tpcolocate-{os.getuid()}-1-0123456789abcdef").symlink_to(target)
    assert folders.names() == set()
    leftovers.remove(folders.found())
    assert (target / "kept").exists()


SERVER = [sys.executable, "-c", "import time; time.sleep(120)", "-m", "sglang.launch_server", "--x", RECEIVER]


@pytest.fixture
def server():
    process = subprocess.Popen(SERVER)
    yield process
    process.kill()
    process.wait()


def listed_servers(pid):
    return [each for each in leftovers._servers(Path("/proc")) if each.pid == pid]


def test_a_server_without_a_supervisor_is_found_and_ended(server, monkeypatch):
    assert listed_servers(server.pid) == []  # young: its supervisor may be about to end it
    monkeypatch.setattr(leftovers, "_ENDING_S", 0.0)
    (found,) = listed_servers(server.pid)
    gone, kept = leftovers.remove([replace(found, started=found.started + 1)])
    assert server.poll() is None, "another process of the same pid"
    gone, kept = leftovers.remove([found])
    assert gone == [found] and kept == [] and server.wait(10) is not None


def test_a_server_with_a_supervisor_is_no_leftover(monkeypatch, tmp_path):
    monkeypatch.setattr(leftovers, "_ENDING_S", 0.0)
    script = tmp_path / "supervisor.py"
    script.write_text(
        "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); sys.stdin.read(); p.kill()"
    )
    with subprocess.Popen(
        [sys.executable, str(script), *SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as supervisor:
        assert listed_servers(int(supervisor.stdout.readline())) == []
        supervisor.stdin.close()


# --- deadlines and failures -------------------------------------------------------------------------------------------


def options(**changed):
    values = {"tp_size": 1, "allow_shared_devices": False, "json": True, "clean": False, "timeout": 1.0, **changed}
    return type("Options", (), values)()


@pytest.mark.slow
def test_a_check_that_hangs_and_one_that_raises_are_findings(monkeypatch, capsys):
    def hangs():
        time.sleep(30)

    def raises():
        raise KeyError("oops")

    def no_probe(*_, **__):
        raise RankFailedError("the probe 'export' exited with code -11")

    monkeypatch.setattr(command, "check_kernel", hangs)
    monkeypatch.setattr(command, "check_limits", raises)
    monkeypatch.setattr(command, "probe", no_probe)

    def no_host():
        raise FileNotFoundError("boot_id")

    monkeypatch.setattr(command, "check_leftovers", lambda clean: Leftovers())
    monkeypatch.setattr(command.Host, "here", no_host)
    started = time.monotonic()
    assert command.run(options(timeout=3.0)) == 1
    assert time.monotonic() - started < 20
    problems = {
        each["check"]: each["message"]
        for each in json.loads(capsys.readouterr().out)["findings"]
        if each["level"] == "problem"
    }
    assert "no answer within 3 s" in problems["kernel"]
    assert "boot_id" in problems["host"]
    assert "KeyError" in problems["limits"] and "code -11" in problems["devices"]


@pytest.mark.parametrize("line, error, words", [
    ("import time; time.sleep(60)", DeadlineError, "did not answer within 2 s"),
    ("import os; os._exit(7)", RankFailedError, "exited with code 7"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", RankFailedError, "exited with code -11"),
])  # fmt: skip
def test_a_driver_that_hangs_or_crashes_ends_the_probe_alone(tmp_path, monkeypatch, line, error, words, no_leftovers):
    monkeypatch.setattr(probe, "_EXIT_S", 0.2)
    (tmp_path / "sitecustomize.py").write_text(line)
    with pytest.raises(error, match=words):
        probe.probe(
            {**os.environ, "PYTHONPATH": str(tmp_path)}, None, deadline=Deadline.after(2.0 if "60" in line else 60.0)
        )


@pytest.mark.parametrize("arguments", [["doctor", "--tp-size", "0"], ["doctor", "--timeout", "nan"], ["nothing"], []])
def test_wrong_options_are_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tpcolocate", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "usage" in capsys.readouterr().err


# --- the probe's own process, on a machine with stand-ins for GPUs ------------------------------------------------------


class Gpus:
    """Two GPUs as torch and NVML show them."""

    def __init__(self, monkeypatch, *, can_access=True):
        inventory = devices.Inventory(uuids=("GPU-a", "GPU-b"), names=("H100", "H100"))
        monkeypatch.setattr(devices, "read_inventory", lambda: inventory)
        cuda = probe.torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda, "device_count", lambda: len(devices.visible_tokens(os.environ) or "ab"))
        monkeypatch.setattr(cuda, "can_device_access_peer", lambda a, b: can_access)
        monkeypatch.setattr(cuda, "mem_get_info", lambda index: (3 << 30, 80 << 30))
        monkeypatch.setattr(cuda.nccl, "version", lambda: (2, 27, 7))
        monkeypatch.setattr(cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=self.uuid(device)))

    def uuid(self, device):
        index = device.index if isinstance(device, probe.torch.device) else device
        tokens = devices.visible_tokens(os.environ) or ("0", "1")
        return "ab"[int(tokens[index])]


def test_devices_are_read_in_the_order_of_this_process(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    Gpus(monkeypatch)
    found = probe._find_devices(1)
    assert [each["uuid"] for each in found.visible] == ["GPU-b", "GPU-a"]
    assert (found.kind, found.own, found.nccl, found.unused) == ("cuda", 1, "2.27.7", None)
    assert found.peers == ((0, 1, True), (1, 0, True)) and found.free_bytes == (3 << 30,) * 2
    (good,) = [each for each in judged(good_facts(devices=found)).findings if each.check == "devices"]
    assert "cuda:0 is GPU 1 H100 GPU-b, 3 GiB free" in good.message and "NCCL 2.27.7" in good.message


@pytest.mark.parametrize("value, local_rank, own, unused", [
    ("1", 3, 0, None),
    (None, 1, 1, None),
    (None, None, 0, None),
    ("1,7", 0, 0, "this host has 2 devices"),
    ("1,1", 0, None, "repeat"),
    ("GPU-a,GPU-x", 0, 0, "it matches no GPU"),
])  # fmt: skip
def test_entries_that_select_nothing_are_named(monkeypatch, value, local_rank, own, unused):
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    Gpus(monkeypatch)
    number = len(devices.visible_tokens(os.environ, inventory=devices.read_inventory()) or "ab" * (value is None))
    monkeypatch.setattr(probe.torch.cuda, "device_count", lambda: number)
    found = probe._find_devices(local_rank)
    assert found.own == own
    assert (found.unused is None) if unused is None else (unused in found.unused)


def test_a_device_that_is_not_what_the_variable_says(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    Gpus(monkeypatch)
    monkeypatch.setattr(
        probe.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab"[device.index])
    )
    found = probe._find_devices(0)
    assert "GPU-a" in found.error["message"] and "GPU-b" in found.error["message"]
    assert "GPU-b" in found_by(judged(good_facts(devices=found)), "problem")["devices"].message


def test_no_peer_access(monkeypatch):
    Gpus(monkeypatch, can_access=False)
    assert (
        "0 from 1, 1 from 0"
        in found_by(judged(good_facts(devices=probe._find_devices(None))), "warning")["devices"].message
    )


def test_a_handle_that_does_not_open_is_a_result():
    exporter = probe._Exporter()
    handle = exporter.answer({"export": "cpu"})["handle"]
    broken = {**handle, "name": base64.b64encode(b"/torch_nothing").decode()}
    assert "does not open" in probe._open(broken)["error"]
    assert probe._open(handle) == {"error": None}
    assert exporter.answer({"release": True}) == {"error": None}


def test_a_handle_that_is_not_released_is_a_result(monkeypatch):
    monkeypatch.setattr(probe, "_RELEASE_S", 0.1)
    exporter = probe._Exporter()
    exporter.answer({"export": "cpu"})
    assert "was not released" in exporter.answer({"release": True})["error"]
