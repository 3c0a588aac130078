"""``truffula chat``: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType

from msgspec.structs import replace

from truffula.cli.chat_models import BASE, ChatModel, split_adapter
from truffula.cli.line_editor import LineEditor
from truffula.cli.output import fail, note, write
from truffula.environment import expanded, state_folder
from truffula.errors import (
    AdapterNotFound,
    ConfigError,
    InvalidRequest,
    TemplateError,
    TruffulaError,
    did_you_mean,
    nearest,
)
from truffula.params import SamplingParams
from truffula.types import TextDelta

FENCE = '"""'
TOO_LONG = ("prompt_too_long", "context_length_exceeded")
HISTORY = "chat_history"
SETTINGS = MappingProxyType({"temperature": float, "top_p": float, "top_k": int, "max_tokens": int, "seed": int})


def run_chat(model: ChatModel, adapter: str, system: str | None, params: SamplingParams) -> None:
    """Chat until the end of input. When input is a pipe, the first error ends the chat and is raised."""
    if not model.can_chat(None if adapter == BASE else adapter):
        raise TemplateError(
            f"{model.name} has no chat template, so it cannot chat; 'truffula generate --raw' completes text."
        )
    chat = Chat(model, adapter, system, params)
    editor = LineEditor(state_folder() / HISTORY, chat.complete)
    chat.interactive = editor.interactive
    if editor.interactive:
        note(f"{model.name}, adapters: {', '.join(model.adapters()) or 'none'}. /help lists the commands, /bye exits.")
    for text in _messages(editor, chat):
        try:
            if not chat.handle(text):
                return
        except TruffulaError as error:
            if not editor.interactive:
                raise
            fail(error)


def _messages(editor: LineEditor, chat: Chat) -> Iterator[str]:
    """The user's messages, until the end of input or two Ctrl-C in a row."""
    interrupted, hint = False, ""
    while True:
        try:
            if hint:
                note(hint)
                hint = ""
            text = _message(editor, f"{chat.adapter}> ")
        except EOFError:
            if editor.interactive:
                note("")
            return
        except KeyboardInterrupt:
            if interrupted:
                note("")
                return
            interrupted, hint = True, "\nCtrl-C again, Ctrl-D or /bye ends the chat."
            continue
        interrupted = False
        if text.strip():
            yield text


def _message(editor: LineEditor, prompt: str) -> str:
    """One message: a line, lines joined by a backslash at their end, or the lines between three quotes."""
    line = editor.read(prompt).strip()
    lines = [line]
    more = " " * (len(prompt) - 4) + "... "
    try:
        if line.startswith(FENCE):
            lines[0] = line = line.removeprefix(FENCE)
            while not line.rstrip().endswith(FENCE):
                lines.append(line := editor.read(more))
            lines[-1] = line.rstrip().removesuffix(FENCE)
            text = "\n".join(lines).strip("\n")
            return f"/{text}" if text.startswith("/") else text  # text between quotes is never a command
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(editor.read(more))
    except EOFError:
        pass  # the end of a pipe also ends the message
    return "\n".join(lines)


@dataclass(frozen=True)
class Command:
    """A command, which begins with a slash. ``run`` is called with the text after its name."""

    usage: str
    help: str
    run: Callable[[str], None]
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.usage.partition(" ")[0]


class Chat:
    """A conversation: its messages, the selected adapter and the sampling parameters."""

    def __init__(self, model: ChatModel, adapter: str, system: str | None, params: SamplingParams) -> None:
        self.adapter = adapter
        self.interactive = True  # Ctrl-C ends the answer instead of the chat
        self._model = model
        self._system = system
        self._params = params
        self._messages: list[dict[str, str]] = []
        self._last_message: str | None = None
        self._max_tokens = params.max_tokens  # of the last answer
        self._ended = False
        self._commands = (
            Command("/help", "list the commands", self._help, ("/?",)),
            Command("/adapter NAME", "use this adapter, or 'base' for the base model", self._switch),
            Command("/adapters", "list the adapters", self._list),
            Command("/load [NAME=]FOLDER", "load an adapter and use it", self._load),
            Command("/system [TEXT]", "show or set the system message; 'clear' removes it", self._set_system),
            Command("/set [NAME VALUE]", f"show or set {', '.join(SETTINGS)}", self._set),
            Command("/clear", "clear the conversation", self._clear, ("/reset",)),
            Command("/retry", "generate a new answer to the last message", self._retry),
            Command(
                "/save FILE", "save the conversation: as messages to a .json file, as text to any other", self._save
            ),
            Command("/bye", "exit, like Ctrl-D", self._end, ("/exit", "/quit", "/q")),
        )

    def handle(self, text: str) -> bool:
        """Run a command or answer a message; False ends the chat. A ``TruffulaError`` leaves the state unchanged."""
        if text.startswith("//"):
            self._answer(text[1:])
        elif text.startswith("/"):
            word, _, rest = text.partition(" ")
            self._command(word).run(rest.strip())
        else:
            self._answer(text)
        return not self._ended

    def complete(self, line: str, word: str) -> list[str]:
        """Completions of ``word``, the last word of ``line``."""
        command = line.partition(" ")[0]
        if not line.startswith("/"):
            return []
        if " " not in line:
            names = [f"{one.name} " if " " in one.usage else one.name for one in self._commands]
        elif command == "/adapter":
            names = [BASE, *self._model.adapters()]
        elif command == "/set":
            names = list(SETTINGS)
        elif command in ("/load", "/save"):
            names = _paths(word)
        else:
            names = []
        return sorted(name for name in names if name.startswith(word))

    def _command(self, word: str) -> Command:
        by_name = {name: command for command in self._commands for name in (command.name, *command.aliases)}
        if word not in by_name:
            meant = did_you_mean(nearest(word, by_name))
            raise InvalidRequest(
                f"Unknown command {word}.{meant} /help lists them; begin with // to send a message with a slash."
            )
        return by_name[word]

    def _help(self, rest: str) -> None:
        width = max(len(command.usage) for command in self._commands)
        for command in self._commands:
            also = f" (also {', '.join(command.aliases)})" if command.aliases else ""
            note(f"{command.usage:{width}}  {command.help}{also}")
        note(
            f"For several lines, begin with {FENCE} and end with {FENCE}, or end a line with \\. Ctrl-C stops an "
            "answer."
        )

    def _switch(self, rest: str) -> None:
        names = [BASE, *self._model.adapters()]
        if not rest:
            note(f"{self.adapter} is selected; available: {', '.join(names)}.")
            return
        if rest not in names:
            meant = did_you_mean(nearest(rest, names))
            raise AdapterNotFound(
                f"There is no adapter {rest!r}.{meant} Available: {', '.join(names)}; /load [NAME=]FOLDER adds one.",
                param="adapter",
            )
        self.adapter = rest

    def _list(self, rest: str) -> None:
        for name in (BASE, *self._model.adapters()):
            note(f"{'*' if name == self.adapter else ' '} {name}")

    def _load(self, rest: str) -> None:
        name, source = split_adapter(rest)
        if not rest or source is None:
            raise InvalidRequest("/load needs the folder of an adapter: /load [NAME=]FOLDER.")
        if name in self._model.adapters():
            raise InvalidRequest(
                f"An adapter named {name!r} exists already: select it with /adapter {name}, or load this one under "
                "another name with /load NAME=FOLDER."
            )
        self._model.load(name, source)
        self.adapter = name
        note(f"{name} is loaded and selected.")

    def _set_system(self, rest: str) -> None:
        if rest:
            self._system = None if rest == "clear" else rest
        note(f"system: {self._system}" if self._system else "There is no system message.")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name:
            self._params = self._changed(name, value.strip())
        note(", ".join(f"{name} {_shown(getattr(self._params, name))}" for name in SETTINGS))

    def _changed(self, name: str, value: str) -> SamplingParams:
        kind = SETTINGS.get(name)
        if kind is None:
            meant = did_you_mean(nearest(name, SETTINGS))
            raise InvalidRequest(f"Unknown setting {name!r}.{meant} Available: {', '.join(SETTINGS)}.")
        try:
            parsed = None if value == "none" and name in ("max_tokens", "seed") else kind(value)
        except ValueError:
            expected = "an integer" if kind is int else "a number"
            raise InvalidRequest(f"{name} is {value!r}; it must be {expected}.", param=name) from None
        return replace(self._params, **{name: parsed})

    def _clear(self, rest: str) -> None:
        self._messages, self._last_message = [], None
        note("The conversation is cleared.")

    def _retry(self, rest: str) -> None:
        if self._last_message is None:
            raise InvalidRequest("There is no message to retry.")
        kept = self._messages
        if kept and kept[-2]["content"] == self._last_message:
            self._messages = kept[:-2]
        try:
            self._answer(self._last_message)
        except TruffulaError:
            self._messages = kept
            raise

    def _save(self, rest: str) -> None:
        if not rest:
            raise InvalidRequest("/save needs a file name: /save FILE.")
        path = expanded(rest)
        messages = self._with_system(self._messages)
        if path.suffix == ".json":
            text = json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n"
        else:
            text = "\n".join(f"{message['role']}: {message['content']}\n" for message in messages)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise ConfigError(f"{path} already exists; /save does not overwrite files.", param="file") from None
        except OSError as error:
            raise ConfigError(f"{path} can't be written: {error.strerror}.", param="file") from error
        note(f"{len(messages)} messages written to {path}.")

    def _end(self, rest: str) -> None:
        self._ended = True

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self._system}] if self._system else []), *messages]

    def _answer(self, text: str) -> None:
        """Print and keep the answer to ``text``, also if Ctrl-C stops it; a message whose answer fails is not kept."""
        self._last_message = text
        messages = [*self._messages, {"role": "user", "content": text}]
        answer, stopped, cut_off = "", False, False
        try:
            for delta in self._deltas(messages):
                write(delta.text)
                answer += delta.text
                cut_off = cut_off or delta.finish_reason == "length"
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            stopped = True
        finally:
            if answer and not answer.endswith("\n"):
                write("\n")
        if stopped:
            note("(stopped)")
        elif cut_off:
            limit = self._max_tokens
            note(f"(cut off at {'the end of the context' if limit is None else f'max_tokens {limit}, see /set'})")
        if answer or not stopped:
            self._messages = [*messages, {"role": "assistant", "content": answer}]

    def _deltas(self, messages: list[dict[str, str]]) -> Iterator[TextDelta]:
        """The deltas of the answer, of at most ``max_tokens`` or, if fewer, the tokens that the context has left."""
        for params in (self._params, replace(self._params, max_tokens=None)):
            self._max_tokens = params.max_tokens
            try:
                adapter = None if self.adapter == BASE else self.adapter
                for _, delta in self._model.stream([self._with_system(messages)], [adapter], params):
                    yield delta
                return
            except TruffulaError as error:
                if error.code not in TOO_LONG:
                    raise
                context_error = error
        raise InvalidRequest(
            f"The conversation no longer fits into the model's context. {context_error.message} /clear starts a new "
            "one; /save FILE saves this one."
        ) from context_error


def _paths(word: str) -> list[str]:
    """Paths that begin with ``word``; folders end with a slash."""
    start, slash, name = word.rpartition("/")
    folder = expanded(start + slash or ".")
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.name.startswith(name))
    return [f"{start}{slash}{path.name}{'/' * path.is_dir()}" for path in found]


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
