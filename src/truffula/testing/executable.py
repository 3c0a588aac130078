"""``HashModel``: a complete ``Executable`` in numpy whose tokens depend on every token it sees, through the block
tables.

Another legitimate backend, small enough to run a thousand steps a second: plane 1 of the KV memory holds a hash of
(token, position, adapter), plane 2 a hash of all of plane 1 up to there, and the logits are a hash of all of plane 2. A
wrong block table, a stale or foreign block, a wrong position or adapter give other tokens. Memory begins as garbage.
Each ``run`` also holds the step against the words of ``kernels/inputs.py`` and refuses one that breaks them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from truffula.errors import KernelError
from truffula.kernels.backend import AdapterImage, Array
from truffula.kernels.inputs import Capacity, SampledRows, SampleInputs, StepInputs
from truffula.testing.sampler import sample_rows

U64 = npt.NDArray[np.uint64]
_M1, _M2, _GOLDEN = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)


def mix(values: Array) -> U64:
    """splitmix64's finaliser: every bit of the result depends on every bit of the value."""
    z = np.atleast_1d(np.asarray(values, np.uint64)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _M1
    z = (z ^ (z >> np.uint64(27))) * _M2
    return z ^ (z >> np.uint64(31))


class HashModel:
    """See the module. ``spread`` is the standard deviation of its logits; adapters act by their image's generation."""

    def __init__(self, capacity: Capacity, vocab_size: int, *, seed: int = 0, spread: float = 3.0) -> None:
        self.capacity = capacity
        self.vocab_size = vocab_size
        self.inputs = StepInputs.allocate(capacity, 1)
        self.samples = SampleInputs.allocate(capacity)
        self._spread = spread
        garbage = np.random.default_rng(seed)
        self._kv = garbage.integers(0, 2**63, (2, capacity.num_blocks * capacity.block_size)).astype(np.uint64)
        self._vocab = mix(np.arange(vocab_size) + (seed << 32))
        self._adapters: dict[int, np.uint64] = {}
        self._next_slot = 0
        self._logits = np.zeros((0, vocab_size), np.float32)
        self.closed = False

    def run(self) -> None:
        i = self.inputs
        self._check()
        adapter = np.zeros(i.T, np.uint64)
        for lo, hi, slot in i.seg[: i.G].tolist():
            adapter[lo:hi] = self._adapters[slot]
        slots = i.slot_mapping[0, : i.T]
        ids, position = i.token_ids[: i.T].astype(np.uint64), i.position[: i.T].astype(np.uint64)
        with np.errstate(over="ignore"):
            self._kv[0, slots] = mix(mix(ids + (position << np.uint64(32))) ^ mix(adapter))
            state = np.zeros(i.T, np.uint64)
            for n in range(i.N):
                rows = slice(int(i.q_start[n]), int(i.q_start[n + 1]))
                length = int(i.kv_len[n])
                start = length - (rows.stop - rows.start)
                keys = self._slots_of(n, length)
                first = np.cumsum(mix(self._kv[0, keys] + np.arange(length, dtype=np.uint64)))
                self._kv[1, slots[rows]] = mix(first[start:] ^ mix(adapter[rows]))
                state[rows] = np.cumsum(mix(self._kv[1, keys] + np.arange(length, dtype=np.uint64)))[start:]
            hashed = mix(state[i.logit_rows[: i.R]])[:, None] ^ self._vocab[None, :]
            uniform = (mix(hashed) >> np.uint64(11)).astype(np.float64) / 2.0**53
        self._logits = ((uniform - 0.5) * (self._spread * 12**0.5)).astype(np.float32)

    def sample(self) -> SampledRows:
        return sample_rows(self._logits, self.samples)

    def logits(self) -> Array:
        return self._logits.copy()

    def tap(self, op: int) -> Array:
        raise KernelError("The hash model has no ops.")

    def adapter_bytes(self, image: AdapterImage) -> int:
        return 0

    def adapter(self, image: AdapterImage) -> int:
        slot = self._next_slot
        self._next_slot += 1
        self._adapters[slot] = np.uint64(int.from_bytes(image.generation.encode()[:8].ljust(8, b"\1"), "little") | 1)
        return slot

    def drop_adapter(self, slot: int) -> None:
        del self._adapters[slot]

    def kv_copy(self, group: int, src: Sequence[int], dst: Sequence[int]) -> None:
        planes = self._kv.reshape(2, self.capacity.num_blocks, self.capacity.block_size)
        planes[:, list(dst)] = planes[:, list(src)]

    def close(self) -> None:
        self.closed = True

    def _slots_of(self, n: int, length: int) -> npt.NDArray[np.int64]:
        size = self.capacity.block_size
        positions = np.arange(length)
        blocks = self.inputs.block_tables[0, n, positions // size].astype(np.int64)
        return np.asarray(blocks * size + positions % size)

    def _check(self) -> None:
        """The words of ``StepInputs``, as refusals."""
        i, c = self.inputs, self.capacity
        _need(not self.closed, "the executable is closed")
        _need(0 < i.T <= c.max_tokens and 0 < i.N <= c.max_seqs, f"T = {i.T}, N = {i.N}")
        _need(0 <= i.R <= c.max_logit_rows and 0 <= i.G <= c.max_segments, f"R = {i.R}, G = {i.G}")
        ids = i.token_ids[: i.T]
        _need(bool((ids >= 0).all() and (ids < self.vocab_size).all()), "a token id is outside the vocabulary")
        _need(i.q_start[0] == 0 and i.q_start[i.N] == i.T, "q_start does not cover the rows")
        _need(bool((np.diff(i.q_start[: i.N + 1]) > 0).all()), "a sequence without rows")
        _need(bool((np.diff(i.logit_rows[: i.R]) > 0).all()), "logit_rows do not ascend")
        _need(bool((i.rope_pos[:, : i.T] == i.position[: i.T]).all()), "rope positions differ from positions")
        written: list[int] = []
        read: set[int] = set()
        for n in range(i.N):
            rows = slice(int(i.q_start[n]), int(i.q_start[n + 1]))
            length, count = int(i.kv_len[n]), rows.stop - rows.start
            _need(i.position[rows].tolist() == list(range(length - count, length)), f"positions of sequence {n}")
            keys = self._slots_of(n, length)
            _need(bool((keys >= c.block_size).all()), f"sequence {n} reads the scratch block")
            _need(i.slot_mapping[0, rows].tolist() == keys[length - count :].tolist(), f"slots of sequence {n}")
            written += keys[length - count :].tolist()
            read |= set(keys[: length - count].tolist())
        _need(len(set(written)) == len(written), "two rows write one slot")
        _need(not read & set(written), "a row writes where another sequence reads")
        self._check_segments()

    def _check_segments(self) -> None:
        i = self.inputs
        end = end_r = 0
        last = -1
        for g in range(i.G):
            lo, hi, slot = i.seg[g].tolist()
            lo_r, hi_r = i.seg_r[g].tolist()
            _need(lo == end and hi > lo and slot > last, f"segment {g} is not sorted by adapter, base last")
            _need(slot in self._adapters, f"segment {g} names slot {slot}, which was dropped")
            _need(lo_r == end_r and i.seg_weight[g] == 1.0, f"segment {g} of the logit rows")
            inside = i.logit_rows[lo_r:hi_r]
            _need(bool((inside >= lo).all() and (inside < hi).all()), f"segment {g}'s logit rows are not its own")
            end, end_r, last = hi, hi_r, slot
        _need(bool((i.logit_rows[end_r : i.R] >= end).all()), "a logit row of an adapter is in no segment")


def _need(fact: bool, what: str) -> None:
    if not fact:
        raise KernelError(f"The step is malformed: {what}.")
