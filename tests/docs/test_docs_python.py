"""Every fenced python block runs. A page's blocks share one namespace, in which MODEL and ADAPTER are tiny folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import ROOT, blocks, pages

PAGES = [page for page in pages() if blocks(page, "python")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_pair import write_tiny_pair

    model, adapter = write_tiny_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"MODEL": str(model), "ADAPTER": str(adapter), "__name__": "__docs__"}
    for block in blocks(page, "python"):
        code = "\n" * block.line + block.code
        exec(compile(code, str(page), "exec"), namespace)


def test_every_fence_is_run_or_output() -> None:
    """No fenced block is prose: its language says whether a test runs it (python, sh, http), or what it shows."""
    known = {"python", "sh", "http", "text", "json", "toml"}
    for page in pages():
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("```") and line != "```":
                language = line[3:].split()[0]
                assert language in known, f"{page.name}: ```{language}"


def test_links_lead_somewhere() -> None:
    import re

    for page in pages():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), (
                    f"{page.relative_to(ROOT)} links to {target}, which is not there"
                )
