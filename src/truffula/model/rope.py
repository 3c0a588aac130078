"""Rotary tables from a config: every form that transformers reads.

Old files have ``rope_theta`` and ``rope_scaling{type | rope_type}``, new ones ``rope_parameters``; Gemma 3 nests one
set per layer type. Frequencies are float32, computed in the order of transformers' ``modeling_rope_utils``. Powers are
computed in float64 and rounded: torch's float32 power differs by up to one unit in the last place between machines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from truffula.model.config_view import MOST, ConfigView
from truffula.model.spec import RopeSpec

Float32 = npt.NDArray[np.float32]
NESTED = ("full_attention", "sliding_attention")
DEFAULT_THETA = 10_000.0
MOST_WIDTH = 1 << 16
"""Far above the width of any head; bounds the table that an invalid config can create."""
_ALPHA = "dynamic with alpha"
_ORIGINAL = "original_max_position_embeddings"
_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "dynamic": ("factor",),
    "longrope": ("factor", "attention_factor", _ORIGINAL),
    _ALPHA: ("alpha",),
    "proportional": ("factor",),
    "factors": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", _ORIGINAL),
}
# Parameters of other types than a number. ``factors`` (of a GGUF file): the divisor of each frequency.
_OTHERS: Mapping[str, tuple[str, ...]] = {
    "factors": ("factors",),
    "longrope": ("long_factor", "short_factor"),
    "yarn": ("truncate",),
}
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_UNSUPPORTED = {
    "mrope": "image positions are not supported",
    "axial": "it is for image inputs",
}


@dataclass(frozen=True)
class RopeKeys:
    """What differs between the classes of transformers: the old keys of the base and of the rotated part of a head, and
    other names of rope types."""

    theta: str = "rope_theta"
    factor: str = "partial_rotary_factor"
    aliases: tuple[tuple[str, str], ...] = ()


USUAL_KEYS = RopeKeys()


def read_rope(
    view: ConfigView, head_dim: int, *,
    partial: bool | float = False, more: Collection[str] = (), keys: RopeKeys = USUAL_KEYS,
) -> RopeSpec:  # fmt: skip
    """The table that all layers of a model share. ``head_dim`` is the width of a head.

    ``partial``: the architecture rotates only the first ``partial_rotary_factor`` of a head; a number is the value
    where the config has none. ``more`` are parameters that only this architecture has: ``alpha`` stretches the base of
    the type ``dynamic``; it reads the others itself.
    """
    nested, flat, label = _parameters(view)
    if nested:
        raise view.error(label, f"{view.model_type} has one rope configuration for all layers, not one per layer type.")
    if flat is view.defaults.fields.get("rope_parameters") and view.raw("rope_theta") not in (None, flat["rope_theta"]):
        raise view.error("rope_theta", f"{view.defaults.class_name} reads it only with rope_parameters.")
    theta, defaults = _theta(view, keys.theta, view.defaults.rope_theta), view.defaults
    for usual, own, value in (
        ("rope_theta", keys.theta, theta),
        ("partial_rotary_factor", keys.factor, view.raw(keys.factor) or defaults.partial_rotary_factor),
    ):
        if own != usual and view.raw(usual) not in (None, value):
            raise view.error(usual, f"{view.model_type} reads {own}, which differs.")
    return _table(view, flat, label, theta, head_dim, partial=partial, more=more, keys=keys)


def has_rope(view: ConfigView) -> bool:
    """Whether the parameters are not written, or give a base (OLMo Hybrid: none where it is null)."""
    written = view.mapping("rope_parameters")
    if not written or written.get("rope_theta", 0) is not None:
        return True
    if written.get("rope_type", "default") != "default":
        raise view.error("rope_parameters.rope_theta", "null is supported for rope_type default alone.", written)
    return False


def rope_parameter(view: ConfigView, key: str) -> float:
    """A parameter of the rope that the architecture itself reads."""
    _, flat, label = _parameters(view)
    if flat.get(key) is None:
        raise view.error(f"{label}.{key}", f"{view.model_type} needs it.")
    return view.number_value(f"{label}.{key}", flat[key], positive=False)


def read_rope_by_layer_type(
    view: ConfigView,
    head_dim: int | Mapping[str, int],
    *,
    theta_keys: Mapping[str, tuple[str, float]],
    partial: Mapping[str, float] | None = None,
) -> dict[str, RopeSpec]:
    """One table per layer type (Gemma 3): ``theta_keys`` give the old key and the default of each type's base;
    ``head_dim`` is the width of a head, or that of each type. ``partial``: a part of a head may be rotated, by default
    this one.

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
        if nested and values and values.get("truncate") is False:
            raise view.error(f"{where}.truncate", "transformers reads it only outside the nesting.", False)
        width = head_dim if isinstance(head_dim, int) else head_dim[layer_type]
        values = values or {}
        if partial is not None:
            values = {"partial_rotary_factor": partial[layer_type], **values}
        tables[layer_type] = _table(view, values, where, _theta(view, key, default), width, partial=partial is not None)
    return tables


def default_rope(theta: float, dims: int) -> RopeSpec:
    """The unscaled table that rotates ``dims`` columns of a head."""
    return RopeSpec(_floats(np.float32(1) / _powers(theta, dims)))


def extended_positions(view: ConfigView, limit: int) -> int:
    """``limit`` (max_position_embeddings), or the factor times the original length if that is larger: of yarn, and of
    dynamic, whose original length is ``limit``."""
    _, flat, _ = _parameters(view)
    kind, factor = flat.get("rope_type", flat.get("type")), flat.get("factor")
    original = limit if kind == "dynamic" else flat.get(_ORIGINAL)
    if kind in ("dynamic", "yarn") and isinstance(original, int) and factor is not None:
        return max(limit, int(min(original * float(factor), MOST)))  # the table has checked both
    return limit


def attention_magnitude(view: ConfigView) -> float:
    """What latent attention multiplies q and k by: of ``mscale_all_dim``, where the rope is scaled."""
    _, flat, label = _parameters(view)
    if not flat.get("mscale_all_dim") or flat.get("rope_type", flat.get("type")) in (None, "default"):
        return 1.0
    if flat.get("factor") is None:
        raise view.error(f"{label}.factor", "mscale_all_dim needs it.")
    factor, mscale = (view.number_value(f"{label}.{key}", flat[key]) for key in ("factor", "mscale_all_dim"))
    found = _magnitude(factor, mscale)
    if not math.isfinite(found * found):
        raise view.error(f"{label}.mscale_all_dim", "scores would be infinite.", mscale)
    return found


def _parameters(view: ConfigView) -> tuple[bool, Mapping[str, Any], str]:
    """Whether the parameters are nested per layer type, the parameters, and the key that holds them."""
    old, new = view.mapping("rope_scaling"), view.mapping("rope_parameters")
    if old and view.values.get("rope_parameters") and old != new:
        raise view.error("rope_scaling", "rope_parameters is given too and differs.")
    label = "rope_scaling" if old else "rope_parameters"
    values = old or new or view.defaults.fields.get("rope_parameters") or {}
    return any(key in values for key in NESTED), values, label


def _theta(view: ConfigView, key: str, default: float) -> float:
    value = view.raw(key)
    return default if value is None else view.number_value(key, value)


def _table(
    view: ConfigView,
    values: Mapping[str, Any],
    label: str,
    theta: float,
    head_dim: int,
    *,
    partial: bool | float = False,
    more: Collection[str] = (),
    keys: RopeKeys = USUAL_KEYS,
) -> RopeSpec:
    """The table that ``values`` (found under ``label``) describe. ``theta`` is the base where they give none.

    Raises:
        UnsupportedModel: A parameter is missing, unknown or not supported, or they make a frequency infinite.
    """
    kind = _kind(view, values, label, more, keys.aliases)
    given = {key: values[key] for key in ("rope_theta", *_NUMBERS[kind]) if values.get(key) is not None}
    numbers = {key: view.number_value(f"{label}.{key}", value) for key, value in given.items()}
    dims = _rotated(view, values, head_dim, partial or kind == "proportional", keys.factor)
    for key in _REQUIRED.get(kind, ()):
        if key not in numbers:
            raise view.error(f"{label}.{key}", f"rope type {kind} needs it.")
    try:
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # checked below
            numbers = {"rope_theta": theta, **numbers}
            if kind in _BY_LENGTH:
                table = _BY_LENGTH[kind](view, values, label, numbers, dims)
            else:
                inv_freq, factor = _frequencies(view, kind, values, label, numbers, dims, head_dim)
                table = RopeSpec(_floats(inv_freq), factor)
        finite = bool(np.isfinite([*table.inv_freq, *table.long_freq, table.factor]).all())
    except (ArithmeticError, ValueError):  # of Python's floats
        finite = False
    if not finite:
        raise view.error(label, "makes a rotary frequency infinite in float32.", kind)
    return table


def _rotated(view: ConfigView, values: Mapping[str, Any], head_dim: int, partial: bool | float, key: str) -> int:
    """The number of columns of a head that are rotated."""
    share, outer = values.get("partial_rotary_factor"), view.raw(key)
    share = outer if share is None else share
    default = view.defaults.partial_rotary_factor if isinstance(partial, bool) else partial
    share = default if share is None else share
    share = 1.0 if share is None else view.number_value(key, share)
    # Where an architecture rotates the whole head, only transformers' scaled types read the factor.
    if share != 1 and not partial:
        raise view.error(key, f"partial rotary embeddings are not supported for {view.model_type}.", share)
    if share > 1:
        raise view.error(key, "it must be at most 1.", share)
    dims = int(head_dim * share)
    if dims % 2 or not 0 < dims <= MOST_WIDTH:
        why = f"a rotary embedding needs an even width of at most {MOST_WIDTH}; {dims} columns would be rotated."
        raise view.error("head_dim", why, head_dim)
    return dims


def _kind(
    view: ConfigView,
    values: Mapping[str, Any],
    label: str,
    more: Collection[str],
    aliases: tuple[tuple[str, str], ...],
) -> str:
    """The rope type. A key of ``values`` that only another type reads is a warning, an unknown key an error."""
    kind = values.get("rope_type", values.get("type"))
    kind = "default" if kind is None else kind
    kind = dict(aliases).get(kind, kind) if isinstance(kind, str) else kind
    if kind == "dynamic" and "alpha" in more and values.get("alpha"):
        kind = _ALPHA
    if not isinstance(kind, str) or kind not in _NUMBERS:
        why = _UNSUPPORTED.get(str(kind), "this type is unknown")
        raise view.error(f"{label}.rope_type", f"{why}. Supported are {', '.join(sorted(_NUMBERS))}.", kind)
    for key in values:
        if key in _COMMON or key in (*_NUMBERS[kind], *_OTHERS.get(kind, ()), *more):
            continue
        if not any(key in keys for keys in (*_NUMBERS.values(), *_OTHERS.values())):
            raise view.error(f"{label}.{key}", f"rope type {kind} has no such parameter.", values[key])
        view.warn(f"{label}.{key} has no effect: the rope type is {kind}.")
    return kind


def _frequencies(
    view: ConfigView,
    kind: str,
    values: Mapping[str, Any],
    label: str,
    numbers: dict[str, float],
    dims: int,
    head_dim: int,
) -> tuple[Float32, float]:
    """``[dims / 2]`` frequencies, and the factor of cos and sin; proportional has zeros for the rest of the head."""
    theta = numbers["rope_theta"]
    if kind == "proportional":
        scaled = np.float32(1.0) / _powers(theta, head_dim) / np.float32(numbers.get("factor", 1.0))
        return np.where(np.arange(head_dim // 2) < dims // 2, scaled, np.float32(0)), 1.0
    if kind == _ALPHA:
        theta *= numbers["alpha"] ** (dims / (dims - 2))
    inv_freq: Float32 = np.float32(1.0) / _powers(theta, dims)
    if kind in ("default", _ALPHA):
        return inv_freq, 1.0
    if kind == "factors":
        factors = values.get("factors")
        if not isinstance(factors, list) or len(factors) != dims // 2:
            raise view.error(f"{label}.factors", f"expected a list of {dims // 2} numbers.", factors)
        divisors: Float32 = np.array([view.number_value(f"{label}.factors", item) for item in factors], np.float32)
        return inv_freq / divisors, 1.0
    if kind == "linear":
        return inv_freq / np.float32(numbers["factor"]), 1.0
    longest, original = _lengths(view, numbers)
    if kind == "llama3":
        return _llama3(inv_freq, numbers, original), 1.0
    truncate = values.get("truncate", True)
    if not isinstance(truncate, bool):
        raise view.error(f"{label}.truncate", "expected true or false.", truncate)
    return _yarn({"factor": longest / original, **numbers}, original, dims, truncate)


def _lengths(view: ConfigView, numbers: Mapping[str, float]) -> tuple[int, float]:
    """max_position_embeddings, and the length before scaling: a value at the top level has priority (Phi-3)."""
    longest, top = view.integer("max_position_embeddings"), view.optional_integer(_ORIGINAL)
    return longest, float(top or numbers.get(_ORIGINAL, longest))


def _dynamic(view: ConfigView, _: Mapping[str, Any], label: str, numbers: Mapping[str, float], dims: int) -> RopeSpec:
    """Dynamic NTK scaling: beyond max_position_embeddings the base grows with the length."""
    if dims < 4:
        raise view.error(f"{label}.rope_type", "dynamic needs heads with more than two rotated columns.", "dynamic")
    if numbers["factor"] < 1:
        raise view.error(f"{label}.factor", "it must be at least 1.", numbers["factor"])
    border = view.integer("max_position_embeddings")
    freq = np.float32(1) / _powers(numbers["rope_theta"], dims)
    return RopeSpec(_floats(freq), border=border, growth=numbers["factor"])


def _longrope(
    view: ConfigView, values: Mapping[str, Any], label: str, numbers: Mapping[str, float], dims: int
) -> RopeSpec:
    """LongRoPE scaling (Ding et al. 2024): one list of divisors up to the original length, another beyond it."""
    powers, tables = _powers(numbers["rope_theta"], dims), []
    for key in ("short_factor", "long_factor"):
        given = values.get(key)
        if not isinstance(given, list) or len(given) != dims // 2:
            raise view.error(f"{label}.{key}", f"rope type longrope needs a list of {dims // 2} numbers.", given)
        divisors = np.array([view.number_value(f"{label}.{key}", item) for item in given], np.float32)
        tables.append(_floats(np.float32(1) / (divisors * powers)))
    longest, original = _lengths(view, numbers)
    if not original.is_integer() or original < 2:
        raise view.error(f"{label}.{_ORIGINAL}", "it must be a whole number of at least 2.", original)
    scale = numbers.get("factor", longest / original)
    factor = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
    factor = numbers.get("attention_factor", factor)
    return RopeSpec(tables[0], factor, border=int(original), long_freq=tables[1])


_BY_LENGTH: Mapping[str, Callable[[ConfigView, Mapping[str, Any], str, Mapping[str, float], int], RopeSpec]] = (
    MappingProxyType({"dynamic": _dynamic, "longrope": _longrope})
)


def _floats(values: Float32) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _powers(theta: float, dims: int) -> Float32:
    """theta ** (2i / dims) in float32."""
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return np.power(float(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)


def _llama3(inv_freq: Float32, values: Mapping[str, float], original: float) -> Float32:
    """Llama 3.1 scaling: short wavelengths are kept, long ones divided by the factor, the others interpolated."""
    factor, low = np.float32(values["factor"]), np.float32(values["low_freq_factor"])
    # torch computes number / tensor as the reciprocal of the tensor times the number, which changes the last bits.
    wavelength = (np.float32(1) / inv_freq) * np.float32(2 * math.pi)
    scaled = np.where(wavelength > np.float32(original / values["low_freq_factor"]), inv_freq / factor, inv_freq)
    span = np.float32(values["high_freq_factor"] - values["low_freq_factor"])
    smooth = ((np.float32(1) / wavelength) * np.float32(original) - low) / span
    blended = (np.float32(1) - smooth) * scaled / factor + smooth * scaled
    long = wavelength > np.float32(original / values["low_freq_factor"])
    short = wavelength < np.float32(original / values["high_freq_factor"])
    return np.where(~short & ~long, blended, scaled).astype(np.float32)


def _magnitude(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(values: Mapping[str, float], original: float, dims: int, truncate: bool) -> tuple[Float32, float]:
    """YaRN scaling (Peng et al. 2023): slow pairs are interpolated, fast ones kept; cos and sin get a factor."""
    factor, theta = values["factor"], values["rope_theta"]
    attention = values.get("attention_factor")
    if attention is None:
        mscale, all_dim = values.get("mscale"), values.get("mscale_all_dim")
        attention = _magnitude(factor)
        if mscale and all_dim:
            attention = _magnitude(factor, mscale) / _magnitude(factor, all_dim)

    def pair_of(rotations: float) -> float:
        return (dims * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = pair_of(values.get("beta_fast", 32.0)), pair_of(values.get("beta_slow", 1.0))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001  # as transformers does, to avoid a division by zero
    steps = (np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = np.float32(1) - np.clip(steps, np.float32(0), np.float32(1))
    powers = _powers(theta, dims)
    interpolated, original_freq = np.float32(1) / (np.float32(factor) * powers), np.float32(1) / powers
    return interpolated * (np.float32(1) - keep) + original_freq * keep, attention
