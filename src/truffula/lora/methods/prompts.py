"""PROMPT_TUNING and P_TUNING: n vectors come before the embeddings of every prompt, at positions 0 to n - 1.

They are rows of the embedding table beyond its last, which the engine puts before the prompt's ids. A file of P_TUNING
has what its encoder computed.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from truffula.errors import AdapterError
from truffula.kernels.adapters import Rows, SiteTensors
from truffula.kernels.program import Site
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
from truffula.lora.parsed import Computed, ParsedAdapter

KEY = "prompt_embeddings"


def check_decoder(source: Metadata) -> None:
    """Raise ``AdapterError`` for an adapter of an encoder-decoder."""
    if source.config.get("num_transformer_submodules") not in (None, 1):
        raise AdapterError(
            "num_transformer_submodules is not 1: the adapter is of an encoder-decoder.",
            param="num_transformer_submodules",
        )


def _parse(source: Metadata) -> ParsedAdapter:
    check_decoder(source)
    count, width = int(source.config["num_virtual_tokens"]), source.config.get("token_dim")
    keys = group_keys(source.infos, (), alone=(KEY,))
    info = keys.alone[KEY]
    site = _embedding(source)
    if count < 1 or width not in (None, site.out_features):
        raise AdapterError(
            f"num_virtual_tokens is {count}, token_dim {width}; {source.base.model} has embeddings of width "
            f"{site.out_features}: the adapter was made for another base.",
            param="num_virtual_tokens" if count < 1 else "token_dim",
        )
    check_shape(info, (count, site.out_features), source.base)
    first = site.in_features + source.base.more_ids
    ids = range(first, first + count)

    def make(tensors: Tensors) -> Iterable[SiteTensors]:
        values = as_float32(tensors[KEY]) * np.float32(site.virtual_scale or 1.0)
        yield SiteTensors(site.id, (Rows(np.array(ids, np.int32), values),))

    computed = [Computed("the virtual tokens", (info,), make)]
    return ParsedAdapter(own_settings(), computed=computed, facts=AdapterFacts(virtual_ids=tuple(ids)))


def _embedding(source: Metadata) -> Site:
    site = next((site for site in source.sites if site.kind == "embed"), None)
    if site is None or site.virtual_scale is None:
        raise AdapterError(
            f"{source.base.model} computes more from token ids than one embedding, or cannot be given embeddings: "
            "prompt tuning is not served on it. Train LoRA.",
            param="peft_type",
        )
    return site


PROMPT_TUNING = Method(_parse, "virtual tokens before the prompt")
P_TUNING = Method(_parse, "virtual tokens before the prompt")
