"""Imports go down only, and a light import stays light."""

import ast
import subprocess
import sys
import types
from pathlib import Path

import pytest

import tpcolocate

pytestmark = pytest.mark.quick

PACKAGE = Path(tpcolocate.__file__).parent
TOP = "__init__"
# Top to bottom.  A room may import those on the floors below it; rooms on one floor do not know each other.
# A sub-package is one room, whose modules may import their siblings.
FLOORS = (
    {TOP},
    {"session", "doctor"},
    {"engine", "launch"},
    {"server", "weights", "rendezvous"},
    {"agreement", "placement"},
    {"groups", "roles", "ipc_payload", "worker_errors"},
    {"devices", "report", "in_server", "parallel", "processes", "deadline"},
    {"errors", "_version"},
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
# Not modules of the package: put on the PYTHONPATH of another process.
NOT_MODULES = {("server", "cpu_stub")}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[:2] not in NOT_MODULES)


def room_of(path):
    """The room of a file of the package: its sub-package, or its own name."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imported_rooms(source, path):
    """Yields (line, room) for every import of this package, wherever in the file it stands."""
    package = ("tpcolocate",) + path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            # "from tpcolocate import x" is the room x if there is one, and otherwise a name of the top.
            names = [base + (alias.name,) for alias in node.names] if base == ("tpcolocate",) else [base]
        for name in names:
            if name[0] == "tpcolocate":
                yield node.lineno, name[1] if len(name) > 1 and _exists(name[1]) else TOP


def _exists(room):
    return room in FLOOR_OF or (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()


def faults(source, path):
    """Describes the imports of a file that do not go down."""
    room = room_of(path)
    found = []
    for line, target in imported_rooms(source, path):
        if target == room and path.parent != PACKAGE:
            continue
        if target not in FLOOR_OF or FLOOR_OF[target] <= FLOOR_OF[room]:
            found.append(f"{path.relative_to(PACKAGE)}:{line}: {room} imports {target}, which is not on a floor below")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_room_has_its_floor_and_imports_go_down_only(path):
    assert room_of(path) in FLOOR_OF, (
        f"{path.relative_to(PACKAGE)} is new: place it on a floor in {Path(__file__).name}, FLOORS"
    )
    assert faults(path.read_text(), path) == []


@pytest.mark.parametrize("file, source, rooms", [
    ("roles.py", "import torch, os.path", []),
    ("roles.py", "from tpcolocate.errors import DeviceError", ["errors"]),
    ("roles.py", "from .errors import DeviceError", ["errors"]),
    ("roles.py", "from . import errors, devices", ["errors", "devices"]),
    ("roles.py", "import tpcolocate.devices as d", ["devices"]),
    ("roles.py", "import tpcolocate", [TOP]),
    ("roles.py", "from tpcolocate import init", [TOP]),
    ("roles.py", "def f():\n  from tpcolocate import groups", ["groups"]),
    ("roles.py", "if TYPE_CHECKING:\n  from .groups import Slice", ["groups"]),
    ("server/process.py", "from .http import Client", ["server"]),
    ("server/process.py", "from . import http", ["server"]),
    ("server/process.py", "from .. import errors", ["errors"]),
    ("server/process.py", "from ..weights.sync.syncer import plan", ["weights"]),
    ("server/process.py", "from tpcolocate.server import http", ["server"]),
    ("server/process.py", "from ..session import init", ["session"]),
])  # fmt: skip
def test_imports_are_found_however_they_are_written(file, source, rooms):
    assert [room for _, room in imported_rooms(source, PACKAGE / file)] == rooms


@pytest.mark.parametrize("file, source, good", [
    ("server/process.py", "from .client import Client", True),
    ("server/process.py", "from ..roles import Role", True),
    ("server/process.py", "from ..weights import sync", False),
    ("weights/sync/syncer.py", "from ...server import http", False),
    ("rendezvous.py", "from .server import http", False),
    ("groups.py", "from . import roles", False),
    ("groups.py", "from . import devices", True),
    ("devices.py", "from . import report", False),
    ("devices.py", "from .errors import DeviceError", True),
    ("errors.py", "import tpcolocate", False),
    ("session.py", "from . import server, weights, rendezvous, groups, errors", True),
    ("session.py", "from .doctor import main", False),
    ("__init__.py", "from .session import init", True),
])  # fmt: skip
def test_only_imports_that_go_down_pass(file, source, good):
    assert (faults(source, PACKAGE / file) == []) is good


def test_all_is_exactly_the_public_names():
    exported = getattr(tpcolocate, "__all__", [])
    public = {
        name for name in dir(tpcolocate)
        if not name.startswith("_") and not isinstance(getattr(tpcolocate, name), types.ModuleType)
    } - {"annotations"}  # what "from __future__ import annotations" leaves  # fmt: skip
    assert len(exported) == len(set(exported))
    assert {name for name in exported if not name.startswith("__")} == public
    assert all(hasattr(tpcolocate, name) for name in exported)


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_importing_it_brings_neither_sglang_nor_transformers_nor_a_cuda_context():
    script = (
        "import sys, threading, tpcolocate\n"
        "assert not {'sglang', 'transformers'} & set(sys.modules), 'heavy'\n"
        "assert 'torch' not in sys.modules or not sys.modules['torch'].cuda.is_initialized(), 'cuda'\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
