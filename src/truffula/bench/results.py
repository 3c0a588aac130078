"""The results of a load: one record per stream, and statistics of all streams."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

KEPT_UP_S = 0.02
"""A load generator keeps up when 99 % of the requests are sent at most this many seconds late."""


@dataclass(frozen=True)
class Limits:
    """The limits of a good request: milliseconds to the first token, and average milliseconds between tokens."""

    ttft_ms: float = 2000.0
    itl_ms: float = 200.0


@dataclass
class Stream:
    """One request. Seconds on one clock: ``due`` when it should have been sent, ``sent`` when it was, ``tokens`` when
    each token arrived. The time to the first token counts from ``due``, so it includes delays of the generator.
    """

    due: float
    sent: float
    tokens: list[float] = field(default_factory=list)
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.due

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.tokens, self.tokens[1:], strict=False)]

    def good(self, limits: Limits) -> bool:
        if self.error is not None or not self.tokens:
            return False
        mean_gap = statistics.fmean(self.gaps) if len(self.tokens) > 1 else 0.0
        return 1000 * self.ttft <= limits.ttft_ms and 1000 * mean_gap <= limits.itl_ms


@dataclass
class LoadResult:
    """The duration and the streams of one run."""

    wall_s: float = 0.0
    streams: list[Stream] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        return [stream.error for stream in self.streams if stream.error is not None]

    @property
    def output_tokens(self) -> int:
        return sum(stream.output_tokens for stream in self.streams)

    def summary(self) -> dict[str, Any]:
        """The statistics that are printed, or written as JSON: tokens per second, latencies in milliseconds."""
        prompt = sum(stream.prompt_tokens for stream in self.streams)
        cached = sum(stream.cached_tokens for stream in self.streams)
        answered = [stream for stream in self.streams if stream.tokens]
        return {
            "output_tok_s": round(self.output_tokens / self.wall_s, 2) if self.wall_s else 0.0,
            "wall_s": round(self.wall_s, 3),
            "output_tokens": self.output_tokens,
            "prompt_tokens": prompt,
            "prefix_hit_rate": round(cached / prompt, 4) if prompt else 0.0,
            "ttft_ms": quantiles(stream.ttft for stream in answered),
            "itl_ms": quantiles(gap for stream in answered for gap in stream.gaps),
            "failures": len(self.errors),
        }

    def open_summary(self, rate: float, limits: Limits) -> dict[str, Any]:
        """``summary`` and the statistics of an open loop: goodput, and whether the generator kept up."""
        late = sorted(max(0.0, stream.sent - stream.due) for stream in self.streams)
        good = sum(stream.good(limits) for stream in self.streams)
        return {
            **self.summary(),
            "requests": len(self.streams),
            "rate": rate,
            "goodput_rps": round(good / self.wall_s, 3) if self.wall_s else 0.0,
            "good_requests": good,
            "sent_late_ms": quantiles(late),
            "kept_up": percentile(late, 0.99) <= KEPT_UP_S,
        }


def percentile(ordered: Sequence[float], share: float) -> float:
    """The ``share`` quantile of the ``ordered`` values."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def quantiles(seconds: Iterable[float]) -> dict[str, float]:
    """p50, p90, p99 and the maximum, in milliseconds; empty when there are no values."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    values = {"p50": statistics.median(ordered), "p90": percentile(ordered, 0.9), "p99": percentile(ordered, 0.99)}
    return {name: round(1000 * value, 2) for name, value in {**values, "max": ordered[-1]}.items()}
