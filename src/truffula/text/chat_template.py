"""A conversation to the text its model was trained on, by the model's own Jinja template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from truffula.errors import ConfigError, InvalidRequest, TemplateError
from truffula.text.plain_template import MAX_SOURCE_CHARS, is_plain
from truffula.text.sandbox import template_environment
from truffula.text.template_probe import Kind, Place, is_written_once_more, missing_from, put_words
from truffula.types import GenerateRequest

MAX_SOURCE = 400_000
MAX_CHARS = 4_000_000
MAX_DEPTH = 64
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
REASONING = ("reasoning_content", "thinking", "reasoning")
# Put behind the message that is to be continued, to find its end in what the template makes of it. Not a word of any
# template.
MARK = "\ue000TRUFFULA CONTINUES HERE\ue000 "


@dataclass(frozen=True)
class LeftOut:
    """``places`` of a conversation that are not in the prompt; ``variables`` that the template never mentions."""

    places: tuple[Place, ...]
    variables: tuple[str, ...]


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
            return self._environment.from_string(self._source)
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
        if request.tools and "tool_use" in self.sources:
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

        Raises ``InvalidRequest`` for messages that aren't a conversation in text, ``TemplateError`` when the template
        refuses them, is wrong, or takes more than its limits.
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
        if request.template_kwargs:
            reads = self._template(source).variables
            unread = tuple(name for name in request.template_kwargs if name not in reads)

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
        """What the template is given, made of copies. Raises ``InvalidRequest`` for what is no conversation in text."""
        for name in request.template_kwargs:
            if name in RESERVED:
                raise InvalidRequest(
                    f"template_kwargs may not set {name}: use the field of that name.", param="template_kwargs"
                )
        chat = conversation(request.messages, knows_developer="developer" in source)
        others = {
            **self.special_tokens,
            **request.template_kwargs,
            "tools": request.tools or None,
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


def conversation(messages: Any, *, knows_developer: bool) -> list[dict[str, Any]]:
    """OpenAI's messages as templates expect them: plain data, text content, tool arguments as objects.

    A ``developer`` is a ``system`` where the template doesn't know the role. Parts of text are joined by line breaks.
    Null content is "".
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequest("messages must be a list with at least one message.", param="messages")
    return [_message(message, f"messages[{index}]", knows_developer) for index, message in enumerate(messages)]


def _message(given: Any, where: str, knows_developer: bool) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{where} is a {type(given).__name__}, not an object.", param=where)
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where} has no role.", param=f"{where}.role")
    message: dict[str, Any] = {key: value for key, value in given.items() if key != "content"}
    if role == "developer" and not knows_developer:
        message["role"] = "system"
    content = _text_content(given.get("content"), f"{where}.content")
    message = plain(message, where)
    message["content"] = content
    if message.get("tool_calls"):
        message["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(message["tool_calls"])
        ]
    elif "tool_calls" in message:
        del message["tool_calls"]  # null and [] mean that there are none; templates ask whether the key exists
    thought = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if thought is not None:
        message = {"thinking": thought, **message, "reasoning_content": thought}
    return message


def _text_content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return str(content)
    if not isinstance(content, list | tuple):
        raise InvalidRequest(f"{where} is a {type(content).__name__}; it must be text or a list of parts.", param=where)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        known = isinstance(part, Mapping) and kind in TEXT_PARTS
        text = part.get("refusal" if kind == "refusal" else "text") if known else None
        if not isinstance(text, str):
            raise InvalidRequest(
                f"{where}[{index}] is a part of type {kind!r}; this model reads text parts only.",
                param=f"{where}[{index}]",
            )
        texts.append(text)
    return "\n".join(texts)  # as vLLM does for templates that take text


def _tool_call(call: Any, where: str) -> Any:
    """The API carries a call's arguments as JSON text; templates write the object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise InvalidRequest(f"{where} has no function.", param=where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(
                f"{where}.function.arguments is not JSON: {error}", param=f"{where}.function.arguments"
            ) from error
    return {**call, "function": {**function, "arguments": arguments}}


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
