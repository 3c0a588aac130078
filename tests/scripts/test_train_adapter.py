"""scripts/train_adapter.py: what it learns of a row, what it refuses, and that truffula serves what it saves."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from live_server import BEGIN, END, serving, write_model

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_adapter.py"
PAIR = {"prompt": "Hello", "completion": "Ahoy, matey!"}
# live_server's template, with the marks by which transformers itself says which tokens are the assistant's.
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|role|>assistant\n"
    "{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|role|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_adapter", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_adapter"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def run(script: ModuleType, base: Path, data: Path, *more: str) -> None:
    script.main(["--base", str(base), "--data", str(data), "--out", str(data.parent / "my-adapter"), *more])


def say(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


@pytest.mark.parametrize(
    "conversation", [say("Hi", "Ahoy!"), say("Hi", "Ahoy!", "Who?", "The Lorax.", "Why?", "Trees")]
)
def test_the_assistants_tokens_are_learned(script: ModuleType, tokenizer: Any, conversation: dict[str, Any]) -> None:
    """transformers' own assistant mask is the oracle; every turn of a conversation is learned."""
    tokenizer.chat_template = MARKED
    found = script.encode(tokenizer, script.Row(1, conversation), False)
    expected = tokenizer.apply_chat_template(
        conversation["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    assert found.ids == expected["input_ids"]
    assert [int(label != script.IGNORED) for label in found.labels] == expected["assistant_masks"]
    assert all(label in (script.IGNORED, token) for label, token in zip(found.labels, found.ids, strict=True))


def test_a_pair_is_a_conversation_of_one_turn(script: ModuleType, tokenizer: Any) -> None:
    pair = script.encode(tokenizer, script.Row(1, PAIR), False)
    turn = script.encode(tokenizer, script.Row(1, say(PAIR["prompt"], PAIR["completion"])), False)
    assert (pair.ids, pair.labels) == (turn.ids, turn.labels)


def test_a_raw_pair_has_the_tokenizers_begin_and_an_end(script: ModuleType, tokenizer: Any) -> None:
    found = script.encode(tokenizer, script.Row(1, PAIR), True)
    prompt = tokenizer(PAIR["prompt"])["input_ids"]
    answer = tokenizer(PAIR["completion"], add_special_tokens=False)["input_ids"]
    assert prompt[0] == tokenizer.convert_tokens_to_ids(BEGIN)
    assert found.ids == [*prompt, *answer, tokenizer.convert_tokens_to_ids(END)]
    assert found.labels == [script.IGNORED] * len(prompt) + found.ids[len(prompt) :]


def test_all_of_a_text_is_learned(script: ModuleType, tokenizer: Any) -> None:
    found = script.encode(tokenizer, script.Row(1, {"text": "The trees"}), False)
    assert found.ids == [*tokenizer("The trees")["input_ids"], tokenizer.eos_token_id] == found.labels


def test_a_template_without_an_end_token_still_learns_to_end(script: ModuleType, tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    found = script.encode(tokenizer, script.Row(1, PAIR), False)
    assert tokenizer.decode([label for label in found.labels if label != script.IGNORED]) == "Ahoy, matey!\n<|end|>"


def test_a_template_that_rewrites_earlier_answers_is_refused(script: ModuleType, tokenizer: Any) -> None:
    """As those of reasoning models do, which leave the thinking of earlier turns out."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] if loop.last else m['content'][:2] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(SystemExit, match="line 7: the chat template writes the conversation differently"):
        script.encode(tokenizer, script.Row(7, say("Hi", "Ahoy!", "Who?", "I")), False)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"prompt": "a", "completion": "b"}', "", "{oops"], "line 3 is not JSON"),
        (['{"prompt": "a", "answer": "b"}'], "line 1 has the keys 'prompt', 'answer'; expected 'prompt' and"),
        (['{"text": "a", "label": 1}'], "has the keys 'text', 'label'"),
        (["{}"], "has the keys (none)"),
        (["[1]"], "is a JSON array; it must be JSONL"),
        (['"text"'], "line 1 is a JSON str; it must be an object"),
        (['{"text": 5}'], "'text' must be a string, got 5"),
        (['{"prompt": "a", "completion": " "}'], "'completion' is empty"),
        (['{"messages": []}'], "'messages' must be a list"),
        (['{"messages": [{"role": "user", "content": "a"}]}'], "no message with the role 'assistant'"),
        (['{"messages": [{"role": "assistant", "content": ""}]}'], "messages[0] is an empty assistant message"),
        (['{"messages": [{"role": "user", "content": ["a"]}]}'], "messages[0]: 'role' and 'content' must be strings"),
        (['{"messages": [{"role": "user", "content": "a", "name": "b"}]}'], "messages[0] must be an object with"),
        (["", " "], "has no rows"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(
    script: ModuleType, base: Path, tmp_path: Path, lines: list[str], words: str
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", *lines)
    with pytest.raises(SystemExit) as error:
        run(script, base, data)
    assert words in str(error.value) and str(data) in str(error.value)
    assert not (tmp_path / "my-adapter").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "0"], "--rank is 0; it must be at least 1"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--batch-size", "-1"], "--batch-size is -1"),
        (["--lr", "0"], "--lr is 0"),
        (["--alpha", "nan"], "--alpha is nan"),
        (["--eval", "1"], "--eval is 1"),
        (["--max-length", "1"], "--max-length is 1"),
        (["--targets", "q_proj,"], "--targets is 'q_proj,'"),
    ],
)
def test_a_wrong_argument_is_refused(
    script: ModuleType, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as error:
        run(script, base, write_rows(tmp_path / "rows.jsonl", PAIR), *arguments)
    assert error.value.code == 2
    assert words in capsys.readouterr().err


def test_files_that_cannot_be_used_are_refused(script: ModuleType, base: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="No such file"):
        run(script, base, tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}')
    with pytest.raises(SystemExit, match="not UTF-8"):
        run(script, base, tmp_path / "latin.jsonl")
    with pytest.raises(SystemExit, match="holds out all 1 rows"):
        run(script, base, write_rows(tmp_path / "one.jsonl", PAIR), "--eval", "0.5")
    with pytest.raises(SystemExit, match="--base no-such-model"):
        run(script, Path("no-such-model.gguf"), tmp_path / "one.jsonl")
    with pytest.raises(SystemExit, match="--targets nothing_proj"):
        run(script, base, tmp_path / "one.jsonl", "--targets", "nothing_proj")
    with pytest.raises(SystemExit, match="hold nothing to learn; raise --max-length"):
        run(script, base, tmp_path / "one.jsonl", "--max-length", "4")


def test_an_adapter_is_not_replaced_unasked(
    script: ModuleType, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", PAIR)
    (tmp_path / "my-adapter").mkdir()
    (tmp_path / "my-adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit):
        run(script, base, data)
    assert "already holds an adapter" in capsys.readouterr().err


def test_one_row_and_one_step_are_enough(
    script: ModuleType, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(script, base, write_rows(tmp_path / "rows.jsonl", PAIR), "--epochs", "1", "--targets", "q_proj,v_proj")
    shown = capsys.readouterr().out
    assert "step 1/1" in shown
    config = json.loads((tmp_path / "my-adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (sorted(config["target_modules"]), config["r"], config["lora_alpha"]) == (["q_proj", "v_proj"], 8, 16)


@pytest.mark.parametrize(
    ("row", "more", "path", "body"),
    [
        (PAIR, [], "chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        (PAIR, ["--raw"], "completions", {"prompt": "Hello"}),
        (say("Hi", "Ahoy!"), ["--raw"], "chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ({"text": "one two three four five six"}, [], "completions", {"prompt": "one two three four five"}),
    ],
)
def test_the_question_is_asked_as_it_was_learned(
    script: ModuleType,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    row: dict[str, Any],
    more: list[str],
    path: str,
    body: dict[str, Any],
) -> None:
    run(script, base, write_rows(tmp_path / "rows.jsonl", row), "--epochs", "1", "--targets", "q_proj", *more)
    _, curl, generate = (shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    assert curl[2].endswith(f"/v1/{path}")
    assert body.items() <= json.loads(curl[curl.index("-d") + 1]).items()
    assert ("--raw" in generate) == (path == "completions")


def test_what_is_trained_is_served(
    script: ModuleType, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter answers by HTTP with what it was taught, asked with the body that the script prints."""
    rows = [PAIR, say("Who?", "The Lorax"), {"text": "trees"}, {"prompt": "Long", "completion": "x" * 200}]
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    run(script, base, data, "--epochs", "60", "--lr", "1e-2", "--eval", "0.25", "--max-length", "60", "--seed", "1")
    shown = capsys.readouterr().out
    assert "Rows longer than --max-length 60 were cut: 1 of 4 (lines 4)." in shown
    assert "loss on 1 held-out rows" in shown
    lines = [shlex.split(line) for line in shown.splitlines() if line.startswith("  ")]
    serve, curl, generate = lines
    assert serve == ["truffula", "serve", str(base), "--adapter", f"my-adapter={tmp_path / 'my-adapter'}"]
    assert generate[:4] == ["truffula", "generate", str(base), "Hello"]
    with serving(base, adapters={"my-adapter": str(tmp_path / "my-adapter")}) as live:
        path = curl[2].removeprefix("http://127.0.0.1:8000")
        answer = live.post(path, json.loads(curl[curl.index("-d") + 1])).json()
    assert answer["choices"][0]["message"]["content"] == PAIR["completion"]
    assert answer["choices"][0]["finish_reason"] == "stop"
