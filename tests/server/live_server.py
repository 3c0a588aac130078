"""A real server on a free port, in a thread of the test process: a tiny model, a small tokenizer, a few adapters."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from truffula.server.launch import adapter_directory, bind, start_server_engine
from truffula.server.serve import DrainingServer, make_server
from truffula.service.aio import AsyncService
from truffula.settings import Resolved, load_config
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.tiny import tiny_llama_config, write_tiny_checkpoint

MODEL = "tiny/llama"
BEGIN, END, ROLE = "<|begin|>", "<|end|>", "<|role|>"
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] == 'RAISE' %}{{ raise_exception('no such talk') }}{% endif %}"
    "<|role|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)
CORPUS = [
    "The Truffula trees were bright, and the Lorax spoke for them. Hello hello world.",
    "Ünïcödé wörds, naïve café, 東京の空, привет мир, 👍🏽 emoji 🌲🌳",
]


@cache
def tokenizer() -> Tokenizer:
    """Byte level, so every text has tokens and characters split over them; BOS is added."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[BEGIN, END, ROLE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens([AddedToken(token, special=True) for token in (BEGIN, END, ROLE)])
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)]),
        ]
    )
    return made


def write_model(
    folder: Path, *, with_tokenizer: bool = True, extra: Mapping[str, Any] | None = None, **config: Any
) -> Path:
    """A tiny llama with the tokenizer above; ``extra`` replaces tensors."""
    made = tokenizer()
    shape = {"vocab_size": made.get_vocab_size(), "bos_token_id": 0, "eos_token_id": 1, "num_hidden_layers": 2}
    write_tiny_checkpoint(folder, tiny_llama_config(**shape | config), seed=3, extra=extra)
    if with_tokenizer:
        made.save(str(folder / "tokenizer.json"))
        names = {"bos_token": BEGIN, "eos_token": END, "chat_template": TEMPLATE}
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def write_adapters(folder: Path, model: Path) -> dict[str, Path]:
    """Three that answer differently from the base and from each other."""
    return {
        name: write_tiny_adapter(folder / name.replace("/", "--"), model, rank=rank, alpha=8 * rank, seed=rank)
        for name, rank in (("pirate", 4), ("org/poet", 2), ("in-dir", 3))
    }


@dataclass
class Live:
    """A served model. ``client`` speaks to it; ``server`` and ``service`` are for what HTTP does not show."""

    url: str
    server: DrainingServer
    client: httpx.Client

    @property
    def service(self) -> AsyncService:
        assert self.server.loading.app is not None
        return self.server.loading.app.service

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return self.client.post(path, json=body, **more)

    def completion(self, **body: Any) -> dict[str, Any]:
        return ok(self.post("/v1/completions", {"model": MODEL, "temperature": 0, **body}))

    def chat(self, content: str = "Hello", **body: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": content}]
        return ok(self.post("/v1/chat/completions", {"model": MODEL, "messages": messages, "temperature": 0, **body}))

    def native(self, inputs: str = "Hello", **parameters: Any) -> dict[str, Any]:
        return ok(self.post("/generate", {"inputs": inputs, "parameters": {"max_new_tokens": 8, **parameters}}))


def ok(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def events(response: httpx.Response) -> list[Any]:
    """The data of each frame; ``[DONE]`` stays text. Every line is a frame's, a comment's or blank."""
    assert response.headers["content-type"] == "text/event-stream"
    found = []
    for line in response.text.split("\n"):
        assert line == "" or line.startswith(("data: ", ":")), line
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


def made_server(resolved: Resolved, listening: socket.socket) -> DrainingServer:
    """As ``launch`` makes it, its engine starting."""
    directory = adapter_directory(resolved)
    return make_server(resolved, listening, start_server_engine(resolved), directory)


@contextlib.contextmanager
def serving(model: Path, **options: Any) -> Iterator[Live]:
    """``truffula serve`` in a thread of the test process."""
    defaults = {
        "model": str(model),
        "port": 0,
        "transport": "inline",
        "served_model_name": MODEL,
        "memory": "1GiB",
        "dtype": "float32",
        "threads": 1,
        "response_store": "memory",
        # An engine's process of its own would import torch for it, which takes longer than all that is asked of it.
        "backend": "auto" if options.get("transport") == "process" else "reference",
    }
    resolved = load_config({**defaults, **options}, env={})
    listening = bind(resolved.server)
    server = made_server(resolved, listening)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="live-server")
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        # Reading the system's certificates takes longer than the rest of a start, and no address here is https.
        with httpx.Client(base_url=url, timeout=60, verify=False) as client:
            wait_ready(client, server)
            yield Live(url, server, client)
    finally:
        server.should_exit = True
        thread.join(60)
        listening.close()
    assert not thread.is_alive()


def health_of(client: httpx.Client) -> int:
    return client.get("/health").status_code


def until(true: Callable[[], Any], patience_s: float = 60) -> None:
    """Polls: what is waited for happens in a thread or a process that says nothing."""
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def wait_ready(client: httpx.Client, server: DrainingServer) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if server.loading.error is not None:
            raise server.loading.error
        if health_of(client) == 200:
            return
        time.sleep(0.01)
    raise AssertionError("the server did not become healthy")


def assert_canonical_error(response: httpx.Response, status: int, words: str = "") -> Mapping[str, Any]:
    """One shape a side, for every way of failing. Returns the error's fields."""
    path = response.request.url.path
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    if status in (429, 503, 529):
        assert int(response.headers["retry-after"]) >= 1
    body = response.json()
    assert len(response.content) < 2000
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
        assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
        error = body["error"]
        assert set(error) == {"type", "message"} and isinstance(error["type"], str)
        message = error["message"]
    elif path == "/v1" or path.startswith("/v1/"):
        assert set(body) == {"error"}
        error = body["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str) and isinstance(error["type"], str)
        assert error["param"] is None or isinstance(error["param"], str)
        assert error["code"] is None or isinstance(error["code"], str)
        message = error["message"]
    else:
        assert set(body) == {"error", "error_type"}
        assert isinstance(body["error"], str) and isinstance(body["error_type"], str)
        error, message = body, body["error"]
    assert message
    assert words in message
    return error
