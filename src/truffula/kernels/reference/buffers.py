"""The program's buffers in one step: what each op wrote, until its last reader has run."""

from __future__ import annotations

import torch
from torch import Tensor

from truffula.errors import KernelError
from truffula.kernels.program import Op, Program, Ref


def refs(op: Op) -> list[Ref]:
    """Every buffer range an op names, read or written."""
    values = list(vars(op).values())
    if (epilogue := getattr(op, "epilogue", None)) is not None:
        values.append(epilogue.residual)
    return [value for value in values if isinstance(value, Ref)]


def dead_after(program: Program) -> list[tuple[int, ...]]:
    """Per op, the buffers nobody touches behind it; the logits stay."""
    last = {ref.buffer: index for index, op in enumerate(program.ops) for ref in refs(op)}
    last.pop(program.logits.buffer, None)
    return [tuple(b for b, at in last.items() if at == index) for index in range(len(program.ops))]


def peak_bytes(program: Program, tokens: int, logit_rows: int, model_bytes: int) -> int:
    """Bytes of buffers alive at once at full capacity."""
    dead = dead_after(program)
    alive: dict[int, int] = {}
    peak = 0
    for index, op in enumerate(program.ops):
        for ref in refs(op):
            buffer = program.buffers[ref.buffer]
            rows = tokens if buffer.rows == "T" else logit_rows
            alive[ref.buffer] = rows * buffer.width * (4 if buffer.dtype == "float32" else model_bytes)
        peak = max(peak, sum(alive.values()))
        for gone in dead[index]:
            alive.pop(gone, None)
    return peak


class Buffers:
    """Maps refs to tensors. A value that covers a whole buffer becomes the buffer; a narrower one is copied into it."""

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        self._declared = program.buffers
        self._dtypes = [torch.float32 if b.dtype == "float32" else dtype for b in program.buffers]
        self._values: list[Tensor | None] = [None] * len(program.buffers)

    def dtype(self, ref: Ref) -> torch.dtype:
        return self._dtypes[ref.buffer]

    def get(self, ref: Ref) -> Tensor:
        """``[rows, ref.width]``: a view of the buffer."""
        value = self._values[ref.buffer]
        if value is None:
            raise KernelError(f"buffer {self._declared[ref.buffer].name!r} is read but holds nothing.")
        if ref.width == value.shape[1]:
            return value
        return value[:, ref.start : ref.start + ref.width]

    def put(self, ref: Ref, value: Tensor) -> None:
        """Write ``value`` (a fresh tensor, which the buffer may keep) with the buffer's dtype."""
        dtype = self._dtypes[ref.buffer]
        if ref.width == self._declared[ref.buffer].width:
            self._values[ref.buffer] = value if value.dtype == dtype else value.to(dtype)
            return
        whole = self._values[ref.buffer]
        if whole is None or whole.shape[0] != value.shape[0]:
            whole = torch.zeros(value.shape[0], self._declared[ref.buffer].width, dtype=dtype)
            self._values[ref.buffer] = whole
        whole[:, ref.start : ref.start + ref.width] = value

    def drop(self, buffers: tuple[int, ...]) -> None:
        for buffer in buffers:
            self._values[buffer] = None
