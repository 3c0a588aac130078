"""The torch executable with kernels in place of the ops that have some."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from truffula.errors import KernelError
from truffula.kernels.adapters import AdapterLayout
from truffula.kernels.arena import plan_arena, written_by
from truffula.kernels.inputs import Array, Capacity, StepInputs
from truffula.kernels.program import Attention, Embed, Op, Program, Ref
from truffula.kernels.reference.executable import Buffers, ReferenceExecutable, Step, check_ids
from truffula.kernels.reference.weights import Weight
from truffula.kernels.triton.adapters import DeviceAdapters
from truffula.kernels.triton.check import wrong_kernels
from truffula.kernels.triton.device import Device, lost
from truffula.kernels.triton.launch import Launch, Launcher, StepState, attention_key, attention_name
from truffula.kernels.triton.tiles import Tiles
from truffula.kernels.triton.work import (
    COUNTS,
    PIECE_ROWS,
    Shapes,
    StepMemory,
    attention_capacity,
    attention_lists,
    check_places,
    row_lists,
)

log = logging.getLogger(__name__)


class FixedBuffers(Buffers):
    """Buffers that never move, in one block of memory: kernels know their addresses."""

    def __init__(
        self, program: Program, dtype: torch.dtype, capacity: Capacity, device: torch.device, *, reuse: bool
    ) -> None:
        super().__init__(program, dtype)
        plan = plan_arena(program, capacity, reuse=reuse)
        arena = torch.zeros(4 * plan.floats, dtype=torch.uint8, device=device)
        self._rows = {"T": 0, "R": 0}
        self._whole: list[Tensor] = []
        for buffer, offset, stride in zip(program.buffers, plan.offsets, plan.strides, strict=True):
            count = capacity.max_tokens if buffer.rows == "T" else capacity.max_logit_rows
            typed = arena[4 * offset :].view(self._dtypes[buffer.id])
            self._whole.append(typed.as_strided((count, buffer.width), (stride, 1)))

    def begin(self, inputs: StepInputs) -> None:
        self._rows = {"T": inputs.T, "R": inputs.R}

    def whole(self, ref: Ref) -> Tensor:
        """All rows of the buffer's columns, whatever a step has."""
        return self._whole[ref.buffer][:, ref.start : ref.start + ref.width]

    def get(self, ref: Ref) -> Tensor:
        return self.whole(ref)[: self._rows[self._declared[ref.buffer].rows]]

    def put(self, ref: Ref, value: Tensor) -> None:
        self.get(ref).copy_(value)

    def drop(self, buffers: tuple[int, ...]) -> None:
        """They stay."""


class TritonExecutable(ReferenceExecutable):
    """See the base: an op without a kernel, and the rows of a segment whose adapter has parts without a kernel, are
    computed by torch on the device.

    Steps finish within ``submit``: ids are drawn on the host.
    """

    def __init__(
        self, program: Program, layout: AdapterLayout, dtype: torch.dtype, weights: list[Weight], capacity: Capacity,
        device: Device, tiles: Tiles, *, debug: bool = False,
    ) -> None:  # fmt: skip
        at = device.torch_device
        super().__init__(program, layout, dtype, weights, capacity, at, debug=debug)
        self.program, self.capacity, self.dtype = program, capacity, dtype
        self.planes, self.where = self._planes, device
        self.fixed = FixedBuffers(program, dtype, capacity, at, reuse=not debug)
        self._buffers = self.fixed
        self.resident = DeviceAdapters(program, layout, at)
        self._adapters = self.resident
        self._cuts = {
            attention_key(op, tiles): tiles.attention(op.heads // op.kv_heads)
            for op in program.ops if isinstance(op, Attention)
        }  # fmt: skip
        self._reads = {(op.group, op.window, op.chunked) for op in program.ops if isinstance(op, Attention)}
        self._step_memory = StepMemory(device, self._shapes())
        for name in _INPUTS:
            setattr(self.inputs, name, self._step_memory.host[name])
        self._state = StepState(self.inputs)
        self._by_torch: dict[int, list[int]] = {}
        launcher = Launcher(
            program, weights, self._planes, capacity, device, tiles, self.fixed.whole,
            self._step_memory.there, self.resident.first, self._state,
        )  # fmt: skip
        self.launches: list[Launch | None] = [launcher.launch_of(index) for index in range(len(program.ops))]

    def prepare(self) -> None:
        """Replace kernels that are wrong on this device by torch: see ``check.py``."""
        if self.where.tried:
            return
        wrong = wrong_kernels(self)
        for index in wrong:
            self.launches[index] = None
        kinds = Counter((type(self.program.ops[index]).__name__, why) for index, why in wrong.items())
        for (kind, why), count in kinds.items():
            log.warning("%s: torch computes %d ops %s instead of a kernel: %s", self._device, count, kind, why)

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:
            if self.has_failed(error):
                raise lost(self._device, error) from error
            raise

    def _run(self) -> None:
        try:
            super().run()
        except Exception:
            self.where.synchronize()  # what was uploaded may be written again
            raise

    def has_failed(self, error: Exception) -> bool:
        """Whether ``error`` says that the device has failed, with all that is on it."""
        return isinstance(error, torch.AcceleratorError) or "[CUDA]" in str(error)

    def torch_value(self, op: Op, step: Step) -> Tensor | None:
        """What torch would write."""
        return self._value(op, step)

    def close(self) -> None:
        super().close()
        self.launches = []

    @torch.inference_mode()
    def begin_step(self) -> Step:
        return self._step()

    def _step(self) -> Step:
        """Uploads what the kernels read."""
        check_places(self.inputs, self._capacity, self._reads)
        step, i, state, memory = super()._step(), self.inputs, self._state, self._step_memory
        self.fixed.begin(i)
        self._by_torch = self.resident.by_torch(i)
        counts = memory.host["counts"]
        counts[:2] = i.T, i.R
        state.planes = 0
        for at, (letter, rows, spans) in enumerate((("t", i.T, i.seg[:, :2]), ("r", i.R, i.seg_r))):
            made = row_lists(rows, [(lo, hi) for lo, hi in spans[: i.G].tolist()])
            counts[2 + at], counts[4 + at] = len(made.pieces), len(made.shrinks)
            slots = i.seg[made.entries, 2].tolist()
            _fill(memory.host[f"pieces_{letter}"], made.pieces)
            _fill(memory.host[f"shrinks_{letter}"], made.shrinks)
            _fill(memory.host[f"entries_{letter}"], np.array([self.resident.address(s) for s in slots], np.int64))
            _fill(memory.host[f"weights_{letter}"], i.seg_weight[made.entries])
            state.planes = max(state.planes, int(made.pieces[:, 3].max(initial=0)))
        state.adapted = state.planes > 0
        # A multiple of 16, as all strides of workspaces: a kernel is compiled for those that are, and for others again.
        state.width = -(-self.resident.width(i.seg[: i.G, 2].tolist()) // 16) * 16
        for key, cut in self._cuts.items():
            window, chunked, _ = key
            lists, name = attention_lists(i, window, chunked, cut), attention_name(key)
            _fill(memory.host[f"items_{name}"], lists.items)
            _fill(memory.host[f"merges_{name}"], lists.merges)
            memory.host[f"counts_{name}"][:] = len(lists.items), len(lists.merges)
            state.partial_rows[key] = lists.partial_rows
        memory.upload()
        return step

    def _compute(self, op: Op, step: Step) -> None:
        launch, segments = self.launches[step.op], self._by_torch.get(step.op, [])
        if segments or (launch is None and self.inputs.G and step.op in self.resident.first):
            step.segments, step.segments_r = self.resident.all_by_torch(step.op, self.inputs)
        if launch is None:
            super()._compute(op, step)
            return
        out = written_by(op)
        if isinstance(op, Embed) and not segments:  # with adapters torch's own check knows their tokens
            given = self.inputs.token_ids if op.source == "token" else self.inputs.position + op.offset
            check_ids(given[: self.inputs.T], self.program.weights[op.table].shape[0], (step.op, 0), ())
        value = self._value(op, step) if segments else None
        launch()
        if value is not None:
            at_rows = self.inputs.seg_r if self._program.buffers[out.buffer].rows == "R" else self.inputs.seg
            for index in segments:
                lo, hi = at_rows[index, :2].tolist()
                self.fixed.get(out)[lo:hi] = value[lo:hi]

    def _shapes(self) -> Shapes:
        """Of what a step's kernels read."""
        c, shapes = self._capacity, Shapes()
        for name in _INPUTS:
            shapes[name] = (getattr(self.inputs, name).shape, np.int32)
        shapes["counts"] = ((COUNTS,), np.int32)
        entries = 4 * c.max_segments + 4  # segments that overlap in part count more than once
        for letter, rows in (("t", c.max_tokens), ("r", c.max_logit_rows)):
            pieces = rows // PIECE_ROWS + 2 * c.max_segments + 2
            shapes[f"pieces_{letter}"] = ((pieces, 4), np.int32)
            shapes[f"shrinks_{letter}"] = ((4 * pieces, 4), np.int32)
            shapes[f"entries_{letter}"] = ((entries,), np.int64)
            shapes[f"weights_{letter}"] = ((entries,), np.float32)
        for key, cut in self._cuts.items():
            items, merges = attention_capacity(c, cut)
            name = attention_name(key)
            shapes[f"items_{name}"] = ((items, 5), np.int32)
            shapes[f"merges_{name}"] = ((merges, 3), np.int32)
            shapes[f"counts_{name}"] = ((2,), np.int32)
        return shapes


_INPUTS = ("token_ids", "position", "rope_pos", "slot_mapping", "block_tables", "q_start", "kv_len", "logit_rows")
"""The arrays of ``StepInputs`` that kernels read."""


def _fill(array: Array, values: Array) -> None:
    """Raises ``KernelError`` when they do not fit."""
    if len(values) > len(array):
        raise KernelError(f"a step has {len(values)} items for adapters; there is room for {len(array)}.", param="seg")
    array[: len(values)] = values
