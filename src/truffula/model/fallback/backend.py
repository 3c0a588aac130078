"""The backend of models that transformers computes: its memory plan, loading, and the probe at the start."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from truffula.kernels.adapters import AdapterLayout
from truffula.kernels.backend import Backend, Executable, MemoryLimit, MemoryPlan, PullWeight, as_array
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Program
from truffula.kernels.reference.weights import DTYPES, view
from truffula.model.fallback.adapters import layout_of_sites
from truffula.model.fallback.names import convert
from truffula.model.fallback.paged import PAGED, PagedExecutable, register
from truffula.model.fallback.plan import TransformersModel
from truffula.model.fallback.probe import probe_paged, probe_serial
from truffula.model.fallback.serial import SerialExecutable


class TransformersBackend:
    """Computes one model of transformers with torch, on the device of ``torch_backend``.

    Its programs have no ops: what is computed is the model's own code.
    """

    name = "reference"
    block_kinds: frozenset[str] = frozenset()

    def __init__(self, described: TransformersModel, torch_backend: Backend) -> None:
        self._described = described
        self._torch = torch_backend
        self.device = torch_backend.device
        self.isa = torch_backend.isa
        self.dtypes = torch_backend.dtypes

    def free_memory(self) -> MemoryLimit:
        return self._torch.free_memory()

    def faster_dtype(self) -> tuple[str, str]:
        return self._torch.faster_dtype()

    def adapter_layout(self, program: Program) -> AdapterLayout:
        return layout_of_sites(program)

    def plan(
        self,
        program: Program,
        dtype: str,
        capacity: Capacity,
        stored_types: Mapping[str, str] = MappingProxyType({}),
    ) -> MemoryPlan:
        """Weights by the model's parameters and buffers. A cache that grows without pages is charged by the block."""
        del stored_types
        served = DTYPES[dtype]
        model = self._described.skeleton.built(served)
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        tied = [model.get_output_embeddings().weight] * self._described.tied
        weights = sum(tensor.nbytes for tensor in tensors.values()) - sum(tensor.nbytes for tensor in tied)
        widest = max((max(site.in_features, site.out_features) for site in program.sites), default=0)
        keeps = "logits_to_keep" in self._described.skeleton.arguments
        rows = capacity.max_logit_rows if keeps else capacity.max_tokens
        serial = bool(self._described.serial)
        # Caches that are stacked anew are there twice.
        state = 2 * self._described.trace.cache_widths[1] * served.itemsize * capacity.max_seqs if serial else 0
        return MemoryPlan(
            kv_at_load=not serial and torch.device(self.device).type != "cpu",
            weight_bytes=weights,
            # The widest activation a few times: input, output, gate and up, and the float32 sum of an adapter.
            arena_bytes=6 * 4 * capacity.max_tokens * min(widest, 2**16) + state,
            logits_bytes=2 * 4 * rows * program.vocab_size,
            kv_block_bytes=tuple(
                sum(plane.width for plane in group.planes) * capacity.block_size * served.itemsize
                for group in program.kv_groups
            ),
        )

    def load(
        self, program: Program, dtype: str, pull: PullWeight, capacity: Capacity, *, debug: bool = False
    ) -> Executable:
        """Load and probe the model.

        Raises:
            PackingFails: The probe of packed sequences failed: plan the model again, to be served serially.
            UnsupportedModel: The model does not continue its own cache right.
            CheckpointError: See ``convert``, and what ``pull`` raises.
        """
        del debug
        described, served, device = self._described, DTYPES[dtype], torch.device(self.device)
        if not described.serial:
            register()
        model = described.skeleton.built(served, None if described.serial else PAGED)
        self._fill(model, program, served, pull)
        if described.serial:
            executable = SerialExecutable(described, model, program, capacity, device)
            probe_serial(executable)
            return executable
        packed = PagedExecutable(described, model, program, capacity, device, served)
        probe_paged(packed)
        return packed

    def _fill(self, model: Any, program: Program, dtype: torch.dtype, pull: PullWeight) -> None:
        """Give ``model`` its weights: views of the files where dtype and form are those of the model.

        They keep ``requires_grad``, although passes run in inference mode: with it ``torch.matmul`` makes one product
        of an input with any strides, without it one product per row, which takes a hundred times as long.
        """
        described = self._described
        stored = {}
        for decl in program.weights:
            (part,) = pull(decl)
            stored[decl.name] = view(as_array(part))
        tensors = {name: stored[source] for name, source in described.sources.items()}
        tensors |= {name: tensors[name].reshape(()) for name in described.scalars}
        tied = described.names.head if described.tied else ""
        convert(model, tensors, dtype, self.device, tied=tied)
        head = model.get_output_embeddings()
        if tied and head.weight is not model.get_input_embeddings().weight:
            head.weight = model.get_input_embeddings().weight
