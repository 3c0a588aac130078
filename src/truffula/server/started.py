"""From configuration to a running service and its application: what loads, in order, and what the log says of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette

from truffula.config import EngineConfig, Resolved, ServerConfig, format_size
from truffula.engine.client import Transport, connect
from truffula.errors import ConfigError, InvalidRequest
from truffula.logs import LogSettings
from truffula.lora.sources import AdapterPolicy
from truffula.metrics import Metrics
from truffula.server.app import create_app
from truffula.service import AsyncService, ServiceLimits
from truffula.types import EngineInfo, SamplingParams
from truffula.weights.open import open_checkpoint

SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """What ``start`` made; ``announce`` writes the start log once requests are answered."""

    service: AsyncService
    app: Starlette
    announce: Callable[[], None]


def start(resolved: Resolved, url: str) -> Started:
    """Loads the model in the configured transport, and builds the application on it."""
    config = resolved.server
    policy = adapter_policy(resolved)  # before the model: a mistake in the options need not wait for gigabytes
    progress = _Progress()
    transport: Transport = config.transport  # type: ignore[assignment]  # a choice of the option
    client = connect(resolved.engine, transport, progress, log_settings(config))
    limits = ServiceLimits(
        max_choices=max(config.max_n, config.max_best_of),
        base_names=tuple(name for name in (client.info.model, config.served_model_name) if name),
    )
    templates = None
    if config.chat_template is not None:
        templates = {"default": read_template(config.chat_template)}
    service = AsyncService(client, policy=policy, limits=limits, templates=templates)
    metrics = Metrics(
        service.known_stats,
        max_adapters=config.metrics_adapters,
        lorax_names=config.lorax_metrics,
        named=config.adapters,
    )
    defaults = sampling_defaults(client.info) if config.generation_defaults else {}
    app = create_app(service, config, policy, metrics, defaults=defaults)
    return Started(service, app, lambda: announce(resolved, client.info, policy, url))


def log_settings(config: ServerConfig) -> LogSettings:
    return LogSettings(format=config.log_format, level=config.log_level)


def adapter_policy(resolved: Resolved) -> AdapterPolicy:
    """What clients may name, from the options."""
    config = resolved.server
    names = (resolved.engine.model, config.served_model_name)
    return AdapterPolicy(
        adapters=config.adapters,
        adapter_dir=config.adapter_dir,
        allow_local=config.allow_local,
        allow_hub=config.allow_hub,
        default_source=config.adapter_source,
        base_names=tuple(name for name in names if name),
    )


def read_template(path: Path) -> str:
    """The operator's own chat template. Raises ``ConfigError`` when it cannot be read as text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The chat template {path} cannot be read: {error}.", param="chat_template") from error


def sampling_defaults(info: EngineInfo) -> dict[str, Any]:
    """What generation_config.json says of sampling, beside the weights that were loaded."""
    path = info.details.get("path")
    if path is None:
        return {}
    with closing(open_checkpoint(Path(path))) as checkpoint:
        written = checkpoint.generation_config
    found = {name: written[name] for name in SAMPLING_FIELDS if written.get(name) is not None}
    try:
        SamplingParams(**found)
    except InvalidRequest as error:
        raise ConfigError(f"generation_config.json: {error.message}", param="generation_defaults") from error
    return found


class _Progress:
    """Loading, in the log: a line for each stage and each tenth of its bytes."""

    def __init__(self) -> None:
        self._stage = ""
        self._tenth = 0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        tenth = 10 * done // total if total else 0
        if stage == self._stage and tenth <= self._tenth:
            return
        if stage != self._stage:
            log.info("starting: %s", stage)
        elif total:
            log.info("starting: %s, %d %% of %s", stage, 10 * tenth, format_size(total))
        self._stage, self._tenth = stage, tenth


def announce(resolved: Resolved, info: EngineInfo, policy: AdapterPolicy, url: str) -> None:
    """The facts an operator looks for in the first lines of a log."""
    engine: EngineConfig = resolved.engine
    log.info("model %s (%s), %s weights, %s", info.model, info.model_type, format_size(info.weight_bytes), info.tying)
    why = info.details["dtype_reason"]
    log.info("backend %s on %s, compute in %s (%s)", info.backend, info.device, info.dtype, why)
    log.info(
        "room for %d KV tokens (%d blocks of %d), requests up to %d tokens, %d at a time",
        info.num_blocks * info.block_size,
        info.num_blocks,
        info.block_size,
        info.max_model_len,
        info.max_running,
    )
    names = policy.names()
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    log.info("adapters: %s%s", ", ".join(names[:10]) or "none", more)
    if resolved.server.host not in ("127.0.0.1", "localhost", "::1") and not resolved.server.api_keys:
        log.warning("listening beyond this machine without --api-key: anyone who reaches the port may use the model")
    log.info("ready at %s (prefix cache %s)", url, "on" if engine.prefix_cache else "off")
