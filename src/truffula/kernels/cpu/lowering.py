"""Converts a program's ops to the native list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from truffula.errors import KernelError
from truffula.kernels.cpu.formats import LANES, panels_of
from truffula.kernels.inputs import Array
from truffula.kernels.program import (
    NO_EPILOGUE,
    Attention,
    Embed,
    Linear,
    Logits,
    Op,
    Pointwise,
    Program,
    Ref,
    RopeRows,
)

MAX_POSITION = 2**31 - 1
"""Positions are int32, so a window of this width already hides no key."""
_UNUSED = frozenset({"name", "layer", "probe", "site", "slices", "compute"})
"""Fields that the native list does not need: ``add_site`` binds sites to ops, and every sum is float32."""


class Lowering:
    """Adds ops to ``native`` by the names of their fields.

    Native ops have the fields of ``program.py`` under the same names (``_native.op_fields`` lists them, and a test
    compares). Where a native field has another form, the method named after the op converts it. ``vectors`` are the
    loaded weights with one axis; ``dtype`` is the model's.
    """

    def __init__(self, native: Any, program: Program, dtype: str, vectors: Sequence[Array | None]) -> None:
        self._native = native
        self._program = program
        self._dtype = dtype
        self._vectors = vectors

    def add(self, op: Op) -> None:
        """Append ``op``.

        Raises:
            KernelError: The native backend has no such op, or it does not support a field's value.
        """
        kind, fields = self.lower(op)
        try:
            self._native.add(kind, **{name: _plain(value) for name, value in fields.items()})
        except ValueError as error:
            raise KernelError(f"op {op.name!r}: the cpu backend can't run it: {error}.", param="ops") from error

    def lower(self, op: Op) -> tuple[str, dict[str, Any]]:
        """The native op's name and its fields."""
        fields = {name: value for name, value in vars(op).items() if name not in _UNUSED}
        kind = type(op).__name__
        convert = getattr(self, f"_{kind.lower()}", None)
        return (kind, fields) if convert is None else convert(op, fields)

    def _embed(self, op: Embed, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "Embed", fields if op.scale is None else {**fields, "scale": self._rounded(op.scale, op.table)}

    def _rounded(self, scale: float, table: int) -> float:
        exact = self._dtype == "float32" or self._program.weights[table].dtype == "float32"
        return float(np.float32(scale) if exact else np.asarray(scale, np.float32).astype(ml_dtypes.bfloat16))

    def _linear(self, op: Linear, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        epilogue = vars(fields.pop("epilogue"))
        bias = self._bias(op.epilogue.bias, op.weight, op.epilogue.glu)
        return "Linear", {**fields, **epilogue, "bias": bias, "softcap": None}

    def _logits(self, op: Logits, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "Linear", {
            **fields,
            **vars(NO_EPILOGUE),
            "scale": op.scale,
            "bias": self._bias(op.bias, op.weight, False),
        }

    def _bias(self, bias: int | None, weight: int, glu: bool) -> list[float]:
        """The bias in the order of the packed outputs, with zeros in the padding lanes."""
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

    def _pointwise(self, op: Pointwise, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        del fields["params"]
        return "Pointwise", {**fields, "param": op.params[0] if op.params else None}

    def _roperows(self, op: RopeRows, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        table = self._program.rope_tables[op.table]
        return "RopeRows", {"inv_freq": table.inv_freq, "factor": table.factor, "out": op.out}

    def _attention(self, op: Attention, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        keys, values = fields.pop("planes")
        window = min(op.window or 0, MAX_POSITION)
        return "Attention", {**fields, "key_plane": keys, "value_plane": values, "window": window}


def _plain(value: Any) -> Any:
    """A Ref as (buffer, start, width), a tuple as a list."""
    if isinstance(value, Ref):
        return value.buffer, value.start, value.width
    return list(value) if isinstance(value, tuple) else value
