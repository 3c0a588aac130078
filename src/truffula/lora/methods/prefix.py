"""PREFIX_TUNING: every sequence begins with n tokens of which the file has the keys and values, as they are cached.

The prompt's positions begin at n. Keys are used as stored: they are not rotated. An entry ``2 i`` of the second axis is
the keys of layer i, ``2 i + 1`` its values.
"""

from __future__ import annotations

import numpy as np

from truffula.errors import AdapterError
from truffula.kernels.inputs import Float32
from truffula.lora.base import KvLayer
from truffula.lora.image import AdapterFacts
from truffula.lora.methods.method import (
    Metadata,
    Method,
    Tensors,
    as_float32,
    check_shape,
    group_keys,
    own_settings,
)
from truffula.lora.methods.prompts import KEY, check_decoder
from truffula.lora.parsed import Computed, ParsedAdapter


def _parse(source: Metadata) -> ParsedAdapter:
    check_decoder(source)
    layers = _layers(source)
    names = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
    count, depth, heads, width = (int(source.config[name]) for name in names)
    expected = (len(layers), layers[0].heads, layers[0].heads * layers[0].dim)
    if count < 1 or (depth, heads, width) != expected:
        raise AdapterError(
            f"num_layers, num_attention_heads and token_dim are {depth}, {heads} and {width}; {source.base.model} has "
            f"keys of {expected[0]} layers with {expected[1]} heads, {expected[2]} numbers together: the adapter was "
            "made for another base.",
            param="num_virtual_tokens" if count < 1 else "token_dim",
        )
    info = group_keys(source.infos, (), alone=(KEY,)).alone[KEY]
    check_shape(info, (count, 2 * depth * width), source.base)

    def make(tensors: Tensors) -> Float32:
        values = as_float32(tensors[KEY]).reshape(count, depth, 2, width)
        return np.ascontiguousarray(values.transpose(1, 2, 0, 3))

    first = next((site.in_features for site in source.sites if site.kind == "embed"), 1 << 30)
    first += source.base.more_ids
    facts = AdapterFacts(virtual_ids=tuple(range(first, first + count)), kv_ops=tuple(layer.op for layer in layers))
    computed = [Computed("the prefix of keys and values", (info,), lambda _: (), make_prefix=make)]
    return ParsedAdapter(own_settings(), computed=computed, facts=facts)


def _layers(source: Metadata) -> tuple[KvLayer, ...]:
    found = source.base.need("PREFIX_TUNING").source.kv
    if isinstance(found, str) or not found or len({(layer.heads, layer.dim) for layer in found}) > 1:
        why = found if isinstance(found, str) and found else "its layers have keys of different sizes"
        raise AdapterError(
            f"peft_type is 'PREFIX_TUNING', which is not served on {source.base.model}: {why}. Train prompt tuning or "
            "LoRA.",
            param="peft_type",
            peft_type="PREFIX_TUNING",
        )
    return found


PREFIX_TUNING = Method(_parse, "cached keys and values before the prompt")
