"""All options: one field of ``EngineConfig`` or ``ServerConfig`` for each, with its default, bounds and help.

The command line, ``config --show`` and the error messages are made from this table. Constructors validate.
``option.py`` defines the attributes of an option; ``settings.py`` reads values from flags, variables and files. Values
that are determined at the start (number of blocks, backend) are in another type, ``engine.build.EngineSettings``.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from truffula.errors import ConfigError
from truffula.option import Option, kind_of

ENGINE_PROCESS = "Engine process"
"""The topic of options that have no effect on an engine in the caller's process."""


# ruff: noqa: RUF009  (``_option`` makes a dataclass field)
def _option(default: Any, topic: str, help: str, **more: Any) -> Any:
    """A field that is an option; ``default`` MISSING makes it required. ``more`` are attributes of ``Option``."""
    row = {"default": default, "topic": topic, "help": help, **more}
    if isinstance(default, Mapping):  # dataclasses refuse a default without a hash
        return field(default_factory=lambda: default, metadata=row)
    return field(default=default, repr=not more.get("secret", False), metadata=row)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The options of the engine. Sent to the engine's process; contains no secrets."""

    model: str = _option(MISSING, "Common", "a folder, a .gguf file, an alias or a Hugging Face id")
    dtype: str = _option(
        "auto",
        "Common",
        "compute dtype; auto picks the faster of float32 and bfloat16",
        choices=("auto", "float32", "bfloat16"),
        note="Checkpoints in float16 are served too: in one of these dtypes.",
    )
    memory_bytes: int | None = _option(
        None, "Common", "memory for weights, KV cache and adapters", unset="85% of free memory", low=1
    )
    max_model_len: int | None = _option(
        None, "Common", "maximum length of prompt and answer together, in tokens", unset="the model's", low=1
    )
    threads: int | None = _option(
        None, "Common", "compute threads", unset="all CPUs available to this process", low=1, high=1024
    )
    revision: str | None = _option(None, "Model", "branch, tag or commit on the Hugging Face Hub")
    quantize: str = _option(
        "none",
        "Model",
        "round the float weights to this format at load",
        choices=("none", "q8_0"),
        note="GGUF files that are already quantised need no option; GPTQ, AWQ and bitsandbytes are not supported.",
    )
    exact: bool = _option(
        False, "Model", "compute quantised weights in floating point instead of int8: slower, more accurate"
    )
    offline: bool = _option(False, "Model", "never connect to the Hub; use the cache only", foreign=("HF_HUB_OFFLINE",))
    cache_dir: Path | None = _option(
        None,
        "Model",
        "folder for downloads",
        metavar="FOLDER",
        unset="the Hub library's cache and ~/.cache/truffula",
        must_be="new folder",
        foreign=("HF_HUB_CACHE", "HF_HOME"),
    )
    backend: str = _option(
        "auto",
        "Model",
        "compute backend: cpu has native kernels, reference is torch",
        choices=("auto", "cpu", "reference"),
    )
    implementation: str = _option(
        "auto",
        "Model",
        "whose code computes the model: truffula's own or transformers'; auto picks its own where there is one",
        choices=("auto", "native", "transformers"),
        note="transformers' code is slower, and needs truffula[torch,hf].",
    )
    device: str = _option(
        "cpu",
        "Model",
        "device to compute on: cpu, or one of torch's, such as cuda or cuda:1",
        metavar="DEVICE",
        note="The native kernels run on cpu; another device is computed on with torch, op by op: exact and slow.",
    )
    cpu_isa: str = _option(
        "auto",
        "Model",
        "instruction set of the cpu backend, one that `truffula doctor` lists; auto picks the best",
        metavar="NAME",
    )
    adapter_memory_bytes: int | None = _option(
        None, "Adapters", "maximum memory for adapters, as part of --memory", unset="no limit within --memory", low=1
    )
    adapter_load_timeout_s: float = _option(120.0, "Adapters", "maximum time to load a local adapter", low=0.001)
    adapter_download_timeout_s: float = _option(
        1800.0, "Adapters", "maximum time to download and load an adapter from the Hub or a URL", low=0.001
    )
    adapter_cache_dir: Path | None = _option(
        None,
        "Adapters",
        "folder for the files of adapters that are fetched from URLs; servers may share it",
        metavar="FOLDER",
        unset="adapters in the folder for downloads",
        must_be="new folder",
    )
    adapter_cache_bytes: int = _option(
        16 * 2**30, "Adapters", "maximum size of that folder; those not used for longest are removed", low=0
    )
    adapter_failure_ttl_s: float = _option(
        10.0, "Adapters", "time before the loading of a failed adapter is tried again", low=0
    )
    adapter_tokens: int = _option(
        0, "Adapters", "token ids that adapters may add behind the model's rows", low=0, high=2**16
    )
    max_adapter_file_bytes: int = _option(8 * 2**30, "Adapters", "maximum size of an adapter file", low=1)
    step_tokens: int = _option(
        512, "Batching", "maximum number of tokens per step, over all sequences", low=1, high=2**20
    )
    max_running: int = _option(64, "Batching", "maximum number of sequences in the batch", low=1, high=2**16)
    max_waiting: int = _option(
        1024, "Batching", "maximum number of sequences in the queue; further requests are refused (overloaded)", low=0
    )
    prefix_cache: bool = _option(True, "Batching", "reuse the KV cache of prompts that begin with the same tokens")
    block_size: int = _option(16, "Batching", "tokens per block of the KV cache", low=1, high=1024)
    prefetch_adapters: int = _option(
        32, "Advanced", "number of adapters loading at a time for waiting requests", low=1, high=4096
    )
    adapter_worker_memory_bytes: int = _option(
        2**30, "Advanced", "memory limit of a loading worker, on top of the adapter files it reads", low=2**20
    )
    start_timeout_s: float = _option(
        1800.0, ENGINE_PROCESS, "maximum time without progress while the engine starts", low=0.001
    )
    heartbeat_timeout_s: float = _option(
        10.0, ENGINE_PROCESS, "time without a heartbeat after which the engine counts as unhealthy", low=1.0
    )
    step_timeout_s: float = _option(
        120.0, ENGINE_PROCESS, "duration of a step after which the engine counts as unhealthy", low=1.0
    )
    hang_timeout_s: float = _option(
        30.0, ENGINE_PROCESS, "time after which an unhealthy engine is restarted", low=0.001
    )
    max_restarts: int = _option(5, ENGINE_PROCESS, "maximum number of engine restarts within --restart-window", low=0)
    restart_window_s: float = _option(300.0, ENGINE_PROCESS, "period over which engine restarts are counted", low=0.001)

    def __post_init__(self) -> None:
        _check(self)
        if self.exact and self.quantize != "none":
            raise ConfigError(
                f"exact and quantize={self.quantize} contradict each other: a rounded checkpoint is not exact.",
                param="quantize",
            )


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The options of the HTTP server."""

    host: str = _option("127.0.0.1", "Common", "address to listen on", metavar="ADDRESS")
    port: int = _option(8000, "Common", "port to listen on; 0 picks a free port", metavar="PORT", low=0, high=65535)
    adapters: Mapping[str, str] = _option(
        MappingProxyType({}),
        "Common",
        "serve the adapter in FOLDER (or a Hub id, or a URL) as NAME; without NAME=, the folder's name is used",
        short="-a",
    )
    adapter_dir: Path | None = _option(
        None,
        "Common",
        "serve each subfolder as an adapter, including those added later",
        metavar="FOLDER",
        must_be="folder",
    )
    default_adapter: str | None = _option(
        None,
        "Adapters",
        "adapter, or alias, that answers requests which name neither an adapter nor the base; WEIGHT is 1 by default",
        metavar="NAME[:WEIGHT]",
    )
    default_adapter_mode: str = _option(
        "replace",
        "Adapters",
        "what an adapter that a request names does to the default one: replaces it, or is added to it",
        choices=("replace", "add"),
    )
    api_keys: tuple[str, ...] = _option((), "Common", "API key that requests must send", metavar="KEY", secret=True)
    served_model_name: str | None = _option(
        None, "Common", "name of the base model in the API", metavar="NAME", unset="as given"
    )
    chat_template: Path | None = _option(
        None,
        "Model",
        "Jinja file that replaces the model's chat template",
        metavar="FILE",
        must_be="file",
        note="Built-in templates by name, such as chatml, are not supported: write the template to a file.",
    )
    tool_format: str = _option(
        "auto",
        "Model",
        "format in which the model writes tool calls, such as hermes or llama_json; auto detects it from the chat "
        "template, none leaves calls in the text",
        metavar="NAME",
    )
    reasoning_format: str = _option(
        "auto",
        "Model",
        "format in which the model writes its reasoning, such as think or mistral; auto detects it from the chat "
        "template, none leaves reasoning in the text",
        metavar="NAME",
    )
    generation_defaults: bool = _option(
        False, "Model", "use the sampling defaults of the model's generation_config.json"
    )
    adapter_admin: bool = _option(
        False, "Adapters", "enable the routes that load and unload adapters and pause the engine"
    )
    state_dir: Path | None = _option(
        None,
        "Adapters",
        "folder where adapters registered at run time, their versions, aliases and pins are kept across restarts",
        metavar="FOLDER",
        must_be="new folder",
        unset="in memory",
    )
    allow_hub: tuple[str, ...] = _option(
        (), "Adapters", "Hub ids that clients may name as adapters, such as my-org/*", metavar="PATTERN"
    )
    allow_local: tuple[Path, ...] = _option(
        (), "Adapters", "folder below which clients may name adapters by path", must_be="folder"
    )
    allow_sources: tuple[str, ...] = _option(
        (),
        "Adapters",
        "URLs that clients may name as adapters (s3, gs, az, https), such as s3://bucket/adapters/*",
        metavar="PATTERN",
    )
    allow_client_credentials: bool = _option(
        False,
        "Adapters",
        "send a client's api_token to the Hub id or https URL that it names; what is loaded by it serves only requests "
        "with the same token",
    )
    adapter_recheck_s: float = _option(
        300.0, "Adapters", "period in which an adapter of the Hub or a URL is checked for changes once", low=1.0
    )
    adapter_source: str = _option(
        "hub",
        "Adapters",
        "where to look for an adapter if the request does not specify a source",
        choices=("hub", "local"),
    )
    response_store: str = _option(
        "file",
        "Stored responses",
        "where responses of /v1/responses are kept for previous_response_id; off keeps none",
        choices=("file", "memory", "off"),
    )
    response_store_file: Path | None = _option(
        None,
        "Stored responses",
        "database of stored responses",
        metavar="FILE",
        unset="~/.local/state/truffula/responses.db, or memory where that folder cannot be written",
    )
    response_store_max_bytes: int = _option(
        2**30, "Stored responses", "maximum size of all stored responses; the oldest are removed", low=2**16
    )
    response_ttl_s: float = _option(
        30 * 86400.0, "Stored responses", "time after which a stored response is removed", low=1.0
    )
    api_keys_file: Path | None = _option(
        None,
        "Access",
        "TOML or JSON file of API keys with a tenant, adapters, a weight and rights; read again when it changes",
        metavar="FILE",
        must_be="file",
    )
    protect_metrics: bool = _option(
        False, "Access", "require an API key for /metrics too; with --api-keys-file it needs one that may administer"
    )
    cors_origins: tuple[str, ...] = _option(
        ("auto",),
        "Access",
        "origin whose web pages may call the server; '*' allows any, none allows none, auto allows any with API keys, "
        "else those of this machine",
        metavar="ORIGIN",
    )
    allowed_hosts: tuple[str, ...] = _option(
        (),
        "Access",
        "host name by which a server without API keys that listens on this machine only may be called; '*' allows any",
        metavar="NAME",
        unset="addresses and localhost",
    )
    salt_by_api_key: bool = _option(True, "Access", "keep the prefix caches of different API keys' tenants apart")
    max_open_requests: int = _option(
        2048, "Request limits", "maximum number of open requests; further ones are refused (overloaded)", low=1
    )
    max_body_bytes: int = _option(2 * 2**20, "Request limits", "maximum size of a request body", low=1024)
    text_memory_bytes: int = _option(
        2**30,
        "Request limits",
        "memory that reading one large or untrusted text may take, beyond the tokenizer",
        low=2**26,
    )
    max_n: int = _option(
        16, "Request limits", "maximum number of choices per request (n); also limits best_of on /v1/", low=1, high=1024
    )
    max_best_of: int = _option(2, "Request limits", "maximum best_of on LoRAX's routes", low=1, high=1024)
    max_prompts: int = _option(128, "Request limits", "maximum number of prompts per completions request", low=1)
    max_stop_sequences: int = _option(10, "Request limits", "maximum number of stop strings per request", low=0)
    max_logprobs: int = _option(
        20, "Request limits", "maximum number of alternatives per token in logprobs", low=0, high=1024
    )
    request_timeout_s: float | None = _option(
        600.0, "Timeouts", "maximum duration of a request; none: no limit", low=0.001
    )
    queue_timeout_s: float | None = _option(
        60.0,
        "Timeouts",
        "maximum time in the queue, not counting the loading of the adapter; none: no limit",
        low=0.001,
    )
    body_timeout_s: float = _option(
        60.0, "Timeouts", "maximum time to receive the headers of a request, and its body", low=0.001
    )
    send_timeout_s: float = _option(
        60.0, "Timeouts", "close a connection whose client reads nothing of an answer for this long", low=0.001
    )
    keep_alive_s: float = _option(
        15.0, "Timeouts", "send a comment on a stream that has been silent for this long", low=0.1
    )
    drain_timeout_s: float = _option(30.0, "Timeouts", "time for running requests to finish after SIGTERM", low=0)
    drain_delay_s: float = _option(
        0.0, "Timeouts", "time to answer 503 on the open port after SIGTERM before draining", low=0
    )
    log_level: str = _option("info", "Logs and metrics", "log level", choices=("debug", "info", "warning", "error"))
    log_format: str = _option("text", "Logs and metrics", "log format", choices=("text", "json"))
    metrics_adapters: int = _option(
        100, "Logs and metrics", "number of adapters with separate metrics; the others share one label", low=0
    )
    lorax_metrics: bool = _option(False, "Logs and metrics", "also export metrics under LoRAX's and TGI's names")
    vllm_metrics: bool = _option(
        False, "Logs and metrics", "also export metrics under vLLM's names, by which llm-d and others route requests"
    )
    transport: str = _option("process", ENGINE_PROCESS, "where the engine runs", choices=("process", "inline"))

    @property
    def default(self) -> tuple[str, float] | None:
        """The default adapter and its weight. A number after the last colon is the weight."""
        if self.default_adapter is None:
            return None
        name, _, weight = self.default_adapter.rpartition(":")
        try:
            return (name, float(weight)) if name else (weight, 1.0)
        except ValueError:
            return self.default_adapter, 1.0

    @property
    def keyed(self) -> bool:
        """Whether requests need an API key."""
        return bool(self.api_keys) or self.api_keys_file is not None

    def __post_init__(self) -> None:
        _check(self)
        if self.default is None and self.default_adapter_mode != "replace":
            raise ConfigError("default_adapter_mode needs default_adapter.", param="default_adapter_mode")
        if self.default is not None and not 0 < abs(self.default[1]) <= 1000:
            raise ConfigError(
                f"default_adapter is {self.default_adapter!r}; its weight must be from -1000 to 1000, and not 0.",
                param="default_adapter",
            )
        if self.keyed:
            return
        if self.adapter_admin and not is_loopback(self.host):
            raise ConfigError(
                f"adapter_admin without API keys would let every client that reaches {self.host} read adapters from "
                "this machine's disk; set --api-key, or listen on 127.0.0.1.",
                param="adapter_admin",
            )
        if self.protect_metrics:
            raise ConfigError("protect_metrics needs API keys; set --api-key.", param="protect_metrics")


def _options(group: str, cls: type[EngineConfig] | type[ServerConfig]) -> list[Option]:
    """The options that are the fields of ``cls``. The kind of an option comes from its field's type and unit."""
    types = get_type_hints(cls)
    return [Option(f.name, group, *kind_of(f.name, types[f.name]), **f.metadata) for f in fields(cls)]


OPTIONS: Mapping[str, Option] = MappingProxyType(
    {option.name: option for option in _options("engine", EngineConfig) + _options("server", ServerConfig)}
)
"""All options by short name."""


def options_of(cls: type[EngineConfig] | type[ServerConfig]) -> tuple[Option, ...]:
    """The options of one config class, in order."""
    group = "engine" if cls is EngineConfig else "server"
    return tuple(option for option in OPTIONS.values() if option.group == group)


def _check(config: EngineConfig | ServerConfig) -> None:
    """Raise ``ConfigError`` for a value that is out of bounds or not of its option's type."""
    for option in options_of(type(config)):
        value = getattr(config, option.field)
        if option.parse(value, option.field) != value:
            raise option.error(value, option.field)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is reachable from this machine only. Names other than localhost do not count as such."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
