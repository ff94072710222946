"""The rendezvous file: atomic, and valid only for its user, its launch, a live owner and a live server."""

import itertools
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, replace

import pytest

from tpcolocate import rendezvous, runtime_folder
from tpcolocate.errors import LaunchError, RendezvousError
from tpcolocate.processes import start_of, this_process

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

PID, STARTED = this_process()
OURS = rendezvous.Announcement("http://127.0.0.1:1", "key", "job7", 1, (2, 3), PID, STARTED, "nonce1", "/log", "/model")
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "announcement.json"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime_folder, "SHARED_MEMORY", tmp_path)
    return tmp_path


def made(nonce):
    """The path of an announcement in a folder of its launch."""
    path = rendezvous.path_for(nonce)
    path.parent.mkdir(mode=0o700)
    return path


def wait(path, *, healthy=lambda _: True, timeout_s=0.1, nonce="nonce1"):
    return rendezvous.wait(path, nonce=nonce, is_healthy=healthy, timeout_s=timeout_s)


def dead_pid():
    """Start a process that exits and is not reaped, so that its pid is not reused."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_of(child.pid)
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    return child, started


def test_an_announcement_is_readable_by_its_user_alone(path):
    assert rendezvous.read(path) is None
    rendezvous.announce(path, OURS)
    assert rendezvous.read(path) == OURS
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name], "no temporary file is left"


def test_a_later_launch_replaces_the_file_of_an_earlier_one(path):
    path.write_text("old")
    path.chmod(0o644)
    rendezvous.announce(path, OURS)
    assert rendezvous.read(path) == OURS


def test_a_failed_announcement_leaves_the_old_file(path, monkeypatch):
    rendezvous.announce(path, OURS)
    monkeypatch.setattr(rendezvous.json, "dump", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(LaunchError, match=f"cannot write {path}: disk full"):
        rendezvous.announce(path, replace(OURS, nonce="nonce2"))
    assert rendezvous.read(path) == OURS
    assert os.listdir(path.parent) == [path.name]


def test_readers_never_see_a_partial_file(path):
    # much longer than one write of a text file's buffer
    versions = [replace(OURS, nonce=str(i), api_key=str(i) * 50_000) for i in range(2)]
    rendezvous.announce(path, versions[0])
    seen, over = Counter(), threading.Event()

    def write():
        for version in itertools.cycle(versions):
            rendezvous.announce(path, version)
            if over.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while len(seen) < 2 or seen.total() < 200:
            found = rendezvous.read(path)
            assert found in versions
            seen[found.nonce] += 1
    finally:
        over.set()
        writer.join()


def foreign(path):
    rendezvous.announce(path, OURS)
    os.chown(path, 12345, -1)


def group_readable(path):
    rendezvous.announce(path, OURS)
    path.chmod(0o640)


def symlink(path):
    real = path.with_name("real")
    rendezvous.announce(real, OURS)
    path.symlink_to(real)


@pytest.mark.parametrize("make, words", [
    pytest.param(foreign, "belongs to user id 12345", marks=as_root),
    (group_readable, "mode 640"),
    (symlink, "cannot be read"),
    (os.mkfifo, "not a regular file"),
    (os.mkdir, "not a regular file"),
    (lambda path: path.touch(0o600), "not an announcement"),
    (lambda path: (path.touch(0o600), path.write_bytes(b"\xff\xfe{")), "not an announcement"),
    (lambda path: (path.touch(0o600), path.write_text("[1]")), "not an announcement"),
    (lambda path: (path.touch(0o600), path.write_text(json.dumps({"url": "x"}))), "not an announcement"),
    (lambda path: (path.touch(0o600), path.write_text(json.dumps(asdict(OURS) | {"more": 1}))), "not an announcement"),
], ids=["foreign", "mode", "symlink", "fifo", "folder", "empty", "binary", "list", "incomplete", "newer"])  # fmt: skip
def test_an_invalid_file_is_rejected_and_not_removed(path, folder, make, words):
    path = made("nonce1")
    make(path)
    with pytest.raises(RendezvousError, match=words) as caught:
        rendezvous.read(path)
    assert str(path) in str(caught.value)
    with pytest.raises(RendezvousError, match=words):
        wait(path)
    assert rendezvous.discover() == []
    assert os.path.lexists(path)


def announce_by_dead_process(path):
    child, started = dead_pid()
    rendezvous.announce(path, replace(OURS, pid=child.pid, started=started))
    return child


def test_the_file_of_a_dead_writer_is_rejected_even_before_it_is_reaped(path):
    child = announce_by_dead_process(path)
    with pytest.raises(RendezvousError, match=f"its writer .pid {child.pid}. has exited"):
        wait(path)
    child.wait()
    with pytest.raises(RendezvousError, match="has exited"):
        wait(path)


@pytest.mark.parametrize("changed, words", [
    ({"started": STARTED - 1}, "has exited"),  # the pid was reused
    ({"nonce": "nonce0"}, "of another launch"),
])  # fmt: skip
def test_announcements_of_other_launches_are_ignored(path, changed, words):
    rendezvous.announce(path, replace(OURS, **changed))
    checked = []
    with pytest.raises(RendezvousError, match=words):
        wait(path, healthy=lambda a: checked.append(a) or True)
    assert checked == [], "a server is checked only if all else is valid"


@pytest.mark.parametrize("prepare, words", [
    (lambda path: None, "there is no file"),
    (lambda path: rendezvous.announce(path, OURS), "the server at http://127.0.0.1:1 does not answer"),
])  # fmt: skip
def test_the_timeout_is_kept_and_its_error_has_the_reason(path, prepare, words):
    prepare(path)
    began = time.monotonic()
    with pytest.raises(RendezvousError, match=words) as caught:
        wait(path, healthy=lambda _: False, timeout_s=0.3)
    assert 0.3 <= time.monotonic() - began < 30
    assert str(path) in str(caught.value) and "0.3 s" in str(caught.value)


def test_wait_continues_until_file_launch_and_server_are_valid(path):
    """Every check finds something else missing; the last one succeeds."""
    rendezvous.announce(path, replace(OURS, nonce="stale"))
    checks = []

    def healthy(announcement):
        checks.append(announcement)
        return len(checks) == 3

    timer = threading.Timer(0.1, rendezvous.announce, (path, OURS))
    timer.start()
    assert wait(path, healthy=healthy, timeout_s=50) == OURS
    timer.join()
    assert checks == [OURS] * 3


def test_discover_lists_live_announcements_of_a_job(folder):
    one, two, three = OURS, replace(OURS, nonce="b", job="other"), replace(OURS, nonce="c", job="other")
    paths = [made(nonce) for nonce in "abcd"]
    for path, announcement in zip(paths, (one, two, three)):
        rendezvous.announce(path, announcement)
    announce_by_dead_process(paths[3]).wait()
    (folder / "unrelated.json").write_text("{}")
    assert rendezvous.discover() == [(paths[0], one), (paths[1], two), (paths[2], three)]
    assert rendezvous.discover("other") == [(paths[1], two), (paths[2], three)], "two engines of one slice"
    assert rendezvous.discover("another") == []


def open_to_others(path):
    path.parent.chmod(0o755)


def of_another_user(path):
    os.chown(path.parent, 65534, -1)


def link(path):
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.symlink_to(path.parent.with_name("elsewhere"))


@pytest.mark.parametrize(
    "change", [open_to_others, link, pytest.param(of_another_user, marks=as_root)], ids=["mode", "link", "owner"]
)
def test_a_folder_that_another_user_could_have_made_is_ignored(folder, change):
    path = made("nonce1")
    rendezvous.announce(path, OURS)
    assert rendezvous.discover() == [(path, OURS)]
    change(path)
    assert rendezvous.discover() == []


def test_the_path_contains_user_and_launch():
    assert str(rendezvous.path_for("12-ab")) == f"/dev/shm/tpcolocate-{os.getuid()}-12-ab/announcement.json"
