"""``truffula adapters`` and a real server: what it lists, and every refusal with its code and the way out."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command import here
from live_server import Live, ok, serving, write_adapters, write_model

KEY = "sesame"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("adapters") / "model")


@pytest.fixture(scope="module")
def folders(model: Path) -> dict[str, Path]:
    return write_adapters(model.parent / "of-dir", model)


@pytest.fixture(scope="module")
def admin(model: Path, folders: dict[str, Path]) -> Iterator[Live]:
    options = {"adapters": {"named": str(folders["pirate"])}, "adapter_dir": folders["in-dir"].parent}
    with serving(model, adapter_admin=True, api_keys=(KEY,), backend="auto", **options) as live:
        yield live


@pytest.fixture(scope="module")
def plain(model: Path, folders: dict[str, Path]) -> Iterator[Live]:
    with serving(model, adapters={"named": str(folders["pirate"])}, backend="auto") as live:
        yield live


def rows(live: Live, *more: str) -> dict[str, dict[str, Any]]:
    done = here("adapters", "list", "--url", live.url, "--json", *more)
    assert done.returncode == 0, done.stderr
    return {row["id"]: row for row in json.loads(done.stdout)}


def test_the_list_has_status_rank_size_source_and_base(plain: Live, folders: dict[str, Path]) -> None:
    before = rows(plain)["named"]
    assert (before["status"], before["rank"], before["size_bytes"]) == ("not loaded", None, None)
    plain.completion(model="named", prompt="a", max_tokens=1)
    after = rows(plain)["named"]
    assert after["status"] in ("ready", "resident") and after["rank"] == 4 and after["size_bytes"] > 1000
    assert after["parent"] == "tiny/llama"
    shown = here("adapters", "list", "--url", plain.url)
    words = next(line.split() for line in shown.stdout.splitlines() if line.startswith("named"))
    assert words[:2] == ["named", after["status"]] and words[2] == "4" and words[-1] == "tiny/llama"


def test_sources_are_for_those_who_may_load_by_path(plain: Live, admin: Live, folders: dict[str, Path]) -> None:
    assert "source" not in rows(plain)["named"]
    assert str(folders["pirate"]) not in json.dumps(rows(plain))
    assert rows(admin, "--api-key", KEY)["named"]["source"] == str(folders["pirate"])
    assert "--adapter-admin" in here("adapters", "list", "--url", plain.url).stderr
    page = {"origin": "http://page.example"}
    assert plain.client.get("/v1/adapters", headers=page).status_code == 403  # a web page has no business there


def test_loading_failures_are_listed_for_the_operator(admin: Live, folders: dict[str, Path], tmp_path: Path) -> None:
    broken = folders["in-dir"].parent / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text('{"peft_type": "BOFT", "r": 2}')
    (broken / "adapter_model.safetensors").write_bytes((folders["pirate"] / "adapter_model.safetensors").read_bytes())
    headers = {"authorization": f"Bearer {KEY}"}
    body = {"model": "broken", "prompt": "a", "max_tokens": 1}
    assert admin.client.post("/v1/completions", json=body, headers=headers).status_code == 400
    found = rows(admin, "--api-key", KEY)["broken"]
    assert found["status"] == "failed" and "BOFT" in found["error"]


def test_an_adapter_that_is_gone_does_not_end_the_list(admin: Live, folders: dict[str, Path]) -> None:
    """Names are listed for a second; one whose file was removed meanwhile has no source."""
    leaving = folders["in-dir"].parent / "leaving"
    shutil.copytree(folders["in-dir"], leaving)
    assert rows(admin, "--api-key", KEY)["leaving"]["source"] == str(leaving)
    headers = {"authorization": f"Bearer {KEY}"}
    listed = {row["id"] for row in ok(admin.client.get("/v1/adapters", headers=headers))["data"]}
    (leaving / "adapter_config.json").unlink()
    left = {row["id"]: row for row in ok(admin.client.get("/v1/adapters", headers=headers))["data"]}
    assert listed - {"leaving"} == left.keys() - {"leaving"}
    assert left.get("leaving", {"source": None})["source"] is None


def test_load_and_unload(admin: Live, folders: dict[str, Path]) -> None:
    at = ("--url", admin.url, "--api-key", KEY)
    done = here("adapters", "load", "added", str(folders["org/poet"]), *at)
    assert done.returncode == 0 and done.stdout == "added is loaded.\n"
    assert rows(admin, "--api-key", KEY)["added"]["rank"] == 2
    done = here("adapters", "unload", "added", *at)
    assert done.returncode == 0 and "removed successfully" in done.stdout and "still offers" not in done.stdout
    assert "added" not in rows(admin, "--api-key", KEY)


def test_versions_aliases_pins_and_reloads(admin: Live, folders: dict[str, Path], tmp_path: Path) -> None:
    at = ("--url", admin.url, "--api-key", KEY)

    def run(*args: str) -> str:
        done = here("adapters", *args, *at)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("load", "support@7", str(folders["pirate"]), "--pin") == "support@7 is loaded.\n"
    run("load", "support@8", str(folders["org/poet"]))
    shown = run("show", "support")
    assert "generation" in shown and "\x1b" not in shown
    table = [line.split() for line in shown.splitlines()][-2:]
    assert [row[:2] for row in table] == [["7", "resident"], ["8", "resident"]]
    found = json.loads(run("show", "support@7", "--json"))
    assert found["pinned"] and found["rank"] == 4 and [one["version"] for one in found["versions"]] == ["7", "8"]
    assert run("unpin", "support@7") == "support@7 is no longer pinned.\n"
    assert json.loads(run("pin", "support@8", "--json"))["pinned"]
    assert run("alias", "prod", "support@7") == "prod means support@7.\n"
    run("split", "canary", "support@7=90", "support@8=10", "--shadow", "named", "--shadow-percent", "5")
    lines = [line.split("   ") for line in run("aliases").splitlines()]
    assert lines[1][0] == "canary" and "support@7 (90), support@8 (10)" in lines[1] and "named (5 %)" in lines[1][-1]
    assert json.loads(run("aliases", "--json"))[1] == {
        "id": "prod", "object": "adapter_alias", "targets": {"support@7": 1.0},
    }  # fmt: skip
    assert run("reload", "support@7", str(folders["in-dir"]), "--expect", found["generation"]) == (
        "support@7 is reloaded.\n"
    )
    assert json.loads(run("show", "support@7", "--json"))["rank"] == 3
    assert [row["id"] for row in json.loads(run("list", "--prefix", "can", "--json"))] == ["canary"]
    assert {row["id"] for row in json.loads(run("list", "--json"))} >= {"tiny/llama", "support", "prod", "canary"}
    run("unalias", "prod"), run("unalias", "canary"), run("unload", "support")
    assert "support" not in rows(admin, "--api-key", KEY)


@pytest.mark.parametrize("name", ["named", "in-dir"])
def test_unloading_what_the_server_still_offers_says_so(admin: Live, name: str) -> None:
    body, headers = {"model": name, "prompt": "a", "max_tokens": 1}, {"authorization": f"Bearer {KEY}"}
    ok(admin.client.post("/v1/completions", json=body, headers=headers))
    done = here("adapters", "unload", name, "--url", admin.url, "--api-key", KEY)
    assert done.returncode == 0 and done.stdout.startswith("Success") and "still offers it" in done.stdout
    again = here("adapters", "unload", name, "--url", admin.url, "--api-key", KEY)
    assert again.returncode == 1 and "is not loaded" in again.stderr
    assert name in rows(admin, "--api-key", KEY)


def test_refusals_keep_the_servers_code_and_words(admin: Live, folders: dict[str, Path]) -> None:
    at = ("--url", admin.url, "--api-key", KEY)
    pirate = str(folders["pirate"])
    for args, code, words in (
        (("load", "x", "/nope"), "model_not_found", "'/nope' does not contain an adapter"),
        (("load", "tiny/llama", pirate), "invalid_request", "means the base model"),
        (("load", "named", pirate), "adapter_exists", "already registered"),
        (("load", "x@latest", pirate), "invalid_request", "not NAME@VERSION"),
        (("unload", "nope"), "model_not_found", "'nope'"),
        (("show", "nope"), "model_not_found", "'nope'"),
        (("reload", "nope"), "model_not_found", "'nope'"),
        (("pin", "nope"), "model_not_found", "'nope'"),
        (("alias", "x", "nope"), "invalid_request", "no adapter 'nope'"),
        (("unalias", "nope"), "model_not_found", "'nope'"),
        (("split", "x", "named"), "config_invalid", "'named' is not TARGET=WEIGHT"),
        (("split", "x", "named=much"), "config_invalid", "'named=much' is not TARGET=WEIGHT"),
        (("reload", "named", "--expect", "abc"), "generation_mismatch", "expected_generation is 'abc'"),
        (("list", "--status", "fine"), "invalid_request", "status: should be one of"),
    ):
        done = here("adapters", *args, *at)
        assert done.returncode == 1 and f"({code})" in done.stderr and words in done.stderr, done.stderr
        assert "internal_error" not in done.stderr


def test_a_server_without_the_routes_says_which_option_it_lacks(plain: Live, folders: dict[str, Path]) -> None:
    for args in (
        ("load", "x", str(folders["pirate"])), ("unload", "named"), ("reload", "named"), ("pin", "named"),
        ("unpin", "named"), ("alias", "a", "named"), ("split", "a", "named=1"), ("unalias", "a"),
    ):  # fmt: skip
        done = here("adapters", *args, "--url", plain.url)
        assert done.returncode == 1 and "runs without --adapter-admin" in done.stderr
        assert "There is no route" not in done.stderr


def test_a_key_is_asked_for_and_taken_from_the_environment(admin: Live) -> None:
    missing = here("adapters", "list", "--url", admin.url)
    assert missing.returncode == 1 and "(invalid_api_key)" in missing.stderr and "--api-key" in missing.stderr
    assert "requires an API key" in missing.stderr
    assert "rejects this API key" in here("adapters", "list", "--url", admin.url, "--api-key", "wrong").stderr
    done = here("adapters", "list", "--url", admin.url, TRUFFULA_API_KEYS=f"{KEY},other")
    assert done.returncode == 0 and "named" in done.stdout


def test_where_the_server_is(plain: Live) -> None:
    host = plain.url.removeprefix("http://")
    port = host.rpartition(":")[2]
    for place in (("--url", host), ("--url", f"{plain.url}/v1/"), ("--port", port)):
        assert "named" in here("adapters", "list", *place).stdout, place
    assert "named" in here("adapters", "list", TRUFFULA_PORT=port).stdout
    both = here("adapters", "list", "--url", plain.url, "--port", port)
    assert both.returncode == 1 and "give one of them" in both.stderr
    refused = here("adapters", "list", "--port", "9")
    assert refused.returncode == 1 and "http://127.0.0.1:9" in refused.stderr and "truffula serve" in refused.stderr
    assert "not a URL" in here("adapters", "list", "--url", "http://localhost:http").stderr


@contextmanager
def other_server(status: int, body: bytes) -> Iterator[str]:
    """Some other program's, which answers everything so."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "code", "words"),
    [
        (200, b"<html>hello</html>", "config_invalid", "is not a truffula server's"),
        (200, b'["a", "b"]', "config_invalid", "is not a truffula server's"),
        (200, b'{"data": ["a"]}', "config_invalid", "is not a truffula server's"),
        (404, b'{"detail":"Not Found"}', "http_404", "Not Found"),
        (502, b"bad gateway", "http_502", "answered 502: bad gateway"),
        (422, b'{"error":"Input validation error: no","error_type":"validation"}', "validation", "no"),
    ],
)
def test_other_servers_are_told_apart(status: int, body: bytes, code: str, words: str) -> None:
    with other_server(status, body) as url:
        done = here("adapters", "list", "--url", url)
    assert done.returncode == 1 and f"({code})" in done.stderr and words in done.stderr


def test_a_list_without_details_is_still_a_list() -> None:
    rows = [{"id": "base-model", "root": "org/base"}, {"id": "[red]leaf", "parent": "base-model"}]
    with other_server(200, json.dumps({"data": rows}).encode()) as url:
        done = here("adapters", "list", "--url", url)
    assert done.returncode == 0 and "org/base" in done.stdout and "[red]leaf" in done.stdout


def test_the_route_lists_each_name_once(plain: Live) -> None:
    assert [row["id"] for row in ok(plain.client.get("/v1/adapters"))["data"]] == ["named"]
