"""Texts that a user reads use the standard terms of the field: error messages, log lines, help, README, docs.

The list holds words over which readers have stumbled: metaphors, personification and relative clauses without a noun.
A failure names the text; write what an experienced engineer of this field would write. Extend the list when a reader
stumbles.
"""

from __future__ import annotations

import ast
import re
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
