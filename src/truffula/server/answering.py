"""Which adapter answers a request, from all of its fields that may say so."""

from __future__ import annotations

from typing import Protocol

from truffula.errors import InvalidRequest
from truffula.server.state import ServerState
from truffula.types import AdapterRef


class Names(Protocol):
    """What a body says of the adapter: its values of ``model``, and the other fields that name one."""

    @property
    def models(self) -> list[str | None]: ...
    @property
    def adapter_source(self) -> str | None: ...
    def adapters(self) -> list[tuple[str, str]]: ...


async def answering(body: Names, state: ServerState) -> AdapterRef | None:
    """The adapter that ``body`` names; None is the base.

    An adapter may be named beside a ``model`` that is the base's or the adapter's own name. Raises ``InvalidRequest``
    where two fields name different adapters, ``AdapterNotFound`` for a name that this server does not serve.
    """
    source = body.adapter_source
    found: AdapterRef | None = None
    for model in body.models:
        ref = await state.named_model(model, source)
        if found is not None and ref is not None and ref.name != found.name:
            raise InvalidRequest("model is given twice, for different adapters; give one of them.", param="model")
        found = found or ref
    named = body.adapters()
    for place, name in named[1:]:
        if name != named[0][1]:
            raise InvalidRequest(f"{named[0][0]} and {place} mean the same and differ; give one of them.", param=place)
    if not named:
        return found
    place, name = named[0]
    other = await state.adapter(name, source)
    if found is not None and (other is None or other.name != found.name):
        raise InvalidRequest(f"model names one adapter and {place} another; give one of them.", param=place)
    return other
