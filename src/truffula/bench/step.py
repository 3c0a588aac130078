"""``truffula bench step``: the duration of a decode step and of a prefill chunk, and the share of each op.

Measures the executable alone, without server and sampling, on random bfloat16 weights of SmolLM2-135M's shape. Each row
is a sequence with ``context`` computed tokens; each adapter has one rank and targets all linears.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from truffula.errors import ConfigError
from truffula.kernels.backend import Backend, Executable
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Program
from truffula.lora.image import ImageWriter, map_image
from truffula.lora.staging import Staging
from truffula.testing.programs import Part, fill_step, pull_from, random_adapter, random_weights

BLOCK = 16
MIXES = ("none", "shared", "distinct")
ADAPTER_DTYPES = ("bfloat16", "float16", "float32")
StepTime = tuple[float, dict[str, float]]
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
        counts = [int(mix) for mix in self.mixes if mix.isdecimal()]
        wrong = [mix for mix in self.mixes if mix not in MIXES and not (mix.isdecimal() and int(mix) > 0)]
        if wrong:
            raise _invalid("adapters", wrong[0], f"one of {', '.join(MIXES)}, or a number above 0")
        if self.adapter_dtype not in ADAPTER_DTYPES:
            raise _invalid("adapter_dtype", self.adapter_dtype, f"one of {', '.join(ADAPTER_DTYPES)}")
        if not self.rows or min(self.rows) < 1:
            raise _invalid("rows", self.rows, "integers above 0")
        if len(counts) == len(self.mixes) and min(counts) > max(self.rows):
            raise ConfigError(
                f"adapters is {', '.join(self.mixes)}, more than the most rows ({max(self.rows)}) can share.",
                param="adapters",
            )
        for name, least in (("rank", 1), ("context", 1), ("prefill", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise _invalid(name, getattr(self, name), f"at least {least}")


def _invalid(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"{name} is {value!r}; it must be {expected}.", param=name)


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
        num_states=1 + blocks,
    )
    executable = backend.load(program, dtype, pull_from(random_weights(program, dtype="bfloat16")), capacity)
    weights = backend.plan(program, dtype, capacity).weight_bytes
    slots = _attach_adapters(executable, program, bench, 0 if {*bench.mixes} == {"none"} else most)
    lines = []
    for rows in bench.rows:
        using = {mix: slots_of(mix, slots, rows) for mix in bench.mixes if not mix.isdecimal() or int(mix) <= rows}
        if not using:
            continue
        runs = _decode(executable, using, bench, per_row)
        measured = {mix: _result("decode", rows, mix, times) for mix, times in runs.items()}
        base = measured.get("none")
        for mix, line in measured.items():
            if base is not None and mix != "none":
                line = replace(line, tax=base.ms / line.ms)
            elif rows == 1 and mix == "none":
                line = replace(line, roofline=weights / rate * 1e3 / line.ms)
            lines.append(line)
    if bench.prefill:
        where = tuple(range(1, 1 + -(-bench.prefill // BLOCK)))
        fill_step(executable.inputs, [Part(_prompt(bench.prefill), 0, where, None)], BLOCK)
        times = [_timed_step(executable) for _ in range(4)]
        lines.append(_result("prefill", bench.prefill, "none", times[1:]))  # the first is a warm-up
    executable.close()
    return lines


def _attach_adapters(executable: Executable, program: Program, bench: StepBench, count: int) -> list[int]:
    """Slots of ``count`` random adapters, whose images are mapped files as in a server."""
    slots = []
    with contextlib.closing(Staging()) as staging:
        for seed in range(count):
            adapter = random_adapter(program, rank=bench.rank, seed=seed, dtype=bench.adapter_dtype)
            image = ImageWriter(adapter.generation, bench.rank, adapter.sites, executable.layout)
            path = staging.folders[0] / str(seed)
            image.write(path)
            slots.append(executable.adapter(map_image(path, image.header)))
            path.unlink()
    return slots


def _timed_step(executable: Executable) -> StepTime:
    """Milliseconds of one step and of each kind of op in it, which only the native backend measures."""
    op_seconds = getattr(executable, "op_seconds", dict)
    op_seconds()  # reset
    start = time.perf_counter()
    executable.run()
    ms = (time.perf_counter() - start) * 1e3
    return ms, {name: 1e3 * seconds for name, seconds in op_seconds().items()}


def _result(what: str, rows: int, mix: str, runs: Sequence[StepTime]) -> StepResult:
    times = [ms for ms, _ in runs]
    ms = statistics.median(times)
    ops = {name: statistics.fmean(by_op[name] for _, by_op in runs) for name in runs[0][1]}
    measured = {name: value for name, value in ops.items() if value > 0}
    return StepResult(what, rows, mix, ms, min(times), 1e3 * rows / ms, ops=measured)


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
) -> dict[str, list[StepTime]]:
    """Times of decode steps after ``context`` tokens, by mix; row i uses the adapter in slot ``using[mix][i]``.

    The mixes alternate, step by step, so that disturbances affect all of them.
    """
    rows = len(next(iter(using.values())))
    tables = [tuple(range(1 + i * per_row, 1 + (i + 1) * per_row)) for i in range(rows)]
    for where in tables:
        fill_step(executable.inputs, [Part(_prompt(bench.context), 0, where, None)], BLOCK)
        executable.run()
    made: dict[str, list[StepTime]] = {mix: [] for mix in using}
    for step in range(-1, bench.steps):
        for mix, slots in using.items():
            parts = [Part((1 + i,), bench.context + max(0, step), tables[i], slots[i]) for i in range(rows)]
            fill_step(executable.inputs, parts, BLOCK)
            made[mix].append(_timed_step(executable))
    return {mix: runs[1:] for mix, runs in made.items()}  # the first step is a warm-up


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
