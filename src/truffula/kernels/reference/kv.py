"""Memory that is committed when it is first touched, and the planes of keys and values in it."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from truffula.kernels.inputs import Capacity, Int32
from truffula.kernels.program import KvGroup


class LazyTensors:
    """Makes tensors of any content. On a CPU the system commits their memory when it is first touched."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mappings: dict[int, mmap.mmap] = {}  # of the tensors on a CPU, by address

    def make(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=self._device)
        size = math.prod(shape) * dtype.itemsize
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = torch.frombuffer(mapping, dtype=dtype).view(shape)
        self._mappings[tensor.data_ptr()] = mapping
        return tensor

    def release(self, tensor: Tensor, items: Int32) -> None:
        """Return the whole pages of ``tensor[items]`` to the system. The items ascend."""
        mapping = self._mappings.get(tensor.data_ptr())
        if mapping is None:
            return
        nbytes = tensor[0].nbytes
        for run in np.split(items, np.flatnonzero(np.diff(items) != 1) + 1):
            start = -(-int(run[0]) * nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (int(run[-1]) + 1) * nbytes // mmap.PAGESIZE * mmap.PAGESIZE
            if start < stop:
                mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def close(self) -> None:
        self._mappings.clear()


class KvPlanes:
    """The planes of a model by id, each ``[P + 1, S, width]``.

    The last block is never written and stays zero: padding reads it (see ``attention.Batch``).
    """

    def __init__(self, groups: Sequence[KvGroup], capacity: Capacity, dtype: torch.dtype, memory: LazyTensors) -> None:
        self._groups = groups
        self._memory = memory
        self._planes: dict[int, Tensor] = {}
        self.zero_slot = capacity.num_blocks * capacity.block_size
        for plane in (plane for group in groups for plane in group.planes):
            shape = capacity.num_blocks + 1, capacity.block_size, plane.width
            self._planes[plane.id] = memory.make(shape, dtype)
            self._planes[plane.id][-1].zero_()

    def __getitem__(self, plane: int) -> Tensor:
        return self._planes[plane]

    def release(self, group: int, blocks: Int32) -> None:
        """Return the memory of a group's blocks to the system. The ids ascend."""
        for plane in self._groups[group].planes:
            self._memory.release(self._planes[plane.id], blocks)

    def close(self) -> None:
        self._planes.clear()
