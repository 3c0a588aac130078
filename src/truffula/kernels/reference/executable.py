"""A loaded program: weights, KV planes, adapters, and the loop that runs the ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from truffula.errors import KernelError
from truffula.kernels.adapters import AdapterImage, AdapterLayout
from truffula.kernels.arena import dead_after, written_by
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
from truffula.kernels.program import (
    Attention,
    CausalConv,
    Embed,
    ExpertLinear,
    GatedDelta,
    Linear,
    Logits,
    Mamba2,
    Mla,
    Norm,
    Op,
    Pointwise,
    Program,
    RecurrentState,
    Ref,
    Rope,
    RopeRows,
    Route,
    TakeRows,
)
from truffula.kernels.reference import attention, delta, mla, ops, states
from truffula.kernels.reference.kv import KvPlanes, LazyTensors
from truffula.kernels.reference.linear import Segment, apply_adapters_, base_product, expert_product, norm_vectors
from truffula.kernels.reference.slots import AdapterSlots
from truffula.kernels.reference.weights import Weight
from truffula.kernels.sampling import Sampler
from truffula.kernels.synchronous import SynchronousExecutable


class Buffers:
    """The program's buffers during a step: the output of each op, until its last reader has run.

    A value that covers a whole buffer becomes the buffer; a narrower one is copied into it.
    """

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


@dataclass
class Step:
    """The tensors of one step that its ops share, made when they are needed, the spans of sequence states, and the
    attention plans made so far. ``op`` is the number of the op that runs."""

    inputs: StepInputs
    device: torch.device
    segments: list[Segment]
    segments_r: list[Segment]
    spans: list[states.SpanBatch]
    plans: dict[tuple[int, int | None, bool], list[attention.Batch]] = field(default_factory=dict)
    factors: dict[tuple[Ref, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    op: int = 0

    def _long(self, array: Array) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.device)

    @cached_property
    def token_ids(self) -> Tensor:
        return self._long(self.inputs.token_ids[: self.inputs.T])

    @cached_property
    def position(self) -> Tensor:
        return self._long(self.inputs.position[: self.inputs.T])

    @cached_property
    def rope_pos(self) -> Tensor:
        return self._long(self.inputs.rope_pos[0, : self.inputs.T])

    @cached_property
    def rope_length(self) -> Tensor:
        return self._long(self.inputs.rope_length[: self.inputs.T])

    @cached_property
    def slots(self) -> list[Tensor]:
        return [self._long(slots[: self.inputs.T]) for slots in self.inputs.slot_mapping]

    @cached_property
    def logit_rows(self) -> Tensor:
        return self._long(self.inputs.logit_rows[: self.inputs.R])

    def acting(self, *, logits: bool = False) -> list[Segment]:
        """The segments whose adapter acts at the op, over token rows or rows of logits."""
        return [s for s in (self.segments_r if logits else self.segments) if (self.op, 0) in s.ops]

    def segments_of(self, rows: Tensor, expert: int) -> list[Segment]:
        """The segments whose adapter acts at the op's ``expert``, as ranges of ``rows``, which ascend."""
        found = [segment for segment in self.segments if (self.op, expert) in segment.ops]
        spans = [torch.searchsorted(rows, torch.tensor([s.lo, s.hi], device=rows.device)).tolist() for s in found]
        return [replace(s, lo=lo, hi=hi) for s, (lo, hi) in zip(found, spans, strict=True) if lo < hi]


class ReferenceExecutable(SynchronousExecutable):
    """``Executable`` in plain torch. Each op is a method (what it reads and writes) around a function (its maths).

    A method's value goes to the buffer that the op writes. States are ``[rows, width]``.
    """

    def __init__(
        self,
        program: Program,
        layout: AdapterLayout,
        dtype: torch.dtype,
        weights: list[Weight],
        capacity: Capacity,
        device: torch.device,
        *,
        debug: bool = False,
    ) -> None:
        super().__init__(
            StepInputs.allocate(capacity, len(program.kv_groups)),
            SampleInputs.allocate(capacity, program.vocab_size),
            program.output,
        )
        self._sampler = Sampler(capacity.max_seqs, program.vocab_size)
        self.layout = layout
        self._program = program
        self._dtype = dtype
        self._weights = weights
        self._capacity = capacity
        self._buffers = Buffers(program, dtype)
        self._device = device
        self._memory = LazyTensors(device)
        self._planes = KvPlanes(program.kv_groups, capacity, dtype, self._memory)
        self._states = [self._make_state(state) for state in program.states]
        self._adapters = AdapterSlots(layout, device)
        self._logits: Array = np.zeros((0, program.output.width), np.float32)
        self._taps: dict[int, Array] | None = {} if debug else None
        self._dead = [()] * len(program.ops) if debug else dead_after(program)

    # --- a step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self) -> None:
        """One forward pass. Programs are validated at load, not here."""
        step = self._step()
        for index, (op, dead) in enumerate(zip(self._program.ops, self._dead, strict=True)):
            step.op = index
            self._compute(op, step)
            if self._taps is not None:
                self._taps[index] = self._buffers.get(written_by(op)).float().cpu().numpy().copy()
            self._buffers.drop(dead)
        self._logits = self._buffers.get(self._program.result).cpu().numpy()

    def _compute(self, op: Op, step: Step) -> None:
        """Write the buffers of one op."""
        if (value := self._value(op, step)) is not None:
            self._buffers.put(written_by(op), value)

    def _value(self, op: Op, step: Step) -> Tensor | None:
        """What one op writes; None of one that works in place."""
        return _METHODS[type(op)](self, op, step)

    def sample(self) -> StepOutput:
        return self._sampler.sample(self._logits, self.samples)

    def _start_sampling(self, slot: int, prompt_ids: Int32, completion_ids: Int32, sampling: SequenceSampling) -> None:
        self._sampler.set_sequence(slot, prompt_ids, completion_ids, sampling)

    def logits(self) -> Array:
        return self._logits.copy()

    def tap(self, op: int) -> Array:
        if self._taps is None:
            raise KernelError("tap() needs load(debug=True).", param="debug")
        if op not in self._taps:
            raise KernelError(f"op {op} has not run.", param="op")
        return self._taps[op]

    # --- adapters -----------------------------------------------------------------------------------------------------

    def adapter_bytes(self, image: AdapterImage) -> int:
        return self._adapters.bytes_of(image)

    def adapter(self, image: AdapterImage) -> int:
        return self._adapters.add(image)

    def drop_adapter(self, slot: int) -> None:
        self._adapters.drop(slot)

    def _make_state(self, state: RecurrentState) -> Tensor:
        """The rows of a state, of which row 0 is zeroed."""
        dtype = torch.float32 if state.dtype == "float32" else self._dtype
        rows = self._memory.make((self._capacity.num_states, state.width), dtype)
        rows[0].zero_()
        return rows

    @torch.inference_mode()
    def write_kv(self, op: int, slots: Int32, keys: Float32, values: Float32) -> None:
        at = self._program.ops[op]
        assert isinstance(at, Attention)
        for plane, rows in zip(at.planes, (keys, values), strict=True):
            rows_there = torch.from_numpy(rows.copy()).to(self._device, self._dtype)
            attention.write(self._planes[plane], self._long(slots), rows_there)

    def release_kv(self, group: int, blocks: Int32) -> None:
        self._planes.release(group, blocks)

    def release_states(self, rows: Int32) -> None:
        for state in self._states:
            self._memory.release(state, rows)

    def close(self) -> None:
        self._adapters.clear()
        self._planes.close()
        self._states.clear()
        self._memory.close()
        self._weights = []
        self._buffers.drop(tuple(range(len(self._program.buffers))))
        self._logits = np.zeros((0, self._program.output.width), np.float32)

    # --- what each op reads and writes --------------------------------------------------------------------------------

    def _step(self) -> Step:
        i = self.inputs
        return Step(
            inputs=i,
            device=self._device,
            segments=self._adapters.segments(i, i.seg[:, :2]),
            segments_r=self._adapters.segments(i, i.seg_r),
            spans=states.plan_spans(i, self._device) if self._states else [],
        )

    def _long(self, array: Array) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._device)

    def _vector(self, weight: int | None) -> Tensor | None:
        return None if weight is None else self._weights[weight].whole

    def _get(self, ref: Ref | None) -> Tensor | None:
        return None if ref is None else self._buffers.get(ref)

    def _embed(self, op: Embed, step: Step) -> Tensor:
        ids = step.token_ids if op.source == "token" else step.position + op.offset
        table, acting = self._weights[op.table].whole, step.acting()
        i = self.inputs
        given = i.token_ids[: i.T] if op.source == "token" else i.position[: i.T] + op.offset
        check_ids(given, len(table), (step.op, 0), acting)
        rows = table.index_select(0, ids.clamp(max=len(table) - 1))
        virtual = ids >= len(table)
        if acting:
            rows = rows.float()
            rows[virtual] = 0.0
            apply_adapters_(rows, ids, (step.op, 0), acting, self._weights[op.table])
        dtype = self._buffers.dtype(op.out)
        return ops.embed(rows, table.dtype, op.scale, self._get(op.add), dtype, virtual)

    def _norm(self, op: Norm, step: Step) -> Tensor:
        weight, bias = self._vector(op.weight), self._vector(op.bias)
        x, gate, plus = self._buffers.get(op.x), self._get(op.gate), self._get(op.plus)
        dtype, of_logits = self._buffers.dtype(op.out), self._program.buffers[op.x.buffer].rows == "R"
        out, acting = ops.norm(op, x, weight, bias, gate, plus, dtype), step.acting(logits=of_logits)
        for lo, hi in pairwise(sorted({edge for s in acting for edge in (s.lo, s.hi)})):
            if within := [s for s in acting if s.lo <= lo and hi <= s.hi]:
                assert weight is not None
                rows, vectors = slice(lo, hi), norm_vectors(weight, bias, step.op, within)
                gated, added = (None if t is None else t[rows] for t in (gate, plus))
                out[rows] = ops.norm(op, x[rows], *vectors, gated, added, dtype)
        return out

    def _linear(self, op: Linear, step: Step) -> Tensor:
        x, weight = self._buffers.get(op.x), self._weights[op.weight]
        y = base_product(x, weight)
        if acting := step.acting():
            y = y.float()
            apply_adapters_(y, x.float(), (step.op, 0), acting, weight)
        bias, residual = self._vector(op.epilogue.bias), self._get(op.epilogue.residual)
        return ops.epilogue(y, op.epilogue, bias, residual, self._buffers.dtype(op.out))

    def _pointwise(self, op: Pointwise, step: Step) -> Tensor:
        x, y, weight = self._buffers.get(op.x), self._get(op.y), self._vector(op.weight)
        return ops.pointwise(op, x, y, weight, step.position, self._buffers.dtype(op.out))

    def _rope_rows(self, op: RopeRows, step: Step) -> Tensor:
        return ops.rope_rows(self._program.rope_tables[op.table], step.rope_pos, step.rope_length)

    def _rope(self, op: Rope, step: Step) -> None:
        key = (op.rows, op.layout)  # all layers with the same rows share their factors
        if key not in step.factors:
            step.factors[key] = ops.rope_factors(op, self._buffers.get(op.rows))
        ops.rope_(op, self._buffers.get(op.x), *step.factors[key])

    def _attention(self, op: Attention, step: Step) -> Tensor:
        k, v = (self._planes[plane] for plane in op.planes)
        for plane, ref in ((k, op.k), (v, op.v)):
            if ref is not None:
                attention.write(plane, step.slots[op.group], self._buffers.get(ref))
        batches = self._batches(step, op.group, op.window, chunked=op.chunked)
        return attention.compute(op, self._buffers.get(op.q), k, v, batches, self._vector(op.sinks))

    def _mla(self, op: Mla, step: Step) -> Tensor:
        plane, batches = self._planes[op.plane], self._batches(step, op.group, None)
        attention.write(plane, step.slots[op.group], self._buffers.get(op.latent))
        q, kv_b = self._buffers.get(op.q), self._weights[op.kv_b]
        return mla.compute(op, q, plane, kv_b, batches, step.op, step.segments)

    def _batches(self, step: Step, group: int, window: int | None, *, chunked: bool = False) -> list[attention.Batch]:
        """The step's sequences for one KV group and window; all layers share them."""
        key = (group, window, chunked)
        if key not in step.plans:
            size, zero_slot = self._capacity.block_size, self._planes.zero_slot
            step.plans[key] = attention.plan(step.inputs, *key, size, zero_slot, self._device)
        return step.plans[key]

    def _gated_delta(self, op: GatedDelta, step: Step) -> Tensor:
        x = [self._buffers.get(ref) for ref in (op.q, op.k, op.v, op.decay, op.beta)]
        rate, dt_bias = self._weights[op.rate].whole, self._weights[op.dt_bias].whole
        return delta.gated_delta(op, x, rate, dt_bias, self._states[op.state], step.spans)

    def _route(self, op: Route, _: Step) -> Tensor:
        vectors = self._vector(op.correction), self._vector(op.expert_scale)
        return ops.route(op, self._buffers.get(op.logits), *vectors)

    def _expert_linear(self, op: ExpertLinear, step: Step) -> Tensor:
        weight, bias, dtype = self._weights[op.weight], self._vector(op.epilogue.bias), self._buffers.dtype(op.out)
        single = torch.float32 if op.combine != "none" else dtype
        per_row = replace(op.epilogue, residual=None)

        def finish(expert: int, rows: Tensor, x: Tensor, y: Tensor) -> Tensor:
            if segments := step.segments_of(rows, expert):
                y = y.float()
                apply_adapters_(y, x.float(), (step.op, expert), segments, weight.experts[expert])
            biases = None if bias is None else bias.view(len(weight.experts), -1)[expert]
            return ops.epilogue(y, per_row, biases, None, single)

        k = op.routes.width // 2
        outputs = op.out.width if op.combine != "none" else op.out.width // k
        x, routes = self._buffers.get(op.x), self._buffers.get(op.routes)
        y, residual = expert_product(x, routes, weight, op.combine, outputs, finish), self._get(op.epilogue.residual)
        return (y if residual is None else y + residual).to(dtype)

    def _causal_conv(self, op: CausalConv, step: Step) -> Tensor:
        x, dtype = self._buffers.get(op.x), self._buffers.dtype(op.out)
        weight, bias = self._weights[op.weight].whole, self._vector(op.bias)
        return states.causal_conv(op, x, weight, bias, self._states[op.state], step.spans, dtype)

    def _mamba2(self, op: Mamba2, step: Step) -> Tensor:
        x, b, c, dt = (self._buffers.get(ref) for ref in (op.x, op.b, op.c, op.dt))
        vectors = self._weights[op.rate].whole, self._weights[op.dt_bias].whole, self._weights[op.skip].whole
        out = states.mamba2(op, x, b, c, dt, vectors, self._states[op.state], step.spans)
        return out.to(self._buffers.dtype(op.out))

    def _take_rows(self, op: TakeRows, step: Step) -> Tensor:
        return self._buffers.get(op.x).index_select(0, step.logit_rows)

    def _head(self, op: Logits, step: Step) -> Tensor:
        x = self._buffers.get(op.x)
        y = base_product(x, self._weights[op.weight]).float()
        if acting := step.acting(logits=True):
            apply_adapters_(y, x.float(), (step.op, 0), acting, self._weights[op.weight])
        if op.bias is not None:
            y += self._weights[op.bias].whole
        if op.scale != 1.0:
            y *= op.scale
        if op.softcap is not None:
            y = torch.tanh_(y.div_(op.softcap)).mul_(op.softcap)
        return y


def check_ids(ids: Array, rows: int, op: tuple[int, int], segments: Sequence[Segment]) -> None:
    """Raise ``KernelError`` unless a table of ``rows`` has every id, or the adapter of a segment of its row does."""
    missing = (ids < 0) | (ids >= rows)
    if not missing.any():
        return
    for segment in segments:
        own, span = segment.ops[op].sites[0].host_ids, slice(segment.lo, segment.hi)
        if own is not None:
            missing[span] &= ~np.isin(ids[span], own)
    if missing.any():
        raise KernelError(f"token_ids: id {int(ids[missing][0])} is outside the table.", param="token_ids")


_METHODS: dict[type[Op], Callable[..., Tensor | None]] = {
    Embed: ReferenceExecutable._embed,
    Norm: ReferenceExecutable._norm,
    Linear: ReferenceExecutable._linear,
    Pointwise: ReferenceExecutable._pointwise,
    RopeRows: ReferenceExecutable._rope_rows,
    Rope: ReferenceExecutable._rope,
    Attention: ReferenceExecutable._attention,
    Mla: ReferenceExecutable._mla,
    GatedDelta: ReferenceExecutable._gated_delta,
    CausalConv: ReferenceExecutable._causal_conv,
    Mamba2: ReferenceExecutable._mamba2,
    Route: ReferenceExecutable._route,
    ExpertLinear: ReferenceExecutable._expert_linear,
    TakeRows: ReferenceExecutable._take_rows,
    Logits: ReferenceExecutable._head,
}
