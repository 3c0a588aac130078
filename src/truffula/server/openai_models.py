"""``/v1/models``: the base first, then the adapters a client may name."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import ModelNotFound
from truffula.lora.sources import BASE_WORDS
from truffula.server.replies import json_reply
from truffula.server.state import ServerState, state_of


def entry(state: ServerState, name: str | None) -> dict[str, Any]:
    """One model; ``name`` None is the base."""
    base = state.model_id
    return {
        "id": name or base,
        "object": "model",
        "created": state.created,
        "owned_by": "truffula",
        "root": name or state.service.info.model,
        "parent": base if name else None,
        "max_model_len": state.service.info.max_model_len,
        "permission": [_permission(state.created)],
    }


def _permission(created: int) -> dict[str, Any]:
    """What OpenAI's old clients and vLLM's read of every model: it may be sampled."""
    return {
        "id": "modelperm-truffula",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


async def list_models(request: Request) -> Response:
    """Lists the base model and the adapters that requests may name."""
    state = state_of(request)
    rows = [entry(state, None), *(entry(state, name) for name in await state.adapter_names())]
    return json_reply({"object": "list", "data": rows})


async def one_model(request: Request) -> Response:
    """One entry of that list. The id may contain slashes."""
    state = state_of(request)
    name: str = request.path_params["model_id"]
    if not name or (name in BASE_WORDS and name != state.model_id):
        raise ModelNotFound(f"There is no model {name!r}.", param="model")
    adapter = await state.named_model(name)
    return json_reply(entry(state, None if adapter is None else name))
