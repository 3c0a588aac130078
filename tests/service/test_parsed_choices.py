"""An answer goes through a parser: with its special tokens, up to the stop string, once, and in any pieces."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from served import VOCAB
from tiny_tokenizers import byte_level

from examples import examples
from truffula.items import Part, Reasoning, Text, ToolCall, ToolCallPart
from truffula.params import SamplingParams
from truffula.service.choices import ChoiceState, collect
from truffula.types import Completion, EngineRequest, TextDelta, TokenEvent

EOS = 1


class HoldingParser:
    """Reasoning up to the first special token of the text, then text; ``hold`` characters are always held back."""

    reasoning_pieces = 0

    def __init__(self, hold: int) -> None:
        self._hold = hold
        self._held = ""
        self._thinks = True
        self.fed: list[str] = []
        self.ended = 0

    def feed(self, text: str) -> list[Part]:
        self.fed.append(text)
        self._held += text
        return self._out(len(self._held) - self._hold)

    def finish(self) -> list[Part]:
        self.ended += 1
        return self._out(len(self._held))

    def _out(self, count: int) -> list[Part]:
        ready, self._held = self._held[: max(0, count)], self._held[max(0, count) :]
        if not self._thinks:
            return [Text(ready)] if ready else []
        thought, mark, rest = ready.partition("|")
        self._thinks = not mark
        return [*([Reasoning(thought)] if thought else []), *([Text(mark + rest)] if mark else [])]


def parsed(
    params: SamplingParams, ids: list[int], cuts: list[int], hold: int, end: str = "length"
) -> tuple[list[TextDelta], Completion, HoldingParser]:
    request = EngineRequest(
        request_id="r", prompt_ids=[5], params=params.for_engine(seed=1, logprobs=None, stop_token_ids=())
    )
    parser = HoldingParser(hold)
    choice = ChoiceState(request, params, byte_level(), frozenset([EOS]), parser=parser)
    deltas, at = [], 0
    while not choice.finished:
        size = max(1, cuts.pop(0)) if cuts else 1
        chunk, at = ids[at : at + size], at + size
        last = at >= len(ids)
        stop_reason = ids[-1] if last and end == "stop" else None
        event = TokenEvent(
            request_id="r", token_ids=chunk, finish_reason=end if last else None, stop_reason=stop_reason
        )  # type: ignore[arg-type]
        deltas += [delta] if (delta := choice.push(event)) is not None else []
    return deltas, collect(deltas), parser


words = st.lists(
    st.sampled_from(["the ", "Lorax", "🌲", "é", "ab", "aab", "<|role|>", "東京"]), min_size=1, max_size=10
).map(lambda parts: byte_level().encode("".join(parts)))


@settings(max_examples=examples(150, 600), deadline=None)
@given(
    ids=words | st.lists(st.integers(2, VOCAB - 6), min_size=1, max_size=15),
    stop=st.lists(st.sampled_from(["ab", "x s", "京", "e|>é", "<|role|>"]), max_size=2, unique=True),
    cuts=st.lists(st.integers(1, 5), max_size=8),
    hold=st.integers(0, 4),
    skip=st.booleans(),
    include=st.booleans(),
)
def test_the_parser_reads_the_whole_text_up_to_the_stop_string(
    ids: list[int], stop: list[str], cuts: list[int], hold: int, skip: bool, include: bool
) -> None:
    params = SamplingParams(max_tokens=None, stop=tuple(stop), skip_special_tokens=skip, include_stop=include)
    deltas, found, parser = parsed(params, ids, cuts, hold)
    full = byte_level().decode(ids, skip_special_tokens=False)
    hits = sorted((full.find(s) + len(s), -len(s)) for s in stop if s in full)
    if hits:
        full = full[: hits[0][0] + (0 if include else hits[0][1])]
    assert "".join(parser.fed) == full
    assert parser.ended == 1
    thought, mark, rest = full.partition("|")
    (choice,) = found.choices
    assert choice.text == mark + rest
    assert [item.text for item in choice.items if isinstance(item, Reasoning)] == ([thought] if thought else [])
    assert "".join(delta.text for delta in deltas) == choice.text
    plain = collect(parsed(params, ids, [], 0)[0]).choices[0]
    assert choice.tokens == plain.tokens, "tokens do not depend on the parser"


def test_the_end_token_is_not_parsed_unless_it_is_asked_for() -> None:
    ids = [*byte_level().encode("the Lorax"), EOS]
    for include, text in ((False, "the Lorax"), (True, "the Lorax<|end|>")):
        params = SamplingParams(max_tokens=None, include_stop=include, skip_special_tokens=not include)
        _, found, parser = parsed(params, list(ids), [], 0, end="stop")
        assert "".join(parser.fed) == text
        assert (found.choices[0].finish_reason, found.choices[0].eos) == ("stop", True)


def test_parts_of_a_call_are_joined() -> None:
    parts: list[Part] = [
        Reasoning("a"), Reasoning("b"), Text("c"), ToolCallPart(0, "", "i", "f"), ToolCallPart(0, '{"x":'),
        ToolCallPart(1, "{}", "j", "g"), ToolCallPart(0, "1}"), Text("d"), Text("e"),
    ]  # fmt: skip
    deltas = [TextDelta(parts=[part]) for part in parts[:-1]]
    deltas.append(TextDelta(parts=parts[-1:], finish_reason="stop"))
    assert collect(deltas).choices[0].items == [
        Reasoning("ab"), Text("c"), ToolCall("i", "f", '{"x":1}'), ToolCall("j", "g", "{}"), Text("de"),
    ]  # fmt: skip
