"""Fields that clients send and this server cannot honour: refused by name unless their value asks for nothing.

A field of these tables is never ignored with an effect the client would miss. Null is always neutral.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from truffula.errors import InvalidRequest

# field → values that ask for nothing
OPENAI_REFUSED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "suffix": ("",),
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "structured_outputs": ({},),
        "guided_json": (),
        "guided_regex": ("",),
        "guided_choice": ([],),
        "guided_grammar": ("",),
        "regex": ("",),
        "ebnf": ("",),
        "json_schema": (),
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "early_stopping": (False,),
        "allowed_token_ids": ([],),
        "bad_words": ([],),
        "logits_processors": ([],),
        "custom_logit_processor": ("",),
        "priority": (0,),
        "truncation_side": ("left",),
        "chat_template": (),
        "echo": (False,),  # of a chat; completions know it
        "thinking_token_budget": (),
        "prediction": (),
        "audio": (),
        "modalities": (["text"], []),
        "web_search_options": (),
        "merged_adapters": (),
        "lora_request": ({},),
        "guideline": ("",),
        "watermark": (False,),
        "grammar": (),
        "prompt_embeds": (),
        "kv_transfer_params": (),
    }
)
NATIVE_REFUSED: Mapping[str, tuple[Any, ...]] = MappingProxyType({**OPENAI_REFUSED, "schema": ()})
# The other side's fields among native parameters: field → (the native word, values that ask for nothing).
NATIVE_ELSEWHERE: Mapping[str, tuple[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "max_tokens": ("max_new_tokens", ()),
        "max_completion_tokens": ("max_new_tokens", ()),
        "n": ("best_of", (1,)),
        "logprobs": ("details", (False,)),
        "top_logprobs": ("top_n_tokens", (0,)),
        "prompt_logprobs": ("decoder_input_details", ()),
        "ignore_eos": ("ignore_eos_token", (False,)),
        "truncate_prompt_tokens": ("truncate", ()),
        "lora_path": ("adapter_id", ("",)),
        "lora_name": ("adapter_id", ("",)),
        "lora_adapter": ("adapter_id", ("",)),
        "include_stop_str_in_output": ("", (True,)),
        "no_stop_trim": ("", (True,)),
        "skip_special_tokens": ("", (True,)),
        "add_special_tokens": ("", (True,)),
        "return_token_ids": ("details", (False,)),
        "return_tokens_as_token_ids": ("", (False,)),
        "chat_template_kwargs": ("", ({},)),
        "add_generation_prompt": ("", (True,)),
        "continue_final_message": ("", (False,)),
        "reasoning_effort": ("", ()),
        "documents": ("", ([],)),
    }
)
# Two spellings of one field.
OPENAI_TWINS = (
    ("ignore_eos", "ignore_eos_token"),
    ("include_stop_str_in_output", "no_stop_trim"),
    ("request_id", "rid"),
)
# Known, and of no effect here: field → values that ask for nothing. Another value is accepted and listed as ignored.
OPENAI_IDLE: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "api_token": ("",),
        "user": ("",),
        "metadata": ({},),
        "store": (False,),
        "service_tier": ("auto", "default"),
        "safety_identifier": ("",),
        "prompt_cache_key": ("",),
        "prompt_cache_retention": (),
        "verbosity": (),
        "parallel_tool_calls": (True,),
        "tool_prompt": ("",),
        "include_reasoning": (True,),
        "separate_reasoning": (True,),
        "stream_reasoning": (True,),
        "spaces_between_special_tokens": (True,),
        "guided_decoding_backend": ("",),
        "guided_whitespace_pattern": ("",),
    }
)


def refuse(extra: Mapping[str, Any], refused: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ``InvalidRequest`` for the first field of ``refused`` in ``extra`` whose value is not neutral."""
    for name, value in extra.items():
        if name in refused and not is_neutral(value, refused[name]):
            raise InvalidRequest(f"{name} is not supported by this server; leave it out.", param=name)


def refuse_elsewhere(extra: Mapping[str, Any]) -> None:
    """Raises ``InvalidRequest`` for a field of ``/v1/`` that has another name on the native side, or none."""
    for name, value in extra.items():
        if name in NATIVE_ELSEWHERE and not is_neutral(value, NATIVE_ELSEWHERE[name][1]):
            word = NATIVE_ELSEWHERE[name][0]
            instead = f"use {word}" if word else "leave it out"
            raise InvalidRequest(f"{name} is a field of /v1/ and has no effect on this route; {instead}.", param=name)


def refuse_twins(body: object, twins: Sequence[tuple[str, str]]) -> None:
    """Raises ``InvalidRequest`` where two spellings of one field are given and differ."""
    for name, twin in twins:
        one, other = getattr(body, name), getattr(body, twin)
        if one is not None and other is not None and one != other:
            raise InvalidRequest(f"{name} and {twin} mean the same and differ; give one of them.", param=name)


def asks_for_something(name: str, value: Any, known: Mapping[str, tuple[Any, ...]]) -> bool:
    """Whether a field without effect is worth a word: one nobody knows is, a known one unless it asks for nothing."""
    return name not in known or not is_neutral(value, known[name])


def is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    if value is None:
        return True
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)
