"""The fields by which clients of other servers name an adapter: honoured, or refused by name, never ignored.

A request that is answered by the base although it named an adapter looks like any other answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from truffula.errors import InvalidRequest
from truffula.server.field_names import has_no_effect, squeezed

EMPTY: tuple[Any, ...] = ("", False, [], {}, [""])
"""Values by which no adapter is named, beside null."""


@dataclass(frozen=True, slots=True)
class AdapterField:
    """``names_one``: a string in the field is an adapter's name, and is honoured as one.

    ``no_effect`` are values without effect when another field names the adapter.
    """

    names_one: bool = True
    no_effect: tuple[Any, ...] = ()


_NAME = AdapterField()
_OTHER = AdapterField(names_one=False)
_SCALE = AdapterField(names_one=False, no_effect=(1, [1]))
ADAPTER_FIELDS: Mapping[str, AdapterField] = MappingProxyType(
    {
        "adapter_id": _NAME,  # LoRAX, TGI
        "adapter_name": _NAME,  # a request of predibase/lorax#777
        "adapter_path": _NAME,  # mlx-omni-server
        "adapter": _NAME,  # DJL Serving, mlx_lm
        "adapters": _NAME,  # mlx_lm.server, mistral.rs, DJL Serving
        "lora": _NAME,  # llama.cpp, which takes a list of ids and scales
        "lora_path": _NAME,  # SGLang
        "lora_name": _NAME,  # vLLM's administration, Triton's vLLM backend
        "lora_modules": _NAME,  # vLLM's start option
        "active_adapter": _NAME,  # peft
        "active_adapters": _NAME,  # peft
        "adapter_names": _NAME,  # peft's generate
        # No known server has these; they are near the names above.
        "adapter_ids": _NAME,
        "adapter_model": _NAME,
        "lora_adapter": _NAME,
        "lora_adapters": _NAME,
        "lora_id": _NAME,
        "lora_ids": _NAME,
        "lora_model": _NAME,
        "lora_model_id": _NAME,
        "lora_names": _NAME,
        "lora_paths": _NAME,
        "loras": _NAME,
        "peft": _NAME,
        "peft_model": _NAME,
        "peft_model_id": _NAME,
        "lora_request": _OTHER,  # vLLM's LLM.generate
        "lora_int_id": _OTHER,  # vLLM's LoRARequest
        "lora_local_path": _OTHER,  # vLLM's LoRARequest
        "lora_task_id": _OTHER,  # TensorRT-LLM
        "lora_config": _OTHER,  # TensorRT-LLM
        "merged_adapters": _OTHER,  # LoRAX
        "lora_weights": _SCALE,  # TensorRT-LLM
        # No known server has these; they are near llama.cpp's scale.
        "lora_weight": _SCALE,
        "lora_scale": _SCALE,
        "lora_scales": _SCALE,
        "adapter_scale": _SCALE,
        "adapter_weight": _SCALE,
        "adapter_weights": _SCALE,
    }
)
_BY_SQUEEZED = MappingProxyType({squeezed(name): row for name, row in ADAPTER_FIELDS.items()})
_WORDS = frozenset({"adapter", "adapters", "lora", "loras", "peft", "dora", "qlora"})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# The source of an adapter, not its name.
_SOURCE = squeezed("adapter_source")


def is_adapter_field(name: str) -> bool:
    """Whether ``name`` is of the table, however it is spelled (``loraName``), or any name with such a word in it."""
    low = name.lower()
    if "lora" not in low and "adapter" not in low and "peft" not in low and "dora" not in low:
        return False  # most names; what follows costs more
    key = squeezed(name)
    if key == _SOURCE:
        return False
    return key in _BY_SQUEEZED or any(word.lower() in _WORDS for word in _WORD.findall(name.replace("oRA", "ora")))


def adapter_named(place: str, name: str, value: Any, use: str) -> str | None:
    """The adapter that field ``name`` names by ``value``, None where it names none.

    Raises ``InvalidRequest`` for ids, weights and several adapters, and for a field that is not of the table: ``place``
    is where the field stands, ``use`` the field that names an adapter on this route.
    """
    row = _BY_SQUEEZED.get(squeezed(name), _OTHER)
    if has_no_effect(value, EMPTY + row.no_effect):
        return None
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    if row.names_one and isinstance(one, str):
        return one
    raise InvalidRequest(
        f"{place} is not supported by this server; name one adapter, as a string, in {use}.", param=place
    )


def adapters_named(fields: Iterable[tuple[str, Any]], prefix: str, use: str) -> list[tuple[str, str]]:
    """Each field of an object that names an adapter, with its place and the name. Raises as ``adapter_named``."""
    found = []
    for field, value in fields:
        if value is None or not is_adapter_field(field):
            continue
        place = f"{prefix}{field[:64]}"
        if name := adapter_named(place, field, value, use):
            found.append((place, name))
    return found
