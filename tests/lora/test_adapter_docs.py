"""docs/adapters.md says what the reader does: its table is ``FIELDS``."""

from __future__ import annotations

import re
from pathlib import Path

from truffula.lora.fields import FIELDS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"


def test_the_page_has_the_verdict_and_the_reason_of_every_field() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    expected = [(name, field.verdict, field.note) for name, field in FIELDS.items()]
    missing = "\n".join(f"| `{name}` | {verdict} | {note} |" for name, verdict, note in expected)
    assert sorted(rows) == sorted(expected), (
        f"The table of docs/adapters.md should be, in an order that reads well:\n{missing}"
    )
