"""Registered adapters: versions, aliases, pins and reloads over HTTP, and what the next server still knows of them."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from live_server import MODEL, Live, assert_canonical_error, ok, serving, until, write_model
from safetensors.numpy import load_file, save_file

from truffula.bench.server import free_port
from truffula.errors import AdapterNotFound, ConfigError
from truffula.lora.registry import AdapterRegistry, Alias, point
from truffula.lora.sources import AdapterDirectory
from truffula.testing.adapters import write_tiny_adapter
from truffula.types import AdapterRef


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("lifecycle") / "llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def folders(model: Path) -> dict[str, Path]:
    return {str(n): write_tiny_adapter(model.parent / f"a{n}", model, rank=2, alpha=64, seed=n) for n in range(4)}


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state") / "new"


@pytest.fixture(scope="module")
def only(model: Path, folders: dict[str, Path], state_dir: Path) -> Iterator[Live]:
    with open_server(model, folders, state_dir) as live:
        yield live


@pytest.fixture
def served(only: Live) -> Iterator[Live]:
    """A server on which nothing is registered or loaded."""
    yield only
    for alias in ok(only.client.get("/v1/adapter_aliases"))["data"]:
        ok(only.client.delete(f"/v1/adapter_aliases/{alias['id']}"))
    ok(act(only, "named", "unload"))
    for row in ok(only.client.get("/v1/adapters", params={"limit": 1000}))["data"]:
        if row["id"] != "named":
            ok(only.client.delete(f"/v1/adapters/{row['id']}"))


def open_server(model: Path, folders: dict[str, Path], state_dir: Path):
    named = {"named": str(folders["3"])}
    return serving(model, adapters=named, adapter_admin=True, state_dir=state_dir, backend="auto")


def register(live: Live, *rows: tuple[str, Path], **more) -> list[dict]:
    adapters = []
    for name, source in rows:
        base, at, version = name.partition("@")
        adapters.append({"name": base, "source": str(source), **({"version": version} if at else {})})
    return ok(live.post("/v1/adapters", {"adapters": adapters, **more}))["data"]


def show(live: Live, name: str) -> dict:
    return ok(live.client.get(f"/v1/adapters/{name}"))


def act(live: Live, name: str, action: str, **body) -> httpx.Response:
    return live.client.post(f"/v1/adapters/{name}/{action}", json=body)


def text(live: Live, name: str, **headers: str) -> tuple[str, str]:
    """The answer, and the adapter that gave it."""
    body = {"model": name, "prompt": "Hello", "max_tokens": 12, "temperature": 0}
    response = live.post("/v1/completions", body, headers=headers)
    answer = ok(response)
    assert answer["model"] == name
    return answer["choices"][0]["text"], response.headers.get("x-truffula-adapter", "")


def test_versions_aliases_and_what_a_bare_name_means(served: Live, folders: dict[str, Path]) -> None:
    register(served, ("support@7", folders["0"]), ("support@8", folders["1"]), ("other", folders["2"]))
    seven, eight = text(served, "support@7")[0], text(served, "support@8")[0]
    assert len({seven, eight, text(served, "other")[0], text(served, MODEL)[0]}) == 4
    assert text(served, "support") == text(served, "support@latest") == (eight, "support@8")
    assert text(served, f"{MODEL}:support@7") == (seven, "support@7")
    for name in ("support@9", "support@", "other@1", "named@1"):
        assert_canonical_error(served.post("/v1/completions", {"model": name, "prompt": "a"}), 404)
    ok(served.client.put("/v1/adapter_aliases/prod", json={"target": "support@7"}))
    ok(served.client.put("/v1/adapter_aliases/support", json={"target": "support@7"}))
    assert text(served, "prod") == text(served, "support") == (seven, "support@7")
    assert text(served, "support@latest")[1] == "support@8"
    names = [row["id"] for row in ok(served.client.get("/v1/models"))["data"]]
    assert names == [MODEL, "named", "other", "prod", "support"]
    assert show(served, "support@7")["aliases"] == ["prod", "support"]
    ok(served.client.delete("/v1/adapter_aliases/support"))
    assert text(served, "support")[1] == "support@8"


def test_registering_one_and_many(served: Live, folders: dict[str, Path]) -> None:
    rows = [{"name": f"n{i}", "source": str(folders["0"])} for i in range(3)]
    answer = ok(served.post("/v1/adapters", {"adapters": rows}))
    assert [row["id"] for row in answer["data"]] == ["n0", "n1", "n2"]
    assert {show(served, f"n{i}")["status"] for i in range(3)} == {"not loaded"}
    again = {"adapters": [{"name": "n0", "version": "2", "source": str(folders["1"]), "pinned": True}], "load": True}
    (row,) = ok(served.post("/v1/adapters", again))["data"]
    assert (row["id"], show(served, "n0")["generation"]) == ("n0@2", row["generation"])
    assert show(served, "n0")["pinned"] and show(served, "n0")["versions"][0]["version"] is None
    assert_canonical_error(served.post("/v1/adapters", again), 409, "already registered")
    again["adapters"][0]["source"] = str(folders["2"])
    (new,) = ok(served.post("/v1/adapters", {**again, "replace": True}))["data"]
    assert new["generation"] != row["generation"]
    twice = {"adapters": [rows[0] | {"name": "x"}, rows[0] | {"name": "x"}]}
    assert_canonical_error(served.post("/v1/adapters", twice), 400, "same name and version")
    unknown = served.post("/v1/adapters", {"adapters": [rows[0] | {"name": "y", "rank": 3}]})
    assert ok(unknown) and unknown.headers["x-truffula-ignored"] == "adapters[0].rank"


def test_what_cannot_be_an_alias_or_a_version(served: Live, folders: dict[str, Path]) -> None:
    register(served, ("one", folders["0"]))
    ok(served.client.put("/v1/adapter_aliases/prod", json={"target": "one"}))
    put = lambda name, **body: served.client.put(f"/v1/adapter_aliases/{name}", json=body)
    for response, words in (
        (put("x", target="nope"), "There is no adapter 'nope'"),
        (put("x", target="prod"), "'prod' is an alias"),
        (put("x", target=MODEL), "base model"),
        (put("tgi", target="one"), "means the base model"),
        (put("x@1", target="one"), "no version"),
        (put("x%07", target="one"), "printable"),
        (put("x", targets={"one": 1e300}), "at most 1e+09"),
        (put("x"), "either target or targets"),
        (put("x", targets={"one": 0}), "above 0"),
        (put("x", targets={}), "targets"),
        (put("x", target="one", shadow_percent=5), "needs shadow"),
    ):
        assert_canonical_error(response, 400, words)
    for row, words in (
        ({"name": "a@b@c", "source": str(folders["0"])}, "not NAME@VERSION"),
        ({"name": "a", "version": "latest", "source": str(folders["0"])}, "not NAME@VERSION"),
        ({"name": "a", "version": "", "source": str(folders["0"])}, "not NAME@VERSION"),
        ({"name": MODEL, "source": str(folders["0"])}, "means the base model"),
        ({"name": "a", "source": "not a source"}, "neither an existing folder nor a Hub id"),
    ):
        assert_canonical_error(served.post("/v1/adapters", {"adapters": [row]}), 400, words)
    for taken in ("one", "named", "prod"):
        row = {"name": taken, "source": str(folders["0"])}
        assert_canonical_error(served.post("/v1/adapters", {"adapters": [row]}), 409, "already registered")
    missing = {"adapters": [{"name": "a", "source": "/nowhere"}, {"name": "b", "source": str(folders["0"])}]}
    assert_canonical_error(served.post("/v1/adapters", missing), 404, "'/nowhere'")
    assert_canonical_error(served.client.delete("/v1/adapters/one"), 400, "target of the alias 'prod'")
    assert_canonical_error(served.post("/v1/unload_lora_adapter", {"lora_name": "one"}), 400, "alias 'prod'")
    assert_canonical_error(served.client.delete("/v1/adapters/named"), 400, "--adapter")
    register(served, ("v@1", folders["0"]), ("v@2", folders["1"]))
    ok(put("of-v", target="v"))
    ok(served.client.delete("/v1/adapters/v@2"))
    assert_canonical_error(served.client.delete("/v1/adapters/v@1"), 400, "target of the alias 'of-v'")
    assert_canonical_error(served.client.delete("/v1/adapters/b"), 404)
    assert_canonical_error(served.client.delete("/v1/adapter_aliases/b"), 404)


def test_a_split_is_by_weight_and_the_same_for_a_key(served: Live, folders: dict[str, Path]) -> None:
    register(served, ("s@1", folders["0"]), ("s@2", folders["1"]))
    ok(served.client.put("/v1/adapter_aliases/s", json={"targets": {"s@1": 3, "s@2": 3}}))
    for header in ("x-truffula-split-key", "x-request-id"):
        keys = [f"user-{i}" for i in range(12)]
        expected = ["s@1" if point("s", key) < 0.5 else "s@2" for key in keys]
        assert [text(served, "s", **{header: key})[1] for key in keys] == expected, "the stated hash"
        assert set(expected) == {"s@1", "s@2"}
    other = next(key for key, target in zip(keys, expected, strict=True) if target != expected[0])
    both = {"x-truffula-split-key": "user-0", "x-request-id": other}
    assert text(served, "s", **both)[1] == expected[0], "the header goes before the id"


def test_a_shadow_gets_a_copy_and_changes_nothing(
    served: Live, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "truffula.server.shadows")
    broken = shutil.copytree(folders["2"], tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"not tensors")
    register(served, ("s@1", folders["0"]), ("s@2", folders["1"]), ("broken", broken))
    alone = text(served, "s@1")

    def outcomes() -> dict[str, float]:
        found = ok(served.client.get("/metrics", params={"format": "json"}))
        (family,) = [one for one in found if one["name"] == "truffula_shadow_requests"]
        return {sample["labels"]["outcome"]: sample["value"] for sample in family["samples"]}

    body = {"targets": {"s@1": 1}, "shadow": "s@2"}
    ok(served.client.put("/v1/adapter_aliases/prod", json=body))
    assert text(served, "prod", **{"x-request-id": "mine"}) == alone
    until(lambda: sum(outcomes().values()) == 1)
    assert set(outcomes()) <= {"length", "stop"}
    assert "shadow id=mine-shadow adapter=s@2 completion_tokens=12" in caplog.text
    assert served.service.active == 0
    ok(served.client.put("/v1/adapter_aliases/prod", json={"target": "s@1", "shadow": "broken"}))
    assert text(served, "prod") == alone
    until(lambda: outcomes().get("adapter_invalid") == 1)
    ok(served.client.put("/v1/adapter_aliases/prod", json={"target": "s@1", "shadow": "s@2", "shadow_percent": 30}))
    before, keys = sum(outcomes().values()), [str(number) for number in range(20)]
    for key in keys:
        assert text(served, "prod", **{"x-truffula-split-key": key}) == alone
    wanted = sum(point("prod\nshadow", key) < 0.3 for key in keys)
    until(lambda: sum(outcomes().values()) == before + wanted)
    assert 0 < wanted < 20
    # Removed after the alias was made: a target in use is not removed by these routes.
    assert_canonical_error(served.client.delete("/v1/adapters/s@2"), 400, "alias 'prod'")


def test_choices_follow_their_weights() -> None:
    alias = Alias(name="a", targets={"x": 70, "y": 20, "z": 10})
    counts = Counter(alias.choose(str(i)) for i in range(20_000))
    assert abs(counts["x"] - 14_000) < 400 and abs(counts["y"] - 4_000) < 300 and abs(counts["z"] - 2_000) < 250
    moved = Alias(name="a", targets={"x": 60, "y": 30, "z": 10})
    assert not any(alias.choose(str(i)) == "z" != moved.choose(str(i)) for i in range(5000)), "others' keys stay"


def test_reload_is_compare_and_set(served: Live, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["0"], tmp_path / "mine")
    register(served, ("mine", folder), load=True)
    before = show(served, "mine")
    old = before["generation"]
    assert (before["status"], before["tier"], before["kind"], before["rank"]) == ("resident", "resident", "low_rank", 2)
    assert before["sites"] > 1 and before["size_bytes"] > 0 and before["source"] == str(folder)
    assert_canonical_error(act(served, "mine", "reload", expected_generation="0" * 64), 409, old)
    replace_files(folder, folders["1"])
    after = ok(act(served, "mine", "reload", expected_generation=old))
    assert after["generation"] not in (None, old)
    refused = assert_canonical_error(act(served, "mine", "reload", expected_generation=old), 409, after["generation"])
    assert refused["code"] == "generation_mismatch"
    # An adapter that is not in memory is loaded to be compared.
    ok(act(served, "mine", "unload"))
    assert show(served, "mine")["status"] == "not loaded"
    there = ok(act(served, "mine", "reload", source=str(folders["2"]), expected_generation=after["generation"]))
    assert there["source"] == str(folders["2"])
    # One name, one generation: also where the former source is still in use by another name.
    register(served, ("also", folders["0"]), ("moved", folders["0"]), load=True)
    both = ok(act(served, "moved", "reload", source=str(folders["1"]), expected_generation=old))
    assert both["generation"] == show(served, "moved")["generation"] != show(served, "also")["generation"] == old
    body = {"lora_name": "mine", "lora_path": str(folders["3"]), "load_inplace": True}
    mistral = {**body, "expected_generation": old}
    assert_canonical_error(served.post("/v1/load_lora_adapter", mistral), 409, there["generation"])
    ok(served.post("/v1/load_lora_adapter", {**body, "expected_generation": there["generation"]}))
    assert text(served, "mine")[0] == text(served, "named")[0]


def replace_files(folder: Path, source: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(source / name, folder / f".{name}")
        (folder / f".{name}").rename(folder / name)


def test_a_reload_that_fails_changes_nothing(served: Live, folders: dict[str, Path], tmp_path: Path) -> None:
    register(served, ("mine", folders["0"]), load=True)
    good = text(served, "mine")
    broken = shutil.copytree(folders["1"], tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"not tensors")
    assert_canonical_error(act(served, "mine", "reload", source=str(broken)), 400)
    assert text(served, "mine") == good and show(served, "mine")["source"] == str(folders["0"])
    new = {"name": "new", "source": str(broken)}
    rows = {"adapters": [{"name": "good", "source": str(folders["2"]), "pinned": True}, new], "load": True}
    assert_canonical_error(served.post("/v1/adapters", rows), 400)
    for name in ("new", "good"):
        assert_canonical_error(served.client.get(f"/v1/adapters/{name}"), 404)


def test_pins(served: Live, folders: dict[str, Path]) -> None:
    register(served, ("mine", folders["0"]))
    assert (show(served, "mine")["status"], show(served, "mine")["pinned"]) == ("not loaded", False)
    pinned = ok(act(served, "mine", "pin"))
    assert (pinned["status"], pinned["pinned"]) == ("resident", True)
    unpinned = ok(act(served, "mine", "unpin"))
    assert (unpinned["status"], unpinned["pinned"]) == ("resident", False)
    ok(act(served, "named", "pin"))
    unloaded = ok(act(served, "named", "unload"))
    assert (unloaded["status"], unloaded["pinned"]) == ("not loaded", False)
    assert_canonical_error(act(served, "nope", "pin"), 404)


def test_a_pin_that_fails_leaves_none(served: Live, folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "late").mkdir()
    register(served, ("late", tmp_path / "late"))
    assert_canonical_error(act(served, "late", "pin"), 400)
    shutil.copytree(folders["0"], tmp_path / "late", dirs_exist_ok=True)
    text(served, "late")
    assert (show(served, "late")["status"], show(served, "late")["pinned"]) == ("resident", False)


def test_the_list_is_paged_and_filtered(served: Live, folders: dict[str, Path]) -> None:
    register(served, *((f"p{i:02}", folders["0"]) for i in range(25)))
    register(served, ("q", folders["1"]), load=True)
    page = lambda **query: ok(served.client.get("/v1/adapters", params=query))
    ids, after = [], ""
    for size in (10, 10, 7):
        found = page(limit=10, after=after)
        assert len(found["data"]) == size and found["has_more"] == (size == 10)
        assert found["last_id"] == found["data"][-1]["id"] and found["first_id"] == found["data"][0]["id"]
        ids += [row["id"] for row in found["data"]]
        after = found["last_id"]
    assert ids == ["named", *(f"p{i:02}" for i in range(25)), "q"]
    named = lambda **query: [row["id"] for row in page(**query)["data"]]
    assert named(prefix="p1") == [f"p1{i}" for i in range(10)]
    assert named(status="resident") == named(kind="low_rank") == ["q"]
    assert "q" not in named(status="not loaded") and len(named(source="local")) == 27 and named(source="hub") == []
    for query in (
        {"limit": "0"},
        {"limit": "x"},
        {"limit": "1001"},
        {"status": "fine"},
        {"source": "hbu"},
        {"sort": "x"},
    ):
        assert_canonical_error(served.client.get("/v1/adapters", params=query), 400, next(iter(query)))
    listed = openai.OpenAI(base_url=f"{served.url}/v1", api_key="-").models.list()
    assert [one.id for one in listed] == [MODEL, *ids]


def test_mistral_rs_list(served: Live, folders: dict[str, Path]) -> None:
    """Its fields as mistral.rs documents ``GET /v1/lora_adapters``."""
    register(served, ("mine", folders["0"]), ("same", folders["0"]), ("away", folders["1"]))
    text(served, "mine"), text(served, "same")
    found = ok(served.client.get("/v1/lora_adapters"))
    rows = {row["id"]: row for row in found["data"]}
    assert set(rows) == {"mine", "same"}
    assert set(rows["mine"]) == {"bytes", "generation", "id", "object", "rank", "revision", "source"}
    assert (rows["mine"]["rank"], rows["mine"]["source"]) == (2, str(folders["0"]))
    (generation,) = found["generations"]
    assert set(generation) == {"active_leases", "aliases", "bytes", "generation", "rank", "retired"}
    assert generation["aliases"] == ["mine", "same"] and not generation["retired"]
    counts = ("max_adapters", "max_bytes", "max_rank", "resident_bytes", "resident_generations", "retired_generations")
    assert all(isinstance(found[name], int) for name in counts) and found["resident_generations"] == 1


def test_a_restart_knows_everything(
    served: Live, model: Path, folders: dict[str, Path], state_dir: Path, tmp_path: Path
) -> None:
    register(served, ("s@1", folders["0"]), ("s@2", folders["1"]), ("gone", folders["2"]))
    ok(served.client.put("/v1/adapter_aliases/prod", json={"targets": {"s@1": 1, "s@2": 1}, "shadow": "named"}))
    ok(act(served, "s@1", "pin"))
    ok(served.client.delete("/v1/adapters/gone"))
    answers = [text(served, name) for name in ("s@1", "s@2", "s")]
    with pytest.raises(ConfigError, match="another server uses it"):
        AdapterRegistry(state_dir / "adapters.db")
    # What is on disk while the server runs is what a server that was killed leaves behind.
    killed = tmp_path / "killed"
    shutil.copytree(state_dir, killed)
    with open_server(model, folders, killed) as again:
        until(lambda: show(again, "s@1")["status"] == "resident")
        assert show(again, "s@1")["pinned"]
        assert [text(again, name) for name in ("s@1", "s@2", "s")] == answers
        (alias,) = ok(again.client.get("/v1/adapter_aliases"))["data"]
        assert alias["targets"] == {"s@1": 1.0, "s@2": 1.0} and alias["shadow"] == "named"
        assert_canonical_error(again.client.get("/v1/adapters/gone"), 404)


KILLED = """
import os, pathlib, signal, sys
from truffula.lora.registry import AdapterRegistry
from truffula.types import AdapterRef
registry = AdapterRegistry(pathlib.Path(sys.argv[1]))
for number in range(50):
    registry.add([AdapterRef(name=f"a@{number}", locator=f"/{number}")])
registry.set_pin("a@3", True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_registry_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "adapters.db"
    child = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=60)
    assert child.returncode == -signal.SIGKILL
    registry = AdapterRegistry(path)
    assert list(registry.versions("a")) == [str(number) for number in range(50)]
    found = registry.find("a")
    assert found is not None and found.locator == "/49" and registry.pins() == ["a@3"]
    registry.remove("a@49")
    registry.close()
    reopened = AdapterRegistry(path).find("a@latest")
    assert reopened is not None and reopened.locator == "/48"


@contextmanager
def server_process(model: Path, state_dir: Path, keys: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """``truffula serve`` as an operator runs it."""
    port = free_port()
    options = ["--state-dir", state_dir, "--api-keys-file", keys, "--adapter-admin", "--memory", "1GiB"]
    command = [sys.executable, "-m", "truffula", "serve", str(model), "--port", str(port), *map(str, options)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=KEY, timeout=60) as client:
            until(lambda: answers(client))
            yield server, client
    finally:
        server.kill()
        server.wait(60)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


KEY, OTHER = ({"authorization": f"Bearer {key}"} for key in ("ops", "new"))


@pytest.mark.slow
def test_a_server_that_is_killed_is_followed_by_one_that_knows_the_same(
    model: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    written = "[[keys]]\nid = '{0}'\nkey = '{0}'\nadmin = true\nadapters = ['*']\n"
    keys.write_text(written.format("ops"))
    rows = [{"name": "s", "version": str(i), "source": str(folders[str(i)]), "pinned": i == 1} for i in range(3)]

    def seen(client: httpx.Client) -> object:
        names = [row["id"] for row in ok(client.get("/v1/models"))["data"]][1:]
        one = ok(client.get("/v1/adapters/s@1"))
        asked = {"model": "prod", "prompt": "Hello", "max_tokens": 8, "temperature": 0}
        headers = {"x-truffula-split-key": "me"}
        answer = client.post("/v1/completions", json=asked, headers=headers)
        return names, one["pinned"], one["generation"], ok(answer)["choices"], answer.headers["x-truffula-adapter"]

    with server_process(model, tmp_path / "state", keys) as (server, client):
        ok(client.post("/v1/adapters", json={"adapters": rows}))
        ok(client.put("/v1/adapter_aliases/prod", json={"targets": {"s@0": 1, "s@2": 1}}))
        before = seen(client)
        keys.write_text(written.format("ops") + written.format("new"))
        server.send_signal(signal.SIGHUP)
        until(lambda: client.get("/info", headers=OTHER).status_code == 200)
        server.kill()
        server.wait(60)
    with server_process(model, tmp_path / "state", keys) as (_, client):
        until(lambda: ok(client.get("/v1/adapters/s@1"))["status"] == "resident")
        assert seen(client) == before


def test_a_file_that_is_no_registry_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "adapters.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(ConfigError, match="--state-dir"):
        AdapterRegistry(tmp_path / "adapters.db")
    with sqlite3.connect(tmp_path / "newer.db") as newer:
        newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(ConfigError, match="its format is 99"):
        AdapterRegistry(tmp_path / "newer.db")


@pytest.mark.parametrize("damage", ["pages", "adapters", "aliases"])
def test_a_damaged_registry_ends_the_start_and_is_released(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "adapters.db"
    registry = AdapterRegistry(path)
    registry.add([AdapterRef(name="a@1", locator="/a")])
    registry.set_alias(Alias(name="b", targets={"a@1": 1.0}))
    registry.close()
    if damage == "pages":
        path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 65536)
    else:
        column = "ref" if damage == "adapters" else "alias"
        with closing(sqlite3.connect(path)) as db, db:
            db.execute(f"UPDATE {damage} SET {column} = '{{}}'")
    for _ in range(2):
        with pytest.raises(ConfigError, match="--state-dir") as found:
            AdapterRegistry(path)
        assert "another server" not in found.value.message


def test_hub_ids_keep_their_revisions() -> None:
    directory = AdapterDirectory(allow_hub=("org/*",))
    plain = directory.resolve("org/name@v1.0")
    assert plain is not None and (plain.kind, plain.locator, plain.revision) == ("hub", "org/name", "v1.0")
    directory.add(directory.locate("org/name@3", "org/other@abc"))
    three = directory.resolve("org/name")
    assert three is not None and (three.name, three.locator, three.revision) == ("org/name@3", "org/other", "abc")
    with pytest.raises(AdapterNotFound):
        directory.resolve("org/name@v1.0")
    directory.remove("org/name")
    assert directory.resolve("org/name@v1.0") == plain


def test_a_watched_folder(model: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """New, changed and removed adapters are seen by the next request, and listed within a second; a half-copied one is
    never served."""
    watched = tmp_path / "watched"
    watched.mkdir()
    with serving(model, adapter_dir=watched, adapters={"named": str(folders["3"])}, backend="auto") as live:
        names = lambda: [row["id"] for row in ok(live.client.get("/v1/models"))["data"]][1:]
        ask = lambda: live.post("/v1/completions", {"model": "new", "prompt": "Hello", "max_tokens": 4})
        assert names() == ["named"]
        half = watched / "new"
        half.mkdir()
        shutil.copy(folders["0"] / "adapter_config.json", half)
        assert_canonical_error(ask(), 400, "the adapter's weights are missing")
        whole = (folders["0"] / "adapter_model.safetensors").read_bytes()
        (half / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
        assert_canonical_error(ask(), 400)
        (half / "adapter_model.safetensors").write_bytes(whole)
        first = text(live, "new")
        until(lambda: "new" in names(), patience_s=1.5)
        replace_files(half, folders["3"])
        assert text(live, "new")[0] == text(live, "named")[0] != first[0]
        shutil.rmtree(half)
        assert_canonical_error(ask(), 404)
        until(lambda: "new" not in names(), patience_s=1.5)


@pytest.mark.slow
def test_ten_thousand_are_registered_and_listed_quickly(model: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    with open_server(model, folders, tmp_path) as live:
        measure_ten_thousand(live, folders)


def measure_ten_thousand(served: Live, folders: dict[str, Path]) -> None:
    started = time.monotonic()
    register(served, *((f"t{i:05}", folders[str(i % 3)]) for i in range(10_000)))
    registered = time.monotonic() - started
    started = time.monotonic()
    found = ok(served.client.get("/v1/adapters", params={"after": "t05000"}))
    listed = time.monotonic() - started
    print(f"registered 10,000 in {registered:.2f} s, a page of them in {listed * 1000:.0f} ms")
    assert len(found["data"]) == 100 and found["has_more"]


def test_zeros_are_refused_by_name(served: Live, folders: dict[str, Path], tmp_path: Path) -> None:
    zero = shutil.copytree(folders["0"], tmp_path / "zero")
    tensors = load_file(zero / "adapter_model.safetensors")
    save_file({name: 0 * one for name, one in tensors.items()}, zero / "adapter_model.safetensors")
    rows = {"adapters": [{"name": "zero", "source": str(zero)}], "load": True}
    assert_canonical_error(served.post("/v1/adapters", rows), 400, "changes nothing")


def test_a_request_for_one_generation_gets_it_or_learns_what_is_there(
    served: Live, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["0"], tmp_path / "mine")
    register(served, ("mine@7", folder), ("also", folders["1"]), load=True)
    old, other = show(served, "mine@7")["generation"], show(served, "also")["generation"]
    answer = text(served, "mine@7")
    for name in (f"mine@7@sha:{old}", f"mine@sha:{old[:12]}", f"mine@latest@sha:{old}", f"{MODEL}:mine@sha:{old}"):
        assert text(served, name) == answer
    ok(served.client.put("/v1/adapter_aliases/prod", json={"target": "mine@7"}))
    assert text(served, f"prod@sha:{old}") == answer

    def refused(name: str, status: int, words: str, **more) -> dict:
        return assert_canonical_error(
            served.post("/v1/completions", {"model": name, "prompt": "a", **more}), status, words
        )

    assert refused(f"mine@sha:{other}", 409, old)["code"] == "generation_mismatch", "another adapter's is not its own"
    refused(f"nope@sha:{old}", 404, "no model or adapter")
    refused(f"{MODEL}@sha:{old}", 404, "no model or adapter")
    refused("mine@sha:12", 400, "NAME@sha:GENERATION")
    refused(f"mine@sha:{old.upper()}", 400, "lower case")
    sum_of = {"ids": [f"mine@sha:{old}", "also"], "weights": [1, 0]}
    body = {"prompt": "Hello", "max_tokens": 12, "temperature": 0}
    assert ok(served.post("/v1/completions", body | {"merged_adapters": sum_of}))["choices"][0]["text"] == answer[0]
    ties = {"ids": [f"mine@sha:{old}", "also"], "merge_strategy": "ties", "density": 0.5}
    assert_canonical_error(served.post("/v1/completions", body | {"merged_adapters": ties}), 400, "leave @sha: out")
    ok(served.client.put("/v1/adapter_aliases/two", json={"targets": {"mine@7": 1, "also": 1}}))
    refused(f"two@sha:{old}", 400, "alias of several")
    for target in (f"mine@sha:{old}", f"mine@7@sha:{old}"):
        aliased = served.client.put("/v1/adapter_aliases/x", json={"target": target})
        assert_canonical_error(aliased, 400, "one generation")
        assert_canonical_error(act(served, target, "pin"), 400, "names a generation")
    # It is loaded if the files still are that generation, and served while it is in memory.
    ok(act(served, "mine@7", "unload"))
    assert text(served, f"mine@sha:{old}") == answer
    replace_files(folder, folders["2"])
    assert text(served, f"mine@sha:{old}") == answer
    changed = text(served, "mine@7")
    new = show(served, "mine@7")["generation"]
    both = {"merged_adapters": {"ids": ["mine", "also"]}, "prompt": "a", "max_tokens": 2}
    for fields, generation in (({}, new), (both, "+".join(sorted((new, other)))), ({"model": MODEL}, None)):
        for stream in (False, True):
            asked = {"model": MODEL if fields else "mine", "prompt": "a", "max_tokens": 2, "stream": stream, **fields}
            response = served.post("/v1/completions", asked)
            assert response.status_code == 200 and response.headers.get("x-truffula-generation") == generation
    assert changed != answer and text(served, f"mine@sha:{new}") == changed
    refused(f"mine@sha:{old}", 409, f"is generation {new} now")
    replace_files(folder, folders["0"])
    assert text(served, f"mine@sha:{old}") == answer


def test_of_two_that_register_a_name_one_wins(served: Live, folders: dict[str, Path]) -> None:
    """Also where both load it first: what requests get is what was registered."""
    for name, path, first, second, status in (
        (
            "r",
            "/v1/adapters",
            *({"adapters": [{"name": "r", "source": str(folders[n])}], "load": True} for n in "01"),
            409,
        ),
        ("q", "/v1/load_lora_adapter", *({"lora_name": "q", "lora_path": str(folders[n])} for n in "01"), 400),
    ):
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(lambda body, path=path: served.post(path, body), (first, second)))
        statuses = [one.status_code for one in found]
        assert sorted(statuses) == [200, status]
        winner = folders[str(statuses.index(200))]
        assert show(served, name)["source"] == str(winner)
        register(served, (f"as-{name}", winner))
        assert text(served, name)[0] == text(served, f"as-{name}")[0]


def test_an_alias_and_the_end_of_its_target_exclude_each_other(served: Live, folders: dict[str, Path]) -> None:
    for number in range(10):
        register(served, (f"t{number}", folders["0"]))
        with ThreadPoolExecutor(2) as threads:
            put = threads.submit(served.client.put, f"/v1/adapter_aliases/a{number}", json={"target": f"t{number}"})
            deleted = threads.submit(served.client.delete, f"/v1/adapters/t{number}")
        assert sorted([put.result().status_code, deleted.result().status_code]) == [200, 400]
