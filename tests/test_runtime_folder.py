"""The private folders of a launch: made for it alone, out of reach of other users, and removed when their owner is dead."""

import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from harness import as_another_user

from tpcolocate import runtime_folder
from tpcolocate.errors import LaunchError
from tpcolocate.processes import pid_namespace, start_of
from tpcolocate.runtime_folder import OwnerRecord, RuntimeFolder, read_owner, remove_remains
from tpcolocate.supervisor import LEFTOVER_PREFIXES

pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

as_root = pytest.mark.skipif(os.getuid() != 0, reason="two users: only root can become another one")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Stand-ins for /dev/shm and the temporary folder; not in `tmp_path`, which other users cannot enter."""
    base = Path(tempfile.mkdtemp())
    shared, temporary = base / "shm", base / "tmp"
    for folder in (base, shared, temporary):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o1777)
    monkeypatch.setattr(runtime_folder, "SHARED_MEMORY", shared)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield shared, temporary
    shutil.rmtree(base)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_folders_are_private_whatever_the_umask_is(folders):
    before = os.umask(0)
    try:
        made = RuntimeFolder.make("1-ab")
        key = made.write("server.yaml", "key")
    finally:
        os.umask(before)
    assert [made.shared.parent, made.temporary.parent] == list(folders)
    assert [mode(path) for path in (made.shared, made.temporary, made.server_temporary)] == [0o700] * 3
    assert mode(key) == mode(made.shared / "owner.json") == 0o600
    assert read_owner(made.shared).is_running()
    made.log_path.touch()
    made.remove()
    assert not made.shared.exists() and os.listdir(made.temporary) == ["server.log"]
    made.log_path.unlink()
    made.remove()
    assert os.listdir(folders[0]) == os.listdir(folders[1]) == []


def test_a_folder_that_was_removed_is_made_anew(folders):
    made = RuntimeFolder.make("1-ab")
    assert not made.restore()
    shutil.rmtree(made.shared)
    assert made.restore() and not made.restore()
    assert mode(made.shared) == 0o700 and read_owner(made.shared).is_running()
    made.remove()
    assert os.listdir(folders[0]) == os.listdir(folders[1]) == []


def test_an_interrupt_leaves_no_folder(folders, monkeypatch):
    """Without a record of their owner they would stay for good."""

    def interrupt(self, name, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(RuntimeFolder, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        RuntimeFolder.make("1-ab")
    assert os.listdir(folders[0]) == os.listdir(folders[1]) == []


def test_a_machine_without_a_temporary_folder_is_an_error_that_says_what_to_set(folders, monkeypatch):
    def gettempdir():
        raise FileNotFoundError("No usable temporary directory found in ['/nowhere']")

    monkeypatch.setattr(tempfile, "gettempdir", gettempdir)
    with pytest.raises(LaunchError, match="No usable temporary directory") as caught:
        RuntimeFolder.make("1-ab")
    assert "TMPDIR" in caught.value.hint and os.listdir(folders[0]) == []


@pytest.mark.parametrize("which", [0, 1], ids=["shared", "temporary"])
@pytest.mark.parametrize("plant", [os.mkdir, os.mkfifo, lambda path: os.symlink("/tmp", path)])
def test_a_name_that_is_taken_is_an_error_and_is_not_used(folders, which, plant):
    path = folders[which] / f"tpcolocate-{os.getuid()}-1-ab"
    plant(path)
    for log_path in (None, path.parent / "server.log"):
        with pytest.raises(LaunchError, match="cannot make the files of the launch: .*File exists") as caught:
            RuntimeFolder.make("1-ab", log_path=log_path)
        assert "TMPDIR" in caught.value.hint, "not log_path, which can be written"
    assert os.path.lexists(path) and os.listdir(folders[1 - which]) == []


def test_a_file_is_never_written_through_a_link(folders, tmp_path):
    made = RuntimeFolder.make("1-ab")
    (made.shared / "server.yaml").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        made.write("server.yaml", "key")
    assert not (tmp_path / "elsewhere").exists()


def test_sockets_fit_into_the_servers_temporary_folder(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(runtime_folder, "SHARED_MEMORY", Path("/dev/shm"))
    here = RuntimeFolder("1234567-0123456789abcdef", *[Path("/tmp/tpcolocate-65534-1234567-0123456789abcdef")] * 3)
    assert here.server_temporary == here.temporary / "tmp"
    deep = RuntimeFolder("1-ab", Path("/dev/shm/tpcolocate-0-1-ab"), tmp_path / ("x" * 60), tmp_path)
    assert deep.server_temporary == deep.shared / "tmp"


def test_a_log_in_a_folder_that_cannot_be_made_is_an_error_that_leaves_nothing(folders):
    with pytest.raises(LaunchError, match="/proc/nowhere") as caught:
        RuntimeFolder.make("1-ab", log_path=Path("/proc/nowhere/server.log"))
    assert "log_path" in caught.value.hint
    assert os.listdir(folders[0]) == os.listdir(folders[1]) == []


@pytest.mark.parametrize("path", ["/dev/full", "/dev/null", "/dev/shm"])
def test_a_log_that_is_no_file_is_refused(folders, path):
    with pytest.raises(LaunchError, match=f"cannot be {path}") as caught:
        RuntimeFolder.make("1-ab", log_path=Path(path))
    assert "log_path" in caught.value.hint
    assert os.listdir(folders[0]) == os.listdir(folders[1]) == []


def attempts(*actions):
    """Return what each action raised, or its result."""
    found = []
    for action in actions:
        try:
            found.append(action())
        except OSError as error:
            found.append(type(error).__name__)
    return found


@as_root
def test_another_user_can_neither_read_nor_plant_nor_remove(folders):
    made = RuntimeFolder.make("1-ab")
    made.write("server.yaml", "key")
    made.log_path.write_text("log")
    names = [made.shared, made.temporary]

    def intrude():
        return attempts(
            *(lambda folder=folder: os.listdir(folder) for folder in names),
            lambda: (made.shared / "server.yaml").read_text(),
            lambda: made.log_path.read_text(),
            *(lambda folder=folder: os.symlink("/etc/passwd", folder / "announcement.json") for folder in names),
            *(lambda folder=folder: folder.rename(folder.with_name("mine")) for folder in names),
            *(lambda folder=folder: os.rmdir(folder) for folder in names),
        )

    assert as_another_user(intrude) == ["PermissionError"] * 10


@as_root
def test_what_another_user_makes_under_our_names_stops_and_delays_nothing(folders):
    """A folder, a link to a folder, and a pipe that would block a reader, all named as our launches are."""
    shared, _ = folders

    def plant():
        for name in ("1", "2"):
            folder = shared / f"tpcolocate-0-{name}"
            os.mkdir(folder, 0o777)
            os.mkfifo(folder / "owner.json", 0o666)
            os.mkfifo(folder / "announcement.json", 0o666)
        os.symlink(shared / "tpcolocate-0-1", shared / "tpcolocate-0-3")
        os.mkfifo(shared / "tpcolocate-0-4", 0o666)
        os.mkdir(shared / "tpcolocate-0", 0o777)

    as_another_user(plant)
    began = time.monotonic()
    assert list(runtime_folder.private_folders()) == []
    remove_remains()
    made = RuntimeFolder.make("1-ab")
    assert list(runtime_folder.private_folders()) == [made.shared]
    assert time.monotonic() - began < 30
    assert len(os.listdir(shared)) == 6, "nothing of theirs was touched"


# --- what dead owners have left --------------------------------------------------------------------------------------


LEFT = [f"{prefix}1_x" for prefix in LEFTOVER_PREFIXES]
"""Names that a supervisor has recorded of SGLang's files in /dev/shm."""


def process(code="import time; time.sleep(600)"):
    return subprocess.Popen([sys.executable, "-c", code])


def entry(name, child):
    return {"name": name, "pid": child.pid, "started": start_of(child.pid)}


@pytest.fixture
def left(folders):
    """Make the folders of a launch, as if by another process, with a supervisor and a process of the server."""
    children = []

    def make(nonce, *, owner, supervisor, server, **changes):
        made = RuntimeFolder.make(nonce)
        owner_record = OwnerRecord(
            owner.pid, start_of(owner.pid), pid_namespace(), nonce, str(made.temporary), str(made.log_path)
        )
        (made.shared / "owner.json").write_text(json.dumps(vars_of(replace(owner_record, **changes))))
        record = {"supervisor": entry("supervisor", supervisor), "processes": [entry("main process", server)]}
        made.processes.write_text(json.dumps(record | {"files": [*LEFT, "someone's", "../sgl_shm_y"]}))
        made.log_path.touch()
        return made

    def vars_of(record):
        return {name: getattr(record, name) for name in record.__slots__}

    def start(*args):
        children.append(process(*args))
        return children[-1]

    yield make, start
    for child in children:
        child.kill()
        child.wait()


def test_the_remains_of_a_dead_owner_are_removed_and_nothing_else(left, folders):
    make, start = left
    owner, supervisor, server, other = (start() for _ in range(4))
    dead = make("1-a", owner=owner, supervisor=supervisor, server=server)
    alive = make("2-b", owner=other, supervisor=other, server=other)
    shared, _ = folders
    for name in (*LEFT, "someone's"):
        (shared / name).touch()
    (shared.parent / "sgl_shm_y").touch()
    for child in (owner, supervisor):
        child.kill()
        child.wait()
    remove_remains()
    assert server.wait(30) == -signal.SIGKILL and other.poll() is None
    assert not dead.shared.exists() and not dead.temporary.exists()
    assert alive.shared.exists() and alive.log_path.exists()
    assert not any((shared / name).exists() for name in LEFT)
    assert (shared / "someone's").exists() and (shared.parent / "sgl_shm_y").exists()


def test_torchs_counts_of_handles_go_with_the_trainers_that_have_exited(left, folders):
    make, start = left
    owner, supervisor, server, other = (start() for _ in range(4))
    made = make("1-a", owner=owner, supervisor=supervisor, server=server)
    shared, _ = folders
    counts = {f"torch_{child.pid}_1_0": child for child in (owner, other)}
    entries = [{"file": name, "pid": child.pid, "started": start_of(child.pid)} for name, child in counts.items()]
    entries += [{**entries[0], "file": file} for file in (f"torch_{other.pid}_2_0", 5, f"torch_{owner.pid}_\0", "sgl")]
    entries += [{**entries[0], "started": None}, {"file": "torch_1_2_3"}, 5]
    record = json.loads(made.processes.read_text())
    made.processes.write_text(json.dumps(record | {"handle_counts": entries}))
    for name in (*counts, f"torch_{other.pid}_2_0"):
        (shared / name).touch()
    for child in (owner, supervisor):
        child.kill()
        child.wait()
    remove_remains()
    assert {path.name for path in shared.iterdir()} == {f"torch_{other.pid}_1_0", f"torch_{other.pid}_2_0"}


def test_an_owner_removes_what_its_killed_supervisor_has_left(left, folders):
    make, start = left
    supervisor, server, other = (start() for _ in range(3))
    made = make("1-a", owner=other, supervisor=supervisor, server=server)
    shared, _ = folders
    for name in (*LEFT, "someone's"):
        (shared / name).touch()
    supervisor.kill()
    supervisor.wait()
    made.remove()
    assert server.wait(30) == -signal.SIGKILL and other.poll() is None
    assert not made.shared.exists() and not any((shared / name).exists() for name in LEFT)
    assert (shared / "someone's").exists() and made.log_path.exists()


def test_a_supervisor_that_still_ends_its_server_is_waited_for(left):
    make, start = left
    owner, server = start(), start()
    supervisor = start("import time; time.sleep(1.5)")
    made = make("1-a", owner=owner, supervisor=supervisor, server=server)
    owner.kill()
    owner.wait()
    remove_remains()
    assert supervisor.wait(0) == 0, "it was not killed"
    assert not made.shared.exists()


def test_a_supervisor_that_does_not_end_is_killed(left):
    make, start = left
    owner, server, supervisor = start(), start(), start()
    make("1-a", owner=owner, supervisor=supervisor, server=server)
    owner.kill()
    owner.wait()
    remove_remains(timeout_s=0.3)
    assert supervisor.wait(30) == server.wait(30) == -signal.SIGKILL


def test_a_process_that_has_got_the_pid_of_a_dead_one_is_not_ended(left):
    make, start = left
    owner, supervisor, server = (start() for _ in range(3))
    made = make("1-a", owner=owner, supervisor=supervisor, server=server)
    record = json.loads(made.processes.read_text())
    record["processes"][0]["started"] -= 1
    record["supervisor"]["started"] -= 1
    made.processes.write_text(json.dumps(record))
    owner.kill()
    owner.wait()
    remove_remains()
    assert not made.shared.exists() and server.poll() is None and supervisor.poll() is None


ONE = {"name": "x", "pid": 1, "started": 1}


@pytest.mark.parametrize("name, content", [
    ("processes.json", {"processes": []}),
    ("processes.json", {"supervisor": None, "processes": None}),
    ("processes.json", {"supervisor": {"name": "x"}, "processes": []}),
    ("processes.json", {"supervisor": {**ONE, "pid": "1"}, "processes": []}),
    ("processes.json", {"supervisor": ONE, "processes": [5]}),
    ("processes.json", {"supervisor": ONE, "processes": [{**ONE, "started": None}]}),
    ("processes.json", {"supervisor": ONE, "processes": [], "files": [5, "sgl_shm_folder", "sgl_shm_\0"]}),
    ("processes.json", []),
    ("owner.json", {"pid": 2**22 + 1, "started": 1, "namespace": pid_namespace(), "nonce": "x", "temporary": 5, "log_path": ""}),
    ("owner.json", {"pid": "1", "started": 1, "namespace": pid_namespace(), "nonce": "x", "temporary": "/", "log_path": ""}),
    ("owner.json", {"pid": 1}),
])  # fmt: skip
def test_what_another_version_has_recorded_keeps_no_launch_from_its_start(left, folders, name, content):
    make, start = left
    owner = start()
    damaged = make("1-a", owner=owner, supervisor=owner, server=owner)
    (damaged.shared / name).write_text(json.dumps(content))
    (folders[0] / "sgl_shm_folder").mkdir()
    owner.kill()
    owner.wait()
    remove_remains(timeout_s=0.3)
    assert damaged.shared.exists() is (name == "owner.json"), "whose it is cannot be known"
    damaged.remove()


@pytest.mark.parametrize("change", [{"namespace": "pid:[1]"}])
def test_an_owner_in_another_container_is_not_taken_for_dead(left, change):
    make, start = left
    owner, supervisor, server = (start() for _ in range(3))
    made = make("1-a", owner=owner, supervisor=supervisor, server=server, **change)
    owner.kill()
    owner.wait()
    remove_remains()
    assert made.shared.exists() and server.poll() is None


def test_the_remains_of_a_container_that_has_ended_are_removed_once_nothing_holds_their_lock(left, folders):
    """It shared /dev/shm, and ended with all its processes, as where the trainer or torchrun is the first one in it."""
    make, start = left
    server = start()  # whose pid is of another process there
    made = make("1-a", owner=server, supervisor=server, server=server, namespace="pid:[1]")
    (folders[0] / LEFT[0]).touch()
    made.processes.write_text(json.dumps({"is_locked": True, **json.loads(made.processes.read_text())}))
    with open(made.processes, "rb") as held_by_its_supervisor:
        fcntl.flock(held_by_its_supervisor, fcntl.LOCK_SH)
        remove_remains()
        assert made.shared.exists()
    remove_remains()
    assert not made.shared.exists() and not made.temporary.exists() and not (folders[0] / LEFT[0]).exists()
    assert server.poll() is None
