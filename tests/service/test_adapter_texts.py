"""The tokenizer and the chat template in an adapter's folder are those of its requests, and of no others."""

from __future__ import annotations

import asyncio
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import OPTIONS, TEMPLATE, complete, tiny_info, write_adapter, write_model
from tiny_tokenizers import byte_level_json, word_piece_json
from tokenizers import Tokenizer as Library

from truffula import LLM, SamplingParams
from truffula.engine.client import connect
from truffula.errors import AdapterError, InvalidRequest
from truffula.items import Constraint, Message, Text
from truffula.lora.compose import compose
from truffula.lora.sources import AdapterDirectory
from truffula.service.aio import AsyncService
from truffula.service.core import Service
from truffula.service.prompt_maker import PromptMaker
from truffula.service.text_sets import MAX_OWN
from truffula.service.workers import TextWorkers
from truffula.text.process import Setup
from truffula.types import GenerateRequest, WeightedAdapter

GREEDY = SamplingParams(max_tokens=5)
ADDED, TURN = "<SKU-7>", "<|turn|>"
OWN_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|turn|>{% endfor %}{{ '' if not messages else 'x' }}"
)


def with_tokens(*tokens: str) -> bytes:
    library = Library.from_buffer(byte_level_json())
    library.add_tokens([token for token in tokens if token == ADDED])
    library.add_special_tokens([token for token in tokens if token != ADDED])
    return library.to_str().encode()


def decoding_otherwise() -> dict[str, Any]:
    """With a regular expression that takes exponential time, in the process that reads tokens."""
    changed: dict[str, Any] = json.loads(byte_level_json())
    return changed | {"decoder": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}}


def with_far_token() -> dict[str, Any]:
    """A list with a place for each id would take 32 GB."""
    changed: dict[str, Any] = json.loads(byte_level_json())
    changed["model"]["vocab"]["far"] = 4_000_000_000
    return changed


def own(folder: Path, model: Path, seed: int, **files: bytes | str | dict[str, Any]) -> Path:
    """An adapter with text files: their names have ``__`` for the dot."""
    write_adapter(folder, model, seed)
    for name, content in files.items():
        raw = json.dumps(content) if isinstance(content, dict) else content
        (folder / name.replace("__", ".")).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("texts")
    model = write_model(root / "model")
    names = json.loads((model / "tokenizer_config.json").read_text())
    made = {"model": model}

    def add(name: str, seed: int, **files: Any) -> None:
        made[name] = own(root / "adapters" / name, model, seed, **files)

    add("plain", 1)
    add("copy", 2, tokenizer__json=byte_level_json() + b"\n", tokenizer_config__json={**names, "padding_side": "left"})
    tokens = {"tokenizer__json": with_tokens(ADDED, TURN), "tokenizer_config__json": {**names, "eos_token": TURN}}
    add("added", 3, **tokens, chat_template__jinja=OWN_TEMPLATE)
    add("template", 4, chat_template__jinja=TEMPLATE.replace("<|role|>", "#"))
    add("legacy", 5, added_tokens__json={ADDED: 421, TURN: 422})
    return made


@pytest.fixture(scope="module")
def llm(folders: dict[str, Path]) -> Iterator[LLM]:
    adapters = {name: path for name, path in folders.items() if name != "model"}
    with LLM(folders["model"], adapters, **OPTIONS) as made:
        yield made


def ids_of(llm: LLM, prompt: Any, adapter: str | None) -> list[int]:
    service = llm._service
    request = GenerateRequest(
        **({"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}),
        adapter=llm.adapters.resolve(adapter), params=GREEDY,
    )  # fmt: skip
    return service.core.open(request).engine_requests[0].prompt_ids


CHAT = [Message(role="user", items=[Text(f"buy {ADDED}")])]


def test_added_tokens_and_templates_are_those_of_the_adapter(llm: LLM, folders: dict[str, Path]) -> None:
    own_tokens = Library.from_buffer(with_tokens(ADDED, TURN))
    text, chat = f"buy {ADDED}", CHAT
    base = Library.from_buffer(byte_level_json()).encode(text).ids
    for name in (None, "plain", "copy", "template"):
        assert ids_of(llm, text, name) == base, name
    assert ids_of(llm, text, "added") == own_tokens.encode(text).ids != base
    assert ids_of(llm, text, "legacy") == own_tokens.encode(text).ids
    rendered = f"user: {text}<|turn|>x"
    assert ids_of(llm, chat, "added") == own_tokens.encode(rendered, add_special_tokens=False).ids
    for name, role in ((None, "<|role|>"), ("plain", "<|role|>"), ("template", "#")):
        wanted = Library.from_buffer(byte_level_json()).encode(f"{role}user\n{text}{role}assistant\n").ids
        assert ids_of(llm, chat, name) == wanted, name
    # What is read again is read with the same tokens; a copy of the base's tokenizer is not kept beside it.
    sets = llm._service.core.text_sets
    made = {name: sets.known(llm.adapters.resolve(name)) for name in ("copy", "template", "added")}
    assert made["copy"].tokenizer is made["template"].tokenizer is llm._service.core.tokenizer
    assert made["added"].tokenizer.text_of(own_tokens.token_to_id(ADDED)) == ADDED


def test_answers_are_decoded_stopped_and_constrained_by_its_own_tokens(llm: LLM) -> None:
    own_tokens = Library.from_buffer(with_tokens(ADDED, TURN))
    sku, turn = own_tokens.token_to_id(ADDED), own_tokens.token_to_id(TURN)
    spoken = SamplingParams(max_tokens=3, logit_bias={sku: 90.0}, logprobs=1)
    (mine,), (theirs,) = (llm.generate("a", spoken, adapters=name) for name in ("added", "plain"))
    assert mine.token_ids == [sku] * 3 and mine.text == ADDED * 3
    assert theirs.token_ids == [sku] * 3 and theirs.text == ""  # ids without a token for the base
    ended = SamplingParams(max_tokens=3, logit_bias={turn: 90.0})
    (mine,), (theirs,) = (llm.generate("a", ended, adapters=name) for name in ("added", "plain"))
    assert (mine.finish_reason, theirs.finish_reason) == ("stop", "length")
    only = Constraint(kind="choice", value=json.dumps([ADDED + "!"]))
    for adapter, params in (("added", SamplingParams(max_tokens=9)), (None, SamplingParams(max_tokens=20))):
        (one,) = llm.generate("a", params, adapters=adapter, constraint=only)
        assert one.text == ADDED + "!", adapter
    (one,) = llm.generate("a", SamplingParams(max_tokens=9, logit_bias={sku: 90.0}), adapters="added", constraint=only)
    assert one.token_ids[0] == sku and one.text == ADDED + "!"
    (one,) = llm.generate("a", SamplingParams(max_tokens=30, stop=[ADDED], logit_bias={sku: 90.0}), adapters="added")
    assert one.finish_reason == "stop" and one.text == ""


def test_sums_need_equal_texts(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="tokenizers or chat templates of their own, which differ"):
        llm.generate("a", GREEDY, adapters={"added": 0.5, "plain": 0.5})
    (one,) = llm.generate("a", GREEDY, adapters={"copy": 0.5, "plain": 0.5})
    assert one.finish_reason in ("length", "stop")
    assert ids_of(llm, ADDED, {"added": 0.5}) == ids_of(llm, ADDED, "added")


def test_a_sum_of_different_templates_ends(llm: LLM, folders: dict[str, Path], tmp_path: Path) -> None:
    names = [f"adapter-{number}" for number in range(MAX_OWN + 1)]
    for seed, name in enumerate(names):
        own(tmp_path / name, folders["model"], seed, chat_template__jinja=f"{name}{TEMPLATE}")
    with pytest.raises(InvalidRequest, match="which differ"):
        llm.generate("a", GREEDY, adapters={str(tmp_path / name): 0.1 for name in names})
    core = llm._service.core
    refs = [llm.adapters.resolve(str(tmp_path / name)) for name in names]
    kept = [core.text_sets.known(ref) for ref in refs]
    assert None not in kept, "templates beside the base's tokenizer are kept, more of them than tokenizers"
    assert {one.tokenizer for one in kept} == {core.tokenizer}


def test_a_sum_of_more_tokenizers_than_are_kept_ends(llm: LLM, folders: dict[str, Path], tmp_path: Path) -> None:
    names = [f"adapter-{number}" for number in range(MAX_OWN + 1)]
    for seed, name in enumerate(names):
        own(tmp_path / name, folders["model"], seed, tokenizer__json=with_tokens(f"<{name}>"))
    with pytest.raises(InvalidRequest, match="which differ"):
        llm.generate("a", GREEDY, adapters={str(tmp_path / name): 0.1 for name in names})
    kept = [llm._service.core.text_sets.known(llm.adapters.resolve(str(tmp_path / name))) for name in names]
    assert [one is None for one in kept] == [True, *[False] * MAX_OWN]
    core = llm._service.core
    refs = [llm.adapters.resolve(str(tmp_path / name)) for name in names]

    async def run() -> None:
        maker = PromptMaker(core, None)
        parts = tuple(WeightedAdapter(ref) for ref in refs)
        with pytest.raises(InvalidRequest, match="which differ"):
            await asyncio.wait_for(maker.of(compose(parts)), 60)
        maker.close()

    asyncio.run(run())


def test_no_adapter_gets_the_texts_of_another_whose_files_look_alike(
    llm: LLM, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Two templates of one length and one CRC, which anybody can make, are two."""
    words = ("plumless", "buckeroo")
    assert len({zlib.crc32(word.encode()) for word in words}) == 1
    for word in words:
        adapter = own(tmp_path / word, folders["model"], 1, chat_template__jinja=f"{word}{{{{ messages[0].content }}}}")
        wanted = Library.from_buffer(byte_level_json()).encode(f"{word}buy {ADDED}", add_special_tokens=False).ids
        assert ids_of(llm, CHAT, str(adapter)) == wanted


def test_a_generation_with_other_texts_than_the_folder_has_now_is_refused(
    llm: LLM, folders: dict[str, Path], tmp_path: Path
) -> None:
    adapter = own(tmp_path / "adapter", folders["model"], 1, chat_template__jinja=f"old{TEMPLATE}")
    state = llm.adapters.load("versioned", adapter)
    assert state.generation is not None
    exact = f"versioned@sha:{state.generation[:12]}"
    old = ids_of(llm, CHAT, exact)
    assert old == ids_of(llm, CHAT, "versioned")
    (adapter / "chat_template.jinja").write_text(f"new{TEMPLATE}")
    assert ids_of(llm, CHAT, "versioned") != old
    with pytest.raises(InvalidRequest, match="changed since the server started"):
        ids_of(llm, CHAT, exact)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer__json": decoding_otherwise()}, "it decodes otherwise"),
        ({"tokenizer__json": with_tokens("<" + "x" * 2000)}, "a token of 2001 characters; the limit is 1024"),
        ({"tokenizer__json": with_far_token()}, "has token 4000000000, and the model 430 ids"),
        ({"tokenizer__json": word_piece_json()}, r"the base's: token 2 is \"'\", and '<\|role\|>' there"),
        ({"tokenizer__json": "merges"}, r"contradicts the base's: merge 0 is "),
        ({"tokenizer__json": b"{"}, "cannot be used: tokenizer.json cannot be read"),
        ({"tokenizer_config__json": b"[1]"}, "tokenizer_config.json holds a list"),
        ({"tokenizer__json": b"version https://git-lfs.github.com/spec/v1\n"}, "Git LFS pointer"),
    ],
)
def test_what_contradicts_the_base_or_cannot_be_read_is_refused(
    llm: LLM, folders: dict[str, Path], tmp_path: Path, files: dict[str, Any], words: str
) -> None:
    if files.get("tokenizer__json") == "merges":
        changed = json.loads(byte_level_json())
        changed["model"]["merges"].reverse()
        files = {"tokenizer__json": changed}
    adapter = own(tmp_path / "wrong", folders["model"], 6, **files)
    for _ in range(2):
        with pytest.raises(AdapterError, match=words):
            llm.generate("a", GREEDY, adapters=str(adapter))
    for file in adapter.glob("tokenizer*"):
        file.unlink()
    (one,) = llm.generate("a", GREEDY, adapters=str(adapter))
    assert one.token_ids


def test_text_workers_read_them_first(folders: dict[str, Path], tmp_path: Path) -> None:
    """A server reads an adapter's tokenizer, and tokenizes with it, in text workers. A changed one is another."""
    adapter = tmp_path / "adapter"
    shutil.copytree(folders["added"], adapter)
    client = connect_(folders["model"])
    core = Service(client.info, directory=AdapterDirectory({"mine": adapter}))
    base = core.base
    setup = Setup(
        info=client.info, texts_path=str(folders["model"]), texts_digest=core.text_sets._digest,
        templates=base.templates.sources, special_tokens=base.templates.special_tokens, memory_bytes=1 << 30,
    )  # fmt: skip
    service = AsyncService(client, core, workers=TextWorkers(setup, heavy=1))
    made = 0

    async def run() -> None:
        nonlocal made
        await service.start()
        ref = core.resolve_adapter("mine")
        request = GenerateRequest(prompt=f"buy {ADDED}", adapter=ref, params=GREEDY, echo=True)
        both = await asyncio.gather(complete(service, request), complete(service, request))
        ids = Library.from_buffer(with_tokens(ADDED, TURN)).encode(f"buy {ADDED}").ids
        assert [[piece.id for piece in one.prompt.tokens] for one in both] == [ids, ids]
        (adapter / "tokenizer.json").write_bytes(with_tokens(TURN))
        again = await complete(
            service, GenerateRequest(prompt=TURN, adapter=core.resolve_adapter("mine"), params=GREEDY)
        )
        assert again.prompt_tokens == 1
        (adapter / "tokenizer.json").write_bytes(word_piece_json())
        with pytest.raises(AdapterError, match="contradicts the base's"):
            await complete(service, GenerateRequest(prompt="a", adapter=core.resolve_adapter("mine"), params=GREEDY))
        # Of two with equal files each is read from its own folder.
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(folders["added"] / name, adapter)
        other = tmp_path / "other"
        shutil.copytree(adapter, other)
        core.directory.add(core.directory.locate("other", other))
        first = GenerateRequest(prompt=ADDED, adapter=core.resolve_adapter("mine"), params=GREEDY)
        await service.texts.of(first.adapter)
        for worker in service.texts._workers.heavy.workers:
            worker.close()  # it has read the first one's
        shutil.rmtree(adapter)
        one = GenerateRequest(prompt=ADDED, adapter=core.resolve_adapter("other"), params=GREEDY)
        assert (await complete(service, one)).prompt_tokens == 1
        await service.close()

    asyncio.run(run())


def connect_(model: Path) -> Any:
    from truffula.config import EngineConfig

    return connect(EngineConfig(model=str(model), **OPTIONS), "inline", None)


def test_a_request_without_an_adapter_reads_no_folder() -> None:
    core = Service(tiny_info())
    assert core.text_sets.known(None) is core.base
