"""A verdict for every field of the methods of PEFT other than LoRA, by ``peft_type``. Imports nothing heavy: a server
checks configurations with it. The methods themselves are in ``lora/methods``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

import msgspec

from truffula.lora.fields import FIELDS, LORA, Alpha, Field, FieldTable, Rank, check_fields, is_empty
from truffula.lora.refused import refuse_method
from truffula.lora.roots import other_part

_Id = Annotated[int, msgspec.Meta(ge=0)]
_Names = str | list[str] | None


def _lora(*names: str) -> dict[str, Field]:
    """Fields that are treated as those of LoRA."""
    return {name: FIELDS[name] for name in names}


def _no_text_modules(value: Any) -> bool:
    """Nothing, or image and audio parts, which text does not pass through."""
    return is_empty(value) or all(isinstance(name, str) and other_part(f"{name}.") is not None for name in value)


def _for_training(*names: str) -> dict[str, Field]:
    return dict.fromkeys(names, Field("ignore", "affects only training"))


def _no_bias(own: str) -> Field:
    """``bias`` of a method whose own value for trained biases is ``own``."""
    note = f"trained biases ('all', '{own}') beside this method; train with bias='none'"
    return Field("refuse", note, harmless=lambda value: is_empty(value) or value == "none")


COMMON = {
    "peft_type": Field("check", "the method"),
    **_lora("task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
}
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_SAVED = Field("refuse", "fully trained modules beside this method; train without it", harmless=_no_text_modules)

_ADALORA = {
    **_lora(*TARGETS),
    "lora_alpha": Field("serve", "scale is lora_alpha / (init_r + 1e-5)", Alpha),
    "init_r": Field("serve", "divides the scale; rank of modules without an entry in rank_pattern", Rank),
    "rank_pattern": Field("check", "must name the ranks that the tensors have", dict[str, list[bool]] | None),
    "r": Field("ignore", "AdaLoRA's rank is init_r"),
    "use_rslora": Field("ignore", "PEFT's AdaLoRA has no such scale"),
    "alpha_pattern": Field("ignore", "PEFT's AdaLoRA has one lora_alpha"),
    **_for_training(
        "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
        "init_lora_weights", "qalora_group_size",
    ),
    **_lora(
        "lora_dropout", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        "runtime_config", "velora_config", "monteclora_config", "megatron_core",
    ),
    "bias": _no_bias("lora_only"),
    **dict.fromkeys(
        (
            "lora_bias", "modules_to_save", "use_dora", "trainable_token_indices", "target_parameters",
            "ensure_weight_tying", "layer_replication", "alora_invocation_tokens", "use_qalora", "kasa_config",
            "use_bdlora", "arrow_config", "megatron_config",
        ),
        Field("refuse", "not with AdaLoRA; train LoRA, or without it"),
    ),
}  # fmt: skip
_VERA = {
    **_lora("target_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    "r": Field("check", "must be the rank of the projections", Rank),
    "save_projection": Field("check", "the projections must be in the file"),
    "projection_prng_key": Field("ignore", "the projections are read from the file"),
    **_for_training("vera_dropout", "d_initial", "init_weights"),
    "bias": _no_bias("vera_only"),
    "modules_to_save": _SAVED,
}
_IA3 = {
    **_lora("target_modules", "exclude_modules", "fan_in_fan_out"),
    "feedforward_modules": Field("check", "must name exactly the modules whose vectors scale the input", _Names),
    "modules_to_save": _SAVED,
    **_for_training("init_ia3_weights"),
}
_LOHA = {
    **_lora(*TARGETS, "rank_pattern", "alpha_pattern"),
    "r": Field("serve", "rank of modules without an entry in rank_pattern", Rank),
    "alpha": Field("serve", "scale is alpha / r", Alpha),
    "modules_to_save": _SAVED,
    "use_effective_conv2d": Field("ignore", "concerns only convolutions"),
    **_for_training("rank_dropout", "module_dropout", "init_weights"),
}
_LOKR = {
    **_LOHA,
    **dict.fromkeys(("decompose_both", "decompose_factor"), Field("check", "the tensors tell")),
    **_for_training("rank_dropout_scale"),
}
_TOKENS = {
    "token_indices": Field("serve", "rows of the table that are replaced", list[_Id]),
    "target_modules": Field("check", "must name the tables that have rows", _Names),
    **_for_training("init_weights"),
}
_NORMS = {**_lora("target_modules", "exclude_modules"), "modules_to_save": _SAVED}
_VIRTUAL = {
    "num_virtual_tokens": Field("serve", "tokens before every prompt; they count in its length, not in usage", int),
    "num_transformer_submodules": Field("check", "must be 1: a decoder alone", int | None),
    "token_dim": Field("check", "must be the width of the embedding", int | None),
    **dict.fromkeys(("num_attention_heads", "num_layers"), Field("ignore", "only prefix tuning depends on it")),
    "modules_to_save": _SAVED,
}
_ENCODED = ("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")
_PREFIX = {
    **_VIRTUAL,
    "token_dim": Field("check", "must be the width of a layer's keys", int),
    "num_attention_heads": Field("check", "must be the number of a layer's key heads", int),
    "num_layers": Field("check", "must be the number of layers", int),
    "prefix_projection": Field("ignore", "the file has what the projection computed"),
    "encoder_hidden_size": Field("ignore", "the width inside the projection"),
    **_for_training("init_weights"),
}

TABLES: Mapping[str, FieldTable] = MappingProxyType(
    {
        method: FieldTable(COMMON | fields, required)
        for method, fields, required in (
            ("ADALORA", _ADALORA, ("lora_alpha", "init_r")),
            ("IA3", _IA3, ()),
            ("LN_TUNING", _NORMS, ()),
            ("LOHA", _LOHA, ("r", "alpha")),
            ("LOKR", _LOKR, ("r", "alpha")),
            ("PREFIX_TUNING", _PREFIX, ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers")),
            (
                "PROMPT_TUNING",
                _VIRTUAL
                | _for_training(
                    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"
                ),
                ("num_virtual_tokens",),
            ),
            (
                "P_TUNING",
                _VIRTUAL | dict.fromkeys(_ENCODED, Field("ignore", "the file has what the encoder computed")),
                ("num_virtual_tokens",),
            ),
            ("TRAINABLE_TOKENS", _TOKENS, ("token_indices",)),
            ("VERA", _VERA, ("r",)),
        )
    }
)
"""The served methods without LORA."""


def table_of(config: Mapping[str, Any]) -> FieldTable:
    """The fields of a configuration's method. Raises ``AdapterError`` for one that is not served."""
    kind = config.get("peft_type")
    if kind is None or kind == "LORA":
        return LORA
    table = TABLES.get(kind) if isinstance(kind, str) else None
    if table is None:
        raise refuse_method(str(kind)[:60], ["LORA", *TABLES])
    return table


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ``AdapterError`` for a method or a field that is not served."""
    check_fields(config, table_of(config))
