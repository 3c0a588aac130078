"""The values of the options. A flag wins over a variable, a variable over a configuration file, a file over a default.

The short name of an option is its field without the unit: ``memory_bytes`` is ``--memory`` and ``TRUFFULA_MEMORY``.
A configuration file is TOML, YAML or JSON: one table of options by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from truffula.config import ENGINE_PROCESS, OPTIONS, EngineConfig, ServerConfig, options_of
from truffula.environment import PREFIX, expanded, variables
from truffula.errors import ConfigError, did_you_mean, nearest
from truffula.option import Option

CONFIG_VARIABLE = PREFIX + "CONFIG"
"""The variable that names the configuration file; ``--config`` overrides it."""
# Variables in which other servers look for the model.
_MODEL_VARIABLES = MappingProxyType({"MODEL_ID": "LoRAX and TGI", "LLAMA_ARG_MODEL": "llama.cpp"})
# Every name of an option (short name, field and flag, with underscores) → its short name.
_NAMES = MappingProxyType(
    {word: name for name, option in OPTIONS.items() for word in (name, option.field, option.singular)}
)


@dataclass(frozen=True)
class Setting:
    """One resolved option: ``source`` is its flag, variable or line of a file; "" for a default."""

    option: Option
    value: Any
    origin: Literal["default", "environment", "file", "option"]
    source: str = ""

    @property
    def shown(self) -> str:
        return self.option.show(self.value)


@dataclass(frozen=True)
class Resolved:
    """Both configs, and all settings with their origins, in the order of the options."""

    engine: EngineConfig
    server: ServerConfig
    settings: tuple[Setting, ...]


def load_config(cli: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Resolved:
    """The configs of ``load_settings``. ``env`` is by default the environment of the process.

    Raises:
        ConfigError: As ``load_settings``, no model was given, or an option has no effect with the transport.
    """
    env = variables(env)
    settings = load_settings(cli, env)
    values = {setting.option.field: setting.value for setting in settings}
    if "model" not in values:
        raise _no_model(env)
    engine = EngineConfig(**{o.field: values[o.field] for o in options_of(EngineConfig)})
    server = ServerConfig(**{o.field: values[o.field] for o in options_of(ServerConfig)})
    if server.transport == "inline":
        _refuse_without_effect(settings)
    return Resolved(engine, server, settings)


def load_settings(cli: Mapping[str, Any], env: Mapping[str, str] | None = None) -> tuple[Setting, ...]:
    """Every option's value and origin, without required options that were not given.

    ``cli`` holds options by short or field name (None: not given), and ``config``, the path of a configuration file. By
    default the variable ``TRUFFULA_CONFIG`` names the file, if any.

    Raises:
        ConfigError: Unknown option or ``TRUFFULA_`` variable (the nearest known one is named), a malformed value, or a
            configuration file that cannot be read.
    """
    env = variables(env)
    known = {CONFIG_VARIABLE, *(option.env for option in OPTIONS.values())}
    for name in env:
        if name.startswith(PREFIX) and name not in known:
            raise ConfigError(f"Unknown environment variable {name}.{did_you_mean(nearest(name, known))}", param=name)
    given = dict(cli)
    file = given.pop("config", None) or env.get(CONFIG_VARIABLE)
    for key in given:
        if key not in _NAMES:
            raise ConfigError(f"Unknown option {key!r}.{did_you_mean(nearest(key, _NAMES))}", param=key)
    flags = {_NAMES[key]: value for key, value in given.items() if value is not None}
    written = _read_file(expanded(file)) if file else {}
    found = [_setting(option, flags, env, written) for option in OPTIONS.values()]
    return tuple(setting for setting in found if setting is not None)


def load_setting(name: str, given: Any = None) -> Setting:
    """One option by its short name: ``given``, or the value of ``load_settings``."""
    return next(setting for setting in load_settings({name: given}) if setting.option.name == name)


def require_paths(settings: Iterable[Setting]) -> None:
    """Raise ``ConfigError`` for the first setting whose path is not the required kind of file or folder."""
    for setting in settings:
        option = setting.option
        if not option.must_be or setting.value is None:
            continue
        for path in setting.value if isinstance(setting.value, tuple) else [setting.value]:
            allowed = path.is_file() if option.must_be == "file" else path.is_dir()
            if not allowed and not (option.must_be == "new folder" and not path.exists()):
                raise option.error(str(path), setting.source or option.name)


def _refuse_without_effect(settings: Iterable[Setting]) -> None:
    """Raise ``ConfigError`` for the first setting that only concerns an engine in a process of its own."""
    for setting in settings:
        option = setting.option
        if option.topic == ENGINE_PROCESS and option.name != "transport" and setting.origin != "default":
            raise ConfigError(
                f"{setting.source} has no effect with --transport inline, where the engine is part of the server's "
                "process. Leave it out, or use --transport process.",
                param=option.field,
            )


def _setting(
    option: Option, flags: Mapping[str, Any], env: Mapping[str, str], written: Mapping[str, tuple[Any, str]]
) -> Setting | None:
    if option.name in flags:
        return Setting(option, option.parse(flags[option.name], option.flag), "option", option.flag)
    # An empty variable counts as unset, except for secrets: the server would run without the keys it should require.
    if env.get(option.env, "") != "" or (option.secret and option.env in env):
        return Setting(option, option.parse(env[option.env], option.env), "environment", option.env)
    if option.name in written:
        value, where = written[option.name]
        return Setting(option, option.parse(value, f"{option.name} ({where})"), "file", where)
    for name in option.foreign:
        if env.get(name, "") != "":
            return Setting(option, option.parse(_foreign(name, env[name]), name), "environment", name)
    return None if option.required else Setting(option, option.default, "default")


def _foreign(name: str, value: str) -> Any:
    """The value of another tool's variable, parsed as that tool does."""
    if name == "HF_HUB_OFFLINE":
        return value.upper() in ("1", "ON", "YES", "TRUE")
    return expanded(value) / "hub" if name == "HF_HOME" else value


def _no_model(env: Mapping[str, str]) -> ConfigError:
    text = f"No model given: pass MODEL, such as smollm2, or set {PREFIX}MODEL."
    for name, server in _MODEL_VARIABLES.items():
        if env.get(name):
            text += f" {name} is set, but it is a variable of {server}; truffula reads {PREFIX}MODEL."
    return ConfigError(text, param="model")


def _read_file(path: Path) -> dict[str, tuple[Any, str]]:
    """The options of a configuration file: short name → value, and file and line for errors.

    ``max-running`` and ``max_running`` are the same name.

    Raises:
        ConfigError: The file cannot be read, is malformed, is not a table, or names an unknown option, or one twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = _parse_file(path, text)
    except OSError as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error.strerror}.", param="config") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The configuration file {path} is malformed: {error}.", param="config") from error
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise ConfigError(f"{path} must contain one table of options, such as port = 8000.", param="config")
    found: dict[str, tuple[Any, str]] = {}
    for key, value in table.items():
        where, name = _where(path, text, key), _NAMES.get(key.replace("-", "_"))
        if name is None:
            shown = [known.replace("_", "-") for known in _NAMES] if "-" in key else _NAMES
            raise ConfigError(f"{where}: unknown option {key!r}.{did_you_mean(nearest(key, shown))}", param=key)
        if name in found:
            raise ConfigError(f"{where}: {key} is set twice, under two of its names.", param=key)
        found[name] = value, where
    return found


def _where(path: Path, text: str, key: str) -> str:
    """The file and, if it is found, the line of ``key``."""
    # A bare key, a key in quotes, or the header of a TOML table.
    written = re.compile(rf"""^\s*[\[{{,]*\s*["']?{re.escape(key)}["']?\s*[=:\]]""")
    lines = (number for number, line in enumerate(text.splitlines(), 1) if written.match(line))
    number = next(lines, None)
    return str(path) if number is None else f"{path}, line {number}"


def _parse_file(path: Path, text: str) -> Any:
    """The content of a file, by its suffix. Raises ``ValueError`` when it is malformed."""
    suffix = path.suffix.lower()
    if suffix == ".toml":
        import tomllib

        return tomllib.loads(text)
    if suffix == ".json":
        import json

        return json.loads(text, object_pairs_hook=lambda pairs: _table(path, pairs))
    if suffix in (".yaml", ".yml"):
        return _parse_yaml(path, text)
    raise ConfigError(
        f"{path} is not a configuration file: its name must end in .toml, .yaml or .json.", param="config"
    )


def _parse_yaml(path: Path, text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """``SafeLoader``, which itself keeps the last of two equal keys without an error."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _table(path, [(key.value, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)])
            return super().construct_mapping(node, deep)

    try:
        loaded = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return {} if loaded is None else loaded


def _table(path: Path, pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """``pairs`` as a dict. Raises ``ConfigError`` for the first key that occurs twice."""
    table: dict[Any, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ConfigError(f"{path} names {key} twice.", param="config")
        table[key] = value
    return table
