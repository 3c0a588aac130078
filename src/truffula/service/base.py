"""``ServiceBase``: what the service in the caller's thread and the one under an event loop share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, Unpack

from truffula.engine.client import EngineClient
from truffula.lora.sources import AdapterDirectory
from truffula.service.core import Service, ServiceLimits
from truffula.service.files import LoadedTexts
from truffula.service.submissions import Submissions
from truffula.text.ends import Render
from truffula.text.tokenizer import Tokenizer
from truffula.types import EngineInfo, EngineStats


class ServiceOptions(TypedDict, total=False):
    """Keyword arguments of every service."""

    directory: AdapterDirectory | None
    """Which adapters clients may name."""
    limits: ServiceLimits | None
    """The operator's bounds."""
    texts: LoadedTexts | None
    """The model's text files, where they were read already."""
    templates: Mapping[str, str] | None
    """Name → Jinja source, instead of the model's."""
    render: Render | None
    """Renders chats at the start in place of this process."""


class ServiceBase:
    """A started engine, which the service owns from here on, the meaning of requests, and what the engine was given."""

    def __init__(self, client: EngineClient, **options: Unpack[ServiceOptions]) -> None:
        self._client = client
        self._core = Service(client.info, **options)
        self._submissions = Submissions(client)

    @property
    def info(self) -> EngineInfo:
        """What was loaded, and how."""
        return self._core.info

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._core.tokenizer

    @property
    def limits(self) -> ServiceLimits:
        return self._core.limits

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The model's generation_config.json."""
        return self._core.generation_config

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be rendered without a template of the request."""
        return self._core.tokenizer is not None and bool(self._core.templates)

    def stats(self) -> EngineStats:
        """The engine's latest heartbeat."""
        return self._client.stats()
