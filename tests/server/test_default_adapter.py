"""``--default-adapter``: what requests that name nothing get, how they name the base, and who may."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import MODEL, Live, assert_canonical_error, ok, serving, write_adapters, write_model

from truffula import LLM, SamplingParams
from truffula.config import ServerConfig
from truffula.errors import AdapterNotFound, ConfigError

KEYS = """
[[keys]]
id = "all"
key = "sk-all"
adapters = ["*"]

[[keys]]
id = "no-base"
key = "sk-no-base"
adapters = ["*"]
base = false

[[keys]]
id = "poet"
key = "sk-poet"
adapters = ["org/poet"]

[[keys]]
id = "ops"
key = "sk-ops"
adapters = ["*"]
admin = true
"""
ALL, NO_BASE, POET, OPS = ({"authorization": f"Bearer sk-{name}"} for name in ("all", "no-base", "poet", "ops"))
HEADER = "x-truffula-adapter"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("default")
    model = write_model(folder / "llama", max_position_embeddings=512)
    (folder / "keys.toml").write_text(KEYS)
    return model, write_adapters(folder, model)


def server(files: tuple[Path, dict[str, Path]], **options: Any) -> Any:
    model, adapters = files
    named = {name: str(path) for name, path in adapters.items()}
    keys = model.parent / "keys.toml"
    return serving(model, adapters=named, api_keys_file=keys, adapter_admin=True, backend="auto", **options)


@pytest.fixture(scope="module")
def replaced(files: tuple[Path, dict[str, Path]]) -> Iterator[Live]:
    with server(files, default_adapter="pirate") as live:
        yield live


@pytest.fixture(scope="module")
def added(files: tuple[Path, dict[str, Path]]) -> Iterator[Live]:
    with server(files, default_adapter="pirate:0.5", default_adapter_mode="add") as live:
        yield live


def ask(live: Live, headers: dict[str, str] = ALL, path: str = "/v1/completions", **fields: Any) -> tuple[Any, str]:
    """What was answered, and by which adapters."""
    body: dict[str, Any] = {"prompt": "Hello", "max_tokens": 8, "temperature": 0, "return_token_ids": True, **fields}
    if path == "/generate":
        body = {"inputs": "Hello", "parameters": {"max_new_tokens": 8, "details": True, **fields}}
    response = live.post(path, body, headers=headers)
    found = ok(response)
    ids = found["choices"][0]["token_ids"] if "choices" in found else [one["id"] for one in found["details"]["tokens"]]
    return ids, response.headers.get(HEADER, "")


def test_it_answers_what_names_nothing_and_gives_way_to_what_is_named(replaced: Live) -> None:
    pirate, poet, base = (ask(replaced, model=name) for name in ("pirate", "org/poet", MODEL))
    assert [who for _, who in (pirate, poet, base)] == ["pirate", "org/poet", ""]
    assert len({tuple(ids) for ids, _ in (pirate, poet, base)}) == 3
    for nothing in ({}, {"model": None}, {"model": ""}, {"model": "tgi"}, {"adapter_id": ""}):
        assert ask(replaced, **nothing) == pirate
    for plain in ({"model": MODEL}, {"adapter_id": MODEL}, {"adapter_id": "__base_model__"}):
        assert ask(replaced, **plain) == base
    assert ask(replaced, adapter_id="org/poet") == ask(replaced, model=MODEL, adapter_id="org/poet") == poet
    assert ask(replaced, path="/generate") == pirate
    assert ask(replaced, path="/generate", adapter_id=MODEL) == base
    half = {"merged_adapters": {"ids": ["org/poet"], "weights": [0.5]}}
    assert ask(replaced, **half)[1] == "org/poet" and ask(replaced, **half)[0] not in (poet[0], base[0])
    assert ask(replaced, merged_adapters={"ids": ["org/poet"], "weights": [0]}) == base
    assert [one["id"] for one in ok(replaced.client.get("/v1/models", headers=ALL))["data"]][:2] == [MODEL, "in-dir"]


def test_it_is_added_with_its_weight_unless_the_base_is_named(added: Live) -> None:
    def mixed(**weights: float) -> list[int]:
        names = {name.replace("_", "/"): weight for name, weight in weights.items()}
        body = {"ids": list(names), "weights": list(names.values())}
        return ask(added, model=MODEL, merged_adapters=body)[0]

    assert ask(added)[0] == mixed(pirate=0.5) and ask(added)[1] == "pirate"
    ids, who = ask(added, model="org/poet")
    assert ids == mixed(org_poet=1, pirate=0.5) and who == "org/poet+pirate"
    assert ask(added, adapter_id="org/poet")[0] == ids == ask(added, path="/generate", adapter_id="org/poet")[0]
    assert ask(added, model="pirate")[0] == mixed(pirate=1.5)
    alone = mixed(org_poet=1)
    assert ask(added, model=f"{MODEL}:org/poet")[0] == ask(added, model=MODEL, adapter_id="org/poet")[0] == alone
    assert ask(added, model=MODEL)[1] == ""
    eight = {"ids": ["org/poet"] * 7 + ["in-dir"], "weights": [0.1] * 8}
    assert ask(added, merged_adapters=eight)[1] == "in-dir+org/poet+pirate"


def test_rights_hold(replaced: Live, added: Live) -> None:
    def refused(live: Live, headers: dict[str, str], **fields: Any) -> dict[str, Any]:
        body = {"prompt": "Hello", "max_tokens": 1, **fields}
        return assert_canonical_error(live.post("/v1/completions", body, headers=headers), 404)

    assert ask(replaced, NO_BASE)[1] == "pirate", "the default is not the base"
    refused(replaced, NO_BASE, model=MODEL)
    error = refused(replaced, POET)
    assert "pirate" not in str(error) and MODEL in error["message"]
    assert ask(replaced, POET, model="org/poet")[1] == "org/poet"
    assert ask(replaced, POET, model=MODEL)[1] == ""
    assert "pirate" not in str(refused(added, POET, model="org/poet"))
    assert ask(added, POET, model=f"{MODEL}:org/poet")[1] == "org/poet"


@pytest.mark.parametrize(
    "fields",
    [
        {"ids": ["pirate"], "weights": [1e-30]},
        {"ids": ["pirate"], "weights": [-0.5]},
        {"ids": ["pirate", "org/poet"], "weights": [1, 0.05]},
        {"ids": ["pirate"], "merge_strategy": "magnitude_prune", "density": 1e-6},
    ],
)
def test_without_the_right_to_the_base_weights_leave_an_effect(replaced: Live, fields: dict[str, Any]) -> None:
    body = {"prompt": "Hello", "max_tokens": 1, "merged_adapters": fields}
    assert_canonical_error(replaced.post("/v1/completions", body, headers=NO_BASE), 400, "below 0.1")
    if "density" not in fields:
        ok(replaced.post("/v1/completions", body, headers=ALL))


def test_a_default_that_cancels_what_is_named_is_no_way_to_the_base(files: tuple[Path, dict[str, Path]]) -> None:
    with server(files, default_adapter="pirate:-1", default_adapter_mode="add") as live:
        for weight, status in ((1, 404), (1.0000001, 400)):
            body = {"prompt": "a", "max_tokens": 1, "merged_adapters": {"ids": ["pirate"], "weights": [weight]}}
            assert_canonical_error(live.post("/v1/completions", body, headers=NO_BASE), status)


def test_an_alias_is_split_by_the_user_of_the_body(files: tuple[Path, dict[str, Path]]) -> None:
    """Where no header says more: OpenAI's fields and Anthropic's, also of a body that a text worker reads."""
    with server(files, default_adapter="split") as live:
        assert_canonical_error(live.post("/v1/completions", {"prompt": "a"}, headers=ALL), 404, "default adapter")
        targets = {"targets": {"pirate": 1, "org/poet": 1}}
        ok(live.client.put("/v1/adapter_aliases/split", json=targets, headers=OPS))
        split = live.server.loading.app.asgi.state.truffula.directory.registry.alias("split")
        for user in map(str, range(6)):
            who = split.choose(user)
            fields: list[dict[str, Any]] = [{"user": user}, {"safety_identifier": user, "user": "other"}]
            fields.append({"user": user, "prompt": "Hello " * 4000, "truncate_prompt_tokens": 8})
            for more in fields:
                body = {"prompt": "Hello", "max_tokens": 1, **more}
                response = live.post("/v1/completions", body, headers=ALL)
                assert ok(response) and response.headers[HEADER] == who
                assert "user" not in response.headers.get("x-truffula-ignored", "").split(", ") or "other" in str(more)
            talk = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
            more = {"model": "split", "metadata": {"user_id": user}}
            response = live.post("/v1/messages", {**talk, **more}, headers=ALL)
            assert ok(response) and response.headers[HEADER] == who
            header = {**ALL, "x-truffula-split-key": user}
            response = live.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "user": "x"}, headers=header)
            assert response.headers[HEADER] == who and response.headers["x-truffula-ignored"] == "user"
        response = live.post("/v1/completions", {"prompt": "a", "model": "pirate", "user": "x"}, headers=ALL)
        assert response.headers["x-truffula-ignored"] == "user", "it has an effect on a split only"


def test_the_option() -> None:
    def default(text: str) -> tuple[str, float] | None:
        return ServerConfig(default_adapter=text).default

    assert default("pirate") == ("pirate", 1.0) and default("pirate:0.5") == ("pirate", 0.5)
    assert default("a:b") == ("a:b", 1.0) and default("http://host:80/a") == ("http://host:80/a", 1.0)
    assert default("support@7:-2") == ("support@7", -2.0)
    for wrong in ("pirate:0", "pirate:1e4", "pirate:nan"):
        with pytest.raises(ConfigError, match="its weight must be"):
            default(wrong)
    with pytest.raises(ConfigError, match="needs default_adapter"):
        ServerConfig(default_adapter_mode="add")


def test_of_the_library(files: tuple[Path, dict[str, Path]]) -> None:
    model, adapters = files
    params = SamplingParams(temperature=0, max_tokens=8)
    with LLM(model, adapters=adapters, default_adapter="pirate") as llm:

        def ids(**given: Any) -> list[list[int]]:
            return [one.token_ids for one in llm.generate(["Hello"] * 3, params, **given)]

        pirate, poet, base = ids(adapters=["pirate", "org/poet", str(model)])
        assert ids() == [pirate] * 3 and ids(adapters=[None, "org/poet", llm.info.model]) == [pirate, poet, base]
        assert len({tuple(one) for one in (pirate, poet, base)}) == 3
    with LLM(model, default_adapter={str(adapters["pirate"]): 0.5}) as llm:
        assert ids()[0] not in (pirate, base)
    with pytest.raises(AdapterNotFound, match="nowhere"):
        LLM(model, default_adapter="nowhere")


def test_texts_are_tokenized_as_a_request_would_be(files: tuple[Path, dict[str, Path]], replaced: Live) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    own = files[1]["pirate"] / "chat_template.jinja"
    own.write_text("own {{ messages[0].content }}")
    try:
        for padding in ({}, {"wish": "x" * 100_000}):
            found = [
                ok(replaced.post("/chat_tokenize", chat | named | padding, headers=ALL))["templated_text"]
                for named in ({}, {"model": "pirate"}, {"model": MODEL})
            ]
            assert found[:2] == ["own Hi"] * 2 and not found[2].startswith("own")
            refused = replaced.post("/chat_tokenize", chat | padding, headers=POET)
            assert refused.status_code == 424 and "default adapter" in refused.text and "own" not in refused.text
    finally:
        own.unlink()
