"""Published demonstrations of adapter faults in vLLM, rewritten against this server: issues 30931, 34186, 42125, 47724.

Each prompt is long enough for several blocks of the prefix cache, and sent more than once.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from live_server import MODEL, Live, assert_canonical_error, ok, serving, write_model
from safetensors.numpy import load_file, save_file

from truffula.testing.adapters import write_tiny_adapter

PROMPT = [5 + i % 250 for i in range(100)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("faults") / "llama", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def versions(model: Path) -> list[Path]:
    return [write_tiny_adapter(model.parent / f"v{n}", model, rank=4, alpha=64, seed=n) for n in range(6)]


@pytest.fixture(scope="module")
def live(model: Path) -> Iterator[Live]:
    with serving(model, adapter_admin=True, backend="auto") as found:
        yield found


def load(live: Live, name: str, folder: Path, **more) -> None:
    ok(live.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder), **more}))


def unload(live: Live, name: str) -> None:
    ok(live.post("/v1/unload_lora_adapter", {"lora_name": name}))


def answer(live: Live, name: str, **more) -> tuple[list[int], int]:
    """The token ids of an answer, and how many tokens of its prompt were cached."""
    body = {"model": name, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    found = ok(live.post("/v1/completions", {**body, "return_token_ids": True, **more}))
    return found["choices"][0]["token_ids"], found["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture(scope="module")
def alone(model: Path, versions: list[Path]) -> list[list[int]]:
    """The answer of each version in a server without a prefix cache, where each has a name of its own for ever."""
    named = {f"v{number}": str(folder) for number, folder in enumerate(versions)}
    with serving(model, adapters=named, backend="auto", prefix_cache=False) as one:
        found = [answer(one, name)[0] for name in named]
    assert len({tuple(ids) for ids in found}) == len(versions)
    return found


def test_vllm_42125_a_reload_under_the_same_name_has_no_stale_prefix(live, versions, alone):
    """Same name, same path or another one, other weights: the blocks of the former version are not found."""
    load(live, "policy", versions[0])
    assert answer(live, "policy") == (alone[0], 0)
    assert answer(live, "policy")[1] > 0, "the prefix is cached"
    load(live, "policy", versions[1], load_inplace=True)
    assert answer(live, "policy") == (alone[1], 0)
    ids, cached = answer(live, "policy")
    assert ids == alone[1] and cached > 0
    # Back to bytes that were served before: their blocks are right again, and found.
    load(live, "policy", versions[0], load_inplace=True)
    ids, cached = answer(live, "policy")
    assert ids == alone[0] and cached > 0
    unload(live, "policy")


def test_vllm_42125_new_files_at_the_same_path(live, versions, alone, tmp_path):
    folder = shutil.copytree(versions[2], tmp_path / "mine")
    load(live, "mine", folder)
    assert [answer(live, "mine")[0] for _ in range(2)] == [alone[2]] * 2
    shutil.rmtree(folder)
    shutil.copytree(versions[3], folder)
    load(live, "mine", folder, load_inplace=True)
    assert answer(live, "mine") == (alone[3], 0)
    unload(live, "mine")


def test_vllm_30931_another_adapter_under_a_name_that_was_unloaded(live, versions, alone):
    """There, blocks are found by name; a second adapter of that name answered with the first one's."""
    for number in (0, 4, 0, 5):
        load(live, "reused", versions[number])
        assert [answer(live, "reused")[0] for _ in range(2)] == [alone[number]] * 2
        unload(live, "reused")
        assert_canonical_error(live.post("/v1/completions", {"model": "reused", "prompt": "a"}), 404)
    base = answer(live, MODEL)[0]
    assert base not in alone and answer(live, MODEL)[0] == base


@pytest.mark.slow
def test_vllm_47724_each_adapter_answers_as_itself_after_others_were_loaded(live, model, versions, alone):
    """Memory for two: each load evicts another, and none gets the place, the weights or the blocks of another."""
    load(live, "one", versions[0])
    size = ok(live.client.get("/v1/adapters/one"))["size_bytes"]
    with serving(model, adapter_admin=True, backend="auto", adapter_memory=5 * size // 2) as live:
        for number, folder in enumerate(versions):
            load(live, f"a{number}", folder)
            assert answer(live, f"a{number}")[0] == alone[number]
        states = ok(live.client.get("/v1/adapters"))["data"]
        assert sum(row["status"] == "resident" for row in states) == 2
        order = [*range(6), *reversed(range(6))]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda number: answer(live, f"a{number}")[0], order))
        assert found == [alone[number] for number in order]


@pytest.mark.parametrize("prefix", ["base_model.model.language_model.", "base_model.model.transformer.", "decoder."])
def test_vllm_34186_names_that_match_no_module_are_an_error(live, versions, tmp_path, prefix):
    """There, an adapter whose names have another prefix loads, changes nothing, and the base answers with 200."""
    folder = shutil.copytree(versions[0], tmp_path / "renamed")
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("base_model.model.model.", f"{prefix}model."): one for name, one in tensors.items()}
    renamed = {name.replace("layers.", "blocks."): one for name, one in renamed.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    body = {"lora_name": "renamed", "lora_path": str(folder)}
    refused = assert_canonical_error(live.post("/v1/load_lora_adapter", body), 400)
    assert refused["code"] == "adapter_invalid" and "blocks" in refused["message"]
    assert_canonical_error(live.post("/v1/completions", {"model": "renamed", "prompt": "a"}), 404)


@pytest.mark.slow
def test_reload_under_traffic_mixes_nothing(live, versions, alone):
    """Clients ask without a pause while the adapter is replaced: each answer is one version's, whole, and one that was
    asked for after a reload was acknowledged is not older than it."""
    load(live, "busy", versions[0])
    known = {tuple(ids): number for number, ids in enumerate(alone)}
    present, stop, wrong, counts = [0], threading.Event(), [], [0] * len(versions)

    def client() -> None:
        while not stop.is_set():
            least = present[0]
            ids, _ = answer(live, "busy")
            number = known.get(tuple(ids), -1)
            if number < least:
                wrong.append((least, number, ids))
            else:
                counts[number] += 1

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(1, 6):
        reply = live.client.post("/v1/adapters/busy/reload", json={"source": str(versions[number])})
        present[0] = number
        assert ok(reply)["generation"]
        before = counts[number]
        while counts[number] < before + 4 and not wrong:
            stop.wait(0.01)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not wrong, json.dumps(wrong[0])
    assert all(counts[1:])
    unload(live, "busy")
