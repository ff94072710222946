"""The project uses the field's words, not a dialect of its own.

`python tests/test_vocabulary.py [PATH...]` prints what is left, files on the list of exceptions included.
"""

import ast
import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    "README.md",
    "docs/**/*.md",
    "benchmarks/*.md",
    "benchmarks/*.py",
    "examples/*.py",
    "tests/**/*.py",
    "tpcolocate/**/*.py",
)
PLAN = r"tpcolocate/(weights/(plan|sync|transport)|in_server)/"


@dataclass(frozen=True)
class Word:
    """A word in a sense that this project does not use.

    Args:
        pattern: Searched in lower-case text in which `snake_case` and `CamelCase` are separate words.
        instead: What to write.
        names: Search identifiers and file names only, each by itself, because prose uses the word in its ordinary sense.
        where: Only in files whose path begins with a match of this pattern.
        raw: Search the text as it is.
    """

    pattern: str
    instead: str
    names: bool = False
    where: str = ""
    raw: bool = False


WORDS = (
    # "room for", "no room" are space; "copy floor" is a bound.
    Word(r"\brooms\b|\b(a|the|each|every|one|its) room\b", "module"),
    Word(r"\bfloors\b|\b(a|on|the|each|every|one|its) floor\b", "layer"),
    # "to tell them apart" and "cannot tell whether" are about seeing a difference.
    Word(r"\btold\b(?!( \w+){0,3} apart)", "reported, passed, sent"),
    Word(
        r"(?<!can )(?<!cannot )(?<!could )(?<!not )\btell(s|ing)?\b(?!( \w+){0,3} apart| which| whether)",
        "report, pass, send, return",
    ),
    # "the message says", "the server said no" are ordinary English.
    Word(r"\b(is|are|was|were|be|been|not|as) said\b|\bsaid (again|anew|by|of|so|to)\b", "reported, given, printed"),
    Word(r"\bsaid\b", "reported, given, printed", names=True),
    Word(r"\b(lend|lends|lending|lent|lender|loans?)\b", "persistent mapping"),
    Word(r"\bborrow(s|ed|ing|er)?\b", "transient mapping"),
    Word(r"\bmover\b", "transfer"),
    # "moves its weights" is ordinary English.
    Word(r"\b(a|the|of|in|no|other) moves?\b(?! (on|to|from)\b)|\bmoves\b ?[.,=:)\[\]]|\bmove (phases?|plan)\b", "transfer plan"),
    Word(r"^moves$", "transfer plan", names=True),
    # "piece by piece", "in one piece".
    Word(r"(?<!by )(?<!one )\bpieces?\b(?! by piece)", "slice"),
    # Training and optimisers have steps, and so have ranges.
    Word(r"\b(moves|plan|transfer)[. ]steps?\b|\bsteps? of (the |a )?(moves|plan|transfer)\b", "stage"),
    Word(r"\bknowledge\b", "loader map"),
    # Not what models do; PEFT has "prompt learning".
    Word(
        r"(?<!machine )(?<!reinforcement )(?<!deep )(?<!prompt )\blearn(s|t|ed|ing)?\b(?! (rates?|more)\b)",
        "trace",
        where=r"(?!examples/)",
    ),
    Word(r"^known$", "planned", names=True, where=PLAN),
    Word(r"\brehears\w*", "dry run"),
    Word(r"\b(dis)?belie(f|v)\w*", "verify, accept"),
    Word(r"\b(bear|bears|bearing|bore|borne) (\w+ )?out\b", "verify, confirm"),
    # Locks, ports and devices are held.
    Word(r"^held$", "local shard", names=True, where=r"tpcolocate/weights/"),
    Word(r"\bslabs?\b", "shard region"),
    Word(r"\bWhole\b(?=\(|\.|`|\[)|\bWholes\b", "SharedGather", raw=True),
    Word(r"\bDerived\b(?=\(|\.|`|\[)", "LazyTensor", raw=True),
    Word(r"\b(keep|keeps|keeping|kept) company\b", "finish mesh collectives"),
    Word(r"\bsettl(e|es|ed|ing)\b", "wait for release"),
    # Not "improve", "provide", "approve"; UUIDs prove identity.
    Word(r"\b(un)?prov(e|es|ed|en|ing)\b(?! identity)|\bproofs?\b", "verify"),
    # "gpu_verbs" is in the names of recorded results.
    Word(r"(?<!gpu )\bverbs?\b", "API, call"),
    Word(r"\bresting\b", "paused for sleep"),
    # "Nothing was touched" is ordinary English; so is "is meant to".
    Word(r"^touched$", "engine modified", names=True),
    Word(r"^meant( |$)", "must match", names=True),
    Word(r"\bheadlines?\b", "summary"),
    Word(r"\bsurvey\w*", "find unwritten parameters"),
    Word(r"\b(speaks?|speaking|spoke) (with|as)\b|\bspoken\b", "uses the weights of"),
    Word(r"\bnobody\b", "no rank, no process, none"),
    Word(r"\bfor ever\b", "without a deadline, always"),
    Word(r"\bwhoever\b", "the process that"),
)  # fmt: skip

# Old names that stay: public attributes, as aliases, and the keys of recorded results.
KEPT = {
    r"(tpcolocate/report\.py|tests/test_report\.py|docs/guide\.md|benchmarks/)": r"\b(num_lent|num_proven|unproven)\b",
    r"benchmarks/plot_speed\.py": r"\"(lend|settle|prove)\"",
}

# Not converted yet.  This list only gets shorter: a file in which nothing is found must not be on it.
UNCONVERTED = set("""
""".split())  # fmt: skip


@functools.cache  # most names come many times
def is_in(pattern, name):
    return re.search(pattern, normalised_name(name)) is not None


@functools.cache
def normalised_name(name):
    return normalised(name)


def normalised(text):
    """Return the text in lower case, with the words inside identifiers separated, and without indentation."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    text = re.sub(r"[ \t]+", " ", text.replace("_", " ").lower())
    return re.sub(r"\n ?(# ?)?", "\n", text)


def names_in(nodes):
    """Yield (line, identifier) for every identifier of Python code."""
    for node in nodes:
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(name := getattr(node, field, None), str):
                yield node.lineno, name


def without_strings(source, nodes):
    """Return Python code without its strings other than docstrings: tests quote what they look for."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {node.body[0].value for node in nodes if isinstance(node, documented) and ast.get_docstring(node)}
    lines = source.encode().splitlines(keepends=True)
    for node in nodes:
        if not isinstance(node, ast.JoinedStr | ast.Constant) or node in docstrings:
            continue
        if isinstance(node, ast.JoinedStr) or isinstance(node.value, str):
            for number in range(node.lineno, node.end_lineno + 1):
                line = lines[number - 1]
                left = node.col_offset if number == node.lineno else 0
                right = node.end_col_offset if number == node.end_lineno else len(line) - 1
                lines[number - 1] = line[:left] + b" " * (right - left) + line[right:]
    return b"".join(lines).decode()


def hits(path, source):
    """Yield (line, found, instead) for a file; line 0 is its name.

    Args:
        path: From the root of the repository.
        source: Its text.
    """
    for where, names in KEPT.items():
        if re.match(where, path):
            source = re.sub(names, lambda found: re.sub("[a-z]", "x", found.group()), source)
    names, text = [(0, Path(path).stem)], source
    if path.endswith(".py"):
        nodes = list(ast.walk(ast.parse(source)))
        names += names_in(nodes)
        text = without_strings(source, nodes) if path.startswith("tests/") else source
    plain = f"{normalised(Path(path).stem)}\n{normalised(text)}"
    for word in WORDS:
        if re.match(word.where, path) is None:
            continue
        if word.names:
            found = {name for name in {name for _, name in names} if is_in(word.pattern, name)}
            yield from ((line, normalised_name(name), word.instead) for line, name in names if name in found)
            continue
        searched = f"\n{text}" if word.raw else plain
        for match in re.finditer(word.pattern.replace(" ", r"\s"), searched):
            yield searched.count("\n", 0, match.start()), " ".join(match.group().split()), word.instead


def hits_of_files():
    """Return path -> its hits, for every file of the repository that has any."""
    found = {}
    for pattern in FILES:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if of_file := sorted(set(hits(name, path.read_text()))):
                found[name] = [f"{name}:{line}: {word!r}: write {instead!r}" for line, word, instead in of_file]
    return found


def test_the_words_are_the_fields():
    found = hits_of_files()
    new = [line for path, lines in found.items() if path not in UNCONVERTED for line in lines]
    assert not new, "\n".join(["words of a private dialect:", *new])
    assert sorted(UNCONVERTED - set(found)) == [], "nothing is found there: remove them from UNCONVERTED"


@pytest.mark.parametrize("path, source, found", [
    ("docs/a.md", "rooms on one floor do not know each other", ["one floor", "rooms"]),
    ("docs/a.md", "there is room for two, and no room for a third", []),
    ("docs/a.md", "all ranks are told", ["told"]),
    ("docs/a.md", "two models that can be told apart; one cannot tell whether they differ; tell the two apart", []),
    ("docs/a.md", "the message says why, although the server said 200", []),
    ("docs/a.md", "what was said of it", ["was said"]),
    ("docs/a.md", "`PersistentLoans.num_lent`", ["lent", "loans"]),
    ("docs/guide.md", "`num_lent` is silent and equivalent", []),
    ("docs/a.md", "improve, provide, approve; the learning rate of reinforcement\nlearning", []),
    ("docs/a.md", "what is proven, what was learned", ["learned", "proven"]),
    ("docs/a.md", "the moves of a slice", ["the moves"]),
    ("docs/a.md", "a trainer that moves its weights between steps, piece by piece", []),
    ("tpcolocate/a.py", "# it is borne\n  # out, and all is\n", ["borne out"]),
    ("docs/a.md", "the samples bear it out", ["bear it out"]),
    ("docs/a.md", "a `Whole`, and the Whole", ["Whole"]),
    ("tpcolocate/a.py", "x.keep_company(NumSlabs)", ["keep company", "slabs"]),
    ("tpcolocate/a.py", "raise Error('told')", ["told"]),
    ("tpcolocate/a.py", "touched = 1  # nothing else is touched", ["touched"]),
    ("tpcolocate/weights/plan/a.py", "known = 1  # as is known", ["known"]),
    ("tpcolocate/server/a.py", "known = 1", []),
    ("tests/test_a.py", "def test_b():\n  '''Of loans.'''\n  said = 'told'  # nobody", ["loans", "nobody", "said"]),
    ("tests/test_verbs.py", "", ["verbs"]),
])  # fmt: skip
def test_words_are_found_and_ordinary_english_is_not(path, source, found):
    assert sorted({word for _, word, _ in hits(path, source)}) == sorted(found)


def test_hits_have_their_lines():
    source = 'A = """\ntold\n"""\n# told\n\n\ndef told():\n    """Told."""\n'
    assert [line for line, *_ in hits("tests/a.py", source)] == [4, 7, 8]
    assert [line for line, *_ in hits("tpcolocate/a.py", source)] == [2, 4, 7, 8]


if __name__ == "__main__":
    for path, lines in hits_of_files().items():
        if not sys.argv[1:] or any(path.startswith(begin) for begin in sys.argv[1:]):
            print(*lines, sep="\n")
