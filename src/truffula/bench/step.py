"""``truffula bench step``: the duration of a decode step and of a prefill chunk, and the share of each op.

Measures the executable alone, without server and sampling, on random bfloat16 weights of SmolLM2-135M's shape. Each row
is a sequence with ``context`` computed tokens; each adapter has one rank and targets all linears.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from truffula.errors import ConfigError
from truffula.kernels.backend import Backend, Executable
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Program
from truffula.testing.programs import Part, attach, fill_step, pull_from, random_adapter, random_weights

BLOCK = 16
MIXES = ("none", "shared", "distinct")
ADAPTER_DTYPES = ("bfloat16", "float16", "float32")
SMOLLM2: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class StepBench:
    """The options of ``bench step``.

    A mix is one of ``MIXES``, or the number of adapters that the rows share, each with adjacent rows; it is skipped for
    fewer rows. ``adapter_dtype`` is the dtype of the adapters' files, which is also their dtype in memory.
    """

    rows: tuple[int, ...] = (1, 8, 32)
    mixes: tuple[str, ...] = MIXES
    rank: int = 16
    context: int = 105
    prefill: int = 512
    steps: int = 20
    adapter_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for mix in self.mixes:
            if mix not in MIXES and not (mix.isdecimal() and int(mix) > 0):
                known = ", ".join(MIXES)
                raise ConfigError(
                    f"adapters is {mix!r}; it must be one of {known}, or a number above 0.", param="adapters"
                )
        if self.adapter_dtype not in ADAPTER_DTYPES:
            known = ", ".join(ADAPTER_DTYPES)
            raise ConfigError(
                f"adapter_dtype is {self.adapter_dtype!r}; it must be one of {known}.", param="adapter_dtype"
            )
        if not self.rows or min(self.rows) < 1:
            raise ConfigError("rows must be integers above 0.", param="rows")
        if all(mix.isdecimal() and int(mix) > max(self.rows) for mix in self.mixes):
            raise ConfigError(
                f"adapters is {', '.join(self.mixes)}, more than the most rows ({max(self.rows)}) can share.",
                param="adapters",
            )
        for name, least in (("rank", 1), ("context", 1), ("prefill", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}.", param=name)


@dataclass(frozen=True)
class StepResult:
    """One line of the report: ``ms`` is the median, ``ops`` milliseconds per kind of op, summed over the threads."""

    what: str
    rows: int
    adapters: str
    ms: float
    best_ms: float
    tokens_per_s: float
    tax: float | None = None
    roofline: float | None = None
    ops: dict[str, float] = field(default_factory=dict)


def measure(backend: Backend, program: Program, dtype: str, bench: StepBench, rate: float) -> list[StepResult]:
    """Measure decode steps of each number of rows and mix, then a prefill chunk. ``rate`` is that of the memory, in
    bytes per second.
    """
    most = max(bench.rows)
    per_row = -(-(bench.context + bench.steps) // BLOCK)
    blocks = max(most * per_row, -(-bench.prefill // BLOCK))
    capacity = Capacity(
        max_tokens=max(bench.prefill, bench.context, most),
        max_seqs=most,
        max_logit_rows=most,
        max_segments=most,
        num_blocks=1 + blocks,
        block_size=BLOCK,
        max_blocks_per_seq=max(per_row, -(-bench.prefill // BLOCK)),
    )
    executable = backend.load(program, dtype, pull_from(random_weights(program, dtype="bfloat16")), capacity)
    weights = backend.plan(program, dtype, capacity).weight_bytes
    slots = [
        attach(executable, random_adapter(program, rank=bench.rank, seed=i, dtype=bench.adapter_dtype))
        for i in range(0 if {*bench.mixes} == {"none"} else most)
    ]
    lines = []
    for rows in bench.rows:
        using = {mix: slots_of(mix, slots, rows) for mix in bench.mixes if not mix.isdecimal() or int(mix) <= rows}
        if not using:
            continue
        measured = _decode(executable, using, bench, per_row)
        base = statistics.median(measured["none"][0]) if "none" in measured else None
        for mix, (times, ops) in measured.items():
            ms = statistics.median(times)
            share = weights / rate * 1e3 / ms if mix == "none" and rows == 1 else None
            tax = base / ms if base and mix != "none" else None
            lines.append(StepResult("decode", rows, mix, ms, min(times), 1e3 * rows / ms, tax, share, ops))
    if bench.prefill:
        lines.append(_prefill(executable, bench.prefill))
    executable.close()
    return lines


def _prefill(executable: Executable, tokens: int) -> StepResult:
    where = tuple(range(1, 1 + -(-tokens // BLOCK)))
    fill_step(executable.inputs, [Part(_prompt(tokens), 0, where, None)], BLOCK)
    timer = _StepTimer(executable)
    for step in range(4):
        timer.run(kept=step > 0)
    ms = statistics.median(timer.times)
    return StepResult("prefill", tokens, "none", ms, min(timer.times), 1e3 * tokens / ms, ops=timer.ops())


def slots_of(mix: str, slots: list[int], rows: int) -> list[int | None]:
    """The adapter slot of each row."""
    if mix == "none":
        return [None] * rows
    adapters = {"shared": 1, "distinct": rows}.get(mix) or int(mix)
    return [slots[row * adapters // rows] for row in range(rows)]


def _prompt(count: int) -> tuple[int, ...]:
    return tuple(1 + i % 50 for i in range(count))


def _decode(
    executable: Executable, using: Mapping[str, Sequence[int | None]], bench: StepBench, per_row: int
) -> dict[str, tuple[list[float], dict[str, float]]]:
    """Times of decode steps after ``context`` tokens, by mix; row i uses the adapter in slot ``using[mix][i]``.

    The mixes alternate, step by step, so that disturbances affect all of them.
    """
    rows = len(next(iter(using.values())))
    tables = [tuple(range(1 + i * per_row, 1 + (i + 1) * per_row)) for i in range(rows)]
    for where in tables:
        fill_step(executable.inputs, [Part(_prompt(bench.context), 0, where, None)], BLOCK)
        executable.run()
    made: dict[str, _StepTimer] = {mix: _StepTimer(executable) for mix in using}
    for step in range(-1, bench.steps):
        for mix, slots in using.items():
            parts = [Part((1 + i,), bench.context + max(0, step), tables[i], slots[i]) for i in range(rows)]
            fill_step(executable.inputs, parts, BLOCK)
            made[mix].run(kept=step >= 0)  # the first step is a warm-up
    return {mix: (timer.times, timer.ops()) for mix, timer in made.items()}


class _StepTimer:
    """Measures steps and the ops in them, in milliseconds."""

    def __init__(self, executable: Executable) -> None:
        self._executable = executable
        self._op_seconds = getattr(executable, "op_seconds", None)  # only the native backend measures ops
        self._sums: dict[str, float] = {}
        self.times: list[float] = []

    def run(self, *, kept: bool = True) -> None:
        if self._op_seconds is not None:
            self._op_seconds()  # reset
        start = time.perf_counter()
        self._executable.run()
        if not kept:
            return
        self.times.append((time.perf_counter() - start) * 1e3)
        if self._op_seconds is not None:
            for name, seconds in self._op_seconds().items():
                self._sums[name] = self._sums.get(name, 0.0) + 1e3 * seconds

    def ops(self) -> dict[str, float]:
        return {name: ms / len(self.times) for name, ms in self._sums.items() if ms > 0}


def read_rate(threads: int, nbytes: int) -> float:
    """The memory read rate of ``threads`` threads in bytes per second, the limit of a step of one row."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    data = np.ones(nbytes // 8, np.int64)
    parts = np.array_split(data, threads)
    with ThreadPoolExecutor(threads) as pool:
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))  # numpy releases the GIL
            best = min(best, time.perf_counter() - start)
    return nbytes / best
