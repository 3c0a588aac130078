"""Rotary tables from a config: every form that transformers reads, every type that does not depend on the length.

Old files have ``rope_theta`` and ``rope_scaling{type | rope_type}``, new ones ``rope_parameters``; Gemma 3 nests one
set per layer type. Frequencies are float32, computed in the order of transformers' ``modeling_rope_utils``. Powers are
computed in float64 and rounded: torch's float32 power differs by up to one unit in the last place between machines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from truffula.errors import UnsupportedModel
from truffula.model.config_view import ConfigView
from truffula.model.spec import RopeSpec

Float32 = npt.NDArray[np.float32]
NESTED = ("full_attention", "sliding_attention")
DEFAULT_THETA = 10_000.0

_KEYS = {
    "default": frozenset[str](),
    "factors": frozenset({"factors"}),  # of a GGUF file: the divisor of each frequency
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
        | {"original_max_position_embeddings"}
    ),
}
_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_UNSUPPORTED = {
    "dynamic": "its table changes with the length of each request",
    "longrope": "its table changes with the length of each request",
    "su": "its table changes with the length of each request",
    "mrope": "image positions are not supported",
    "proportional": "only gemma4 uses it",
    "axial": "it is for image inputs",
}


@dataclass(frozen=True)
class RopeParameters:
    """One checked set of rope parameters: ``values`` are numbers by name, ``theta`` the base, ``label`` its key."""

    kind: str
    theta: float
    partial: float
    values: Mapping[str, float]
    truncate: bool
    label: str
    factors: Float32 | None = None


def read_rope(view: ConfigView, head_dim: int) -> RopeSpec:
    """The table that all layers of a model share. ``head_dim`` is the width of a head."""
    nested, flat, label = _parameters(view)
    if nested:
        raise view.error(label, f"{view.model_type} has one rope configuration for all layers, not one per layer type.")
    theta = _theta(view, "rope_theta", DEFAULT_THETA)
    return rope_table(_check(view, flat, label, theta), head_dim, view)


def read_rope_by_layer_type(
    view: ConfigView, head_dim: int, *, theta_keys: Mapping[str, tuple[str, float]]
) -> dict[str, RopeSpec]:
    """One table per layer type (Gemma 3): ``theta_keys`` give the old key and the default of each type's base.

    A flat old ``rope_scaling`` applies to full layers only; sliding layers are not scaled.
    """
    nested, flat, label = _parameters(view)
    if nested and set(flat) - set(NESTED):
        raise view.error(label, f"no other keys are expected beside {' and '.join(NESTED)}.")
    if flat and not nested and label == "rope_parameters":
        raise view.error(label, f"{view.model_type} needs one set for each of {' and '.join(NESTED)}.")
    tables = {}
    for layer_type, (key, default) in theta_keys.items():
        values = flat.get(layer_type) if nested else (flat if layer_type == "full_attention" else None)
        if values is not None and not isinstance(values, Mapping):
            raise view.error(label, f"{layer_type} must be an object.", values)
        where = f"{label}.{layer_type}" if nested else label
        parameters = _check(view, values or {}, where, _theta(view, key, default))
        if nested and not parameters.truncate:
            raise view.error(f"{where}.truncate", "transformers reads it only outside the nesting.", False)
        tables[layer_type] = rope_table(parameters, head_dim, view)
    return tables


def extended_positions(view: ConfigView, limit: int) -> int:
    """``limit`` (max_position_embeddings), or for yarn the factor times the original length, if that is larger."""
    _, flat, _ = _parameters(view)
    original, factor = flat.get("original_max_position_embeddings"), flat.get("factor")
    kind = flat.get("rope_type", flat.get("type"))
    if kind == "yarn" and isinstance(original, int) and isinstance(factor, int | float):
        return max(limit, int(original * factor))
    return limit


def _parameters(view: ConfigView) -> tuple[bool, Mapping[str, Any], str]:
    """Whether the parameters are nested per layer type, the parameters, and the key that holds them."""
    old, new = view.mapping("rope_scaling"), view.mapping("rope_parameters")
    if old and new and old != new:
        raise view.error("rope_scaling", "rope_parameters is given too and differs.")
    label = "rope_scaling" if old else "rope_parameters"
    values = old or new or {}
    return any(key in values for key in NESTED), values, label


def _theta(view: ConfigView, key: str, default: float) -> float:
    value = view.raw(key)
    return default if value is None else view.number_value(key, value)


def _check(view: ConfigView, values: Mapping[str, Any], label: str, theta: float) -> RopeParameters:
    """Check every key of one set of parameters."""

    def number(key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise UnsupportedModel(
                f"{view.where}: {label}.{key} is {value!r}; it must be a number above zero.",
                param=f"{label}.{key}",
                value=repr(value),
            )
        return float(value)

    kind = values.get("rope_type", values.get("type", "default"))
    if kind is None:
        kind = "default"
    if kind not in _KEYS:
        why = _UNSUPPORTED.get(str(kind), "this kind is unknown")
        raise UnsupportedModel(
            f"{view.where}: {label} asks for rope type {kind!r}: {why}. Supported are {', '.join(sorted(_KEYS))}.",
            param=label,
            value=str(kind),
        )
    for key in values:
        if key in _COMMON or key in _KEYS[kind]:
            continue
        if not any(key in other for other in _KEYS.values()):
            raise view.error(f"{label}.{key}", f"rope type {kind} has no such parameter.", values[key])
        view.warn(f"{label}.{key} has no effect: the rope type is {kind}.")
    read = _KEYS[kind] - {"truncate", "factors"}
    numbers = {key: number(key, values[key]) for key in sorted(read) if values.get(key) is not None}
    factors = np.array(values["factors"], np.float32) if kind == "factors" else None
    truncate = values.get("truncate", True)
    if not isinstance(truncate, bool):
        raise view.error(f"{label}.truncate", "expected true or false.", truncate)
    if values.get("rope_theta") is not None:
        theta = number("rope_theta", values["rope_theta"])
    partial = values.get("partial_rotary_factor")
    if partial is None:
        partial = view.raw("partial_rotary_factor")
    return RopeParameters(
        kind,
        theta,
        1.0 if partial is None else number("partial_rotary_factor", partial),
        numbers,
        truncate,
        label,
        factors,
    )


def rope_table(parameters: RopeParameters, head_dim: int, view: ConfigView) -> RopeSpec:
    """Frequencies ``[dims / 2]`` of checked parameters for heads of width ``head_dim``.

    Raises:
        UnsupportedModel: A parameter is missing or not supported, or they make a frequency infinite.
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # checked below, in words
        table = _rope_table(parameters, head_dim, view)
    if not np.isfinite([*table.inv_freq, table.factor]).all():
        raise view.error(parameters.label, "makes a rotary frequency infinite in float32.", parameters.kind)
    return table


def _rope_table(parameters: RopeParameters, head_dim: int, view: ConfigView) -> RopeSpec:
    # The default table of these architectures rotates the whole head; only the scaled types read the partial factor.
    if parameters.partial != 1.0:
        raise view.error("partial_rotary_factor", "partial rotary embeddings are not supported.", parameters.partial)
    if head_dim % 2:
        raise view.error("head_dim", "a rotary embedding needs an even width.", head_dim)
    inv_freq = _default(parameters.theta, head_dim)
    if parameters.kind == "default":
        return _spec(inv_freq)
    if parameters.factors is not None:
        return _spec(inv_freq / parameters.factors)
    values = {"original_max_position_embeddings": float(view.integer("max_position_embeddings")), **parameters.values}
    if (
        view.optional_integer("original_max_position_embeddings") is not None
    ):  # a value at the top level has priority (Phi-3)
        values["original_max_position_embeddings"] = float(view.integer("original_max_position_embeddings"))
    wanted = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ()}
    for key in wanted[parameters.kind]:
        if key not in values:
            raise UnsupportedModel(
                f"{view.where}: {parameters.label} is of type {parameters.kind} and lacks {key}.",
                param=f"{parameters.label}.{key}",
            )
    if parameters.kind == "linear":
        return _spec(inv_freq / np.float32(values["factor"]))
    if parameters.kind == "llama3":
        return _spec(_llama3(inv_freq, values))
    if "factor" not in values:
        values["factor"] = view.integer("max_position_embeddings") / values["original_max_position_embeddings"]
    return _yarn(parameters, values, head_dim)


def _spec(inv_freq: Float32, factor: float = 1.0) -> RopeSpec:
    return RopeSpec(tuple(float(value) for value in inv_freq), factor)


def _powers(theta: float, dims: int) -> Float32:
    """theta ** (2i / dims) in float32."""
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return np.power(float(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)


def _default(theta: float, dims: int) -> Float32:
    return np.float32(1.0) / _powers(theta, dims)


def _llama3(inv_freq: Float32, values: Mapping[str, float]) -> Float32:
    """Llama 3.1 scaling: short wavelengths are kept, long ones divided by the factor, the others interpolated."""
    factor, low = np.float32(values["factor"]), np.float32(values["low_freq_factor"])
    original = values["original_max_position_embeddings"]
    # torch computes number / tensor as the reciprocal of the tensor times the number, which changes the last bits.
    wavelength = (np.float32(1) / inv_freq) * np.float32(2 * math.pi)
    scaled = np.where(wavelength > np.float32(original / values["low_freq_factor"]), inv_freq / factor, inv_freq)
    span = np.float32(values["high_freq_factor"] - values["low_freq_factor"])
    smooth = ((np.float32(1) / wavelength) * np.float32(original) - low) / span
    blended = (np.float32(1) - smooth) * scaled / factor + smooth * scaled
    long = wavelength > np.float32(original / values["low_freq_factor"])
    short = wavelength < np.float32(original / values["high_freq_factor"])
    return np.where(~short & ~long, blended, scaled).astype(np.float32)


def _yarn(parameters: RopeParameters, values: Mapping[str, float], dims: int) -> RopeSpec:
    """YaRN scaling (Peng et al. 2023): slow pairs are interpolated, fast ones kept; cos and sin get a factor."""
    factor, original, theta = values["factor"], values["original_max_position_embeddings"], parameters.theta

    def magnitude(mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention = values.get("attention_factor")
    if attention is None:
        mscale, all_dim = values.get("mscale"), values.get("mscale_all_dim")
        attention = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude()

    def pair_of(rotations: float) -> float:
        return (dims * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = pair_of(values.get("beta_fast", 32.0)), pair_of(values.get("beta_slow", 1.0))
    if parameters.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001  # as transformers does, to avoid a division by zero
    steps = (np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = np.float32(1) - np.clip(steps, np.float32(0), np.float32(1))
    powers = _powers(theta, dims)
    interpolated, original_freq = np.float32(1) / (np.float32(factor) * powers), np.float32(1) / powers
    return _spec(interpolated * (np.float32(1) - keep) + original_freq * keep, attention)
