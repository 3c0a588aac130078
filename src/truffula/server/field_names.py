"""Names of request fields in the APIs of other servers and clients, and what this server's routes call them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any


def squeezed(name: str) -> str:
    """``name`` without case and separators: ``maxTokens``, ``max-tokens`` and ``max_tokens`` are one name."""
    return name.replace("_", "").replace("-", "").lower()


def has_no_effect(value: Any, no_effect: tuple[Any, ...]) -> bool:
    """Whether ``value`` has no effect: null, or one of ``no_effect``. A boolean never equals a number."""
    if value is None:
        return True
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in no_effect)


@dataclass(frozen=True, slots=True)
class Aliases:
    """Names of one field. A route calls it by the first name that is a field of the route.

    ``no_effect`` are values without effect, beside null. ``advice`` is for routes without such a field.
    """

    names: tuple[str, ...]
    no_effect: tuple[Any, ...] = ()
    advice: str = "leave it out"


_TABLES = tomllib.loads(Path(__file__).with_name("field_names.toml").read_text(encoding="utf-8"))
ALIASES = tuple(
    Aliases(tuple(row["names"].split()), tuple(row.get("no_effect", ())), row.get("advice", "leave it out"))
    for row in _TABLES["aliases"]
)
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {name: tuple(values) for name, values in _TABLES["unsupported"].items()}
)
"""No route has such a field: name → values that are accepted because they have no effect."""
INERT: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {name: tuple(values) for name, values in _TABLES["inert"].items()}
)
"""Known, and without effect on the text: name → values without a meaning. Another value is listed as ignored."""
HOLDERS = frozenset(_TABLES["holders"])
"""Objects in which other servers and clients put fields of a request. What is inside has no effect here."""
