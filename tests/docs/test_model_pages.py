"""The pages that scripts/generate_model_pages.py writes are what it would write now."""

from __future__ import annotations

import sys

import pytest
from pages import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from generate_model_pages import PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_script_writes(name: str) -> None:
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == PAGES[name](), "run python scripts/generate_model_pages.py"
