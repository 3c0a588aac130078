"""Rows of a comparison: what is measured of which peers, read from TOML (built in: ``scenarios.toml``)."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from truffula.bench.load import Load
from truffula.errors import ConfigError

# what is measured → its unit, and whether more of it is better
MEASURES: Mapping[str, tuple[str, bool]] = {
    "throughput": ("output tok/s", True),
    "ttft": ("ms to first token", False),
    "decode": ("tok/s, one row, no server", True),
    "prefill": ("tok/s, no server", True),
    "memory": ("MB beside weights and KV", False),
    "start": ("ms from start to first token", False),
}
# peer → what can be measured of it
PEERS: Mapping[str, tuple[str, ...]] = {
    "truffula": tuple(MEASURES),
    "openai": ("throughput", "ttft"),
    "llama-server": ("throughput", "ttft", "memory", "start"),
    "llama-bench": ("decode", "prefill"),
    "vllm": ("throughput", "ttft", "start"),
    "openvino": ("throughput", "ttft"),
    "hf-peft": ("throughput",),
}
MIXES = ("none", "shared", "distinct")
BUILT_IN = Path(__file__).with_name("scenarios.toml")


@dataclass(frozen=True)
class Contestant:
    """One participant. ``model`` is a path, below the folder of the peers' files when it is relative; of an
    ``openai`` peer it is the model's name at ``url``. ``options`` are truffula's engine options; ``flags`` go to a
    peer's server as they are.
    """

    peer: str
    model: str = ""
    name: str = ""
    url: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return self.name or self.peer


@dataclass(frozen=True)
class Row:
    """One line of the comparison: ``contestants`` in turn, the first against each of the others."""

    name: str
    what: str
    measure: str
    contestants: tuple[Contestant, ...]
    scenario: str = ""
    clients: int = 1
    requests: int = 1
    adapters: str = "none"
    prompt_tokens: int = 105
    max_tokens: int = 64
    vocab_size: int = 1000
    runs: int = 1
    adapter_dir: str = "adapters/smollm2"

    @property
    def unit(self) -> str:
        return MEASURES[self.measure][0]

    @property
    def more_is_better(self) -> bool:
        return MEASURES[self.measure][1]

    @property
    def adapter_count(self) -> int:
        return {"none": 0, "shared": 1, "distinct": self.clients}[self.adapters]

    def load(self, names: Iterable[str], seed: int) -> Load:
        """``names``: of the adapters that the row needs."""
        return Load(
            self.clients, self.requests, self.prompt_tokens, self.max_tokens, tuple(names), self.vocab_size, seed
        )


def read_scenarios(path: Path = BUILT_IN) -> tuple[Row, ...]:
    """All rows of a file.

    Raises:
        ConfigError: It can't be read, or a row has a field that is unknown, missing or wrong; named with its row.
    """
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("row", [])
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The scenario file {path} can't be read: {error}", param="scenario_file") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"row in {path} must be a list of tables: write [[row]].", param="scenario_file")
    made = tuple(_row(row, f"row {i + 1} of {path.name}") for i, row in enumerate(rows))
    if not made:
        raise ConfigError(f"{path} has no [[row]].", param="scenario_file")
    if len({row.name for row in made}) < len(made):
        raise ConfigError(f"Two rows of {path} have the same name.", param="name")
    return made


def chosen(rows: tuple[Row, ...], names: Iterable[str]) -> tuple[Row, ...]:
    """Rows by their own name or their scenario's, in the file's order; all of them without names."""
    wanted = list(names)
    known = {word for row in rows for word in (row.name, row.scenario) if word}
    for name in wanted:
        if name not in known:
            raise ConfigError(f"Unknown scenario {name!r}; available: {', '.join(sorted(known))}.", param="scenario")
    return tuple(row for row in rows if not wanted or {row.name, row.scenario} & set(wanted))


def _row(given: Mapping[str, Any], where: str) -> Row:
    where = f"{given['name']!r}" if isinstance(given.get("name"), str) else where
    listed = given.get("contestant", [])
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise ConfigError(f"contestant of {where} must be a list of tables.", param="contestant")
    contestants = tuple(_contestant(item, where) for item in listed)
    _check_fields(given, Row, where, extra="contestant", hidden="contestants", required=("name", "what", "measure"))
    row = Row(**{k: v for k, v in given.items() if k != "contestant"}, contestants=contestants)
    _one_of(row.measure, MEASURES, "measure", where)
    _one_of(row.adapters, MIXES, "adapters", where)
    for name in ("clients", "requests", "prompt_tokens", "max_tokens", "runs"):
        if getattr(row, name) < 1:
            raise ConfigError(f"{where}: {name} is {getattr(row, name)}; it must be 1 or more.", param=name)
    if not contestants:
        raise ConfigError(f"{where} has no [[row.contestant]].", param="contestant")
    if len({c.title for c in contestants}) < len(contestants):
        raise ConfigError(f"{where}: two contestants have the same name; give them one.", param="name")
    for contestant in contestants:
        if row.measure not in PEERS[contestant.peer]:
            can = ", ".join(PEERS[contestant.peer])
            raise ConfigError(
                f"{where}: {row.measure!r} can't be measured of {contestant.peer}, only {can}.", param="measure"
            )
    return row


def _contestant(given: Mapping[str, Any], where: str) -> Contestant:
    _check_fields(given, Contestant, where, required=("peer",))
    made = Contestant(**{**given, "flags": tuple(given.get("flags", ()))})
    _one_of(made.peer, PEERS, "peer", where)
    if made.peer == "openai" and not made.url:
        raise ConfigError(f"{where}: an openai peer needs the url of its server.", param="url")
    if made.peer != "openai" and made.url:
        raise ConfigError(f"{where}: url is for openai peers; {made.peer} is started here.", param="url")
    if made.peer != "openai" and not made.model:
        raise ConfigError(f"{where}: {made.peer} needs a model.", param="model")
    if made.options and made.peer != "truffula":
        raise ConfigError(f"{where}: options are truffula's; give {made.peer} flags.", param="options")
    if made.flags and made.peer not in ("llama-server", "llama-bench", "vllm"):
        raise ConfigError(f"{where}: {made.peer} does not accept flags.", param="flags")
    return made


def _check_fields(
    given: Mapping[str, Any], kind: type, where: str, *, required: tuple[str, ...], extra: str = "", hidden: str = ""
) -> None:
    """Every key of ``given`` is a field of ``kind`` and of the type of its default; ``required`` ones are there."""
    known = {f.name: f for f in fields(kind) if f.name != hidden}
    for name in required:
        if name not in given:
            raise ConfigError(f"{where} has no {name}.", param=name)
    for name, value in given.items():
        if name == extra:
            continue
        if name not in known:
            raise ConfigError(f"{where}: unknown field {name!r}; available: {', '.join(known)}.", param=name)
        wanted = {"str": str, "int": int, "Mapping[str, Any]": dict, "tuple[str, ...]": list}[str(known[name].type)]
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ConfigError(f"{where}: {name} is {value!r}; it must be a {wanted.__name__}.", param=name)


def _one_of(value: str, known: Iterable[str], name: str, where: str) -> None:
    if value not in known:
        raise ConfigError(f"{where}: {name} is {value!r}; it must be one of {', '.join(known)}.", param=name)
