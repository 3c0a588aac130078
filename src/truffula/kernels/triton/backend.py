"""The CUDA backend: its memory plan and loading."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from truffula.errors import InsufficientMemory
from truffula.kernels.adapters import AdapterLayout, layout_of
from truffula.kernels.backend import MemoryLimit, MemoryPlan, PullWeight
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Program
from truffula.kernels.reference.backend import ReferenceBackend
from truffula.kernels.reference.weights import Weight, load_weights
from truffula.kernels.triton.device import CudaDevice, Device
from truffula.kernels.triton.executable import TritonExecutable
from truffula.kernels.triton.launch import workspaces
from truffula.kernels.triton.served import ops_without_kernels
from truffula.kernels.triton.tiles import Tiles, gpu_tiles, host_tiles
from truffula.kernels.validate import validate
from truffula.option import format_size

log = logging.getLogger(__name__)


class TritonBackend(ReferenceBackend):
    """Triton kernels on ``device``, and torch there for ops without a kernel."""

    name = "triton"
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")

    def __init__(self, device: Device, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._where = device
        self._device = device.torch_device
        self.device = str(self._device)
        self.isa = ""

    def free_memory(self) -> MemoryLimit:
        return self._where.free_memory()

    def faster_dtype(self) -> tuple[str, str]:
        return "bfloat16", "a GPU multiplies it fastest"

    def adapter_layout(self, program: Program) -> AdapterLayout:
        return layout_of(program, "mixed")

    def plan(
        self,
        program: Program,
        dtype: str,
        capacity: Capacity,
        stored_types: Mapping[str, str] = MappingProxyType({}),
    ) -> MemoryPlan:
        """Besides the buffers: the sums of products and of attention, and what a step uploads."""
        plan, tiles = super().plan(program, dtype, capacity, stored_types), self._tiles(dtype)
        sums = sum(workspaces(program, capacity, tiles).values())
        uploads = 4 * len(program.kv_groups) * capacity.max_seqs * capacity.max_blocks_per_seq
        return replace(plan, arena_bytes=plan.arena_bytes + 4 * sums + uploads)

    def load(
        self, program: Program, dtype: str, pull: PullWeight, capacity: Capacity, *, debug: bool = False
    ) -> TritonExecutable:
        validate(program)
        if slow := ops_without_kernels(program):
            log.warning("%s computes ops that have no kernel yet with torch, which is slower: %s", self.device, slow)
        served, layout = self._served(dtype), self.adapter_layout(program)
        try:
            with torch.inference_mode():
                weights = [_whole(weight) for weight in load_weights(program, served, pull, self._device)]
                tiles = self._tiles(dtype)
                return TritonExecutable(program, layout, served, weights, capacity, self._where, tiles, debug=debug)
        except torch.OutOfMemoryError as error:
            free = self.free_memory()
            raise InsufficientMemory(
                f"{self.device} has no memory for the model: {format_size(free.nbytes)} are left. Others may use it "
                "as well: lower --memory, --max-running or --max-model-len.",
                param="memory",
                free_bytes=free.nbytes,
            ) from error

    def _tiles(self, dtype: str) -> Tiles:
        if not isinstance(self._where, CudaDevice):
            return host_tiles(dtype)
        return gpu_tiles(dtype, torch.cuda.get_device_properties(self._device).multi_processor_count)


def _whole(weight: Weight) -> Weight:
    """The parts of a fused weight, which on a host may be views of a file, as one tensor: kernels read one."""
    return weight if len(weight.parts) < 2 else Weight((torch.cat(weight.parts),))
