"""The memory of keys and values: one tensor per plane, divided into blocks."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from truffula.kernels.inputs import Capacity, Int32
from truffula.kernels.program import KvGroup


class KvPlanes:
    """The planes of a model by id, each ``[P + 1, S, width]``.

    The last block is never written and stays zero: padding reads it (see ``attention.Batch``). On a CPU the system
    commits memory when it is first touched.
    """

    def __init__(self, groups: Sequence[KvGroup], capacity: Capacity, dtype: torch.dtype, device: torch.device) -> None:
        self._groups = groups
        self._planes: dict[int, Tensor] = {}
        self._mappings: dict[int, mmap.mmap] = {}  # of the planes on a CPU
        self.zero_slot = capacity.num_blocks * capacity.block_size
        for plane in (plane for group in groups for plane in group.planes):
            shape = capacity.num_blocks + 1, capacity.block_size, plane.width
            if device.type == "cpu":
                mapping = self._mappings[plane.id] = mmap.mmap(
                    -1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                )
                tensor = torch.frombuffer(mapping, dtype=dtype).view(shape)
            else:
                tensor = torch.empty(shape, dtype=dtype, device=device)
            tensor[-1].zero_()
            self._planes[plane.id] = tensor

    def __getitem__(self, plane: int) -> Tensor:
        return self._planes[plane]

    def release(self, group: int, blocks: Int32) -> None:
        """Return the memory of a group's blocks to the system. The ids ascend."""
        for plane in self._groups[group].planes:
            if plane.id not in self._mappings:
                continue
            block_bytes = self._planes[plane.id][0].nbytes
            for run in np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1):
                start = -(-int(run[0]) * block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
                stop = (int(run[-1]) + 1) * block_bytes // mmap.PAGESIZE * mmap.PAGESIZE
                if start < stop:
                    self._mappings[plane.id].madvise(mmap.MADV_DONTNEED, start, stop - start)

    def close(self) -> None:
        self._planes.clear()
        self._mappings.clear()
