"""vllm-router, as it is installed, in front of two servers: it finds adapters, and one server may die."""

import os
import signal
from contextlib import ExitStack

import httpx
import pytest
from live_server import ok, until, write_adapters, write_model

from environments import environment
from truffula.bench.server import Server, free_port, truffula_server
from truffula.config import EngineConfig

PACKAGES = ["vllm-router==0.1.17"]
NAMES = ["pirate", "org--poet", "in-dir"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """The router's client, and the two servers behind it."""
    router = environment("vllm-router", PACKAGES) / "vllm-router"
    folder = tmp_path_factory.mktemp("fleet")
    model = write_model(folder / "llama")
    write_adapters(folder / "adapters", model)
    config = EngineConfig(model=str(model), threads=1, memory_bytes=2**29, dtype="float32")
    with ExitStack() as stack:
        servers = [stack.enter_context(truffula_server(config, folder / "adapters")) for _ in range(2)]
        urls = [server.wait() for server in servers]
        port = free_port()
        argv = [str(router), "--worker-urls", *urls, "--port", str(port), "--policy", "consistent_hash"]
        argv += ["--prometheus-port", str(free_port()), "--health-check-interval-secs", "1"]
        front = stack.enter_context(Server("vllm-router", argv, f"http://127.0.0.1:{port}"))
        front.wait(60)
        yield stack.enter_context(httpx.Client(base_url=front.url, timeout=60)), servers


def answer(client, name, **more):
    body = {"model": name, "prompt": "Hello", "max_tokens": 8, "temperature": 0, **more}
    return client.post("/v1/completions", json=body, headers={"x-session-id": name})


def text(client, name):
    return ok(answer(client, name))["choices"][0]["text"]


def workers_of(server):
    """How many requests for each adapter a server has answered."""
    metrics = httpx.get(f"{server.url}/metrics").text
    rows = [row for row in metrics.splitlines() if row.startswith("truffula_requests_total{")]
    return {row.split('adapter="')[1].split('"')[0]: float(row.split()[-1]) for row in rows}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_adapters_are_answered_through_the_router_and_one_server_may_die(fleet):
    client, servers = fleet
    base = ok(client.get("/v1/models"))["data"][0]["id"]
    with httpx.Client(base_url=servers[0].url, timeout=60) as direct:
        expected = {name: text(direct, name) for name in (*NAMES, base)}
    assert len(set(expected.values())) == 4
    for _ in range(4):
        assert {name: text(client, name) for name in expected} == expected
    # The header keeps each adapter on one server, beside the one request that went past the router.
    for name in NAMES:
        counts = [workers_of(server).get(name, 0) for server in servers]
        assert min(counts[0] - 1, counts[1]) == 0 and sum(counts) == 5, counts
    assert answer(client, "nobody").status_code == 404
    with client.stream("POST", "/v1/completions", json={"model": "pirate", "prompt": "Hello", "stream": True}) as reply:
        assert reply.read().endswith(b"data: [DONE]\n\n")
    for path in ("/get_server_info", "/get_model_info", "/health_generate", "/v1/models"):
        ok_or_empty = client.get(path)
        assert ok_or_empty.status_code == 200, (path, ok_or_empty.text)
    assert all(one["load"] >= 0 for one in ok(client.get("/get_loads"))["workers"])

    os.kill(servers[0].pid, signal.SIGKILL)
    until(lambda: all(answer(client, name).status_code == 200 for name in expected))
    assert {name: text(client, name) for name in expected} == expected
