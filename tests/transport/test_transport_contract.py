"""One contract for both transports: the same requests give the same events, and each ends exactly once."""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from following import DIGITS, PATIENCE_S, VOCABULARY, Answer, ask, eventually, fold, follow, run, text_of, tiny_engine

from truffula.engine.client import TRANSPORTS, EngineClient, connect
from truffula.engine.engine import Engine
from truffula.errors import AdapterError, InsufficientMemory, InvalidRequest, ModelNotFound, ShuttingDown
from truffula.testing.adapters import write_tiny_adapter
from truffula.types import AdapterCommand, AdapterRef, EngineRequest

each = pytest.mark.parametrize("transport", TRANSPORTS)


@pytest.fixture(scope="module", params=TRANSPORTS)
def client(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[EngineClient]:
    """One engine per transport for all tests that leave it running."""
    started = connect(tiny_engine(tiny_model), request.param)
    yield started
    started.close()


def mixture() -> list[EngineRequest]:
    return [
        ask("greedy", [3, 4, 5]),
        ask("sampled", [3, 4, 5], temperature=0.9, top_k=20, seed=2**64 - 1, max_tokens=12),
        ask("scored", [3, 4, 5], temperature=0.9, seed=5, logprobs=3),
        ask("long", [n % 90 + 3 for n in range(150)], prompt_logprobs=1, max_tokens=3),
        ask("biased", [9, 8], logit_bias={17: 100.0}, max_tokens=3),
        ask("stopped", [9, 8], logit_bias={17: 100.0}, stop_token_ids=(17,)),
        ask("nothing", []),
        ask("foreign", [3, 101]),
        ask("absurd", [10**30]),
        ask("too long", [3] * 4096),
    ]


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> dict[str, Answer]:
    """The mixture one request after another, in line."""
    answers: dict[str, Answer] = {}
    single = connect(tiny_engine(tiny_model), "inline")
    for request in mixture():
        answers |= run(single, [request])
    single.close()
    return answers


def scores(answer: Answer) -> np.ndarray:
    prompt = [entry[0] for entry in answer.prompt_logprobs or [] if entry is not None]
    return np.array([*answer.logprobs, *prompt])


@pytest.mark.parametrize("field", ["salt", "request_id"])
def test_text_that_cannot_cross_to_a_process_is_refused_before_any_transport(field: str):
    with pytest.raises(InvalidRequest, match=f"^{field} contains a lone surrogate") as caught:
        msgspec.structs.replace(ask("salted", [3, 4, 5]), **{field: "a\ud800"})
    assert caught.value.param == field


def test_the_same_requests_give_the_same_events(client: EngineClient, alone: dict[str, Answer]):
    got = run(client, mixture())
    for name, answer in alone.items():
        assert got[name].token_ids == answer.token_ids, name
        assert (got[name].finish, got[name].stop_reason) == (answer.finish, answer.stop_reason), name
        assert got[name].code == answer.code, name
        if name != "absurd":  # its number is refused where it is met first: by the frame, or by the engine
            assert got[name].message == answer.message, name
        np.testing.assert_allclose(scores(got[name]), scores(answer), atol=1e-4)
    assert len(scores(got["scored"])) == 6 and len(scores(got["long"])) == 149
    assert [got[n].finish for n in ("greedy", "sampled", "scored", "long", "biased")] == ["length"] * 5
    assert got["biased"].token_ids == [17, 17, 17] and (got["stopped"].finish, got["stopped"].stop_reason) == (
        "stop",
        17,
    )
    assert got["too long"].code == "prompt_too_long"
    assert {got[n].code for n in ("nothing", "foreign", "absurd")} == {"invalid_request"}


def test_who_listens_is_called_when_events_come_and_none_waited(client: EngineClient, alone: dict[str, Answer]):
    """A call that was left out would end this in its time limit: nothing else asks."""
    heard = threading.Event()
    if not client.listen(heard.set):  # it steps while it is asked, and only then
        client.submit([ask("asked", [3, 4, 5])])
        assert follow(client, ["asked"])["asked"].token_ids == alone["greedy"].token_ids
        assert not heard.is_set()
        return
    answers: dict[str, Answer] = {}
    requests = mixture()
    client.submit(requests)
    while len(answers) < len(requests) or any(answer.finish is None for answer in answers.values()):
        assert heard.wait(PATIENCE_S), f"nothing was heard, and only {sorted(answers)} were answered"
        heard.clear()
        fold(answers, client.events(0))
    assert {name: (answer.token_ids, answer.finish) for name, answer in answers.items()} == {
        name: (answer.token_ids, answer.finish) for name, answer in alone.items()
    }
    client.listen(None)
    heard.clear()
    assert run(client, [ask("unheard", [3, 4, 5])])["unheard"].token_ids == alone["greedy"].token_ids
    assert not heard.is_set()


def test_who_begins_to_listen_hears_of_events_that_wait_already(client: EngineClient):
    heard = threading.Event()
    client.submit([ask("nothing before", [])])  # its end is there at once
    listened = client.listen(heard.set)
    assert heard.wait(PATIENCE_S if listened else 0) == listened  # one that steps while it is asked calls nobody
    assert follow(client, ["nothing before"])["nothing before"].code == "invalid_request"
    client.listen(None)


def test_an_abort_ends_its_request_and_no_other(client: EngineClient):
    client.submit([ask("goes", [5, 6], max_tokens=4000, ignore_eos=True), ask("stays", [5, 6], max_tokens=40)])
    answers: dict[str, Answer] = {}
    eventually(lambda: fold(answers, client.events(0.1)) or "goes" in answers, "the first token")
    client.abort(["goes", "nobody"])
    follow(client, ["goes", "stays"], answers)
    assert answers["goes"].finish == "abort"
    assert answers["stays"].finish in ("length", "stop")


def test_an_abort_that_follows_at_once_still_gives_one_final_event(client: EngineClient):
    client.submit([ask(f"quick {n}", [5, 6], max_tokens=1) for n in range(5)])
    client.abort([f"quick {n}" for n in range(5)])
    ends = follow(client, [f"quick {n}" for n in range(5)])
    assert {answer.finish for answer in ends.values()} <= {"abort", "length"}


def test_a_request_id_in_use_is_refused_and_the_request_in_flight_goes_on(client: EngineClient):
    client.submit([ask("twice", [5, 6], max_tokens=30)])
    with pytest.raises(InvalidRequest, match="twice"):
        client.submit([ask("other", [5, 6]), ask("twice", [7, 8])])
    assert follow(client, ["twice"])["twice"].finish in ("length", "stop")
    assert run(client, [ask("other", [5, 6]), ask("twice", [7, 8])])["other"].finish


def test_statistics_come_to_rest_when_nothing_runs(client: EngineClient):
    run(client, [ask("counted", [3, 4, 5])])
    stats = eventually(lambda: (s := client.stats()).running == s.waiting == s.used_blocks == 0 and s, "an idle engine")
    assert stats.steps > 0 and stats.generated_tokens > 0 and stats.num_blocks == client.info.num_blocks
    assert client.alive()


def test_threads_may_submit_while_one_consumes(client: EngineClient):
    def send(word: str) -> None:
        for n in range(10):
            client.submit([ask(f"{word}{n}", [3 + n, 4], max_tokens=3)])

    threads = [threading.Thread(target=send, args=(word,)) for word in "abc"]
    for thread in threads:
        thread.start()
    ends = follow(client, [f"{word}{n}" for word in "abc" for n in range(10)])
    for thread in threads:
        thread.join()
    for n in range(10):
        assert ends[f"a{n}"].token_ids == ends[f"b{n}"].token_ids == ends[f"c{n}"].token_ids


def test_a_pause_holds_requests_and_resume_continues_them(client: EngineClient):
    wanted = {"max_tokens": 40, "ignore_eos": True}
    expected = run(client, [ask("before", [5, 6], **wanted)])["before"].token_ids
    answers: dict[str, Answer] = {}
    client.submit([ask("held", [5, 6], **wanted)])
    eventually(lambda: fold(answers, client.events(0.1)) or answers, "the first token")
    client.control("pause")
    assert client.stats().paused
    fold(answers, client.events(0))
    client.submit([ask("later", [5, 6], **wanted)])
    held = len(answers["held"].token_ids)
    assert client.events(0.2) == [] and 0 < held < 40
    assert client.alive()
    client.control("resume")
    assert not client.stats().paused
    ends = follow(client, ["held", "later"], answers)
    assert [ends[name].token_ids for name in ("held", "later")] == [expected] * 2


def test_a_drain_ends_what_runs_and_resetting_the_cache_forgets_prompts(client: EngineClient):
    answers: dict[str, Answer] = {}
    client.submit([ask("runs", [5, 6], max_tokens=60, ignore_eos=True)])
    eventually(lambda: fold(answers, client.events(0.1)) or answers, "the first token")
    client.control("drain")
    fold(answers, client.events(0))
    assert answers["runs"].finish == "length" and client.stats().running == 0
    client.control("reset_prefix_cache")
    assert client.stats().cached_blocks == 0
    client.control("resume")
    assert run(client, [ask("after", [5, 6], max_tokens=1)])["after"].finish == "length"


def test_an_adapter_is_loaded_listed_used_and_unloaded(client: EngineClient, tiny_adapter: Path):
    ref = AdapterRef(name="loud", locator=str(tiny_adapter))
    (state,) = client.adapters(AdapterCommand(action="load", ref=ref))
    assert (state.name, state.status, state.rank) == ("loud", "resident", 3)
    assert [s.name for s in client.adapters(AdapterCommand(action="list"))] == ["loud"]
    got = run(client, [ask("base", [3, 4, 5]), ask("loud", [3, 4, 5], ref)])
    assert got["loud"].finish in ("length", "stop") and got["loud"].token_ids != got["base"].token_ids
    client.adapters(AdapterCommand(action="unload", ref=ref))
    assert client.adapters(AdapterCommand(action="list")) == []


def test_an_adapter_is_loaded_by_the_request_that_names_it(client: EngineClient, tiny_adapter: Path):
    ref = AdapterRef(name="by request", locator=str(tiny_adapter))
    assert run(client, [ask("first", [3, 4, 5], ref)])["first"].finish in ("length", "stop")


def test_a_broken_adapter_fails_its_command_and_its_requests_only(
    client: EngineClient, tiny_model: Path, tmp_path: Path
):
    folder = write_tiny_adapter(tmp_path / "broken", tiny_model)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    ref = AdapterRef(name="broken", locator=str(folder))
    with pytest.raises(AdapterError, match="use_dora"):
        client.adapters(AdapterCommand(action="load", ref=ref))
    got = run(client, [ask("bad", [3, 4, 5], ref), ask("good", [3, 4, 5])])
    assert (got["bad"].finish, got["bad"].code) == ("error", "adapter_invalid") and "use_dora" in got["bad"].message
    assert got["good"].finish in ("length", "stop")


@each
def test_a_grammar_holds_and_nothing_of_it_is_loaded_before(transport: str, start: Callable[..., EngineClient]):
    client = start(transport)
    free = ask("free", [3, 4, 5])
    before = run(client, [free, ask("early", [3, 4], grammar=DIGITS)])
    assert before["early"].code == "invalid_request" and "no vocabulary" in before["early"].message
    maps = Path("/proc", str(getattr(client, "pid", "self")), "maps")
    assert transport == "inline" or "llguidance" not in maps.read_text()
    client.set_vocabulary(VOCABULARY)
    client.set_vocabulary(VOCABULARY)
    broken = msgspec.structs.replace(DIGITS, key="broken", source="start: (")
    choices = [
        msgspec.structs.replace(ask(f"c{n}", [3, 4], grammar=DIGITS, temperature=1.0, max_tokens=9), choice=n)
        for n in range(3)
    ]
    got = run(
        client, [*choices, ask("broken", [3, 4], grammar=broken), free, ask("short", [3], None, DIGITS, max_tokens=2)]
    )
    texts = {text_of(got[f"c{n}"]) for n in range(3)}
    assert all(len(text) == 4 and text.isdigit() for text in texts) and len(texts) > 1
    assert {(got[f"c{n}"].finish, got[f"c{n}"].stop_reason) for n in range(3)} == {("stop", None)}
    assert (got["short"].finish, text_of(got["short"]).isdigit()) == ("length", True)
    assert got["broken"].code == "grammar_failed" and "cannot be compiled" in got["broken"].message
    assert got["free"].token_ids == before["free"].token_ids
    assert "llguidance" in maps.read_text()


@each
def test_closing_ends_what_is_open_and_may_be_repeated(transport: str, start: Callable[..., EngineClient]):
    client = start(transport)
    client.submit([ask("open", [5, 6], max_tokens=4000, ignore_eos=True)])
    client.close()
    client.close()
    answers: dict[str, Answer] = {}
    fold(answers, client.events(None))
    assert (answers["open"].finish, answers["open"].code) == ("error", "shutting_down")
    assert client.events(None) == [] and not client.alive()
    client.submit([ask("late", [5, 6])])
    client.abort(["late"])
    assert follow(client, ["late"])["late"].code == "shutting_down"
    with pytest.raises(ShuttingDown):
        client.adapters(AdapterCommand(action="list"))


@each
def test_the_start_is_followed_and_its_failure_is_the_original_error(
    transport: str, start: Callable[..., EngineClient], tmp_path: Path
):
    stages: list[str] = []
    client = start(transport, lambda stage, done, total: stages.append(stage))
    assert stages and client.info.model_type == "llama"
    with pytest.raises(ModelNotFound):
        start(transport, model=str(tmp_path / "nowhere"))
    with pytest.raises(InsufficientMemory) as caught:
        start(transport, memory_bytes=1000)
    assert caught.value.data["limit_bytes"] == 1000 < caught.value.data["needed_bytes"]


def test_an_error_of_the_engine_itself_ends_every_request(
    start: Callable[..., EngineClient], monkeypatch: pytest.MonkeyPatch
):
    client = start("inline")

    def broken(self: Engine) -> Any:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(Engine, "step", broken)
    got = run(client, [ask("a", [3]), ask("b", [4])])
    assert {a.code for a in got.values()} == {"engine_died"} and "a bug of ours" in got["a"].message
    assert not client.alive()
    assert run(client, [ask("c", [3])])["c"].code == "engine_died"


def test_starting_and_closing_leaves_no_descriptor_thread_or_child(start: Callable[..., EngineClient]):
    def destination(link: Path) -> Path | None:
        try:
            return link.readlink()
        except OSError:  # closed since it was listed, the listing's own descriptor too
            return None

    def held() -> set[str]:
        """What is open and running by name: what earlier tests left may end in our middle, but nothing may be new."""
        gc.collect()
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208  names only
        files = {f"{link.name} {target}" for link in links if (target := destination(link)) is not None}
        threads = {f"thread {thread.ident} {thread.name}" for thread in threading.enumerate()}
        return files | threads | {f"child {child.pid}" for child in psutil.Process().children(recursive=True)}

    def serve(transport: str) -> None:
        client = start(transport)
        run(client, [ask("a", [3])])
        client.close()

    serve("inline")  # whatever a first start leaves for good is there now
    before = held()
    for transport in TRANSPORTS:
        serve(transport)
    assert held() - before == set()
