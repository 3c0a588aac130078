"""GGUF families with Mamba: Granite 4, Bamba, Falcon-H1, Jamba and Nemotron-H."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from truffula.weights.gguf.changes import CONV, INTERLEAVED, STACKED, Change, flat, log_of_minus
from truffula.weights.gguf.families import (
    GRANITE_EXPERTS,
    LAYER_NORM,
    LLAMA_BLOCK,
    RMS_NORM,
    SIGMOID,
    Family,
    experts_block,
    granite_scales,
    implied_head_dim,
    routed,
    score,
    without_predictors,
)
from truffula.weights.gguf.header import GgufHeader
from truffula.weights.gguf.hparams import HParams

_SSM = {"ssm_in": "in_proj", "ssm_out": "out_proj", "ssm_conv1d": "conv1d"}
_BAMBA_BLOCK = {
    **LLAMA_BLOCK, **{name: f"mamba.{module}" for name, module in _SSM.items()}, "ssm_norm": "mamba.norm",
    "ffn_norm": "pre_ff_layernorm", "ffn_gate": "feed_forward.gate_proj", "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
}  # fmt: skip
_JAMBA_BLOCK = {
    **_BAMBA_BLOCK, "ssm_x": "mamba.x_proj", "ssm_dt": "mamba.dt_proj", "ssm_dt_norm": "mamba.dt_layernorm",
    "ssm_b_norm": "mamba.b_layernorm", "ssm_c_norm": "mamba.c_layernorm", "ffn_gate_inp": "feed_forward.router",
    **experts_block("feed_forward.experts"),
}  # fmt: skip
# The shared expert is called so only where there are others.
_GRANITE_BLOCK = {
    **_BAMBA_BLOCK, **GRANITE_EXPERTS, "ffn_norm": "post_attention_layernorm", "ffn_gate": "shared_mlp.input_linear",
    "ffn_up": "shared_mlp.input_linear", "ffn_down": "shared_mlp.output_linear",
}  # fmt: skip
_NEMOTRON_BLOCK = {
    "attn_norm": "norm", **{f"attn_{name}": f"mixer.{name}_proj" for name in "qkv"}, "attn_output": "mixer.o_proj",
    **{name: f"mixer.{module}" for name, module in _SSM.items()}, "ssm_norm": "mixer.norm", "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj", "ffn_gate_inp": "mixer.gate", "ffn_up_exps": "mixer.experts.up_proj",
    "ffn_down_exps": "mixer.experts.down_proj", "ffn_up_shexp": "mixer.shared_experts.up_proj",
    "ffn_down_shexp": "mixer.shared_experts.down_proj", "ffn_latent_down": "mixer.fc1_latent_proj",
    "ffn_latent_up": "mixer.fc2_latent_proj",
}  # fmt: skip


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


def _periodic(hparams: HParams, key: str, places: Sequence[bool]) -> tuple[int, int]:
    """(period, offset) of the layers of a kind. Raises ``UnsupportedModel`` for those that are not evenly spaced."""
    found = [index for index, is_one in enumerate(places) if is_one] or [len(places)]
    period = found[1] - found[0] if len(found) > 1 else len(places) + 1
    if [index % period == found[0] for index in range(len(places))] != list(places):
        raise hparams.unsupported(key, f"gives layers {found[:8]}, which are not one in every few, as jamba has them.")
    return period, found[0]


def _mamba2(hparams: HParams, config: dict[str, Any]) -> None:
    """The keys of Bamba's class, which others took."""
    config |= {
        "mamba_n_heads": hparams.count("ssm.time_step_rank"),
        "mamba_d_head": hparams.quotient("ssm.inner_size", "ssm.time_step_rank"),
        "mamba_n_groups": hparams.count("ssm.group_count"),
        "mamba_d_state": hparams.count("ssm.state_size"),
        "mamba_d_conv": hparams.count("ssm.conv_kernel"),
        "mamba_proj_bias": hparams.has("ssm_in.bias"),
        "mamba_conv_bias": hparams.has("ssm_conv1d.bias"),
        "attention_bias": hparams.has("attn_q.bias"),
    }


def _granite_hybrid(hparams: HParams, config: dict[str, Any]) -> None:
    """Attention has positions only where ``rope.scaling.finetuned`` says so, or is missing, as in llama.cpp."""
    width, rotated = config["head_dim"], hparams.flag("rope.scaling.finetuned", True)
    rotary = hparams.count("rope.dimension_count", width)
    if rotated:
        hparams.only("rope.dimension_count", rotary, width)
    granite_scales(hparams, config)
    _mamba2(hparams, config)
    config.pop("head_dim", None)
    config |= {
        "layer_types": ["full_attention" if attends else "linear_attention" for attends in hparams.attends()],
        "mamba_expand": hparams.quotient("ssm.inner_size", "embedding_length"),
        "num_local_experts": hparams.optional("expert_count"),
        "num_experts_per_tok": hparams.optional("expert_used_count"),
        "shared_intermediate_size": hparams.count("expert_shared_feed_forward_length"),
        "position_embedding_type": "rope" if rotated else "nope",
    }


def _bamba(hparams: HParams, config: dict[str, Any]) -> None:
    """Half of each head is rotated."""
    _mamba2(hparams, config)
    hparams.only("rope.dimension_count", hparams.count("rope.dimension_count"), config["head_dim"] // 2)
    config["attn_layer_indices"] = [index for index, attends in enumerate(hparams.attends()) if attends]
    config["mamba_expand"] = hparams.quotient("ssm.inner_size", "embedding_length")
    config["mlp_bias"] = hparams.has("ffn_up.bias")
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
        "mamba_rms_norm": hparams.has("ssm_norm.weight"),
        "mlp_bias": hparams.has("ffn_up.bias"),
        "projectors_bias": hparams.has("ssm_out.bias"),
    }


def _jamba(hparams: HParams, config: dict[str, Any]) -> None:
    """Experts are in the layers that have a router."""
    del config["rope_parameters"]
    layers, tensors = range(config["num_hidden_layers"]), hparams.header.tensors
    attends = _periodic(hparams, "attention.head_count_kv", hparams.attends())
    sparse = _periodic(hparams, "expert_count", [f"blk.{layer}.ffn_gate_inp.weight" in tensors for layer in layers])
    config |= {
        "attn_layer_period": attends[0], "attn_layer_offset": attends[1],
        "expert_layer_period": sparse[0], "expert_layer_offset": sparse[1],
        "num_experts": hparams.count("expert_count", 1),
        "num_experts_per_tok": hparams.count("expert_used_count", 1),
        "mamba_expand": hparams.quotient("ssm.inner_size", "embedding_length"),
        "mamba_dt_rank": hparams.count("ssm.time_step_rank"),
        "mamba_d_state": hparams.count("ssm.state_size"),
        "mamba_d_conv": hparams.count("ssm.conv_kernel"),
        "mamba_proj_bias": hparams.has("ssm_in.bias"),
        "mamba_conv_bias": hparams.has("ssm_conv1d.bias"),
    }  # fmt: skip
    implied_head_dim(hparams, config)


def _nemotron_h(hparams: HParams, config: dict[str, Any]) -> None:
    """A layer with KV heads is attention, one with a width of feed-forward an MLP or experts, any other Mamba-2."""
    without_predictors(hparams, config)
    hparams.count("rope.dimension_count", 1)
    del config["rope_parameters"]
    if hparams.get(RMS_NORM[0]) is not None:
        config["layer_norm_epsilon"] = hparams.real(RMS_NORM[0])
    widths = zip(hparams.attends(), hparams.listed("feed_forward_length", int), strict=True)
    kinds = ["full_attention" if attends else "mlp" if width else "linear_attention" for attends, width in widths]
    tensors = hparams.header.tensors
    config |= {
        "layers_block_type": [
            "moe" if kind == "mlp" and f"blk.{index}.ffn_gate_inp.weight" in tensors else kind
            for index, kind in enumerate(kinds[: config["num_hidden_layers"]])
        ],
        "mamba_num_heads": hparams.count("ssm.time_step_rank"),
        "mamba_head_dim": hparams.quotient("ssm.inner_size", "ssm.time_step_rank"),
        "n_groups": hparams.count("ssm.group_count"),
        "ssm_state_size": hparams.count("ssm.state_size"),
        "conv_kernel": hparams.count("ssm.conv_kernel"),
        "use_bias": hparams.has("ssm_in.bias"),
        "use_conv_bias": hparams.has("ssm_conv1d.bias"),
        "mlp_bias": hparams.has("ffn_up.bias"),
    }
    if "moe" not in config["layers_block_type"]:
        return
    score(hparams, (SIGMOID,), SIGMOID)
    routed(hparams, config)
    del config["first_k_dense_replace"]
    config["moe_shared_expert_intermediate_size"] = hparams.count("expert_shared_feed_forward_length")
    config["moe_latent_size"] = hparams.optional("moe_latent_size") or None


_MULTIPLIED = (
    "the multipliers of Falcon-H1, which an adapter was trained with, are not in a GGUF file, whose weights are "
    "multiplied by them. Serve the model from safetensors."
)
_FINAL_NORM = {"output_norm.weight": "model.final_layernorm.weight"}
_JAMBA_CHANGES = {"mamba.conv1d": CONV, "mamba.A_log": Change(values=log_of_minus)}
_NEMOTRON = Family(
    "nemotron_h", "NemotronHForCausalLM", _NEMOTRON_BLOCK, _nemotron_h,
    changes={**_mamba_changes("mixer"), "mixer.q_proj": INTERLEAVED["self_attn.q_proj"],
             "mixer.k_proj": INTERLEAVED["self_attn.k_proj"]},
    eps=(LAYER_NORM[0], "layer_norm_epsilon"), partial=True,
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
    "granitehybrid": Family("granitemoehybrid", "GraniteMoeHybridForCausalLM", _GRANITE_BLOCK, _granite_hybrid,
                            changes={**INTERLEAVED, **_mamba_changes("mamba"), "shared_mlp.input_linear": STACKED},
                            whole=_mamba_whole("mamba"), partial=True, factors=False, variant=_bamba_instead),
    "falcon-h1": Family("falcon_h1", "FalconH1ForCausalLM", _BAMBA_BLOCK, _falcon_h1, changes=_mamba_changes("mamba"),
                        whole={**_mamba_whole("mamba"), **_FINAL_NORM, "ffn_norm": "pre_ff_layernorm.weight"},
                        no_adapters=_MULTIPLIED),
    "jamba": Family("jamba", "JambaForCausalLM", _JAMBA_BLOCK, _jamba, changes=_JAMBA_CHANGES,
                    whole={**_FINAL_NORM, "ssm_a": "mamba.A_log", "ssm_d": "mamba.D"}),
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON,
}  # fmt: skip
