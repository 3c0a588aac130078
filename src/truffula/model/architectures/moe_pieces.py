"""Common parts of architectures with experts: their counts, routers, and which layers have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from truffula.model.architectures.pieces import MOST_LAYERS, Sizes, finish_spec, llama_layer, rms
from truffula.model.config_view import ConfigView
from truffula.model.parts.moe import MoeNames, MoeSpec, RouterSpec
from truffula.model.rope import read_rope
from truffula.model.spec import LLAMA_NAMES, LayerSpec, ModelSpec, ModuleNames

MOST_EXPERTS = 4096
"""Far above the number of any model; bounds the lists that an invalid file can create."""
DEEPSEEK_NAMES = MoeNames(shared="mlp.shared_experts")


def read_experts(view: ConfigView, key: str) -> tuple[int, int]:
    """The number of experts, under ``key``, and how many a row uses."""
    experts = expert_number(view, key)
    return experts, read_top_k(view, "num_experts_per_tok", experts)


def expert_number(view: ConfigView, key: str) -> int:
    experts = view.integer(key)
    if experts > MOST_EXPERTS:
        raise view.error(key, f"at most {MOST_EXPERTS} experts are served.", experts)
    return experts


def read_top_k(view: ConfigView, key: str, experts: int) -> int:
    """How many of ``experts`` a row uses."""
    top_k = view.integer(key)
    if top_k > experts:
        raise view.error(key, f"the model has {experts} experts.", top_k)
    return top_k


def dense_first(view: ConfigView, key: str, layers: int) -> list[bool]:
    """Which layers have experts: all but the first ones, whose number is under ``key``."""
    first = view.integer(key, minimum=0)
    return [index >= first for index in range(layers)]


def sparse_kinds(view: ConfigView, key: str, layers: int) -> list[bool]:
    """Which layers have experts, by ``mlp_layer_types`` or else the number of dense first ones under ``key``."""
    first, kinds = dense_first(view, key, layers), view.strings("mlp_layer_types", layers)
    for kind in kinds or ():
        if kind not in ("dense", "sparse"):
            raise view.error("mlp_layer_types", f"{kind} is not supported; dense and sparse are.", kind)
    return first if kinds is None else [kind == "sparse" for kind in kinds]


def sparse_layers(view: ConfigView, layers: int) -> list[bool]:
    """Which layers have experts, by ``decoder_sparse_step`` and ``mlp_only_layers`` (Qwen)."""
    step, dense = view.integer("decoder_sparse_step"), view.raw("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(index) is not int for index in dense):
        raise view.error("mlp_only_layers", "expected a list of layer numbers.", dense)
    return [index not in dense and (index + 1) % step == 0 for index in range(layers)]


def sigmoid_router(view: ConfigView, experts: int, top_k: int) -> RouterSpec:
    """DeepSeek V3's router: sigmoids with a correction, and groups of experts."""
    groups = view.optional_integer("n_group") or 1
    topk_groups = view.optional_integer("topk_group") or groups
    if experts % groups:
        raise view.error("n_group", f"it does not divide the {experts} experts.", groups)
    if topk_groups > groups or (groups > 1 and experts // groups < 2):
        raise view.error("topk_group", f"there are {groups} groups of {experts // groups} experts.", topk_groups)
    if top_k > experts // groups * topk_groups:
        raise view.error("num_experts_per_tok", f"{topk_groups} groups have fewer experts.", top_k)
    return RouterSpec(
        experts,
        top_k,
        score="sigmoid",
        correction=True,
        groups=groups,
        topk_groups=topk_groups,
        norm=1.0 if view.flag("norm_topk_prob") else None,
        scale=view.number("routed_scaling_factor"),
    )


def predictors(view: ConfigView, layers: int) -> tuple[str, ...]:
    """The layers after the last that predict further tokens (MTP): generation does not need them."""
    counts = [view.optional_integer(key, minimum=0) for key in ("num_nextn_predict_layers", "num_mtp_layers")]
    count = next((count for count in counts if count is not None), 1)
    return tuple(f"layers.{index}." for index in range(layers, min(layers + count, MOST_LAYERS)))


def moe_model(
    view: ConfigView,
    sizes: Sizes,
    windows: Sequence[int | None],
    moe: MoeSpec,
    sparse: Sequence[bool] | None = None,
    names: ModuleNames = LLAMA_NAMES,
    **options: Any,
) -> ModelSpec:
    """A model of Llama's layers, one for each window, with ``moe`` in those that are ``sparse`` (None: all).

    ``options`` as of ``llama_layer``; ``partial``: see ``read_rope``.
    """
    rope = read_rope(view, sizes.head_dim, partial=options.pop("partial", False))
    layers = with_experts([llama_layer(view, sizes, window, **options) for window in windows], moe, sparse)
    return finish_spec(view, layers, (rope,), rms(view, "norm"), names=names)


def with_experts(layers: Sequence[LayerSpec], moe: MoeSpec, sparse: Sequence[bool] | None = None) -> list[LayerSpec]:
    """``layers`` with ``moe`` in place of the MLP of those that are ``sparse`` (None: of all)."""
    places = sparse or [True] * len(layers)
    return [replace(layer, mlp=moe) if at else layer for layer, at in zip(layers, places, strict=True)]
