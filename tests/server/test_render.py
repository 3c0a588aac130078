"""A rendered request has the token ids that the model would read."""

from __future__ import annotations

from typing import Any

import pytest
from live_server import MODEL, Live, assert_canonical_error, ok

TALK = [{"role": "user", "content": "Hello"}]


def test_a_rendered_chat_is_the_prompt_of_the_chat(live: Live) -> None:
    body = {"model": "pirate", "messages": TALK, "max_tokens": 2, "stop": ["x"], "logit_bias": {"5": 1}}
    found = ok(live.post("/v1/chat/completions/render", body))
    answered = ok(live.post("/v1/chat/completions", {**body, "return_token_ids": True}))
    assert found["token_ids"] == answered["prompt_token_ids"]
    assert (found["model"], found["features"]) == ("pirate", None)
    assert found["sampling_params"] == {"max_tokens": 2, "stop": ["x"], "logit_bias": {"5": 1.0}}
    assert found["request_id"]


def test_each_prompt_is_rendered(live: Live) -> None:
    found = ok(live.post("/v1/completions/render", {"model": MODEL, "prompt": ["Hello", "The trees"]}))
    assert [one["token_ids"] for one in found] == [
        ok(live.post("/tokenize", {"prompt": text}))["tokens"] for text in ("Hello", "The trees")
    ]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions/render", {"messages": []}, "messages"),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, None),
        ("/v1/chat/completions/render", {"messages": TALK, "n": 10**9}, "n"),
        ("/v1/completions/render", {"prompt": "a " * 5000}, "prompt"),
    ],
)
def test_what_would_be_refused_is_refused_here_too(live: Live, path: str, body: dict[str, Any], param: str) -> None:
    error = assert_canonical_error(live.post(path, body), 400)
    assert error["param"] == (param or "messages[0].content[0]")
