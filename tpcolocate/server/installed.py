"""The installed SGLang, read from its source without importing it.

Importing sglang takes seconds, patches torch and may initialise a device, which must not happen in a training rank.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata, util
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

# All releases have these: without them the source was not parsed correctly.
_LANDMARKS = frozenset({"model-path", "host", "port", "config", "tp-size"})


@dataclass(frozen=True, slots=True)
class Installed:
    """One installation of SGLang.

    Attributes:
        folder: Of the package ``sglang``.
        version: As it reports it; None for a checkout that was never built.
        has_memory_saver: Whether torch_memory_saver is installed beside it.
    """

    folder: Path
    version: str | None
    has_memory_saver: bool = field(default=True, compare=False)

    @property
    def name(self) -> str:
        """Name for messages: ``SGLang 0.5.20``."""
        return f"SGLang in {self.folder}" if self.version is None else f"SGLang {self.version}"

    def arguments(self) -> Mapping[str, str | None] | None:
        """Read the server's command-line arguments, without leading dashes.

        Returns:
            Name -> None, or why the release ignores it; None if the source cannot be parsed.
        """
        srt = self.folder / "srt"
        found: dict[str, str | None] = {}
        try:
            for path in [srt / "server_args.py", *sorted((srt / "arg_groups" / "fields").glob("*.py"))]:
                found.update(_arguments_in(ast.parse(path.read_bytes())))
        except (OSError, SyntaxError, ValueError):
            return None
        return found if found.keys() >= _LANDMARKS else None

    def request_fields(self, request: str) -> frozenset[str] | None:
        """Read the fields of a class of ``managers/io_struct.py``, without its bases; None if they cannot be found."""
        try:
            tree = ast.parse((self.folder / "srt" / "managers" / "io_struct.py").read_bytes())
        except (OSError, SyntaxError, ValueError):
            return None
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == request:
                return frozenset(
                    item.target.id
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                )
        return None


def find_installed(environment: Mapping[str, str], *, folder: str | None = None) -> Installed | None:
    """Find the SGLang that ``python -m sglang.launch_server`` starts in this environment, with this interpreter.

    Args:
        environment: The server's; its PYTHONPATH may have another SGLang than the trainer's.
        folder: It starts in; default: the current one.

    Returns:
        None if there is none, or if it cannot be found without importing it.
    """
    entries = [] if environment.get("PYTHONSAFEPATH") else [folder or ""]  # -m searches it first
    entries += [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    entries += sys.path
    spec = _find("sglang", entries)
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    return Installed(package, _version(package), _is_installed("torch_memory_saver", entries))


def _find(name: str, entries: Sequence[str]) -> ModuleSpec | None:
    spec = PathFinder.find_spec(name, entries)
    if spec is None or spec.origin is None:
        try:
            spec = util.find_spec(name)  # an editable install may have its own finder
        except ValueError:
            return None
    return spec


def _is_installed(name: str, entries: Sequence[str]) -> bool:
    return _find(name, entries) is not None


def _version(folder: Path) -> str | None:
    """Read the version as ``sglang/version.py`` does, but only from distributions beside the package."""
    try:
        for node in ast.parse((folder / "_version.py").read_bytes()).body:
            if _assigns(node, "__version__") and isinstance(node, ast.Assign):
                return str(ast.literal_eval(node.value))
    except (OSError, SyntaxError, ValueError):
        pass
    for distribution in metadata.distributions(name="sglang", path=[str(folder.parent)]):
        return distribution.version
    return None


def _arguments_in(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Yield the arguments of ``A[type, ...]`` fields (from 0.5.14) and of ``add_argument`` calls."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        if node.name == "ServerArgs" or any(_assigns(item, "_NS_PATH") for item in node.body):
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield from ((name, None) for name in _annotated(item.target.id, item.annotation))
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "add_cli_args":
                for call in ast.walk(item):
                    if isinstance(call, ast.Call) and getattr(call.func, "attr", None) == "add_argument":
                        yield from _added(call)


def _assigns(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)


def _annotated(field: str, annotation: ast.expr) -> Iterator[str]:
    """Yield the arguments of ``A[type, "help"]`` and ``A[type, Arg(...)]``; see SGLang's ``arg_groups/arg_utils.py``."""
    if not (
        isinstance(annotation, ast.Subscript)
        and isinstance(annotation.value, ast.Name)
        and annotation.value.id in ("A", "Annotated")
        and isinstance(annotation.slice, ast.Tuple)
    ):
        return
    for part in annotation.slice.elts[1:]:
        if not isinstance(part, ast.Call):
            yield _plain(field)  # the help text
            return
        if isinstance(part.func, ast.Name) and part.func.id == "Arg":
            options = {keyword.arg: keyword.value for keyword in part.keywords}
            if "no_cli" in options and ast.literal_eval(options["no_cli"]):
                return
            names = [ast.literal_eval(options["cli_name"])] if "cli_name" in options else [field]
            if "aliases" in options:
                names += ast.literal_eval(options["aliases"]) or []
            yield from _with_negation(names, options.get("action"))
            return


def _added(call: ast.Call) -> Iterator[tuple[str, str | None]]:
    """Yield the arguments of ``parser.add_argument("--name", "--alias", action=...)``."""
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    names = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    action = options.get("action")
    unused = None
    if isinstance(action, ast.Name) and action.id == "DeprecatedAction":
        # SGLang warns or exits: either way the argument has no effect.
        text = options.get("error_message", options.get("help"))
        try:
            unused = str(ast.literal_eval(text)) if text is not None else "it is deprecated"
        except ValueError:
            unused = "it is deprecated"
    yield from ((name, unused) for name in _with_negation(names, action))


def _with_negation(names: Sequence[str], action: ast.expr | None) -> Iterator[str]:
    for name in names:
        yield _plain(name)
        if isinstance(action, ast.Attribute) and action.attr == "BooleanOptionalAction":
            yield f"no-{_plain(name)}"


def _plain(name: str) -> str:
    return name.removeprefix("--").replace("_", "-")


__all__ = ["Installed", "find_installed"]
