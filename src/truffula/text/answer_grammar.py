"""Grammars of whole answers: reasoning, then tool calls in the model's format, or an answer that meets a constraint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from truffula.errors import InvalidRequest
from truffula.items import Tool, ToolChoice
from truffula.text.argument_grammar import ArgumentRules, Rules, escaped_regex, quoted
from truffula.text.output_reader import SPACE
from truffula.text.tool_formats import OutputFormat, ToolFormat

ANY = "/(?s:.*)/"


def answer_grammar(
    fmt: OutputFormat,
    tools: Sequence[Tool],
    choice: ToolChoice,
    answer: str | None,
    *,
    thinking_open: bool,
    thinking_budget: int | None,
    special_tokens: Mapping[str, int] | None = None,
) -> str | None:
    """The grammar of an answer in Lark (llguidance's dialect); None where nothing is to be enforced.

    Args:
        answer: Lark text whose rule ``answer`` matches what a text answer must be; None: any text. Its other names
            begin with ``answer``, or are the client's.
        thinking_open: Whether the prompt has opened the reasoning.
        thinking_budget: The most tokens of reasoning.
        special_tokens: Id by text of the tokens that the vocabulary marks as special. They match as tokens, never as
            text.

    Raises ``InvalidRequest`` for a schema or a choice that cannot be enforced in the format.
    """
    usable = [tool for tool in tools if not choice.names or tool.name in choice.names] if choice.mode != "none" else []
    promised = choice.mode == "required" or any(tool.strict for tool in usable) or bool(usable and choice.names)
    if choice.mode == "required" and not usable:
        raise InvalidRequest("tool_choice requires a call, and tools has no tool that it allows.", param="tool_choice")
    if promised and fmt.tools is None:
        raise InvalidRequest(
            "Tool calls cannot be enforced: the format in which this model calls tools is not known. Leave out "
            "tool_choice and strict, or start the server with --tool-format.",
            param="tool_choice",
        )
    form = fmt.tools if usable else None
    if not (promised or answer is not None or (form is not None and not choice.parallel)):
        form = None
        if thinking_budget is None or fmt.reasoning is None:
            return None
    grammar = _Answer(fmt, form, usable, choice, answer, thinking_budget, Rules(special_tokens or {}))
    return grammar.source(thinking_open)


class _Answer:
    """The grammar of one answer. Methods return what a Lark rule matches."""

    def __init__(
        self,
        fmt: OutputFormat,
        form: ToolFormat | None,
        tools: Sequence[Tool],
        choice: ToolChoice,
        answer: str | None,
        budget: int | None,
        rules: Rules,
    ) -> None:
        self._format = fmt
        self._form = form
        self._tools = tools
        self._choice = choice
        self._answer = answer
        self._budget = budget
        self._rules = rules

    def source(self, thinking_open: bool) -> str:
        rules, thinks = self._rules, self._format.reasoning
        if self._format.tools is not None and self._format.tools.syntax == "harmony":
            body = self._messages()
        else:
            body = rules.rule(self._body())
            if thinks is not None and (thinking_open or thinks.always):
                body = f"{self._thought(thinks.close)} SPACE? {body}"
            elif thinks is not None and thinks.open:
                body = f"({self._opening(thinks.open.strip(SPACE))} {self._thought(thinks.close)})? SPACE? {body}"
        lines = [f"start: {body}", "SPACE: /[ \\t\\r\\n]{1,8}/", *rules.lines]
        return "\n".join([*lines, *([self._answer] if self._answer is not None else [])]) + "\n"

    def _opening(self, opening: str) -> str:
        """The start of reasoning. A lazy lexeme ends before any other does, so an answer cannot start with it."""
        if self._rules.is_token(opening):
            return f"SPACE? {self._rules.text(opening)}"
        return self._rules.rule(f"/[ \\t\\r\\n]{{0,8}}{escaped_regex(opening)}/", "lazy")

    def _thought(self, close: str) -> str:
        """Reasoning within the budget, and its end."""
        rules, budget, close = self._rules, self._budget, close.strip(SPACE)
        if budget is None:
            return rules.until(close)
        if budget == 0:
            return rules.text(close)
        limits = [f"max_tokens={budget}", *([] if rules.is_token(close) else [f"stop={json.dumps(close)}"])]
        return f"{rules.rule(ANY, ', '.join(limits))} {rules.text(close)}"

    def _body(self) -> str:
        """What follows the reasoning."""
        if self._form is None:
            return ANY if self._answer is None else "answer"
        if self._choice.mode == "required":
            return self._calls()
        if self._answer is not None:
            return f"{self._calls()} | answer"
        return self._text_and_calls()

    def _text_and_calls(self) -> str:
        form, rules = self._form, self._rules
        assert form is not None
        if form.bare:
            return f"{self._calls()} | {rules.terminal(self._plain_text(form))}?"
        first, rest = rules.split(self._lead)
        heads = [f"{rules.until(first)} {self._calls(rest)}"]
        if form.section and not rules.is_token(first):  # the parser takes a call without a section too
            heads = [f"{rules.until(text)} {self._calls(rest, closed=closed)}" for text, rest, closed in self._starts]
        head = rules.rule(" | ".join(heads))
        return f"{head}* {ANY}" if self._choice.parallel else f"{head} | {ANY}"

    def _plain_text(self, form: ToolFormat) -> str:
        """Text in which no call starts."""
        plain = f"/[^{re.escape(form.bare)} \\t\\r\\n](?s:.*)/"
        begin = form.begin.strip(SPACE)
        return plain if self._rules.is_token(begin) else f"{plain} & ~/(?s:.*){escaped_regex(begin)}(?s:.*)/"

    @property
    def _starts(self) -> list[tuple[str, str, bool]]:
        """Texts that start calls, what follows them before the first call's name, and whether a section is open."""
        form = self._form
        assert form is not None and form.section is not None
        section, begin = form.section[0].strip(SPACE), form.begin.strip(SPACE)
        after = form.section[0].removeprefix(section) + form.begin
        return [(section, after, True), (begin, form.begin.removeprefix(begin), False)]

    @property
    def _lead(self) -> str:
        """The text before the first call."""
        form = self._form
        assert form is not None
        return (form.section[0] if form.section else "") + ("" if form.bare else form.begin)

    def _calls(self, lead: str | None = None, *, closed: bool = True) -> str:
        """One or more calls. ``lead`` replaces the text before the first one; not ``closed``: one without a section."""
        form, rules, parallel = self._form, self._rules, self._choice.parallel
        assert form is not None
        one = rules.rule(" | ".join(self._call(form, tool) for tool in self._tools))
        lead = rules.text(self._lead if lead is None else lead)
        if form.list or form.syntax == "pythonic":
            more = f'(", " {one})*' if parallel else ""
            end = "" if form.bare else form.end
            return f'{lead} "[" {one} {more} "]" {rules.text(end)}'
        begin = rules.text(form.between + ("" if form.bare else form.begin))
        more = f"({begin} {one} {rules.text(form.end)})*" if parallel else ""
        section_end = rules.text(form.section[1]) if form.section and closed else ""
        more = more if closed else ""
        return f"{lead} {one} {rules.text(form.end)} {more} {section_end}"

    def _call(self, form: ToolFormat, tool: Tool) -> str:
        """One call of ``tool``, between ``begin`` and ``end``."""
        rules = self._rules
        arguments = ArgumentRules(rules, form, tool, exact=tool.strict or self._choice.mode == "required")
        name = json.dumps(tool.name, ensure_ascii=False)
        if form.syntax == "json":
            start = quoted('{"name": ' + name + f', "{form.arguments}": ')
            return f'{start} {arguments.whole()} "}}"'
        if form.syntax == "pythonic":
            return f'{quoted(tool.name + "(")} {arguments.listed("=", ", ")} ")"'
        if form.syntax == "tagged":
            start = rules.around(form.before_name, tool.name, form.after_name)
            return f"{start} {arguments.tagged()} {rules.text(form.close)}"
        start = rules.around(form.before_name + form.name_prefix, tool.name, form.name_number)
        if form.name_number:
            start += " /[0-9]{1,2}/"
        if form.after_id:
            start += f" ({rules.text(form.after_id)} /[a-zA-Z0-9]{{9}}/)?"
        start += " " + rules.text(form.after_name)
        if form.values == "gemma":
            return f'{start} "{{" {arguments.listed(":", ",")} "}}"'
        return f"{start} {arguments.whole()}"

    def _messages(self) -> str:
        """An answer in channels."""
        rules = self._rules
        again = "<|end|><|start|>assistant"
        thought = f"{rules.text('<|channel|>analysis<|message|>')} {self._thought('<|end|>')}"
        thought = rules.rule(f"{thought} {rules.text(again.removeprefix('<|end|>'))}")
        thought = f"{thought}{'*' if self._budget is None else '?'}"
        if self._form is None and self._answer is None:
            return f"{thought} <[*]>*"
        final = f"{rules.text('<|channel|>final<|message|>')} {ANY if self._answer is None else 'answer'}"
        if self._form is None:
            return f"{thought} {final}"
        calls = []
        for tool in self._tools:
            header = rules.around("<|channel|>commentary to=functions.", tool.name, " <|constrain|>json<|message|>")
            exact = tool.strict or self._choice.mode == "required"
            calls.append(f"{header} {ArgumentRules(rules, self._form, tool, exact=exact).whole()}")
        call = rules.rule(" | ".join(calls))
        if self._choice.mode == "required":
            return f"{thought} {call}"
        preamble = f"{rules.text('<|channel|>commentary<|message|>')} {rules.until('<|end|>')}"
        preamble = rules.rule(f"{preamble} {rules.text(again.removeprefix('<|end|>'))}")
        return f"{thought} ({preamble}? {call} | {final})"
