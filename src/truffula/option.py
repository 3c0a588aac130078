"""One option: its names, the values it allows, and how they are parsed and shown. ``config.py`` lists them all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from truffula.environment import PREFIX, expanded
from truffula.errors import ConfigError

Kind = Literal["text", "path", "integer", "seconds", "size", "switch", "list", "paths", "mapping"]
UNITS = MappingProxyType(
    {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    | {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
)
PLACES = MappingProxyType(
    {
        "file": "a file that exists",
        "folder": "a folder that exists",
        "new folder": "a folder, or a path where one can be created",
    }
)


@dataclass(frozen=True)
class Option:
    """One option.

    ``group`` is the config class that holds the option (engine or server), ``topic`` its section of the help. ``help``
    is a phrase without a full stop. ``nullable``: whether ``none`` is a value, for no limit. ``metavar`` replaces the
    placeholder of the kind. ``unset`` describes the value that is used when the option is not set. ``must_be`` is what
    must exist at a path, one of ``PLACES``. ``note`` is appended to the error for a wrong value. ``foreign`` are
    variables of other tools, read when truffula's own variable is not set.
    """

    field: str
    group: str
    kind: Kind
    nullable: bool
    default: Any
    topic: str
    help: str
    metavar: str = ""
    short: str = ""
    unset: str = ""
    must_be: Literal["", "file", "folder", "new folder"] = ""
    note: str = ""
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    secret: bool = False
    foreign: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def name(self) -> str:
        """The field without its unit."""
        return re.sub(r"_(bytes|s)$", "", self.field)

    @property
    def singular(self) -> str:
        """The name for one value, ``adapter`` of ``adapters``."""
        return self.name.removesuffix("s") if self.repeatable else self.name

    @property
    def env(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        return "--" + self.singular.replace("_", "-")

    @property
    def placeholder(self) -> str:
        """The placeholder of the value in the help, such as ``SIZE`` or ``text|json``; empty for a switch."""
        return self.metavar or "|".join(self.choices) or _KINDS[self.kind].metavar

    @property
    def repeatable(self) -> bool:
        """Whether the flag may be given several times; a variable has several values separated by commas."""
        return self.kind in ("list", "paths", "mapping")

    @property
    def expected(self) -> str:
        """The description of allowed values in error messages."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = PLACES[self.must_be] if self.must_be else _KINDS[self.kind].expected
        if self.low > -math.inf:
            words += f", at least {self.low:.12g}"
        if self.high < math.inf:
            words += f" and at most {self.high:.12g}"
        return words

    def parse(self, raw: Any, where: str) -> Any:
        """``raw`` (text, or a typed value) as a value of this option. ``where`` is its origin, for the error."""
        if self.secret and _has_empty(raw):
            raise ConfigError(f"{where} is empty. Set a key, or leave it out to serve without keys.", param=self.name)
        try:
            value = None if self.nullable and raw in (None, "none") else _KINDS[self.kind].parse(raw)
        except (ValueError, TypeError, OverflowError):
            raise self.error(raw, where) from None
        outside = isinstance(value, int | float) and not self.low <= value <= self.high
        if outside or (self.choices and value not in (None, *self.choices)):
            raise self.error(raw, where)
        return value

    def error(self, raw: Any, where: str) -> ConfigError:
        """The error for a wrong value; ``where`` is its variable, flag, field or line of a file."""
        joined = ",".join(map(str, raw)) if isinstance(raw, list | tuple) else raw
        shown = "(hidden)" if self.secret else repr(joined)
        text = f"{where} is {shown}; it must be {self.expected}. {self.note}"
        return ConfigError(text.rstrip(), param=self.name, expected=self.expected)

    def show(self, value: Any) -> str:
        """The value as ``config --show`` prints it; of secrets, only their number."""
        if self.secret:
            return f"({len(value)} set)" if value else "(none)"
        if value is None or value == () or value == {}:
            return "-"
        if self.kind == "switch":
            return "on" if value else "off"
        if self.kind == "size":
            return format_size(value)
        if isinstance(value, Mapping):
            return ", ".join(f"{k}={v}" for k, v in value.items())
        if isinstance(value, float):
            return f"{value:.12g}"
        return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def kind_of(field: str, hint: Any) -> tuple[Kind, bool]:
    """The kind of a field of type ``hint``, and whether it may be None. A field in bytes is a size."""
    nullable = type(None) in get_args(hint)
    own = get_args(hint)[0] if nullable else hint
    if field.endswith("_bytes"):
        return "size", nullable
    return next(kind for kind, spec in _KINDS.items() if spec.type == own), nullable


def parse_size(text: str | int) -> int:
    """Bytes from ``4GiB``, ``1.5 GB``, ``512MiB`` or a plain number; ``ValueError`` otherwise."""
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise ValueError(text)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(text)
    unit = UNITS[match[2].upper()]
    return int(match[1]) * unit if match[1].isdigit() else int(float(match[1]) * unit)


def format_size(nbytes: int) -> str:
    """A byte count with a binary unit, ``1.25 GiB``; exact below 1 KiB."""
    for unit, step in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(nbytes) >= step:
            return f"{nbytes / step:.2f}".rstrip("0").rstrip(".") + f" {unit}"
    return f"{nbytes} B"


def _text(raw: Any) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError(raw)
    return raw


def _path(raw: Any) -> Path:
    return raw if isinstance(raw, Path) else expanded(_text(raw))


def _integer(raw: Any) -> int:
    if isinstance(raw, bool) or not isinstance(raw, str | int):
        raise ValueError(raw)
    return int(raw)


def _seconds(raw: Any) -> float:
    value = float(raw)
    if isinstance(raw, bool) or not math.isfinite(value):
        raise ValueError(raw)
    return value


def _switch(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    word = str(raw).strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError(raw)


def _has_empty(raw: Any) -> bool:
    """Whether ``raw`` is empty text or has an empty entry, as an unset shell variable makes it; False for ``()``."""
    items = [raw] if isinstance(raw, str) else raw if isinstance(raw, list | tuple) else []
    return any(not part.strip() for item in items if isinstance(item, str) for part in item.split(","))


def _items(raw: Any) -> Iterable[Any]:
    if isinstance(raw, Mapping):
        raise ValueError(raw)
    return [raw] if isinstance(raw, str | Path) else raw


def _list(raw: Any) -> tuple[str, ...]:
    """The items of text separated by commas, or of a list of such texts."""
    return tuple(part.strip() for item in _items(raw) if item != "" for part in _text(item).split(",") if part.strip())


def _paths(raw: Any) -> tuple[Path, ...]:
    return tuple(_path(part) for item in _items(raw) for part in ([item] if isinstance(item, Path) else _list(item)))


def _named_source(item: str) -> tuple[str, str]:
    """(name, source) of ``NAME=SOURCE``, or of a folder or Hub id alone, which is named by its last part."""
    name, equals, source = item.partition("=")
    if equals:
        return _text(name).strip(), _text(source).strip()
    folder = expanded(item)
    if "/" not in item and not folder.is_dir():
        raise ValueError(item)
    return _text(folder.resolve().name), item


def _mapping(raw: Any) -> Mapping[str, str]:
    if isinstance(raw, Mapping):
        pairs = [(_text(name), str(_text(str(source)))) for name, source in raw.items()]
    else:
        pairs = [_named_source(item) for item in _list(raw)]
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError(raw)
    return MappingProxyType(dict(pairs))


class _KindSpec(NamedTuple):
    """A kind of option: type of its field, parser (``ValueError`` for a wrong value), its words in errors and help."""

    type: Any
    parse: Callable[[Any], Any]
    expected: str
    metavar: str


_KINDS: Mapping[Kind, _KindSpec] = MappingProxyType(
    {
        "text": _KindSpec(str, _text, "text", "TEXT"),
        "path": _KindSpec(Path, _path, "a path", "PATH"),
        "integer": _KindSpec(int, _integer, "an integer", "N"),
        "seconds": _KindSpec(float, _seconds, "a number of seconds", "SECONDS"),
        "size": _KindSpec(int, parse_size, "bytes, such as 512MiB, 4GiB or 2000000000", "SIZE"),
        "switch": _KindSpec(bool, _switch, "one of 1, 0, true, false, yes, no, on, off", ""),
        "list": _KindSpec(tuple[str, ...], _list, "text, several separated by commas", "TEXT"),
        "paths": _KindSpec(tuple[Path, ...], _paths, "a path, several separated by commas", "FOLDER"),
        "mapping": _KindSpec(
            Mapping[str, str],
            _mapping,
            "NAME=FOLDER, NAME=ORG/REPO, NAME=URL or a folder alone, several separated by commas",
            "NAME=FOLDER",
        ),
    }
)
