"""ADALORA: ``W x + s B (E ⊙ (A x))`` is LoRA with A' = E A.

s is ``lora_alpha / (init_r + 1e-5)``, whatever rank a module has kept: PEFT divides by the rank that it began with.
With ``lora_alpha`` 0 or less the module's own rank takes its place. A module may have kept no rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
import numpy as np

from truffula.errors import AdapterError
from truffula.kernels.adapters import SiteTensors
from truffula.lora.fields import FIELDS, Alpha, Field, FieldTable, Rank
from truffula.lora.methods.method import (
    COMMON,
    TARGETS,
    Metadata,
    Method,
    Tensors,
    as_float32,
    check_shape,
    for_training,
    group_keys,
    match,
    no_bias,
    products,
    refused,
    require,
)
from truffula.lora.parsed import Computed, ParsedAdapter
from truffula.lora.saved import Parts
from truffula.weights.checkpoint import TensorInfo

LEAVES = ("lora_A", "lora_B", "lora_E")
_EPSILON = np.float32(1e-5)

_FIELDS = {
    **COMMON,
    **TARGETS,
    "lora_alpha": Field("serve", "scale is lora_alpha / (init_r + 1e-5)", Alpha),
    "init_r": Field("serve", "divides the scale; rank of modules without an entry in rank_pattern", Rank),
    "rank_pattern": Field("check", "must name the ranks that the tensors have", dict[str, list[bool]] | None),
    "r": Field("ignore", "AdaLoRA's rank is init_r"),
    "use_rslora": Field("ignore", "PEFT's AdaLoRA has no such scale"),
    "alpha_pattern": Field("ignore", "PEFT's AdaLoRA has one lora_alpha"),
    **for_training("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    **for_training("init_lora_weights", "qalora_group_size"),
    **{
        name: FIELDS[name]
        for name in (
            "lora_dropout", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config",
            "lora_ga_config", "runtime_config", "velora_config", "monteclora_config", "megatron_core",
        )
    },
    "bias": no_bias("lora_only"),
    **refused(
        "not with AdaLoRA; train LoRA, or without it", "lora_bias", "modules_to_save", "use_dora",
        "trainable_token_indices", "target_parameters", "ensure_weight_tying", "layer_replication",
        "alora_invocation_tokens", "use_qalora", "kasa_config", "use_bdlora", "arrow_config", "megatron_config",
    ),
}  # fmt: skip


class _Settings(msgspec.Struct, frozen=True):
    lora_alpha: float
    init_r: int
    rank_pattern: dict[str, list[bool]] | None = None

    def rank(self, module: str) -> int:
        pattern = self.rank_pattern or {}
        kept = next((pattern[key] for key in (f"{module}.lora_E", f"{module}.lora_E.default") if key in pattern), None)
        return self.init_r if kept is None else sum(kept)

    def scale(self, rank: int) -> float:
        alpha = self.lora_alpha if self.lora_alpha > 0 else float(rank)
        return float(np.float32(alpha) / (np.float32(self.init_r) + _EPSILON))


def _parse(source: Metadata) -> ParsedAdapter:
    settings = msgspec.convert(source.config, _Settings)
    keys = group_keys(source.infos, LEAVES, may_be_empty=True)
    found, parsed = match(source, keys)
    dropped = 0
    for module, parts in found.items():
        a, b, e = require(module, keys.modules[module], *LEAVES)
        rank = settings.rank(module)
        if len(a.shape) == 2 and a.shape[0] != rank:
            raise AdapterError(
                f"{a.name} has rank {a.shape[0]}, but adapter_config.json says {rank} (init_r, rank_pattern).",
                param=a.name,
            )
        for info, shape in ((a, (rank, parts[0][0].in_features)), (b, (parts[0][1].of, rank)), (e, (rank, 1))):
            check_shape(info, shape, source.base)
        if rank:
            make = _maker(parts, a, b, e, settings.scale(rank))
            parsed.computed.append(Computed(module, (a, b, e), make, rank))
        dropped += not rank
    if dropped:
        parsed.warnings.append(f"{dropped} of {len(found)} modules have kept no rank and change nothing.")
    return parsed


def _maker(
    parts: Parts, a: TensorInfo, b: TensorInfo, e: TensorInfo, scale: float
) -> Callable[[Tensors], Iterable[SiteTensors]]:
    def make(tensors: Tensors) -> Iterable[SiteTensors]:
        scaled = as_float32(tensors[e.name]) * as_float32(tensors[a.name])
        return products(parts, scaled, tensors[b.name], scale)

    return make


ADALORA = Method(FieldTable(_FIELDS, ("lora_alpha", "init_r")), _parse, "LoRA with the rows of A multiplied by E")
