"""What is built and uploaded is whole: the wheel works outside of the checkout, and the sdist can run its own tests."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "docs", "examples", "requirements", "scripts", "tests", "tpcolocate")
FILES = (
    "CHANGELOG.md",
    "Dockerfile",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "mkdocs.yml",
    "pyproject.toml",
    "setup.cfg",
)
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def sources(*folders):
    """Files of the checkout that belong to the project, relative to its root."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = [path.relative_to(ROOT) for path in found if path.suffix not in (".pyc", ".pyo")]
    return {
        str(name) for name in names if "__pycache__" not in name.parts and name.parts[:2] != ("benchmarks", "results")
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist of a copy of the checkout."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in (*FILES, *sources(*FOLDERS)):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for kind in ("build_wheel", "build_sdist"):
        subprocess.run(
            [sys.executable, "-c", BUILD, kind, str(folder)], cwd=source, check=True, capture_output=True, timeout=120
        )
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.mark.slow
def test_the_wheel_works_outside_of_the_checkout(built, tmp_path):
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path / "site")
    code = (
        "import pathlib, tpcolocate; from tpcolocate.server import environment as e;"
        "print(pathlib.Path(tpcolocate.__file__).parent, tpcolocate.__version__, e._CPU_STUB.is_dir(),"
        " (e._IN_SERVER / 'tpcolocate_receiver' / '__init__.py').is_file())"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, capture_output=True, text=True, timeout=120
    )
    where, version, *there = ran.stdout.split()
    assert Path(where) == tmp_path / "site" / "tpcolocate"
    assert version in built[0].name and there == ["True", "True"]


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == sources("tpcolocate")


def test_the_sdist_has_what_its_tests_and_targets_need(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert not {*FILES, *sources(*FOLDERS)} - names
