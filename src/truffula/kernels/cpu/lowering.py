"""Converts a program's ops to the native list.

Native ops have the fields of ``program.py`` under the same names (``_native.op_fields`` lists them, and a test
compares); ``lower`` converts those that have another form.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from truffula.errors import KernelError
from truffula.kernels.program import NO_EPILOGUE, Embed, ExpertLinear, Linear, Logits, Op, Program, Ref, RopeRows

_UNUSED = frozenset({"name", "layer", "probe", "site", "slices", "compute"})
"""Fields that the native list does not need: ``add_site`` binds sites to ops, and every sum is float32."""


def add_ops(native: Any, program: Program, dtype: str) -> None:
    """Append the ops of ``program`` to ``native``. ``dtype`` is the model's.

    Raises:
        KernelError: The native backend has no such op, or it does not support a field's value.
    """
    for op in program.ops:
        kind, fields = lower(op, program, dtype)
        try:
            native.add(kind, **{name: _plain(value) for name, value in fields.items()})
        except ValueError as error:
            raise KernelError(f"op {op.name!r}: the cpu backend can't run it: {error}.", param="ops") from error


def lower(op: Op, program: Program, dtype: str) -> tuple[str, dict[str, Any]]:
    """The native op's name and its fields."""
    fields = {name: value for name, value in vars(op).items() if name not in _UNUSED}
    match op:
        case Embed(scale=float(scale)):
            exact = dtype == "float32" or program.weights[op.table].dtype == "float32"
            fields["scale"] = float(np.float32(scale) if exact else ml_dtypes.bfloat16(np.float32(scale)))
        case Linear():
            fields |= vars(fields.pop("epilogue")) | {"softcap": None}
        case ExpertLinear():
            fields |= vars(fields.pop("epilogue"))
        case Logits():
            return "Linear", vars(NO_EPILOGUE) | fields
        case RopeRows():
            table = program.rope_tables[op.table]
            fields = {name: value for name, value in vars(table).items() if name != "id"} | {"out": op.out}
    return type(op).__name__, fields


def _plain(value: Any) -> Any:
    """A Ref as (buffer, start, width), a tuple as a list."""
    if isinstance(value, Ref):
        return value.buffer, value.start, value.width
    return list(value) if isinstance(value, tuple) else value
