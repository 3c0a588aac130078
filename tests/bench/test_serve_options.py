"""``bench serve``: combinations that mean nothing are refused, and the option is named."""

from __future__ import annotations

from typing import Any

import pytest

from truffula.bench.load import Limits
from truffula.cli.bench import ServeBench
from truffula.errors import ConfigError

DEFAULTS: dict[str, Any] = {
    "clients": None, "requests": None, "adapters": "none", "rank": 16, "prompt_tokens": 9, "max_tokens": 4,
    "repeats": 1, "url": None,
}  # fmt: skip
REFUSED = [
    ({"adapters": "some"}, "adapters"),
    ({"clients": 0}, "clients"),
    ({"repeats": 0}, "repeats"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"rate": 0.0}, "rate"),
    ({"rate": float("nan")}, "rate"),
    ({"rate": 2.0, "clients": 8}, "clients"),
    ({"limits": Limits()}, "ttft_limit"),
    ({"zipf_exponent": 1.0}, "zipf_exponent"),
    ({"adapters": "zipf", "adapter_count": 4, "zipf_exponent": -1.0}, "zipf_exponent"),
    ({"adapters": "zipf"}, "adapter_count"),
    ({"adapters": "distinct", "rate": 2.0}, "adapter_count"),
    ({"adapters": "distinct", "adapter_count": 4}, "adapter_count"),
    ({"adapters": "shared", "adapter_count": 4}, "adapter_count"),
]


@pytest.mark.parametrize(("given", "named"), REFUSED, ids=lambda v: "-".join(v) if isinstance(v, dict) else v)
def test_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match="--" + named.replace("_", "-")) as refused:
        ServeBench(**{**DEFAULTS, **given})
    assert refused.value.param == named


def test_an_open_loop_is_one_request_a_stream() -> None:
    bench = ServeBench(**{**DEFAULTS, "rate": 5.0, "requests": 12, "adapters": "zipf", "adapter_count": 3})
    load = bench.load(bench.names(), 300, 0)
    assert (load.clients, load.requests, len(load.adapters), load.zipf) == (12, 1, 3, 1.0)


def test_a_closed_loop_is_eight_clients_unless_said() -> None:
    bench = ServeBench(**{**DEFAULTS, "adapters": "distinct", "requests": 2})
    load = bench.load(bench.names(), 300, 0)
    assert (load.clients, load.requests, len(load.adapters), load.zipf) == (8, 2, 8, None)
