"""How the owner's URL reaches those who did not hear it over the group.

The broadcast over the slice's group comes first (`tpcolocate.session`); the file here is the fallback when that
group fails, and the way in for processes outside of it.  It lies in /dev/shm, belongs to one user and one launch, is
readable by that user alone, appears complete or not at all, and is believed only while the process that wrote it
lives and its server answers.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpcolocate.errors import RendezvousError
from tpcolocate.processes import start_of

_FOLDER = Path("/dev/shm")
_POLL_INTERVAL_S = 0.05


@dataclass(frozen=True, slots=True)
class Announcement:
    """What the owner of a slice tells the world.

    Attributes:
        url: Base URL of the server.
        api_key: Its key; the reason why the file is readable by its user alone.
        job: Identity of the job, shared by all its ranks and by nobody else.
        slice_ranks: Global ranks in tp order.
        pid: The owner's process.
        started: Its start in clock ticks since boot, see `start_of`.
        nonce: Made anew for every launch: an announcement of an earlier launch never passes for this one's.
    """

    url: str
    api_key: str
    job: str
    slice_ranks: tuple[int, ...]
    pid: int
    started: int
    nonce: str

    def writer_is_running(self) -> bool:
        return start_of(self.pid) == self.started


def path_for(job: str, slice_index: int) -> Path:
    """Where the announcement of a slice lies; the user id keeps two users' jobs apart."""
    return _FOLDER / f"tpcolocate-{os.getuid()}-{job}-{slice_index}.json"


def announce(path: Path, announcement: Announcement) -> None:
    """Write the file at once or not at all, mode 0600, replacing what an earlier launch left.

    Raises:
        OSError: /dev/shm is full or not writable.
    """
    handle, temporary = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(asdict(announcement), file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: Path) -> Announcement | None:
    """The announcement, or None if there is none.

    Raises:
        RendezvousError: The file is another user's, readable by others, or not ours in form.
    """
    try:
        # Anybody may put anything under this name in /dev/shm: opening a pipe would block without O_NONBLOCK.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RendezvousError(f"{path} cannot be read: {error}") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise RendezvousError(f"{path} is no regular file", hint="it is not ours; remove it")
    with os.fdopen(handle, encoding="utf-8") as file:
        if status.st_uid != os.getuid():
            raise RendezvousError(
                f"{path} belongs to user id {status.st_uid}, not to {os.getuid()}", hint="it is not ours; remove it"
            )
        if status.st_mode & 0o077:
            raise RendezvousError(
                f"{path} is accessible to others (mode {stat.S_IMODE(status.st_mode):o})",
                hint="somebody changed it; remove it",
            )
        try:
            fields: dict[str, Any] = json.load(file)
            return Announcement(**{**fields, "slice_ranks": tuple(fields["slice_ranks"])})
        except (ValueError, TypeError, KeyError) as error:
            raise RendezvousError(
                f"{path} is no announcement of this version: {error}",
                hint="remove it, or use one version of tpcolocate",
            ) from error


def wait(
    path: Path,
    *,
    nonce: str,
    is_healthy: Callable[[Announcement], bool],
    timeout_s: float,
) -> Announcement:
    """Wait for the announcement of one particular launch, from a live owner, with a server that answers.

    Args:
        path: From `path_for`.
        nonce: The launch that is meant; others are ignored, however fresh.
        is_healthy: Asks the server; called only for an announcement that passed all else.
        timeout_s: Give a margin over the owner's own health budget, in seconds.

    Raises:
        RendezvousError: Nothing acceptable appeared in time; the message says what was seen last.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        announcement = read(path)
        if announcement is None:
            seen = "there is no file"
        elif announcement.nonce != nonce:
            seen = "it is of another launch"
        elif not announcement.writer_is_running():
            seen = f"its writer (pid {announcement.pid}) is gone"
        elif not is_healthy(announcement):
            seen = f"the server at {announcement.url} does not answer"
        else:
            return announcement
        if time.monotonic() >= deadline:
            raise RendezvousError(
                f"no usable announcement in {path} within {timeout_s:g} s: {seen}",
                hint="the owner's output has the reason",
            )
        time.sleep(_POLL_INTERVAL_S)


def discover(job: str | None = None) -> list[tuple[Path, Announcement]]:
    """This user's announcements whose writers live, for processes outside the group.

    Args:
        job: Only those of one job.
    """
    found = []
    for path in sorted(_FOLDER.glob(f"tpcolocate-{os.getuid()}-*.json")):
        try:
            announcement = read(path)
        except RendezvousError:
            continue  # not ours to judge here; read() by path tells
        if announcement is not None and announcement.writer_is_running() and job in (None, announcement.job):
            found.append((path, announcement))
    return found


def withdraw(path: Path, nonce: str) -> None:
    """Remove the announcement of one launch, and never that of a later one."""
    try:
        announcement = read(path)
    except RendezvousError:
        return
    if announcement is not None and announcement.nonce == nonce:
        path.unlink(missing_ok=True)


__all__ = ["Announcement", "announce", "discover", "path_for", "read", "wait", "withdraw"]
