"""The module names of other trainers' exports, renamed to those of the base.

Tinker calls the head ``model.unembed_tokens``. Megatron has ``decoder.layers.N.self_attention.linear_qkv`` and
``linear_proj``, ``mlp.linear_fc1`` and ``linear_fc2``: ``linear_qkv`` has the rows of q, k and v of each KV head in
turn, ``linear_fc1`` all gates, then all ups.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from truffula.errors import AdapterError
from truffula.kernels.program import RowOrder, Site
from truffula.lora.fields import LoraSettings
from truffula.lora.keys import KeyPlan

if TYPE_CHECKING:
    from truffula.lora.parsed import Sites

_MEGATRON = re.compile(
    r"(?:.+\.)?decoder\.layers\.(?P<layer>\d+)\.(?:self_attention|mlp)\.(?P<leaf>linear_(?:qkv|proj|fc1|fc2))"
)
_LEAVES = {"linear_qkv": ("q_proj", "k_proj", "v_proj"), "linear_proj": ("o_proj",),
           "linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": ("down_proj",)}  # fmt: skip


@dataclass(frozen=True)
class Renamed:
    """``names``: a module of the file → the base's. ``orders``: how rows of B are stored, by the base's name."""

    names: dict[str, str] = field(default_factory=dict)
    orders: dict[str, RowOrder] = field(default_factory=dict)

    def stored_name(self, module: str) -> str:
        """The name that the file has for a module of the base: patterns are written for it."""
        return next((old for old, new in self.names.items() if new == module), module)


def rename(plan: KeyPlan, sites: Sites, kv_heads: Mapping[int, int]) -> Renamed:
    """The names of ``plan`` that are another trainer's, which are replaced in it. ``kv_heads`` by layer.

    Raises:
        AdapterError: The base has no such modules, or the order of their rows is not known.
    """
    made = Renamed()
    for module in plan.modules():
        if module.rpartition(".")[2] == "unembed_tokens" and module not in sites.by_name:
            made.names[module] = sites.head_name
        elif (found := _MEGATRON.fullmatch(module)) is not None:
            own = _own_sites(sites, int(found["layer"]), _LEAVES[found["leaf"]])
            shared = _shared_name(own, sites)
            if shared is None:
                raise AdapterError(
                    f"{module} is a module of Megatron, and the base has nothing of its kind in layer "
                    f"{found['layer']}. Export the adapter for the Hugging Face model.",
                    param=plan.a.get(module, module),
                )
            made.names[module] = shared
            if whole := plan.weights.get(module) or plan.biases.get(module) or plan.copies.get(module):
                raise AdapterError(
                    f"{whole} is a whole tensor of a module of Megatron, of which only LoRA is served. Export the "
                    "adapter for the Hugging Face model.", param=whole,
                )  # fmt: skip
            if found["leaf"] == "linear_qkv":
                made.orders[shared] = _order(own, kv_heads.get(int(found["layer"]), 0), module)
    plan.rename(made.names)
    return made


def renamed_settings(settings: LoraSettings, renamed: Renamed) -> LoraSettings:
    """``settings`` whose list of targets has the base's names, too."""
    targets = settings.target_modules
    if not isinstance(targets, list):
        return settings
    more = [new for old, new in renamed.names.items() if any(old == t or old.endswith(f".{t}") for t in targets)]
    known = [t for t in targets if t not in _LEAVES and t != "unembed_tokens"]
    return msgspec.structs.replace(settings, target_modules=[*known, *more])


def _own_sites(sites: Sites, layer: int, leaves: tuple[str, ...]) -> list[Site]:
    found = {site.module.rpartition(".")[2]: site for site in sites.all if site.layer == layer and not site.stacked}
    return [found[leaf] for leaf in leaves if leaf in found]


def _shared_name(own: list[Site], sites: Sites) -> str | None:
    """The name of the one module that has the rows of all of these sites."""
    if not own:
        return None
    every = [{sites.name_of(site, module) for module in site.modules} for site in own]
    rows = sum(site.out_features for site in own)
    common = set.intersection(*every)
    whole = [name for name in common if sites.by_name[name][0][1].of == rows]
    return min(whole, default=None)


def _order(own: list[Site], kv_heads: int, module: str) -> RowOrder:
    q, k, v = (site.out_features for site in own)
    if kv_heads < 1 or q % kv_heads or k % kv_heads or v != k:
        raise AdapterError(f"{module}: the order of its rows is not known for this base.", param="target_modules")
    return RowOrder(kv_heads, (q // kv_heads, k // kv_heads, v // kv_heads))
