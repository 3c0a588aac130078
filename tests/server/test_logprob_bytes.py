"""Log-probabilities where a character is split over tokens: ``bytes`` are each token's own, no alternative is lost.

The model is a chain: its next token follows from the last one, with alternatives of known order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_server import END, Live, events, serving, tokenizer, write_model
from openai import OpenAI

FACE = "🙂"
PARTS = [[0xF0, 0x9F], [0x99], [0x82]]  # of its three tokens


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False).ids


def chain(steps: dict[int, dict[int, float]]) -> dict[str, np.ndarray]:
    """Weights of a llama without attention and MLP: the head reads the last token off the embedding."""
    size = tokenizer().get_vocab_size()
    head = np.zeros((size, size), np.float32)
    for last, following in steps.items():
        for token, weight in following.items():
            head[token, last] = weight
    tensors = {"model.embed_tokens.weight": np.eye(size, dtype=np.float32), "lm_head.weight": head}
    tensors["model.norm.weight"] = tensors["model.layers.0.input_layernorm.weight"] = np.ones(size, np.float32)
    tensors["model.layers.0.post_attention_layernorm.weight"] = np.ones(size, np.float32)
    tensors["model.layers.0.self_attn.o_proj.weight"] = np.zeros((size, 16), np.float32)
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((size, 16), np.float32)
    return tensors


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """After "x" or a newline: 🙂, then "!", then the end. Of its first token, parts of characters are likely too."""
    face, end = ids_of(FACE), tokenizer().token_to_id(END)
    assert len(face) == len(PARTS)
    first = {face[0]: 1.0, face[1]: 0.9, face[2]: 0.8, ids_of("ф")[0]: 0.7, ids_of("a")[0]: 0.6}
    steps = {ids_of("x")[0]: first, ids_of("\n")[0]: first}
    for last, following in zip(face, [*face[1:], ids_of("!")[0]], strict=True):
        steps[last] = {following: 1.0}
    steps[ids_of("!")[0]] = {end: 1.0}
    size = tokenizer().get_vocab_size()
    shape = {"hidden_size": size, "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    folder = write_model(
        tmp_path_factory.mktemp("faces") / "model",
        intermediate_size=16,
        num_hidden_layers=1,
        tie_word_embeddings=False,
        extra=chain(steps),
        **shape,
    )
    with serving(folder, backend="auto", max_model_len=64) as live:
        yield live


def test_chat_bytes_are_each_tokens_own(faces: Live) -> None:
    (choice,) = faces.chat(max_tokens=8, logprobs=True, top_logprobs=4)["choices"]
    assert choice["message"]["content"] == FACE + "!"
    content = choice["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [*PARTS, [0x21]]
    assert "".join(entry["token"] for entry in content) == FACE + "!"
    first = content[0]["top_logprobs"]
    assert [top["bytes"] for top in first] == [*PARTS, [0xD1]]
    assert [top["token"] for top in first[1:]] == ["bytes:\\x99", "bytes:\\x82", "bytes:\\xd1"]
    for entry in content:
        assert {key: entry["top_logprobs"][0][key] for key in ("token", "bytes", "logprob")} == {
            key: entry[key] for key in ("token", "bytes", "logprob")
        }


@pytest.mark.parametrize("limit", [1, 2])
def test_a_character_cut_by_max_tokens(faces: Live, limit: int) -> None:
    (choice,) = faces.chat(max_tokens=limit, logprobs=True)["choices"]
    content = choice["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == PARTS[:limit]
    joined = bytes(byte for entry in content for byte in entry["bytes"])
    assert joined.decode(errors="replace") == choice["message"]["content"] == "\ufffd"


def test_a_streamed_chat_has_the_same_entries(faces: Live) -> None:
    body: dict[str, Any] = {"max_tokens": 8, "logprobs": True, "top_logprobs": 3}
    whole = faces.chat(**body)["choices"][0]["logprobs"]["content"]
    messages = [{"role": "user", "content": "Hello"}]
    response = faces.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "stream": True, **body})
    chunks = [choice for event in events(response)[:-1] for choice in event["choices"]]
    assert [entry for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]] == whole


def test_a_stop_string_takes_all_of_its_first_characters_tokens(faces: Live) -> None:
    (choice,) = faces.chat(max_tokens=8, logprobs=True, stop=[FACE])["choices"]
    assert (choice["message"]["content"], choice["logprobs"]["content"]) == ("", [])
    (choice,) = faces.chat(max_tokens=8, logprobs=True, stop=["!"])["choices"]
    assert [entry["bytes"] for entry in choice["logprobs"]["content"]] == PARTS


def test_the_openai_client_joins_the_bytes(faces: Live) -> None:
    client = OpenAI(base_url=f"{faces.url}/v1", api_key="none")
    messages: Any = [{"role": "user", "content": "Hello"}]
    answer = client.chat.completions.create(
        model="tiny/llama", messages=messages, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs is not None
    joined = bytes(byte for entry in answer.choices[0].logprobs.content or [] for byte in entry.bytes or [])
    assert joined.decode() == answer.choices[0].message.content == FACE + "!"


def test_completions_keep_an_entry_for_each_alternative(faces: Live) -> None:
    found = faces.completion(prompt="x", max_tokens=6, logprobs=5)["choices"][0]["logprobs"]
    assert "".join(found["tokens"]) == FACE + "!"
    assert found["text_offset"] == [0, 0, 0, 1]
    assert list(found["top_logprobs"][0]) == ["", "bytes:\\x99", "bytes:\\x82", "bytes:\\xd1", "a"]
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert len(top) == 5
        assert max(top, key=lambda name: top[name]) == token, "as evaluation harnesses look for the greedy token"
        assert top[token] == logprob
        assert sorted(top.values(), reverse=True) == list(top.values())


def test_completions_by_id_and_the_streamed_form(faces: Live) -> None:
    named = faces.completion(prompt="x", max_tokens=1, logprobs=5, return_tokens_as_token_ids=True)
    assert next(iter(named["choices"][0]["logprobs"]["top_logprobs"][0])) == f"token_id:{ids_of(FACE)[0]}"
    body = {"prompt": "x", "max_tokens": 6, "logprobs": 5, "temperature": 0}
    whole = faces.completion(**body)["choices"][0]["logprobs"]
    chunks = events(faces.post("/v1/completions", {**body, "stream": True}))[:-1]
    for name, values in whole.items():
        assert [v for c in chunks for v in (c["choices"][0]["logprobs"] or {name: []})[name]] == values


def test_an_echoed_prompt_names_the_chosen_token_once(faces: Live) -> None:
    body = {"prompt": f"x{FACE}", "max_tokens": 0, "echo": True, "logprobs": 2}
    found = faces.completion(**body)["choices"][0]["logprobs"]
    assert found["tokens"] == ["", "x", "", "", FACE]
    lists = (found[name][2:] for name in ("tokens", "token_logprobs", "top_logprobs"))
    for token, logprob, top in zip(*lists, strict=True):
        assert top[token] == logprob
        assert len(top) == 2
    assert list(found["top_logprobs"][2]) == ["", "bytes:\\x99"]


def test_alternatives_that_look_alike_have_an_entry_each(tmp_path: Path) -> None:
    """Ids without a token all have the text ""; so have the first parts of a character that is written."""
    size = tokenizer().get_vocab_size()
    first, others = ids_of("x")[0], [size + 1, size + 2, size + 3]
    extra = chain({first: {ids_of("a")[0]: 1.0}})
    wide = size + 4
    table = np.eye(wide, size, dtype=np.float32)
    head = np.zeros((wide, size), np.float32)
    head[ids_of("a")[0], first] = 1.0
    for rank, token in enumerate(others):
        head[token, first] = 0.9 - 0.1 * rank
    extra |= {"model.embed_tokens.weight": table, "lm_head.weight": head}
    folder = write_model(
        tmp_path / "wide",
        vocab_size=wide,
        hidden_size=size,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        num_hidden_layers=1,
        tie_word_embeddings=False,
        extra=extra,
    )
    with serving(folder, backend="auto", max_model_len=64) as live:
        top = live.completion(prompt="x", max_tokens=1, logprobs=4)["choices"][0]["logprobs"]["top_logprobs"][0]
        native = live.native("x", max_new_tokens=1, details=True, top_n_tokens=4)["details"]["top_tokens"][0]
    assert list(top) == ["a", "", f"token_id:{others[1]}", f"token_id:{others[2]}"]
    assert [entry["id"] for entry in native] == [ids_of("a")[0], *others]


def test_native_tokens_are_told_apart_by_id(faces: Live) -> None:
    parameters = {"max_new_tokens": 3, "details": True, "top_n_tokens": 3, "return_k_alternatives": 3}
    details = faces.native("x", **parameters)["details"]
    assert [token["text"] for token in details["tokens"]] == ["", "", FACE]
    assert [token["id"] for token in details["tokens"]] == ids_of(FACE)
    for listed in (details["top_tokens"][0], details["tokens"][0]["alternative_tokens"]):
        assert [entry["id"] for entry in listed] == ids_of(FACE)[:3]
