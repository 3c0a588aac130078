"""vLLM's and SGLang's adapter administration, served only with ``--adapter-admin``, since a path is a path of this
machine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable

from msgspec.structs import replace
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import AdapterNotFound, InvalidRequest, ModelNotFound, TruffulaError
from truffula.server.adapters import forget, is_taken, load, locate_new, reload, unload
from truffula.server.body import Body, read_body
from truffula.server.replies import json_reply
from truffula.server.state import ServerState, record_of, state_of
from truffula.types import AdapterCommand, AdapterRef


class LoadBody(Body):
    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    load_inplace: bool | None = None
    expected_generation: str | None = None


class SglangLoadBody(LoadBody):
    pinned: bool | None = None


class UnloadBody(Body):
    lora_name: str = Field(min_length=1)


async def load_adapter(request: Request) -> Response:
    """Loads an adapter from a folder of the server's machine. The answer comes once requests can name it. With
    ``load_inplace`` it replaces one of the same name: running requests keep the former.
    """
    body = await read_body(request, LoadBody)
    await _load(state_of(request), body)
    return json_reply(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def _load(state: ServerState, body: LoadBody, *, pinned: bool = False) -> None:
    async with state.changing([body.lora_name]):
        ref = await _load_free(state, body, pinned=pinned)
    if ref is not None and (present := await state.adapter(body.lora_name)) is not None:
        await reload(state, replace(present, name=body.lora_name), ref, body.expected_generation)


async def _load_free(state: ServerState, body: LoadBody, *, pinned: bool) -> AdapterRef | None:
    """Load and register an adapter; or return the one that is to be compared with the present one first."""
    name = body.lora_name
    taken = await state.service.look_up(is_taken, state, name)
    fields = ("lora_name", "lora_path")
    ref = await state.service.look_up(lambda: locate_new(state, name, body.lora_path, folder=True, fields=fields))
    if taken and not body.load_inplace:
        raise InvalidRequest(f"{name!r} is already loaded; send load_inplace: true to replace it.", param="lora_name")
    if body.expected_generation is not None and not taken:
        raise InvalidRequest(f"expected_generation: there is no adapter {name!r}.", param="expected_generation")
    ref = replace(ref, untrained=True)  # a trainer loads the first version of its policy before the first step
    if body.expected_generation is not None:
        return ref
    await load(state, ref, pinned=pinned)
    await state.service.look_up(state.directory.add, ref)
    return None


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
    """Unload an adapter that may be named, of NAME every version; returns whether new requests no longer find it.
    Raises ``AdapterNotFound`` when there is nothing to unload.
    """
    directory = state.directory
    offered = await state.service.look_up(directory.is_offered, name)
    if not await forget(state, name):
        ref = await state.service.look_up(directory.peek, name)
        if ref is None:
            raise AdapterNotFound(f"There is no adapter {name[:80]!r} to unload.", param="lora_name")
        if not await unload(state, ref):
            raise AdapterNotFound(f"Adapter {name[:80]!r} is not loaded.", param="adapter")
    return not offered


async def delete_model(request: Request) -> Response:
    """Unloads an adapter and forgets its name, as OpenAI deletes a fine-tuned model."""
    state = state_of(request)
    name: str = request.path_params["model_id"]
    if not await state.service.look_up(is_taken, state, name):
        raise ModelNotFound(f"There is no adapter {name[:80]!r} to delete; GET /v1/models lists them.", param="model")
    if state.directory.registry.find(name) is None or await state.service.look_up(state.directory.is_offered, name):
        raise InvalidRequest(
            f"{name[:80]!r} cannot be deleted: the server's --adapter or --adapter-dir offers it. POST "
            "/v1/unload_lora_adapter frees its memory.",
            param="model",
        )
    await forget(state, name)
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
    loaded = await state.service.look_up(_locators, state, sorted(names))
    reply = json_reply({"success": not message, "error_message": message, "loaded_adapters": loaded})
    reply.status_code = 400 if message else 200
    return reply


def _locators(state: ServerState, names: Iterable[str]) -> dict[str, str]:
    """Name → folder or Hub id of those that are still listed."""
    refs = {name: state.directory.peek(name) for name in names}
    return {name: ref.locator for name, ref in refs.items() if ref is not None}
