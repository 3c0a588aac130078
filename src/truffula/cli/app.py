"""The commands and their help. Bodies live in files of their own and are imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from truffula.cli.opening import chat_model
from truffula.cli.options import resolve, with_options

app = typer.Typer(
    name="truffula",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="One trunk, many leaves: serve one base language model and any number of LoRA adapters in one batch.\n\n"
    "Try [bold]truffula serve smollm2 --adapter-dir examples/adapters[/] "
    "or [bold]truffula generate smollm2 'Hello'[/].",
)
bench_app = typer.Typer(
    no_args_is_help=True,
    help="Measure: throughput and latency of a server, alone and beside others, and what joining adapters cost.",
)
adapters_app = typer.Typer(no_args_is_help=True, help="Ask a running server for its adapters; load and unload them.")
app.add_typer(bench_app, name="bench")
app.add_typer(adapters_app, name="adapters")

Model = Annotated[
    str, typer.Argument(help="A folder, a .gguf file, an alias (smollm2) or a Hugging Face id.", show_default=False)
]
AdapterArg = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        metavar="[NAME=]SOURCE",
        help="A PEFT folder, name=folder, or 'base'. May be given several times.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
# What decides which numbers are served.
SERVED = ("revision", "device", "dtype", "backend", "cpu_isa", "quantize", "exact", "threads", "offline", "cache_dir")
OptionalModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a .gguf file, an alias (smollm2) or a Hugging Face id; left out with --url.",
        show_default=False,
    ),
]
Url = Annotated[
    str | None, typer.Option("--url", help="Address of a running server. [dim]\\[http://127.0.0.1:8000][/]")
]
Port = Annotated[int | None, typer.Option("--port", help="Port of a server on this machine, in place of --url.")]
ServerUrl = Annotated[
    str | None, typer.Option("--url", help="Ask this running server instead of loading a model.", show_default=False)
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help="Key that the server asks for. [dim]\\[the first of TRUFFULA_API_KEYS][/]"),
]


def _version(value: bool) -> None:
    if value:
        from truffula import __version__

        typer.echo(f"truffula {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
@with_options("engine", "server")
def serve(model: Model, *, options: dict[str, Any]) -> None:
    """Serve MODEL and its adapters over HTTP: OpenAI's and LoRAX's routes, on one port.

    Every option is also an environment variable, shown beside it.
    """
    from truffula.server.launch import launch

    launch(resolve(options, model=model))


@app.command()
@with_options("engine")
def generate(
    model: OptionalModel = None,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; left out or '-', it is read from standard input.")
    ] = None,
    adapter: AdapterArg = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p")] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Same seed, same tokens.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Give the prompt as it is, without the model's chat template.")
    ] = False,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    *,
    options: dict[str, Any],
) -> None:
    """Answer one prompt; with several --adapter, answers stream side by side from one batch."""
    from truffula.cli.generate import read_prompt, run_generate
    from truffula.types import SamplingParams

    if url is not None and prompt is None:
        model, prompt = None, model  # the server has chosen the model: what stands first is the prompt
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    text = read_prompt(prompt)
    with chat_model(model, options, url, api_key, adapter or ["base"]) as (answering, names):
        run_generate(answering, text, names, params, raw=raw, as_json=as_json)


@app.command()
@with_options("engine")
def chat(
    model: OptionalModel = None,
    adapter: AdapterArg = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", "-t")] = 0.7,
    seed: Annotated[int | None, typer.Option("--seed", help="Same seed, same tokens.")] = None,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    *,
    options: dict[str, Any],
) -> None:
    """Talk with MODEL in the terminal, or with a running server's (--url).

    /help lists the commands: /adapter NAME switches in the middle of a conversation, /load FOLDER adds an adapter.
    """
    from truffula.cli.chat import run_chat
    from truffula.types import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with chat_model(model, options, url, api_key, adapter or ["base"], interactive=True) as (answering, names):
        run_chat(answering, names[0] or "base", system, params)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="A model or an adapter: folder, .gguf file, alias or Hugging Face id.")],
    base: Annotated[str | None, typer.Option("--base", help="For an adapter: the model it is for.")] = None,
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", metavar="q8_0", help="For a model: read its weights and say what this would lose."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What would be loaded and how: sizes, tying and its reason, memory, and every field's fate. Reads no weights,
    unless --quantize asks."""
    from truffula.cli.inspect import run_inspect

    run_inspect(source, base, quantize, as_json=as_json)


@app.command()
@with_options("engine", only=SERVED)
def verify(
    model: Model,
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="Also with this PEFT folder, against peft.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Greedy tokens to compare.")] = 16,
    as_json: AsJson = False,
    *,
    options: dict[str, Any],
) -> None:
    """Hold MODEL against transformers in float32 (and ADAPTER against peft): is what these options serve right?

    First op by op in float32, which names the first operation that differs; then in the arithmetic that is served.
    """
    from truffula.cli.verify import run_verify

    run_verify(resolve(options, model=model).engine, adapter, tokens, as_json=as_json)


@app.command()
def config(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--show", help="Print every option, its value and where it came from.")] = False,
    as_json: AsJson = False,
) -> None:
    """The options in force: defaults and environment."""
    if not show:
        typer.echo(context.get_help())
        return
    from truffula.cli.show_config import run_config

    run_config(as_json=as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine offers truffula, what is missing, and what would make it faster."""
    from truffula.cli.doctor import run_doctor

    run_doctor(as_json=as_json)


CpuIsa = Annotated[
    str, typer.Option("--cpu-isa", envvar="TRUFFULA_CPU_ISA", help="An instruction set that doctor lists.")
]


@bench_app.command("serve")
@with_options("engine")
def bench_serve(
    model: Model,
    clients: Annotated[
        int | None, typer.Option("--clients", "-c", help="Clients, each with one request at a time. [dim]\\[8][/]")
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option("--requests", help="Requests per client [dim]\\[1][/]; with --rate, in all [dim]\\[32][/]."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", help="Open loop: requests a second, as a Poisson process sends them.")
    ] = None,
    adapters: Annotated[
        str,
        typer.Option(
            "--adapters", help="none, shared (one for all), distinct (one each) or zipf (few are asked most)."
        ),
    ] = "distinct",
    adapter_count: Annotated[
        int | None, typer.Option("--adapter-count", help="Adapters that zipf draws from, or that --rate goes through.")
    ] = None,
    zipf_exponent: Annotated[
        float | None, typer.Option("--zipf-exponent", help="s of zipf's 1 / rank**s; 0 draws evenly. [dim]\\[1][/]")
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="Rank of the random all-linear adapters.")] = 16,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Random ids per prompt.")] = 105,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens to generate, greedily.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", help="Runs after a warm-up; the median is printed.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same prompts, adapters and arrival times.")] = 0,
    ttft_limit: Annotated[
        float | None, typer.Option("--ttft-limit", help="Goodput: most ms to the first token. [dim]\\[2000][/]")
    ] = None,
    itl_limit: Annotated[
        float | None, typer.Option("--itl-limit", help="Goodput: most ms between tokens, on average. [dim]\\[200][/]")
    ] = None,
    against_llm: Annotated[
        bool, typer.Option("--against-llm", help="Also through LLM.generate in a process of its own, in turn.")
    ] = False,
    url: Annotated[
        str | None, typer.Option("--url", help="Measure this running server instead of starting one.")
    ] = None,
    as_json: AsJson = False,
    *,
    options: dict[str, Any],
) -> None:
    """Load on the server: output tokens a second, time to first token, inter-token time, prefix-hit rate.

    A closed loop by default: each client sends its next request when the last has ended. With --rate an open loop:
    requests come when they come, so waiting shows; goodput counts those that kept both limits.
    """
    from truffula.bench.measured import Limits
    from truffula.cli.bench_serve import ServeBench, run_bench_serve

    given = {"ttft_ms": ttft_limit, "itl_ms": itl_limit}
    wanted = {name: value for name, value in given.items() if value is not None}
    limits = Limits(**wanted) if wanted else None
    bench = ServeBench(
        clients, requests, adapters, rank, prompt_tokens, max_tokens, repeats, against_llm, url, rate, adapter_count,
        zipf_exponent, limits, seed,
    )  # fmt: skip
    run_bench_serve(resolve(options, model=model).engine, bench, as_json=as_json)


@bench_app.command("compare")
def bench_compare(
    scenarios: Annotated[
        list[str] | None, typer.Argument(help="Scenarios or single rows (--list shows them); left out, all of them.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Rounds; in each, everybody runs once, in turn.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every run there.")] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write rows for benchmarks/README.md there.")
    ] = None,
    scenario_file: Annotated[
        Path | None, typer.Option("--scenario-file", help="A TOML file of rows of your own, in place of ours.")
    ] = None,
    bench_dir: Annotated[
        Path | None,
        typer.Option(
            "--bench-dir",
            help="BENCH_DIR of benchmarks/peers: models, adapters, peers. [dim]\\[bench in the temporary folder][/]",
        ),
    ] = None,
    peers: Annotated[
        Path | None, typer.Option("--peers", help="Folder of the peers' scripts. [dim]\\[the checkout's][/]")
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Print the scenarios and who takes part.")] = False,
) -> None:
    """truffula and other projects' servers in turn, on the same prompts: medians, spreads and ratios.

    One contestant runs at a time, started fresh and warmed up; rounds alternate. Peers are installed once by
    benchmarks/peers (llamacpp.sh setup, vllm.sh setup, ...); one that is not is named with the command, and the status
    is 1.
    """
    from truffula.cli.bench_compare import Asked, list_scenarios, run_bench_compare

    if list_only:
        list_scenarios(scenario_file)
        return
    asked = Asked(tuple(scenarios or ()), scenario_file, repeats, peers, bench_dir, json_file, markdown_file)
    run_bench_compare(asked)


@bench_app.command("join")
@with_options("engine")
def bench_join(
    model: Model,
    running: Annotated[int, typer.Option("--running", help="Base streams that run while adapters join.")] = 4,
    joins: Annotated[int, typer.Option("--joins", help="New adapters that join, one after the other.")] = 6,
    rank: Annotated[int, typer.Option("--rank")] = 64,
    as_json: AsJson = False,
    *,
    options: dict[str, Any],
) -> None:
    """What running streams feel when adapters load: the largest against the median inter-token time."""
    from truffula.cli.bench_join import run_bench_join

    run_bench_join(resolve(options, model=model).engine, running, joins, rank, as_json=as_json)


@bench_app.command("step")
def bench_step(
    rows: Annotated[str, typer.Option("--rows", help="Decode rows, separated by commas.")] = "1,8,32",
    adapters: Annotated[
        str, typer.Option("--adapters", help="none, shared (one for all), a number (fewer rows: left out), distinct.")
    ] = "none,shared,8,distinct",
    rank: Annotated[int, typer.Option("--rank", help="Rank of the random all-linear adapters.")] = 16,
    context: Annotated[int, typer.Option("--context", help="Tokens that each row has behind it.")] = 105,
    prefill: Annotated[int, typer.Option("--prefill", help="Tokens of the prompt chunk at the end; 0: none.")] = 512,
    steps: Annotated[int, typer.Option("--steps", help="Steps per line; the median is printed.")] = 20,
    adapter_dtype: Annotated[
        str, typer.Option("--adapter-dtype", help="What the adapters hold: bfloat16, float16 or float32.")
    ] = "bfloat16",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, bfloat16 or float32.")] = "auto",
    quantize: Annotated[str, typer.Option("--quantize", help="none, or q8_0: the base rounded to it.")] = "none",
    backend: Annotated[str, typer.Option("--backend", help="auto, cpu or reference.")] = "auto",
    cpu_isa: CpuIsa = "auto",
    threads: Annotated[int | None, typer.Option("--threads", help="Compute threads.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="A toy shape: does it run?")] = False,
    as_json: AsJson = False,
) -> None:
    """Milliseconds of a step on SmolLM2-135M's shape, and which ops they go to. No server, no sampling."""
    from truffula.cli.bench_step import StepBench, run_bench_step

    try:
        numbers = tuple(int(word) for word in rows.split(","))
    except ValueError:
        raise typer.BadParameter(f"{rows!r} is not a list of whole numbers.", param_hint="--rows") from None
    mixes = tuple(word.strip() for word in adapters.split(","))
    bench = StepBench(numbers, mixes, rank, context, prefill, steps, tiny, adapter_dtype)
    run_bench_step(
        bench, backend=backend, cpu_isa=cpu_isa, dtype=dtype, threads=threads, quantize=quantize, as_json=as_json
    )


@bench_app.command("kernel")
def bench_kernel(
    rows: Annotated[str, typer.Option("--rows", help="Rows, by commas.")] = "1,2,4,8,16,32,128,512",
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NxK", help="Outputs x inputs, several times; else SmolLM2's."),
    ] = None,
    formats: Annotated[str, typer.Option("--format", help="Of float32, bfloat16, Q8_0, Q4_0, Q4_1, Q5_0.")] = "",
    kernels: Annotated[str, typer.Option("--kernel", help="Of linear, lora, attention, norm, head, sampler.")] = "",
    cpu_isa: CpuIsa = "auto",
    threads: Annotated[int | None, typer.Option("--threads", help="Compute threads.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Toy shapes: does it run?")] = False,
    as_json: AsJson = False,
) -> None:
    """How fast each native kernel is, beside what memory and instructions allow, measured in the same run."""
    from truffula.cli.bench_kernel import bench_of, run_bench_kernel

    bench = bench_of(rows, shape or [], formats, kernels, tiny=tiny)
    run_bench_kernel(bench, isa=cpu_isa, threads=threads, as_json=as_json)


@adapters_app.command("list")
def adapters_list(url: Url = None, port: Port = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """The base and the adapters that a server offers: status, rank, size, source and base."""
    from truffula.cli.adapters import list_adapters
    from truffula.cli.server_client import ServerClient, server_address

    with ServerClient(server_address(url, port), api_key) as server:
        list_adapters(server, as_json=as_json)


@adapters_app.command("load")
def adapters_load(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What requests will call the adapter.")],
    path: Annotated[str, typer.Argument(metavar="FOLDER", help="Its folder on the server's disk.")],
    url: Url = None,
    port: Port = None,
    api_key: ApiKey = None,
) -> None:
    """Load the adapter in FOLDER as NAME; the server must run with --adapter-admin."""
    from truffula.cli.adapters import load_adapter
    from truffula.cli.server_client import ServerClient, server_address

    with ServerClient(server_address(url, port), api_key) as server:
        load_adapter(server, name, path)


@adapters_app.command("unload")
def adapters_unload(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An adapter that 'adapters list' names.")],
    url: Url = None,
    port: Port = None,
    api_key: ApiKey = None,
) -> None:
    """Free NAME's memory and forget the name; running requests end with it undisturbed."""
    from truffula.cli.adapters import unload_adapter
    from truffula.cli.server_client import ServerClient, server_address

    with ServerClient(server_address(url, port), api_key) as server:
        unload_adapter(server, name)
