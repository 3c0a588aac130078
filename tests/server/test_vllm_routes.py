"""vLLM's routes around generation: administration of adapters, pauses, and a verdict on every route that it has."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from live_server import BEGIN, END, MODEL, TEMPLATE, Live, assert_canonical_error, ok, serving, until
from safetensors.numpy import load_file, save_file

from truffula.testing.adapters import write_tiny_adapter
from truffula.types import AdapterCommand, AdapterRef

ROUTES = [
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/v1/chat/completions/batch"),
    ("POST", "/v1/responses"), ("GET", "/v1/responses/resp_1"), ("POST", "/v1/responses/resp_1/cancel"),
    ("POST", "/v1/embeddings"), ("POST", "/v1/audio/transcriptions"), ("POST", "/v1/audio/translations"),
    ("GET", "/v1/realtime"), ("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens"), ("POST", "/v2/embed"),
    ("POST", "/rerank"), ("POST", "/v1/rerank"), ("POST", "/v2/rerank"), ("POST", "/classify"), ("POST", "/score"),
    ("POST", "/v1/score"), ("POST", "/pooling"), ("POST", "/generative_scoring"), ("GET", "/version"), ("GET", "/load"),
    ("GET", "/v1/models"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/ping"), ("POST", "/invocations"),
    ("GET", "/docs"), ("GET", "/openapi.json"), ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/adapters"), ("DELETE", "/adapters/a"), ("POST", "/start_profile"), ("POST", "/stop_profile"),
    ("POST", "/inference/v1/generate"), ("POST", "/abort_requests"), ("POST", "/v1/completions/render"),
    ("POST", "/v1/chat/completions/render"), ("POST", "/v1/completions/derender"),
    ("POST", "/v1/chat/completions/derender"), ("POST", "/tokenize"), ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"), ("POST", "/scale_elastic_ep"), ("POST", "/is_scaling_elastic_ep"),
    ("POST", "/reset_prefix_cache"), ("POST", "/reset_mm_cache"), ("POST", "/reset_encoder_cache"), ("POST", "/pause"),
    ("POST", "/resume"), ("GET", "/is_paused"), ("POST", "/init_weight_transfer_engine"),
    ("POST", "/start_weight_update"), ("POST", "/start_draft_weight_update"), ("POST", "/update_weights"),
    ("POST", "/finish_weight_update"), ("POST", "/update_weight_version"), ("GET", "/weight_info"),
    ("POST", "/weight_checker"), ("GET", "/get_world_size"), ("POST", "/collective_rpc"), ("GET", "/server_info"),
    ("POST", "/sleep"), ("POST", "/wake_up"), ("GET", "/is_sleeping"),
]  # fmt: skip
LONG = {"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "temperature": 0, "return_token_ids": True}


@pytest.fixture(scope="module")
def admin(long_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("offered")
    write_tiny_adapter(folder / "offered", long_model_folder, rank=2, alpha=16, seed=8)
    with serving(long_model_folder, adapter_admin=True, adapter_dir=folder, backend="auto") as live:
        yield live


def policy(model: Path, folder: Path, seed: int) -> str:
    """A folder with one version of an adapter, replaced as TRL does it: written elsewhere, then renamed."""
    made = write_tiny_adapter(folder.with_name(f".{folder.name}.tmp"), model, rank=4, alpha=64, seed=seed)
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)
    return str(folder)


def load(live: Live, name: str, path: str, **more) -> None:
    said = ok(live.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, **more}))
    assert said == f"Success: LoRA adapter '{name}' added successfully."


def ids(live: Live, model: str, **body) -> list[int]:
    return live.completion(**{**LONG, "model": model, **body})["choices"][0]["token_ids"]


class Stream:
    """A running stream, read in a thread; ``ids`` grows."""

    def __init__(self, url: str, body: dict) -> None:
        self.ids: list[int] = []
        self.error: dict | None = None
        self._thread = threading.Thread(target=self._read, args=(url, {**LONG, "stream": True, **body}))
        self._thread.start()

    def _read(self, url: str, body: dict) -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    self.error = event.get("error")
                    for choice in event.get("choices", ()):
                        self.ids += choice["token_ids"]

    def join(self) -> list[int]:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.ids


@contextmanager
def paused(live: Live, mode: str) -> Iterator[None]:
    assert ok(live.client.post("/pause", params={"mode": mode})) == {"status": "paused"}
    assert ok(live.client.get("/is_paused")) == {"is_paused": True}
    try:
        yield
    finally:
        assert ok(live.client.post("/resume")) == {"status": "resumed"}
    assert ok(live.client.get("/is_paused")) == {"is_paused": False}


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=lambda value: value.strip("/"))
def test_every_route_of_vllm_is_served_or_refused_with_what_to_use(admin, live, method, path):
    for server in (admin, live):
        response = server.client.request(method, path, json={} if method == "POST" else None)
        text = response.text
        assert response.status_code != 405 and response.status_code < 500, text
        if response.status_code == 404:
            assert ("is not served here" in text and "; " in text) or "'resp_1' not found" in text, text
        elif response.status_code >= 400 and "not served" not in text:
            assert method == "POST" and response.status_code in (400, 422), text  # an empty body
        if path in ("/pause",):
            server.client.post("/resume")


def test_a_kept_request_goes_on_with_the_same_tokens(admin):
    expected = ids(admin, MODEL)
    stream = Stream(admin.url, {})
    until(lambda: len(stream.ids) > 10)
    with paused(admin, "keep"), ThreadPoolExecutor(1) as pool:
        later = pool.submit(ids, admin, MODEL)
        until(lambda: ok(admin.client.get("/load"))["server_load"] == 2)
        steps = admin.service.known_stats().steps
        held = len(stream.ids)
        assert admin.client.get("/health").status_code == 200
        assert ok(admin.client.get("/v1/models"))["object"] == "list"
        assert (admin.service.known_stats().steps, later.done()) == (steps, False)
        assert len(stream.ids) - held <= 1  # the last token computed may have been on its way
        ok(admin.client.post("/resume"))
        assert later.result(60) == expected
    assert stream.join() == expected


def test_running_streams_keep_the_version_that_they_began_with(admin, long_model_folder, tmp_path):
    """One name, three versions; each stream has the tokens of one version from its first to its last."""
    alone = []
    for version in range(3):
        load(admin, f"alone-{version}", policy(long_model_folder, tmp_path / f"alone-{version}", version))
        alone.append(ids(admin, f"alone-{version}"))
    assert len({tuple(one) for one in alone}) == 3
    load(admin, "policy", policy(long_model_folder, tmp_path / "policy", 0))
    streams = []
    for version in range(3):
        if version:
            with paused(admin, "keep"):
                again = {"load_inplace": True}
                load(admin, "policy", policy(long_model_folder, tmp_path / "policy", version), **again)
        streams.append(Stream(admin.url, {"model": "policy"}))
        until(lambda: len(streams[-1].ids) > 10)
    assert [stream.join() for stream in streams] == alone
    assert ids(admin, "policy") == alone[2]
    # Another folder under the same name, without a pause.
    load(admin, "policy", str(tmp_path / "alone-1"), load_inplace=True)
    assert ids(admin, "policy") == alone[1]
    for name in ("policy", "alone-0", "alone-1", "alone-2"):
        ok(admin.client.delete(f"/v1/models/{name}"))


def test_a_pause_that_waits_and_one_that_aborts(admin):
    expected = ids(admin, MODEL)
    stream = Stream(admin.url, {})
    until(lambda: len(stream.ids) > 10)
    with paused(admin, "wait"):
        assert stream.join() == expected
    stream = Stream(admin.url, {})
    until(lambda: len(stream.ids) > 10)
    with paused(admin, "abort"):
        kept = stream.join()
        assert kept == expected[: len(kept)] and stream.error["code"] == "aborted"
        assert ok(admin.client.get("/load"))["server_load"] == 0
    body = {"mode": "keep", "wait_for_inflight_requests": "true"}
    ok(admin.client.post("/pause", params=body))
    ok(admin.client.post("/resume"))
    assert ids(admin, MODEL) == expected


def test_a_reset_cache_has_no_hits(admin):
    prompt = {"prompt": list(range(5, 105)), "max_tokens": 1}
    cached = lambda: admin.completion(**prompt)["usage"]["prompt_tokens_details"]["cached_tokens"]
    cached()
    assert cached() > 0
    assert admin.client.post("/reset_prefix_cache").status_code == 200
    assert cached() == 0
    with paused(admin, "wait"):
        pass
    assert cached() == 0
    ok(admin.client.post("/pause", params={"mode": "abort", "clear_cache": "false"}))
    ok(admin.client.post("/resume"))
    assert cached() > 0


@pytest.mark.parametrize(
    ("path", "params", "words"),
    [
        ("/pause", {"mode": "freeze"}, "mode: should be one of abort, wait, keep, got 'freeze'."),
        ("/pause", {"clear_cache": "maybe"}, "clear_cache: should be true or false"),
        ("/reset_prefix_cache", {"reset_running_requests": "true"}, "reset_running_requests: not supported"),
        ("/server_info", {"config_format": "yaml"}, "config_format: should be text or json"),
    ],
)
def test_a_wrong_parameter_is_named(admin, path, params, words):
    method = "GET" if path == "/server_info" else "POST"
    assert_canonical_error(admin.client.request(method, path, params=params), 422, words)
    assert ok(admin.client.get("/is_paused")) == {"is_paused": False}


def test_models_and_deletion(admin, long_model_folder, tmp_path):
    load(admin, "org/own/name", policy(long_model_folder, tmp_path / "own", 1))
    rows = {row["id"]: row for row in ok(admin.client.get("/v1/models"))["data"]}
    assert [rows["org/own/name"]["parent"], rows[MODEL]["parent"]] == [MODEL, None]
    for row in rows.values():
        assert row["max_model_len"] == 4096
        (permission,) = row["permission"]
        assert (permission["object"], permission["allow_sampling"]) == ("model_permission", True)
    assert ok(admin.client.get("/v1/models/org/own/name")) == rows["org/own/name"]
    gone = {"id": "org/own/name", "object": "model", "deleted": True}
    assert ok(admin.client.delete("/v1/models/org/own/name")) == gone
    assert_canonical_error(admin.client.get("/v1/models/org/own/name"), 404)
    assert_canonical_error(admin.client.delete("/v1/models/org/own/name"), 404, "no adapter 'org/own/name' to delete")
    assert_canonical_error(admin.client.delete(f"/v1/models/{MODEL}"), 404, "to delete")
    assert_canonical_error(admin.client.delete("/v1/models/offered"), 400, "--adapter-dir offers it")


def test_what_is_not_in_memory_can_be_unloaded_if_it_was_added(admin, long_model_folder, tmp_path):
    response = admin.post("/v1/unload_lora_adapter", {"lora_name": "offered"})
    assert_canonical_error(response, 404, "'offered' is not loaded")
    path = policy(long_model_folder, tmp_path / "own", 1)
    load(admin, "own", path)
    evicted = AdapterCommand(action="unload", ref=AdapterRef(name="own", locator=path))
    admin.service._client.adapters(evicted)
    assert "removed" in ok(admin.post("/v1/unload_lora_adapter", {"lora_name": "own"}))
    assert_canonical_error(admin.client.get("/v1/models/own"), 404)


def test_a_trainer_may_load_an_adapter_before_its_first_step(admin, long_model_folder, tmp_path):
    """Nowhere else: an adapter that changes nothing is a mistake of the one who offers it."""
    zero = write_tiny_adapter(tmp_path / "zero", long_model_folder)
    tensors = load_file(zero / "adapter_model.safetensors")
    save_file({k: np.zeros_like(v) for k, v in tensors.items()}, zero / "adapter_model.safetensors")
    load(admin, "first", str(zero))
    assert ids(admin, "first") == ids(admin, MODEL)
    load(admin, "first", policy(long_model_folder, tmp_path / "second", 1), load_inplace=True)
    assert ids(admin, "first") != ids(admin, MODEL)
    ok(admin.client.delete("/v1/models/first"))
    offered = admin.server.loading.app.asgi.state.truffula.directory._dir
    shutil.copytree(zero, offered / "zero")
    response = admin.post("/v1/completions", {"model": "zero", "prompt": "a", "max_tokens": 1})
    assert_canonical_error(response, 400, "The adapter changes nothing")
    shutil.rmtree(offered / "zero")


def test_sglangs_forms(admin, long_model_folder, tmp_path):
    path = policy(long_model_folder, tmp_path / "own", 1)
    body = {"lora_name": "own", "lora_path": path, "pinned": True}
    answer = ok(admin.post("/load_lora_adapter", body))
    assert (answer["success"], answer["error_message"]) == (True, "")
    assert answer["loaded_adapters"]["own"] == path
    again = admin.post("/load_lora_adapter", body)
    assert (again.status_code, again.json()["success"]) == (400, False)
    assert "already loaded" in again.json()["error_message"] and "own" in again.json()["loaded_adapters"]
    answer = ok(admin.post("/unload_lora_adapter", {"lora_name": "own"}))
    assert answer["success"] and "own" not in answer["loaded_adapters"]
    assert admin.post("/unload_lora_adapter", {"lora_name": "own"}).json()["success"] is False


def test_tokenizer_info_has_what_evaluations_read(admin):
    info = ok(admin.client.get("/tokenizer_info"))
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == (BEGIN, END, None)
    assert info["chat_template"] == TEMPLATE
    assert ok(admin.post("/tokenize", {"prompt": info["eos_token"], "add_special_tokens": False}))["tokens"] == [1]


def test_server_info_has_what_trainers_read(admin):
    config = ok(admin.client.get("/server_info", params={"config_format": "json"}))["vllm_config"]
    assert config["model_config"]["dtype"] == "torch.float32"
    assert config["lora_config"]["max_loras"] >= 8 and config["lora_config"]["max_lora_rank"] >= 256
    assert config["parallel_config"]["data_parallel_size"] == 1
    assert isinstance(ok(admin.client.get("/server_info"))["vllm_config"], str)


def test_administration_is_off_unless_allowed(live):
    for path in ("/pause", "/resume", "/reset_prefix_cache", "/v1/load_lora_adapter", "/unload_lora_adapter"):
        assert_canonical_error(live.post(path, {}), 404, "start the server with --adapter-admin")
    assert_canonical_error(live.client.delete("/v1/models/pirate"), 405)
