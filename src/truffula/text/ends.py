"""Which tokens end a completion, and where each is named."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from truffula.errors import InvalidRequest, TemplateError
from truffula.items import Message, Text
from truffula.text.chat_template import ChatTemplates
from truffula.text.tokenizer import Tokenizer
from truffula.types import EndToken, GenerateRequest

Render = Callable[[ChatTemplates, GenerateRequest], str]
"""Renders a chat as ``ChatTemplates.render``."""
MAX_SHOWN = 20
IN_CHATS = "the chat template; in chat requests"
# An assistant's message, to find what a template writes after it. No template contains it.
_ANSWER = "TRUFFULA ANSWERS HERE"
_MARK = re.compile(r"<[^\s<>]{1,60}>")


class EndTokens:
    """The end tokens of one model: ``always`` those of every request, and those of its chat templates.

    Args:
        named: What the tokenizer's files say.
        configured: What config.json and generation_config.json say.
        vocab_size: Ids that the model can generate.
        render: Renders chats, in place of ``ChatTemplates.render``.
        turn_ends: Where they were found already.

    ``turn_ends`` are the tokens that the model's own templates write after every answer, by source. Such a token is the
    same where the conversation ends and where it continues: one that only begins the next turn does not count.
    ``warnings`` are for the operator: tokens that can't end a completion, a default template whose turn end is no
    token, a model without end tokens.
    """

    def __init__(
        self,
        named: Iterable[EndToken],
        configured: Iterable[EndToken],
        *,
        tokenizer: Tokenizer | None,
        templates: ChatTemplates,
        vocab_size: int,
        render: Render | None = None,
        turn_ends: Mapping[str, EndToken] | None = None,
    ) -> None:
        self._tokenizer, self._templates, self._vocab_size = tokenizer, templates, vocab_size
        self._render = render or ChatTemplates.render
        self.warnings: list[str] = []
        found: dict[int, EndToken] = {}
        beyond: list[EndToken] = []
        for token in (*named, *configured):
            if token.id >= vocab_size:
                beyond.append(token)
            elif token.id not in found:
                text = tokenizer.text_of(token.id) if tokenizer is not None else token.text
                found[token.id] = EndToken(token.id, token.source, text)
        if beyond:
            self.warnings.append(
                f"Tokens beyond the model's {vocab_size} ids cannot end a completion: {describe(beyond)}."
            )
        self.always = list(found.values())
        self.ids = frozenset(found)
        self.turn_ends = dict(turn_ends or {})
        for source in templates.sources.values() if turn_ends is None else ():
            if tokenizer is not None and (turn_end := self._turn_end(source, tokenizer)) is not None:
                self.turn_ends[source] = turn_end
        default = self.turn_ends.get(templates.sources.get("default", ""))
        self.all = [*self.always, *([default] if default is not None and default.id not in self.ids else [])]
        if not self.all:
            self.warnings.append(
                "No file of the model names an end token: completions end by length or by a stop string."
            )

    def _turn_end(self, source: str, tokenizer: Tokenizer) -> EndToken | None:
        after = [self._after_answer(source, continued) for continued in (False, True)]
        first, again = (tokenizer.encode(text, add_special_tokens=False)[:1] for text in after)
        if first and first == again and first[0] in tokenizer.added_ids and first[0] < self._vocab_size:
            return EndToken(first[0], IN_CHATS, tokenizer.text_of(first[0]))
        mark, other = (match[0] if (match := _MARK.match(text)) else "" for text in after)
        if mark and mark == other:
            self.warnings.append(
                f"The chat template ends an answer with {mark!r}, which is not a single token of this model, so it "
                "does not end a completion. Give it as a stop string, or use the tokenizer that the model was "
                "trained with."
            )
        return None

    def _after_answer(self, source: str, continued: bool) -> str:
        """What the template writes after an answer, stripped; "" where it refuses the conversation."""
        question = Message(role="user", items=[Text("Hello")])
        messages = [question, Message(role="assistant", items=[Text(_ANSWER)]), *([question] if continued else [])]
        chat = GenerateRequest(messages=messages, chat_template=source, add_generation_prompt=False)
        try:
            text = self._render(self._templates, chat)
        except (TemplateError, InvalidRequest):
            return ""
        return text.rpartition(_ANSWER)[2].strip() if _ANSWER in text else ""


def describe(tokens: Sequence[EndToken]) -> str:
    """``<|im_end|> (2, tokenizer_config.json eos_token), …``, for logs and reports; at most ``MAX_SHOWN`` of them."""
    shown = [
        f"{token.text} ({token.id}, {token.source})" if token.text else f"{token.id} ({token.source})"
        for token in tokens[:MAX_SHOWN]
    ]
    more = len(tokens) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
