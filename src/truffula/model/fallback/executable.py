"""What the packed and the serial executable have in common: the model, its adapters, sampling."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from truffula.errors import KernelError
from truffula.kernels.adapters import AdapterImage
from truffula.kernels.inputs import (
    Array,
    Capacity,
    Float32,
    Int32,
    SampleInputs,
    SequenceSampling,
    StepInputs,
    StepOutput,
)
from truffula.kernels.program import ModelInterface
from truffula.kernels.reference.slots import AdapterSlots
from truffula.kernels.sampling import Sampler
from truffula.kernels.synchronous import SynchronousExecutable
from truffula.model.fallback.adapters import AdapterHooks, layout_of_sites
from truffula.model.fallback.plan import TransformersModel


class TransformersExecutable(SynchronousExecutable):
    """An ``Executable`` around ``model``, a loaded model of transformers. Subclasses implement ``run``."""

    def __init__(
        self,
        described: TransformersModel,
        model: Any,
        interface: ModelInterface,
        capacity: Capacity,
        device: torch.device,
    ) -> None:
        super().__init__(
            StepInputs.allocate(capacity, len(interface.kv_groups)),
            SampleInputs.allocate(capacity, interface.vocab_size),
            interface.output,
        )
        self.layout = layout_of_sites(interface)
        self.described = described
        self.interface = interface
        self.capacity = capacity
        self.device = device
        self.model = model
        of_logits = {name for name, kept in described.trace.linears.items() if kept}
        self.adapters = AdapterSlots(self.layout, device)
        self.hooks = AdapterHooks(model, interface.sites, of_logits)
        self._sampler = Sampler(capacity.max_seqs, interface.vocab_size)
        self._logits: Array = np.zeros((0, interface.vocab_size), np.float32)

    def forward(self, tokens: Array, rows: Array, **more: Any) -> tuple[Tensor, Any]:
        """float32 logits ``[N, rows, V]`` of ``tokens [N, T]`` at the ``rows`` of each, and what the model returned."""
        ids, kept = self.long(tokens), self.long(rows)
        keeps = "logits_to_keep" in self.described.skeleton.arguments
        out = self.model(input_ids=ids, **more, **({"logits_to_keep": kept} if keeps else {}))
        return (out.logits if keeps else out.logits.index_select(1, kept)).float(), out

    def long(self, array: Array) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.device)

    def logits(self) -> Array:
        return self._logits.copy()

    def sample(self) -> StepOutput:
        return self._sampler.sample(self._logits, self.samples)

    def tap(self, op: int) -> Array:
        raise KernelError(f"a model of transformers has no ops to tap ({op}).", param="op")

    def adapter_bytes(self, image: AdapterImage) -> int:
        return self.adapters.bytes_of(image)

    def adapter(self, image: AdapterImage) -> int:
        return self.adapters.add(image)

    def drop_adapter(self, slot: int) -> None:
        self.adapters.drop(slot)

    def close(self) -> None:
        self.adapters.clear()
        self.hooks.prepare(0, (), 0, ())
        self.model = None
        self._logits = np.zeros((0, self.interface.vocab_size), np.float32)

    def write_kv(self, op: int, slots: Int32, keys: Float32, values: Float32) -> None:
        raise KernelError("transformers' code cannot be given keys and values.", param="op")

    @abstractmethod
    def release_kv(self, group: int, blocks: Int32) -> None:
        """See ``Executable``."""

    def release_states(self, rows: Int32) -> None:
        """Does nothing: the interface has no states; those of a model are in its cache objects."""

    def _start_sampling(self, slot: int, prompt_ids: Int32, completion_ids: Int32, sampling: SequenceSampling) -> None:
        self._sampler.set_sequence(slot, prompt_ids, completion_ids, sampling)
