"""Rows of a comparison: what is measured of which peers, read from TOML (built in: ``scenarios.toml``)."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from truffula.bench.load import Load
from truffula.errors import ConfigError

Measure = Literal["throughput", "ttft", "decode", "prefill", "memory", "start"]
Peer = Literal["truffula", "openai", "llama-server", "llama-bench", "vllm", "openvino", "hf-peft"]
Positive = Annotated[int, msgspec.Meta(ge=1)]
# what is measured → its unit, and whether more of it is better
MEASURES: Mapping[Measure, tuple[str, bool]] = {
    "throughput": ("output tok/s", True),
    "ttft": ("ms to first token", False),
    "decode": ("tok/s, one row, no server", True),
    "prefill": ("tok/s, no server", True),
    "memory": ("MB beside weights and KV", False),
    "start": ("ms from start to first token", False),
}
# peer → what can be measured of it
PEERS: Mapping[Peer, tuple[Measure, ...]] = {
    "truffula": tuple(MEASURES),
    "openai": ("throughput", "ttft"),
    "llama-server": ("throughput", "ttft", "memory", "start"),
    "llama-bench": ("decode", "prefill"),
    "vllm": ("throughput", "ttft", "start"),
    "openvino": ("throughput", "ttft"),
    "hf-peft": ("throughput",),
}
BUILT_IN = Path(__file__).with_name("scenarios.toml")


class Contestant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One participant. ``model`` is a path, below the folder of the peers' files when it is relative; of an
    ``openai`` peer it is the model's name at ``url``. ``options`` are truffula's engine options; ``flags`` go to a
    peer's server as they are.
    """

    peer: Peer
    model: str = ""
    name: str = ""
    url: str = ""
    options: dict[str, Any] = {}
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.peer == "openai") != bool(self.url):
            raise ValueError(f"url is {self.url!r}: openai peers need one, and truffula starts the others itself")
        if self.peer != "openai" and not self.model:
            raise ValueError(f"{self.peer} needs a model")
        if self.options and self.peer != "truffula":
            raise ValueError(f"options are truffula's; give {self.peer} flags")
        if self.flags and self.peer not in ("llama-server", "llama-bench", "vllm"):
            raise ValueError(f"{self.peer} does not accept flags")

    @property
    def title(self) -> str:
        return self.name or self.peer


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"contestants": "contestant"}):
    """One line of the comparison: ``contestants`` in turn, the first against each of the others.

    ``token_share``: what part of the weights' bytes a token reads, of a model with experts.
    """

    name: str
    what: str
    measure: Measure
    contestants: Annotated[tuple[Contestant, ...], msgspec.Meta(min_length=1)]
    scenario: str = ""
    clients: Positive = 1
    requests: Positive = 1
    adapters: Literal["none", "shared", "distinct"] = "none"
    prompt_tokens: Positive = 105
    max_tokens: Positive = 64
    vocab_size: int = 1000
    runs: Positive = 1
    token_share: float = 1.0
    adapter_dir: str = "adapters/smollm2"

    def __post_init__(self) -> None:
        if len({c.title for c in self.contestants}) < len(self.contestants):
            raise ValueError("two contestants have the same name; give them one")
        for contestant in self.contestants:
            can = PEERS[contestant.peer]
            if self.measure not in can:
                raise ValueError(f"{self.measure!r} can't be measured of {contestant.peer}, only {', '.join(can)}")

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


class _File(msgspec.Struct, forbid_unknown_fields=True):
    row: Annotated[tuple[Row, ...], msgspec.Meta(min_length=1)]


def read_scenarios(path: Path = BUILT_IN) -> tuple[Row, ...]:
    """All rows of a file.

    Raises:
        ConfigError: It can't be read, or a field is unknown, missing or wrong; the error says where.
    """
    try:
        rows = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _File).row
    except (OSError, ValueError) as error:
        raise ConfigError(f"The scenario file {path} can't be read: {error}", param="scenario_file") from error
    if len({row.name for row in rows}) < len(rows):
        raise ConfigError(f"Two rows of {path} have the same name.", param="name")
    return rows


def chosen(rows: tuple[Row, ...], names: Iterable[str]) -> tuple[Row, ...]:
    """Rows by their own name or their scenario's, in the file's order; all of them without names."""
    wanted = list(names)
    known = {word for row in rows for word in (row.name, row.scenario) if word}
    for name in wanted:
        if name not in known:
            raise ConfigError(f"Unknown scenario {name!r}; available: {', '.join(sorted(known))}.", param="scenario")
    return tuple(row for row in rows if not wanted or {row.name, row.scenario} & set(wanted))
