"""API keys: exact, in every place but the probes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from live_server import MODEL, assert_canonical_error, ok, serving, until

from truffula.config import ServerConfig
from truffula.errors import ConfigError
from truffula.server.auth import bearer, is_open

KEY = "sk-Truffula-1"


@pytest.fixture(scope="module")
def guarded(model_folder, adapter_folders):
    options = {
        "api_keys": (KEY, "second-ключ"),
        "adapter_admin": True,
        "max_body": 4096,
        "max_waiting": 1,
        "max_running": 1,
    }
    with serving(model_folder, **options) as found:
        yield found


def with_key(key):
    return {"authorization": f"Bearer {key}".encode()}


@pytest.mark.parametrize("path", ["/v1/models", "/info", "/v1", "/v1/nowhere"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        with_key("wrong"),
        with_key(KEY.lower()),
        with_key(KEY + "x"),
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
    ],
    ids=["none", "wrong", "lower case", "longer", "bare", "basic"],
)
def test_no_or_wrong_key(guarded, path, headers):
    response = guarded.client.get(path, headers=headers)
    assert_canonical_error(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/", "/generate", "/generate_stream", "/v1/completions", "/tokenize", "/v1/load_lora_adapter"]
)
def test_posts_need_a_key(guarded, path):
    assert_canonical_error(guarded.client.post(path, json={"inputs": "a"}), 401)


def test_the_right_keys(guarded):
    for key in (KEY, "second-ключ"):
        assert ok(guarded.client.get("/v1/models", headers=with_key(key)))
    assert ok(guarded.client.get("/v1/models", headers={"authorization": f"bearer {KEY}"}))


def test_probes_stay_open(guarded):
    for path in ("/health", "/ping", "/metrics", "/", "/v1/health", "/version", "/docs", "/openapi.json"):
        assert guarded.client.get(path).status_code == 200
    assert guarded.client.get("/startup").status_code in (200, 503)


def test_preflights_carry_no_key(guarded):
    headers = {
        "origin": "https://x.org",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    assert guarded.client.options("/v1/completions", headers=headers).status_code == 200


def test_the_body_limit_is_the_operators(guarded):
    big = {"inputs": "x" * 5000}
    assert_canonical_error(guarded.client.post("/generate", json=big, headers=with_key(KEY)), 413, "4096")


def test_nothing_is_read_for_a_stranger(guarded):
    assert_canonical_error(guarded.client.post("/generate", content=b"x" * 5000), 401)


def test_a_full_queue(guarded):
    """One sequence runs and one waits; a third is refused immediately, with when to come back."""
    body = {"prompt": "Hello", "max_tokens": 1}
    ask = lambda: guarded.client.post("/v1/completions", json=body, headers=with_key(KEY))
    held = threading.Event()
    guarded.service._client._post(lambda: held.wait(60))  # the engine stands between two steps
    with ThreadPoolExecutor(2) as pool:
        accepted = [pool.submit(ask) for _ in range(2)]
        try:
            until(lambda: guarded.service.active == 2)
            assert assert_canonical_error(ask(), 429)["code"] == "overloaded"
        finally:
            held.set()
        for answer in accepted:
            ok(answer.result(60))


def test_more_choices_than_places_are_served_one_after_another(guarded):
    body = {"prompt": "Hello", "n": 6, "max_tokens": 4, "temperature": 0}
    choices = ok(guarded.client.post("/v1/completions", json=body, headers=with_key(KEY)))["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert len({choice["text"] for choice in choices}) == 1


def test_adapters_by_an_administrator(guarded, adapter_folders):
    def call(path, **body):
        return guarded.client.post(path, json=body, headers=with_key(KEY))

    def names():
        return [m["id"] for m in ok(guarded.client.get("/v1/models", headers=with_key(KEY)))["data"][1:]]

    path = str(adapter_folders["pirate"])
    for name in ("tgi", "dummy", MODEL, f"{MODEL}:x"):
        assert_canonical_error(call("/v1/load_lora_adapter", lora_name=name, lora_path=path), 400, "base model")
    assert_canonical_error(call("/v1/load_lora_adapter", lora_name="new", lora_path="/nowhere"), 404)
    assert_canonical_error(call("/v1/load_lora_adapter", lora_name="new", lora_path="/" + "a" * 300), 404)
    assert_canonical_error(call("/v1/load_lora_adapter", lora_name="new", lora_path="/a\0b"), 404)
    assert_canonical_error(call("/v1/load_lora_adapter", lora_name="new"), 400)
    assert "Success" in ok(call("/v1/load_lora_adapter", lora_name="new", lora_path=path))
    assert names() == ["new"]
    assert_canonical_error(call("/v1/load_lora_adapter", lora_name="new", lora_path=path), 400)
    assert "Success" in ok(call("/v1/load_lora_adapter", lora_name="new", lora_path=path, load_inplace=True))
    assert ok(call("/v1/completions", model="new", prompt="Hello", max_tokens=2))["model"] == "new"
    assert "Success" in ok(call("/v1/unload_lora_adapter", lora_name="new"))
    assert names() == []
    assert_canonical_error(call("/v1/unload_lora_adapter", lora_name="new"), 404)
    assert_canonical_error(call("/v1/completions", model="new", prompt="Hello"), 404)


PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


@pytest.mark.parametrize("path", ADMIN)
def test_no_web_page_administers(guarded, path):
    origin = {"origin": "https://evil.org"}
    preflight = guarded.client.options(path, headers=origin | PREFLIGHT)
    assert preflight.status_code == 401
    answer = guarded.client.post(path, json={}, headers=origin | with_key(KEY))
    assert answer.status_code == 400
    for response in (preflight, answer):
        assert not any(name.startswith("access-control-") for name in response.headers)


def test_an_administrator_without_keys_is_no_web_page(model_folder, adapter_folders):
    body = {"lora_name": "new", "lora_path": str(adapter_folders["pirate"])}
    options = {"adapter_admin": True, "cors_origins": ("https://my.site",)}
    with serving(model_folder, **options) as live:
        for origin in ("https://evil.org", "https://my.site", "null", live.url):
            assert_canonical_error(live.post(ADMIN[0], body, headers={"origin": origin}), 403)
        assert ok(live.client.get("/v1/models"))["data"][1:] == []
        assert "Success" in ok(live.post(ADMIN[0], body))
        mine = live.client.options("/v1/completions", headers={"origin": "https://my.site"} | PREFLIGHT)
        assert (mine.status_code, mine.headers["access-control-allow-origin"]) == (200, "https://my.site")
        others = live.client.get("/v1/models", headers={"origin": "https://evil.org"})
        assert_canonical_error(others, 403)


def test_without_keys_only_pages_of_this_machine_may_call(live):
    body = {"prompt": "Hello", "max_tokens": 1}
    for origin in ("https://x.org", "null", "http://localhost.x.org", "http://127.0.0.1.x.org"):
        for media in ("application/json", ""):  # a page may send the second kind without asking first
            sent = live.post("/v1/completions", body, headers={"origin": origin, "content-type": media})
            assert_canonical_error(sent, 403, "--cors-origin")
        assert_canonical_error(live.client.get("/metrics", headers={"origin": origin}), 403)
    for origin in ("http://localhost:3000", "https://127.0.0.1", "http://[::1]:8080"):
        answer = live.post("/v1/completions", body, headers={"origin": origin})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
    assert live.post("/v1/completions", body, headers={"origin": live.url}).status_code == 200


def test_without_keys_a_name_that_points_here_is_refused(live, model_folder):
    body = {"prompt": "Hello", "max_tokens": 1}
    for host in ("evil.org", "evil.org:8000", "localhost.evil.org", "127.0.0.1.evil.org"):
        assert_canonical_error(live.post("/v1/completions", body, headers={"host": host}), 403, "--allowed-host")
        assert live.client.get("/health", headers={"host": host}).status_code == 200
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:9", "[::1]:8000", "10.0.0.7", "a.localhost"):
        assert live.post("/v1/completions", body, headers={"host": host}).status_code == 200
    with serving(model_folder, allowed_hosts=("api.my.site",)) as named:
        assert named.post("/v1/completions", body, headers={"host": "api.my.site"}).status_code == 200
        assert_canonical_error(named.post("/v1/completions", body, headers={"host": "evil.org"}), 403)


def test_with_keys_every_page_may_ask_and_none_ends_that(guarded, model_folder):
    response = guarded.client.get("/v1/models", headers={"origin": "https://x.org"} | with_key(KEY))
    assert response.headers["access-control-allow-origin"] == "*"
    metrics = guarded.client.get("/metrics", headers={"origin": "https://x.org"})
    assert not any(name.startswith("access-control-") for name in metrics.headers)
    options = {"cors_origins": "none", "api_keys": (KEY,), "protect_metrics": True}
    with serving(model_folder, **options) as closed:
        response = closed.client.get("/health", headers={"origin": "https://x.org"})
        assert not any(name.startswith("access-control-") for name in response.headers)
        assert_canonical_error(closed.client.get("/metrics"), 401)
        assert closed.client.get("/metrics", headers=with_key(KEY)).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "my.host"])
def test_administration_for_everybody_is_refused(host):
    with pytest.raises(ConfigError, match="adapter_admin"):
        ServerConfig(adapter_admin=True, host=host)
    ServerConfig(adapter_admin=True, host=host, api_keys=("k",))
    for near in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        ServerConfig(adapter_admin=True, host=near)
    with pytest.raises(ConfigError, match="api-key"):
        ServerConfig(protect_metrics=True)


def test_what_is_open_and_what_a_header_holds():
    assert is_open("GET", "/", False) and not is_open("POST", "/", False)
    assert is_open("GET", "/docs", False) and not is_open("GET", "/docs/x", False)
    assert is_open("GET", "/health", False) and not is_open("GET", "/healthz", False)
    assert bearer("Bearer a b ") == "a b"
    assert bearer("Token a") is None


def test_a_rejected_key_is_in_the_log_line(guarded, caplog):
    caplog.set_level("INFO", "truffula.access")
    guarded.client.get("/info", headers=with_key("wrong"))
    until(lambda: "status=401" in caplog.text)
    assert "error=invalid_api_key" in caplog.text
