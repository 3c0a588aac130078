"""Which adapter answers a request, from all of its fields that may say so; and the sender's id and salt."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace
from starlette.requests import Request

from truffula.errors import InvalidRequest
from truffula.server.auth import prefix_salt
from truffula.server.body import Address
from truffula.server.middleware import request_id
from truffula.server.state import ServerState, record_of, state_of
from truffula.types import AdapterRef, GenerateRequest


async def addressed(request: Request, made: Sequence[GenerateRequest], address: Address) -> list[GenerateRequest]:
    """``made`` with adapter, request id and salt, which are recorded for the log and the metrics too.

    Raises as ``answering``.
    """
    state, record = state_of(request), record_of(request)
    adapter = await answering(address, state)
    if address.request_id is not None:
        record.request_id = request_id(address.request_id)
    record.adapter = None if adapter is None else adapter.name
    record.max_tokens = made[0].params.max_tokens
    salt = prefix_salt(request, address.salt, state.config.salt_by_api_key)
    return [replace(one, adapter=adapter, request_id=record.request_id, salt=salt) for one in made]


async def answering(address: Address, state: ServerState) -> AdapterRef | None:
    """The adapter that a body names; None is the base.

    An adapter may be named beside a ``model`` that is the base's or the adapter's own name. Raises ``InvalidRequest``
    where two fields name different adapters, ``AdapterNotFound`` for a name that this server does not serve.
    """
    found: AdapterRef | None = None
    for model in address.models:
        ref = await state.named_model(model, address.source)
        if found is not None and ref is not None and ref.name != found.name:
            raise InvalidRequest("model is given twice, for different adapters; give one of them.", param="model")
        found = found or ref
    if not address.adapters:
        return found
    first, name = address.adapters[0]
    for place, other in address.adapters[1:]:
        if other != name:
            raise InvalidRequest(f"{first} and {place} mean the same and differ; give one of them.", param=place)
    adapter = await state.adapter(name, address.source)
    if found is not None and (adapter is None or adapter.name != found.name):
        raise InvalidRequest(f"model names one adapter and {first} another; give one of them.", param=first)
    return adapter
