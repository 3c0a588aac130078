"""Weights stored as floats of 4 bits (e2m1): gpt-oss's MXFP4 experts, and NVFP4 of modelopt.

MXFP4: ``<name>_blocks`` uint8 ``[experts, outputs, groups, 16]``, ``<name>_scales`` uint8 ``[experts, outputs,
groups]``; 32 inputs share an exponent, and the model has the weights as ``[experts, inputs, outputs]``. NVFP4:
``weight`` uint8 ``[outputs, inputs / 2]``, ``weight_scale`` float8 per 16 inputs, times one float32,
``weight_scale_2``. In a byte the low half comes first. Source: transformers, ``convert_moe_packed_tensors``; modelopt,
``NVFP4QTensor``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from truffula.weights.checkpoint import Array
from truffula.weights.quantised.bits import affine, table, unpack_e2m1
from truffula.weights.quantised.floats import (
    ACTIVATION_SUFFIXES,
    ACTIVATIONS,
    CACHE,
    CACHE_SUFFIXES,
    EXPONENTS,
    F8,
    Float8,
)
from truffula.weights.quantised.keys import Keys
from truffula.weights.quantised.logical import BFLOAT16, FLOAT32, Logical, Parts, Scheme
from truffula.weights.quantised.packing import pack_e2m1, pack_fp4

BLOCKS, SCALES = "_blocks", "_scales"
_ALGORITHMS = ("fp8", "fp8_per_channel_per_token", "fp8_pb_wo", "nvfp4", "w4a16_nvfp4", "mxfp8", "mixed_precision")


@dataclass(frozen=True, kw_only=True)
class Mxfp4(Scheme):
    suffixes = (BLOCKS, SCALES)

    def is_quantised(self, parts: Parts) -> bool:
        return BLOCKS in parts or SCALES in parts

    def open(self, parts: Parts) -> Logical:
        shape = parts.need(BLOCKS, "U8", ndim=4).shape
        parts.need(SCALES, *EXPONENTS)
        parts.require(SCALES, shape[:3])
        if shape[3] != 16:
            raise parts.error(BLOCKS, f"has shape {list(shape)}; expected 16 bytes per group.")
        experts, outputs, groups, _ = shape

        def terms(lo: int, hi: int) -> tuple[Array, Array]:
            values = unpack_e2m1(parts.read(BLOCKS)[lo:hi]).reshape(-1, 32 * groups)
            return values, np.take(table("e8m0"), parts.read(SCALES)[lo:hi].view(np.uint8)).reshape(-1, groups)

        def compute(lo: int, hi: int) -> Array:
            values, scales = terms(lo, hi)
            rows = affine(values, None, scales, 32, BFLOAT16)
            return rows.reshape(-1, outputs, 32 * groups).swapaxes(1, 2)

        def pack(lo: int, hi: int) -> Array | None:
            blocks = pack_e2m1(*terms(lo, hi))
            return None if blocks is None else blocks.reshape(hi - lo, outputs, groups, -1)

        shape = experts, 32 * groups, outputs
        return Logical(parts.module, shape, BFLOAT16, "MXFP4", compute, "Q5_0", pack, swapped=True)


@dataclass(frozen=True, kw_only=True)
class ModelOpt(Float8):
    """NVFP4 where ``weight`` is uint8, else as ``Float8``."""

    suffixes = (".weight", ".weight_scale", ".weight_scale_2", *ACTIVATION_SUFFIXES, *CACHE_SUFFIXES)

    def open(self, parts: Parts) -> Logical:
        info = parts.need(".weight", "U8", *F8, ndim=2)
        if info.dtype != "U8":
            return super().open(parts)
        outputs, half = info.shape
        parts.need(".weight_scale", "F8_E4M3", ndim=2)
        parts.require(".weight_scale", (outputs, -(-2 * half // 16)))
        parts.need(".weight_scale_2", "F32")
        parts.require(".weight_scale_2", (), (1,))

        def compute(lo: int, hi: int) -> Array:
            scales = np.take(table(F8["F8_E4M3"]), parts.read(".weight_scale")[lo:hi].view(np.uint8))
            with np.errstate(all="ignore"):
                scales = scales * parts.read(".weight_scale_2").reshape(-1)[0]
            values = unpack_e2m1(parts.read(".weight")[lo:hi]) + np.float32(0)  # the library has no negative zero
            return affine(values, None, scales, 16, FLOAT32)

        def pack(lo: int, hi: int) -> Array | None:
            codes, scales = (parts.read(part)[lo:hi].view(np.uint8) for part in (".weight", ".weight_scale"))
            for half, zero in ((0x0F, 0x08), (0xF0, 0x80)):
                codes = np.where(codes & half == zero, codes & ~np.uint8(half), codes)
            return pack_fp4(codes, scales, parts.read(".weight_scale_2").reshape(-1)[0], np.float32(1))

        packed = "FP4_16" if half % 16 == 0 else ""
        return Logical(f"{parts.module}.weight", (outputs, 2 * half), FLOAT32, "NVFP4", compute, packed, pack)


def read_mxfp4(keys: Keys) -> Mxfp4:
    """The scheme of a ``quantization_config`` with ``quant_method`` mxfp4."""
    keys.names("modules_to_not_convert")
    keys.skip("dequantize")
    return Mxfp4(method="mxfp4")


def read_modelopt(keys: Keys) -> ModelOpt:
    """The scheme of a ``quantization_config`` with ``quant_method`` modelopt."""
    keys.choice("quant_algo", _ALGORITHMS, "mixed_precision")
    keys.names("ignore")
    keys.names("exclude_modules")
    cache = keys.raw("kv_cache_scheme") or keys.raw("kv_cache_quant_algo")
    keys.must_be("has_zero_point", (False,), "zero points are not supported.")
    keys.must_be("pre_quant_scale", (False,), "scaled activations are not supported.")
    keys.skip("config_groups", "group_size", "producer", "quantized_layers")
    return ModelOpt(method="modelopt", block=(128, 128), notes=(ACTIVATIONS, *([CACHE] if cache else [])))
