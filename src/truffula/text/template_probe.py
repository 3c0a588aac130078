"""Whether a chat template writes what it is given into the prompt: words are put in its place and looked for.

A template may read a field in many ways (by name, by iteration, through a macro), and may read one and not write it.
So the question is put to the text: a second rendering has a word of its own in each place, and a word that is not in
that text belongs to a place the template leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

Kind = Literal["tool message", "tool calls", "documents", "tools", "name", "system message"]
_KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "tool": "tool message",
        "function": "tool message",
        "system": "system message",
        "developer": "system message",
    }
)


@dataclass(frozen=True)
class Place:
    """A part of a conversation that must be in the prompt: its ``text``, and the word put in place of it."""

    word: str
    kind: Kind
    param: str
    text: str


def put_words(
    chat: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    documents: Sequence[dict[str, Any]] | None,
    only: Kind | None = None,
) -> list[Place]:
    """Put words into what a template might leave out, in place. The text of users and assistants stays as it is.

    ``only`` restricts it to one kind: all words together may lead a template another way (a call whose function it
    looks up among the tools), so each kind that is missing is looked for once more by itself.
    """
    places: list[Place] = []

    def word(kind: Kind, param: str, text: str) -> str:
        """A new word for ``text``, or ``text`` itself where its kind is not asked about."""
        if only not in (None, kind):
            return text
        places.append(Place(f"trufflprobe{len(places)}x", kind, param, text))
        return places[-1].word

    for index, message in enumerate(chat):
        where = f"messages[{index}]"
        kind = _KINDS.get(message["role"])
        if kind is not None and message["content"].strip():
            message["content"] = word(kind, f"{where}.content", message["content"])
        if isinstance(message.get("name"), str) and "tool_call_id" not in message:  # else its call has the name, too
            message["name"] = word("name", f"{where}.name", message["name"])
        for call in message.get("tool_calls") or ():
            function = call["function"]
            if isinstance(function.get("name"), str):
                function["name"] = word("tool calls", f"{where}.tool_calls", function["name"])
    for index, tool in enumerate(tools or ()):
        inner = tool.get("function", tool)
        if isinstance(inner, dict) and isinstance(inner.get("name"), str):
            inner["name"] = word("tools", f"tools[{index}]", inner["name"])
    for index, document in enumerate(documents or ()):
        if has_text(document) and (instead := word("documents", f"documents[{index}]", "")):
            replace_texts(document, instead)
    return places


def missing_from(text: str, places: Iterable[Place]) -> list[Place]:
    """The places whose word is not in ``text``, in whatever case it was written."""
    folded = text.casefold()
    return [place for place in places if place.word not in folded]


def is_written_once_more(text: str, prompt: str, others: Iterable[str]) -> bool:
    """Whether ``prompt`` holds ``text`` more often than all ``others`` that may be in it: one was put there for it."""
    wanted = text.strip()
    return prompt.count(wanted) > sum(other.count(wanted) for other in others)


def has_text(value: Any) -> bool:
    """Whether a JSON value holds a string that is not blank."""
    if isinstance(value, dict | list):
        return any(map(has_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and bool(value.strip())


def replace_texts(value: Any, word: str) -> Any:
    """``value`` with every string that is not a key replaced by ``word``; lists and objects are changed in place."""
    if isinstance(value, dict):
        value.update({key: replace_texts(item, word) for key, item in value.items()})
    elif isinstance(value, list):
        value[:] = [replace_texts(item, word) for item in value]
    return word if isinstance(value, str) else value
