"""Every fenced python block runs. A page's blocks share one namespace, in which MODEL and ADAPTER are tiny folders.

Blocks that ask http://127.0.0.1:8000 get a server of these two, on a free port. A block with a word after ``python``
runs elsewhere, in the environment of the client of that name: ``trl`` by tests/server/test_trl_slow.py, the others by
tests/clients/test_clients_slow.py, and the README's by tests/server/test_lorax_clients_slow.py.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from pages import ROOT, Block, blocks, pages

from clients import PACKAGES

SERVER = "http://127.0.0.1:8000"


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page, "python") if not block.info]


PAGES = [page for page in pages() if python_blocks(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from live_server import serving
    from tiny_pair import write_tiny_pair

    model, adapter = write_tiny_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"MODEL": str(model), "ADAPTER": str(adapter), "__name__": "__docs__"}
    found = python_blocks(page)
    with contextlib.ExitStack() as stack:
        url = SERVER
        if any(SERVER in block.code for block in found):
            url = stack.enter_context(serving(model, adapters={"pirate": str(adapter)})).url
        for block in found:
            code = "\n" * block.line + block.code.replace(SERVER, url)
            code = code.replace('"smollm2"', repr(str(model))).replace('"examples/adapters/pirate"', repr(str(adapter)))
            exec(compile(code, str(page), "exec"), namespace)


def test_words_after_python_name_a_test() -> None:
    words = {block.info for page in pages() for block in blocks(page, "python")}
    assert words <= {"", "trl", *PACKAGES}


def test_every_fence_is_run_or_output() -> None:
    """No fenced block is prose: its language says whether a test runs it (python, sh, http), or what it shows."""
    known = {"python", "sh", "http", "text", "json", "toml", "ini", "nginx", "yaml"}
    for page in pages():
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("```") and line != "```":
                language = line[3:].split()[0]
                assert language in known, f"{page.name}: ```{language}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    for page in pages():
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            aim = page.parent / target if target else page
            where = f"{page.relative_to(ROOT)} links to {target}#{anchor}"
            assert aim.exists(), f"{where}: there is no such file"
            assert not anchor or anchor in anchors(aim), f"{where}: there is no such heading"


def test_prose_has_lines_that_can_be_read_unrendered() -> None:
    """Tables, code and images are exempt: they cannot be wrapped."""
    for page in [*pages(), ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]:
        fenced = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            fenced ^= line.startswith("```")
            free = fenced or line.startswith(("|", "![", "```"))
            assert free or len(line) <= 120, f"{page.relative_to(ROOT)}:{number} has {len(line)} columns"
