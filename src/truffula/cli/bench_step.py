"""``truffula bench step``: milliseconds of a decode step and of a prefill chunk, and which ops they go to.

No server, no sampling: the executable alone, on random weights of SmolLM2-135M's shape stored in bfloat16. Each row is
a sequence of its own behind ``context`` tokens, each adapter is of one rank on all linears.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from truffula.bench.machine import read_rate
from truffula.cli.doctor import cpu_name
from truffula.cli.output import out, table
from truffula.config import prepare_compute
from truffula.errors import ConfigError
from truffula.kernels.backend import Backend, Executable
from truffula.kernels.host import usable_cpus
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Program
from truffula.kernels.select import Precision, choose_dtype, select_backend
from truffula.testing.programs import (
    SMOLLM2,
    TINY,
    Part,
    attach,
    fill_step,
    llama_program,
    pull_from,
    random_adapter,
    random_weights,
)

BLOCK = 16
MIXES = ("none", "shared", "distinct")
ADAPTER_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class StepBench:
    """What is asked for. ``tiny`` takes a toy shape: does it run at all?

    A mix is one of ``MIXES``, or how many adapters the rows share, each with neighbouring rows; fewer rows leave it
    out. ``adapter_dtype`` is what the adapters' files hold; they are kept as they are stored.
    """

    rows: tuple[int, ...] = (1, 8, 32)
    mixes: tuple[str, ...] = MIXES
    rank: int = 16
    context: int = 105
    prefill: int = 512
    steps: int = 20
    tiny: bool = False
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
class Measured:
    """One line: ``ms`` is the median, ``ops`` milliseconds of work per kind of op, summed over the threads."""

    what: str
    rows: int
    adapters: str
    ms: float
    best_ms: float
    tokens_per_s: float
    tax: float | None = None
    roofline: float | None = None
    ops: dict[str, float] = field(default_factory=dict)


def run_bench_step(
    bench: StepBench, *, backend: str, cpu_isa: str, dtype: str, threads: int | None, quantize: str, as_json: bool
) -> None:
    prepare_compute()
    precision = Precision(quantize)
    chosen = select_backend(backend, "cpu", threads=threads or usable_cpus(), cpu_isa=cpu_isa, precision=precision)
    served = choose_dtype(chosen, dtype, "bfloat16").dtype
    program = llama_program(TINY if bench.tiny else SMOLLM2)
    rate = read_rate(threads or usable_cpus(), 1 << 22 if bench.tiny else 1 << 28)
    lines = measure(chosen, program, served, bench, rate)
    report = {
        "cpu": cpu_name()[0], "backend": chosen.name, "isa": chosen.probe().isa, "dtype": served,
        "quantize": quantize, "adapter_dtype": bench.adapter_dtype,
        "threads": threads or usable_cpus(), "read_gb_per_s": round(rate / 1e9, 1),
        "lines": [asdict(line) for line in lines],
    }  # fmt: skip
    if as_json:
        out().print_json(json.dumps(report))
        return
    title = (
        f"{report['cpu']}, {report['threads']} threads, {chosen.name}/{report['isa']}, "
        f"{served if quantize == 'none' else quantize}, adapters {bench.adapter_dtype}; "
        f"memory reads {report['read_gb_per_s']} GB/s"
    )
    shown = table(
        "", ">rows", "adapters", ">ms", ">best", ">tok/s", ">of base", ">of roofline", "ms by op", title=title
    )
    for line in lines:
        by_op = ", ".join(f"{name} {ms:.1f}" for name, ms in line.ops.items() if ms >= 0.05)
        tax = "" if line.tax is None else f"{line.tax:.2f}"
        share = "" if line.roofline is None else f"{line.roofline:.2f}"
        shown.add_row(
            line.what, str(line.rows), line.adapters, f"{line.ms:.1f}", f"{line.best_ms:.1f}",
            f"{line.tokens_per_s:.0f}", tax, share, by_op,
        )  # fmt: skip
    out().print(shown)


def measure(backend: Backend, program: Program, dtype: str, bench: StepBench, rate: float) -> list[Measured]:
    """Decode steps of each number of rows and mix, then a prefill chunk. ``rate`` is the memory's, bytes a second."""
    most = max(bench.rows)
    per_row = -(-(bench.context + bench.steps) // BLOCK)
    blocks = max(most * per_row, -(-bench.prefill // BLOCK))
    capacity = Capacity(
        max_tokens=max(bench.prefill, bench.context, most), max_seqs=most, max_logit_rows=most, max_segments=most,
        num_blocks=1 + blocks, block_size=BLOCK, max_blocks_per_seq=max(per_row, -(-bench.prefill // BLOCK)),
    )  # fmt: skip
    executable = backend.load(program, dtype, pull_from(random_weights(program, dtype="bfloat16")), capacity)
    weights = backend.plan(program, dtype, capacity, 0).weight_bytes
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
            lines.append(Measured("decode", rows, mix, ms, min(times), 1e3 * rows / ms, tax, share, ops))
    if bench.prefill:
        lines.append(_prefill(executable, bench.prefill))
    executable.close()
    return lines


def _prefill(executable: Executable, tokens: int) -> Measured:
    where = tuple(range(1, 1 + -(-tokens // BLOCK)))
    fill_step(executable.inputs, [Part(_prompt(tokens), 0, where, None)], BLOCK)
    turns = _Turns(executable)
    for step in range(4):
        turns.take(kept=step > 0)
    ms = statistics.median(turns.times)
    return Measured("prefill", tokens, "none", ms, min(turns.times), 1e3 * tokens / ms, ops=turns.ops())


def slots_of(mix: str, slots: list[int], rows: int) -> list[int | None]:
    """The adapter of each row."""
    if mix == "none":
        return [None] * rows
    adapters = {"shared": 1, "distinct": rows}.get(mix) or int(mix)
    return [slots[row * adapters // rows] for row in range(rows)]


def _prompt(count: int) -> tuple[int, ...]:
    return tuple(1 + i % 50 for i in range(count))


def _decode(
    executable: Executable, using: Mapping[str, Sequence[int | None]], bench: StepBench, per_row: int
) -> dict[str, tuple[list[float], dict[str, float]]]:
    """Times of decode steps behind ``context`` tokens, by mix; row i uses the adapter in slot ``using[mix][i]``.

    The mixes take turns, step by step, so that what disturbs one disturbs all.
    """
    rows = len(next(iter(using.values())))
    tables = [tuple(range(1 + i * per_row, 1 + (i + 1) * per_row)) for i in range(rows)]
    for where in tables:
        fill_step(executable.inputs, [Part(_prompt(bench.context), 0, where, None)], BLOCK)
        executable.run()
    made: dict[str, _Turns] = {mix: _Turns(executable) for mix in using}
    for step in range(-1, bench.steps):
        for mix, slots in using.items():
            parts = [Part((1 + i,), bench.context + max(0, step), tables[i], slots[i]) for i in range(rows)]
            fill_step(executable.inputs, parts, BLOCK)
            made[mix].take(kept=step >= 0)  # the first of each touches its memory
    return {mix: (turns.times, turns.ops()) for mix, turns in made.items()}


class _Turns:
    """Milliseconds of some steps, and of the ops in them."""

    def __init__(self, executable: Executable) -> None:
        self._executable = executable
        self._op_seconds = getattr(executable, "op_seconds", None)  # only the native backend knows
        self._sums: dict[str, float] = {}
        self.times: list[float] = []

    def take(self, *, kept: bool = True) -> None:
        if self._op_seconds is not None:
            self._op_seconds()  # forgets what was before
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
