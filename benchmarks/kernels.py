"""Times each native kernel and compares it with the limits of the machine.

    python benchmarks/kernels.py [--rows 1,8,32] [--shape 960x576] [--format Q4_0] [--kernel linear]
    python benchmarks/kernels.py --smoke           # tiny shapes

A program repeats one op on different weights (or cached keys), more than the caches hold, so they are read from memory
as in a step. Limits are measured in the same run: the arithmetic rate of the instruction set (loops over registers)
and the read rate of memory, or of the caches for ops on rows just written. A kernel's limit is the larger of the times
that its bytes and its arithmetic take at these rates.
Needs the C++ compiler that compiled the kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from comparison.limits import Limits, Raw, Timed, compile_rates
from comparison.repeated_op import IDS, Repeated, head, repeated_attention, repeated_linear, repeated_norm
from truffula.bench.step import read_rate
from truffula.cli.doctor import cpu_name
from truffula.cli.output import fail, out, table
from truffula.errors import ConfigError, MissingDependency, TruffulaError
from truffula.kernels.adapters import Bias, ColumnScale, InputScale
from truffula.kernels.adapters import Part as AdapterPart
from truffula.kernels.cpu import CpuBackend, why_unavailable
from truffula.kernels.cpu.executable import CpuExecutable
from truffula.kernels.cpu.formats import BLOCK_KINDS
from truffula.kernels.cpu.library import library
from truffula.kernels.host import usable_cpus
from truffula.kernels.inputs import NO_IDS, Capacity, SequenceSampling
from truffula.testing.programs import Part, attach, fill_step, random_adapter

FORMATS = ("float32", "bfloat16", "FP8_128", "NF4", "FP4_16", "Q8_0", "Q4_0", "Q4_1", "Q5_0")
KERNELS = ("linear", "lora", "parts", "attention", "norm", "head", "sampler")
BLOCK = 16


@dataclass(frozen=True)
class KernelBench:
    """The options. Defaults are the shapes of SmolLM2-135M; ``cold`` bytes exceed the caches, and a figure takes at
    least ``seconds``."""

    shapes: tuple[tuple[int, int], ...] = ((960, 576), (576, 576), (3072, 576), (576, 1536))
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 128, 512)
    formats: tuple[str, ...] = FORMATS
    kernels: tuple[str, ...] = KERNELS
    vocab: int = 49152
    heads: tuple[int, int, int] = (9, 3, 64)
    context: int = 512
    rank: int = 16
    cold: int = 96 << 20
    seconds: float = 0.1

    def __post_init__(self) -> None:
        for what, given, known in (("format", self.formats, FORMATS), ("kernel", self.kernels, KERNELS)):
            for word in given:
                if word not in known:
                    raise ConfigError(f"{what} is {word!r}; it must be one of {', '.join(known)}.", param=what)
        if not self.rows or min(self.rows) < 1 or max(self.rows) > 1 << 14:
            raise ConfigError("rows must be integers from 1 to 16384.", param="rows")
        for outputs, inputs in self.shapes:
            if min(outputs, inputs) < 1 or inputs % 32 or outputs * inputs > 1 << 30:
                raise ConfigError(
                    f"shape is {outputs}x{inputs}; inputs must be a multiple of 32, outputs at least 1, and both "
                    "together at most 2^30 weights.",
                    param="shape",
                )


TOY = KernelBench(
    shapes=((48, 32),), rows=(1, 3), vocab=70, heads=(4, 2, 8), context=20, cold=1 << 12, seconds=0.001, rank=4
)
"""Sizes for a smoke test."""


def bench_of(rows: str, shapes: Sequence[str], formats: str, kernels: str, *, tiny: bool) -> KernelBench:
    """The options of a command line; an empty one keeps the default.

    Raises:
        ConfigError: An invalid number, shape, format or kernel.
    """
    given: dict[str, Any] = {}
    try:
        if rows and not tiny:
            given["rows"] = tuple(int(word) for word in rows.split(","))
    except ValueError:
        raise ConfigError(f"rows is {rows!r}; expected integers separated by commas.", param="rows") from None
    try:
        if shapes:
            given["shapes"] = tuple((int(n), int(k)) for n, k in (word.lower().split("x") for word in shapes))
    except ValueError:
        raise ConfigError(
            f"shape is {', '.join(shapes)!r}; it must be OUTPUTSxINPUTS, such as 960x576.", param="shape"
        ) from None
    if formats:
        given["formats"] = tuple(formats.split(","))
    if kernels:
        given["kernels"] = tuple(kernels.split(","))
    return replace(TOY if tiny else KernelBench(), **given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="rows, separated by commas")
    parser.add_argument("--shape", action="append", default=[], metavar="NxK", help="outputs x inputs; repeatable")
    parser.add_argument("--format", default="", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--kernel", default="", help=f"of {', '.join(KERNELS)}")
    parser.add_argument("--cpu-isa", default="auto", help="an instruction set that `truffula doctor` lists")
    parser.add_argument("--threads", type=int, help="compute threads")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    asked = parser.parse_args()
    try:
        bench = bench_of(asked.rows, asked.shape, asked.format, asked.kernel, tiny=asked.smoke)
        run(bench, isa=asked.cpu_isa, threads=asked.threads, as_json=asked.json)
    except TruffulaError as error:
        fail(error)
        sys.exit(1)


def run(bench: KernelBench, *, isa: str, threads: int | None, as_json: bool) -> None:
    if why := why_unavailable():
        raise MissingDependency(f"this benchmark measures the native kernels: {why}.", param="backend")
    backend = CpuBackend(threads=threads or usable_cpus(), isa=isa)
    bencher = _Bencher(bench, backend, threads or usable_cpus())
    lines = bencher.lines()
    limits = bencher.limits
    report = {
        "cpu": cpu_name()[0], "isa": bencher.isa, "threads": bencher.threads, "limits": asdict(limits),
        "lines": [asdict(line) for line in lines],
    }  # fmt: skip
    if as_json:
        out().print_json(json.dumps(report))
        return
    peaks = ", ".join(
        f"{name} {rate / 1e9:.0f}"
        for name, rate in (
            ("float32", limits.float_peak), ("bfloat16 pairs", limits.pair_peak), ("bytes", limits.byte_peak),
            ("16-bit", limits.word_peak),
        )
        if rate
    )  # fmt: skip
    title = (
        f"{report['cpu']}, {bencher.threads} threads, {bencher.isa}; memory reads {limits.read_all / 1e9:.1f} GB/s "
        f"(one thread {limits.read_one / 1e9:.1f}); GFLOP/s or GOP/s at most: {peaks}"
    )
    shown = table("kernel", "shape", "format", ">rows", ">us", ">GB/s", ">GOP/s", "limit", ">of limit", title=title)
    for line in lines:
        shown.add_row(
            line.kernel, line.shape, line.format, str(line.rows), f"{line.us:.1f}", f"{line.gb_per_s:.1f}",
            f"{line.gop_per_s:.1f}", line.bound, f"{line.share:.2f}",
        )  # fmt: skip
    out().print(shown)


class _Bencher:
    """Loads programs and times their ops. ``limits`` are measured before and after; the higher rates count."""

    def __init__(self, bench: KernelBench, backend: CpuBackend, threads: int) -> None:
        self.bench, self.backend, self.threads = bench, backend, threads
        self.isa = backend.isa
        self.native = compile_rates(self.isa)
        self.limits = self._measured()

    def _measured(self) -> Limits:
        peaks = [self.native.truffula_peak_rate(kind, self.threads) for kind in range(4)]
        size = max(self.bench.cold, 1 << 16)
        # The faster of two implementations, as a limit must not be too low.
        one, every = (max(self.native.truffula_read_rate(n, size), read_rate(n, size)) for n in (1, self.threads))
        return Limits(peaks[0], peaks[1], peaks[2], peaks[3], one, every)

    def lines(self) -> list[Timed]:
        run: dict[str, Callable[[], Iterator[Raw]]] = {
            "linear": self._linears, "lora": self._loras, "parts": self._parts, "attention": self._attentions,
            "norm": self._norms, "head": self._heads, "sampler": self._samplers,
        }  # fmt: skip
        made = [raw for kernel in self.bench.kernels for raw in run[kernel]()]
        before, again = asdict(self.limits), asdict(self._measured())
        self.limits = Limits(**{name: max(rate, again[name]) for name, rate in before.items()})
        return [self.limits.compare(raw) for raw in made]

    # --- the kernels --------------------------------------------------------------------------------------------------

    def _linears(self) -> Iterator[Raw]:
        for outputs, inputs in self.bench.shapes:
            for stored in self.bench.formats:
                weights = _packed(outputs, inputs, stored)
                made = repeated_linear(outputs, inputs, stored, self._copies(weights))
                executable = self._load(made, stored, max(self.bench.rows))
                for rows in self.bench.rows:
                    us = self._time(executable, made, [_part(i) for i in range(rows)])
                    ops = 2.0 * rows * outputs * inputs
                    yield self._raw("linear", f"{outputs}x{inputs}", stored, rows, us, weights, (ops, 0.0))
                executable.close()

    def _loras(self) -> Iterator[Raw]:
        rank = self.bench.rank
        stored = "bfloat16" if "bfloat16" in self.bench.formats else self.bench.formats[0]
        for outputs, inputs in self.bench.shapes:
            weights = _packed(outputs, inputs, stored)
            # With an adapter a row they are what comes from memory: so few copies, so many adapters.
            made = repeated_linear(outputs, inputs, stored, min(12, self._copies(weights)))
            counts = [rows for rows in self.bench.rows if rows <= 32] or [1]
            executable = self._load(made, stored, max(self.bench.rows), segments=max(counts))
            adapter = random_adapter(made.program, rank=rank, dtype="bfloat16")
            slots = [attach(executable, adapter) for _ in range(max(counts))]
            one = _packed(rank, inputs, "bfloat16") + _packed(outputs, rank, "bfloat16")
            for name, all_rows in (("one adapter", self.bench.rows), ("adapter a row", counts)):
                for rows in all_rows:
                    using = [slots[i if name != "one adapter" else 0] for i in range(rows)]
                    us = self._time(executable, made, [_part(i, slot=slot) for i, slot in enumerate(using)])
                    nbytes = weights + one * len(set(using))
                    ops = 2.0 * rows * outputs * inputs, 2.0 * rows * rank * (outputs + inputs)
                    yield self._raw(f"with {name}", f"{outputs}x{inputs} r{rank}", stored, rows, us, nbytes, ops)
            executable.close()

    def _parts(self) -> Iterator[Raw]:
        """Other parts of adapters beside LowRank, an adapter a row, each beside the same adapter without them."""
        rank, rng = self.bench.rank, np.random.default_rng(0)
        stored = "bfloat16" if "bfloat16" in self.bench.formats else self.bench.formats[0]
        for outputs, inputs in self.bench.shapes:
            weights = _packed(outputs, inputs, stored)
            made = repeated_linear(outputs, inputs, stored, min(12, self._copies(weights)))
            counts = [rows for rows in self.bench.rows if rows <= 32] or [1]
            executable = self._load(made, stored, max(counts), segments=max(counts))
            a_row, a_column = (rng.standard_normal(n).astype(np.float32) for n in (inputs, outputs))
            others: dict[str, tuple[AdapterPart, ...]] = {
                "lora": (), "dora": (ColumnScale(a_column),), "lora, bias": (Bias(a_column),),
                "lora, input scale": (InputScale(a_row),),
            }  # fmt: skip
            adapter = random_adapter(made.program, rank=rank, dtype="bfloat16")
            slots = {}
            for name, more in others.items():
                sites = tuple(replace(site, parts=(*site.parts, *more)) for site in adapter.sites)
                slots[name] = [attach(executable, replace(adapter, sites=sites)) for _ in range(max(counts))]
            one = _packed(rank, inputs, "bfloat16") + _packed(outputs, rank, "bfloat16")
            for rows in counts:
                least = dict.fromkeys(others, float("inf"))
                for _ in range(5):  # by turns, so that disturbances affect all of them
                    for name in others:
                        parts = [_part(i, slot=slot) for i, slot in enumerate(slots[name][:rows])]
                        least[name] = min(least[name], self._time(executable, made, parts))
                for name, us in least.items():
                    ops = 2.0 * rows * outputs * inputs, 2.0 * rows * rank * (outputs + inputs)
                    shape = f"{outputs}x{inputs} r{rank}, {us / least['lora']:.2f} of lora"
                    yield self._raw(name, shape, stored, rows, us, weights + one * rows, ops)
            executable.close()

    def _attentions(self) -> Iterator[Raw]:
        heads, kv_heads, dim = self.bench.heads
        context = self.bench.context
        per_row = -(-(context + 1) // BLOCK)
        for rows in (rows for rows in self.bench.rows if rows <= 128):
            nbytes = rows * (context + 1) * kv_heads * dim * 4
            made = repeated_attention(heads, kv_heads, dim, min(30, self._copies(nbytes)))
            executable = self._load(made, "bfloat16", max(rows, context), seqs=rows, blocks=rows * per_row)
            where = [tuple(range(1 + i * per_row, 1 + (i + 1) * per_row)) for i in range(rows)]
            for blocks in where:  # unwritten pages would be read from the zero page, not from memory
                fill_step(executable.inputs, [_part(0, count=context, blocks=blocks)], BLOCK)
                executable.run()
            us = self._time(executable, made, [_part(i, start=context, blocks=w) for i, w in enumerate(where)])
            ops = 4.0 * rows * heads * dim * (context + 1)
            yield self._raw("decode", f"{heads}/{kv_heads}x{dim} {context}", "bfloat16", rows, us, nbytes, (0.0, ops))
            executable.close()
        for rows in (rows for rows in self.bench.rows if rows > 1):
            made = repeated_attention(heads, kv_heads, dim, 4)
            blocks = tuple(range(1, 1 + -(-rows // BLOCK)))
            executable = self._load(made, "bfloat16", rows, blocks=len(blocks))
            us = self._time(executable, made, [_part(0, count=rows, blocks=blocks)])
            ops = 2.0 * rows * (rows + 1) * heads * dim
            nbytes = rows * (heads * 8 + kv_heads * 8 + kv_heads * 4) * dim
            yield self._raw(
                "prefill", f"{heads}/{kv_heads}x{dim} 0", "bfloat16", rows, us, nbytes, (0.0, ops), cached=True
            )
            executable.close()

    def _norms(self) -> Iterator[Raw]:
        for width in sorted({inputs for _, inputs in self.bench.shapes}):
            made = repeated_norm(width, 64)
            executable = self._load(made, "bfloat16", max(self.bench.rows))
            for rows in self.bench.rows:
                us = self._time(executable, made, [_part(i) for i in range(rows)])
                ops = 4.0 * rows * width
                yield self._raw("norm", str(width), "float32", rows, us, 8 * rows * width, (0.0, ops), cached=True)
            executable.close()

    def _heads(self) -> Iterator[Raw]:
        inputs = self.bench.shapes[0][1]
        for stored in self.bench.formats:
            made = head(self.bench.vocab, inputs, stored)
            all_rows = [rows for rows in self.bench.rows if rows <= 128] or [1]
            executable = self._load(made, stored, max(all_rows))
            weights = _packed(self.bench.vocab, inputs, stored)
            for rows in all_rows:
                us = self._time(executable, made, [_part(i) for i in range(rows)])
                ops = 2.0 * rows * self.bench.vocab * inputs
                yield self._raw("head", f"{self.bench.vocab}x{inputs}", stored, rows, us, weights, (ops, 0.0))
            executable.close()

    def _samplers(self) -> Iterator[Raw]:
        made = head(self.bench.vocab, self.bench.shapes[0][1], "bfloat16")
        all_rows = [rows for rows in self.bench.rows if rows <= 128] or [1]
        executable = self._load(made, "bfloat16", max(all_rows))
        for name, temperature, top_k, top_p in (("argmax", 0.0, 0, 1.0), ("top-k 50, top-p 0.9", 0.8, 50, 0.9)):
            sampling = SequenceSampling(temperature=temperature, top_k=top_k, top_p=top_p, warped=temperature > 0)
            for slot in range(max(all_rows)):
                executable.set_sequence(slot, NO_IDS, NO_IDS, sampling)
            executable.samples.row_slot[: max(all_rows)] = range(max(all_rows))
            for rows in all_rows:
                fill_step(executable.inputs, [_part(i) for i in range(rows)], BLOCK)
                executable.run()
                us = self._least(executable.sample)
                nbytes = 4 * rows * self.bench.vocab
                yield self._raw(
                    "sampler", f"{self.bench.vocab} {name}", "float32", rows, us, nbytes, (0.0, 0.0), cached=True
                )
        executable.close()

    # --- timing -------------------------------------------------------------------------------------------------------

    def _copies(self, nbytes: int) -> int:
        return max(1, min(512, -(-self.bench.cold // nbytes)))

    def _load(
        self, made: Repeated, stored: str, tokens: int, *, seqs: int = 0, blocks: int = 1, segments: int = 1
    ) -> CpuExecutable:
        seqs = seqs or tokens
        capacity = Capacity(
            max_tokens=tokens, max_seqs=seqs, max_logit_rows=seqs, max_segments=segments, num_blocks=1 + blocks,
            block_size=BLOCK, max_blocks_per_seq=blocks,
        )  # fmt: skip
        return self.backend.load(made.program, "float32" if stored == "float32" else "bfloat16", made.pull, capacity)

    def _time(self, executable: CpuExecutable, made: Repeated, parts: list[Part]) -> float:
        """Microseconds of one op: the least of some runs, each of all its copies."""
        fill_step(executable.inputs, parts, BLOCK)
        return self._least(executable.run) / made.count

    def _least(self, work: Callable[[], object]) -> float:
        work()  # the first run allocates memory
        best, begun, runs = float("inf"), time.perf_counter(), 0
        while runs < 3 or time.perf_counter() - begun < self.bench.seconds:
            before = time.perf_counter()
            work()
            best, runs = min(best, time.perf_counter() - before), runs + 1
        return best * 1e6

    def _raw(
        self, kernel: str, shape: str, stored: str, rows: int, us: float, nbytes: int, ops: tuple[float, float],
        *, cached: bool = False,
    ) -> Raw:  # fmt: skip
        """``cached``: the bytes were just written, and are read from the cache that holds this many."""
        size = min(max(nbytes, 1 << 14), 1 << 26)
        rate = self.native.truffula_read_rate(self.threads, size) if cached else None
        return Raw(kernel, shape, stored, rows, us, nbytes, ops, rate)


def _packed(outputs: int, inputs: int, stored: str) -> int:
    """Bytes of a packed weight."""
    kind = stored.lower() if stored in BLOCK_KINDS or stored == "float32" else "bfloat16"
    nbytes: int = library().matrix_bytes(outputs, inputs, kind)
    return nbytes


def _part(
    first: int, *, count: int = 1, start: int = 0, blocks: tuple[int, ...] = (0,), slot: int | None = None
) -> Part:
    return Part(tuple(int(i) % IDS for i in np.arange(first, first + count)), start, blocks, slot)


if __name__ == "__main__":
    main()
