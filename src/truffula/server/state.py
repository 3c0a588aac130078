"""``ServerState``: what the routes share, on ``app.state``, made by ``create_app``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

from starlette.requests import Request

from truffula.config import ServerConfig
from truffula.errors import AdapterNotFound, InvalidRequest, unknown_adapter
from truffula.lora.compose import compose
from truffula.lora.locations import URL_KINDS, url_of
from truffula.lora.registry import CONTENT, Alias, split_content
from truffula.lora.sources import BASE_WORDS, SOURCES, AdapterDirectory
from truffula.metrics import Metrics, RequestRecord
from truffula.server.keys import OPERATOR, Access, Caller
from truffula.server.limits import RequestLimits
from truffula.server.shadows import Shadows
from truffula.service.aio import AsyncService
from truffula.types import AdapterRef, WeightedAdapter

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
    naming: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the target of an alias is looked for, and while one is removed."""
    _changes: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    @cached_property
    def shadows(self) -> Shadows:
        return Shadows(self.service, self.metrics)

    def _alias(self, name: str) -> Alias | None:
        return self.directory.registry.alias(split_content(name.removeprefix(f"{self.model_id}:"))[0])

    def chooses(self, name: str) -> bool:
        """Whether the key of a request that names ``name`` has an effect."""
        alias = self._alias(name)
        return alias is not None and (len(alias.targets) > 1 or alias.shadow is not None)

    def means_base(self, name: str) -> bool:
        """Whether ``name`` names the base: by itself, or before an adapter (``base:adapter``)."""
        return name in self.base_names or name.startswith(f"{self.model_id}:")

    async def with_default(self, adapter: AdapterRef | None, place: str, caller: Caller) -> AdapterRef | None:
        """``adapter`` and the default one together; None is the base.

        Raises ``AdapterNotFound``, which names no adapter, where the default is absent or forbidden; ``InvalidRequest``
        (``place``) for more adapters than may act together.
        """
        assert self.config.default is not None
        name, weight = self.config.default
        try:
            access = replace(caller.access, base=True)
            ref = await self.service.look_up(self._resolve, name, None, Caller(access, caller.key))
        except AdapterNotFound as error:
            self._log_not_found(name, error)
            raise AdapterNotFound(
                "The request needs the server's default adapter, which is not available to it; name an adapter, or "
                f"the base model {self.model_id!r}.",
                param="model",
            ) from error
        own = [] if adapter is None else [WeightedAdapter(adapter)]
        return compose([*own, *([] if ref is None else [WeightedAdapter(ref, weight)])], place)

    async def shadow(self, names: Iterable[str], key: str) -> AdapterRef | None:
        """The adapter that also gets a copy of a request with ``key`` that names the adapter by ``names``, if any."""
        for name in names:
            alias = self._alias(name)
            if alias is not None and alias.shadows(key):
                try:
                    return await self.service.look_up(self.service.core.resolve_adapter, alias.shadow)
                except AdapterNotFound as error:
                    log.warning("the alias %r has no shadow: %s", alias.name, error.data.get("reason", error.message))
        return None

    @contextlib.asynccontextmanager
    async def changing(self, names: Iterable[str]) -> AsyncIterator[None]:
        """Held while the adapters ``names`` are registered, replaced or removed, so that what was compared, or found to
        be free, stays so until it is.
        """
        async with contextlib.AsyncExitStack() as stack:
            for name in sorted(set(names)):
                await stack.enter_async_context(self._changes.setdefault(name, asyncio.Lock()))
            yield

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
        access, token = caller.access, caller.token
        access.require(url_of(source, name) if source in URL_KINDS else name)
        short, wanted = split_content(name)
        alias = self.directory.registry.alias(short) if source is None else None
        if alias is not None:
            if wanted and len(alias.targets) > 1:
                one = f"{short[:80]!r} is an alias of several adapters; name one of them with {CONTENT}."
                raise InvalidRequest(one, param="model")
            name, token = alias.choose(caller.key), None  # the operator names the source, so it is the operator's right
            access.require(name)
            name += f"{CONTENT}{wanted}" if wanted else ""
        ref = self.service.core.resolve_adapter(name, source, token)
        if ref is None:
            access.require_base()
        else:
            access.require(ref.name)  # of a path, the name is what it leads to
        return ref

    def _not_found(self, name: str, error: AdapterNotFound) -> AdapterNotFound:
        """What the client is told, the same whatever the reason, so that it learns nothing of adapters and paths that
        it may not name. The operator's log has the reason, once per name and for at most ``MAX_LOGGED_NAMES``.
        """
        self._log_not_found(name, error)
        return unknown_adapter(name, error.data.get("reason", error.message), param="model")

    def _log_not_found(self, name: str, error: AdapterNotFound) -> None:
        told = unknown_adapter(name, error.data.get("reason", error.message))
        shown = told.data["adapter"]
        if shown not in self.seen_not_found and len(self.seen_not_found) < MAX_LOGGED_NAMES:
            self.seen_not_found.add(shown)
            last = len(self.seen_not_found) == MAX_LOGGED_NAMES
            log.warning(
                "no model or adapter %r: %s (logged once per name%s)",
                shown, told.data["reason"], "; further names are not logged" if last else "",
            )  # fmt: skip

    async def adapter_names(self) -> list[str]:
        """All names of adapters, sorted."""
        found = await self.service.look_up(self.service.core.directory.names)
        return [name for name in found if name != self.model_id]

    async def models(self, access: Access) -> list[str | None]:
        """The base (None) and the names of the adapters, as far as ``access`` allows their use."""
        names: list[str | None] = [None] if access.base else []
        found = await self.adapter_names()
        if self.config.default is not None and self.config.default[0] not in found:  # one that is loaded on first use
            found = [*found, self.config.default[0]]
        return names + list(filter(access.may_use, found))

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
