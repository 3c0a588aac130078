"""Methods of PEFT other than LoRA: each ``peft_type`` is converted to parts exactly, or refused by name.

A module here is one family. ``lora/method_fields.py`` has the fields of each, ``lora/refused.py`` the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from truffula.lora.methods.adalora import ADALORA
from truffula.lora.methods.ia3 import IA3
from truffula.lora.methods.lycoris import LOHA, LOKR
from truffula.lora.methods.method import Metadata as Metadata
from truffula.lora.methods.method import Method
from truffula.lora.methods.norms import LN_TUNING
from truffula.lora.methods.prefix import PREFIX_TUNING
from truffula.lora.methods.prompts import P_TUNING, PROMPT_TUNING
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
