"""What a row of the tables of GGUF families is, and the tensor names and keys of metadata that several share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from truffula.weights.checkpoint import Array
from truffula.weights.gguf.changes import Change, Config
from truffula.weights.gguf.header import GgufHeader
from truffula.weights.gguf.hparams import HParams

BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_qkv": "self_attn.qkv_proj",  # the three as one: an option of the converter
}  # fmt: skip
LLAMA_BLOCK = {**BLOCK, "ffn_norm": "post_attention_layernorm"}
POST_NORM_BLOCK = {**BLOCK, "post_attention_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
HEAD_NORMS_BLOCK = {**BLOCK, **_HEAD_NORMS}
QWEN3_BLOCK = {**LLAMA_BLOCK, **_HEAD_NORMS}
# Older files have kv_b whole; that of others is made of k_b and v_b.
LATENT_BLOCK = {
    **LLAMA_BLOCK, "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj", "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm", "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.kv_b_proj", "attn_v_b": "self_attn.kv_b_proj",
}  # fmt: skip


def experts_block(module: str, *names: str) -> dict[str, str]:
    """Experts of which gate, down and up have these names."""
    gate, down, up = names or ("gate_proj", "down_proj", "up_proj")
    return {
        "ffn_gate_exps": f"{module}.{gate}", "ffn_up_exps": f"{module}.{up}", "ffn_down_exps": f"{module}.{down}",
        "ffn_gate_up_exps": f"{module}.gate_up_proj",  # an option of the converter
    }  # fmt: skip


def shared_block(module: str) -> dict[str, str]:
    return {f"ffn_{name}_shexp": f"{module}.{name}_proj" for name in ("gate", "up", "down")}


EXPERTS_BLOCK = {"ffn_gate_inp": "mlp.gate", **experts_block("mlp.experts")}
DEEPSEEK_EXPERTS = {**EXPERTS_BLOCK, **shared_block("mlp.shared_experts")}
SHARED_EXPERT = {**shared_block("mlp.shared_expert"), "ffn_gate_inp_shexp": "mlp.shared_expert_gate"}
GRANITE_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.router.layer", **experts_block("block_sparse_moe.experts"),
    "ffn_gate_shexp": "shared_mlp.input_linear", "ffn_up_shexp": "shared_mlp.input_linear",
    "ffn_down_shexp": "shared_mlp.output_linear",
}  # fmt: skip
CORRECTION = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
RMS_NORM = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
LAYER_NORM = ("attention.layer_norm_epsilon", "layer_norm_eps")
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
SOFTMAX, SIGMOID = 1, 2  # values of expert_gating_func


@dataclass(frozen=True)
class Family:
    """The mapping of one GGUF architecture to a model type.

    Tensors: ``block`` maps modules of a layer, ``top`` those outside layers, ``whole`` maps tensors whose names do not
    follow from these; ``layers`` is the prefix of a layer, without its number. ``changes`` are the converter's, by
    module (``self_attn.q_proj``, ``model.norm``) or tensor (``linear_attn.A_log``). ``split`` are modules whose rows
    are modules of their own, named with ``{h}``; ``made`` makes tensors of metadata; ``read`` matches tensors whose
    values are only read, among the tables of ``extra``.

    Metadata: ``extra`` completes what ``to_config`` reads; ``keys`` are then the class's names of keys, None where it
    has no such key. ``eps`` is the key of the norms' epsilon, here and in config.json. ``default_theta`` None: the file
    must contain ``rope.freq_base``. ``factors``: ``rope_freqs.weight`` may hold divisors of all frequencies.
    ``partial``: a part of each head may be rotated. ``latent``: attention is latent. ``by_layer``: widths and numbers
    of heads may differ from layer to layer, and the config first has those of layer 0. ``variant`` returns the row that
    a file needs instead, or None. ``no_adapters``: see ``Checkpoint``.
    """

    model_type: str
    class_name: str
    block: Mapping[str, str]
    extra: Callable[[HParams, dict[str, Any]], None]
    changes: Mapping[str, Change] = field(default_factory=dict)
    default_theta: float | None = 10000.0
    whole: Mapping[str, str] = field(default_factory=dict)
    eps: tuple[str, str] = RMS_NORM
    partial: bool = False
    factors: bool = True
    no_adapters: str = ""
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    layers: str = "model.layers."
    keys: Mapping[str, str | None] = field(default_factory=dict)
    by_layer: bool = False
    latent: bool = False
    split: Mapping[str, str] = field(default_factory=dict)
    made: Callable[[HParams, Config], dict[str, Array]] | None = None
    variant: Callable[[GgufHeader], Family | None] | None = None
    read: str = "(?!)"


def with_key(key: str, row: Family) -> Callable[[GgufHeader], Family | None]:
    """``Family.variant``: ``row`` for a file that has the key."""

    def variant(header: GgufHeader) -> Family | None:
        return row if header.metadata.get(f"{header.metadata['general.architecture']}.{key}") else None

    return variant


def implied_head_dim(hparams: HParams, config: dict[str, Any]) -> None:
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]  # the class has no such field; kept only when it differs from the class's computed value


def partly_rotated(hparams: HParams, config: dict[str, Any]) -> None:
    """``partial_rotary_factor``, of which the width of a head is multiplied and cut to a whole number."""
    width = config["head_dim"]
    dims = hparams.count("rope.dimension_count", width)
    share = dims / width
    config["rope_parameters"]["partial_rotary_factor"] = share if int(width * share) == dims else (dims + 0.5) / width


def biased(hparams: HParams) -> bool:
    """Whether q, k and v have biases."""
    return hparams.has("attn_q.bias") or hparams.has("attn_qkv.bias")


def attention_bias(hparams: HParams, config: dict[str, Any]) -> None:
    if biased(hparams):
        config["attention_bias"] = True


def llama_biases(hparams: HParams, config: dict[str, Any]) -> None:
    attention_bias(hparams, config)
    if hparams.has("ffn_up.bias"):
        config["mlp_bias"] = True


def llama_like(hparams: HParams, config: dict[str, Any]) -> None:
    """Biases as Llama has them, in a class without the field ``head_dim``."""
    llama_biases(hparams, config)
    implied_head_dim(hparams, config)


def layer_types(hparams: HParams, layers: int, every: int, *, full_first: bool = False) -> list[str]:
    """The type of each layer, from a list of booleans (true: sliding) or a period: every n-th is full, none for 0; with
    ``full_first``, the first of n is."""
    pattern = hparams.get("attention.sliding_window_pattern", every)
    if not isinstance(pattern, list):
        none_is_full = type(pattern) is int and pattern == 0
        period = layers + 1 if none_is_full else hparams.count("attention.sliding_window_pattern", every)
        pattern = [(layer + (not full_first)) % period != 0 for layer in range(layers)]
    if len(pattern) != layers or any(slides not in (True, False) for slides in pattern):
        why = f"has {len(pattern)} entries for {layers} layers, or others than true and false."
        raise hparams.error("attention.sliding_window_pattern", why)
    return ["sliding_attention" if slides else "full_attention" for slides in pattern]


def windows(
    hparams: HParams, config: dict[str, Any], every: int = 4, default: int | None = None, *, full_first: bool = False
) -> None:
    """The window, for which there may be a default, and which layers have it: see ``layer_types``."""
    config["sliding_window"] = hparams.count("attention.sliding_window", default)
    config["layer_types"] = layer_types(hparams, config["num_hidden_layers"], every, full_first=full_first)


def optional_window(hparams: HParams, config: dict[str, Any]) -> None:
    config["sliding_window"] = hparams.optional("attention.sliding_window") or None


def granite(hparams: HParams, config: dict[str, Any]) -> None:
    """llama.cpp does not rotate where ``rope.scaling.finetuned`` is false; the classes always do.

    A Granite 4 model without Mamba layers is a file of this kind, with the keys of such layers.
    """
    hparams.only("rope.scaling.finetuned", hparams.flag("rope.scaling.finetuned", True), True)
    for key in ("conv_kernel", "group_count", "inner_size", "state_size", "time_step_rank"):
        hparams.get(f"ssm.{key}")
    granite_scales(hparams, config)


def granite_scales(hparams: HParams, config: dict[str, Any]) -> None:
    llama_like(hparams, config)
    config["attention_multiplier"] = hparams.real("attention.scale")
    config["embedding_multiplier"] = hparams.real("embedding_scale", 1.0)
    config["residual_multiplier"] = hparams.real("residual_scale", 1.0)
    config["logits_scaling"] = hparams.real("logit_scale", 1.0)


def expert_count(hparams: HParams) -> int:
    """The number of experts, which the file's routers must have too: a dense file may state one by mistake."""
    count = hparams.count("expert_count")
    router = hparams.header.tensors.get(first := "blk.0.ffn_gate_inp.weight")
    if router is None:
        why = "the router of the first layer; supported are models with experts in every layer"
        raise hparams.unsupported("expert_count", f"is {count}, in a file without {first}, {why}.")
    if router.shape[0] != count:
        raise hparams.error("expert_count", f"is {count}; the router {first} has {router.shape[0]} rows.")
    return count


def chosen_experts(hparams: HParams, config: dict[str, Any]) -> None:
    config["num_local_experts"] = expert_count(hparams)
    config["num_experts_per_tok"] = hparams.count("expert_used_count")


def experts(hparams: HParams, config: dict[str, Any]) -> None:
    """The experts, under Qwen's keys, of which ``norm_topk_prob`` has none in a file."""
    config["num_experts"] = hparams.count("expert_count")
    config["num_experts_per_tok"] = hparams.count("expert_used_count")
    config["moe_intermediate_size"] = hparams.count("expert_feed_forward_length")


def routed(hparams: HParams, config: dict[str, Any]) -> None:
    """The experts, under DeepSeek's keys."""
    config |= {
        "first_k_dense_replace": hparams.optional("leading_dense_block_count"),
        "n_routed_experts": hparams.count("expert_count"),
        "num_experts_per_tok": hparams.count("expert_used_count"),
        "n_shared_experts": hparams.optional("expert_shared_count"),
        "moe_intermediate_size": hparams.count("expert_feed_forward_length"),
        "n_group": hparams.count("expert_group_count", 1),
        "topk_group": hparams.count("expert_group_used_count", 1),
        "norm_topk_prob": hparams.flag("expert_weights_norm"),
        "routed_scaling_factor": hparams.real("expert_weights_scale", 1.0) or 1.0,  # 0: the weights are not scaled
    }


def score(hparams: HParams, allowed: tuple[int, ...], default: int = 0) -> int:
    """``expert_gating_func``: how the router makes scores, ``SOFTMAX`` or ``SIGMOID``. 0 means none is given."""
    found = hparams.get("expert_gating_func") or default
    hparams.only("expert_gating_func", found, *allowed)
    return int(found)


def without_predictors(hparams: HParams, config: dict[str, Any]) -> None:
    """The last layers of a file may predict further tokens: they are left out."""
    predicting = hparams.optional("nextn_predict_layers")
    if predicting >= config["num_hidden_layers"]:
        raise hparams.error("nextn_predict_layers", f"is {predicting}, of {config['num_hidden_layers']} layers.")
    config["num_hidden_layers"] -= predicting
    config["num_nextn_predict_layers"] = 0
