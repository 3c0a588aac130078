"""Triton's interpreter, as the tests of ``kernels/triton`` run it: with right bfloat16 numbers, and one order of sums.

Alone it multiplies the bits of bfloat16 as integers, truncates where a GPU rounds, and sums a product in whatever order
numpy's library takes for its shape. ``install`` mends all three, and lets arithmetic on bfloat16 fail: on a GPU it
would round after each operation, so kernels convert to float32 when they load.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from truffula.errors import MissingDependency

Array = npt.NDArray[Any]
_ARITHMETIC = "create_fadd create_fsub create_fmul create_fdiv create_fma create_maximumf create_minimumf create_fneg"


def install() -> None:
    """Mend the interpreter of this process. Idempotent. The environment has TRITON_INTERPRET=1 before triton is
    imported.

    Raises:
        MissingDependency: triton is not installed, or was imported as a compiler.
    """
    try:
        interpreter: Any = import_module("triton.runtime.interpreter")
        tl: Any = import_module("triton.language")
    except ImportError as error:
        raise MissingDependency(f"triton cannot be imported: {error}.", param="triton") from error
    if type(tl.sum).__name__ == "JITFunction":
        raise MissingDependency("triton was imported without TRITON_INTERPRET=1.", param="triton")
    if getattr(interpreter, "_truffula", False):
        return
    interpreter._truffula = True
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    convert = interpreter._convert_float

    def convert_float(values: Array, source: Any, target: Any, rounding: Any) -> Array:
        if source == tl.float32 and target == tl.bfloat16:
            return round_bfloat16(values)
        if source == tl.bfloat16 and target == tl.float32:
            return np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << np.uint32(16)
        result: Array = convert(values, source, target, rounding)
        return result

    def widened(tensor: Any) -> Array:
        if tensor.dtype.scalar != tl.bfloat16:
            return np.asarray(tensor.data)
        return convert_float(tensor.data, tl.bfloat16, tl.float32, None).view(np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        del self, precision, imprecise
        left, right = widened(a).astype(d.data.dtype), widened(b).astype(d.data.dtype)
        total = d.data.copy()
        for k in range(left.shape[-1]):  # ascending, whatever the shape: a row's bits do not depend on its company
            total += left[..., k, None] * right[..., None, k, :]
        return handle(total, d.dtype.scalar)

    def checked(name: str) -> Any:
        original = getattr(builder, name)

        def arithmetic(self: Any, *operands: Any) -> Any:
            if any(operand.dtype.scalar == tl.bfloat16 for operand in operands):
                raise TypeError(f"{name} of bfloat16 numbers: convert them to float32 when they are loaded.")
            return original(self, *operands)

        return arithmetic

    check_reduced = interpreter.ReduceScanOpInterface.check_tensor

    def check_tensor(self: Any, operands: Any) -> None:
        check_reduced(self, operands)
        if any(operand.dtype.scalar == tl.bfloat16 for operand in operands):
            raise TypeError("a reduction of bfloat16 numbers: convert them to float32 when they are loaded.")

    interpreter._convert_float = convert_float
    interpreter.ReduceScanOpInterface.check_tensor = check_tensor
    for name in _ARITHMETIC.split():
        if hasattr(builder, name):
            setattr(builder, name, checked(name))
    builder.create_dot = create_dot


def round_bfloat16(values: Array) -> Array:
    """uint16 bits of float32 ``values`` (or of their bits), rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    result: Array = np.where(np.isnan(bits.view(np.float32)), np.uint16(0x7FC0), rounded.astype(np.uint16))
    return result
