"""Weights and adapters as torch tensors: views of the mapped arrays where the stored dtype serves, else converted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from truffula.errors import KernelError
from truffula.kernels.backend import (
    BFLOAT16,
    STORED,
    Part,
    PullWeight,
    as_array,
    expert_matrices,
    pull_parts,
)
from truffula.kernels.inputs import Array
from truffula.kernels.mapped import release_pages
from truffula.kernels.program import Linear, Program, WeightDecl

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def view(array: Array) -> Tensor:
    """A tensor over ``array``'s memory, in its dtype, without a copy; keeps the array alive.

    Raises:
        KernelError: The dtype is not float32, float16 or bfloat16.
    """
    if array.dtype not in STORED:
        raise KernelError(f"a tensor is {array.dtype}, not float32, float16 or bfloat16.", param="dtype")
    if not array.flags.aligned or any(stride % array.itemsize or stride < 0 for stride in array.strides):
        array = array.copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to it
        if array.dtype == BFLOAT16:  # numpy has no such type of its own; the bits travel as int16
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


@dataclass(frozen=True)
class Weight:
    """A weight as served: tensors stacked along axis 0; several when they are mapped arrays of a fused weight.

    A weight of experts has no parts, but a weight for each of ``experts``.
    """

    parts: tuple[Tensor, ...]
    experts: tuple[Weight, ...] = ()

    def rows(self, lo: int, hi: int) -> Tensor:
        """Rows ``lo .. hi`` of the stacked tensors."""
        return self.whole[lo:hi] if len(self.parts) == 1 else torch.cat(self.parts)[lo:hi]

    @property
    def whole(self) -> Tensor:
        """The single tensor; a table that is gathered has exactly one."""
        (tensor,) = self.parts
        return tensor


def load_weights(program: Program, dtype: torch.dtype, pull: PullWeight, device: torch.device) -> list[Weight]:
    """Pull every weight of ``program`` to ``device``, in order. See ``_load_one`` for what is copied."""
    exact = {op.weight for op in program.ops if isinstance(op, Linear) and op.compute == "float32"}
    return [_load_one(decl, torch.float32 if decl.id in exact else dtype, pull, device) for decl in program.weights]


def _load_one(decl: WeightDecl, dtype: torch.dtype, pull: PullWeight, device: torch.device) -> Weight:
    """Views when the device is the CPU and every part is stored in the served dtype; else one new tensor, filled part
    by part.

    Vectors and the weights of convolutions end as float32 (they are small, and every op computes in float32), rounded
    to the served dtype on the way.
    Cost: mapped parts cost no memory of their own; source pages are released while a part is converted.
    """
    target = torch.float32 if decl.dtype == "float32" else dtype
    parts = pull_parts(pull, decl)
    if len(decl.shape) == 3:
        return Weight((), _load_experts(decl, parts, target, device))
    arrays = [as_array(part) for part in parts]
    sources = [view(array) for array in arrays]
    small = len(decl.shape) == 1 or "conv" in decl.uses
    keep = device.type == "cpu" and all(source.dtype == target for source in sources) and not small
    if keep and (len(sources) == 1 or "rows" not in decl.uses):
        return Weight(tuple(sources))
    made = torch.empty(decl.shape, dtype=target, device=device)
    row = 0
    for array, source in zip(arrays, sources, strict=True):
        made[row : row + source.shape[0]].copy_(source)
        row += source.shape[0]
        release_pages(array)
    return Weight((made.float() if small else made,))


def _load_experts(
    decl: WeightDecl, parts: Sequence[Part], target: torch.dtype, device: torch.device
) -> tuple[Weight, ...]:
    """The weight of each expert: views of its matrices where they serve, else new tensors."""
    found: list[dict[int, Tensor]] = [{} for _ in range(decl.shape[0])]
    for expert, lo, matrix in expert_matrices(decl, parts):
        found[expert][lo] = view(as_array(matrix)).to(device, target)
    for part in parts:
        if isinstance(part, np.ndarray):
            release_pages(part)
    return tuple(Weight(tuple(each[lo] for lo in sorted(each))) for each in found)
