"""Bodies as Claude Code sends them, and the CLI itself in the slow suite.

The bodies have the shapes of those of version 2.1.197, neutral texts and no secrets."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from live_server import ok, serving
from message_events import check_order, raw_events

from scripted import TEMPLATE, write_scripted_model

FOLDER = Path(__file__).with_name("claude_code")
BODIES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
HEADERS = {
    "authorization": "Bearer -",
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,thinking-token-count-2026-05-13,"
    "context-management-2025-06-27,prompt-caching-scope-2026-01-05,mid-conversation-system-2026-04-07,effort-2025-11-24",
    "anthropic-dangerous-direct-browser-access": "true",
    "user-agent": "claude-cli/2.1.197 (external, cli)",
    "x-app": "cli",
}


@pytest.fixture(scope="module")
def live(long_model_folder, adapter_folders):
    with serving(long_model_folder, adapters={"pirate": str(adapter_folders["pirate"])}, backend="auto") as found:
        yield found


def post(live, name, **changes):
    path = "/v1/messages/count_tokens" if name == "count_tokens" else "/v1/messages"
    response = live.client.post(f"{path}?beta=true", json={**BODIES[name], **changes}, headers=HEADERS)
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize("name", BODIES)
def test_every_body_is_answered(live, name):
    limit = {} if name in ("quota", "count_tokens") else {"max_tokens": 40}
    response = post(live, name, **limit)
    if BODIES[name].get("stream"):
        events = raw_events(response.content)
        check_order(events)
        assert events[0]["message"]["model"] == "pirate"
    elif name == "quota":
        assert ok(response)["usage"]["output_tokens"] == 1
    else:
        assert ok(response)["input_tokens"] > 10


def test_what_it_asks_for_in_vain_is_listed(live):
    listed = set(post(live, "tool_turn", max_tokens=4).headers["x-truffula-ignored"].split(", "))
    assert {"metadata", "messages.is_error"} <= listed
    assert not {name for name in listed if name.startswith(("system", "context", "cache", "stream"))}


def test_the_next_turn_finds_the_prompt_of_the_one_before_in_the_cache(live):
    """Although the billing header at its beginning is another one."""

    def usage(name):
        return raw_events(post(live, name, max_tokens=4).content)[-2]["usage"]

    first, second = usage("first_turn"), usage("tool_turn")
    whole = first["input_tokens"] + first["cache_read_input_tokens"]
    # all but the last words of the first prompt, which begin the answer, and the rest of a block
    assert second["cache_read_input_tokens"] >= whole - 48


def settings_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "clients" / "claude-code.md").read_text(encoding="utf-8")
    return json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])["env"]


def test_the_settings_of_the_page_lead_to_an_answer(live):
    """Every model that Claude Code may ask for is one of the server's."""
    settings = settings_of_the_page()
    models = {value for name, value in settings.items() if name.endswith("_MODEL")}
    headers = {**HEADERS, "authorization": f"Bearer {settings['ANTHROPIC_AUTH_TOKEN']}"}
    for model in models:
        body = {**BODIES["first_turn"], "model": model, "max_tokens": 4}
        response = live.client.post("/v1/messages?beta=true", json=body, headers=headers)
        assert raw_events(response.content)[0]["message"]["model"] == model


ARGUMENTS = ["--output-format", "stream-json", "--verbose", "--tools", "Bash", "--allowedTools", "Bash"]
PACKAGE = "@anthropic-ai/claude-code@2.1.197"
SCRIPTS = {
    "@list": ["<tool_call>\n", '{"name": "Bash", ', '"arguments": {"command": "ls"}}', "\n</tool_call>"],
    "@done": ["There ", "is one ", "file."],
}  # fmt: skip


@pytest.fixture(scope="module")
def claude():
    """The CLI, installed with npm once and kept."""
    home = Path(__file__).resolve().parents[2] / ".venvs" / "claude-code"
    found = home / "node_modules" / ".bin" / "claude"
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.fail("npm is not installed: install Node.js, with which this test installs the client that it runs")
    if not found.exists():
        home.mkdir(parents=True, exist_ok=True)
        install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(home), PACKAGE]
        subprocess.run(install, check=True, capture_output=True, timeout=280)
        script = home / "node_modules" / "@anthropic-ai" / "claude-code" / "install.cjs"
        subprocess.run([node, str(script)], check=True, capture_output=True, timeout=60)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_claude_code_calls_a_tool_and_answers(tmp_path, claude):
    """The model calls Bash, Claude Code runs the command and sends its output, the model answers."""
    question = "{{ '@done' if messages | selectattr('role', 'equalto', 'tool') | list else '@list' }}"
    template = TEMPLATE.replace("{{ messages[-1].content }}{% endif %}", question + "{% endif %}")
    model = write_scripted_model(tmp_path / "model", SCRIPTS, template, length=131_072)
    folder, home = tmp_path / "work", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    (folder / "notes.txt").write_text("buy trees")
    with serving(model, backend="auto", served_model_name="pirate", memory="4GiB") as live:
        settings = {**settings_of_the_page(), "ANTHROPIC_BASE_URL": live.url, "DISABLE_AUTOUPDATER": "1"}
        done = subprocess.run(
            [str(claude), "-p", "What is here?", *ARGUMENTS],
            cwd=folder, env={**os.environ, "HOME": str(home), **settings}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=800, check=False,
        )  # fmt: skip
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert said and said[-1]["type"] == "result", done.stdout[-3000:] + done.stderr[-3000:]
    assert (said[-1]["is_error"], said[-1]["result"]) == (False, "There is one file.")
    blocks = [block for one in said if one["type"] == "user" for block in one["message"]["content"]]
    assert [block["content"] for block in blocks if block["type"] == "tool_result"] == ["notes.txt"]
    assert said[-1]["usage"]["cache_read_input_tokens"] > 0
