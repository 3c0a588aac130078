"""From configuration to a running service and its application: what loads, in order, and what the log says of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette

from truffula.config import EngineConfig, Resolved, format_size
from truffula.engine.client import Opening
from truffula.errors import ConfigError, InvalidRequest, TruffulaError
from truffula.kernels.freed import settle
from truffula.lora.sources import AdapterPolicy
from truffula.metrics import Metrics
from truffula.option import expanded
from truffula.server.app import create_app
from truffula.server.launch import adapter_policy, begin_engine
from truffula.service import AsyncService, ServiceLimits
from truffula.service.files import LoadedTexts, load_texts, texts_of, without_tokenizer
from truffula.service.workers import TextWorkers
from truffula.text.chat_template import read_template
from truffula.text.ends import describe
from truffula.text.worker import Setup
from truffula.types import EngineInfo, FileStamp, SamplingParams
from truffula.weights.watch import same_texts, stamp, text_stamped

SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """What ``start`` made; ``announce`` writes the start log once requests are answered."""

    service: AsyncService
    app: Starlette
    announce: Callable[[], None]


@dataclass(frozen=True)
class _Read:
    """What a model's text files gave; ``stamps`` are theirs from before they were read."""

    texts: LoadedTexts
    path: Path
    stamps: tuple[FileStamp, ...]

    def is_of(self, info: EngineInfo) -> bool:
        """Whether these are the texts of the files that the engine has loaded."""
        return str(self.path) == info.details.get("path") and same_texts(self.path, info.files, self.stamps)


def _read(path: Path) -> _Read:
    stamps = tuple(stamp(file) for file in text_stamped(path))
    return _Read(load_texts(path), path, stamps)


def _read_ahead(path: Path) -> _Read | None:
    """Of a model that is here, while its engine still imports; None where there is nothing or it can't be read: then
    the engine, which says best what is wrong, is asked first.
    """
    try:
        return _read(path) if path.exists() else None
    except (TruffulaError, OSError) as error:
        log.debug("%s is left to the engine: %s", path, error)
        return None


def start(resolved: Resolved, url: str, opening: Opening | None = None) -> Started:
    """The application over the engine that ``opening`` (None: begun here) starts, built while that loads."""
    config = resolved.server
    policy = adapter_policy(resolved)  # before the model: a mistake in the options need not wait for gigabytes
    opening = begin_engine(resolved) if opening is None else opening
    with ExitStack() as undo:
        undo.callback(opening.close)
        read = _read_ahead(expanded(resolved.engine.model))
        if read is None:
            found = opening.files()
            read = None if found is None else _read(found)
        templates = None
        if config.chat_template is not None:
            templates = {"default": read_template(config.chat_template)}
        settle()  # what making the tokenizer took, before anybody waits for this process
        undo.pop_all()
    client = opening.client()
    with ExitStack() as undo:
        undo.callback(client.close)
        texts = read.texts if read is not None and read.is_of(client.info) else texts_of(client.info)
        generation = texts.generation_config if config.generation_defaults else {}
        limits = ServiceLimits(
            max_choices=max(config.max_n, config.max_best_of),
            base_names=tuple(name for name in (client.info.model, config.served_model_name) if name),
        )
        workers = text_workers(client.info, texts, templates, config.text_memory_bytes)
        undo.callback(workers.close)
        service = AsyncService(client, policy=policy, limits=limits, texts=texts, templates=templates, workers=workers)
        metrics = Metrics(
            service.known_stats,
            restarts=service.restarts,
            max_adapters=config.metrics_adapters,
            lorax_names=config.lorax_metrics,
            named=config.adapters,
        )
        app = create_app(service, config, policy, metrics, defaults=sampling_defaults(generation))
        undo.pop_all()
    warnings = policy.warnings()  # here, as it looks at every folder: ``announce`` is called on the event loop
    return Started(service, app, lambda: announce(resolved, service.info, policy, url, warnings))


def text_workers(
    info: EngineInfo, texts: LoadedTexts, templates: dict[str, str] | None, memory_bytes: int
) -> TextWorkers:
    """Text workers for the model that ``info`` describes; their processes start when they are needed."""
    path = info.details.get("path")
    setup = Setup(
        info=info,
        texts_path=None if path is None else str(path),
        texts_digest=texts.digest,
        templates=templates,
        memory_bytes=memory_bytes,
    )
    return TextWorkers(setup)


def sampling_defaults(written: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json says of sampling."""
    found = {name: written[name] for name in SAMPLING_FIELDS if written.get(name) is not None}
    try:
        SamplingParams(**found)
    except InvalidRequest as error:
        raise ConfigError(f"generation_config.json: {error.message}", param="generation_defaults") from error
    return found


def announce(
    resolved: Resolved, info: EngineInfo, policy: AdapterPolicy, url: str, warnings: Sequence[str] = ()
) -> None:
    """The facts an operator looks for in the first lines of a log."""
    engine: EngineConfig = resolved.engine
    log.info("model %s (%s), %s weights, %s", info.model, info.model_type, format_size(info.weight_bytes), info.tying)
    why = info.details["dtype_reason"]
    log.info("backend %s on %s, compute in %s (%s)", info.backend, info.device, info.dtype, why)
    if info.details["int8_note"]:
        log.info("%s", info.details["int8_note"])
    log.info(
        "KV cache for %d tokens (%d blocks of %d); at most %d tokens per sequence, %d sequences per batch",
        info.num_blocks * info.block_size,
        info.num_blocks,
        info.block_size,
        info.max_model_len,
        info.max_running,
    )
    log.info("end tokens: %s", describe(info.end_tokens) or "none, answers end at stop strings or max_tokens only")
    for warning in without_tokenizer(info.no_tokenizer):
        log.warning("%s", warning)
    names = policy.names()
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    log.info("adapters: %s%s", ", ".join(names[:10]) or "none", more)
    for text in warnings:
        log.warning("%s", text)
    if resolved.server.host not in ("127.0.0.1", "localhost", "::1") and not resolved.server.api_keys:
        log.warning(
            "listening on more than this machine without --api-key: everyone who can reach the port can use the server"
        )
    log.info("ready at %s (prefix cache %s)", url, "on" if engine.prefix_cache else "off")
