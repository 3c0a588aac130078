"""What a user has who installed truffula alone: commands, server, adapters, both dialects, quantising. ``make smoke``
runs it in an environment of its own; the rest of the suite leaves it out.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from truffula import LLM, SamplingParams
from truffula.kernels.cpu import why_unavailable
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.tiny import tiny_llama_config, write_tiny_checkpoint

ADAPTERS = Path(__file__).resolve().parents[2] / "examples" / "adapters"
MODEL = "smollm2"  # a GGUF file, fetched with pip
QUESTION = "Why do cats purr?"


def truffula(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "truffula", *args], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "truffula", "serve", MODEL, "--adapter-dir", str(ADAPTERS), "--port", str(port)]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as said, subprocess.Popen(command, stdout=said, stderr=said) as server:
        try:
            address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
            while not healthy(address):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:  # leaving the block would wait without end
                server.kill()
                raise


def healthy(url: str) -> bool:
    try:
        return httpx.get(url + "/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def post(url: str, path: str, body: dict[str, object]) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=120).raise_for_status()


def chat(url: str, model: str, question: str = QUESTION, tokens: int = 24) -> str:
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}
    return str(post(url, "/v1/chat/completions", body).json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("package", ["torch", "transformers", "peft"])
def test_it_is_not_there(package: str) -> None:
    assert importlib.util.find_spec(package) is None


def test_the_native_kernels_are() -> None:
    assert not why_unavailable()
    rows = {row["what"]: row for row in json.loads(truffula("doctor", "--json").stdout)}
    assert rows["backend auto"]["value"].startswith("cpu ") and rows["backend auto"]["state"] == "ok"


def test_inspect_a_model_and_an_adapter() -> None:
    found = json.loads(truffula("inspect", MODEL, "--json").stdout)
    assert found["format"] == "gguf" and found["tying"] == "tied"
    adapter = json.loads(truffula("inspect", str(ADAPTERS / "pirate"), "--base", MODEL, "--json").stdout)
    assert adapter["error"] is None


def test_generate_with_the_base_and_an_adapter() -> None:
    done = truffula("generate", MODEL, QUESTION, "-a", "base", "-a", f"pirate={ADAPTERS / 'pirate'}", "-n", "12")
    assert done.returncode == 0, done.stderr
    assert "--- base" in done.stdout and "--- pirate" in done.stdout


def test_verify_says_what_it_wants() -> None:
    done = truffula("verify", MODEL)
    assert done.returncode == 1
    assert "-m pip install " in done.stderr and "[train]'" in done.stderr and "Traceback" not in done.stderr


def test_openai_dialect_with_adapters_at_once(url: str) -> None:
    ids = {model["id"] for model in httpx.get(url + "/v1/models").json()["data"]}
    assert MODEL in ids
    names = [MODEL, "pirate", "tldr"]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda name: chat(url, name), names))
    assert together == [chat(url, name) for name in names]  # the same alone as in company
    assert len(set(together)) == 3
    question = "Extract the data: Hannah Weber is 42 years old, lives in Hamburg and works as a translator."
    assert json.loads(chat(url, "extract", question, 64))["name"] == "Hannah Weber"


def test_openai_stream_is_the_whole_answer(url: str) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": "pirate", "messages": messages, "max_tokens": 24, "temperature": 0, "stream": True}
    text = ""
    for line in post(url, "/v1/chat/completions", body).text.splitlines():
        if line.startswith("data: {"):
            text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    assert text == chat(url, "pirate")


def test_lorax_dialect(url: str) -> None:
    asked = {"adapter_id": "pirate", "max_new_tokens": 24, "apply_chat_template": True}
    answer = post(url, "/generate", {"inputs": QUESTION, "parameters": asked}).json()["generated_text"]
    assert answer == chat(url, "pirate")
    frames = post(url, "/generate_stream", {"inputs": QUESTION, "parameters": asked}).text.split("\n\n")
    events = [json.loads(frame.removeprefix("data:")) for frame in frames if frame.startswith("data:")]
    assert "".join(event["token"]["text"] for event in events) == answer == events[-1]["generated_text"]


def test_an_adapter_that_is_not_there_is_no_base_answer(url: str) -> None:
    body = {"model": "nobody", "messages": [{"role": "user", "content": "Hi"}]}
    assert httpx.post(url + "/v1/chat/completions", json=body, timeout=60).status_code == 404


def test_q8_0_of_a_float_checkpoint(tmp_path: Path) -> None:
    sizes = tiny_llama_config(hidden_size=64, intermediate_size=96)
    model = write_tiny_checkpoint(tmp_path / "model", sizes, dtype="bfloat16")
    leaf = write_tiny_adapter(tmp_path / "leaf", model)
    lost = json.loads(truffula("inspect", str(model), "--quantize", "q8_0", "--json").stdout)["rounding"]
    assert 0 < lost["kinds"]["all"]["error"] < 0.02
    with LLM(str(model), adapters={"leaf": str(leaf)}, quantize="q8_0") as llm:
        params = SamplingParams(temperature=0, max_tokens=5)
        outs = llm.generate([[5, 6, 7], [5, 6, 7]], params, adapters=[None, "leaf"])
    assert all(len(out.token_ids) == 5 for out in outs)
