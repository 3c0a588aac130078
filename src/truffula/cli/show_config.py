"""``truffula config --show``."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from truffula.cli.options import TOPICS, place
from truffula.cli.output import out, print_table, table
from truffula.settings import load_settings


def run_config(config_file: Path | None, *, as_json: bool) -> None:
    """Print every option with its value and its origin, under the sections of the help."""
    settings = sorted(load_settings({"config": config_file}), key=lambda setting: place(setting.option))
    if as_json:
        rows = [{"name": s.option.name, "value": s.shown, "origin": s.origin, "source": s.source} for s in settings]
        out().print_json(data=rows)
        return
    console = out()
    for topic in TOPICS:
        shown = table("variable", "value", "from", title=topic)
        shown.columns[0].no_wrap = True
        for setting in (s for s in settings if s.option.topic == topic):
            text = setting.option.unset if setting.value is None and setting.option.unset else setting.shown
            value = Text(text, style="bold" if setting.origin != "default" else "")
            shown.add_row(setting.option.env, value, Text(setting.source or setting.origin))
        print_table(console, shown)
        console.print()
    console.print("A flag wins over a variable, a variable over the file, and the file over the default.", style="dim")
