"""What a user or a developer reads uses the standard terms of the field: messages, help and docs, and in the code
comments, docstrings and names.

The lists hold words over which readers have stumbled: metaphors, personification and relative clauses without a noun.
A failure names the text; write what an experienced engineer of this field would write. Extend the lists when a reader
stumbles.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "truffula"
FILES = sorted([*SRC.rglob("*.py"), *(ROOT / "examples").glob("*.py")])
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    if page.is_file()
)
WORDS = re.compile(
    r"\b(nobody|somebody|whoever|who comes|what there is|whose turn|twins?|guests?|heart|behind the door"
    r"|is ours|not ours|are ours|goes on|go on|could not be had|to be had|can't be had"
    r"|(match|leaving|noticed|ends|closes) at once|every field's fate"
    r"|in whole numbers|standstill|hold .{1,40} against|held against|given back|let go"
    r"|has no place|is wanted|are wanted|stands? for|says? nothing"
    r"|likeliest|said once|at fault|by a fault|made a mistake|told apart|asks for nothing|leads nowhere|becomes of"
    r"|does not go with|must be of|(?<!there )is no (folder|token id|hub id|adapter)|absurd|shapes decide"
    r"|takes (a free|no flags|no new))\b|; there are $|'s; in truffula",
    re.IGNORECASE,
)

COMMENT_WORDS = re.compile(
    r"\b(nobody|somebody|anybody|everybody|whoever|who (comes|waits|asks|answers|wants)|what there is|twins?|guests?"
    r"|heart|behind the door|(is|are|not) ours|goes on|go on|to be had|could be had|can't be had|given back|gives? back"
    r"|giving back|let go|lets go|turns? up|(say|know|ask)s? nothing|asks? for nothing|life of|becomes of|what became"
    r"|(answered|closing|closed|ended|ends|unlinked|dropped|refused|again|begun|known|gone|returns?|told) at once"
    r"|his own|for him|at fault|told apart|makes? sure|whatever comes|on this bill|no word why)\b",
    re.IGNORECASE,
)
"""Of comments and docstrings. *At once* is right where several things happen together; for time write *immediately*."""
NAMES = frozenset(
    {
        *("roster", "grants", "turns", "rescue", "startable", "tickets", "located", "crosses", "uncrossable", "manner"),
        *("twins", "guests", "guest", "beside", "spool", "offered", "want", "claim", "disclaim", "settle", "tend"),
        *("hold", "let_go", "pump", "attend", "lose", "judged", "judge_adapter", "puller", "collecting_later"),
        *("entered", "truth", "neutral", "selectors", "heard", "weigh", "learn"),
    }
)
"""Names of functions, classes, arguments and modules that had a meaning of their own here."""
NATIVE = sorted((SRC / "kernels" / "cpu" / "native").iterdir())
SOURCES = sorted(SRC.rglob("*.py"))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Each file is parsed and walked once for all lists."""
    return tuple(ast.walk(ast.parse(path.read_text())))


@pytest.fixture(scope="module", autouse=True)
def trees_are_let_go() -> Iterator[None]:
    """The rest of the suite need not carry a million nodes through each garbage collection."""
    yield
    nodes_of.cache_clear()


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """Comments and docstrings of a Python file, comments of a C++ file, with their lines."""
    text = path.read_text()
    if path.suffix != ".py":
        for match in re.finditer(r"(?:^[ \t]*//.*\n)+|//.*$", text, re.MULTILINE):
            yield text.count("\n", 0, match.start()) + 1, re.sub(r"\s*//\s*", " ", match[0])
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in nodes_of(path):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, " ".join(node.value.value.split())


def test_comments_are_in_plain_words() -> None:
    found = [f"{path.relative_to(SRC)}:{line}: {match[0]!r} in {text[max(0, match.start() - 60) : match.end() + 60]!r}"
             for path in [*SOURCES, *NATIVE] for line, text in comments(path)
             for match in COMMENT_WORDS.finditer(text)]  # fmt: skip
    assert not found, "\n".join(found)


def names(path: Path) -> Iterator[tuple[int, str]]:
    yield 1, path.stem
    for node in nodes_of(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def test_names_are_in_plain_words() -> None:
    found = [f"{path.relative_to(SRC)}:{line}: {name}" for path in SOURCES for line, name in names(path)
             if name.strip("_").lower() in NAMES]  # fmt: skip
    assert not found, "\n".join(found)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Every string literal of a file that may reach a user, with its line: not docstrings, which developers read, but
    the docstrings of commands, which are their help.
    """
    commands = path.parent.name == "cli"
    comments = set()
    for node in nodes_of(path):  # a statement comes before what it holds
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            comments.add(id(node.value))  # a docstring, or a string used as a comment
        if isinstance(node, ast.FunctionDef) and commands and node.decorator_list and (text := ast.get_docstring(node)):
            yield node.lineno, text
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in comments:
            yield node.lineno, node.value


def test_messages_are_in_plain_words() -> None:
    found = [f"{path.relative_to(ROOT)}:{line}: {match[0]!r} in {text[:120]!r}" for path in FILES
             for line, text in texts(path) if (match := WORDS.search(text))]  # fmt: skip
    assert not found, "\n".join(found)


def test_pages_are_in_plain_words() -> None:
    found = [f"{page.relative_to(ROOT)}:{number}: {match[0]!r} in {line[:120]!r}" for page in PAGES
             for number, line in enumerate(page.read_text().splitlines(), 1)
             if (match := WORDS.search(line))]  # fmt: skip
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text", ["port 8000 is ours", "It could not be had from the Hub", "who comes first", "the model is no folder."]
)
def test_the_list_finds_what_readers_stumbled_over(text: str) -> None:
    assert WORDS.search(text)
