"""The hyperparameters of a GGUF file, read key by key, its rotary scaling, and a check of the keys that were not read.

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

from truffula.errors import CheckpointError, UnsupportedModel, some
from truffula.weights.gguf.header import GgufHeader

# Known keys without effect on results. A pattern that ends in "." covers all keys under it. The keys of the
# tokenizer are reported where it is read: ``vocabulary.unread_keys``.
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
ROPE_FREQS = "rope_freqs.weight"
TABLES = (ROPE_FREQS, "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are not the model's, but say how it is rotated."""
_OF_YARN = ("original_context_length", "yarn_beta_fast", "yarn_beta_slow")


@dataclass(frozen=True)
class HParams:
    """The hyperparameters under the prefix of the file's architecture. Keys are given without the prefix.

    ``tables`` are the values of the file's ``TABLES``; each is removed when it is read.
    """

    architecture: str
    header: GgufHeader
    tables: dict[str, Any]

    def name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def get(self, key: str, default: Any = None) -> Any:
        return self.header.metadata.get(self.name(key), default)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; a list (one per layer) must repeat one value."""
        value = self._required(key, default)
        if isinstance(value, list) and value:
            if len(set(value)) != 1:
                raise self.unsupported(key, f"differs from layer to layer: {value[:8]}…")
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, f"is {value!r}; it must be a positive integer.")
        return value

    def some(self, key: str, default: int | None = None) -> int:
        """``count``, in which a list has zeros for layers without what is counted."""
        each = self.get(key)
        if not isinstance(each, list) or any(type(count) is not int or count < 0 for count in each):
            return self.count(key, default)
        found = set(each) - {0}
        return found.pop() if len(found) == 1 else self.count(key, default)

    def optional(self, key: str) -> int:
        """A count that may be missing or 0."""
        return self.count(key) if self.get(key) else 0

    def flag(self, key: str, default: bool | None = False) -> bool:
        """A boolean; with the default None the file must have it."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {value!r}; it must be true or false.")
        return value

    def each(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """A positive integer for each layer; a single one is that of all."""
        value = self._required(key, default)
        if not isinstance(value, list):
            return [self.count(key, default)] * layers
        if len(value) != layers or any(type(item) is not int or item < 1 for item in value):
            raise self.error(key, f"is {str(value)[:80]}; it must have {layers} positive integers, one per layer.")
        return value

    def numbers(self, name: str, layers: int) -> list[float]:
        """A finite number for each layer, under the whole name of a key; a single one is that of all."""
        value = self.header.metadata.get(name)
        each: list[Any] = value if isinstance(value, list) else [value] * layers
        numeric = all(isinstance(item, int | float) and not isinstance(item, bool) for item in each)
        if len(each) != layers or not numeric or not all(map(math.isfinite, each)):
            why = f"it must have {layers} finite numbers, one per layer"
            raise CheckpointError(f"the GGUF metadata key {name} is {str(value)[:80]}; {why}.", param=name)
        return each

    def has(self, tensor: str) -> bool:
        """Whether some layer has this tensor."""
        return any(name.endswith(f".{tensor}") for name in self.header.tensors)

    def quotient(self, key: str, by: str) -> int:
        whole, count = self.count(key), self.count(by)
        if whole % count:
            raise self.error(by, f"is {count}, which does not divide {self.name(key)}, {whole}.")
        return whole // count

    def listed(self, key: str, kind: type) -> list[Any]:
        """A list with an item for each layer, also for those that predict further tokens."""
        each, layers = self.get(key), self.count("block_count")
        if not isinstance(each, list) or len(each) != layers or any(type(item) is not kind for item in each):
            shown = f"a list of {len(each)}" if isinstance(each, list) else repr(each)
            raise self.error(key, f"is {shown}; expected a list of {layers} of type {kind.__name__}.")
        return each

    def attends(self) -> list[bool]:
        """Which layers have KV heads."""
        return [count > 0 for count in self.listed("attention.head_count_kv", int)]

    def real(self, key: str, default: float | None = None, *, least: float | None = None) -> float:
        """A finite number of at least ``least``: the shortest decimal form (1e-05) of the stored float32."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(key, f"is {value!r}; it must be a finite number.")
        if least is not None and value < least:
            raise self.error(key, f"is {value}; it must be at least {least}.")
        return float(str(np.float32(value)))

    def only(self, key: str, found: Any, *supported: Any) -> None:
        """Raise ``UnsupportedModel`` unless ``found``, the value of the key, is one that is ``supported``."""
        if found not in supported:
            raise self.unsupported(key, f"is {found}; it must be {' or '.join(map(str, supported))}.")

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise self.error(key, "is missing.")
        return value

    def error(self, key: str, why: str) -> CheckpointError:
        return CheckpointError(f"the GGUF metadata key {self.name(key)} {why}", param=self.name(key))

    def unsupported(self, key: str, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"the GGUF metadata key {self.name(key)} {why}", param=self.name(key))


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
    return [f"unknown GGUF metadata, not used: {some(unknown, 20)}."] if unknown else []


def rope_parameters(
    hparams: HParams, theta: float | None, factors: Any, width: int, warnings: list[str]
) -> dict[str, Any]:
    """``rope_parameters`` of config.json, for heads ``width`` wide.

    ``theta`` is the default base, None where the file must give it; ``factors`` are the values of
    ``rope_freqs.weight``, or None.

    As in llama.cpp's loader, a file without ``rope.scaling.type`` is scaled linearly by ``rope.scaling.factor`` (or
    the older ``rope.scale_linear``), a factor of 0 means none, and type ``none`` disables scaling whatever the factor.

    Raises:
        UnsupportedModel: a type of scaling that is not supported, or two kinds at once.
        CheckpointError: a value of the wrong kind or range.
    """
    kind = hparams.get("rope.scaling.type", "linear")
    base: dict[str, Any] = {"rope_type": "default", "rope_theta": hparams.real("rope.freq_base", theta)}
    older = hparams.real("rope.scale_linear", 0.0, least=0.0)
    factor = hparams.real("rope.scaling.factor", older, least=0.0) or 1.0
    yarn = {key: hparams.get(f"rope.scaling.{key}") for key in _OF_YARN}
    table = next((item for item in TABLES[1:] if item in hparams.tables), ROPE_FREQS if factors is not None else "")
    if kind not in ("none", "linear", "yarn", *(("longrope",) if table in TABLES[1:] else ())):
        why = f"none, linear and yarn are supported, and longrope with {TABLES[1]} and {TABLES[2]}"
        raise hparams.unsupported("rope.scaling.type", f"is {kind!r}; {why}.")
    if kind == "none":
        factor = 1.0
    if table and (kind == "yarn" or factor != 1.0):
        raise UnsupportedModel(
            f"both {table} and a rope scaling ({kind}, factor {factor}) are given; one is supported.", param=table
        )
    if table in TABLES[1:]:
        return _longrope(hparams, base)
    # The original length is without effect, too, where it is the whole one.
    unscaled = {_OF_YARN[0]: hparams.get("context_length")} if kind != "yarn" else yarn
    ignored = [key for key, value in yarn.items() if value not in (None, unscaled.get(key))]
    if ignored:
        names = ", ".join(hparams.name(f"rope.scaling.{key}") for key in ignored)
        warnings.append(f"{names}: no effect, because {hparams.name('rope.scaling.type')} is {kind}.")
    if factors is not None:
        return _from_table(factors, base["rope_theta"], width)
    if kind == "yarn":
        return {**base, "rope_type": "yarn", "factor": factor, **_yarn(hparams)}
    return base if factor == 1.0 else {**base, "rope_type": "linear", "factor": factor}


def _longrope(hparams: HParams, base: Mapping[str, Any]) -> dict[str, Any]:
    """Two tables of divisors: of sequences up to the original length, and of longer ones."""
    found = {}
    for name, key in zip(TABLES[1:], ("long_factor", "short_factor"), strict=True):
        if name not in hparams.tables:
            raise CheckpointError(f"{name} is missing; the file has the other table of longrope.", param=name)
        table = np.asarray(hparams.tables.pop(name), np.float32).reshape(-1)
        if not np.isfinite(table).all() or table.size == 0 or table.min() <= 0:
            raise CheckpointError(f"{name} holds factors that are not positive numbers.", param=name)
        found[key] = table.tolist()
    key = "rope.scaling.original_context_length"
    original, longest = hparams.count(key, None), hparams.count("context_length")
    stored, scale = hparams.real("rope.scaling.attn_factor", 1.0), longest / original
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 and original > 1 else 1.0
    # The file has it in float32: where that is the usual one, it is left to be computed exactly.
    given = {} if np.float32(stored) == np.float32(usual) else {"attention_factor": stored}
    return {**base, "rope_type": "longrope", **found, "original_max_position_embeddings": original, **given}


def _yarn(hparams: HParams) -> dict[str, Any]:
    # 0 means the same as a missing key: the trained length.
    key = "rope.scaling.original_context_length"
    found: dict[str, Any] = {
        "original_max_position_embeddings": hparams.count(key if hparams.get(key) else "context_length")
    }
    for name in ("beta_fast", "beta_slow"):
        if hparams.get(f"rope.scaling.yarn_{name}") is not None:
            found[name] = hparams.real(f"rope.scaling.yarn_{name}")
    return found


def _from_table(factors: Any, theta: float, width: int) -> dict[str, Any]:
    """``rope_parameters`` with the table of factors, of which ``llama3`` scaling with its four numbers is a case."""
    factors = np.asarray(factors, np.float64).reshape(-1)
    if 2 * factors.size != width:
        raise CheckpointError(f"{ROPE_FREQS} holds {factors.size} factors for heads {width} wide.", param=ROPE_FREQS)
    if not np.isfinite(factors).all() or factors.min() <= 0:
        raise CheckpointError(f"{ROPE_FREQS} holds factors that are not positive numbers.", param=ROPE_FREQS)
    if np.all(factors == 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "factors", "rope_theta": theta, "factors": factors.tolist()}
