"""What was given and has no effect is listed in a header; what asks for nothing is not."""

import pytest
from live_server import MODEL, assert_canonical_error, ok, serving

from truffula.server.lorax_bodies import TokenizeBody
from truffula.server.openai_bodies import ChatBody

HEADER = "x-truffula-ignored"
TALK = [{"role": "user", "content": "Hello", "unheard_of": 1}]


@pytest.mark.parametrize(
    ("extra", "listed"),
    [
        ({"api_token": "hf_x"}, "api_token"),
        ({"verbosity": "low"}, "verbosity"),
        ({"user": "me"}, "user"),
        ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"stream": True, "stream_options": {"include_usage": True, "bar": 1}}, "stream_options.bar"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ],
    ids=str,
)
def test_the_openai_side_lists_what_has_no_effect(live, extra, listed):
    response = live.post("/v1/chat/completions", {"messages": TALK, "max_tokens": 1, **extra})
    assert response.status_code == 200
    assert response.headers[HEADER] == listed


CALLS = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
HISTORY = [*TALK, {"role": "assistant", "content": "", "tool_calls": CALLS}, {"role": "tool", "content": "5"}, *TALK]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("extra", "listed"),
    [
        ({"documents": [{"text": "It is 21 degrees."}]}, "documents"),
        ({"messages": [{**TALK[0], "name": "ann"}]}, "messages.name"),
        ({"messages": HISTORY}, "messages.tool_calls"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"user": "me", "documents": [{"text": "d"}, {"text": "e"}]}, "user, documents"),
    ],
    ids=str,
)
def test_what_the_chat_template_does_not_use_is_listed(live, extra, listed, stream):
    response = live.post("/v1/chat/completions", {"messages": TALK, "max_tokens": 1, "stream": stream, **extra})
    assert response.status_code == 200
    assert response.headers[HEADER] == listed


@pytest.mark.parametrize(
    "extra",
    [
        {"documents": []},
        {"documents": None},
        {"chat_template_kwargs": {}},
        {"messages": [{"role": "system", "content": "Be kind."}, *TALK]},
        {"messages": [*TALK, {"role": "tool", "content": "5", "tool_call_id": "c1"}]},
        {"messages": [*TALK, {"role": "assistant", "content": "a", "tool_calls": None}, *TALK]},
    ],
    ids=str,
)
def test_what_the_chat_template_uses_is_not_listed(live, extra):
    response = live.post("/v1/chat/completions", {"messages": TALK, "max_tokens": 1, **extra})
    assert response.status_code == 200
    assert HEADER not in response.headers


def test_a_template_of_users_alone_loses_no_tool_result_in_silence(model_folder, tmp_path):
    template = tmp_path / "users.jinja"
    template.write_text("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}:")
    with serving(model_folder, chat_template=template, max_model_len=64) as users:
        response = users.post("/v1/chat/completions", {"messages": HISTORY, "max_tokens": 1})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "messages[2].content"
        assert "user message" in error["message"]
        assert users.post("/tokenize", {"messages": HISTORY}).status_code == 422
        system = [{"role": "system", "content": "Be kind."}, *TALK]
        response = users.post("/v1/chat/completions", {"messages": system, "max_tokens": 1})
        assert response.headers[HEADER] == "messages(role=system)"


def test_what_asks_for_nothing_is_not_listed():
    nothing = {"user": None, "api_token": None, "store": False, "metadata": {}, "parallel_tool_calls": True}
    more = {"tools": [], "spaces_between_special_tokens": True, "stream_options": {"include_obfuscation": False}}
    assert ChatBody.model_validate({"messages": TALK, **nothing, **more}).unknown() == []


def test_the_native_side_too(live):
    parameters = {"max_new_tokens": 1, "api_token": "hf_x"}
    response = live.post("/generate", {"inputs": "Hello", "parameters": parameters})
    ok(response)
    assert response.headers[HEADER] == "parameters.api_token"
    body = TokenizeBody.model_validate({"inputs": "a", "parameters": {"top_k": 3, "stop": [], "seed": None}})
    assert body.unknown() == ["parameters.top_k"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"inputs": "Hello"}),
        ("/tokenize", {"prompt": "Hello"}),
        ("/chat_tokenize", {"messages": [{"role": "user", "content": "Hi"}]}),
    ],
    ids=str,
)
def test_a_model_that_is_not_served_has_no_tokens(live, path, body):
    assert_canonical_error(live.post(path, {**body, "model": "nobody"}), 424, "nobody")
    for name in (MODEL, "pirate"):
        assert ok(live.post(path, {**body, "model": name}))
