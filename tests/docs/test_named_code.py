"""The pages for contributors name files, classes and functions that exist."""

from __future__ import annotations

import re
import subprocess
from functools import cache

import pytest
from pages import FENCE, ROOT, pages

PAGES = ("CONTRIBUTING.md", "docs/architecture.md", "docs/adding-", "docs/decisions/")
NAMED = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w/.-]+\.(py|cpp|h|toml|sh)")
IDENTIFIER = re.compile(r"[A-Za-z][a-z0-9]*(?:_[a-z0-9]+)+|[A-Z][a-z0-9]+(?:[A-Z][a-z0-9]*)+")
ELSEWHERE = {"model/fallback.py", "sapphire_rapids"}  # a file to come, a name of gcc's


@cache
def known() -> tuple[list[str], set[str]]:
    """The paths of all files, and the identifiers in the code."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    code = [name for name in files if name.endswith((".py", ".cpp", ".h", ".toml", "CMakeLists.txt"))]
    return files, {word for name in code for word in IDENTIFIER.findall((ROOT / name).read_text(encoding="utf-8"))}


@pytest.mark.parametrize(
    "page", [p for p in pages() if p.relative_to(ROOT).as_posix().startswith(PAGES)], ids=lambda page: page.name
)
def test_what_a_page_names_exists(page) -> None:
    files, words = known()
    for named in NAMED.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if FILE.fullmatch(named):
            assert named in ELSEWHERE or any(f"/{name}".endswith(f"/{named}") for name in files), named
        else:
            for word in IDENTIFIER.findall(named):
                assert word in words | ELSEWHERE, f"{word} of `{named}` is no name in the code"
