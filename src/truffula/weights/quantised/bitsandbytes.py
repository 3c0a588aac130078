"""bitsandbytes: 4 bits of a table (nf4, fp4) in blocks that cross rows, and int8 with a scale per row.

4 bits: ``weight`` holds ``outputs * inputs / 2`` bytes, the first value of a byte in its high half; ``weight.absmax``
is the scale of each block, ``weight.quant_map`` the values of the 16 codes; shape, dtype and block size are JSON in
``weight.quant_state.bitsandbytes__nf4``. Scales may themselves be bytes (double quantisation): codes of
``weight.nested_quant_map`` times ``weight.nested_absmax`` per block of them, plus an offset. int8: ``q * SCB / 127``.
Source: bitsandbytes, ``functional.py`` and ``backends/default/ops.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np

from truffula.weights.checkpoint import Array
from truffula.weights.quantised.keys import Keys
from truffula.weights.quantised.logical import BFLOAT16, FLOAT16, FLOAT32, FLOATS, Logical, Parts, Scheme
from truffula.weights.quantised.packing import NF4, NF4_NUMBERS, pack_nf4

WEIGHT, ABSMAX, MAP, SCB, FORMAT = ".weight", ".weight.absmax", ".weight.quant_map", ".SCB", ".weight_format"
NESTED_ABSMAX, NESTED_MAP = ".weight.nested_absmax", ".weight.nested_quant_map"
STATES = {
    ".weight.quant_state.bitsandbytes__nf4": "NF4",
    ".weight.quant_state.bitsandbytes__fp4": "FP4-BNB",
}
_DTYPES = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
_RECIPROCAL = np.float32(7.874015718698502e-3)  # of 127, as the library has it
_Count = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
_BlockSize = Annotated[int, msgspec.Meta(ge=1, le=2**16)]  # the library has up to 4096
_NOTE = "the checkpoint was made for activations in int8 beside outliers; here they are not rounded."


class _State(msgspec.Struct, forbid_unknown_fields=True):
    """``quant_state``: what is not a tensor."""

    quant_type: str
    blocksize: _BlockSize
    dtype: str
    shape: list[_Count]
    nested_blocksize: _BlockSize | None = None
    nested_dtype: str | None = None
    nested_offset: float | None = None


@dataclass(frozen=True, kw_only=True)
class BitsAndBytes(Scheme):
    suffixes = (WEIGHT, ABSMAX, MAP, SCB, FORMAT, NESTED_ABSMAX, NESTED_MAP, *STATES)

    def is_quantised(self, parts: Parts) -> bool:
        weight = parts.infos.get(WEIGHT)
        others = any(suffix in parts for suffix in self.suffixes if suffix != WEIGHT)
        return others or (weight is not None and weight.dtype not in FLOATS)

    def open(self, parts: Parts) -> Logical:
        return _int8(parts) if parts.need(WEIGHT).dtype == "I8" and ABSMAX not in parts else _four_bits(parts)


def _int8(parts: Parts) -> Logical:
    outputs, inputs = parts.need(WEIGHT, "I8", ndim=2).shape
    parts.need(SCB, *FLOATS)
    parts.require(SCB, (outputs,), (outputs, 1))
    if FORMAT in parts and (parts.need(FORMAT).nbytes > 8 or parts.read(FORMAT).any()):
        raise parts.error(FORMAT, "says that the weight is reordered for a GPU; only rows in order are supported.")

    def compute(lo: int, hi: int) -> Array:
        scales = parts.read(SCB).reshape(-1, 1)[lo:hi].astype(np.float32)
        with np.errstate(all="ignore"):
            return parts.read(WEIGHT)[lo:hi] * scales * _RECIPROCAL

    return Logical(f"{parts.module}.weight", (outputs, inputs), FLOAT32, "INT8", compute)


def _four_bits(parts: Parts) -> Logical:
    suffix = next((item for item in STATES if item in parts), next(iter(STATES)))
    state = _state(parts, suffix)
    outputs, inputs = state.shape
    count = outputs * inputs
    blocks = -(-count // state.blocksize)
    if parts.need(WEIGHT).nbytes != -(-count // 2):
        raise parts.error(
            WEIGHT, f"has {parts.infos[WEIGHT].nbytes} bytes; {state.shape} in 4 bits needs {-(-count // 2)}."
        )
    parts.need(MAP, "F32")
    parts.require(MAP, (16,))
    nested = NESTED_ABSMAX in parts or parts.need(ABSMAX).dtype == "U8"
    parts.need(ABSMAX, "U8" if nested else "F32")
    parts.require(ABSMAX, (blocks,))
    if nested:
        if state.nested_blocksize is None or state.nested_offset is None:
            raise parts.error(suffix, "has no nested_blocksize or nested_offset, which scales in bytes need.")
        parts.need(NESTED_ABSMAX, "F32")
        parts.require(NESTED_ABSMAX, (-(-blocks // state.nested_blocksize),))
        parts.need(NESTED_MAP, "F32")
        parts.require(NESTED_MAP, (256,))
    dtype = _DTYPES[state.dtype]

    def compute(lo: int, hi: int) -> Array:
        first, last = lo * inputs, hi * inputs
        data = parts.read(WEIGHT).reshape(-1).view(np.uint8)[first // 2 : -(-last // 2)]
        codes = np.stack([data >> 4, data & 15], 1).reshape(-1)[first % 2 : first % 2 + last - first]
        values = np.take(parts.read(MAP), codes)
        block = first // state.blocksize
        scales = _scales(parts, state, block, -(-last // state.blocksize)).repeat(state.blocksize)
        with np.errstate(all="ignore"):
            values *= scales[first - block * state.blocksize :][: last - first]
            return values.reshape(-1, inputs).astype(dtype, copy=False)

    def pack(lo: int, hi: int) -> Array | None:
        if parts.read(MAP).tobytes() != NF4_NUMBERS.tobytes():
            return None
        first, last = lo * inputs, hi * inputs
        codes = parts.read(WEIGHT).reshape(-1).view(np.uint8)[first // 2 : last // 2]
        block = first // state.blocksize
        scales = _scales(parts, state, block, -(-last // state.blocksize))
        of_group = np.arange(first, last, NF4.size) // state.blocksize - block
        return pack_nf4(codes, np.take(scales, of_group).reshape(hi - lo, -1))

    fits = STATES[suffix] == "NF4" and inputs % NF4.size == 0 and state.blocksize % NF4.size == 0
    packed = "NF4" if fits else ""
    return Logical(f"{parts.module}.weight", (outputs, inputs), dtype, STATES[suffix], compute, packed, pack)


def _scales(parts: Parts, state: _State, lo: int, hi: int) -> Array:
    """float32 ``[hi - lo]``: the scales of blocks ``lo .. hi``."""
    scales: Array = parts.read(ABSMAX)[lo:hi]
    if scales.dtype != np.uint8:
        return scales
    assert state.nested_blocksize is not None and state.nested_offset is not None
    with np.errstate(all="ignore"):
        nested = np.take(parts.read(NESTED_ABSMAX), np.arange(lo, hi) // state.nested_blocksize)
        values: Array = np.take(parts.read(NESTED_MAP), scales) * nested + np.float32(state.nested_offset)
    return values


def _state(parts: Parts, suffix: str) -> _State:
    info = parts.need(suffix, "U8", ndim=1)
    if info.nbytes > 4096:
        raise parts.error(suffix, f"has {info.nbytes} bytes; expected JSON of a few hundred.")
    try:
        state = msgspec.json.decode(parts.read(suffix).tobytes(), type=_State)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise parts.error(suffix, f"is not the JSON of a quantised weight: {error}.") from error
    if state.dtype not in _DTYPES or len(state.shape) != 2 or state.shape[0] * state.shape[1] >= 2**40:
        raise parts.error(suffix, f"says dtype {state.dtype!r} and shape {state.shape}; expected a matrix of floats.")
    return state


def read_bitsandbytes(keys: Keys) -> BitsAndBytes:
    """The scheme of a ``quantization_config`` with ``quant_method`` bitsandbytes, or one without, of older versions."""
    eight = keys.flag("load_in_8bit", keys.flag("_load_in_8bit", False))
    keys.flag("load_in_4bit", keys.flag("_load_in_4bit", False))
    for key in ("llm_int8_skip_modules", "modules_to_not_convert"):
        keys.names(key)
    keys.skip("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    keys.skip("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_threshold")
    return BitsAndBytes(method="bitsandbytes", notes=(_NOTE,) if eight else ())


def is_bitsandbytes(values: Any) -> bool:
    """Whether a ``quantization_config`` without ``quant_method`` is of bitsandbytes."""
    return "quant_method" not in values and ("load_in_4bit" in values or "load_in_8bit" in values)
