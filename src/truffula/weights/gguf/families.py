"""What a row of the tables of GGUF families is, and the tensor names and keys of metadata that several share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.weights.checkpoint import Array
from truffula.weights.gguf.changes import Change, Config
from truffula.weights.gguf.header import GgufHeader
from truffula.weights.gguf.hparams import HParams

BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",  # the three as one, where the converter is asked for it
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA_BLOCK = {**BLOCK, "ffn_norm": "post_attention_layernorm"}
QWEN3_BLOCK = {**LLAMA_BLOCK, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
EXPERTS_BLOCK = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj",  # an option of the converter
}
SHARED_EXPERT = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
GRANITE_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_gate_exps": "block_sparse_moe.experts.gate_proj",
    "ffn_up_exps": "block_sparse_moe.experts.up_proj",
    "ffn_down_exps": "block_sparse_moe.experts.down_proj",
    "ffn_gate_up_exps": "block_sparse_moe.experts.gate_up_proj",
    "ffn_gate_shexp": "shared_mlp.input_linear",
    "ffn_up_shexp": "shared_mlp.input_linear",
    "ffn_down_shexp": "shared_mlp.output_linear",
}
POST_NORM_BLOCK = {**BLOCK, "post_attention_norm": "post_attention_layernorm"}
HEAD_NORMS_BLOCK = {**BLOCK, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
RMS_NORM = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
LAYER_NORM = ("attention.layer_norm_epsilon", "layer_norm_eps")
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class Family:
    """The mapping of one GGUF architecture to a model type. ``whole`` are names that do not follow from ``block``, of
    layers without their prefix. ``changes`` are the converter's, by module (``self_attn.q_proj``, ``model.norm``) or
    tensor (``linear_attn.A_log``). ``default_theta`` None: the file must contain ``rope.freq_base``. ``eps`` is the
    key of the norms' epsilon, here and in config.json. ``partial``: a part of each head may be rotated.
    ``no_adapters``: see ``Checkpoint``. ``factors``: ``rope_freqs.weight`` has the divisors of all frequencies.
    ``top`` are the modules outside layers, ``layers`` is the prefix of a layer, without its number. ``keys`` are the
    class's names of what ``to_config`` names otherwise, None where it has no such key. ``by_layer``: widths and
    numbers of heads may differ from layer to layer, and the config first has those of layer 0. ``split`` are modules
    whose rows are modules of their own, named with ``{h}``; ``made`` makes tensors of metadata. ``latent``: attention
    is latent. ``variant`` is the row for a file that this one is not for.
    ``read`` matches tensors that are not the model's: their values are among the tables of ``extra``.
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


def expert_count(hparams: HParams) -> int:
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


def chosen_experts(hparams: HParams, config: dict[str, Any]) -> None:
    config["num_local_experts"] = expert_count(hparams)
    config["num_experts_per_tok"] = hparams.count("expert_used_count")


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


def layer_types(hparams: HParams, layers: int, every: int, *, full_first: bool = False) -> list[str]:
    """The type of each layer, from a list of booleans (true: sliding) or a period: every n-th is full, none for 0; with
    ``full_first``, the first of n is."""
    pattern = hparams.get("attention.sliding_window_pattern", every)
    if not isinstance(pattern, list):
        none_is_full = type(pattern) is int and pattern == 0
        period = layers + 1 if none_is_full else hparams.count("attention.sliding_window_pattern", every)
        pattern = [(layer + (not full_first)) % period != 0 for layer in range(layers)]
    if len(pattern) != layers:
        name = hparams.name("attention.sliding_window_pattern")
        raise CheckpointError(f"{name} has {len(pattern)} entries for {layers} layers.", param=name)
    return ["sliding_attention" if slides else "full_attention" for slides in pattern]


def llama_like(hparams: HParams, config: dict[str, Any]) -> None:
    """Biases as Llama has them, in a class without the field ``head_dim``."""
    attention_bias(hparams, config)
    implied_head_dim(hparams, config)
    if "blk.0.ffn_up.bias" in hparams.header.tensors:
        config["mlp_bias"] = True


def granite(hparams: HParams, config: dict[str, Any]) -> None:
    llama_like(hparams, config)
    config["attention_multiplier"] = hparams.real("attention.scale")
    config["embedding_multiplier"] = hparams.real("embedding_scale", 1.0)
    config["residual_multiplier"] = hparams.real("residual_scale", 1.0)
    config["logits_scaling"] = hparams.real("logit_scale", 1.0)
