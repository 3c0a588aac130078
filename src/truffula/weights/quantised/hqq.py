"""HQQ: integers of 1, 2, 3, 4 or 8 bits with scales and zeros that are not integers.

The weight is viewed as ``[groups, group size]`` (axis 1) or ``[group size, groups]`` (axis 0) and its rows are packed
``n`` to a word: the first n-th of them in the highest bits. ``(q - zero) * scale``, each step rounded to the dtype of
the scales. Everything else about a module is stored in small tensors beside it. Source: hqq, ``core/quantize.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from truffula.weights.checkpoint import Array
from truffula.weights.quantised.keys import Keys
from truffula.weights.quantised.logical import FLOAT32, Logical, Parts, Scheme

WEIGHT, SCALE, ZERO, SHAPE, AXIS = ".W_q", ".scale", ".zero", ".shape", ".axis"
SIZE, BITS, PACKING, DTYPE = ".group_size", ".nbits", ".packing", ".compute_dtype"
_PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
"""The bits of a value, and the values of a word."""
_LONG_ROW = 1 << 16
"""Rows of the view of so many values are not computed whole: with axis 0 there are as many as groups."""
_UNUSED = (
    *(".unpack_view_dtype", ".view_as_float", ".offload_meta", ".encoded_state_dict", ".stores_quant_config"),
    *(".channel_wise", ".optimize", ".round_zero", ".quant_scale", ".quant_zero", BITS),
)


@dataclass(frozen=True, kw_only=True)
class Hqq(Scheme):
    suffixes = (WEIGHT, SCALE, ZERO, SHAPE, AXIS, SIZE, PACKING, DTYPE, *_UNUSED)
    unused = _UNUSED

    def is_quantised(self, parts: Parts) -> bool:
        return WEIGHT in parts or ZERO in parts

    def open(self, parts: Parts) -> Logical:
        packing, axis = _text(parts, PACKING), _integers(parts, AXIS, 1)[0]
        if packing not in _PACKINGS or axis not in (0, 1):
            known = ", ".join(_PACKINGS)
            raise parts.error(PACKING, f"says {packing!r}, with axis {axis}; supported are {known} and axes 0 and 1.")
        bits, per_word = _PACKINGS[packing]
        (outputs, inputs), (size,) = _integers(parts, SHAPE, 2), _integers(parts, SIZE, 1)
        if min(outputs, inputs, size) < 1 or outputs * inputs >= 2**40 or outputs * inputs % size:
            raise parts.error(SHAPE, f"says {[outputs, inputs]}, in groups of {size}.")
        groups = outputs * inputs // size
        rows, columns = (groups, size) if axis else (size, groups)
        step = -(-rows // per_word)
        word = 4 if packing == "3bit_32" else 1
        nbytes = parts.need(WEIGHT).nbytes
        if nbytes != step * columns * word or (bits != 3 and rows % per_word):
            raise parts.error(WEIGHT, f"has {nbytes} bytes; {rows} rows of {columns} in {packing} need another number.")
        dtype = parts.floats(SCALE)
        parts.need(ZERO, parts.infos[SCALE].dtype)
        for suffix in (SCALE, ZERO):
            parts.require(suffix, (groups, 1) if axis else (1, groups), (groups,))
        if DTYPE in parts and _text(parts, DTYPE).removeprefix("torch.") != dtype.name:
            raise parts.error(DTYPE, f"says {_text(parts, DTYPE)!r}; the scales are {dtype.name}.")

        def flat(first: int, last: int) -> Array:
            """Values ``first .. last`` of the weight, of whole rows of the view or of a part of one."""
            index = np.arange(first // columns, -(-last // columns))
            left = first - int(index[0]) * columns
            some = slice(left, left + last - first) if len(index) == 1 else slice(None)
            words = parts.read(WEIGHT).reshape(-1).view(np.uint32 if word == 4 else np.uint8).reshape(step, columns)
            top = 30 if bits == 3 else 8
            shifts = (top - bits - bits * (index // step)).astype(words.dtype)[:, None]
            values = ((words[index % step, some] >> shifts) & words.dtype.type((1 << bits) - 1)).astype(np.float32)
            across = (slice(index[0], index[-1] + 1), None) if axis else (None, some)
            zero, scale = (parts.read(suffix).reshape(-1)[across].astype(np.float32) for suffix in (ZERO, SCALE))
            with np.errstate(all="ignore"):
                values = (values - zero).astype(dtype).astype(FLOAT32) * scale
                wanted = values.reshape(-1)[left if len(index) > 1 else 0 :][: last - first]
                return np.asarray(wanted, dtype)

        def compute(lo: int, hi: int) -> Array:
            first, last = lo * inputs, hi * inputs
            if columns < _LONG_ROW:
                return flat(first, last).reshape(-1, inputs)
            cuts = [first, *range((first // columns + 1) * columns, last, columns), last]
            return np.concatenate([flat(*pair) for pair in pairwise(cuts)]).reshape(-1, inputs)

        return Logical(f"{parts.module}.weight", (outputs, inputs), dtype, f"HQQ-{bits}", compute)


def _integers(parts: Parts, suffix: str, count: int) -> list[int]:
    """The values of a small tensor of integers."""
    info = parts.need(suffix, "I32", "I64", "U8")
    if int(np.prod(info.shape)) != count:
        raise parts.error(suffix, f"has shape {list(info.shape)}; expected {count} numbers.")
    return [int(value) for value in parts.read(suffix).reshape(-1)]


def _text(parts: Parts, suffix: str) -> str:
    info = parts.need(suffix, "U8", ndim=1)
    if info.nbytes > 64:
        raise parts.error(suffix, f"has {info.nbytes} bytes; expected a short name.")
    return parts.read(suffix).tobytes().decode("latin-1")


def read_hqq(keys: Keys) -> Hqq:
    """The scheme of a ``quantization_config`` with ``quant_method`` hqq."""
    keys.names("skip_modules")
    keys.mapping("quant_config")
    return Hqq(method="hqq")
