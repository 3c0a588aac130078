"""Two tenants, each with a source of its own that its token opens: one tries every way to reach the other's adapter."""

from __future__ import annotations

import hashlib
import logging

import pytest
from live_server import MODEL, ok, serving
from source_server import source_server

from truffula.testing.adapters import write_tiny_adapter

PROMPT = list(range(20, 84))  # four blocks
UNKNOWN = "There is no model or adapter '{}'; GET /v1/models lists them."


@pytest.fixture(scope="module")
def source():
    with source_server() as made:
        yield made


@pytest.fixture(scope="module")
def live(model_folder, source, tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for seed, tenant in enumerate("ab", start=1):
        made = write_tiny_adapter(root / tenant, model_folder, rank=4, alpha=32, seed=seed)
        source.put(f"{tenant}/one", made)
        source.put(f"{tenant}/two", made)  # equal bytes under another name
        source.tokens[tenant] = f"token-{tenant}"
    options = {"allow_sources": (f"{source.url}/*",), "allow_client_credentials": True, "adapter_failure_ttl": "0.001"}
    options["vllm_metrics"] = True
    with serving(model_folder, adapter_cache_dir=str(root / "cache"), **options) as found:
        yield found


def asked(live, name, token=None, **extra):
    body = {"model": name, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "return_token_ids": True, **extra}
    return live.post("/v1/completions", body | ({} if token is None else {"api_token": token}))


def told(response, name):
    """The refusal, without the name and the request's own id."""
    assert response.status_code == 404, response.text
    error = response.json()["error"]
    assert error["message"] == UNKNOWN.format(name if len(name) <= 80 else name[:77] + "...")
    headers = {
        key: value.replace(name, "X") for key, value in response.headers.items() if key not in ("date", "x-request-id")
    }
    return {**error, "message": ""}, {key: value for key, value in headers.items() if key != "content-length"}


def test_each_right_opens_its_own(live, source):
    answers = {tenant: ok(asked(live, f"{source.url}/{tenant}/one", f"token-{tenant}")) for tenant in "ab"}
    base = ok(asked(live, MODEL))
    texts = [one["choices"][0]["token_ids"] for one in (*answers.values(), base)]
    assert texts[0] != texts[1] and texts[0] != texts[2]


def test_the_token_is_used_on_the_native_route_too_and_only_then_not_listed_as_ignored(live, source):
    url = f"{source.url}/a/one"
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 2, "adapter_id": url, "api_token": "token-a"}}
    response = live.post("/generate", body)
    ok(response)
    assert "api_token" not in response.headers.get("x-truffula-ignored", "")
    del body["parameters"]["adapter_id"]
    assert "api_token" in live.post("/generate", body).headers["x-truffula-ignored"]


def test_no_name_reaches_anothers_adapter(live, source):
    """By URL in every spelling, by the base's prefix, by what identifies it inside, by another kind of source."""
    theirs = f"{source.url}/a/one"
    ok(asked(live, theirs, "token-a"))  # it is in memory and in the disk cache
    (states,) = [ok(live.client.get("/v1/adapters"))["data"]]
    assert theirs not in str(states) and "token" not in str(states)
    files = [body for path, body in source.files.items() if path.startswith("/a/one/")]
    inside = [hashlib.sha256(body).hexdigest() for body in files]
    names = [
        *(theirs, f"{theirs}/", f"{source.url}/b/../a/one", f"{source.url}/b/%2e%2e/a/one", f"{source.url}//a/one"),
        *(f"{theirs}?x=1", f"{theirs}#x", theirs.replace("http", "HTTP"), theirs.replace("127.0.0.1", "127.1")),
        *(theirs.replace("://", "://token-a@"), f"{MODEL}:{theirs}", "a/one", "one", "/a/one", *inside),
    ]
    for name in names:
        for token in (None, "token-b", "Token-a", "token-ab"):
            response = asked(live, name, token)
            assert response.status_code == 404, (name, token, response.text)
    for token in ("token-a ", "token-a\x00", "tökén", "x" * 5000):
        response = asked(live, theirs, token)
        assert response.status_code == 400 and "visible ASCII" in response.text and token not in response.text
    for kind in ("http", "hub", "local", "s3"):
        assert asked(live, theirs, "token-b", adapter_source=kind).status_code == 404
    for header in ({"authorization": "Bearer token-a"}, {"x-api-key": "token-a"}, {"cookie": "api_token=token-a"}):
        assert live.post("/v1/completions", {"model": theirs, "prompt": PROMPT}, headers=header).status_code == 404


def test_absent_and_forbidden_cannot_be_told_apart(live, source):
    """Not by status, text or headers, nor by what is asked of the source, which is what takes the time."""
    ok(asked(live, f"{source.url}/a/one", "token-a"))
    seen = []
    for name in ("a/one", "a/two", "a/none", "b/none", "c/one"):
        source.asked.clear()
        refusal = told(asked(live, f"{source.url}/{name}", "token-b"), f"{source.url}/{name}")
        paths = [line.replace(name, "X") for line in source.asked]
        seen.append((refusal, paths))
    assert all(one == seen[0] for one in seen), seen


def test_the_prefix_cache_says_nothing_of_another_right(live, source):
    def cached(name, token):
        usage = ok(asked(live, f"{source.url}/{name}", token))["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    cached("a/one", "token-a")
    assert cached("a/one", "token-a") > 0
    source.tokens["b"] = "token-b"
    for path in [path for path in source.files if path.startswith("/b/")]:
        source.files[path.replace("/b/", "/c/")] = source.files[path.replace("/b/", "/a/")]  # equal bytes, public
    assert cached("c/one", "token-c") == 0
    assert cached("c/one", "token-c") > 0


def test_no_listing_or_metric_names_what_a_token_opened(live, source):
    """Nor what was merged of it, alone or beside what everyone may use."""
    source.files |= {path.replace("/a/", "/open/"): body for path, body in source.files.items() if "/a/" in path}
    mine, free = f"{source.url}/a/one", f"{source.url}/open/one"
    for mix in ("linear", "magnitude_prune"):
        merged = {"ids": [mine, free], "weights": [0.5, 0.5], "merge_strategy": mix, "density": 0.5}
        response = asked(live, MODEL, "token-a", merged_adapters=merged)
        ok(response)
        assert "a/one" in response.headers["x-truffula-adapter"]
    ok(asked(live, mine, "token-a"))
    ok(asked(live, free))
    for path in ("/v1/lora_adapters", "/v1/adapters", "/v1/models", "/metrics", "/metrics?format=json"):
        assert "/a/one" not in live.client.get(path).text, path
    assert free in live.client.get("/v1/lora_adapters").text and free in live.client.get("/metrics").text
    assert ok(live.client.get(f"/v1/adapters/{free}"))["status"] == "resident", "of equal bytes"
    got = [live.client.get(f"/v1/adapters/{source.url}/{name}/one") for name in ("a", "x")]
    assert [response.status_code for response in got] == [404, 404]
    assert got[0].text.replace("/a/one", "/x/one") == got[1].text
    lines = live.client.get("/metrics").text.splitlines()
    counted = [line for line in lines if line.startswith("truffula_completion_tokens_total{")]
    assert any('adapter="__other__"' in line for line in counted)


def test_nothing_of_a_token_is_logged(live, source, caplog):
    with caplog.at_level(logging.DEBUG):
        asked(live, f"{source.url}/a/one", "token-a")
        asked(live, f"{source.url}/a/one", "t0ken-wrong")
        asked(live, f"{source.url}/a/one", {"not": "t0ken-text"})
    metrics = live.client.get("/metrics").text
    for secret in ("token-a", "t0ken"):
        assert secret not in caplog.text and secret not in metrics


def test_a_token_has_no_effect_on_what_an_alias_of_the_operators_names(model_folder, source, tmp_path):
    """The operator named the source, so it is read by the operator's right, whatever the client sends."""
    source.files |= {path.replace("/a/", "/free/"): body for path, body in source.files.items() if "/a/" in path}
    mine, free = f"{source.url}/a/one", f"{source.url}/free/one"
    options = {"allow_sources": (f"{source.url}/*",), "allow_client_credentials": True, "adapter_admin": True}
    with serving(model_folder, adapter_cache_dir=str(tmp_path), **options) as live:
        for name, target in (("closed", mine), ("open", free)):
            ok(live.client.put(f"/v1/adapter_aliases/{name}", json={"target": target}))
        assert asked(live, "closed", "token-a").status_code == 404 and ok(asked(live, mine, "token-a"))
        assert asked(live, "closed", "token-a").status_code == 404
        response = asked(live, "open", "token-a")
        assert ok(response) and response.headers["x-truffula-ignored"] == "api_token"
        assert "x-truffula-ignored" not in asked(live, mine, "token-a").headers
