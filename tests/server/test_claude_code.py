"""Bodies as Claude Code sends them, of its version 2.1.154: recorded shapes, with neutral texts and without secrets."""

import json
import re
from pathlib import Path

import pytest
from live_server import ok, serving
from message_events import check_order, raw_events

FOLDER = Path(__file__).with_name("claude_code")
BODIES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
HEADERS = {
    "authorization": "Bearer -",
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,adaptive-thinking-2026-01-28,context-management-2025-06-27,"
    "prompt-caching-scope-2026-01-05,effort-2025-11-24",
    "anthropic-dangerous-direct-browser-access": "true",
    "user-agent": "claude-cli/2.1.154 (external, cli)",
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


def test_the_settings_of_the_page_lead_to_an_answer(live):
    """Every model that Claude Code may ask for is one of the server's."""
    page = (Path(__file__).parents[2] / "docs" / "clients" / "claude-code.md").read_text(encoding="utf-8")
    settings = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])["env"]
    assert settings["ANTHROPIC_BASE_URL"] in page.replace(json.dumps(settings["ANTHROPIC_BASE_URL"]), "")
    models = {value for name, value in settings.items() if name.endswith("_MODEL")}
    headers = {**HEADERS, "authorization": f"Bearer {settings['ANTHROPIC_AUTH_TOKEN']}"}
    for model in models:
        body = {**BODIES["first_turn"], "model": model, "max_tokens": 4}
        response = live.client.post("/v1/messages?beta=true", json=body, headers=headers)
        assert raw_events(response.content)[0]["message"]["model"] == model
