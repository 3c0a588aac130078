"""The hyperparameters of a GGUF file, read key by key, and a check of the keys that were not read.

A key that was not read and has an effect on results is an error, an unknown key a warning. Source of the names:
llama.cpp's table of keys (``llama-arch``) and its loader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.weights.gguf_header import GgufHeader

# Known keys without effect on results. A pattern that ends in "." covers all keys under it. The keys of the
# tokenizer are reported where it is read: ``gguf_vocabulary.unread_keys``.
_INERT = re.compile(r"general\.(?!sampling\.)|split\.|quantize\.|tokenizer\.")
# Under the architecture's prefix: without effect on results.
_INERT_HERE = frozenset({"rope.scaling.finetuned", "tensor_data_layout", "vocab_size"})
# Under the architecture's prefix: without effect on results at this value only.
_NEUTRAL: Mapping[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.sliding_window": 0,
    "embedding_scale": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "leading_dense_block_count": 0,
    "logit_scale": 1.0,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
    "residual_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "use_parallel_residual": False,
}
# Under the architecture's prefix: hyperparameters of other architectures. A matching key is an error, not a warning.
_CHANGES = re.compile(
    r"(attention|classifier|convnext|decoder|deepstack|dense_|embedding_length_|expert|full_attention|hash_layer|hidden"
    r"|hyper_connection|interleave|kda|leading_dense|moe|n_deepstack|nextn|norm_|pooling|posnet|rescale|rope|shortconv"
    r"|ssm|swiglu|swin|time_|token_shift|use_|wkv|xielu|.*scale|.*softcapping)"
)


@dataclass(frozen=True)
class HParams:
    """The hyperparameters under the prefix of the file's architecture. Keys are given without the prefix."""

    architecture: str
    header: GgufHeader

    def name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def get(self, key: str, default: Any = None) -> Any:
        return self.header.metadata.get(self.name(key), default)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; a list (one per layer) must repeat one value."""
        name, value = self.name(key), self.get(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModel(f"{name} differs from layer to layer: {value[:8]}…", param=name)
            value = value[0]
        if value is None:
            raise CheckpointError(f"the GGUF metadata key {name} is missing.", param=name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"the GGUF metadata key {name} is {value!r}; it must be a positive integer.", param=name
            )
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number. Stored as float32, so its shortest decimal form is returned (1e-05)."""
        name, value = self.name(key), self.get(key, default)
        if value is None:
            raise CheckpointError(f"the GGUF metadata key {name} is missing.", param=name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"the GGUF metadata key {name} is {value!r}; it must be a finite number.", param=name)
        return float(str(np.float32(value)))

    def at_least(self, key: str, least: float, default: float | None = None) -> float:
        """A finite number of at least ``least``."""
        value = self.real(key, default)
        if value < least:
            name = self.name(key)
            raise CheckpointError(f"the GGUF metadata key {name} is {value}; it must be at least {least}.", param=name)
        return value


def check_unread_keys(header: GgufHeader) -> list[str]:
    """Warnings about the keys that were not read. Call it after all readers except the tokenizer's.

    Raises ``UnsupportedModel`` naming a key that changes what the model computes.
    """
    metadata, unknown = header.metadata, []
    prefix = f"{metadata['general.architecture']}."
    for name in metadata.unread():
        key = name.removeprefix(prefix) if name.startswith(prefix) else ""
        if _INERT.match(name) or key in _INERT_HERE:
            continue
        value = metadata.peek(name)
        if key in _NEUTRAL and value == _NEUTRAL[key]:
            continue
        if key in _NEUTRAL or _CHANGES.match(key):
            raise UnsupportedModel(
                f"the GGUF metadata key {name} ({value!r}) changes what the model computes and is not supported.",
                param=name,
            )
        unknown.append(f"{name} ({str(value)[:40]})")
    if not unknown:
        return []
    more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
    keys = "keys" if len(unknown) > 1 else "key"
    return [f"unknown GGUF metadata {keys}, not used: {', '.join(unknown[:20])}{more}."]
