"""One short function per architecture, from a config to a ``ModelSpec``. To add one: docs/adding-an-architecture.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from truffula.model.architectures.alibi import bloom, falcon, mpt
from truffula.model.architectures.cohere import cohere, cohere2, cohere2_moe
from truffula.model.architectures.dbrx import dbrx
from truffula.model.architectures.deepseek import (
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    glm4_moe_lite,
    glm_moe_dsa,
    kimi_k25,
    mistral4,
    youtu,
)
from truffula.model.architectures.gemma import gemma, gemma2, gemma3, gemma3_text
from truffula.model.architectures.gemma4 import gemma4, gemma4_text
from truffula.model.architectures.glm import glm, glm4
from truffula.model.architectures.gpt import gpt2, gpt_bigcode, gpt_neo, gpt_neox, gptj
from truffula.model.architectures.gpt_oss import gpt_oss
from truffula.model.architectures.jamba import jamba
from truffula.model.architectures.kimi_linear import kimi_linear
from truffula.model.architectures.laguna import laguna
from truffula.model.architectures.lfm2 import lfm2, lfm2_moe
from truffula.model.architectures.llama import arcee, cwm, granite, llama, seed_oss, smollm3
from truffula.model.architectures.llama4 import llama4, llama4_text
from truffula.model.architectures.mamba_hybrid import bamba, falcon_h1, granitemoehybrid
from truffula.model.architectures.mistral import ministral3, mistral, mistral3
from truffula.model.architectures.mixtral import mixtral
from truffula.model.architectures.muse_glimmer import muse_glimmer
from truffula.model.architectures.nemotron_h import nemotron_h
from truffula.model.architectures.olmo import olmo, olmo2, olmo3
from truffula.model.architectures.olmo_hybrid import olmo_hybrid
from truffula.model.architectures.opt import opt
from truffula.model.architectures.phi import phi, phi3
from truffula.model.architectures.qwen import qwen2, qwen3
from truffula.model.architectures.qwen_hybrid import qwen3_5, qwen3_5_moe, qwen3_5_moe_text, qwen3_5_text, qwen3_next
from truffula.model.architectures.qwen_moe import qwen2_moe, qwen3_moe
from truffula.model.architectures.sigmoid_moe import afmoe, dots1, ernie4_5_moe, exaone_moe, glm4_moe, minimax_m2
from truffula.model.architectures.softmax_moe import granitemoe, hunyuan_v1_moe, olmoe, phimoe
from truffula.model.architectures.starcoder import starcoder2
from truffula.model.architectures.variants import (
    apertus,
    ernie4_5,
    exaone4,
    helium,
    hunyuan_v1_dense,
    nemotron,
    stablelm,
)
from truffula.model.config_view import ConfigView
from truffula.model.spec import ModelSpec

ARCHITECTURES: Mapping[str, Callable[[ConfigView], ModelSpec]] = MappingProxyType(
    {
        "afmoe": afmoe,
        "apertus": apertus,
        "arcee": arcee,
        "bloom": bloom,
        "bamba": bamba,
        "cohere": cohere,
        "cohere2": cohere2,
        "cohere2_moe": cohere2_moe,
        "cwm": cwm,
        "dbrx": dbrx,
        "deepseek_v2": deepseek_v2,
        "deepseek_v3": deepseek_v3,
        "deepseek_v32": deepseek_v32,
        "dots1": dots1,
        "ernie4_5": ernie4_5,
        "ernie4_5_moe": ernie4_5_moe,
        "exaone4": exaone4,
        "falcon": falcon,
        "falcon_h1": falcon_h1,
        "exaone_moe": exaone_moe,
        "gemma": gemma,
        "gemma2": gemma2,
        "gemma3": gemma3,
        "gemma3_text": gemma3_text,
        "gemma4": gemma4,
        "gemma4_text": gemma4_text,
        "gemma4_unified": gemma4,
        "gemma4_unified_text": gemma4_text,
        "glm": glm,
        "glm4": glm4,
        "glm4_moe_lite": glm4_moe_lite,
        "glm_moe_dsa": glm_moe_dsa,
        "gpt2": gpt2,
        "gpt_bigcode": gpt_bigcode,
        "gpt_neo": gpt_neo,
        "gpt_neox": gpt_neox,
        "gptj": gptj,
        "granite": granite,
        "granitemoehybrid": granitemoehybrid,
        "helium": helium,
        "hunyuan_v1_dense": hunyuan_v1_dense,
        "jamba": jamba,
        "kimi_k2": deepseek_v3,
        "kimi_k25": kimi_k25,
        "kimi_linear": kimi_linear,
        "laguna": laguna,
        "lfm2": lfm2,
        "lfm2_moe": lfm2_moe,
        "glm4_moe": glm4_moe,
        "gpt_oss": gpt_oss,
        "granitemoe": granitemoe,
        "granitemoeshared": granitemoe,
        "hunyuan_v1_moe": hunyuan_v1_moe,
        "llama": llama,
        "llama4": llama4,
        "llama4_text": llama4_text,
        "minimax_m2": minimax_m2,
        "ministral": mistral,
        "ministral3": ministral3,
        "mistral": mistral,
        "mistral3": mistral3,
        "mistral4": mistral4,
        "mixtral": mixtral,
        "mpt": mpt,
        "muse_glimmer": muse_glimmer,
        "nemotron": nemotron,
        "nemotron_h": nemotron_h,
        "olmo": olmo,
        "olmo2": olmo2,
        "olmo3": olmo3,
        "olmo_hybrid": olmo_hybrid,
        "opt": opt,
        "phi": phi,
        "phi3": phi3,
        "olmoe": olmoe,
        "phimoe": phimoe,
        "qwen2": qwen2,
        "qwen2_moe": qwen2_moe,
        "qwen3": qwen3,
        "qwen3_5": qwen3_5,
        "qwen3_5_moe": qwen3_5_moe,
        "qwen3_5_moe_text": qwen3_5_moe_text,
        "qwen3_5_text": qwen3_5_text,
        "qwen3_next": qwen3_next,
        "qwen3_moe": qwen3_moe,
        "seed_oss": seed_oss,
        "smollm3": smollm3,
        "stablelm": stablelm,
        "starcoder2": starcoder2,
        "youtu": youtu,
    }
)
"""``model_type`` of config.json to the function that reads it."""
