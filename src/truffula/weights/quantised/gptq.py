"""GPTQ: integers of 2, 3, 4 or 8 bits, packed along the inputs; also AutoRound's files in this layout.

``qweight`` int32 ``[inputs * bits / 32, outputs]``, ``qzeros`` int32 ``[groups, outputs * bits / 32]``, ``scales``
``[groups, outputs]``, ``g_idx`` int32 ``[inputs]``: the group of each input. A weight is ``scale * (q - zero)``. Format
``gptq`` (version 1) stores zeros less one; ``gptq_v2`` as they are. Source: GPTQModel, ``TorchLinear``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from truffula.weights.checkpoint import Array
from truffula.weights.quantised.bits import unpack
from truffula.weights.quantised.keys import Keys
from truffula.weights.quantised.logical import Logical, Parts, Scheme
from truffula.weights.quantised.packing import Terms, integers, kind_for

BITS = (2, 3, 4, 8)
QWEIGHT, QZEROS, SCALES, G_IDX = ".qweight", ".qzeros", ".scales", ".g_idx"
_HOW_IT_WAS_MADE = (
    *("act_group_aware", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment"),
    *("damp_percent", "dataset", "fail_safe", "failsafe", "gptaq", "hyb_act", "lm_head"),
    *("max_input_length", "meta", "model_file_base_name", "model_name_or_path", "model_seqlen"),
    *("module_name_preceding_first_block", "modules_in_block_to_quantize", "mse", "offload_to_disk"),
    *("offload_to_disk_path", "pad_token_id", "parallel_packing", "static_groups", "tokenizer"),
    *("true_sequential", "v2", "v2_alpha"),
)
_KERNELS_OF_OTHERS = ("backend", "disable_exllama", "exllama_config", "use_cuda_fp16", "use_exllama", "version")


@dataclass(frozen=True, kw_only=True)
class Gptq(Scheme):
    """``bits`` and ``group_size`` are None when the config has other ones for some modules: the shapes tell them.

    ``less_one``: zeros are stored less one. ``symmetric``: all zeros are the same; ``act_order``: groups are not runs
    of inputs. Where a file contradicts the latter two, its values are right, but not kept in blocks.
    """

    bits: int | None
    group_size: int | None
    less_one: bool
    symmetric: bool = False
    act_order: bool = False
    suffixes = (QWEIGHT, QZEROS, SCALES, G_IDX)

    def is_quantised(self, parts: Parts) -> bool:
        return QWEIGHT in parts or QZEROS in parts

    def open(self, parts: Parts) -> Logical:
        words = parts.need(QWEIGHT, "I32", ndim=2).shape
        zero_words = parts.need(QZEROS, "I32", ndim=2).shape
        groups, outputs = parts.need(SCALES, ndim=2).shape
        dtype = parts.floats(SCALES)
        bits = self._bits(parts, zero_words, outputs)
        inputs = words[0] * 32 // bits
        parts.require(QWEIGHT, (inputs * bits // 32, outputs))
        parts.require(QZEROS, (groups, -(-outputs * bits // 32)))
        size = self._group_size(parts, inputs, groups)

        def terms(lo: int, hi: int) -> Terms:
            return (
                unpack(parts.read(QWEIGHT)[:, lo:hi].T, bits),
                _zeros(parts.read(QZEROS), bits, lo, hi, less_one=self.less_one).T,
                parts.read(SCALES)[:, lo:hi].T,
                size if G_IDX not in parts else _group_index(parts, groups),
            )

        in_order = groups and inputs % groups == 0 and not self.act_order
        packed = kind_for(bits, inputs, inputs // groups, symmetric=self.symmetric) if in_order else ""
        return integers(f"{parts.module}.weight", (outputs, inputs), dtype, f"GPTQ-{bits}", terms, packed)

    def _bits(self, parts: Parts, zero_words: tuple[int, ...], outputs: int) -> int:
        """The width that the zeros' shape tells; there are as many of them as scales."""
        widths = BITS if self.bits is None else (self.bits,)
        fitting = [bits for bits in widths if -(-outputs * bits // 32) == zero_words[1]]
        if len(fitting) != 1:
            said = " or ".join(map(str, widths))
            raise parts.error(
                QZEROS, f"has {zero_words[1]} words for {outputs} outputs, which are not zeros of {said} bits."
            )
        return fitting[0]

    def _group_size(self, parts: Parts, inputs: int, groups: int) -> int:
        if G_IDX in parts:
            parts.need(G_IDX, "I32")
            parts.require(G_IDX, (inputs,))
            return 0
        if self.act_order and groups > 1:
            raise parts.error(G_IDX, "is missing: desc_act is true, so the groups are not runs of inputs.")
        size = self.group_size or -(-inputs // max(1, groups))
        size = inputs if size < 0 else size
        if -(-inputs // max(1, size)) != groups:
            raise parts.error(SCALES, f"has {groups} groups; {inputs} inputs in groups of {size} need another number.")
        return size


def _zeros(words: Array, bits: int, lo: int, hi: int, *, less_one: bool) -> Array:
    """``[groups, hi - lo]`` uint8: the zeros of outputs ``lo .. hi``."""
    first = lo // 32
    some = np.ascontiguousarray(words[:, first * bits : -(-hi // 32) * bits])
    if less_one and bits != 3:  # added in whole words, as the zeros were subtracted: a carry undoes a borrow
        some = some.view(np.uint32) + np.uint32(sum(1 << place for place in range(0, 32, bits)))
    zeros = unpack(some, bits)[:, lo - 32 * first : hi - 32 * first]
    return (zeros + np.uint8(1)) & np.uint8(7) if less_one and bits == 3 else zeros


def _group_index(parts: Parts, groups: int) -> Array:
    index = parts.read(G_IDX)
    if index.size and not (int(index.min()) >= 0 and int(index.max()) < groups):
        bad = int(index.min()) if int(index.min()) < 0 else int(index.max())
        raise parts.error(G_IDX, f"names group {bad}; {parts.module}{SCALES} has {groups} groups.")
    return index


def _width(keys: Keys, *, overridden: bool) -> tuple[int | None, int | None]:
    """Bits and group size as configured; None where modules differ."""
    bits, size = keys.integer("bits"), keys.group_size("group_size", 128)
    if bits not in BITS:
        raise keys.error("bits", f"supported are {', '.join(map(str, BITS))}.")
    return (None, None) if overridden else (bits, size)


def read_gptq(keys: Keys) -> Gptq:
    """The scheme of a ``quantization_config`` with ``quant_method`` gptq."""
    dynamic = keys.mapping("dynamic")
    for pattern, overrides in (dynamic or {}).items():
        if not isinstance(overrides, dict) and overrides is not False:
            raise keys.error("dynamic", f"the entry {pattern!r} must be an object or false.")
    bits, size = _width(keys, overridden=bool(dynamic))
    keys.must_be("pack_dtype", ("int32",), "only int32 is supported.")
    keys.must_be("rotation", ("",), "rotated weights need rotated activations, which is not supported.")
    keys.must_be("is_marlin_format", (False,), "Marlin's layout is not supported; use the checkpoint in GPTQ's layout.")
    keys.must_be("adapter", ({},), "an adapter that corrects the quantisation is not supported.")
    keys.must_be("method", ("gptq",), "only gptq is supported.")
    formats = ("gptq", "gptq_v2")
    form = keys.choice("checkpoint_format", formats, keys.choice("format", formats, "gptq"))
    keys.skip(*_HOW_IT_WAS_MADE, *_KERNELS_OF_OTHERS)
    return _make("gptq", keys, bits, size, less_one=form == "gptq")


def as_gptq(method: str, keys: Keys, *, overridden: bool, less_one: bool) -> Gptq:
    """For other methods that write this layout."""
    bits, size = _width(keys, overridden=overridden)
    return _make(method, keys, bits, size, less_one=less_one)


def _make(method: str, keys: Keys, bits: int | None, size: int | None, *, less_one: bool) -> Gptq:
    return Gptq(
        method=method,
        bits=bits,
        group_size=size,
        less_one=less_one,
        symmetric=keys.flag("sym", True),
        act_order=keys.flag("desc_act", False),
    )
