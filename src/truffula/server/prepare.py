"""From the bytes of a generating request to its body and ``GenerateRequest``s.

A small body is read on the event loop. A large one is read by a text worker, which makes the prompts too, and sends
back what the reply needs of the body: all but the fields in ``_LEFT_OUT``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import msgspec
from msgspec.structs import replace
from starlette.requests import Request

from truffula.errors import InvalidRequest
from truffula.server.auth import client_of, prefix_salt
from truffula.server.body import Address, BodyJob, GeneratingBody, decode_object, note_ignored, raw_body, validate
from truffula.server.constraint_fields import NATIVE_FIELDS, OPENAI_FIELDS
from truffula.server.foreign_fields import is_adapter_field
from truffula.server.limits import RequestLimits
from truffula.server.lorax_bodies import GenerateBody, Parameters
from truffula.server.middleware import request_id
from truffula.server.openai_bodies import ChatBody, CompletionBody
from truffula.server.state import ServerState, record_of, state_of
from truffula.service.prompt_maker import HEAVY_CHARS
from truffula.service.prompts import prompt_job
from truffula.text.worker import Worker
from truffula.types import AdapterRef, GenerateRequest

Kind = Literal["chat", "completion", "native", "native_whole", "native_stream", "invocations"]
# Fields that a prompt is made of or that are in ``GenerateRequest.params``, and their values in the light body.
_LEFT_OUT: Mapping[str, Any] = MappingProxyType(
    {
        "messages": [{"role": "user", "content": ""}],
        "prompt": "",
        **dict.fromkeys(
            ("suffix", "documents", "tools", "chat_template_kwargs", "stop", "stop_token_ids", "logit_bias")
        ),
        **dict.fromkeys((*OPENAI_FIELDS, *NATIVE_FIELDS)),
    }
)


@dataclass(frozen=True)
class Read:
    """A body and its requests, how many characters their texts have, and when the body was read (monotonic seconds)."""

    body: GeneratingBody
    requests: list[GenerateRequest]
    characters: int
    at: float

    @property
    def adapter(self) -> AdapterRef | None:
        """The adapter that answers; None is the base."""
        return self.requests[0].adapter


class _Head(msgspec.Struct, frozen=True, array_like=True):
    kind: str
    body: bytes
    unknown: list[str]
    characters: int
    request: GenerateRequest


async def read_requests(request: Request, kind: Kind) -> Read:
    """The request's body, checked, and what it asks for; keys without effect are noted.

    Raises ``InvalidRequest`` and its kinds, and as ``answering``.
    """
    record_of(request).generates = True
    state = state_of(request)
    raw = await raw_body(request)
    if len(raw) <= HEAVY_CHARS:
        body, made = read_value(kind, decode_object(raw), state.limits)
        unknown, characters = body.unknown(), body.characters
    else:
        packed, *prompts = await state.service.texts.in_worker(
            prepare, BodyJob(kind, raw, state.limits), client_of(request)
        )
        head = msgspec.msgpack.decode(packed, type=_Head)
        body = validate(_MODELS[head.kind], json.loads(head.body), state.limits)
        made = [replace(head.request, prepared=one) for one in prompts]
        unknown, characters = head.unknown, head.characters
    note_ignored(request, unknown)
    at = time.monotonic()
    return Read(body, await addressed(request, made, body.address()), characters, at)


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


def read_value(kind: str, value: dict[str, Any], limits: RequestLimits) -> tuple[GeneratingBody, list[GenerateRequest]]:
    """A decoded body as its model and its requests, which ``addressed`` completes."""
    model: type[GeneratingBody] = GenerateBody
    any_kind = kind == "invocations"
    if kind == "chat" or (any_kind and "messages" in value):
        model = ChatBody
    elif kind == "completion" or (any_kind and "prompt" in value and "inputs" not in value):
        model = CompletionBody
    body = validate(model, value, limits)
    streams = kind == "native_stream" or (kind != "native_whole" and bool(value.get("stream")))
    return body, body.requests(limits, streams=streams)


_MODELS: Mapping[str, type[GeneratingBody]] = MappingProxyType(
    {model.__name__: model for model in (ChatBody, CompletionBody, GenerateBody)}
)


def prepare(worker: Worker, job: BodyJob) -> Iterator[bytes]:
    """In a text worker: the head of a large body, then each of its prompts."""
    value = decode_object(job.raw)
    body, made = read_value(job.kind, value, job.limits)
    request = replace(
        made[0],
        prompt=None,
        suffix="",
        messages=None if made[0].messages is None else [],
        documents=None,
        template_kwargs={},
    )
    light = json.dumps(_light(value, type(body))).encode()
    yield msgspec.msgpack.encode(_Head(type(body).__name__, light, body.unknown(), body.characters, request))
    for one in made:
        yield from prompt_job(worker, one)


def _light(value: Mapping[str, Any], model: type[GeneratingBody] | type[Parameters]) -> dict[str, Any]:
    """``value`` without what only prompts and parameters are made of, and without unknown fields."""
    known = model.model_fields
    light: dict[str, Any] = {}
    for name, item in value.items():
        if name in known and name in _LEFT_OUT:
            light[name] = _LEFT_OUT[name]
        elif name == "parameters" and isinstance(item, dict):
            light[name] = _light(item, Parameters)
        elif name in known or is_adapter_field(name):
            light[name] = item
    return light
