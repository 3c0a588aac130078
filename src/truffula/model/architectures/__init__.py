"""One short function per architecture, from a config to a ``ModelSpec``. To add one: docs/adding-an-architecture.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from truffula.model.architectures.gemma import gemma, gemma2, gemma3, gemma3_text
from truffula.model.architectures.llama import arcee, cwm, granite, llama, seed_oss, smollm3
from truffula.model.architectures.mistral import ministral3, mistral, mistral3
from truffula.model.architectures.qwen import qwen2, qwen3
from truffula.model.config_view import ConfigView
from truffula.model.spec import ModelSpec

ARCHITECTURES: Mapping[str, Callable[[ConfigView], ModelSpec]] = MappingProxyType(
    {
        "arcee": arcee,
        "cwm": cwm,
        "gemma": gemma,
        "gemma2": gemma2,
        "gemma3": gemma3,
        "gemma3_text": gemma3_text,
        "granite": granite,
        "llama": llama,
        "ministral": mistral,
        "ministral3": ministral3,
        "mistral": mistral,
        "mistral3": mistral3,
        "qwen2": qwen2,
        "qwen3": qwen3,
        "seed_oss": seed_oss,
        "smollm3": smollm3,
    }
)
"""``model_type`` of config.json to the function that reads it."""
