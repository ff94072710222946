"""Private folders of one launch, which hold everything that a launch leaves on the machine while it runs.

Both are made for one launch, under a name that no other user can know before, with mode 0700::

    /dev/shm/tpcolocate-<uid>-<nonce>/     owner.json         who made it
                                           processes.json     the server's processes, written and locked by the supervisor
                                           server.yaml        the API key, until SGLang has read it
                                           announcement.json  for other processes, see `tpcolocate.rendezvous`
                                           *.sock, *.safetensors  of weight syncs
    <temporary folder>/tpcolocate-<uid>-<nonce>/
                                           server.log
                                           supervisor.log     errors of the supervisor itself
                                           tmp/               the server's own temporary files

The supervisor removes them when the server has ended; the log stays unless this library ended the server.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpcolocate.deadline import Deadline
from tpcolocate.errors import LaunchError
from tpcolocate.processes import pid_namespace, start_of, this_process
from tpcolocate.supervisor import LEFTOVER_PREFIXES

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
# sun_path holds 107 bytes; SGLang and multiprocessing append up to this many to the temporary folder.
_LONGEST_TEMPORARY = 107 - 48
# A supervisor whose trainer has died gives the server 15 s before it kills it.
_ENDS_S = 30.0
_POLL_INTERVAL_S = 0.1


def folder_of(nonce: str) -> Path:
    """Return the folder of a launch in /dev/shm."""
    return SHARED_MEMORY / f"tpcolocate-{os.getuid()}-{nonce}"


@dataclass(frozen=True, slots=True)
class OwnerRecord:
    """Contents of ``owner.json``.

    Attributes:
        pid: The owner's process.
        started: Its start in clock ticks since boot, see `tpcolocate.processes.start_of`.
        namespace: Its pid namespace.
        nonce: Identity of the launch.
        temporary: Its folder in the temporary folder.
        log_path: The server's log.
    """

    pid: int
    started: int
    namespace: str
    nonce: str
    temporary: str
    log_path: str

    @property
    def is_here(self) -> bool:
        """Whether its pids are valid in this process."""
        return self.namespace == pid_namespace()

    def is_running(self) -> bool:
        """Return whether the launch goes on, as far as this process can know.

        The owner lives; or, in another pid namespace, where that cannot be seen, the supervisor may still hold its lock.
        """
        return start_of(self.pid) == self.started if self.is_here else not _is_left(folder_of(self.nonce))


@dataclass(frozen=True, slots=True)
class RuntimeFolder:
    """The folders of one launch, on its owner.

    Attributes:
        nonce: Identity of the launch.
        shared: The one in /dev/shm.
        temporary: The one for the log and the server's temporary files.
        log_path: The server's log, in `temporary` or where the user wants it.
    """

    nonce: str
    shared: Path
    temporary: Path
    log_path: Path

    @classmethod
    def make(cls, nonce: str, *, log_path: Path | None = None) -> RuntimeFolder:
        """Make the folders of a launch.

        Args:
            nonce: Identity of the launch; unpredictable.
            log_path: The server's log; default: in the folder.

        Raises:
            LaunchError: They cannot be made, or the log would not be a file.
        """
        shared = folder_of(nonce)
        folders: list[Path] = []
        hint = f"make space in {SHARED_MEMORY} and in the temporary folder, or set TMPDIR to a folder of this user"
        try:
            temporary = Path(tempfile.gettempdir()) / shared.name
            made = cls(nonce, shared, temporary, temporary / "server.log" if log_path is None else log_path.absolute())
            made._check_log()
            for folder in (shared, temporary, made.server_temporary):
                folder.mkdir(mode=0o700)  # fails if there is one, even of this user
                folders.append(folder)
                folder.chmod(0o700)  # whatever the umask is
            made._record_owner()
            hint = "log_path must be in a folder that this user can write to"
            made.log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except BaseException as error:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            raise LaunchError(f"cannot make the files of the launch: {error}", hint=hint) from error
        return made

    def restore(self) -> bool:
        """Make `shared` anew if something else has removed it, and return whether it had.

        systemd removes what a user has in /dev/shm when the last of the user's logins to the machine ends (RemoveIPC), with the
        jobs that run on.  A sync needs a folder for its sockets.

        Raises:
            OSError: It cannot be made.
        """
        if self.shared.is_dir():
            return False
        for folder in (self.shared, self.server_temporary):
            folder.mkdir(mode=0o700, exist_ok=folder != self.shared)
            folder.chmod(0o700)
        self._record_owner()
        return True

    def _record_owner(self) -> None:
        pid, started = this_process()
        record = OwnerRecord(pid, started, pid_namespace(), self.nonce, str(self.temporary), str(self.log_path))
        self.write("owner.json", json.dumps(asdict(record)))

    def _check_log(self) -> None:
        if os.path.exists(self.log_path) and not os.path.isfile(self.log_path):
            # A pipe, a terminal or a device: its end cannot be read, and some have none.
            raise LaunchError(
                f"the server's log cannot be {self.log_path}, which is no file",
                hint="log_path= names a file, new or existing, whose end is shown when the server fails",
            )

    @property
    def server_temporary(self) -> Path:
        """The server's temporary folder: its sockets are there, so its path must be short."""
        folder = self.temporary / "tmp"
        return folder if len(os.fsencode(folder)) <= _LONGEST_TEMPORARY else self.shared / "tmp"

    @property
    def processes(self) -> Path:
        return self.shared / "processes.json"

    @property
    def supervisor_log(self) -> Path:
        return self.temporary / "supervisor.log"

    @property
    def has_default_log(self) -> bool:
        return self.log_path.parent == self.temporary

    def write(self, name: str, text: str) -> Path:
        """Make a file in `shared` that this user alone can read, and return its path.

        Raises:
            OSError: It exists, or there is no space.
        """
        path = self.shared / name
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
            file.write(text)
        return path

    def remove(self) -> None:
        """Remove all but the log, and end what is left of the server; the supervisor does that, unless it was killed."""
        _remove_server(self.shared)
        _remove(self.shared)
        _remove(self.temporary / "tmp")
        _remove_if_empty(self.supervisor_log)
        try:
            self.temporary.rmdir()
        except OSError:
            pass  # the log is in it


def is_private(folder: Path) -> bool:
    """Return whether this is a folder of this user that no other user can enter, and not a link to one."""
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def private_folders() -> Iterator[Path]:
    """Yield the folders in /dev/shm of all launches of this user."""
    for folder in sorted(SHARED_MEMORY.glob(f"tpcolocate-{os.getuid()}-*")):
        if is_private(folder):
            yield folder


def read_owner(folder: Path) -> OwnerRecord | None:
    """Read who made a folder; None if that is not recorded, or not as this version does it."""
    content = _read_json(folder / "owner.json")
    try:
        record = OwnerRecord(**content)
    except TypeError:
        return None
    texts = (record.namespace, record.nonce, record.temporary, record.log_path)
    are_texts = all(isinstance(text, str) and "\0" not in text for text in texts)
    return record if are_texts and _are_numbers(record.pid, record.started) else None


def read_processes(path: Path) -> list[dict[str, Any]]:
    """Read the supervisor and the server's processes, each with ``name``, ``pid`` and ``started``.

    None, if they are not recorded as this version does it: a launch must not fail for what another version has left.
    """
    content = _read_json(path)
    try:
        found = [content["supervisor"], *content["processes"]]
        is_ours = all(isinstance(one["name"], str) and _are_numbers(one["pid"], one["started"]) for one in found)
    except (TypeError, KeyError):
        return []
    return found if is_ours else []


def _read_files(path: Path) -> list[str]:
    """Read the names of the files in /dev/shm that the processes of a record have made."""
    names = _read_json(path).get("files")
    if not isinstance(names, list):
        return []
    return [name for name in names if isinstance(name, str) and name.startswith(LEFTOVER_PREFIXES) and "\0" not in name]


def _read_handle_counts(path: Path) -> list[str]:
    """Read the names of the files in which torch counted the handles of trainers that have exited."""
    entries = _read_json(path).get("handle_counts")
    found = []
    for entry in entries if isinstance(entries, list) else []:
        with suppress(TypeError, KeyError):
            name, pid, started = entry["file"], entry["pid"], entry["started"]
            if (
                isinstance(name, str)
                and _are_numbers(pid, started)
                and name.startswith(f"torch_{pid}_")
                and "\0" not in name
                and not _runs(entry)
            ):
                found.append(name)
    return found


def _are_numbers(*values: object) -> bool:
    return all(type(value) is int for value in values)


def _read_json(path: Path) -> dict[str, Any]:
    """Read a dict; an empty one if there is none."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def remove_remains(*, timeout_s: float = _ENDS_S) -> None:
    """Remove what launches of this user have left whose owners have died, such as ranks before an elastic restart.

    A supervisor that still ends its server is waited for, because the server holds its GPUs until then.  Processes are
    identified by pid, start time and pid namespace, so no other process is ended.

    Args:
        timeout_s: How long to wait for supervisors, in seconds.
    """
    deadline = Deadline.after(timeout_s)
    for folder in private_folders():
        owner = read_owner(folder)
        if owner is None or owner.is_running():
            continue
        logger.info("removing what the process %d has left in %s", owner.pid, folder)
        supervisor = read_processes(folder / "processes.json")[:1] if owner.is_here else []
        while any(map(_runs, supervisor)) and not deadline.has_passed:
            time.sleep(_POLL_INTERVAL_S)
        _remove_server(folder, is_here=owner.is_here)
        temporary = Path(owner.temporary)
        if is_private(temporary) and temporary.name == folder.name:
            _remove(temporary)
        _remove(folder)


def _is_left(folder: Path) -> bool:
    """Return whether the supervisor that has recorded the processes of a launch has ended, and with it the server.

    Its lock shows it, where its pid does not: a container that ends has all its processes killed, in the middle of their cleaning up.
    """
    path = folder / "processes.json"
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A supervisor that runs has a new one locked before it lets go of this one.
            is_last = os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except OSError:
        return False
    return is_last and _read_json(path).get("is_locked") is True  # other versions had no lock


def _remove_server(folder: Path, *, is_here: bool = True) -> None:
    """End the processes that a supervisor has recorded, and remove SGLang's files in /dev/shm, and torch's of dead trainers.

    Args:
        folder: Of the launch.
        is_here: Whether the recorded pids are valid in this process; the others are of processes that have ended.
    """
    record = folder / "processes.json"
    if is_here:
        _end(read_processes(record))
    for name in [*_read_files(record), *(_read_handle_counts(record) if is_here else ())]:
        if "/" not in name:
            with suppress(OSError):  # it is gone, or another user's
                (SHARED_MEMORY / name).unlink()


def _runs(process: dict[str, Any]) -> bool:
    return start_of(process["pid"]) == process["started"]


def _end(processes: list[dict[str, Any]]) -> None:
    for process in processes:
        try:
            if _runs(process) and os.stat(f"/proc/{process['pid']}").st_uid == os.getuid():
                os.kill(process["pid"], signal.SIGKILL)
        except OSError:
            pass  # it has exited


def _remove(folder: Path) -> None:
    if is_private(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_empty(path: Path) -> None:
    try:
        if path.stat().st_size == 0:
            path.unlink()
    except OSError:
        pass


__all__ = [
    "OwnerRecord",
    "RuntimeFolder",
    "folder_of",
    "is_private",
    "private_folders",
    "read_owner",
    "read_processes",
    "remove_remains",
]
