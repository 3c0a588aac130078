"""What the routes share: one object on ``app.state``, made by ``create_app``."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.requests import Request

from truffula.config import ServerConfig
from truffula.errors import AdapterNotFound, InvalidRequest
from truffula.lora.sources import AdapterPolicy
from truffula.metrics import Metrics, RequestRecord
from truffula.service import AsyncService
from truffula.types import AdapterRef

# Words that mean the base model, whatever it is called: what hub and text-generation clients send for "the" model.
BASE_WORDS = ("", "tgi", "dummy")


@dataclass(slots=True)
class ServerState:
    """Dependencies of the routes. ``succeeded`` turns true with the first answered generation (``/startup``)."""

    service: AsyncService
    config: ServerConfig
    policy: AdapterPolicy
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    succeeded: bool = False
    seen_unknown: set[str] = field(default_factory=set)

    @property
    def model_id(self) -> str:
        """The base model's name in answers."""
        return self.config.served_model_name or self.service.info.model

    def adapter(self, name: str | None, source: str | None = None) -> AdapterRef | None:
        """Who answers to ``name``: None is the base. Raises ``AdapterNotFound``, never falls back to the base."""
        if source is not None and source not in ("hub", "local"):
            known = source in ("s3", "pbase")
            what = "is not supported by this server" if known else "is unknown"
            raise InvalidRequest(f"adapter_source {source[:40]!r} {what}; use hub or local.", param="adapter_source")
        if name is None or name in BASE_WORDS or name == self.model_id:
            return None
        return self.service.resolve_adapter(name, source)

    def named_model(self, model: str | None, source: str | None = None) -> AdapterRef | None:
        """OpenAI's ``model``: the base, an adapter, or SGLang's ``base:adapter``."""
        if model is not None and model.startswith(f"{self.model_id}:"):
            rest = model.removeprefix(f"{self.model_id}:")
            try:
                return self.adapter(rest, source)
            except AdapterNotFound as error:
                raise AdapterNotFound(error.message, param="model") from error
        return self.adapter(model, source)


def state_of(request: Request) -> ServerState:
    """For ``Depends``, and for handlers that have only the request."""
    state: ServerState = request.app.state.truffula
    return state


def record_of(request: Request) -> RequestRecord:
    record: RequestRecord = request.state.record
    return record
