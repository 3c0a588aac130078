"""What the routes share: one object on ``app.state``, made by ``create_app``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from truffula.config import ServerConfig
from truffula.errors import InvalidRequest
from truffula.lora.sources import BASE_WORDS as BASE_WORDS  # routes know it from here
from truffula.lora.sources import AdapterPolicy
from truffula.metrics import Metrics, RequestRecord
from truffula.service import AsyncService
from truffula.types import AdapterRef


@dataclass(slots=True)
class ServerState:
    """Dependencies of the routes. ``succeeded`` turns true with the first answered generation (``/startup``).

    ``defaults`` are sampling fields for requests on the OpenAI side that leave them out. ``loaded`` holds what an
    administrator added while the server runs: a policy of one name each.
    """

    service: AsyncService
    config: ServerConfig
    policy: AdapterPolicy
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    succeeded: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    loaded: dict[str, AdapterPolicy] = field(default_factory=dict)
    seen_unknown: set[str] = field(default_factory=set)

    @property
    def model_id(self) -> str:
        """The base model's name in answers."""
        return self.config.served_model_name or self.service.info.model

    @property
    def base_names(self) -> tuple[str, ...]:
        """Every name of the base."""
        return (self.model_id, self.service.info.model)

    async def adapter(self, name: str | None, source: str | None = None) -> AdapterRef | None:
        """Who answers to ``name``: None is the base. Raises ``AdapterNotFound``, never falls back to the base.

        Files are looked at beside the loop: a slow disk, or thousands of folders, hold up nobody's tokens.
        """
        if source is not None and source not in ("hub", "local"):
            known = source in ("s3", "pbase")
            what = "is not supported by this server" if known else "is unknown"
            raise InvalidRequest(f"adapter_source {source[:40]!r} {what}; use hub or local.", param="adapter_source")
        if not name or name == self.model_id:
            return None
        if name in self.loaded and source in (None, "local"):
            return await self.service.in_thread(self.loaded[name].resolve, name)
        return await self.service.in_thread(self.service.resolve_adapter, name, source)

    async def adapter_names(self) -> list[str]:
        """Names a client may use now, sorted."""
        found = await self.service.in_thread(self.service.adapter_names)
        return sorted({*found, *self.loaded} - {self.model_id})

    async def named_model(self, model: str | None, source: str | None = None) -> AdapterRef | None:
        """OpenAI's ``model``: the base, an adapter, or SGLang's ``base:adapter``."""
        if model is not None and model.startswith(f"{self.model_id}:"):
            return await self.adapter(model.removeprefix(f"{self.model_id}:"), source)
        return None if model in BASE_WORDS else await self.adapter(model, source)


def state_of(request: Request) -> ServerState:
    """For ``Depends``, and for handlers that have only the request."""
    state: ServerState = request.app.state.truffula
    return state


def record_of(request: Request) -> RequestRecord:
    record: RequestRecord = request.state.record
    return record
