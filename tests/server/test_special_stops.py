"""Stop strings that are or hold special tokens, and the end tokens that a server names, on every route."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from chained import ids_of, write_chained_model
from live_server import MODEL, Live, events, ok, serving

ROLE, END = 2, 1
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}Q"
STOPS = [  # stop, what is shown of "fox<|role|>lzy" before it and with it, tokens
    (["<|role|>"], "fox", "fox", 4),
    (["x<|role|>"], "fo", "fox", 4),
    (["<|role|>l"], "fox", "foxl", 5),
    (["zzz", "ole|>lz"], "fox", "foxlz", 6),
    (["z"], "foxl", "foxlz", 6),
]


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """After Q it writes fox<|role|>lzy<|end|>; only <|end|> is an end token."""
    written = [*ids_of("Qfox"), ROLE, *ids_of("lzy"), END]
    folder = tmp_path_factory.mktemp("speaker") / "model"
    model = write_chained_model(folder, written, eos=END, eos_token="<|end|>", chat_template=CHAT)
    with serving(model, backend="auto") as found:
        yield found


@pytest.mark.parametrize(("stop", "before", "through", "tokens"), STOPS)
def test_on_the_openai_routes(speaker: Live, stop: list[str], before: str, through: str, tokens: int) -> None:
    for include, text in ((False, before), (True, through)):
        body = {"max_tokens": 12, "stop": stop, "include_stop_str_in_output": include, "n": 2}
        answer = speaker.completion(prompt="aQ", **body)
        for choice in answer["choices"]:
            assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", stop[-1])
        frames = speaker.post(
            "/v1/completions",
            {"model": MODEL, "prompt": "aQ", "temperature": 0, "stream": True, **body}
            | {"stream_options": {"include_usage": True}},
        )
        parts = [frame for frame in events(frames) if frame != "[DONE]"]
        for index in (0, 1):
            own = [choice for part in parts for choice in part["choices"] if choice["index"] == index]
            assert "".join(choice["text"] for choice in own) == text
            assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["stop"]
        assert parts[-1]["usage"] == answer["usage"]
        assert answer["usage"]["completion_tokens"] == 2 * tokens
        message = speaker.chat("x", max_tokens=12, stop=stop, include_stop_str_in_output=include)["choices"][0]
        assert (message["message"]["content"], message["finish_reason"]) == (text, "stop")


@pytest.mark.parametrize(("stop", "before", "through", "tokens"), STOPS)
def test_on_the_native_routes_the_stop_text_stays(
    speaker: Live, stop: list[str], before: str, through: str, tokens: int
) -> None:
    parameters = {"max_new_tokens": 12, "stop": stop, "details": True}
    answer = ok(speaker.post("/generate", {"inputs": "aQ", "parameters": parameters}))
    assert (answer["generated_text"], answer["details"]["finish_reason"]) == (through, "stop_sequence")
    frames = events(speaker.post("/generate_stream", {"inputs": "aQ", "parameters": parameters}))
    assert frames[-1]["generated_text"] == through
    assert frames[-1]["details"]["finish_reason"] == "stop_sequence"
    assert frames[-1]["details"]["generated_tokens"] == answer["details"]["generated_tokens"] == tokens
    assert "".join(frame["token"]["text"] for frame in frames if not frame["token"]["special"]) == through


def test_special_tokens_that_are_asked_for_are_shown_up_to_the_stop(speaker: Live) -> None:
    body = {"prompt": "aQ", "max_tokens": 12, "skip_special_tokens": False}
    for stop, text in ((["z"], "fox<|role|>l"), (["<|role|>"], "fox"), (["e|>"], "fox<|rol")):
        assert speaker.completion(stop=stop, **body)["choices"][0]["text"] == text


def test_info_and_the_start_log_name_the_end_tokens(speaker: Live, caplog: pytest.LogCaptureFixture) -> None:
    (end,) = ok(speaker.client.get("/info"))["end_tokens"]
    assert end == {"id": END, "text": "<|end|>", "source": "tokenizer_config.json eos_token"}
    assert speaker.server.loading.app is not None
    with caplog.at_level(logging.INFO):
        speaker.server.loading.app.announce()
    assert "end tokens: <|end|> (1, tokenizer_config.json eos_token)" in caplog.text
