"""Write src/truffula/model/config_defaults.json: the fields and defaults of transformers' configuration classes.

    python scripts/generate_config_defaults.py            rewrite the table from the installed transformers
    python scripts/generate_config_defaults.py --check    exit 1 when the table differs from it

A config.json may leave out what equals the class default, and defaults differ between classes (gemma's head_dim is 256,
qwen2's kv heads are 32 whatever its heads are): they must come from the class, not from us.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[1] / "src" / "truffula" / "model" / "config_defaults.json"
MODEL_TYPES = (
    "afmoe",
    "apertus",
    "arcee",
    "bamba",
    "bloom",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "cwm",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "falcon",
    "falcon_h1",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma4",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "helium",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "jamba",
    "kimi_k25",
    "kimi_linear",
    "laguna",
    "lfm2",
    "lfm2_moe",
    "llama",
    "llama4",
    "llama4_text",
    "minimax_m2",
    "ministral",
    "ministral3",
    "mistral",
    "mistral3",
    "mistral4",
    "mixtral",
    "mpt",
    "muse_glimmer",
    "muse_glimmer_text",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "opt",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "youtu",
)
# Types of hub files that transformers reads with the class of another type.
SAME_CLASS = {"kimi_k2": "deepseek_v3"}

# Keys that the classes take although they are no fields: older spellings and what is popped while a config is read.
LEGACY = (
    "attn_implementation",
    "experts_implementation",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "partial_rotary_factor",
    "per_layer_config",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
)
LEGACY_OF = {
    "cohere2_moe": ("first_k_dense_replace",),
    "cohere2": ("sliding_window_pattern",),
    "gemma3_text": ("rope_local_base_freq", "sliding_window_pattern"),
    "gemma4_text": ("global_head_dim", "num_global_key_value_heads"),
    "gemma4_unified_text": ("global_head_dim", "num_global_key_value_heads"),
    "gpt_neo": ("attention_layers",),
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "kimi_linear": ("first_k_dense_replace", "linear_attn_config"),
    "lfm2": ("block_ff_dim", "tie_embedding"),
    "lfm2_moe": ("tie_embedding",),
    "nemotron_h": (
        *("hybrid_override_pattern", "mtp_hybrid_override_pattern", "num_hidden_layers", "mamba_n_groups"),
        *("mamba_d_conv", "mamba_expand", "mamba_dt_min", "mamba_dt_max", "mamba_dt_limit", "mamba_dt_init_floor"),
        *("mamba_conv_bias", "mamba_chunk_size"),
    ),
    "qwen3_5_moe_text": ("full_attention_interval",),
    "qwen3_5_text": ("full_attention_interval",),
    "qwen3_next": ("full_attention_interval",),
}
# Other names of fields, besides those of the class's attribute_map.
ALIASES_OF = {"bloom": {"n_embed": "hidden_size"}, "falcon": {"n_embed": "hidden_size"}}


def table() -> dict[str, Any]:
    """The table as plain data, from the installed transformers."""
    from transformers import GenerationConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    types = {}
    for model_type in MODEL_TYPES:
        cls = CONFIG_MAPPING[model_type]
        fields, nullable = {}, []
        for field in dataclasses.fields(cls):
            if field.default_factory is not dataclasses.MISSING:
                fields[field.name] = field.default_factory()
            else:
                fields[field.name] = None if field.default is dataclasses.MISSING else field.default
            if "None" in str(field.type) or "Optional" in str(field.type):
                nullable.append(field.name)
        # Defaults that a class sets only when an instance is made.
        made = cls()
        rope = getattr(made, "rope_parameters", None) or {}
        kinds = [each.get("rope_type", "default") for each in (rope, *rope.values()) if isinstance(each, dict)]
        if set(kinds) != {"default"}:
            fields["rope_parameters"] = {key: rope[key] for key in rope if key != "partial_rotary_factor"}
        if fields.get("eos_token_id", 0) is None:
            fields["eos_token_id"] = made.eos_token_id
        text = cls.sub_configs_defaults.get("text_config")
        if text is not None and text.init_kwargs:
            fields["text_config"] = text.init_kwargs
        types[model_type] = {
            "class": cls.__name__,
            "partial_rotary_factor": rope.get("partial_rotary_factor"),
            "rope_theta": getattr(cls, "default_theta", None),
            "fields": dict(sorted(fields.items())),
            "nullable": sorted(nullable),
            "legacy": sorted((*LEGACY, *LEGACY_OF.get(model_type, ()))),
            "aliases": dict(sorted({**cls.attribute_map, **ALIASES_OF.get(model_type, {})}.items())),
        }
    types |= {name: types[of] for name, of in SAME_CLASS.items()}
    generation = sorted(GenerationConfig._get_default_generation_params())
    return {"generation": generation, "types": types}


def render(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1, sort_keys=True) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = render(table())
    if arguments.check:
        same = TABLE.read_text() == text
        print(
            "config_defaults.json is " + ("as generated" if same else "stale: run scripts/generate_config_defaults.py")
        )
        return 0 if same else 1
    TABLE.write_text(text)
    print(f"wrote {TABLE.name}: {len(MODEL_TYPES)} model types")
    return 0


if __name__ == "__main__":
    sys.exit(main())
