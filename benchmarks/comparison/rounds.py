"""Contestants in turn, round after round; one runs at a time, each started fresh.

On few cores two servers disturb each other even while one idles, so a contestant has the machine alone: it starts, is
warmed up by the row's load (adapters loaded, pages touched, code compiled), answers the measured runs and ends. Rounds
alternate A B A B, so that a machine that slows down slows all of them; a round's value is the median of its runs.
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from comparison.memory import resident
from comparison.peers import (
    HttpSession,
    Place,
    Session,
    adapter_names,
    held,
    missing,
    offline,
    server_of,
    session,
    version,
)
from comparison.scenarios import Contestant, Row
from truffula.bench.load import LoadResult, OpenAI, Stream
from truffula.bench.server import child_error
from truffula.bench.step import read_rate
from truffula.errors import ConfigError, ProcessFailed, TruffulaError
from truffula.kernels.host import usable_cpus

READ_BYTES = 1 << 28
START_TIMEOUT_S = 300.0
# What puts one contestant out of its row; anything else is an error of ours and ends the comparison.
_FAILURES = (TruffulaError, subprocess.SubprocessError, OSError, ValueError, KeyError)
ASK_AGAIN_S = 0.01
"""Between two attempts at a first token: often enough for the figure, seldom enough not to slow the start down."""


@dataclass(frozen=True)
class Round:
    """One contestant's turn: ``value`` in the row's unit, from ``runs`` as they were measured."""

    value: float
    runs: tuple[dict[str, Any], ...]


@dataclass
class Result:
    """What became of a row. ``absent`` says why contestants did not take part, or not to the end, by title."""

    row: Row
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def compare(row: Row, place: Place, repeats: int, tell: Callable[[str], None]) -> Result:
    """Measure ``row`` in ``repeats`` rounds. Who fails in one is out of the row, figures and all, and says why."""
    result, begun = Result(row), time.monotonic()
    present: list[Contestant] = []
    for contestant in row.contestants:
        try:
            why = missing(contestant, place)
            if why is None:
                result.versions[contestant.title] = version(contestant, place)
        except _FAILURES as error:
            why = _failed(contestant, error)
        if why is not None:
            result.absent[contestant.title] = why
            continue
        present.append(contestant)
        result.rounds[contestant.title] = []
    for number in range(repeats):
        for contestant in list(present):
            tell(f"{row.name}, round {number + 1} of {repeats}: {contestant.title} ...")
            try:
                turn = _MEASURE[row.measure](contestant, row, place, number)
            except _FAILURES as error:
                present.remove(contestant)
                del result.rounds[contestant.title]
                result.absent[contestant.title] = _failed(contestant, error)
                continue
            tell(f"{row.name}, round {number + 1} of {repeats}: {contestant.title} {turn.value:.1f} {row.unit}")
            result.rounds[contestant.title].append(turn)
    result.seconds = time.monotonic() - begun
    return result


def _failed(contestant: Contestant, error: Exception) -> str:
    why = str(error) if isinstance(error, TruffulaError) else f"{type(error).__name__}: {error}"
    return f"{contestant.title} failed: {why}"


def _served(contestant: Contestant, row: Row, place: Place, number: int) -> Round:
    names = adapter_names(contestant, row, place)
    with session(contestant, row, place) as running:
        _checked(running, msgspec.structs.replace(row, requests=1), names, -1 - number)
        measured = [_checked(running, row, names, number * row.runs + i) for i in range(row.runs)]
    runs = tuple(one.summary() for one in measured)
    if row.measure == "throughput":
        return Round(statistics.median(run["output_tok_s"] for run in runs), runs)
    if any("p50" not in run["ttft_ms"] for run in runs):
        raise ConfigError(
            f"{row.name!r}: {contestant.title} does not report the time of its first token.", param="measure"
        )
    return Round(statistics.median(run["ttft_ms"]["p50"] for run in runs), runs)


def _checked(running: Session, row: Row, names: Sequence[str], seed: int) -> LoadResult:
    """A run in which every request was answered in full, without hits in a prefix cache."""
    measured = running.run(row.load(names, seed))
    if measured.errors:
        raise ConfigError(f"{len(measured.errors)} requests failed; the first error: {measured.errors[0]}")
    expected = row.clients * row.requests * row.max_tokens
    if measured.output_tokens != expected:
        raise ConfigError(f"{row.name!r}: {measured.output_tokens} tokens were generated, {expected} were requested.")
    if any(stream.cached_tokens for stream in measured.streams):
        raise ConfigError(f"{row.name!r}: part of a prompt was answered from a prefix cache.")
    return measured


def _offline(contestant: Contestant, row: Row, place: Place, number: int) -> Round:
    del number  # its ids do not matter
    rate = read_rate(usable_cpus(), READ_BYTES)
    answer = offline(contestant, row, place)
    value = statistics.median(answer["tok_s"])
    answer["read_gb_per_s"] = round(rate / 1e9, 2)
    if row.measure == "decode":
        answer["of_roofline"] = round(value * row.token_share * answer["weight_bytes"] / rate, 3)
    return Round(value, (answer,))


def _memory(contestant: Contestant, row: Row, place: Place, number: int) -> Round:
    """PSS of all its processes, less the model's mapped files, weights in anonymous memory and KV.

    KV counts as far as it was surely written: whole of a server that clears it at its start, else the blocks that hold
    something now. So what a row's load did not reach makes no figure smaller.
    """
    names = adapter_names(contestant, row, place)
    with session(contestant, row, place) as running:
        assert isinstance(running, HttpSession) and running.server is not None  # memory is measured of servers we start
        _checked(running, row, names, number)
        seen = resident(running.server.pid, place.path(contestant.model))
        weights, kv = held(contestant, place, running.server)
    beside = seen.pss - seen.model_file - weights - kv
    if beside <= 0:
        raise ConfigError(
            f"{row.name!r}: {contestant.title} holds less in memory than its weights ({weights} bytes) and the KV it "
            f"wrote ({kv}): part of it is in swap, or its own numbers are wrong.", param="measure",
        )  # fmt: skip
    run = {**asdict(seen), "weights": weights, "kv": kv, "anonymous_beside": seen.anonymous - weights - kv}
    return Round(round(beside / 1e6, 2), ({**run, "pss_beside": beside},))


def _start(contestant: Contestant, row: Row, place: Place, number: int) -> Round:
    server, dialect = server_of(contestant, row, place)
    prompt = row.load([], number).prompt(0, 0)
    model = place.path(contestant.model)
    for file in [model] if model.is_file() else model.glob("*"):
        if file.is_file():
            file.read_bytes()  # into the page cache
    begun = time.monotonic()
    with server:
        body = json.dumps(dialect.body(prompt, row.max_tokens, None))
        while not _first_token(server.url, dialect, body):
            if server.ended:
                raise child_error(f"{contestant.title} exited during its start", server.output())
            if time.monotonic() - begun > START_TIMEOUT_S:
                raise ProcessFailed(f"{contestant.title} generated no token within {START_TIMEOUT_S:g} seconds.")
            time.sleep(ASK_AGAIN_S)
        seconds = time.monotonic() - begun
    return Round(round(1000 * seconds, 1), ({"start_s": round(seconds, 4)},))


def _first_token(url: str, dialect: OpenAI, body: str) -> bool:
    """Whether a token arrived; False while no server listens or the model is loading."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request("POST", dialect.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return False
        stream = Stream(0.0, 0.0)
        while not stream.tokens and (line := response.readline()):
            if line.startswith(b"data: {"):
                dialect.read(json.loads(line[6:]), time.monotonic(), stream)
        return bool(stream.tokens)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


_MEASURE: dict[str, Callable[[Contestant, Row, Place, int], Round]] = {
    "throughput": _served,
    "ttft": _served,
    "decode": _offline,
    "prefill": _offline,
    "memory": _memory,
    "start": _start,
}
