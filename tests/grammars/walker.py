"""Random texts of a grammar: a matcher of llguidance over a small vocabulary, or over a model's."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from truffula.items import Constraint
from truffula.text.grammars import compile_source

WORDS = ['{"', '":', '": ', '", "', '",', "}}", "]}", '"}', "[]", "true", "false", "null", " 12", "00", "1.", "e+"]
WORDS += ["ab", "the ", "\\n", '\\"', "é", "日", "-0", "--", "a.b", "@a", "\n  "]


class Bytes:
    """A vocabulary of every byte and of some words; the last id is the end."""

    bos_token_id = None

    def __init__(self, words: Sequence[bytes]) -> None:
        self.tokens = [*(bytes([byte]) for byte in range(256)), *words, b"\xff<|end|>"]
        self.eos_token_id = len(self.tokens) - 1
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


class Walker:
    """Walks grammars over a vocabulary."""

    def __init__(self, words: Sequence[bytes]) -> None:
        self.vocabulary = Bytes(words)
        self._library = LLTokenizer(TokenizerWrapper(self.vocabulary), slices=[])

    def matcher(self, source: str) -> LLMatcher:
        matcher = LLMatcher(self._library, source, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def accepts(self, source: str, text: str) -> bool:
        matcher = self.matcher(source)
        ids = list(text.encode())
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def walk(self, source: str, seed: int, steps: int = 300) -> str | None:
        """A text that ended by acceptance, None for one that did not within ``steps``.

        A text ends as a sampled one does: with the end token, or where nothing else may follow. After half of the steps
        it ends where it can, and closes what is open.
        """
        matcher, draw, out = self.matcher(source), random.Random(seed), b""
        end = self.vocabulary.eos_token_id
        for step in range(steps):
            bits = int.from_bytes(matcher.compute_bitmask(), "little")
            assert not matcher.is_error(), matcher.get_error()
            allowed = [token for token in range(end + 1) if bits >> token & 1]
            assert (end in allowed) == matcher.is_accepting()
            if matcher.is_accepting() and (allowed == [end] or step > steps // 2 or draw.random() < 0.3):
                return out.decode()
            assert allowed, f"nothing may follow {out!r}"
            if step > steps // 2 and draw.random() < 0.7:
                closing = [token for token in allowed if self.vocabulary.tokens[token] in (b'"', b"}", b"]", b'"}')]
                allowed = closing or allowed
            token = draw.choice([token for token in allowed if token != end])
            assert matcher.consume_token(token)
            out += self.vocabulary.tokens[token]
        return None


@functools.cache
def small() -> Walker:
    return Walker([word.encode() for word in WORDS])


def compiled(kind: str, value: object) -> str:
    text = value if isinstance(value, str) and kind in ("regex", "lark") else json.dumps(value)
    return compile_source(Constraint(kind=kind, value=text))  # type: ignore[arg-type]
