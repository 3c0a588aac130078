"""The commands and their help. Bodies live in files of their own and are imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from truffula.cli.bench_app import app as bench_app
from truffula.cli.help import App
from truffula.cli.options import AsJson, ConfigFile, Model, ModelOrVariable, resolve, with_options
from truffula.config import require_paths

START, MODELS, SERVER, TOOLS = "Start here", "Models", "A running server", "This machine"
app = App(
    name="truffula",
    help="Serve one base language model and any number of LoRA adapters on it, in one batch.\n\n"
    "Try `truffula chat smollm2`, or `truffula serve smollm2` and open http://127.0.0.1:8000.",
)
adapters_app = App(help="List, load and unload the adapters of a running server.")

AdapterArg = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        metavar="[NAME=]FOLDER",
        help="Answer with this adapter (a PEFT folder), or 'base'; repeat for several.",
    ),
]
# The options that change the numbers that are computed.
SERVED = ("revision", "device", "dtype", "backend", "cpu_isa", "quantize", "exact", "threads", "offline", "cache_dir")
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="Sampling temperature; 0 always takes the most likely token.")
]
Url = Annotated[str, typer.Option("--url", metavar="URL", help="Address of a running server.")]
AdapterName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the adapter.", show_default=False)]
AdapterPath = Annotated[
    Path, typer.Argument(metavar="PATH", help="Its folder, on the server's disk.", show_default=False)
]
ApiKey = Annotated[str | None, typer.Option("--api-key", metavar="KEY", help="API key of the server.")]
CacheDir = Annotated[
    Path | None,
    typer.Option("--cache-dir", metavar="FOLDER", help="Folder for downloads. [env:\u00a0TRUFFULA_CACHE_DIR]"),
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
    """Serve MODEL and its adapters over HTTP, with the routes of OpenAI, LoRAX and TGI.

    Each option can also be set by the environment variable beside it, or in a file (--config).
    """
    from truffula.server.launch import launch

    resolved = resolve(options, model=model)
    require_paths(resolved.settings)
    if resolved.server.chat_template is not None:
        from truffula.cli.template_file import check_template

        check_template(resolved.server.chat_template)
    launch(resolved)


@app.command(rich_help_panel=START)
@with_options("engine")
def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; without it, or with '-', it is read from standard input.")
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
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="The same seed gives the same tokens.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send the prompt as it is, without the model's chat template.")
    ] = False,
    *,
    options: dict[str, Any],
) -> None:
    """Answer one prompt; with several --adapter, the answers stream side by side from one batch."""
    from truffula.cli.generate import run_generate
    from truffula.types import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    run_generate(resolve(options, model=model).engine, prompt, adapter or ["base"], params, raw=raw)


@app.command(rich_help_panel=START)
@with_options("engine")
def chat(
    model: ModelOrVariable = None,
    adapter: AdapterArg = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Maximum number of tokens per answer.")] = 512,
    temperature: Temperature = 0.7,
    *,
    options: dict[str, Any],
) -> None:
    """Chat with MODEL in the terminal; /adapter NAME switches adapters in the middle of a conversation."""
    from truffula.cli.chat import run_chat

    run_chat(resolve(options, model=model).engine, adapter or [], system, max_tokens, temperature)


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
    """Show what would be loaded, and how: sizes, memory, tied weights, and what each field of the configuration does.

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
    """Compare MODEL with transformers, and an adapter with peft: are the numbers that would be served right?

    First in float32, operation by operation, which names the first one that differs; then in the dtype that is served.
    """
    from truffula.cli.verify import run_verify

    run_verify(resolve(options, model=model).engine, adapter, tokens, as_json=as_json)


@app.command(rich_help_panel=SERVER)
def ps(
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="Address of the server. [default: http://127.0.0.1:8000]")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", metavar="PORT", help="Port of a server on this machine.")
    ] = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show a running server's model, its adapters and the requests that it runs."""
    from truffula.cli.ps import run_ps

    run_ps(url, port, api_key, as_json=as_json)


app.add_typer(adapters_app, name="adapters", rich_help_panel=SERVER)


@app.command(rich_help_panel=TOOLS)
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine offers, what is missing, and what would make truffula faster."""
    from truffula.cli.doctor import run_doctor

    run_doctor(as_json=as_json)


@app.command(rich_help_panel=TOOLS)
def config(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--show", help="Print every option, its value and its origin.")] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Show the options in force: defaults, configuration file and environment."""
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
    """Explain a command, or list the commands."""
    from truffula.cli.help import help_of

    typer.echo(help_of(context, command or []))


@adapters_app.command("list")
def adapters_list(url: Url = "http://127.0.0.1:8000", api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List the base model and the adapters of a server."""
    from truffula.cli.adapters import list_adapters

    list_adapters(url, api_key, as_json=as_json)


@adapters_app.command("load")
def adapters_load(
    name: AdapterName, path: AdapterPath, url: Url = "http://127.0.0.1:8000", api_key: ApiKey = None
) -> None:
    """Load the adapter in PATH as NAME; the server must run with --adapter-admin."""
    from truffula.cli.adapters import load_adapter

    load_adapter(url, api_key, name, path)


@adapters_app.command("unload")
def adapters_unload(name: AdapterName, url: Url = "http://127.0.0.1:8000", api_key: ApiKey = None) -> None:
    """Unload the adapter NAME; requests that use it finish normally."""
    from truffula.cli.adapters import unload_adapter

    unload_adapter(url, api_key, name)
