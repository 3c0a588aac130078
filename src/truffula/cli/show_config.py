"""``truffula config --show``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from truffula.cli.output import out, table
from truffula.config import load_settings


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def run_config(*, as_json: bool) -> None:
    settings = load_settings({})
    if as_json:
        rows = [{"name": s.option.name, "value": s.shown, "origin": s.origin, "source": s.source} for s in settings]
        out().print_json(json.dumps(rows, default=_plain))
        return
    console = out()
    for group in ("engine", "server"):
        shown = table("option", "variable", "value", "from", "help", title=f"{group} options")
        for setting in (s for s in settings if s.option.group == group):
            origin = setting.source or setting.origin
            value = f"[bold]{setting.shown}[/]" if setting.origin != "default" else setting.shown
            shown.add_row(setting.option.flag, setting.option.env, value, origin, setting.option.help)
        console.print(shown)
        console.print()
    console.print("[dim]Set an option by its flag or its variable; flags win.[/]")
