"""``truffula list`` and ``truffula pull``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from truffula.cli.output import out, print_table, progress, table
from truffula.option import format_size
from truffula.settings import load_setting, require_paths
from truffula.weights.sources import cached_models


def _setting(name: str, given: Any = None) -> Any:
    """The value of one option: ``given``, or from environment or configuration file."""
    setting = load_setting(name, given)
    require_paths([setting])
    return setting.value


def run_list(cache_dir: Path | None, *, as_json: bool) -> None:
    """Print the aliases, then the models and the adapters in the Hub's cache."""
    folder = _setting("cache_dir", cache_dir)
    rows = list(map(asdict, cached_models(folder)))
    if as_json:
        out().print_json(data=rows, default=str)
        return
    shown = table("name", "kind", ">size", "cached", "description")
    shown.columns[0].no_wrap = True
    for row in rows:
        cached = "yes" if row["path"] else "no"
        shown.add_row(row["name"], row["kind"], format_size(row["nbytes"]), cached, row["description"])
    print_table(out(), shown)


def run_pull(model: str, revision: str | None, cache_dir: Path | None) -> None:
    """Download ``model`` and print its path. Raises as ``resolve_source``."""
    from truffula.weights.sources import resolve_source

    folder, offline = _setting("cache_dir", cache_dir), _setting("offline")
    with progress() as report:
        path = resolve_source(model, cache_dir=folder, offline=offline, revision=revision, progress=report)
    out().print(str(path))
