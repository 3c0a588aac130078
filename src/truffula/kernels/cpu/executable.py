"""A loaded program on the native backend: ``Executable`` around the C++ one."""

from __future__ import annotations

from typing import Any

import numpy as np

from truffula.kernels.adapters import AdapterImage, AdapterLayout, require_served
from truffula.kernels.cpu.library import as_kernel_errors
from truffula.kernels.inputs import Array, Float32, Int32, SampleInputs, SequenceSampling, StepInputs, StepOutput
from truffula.kernels.program import Output
from truffula.kernels.synchronous import SynchronousExecutable


class CpuExecutable(SynchronousExecutable):
    """Made by ``CpuBackend.load``. ``run`` is one call into C++, without the GIL.

    ``planned_width``: floats per row of a step that the memory plan counts for adapters.
    """

    def __init__(
        self,
        native: Any,
        layout: AdapterLayout,
        inputs: StepInputs,
        samples: SampleInputs,
        output: Output,
        planned_width: int,
    ) -> None:
        super().__init__(inputs, samples, output)
        self.layout = layout
        self._native = native
        self._planned_width = planned_width

    def run(self) -> None:
        with as_kernel_errors():
            self._native.run()

    def sample(self) -> StepOutput:
        with as_kernel_errors():
            ids, logprob, finite, top_ids, top_logprobs = self._native.sample(self.samples)
        shape = (len(ids), len(top_ids) // max(1, len(ids)))
        return StepOutput(ids, logprob, finite.view(np.bool_), top_ids.reshape(shape), top_logprobs.reshape(shape))

    def _start_sampling(self, slot: int, prompt_ids: Int32, completion_ids: Int32, sampling: SequenceSampling) -> None:
        with as_kernel_errors():
            self._native.set_sequence(slot, prompt_ids, completion_ids, sampling)

    def logits(self) -> Array:
        made: Array = self._native.logits(self._output.width)
        return made

    def tap(self, op: int) -> Array:
        with as_kernel_errors():
            made: Array = self._native.tap(op)
        return made

    def op_seconds(self) -> dict[str, float]:
        """Seconds of work per kind of op since the last call, all threads together; the first call begins to count."""
        seconds: dict[str, float] = self._native.take_seconds()
        return seconds

    def write_kv(self, op: int, slots: Int32, keys: Float32, values: Float32) -> None:
        with as_kernel_errors():
            self._native.write_kv(op, slots, keys, values)

    def release_kv(self, group: int, blocks: Int32) -> None:
        with as_kernel_errors():
            self._native.release_kv(group, blocks)

    def release_states(self, rows: Int32) -> None:
        with as_kernel_errors():
            self._native.release_states(rows)

    # --- adapters -----------------------------------------------------------------------------------------------------

    def adapter_bytes(self, image: AdapterImage) -> int:
        """Bytes of what a full step computes for its products, beyond what the memory plan counts."""
        with as_kernel_errors():
            width: int = self._native.adapter_width(image.table, image.data)
        rows = max(len(self.inputs.token_ids), len(self.inputs.logit_rows))
        return 4 * rows * max(0, width - self._planned_width)

    def adapter(self, image: AdapterImage) -> int:
        require_served(image, self.layout)
        with as_kernel_errors():
            slot: int = self._native.add_adapter(image.table, image.data)
        return slot

    def drop_adapter(self, slot: int) -> None:
        with as_kernel_errors():
            self._native.drop_adapter(slot)

    def close(self) -> None:
        self._native = None
