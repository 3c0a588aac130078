"""From the bytes of a generating request to its body and ``GenerateRequest``s.

A small body is read on the event loop. A large one is read by a text worker, which makes the prompts too, and sends
back what the reply needs of the body: all but the fields in ``_LEFT_OUT``.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import msgspec
from msgspec.structs import replace
from starlette.requests import Request

from truffula.errors import InvalidRequest, TruffulaError
from truffula.lora.sources import BASE_WORDS
from truffula.server.adapter_mix import BASE_ADAPTER, require_effect
from truffula.server.auth import access_of, client_of, prefix_salt
from truffula.server.body import (
    Address,
    BodyJob,
    GeneratingBody,
    as_sent,
    decode_object,
    note_ignored,
    raw_body,
    validate,
)
from truffula.server.constraint_fields import NATIVE_FIELDS, OPENAI_FIELDS
from truffula.server.decisions_bodies import DecisionsBody
from truffula.server.foreign_fields import is_adapter_field
from truffula.server.keys import Caller
from truffula.server.limits import RequestLimits
from truffula.server.lorax_bodies import GenerateBody, Parameters
from truffula.server.messages_bodies import CountTokensBody, MessagesBody
from truffula.server.middleware import request_id
from truffula.server.openai_bodies import ChatBody, CompletionBody
from truffula.server.responses_bodies import ResponsesBody
from truffula.server.state import ServerState, record_of, state_of
from truffula.service.prompt_maker import HEAVY_CHARS
from truffula.service.prompts import prompt_job
from truffula.text.worker import Worker
from truffula.types import AdapterRef, GenerateRequest

OpenAIKind = Literal["chat", "completion", "responses", "decisions"]
Kind = OpenAIKind | Literal["messages", "count_tokens", "native", "native_whole", "native_stream", "invocations"]
# Fields that a prompt is made of or that are in ``GenerateRequest.params``, and their values in the light body.
_LEFT_OUT: Mapping[str, Any] = MappingProxyType(
    {
        "messages": [{"role": "user", "content": ""}],
        "prompt": "",
        "input": "",
        **dict.fromkeys(
            ("suffix", "documents", "tools", "chat_template_kwargs", "stop", "stop_token_ids", "logit_bias")
        ),
        **dict.fromkeys(("system", "stop_sequences", "output_config", "output_format")),
        **dict.fromkeys((*OPENAI_FIELDS, *NATIVE_FIELDS)),
    }
)


SPLIT_KEY = "x-truffula-split-key"
"""The header whose value chooses among the targets of an alias; without it, the request's id does."""


@dataclasses.dataclass(frozen=True)
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


Stored = Callable[[Request, list[str]], Awaitable[bytes]]
"""The items of ids of stored responses and items, as a JSON object of lists."""


class _Head(msgspec.Struct, frozen=True, array_like=True):
    kind: str
    body: bytes
    unknown: list[str]
    characters: int
    wanted: list[str]
    request: GenerateRequest


async def read_requests(request: Request, kind: Kind, stored_items: Stored | None = None) -> Read:
    """The request's body, checked, and what it asks for; keys without effect are noted.

    ``stored_items`` is for bodies that refer to stored responses.

    Raises ``InvalidRequest`` and its kinds, and as ``answering``.
    """
    record_of(request).generates = kind != "count_tokens"
    state = state_of(request)
    raw = raw_body(request)
    stored, made, job = b"", None, None
    if len(raw) <= HEAVY_CHARS:
        request.state.body = body = read_value(kind, value := decode_object(raw), state.limits)
        if stored_items is not None and body.wanted:
            stored = await stored_items(request, body.wanted)
        unknown, characters = body.unknown(), body.characters
        if len(raw) + len(stored) <= HEAVY_CHARS:
            made = body.requests(state.limits, streams=_streams(kind, value), stored=json.loads(stored or b"{}"))
    if made is None:
        job = BodyJob(kind, raw, state.limits, stored)
        head, body, made = await _read_in_worker(request, job)
        if stored_items is not None and head.wanted and not stored:
            job = job._replace(stored=await stored_items(request, head.wanted))
            head, body, made = await _read_in_worker(request, job)
        unknown, characters = head.unknown, head.characters
    request.state.body = body
    at = time.monotonic()
    used: set[str] = set()
    try:
        made = await addressed(request, made, body.address(), used)
        if job is not None:
            source = (await state.service.texts.of(made[0].adapter, client_of(request))).source
            if source is not None or not all(one.prepared for one in made):
                _, _, again = await _read_in_worker(request, job._replace(texts=source, known=True))
                prompts = [one.prepared for one in again]
                made = [
                    replace(one, prepared=prompt, prepared_with=source)
                    for one, prompt in zip(made, prompts, strict=True)
                ]
    finally:
        note_ignored(request, [name for name in unknown if name not in used])
    return Read(body, made, characters, at)


async def _read_in_worker(request: Request, job: BodyJob) -> tuple[_Head, GeneratingBody, list[GenerateRequest]]:
    """The head of a body, the body without what its prompts are made of, and its requests. There are none while ``job``
    lacks the stored items that the body wants; ``prepared`` is empty of one that fails with texts not ``known``.
    """
    packed, *prompts = await state_of(request).service.texts.in_worker(prepare, job, client_of(request))
    head = msgspec.msgpack.decode(packed, type=_Head)
    body = validate(_MODELS[head.kind], json.loads(head.body), job.limits)
    return head, body, [replace(head.request, prepared=one) for one in prompts]


async def addressed(
    request: Request, made: Sequence[GenerateRequest], address: Address, used: set[str]
) -> list[GenerateRequest]:
    """``made`` with adapter, request id and salt, which are recorded for the log and the metrics too. Adds to ``used``
    the fields that only some requests have a use for, where this one has.

    Raises as ``answering``.
    """
    state, record, access = state_of(request), record_of(request), access_of(request)
    if address.request_id is not None:
        record.request_id = request_id(address.request_id)
    field, user = address.user or ("", "")
    header = request.headers.get(SPLIT_KEY)
    caller = Caller(access, header or user or record.request_id, address.token)
    adapter, names = await answering(address, state, caller)
    request.state.shadow = await state.shadow(names, caller.key)
    if not header and any(state.chooses(name) for name in names):
        used.add(field)
    record.adapter = None if adapter is None else adapter.label
    record.max_tokens = made[0].params.max_tokens
    salt = prefix_salt(request, address.salt, state.config.salt_by_api_key)
    if adapter is not None and (rights := adapter.rights):
        salt = f"{','.join(rights)}:{salt}"  # a right is a tenant: none sees what another has cached
        record.own_right = True
        used |= {"api_token", "parameters.api_token"}
    whose = {"salt": salt, "tenant": access.tenant or "", "weight": access.weight}
    return [replace(one, adapter=adapter, request_id=record.request_id, **whose) for one in made]


async def answering(address: Address, state: ServerState, caller: Caller) -> tuple[AdapterRef | None, list[str]]:
    """The adapter that answers a body, None for the base, and the names by which it was found.

    An adapter may be named beside a ``model`` that is the base's or the adapter's own name. The server's default
    adapter acts where nothing is named, or is added to what is named, unless the base is named. Raises
    ``InvalidRequest`` where two fields name different adapters, ``AdapterNotFound`` for a name that this server does
    not serve.
    """
    adapter, names = await _named(address, state, caller)
    plain = any(state.means_base(name) for name in names)
    if state.config.default is not None and not plain and (not names or state.config.default_adapter_mode == "add"):
        place = address.adapters[0][0] if address.adapters else "model"
        adapter = await state.with_default(adapter, place, caller)
        names = [*names, state.config.default[0]]
    if adapter is None:
        await state.adapter(None, None, caller)  # the right to the base
    elif not caller.access.base and address.adapters:
        require_effect(adapter, address.adapters[0])
    return adapter, names


async def _named(address: Address, state: ServerState, caller: Caller) -> tuple[AdapterRef | None, list[str]]:
    """The adapter that a body names, and the names; without any, or with the base's, it is None."""
    found: AdapterRef | None = None
    beside = dataclasses.replace(caller, access=dataclasses.replace(caller.access, base=True))
    for model in address.models:
        ref = await state.named_model(model, address.source, beside)
        if found is not None and ref is not None and ref.name != found.name:
            raise InvalidRequest("model is given twice, for different adapters; give one of them.", param="model")
        found = found or ref
    names = [model for model in address.models if model and (model == state.model_id or model not in BASE_WORDS)]
    if not address.adapters:
        return found, names
    first, named = address.adapters[0]
    for place, other in address.adapters[1:]:
        if other != named:
            raise InvalidRequest(f"{first} and {place} mean the same and differ; give one of them.", param=place)

    def find(name: str) -> Awaitable[AdapterRef | None]:
        return state.adapter(name, address.source, caller)

    if isinstance(named, str):
        adapter = None if named == BASE_ADAPTER else await find(named)
        names.append(state.model_id if adapter is None else named)
    else:
        adapter = await named.resolve(first, find)
        names.append("")  # a sum: no alias is followed that has a shadow
    if found is not None and (adapter is None or adapter.name != found.name):
        raise InvalidRequest(f"model names one adapter and {first} another; give one of them.", param=first)
    return adapter, names


def read_value(kind: str, value: dict[str, Any], limits: RequestLimits) -> GeneratingBody:
    """A decoded body as its model."""
    model: type[GeneratingBody] = GenerateBody
    any_kind = kind == "invocations"
    if kind == "chat" or (any_kind and "messages" in value):
        model = ChatBody
    elif kind in _ANTHROPIC:
        model = _ANTHROPIC[kind]
    elif kind == "completion" or (any_kind and "prompt" in value and "inputs" not in value):
        model = CompletionBody
    elif kind == "responses":
        model = ResponsesBody
    elif kind == "decisions":
        model = DecisionsBody
    return validate(model, value, limits)


def _streams(kind: str, value: Mapping[str, Any]) -> bool:
    """Whether the answer to a decoded body is streamed."""
    return kind == "native_stream" or (kind != "native_whole" and bool(value.get("stream")))


_ANTHROPIC: Mapping[str, type[GeneratingBody]] = MappingProxyType(
    {"messages": MessagesBody, "count_tokens": CountTokensBody}
)
_MODELS: Mapping[str, type[GeneratingBody]] = MappingProxyType(
    {
        model.__name__: model
        for model in (
            *(ChatBody, CompletionBody, CountTokensBody, DecisionsBody, GenerateBody),
            *(MessagesBody, ResponsesBody),
        )
    }
)


def prepare(worker: Worker, job: BodyJob) -> Iterator[bytes]:
    """In a text worker: the head of a large body, then each of its prompts."""
    value = decode_object(job.raw)
    body = read_value(job.kind, value, job.limits)
    try:
        yield from _prepared(worker, job, value, body)
    except TruffulaError as error:
        raise as_sent(error, body) from error


def _prepared(worker: Worker, job: BodyJob, value: dict[str, Any], body: GeneratingBody) -> Iterator[bytes]:
    made: list[GenerateRequest] = []
    request = GenerateRequest()
    if not body.wanted or job.stored:
        streams = _streams(job.kind, value)
        made = body.requests(job.limits, streams=streams, stored=json.loads(job.stored or b"{}"))
        messages: list[Any] | None = None if made[0].messages is None else []
        request = replace(made[0], prompt=None, suffix="", messages=messages, documents=None, template_kwargs={})
    light = json.dumps(_light(value, type(body))).encode()
    yield msgspec.msgpack.encode(
        _Head(type(body).__name__, light, body.unknown(), body.characters, body.wanted, request)
    )
    for one in made:
        try:
            yield from prompt_job(worker, (one, job.texts))
        except TruffulaError:
            if job.known:
                raise
            yield b""


def _light(value: Mapping[str, Any], model: type[GeneratingBody] | type[Parameters]) -> dict[str, Any]:
    """``value`` without what only prompts and parameters are made of, and without unknown fields."""
    known, repeated = model.model_fields, getattr(model, "repeated", ())
    light: dict[str, Any] = {}
    for name, item in value.items():
        if name in known and name in _LEFT_OUT and name not in repeated:
            light[name] = _LEFT_OUT[name]
        elif name == "parameters" and isinstance(item, dict):
            light[name] = _light(item, Parameters)
        elif name in known or is_adapter_field(name) or name in getattr(model, "user_fields", ()):
            light[name] = item
    return light
