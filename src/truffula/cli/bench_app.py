"""The commands of ``truffula bench`` and their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from truffula.cli.help import App
from truffula.cli.options import AsJson, Model, resolve, with_options

app = App(help="Measure throughput and latency of a server under load, and of one step alone.")


@app.command("serve")
@with_options("engine")
def bench_serve(
    model: Model,
    clients: Annotated[
        int | None,
        typer.Option("--clients", "-c", metavar="N", help="Clients, each with one request at a time. [default: 8]"),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            metavar="N",
            help="Requests per client [default: 1]; with --rate, in all [default: 32].",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", metavar="NUMBER", help="Open loop: requests per second, with Poisson arrivals."),
    ] = None,
    adapters: Annotated[
        str,
        typer.Option(
            "--adapters", help="none, shared (one for all), distinct (one each) or zipf (a few get most requests)."
        ),
    ] = "distinct",
    adapter_count: Annotated[
        int | None,
        typer.Option("--adapter-count", metavar="N", help="Number of adapters for zipf or --rate."),
    ] = None,
    zipf_exponent: Annotated[
        float | None,
        typer.Option(
            "--zipf-exponent",
            metavar="NUMBER",
            help="s of zipf's 1 / rank**s; 0 makes all equally likely. [default: 1]",
        ),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="Rank of the random all-linear adapters.")] = 16,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Random ids per prompt.")] = 105,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens to generate, greedily.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", help="Runs after a warm-up; the median is printed.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same prompts, adapters and arrival times.")] = 0,
    ttft_limit: Annotated[
        float | None,
        typer.Option("--ttft-limit", metavar="MS", help="Goodput: maximum ms to the first token. [default: 2000]"),
    ] = None,
    itl_limit: Annotated[
        float | None,
        typer.Option("--itl-limit", metavar="MS", help="Goodput: maximum average ms between tokens. [default: 200]"),
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="Measure this running server instead of starting one.")
    ] = None,
    as_json: AsJson = False,
    *,
    options: dict[str, Any],
) -> None:
    """Measure a server under load: output tokens per second, time to first token, inter-token time, prefix-hit rate.

    A closed loop by default: each client sends its next request when the last has ended. With --rate, an open loop:
    requests are sent at their times whether or not earlier ones have ended, so the time they wait is measured;
    goodput counts the requests within both limits.
    """
    from truffula.bench.load import Limits
    from truffula.cli.bench import ServeBench, run_bench_serve

    given = {"ttft_ms": ttft_limit, "itl_ms": itl_limit}
    limits_given = {name: value for name, value in given.items() if value is not None}
    limits = Limits(**limits_given) if limits_given else None
    sizes = (rank, prompt_tokens, max_tokens, repeats)
    bench = ServeBench(clients, requests, adapters, *sizes, url, rate, adapter_count, zipf_exponent, limits, seed)
    run_bench_serve(resolve(options, model=model).engine, bench, as_json=as_json)


@app.command("adapters")
@with_options("engine", only=("dtype", "threads"))
def bench_adapters(
    model: Model,
    scenarios: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SCENARIO]...",
            help="join, gaps, ranks, kinds, prompts, zipf, registered, quantised; all by default.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds after a warm-up; medians are printed.")] = 3,
    gguf: Annotated[
        list[str] | None,
        typer.Option("--gguf", metavar="FILE", help="Another base for quantised, such as a Q4_0 file; repeatable."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the table to FILE, too.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FOLDER", help="Draw a chart (SVG) per scenario in FOLDER.")
    ] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Measure for a moment, to see that it runs.")] = False,
    as_json: AsJson = False,
    *,
    options: dict[str, Any],
) -> None:
    """Measure what adapters cost, each figure beside its goal: joining, gaps of running streams, ranks, kinds, prompts,
    more adapters than memory, quantised bases. All of it takes ten minutes and 3 GB of disk on smollm2."""
    from truffula.cli.bench import run_bench_adapters

    config = resolve(options, model=model).engine
    run_bench_adapters(config, scenarios or [], repeats, gguf or [], (markdown, plot), tiny=tiny, as_json=as_json)


@app.command("step")
@with_options("engine", only=("dtype", "quantize", "backend", "cpu_isa", "threads"))
def bench_step(
    rows: Annotated[str, typer.Option("--rows", help="Decode rows, separated by commas.")] = "1,8,32",
    adapters: Annotated[
        str, typer.Option("--adapters", help="none, shared (one for all), a number (fewer rows: left out), distinct.")
    ] = "none,shared,8,distinct",
    rank: Annotated[int, typer.Option("--rank", help="Rank of the random all-linear adapters.")] = 16,
    context: Annotated[int, typer.Option("--context", help="Tokens in the context of each row.")] = 105,
    prefill: Annotated[int, typer.Option("--prefill", help="Tokens of the prompt chunk at the end; 0 for none.")] = 512,
    steps: Annotated[int, typer.Option("--steps", help="Steps per line; the median is printed.")] = 20,
    adapter_dtype: Annotated[
        str, typer.Option("--adapter-dtype", help="Dtype of the adapters: bfloat16, float16 or float32.")
    ] = "bfloat16",
    tiny: Annotated[bool, typer.Option("--tiny", help="Use a tiny shape, to see that it runs.")] = False,
    as_json: AsJson = False,
    *,
    options: dict[str, Any],
) -> None:
    """Measure one step on SmolLM2-135M's shape, operation by operation, without server and sampling."""
    from truffula.bench.step import StepBench
    from truffula.cli.bench import run_bench_step

    try:
        numbers = tuple(int(word) for word in rows.split(","))
    except ValueError:
        raise typer.BadParameter(f"{rows!r} is not a list of integers.", param_hint="--rows") from None
    mixes = tuple(word.strip() for word in adapters.split(","))
    bench = StepBench(numbers, mixes, rank, context, prefill, steps, adapter_dtype)
    run_bench_step(bench, options, tiny=tiny, as_json=as_json)
