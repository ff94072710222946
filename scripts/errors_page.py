"""Writes docs/errors.md: every error that the library raises, read from its source.

Run by ``make docs``; a test compares the page with the code.  Standard library only.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
PACKAGE = ROOT / "tpcolocate"
HEAD = """# Errors

Every error that tpcolocate raises, by class. `<name>` stands for what the message has in that place. The classes
and what to do about each of them in general are in the [guide](guide.md#errors).

This page is made from the source by `scripts/errors_page.py`.
"""


def classes():
    """Names of the error classes in the order of errors.py, each with its docstring's first line."""
    tree = ast.parse((PACKAGE / "errors.py").read_text())
    return {
        node.name: (ast.get_docstring(node) or "").splitlines()[0]
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def assigned(statements):
    """What names are set to by these statements and by those inside of them, functions left out."""
    found = {}
    pending = list(statements)
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, node.value)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            pending += ast.iter_child_nodes(node)
    return found


def defaults(arguments):
    """What arguments are if they are not given."""
    with_default = arguments.args[len(arguments.args) - len(arguments.defaults) :]
    found = dict(zip([one.arg for one in with_default], arguments.defaults, strict=True))
    found |= {one.arg: value for one, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value}
    return found


def text_of(node, names=()):
    """What an expression that makes a message looks like, with <name> for what is filled in; None if it has no text.

    Args:
        node: The expression.
        names: From `assigned`, for messages and hints that have a name.
    """
    if isinstance(node, ast.Name) and node.id in names:
        return text_of(names[node.id], {name: value for name, value in names.items() if name != node.id})
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else f"<{placeholder(part.value)}>" for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left, names), text_of(node.right, names)
        return None if left is None and right is None else (left or "<...>") + (right or "<...>")
    if isinstance(node, ast.IfExp):
        found = [text for text in (text_of(node.body, names), text_of(node.orelse, names)) if text]
        return " | ".join(found) if found else None
    return None


def hint_of(node, names, functions):
    """`text_of` a hint, which a function of the package may choose."""
    chosen = functions.get(node.func.id) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
    if chosen is None:
        return text_of(node, names)
    names = {**names, **assigned(chosen.body)}
    returned = [one.value for one in ast.walk(chosen) if isinstance(one, ast.Return) and one.value is not None]
    return " | ".join(dict.fromkeys(text for text in (text_of(one, names) for one in returned) if text))


def placeholder(node):
    """A name for a value in a message: the last word of the expression that is not a conversion."""
    words = re.findall(r"[A-Za-z_]\w*", ast.unparse(node))
    skipped = {"join", "map", "str", "sorted", "for", "in", "if", "else", "some", "listed", "list_ranks", "self", "len", "type", "name", "__name__", "repr", "and", "or", "not", "is", "None"}  # fmt: skip
    kept = [word for word in words if word not in skipped and not word.startswith("__")]
    return (kept[-1] if kept else words[-1] if words else "value").strip("_")


def errors_of(node, known, names, functions):
    """Class, message and hint of each error that a module makes with a text of its own."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        names = {**names, **defaults(node.args), **assigned(node.body)}
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if called in known and node.args and (message := text_of(node.args[0], names)):
            hint = next((keyword.value for keyword in node.keywords if keyword.arg == "hint"), None)
            yield called, message, "" if hint is None else hint_of(hint, names, functions) or ""
    for child in ast.iter_child_nodes(node):
        yield from errors_of(child, known, names, functions)


def cell(text):
    text = " ".join(text.split())
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def page():
    known = classes()
    found = {name: {} for name in known}
    trees = [ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]
    constants = {name: value for tree in trees for name, value in assigned(tree.body).items()}
    functions = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    for tree in trees:
        for name, message, hint in errors_of(tree, known, {**constants, **assigned(tree.body)}, functions):
            found[name].setdefault(message, hint)
    parts = [HEAD]
    for name, summary in known.items():
        if not found[name]:
            continue
        rows = [f"| {cell(message)} | {cell(hint)} |" for message, hint in sorted(found[name].items())]
        parts.append("\n".join([f"## {name}", "", summary, "", "| Message | What to do |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(
        f"{PAGE.relative_to(ROOT)}: {PAGE.read_text().count(chr(10) + '| ') - PAGE.read_text().count('| Message')} errors",
        file=sys.stderr,
    )
