"""benchmarks/compare.py on tiny models: our server beside a second one that is known by its address only."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import MODEL, Live, serving, write_adapters, write_model

from comparison.peers import LineSession, Place
from comparison.processes import LineChild
from comparison.report import figures, markdown
from comparison.rounds import Result, Round, compare
from comparison.scenarios import Contestant, Row, read_scenarios
from truffula.errors import ProcessFailed

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
SMALL = {"max_model_len": 160, "threads": 1, "memory": "1GiB"}
MACHINE = {"cpu": "a machine", "isa": "AVX2", "cores": 2, "commit": "abc"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A folder as the peers' scripts make it, with a tiny model."""
    files = tmp_path_factory.mktemp("peers")
    model = write_model(files / "models" / "tiny")
    write_adapters(files / "adapters", model)
    return Place(PEERS, files)


@pytest.fixture(scope="module")
def other(place: Place) -> Iterator[Live]:
    names = {path.name: str(path) for path in (place.files / "adapters").iterdir()}
    with serving(place.files / "models" / "tiny", adapters=names, max_model_len=160) as live:
        yield live


def row(measure: str, *contestants: Contestant, **more: object) -> Row:
    given = {"prompt_tokens": 9, "max_tokens": 5, "vocab_size": 300, "adapter_dir": "adapters", **more}
    return Row("tiny", "a tiny model", measure, contestants, **given)  # type: ignore[arg-type]


OURS = Contestant("truffula", "models/tiny", options=SMALL)


def silent(text: str) -> None:
    assert text


def test_two_servers_in_turn_with_distinct_adapters(place: Place, other: Live) -> None:
    peer = Contestant("openai", MODEL, name="the other", url=other.url)
    result = compare(row("throughput", OURS, peer, clients=2, adapters="distinct"), place, 1, silent)
    assert {title: len(rounds) for title, rounds in result.rounds.items()} == {"truffula": 1, "the other": 1}
    assert all(turn.runs[0]["output_tokens"] == 10 for rounds in result.rounds.values() for turn in rounds)
    assert result.versions["the other"] == other.url


def test_time_to_first_token_of_a_server_by_its_address(place: Place, other: Live) -> None:
    peer = Contestant("openai", MODEL, url=other.url)
    result = compare(row("ttft", peer, requests=2), place, 2, silent)
    assert [turn.value > 0 for turn in result.rounds["openai"]] == [True, True]
    assert result.rounds["openai"][0].runs[0]["prefix_hit_rate"] == 0.0


def test_rounds_ask_different_prompts_and_a_cached_one_is_refused(place: Place, other: Live) -> None:
    peer = Contestant("openai", MODEL, url=other.url)
    long = row("throughput", peer, prompt_tokens=40, vocab_size=310)
    compare(long, place, 2, silent)
    assert "prefix cache" in compare(long, place, 1, silent).absent["openai"]


@pytest.mark.slow
def test_decode_and_prefill_without_a_server(place: Place) -> None:
    for measure in ("decode", "prefill"):
        (turn,) = compare(row(measure, OURS, runs=2), place, 1, silent).rounds["truffula"]
        assert len(turn.runs[0]["tok_s"]) == 2 and turn.runs[0]["weight_bytes"] > 0
        assert ("of_roofline" in turn.runs[0]) is (measure == "decode")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what processes hold in /proc")
def test_memory_adds_up(place: Place) -> None:
    (turn,) = compare(row("memory", OURS, requests=3), place, 1, silent).rounds["truffula"]
    run = turn.runs[0]
    assert run["pss"] - run["model_file"] - run["weights"] - run["kv"] == run["pss_beside"] > 0
    assert run["pss"] >= run["anonymous"] > run["weights"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what processes hold in /proc")
def test_kv_that_the_load_did_not_reach_is_not_taken_off(place: Place) -> None:
    """Blocks that hold nothing may never have been touched: subtracting them would make the figure too small."""
    requests = [row("memory", OURS, requests=count, prompt_tokens=40) for count in (1, 3)]
    one, three = (compare(asked, place, 1, silent).rounds["truffula"][0].runs[0]["kv"] for asked in requests)
    assert three > one > 0


@pytest.mark.slow
def test_start_to_first_token(place: Place) -> None:
    (turn,) = compare(row("start", OURS), place, 1, silent).rounds["truffula"]
    assert turn.value == pytest.approx(1000 * turn.runs[0]["start_s"], abs=0.1)


def test_who_is_not_installed_is_named_with_the_command(place: Place) -> None:
    ours, theirs = Contestant("truffula", "models/none"), Contestant("llama-server", "models/gguf/none.gguf")
    result = compare(row("throughput", ours, theirs), place, 1, silent)
    assert result.rounds == {}
    assert "models.sh setup" in result.absent["truffula"]
    assert "llamacpp.sh setup" in result.absent["llama-server"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("[ $1 != version ] || { echo no versions here >&2; exit 3; }", "no versions here"),
        ("[ $1 = check ] || printf '\\377'", "UnicodeDecodeError"),
        ("printf '\\377'", "UnicodeDecodeError"),
    ],
    ids=["version fails", "version is no text", "check is no text"],
)
def test_who_cannot_be_asked_is_out_with_the_reason(place: Place, other: Live, tmp_path: Path, script, said) -> None:
    (tmp_path / "vllm.sh").write_text(script + "\n")
    broken = Contestant("vllm", "models/tiny")
    peer = Contestant("openai", MODEL, url=other.url)
    asked = row("throughput", broken, peer, prompt_tokens=13)
    result = compare(asked, Place(tmp_path, place.files), 1, silent)
    assert list(result.rounds) == ["openai"]
    assert "vllm failed: " in result.absent["vllm"] and said in result.absent["vllm"]


def test_an_unknown_option_of_ours_is_named(place: Place) -> None:
    wrong = Contestant("truffula", "models/tiny", options={"max_model_length": 5})
    result = compare(row("throughput", wrong), place, 1, silent)
    assert result.rounds == {} and "max_model_len" in result.absent["truffula"]


def test_too_few_adapters_are_named(place: Place) -> None:
    many = row("throughput", OURS, clients=9, adapters="distinct")
    assert "needs 9 adapters" in compare(many, place, 1, silent).absent["truffula"]


def test_who_fails_does_not_hold_up_the_others(place: Place, other: Live) -> None:
    gone = Contestant("openai", MODEL, name="gone", url="http://127.0.0.1:9")
    peer = Contestant("openai", MODEL, url=other.url)
    result = compare(row("throughput", gone, peer, prompt_tokens=11), place, 2, silent)
    assert list(result.rounds) == ["openai"] and len(result.rounds["openai"]) == 2
    assert "Connect" in result.absent["gone"]
    assert [one.ratio for one in figures(result)] == [None]


def test_a_child_that_answers_lines(place: Place, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(PEERS)!r})\n"
        "from lines import serve_lines\n"
        "print('a library says hello')\n"
        "answer = lambda q: (q['max_tokens'] * len(q['prompts']), [0.25] * len(q['prompts']))\n"
        "serve_lines(time.perf_counter(), answer)\n"
    )
    with LineChild("child", [sys.executable, str(script)]) as child:
        assert child.read()["ready"] is True
        measured = LineSession(child).run(row("throughput", OURS, clients=3, requests=2).load([], 0))
    assert measured.output_tokens == 30
    assert measured.summary()["ttft_ms"]["p50"] == 250.0


def test_a_child_that_ends_says_why(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with LineChild("child", argv) as child, pytest.raises(ProcessFailed, match="no such model"):
        child.read()


def test_ratios_say_how_many_times_better_the_first_one_is() -> None:
    for measure, faster, slower in (("throughput", 30.0, 10.0), ("ttft", 10.0, 30.0)):
        made = Result(row(measure, OURS, Contestant("vllm", "m")), versions={"truffula": "t", "vllm": "v"})
        run = {"prefix_hit_rate": 0.0, "itl_ms": {}, "ttft_ms": {}}
        made.rounds = {
            "truffula": [Round(faster, (run,)), Round(faster, (run,))],
            "vllm": [Round(slower, (run,)), Round(2 * slower - faster, (run,))],
        }
        first, second = figures(made)
        assert first.ratio is None and second.ratios[0] == 3.0
        text = markdown([made], MACHINE, 2)
        assert "a machine (AVX2), 2 cores, truffula abc; medians of 2" in text and "vllm: v" in text


@pytest.mark.slow
def test_the_command_writes_what_it_measured(place: Place, other: Live, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        '[[row]]\nname = "mine"\nwhat = "w"\nmeasure = "throughput"\nmax_tokens = 3\nprompt_tokens = 9\n'
        "vocab_size = 300\n"
        f'contestant = [{{ peer = "openai", model = "{MODEL}", url = "{other.url}" }}]\n'
    )
    assert [one.name for one in read_scenarios(file)] == ["mine"]
    argv = [
        sys.executable, str(PEERS.parent / "compare.py"), "--scenario-file", str(file), "--repeats", "2",
        "--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md"), "--bench-dir", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["rows"][0]["rounds"]["openai"]) == 2 and report["machine"]["cpu"]
    assert "| w, output tok/s | openai |" in (tmp_path / "r.md").read_text()
