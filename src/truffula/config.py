"""Every option, and the only reader of the environment.

A row per option is a field of ``EngineConfig`` or ``ServerConfig``: default, kind, bounds and help stand together; the
command line, ``config --show`` and the error messages are made from them. An object that exists is valid: constructors
check too. What is *found out* (blocks that fit, the backend) is another frozen type, ``engine.build.EngineSettings``.

An option's short name is its field without the unit: ``memory_bytes`` is ``--memory`` and ``TRUFFULA_MEMORY``.
Precedence: option over environment over default.
"""

from __future__ import annotations

import difflib
import ipaddress
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from truffula.errors import ConfigError

log = logging.getLogger(__name__)

Kind = Literal["text", "path", "integer", "seconds", "size", "switch", "list", "paths", "mapping"]
Origin = Literal["default", "environment", "option"]
PREFIX = "TRUFFULA_"
# What Kubernetes puts into every container for each Service; one called truffula (or truffula-x) shares our prefix.
_SERVICE_NAME = re.compile(r".*_SERVICE_(HOST|PORT(_.+)?)|.*_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://.*", re.IGNORECASE)
UNITS = MappingProxyType(
    {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    | {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
)
EXPECTED = MappingProxyType(
    {
        "text": "text",
        "path": "a path",
        "integer": "a whole number",
        "seconds": "a number of seconds",
        "size": "bytes, such as 512MiB, 4GiB or 2000000000",
        "switch": "one of 1, 0, true, false, yes, no, on, off",
        "list": "a list separated by commas",
        "paths": "a list of paths separated by commas",
        "mapping": "name=source, several separated by commas",
    }
)


@dataclass(frozen=True)
class Option:
    """One row. ``foreign`` are other tools' variables that are honoured when ours is not set."""

    field: str
    group: str
    kind: Kind
    default: Any
    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    nullable: bool = False
    secret: bool = False
    singular: str = ""
    foreign: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def name(self) -> str:
        """The field without its unit."""
        return re.sub(r"_(bytes|s)$", "", self.field)

    @property
    def env(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        return "--" + (self.singular or self.name).replace("_", "-")

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        words = "one of " + ", ".join(self.choices) if self.choices else str(EXPECTED[self.kind])
        if self.low > -math.inf:
            words += f", at least {self.low:.12g}"
        if self.high < math.inf:
            words += f" and at most {self.high:.12g}"
        return words

    def parse(self, raw: Any, where: str) -> Any:
        """``raw`` (text, or a value already typed) as this option's value. ``where`` names its origin in the error."""
        if self.secret and _has_empty(raw):
            raise ConfigError(f"{where} is empty. Give a key, or leave it out to serve without keys.", param=self.name)
        try:
            value = None if self.nullable and raw in (None, "none") else _PARSERS[self.kind](raw)
        except (ValueError, TypeError, OverflowError):
            raise self.refusal(raw, where) from None
        if value is not None and self.kind in ("integer", "seconds", "size") and not self.low <= value <= self.high:
            raise self.refusal(raw, where)
        if self.choices and value is not None and value not in self.choices:
            raise self.refusal(raw, where)
        return value

    def refusal(self, raw: Any, where: str) -> ConfigError:
        """The error for a value that can't be; ``where`` is its variable, flag or field."""
        shown = "(hidden)" if self.secret else repr(raw)
        return ConfigError(f"{where} is {shown}; it must be {self.expected}.", param=self.name, expected=self.expected)

    def show(self, value: Any) -> str:
        """The value as ``config --show`` prints it; secrets only counted."""
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
        return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


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
    """Bytes for people: ``1.25 GiB``; exact below 1 KiB."""
    for unit, step in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(nbytes) >= step:
            return f"{nbytes / step:.2f}".rstrip("0").rstrip(".") + f" {unit}"
    return f"{nbytes} B"


def _text(raw: Any) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError(raw)
    return raw


def _path(raw: Any) -> Path:
    return raw if isinstance(raw, Path) else Path(_text(raw)).expanduser()


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


def _list(raw: Any) -> tuple[str, ...]:
    items: Iterable[Any] = raw.split(",") if isinstance(raw, str) else raw
    return tuple(_text(item).strip() for item in items if item != "")


def _has_empty(raw: Any) -> bool:
    """Whether a list that was given holds an empty entry, or is an empty text: an unset shell variable, mostly."""
    items = raw.split(",") if isinstance(raw, str) else raw
    return isinstance(items, list | tuple) and any(isinstance(item, str) and not item.strip() for item in items)


def _mapping(raw: Any) -> Mapping[str, str]:
    if isinstance(raw, Mapping):
        pairs = [(_text(name), str(_text(str(source)))) for name, source in raw.items()]
    else:
        split = [item.partition("=") for item in _list(raw)]
        pairs = [(_text(name).strip(), _text(source).strip()) for name, _, source in split]
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError(raw)
    return MappingProxyType(dict(pairs))


_PARSERS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "text": _text,
        "path": _path,
        "integer": _integer,
        "seconds": _seconds,
        "size": parse_size,
        "switch": _switch,
        "list": _list,
        "paths": lambda raw: tuple(_path(p) for p in (_list(raw) if isinstance(raw, str) else raw)),
        "mapping": _mapping,
    }
)


# ruff: noqa: RUF009  (``_row`` makes a dataclass field)
def _row(default: Any, kind: Kind, help: str, **more: Any) -> Any:
    """A field that is an option; ``default`` MISSING makes it required, None makes it nullable."""
    row = {"default": default, "kind": kind, "help": help, "nullable": default is None, **more}
    if default is MISSING:
        return field(metadata={"option": row})
    if kind == "mapping":
        return field(default_factory=lambda: default, metadata={"option": row})
    return field(default=default, repr=not more.get("secret", False), metadata={"option": row})


def _check(config: Any) -> None:
    """Refuse a value that is out of bounds or not of its option's type."""
    for option in options_of(type(config)):
        value = getattr(config, option.field)
        if option.parse(value, option.field) != value:
            raise option.refusal(value, option.field)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine is started with. Crosses to the engine's process; holds no secrets."""

    model: str = _row(MISSING, "text", "base model: a folder, a .gguf file, an alias or a Hugging Face id")
    revision: str | None = _row(None, "text", "revision of a Hub id (branch, tag or commit)")
    device: str = _row("cpu", "text", "device to run on")
    dtype: str = _row(
        "auto",
        "text",
        "compute dtype; auto takes the faster of float32 and bfloat16",
        choices=("auto", "float32", "bfloat16"),
    )
    backend: str = _row("auto", "text", "kernel backend")
    cpu_isa: str = _row("auto", "text", "instruction set of the cpu backend (doctor lists them); auto takes the best")
    quantize: str = _row(
        "none", "text", "format that a checkpoint's float matrices are rounded to at load", choices=("none", "q8_0")
    )
    exact: bool = _row(False, "switch", "compute on the values of quantised files, not in int8")
    threads: int | None = _row(None, "integer", "compute threads (default: the CPUs we may use)", low=1, high=1024)
    max_model_len: int | None = _row(None, "integer", "longest prompt + completion (default: the model's)", low=1)
    memory_bytes: int | None = _row(
        None, "size", "memory for weights, KV and adapters (default: 85 % of what is free)", low=1
    )
    step_tokens: int = _row(512, "integer", "most tokens computed in one step", low=1, high=2**20)
    max_running: int = _row(64, "integer", "most sequences in one step", low=1, high=2**16)
    max_waiting: int = _row(1024, "integer", "most sequences waiting; more are refused as overloaded", low=0)
    block_size: int = _row(16, "integer", "tokens per KV block", low=1, high=1024)
    prefix_cache: bool = _row(True, "switch", "reuse the KV of equal prompt beginnings")
    look_ahead: int = _row(32, "integer", "waiting sequences whose adapters are loaded ahead", low=1, high=4096)
    adapter_memory_bytes: int | None = _row(
        None, "size", "most memory for adapters (default: the common budget alone)", low=1
    )
    adapter_load_timeout_s: float = _row(120.0, "seconds", "longest loading of one adapter", low=0.001)
    adapter_download_timeout_s: float = _row(1800.0, "seconds", "longest loading of one adapter of the Hub", low=0.001)
    adapter_failure_ttl_s: float = _row(10.0, "seconds", "how long a failed adapter is not tried again", low=0)
    max_adapter_file_bytes: int = _row(8 * 2**30, "size", "largest adapter file that is read", low=1)
    adapter_worker_memory_bytes: int = _row(2**30, "size", "memory of the loading worker beside the files", low=2**20)
    offline: bool = _row(False, "switch", "never ask the Hub", foreign=("HF_HUB_OFFLINE",))
    cache_dir: Path | None = _row(None, "path", "where downloads are kept", foreign=("HF_HUB_CACHE", "HF_HOME"))
    start_timeout_s: float = _row(
        1800.0, "seconds", "longest start of the engine's process, without progress", low=0.001
    )
    heartbeat_timeout_s: float = _row(10.0, "seconds", "silence after which the engine counts as unhealthy", low=1.0)
    step_timeout_s: float = _row(
        120.0, "seconds", "length of one step after which the engine counts as unhealthy", low=1.0
    )
    hang_timeout_s: float = _row(
        30.0, "seconds", "how long the engine may be unhealthy before it is killed and restarted", low=0.001
    )
    max_restarts: int = _row(5, "integer", "restarts of a dead engine within the restart window", low=0)
    restart_window_s: float = _row(300.0, "seconds", "the window in which restarts are counted", low=0.001)

    def __post_init__(self) -> None:
        _check(self)
        if self.exact and self.quantize != "none":
            raise ConfigError(
                f"exact and quantize={self.quantize} contradict each other: a rounded checkpoint is not exact.",
                param="quantize",
            )


def state_folder() -> Path:
    """Where truffula keeps what is neither configuration nor cache, such as the history of ``chat``."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if state.startswith("/") else Path.home() / ".local" / "state") / "truffula"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``; a name other than localhost may be anybody's."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the HTTP server adds."""

    host: str = _row("127.0.0.1", "text", "address to listen on")
    port: int = _row(8000, "integer", "port to listen on; 0 takes a free one", low=0, high=65535)
    transport: str = _row("process", "text", "where the engine runs", choices=("process", "thread", "inline"))
    served_model_name: str | None = _row(None, "text", "name of the base model in answers (default: as given)")
    api_keys: tuple[str, ...] = _row(
        (), "list", "keys of which requests must carry one", secret=True, singular="api_key"
    )
    protect_metrics: bool = _row(False, "switch", "the metrics need an API key too")
    cors_origins: tuple[str, ...] = _row(
        ("*",), "list", "origins whose web pages may call the server; none for no page", singular="cors_origin"
    )
    salt_by_api_key: bool = _row(True, "switch", "requests of different API keys never share prefix-cache blocks")
    adapters: Mapping[str, str] = _row(
        MappingProxyType({}), "mapping", "adapter served by this name", singular="adapter"
    )
    adapter_dir: Path | None = _row(None, "path", "each subfolder is an adapter, found when it is asked for")
    allow_local: tuple[Path, ...] = _row((), "paths", "folders below which clients may name adapters by path")
    allow_hub: tuple[str, ...] = _row((), "list", "Hub ids clients may name as adapters, such as my-org/*")
    adapter_source: str = _row("hub", "text", "source of an adapter id that names none", choices=("hub", "local"))
    adapter_admin: bool = _row(False, "switch", "serve the routes that load and unload adapters")
    queue_timeout_s: float | None = _row(
        60.0, "seconds", "longest wait for a place in the batch, beside its adapter's loading", low=0.001, nullable=True
    )
    request_timeout_s: float | None = _row(600.0, "seconds", "longest request", low=0.001, nullable=True)
    max_body_bytes: int = _row(2 * 2**20, "size", "largest request body", low=1024)
    body_timeout_s: float = _row(60.0, "seconds", "longest arrival of a request's head, and of its body", low=0.001)
    send_timeout_s: float = _row(
        60.0, "seconds", "longest standstill of a stream that its client does not read", low=0.001
    )
    max_open_requests: int = _row(2048, "integer", "most requests at once; more are refused as overloaded", low=1)
    max_best_of: int = _row(2, "integer", "largest best_of of LoRAX's routes", low=1, high=1024)
    max_n: int = _row(16, "integer", "most choices of one request; bounds best_of on /v1/", low=1, high=1024)
    max_prompts: int = _row(128, "integer", "most prompts in one completions request", low=1)
    max_stop_sequences: int = _row(10, "integer", "most stop strings of one request", low=0)
    max_logprobs: int = _row(20, "integer", "most alternatives reported per token", low=0, high=1024)
    drain_delay_s: float = _row(
        0.0,
        "seconds",
        "how long the port stays open after SIGTERM, answering 503",
        low=0,
    )
    drain_timeout_s: float = _row(30.0, "seconds", "how long running requests may end after SIGTERM", low=0)
    keep_alive_s: float = _row(15.0, "seconds", "silence in a stream after which a comment line is sent", low=0.1)
    generation_defaults: bool = _row(False, "switch", "use the sampling defaults of generation_config.json")
    chat_template: Path | None = _row(None, "path", "template file used in place of the model's")
    metrics_adapters: int = _row(100, "integer", "adapters with metrics of their own; the rest share one label", low=0)
    lorax_metrics: bool = _row(False, "switch", "give metrics under LoRAX's names too")
    log_format: str = _row("text", "text", "form of the log lines", choices=("text", "json"))
    log_level: str = _row("info", "text", "least severity logged", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        _check(self)
        if self.api_keys:
            return
        if self.adapter_admin and not is_loopback(self.host):
            raise ConfigError(
                f"adapter_admin without API keys would let everybody who reaches {self.host} read adapters from this "
                "machine's disk; set --api-key, or listen on 127.0.0.1.",
                param="adapter_admin",
            )
        if self.protect_metrics:
            raise ConfigError("protect_metrics needs API keys to ask for; set --api-key.", param="protect_metrics")


def options_of(cls: type[EngineConfig] | type[ServerConfig]) -> tuple[Option, ...]:
    """The rows of one config class, in order."""
    group = "engine" if cls is EngineConfig else "server"
    return tuple(Option(f.name, group, **f.metadata["option"]) for f in fields(cls))


OPTIONS: Mapping[str, Option] = MappingProxyType(
    {option.name: option for cls in (EngineConfig, ServerConfig) for option in options_of(cls)}
)
"""All rows by short name."""


@dataclass(frozen=True)
class Setting:
    """One resolved option: ``source`` is the variable or flag it came from, empty for a default."""

    option: Option
    value: Any
    origin: Origin
    source: str = ""

    @property
    def shown(self) -> str:
        return self.option.show(self.value)


@dataclass(frozen=True)
class Resolved:
    """Both configs and where each value came from, in the order of the table."""

    engine: EngineConfig
    server: ServerConfig
    settings: tuple[Setting, ...]


def prepare_compute() -> None:
    """Let torch's idle compute threads sleep instead of spin. Has effect until torch is loaded, then none.

    With a busy neighbour on the other core (the API process is one) a spinning team waits for a thread that does not
    run: a product of 8 rows took 466 ms in place of 18 on two cores. On a quiet machine both are the same.
    A user's own OMP_WAIT_POLICY wins.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def engine_environment() -> dict[str, str]:
    """Of the engine's process: ours, with no threads of numpy's own, which would spin and no one would give work.

    A user's own OPENBLAS_NUM_THREADS wins.
    """
    return {"OPENBLAS_NUM_THREADS": "1", **os.environ}


def installed_environment() -> dict[str, str]:
    """Of a child that is measured as it is where it was installed: the interpreter keeps what it has compiled."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _foreign(name: str, value: str) -> Any:
    """What another tool's variable means to us, by that tool's own reading of it."""
    if name == "HF_HUB_OFFLINE":
        return value.upper() in ("1", "ON", "YES", "TRUE")
    return Path(value).expanduser() / "hub" if name == "HF_HOME" else value


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {found[0]}?" if found else ""


def _setting(option: Option, given: Mapping[str, Any], env: Mapping[str, str]) -> Setting | None:
    if option.name in given:
        return Setting(option, option.parse(given[option.name], option.flag), "option", option.flag)
    # An empty variable counts as unset, except where that would leave the server without the keys it should ask for.
    if env.get(option.env, "") != "" or (option.secret and option.env in env):
        return Setting(option, option.parse(env[option.env], option.env), "environment", option.env)
    for name in option.foreign:
        if env.get(name, "") != "":
            return Setting(option, option.parse(_foreign(name, env[name]), name), "environment", name)
    if option.required:
        return None
    return Setting(option, option.parse(option.default, option.name), "default")


def _given(cli: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given (None is not), by short name; field names are taken too."""
    names = {option.field: name for name, option in OPTIONS.items()} | {name: name for name in OPTIONS}
    for key in cli:
        if key not in names:
            raise ConfigError(f"There is no option {key!r}.{_nearest(key, names)}", param=key)
    return {names[key]: value for key, value in cli.items() if value is not None}


def _without_services(env: Mapping[str, str]) -> Mapping[str, str]:
    """``env`` less the variables that Kubernetes made of Services with a name like ours; they are no options."""
    services = {
        name
        for name, value in env.items()
        if name.startswith(PREFIX)
        and (_SERVICE_NAME.fullmatch(name) or (name.endswith("_PORT") and _SERVICE_URL.fullmatch(value)))
    }
    if not services:
        return env
    log.warning(
        "left out %s: Kubernetes sets these for a Service; enableServiceLinks: false in the pod keeps them away",
        ", ".join(sorted(services)),
    )
    return {name: value for name, value in env.items() if name not in services}


def load_settings(cli: Mapping[str, Any], env: Mapping[str, str] | None = None) -> tuple[Setting, ...]:
    """Every option's value and origin; a required one that nobody gave is left out.

    Raises:
        ConfigError: Unknown option or ``TRUFFULA_`` variable (the nearest known one is named), or a malformed value.
    """
    env = _without_services(os.environ if env is None else env)
    known = {option.env for option in OPTIONS.values()}
    for name in env:
        if name.startswith(PREFIX) and name not in known:
            raise ConfigError(f"The environment variable {name} is not ours.{_nearest(name, known)}", param=name)
    given = _given(cli)
    found = [_setting(option, given, env) for option in OPTIONS.values()]
    return tuple(setting for setting in found if setting is not None)


def load_config(cli: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Resolved:
    """The configs from options (by short or field name; None means not given) and environment (default: the process's).

    Raises:
        ConfigError: As ``load_settings``, or no model was named.
    """
    settings = load_settings(cli, env)
    values = {setting.option.field: setting.value for setting in settings}
    for option in OPTIONS.values():
        if option.field not in values:
            raise ConfigError(f"No {option.name} was given; name one or set {option.env}.", param=option.name)
    engine = EngineConfig(**{o.field: values[o.field] for o in options_of(EngineConfig)})
    server = ServerConfig(**{o.field: values[o.field] for o in options_of(ServerConfig)})
    return Resolved(engine, server, settings)
