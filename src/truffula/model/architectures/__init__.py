"""One short function per architecture, from a config to a ``ModelSpec``. To add one: docs/adding-an-architecture.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from truffula.model.architectures.alibi import bloom, falcon, mpt
from truffula.model.architectures.gemma import gemma2, gemma3, gemma3_text
from truffula.model.architectures.gpt import gpt2, gpt_bigcode, gpt_neo, gpt_neox, gptj
from truffula.model.architectures.llama import llama
from truffula.model.architectures.mistral import mistral
from truffula.model.architectures.opt import opt
from truffula.model.architectures.phi import phi, phi3
from truffula.model.architectures.qwen import qwen2, qwen3
from truffula.model.architectures.starcoder import starcoder2
from truffula.model.config_view import ConfigView
from truffula.model.spec import ModelSpec

ARCHITECTURES: Mapping[str, Callable[[ConfigView], ModelSpec]] = MappingProxyType(
    {
        "bloom": bloom,
        "falcon": falcon,
        "gemma2": gemma2,
        "gemma3": gemma3,
        "gemma3_text": gemma3_text,
        "gpt2": gpt2,
        "gpt_bigcode": gpt_bigcode,
        "gpt_neo": gpt_neo,
        "gpt_neox": gpt_neox,
        "gptj": gptj,
        "llama": llama,
        "ministral": mistral,
        "mistral": mistral,
        "mpt": mpt,
        "opt": opt,
        "phi": phi,
        "phi3": phi3,
        "qwen2": qwen2,
        "qwen3": qwen3,
        "starcoder2": starcoder2,
    }
)
"""``model_type`` of config.json to the function that reads it."""
