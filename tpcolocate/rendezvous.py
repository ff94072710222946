"""Rendezvous file: how processes find the server's URL without the slice's process group.

The owner broadcasts the URL over that group (`tpcolocate.launch`); the file is the fallback when the group fails, and
for processes outside of it.  It is in the launch's private folder in /dev/shm (`tpcolocate.runtime_folder`), so no other
user can read it, replace it or make one first.  It is written atomically, and is valid only while the process that wrote
it is alive and its server answers.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tpcolocate.deadline import Deadline
from tpcolocate.errors import ConfigError, LaunchError, RendezvousError, shown
from tpcolocate.processes import start_of
from tpcolocate.runtime_folder import folder_of, private_folders, read_owner

JOB_VARIABLE = "TPCOLOCATE_JOB"
_NAME = "announcement.json"
_POLL_INTERVAL_S = 0.05
_JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Announcement:
    """Contents of the file that the owner of a slice writes.

    Attributes:
        url: Base URL of the server.
        api_key: Its key; the reason why only its user may read the file.
        job: Identity of the job.
        slice_index: Number of the slice in its job.
        slice_ranks: Global ranks in tp order.
        pid: The owner's process.
        started: Its start in clock ticks since boot, see `start_of`.
        nonce: Identity of the launch.
        log_path: The server's log.
        model_folder: Where the owner has the served model on this machine, such as in its cache of the Hugging Face hub, which
            need not be that of other processes; empty if it is not on it.
        tokenizer_folder: Likewise of its tokenizer, if that is another one.
    """

    url: str
    api_key: str
    job: str
    slice_index: int
    slice_ranks: tuple[int, ...]
    pid: int
    started: int
    nonce: str
    log_path: str = ""
    model_folder: str = ""
    tokenizer_folder: str = ""

    def writer_is_running(self) -> bool:
        return start_of(self.pid) == self.started


def job_of(job: object, environ: Mapping[str, str]) -> str | None:
    """Return the name of a job that was passed, or else that in the environment; None if there is none.

    Raises:
        ConfigError: It is empty, too long or has other characters.
    """
    what = "job" if job is not None else JOB_VARIABLE
    name = job if job is not None else environ.get(JOB_VARIABLE)
    if name is None or (job is None and name == ""):  # a variable that is set to nothing is not set
        return None
    if not isinstance(name, str) or _JOB.fullmatch(name) is None:
        raise ConfigError(
            f"{what}={shown(name)} is not the name of a job",
            hint="use 1 to 64 letters, digits, dots, hyphens and underscores, the first a letter or a digit",
        )
    return name


def path_for(nonce: str) -> Path:
    """Return the path of a launch's announcement."""
    return folder_of(nonce) / _NAME


def announce(path: Path, announcement: Announcement) -> None:
    """Write the file atomically, with mode 0600.

    Raises:
        LaunchError: /dev/shm is full or not writable.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)  # mode 0600
        with os.fdopen(handle, "w") as file:
            json.dump(asdict(announcement), file)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise LaunchError(f"cannot write {path}: {error}", hint=f"make space in {path.parent.parent}") from error
        raise


def read(path: Path) -> Announcement | None:
    """Read an announcement; None if there is no file.

    Raises:
        RendezvousError: The file belongs to another user, is readable by others, or has another format.
    """
    try:
        # Whatever is in the folder: without O_NONBLOCK, opening a pipe would block.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RendezvousError(f"{path} cannot be read: {error}") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise RendezvousError(f"{path} is not a regular file", hint="it was not created by tpcolocate; remove it")
    with os.fdopen(handle, encoding="utf-8") as file:
        if status.st_uid != os.getuid():
            raise RendezvousError(
                f"{path} belongs to user id {status.st_uid}, not to {os.getuid()}",
                hint="remove it, or ask that user to",
            )
        if status.st_mode & 0o077:
            raise RendezvousError(
                f"{path} is accessible to others (mode {stat.S_IMODE(status.st_mode):o})",
                hint="its mode was changed; remove it",
            )
        try:
            return parse(file.read())
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise RendezvousError(
                f"{path} is not an announcement of this version: {error}",
                hint="remove it, or use one version of tpcolocate",
            ) from error


def parse(text: str) -> Announcement:
    """Return the announcement in a file's text.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: It is something else.
    """
    fields: dict[str, Any] = json.loads(text)
    found = Announcement(**{**fields, "slice_ranks": tuple(fields["slice_ranks"])})
    for name in ("url", "api_key", "job", "nonce"):
        value = getattr(found, name)
        if not (isinstance(value, str) and value.isascii() and value.isprintable()):
            raise TypeError(f"{name} is not text of one line")
    for number in (found.pid, found.started, found.slice_index, *found.slice_ranks):
        if type(number) is not int or not 0 <= number < 2**63:
            raise TypeError("pid, started, slice_index or slice_ranks are not numbers")
    for name in ("log_path", "model_folder", "tokenizer_folder"):
        value = getattr(found, name)
        if not isinstance(value, str) or "\0" in value:
            raise TypeError(f"{name} is not a path")
    address = urlsplit(found.url)
    if address.scheme != "http" or not address.hostname or not address.port:
        raise ValueError("url is not the address of a server")
    return found


def wait(
    path: Path,
    *,
    nonce: str,
    is_healthy: Callable[[Announcement], bool],
    timeout_s: float,
) -> Announcement:
    """Wait for the announcement of one launch, by a live owner, with a server that answers.

    Args:
        path: From `path_for`.
        nonce: Identity of the launch; others are ignored.
        is_healthy: Checks the server; called only if all else is valid.
        timeout_s: In seconds; should exceed the owner's health timeout.

    Raises:
        RendezvousError: No valid announcement in time; the message has the reason.
    """
    deadline = Deadline.after(timeout_s)
    while True:
        announcement = read(path)
        if announcement is None:
            problem = "there is no file"
        elif announcement.nonce != nonce:
            problem = "it is of another launch"
        elif not announcement.writer_is_running():
            problem = f"its writer (pid {announcement.pid}) has exited"
        elif not is_healthy(announcement):
            problem = f"the server at {announcement.url} does not answer"
        else:
            return announcement
        if deadline.has_passed:
            raise RendezvousError(
                f"the server was not found within {timeout_s:g} s: {problem} ({path})",
                hint="see the output of the owner, the rank on the lowest GPU of the server",
            )
        time.sleep(_POLL_INTERVAL_S)


def discover(job: str | None = None) -> list[tuple[Path, Announcement]]:
    """Return this user's announcements whose writers are alive; folders that others can enter are ignored.

    Args:
        job: Return those of one job only.
    """
    found = []
    for folder in private_folders():
        path = folder / _NAME
        try:
            announcement = read(path)
        except RendezvousError:
            continue  # read() raises it for its path
        if announcement is not None and job in (None, announcement.job) and _runs(folder, announcement):
            found.append((path, announcement))
    return found


def _runs(folder: Path, announcement: Announcement) -> bool:
    owner = read_owner(folder)
    if owner is None or owner.is_here:
        return announcement.writer_is_running()
    return owner.is_running()  # in another container, whose pids are its own


__all__ = ["JOB_VARIABLE", "Announcement", "announce", "discover", "job_of", "parse", "path_for", "read", "wait"]
