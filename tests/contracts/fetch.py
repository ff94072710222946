"""Download and unpack the wheels of the releases that are contract-tested, without their dependencies.

Run by ``make contracts``.  Needs an index the first time, and later only to find newer releases; without one the newest
that was fetched is used.  Standard library and pip only.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".contracts"
WHEELS = CACHE / "wheels"
NEWEST = CACHE / "newest"
PINNED = ("0.5.9", "0.5.12", "0.5.14", "0.5.17")
INSTALLED = ("0.5.20", "0.5.21")
"""Installed in the environment, because other tests run them; see scripts/make_venv.py."""
TRL_PINNED = ("1.8.0", "1.14.2", "1.15.0")
TRL_INSTALLED = "1.16.0"
"""As requirements/tools.txt pins it."""
_TIMEOUT_S = 600


def folder_of(version: str, *, project: str = "sglang") -> Path:
    """Return the folder of a fetched release."""
    return CACHE / f"{project}-{version}"


def newest(*, project: str = "sglang") -> str | None:
    """Return the version of the newest release that was fetched; None before the first fetch."""
    noted = _newest_file(project)
    return noted.read_text().strip() if noted.exists() else None


def _newest_file(project: str) -> Path:
    return NEWEST if project == "sglang" else NEWEST.with_name(f"newest-{project}")


def main() -> None:
    WHEELS.mkdir(parents=True, exist_ok=True)
    fetch("sglang", PINNED, INSTALLED)
    fetch("trl", TRL_PINNED, (TRL_INSTALLED,))


def fetch(project: str, pinned: tuple[str, ...], installed: tuple[str, ...]) -> None:
    """Download and unpack the pinned releases of a project, and its newest one."""
    for version in pinned:
        if not folder_of(version, project=project).is_dir():
            _unpack(_download(f"{project}=={version}"))
    try:
        wheel = _download(project)
    except subprocess.SubprocessError as error:
        if newest(project=project) is None:
            raise
        print(f"The index cannot be reached ({error}): using {newest(project=project)} as the newest release")
        return
    version = wheel.name.split("-")[1]
    if version not in installed:
        _unpack(wheel)
    _newest_file(project).write_text(version + "\n")
    print(f"Contracts: {project} {', '.join(dict.fromkeys([*pinned, *installed, version]))} ({version} is the newest)")


def _download(requirement: str) -> Path:
    """Download one wheel by pip, if it is not there yet."""
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--progress-bar", "off", "--dest", str(WHEELS), requirement]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        print(done.stdout + done.stderr)
        done.check_returncode()
    # "Saved ./x.whl", or "File was already downloaded /somewhere/x.whl"
    lines = (line.strip() for line in done.stdout.splitlines())
    [line] = [
        line for line in lines if line.startswith(("Saved ", "File was already downloaded ")) and line.endswith(".whl")
    ]
    return WHEELS / Path(line.split()[-1]).name


def _unpack(wheel: Path) -> None:
    project, version = wheel.name.split("-")[:2]
    folder = folder_of(version, project=project)
    if folder.is_dir():
        return
    part = folder.with_name(folder.name + ".part")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(part)
    part.rename(folder)  # atomic


if __name__ == "__main__":
    main()
