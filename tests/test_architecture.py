"""Imports go down through layers, no class is too wide, and a light import stays light."""

import ast
import functools
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest

import tpcolocate

pytestmark = pytest.mark.quick

PACKAGE = Path(tpcolocate.__file__).parent
# The layers of every package, top to bottom.  A module may import modules of the layers below it; modules in the same
# layer must not import each other.  A sub-package counts as one module; its own layers are listed separately.
# An `__init__` is above all layers of its package.
LAYERS = {
    "": (
        {"__main__"},
        {"bench"},
        {"doctor", "plot", "trl", "hf"},
        {"session", "discovery", "metrics"},
        {"engine", "launch"},
        {"launch_request"},
        {"server", "weights", "rendezvous"},
        {"agreement", "placement"},
        {"rounds"},
        {"groups", "roles", "ipc_payload", "runtime_folder"},
        {
            "checks",
            "devices",
            "interfaces",
            "presence",
            "recorder",
            "report",
            "parallel",
            "processes",
            "deadline",
            "worker_errors",
            "garbage",
            "modes",
        },
        {"errors", "in_server", "supervisor", "_version"},
    ),
    "trl": (
        {"engines"},
        {"generation", "replacement"},
        {"arguments"},
    ),
    "bench": (
        {"command"},
        {"measure", "page"},
        {"results", "common_way"},
    ),
    "doctor": (
        {"command"},
        {"page", "gather", "probe"},
        {"findings", "leftovers"},
        {"facts"},
    ),
    "server": (
        {"weight_updates"},
        {"generation"},
        {"api", "process"},
        {"arguments", "channel"},
        {"http", "releases", "installed", "environment", "lifecycle", "model_folder"},
        {"connections", "evidence"},
    ),
    "engine": (
        {"engine"},
        {"adapters", "checkpoints", "generation", "life", "memory", "update_groups"},
        {"context"},
        {"client"},
        {"requests"},
        {"prompts", "sampling"},
        {"limits", "values"},
    ),
    "weights": (
        {"sync"},
        {"transport"},
        {"plan", "lora", "update_group"},
        {"sources"},
        {"buckets"},
    ),
    "weights.sources": (
        {"checkpoint", "fingerprint"},
        {"named_weights", "model_spec"},
        {"peft_merge", "hf_names", "fsdp1", "zero3", "rename_hint"},
        {"low_rank", "nonfinite"},
        {"coalesced_gather", "low_rank_kernel"},
        {"addition"},
        {"lazy_tensor", "tensor_references", "wrapper_names"},
    ),
    "weights.plan": (
        {"transfer_plan"},
        {"loader_map", "sharding"},
        {"slices"},
    ),
    "weights.transport": (
        {"staging", "bucket_sender"},
        {"connection", "checksums", "mapped_memory"},
        {"mesh", "memory"},
    ),
    "weights.sync": (
        {"syncer"},
        {"pipeline"},
        {"opening", "trace", "transfer", "finish", "preflight"},
        {"mapping", "prepare"},
        {"mesh_calls", "completeness", "buckets", "route"},
        {"replicas"},
        {"session"},
        {"records", "mesh_schedule"},
        {"options", "progress"},
    ),
    "in_server": ({"tpcolocate_receiver"},),
    "in_server.tpcolocate_receiver": (
        {"session"},
        {"dry_run", "copy_program", "load_bucket"},
        {"copy_plan", "kernels"},
        {"triton_kernel", "loader_trace"},
        {"kernel_tables"},
        {"checksums", "regions", "replay", "module_walk", "handles", "protocol"},
    ),
}
# Put on the PYTHONPATH of another process as it is; not a package.
NOT_A_PACKAGE = "server/cpu_stub"
MAX_METHODS, MAX_ATTRIBUTES = 25, 12
WIDE_ON_PURPOSE = {"Engine", "Colocation"}  # public

# --- imports --------------------------------------------------------------------------------------------------------


def modules_below(package):
    """Return dotted name -> path for every module of a package; a package stands for its `__init__`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        if not path.relative_to(package).as_posix().startswith(NOT_A_PACKAGE):
            parts = path.relative_to(package).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports_of(source, module, modules, *, is_package=False):
    """Yield (line, module) for every import from this package, wherever in the file it is, TYPE_CHECKING included."""
    parts = module.split(".") if module else []
    package = ["tpcolocate", *(parts if is_package else parts[:-1])]
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        for name in names:
            if name[0] == "tpcolocate":
                # "from tpcolocate import x" is the module x if there is one, and otherwise a name in __init__.
                target = ".".join(name[1:])
                if isinstance(node, ast.ImportFrom) and target not in modules:
                    target = ".".join(name[1:-1])
                yield node.lineno, target


def goes_down(module, target, layers):
    """Whether an import leads from a layer to one below it, in the innermost package that has both modules."""
    here, there = module.split("."), target.split(".")
    shared = 0
    while shared < min(len(here), len(there)) and here[shared] == there[shared]:
        shared += 1
    if module in ("", ".".join(there[:shared])):
        return True  # an __init__, and something in its package
    if target in ("", ".".join(here[:shared])):
        return False  # the __init__ of a package that the module is in
    of_package = layers[".".join(here[:shared])]
    number = {name: n for n, layer in enumerate(of_package) for name in layer}
    return number.get(there[shared], -1) > number.get(here[shared], -1)


def cycles_of(edges):
    """Return the sets of modules that import each other, directly or not."""
    reached = {}
    for start in edges:
        found, new = set(), [start]
        while new:
            for target in edges.get(new.pop(), ()):
                if target not in found:
                    found.add(target)
                    new.append(target)
        reached[start] = found
    return {
        frozenset(other for other in reached[module] if module in reached.get(other, ()))
        for module in edges
        if module in reached[module]
    }


MODULES = modules_below(PACKAGE)


@functools.cache  # not where it is imported: a second, in each process of the tests
def all_imports():
    """Return module -> (line, module) of each of its imports."""
    return {
        module: list(imports_of(path.read_text(), module, MODULES, is_package=path.name == "__init__.py"))
        for module, path in MODULES.items()
    }


def test_every_module_has_its_layer_and_every_layer_its_modules():
    inside = defaultdict(set)
    for module in MODULES:
        if module:
            package, _, name = module.rpartition(".")
            inside[package].add(name)
    placed = {package: set().union(*layers) for package, layers in LAYERS.items()}
    assert placed == dict(inside), f"place new modules in LAYERS of {Path(__file__).name}, and remove old ones"
    assert all(sum(map(len, layers)) == len(placed[package]) for package, layers in LAYERS.items()), "named twice"


def test_imports_go_down_only():
    upward = {
        (module, target): f"{MODULES[module].relative_to(PACKAGE)}:{line}: {module} imports {target or 'tpcolocate'}"
        for module, imports in all_imports().items()
        for line, target in imports
        if not goes_down(module, target, LAYERS)
    }
    assert list(upward.values()) == [], "not in a layer below"


def test_no_modules_import_each_other():
    assert not cycles_of({name: {target for _, target in imports} for name, imports in all_imports().items()})


def test_what_runs_in_the_server_imports_nothing_else_of_the_package():
    outside = {
        target
        for module, imports in all_imports().items()
        for _, target in imports
        if module.startswith("in_server") and not target.startswith("in_server.")
    }
    assert outside == set()


@pytest.mark.parametrize("module, source, found", [
    ("roles", "import torch, os.path", []),
    ("roles", "from tpcolocate.errors import DeviceError", ["errors"]),
    ("roles", "from .errors import DeviceError", ["errors"]),
    ("roles", "from . import errors, devices", ["errors", "devices"]),
    ("roles", "import tpcolocate.devices as d", ["devices"]),
    ("roles", "import tpcolocate", [""]),
    ("roles", "from tpcolocate import init", [""]),
    ("roles", "def f():\n  from tpcolocate import groups", ["groups"]),
    ("roles", "if TYPE_CHECKING:\n  from .groups import Slice", ["groups"]),
    ("a.x", "from .y import Y", ["a.y"]),
    ("a.x", "from . import y, name", ["a.y", "a"]),
    ("a.x", "from .. import errors", ["errors"]),
    ("a.x", "from ..b.c.z import name", ["b.c.z"]),
    ("b.c.z", "from ...a import x", ["a.x"]),
    ("b.c", "from .z import name", ["b.c.z"]),
])  # fmt: skip
def test_imports_are_found_however_they_are_written(module, source, found):
    modules = {"", "errors", "devices", "groups", "roles", "a", "a.x", "a.y", "b", "b.c", "b.c.z"}
    assert [target for _, target in imports_of(source, module, modules, is_package=module == "b.c")] == found


@pytest.mark.parametrize("module, target, good", [
    ("top", "low", True),
    ("low", "top", False),
    ("low", "beside", False),
    ("top", "a", True),
    ("a.high", "low", True),
    ("a.high", "a.deep", True),
    ("a.deep", "a.high", False),
    ("a.deep", "a.same", False),
    ("a.deep", "b.any", False),
    ("b.any", "a.deep", True),
    ("a.deep", "a", False),
    ("a", "a.deep", True),
    ("b.any", "a", True),
    ("low", "", False),
    ("", "top", True),
    ("new", "low", True),
    ("top", "new", False),
])  # fmt: skip
def test_only_imports_that_go_down_pass(module, target, good):
    layers = {"": ({"top"}, {"b"}, {"a"}, {"low", "beside"}), "a": ({"high"}, {"deep", "same"})}
    assert goes_down(module, target, layers) is good


def test_cycles_are_found():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"e"}, "e": {"f"}, "f": {"d"}, "g": {"a"}}
    assert cycles_of(edges) == {frozenset("bc"), frozenset("def")}


# --- torch --------------------------------------------------------------------------------------------------------


FACTORIES = frozenset(
    "arange as_tensor asarray empty empty_strided eye full linspace ones rand randint randn randperm scalar_tensor tensor zeros".split()
)


def factories_without_device(source):
    """Return the lines that make a tensor wherever the caller's default device is."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in FACTORIES
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]


def test_tensors_are_made_on_a_device_that_is_named():
    found = {module: factories_without_device(path.read_text()) for module, path in MODULES.items()}
    assert {module: lines for module, lines in found.items() if lines} == {}, "a script may have set a default device"


@pytest.mark.parametrize("source, lines", [
    ("torch.zeros(1)", [1]),
    ("torch.zeros(1, device=device)", []),
    ("x = 1\ny.f(torch.tensor([x]).to(device))", [2]),
    ("torch.empty_like(x)", []),
    ("np.zeros(1)", []),
])  # fmt: skip
def test_factories_without_a_device_are_found(source, lines):
    assert factories_without_device(source) == lines


# --- classes --------------------------------------------------------------------------------------------------------


def name_of(base):
    """Return the last part of a class's base as it is written."""
    if isinstance(base, ast.Subscript):
        return name_of(base.value)
    return base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "?")


class Class:
    """What a class body defines: its methods, and the attributes that it declares or sets on `self`."""

    def __init__(self, node):
        self.bases = [name_of(base) for base in node.bases]
        self.methods = {each.name for each in node.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))}
        self.attributes = {
            each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        } | {
            each.attr for each in ast.walk(node)
            if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and name_of(each.value) == "self"
        }  # fmt: skip
        self.is_record = any("frozen=True" in ast.unparse(each) for each in node.decorator_list) or bool(
            {"NamedTuple", "Protocol"} & set(self.bases)
        )


def classes_in(sources):
    """Return name -> `Class`."""
    nodes = (node for source in sources for node in ast.walk(ast.parse(source)))
    return {node.name: Class(node) for node in nodes if isinstance(node, ast.ClassDef)}


def family(name, classes):
    """Return the names of a class and of all its bases."""
    bases = classes[name].bases if name in classes else []
    return {name}.union(*(family(base, classes) for base in bases if base != name))


def too_wide(classes):
    """Return the names of classes with too many methods, and with too many attributes, inherited ones counted."""
    methods, attributes = set(), set()
    for name in set(classes) - WIDE_ON_PURPOSE:
        names = family(name, classes)
        if any(each.endswith(("Error", "Exception")) for each in names):
            continue
        known = [classes[each] for each in names if each in classes]
        if len(set().union(*(each.methods for each in known))) > MAX_METHODS:
            methods.add(name)
        if not classes[name].is_record and len(set().union(*(each.attributes for each in known))) > MAX_ATTRIBUTES:
            attributes.add(name)
    return methods, attributes


def test_no_class_is_too_wide():
    methods, attributes = too_wide(classes_in(path.read_text() for path in MODULES.values()))
    assert not methods
    assert not attributes


@pytest.mark.parametrize("base, own, head, found", [
    (20, 5, "class B(A):", False),
    (20, 6, "class B(A):", True),
    (20, 6, "class B(module.A[int]):", True),
    (20, 6, "class B(Exception):", False),
    (20, 6, "class Engine(A):", False),
])  # fmt: skip
def test_methods_are_counted_with_inherited_ones(base, own, head, found):
    def bodies(prefix, count):
        return "".join(f"  def {prefix}{n}(self): ...\n" for n in range(count))

    methods, _ = too_wide(classes_in([f"class A:\n{bodies('a', base)}", f"{head}\n{bodies('a', 1)}{bodies('b', own)}"]))
    assert bool(methods) is found


@pytest.mark.parametrize("head, found", [
    ("class B(A):", True),
    ("class B:", False),
    ("@dataclass(frozen=True)\nclass B(A):", False),
])  # fmt: skip
def test_attributes_are_counted_with_inherited_ones(head, found):
    ten = "; ".join(f"self.a{n} = self.a{n}.b = 0" for n in range(10))
    sources = [
        f"class A:\n  def f(self): {ten}",
        f"{head}\n  x: int\n  y: int = 0\n  def g(self): self.z, other.w = 1, 2",
    ]
    assert too_wide(classes_in(sources)) == (set(), {"B"} if found else set())


# --- the package from outside ---------------------------------------------------------------------------------------


def test_all_is_exactly_the_public_names():
    exported = getattr(tpcolocate, "__all__", [])
    public = {
        name for name in dir(tpcolocate)
        if not name.startswith("_") and not isinstance(getattr(tpcolocate, name), types.ModuleType)
    } - {"annotations"}  # what "from __future__ import annotations" leaves  # fmt: skip
    assert len(exported) == len(set(exported))
    assert {name for name in exported if not name.startswith("__")} == public
    assert all(hasattr(tpcolocate, name) for name in exported)


def test_the_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").is_file()


IMPORTING = (
    "import sys, threading, tpcolocate\n"
    "assert not {'sglang', 'transformers', 'trl', 'accelerate', 'datasets'} & set(sys.modules), 'heavy'\n"
    "assert 'torch' not in sys.modules or not sys.modules['torch'].cuda.is_initialized(), 'cuda'\n"
    "assert threading.active_count() == 1, threading.enumerate()\n"
)


@pytest.fixture(scope="module", autouse=True)
def importing():
    """A process that imports the package while other tests run."""
    process = subprocess.Popen([sys.executable, "-c", IMPORTING], stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def test_importing_it_brings_no_framework_and_no_cuda_context(importing):
    _, errors = importing.communicate(timeout=120)
    assert importing.returncode == 0, errors
