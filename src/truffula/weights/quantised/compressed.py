"""compressed-tensors: integers and floats of several widths, one form per module.

The form of a module follows from the dtypes of its tensors, its widths from their shapes, so that checkpoints with
several ``config_groups`` need no matching of names; the groups say which widths may occur.

=================  ==============================================  ====================================================
form               ``weight_packed`` or ``weight``                 scales
=================  ==============================================  ====================================================
pack-quantized     int32 ``[outputs, inputs * bits / 32]``         floats per group, row or tensor; zeros packed by rows
int-quantized      int8 ``[outputs, inputs]``                      likewise; zeros int8
float-quantized    float8 ``[outputs, inputs]``                    floats per tensor, row, group or block
mxfp8-quantized    float8                                          exponents per 32 inputs
nvfp4              uint8 ``[outputs, inputs / 2]``                 float8 per 16 inputs, divided by one float32
mxfp4              uint8                                           exponents per 32 inputs
=================  ==============================================  ====================================================

Source: compressed-tensors, ``compressors/`` and ``quantization/lifecycle/forward_helpers.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from truffula.weights.checkpoint import Array
from truffula.weights.quantised.bits import affine, table, unpack, unpack_e2m1
from truffula.weights.quantised.floats import (
    ACTIVATION_SUFFIXES,
    ACTIVATIONS,
    CACHE,
    CACHE_SUFFIXES,
    EXPONENTS,
    F8,
    float8_rows,
    grid,
    packed_float8,
    scale_rows,
    scaled,
)
from truffula.weights.quantised.keys import Keys
from truffula.weights.quantised.logical import BFLOAT16, FLOATS, Logical, Parts, Scheme
from truffula.weights.quantised.packing import Terms, integers, kind_for, pack_e2m1, pack_fp4

WEIGHT, PACKED, SCALE, ZERO = ".weight", ".weight_packed", ".weight_scale", ".weight_zero_point"
GLOBAL, SHAPE, G_IDX = ".weight_global_scale", ".weight_shape", ".weight_g_idx"
_FORMS = (
    *("dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)
_REORDERED, _IN_ORDER = ("group", "dynamic"), ("weight", "static")
"""Orders in which weights are quantised, after which groups are those of ``weight_g_idx``, and runs of inputs."""
_UNUSED = (*ACTIVATION_SUFFIXES, *CACHE_SUFFIXES, ".input_global_scale", ".output_zero_point")


@dataclass(frozen=True)
class Width:
    """``weights`` of one group. ``group`` and ``block`` are None where the strategy has none. ``symmetric``: there are
    no zero points; ``reordered``: groups are not runs of inputs.
    """

    bits: int
    group: int | None
    block: tuple[int, int] | None
    symmetric: bool
    reordered: bool


@dataclass(frozen=True, kw_only=True)
class CompressedTensors(Scheme):
    """``widths`` are those of the config's groups, without duplicates."""

    widths: tuple[Width, ...]
    method: str = "compressed-tensors"
    suffixes = (WEIGHT, PACKED, SCALE, ZERO, GLOBAL, SHAPE, G_IDX, *_UNUSED)
    unused = _UNUSED

    def is_quantised(self, parts: Parts) -> bool:
        weight = parts.infos.get(WEIGHT)
        return (weight is None or weight.dtype not in FLOATS) and any(item in parts for item in (WEIGHT, PACKED, SCALE))

    def open(self, parts: Parts) -> Logical:
        if PACKED in parts or WEIGHT not in parts:
            info = parts.need(PACKED, "I32", "U8", ndim=2)
            return _floats4(parts) if info.dtype == "U8" else self._packed(parts)
        info = parts.need(WEIGHT, "I8", *F8, ndim=2)
        return self._integers(parts, info.shape) if info.dtype == "I8" else self._floats8(parts, info.shape)

    def _packed(self, parts: Parts) -> Logical:
        outputs, words = parts.infos[PACKED].shape
        dtype = parts.floats(SCALE)
        bits, inputs, size = self._fitting(parts, words)
        zeros, group = ZERO in parts, size
        parts.require(SCALE, *_scale_shapes(outputs, -(-inputs // size)))
        groups = parts.infos[SCALE].shape[-1] if len(parts.infos[SCALE].shape) == 2 else 1
        if zeros:
            parts.need(ZERO, "I32", ndim=2)
            parts.require(ZERO, (-(-outputs * bits // 32), groups))
        if SHAPE in parts:
            parts.need(SHAPE, "I64", "I32")
            parts.require(SHAPE, (2,))
        if G_IDX in parts:
            parts.need(G_IDX, "I32")
            parts.require(G_IDX, (inputs,))

        def terms(lo: int, hi: int) -> Terms:
            if SHAPE in parts and tuple(parts.read(SHAPE).tolist()) != (outputs, inputs):
                raise parts.error(SHAPE, f"says {parts.read(SHAPE).tolist()}; the weight is {[outputs, inputs]}.")
            offset = _zeros(parts.read(ZERO), bits, lo, hi) if zeros else np.full((1, 1), 1 << (bits - 1), np.uint8)
            scales = scale_rows(parts, SCALE, lo, hi, (1, size))
            index = _group_index(parts, groups) if G_IDX in parts else None
            offset = np.broadcast_to(offset, scales.shape)
            quants = unpack(parts.read(PACKED)[lo:hi], bits)[:, :inputs]
            return quants, offset, scales, group if index is None else index

        packed = "" if G_IDX in parts else kind_for(bits, inputs, size, symmetric=not zeros)
        return integers(f"{parts.module}.weight", (outputs, inputs), dtype, f"INT{bits}", terms, packed)

    def _fitting(self, parts: Parts, words: int) -> tuple[int, int, int]:
        """Bits, inputs and group size: those of the configured widths that explain the module's shapes."""
        scales = parts.infos[SCALE].shape
        groups = scales[-1] if len(scales) == 2 else 1
        fitting, found = [], set()
        for width in self.widths:
            inputs = groups * width.group if width.group else self._inputs(parts, words, width.bits)
            if inputs > 0 and -(-inputs * width.bits // 32) == words:
                fitting.append(width)
                found.add((width.bits, inputs, width.group or inputs))
        if len(found) != 1:
            said = ", ".join(f"{width.bits} bits in groups of {width.group or 'a row'}" for width in self.widths)
            why = "fit none" if not found else "fit more than one"
            raise parts.error(PACKED, f"has {words} words per row and {groups} scales, which {why} of: {said}.")
        _need_zeros(parts, fitting)
        if groups > 1 and all(width.reordered for width in fitting):
            parts.need(G_IDX)
        return found.pop()

    @staticmethod
    def _inputs(parts: Parts, words: int, bits: int) -> int:
        """The width of a weight without groups: the stored one, or else as many values as the words hold."""
        if SHAPE in parts and parts.need(SHAPE, "I64", "I32").shape == (2,):
            return int(parts.read(SHAPE)[1])
        return words * 32 // bits

    def _integers(self, parts: Parts, shape: tuple[int, ...]) -> Logical:
        dtype, block = parts.floats(SCALE), self._grid(parts, (shape[0], shape[1]))
        if ZERO in parts:
            parts.need(ZERO, "I8")
            parts.require(ZERO, parts.infos[SCALE].shape)
        _need_zeros(parts, [width for width in self.widths if width.bits == 8])

        def terms(lo: int, hi: int) -> Terms:
            zeros = scale_rows(parts, ZERO, lo, hi, block) if ZERO in parts else None
            return parts.read(WEIGHT)[lo:hi], zeros, scale_rows(parts, SCALE, lo, hi, block), block[1]

        packed = kind_for(8, shape[1], block[1], symmetric=ZERO not in parts)
        return integers(f"{parts.module}.weight", (shape[0], shape[1]), dtype, "INT8", terms, packed)

    def _floats8(self, parts: Parts, shape: tuple[int, ...]) -> Logical:
        info = parts.need(SCALE, *FLOATS, *EXPONENTS)
        exponents = info.dtype in EXPONENTS
        dtype, block = (BFLOAT16 if exponents else FLOATS[info.dtype]), self._grid(parts, (shape[0], shape[1]))
        values = float8_rows(parts, WEIGHT)
        if ZERO in parts:
            parts.need(ZERO)

        def rows(lo: int, hi: int) -> Array:
            if ZERO in parts and parts.read(ZERO).astype(np.float32).any():
                raise parts.error(ZERO, "is not zero, which is not supported beside floats.")
            return values(lo, hi)

        compute = scaled(parts, SCALE, block, dtype, rows)
        kind = "MXFP8" if exponents else "FP8"
        packed = parts.infos[WEIGHT].dtype == "F8_E4M3" and ZERO not in parts
        packing = packed_float8(parts, WEIGHT, SCALE, block) if packed else {}
        return Logical(f"{parts.module}.weight", (shape[0], shape[1]), dtype, kind, compute, **packing)

    def _grid(self, parts: Parts, shape: tuple[int, int]) -> tuple[int, int]:
        blocks = [width.block for width in self.widths if width.block]
        scales = parts.infos[SCALE].shape
        fitting = [b for b in blocks if scales == (-(-shape[0] // b[0]), -(-shape[1] // b[1]))]
        return grid(parts, SCALE, shape, next(iter(fitting or blocks), None))


def _need_zeros(parts: Parts, fitting: Sequence[Width]) -> None:
    """Raise when a module that can only have zero points has none."""
    if fitting and not any(width.symmetric for width in fitting):
        parts.need(ZERO)


def _floats4(parts: Parts) -> Logical:
    """NVFP4 or MXFP4."""
    outputs, half = parts.infos[PACKED].shape
    info = parts.need(SCALE, "F8_E4M3", *EXPONENTS, ndim=2)
    exponents, size = info.dtype in EXPONENTS, 32 if info.dtype in EXPONENTS else 16
    parts.require(SCALE, (outputs, -(-2 * half // size)))
    if not exponents:
        parts.need(GLOBAL, "F32")
        parts.require(GLOBAL, (1,))

    def terms(lo: int, hi: int) -> tuple[Array, Array]:
        if exponents:
            scales = scale_rows(parts, SCALE, lo, hi, (1, size))
        else:
            scales = np.take(table(F8["F8_E4M3"]), parts.read(SCALE)[lo:hi].view(np.uint8))
            with np.errstate(all="ignore"):
                scales = scales / parts.read(GLOBAL).reshape(-1)[0]
        return unpack_e2m1(parts.read(PACKED)[lo:hi]), scales

    def compute(lo: int, hi: int) -> Array:
        values, scales = terms(lo, hi)
        return affine(values, None, scales, size, BFLOAT16)

    def pack(lo: int, hi: int) -> Array | None:
        if exponents:
            return pack_e2m1(*terms(lo, hi))
        codes, scales = (parts.read(part)[lo:hi].view(np.uint8) for part in (PACKED, SCALE))
        return pack_fp4(codes, scales, np.float32(1), parts.read(GLOBAL).reshape(-1)[0])

    name, shape = f"{parts.module}.weight", (outputs, 2 * half)
    if exponents:
        return Logical(name, shape, BFLOAT16, "MXFP4", compute, "Q5_0", pack)
    return Logical(name, shape, BFLOAT16, "NVFP4", compute, "FP4_16" if half % 16 == 0 else "", pack)


def _scale_shapes(outputs: int, groups: int) -> tuple[tuple[int, ...], ...]:
    return ((outputs, groups), *(((outputs,), (1,), (), (1, 1)) if groups == 1 else ()))


def _zeros(words: Array, bits: int, lo: int, hi: int) -> Array:
    """``[hi - lo, groups]`` uint8 of rows ``lo .. hi``, packed along the rows."""
    first = lo // 32
    some = np.ascontiguousarray(words[first * bits : -(-hi // 32) * bits].T)
    return unpack(some, bits)[:, lo - 32 * first : hi - 32 * first].T


def _group_index(parts: Parts, groups: int) -> Array | None:
    index = parts.read(G_IDX)
    if index.size and int(index.min()) == int(index.max()) == -1:
        return None  # written where it is not used
    if index.size and not (int(index.min()) >= 0 and int(index.max()) < groups):
        raise parts.error(G_IDX, f"names groups that are not among the {groups} of {parts.module}{SCALE}.")
    return index


# The config


def read_compressed(keys: Keys) -> CompressedTensors:
    """The scheme of a ``quantization_config`` with ``quant_method`` compressed-tensors."""
    keys.choice("format", _FORMS, "dense")
    for key in ("sparsity_config", "moe_sparsity_config"):
        config = keys.mapping(key)
        if config and config.get("format") != "dense":
            raise keys.error(key, "only dense weights are supported.")
    if any((keys.mapping("transform_config") or {}).values()):
        raise keys.error("transform_config", "only dense weights without transforms are supported.")
    keys.names("ignore")
    cache = keys.raw("kv_cache_scheme")
    keys.skip("global_compression_ratio", "quantization_status", "run_compressed", "version", "dequantize")
    keys.skip("use_optimized_inference")
    widths, activations = [], False
    groups = keys.nested("config_groups")
    for name in groups.values if groups is not None else ():
        assert groups is not None
        width, rounded = _read_group(groups, name)
        widths += [width] if width is not None else []
        activations |= rounded
    notes = (*([ACTIVATIONS] if activations else []), *([CACHE] if cache else []))
    return CompressedTensors(widths=tuple(dict.fromkeys(widths)), notes=notes)


def _read_group(groups: Keys, name: str) -> tuple[Width | None, bool]:
    """The width of a group's weights, and whether its activations are rounded."""
    group = groups.nested(name)
    if group is None:
        return None, False
    group.names("targets")
    group.choice("format", _FORMS, "dense")
    weights = group.nested("weights")
    activations = group.mapping("input_activations")
    if group.raw("output_activations"):
        raise group.error("output_activations", "rounding of outputs is not supported.")
    group.finish()
    return None if weights is None else _read_weights(weights), bool(activations)


def _read_weights(weights: Keys) -> Width:
    bits = weights.integer("num_bits", 8)
    kind = weights.choice("type", ("int", "float"), "int")
    if bits > 8 or (kind == "float" and bits not in (4, 8)):
        raise weights.error("num_bits", "supported are integers of 1 to 8 and floats of 4 and 8 bits.")
    size = weights.raw("group_size")
    if size is not None and (type(size) is not int or size < -1 or size == 0):
        raise weights.error("group_size", "it must be a positive integer, or -1 for whole rows.")
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.choice("strategy", ("tensor", "channel", "group", "block", "tensor_group"), default)
    block = weights.raw("block_structure")
    if isinstance(block, str):  # "128x128", as older versions wrote it
        block = [int(item) if item.isdecimal() and len(item) < 10 else 0 for item in block.split("x")]
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n < 2**31 for n in block)
    ):
        raise weights.error("block_structure", "it must be two positive integers.")
    if strategy == "block" and block is None:
        raise weights.error("block_structure", "a strategy of blocks needs it.")
    weights.must_be("dynamic", (False,), "weights are quantised in the file.")
    symmetric, order = weights.flag("symmetric", True), weights.raw("actorder", False)
    if order not in (True, False, *_REORDERED, *_IN_ORDER):
        raise weights.error("actorder", f"supported are {', '.join((*_REORDERED, *_IN_ORDER))}.")
    weights.skip("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    weights.finish()
    group = size if strategy in ("group", "tensor_group") and isinstance(size, int) and size > 0 else None
    if strategy in ("group", "tensor_group") and group is None:
        raise weights.error("group_size", "a strategy of groups needs a positive one.")
    square = (block[0], block[1]) if block is not None else None
    return Width(bits, group, square, symmetric, order in (True, *_REORDERED))
