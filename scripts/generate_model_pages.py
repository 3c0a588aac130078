"""Write docs/models.md, docs/tying.md and docs/formats.md from the tables of the tests.

python scripts/generate_model_pages.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in ("engine", "kernels", "lora", "model", "weights"):
    sys.path.insert(0, str(ROOT / "tests" / folder))

import formats_table  # noqa: E402
import models_table  # noqa: E402
import tying_table  # noqa: E402

PAGES = {"models.md": models_table.page, "tying.md": tying_table.page, "formats.md": formats_table.page}


def main() -> None:
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
