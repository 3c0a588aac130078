"""From a program's ops to the native list: one function an op, which names every field it hands over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from truffula.errors import KernelError
from truffula.kernels.cpu.formats import LANES, panels_of
from truffula.kernels.cpu.weights import Array
from truffula.kernels.program import (
    Attention,
    Embed,
    Epilogue,
    Linear,
    Logits,
    Norm,
    Op,
    Pointwise,
    Program,
    Ref,
    Rope,
    RopeRows,
    TakeRows,
)

Columns = tuple[int, int, int]
MOST_POSITIONS = 2**31 - 1
"""Positions are 32 bits: a window as wide hides nothing, and one that is wider neither."""
_ACTIVATIONS = MappingProxyType({None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5})
_POINTWISE = MappingProxyType({"act": 0, "add": 1, "scale": 2, "clip": 3, "softcap": 4, "sigmoid_mul": 5})


class Lowering:
    """Adds ops to ``native``. ``vectors`` are the weights with one axis, as loaded; ``dtype`` is the model's."""

    def __init__(self, native: Any, program: Program, dtype: str, vectors: Sequence[Array | None]) -> None:
        self._native = native
        self._program = program
        self._dtype = dtype
        self._vectors = vectors

    def add(self, op: Op) -> None:
        method = _METHODS.get(type(op))
        if method is None:
            raise KernelError(f"op {op.name!r}: the cpu backend has no {type(op).__name__}.", param="ops")
        try:
            method(self, op)
        except TypeError as error:  # of the binding: a number that its C++ type does not hold
            raise KernelError(
                f"op {op.name!r}: a number in it is beyond what the cpu backend computes with.", param="ops"
            ) from error

    def _embed(self, op: Embed) -> None:
        if op.source == "extra":
            raise KernelError(f"op {op.name!r}: the cpu backend has no extra rows.", param="source")
        scale = 1.0 if op.scale is None else self._rounded(op.scale, op.table)
        self._native.add_embed(
            table=op.table, out=_columns(op.out), add=_maybe(op.add), position=op.source == "position",
            offset=op.offset, scale=scale, scaled=op.scale is not None,
        )  # fmt: skip

    def _rounded(self, scale: float, table: int) -> float:
        exact = self._dtype == "float32" or self._program.weights[table].dtype == "float32"
        return float(np.float32(scale) if exact else np.asarray(scale, np.float32).astype(ml_dtypes.bfloat16))

    def _norm(self, op: Norm) -> None:
        self._native.add_norm(
            x=_columns(op.x), out=_columns(op.out), plus=_maybe(op.plus), weight=op.weight, bias=op.bias,
            groups=op.groups, layer_norm=op.kind == "layer", cast_first=op.cast == "first", eps=op.eps,
        )  # fmt: skip

    def _linear(self, op: Linear) -> None:
        e: Epilogue = op.epilogue
        self._native.add_linear(
            x=_columns(op.x), out=_columns(op.out), residual=_maybe(e.residual), weight=op.weight,
            bias=self._bias(e.bias, op.weight, e.glu), clip=-1.0 if e.clip is None else e.clip, scale=e.scale,
            softcap=0.0, activation=_ACTIVATIONS[e.activation], glu=e.glu,
        )  # fmt: skip

    def _logits(self, op: Logits) -> None:
        self._native.add_linear(
            x=_columns(op.x), out=_columns(op.out), residual=None, weight=op.weight,
            bias=self._bias(op.bias, op.weight, False), clip=-1.0, scale=op.scale, softcap=op.softcap or 0.0,
            activation=0, glu=False,
        )  # fmt: skip

    def _bias(self, bias: int | None, weight: int, glu: bool) -> list[float]:
        """In the order of the packed outputs, zero in the lanes that pad them."""
        if bias is None:
            return []
        values = self._vectors[bias]
        assert values is not None
        outputs = self._program.weights[weight].shape[0]
        if not glu:
            return [*values.tolist(), *[0.0] * (panels_of(outputs) * LANES - outputs)]
        half = outputs // 2
        padded = np.zeros((2, panels_of(outputs, half) // 2 * LANES), np.float32)
        padded[0, :half], padded[1, :half] = values[:half], values[half:]
        alternating: list[float] = padded.reshape(2, -1, LANES).swapaxes(0, 1).reshape(-1).tolist()
        return alternating

    def _pointwise(self, op: Pointwise) -> None:
        self._native.add_pointwise(
            x=_columns(op.x), y=_maybe(op.y), out=_columns(op.out), kind=_POINTWISE[op.kind],
            activation=_ACTIVATIONS[op.activation], param=op.params[0] if op.params else 0.0,
        )  # fmt: skip

    def _rope_rows(self, op: RopeRows) -> None:
        table = self._program.rope_tables[op.table]
        self._native.add_rope_rows(inv_freq=list(table.inv_freq), factor=table.factor, out=_columns(op.out))

    def _rope(self, op: Rope) -> None:
        self._native.add_rope(
            x=_columns(op.x), rows=_columns(op.rows), heads=op.heads, head_dim=op.head_dim, start=op.start,
            dims=op.dims, interleaved=op.layout == "interleaved",
        )  # fmt: skip

    def _attention(self, op: Attention) -> None:
        self._native.add_attention(
            q=_columns(op.q), k=_columns(op.k), v=_columns(op.v), out=_columns(op.out), group=op.group,
            key_plane=op.planes[0], value_plane=op.planes[1], heads=op.heads, kv_heads=op.kv_heads, dim_k=op.dim_k,
            dim_v=op.dim_v, scale=op.scale, window=min(op.window or 0, MOST_POSITIONS), softcap=op.softcap or 0.0,
            sinks=op.sinks,
        )  # fmt: skip

    def _take_rows(self, op: TakeRows) -> None:
        self._native.add_take_rows(x=_columns(op.x), out=_columns(op.out))


_METHODS: MappingProxyType[type[Op], Callable[..., None]] = MappingProxyType(
    {
        Embed: Lowering._embed,
        Norm: Lowering._norm,
        Linear: Lowering._linear,
        Logits: Lowering._logits,
        Pointwise: Lowering._pointwise,
        RopeRows: Lowering._rope_rows,
        Rope: Lowering._rope,
        Attention: Lowering._attention,
        TakeRows: Lowering._take_rows,
    }
)


def _columns(ref: Ref) -> Columns:
    return (ref.buffer, ref.start, ref.width)


def _maybe(ref: Ref | None) -> Columns | None:
    return None if ref is None else _columns(ref)
