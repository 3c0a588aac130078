"""What a whole answer must match: its reasoning, then tool calls or a text that meets a constraint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from truffula.errors import InvalidRequest
from truffula.items import Constraint, Tool, ToolChoice
from truffula.text.answer_grammar import answer_grammar
from truffula.text.tool_formats import OutputFormat


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer in the form ``form``, of a model that may call ``tools`` as ``choice`` says.

    ``constraint`` is what its text must match where it calls none.
    """

    form: OutputFormat
    tools: list[Tool]
    choice: ToolChoice
    constraint: Constraint | None
    thinking_open: bool
    thinking_budget: int | None

    @property
    def param(self) -> str:
        """The client's field that errors name."""
        if self.constraint is not None:
            return self.constraint.param
        return "tools" if self.tools else "thinking_token_budget"


def compile_answer(answer: Answer, special: Sequence[tuple[str, int]]) -> str:
    """llguidance's grammar of ``answer``, which was used on a vocabulary of bytes and the ``special`` tokens.

    ``special`` has the text and id of each. Raises ``InvalidRequest``.
    """
    from llguidance import LLMatcher  # neither is for the server's process

    from truffula.text.constraints import rules_of
    from truffula.text.grammars import on_small_stack, short, stand_in, tried

    texts = tuple(text for text, _ in special)
    trial = stand_in(texts)
    first = trial.vocab_size - len(texts)

    def work() -> str:
        lark = None if answer.constraint is None else rules_of(answer.constraint, "answer")
        on_trial = LLMatcher.grammar_from_lark(_source(answer, lark, {text: first + i for i, text in enumerate(texts)}))
        tried(on_trial, trial, "answer", lambda error: f"The answer cannot be constrained: {short(error)}")
        return LLMatcher.grammar_from_lark(_source(answer, lark, dict(special)))

    try:
        return on_small_stack(work)
    except RecursionError as error:
        raise InvalidRequest("A schema is nested too deeply.") from error


def _source(answer: Answer, constraint: str | None, special: Mapping[str, int]) -> str:
    """Lark text. ``constraint`` has the rule ``answer``, ``special`` the id of each special token by its text."""
    source = answer_grammar(
        answer.form,
        answer.tools,
        answer.choice,
        constraint,
        thinking_open=answer.thinking_open,
        thinking_budget=answer.thinking_budget,
        special_tokens=special,
    )
    assert source is not None, "compiled only where there is something to enforce"
    return source
