"""docs/models.md and docs/tying.md are what scripts/generate_model_pages.py writes."""

from __future__ import annotations

import models_table
import pytest
import tying_table
from pages import ROOT

PAGES = {"models.md": models_table.page, "tying.md": tying_table.page}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_script_writes(name: str) -> None:
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == PAGES[name](), "run python scripts/generate_model_pages.py"
