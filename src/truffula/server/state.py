"""``ServerState``: what the routes share, on ``app.state``, made by ``create_app``."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

from starlette.requests import Request

from truffula.config import ServerConfig
from truffula.errors import AdapterNotFound, InvalidRequest, unknown_adapter
from truffula.lora.locations import URL_KINDS, url_of
from truffula.lora.sources import BASE_WORDS, SOURCES, AdapterDirectory
from truffula.metrics import Metrics, RequestRecord
from truffula.server.keys import OPERATOR, Access, Caller
from truffula.server.limits import RequestLimits
from truffula.server.shadows import Shadows
from truffula.service.aio import AsyncService
from truffula.types import AdapterRef

MAX_LOGGED_NAMES = 1000
log = logging.getLogger(__name__)


@dataclass
class ServerState:
    """Dependencies of the routes. ``succeeded`` turns true with the first answered generation (``/startup``).

    ``defaults`` are sampling fields for requests on the OpenAI side that leave them out.
    """

    service: AsyncService
    config: ServerConfig
    directory: AdapterDirectory
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    succeeded: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    seen_unknown: set[str] = field(default_factory=set)
    seen_not_found: set[str] = field(default_factory=set)
    _reloads: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    @cached_property
    def shadows(self) -> Shadows:
        return Shadows(self.service, self.metrics)

    async def shadow(self, names: Iterable[str | None], key: str) -> AdapterRef | None:
        """The adapter that also gets a copy of a request with ``key`` that names the adapter by ``names``, if any."""
        for name in filter(None, names):
            alias = self.directory.registry.alias(name.removeprefix(f"{self.model_id}:"))
            if alias is not None and alias.shadows(key):
                try:
                    return await self.service.look_up(self.service.core.resolve_adapter, alias.shadow)
                except AdapterNotFound as error:
                    log.warning("the alias %r has no shadow: %s", alias.name, error.data.get("reason", error.message))
        return None

    def reloading(self, name: str) -> asyncio.Lock:
        """Held while the adapter ``name`` is replaced, so that what was compared stays true until it is."""
        return self._reloads.setdefault(name, asyncio.Lock())

    @cached_property
    def limits(self) -> RequestLimits:
        """What one request may ask for."""
        config, info = self.config, self.service.info
        return RequestLimits(
            max_n=config.max_n,
            max_best_of=config.max_best_of,
            max_prompts=config.max_prompts,
            max_stop_sequences=config.max_stop_sequences,
            max_logprobs=config.max_logprobs,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size + info.more_ids,
            queue_timeout_s=config.queue_timeout_s,
            request_timeout_s=config.request_timeout_s,
            defaults=dict(self.defaults),
            base_words=(*self.base_names, *BASE_WORDS),
        )

    @property
    def model_id(self) -> str:
        """The base model's name in answers."""
        return self.config.served_model_name or self.service.info.model

    @property
    def base_names(self) -> tuple[str, ...]:
        """Every name of the base."""
        return (self.model_id, self.service.info.model)

    async def adapter(
        self, name: str | None, source: str | None = None, caller: Caller = OPERATOR
    ) -> AdapterRef | None:
        """The adapter called ``name``; None is the base. Raises ``AdapterNotFound``, never falls back to the base.

        What the rights of ``caller`` do not allow is not found. The file system is asked in another thread, so that a
        slow disk does not delay running streams.
        """
        if source is not None and source not in SOURCES:
            raise InvalidRequest(
                f"adapter_source {source[:40]!r} is not supported by this server; use one of {', '.join(SOURCES)}.",
                param="adapter_source",
            )
        try:
            if not name or name == self.model_id:
                caller.access.require_base()
                return None
            return await self.service.look_up(self._resolve, name, source, caller)
        except AdapterNotFound as error:
            raise self._not_found(name or self.model_id, error) from error

    def _resolve(self, name: str, source: str | None, caller: Caller) -> AdapterRef | None:
        access = caller.access
        access.require(url_of(source, name) if source in URL_KINDS else name)
        alias = self.directory.registry.alias(name) if source is None else None
        if alias is not None:
            name = alias.choose(caller.key)
            access.require(name)
        ref = self.service.core.resolve_adapter(name, source, caller.token)
        if ref is None:
            access.require_base()
        else:
            access.require(ref.name)  # of a path, the name is what it leads to
        return ref

    def _not_found(self, name: str, error: AdapterNotFound) -> AdapterNotFound:
        """What the client is told, the same whatever the reason, so that it learns nothing of adapters and paths that
        it may not name. The operator's log has the reason, once per name and for at most ``MAX_LOGGED_NAMES``.
        """
        told = unknown_adapter(name, error.data.get("reason", error.message), param="model")
        shown = told.data["adapter"]
        if shown not in self.seen_not_found and len(self.seen_not_found) < MAX_LOGGED_NAMES:
            self.seen_not_found.add(shown)
            last = len(self.seen_not_found) == MAX_LOGGED_NAMES
            log.warning(
                "no model or adapter %r: %s (logged once per name%s)",
                shown, told.data["reason"], "; further names are not logged" if last else "",
            )  # fmt: skip
        return told

    async def adapter_names(self) -> list[str]:
        """All names of adapters, sorted."""
        found = await self.service.look_up(self.service.core.directory.names)
        return [name for name in found if name != self.model_id]

    async def models(self, access: Access) -> list[str | None]:
        """The base (None) and the names of the adapters, as far as ``access`` allows their use."""
        names: list[str | None] = [None] if access.base else []
        return names + list(filter(access.may_use, await self.adapter_names()))

    async def named_model(
        self, model: str | None, source: str | None = None, caller: Caller = OPERATOR
    ) -> AdapterRef | None:
        """OpenAI's ``model``: the base, an adapter, or SGLang's ``base:adapter``."""
        if model is not None and model.startswith(f"{self.model_id}:"):
            model = model.removeprefix(f"{self.model_id}:")
        elif model in BASE_WORDS:
            model = None
        return await self.adapter(model, source, caller)


def state_of(request: Request) -> ServerState:
    """The server's state, for a handler."""
    state: ServerState = request.app.state.truffula
    return state


def record_of(request: Request) -> RequestRecord:
    record: RequestRecord = request.state.record
    return record
