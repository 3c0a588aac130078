"""DeepSeek V2 to V3.2 and the models with their latent attention: Kimi K2 and K2.5, GLM-4.7-Flash, GLM-5, Mistral 4,
and Youtu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from truffula.model.architectures.moe_pieces import (
    DEEPSEEK_NAMES,
    dense_first,
    predictors,
    read_experts,
    sigmoid_router,
    with_experts,
)
from truffula.model.architectures.pieces import ACTIVATIONS, MOST_LAYERS, finish_spec, rms
from truffula.model.config_view import ConfigView
from truffula.model.parts.attention import PositionScale
from truffula.model.parts.mla import MlaSpec
from truffula.model.parts.mlp import MlpSpec
from truffula.model.parts.moe import MoeSpec, RouterSpec, SharedSpec
from truffula.model.rope import attention_magnitude, read_rope, rope_parameter
from truffula.model.rows import ExpertLayout, NormSpec
from truffula.model.spec import LLAMA_NAMES, LayerSpec, ModelSpec, ModuleNames, RopeSpec

_LATENT_EPS = 1e-6
"""Of the latents' norms, which do not read rms_norm_eps."""
_ROPE_KEYS = ("mscale_all_dim",)
_BETA, _ORIGINAL = "llama_4_scaling_beta", "original_max_position_embeddings"
_KIMI_K25_NAMES = ModuleNames(
    body="model.language_model.",
    skip=("vision_tower.", "mm_projector.", "model.vision_tower.", "model.mm_projector."),
)
# The only one whose files hold the matrices of all experts together.
_MISTRAL4_NAMES = replace(
    DEEPSEEK_NAMES,
    in_layouts=(ExpertLayout(("mlp.experts.gate_up_proj",), parameter="mlp.experts.gate_up_proj"),),
    out_layouts=(ExpertLayout(("mlp.experts.down_proj",), parameter="mlp.experts.down_proj"),),
)
# The keys of experts, which have no effect where no layer has any.
_EXPERT_KEYS = (
    "moe_intermediate_size", "n_shared_experts", "n_routed_experts", "num_experts", "num_local_experts",
    "num_experts_per_tok", "n_group", "topk_group", "topk_method", "norm_topk_prob", "routed_scaling_factor",
)  # fmt: skip


def deepseek_v2(view: ConfigView) -> ModelSpec:
    """The first ``first_k_dense_replace`` layers are dense, the others mixtures of experts."""
    view.must_be("scoring_func", (None, "softmax"), "only softmax is supported.")
    sparse, bias = dense_first(view, "first_k_dense_replace", _layers(view)), view.flag("mlp_bias")
    if any(sparse):
        view.must_be("mlp_bias", (False,), "biases of experts are not supported.")
    else:
        view.skip(*_EXPERT_KEYS)
    moe = _moe(view, _softmax_router(view)) if any(sparse) else None
    return _model(view, sparse, moe, mla(view, interleaved=True), mlp_bias=bias)


def deepseek_v3(view: ConfigView, names: ModuleNames = LLAMA_NAMES) -> ModelSpec:
    """As V2, with another router; also Kimi K2."""
    view.must_be("scoring_func", (None, "sigmoid"), "only sigmoid is supported.")
    view.must_be("topk_method", (None, "noaux_tc"), "only noaux_tc is supported.")
    sparse = dense_first(view, "first_k_dense_replace", _layers(view))
    mixer = mla(view, interleaved=view.flag("rope_interleave"))
    return _model(view, sparse, _sigmoid_moe(view, sparse), mixer, names=names)


def kimi_k25(view: ConfigView) -> ModelSpec:
    """The text part of Kimi K2.5 and K2.6: text_config with the class defaults of deepseek_v3."""
    view.skip("vision_config", "projection_hidden_size", "projection_layer_norm_eps", "image_token_id")
    view.skip("video_token_id", "vision_start_token_id", "vision_end_token_id")
    # Of the repository's own class: placeholders of images, and training.
    view.skip("media_placeholder_token_id", "video_placeholder", "use_unified_vision_chunk", "ignore_index")
    return deepseek_v3(view.nested("text_config", "deepseek_v3", "kimi_k2"), _KIMI_K25_NAMES)


def glm4_moe_lite(view: ConfigView) -> ModelSpec:
    """GLM-4.7-Flash: as V3; ``mlp_layer_types`` says which layers are dense (by default the first)."""
    layers = _layers(view)
    sparse = _sparse(view, layers, ("dense", *["sparse"] * (layers - 1)))
    return _model(view, sparse, _sigmoid_moe(view, sparse), mla(view, interleaved=view.flag("rope_interleave")))


def deepseek_v32(view: ConfigView) -> ModelSpec:
    """As V3, with sparse attention to ``index_topk`` keys that an indexer chooses: all keys of a shorter sequence.

    So attention to all keys is exact up to that length, which is the longest served; the indexers are not needed.
    """
    layers = _layers(view)
    view.must_be("rope_interleave", (None, True), "only true is supported.")
    kinds = ("indexed_attention", "deepseek_sparse_attention")  # two names of one thing
    view.must_be("layer_types", (None, *([kind] * layers for kind in kinds)), f"only {kinds[0]} is supported.")
    view.skip("head_dim")  # transformers overwrites it; GLM-5.2 writes qk_nope_head_dim
    view.skip("index_head_dim", "index_n_heads")
    first = dense_first(view, "first_k_dense_replace", layers)
    sparse = _sparse(view, layers, tuple("sparse" if has_experts else "dense" for has_experts in first))
    spec = _model(view, sparse, _sigmoid_moe(view, sparse), mla(view, interleaved=True, free_head=True))
    longest = view.integer("index_topk")
    note = (
        f"Attention is to all keys, which is what this model computes up to index_topk = {longest} tokens; longer "
        "sequences are not served."
    )
    indexers = tuple(f"layers.{index}.self_attn.indexer." for index in range(layers))
    names = replace(spec.names, unused=(*spec.names.unused, *indexers))
    return replace(spec, max_positions=min(spec.max_positions, longest), names=names, notes=(*spec.notes, note))


def glm_moe_dsa(view: ConfigView) -> ModelSpec:
    """GLM-5: as DeepSeek V3.2; layers may share an indexer."""
    view.skip("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")
    return deepseek_v32(view)


def mistral4(view: ConfigView, names: ModuleNames = LLAMA_NAMES) -> ModelSpec:
    """As V3, with a softmax in the router, and with Ministral 3's queries, which grow with their position."""
    sparse = dense_first(view, "first_k_dense_replace", _layers(view))
    moe = _sigmoid_moe(view, sparse)
    if moe is not None:
        moe = replace(moe, router=replace(moe.router, score="softmax", correction=False), names=_MISTRAL4_NAMES)
    mixer = mla(view, interleaved=view.flag("rope_interleave"), whole_head=True)
    width = mixer.nope + mixer.rope
    rope_keys = (*_ROPE_KEYS, _BETA, _ORIGINAL, "max_position_embeddings")
    rope = read_rope(view, width, partial=mixer.rope / width, more=rope_keys)
    if rope.dims != mixer.rope:
        raise view.error("partial_rotary_factor", f"{rope.dims} of qk_rope_head_dim = {mixer.rope} would be rotated.")
    scale = PositionScale(rope_parameter(view, _BETA), rope_parameter(view, _ORIGINAL))
    return _model(view, sparse, moe, replace(mixer, position_scale=scale), rope=rope, predicts=False, names=names)


def youtu(view: ConfigView) -> ModelSpec:
    """Latent attention and a dense MLP in every layer."""
    view.skip("embedding_initializer_range")
    mixer = mla(view, interleaved=view.flag("rope_interleave"))
    return _model(view, [False] * _layers(view), None, mixer, predicts=False)


def _layers(view: ConfigView) -> int:
    layers = view.integer("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise view.error("num_hidden_layers", f"at most {MOST_LAYERS} layers are served.", layers)
    return layers


def _sparse(view: ConfigView, layers: int, default: Sequence[str]) -> list[bool]:
    """Which layers have experts, by ``mlp_layer_types``."""
    kinds = view.strings("mlp_layer_types", layers) or default
    for kind in kinds:
        if kind not in ("dense", "sparse"):
            raise view.error("mlp_layer_types", f"{kind} is not supported; dense and sparse are.", kind)
    return [kind == "sparse" for kind in kinds]


def _model(
    view: ConfigView,
    sparse: Sequence[bool],
    moe: MoeSpec | None,
    mixer: MlaSpec,
    *,
    rope: RopeSpec | None = None,
    mlp_bias: bool = False,
    predicts: bool = True,
    names: ModuleNames = LLAMA_NAMES,
) -> ModelSpec:
    """A model of these layers. ``predicts``: files may hold layers that predict further tokens."""
    # Of the repositories' own classes: which layers have experts; how training balances and divides them.
    view.must_be("moe_layer_freq", (None, 1), "only 1 is supported.")
    view.skip("aux_loss_alpha", "ep_size", "seq_aux", "output_router_logits")
    activation = view.choice("hidden_act", ACTIVATIONS)
    mlp = MlpSpec(view.integer("intermediate_size"), activation, in_bias=mlp_bias, out_bias=mlp_bias)
    layer = LayerSpec(mixer, mlp, rms(view, "input_layernorm"), rms(view, "post_attention_layernorm"))
    layers = [layer] * len(sparse)
    if moe is not None:
        layers = with_experts(layers, moe, sparse)
    if predicts:
        names = replace(names, unused=predictors(view, len(sparse)))
    if rope is None:
        rope = read_rope(view, mixer.rope, more=_ROPE_KEYS)
    return finish_spec(view, layers, (rope,), rms(view, "norm"), names=names)


def _sigmoid_moe(view: ConfigView, sparse: Sequence[bool]) -> MoeSpec | None:
    """The experts of V3; None where no layer has any."""
    if not any(sparse):
        view.skip(*_EXPERT_KEYS)
        return None
    return _moe(view, sigmoid_router(view, *read_experts(view, "n_routed_experts")))


def _softmax_router(view: ConfigView) -> RouterSpec:
    """V2's router: its weights are not divided by their sum; with ``group_limited_greedy`` the best groups count."""
    experts, top_k = read_experts(view, "n_routed_experts")
    view.must_be("norm_topk_prob", (None, False), "only false is supported.")
    method = view.choice("topk_method", {"greedy": "greedy", "group_limited_greedy": "groups"})
    scale = view.number("routed_scaling_factor")
    if method == "greedy":
        view.skip("n_group", "topk_group")
        return RouterSpec(experts, top_k, scale=scale)
    groups, topk_groups = view.integer("n_group"), view.integer("topk_group")
    if experts % groups:
        raise view.error("n_group", f"it does not divide the {experts} experts.", groups)
    if topk_groups > groups or top_k > experts // groups * topk_groups:
        raise view.error("topk_group", f"{top_k} experts are needed of {groups} groups of {experts // groups}.")
    return RouterSpec(experts, top_k, groups=groups, topk_groups=topk_groups, group_score="max", scale=scale)


def _moe(view: ConfigView, router: RouterSpec) -> MoeSpec:
    width, shared = view.integer("moe_intermediate_size"), view.optional_integer("n_shared_experts", minimum=0)
    activation = view.choice("hidden_act", ACTIVATIONS)
    shared_mlp = SharedSpec(width * shared) if shared else None
    return MoeSpec(router, width, activation, shared=shared_mlp, names=DEEPSEEK_NAMES)


def mla(view: ConfigView, *, interleaved: bool, whole_head: bool = False, free_head: bool = False) -> MlaSpec:
    """The latent attention that all layers share, with rope table 0.

    ``whole_head``: head_dim means the whole width of a head, instead of its rotated part. ``free_head``: it means
    nothing.
    """
    heads = view.integer("num_attention_heads")
    view.must_be("num_key_value_heads", (None, heads), f"latent attention has a key for each of the {heads} heads.")
    nope, rope = view.integer("qk_nope_head_dim"), view.integer("qk_rope_head_dim")
    view.must_be("qk_head_dim", (None, nope + rope), "it is qk_nope_head_dim + qk_rope_head_dim.")
    if view.written("head_dim") and not free_head:  # transformers overwrites it, or fails
        width = nope + rope if whole_head else rope
        view.must_be("head_dim", (None, width), f"in this architecture it is {width}, of qk_rope_head_dim.")
    q_rank, magnitude = view.optional_integer("q_lora_rank"), attention_magnitude(view)
    return MlaSpec(
        heads=heads,
        nope=nope,
        rope=rope,
        dim_v=view.integer("v_head_dim"),
        rank=view.integer("kv_lora_rank"),
        scale=(nope + rope) ** -0.5 * magnitude * magnitude,
        table=0,
        kv_norm=NormSpec("self_attn.kv_a_layernorm", _LATENT_EPS),
        q_rank=q_rank,
        q_norm=None if q_rank is None else NormSpec("self_attn.q_a_layernorm", _LATENT_EPS),
        rope_layout="interleaved" if interleaved else "half",
        bias=view.flag("attention_bias"),
    )
