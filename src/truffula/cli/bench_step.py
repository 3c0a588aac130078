"""``truffula bench step``."""

from __future__ import annotations

import json
from dataclasses import asdict

from truffula.bench.step import SMOLLM2, StepBench, measure, read_rate
from truffula.cli.doctor import cpu_name
from truffula.cli.output import out, table
from truffula.environment import prepare_compute
from truffula.kernels.host import usable_cpus
from truffula.kernels.select import Precision, choose_dtype, select_backend
from truffula.testing.programs import decoder_program
from truffula.testing.tiny import tiny_config


def run_bench_step(
    bench: StepBench,
    *,
    backend: str,
    cpu_isa: str,
    dtype: str,
    threads: int | None,
    quantize: str,
    tiny: bool,
    as_json: bool,
) -> None:
    prepare_compute()
    precision = Precision(quantize)
    chosen = select_backend(backend, "cpu", threads=threads or usable_cpus(), cpu_isa=cpu_isa, precision=precision)
    served = choose_dtype(chosen, dtype, "bfloat16").dtype
    program = decoder_program(tiny_config() if tiny else SMOLLM2)
    rate = read_rate(threads or usable_cpus(), 1 << 22 if tiny else 1 << 28)
    lines = measure(chosen, program, served, bench, rate)
    report = {
        "cpu": cpu_name()[0],
        "backend": chosen.name,
        "isa": chosen.isa,
        "dtype": served,
        "quantize": quantize,
        "adapter_dtype": bench.adapter_dtype,
        "threads": threads or usable_cpus(),
        "read_gb_per_s": round(rate / 1e9, 1),
        "lines": [asdict(line) for line in lines],
    }
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
            line.what,
            str(line.rows),
            line.adapters,
            f"{line.ms:.1f}",
            f"{line.best_ms:.1f}",
            f"{line.tokens_per_s:.0f}",
            tax,
            share,
            by_op,
        )
    out().print(shown)
