"""Weights stored as floats of 8 bits, with a scale per tensor, row, block of rows and columns, or run of 32 inputs.

A weight is ``float(q) * scale``, also where the scale is called ``weight_scale_inv``. Scales stored in one byte are
exponents: 2^(b - 127). Source: transformers, ``Fp8Dequantize``; modelopt; compressed-tensors, ``naive_quantized``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from truffula.weights.checkpoint import Array
from truffula.weights.quantised.bits import affine, table, unpack_e2m1
from truffula.weights.quantised.keys import Keys
from truffula.weights.quantised.logical import FLOAT32, FLOATS, Logical, Parts, Scheme
from truffula.weights.quantised.packing import float8_kind, pack_float8

F8: dict[str, str] = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
EXPONENTS = ("U8", "F8_E8M0")
SCALE_SUFFIXES = (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight")
ACTIVATION_SUFFIXES = (".input_scale", ".activation_scale", ".qscale_act", ".input_scale_ub", ".input_zero_point")
CACHE_SUFFIXES = (".k_scale", ".v_scale", ".q_scale", ".prob_scale", ".output_scale", ".k_zero_point", ".v_zero_point")
ACTIVATIONS = "the checkpoint was made for activations in 8 bits; here they are not rounded."
CACHE = "the checkpoint has scales for a KV cache in 8 bits; here it is not rounded."


def grid(parts: Parts, suffix: str, shape: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns that share a scale, from the shapes of weight and scales; ``block`` as configured.

    Scales may be one, one per row, one per ``block``, or one per run of inputs.
    """
    info, (rows, inputs) = parts.infos[suffix], shape
    found = info.shape
    if int(np.prod(found)) == 1 and len(found) <= 2:
        return rows, inputs
    if found in ((rows,), (rows, 1)):
        return 1, inputs
    if block is not None and found == (-(-rows // block[0]), -(-inputs // block[1])):
        return block
    if len(found) == 2 and found[0] == rows and found[1] and inputs % found[1] == 0:
        return 1, inputs // found[1]
    blocks = f", [{-(-rows // block[0])}, {-(-inputs // block[1])}]" if block else ""
    raise parts.error(suffix, f"has shape {list(found)}; a weight {list(shape)} has [1], [{rows}, 1]{blocks} scales.")


def scale_rows(parts: Parts, suffix: str, lo: int, hi: int, block: tuple[int, int]) -> Array:
    """``[hi - lo, column blocks]`` float32: the scales of rows ``lo .. hi``."""
    scales, info = parts.read(suffix), parts.infos[suffix]
    if info.dtype in EXPONENTS:
        scales = np.take(table("e8m0"), scales.view(np.uint8))
    scales = scales.reshape(-1, scales.shape[-1] if scales.ndim == 2 else 1)
    return np.take(scales, np.arange(lo, hi) // block[0], 0) if len(scales) > 1 else np.repeat(scales, hi - lo, 0)


def scaled(
    parts: Parts, suffix: str, block: tuple[int, int], dtype: np.dtype[Any], values: Callable[[int, int], Array]
) -> Callable[[int, int], Array]:
    """Rows of ``values(lo, hi)``, float32, times their scales."""
    return lambda lo, hi: affine(values(lo, hi), None, scale_rows(parts, suffix, lo, hi, block), block[1], dtype)


def float8_rows(parts: Parts, suffix: str) -> Callable[[int, int], Array]:
    values = table(F8[parts.infos[suffix].dtype])
    return lambda lo, hi: np.take(values, parts.read(suffix)[lo:hi].view(np.uint8))


def packed_float8(parts: Parts, weight: str, scale: str, block: tuple[int, int]) -> dict[str, Any]:
    """``packed`` and ``pack`` of the ``Logical`` of an e4m3 weight whose scales are per ``block``."""
    kind = float8_kind(parts.infos[weight].shape[1], block[1])

    def pack(lo: int, hi: int) -> Array | None:
        codes = parts.read(weight)[lo:hi].view(np.uint8)
        return pack_float8(kind, codes, scale_rows(parts, scale, lo, hi, block), block[1])

    return {"packed": kind, "pack": pack} if kind else {}


@dataclass(frozen=True, kw_only=True)
class Float8(Scheme):
    """``block``: rows and columns that share a scale; None where the config names none."""

    block: tuple[int, int] | None = None
    suffixes: ClassVar[tuple[str, ...]] = (".weight", *SCALE_SUFFIXES, *ACTIVATION_SUFFIXES, *CACHE_SUFFIXES)
    unused: ClassVar[tuple[str, ...]] = (*ACTIVATION_SUFFIXES, *CACHE_SUFFIXES)

    def is_quantised(self, parts: Parts) -> bool:
        weight = parts.infos.get(".weight")
        return (weight is None or weight.dtype not in FLOATS) and any(
            suffix in parts for suffix in (".weight", ".weight_scale_inv", ".weight_scale")
        )

    def open(self, parts: Parts) -> Logical:
        suffix = next((item for item in SCALE_SUFFIXES if item in parts), SCALE_SUFFIXES[0])
        info = parts.need(".weight", *F8, "I8", "U8", ndim=2)
        parts.need(suffix, *FLOATS, *EXPONENTS)
        shape, values = info.shape, float8_rows(parts, ".weight") if info.dtype in F8 else None
        if values is None:  # two floats of 4 bits in a byte (DeepSeek's experts)
            shape = shape[0], 2 * shape[1]
            values = lambda lo, hi: unpack_e2m1(parts.read(".weight")[lo:hi].view(np.uint8))
        block = grid(parts, suffix, shape, self.block)
        kind = "FP8" if info.dtype in F8 else "FP4"
        kind = f"MX{kind}" if block == (1, 32) else kind
        compute = scaled(parts, suffix, block, FLOAT32, values)
        packing = packed_float8(parts, ".weight", suffix, block) if info.dtype == "F8_E4M3" else {}
        return Logical(f"{parts.module}.weight", shape, FLOAT32, kind, compute, **packing)


def read_fp8(keys: Keys) -> Float8:
    """The scheme of a ``quantization_config`` with ``quant_method`` fp8 or mxfp8."""
    block = keys.integers("weight_block_size", 2)
    keys.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    keys.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    keys.choice("scale_fmt", ("float", "ue8m0"), "float")
    keys.choice("expert_dtype", ("fp8", "fp4"), "fp8")
    for key in ("modules_to_not_convert", "ignored_layers", "modules_to_convert"):
        keys.names(key)
    cache = keys.raw("kv_cache_scheme")
    keys.skip("dequantize", "weight_per_tensor", "act_per_tensor", "moe_layer_quant")
    if block is not None and keys.raw("quant_method") == "mxfp8" and block != (1, 32):
        raise keys.error("weight_block_size", "mxfp8 has blocks of [1, 32].")
    notes = (ACTIVATIONS, *([CACHE] if cache else []))
    return Float8(method="fp8", block=None if block is None else (block[0], block[1]), notes=notes)


def read_fbgemm(keys: Keys) -> Float8:
    """The scheme of a ``quantization_config`` with ``quant_method`` fbgemm_fp8."""
    keys.names("modules_to_not_convert")
    keys.skip("activation_scale_ub")
    return Float8(method="fbgemm_fp8", notes=(ACTIVATIONS,))
