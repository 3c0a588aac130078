"""``HashModel``: a complete ``Executable`` in numpy whose tokens depend on every token it sees, through the block
tables.

Another legitimate backend, small enough to run a thousand steps a second. Plane 0 of each KV group holds a hash of
(token, position, adapter); what a row sees of plane 0 of all groups, each in its window, is hashed to plane 1, and what
it sees of plane 1 to its logits. With state rows a state, the hash of the one before it and of a row's token, position
and adapter, is hashed to the logits too. A wrong block table, a stale or foreign block or state row, a wrong position
or adapter give other tokens. Memory begins as garbage.
Each step is also held against the rules of ``kernels/inputs.py`` and ``kernels/backend.py``; one that breaks them
raises ``Misuse``, which no engine may handle.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from plain_sampler import PlainSequence, sample_rows

from truffula.errors import DeviceLost, GenerationError, KernelError
from truffula.kernels.adapters import STORED
from truffula.kernels.backend import AdapterImage, Array
from truffula.kernels.inputs import (
    RELAY,
    Capacity,
    Int32,
    SampleInputs,
    SequenceSampling,
    StepInputs,
    StepOutput,
)

U64 = npt.NDArray[np.uint64]
_M1, _M2, _GOLDEN = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)


def mix(values: Array) -> U64:
    """splitmix64's finaliser: every bit of the result depends on every bit of the value."""
    z = np.atleast_1d(np.asarray(values, np.uint64)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _M1
    z = (z ^ (z >> np.uint64(27))) * _M2
    return z ^ (z >> np.uint64(31))


@dataclass
class Faults:
    """What goes wrong, on demand. Steps are counted from 1 in the order in which they are computed."""

    raise_on_step: int = 0
    raise_on_token: int | None = None
    """A step that computes this token id raises."""
    error: Exception = field(default_factory=lambda: KernelError("scripted"))
    nan_on_token: int | None = None
    """Logits of rows of this token id are NaN."""
    lost_on_step: int = 0
    """From this step on, every result raises ``DeviceLost``."""


class HashStep:
    """A ``PendingStep`` of the hash model: computed, with those before it, when its result is asked for."""

    def __init__(self, finish: Callable[[HashStep], None]) -> None:
        self.outcome: StepOutput | Exception | None = None
        self._finish = finish

    def done(self) -> bool:
        return self.outcome is not None

    def result(self) -> StepOutput:
        if self.outcome is None:
            self._finish(self)
        assert self.outcome is not None
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@dataclass
class _Submitted:
    """An unfinished step: its number of inputs, a copy of what they held, and the adapters that it may name."""

    step: HashStep
    place: int
    inputs: StepInputs
    samples: SampleInputs
    adapters: dict[int, np.uint64]
    wait_for_masks: Callable[[], None] | None


class HashModel:
    """See the module. ``windows`` has an entry per KV group, None for full attention. ``spread`` is the standard
    deviation of its logits; adapters act by their image's generation.

    Steps are computed as late as ``depth`` allows: at ``result``, with 1 too. What is called between two steps (a
    sequence set, an adapter dropped) takes effect between them. Masks are read as late.
    """

    def __init__(
        self,
        capacity: Capacity,
        vocab_size: int,
        *,
        windows: Sequence[int | None] = (None,),
        seed: int = 0,
        spread: float = 3.0,
        depth: int = 1,
    ) -> None:
        self.capacity = capacity
        self.vocab_size = vocab_size
        self.windows = windows
        self.layout = STORED
        self.depth = depth
        self.faults = Faults()
        self.steps = 0
        """Steps computed so far."""
        self._inputs = [StepInputs.allocate(capacity, len(windows)) for _ in range(depth)]
        self._samples = [SampleInputs.allocate(capacity, vocab_size) for _ in range(depth)]
        self._place = 0
        self._queue: deque[_Submitted | Callable[[], None]] = deque()
        self._sequences: dict[int, PlainSequence] = {}
        self._set_slots: set[int] = set()
        self._last_drawn: dict[int, int] = {}
        self._spread = spread
        garbage = np.random.default_rng(seed)
        slots = capacity.num_blocks * capacity.block_size
        self._kv = garbage.integers(0, 2**63, (len(windows), 2, slots)).astype(np.uint64)
        self._states = garbage.integers(0, 2**63, capacity.num_states).astype(np.uint64)
        self._states[:1] = 0
        self._vocab = mix(np.arange(vocab_size) + (seed << 32))
        self._adapters: dict[int, np.uint64] = {}
        self._next_slot = 0
        self._logits = np.zeros((0, vocab_size), np.float32)
        self.closed = False
        self.blocks_released = 0

    @property
    def inputs(self) -> StepInputs:
        return self._inputs[self._place]

    @property
    def samples(self) -> SampleInputs:
        return self._samples[self._place]

    @property
    def unfinished(self) -> int:
        """Steps submitted and not computed."""
        return sum(isinstance(item, _Submitted) for item in self._queue)

    def prepare(self) -> None:
        """Nothing to do."""

    # Steps

    def submit(self, wait_for_masks: Callable[[], None] | None = None) -> HashStep:
        _need(not self.closed, "the executable is closed")
        _need(self.unfinished < self.depth, f"more than {self.depth} steps are unfinished")
        _Rules(self, self.inputs, self._adapters).check(self.samples, self._set_slots)
        step = HashStep(self._finish)
        samples = dataclasses.replace(copy.deepcopy(self.samples), mask=self.samples.mask)
        _need(bool((samples.mask_row[: self.inputs.R] < 0).all()) or wait_for_masks is not None, "masks without a wait")
        copies = copy.deepcopy(self.inputs), samples
        self._queue.append(_Submitted(step, self._place, *copies, dict(self._adapters), wait_for_masks))
        self._place = (self._place + 1) % self.depth
        return step

    def _finish(self, step: HashStep) -> None:
        """Compute the queue up to ``step``."""
        while step.outcome is None:
            item = self._queue.popleft()
            if not isinstance(item, _Submitted):
                item()
                continue
            for now, then in ((self._inputs, item.inputs), (self._samples, item.samples)):
                _need(_equal(now[item.place], then), "inputs of an unfinished step were written to")
            try:
                item.step.outcome = self._compute(item)
            except (KernelError, GenerationError, DeviceLost, MemoryError, RuntimeError) as error:
                item.step.outcome = error
                for later in self._queue:
                    if isinstance(later, _Submitted):
                        later.step.outcome = error if isinstance(error, DeviceLost) else KernelError(f"after: {error}")
                calls = [later for later in self._queue if not isinstance(later, _Submitted)]
                self._queue.clear()
                self._queue.extend(calls)

    def _compute(self, step: _Submitted) -> StepOutput:
        i, s, adapters = step.inputs, step.samples, step.adapters
        self.steps += 1
        if self.faults.lost_on_step and self.steps >= self.faults.lost_on_step:
            raise DeviceLost("scripted")
        self._relay(i)
        ids = i.token_ids[: i.T]
        _need(bool((ids >= 0).all()), "a token id is outside the vocabulary")
        self._forward(i, adapters)
        if self.steps == self.faults.raise_on_step or self.faults.raise_on_token in ids:
            # Half of the work is done when it fails: blocks of this step hold what must not be read.
            for kv, slots in zip(self._kv, i.slot_mapping, strict=True):
                kv[:, slots[: i.T]] = np.uint64(0xDEAD)
            self._states[i.state_out[: i.Z]] = np.uint64(0xDEAD)
            raise self.faults.error
        if self.faults.nan_on_token is not None:
            self._logits[ids[i.logit_rows[: i.R]] == self.faults.nan_on_token] = np.nan
        if step.wait_for_masks is not None:
            step.wait_for_masks()
        output = sample_rows(self._logits, s, self._sequences)
        for r in np.flatnonzero(s.target[: i.R] < 0).tolist():
            self._last_drawn[int(s.row_slot[r])] = int(output.ids[r])
        return output

    def _relay(self, i: StepInputs) -> None:
        for n in range(i.N):
            rows = slice(int(i.q_start[n]), int(i.q_start[n + 1]))
            ids = i.token_ids[rows]
            if (ids == RELAY).any():
                _need(int(i.seq_slot[n]) in self._last_drawn, f"sequence {n} relays a token and has drawn none")
                ids[ids == RELAY] = self._last_drawn[int(i.seq_slot[n])]

    def run(self) -> None:
        _need(not self.unfinished, "run() beside an unfinished step")
        _Rules(self, self.inputs, self._adapters).check_inputs()
        self._forward(self.inputs, self._adapters)

    def _forward(self, i: StepInputs, adapters: dict[int, np.uint64]) -> None:
        adapter = np.zeros(i.T, np.uint64)
        for (lo, hi, slot), weight in zip(i.seg[: i.G].tolist(), i.seg_weight[: i.G], strict=True):
            # Sums of floats depend on the order of the segments, so this does.
            adapter[lo:hi] = mix(adapter[lo:hi] * _GOLDEN + (adapters[slot] ^ np.uint64(weight.view(np.uint32))))
        ids, position = i.token_ids[: i.T].astype(np.uint64), i.position[: i.T].astype(np.uint64)
        with np.errstate(over="ignore"):
            state = ids + (position << np.uint64(32))
            for plane in (0, 1):
                value = mix(mix(state) ^ mix(adapter))
                for group, kv in enumerate(self._kv):
                    kv[plane, i.slot_mapping[group, : i.T]] = value
                state = np.zeros(i.T, np.uint64)
                for n in range(i.N):
                    rows = slice(int(i.q_start[n]), int(i.q_start[n + 1]))
                    for group in range(len(self.windows)):
                        state[rows] = mix(state[rows]) + self._seen(i, plane, group, n)
            if len(self._states):
                state += mix(self._advance_states(i, mix(mix(ids + (position << np.uint64(32))) ^ mix(adapter))))
            hashed = mix(state[i.logit_rows[: i.R]])[:, None] ^ self._vocab[None, :]
            uniform = (mix(hashed) >> np.uint64(11)).astype(np.float64) / 2.0**53
        self._logits = ((uniform - 0.5) * (self._spread * 12**0.5)).astype(np.float32)

    def _advance_states(self, i: StepInputs, inputs: U64) -> U64:
        """The state after each row: of the one before it and of the row's ``inputs``."""
        after = np.zeros(i.T, np.uint64)
        for z in range(i.Z):
            state = int(self._states[i.state_in[z]])
            for t in range(i.span_start[z], i.span_start[z + 1]):
                state = ((state ^ int(inputs[t])) * int(_GOLDEN) + 1) & (2**64 - 1)
                state ^= state >> 29
                after[t] = state
            self._states[i.state_out[z]] = state
        return after

    def logits(self) -> Array:
        return self._logits.copy()

    def tap(self, op: int) -> Array:
        raise KernelError("The hash model has no ops.")

    # Sequences and adapters

    def set_sequence(self, slot: int, prompt_ids: Int32, completion_ids: Int32, sampling: SequenceSampling) -> None:
        _need(0 <= slot < self.capacity.max_seqs, f"no sequence slot {slot}")
        sequence = PlainSequence(prompt_ids, completion_ids, sampling)

        def set_it() -> None:
            self._sequences[slot] = sequence
            self._last_drawn.pop(slot, None)
            if sequence.completion:
                self._last_drawn[slot] = sequence.completion[-1]

        self._set_slots.add(slot)
        self._queue.append(set_it)

    def adapter_bytes(self, image: AdapterImage) -> int:
        return 0

    def adapter(self, image: AdapterImage) -> int:
        slot = self._next_slot
        self._next_slot += 1
        self._adapters[slot] = np.uint64(int.from_bytes(image.generation.encode()[:8].ljust(8, b"\1"), "little") | 1)
        return slot

    def adapter_ready(self, slot: int) -> bool:
        return slot in self._adapters

    def drop_adapter(self, slot: int) -> None:
        del self._adapters[slot]

    def write_kv(self, op: int, slots: Int32, keys: Array, values: Array) -> None:
        _need(op == 0 and not len(self._states), "keys and values are given to a model of one attention")
        distinct = len({*slots.tolist()}) == len(slots)
        _need(distinct and bool((slots >= self.capacity.block_size).all()), "slots of a prefix")
        given = [mix(rows.copy().view(np.uint32)[:, 0]) for rows in (keys, values)]

        def write() -> None:
            for kv in self._kv:
                kv[0, slots], kv[1, slots] = given

        self._queue.append(write)

    def release_kv(self, group: int, blocks: Int32) -> None:
        slots = (blocks[:, None] * self.capacity.block_size + np.arange(self.capacity.block_size)).ravel()
        for item in self._queue:
            if isinstance(item, _Submitted):
                for n in range(item.inputs.N):
                    read, _ = self.slots_of(item.inputs, group, n)
                    _need(not np.isin(slots, read).any(), "the memory of a block of an unfinished step is released")
        self._kv[group][:, slots] ^= np.uint64(0xF00D)
        self.blocks_released += len(blocks)

    def release_states(self, rows: Int32) -> None:
        _need(bool((rows > 0).all() and (np.diff(rows) > 0).all()), "state rows that do not ascend are released")
        for item in self._queue:
            if isinstance(item, _Submitted):
                used = np.concatenate([item.inputs.state_in[: item.inputs.Z], item.inputs.state_out[: item.inputs.Z]])
                _need(not np.isin(rows, used).any(), "the memory of a state row of an unfinished step is released")
        self._states[rows] ^= np.uint64(0xF00D)

    def close(self) -> None:
        self.closed = True

    def _seen(self, i: StepInputs, plane: int, group: int, n: int) -> U64:
        """For each row of sequence n a hash of the keys of a plane that it sees."""
        slots, first = self.slots_of(i, group, n)
        end, count = first + len(slots), int(i.q_start[n + 1] - i.q_start[n])
        sums = np.cumsum(mix(self._kv[group, plane, slots] + np.arange(first, end, dtype=np.uint64)))
        window = self.windows[group]
        if window is None:
            return np.asarray(sums[-count:])
        # From the keys up to each row those that are behind its window.
        hidden = np.maximum(np.arange(end - count, end) - window + 1, 0) - first
        return np.asarray(sums[-count:] - np.where(hidden > 0, sums[hidden - 1], np.uint64(0)))

    def slots_of(self, i: StepInputs, group: int, n: int) -> tuple[npt.NDArray[np.int64], int]:
        """The KV slots that some row of sequence n sees in a group, and the position of the first of them."""
        size, length, window = self.capacity.block_size, int(i.kv_len[n]), self.windows[group]
        start = length - int(i.q_start[n + 1] - i.q_start[n])
        first = 0 if window is None else max(0, start - window + 1)
        positions = np.arange(first, length)
        blocks = i.block_tables[group, n, positions // size].astype(np.int64)
        return np.asarray(blocks * size + positions % size), first


class Misuse(BaseException):
    """The host broke a rule of the executable. Not an ``Exception``: an engine that survives any failure of a step must
    not survive this."""


class _Rules:
    """The rules of one step's inputs."""

    def __init__(self, model: HashModel, inputs: StepInputs, adapters: dict[int, np.uint64]) -> None:
        self._model = model
        self._inputs = inputs
        self._adapters = adapters

    def check(self, s: SampleInputs, set_slots: set[int]) -> None:
        self.check_inputs()
        i = self._inputs
        slots = i.seq_slot[: i.N].tolist()
        _need(len(set(slots)) == i.N, "two sequences have one slot")
        _need(set(slots) <= set_slots, "a slot is used before set_sequence")
        of_row = np.repeat(i.seq_slot[: i.N], np.diff(i.q_start[: i.N + 1]))[i.logit_rows[: i.R]]
        _need(bool((s.row_slot[: i.R] == of_row).all()), "row_slot is not the slot of the row's sequence")
        drawing = of_row[s.target[: i.R] < 0].tolist()
        _need(len(set(drawing)) == len(drawing), "two rows draw for one slot")
        _need(bool((s.target[: i.R] < self._model.vocab_size).all()), "a target is outside the vocabulary")

    def check_inputs(self) -> None:
        i, c = self._inputs, self._model.capacity
        _need(not self._model.closed, "the executable is closed")
        _need(0 < i.T <= c.max_tokens and 0 < i.N <= c.max_seqs, f"T = {i.T}, N = {i.N}")
        _need(0 <= i.R <= c.max_logit_rows and 0 <= i.G <= c.max_segments, f"R = {i.R}, G = {i.G}")
        ids = i.token_ids[: i.T]
        of_base = ids[int(i.seg[i.G - 1, 1]) if i.G else 0 :]
        _need(bool((ids >= RELAY).all() and (of_base < self._model.vocab_size).all()), "an id outside the vocabulary")
        _need(i.q_start[0] == 0 and i.q_start[i.N] == i.T, "q_start does not cover the rows")
        _need(bool((np.diff(i.q_start[: i.N + 1]) > 0).all()), "a sequence without rows")
        _need(bool((np.diff(i.logit_rows[: i.R]) > 0).all()), "logit_rows do not ascend")
        _need(bool((i.rope_pos[:, : i.T] == i.position[: i.T]).all()), "rope positions differ from positions")
        for n in range(i.N):
            rows, length = slice(int(i.q_start[n]), int(i.q_start[n + 1])), int(i.kv_len[n])
            wanted = list(range(length - (rows.stop - rows.start), length))
            _need(i.position[rows].tolist() == wanted, f"positions of sequence {n}")
        for group in range(len(self._model.windows)):
            self._check_slots(group)
        if c.num_states:
            self._check_spans(c)
        else:
            _need(i.Z == 0, "spans without states")
        self._check_segments()

    def _check_slots(self, group: int) -> None:
        i = self._inputs
        written: list[int] = []
        read: set[int] = set()
        for n in range(i.N):
            lo, hi = int(i.q_start[n]), int(i.q_start[n + 1])
            keys, _ = self._model.slots_of(i, group, n)
            _need(bool((keys >= self._model.capacity.block_size).all()), f"sequence {n} reads a scratch or freed block")
            before, own = keys[: lo - hi].tolist(), keys[lo - hi :].tolist()
            _need(i.slot_mapping[group, lo:hi].tolist() == own, f"slots of sequence {n}")
            written += own
            read |= set(before)
        _need(len(set(written)) == len(written), "two rows write one slot")
        _need(not read & set(written), "a row writes where another sequence reads")

    def _check_spans(self, c: Capacity) -> None:
        i = self._inputs
        starts = i.span_start[: i.Z + 1].tolist()
        source, target = i.state_in[: i.Z].tolist(), i.state_out[: i.Z].tolist()
        _need(starts[0] == 0 and starts[-1] == i.T and starts == sorted(set(starts)), "spans do not cover the rows")
        _need(set(i.q_start[: i.N + 1].tolist()) <= set(starts), "a span has rows of two sequences")
        _need(all(0 <= row < c.num_states for row in source) and all(0 < row < c.num_states for row in target), "a row")
        _need(len(set(target)) == i.Z, "two spans leave their state in one row")
        begins = set(i.q_start[: i.N].tolist())
        for z in range(i.Z):
            if starts[z] in begins:
                _need(source[z] not in target, "a sequence begins with a row that this step writes")
                _need((source[z] == 0) == (i.position[starts[z]] == 0), "the state before a first token is row 0")
            else:
                _need(source[z] == target[z - 1], "a span does not continue the one before it")

    def _check_segments(self) -> None:
        i = self._inputs
        end = end_r = 0
        last: list[tuple[int, float]] = []
        rows = np.hstack([i.seg[: i.G, :2], i.seg_r[: i.G]]).tolist()
        for (lo, hi, lo_r, hi_r), run in groupby(range(i.G), key=rows.__getitem__):
            acting = [(int(i.seg[g, 2]), float(i.seg_weight[g])) for g in run]
            _need(lo == end and hi > lo and acting > last, f"rows {lo} to {hi} are not sorted by adapters, base last")
            _need(all(slot in self._adapters for slot, _ in acting), f"{acting} names a slot that was dropped")
            _need(len({slot for slot, _ in acting}) == len(acting), f"{acting} has one adapter twice")
            _need(all(weight and np.isfinite(weight) for _, weight in acting), f"{acting} has a weight without effect")
            _need(lo_r == end_r, f"logit rows of rows {lo} to {hi}")
            inside = i.logit_rows[lo_r:hi_r]
            _need(bool((inside >= lo).all() and (inside < hi).all()), f"logit rows of {acting} are not its own")
            end, end_r, last = hi, hi_r, acting
        _need(bool((i.logit_rows[end_r : i.R] >= end).all()), "a logit row of an adapter is in no segment")


def _equal(one: Any, other: Any) -> bool:
    return all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))


def _need(fact: bool, what: str) -> None:
    if not fact:
        raise Misuse(f"The step is malformed: {what}.")
