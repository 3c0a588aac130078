"""Reads configuration files: TOML, YAML or JSON, one table of options by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truffula.errors import ConfigError
from truffula.option import expanded


@dataclass(frozen=True)
class Entry:
    """One value of a file and its location for errors: ``serve.toml, line 3``."""

    value: Any
    where: str


def read_config_file(path: Path) -> Mapping[str, Entry]:
    """The options in ``path``, by their names in the file. Its suffix is .toml, .yaml, .yml or .json.

    Raises:
        ConfigError: The file cannot be read, is malformed, names an option twice, or is not a table.
    """
    path = expanded(path)
    reader = {".toml": _read_toml, ".json": _read_json, ".yaml": _read_yaml, ".yml": _read_yaml}.get(
        path.suffix.lower()
    )
    if reader is None:
        raise ConfigError(
            f"{path} is not a configuration file: its name must end in .toml, .yaml or .json.", param="config"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"The configuration file {path} cannot be read: {reason}.", param="config") from error
    table = reader(path, text)
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise ConfigError(f"{path} must contain one table of options, such as port = 8000.", param="config")
    return {key: Entry(value, _where(path, text, key)) for key, value in table.items()}


def _where(path: Path, text: str, key: str) -> str:
    """The file and, if it is found, the line of ``key``."""
    # A bare key, a key in quotes, or the header of a TOML table.
    written = re.compile(rf"""^\s*[\[{{,]*\s*["']?{re.escape(key)}["']?\s*[=:\]]""")
    lines = (number for number, line in enumerate(text.splitlines(), 1) if written.match(line))
    number = next(lines, None)
    return str(path) if number is None else f"{path}, line {number}"


def _malformed(path: Path, reason: object) -> ConfigError:
    return ConfigError(f"The configuration file {path} is malformed: {reason}.", param="config")


def _duplicate(path: Path, key: object) -> ConfigError:
    return ConfigError(f"{path} names {key} twice.", param="config")


def _read_toml(path: Path, text: str) -> Any:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _malformed(path, error) from error


def _read_json(path: Path, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise _duplicate(path, key)
            table[key] = value
        return table

    try:
        return json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
        raise _malformed(path, error) from error


def _read_yaml(path: Path, text: str) -> Any:
    import yaml

    try:
        # The loader silently keeps the last of two equal keys, so duplicates are searched first.
        _reject_duplicate_keys(path, yaml.compose(text, Loader=yaml.SafeLoader))
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _malformed(path, " ".join(str(error).split())) from error
    return {} if loaded is None else loaded


def _reject_duplicate_keys(path: Path, node: Any) -> None:
    """Raise ``ConfigError`` when a mapping of the YAML document has a duplicate key."""
    if node is None or not isinstance(node.value, list):
        return
    seen: set[str] = set()
    for item in node.value:
        key, inner = item if isinstance(item, tuple) else (None, item)
        if key is not None:
            if key.value in seen:
                raise _duplicate(path, key.value)
            seen.add(str(key.value))
        _reject_duplicate_keys(path, inner)
