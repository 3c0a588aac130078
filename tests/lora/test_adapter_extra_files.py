"""The other files of an adapter's folder: warnings for the operator, or an error where the base cannot serve them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kernel_backends import SINGLE
from lora_bases import llama_sites, validate
from served import write_model

from truffula.errors import AdapterError
from truffula.lora.extra_files import plain_name
from truffula.lora.peft import BaseFacts, inspect_adapter, validate_adapter
from truffula.testing.adapters import write_tiny_adapter

VOCAB = next(site.out_features for site in llama_sites() if site.kind == "head")


def written(folder: Path, files: dict[str, object], **config: object) -> Path:
    write_tiny_adapter(folder, llama_sites(), **config)  # type: ignore[arg-type]
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer.json": {}}, ["tokenizer.json"]),
        ({"chat_template.jinja": "{{ messages }}"}, ["chat_template.jinja"]),
        ({"tokenizer_config.json": {"chat_template": "x"}}, ["tokenizer_config.json", "chat_template in"]),
        ({"added_tokens.json": {"<x>": VOCAB - 1}}, ["added_tokens.json"]),
        ({"tokenizer_config.json": "[1, broken"}, ["tokenizer_config.json"]),
    ],
    ids=str,
)
def test_unused_text_files_are_warned_of(tmp_path: Path, files: dict[str, object], words: list[str]) -> None:
    folder = written(tmp_path, files)
    warnings = validate_adapter(folder, llama_sites(), base=BaseFacts("tiny"), own_texts=False).warnings
    assert len(warnings) == len(words)
    assert all(word in warning and "not used" in warning for word, warning in zip(words, warnings, strict=True))
    assert validate(folder).warnings == inspect_adapter(folder).warnings == ()
    (row,) = [row for row in inspect_adapter(folder).rows if row.field == "texts"]
    assert (row.value, row.verdict) == (", ".join(files), "serve")


def test_added_tokens_of_an_adapter_whose_tokenizer_is_not_used_must_be_known(tmp_path: Path) -> None:
    from served_base import Served

    model = write_model(tmp_path / "model")
    served = Served(model, SINGLE["reference"])
    for text, known in (("<|role|>", True), ("née token", True), ("<new>", False)):
        folder = tmp_path / text.strip("<|>")
        write_tiny_adapter(folder, model)
        (folder / "added_tokens.json").write_text(json.dumps({text: 300}))
        asked: dict[str, Any] = {"base": BaseFacts("b", served.weights), "own_texts": False}
        if known:
            assert "not used" in validate_adapter(folder, served.program.sites, **asked).warnings[-1]
        else:
            with pytest.raises(AdapterError, match=r"adds token 300, '<new>'.*serve it from a folder"):
                validate_adapter(folder, served.program.sites, **asked)


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": {"<a>": 3, "<b>": VOCAB}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"0": {}, str(VOCAB + 7): {"content": "<b>"}}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"9" * 5000: {}}}},
    ],
    ids=lambda files: str(files)[:80],
)
def test_tokens_the_base_has_no_row_for_are_refused(tmp_path: Path, files: dict[str, object]) -> None:
    folder = written(tmp_path, files)
    with pytest.raises(AdapterError) as caught:
        validate(folder)
    assert caught.value.param == next(iter(files)) and str(VOCAB) in caught.value.message
    report = inspect_adapter(folder, llama_sites(), BaseFacts("tiny-base"))
    assert report.error is not None and report.error.code == "adapter_invalid"


SNAPSHOT = f"/cache/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/{'0' * 40}"


@pytest.mark.parametrize(
    ("named", "served", "differ"),
    [
        ("Qwen/Qwen2.5-3B", "HuggingFaceTB/SmolLM2-135M", True),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B-Instruct", True),
        ("Qwen/Qwen2.5-3B", SNAPSHOT, True),
        ("HuggingFaceTB/SmolLM2-135M", SNAPSHOT, False),
        ("unsloth/SmolLM2-135M-Instruct-bnb-4bit", "/models/smollm2_135m-q4_k_m.gguf", False),
        ("C:\\models\\SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M@main", False),
        ("", "HuggingFaceTB/SmolLM2-135M", False),
        (None, "HuggingFaceTB/SmolLM2-135M", False),
    ],
)
def test_a_different_base_is_warned_of(tmp_path: Path, named: str | None, served: str, differ: bool) -> None:
    folder = written(tmp_path, {}, base_model_name_or_path=named)
    base = BaseFacts(served)
    warnings = validate_adapter(folder, llama_sites(), base=base).warnings
    assert warnings == inspect_adapter(folder, llama_sites(), base).warnings
    assert [str(named) in warning and served in warning for warning in warnings] == [True] * differ


def test_spellings_of_one_model_are_one_name() -> None:
    spelt = ("org/My-Model-7B", "/x/my_model_7b/", "other/My.Model-7B-Instruct-GGUF", "my-model-7b.Q5_K_S.gguf")
    assert {plain_name(name) for name in spelt} == {"mymodel7b"}
