"""The documentation: links lead somewhere, files and records that it names exist, and its Python snippets fit the code."""

import ast
import inspect
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

import tpcolocate
import tpcolocate.hf
import tpcolocate.trl

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md"))),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`]+)`")
FOLDERS = ("tpcolocate", "tests", "benchmarks", "examples", "scripts", "docs", "requirements")
# Whose calls the snippets make.
OWNERS = {
    "tpcolocate": tpcolocate,
    "colo": tpcolocate.Colocation,
    "engine": tpcolocate.Engine,
    "client": tpcolocate.Client,
    "report": tpcolocate.SyncReport,
}
# Where else quoted calls are looked for.
MODULES = (tpcolocate.trl, tpcolocate.hf)
# Named in the pages and not written yet.  An entry that exists by now fails, too.
USERS_OWN = {"colocated.py"}
# A minute on two idle cores; a busy machine takes several times as long.
DEADLINE_S = 600.0
TERM_S = 60.0


def read(page):
    return (ROOT / page).read_text()


def prose(page):
    return BLOCK.sub("", read(page))


def snippets(page):
    """The Python blocks of a page, each with the line that it begins on."""
    text = read(page)
    return [
        (text.count("\n", 0, found.start(2)) + 1, found[2]) for found in BLOCK.finditer(text) if found[1] == "python"
    ]


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page):
    found = []
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists():
            found.append(target)
        elif anchor and anchor not in anchors(file.resolve().relative_to(ROOT)):
            found.append(target)
    return found


def named_files(page):
    """Names in backticks that can only be files of the repository: with a folder of it, or Python files."""
    for span in SPAN.findall(prose(page)):
        word = span.split("::")[0]
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*", word) or re.fullmatch(r"\w+\.py", word):
            yield word


def exists(name):
    return (ROOT / name).exists() if "/" in name else any(ROOT.glob(f"[!.]*/**/{name}"))


def signature_of(text):
    """The parameters of a call that is quoted with its defaults: name -> (kind, default)."""
    function = ast.parse(f"def quoted({text}): ...").body[0]
    namespace = {}
    exec(ast.unparse(function), namespace)
    return described(namespace["quoted"])


def described(function):
    return {
        name: (parameter.kind, parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    }


def function_named(name):
    for owner in (*OWNERS.values(), *MODULES):
        if callable(found := inspect.getattr_static(owner, name, None)):
            return found
    raise AssertionError(f"there is no call named {name}")


def misfits(source):
    """Attributes and calls of the package's objects in a snippet that the code does not have."""
    found = []
    for node in ast.walk(ast.parse(source)):
        attribute = node.func if isinstance(node, ast.Call) else node
        if not (isinstance(attribute, ast.Attribute) and isinstance(attribute.value, ast.Name)):
            continue
        owner = OWNERS.get(attribute.value.id)
        if owner is None:
            continue
        target = inspect.getattr_static(owner, attribute.attr, None)
        if target is None:
            classes = owner.__mro__[:-1] if inspect.isclass(owner) else ()
            if not any(f"self.{attribute.attr} = " in inspect.getsource(one) for one in classes):
                found.append(f"{ast.unparse(attribute)} does not exist")
        elif isinstance(node, ast.Call):
            arguments = [None] * (len(node.args) + (inspect.isclass(owner)))
            try:
                inspect.signature(target).bind(*arguments, **{k.arg: None for k in node.keywords if k.arg is not None})
            except TypeError as error:
                found.append(f"{ast.unparse(node)}: {error}")
    return found


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files_and_headings(page):
    assert broken_links(page) == []


@pytest.mark.quick
def test_files_named_in_the_pages_exist():
    named = {(page, name) for page in PAGES for name in named_files(page)}
    assert len(named) > 20
    missing = {name for _, name in named if not exists(name)} - USERS_OWN
    assert sorted(missing) == [], "named, and not there"


@pytest.mark.quick
def test_records_named_in_the_pages_exist():
    prefixes = {"_".join(record.stem.split("_")[:2]) for record in (ROOT / "benchmarks/results").glob("*.json")}
    pattern = re.compile(rf"(?:{'|'.join(prefixes)})[\w*]*")
    named = {span for page in PAGES for span in SPAN.findall(prose(page)) if pattern.fullmatch(span)}
    assert len(named) > 10
    assert [name for name in sorted(named) if not any((ROOT / "benchmarks/results").glob(f"{name}.json"))] == []


@pytest.mark.quick
@pytest.mark.parametrize(
    "page, line, source",
    [(page, line, source) for page in PAGES for line, source in snippets(page)],
    ids=lambda value: None if isinstance(value, str) and "\n" in value else str(value),
)
def test_snippets_compile_and_make_calls_that_exist(page, line, source):
    compile(source, f"{page}:{line}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    assert misfits(source) == []


@pytest.mark.quick
def test_diagrams_have_nothing_that_ends_a_statement_early():
    diagrams = [found[2] for page in PAGES for found in BLOCK.finditer(read(page)) if found[1] == "mermaid"]
    assert len(diagrams) >= 3
    for diagram in diagrams:
        assert diagram.split()[0] in ("flowchart", "sequenceDiagram")
        assert ";" not in diagram and "#" not in diagram


@pytest.mark.quick
@pytest.mark.parametrize("page, at_least", [("docs/guide.md", 16), ("docs/integrations.md", 2)])
def test_signatures_quoted_in_the_pages_are_those_of_the_code(page, at_least):
    quoted = re.findall(r"`(\w+)\(([^`]*\*, [^`]*)\)`", prose(page))
    assert len(quoted) >= at_least
    for name, parameters in quoted:
        assert signature_of(parameters) == described(function_named(name)), name


@pytest.mark.quick
@pytest.mark.parametrize("source, number", [
    ("engine.sleep(['weights'])", 0),
    ("await engine.generate_async('a', {})", 0),
    ("colo.rank, colo.tp_rank, report.num_bytes", 0),
    ("tpcolocate.init(2, device='cpu')", 0),
    ("other.anything(1)", 0),
    ("engine.nap()", 1),
    ("engine.sleep(tag='weights')", 1),
    ("tpcolocate.init(2, 'cpu')", 1),
    ("colo.nothing", 1),
])  # fmt: skip
def test_calls_that_do_not_fit_are_found(source, number):
    assert len({fault.split(":")[0] for fault in misfits(source)}) == number


@pytest.mark.quick
def test_the_page_of_errors_is_made_from_the_code():
    made = runpy.run_path(str(ROOT / "scripts/errors_page.py"))["page"]()
    assert read("docs/errors.md") == made, "run make docs"
    assert made.count("\n| ") > 150


@pytest.mark.quick
@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=120
    )
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    pages = {str(page.relative_to(tmp_path / "site").parent) for page in (tmp_path / "site").rglob("index.html")}
    assert {".", "start", "reference", "errors", "howto/memory", "benchmarks"} <= pages
    assert "sync_weights" in (tmp_path / "site/reference/index.html").read_text()


@pytest.mark.quick
def test_anchors_are_those_of_the_hosting_site():
    assert {"known-limits", "tp_size-defaults-to-1", "retract-not-abort"} <= anchors("docs/decisions.md")


@pytest.mark.engine
@pytest.mark.timeout(DEADLINE_S + TERM_S + 30)
def test_the_quick_start_runs_as_pasted(tmp_path):
    (_, script), *_ = snippets("README.md")
    (tmp_path / "colocated.py").write_text(script)
    make_tiny_model(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    log = tmp_path / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, str(tmp_path / "colocated.py"), str(tmp_path / "model")],
            env={**os.environ, "PYTHONPATH": path}, stdout=sink, stderr=sink, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(DEADLINE_S)
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun then ends its ranks, which have sessions of their own
                try:
                    process.wait(TERM_S)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(10)
    output = log.read_text(errors="replace")
    assert code == 0, output[-4000:]
    assert re.findall(r"^synced 25 tensors.* version (\d+)$", output, re.MULTILINE) == ["1", "2", "3"]
