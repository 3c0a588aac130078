"""AWQ: integers of 4 bits, in the layouts of AutoAWQ's GEMM and GEMV kernels.

GEMM: ``qweight`` int32 ``[inputs, outputs / 8]``, ``qzeros`` ``[groups, outputs / 8]``, ``scales`` ``[groups,
outputs]``; the outputs of a word are in the order 0, 2, 4, 6, 1, 3, 5, 7. GEMV: ``qweight`` ``[outputs, inputs / 8]``,
``qzeros`` ``[outputs, words]``, ``scales`` ``[outputs, 8 * words]``, in plain order and padded. A weight is
``scale * (q - zero)``. Source: AutoAWQ, ``packing_utils.py`` and ``gemv.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from truffula.weights.checkpoint import Array
from truffula.weights.quantised.bits import unpack
from truffula.weights.quantised.keys import Keys
from truffula.weights.quantised.logical import Logical, Parts, Scheme
from truffula.weights.quantised.packing import Terms, integers, kind_for

QWEIGHT, QZEROS, SCALES = ".qweight", ".qzeros", ".scales"
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble that holds output i of a word."""
_NO_EFFECT = (
    *("backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse", "modules_to_not_convert"),
    *("lm_head", "meta", "sym", "desc_act"),
)


@dataclass(frozen=True, kw_only=True)
class Awq(Scheme):
    """``layout`` is gemm or gemv; ``group_size`` -1 for one group, None where modules differ."""

    group_size: int | None
    layout: str = "gemm"
    suffixes = (QWEIGHT, QZEROS, SCALES)

    def is_quantised(self, parts: Parts) -> bool:
        return QWEIGHT in parts or QZEROS in parts

    def open(self, parts: Parts) -> Logical:
        words = parts.need(QWEIGHT, "I32", ndim=2).shape
        parts.need(QZEROS, "I32", ndim=2)
        scales = parts.need(SCALES, ndim=2).shape
        return self._gemm(parts, words, scales) if self.layout == "gemm" else self._gemv(parts, words, scales)

    def _gemm(self, parts: Parts, words: tuple[int, ...], scales: tuple[int, ...]) -> Logical:
        inputs, outputs, groups = words[0], 8 * words[1], scales[0]
        parts.require(SCALES, (groups, outputs))
        parts.require(QZEROS, (groups, words[1]))
        size = self._size(parts, inputs, groups)
        dtype = parts.floats(SCALES)

        def terms(lo: int, hi: int) -> Terms:
            return (
                np.ascontiguousarray(_outputs(parts.read(QWEIGHT), lo, hi).T),
                _outputs(parts.read(QZEROS), lo, hi).T,
                parts.read(SCALES)[:, lo:hi].T,
                size,
            )

        packed = kind_for(4, inputs, size, symmetric=False)
        return integers(f"{parts.module}.weight", (outputs, inputs), dtype, "AWQ-4", terms, packed)

    def _gemv(self, parts: Parts, words: tuple[int, ...], scales: tuple[int, ...]) -> Logical:
        outputs, inputs = words[0], 8 * words[1]
        size = inputs if self.group_size in (None, -1) else self.group_size
        assert size is not None
        groups, dtype = -(-inputs // size), parts.floats(SCALES)
        parts.require(SCALES, (outputs, 8 * max(-(-groups // 8), scales[1] // 8)))
        parts.require(QZEROS, (outputs, scales[1] // 8))

        def terms(lo: int, hi: int) -> Terms:
            return (
                unpack(parts.read(QWEIGHT)[lo:hi], 4),
                unpack(parts.read(QZEROS)[lo:hi], 4)[:, :groups],
                parts.read(SCALES)[lo:hi, :groups],
                size,
            )

        packed = kind_for(4, inputs, size, symmetric=False)
        return integers(f"{parts.module}.weight", (outputs, inputs), dtype, "AWQ-4", terms, packed)

    def _size(self, parts: Parts, inputs: int, groups: int) -> int:
        size = self.group_size or inputs // max(1, groups)
        size = inputs if size < 0 else size
        if inputs != size * groups:
            raise parts.error(SCALES, f"has {groups} groups; {inputs} inputs in groups of {size} need another number.")
        return size


def _outputs(words: Array, lo: int, hi: int) -> Array:
    """``[n, hi - lo]`` uint8: outputs ``lo .. hi`` of rows packed along the outputs."""
    first = lo // 8
    nibbles = unpack(words[:, first : -(-hi // 8)], 4)
    values = nibbles.reshape(len(nibbles), -1, 8)[..., _PLACES].reshape(len(nibbles), -1)
    return values[:, lo - 8 * first : hi - 8 * first]


def read_awq(keys: Keys) -> Awq:
    """The scheme of a ``quantization_config`` with ``quant_method`` awq."""
    bits = keys.integer("bits", keys.integer("w_bit", 4))
    if bits != 4:
        raise keys.error("bits", "only 4 is supported.")
    size = keys.group_size("group_size", keys.group_size("q_group_size", 128))
    layouts = ("gemm", "gemv")
    layout = keys.choice("version", layouts, keys.choice("format", layouts, "gemm"))
    keys.must_be("zero_point", (True,), "weights without zero points are not supported.")
    keys.names("modules_to_not_convert")
    keys.skip(*_NO_EFFECT)
    return Awq(method="awq", group_size=size, layout=layout)
