"""Whatever the Hub or the network does, a model or an adapter ends with one of our errors, in plain words."""

from __future__ import annotations

import errno
import importlib
import json
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import errors

from fake_hub import NOTHING, PARTS, environment, misbehaving_hub
from truffula.weights.hub import explain

# The library waits seconds between attempts; how often it tries is its own affair.
ASK = """
import json, sys, time
from pathlib import Path
from truffula.errors import TruffulaError
from truffula.lora.hub import download
from truffula.weights.sources import resolve_source

time.sleep = lambda seconds: None
cache = Path(sys.argv[1])
stages = []

def tell(stage, done, total):
    stages.append(stage)

def model(name):
    return resolve_source(name, cache_dir=cache, offline=False, progress=tell)

def adapter(name):
    return download(name, None, cache_dir=cache, offline=False, max_file_bytes=1000)

for ask in (model, adapter):
    for name in sys.argv[2:]:
        stages.clear()
        try:
            told = ["nothing", str(ask(name))]
        except TruffulaError as error:
            told = [error.code, error.message]
        except Exception as error:
            told = ["escaped", type(error).__name__]
        print(json.dumps([ask.__name__, name, *told, stages]), flush=True)
"""
Told = dict[tuple[str, str], tuple[str, str, list[str]]]

# What a user of each must read, and what of an adapter is said to its client.
CASES = {
    "org/missing": ("no such repository", "adapter_not_found"),
    "org/gated": ("hf auth login", "adapter_load_failed"),
    "org/status-401": ("denies access (HTTP 401)", "adapter_load_failed"),
    "org/status-403": ("denies access (HTTP 403)", "adapter_load_failed"),
    "org/status-404": ("has no repository or file of this name", "adapter_not_found"),
    "org/status-429": ("limits requests (HTTP 429)", "adapter_load_failed"),
    "org/status-500": ("answers HTTP 500", "adapter_load_failed"),
    "org/status-503": ("answers HTTP 503", "adapter_load_failed"),
    "org/garbage": ("does not respond like a Hub", "adapter_load_failed"),
    "org/cut": ("was lost", "adapter_load_failed"),
    "org/cut/model.gguf": ("was lost", None),
    "org/status-500/model.gguf": ("answers HTTP 500", None),
    "org/list": ("huggingface_hub failed (", "escaped"),
}


def ask(endpoint: str, cache: Path, *names: str) -> tuple[Told, str]:
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(cache), *names],
        env={**os.environ, **environment(endpoint)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row[0], row[1]): (row[2], row[3], row[4]) for row in rows}, done.stderr


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Told, str]:
    """All cases asked by one process: importing the library takes most of the time."""
    with misbehaving_hub() as endpoint:
        return ask(endpoint, tmp_path_factory.mktemp("hub"), *CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_model(told: tuple[Told, str], name: str) -> None:
    code, message, stages = told[0]["model", name]
    assert code == "model_not_found" and CASES[name][0] in message, message
    assert message.startswith(f"There is no file or folder {name!r} here.")
    assert not any(word in message for word in ("Got:", "could not be had", "secret", "..", "\n")), message
    assert stages.count("the Hub does not respond: retrying") <= 1


@pytest.mark.parametrize("name", [name for name, (_, code) in CASES.items() if code])
def test_an_adapter(told: tuple[Told, str], name: str) -> None:
    code, message, _ = told[0]["adapter", name]
    assert code == CASES[name][1], message
    if code != "escaped":  # what nothing knows is for the loading worker, which logs its traceback
        assert CASES[name][0] in message and name in message
        assert not any(word in message for word in ("127.0.0.1", "secret", "Got:", "..", "\n"))


def test_the_terminal_shows_our_words_and_only_unknown_errors_with_a_traceback(told: tuple[Told, str]) -> None:
    stderr = told[1]
    models = stderr.partition("Error while downloading")[0]  # adapters are fetched in a worker without a terminal
    assert "Retrying in" not in models and "thrown while requesting" not in models
    assert (
        stderr.count("downloading org/list from the Hub failed\nTraceback") == stderr.count(" from the Hub failed") == 1
    )


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    found, stderr = ask(NOTHING, tmp_path, "org/none", "org/none/x.gguf", "gpt2")
    for (kind, name), (code, message, stages) in found.items():
        if kind == "adapter" and name != "org/none":
            continue
        assert code == {"model": "model_not_found", "adapter": "adapter_load_failed"}[kind]
        assert "cannot be reached (Connection refused); check the network." in message
        assert (NOTHING in message) == (kind == "model"), "a client is not told where the operator fetches"
        assert stages in ([], ["the Hub does not respond: retrying"])
    assert stderr == ""


def raised(*chain: BaseException) -> BaseException:
    """The last of these, raised from the one before, and so on."""
    cause: BaseException | None = None
    for error in chain:
        error.__cause__ = cause
        cause = error
    assert cause is not None
    return cause


def of_client(name: str) -> Exception:
    """An error of the HTTP client that the installed library uses."""
    base = errors.HfHubHTTPError.__mro__[1]
    client = importlib.import_module(base.__module__.partition(".")[0])
    made: Exception = getattr(client, name)("words with https://user:secret@host")
    return made


@pytest.mark.parametrize(
    ("chain", "kind", "text"),
    [
        ([of_client("ReadTimeout")], "network", "does not respond in time"),
        ([TimeoutError(), of_client("ConnectTimeout")], "network", "does not respond in time"),
        ([socket.gaierror(-2, "Name or service not known"), of_client("ConnectError")], "network", "(Name or service"),
        (
            [OSError(errno.ENETUNREACH, "Network is unreachable"), of_client("ConnectError")],
            "network",
            "is unreachable)",
        ),
        ([ssl.SSLError(1, "certificate verify failed"), of_client("ConnectError")], "network", "(certificate verify"),
        ([of_client("ProxyError")], "network", "cannot be reached (ProxyError)"),
        ([ConnectionResetError(104, "reset"), of_client("ReadError")], "network", "was lost"),
        ([OSError("Consistency check failed: file should be of size 3")], "network", "was lost"),
        ([OSError(errno.ENOSPC, "No space left on device")], "storage", "cannot be stored: No space left on device"),
        ([PermissionError(errno.EACCES, "Permission denied")], "storage", "Permission denied"),
        ([errors.HFValidationError("words")], "repository", "does not allow this name"),
        ([errors.LocalEntryNotFoundError("words")], "network", "cannot be reached"),
        ([RuntimeError("words")], "unexpected", "(RuntimeError)"),
    ],
    ids=lambda value: type(value[-1]).__name__ if isinstance(value, list) else "",
)
def test_an_error_in_words(chain: list[BaseException], kind: str, text: str) -> None:
    found = explain(raised(*chain), offline=False)
    assert found.kind == kind and text in found.text
    assert "secret" not in found.text and "words" not in found.text and found.text[-1] != "."


def test_offline_is_not_taken_for_a_network_failure(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from truffula.lora.hub import download\n"
        "try: download('org/x', None, cache_dir=Path(sys.argv[1]), offline=True, max_file_bytes=9)\n"
        "except Exception as error: print(error.code, error)"
    )
    env = {**os.environ, **environment(NOTHING)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("adapter_load_failed ") and "offline mode" in done.stdout


def test_all_parts_of_a_split_model_are_downloaded(tmp_path: Path) -> None:
    first, second, whole = (f"org/split/{name}" for name in (PARTS[0], PARTS[1], "model.gguf"))
    with misbehaving_hub() as endpoint:
        found, _ = ask(endpoint, tmp_path, first, second, f"org/part/{PARTS[0]}")
        held = sorted(file.name for file in tmp_path.rglob("*.gguf"))
        other, _ = ask(endpoint, tmp_path / "other", whole)
    assert found["model", first][:2] == ("nothing", next(map(str, tmp_path.glob(f"*split/snapshots/*/{PARTS[0]}"))))
    assert held == sorted(Path(name).name for name in (*PARTS, *PARTS[:2])), "nothing else was downloaded"
    code, message, _ = found["model", second]
    assert (
        code == "model_not_found"
        and f"is part 2 of 3 of a split GGUF model; give the first part, {PARTS[0]}" in message
    )
    code, message, _ = found["model", f"org/part/{PARTS[0]}"]
    assert code == "model_not_found" and f"the repository has no file {PARTS[2]}" in message
    assert other["model", whole][0] == "nothing" and len([*tmp_path.glob("other/**/*.gguf")]) == 1
