"""vLLM's adapter administration, served only where the operator switched it on: a path is a path of this machine."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import AdapterNotFound, ConfigError, InvalidRequest
from truffula.lora.sources import AdapterPolicy, reserved
from truffula.server.body import Body, read_body
from truffula.server.replies import json_reply
from truffula.server.state import state_of
from truffula.types import AdapterCommand, AdapterRef


class LoadBody(Body):
    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    load_inplace: bool | None = None


class UnloadBody(Body):
    lora_name: str = Field(min_length=1)


async def load_adapter(request: Request) -> Response:
    """Loads an adapter from a folder of the server's machine. The answer comes once requests can name it."""
    state = state_of(request)
    body = await read_body(request, LoadBody)
    name = body.lora_name
    if reserved(name, state.base_names):
        raise InvalidRequest(f"{name[:80]!r} means the base model; name the adapter otherwise.", param="lora_name")
    if name in await state.adapter_names() and not body.load_inplace:
        raise InvalidRequest(f"{name!r} is already loaded; send load_inplace: true to replace it.", param="lora_name")
    policy, ref = await state.service.in_thread(_find, name, body.lora_path)
    await state.service.adapters(AdapterCommand(action="load", ref=ref))
    state.loaded[name] = policy
    return json_reply(f"Success: LoRA adapter '{name}' added successfully.")


def _find(name: str, path: str) -> tuple[AdapterPolicy, AdapterRef | None]:
    """The adapter at ``path`` by its new name; asks the file system."""
    if not _is_folder(path):
        raise AdapterNotFound(f"{path[:200]!r} holds no adapter.", param="lora_path")
    try:
        policy = AdapterPolicy({name: path})
    except ConfigError as error:
        raise InvalidRequest(error.message, param="lora_name") from error
    return policy, policy.resolve(name)


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):  # longer than the system takes, or with a zero byte
        return False


async def unload_adapter(request: Request) -> Response:
    """Unloads an adapter. Running requests keep it; new ones find it only if an option of the server names it."""
    state = state_of(request)
    name = (await read_body(request, UnloadBody)).lora_name
    if name not in await state.adapter_names():
        raise AdapterNotFound(f"There is no adapter {name[:80]!r} to unload.", param="lora_name")
    ref = await state.adapter(name)
    state.loaded.pop(name, None)
    await state.service.adapters(AdapterCommand(action="unload", ref=ref))
    return json_reply(f"Success: LoRA adapter '{name}' removed successfully.")
