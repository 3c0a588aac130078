"""Charts as SVG text: groups of bars on one scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT = 760, 150, 60  # pixels: all of it, the names of the bars, the values behind them
TOP, BAR, GAP, TITLE, FOOT = 66, 20, 14, 24, 30
STYLE = """\
  text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
  .title { font-size: 17px; font-weight: 600; }
  .group { font-weight: 600; }
  .note { font-size: 12px; fill: #59636e; }
  .name { text-anchor: end; }
  .ours { fill: #bf3989; }
  .theirs { fill: #9198a1; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .note { fill: #9198a1; }
    .ours { fill: #f778ba; }
    .theirs { fill: #656c76; }
  }"""


@dataclass(frozen=True)
class Bars:
    """A group of bars: their names and values, which of them are drawn in colour, and where a goal is marked."""

    title: str
    values: Sequence[tuple[str, float]]
    ours: frozenset[str] = frozenset()
    goal: float | None = None


def bars(title: str, subtitle: str, groups: Sequence[Bars], source: str) -> str:
    """A chart of ``groups``, all on one scale from 0."""
    most = max(value for group in groups for value in (*(value for _, value in group.values), group.goal or 0.0))
    scale = (WIDTH - LEFT - RIGHT) / most
    parts, y = [], TOP
    for group in groups:
        parts.append(f'<text class="group" x="{LEFT}" y="{y + 14}">{escape(group.title)}</text>')
        y += TITLE
        first = y
        for name, value in group.values:
            width = f"{value * scale:.1f}".rstrip("0").rstrip(".")
            middle = y + BAR / 2 + 4.5
            kind = "ours" if name in group.ours else "theirs"
            parts += [
                f'<text class="name" x="{LEFT - 8}" y="{middle}">{escape(name)}</text>',
                f'<rect class="{kind}" x="{LEFT}" y="{y + 2}" width="{width}" height="{BAR - 4}" rx="2"/>',
                f'<text x="{LEFT + float(width) + 6:.1f}" y="{middle}">{shown(value)}</text>',
            ]
            y += BAR
        if group.goal is not None:
            at = LEFT + group.goal * scale
            parts.append(f'<path d="M{at:.1f} {first - 1}V{y + 1}" stroke="#59636e" stroke-dasharray="3 2"/>')
        y += GAP
    told = (
        f"{group.title}: " + ", ".join(f"{name} {shown(value)}" for name, value in group.values) for group in groups
    )
    return document(title, subtitle, told, parts, y + FOOT - GAP, source)


def document(title: str, subtitle: str, told: Iterable[str], parts: Sequence[str], height: int, source: str) -> str:
    """A chart of ``parts``. ``told`` is it in words, for readers who do not see it."""
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'role="img">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape('; '.join(told))}</desc>",
        f"<style>\n{STYLE}\n</style>",
        f'<text class="title" x="8" y="26">{escape(title)}</text>',
        f'<text class="note" x="8" y="48">{escape(subtitle)}</text>',
    ]
    foot = [f'<text class="note" x="8" y="{height - 10}">{escape(source)}</text>', "</svg>"]
    return "\n".join([*head, *parts, *foot]) + "\n"


def shown(value: float) -> str:
    """Three digits, as in the tables."""
    return f"{value:#.3g}".rstrip(".")
