"""Run one sequence on an ``Executable`` without an engine: for tests of programs and backends, and for ``verify``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from truffula.kernels.backend import Executable
from truffula.kernels.inputs import Capacity

Float32 = npt.NDArray[np.float32]


def capacity_for(tokens: int, *, block_size: int = 16) -> Capacity:
    """The capacity for one sequence of ``tokens`` tokens with logits for every row, and one spare block."""
    blocks = -(-tokens // block_size) + 1
    return Capacity(
        max_tokens=tokens,
        max_seqs=1,
        max_logit_rows=tokens,
        max_segments=1,
        num_blocks=blocks + 1,
        block_size=block_size,
        max_blocks_per_seq=blocks,
    )


@dataclass
class Driver:
    """Runs one sequence. Its blocks are not in ascending order, so that errors in block tables show.

    ``slot`` is the adapter's slot, or None for the base. ``computed`` is the number of computed tokens.
    """

    executable: Executable
    capacity: Capacity
    slot: int | None = None
    computed: int = 0

    def __post_init__(self) -> None:
        ids = np.arange(1, self.capacity.num_blocks, dtype=np.int32)
        self._blocks = np.concatenate([ids[1::2], ids[0::2]])

    def feed(self, ids: Sequence[int], *, chunk: int | None = None) -> Float32:
        """Append ``ids``, in steps of at most ``chunk``, and return their float32 logits ``[len(ids), V]``."""
        rows = []
        for start in range(0, len(ids), chunk or len(ids)):
            rows.append(self._step(ids[start : start + (chunk or len(ids))]))
        return np.concatenate(rows)

    def greedy(self, prompt: Sequence[int], count: int, *, chunk: int | None = None) -> tuple[list[int], Float32]:
        """``count`` greedy tokens after ``prompt``, one per step, and their logits ``[count, V]``."""
        rows = [self.feed(prompt, chunk=chunk)[-1]]
        tokens = [int(rows[-1].argmax())]
        while len(tokens) < count:
            rows.append(self.feed(tokens[-1:])[-1])
            tokens.append(int(rows[-1].argmax()))
        return tokens, np.stack(rows)

    def _step(self, ids: Sequence[int]) -> Float32:
        inputs, count, size = self.executable.inputs, len(ids), self.capacity.block_size
        positions = np.arange(self.computed, self.computed + count, dtype=np.int32)
        inputs.T, inputs.N, inputs.R = count, 1, count
        inputs.token_ids[:count] = ids
        inputs.position[:count] = positions
        inputs.rope_pos[:, :count] = positions
        inputs.q_start[:2] = 0, count
        inputs.kv_len[0] = self.computed + count
        inputs.logit_rows[:count] = np.arange(count)
        table = self._blocks[: self.capacity.max_blocks_per_seq]
        for group in range(inputs.block_tables.shape[0]):
            inputs.block_tables[group, 0, : len(table)] = table
            inputs.slot_mapping[group, :count] = table[positions // size] * size + positions % size
        inputs.G = 0 if self.slot is None else 1
        if self.slot is not None:
            inputs.seg[0] = 0, count, self.slot
            inputs.seg_r[0] = 0, count
            inputs.seg_weight[0] = 1.0
        self.executable.run()
        self.computed += count
        return self.executable.logits()
