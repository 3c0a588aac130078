"""``list``, ``pull`` and ``ps``."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import here, truffula
from live_server import MODEL, Live, serving, write_model
from test_model_cache import cached

from truffula import __version__
from truffula.testing.adapters import write_tiny_adapter
from truffula.weights.packages import ALIASES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("ps") / "model")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Live]:
    leaf = write_tiny_adapter(model.parent / "leaf", model, rank=3)
    with serving(model, adapters={"leaf": str(leaf)}, api_keys=["hush"], protect_metrics=True) as live:
        yield live


def test_list_shows_aliases_models_and_adapters(tmp_path: Path) -> None:
    folder = cached(tmp_path, "org/folder", {"config.json": b"{}", "model.safetensors": b"123"})
    leaf = cached(tmp_path, "org/leaf", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"12"})
    done = here("list", "--json", "--cache-dir", str(tmp_path))
    rows = {row["name"]: (row["kind"], row["path"], row["nbytes"]) for row in json.loads(done.stdout)}
    aliases = {name: ("alias", None, model.nbytes) for name, model in ALIASES.items()}
    assert rows == aliases | {"org/folder": ("hub", str(folder), 5), "org/leaf": ("adapter", str(leaf), 4)}
    shown = here("list", TRUFFULA_CACHE_DIR=str(tmp_path)).stdout.splitlines()
    assert shown[0].split() == ["name", "kind", "size", "cached", "description"]
    states = {line.split()[0]: line.split()[4] for line in shown[1:]}
    assert states == {**dict.fromkeys(ALIASES, "no"), "org/folder": "yes", "org/leaf": "yes"}
    assert all(line == line.rstrip() and "\x1b" not in line for line in shown)


def test_pull_prints_only_the_path(model: Path, tmp_path: Path) -> None:
    folder = cached(tmp_path, "org/folder", {"config.json": b"{}", "model.safetensors": b"123"})
    assert here("pull", str(model)).stdout == f"{model}\n"
    done = truffula("pull", "org/folder", "--cache-dir", str(tmp_path), TRUFFULA_OFFLINE="1")
    assert (done.returncode, done.stdout) == (0, f"{folder}\n"), done.stderr
    for name in ("org/other", "smollm2"):
        done = here("pull", name, "--cache-dir", str(tmp_path / "empty"), TRUFFULA_OFFLINE="1")
        assert (done.returncode, done.stdout) == (1, "")
        assert "model_not_found" in done.stderr and name in done.stderr


def test_a_cache_that_is_a_file_is_refused(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for words in (["list"], ["pull", "smollm2"], ["generate", str(model), "hi"], ["serve", str(model), "--port", "0"]):
        done = here(*words, "--cache-dir", str(file))
        assert (done.returncode, done.stdout) == (1, "")
        assert f"--cache-dir is '{file}'; it must be a folder, or a path where one can be created." in done.stderr
    assert here("list", "--cache-dir", str(tmp_path / "new")).returncode == 0


def test_ps_shows_model_adapters_and_load(server: Live) -> None:
    port = server.url.rpartition(":")[2]
    found = json.loads(here("ps", "--port", port, "--api-key", "hush", "--json").stdout)
    assert (found["model"], found["version"], found["adapters"]) == (MODEL, __version__, ["leaf"])
    assert (found["running"], found["waiting"], found["adapters_resident"]) == (0, 0, 0)
    assert found["budget_bytes"] > found["kv_used_bytes"] == found["kv_cached_bytes"] == 0
    shown = here("ps", "--url", server.url, "--api-key", "hush").stdout
    assert f"model     {MODEL} (float32, cpu)\n" in shown and "0 running, 0 waiting\n" in shown
    assert "adapters  leaf; 0 in memory, 0 B\n" in shown


def test_ps_says_what_keeps_it_from_an_answer(server: Live) -> None:
    for words, said in (
        (["--url", server.url], "requires an API key: pass a valid one with --api-key"),
        (["--port", "9"], "No server answers at http://127.0.0.1:9"),
        (["--url", "http://[bad"], "No server answers at http://[bad"),
        (["--url", server.url, "--port", "9"], "give one of them"),
    ):
        done = here("ps", *words)
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_ps_of_another_server_says_so(tmp_path: Path) -> None:
    """LoRAX and TGI have these three routes too, with other metrics."""
    for path, text in (("info", '{"model_id": "m"}'), ("v1/models", '{"data": []}'), ("metrics", "up 1\n")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.01,))
        thread.start()
        try:
            done = here("ps", "--port", str(other.server_port))
            (tmp_path / "info").unlink()
            missing = here("ps", "--port", str(other.server_port))
        finally:
            other.shutdown()
            thread.join()
    assert done.returncode == 1 and "/info is not a truffula server's" in done.stderr
    assert missing.returncode == 1 and "404" in missing.stderr
