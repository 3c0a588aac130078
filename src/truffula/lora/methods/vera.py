"""VERA: ``W x + b ⊙ (B (d ⊙ (A x)))`` is LoRA with B' = diag(b) B diag(d). A and B are shared by all modules, which use
the first columns of A and the first rows of B that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from truffula.errors import AdapterError
from truffula.kernels.adapters import SiteTensors
from truffula.kernels.backend import Array
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

LEAVES = ("vera_lambda_b", "vera_lambda_d")
SHARED = ("base_model.vera_A", "base_model.vera_B")


def _parse(source: Metadata) -> ParsedAdapter:
    keys = group_keys(source.infos, LEAVES, alone=SHARED)
    if keys.alone.keys() != set(SHARED):
        raise AdapterError(
            "The file lacks the projections base_model.vera_A and vera_B (save_projection=false): PEFT makes them from "
            "a random seed, and another version of torch may make others. Load the adapter with the torch that trained "
            "it, set save_projection=True in its configuration, and save it again.",
            param="save_projection",
        )
    a, b = (keys.alone[key] for key in SHARED)
    rank = int(source.config["r"])
    found, parsed = match(source, keys)
    shared: dict[int, Array] = {}  # the columns of A by their number, which are stored once
    for module, parts in found.items():
        own_b, own_d = require(module, keys.modules[module], *LEAVES)
        inputs, outputs = parts[0][0].in_features, parts[0][1].of
        check_shape(own_b, (outputs,), source.base)
        check_shape(own_d, (rank,), source.base)
        check_shape(a, (rank, max(inputs, a.shape[-1] if a.shape else 0)), source.base)
        check_shape(b, (max(outputs, b.shape[0] if b.shape else 0), rank), source.base)
        parsed.computed.append(Computed(module, (own_b, own_d, a, b), _maker(parts, own_b, own_d, shared), rank))
    return parsed


def _maker(
    parts: Parts, own_b: TensorInfo, own_d: TensorInfo, shared: dict[int, Array]
) -> Callable[[Tensors], Iterable[SiteTensors]]:
    def make(tensors: Tensors) -> Iterable[SiteTensors]:
        a, b = (tensors[key] for key in SHARED)
        inputs, outputs = parts[0][0].in_features, parts[0][1].of
        scaled = as_float32(tensors[own_b.name])[:, None] * as_float32(b[:outputs]) * as_float32(tensors[own_d.name])
        return products(parts, shared.setdefault(inputs, a[:, :inputs]), scaled, 1.0)

    return make


VERA = Method(_parse, "LoRA, where the file has the projections (save_projection)")
