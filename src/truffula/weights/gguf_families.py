"""The families of GGUF files: one row per architecture, with its tensor names and its keys of metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.weights.gguf_hparams import HParams

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_BLOCK = {**_BLOCK, "ffn_norm": "post_attention_layernorm"}
_QWEN3_BLOCK = {**_LLAMA_BLOCK, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_EXPERTS_BLOCK = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_QWEN2_MOE_BLOCK = {
    **_LLAMA_BLOCK,
    **_EXPERTS_BLOCK,
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_QWEN3_MOE_BLOCK = {
    **_QWEN3_BLOCK,
    **_EXPERTS_BLOCK,
}
# Mixtral's files are of the architecture llama.
_MIXTRAL_BLOCK = {
    **_LLAMA_BLOCK,
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.w1",
    "ffn_up_exps": "block_sparse_moe.experts.w3",
    "ffn_down_exps": "block_sparse_moe.experts.w2",
}
_GEMMA2_BLOCK = {
    **_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA3_BLOCK = {**_GEMMA2_BLOCK, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SEED_BLOCK = {**_BLOCK, "post_attention_norm": "post_attention_layernorm"}
_OLMO2_BLOCK = {
    **{name: module for name, module in _SEED_BLOCK.items() if name != "attn_norm"},
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_GRANITE_MOE_BLOCK = {
    **_LLAMA_BLOCK,
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_gate_exps": "block_sparse_moe.experts.gate_proj",
    "ffn_up_exps": "block_sparse_moe.experts.up_proj",
    "ffn_down_exps": "block_sparse_moe.experts.down_proj",
}
_COHERE_BLOCK = {**_BLOCK, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GLM4_MOE_BLOCK = {
    **_COHERE_BLOCK,
    **_EXPERTS_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    # Of layers that predict further tokens, which are not served.
    "nextn.eh_proj": "eh_proj",
    "nextn.embed_tokens": "embed_tokens",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.shared_head_head": "shared_head.head",
    "nextn.shared_head_norm": "shared_head.norm",
}
_GPT_OSS_BLOCK = {**_SEED_BLOCK, **_EXPERTS_BLOCK, "ffn_gate_inp": "mlp.router"}
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
_LAYER_NORM = ("attention.layer_norm_epsilon", "layer_norm_eps")


@dataclass(frozen=True)
class Family:
    """The mapping of one GGUF architecture to a model type. ``permuted``: rows of q and k are interleaved; ``shifted``:
    norms hold 1 + weight. ``whole`` are names that do not follow from ``block``, of layers without their prefix.
    ``default_theta`` None: the file must contain ``rope.freq_base``. ``eps`` is the key of the norms' epsilon, here and
    in config.json. ``partial``: a part of each head may be rotated.
    """

    model_type: str
    class_name: str
    block: Mapping[str, str]
    extra: Callable[[HParams, dict[str, Any]], None]
    permuted: bool = False
    shifted: bool = False
    default_theta: float | None = 10000.0
    whole: Mapping[str, str] = field(default_factory=dict)
    eps: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    partial: bool = False


def _llama(hparams: HParams, config: dict[str, Any]) -> None:
    window = hparams.get("attention.sliding_window")
    if window:  # only Mistral's files of this architecture have one
        config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=window)
    _attention_bias(hparams, config)
    if "blk.0.ffn_up.bias" in hparams.header.tensors:
        config["mlp_bias"] = True


def _experts(hparams: HParams) -> int:
    """The number of experts, which the file's routers must have too: a dense file may state one by mistake."""
    count, name = hparams.count("expert_count"), hparams.name("expert_count")
    router = hparams.header.tensors.get("blk.0.ffn_gate_inp.weight")
    if router is None:
        raise UnsupportedModel(
            f"{name} is {count}, in a file without blk.0.ffn_gate_inp.weight, the router of the first layer; supported "
            "are models with experts in every layer.",
            param=name,
        )
    if router.shape[0] != count:
        raise CheckpointError(
            f"{name} is {count}, and the router blk.0.ffn_gate_inp.weight has {router.shape[0]} rows.", param=name
        )
    return count


def _mixtral(hparams: HParams, config: dict[str, Any]) -> None:
    config["num_local_experts"] = _experts(hparams)
    config["num_experts_per_tok"] = hparams.count("expert_used_count")


def _qwen2_moe(hparams: HParams, config: dict[str, Any]) -> None:
    _qwen3_moe(hparams, config)
    _qwen2(hparams, config)
    config["shared_expert_intermediate_size"] = hparams.count("expert_shared_feed_forward_length")
    config["norm_topk_prob"] = False


def _qwen3_moe(hparams: HParams, config: dict[str, Any]) -> None:
    """llama.cpp divides the weights of the chosen experts by their sum: the format has no key for it here."""
    config["num_experts"] = _experts(hparams)
    config["num_experts_per_tok"] = hparams.count("expert_used_count")
    config["moe_intermediate_size"] = hparams.count("expert_feed_forward_length")
    config["norm_topk_prob"] = True
    if "blk.0.attn_q.bias" in hparams.header.tensors and config["model_type"] == "qwen3_moe":
        config["attention_bias"] = True


def _qwen2(hparams: HParams, config: dict[str, Any]) -> None:
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]  # the class has no such field; kept only when it differs from the class's computed value


def _attention_bias(hparams: HParams, config: dict[str, Any]) -> None:
    if "blk.0.attn_q.bias" in hparams.header.tensors:
        config["attention_bias"] = True


def _gemma2(hparams: HParams, config: dict[str, Any]) -> None:
    config["sliding_window"] = hparams.count("attention.sliding_window", 4096)
    config["layer_types"] = _layer_types(hparams, config["num_hidden_layers"], every=2)
    config["attn_logit_softcapping"] = hparams.real("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = hparams.real("final_logit_softcapping", 30.0)
    config["query_pre_attn_scalar"] = _attention_scalar(config, layers_of_27b=46)
    theta, local = config["rope_parameters"]["rope_theta"], hparams.get("rope.freq_base_swa")
    if local is not None and hparams.real("rope.freq_base_swa") != theta:
        name = hparams.name("rope.freq_base_swa")
        raise UnsupportedModel(f"{name} is {local}; gemma2 has one base for all layers, here {theta}.", param=name)


def _gemma3(hparams: HParams, config: dict[str, Any]) -> None:
    config["sliding_window"] = hparams.count("attention.sliding_window")
    config["layer_types"] = _layer_types(hparams, config["num_hidden_layers"], every=6)
    config["query_pre_attn_scalar"] = _attention_scalar(config, layers_of_27b=62)
    cap = hparams.get("final_logit_softcapping")
    config["final_logit_softcapping"] = hparams.real("final_logit_softcapping") if cap else None
    local = {"rope_type": "default", "rope_theta": hparams.real("rope.freq_base_swa", 10000.0)}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}


def _attention_scalar(config: Mapping[str, Any], layers_of_27b: int) -> int:
    """``query_pre_attn_scalar``, for which the format has no key.

    It differs from the head's width in the 27B models only, which llama.cpp also recognises by their number of layers.
    """
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _layer_types(hparams: HParams, layers: int, every: int) -> list[str]:
    """The type of each layer, from a list of booleans (true: sliding) or a period: every n-th is full, none for 0."""
    pattern = hparams.get("attention.sliding_window_pattern", every)
    if not isinstance(pattern, list):
        none_is_full = type(pattern) is int and pattern == 0
        period = layers + 1 if none_is_full else hparams.count("attention.sliding_window_pattern", every)
        pattern = [(layer + 1) % period != 0 for layer in range(layers)]
    if len(pattern) != layers:
        name = hparams.name("attention.sliding_window_pattern")
        raise CheckpointError(f"{name} has {len(pattern)} entries for {layers} layers.", param=name)
    return ["sliding_attention" if slides else "full_attention" for slides in pattern]


def _llama_like(hparams: HParams, config: dict[str, Any]) -> None:
    """Biases as Llama has them, in a class without the field ``head_dim``."""
    _attention_bias(hparams, config)
    _qwen2(hparams, config)
    if "blk.0.ffn_up.bias" in hparams.header.tensors:
        config["mlp_bias"] = True


def _granite(hparams: HParams, config: dict[str, Any]) -> None:
    _llama_like(hparams, config)
    config["attention_multiplier"] = hparams.real("attention.scale")
    config["embedding_multiplier"] = hparams.real("embedding_scale", 1.0)
    config["residual_multiplier"] = hparams.real("residual_scale", 1.0)
    config["logits_scaling"] = hparams.real("logit_scale", 1.0)


def _granite_moe(hparams: HParams, config: dict[str, Any]) -> None:
    _granite(hparams, config)
    _mixtral(hparams, config)


def _seed_oss(hparams: HParams, config: dict[str, Any]) -> None:
    tensors = hparams.header.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    config["attention_out_bias"] = "blk.0.attn_output.bias" in tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors


def _olmo2(hparams: HParams, config: dict[str, Any]) -> None:
    """OLMo 3 has windows; only its full layers are scaled, which is not read from files."""
    _llama_like(hparams, config)
    if hparams.get("attention.sliding_window") is None:
        return
    config.update(model_type="olmo3", architectures=["Olmo3ForCausalLM"])
    config["sliding_window"] = hparams.count("attention.sliding_window")
    config["layer_types"] = _layer_types(hparams, config["num_hidden_layers"], every=4)
    rope, name = config["rope_parameters"], hparams.name("rope.scaling.type")
    if rope["rope_type"] != "default":
        raise UnsupportedModel(f"{name} is {rope['rope_type']!r}: not supported in files of OLMo 3.", param=name)
    config["rope_parameters"] = {"full_attention": rope, "sliding_attention": rope}


def _olmoe(hparams: HParams, config: dict[str, Any]) -> None:
    """llama.cpp does not divide the weights of the chosen experts by their sum."""
    _llama_like(hparams, config)
    config["num_experts"] = _experts(hparams)
    config["num_experts_per_tok"] = hparams.count("expert_used_count")
    config["norm_topk_prob"] = False


def _cohere(hparams: HParams, config: dict[str, Any]) -> None:
    _attention_bias(hparams, config)
    config["logit_scale"] = hparams.real("logit_scale")
    if config["model_type"] == "cohere2":
        config["sliding_window"] = hparams.count("attention.sliding_window")
        config["layer_types"] = _layer_types(hparams, config["num_hidden_layers"], every=4)
        return
    _qwen2(hparams, config)
    config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in hparams.header.tensors


def _glm4_moe(hparams: HParams, config: dict[str, Any]) -> None:
    """The last layers of a file may predict further tokens."""
    tensors, name = hparams.header.tensors, hparams.name("expert_gating_func")
    if hparams.get("expert_gating_func", 2) != 2:
        raise UnsupportedModel(
            f"{name} is {hparams.get('expert_gating_func')}; only 2, sigmoid, is supported.", param=name
        )
    predicting = hparams.count("nextn_predict_layers") if hparams.get("nextn_predict_layers") else 0
    if predicting >= config["num_hidden_layers"]:
        name = hparams.name("nextn_predict_layers")
        raise CheckpointError(f"{name} is {predicting}, of {config['num_hidden_layers']} layers.", param=name)
    config["num_hidden_layers"] -= predicting
    config["num_nextn_predict_layers"] = predicting
    rotated = hparams.count("rope.dimension_count", config["head_dim"])
    config["rope_parameters"]["partial_rotary_factor"] = rotated / config["head_dim"]
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
    dense, shared = hparams.get("leading_dense_block_count", 0), hparams.get("expert_shared_count", 0)
    config |= {
        "first_k_dense_replace": hparams.count("leading_dense_block_count") if dense else 0,
        "n_routed_experts": hparams.count("expert_count"),
        "num_experts_per_tok": hparams.count("expert_used_count"),
        "n_shared_experts": hparams.count("expert_shared_count") if shared else 0,
        "moe_intermediate_size": hparams.count("expert_feed_forward_length"),
        "n_group": hparams.count("expert_group_count", 1),
        "topk_group": hparams.count("expert_group_used_count", 1),
        "norm_topk_prob": bool(hparams.get("expert_weights_norm", False)),
        "routed_scaling_factor": hparams.real("expert_weights_scale", 1.0),
    }


def _lfm2(hparams: HParams, config: dict[str, Any]) -> None:
    """Layers without KV heads have a convolution. The width of the MLP is the adjusted one."""
    each, layers, name = hparams.get("attention.head_count_kv"), config["num_hidden_layers"], "attention.head_count_kv"
    if not isinstance(each, list) or len(each) != layers or any(type(count) is not int for count in each):
        raise CheckpointError(
            f"{hparams.name(name)} is {each!r}; expected {layers} integers.", param=hparams.name(name)
        )
    config["layer_types"] = ["full_attention" if count else "conv" for count in each]
    config["block_auto_adjust_ff_dim"] = False
    config["conv_L_cache"] = hparams.count("shortconv.l_cache")
    _qwen2(hparams, config)


def _gpt_oss(hparams: HParams, config: dict[str, Any]) -> None:
    """The borders of its yarn are not rounded, for which the format has no key."""
    config["sliding_window"] = hparams.count("attention.sliding_window")
    config["num_local_experts"] = _experts(hparams)
    config["num_experts_per_tok"] = hparams.count("expert_used_count")
    config["intermediate_size"] = hparams.count("expert_feed_forward_length", config["intermediate_size"])
    config["attention_bias"] = "blk.0.attn_q.bias" in hparams.header.tensors
    if config["rope_parameters"]["rope_type"] == "yarn":
        config["rope_parameters"]["truncate"] = False


MIXTRAL = Family("mixtral", "MixtralForCausalLM", _MIXTRAL_BLOCK, _mixtral, permuted=True)
FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", _LLAMA_BLOCK, _llama, permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _LLAMA_BLOCK, _qwen2),
    "qwen2moe": Family("qwen2_moe", "Qwen2MoeForCausalLM", _QWEN2_MOE_BLOCK, _qwen2_moe),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _QWEN3_BLOCK, _attention_bias),
    "qwen3moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE_BLOCK, _qwen3_moe),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", _GEMMA2_BLOCK, _gemma2, shifted=True),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", _GEMMA3_BLOCK, _gemma3, shifted=True, default_theta=None),
    "command-r": Family("cohere", "CohereForCausalLM", _COHERE_BLOCK, _cohere, eps=_LAYER_NORM),
    "cohere2": Family("cohere2", "Cohere2ForCausalLM", _COHERE_BLOCK, _cohere, eps=_LAYER_NORM),
    "glm4moe": Family("glm4_moe", "Glm4MoeForCausalLM", _GLM4_MOE_BLOCK, _glm4_moe, partial=True,
                      whole={"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}),
    "gpt-oss": Family("gpt_oss", "GptOssForCausalLM", _GPT_OSS_BLOCK, _gpt_oss,
                      whole={"attn_sinks.weight": "self_attn.sinks"}),
    "granite": Family("granite", "GraniteForCausalLM", _LLAMA_BLOCK, _granite, permuted=True),
    "granitemoe": Family("granitemoe", "GraniteMoeForCausalLM", _GRANITE_MOE_BLOCK, _granite_moe, permuted=True),
    "lfm2": Family("lfm2", "Lfm2ForCausalLM", _LFM2_BLOCK, _lfm2, eps=("attention.layer_norm_rms_epsilon", "norm_eps"),
                   whole={"token_embd_norm.weight": "model.embedding_norm.weight"}),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", _OLMO2_BLOCK, _olmo2),
    "olmoe": Family("olmoe", "OlmoeForCausalLM", _QWEN3_MOE_BLOCK, _olmoe),
    "seed_oss": Family("seed_oss", "SeedOssForCausalLM", _SEED_BLOCK, _seed_oss),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", _LLAMA_BLOCK, _llama_like, permuted=True),
}  # fmt: skip
