"""GGUF families with layers that keep a state instead of keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.weights.gguf_changes import (
    CONV,
    INTERLEAVED,
    LESS_ONE,
    ONE_ROW,
    STACKED,
    Change,
    Config,
    Order,
    flat,
    grouped,
    joined,
    less_one,
    log_of_minus,
)
from truffula.weights.gguf_experts import SIGMOID, routed, score, without_predictors
from truffula.weights.gguf_families import (
    EXPERTS_BLOCK,
    GRANITE_EXPERTS,
    LLAMA_BLOCK,
    SHARED_EXPERT,
    Family,
    granite,
    implied_head_dim,
    partly_rotated,
)
from truffula.weights.gguf_header import GgufHeader
from truffula.weights.gguf_hparams import HParams

_LFM2_BLOCK = {
    "attn_norm": "operator_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
_LFM2_MOE_BLOCK = {
    **_LFM2_BLOCK,
    "ffn_gate_inp": "feed_forward.gate",
    "ffn_gate_exps": "feed_forward.experts.w1",
    "ffn_up_exps": "feed_forward.experts.w3",
    "ffn_down_exps": "feed_forward.experts.w2",
}
_LINEAR = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LINEAR_WHOLE = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
_QWEN35_BLOCK = {
    **_LINEAR,
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
}
# Older files have all of in_proj_qkvz as ssm_in.
_QWEN3_NEXT_BLOCK = {
    **_LINEAR,
    **EXPERTS_BLOCK,
    **SHARED_EXPERT,
    "ssm_in": "linear_attn.in_proj_qkvz",
    "attn_qkv": "linear_attn.in_proj_qkvz",
    "attn_gate": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
}
_SSM = {"ssm_in": "in_proj", "ssm_out": "out_proj", "ssm_conv1d": "conv1d"}
_BAMBA_BLOCK = {
    **LLAMA_BLOCK,
    **{name: f"mamba.{module}" for name, module in _SSM.items()},
    "ssm_norm": "mamba.norm",
    "ffn_norm": "pre_ff_layernorm",
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
}
_JAMBA_BLOCK = {
    **_BAMBA_BLOCK,
    "ssm_x": "mamba.x_proj",
    "ssm_dt": "mamba.dt_proj",
    "ssm_dt_norm": "mamba.dt_layernorm",
    "ssm_b_norm": "mamba.b_layernorm",
    "ssm_c_norm": "mamba.c_layernorm",
    "ffn_gate_inp": "feed_forward.router",
    "ffn_gate_exps": "feed_forward.experts.gate_proj",
    "ffn_up_exps": "feed_forward.experts.up_proj",
    "ffn_down_exps": "feed_forward.experts.down_proj",
}
# The shared expert is called so only where there are others.
_GRANITE_BLOCK = {
    **_BAMBA_BLOCK,
    **GRANITE_EXPERTS,
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "shared_mlp.input_linear",
    "ffn_up": "shared_mlp.input_linear",
    "ffn_down": "shared_mlp.output_linear",
}
_NEMOTRON_BLOCK = {
    "attn_norm": "norm",
    **{f"attn_{name}": f"mixer.{name}_proj" for name in "qkv"},
    "attn_output": "mixer.o_proj",
    **{name: f"mixer.{module}" for name, module in _SSM.items()},
    "ssm_norm": "mixer.norm",
    "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj",
    "ffn_gate_inp": "mixer.gate",
    "ffn_up_exps": "mixer.experts.up_proj",
    "ffn_down_exps": "mixer.experts.down_proj",
    "ffn_up_shexp": "mixer.shared_experts.up_proj",
    "ffn_down_shexp": "mixer.shared_experts.down_proj",
    "ffn_latent_down": "mixer.fc1_latent_proj",
    "ffn_latent_up": "mixer.fc2_latent_proj",
}


# Orders of rows. llama.cpp stores the value heads of Qwen3.5 so that those of one key head are far from each other.


def _value_heads(config: Config, n: int) -> Order:
    keys = config["linear_num_key_heads"]
    return grouped(keys, config["linear_num_value_heads"] // keys)


def _of_values(config: Config, n: int) -> Order:
    """Of q, k and v, of which the heads of v are in another order."""
    before, width = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"], config["linear_value_head_dim"]
    heads = _value_heads(config, n)[:, None] * width + np.arange(width)
    return np.concatenate([np.arange(before), before + heads.reshape(-1)])


def _by_key_head(config: Config, n: int) -> Order:
    """q, k, v and the gate of a key head together, of rows stored as the gate, q, k and v of all."""
    keys, dim = config["linear_num_key_heads"], config["linear_key_head_dim"]
    share = config["linear_num_value_heads"] // keys * config["linear_value_head_dim"]
    starts = (keys * share, dim), (keys * (share + dim), dim), (keys * (share + 2 * dim), share), (0, share)
    return np.concatenate([start + np.arange(keys * width).reshape(keys, -1) for start, width in starts], 1).reshape(-1)


_RATE = Change(values=log_of_minus)
_DELTA_NORMS = {name: LESS_ONE for name in less_one(_LINEAR) if not name.startswith("linear_attn.norm")}
_QWEN35_CHANGES = {
    **_DELTA_NORMS,
    "mlp.shared_expert_gate": ONE_ROW,
    "linear_attn.conv1d": replace(CONV, rows=_of_values),
    "linear_attn.in_proj_qkv": Change(rows=_of_values),
    **{f"linear_attn.{name}": Change(rows=_value_heads) for name in ("in_proj_z", "in_proj_a", "in_proj_b", "dt_bias")},
    "linear_attn.A_log": replace(_RATE, rows=_value_heads),
    "linear_attn.out_proj": Change(columns=_value_heads),
}
_QWEN3_NEXT_CHANGES = {
    **_DELTA_NORMS,
    "mlp.shared_expert_gate": ONE_ROW,
    "linear_attn.conv1d": CONV,
    "linear_attn.in_proj_qkvz": joined(_by_key_head),
    "linear_attn.A_log": _RATE,
}


def _mamba_changes(module: str) -> dict[str, Change]:
    """Of Mamba-2, whose vectors are stored as matrices."""
    return {
        f"{module}.conv1d": CONV,
        f"{module}.A_log": flat(log_of_minus),
        f"{module}.D": flat(),
        f"{module}.norm": flat(),
    }


def _mamba_whole(module: str) -> dict[str, str]:
    return {"ssm_a": f"{module}.A_log", "ssm_d": f"{module}.D", "ssm_dt.bias": f"{module}.dt_bias"}


# Metadata


def _has(hparams: HParams, name: str) -> bool:
    """Whether some layer has this tensor."""
    return any(stored.endswith(f".{name}") for stored in hparams.header.tensors)


def _quotient(hparams: HParams, key: str, by: str) -> int:
    whole, count = hparams.count(key), hparams.count(by)
    if whole % count:
        name = hparams.name(by)
        raise CheckpointError(f"{name} is {count}, which does not divide {hparams.name(key)}, {whole}.", param=name)
    return whole // count


def _each(hparams: HParams, key: str, kind: type = int) -> list[Any]:
    """A list with an item for each layer, also for those that predict further tokens."""
    each, layers, name = hparams.get(key), hparams.count("block_count"), hparams.name(key)
    if not isinstance(each, list) or len(each) != layers or any(type(item) is not kind for item in each):
        shown = f"a list of {len(each)}" if isinstance(each, list) else repr(each)
        raise CheckpointError(f"{name} is {shown}; expected a list of {layers} of type {kind.__name__}.", param=name)
    return each


def _attends(hparams: HParams) -> list[bool]:
    """Which layers have KV heads."""
    return [count > 0 for count in _each(hparams, "attention.head_count_kv")]


def _periodic(hparams: HParams, key: str, places: Sequence[bool]) -> tuple[int, int]:
    """(period, offset) of the layers of a kind. Raises ``UnsupportedModel`` for those that are not evenly spaced."""
    found = [index for index, is_one in enumerate(places) if is_one] or [len(places)]
    period = found[1] - found[0] if len(found) > 1 else len(places) + 1
    if [index % period == found[0] for index in range(len(places))] != list(places):
        name = hparams.name(key)
        raise UnsupportedModel(f"{name}: layers {found[:8]} are not one in every few, as jamba has them.", param=name)
    return period, found[0]


def _lfm2(hparams: HParams, config: dict[str, Any]) -> None:
    """Layers without KV heads have a convolution. The width of the MLP is the adjusted one."""
    config["layer_types"] = ["full_attention" if attends else "conv" for attends in _attends(hparams)]
    config["conv_L_cache"] = hparams.count("shortconv.l_cache")
    if config["model_type"] == "lfm2":
        config["block_auto_adjust_ff_dim"] = False
    implied_head_dim(hparams, config)


def _lfm2_moe(hparams: HParams, config: dict[str, Any]) -> None:
    """The weights of a row's experts are divided by their sum."""
    _lfm2(hparams, config)
    score(hparams, (SIGMOID,), SIGMOID)
    config |= {
        "num_dense_layers": hparams.optional("leading_dense_block_count"),
        "num_experts": hparams.count("expert_count"),
        "num_experts_per_tok": hparams.count("expert_used_count"),
        "moe_intermediate_size": hparams.count("expert_feed_forward_length"),
        "routed_scaling_factor": hparams.real("expert_weights_scale", 1.0),
        "norm_topk_prob": True,
        "use_expert_bias": _has(hparams, "exp_probs_b.bias"),
    }


def _qwen35(hparams: HParams, config: dict[str, Any]) -> None:
    """``rope.dimension_sections`` are of images: the three positions of a token of text are equal."""
    hparams.get("rope.dimension_sections")
    without_predictors(hparams, config)
    config |= {
        "linear_num_value_heads": hparams.count("ssm.time_step_rank"),
        "linear_num_key_heads": hparams.count("ssm.group_count"),
        "linear_key_head_dim": hparams.count("ssm.state_size"),
        "linear_value_head_dim": _quotient(hparams, "ssm.inner_size", "ssm.time_step_rank"),
        "linear_conv_kernel_dim": hparams.count("ssm.conv_kernel"),
        "attention_bias": _has(hparams, "attn_q.bias"),
    }
    partly_rotated(hparams, config)
    layers, interval = config["num_hidden_layers"], hparams.count("full_attention_interval", 4)
    recurrent = [(index + 1) % interval != 0 for index in range(layers)]
    if hparams.get("attention.recurrent_layers") is not None:
        recurrent = _each(hparams, "attention.recurrent_layers", bool)[:layers]
    config["layer_types"] = ["linear_attention" if found else "full_attention" for found in recurrent]


def _qwen35_moe(hparams: HParams, config: dict[str, Any]) -> None:
    """llama.cpp divides the weights of the chosen experts by their sum: the format has no key for it here."""
    _qwen35(hparams, config)
    config |= {
        "num_experts": hparams.count("expert_count"),
        "num_experts_per_tok": hparams.count("expert_used_count"),
        "moe_intermediate_size": hparams.count("expert_feed_forward_length"),
        "shared_expert_intermediate_size": hparams.count("expert_shared_feed_forward_length"),
    }
    if config["model_type"] == "qwen3_next":
        config["norm_topk_prob"] = True


def _mamba2(hparams: HParams, config: dict[str, Any]) -> None:
    """The keys of Bamba's class, which others took."""
    config |= {
        "mamba_n_heads": hparams.count("ssm.time_step_rank"),
        "mamba_d_head": _quotient(hparams, "ssm.inner_size", "ssm.time_step_rank"),
        "mamba_n_groups": hparams.count("ssm.group_count"),
        "mamba_d_state": hparams.count("ssm.state_size"),
        "mamba_d_conv": hparams.count("ssm.conv_kernel"),
        "mamba_proj_bias": _has(hparams, "ssm_in.bias"),
        "mamba_conv_bias": _has(hparams, "ssm_conv1d.bias"),
        "attention_bias": _has(hparams, "attn_q.bias"),
    }


def _granite_hybrid(hparams: HParams, config: dict[str, Any]) -> None:
    """Attention without positions."""
    granite(hparams, config)
    _mamba2(hparams, config)
    hparams.count("rope.dimension_count", config.pop("head_dim", 1))
    config |= {
        "layer_types": ["full_attention" if attends else "linear_attention" for attends in _attends(hparams)],
        "mamba_expand": _quotient(hparams, "ssm.inner_size", "embedding_length"),
        "num_local_experts": hparams.optional("expert_count"),
        "num_experts_per_tok": hparams.optional("expert_used_count"),
        "shared_intermediate_size": hparams.count("expert_shared_feed_forward_length"),
        "position_embedding_type": "nope",
    }


def _bamba(hparams: HParams, config: dict[str, Any]) -> None:
    """Half of each head is rotated."""
    _mamba2(hparams, config)
    rotated, width = hparams.count("rope.dimension_count"), config["head_dim"]
    if 2 * rotated != width:
        name = hparams.name("rope.dimension_count")
        raise UnsupportedModel(f"{name} is {rotated}; bamba rotates half of its heads, {width} wide.", param=name)
    config["attn_layer_indices"] = [index for index, attends in enumerate(_attends(hparams)) if attends]
    config["mamba_expand"] = _quotient(hparams, "ssm.inner_size", "embedding_length")
    config["mlp_bias"] = _has(hparams, "ffn_up.bias")
    implied_head_dim(hparams, config)


def _falcon_h1(hparams: HParams, config: dict[str, Any]) -> None:
    """The multipliers are in the weights. llama.cpp's norm comes after the gate."""
    _mamba2(hparams, config)
    ones = ("attention_in", "attention_out", "embedding", "key", "lm_head", "ssm_in", "ssm_out")
    config |= {
        **{f"{name}_multiplier": 1.0 for name in ones},
        "mlp_multipliers": [1.0] * 2,
        "ssm_multipliers": [1.0] * 5,
        "mamba_d_ssm": hparams.count("ssm.inner_size"),
        "mamba_norm_before_gate": False,
        "mamba_rms_norm": _has(hparams, "ssm_norm.weight"),
        "mlp_bias": _has(hparams, "ffn_up.bias"),
        "projectors_bias": _has(hparams, "ssm_out.bias"),
    }


def _jamba(hparams: HParams, config: dict[str, Any]) -> None:
    """Experts are in the layers that have a router."""
    del config["rope_parameters"]
    routers = [
        f"blk.{index}.ffn_gate_inp.weight" in hparams.header.tensors for index in range(config["num_hidden_layers"])
    ]
    attends, sparse = (
        _periodic(hparams, "attention.head_count_kv", _attends(hparams)),
        _periodic(hparams, "expert_count", routers),
    )
    config |= {
        "attn_layer_period": attends[0], "attn_layer_offset": attends[1],
        "expert_layer_period": sparse[0], "expert_layer_offset": sparse[1],
        "num_experts": hparams.count("expert_count", 1),
        "num_experts_per_tok": hparams.count("expert_used_count", 1),
        "mamba_expand": _quotient(hparams, "ssm.inner_size", "embedding_length"),
        "mamba_dt_rank": hparams.count("ssm.time_step_rank"),
        "mamba_d_state": hparams.count("ssm.state_size"),
        "mamba_d_conv": hparams.count("ssm.conv_kernel"),
        "mamba_proj_bias": _has(hparams, "ssm_in.bias"),
        "mamba_conv_bias": _has(hparams, "ssm_conv1d.bias"),
    }  # fmt: skip
    implied_head_dim(hparams, config)


def _nemotron_h(hparams: HParams, config: dict[str, Any]) -> None:
    """A layer with KV heads is attention, one with a width of feed-forward an MLP or experts, any other Mamba-2."""
    without_predictors(hparams, config)
    hparams.count("rope.dimension_count", 1)
    del config["rope_parameters"]
    if hparams.get("attention.layer_norm_rms_epsilon") is not None:
        config["layer_norm_epsilon"] = hparams.real("attention.layer_norm_rms_epsilon")
    widths = zip(_attends(hparams), _each(hparams, "feed_forward_length"), strict=True)
    kinds = ["full_attention" if attends else "mlp" if width else "linear_attention" for attends, width in widths]
    tensors = hparams.header.tensors
    config |= {
        "layers_block_type": [
            "moe" if kind == "mlp" and f"blk.{index}.ffn_gate_inp.weight" in tensors else kind
            for index, kind in enumerate(kinds[: config["num_hidden_layers"]])
        ],
        "mamba_num_heads": hparams.count("ssm.time_step_rank"),
        "mamba_head_dim": _quotient(hparams, "ssm.inner_size", "ssm.time_step_rank"),
        "n_groups": hparams.count("ssm.group_count"),
        "ssm_state_size": hparams.count("ssm.state_size"),
        "conv_kernel": hparams.count("ssm.conv_kernel"),
        "use_bias": _has(hparams, "ssm_in.bias"),
        "use_conv_bias": _has(hparams, "ssm_conv1d.bias"),
        "mlp_bias": _has(hparams, "ffn_up.bias"),
    }
    if "moe" not in config["layers_block_type"]:
        return
    score(hparams, (SIGMOID,), SIGMOID)
    routed(hparams, config)
    del config["first_k_dense_replace"]
    config["moe_shared_expert_intermediate_size"] = hparams.count("expert_shared_feed_forward_length")
    config["moe_latent_size"] = hparams.optional("moe_latent_size") or None


_NORM_EPS = ("attention.layer_norm_rms_epsilon", "norm_eps")
_LFM2_NORM = {"token_embd_norm.weight": "model.embedding_norm.weight"}
_FINAL_NORM = {"output_norm.weight": "model.final_layernorm.weight"}
_JAMBA_CHANGES = {"mamba.conv1d": CONV, "mamba.A_log": _RATE}
_NEMOTRON = Family(
    "nemotron_h", "NemotronHForCausalLM", _NEMOTRON_BLOCK, _nemotron_h,
    changes={**_mamba_changes("mixer"), "mixer.q_proj": INTERLEAVED["self_attn.q_proj"],
             "mixer.k_proj": INTERLEAVED["self_attn.k_proj"]},
    eps=("attention.layer_norm_epsilon", "layer_norm_epsilon"), partial=True,
    whole={**_mamba_whole("mixer"), "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
           "token_embd.weight": "model.embeddings.weight", "output_norm.weight": "model.norm_f.weight"},
)  # fmt: skip
_BAMBA = Family(
    "bamba", "BambaForCausalLM", _BAMBA_BLOCK, _bamba, changes={**INTERLEAVED, **_mamba_changes("mamba")},
    whole={**_mamba_whole("mamba"), **_FINAL_NORM}, partial=True,
)  # fmt: skip


def _bamba_instead(header: GgufHeader) -> Family | None:
    """A file of granitehybrid is Bamba's where attention has positions, and no scale for scores."""
    rotated = header.metadata.get("granitehybrid.rope.scaling.finetuned", True)
    return _BAMBA if rotated and header.metadata.get("granitehybrid.attention.scale") is None else None


FAMILIES: Mapping[str, Family] = {
    "lfm2": Family("lfm2", "Lfm2ForCausalLM", _LFM2_BLOCK, _lfm2, eps=_NORM_EPS, changes={"conv.conv": CONV},
                   whole=_LFM2_NORM),
    "lfm2moe": Family("lfm2_moe", "Lfm2MoeForCausalLM", _LFM2_MOE_BLOCK, _lfm2_moe, eps=_NORM_EPS,
                      changes={"conv.conv": CONV},
                      whole={**_LFM2_NORM, "exp_probs_b.bias": "feed_forward.expert_bias"}),
    "qwen35": Family("qwen3_5_text", "Qwen3_5ForCausalLM", _QWEN35_BLOCK, _qwen35, changes=_QWEN35_CHANGES,
                     whole=_LINEAR_WHOLE, partial=True, factors=False),
    "qwen35moe": Family("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM",
                        {**_QWEN35_BLOCK, **EXPERTS_BLOCK, **SHARED_EXPERT},
                        _qwen35_moe, changes=_QWEN35_CHANGES, whole=_LINEAR_WHOLE, partial=True, factors=False),
    "qwen3next": Family("qwen3_next", "Qwen3NextForCausalLM", _QWEN3_NEXT_BLOCK, _qwen35_moe,
                        changes=_QWEN3_NEXT_CHANGES, whole=_LINEAR_WHOLE, partial=True, factors=False),
    "granitehybrid": Family("granitemoehybrid", "GraniteMoeHybridForCausalLM", _GRANITE_BLOCK, _granite_hybrid,
                            changes={**INTERLEAVED, **_mamba_changes("mamba"), "shared_mlp.input_linear": STACKED},
                            whole=_mamba_whole("mamba"), partial=True, factors=False, variant=_bamba_instead),
    "falcon-h1": Family("falcon_h1", "FalconH1ForCausalLM", _BAMBA_BLOCK, _falcon_h1, changes=_mamba_changes("mamba"),
                        whole={**_mamba_whole("mamba"), **_FINAL_NORM, "ffn_norm": "pre_ff_layernorm.weight"}),
    "jamba": Family("jamba", "JambaForCausalLM", _JAMBA_BLOCK, _jamba, changes=_JAMBA_CHANGES,
                    whole={**_FINAL_NORM, "ssm_a": "mamba.A_log", "ssm_d": "mamba.D"}),
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON,
}  # fmt: skip
