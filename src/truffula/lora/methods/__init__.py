"""Methods of PEFT other than LoRA: each ``peft_type`` is converted to parts exactly, or refused by name.

A module here is one family. ``METHODS`` are those that are served; ``refused.py`` has the reasons for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from truffula.lora.fields import LORA, FieldTable, check_fields
from truffula.lora.methods.adalora import ADALORA
from truffula.lora.methods.ia3 import IA3
from truffula.lora.methods.lycoris import LOHA, LOKR
from truffula.lora.methods.method import Metadata as Metadata
from truffula.lora.methods.method import Method
from truffula.lora.methods.norms import LN_TUNING
from truffula.lora.methods.prefix import PREFIX_TUNING
from truffula.lora.methods.prompts import P_TUNING, PROMPT_TUNING
from truffula.lora.methods.refused import refuse_method
from truffula.lora.methods.tokens import TRAINABLE_TOKENS
from truffula.lora.methods.vera import VERA

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "ADALORA": ADALORA,
        "IA3": IA3,
        "LN_TUNING": LN_TUNING,
        "LOHA": LOHA,
        "LOKR": LOKR,
        "PREFIX_TUNING": PREFIX_TUNING,
        "PROMPT_TUNING": PROMPT_TUNING,
        "P_TUNING": P_TUNING,
        "TRAINABLE_TOKENS": TRAINABLE_TOKENS,
        "VERA": VERA,
    }
)
"""The served ones by ``peft_type``, without LORA."""


def method_of(config: Mapping[str, Any]) -> Method | None:
    """The method of a configuration; None: LoRA. Raises ``AdapterError`` for one that is not served."""
    kind = config.get("peft_type")
    if kind is None or kind == "LORA":
        return None
    method = METHODS.get(kind) if isinstance(kind, str) else None
    if method is None:
        raise refuse_method(str(kind)[:60], ["LORA", *METHODS])
    return method


def table_of(config: Mapping[str, Any]) -> FieldTable:
    """The fields of a configuration's method. Raises ``AdapterError`` for one that is not served."""
    method = method_of(config)
    return LORA if method is None else method.table


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ``AdapterError`` for a method or a field that is not served."""
    check_fields(config, table_of(config))
