"""What a model's answers look like by its chat template: the parser of one answer, and what it must match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truffula.errors import InvalidRequest
from truffula.items import Constraint
from truffula.text.answers import Answer
from truffula.text.chat_template import ChatTemplates
from truffula.text.output_parser import OutputParser, make_parser
from truffula.text.tokenizer import Tokenizer
from truffula.text.tool_formats import OutputFormat, detect_format
from truffula.types import GenerateRequest


class AnswerFormats:
    """The format of tool calls and reasoning for each chat template of one model.

    Args:
        response_template: The model's own description of answers to its ``templates``.
        tool_format, reasoning_format: The operator's choice of a format, in place of the template's.
    """

    def __init__(
        self,
        templates: ChatTemplates,
        tokenizer: Tokenizer | None,
        *,
        response_template: Mapping[str, Any] | None = None,
        tool_format: str | None = None,
        reasoning_format: str | None = None,
    ) -> None:
        self._templates = templates
        self._chosen = (tool_format, reasoning_format)
        special = () if tokenizer is None else sorted(tokenizer.special_ids)
        self._special = tuple(text for i in special if tokenizer is not None and (text := tokenizer.text_of(i)))
        self._response = response_template
        self._known = {source: self._detect(source) for source in templates.sources.values()}

    def _detect(self, source: str) -> OutputFormat:
        tools, reasoning = self._chosen
        return detect_format(
            source, self._response if source in self._templates.sources.values() else None, tools, reasoning
        )

    def of(self, request: GenerateRequest) -> OutputFormat:
        """The format of the answers to ``request``. Raises ``TemplateError`` where it has no template."""
        source = self._templates.choose(request)
        return self._known.get(source) or self._detect(source)

    def parser(self, request: GenerateRequest, prompt_tail: str) -> OutputParser | None:
        """The parser of an answer to ``request``, None where there is nothing to parse."""
        if not request.parse_output or request.messages is None:
            return None
        form, tools = self.of(request), request.callable_tools
        calls = form.tools is not None and (bool(tools) or form.tools.syntax == "harmony")
        if not calls and form.reasoning is None:
            return None
        dropped = self._special if request.params.skip_special_tokens else ()
        return make_parser(form, tools, prompt_tail=prompt_tail, special_tokens=dropped, whole=request.parse_whole)

    def ignored(self, request: GenerateRequest) -> tuple[str, ...]:
        """Names of what ``request`` asks of its answer and this model has no use for."""
        if request.thinking_budget is None or request.messages is None or self.of(request).reasoning is not None:
            return ()
        return ("thinking_budget",)

    def wanted(self, request: GenerateRequest, prompt_tail: str) -> Constraint | Answer | None:
        """What the answer to ``request`` must match, for ``Grammars``; None: nothing.

        Without tools and reasoning that is the request's constraint alone. Raises ``InvalidRequest`` where a tool call
        is demanded of a model that has no known format of them.
        """
        if not request.parse_output or request.messages is None:
            return request.constraint
        form, tools, choice = self.of(request), request.callable_tools, request.tool_choice
        strict = any(tool.strict for tool in tools)
        if form.tools is None and (strict or choice.names or choice.mode == "required"):
            raise InvalidRequest(
                "tool_choice or strict demands calls that match, and the model's chat template shows no known format "
                "of calls. Leave both out, or give the model's format (--tool-format of the server) or another chat "
                "template.",
                param="tools" if strict else "tool_choice",
            )
        promised = bool(choice.names or not choice.parallel or strict)
        callable_ = bool(tools) and form.tools is not None
        calls = callable_ and (choice.mode == "required" or promised)
        thinks = form.reasoning is not None
        if not (calls or (thinks and request.thinking_budget is not None) or request.constraint is not None):
            return None
        if not thinks and not callable_:
            return request.constraint
        tail = prompt_tail.rstrip()
        opened, closed = (form.reasoning.open.strip(), form.reasoning.close.strip()) if form.reasoning else ("", "")
        if closed and tail.endswith(closed):  # the prompt has closed it: the answer has none
            form = OutputFormat(form.tools, None)
        return Answer(
            form=form,
            tools=tools,
            choice=choice,
            constraint=request.constraint,
            thinking_open=bool(opened) and tail.endswith(opened),
            thinking_budget=request.thinking_budget,
        )
