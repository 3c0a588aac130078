"""vLLM's and SGLang's adapter administration, served only with ``--adapter-admin``, since a path is a path of this
machine; and the list of adapters with what the engine knows of each, which tells where they lie only then.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any

from msgspec.structs import replace
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import AdapterNotFound, ConfigError, InvalidRequest, ModelNotFound, TruffulaError
from truffula.lora.sources import AdapterDirectory, reserved
from truffula.server.body import Body, read_body
from truffula.server.replies import json_reply
from truffula.server.state import ServerState, record_of, state_of
from truffula.types import AdapterCommand, AdapterRef, AdapterState


class LoadBody(Body):
    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    load_inplace: bool | None = None


class SglangLoadBody(LoadBody):
    pinned: bool | None = None


class UnloadBody(Body):
    lora_name: str = Field(min_length=1)


STATUSES = ("resident", "uploading", "ready", "loading", "failed", "retired")
"""Of several generations of one adapter, the first of these is shown."""


async def list_adapters(request: Request) -> Response:
    """Every adapter that can be named now: status, rank and size as the engine has them. ``source`` and the error of a
    failed load name paths, so they are only given where clients may load by path."""
    state = state_of(request)
    found = await state.service.adapters(AdapterCommand(action="list"))
    known = {one.name: one for one in sorted(found, key=lambda one: -STATUSES.index(one.status))}
    names = await state.adapter_names()
    sources = await state.service.look_up(_sources, state, names) if state.config.adapter_admin else None
    return json_reply({"object": "list", "data": [_row(name, known.get(name), sources) for name in names]})


def _sources(state: ServerState, names: Iterable[str]) -> dict[str, str]:
    """Name → folder or Hub id of the adapters that are still there; asks the file system."""
    found = {}
    for name in names:
        with contextlib.suppress(AdapterNotFound):  # removed since it was listed
            if (ref := state.service.core.resolve_adapter(name)) is not None:
                found[name] = ref.locator
    return found


def _row(name: str, found: AdapterState | None, sources: Mapping[str, str] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"id": name, "status": "not loaded", "rank": None, "size_bytes": None}
    if found is not None:
        row |= {"status": found.status, "rank": found.rank or None, "size_bytes": found.nbytes or None}
    if sources is not None:
        row["source"] = sources.get(name)
        row["error"] = None if found is None or found.error is None else found.error.message
    return row


async def load_adapter(request: Request) -> Response:
    """Loads an adapter from a folder of the server's machine. The answer comes once requests can name it. With
    ``load_inplace`` it replaces one of the same name: running requests keep the former.
    """
    body = await read_body(request, LoadBody)
    await _load(state_of(request), body)
    return json_reply(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def _load(state: ServerState, body: LoadBody, *, pinned: bool = False) -> None:
    name = body.lora_name
    if reserved(name, state.base_names):
        raise InvalidRequest(
            f"{name[:80]!r} means the base model; choose another name for the adapter.", param="lora_name"
        )
    if name in await state.adapter_names() and not body.load_inplace:
        raise InvalidRequest(f"{name!r} is already loaded; send load_inplace: true to replace it.", param="lora_name")
    ref = await state.service.look_up(_find, state.directory, name, body.lora_path)
    ref = replace(ref, untrained=True)  # a trainer loads the first version of its policy before the first step
    await state.service.adapters(AdapterCommand(action="load", ref=ref, pinned=pinned))
    state.directory.add(ref)


def _find(directory: AdapterDirectory, name: str, path: str) -> AdapterRef:
    """The adapter at ``path`` by its new name; asks the file system."""
    if not os.path.isdir(path):  # noqa: PTH112  (``Path.is_dir`` raises for names that the system does not take)
        raise AdapterNotFound(f"{path[:200]!r} does not contain an adapter.", param="lora_path")
    try:
        return directory.locate(name, path)
    except ConfigError as error:
        raise InvalidRequest(error.message, param="lora_name") from error


async def unload_adapter(request: Request) -> Response:
    """Unloads an adapter. Running requests keep it; new ones no longer find it, unless the server's own options offer
    it: then the reply says so.
    """
    state = state_of(request)
    name = (await read_body(request, UnloadBody)).lora_name
    if await _unload(state, name):
        return json_reply(f"Success: LoRA adapter '{name}' removed successfully.")
    return json_reply(
        f"Success: LoRA adapter '{name}' is unloaded. The server's --adapter or --adapter-dir still offers it: the "
        "next request for it loads it again."
    )


async def _unload(state: ServerState, name: str) -> bool:
    """Unload an adapter that may be named; returns whether new requests no longer find it. Raises ``AdapterNotFound``
    when there is nothing to unload.
    """
    if name not in await state.adapter_names():
        raise AdapterNotFound(f"There is no adapter {name[:80]!r} to unload.", param="lora_name")
    ref = await state.adapter(name)
    state.directory.remove(name)
    offered = name in await state.adapter_names()
    try:
        await state.service.adapters(AdapterCommand(action="unload", ref=ref))
    except AdapterNotFound:
        if offered:
            raise
        # It was evicted, and now its name is forgotten, too.
    return not offered


async def delete_model(request: Request) -> Response:
    """Unloads an adapter and forgets its name, as OpenAI deletes a fine-tuned model."""
    state = state_of(request)
    name: str = request.path_params["model_id"]
    if name not in await state.adapter_names():
        raise ModelNotFound(f"There is no adapter {name[:80]!r} to delete; GET /v1/models lists them.", param="model")
    if not state.directory.is_added(name):
        raise InvalidRequest(
            f"{name[:80]!r} cannot be deleted: the server's --adapter or --adapter-dir offers it. POST "
            "/v1/unload_lora_adapter frees its memory.",
            param="model",
        )
    await _unload(state, name)
    return json_reply({"id": name, "object": "model", "deleted": True})


async def sglang_load(request: Request) -> Response:
    """As `/v1/load_lora_adapter`, with SGLang's answer. A ``pinned`` adapter stays in memory until it is unloaded."""
    body = await read_body(request, SglangLoadBody)
    return await _sglang(request, _load(state_of(request), body, pinned=bool(body.pinned)))


async def sglang_unload(request: Request) -> Response:
    """As `/v1/unload_lora_adapter`, with SGLang's answer."""
    body = await read_body(request, UnloadBody)
    return await _sglang(request, _unload(state_of(request), body.lora_name))


async def _sglang(request: Request, work: Awaitable[object]) -> Response:
    """SGLang's answer to a command: whether it succeeded, and the adapters that are loaded then."""
    state, message = state_of(request), ""
    try:
        await work
    except TruffulaError as error:
        record_of(request).error_code = error.code
        message = error.message
    found = await state.service.adapters(AdapterCommand(action="list"))
    names = {one.name for one in found if one.status in ("resident", "uploading", "ready")}
    loaded = await state.service.look_up(_sources, state, names & set(await state.adapter_names()))
    reply = json_reply({"success": not message, "error_message": message, "loaded_adapters": loaded})
    reply.status_code = 400 if message else 200
    return reply
