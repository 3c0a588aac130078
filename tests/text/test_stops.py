"""The stop matcher against ``str.find``, over any way of cutting the text."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from examples import examples
from truffula.text.stops import StopMatch, StopMatcher

few = st.text("abé", min_size=1, max_size=5)
stops_of = st.lists(few, min_size=1, max_size=4)


def naive(text: str, stops: list[str]) -> StopMatch | None:
    """The stop that is complete first; of those the longest."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    end, _, stop = min(found)
    return StopMatch(stop, end - len(stop), end)


def could_become(tail: str, stops: list[str]) -> int:
    """Length of the longest end of ``tail`` that begins a stop without being one."""
    return max(
        (n for stop in stops for n in range(min(len(stop) - 1, len(tail)) + 1) if tail.endswith(stop[:n])), default=0
    )


@settings(max_examples=examples(150, 400), deadline=None)
@given(chunks=st.lists(st.text("abéx", max_size=6), max_size=12), stops=stops_of)
@example(chunks=["aab", "aabaa", "b"], stops=["aabaab"])
@example(chunks=["abc"], stops=["b", "abc"])
def test_any_chunking_matches_what_find_says(chunks: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    text = ""
    for chunk in chunks:
        text += chunk
        match = matcher.feed(chunk)
        assert match == naive(text, stops)
        if match:
            assert text[match.start : match.end] == match.stop
            return
        assert matcher.holding == could_become(text, stops)


def test_a_long_stop_costs_no_more_per_character() -> None:
    """Linear in text and stop: with a suffix compared anew at each character this would take hours."""
    stop = "a" * 200_000 + "b"
    matcher = StopMatcher([stop])
    assert matcher.feed("a" * 400_000) is None
    assert matcher.holding == 200_000
    assert matcher.feed("b") == StopMatch(stop, 200_000, 400_001)
