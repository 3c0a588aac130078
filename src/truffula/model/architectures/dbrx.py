"""DBRX: q, k and v from one module, bounded, and experts whose matrices are stored in three tensors."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from truffula.model.architectures.moe_pieces import MOST_EXPERTS
from truffula.model.architectures.pieces import ACTIVATIONS, attention, finish_spec, sizes_of
from truffula.model.config_view import INERT, MOST, ConfigView
from truffula.model.parts.moe import MoeNames, MoeSpec, RouterSpec
from truffula.model.rope import default_rope, read_rope
from truffula.model.rows import ExpertLayout, NormSpec
from truffula.model.spec import LayerSpec, ModelSpec, ModuleNames, RopeSpec, body_prefixes

_ATTENTION, _EXPERTS = "norm_attn_norm.attn", "ffn.experts.mlp"
_NAMES = ModuleNames(
    embed="wte",
    layer="blocks.{i}.",
    qkv=f"{_ATTENTION}.Wqkv",
    qkv_order="flat",
    out=f"{_ATTENTION}.out_proj",
    attention=_ATTENTION,
    body="transformer.",
    prefixes=body_prefixes("transformer.", ""),
)
_EXPERT_NAMES = MoeNames(
    block="ffn",
    block5="ffn",
    router="router.layer",
    router5="router.layer",
    gate="w1",
    up="v1",
    down="w2",
    in_layouts=(ExpertLayout((f"{_EXPERTS}.w1", f"{_EXPERTS}.v1"), flat=True),),
    out_layouts=(ExpertLayout((f"{_EXPERTS}.w2",), columns=True, flat=True),),
)
# The fields of the nested classes that have an effect, with their defaults; and others.
_ATTENTION_FIELDS: Mapping[str, Any] = MappingProxyType({"clip_qkv": None, "kv_n_heads": 1, "rope_theta": None})
_EXPERT_FIELDS: Mapping[str, Any] = MappingProxyType(
    {
        "ffn_act_fn": None,
        "ffn_hidden_size": 3584,
        "moe_num_experts": 4,
        "moe_top_k": 1,
        "moe_normalize_expert_weights": 1.0,
    }
)
_WITHOUT_EFFECT = ("attn_pdrop", "hidden_size", "is_encoder_decoder", "moe_jitter_eps", "moe_loss_weight")


def dbrx(view: ConfigView) -> ModelSpec:
    """Layer norms without biases; the weights of the chosen experts are divided by their norm."""
    view.skip("emb_pdrop", "resid_pdrop")
    attn = _nested(view, "attn_config", _ATTENTION_FIELDS)
    kv_heads, clip = _integer(view, "attn_config.kv_n_heads", attn), attn["clip_qkv"]
    view.must_be("num_key_value_heads", (None, kv_heads), "it is attn_config.kv_n_heads.")
    moe = _moe(view)
    sizes = sizes_of(view, kv_heads, None, moe.width)
    layer = LayerSpec(
        mixer=attention(sizes, clip=None if clip is None else view.number_value("attn_config.clip_qkv", clip)),
        mlp=moe,
        before_mixer=_norm("norm_attn_norm.norm_1"),
        before_mlp=_norm("norm_attn_norm.norm_2"),
    )
    rope, notes = _rope(view, sizes.head_dim, attn["rope_theta"])
    return finish_spec(view, [layer] * sizes.layers, (rope,), _norm("norm_f"), positions="max_seq_len", names=_NAMES,
                       notes=notes)  # fmt: skip


def _norm(module: str) -> NormSpec:
    return NormSpec(module, 1e-5, kind="layer", cast="last")


def _rope(view: ConfigView, head_dim: int, theta: Any) -> tuple[RopeSpec, tuple[str, ...]]:
    """The rotary table, and notes on it. The base of the trained model is ``attn_config.rope_theta``."""
    if theta is None:
        return read_rope(view, head_dim), ()
    theta = view.number_value("attn_config.rope_theta", theta)
    written = view.mapping("rope_parameters") or view.mapping("rope_scaling") or {}
    stated = written.get("rope_theta", view.raw("rope_theta"))
    if stated is not None or written:
        stated = view.defaults.rope_theta if stated is None else stated
        if stated != theta:
            why = f"attn_config.rope_theta is {theta}; transformers 5 ignores that one. Set both to the model's base."
            raise view.error("rope_theta", why, stated)
        return read_rope(view, head_dim), ()
    note = f"The rotary base is attn_config.rope_theta = {theta:g}; transformers 5 would compute with 10000."
    return default_rope(theta, head_dim), () if theta == view.defaults.rope_theta else (note,)


def _moe(view: ConfigView) -> MoeSpec:
    ffn = _nested(view, "ffn_config", _EXPERT_FIELDS)
    experts, top_k = (_integer(view, f"ffn_config.{key}", ffn) for key in ("moe_num_experts", "moe_top_k"))
    if experts > MOST_EXPERTS or top_k > experts:
        why = f"{top_k} of them are chosen, and at most {MOST_EXPERTS} are served."
        raise view.error("ffn_config.moe_num_experts", why, experts)
    norm, named = ffn["moe_normalize_expert_weights"], ffn["ffn_act_fn"]
    if norm is not None:
        norm = view.number_value("ffn_config.moe_normalize_expert_weights", norm)
    name = "silu" if named is None else named.get("name", "silu") if isinstance(named, Mapping) else None
    if not isinstance(name, str) or name not in ACTIVATIONS or set(named or ()) - {"name"}:
        raise view.error("ffn_config.ffn_act_fn", f"supported are the names {', '.join(sorted(ACTIVATIONS))}.", named)
    router = RouterSpec(experts, top_k, norm=norm)
    width = _integer(view, "ffn_config.ffn_hidden_size", ffn)
    return MoeSpec(router, width, ACTIVATIONS[name], names=_EXPERT_NAMES)


def _nested(view: ConfigView, key: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ``fields`` in a nested config; a key that transformers' class does not know is refused."""
    values = view.mapping(key) or {}
    for name, value in values.items():
        if name not in (*fields, *_WITHOUT_EFFECT) and name not in INERT:
            raise view.error(f"{key}.{name}", "transformers has no such key.", value)
    return {name: values.get(name, default) for name, default in fields.items()}


def _integer(view: ConfigView, key: str, values: Mapping[str, Any]) -> int:
    value = values[key.rpartition(".")[2]]
    if type(value) is not int or not 1 <= value <= MOST:
        raise view.error(key, f"expected an integer from 1 to {MOST}.", value)
    return value
