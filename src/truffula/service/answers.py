"""What a model's answers look like by its chat template, and the parser of one answer."""

from __future__ import annotations

from truffula.errors import InvalidRequest
from truffula.text.chat_template import ChatTemplates
from truffula.text.output_parser import OutputParser, make_parser
from truffula.text.tokenizer import Tokenizer
from truffula.text.tool_formats import OutputFormat, detect_format
from truffula.types import GenerateRequest


class AnswerFormats:
    """The format of tool calls and reasoning for each chat template of one model.

    Args:
        tool_format, reasoning_format: The operator's choice of a format, in place of the template's.
    """

    def __init__(
        self,
        templates: ChatTemplates,
        tokenizer: Tokenizer | None,
        *,
        tool_format: str | None = None,
        reasoning_format: str | None = None,
    ) -> None:
        self._templates = templates
        self._chosen = (tool_format, reasoning_format)
        special = () if tokenizer is None else sorted(tokenizer.special_ids)
        self._special = tuple(text for i in special if tokenizer is not None and (text := tokenizer.text_of(i)))
        self._known = {source: self._detect(source) for source in templates.sources.values()}

    def _detect(self, source: str) -> OutputFormat:
        tools, reasoning = self._chosen
        return detect_format(source, None, tools, reasoning)

    def of(self, request: GenerateRequest) -> OutputFormat:
        """The format of the answers to ``request``. Raises ``TemplateError`` where it has no template."""
        source = self._templates.choose(request)
        return self._known.get(source) or self._detect(source)

    def parser(self, request: GenerateRequest, prompt_tail: str) -> OutputParser | None:
        """The parser of an answer to ``request``, None where there is nothing to parse.

        Raises ``InvalidRequest`` where a tool call is demanded of a model that has no known form of them.
        """
        if not request.parse_output or request.messages is None:
            return None
        form, tools = self.of(request), request.callable_tools
        if request.tool_choice.mode == "required" and form.tools is None:
            raise InvalidRequest(
                "tool_choice demands a tool call, and the model's chat template has no form of calls that this server "
                "knows. Leave it out, or name the form with the server's option --tool-format.",
                param="tool_choice",
            )
        calls = form.tools is not None and (bool(tools) or form.tools.syntax == "harmony")
        if not calls and form.reasoning is None:
            return None
        dropped = self._special if request.params.skip_special_tokens else ()
        return make_parser(form, tools, prompt_tail=prompt_tail, special_tokens=dropped)
