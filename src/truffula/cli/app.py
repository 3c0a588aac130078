"""The commands and their help. Each imports its implementation when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from truffula.cli.adapters_app import app as adapters_app
from truffula.cli.bench_app import app as bench_app
from truffula.cli.help import GLUE, App
from truffula.cli.options import ApiKey, AsJson, ConfigFile, Model, ModelOrVariable, Port, Url, resolve, with_options
from truffula.config import ENGINE_PROCESS, OPTIONS
from truffula.settings import require_paths

START, MODELS, SERVER, TOOLS = "Start here", "Models", "A running server", "This machine"
app = App(
    name="truffula",
    help="Serve one base language model and any number of LoRA adapters on it, in one batch.\n\n"
    "Try `truffula chat smollm2`, or `truffula serve smollm2` and open http://127.0.0.1:8000.",
)

AdapterArg = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        metavar="[NAME=]FOLDER",
        help="Answer with this adapter (a PEFT folder), or 'base'; repeat for several.",
    ),
]
# The options that affect computed values.
SERVED = ("revision", "device", "dtype", "backend", "cpu_isa", "quantize", "exact", "threads", "offline", "cache_dir")
# The options of an engine in the command's own process.
IN_PROCESS = tuple(name for name, option in OPTIONS.items() if option.topic != ENGINE_PROCESS)
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="Sampling temperature; 0 always takes the most likely token.")
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="The same seed gives the same tokens.")]
ServerUrl = Annotated[
    str | None, typer.Option("--url", metavar="URL", help="Ask this running server instead of loading MODEL.")
]
CacheDir = Annotated[
    Path | None,
    typer.Option("--cache-dir", metavar="FOLDER", help=f"Folder for downloads. [env:{GLUE}TRUFFULA_CACHE_DIR]"),
]


def _print_version(value: bool) -> None:
    if value:
        from truffula import __version__

        typer.echo(f"truffula {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", "-v", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel=START, epilog="`truffula config --show` prints every option, its value and its origin.")
@with_options("engine", "server")
def serve(model: ModelOrVariable = None, *, options: dict[str, Any]) -> None:
    """Serve MODEL and its adapters over HTTP, with the routes of OpenAI, Anthropic,
    LoRAX and TGI.

    Each option can also be set by the environment variable beside it, or in a file (--config).
    """
    from truffula.server.launch import launch

    resolved = resolve(options, model=model)
    require_paths(resolved.settings)
    if resolved.server.api_keys_file is not None:
        from truffula.server.keys import read_keys

        read_keys(resolved.server.api_keys_file)  # report an error in it before the model is loaded
    if resolved.server.chat_template is not None:
        from truffula.text.chat_template import read_template

        read_template(resolved.server.chat_template)  # report an error in it before the model is loaded
    from truffula.text.tool_formats import detect_format

    detect_format("", None, resolved.server.tool_format, resolved.server.reasoning_format)  # as above
    launch(resolved)


@app.command(rich_help_panel=START)
@with_options("engine", only=IN_PROCESS)
def generate(
    model: ModelOrVariable = None,
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="The prompt, also alone where TRUFFULA_MODEL is set; without it, or with '-', read from stdin."
        ),
    ] = None,
    adapter: AdapterArg = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Maximum number of tokens to generate.")] = 128,
    temperature: Temperature = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", metavar="P", help="Sample from the most likely tokens whose probabilities sum to this."
        ),
    ] = 1.0,
    seed: Seed = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send the prompt as it is, without the model's chat template.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Answer every line of FILE ('-': of stdin), in batches, and print one JSON object per answer.",
        ),
    ] = None,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    *,
    options: dict[str, Any],
) -> None:
    """Answer one prompt; with several --adapter, the answers stream side by side from one batch."""
    from truffula.cli.chat_models import open_chat_model
    from truffula.cli.generate import is_prompt, read_prompt, read_prompts, run_batch, run_generate
    from truffula.params import SamplingParams

    if prompts is None and prompt is None and (url is not None or is_prompt(model)):
        model, prompt = None, model  # the only argument is the prompt
    if url is None:
        resolve(options, model=model)  # report an error in the options before the prompt is read
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    texts = [read_prompt(prompt)] if prompts is None else read_prompts(prompts, prompt, url)
    with open_chat_model(model, options, url, api_key, adapter or ["base"]) as (answering, names):
        if prompts is None:
            run_generate(answering, texts[0], names, params, raw=raw, as_json=as_json)
        else:
            run_batch(answering, texts, names, params, raw=raw)


@app.command(rich_help_panel=START)
@with_options("engine", only=IN_PROCESS)
def chat(
    model: ModelOrVariable = None,
    adapter: AdapterArg = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Maximum number of tokens per answer.")] = 512,
    temperature: Temperature = 0.7,
    seed: Seed = None,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    *,
    options: dict[str, Any],
) -> None:
    """Chat in the terminal with MODEL, or with a running server (--url).

    /help lists the commands: /adapter NAME switches in the middle of a conversation, /load FOLDER adds an adapter.
    """
    from truffula.cli.chat import run_chat
    from truffula.cli.chat_models import open_chat_model
    from truffula.params import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with open_chat_model(model, options, url, api_key, adapter or ["base"]) as (answering, names):
        run_chat(answering, names[0] or "base", system, params)


@app.command("list", rich_help_panel=MODELS)
def list_models(
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """List the models and adapters that can be used by name: aliases, and what the Hub's cache holds."""
    from truffula.cli.models import run_list

    run_list(cache_dir, as_json=as_json)


@app.command(rich_help_panel=MODELS)
def pull(
    model: Model,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="TEXT", help="Branch, tag or commit on the Hugging Face Hub.")
    ] = None,
    cache_dir: CacheDir = None,
) -> None:
    """Download MODEL, an alias or a Hub id, and print its path."""
    from truffula.cli.models import run_pull

    run_pull(model, revision, cache_dir)


@app.command(rich_help_panel=MODELS)
def inspect(
    source: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A model or an adapter: folder, .gguf file, alias or Hugging Face id."),
    ],
    base: Annotated[str | None, typer.Option("--base", metavar="MODEL", help="For an adapter: its base model.")] = None,
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", metavar="q8_0", help="For a model: read its weights and print the rounding error."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what would be loaded: sizes, memory, tied weights, and how each field of the configuration is handled.

    Reads no weights, except with --quantize.
    """
    from truffula.cli.inspect import run_inspect

    run_inspect(source, base, quantize, as_json=as_json)


@app.command(rich_help_panel=MODELS)
@with_options("engine", only=SERVED)
def verify(
    model: Model,
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", metavar="FOLDER", help="Also compare this PEFT folder with peft.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Number of greedy tokens to compare.")] = 16,
    as_json: AsJson = False,
    *,
    options: dict[str, Any],
) -> None:
    """Check that MODEL computes what transformers does, and an adapter what peft does.

    First in float32, operation by operation, which names the first one that differs; then in the dtype that is served.
    """
    from truffula.cli.verify import run_verify

    run_verify(resolve(options, model=model).engine, adapter, tokens, as_json=as_json)


@app.command(rich_help_panel=MODELS)
def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="PEFT folders or Hugging Face ids.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The new adapter's folder.")],
    weights: Annotated[
        str | None,
        typer.Option("--weights", "-w", metavar="W,W,...", help="A number for each adapter. [default: 1 for each]"),
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            "-s",
            metavar="NAME",
            help="linear (the exact sum), ties, dare_linear, dare_ties or magnitude_prune, as PEFT defines them.",
        ),
    ] = "linear",
    density: Annotated[
        float | None, typer.Option("--density", metavar="D", help="Of ties, dare and prune: the share that is kept.")
    ] = None,
    sign: Annotated[
        str, typer.Option("--sign", metavar="NAME", help="Of ties: total or frequency elects the sign.")
    ] = "total",
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="R", help="Of linear: the best approximation of this rank, instead of the sum."),
    ] = None,
) -> None:
    """Merge several adapters into one, by weights.

    A linear merge is exact: its rank is the sum of theirs. A server mixes adapters without merging them: see
    merged_adapters in requests.
    """
    from truffula.cli.merge import run_merge

    run_merge(adapters, weights, strategy, density, sign, rank, output)


@app.command(rich_help_panel=MODELS)
@with_options("engine", only=("revision", "offline", "cache_dir"))
def fold(
    model: Model,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A PEFT folder or a Hugging Face id.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The new model's folder.")],
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Of a quantised MODEL, write plain weights.")
    ] = False,
    *,
    options: dict[str, Any],
) -> None:
    """Fold ADAPTER into MODEL, and write the model that they make together."""
    from truffula.cli.merge import run_fold

    run_fold(resolve(options, model=model).engine, adapter, output, dequantize=dequantize)


@app.command(rich_help_panel=SERVER)
def ps(url: Url = None, port: Port = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show the model, the adapters and the requests of a running server."""
    from truffula.cli.server_client import ServerClient
    from truffula.cli.server_state import run_ps

    with ServerClient(url, port, api_key) as server:
        run_ps(server, as_json=as_json)


app.add_typer(adapters_app, name="adapters", rich_help_panel=SERVER)


@app.command(rich_help_panel=TOOLS)
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine supports, what is missing, and what would make truffula faster."""
    from truffula.cli.doctor import run_doctor

    run_doctor(as_json=as_json)


@app.command(rich_help_panel=TOOLS)
def config(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--show", help="Print every option, its value and its origin.")] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Show each option's value from defaults, configuration file and environment."""
    if not show:
        typer.echo(context.get_help())
        return
    from truffula.cli.show_config import run_config

    run_config(config_file, as_json=as_json)


app.add_typer(bench_app, name="bench", rich_help_panel=TOOLS)


@app.command(rich_help_panel=TOOLS)
def version() -> None:
    """Print the version."""
    _print_version(True)


@app.command("help", rich_help_panel=TOOLS)
def print_help(
    context: typer.Context,
    command: Annotated[list[str] | None, typer.Argument(metavar="COMMAND", help="A command, such as serve.")] = None,
) -> None:
    """Show the help of a command, or list the commands."""
    from truffula.cli.help import help_of

    typer.echo(help_of(context, command or []))
