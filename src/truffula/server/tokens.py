"""``/tokenize``, ``/detokenize`` and ``/chat_tokenize``, in the forms of LoRAX, TGI and vLLM.

Each reply is made whole by one function of its body, in a thread, or in a text worker when the body is large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import InvalidRequest, PromptTooLong, TruffulaError
from truffula.items import Tool
from truffula.server.auth import access_of, client_of
from truffula.server.body import Address, Body, BodyJob, decode_object, note_ignored, raw_body, validate
from truffula.server.keys import Caller
from truffula.server.limits import RequestLimits
from truffula.server.lorax_bodies import ChatTokenizeBody, DetokenizeBody, TokenizeBody
from truffula.server.prepare import answering
from truffula.server.replies import Reply, json_reply, split
from truffula.server.state import state_of
from truffula.service.prompt_maker import HEAVY_CHARS
from truffula.service.prompts import MAX_TRUNCATED_CHARS, Prompt, make_prompt, need_tokenizer
from truffula.service.text_sets import TextSet
from truffula.text.chat_template import ChatTemplates
from truffula.text.tokenizer import Tokenizer, check_text
from truffula.text.worker import Worker
from truffula.types import EngineInfo, GenerateRequest

# A reply, and the names of what the chat template does not use.
_Made = tuple[Any, Sequence[str]]
Kind = Literal["tokenize", "detokenize", "chat_tokenize"]


@dataclass(frozen=True)
class Texts:
    """What a reply is made with."""

    tokenizer: Tokenizer | None
    templates: ChatTemplates
    info: EngineInfo

    def needed(self) -> Tokenizer:
        """The tokenizer. Raises ``NoTokenizer``."""
        return need_tokenizer(self.tokenizer, self.info)


class _Head(msgspec.Struct, frozen=True, array_like=True):
    """Of a body: its keys without effect, and the model that it names."""

    unknown: list[str]
    model: str | None


async def tokenize(request: Request) -> Response:
    """Turns text into tokens. `inputs` is answered as by LoRAX and TGI, `prompt` or `messages` as by vLLM."""
    return await _answer(request, "tokenize")


async def detokenize(request: Request) -> Response:
    """Turns token ids into text. Special tokens are part of it, as in vLLM."""
    return await _answer(request, "detokenize")


async def chat_tokenize(request: Request) -> Response:
    """The text that the chat template makes of a conversation, and its tokens."""
    return await _answer(request, "chat_tokenize")


async def tokenizer_info(request: Request) -> Response:
    """The special tokens and the chat template, as vLLM reports them of tokenizer_config.json. lm-eval reads them."""
    core = state_of(request).service.texts.core
    found = need_tokenizer(core.tokenizer, core.info).special_tokens
    templates = core.base.templates.sources
    template = (
        templates.get("default")
        if len(templates) < 2
        else [{"name": name, "template": source} for name, source in templates.items()]
    )
    named = {name: found.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return json_reply({"tokenizer_class": "PreTrainedTokenizerFast", **named, "chat_template": template})


async def _answer(request: Request, kind: Kind) -> Response:
    state, texts = state_of(request), state_of(request).service.texts
    raw, own = raw_body(request), texts.core.base
    value: dict[str, Any] = {}
    large = len(raw) > HEAVY_CHARS
    job, client = BodyJob(kind, raw, state.limits, known=not large), client_of(request)

    async def adapter_texts(model: Any) -> TextSet:
        if state.config.default is None and not (model and isinstance(model, str)):
            return texts.core.base
        named = Address([model if isinstance(model, str) else None], [], None, None)
        adapter, _ = await answering(named, state, Caller(access_of(request)))
        return await texts.of(adapter, client)

    if not large:
        value = decode_object(raw)
        chat = isinstance(value.get("messages"), list)
        tools = [Tool(name="any")] if value.get("tools") else None  # some models have another template for them
        own = await adapter_texts(value.get("model"))
        large = own.source is not None or (
            chat and not texts.core.is_plain(GenerateRequest(messages=[], tools=tools))
        )  # fmt: skip
    if large:
        packed, *parts = await texts.in_worker(reply_job, job._replace(texts=own.source), client)
        head = msgspec.msgpack.decode(packed, type=_Head)
        if not value and ((own := await adapter_texts(head.model)).source is not None or not parts):
            _, *parts = await texts.in_worker(reply_job, job._replace(texts=own.source, known=True), client)
    else:
        model = Texts(own.tokenizer, own.templates, texts.core.info)
        head, reply = await texts.in_thread(len(raw), lambda: _reply(job, value, model))
        parts = [reply]
    note_ignored(request, head.unknown)
    return Reply(parts)


def reply_job(worker: Worker, job: BodyJob) -> Iterator[bytes]:
    """In a text worker: the head of a body, then the reply in pieces."""
    texts = Texts(*worker.texts(job.texts), worker.setup.info)
    head, reply = _reply(job, decode_object(job.raw), texts)
    yield msgspec.msgpack.encode(head)
    yield from split(reply)


def _reply(job: BodyJob, value: dict[str, Any], texts: Texts) -> tuple[_Head, bytes]:
    model, make = _ROUTES[job.kind]
    body: Any = validate(model, value, job.limits)
    try:
        reply, left_out = make(body, texts, job.limits)
    except TruffulaError:
        if job.known:
            raise
        return _Head(body.unknown(), body.model), b""
    return _Head([*body.unknown(), *map(body.field_of, left_out)], body.model), msgspec.json.encode(reply)


def _tokenize(body: TokenizeBody, texts: Texts, limits: RequestLimits) -> _Made:
    given = [name for name in ("inputs", "prompt", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            f"Give one of inputs, prompt and messages, not {' and '.join(given) or 'none'}.", param="inputs"
        )
    special = True if body.add_special_tokens is None else body.add_special_tokens
    if body.inputs is not None:
        return _native_tokens(texts, body.inputs, special), ()
    tokenizer = texts.needed()
    left_out: Sequence[str] = ()
    if body.messages is not None:
        made = _rendered(texts, body.chat())
        ids, left_out = made.ids, made.ignored
    else:
        ids = [row[0] for row in _tokens(texts, body.prompt or "", special)]
    strings = [tokenizer.id_to_token(token) for token in ids] if body.return_token_strs else None
    return {
        "count": len(ids), "max_model_len": texts.info.max_model_len, "tokens": ids, "token_strs": strings
    }, left_out  # fmt: skip


def _detokenize(body: DetokenizeBody, texts: Texts, limits: RequestLimits) -> _Made:
    for i, token in enumerate(body.tokens):
        if not 0 <= token < limits.vocab_size:
            raise InvalidRequest(
                f"tokens[{i}] is {token}, which is not a token id from 0 to {limits.vocab_size - 1}.", param="tokens"
            )
    return {"prompt": texts.needed().decode(body.tokens, skip_special_tokens=bool(body.skip_special_tokens))}, ()


def _chat_tokenize(body: ChatTokenizeBody, texts: Texts, limits: RequestLimits) -> _Made:
    made = _rendered(texts, body.chat())
    tokens = _native_tokens(texts, made.text, bool(body.add_special_tokens))
    return {"tokenize_response": tokens, "templated_text": made.text}, made.ignored


_Make = Callable[[Any, Texts, RequestLimits], _Made]
_ROUTES: Mapping[str, tuple[type[Body], _Make]] = MappingProxyType(
    {
        "tokenize": (TokenizeBody, _tokenize),
        "detokenize": (DetokenizeBody, _detokenize),
        "chat_tokenize": (ChatTokenizeBody, _chat_tokenize),
    }
)


def _native_tokens(texts: Texts, text: str, special: bool) -> list[dict[str, Any]]:
    """``text`` is the slice of the input between the character offsets, empty for what the tokenizer added."""
    return [
        {"id": token, "text": text[start:stop], "start": start, "stop": stop}
        for token, start, stop in _tokens(texts, text, special)
    ]


def _tokens(texts: Texts, text: str, special: bool) -> list[tuple[int, int, int]]:
    """``(id, start, stop)`` per token: character offsets, 0, 0 for tokens that the tokenizer added."""
    tokenizer = texts.needed()
    check_text(text, "inputs")
    if len(text) > MAX_TRUNCATED_CHARS:
        raise PromptTooLong(
            f"The text has {len(text)} characters; the limit is {MAX_TRUNCATED_CHARS} per request.",
            param="inputs",
            prompt_chars=len(text),
            max_chars=MAX_TRUNCATED_CHARS,
        )
    encoded = tokenizer.encode_with_offsets(text, add_special_tokens=special)
    return [
        (token_id, *((0, 0) if added else offset))
        for token_id, offset, added in zip(encoded.ids, encoded.offsets, encoded.added, strict=True)
    ]


def _rendered(texts: Texts, request: GenerateRequest) -> Prompt:
    """A chat's text, its ids, and what the template leaves out of it."""
    return make_prompt(msgspec.structs.replace(request, echo=True), texts.needed(), texts.templates, texts.info)
