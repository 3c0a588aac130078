"""``LLM`` over a tiny checkpoint: mixed adapters, logprobs against the program itself, errors, streams, transports."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from served import OPTIONS, VOCAB, write_adapter, write_model
from tiny_tokenizers import byte_level

from truffula import LLM, SamplingParams
from truffula.errors import (
    AdapterError,
    AdapterNotFound,
    ConfigError,
    InvalidRequest,
    NoTokenizer,
    PromptTooLong,
    ShuttingDown,
)
from truffula.lora.folder import open_adapter
from truffula.lora.merging import MergePart, merge_adapters
from truffula.service.choices import collect
from truffula.testing.adapters import write_adapter as write_files
from truffula.testing.oracle import Oracle
from truffula.types import TextDelta

CHAT = [{"role": "user", "content": "hi"}]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llm")
    model = write_model(root / "model")
    adapters = {name: write_adapter(root / name, model, seed) for seed, name in enumerate(["one", "two", "called"])}
    config = json.loads((adapters["called"] / "adapter_config.json").read_text())
    changed = {"alora_invocation_tokens": [300, 12], "task_type": "CAUSAL_LM"}
    (adapters["called"] / "adapter_config.json").write_text(json.dumps(config | changed))
    adapters |= {kind: write_prompt(root / kind, model, kind) for kind in ("PROMPT_TUNING", "PREFIX_TUNING")}
    return {"model": model, "bare": write_model(root / "bare", tokenizer=False), **adapters}


def write_prompt(folder: Path, model: Path, kind: str) -> Path:
    """Four virtual tokens, given as embeddings or as keys and values."""
    base = json.loads((model / "config.json").read_text())
    width, layers, heads = base["hidden_size"], base["num_hidden_layers"], base["num_attention_heads"]
    if kind == "PREFIX_TUNING":
        width = width // heads * base["num_key_value_heads"]
        heads = base["num_key_value_heads"]
    config = {
        "peft_type": kind, "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "token_dim": width,
        "num_attention_heads": heads, "num_layers": layers, "num_transformer_submodules": 1,
    }  # fmt: skip
    rows = width if kind == "PROMPT_TUNING" else 2 * layers * width
    values = np.random.default_rng(1).standard_normal((4, rows)).astype(np.float32)
    return write_files(folder, config, {"prompt_embeddings": values})


@pytest.fixture(scope="module")
def llm(folders: dict[str, Path]) -> Iterator[LLM]:
    others = {name: folders[name] for name in ("called", "PROMPT_TUNING", "PREFIX_TUNING")}
    named = {"one": folders["one"], "two": str(folders["two"]), **others}
    with LLM(folders["model"], adapters=named, **OPTIONS) as llm:
        yield llm


def quiet(llm: LLM) -> bool:
    stats = llm.stats()
    return stats.running == stats.waiting == stats.used_blocks == 0


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")  # peft gives a prefix by that name
@pytest.mark.parametrize("adapter", [None, "one", "called", "PROMPT_TUNING", "PREFIX_TUNING"])
def test_logprobs_and_tokens_are_the_reference_models(llm: LLM, folders: dict[str, Path], adapter: str | None) -> None:
    """Against transformers and peft run directly on the same folder."""
    oracle = Oracle(folders["model"], tied=False, adapter=None if adapter is None else folders[adapter])
    prompt = [5, 77, 300, 12, 41]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    (out,) = llm.generate(prompt, params, adapters=adapter)
    ids = [*prompt, *out.token_ids]
    logits = oracle.logits(ids, len(prompt)).astype(np.float64)
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    assert out.token_ids == [int(row.argmax()) for row in logprobs[len(prompt) - 1 : -1]]
    assert out.logprobs is not None
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    rows = [(found, 2, at, ids[at + 1]) for at, found in enumerate(out.prompt_logprobs[1:])]
    rows += [(found, 3, len(prompt) - 1 + at, ids[len(prompt) + at]) for at, found in enumerate(out.logprobs)]
    for found, k, at, chosen in rows:
        best = [int(i) for i in np.argsort(-logprobs[at], kind="stable")[:k]]
        assert set(found or {}) == {*best, chosen}
        for token_id, logprob in (found or {}).items():
            assert logprob == pytest.approx(logprobs[at, token_id], abs=1e-4)


def test_a_mixed_batch_gives_each_prompt_what_it_gets_alone(llm: LLM, folders: dict[str, Path]) -> None:
    prompts = ["the Lorax spoke", [9, 8, 7], "naïve 🌲 trees", "hello hello", "x"]
    adapters = ["one", None, folders["two"], "two", None]
    together = llm.generate(prompts, GREEDY, adapters=adapters)
    alone = [
        llm.generate(prompt, GREEDY, adapters=adapter)[0] for prompt, adapter in zip(prompts, adapters, strict=True)
    ]
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]
    assert [out.text for out in together] == [
        byte_level().decode(out.token_ids, skip_special_tokens=True) for out in together
    ]
    assert [out.prompt for out in together] == [p if isinstance(p, str) else byte_level().decode(p) for p in prompts]
    assert together[1].prompt_token_ids == [9, 8, 7]
    base = llm.generate(prompts[0], GREEDY)[0]
    assert base.token_ids != together[0].token_ids, "an adapter changes what is said"


def test_a_weighted_sum_of_adapters(llm: LLM, folders: dict[str, Path], tmp_path: Path) -> None:
    """Against one adapter that is their sum, made from their files."""
    weights = {"one": 0.75, "two": -0.5}
    with contextlib.ExitStack() as stack:
        files = [(name, stack.enter_context(open_adapter(folders[name]))) for name in weights]
        merge_adapters([MergePart(name, file, weights[name]) for name, file in files]).write(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
    prompt = "the Lorax spoke"
    one, both, merged, base, alone = llm.generate(
        [prompt] * 5, params, adapters=[{"one": 1.0, "two": 0.0}, weights, tmp_path, {"one": 0.0}, "one"]
    )
    assert both.token_ids == merged.token_ids != alone.token_ids
    for row, expected in zip(both.logprobs or [], merged.logprobs or [], strict=True):
        assert row == pytest.approx(expected, abs=1e-4)
    assert one.logprobs == alone.logprobs
    assert base.token_ids == llm.generate(prompt, params)[0].token_ids
    twice = {"one": 0.75, str(folders["one"]): 0.5}  # ties needs equal ranks
    ties = llm.adapters.merge(twice, "ties", density=0.5)
    made, again = llm.generate([prompt] * 2, params, adapters=[ties, llm.adapters.merge(twice, "ties", density=0.5)])
    assert made.token_ids == again.token_ids and made.logprobs != alone.logprobs
    assert [state.name for state in llm.adapters.list() if "ties" in state.name] == [ties.name]
    for bad in ({"one": "1"}, {"one": True}, {"one": 1e9}):
        with pytest.raises(InvalidRequest):
            llm.generate(prompt, adapters=bad)  # type: ignore[arg-type]
    with pytest.raises(AdapterNotFound):
        llm.generate(prompt, adapters={"three": 1.0})
    with pytest.raises(InvalidRequest, match="density"):
        llm.adapters.merge(weights, "ties", density=0.0)


def test_seeds_choices_and_best_of(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=11, max_tokens=8)
    (one,), (two,) = llm.generate("hello", params), llm.generate("hello", params)
    assert [c.token_ids for c in one.choices] == [c.token_ids for c in two.choices]
    assert len({tuple(c.token_ids) for c in one.choices}) == 3
    assert (one.text, one.token_ids) == (one.choices[0].text, one.choices[0].token_ids)
    (ranked,) = llm.generate("hello", SamplingParams(n=3, best_of=3, seed=11, max_tokens=8, logprobs=0))
    assert {tuple(c.token_ids) for c in ranked.choices} == {tuple(c.token_ids) for c in one.choices}
    means = [np.mean([row[i] for row, i in zip(c.logprobs or [], c.token_ids, strict=True)]) for c in ranked.choices]
    assert means == sorted(means, reverse=True)


def test_params_for_each_prompt(llm: LLM) -> None:
    outs = llm.generate(
        ["a", "b"], [SamplingParams(max_tokens=2, ignore_eos=True), SamplingParams(max_tokens=5, ignore_eos=True)]
    )
    assert [len(out.token_ids) for out in outs] == [2, 5]
    with pytest.raises(InvalidRequest, match="1 item for 2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(InvalidRequest, match="3 items for 2 prompts"):
        llm.generate(["a", "b"], adapters=["one", None, "two"])


def test_a_stop_string_ends_the_sequence_in_the_engine(llm: LLM) -> None:
    (whole,) = llm.generate("the Lorax", GREEDY)
    stop = whole.text[4:7]
    assert "\ufffd" not in stop or len(stop) == 3
    before = llm.stats().generated_tokens
    (out,) = llm.generate("the Lorax", SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, stop=(stop,)))
    assert out.text == whole.text[: whole.text.index(stop)]
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)
    assert out.token_ids == whole.token_ids[: len(out.token_ids)]
    assert quiet(llm)
    assert llm.stats().generated_tokens - before < 30


def test_scoring_generates_nothing(llm: LLM) -> None:
    (out,) = llm.generate([5, 6, 7], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert (out.token_ids, out.text, out.finish_reason) == ([], "", "length")
    assert out.prompt_logprobs is not None
    assert [None if row is None else list(row) for row in out.prompt_logprobs] == [None, [6], [7]]


def test_chat_renders_the_models_template(llm: LLM) -> None:
    talk = [{"role": "user", "content": "who speaks?"}]
    (out,) = llm.chat(talk, GREEDY)
    assert out.prompt == "<|role|>user\nwho speaks?<|role|>assistant\n"
    assert out.prompt_token_ids == byte_level().encode(out.prompt)
    one, two = llm.chat([talk, [*talk, {"role": "assistant", "content": "the"}]], GREEDY, adapters=["one", None])
    assert one.token_ids == llm.generate(out.prompt, GREEDY, adapters="one")[0].token_ids
    assert two.prompt.endswith("the<|role|>assistant\n")
    (open_,) = llm.chat([*talk, {"role": "assistant", "content": "the Lorax"}], GREEDY, continue_final_message=True)
    assert open_.prompt.endswith("assistant\nthe Lorax")


def test_what_the_template_does_not_use_is_logged(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    talk = [{"role": "user", "content": "who speaks?"}]
    tools = [{"type": "function", "function": {"name": "count", "parameters": {}}}]
    (plain,) = llm.chat(talk, GREEDY)
    assert "chat template" not in caplog.text
    (out,) = llm.chat(talk, GREEDY, tools=tools, template_kwargs={"enable_thinking": False})
    assert out.token_ids == plain.token_ids
    assert "the chat template does not use template_kwargs.enable_thinking, tools" in caplog.text
    users = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="result of a tool") as refused:
        llm.chat([*talk, {"role": "tool", "content": "5"}], GREEDY, chat_template=users)
    assert refused.value.param == "messages[1].content"


def test_a_stream_is_the_answer_in_pieces(llm: LLM) -> None:
    params = SamplingParams(n=2, seed=4, max_tokens=10)
    deltas = list(llm.stream("the trees", params, adapter="one"))
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    (whole,) = llm.generate("the trees", params, adapters="one")
    assert [c.text for c in collect(deltas).choices] == [c.text for c in whole.choices]
    assert [c.token_ids for c in collect(deltas).choices] == [c.token_ids for c in whole.choices]
    chat = collect(llm.stream([{"role": "user", "content": "hi"}], GREEDY))
    assert chat.choices[0].token_ids == llm.chat([{"role": "user", "content": "hi"}], GREEDY)[0].token_ids


def test_a_stream_that_is_left_ends_in_the_engine_and_others_go_on(llm: LLM) -> None:
    left = llm.stream("the trees", SamplingParams(max_tokens=100, ignore_eos=True))
    other = llm.stream("hello", GREEDY)
    next(left)
    first = next(other)
    (between,) = llm.generate("x", GREEDY)  # while both iterators are open
    assert len(between.token_ids) == 12
    left.close()
    rest = [first, *other]
    assert collect(rest).choices[0].token_ids == llm.generate("hello", GREEDY)[0].token_ids
    assert quiet(llm)


def test_progress_counts_prompts(llm: LLM) -> None:
    seen: list[tuple[int, int]] = []
    llm.generate(["a", "b", "c"], GREEDY, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_error_is_raised_or_returned_in_its_place(llm: LLM, folders: dict[str, Path]) -> None:
    prompts = ["fine", "long " * 200, "fine too"]
    with pytest.raises(PromptTooLong):
        llm.generate(prompts, GREEDY)
    assert quiet(llm)
    outs = llm.generate(prompts, GREEDY, errors="return")
    assert isinstance(outs[1], PromptTooLong)
    assert [out.token_ids for out in (outs[0], outs[2])] == [
        llm.generate(p, GREEDY)[0].token_ids for p in (prompts[0], prompts[2])
    ]
    broken = folders["model"]  # a folder, but no adapter
    with pytest.raises(AdapterError):
        llm.generate(["fine", "fine"], GREEDY, adapters=[None, broken])
    assert quiet(llm)
    outs = llm.generate(["fine", "fine"], GREEDY, adapters=[None, broken], errors="return")
    assert isinstance(outs[1], AdapterError)
    assert len(outs[0].token_ids) == 12


@pytest.mark.parametrize(
    "wrong",
    [
        lambda llm: llm.generate(5),
        lambda llm: llm.generate([["a"]]),
        lambda llm: llm.generate([{"a": 1}]),
        lambda llm: llm.generate([[1.5]]),
        lambda llm: llm.generate("a", "greedy"),
        lambda llm: llm.generate("a", errors="ignore"),
        lambda llm: llm.generate([VOCAB]),
        lambda llm: llm.generate([[]]),
        lambda llm: llm.chat([]),
        lambda llm: llm.chat("hello"),
        lambda llm: llm.generate({"a": 1}),
        lambda llm: llm.generate("a", 5),
        lambda llm: llm.generate("a", adapters=5),
        lambda llm: llm.chat(None),
        lambda llm: llm.chat(CHAT, tools=[5]),
        lambda llm: llm.chat(CHAT, template_kwargs=[1]),
        lambda llm: llm.chat(CHAT, chat_template=5),
        lambda llm: llm.stream("a", echo="yes"),
        lambda llm: llm.stream("a", deadline_s="soon"),
        lambda llm: llm.stream(5),
        lambda llm: llm.stream_each(5),
        lambda llm: next(llm.stream("a", nonsense=1)),
    ],
)
def test_what_makes_no_sense_is_an_invalid_request(llm: LLM, wrong) -> None:
    with pytest.raises(InvalidRequest):
        wrong(llm)


def test_no_prompts_no_answers(llm: LLM) -> None:
    assert llm.generate([]) == []
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    assert [out.prompt_token_ids for out in llm.generate(ids, GREEDY)] == ids.tolist()
    assert llm.generate(ids[0], GREEDY)[0].prompt_token_ids == [5, 6, 7]


def test_adapters_are_loaded_named_and_forgotten(llm: LLM, folders: dict[str, Path]) -> None:
    with pytest.raises(AdapterNotFound, match="one, two"):
        llm.generate("a", adapters="three")
    state = llm.adapters.load("three", folders["one"])
    assert state.status in ("ready", "resident")
    assert llm.adapters.names() == ["PREFIX_TUNING", "PROMPT_TUNING", "called", "one", "three", "two"]
    assert (
        llm.generate("hello", GREEDY, adapters="three")[0].token_ids
        == llm.generate("hello", GREEDY, adapters="one")[0].token_ids
    )
    assert llm.adapters.list()
    llm.adapters.unload("three")
    with pytest.raises(AdapterNotFound):
        llm.generate("a", adapters="three")
    with pytest.raises(AdapterNotFound):
        llm.adapters.load("four")


def test_a_file_in_an_adapters_place_is_recognised(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "lora.gguf").write_bytes(b"GGUF")
    with pytest.raises(AdapterNotFound, match="GGUF are not served"):
        llm.generate("a", adapters=str(tmp_path / "lora.gguf"))


def test_options_are_checked_before_anything_is_loaded(folders: dict[str, Path]) -> None:
    for options in ({"max_lenght": 5}, {"transport": "pigeon"}, {"adapters": {"x": "/nowhere"}}, {"dtype": "int3"}):
        with pytest.raises(ConfigError):
            LLM(folders["model"], **options)
    with pytest.raises(ConfigError, match=r"max_restarts has no effect .* transport='process'"):
        LLM(folders["model"], max_restarts=5)


def test_a_folder_without_tokenizer_serves_ids(folders: dict[str, Path]) -> None:
    with LLM(folders["bare"], **OPTIONS) as bare:
        (out,) = bare.generate([5, 6, 7], GREEDY)
        assert (len(out.token_ids), out.text) == (12, "")
        for text in (lambda: bare.generate("a"), lambda: bare.chat([{"role": "user", "content": "a"}])):
            with pytest.raises(NoTokenizer):
                text()
    with pytest.raises(ShuttingDown):
        bare.generate([5])
    bare.close()


@pytest.mark.parametrize("transport", ["inline", "process"])
def test_threads_share_an_engine_of_either_transport(llm: LLM, folders: dict[str, Path], transport: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    prompts = ["the Lorax spoke", "hello hello", "x y z", "naïve 🌲"]
    expected = [out.token_ids for out in llm.generate(prompts, GREEDY)]
    with LLM(folders["model"], transport=transport, **OPTIONS) as other, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: other.generate(prompt, GREEDY)[0].token_ids, prompts))
        left = other.stream("the trees", SamplingParams(max_tokens=100, ignore_eos=True))
        next(left)
        left.close()
    assert found == expected
