"""The demo: a base and three adapters answer side by side from one batch; then a server answers one request per API.

make demo                        # exits when done
make demo SERVE=1                # keeps the server running until Ctrl-C
make demo SERVE=1 PORT=8001      # on another port
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from truffula import LLM, SamplingParams
from truffula.bench.server import truffula_server
from truffula.cli.generate import Answer, show
from truffula.cli.output import out, progress
from truffula.config import EngineConfig, ServerConfig
from truffula.errors import ConfigError, TruffulaError
from truffula.server.launch import bind
from truffula.settings import load_config
from truffula.weights.sources import resolve_source

ADAPTERS = Path(__file__).resolve().parent / "adapters"
MODEL = "smollm2"
QUESTIONS = {
    "pirate": "What is the ocean?",
    "extract": "Extract the data: Hannah Weber is 42 years old, lives in Hamburg and works as a translator.",
    "tldr": "Summarize: On Friday, the village library moved into the old train station. It took volunteers three "
    "weekends to carry all the books. Children painted the walls and a local baker brought free cake.",
}


def fetch(config: EngineConfig) -> None:
    """Download the model once, before the batch and the server both load it."""
    with progress() as report:
        resolve_source(config.model, cache_dir=config.cache_dir, offline=config.offline, progress=report)


def side_by_side() -> None:
    """Six answers in one batch: each question to the base and to the adapter that was trained for it."""
    console = out()
    began = time.monotonic()
    with progress() as report:
        llm = LLM(MODEL, adapters={name: ADAPTERS / name for name in QUESTIONS}, progress=report)
    with llm:
        info = llm.info
        console.print(
            f"{MODEL}: {info.model_type}, {info.dtype} on {info.device}, loaded in "
            f"{time.monotonic() - began:.1f} s; embeddings {info.tying.partition(':')[0]}"
        )
        pairs = [(question, name) for name, question in QUESTIONS.items() for name in (None, name)]
        for name, question in QUESTIONS.items():
            console.print(f"{name:8} {question}", soft_wrap=True)
        chats = [[{"role": "user", "content": question}] for question, _ in pairs]
        params = SamplingParams(temperature=0, max_tokens=40)
        begun = time.monotonic()
        answers = [
            Answer(f"{name} (adapter)" if name else f"base: {textwrap.shorten(question, 30, placeholder=' ...')}")
            for question, name in pairs
        ]
        show(answers, llm.stream_each(chats, params, adapters=[name for _, name in pairs]), per_row=2)
        tokens = sum(answer.tokens for answer in answers)
        console.print(
            f"{tokens} tokens for base and {len(QUESTIONS)} adapters of ranks 4, 8 and 2 in one batch: "
            f"{tokens / (time.monotonic() - begun):.0f} tokens a second\n",
            style="dim",
        )


def curl(url: str, path: str, body: dict[str, object]) -> str:
    """Send ``body`` with curl, which is shown (with httpx where there is no curl); returns the answer's text."""
    data = json.dumps(body)
    command = f"$ curl {url}{path} -H 'content-type: application/json' -d '{data}'"
    out().print(command, style="bold", soft_wrap=True)
    if shutil.which("curl"):
        command = ["curl", "-sS", "--fail-with-body", url + path, "-H", "content-type: application/json", "-d", data]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise TruffulaError(f"curl {path} failed: {done.stdout}{done.stderr}")
        return done.stdout
    import httpx

    return httpx.post(url + path, json=body, timeout=120).raise_for_status().text


def ask_the_server(url: str) -> None:
    """One request the LoRAX way, one the OpenAI way."""
    lorax = {
        "inputs": "Why do cats purr?",
        "parameters": {"adapter_id": "pirate", "max_new_tokens": 40, "apply_chat_template": True},
    }
    out().print(json.loads(curl(url, "/generate", lorax))["generated_text"] + "\n")
    messages = [{"role": "user", "content": "Ravi Patel, 51, moved to Oslo last spring and found work as a chef."}]
    chat = {"model": "extract", "messages": messages, "max_tokens": 40, "temperature": 0}
    out().print(json.loads(curl(url, "/v1/chat/completions", chat))["choices"][0]["message"]["content"] + "\n")


def what_next() -> None:
    """Commands that work in this environment, or what to install first."""
    missing = [name for name in ("torch", "transformers", "peft", "gguf") if importlib.util.find_spec(name) is None]
    first = f"; first: {' && '.join(installs(missing))}" if missing else ""
    rows = [
        (f"serve {MODEL} --adapter-dir examples/adapters", "serve these, and your own beside them"),
        (f"generate {MODEL} 'Tell me about dogs' -a base -a examples/adapters/pirate", "side by side"),
        (f"chat {MODEL} -a examples/adapters/pirate", "chat with it"),
        (f"inspect examples/adapters/pirate --base {MODEL}", "what each field of an adapter does"),
        (f"verify {MODEL} --adapter examples/adapters/pirate", f"compare with transformers and peft{first}"),
    ]
    out().print("Try next", style="bold")
    for command, what in rows:
        out().print(f"  .venv/bin/truffula {command}", style="bold", soft_wrap=True)
        out().print(f"      {what}", soft_wrap=True)


def installs(missing: list[str]) -> list[str]:
    """The commands that install ``missing`` beside this clone. torch comes from make, which takes the CPU's build."""
    torch = ["make .venv/.torch"] if "torch" in missing else []
    others = [name for name in missing if name != "torch"]
    return torch + ([f".venv/bin/pip install {' '.join(others)}"] if others else [])


def require_free(port: int) -> None:
    """Raises ``ConfigError`` now, not after the batch, when the server's port is taken."""
    try:
        bind(ServerConfig(port=port)).close()
    except ConfigError as error:
        raise ConfigError(f"{error.message} With make: make demo SERVE=1 PORT=8001.", param="port") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="leave the server running until Ctrl-C")
    parser.add_argument("--port", type=int, default=8000, help="port of the server that is left running")
    args = parser.parse_args()
    if args.serve:
        require_free(args.port)
    config = load_config({"model": MODEL}).engine
    fetch(config)
    # It starts while the batch below runs.
    with truffula_server(config, ADAPTERS, args.port if args.serve else None) as server:
        side_by_side()
        out().print("Now as a server (truffula serve smollm2 --adapter-dir examples/adapters)")
        url = server.wait()
        ask_the_server(url)
        what_next()
        if not args.serve:
            out().print("\nThe server of this demo ends now; `make demo SERVE=1` leaves it running, on port 8000.")
        if args.serve:
            out().print(f"\nServing at {url}; Ctrl-C ends.")
            try:
                while True:
                    time.sleep(3600)
            except KeyboardInterrupt:
                pass


if __name__ == "__main__":
    try:
        main()
    except TruffulaError as error:
        from truffula.cli.output import fail

        fail(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
