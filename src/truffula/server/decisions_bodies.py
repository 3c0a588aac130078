"""The body of ``POST /v1/decisions``."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from truffula.errors import InvalidRequest
from truffula.items import Message, Text
from truffula.params import SamplingParams
from truffula.server.body import Address, Body, FirstError, GeneratingBody, Objects
from truffula.server.foreign_fields import RouteFields, adapters_named
from truffula.server.limits import RequestLimits
from truffula.server.responses_items import messages_of, texts_of
from truffula.types import GenerateRequest

LETTERS = string.ascii_uppercase + string.ascii_lowercase
"""What the options of a question are called in its prompt; each must be one token."""
MAX_QUESTIONS = 400


class Option(Body):
    """An option of ``choice`` (``value``) or a level of ``score`` (``label``)."""

    value: str | bool | None = None
    label: str | None = None
    description: str | None = None


class Question(Body):
    type: Literal["predicate", "choice", "score"]
    instructions: str | Objects
    name: str | None = None
    choices: Annotated[list[Option], FirstError()] | None = None
    levels: Annotated[list[Option], FirstError()] | None = None

    def options(self, place: str) -> list[tuple[str | bool, str | None]]:
        """What can be answered, with descriptions. Raises ``InvalidRequest``."""
        if self.type == "predicate":
            return [("true", None), ("false", None)]
        name, key = ("choices", "value") if self.type == "choice" else ("levels", "label")
        held: list[Option] = getattr(self, name) or []
        if not 2 <= len(held) <= len(LETTERS):
            raise InvalidRequest(
                f"{place}.{name} has {len(held)} items; this server takes 2 to {len(LETTERS)}.", param=f"{place}.{name}"
            )
        found: list[tuple[str | bool, str | None]] = []
        for i, one in enumerate(held):
            value = getattr(one, key)
            if value is None:
                raise InvalidRequest(f"{place}.{name}[{i}].{key} is required.", param=f"{place}.{name}[{i}].{key}")
            if any(type(value) is type(other) and value == other for other, _ in found):
                raise InvalidRequest(f"{place}.{name} has {value!r} twice.", param=f"{place}.{name}")
            found.append((value, one.description))
        return found


class DecisionsBody(GeneratingBody):
    """``POST /v1/decisions``."""

    input: str | Objects
    questions: Annotated[list[Question], FirstError()]
    model: str | None = None
    cache_salt: str | None = None
    lora_path: Any = Field(default=None, description="Name of an adapter, as in model; SGLang's field.")
    adapter_id: Any = Field(default=None, description="Name of an adapter, as in model; LoRAX's field.")
    adapter_source: str | None = None

    def address(self) -> Address:
        named = adapters_named(self.items(), "", "model")
        return Address([self.model], named, self.adapter_source, self.cache_salt, user=self.end_user)

    def field_of(self, name: str) -> str:
        return "" if name == "template_kwargs.enable_thinking" else super().field_of(name)  # set for every model

    def requests(
        self, limits: RequestLimits, *, streams: bool, stored: Mapping[str, Any] | None = None
    ) -> list[GenerateRequest]:
        """One a question. Its answer is one token; the letters' ids are not known here."""
        if not 1 <= len(self.questions) <= MAX_QUESTIONS:
            raise InvalidRequest(
                f"questions has {len(self.questions)} items; 1 to {MAX_QUESTIONS} are allowed.", param="questions"
            )
        talk = messages_of(None, (), self.input)
        return [
            GenerateRequest(
                messages=_asked(talk, _prompt(question, f"questions[{i}]")),
                template_kwargs={"enable_thinking": False},
                params=SamplingParams(max_tokens=1, seed=0, ignore_eos=True, logprobs_of="warped"),
                queue_timeout_s=limits.queue_timeout_s,
                deadline_s=limits.request_timeout_s,
            )
            for i, question in enumerate(self.questions)
        ]


def _prompt(question: Question, place: str) -> str:
    asked = "\n".join(texts_of(question.model_dump(include={"instructions"}), "instructions", place))
    lines = [
        f"{letter}. {_shown(value)}" + (f": {description}" if description else "")
        for letter, (value, description) in zip(LETTERS, question.options(place), strict=False)
    ]
    kind = "True or false? " if question.type == "predicate" else ""
    return f"{kind}{asked}\n\nOptions:\n" + "\n".join(lines) + "\n\nAnswer with one letter."


def _shown(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()


def _asked(talk: Sequence[Message], text: str) -> list[Message]:
    """The conversation with a question. Templates take no two messages of the user in a row."""
    if talk and talk[-1].role == "user":
        return [*talk[:-1], Message(role="user", items=[*talk[-1].items, Text(text)])]
    return [*talk, Message(role="user", items=[Text(text)])]


DecisionsBody.route_fields = RouteFields("/v1/decisions", "model", {"": frozenset(DecisionsBody.model_fields)})
