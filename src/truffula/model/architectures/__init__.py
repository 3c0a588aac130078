"""One short function per architecture, from a config to a ``ModelSpec``. To add one: docs/adding-an-architecture.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from truffula.model.architectures.deepseek import (
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    glm4_moe_lite,
    glm_moe_dsa,
    kimi_k25,
    youtu,
)
from truffula.model.architectures.gemma import gemma2, gemma3, gemma3_text
from truffula.model.architectures.llama import llama
from truffula.model.architectures.mistral import mistral
from truffula.model.architectures.mixtral import mixtral
from truffula.model.architectures.qwen import qwen2, qwen3
from truffula.model.architectures.qwen_moe import qwen3_moe
from truffula.model.config_view import ConfigView
from truffula.model.spec import ModelSpec

ARCHITECTURES: Mapping[str, Callable[[ConfigView], ModelSpec]] = MappingProxyType(
    {
        "deepseek_v2": deepseek_v2,
        "deepseek_v3": deepseek_v3,
        "deepseek_v32": deepseek_v32,
        "gemma2": gemma2,
        "gemma3": gemma3,
        "gemma3_text": gemma3_text,
        "glm4_moe_lite": glm4_moe_lite,
        "glm_moe_dsa": glm_moe_dsa,
        "kimi_k2": deepseek_v3,
        "kimi_k25": kimi_k25,
        "llama": llama,
        "ministral": mistral,
        "mistral": mistral,
        "mixtral": mixtral,
        "qwen2": qwen2,
        "qwen3": qwen3,
        "qwen3_moe": qwen3_moe,
        "youtu": youtu,
    }
)
"""``model_type`` of config.json to the function that reads it."""
