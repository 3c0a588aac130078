"""``truffula bench adapters``: what adapters cost. Two sides of a row take turns (A B A B), each with prompts of random
ids that no other has; the ratio is the median of the rounds'. Engines are processes of their own; adapters are random,
in bfloat16, and of all linear layers unless a row says otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from truffula.bench.load import Load, run_load, zipf_weights
from truffula.bench.server import plan_of, random_adapters, truffula_server
from truffula.config import EngineConfig
from truffula.llm import LLM
from truffula.params import SamplingParams
from truffula.testing.adapters import PREFIX, linear_modules, tiny_config, tiny_tensors, write_adapter
from truffula.testing.files import Array, as_dtype

ROWS = 32
MIXED = (4, 8, 16, 32, 64, 128)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Row:
    """A figure with its goal: ``value`` in ``unit`` ("x" is a ratio) is to be at least ``goal``, or with ``most`` at
    most. ``sides`` says what was measured.
    """

    what: str
    value: float
    unit: str
    goal: float
    most: bool
    sides: str

    @property
    def met(self) -> bool:
        return self.value <= self.goal if self.most else self.value >= self.goal

    @property
    def shown(self) -> tuple[str, str, str, str]:
        """Its cells: what, figure, goal, sides."""
        unit = "" if self.unit == "x" else f" {self.unit}"
        figure = f"{self.value:.{2 if self.unit == 'x' else 1}f}{unit}"
        return self.what, figure, f"{'at most' if self.most else 'at least'} {self.goal:g}{unit}", self.sides


@dataclass(frozen=True)
class Sizes:
    """How much is measured. ``repeats``: counted rounds of a row. ``many`` of zipf, ``registered`` in the server."""

    repeats: int = 3
    tokens: int = 64
    count: int = 12
    many: int = 1000
    registered: int = 10_000
    ranks: tuple[int, ...] = (16, 256)


TINY = Sizes(repeats=1, tokens=4, count=3, many=20, registered=200, ranks=(4,))


class Bench:
    """A model, a folder for adapters, and how much to measure."""

    def __init__(self, config: EngineConfig, folder: Path, sizes: Sizes, files: Sequence[str] = ()) -> None:
        self.config, self.folder, self.sizes, self.files = config, folder, sizes, files
        self.plan = plan_of(config)
        self.sites = self.plan.interface.sites
        self.embed = next(site for site in self.sites if site.kind == "embed")
        self._random = random.Random(0)

    def engine(self, **options: Any) -> LLM:
        given = {"model": self.config.model, "dtype": self.config.dtype, "threads": self.config.threads}
        return LLM(transport="process", max_running=ROWS, **given | options)

    def ranks(self, name: str, ranks: Sequence[int]) -> list[str]:
        """Folders of LoRA adapters with these ranks."""
        for number, rank in enumerate(ranks):
            random_adapters(self.plan, self.folder, [f"{name}{number}"], rank, first_seed=number)
        return [str(self.folder / f"{name}{number}") for number in range(len(ranks))]

    def kind(self, name: str, fields: Mapping[str, Any], more: Callable[[int], dict[str, Array]]) -> list[str]:
        """Folders of adapters of rank 16 with further ``fields``, and the tensors that ``more`` makes of a seed."""
        config = tiny_config(rank=16, alpha=32, targets="all-linear", base_model_name_or_path=None, **fields)
        for seed in range(ROWS):
            made = tiny_tensors(self.sites, config, seed=seed, dtype="bfloat16")
            made |= {PREFIX + key: as_dtype(value, "bfloat16") for key, value in more(seed).items()}
            write_adapter(self.folder / f"{name}{seed}", config, made)
        return [str(self.folder / f"{name}{seed}") for seed in range(ROWS)]

    def outputs(self, suffix: str) -> Callable[[int], dict[str, Array]]:
        """A vector of 0.5 for each linear module's outputs."""
        made = {f"{n}.{suffix}": np.full(out, 0.5, np.float32) for n, (_, out) in linear_modules(self.sites).items()}
        return lambda seed: made

    def embedding(self, seed: int) -> dict[str, Array]:
        """A and B of rank 16 of the embedding."""
        embed, rng = self.embed, np.random.default_rng(seed)
        sizes = {"A": (16, embed.in_features), "B": (embed.out_features, 16)}
        return {f"{embed.module}.lora_embedding_{half}": rng.normal(0, 0.02, size) for half, size in sizes.items()}

    def tokens(self, seed: int) -> dict[str, Array]:
        """Trained rows of 16 tokens."""
        rows = np.random.default_rng(seed).normal(0, 0.02, (16, self.embed.out_features))
        return {f"{self.embed.module}.token_adapter.trainable_tokens_delta": rows}

    def prompt(self, length: int) -> list[int]:
        return [self._random.randrange(5, self.plan.interface.vocab_size) for _ in range(length)]

    def rate(self, llm: LLM, adapters: Sequence[str | None], *, prompt: int = 16, tokens: int | None = None) -> float:
        """Tokens a second of one batch: the new ones, or with ``tokens`` 0 those of the prompts."""
        new = self.sizes.tokens if tokens is None else max(tokens, 1)
        prompts = [self.prompt(prompt) for _ in adapters]
        began = time.perf_counter()
        llm.generate(prompts, _greedy(new), adapters=list(adapters), progress=False)
        return len(adapters) * (prompt if tokens == 0 else new) / (time.perf_counter() - began)

    def row(self, what: str, goal: float, one: Callable[[], float], other: Callable[[], float]) -> Row:
        """The rates of both sides, after a round that is not counted."""
        rounds = [(one(), other()) for _ in range(self.sizes.repeats + 1)][1:]
        mine, base = (statistics.median(side) for side in zip(*rounds, strict=True))
        ratio = statistics.median(a / b for a, b in rounds)
        return Row(what, ratio, "x", goal, False, f"{mine:.0f} of {base:.0f} tokens/s")


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def join(bench: Bench) -> Iterator[Row]:
    """The time to the first token of an adapter's first request, minus that of its second."""
    folders = bench.ranks("join", [16] * bench.sizes.count)
    with bench.engine(adapters={"first": folders[0]}) as llm:
        bench.rate(llm, [None] * 4)
        time.sleep(1)  # the loading worker starts beside the engine

        def first_token(folder: str) -> float:
            began = time.perf_counter()
            for _ in llm.stream(bench.prompt(8), _greedy(1), adapter=folder):
                pass
            return 1e3 * (time.perf_counter() - began)

        times = [first_token(folder) - first_token(folder) for folder in folders]
    sides = f"median of {len(times)}; longest {max(times):.1f} ms, the first {times[0]:.1f} ms"
    yield Row("a cold adapter of rank 16 joins", statistics.median(times), "ms", 20, True, sides)


def gaps(bench: Bench) -> Iterator[Row]:
    """The longest gap between two tokens of a running stream, to its median gap, while adapters come and go."""
    count, sizes = bench.sizes.count, bench.sizes
    folders = {rank: bench.ranks(f"gap{rank}-", [rank] * count) for rank in sizes.ranks}
    some = folders[sizes.ranks[0]]
    crowd = bench.ranks("crowd", [8] * min(100, sizes.many))

    def load(llm: LLM, names: Sequence[str]) -> None:
        for name in names:
            llm.adapters.load(name, name)
        for name in names:
            llm.adapters.unload(name)

    def reload(llm: LLM) -> None:
        for source in some:
            for name in (CONFIG, TENSORS):
                fresh = bench.folder / f"new-{name}"
                fresh.write_bytes((Path(source) / name).read_bytes())
                fresh.replace(bench.folder / "reload" / name)
            llm.adapters.load("reload", bench.folder / "reload")

    def crowded(llm: LLM) -> None:
        with ThreadPoolExecutor(len(crowd)) as threads:
            list(threads.map(llm.adapters.load, crowd, crowd))

    def merge(llm: LLM) -> None:
        for first, second in pairwise(some):
            ref = llm.adapters.merge({first: 0.5, second: 0.5}, "ties", density=0.5)
            llm.generate([bench.prompt(4)], _greedy(1), adapters=ref, progress=False)

    (bench.folder / "reload").mkdir()
    with bench.engine() as llm:
        idle = _gaps(llm, lambda: time.sleep(1))
        yield Row("longest gap of a stream alone, to its median", *_longest(idle))
        for rank, names in folders.items():
            found = _gaps(llm, functools.partial(load, llm, names))
            yield Row(f"while {count} of rank {rank} load", *_longest(found))
        more = {"one is reloaded": reload, f"{len(crowd)} load at once": crowded, "some are merged": merge}
        for what, work in more.items():
            yield Row(f"while {what}", *_longest(_gaps(llm, functools.partial(work, llm))))
        nbytes = max(one.nbytes for one in llm.adapters.list() if one.rank == 8)
    with bench.engine(adapter_memory_bytes=4 * nbytes) as llm:
        found = _gaps(llm, lambda: [bench.rate(llm, [name], tokens=1) for name in crowd[: 4 * count]])
        yield Row(f"while {4 * count} are evicted in turn", *_longest(found))


def _longest(found: Sequence[float]) -> tuple[float, str, float, bool, str]:
    median, longest = statistics.median(found), max(found)
    return longest / median, "x", 2, True, f"{1e3 * longest:.1f} of {1e3 * median:.1f} ms, {len(found)} gaps"


def _gaps(llm: LLM, work: Callable[[], object]) -> list[float]:
    """Seconds between the tokens of a stream of the base while ``work`` runs."""
    errors: list[BaseException] = []
    begin = threading.Event()

    def run() -> None:
        begin.wait()
        try:
            work()
        except BaseException as error:  # noqa: BLE001  (raised below, in the caller's thread)
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    times: list[float] = []
    while thread.is_alive() or len(times) < 10:
        times.append(0.0)  # a stream ended at its longest
        for _ in llm.stream([5, 6, 7], _greedy(llm.info.max_model_len - 16)):
            times.append(time.perf_counter())
            if len(times) > 8:
                begin.set()
            if len(times) > 16 and not thread.is_alive():
                break
    thread.join()
    if errors:
        raise errors[0]
    return [late - early for early, late in islice(pairwise(times), 8, None) if early and late]


def ranks(bench: Bench) -> Iterator[Row]:
    """Mixed ranks, to one rank of equal bytes."""
    mixed = list(islice(cycle(MIXED), ROWS))
    mine, same = bench.ranks("mixed", mixed), bench.ranks("same", [round(statistics.fmean(mixed))] * ROWS)
    with bench.engine() as llm:
        yield bench.row(f"{ROWS} mixed ranks 4-128, of one rank and equal bytes", 0.9,
                        lambda: bench.rate(llm, mine), lambda: bench.rate(llm, same))  # fmt: skip


def kinds(bench: Bench) -> Iterator[Row]:
    """Kinds of adapters, to plain LoRA of the same rank."""
    plain = bench.ranks("plain", [16] * ROWS)
    targets = sorted({name.rpartition(".")[2] for name in (*linear_modules(bench.sites), bench.embed.module)})
    made: dict[str, tuple[float, dict[str, Any], Callable[[int], dict[str, Array]]]] = {
        "DoRA": (0.9, {"use_dora": True}, bench.outputs("lora_magnitude_vector")),
        "and biases of B": (0.95, {"lora_bias": True}, bench.outputs("lora_B.bias")),
        "and the embedding": (0.95, {"target_modules": targets}, bench.embedding),
        "and 16 trained tokens": (0.95, {"trainable_token_indices": list(range(5, 21))}, bench.tokens),
    }
    with bench.engine() as llm:
        rate = functools.partial(bench.rate, llm)
        for number, (what, (goal, fields, more)) in enumerate(made.items()):
            mine = bench.kind(f"kind{number}-", fields, more)
            what = f"{ROWS} of rank 16 {what}, of plain"
            yield bench.row(what, goal, functools.partial(rate, mine), functools.partial(rate, plain))


def prompts(bench: Bench) -> Iterator[Row]:
    """Prompts with adapters, to the base's."""
    folders = bench.ranks("prompt", [16] * ROWS)
    with bench.engine() as llm:
        rate = functools.partial(bench.rate, llm, prompt=128, tokens=0)
        for count, goal in ((1, 0.95), (8, 0.9), (ROWS, 0.8)):
            names = list(islice(cycle(folders[:count]), ROWS))
            what = f"prompts of 128 with {count} adapter{'s' * (count > 1)}, of the base"
            yield bench.row(what, goal, functools.partial(rate, names), functools.partial(rate, [None] * ROWS))


def zipf(bench: Bench) -> Iterator[Row]:
    """Requests draw their adapters, the one of rank k by 1 / k; the memory holds a tenth of them, or all."""
    many = bench.sizes.many
    names, weights, draw = _alike(bench, "zipf", many), zipf_weights(many, 1.0), random.Random(1)
    rounds = [draw.choices(names, cum_weights=weights, k=4 * ROWS) for _ in range(bench.sizes.repeats + 1)]
    mine, same = iter(rounds), iter(rounds)
    with bench.engine() as every:
        every.generate([[5]] * many, SamplingParams(max_tokens=1), adapters=names, progress=False)
        with bench.engine(adapter_memory_bytes=many // 10 * every.adapters.list()[0].nbytes) as few:
            yield bench.row(f"{many:,} adapters by zipf, memory for {many // 10}, of all resident", 0.7,
                            lambda: bench.rate(few, next(mine)), lambda: bench.rate(every, next(same)))  # fmt: skip


def _alike(bench: Bench, name: str, count: int) -> list[str]:
    """Folders of distinct adapters of rank 8 on two modules, which differ in their last value."""
    config = tiny_config(rank=8, alpha=16, targets=("q_proj", "v_proj"), base_model_name_or_path=None)
    source = write_adapter(bench.folder / name, config, tiny_tensors(bench.sites, config, dtype="bfloat16"))
    tensors = bytearray((source / TENSORS).read_bytes())
    folders = [bench.folder / f"{name}{number}" for number in range(count)]
    for number, folder in enumerate(folders):
        tensors[-2:] = np.uint16(0x3C00 + number).tobytes()
        folder.mkdir()
        (folder / CONFIG).write_bytes((source / CONFIG).read_bytes())
        (folder / TENSORS).write_bytes(tensors)
    return [str(folder) for folder in folders]


def registered(bench: Bench) -> Iterator[Row]:
    """A server with many registered adapters: registering and listing them, and its rate to that with a few."""
    many, folders = bench.sizes.registered, _alike(bench, "registered", ROWS)
    with truffula_server(bench.config, more=["--adapter-admin"]) as server:
        url = server.wait()
        register = functools.partial(_post, f"{url}/v1/adapters")
        register([(f"few{number}", folder) for number, folder in enumerate(folders)])
        rates = [_served(bench, url, "few", seed) for seed in range(bench.sizes.repeats + 1)][1:]
        began = time.perf_counter()
        register([(f"many{number}", folder) for number, folder in zip(range(many), cycle(folders))])
        yield Row(f"{many:,} are registered in one request", time.perf_counter() - began, "s", 5, True, "over HTTP")
        times = []
        for _ in range(5):
            began = time.perf_counter()
            _get(f"{url}/v1/adapters?limit=100&after=many5")
            times.append(1e3 * (time.perf_counter() - began))
        yield Row("a page of 100 of them is listed", statistics.median(times), "ms", 50, True, f"of {len(times)}")
        after = [_served(bench, url, "many", seed + 100) for seed in range(bench.sizes.repeats + 1)][1:]
    before, now = statistics.median(rates), statistics.median(after)
    yield Row(f"{ROWS} clients with {many:,} registered, of {ROWS} registered", now / before, "x", 0.97, False,
              f"{now:.0f} of {before:.0f} tokens/s")  # fmt: skip


def _served(bench: Bench, url: str, prefix: str, seed: int) -> float:
    names = tuple(f"{prefix}{number}" for number in range(ROWS))
    measured = run_load(url, Load(ROWS, 1, 16, bench.sizes.tokens, names, bench.plan.interface.vocab_size, seed))
    if measured.errors:
        raise RuntimeError(measured.errors[0])
    return float(measured.summary()["output_tok_s"])


def _post(url: str, rows: Sequence[tuple[str, str]]) -> None:
    body = json.dumps({"adapters": [{"name": name, "source": source} for name, source in rows]}).encode()
    _get(urllib.request.Request(url, body, {"content-type": "application/json"}))


def _get(request: str | urllib.request.Request) -> None:
    with contextlib.closing(urllib.request.urlopen(request, timeout=60)) as reply:
        reply.read()


def quantised(bench: Bench) -> Iterator[Row]:
    """Adapters on a quantised base, to that base: rounded to Q8_0 when it is loaded, and the files given."""
    folders = bench.ranks("quantised", [16] * ROWS)
    own = [] if bench.config.model.endswith(".gguf") else [("Q8_0", {"quantize": "q8_0"})]
    for name, options in [*own, *((Path(file).name, {"model": file}) for file in bench.files)]:
        with bench.engine(**options) as llm:
            rate = functools.partial(bench.rate, llm)
            what = f"{ROWS} distinct of rank 16 on {name}, of that base"
            yield bench.row(what, 0.7, functools.partial(rate, folders), functools.partial(rate, [None] * ROWS))


SCENARIOS: Mapping[str, Callable[[Bench], Iterator[Row]]] = MappingProxyType(
    {one.__name__: one for one in (join, gaps, ranks, kinds, prompts, zipf, registered, quantised)}
)
