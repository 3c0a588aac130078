"""ModelRunner: fills the executable's fixed arrays from a StepPlan, runs it, and hands results back per sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from truffula.engine.plan import Chunk, ChunkResult, StepPlan, TopList
from truffula.engine.sampling import NO_IDS, NO_VALUES
from truffula.errors import ConfigError
from truffula.kernels.backend import Executable
from truffula.kernels.inputs import Float32, Int32, SampledRows


class ModelRunner:
    """Drives one executable. ``block_size`` and ``max_positions`` are the engine's; capacities are read off the arrays.

    Cost: about 10 microseconds of Python per sequence and step, whatever the number of layers.
    """

    def __init__(self, executable: Executable, block_size: int, max_positions: int) -> None:
        self._executable = executable
        self._block_size = block_size
        self._positions = np.arange(max_positions, dtype=np.int32)
        inputs = executable.inputs
        self.max_tokens = len(inputs.token_ids)
        self.max_seqs = len(inputs.kv_len)
        self.max_rows = len(inputs.logit_rows)
        self.max_segments = len(inputs.seg)
        self.max_blocks_per_seq = inputs.block_tables.shape[2]
        if self.max_blocks_per_seq * block_size < max_positions - 1:
            raise ConfigError(
                f"A sequence has at most {self.max_blocks_per_seq} blocks of {block_size}; "
                f"max_model_len = {max_positions} needs more.",
                param="max_model_len",
            )

    def run(self, plan: StepPlan) -> list[ChunkResult]:
        """One forward pass and its sampling; results in the order of ``plan.chunks``. Whatever the backend raises
        passes.
        """
        self._fill_inputs(plan.chunks)
        self._fill_samples(plan.chunks)
        self._executable.run()
        if not self._executable.inputs.R:
            return [ChunkResult(chunk.serial, True) for chunk in plan.chunks]
        return _split(plan.chunks, self._executable.sample())

    def _fill_inputs(self, chunks: Sequence[Chunk]) -> None:
        inputs, size = self._executable.inputs, self._block_size
        row = logit = segment = 0
        last_slot: int | None = None
        for n, chunk in enumerate(chunks):
            start, count = chunk.start, chunk.count
            stop, table = row + count, chunk.block_table
            inputs.token_ids[row:stop] = chunk.token_ids
            inputs.position[row:stop] = self._positions[start : start + count]
            if count == 1:
                inputs.slot_mapping[:, row] = int(table[start // size]) * size + start % size
            else:
                positions = self._positions[start : start + count]
                inputs.slot_mapping[:, row:stop] = table[positions // size] * size + positions % size
            inputs.block_tables[:, n, : len(table)] = table
            inputs.block_tables[:, n, len(table) :] = 0
            inputs.q_start[n] = row
            inputs.kv_len[n] = start + count
            first_logit, scored = logit, len(chunk.targets)
            if scored:
                first = row + chunk.score_start - start
                inputs.logit_rows[logit : logit + scored] = np.arange(first, first + scored, dtype=np.int32)
                logit += scored
            if chunk.samples:
                inputs.logit_rows[logit] = stop - 1
                logit += 1
            if chunk.slot is not None:
                if segment == 0 or chunk.slot != last_slot:
                    inputs.seg[segment] = (row, stop, chunk.slot)
                    inputs.seg_r[segment] = (first_logit, logit)
                    inputs.seg_weight[segment] = 1.0
                    segment, last_slot = segment + 1, chunk.slot
                else:
                    inputs.seg[segment - 1, 1] = stop
                    inputs.seg_r[segment - 1, 1] = logit
            row = stop
        inputs.q_start[len(chunks)] = row
        inputs.rope_pos[:, :row] = inputs.position[:row]
        inputs.T, inputs.N, inputs.R, inputs.G = row, len(chunks), logit, segment

    def _fill_samples(self, chunks: Sequence[Chunk]) -> None:
        s, R = self._executable.samples, self._executable.inputs.R
        for column, neutral in (
            (s.temperature, 0), (s.top_k, 0), (s.top_p, 1), (s.min_p, 0), (s.typical_p, 1), (s.repetition, 1),
            (s.frequency, 0), (s.presence, 0), (s.n_logprobs, -1), (s.seed, 0), (s.choice, 0), (s.draw, 0),
            (s.target, -1), (s.warped, 0),
        ):  # fmt: skip
            column[:R] = neutral
        seen: list[tuple[Int32, Int32]] = []
        bias: list[tuple[Int32, Float32]] = []
        row = seen_end = bias_end = 0
        for chunk in chunks:
            q, scored = chunk.sampling, len(chunk.targets)
            if scored:
                s.target[row : row + scored] = chunk.targets
                s.n_logprobs[row : row + scored] = q.n_prompt_logprobs
                s.seen_start[row + 1 : row + scored + 1] = seen_end
                s.bias_start[row + 1 : row + scored + 1] = bias_end
                row += scored
            if not chunk.samples:
                continue
            s.temperature[row], s.top_k[row], s.top_p[row], s.min_p[row] = q.temperature, q.top_k, q.top_p, q.min_p
            s.typical_p[row], s.repetition[row] = q.typical_p, q.repetition
            s.frequency[row], s.presence[row] = q.frequency, q.presence
            s.n_logprobs[row], s.warped[row] = q.n_logprobs, q.warped
            s.seed[row], s.choice[row], s.draw[row] = q.seed, q.choice, chunk.draw
            ids, counts = q.seen(chunk.completion_ids)
            if len(ids):
                seen.append((ids, counts))
                seen_end += len(ids)
            biased, values = q.bias(chunk.draw)
            if len(biased):
                bias.append((biased, values))
                bias_end += len(biased)
            row += 1
            s.seen_start[row], s.bias_start[row] = seen_end, bias_end
        s.seen_ids = np.concatenate([ids for ids, _ in seen]) if seen else NO_IDS
        s.seen_counts = np.concatenate([counts for _, counts in seen]) if seen else NO_IDS
        s.bias_ids = np.concatenate([ids for ids, _ in bias]) if bias else NO_IDS
        s.bias_values = np.concatenate([values for _, values in bias]) if bias else NO_VALUES


def _split(chunks: Sequence[Chunk], rows: SampledRows) -> list[ChunkResult]:
    ids, logprobs, finite = rows.ids.tolist(), rows.logprob.tolist(), rows.finite.tolist()
    results: list[ChunkResult] = []
    row = 0
    for chunk in chunks:
        first, row = row, row + chunk.rows
        if not all(finite[first:row]):
            results.append(ChunkResult(chunk.serial, False))
            continue
        q = chunk.sampling
        scores = tuple(
            (logprobs[r], _top(rows, r, q.n_prompt_logprobs)) for r in range(first, first + len(chunk.targets))
        )
        if chunk.samples:
            top = _top(rows, row - 1, q.n_logprobs)
            results.append(ChunkResult(chunk.serial, True, ids[row - 1], logprobs[row - 1], top, scores))
        else:
            results.append(ChunkResult(chunk.serial, True, scores=scores))
    return results


def _top(rows: SampledRows, row: int, k: int) -> TopList:
    """The ``k`` best ids of a row; fewer when fewer are possible at all."""
    if k <= 0:
        return []
    pairs = zip(rows.top_ids[row, :k].tolist(), rows.top_logprobs[row, :k].tolist(), strict=True)
    return [(token, logprob) for token, logprob in pairs if token >= 0]
