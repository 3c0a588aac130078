"""vLLM's routes ``/v1/chat/completions/render`` and ``/v1/completions/render``: a request's prompt as token ids."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from truffula.params import SamplingParams
from truffula.server.prepare import Kind, read_requests
from truffula.server.replies import json_reply
from truffula.server.state import record_of, state_of
from truffula.service.prompts import check_fits


async def render_chat(request: Request) -> Response:
    """The token ids of a conversation, as the model would read them; generates nothing."""
    (found,) = await _rendered(request, "chat")
    return json_reply(found)


async def render_completions(request: Request) -> Response:
    """The token ids of each prompt; generates nothing."""
    return json_reply(await _rendered(request, "completion"))


async def _rendered(request: Request, kind: Kind) -> list[dict[str, Any]]:
    state = state_of(request)
    read = await read_requests(request, kind)
    record_of(request).generates = False
    found = []
    for one in read.requests:
        texts = await state.service.texts.of(one.adapter, one.salt)
        state.service.core.check(one, texts)
        prompt = await state.service.texts.prompt(one, texts)
        check_fits(len(prompt.ids), one.params, state.service.core.info)
        found.append(
            {
                "request_id": one.request_id,
                "token_ids": prompt.ids,
                "features": None,  # of images, which this server does not read
                "sampling_params": _given(one.params),
                "model": state.model_id if one.adapter is None else one.adapter.name,
            }
        )
    return found


def _given(params: SamplingParams) -> dict[str, Any]:
    """The parameters that differ from their defaults."""
    defaults = msgspec.structs.asdict(SamplingParams())
    given = {name: value for name, value in msgspec.structs.asdict(params).items() if value != defaults[name]}
    plain: dict[str, Any] = msgspec.to_builtins(given, str_keys=True)
    return plain
