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
from truffula.lora.methods.method import (
    Metadata,
    Method,
    Tensors,
    as_float32,
    check_shape,
    group_keys,
    match,
    products,
    require,
)
from truffula.lora.parsed import Computed, ParsedAdapter
from truffula.lora.saved import Parts
from truffula.weights.checkpoint import TensorInfo

LEAVES = ("lora_A", "lora_B", "lora_E")
_EPSILON = np.float32(1e-5)


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


ADALORA = Method(_parse, "LoRA with the rows of A multiplied by E")
