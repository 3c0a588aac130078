"""IA3: ``l ⊙ (W x + b)``, or ``W (l ⊙ x) + b`` for a feed-forward module. The file tells which: l is [out, 1] or
[1, in]."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from truffula.errors import AdapterError
from truffula.kernels.adapters import Bias, ColumnScale, InputScale, Part, SiteTensors
from truffula.lora.methods.method import (
    Metadata,
    Method,
    Tensors,
    as_float32,
    check_shape,
    group_keys,
    match,
    require,
)
from truffula.lora.parsed import BaseFacts, Computed, ParsedAdapter
from truffula.lora.patterns import compiled
from truffula.lora.saved import Parts
from truffula.weights.checkpoint import TensorInfo

_LEAF = "ia3_l"
_Names = str | list[str] | None


def _parse(source: Metadata) -> ParsedAdapter:
    keys = group_keys(source.infos, (_LEAF,))
    found, parsed = match(source, keys)
    is_feedforward = _matcher(source.config.get("feedforward_modules"))
    for module, parts in found.items():
        (info,) = require(module, keys.modules[module], _LEAF)
        inputs, outputs = parts[0][0].in_features, parts[0][1].of
        scales_input = info.shape == (1, inputs)
        check_shape(info, (1, inputs) if scales_input else (outputs, 1), source.base)
        if is_feedforward is not None and is_feedforward(module) != scales_input:
            what = "scales its input" if scales_input else "scales its output"
            raise AdapterError(
                f"{info.name} {what}, but feedforward_modules says otherwise of {module}. One of the two files is of "
                "another adapter, or was edited.",
                param="feedforward_modules",
                key=info.name,
            )
        make = _maker(parts, info, source.base, scales_input=scales_input)
        parsed.computed.append(Computed(module, (info,), make))
    return parsed


def _matcher(named: Any) -> Callable[[str], bool] | None:
    """Whether a module is one of ``feedforward_modules``, by PEFT's rules; None: the configuration does not say."""
    if named is None:
        return None
    if isinstance(named, str):
        pattern = compiled(named, "feedforward_modules")
        return lambda module: pattern.fullmatch(module) is not None
    return lambda module: any(module.endswith(name) for name in named)


def _maker(
    parts: Parts, info: TensorInfo, base: BaseFacts, *, scales_input: bool
) -> Callable[[Tensors], Iterable[SiteTensors]]:
    def make(tensors: Tensors) -> Iterable[SiteTensors]:
        vector = as_float32(tensors[info.name]).reshape(-1)
        for site, rows in parts:
            if scales_input:
                yield SiteTensors(site.id, (InputScale(vector),))
                continue
            factor = rows.rows(vector)
            made: list[Part] = [ColumnScale(factor)]
            if (bias := base.need("IA3").bias(site)) is not None:
                made.append(Bias((factor - 1) * bias))
            yield SiteTensors(site.id, tuple(made))

    return make


IA3 = Method(_parse, "scales of inputs and outputs, also of biases")
