"""``/v1/chat/completions``, field by field."""

import pytest
from live_server import MODEL, assert_canonical_error, events, ok, tokenizer

TALK = [{"role": "user", "content": "Hello"}]


def test_the_answers_shape(live):
    answer = live.chat(max_tokens=5)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == MODEL
    assert isinstance(answer["system_fingerprint"], str)
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert "tool_calls" not in choice["message"]
    assert choice["logprobs"] is None
    assert choice["finish_reason"] in ("stop", "length")
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]


def test_the_template_is_what_a_completion_of_its_text_would_be(live):
    text = "<|role|>user\nHello<|end|><|role|>assistant\n"
    prompt = tokenizer().encode(text, add_special_tokens=False).ids
    answer = live.chat(max_tokens=6, return_token_ids=True)
    assert answer["prompt_token_ids"] == prompt
    assert (
        answer["choices"][0]["message"]["content"] == live.completion(prompt=prompt, max_tokens=6)["choices"][0]["text"]
    )


def test_what_fits_is_the_default_limit(live):
    answer = live.chat(ignore_eos=True)
    assert answer["usage"]["total_tokens"] == live.service.info.max_model_len


def test_max_completion_tokens_wins(live):
    assert live.chat(max_tokens=9, max_completion_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3


def test_logprobs_spell_the_content(live):
    (choice,) = live.chat(max_tokens=6, logprobs=True, top_logprobs=2)["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    raw = bytes(byte for entry in content for byte in entry["bytes"])
    assert raw.decode(errors="replace") == choice["message"]["content"]
    for entry in content:
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"], "greedy takes the most likely"
    (choice,) = live.chat(max_tokens=6, logprobs=True)["choices"]
    assert all(entry["top_logprobs"] == [] for entry in choice["logprobs"]["content"])


def test_forms_of_messages(live):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    for messages in (
        [{"role": "user", "content": parts}],
        [{"role": "developer", "content": "Be kind."}, *TALK],
        [
            {"role": "user", "content": "Hi", "name": "ann"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "5", "tool_call_id": "c1"},
        ],
        [{"role": "assistant", "content": "", "refusal": None}, *TALK],
    ):
        ok(live.post("/v1/chat/completions", {"messages": messages, "max_tokens": 2}))


def test_parts_of_text_are_joined_by_line_breaks_as_by_the_offline_api(live):
    parts = [
        {"type": "text", "text": "Hel"},
        {"type": "input_text", "text": "lo"},
        {"type": "refusal", "refusal": "no"},
    ]
    for spelt in (parts, "Hel\nlo\nno"):
        body = {"messages": [{"role": "user", "content": spelt}], "return_token_ids": True, "max_tokens": 1}
        found = ok(live.post("/v1/chat/completions", body))["prompt_token_ids"]
        assert found == ok(live.post("/tokenize", {"messages": body["messages"]}))["tokens"]
        if spelt is parts:
            joined = found
    assert found == joined


def test_continuing_the_last_message(live):
    messages = [*TALK, {"role": "assistant", "content": "The Lorax"}]
    body = {
        "messages": messages,
        "continue_final_message": True,
        "max_tokens": 4,
        "temperature": 0,
        "return_token_ids": True,
    }
    answer = ok(live.post("/v1/chat/completions", body))
    text = tokenizer().decode(answer["prompt_token_ids"], skip_special_tokens=False)
    assert text.endswith("<|role|>assistant\nThe Lorax")


def test_a_stream_says_the_same_with_one_role_per_choice(live):
    body = {"model": MODEL, "messages": TALK, "temperature": 1, "seed": 3, "max_tokens": 9, "n": 2, "logprobs": True}
    whole = ok(live.post("/v1/chat/completions", body))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, done = events(live.post("/v1/chat/completions", {**body, **options}))
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["delta"] == {}
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert all("role" not in c["delta"] and c["finish_reason"] is None for c in mine[1:-1])
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        streamed = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert [e["token"] for e in streamed] == [e["token"] for e in choice["logprobs"]["content"]]


def test_the_dialect_of_text_generation(live):
    body = {"model": "tgi", "messages": TALK, "max_tokens": 3, "stream": True}
    *chunks, done = events(live.post("/v1/chat/completions", body))
    assert done == "[DONE]"
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert choice["delta"]["role"] == "assistant"
        assert choice["delta"]["tool_calls"] is None
        assert "logprobs" in choice
        assert isinstance(chunk["system_fingerprint"], str)


@pytest.mark.parametrize("name", ["", "tgi", "dummy", None, MODEL])
def test_words_for_the_base(live, name):
    body = {"model": name, "messages": TALK, "max_tokens": 4, "temperature": 0}
    answer = ok(live.post("/v1/chat/completions", body))
    assert answer["choices"][0]["message"]["content"] == live.chat(max_tokens=4)["choices"][0]["message"]["content"]
    assert answer["model"] == (name or MODEL)


@pytest.mark.parametrize("name", ["pirate", "org/poet", "in-dir"])
def test_adapters_by_name_and_in_every_spelling(live, name):
    def text(**body):
        answer = ok(live.post("/v1/completions", {"prompt": "Hello", "max_tokens": 8, "temperature": 0, **body}))
        return answer["choices"][0]["text"]

    base = text(model=MODEL)
    adapted = text(model=name)
    assert adapted != base
    assert text(model=f"{MODEL}:{name}") == adapted
    assert text(model=MODEL, lora_path=name) == adapted


@pytest.mark.parametrize(
    "name", ["nobody", "org/nobody", "../pirate", "pirate/../pirate", f"{MODEL}:nobody", "/etc", "n\u00e4me\r\n"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_never_the_base(live, name, stream):
    body = {"model": name, "messages": TALK, "stream": stream}
    error = assert_canonical_error(live.post("/v1/chat/completions", body), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "user"}, {"role": "robot", "content": "a"}]}, "messages[1].role"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}
                ]
            },
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": TALK, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": TALK, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": TALK, "logprobs": 5}, "logprobs"),
        ({"messages": TALK, "max_tokens": 0}, "max_tokens"),
        ({"messages": TALK, "max_completion_tokens": -1}, "max_completion_tokens"),
        ({"messages": TALK, "continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"messages": TALK, "tool_choice": "required"}, "tool_choice"),
        ({"messages": TALK, "functions": [{"name": "f"}]}, "functions"),
        ({"messages": TALK, "response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"messages": TALK, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": TALK, "modalities": ["audio"]}, "modalities"),
        ({"messages": TALK, "echo": True}, "echo"),
    ],
    ids=lambda value: str(value)[:70] if isinstance(value, dict) else value,
)
def test_bad_values_are_refused_by_name(live, body, param):
    error = assert_canonical_error(live.post("/v1/chat/completions", {"model": MODEL, **body}), 400)
    assert error["param"] == param


def test_a_template_that_refuses(live):
    error = assert_canonical_error(
        live.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "RAISE"}]}), 400
    )
    assert error["code"] == "template_error"
    assert "no such talk" in error["message"]


def test_a_limit_on_n(live):
    error = assert_canonical_error(live.post("/v1/chat/completions", {"messages": TALK, "n": 10**9}), 400)
    assert error["param"] == "n"
