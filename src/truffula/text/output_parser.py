"""Splits a model's answer into text, reasoning and tool calls while it is generated."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Sequence

from truffula.items import Part, Reasoning, Text, Tool, ToolCallPart
from truffula.json_text import json_value
from truffula.text.argument_types import json_of, property_schema, types_of
from truffula.text.output_reader import (
    GEMMA,
    JSON,
    PYTHON,
    SPACE,
    MalformedCall,
    OutputReader,
    Steps,
    escaped,
    markers,
)
from truffula.text.tool_formats import OutputFormat, ReasoningFormat, ToolFormat

MAX_NAME = 256
_NOTHING = ToolFormat(name="none", syntax="json")
_SILENT = ReasoningFormat(name="none")
_HEADER = re.compile(
    r"(?:<\|start\|>)?\s*(?:assistant)?\s*(?:to=(?P<early>[^\s<]+))?\s*(?:<\|channel\|>(?P<channel>\w+)\s*)?"
    r"(?:to=(?P<late>[^\s<]+))?\s*(?:<\|constrain\|>)?\s*\w*\s*"
)


_TAGS = re.compile(r"(?<=>)\s*(?=<)")
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_CHANNELS = (*_ENDS, "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>")


def make_parser(
    fmt: OutputFormat,
    tools: Sequence[Tool],
    *,
    prompt_tail: str,
    special_tokens: Collection[str] = (),
    whole: bool = False,
) -> OutputParser:
    """A parser for one answer.

    Args:
        fmt: Of ``detect_format``.
        tools: The tools that may be called; without any, calls are text.
        prompt_tail: The end of the prompt, which tells whether the template opened the reasoning, or closed it.
        special_tokens: Texts of special tokens, which are left out of text and reasoning.
        whole: Return all parts by ``finish``. Then a call that is incomplete or malformed is text as a whole, and text
            before the end of a reasoning that nothing opened is reasoning. In a stream, what was sent remains.
    """
    return OutputParser(fmt, tools, prompt_tail, special_tokens, whole)


class OutputParser:
    """Parses one answer, fed in any pieces.

    The joined parts do not depend on the pieces. Every character is part of text, reasoning or a call, except the
    format's own markers, special tokens, and whitespace around reasoning and calls. Costs are linear in the text.
    """

    def __init__(
        self, fmt: OutputFormat, tools: Sequence[Tool], prompt_tail: str, special: Collection[str], whole: bool
    ) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._format = fmt.tools if fmt.tools and (tools or fmt.tools.syntax == "harmony") else _NOTHING
        self._thinks = fmt.reasoning or _SILENT
        self._whole = whole
        self._reader = OutputReader()
        self._parts: list[Part] = []
        self._kind: type[Part] | None = None
        self._pieces: list[str] = []  # of the part that is being made, which is of _kind
        self._spaces: list[str] = []  # whitespace that is left out if reasoning ends or a call starts after it
        self._trim = False  # whether whitespace that follows is left out
        self._fresh = True  # whether there is only whitespace since the start, the reasoning or a call
        self._index = -1
        self._undo: tuple[int, int, list[str], bool, bool] | None = None  # the state before a call that isn't complete
        self._thought = False  # whether there was reasoning
        self._bare = False  # whether nothing marks the calls
        self._said: set[type[Part]] = set()
        self._open, self._close = self._thinks.open.strip(SPACE), self._thinks.close.strip(SPACE)
        tail = prompt_tail.rstrip(SPACE)
        closed = bool(self._close) and tail.endswith(self._close)
        self._opened = bool(self._open) and not closed and (tail.endswith(self._open) or self._thinks.always)
        own = (self._open, self._close, *self._begins)
        own = own if self._format.syntax != "harmony" else _CHANNELS
        self._dropped = (*self._thinks.drop, *(token for token in special if token not in own))
        self._machine = self._run()
        next(self._machine)

    @property
    def _begins(self) -> tuple[str, ...]:
        section = self._format.section
        return tuple(text.strip(SPACE) for text in (*((section[0],) if section else ()), self._format.begin) if text)

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain with ``text``, which has the texts of special tokens."""
        self._reader.push(text)
        next(self._machine)
        if self._whole:
            return []
        self._flush()
        parts, self._parts = self._parts, []
        return parts

    def finish(self) -> list[Part]:
        """The parts that were held back."""
        self._reader.ended = True
        for _ in self._machine:
            pass
        self._flush()
        parts, self._parts = self._parts, []
        return parts

    # What is written

    def _add(self, kind: type[Part], text: str) -> None:
        if kind is not self._kind:
            self._flush()
            self._kind = kind
        self._pieces.append(text)

    def _flush(self) -> None:
        text = "".join(self._pieces)
        if text and self._kind is ToolCallPart:
            self._parts.append(ToolCallPart(self._index, text))
        elif text:
            self._parts.append(Reasoning(text) if self._kind is Reasoning else Text(text))
        self._pieces.clear()
        self._kind = None

    def _write(self, kind: type[Part], text: str) -> None:
        """Adds text or reasoning. Whitespace at its end waits for what follows."""
        if self._trim:
            text = text.lstrip(SPACE)
        body = text.rstrip(SPACE)
        if body:
            self._trim = self._fresh = False
            self._add(kind, "".join(self._spaces) + body)
            self._spaces = []
        if len(body) < len(text):
            if kind is Text and self._format is _NOTHING:
                self._add(kind, text[len(body) :])  # no call can follow
            else:
                self._spaces.append(text[len(body) :])

    def _write_text(self, text: str) -> None:
        self._write(Text, text)

    def _write_reasoning(self, text: str) -> None:
        self._write(Reasoning, text)

    def _border(self) -> None:
        """Leaves out whitespace before and after reasoning or a call."""
        self._spaces, self._trim, self._fresh = [], True, True

    # The answer

    def _run(self) -> Steps[None]:
        yield  # until the first text
        if self._format.syntax == "harmony":
            yield from self._messages()
        else:
            if self._opened:
                self._trim = True
                yield from self._reader.accept(self._open)
                yield from self._reason()
            yield from self._answer()
        if self._index < 0 or not self._fresh:
            self._add(Text, "".join(self._spaces))

    def _reason(self) -> Steps[None]:
        """Reasoning up to its end."""
        begins = self._begins if self._format.ends_reasoning else ()
        finder = markers(self._close, *begins, *self._dropped)
        while True:
            marker = yield from self._reader.until(finder, self._write_reasoning)
            if marker in (self._close, ""):
                break
            if marker in begins:
                self._reader.at -= len(marker)
                break
        self._border()
        self._thought = True

    def _answer(self) -> Steps[None]:
        """Text and calls, and reasoning between them."""
        reader, begins = self._reader, self._begins
        finder = markers(self._open, self._close, *begins, *self._dropped)
        while True:
            if self._fresh and self._format.bare:
                self._write_text((yield from reader.space()))
                if self._fresh and (yield from reader.peek()) == self._format.bare:
                    yield from self._attempt("", self._calls(""))
                    if self._fresh:
                        continue
            marker = yield from reader.until(finder, self._write_text)
            if not marker:
                return
            if marker in begins:
                yield from self._attempt(marker, self._calls(marker))
            elif marker == self._open and (self._fresh or self._thinks.after_text):
                self._border()
                yield from self._reason()
            elif marker == self._close and (self._fresh or self._all_text()):
                self._border()
                self._thought = True
            elif marker not in self._dropped:
                self._write_text(marker)

    def _all_text(self) -> bool:
        """Makes the text so far reasoning, if there is nothing but text."""
        self._flush()
        if not self._whole or self._thought or self._index >= 0:
            return False
        text = "".join(part.text for part in self._parts if isinstance(part, Text)).strip(SPACE)
        self._parts = [Reasoning(text)] if text else []
        return True

    # Calls

    def _attempt(self, marker: str, calls: Steps[None]) -> Steps[None]:
        """Runs ``calls``, the steps after ``marker``. What is no call is text."""
        reader = self._reader
        reader.taken = [marker]
        self._bare = not marker
        try:
            yield from calls
        except MalformedCall:
            if self._undo is not None and self._whole:
                self._flush()
                first, self._index, self._spaces, self._trim, self._fresh = self._undo
                del self._parts[first:]
            self._write_text("".join(reader.taken))
        self._undo = reader.taken = None

    def _begin(self, name: str) -> None:
        if len(name) > MAX_NAME or not name or not name.isprintable() or (self._bare and name not in self._tools):
            raise MalformedCall
        self._flush()
        self._undo = (len(self._parts), self._index, self._spaces, self._trim, self._fresh)
        self._border()
        self._index += 1
        self._parts.append(ToolCallPart(self._index, id=f"call_{secrets.token_hex(12)}", name=name))

    def _arguments(self, text: str) -> None:
        self._add(ToolCallPart, text)
        if not self._whole:
            self._forget()

    def _complete(self) -> None:
        self._undo = None
        self._forget()

    def _forget(self) -> None:
        if self._reader.taken:
            self._reader.taken.clear()

    def _calls(self, marker: str) -> Steps[None]:
        form, reader = self._format, self._reader
        section = form.section if form.section and marker == form.section[0].strip(SPACE) else None
        if section:
            yield from reader.expect(form.begin)
        while True:
            yield from self._one()
            yield from reader.accept(form.end)
            self._forget()
            if not marker and form.between.strip(SPACE) and (yield from reader.accept(form.between)):
                yield from reader.space()
                if (yield from reader.starts(form.bare)):
                    continue
                raise MalformedCall
            if not section or not (yield from reader.accept(form.begin)):
                break
        if section:
            yield from reader.accept(section[1])

    def _one(self) -> Steps[None]:
        """The call, or the list of calls, after ``begin``."""
        form, reader = self._format, self._reader
        yield from reader.space()
        char = yield from reader.peek()
        if form.syntax == "tagged":
            yield from self._tagged_call()
        elif char == "[":
            reader.take(1)
            while True:
                yield from self._python_call() if form.syntax == "pythonic" else self._json_call()
                if not (yield from reader.accept(",")):
                    break
            yield from reader.expect("]")
        elif form.syntax == "json" or (char == "{" and form.syntax == "named"):
            yield from self._json_call()
        elif form.syntax == "named":
            yield from self._named_call()
        else:
            raise MalformedCall

    def _json_call(self) -> Steps[None]:
        reader = self._reader
        yield from reader.expect("{")
        name: str | None = None
        arguments: list[str] | None = None
        done = False
        while not (yield from reader.accept("}")):
            key = yield from reader.short_text()
            yield from reader.expect(":")
            if key == "name" and name is None:
                name = yield from reader.short_text()
            elif key in ("arguments", "parameters") and arguments is None:
                yield from reader.space()
                char = yield from reader.peek()
                if char == "{" and name is not None:
                    self._begin(name)
                    yield from reader.value(JSON, self._arguments)
                    self._complete()
                    done = True
                arguments = []
                if not done:
                    yield from reader.value(JSON, arguments.append)
            elif self._bare and key not in ("type", "id"):
                raise MalformedCall
            else:
                yield from reader.value(JSON, _ignore)
            if name is not None and arguments is not None and not done:
                self._whole_call(name, _object("".join(arguments)))
                done = True
            if not (yield from reader.accept(",")):
                yield from reader.expect("}")
                break
        if not done:
            if name is None or self._bare:
                raise MalformedCall
            self._whole_call(name, "{}")

    def _whole_call(self, name: str, arguments: str) -> None:
        self._begin(name)
        self._arguments(arguments)
        self._complete()

    def _named_call(self) -> Steps[None]:
        form, reader = self._format, self._reader
        name = (yield from reader.name()).removeprefix(form.name_prefix)
        if form.name_number:
            before, _, number = name.rpartition(form.name_number)
            name = before if before and number.isdecimal() else name
        if form.after_id and (yield from reader.accept(form.after_id)):
            yield from reader.name()
        yield from reader.expect(form.after_name)
        yield from reader.space()
        if (yield from reader.peek()) != "{":
            if not form.end or not (yield from reader.starts(form.end.strip(SPACE))):
                raise MalformedCall
            self._whole_call(name, "{}")
            return
        self._begin(name)
        yield from reader.value(GEMMA if form.values == "gemma" else JSON, self._arguments)
        self._complete()

    def _python_call(self) -> Steps[None]:
        reader = self._reader
        name = yield from reader.name()
        yield from reader.expect("(")
        self._begin(name)
        before = "{"
        while not (yield from reader.accept(")")):
            key = yield from reader.name()
            yield from reader.expect("=")
            self._arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            before = ", "
            yield from reader.space()
            yield from reader.value(PYTHON, self._arguments)
            if not (yield from reader.accept(",")):
                yield from reader.expect(")")
                break
        self._arguments("{}" if before == "{" else "}")
        self._complete()

    def _tagged_call(self) -> Steps[None]:
        form, reader = self._format, self._reader
        yield from reader.expect(form.before_name)
        name = yield from reader.name()
        yield from reader.expect(form.after_name)
        end_of_key, *more = _TAGS.split(form.before_value.strip(SPACE))
        self._begin(name)
        before = "{"
        while not (yield from self._closed()):
            yield from reader.expect(form.before_key)
            key: list[str] = []
            marker = yield from reader.short_until(markers(end_of_key, form.before_json), key)
            for literal in more:
                yield from reader.expect(literal)
            self._arguments(f"{before}{json.dumps(''.join(key), ensure_ascii=False)}: ")
            before = ", "
            types = self._types(name, "".join(key))
            if form.before_json:
                types = ["string"] if marker == end_of_key else []
            yield from self._tagged_value(types)
        yield from reader.accept(form.close)
        self._arguments("{}" if before == "{" else "}")
        self._complete()

    def _closed(self) -> Steps[bool]:
        """Whether the arguments end here. Models omit ``close`` where ``end`` follows."""
        yield from self._reader.space()
        for literal in (self._format.close, self._format.end):
            if literal and (yield from self._reader.starts(literal.strip(SPACE))):
                return True
        return False

    def _types(self, tool: str, key: str) -> list[str]:
        """The types of an argument; empty: any."""
        parameters = self._tools[tool].parameters if tool in self._tools else None
        return types_of(property_schema(parameters, key), parameters or {})

    def _tagged_value(self, types: list[str]) -> Steps[None]:
        form, reader = self._format, self._reader
        pieces: list[str] = []
        held = ""  # a line break, which is not part of the value if it ends there

        def sink(text: str) -> None:
            nonlocal held
            text = held + text
            held = "\n" if form.newlines and text.endswith("\n") else ""
            text = text.removesuffix(held)
            if types == ["string"]:
                self._arguments(escaped(text))
            else:
                pieces.append(text)

        if types == ["string"]:
            self._arguments('"')
        if form.newlines and (yield from reader.peek()) == "\n":
            reader.take(1)
        while True:
            marker = yield from reader.until(markers(form.after_value.strip(SPACE)), sink)
            if not marker:
                raise MalformedCall
            space = yield from reader.space()
            if (yield from reader.starts(form.before_key.strip(SPACE))) or (yield from self._closed()):
                break
            sink(marker + space)  # the value has this text
        self._arguments('"' if types == ["string"] else json_of("".join(pieces), types))

    # Messages in channels

    def _messages(self) -> Steps[None]:
        """Each message has a header, such as ``<|channel|>final<|message|>``, which tells what its text is."""
        reader = self._reader
        while (yield from reader.peek()):
            space = yield from reader.space()
            for word in ("<|start|>", "<|channel|>", "to=", "<|message|>"):
                if (yield from reader.starts(word)):
                    yield from self._attempt(space, self._header())
                    break
            else:
                self._write_text(space)
                yield from self._body(Text)

    def _header(self) -> Steps[None]:
        reader = self._reader
        header: list[str] = []
        yield from reader.short_until(markers("<|message|>"), header)
        match = _HEADER.fullmatch("".join(header))
        recipient = match and (match["early"] or match["late"])
        name = (recipient or "").removeprefix("functions.")
        if match is None or (recipient and (name == recipient or not self._tools)):
            raise MalformedCall
        if recipient:
            yield from reader.space()
            if (yield from reader.peek()) != "{":
                raise MalformedCall
            self._bare = False
            self._begin(name)
            yield from reader.value(JSON, self._arguments)
            self._complete()
        reader.taken = None
        thought = match["channel"] == "analysis" and self._thinks is not _SILENT
        yield from self._body(Reasoning if thought and not recipient else Text)

    def _body(self, kind: type[Part]) -> Steps[None]:
        """The text of a message up to its end. A line break separates messages of one kind."""
        write = self._write_text if kind is Text else self._write_reasoning
        if kind in self._said and self._fresh:
            self._spaces, self._trim = ["\n"], False
        finder = markers(*_ENDS, "<|start|>", *self._dropped)
        while (marker := (yield from self._reader.until(finder, write))) in self._dropped:
            pass
        if not self._fresh:
            self._said.add(kind)
        if marker == "<|start|>":
            self._reader.at -= len(marker)
        self._border()


def _ignore(text: str) -> None:
    """Drops the text of a value."""


def _object(text: str) -> str:
    """The arguments of a call, which are an object, the JSON text of an object in a string, or null."""
    try:
        value = json_value(text)
        if isinstance(value, str):
            value = json_value(value)
            text = json.dumps(value)
    except ValueError as error:
        raise MalformedCall from error
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise MalformedCall
    return text
