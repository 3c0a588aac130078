"""``/tokenize``, ``/detokenize`` and ``/chat_tokenize``, in the forms of LoRAX, TGI and vLLM."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import InvalidRequest, NoTokenizer
from truffula.server.body import read_body, validate
from truffula.server.lorax_bodies import ChatTokenizeBody, DetokenizeBody, TokenizeBody
from truffula.server.openai_bodies import ChatMessage
from truffula.server.replies import json_reply
from truffula.server.state import ServerState, state_of
from truffula.types import GenerateRequest


async def tokenize(request: Request) -> Response:
    """Turns text into tokens. `inputs` is answered as by LoRAX and TGI, `prompt` or `messages` as by vLLM."""
    state = state_of(request)
    body = await read_body(request, TokenizeBody)
    given = [name for name in ("inputs", "prompt", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            f"Give one of inputs, prompt and messages, not {' and '.join(given) or 'none'}.", param="inputs"
        )
    special = True if body.add_special_tokens is None else body.add_special_tokens
    await state.named_model(body.model)
    if body.inputs is not None:
        rows = await _native_tokens(state, body.inputs, special)
        return await state.service.beside(len(rows), lambda: json_reply(rows))
    if body.messages is not None:
        _, ids = await state.service.render(
            GenerateRequest(
                messages=_messages(body.messages),
                template_kwargs=dict(body.chat_template_kwargs or {}),
                continue_final_message=bool(body.continue_final_message),
                add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
                add_special_tokens=bool(body.add_special_tokens),
            )
        )
    else:
        ids = [row[0] for row in await state.service.tokenize(body.prompt or "", add_special_tokens=special)]
    strings = None
    if body.return_token_strs:
        strings = await state.service.beside(len(ids), lambda: [_vocabulary_piece(state, token) for token in ids])
    limit = state.service.info.max_model_len
    answer = {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": strings}
    return await state.service.beside(len(ids), lambda: json_reply(answer))


async def detokenize(request: Request) -> Response:
    """Turns token ids into text. Special tokens are part of it, as in vLLM."""
    state = state_of(request)
    body = await read_body(request, DetokenizeBody)
    await state.named_model(body.model)
    for i, token in enumerate(body.tokens):
        if not 0 <= token < state.service.info.vocab_size:
            raise InvalidRequest(
                f"tokens[{i}] is {token}, which is not a token id from 0 to {state.service.info.vocab_size - 1}.",
                param="tokens",
            )
    text = await state.service.detokenize(body.tokens, skip_special_tokens=bool(body.skip_special_tokens))
    return json_reply({"prompt": text})


async def chat_tokenize(request: Request) -> Response:
    """The text that the chat template makes of a conversation, and its tokens."""
    state = state_of(request)
    body = await read_body(request, ChatTokenizeBody)
    await state.named_model(body.model)
    text, _ = await state.service.render(GenerateRequest(messages=_messages(body.messages)))
    rows = await _native_tokens(state, text, special=False)
    answer = {"tokenize_response": rows, "templated_text": text}
    return await state.service.beside(len(text), lambda: json_reply(answer))


async def _native_tokens(state: ServerState, text: str, special: bool) -> list[dict[str, Any]]:
    """``text`` is the slice of the input between the character offsets, empty for what the tokenizer added."""
    rows = await state.service.tokenize(text, add_special_tokens=special)

    def shaped() -> list[dict[str, Any]]:
        return [{"id": token, "text": text[start:stop], "start": start, "stop": stop} for token, _, start, stop in rows]

    return await state.service.beside(len(text), shaped)


def _messages(values: list[dict[str, object]]) -> list[dict[str, Any]]:
    if not values:
        raise InvalidRequest("messages is an empty list.", param="messages")
    return [validate(ChatMessage, value).for_template() for value in values]


def _vocabulary_piece(state: ServerState, token: int) -> str | None:
    if state.service.tokenizer is None:
        raise NoTokenizer("This model has no tokenizer; send token ids and read token ids.")
    piece: str | None = state.service.tokenizer.id_to_token(token)
    return piece
