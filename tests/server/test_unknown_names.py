"""An unknown model or adapter: one text for clients whatever the reason, which only the operator's log has."""

import logging
import re

import pytest
from live_server import assert_canonical_error, serving

from truffula.server import state

LOGGER = "truffula.server.state"


@pytest.fixture(scope="module")
def closed(model_folder, adapter_folders):
    """Names, a folder of adapters, and clients may name paths below one folder and Hub ids of one owner."""
    options = {
        "adapters": {"pirate": str(adapter_folders["pirate"])},
        "allow_hub": ("mine/*",),
        "allow_local": (adapter_folders["pirate"],),
    }
    with serving(model_folder, **options) as found:
        yield found


NAMES = [
    "gpt-4o",
    "org/private",
    "../etc/passwd",
    "/etc/passwd",
    "a b",
    "mine@x",
    "x" * 600,
    "a\nerror forged",
    "tiny/llama:x",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:20]))
def test_clients_are_told_the_same_whatever_the_reason(closed, name):
    shown = repr(name if len(name) <= 80 else name[:77] + "...")
    text = f"There is no model or adapter {shown}; GET /v1/models lists them."
    if name != "tiny/llama:x":
        for field in ("model", "adapter_id"):
            error = assert_canonical_error(closed.post("/v1/completions", {field: name, "prompt": "a"}), 404)
            assert (error["message"], error["param"], error["code"]) == (text, "model", "model_not_found")
    error = assert_canonical_error(closed.post("/generate", {"inputs": "a", "parameters": {"adapter_id": name}}), 424)
    assert error["error"] == f"Request failed during generation: {text}"


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("someone/thing", None, "--allow-hub 'someone/thing' or --allow-hub 'someone/*'"),
        ("gpt-4o-mini", None, "neither set with --adapter nor a subfolder of --adapter-dir, and it is not a Hub id"),
        ("no/where", "local", "it is not a path to an adapter below a folder that clients may name"),
        ("tab\tname", None, "printable characters"),
        ("tiny/llama:tiny", None, "reserved for the base model"),
    ],
    ids=str,
)
def test_the_operator_is_told_the_name_and_the_reason_once(closed, caplog, name, source, reason):
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(3):
            body = {"inputs": "a", "parameters": {"adapter_id": name, "adapter_source": source}}
            assert_canonical_error(closed.post("/generate", body), 424)
    (line,) = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert line.startswith(f"no model or adapter {name!r}: ")
    assert reason in line


def test_a_name_is_one_line_and_a_flood_of_names_is_bounded(closed, caplog, monkeypatch):
    monkeypatch.setattr(
        state, "MAX_LOGGED_NAMES", len(closed.server.loading.app.asgi.state.truffula.seen_not_found) + 3
    )
    with caplog.at_level(logging.WARNING, LOGGER):
        for i in range(20):
            name = f"{i}\n2026-01-01 error forged\x1b[31m\u2028" + "y" * 1000
            assert_canonical_error(closed.post("/v1/completions", {"model": name, "prompt": "a"}), 404)
    lines = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert len(lines) == 3
    assert lines[-1].endswith("further names are not logged)")
    for line in lines:
        assert line.isprintable()
        assert len(line) < 400
        assert re.match(r"no model or adapter '\d+\\n", line)
