"""What each weight becomes: plain rows, panels, or a vector; and how it gets there from the mapped file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from truffula.errors import KernelError
from truffula.kernels.backend import PullWeight
from truffula.kernels.mapped import release
from truffula.kernels.program import Embed, Linear, Logits, Program, WeightDecl

Array = npt.NDArray[Any]
LANES = 16
F32, BF16 = 0, 1
"""Storage formats, as kernels.h numbers them."""
_CHUNK_BYTES = 8 << 20
"""Pages of the file are given back after so much of it: the peak stays near the packed size."""


@dataclass(frozen=True)
class Role:
    """How ops use a weight. ``half`` > 0: rows 0 .. half are gates, the rest ups, and their panels alternate."""

    kind: Literal["vector", "rows", "panels"]
    half: int = 0
    exact: bool = False  # kept in float32 whatever the model's dtype


def roles(program: Program) -> list[Role]:
    """One per weight.

    Raises:
        KernelError: A weight is used both as gate and up halves and as a whole.
    """
    halves: dict[int, set[int]] = {}
    exact: set[int] = set()
    for op in program.ops:
        if isinstance(op, Linear):
            outputs = program.weights[op.weight].shape[0]
            halves.setdefault(op.weight, set()).add(outputs // 2 if op.epilogue.glu else 0)
            if op.compute == "float32":
                exact.add(op.weight)
        elif isinstance(op, Logits):
            halves.setdefault(op.weight, set()).add(0)
    tables = {op.table for op in program.ops if isinstance(op, Embed)}
    made = []
    for decl in program.weights:
        if len(decl.shape) == 1:
            made.append(Role("vector", exact=decl.dtype == "float32"))
            continue
        used = halves.get(decl.id, set())
        if len(used) > 1:
            raise KernelError(f"{decl.name} is used both with and without a gate.", param=decl.name)
        if used == {0} or not used or decl.id not in tables:
            half = used.pop() if used else 0
            kind: Literal["rows", "panels"] = "panels" if decl.id in halves else "rows"
            made.append(Role(kind, half, exact=decl.dtype == "float32" or decl.id in exact))
        else:
            raise KernelError(f"{decl.name} is a table and a gate: not supported.", param=decl.name)
    return made


def panels_of(outputs: int, half: int = 0) -> int:
    """Panels of 16 outputs; gates and ups are padded apart."""
    return 2 * -(-half // LANES) if half else -(-outputs // LANES)


def panel_bytes(fmt: int, inputs: int) -> int:
    return 64 * (inputs if fmt == F32 else (inputs + 1) // 2)


def packed_bytes(decl: WeightDecl, role: Role, fmt: int) -> int:
    """Bytes of a weight as this backend holds it."""
    if role.kind == "vector":
        return 4 * decl.shape[0]
    outputs, inputs = decl.shape
    if role.kind == "rows":
        return outputs * inputs * (4 if fmt == F32 else 2)
    return panels_of(outputs, role.half) * panel_bytes(fmt, inputs)


def load_weights(native: Any, program: Program, dtype: str, pull: PullWeight) -> list[Array | None]:
    """Pull every weight of ``program`` in order into ``native``; its ids are the program's. Vectors come back as well.

    In bfloat16 matrices are rounded to it. In float32 a matrix that is stored in bfloat16 stays so: that is exact, and
    half as much to read per step.

    Raises:
        KernelError: Parts that do not make the declared shape, or a dtype that is not float32, float16 or bfloat16.
    """
    return [
        _load_one(native, decl, role, dtype, pull) for decl, role in zip(program.weights, roles(program), strict=True)
    ]


def _load_one(native: Any, decl: WeightDecl, role: Role, dtype: str, pull: PullWeight) -> Array | None:
    arrays = list(pull(decl))
    rows = sum(array.shape[0] for array in arrays if array.ndim)
    if rows != decl.shape[0] or any(array.shape[1:] != decl.shape[1:] for array in arrays):
        shapes = [list(array.shape) for array in arrays]
        raise KernelError(f"weight {decl.name}: parts {shapes} do not make {list(decl.shape)}.", param=decl.name)
    for array in arrays:
        if array.dtype.name not in ("float32", "float16", "bfloat16"):
            raise KernelError(f"{decl.name} is {array.dtype.name}; float32, float16 or bfloat16 wanted.", param="dtype")
    if role.kind == "vector":
        values = np.concatenate([np.asarray(array, np.float32) for array in arrays])
        if dtype == "bfloat16" and not role.exact:
            values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        native.add_vector(values)
        return values
    fmt = matrix_format({array.dtype.name for array in arrays}, dtype, role)
    weight = native.add_matrix(*decl.shape, format=fmt, panels=role.kind == "panels", half=role.half)
    first = 0
    for array in arrays:
        step = max(1, _CHUNK_BYTES // max(1, array.nbytes // max(1, len(array)))) // LANES * LANES or LANES
        for lo in range(0, len(array), step):
            part = array[lo : lo + step]
            native.fill(weight, as_bits(part), first + lo)
            release(part)
        first += len(array)
    return None


def matrix_format(stored: set[str], dtype: str, role: Role) -> int:
    """How a matrix is held whose parts are stored so."""
    if dtype == "bfloat16" and not role.exact:
        return BF16
    return BF16 if stored == {"bfloat16"} else F32


def as_bits(array: Array) -> Array:
    """Contiguous, and bfloat16 as the uint16 that its bits are: what the binding takes."""
    array = np.ascontiguousarray(array)
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def stored_formats(program: Program, dtype: str) -> Mapping[int, int]:
    """Formats to plan memory with: float32 where the files are not known to be bfloat16."""
    return {
        decl.id: BF16 if dtype == "bfloat16" and not role.exact else F32
        for decl, role in zip(program.weights, roles(program), strict=True)
    }
