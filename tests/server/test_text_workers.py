"""Large bodies, templates that are not plain, tokenizers that fail: read in another process, answered alike."""

import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from live_server import MODEL, assert_canonical_error, events, ok, serving, tokenizer, until, write_model
from template_bombs import BOMBS

from processes import descendants
from truffula.errors import Overloaded
from truffula.service.openai_items import messages_from_openai
from truffula.service.workers import MAX_WAITING_PER_CLIENT, WorkerPool
from truffula.text.chat_template import ChatTemplates
from truffula.types import GenerateRequest

LONG = "The Lorax spoke for the trees. " * 4000
NOT_PLAIN = (
    "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text ~ '<|role|>' ~ m.role ~ '\n' ~ "
    "m.content %}{% endfor %}{{ ns.text }}"
)
TALK = [{"role": "user", "content": "Who speaks?"}, {"role": "assistant", "content": "The Lorax."}]


def with_template(folder, source):
    write_model(folder)
    names = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": source}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def test_a_large_prompt_has_the_tokens_of_the_library(live):
    body = {"prompt": LONG, "max_tokens": 3, "truncate_prompt_tokens": 40, "return_token_ids": True, "wish": 1}
    response = live.post("/v1/completions", {"model": MODEL, **body})
    choice = ok(response)["choices"][0]
    assert choice["prompt_token_ids"] == tokenizer().encode(LONG).ids[-40:]
    assert response.headers["x-truffula-ignored"] == "wish"
    assert int(response.headers["x-compute-characters"]) == len(LONG)
    echoed = live.completion(**body | {"echo": True, "logprobs": 1})["choices"][0]
    assert echoed["prompt_token_ids"] == choice["prompt_token_ids"]
    assert LONG.endswith(echoed["text"].split("spoke")[-2][-5:]) or len(echoed["logprobs"]["tokens"]) == 43


def test_a_large_body_is_answered_as_a_small_one(live):
    """The same request twice: as it is, and with a field that makes its body large and has no effect."""
    padding = {"wish": "x" * 100_000}
    rows = [
        ("/v1/completions", {"prompt": ["Hello", "The Lorax"], "n": 2, "seed": 3, "max_tokens": 4, "stop": ["zz"]}),
        ("/v1/completions", {"prompt": [[5, 6, 7], [8]], "logit_bias": {"9": 100}, "max_tokens": 4, "seed": 1}),
        ("/v1/chat/completions", {"messages": TALK, "max_tokens": 4, "temperature": 0, "model": "pirate"}),
        ("/generate", {"inputs": "Hello", "parameters": {"max_new_tokens": 4, "details": True, "stop": ["q"]}}),
        ("/invocations", {"messages": TALK, "max_tokens": 4, "temperature": 0}),
        ("/tokenize", {"inputs": "Hello naïve 🌲"}),
        ("/tokenize", {"messages": TALK, "return_token_strs": True}),
        ("/detokenize", {"tokens": [5, 6, 7]}),
        ("/chat_tokenize", {"messages": TALK}),
        ("/v1/completions", {"prompt": "a", "stop": [True]}),
        ("/v1/completions", {"prompt": [1, True]}),
        ("/v1/chat/completions", {"messages": [{"role": "x", "content": 1}]}),
        ("/v1/chat/completions", {"messages": TALK, "temperature": "hot"}),
        ("/generate", {"inputs": "a", "parameters": {"stop": [None], "top_k": "x"}}),
        ("/generate", {"inputs": "a", "max_new_tokens": 3}),
        ("/v1/completions", {"prompt": "a", "model": "nobody"}),
    ]
    varying = {"id", "created"}
    for path, body in rows:
        small, large = live.post(path, body), live.post(path, body | padding)
        assert large.status_code == small.status_code, (path, body, large.text)
        found = [response.json() for response in (small, large)]
        for one in found:
            if isinstance(one, dict):
                for name in varying:
                    one.pop(name, None)
                one.get("usage", {}).pop("prompt_tokens_details", None)  # the second finds the first one's prefix
        assert found[0] == found[1], (path, body)
        if small.status_code != 200:
            assert_canonical_error(large, small.status_code)
        else:
            assert large.headers["x-truffula-ignored"].endswith("wish")


def test_a_long_answer_has_all_of_its_parts(live):
    """The pieces of a reply join to the text; a long answer with alternatives has what its stream has."""
    response = live.post("/tokenize", {"inputs": LONG, "add_special_tokens": False})
    assert "".join(token["text"] for token in ok(response)) == LONG
    assert int(response.headers["content-length"]) == len(response.content) > 2**20
    body = {"prompt": [5, 6, 7] * 50, "echo": True, "logprobs": 20, "n": 2, "seed": 1, "max_tokens": 2}
    whole = live.completion(**body)["choices"][0]
    streamed = live.post("/v1/completions", {"model": MODEL, "temperature": 0, **body, "stream": True})
    frames = [choice for frame in events(streamed)[:-1] for choice in frame["choices"] if choice["index"] == 0]
    assert "".join(frame["text"] for frame in frames) == whole["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for frame in frames for one in frame["logprobs"][name]] == whole["logprobs"][name]


MANY_KEYS = dict.fromkeys(map(str, range(2000)))


def test_many_errors_are_one(live):
    """Validation ends at the first wrong item: the answer names it, and its size does not depend on theirs."""
    rows = [
        ("/v1/completions", {"prompt": [True] * 340_000}, 400, "prompt"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [True] * 4000}, 400, "stop_token_ids"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [1] * 340_000}, 400, "stop_token_ids"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(i): "x" for i in range(300)}}, 400, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "stop": ["a" * 20_000]}, 400, "stop"),
        ("/v1/chat/completions", {"messages": [{"role": "x", "content": 1}] * 1000}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [1] * 300_000}]}, 400, "messages"),
        ("/v1/chat/completions", {"messages": TALK, "chat_template_kwargs": MANY_KEYS}, 400, "keys"),
        ("/generate", {"inputs": "a", "parameters": {"stop": [None] * 340_000}}, 422, "stop"),
        ("/detokenize", {"tokens": [True] * 340_000}, 422, "tokens"),
    ]  # fmt: skip
    for path, body, status, words in rows:
        assert_canonical_error(live.post(path, body), status, words)


def test_a_template_that_is_not_plain_is_rendered_as_by_the_library(tmp_path):
    with serving(with_template(tmp_path / "model", NOT_PLAIN)) as live:
        core = live.service.texts.core
        assert not core.base.templates.is_plain(NOT_PLAIN)
        expected = ChatTemplates({"default": NOT_PLAIN}, {}).render(
            GenerateRequest(messages=messages_from_openai(TALK))
        )
        answer = ok(live.post("/chat_tokenize", {"messages": TALK}))
        assert answer["templated_text"] == expected
        body = {"messages": TALK, "max_tokens": 2, "return_token_ids": True}
        reply = ok(live.post("/v1/chat/completions", body))
        assert reply["prompt_token_ids"] == tokenizer().encode(expected, add_special_tokens=False).ids
        refused = live.post("/v1/chat/completions", {"messages": [{"role": "user", "content": 3}]})
        assert_canonical_error(refused, 400, "messages[0].content")


def test_many_chats_and_schemas_of_one_client_at_once_are_served(tmp_path):
    """A template that is not plain, as those of all models with tools, and a dozen schemas."""
    schemas = [{"type": "object", "properties": {f"p{n % 12}": {"type": "boolean"}}} for n in range(24)]

    async def main(url):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            body = {"messages": TALK, "max_tokens": 2}
            bodies = [body] * 24 + [{**body, "structured_outputs": {"json": schema}} for schema in schemas]
            sent = [client.post("/v1/chat/completions", json=one) for one in bodies]
            return [answer.status_code for answer in await asyncio.gather(*sent)]

    with serving(with_template(tmp_path / "model", NOT_PLAIN)) as live:
        assert asyncio.run(main(live.url)) == [200] * 48


LONG_BOMBS = ("many expressions, then loops", "quotient of large integers", "multiplied text")


@pytest.mark.parametrize(
    ("bomb", "seconds"),
    [("nested loops", 0.7), *(pytest.param(bomb, None, marks=pytest.mark.slow) for bomb in LONG_BOMBS)],
)
def test_a_hostile_template_ends_its_chats_and_nothing_else(tmp_path, monkeypatch, bomb, seconds):
    """Within the limit of a server, or, where any will do, a shorter one."""
    if seconds is not None:
        for module in ("prompt_maker", "workers"):
            monkeypatch.setattr(f"truffula.service.{module}.TEMPLATE_SECONDS", seconds)
    with serving(with_template(tmp_path / "model", BOMBS[bomb])) as live:
        for _ in range(2):
            assert_canonical_error(live.post("/v1/chat/completions", {"messages": TALK}), 400, "chat template")
        assert live.client.get("/health").status_code == 200
        live.completion(prompt="Hello", max_tokens=2)


def test_a_tokenizer_that_panics_is_an_error_of_the_request(tmp_path):
    model = write_model(tmp_path / "model")
    made = json.loads((model / "tokenizer.json").read_text())
    made["decoder"] = {"type": "Strip", "content": "a", "start": 0, "stop": 1000}
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, made["pre_tokenizer"]]}
    (model / "tokenizer.json").write_text(json.dumps(made))
    ids = tokenizer().encode("aaaa", add_special_tokens=False).ids
    with serving(model) as live:
        assert_canonical_error(live.post("/detokenize", {"tokens": ids}), 422, "tokenizer.json")
        hard = live.post("/v1/completions", {"prompt": "a" * 3000 + "!", "max_tokens": 1})
        assert_canonical_error(hard, 400, "tokenizer.json")
        live.post("/v1/completions", {"prompt": [5], "max_tokens": 1})
        assert live.client.get("/health").status_code == 200


def test_a_tokenizer_that_panics_when_it_is_read_ends_the_start(tmp_path):
    model = write_model(tmp_path / "model")
    made = json.loads((model / "tokenizer.json").read_text())
    made["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (model / "tokenizer.json").write_text(json.dumps(made))
    command = [sys.executable, "-m", "truffula", "serve", str(model), "--port", "0", "--memory", "1GiB"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 1
    assert "tokenizer.json cannot be read" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.slow
def test_sigterm_ends_a_server_whose_template_is_running(tmp_path):
    """The template computes without end; the text worker's limits are far away, and the drain is short."""
    model = with_template(tmp_path / "model", BOMBS["nested loops"])
    options = ["--port", "0", "--memory", "1GiB", "--drain-timeout", "1"]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen([sys.executable, "-m", "truffula", "serve", str(model), *options], stderr=log) as process,
    ):
        try:
            until(lambda: "ready at " in (tmp_path / "log").read_text())
            url = (tmp_path / "log").read_text().split("ready at ")[1].split()[0]
            with socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=30) as connection:
                body = json.dumps({"messages": TALK}).encode()
                head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
                until(lambda: any(is_text_worker(pid) for pid in descendants(process.pid)))
                workers = [pid for pid in descendants(process.pid) if is_text_worker(pid)]
                process.terminate()
                assert process.wait(60) == 0
            assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
        finally:
            process.kill()


def is_text_worker(pid):
    with contextlib.suppress(OSError):
        return b"truffula.text.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_clients_take_turns_and_too_many_calls_are_refused():
    async def main():
        pool = WorkerPool(["worker"])
        assert await pool.acquire("a") == "worker"
        order = []

        async def call(client):
            worker = await pool.acquire(client)
            order.append(client)
            pool.release(worker)

        greedy = [asyncio.ensure_future(call("a")) for _ in range(MAX_WAITING_PER_CLIENT)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await pool.acquire("a")
        assert caught.value.data["retry_after_s"] >= 1
        modest = asyncio.ensure_future(call("b"))
        await asyncio.sleep(0)
        random.Random(1).choice(greedy[1:]).cancel()
        pool.release("worker")
        await asyncio.gather(*greedy, modest, return_exceptions=True)
        assert order.index("b") <= 1
        assert len(order) == MAX_WAITING_PER_CLIENT  # one of the nine was cancelled
        assert await pool.acquire("c") == "worker"

        for _ in range(3):  # calls whose clients have left do not count as waiting
            left = [asyncio.ensure_future(pool.acquire("a")) for _ in range(MAX_WAITING_PER_CLIENT)]
            await asyncio.sleep(0)
            for one in left:
                one.cancel()
            ended = await asyncio.gather(*left, return_exceptions=True)
            assert all(isinstance(one, asyncio.CancelledError) for one in ended)

    asyncio.run(main())


def test_clients_that_have_left_do_not_count_as_waiting():
    async def main():
        pool = WorkerPool(["worker"])
        await pool.acquire("b")
        left = [asyncio.ensure_future(pool.acquire("a")) for _ in range(MAX_WAITING_PER_CLIENT)]
        await asyncio.sleep(0)
        for call in left:
            call.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        turn = asyncio.ensure_future(pool.acquire("a"))
        await asyncio.sleep(0)
        pool.release("worker")
        assert await turn == "worker"

    asyncio.run(main())
