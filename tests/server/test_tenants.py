"""Two tenants with a private adapter each: every way that reaches for the other's is answered as for one that does not
exist."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import MODEL, Live, assert_canonical_error, events, ok, serving, until, write_model

from truffula.config import ServerConfig
from truffula.errors import ConfigError
from truffula.server.keys import Access, KeyRing, named_tenant, read_keys
from truffula.testing.adapters import write_tiny_adapter

KEYS = f"""
[[keys]]
id = "acme-1"
key = "sk-acme-1"
tenant = "acme"
adapters = ["acme/*", "shared", "https://127.0.0.1:9/acme/*"]
weight = 2.5

[[keys]]
id = "acme-2"
key_sha256 = "{sha256(b"sk-acme-2").hexdigest()}"
tenant = "acme"
adapters = ["acme/*"]

[[keys]]
id = "globex"
key = "sk-globex"
adapters = ["globex/*", "shared"]

[[keys]]
id = "no-base"
key = "sk-no-base"
adapters = ["shared"]
base = false

[[keys]]
id = "ops"
key = "sk-ops"
admin = true
"""
ACME, ACME_2, GLOBEX, NO_BASE, OPS = (
    {"authorization": f"Bearer sk-{name}"} for name in ("acme-1", "acme-2", "globex", "no-base", "ops")
)
SAME = {**GLOBEX, "x-request-id": "same"}
TALK = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 4},
    "/v1/chat/completions": {"messages": TALK, "max_tokens": 4},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 4},
    "/v1/messages": {"messages": TALK, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": TALK},
    "/v1/decisions": {"input": "Blue.", "questions": [{"type": "predicate", "instructions": "A colour."}]},
    "/v1/chat/completions/render": {"messages": TALK},
    "/v1/completions/render": {"prompt": "Hello"},
    "/generate": {"inputs": "Hello", "parameters": {"max_new_tokens": 4}},
    "/generate_stream": {"inputs": "Hello", "parameters": {"max_new_tokens": 4}},
    "/": {"inputs": "Hello", "stream": True, "parameters": {"max_new_tokens": 4}},
    "/invocations": {"inputs": "Hello", "parameters": {"max_new_tokens": 4}},
    "/tokenize": {"prompt": "Hello"},
    "/chat_tokenize": {"messages": TALK},
    "/detokenize": {"tokens": [5, 6]},
}
# What exists of acme's, and a name of the same length that does not exist.
NAMES = {
    "acme/secret": "acme/sxcret",
    "acme/versioned": "acme/vxrsioned",
    "acme/versioned@1": "acme/vxrsioned@1",
    "acme/versioned@latest": "acme/vxrsioned@latest",
    "acme/prod": "acme/pxod",
    f"{MODEL}:acme/secret": f"{MODEL}:acme/sxcret",
    "globex/leak": "globex/lxak",  # an alias that the operator made of acme's
    "acme-local": "acme-lxcal",  # of the adapter folder
    "globex/../acme/x": "globex/../acme/q",  # a path that begins as globex's
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("tenants")
    model = write_model(folder / "llama", max_position_embeddings=512)
    made = [write_tiny_adapter(folder / f"a{n}", model, rank=2, alpha=64, seed=n) for n in range(4)]
    for place in ("roots/acme/x", "roots/globex/y", "dir/acme-local"):
        shutil.copytree(made[0], folder / place)
    (folder / "keys.toml").write_text(KEYS)
    named = {"acme/secret": str(made[0]), "globex/secret": str(made[1]), "shared": str(made[2])}
    options = {
        "api_keys_file": folder / "keys.toml", "adapters": named, "adapter_admin": True, "backend": "auto",
        "adapter_dir": folder / "dir", "allow_local": (folder / "roots",), "adapter_source": "local",
        "allow_sources": ("https://127.0.0.1:9/*",),
    }  # fmt: skip
    with serving(model, **options) as found:
        rows = [{"name": "acme/versioned", "version": v, "source": str(made[3])} for v in ("1", "2")]
        ok(found.post("/v1/adapters", {"adapters": rows}, headers=OPS))
        for alias in ("acme/prod", "globex/leak"):
            body = {"target": "acme/secret"}
            ok(found.client.put(f"/v1/adapter_aliases/{alias}", json=body, headers=OPS))
        for name in ("acme/secret", "acme/versioned", "acme/prod"):  # resident, so that nothing is slow to load
            ok(found.post("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1}, headers=ACME))
        yield found


def ask(live: Live, path: str, name: str, headers: dict[str, str], field: str = "") -> httpx.Response:
    body = json.loads(json.dumps(BODIES[path]))
    if field:
        body[field] = name
    elif "parameters" in body:
        body["parameters"]["adapter_id"] = name
    else:
        body["model"] = name
    return live.client.post(path, json=body, headers={**headers, "x-request-id": "same"})


def alike(one: httpx.Response, other: httpx.Response, names: tuple[str, str]) -> None:
    """The two refusals differ in the name that was sent, and in nothing else."""
    assert one.status_code == other.status_code >= 400
    assert one.text.replace(names[0], names[1]) == other.text
    ignored = {"date", "content-length"}
    kept = [{k: v for k, v in response.headers.items() if k not in ignored} for response in (one, other)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("path", BODIES)
def test_forbidden_and_absent_are_answered_alike(live: Live, path: str) -> None:
    for name, absent in NAMES.items():
        short = (name.removeprefix(f"{MODEL}:"), absent.removeprefix(f"{MODEL}:"))
        if path in ("/", "/generate", "/generate_stream", "/invocations") and name.startswith(MODEL):
            continue
        alike(ask(live, path, name, GLOBEX), ask(live, path, absent, GLOBEX), short)
    for field in ("adapter_id", "lora_path", "adapter_name"):
        if path.startswith("/v1/") and "render" not in path and "count" not in path:
            got = [ask(live, path, name, GLOBEX, field) for name in ("acme/secret", "acme/sxcret")]
            alike(got[0], got[1], ("acme/secret", "acme/sxcret"))


@pytest.mark.parametrize(
    ("pattern", "names", "others"),
    [
        ("support", "support support@7 support@latest", "support@team/x support@team/x@7 support/x"),
        ("s3://b/acme", "s3://b/acme", "s3://b/acme@globex/x s3://b/acme/x"),
        ("s3://b/acme@globex/*", "s3://b/acme@globex/x s3://b/acme@globex/x@7", "s3://b/acme s3://b/acme/x"),
    ],
)
def test_what_follows_an_at_sign_in_a_folders_name_is_no_version(pattern: str, names: str, others: str) -> None:
    access = Access(patterns=(pattern,))
    assert all(map(access.may_use, names.split())) and not any(map(access.may_use, others.split()))


def test_a_source_that_is_sent_apart_is_the_url_that_the_key_may_use(live: Live) -> None:
    """As LoRAX's clients send it. Nothing listens there."""
    for name, headers, status in (("acme/x", ACME, 503), ("globex/x", ACME, 404), ("acme/x", GLOBEX, 404)):
        body = {**BODIES["/v1/completions"], "model": f"127.0.0.1:9/{name}", "adapter_source": "http"}
        assert live.client.post("/v1/completions", json=body, headers=headers).status_code == status


def test_a_composition_reaches_no_other_tenants_adapter(live: Live) -> None:
    def composed(path: str, name: str, headers: dict[str, str]) -> httpx.Response:
        fields: dict[str, Any] = {"lora": [{"name": "shared", "scale": 0.5}, {"name": name, "scale": 0.5}]}
        if path == "/generate":
            fields = {"merged_adapters": {"ids": ["shared", name], "weights": [0.5, 0.5]}}
        return mixed(live, path, fields, headers)

    for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
        assert composed(path, "acme/secret", ACME).status_code == 200
        for name, absent in NAMES.items():
            if not name.startswith(MODEL):
                alike(composed(path, name, GLOBEX), composed(path, absent, GLOBEX), (name, absent))


def test_each_tenant_uses_its_own(live: Live) -> None:
    for name, headers in (
        ("acme/secret", ACME), ("acme/secret", ACME_2), ("acme/prod", ACME), ("acme/versioned@1", ACME_2),
        ("globex/secret", GLOBEX), ("shared", ACME), ("shared", GLOBEX), ("shared", NO_BASE), (MODEL, GLOBEX),
        ("globex/y", GLOBEX), ("acme/x", ACME),
    ):  # fmt: skip
        assert ask(live, "/v1/completions", name, headers).status_code == 200, name
    assert ask(live, "/v1/completions", "shared", ACME_2).status_code == 404


def mixed(live: Live, path: str, fields: dict[str, Any], headers: dict[str, str], **more: Any) -> httpx.Response:
    """The answer to a body with more fields, those of ``fields`` where the route names its adapter."""
    body = json.loads(json.dumps(BODIES[path])) | more
    body.get("parameters", body).update(fields)
    return live.client.post(path, json=body, headers={**headers, "x-request-id": "same"})


def test_a_key_without_the_base(live: Live) -> None:
    for name in (MODEL, "", "tgi", "dummy", f"{MODEL}:"):
        assert_canonical_error(ask(live, "/v1/completions", name, NO_BASE), 404, "There is no model or adapter")
    assert_canonical_error(live.post("/v1/completions", BODIES["/v1/completions"], headers=NO_BASE), 404)
    assert live.post("/generate", BODIES["/generate"], headers=NO_BASE).status_code == 424
    for path, refused in (("/v1/completions", 404), ("/generate", 424)):
        statuses = []
        for weights in ([1, 1], [0, 0], [1, -1]):
            mix = {"merged_adapters": {"ids": ["shared", "shared"], "weights": weights}}
            statuses.append(mixed(live, path, mix, NO_BASE).status_code)
            assert mixed(live, path, mix, ACME).status_code == 200
        assert statuses == [200, refused, refused], "weights that are 0 leave the base"
        assert mixed(live, path, {"adapter_id": "shared"}, NO_BASE).status_code == 200
        assert mixed(live, path, {"adapter_id": "shared"}, NO_BASE, model=MODEL).status_code == 200
    assert [row["id"] for row in ok(live.client.get("/v1/models", headers=NO_BASE))["data"]] == ["shared"]
    assert_canonical_error(live.client.get(f"/v1/models/{MODEL}", headers=NO_BASE), 404)
    assert ok(live.post("/tokenize", {"prompt": "Hello"}, headers=NO_BASE))["count"] > 0


def test_listings_show_what_the_key_may_use(live: Live) -> None:
    mine = {"globex/leak", "globex/secret", "shared"}
    models = [row["id"] for row in ok(live.client.get("/v1/models", headers=GLOBEX))["data"]]
    assert models == [MODEL, *sorted(mine)]
    anthropic = ok(live.client.get("/v1/models", headers={**GLOBEX, "anthropic-version": "2023-06-01"}))
    assert [row["id"] for row in anthropic["data"]] == models
    listed = ok(live.client.get("/v1/adapters", headers=GLOBEX))
    assert {row["id"] for row in listed["data"]} == mine
    assert "source" not in listed["data"][0] and "error" not in listed["data"][0]
    assert [row["id"] for row in ok(live.client.get("/v1/adapter_aliases", headers=GLOBEX))["data"]] == ["globex/leak"]
    loaded = ok(live.client.get("/v1/lora_adapters", headers=GLOBEX))
    assert {row["id"] for row in loaded["data"]} <= {"globex/secret", "shared", "globex/y"}
    for path in ("/v1/models", "/v1/adapters", "/v1/adapter_aliases", "/v1/lora_adapters", "/server_info", "/info"):
        assert "acme" not in live.client.get(path, headers=GLOBEX).text.replace("globex/leak", ""), path
    for path in ("/v1/models", "/v1/adapters"):
        for name, absent in NAMES.items():
            if ".." not in name:  # a client's URL library would resolve it
                got = [live.client.get(f"{path}/{one}", headers=SAME) for one in (name, absent)]
                short = (name.removeprefix(f"{MODEL}:"), absent.removeprefix(f"{MODEL}:"))
                if name != "globex/leak" or path == "/v1/models":
                    alike(*got, short if path == "/v1/models" else (name, absent))


def test_an_alias_tells_nothing_of_a_target_that_the_key_may_not_use(live: Live) -> None:
    shown = live.client.get("/v1/adapters/globex/leak", headers=GLOBEX)
    assert "acme" not in shown.text and "acme" not in live.client.get("/v1/adapters", headers=GLOBEX).text
    assert "acme" not in live.client.get("/v1/adapter_aliases", headers=GLOBEX).text


def test_responses_are_the_tenants(live: Live) -> None:
    made = ok(live.post("/v1/responses", {**BODIES["/v1/responses"], "model": "acme/secret"}, headers=ACME))
    assert ok(live.client.get(f"/v1/responses/{made['id']}", headers=ACME_2))["id"] == made["id"]
    absent = "resp_" + "0" * 32
    for verb, end in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        got = [live.client.request(verb, f"/v1/responses/{one}{end}", headers=GLOBEX) for one in (made["id"], absent)]
        assert [response.status_code for response in got] == [404, 404]
        assert got[0].text.replace(made["id"], absent) == got[1].text
    item = made["output"][0]["id"]
    for extra in (
        {"previous_response_id": made["id"]},
        {"input": [{"type": "item_reference", "id": item}, *TALK]},
    ):
        sent = {**BODIES["/v1/responses"], **extra}
        assert_canonical_error(live.post("/v1/responses", sent, headers=GLOBEX), 400)
        ok(live.post("/v1/responses", sent, headers=ACME_2))


def cached(live: Live, headers: dict[str, str], **body: Any) -> int:
    prompt = {"prompt": list(range(20, 84)), "max_tokens": 1, **body}
    answer = ok(live.client.post("/v1/completions", json=prompt, headers=headers))
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_prefix_is_cached_for_its_tenant_alone(live: Live) -> None:
    for model in (MODEL, "shared"):
        assert cached(live, ACME, model=model) == 0
        assert cached(live, ACME, model=model) > 0
        assert cached(live, GLOBEX, model=model) == 0, "neither the count nor the time tells of another tenant"
    assert cached(live, ACME_2) > 0, "another key of the same tenant"
    assert cached(live, GLOBEX, cache_salt=f"{named_tenant('acme')}:") == 0


def test_metrics_and_administration_need_the_right(live: Live, tmp_path: Path) -> None:
    assert_canonical_error(live.client.get("/metrics"), 401)
    assert_canonical_error(live.client.get("/metrics", headers=GLOBEX), 403)
    assert "acme" in live.client.get("/metrics", headers=OPS).text
    load = {"lora_name": "globex/mine", "lora_path": str(tmp_path)}
    rows = {"adapters": [{"name": "globex/mine", "source": str(tmp_path)}]}
    for verb, path, body in (
        ("POST", "/v1/load_lora_adapter", load), ("POST", "/load_lora_adapter", load), ("POST", "/v1/adapters", rows),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "acme/secret"}), ("POST", "/pause", None),
        ("POST", "/v1/adapters/acme/secret/unload", None), ("POST", "/v1/adapters/acme/secret/pin", None),
        ("POST", "/v1/adapters/acme/secret/reload", {}), ("DELETE", "/v1/adapters/acme/versioned", None),
        ("PUT", "/v1/adapter_aliases/globex/a", {"target": "acme/secret"}), ("POST", "/reset_prefix_cache", None),
        ("DELETE", "/v1/adapter_aliases/acme/prod", None), ("DELETE", "/v1/models/acme/versioned", None),
    ):  # fmt: skip
        response = live.client.request(verb, path, json=body, headers=GLOBEX)
        assert_canonical_error(response, 403, "may not administer")
    assert ask(live, "/v1/completions", "acme/versioned@1", ACME).status_code == 200
    row = ok(live.client.get("/v1/adapters/acme/secret", headers=OPS))
    assert row["source"] and row["status"] == "resident"
    assert ask(live, "/v1/completions", "acme/secret", OPS).status_code == 404, "to administer is not to use"


def test_a_broken_adapters_error_is_its_tenants(live: Live, tmp_path: Path) -> None:
    source = Path(ok(live.client.get("/v1/adapters/acme/secret", headers=OPS))["source"])
    broken = shutil.copytree(source, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"not tensors")
    rows = {"adapters": [{"name": "acme/broken", "source": str(broken)}]}
    ok(live.post("/v1/adapters", rows, headers=OPS))
    assert_canonical_error(ask(live, "/v1/completions", "acme/broken", ACME), 400, "not a safetensors file")
    got = [ask(live, "/v1/completions", name, GLOBEX) for name in ("acme/broken", "acme/brxken")]
    alike(got[0], got[1], ("acme/broken", "acme/brxken"))
    ok(live.client.delete("/v1/adapters/acme/broken", headers=OPS))


def test_tenant_and_weight_reach_the_engine(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, client = [], live.service._client
    submit = client.submit

    def recording(requests):
        seen.extend(requests)
        return submit(requests)

    monkeypatch.setattr(client, "submit", recording)
    for headers in (ACME, ACME_2, GLOBEX):
        cached(live, headers)
    assert [(one.tenant, one.weight) for one in seen] == [
        (named_tenant("acme"), 2.5), (named_tenant("acme"), 2.5), (named_tenant("globex"), 1.0),
    ]  # fmt: skip


def test_the_file_is_read_again_when_it_changes(tmp_path: Path, live: Live) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [{"id": "a", "key": "one"}]}))
    with serving(Path(live.service.info.path), api_keys_file=path, api_keys=("own",), backend="auto") as other:
        status = lambda key: other.client.get("/info", headers={"authorization": f"Bearer {key}"}).status_code
        assert [status(key) for key in ("one", "own", "two")] == [200, 200, 401]
        path.write_text(json.dumps({"keys": [{"id": "a", "key": "two"}]}))
        until(lambda: status("two") == 200, patience_s=5)
        assert [status(key) for key in ("one", "own")] == [401, 200]
        path.write_text('{"keys": [')
        until(lambda: other.server.loading.app.asgi.state.keys._stamp[1] == path.stat().st_size or status("two") != 200)
        assert status("two") == 200, "a file that cannot be read changes nothing"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys = 3", "Expected `array`"),
        ("[[keys]]\nkey = 'x'", "missing required field `id`"),
        ("[[keys]]\nid = 'a'", "'a' needs either key or key_sha256"),
        ("[[keys]]\nid = 'a'\nkey = 'x'\nkey_sha256 = '" + "0" * 64 + "'", "needs either"),
        ("[[keys]]\nid = 'a'\nkey_sha256 = 'abc'", "key_sha256"),
        ("[[keys]]\nid = 'a'\nkey = ''", "key"),
        ("[[keys]]\nid = 'a'\nkey = 'x'\nweight = 0", "weight"),
        ("[[keys]]\nid = 'a'\nkey = 'x'\nadmn = true", "unknown field `admn`"),
        ("[[keys]]\nid = 'a'\nkey = 'x'\n[[keys]]\nid = 'a'\nkey = 'y'", "'a' has the id or the key of another"),
        ("[[keys]]\nid = 'a'\nkey = 'secret-x'\n[[keys]]\nid = 'b'\nkey = 'secret-x'", "'b' has the id or the key"),
        (
            "[[keys]]\nid = 'a'\nkey = 'x'\nweight = 2\n[[keys]]\nid = 'b'\ntenant = 'a'\nkey = 'y'\nweight = 3",
            "another weight",
        ),
        ("[[keys]]\nid = 'a'\nkey = 'x'\nadapters = ['s@x/*', 'support@7']", "'a' has a pattern with a version"),
        ("not toml", "cannot be used"),
    ],
)
def test_a_wrong_file_is_named_without_its_secrets(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_keys(path)
    assert words in error.value.message and str(path) in error.value.message
    assert "secret-x" not in error.value.message


def test_patterns_and_versions() -> None:
    access = Access(patterns=("acme/*", "one"))
    for name, allowed in (
        ("acme/x", True), ("acme/x@3", True), ("one", True), ("one@7", True), ("acme", False), ("two@one", False),
        ("xacme/y", False), ("One", False), ("one\n", False), ("@one", False),
    ):  # fmt: skip
        assert access.may_use(name) is allowed, name
    assert not Access(patterns=()).may_use("x") and Access().may_use("x")


def test_a_keyring_and_options(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(KEYS)
    ring = KeyRing(("own",), path)
    own, acme = ring.find("own"), ring.find("sk-acme-2")
    assert own is not None and own.admin and own.may_use("anything") and own.tenant != named_tenant("own")
    assert acme is not None and (acme.id, acme.admin, acme.tenant) == ("acme-2", False, named_tenant("acme"))
    assert ring.find("sk-acme") is None and ring.find("") is None
    ServerConfig(adapter_admin=True, host="0.0.0.0", api_keys_file=path)
    assert not re.search("sk-", repr(ServerConfig(api_keys_file=path)))


def test_streams_name_the_adapter_that_answers(live: Live) -> None:
    body = {**BODIES["/v1/completions"], "model": "acme/prod", "stream": True}
    response = live.post("/v1/completions", body, headers=ACME)
    assert events(response)[-1] == "[DONE]" and response.headers["x-truffula-adapter"] == "acme/secret"
