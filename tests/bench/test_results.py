"""Figures made of streams."""

from __future__ import annotations

from truffula.bench.load import Limits, LoadResult, Stream


def stream(due: float, sent: float, *tokens: float) -> Stream:
    return Stream(due, sent, list(tokens), len(tokens), 10)


def test_time_to_first_token_counts_from_when_the_request_was_due() -> None:
    summary = LoadResult(4.0, [stream(1.0, 1.5, 2.0, 2.1)]).open_summary(1.0, Limits())
    assert summary["ttft_ms"]["p50"] == 1000.0
    assert summary["sent_late_ms"]["max"] == 500.0


def test_goodput_counts_what_kept_both_limits() -> None:
    limits = Limits(ttft_ms=500, itl_ms=100)
    quick, slow_start, slow_tokens = stream(0, 0, 0.4, 0.45), stream(0, 0, 0.6, 0.65), stream(0, 0, 0.4, 0.6)
    failed = Stream(0, 0, error="refused")
    summary = LoadResult(2.0, [quick, slow_start, slow_tokens, failed]).open_summary(2.0, limits)
    assert (summary["good_requests"], summary["requests"], summary["failures"]) == (1, 4, 1)
    assert summary["goodput_rps"] == 0.5


def test_a_generator_that_is_late_is_told_on() -> None:
    on_time = [stream(i, i + 0.001, i + 0.5) for i in range(20)]
    assert LoadResult(20.0, on_time).open_summary(1.0, Limits())["kept_up"] is True
    late = [stream(i, i + 0.1, i + 0.5) for i in range(20)]
    assert LoadResult(20.0, late).open_summary(1.0, Limits())["kept_up"] is False
