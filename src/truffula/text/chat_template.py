"""A conversation to the text its model was trained on, by the model's own Jinja template."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from truffula.errors import ConfigError, InvalidRequest, TemplateError
from truffula.items import Message, Reasoning, ToolCall, ToolResult
from truffula.json_text import json_value
from truffula.text.plain_template import MAX_SOURCE_CHARS, is_plain
from truffula.text.sandbox import template_environment
from truffula.text.template_probe import Kind, Place, is_written_once_more, missing_from, put_words
from truffula.types import GenerateRequest

MAX_SOURCE = 400_000
MAX_CHARS = 4_000_000
MAX_DEPTH = 64
THINKING = ("enable_thinking", "thinking")
"""The variables by which templates switch reasoning on and off."""
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
# Put behind the message that is to be continued, to find its end in what the template makes of it. Not a word of any
# template.
MARK = "\ue000TRUFFULA CONTINUES HERE\ue000 "


@dataclass(frozen=True)
class LeftOut:
    """``places`` of a conversation that are not in the prompt; ``fields`` whose variables the template never reads."""

    places: tuple[Place, ...]
    fields: tuple[str, ...]


class _Template:
    """One source, parsed and compiled when first used."""

    def __init__(self, environment: jinja2.Environment, source: str) -> None:
        self._environment = environment
        self._source = source

    @cached_property
    def is_plain(self) -> bool:
        try:
            return len(self._source) <= MAX_SOURCE_CHARS and is_plain(self._environment.parse(self._source))
        except (jinja2.TemplateError, RecursionError):
            return True  # rendering raises the same error

    @cached_property
    def variables(self) -> set[str]:
        """Names of those that it looks up. Raises as ``compiled``."""
        _ = self.compiled
        return meta.find_undeclared_variables(self._environment.parse(self._source))

    @cached_property
    def compiled(self) -> jinja2.Template:
        """Raises ``TemplateError`` for a source that is too long or no Jinja."""
        if len(self._source) > MAX_SOURCE:
            raise TemplateError(f"The chat template has {len(self._source)} characters; the limit is {MAX_SOURCE}.")
        try:
            template = self._environment.from_string(self._source)
            template.globals = dict(template.globals)  # each rendering copies them, a chain of dicts slowly
            return template
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"The chat template is not valid Jinja, line {error.lineno}: {error.message}"
            ) from error
        except (RecursionError, MemoryError, SyntaxError, ValueError, jinja2.TemplateError) as error:
            raise TemplateError(f"The chat template cannot be compiled: {error}") from error


class ChatTemplates:
    """The templates of one model, compiled when first used. Safe to use from several threads.

    Args:
        sources: Name → Jinja source, as in tokenizer_config.json (``default``, ``tool_use``, …).
        special_tokens: ``bos_token`` and so on, which templates may write.

    What a template may use is what transformers gives it: ``raise_exception``, ``strftime_now``, ``tojson`` without
    HTML escapes, loop controls, ``generation`` blocks, trimmed blocks. It may write ``MAX_CHARS``. Nothing else limits
    what a template does: see ``sandbox``.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.sources = dict(sources)
        self.special_tokens = dict(special_tokens)
        self._environment = template_environment()
        self._own = {source: _Template(self._environment, source) for source in sources.values()}

    def __bool__(self) -> bool:
        return bool(self.sources)

    def is_plain(self, source: str) -> bool:
        """Whether ``source`` can be rendered without limits on time and memory (``plain_template``)."""
        return self._template(source).is_plain

    def choose(self, request: GenerateRequest) -> str:
        """The source to render: the request's own (a source, or the name of one of the model's), else the model's for
        this use. Raises ``TemplateError`` where there is none.
        """
        if request.chat_template is not None:
            return self.sources.get(request.chat_template, request.chat_template)
        if request.callable_tools and "tool_use" in self.sources:
            return self.sources["tool_use"]
        if "default" in self.sources:
            return self.sources["default"]
        if self.sources:
            names = ", ".join(sorted(self.sources))
            raise TemplateError(
                f"The model has several chat templates and none is the default: name one of {names}.", names=names
            )
        raise TemplateError(
            "The model has no chat template (no chat_template in tokenizer_config.json, no chat_template.jinja). "
            "Send the prompt as text, or give the request a chat_template.",
            param="messages",
        )

    def render(self, request: GenerateRequest) -> str:
        """The text of the request's messages. ``continue_final_message`` leaves the last one open.

        Raises ``InvalidRequest`` for no messages and for variables that are not JSON, ``TemplateError`` when the
        template refuses them, is wrong, or takes more than its limits.
        """
        source = self.choose(request)
        context = self._context(source, request)
        if not request.continue_final_message:
            return self._run(source, context)
        if request.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other.", param="continue_final_message"
            )
        last = context["messages"][-1]
        last["content"] += MARK
        return _cut_at_mark(self._run(source, context))

    def left_out(self, request: GenerateRequest, prompt: str = "") -> LeftOut:
        """What the template does not write into the prompt of these messages, and which variables it never mentions.

        Costs a second rendering where there is something that it might leave out, and one more for each kind that it
        seems to. ``prompt``, what was rendered of these messages, saves them for the usual conversation: one system
        message, which is in the prompt as it is. A template that refuses the words which are put in place of the texts
        reads them, so nothing counts as left out.
        """
        source = self.choose(request)
        unread: tuple[str, ...] = ()
        if request.template_kwargs or request.reasoning_effort is not None:
            reads = self._template(source).variables
            unread = tuple(f"template_kwargs.{name}" for name in request.template_kwargs if name not in reads)
            if request.reasoning_effort is not None and reads.isdisjoint(("reasoning_effort", *THINKING)):
                unread += ("reasoning_effort",)

        if not (request.tools or request.documents) and all(map(_is_usual, request.messages or ())):
            return LeftOut((), unread)

        def missing(only: Kind | None) -> list[Place]:
            context = self._context(source, request)
            places = put_words(context["messages"], context["tools"], context["documents"], only)
            if [place.kind for place in places] == ["system message"]:
                others = (message["content"] for message in context["messages"])
                if is_written_once_more(places[0].text, prompt, (source, *others)):
                    return []
            try:
                return missing_from(self._run(source, context), places) if places else []
            except TemplateError:
                return []

        kinds = dict.fromkeys(place.kind for place in missing(None))
        return LeftOut(tuple(place for kind in kinds for place in missing(kind)), unread)

    def _context(self, source: str, request: GenerateRequest) -> dict[str, Any]:
        """What the template is given, made of copies. Raises as ``render``."""
        for name in request.template_kwargs:
            if name in RESERVED:
                raise InvalidRequest(
                    f"template_kwargs may not set {name}: use the field of that name.", param="template_kwargs"
                )
        chat = conversation(request.messages or (), source)
        others = {
            **self.special_tokens,
            **effort_variables(request.reasoning_effort),
            **request.template_kwargs,
            "tools": [tool.for_template() for tool in request.callable_tools] or None,
            "documents": request.documents or None,
            "add_generation_prompt": request.add_generation_prompt,
        }
        return {**plain(others, "template_kwargs"), "messages": chat}

    def _template(self, source: str) -> _Template:
        return self._own.get(source) or _Template(self._environment, source)

    def _run(self, source: str, context: dict[str, Any]) -> str:
        template = self._template(source).compiled
        parts: list[str] = []
        length = 0
        try:
            for part in template.generate(context):
                length += len(part)
                if length > MAX_CHARS:
                    raise TemplateError(
                        f"The chat template was stopped: it wrote more than {MAX_CHARS} characters.",
                        param="messages",
                    )
                parts.append(part)
        except TemplateError:
            raise
        except RecursionError as error:
            raise TemplateError("The chat template was stopped: it recurses too deeply.", param="messages") from error
        except MemoryError as error:
            raise TemplateError("The chat template was stopped: it takes too much memory.", param="messages") from error
        except Exception as error:
            # A template is foreign code: whatever it raises is an error of this request's messages or of the template.
            raise TemplateError(f"The chat template failed: {error}", param="messages") from error
        return "".join(parts)


def read_template(path: Path) -> str:
    """The operator's own template. Raises ``ConfigError`` where the file is no text or no valid Jinja."""
    try:
        source = path.read_text(encoding="utf-8")
        _ = _Template(template_environment(), source).compiled
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The chat template {path} cannot be read: {error}.", param="chat_template") from error
    except TemplateError as error:
        raise ConfigError(f"{path}: {error.message}", param="chat_template") from error
    return source


def effort_variables(effort: str | None) -> dict[str, Any]:
    """The variables by which templates know how much to reason: all but "none" switch it on."""
    if effort is None:
        return {}
    return {"reasoning_effort": effort, **dict.fromkeys(THINKING, effort != "none")}


def _is_usual(message: Message) -> bool:
    """Whether every template writes the message: it holds nothing but the text of a user or an assistant."""
    usual = message.role in ("user", "assistant") and not (message.name or message.extra)
    return usual and not any(isinstance(item, ToolCall) for item in message.items)


def conversation(messages: Sequence[Message], source: str) -> list[dict[str, Any]]:
    """``messages`` as the template ``source`` expects them: OpenAI's form with text content, and tool arguments as
    objects.

    A ``developer`` is a ``system`` where the template doesn't know the role. Texts are joined by line breaks. Without a
    text the content is "". The result of a tool has the name of its call, and both have an id in the template's form.
    """
    if not messages:
        raise InvalidRequest("messages must be a list with at least one message.", param="messages")
    knows_developer = "developer" in source
    made = [_message(message, f"messages[{index}]", knows_developer) for index, message in enumerate(messages)]
    called: dict[str, dict[str, Any]] = {}  # by the id that the client knows
    for message in made:
        if "Cannot pass both content and thinking" in source and message.get("tool_calls") and message["content"]:
            # gpt-oss: its template writes either of them before a call, as reasoning.
            thought = "\n".join(filter(None, (message.get("thinking"), message["content"])))
            message |= {"thinking": thought, "reasoning_content": thought, "content": ""}
        for index, call in enumerate(message.get("tool_calls", ())):
            if given := call.get("id"):
                call["id"] = _written_id(given, call["function"]["name"], index, source)
                called[given] = call
        if message["role"] == "tool" and (answered := called.get(message.get("tool_call_id", ""))):
            message |= {"tool_call_id": answered["id"], "name": message.get("name") or answered["function"]["name"]}
    return made


def _written_id(call_id: str, name: str, index: int, source: str) -> str:
    """The id of a call as the template writes it: ``call_id``, unless the model knows another form.

    It is the same in every dialect, whose ids differ in the part before the underscore.
    """
    if "length != 9" in source and not re.fullmatch("[A-Za-z0-9]{9}", call_id):  # Mistral
        return hashlib.blake2b(call_id.rpartition("_")[2].encode()).hexdigest()[:9]
    if "## Return of" in source and not call_id.startswith("functions."):  # Kimi K2
        return f"functions.{name}:{index}"
    return call_id


def _message(given: Message, where: str, knows_developer: bool) -> dict[str, Any]:
    role = "system" if given.role == "developer" and not knows_developer else given.role
    message: dict[str, Any] = {"role": role, "content": ""}
    if given.name:
        message["name"] = given.name
    message |= plain(given.extra, where)
    texts: list[str] = []
    thoughts: list[str] = []
    calls = []
    for item in given.items:
        if isinstance(item, ToolCall):
            calls.append(_tool_call(item, where))
        elif isinstance(item, Reasoning):
            thoughts.append(item.text)
        else:
            texts.append(item.text)
        if isinstance(item, ToolResult):
            message |= {"tool_call_id": item.call_id} if item.call_id else {}
            message |= {"name": item.name} if item.name else {}
    message["content"] = "\n".join(texts)  # as vLLM does for templates that take text
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        thought = "\n".join(thoughts)
        message |= {"thinking": thought, "reasoning_content": thought}
    return message


def _tool_call(call: ToolCall, where: str) -> dict[str, Any]:
    """Items carry a call's arguments as JSON text; templates write the object."""
    try:
        value = json_value(call.arguments)
    except ValueError as error:
        raise InvalidRequest(f"{where}.tool_calls: the arguments of {call.name!r} are not JSON: {error}.") from error
    arguments = plain(value, f"{where}.tool_calls")
    known = {"id": call.id} if call.id else {}
    return {**known, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of JSON's types alone: a template must not meet an object with methods."""
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"{where} is nested more than {MAX_DEPTH} deep.", param=where)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where, depth + 1) for item in value]
    raise InvalidRequest(f"{where} contains a {type(value).__name__}; only JSON types are allowed.", param=where)


def _cut_at_mark(text: str) -> str:
    """All before the mark. A template that trims its messages has lost the mark's blank; then the message's own are
    gone too.
    """
    at = text.rfind(MARK.strip())
    if at < 0:
        raise TemplateError(
            "continue_final_message is set, but the chat template leaves the end of the final message out.",
            param="continue_final_message",
        )
    return text[:at] if text.startswith(MARK, at) else text[:at].rstrip()
