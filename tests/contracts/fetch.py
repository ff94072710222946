"""Fetches the wheels of the releases that are contract-tested, without their dependencies, and unpacks them.

Run by ``make contracts``.  Needs an index the first time, and afterwards only to hear of a newer release; without one
the newest that is already there counts.  Standard library and pip only.
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
"""In the environment already, because they run for real; see scripts/make_venv.py."""
_TIMEOUT_S = 600


def folder_of(version: str) -> Path:
    """Where a fetched release lies unpacked."""
    return CACHE / f"sglang-{version}"


def newest() -> str | None:
    """Version of the newest release that was fetched; None before the first fetch."""
    return NEWEST.read_text().strip() if NEWEST.exists() else None


def main() -> None:
    WHEELS.mkdir(parents=True, exist_ok=True)
    for version in PINNED:
        if not folder_of(version).is_dir():
            _unpack(_download(f"sglang=={version}"))
    try:
        wheel = _download("sglang")
    except subprocess.SubprocessError as error:
        if newest() is None:
            raise
        print(f"The index cannot be asked for a newer release ({error}): {newest()} counts as the newest")
        return
    version = wheel.name.split("-")[1]
    if version not in INSTALLED:
        _unpack(wheel)
    NEWEST.write_text(version + "\n")
    print(f"Contracts: SGLang {', '.join(dict.fromkeys([*PINNED, *INSTALLED, version]))} ({version} is the newest)")


def _download(requirement: str) -> Path:
    """One wheel by pip, or what an earlier call has left of it."""
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
    folder = folder_of(wheel.name.split("-")[1])
    if folder.is_dir():
        return
    part = folder.with_name(folder.name + ".part")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(part)
    part.rename(folder)  # complete or not there at all


if __name__ == "__main__":
    main()
