"""Listening before loading, and what is said when it cannot be."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from live_server import assert_canonical_error, health_of, made_server, ok, serving, until, write_model

from processes import descendants, frozen, watched
from truffula.bench.server import free_port
from truffula.config import ServerConfig
from truffula.errors import ConfigError, EngineDied, TruffulaError
from truffula.server.launch import bind, launch
from truffula.settings import load_config


def test_a_port_in_use_is_said_before_anything_loads(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        resolved = load_config({"model": str(tmp_path / "no model here"), "port": port}, env={})
        with pytest.raises(ConfigError, match=f"Port {port} .* in use") as caught:
            launch(resolved)
    assert caught.value.param == "port"


def test_an_address_that_is_not_ours():
    with pytest.raises(ConfigError, match="Cannot listen"):
        bind(ServerConfig(host="203.0.113.7", port=0))


def test_connections_do_not_wait_to_fill_segments():
    """asyncio switches Nagle's algorithm off only where a socket says that it is TCP."""
    with bind(ServerConfig(port=0)) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP


def test_a_model_that_cannot_load_ends_the_server_with_its_error(tmp_path):
    resolved = load_config({"model": str(tmp_path), "port": 0, "transport": "inline", "offline": True}, env={})
    with pytest.raises(TruffulaError):
        launch(resolved)


def test_it_answers_503_while_it_loads(model_folder):
    held = threading.Event()
    resolved = load_config(
        {"model": str(model_folder), "port": 0, "transport": "inline", "memory": "1GiB", "threads": 1}, env={}
    )
    listening = bind(resolved.server)
    server = made_server(resolved, listening)
    load = server.loading.load

    def slow():
        assert held.wait(60)
        return load()

    server.loading.load = slow
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=60) as client:
        for path in ("/health", "/v1/models", "/generate"):
            response = client.get(path)
            assert response.status_code == 503
            assert response.json()["error"]
            assert int(response.headers["retry-after"]) >= 1
        held.set()
        until(lambda: health_of(client) == 200)
        assert ok(client.get("/v1/models"))["data"]
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def test_a_broken_adapter_fails_its_request_alone(tmp_path, adapter_folders):
    model = write_model(tmp_path / "model")
    folder = tmp_path / "adapters"
    broken = folder / "broken"
    broken.mkdir(parents=True)
    (broken / "adapter_config.json").write_bytes((adapter_folders["pirate"] / "adapter_config.json").read_bytes())
    (broken / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with serving(model, adapter_dir=folder) as live:
        error = assert_canonical_error(live.post("/v1/completions", {"model": "broken", "prompt": "a"}), 400)
        assert error["code"] == "adapter_invalid"
        body = {"inputs": "a", "parameters": {"adapter_id": "broken"}}
        assert_canonical_error(live.post("/generate", body), 424)
        assert_canonical_error(live.post("/generate_stream", body), 424)
        assert live.native()["generated_text"] is not None
        assert [m["id"] for m in ok(live.client.get("/v1/models"))["data"]][1:] == ["broken"]


def test_sampling_defaults_of_the_model_by_option_only(tmp_path):

    model = write_model(tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"top_k": 1, "eos_token_id": 1}))
    body = {"prompt": "Hello", "max_tokens": 12, "seed": None}

    def answers(live, **more):
        return {live.completion(**{**body, "temperature": None, **more})["choices"][0]["text"] for _ in range(5)}

    with serving(model, backend="auto", generation_defaults=True) as live:
        assert len(answers(live)) == 1
        assert len(answers(live, top_k=0)) > 1
    with serving(model, backend="auto") as live:
        assert len(answers(live)) > 1


def test_an_engine_that_is_given_up_ends_the_server_with_the_reason(model_folder):
    options = {"model": str(model_folder), "port": 0, "transport": "process", "memory": "1GiB", "threads": 1}
    resolved = load_config({**options, "max_restarts": 0, "offline": True}, env={})
    listening = bind(resolved.server)
    server = made_server(resolved, listening)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60) as client:
            while health_of(client) != 200:
                assert thread.is_alive()
                time.sleep(0.02)
        os.kill(server.loading.app.service._client.pid, signal.SIGKILL)
        thread.join(60)
        assert not thread.is_alive()
    finally:
        server.should_exit = True
        thread.join(60)
    assert isinstance(server.loading.error, EngineDied)
    assert "not restarted" in server.loading.error.message
    assert "SIGKILL" in server.loading.error.message


def test_after_a_signal_the_port_stays_open_for_the_drain_delay_and_says_503(model_folder):
    with serving(model_folder, drain_delay=2.0) as live:
        live.server.handle_exit(signal.SIGTERM, None)
        seen = set()
        body = {"prompt": "a", "max_tokens": 1}

        def closed():
            try:  # a connection of its own each time, as a balancer's probe and its clients have
                seen.add(("health", httpx.get(f"{live.url}/health", timeout=60).status_code))
                response = httpx.post(f"{live.url}/v1/completions", json=body, timeout=60)
            except httpx.TransportError:
                return True
            if response.status_code == 503:
                assert response.json()["error"]["code"] == "shutting_down"
                assert int(response.headers["retry-after"]) >= 1
            seen.add(("new", response.status_code))
            return False

        until(closed)
    assert {("health", 503), ("new", 503)} <= seen


def test_a_server_that_ends_by_itself_takes_the_first_signal_as_the_first(model_folder):
    resolved = load_config({"model": str(model_folder), "port": 0, "transport": "inline"}, env={})
    with bind(resolved.server) as listening:
        server = made_server(resolved, listening)
        server.should_exit = True  # as when the engine is given up
        server.handle_exit(signal.SIGTERM, None)  # a second one would end this process


def test_the_metrics_of_a_dead_engine_say_so_and_leave_its_numbers_out(model_folder):
    with serving(model_folder, transport="process", heartbeat_timeout_s=60.0, hang_timeout_s=600.0) as live:
        assert "truffula_engine_up 1.0" in live.client.get("/metrics").text
        engine = live.service._client
        with watched(engine, heartbeat_timeout_s=1.0):
            with frozen(engine.pid):
                until(lambda: health_of(live.client) != 200)
                silent = live.client.get("/metrics").text
            until(lambda: health_of(live.client) == 200)
        assert "truffula_engine_up 0.0" in silent
        assert "truffula_engine_steps_total" not in silent
        again = live.client.get("/metrics").text
        assert "truffula_engine_up 1.0" in again
        assert "truffula_engine_steps_total" in again


def test_the_start_log_says_why_a_dtype_was_chosen(model_folder, caplog):
    caplog.set_level("INFO", "truffula.server.serve")
    with serving(model_folder, dtype="float32"):
        until(lambda: "compute in float32 (asked for)" in caplog.text)


def test_the_start_log_warns_of_a_folder_that_holds_no_adapters(model_folder, adapter_folders, caplog):
    with serving(model_folder, adapter_dir=adapter_folders["pirate"]):
        until(lambda: "is an adapter itself" in caplog.text)


def test_the_engines_process_logs_as_the_server_does(model_folder, adapter_folders, capfd):
    with serving(
        model_folder,
        transport="process",
        log_format="json",
        log_level="info",
        adapters={"pirate": str(adapter_folders["pirate"])},
    ) as live:
        live.completion(model="pirate", prompt="a", max_tokens=1)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    said = {(line["logger"], line["level"]): line["message"] for line in lines}
    assert any("pirate" in text for (name, _), text in said.items() if name.startswith("truffula.lora."))
    assert ("truffula.engine.build", "info") in said


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="reads /proc, as Linux has it")
def test_the_engine_may_open_as_many_files_as_the_system_allows(model_folder):
    """Each adapter in memory is a mapped file."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    port = free_port()
    command = [sys.executable, "-m", "truffula", "serve", str(model_folder), "--port", str(port), "--memory", "1GiB"]
    few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=few) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        try:
            until(lambda: answers(client))
            engine = descendants(server.pid)[-1]
            (line,) = (x for x in Path(f"/proc/{engine}/limits").read_text().splitlines() if x.startswith("Max open"))
            assert line.split()[3] == ("unlimited" if hard == resource.RLIM_INFINITY else str(hard))
        finally:
            server.terminate()


def answers(client: httpx.Client) -> bool:
    try:
        return health_of(client) == 200
    except httpx.TransportError:
        return False
