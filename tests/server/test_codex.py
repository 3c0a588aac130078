"""Codex: its own request bodies (recorded from 0.171; texts shortened, ids removed), and the CLI where it is installed.

Recorded against a model that Codex does not know, as every model here is one.
"""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from live_server import serving, write_model

BODIES = json.loads(Path(__file__).with_name("codex_bodies.json").read_text(encoding="utf-8"))
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "clients" / "codex.md").read_text(encoding="utf-8")
PACKAGE = "@openai/codex@0.171.0"
# What Codex reads of the stream (codex-rs, codex-api/src/sse/responses.rs); it skips all other events.
READ = {
    "response.created": {"response"},
    "response.output_item.added": {"item"},
    "response.output_item.done": {"item"},
    "response.output_text.delta": {"delta"},
    "response.completed": {"response"},
    "response.incomplete": {"response"},
}
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|role|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory, long_model_folder, adapter_folders):
    template = tmp_path_factory.mktemp("template") / "tools.jinja"
    template.write_text(TEMPLATE)
    named = {"pirate": str(adapter_folders["pirate"])}
    with serving(long_model_folder, adapters=named, backend="auto", chat_template=template) as found:
        yield found


def small(body):
    """``body`` without most of its tools, which would not fit into the tiny model's context."""
    tools = [{**tool, "parameters": {"type": "object"}} if "parameters" in tool else tool for tool in body["tools"]]
    for tool in tools:
        if tool["type"] == "namespace":
            tool["tools"] = [{**one, "parameters": {"type": "object"}} for one in tool["tools"]]
    return {**body, "tools": tools, "max_output_tokens": 8}


@pytest.mark.parametrize("name", list(BODIES))
def test_codex_own_bodies_are_answered_with_the_events_that_it_reads(served, name):
    with served.client.stream("POST", "/v1/responses", json=small(BODIES[name])) as response:
        text = response.read().decode()
    assert response.status_code == 200, text
    listed = set(response.headers["x-truffula-ignored"].split(", "))
    assert listed == {
        *("tools[8](type=web_search)", "reasoning.summary", "include(reasoning.encrypted_content)"),
        *("prompt_cache_key", "client_metadata"),
    }
    events = [json.loads(data) for data in re.findall(r"^data: (.*)$", text, re.MULTILINE)]
    for event in events:
        assert READ.get(event["type"], set()) <= set(event)
    assert events[0]["type"] == "response.created"
    ended = events[-1]["response"]
    assert ended["usage"]["input_tokens_details"]["cached_tokens"] >= 0
    assert ended["usage"]["output_tokens_details"]["reasoning_tokens"] == 0
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == ended["output"] and ended["model"] == "pirate"


def test_the_pages_configuration_names_a_provider_with_responses():
    (config,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    found = tomllib.loads(config)
    provider = found["model_providers"][found["model_provider"]]
    assert provider["wire_api"] == "responses" and provider["base_url"].endswith("/v1")


@pytest.fixture(scope="module")
def codex():
    """The CLI, installed with npm once and kept."""
    home = Path(__file__).resolve().parents[2] / ".venvs" / "codex"
    found = home / "node_modules" / ".bin" / "codex"
    npm = shutil.which("npm")
    if npm is None:
        pytest.fail("npm is not installed: install Node.js, with which this test installs the client that it runs")
    if not found.exists():
        home.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(home), PACKAGE]
        subprocess.run(command, check=True, capture_output=True, timeout=280)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_codex_answers_from_an_adapter(tmp_path_factory, tmp_path, adapter_folders, codex):
    ends = [1, *range(3, 200)]  # so that a model of random weights ends its answer soon
    model = write_model(tmp_path_factory.mktemp("wide") / "llama", max_position_embeddings=65536, eos_token_id=ends)
    template = tmp_path / "tools.jinja"
    template.write_text(TEMPLATE)
    (config,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    named = {"my-adapter": str(adapter_folders["pirate"])}
    with serving(model, adapters=named, backend="auto", chat_template=template) as live:
        home, folder = tmp_path / "home", tmp_path / "work"
        home.mkdir()
        folder.mkdir()
        (home / "config.toml").write_text(config.replace("http://127.0.0.1:8000", live.url))
        done = subprocess.run(
            [str(codex), "exec", "--skip-git-repo-check", "--json", "Which files are here?"],
            cwd=folder, env={**os.environ, "CODEX_HOME": str(home)}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [one for one in said if one["type"] == "turn.completed"], done.stdout[-3000:] + done.stderr[-3000:]
