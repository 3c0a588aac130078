"""docs/adapters.md says what the reader does: its table is ``FIELDS``."""

from __future__ import annotations

import re
from pathlib import Path

from truffula.lora.fields import FIELDS
from truffula.lora.method_fields import COMMON, TABLES
from truffula.lora.methods import METHODS
from truffula.lora.refused import REFUSED

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"


def test_the_page_has_the_verdict_and_the_reason_of_every_field() -> None:
    rows = re.findall(r"^\| `([a-z]\w*)` \| (\w+) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    expected = [(name, field.verdict, field.note) for name, field in FIELDS.items()]
    missing = "\n".join(f"| `{name}` | {verdict} | {note} |" for name, verdict, note in expected)
    assert sorted(rows) == sorted(expected), (
        f"The table of docs/adapters.md should be, in an order that reads well:\n{missing}"
    )


def table_of_methods() -> str:
    """What docs/adapters.md says of each served method and its fields, without those of all methods."""
    verdicts = ("serve", "check", "ignore", "refuse")
    head = "| method | becomes | served | checked | without effect | refused unless empty |"
    lines = [head, "|---|---|---|---|---|---|"]
    for name, method in METHODS.items():
        own = {field: row.verdict for field, row in TABLES[name].fields.items() if field not in COMMON}
        fields = [", ".join(field for field, found in own.items() if found == verdict) or "-" for verdict in verdicts]
        lines.append(f"| `{name}` | {method.becomes} | {' | '.join(fields)} |")
    return "\n".join(lines)


def table_of_refused() -> str:
    lines = ["| method | why | what to do |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | it {why} | {advice} |" for name, (why, advice) in REFUSED.items())])


def test_the_page_has_every_method() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for table in (table_of_methods(), table_of_refused()):
        assert table in page, f"docs/adapters.md should have this table:\n{table}"
