"""``RequestLimits``: what one request may ask for, by the operator's options and the model's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from truffula.errors import InvalidRequest, PromptTooLong
from truffula.service.prompts import MAX_TRUNCATED_CHARS

MAX_KEYS = 1024
"""Keys of one object of a body."""
MAX_STOP_CHARS = 16_384
"""Characters of all stop strings together."""
MAX_STOP_IDS = 4096
MAX_BIASES = 2**18
"""Entries of logit_bias times prompts: each prompt's go to the engine."""


class RequestLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds that a body is checked against, in the server and in text workers.

    ``defaults`` are sampling fields for requests on the OpenAI side that leave them out, ``base_words`` what means the
    base model.
    """

    max_n: int
    max_best_of: int
    max_prompts: int
    max_stop_sequences: int
    max_logprobs: int
    max_model_len: int
    vocab_size: int
    queue_timeout_s: float | None
    request_timeout_s: float | None
    defaults: dict[str, Any]
    base_words: tuple[str, ...]

    def check_lengths(self, body: Mapping[str, Any]) -> None:
        """Raise ``InvalidRequest`` for what is too long in a decoded body, whatever it holds."""
        inner = body.get("parameters")
        _check_length("The body", body, MAX_KEYS)
        for held in (body, inner) if isinstance(inner, dict) else (body,):
            self._check_fields(held)
        prompt = body.get("prompt")
        if not isinstance(prompt, list) or not prompt:
            return
        if isinstance(prompt[0], str | list):
            _check_length("prompt", prompt, self.max_prompts)
            for index, one in enumerate(prompt):
                if isinstance(one, list):
                    self._check_ids(f"prompt[{index}]", one, body)
            self._check_biases(len(prompt), body.get("logit_bias"))
        else:
            self._check_ids("prompt", prompt, body)

    def _check_fields(self, held: Mapping[str, Any]) -> None:
        rows = {
            "parameters": MAX_KEYS,
            "chat_template_kwargs": MAX_KEYS,
            "messages": max(self.max_model_len, MAX_KEYS),
            "input": max(self.max_model_len, MAX_KEYS),
            "documents": max(self.max_model_len, MAX_KEYS),
            "tools": MAX_KEYS,
            "tokens": MAX_TRUNCATED_CHARS // 2,
            "stop": self.max_stop_sequences,
            "stop_sequences": self.max_stop_sequences,
            "stop_token_ids": MAX_STOP_IDS,
            "logit_bias": self.vocab_size,
        }
        for name, limit in rows.items():
            _check_length(name, held.get(name), limit)
        for name in ("stop", "stop_sequences"):
            stop = held.get(name)
            chars = sum(len(one) for one in (stop if isinstance(stop, list) else [stop]) if isinstance(one, str))
            if chars > MAX_STOP_CHARS:
                raise InvalidRequest(
                    f"{name} has {chars} characters; this server allows at most {MAX_STOP_CHARS}.", param=name
                )

    def _check_ids(self, name: str, ids: list[Any], body: Mapping[str, Any]) -> None:
        # A prompt that will be truncated may be longer; that of a wrong item is reported as such.
        if len(ids) > self.max_model_len and body.get("truncate_prompt_tokens") is None and type(ids[0]) is int:
            raise PromptTooLong(
                f"{name} has {len(ids)} tokens; the model's limit is {self.max_model_len}, prompt and completion "
                "together.",
                param="prompt",
                prompt_tokens=len(ids),
                max_model_len=self.max_model_len,
            )

    def _check_biases(self, prompts: int, bias: Any) -> None:
        if isinstance(bias, dict) and len(bias) * prompts > MAX_BIASES:
            raise InvalidRequest(
                f"logit_bias has {len(bias)} entries for {prompts} prompts; entries times prompts may be at most "
                f"{MAX_BIASES}. Send fewer prompts in one request.",
                param="logit_bias",
            )


def _check_length(name: str, value: Any, limit: int) -> None:
    if isinstance(value, list | dict) and len(value) > limit:
        items = "keys" if isinstance(value, dict) else "items"
        raise InvalidRequest(
            f"{name} has {len(value)} {items}; this server allows at most {limit}.",
            param=None if name == "The body" else name,
            limit=limit,
        )


def check_at_most(*rows: tuple[str, int | None, int]) -> None:
    """Raise ``InvalidRequest`` for the first field whose value is above its limit."""
    for name, value, limit in rows:
        if value is not None and value > limit:
            raise InvalidRequest(f"{name} is {value}; this server allows at most {limit}.", param=name, limit=limit)
