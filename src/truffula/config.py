"""All options. No other module reads the environment.

Each option is a field of ``EngineConfig`` or ``ServerConfig`` with its default, kind, bounds and help, from which the
command line, ``config --show`` and the error messages are made. Constructors validate. Values that are determined at
the start (number of blocks, backend) are in another type, ``engine.build.EngineSettings``.

The short name of an option is its field without the unit: ``memory_bytes`` is ``--memory`` and ``TRUFFULA_MEMORY``.
Precedence: command line, environment, configuration file, default. ``option.py`` defines ``Option``.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from truffula.config_file import Entry, read_config_file
from truffula.errors import ConfigError, did_you_mean, nearest
from truffula.option import PREFIX, Kind, Option, expanded, home_folder
from truffula.option import format_size as format_size
from truffula.option import parse_size as parse_size

log = logging.getLogger(__name__)

Origin = Literal["default", "environment", "file", "option"]
# Variables that Kubernetes sets in containers for each Service; those of a Service named truffula look like options.
_SERVICE_NAME = re.compile(r".*_SERVICE_(HOST|PORT(_.+)?)|.*_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://.*", re.IGNORECASE)
CONFIG_VARIABLE = PREFIX + "CONFIG"
"""The variable that names the configuration file; ``--config`` overrides it."""
# Variables in which other servers look for the model.
_MODEL_VARIABLES = MappingProxyType({"MODEL_ID": "LoRAX and TGI", "LLAMA_ARG_MODEL": "llama.cpp"})


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
    """Raise ``ConfigError`` for a value that is out of bounds or not of its option's type."""
    for option in options_of(type(config)):
        value = getattr(config, option.field)
        if option.parse(value, option.field) != value:
            raise option.error(value, option.field)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The options of the engine. Sent to the engine's process; contains no secrets."""

    model: str = _row(MISSING, "text", "a folder, a .gguf file, an alias or a Hugging Face id", topic="Common")
    dtype: str = _row(
        "auto",
        "text",
        "compute dtype; auto picks the faster of float32 and bfloat16",
        topic="Common",
        choices=("auto", "float32", "bfloat16"),
        note="Checkpoints in float16 are served too: in one of these dtypes.",
    )
    memory_bytes: int | None = _row(
        None, "size", "memory for weights, KV cache and adapters", topic="Common", unset="85% of free memory", low=1
    )
    max_model_len: int | None = _row(
        None,
        "integer",
        "maximum length of prompt and answer together, in tokens",
        topic="Common",
        unset="the model's",
        low=1,
    )
    threads: int | None = _row(
        None,
        "integer",
        "compute threads",
        topic="Common",
        unset="all CPUs available to this process",
        low=1,
        high=1024,
    )
    revision: str | None = _row(None, "text", "branch, tag or commit on the Hugging Face Hub", topic="Model")
    quantize: str = _row(
        "none",
        "text",
        "round the float weights to this format at load",
        topic="Model",
        choices=("none", "q8_0"),
        note="GGUF files that are already quantised need no option; GPTQ, AWQ and bitsandbytes are not supported.",
    )
    exact: bool = _row(
        False,
        "switch",
        "compute quantised weights in floating point instead of int8: slower, more accurate",
        topic="Model",
    )
    offline: bool = _row(
        False, "switch", "never connect to the Hub; use the cache only", topic="Model", foreign=("HF_HUB_OFFLINE",)
    )
    cache_dir: Path | None = _row(
        None,
        "path",
        "folder for downloads",
        topic="Model",
        metavar="FOLDER",
        unset="the Hub library's cache and ~/.cache/truffula",
        must_be="new folder",
        foreign=("HF_HUB_CACHE", "HF_HOME"),
    )
    backend: str = _row(
        "auto",
        "text",
        "compute backend: cpu has native kernels, reference is torch",
        topic="Model",
        choices=("auto", "cpu", "reference"),
    )
    device: str = _row(
        "cpu",
        "text",
        "device to compute on: cpu, or one of torch's, such as cuda or cuda:1",
        topic="Model",
        metavar="DEVICE",
        note="The native kernels run on cpu; another device is computed on with torch, op by op: exact and slow.",
    )
    cpu_isa: str = _row(
        "auto",
        "text",
        "instruction set of the cpu backend, one that `truffula doctor` lists; auto picks the best",
        topic="Model",
        metavar="NAME",
    )
    adapter_memory_bytes: int | None = _row(
        None,
        "size",
        "maximum memory for adapters, as part of --memory",
        topic="Adapters",
        unset="no limit within --memory",
        low=1,
    )
    adapter_load_timeout_s: float = _row(
        120.0, "seconds", "maximum time to load a local adapter", topic="Adapters", low=0.001
    )
    adapter_download_timeout_s: float = _row(
        1800.0, "seconds", "maximum time to download and load an adapter from the Hub", topic="Adapters", low=0.001
    )
    adapter_failure_ttl_s: float = _row(
        10.0, "seconds", "time before the loading of a failed adapter is tried again", topic="Adapters", low=0
    )
    max_adapter_file_bytes: int = _row(8 * 2**30, "size", "maximum size of an adapter file", topic="Adapters", low=1)
    step_tokens: int = _row(
        512, "integer", "maximum number of tokens per step, over all sequences", topic="Batching", low=1, high=2**20
    )
    max_running: int = _row(
        64, "integer", "maximum number of sequences in the batch", topic="Batching", low=1, high=2**16
    )
    max_waiting: int = _row(
        1024,
        "integer",
        "maximum number of sequences in the queue; further requests are refused (overloaded)",
        topic="Batching",
        low=0,
    )
    prefix_cache: bool = _row(
        True, "switch", "reuse the KV cache of prompts that begin with the same tokens", topic="Batching"
    )
    block_size: int = _row(16, "integer", "tokens per block of the KV cache", topic="Batching", low=1, high=1024)
    prefetch_adapters: int = _row(
        32, "integer", "number of adapters loading at a time for waiting requests", topic="Advanced", low=1, high=4096
    )
    adapter_worker_memory_bytes: int = _row(
        2**30,
        "size",
        "memory limit of a loading worker, on top of the adapter files it reads",
        topic="Advanced",
        low=2**20,
    )
    start_timeout_s: float = _row(
        1800.0, "seconds", "maximum time without progress while the engine starts", topic="Advanced", low=0.001
    )
    heartbeat_timeout_s: float = _row(
        10.0,
        "seconds",
        "time without a heartbeat after which the engine counts as unhealthy",
        topic="Advanced",
        low=1.0,
    )
    step_timeout_s: float = _row(
        120.0, "seconds", "duration of a step after which the engine counts as unhealthy", topic="Advanced", low=1.0
    )
    hang_timeout_s: float = _row(
        30.0,
        "seconds",
        "time after which an unhealthy engine is restarted",
        topic="Advanced",
        low=0.001,
    )
    max_restarts: int = _row(
        5, "integer", "maximum number of engine restarts within --restart-window", topic="Advanced", low=0
    )
    restart_window_s: float = _row(
        300.0, "seconds", "period over which engine restarts are counted", topic="Advanced", low=0.001
    )

    def __post_init__(self) -> None:
        _check(self)
        if self.exact and self.quantize != "none":
            raise ConfigError(
                f"exact and quantize={self.quantize} contradict each other: a rounded checkpoint is not exact.",
                param="quantize",
            )


def state_folder() -> Path:
    """The folder for state that is neither configuration nor cache, such as the history of ``chat``."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if state.startswith("/") else home_folder("XDG_STATE_HOME") / ".local" / "state") / "truffula"


def is_loopback(host: str) -> bool:
    """Whether ``host`` is reachable from this machine only. Names other than localhost do not count as such."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The options of the HTTP server."""

    host: str = _row("127.0.0.1", "text", "address to listen on", topic="Common", metavar="ADDRESS")
    port: int = _row(
        8000, "integer", "port to listen on; 0 picks a free port", topic="Common", metavar="PORT", low=0, high=65535
    )
    adapters: Mapping[str, str] = _row(
        MappingProxyType({}),
        "mapping",
        "serve the adapter in FOLDER (PEFT format, or a Hub id) as NAME; without NAME=, the folder's name is used",
        topic="Common",
        singular="adapter",
        short="-a",
    )
    adapter_dir: Path | None = _row(
        None,
        "path",
        "serve each subfolder as an adapter, including those added later",
        topic="Common",
        metavar="FOLDER",
        must_be="folder",
    )
    api_keys: tuple[str, ...] = _row(
        (), "list", "API key that requests must send", topic="Common", metavar="KEY", secret=True, singular="api_key"
    )
    served_model_name: str | None = _row(
        None, "text", "name of the base model in the API", topic="Common", metavar="NAME", unset="as given"
    )
    chat_template: Path | None = _row(
        None,
        "path",
        "Jinja file that replaces the model's chat template",
        topic="Model",
        metavar="FILE",
        must_be="file",
        note="Built-in templates by name, such as chatml, are not supported: write the template to a file.",
    )
    generation_defaults: bool = _row(
        False, "switch", "use the sampling defaults of the model's generation_config.json", topic="Model"
    )
    adapter_admin: bool = _row(False, "switch", "enable the routes that load and unload adapters", topic="Adapters")
    allow_hub: tuple[str, ...] = _row(
        (), "list", "Hub ids that clients may name as adapters, such as my-org/*", topic="Adapters", metavar="PATTERN"
    )
    allow_local: tuple[Path, ...] = _row(
        (), "paths", "folder below which clients may name adapters by path", topic="Adapters", must_be="folder"
    )
    adapter_source: str = _row(
        "hub",
        "text",
        "where to look for an adapter if the request does not specify a source",
        topic="Adapters",
        choices=("hub", "local"),
    )
    protect_metrics: bool = _row(False, "switch", "require an API key for /metrics too", topic="Access")
    cors_origins: tuple[str, ...] = _row(
        ("auto",),
        "list",
        "origin whose web pages may call the server; '*' allows any, none allows none, auto allows any with API keys, "
        "else those of this machine",
        topic="Access",
        metavar="ORIGIN",
        singular="cors_origin",
    )
    allowed_hosts: tuple[str, ...] = _row(
        (),
        "list",
        "host name by which a server without API keys that listens on this machine only may be called; '*' allows any",
        topic="Access",
        metavar="NAME",
        singular="allowed_host",
        unset="addresses and localhost",
    )
    salt_by_api_key: bool = _row(True, "switch", "keep the prefix caches of different API keys apart", topic="Access")
    max_open_requests: int = _row(
        2048,
        "integer",
        "maximum number of open requests; further ones are refused (overloaded)",
        topic="Request limits",
        low=1,
    )
    max_body_bytes: int = _row(2 * 2**20, "size", "maximum size of a request body", topic="Request limits", low=1024)
    text_memory_bytes: int = _row(
        2**30,
        "size",
        "memory that reading one large or untrusted text may take, beyond the tokenizer",
        topic="Request limits",
        low=2**26,
    )
    max_n: int = _row(
        16,
        "integer",
        "maximum number of choices per request (n); also limits best_of on /v1/",
        topic="Request limits",
        low=1,
        high=1024,
    )
    max_best_of: int = _row(2, "integer", "maximum best_of on LoRAX's routes", topic="Request limits", low=1, high=1024)
    max_prompts: int = _row(
        128, "integer", "maximum number of prompts per completions request", topic="Request limits", low=1
    )
    max_stop_sequences: int = _row(
        10, "integer", "maximum number of stop strings per request", topic="Request limits", low=0
    )
    max_logprobs: int = _row(
        20, "integer", "maximum number of alternatives per token in logprobs", topic="Request limits", low=0, high=1024
    )
    request_timeout_s: float | None = _row(
        600.0, "seconds", "maximum duration of a request; none: no limit", topic="Timeouts", low=0.001, nullable=True
    )
    queue_timeout_s: float | None = _row(
        60.0,
        "seconds",
        "maximum time in the queue, not counting the loading of the adapter; none: no limit",
        topic="Timeouts",
        low=0.001,
        nullable=True,
    )
    body_timeout_s: float = _row(
        60.0, "seconds", "maximum time to receive the headers of a request, and its body", topic="Timeouts", low=0.001
    )
    send_timeout_s: float = _row(
        60.0, "seconds", "close a stream whose client reads nothing for this long", topic="Timeouts", low=0.001
    )
    keep_alive_s: float = _row(
        15.0, "seconds", "send a comment on a stream that has been silent for this long", topic="Timeouts", low=0.1
    )
    drain_timeout_s: float = _row(
        30.0, "seconds", "time for running requests to finish after SIGTERM", topic="Timeouts", low=0
    )
    drain_delay_s: float = _row(
        0.0, "seconds", "time to answer 503 on the open port after SIGTERM before draining", topic="Timeouts", low=0
    )
    log_level: str = _row(
        "info", "text", "log level", topic="Logs and metrics", choices=("debug", "info", "warning", "error")
    )
    log_format: str = _row("text", "text", "log format", topic="Logs and metrics", choices=("text", "json"))
    metrics_adapters: int = _row(
        100,
        "integer",
        "number of adapters with separate metrics; the others share one label",
        topic="Logs and metrics",
        low=0,
    )
    lorax_metrics: bool = _row(False, "switch", "also export metrics under LoRAX's names", topic="Logs and metrics")
    transport: str = _row("process", "text", "where the engine runs", topic="Advanced", choices=("process", "inline"))

    def __post_init__(self) -> None:
        _check(self)
        if self.api_keys:
            return
        if self.adapter_admin and not is_loopback(self.host):
            raise ConfigError(
                f"adapter_admin without API keys would let every client that reaches {self.host} read adapters from "
                "this machine's disk; set --api-key, or listen on 127.0.0.1.",
                param="adapter_admin",
            )
        if self.protect_metrics:
            raise ConfigError("protect_metrics needs API keys; set --api-key.", param="protect_metrics")


def options_of(cls: type[EngineConfig] | type[ServerConfig]) -> tuple[Option, ...]:
    """The options of one config class, in order."""
    group = "engine" if cls is EngineConfig else "server"
    return tuple(Option(f.name, group, **f.metadata["option"]) for f in fields(cls))


OPTIONS: Mapping[str, Option] = MappingProxyType(
    {option.name: option for cls in (EngineConfig, ServerConfig) for option in options_of(cls)}
)
"""All options by short name."""


@dataclass(frozen=True)
class Setting:
    """One resolved option: ``source`` is its flag, variable or line of a file; "" for a default."""

    option: Option
    value: Any
    origin: Origin
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


def prepare_compute() -> None:
    """Make torch's idle compute threads sleep instead of spin. Must be called before torch is imported.

    When another process (such as the API process) is busy on a core, spinning threads wait for one that does not run: a
    product of 8 rows took 466 ms instead of 18 on two cores. Without other load there is no difference.
    OMP_WAIT_POLICY in the environment has priority.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def engine_environment() -> dict[str, str]:
    """The environment of the engine's process: this process's, with one OpenBLAS thread, because others would only
    spin.

    OPENBLAS_NUM_THREADS in the environment has priority.
    """
    return {"OPENBLAS_NUM_THREADS": "1", **os.environ}


def text_worker_environment() -> dict[str, str]:
    """The environment of a text worker: this one's, with the tokenizers library computing in one thread."""
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false"}


def installed_environment() -> dict[str, str]:
    """The environment of a child process that is measured as installed, with a cache of compiled Python files."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _foreign(name: str, value: str) -> Any:
    """The value of another tool's variable, parsed as that tool does."""
    if name == "HF_HUB_OFFLINE":
        return value.upper() in ("1", "ON", "YES", "TRUE")
    return expanded(value) / "hub" if name == "HF_HOME" else value


def _setting(
    option: Option, given: Mapping[str, Any], env: Mapping[str, str], written: Mapping[str, Entry]
) -> Setting | None:
    if option.name in given:
        return Setting(option, option.parse(given[option.name], option.flag), "option", option.flag)
    # An empty variable counts as unset, except for secrets: the server would run without the keys it should require.
    if env.get(option.env, "") != "" or (option.secret and option.env in env):
        return Setting(option, option.parse(env[option.env], option.env), "environment", option.env)
    if option.name in written:
        entry = written[option.name]
        return Setting(option, option.parse(entry.value, f"{option.name} ({entry.where})"), "file", entry.where)
    for name in option.foreign:
        if env.get(name, "") != "":
            return Setting(option, option.parse(_foreign(name, env[name]), name), "environment", name)
    if option.required:
        return None
    return Setting(option, option.parse(option.default, option.name), "default")


def _names() -> dict[str, str]:
    """Every name of an option (short name, field and flag, with underscores) → its short name."""
    names_shown = {word: name for name, option in OPTIONS.items() for word in (option.field, option.singular) if word}
    return names_shown | {name: name for name in OPTIONS}


def _given(cli: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``cli`` that are not None, by short name. Field names are allowed too."""
    names = _names()
    for key in cli:
        if key not in names:
            raise ConfigError(f"Unknown option {key!r}.{did_you_mean(nearest(key, names))}", param=key)
    return {names[key]: value for key, value in cli.items() if value is not None}


def _from_file(path: Path) -> dict[str, Entry]:
    """The options of a configuration file by short name. ``max-running`` and ``max_running`` are the same."""
    names, found = _names(), {}
    for key, entry in read_config_file(path).items():
        word = key.replace("-", "_")
        if word not in names:
            names_shown = [name.replace("_", "-") for name in names] if "-" in key else names
            raise ConfigError(
                f"{entry.where}: unknown option {key!r}.{did_you_mean(nearest(key, names_shown))}", param=key
            )
        if names[word] in found:
            raise ConfigError(f"{entry.where}: {key} is set twice, under two of its names.", param=key)
        found[names[word]] = entry
    return found


def _without_services(env: Mapping[str, str]) -> Mapping[str, str]:
    """``env`` without the variables that Kubernetes sets for Services whose names begin with truffula."""
    services = {
        name
        for name, value in env.items()
        if name.startswith(PREFIX)
        and (_SERVICE_NAME.fullmatch(name) or (name.endswith("_PORT") and _SERVICE_URL.fullmatch(value)))
    }
    if not services:
        return env
    log.warning(
        "ignoring %s: Kubernetes sets these for a Service; set enableServiceLinks: false in the pod to avoid them",
        ", ".join(sorted(services)),
    )
    return {name: value for name, value in env.items() if name not in services}


def load_settings(cli: Mapping[str, Any], env: Mapping[str, str] | None = None) -> tuple[Setting, ...]:
    """Every option's value and origin, without required options that were not given.

    ``cli`` holds options by short or field name (None: not given), and ``config``, the path of a configuration file. By
    default the variable ``TRUFFULA_CONFIG`` names the file, if any.

    Raises:
        ConfigError: Unknown option or ``TRUFFULA_`` variable (the nearest known one is named), a malformed value, or a
            configuration file that cannot be read.
    """
    env = _without_services(os.environ if env is None else env)
    known = {CONFIG_VARIABLE, *(option.env for option in OPTIONS.values())}
    for name in env:
        if name.startswith(PREFIX) and name not in known:
            raise ConfigError(f"Unknown environment variable {name}.{did_you_mean(nearest(name, known))}", param=name)
    given = dict(cli)
    file = given.pop("config", None) or env.get(CONFIG_VARIABLE)
    written = _from_file(Path(file)) if file else {}
    given = _given(given)
    found = [_setting(option, given, env, written) for option in OPTIONS.values()]
    return tuple(setting for setting in found if setting is not None)


def load_setting(name: str, given: Any = None) -> Setting:
    """One option by its short name: ``given``, or the value of ``load_settings``."""
    return next(setting for setting in load_settings({name: given}) if setting.option.name == name)


def _no_model(env: Mapping[str, str]) -> ConfigError:
    text = f"No model given: pass MODEL, such as smollm2, or set {PREFIX}MODEL."
    for name, server in _MODEL_VARIABLES.items():
        if env.get(name):
            text += f" {name} is set, but it is a variable of {server}; truffula reads {PREFIX}MODEL."
    return ConfigError(text, param="model")


def load_config(cli: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Resolved:
    """The configs of ``load_settings``. ``env`` is by default the environment of the process.

    Raises:
        ConfigError: As ``load_settings``, or no model was given.
    """
    settings = load_settings(cli, env)
    values = {setting.option.field: setting.value for setting in settings}
    if "model" not in values:
        raise _no_model(os.environ if env is None else env)
    engine = EngineConfig(**{o.field: values[o.field] for o in options_of(EngineConfig)})
    server = ServerConfig(**{o.field: values[o.field] for o in options_of(ServerConfig)})
    return Resolved(engine, server, settings)


def require_paths(settings: Iterable[Setting]) -> None:
    """Raise ``ConfigError`` for the first setting whose path is not the required kind of file or folder."""
    for setting in settings:
        setting.option.require_paths(setting.value, setting.source or setting.option.name)
