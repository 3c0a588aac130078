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
from truffula.server.field_names import is_neutral, squeezed

EMPTY: tuple[Any, ...] = ("", False, [], {}, [""])
"""Values by which no adapter is named, beside null."""


@dataclass(frozen=True, slots=True)
class AdapterField:
    """``servers`` use the field. ``names_one``: a string in it is an adapter's name, and is honoured as one.

    ``neutral`` are values without effect beside an adapter that is named elsewhere.
    """

    servers: str
    names_one: bool = True
    neutral: tuple[Any, ...] = ()


_WEIGHT = (1, [1])
_NEAR = AdapterField("no known server; near the names above")
_SCALE = AdapterField("no known server; near llama.cpp's scale", names_one=False, neutral=_WEIGHT)
ADAPTER_FIELDS: Mapping[str, AdapterField] = MappingProxyType(
    {
        "adapter_id": AdapterField("LoRAX, TGI"),
        "adapter_name": AdapterField("a request of predibase/lorax#777"),
        "adapter_path": AdapterField("mlx-omni-server"),
        "adapter": AdapterField("DJL Serving, mlx_lm"),
        "adapters": AdapterField("mlx_lm.server, mistral.rs, DJL Serving"),
        "lora": AdapterField("llama.cpp, which takes a list of ids and scales"),
        "lora_path": AdapterField("SGLang"),
        "lora_name": AdapterField("vLLM's administration, Triton's vLLM backend"),
        "lora_modules": AdapterField("vLLM's start option"),
        "active_adapter": AdapterField("peft"),
        "active_adapters": AdapterField("peft"),
        "adapter_names": AdapterField("peft's generate"),
        "adapter_ids": _NEAR,
        "adapter_model": _NEAR,
        "lora_adapter": _NEAR,
        "lora_adapters": _NEAR,
        "lora_id": _NEAR,
        "lora_ids": _NEAR,
        "lora_model": _NEAR,
        "lora_model_id": _NEAR,
        "lora_names": _NEAR,
        "lora_paths": _NEAR,
        "loras": _NEAR,
        "peft": _NEAR,
        "peft_model": _NEAR,
        "peft_model_id": _NEAR,
        "lora_request": AdapterField("vLLM's LLM.generate", names_one=False),
        "lora_int_id": AdapterField("vLLM's LoRARequest", names_one=False),
        "lora_local_path": AdapterField("vLLM's LoRARequest", names_one=False),
        "lora_task_id": AdapterField("TensorRT-LLM", names_one=False),
        "lora_config": AdapterField("TensorRT-LLM", names_one=False),
        "merged_adapters": AdapterField("LoRAX", names_one=False),
        "lora_weights": AdapterField("TensorRT-LLM", names_one=False, neutral=_WEIGHT),
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
    row = _BY_SQUEEZED.get(squeezed(name), AdapterField("", names_one=False))
    if is_neutral(value, EMPTY + row.neutral):
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
