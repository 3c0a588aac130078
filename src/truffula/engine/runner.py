"""ModelRunner: fills the executable's fixed arrays from a StepPlan, submits it, and splits its output by sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from truffula.engine.constraints import MaskWriter
from truffula.engine.limits import EngineLimits
from truffula.engine.plan import Chunk, ChunkResult, StepPlan, TopList
from truffula.errors import ConfigError
from truffula.kernels.backend import Executable, PendingStep
from truffula.kernels.inputs import Int32, StepInputs, StepOutput
from truffula.lora.image import KvPrefix
from truffula.types import MAX_ADAPTERS


class ModelRunner:
    """Drives one executable. Cost: about 1 microsecond of Python per sequence and step, whatever the number of layers.

    Raises:
        ConfigError: The executable's arrays cannot hold a step of these limits.
    """

    def __init__(self, executable: Executable, limits: EngineLimits) -> None:
        self._executable = executable
        self._block_size = limits.block_size
        self._by_length = limits.rope_regime is not None
        _require_capacity(executable.inputs, limits, executable.depth)
        self._masks = MaskWriter()
        self._numbers = np.arange(max(limits.step_tokens, limits.step_logit_rows), dtype=np.int32)
        # For each of the executable's inputs, the block tables that were last written, by row.
        self._tables: list[tuple[StepInputs, list[tuple[Int32, ...] | None]]] = []

    def submit(self, plan: StepPlan) -> PendingStep:
        """Begin the step of ``plan``, which has chunks; ``split_output`` gives the result of each."""
        for chunk in plan.chunks:
            if chunk.restart is not None:
                state = chunk.restart
                self._executable.set_sequence(chunk.seq_slot, state.prompt_ids, state.completion_ids, state.sampling)
            if chunk.prefix is not None:
                self._write_prefix(chunk, chunk.prefix)
        self._fill(plan.chunks)
        matchers = [chunk.matcher for chunk in plan.chunks if chunk.matcher is not None]
        if not matchers:
            return self._executable.submit()
        return self._executable.submit(self._masks.begin(self._executable.samples.mask, matchers))

    def _write_prefix(self, chunk: Chunk, prefix: KvPrefix) -> None:
        """Write keys and values of an adapter to the blocks of the chunk's sequence, as far as it has its own."""
        position = np.arange(chunk.prefix_from, chunk.start)
        if not len(position):
            return
        (table,), size = chunk.block_tables, self._block_size
        slots = (table[position // size] * size + position % size).astype(np.int32)
        for op, (keys, values) in zip(prefix.ops, prefix.values[:, :, chunk.prefix_from :], strict=True):
            self._executable.write_kv(op, slots, np.ascontiguousarray(keys), np.ascontiguousarray(values))

    def close(self) -> None:
        """Wait for the masks that are being written; what they are written to may be freed then."""
        self._masks.close()

    def _fill(self, chunks: Sequence[Chunk]) -> None:
        i, s, size = self._executable.inputs, self._executable.samples, self._block_size
        N = len(chunks)
        count = np.array([len(chunk.token_ids) for chunk in chunks], np.int32)
        start = np.array([chunk.start for chunk in chunks], np.int32)
        seq_slot = np.array([chunk.seq_slot for chunk in chunks], np.int32)
        rows = np.array([len(chunk.targets) + len(chunk.draws) for chunk in chunks], np.int32)
        stop, rows_stop = count.cumsum(dtype=np.int32), rows.cumsum(dtype=np.int32)
        T, R = int(stop[-1]), int(rows_stop[-1])
        i.q_start[1 : N + 1] = stop
        i.kv_len[:N] = start + count
        i.seq_slot[:N] = seq_slot
        np.concatenate([chunk.token_ids for chunk in chunks], out=i.token_ids[:T])
        sequence = self._numbers[:N].repeat(count)
        position = self._numbers[:T] + (start - (stop - count))[sequence]
        i.position[:T] = i.rope_pos[:, :T] = position
        if self._by_length:
            i.rope_length[:T] = np.array([chunk.rope_length for chunk in chunks], np.int32)[sequence]
        self._fill_tables(i, chunks)
        i.slot_mapping[:, :T] = i.block_tables[:, sequence, position // size] * size + position % size
        sequence_of_row = self._numbers[:N].repeat(rows)
        i.logit_rows[:R] = self._numbers[:R] + (stop - rows_stop)[sequence_of_row]
        i.T, i.N, i.R, i.G = T, N, R, _fill_segments(i, chunks, stop, rows_stop)
        i.Z = _fill_spans(i, chunks)
        s.row_slot[:R] = seq_slot[sequence_of_row]
        s.target[:R] = s.mask_row[:R] = -1
        masked = rows_stop[np.array([chunk.matcher is not None for chunk in chunks])] - 1
        s.mask_row[masked] = self._numbers[: len(masked)]
        drawn = np.array([number for chunk in chunks for number in chunk.draws], np.uint32)
        if len(drawn) == R:
            s.draw[:R] = drawn
            return
        for chunk, last in zip(chunks, rows_stop.tolist(), strict=True):
            scored, draws = len(chunk.targets), len(chunk.draws)
            s.target[last - draws - scored : last - draws] = chunk.targets
            s.draw[last - draws : last] = chunk.draws

    def _fill_tables(self, inputs: StepInputs, chunks: Sequence[Chunk]) -> None:
        """Write the block tables of the rows whose table has changed since the last step with these inputs."""
        written = next((tables for of, tables in self._tables if of is inputs), None)
        if written is None:
            written = [None] * len(inputs.kv_len)
            self._tables.append((inputs, written))
        for n, chunk in enumerate(chunks):
            tables = chunk.block_tables
            if tables is written[n]:
                continue
            written[n] = tables
            for group, table in enumerate(tables):
                inputs.block_tables[group, n, : len(table)] = table


def _require_capacity(inputs: StepInputs, limits: EngineLimits, depth: int) -> None:
    groups, sequences, blocks = inputs.block_tables.shape
    if groups != len(limits.kv_windows):
        raise ConfigError(
            f"kv_windows is {limits.kv_windows}; the executable has {groups} KV groups.", param="kv_windows"
        )
    if limits.num_states and not len(inputs.state_in):
        raise ConfigError(f"num_states is {limits.num_states}; the executable has no state rows.", param="num_states")
    rows = 1 + limits.kv_layout(depth).state_rows
    if limits.num_states and limits.num_states < rows:
        raise ConfigError(
            f"num_states is {limits.num_states}; with {depth} unfinished steps a sequence alone needs {rows}.",
            param="num_states",
        )
    for param, size, least in (
        ("step_tokens", len(inputs.token_ids), limits.step_tokens),
        ("step_logit_rows", len(inputs.logit_rows), limits.step_logit_rows),
        ("max_running", min(sequences, len(inputs.seg) // MAX_ADAPTERS), limits.most_running),
        ("max_model_len", blocks * limits.block_size + 1, limits.max_model_len),  # the last token needs no KV
    ):
        if size < least:
            raise ConfigError(f"{param} is {least}; the executable has room for {size}.", param=param)


def _fill_segments(i: StepInputs, chunks: Sequence[Chunk], stop: Int32, rows_stop: Int32) -> int:
    """Write the segments of each run of chunks with the same adapters, one for each of these; returns their number.
    Base chunks are last.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    weights: list[float] = []
    lo = lo_r = 0
    for n, (chunk, hi, hi_r) in enumerate(zip(chunks, stop.tolist(), rows_stop.tolist(), strict=True), 1):
        adapters = chunk.adapters
        if not adapters:
            break
        if n == len(chunks) or chunks[n].adapters != adapters:
            for slot, weight in adapters:
                rows.append((lo, hi, slot, lo_r, hi_r))
                weights.append(weight)
            lo, lo_r = hi, hi_r
    G = len(rows)
    if G:
        segments = np.array(rows, np.int32)
        i.seg[:G], i.seg_r[:G], i.seg_weight[:G] = segments[:, :3], segments[:, 3:], weights
    return G


def _fill_spans(i: StepInputs, chunks: Sequence[Chunk]) -> int:
    """Write the spans of the chunks; returns their number, 0 without states."""
    spans = np.array([span for chunk in chunks for span in chunk.spans], np.int32)
    Z = len(spans)
    if Z:
        counts, i.state_in[:Z], i.state_out[:Z] = spans.T
        i.span_start[1 : Z + 1] = counts.cumsum()
    return Z


def split_output(chunks: Sequence[Chunk], output: StepOutput) -> list[ChunkResult]:
    """The results of a step's chunks, in their order."""
    ids, logprobs, tops = output.ids.tolist(), output.logprob.tolist(), _top_lists(output)
    finite = output.finite.tolist()
    all_finite = all(finite)
    results: list[ChunkResult] = []
    scores: list[tuple[float, TopList]] = []
    row = 0
    for chunk in chunks:
        first, scored = row, row + len(chunk.targets)
        row = scored + len(chunk.draws)
        if not all_finite and not all(finite[first:row]):
            results.append(ChunkResult(finite=False))
            continue
        if output.vectors is not None:
            results.append(ChunkResult(vector=output.vectors[row - 1] if row > first else None))
            continue
        if scored > first or scores:
            scores = list(zip(logprobs[first:scored], tops[first:scored], strict=True))
        results.append(ChunkResult(True, ids[scored:row], logprobs[scored:row], tops[scored:row], scores))
    return results


def _top_lists(output: StepOutput) -> list[TopList]:
    """The best ids of each row with their logprobs; empty lists where none were wanted."""
    if not output.top_ids.shape[1]:
        none: TopList = []
        return [none] * len(output.ids)
    pairs = zip(output.top_ids.tolist(), output.top_logprobs.tolist(), strict=True)
    return [[(i, p) for i, p in zip(ids, logprobs, strict=True) if i >= 0] for ids, logprobs in pairs]
