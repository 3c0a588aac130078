"""Methods of PEFT other than LoRA: each ``peft_type`` is converted to parts exactly, or refused by name.

A module here is one family. ``METHODS`` are those that are served; ``refused.py`` has the reasons for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from truffula.lora.methods.adalora import ADALORA
from truffula.lora.methods.ia3 import IA3
from truffula.lora.methods.lycoris import LOHA, LOKR
from truffula.lora.methods.method import Method
from truffula.lora.methods.prompts import P_TUNING, PROMPT_TUNING
from truffula.lora.methods.vera import VERA

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "ADALORA": ADALORA,
        "IA3": IA3,
        "LOHA": LOHA,
        "LOKR": LOKR,
        "PROMPT_TUNING": PROMPT_TUNING,
        "P_TUNING": P_TUNING,
        "VERA": VERA,
    }
)
"""The served ones by ``peft_type``, but LORA."""
