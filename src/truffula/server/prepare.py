"""From the bytes of a generating request to its body and ``GenerateRequest``s.

A small body is read on the event loop. A large one is read by a text worker, which makes the prompts too, and sends
back what the reply needs of the body: all but the fields in ``_LEFT_OUT``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec.structs import replace
from starlette.requests import Request

from truffula.server.auth import client_of
from truffula.server.body import Body, decode_object, note_ignored, note_unknown, raw_body, validate
from truffula.server.foreign_fields import is_adapter_field
from truffula.server.limits import RequestLimits
from truffula.server.lorax_bodies import GenerateBody, Parameters
from truffula.server.openai_bodies import ChatBody, CompletionBody
from truffula.server.openai_requests import chat_requests, completion_requests
from truffula.server.state import state_of
from truffula.service.prompt_maker import HEAVY_CHARS
from truffula.service.prompts import prompt_job
from truffula.text.worker import Worker
from truffula.types import GenerateRequest

Kind = Literal["chat", "completion", "native", "native_whole", "native_stream", "invocations"]
# Fields that a prompt is made of or that are in ``GenerateRequest.params``, with what stands for those that a body must
# have.
_LEFT_OUT: Mapping[str, Any] = MappingProxyType(
    {
        "messages": [{"role": "user", "content": ""}],
        "prompt": "",
        **dict.fromkeys(("documents", "chat_template_kwargs", "stop", "stop_token_ids", "logit_bias")),
    }
)


@dataclass(frozen=True)
class Read:
    """A body, its requests without their adapter, and how many characters their texts have."""

    body: Body
    requests: list[GenerateRequest]
    characters: int


class Job(NamedTuple):
    """A large body for a text worker."""

    kind: Kind
    raw: bytes
    limits: RequestLimits


class _Head(msgspec.Struct, frozen=True, array_like=True):
    kind: str
    body: bytes
    unknown: list[str]
    characters: int
    request: GenerateRequest


async def read_requests(request: Request, kind: Kind) -> Read:
    """The request's body, checked; keys without effect are noted. Raises ``InvalidRequest`` and its kinds."""
    state = state_of(request)
    raw = await raw_body(request)
    if len(raw) <= HEAVY_CHARS or not state.service.texts.has_workers:
        body, made = read_value(kind, decode_object(raw), state.limits)
        note_unknown(request, body)
        return Read(body, made, _characters(made))
    head, *prompts = await state.service.texts.in_worker(prepare, Job(kind, raw, state.limits), client_of(request))
    found = msgspec.msgpack.decode(head, type=_Head)
    light = json.loads(found.body)
    stand_ins = {name: value for name, value in _LEFT_OUT.items() if value is not None and name in light}
    model = _MODELS[found.kind]
    body = validate(model, light | stand_ins, state.limits)
    note_ignored(request, found.unknown)
    return Read(body, [replace(found.request, prepared=one) for one in prompts], found.characters)


def read_value(kind: Kind, value: dict[str, Any], limits: RequestLimits) -> tuple[Body, list[GenerateRequest]]:
    """A decoded body as its model and its requests."""
    if kind == "invocations":
        kind = "chat" if "messages" in value else "native"
        kind = "completion" if "prompt" in value and not {"inputs", "messages"} & value.keys() else kind
    if kind == "chat":
        chat = validate(ChatBody, value, limits)
        return chat, chat_requests(chat, limits)
    if kind == "completion":
        completion = validate(CompletionBody, value, limits)
        return completion, completion_requests(completion, limits)
    native = validate(GenerateBody, value, limits)
    streams = bool(native.stream) if kind == "native" else kind == "native_stream"
    return native, [native.request(limits, streams=streams)]


_MODELS: Mapping[str, type[Body]] = MappingProxyType(
    {model.__name__: model for model in (ChatBody, CompletionBody, GenerateBody)}
)


def prepare(worker: Worker, job: Job) -> Iterator[bytes]:
    """In a text worker: the head of a large body, then each of its prompts."""
    value = decode_object(job.raw)
    body, made = read_value(job.kind, value, job.limits)
    request = replace(
        made[0],
        prompt=None,
        messages=None if made[0].messages is None else [],
        documents=None,
        template_kwargs={},
    )
    light = json.dumps(_light(value, type(body))).encode()
    yield msgspec.msgpack.encode(_Head(type(body).__name__, light, body.unknown(), _characters(made), request))
    for one in made:
        yield from prompt_job(worker, one)


def _light(value: Mapping[str, Any], model: type[Body]) -> dict[str, Any]:
    """``value`` without what only prompts and parameters are made of, and without unknown fields."""
    known = model.model_fields
    light: dict[str, Any] = {}
    for name, item in value.items():
        if name in _LEFT_OUT and name in known:
            if _LEFT_OUT[name] is not None:
                light[name] = None
        elif name == "parameters" and isinstance(item, dict):
            light[name] = _light(item, Parameters)
        elif name in known or is_adapter_field(name):
            light[name] = item
    return light


def _characters(made: list[GenerateRequest]) -> int:
    return sum(len(one.prompt) for one in made if isinstance(one.prompt, str))
