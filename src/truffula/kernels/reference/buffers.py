"""The program's buffers during a step: the output of each op, until its last reader has run."""

from __future__ import annotations

import torch
from torch import Tensor

from truffula.errors import KernelError
from truffula.kernels.program import Program, Ref


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
            whole = torch.zeros(value.shape[0], self._declared[ref.buffer].width, dtype=dtype, device=value.device)
            self._values[ref.buffer] = whole
        whole[:, ref.start : ref.start + ref.width] = value

    def drop(self, buffers: tuple[int, ...]) -> None:
        for buffer in buffers:
            self._values[buffer] = None
