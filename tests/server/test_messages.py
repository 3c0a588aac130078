"""/v1/messages over HTTP: what becomes of each field, and errors in Anthropic's form."""

import json
import re

import pytest
from live_server import MODEL, TEMPLATE, assert_canonical_error, ok, serving, write_model
from message_events import check_order, raw_events

from truffula.items import Message, Reasoning, Text, ToolCall, ToolResult
from truffula.server.messages_items import read_conversation

TALK = [{"role": "user", "content": "Hello"}]
BODY = {"model": MODEL, "max_tokens": 6, "messages": TALK, "temperature": 0}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "look_up", "input": {"word": "東京"}}
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "s"}
TWO_LINES = [{"type": "text", "text": "x"}] * 2
# Writes all that a conversation holds, so that the counts of tokens tell whether it was written.
TOOL_TEMPLATE = (
    "{% if tools %}<|role|>tools\n{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|role|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if m['reasoning_content'] %}[{{ m['reasoning_content'] }}]{% endif %}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{{ reasoning_effort or '' }}"
    "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("tools") / "llama", max_position_embeddings=2048)
    names = json.loads((folder / "tokenizer_config.json").read_text())
    assert names["chat_template"] == TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": TOOL_TEMPLATE}))
    with serving(folder, backend="auto") as found:
        yield found


def message(live, **body):
    return ok(live.post("/v1/messages", {**BODY, **body}))


def tokens_of(live, **body):
    """How many tokens the prompt of a conversation has."""
    return ok(live.post("/v1/messages/count_tokens", {"messages": TALK, **body}))["input_tokens"]


def rejected(response, status, kind, words):
    assert assert_canonical_error(response, status, words)["type"] == kind


def test_the_same_conversation_has_the_same_answer_on_both_sides(live):
    """Of OpenAI's route and this one: text, tokens and adapters."""
    for model in (MODEL, "pirate", "org/poet", None):
        ours = message(live, model=model, system="Be brief.")
        talk = [{"role": "system", "content": "Be brief."}, *TALK]
        theirs = ok(live.post("/v1/chat/completions", {**BODY, "model": model, "messages": talk}))
        assert ours["content"] == [{"type": "text", "text": theirs["choices"][0]["message"]["content"]}]
        usage = ours["usage"]
        prompt = usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
        assert (prompt, usage["output_tokens"]) == (theirs["usage"]["prompt_tokens"], 6)
        assert ours["model"] == theirs["model"]
        assert re.fullmatch("msg_[0-9a-f]{24}", ours["id"])
        assert prompt == tokens_of(live, system="Be brief.")


def test_strings_and_blocks_are_the_same(live):
    blocks = [{"role": "user", "content": [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}]}]
    given = message(live, messages=blocks, system=[{"type": "text", "text": "Be brief."}])
    assert given["content"] == message(live, system="Be brief.")["content"]


def test_stop_sequences(live):
    text = message(live)["content"][0]["text"]
    cut = message(live, stop_sequences=["never", text[2:4]])
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", text[2:4])
    assert cut["content"] == [{"type": "text", "text": text[:2]}]


def test_a_last_turn_of_the_assistant_is_continued(live):
    start = [*TALK, {"role": "assistant", "content": "The Lorax"}]
    theirs = {"messages": start, "continue_final_message": True, "add_generation_prompt": False}
    chat = ok(live.post("/v1/chat/completions", {**BODY, **theirs}))
    assert message(live, messages=start)["content"][0]["text"] == chat["choices"][0]["message"]["content"]


def test_max_tokens_beyond_the_context_window_are_cut(live):
    """Claude Code asks for 32,000 whatever the model's length is."""
    found = message(live, max_tokens=32_000)
    assert found["stop_reason"] in ("model_context_window_exceeded", "end_turn", "stop_sequence")
    assert found["usage"]["output_tokens"] <= 160
    rejected(
        live.post("/v1/messages", {**BODY, "messages": [{"role": "user", "content": "東京" * 400}]}),
        400, "invalid_request_error", "prompt is too long: ",
    )  # fmt: skip


def test_a_stream_has_named_events(live):
    response = live.post("/v1/messages?beta=true", {**BODY, "stream": True})
    found = raw_events(response.content)
    check_order(found)
    names = [event["type"] for event in found]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(event["delta"]["text"] for event in found if event["type"] == "content_block_delta")
    assert [{"type": "text", "text": text}] == message(live)["content"]
    assert response.headers["content-type"] == "text/event-stream"


def test_a_large_body_is_read_in_another_process(live):
    """It holds blocks that no prompt has; the answer is that to the small body."""
    opaque = {"type": "redacted_thinking", "data": "x" * 100_000}
    talk = [*TALK, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}, *TALK]
    large = [TALK[0], {"role": "assistant", "content": [opaque, {"type": "text", "text": "a"}]}, TALK[0]]
    response = live.post("/v1/messages", {**BODY, "messages": large, "system": "s", "stop_sequences": ["never"]})
    assert ok(response)["content"] == message(live, messages=talk, system="s")["content"]
    assert response.headers["x-truffula-ignored"] == "messages.redacted_thinking"
    assert tokens_of(live, messages=large) == tokens_of(live, messages=talk)
    stream = live.post("/v1/messages", {**BODY, "messages": large, "stream": True})
    check_order(raw_events(stream.content))
    too_long = [{"role": "user", "content": "Hello " * 20_000}]
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        body = {"messages": too_long, "max_tokens": 5} if path == "/v1/messages" else {"messages": too_long}
        rejected(live.post(path, body), 400, "invalid_request_error", "prompt is too long: ")


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("user", "a"), ("user", "b")], [Message(role="user", items=[Text("a"), Text("b")])]),
        (
            [("system", "s"), ("user", "a"), ("system", "t"), ("user", "b")],
            [
                Message(role="system", items=[Text("top"), Text("s")]),
                Message(
                    role="user",
                    items=[Text("a"), Text("<system-reminder>\nt\n</system-reminder>"), Text("b")],
                ),
            ],
        ),
        (
            [
                ("user", "a"),
                ("assistant", [THOUGHT, {"type": "text", "text": "t"}]),
                ("assistant", [CALL, {**CALL, "id": "toolu_2"}]),
                (
                    "user",
                    [
                        {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no", "is_error": True},
                        {"type": "tool_result", "tool_use_id": "toolu_1", "content": TWO_LINES},
                        {"type": "text", "text": "and"},
                    ],
                ),
                ("user", "b"),
            ],
            [
                Message(role="user", items=[Text("a")]),
                Message(
                    role="assistant",
                    items=[
                        Reasoning("hm"),
                        Text("t"),
                        ToolCall("toolu_1", "look_up", '{"word": "東京"}'),
                        ToolCall("toolu_2", "look_up", '{"word": "東京"}'),
                    ],
                ),
                Message(role="tool", items=[ToolResult("toolu_2", "no", "look_up", True)]),
                Message(role="tool", items=[ToolResult("toolu_1", "x\nx", "look_up")]),
                Message(role="user", items=[Text("and"), Text("b")]),
            ],
        ),
        ([("user", "a"), ("assistant", "")], [Message(role="user", items=[Text("a")])]),
    ],
    ids=["turns", "system", "tools", "empty prefill"],
)  # fmt: skip
def test_items(turns, expected):
    system = "top" if turns[0][0] == "system" else None
    found = read_conversation(system, [{"role": role, "content": content} for role, content in turns])
    assert found.messages == expected
    assert not found.continues


@pytest.mark.parametrize(
    "system",
    [
        "x-anthropic-billing-header: cc_version=2.1.100.7b4; cc_entrypoint=cli; cch=eb6c6;\nBe brief.",
        [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.154.d6e; cc_entrypoint=cli; cch=1;"},
            {"type": "text", "text": "Be brief."},
        ],
    ],
    ids=["line", "block"],
)
def test_claude_codes_billing_header_is_no_part_of_the_prompt(system):
    plain = read_conversation("Be brief.", TALK)
    assert read_conversation(system, TALK).messages == plain.messages
    inside = "See x-anthropic-billing-header: 1"
    assert read_conversation(inside, TALK).messages[0].items == [Text(inside)]


def test_tools_and_thinking_reach_the_template(with_tools):
    tool = {"name": "look_up", "description": "Looks a word up.", "input_schema": {"type": "object"}}
    plain = tokens_of(with_tools)
    assert tokens_of(with_tools, tools=[tool]) > plain + 40
    assert tokens_of(with_tools, thinking={"type": "disabled"}) > plain
    assert tokens_of(with_tools, output_config={"effort": "high"}) > plain
    turns = [*TALK, {"role": "assistant", "content": [CALL]}]
    turns.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "a city"}]})
    ok(with_tools.post("/v1/messages", {**BODY, "messages": turns, "tools": [tool]}))
    thought = {"type": "thinking", "thinking": "A long thought about it.", "signature": "anything"}
    turns[1]["content"].insert(0, thought)
    with_thought = tokens_of(with_tools, messages=turns)
    del turns[1]["content"][0]
    assert with_thought > tokens_of(with_tools, messages=turns) + 10


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"messages": []}, "messages is an empty list"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 'messages[0].role is "robot"; it must be user'),
        ({"messages": [{"role": "user"}]}, "messages[0].content is null; it must be a string or a list of blocks"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0] is 5; it must be an object"),
        ({"messages": ["a"]}, "messages[0]: should be an object"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text is null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            'messages[0].content[0].tool_use_id is "x"; no tool_use block before it has this id',
        ),
        ({"messages": [*TALK, {"role": "assistant", "content": [CALL]}]}, "its tool_result must follow"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages has no turn of the user"),
        ({"system": [{"type": "image"}]}, 'system[0] is a block of type "image"'),
        ({"system": 5}, "system: should be"),
        ({"max_tokens": None}, "max_tokens: "),
        ({"max_tokens": 0}, "max_tokens: should be greater than or equal to 1, got 0"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stop_sequences": [""]}, "stop_sequences has an empty string"),
        ({"stop_sequences": ["a"] * 1000}, "stop_sequences has 1000 items"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema is null; it must be an object, a JSON Schema"),
        ({"tools": [{"name": "", "input_schema": {}}]}, 'tools[0].name is ""'),
        ({"tools": [{"name": "f", "input_schema": {}}] * 2}, "an earlier tool has this name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice has the type 'any', and tools has no such tool"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice has the name 'f', and tools has no such tool"),
        ({"tool_choice": {"type": "must"}}, "tool_choice.type"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens is required"),
        ({"thinking": {"type": "enabled", "budget_tokens": 6}}, "it must be below max_tokens, which is 6"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0]"),
        ({"model": "robin"}, "There is no model or adapter 'robin'"),
        ({"stop": ["a"]}, "stop has no effect on /v1/messages; use stop_sequences"),
        ({"max_completion_tokens": 5}, "use max_tokens"),
        ({"n": 2}, "n has no effect on /v1/messages"),
        ({"suffix": "x"}, "suffix has no effect on /v1/messages; it is a field of /v1/completions"),
        ({"adapter_id": "pirate", "model": "org/poet"}, "model names one adapter and adapter_id another"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_field_that_is_wrong_is_named(live, extra, words, stream):
    status, kind = (404, "not_found_error") if "robin" in words else (400, "invalid_request_error")
    rejected(live.post("/v1/messages", {**BODY, "stream": stream, **extra}), status, kind, words)


def test_errors_of_other_routes_have_the_same_form_for_its_clients(live):
    rejected(live.client.get("/v1/messages"), 405, "invalid_request_error", "use POST")
    rejected(live.post("/v1/messages/batches", {}), 404, "not_found_error", "Message Batches")
    rejected(live.client.post("/v1/messages", content=b"x" * 3_000_000), 413, "request_too_large", "larger")
    for path, words in (("/v1/models/robin", "robin"), ("/v1/nothing", "no route")):
        response = live.client.get(path, headers={"anthropic-version": "2023-06-01"})
        assert response.status_code == 404 and response.headers["request-id"]
        assert response.json()["error"]["type"] == "not_found_error" and words in response.json()["error"]["message"]
    assert "request-id" in live.post("/v1/messages", BODY).headers


def test_keys_in_either_header(model_folder):
    with serving(model_folder, backend="auto", api_keys=("k1", "k2"), max_waiting=1, max_running=1) as guarded:
        for headers in ({}, {"x-api-key": "k3"}, {"authorization": "Bearer k"}, {"x-api-key": ""}):
            response = guarded.client.post("/v1/messages", json=BODY, headers=headers)
            rejected(response, 401, "authentication_error", "x-api-key")
        for headers in (
            {"x-api-key": "k1"},
            {"authorization": "Bearer k2"},
            {"x-api-key": "k1", "authorization": "Bearer of another server"},
        ):
            ok(guarded.client.post("/v1/messages", json=BODY, headers=headers))
        ok(guarded.client.get("/v1/models", headers={"x-api-key": "k2"}))


def test_models_in_pages(live):
    def page(**query):
        return ok(live.client.get("/v1/models", params=query, headers={"anthropic-version": "2023-06-01"}))

    whole = page()
    ids = [model["id"] for model in whole["data"]]
    assert ids[0] == MODEL and "pirate" in ids and len(ids) >= 4
    assert (whole["first_id"], whole["last_id"], whole["has_more"]) == (ids[0], ids[-1], False)
    first = page(limit=2)
    assert ([m["id"] for m in first["data"]], first["has_more"]) == (ids[:2], True)
    rest = page(limit=1000, after_id=ids[1])
    assert ([m["id"] for m in rest["data"]], rest["has_more"]) == (ids[2:], False)
    before = page(limit=1, before_id=ids[2])
    assert ([m["id"] for m in before["data"]], before["has_more"]) == (ids[1:2], True)
    assert page(after_id=ids[-1])["data"] == []
    for query, words in (({"limit": "x"}, "limit is 'x'"), ({"after_id": "robin"}, "after_id is 'robin'")):
        response = live.client.get("/v1/models", params=query, headers={"anthropic-version": "2023-06-01"})
        assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_what_has_no_effect_is_listed(live):
    talk = [
        *TALK,
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "a"}]},
        {"role": "user", "content": [{"type": "text", "text": "b", "citations": [{"type": "char_location"}]}]},
    ]
    body = {**BODY, "messages": talk, "thinking": {"type": "disabled", "block_binding": {"a": 1}}, "novel": 1}
    listed = live.post("/v1/messages", body).headers["x-truffula-ignored"].split(", ")
    assert {"messages.redacted_thinking", "messages.citations", "thinking.block_binding", "novel"} <= set(listed)
    neutral = {
        "metadata": {}, "service_tier": "auto", "speed": "standard", "cache_control": {"type": "ephemeral"},
        "container": None, "mcp_servers": [], "tools": [], "diagnostics": None, "tool_choice": {"type": "auto"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    }  # fmt: skip
    assert "x-truffula-ignored" not in live.post("/v1/messages", {**BODY, **neutral}).headers
