"""The peers of a comparison: whether one is installed, and starting it as a session that takes loads.

Other projects' software lives outside, below one folder, and is set up and started by the scripts of
``benchmarks/peers``. A script tells the command that starts its server or child, so what a person starts by hand and
what is measured are the same.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from comparison.processes import LineChild
from comparison.scenarios import Contestant, Row
from truffula.bench.load import Load, LoadResult, OpenAI, Stream, run_load
from truffula.bench.server import Server, child_error, free_port, truffula_server
from truffula.config import EngineConfig
from truffula.errors import ConfigError
from truffula.settings import load_config

EXECUTABLE = Path(__file__).with_name("executable.py")
SLOT_TOKENS = 512
"""KV that a peer whose slots divide it is given per client, at least."""
# peer → the script that knows it
SCRIPTS = {
    "llama-server": "llamacpp.sh", "llama-bench": "llamacpp.sh", "vllm": "vllm.sh", "openvino": "openvino.sh",
    "hf-peft": "hf_peft.sh",
}  # fmt: skip


@dataclass(frozen=True)
class LlamaServer(OpenAI):
    """llama-server's ``/completion``: ``adapters`` in the order of its ``--lora``, each request scales its own to 1."""

    path: str = "/completion"
    adapters: tuple[str, ...] = ()

    def body(self, prompt: list[int], max_tokens: int, adapter: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt": prompt,
            "n_predict": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
        }
        if adapter is not None:
            body["lora"] = [{"id": self.adapters.index(adapter), "scale": 1.0}]
        return body

    def read(self, frame: dict[str, Any], now: float, stream: Stream) -> None:
        if "error" in frame:
            stream.error = str(frame["error"])[:300]
        if not frame.get("stop") or frame.get("content"):
            stream.tokens.append(now)
        if frame.get("stop"):
            stream.output_tokens = frame["tokens_predicted"]
            stream.prompt_tokens = frame["tokens_evaluated"]
            stream.cached_tokens = max(0, frame.get("timings", {}).get("cache_n", 0))


@dataclass(frozen=True)
class Place:
    """Where peers lie: their ``scripts``, and the folder below which these put everything (``BENCH_DIR``)."""

    scripts: Path
    files: Path

    def path(self, name: str) -> Path:
        return self.files / name

    def ask(self, script: str, *words: object) -> subprocess.CompletedProcess[str]:
        argv = ["env", f"BENCH_DIR={self.files}", "bash", str(self.scripts / script), *map(str, words)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=120)

    def command(self, script: str, *words: object) -> list[str]:
        """The command line that a script tells, one argument a line."""
        done = self.ask(script, *words)
        if done.returncode:
            raise child_error(f"{script} {words[0]} failed", done.stderr)
        return done.stdout.splitlines()


class Session(Protocol):
    """A peer that runs and takes loads. Time to first token is empty where a peer does not say it."""

    def run(self, load: Load) -> LoadResult: ...


@dataclass(frozen=True)
class HttpSession:
    """A server, ours or another's. Without ``server`` it was already running."""

    url: str
    dialect: OpenAI
    server: Server | None = None

    def run(self, load: Load) -> LoadResult:
        return run_load(self.url, load, self.dialect)


@dataclass(frozen=True)
class LineSession:
    """A child that answers lines: what the clients ask at the same time is one batch, as a library is used."""

    child: LineChild

    def run(self, load: Load) -> LoadResult:
        measured = LoadResult()
        for request in range(load.requests):
            prompts = [load.prompt(client, request) for client in range(load.clients)]
            adapters = [load.adapter(client, request) for client in range(load.clients)]
            begun = time.monotonic()
            said = self.child.ask({"prompts": prompts, "adapters": adapters, "max_tokens": load.max_tokens})
            measured.wall_s += said["wall_s"]
            each = said["output_tokens"] // len(prompts)
            for i, prompt in enumerate(prompts):
                first = [begun + said["ttft_s"][i]] if said["ttft_s"] else []
                measured.streams.append(Stream(begun, begun, first, each, len(prompt)))
        return measured


def missing(contestant: Contestant, place: Place) -> str | None:
    """Why ``contestant`` can't take part, with the command that helps; None when it can."""
    script = SCRIPTS.get(contestant.peer)
    if script is not None:
        if not (place.scripts / script).is_file():
            return f"{contestant.peer}: {place.scripts} has no {script}; give --peers the folder of the scripts"
        if place.ask(script, "check").returncode:
            return f"{contestant.peer} is not installed below {place.files}: {place.scripts / script} setup"
    if contestant.peer == "openai":
        return None
    if contestant.peer == "truffula" and not contestant.model.startswith(("models/", "/")):
        return None  # an alias or a Hub id
    path = place.path(contestant.model)
    if path.exists():
        return None
    maker = "llamacpp.sh setup, or moe for models with experts" if path.suffix == ".gguf" else "models.sh setup"
    return f"{contestant.title}: {path} does not exist: {place.scripts}/{maker}"


def version(contestant: Contestant, place: Place) -> str:
    """What takes part, in words. Raises ``ConfigError`` where a peer's script can't say it."""
    if contestant.peer in SCRIPTS:
        return "\n".join(place.command(SCRIPTS[contestant.peer], "version")).strip()
    if contestant.peer == "openai":
        return contestant.url
    from truffula import __version__

    return f"truffula {__version__}"


def engine_config(contestant: Contestant, place: Place) -> EngineConfig:
    """What a truffula contestant runs with. Raises ``ConfigError`` of an unknown or malformed option."""
    model = contestant.model
    if model.startswith(("models/", "/")):
        model = str(place.path(model))
    return load_config({"model": model, **contestant.options}).engine


def adapter_names(contestant: Contestant, row: Row, place: Place) -> list[str]:
    """The first of the adapters below the row's folder, in order."""
    folder = place.path(row.adapter_dir)
    names = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))[: row.adapter_count]
    if contestant.peer != "openai" and len(names) < row.adapter_count:
        raise ConfigError(
            f"{row.name!r} needs {row.adapter_count} adapters; {folder} has {len(names)}: models.sh setup",
            param="adapter_dir",
        )
    return names


def server_of(contestant: Contestant, row: Row, place: Place) -> tuple[Server, OpenAI]:
    """The server of a peer that has one, not started, and how to talk with it."""
    if contestant.peer == "truffula":
        adapters = place.path(row.adapter_dir) if row.adapter_count else None
        return truffula_server(engine_config(contestant, place), adapters), OpenAI()
    port = free_port()
    words = [port, place.path(contestant.model), row.adapter_count, row.clients, context_of(row), *contestant.flags]
    argv = place.command(SCRIPTS[contestant.peer], "serve-command", *words)
    server = Server(contestant.title, argv, f"http://127.0.0.1:{port}")
    if contestant.peer == "llama-server":
        return server, LlamaServer(adapters=tuple(adapter_names(contestant, row, place)))
    return server, OpenAI("base")


def context_of(row: Row) -> int:
    """Tokens of KV for a peer that is told a number: 2048 for one client, a slot each for more."""
    return max(2048, row.clients * max(SLOT_TOKENS, row.prompt_tokens + row.max_tokens))


@contextlib.contextmanager
def session(contestant: Contestant, row: Row, place: Place) -> Iterator[Session]:
    """``contestant`` started for ``row`` and healthy; stopped on leaving."""
    if contestant.peer == "openai":
        yield HttpSession(contestant.url, OpenAI(contestant.model))
    elif contestant.peer in ("openvino", "hf-peft"):
        if contestant.peer == "openvino" and row.adapter_count:
            raise ConfigError(f"{row.name!r}: openvino can't mix adapters in a batch.", param="adapters")
        model = place.path(contestant.model)
        argv = place.command(SCRIPTS[contestant.peer], "child-command", model, row.adapter_count)
        with LineChild(contestant.title, argv) as child:
            child.read()
            yield LineSession(child)
    else:
        server, dialect = server_of(contestant, row, place)
        with server:
            yield HttpSession(server.wait(), dialect, server)


def offline(contestant: Contestant, row: Row, place: Place) -> dict[str, Any]:
    """``{"tok_s": [per run], "weight_bytes"}`` of a decode or prefill without a server."""
    tokens = row.prompt_tokens if row.measure == "prefill" else row.max_tokens
    if contestant.peer == "llama-bench":
        words = [place.path(contestant.model), row.measure, tokens, row.runs, *contestant.flags]
        return parse_llama_bench(_output(contestant, place.command("llamacpp.sh", "bench-command", *words), ""))
    config = asdict(engine_config(contestant, place))
    job = {"config": config, "measure": row.measure, "tokens": tokens, "repeats": row.runs}
    said = _output(contestant, [sys.executable, str(EXECUTABLE)], json.dumps(job, default=str))
    answer: dict[str, Any] = json.loads(said.splitlines()[-1])
    return answer


def parse_llama_bench(text: str) -> dict[str, Any]:
    """What ``llama-bench -o json`` says of one test. Raises ``ConfigError`` when it is none."""
    try:
        (test,) = json.loads(text)
        return {
            "tok_s": [float(rate) for rate in test["samples_ts"]],
            "weight_bytes": int(test["model_size"]),
            "threads": int(test["n_threads"]),
            "tokens": int(test["n_prompt"]) or int(test["n_gen"]),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"llama-bench did not answer with the JSON of one test ({error!r}): {text[:300]}") from error


def held(contestant: Contestant, place: Place, server: Server) -> tuple[int, int]:
    """Bytes of weights in anonymous memory and of KV that was written; ``server`` runs.

    llama-server says both at its start, when it clears its KV, which therefore counts whole. Of ours, KV is touched
    when it is first written: what counts is the blocks that hold something now.
    """
    if contestant.peer == "llama-server":
        return parse_llama_log(server.output())
    from truffula.engine.build import find_settings
    from truffula.kernels.host import usable_cpus
    from truffula.kernels.select import Precision, select_backend
    from truffula.model.load import plan_model
    from truffula.weights.open import open_checkpoint

    config = engine_config(contestant, place)
    backend = select_backend(
        config.backend, config.device, threads=config.threads or usable_cpus(), cpu_isa=config.cpu_isa,
        precision=Precision(config.quantize, config.exact),
    )  # fmt: skip
    with contextlib.closing(open_checkpoint(Path(config.model))) as checkpoint:
        settings = find_settings(config, Path(config.model), plan_model(checkpoint), backend)
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        return settings.info.weight_bytes, written_bytes(answer.read().decode())


def written_bytes(metrics: str) -> int:
    """Bytes of the KV blocks that sequences or the prefix cache hold, from the text of our ``/metrics``."""
    counted = dict(re.findall(r"^truffula_kv_(used|cached)_bytes ([0-9.e+]+)$", metrics, re.MULTILINE))
    if len(counted) != 2:
        raise ConfigError("truffula's /metrics lack the bytes of used and cached KV blocks.")
    return sum(int(float(count)) for count in counted.values())


def parse_llama_log(text: str) -> tuple[int, int]:
    """(weights in anonymous memory, KV) in bytes, from the ``buffer size`` lines of llama-server's log.

    What it maps from the file is no anonymous memory; what it repacks for the processor is.
    """
    found = re.findall(r"(\S+) +(model|KV) buffer size = +([0-9.]+) MiB", text)
    sizes = [(where, kind, int(float(size) * 2**20)) for where, kind, size in found]
    kv = sum(size for _, kind, size in sizes if kind == "KV")
    if not kv:
        raise ConfigError("llama-server did not log its KV buffer; give it the flags -lv 4.")
    return sum(size for where, kind, size in sizes if kind == "model" and not where.endswith("_Mapped")), kv


def _output(contestant: Contestant, argv: list[str], stdin: str) -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise child_error(f"{contestant.title} failed", done.stderr)
    return done.stdout
