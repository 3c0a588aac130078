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
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, " ".join(node.value.value.split())


@pytest.mark.parametrize("path", [*SOURCES, *NATIVE], ids=lambda path: path.relative_to(SRC).as_posix())
def test_comments_are_in_plain_words(path: Path) -> None:
    found = [f"{path.name}:{line}: {match[0]!r} in {text[max(0, match.start() - 60) : match.end() + 60]!r}"
             for line, text in comments(path) for match in COMMENT_WORDS.finditer(text)]  # fmt: skip
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(SRC).as_posix())
def test_names_are_in_plain_words(path: Path) -> None:
    names = {(1, path.stem)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add((node.lineno, node.name))
        elif isinstance(node, ast.arg):
            names.add((node.lineno, node.arg))
    found = [f"{path.name}:{line}: {name}" for line, name in sorted(names) if name.strip("_").lower() in NAMES]
    assert not found, "\n".join(found)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Every string literal of a file that may reach a user, with its line: not docstrings, which developers read, but
    the docstrings of commands, which are their help.
    """
    tree = ast.parse(path.read_text())
    commands = path.parent.name == "cli"
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""  # a docstring, or a string used as a comment
        if isinstance(node, ast.FunctionDef) and commands and node.decorator_list and (text := ast.get_docstring(node)):
            yield node.lineno, text
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_messages_are_in_plain_words(path: Path) -> None:
    found = [f"{path.name}:{line}: {match[0]!r} in {text[:120]!r}" for line, text in texts(path)
             if (match := WORDS.search(text))]  # fmt: skip
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_are_in_plain_words(path: Path) -> None:
    lines = enumerate(path.read_text().splitlines(), 1)
    found = [
        f"{path.name}:{number}: {match[0]!r} in {line[:120]!r}"
        for number, line in lines
        if (match := WORDS.search(line))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text", ["port 8000 is ours", "It could not be had from the Hub", "who comes first", "the model is no folder."]
)
def test_the_list_finds_what_readers_stumbled_over(text: str) -> None:
    assert WORDS.search(text)
