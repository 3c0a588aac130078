"""What was given and has no effect is listed in a header; what asks for nothing is not."""

import pytest
from live_server import MODEL, assert_canonical_error, ok

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
