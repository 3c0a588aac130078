"""The fields by which clients say who answers, wherever they put them: honoured, or refused by name. Never ignored:
an answer of the base to who asked for an adapter looks like any other answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from truffula.errors import InvalidRequest

# On /v1/, beside ``model``: SGLang's and LoRAX's word, and what people write after vLLM's and peft's.
SPELLINGS = ("lora_path", "adapter_id", "lora_name", "lora_adapter")
# Beside native ``inputs``: field → the parameter that is meant.
BESIDE_INPUTS: Mapping[str, str] = MappingProxyType(
    {**dict.fromkeys(SPELLINGS, "adapter_id"), "adapter_source": "adapter_source"}
)
# On /v1/ every field is at the top; these hold some for other servers and for clients of ours.
HOLDERS = ("parameters", "extra_body")


def other_name(body: object) -> tuple[str, str] | None:
    """The field and the name of an adapter said beside ``model``; twins that differ are refused."""
    found = [(field, value) for field in SPELLINGS if (value := getattr(body, field))]
    for field, value in found[1:]:
        if value != found[0][1]:
            raise InvalidRequest(f"{found[0][0]} and {field} mean the same and differ; give one of them.", param=field)
    return found[0] if found else None


def refuse_held(extra: Mapping[str, Any]) -> None:
    """On ``/v1/``: raises ``InvalidRequest`` for an adapter named inside an object that has no effect here."""
    for holder in HOLDERS:
        inner = extra.get(holder)
        if not isinstance(inner, dict):
            continue
        for field in ("model", "lora_request", *BESIDE_INPUTS):
            if inner.get(field):
                place = f"{holder}.{field}"
                raise InvalidRequest(f"{place} has no effect on /v1/; name the adapter in model.", param=place)


def refuse_misplaced(extra: Mapping[str, Any], models: Collection[str | None], base_names: Collection[str]) -> None:
    """On the native side: raises ``InvalidRequest`` for an adapter named anywhere but in ``parameters.adapter_id``.

    ``extra`` are the keys beside ``inputs``, ``models`` what was said as ``model``, which may be a name of the base.
    """
    for field, meant in BESIDE_INPUTS.items():
        value = extra.get(field)
        if value and value not in base_names:
            raise InvalidRequest(
                f"{field} has no effect beside inputs; say who answers in parameters.{meant}.", param=field
            )
    for model in models:
        if model and model not in base_names:
            raise InvalidRequest(
                f"model is {model[:80]!r}, no name of the base, and nothing else can be said in it on this route; "
                "name an adapter in parameters.adapter_id.",
                param="model",
            )
